"""A run's folder: settings from the command line, metrics, checkpoints that are whole or absent, and resuming.

runs/NAME/config.json  metrics.jsonl  summary.json  checkpoints/step-N/state.pt  policy/  flow/
"""

import argparse
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
import tyro

from flow import as_tuple


@dataclass(frozen=True)
class RunConfig:
    """Settings that both trainings have: where a run is kept, and how it is followed."""

    folder: str | None = None  # Run folder; by default one in runs/, named after the model
    resume: str | None = None  # Run folder to go on with
    save_every: int = 20  # Steps between checkpoints; the last step is always saved
    keep: int = 2  # Checkpoints kept
    track: Literal["none", "tensorboard", "wandb"] = "none"  # Where else figures go
    seed: int = 0  # Seed of initialisation, order, sampling and noise


def parse_config(config_class, presets: dict[str, dict]):
    """Read the command line into `config_class`; --model picks a preset, --resume starts from that run's settings."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--model", default=config_class.model)
    peek.add_argument("--resume")
    known, _ = peek.parse_known_args()
    values = Run.stored_config(known.resume) if known.resume else presets.get(known.model, {})
    if foreign := sorted(values.keys() - config_class.__dataclass_fields__.keys()):
        raise ValueError(f"--resume {known.resume}: that run has {foreign}, settings of another script")
    return tyro.cli(config_class, default=config_class(**{k: as_tuple(v) for k, v in values.items()}))


def with_defaults(config, **values):
    """Return the configuration with each given field that is None filled in."""
    return replace(config, **{name: value for name, value in values.items() if getattr(config, name) is None})


def check_positive(config, *names: str) -> None:
    """Raise ValueError for a field that is zero or negative."""
    for name in names:
        if getattr(config, name) is not None and getattr(config, name) <= 0:
            raise ValueError(f"{name}={getattr(config, name)}: expected a positive value")


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that takes the place of `folder` when the block ends; until then the old one stands."""
    temporary = folder.with_name(f"{folder.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in (p for p in temporary.rglob("*") if p.is_file()):
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
    except (OSError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        room = f"{shutil.disk_usage(folder.parent).free / 1e6:.0f} MB free there"
        hint = "what was saved before is whole; make room, then --resume"
        raise OSError(f"could not write {folder} ({room}): {error}; {hint}") from error
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


class Run:
    """One run's folder. Nothing is written before begin()."""

    # what may change at a resume without changing what is learnt
    FREE = {"resume", "folder", "keep", "track", "eval_every", "save_every", "tokens_per_micro_batch", "gradient_checkpointing"}

    def __init__(self, config, default_name: str):
        self.config, self.settings = config, json.loads(json.dumps(asdict(config)))
        self.folder, number = Path(config.resume or config.folder or f"runs/{default_name}"), 1
        if config.track != "none" and find_spec(config.track) is None:
            raise ValueError(f"track={config.track!r} is not installed; run `pip install {config.track}`, or leave --track out")
        if config.resume:
            stored = self.stored_config(config.resume)
            for name in sorted((stored | self.settings).keys() - self.FREE):
                was, now = stored.get(name), self.settings.get(name)
                if was != now:
                    reason = f"that run has {name}={was!r}, this one asks for {now!r}"
                    raise ValueError(f"--resume {self.folder}: {reason}; give the same settings, or start a new run")
        elif config.folder and (self.folder / "config.json").exists():
            raise ValueError(f"{self.folder} holds a run; go on with --resume {self.folder}, or name another --folder")
        while not config.resume and (self.folder / "config.json").exists():
            self.folder = Path(f"runs/{default_name}-{(number := number + 1)}")

    @staticmethod
    def stored_config(folder: str) -> dict:
        """Return the settings that a run was started with."""
        path = Path(folder) / "config.json"
        if not path.exists():
            raise ValueError(f"--resume {folder}: no config.json there; expected the folder of an earlier run")
        return json.loads(path.read_text())

    def begin(self) -> dict | None:
        """Make the folder, or go on in it: return the newest checkpoint, and cut metrics.jsonl back to its step."""
        self.tracker = open_tracker(self.config.track, self.folder, self.settings)
        if not self.config.resume:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / "config.json", "x") as file:  # of two runs that begin at once, one fails here
                json.dump(self.settings, file, indent=1)
        found = self.checkpoints()
        state = torch.load(found[-1] / "state.pt", map_location="cpu", weights_only=True) if found else None
        metrics = self.folder / "metrics.jsonl"
        if metrics.exists():
            lines = [line for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
            kept = [line for line in lines if state and json.loads(line)["step"] <= state["step"]]
            metrics.with_suffix(".writing").write_text("".join(kept))
            metrics.with_suffix(".writing").replace(metrics)
        return state

    def write_json(self, name: str, value: dict) -> None:
        """Write a file of the folder, whole or not at all."""
        (self.folder / f"{name}.writing").write_text(json.dumps(value, indent=1))
        (self.folder / f"{name}.writing").replace(self.folder / name)

    def checkpoints(self) -> list[Path]:
        """Return whole checkpoints, oldest first."""
        found = [p for p in (self.folder / "checkpoints").glob("step-*") if p.name.removeprefix("step-").isdigit()]
        return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))

    def save(self, step: int, state: dict) -> None:
        """Write checkpoints/step-N and drop all but the newest `keep`."""
        with written_whole(self.folder / "checkpoints" / f"step-{step}") as folder:
            torch.save({"step": step} | state, folder / "state.pt")
        for old in self.checkpoints()[: -self.config.keep]:
            shutil.rmtree(old)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append a line to metrics.jsonl and to the tracker; a figure that is not finite ends the run instead."""
        if broken := [name for name, value in metrics.items() if not math.isfinite(value)]:
            raise FloatingPointError(
                f"step {step}: {', '.join(broken)} not finite; figures: {metrics}. Last checkpoint: "
                f"{(self.checkpoints() or ['none'])[-1]}; look at the data, or start anew with a lower learning rate"
            )
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step} | metrics) + "\n")
        self.tracker(metrics, step)


def open_tracker(kind: str, folder: Path, settings: dict):
    """Return a function (metrics, step) that sends figures to tensorboard or wandb, or does nothing."""
    if kind == "none":
        return lambda metrics, step: None
    if kind == "wandb":
        import wandb

        wandb.init(project="rlfr", name=folder.name, dir=str(folder), config=settings, resume="allow")
        return lambda metrics, step: wandb.log(metrics, step=step)
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder / "tensorboard")
    return lambda metrics, step: [writer.add_scalar(name, value, step) for name, value in metrics.items()]
