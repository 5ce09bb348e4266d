"""What study/behaviour.py counts, by hand, and its page of a small run."""

# ruff: noqa: E402

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from test_inspector import one_record

import train_rl
from infra.settings import change

sys.path.append(str(ROOT / "study"))
import behaviour
import common


def response(group: int, is_right: bool, deviation: float, n: int = 2) -> dict:
    """A response of n tokens with one deviation at both taps."""
    both = [[deviation] * n] * 2
    return one_record(group, 0, ["a"] * n, correct=is_right, dense_score=both)


def test_tokens_are_counted():
    numbers = {
        "dense_reward": [-0.01, 0.0, 0.0, -0.02],
        "dense_score": [[1, 2, 3, 4], [3, 4, 5, 8]],
    }
    counts = behaviour.count_tokens([one_record(0, 0, list("=a=b"), **numbers)], behaviour.text_of)
    found = [(c.text, c.n, c.total, c.rewarded, c.deviation) for c in counts]
    assert found == [("b", 1, -0.02, 1, 6), ("=", 2, -0.01, 0.5, 3), ("a", 1, 0, 0, 3)]


def test_tokens_without_a_deviation_count_all_the_same():
    one = one_record(0, 0, ["a", "a"], dense_score=[[1.0, None], [3.0, None]])
    (count,) = behaviour.count_tokens([one], behaviour.text_of)
    assert (count.n, count.deviation) == (2, 2)


def test_kinds_of_tokens():
    tokens = ["7", "*", "6", "=", "4", "2", ".", " So", " x", "\n", "<|im_end|>", " =", " 12"]
    kinds = [behaviour.kind_of(tokens, place) for place in range(len(tokens))]
    assert kinds == [
        "other number",
        "operator",
        "other number",
        "equals sign",
        "result",
        "result",
        "mark",
        "connective",
        "other word",
        "blank",
        "special token",
        "equals sign",
        "result",
    ]


def test_auc_of_outcomes():
    """Of the six pairs 4.5 have the larger deviation on the wrong side; within groups 1.5 of 2."""
    records = [
        response(0, True, 1.0),
        response(0, False, 3.0),
        response(1, True, 2.0),
        response(1, False, 2.0),
        response(2, True, 4.0),
    ]
    responses = behaviour.collect(records)
    assert responses.is_wrong.tolist() == [False, True, False, True, False]
    area, low, high = behaviour.outcome_auc(responses, "deviation")
    assert area == pytest.approx((2 + 1.5) / 6)
    assert low <= area <= high
    assert behaviour.within_groups(responses, "deviation")[0] == pytest.approx(1.5 / 2)
    nothing = behaviour.collect(records[:1])
    assert math.isnan(behaviour.outcome_auc(nothing, "deviation")[0])


def test_places():
    one = one_record(0, 0, ["a"] * 20, dense_score=[[float(k) for k in range(20)]])
    assert behaviour.by_place([one]).tolist() == [2 * k + 0.5 for k in range(10)]
    assert np.isnan(behaviour.by_place([])).all()


def test_tokens_are_shown_without_ending_a_cell():
    assert common.code(" a|b`\n") == "`␣a\\|b´\\n`"
    assert common.code("\\\x13") == r"`\\x13`"
    assert common.code("") == "◌"


def test_the_page_of_a_run(config, tmp_path, monkeypatch, capsys):
    train_rl.main(change(config, steps=3, log_rollouts=1))
    root = tmp_path / "repository"
    monkeypatch.setattr(behaviour, "ROOT", root)
    behaviour.main(behaviour.Settings(config.folder))
    page = Path(config.folder) / "behaviour.md"
    assert capsys.readouterr().out.splitlines()[-1] == f"open {page}"
    text = page.read_text()
    assert f"`python study/behaviour.py {config.folder}` counted this" in text
    assert "## Tokens, early, steps 1 to 1" in text and "## Tokens, late, steps 3 to 3" in text
    assert text.count("| deviation | ") == 2
    assert text.count("| count | share with a flow reward | mean flow reward |") == 6
    assert "| measure | right / wrong | AUC |" in text
    for subject in ("tokens", "outcomes", "places", "training"):
        picture = f"behaviour-{subject}.png"
        assert f"({picture})" in text and page.with_name(picture).stat().st_size > 1000

    for name in ("docs", "study"):
        (root / name).mkdir(parents=True)
    behaviour.main(behaviour.Settings(config.folder, tracked=True))
    kept = (root / "docs" / "behaviour-toy.md").read_text()
    assert kept == text.replace("](behaviour-", "](../study/behaviour-toy-")
    assert len(list((root / "study").glob("behaviour-toy-*.png"))) == 4


def test_steps_that_are_recorded_for_their_reward_are_no_sample(tmp_path):
    """The step of a fall, and the one before it."""
    (tmp_path / "rollouts").mkdir()
    for step in (1, 11, 20, 21):
        one = one_record(0, 0, ["a"], step=step)
        (tmp_path / "rollouts" / f"step-{step}.jsonl").write_text(json.dumps(one) + "\n")
    lines = [{"step": step, "reward": 0.5 * (step != 21)} for step in range(1, 22)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    periods = behaviour.split_periods(str(tmp_path))
    assert list(periods) == ["early, steps 1 to 1", "late, steps 11 to 11"]
    assert behaviour.find_falls(lines) == [21]


def test_a_run_without_a_flow_is_refused(config):
    train_rl.main(change(config, steps=1, shaping="none"))
    with pytest.raises(ValueError, match="rollouts without a flow; expected a run with --shaping"):
        behaviour.main(behaviour.Settings(config.folder))
