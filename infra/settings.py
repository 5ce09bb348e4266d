"""Settings: nested dataclasses whose flags have no prefix, so that a flag's name is unique.

They come from the command line, from a world's preset, or from the run that --resume names.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from infra import parallel
from infra.data import has_splits
from infra.files import read_json
from infra.kinds import as_tuple
from infra.ranges import NonNegativeInt, PositiveInt


@dataclass(frozen=True)
class ComputeSettings:
    """How the work is cut to fit the memory, and what is compiled."""

    # Tokens of a micro-batch, one forward of one rank; fewer on a CPU, whose caches are small
    tokens_per_gpu: PositiveInt = 16384 if parallel.DEVICE.type == "cuda" else 4096
    cpu_offload: bool = False  # Keep weights and optimisers in host memory: slow, saves most
    compile: Literal["auto", "on", "off"] = "auto"  # Compile policy and flow; auto: on a GPU


@dataclass(frozen=True)
class RunSettings:
    """How a run is saved and followed."""

    # Steps between checkpoints; 0: none, unless a signal stops the run
    save_every: NonNegativeInt = 20
    keep: PositiveInt = 2  # Checkpoints kept
    # Steps between exports to exports/step-N, for other programs; 0: none
    export_every: NonNegativeInt = 0
    track: Literal["none", "tensorboard", "wandb"] = "none"  # Where else figures go


def flatten(settings) -> dict[str, object]:
    """Return nested settings as one dict by flag name."""
    flat = {}
    for field in fields(settings):
        value = getattr(settings, field.name)
        if is_dataclass(value):
            flat.update(flatten(value))
        else:
            flat[field.name] = value
    return flat


def change(settings, **values):
    """Return a copy of nested settings with values set by flag name; KeyError if unknown."""
    unknown = values.keys() - flatten(settings).keys()
    if unknown:
        raise KeyError(f"{type(settings).__name__} has no settings {sorted(unknown)}")
    changed = {}
    for field in fields(settings):
        value = getattr(settings, field.name)
        if is_dataclass(value):
            names = values.keys() & flatten(value).keys()
            changed[field.name] = change(value, **{name: values[name] for name in names})
        elif field.name in values:
            changed[field.name] = values[field.name]
    return replace(settings, **changed)


def with_defaults(settings, **values):
    """Fill in each value whose setting exists and is None; return a copy."""
    return change(settings, **unset_among(settings, values))


def unset_among(settings, values: dict[str, object]) -> dict[str, object]:
    """Return those of the values whose setting exists and is None."""
    flat = flatten(settings)
    return {name: value for name, value in values.items() if name in flat and flat[name] is None}


def parse_config(config_class: type, presets: dict[str, dict]):
    """Read the command line into `config_class`.

    --model picks a preset, a dict of flags and values. --resume starts from that run's settings.
    """
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--model", default=config_class.model)
    peek.add_argument("--resume")
    known, _ = peek.parse_known_args()
    defaults = config_class()
    if known.resume == "":
        raise ValueError("--resume is empty; expected the folder of a run, such as runs/NAME")
    if known.resume:
        values = upgraded(stored_settings(known.resume), known.resume)
        foreign = sorted(values.keys() - flatten(defaults).keys())
        if foreign:
            raise ValueError(
                f"--resume {known.resume}: that run has settings of another script or version "
                f"({some_of(foreign)}); resume with the one that began it"
            )
        asks_again = {name: values.pop(name) for name in runs_code(values)}
    else:
        values = presets.get(known.model, {})
        asks_again = {}
    defaults = change(defaults, **{name: as_tuple(value) for name, value in values.items()})
    description = f"{config_class.__doc__} {whose_defaults(known, presets)}"
    options = {"description": description, "config": (tyro.conf.OmitArgPrefixes,)}
    config = tyro.cli(config_class, default=defaults, **options)
    check_asked_again(config, asks_again)
    return config


def some_of(names: Sequence[str]) -> str:
    """Return the first of some names, and how many there are, as an error shows them."""
    first = ", ".join(names[:3])
    return first if len(names) <= 3 else f"{first} and {len(names) - 3} more"


def runs_code(stored: dict[str, object]) -> list[str]:
    """Return the names of a run's settings by which it runs code that came with it."""
    names = []
    if any(".py" in part for part in stored.get("reward") or ()):
        names.append("reward")
    if str(stored.get("shaping")).endswith(".py"):
        names.append("shaping")
    if stored.get("trust_remote_code"):
        names.append("trust_remote_code")
    return names


def check_asked_again(config, stored: dict[str, object]) -> None:
    """Raise ValueError unless settings by which a resumed run runs code are given anew.

    Whoever resumes a run that somebody sent would else run that person's code unawares.
    """
    asked = flatten(config)
    usual = flatten(type(config)())
    for name, value in stored.items():
        if asked[name] == usual[name]:
            flag = f"--{name.replace('_', '-')}"
            values = [value] if isinstance(value, str) else value
            given = flag if value is True else " ".join([flag, *values])
            raise ValueError(
                f"--resume {config.resume}: that run has {name}={value!r}, which runs code that "
                f"you may not have written; give {given} again if you trust it"
            )


def whose_defaults(known: argparse.Namespace, presets: dict[str, dict]) -> str:
    """Return a sentence for the help: what the defaults that it shows are those of."""
    if known.resume:
        return f"The defaults shown are the settings of the run {known.resume}."
    if known.model in presets:
        return (
            f"The defaults shown are those of the embedded world --model {known.model}; "
            "--help with --model NAME shows those of a real model."
        )
    return f"The defaults shown are those of --model {known.model}; None: see the text beside it."


def stored_settings(folder: str | Path) -> dict[str, object]:
    """Return the settings that a run was started with, by flag name; see upgraded()."""
    path = Path(folder) / "config.json"
    if not path.exists():
        raise ValueError(f"{folder} has no config.json; expected the folder of a run")
    nested = read_json(path, "the settings of a run")
    flat = {}
    for name, value in nested.items():
        if isinstance(value, dict):  # a group
            flat.update(value)
        else:
            flat[name] = value
    if not any(isinstance(value, dict) for value in nested.values()):
        raise ValueError(
            f"{path} holds settings in one flat list, as an earlier version wrote them; expected "
            f"groups of settings: resume with the version that began the run, or start a new one"
        )
    return flat


# Settings whose names have changed: what earlier versions said of the flow holds of any dense reward
RENAMED = {
    "flow_coef": "dense_coef",
    "flow_on": "dense_on",
    "flow_centre": "dense_centre",
    "flow_after": "dense_after",
}
# Settings that earlier versions had, and that do not count for a run that goes on
OF_NO_EFFECT = ("log_groups", "grader_deadline", "max_images")
# Settings that earlier versions had, and the value at which those did what every run does now
NO_LONGER_SET = {"ratio_cap": 3.0, "lr_floor": 0.1, "eval_split": "test"}
# The same, where they count for one kind of shaping alone
NO_LONGER_SET_OF = {
    "flow": {"flow_optimiser": "rollout", "flow_accept": "correct", "flow_power": 1.0},
    "entropy": {"entropy_alpha": 0.4, "entropy_kappa": 2.0},
}


def upgraded(stored: dict[str, object], folder: str | Path) -> dict[str, object]:
    """Return the stored settings of a run that goes on, perhaps of an earlier version, by today's names.

    Raises ValueError for a value that this version cannot take.
    """
    stored = {name: value for name, value in stored.items() if name not in OF_NO_EFFECT}
    max_rounds = stored.pop("max_rounds", 4)
    if isinstance(stored.get("dynamic_sampling"), bool):
        stored["dynamic_sampling"] = max_rounds if stored["dynamic_sampling"] else 0
    # flow_soft is also the weight of tokens below a quantile, which flow_accept was not
    has_quantile = stored.get("flow_entropy_quantile") is not None
    if stored.get("flow_accept") == "all" and not has_quantile:
        del stored["flow_accept"]
        stored["flow_soft"] = 1.0
    cap = stored.pop("flow_cap", None)  # the excess was divided by it
    for old, new in RENAMED.items():
        if old in stored:
            stored[new] = stored.pop(old)
    if cap is not None and stored.get("flow_scope") == "expert":
        stored["dense_clamp"] = [-cap, 0.0]
        stored["dense_coef"] = stored.get("dense_coef", 0.01) / cap
    split = stored.pop("split", "train")
    data = stored.get("data")
    if split != "train" and data and has_splits(data):
        stored["data"] = f"{data}:{split}"
    gone = dict(NO_LONGER_SET)
    for shaping, names in NO_LONGER_SET_OF.items():
        if stored.get("shaping") == shaping:
            gone |= names
        for name in names.keys() - gone.keys():
            stored.pop(name, None)
    for name, usual in gone.items():
        value = stored.pop(name, usual)
        if value != usual:
            raise ValueError(
                f"{folder}: that run has {name}={value!r}, which is no setting any more, and {usual!r} in all "
                "runs: resume with the version that began the run, or start a new one"
            )
    return stored
