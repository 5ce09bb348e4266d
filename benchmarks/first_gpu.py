"""Everything of the project that has run on no GPU yet, in one command.

    python benchmarks/first_gpu.py                       all that the GPUs of this machine allow
    python benchmarks/first_gpu.py --list                the commands, without running them
    python benchmarks/first_gpu.py --checks tests words  some of them

A check is a list of commands; what they print goes to FOLDER/CHECK.log. A check whose command fails
is reported, the others go on, and the exit code is 1. One that needs more GPUs than there are is
left out and said so. It goes on where it was stopped: a check that FOLDER/results.json has as passed
is not run again. It needs what README names for a GPU, the tests' requirements, and PyPI.
"""

import repository  # noqa: F401

# isort: split
import json
import math
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import tyro

from common import machine
from infra import errors
from infra.files import need_keys, read_json
from infra.metrics import read_metrics

PYTHON = shlex.quote(sys.executable)
TWO_GPUS = f"{PYTHON} -m torch.distributed.run --nproc-per-node 2"
WORDS = (
    "--model runs/smollm2 --template runs/words/template.txt --max-prompt-tokens 256 "
    "--data runs/words/{data}.jsonl"
)
WORDS_RL = (
    f"{PYTHON} train_rl.py {WORDS.format(data='train')} --eval-data runs/words/test.jsonl "
    "--reward study/rewards/last_number_reward.py --flow runs/flow-words/flow --engine vllm "
    "--steps 40 --prompts 32 --train-batch 128 --lr 2e-5 --max-tokens 40"
)
# float32 and the plain engine: both runs sample the same tokens, and differ by rounding alone
RANKS = (
    "train_rl.py --engine torch --dtype float32 --compile off --steps 1 --eval-every 0 "
    "--flow runs/flow-toy/flow --data runs/toy/train.jsonl --model runs/toy/model --template none "
    "--problem-column problem --prompts 16 --group-size 8 --max-tokens 96 --train-batch 128"
)
FIGURES_OF_RANKS = ("reward", "length", "entropy", "policy/grad_norm", "flow/grad_norm")


class Check(NamedTuple):
    """Commands that show one thing, in their order."""

    shows: str
    commands: list[str]
    n_gpus: int = 1


def make_checks(folder: Path) -> dict[str, Check]:
    """Return the checks by name; their runs go into the folder."""
    one, two = folder / "one-gpu", folder / "two-gpus"
    return {
        "tests": Check(
            "sleep, weights after a sync, log-probs, whole steps",
            [f"{PYTHON} -m pytest -m gpu tests/gpu"],
        ),
        "benchmark": Check(
            "speed and memory; whole steps of 1.5B, of 7B with adapters and the flow",
            [f"{PYTHON} benchmarks/gpu.py --json {folder}/gpu.json"],
        ),
        "words": Check(
            "SmolLM2-135M learns word problems with vLLM: no dense reward, published, calibrated",
            [
                f"{PYTHON} benchmarks/smollm2.py --folder runs/smollm2",
                f"{PYTHON} benchmarks/word_problems.py --folder runs/words",
                f"{PYTHON} train_flow.py {WORDS.format(data='solutions')} --cutoff 320 --epochs 10 "
                "--batch-size 64 --lr 1e-3 --folder runs/flow-words",
                f"{WORDS_RL} --shaping none --folder {folder}/words-none",
                f"{WORDS_RL} --shaping flow --folder {folder}/words-published",
                f"{WORDS_RL} --shaping flow --flow-scope expert --dense-on response "
                f"--dense-coef 0.03 --folder {folder}/words-calibrated",
            ],
        ),
        "ranks": Check(
            "the first step on two GPUs is that of one",
            [
                f"{PYTHON} train_flow.py",
                f"{PYTHON} {RANKS} --folder {one}",
                f"{TWO_GPUS} {RANKS} --folder {two}",
                f"{PYTHON} benchmarks/first_gpu.py --compare {one} {two}",
            ],
            n_gpus=2,
        ),
        "sharded": Check(
            "whole steps of 1.5B on two GPUs: seconds, memory, FSDP2",
            [
                f"{TWO_GPUS} benchmarks/gpu.py --part steps --shape 1.5B "
                f"--json {folder}/steps-two-gpus.json"
            ],
            n_gpus=2,
        ),
    }


@dataclass(frozen=True)
class Settings:
    """What to run."""

    folder: str = "runs/first-gpu"  # Folder for logs, figures and runs
    checks: tuple[str, ...] | None = None  # Names of checks; by default all
    list: bool = False  # Print the commands, and run none
    compare: tuple[str, str] | None = None  # Two run folders whose first steps must be equal


def compare(runs: tuple[str, str]) -> None:
    """Raise ValueError unless the figures of two runs' first steps are equal to 1e-4."""
    one, other = (first_step(Path(run) / "metrics.jsonl") for run in runs)
    for name in FIGURES_OF_RANKS:
        print(f"{name:20}{one[name]:14.6g}{other[name]:14.6g}")
        if not math.isclose(one[name], other[name], rel_tol=1e-4, abs_tol=1e-7):
            raise ValueError(
                f"{name} of step 1: {one[name]} on {runs[0]}, {other[name]} on {runs[1]}"
            )


def first_step(file: Path) -> dict[str, float]:
    """Return the figures of a run's first step; ValueError if those that are compared are not there."""
    first, *_ = read_metrics(file) or [{}]
    need_keys([first], file, [*FIGURES_OF_RANKS])
    return first


def run_check(check: Check, log: Path) -> dict:
    """Run the commands of a check until one fails; return its seconds, and what failed."""
    began = time.perf_counter()
    failed = None
    with open(log, "w") as file:
        for command in check.commands:
            print(f"  {command}", flush=True)
            print(f"$ {command}", file=file, flush=True)
            done = subprocess.run(
                shlex.split(command), stdout=file, stderr=subprocess.STDOUT, cwd=repository.ROOT
            )
            if done.returncode:
                failed = f"exit code {done.returncode}: {command}"
                break
    return {"shows": check.shows, "seconds": time.perf_counter() - began, "failed": failed}


def main(settings: Settings) -> int:
    """Run the checks; return the exit code."""
    if settings.compare:
        compare(settings.compare)
        return 0
    folder = Path(os.path.abspath(settings.folder))
    checks = make_checks(folder)
    chosen = settings.checks or tuple(checks)
    for name in chosen:
        if name not in checks:
            raise ValueError(f"checks={name!r}: expected names among {', '.join(checks)}")
    if settings.list:
        for name in chosen:
            print(f"{name}: {checks[name].shows}", *checks[name].commands, sep="\n  ")
        return 0
    n_gpus = torch.cuda.device_count()
    if not n_gpus:
        raise ValueError("torch sees no GPU here: --list prints the commands without running them")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "results.json"
    results = {"machine": machine(), "checks": {}}
    if file.exists():
        results = read_json(file, "the results of checks")
        need_keys([results], file, ["checks"])
    for name in chosen:
        check = checks[name]
        known = results["checks"].get(name)
        if known and not known["failed"]:
            print(f"{name}: passed before")
            continue
        if check.n_gpus > n_gpus:
            print(f"{name}: left out, it needs {check.n_gpus} GPUs and this machine has {n_gpus}")
            continue
        print(f"{name}: {check.shows}")
        result = run_check(check, folder / f"{name}.log")
        results["checks"][name] = result
        file.write_text(json.dumps(results, indent=1))
        print(f"  {result['failed'] or 'passed'}, {result['seconds']:.0f} s")
    failed = [name for name in chosen if results["checks"].get(name, {}).get("failed")]
    return 1 if failed else 0


if __name__ == "__main__":
    errors.run(lambda: sys.exit(main(tyro.cli(Settings))))
