"""Each benchmark runs in small and writes what it promises."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
SMALL = {
    "logprob": ["--tokens", "64", "--dim", "16", "--vocabulary", "500"],
    "flow_start": ["--sequences=2", "--prompt=8", "--response=8", "--dim=32", "--layers=4", "--vocabulary=100"],
    "grading": ["pairs.jsonl"],
}  # fmt: skip
GPU = ["--shape", "tiny", "--prompts", "2", "--group-size", "2", "--response-tokens", "16"]


# What has tests of its own, or is no benchmark by itself
OTHERS = {
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
    "word_problems",
}


def test_every_benchmark_is_here():
    assert {path.stem for path in FOLDER.glob("*.py")} - OTHERS == set(SMALL)


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
    commands["gpu"] = GPU
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(commands, pool.map(run, commands, commands.values()), strict=True))


def test_whole_steps(benchmarks):
    """The benchmark for a GPU, on whatever there is: all phases, and operations that agree with a count of parameters."""
    done, file = benchmarks["gpu"]
    assert done.returncode == 0, done.stderr
    figures = json.loads(file.read_text())
    assert figures["phases"].keys() == {"sync", "roll_out", "score", "verify", "update", "step"}
    assert all(0 < figures["phases"][phase]["utilisation"] < 1 for phase in ("score", "update"))
    assert figures["machine"] in done.stdout and "tokens/s" in done.stdout


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
