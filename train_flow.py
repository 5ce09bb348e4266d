"""Offline start: fit the flow to the latents of expert solutions (paper: flow pre-training).

    python train_flow.py                                           the embedded world
    python train_flow.py --model Qwen2.5-7B                        the published expert solutions
    python train_flow.py --model Qwen2.5-7B --data expert.jsonl    torchrun for several GPUs

Solutions have the columns `problem` and `solution`, or are chats (`messages`, `conversations`);
without --data, the published data set is taken from the hub.

Each step: the frozen policy, which runs up to the last tap and no further, gives the latents of
response tokens; each is put together with its context; `noise_repeats` draws of (t, x_0);
flow-matching loss; AdamW. Writes `flow/flow.safetensors` into the run's folder.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import flow as fl
import parallel
import rlfr
import rollout
import toy
from parallel import is_first, on_first, start
from run import (
    ComputeSettings,
    Run,
    RunSettings,
    Stopwatch,
    asked_to_stop,
    check_positive,
    export_flow,
    launch,
    with_defaults,
)

# Expert solutions of the published language runs: columns problem and solution, 94k rows
PUBLISHED_DATA = "open-r1/OpenR1-Math-220k"


@dataclass(frozen=True)
class SolutionSettings(rollout.DataSettings):
    """Where expert solutions stand, and how problems become prompts."""

    solution_column: str = "solution"  # Column with the solution's text
    # Longest prompt + solution in tokens, longer ones are cut; by default 8192, for VL models 16384
    cutoff: int | None = None


@dataclass(frozen=True)
class FlowSettings:
    """What the flow is, and how often and at which times a token is drawn."""

    flow_blocks: int | None = None  # Residual blocks; by default 4 below 5B parameters, 6 above
    # Draws of (t, x_0) a token; by default 2 for text above 5B, else 4
    noise_repeats: int | None = None
    # How t is drawn: random is the sigmoid of a normal, as official
    flow_times: fl.Times = "random"
    shift: int = 1  # Distance of the context's neighbour, in positions


@dataclass(frozen=True)
class OptimisationSettings:
    """The flow's optimiser."""

    warmup: float = 0.1  # Fraction of the steps over which the rate rises
    weight_decay: float = 0.01  # AdamW weight decay
    clip_norm: float = 1.0  # Largest gradient norm


@dataclass(frozen=True)
class Config:
    """Fit a flow to the latents of expert solutions."""

    model: str = "toy"  # A path, a hub id, a short name such as Qwen2.5-7B, or toy
    data: str | None = None  # Solutions: JSONL or Parquet file, save_to_disk folder or hub id
    contexts: tuple[str, ...] = ("previous",)  # Context modes, keys of flow.CONTEXTS
    percentiles: tuple[float, ...] = (0.25, 0.5, 0.75)  # Tapped layers, as fractions of the depth
    epochs: int = 2  # Passes over the data
    batch_size: int = 128  # Sequences a step, over all ranks
    lr: float = 1e-4  # Peak learning rate
    folder: str | None = None  # Run folder; by default one in runs/, named after the model
    resume: str | None = None  # Run folder to go on with
    seed: int = 0  # Seed of initialisation, order and noise
    solutions: SolutionSettings = SolutionSettings()
    flow: FlowSettings = FlowSettings()
    optimisation: OptimisationSettings = OptimisationSettings()
    compute: ComputeSettings = ComputeSettings()
    loading: rollout.LoadingSettings = rollout.LoadingSettings(max_pixels=262_144)
    run: RunSettings = RunSettings()


def resolve(config: Config) -> tuple[Config, rollout.Model]:
    """Check the settings and fill in what follows from the model; return them and the model."""
    check_positive(config, "epochs", "batch_size", "lr", "noise_repeats", "flow_blocks")
    check_positive(config, "clip_norm", "tokens_per_gpu", "keep")
    n_ranks = dist.get_world_size()
    if config.batch_size % n_ranks:
        raise ValueError(
            f"batch_size={config.batch_size} is not a multiple of the {n_ranks} ranks; choose one"
        )
    name = config.model
    world = on_first(lambda: toy.find_world(config.model))
    if world:
        name = world.path("model")
        config = with_defaults(config, data=world.path("expert.jsonl"))
    model = rollout.find_model(name, config.loading)
    if config.data is None:
        if model.processor is not None:
            raise ValueError(
                "no data given; expected --data with expert solutions (columns prompt, solution, "
                "images): those of the published vision-language runs are not one data set"
            )
        config = with_defaults(config, data=PUBLISHED_DATA)
        if is_first():
            print(f"no --data given: taking the published expert solutions, {PUBLISHED_DATA}")
    config = rollout.fill_in(config, model)
    cutoff = config.solutions.cutoff
    max_prompt_tokens = config.solutions.max_prompt_tokens
    if cutoff <= max_prompt_tokens:
        raise ValueError(
            f"cutoff {cutoff} leaves no room after prompts of {max_prompt_tokens} tokens; raise it"
        )
    return config, model


def load_solutions(source: str, settings: SolutionSettings, model: rollout.Model) -> list[rlfr.Row]:
    """Load expert solutions as tokens; a whole one ends as a turn does, a cut one does not."""
    rows = rollout.load_rows(source, (), settings.split, settings.subset)
    columns = (settings.problem_column, settings.solution_column)
    is_chat = "messages" in rows[0] or "conversations" in rows[0]
    if is_chat and settings.solution_column not in rows[0]:
        exchanges = [rollout.read_exchange(row, i) for i, row in enumerate(rows)]
        texts = [problem for problem, _ in exchanges]
        solutions = [solution for _, solution in exchanges]
    else:
        rollout.check_columns(rows, source, columns)
        texts = [row[settings.problem_column] for row in rows]
        solutions = [row[settings.solution_column] for row in rows]
    images = rollout.read_images(rows, source, settings, model.processor)
    prompts = rollout.make_prompts(texts, images, model, settings)
    ids = model.tokenizer(solutions, add_special_tokens=False)["input_ids"]
    end = rollout.solution_end(model, settings.template)
    episodes = []
    for i, prompt in enumerate(prompts):
        solution = ids[i] + end
        room = settings.cutoff - len(prompt)
        episodes.append(rlfr.Row(prompt, solution[:room], images[i]))
    return episodes


def step_line(step: int, metrics: dict[str, float]) -> str:
    """Return one line of figures of a step, for the screen."""
    return (
        f"step {step:5d}  loss {metrics['loss']:.4f}  grad {metrics['grad_norm']:.3f}  "
        f"lr {metrics['lr']:.2e}  {metrics['time/step']:.2f} s"
    )


def main(config: Config) -> None:
    """Fit a flow and write it to the run folder."""
    # ---- Solutions, policy, flow
    start()
    config, model = resolve(config)
    run = Run(config, f"flow-{Path(config.model).name}")
    solutions = load_solutions(config.data, config.solutions, model)
    dtype = parallel.compute_dtype(config.loading.dtype)
    policy = rlfr.load_policy(model.path, config.loading.trust_remote_code).requires_grad_(False)
    parallel.shard(policy, policy.blocks, dtype, config.compute.cpu_offload)
    n_layers = model.text_config.num_hidden_layers
    taps = rlfr.tap_layers(n_layers, config.percentiles)
    depths = [tap / n_layers for tap in taps]
    flow_config = fl.FlowConfig(
        dim=model.text_config.hidden_size,
        n_blocks=config.flow.flow_blocks,
        contexts=config.contexts,
        shift=config.flow.shift,
        percentiles=config.percentiles,
    )
    torch.manual_seed(config.seed)  # the same flow on all ranks
    flow = fl.Flow(flow_config)
    parallel.compile_flow(flow, config.compute.compile)
    parallel.shard(flow, (), dtype, config.compute.cpu_offload)
    learner = parallel.Learner(flow, (0.9, 0.999), config.optimisation.weight_decay)

    # ---- Begin, or go on from a checkpoint
    total_steps = math.ceil(config.epochs * len(solutions) / config.batch_size)
    progress = {"step": 0}
    state = {"progress": progress, "flow": learner}
    run.begin(state)
    run.write_json("flow.json", asdict(flow_config))  # an export of a checkpoint needs it
    if is_first():
        print(config)
        print(
            f"{len(solutions)} solutions, {total_steps} steps, taps {taps} of {n_layers}, "
            f"run folder {run.folder}"
        )

    bar = tqdm(
        initial=progress["step"],
        total=total_steps,
        desc="flow",
        unit="step",
        disable=not is_first(),
    )
    while (step := progress["step"]) < total_steps and not asked_to_stop():
        clock = Stopwatch()

        # ---- The step's solutions
        batch_size = config.batch_size
        first = step * batch_size
        order = rlfr.passes(len(solutions), first, batch_size, "flow order", config.seed)
        chosen = [solutions[i] for _, i in order]

        # ---- Latents, draws of (t, x_0), matching loss
        # gradients are of the sum over rows here, and divided by the number of rows below
        loss_sum = torch.zeros((), dtype=torch.float64, device=parallel.DEVICE)
        n_rows = torch.zeros((), dtype=torch.float64, device=parallel.DEVICE)
        parallel.begin_calls(flow)
        micro_batches = rlfr.micro_batches(
            chosen, config.compute.tokens_per_gpu, dist.get_rank(), dist.get_world_size()
        )
        for indices, batch in micro_batches:
            with torch.no_grad():
                latents = policy(batch, taps=taps, latents_only=True).latents
            flow_rows = fl.make_rows(
                flow_config, latents, depths, batch.attention_mask, batch.targets
            )
            lengths = [len(chosen[i].response_ids) for i in indices]
            for repeat in range(config.flow.noise_repeats):
                keys = [("flow noise", config.seed, *order[i], repeat) for i in indices]
                noise, z = fl.draw(flow_config, keys, lengths, parallel.DEVICE)
                t = fl.draw_times(z, config.flow.flow_times)
                loss = fl.matching_loss(flow, flow_rows, noise, t)
                loss_sum += loss.sum()
                n_rows += len(loss)
        parallel.end_calls(flow, flow.example(parallel.DEVICE), learnt=True)
        loss_sum = parallel.sum_over_ranks(loss_sum).item()
        n_rows = parallel.sum_over_ranks(n_rows).item()

        # ---- Update
        lr = rlfr.learning_rate(config.lr, step, total_steps, config.optimisation.warmup, floor=0.0)
        grad_norm = learner.step(lr, config.optimisation.clip_norm, denominator=n_rows)
        clock.lap("update")

        # ---- Log and save
        progress["step"] = step + 1
        metrics = {
            "loss": loss_sum / n_rows,
            "grad_norm": grad_norm,
            "lr": lr,
            "epoch": order[0][0],
            "rows": int(n_rows),
            "time/step": clock.metrics()["time/step"],
        }
        run.log(step + 1, metrics)
        if is_first():
            bar.update()
            tqdm.write(step_line(step + 1, metrics))
        if config.run.save_every and (step + 1) % config.run.save_every == 0:
            run.save(state)
        if config.run.export_every and (step + 1) % config.run.export_every == 0:
            export_flow(flow, run.folder / "exports" / f"step-{step + 1}" / "flow")

    # ---- Write the flow
    if not run.end(state, total_steps):
        return
    export_flow(flow, run.folder / "flow")
    report = run.finish_report()
    if is_first():
        print(f"the flow is in {run.folder / 'flow'}, its loss over training in {report}")


if __name__ == "__main__":
    launch(main, Config, toy.PRESETS["train_flow"])
