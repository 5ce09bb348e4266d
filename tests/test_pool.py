"""Worker processes: their deadline, what they may do, what becomes of hostile answers; labelled pairs."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT
from test_answers import HOSTILE

from grading.answers import MAX_LENGTH
from grading.pairs import Settings, count_errors_by_group, read_pairs
from grading.pool import Pool
from grading.worker import MEMORY_LIMIT

DEADLINE = 1.0  # seconds, where it is missed on purpose; without math-verify 0.01 are needed
PATIENCE = 120.0  # seconds, where an answer is to be compared, on however busy a machine


@pytest.fixture(scope="module")
def pool():
    with Pool(n_workers=2, deadline=PATIENCE) as pool:
        yield pool


def judge_all(pool: Pool, gold: str, predictions: list[str]) -> list[str]:
    return pool.map(lambda prediction: pool.judge(gold, prediction), predictions)


# ---- Verdicts
def test_any_of_several_golds(pool):
    assert pool.equal(["3", "\\sqrt{4}"], "2")
    assert not pool.equal(["3", "4"], "2")


def test_plain_integers_start_no_process():
    with Pool(n_workers=1) as pool:
        assert pool.equal("025", "25")
        assert not pool.equal("4", "5")
        assert not pool.equal("", "")
        assert not pool.equal("x", "")
        assert pool.workers[0].process is None


def test_repeated_pairs_are_compared_once():
    with Pool(n_workers=1) as pool:
        assert pool.equal("2", "\\sqrt{4}")
        pool.workers[0].stop()
        assert pool.equal("2", "\\sqrt{4}")
        assert pool.workers[0].process is None


def test_comparing_from_a_thread(pool):
    verdicts = []

    def compare():
        verdicts.extend(judge_all(pool, "\\frac{1}{3}", [r"\frac{2}{6}", r"\sum_{i=1}^{3} i"]))

    thread = threading.Thread(target=compare)
    thread.start()
    thread.join()
    assert verdicts == ["right", "wrong"]


# ---- Deadlines
def test_hostile_answers_cost_a_deadline_and_no_more():
    """Between good answers: order, verdicts and the pool survive."""
    # beyond the reader, so that math-verify has to try
    lost = [
        r"\sum_{i=1}^{3} 9^{9^{9^{9^9}}}",
        r"\sum_{i=1}^{3} (9!)!!",
        r"\int " + r"\frac{" * 50 + "x" + "}{2}" * 50,
        r"\lim x^{" * 60,
    ]
    too_long = ["9" * 100_000, "x" * 2**20, "{" * 50_000]
    predictions = ["\\sqrt{8}", *HOSTILE, *lost, *too_long, "\\sqrt{8}", "2^{3/2}"]
    assert len(predictions) > 35
    with Pool(n_workers=2, deadline=DEADLINE) as pool:
        verdicts = judge_all(pool, "2\\sqrt{2}", predictions)
    are_right = [verdict == "right" for verdict in verdicts]
    assert are_right == [True, *[False] * (len(predictions) - 3), True, True]
    assert pool.counts["capped"] == sum(len(prediction) > MAX_LENGTH for prediction in predictions)


def test_a_deadline_is_kept_and_the_next_answer_is_compared():
    with Pool(n_workers=1, deadline=DEADLINE) as pool:
        assert pool.judge("3", r"\sum_{i=1}^{3} (9!)!!") == "timeout"
        assert pool.counts["timeout"] == 1
        assert judge_all(pool, "3", ["\\sqrt{9}+0", "\\sqrt{81}"]) == ["right", "wrong"]
        os.kill(pool.workers[0].process.pid, signal.SIGKILL)
        assert pool.equal("2", "\\sqrt{4}+0"), "a process that died is replaced"


def test_a_pair_that_timed_out_is_compared_once_more():
    """One overloaded moment marked the pair wrong for the whole run."""
    with Pool(n_workers=1, deadline=DEADLINE) as pool:
        assert pool.equal("2", "\\sqrt{4}"), "the process runs"
        os.kill(pool.workers[0].process.pid, signal.SIGSTOP)  # an overloaded moment
        assert pool.judge("3", "\\sqrt{9}") == "right"
        assert not pool.counts


class FakeWorker:
    """A worker without a process."""

    def __init__(self, ask):
        self.ask = ask

    def stop(self):
        pass


def replace_workers(pool: Pool, ask) -> None:
    """Let all comparisons of a pool call ask(gold, prediction, deadline)."""
    for _ in pool.workers:
        pool.idle_workers.get()
    pool.workers = [FakeWorker(ask) for _ in pool.workers]
    for worker in pool.workers:
        pool.idle_workers.put(worker)


def test_only_verdicts_are_remembered():
    replies = iter(["timeout", "timeout", "crashed", "right"])
    with Pool(n_workers=1) as pool:
        replace_workers(pool, lambda *_: next(replies))
        verdicts = [pool.judge("x", "y") for _ in range(4)]
        assert verdicts == ["timeout", "wrong", "right", "right"]
        assert pool.counts == {"timeout": 1, "crashed": 1}


def test_the_oldest_verdicts_are_forgotten(monkeypatch):
    monkeypatch.setattr("grading.pool.N_REMEMBERED", 2)
    with Pool(n_workers=1) as pool:
        for prediction in "1234":
            pool.judge("1", prediction)
        assert list(pool.verdicts) == [("1", "3"), ("1", "4")]


def test_a_pair_is_compared_once_more_while_no_other_is():
    lock = threading.Lock()
    n_running = 0
    first = set()
    running_beside_second = []

    def ask(_, prediction, __):
        nonlocal n_running
        with lock:
            n_running += 1
            is_second = prediction in first
            first.add(prediction)
        for _ in range(20):
            time.sleep(0.005)
            if is_second:
                running_beside_second.append(n_running)
        with lock:
            n_running -= 1
        return "right" if is_second else "timeout"

    with Pool(n_workers=4) as pool:
        replace_workers(pool, ask)
        verdicts = judge_all(pool, "x", list("abcdefgh"))
    assert verdicts == ["right"] * 8
    assert set(running_beside_second) == {1}


def test_a_timeout_is_told_unless_another_gold_is_met(pool, monkeypatch):
    verdicts = {"slow": "timeout", "long": "capped", "no": "wrong", "yes": "right"}
    monkeypatch.setattr(pool, "compare_once", lambda gold, _: verdicts[gold])
    pool.counts.clear()
    assert pool.judge(["slow", "no"], "2") == "timeout"
    assert pool.judge(["no", "long"], "2") == "wrong"
    assert pool.counts == {"timeout": 1, "capped": 1}
    assert pool.judge(["slow", "yes"], "2") == "right"
    assert pool.counts == {"timeout": 1, "capped": 1}


def test_lines_that_come_together_are_read_one_by_one():
    """A parent that comes late finds `loading`, `loaded` and the verdict in the pipe."""
    with Pool(n_workers=1, deadline=PATIENCE) as pool:
        assert pool.equal("2", "\\sqrt{4}")
        worker = pool.workers[0]
        read_reply = worker.read_reply

        def read_late(deadline):
            time.sleep(1)
            return read_reply(deadline)

        worker.read_reply = read_late
        assert pool.equal("6", r"\sum_{i=1}^{3} i")
        assert pool.equal("7", r"\sum_{i=1}^{3} i + 1")
        assert not pool.counts


def test_a_deadline_must_be_positive():
    with pytest.raises(ValueError, match="deadline=0: expected a positive number of seconds"):
        Pool(deadline=0)


# ---- What a worker may do
def test_the_memory_of_workers_is_bounded(pool):
    assert pool.equal("2", "\\sqrt{4}+1-1")
    worker = next(worker for worker in pool.workers if worker.process is not None)
    limits = Path(f"/proc/{worker.process.pid}/limits").read_text().splitlines()
    (address_space,) = [line for line in limits if line.startswith("Max address space")]
    assert address_space.split()[3] == str(MEMORY_LIMIT)


def test_workers_are_confined():
    """Bounded memory; no file to write, no program, no network."""
    script = """
import os, socket, subprocess, sys
from grading.worker import confine

confine(2**30)
attempts = [
    lambda: open("hacked", "w"),
    lambda: os.open("hacked", os.O_CREAT | os.O_WRONLY),
    lambda: os.system("true"),
    lambda: subprocess.run(["true"]),
    lambda: socket.create_connection(("127.0.0.1", 9)),
    lambda: os.remove("x"),
]
for attempt in attempts:
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
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.distributed
def test_grading_under_torchrun(tmp_path):
    """From another folder: a worker needs no more than the repository's root."""
    script = tmp_path / "grade.py"
    script.write_text(
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from grading import Pool\n"
        "with Pool(n_workers=1) as pool:\n"
        r"    assert pool.equal('6', r'\sum_{i=1}^{3} i') and not pool.equal('2', '\\sqrt{5}')"
    )
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [sys.executable, *launcher, str(script), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


# ---- Labelled pairs
@pytest.fixture
def pairs_file(tmp_path):
    rows = [
        {"gold": "1/2", "pred": "0.5", "expected": True, "group": "a"},
        {"gold": ["3", "4"], "pred": "4", "expected": True, "group": "a"},
        {"gold": "5", "pred": "5", "expected": False, "group": "b"},
        {"gold": "5", "pred": "6", "expected": True, "group": "b"},
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


def test_counting_errors(pairs_file):
    counts = count_errors_by_group(Settings(str(pairs_file), workers=1))
    figures = []
    for group, count in counts.items():
        figures.append((group, count.n, count.errors, count.false_accepts, count.timeouts))
    assert figures == [("a", 2, 0, 0, 0), ("b", 2, 2, 1, 0), ("total", 4, 2, 1, 0)]


def test_the_command_that_counts_errors(pairs_file, tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, str(ROOT / "rewards.py"), str(pairs_file), "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "false accepts" in done.stdout and "50.000%" in done.stdout
    total = json.loads(out.read_text())["total"]
    assert list(total) == ["n", "errors", "false_accepts", "timeouts", "seconds"]
    assert total["errors"] == 2


def test_the_grader_makes_no_error_on_the_pairs_of_the_tests(tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, "rewards.py", "tests/pairs.jsonl", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    groups = json.loads(out.read_text())
    assert set(groups) == {"identity", "rewriting", "surface", "wrong", "type", "total"}
    assert min(count["n"] for count in groups.values()) >= 50
    total = groups["total"]
    assert (total["n"], total["errors"], total["false_accepts"]) == (300, 0, 0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"gold": "1"}', r"pairs.jsonl, line 2: KeyError\('pred'\); expected an object with"),
        ("5", "pairs.jsonl, line 2: TypeError"),
        ("{", "pairs.jsonl, line 2: JSONDecodeError"),
        ('{"gold": 1, "pred": "1", "expected": true}', "line 2: gold is 1; expected a text or a"),
        ('{"gold": [1], "pred": "1", "expected": true}', r"line 2: gold is \[1\]; expected a text"),
        ('{"gold": "1", "pred": "1", "expected": true, "group": [1]}', r"line 2: group is \[1\];"),
        ("[" * 20_000, "line 2: RecursionError"),
        ("\udcff", "line 2: UnicodeDecodeError"),
        ('{"gold": "1", "pred": 1, "expected": true}', "line 2: pred is 1; expected a text"),
        ('{"gold": "1", "pred": "1", "expected": 1}', "line 2: expected is 1; expected true or"),
    ],
)
def test_bad_pairs_name_their_line(tmp_path, line, message):
    file = tmp_path / "pairs.jsonl"
    whole = '{"gold": "1", "pred": "1", "expected": true}\n'
    file.write_text(whole + line, errors="surrogateescape")
    with pytest.raises(ValueError, match=message):
        read_pairs(str(file))


def test_an_empty_file_has_no_pairs(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("")
    with pytest.raises(ValueError, match="pairs.jsonl is empty"):
        read_pairs(str(file))


def test_a_process_with_more_than_1024_files_open():
    """Regression: select() refused the answer of a worker in a long test session."""
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        with Pool(1) as pool:
            assert pool.judge("x^2 + 1", "1 + x^2") == "right"
    finally:
        for file in opened:
            os.close(file)
