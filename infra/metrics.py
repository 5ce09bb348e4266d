"""The figures of a run: metrics.jsonl, one JSON object a step."""

import math
from pathlib import Path

from infra.files import need_keys, read_json_lines


def read_lines(path: Path) -> list[dict[str, float | None]]:
    """Return the lines of a run's figures; a last line that a kill has cut off is left out.

    None stands for a figure that was not finite. Raises ValueError for a line that has no step, or
    in which something is no number.
    """
    lines = read_json_lines(path, "the figures of a step", may_be_cut=True)
    need_keys(lines, path, ["step"])
    for number, line in enumerate(lines, 1):
        for name, value in line.items():
            is_number = isinstance(value, int | float) and math.isfinite(value)
            if not is_number and (value is not None or name == "step"):
                raise ValueError(
                    f"{path}, line {number}: {name} is {value!r}; expected a finite number"
                )
    return lines


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the figures of each step, without those that were not finite; see read_lines."""
    steps = []
    for line in read_lines(path):
        steps.append({name: value for name, value in line.items() if value is not None})
    return steps
