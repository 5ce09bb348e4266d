"""The command for a machine with GPUs: what can be known of it without one."""

import json
import shlex
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import tyro

import first_gpu
import gpu
import train_flow
import train_rl
from infra.settings import flatten, parse_config
from worlds import PRESETS

CHECKS = first_gpu.make_checks(Path("runs/first-gpu"))
CONFIGS = {"train_rl.py": train_rl.Config, "train_flow.py": train_flow.Config}


def words_of(command: str) -> list[str]:
    """Return a command's words from its file on."""
    words = shlex.split(command)
    start = next(i for i, word in enumerate(words) if word.endswith(".py") or word == "pytest")
    return words[start:]


@pytest.mark.parametrize("command", [c for check in CHECKS.values() for c in check.commands])
def test_commands_are_understood(command, monkeypatch):
    file, *flags = words_of(command)
    if file == "pytest":
        assert (ROOT / flags[-1]).is_dir()
        return
    assert (ROOT / file).is_file()
    if file in CONFIGS:
        monkeypatch.setattr(sys, "argv", [file, *flags])
        config = parse_config(CONFIGS[file], PRESETS[Path(file).stem])
        assert (
            "--folder" not in flags
            or flatten(config)["folder"] == flags[flags.index("--folder") + 1]
        )
    elif file == "benchmarks/gpu.py":
        tyro.cli(gpu.Settings, args=flags)


def test_runs_are_compared(tmp_path):
    figures = dict.fromkeys(first_gpu.FIGURES_OF_RANKS, 0.5)
    for name, entropy in {"one": 0.5, "same": 0.500001, "other": 0.501}.items():
        (tmp_path / name).mkdir()
        line = json.dumps({"step": 1, **figures, "entropy": entropy})
        (tmp_path / name / "metrics.jsonl").write_text(f"{line}\n")
    one, same, other = (str(tmp_path / name) for name in ("one", "same", "other"))
    first_gpu.main(first_gpu.Settings(compare=(one, same)))
    with pytest.raises(ValueError, match="entropy of step 1: 0.5 on .*one, 0.501 on .*other"):
        first_gpu.main(first_gpu.Settings(compare=(one, other)))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_results_and_figures_that_are_none(tmp_path, monkeypatch, content):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match="results.json.*expected"):
        first_gpu.main(first_gpu.Settings(folder=str(tmp_path)))
    (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(ValueError, match="metrics.jsonl.*expected"):
        first_gpu.main(first_gpu.Settings(compare=(str(tmp_path), str(tmp_path))))


def test_a_check_that_fails_is_reported_and_is_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    door = tmp_path / "door"
    checks = {
        "good": first_gpu.Check("it runs", [f"{first_gpu.PYTHON} -c 'print(6 * 7)'"]),
        "bad": first_gpu.Check("a file is there", [f"ls {door}"]),
        "large": first_gpu.Check("two GPUs", ["false"], n_gpus=2),
    }
    monkeypatch.setattr(first_gpu, "make_checks", lambda folder: checks)
    settings = first_gpu.Settings(folder=str(tmp_path / "runs"))
    assert first_gpu.main(settings) == 1
    results = json.loads((tmp_path / "runs" / "results.json").read_text())["checks"]
    assert results.keys() == {"good", "bad"}
    assert results["good"]["failed"] is None
    assert results["bad"]["failed"] == f"exit code 2: ls {door}"
    assert "42" in (tmp_path / "runs" / "good.log").read_text()
    door.touch()
    (tmp_path / "runs" / "good.log").unlink()
    assert first_gpu.main(settings) == 0
    assert not (tmp_path / "runs" / "good.log").exists(), "what passed is not run again"


def test_a_machine_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="torch sees no GPU here"):
        first_gpu.main(first_gpu.Settings())
    with pytest.raises(ValueError, match="checks='speed': expected names among tests, "):
        first_gpu.main(first_gpu.Settings(checks=("speed",)))
