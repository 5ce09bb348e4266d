"""A run: settings, start and exit, signals, its folder with metrics and checkpoints, resuming.

runs/NAME/config.json  metrics.jsonl  summary.json  checkpoints/step-N/  policy/  flow/
A checkpoint is whole or absent: written in the background under another name, then renamed. Any number of ranks reads it.
"""

import argparse
import json
import math
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import tyro
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from flow import as_tuple
from parallel import is_first, on_first, start

STOP_SIGNALS: list[int] = []  # received so far


# ---- From start to exit
def launch(main: Callable, config_class, presets: dict[str, dict]) -> None:
    """Run a script's main with settings from the command line, and leave with exit code 0, or 1 after its error.

    The first SIGTERM or SIGINT lets main finish its step, the second exits at once. os._exit: threads that libraries leave
    behind cannot spoil the exit (one in eight runs died so), nor wait for ranks that are gone.
    """

    def heed(number: int, _frame) -> None:
        if STOP_SIGNALS:
            os._exit(128 + number)
        STOP_SIGNALS.append(number)
        print(
            f"\n{signal.Signals(number).name}: finishing this step, then saving; a second one exits at once",
            file=sys.stderr,
        )

    recorder = get_error_handler()
    recorder.initialize()
    try:
        config = parse_config(config_class, presets)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, heed)
        start()
        main(config)
        dist.destroy_process_group()
    except SystemExit:  # --help, or a flag that does not exist
        raise
    except BaseException as error:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(1))
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            time.sleep(
                10
            )  # a rank that others lost has more to say, and torchrun's last word is the first error recorded
        recorder.record_exception(error)
        if not (
            dist.is_initialized() and dist.get_rank() > 0 and isinstance(error, ValueError)
        ):  # the first rank shows it
            print("\n" + traceback.format_exc(), end="", file=sys.stderr)
        leave(1)
    leave(0)


def leave(code: int) -> None:
    """End the process now, whatever threads still run."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def asked_to_stop() -> bool:
    """Whether any rank has had SIGTERM or SIGINT; all ranks must ask together."""
    asked = torch.tensor(float(bool(STOP_SIGNALS)))
    dist.all_reduce(asked)
    return bool(asked)


# ---- Settings


@dataclass(frozen=True)
class RunConfig:
    """Settings that both trainings have: where a run is kept, and how it is followed."""

    folder: str | None = None  # Run folder; by default one in runs/, named after the model
    resume: str | None = None  # Run folder to go on with
    save_every: int = 20  # Steps between checkpoints, besides the last step; 0: none at all, unless a signal stops the run
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
        raise ValueError(
            f"--resume {known.resume}: that run has {foreign}, settings of another script"
        )
    return tyro.cli(
        config_class, default=config_class(**{k: as_tuple(v) for k, v in values.items()})
    )


def with_defaults(config, **values):
    """Return the configuration with each of the values that it has a field for, and None in it, filled in."""
    return replace(
        config,
        **{name: value for name, value in values.items() if getattr(config, name, "") is None},
    )


def check_positive(config, *names: str) -> None:
    """Raise ValueError for a field that is zero or negative."""
    for name in names:
        if getattr(config, name) is not None and getattr(config, name) <= 0:
            raise ValueError(f"{name}={getattr(config, name)}: expected a positive value")


# ---- Files
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
    """One run's folder, the same on all ranks; the first writes. Nothing is written before begin()."""

    # what may change at a resume without changing what is learnt
    FREE = set(
        [
            "resume",
            "folder",
            "keep",
            "track",
            "eval_every",
            "save_every",
            "tokens_per_gpu",
            "gradient_checkpointing",
            "engine",
            "max_sequences",
            "cache_share",
            "tensor_parallel",
            "offload",
            "cpu_offload",
            "compile",
        ]
    )

    def __init__(self, config, default_name: str):
        self.config, self.settings = config, json.loads(json.dumps(asdict(config)))
        self.folder = on_first(lambda: self.choose_folder(default_name))
        self.saving: Future | None = None
        self.saved: int | None = None  # step of the last checkpoint, begun or found
        self.saver, self.group = (
            ThreadPoolExecutor(1),
            dist.new_group(backend="gloo"),
        )  # for collectives beside the run's own

    def choose_folder(self, default_name: str) -> Path:
        """Return the run's folder; ValueError if it cannot be begun, or resumed, with these settings."""
        config, number = self.config, 1
        self.folder = Path(config.resume or config.folder or f"runs/{default_name}")
        if config.track != "none" and find_spec(config.track) is None:
            raise ValueError(
                f"track={config.track!r} is not installed; run `pip install {config.track}`, or leave --track out"
            )
        if config.resume:
            stored = self.stored_config(config.resume)
            for name in sorted((stored | self.settings).keys() - self.FREE):
                was, now = stored.get(name), self.settings.get(name)
                if was != now:
                    reason = f"that run has {name}={was!r}, this one asks for {now!r}"
                    raise ValueError(
                        f"--resume {self.folder}: {reason}; give the same settings, or start a new run"
                    )
        elif config.folder and (self.folder / "config.json").exists():
            raise ValueError(
                f"{self.folder} holds a run; go on with --resume {self.folder}, or name another --folder"
            )
        while not config.resume and (self.folder / "config.json").exists():
            self.folder = Path(f"runs/{default_name}-{(number := number + 1)}")
        return self.folder

    @staticmethod
    def stored_config(folder: str) -> dict:
        """Return the settings that a run was started with."""
        path = Path(folder) / "config.json"
        if not path.exists():
            raise ValueError(
                f"--resume {folder}: no config.json there; expected the folder of an earlier run"
            )
        return json.loads(path.read_text())

    def begin(self, state: dict) -> None:
        """Make the folder, or go on in it: load the newest checkpoint into `state`, cut metrics.jsonl back to its step.

        state["progress"] is a dict with the `step`; the other values have state_dict() and load_state_dict().
        """
        if newest := on_first(self.prepare_folder):
            dcp.load(state, checkpoint_id=newest, process_group=self.group)
            self.saved = self.step_of(newest)
        self.tracker = open_tracker(
            self.config.track if is_first() else "none", self.folder, self.settings
        )

    def prepare_folder(self) -> Path | None:
        """Make the folder, or clear it of what a dead run left behind its newest checkpoint, which is returned."""
        if not self.config.resume:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.write_json("config.json.new", self.settings)
            os.link(
                self.folder / "config.json.new", self.folder / "config.json"
            )  # of two runs that begin at once, one fails here
            os.unlink(self.folder / "config.json.new")
        for unfinished in (self.folder / "checkpoints").glob("*.writing"):
            shutil.rmtree(unfinished)
        newest = (self.checkpoints() or [None])[-1]
        step, metrics = self.step_of(newest) if newest else 0, self.folder / "metrics.jsonl"
        if metrics.exists():
            lines = [
                line
                for line in metrics.read_text().splitlines(keepends=True)
                if line.endswith("\n")
            ]
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            metrics.with_suffix(".writing").write_text("".join(kept))
            metrics.with_suffix(".writing").replace(metrics)
        return newest

    def write_json(self, name: str, value: dict) -> None:
        """Write a file of the folder, whole or not at all; on the first rank."""
        if is_first():
            (self.folder / f"{name}.writing").write_text(json.dumps(value, indent=1))
            (self.folder / f"{name}.writing").replace(self.folder / name)

    def checkpoints(self) -> list[Path]:
        """Return whole checkpoints, oldest first."""
        found = [
            p
            for p in (self.folder / "checkpoints").glob("step-*")
            if p.name.removeprefix("step-").isdigit()
        ]
        return sorted(found, key=self.step_of)

    @staticmethod
    def step_of(checkpoint: Path) -> int:
        return int(checkpoint.name.removeprefix("step-"))

    def save(self, state: dict) -> None:
        """Copy the state to host memory, then write it to checkpoints/step-N in the background, and keep the newest `keep`."""
        self.wait_for_save()
        step = state["progress"]["step"]
        if step == self.saved:
            return
        self.saved, folder = step, self.folder / "checkpoints" / f"step-{step}"
        writing = folder.with_name(f"{folder.name}.writing")
        written = dcp.async_save(state, checkpoint_id=writing, process_group=self.group)

        def publish() -> None:
            try:
                written.result()  # on the first rank: once all ranks have written
                if is_first():
                    writing.rename(folder)
                    for old in self.checkpoints()[: -self.config.keep]:
                        shutil.rmtree(
                            old.rename(old.with_name(f"{old.name}.writing"))
                        )  # never half there under its name
            except BaseException as error:  # DCP's own error is none of Exception's
                shutil.rmtree(writing, ignore_errors=True)
                room = f"{shutil.disk_usage(self.folder).free / 1e6:.0f} MB free there"
                hint = "what was saved before is whole; make room, then --resume"
                raise OSError(
                    f"could not write {folder} ({room}): {str(error).strip().splitlines()[-1]}; {hint}"
                ) from error

        self.saving = self.saver.submit(publish)

    def end(self, state: dict, total_steps: int) -> bool:
        """Save the last step, wait until it is in its place, and return whether it was the last of all or a signal's."""
        step = state["progress"]["step"]
        if self.config.save_every or step < total_steps:
            self.save(state)
        self.wait_for_save()
        if step < total_steps and is_first():
            print(f"stopped after step {step} of {total_steps}; go on with --resume {self.folder}")
        return step >= total_steps

    def wait_for_save(self) -> None:
        """Wait until the last checkpoint is in its place; raise the error that kept it out."""
        if self.saving:
            self.saving.result()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append a line to metrics.jsonl and to the tracker; a figure that is not finite ends the run instead."""
        if self.saving and self.saving.done():
            self.wait_for_save()
        if broken := [name for name, value in metrics.items() if not math.isfinite(value)]:
            raise FloatingPointError(
                f"step {step}: {', '.join(broken)} not finite; figures: {metrics}. Last checkpoint: "
                f"{(self.checkpoints() or ['none'])[-1]}; look at the data, or start anew with a lower learning rate"
            )
        if is_first():
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"step": step} | metrics) + "\n")
        self.tracker(metrics, step)


def open_tracker(kind: str, folder: Path, settings: dict):
    """Return a function (metrics, step) that sends figures to tensorboard or wandb, or does nothing."""
    if kind == "none":
        return lambda metrics, step: None
    if kind == "wandb":
        import wandb

        wandb.init(
            project="rlfr", name=folder.name, dir=str(folder), config=settings, resume="allow"
        )
        return lambda metrics, step: wandb.log(metrics, step=step)
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder / "tensorboard")
    return lambda metrics, step: [
        writer.add_scalar(name, value, step) for name, value in metrics.items()
    ]
