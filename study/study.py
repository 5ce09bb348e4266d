"""Does a dense reward help? Arms that differ in one thing, on the same seeds, with controls.

    python study/study.py --reward FILE.py --quick                  a first answer, in minutes
    python study/study.py --reward FILE.py --jobs 15                beside all methods and controls
    python study/study.py --jobs 15 --json runs/study.json          the flow reward: all its arms
    python study/study.py --arms rlvr calibrated --seeds 2          some of them
    python study/study.py --world toy-beyond:n_expert=64 --bases 4 --folder FOLDER    in another world
    python study/study.py --collect --json runs/study.json          the figures of unfinished runs
    python study/study.py --merge other.json --json runs/study.json
    python study/evidence.py --folder runs                          their tables and pictures

A reward is tried for a moment first, and refused if it cannot work (trial.py). methods.py has the
arms, referee.py the page of what came out, FOLDER/verdict.html.

Settings are chosen on seeds from 100 on, which the tables leave out, with arms whose settings are
changed: --first-seed 100 --arms rlvr calibrated:dense_coef=0.1,flow_lr=1e-4 --folder runs/study-tuning.

Every run is a process of its own, with one thread and no GPU:

    FOLDER/registered.json   arms, seeds, tests and exclusions, before the first run of --reward
    FOLDER/chosen.json       with --tune: the settings that were chosen for each arm
    FOLDER/prepared/     evaluation problems; flows and the supervised policy, which runs share; of
                         another base model than the first in base-K/
    FOLDER/ARM/seed-N/   the run: config.json, metrics.jsonl, summary.json
    FOLDER/ARM/seed-N.json, .log    its settings and status; what it printed

A run that is finished is skipped, one that was interrupted goes on where it was, one that failed is
tried again. The JSON file is written after each run; what it holds of other runs stays, and is not run
again.
"""

from repository import ROOT

# isort: split
import ast
import fcntl
import hashlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import IO, Annotated, get_type_hints

import torch
import transformers
import tyro
from tqdm import tqdm

import tuning
import worlds
from figures import (
    FIRST_TUNING_SEED,
    OF_A_JOB,
    OF_ALL,
    OF_THE_PLAN,
    bases_of,
    check_equal,
    extend,
    merge,
    pairs_of,
    read_study,
    update_file,
    without_bases,
    write_study,
)
from infra import errors
from infra.files import need_keys, read_json, remove, write_json, written_whole
from infra.kinds import check_kinds, from_text
from infra.ranges import NonNegativeInt, PositiveInt, check_values
from measures import MOST_FLIPPED
from methods import (
    ARMS,
    FLOW_EPOCHS,
    REWARDS,
    SHARES,
    Arm,
    Catalogue,
    FileReward,
    files_of,
    make_catalogue,
    read_changes,
    read_reward,
    to_flags,
)
from referee import write_verdict
from trial import try_rewards
from tuning import read_chosen
from worlds import toy

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

# ---- Settings of a study
# What a reward is compared with: methods, the ceiling, and rewards that know nothing
METHODS = (
    "rlvr",
    "entropy",
    "published",
    "calibrated",
    "process",
    "sft",
    "sft-rlvr",
    "distillation",
    "length",
    "noise",
)
# The flow reward's own study has none of these
JUDGING = ("distillation", "noise", "default", "luffy", "calibrated-5x", "calibrated-20x")
SIZES = {"seeds": 8, "steps": 100}
QUICK = {"seeds": 4, "steps": 60}
OF_THE_FLOW = "runs/study"


@dataclass(frozen=True)
class Study:
    """Run arms on seeds, several runs side by side, and collect their figures."""

    # Dense rewards to be judged: FILE.py, or FILE.py:SETTING=VALUE,SETTING=VALUE with settings of
    # train_rl.py or of the file; as NAME=FILE.py the arms are called so, see methods.py
    reward: tuple[str, ...] = ()
    # A first answer: the reward, its control, RLVR, a perfect reward; by default 4 seeds of 60 steps
    quick: bool = False
    # Name of an embedded world, NAME:SETTING=VALUE,SETTING=VALUE with settings of worlds.toy.World,
    # or a folder that holds one
    world: str = "toy-sparse"
    # Base models, each of a world with a seed of its own: seed s has base s modulo their number
    bases: PositiveInt = 1
    # First choose settings for each method, among six, on two seeds from 100 on; see tuning.py
    tune: bool = False
    trial_steps: Annotated[int | None, tyro.conf.Suppress] = None  # of runs that choose settings
    # NAME, or NAME:SETTING=VALUE,SETTING=VALUE; by default all, with --reward those that judge it
    arms: tuple[str, ...] | None = None
    seeds: PositiveInt | None = None  # Runs of each arm; by default 8
    first_seed: NonNegativeInt = 0  # Seed of the first one
    steps: PositiveInt | None = None  # RL steps of each run; by default 100
    jobs: PositiveInt = 2  # Runs side by side, each on one core
    folder: str = OF_THE_FLOW  # Where runs are; with --reward runs/judge-NAME
    json: str | None = None  # File for the figures; by default FOLDER/study.json
    # Held-out problems for the evaluation before and after each run
    eval_problems: PositiveInt = 64
    held_out: PositiveInt = 64  # Expert solutions for calibration, on which nothing is fitted
    collect: bool = False  # Run nothing: collect the figures of the runs in the folder
    merge: tuple[str, ...] = ()  # Run nothing: add the figures of these files, of other machines

    @property
    def n_seeds(self) -> int:
        """How many seeds each arm has."""
        return self.seeds or (QUICK if self.quick else SIZES)["seeds"]

    @property
    def n_steps(self) -> int:
        """How many RL steps each run has."""
        return self.steps or (QUICK if self.quick else SIZES)["steps"]

    @property
    def json_file(self) -> Path:
        """The file for the figures."""
        return Path(self.json or f"{self.folder}/study.json")

    @cached_property
    def rewards(self) -> list[FileReward]:
        """The rewards that are judged; ValueError if a file has none."""
        return [read_reward(text) for text in self.reward]

    @cached_property
    def catalogue(self) -> Catalogue:
        """All arms that there are."""
        return make_catalogue(self.rewards)

    @property
    def chosen_arms(self) -> list[str]:
        """The arms that run."""
        if self.arms is not None:
            return list(self.arms)
        if not self.reward:
            return [name for name in ARMS if name not in JUDGING]
        own = [name for name in self.catalogue.arms if name not in ARMS]
        if self.quick:
            first = [(reward.name, reward.shuffled_name(SHARES[-1])) for reward in self.rewards]
            return ["rlvr", *(name for names in first for name in names), "process"]
        return [*METHODS, *own]


def find_worlds(study: Study) -> list[worlds.World]:
    """Return the world of each base, made if need be: the one named, and others of its kind.

    Worlds as they are named are shared by all studies; one with changed settings is the study's own,
    with their base model where only its expert solutions are others. They are made with one thread,
    as each of a run: with another number the weights are others.
    """
    name, _, changes = study.world.partition(":")
    if name not in worlds.WORLDS:
        return [world_of_folder(study)]
    named = read_world(study.world)
    torch.set_num_threads(1)
    found = []
    for base in range(study.bases):
        seed = named.seed + base
        plain = worlds.WORLDS[name]
        folder = f"{plain.folder}-seed-{seed}" if seed else plain.folder
        shared = replace(plain, folder=folder, seed=seed)
        own = replace(named, folder=f"{study.folder}/worlds/{base}", seed=seed)
        if not changes:
            found.append(worlds.make(shared))
        elif name in toy.WORLDS and read_changes(changes).keys() <= toy.OF_EXPERTS:
            found.append(toy.make(own, like=worlds.make(shared)))
        else:
            found.append(worlds.make(own))
    return found


def read_world(text: str) -> worlds.World:
    """Read NAME or NAME:SETTING=VALUE,…; ValueError for what is no setting of a world."""
    name, _, changes = text.partition(":")
    named = worlds.WORLDS[name]
    given = read_changes(changes)
    kinds = get_type_hints(type(named))
    unknown = sorted(given.keys() - kinds.keys() | given.keys() & {"folder"})
    if unknown:
        known = ", ".join(kinds.keys() - {"folder"})
        raise ValueError(f"world {text!r}: {unknown} are no settings of a world; expected {known}")
    values = {setting: from_text(str(value), kinds[setting]) for setting, value in given.items()}
    world = replace(named, **values)
    try:
        check_kinds(world)
        worlds.check(world)
    except ValueError as error:
        raise ValueError(f"world {text!r}: {error}") from error
    return world


def world_of_folder(study: Study) -> worlds.World:
    """Return the world that a folder holds; ValueError if it holds none."""
    folder = study.world
    kind = worlds.kind_of(folder)
    if study.bases > 1:
        raise ValueError(f"bases={study.bases}: the world {folder!r} is a folder, with one base")
    return replace(worlds.WORLDS[kind], folder=folder)


def preset(script: str | None, study: Study) -> dict[str, object]:
    """Return the settings that all runs of a script have in a study."""
    if script is None:
        return {}
    kind = worlds.kind_of(study.world.partition(":")[0])
    settings = dict(worlds.PRESETS[script][kind])
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
            steps=study.n_steps,
        )
    if script == "train_rl" and study.reward:
        # rollouts of the first step, a middle one and the last; pass@4
        settings.update(log_rollouts=max(1, study.n_steps // 2), eval_samples=4)
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
    needs: tuple[str, ...]  # names of the preparations that the command has a placeholder for
    base: int  # which base model it is of
    label: dict[str, object]  # arm, seed and base of a run; empty for a preparation

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
        return read_json(self.record_file, OF_A_JOB)

    def check(self) -> None:
        """Raise ValueError if the folder holds a job with other settings."""
        stored = self.record()
        need_keys([stored] if stored else [], self.record_file, ["script", "settings"])
        asked = json.loads(json.dumps({"script": self.script, "settings": self.settings}))
        for key, value in asked.items():
            if stored and stored[key] != value:
                raise ValueError(
                    f"{self.folder} was run with {key} {stored[key]}, this study asks for {value}; "
                    "name another --folder, or remove that run"
                )

    def write_record(self, status: str, error: str = "", seconds: float = 0) -> None:
        """Write settings and status, finished, failed or unfinished, beside the folder.

        The seconds are those that all its processes so far have had of a core.
        """
        record = {
            **self.label,
            "status": status,
            "error": error,
            "script": self.script,
            "settings": self.settings,
            "needs": self.needs,
            "seconds": self.record().get("seconds", 0) + round(seconds),
            "versions": versions(),
        }
        write_json(self.record_file, record)

    @property
    def words(self) -> list[str]:
        """The command, without what its placeholders stand for."""
        return [*self.script, *to_flags(self.settings)]

    def command(self, paths: Sequence[dict[str, object]]) -> list[str]:
        """Return the command that begins the job, or goes on with it; paths: those of each base."""
        script, *arguments = [word.format(**paths[self.base]) for word in self.words]
        has_begun = (self.folder / "config.json").exists()
        where = ["--resume" if has_begun else "--folder", str(self.folder)]
        return [sys.executable, str(ROOT / script), *arguments, *where]

    def finish(self, seconds: float) -> None:
        """Note that the job is done, and remove what nobody needs any more."""
        self.write_record("finished", seconds=seconds)
        for name in self.outdated:
            remove(self.folder / name)


def versions() -> str:
    """Name the software that figures may depend on."""
    return (
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}"
    )


def make_preparation(name: str, base: int, study: Study) -> Job:
    """Return the job that makes what runs of a base share under a name."""
    preparation = study.catalogue.preparations[name]
    settings = {**preset(preparation.preset, study), **preparation.settings}
    if preparation.preset == "train_flow":
        settings["epochs"] = round(settings["epochs"] * more_passes(study))
    return Job(
        name=job_name(name, base),
        folder=prepared_folder(study, base) / name,
        script=preparation.script,
        settings=settings,
        product=preparation.product,
        outdated=("checkpoints",),
        needs=find_needs(preparation.script, settings, base, study),
        base=base,
        label={},
    )


def more_passes(study: Study) -> float:
    """Return how many times as many passes over few expert solutions are as many optimiser steps.

    Few are those of a world that is named with fewer than it has otherwise.
    """
    name, _, changes = study.world.partition(":")
    if not changes:
        return 1
    return max(1, worlds.WORLDS[name].n_expert / read_world(study.world).n_expert)


def make_run(name: str, seed: int, study: Study) -> Job:
    """Return the job of an arm and a seed, with the settings that the study has chosen for it."""
    arm = find_arm(name, study)
    settings = {**preset("train_rl", study), **arm.settings, "seed": seed}
    if study.trial_steps:
        settings["steps"] = study.trial_steps
    base = seed % study.bases
    return Job(
        name=f"{name}/seed-{seed}",
        folder=folder_of_run(name, seed, study),
        script=arm.script,
        settings=settings,
        product="policy",
        outdated=("checkpoints", "policy", "flow"),
        needs=find_needs(arm.script, settings, base, study),
        base=base,
        label={"arm": name, "seed": seed, "base": base, "beside": arm.beside},
    )


def folder_of_run(arm: str, seed: int, study: Study) -> Path:
    """Return the folder of the run of an arm and a seed."""
    return Path(study.folder, re.sub(r"[:{}]+", "-", arm), f"seed-{seed}")


def find_arm(name: str, study: Study) -> Arm:
    """Return an arm with the settings that the study has chosen for it, or for what it is of."""
    arm = study.catalogue.find(name)
    if ":" in name:
        return arm
    changes = tuning.choice_of(name, study.catalogue, read_chosen(study.folder))
    return study.catalogue.find(tuning.with_changes(name, changes))


def job_name(preparation: str, base: int) -> str:
    """Return the name of the job that makes something for a base."""
    return f"{preparation}@{base}" if base else preparation


def prepared_folder(study: Study, base: int) -> Path:
    """Return where what runs of a base share is."""
    folder = Path(study.folder, "prepared")
    return folder / f"base-{base}" if base else folder


def find_needs(script: Sequence[str], settings: dict, base: int, study: Study) -> tuple[str, ...]:
    """Return the names of the jobs of the preparations that a command has placeholders for."""
    words = " ".join([*script, *to_flags(settings)])
    names = []
    for name in study.catalogue.preparations:
        if f"{{{name}}}" in words or f"{{{name}:" in words:
            names.append(name)
    return tuple(job_name(name, base) for name in names)


def plan(study: Study) -> tuple[list[Job], list[Job]]:
    """Return the runs of a study and what they need to have prepared, in a possible order."""
    seeds = range(study.first_seed, study.first_seed + study.n_seeds)
    # all arms of a seed together: a study that is cut short has whole pairs
    elsewhere = finished_elsewhere(study)
    runs = []
    for seed in seeds:
        for arm in study.chosen_arms:
            if (arm, seed) not in elsewhere:
                runs.append(make_run(arm, seed, study))
    preparations: dict[str, Job] = {}

    def add_needs(job: Job) -> None:
        for needed in job.needs:
            preparation = make_preparation(needed.partition("@")[0], job.base, study)
            add_needs(preparation)
            preparations[needed] = preparation

    for run in runs:
        add_needs(run)
    return list(preparations.values()), runs


def finished_elsewhere(study: Study) -> set[tuple[str, int]]:
    """Return arm and seed of runs that the JSON file has as finished, and the folder lacks."""
    if not study.json_file.exists():
        return set()
    found = set()
    for run in read_study(study.json_file)["runs"]:
        here = folder_of_run(run["arm"], run["seed"], study)
        if run["status"] == "finished" and not here.with_name(f"{here.name}.json").exists():
            found.add((run["arm"], run["seed"]))
    return found


class ReadLater:
    """Stands for the number in a file that a preparation writes, in a command that is not yet run.

    {NAME} is the number, {NAME:3} three times as much.
    """

    def __init__(self, file: Path):
        self.file = file

    def __format__(self, factor: str) -> str:
        return f"{float(self.file.read_text()) * float(factor or 1):.4g}"


def find_paths(study: Study, bases: Sequence[worlds.World]) -> list[dict[str, object]]:
    """Return what the placeholders in settings stand for, for each base."""
    of_bases = []
    for base, world in enumerate(bases):
        prepared = prepared_folder(study, base)
        paths: dict[str, object] = {
            "base": world.path("model"),
            "problems": world.path("train.jsonl"),
            "solutions": world.path("expert.jsonl"),
            "evaluation": str(prepared / "evaluation.jsonl"),
            "rewards": str(REWARDS),
            "n_held_out": str(study.held_out),
        }
        for name, preparation in study.catalogue.preparations.items():
            product = prepared / name / preparation.product
            paths[name] = ReadLater(product) if product.suffix == ".txt" else str(product)
        of_bases.append(paths)
    return of_bases


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

    def call(self, command: list[str], log_file: Path, lock: IO) -> tuple[int, float]:
        """Run a command to its end and return its exit code, and the seconds of a core that it took.

        Its output goes to the log.

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
        seconds = 0.0
        while process.poll() is None:
            seconds = cpu_seconds(process.pid) or seconds
            time.sleep(0.2)
        self.running.discard(process)
        return process.returncode, seconds


def cpu_seconds(process: int) -> float:
    """Return the seconds of a core that a process and its ended children have had, 0 if unknown."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has ended, or there is no /proc
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def locked(path: Path) -> Iterator[IO]:
    """Hold a lock on a file that processes can inherit, once all that hold it are gone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def run_job(job: Job, paths: Sequence[dict], needed: Sequence[Future], processes: Processes) -> str:
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
        code, seconds = processes.call(job.command(paths), job.log_file, lock)
        if code == 0 and (job.folder / job.product).exists():
            job.finish(seconds)
        elif code != 0 and not processes.is_stopping:
            said = last_line(job.log_file) or f"exit code {code}"
            job.write_record("failed", said, seconds)
        else:
            job.write_record("unfinished", seconds=seconds)
        return job.record()["status"]


def last_line(file: Path) -> str:
    """Return the last line of a log that says something."""
    lines = file.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def run_all(
    jobs: Sequence[Job], n_at_once: int, paths: Sequence[dict], after_each: Callable[[], None]
) -> dict[str, str]:
    """Run jobs, those that others need before them; return each one's status by its name.

    after_each: called after each job whose status is another than before, and at the end
    """
    before = {job.name: job.record().get("status") for job in jobs}
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
            if statuses[names[future]] != before[names[future]]:
                after_each()
    after_each()
    return statuses


# ---- What all runs have in common, and the plan
def describe(study: Study, bases: Sequence[worlds.World]) -> dict:
    """Return what all runs of a study have in common; figures of others are not compared."""
    first, *others = [hash_of_base(world) for world in bases]
    common = {
        "world": read_json(bases[0].path("world.json"), "the settings of an embedded world"),
        "base": first,
        "settings": preset("train_rl", study),
        "flow": preset("train_flow", study),
        "eval_problems": study.eval_problems,
        "held_out": study.held_out,
    }
    if others:
        common["other_bases"] = others
    return json.loads(json.dumps(common))


def hash_of_base(world: worlds.World) -> str:
    """Return a text by which the weights of a base model are known again."""
    return hash_of(Path(world.path("model"), "model.safetensors"))


def hash_of(file: Path) -> str:
    """Return a text by which a file's content is known again; of code, what it does."""
    content = file.read_bytes()
    if file.suffix == ".py":  # without comments and docstrings
        content = ast.unparse(WithoutDocstrings().visit(ast.parse(content))).encode()
    return hashlib.sha256(content).hexdigest()[:16]


class WithoutDocstrings(ast.NodeTransformer):
    """Code without the texts that stand alone, which do nothing."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if is_text else node


def begin(study: Study, bases: Sequence[worlds.World]) -> None:
    """Make the folder, or check that it is of the same study; ValueError if it is not."""
    file = Path(study.folder, "common.json")
    common = describe(study, bases)
    if study.json_file.exists():
        known = read_study(study.json_file)
        check_equal(without_bases(known), without_bases(common), str(study.json_file))
        check_bases(study, bases)
        chosen = Path(study.folder, "chosen.json")
        if known.get("registered") and not chosen.exists():  # it goes on from another machine's
            write_json(chosen, known["registered"]["tuned"])
    if file.exists():
        check_equal(read_json(file, OF_ALL), common, str(file))
        return
    for base, world in enumerate(bases):
        problems = Path(world.path("test.jsonl")).read_text().splitlines(keepends=True)
        evaluation = prepared_folder(study, base) / "evaluation.jsonl"
        with written_whole(evaluation) as temporary:
            temporary.write_text("".join(problems[: study.eval_problems]))
    write_json(file, common)


def check_bases(study: Study, bases: Sequence[worlds.World]) -> None:
    """Raise ValueError if a seed that is to be run has runs on another base model in the JSON file.

    Another machine makes other base models, as rounding differs. Its seeds are others, too: runs of a
    seed are pairs only on one base model.
    """
    if not study.json_file.exists():
        return
    known = read_study(study.json_file)
    elsewhere = {pairs_of(run): bases_of(known)[run.get("base", 0)] for run in known["runs"]}
    own = [hash_of_base(world) for world in bases]
    for run in plan(study)[1]:
        if elsewhere.get(pairs_of(run.label), own[run.base]) != own[run.base]:
            raise ValueError(
                f"seed {run.label['seed']} has runs on another base model in {study.json_file}, which this machine "
                "does not make alike: begin with another --first-seed, or name another --folder and "
                "--json"
            )


def plan_of(study: Study) -> dict:
    """Return what will be run and tested."""
    files = {file for reward in study.rewards for file in files_of(reward.file)}
    settings = {arm: find_arm(arm, study).settings for arm in study.chosen_arms}
    for file in REWARDS.glob("*.py"):
        if f"{{rewards}}/{file.name}" in json.dumps(list(settings.values())):
            files |= set(files_of(file))
    chosen = read_chosen(study.folder)
    plan = {
        "arms": study.chosen_arms,
        "settings": settings,
        "rewards": {each.name: each.path for each in study.rewards},
        "files": {file.name: hash_of(file) for file in sorted(files)},
        "tuned": {arm: changes for arm, changes in chosen.items() if arm in study.chosen_arms},
        "seeds": [study.first_seed, study.first_seed + study.n_seeds - 1],
        "bases": study.bases,
        "steps": study.n_steps,
        "first": "escape: the mean accuracy of the last 10 steps is above 0.5; McNemar's exact test",
        "then": "steps to a 10-step mean of 0.5; accuracy of the last 10 steps, exact sign-flip test "
        "and 95 % bootstrap over bases and seeds",
        "pairs": "each arm against rlvr, and each control against the reward, on the same seeds; "
        "p-values are not corrected for their number",
        "excluded": "runs that did not finish; a seed counts for a pair if both have finished",
    }
    return json.loads(json.dumps(plan))


def registered(study: Study) -> dict:
    """Return what was registered here, or in the JSON file, before; an empty dict if nothing was."""
    file = Path(study.folder, "registered.json")
    if file.exists():
        return read_json(file, OF_THE_PLAN)
    if study.json_file.exists():
        return read_study(study.json_file).get("registered", {})
    return {}


def check_registered(study: Study) -> None:
    """Raise ValueError if another plan was registered, before settings are chosen at length."""
    stored = registered(study)
    if stored:
        plan = {key: value for key, value in plan_of(study).items() if not isinstance(value, dict)}
        extend(stored, plan, 0, "registered.json")


def register(study: Study) -> None:
    """Write what will be run and tested before the first run; ValueError if it was another plan.

    A part of it may run first, and arms may join it later, which it then says.
    """
    plan = plan_of(study)
    stored = registered(study)
    if stored:
        known = read_study(study.json_file)["runs"] if study.json_file.exists() else []
        n_runs = sum(run["status"] == "finished" for run in known)
        plan = extend(stored, plan, n_runs, "registered.json")
    write_json(Path(study.folder, "registered.json"), plan)


# ---- The command
def report(statuses: dict[str, str], study: Study) -> int:
    """Say what failed or was stopped; return the exit code, 0 if all is finished."""
    counts = Counter(statuses.values())
    said = ", ".join(f"{count} {status}" for status, count in counts.items())
    print(f"{said}; the figures are in {study.json_file}")
    for name, status in statuses.items():
        if status != "finished":
            print(f"{status}: {name}, see its .log in {study.folder}")
    show_verdict(study)
    return int(counts["finished"] < len(statuses))


def show_verdict(study: Study) -> None:
    """Print what came of the rewards that are judged, and write its page."""
    figures = read_study(study.json_file)
    if "registered" in figures:
        print(write_verdict(figures, Path(study.folder)))
    elif not study.reward:
        print(f"next: python study/evidence.py --folder {study.json_file.parent}")


def check(study: Study) -> None:
    """Raise ValueError for settings that cannot work."""
    check_values(study)
    if study.arms == ():
        raise ValueError("--arms is empty; name some, or leave it out for all of them")
    if study.quick and not study.reward:
        raise ValueError("quick: expected --reward FILE.py, whose first answer it is")
    if study.n_seeds < study.bases:
        raise ValueError(
            f"bases={study.bases} with seeds={study.n_seeds}: some bases would have no run; raise "
            "--seeds, or lower --bases"
        )
    if study.reward and study.n_seeds > MOST_FLIPPED:
        raise ValueError(
            f"seeds={study.n_seeds}: the exact tests take at most {MOST_FLIPPED}; lower --seeds"
        )
    if study.tune and study.first_seed + study.n_seeds > FIRST_TUNING_SEED:
        raise ValueError(
            f"seeds up to {study.first_seed + study.n_seeds - 1} are reported, and from "
            f"{FIRST_TUNING_SEED} on --tune chooses settings: lower --first-seed or --seeds"
        )
    for reward in study.rewards if study.tune else ():
        if not reward.preparations():
            raise ValueError(
                f"{reward.name} has dense_coef={reward.settings['dense_coef']}, which --tune would "
                "choose as for every other arm: leave one of them out"
            )


def main(study: Study) -> int:
    """Run a study, or do what it asks in place of that; return the exit code."""
    check(study)
    if study.reward and study.folder == OF_THE_FLOW:
        names = "-".join(reward.name.removesuffix(".py") for reward in study.rewards)
        study = replace(study, folder=f"runs/judge-{names}")
    if study.merge:
        files = [study.json_file] if study.json_file.exists() else []
        write_study(study.json_file, merge([read_study(file) for file in [*files, *study.merge]]))
        show_verdict(study)
        return 0
    if study.collect:
        update_file(study.json_file, study.folder)
        show_verdict(study)
        return 0
    check_jobs(study)
    try_rewards(study.rewards)
    bases = find_worlds(study)
    begin(study, bases)
    if study.reward:
        check_registered(study)
    if study.tune and not tune(study, bases):
        return 1
    if study.reward:
        register(study)
    return report(run_arms(study, bases), study)


def check_jobs(study: Study) -> list[Job]:
    """Return all jobs; ValueError if a folder holds one with other settings."""
    preparations, runs = plan(study)
    jobs = [*preparations, *runs]
    for job in jobs:
        job.check()
    return jobs


def prepare(names: Sequence[str], study: Study, bases: Sequence[worlds.World]) -> None:
    """Make what preparations give, for each base; ValueError if one did not come to its end."""
    jobs = [make_preparation(name, base, study) for base in range(len(bases)) for name in names]
    for job in jobs:
        job.check()
    statuses = run_all(jobs, study.jobs, find_paths(study, bases), lambda: None)
    rest = [name for name, status in statuses.items() if status != "finished"]
    if rest:
        raise ValueError(f"not prepared: {', '.join(rest)}; see their .log in {study.folder}")


def run_arms(study: Study, bases: Sequence[worlds.World]) -> dict[str, str]:
    """Run the arms of a study on its seeds; return each job's status by its name."""
    paths = find_paths(study, bases)
    after_each = partial(update_file, study.json_file, study.folder)
    return run_all(check_jobs(study), study.jobs, paths, after_each)


def tune(study: Study, bases: Sequence[worlds.World]) -> bool:
    """Choose the settings of each method, on seeds of their own; return whether all runs ended.

    What has been chosen before stays.
    """
    file = Path(study.folder, "chosen.json")
    chosen = read_chosen(study.folder)
    scales = {reward.name: reward.scale for reward in study.rewards if reward.preparations()}
    tried = {}
    for arm in study.chosen_arms:
        found = tuning.candidates(arm, scales.get(arm))
        if found and arm not in chosen:
            tried[arm] = found
    if not tried:
        return True
    names = [tuning.with_changes(arm, each) for arm, some in tried.items() for each in some]
    trial_runs = replace(
        study,
        arms=tuple(names),
        first_seed=FIRST_TUNING_SEED,
        seeds=tuning.N_SEEDS,
        trial_steps=max(1, round(tuning.SHARE_OF_STEPS * study.n_steps)),
    )
    check_bases(trial_runs, bases)
    statuses = run_arms(trial_runs, bases)
    if set(statuses.values()) - {"finished"}:
        report(statuses, study)
        return False
    write_json(file, {**chosen, **tuning.choose(read_study(study.json_file), tried)})
    return True


def run() -> None:
    """Run the command; an error of input is one line."""
    codes = []
    errors.run(lambda: codes.append(main(tyro.cli(Study))))
    sys.exit(codes[0])


if __name__ == "__main__":
    run()
