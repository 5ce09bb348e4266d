"""Outcome rewards: parts and weights, worker processes that keep their deadline, labelled pairs."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT
from test_answers import HOSTILE

from grading.answers import MAX_LENGTH, MEMORY_LIMIT
from rewards import Grader, Pairs, Worker, count_errors, overlong, read_pairs


@pytest.fixture(scope="module")
def grader():
    with Grader(n_workers=2, deadline=4.0) as grader:
        yield grader


def submit(grader, gold: str, answers: list[str]) -> list:
    problems = [SimpleNamespace(text="", answer=gold) for _ in answers]
    episodes = [
        SimpleNamespace(text=rf"\boxed{{{answer}}}", finish_reason="stop", response_ids=[0])
        for answer in answers
    ]
    return grader.submit(problems, episodes).result()


# ---- Worker processes
def test_any_of_several_golds(grader):
    assert grader.equal(["3", "\\sqrt{4}"], "2") and not grader.equal(["3", "4"], "2")


def test_plain_integers_start_no_process():
    with Grader(n_workers=1) as grader:
        assert (
            grader.equal("025", "25")
            and not grader.equal("4", "5")
            and not grader.equal("", "")
            and not grader.equal("x", "")
        )
        assert grader.workers[0].process is None


def test_hostile_answers_cost_a_deadline_and_no_more(grader):
    """Between good answers: order, verdicts and the pool survive."""
    # beyond the reader, so that math-verify has to try
    lost = [
        r"\sum_{i=1}^{3} 9^{9^{9^{9^9}}}",
        r"\sum_{i=1}^{3} (9!)!!",
        r"\int " + r"\frac{" * 50 + "x" + "}{2}" * 50,
        r"\lim x^{" * 60,
    ]
    answers = [
        "\\sqrt{8}",
        *HOSTILE,
        *lost,
        "9" * 100_000,
        "x" * 2**20,
        "{" * 50_000,
        "\\sqrt{8}",
        "2^{3/2}",
    ]
    grader.counts.clear()
    began = time.perf_counter()
    verdicts = submit(grader, "2\\sqrt{2}", answers)
    assert [verdict.correct for verdict in verdicts] == [
        True,
        *[False] * (len(answers) - 3),
        True,
        True,
    ]
    assert len(answers) > 35 and time.perf_counter() - began < 4.0 * len(lost) + 20
    assert grader.counts["capped"] == sum(len(answer) > MAX_LENGTH for answer in answers) - 1, (
        "unbalanced: no box"
    )


def test_a_deadline_is_kept_and_the_next_answer_is_graded():
    with Grader(n_workers=1, deadline=0.5) as grader:
        assert grader.equal("2", "\\sqrt{4}"), "the process runs"
        os.kill(grader.workers[0].process.pid, 19)  # SIGSTOP: an answer that never comes
        began = time.perf_counter()
        verdict = submit(grader, "3", ["\\sqrt{9}"])[0]
        assert (verdict.kind, verdict.correct, grader.counts["timeout"]) == ("timeout", False, 1)
        assert time.perf_counter() - began < 3
        assert [v.correct for v in submit(grader, "3", ["\\sqrt{9}+0", "\\sqrt{81}"])] == [
            True,
            False,
        ]
        os.kill(grader.workers[0].process.pid, 9)
        assert grader.equal("2", "\\sqrt{4}+0"), "a process that died is replaced"


def test_lines_that_come_together_are_read_one_by_one():
    """A parent that comes late finds `loading`, `loaded` and the verdict in the pipe."""
    with Grader(n_workers=1, deadline=5) as grader:
        assert grader.equal("2", "\\sqrt{4}")
        worker, reply = grader.workers[0], Worker.reply

        def late(deadline):
            time.sleep(1)
            return reply(worker, deadline)

        worker.reply = late
        assert (
            grader.equal("6", r"\sum_{i=1}^{3} i")
            and grader.equal("7", r"\sum_{i=1}^{3} i + 1")
            and not grader.counts
        )


def test_repeated_pairs_are_graded_once():
    with Grader(n_workers=1) as grader:
        assert grader.equal("2", "\\sqrt{4}")
        grader.workers[0].stop()
        assert grader.equal("2", "\\sqrt{4}") and grader.workers[0].process is None


def test_workers_are_confined(grader):
    """Bounded memory; no file to write, no program, no network."""
    assert grader.equal("2", "\\sqrt{4}")
    worker = next(worker for worker in grader.workers if worker.process is not None)
    limits = Path(f"/proc/{worker.process.pid}/limits").read_text()
    assert [
        line.split()[3] for line in limits.splitlines() if line.startswith("Max address space")
    ] == [str(MEMORY_LIMIT)]
    attempts = """
import os, socket, subprocess, sys, tempfile
from grading import answers
answers.confine(2**30)
for attempt in (lambda: open("hacked", "w"), lambda: os.open("hacked", os.O_CREAT | os.O_WRONLY), lambda: os.system("true"),
                lambda: subprocess.run(["true"]), lambda: socket.create_connection(("127.0.0.1", 9)), lambda: os.remove("x")):
    try:
        attempt()
        sys.exit("allowed")
    except PermissionError:
        pass
try:
    bytearray(2**31)
    sys.exit("allowed")
except MemoryError:
    pass
"""
    done = subprocess.run(
        [sys.executable, "-c", attempts], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_grading_from_a_thread(grader):
    found = []
    thread = threading.Thread(
        target=lambda: found.extend(
            submit(grader, "\\frac{1}{3}", [r"\frac{2}{6}", r"\sum_{i=1}^{3} i"])
        )
    )
    thread.start()
    thread.join(60)
    assert [verdict.correct for verdict in found] == [True, False]


@pytest.mark.distributed
def test_grading_under_torchrun(tmp_path):
    script = tmp_path / "grade.py"
    script.write_text(
        "import sys; sys.path.insert(0, sys.argv[1])\nfrom rewards import Grader\n"
        "with Grader(n_workers=1) as grader:\n"
        r"    assert grader.equal('6', r'\sum_{i=1}^{3} i') and not grader.equal('2', '\\sqrt{5}')"
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
        str(script),
        str(ROOT),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# ---- Parts and weights
@pytest.mark.parametrize(
    ("response", "finished", "binary", "official", "kind"),
    [
        ("so \\boxed{2}", True, 1, 1, "right"),
        ("so \\boxed{3}", True, 0, 0.5, "wrong"),
        ("so 2", True, 0, 0, "no answer"),
        ("so \\boxed{2}", False, 0, 0, "cut"),
        ("first \\boxed{3}, no \\boxed{2}", True, 1, 1, "right"),
        ("\\boxed{2}" * 5, True, 0, 0, "no answer"),
        ("abcde" * 6 + "\\boxed{2}", True, 1, 0, "right"),
        ("字符" * 20 + "\\boxed{2}", True, 1, 0, "right"),
    ],
)
def test_reward_sets(response, finished, binary, official, kind):
    for name, expected in (("binary", binary), ("official", official)):
        with Grader([name], n_workers=1) as grader:
            verdict = grader.grade("", "2", response, finished)
            assert (
                verdict.reward == expected
                and verdict.correct == (expected == 1)
                and verdict.parts == {name: expected}
            )
            assert name == "official" or verdict.kind == kind


def test_rewards_of_vision_language_models():
    """The official cases: accuracy, and half a point for the form (their mistakes mended, see test_vlm_eval.py)."""
    cases = json.loads((ROOT / "tests" / "oracle" / "viii_scoring.json").read_text())["vlm"]
    mended = {
        "letter found inside a word": 0.5,
        "two letters": 0.5,
        "gold that does not parse": 0.5,
    }
    with Grader(["vlm", "tags=0.5"], n_workers=1) as grader:
        for case in cases:
            response = (
                case["query"].rpartition("<|im_start|>assistant\n")[2].removesuffix("<|im_end|>")
            )
            verdict = grader.grade("", case["gold"], response, True)
            assert verdict.reward == mended.get(case["name"], case["reward"]), case["name"]
        verdict = grader.grade("", "B", "<think> x </think> <answer> B </answer>", True)
        assert (verdict.kind, verdict.extracted, verdict.parts) == (
            "right",
            "B",
            {"vlm": 1.0, "tags": 1.0},
        )
        assert grader.grade("", "B", "<think> x </think> <answer> B </answer>", False).reward == 0
    with pytest.raises(ValueError, match="vlm reads answers by other rules"):
        Grader(["vlm", "binary"])


def test_parts_add_up_with_their_weights(tmp_path):
    file = tmp_path / "brevity.py"
    file.write_text("def reward(problem, response):\n    return 1 / len(response)\n")
    parts = ["binary=2", "format=0.5", "overlong", f"{file}=10"]
    with Grader(parts, n_workers=1, max_tokens=100, overlong_buffer=20) as grader:
        verdict = grader.grade("", "2", "\\boxed{2}", True, n_tokens=90)
        assert verdict.parts == {"binary": 1.0, "format": 1.0, "overlong": -0.5, "brevity": 1 / 9}
        assert verdict.reward == pytest.approx(2 + 0.5 - 0.5 + 10 / 9) and verdict.correct
        verdict = grader.grade("", "2", "two", False, n_tokens=100)
        assert (
            verdict.parts == {"binary": 0.0, "format": 0.0, "overlong": -1.0, "brevity": 0.0}
            and verdict.kind == "cut"
        )


def test_soft_penalty_of_overlong_responses():
    """DAPO, equation 13, with a limit of 100 and a buffer of 20."""
    assert [overlong(n, 100, 20) for n in (10, 80, 85, 90, 100, 120)] == [0, 0, -0.25, -0.5, -1, -1]


def test_bad_rewards_are_refused(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("x = 1\n")
    for reward, message in [
        ([str(file)], "defines no function reward"), (["bleu"], "reward 'bleu': neither binary, official, vlm, format, tags, overlong nor a Python"),
        (["binary=x"], "reward 'binary=x': 'x' is no weight"), (["binary=nan"], "is no weight"), (["binary", "binary=2"], "given twice"), ([], "no reward"),
        (["overlong"], "needs max_tokens"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Grader(reward)
    with pytest.raises(ValueError, match="overlong_buffer=0 is outside"):
        Grader(["overlong"], max_tokens=10, overlong_buffer=0)


def test_truncated_responses_may_count():
    with Grader(n_workers=1, grade_truncated=True) as grader:
        assert grader.grade("", "2", "\\boxed{2} and", finished=False).correct


def test_a_users_function(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def reward(problem, response):\n    return len(response) / len(problem)\n")
    with Grader([str(file)]) as grader:
        assert grader.grade("abcd", None, "ab", True)[:2] == (0.5, False)
        assert grader.grade("abcd", None, "abcd", True)[:2] == (1.0, True)
        assert grader.grade("abcd", None, "abcd", False)[:2] == (0.0, False), (
            "a response that ran out of room is no answer"
        )


# ---- Labelled pairs
def test_counting_errors(tmp_path):
    file = tmp_path / "pairs.jsonl"
    pairs = [
        ("1/2", "0.5", True, "a"),
        (["3", "4"], "4", True, "a"),
        ("5", "5", False, "b"),
        ("5", "6", True, "b"),
    ]
    file.write_text(
        "\n".join(
            json.dumps(dict(zip(("gold", "pred", "expected", "group"), pair, strict=True)))
            for pair in pairs
        )
    )
    rows = count_errors(Pairs(str(file), workers=1))
    assert [(g, row["n"], row["errors"], row["false_accepts"]) for g, row in rows.items()] == [
        ("a", 2, 0, 0), ("b", 2, 2, 1), ("total", 4, 2, 1)
    ]  # fmt: skip
    command = [
        sys.executable,
        str(ROOT / "rewards.py"),
        str(file),
        "--json",
        str(tmp_path / "out.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "false accepts" in done.stdout and "50.000%" in done.stdout
    assert json.loads((tmp_path / "out.json").read_text())["total"]["errors"] == 2
    file.write_text('{"gold": "1", "pred": "1", "expected": true}\n{"gold": "1"}\n')
    with pytest.raises(ValueError, match=r"pairs.jsonl, line 2: KeyError\('pred'\)"):
        read_pairs(str(file))
