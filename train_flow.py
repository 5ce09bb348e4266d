"""Offline start: fit the flow to the latents of expert solutions under the frozen policy (paper: flow pre-training).

    python train_flow.py --model Qwen2.5-7B --data expert.jsonl      columns `problem` and `solution`; torchrun for several GPUs
    python train_flow.py                                             the embedded world

Each step: latents of the tapped layers at response tokens (the policy runs up to the last tap, no further), pairs of
latent and context, `noise_repeats` draws of (t, x_0), flow-matching loss, AdamW. Writes `flow/flow.safetensors`.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from tqdm import tqdm

import flow as fl
import parallel
import rlfr
import rollout
import toy
from parallel import is_first, on_first, start
from run import Run, RunConfig, asked_to_stop, check_positive, launch, with_defaults


@dataclass(frozen=True)
class Config(RunConfig, rollout.Source):
    """Settings of the offline start."""

    solution_column: str = "solution"  # Column with the solution's text
    cutoff: int = 8192  # Longest prompt + solution, in tokens; longer ones are cut
    contexts: tuple[str, ...] = ("previous",)  # Context modes, keys of flow.CONTEXTS
    shift: int = 1  # Distance of the context's neighbour, in positions
    percentiles: tuple[float, ...] = (0.25, 0.5, 0.75)  # Tapped layers, as fractions of the depth
    flow_blocks: int | None = (
        None  # Residual blocks of the flow; by default 4 below 5B parameters, 6 above
    )
    noise_repeats: int | None = (
        None  # Draws of (t, x_0) a token; by default 4 below 5B parameters, 2 above
    )
    epochs: int = 2  # Passes over the data
    batch_size: int = 128  # Sequences a step, over all ranks
    lr: float = 1e-4  # Peak learning rate
    warmup: float = 0.1  # Fraction of the steps over which the rate rises
    weight_decay: float = 0.01  # AdamW weight decay
    clip_norm: float = 1.0  # Largest gradient norm
    tokens_per_gpu: int = 16384  # Padded tokens of a micro-batch, one forward of one rank
    cpu_offload: bool = False  # Keep the policy's weights and the flow's optimiser in host memory
    compile: Literal["auto", "on", "off"] = "auto"  # Compile the flow; auto: on a GPU


def resolve(config: Config) -> tuple[Config, rollout.Model]:
    """Check the settings and fill in what follows from the model; return them and where the model is."""
    check_positive(config, "epochs", "batch_size", "tokens_per_gpu", "keep", "lr", "clip_norm")
    check_positive(config, "noise_repeats", "flow_blocks")
    if config.batch_size % dist.get_world_size():
        raise ValueError(
            f"batch_size={config.batch_size} is not a multiple of the {dist.get_world_size()} ranks; choose one"
        )
    name = config.model
    if config.model in toy.WORLDS:
        world = on_first(lambda: toy.make(toy.WORLDS[config.model]))
        name, config = world.path("model"), with_defaults(config, data=world.path("expert.jsonl"))
    model = rollout.find_model(name, config.trust_remote_code, config.min_pixels, config.max_pixels)
    if config.data is None:
        raise ValueError(
            "no data given; expected --data with expert solutions (columns problem and solution)"
        )
    config = rollout.fill_in(config, model)
    if config.cutoff <= config.max_prompt_tokens:
        raise ValueError(
            f"cutoff {config.cutoff} leaves no room behind prompts of {config.max_prompt_tokens} tokens; raise it"
        )
    return config, model


def main(config: Config) -> None:
    """Fit a flow and write it to the run folder."""
    # ---- What there is: solutions, policy, flow
    start()
    config, model = resolve(config)
    dim, n_layers = (
        getattr(model.config.get_text_config(), name)
        for name in ("hidden_size", "num_hidden_layers")
    )
    run = Run(config, f"flow-{Path(config.model).name}")
    flow_config = fl.FlowConfig(
        dim, config.flow_blocks, None, config.contexts, config.shift, config.percentiles
    )
    rows = rollout.load_rows(
        config.data, (config.problem_column, config.solution_column), config.split
    )
    texts, solutions = (
        [row[column] for row in rows] for column in (config.problem_column, config.solution_column)
    )
    images = rollout.load_images(rows, config.data, config, model.processor)
    prompts = rollout.make_prompts(texts, model.tokenizer, config, images)
    ids = model.tokenizer(solutions, add_special_tokens=False)["input_ids"]
    end, room = [model.tokenizer.eos_token_id], [config.cutoff - len(prompt) for prompt in prompts]
    # a whole solution ends with EOS, a cut one does not
    images = images or [()] * len(rows)
    solutions = [
        (p, (s + end)[:n], own) for p, s, n, own in zip(prompts, ids, room, images, strict=True)
    ]
    dtype = parallel.compute_dtype(config.dtype)
    policy = rlfr.load_policy(model.path, config.trust_remote_code).requires_grad_(False)
    parallel.shard(policy, policy.blocks, dtype, config.cpu_offload)
    taps = rlfr.tap_layers(n_layers, config.percentiles)
    depths = [tap / n_layers for tap in taps]
    torch.manual_seed(config.seed)  # the same flow on all ranks
    flow = fl.Flow(flow_config)
    parallel.compile_flow(flow, config.compile)
    parallel.shard(flow, (), dtype, config.cpu_offload)
    learner = parallel.Learner(flow, (0.9, 0.999), config.weight_decay)
    total_steps, progress = (
        math.ceil(config.epochs * len(solutions) / config.batch_size),
        {"step": 0},
    )
    state = {"progress": progress, "flow": learner}
    run.begin(state)
    if is_first():
        print(config)
        print(
            f"{len(solutions)} solutions, {total_steps} steps, taps {taps} of {n_layers}, run folder {run.folder}"
        )

    bar = tqdm(
        initial=progress["step"],
        total=total_steps,
        desc="flow",
        unit="step",
        disable=not is_first(),
    )
    while (step := progress["step"]) < total_steps and not asked_to_stop():
        began = time.perf_counter()
        # ---- The step's solutions
        places = rlfr.passes(
            len(solutions), step * config.batch_size, config.batch_size, "flow order", config.seed
        )
        chosen = [solutions[i] for _, i in places]

        # ---- Latents, draws of (t, x_0), matching loss: summed here, divided by the number of rows below
        sums = torch.zeros(
            2, dtype=torch.float64, device=parallel.DEVICE
        )  # of losses and rows, over the ranks in the end
        parallel.begin_calls(flow)
        for rows, batch in rlfr.micro_batches(
            chosen, config.tokens_per_gpu, dist.get_rank(), dist.get_world_size()
        ):
            with torch.no_grad():
                latents = policy(batch, taps=taps, latents_only=True).latents
            pairs = fl.pair(flow_config, latents, depths, batch.attention_mask, batch.targets)
            for repeat in range(config.noise_repeats):
                keys = [("flow noise", config.seed, *places[i], repeat) for i in rows]
                noise, z = fl.draw(
                    flow_config, keys, [len(chosen[i][1]) for i in rows], parallel.DEVICE
                )
                loss = fl.matching_loss(flow, pairs, noise, z)
                sums += torch.stack([loss.sum(), torch.ones_like(loss).sum()])
        parallel.end_calls(flow, flow.example(parallel.DEVICE), learnt=True)
        loss_sum, n_rows = parallel.sum_over_ranks(sums).tolist()

        # ---- Update
        lr = rlfr.learning_rate(config.lr, step, total_steps, config.warmup, floor=0.0)
        grad_norm = learner.step(lr, config.clip_norm, denominator=n_rows)

        # ---- Log and save
        progress["step"] = step + 1
        metrics = {
            "loss": loss_sum / n_rows,
            "grad_norm": grad_norm,
            "lr": lr,
            "epoch": places[0][0],
            "rows": int(n_rows),
        }
        metrics["time/step"] = time.perf_counter() - began
        run.log(step + 1, metrics)
        if is_first():
            bar.update()
            times = f"lr {lr:.2e}  {metrics['time/step']:.2f} s"
            tqdm.write(
                f"step {step + 1:5d}  loss {metrics['loss']:.4f}  grad {grad_norm:.3f}  {times}"
            )
        if config.save_every and (step + 1) % config.save_every == 0:
            run.save(state)
    if not run.end(state, total_steps):
        return
    fl.save_flow(flow, run.folder / "flow")
    if is_first():
        print(f"the flow is in {run.folder / 'flow'}")


if __name__ == "__main__":
    launch(main, Config, toy.PRESETS["train_flow"])
