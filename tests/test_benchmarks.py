"""Each benchmark runs in small and writes what it promises."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT

FOLDER = ROOT / "benchmarks"
sys.path.append(str(FOLDER))
import gpu  # noqa: E402

SMALL = {
    "logprob": ["--tokens", "64", "--dim", "16", "--vocabulary", "500"],
    "flow_start": ["--sequences=2", "--prompt=8", "--response=8", "--dim=32", "--layers=4", "--vocabulary=100"],
    "grading": ["pairs.jsonl"],
}  # fmt: skip


# What has tests of its own, or is no benchmark by itself
OTHERS = {
    "behaviour",
    "common",
    "controls",
    "evidence",
    "flow_signal",
    "gpu",
    "last_number_reward",
    "length_reward",
    "process_reward",
    "smollm2",
    "study",
    "text_signal",
    "walkthrough",
    "word_problems",
}


def test_every_benchmark_is_here():
    assert {path.stem for path in FOLDER.glob("*.py")} - OTHERS == set(SMALL)


@pytest.fixture
def small_gpu(tmp_path) -> gpu.Settings:
    """Settings of the benchmark for a GPU, small enough for any machine."""
    return gpu.Settings(
        shape="tiny",
        episodes=8,
        prompts=2,
        group_size=2,
        prompt_tokens=8,
        response_tokens=16,
        steps=2,
        engine="torch",
        tokens_per_gpu=64,
        compile=False,
        json=str(tmp_path / "gpu.json"),
    )


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory) -> dict[str, tuple[subprocess.CompletedProcess, Path]]:
    """All benchmarks, two at a time: what each printed, and the file with its figures."""
    folder = tmp_path_factory.mktemp("benchmarks")
    (folder / "pairs.jsonl").write_text('{"gold": "1/2", "pred": "0.5", "expected": true}\n' * 3)

    def run(name: str, arguments: list[str]) -> tuple[subprocess.CompletedProcess, Path]:
        file = folder / f"{name}.json"
        command = [sys.executable, str(FOLDER / f"{name}.py"), *arguments, "--json", str(file)]
        return subprocess.run(command, capture_output=True, text=True, cwd=folder), file

    commands = {name: [*arguments, "--repeats", "1"] for name, arguments in SMALL.items()}
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(commands, pool.map(run, commands, commands.values()), strict=True))


def test_whole_steps(small_gpu):
    """All phases are there, and at most the whole rate of the device is used."""
    figures = gpu.main(replace(small_gpu, part="steps"))
    assert figures["phases"].keys() == {"sync", "roll_out", "score", "verify", "update", "step"}
    assert all(0 < figures["phases"][phase]["utilisation"] < 1 for phase in ("score", "update"))
    assert len(figures["lines"]) == 2


def test_variants_of_learning_agree(small_gpu):
    figures = gpu.main(replace(small_gpu, part="learn"))
    assert json.loads(Path(small_gpu.json).read_text()) == figures
    assert figures["variants"].keys() == gpu.VARIANTS.keys() - {"compiled"}
    base, *others = figures["variants"].values()
    assert base["gradient_norm"] > 0 and base["mean_flow_score"] > 0
    for other in others:
        for name in ("gradient_norm", "mean_logp", "mean_flow_score"):
            assert other[name] == pytest.approx(base[name], rel=1e-4)


def test_profile_and_offline_start(small_gpu, capsys):
    profile = gpu.main(replace(small_gpu, part="profile"))
    assert any("attention" in row["name"] for row in profile["attention"])
    offline = gpu.main(replace(small_gpu, part="offline"))
    assert offline["steps"][-1]["latents"] > 0 and "tokens/s" in capsys.readouterr().out


def test_operations_count_the_weights():
    """The matrices of the decoder, and its head, which is the embedding."""
    shape = gpu.SHAPES["tiny"]
    body, head = gpu.count_parameters(shape)
    model = gpu.make_model(shape, torch.device("cpu"))
    matrices = [p.numel() for p in model.parameters() if p.ndim == 2]
    assert body + head == sum(matrices)


def test_a_job_that_fails_is_reported_and_the_others_go_on(small_gpu, monkeypatch, tmp_path):
    jobs = {
        "late": gpu.Job("offline", "tiny", None, timeout=0.1),
        "good": gpu.Job("correct", "tiny", None, timeout=120),
        "steps": gpu.Job("steps", "tiny", None, timeout=120),
    }
    monkeypatch.setattr(gpu, "PLAN", jobs)
    figures = gpu.main(replace(small_gpu, engine="none"))
    assert json.loads(Path(small_gpu.json).read_text()) == figures
    assert figures["jobs"].keys() == {"late", "good"}, "nothing samples with --engine none"
    assert figures["jobs"]["late"]["error"] == "not done after 0.1 s"
    assert "error" not in figures["jobs"]["good"]
    differences = figures["jobs"]["good"]["differences"]
    assert differences["float32"]["logp"]["max"] == 0 < differences["bfloat16"]["logp"]["max"]


@pytest.mark.parametrize("name", SMALL)
def test_benchmark(benchmarks, name):
    done, file = benchmarks[name]
    assert done.returncode == 0, done.stderr
    figures = json.loads(file.read_text())
    assert figures.keys() == {"machine", "settings", "rows", "ratio"} and len(figures["rows"]) == 2
    assert all(row["seconds"] > 0 for row in figures["rows"]) and all(
        v > 0 for k, v in figures["ratio"].items() if "seconds" in k
    )
    assert figures["machine"] in done.stdout
