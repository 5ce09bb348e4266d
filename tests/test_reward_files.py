"""Reward files of the user: their names, what they return, that fail, end the process or never end."""

import math
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from rewards import Grader


def write(folder, source: str, name: str = "mine.py") -> str:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source)
    return str(file)


def grade(path: str):
    """Grade an episode of a problem with an id, as training does."""
    problem = SimpleNamespace(id="p17", text="What is 2?", answer="2")
    episode = SimpleNamespace(text="two", finish_reason="stop", response_ids=[0])
    with Grader([path], n_workers=1) as grader:
        (verdict,) = grader.grade_all([problem], [episode])
    return verdict


# ---- Names
@pytest.mark.parametrize("name", ["binary", "vlm", "official", "format", "tags", "overlong"])
def test_a_file_named_like_a_part_is_a_file(tmp_path, monkeypatch, name):
    """It was taken for the part: its value was compared, or the grader refused both."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "def reward(problem, response):\n    return 0.5\n", f"{name}.py")
    others = ["vlm"] if name == "tags" else ["binary"]
    for path in (f"{name}.py", f"./{name}.py=1", str(tmp_path / f"{name}.py")):
        with Grader([path], n_workers=1) as grader:
            verdict = grader.grade("", "2", "so \\boxed{2} $2$", True)
            assert (verdict.reward, verdict.correct) == (0.5, False)
            assert verdict.parts == {f"{name}.py": 0.5}
    for other in others:
        with Grader([f"{name}.py=2", other], n_workers=1) as grader:
            verdict = grader.grade("", "2", "so \\boxed{2}", True)
            assert verdict.parts == {f"{name}.py": 0.5, other: 1.0}
            assert (verdict.reward, verdict.correct) == (2.0, True)


def test_a_bare_name_is_the_part_whatever_files_there_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "binary").write_text("def reward(problem, response):\n    return 7\n")
    write(tmp_path, "def reward(problem, response):\n    return 7\n", "binary.py")
    with Grader(["binary"], n_workers=1) as grader:
        assert grader.grade("", "2", "\\boxed{2}", True).parts == {"binary": 1.0}


def test_a_path_may_hold_an_equals_sign(tmp_path):
    path = write(tmp_path / "lr=1", "def reward(problem, response):\n    return 3\n", "a=b.py")
    for text, reward in ((path, 3.0), (f"{path}=0.5", 1.5)):
        with Grader([text]) as grader:
            assert grader.grade("", "2", "x", True).reward == reward


@pytest.mark.parametrize("weight", ["", "x", "nan", "inf", "-inf", "1e30", "1e400"])
def test_a_weight_is_a_number_of_some_size(weight):
    with pytest.raises(ValueError, match=f"reward 'binary={weight}': '{weight}' is no weight"):
        Grader([f"binary={weight}"])


# ---- What they return
@pytest.mark.parametrize(
    "result",
    [
        "None", "'1'", "b'1'", "float('nan')", "float('inf')", "1e30", "10**400", "[1.0]", "1j",
        "object", "{}", "{'text': 'x'}", "{'reward': None}", "{'reward': 1, 'text': 2}",
        "{1: 2, 'reward': 1}", "__import__('torch').ones(2)",
        "__import__('torch').tensor(float('nan'))", "__import__('numpy').zeros(3)", "(1.0, 'x')",
    ],
)  # fmt: skip
def test_what_is_no_number_is_named_with_the_file_and_the_problem(tmp_path, result):
    path = write(tmp_path, f"def reward(problem, response):\n    return {result}\n")
    with pytest.raises(ValueError, match="mine.py: reward returned") as caught:
        grade(path)
    message = str(caught.value)
    assert "expected a finite number" in message
    assert "(on problem 'p17', 'What is 2?')" in message
    assert len(message) < 1000


@pytest.mark.parametrize(
    ("result", "reward"),
    [("True", 1), ("torch.tensor(0.25)", 0.25), ("numpy.float32(0.5)", 0.5), ("-1e9", -1e9)],
)
def test_what_is_a_number_counts(tmp_path, result, reward):
    source = f"import numpy, torch\ndef reward(problem, response):\n    return {result}\n"
    value = grade(write(tmp_path, source)).reward
    assert value == reward
    assert torch.tensor([value, 0.0]).std().isfinite() and math.isfinite(value)


def test_a_result_that_cannot_be_shown_is_an_error_of_its_file(tmp_path):
    source = """
class Odd:
    def __repr__(self):
        return 1 / 0

def reward(problem, response):
    return Odd()
"""
    with pytest.raises(ValueError, match="mine.py, line 4: ZeroDivisionError: division by zero"):
        grade(write(tmp_path, source))


# ---- Those that fail, or end the process
FAILURES = [
    ("1 / 0", "ZeroDivisionError: division by zero"),
    ("{}['x']", "KeyError: 'x'"),
    ("undefined", "NameError: name 'undefined' is not defined"),
    ("int('x' * 9999)", "ValueError: invalid literal"),
    ("__import__('sys').exit()", "SystemExit: "),
    ("__import__('sys').exit(0)", "SystemExit: 0"),
    ("exit('done')", "SystemExit: done"),
    ("__import__('json').loads('{')", "JSONDecodeError: "),
    ("(_ for _ in ()).throw(MemoryError)", "MemoryError: "),
]


@pytest.mark.parametrize(("expression", "message"), FAILURES)
def test_a_file_that_fails_is_named_with_its_line(tmp_path, expression, message):
    """What failed was shown at a line of the grader, and sys.exit() ended the run with code 0."""
    path = write(tmp_path, f"def reward(problem, response):\n    x = 1\n    return {expression}\n")
    expected = rf"mine.py, line 3: {re.escape(message)}.*\(on problem 'p17', 'What is 2\?'\)"
    with pytest.raises(ValueError, match=expected) as caught:
        grade(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize(("expression", "message"), FAILURES)
def test_a_file_that_fails_at_its_import_is_named_with_its_line(tmp_path, expression, message):
    path = write(tmp_path, f"import os\n\n{expression}\n")
    expected = rf"mine.py, line 3: {re.escape(message)}.*\(at its import\)"
    with pytest.raises(ValueError, match=expected):
        Grader([path])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1\ndef reward(:\n", "mine.py, line 2: SyntaxError: invalid syntax"),
        ("import no_such_module\n", "mine.py, line 1: ModuleNotFoundError: No module named 'no_s"),
        ("\x00", "mine.py: (SyntaxError|ValueError): source code string cannot contain null bytes"),
        ("", "mine.py defines no function reward"),
        ("reward = 1\n", "mine.py defines no function reward"),
    ],
)
def test_a_file_that_is_no_reward_is_named(tmp_path, source, message):
    with pytest.raises(ValueError, match=message):
        Grader([write(tmp_path, source)])


def test_a_failure_below_the_file_is_named_by_the_line_of_the_file(tmp_path):
    source = "import json\ndef reward(problem, response):\n    return json.loads(response)\n"
    with pytest.raises(ValueError, match="mine.py, line 3: JSONDecodeError: Expecting value"):
        grade(write(tmp_path, source))


# ---- Those that never end
@pytest.mark.parametrize(
    ("body", "occasion"),
    [
        # with the interpreter held, so that no thread could say it
        ("__import__('re').match('(a+)+$', 'a' * 60 + 'b')", "on problem 'p17', 'What is 2?'"),
        ("__import__('time').sleep(1e6)", "on problem 'p17', 'What is 2?'"),
        ("", "at its import"),
    ],
)
def test_a_file_that_never_ends_is_named_while_it_runs(tmp_path, body, occasion):
    if body:
        path = write(tmp_path, f"def reward(problem, response):\n    return {body}\n")
    else:
        path = write(tmp_path, "while True: pass\n")
    script = f"""
from types import SimpleNamespace
from rewards import Grader
grader = Grader([{path!r}], n_workers=1, patience=0.1)
problem = SimpleNamespace(id="p17", text="What is 2?", answer="2")
episode = SimpleNamespace(text="two", finish_reason="stop", response_ids=[0])
grader.grade_all([problem], [episode])
"""
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        try:
            first, second = process.stderr.readline(), process.stderr.readline()
        finally:
            process.kill()
    assert first == (
        f"{path}, {occasion}: not done after 0.1 s; "
        "this process waits for it; a second Ctrl-C ends it\n"
    )
    assert second == first.replace("0.1 s", "0.2 s")


def test_a_file_that_comes_to_an_end_is_not_named(tmp_path, capfd):
    path = write(tmp_path, "def reward(problem, response):\n    return 1\n")
    with Grader([path], patience=1e6) as grader:
        for _ in range(100):
            grader.grade("", "2", "x", True)
        watcher = grader.watch.process
    assert watcher.returncode == 0
    assert capfd.readouterr().err == ""


# ---- Golds that nothing meets
@pytest.mark.parametrize("gold", [None, "", " ", "\n", [], [""], ["", " "]])
@pytest.mark.parametrize("reward", ["binary", "official", "vlm"])
def test_an_empty_gold_is_never_met(gold, reward):
    for response in ("\\boxed{}", "\\boxed{ }", "<answer></answer>", "\\boxed{2}", ""):
        with Grader([reward], n_workers=1) as grader:
            verdict = grader.grade("", gold, response, True)
            assert (verdict.reward, verdict.correct) == (0.0, False)
            assert grader.pool.workers[0].process is None, "there is nothing to compare"
