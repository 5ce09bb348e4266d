"""Files of runs and evaluations that are torn, empty or of another kind: one sentence each."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

import run
import train_rl
from evals import report
from evals.compare import compare
from infra import record, runs
from infra.metrics import read_metrics
from infra.settings import change, parse_config, stored_settings
from pages.curves import write_run_report
from pages.rollouts import inspect_run

WRONG = [b"{", b"[]", b"5", b"null", b'"x"', b"\xff\xfe", b"[" * 20_000, b"{}x"]
METRICS = b'{"step": 1, "reward": 0.5}\n'


def make_run(folder, **files):
    """Write the files of a run of one step, some of them replaced."""
    folder.mkdir()
    contents = {"config.json": b"{}", "metrics.jsonl": METRICS, **files}
    for name, content in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("content", WRONG)
@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "summary.json"])
def test_a_page_of_a_run_whose_json_is_wrong(tmp_path, name, content):
    run = make_run(tmp_path / "run", **{name: content + b"\n"})
    with pytest.raises(ValueError, match=rf"{name}.*expected"):
        write_run_report([run], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.jsonl", METRICS + b'{"step": 2, "reward": NaN}\n'),
        ("metrics.jsonl", METRICS + b'{"step": null, "reward": 0.5}\n'),
        ("metrics.jsonl", METRICS + b'{"step": 2, "reward": "null"}\n'),
        ("metrics.jsonl", METRICS + b'{"step": "2"}\n'),
        ("metrics.jsonl", METRICS + b'{"step": 1e400}\n'),
        ("metrics.jsonl", METRICS + b'{"reward": 1}\n'),
        ("summary.json", b'{"before": 5}'),
    ],
)
def test_a_page_of_a_run_whose_figures_are_none(tmp_path, name, content):
    run = make_run(tmp_path / "run", **{name: content})
    with pytest.raises(ValueError, match=rf"{name}.*expected"):
        write_run_report([run], tmp_path / "report.html")


def test_figures_that_were_not_finite(tmp_path):
    """A page leaves them out, and a run that goes on keeps their lines."""
    lines = METRICS + b'{"step": 2, "reward": null, "length": 3.0}\n'
    folder = make_run(tmp_path / "run", **{"metrics.jsonl": lines})
    assert read_metrics(folder / "metrics.jsonl") == [
        {"step": 1, "reward": 0.5},
        {"step": 2, "length": 3.0},
    ]
    assert write_run_report([folder], tmp_path / "report.html").exists()
    runs.Run.cut_metrics(SimpleNamespace(folder=folder), last_step=2)
    assert (folder / "metrics.jsonl").read_bytes() == lines


@pytest.mark.parametrize("line", [*WRONG, b"{}", b'{"step": "1"}'])
def test_figures_of_a_resumed_run_that_are_wrong(tmp_path, line):
    """They are read when it goes on, and stay as they are."""
    folder = make_run(tmp_path / "run", **{"metrics.jsonl": line + b"\n" + METRICS})
    with pytest.raises(ValueError, match=r"metrics.jsonl, (line|object) 1.*expected"):
        runs.Run.cut_metrics(SimpleNamespace(folder=folder), last_step=1)
    assert (folder / "metrics.jsonl").read_bytes() == line + b"\n" + METRICS


@pytest.mark.parametrize("content", [*WRONG, b"{}", b""])
def test_rollouts_that_are_wrong(tmp_path, content):
    run = make_run(tmp_path / "run", **{f"{record.FOLDER}/step-1.jsonl": content})
    with pytest.raises(ValueError, match=r"step-1.jsonl.*expected"):
        inspect_run(run)


RECORDED = ROOT / "course" / "exercises" / "recorded" / "rollouts" / "step-1.jsonl"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("problem", ..., "expected one with problem"),
        ("logp", ..., "expected one with logp"),
        ("tokens", None, "tokens is None; expected a list"),
        ("tokens", "x", "tokens is 'x'; expected a list"),
        ("logp", [0.5], r"logp is \[0.5\]; expected a list with a value for each token"),
        ("group", [], r"group is \[\]; expected a number"),
    ],
)
def test_a_rollout_of_which_a_part_is_wrong(tmp_path, name, value, words):
    one = json.loads(RECORDED.read_text().splitlines()[0])
    one[name] = value
    if value is ...:
        del one[name]
    run = make_run(tmp_path / "run", **{"rollouts/step-1.jsonl": json.dumps(one).encode() + b"\n"})
    with pytest.raises(ValueError, match=f"step-1.jsonl, object 1: {words}"):
        inspect_run(run)
    assert not (run / "rollouts.html").exists()


@pytest.mark.parametrize("name", ["sets", "config", "versions"])
@pytest.mark.parametrize("value", [..., None, [], "x"])
def test_a_summary_of_which_a_part_is_wrong(tmp_path, name, value):
    summary = {"sets": {}, "config": {"model": "toy"}, "versions": {}, name: value}
    if value is ...:
        del summary[name]
    (tmp_path / "samples.jsonl").write_text("")
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(ValueError, match=f"summary.json: {name} is .*expected the summary of"):
        report.write_report(tmp_path)


@pytest.mark.parametrize("content", [*WRONG, b"{}"])
def test_samples_that_are_wrong(tmp_path, content):
    (tmp_path / "samples.jsonl").write_bytes(content + b"\n")
    with pytest.raises(ValueError, match=r"samples.jsonl, (line|object) 1.*expected"):
        compare(tmp_path, tmp_path)


@pytest.mark.parametrize("content", ["", '{"a": ', "[]", "5", "\xff"])
def test_settings_of_a_resumed_run_that_are_none(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match="config.json: .*expected the settings of a run"):
        stored_settings(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("lr", "fast", "lr='fast': expected a number"),
        ("prompts", [4], r"prompts=\[4\]: expected a whole number"),
        ("model", None, "model=None: expected a text"),
        ("clip", [0.2], r"clip=\[0.2\]: expected a list of 2, each a number"),
    ],
)
def test_a_setting_of_a_resumed_run_of_another_kind(tmp_path, monkeypatch, name, value, words):
    settings = asdict(change(train_rl.Config(), **{name: value}))
    (tmp_path / "config.json").write_text(json.dumps(settings))
    monkeypatch.setattr(sys, "argv", ["train_rl.py", "--resume", str(tmp_path)])
    with pytest.raises(ValueError, match=f"config.json has {words}"):
        parse_config(train_rl.Config, {})


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("model", None, "model=None: expected a text"),
        ("dtype", 5, "dtype=5: expected one of auto, bfloat16, float32"),
        ("max_pixels", "many", "max_pixels='many': expected a whole number or null"),
    ],
)
def test_a_setting_of_an_exported_run_of_another_kind(name, value, words):
    stored = {"model": "toy", "dtype": "auto", "max_pixels": None, name: value}
    with pytest.raises(ValueError, match=f"config.json has {words}"):
        run.find_initial_model(stored, Path("config.json"), trust_remote_code=False)
