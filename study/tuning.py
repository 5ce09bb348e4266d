"""Parity of tuning: every method's settings are chosen among as many, on seeds that nobody reports.

The candidates are named here, before anything runs: N_CANDIDATES for each method and for each reward
of a file. Each is tried on N_SEEDS seeds from FIRST_TUNING_SEED on, for a part of the steps. The one
with the best mean accuracy is taken, of equals the one that is named first.

A control or variant takes the choice of what it is of: NAME-shuffled, and what has the settings file
of NAME. Rewards that know nothing (`noise`, `length`) have nothing chosen.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from common import table
from figures import FIRST_TUNING_SEED
from infra.files import read_json
from measures import has_escaped, last_accuracy, number
from methods import Catalogue, read_changes

N_SEEDS = 2  # of each candidate, on as many base models where there are more
SHARE_OF_STEPS = 0.5  # of a reported run's; by then most runs that leave a habit have left it
N_CANDIDATES = 6
RATES = ("", "lr=2.5e-5", "lr=5e-5", "lr=1e-4", "lr=3e-4", "lr=8e-4")
CANDIDATES = {  # arm -> changes of its settings, as in NAME:SETTING=VALUE; "" changes nothing
    "rlvr": RATES,
    "entropy": ("", "alpha=0.05", "alpha=0.1", "alpha=0.2", "alpha=0.8", "alpha=1.6"),
    "sft": RATES,
    "sft-rlvr": RATES,
    "luffy": RATES,
    "process": RATES,
    "published": (
        "",
        "dense_coef=0.1",
        "dense_coef=1.0",
        "flow_lr=0.0",
        "dense_coef=0.1,flow_lr=0.0",
        "dense_coef=1.0,flow_lr=0.0",
    ),
    "calibrated": (
        "",
        "dense_coef=0.1",
        "dense_coef=0.2",
        "dense_coef=1.0",
        "dense_coef=2.0",
        "dense_coef=5.0",
    ),
    "logprob": (
        "",
        "dense_clamp=-10.0,0.0",
        "dense_clamp=-1000.0,0.0",
        "lowest=True",
        "dense_clamp=-10.0,0.0,lowest=True",
        "dense_clamp=-1000.0,0.0,lowest=True",
    ),
    "distillation": (
        "",
        "dense_coef=0.01",
        "dense_coef=0.03",
        "dense_coef=0.3",
        "dense_coef=1.0",
        "dense_coef=3.0",
    ),
}
# of the coefficient that scale.py finds for a reward of a file
FACTORS = ("", "0.1", "0.3", "2", "4", "10")


def candidates(arm: str, scale: str | None) -> Sequence[str]:
    """Return the changes of settings among which those of an arm are chosen; none for a control.

    scale: name of the preparation with the coefficient of a reward of a file
    """
    if scale is None:
        return CANDIDATES.get(arm, ())
    return [f"dense_coef={{{scale}:{factor}}}" if factor else "" for factor in FACTORS]


def choice_of(arm: str, catalogue: Catalogue, chosen: Mapping[str, str]) -> str:
    """Return the changes of settings that were chosen for an arm, or for what it is a control of.

    A variant with another value of what was chosen keeps it: a coefficient of tokens is none of
    responses.
    """
    if arm in chosen:
        return chosen[arm]
    control = catalogue.find(arm)
    if control.beside is None or arm in CANDIDATES:
        return ""
    of = catalogue.find(control.beside)
    is_control = control.file == of.file or arm.startswith(f"{control.beside}-")
    changes = chosen.get(control.beside, "")
    own, its = control.settings, of.settings
    is_alike = all(own.get(name) == its.get(name) for name in read_changes(changes))
    return changes if is_control and is_alike else ""


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


def chosen_in(figures: dict) -> dict[str, str]:
    """Return the changes of settings that each method has done best with in the runs of a study."""
    arms = dict.fromkeys(name.partition(":")[0] for name in by_arm(figures))
    return choose(figures, {arm: CANDIDATES[arm] for arm in arms if arm in CANDIDATES})


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
    """Return the table of what was tried for each arm: accuracy and escapes, the choice in bold."""
    tried: dict[str, list[str]] = {}
    for name, values in by_arm(figures).items():
        arm, _, changes = name.partition(":")
        escaped = sum(has_escaped([value]) for value in values)
        text = f"{changes or 'as it is'} {number(float(np.mean(values)))}"
        text = f"{text} ({escaped} of {len(values)})"
        tried.setdefault(arm, []).append(f"**{text}**" if chosen.get(arm) == changes else text)
    for arm, changes in chosen.items():
        tried.setdefault(arm, [f"**{changes or 'as it is'}**, as chosen in another study"])
    rows = [[f"`{arm}`", "; ".join(texts)] for arm, texts in tried.items()]
    return table(("arm", "setting, accuracy, escaped"), rows)


def read_chosen(folder: str | Path) -> dict[str, str]:
    """Return the changes of settings that a study has chosen, none if it has not tuned."""
    file = Path(folder, "chosen.json")
    return read_json(file, "settings that a study has chosen") if file.exists() else {}
