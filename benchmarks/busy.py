"""Seconds of a step while other programs want the cores, for ways in which OpenMP's threads wait.

    python benchmarks/busy.py --json runs/busy.json               # two cores; a quarter of an hour
    python benchmarks/busy.py --waiting GOMP_SPINCOUNT=1000 OMP_WAIT_POLICY=passive --trl

The embedded world and its base model are made if they are not there. Each run is a process of its
own: train_rl.py with --shaping none on that model, a few steps of the work of peers.py. Ways of
waiting, and TRL's GRPOTrainer with --trl, take turns within each number of busy loops: what else
the machine does meets all of them. 300,000 spins are libgomp's own; TRL waits as it does by itself.

A busy loop is a process that counts. Beside n loops, t threads have a fair share of t / (t + n) of
the cores, at most t of them. `share` is what a step would take with that, by the idle figure of the
same way of waiting, and `of share` is the ratio of what it took to that.
"""

import repository  # noqa: F401

# isort: split
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import tyro
from tqdm import tqdm

import peers
from common import keep, machine
from infra import errors, parallel, waiting
from worlds import find_world

TRL = peers.TRL


@dataclass(frozen=True)
class Settings:
    """What is measured, and how often."""

    # Ways of waiting, VARIABLE=VALUE
    waiting: tuple[str, ...] = (
        "GOMP_SPINCOUNT=300000",
        "GOMP_SPINCOUNT=30000",
        "GOMP_SPINCOUNT=1000",
        "GOMP_SPINCOUNT=100",
        "OMP_WAIT_POLICY=passive",
    )
    loops: tuple[int, ...] = (0, 1, 2)  # Busy loops beside the run; 0 comes first
    trl: bool = False  # Measure TRL's step, too, as it waits by itself
    python: str = sys.executable  # Interpreter that has TRL
    model: str = "toy"  # toy, or a folder in Hugging Face format
    data: str | None = None  # Problems, a JSONL file; by default the embedded world's
    prompts: int = 16  # N, prompts a step
    group_size: int = 8  # G, samples a prompt
    mini_batches: int = 2  # Optimiser steps a rollout
    threads: int = 2  # Threads of a run
    steps: int = 6  # Steps of a run
    skip: int = 2  # First steps of a run that do not count
    rounds: int = 3  # Runs of each
    json: str | None = None  # File for the figures


class Case(NamedTuple):
    """What a row measures."""

    way: str  # of waiting, or TRL
    loops: int


def check(settings: Settings) -> None:
    """Raise ValueError for settings that cannot work, before anything runs."""
    for way in settings.waiting:
        name, _, value = way.partition("=")
        if name not in waiting.SETTINGS or not value:
            raise ValueError(
                f"waiting={way!r}: expected NAME=VALUE, of {', '.join(waiting.SETTINGS)}"
            )
    if not settings.loops or settings.loops[0] != 0 or min(settings.loops) < 0:
        raise ValueError(
            f"loops={settings.loops}: expected 0 first, which the others are compared with"
        )


@contextmanager
def busy(n_loops: int) -> Iterator[None]:
    """Keep so many loops running meanwhile."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n_loops)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


@contextmanager
def waits(way: str) -> Iterator[None]:
    """Let processes that are started meanwhile wait in a way."""
    before = {name: os.environ.pop(name) for name in waiting.SETTINGS if name in os.environ}
    try:
        if way != TRL:
            name, _, value = way.partition("=")
            os.environ[name] = value
        yield
    finally:
        for name in waiting.SETTINGS:
            os.environ.pop(name, None)
        os.environ.update(before)


# ---- Runs
def find_work(settings: Settings) -> peers.Settings:
    """Return the work as peers.py describes it; make the embedded world if it is asked for."""
    work = peers.Settings(
        model=settings.model,
        data=settings.data,
        prompts=settings.prompts,
        group_size=settings.group_size,
        mini_batches=(settings.mini_batches,),
        threads=settings.threads,
        steps=settings.steps,
        skip=settings.skip,
        rounds=settings.rounds,
        python=settings.python,
    )
    world = find_world(settings.model)
    if world is None:
        return work
    data = settings.data or world.path("train.jsonl")
    return replace(work, model=world.path("model"), data=data)


def measure(case: Case, work: peers.Settings, shared: peers.Problems) -> list[float]:
    """Run a case; return the seconds of the steps that count."""
    with tempfile.TemporaryDirectory() as folder, busy(case.loops), waits(case.way):
        if case.way == TRL:
            run = peers.train_trl(work, shared, work.mini_batches[0], Path(folder))
        else:
            run = peers.train_ours(work, shared, work.mini_batches[0], None, Path(folder))
    return run.seconds[work.skip :]


# ---- Figures
def summarise(runs: dict[Case, list[list[float]]], threads: int, n_cores: int) -> list[dict]:
    """Return a row for each case: seconds of a step, and their ratio to the fair share's."""
    rows = []
    for case, found in runs.items():
        idle = statistics.median(second for run in runs[Case(case.way, 0)] for second in run)
        seconds = statistics.median(second for run in found for second in run)
        n_used = min(threads, n_cores)  # cores that a step uses, idle
        share = idle * n_used / min(n_used, n_cores * n_used / (n_used + case.loops))
        rows.append(
            {
                **case._asdict(),
                "seconds": seconds,
                "share": share,
                "of_share": seconds / share,
                "of_idle": seconds / idle,
                "seconds_of_runs": [statistics.median(run) for run in found],
            }
        )
    return rows


def print_table(rows: Sequence[dict]) -> None:
    """Print a line for each case."""
    print(f"{'waiting':26}{'loops':>6}{'s/step':>9}{'of idle':>9}{'share':>9}{'of share':>10}")
    for row in rows:
        print(
            f"{row['way']:26}{row['loops']:6}{row['seconds']:9.3f}{row['of_idle']:9.2f}"
            f"{row['share']:9.3f}{row['of_share']:10.2f}"
        )


def main(settings: Settings) -> dict:
    """Measure all cases in turns, print the table and write the JSON."""
    check(settings)
    parallel.start()  # a group of one, which data is loaded in
    work = find_work(settings)
    if settings.trl:
        peers.check(work)
    shared = peers.load(work)
    ways = [*settings.waiting, *([TRL] if settings.trl else [])]
    runs = {Case(way, loops): [] for loops, way in product(settings.loops, ways)}
    bar = tqdm(total=settings.rounds * len(runs), unit="run")
    for number in range(settings.rounds):
        for case, done in runs.items():
            bar.set_description(f"{case.way}, {case.loops} loops")
            done.append(measure(case, replace(work, seed=number), shared))
            bar.update()
    bar.close()
    n_cores = len(os.sched_getaffinity(0))
    rows = summarise(runs, settings.threads, n_cores)
    print(f"a step beside busy loops, {settings.model}, on {n_cores} cores\n{machine()}")
    print_table(rows)
    result = {"machine": machine(), "cores": n_cores, "settings": asdict(settings), "rows": rows}
    keep(result, settings.json)
    return result


if __name__ == "__main__":
    errors.run(lambda: main(tyro.cli(Settings)))
