"""Where the reward of a run fell: steps that are recorded whole, and that pages mark."""

import json
import math
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

FALL = 0.15  # of a step's mean reward below that of the steps before it: the step is written whole
LEAST = 0.01  # that a page speaks of, where there is no such step
N_BEFORE = 10  # steps that it is compared with


def depth(reward: float, before: Sequence[float]) -> float:
    """Return by how much a step's mean reward lies below the mean of the last ones.

    before: the mean rewards of earlier steps; with fewer than N_BEFORE of them nothing has fallen
    """
    last = before[-N_BEFORE:]
    return sum(last) / N_BEFORE - reward if len(last) == N_BEFORE else -math.inf


def is_fall(reward: float, before: Sequence[float]) -> bool:
    """Return whether a step's mean reward lies more than FALL below the mean of the last ones."""
    return depth(reward, before) > FALL


def find_depths(metrics: Sequence[dict[str, float]]) -> dict[int, float]:
    """Return the depth of each step of a run; metrics: the figures of each step."""
    depths = {}
    before: list[float] = []
    for line in metrics:
        if "reward" in line:
            depths[line["step"]] = depth(line["reward"], before)
            before.append(line["reward"])
    return depths


def find_falls(metrics: Sequence[dict[str, float]]) -> list[int]:
    """Return the steps of a run at which the reward fell; metrics: the figures of each step."""
    return [step for step, depth in find_depths(metrics).items() if depth > FALL]


def find_lowest(metrics: Sequence[dict[str, float]]) -> list[int]:
    """Return the steps at which the reward fell; if it never did, the one at which it fell most."""
    depths = find_depths(metrics)
    deepest = max(depths, key=depths.__getitem__, default=None)
    if deepest is None or depths[deepest] < LEAST:
        return []
    return find_falls(metrics) or [deepest]


def say_falls(metrics: Sequence[dict[str, float]], link: Callable[[int], str]) -> str:
    """Say at which steps the reward fell, or at which it fell most; link(step) names a step."""
    steps = find_lowest(metrics)
    if not steps:
        return ""
    below = f"below the mean of the {N_BEFORE} steps before"
    rewards = {line["step"]: line["reward"] for line in metrics if "reward" in line}
    best = max(
        (step for step in rewards if step < steps[0]), key=lambda step: (rewards[step], step)
    )
    had = f"The best step before was {best}, with {rewards[best]:.2f}."
    if find_falls(metrics):
        named = ", ".join(f"{link(step)} ({rewards[step]:.2f})" for step in steps)
        return f"<b>The reward fell</b> by more than {FALL} {below} at step {named}. {had}"
    step = steps[0]
    by = find_depths(metrics)[step]
    return (
        f"<b>The reward fell most</b> at step {link(step)}: {rewards[step]:.2f}, "
        f"which is {by:.2f} {below}. {had}"
    )


def last_values(path: Path, name: str, n: int) -> list[float]:
    """Return a figure of the last n steps of a run that goes on, the latest at the end."""
    if not path.exists():
        return []
    values = []
    with open(path, "rb") as file:
        for line in deque(file, maxlen=n):
            value = json.loads(line).get(name)
            if value is not None:
                values.append(value)
    return values
