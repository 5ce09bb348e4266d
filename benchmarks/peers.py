"""The time of a GRPO step: train_rl.py against TRL's GRPOTrainer, on the same work, on a CPU.

    python benchmarks/peers.py --json runs/peers.json                     # the embedded base
    python benchmarks/peers.py --model runs/rl-toy-flow/policy --data runs/toy/train.jsonl \\
        --flow runs/flow-toy/flow                                         # its trained policy
    python benchmarks/peers.py --model runs/smollm2 --data runs/words/train.jsonl \\
        --template runs/words/template.txt --reward study/rewards/last_number_reward.py --lr 1e-5 \\
        --prompts 4 --group-size 4 --max-tokens 48 --steps 4 --skip 1 --rounds 1   # a language model

(smollm2.py and word_problems.py make the folders of the last one.)

Each run is a process of its own, and the runs take turns: ours, TRL's, ours, TRL's, …, for each
number of optimiser steps a rollout. Same model in float32, same problems in the same order, same
number of responses and of optimiser steps, same limit of tokens, learning rate (along a cosine to a
tenth; ours from rollout to rollout, TRL's from one optimiser step to the next), betas, clipping,
threads, and the same function that grades. Sampling differs: each has its own generator. So both
print their rewards and lengths, from which one sees that they do the same job.

A step's seconds are `time/step` of metrics.jsonl, and TRL's from the end of one rollout's last
optimiser step to the end of the next one's; starting is in neither, and the first steps are left out.
CPU seconds, `time/cpu`, are what the trainer's process had of the processor meanwhile, all threads
together (ours grades in another one, which is not counted): on a machine with other work they
say more than the clock (with one thread; several spin while they wait).
"""

from repository import ROOT

# isort: split
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import tyro
from tqdm import tqdm

from common import keep, machine
from engines.common import end_tokens
from infra import errors, parallel, waiting
from infra.batching import passes
from infra.data import Problem, ProblemSettings, apply_template, load_problems
from infra.models import LoadingSettings, Model, find_model
from worlds import find_world, offline_start

TRL = "TRL"
OURS = "ours"
OURS_WITH_FLOW = "ours, with flow"
TOY_FLOW = "runs/flow-toy"


@dataclass(frozen=True)
class Settings:
    """The work, and how often it is measured."""

    model: str = "toy"  # toy, or a folder in Hugging Face format
    data: str | None = None  # Problems, a JSONL file; by default the embedded world's
    template: str = "none"  # As --template of train_rl.py
    reward: str = str(ROOT / "study" / "rewards" / "boxed_reward.py")  # File whose function grades
    flow: str | None = (
        None  # Flow for the variant with one; toy makes its own; None: no such variant
    )
    prompts: int = 16  # N, prompts a step
    group_size: int = 8  # G, samples a prompt
    max_tokens: int = 96  # Longest response
    mini_batches: tuple[int, ...] = (1, 8)  # Optimiser steps a rollout
    lr: float = 3e-4  # Learning rate
    threads: int = 2  # Threads of a process
    steps: int = 12  # Steps of a run
    skip: int = 2  # First steps of a run that do not count
    rounds: int = 3  # Runs of each trainer
    python: str = sys.executable  # Interpreter that has TRL
    trl_micro_batch: int | None = None  # Episodes in a forward of TRL; by default the mini-batch
    seed: int = 0  # Of the order of problems and of sampling; each round adds one
    json: str | None = None  # File for the figures


class Problems(NamedTuple):
    """The work that both trainers share, beside the settings."""

    model: Model
    problems: list[Problem]


class StepFigures(NamedTuple):
    """What a run shows of its steps."""

    seconds: list[float]  # of each step
    reward: list[float]  # mean of each step
    length: list[float]  # mean tokens of a response, of each step
    cpu_seconds: list[float]  # of each step


def check(settings: Settings) -> None:
    """Raise ValueError for settings that cannot work, before anything runs."""
    if not 1 <= settings.skip < settings.steps:
        raise ValueError(
            f"skip={settings.skip}, steps={settings.steps}: expected at least one step to skip, "
            "which has the warm-up in it, and one to count"
        )
    if settings.rounds < 1 or settings.threads < 1:
        raise ValueError(
            f"rounds={settings.rounds}, threads={settings.threads}: expected 1 or more"
        )
    n_episodes = settings.prompts * settings.group_size
    for n_parts in settings.mini_batches:
        if n_parts < 1 or n_episodes % n_parts:
            raise ValueError(f"mini_batches={n_parts}: expected a divisor of {n_episodes} episodes")
        micro_batch = settings.trl_micro_batch
        if micro_batch and n_episodes // n_parts % micro_batch:
            raise ValueError(
                f"trl_micro_batch={micro_batch}: expected a divisor of the "
                f"{n_episodes // n_parts} episodes of a mini-batch"
            )
    if settings.model != "toy" and settings.data is None:
        raise ValueError(f"model={settings.model!r} without data: name its problems with --data")
    check_trl(settings.python)


def check_trl(python: str) -> None:
    """Raise ValueError unless an interpreter is there and has TRL 1.16."""
    code = "from importlib.metadata import version; print(version('trl'))"
    try:
        answer = subprocess.run([python, "-c", code], capture_output=True, text=True)
        found = answer.stdout.strip() or answer.stderr.strip()[-200:]
    except OSError as error:
        found = str(error)
    if not found.startswith("1.16."):
        raise ValueError(
            f"python={python!r}: expected an interpreter with TRL 1.16, found {found!r}; "
            "pip install 'trl>=1.16,<1.17' there, or name another one with --python"
        )


def resolve(settings: Settings) -> Settings:
    """Make the embedded world and its flow, if they are asked for and are not there."""
    world = find_world(settings.model)
    if world is None:
        return settings
    flow = settings.flow
    if flow is None:
        offline_start.make_flow(settings.model, TOY_FLOW)
        flow = f"{TOY_FLOW}/flow"
    data = settings.data or world.path("train.jsonl")
    return replace(settings, model=world.path("model"), data=data, flow=flow)


def load(settings: Settings) -> Problems:
    """Load the problems, with the prompts that both trainers get."""
    model = find_model(settings.model, LoadingSettings())
    reading = ProblemSettings(
        template=settings.template, max_prompt_tokens=4096, problem_column="problem"
    )
    return Problems(model, load_problems(settings.data, reading, model))


# ---- Runs
def train_ours(
    settings: Settings, shared: Problems, mini_batches: int, flow: str | None, folder: Path
) -> StepFigures:
    """Train with train_rl.py and return the figures of its steps."""
    n_episodes = settings.prompts * settings.group_size
    longest_prompt = max(len(problem.prompt_ids) for problem in shared.problems)
    flags = {
        "--model": settings.model,
        "--data": settings.data,
        "--template": settings.template,
        "--problem-column": "problem",
        "--reward": settings.reward,
        "--prompts": settings.prompts,
        "--group-size": settings.group_size,
        "--train-batch": n_episodes // mini_batches,
        "--max-tokens": settings.max_tokens,
        "--max-prompt-tokens": longest_prompt,
        "--steps": settings.steps,
        "--lr": settings.lr,
        "--warmup": 0,
        "--shaping": "flow" if flow else "none",
        "--engine": "torch",
        "--dtype": "float32",
        "--recompute-layers": 0,
        "--save-every": 0,
        "--log-rollouts": 0,
        "--seed": settings.seed,
        "--folder": folder / "run",
    }
    if flow:
        flags["--flow"] = flow
    words = [str(word) for pair in flags.items() for word in pair]
    command = [sys.executable, str(ROOT / "train_rl.py"), *words]
    return measure(command, folder / "run" / "metrics.jsonl", settings)


def train_trl(settings: Settings, shared: Problems, mini_batches: int, folder: Path) -> StepFigures:
    """Train with TRL's GRPOTrainer and return the figures of its rollouts."""
    n_prompts = settings.prompts * settings.steps
    order = passes(len(shared.problems), 0, n_prompts, "problem order", settings.seed)
    chosen = [shared.problems[index] for _, index in order]
    prompts = apply_template(
        [problem.text for problem in chosen], shared.model.tokenizer, settings.template
    )
    rows = []
    for problem, prompt in zip(chosen, prompts, strict=True):
        row = {
            "prompt": prompt,
            "prompt_ids": problem.prompt_ids,
            "problem": problem.text,
            "answer": problem.answer,
        }
        rows.append(row)
    mini_batch = settings.prompts * settings.group_size // mini_batches
    work = {
        "model": settings.model,
        "rows": rows,
        "reward": settings.reward,
        "end_tokens": end_tokens(shared.model),
        "prompts": settings.prompts,
        "group_size": settings.group_size,
        "mini_batches": mini_batches,
        "micro_batch": settings.trl_micro_batch or mini_batch,
        "max_tokens": settings.max_tokens,
        "lr": settings.lr,
        "threads": settings.threads,
        "seed": settings.seed,
        "folder": str(folder / "trl"),
        "figures": str(folder / "trl.jsonl"),
    }
    (folder / "work.json").write_text(json.dumps(work))
    script = str(Path(__file__).with_name("peer_trl.py"))
    command = [settings.python, script, str(folder / "work.json")]
    return measure(command, folder / "trl.jsonl", settings)


def measure(command: Sequence[str], figures: Path, settings: Settings) -> StepFigures:
    """Run a trainer that writes a line a step to `figures`; RuntimeError if it fails."""
    # the waiting that was chosen for ours is not TRL's; ours chooses it again
    chosen = waiting.CHOSEN.items()
    given = {name: value for name, value in os.environ.items() if (name, value) not in chosen}
    environment = {
        **given,
        "OMP_NUM_THREADS": str(settings.threads),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }
    ended = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines = []
    if figures.exists():
        lines = [json.loads(line) for line in figures.read_text().splitlines()]
    if ended.returncode or len(lines) != settings.steps:
        raise RuntimeError(
            f"{' '.join(command)} ended with code {ended.returncode} after {len(lines)} of "
            f"{settings.steps} steps:\n{ended.stdout[-3000:]}"
        )
    return StepFigures(
        seconds=[line["time/step"] for line in lines],
        reward=[line["reward"] for line in lines],
        length=[line["length"] for line in lines],
        cpu_seconds=[line["time/cpu"] for line in lines],
    )


# ---- Figures
def summarise(variant: str, mini_batches: int, runs: list[StepFigures], skip: int) -> dict:
    """Return a row of the table: a variant with a number of mini-batches, over all its runs."""
    counted = [run.seconds[skip:] for run in runs]
    cpu_counted = [run.cpu_seconds[skip:] for run in runs]
    lengths = [length for run in runs for length in run.length[skip:]]
    return {
        "variant": variant,
        "mini_batches": mini_batches,
        "seconds": statistics.median(seconds for run in counted for seconds in run),
        "seconds_of_runs": [statistics.median(run) for run in counted],
        "cpu_seconds": statistics.median(seconds for run in cpu_counted for seconds in run),
        "cpu_seconds_of_runs": [statistics.median(run) for run in cpu_counted],
        "length": statistics.mean(lengths),
        "all_seconds": [run.seconds for run in runs],
        "reward_by_step": mean_by_step([run.reward for run in runs]),
        "length_by_step": mean_by_step([run.length for run in runs]),
    }


def mean_by_step(runs: list[list[float]]) -> list[float]:
    """Average curves of several runs."""
    return [statistics.mean(values) for values in zip(*runs, strict=True)]


def compare(row: dict, peer: dict) -> dict[str, float]:
    """Return the ratio of a row to TRL's: of the medians, and its least and largest over rounds."""
    ratio = {}
    for name in ("seconds", "cpu_seconds"):
        of_rounds = []
        for ours, theirs in zip(row[f"{name}_of_runs"], peer[f"{name}_of_runs"], strict=True):
            of_rounds.append(ours / theirs)
        ratio[name] = row[name] / peer[name]
        ratio[f"{name} low"] = min(of_rounds)
        ratio[f"{name} high"] = max(of_rounds)
    return ratio


def print_table(rows: list[dict], ratio: dict[str, float]) -> None:
    """Print seconds and ratios, then the curves of reward and length."""
    print(
        f"{'':34}{'s/step':>9}{'CPU s':>9}{'tokens':>9}   ratio to TRL, of seconds and of CPU seconds"
    )
    for row in rows:
        name = row_name(row)
        text = f"{name:34}{row['seconds']:9.3f}{row['cpu_seconds']:9.3f}{row['length']:9.1f}   "
        for key in ("seconds", "cpu_seconds"):
            if f"{name} {key}" in ratio:
                low, high = ratio[f"{name} {key} low"], ratio[f"{name} {key} high"]
                text += f"{ratio[f'{name} {key}']:.2f} ({low:.2f} to {high:.2f})  "
        print(text)
    for curve in ("reward", "length"):
        print(f"{curve} of each step, mean of the rounds")
        for row in rows:
            values = " ".join(f"{value:.2f}" for value in row[f"{curve}_by_step"])
            print(f"  {row_name(row):32}{values}")


def row_name(row: dict) -> str:
    """Name a row by its variant and mini-batches."""
    return f"{row['variant']}, {row['mini_batches']} mini-batches"


def main(settings: Settings) -> dict:
    """Measure all variants in turns, print the table and write the JSON."""
    check(settings)
    parallel.start()  # a group of one, which data is loaded in
    settings = resolve(settings)
    shared = load(settings)
    variants = [OURS, TRL]
    if settings.flow:
        variants = [OURS, OURS_WITH_FLOW, TRL]
    runs = {key: [] for key in product(settings.mini_batches, variants)}
    bar = tqdm(total=settings.rounds * len(runs), unit="run")
    for number in range(settings.rounds):
        of_round = replace(settings, seed=settings.seed + number)
        for (mini_batches, variant), done in runs.items():
            bar.set_description(f"{variant}, {mini_batches} mini-batches")
            with tempfile.TemporaryDirectory() as folder:
                if variant == TRL:
                    run = train_trl(of_round, shared, mini_batches, Path(folder))
                else:
                    flow = settings.flow if variant == OURS_WITH_FLOW else None
                    run = train_ours(of_round, shared, mini_batches, flow, Path(folder))
            done.append(run)
            bar.update()
    bar.close()

    rows = []
    ratio = {}
    for (mini_batches, variant), done in runs.items():
        rows.append(summarise(variant, mini_batches, done, settings.skip))
    peers = {row["mini_batches"]: row for row in rows if row["variant"] == TRL}
    for row in rows:
        if row["variant"] != TRL:
            for name, value in compare(row, peers[row["mini_batches"]]).items():
                ratio[f"{row_name(row)} {name}"] = value
    title = f"a GRPO step of {settings.prompts} * {settings.group_size} episodes, {settings.model}"
    print(f"{title}\n{machine()}; {settings.threads} threads a process")
    print_table(rows, ratio)
    result = {"machine": machine(), "settings": asdict(settings), "rows": rows, "ratio": ratio}
    keep(result, settings.json)
    return result


if __name__ == "__main__":
    errors.run(lambda: main(tyro.cli(Settings)))
