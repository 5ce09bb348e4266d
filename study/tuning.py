"""Parity of tuning: every method's settings are chosen among as many, on seeds that nobody reports.

The candidates are named here, before anything runs. Each is tried on SEEDS_PER_BASE seeds from
FIRST_TUNING_SEED on for each base model. The one with the best mean accuracy is taken, of equals
the one that is named first. NAME-shuffled and other controls NAME-… take the choice of NAME.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from common import table
from figures import FIRST_TUNING_SEED
from measures import has_escaped, last_accuracy, number

SEEDS_PER_BASE = 2
RATES = ("", "lr=1e-4", "lr=4e-4")
CANDIDATES = {  # arm -> changes of its settings, as in NAME:SETTING=VALUE; "" changes nothing
    "rlvr": RATES,
    "entropy": RATES,
    "sft": RATES,
    "sft-rlvr": RATES,
    "luffy": RATES,
    "process": RATES,
    "published": ("", "dense_coef=0.1", "dense_coef=1.0"),
    "calibrated": ("", "dense_coef=0.2", "dense_coef=1.25"),
    "distillation": ("", "dense_coef=0.03", "dense_coef=0.3"),
}
FACTORS = ("", "0.3", "3")  # of the coefficient that scale.py finds for a reward of a file


def candidates(arm: str, scale: str | None) -> Sequence[str]:
    """Return the changes of settings among which those of an arm are chosen; none for a control.

    scale: name of the preparation with the coefficient of a reward of a file
    """
    if scale is None:
        return CANDIDATES.get(arm, ())
    return [f"dense_coef={{{scale}:{factor}}}" if factor else "" for factor in FACTORS]


def choose(figures: dict, tried: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return the changes of settings that each arm has done best with.

    figures: with the runs of the arms NAME or NAME:CHANGES on seeds from FIRST_TUNING_SEED on
    tried: arm -> its candidates
    """
    accuracies = by_arm(figures)
    chosen = {}
    for arm, changes in tried.items():
        means = [np.mean(accuracies.get(with_changes(arm, each), [-1.0])) for each in changes]
        chosen[arm] = changes[int(np.argmax(means))]  # the first of equals
    return chosen


def with_changes(arm: str, changes: str) -> str:
    """Return the name of an arm with changed settings."""
    return f"{arm}:{changes}" if changes else arm


def by_arm(figures: dict) -> dict[str, list[float]]:
    """Return the accuracies of the finished tuning runs of each arm."""
    accuracies: dict[str, list[float]] = {}
    for run in figures["runs"]:
        if run["status"] == "finished" and run["seed"] >= FIRST_TUNING_SEED:
            accuracy = last_accuracy(run["series"]["correct"])
            accuracies.setdefault(run["arm"], []).append(accuracy)
    return accuracies


def tuning_table(figures: dict, chosen: Mapping[str, str]) -> str:
    """Return the table of what was tried, with what was chosen."""
    taken = {with_changes(arm, changes) for arm, changes in chosen.items()}
    rows = []
    for arm, values in by_arm(figures).items():
        escaped = sum(has_escaped([value]) for value in values)
        mark = "chosen" if arm in taken else ""
        cells = [number(float(np.mean(values))), f"{escaped} of {len(values)}", mark]
        rows.append([f"`{arm}`", *cells])
    return table(("arm", "accuracy", "escaped", ""), rows)


def read_chosen(folder: str | Path) -> dict[str, str]:
    """Return the changes of settings that a study has chosen, none if it has not tuned."""
    file = Path(folder, "chosen.json")
    return json.loads(file.read_text()) if file.exists() else {}
