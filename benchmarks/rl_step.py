"""The time and memory of one RL step on a CPU: without the flow, with it, and with separate passes.

    python benchmarks/rl_step.py --json runs/rl_step.json

Variants:
    none          --shaping none: one forward gives log-probs and entropies, and the policy learns
    flow          --shaping flow: the same forward also gives the latents, which the flow scores and
                  learns from (ours)
    three passes  what the official code runs the policy for: old log-probs, then latents for the
                  flow's score, then latents for its online update. It is kinder than that code: no
                  full logits, and the flow sees response tokens alone. Scores and updated flow are
                  the same as with `flow`.

The steps are those of train_rl.py, by its functions, on a random decoder of the embedded world's
shape. The engine samples, but nothing ends a response, so that all have the same, known length;
every other one counts as right. Nothing is graded. Printed are the phases, ratios of whole steps,
how seconds grow with the number of episodes and with the length of responses (a fitted line, and
the largest deviation from it as a fraction of the fit), and the largest resident memory.

Each row is a process of its own, a fork of one that has imported the libraries, and the rows take
turns: medians of several rounds count, and a ratio is the median of the rounds' own ratios, as
neighbours in time share what else the machine does. `--clock cpu` counts the seconds that the
process had of the processor, which on a machine with other work say more than the clock (with one
thread: several spin while they wait).
"""

import repository  # noqa: F401

# isort: split
import multiprocessing
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from copy import copy
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

import torch
import tyro
from tqdm import tqdm

import dense
import flow as fl
import rollout
import train_rl
from common import keep, machine, median_of, run_child
from engines.torch_engine import TorchEngine
from infra import errors, parallel
from infra.models import find_model
from infra.settings import change
from policy import load_policy
from rewards import Verdict
from worlds import toy

NONE = "none"
FLOW = "flow"
THREE_PASSES = "three passes"
PHASES = ("sync", "roll_out", "score", "update")
# What takes long to import; the server of forks does not find our own modules (Python 3.11)
LIBRARIES = [
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "transformers.generation.utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Settings:
    """The smallest step, and how it grows."""

    episodes: int = 64  # Episodes of a step
    group_size: int = 8  # Responses a prompt
    prompt_tokens: int = 20  # Tokens of a prompt
    response_tokens: int = 24  # Tokens of a response
    growth: tuple[int, ...] = (1, 2, 4)  # Factors of the number of episodes, and of the length
    mini_batches: tuple[int, ...] = (1, 8)  # Optimiser steps of the compared steps
    max_sequences: int = 64  # Responses that the engine samples at a time
    hidden_size: int = 128  # Width of the decoder
    n_layers: int = 4  # Its layers
    flow_blocks: int = 1  # Of the flow
    threads: int = 2  # Threads of a process
    repeats: int = 5  # Measured steps of a process; medians count
    rounds: int = 5  # Processes of each row, in turns; medians count
    clock: Literal["wall", "cpu"] = "wall"  # What counts seconds
    json: str | None = None  # File for the figures


class Case(NamedTuple):
    """What a row measures."""

    variant: str
    mini_batches: int
    episodes: int
    response_tokens: int


class Parts(NamedTuple):
    """What a step works with."""

    config: train_rl.Config
    engine: TorchEngine
    models: train_rl.Models
    requests: list[rollout.Request]


def check(settings: Settings) -> None:
    """Raise ValueError for settings that cannot work, before anything runs."""
    if settings.episodes % settings.group_size:
        raise ValueError(
            f"episodes={settings.episodes}: expected a multiple of group_size={settings.group_size}"
        )
    for n_parts in settings.mini_batches:
        if n_parts < 1 or settings.episodes % n_parts:
            raise ValueError(f"mini_batches={n_parts}: expected a divisor of {settings.episodes}")
    if len(settings.growth) < 3 or settings.growth[0] != 1:
        raise ValueError(
            f"growth={settings.growth}: expected 1 and two more factors at least, "
            "as a line fits any two points"
        )


# ---- A step
def make_parts(settings: Settings, case: Case, folder: str) -> Parts:
    """Make a random policy, its flow, the engine and prompts."""
    torch.manual_seed(0)
    world = toy.World(hidden_size=settings.hidden_size, n_layers=settings.n_layers)
    tokenizer = toy.make_tokenizer()
    for part in (toy.make_model(world, tokenizer), tokenizer):
        part.save_pretrained(folder)
    config = change(
        train_rl.Config(),
        shaping="none" if case.variant == NONE else "flow",
        prompts=case.episodes // settings.group_size,
        group_size=settings.group_size,
        train_batch=case.episodes // case.mini_batches,
        max_tokens=case.response_tokens,
    )
    model = find_model(folder, config.loading)
    engine = TorchEngine(model, settings.max_sequences, parallel.DEVICE, torch.float32)
    engine.end_tokens = torch.tensor([], dtype=torch.long)  # every response has the full length

    policy = load_policy(folder)
    parallel.shard(policy, policy.blocks, torch.float32)
    flow_reward = None
    if case.variant != NONE:
        flow = fl.Flow(fl.FlowConfig(settings.hidden_size, settings.flow_blocks))
        flow_reward = dense.FlowReward(
            flow,
            policy.n_layers,
            config.flow_reward,
            config.flow_update,
            seed=config.seed,
            group_size=settings.group_size,
        )
        dense.prepare(flow_reward, policy.n_layers, torch.float32, cpu_offload=False)
    models = train_rl.Models(policy, None, flow_reward, {})
    models = train_rl.with_learners(models, config.optimisation.weight_decay)

    rng = random.Random(0)
    requests = []
    for seed in range(config.sampling.prompts):
        ids = [rng.randrange(256) for _ in range(settings.prompt_tokens)]
        requests.append(rollout.Request(ids, seed))
    return Parts(config, engine, models, requests)


def run_step(parts: Parts, variant: str, step: int, clock: Callable[[], float]) -> dict[str, float]:
    """Do one RL step as train_rl.py does; return the seconds of its phases."""
    config = parts.config
    moments = [clock()]
    parts.engine.load_weights(parts.models.policy.whole_weights(torch.float32))
    moments.append(clock())

    sampling = rollout.Sampling(config.sampling.group_size, 1.0, config.sampling.max_tokens)
    episodes = parts.engine.generate(parts.requests, sampling)
    parts.engine.sleep()
    moments.append(clock())

    grade(episodes)
    experience = score(parts, variant, episodes, step)
    moments.append(clock())

    learn(parts, experience, step)
    moments.append(clock())
    seconds = [end - start for start, end in zip(moments, moments[1:], strict=False)]
    return dict(zip(PHASES, seconds, strict=True))


def grade(episodes: list[rollout.Episode]) -> None:
    """Let every other episode be right."""
    for i, episode in enumerate(episodes):
        is_right = i % 2 == 0
        kind = "right" if is_right else "wrong"
        episode.verdict = Verdict(float(is_right), is_right, {}, None, kind)


def score(
    parts: Parts, variant: str, episodes: list[rollout.Episode], step: int
) -> train_rl.Experience:
    """Score the episodes in one pass of the policy, or in three; the last one has all figures."""
    models = parts.models
    sampling = parts.config.sampling
    passes = [models]
    if variant == THREE_PASSES:
        passes = [
            models._replace(dense=None),
            models._replace(dense=without_learning(parts)),
            models,
        ]
    for used in passes:
        experience = train_rl.score(
            used, episodes, step, sampling.temperature, parts.config.compute.tokens_per_gpu
        )
    return experience


def without_learning(parts: Parts) -> dense.FlowReward:
    """Return the same flow reward, whose flow scores and does not learn."""
    frozen = copy(parts.models.dense)
    frozen.learns = False
    return frozen


def learn(parts: Parts, experience: train_rl.Experience, step: int) -> None:
    """Shape the advantage; update the policy, and the flow with the gradient of the scoring."""
    config = parts.config
    models = parts.models
    advantage, _, _ = train_rl.shape_advantage(experience, models.dense, config, step)
    train_rl.update_policy(models, experience, advantage, config, step=step, lr=config.lr)
    train_rl.update_dense(models, config.optimisation.clip_norm)


# ---- A row
def in_child(settings: Settings, case: Case, queue) -> None:
    """Measure a case and put its row into the queue."""
    torch.set_num_threads(settings.threads)
    parallel.start()
    with tempfile.TemporaryDirectory() as folder:
        parts = make_parts(settings, case, folder)
    steps = []
    for step in range(settings.repeats + 1):  # the first is a warm-up
        steps.append(run_step(parts, case.variant, step, CLOCKS[settings.clock]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    row = median_of(steps[1:])
    row["seconds"] = statistics.median(sum(phases.values()) for phases in steps[1:])
    row["peak_mb"] = peak / 1e6
    queue.put(row)


def measure(settings: Settings, cases: list[Case]) -> dict[Case, list[dict]]:
    """Return the rows of the cases, one a round."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    rounds = {case: [] for case in cases}
    for _ in tqdm(range(settings.rounds), desc="rounds"):
        for case in cases:
            rounds[case].append(run_child(context, in_child, settings, case))
    return rounds


def find_cases(settings: Settings) -> list[Case]:
    """Return what is measured: all variants of the smallest step, and two of them as it grows."""
    episodes = settings.episodes
    length = settings.response_tokens
    cases = []
    for n_parts in settings.mini_batches:
        for variant in (NONE, FLOW, THREE_PASSES):
            cases.append(Case(variant, n_parts, episodes, length))
    for variant in (NONE, FLOW):
        for factor in settings.growth:
            cases.append(Case(variant, 1, factor * episodes, length))
            cases.append(Case(variant, 1, episodes, factor * length))
    return list(dict.fromkeys(cases))  # each once


# ---- Figures
def compare(rounds: dict[Case, list[dict]], settings: Settings) -> dict[str, list[float]]:
    """Return ratios of the seconds of whole steps, one a round."""
    ratios = {}
    for n_parts in settings.mini_batches:
        for variant, other in ((FLOW, NONE), (THREE_PASSES, FLOW)):
            size = (n_parts, settings.episodes, settings.response_tokens)
            pairs = zip(rounds[Case(variant, *size)], rounds[Case(other, *size)], strict=True)
            ratios[f"{variant} / {other}, {n_parts} mini-batches"] = [
                row["seconds"] / row_of_other["seconds"] for row, row_of_other in pairs
            ]
    return ratios


def growing(settings: Settings, variant: str, by: str) -> list[Case]:
    """Return a variant's cases in which `by`, episodes or response_tokens, grows."""
    first = Case(variant, 1, settings.episodes, settings.response_tokens)
    return [first._replace(**{by: factor * getattr(first, by)}) for factor in settings.growth]


def fit_growth(rows: dict[Case, dict], cases: list[Case], by: str) -> dict[str, float]:
    """Fit a line to the seconds of some cases over `by`.

    Returns seconds a unit, seconds at 0, and the largest deviation from the line as a fraction of it.
    """
    sizes = [getattr(case, by) for case in cases]
    seconds = [rows[case]["seconds"] for case in cases]
    slope, intercept = statistics.linear_regression(sizes, seconds)
    deviations = []
    for size, found in zip(sizes, seconds, strict=True):
        line = intercept + slope * size
        deviations.append(abs(found - line) / line)
    return {"slope": slope, "intercept": intercept, "deviation": max(deviations)}


def print_rows(rows: dict[Case, dict]) -> None:
    """Print a line a case: seconds of phases, of the step, and memory."""
    names = "".join(f"{phase:>10}" for phase in PHASES)
    print(
        f"{'variant':14}{'parts':>6}{'episodes':>10}{'tokens':>8}{names}{'step s':>10}{'peak MB':>10}"
    )
    for case, row in rows.items():
        phases = "".join(f"{row[phase]:10.3f}" for phase in PHASES)
        sizes = f"{case.mini_batches:6}{case.episodes:10}{case.response_tokens:8}"
        print(f"{case.variant:14}{sizes}{phases}{row['seconds']:10.3f}{row['peak_mb']:10.0f}")


def main(settings: Settings) -> dict:
    """Measure all cases, print the tables and write the JSON."""
    check(settings)
    rounds = measure(settings, find_cases(settings))
    rows = {case: median_of(found) for case, found in rounds.items()}
    print(f"one RL step\n{machine()}; {settings.threads} threads, {settings.clock} seconds")
    print_rows(rows)

    ratios = compare(rounds, settings)
    for name, values in ratios.items():
        median = statistics.median(values)
        print(f"{name:40}{median:.2f} ({min(values):.2f} to {max(values):.2f})")
    growth = {}
    for variant in (NONE, FLOW):
        for by in ("episodes", "response_tokens"):
            fit = fit_growth(rows, growing(settings, variant, by), by)
            growth[f"{variant}, {by}"] = fit
            print(
                f"{variant} over {by}: {fit['intercept']:.3f} s + {fit['slope'] * 1e3:.2f} ms each; "
                f"largest deviation {fit['deviation']:.1%}"
            )
    memory = {}
    for variant in (NONE, FLOW):
        peaks = [rows[case]["peak_mb"] for case in growing(settings, variant, "episodes")]
        memory[variant] = peaks
        times = settings.growth[-1]
        print(
            f"{variant}: {times} times the episodes need {peaks[-1] / peaks[0]:.2f} times the memory"
        )
    result = {
        "machine": machine(),
        "settings": asdict(settings),
        "rows": [{**case._asdict(), **row} for case, row in rows.items()],
        "ratio": {name: statistics.median(values) for name, values in ratios.items()},
        "ratio_of_rounds": ratios,
        "growth": growth,
        "peak_mb_over_episodes": memory,
    }
    keep(result, settings.json)
    return result


if __name__ == "__main__":
    errors.run(lambda: main(tyro.cli(Settings)))
