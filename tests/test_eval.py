"""Evaluation: figures by hand and by brute force, intervals that cover, resuming, all sets with both engines, comparison."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, read_lines

import eval as evaluation
import parallel
import rollout
from eval import BENCHMARKS, bootstrap, cluster, maj_at, pass_at, sign_test, summarise
from rewards import Grader


# ---- Figures
def test_pass_at_k_by_hand():
    assert pass_at(1, 4, 1) == 0.25 and pass_at(4, 4, 1) == 1 and pass_at(2, 4, 0) == 0
    assert pass_at(2, 4, 1) == pytest.approx(1 - 3 / 6) and pass_at(3, 5, 2) == pytest.approx(
        1 - 1 / 10
    )


def test_pass_at_k_is_the_mean_over_subsets():
    for n in range(1, 8):
        for c in range(n + 1):
            right = [True] * c + [False] * (n - c)
            for k in range(1, n + 1):
                assert pass_at(k, n, c) == pytest.approx(
                    np.mean([any(subset) for subset in combinations(right, k)])
                )


def test_maj_at_k_by_hand():
    assert maj_at(3, [0, 0, 1], [True, True, False]) == 1 and maj_at(
        1, [0, 0, 1], [True, True, False]
    ) == pytest.approx(2 / 3)
    assert maj_at(2, [0, 1], [True, False]) == 0.5, "a tie is decided by chance"
    assert maj_at(3, [0, None, None], [True, False, False]) == 1, "no answer, no vote"
    assert maj_at(2, [0, None, None], [True, False, False]) == pytest.approx(2 / 3), (
        "one subset has no vote at all"
    )
    assert maj_at(2, [None, None], [False, False]) == 0
    assert maj_at(3, [0, 0, 0], [False, True, True]) == 1, "equal answers are right together"
    assert maj_at(5, [0, 1, 1, 2, 2], [True, False, False, False, False]) == 0


def brute_force_majority(k: int, answers: list, right: list) -> float:
    """Vote by vote, over all subsets."""
    chances = []
    for subset in combinations(range(len(answers)), k):
        votes = [answers[i] for i in subset if answers[i] is not None]
        top = [a for a in set(votes) if votes.count(a) == max(map(votes.count, votes))]
        chances.append(np.mean([right[answers.index(a)] for a in top]) if top else 0.0)
    return float(np.mean(chances))


def test_maj_at_k_is_what_brute_force_gives():
    rng = np.random.default_rng(0)
    for _ in range(60):
        n = int(rng.integers(2, 9))
        answers = [None if a == 3 else int(a) for a in rng.integers(0, 4, n)]
        right = [a == 1 for a in answers]
        for k in range(1, n + 1):
            assert maj_at(k, answers, right) == pytest.approx(
                brute_force_majority(k, answers, right)
            )
    answers = [int(a) for a in rng.integers(0, 3, 16)]  # 12,870 subsets of 8: a sample of them
    right = [a == 1 for a in answers]
    assert maj_at(8, answers, right) == pytest.approx(
        brute_force_majority(8, answers, right), abs=0.04
    )


@pytest.mark.parametrize(("n_problems", "n_samples"), [(30, 1), (30, 8), (100, 4), (272, 1)])
def test_intervals_cover(n_problems, n_samples):
    """Problems of different difficulty, 95 % intervals of avg@n: they hold the expected accuracy 93 to 97 times of 100."""
    rng = np.random.default_rng(n_problems + n_samples)
    hits, trials = 0, 2000 if n_problems == 30 else 600
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "N_RESAMPLES", 1000)
        for trial in range(trials):
            difficulty = rng.beta(1.2, 0.8, n_problems)
            rates = rng.binomial(n_samples, difficulty) / n_samples
            low, high = bootstrap(rates[:, None], seed=trial)[:, 0]
            hits += low <= 0.6 <= high
    assert 0.93 <= hits / trials <= 0.97


def test_intervals_where_nothing_varies():
    low, high = bootstrap(np.zeros((30, 1)))[:, 0]
    assert low == 0 and high == pytest.approx(1 - 0.025 ** (1 / 30)), "Clopper and Pearson"
    assert bootstrap(np.ones((30, 1)))[:, 0].tolist() == pytest.approx([0.025 ** (1 / 30), 1])
    assert bootstrap(np.zeros((30, 1)), rates=False)[:, 0].tolist() == [0, 0]


def record(problem: str, sample: int, extracted: str | None, verdict: str, **more) -> dict:
    base = {
        "set": "s",
        "problem": problem,
        "sample": sample,
        "extracted": extracted,
        "verdict": verdict,
        "tokens": 10,
    }
    return base | {"correct": verdict == "right", "finish_reason": "stop"} | more


def test_equal_answers_are_one_vote():
    answers = [
        ("1/2", "right"),
        ("0.5", "right"),
        ("2", "wrong"),
        (None, "no answer"),
        (r"\frac12", "right"),
        ("2.0", "wrong"),
    ]
    group = [record("p", i, *answer) for i, answer in enumerate([*answers, ("7", "cut")])]
    with Grader(n_workers=1) as grader:
        assert cluster(group, grader) == [0, 0, 1, None, 0, 1, None]


def test_long_answers_cost_no_deadlines():
    group = [record("p", i, "x" * (3000 + i // 2), "wrong") for i in range(8)]
    with Grader(n_workers=1) as grader:
        assert (
            cluster(group, grader) == [0, 0, 1, 1, 2, 2, 3, 3] and grader.workers[0].process is None
        )


def test_figures_of_a_set():
    right, wrong = ("1", "right"), ("2", "wrong")
    rows = {"p": [right, right, wrong, wrong], "q": [wrong, wrong, wrong, (None, "no answer")]}
    records = [
        record(p, i, *answer, cluster={"1": 0, "2": 1, None: None}[answer[0]])
        for p in rows
        for i, answer in enumerate(rows[p])
    ]
    records[-1] |= {"finish_reason": "length", "tokens": 100, "verdict": "timeout"}
    figures = summarise(records)
    assert (figures["problems"], figures["samples"], figures["timeouts"]) == (2, 4, 1)
    assert (
        figures["avg"]["mean"] == 0.25 and figures["avg"]["low"] <= 0.25 <= figures["avg"]["high"]
    )
    assert {k: v["mean"] for k, v in figures["pass"].items()} == pytest.approx(
        {"1": 0.25, "2": 5 / 12, "3": 0.5, "4": 0.5}
    )
    assert {k: v["mean"] for k, v in figures["maj"].items()} == pytest.approx(
        {"1": 0.25, "2": 0.25, "4": 0.25}
    )
    assert (figures["truncated"], figures["boxed"]) == (1 / 8, 7 / 8) and figures[
        "length_mean"
    ] == pytest.approx(21.25)
    assert figures["length_p95"] == pytest.approx(np.quantile([10] * 7 + [100], 0.95))
    lines = evaluation.table({"s": figures}).splitlines()
    assert (
        len({len(line) for line in lines}) == 1
        and lines[1].startswith("| -")
        and "25.0%" in lines[2]
    )


# ---- Whole evaluations
@pytest.fixture
def config(world, tmp_path) -> evaluation.Config:
    return evaluation.Config(
        model=world.path("model"), data=(world.path("test.jsonl"),), template="none", max_tokens=16, samples=4, temperature=1.0,
        chunk=16, out=str(tmp_path / "out"),
    )  # fmt: skip


def test_a_killed_evaluation_goes_on_to_the_same_file(config, tmp_path):
    evaluation.main(config)
    whole = (tmp_path / "out" / "samples.jsonl").read_bytes()
    lines = read_lines(tmp_path / "out" / "samples.jsonl")
    assert len(lines) == 64 and len({(line["problem"], line["sample"]) for line in lines}) == 64
    assert {
        "set",
        "prompt",
        "response",
        "extracted",
        "verdict",
        "finish_reason",
        "tokens",
        "seed",
    } <= lines[0].keys()
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    assert stored["config"]["samples"] == 4 and "torch" in stored["versions"]
    summary = (tmp_path / "out" / "summary.json").read_text()
    assert (tmp_path / "out" / "report.html").exists() and "avg@n" in (
        tmp_path / "out" / "summary.md"
    ).read_text()
    for cut in (
        0,
        1,
        len(whole) // 3,
        len(whole) // 2,
        len(whole) - 1,
    ):  # wherever a kill may have cut it off
        (tmp_path / "out" / "samples.jsonl").write_bytes(whole[:cut])
        (tmp_path / "out" / "summary.json").unlink()
        evaluation.main(config)
        assert (tmp_path / "out" / "samples.jsonl").read_bytes() == whole
        assert (tmp_path / "out" / "summary.json").read_text() == summary
    with pytest.raises(
        ValueError,
        match="holds an evaluation with seed=0 .now 1.; give the same settings, or another --out",
    ):
        evaluation.main(replace(config, seed=1))


@pytest.mark.distributed
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_killed_halfway_goes_on(config, world, tmp_path, number):
    """Really killed, on two ranks; then finished on one: the file of one process that was never killed."""
    arguments = [
        "--model",
        config.model,
        "--data",
        world.path("train.jsonl"),
        "--template",
        "none",
        "--max-tokens",
        "48",
    ]
    arguments += ["--samples", "2", "--temperature", "1", "--chunk", "8"]
    script = [str(ROOT / "eval.py"), *arguments]
    alone = subprocess.run(
        [sys.executable, *script, "--out", str(tmp_path / "a")], capture_output=True, text=True
    )
    assert alone.returncode == 0, alone.stderr
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
        *script,
    ]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "b")], start_new_session=True, stdout=subprocess.DEVNULL
    )
    file = tmp_path / "b" / "samples.jsonl"
    while not (file.exists() and file.stat().st_size > 2000):
        assert process.poll() is None
        time.sleep(0.02)
    if number == signal.SIGKILL:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    process.wait(60)
    killed_at = file.stat().st_size
    done = subprocess.run(
        [sys.executable, *script, "--out", str(tmp_path / "b")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (
        file.read_bytes() == (tmp_path / "a" / "samples.jsonl").read_bytes()
        and killed_at < file.stat().st_size
    )


@pytest.mark.parametrize("engine", ["torch", pytest.param("vllm", marks=pytest.mark.vllm)])
def test_all_sets_by_their_hub_ids(config, world, tmp_path, monkeypatch, engine):
    """Seven sets with the columns, splits and answers that they have on the hub, in folders named like there."""
    monkeypatch.chdir(tmp_path)
    problems = read_lines(world.path("test.jsonl"))[:3]
    for name, benchmark in BENCHMARKS.items():
        answers = [
            {"gsm8k": f"so\n#### {p['answer']}", "olympiad_bench": [p["answer"]]}.get(
                name, p["answer"]
            )
            for p in problems
        ]
        rows = [
            {benchmark.problem_column: p["problem"], benchmark.answer_column: a}
            for p, a in zip(problems, answers, strict=True)
        ]
        folder = Path(benchmark.source, benchmark.subset or "")
        folder.mkdir(parents=True)
        (folder / f"{benchmark.split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        if benchmark.subset:
            (folder.parent / "README.md").write_text(
                f"---\nconfigs:\n- config_name: {benchmark.subset}\n  data_files:\n  - split: {benchmark.split}\n"
                f"    path: {benchmark.subset}/{benchmark.split}.jsonl\n---\n"
            )
    evaluation.main(replace(config, data=tuple(BENCHMARKS), engine=engine, max_sequences=16))
    parallel.start()  # an engine that goes takes the process group with it
    figures = json.loads((tmp_path / "out" / "summary.json").read_text())["sets"]
    assert list(figures) == list(BENCHMARKS) and all(
        (row["problems"], row["samples"]) == (3, 4) for row in figures.values()
    )
    lines = read_lines(tmp_path / "out" / "samples.jsonl")
    assert {tuple(line["answer"]) for line in lines if line["set"] == "olympiad_bench"} <= {
        (p["answer"],) for p in problems
    }
    assert {line["answer"] for line in lines if line["set"] == "gsm8k"} <= {
        p["answer"] for p in problems
    }


def test_names_of_sets_and_bad_input(config, world, tmp_path):
    model = rollout.find_model(config.model)
    config = replace(config, problem_column="problem")
    sets = evaluation.load_sets(
        (f"mine={world.path('test.jsonl')}", world.path("train.jsonl")), config, model
    )
    assert list(sets) == ["mine", "train"]
    with pytest.raises(ValueError, match="two sets are named 'test'"):
        evaluation.load_sets((world.path("test.jsonl"),) * 2, config, model)
    double = tmp_path / "double.jsonl"
    double.write_text('{"id": "a", "problem": "1", "answer": "1"}\n' * 2)
    with pytest.raises(ValueError, match="1 ids stand more than once, as 'a'"):
        evaluation.load_sets((str(double),), config, model)
    for settings, message in [
        ({"temperature": 0.0}, "samples=4 at temperature 0 are copies"), ({"samples": 0}, "samples=0: expected a positive"),
        ({"data": None}, "no data given"), ({"out": world.folder}, "holds no evaluation; name another --out"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            evaluation.main(replace(config, **settings))


# ---- Comparison
def write_evaluation(folder: Path, rows: dict[str, list[bool]]) -> str:
    folder.mkdir()
    lines = [
        record(p, i, "1", "right" if r else "wrong")
        for p, row in rows.items()
        for i, r in enumerate(row)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def test_sign_test_by_hand():
    assert (
        sign_test(0, 0) == 1 and sign_test(5, 5) == 1 and sign_test(5, 0) == pytest.approx(2 / 32)
    )
    assert sign_test(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 1024) == sign_test(2, 8)


def test_comparing_two_evaluations(tmp_path, capsys):
    a = {f"p{i}": [i < 4, i < 4] for i in range(10)}
    b = a | {"p0": [False, False], "p5": [True, True], "p6": [True, True], "p7": [True, False]}
    folders = write_evaluation(tmp_path / "a", a), write_evaluation(tmp_path / "b", b)
    evaluation.main(evaluation.Config(compare=folders, out=str(tmp_path / "c")))
    text = (tmp_path / "c" / "comparison.md").read_text()
    assert text in capsys.readouterr().out
    row = [
        cell.strip()
        for cell in next(line for line in text.splitlines() if line.startswith("| s ")).split("|")[
            1:-1
        ]
    ]
    assert row[:5] == ["s", "10", "40.0%", "55.0%", "+15.0"] and row[6:] == ["3", "1", "0.625"]
    assert "3 problems flipped" in text and "| s p0    | 100% |   0% | lost |" in text
    low, high = (float(part) for part in row[5].split(" – "))
    assert low < 15 < high
    with pytest.raises(ValueError, match="no samples.jsonl there"):
        evaluation.compare(evaluation.Config(compare=(folders[0], str(tmp_path))))
    other = write_evaluation(tmp_path / "d", {"p0": [True]})
    with pytest.raises(
        ValueError, match="1 problems in common of 10 and 1; compare the same problems"
    ):
        evaluation.compare(evaluation.Config(compare=(folders[0], other)))
