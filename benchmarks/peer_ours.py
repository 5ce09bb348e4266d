"""Train with train_rl.py and write a line of figures a step: ours in peers.py.

    python benchmarks/peer_ours.py FIGURES [flags of train_rl.py]

A line has `time/step`, `reward` and `length`, as in metrics.jsonl, and `cpu/step`, as in peer_trl.py.
"""

import repository  # noqa: F401

# isort: split
import json
import sys
from functools import partial
from pathlib import Path

import train_rl
from infra.runs import launch
from steps import noted_steps
from worlds import toy


def train(figures: Path, config: train_rl.Config) -> None:
    """Train, and write the figures of all steps at the end."""
    with noted_steps() as steps:
        train_rl.main(config)
    lines = []
    for step in steps:
        line = {name: step.metrics[name] for name in ("time/step", "reward", "length")}
        line["cpu/step"] = step.cpu_seconds
        lines.append(json.dumps(line) + "\n")
    figures.write_text("".join(lines))


if __name__ == "__main__":
    work = partial(train, Path(sys.argv.pop(1)))
    launch(work, train_rl.Config, toy.PRESETS["train_rl"])
