"""A small sparse world for the checks of dense rewards: a policy, expert solutions, worse ones.

The policy is that of --model toy-sparse in small; it is made in some seconds.
"""

import atexit
import random
import shutil
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import replace
from functools import cache
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import dense
import rlfr
import train_rl
from infra import parallel
from infra.batching import Row
from infra.files import read_json_lines
from infra.models import LoadingSettings, find_model
from infra.settings import change
from policy import load_policy
from worlds import toy

SOLUTIONS = Path(__file__).parent / "solutions"
N_HELD_OUT = 100  # expert solutions on which a reward is calibrated
SIZES = {
    "steps": 120,
    "batch_size": 16,
    "hidden_size": 32,
    "n_layers": 4,
    "n_train": 16,
    "n_test": 200,
    "n_expert": 400,
}


# ---- The world, and a dense reward in it
class TinyWorld(NamedTuple):
    """The small world, and what a dense reward may ask of a run in it."""

    world: toy.World
    host: dense.Host


@cache
def make() -> TinyWorld:
    """Make the small world, once in a process, in a folder that goes when the process ends."""
    folder = tempfile.mkdtemp(prefix="tiny-world-")
    atexit.register(shutil.rmtree, folder)
    settings = {
        "problem_column": "problem",
        "template": "none",
        "max_prompt_tokens": 64,
        "max_tokens": 80,
    }
    parallel.start()
    with redirect_stderr(StringIO()):  # bars of progress
        world = toy.make(replace(toy.WORLDS["toy-sparse"], folder=f"{folder}/world", **SIZES))
        config = change(train_rl.Config(), model=world.path("model"), **settings)
        model = find_model(config.model, LoadingSettings())
        policy = load_policy(model.path)
    return TinyWorld(world, dense.Host(model, config, lambda: policy, names_flow=False))


def make_reward(file: str | Path) -> dense.DenseReward:
    """Make the dense reward of a file as a run does."""
    world, host = make()
    own = {"experts": world.path("expert.jsonl"), "held_out": str(N_HELD_OUT)}
    reward = dense.make(str(file), own, host)
    dense.prepare(reward, host.policy.n_layers, torch.float32, cpu_offload=False)
    reward.step = 0
    return reward


def scores_of(reward: dense.DenseReward, rows: list[Row]) -> tuple[Tensor, Tensor]:
    """Return the scores of rows, means over taps, and where response tokens are, (B, T) each."""
    width = max(len(row.response_ids) for row in rows)
    score = torch.zeros(len(rows), width)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for part in make().host.run_policy(rows, reward.taps):
        values, scored = dense.checked_scores(reward, part)
        score[part.indices, : values.shape[2]] = values.mean(dim=0)
        mask[part.indices, : scored.shape[1]] = scored
    return score, mask


# ---- Responses that are worse than an expert's
def idle(problem: str, rng: random.Random) -> str:
    """Solve a problem in which two steps add zero in place of the problem's operation."""
    start, *operations = problem.rstrip(">").split()
    for place in rng.sample(range(len(operations)), 2):
        operations[place] = "+0"
    return toy.solve(f"{start} {' '.join(operations)}>")[0]


def slip(problem: str, rng: random.Random) -> str:
    """Solve a problem and write a wrong digit as the result of one step, and go on from there."""
    start, *operations = problem.rstrip(">").split()
    place = rng.randrange(len(operations))
    value = int(start)
    steps = []
    for k, operation in enumerate(operations):
        result = toy.calculate(value, operation[0], int(operation[1:]))
        if k == place:
            result = (result + rng.randint(1, 9)) % 10
        steps.append(f"{value}{operation}={result}")
        value = result
    return rf"{','.join(steps)}. \boxed{{{value}}}"


def garble(problem: str, rng: random.Random) -> str:
    """Solve a problem and write one random character in the place of another."""
    solution = toy.solve(problem)[0]
    place = rng.randrange(len(solution))
    return solution[:place] + rng.choice("abcxyz") + solution[place + 1 :]


WORSE: dict[str, Callable[[str, random.Random], str]] = {
    "garbled": garble,
    "idle": idle,
    "slipped": slip,
}


def rows_of(kind: str) -> list[Row]:
    """Return responses of a kind, `expert` or one of WORSE, to the world's test problems."""
    world, host = make()
    encode = host.model.tokenizer.encode
    rng = random.Random(kind)
    rows = []
    for problem in read_json_lines(world.path("test.jsonl"), "the problems of an embedded world"):
        text = problem["solution"]
        if kind != "expert":
            text = WORSE[kind](problem["problem"], rng)
        rows.append(Row(encode(problem["problem"]), encode(text + toy.EOS)))
    return rows


# ---- What a reward sees
def auc(better: Tensor, worse: Tensor) -> float:
    """Return how often a value of `better` (K,) is above one of `worse` (K,); a tie counts half."""
    difference = better[:, None] - worse[None]
    return ((difference > 0).double() + (difference == 0).double() / 2).mean().item()


def mean_scores(reward: dense.DenseReward, kind: str) -> Tensor:
    """Return the mean score of each response of a kind, (B,)."""
    return rlfr.mean_over_tokens(*scores_of(reward, rows_of(kind)))


def show(rewards: dict[str, dense.DenseReward]) -> None:
    """Print how often each reward prefers an expert's response to a worse one."""
    print("How often an expert's response has the higher mean score, where the other one is\n")
    print(f"  {'':22}" + "".join(f"{kind:>10}" for kind in WORSE))
    for name, reward in rewards.items():
        expert = mean_scores(reward, "expert")
        seen = [auc(expert, mean_scores(reward, kind)) for kind in WORSE]
        print(f"  {name:22}" + "".join(f"{share:10.2f}" for share in seen))
