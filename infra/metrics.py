"""The figures of a run: metrics.jsonl, one JSON object a step."""

import math
from pathlib import Path

from infra.files import need_keys, read_json_lines


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the figures of each step; a last line that a kill has cut off is left out.

    Raises ValueError for a line that has no step, or in which something is no finite number.
    """
    metrics = read_json_lines(path, "the figures of a step", may_be_cut=True)
    need_keys(metrics, path, ["step"])
    for number, line in enumerate(metrics, 1):
        for name, value in line.items():
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(
                    f"{path}, line {number}: {name} is {value!r}; expected a finite number"
                )
    return metrics
