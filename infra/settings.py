"""Settings: nested dataclasses whose flags have no prefix, so that a flag's name is unique.

They come from the command line; below it from the run that --resume names, or else from the file
that --config names; and below that from a world's preset.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, get_type_hints

import tyro

from infra import parallel
from infra.config_files import read_settings
from infra.data import has_splits
from infra.files import read_json, shown
from infra.kinds import as_tuple, describe, is_of_kind
from infra.ranges import NonNegativeInt, PositiveInt, check_values

WHERE = ("folder", "resume")  # settings that say where a run is, not what it does


@dataclass(frozen=True)
class ComputeSettings:
    """How the work is cut to fit the memory, and what is compiled."""

    # Tokens of a micro-batch, one forward of one rank; fewer on a CPU, whose caches are small
    tokens_per_gpu: PositiveInt = 16384 if parallel.DEVICE.type == "cuda" else 4096
    # Keep weights and optimisers in host memory: slow, saves most
    offload: Literal["never", "always"] = "never"
    compile: Literal["auto", "on", "off"] = "auto"  # Compile policy and flow; auto: on a GPU

    @property
    def always_offloads(self) -> bool:
        """Whether weights and optimisers are never in the GPU's memory but while they are used."""
        return self.offload == "always"


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


# ---- The command line
class Start(NamedTuple):
    """The settings that a command has before its flags."""

    values: dict[str, object]  # by flag name; others have their defaults
    origin: str  # what they come from, for an error
    whose: str  # the same as a sentence, for the help


def parse_config(config_class: type, presets: dict[str, dict]):
    """Read the command line into `config_class`, whose `script` names the part of a file.

    --model picks a preset, a dict of flags and values, above which come the settings of the file
    that --config names. --resume starts from that run's settings instead.
    """
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--config")
    _, arguments = peek.parse_known_args()  # the others: --config itself is no setting
    peek.add_argument("--model")
    peek.add_argument("--resume")
    known, _ = peek.parse_known_args()
    check_named(known)
    if known.resume:
        start = start_of_run(known.resume, config_class)
    else:
        start = start_of_file(known, config_class, presets)
    values = {name: as_tuple(value) for name, value in start.values.items()}
    asks_again = {name: values.pop(name) for name in runs_code(values)}
    description = f"{config_class.__doc__} {OF_CONFIG_FILES} {start.whose}"
    options = {"description": description, "config": (tyro.conf.OmitArgPrefixes,)}
    defaults = change(config_class(), **values)
    config = tyro.cli(config_class, args=arguments, default=defaults, **options)
    given = {argument.partition("=")[0] for argument in arguments}
    check_asked_again(given, asks_again, start.origin)
    return config


OF_CONFIG_FILES = (
    "--config FILE takes settings from a JSON or YAML file, such as a run's config.json or a file "
    "of recipes/; flags win over it."
)


def check_named(known: argparse.Namespace) -> None:
    """Raise ValueError if --resume or --config names nothing, or both are given."""
    if known.resume == "":
        raise ValueError("--resume is empty; expected the folder of a run, such as runs/NAME")
    if known.config == "":
        raise ValueError("--config is empty; expected a JSON or YAML file of settings")
    if known.resume and known.config:
        raise ValueError(
            f"--resume {known.resume} and --config {known.config} exclude each other: a run goes "
            "on with its own settings, and with flags for what shall change; leave one of them out"
        )


def start_of_run(folder: str, config_class: type) -> Start:
    """Return the settings of the run that --resume names."""
    values = upgraded(stored_settings(folder), f"{folder}: that run")
    foreign = sorted(values.keys() - flatten(config_class()).keys())
    if foreign:
        raise ValueError(
            f"--resume {folder}: that run has settings of another script or version "
            f"({some_of(foreign)}); resume with the one that began it"
        )
    check_each_kind(values, kinds_of(config_class()), Path(folder, "config.json"))
    whose = f"The defaults shown are the settings of the run {folder}."
    return Start(values, f"--resume {folder}: that run", whose)


def start_of_file(known: argparse.Namespace, config_class: type, presets: dict[str, dict]) -> Start:
    """Return a world's preset, and above it the settings of the file that --config names, if any."""
    of_file = {}
    if known.config:
        of_file = settings_of_file(known.config, config_class)
    model = known.model
    if model is None:
        model = of_file.get("model", config_class.model)
    values = presets.get(model, {}) | of_file
    whose = whose_defaults(model, presets, known.config)
    return Start(values, f"--config {known.config}: that file", whose)


def settings_of_file(path: str, config_class: type) -> dict[str, object]:
    """Return the settings of a file, by flag name; ValueError for what `config_class` cannot take.

    `folder` and `resume`, which the file of a run has, are left out: a new run has a place of its own.
    """
    values = read_settings(path, config_class.script)
    values = {name: value for name, value in values.items() if name not in WHERE}
    values = upgraded(values, path, "take that version, or leave it out")
    values = {name: as_tuple(value) for name, value in values.items()}
    kinds = kinds_of(config_class())
    unknown = [shown(name) for name in values if name not in kinds]
    if unknown:
        raise ValueError(
            f"{path} has {some_of(unknown)}: expected settings of {config_class.script}.py, which "
            "--help lists (_ for -); correct the name, or take it out"
        )
    check_each_kind(values, kinds, path)
    try:
        check_values(change(config_class(), **values))
    except ValueError as error:
        raise ValueError(f"{path}: {error}; change it there") from error
    return values


def check_each_kind(values: dict[str, object], kinds: dict[str, object], file: str | Path) -> None:
    """Raise ValueError for a value that a file has and that is not of its setting's kind."""
    for name, value in values.items():
        if not is_of_kind(as_tuple(value), kinds[name]):
            raise ValueError(
                f"{file} has {name}={shown(value)}: expected {describe(kinds[name])}; change it there"
            )


def kinds_of(settings) -> dict[str, object]:
    """Return the types of nested settings, by flag name."""
    hints = get_type_hints(type(settings))  # without ranges, which check_values reads
    kinds = {}
    for field in fields(settings):
        value = getattr(settings, field.name)
        if is_dataclass(value):
            kinds |= kinds_of(value)
        else:
            kinds[field.name] = hints[field.name]
    return kinds


def some_of(names: Sequence[str]) -> str:
    """Return the first of some names, and how many there are, as an error shows them."""
    first = ", ".join(names[:3])
    return first if len(names) <= 3 else f"{first} and {len(names) - 3} more"


def runs_code(stored: dict[str, object]) -> list[str]:
    """Return the names of the settings by which a run, or a file's reader, runs code of others."""
    names = []
    if any(".py" in part for part in stored.get("reward") or ()):
        names.append("reward")
    names += [name for name in ("shaping", "engine") if str(stored.get(name)).endswith(".py")]
    if "shaping" in names and stored.get("dense"):  # it may name a file, too
        names.append("dense")
    if stored.get("trust_remote_code"):
        names.append("trust_remote_code")
    return names


def check_asked_again(given: set[str], stored: dict[str, object], origin: str) -> None:
    """Raise ValueError unless settings by which code runs are given anew, where they were stored.

    given: the flags of the command line
    Whoever takes a run or a file that somebody sent would else run that person's code unawares.
    """
    for name, value in stored.items():
        flag = f"--{name.replace('_', '-')}"
        if not given & {flag, f"--no-{flag[2:]}"}:
            values = [value] if isinstance(value, str) else value
            given = flag if value is True else " ".join([flag, *values])
            raise ValueError(
                f"{origin} has {name}={value!r}, which runs code that you may not have written; "
                f"give {given} again if you trust it"
            )


def whose_defaults(model: str, presets: dict[str, dict], file: str | None) -> str:
    """Return a sentence for the help: what the defaults that it shows are those of."""
    above = f"the file {file} and, below it, " if file else ""
    if model in presets:
        return (
            f"The defaults shown are those of {above}the embedded world --model {model}; "
            "--help with --model NAME shows those of a real model."
        )
    return f"The defaults shown are those of {above}--model {model}; None: see the text beside it."


# ---- What is stored
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
OF_NO_EFFECT = ("log_groups", "grader_deadline", "max_images", "other_contexts", "rehearse")
# Settings that earlier versions had, and the value at which those did what every run does now
NO_LONGER_SET = {"ratio_cap": 3.0, "lr_floor": 0.1, "eval_split": "test", "min_pixels": None}
# The same, where they count for one kind of shaping alone
NO_LONGER_SET_OF = {
    "flow": {"flow_optimiser": "rollout", "flow_accept": "correct", "flow_power": 1.0},
    "entropy": {"entropy_alpha": 0.4, "entropy_kappa": 2.0},
}


def upgraded(
    stored: dict[str, object],
    whose: str | Path,
    advice: str = "resume with the version that began the run, or start a new one",
) -> dict[str, object]:
    """Return stored settings, perhaps of an earlier version, by today's names.

    Raises ValueError for a value that this version cannot take: it says whose it is, and what to do.
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
    always = stored.pop("cpu_offload", False)
    if isinstance(stored.get("offload"), bool):
        stored["offload"] = "sampling" if stored["offload"] else "never"
    if always:
        stored["offload"] = "always"
    recomputes = stored.pop("gradient_checkpointing", None)
    if recomputes is not None:
        stored["recompute_layers"] = 10**6 if recomputes else 0  # all that there are
    if stored.pop("freeze_flow", False):
        stored["flow_lr"] = 0.0
    if "clip_low" in stored or "clip_high" in stored:
        stored["clip"] = [stored.pop("clip_low", 0.2), stored.pop("clip_high", 0.2)]
    alpha = stored.pop("lora_alpha", None)
    if stored.get("lora_rank") and alpha not in (None, 2 * stored["lora_rank"]):
        raise ValueError(
            f"{whose} has lora_alpha={alpha!r}, where all runs have twice the rank now: {advice}"
        )
    buffer = stored.pop("overlong_buffer", None)
    has_overlong = "overlong" in str(stored.get("reward"))
    max_tokens = stored.get("max_tokens")
    is_fifth = isinstance(max_tokens, int) and buffer == max_tokens // 5
    if has_overlong and buffer is not None and not is_fifth:
        raise ValueError(
            f"{whose} has overlong_buffer={buffer!r}, where all runs have a fifth of max_tokens now: "
            f"{advice}"
        )
    cap = stored.pop("flow_cap", 10.0 if "flow_coef" in stored else None)
    for old, new in RENAMED.items():
        if old in stored:
            stored.setdefault(new, stored[old])
            del stored[old]
    if cap is not None and stored.get("flow_scope") == "expert":  # the excess was divided by it
        stored["dense_clamp"] = [-cap, 0.0]
        stored["dense_coef"] = stored.get("dense_coef", 0.01) / cap
    split = stored.pop("split", "train")
    data = stored.get("data")
    if split != "train" and isinstance(data, str) and data and has_splits(data):
        stored["data"] = f"{data}:{split}"
    gone = dict(NO_LONGER_SET)
    for shaping, names in NO_LONGER_SET_OF.items():
        if stored.get("shaping", "flow") == shaping:  # a file may leave the default out
            gone |= names
        for name in names.keys() - gone.keys():
            stored.pop(name, None)
    for name, usual in gone.items():
        value = stored.pop(name, usual)
        if value != usual:
            raise ValueError(
                f"{whose} has {name}={value!r}, which is no setting any more, and {usual!r} in all "
                f"runs: {advice}"
            )
    return stored
