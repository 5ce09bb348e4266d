"""A moment's trial of a dense reward, before a study that takes hours: one step in a tiny world.

What the trainer says of a reward with a bug (a number that is not finite, a wrong shape, the same
score everywhere) is said here after some seconds.
"""

import repository  # noqa: F401

# isort: split
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace

from methods import GIVEN, REWARDS, FileReward, to_flags
from repository import ROOT
from worlds import toy

WORLD = replace(
    toy.WORLDS["toy-sparse"],
    steps=2,
    batch_size=8,
    hidden_size=32,
    n_layers=4,
    n_train=64,
    n_test=16,
    n_expert=48,
)
SETTINGS = {
    "problem_column": "problem",
    "template": "none",
    "max_prompt_tokens": 64,
    "max_tokens": 16,
    "prompts": 4,
    "group_size": 4,
    "train_batch": 16,
    "steps": 1,
    "save_every": 0,
    "log_rollouts": 0,
    "engine": "torch",
}


def try_rewards(rewards: Sequence[FileReward]) -> None:
    """Train a step with each reward. ValueError names the first that cannot work, and says why."""
    if not rewards:
        return
    with tempfile.TemporaryDirectory() as folder:
        world = toy.make(replace(WORLD, folder=f"{folder}/world"))
        for reward in rewards:
            print(f"trying {reward.name} for a step")
            try_reward(reward, world, f"{folder}/{reward.name}")


def try_reward(reward: FileReward, world: toy.World, folder: str) -> None:
    """Train a step with a reward; ValueError if that fails."""
    paths = {
        "solutions": world.path("expert.jsonl"),
        "n_held_out": "16",
        "sft": world.path("model"),
        "flow": "new",
        "rewards": str(REWARDS),
        reward.scale: "1",
    }
    # whatever else was given, as the tiny world has other sizes
    given = {name: GIVEN[name] for name in reward.own if name in GIVEN}
    settings = {**SETTINGS, **reward.shaping(**given)}
    settings |= {"model": world.path("model"), "data": world.path("train.jsonl"), "folder": folder}
    words = [word.format(**paths) for word in to_flags(settings)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_rl.py"), *words],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
        },
    )
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        said = lines[-1] if lines else f"exit code {done.returncode}"
        raise ValueError(f"reward {reward.name}: {said.removeprefix('error: ')}")
