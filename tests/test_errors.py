"""An error of input is one line on every command; a bug, or any error with --traceback, is more."""

import re
import runpy
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from infra import errors

COMMANDS = {
    "train_rl.py": ("--resume", "nowhere"),
    "train_flow.py": ("--resume", "nowhere"),
    "eval.py": ("--compare", "nowhere", "nowhere"),
    "worlds/__main__.py": ("--folder", "."),
    "inspector.py": ("nowhere",),
    "run.py export": ("nowhere",),
    "run.py problems": ("nowhere",),
    "run.py report": ("nowhere",),
    "rewards.py": ("nowhere.jsonl",),
    "evals/report.py": ("nowhere",),
    "benchmarks/first_gpu.py": ("--checks", "nothing"),
    "benchmarks/grading.py": ("nowhere.jsonl",),
    "benchmarks/word_problems.py": ("--folder", "file"),
    "study/behaviour.py": ("nowhere",),
}
# Those that a command starts, and those of the course, which print what they teach
NO_COMMANDS = (
    *("benchmarks/peer_trl.py", "grading/worker.py", "infra/watch.py"),
    *("course/exercises/bug.py", "course/exercises/fall.py", "course/exercises/solutions/bug.py"),
    *("course/nano.py", "course/theory.py"),
)


@pytest.fixture
def command(monkeypatch, tmp_path, capfd):
    """Run a command in this process, in a folder with one file; return its code and stderr."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setattr("infra.runs.leave", sys.exit)  # os._exit would end the tests
    for folder in ("benchmarks", "study"):  # of the scripts there, which import each other
        monkeypatch.syspath_prepend(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")

    def call(name: str, *arguments: str) -> tuple[int, str]:
        script, *subcommand = name.split()
        monkeypatch.setattr(sys, "argv", [script, *subcommand, *arguments])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        return stopped.value.code, capfd.readouterr().err

    yield call
    signal.set_wakeup_fd(-1)  # or the command's thread would hear of signals of later tests
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", COMMANDS)
def test_an_error_of_input_is_one_line(command, name):
    code, said = command(name, *COMMANDS[name])
    assert code == 1
    assert said.startswith("error: ") and said.count("\n") == 1, said


@pytest.mark.parametrize("name", COMMANDS)
def test_the_traceback_that_is_asked_for(command, name):
    code, said = command(name, *COMMANDS[name], "--traceback")
    assert code == 1 and "Traceback (most recent call last)" in said


def test_every_command_shows_its_errors_so():
    commands = {}
    for file in ROOT.rglob("*.py"):
        name = file.relative_to(ROOT)
        text = file.read_text()
        is_ours = not {"tests", "runs", ".venv"} & set(name.parts)
        if is_ours and 'if __name__ == "__main__":' in text:
            commands[str(name)] = text
    others = {"rewards.py", *NO_COMMANDS}  # rewards.py runs grading/pairs.py
    for name, text in commands.items():
        is_shown = re.search(r"errors\.run\(|\blaunch\(|^    run\(", text, re.MULTILINE)
        assert is_shown or name in others, name
    assert others <= commands.keys()


def test_an_exit_of_a_users_file_is_an_error(command, tmp_path, world):
    """A reward that calls sys.exit() ended the run with code 0, as if it were complete."""
    file = tmp_path / "leaving.py"
    file.write_text(
        "from dense import DenseReward\n\nclass Reward(DenseReward):\n"
        "    def score(self, part):\n        raise SystemExit\n"
    )
    flags = ("--model", world.path("model"), "--data", world.path("train.jsonl"))
    flags += ("--template", "none", "--steps", "1", "--folder", str(tmp_path / "run"))
    code, said = command("train_rl.py", *flags, "--shaping", str(file))
    assert code == 1 and said.splitlines()[-1] == (
        f"error: {file}, line 5: sys.exit() would end the run as if it were complete; raise an error "
        "instead"
    )


def test_a_flag_that_does_not_exist_is_told_by_the_parser(command):
    code, said = command("train_rl.py", "--no-such-flag", "1")
    assert code == 2 and "no-such-flag" in said and "Traceback" not in said


def caught(work) -> Exception:
    """The error that a function raises."""
    with pytest.raises(Exception) as error:  # noqa: B017
        work()
    return error.value


def raise_from(source: str, file: str):
    """A function that runs source as the contents of a file."""
    return lambda: exec(compile(source, file, "exec"), {})


def wrap():
    try:
        torch.zeros(2) + torch.zeros(3)
    except RuntimeError as error:
        raise ValueError("the sizes differ") from error


def fail_an_assertion():
    raise AssertionError("never so")


def raise_a_type_error():
    raise TypeError("not this type")


def run_out_of_memory():
    raise MemoryError("lower --tokens-per-gpu\nor take --offload")


HERE = str(ROOT / "worlds" / "toy.py")
MESSAGES = {
    "raised": (raise_from("raise ValueError('wrong')", HERE), "error: wrong\n"),
    "wrapped": (wrap, "error: the sizes differ\n"),
    "of two lines": (run_out_of_memory, "error: lower --tokens-per-gpu or take --offload\n"),
    "without a message": (raise_from("raise ValueError", HERE), "error: ValueError\n"),
    "a file of the system": (
        lambda: Path("/nowhere").read_text(),
        "error: [Errno 2] No such file or directory: '/nowhere'\n",
    ),
}
BUGS = {
    "of torch": lambda: torch.zeros(2) + torch.zeros(3),
    "of Python": lambda: int("x"),
    "an assertion": fail_an_assertion,
    "a type": raise_a_type_error,
    "of a library": raise_from("raise ValueError('theirs')", torch.__file__),
    "of no file": raise_from("raise ValueError('text')", "<string>"),
}


@pytest.mark.parametrize("kind", MESSAGES)
def test_what_is_shown_of_an_error_of_input(kind, capsys):
    work, expected = MESSAGES[kind]
    errors.show(caught(work))
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("kind", BUGS)
def test_a_bug_shows_where_it_is(kind, capsys):
    error = caught(BUGS[kind])
    errors.show(error)
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and type(error).__name__ in said
