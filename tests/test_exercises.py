"""The edits of docs/exercises.md apply and do what they say, and the solutions hold."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, copy_with_edits

PAGE = (ROOT / "docs" / "exercises.md").read_text()
DIFFS = re.findall(r"^```diff\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
SOLUTIONS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
NEAR = re.search(r"^```python near.py\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)[1]

CHECK = """
import sys
from pathlib import Path

import torch

import dense
import flow as fl
import rlfr
import train_rl
from infra.settings import change

world, folder = map(Path, sys.argv[1:])
rewards = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
assert rlfr.outcome_advantage(rewards, 8, "median").tolist() == [0] * 5 + [-1] * 3

mask = torch.ones(1, 4, dtype=torch.bool)
score = torch.tensor([[1.0, 25.0, 16.0, 100.0]])
settings = dense.FlowRewardSettings(flow_threshold=0.4)
flow = fl.Flow(fl.FlowConfig(dim=4, n_blocks=1))
reward = dense.FlowReward(flow, 4, settings, dense.FlowUpdateSettings(), seed=0, group_size=1)
torch.testing.assert_close(reward.shape(score, mask), -torch.tensor([[0.0, 4 / 9, 0.0, 1.0]]))

config = change(
    train_rl.Config(), model=str(world / "model"), data=str(world / "train.jsonl"), flow="new",
    contexts=("first",), baseline="median", reward=("binary", "near.py=0.2"), template="none",
    prompts=2, group_size=4, train_batch=8, max_tokens=8, max_prompt_tokens=64, steps=1,
    save_every=0, grade_truncated=True, folder=str(folder),
)
train_rl.main(config)
"""


@pytest.fixture(scope="module")
def edited(tmp_path_factory) -> Path:
    """A copy of the clone with all edits applied."""
    copy = tmp_path_factory.mktemp("edited") / "rlfr"
    return copy_with_edits(copy, DIFFS, {"near.py": NEAR})


def test_the_edits_apply_and_train(edited, world, tmp_path):
    """By hand: the median, and the square root of scores; a run has the context and the reward."""
    assert len(DIFFS) == 3
    command = [sys.executable, "-c", CHECK, world.folder, str(tmp_path / "run")]
    done = subprocess.run(command, cwd=edited, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    line = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert '"reward/near"' in line and '"flow/score"' in line


def test_the_reward_that_sees_the_answer():
    names: dict = {}
    exec(NEAR, names)
    reward = names["reward"]
    assert [reward("", text, "7") for text in (r"\boxed{7}", r"1+6=7 \boxed{3}", r"\boxed{3}")] == [
        1.0,
        0.5,
        0.0,
    ]


@pytest.mark.parametrize("number", range(1, 9))
def test_solutions(number):
    assert len(SOLUTIONS) == 8
    assert f"### {number}. " in PAGE
    exec(SOLUTIONS[number - 1], {})
