"""The sparse world: demonstrations that give up, labels of steps, the perfect process reward."""

import random
from pathlib import Path

import pytest
from conftest import ROOT, read_lines

import run as runs
import toy
import train_rl
from rewards import Grader

PROBLEM = "7 +5 *3 -4>"
RIGHT = r"7+5=2,2*3=6,6-4=2. \boxed{2}"
PROCESS_REWARD = ROOT / "benchmarks" / "process_reward.py"


def labels(response: str, problem: str = PROBLEM) -> list[tuple[str, bool]]:
    steps = toy.label_steps(problem, response)
    return [(response[step.start : step.end], step.is_right) for step in steps]


def test_steps_of_a_right_response():
    assert labels(RIGHT) == [("7+5=2", True), ("2*3=6", True), ("6-4=2", True)]


@pytest.mark.parametrize(
    "response, right",
    [
        (r"7+5=2,2*3=6. \boxed{6}", [True, True]),  # gave up
        (r"7+5=2,2*3=5,5-4=1. \boxed{1}", [True, False, False]),  # a slip and what follows from it
        (r"7+5=4,4*3=2,2-4=8. \boxed{8}", [False, False, False]),
        (r"7+5=2,2*3=5,6-4=2. \boxed{2}", [True, False, True]),  # a slip, then back at the truth
        (r"2*3=6,6-4=2. \boxed{2}", [False, False]),  # an operation left out
        (r"7+5=2,2*3=6,6-4=2,2+5=7. \boxed{7}", [True, True, True, False]),  # one too many
        (r"7+5=2,2*3", [True, False]),  # cut
        (r"\boxed{2}", []),
        (r"7+5=2\boxed{2} and 2*3=6,6-4=2", [True]),  # nothing counts after the box
        ("", []),
    ],
)
def test_labels(response, right):
    assert [is_right for _, is_right in labels(response)] == right


def test_back_at_the_true_value_by_chance():
    """8 * 5 = 0 = 2 * 5: the step starts from a wrong value, the next from the true one."""
    assert labels("7+5=8,8*5=0,0+4=4", "7 +5 *5 +4>") == [
        ("7+5=8", False),
        ("8*5=0", False),
        ("0+4=4", True),
    ]


def test_expert_solutions_are_right_in_every_step():
    rng = random.Random(0)
    for _ in range(50):
        problem = toy.make_problem(rng, shortest=6)
        solution, _ = toy.solve(problem)
        steps = toy.label_steps(problem, solution)
        assert 6 <= len(steps) == problem.count(" ") <= 8
        assert all(step.is_right for step in steps)


def test_giving_up():
    """From any depth on the demonstrator stops with chance 0.9 before each step, and guesses."""
    rng = random.Random(0)
    problem = "7 +5 -3 -4 +2 +2 +2 +2>"
    demonstrations = [toy.give_up(problem, rng) for _ in range(8000)]
    for n_given in range(7):
        parts = [learnt for given, learnt in demonstrations if given.count("=") == n_given]
        assert len(parts) / 8000 == pytest.approx(1 / 8, abs=0.02)
        stopped = sum("=" not in learnt for learnt in parts) / len(parts)
        assert stopped == pytest.approx(0.9, abs=0.05)
    guesses = [learnt for given, learnt in demonstrations if not given and "=" not in learnt]
    assert set(guesses) == {rf"\boxed{{{digit}}}{toy.EOS}" for digit in range(10)}
    right = sum(guess == rf"\boxed{{7}}{toy.EOS}" for guess in guesses) / len(guesses)
    assert right == pytest.approx(0.1, abs=0.05)


def test_a_demonstration_that_does_not_give_up_is_a_solution(monkeypatch):
    monkeypatch.setattr(toy, "GIVES_UP", 0.0)
    monkeypatch.setattr(toy, "SLIP", 0.0)
    rng = random.Random(0)
    demonstrations = {toy.give_up(PROBLEM, rng) for _ in range(100)}
    assert demonstrations == {
        ("", f"{RIGHT}{toy.EOS}"),
        ("7+5=2", rf",2*3=6,6-4=2. \boxed{{2}}{toy.EOS}"),
        ("7+5=2,2*3=6", rf",6-4=2. \boxed{{2}}{toy.EOS}"),
        ("7+5=2,2*3=6,6-4=2", rf". \boxed{{2}}{toy.EOS}"),
    }


def test_no_operations_no_steps():
    assert toy.solve("7") == (r"\boxed{7}", "7")


def test_only_long_problems_are_given_up_and_only_after_the_skill():
    rng = random.Random(0)
    short = "7 +5 *3 -4 +2 +2>"
    long = "7 +5 *3 -4 +2 +2 +2>"

    def mean_steps(problem: str, habit: toy.Habit | None) -> float:
        demonstrations = [toy.demonstrate(problem, rng, habit) for _ in range(200)]
        return sum(learnt.count("=") for _, learnt in demonstrations) / 200

    assert mean_steps(short, "giving up") == 5
    assert mean_steps(long, None) == 6
    assert mean_steps(long, "giving up") < 2


def test_problems_of_the_sparse_world_are_long():
    world = toy.WORLDS["toy-sparse"]
    for problems in toy.make_problems(world, random.Random(0)):
        assert {problem.count(" ") for problem in problems} == {6, 7, 8}


def test_world_file_tells_the_worlds_apart():
    assert toy.settings_of(toy.WORLDS["toy-sparse"]) != toy.settings_of(toy.WORLDS["toy"])


def test_process_reward_beside_the_verdict():
    """The share of the chain that is right; `correct` stays the verdict on the answer."""
    expected = {
        RIGHT: (1.0, 1.0),
        r"\boxed{2}": (0.0, 1.0),  # luck
        r"7+5=2,2*3=6. \boxed{6}": (2 / 3, 0.0),
        r"7+5=2,2*3=6,6-4=2. \boxed{3}": (1.0, 0.0),
    }
    with Grader(("binary", str(PROCESS_REWARD)), n_workers=1) as grader:
        for response, (share, is_correct) in expected.items():
            verdict = grader.grade(PROBLEM, "2", response, finished=True)
            assert verdict.parts == {"binary": is_correct, "process_reward": pytest.approx(share)}
            assert verdict.correct == bool(is_correct)
            assert verdict.reward == pytest.approx(share + is_correct)


def test_process_reward_in_a_run_from_another_folder(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    preset = runs.change(train_rl.Config(), **toy.PRESETS["train_rl"]["toy-sparse"])
    config = runs.change(
        preset,
        model=world.path("model"),
        data=world.path("train.jsonl"),
        reward=("binary", str(PROCESS_REWARD)),
        shaping="none",
        engine="torch",
        prompts=2,
        group_size=2,
        train_batch=4,
        steps=1,
        max_tokens=16,
        folder=str(folder),
    )
    train_rl.main(config)
    (metrics,) = read_lines(Path(folder) / "metrics.jsonl")
    assert metrics["correct"] == metrics["reward/binary"]
    assert 0 <= metrics["reward/process_reward"] <= 1
