"""Does the flow reward help? Arms that differ in one thing, on the same seeds, with controls.

    python study/study.py --jobs 15 --json runs/study.json      all arms, seeds 0 to 7
    python study/study.py --arms rlvr calibrated --seeds 2          some of them
    python study/study.py --collect --json runs/study.json      the figures of unfinished runs
    python study/study.py --merge other.json --json runs/study.json
    python study/evidence.py                                        tables and figures

Settings are chosen on seeds from 100 on, which the tables leave out, with arms whose settings are
changed: --first-seed 100 --arms rlvr calibrated:dense_coef=0.1,flow_lr=1e-4 --json study/tuning.json.

Every run is a process of its own, with one thread and no GPU:

    FOLDER/prepared/     evaluation problems; flows and the supervised policy, which runs share
    FOLDER/ARM/seed-N/   the run: config.json, metrics.jsonl, summary.json
    FOLDER/ARM/seed-N.json, .log    its settings and status; what it printed

A run that is finished is skipped, one that was interrupted goes on where it was, one that failed is
tried again. The JSON file is written after each run; what it holds of other runs stays.
"""

from repository import ROOT

# isort: split
import fcntl
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO

import torch
import transformers
import tyro
from tqdm import tqdm

import train_rl
from infra.files import remove, write_json, written_whole
from infra.kinds import as_tuple
from infra.metrics import read_metrics
from infra.ranges import NonNegativeInt, PositiveInt, check_values
from infra.settings import flatten
from worlds import toy

# Figures of a step that the JSON file keeps, besides those of the flow
SERIES = ("correct", "reward", "length", "entropy", "truncated", "varied_groups")
N_DIGITS = 4  # of each, after the point
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

# ---- Arms. In settings, {flow} stands for the path of what was prepared under that name.
FLOW_EPOCHS = 4  # of the offline start; the world's own default became three times as many
FLOW = {"flow": "{flow}"}
RLVR = {"shaping": "none"}
# Whoever learns from the expert solutions leaves out those that the calibration is on
SFT = ("study/sft.py", "--expert-solutions", "{solutions}", "--held-out", "{n_held_out}")


@dataclass(frozen=True)
class Arm:
    """A way to train: what it asks, and its settings of train_rl.py."""

    asks: str
    file: str  # of settings, in study/arms/, which --config of train_rl.py takes as well
    prepared: dict[str, object] = field(default_factory=dict)  # settings with what was prepared
    script: tuple[str, ...] = ("train_rl.py",)  # with its first arguments
    beside: str | None = None  # the arm that it is a control or a variant of; None: a method itself

    @property
    def settings(self) -> dict[str, object]:
        """All settings of the arm, by flag name."""
        text = (ROOT / "study" / "arms" / f"{self.file}.json").read_text()
        # its files of rewards are found from any folder
        own = json.loads(text.replace("study/rewards/", "{rewards}/"))
        return {**{name: as_tuple(value) for name, value in own.items()}, **self.prepared}


ARMS = {
    "rlvr": Arm("What does the outcome alone achieve?", "rlvr"),
    "entropy": Arm("Does the entropy advantage help?", "entropy"),
    "published": Arm("Does the flow reward help as published?", "published", FLOW),
    "calibrated": Arm(
        "Does it help as a response's excess over the flow's values on expert tokens?",
        "calibrated",
        FLOW,
    ),
    "process": Arm(
        "What would a perfect dense reward achieve? The share of right steps, the ceiling.",
        "process",
    ),
    "sft": Arm(
        "What do the expert solutions achieve as mere training data? As many solutions a step as "
        "others have episodes.",
        "rlvr",
        script=SFT,
        beside="calibrated",
    ),
    "sft-rlvr": Arm(
        "And what does the outcome achieve after that?",
        "rlvr",
        {"model": "{sft}"},
        beside="calibrated",
    ),
    "published-shuffled": Arm(
        "Does it matter which tokens of a response the published scores fall on?",
        "published-shuffled",
        FLOW,
        beside="published",
    ),
    "calibrated-shuffled": Arm(
        "Does it matter which response of a step a mean excess belongs to?",
        "calibrated-shuffled",
        FLOW,
        beside="calibrated",
    ),
    "calibrated-token-shuffled": Arm(
        "Does it matter which tokens of a response an excess falls on?",
        "calibrated-token-shuffled",
        FLOW,
        beside="calibrated-token",
    ),
    "published-untrained": Arm(
        "Does the published reward need a flow that has learnt?",
        "published-frozen",
        {"flow": "{untrained_flow}"},
        beside="published",
    ),
    "untrained": Arm(
        "Does the calibrated reward need a flow that has learnt? The calibration is on the same "
        "expert tokens.",
        "calibrated",
        {"flow": "{untrained_flow}"},
        beside="calibrated",
    ),
    "hasty-flow": Arm(
        "Does it need expert solutions? The flow is fitted to wrong responses of the base model.",
        "calibrated",
        {"flow": "{hasty_flow}"},
        beside="calibrated",
    ),
    "length": Arm("Is it a reward for length?", "length", beside="calibrated"),
    "logprob": Arm(
        "Would the expert's own likelihood do? The excess is that of -log p under the supervised "
        "policy, calibrated on the same expert tokens.",
        "logprob",
        {"dense": ("expert={sft}", "experts={solutions}", "held_out={n_held_out}")},
        beside="calibrated",
    ),
    "calibrated-online": Arm(
        "Does it help to update the flow online?", "calibrated-online", FLOW, beside="calibrated"
    ),
    "calibrated-token": Arm(
        "Does it help to say where in a response the excess is?",
        "calibrated-token",
        FLOW,
        beside="calibrated",
    ),
    "calibrated-standardised": Arm(
        "Does it help to standardise latents?",
        "calibrated",
        {"flow": "{standardised_flow}"},
        beside="calibrated",
    ),
}


# ---- What several runs share
@dataclass(frozen=True)
class Preparation:
    """Something that is made once, before the runs that need it."""

    script: tuple[str, ...]  # with its first arguments
    settings: dict[str, object]
    product: str  # what {NAME} stands for, in its folder
    preset: str | None = None  # script whose settings for the world it takes, too


OFFLINE = {"data": "{solutions}", "held_out": "{n_held_out}", "calibrate_at": (0.2, 0.5, 0.8)}
PREPARATIONS = {
    "flow": Preparation(("train_flow.py",), OFFLINE, "flow", "train_flow"),
    "standardised_flow": Preparation(
        ("train_flow.py",), {**OFFLINE, "standardise": True}, "flow", "train_flow"
    ),
    "hasty_solutions": Preparation(
        ("study/hasty.py",),
        {"model": "{base}", "data": "{problems}", "like": "{solutions}"},
        "solutions.jsonl",
    ),
    "hasty_flow": Preparation(
        ("train_flow.py",), {**OFFLINE, "data": "{hasty_solutions}"}, "flow", "train_flow"
    ),
    # at such a rate no weight changes, and the calibration is the same
    "untrained_flow": Preparation(
        ("train_flow.py",), {**OFFLINE, "lr": 1e-30, "epochs": 1}, "flow", "train_flow"
    ),
    "sft": Preparation(SFT, RLVR, "policy", "train_rl"),
}


# ---- Settings of a study
@dataclass(frozen=True)
class Study:
    """Run arms on seeds, several runs side by side, and collect their figures."""

    world: str = "toy-sparse"  # Name of an embedded world, or a folder that holds one
    arms: tuple[str, ...] = tuple(ARMS)  # NAME, or NAME:SETTING=VALUE,SETTING=VALUE
    seeds: PositiveInt = 8  # Runs of each arm
    first_seed: NonNegativeInt = 0  # Seed of the first one
    steps: PositiveInt = 100  # RL steps of each run
    jobs: PositiveInt = 2  # Runs side by side, each on one core
    folder: str = "runs/study"  # Where runs are
    json: str | None = None  # File for the figures; by default FOLDER/study.json
    # Held-out problems for the evaluation before and after each run
    eval_problems: PositiveInt = 64
    held_out: PositiveInt = 64  # Expert solutions for calibration, on which nothing is fitted
    collect: bool = False  # Run nothing: collect the figures of the runs in the folder
    merge: tuple[str, ...] = ()  # Run nothing: add the figures of these files, of other machines

    @property
    def json_file(self) -> Path:
        """The file for the figures."""
        return Path(self.json or f"{self.folder}/study.json")


def find_arm(text: str) -> Arm:
    """Return the arm that a text names, with the settings that it changes; ValueError if unknown."""
    name, _, changes = text.partition(":")
    if name not in ARMS:
        raise ValueError(f"arm {text!r}: {name!r} is unknown; expected one of {', '.join(ARMS)}")
    arm = ARMS[name]
    changed = {}
    for change in filter(None, changes.split(",")):
        key, _, value = change.partition("=")
        changed[key] = {"True": True, "False": False}.get(value, value)
    unknown = sorted(changed.keys() - flatten(train_rl.Config()).keys())
    if unknown:
        raise ValueError(f"arm {text!r}: {unknown} are no settings of train_rl.py")
    return replace(arm, prepared={**arm.prepared, **changed})


def find_world(name: str) -> toy.World:
    """Return the world of a name, made if need be, or that of a folder."""
    world = toy.find_world(name)
    if world:
        return world
    if not Path(name, "world.json").exists():
        known = ", ".join(toy.WORLDS)
        raise ValueError(f"world {name!r}: neither {known} nor a folder that holds a world")
    return toy.World(name)


def preset(script: str | None, study: Study) -> dict[str, object]:
    """Return the settings that all runs of a script have in a study."""
    if script is None:
        return {}
    presets = toy.PRESETS[script]
    settings = dict(presets.get(study.world, presets["toy-sparse"]))
    settings.update(model="{base}", save_every=25, keep=1)
    if script == "train_flow":
        settings.update(epochs=FLOW_EPOCHS, flow_blocks=2)
    if script == "train_rl":
        settings.update(
            tokens_per_gpu=4096,  # smaller micro-batches are faster on a CPU
            data="{problems}",
            eval_data=("{evaluation}",),
            eval_samples=1,
            engine="torch",
            steps=study.steps,
        )
    return settings


# ---- Jobs: a process each
@dataclass(frozen=True)
class Job:
    """A run or a preparation: a process, its folder, and beside it a record and a log."""

    name: str  # of a preparation, or ARM/seed-N
    folder: Path
    script: tuple[str, ...]
    settings: dict[str, object]
    product: str  # in the folder; when it is there, the process had come to its end
    outdated: tuple[str, ...]  # what is removed from the folder then
    label: dict[str, object]  # arm and seed of a run; empty for a preparation

    @property
    def record_file(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.json")

    @property
    def log_file(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    def record(self) -> dict:
        """Return what is known of the job, an empty dict if it has never begun."""
        if not self.record_file.exists():
            return {}
        return json.loads(self.record_file.read_text())

    def check(self) -> None:
        """Raise ValueError if the folder holds a job with other settings."""
        stored = self.record()
        asked = json.loads(json.dumps({"script": self.script, "settings": self.settings}))
        for key, value in asked.items():
            if stored and stored[key] != value:
                raise ValueError(
                    f"{self.folder} was run with {key} {stored[key]}, this study asks for {value}; "
                    "name another --folder, or remove that run"
                )

    def write_record(self, status: str, error: str = "") -> None:
        """Write settings and status, finished, failed or unfinished, beside the folder."""
        record = {
            **self.label,
            "status": status,
            "error": error,
            "script": self.script,
            "settings": self.settings,
            "versions": versions(),
        }
        write_json(self.record_file, record)

    @property
    def words(self) -> list[str]:
        """The command, without what its placeholders stand for."""
        return [*self.script, *to_flags(self.settings)]

    @property
    def needs(self) -> list[str]:
        """Names of the preparations that the command has a placeholder for."""
        return [name for name in PREPARATIONS if f"{{{name}}}" in " ".join(self.words)]

    def command(self, paths: dict[str, str]) -> list[str]:
        """Return the command that begins the job, or goes on with it."""
        script, *arguments = [word.format(**paths) for word in self.words]
        has_begun = (self.folder / "config.json").exists()
        where = ["--resume" if has_begun else "--folder", str(self.folder)]
        return [sys.executable, str(ROOT / script), *arguments, *where]

    def finish(self) -> None:
        """Note that the job is done, and remove what nobody needs any more."""
        self.write_record("finished")
        for name in self.outdated:
            remove(self.folder / name)


def to_flags(settings: dict[str, object]) -> list[str]:
    """Return settings as command-line flags."""
    flags = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, tuple):
            flags += [f"--{flag}", *map(str, value)]
        else:
            flags += [f"--{flag}", str(value)]
    return flags


def versions() -> str:
    """Name the software that figures may depend on."""
    return (
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}"
    )


def make_preparation(name: str, study: Study) -> Job:
    """Return the job that makes what runs share under a name."""
    preparation = PREPARATIONS[name]
    return Job(
        name=name,
        folder=Path(study.folder, "prepared", name),
        script=preparation.script,
        settings={**preset(preparation.preset, study), **preparation.settings},
        product=preparation.product,
        outdated=("checkpoints",),
        label={},
    )


def make_run(name: str, seed: int, study: Study) -> Job:
    """Return the job of an arm and a seed."""
    arm = find_arm(name)
    return Job(
        name=f"{name}/seed-{seed}",
        folder=Path(study.folder, name.replace(":", "-"), f"seed-{seed}"),
        script=arm.script,
        settings={**preset("train_rl", study), **arm.settings, "seed": seed},
        product="policy",
        outdated=("checkpoints", "policy", "flow"),
        label={"arm": name, "seed": seed},
    )


def plan(study: Study) -> tuple[list[Job], list[Job]]:
    """Return the runs of a study and what they need to have prepared, in a possible order."""
    seeds = range(study.first_seed, study.first_seed + study.seeds)
    # all arms of a seed together: a study that is cut short has whole pairs
    runs = [make_run(arm, seed, study) for seed in seeds for arm in study.arms]
    preparations: dict[str, Job] = {}

    def add_needs(job: Job) -> None:
        for name in job.needs:
            preparation = make_preparation(name, study)
            add_needs(preparation)
            preparations[name] = preparation

    for run in runs:
        add_needs(run)
    return list(preparations.values()), runs


def find_paths(study: Study, world: toy.World) -> dict[str, str]:
    """Return what the placeholders in settings stand for."""
    prepared = Path(study.folder, "prepared")
    paths = {
        "base": world.path("model"),
        "problems": world.path("train.jsonl"),
        "solutions": world.path("expert.jsonl"),
        "evaluation": str(prepared / "evaluation.jsonl"),
        "rewards": str(ROOT / "study" / "rewards"),
        "n_held_out": str(study.held_out),
    }
    for name, preparation in PREPARATIONS.items():
        paths[name] = str(prepared / name / preparation.product)
    return paths


# ---- Running them
class Processes:
    """The processes of a study, which the first SIGINT or SIGTERM lets finish their steps."""

    def __init__(self):
        self.running: set[subprocess.Popen] = set()
        self.is_stopping = False

    def __enter__(self) -> "Processes":
        self.previous = [signal.signal(number, self.stop) for number in STOP_SIGNALS]
        return self

    def __exit__(self, *_):
        for number, handler in zip(STOP_SIGNALS, self.previous, strict=True):
            signal.signal(number, handler)

    def stop(self, number: int, _frame) -> None:
        """Start nothing more, and send the signal on; a process saves its run at the first one."""
        self.is_stopping = True
        for process in list(self.running):
            process.send_signal(signal.SIGTERM)
        tqdm.write(f"{signal.Signals(number).name}: saving the runs; the same command goes on")

    def call(self, command: list[str], log_file: Path, lock: IO) -> int:
        """Run a command to its end and return its exit code; its output goes to the log.

        It inherits the lock, which is so held as long as it lives, even if this process is killed.
        """
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",  # everything is here
        }
        with open(log_file, "a") as log:
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=(lock.fileno(),),
                start_new_session=True,  # a Ctrl-C reaches it through stop() alone
            )
        self.running.add(process)
        if self.is_stopping:  # since it was about to start
            process.send_signal(signal.SIGTERM)
        code = process.wait()
        self.running.discard(process)
        return code


@contextmanager
def locked(path: Path) -> Iterator[IO]:
    """Hold a lock on a file that processes can inherit, once all that hold it are gone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def run_job(job: Job, paths: dict[str, str], needed: Sequence[Future], processes: Processes) -> str:
    """Run a job unless it is finished, after those that it needs; return its status."""
    missing = []
    for name, future in zip(job.needs, needed, strict=True):
        if future.result() != "finished":
            missing.append(name)
    with locked(job.log_file) as lock:
        status = job.record().get("status", "unfinished")
        if status == "finished" or processes.is_stopping:
            return status
        if missing:
            job.write_record("failed", f"without {', '.join(missing)}, not prepared")
            return "failed"
        job.write_record("unfinished")
        code = processes.call(job.command(paths), job.log_file, lock)
        if code == 0 and (job.folder / job.product).exists():
            job.finish()
        elif code != 0 and not processes.is_stopping:
            job.write_record("failed", last_line(job.log_file) or f"exit code {code}")
        return job.record()["status"]


def last_line(file: Path) -> str:
    """Return the last line of a log that says something."""
    lines = file.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def run_all(
    jobs: Sequence[Job], n_at_once: int, paths: dict[str, str], after_each: Callable[[], None]
) -> dict[str, str]:
    """Run jobs, those that others need before them; return each one's status by its name."""
    futures: dict[str, Future] = {}
    statuses: dict[str, str] = {}
    with Processes() as processes, ThreadPoolExecutor(n_at_once) as pool:
        for job in jobs:
            needed = [futures[name] for name in job.needs]
            futures[job.name] = pool.submit(run_job, job, paths, needed, processes)
        names = {future: name for name, future in futures.items()}
        bar = tqdm(as_completed(names), total=len(names), desc="study", unit="run")
        for future in bar:
            statuses[names[future]] = future.result()
            tqdm.write(f"{statuses[names[future]]}: {names[future]}")
            after_each()
    return statuses


# ---- Figures: what is equal for all runs, and a record of each
def describe(study: Study, world: toy.World) -> dict:
    """Return what all runs of a study have in common; figures of others are not compared."""
    weights = Path(world.path("model"), "model.safetensors").read_bytes()
    common = {
        "world": json.loads(Path(world.path("world.json")).read_text()),
        "base": hashlib.sha256(weights).hexdigest()[:16],
        "settings": preset("train_rl", study),
        "flow": preset("train_flow", study),
        "eval_problems": study.eval_problems,
        "held_out": study.held_out,
    }
    return json.loads(json.dumps(common))


def begin(study: Study, world: toy.World) -> None:
    """Make the folder, or check that it is of the same study; ValueError if it is not."""
    file = Path(study.folder, "common.json")
    common = describe(study, world)
    if file.exists():
        check_equal(json.loads(file.read_text()), common, str(file))
        return
    problems = Path(world.path("test.jsonl")).read_text().splitlines(keepends=True)
    evaluation = Path(study.folder, "prepared", "evaluation.jsonl")
    with written_whole(evaluation) as temporary:
        temporary.write_text("".join(problems[: study.eval_problems]))
    write_json(file, common)


def check_equal(stored: dict, asked: dict, name: str) -> None:
    """Raise ValueError if runs of two studies are not comparable."""
    for key in asked:
        if stored.get(key) != asked[key]:
            raise ValueError(
                f"{name} has {key}={stored.get(key)}, expected {asked[key]}: their runs are not "
                "comparable; name another --folder or --json"
            )


def collect(folder: str) -> dict:
    """Return the figures of all runs in a study's folder, finished or not."""
    common = Path(folder, "common.json")
    if not common.exists():
        raise ValueError(f"{folder} holds no study; expected the --folder of one")
    runs = []
    for record_file in Path(folder).glob("*/seed-*.json"):
        runs.append(read_run(record_file))
    return {**json.loads(common.read_text()), "runs": in_order(runs)}


def read_run(record_file: Path) -> dict:
    """Return the figures of a run: what the study noted of it, and its series."""
    record = json.loads(record_file.read_text())
    folder = record_file.with_suffix("")
    steps = read_steps(folder / "metrics.jsonl")
    kept = ("arm", "seed", "status", "error", "settings", "script", "versions")
    run = {key: record[key] for key in kept}
    run["seconds"] = round(sum(step["time/step"] for step in steps))
    run["series"] = read_series(steps)
    run["held_out"] = read_evaluations(folder / "summary.json")
    return run


def read_steps(file: Path) -> list[dict[str, float]]:
    """Return the figures of each step that a run has logged so far, without those not finite."""
    return read_metrics(file) if file.exists() else []


def read_series(steps: Sequence[dict]) -> dict[str, list[float | None]]:
    """Return the figures of steps that are kept, by name, rounded; None where a step has none.

    A step without right answers, for instance, has no flow reward of right ones, and a figure that
    was not finite is none.
    """
    names = dict.fromkeys(name for step in steps for name in step)
    series: dict[str, list[float | None]] = {}
    for name in names:
        if name in SERIES or name.startswith("flow/"):
            values = [step.get(name) for step in steps]
            series[name] = [None if value is None else round(value, N_DIGITS) for value in values]
    return series


def read_evaluations(file: Path) -> dict[str, dict[str, float]]:
    """Return the accuracies on held-out problems, before and after, sampled and greedy."""
    accuracies: dict[str, dict[str, float]] = {}
    summary = json.loads(file.read_text()) if file.exists() else {}
    for when, sets in summary.items():
        (kinds,) = sets.values()
        accuracies[when] = {
            kind: round(row["avg"]["mean"], N_DIGITS) for kind, row in kinds.items()
        }
    return accuracies


# ---- The file of figures
def in_order(runs: Sequence[dict]) -> list[dict]:
    """Sort runs by arm, in the order of ARMS, and by seed."""
    places = {name: place for place, name in enumerate(ARMS)}

    def key(run: dict) -> tuple:
        name = run["arm"].partition(":")[0]
        return places.get(name, len(places)), run["arm"], run["seed"]

    return sorted(runs, key=key)


def merge(studies: Sequence[dict]) -> dict:
    """Put the runs of several studies together; ValueError if they are not comparable.

    Of a run that is in several of them, the one that came furthest stays, or the first of equals.
    """
    common = {key: value for key, value in studies[0].items() if key != "runs"}
    runs: dict[tuple[str, int], dict] = {}
    settings: dict[str, dict] = {}
    for study in studies:
        check_equal(study, common, "a study to be merged")
        for run in study["runs"]:
            key = (run["arm"], run["seed"])
            expected = settings.setdefault(run["arm"], without_seed(run))
            if without_seed(run) != expected:
                raise ValueError(
                    f"runs of {run['arm']} differ in settings, {without_seed(run)} and {expected}: "
                    "they are not comparable; leave one file out"
                )
            if key not in runs or progress(run) > progress(runs[key]):
                runs[key] = run
    return {**common, "runs": in_order(list(runs.values()))}


def without_seed(run: dict) -> dict:
    """Return the settings that all runs of an arm share."""
    settings = {name: value for name, value in run["settings"].items() if name != "seed"}
    return {"script": run["script"], **settings}


def progress(run: dict) -> tuple[bool, int]:
    """Return how far a run came."""
    return run["status"] == "finished", len(run["series"].get("correct", ()))


def read_study(file: str | Path) -> dict:
    """Read a file of figures; ValueError if it is none."""
    study = json.loads(Path(file).read_text())
    if "runs" not in study:
        raise ValueError(f"{file} holds no runs; expected a file that study/study.py wrote")
    return study


def write_study(file: Path, study: dict) -> None:
    """Write a file of figures, a run a line."""
    head = [
        f"{json.dumps(key)}: {json.dumps(value)},\n"
        for key, value in study.items()
        if key != "runs"
    ]
    runs = ",\n".join(json.dumps(run, separators=(",", ":")) for run in study["runs"])
    with written_whole(file) as temporary:
        temporary.write_text("{\n" + "".join(head) + '"runs": [\n' + runs + "\n]}\n")


def update_file(file: Path, folder: str) -> None:
    """Put the figures of the runs in a study's folder into a file; what else it holds stays."""
    studies = [collect(folder)]
    if file.exists():
        studies.append(read_study(file))
    write_study(file, merge(studies))


# ---- The command
def report(statuses: dict[str, str], study: Study) -> int:
    """Say what failed or was stopped; return the exit code, 0 if all is finished."""
    counts = Counter(statuses.values())
    said = ", ".join(f"{count} {status}" for status, count in counts.items())
    print(f"{said}; the figures are in {study.json_file}; next: python study/evidence.py")
    for name, status in statuses.items():
        if status != "finished":
            print(f"{status}: {name}, see its .log in {study.folder}")
    return int(counts["finished"] < len(statuses))


def main(study: Study) -> int:
    """Run a study, or do what it asks in place of that; return the exit code."""
    check_values(study)
    if study.merge:
        files = [study.json_file] if study.json_file.exists() else []
        write_study(study.json_file, merge([read_study(file) for file in [*files, *study.merge]]))
        return 0
    if study.collect:
        update_file(study.json_file, study.folder)
        return 0
    preparations, runs = plan(study)
    jobs = [*preparations, *runs]
    for job in jobs:
        job.check()
    world = find_world(study.world)
    begin(study, world)
    paths = find_paths(study, world)
    after_each = partial(update_file, study.json_file, study.folder)
    return report(run_all(jobs, study.jobs, paths, after_each), study)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Study)))
