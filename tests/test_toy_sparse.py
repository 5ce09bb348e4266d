"""The sparse worlds: demonstrations with a habit, labels of steps, the perfect process reward."""

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, read_lines

import train_rl
from infra.settings import change
from rewards import Grader
from worlds import toy

PROBLEM = "7 +5 *3 -4>"
RIGHT = r"7+5=2,2*3=6,6-4=2. \boxed{2}"
PROCESS_REWARD = ROOT / "study" / "rewards" / "process_reward.py"


def labels(response: str, problem: str = PROBLEM) -> list[tuple[str, bool]]:
    steps = toy.label_steps(problem, response)
    return [(response[step.start : step.end], step.is_right) for step in steps]


def test_steps_of_a_right_response():
    assert labels(RIGHT) == [("7+5=2", True), ("2*3=6", True), ("6-4=2", True)]


@pytest.mark.parametrize(
    "response, right",
    [
        (r"7+5=2,2*3=6. \boxed{6}", [True, True]),  # stopped too early
        (r"7+5=2,2*3=5,5-4=1. \boxed{1}", [True, False, True]),  # a slip and what follows from it
        (r"7+5=2,2+0=2,2-4=8. \boxed{8}", [True, False, True]),  # an idle step
        (r"7+5=2,2*3=5,6-4=2. \boxed{2}", [True, False, False]),  # a slip, and not what follows
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


def test_expert_solutions_are_right_in_every_step():
    rng = random.Random(0)
    for _ in range(50):
        problem = toy.make_problem(rng, shortest=6)
        solution, _ = toy.solve(problem)
        steps = toy.label_steps(problem, solution)
        assert 6 <= len(steps) == problem.count(" ") <= 8
        assert all(step.is_right for step in steps)


def operations_of(problem: str) -> list[str]:
    return problem.rstrip(">").split()[1:]


def test_idling():
    """Each operation is replaced by the addition of zero with chance 0.6, wherever it stands."""
    rng = random.Random(0)
    problem = "7 +5 -3 -4 +2 +2 +2 +2>"
    idle = [operations_of(toy.misread(problem, rng, "idling", 0.6)) for _ in range(4000)]
    for k, operation in enumerate(["+5", "-3", "-4", "+2", "+2", "+2", "+2"]):
        assert {operations[k] for operations in idle} == {"+0", operation}
        share = sum(operations[k] == "+0" for operations in idle) / 4000
        assert share == pytest.approx(0.6, abs=0.03)


def test_steps_that_idle_are_well_calculated_and_wrong(monkeypatch):
    monkeypatch.setattr(toy, "SLIP", 0.0)
    solution = toy.demonstrate("7 +5 *3 -4 +2 +2 +2>", random.Random(0), "idling", 1.0)
    assert solution == rf"{','.join(['7+0=7'] * 6)}. \boxed{{7}}{toy.EOS}"
    assert not any(right for _, right in labels(solution, "7 +5 *3 -4 +2 +2 +2>"))


def test_repeating():
    """Each operation but the first is replaced by what was done before with chance 0.75."""
    rng = random.Random(0)
    problem = "7 +5 -3 -4 +2 +6 +8>"
    read = [operations_of(toy.misread(problem, rng, "repeating", 0.75)) for _ in range(4000)]
    assert {operations[0] for operations in read} == {"+5"}
    for k, own in enumerate(operations_of(problem)[1:], start=1):
        assert all(operations[k] in (own, operations[k - 1]) for operations in read)
        share = sum(operations[k] == operations[k - 1] for operations in read) / 4000
        assert share == pytest.approx(0.75, abs=0.03)


def test_a_step_that_repeats_is_well_formed_well_calculated_and_wrong(monkeypatch):
    monkeypatch.setattr(toy, "SLIP", 0.0)
    problem = "7 +5 *3 -4 +2 +6 +8>"
    solution = toy.demonstrate(problem, random.Random(0), "repeating", 1.0)
    assert solution == rf"7+5=2,2+5=7,7+5=2,2+5=7,7+5=2,2+5=7. \boxed{{7}}{toy.EOS}"
    assert [right for _, right in labels(solution, problem)] == [True] + [False] * 5


def test_no_factor_of_the_sparse_world_merges_values():
    """So a wrong value stays wrong, and outcomes say nothing of how many steps were right."""
    rng = random.Random(0)
    operations = {toy.make_operation(rng, "+-*", invertible=True) for _ in range(2000)}
    assert {operation for operation in operations if operation[0] == "*"} == {"*3", "*7", "*9"}
    for operation in operations:
        results = {toy.calculate(value, operation[0], int(operation[1])) for value in range(10)}
        assert len(results) == 10


def test_only_long_problems_are_idled_in_and_only_after_the_skill():
    rng = random.Random(0)
    short = "7 +5 *3 -4 +2 +2>"
    long = "7 +5 *3 -4 +2 +2 +2>"

    def n_idle(problem: str, habit: toy.Habit | None) -> int:
        demonstrations = [toy.demonstrate(problem, rng, habit, 0.6) for _ in range(100)]
        return sum(solution.count("+0") for solution in demonstrations)

    assert n_idle(short, "idling") == 0
    assert n_idle(long, None) == 0
    assert n_idle(long, "idling") > 300
    world = toy.WORLDS["toy-sparse"]
    assert toy.habit_at(world, 0) is None
    assert toy.habit_at(world, world.steps - 1) == "idling"


def test_problems_of_the_sparse_world_are_long():
    world = toy.WORLDS["toy-sparse"]
    for problems in toy.make_problems(world, random.Random(0)):
        assert {problem.count(" ") for problem in problems} == {6, 7, 8}


def test_world_file_tells_the_worlds_apart():
    settings = [toy.settings_of(world) for world in toy.WORLDS.values()]
    assert all(settings.count(each) == 1 for each in settings)


def test_the_file_of_an_old_world_is_what_it_was():
    """A setting that came later is not in it: folders and figures from before stay valid."""
    sparse = toy.settings_of(toy.WORLDS["toy-sparse"])
    before = {"folder", "steps", "batch_size", "lr", "hidden_size", "n_layers", "n_train"}
    before |= {"n_test", "n_expert", "seed", "images", "shortest", "habit", "invertible"}
    assert sparse.keys() == before | {"hasty", "slip", "idles", "long", "skill"}
    assert (sparse["idles"], sparse["skill"]) == (0.6, 0.7)
    assert toy.settings_of(toy.WORLDS["toy"]).keys() == before | {"hasty", "slip"}


def test_experts_of_the_world_beyond_know_short_problems_alone():
    small = replace(toy.WORLDS["toy-beyond"], n_train=50, n_test=20, n_expert=60)
    train, test, expert = toy.make_problems(small, random.Random(0))
    assert {problem.count(" ") for problem in expert} == {3, 4, 5}
    assert {problem.count(" ") for problem in train + test} == {6, 7, 8}
    assert (len(train), len(test), len(expert)) == (50, 20, 60)
    assert len({*train, *test, *expert}) == 130


def test_expert_problems_are_none_of_the_others_where_lengths_meet():
    small = toy.World(shortest=1, expert_longest=1, n_train=500, n_test=100, n_expert=40)
    train, test, expert = toy.make_problems(small, random.Random(0))
    assert {problem.count(" ") for problem in expert} == {1}
    assert not {*expert} & {*train, *test}


def test_wrong_expert_solutions(tmp_path):
    """A share of them ends with a wrong answer, beside which the right one stands."""
    world = replace(toy.WORLDS["toy-content"], expert_wrong=0.25)
    rng = random.Random(0)
    problems = [toy.make_problem(rng) for _ in range(800)]
    toy.write_problems(world, problems, tmp_path / "expert.jsonl", rng, world.expert_wrong)
    rows = read_lines(tmp_path / "expert.jsonl")
    wrong = [row for row in rows if row["solution"] != toy.solve(row["problem"])[0]]
    assert len(wrong) / len(rows) == pytest.approx(0.25, abs=0.05)
    wrong_steps = {True: [], False: []}  # shares, by whether the problem is long
    for row in rows:
        assert row["answer"] == toy.solve(row["problem"])[1]
        assert row["solution"].endswith(rf"\boxed{{{row['answer']}}}") == (row not in wrong)
    for row in wrong:
        steps = labels(row["solution"], row["problem"])
        share = sum(not right for _, right in steps) / len(steps)
        wrong_steps[row["problem"].count(" ") >= toy.LONG].append(share)
    of_habit, of_slips = (wrong_steps[is_long] for is_long in (True, False))
    assert min(of_habit + of_slips) > 0
    assert sum(of_habit) / len(of_habit) > 0.5
    assert sum(of_slips) / len(of_slips) < 0.4


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
    preset = change(train_rl.Config(), **toy.PRESETS["train_rl"]["toy-sparse"])
    config = change(
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


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ({"steps": 0}, "--steps=0: expected a whole number from 1"),
        ({"steps": 10}, "--steps=10: expected any number but that"),
        ({"batch_size": 1}, "--batch-size=1: expected a whole number from 2"),
        ({"lr": math.nan}, "--lr=nan: expected a number above 0"),
        ({"hidden_size": -32}, "--hidden-size=-32: expected a whole number from 32"),
        ({"hidden_size": 48}, "--hidden-size=48: expected a multiple of 32"),
        ({"n_layers": 0}, "--n-layers=0: expected a whole number from 1"),
        ({"n_train": 0}, "--n-train=0: expected a whole number from 1"),
        ({"n_train": 10**20}, "--n-train=1.*: expected a whole number from 1"),
        ({"n_test": -1}, "--n-test=-1: expected a whole number from 1"),
        ({"n_expert": 0}, "--n-expert=0: expected a whole number from 1"),
        ({"shortest": 9}, "--shortest=9: expected a whole number from 1 to 8"),
        ({"expert_longest": 2}, "--expert-shortest=3 with --expert-longest=2: expected no more"),
        ({"expert_wrong": 1.5}, "--expert-wrong=1.5: expected a number from 0 to 1"),
    ],
)
def test_a_world_that_cannot_be_made(tmp_path, size, words):
    with pytest.raises(ValueError, match=words):
        toy.make(toy.World(str(tmp_path / "world"), **size))
    assert not list(tmp_path.iterdir())
