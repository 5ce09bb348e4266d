"""Where the reward of a run fell: steps that are recorded whole, and that pages mark."""

import json
from collections import deque
from collections.abc import Sequence
from pathlib import Path

FALL = 0.15  # of a step's mean reward below that of the steps before it: the step is written whole
N_BEFORE = 10  # steps that it is compared with


def is_fall(reward: float, before: Sequence[float]) -> bool:
    """Return whether a step's mean reward lies more than FALL below the mean of the last ones.

    before: the mean rewards of earlier steps; with fewer than N_BEFORE of them nothing is a fall
    """
    last = before[-N_BEFORE:]
    return len(last) == N_BEFORE and reward < sum(last) / N_BEFORE - FALL


def find_falls(metrics: Sequence[dict[str, float]]) -> list[int]:
    """Return the steps of a run at which the reward fell; metrics: the figures of each step."""
    falls = []
    before: list[float] = []
    for line in metrics:
        if "reward" in line:
            if is_fall(line["reward"], before):
                falls.append(line["step"])
            before.append(line["reward"])
    return falls


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
