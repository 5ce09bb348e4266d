"""A run: start, signals and exit, its folder with metrics and checkpoints, resuming.

    runs/NAME/config.json  metrics.jsonl  summary.json  checkpoints/step-N/  policy/  flow/
              rollouts/step-N.jsonl  report.html  rollouts.html

A checkpoint is whole or absent: it is written in the background under another name, then renamed.
Any number of ranks can read it.
"""

import json
import math
import os
import select
import shutil
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from tqdm import tqdm

from infra import checkpoints, children, errors, files, folders, parallel, ranks, record
from infra.files import cannot_write, need_keys, read_json, write_json, written_whole
from infra.metrics import read_lines
from infra.parallel import is_first, on_first
from infra.settings import WHERE, flatten, parse_config, stored_settings, upgraded
from infra.tracking import Tracker

DATA_FILE = "data.json"  # fingerprints of the data that a run began with
# A single process saves its checkpoints without torch.distributed, and torch warns of it
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


# ---- From start to exit
def launch(main: Callable, config_class: type, presets: dict[str, dict]) -> None:
    """Run a script's main with settings from the command line; exit with code 0, or 1 on an error.

    An error of input is shown as one line, a bug as a traceback; --traceback shows it for both.
    What signals do stands below. The process ends by os._exit, because threads left by
    libraries crashed one exit in eight, or waited for ranks that were gone.
    """
    recorder = get_error_handler()
    recorder.initialize()
    in_full = errors.take_flag(sys.argv)
    try:
        try:
            config = parse_config(config_class, presets)
            listen()
            children.follow_parent(received)
            run_to_its_end(main, config)
            dist.destroy_process_group()
        except (SystemExit, Stop):  # --help, or a flag that does not exist; a signal
            raise
        except BaseException as error:
            report_error(error, recorder, in_full)
            leave(1)
    except Stop:  # perhaps amid an error: the signal has ended another rank, too
        end_by_signal()
    leave(0)


def run_to_its_end(main: Callable, config) -> None:
    """Run a script's main; RuntimeError if a user's file ends it by sys.exit(), as if it were complete."""
    try:
        main(config)
    except SystemExit as error:
        *_, last = traceback.extract_tb(error.__traceback__)
        raise RuntimeError(
            f"{last.filename}, line {last.lineno}: sys.exit() would end the run as if it were "
            "complete; raise an error instead"
        ) from error


def report_error(error: BaseException, recorder, in_full: bool) -> None:
    """Show an error and record it for torchrun, which reports the first one recorded."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(1))
    lost_a_peer = isinstance(error, dist.DistError) or "gloo" in str(error)
    if lost_a_peer and ranks.is_any_stopping():
        end_by_signal()  # nothing is wrong: a signal has ended that rank
    if lost_a_peer:
        time.sleep(10)  # the rank that was lost knows the cause: let it record its error first
    recorder.record_exception(error)
    is_other_rank = int(os.environ.get("RANK", 0)) > 0
    is_of_all = isinstance(error, ValueError) and not isinstance(error, parallel.OfOneRankError)
    if is_other_rank and is_of_all:
        return  # invalid input fails on every rank, and the first one prints it
    errors.show(error, in_full)


def leave(code: int) -> None:
    """End the process now, whatever threads still run."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# ---- Signals
# The first SIGTERM or SIGINT ends a command soon and without an error; the second ends it at once.
#
# A step, or another unit of work, is finished and saved: from asked_to_stop() on, a signal is noted.
# Everywhere else, before the first step or after the last, the signal raises Stop where the command
# stands. What is on the disk is whole there, and the next start goes on from it.
#
# Python heeds a signal between two of its own instructions, so not while the main thread waits in a
# collective. A thread of its own ends the process then.
SIGNALS = (signal.SIGTERM, signal.SIGINT)
GRACE = 5.0  # seconds that the main thread has to heed a signal
received: list[int] = []  # signals that it has heeded
unit: str | None = None  # of the work in progress; None: there is none to be finished
how_to_go_on = "the same command starts again"


class Stop(BaseException):
    """A signal came where no work is in progress; no Exception, which other code might catch."""


def listen() -> None:
    """Heed SIGTERM and SIGINT from now on."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)  # gets the number of each signal as soon as it comes
    threading.Thread(target=end_if_unheeded, args=(reader,), daemon=True).start()
    for number in SIGNALS:
        signal.signal(number, heed)
    os.register_at_fork(after_in_child=forget)


def forget() -> None:
    """Let signals end this process as they do without listen(): it is a child of the command."""
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def heed(number: int, _frame) -> None:
    """Note the first signal, or raise Stop; exit at the second."""
    if received:
        os._exit(128 + number)
    received.append(number)
    work = (
        f"finishing this {unit}, then saving" if unit else "stopping here, no step is in progress"
    )
    tell(f"\n{signal.Signals(number).name}: {work}; a second signal exits at once")
    if not unit:
        raise Stop


def end_if_unheeded(reader: int) -> None:
    """End the process if its main thread does not heed a signal, or at the second signal."""
    os.read(reader, 1)
    if not unit:
        has_second, _, _ = select.select([reader], [], [], GRACE)
        if not has_second and not received:
            end_by_signal()
    (second,) = os.read(reader, 1)
    os._exit(128 + second)


def end_by_signal() -> None:
    """End the process because a signal came, with code 0; say how to go on, on the first rank."""
    ranks.say_stopping()
    sys.stdout.flush()
    if os.environ.get("RANK", "0") == "0":
        tell(f"stopped; {how_to_go_on}")
    os._exit(0)


def note_how_to_go_on(how: str) -> None:
    """Note what the user is told when a signal has ended the process."""
    global how_to_go_on
    how_to_go_on = how


def tell(message: str) -> None:
    """Write a line to standard error; print() may be what a signal has interrupted."""
    os.write(2, f"{message}\n".encode())


def asked_to_stop(next_unit: str = "step") -> bool:
    """Begin a unit of work; return whether a signal came to any rank. All ranks ask together."""
    global unit
    unit = next_unit  # before they ask: a rank that raised Stop now would leave the others alone
    asked = torch.tensor(float(bool(received)))
    dist.all_reduce(asked)
    return bool(asked)


def end_work() -> None:
    """From here on there is nothing to be finished: a signal raises Stop."""
    global unit
    unit = None
    if received:
        raise Stop


# ---- A run's folder
# Settings that cannot change when a run is resumed, by the reason; all others act from there on
OF_THE_DATA = "the checkpoint's place in the data would mean other problems"
OF_THE_WEIGHTS = "the checkpoint holds other weights and optimisers than that needs"
REASONS = {
    "the checkpoint holds the weights of that model": ("model", "trust_remote_code"),
    OF_THE_DATA: (
        *("data", "subset", "problem_column", "answer_column", "solution_column"),
        *("drop_empty", "images_column", "batch_size"),
    ),
    "the flow has learnt from those that it would be tested on": ("held_out",),
    "the flow has learnt from solutions that were cut there": ("cutoff",),
    "the policy has learnt from other prompts": ("template", "max_pixels"),
    OF_THE_WEIGHTS: (
        *("shaping", "dense", "flow", "freeze", "lora_rank", "contexts", "percentiles"),
        *("shift", "flow_blocks", "standardise", "calibrate_at"),
    ),
    "order, sampling and noise follow from it": ("seed",),
}
FIXED_AT_START = {name: reason for reason, names in REASONS.items() for name in names}
# Settings of which it is fixed whether they are 0: the flow has an optimiser, or none
FIXED_IF_ZERO = {"flow_lr": OF_THE_WEIGHTS}


RESULTS = ("policy", "adapter", "flow")  # folders that a run writes at its end
FIELDS_OF_LOADING = ("dtype", "max_pixels")  # of its model


def whole_checkpoints(folder: Path) -> list[Path]:
    """Return a run's whole checkpoints, oldest first."""
    found = (folder / "checkpoints").glob("step-*")
    whole = [path for path in found if path.name.removeprefix("step-").isdigit()]
    return sorted(whole, key=step_of)


def check_folder(config) -> None:
    """Raise ValueError if a run cannot begin in --folder, or go on in --resume; change nothing."""
    if config.resume:
        folders.check_unused(Path(config.resume))
        check_beginning(Path(config.resume))
    elif config.folder:
        folders.check_unused(Path(config.folder))
        check_new(Path(config.folder))


def check_new(folder: Path) -> None:
    """Raise ValueError if a new run cannot begin in a folder, because something is there."""
    if folders.is_free(folder):
        return
    if (folder / "config.json").exists():
        way = f"go on with --resume {folder}"
        if not whole_checkpoints(folder):
            way = "it has no checkpoint to go on from: remove it"
        raise ValueError(f"{folder} holds a run; {way}, or name another --folder")
    raise ValueError(
        f"--folder {folder} is a file or has files in it, which stay as they are; name a folder "
        "that is new or empty"
    )


def check_beginning(folder: Path) -> None:
    """Raise ValueError if resuming a run would begin anew and replace what it has.

    A run that was killed before its first checkpoint was whole can begin anew.
    """
    n_steps = count_lines(folder / "metrics.jsonl")
    rollouts = record.find_files(folder)
    n_done = max(n_steps, max(rollouts, default=1) - 1)  # rollouts are written before figures
    first = stored_settings(folder).get("save_every", 0)  # step of the first checkpoint; 0: none
    unfinished = folder / "checkpoints" / f"step-{first}{files.UNFINISHED}"
    results = [name for name in RESULTS if (folder / name).exists()]
    is_early = n_done == 0 or (first and (n_done <= first or unfinished.exists()))
    if whole_checkpoints(folder) or (is_early and not results):
        return
    present = [f"{n_steps} steps in metrics.jsonl", f"rollouts of {len(rollouts)} steps"]
    present += [f"{name}/" for name in results]
    raise ValueError(
        f"--resume {folder}: no checkpoint to go on from, and a beginning anew would replace "
        f"{', '.join(present)}; put a checkpoint back, or start a new run: the first command with "
        "another --folder"
    )


def count_lines(path: Path) -> int:
    """Return how many lines of a file were written to their end; 0 if there is no file."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def advise(folder: Path, error: checkpoints.DamagedError, damaged: Path) -> ValueError:
    """Return the error for a damaged checkpoint of a run: it names the newest older one."""
    for older in reversed(whole_checkpoints(folder)):
        if step_of(older) < step_of(damaged) and checkpoints.is_whole(older):
            return ValueError(
                f"{error}; the older {older.name} is whole: move the damaged folder away "
                f"(mv {damaged} {damaged}.damaged), then the same command goes on from step "
                f"{step_of(older)}"
            )
    return ValueError(f"{error}; no older one is whole: put a copy back, or start a new run")


def check_checkpoint(folder: Path, checkpoint: Path) -> None:
    """Raise ValueError unless a checkpoint of a run holds what was written; all ranks together."""
    said = None
    try:
        checkpoints.check_sizes(checkpoint)
        checkpoints.check_contents(checkpoint, dist.get_rank(), dist.get_world_size())
    except checkpoints.DamagedError as error:
        said = str(error)
    found = [text for text in parallel.gather_objects(said) if text]
    if found:
        raise advise(folder, checkpoints.DamagedError(found[0]), checkpoint)


def check_parts(state: dict, checkpoint: Path) -> None:
    """Raise ValueError if a checkpoint holds more than what `state` would take from it."""
    stored = {name.partition(".")[0] for name in checkpoints.names_in(checkpoint)}
    left = sorted(stored - state.keys())
    if left:
        raise ValueError(
            f"checkpoint {checkpoint} holds {', '.join(left)}, for which this run has no place: has "
            "the file of its dense reward changed? Put it back, or start a new run"
        )


def step_of(checkpoint: Path) -> int:
    """Return the step that a checkpoint was saved after."""
    return int(checkpoint.name.removeprefix("step-"))


class Run:
    """One run's folder, the same on all ranks; the first one writes all but checkpoints.

    `config` is a script's settings: `folder` and `resume` at its top, and a group `run`.
    """

    def __init__(self, config, default_name: str):
        self.config = config
        self.default_name = default_name
        self.data: dict = {}  # fingerprints, see check_data
        on_first(self.check)
        self.saving: Future | None = None
        self.saved_step: int | None = None  # of the last checkpoint, begun or found
        self.saver = ThreadPoolExecutor(1)
        self.checkpoint_options = {
            # a group of its own: checkpoints are written while the run uses the others
            "process_group": dist.new_group(backend="gloo"),
            # a single process needs no communication, see parallel.gather_objects
            "no_dist": dist.get_world_size() == 1,
        }

    # ---- The folder
    def check(self) -> None:
        """Raise ValueError if a run cannot begin, or be resumed, with these settings."""
        track = self.config.run.track
        if track != "none" and find_spec(track) is None:
            raise ValueError(
                f"track={track!r} is not installed; run `pip install {track}`, or leave --track out"
            )
        if self.config.resume:
            self.check_resume()
        check_folder(self.config)

    def claim_folder(self) -> Path:
        """Claim the run's folder, and return it: what others did since check() is seen here."""
        if not self.config.folder and not self.config.resume:
            return folders.claim_free(Path(f"runs/{self.default_name}"))
        folder = Path(self.config.resume or self.config.folder)
        folders.claim(folder)
        check_folder(self.config)
        return folder

    def changes(self) -> dict[str, tuple]:
        """Return the settings that a resumed run changes: name to old and new value."""
        folder = self.config.resume
        stored = upgraded(stored_settings(folder), f"{folder}: that run")
        asked = json.loads(json.dumps(flatten(self.config)))
        # a run that began before there was a setting had its default
        defaults = json.loads(json.dumps(flatten(type(self.config)())))
        changed = {}
        for name, new in asked.items():
            old = stored.get(name, defaults[name])
            if name not in WHERE and old != new:
                changed[name] = (old, new)
        return changed

    def check_resume(self) -> None:
        """Say what a resumed run changes; ValueError for settings that a checkpoint fixes."""
        newest = whole_checkpoints(Path(self.config.resume))[-1:]
        for checkpoint in newest:
            try:
                checkpoints.check_sizes(checkpoint)
            except checkpoints.DamagedError as error:
                raise advise(Path(self.config.resume), error, checkpoint) from error
        for name, (old, new) in self.changes().items():
            reason = FIXED_AT_START.get(name)
            if (old == 0) != (new == 0):
                reason = reason or FIXED_IF_ZERO.get(name)
            if reason:
                raise ValueError(
                    f"--resume {self.config.resume}: that run has {name}={old!r}, this one asks "
                    f"for {new!r}; {reason}: leave it, or start a new run"
                )
            print(f"resumed with {name}={new!r}, which was {old!r} until here")

    def check_data(self, **data) -> dict:
        """Note fingerprints of the data, and return those that the run began with.

        Raises ValueError if the data that the run trains on are not those that it began with. A run
        of an earlier version has no fingerprints, and any data are taken for its own.

        Args:
            data: by name; `training` is that of the data that the run trains on.
        """
        self.data = on_first(lambda: self.stored_data(list(data))) or data
        if self.data["training"] != data["training"]:
            raise ValueError(
                f"--resume {self.config.resume}: {self.config.data} has other rows than when the "
                f"run began, or the same in another order; {OF_THE_DATA}: put them back, or start "
                "a new run"
            )
        return self.data

    def stored_data(self, names: list[str]) -> dict | None:
        """Return the fingerprints that a resumed run began with, if it has any: one of each name."""
        path = Path(self.config.resume or "", DATA_FILE)
        if not self.config.resume or not path.exists():
            return None
        stored = read_json(path, "fingerprints of the data")
        need_keys([stored], path, names)
        return stored

    def begin(self, state: dict) -> None:
        """Make the folder, or go on in it: load the newest checkpoint into `state`.

        state["progress"] is a dict with the `step`; the other values have state_dict() and
        load_state_dict(). metrics.jsonl is cut back to the step of the checkpoint.
        """
        self.folder = on_first(self.claim_folder)
        newest = on_first(lambda: next(reversed(whole_checkpoints(self.folder)), None))
        note_how_to_go_on(f"go on with --resume {self.folder}")
        if newest:
            check_checkpoint(self.folder, newest)
        on_first(lambda: self.prepare_folder(newest))
        if newest:
            check_parts(state, newest)
            checkpoints.load(state, newest, **self.checkpoint_options)
            self.saved_step = step_of(newest)
        kind = self.config.run.track if is_first() else "none"
        self.tracker = Tracker(kind, self.folder, asdict(self.config))

    def prepare_folder(self, newest: Path | None) -> None:
        """Make the folder, or clear it of what a dead run left after its newest checkpoint."""
        config_file = self.folder / "config.json"
        if not self.config.resume:
            write_json(config_file, asdict(self.config), must_be_new=True)
        for unfinished in (self.folder / "checkpoints").glob(f"*{files.UNFINISHED}"):
            shutil.rmtree(unfinished)
        step = step_of(newest) if newest else 0
        data_file = self.folder / DATA_FILE
        if self.data and not newest and not data_file.exists():
            write_json(data_file, self.data)
        self.cut_metrics(step)
        self.cut_rollouts(step)
        if self.config.resume and self.changes():
            until_here = self.folder / f"config-until-step-{step}.json"
            if not until_here.exists():
                shutil.copy(config_file, until_here)
            write_json(config_file, asdict(self.config))

    def cut_metrics(self, last_step: int) -> None:
        """Drop the lines of metrics.jsonl after a step, and an incomplete last line."""
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return
        kept = []
        for metrics in read_lines(path):
            if metrics["step"] <= last_step:
                kept.append(json.dumps(metrics) + "\n")
        with written_whole(path) as temporary:
            temporary.write_text("".join(kept))

    def cut_rollouts(self, last_step: int) -> None:
        """Remove the rollouts of steps after a step."""
        for step, path in record.find_files(self.folder).items():
            if step > last_step:
                path.unlink()

    def write_json(self, name: str, value: dict) -> None:
        """Write a file of the folder, whole or not at all, on the first rank."""
        if is_first():
            write_json(self.folder / name, value)

    # ---- Checkpoints
    def save(self, state: dict, keep_all: bool = False) -> None:
        """Copy the state to host memory, then write it to checkpoints/step-N in the background.

        Older checkpoints go, but for the newest `keep`, unless keep_all is set.
        """
        self.wait_for_save()
        step = state["progress"]["step"]
        if step == self.saved_step:
            return
        self.check_weights(
            step, [part.module for part in state.values() if hasattr(part, "module")]
        )
        self.saved_step = step
        folder = self.folder / "checkpoints" / f"step-{step}"
        writing = folder.with_name(f"{folder.name}{files.UNFINISHED}")
        written = dcp.async_save(state, checkpoint_id=writing, **self.checkpoint_options)
        self.saving = self.saver.submit(self.publish, written, writing, folder, keep_all)

    def check_weights(self, step: int, modules: Iterable[torch.nn.Module]) -> None:
        """Raise FloatingPointError if a weight is not finite; all ranks together."""
        broken = [name for module in modules for name in parallel.not_finite(module)]
        if broken:
            self.wait_for_save()
            raise FloatingPointError(
                f"the weights after step {step} are not finite ({broken[0]}, {len(broken)} "
                f"tensors) and are not written. {self.last_checkpoint()}"
            )

    def last_checkpoint(self) -> str:
        """Return a text that names the last checkpoint, for an error of the figures or weights."""
        found = whole_checkpoints(self.folder) or ["none"]
        return (
            f"Last checkpoint: {found[-1]}; look at the data, or start anew with a lower learning "
            "rate"
        )

    def publish(self, written: Future, writing: Path, folder: Path, keep_all: bool) -> None:
        """Give a checkpoint its name once all ranks have written, and remove outdated ones."""
        try:
            written.result()  # on the first rank: once all ranks have written
            if is_first():
                writing.rename(folder)
                outdated_ones = whole_checkpoints(self.folder)[: -self.config.run.keep]
                for old in [] if keep_all else outdated_ones:
                    outdated = old.rename(old.with_name(f"{old.name}{files.UNFINISHED}"))
                    shutil.rmtree(outdated)  # a checkpoint is never half there under its name
        except BaseException as error:  # the checkpoint library's own error is no Exception
            shutil.rmtree(writing, ignore_errors=True)
            raise cannot_write(folder, error) from error

    def wait_for_save(self) -> None:
        """Wait until the last checkpoint is in its place; raise the error that kept it out."""
        if self.saving:
            self.saving.result()

    def end(self, state: dict, total_steps: int, report: Callable[[Path], None]) -> bool:
        """Wait for the last checkpoint; return whether the run is complete.

        report: writes the page of curves into the run's folder

        The last step is saved if save_every is set. It is saved in any case if a signal stopped the
        run, which is then not complete. Once it is saved, a signal need not wait for what follows.
        """
        step = state["progress"]["step"]
        is_complete = step >= total_steps and not asked_to_stop()
        if self.config.run.save_every or not is_complete:
            self.save(state)
        if step:
            report(self.folder)
        self.wait_for_save()
        if not is_complete and is_first():
            print(f"stopped after step {step} of {total_steps}; go on with --resume {self.folder}")
        self.tracker.close()
        if not is_complete:
            folders.release(self.folder)
        elif self.saved_step == step:
            end_work()
        return is_complete

    def release(self) -> None:
        """Let others use the folder: all results are written."""
        folders.release(self.folder)

    # ---- Exports for other programs
    def is_export_due(self, step: int) -> bool:
        """Return whether --export-every asks for an export after a step."""
        every = self.config.run.export_every
        return bool(every) and step > 0 and step % every == 0

    def lacks_export(self, step: int) -> bool:
        """Return whether the export after a step is due and not there: a kill cut it off."""
        return self.is_export_due(step) and not on_first(self.export_folder(step).exists)

    def export_folder(self, step: int) -> Path:
        """Return the folder for what is exported after a step."""
        return self.folder / "exports" / f"step-{step}"

    def export(self, step: int, write: Callable[[Path], None]) -> None:
        """Make exports/step-N by write(folder), whole or not at all; all ranks together."""
        folder = self.export_folder(step)
        unfinished = folder.with_name(f"{folder.name}{files.UNFINISHED}")
        on_first(lambda: files.remove(unfinished))  # what a kill left
        write(unfinished)
        on_first(lambda: files.put_in_place(unfinished, folder))

    # ---- Figures
    def log(self, step: int, metrics: dict[str, float], state: dict) -> None:
        """Append a line to metrics.jsonl and the tracker; a figure that is not finite is null there.

        Such a figure is warned of, and the run goes on. Raises FloatingPointError where a loss or
        the norm of a gradient is not finite. An optimiser step with such a gradient has changed no
        weight. `state` is saved first, beside the checkpoints that are there.
        """
        if self.saving and self.saving.done():
            self.wait_for_save()
        broken = [name for name, value in metrics.items() if not math.isfinite(value)]
        if is_first():
            known = {name: None if name in broken else value for name, value in metrics.items()}
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"step": step, **known}) + "\n")
            if broken:
                tqdm.write(f"step {step}: {', '.join(broken)} not finite")
        self.tracker.log(metrics, step)
        if any(name.endswith(("loss", "grad_norm")) for name in broken):
            self.save(state, keep_all=True)
            self.wait_for_save()
            raise FloatingPointError(
                f"step {step}: {', '.join(broken)} not finite; figures: {metrics}. "
                f"{self.last_checkpoint()}"
            )

    def log_rollouts(self, step: int, records: list[dict]) -> None:
        """Write the records of a step's rollouts, and send the tracker a table; on one rank."""
        with written_whole(self.folder / record.FOLDER / f"step-{step}.jsonl") as temporary:
            compact = (",", ":")  # a tenth smaller than with spaces
            lines = []
            for one in records:
                lines.append(json.dumps({"step": step, **one}, separators=compact) + "\n")
            temporary.write_text("".join(lines))
        self.tracker.log_rollouts(*record.summary_rows(records), step)


class Stopwatch:
    """Seconds of the phases of a step, laps of one clock: they add up to time/step.

    `peaks` holds the size of all tensors on the GPU at its largest in each phase, in bytes.
    """

    def __init__(self):
        parallel.take_peak_memory()
        self.began = self.last = time.perf_counter()
        self.cpu_began = time.process_time()
        self.phases: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self.used_in_roll_out = 0

    def note_memory(self) -> None:
        """Note all that is in use of the GPU's memory at the end of a rollout, by the engine, too."""
        free, total = parallel.memory_of_device()
        self.used_in_roll_out = total - free

    def lap(self, phase: str) -> None:
        """End a phase, which began where the last one ended, when the GPU has done its work."""
        self.peaks[phase] = parallel.take_peak_memory()
        now = time.perf_counter()
        self.phases[phase] = now - self.last
        self.last = now

    def seconds(self) -> float:
        """Return the seconds of all phases together."""
        return self.last - self.began

    def metrics(self, held_by_engine: int) -> dict[str, float]:
        """Return the seconds of each phase and of the whole step, and a GPU's memory in GB.

        time/cpu is what all threads of this process had of the processor together.
        While a step scores and updates, its peaks are the trainer's tensors: the engine sleeps
        then, but torch counts what it holds.
        """
        metrics = {f"time/{phase}": seconds for phase, seconds in self.phases.items()}
        metrics["time/step"] = self.seconds()
        metrics["time/cpu"] = time.process_time() - self.cpu_began
        if parallel.DEVICE.type != "cpu":
            metrics["memory/roll_out_gb"] = self.used_in_roll_out / 1e9
            for phase in ("score", "update"):
                metrics[f"memory/{phase}_gb"] = (self.peaks[phase] - held_by_engine) / 1e9
        return metrics
