"""The walkthrough: its tables are those of its figures, its arithmetic is right, and it is training."""

import importlib
import json
import re
import shutil
import sys

import pytest
import torch
from conftest import ROOT, figures

import train_rl
from infra.settings import change
from worlds import toy

sys.path.append(str(ROOT / "benchmarks"))
import walkthrough  # noqa: E402

PAGE = (ROOT / "docs" / "walkthrough.md").read_text()


@pytest.fixture(scope="module")
def walked() -> dict:
    """The figures that the page shows."""
    return json.loads((ROOT / "docs" / "walkthrough.json").read_text())


def test_the_page_has_the_figures(tmp_path, monkeypatch):
    assert walkthrough.main(walkthrough.Settings(check=True)) == 0
    row = "| 0 | `\\` |"
    assert PAGE.count(row) == 3
    (tmp_path / "walkthrough.md").write_text(PAGE.replace(row, "| 1 | `\\` |"))
    (tmp_path / "walkthrough.json").write_text((ROOT / "docs" / "walkthrough.json").read_text())
    monkeypatch.setattr(walkthrough, "DOCS", tmp_path)
    assert walkthrough.main(walkthrough.Settings(check=True)) == 1, "a table that was edited"


@pytest.mark.parametrize(("arguments", "is_tracked"), [({}, False), ({"tracked": True}, True)])
def test_a_reader_rewrites_nothing_that_the_repository_keeps(
    walked, tmp_path, monkeypatch, arguments, is_tracked
):
    """Regression: the command of the page rewrote the page. Its links lead to the same files."""
    changed = walked | {"loss": 0.125}
    docs = tmp_path / "docs"
    docs.mkdir()
    for name in ("walkthrough.md", "walkthrough.json"):
        shutil.copy(ROOT / "docs" / name, docs)
    monkeypatch.setattr(walkthrough, "DOCS", docs)
    monkeypatch.setattr(walkthrough, "walk", lambda config: changed)
    monkeypatch.chdir(tmp_path)
    assert walkthrough.main(walkthrough.Settings(**arguments)) == 0
    assert ((docs / "walkthrough.md").read_text() != PAGE) == is_tracked
    own = docs if is_tracked else tmp_path / "runs" / "walkthrough"
    page = (own / "walkthrough.md").read_text()
    assert "| loss | 0.125 |" in page
    assert json.loads((own / "walkthrough.json").read_text()) == changed
    files = [
        [(folder / link).resolve() for link in re.findall(r"\]\(([^)#]+)", text)]
        for folder, text in ((docs, PAGE), (own, page))
    ]
    assert files[0] == files[1] and docs / "theory.md" in files[1]
    if is_tracked:
        assert page == PAGE.replace("| loss | 0.008312 |", "| loss | 0.125 |")


def test_prompt_and_tokens_are_text(walked):
    tokenizer = toy.make_tokenizer()
    assert tokenizer.decode(walked["prompt_ids"]) == walked["problem"]
    response = walked["responses"][walked["chosen"]]
    assert "".join(walked["tokens"]["texts"]) == response + toy.EOS
    assert tokenizer.encode(response) == walked["tokens"]["ids"][:-1]
    assert toy.solve(walked["problem"])[1] == walked["answer"]
    assert walked["taps"] == [1, 2, 3] and walked["n_layers"] == 4


def test_the_walk_has_the_settings_of_the_default_run(walked):
    """Regression: a group had become smaller than the walk's mini-batch, and the command ended."""
    config = walkthrough.settings_of_base(0)
    train_rl.check(config)
    default = change(train_rl.Config(), **toy.PRESETS["train_rl"]["toy"])
    assert change(config, prompts=32, train_batch=default.optimisation.train_batch) == default
    assert len(walked["responses"]) == default.sampling.group_size
    assert f"a group of G = {default.sampling.group_size} responses" in PAGE
    assert f"The real step has {default.sampling.prompts} such groups" in PAGE


def test_what_the_flow_sees_is_arithmetic(walked):
    t = walked["time"]
    deviations = []
    for at_tap in walked["at_taps"]:
        x_1, x_0, x_t, u = (torch.tensor(at_tap[name]) for name in ("x_1", "x_0", "x_t", "u"))
        torch.testing.assert_close(x_t, t * x_1 + (1 - t) * x_0)
        torch.testing.assert_close(u, x_1 - x_0)
        assert at_tap["deviation"] == pytest.approx(t / (1 - t) * at_tap["delta"])
        deviations.append(at_tap["deviation"])
    score = walked["tokens"]["score"]
    assert score[walked["token"]] == pytest.approx(sum(deviations) / 3)
    assert max(score) == score[walked["token"]]


def test_shaping_and_advantages_are_arithmetic(walked):
    rewards = torch.tensor(walked["rewards"])
    outcome = (rewards - rewards.mean()) / (rewards.std() + 1e-9)
    torch.testing.assert_close(torch.tensor(walked["outcome"]), outcome)
    columns = walked["tokens"]
    low = min(columns["score"])
    high = max(columns["score"])
    n = len(columns["score"])
    for k in range(n):
        unit = (columns["score"][k] - low) / (high - low)
        assert columns["normalised"][k] == pytest.approx(unit, abs=1e-6)
        kept = unit if unit > 0.6 else 0
        assert columns["selected"][k] == pytest.approx(kept, abs=1e-6)
        assert columns["dense_reward"][k] == pytest.approx(-0.01 * kept, abs=1e-8)
        assert columns["returns"][k] == pytest.approx(sum(columns["dense_reward"][k:]), abs=1e-7)
        advantage = walked["outcome"][walked["chosen"]] + columns["returns"][k]
        assert columns["advantage"][k] == pytest.approx(advantage, rel=1e-5)


def test_the_walk_is_a_step_of_training(config, seen):
    """Of the small world: the tensors of the step, its loss and its gradient."""
    config = change(config, prompts=1, group_size=4, train_batch=4, steps=1)
    train_rl.main(config)
    experience, advantage, flow_reward = seen[0]
    walked = walkthrough.walk(change(config, folder=None))
    row = walked["chosen"]
    tokens = walked["tokens"]
    n = len(tokens["ids"])
    assert tokens["ids"] == experience.episodes[row].response_ids
    assert walked["rewards"] == experience.reward.tolist()
    expected = {
        "logp": experience.old_logp,
        "entropy": experience.entropy,
        "score": experience.score,
        "dense_reward": flow_reward,
        "advantage": advantage,
    }
    for name, values in expected.items():
        assert tokens[name] == pytest.approx(values[row, :n].tolist(), rel=1e-4, abs=1e-6), name
    by_tap = [at_tap["deviation"] for at_tap in walked["at_taps"]]
    expected = experience.dense_score[:, row, walked["token"]].tolist()
    assert by_tap == pytest.approx(expected, rel=1e-4)
    (line,) = figures(config.folder)
    assert walked["loss"] == pytest.approx(line["policy/loss"], rel=1e-4, abs=1e-6)
    assert walked["gradient_norm"] == pytest.approx(line["policy/grad_norm"], rel=1e-4)


def test_functions_that_the_page_links():
    links = re.findall(r"\[`(\w+)\.(?!py`)([\w.]+)`\]\(\.\./([\w/]+)\.py\)", PAGE)
    assert len(links) >= 18
    for module, path, file in links:
        assert module == file.rpartition("/")[2]
        value = importlib.import_module(file.replace("/", "."))
        for name in path.split("."):
            value = getattr(value, name)
