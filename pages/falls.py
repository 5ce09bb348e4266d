"""Where the reward of a run fell: steps that are recorded whole, and that pages mark."""

import json
import math
from collections import deque
from collections.abc import Collection, Sequence
from pathlib import Path

FALL = 0.15  # of a step's mean reward below that of the steps before it: the step is written whole
LEAST = 0.01  # that a page speaks of, where there is no such step
WINDOWS = (3, 10)  # numbers of steps before, with whose means it is compared
N_BEFORE = max(WINDOWS)


def depth(reward: float, before: Sequence[float]) -> float:
    """Return by how much a step's mean reward lies below the mean of the last few, or of more of them.

    The larger number counts. A sudden fall while the reward still rises is one beside the last few
    steps alone; one that takes several steps is one beside more of them.

    before: the mean rewards of earlier steps; where there are too few of them nothing has fallen
    """
    means = [sum(before[-n:]) / n for n in WINDOWS if len(before) >= n]
    return max(means, default=-math.inf) - reward


def is_fall(reward: float, before: Sequence[float]) -> bool:
    """Return whether a step's mean reward lies more than FALL below that of the steps before it."""
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


def say_falls(metrics: Sequence[dict[str, float]], recorded: Collection[int], page: str) -> str:
    """Say at which steps the reward fell, or at which it fell most, and what to compare with.

    recorded: steps whose responses a reader can open; each that is named is a link to `page`
    """
    steps = find_lowest(metrics)
    if not steps:
        return ""
    rewards = {line["step"]: line["reward"] for line in metrics if "reward" in line}

    def name(step: int) -> str:
        """Lay out a step and its reward."""
        link = f"<a href={page}#step={step}>{step}</a>" if step in recorded else str(step)
        is_lowest = len(steps) > 1 and step == min(steps, key=rewards.__getitem__)
        return f"{link} ({rewards[step]:.2f}{', the lowest' if is_lowest else ''})"

    earlier = [step for step in rewards if step < steps[0]]
    best = max(earlier, key=lambda step: (rewards[step], step))
    said = f" The best step before step {steps[0]} was {name(best)}."
    compared = max((step for step in earlier if step in recorded), default=best)
    if compared != best:
        said += f" The last recorded step before is {name(compared)}."
    below = f"below the mean of the {' or of the '.join(map(str, WINDOWS))} steps before it"
    if find_falls(metrics):
        named = ", ".join(" to ".join(map(name, ends)) for ends in find_spans(steps))
        at = "step" if len(steps) == 1 else "steps"
        return (
            f"<b>The reward fell</b> at {at} {named}: the mean reward of such a step lies more than "
            f"{FALL} {below}.{said}"
        )
    by = find_depths(metrics)[steps[0]]
    return f"<b>The reward fell most</b> at step {name(steps[0])}: {by:.2f} {below}.{said}"


def find_spans(steps: Sequence[int]) -> list[list[int]]:
    """Return the first and the last of steps that follow each other; one step where none follows."""
    spans: list[list[int]] = []
    for step in steps:
        if spans and step == spans[-1][-1] + 1:
            spans[-1][1:] = [step]
        else:
            spans.append([step])
    return spans


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
