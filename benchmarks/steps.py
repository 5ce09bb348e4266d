"""The steps of a run of train_rl.py in this process, noted as they are logged: figures and CPU time."""

import repository  # noqa: F401

# isort: split
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from infra.runs import Run


class NotedStep(NamedTuple):
    """A step of train_rl.py."""

    metrics: dict[str, float]
    cpu_seconds: float  # of this process, all threads together, since the step before was logged


@contextmanager
def noted_steps() -> Iterator[list[NotedStep]]:
    """Give a list in which each step that a run logs meanwhile is noted."""
    steps: list[NotedStep] = []
    log = Run.log
    last = time.process_time()

    def log_and_note(run: Run, number: int, metrics: dict[str, float], state: dict) -> None:
        nonlocal last
        log(run, number, metrics, state)
        now = time.process_time()
        steps.append(NotedStep(metrics, now - last))
        last = now

    Run.log = log_and_note
    try:
        yield steps
    finally:
        Run.log = log
