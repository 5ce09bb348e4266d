"""Offline start: fit the flow to the latents of expert solutions (paper: flow pre-training).

    python train_flow.py                                           the embedded world
    python train_flow.py --model Qwen2.5-7B                        the published expert solutions
    python train_flow.py --model Qwen2.5-7B --data expert.jsonl    torchrun for several GPUs

Solutions have the columns `problem` and `solution`, or are chats (`messages`, `conversations`);
without --data, the published data set is taken from the hub.

Each step: the frozen policy, which runs up to the last tap and no further, gives the latents of
response tokens; each is put together with its context; `noise_repeats` draws of (t, x_0);
flow-matching loss; AdamW. Writes `flow/flow.safetensors` into the run's folder.

At the end the flow is calibrated: the mean and the spread of its error on the tokens of solutions
that were held out go into its file, for `train_rl.py --flow-scope expert`. This is ours, not the
paper's, as is `--standardise`. Latents of a small policy are computed once and kept.
"""

# first: torch reads what this sets when it is imported
import infra.waiting  # noqa: F401

# isort: split
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import flow as fl
import rlfr
from infra import batching, fingerprints, parallel
from infra.batching import passes
from infra.data import template_pattern
from infra.defaults import fill_in
from infra.models import LoadingSettings, Model, find_model, short_name
from infra.parallel import is_first, on_first, start
from infra.ranges import (
    BatchSize,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    OpenFraction,
    PositiveFloat,
    PositiveInt,
    Range,
    Seed,
    check_values,
)
from infra.runs import Run, Stopwatch, asked_to_stop, check_folder, launch
from infra.settings import ComputeSettings, RunSettings, with_defaults
from infra.solutions import SolutionSettings, read_solutions, tokenise
from pages import write_pages, write_report
from policy import Policy, load_policy, tap_layers
from worlds import PRESETS, find_world

# Expert solutions of the published runs, by the names that their repositories give them
PUBLISHED_DATA = {
    "text": "JingHaoZ/RLFR-Dataset-LM/openr1_math_default",
    "images": "JingHaoZ/RLFR-Dataset-VLM/MMPRv1.1_Math",
}
KEPT_BYTES = 2**30  # latents of all solutions are kept if they need no more
N_MEASURED = 256  # solutions on whose tokens mean and spread of latents are measured


@dataclass(frozen=True)
class FlowSettings:
    """What the flow is, and how often and at which times a token is drawn."""

    # Residual blocks; by default 4 below 5B parameters, 6 above
    flow_blocks: Annotated[int, Range(1, 100)] | None = None
    # Draws of (t, x_0) a token; by default 2 for text above 5B, else 4
    noise_repeats: PositiveInt | None = None
    # How t is drawn: random is the sigmoid of a normal, as official
    flow_times: fl.Times = "random"
    shift: PositiveInt = 1  # Distance of the context's neighbour, in positions
    standardise: bool = False  # Standardise latents for each tap and dimension
    # Times at which the error on held-out solutions is measured, for --flow-scope expert
    calibrate_at: tuple[OpenFraction, ...] = (0.2, 0.5, 0.8)
    # Solutions that are kept from training, for that; by default 64, but at most an eighth of them
    held_out: NonNegativeInt | None = None


@dataclass(frozen=True)
class OptimisationSettings:
    """The flow's optimiser."""

    warmup: Fraction = 0.1  # Fraction of the steps over which the rate rises
    weight_decay: NonNegativeFloat = 0.01  # AdamW weight decay
    clip_norm: PositiveFloat = 1.0  # Largest gradient norm


@dataclass(frozen=True)
class Config:
    """Fit a flow to the latents of expert solutions."""

    script: ClassVar[str] = "train_flow"  # whose part of a file counts, see infra/config_files.py

    model: str = "toy"  # A path, a hub id, a short name such as Qwen2.5-7B, or toy
    # Solutions: JSONL or Parquet file, save_to_disk folder, hub id, or ORG/NAME/PATH inside one;
    # :SPLIT after it names the split, by default train
    data: str | None = None
    contexts: tuple[str, ...] = ("previous",)  # Context modes, keys of flow.CONTEXTS
    # Tapped layers, as fractions of the depth
    percentiles: tuple[Fraction, ...] = (0.25, 0.5, 0.75)
    epochs: PositiveInt = 2  # Passes over the data
    batch_size: BatchSize = 128  # Sequences a step, over all ranks
    lr: PositiveFloat = 1e-4  # Peak learning rate
    folder: str | None = None  # Run folder; by default one in runs/, named after the model
    resume: str | None = None  # Run folder to go on with
    seed: Seed = 0  # Seed of initialisation, order and noise
    solutions: SolutionSettings = SolutionSettings()
    flow: FlowSettings = FlowSettings()
    optimisation: OptimisationSettings = OptimisationSettings()
    compute: ComputeSettings = ComputeSettings()
    loading: LoadingSettings = LoadingSettings(max_pixels=262_144)
    run: RunSettings = RunSettings()


def resolve(config: Config) -> tuple[Config, Model]:
    """Check the settings and fill in what follows from the model; return them and the model."""
    check_values(config)
    template_pattern(config.solutions.template)
    fl.check_contexts(config.contexts)
    n_ranks = dist.get_world_size()
    if config.batch_size % n_ranks:
        raise ValueError(
            f"batch_size={config.batch_size} is not a multiple of the {n_ranks} ranks; choose one"
        )
    on_first(lambda: check_folder(config))
    name = config.model
    world = on_first(lambda: find_world(config.model))
    if world:
        name = world.path("model")
        config = with_defaults(config, data=world.path("expert.jsonl"))
    model = find_model(name, config.loading)
    if config.data is None:
        data = PUBLISHED_DATA["text" if model.processor is None else "images"]
        config = with_defaults(config, data=data)
        if is_first():
            print(f"no --data given: taking the published expert solutions, {data}")
    config = fill_in(config, model)
    cutoff = config.solutions.cutoff
    max_prompt_tokens = config.solutions.max_prompt_tokens
    if cutoff <= max_prompt_tokens:
        raise ValueError(
            f"cutoff {cutoff} leaves no room after prompts of {max_prompt_tokens} tokens; raise it"
        )
    return config, model


def count_held_out(wanted: int | None, n_solutions: int, n_ranks: int) -> int:
    """Return how many solutions are kept from training: as wanted, rounded up to the ranks."""
    if wanted is None:
        wanted = min(64, n_solutions // 8)
    count = math.ceil(wanted / n_ranks) * n_ranks
    if 2 * count > n_solutions:
        raise ValueError(
            f"held_out={count} of {n_solutions} solutions leaves fewer for training; lower it"
        )
    return count


# ---- Latents of solutions
class Latents:
    """The latents of solutions by the frozen policy: kept if they fit, else computed every time."""

    def __init__(
        self,
        policy: Policy,
        flow_config: fl.FlowConfig,
        solutions: Sequence[batching.Row],
        token_budget: int,
    ):
        self.policy = policy
        self.flow_config = flow_config
        self.solutions = solutions
        self.token_budget = token_budget  # tokens of a micro-batch
        self.taps = tap_layers(policy.n_layers, flow_config.percentiles)
        self.kept: list[Tensor] = []  # of each solution (L, S, D), or none at all
        if self.fit_in_memory():
            self.keep()

    def fit_in_memory(self) -> bool:
        """Return whether the latents of all solutions can be kept; with several ranks they cannot.

        Each rank would need those of all solutions, as every step deals them out anew.
        """
        n_tokens = sum(len(row.prompt_ids) + len(row.response_ids) for row in self.solutions)
        n_numbers = n_tokens * len(self.taps) * self.flow_config.dim
        return dist.get_world_size() == 1 and 4 * n_numbers <= KEPT_BYTES

    def keep(self) -> None:
        """Compute the latents of all solutions and keep them."""
        kept: dict[int, Tensor] = {}
        bar = tqdm(total=len(self.solutions), desc="latents", unit="solution", delay=3)
        for indices, batch in self.micro_batches(range(len(self.solutions))):
            taps = torch.stack(self.run_policy(batch))  # (L, B, S, D)
            lengths = batch.attention_mask.sum(dim=1).tolist()
            for row, index in enumerate(indices):
                kept[index] = taps[:, row, : lengths[row]].clone()
            bar.update(len(indices))
        bar.close()
        self.kept = [kept[index] for index in range(len(self.solutions))]

    def micro_batches(self, chosen: Sequence[int]) -> Iterator[tuple[list[int], batching.Batch]]:
        """Yield this rank's micro-batches of chosen solutions: their places in it, and the batch."""
        rows = [self.solutions[index] for index in chosen]
        n_ranks = dist.get_world_size()
        return batching.micro_batches(rows, self.token_budget, dist.get_rank(), n_ranks)

    @torch.no_grad()
    def run_policy(self, batch: batching.Batch) -> list[Tensor]:
        """Return the latents of a batch, (B, S, D) for each tap."""
        return self.policy(batch, taps=self.taps, latents_only=True).latents

    def flow_rows(self, chosen: Sequence[int]) -> Iterator[tuple[list[int], fl.FlowRows]]:
        """Yield this rank's micro-batches: places in `chosen`, and the flow's rows of them."""
        depths = [tap / self.policy.n_layers for tap in self.taps]
        for places, batch in self.micro_batches(chosen):
            if self.kept:
                latents = put_together([self.kept[chosen[place]] for place in places])
            else:
                latents = self.run_policy(batch)
            rows = fl.make_rows(
                self.flow_config, latents, depths, batch.attention_mask, batch.targets
            )
            yield places, rows

    def response_length(self, index: int) -> int:
        """Return the number of response tokens of a solution, but for those of tools."""
        return sum(batching.sampled_flags(self.solutions[index]))


def put_together(latents: Sequence[Tensor]) -> list[Tensor]:
    """Pad latents of single solutions, (L, S_i, D) each, to (B, S, D) for each tap."""
    by_position = [tensor.transpose(0, 1) for tensor in latents]  # (S_i, L, D)
    padded = pad_sequence(by_position, batch_first=True)  # (B, S, L, D)
    return list(padded.unbind(dim=2))


# ---- Statistics on expert tokens
def measure_latents(flow: fl.Flow, latents: Latents, chosen: Sequence[int]) -> None:
    """Write the mean and the spread of latents, for each tap and dimension, into the flow."""
    moments = Moments(flow.latent_mean.shape)  # (L, D)
    for _, rows in latents.flow_rows(chosen):
        moments.add(rows.x_1, rows.taps())
    mean, spread = moments.mean_and_spread()
    floor = 0.01 * spread.mean(dim=1, keepdim=True)  # or what hardly varies would be blown up
    flow.latent_mean.copy_(mean)
    flow.latent_spread.copy_(torch.maximum(spread, floor))


def calibrate(flow: fl.Flow, latents: Latents, chosen: Sequence[int], seed: int) -> None:
    """Write the mean and the spread of the error on the solutions' tokens into the flow.

    The noise is as in scoring: one draw, shared by the times.
    """
    times = flow.config.calibrated_at
    n_taps = len(flow.config.percentiles)
    moments = Moments((n_taps, len(times)))
    parallel.begin_calls(flow)
    for places, rows in latents.flow_rows(chosen):
        keys = [("calibration noise", seed, place) for place in places]
        lengths = [latents.response_length(chosen[place]) for place in places]
        noise, _ = fl.draw(flow.config, keys, lengths, parallel.DEVICE)
        errors = fl.errors_of_rows(flow, flow.standardise(rows), noise, times)  # (n_times, P)
        moments.add(errors.T, rows.taps())
    parallel.end_calls(flow, learnt=False)
    mean, spread = moments.mean_and_spread()  # (L, n_times)
    flow.expert_mean.copy_(mean.T)
    flow.expert_spread.copy_(spread.T)


def calibration_lines(flow: fl.Flow) -> list[str]:
    """Return a line for each time with the errors that calibrate() has found."""
    lines = []
    for i, time in enumerate(flow.config.calibrated_at):
        by_tap = []
        for mean, spread in zip(flow.expert_mean[i], flow.expert_spread[i], strict=True):
            by_tap.append(f"{mean:.3f} ± {spread:.3f}")
        taps = ", ".join(by_tap)
        lines.append(f"error on held-out expert tokens at t = {time}, for each tap: {taps}")
    return lines


class Moments:
    """Running sums of values by tap, over all ranks, for their means and standard deviations."""

    def __init__(self, shape: Sequence[int]):
        """Begin for values of shape (P, K); shape is (L, K)."""
        like = {"dtype": torch.float64, "device": parallel.DEVICE}
        self.count = torch.zeros(shape[0], 1, **like)
        self.total = torch.zeros(*shape, **like)
        self.squares = torch.zeros(*shape, **like)

    def add(self, values: Tensor, taps: Tensor) -> None:
        """Add values (P, K) of rows whose taps are `taps` (P,)."""
        values = values.double()
        self.count.index_add_(0, taps, torch.ones_like(values[:, :1]))
        self.total.index_add_(0, taps, values)
        self.squares.index_add_(0, taps, values.square())

    def mean_and_spread(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation over all ranks, (L, K) each."""
        for tensor in (self.count, self.total, self.squares):
            parallel.sum_over_ranks(tensor)
        mean = self.total / self.count
        variance = self.squares / self.count - mean.square()
        return mean, variance.clamp(min=0).sqrt()


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
    run = Run(config, f"flow-{short_name(config.model)}")
    texts, answers, images = read_solutions(config.data, config.solutions, model)
    n_ranks = dist.get_world_size()
    n_held_out = count_held_out(config.flow.held_out, len(texts), n_ranks)
    training = fingerprints.of_texts(zip(texts, answers, strict=True))
    n_held_out = run.check_data(training=training, held_out=n_held_out)["held_out"]
    n_training = len(texts) - n_held_out
    n_calibrating = n_held_out // n_ranks * n_ranks
    if n_held_out and not n_calibrating:
        raise ValueError(
            f"--resume {config.resume}: that run holds out {n_held_out} solutions, too few for "
            f"{n_ranks} ranks; resume it on fewer"
        )
    solutions = tokenise(texts, answers, images, config.solutions, model)
    dtype = parallel.compute_dtype(config.loading.dtype)
    policy = load_policy(model.path, config.loading.trust_remote_code).requires_grad_(False)
    parallel.shard(policy, policy.blocks, dtype, config.compute.always_offloads)
    flow_config = fl.FlowConfig(
        dim=model.text_config.hidden_size,
        n_blocks=config.flow.flow_blocks,
        norm_eps=model.norm_eps,
        contexts=config.contexts,
        shift=config.flow.shift,
        percentiles=config.percentiles,
        standardised=config.flow.standardise,
        calibrated_at=config.flow.calibrate_at if n_held_out else (),
        fitted_to=policy.fingerprint,
    )
    torch.manual_seed(config.seed)  # the same flow on all ranks
    flow = fl.Flow(flow_config)
    parallel.compile_forward([flow.model], config.compute.compile)
    parallel.shard(flow, (), dtype, config.compute.always_offloads)
    learner = parallel.Learner(flow, (0.9, 0.999), config.optimisation.weight_decay)
    latents = Latents(policy, flow_config, solutions, config.compute.tokens_per_gpu)
    if config.flow.standardise:
        n_measured = min(N_MEASURED, n_training) // n_ranks * n_ranks
        measure_latents(flow, latents, range(n_measured))

    # ---- Begin, or go on from a checkpoint
    total_steps = math.ceil(config.epochs * n_training / config.batch_size)
    progress = {"step": 0}
    state = {"progress": progress, "flow": learner}
    run.begin(state)
    run.write_json("flow.json", asdict(flow_config))  # an export of a checkpoint needs it
    if is_first():
        print(config)
        print(
            f"{n_training} solutions and {n_held_out} held out, {total_steps} steps, "
            f"taps {latents.taps} of {policy.n_layers}, run folder {run.folder}"
        )

    def export(folder: Path) -> None:
        """Calibrate the flow and write it for training."""
        if n_held_out:
            calibrate(flow, latents, range(n_training, n_training + n_calibrating), config.seed)
            if is_first():
                tqdm.write("\n".join(calibration_lines(flow)))
        run.check_weights(progress["step"], [flow])
        fl.export_flow(flow, folder / "flow")

    if run.lacks_export(progress["step"]):
        run.export(progress["step"], export)
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
        order = passes(n_training, first, batch_size, "flow order", config.seed)
        chosen = [index for _, index in order]

        # ---- Latents, draws of (t, x_0), matching loss
        # gradients are of the sum over rows here, and divided by the number of rows below
        loss_sum = torch.zeros((), dtype=torch.float64, device=parallel.DEVICE)
        n_rows = torch.zeros((), dtype=torch.float64, device=parallel.DEVICE)
        parallel.begin_calls(flow)
        for places, rows in latents.flow_rows(chosen):
            flow_rows = flow.standardise(rows)
            lengths = [latents.response_length(chosen[place]) for place in places]
            for repeat in range(config.flow.noise_repeats):
                keys = [("flow noise", config.seed, *order[place], repeat) for place in places]
                noise, z = fl.draw(flow_config, keys, lengths, parallel.DEVICE)
                t = fl.draw_times(z, config.flow.flow_times)
                loss = fl.matching_loss(flow, flow_rows, noise, t)
                loss_sum += loss.sum()
                n_rows += len(loss)
        parallel.end_calls(flow, learnt=True)
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
            "time/step": clock.seconds(),
        }
        run.log(step + 1, metrics, state)
        if is_first():
            bar.update()
            tqdm.write(step_line(step + 1, metrics))
        if config.run.save_every and (step + 1) % config.run.save_every == 0:
            run.save(state)
            write_report(run.folder)
        if run.is_export_due(step + 1):
            run.export(step + 1, export)

    # ---- Write the flow
    if not run.end(state, total_steps, write_report):
        return
    export(run.folder)
    report = write_pages(run.folder)
    run.release()
    if is_first():
        print(f"the flow is in {run.folder / 'flow'}, its loss over training in {report}")


if __name__ == "__main__":
    launch(main, Config, PRESETS["train_flow"])
