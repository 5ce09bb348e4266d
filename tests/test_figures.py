"""Figures: by hand, by brute force, intervals that cover, tables, the comparison of evaluations."""

import json
from itertools import combinations

import numpy as np
import pytest

from evals import figures
from evals.compare import compare
from evals.figures import (
    Point,
    average_sets,
    average_table,
    bootstrap,
    list_points,
    maj_at,
    pass_at,
    powers_of_two,
    sign_test,
    summarise,
    table,
)


def make_record(problem: str, number: int, extracted: str | None, verdict: str, **more) -> dict:
    """What the figures need of a line of samples.jsonl."""
    record = {
        "set": "s",
        "problem": problem,
        "sample": number,
        "extracted": extracted,
        "correct": verdict == "right",
        "verdict": verdict,
        "finish_reason": "stop",
        "tokens": 10,
    }
    return record | more


# ---- Estimates
@pytest.mark.parametrize(
    ("k", "n", "n_right", "expected"),
    [
        (1, 4, 1, 0.25),
        (4, 4, 1, 1),
        (2, 4, 0, 0),
        (2, 4, 1, 1 - 3 / 6),
        (3, 5, 2, 1 - 1 / 10),
    ],
)
def test_pass_at_k_by_hand(k, n, n_right, expected):
    assert pass_at(k, n, n_right) == pytest.approx(expected)


def test_pass_at_k_is_the_mean_over_subsets():
    for n in range(1, 8):
        for n_right in range(n + 1):
            right = [True] * n_right + [False] * (n - n_right)
            for k in range(1, n + 1):
                mean = np.mean([any(subset) for subset in combinations(right, k)])
                assert pass_at(k, n, n_right) == pytest.approx(mean)


@pytest.mark.parametrize(
    ("k", "answers", "right", "expected"),
    [
        (3, [0, 0, 1], [True, True, False], 1),
        (1, [0, 0, 1], [True, True, False], 2 / 3),
        (2, [0, 1], [True, False], 0.5),  # a tie is decided by chance
        (3, [0, None, None], [True, False, False], 1),  # no answer, no vote
        (2, [0, None, None], [True, False, False], 2 / 3),  # one subset has no vote at all
        (2, [None, None], [False, False], 0),
        (3, [0, 0, 0], [False, True, True], 1),  # equal answers are right together
        (5, [0, 1, 1, 2, 2], [True, False, False, False, False], 0),
    ],
)
def test_maj_at_k_by_hand(k, answers, right, expected):
    assert maj_at(k, answers, right) == pytest.approx(expected)


def brute_force_majority(k: int, answers: list, right: list) -> float:
    """Vote by vote, over all subsets."""
    chances = []
    for subset in combinations(range(len(answers)), k):
        votes = [answers[i] for i in subset if answers[i] is not None]
        if not votes:
            chances.append(0.0)
            continue
        most = max(votes.count(answer) for answer in votes)
        winners = {answer for answer in votes if votes.count(answer) == most}
        chances.append(np.mean([right[answers.index(answer)] for answer in winners]))
    return float(np.mean(chances))


def test_maj_at_k_is_what_brute_force_gives():
    rng = np.random.default_rng(0)
    for _ in range(60):
        n = int(rng.integers(2, 9))
        answers = [None if answer == 3 else int(answer) for answer in rng.integers(0, 4, n)]
        right = [answer == 1 for answer in answers]
        for k in range(1, n + 1):
            expected = brute_force_majority(k, answers, right)
            assert maj_at(k, answers, right) == pytest.approx(expected)


def test_maj_at_k_from_some_of_many_subsets():
    rng = np.random.default_rng(1)
    answers = [int(answer) for answer in rng.integers(0, 3, 16)]
    right = [answer == 1 for answer in answers]
    expected = brute_force_majority(8, answers, right)  # 12,870 subsets
    assert maj_at(8, answers, right) == pytest.approx(expected, abs=0.04)


@pytest.mark.parametrize(("n_problems", "n_samples"), [(30, 1), (30, 8), (100, 4), (272, 1)])
def test_intervals_cover(n_problems, n_samples, monkeypatch):
    """Of problems of different difficulty, they hold the expected avg@n 93 to 97 times of 100."""
    monkeypatch.setattr(figures, "N_RESAMPLES", 500)
    rng = np.random.default_rng(n_problems + n_samples)
    n_trials = 2000 if n_problems == 30 else 600
    n_covered = 0
    for _ in range(n_trials):
        difficulty = rng.beta(1.2, 0.8, n_problems)  # with mean 0.6
        rates = rng.binomial(n_samples, difficulty) / n_samples
        low, high = bootstrap(rates[:, None])[:, 0]
        n_covered += low <= 0.6 <= high
    assert 0.93 <= n_covered / n_trials <= 0.97


def test_intervals_where_nothing_varies():
    exact = 0.025 ** (1 / 30)  # Clopper and Pearson
    assert bootstrap(np.zeros((30, 1)))[:, 0].tolist() == pytest.approx([0, 1 - exact])
    assert bootstrap(np.ones((30, 1)))[:, 0].tolist() == pytest.approx([exact, 1])
    assert bootstrap(np.zeros((30, 1)), are_rates=False)[:, 0].tolist() == [0, 0]


def test_sign_test_by_hand():
    assert sign_test(0, 0) == 1
    assert sign_test(5, 5) == 1
    assert sign_test(5, 0) == pytest.approx(2 / 32)
    assert sign_test(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert sign_test(2, 8) == sign_test(8, 2)


# ---- The figures of a set
def two_problems() -> list[dict]:
    """p has two right samples of four; q has none, and one without an answer that was cut off."""
    right = {"extracted": "1", "verdict": "right", "cluster": 0}
    wrong = {"extracted": "2", "verdict": "wrong", "cluster": 1}
    timeout = {"extracted": None, "verdict": "timeout", "cluster": None}
    timeout |= {"finish_reason": "length", "tokens": 100}
    samples = {"p": [right, right, wrong, wrong], "q": [wrong, wrong, wrong, timeout]}
    records = []
    for problem, of_problem in samples.items():
        for number, fields in enumerate(of_problem):
            records.append(make_record(problem, number, **fields))
    return records


def means(intervals: dict[str, dict]) -> dict[str, float]:
    return {k: interval["mean"] for k, interval in intervals.items()}


def test_figures_of_a_set():
    row = summarise(two_problems())
    assert row["problems"] == 2
    assert row["samples"] == 4
    assert row["avg"]["mean"] == 0.25
    assert row["avg"]["low"] <= 0.25 <= row["avg"]["high"]
    assert means(row["pass"]) == pytest.approx({"1": 0.25, "2": 5 / 12, "3": 0.5, "4": 0.5})
    assert means(row["maj"]) == pytest.approx({"1": 0.25, "2": 0.25, "4": 0.25})
    assert row["truncated"] == 1 / 8
    assert row["boxed"] == 7 / 8
    assert row["length_mean"] == pytest.approx(21.25)
    assert row["length_p95"] == pytest.approx(np.quantile([10] * 7 + [100], 0.95))
    assert row["timeouts"] == 1


def test_powers_of_two():
    assert powers_of_two(1) == [1]
    assert powers_of_two(6) == [1, 2, 4, 6]
    assert powers_of_two(8) == [1, 2, 4, 8]


def test_a_table_is_padded_and_leaves_out_what_a_set_has_not():
    four = summarise(two_problems())
    one = summarise([record for record in two_problems() if record["sample"] == 0])
    heading, rule, row_of_four, row_of_one = table({"four": four, "one": one}).splitlines()
    assert len(heading) == len(rule) == len(row_of_four) == len(row_of_one)
    assert rule.startswith("| ----")
    columns = [cell.strip() for cell in heading.split("|")]
    cells_of_four = [cell.strip() for cell in row_of_four.split("|")]
    cells_of_one = [cell.strip() for cell in row_of_one.split("|")]
    assert cells_of_four[columns.index("avg@n")] == "25.0%"
    assert cells_of_four[columns.index("maj@4")] == "25.0%"
    assert cells_of_one[columns.index("avg@n")] == "50.0%"
    assert cells_of_one[columns.index("maj@4")] == ""


def test_pass_at_32_from_32_samples():
    records = []
    for problem, n_right in {"p": 1, "q": 0, "r": 16}.items():
        for number in range(32):
            fields = {"extracted": "1", "verdict": "wrong", "cluster": 1}
            if number < n_right:
                fields = {"extracted": "2", "verdict": "right", "cluster": 0}
            records.append(make_record(problem, number, **fields))
    row = summarise(records)
    assert row["pass"]["32"]["mean"] == pytest.approx(2 / 3)
    assert row["pass"]["2"]["mean"] == pytest.approx((2 / 32 + 1 - 16 * 15 / (32 * 31)) / 3)
    assert row["maj"]["32"]["mean"] == pytest.approx(0.5 / 3), "the tie is decided by chance"
    heading, _, cells = table({"s": row}).splitlines()
    by_column = dict(zip(heading.split("|"), cells.split("|"), strict=True))
    by_column = {name.strip(): cell.strip() for name, cell in by_column.items()}
    assert by_column["pass@32"] == "66.7%"
    assert [name for name in by_column if name.startswith("pass")] == [
        f"pass@{k}" for k in (2, 4, 8, 16, 32)
    ]


# ---- Averages over sets
def points_of(*values: float) -> list[Point]:
    return [Point(str(i), value) for i, value in enumerate(values)]


def test_averages_over_sets_and_groups():
    sets = {
        "mine": points_of(1, 1),
        "math500": list_points(two_problems()),  # 2 of 4 right, 0 of 4 right
        "aime24": points_of(1, 0, 0, 0),
        "LogicVista": points_of(0, 1),
        "VisuLogic": points_of(0, 0),
    }
    averages = average_sets(sets)
    assert list(averages) == ["all", "maths", "logic"]
    assert averages["all"]["mean"] == pytest.approx((1 + 0.25 + 0.25 + 0.5 + 0) / 5)
    assert averages["all"]["sets"] == list(sets)
    assert averages["maths"]["mean"] == 0.25
    assert averages["maths"]["sets"] == ["math500", "aime24"]
    assert averages["logic"]["mean"] == 0.25
    text = average_table(averages)
    assert "| maths " in text
    assert "25.0%" in text
    assert "math500, aime24 |" in text
    del sets["VisuLogic"]
    assert list(average_sets(sets)) == ["all", "maths"], "a group needs two of its sets"
    assert average_sets({"mine": points_of(1, 0)}) == {}


def test_the_parts_of_a_set_weigh_the_same():
    points = [Point("a", 1, "x"), Point("b", 0, "x"), Point("c", 0, "x"), Point("a", 1, "y")]
    averages = average_sets({"s": points, "t": points_of(0, 1)})
    assert averages["all"]["mean"] == pytest.approx(((1 / 3 + 1) / 2 + 1 / 2) / 2)


def test_the_interval_of_an_average():
    """Its variance is the sum of the sets' own, over the square of their number."""
    rng = np.random.default_rng(0)
    sets = {}
    variance = 0
    for name, n in {"a": 200, "b": 100, "c": 400}.items():
        values = rng.integers(0, 2, n).astype(float)
        sets[name] = points_of(*values)
        variance += values.var() / n / 9
    average = average_sets(sets)["all"]
    width = average["high"] - average["low"]
    assert width == pytest.approx(2 * 1.96 * variance**0.5, rel=0.03)
    assert average == average_sets(sets)["all"], "the same points give the same interval"


def test_problems_of_a_set_are_drawn_together():
    """Five versions of a problem that are right together say no more than one of them."""
    values = [i % 2 for i in range(100)]
    versions = [Point(str(i), value, str(v)) for i, value in enumerate(values) for v in range(5)]
    single = average_sets({"s": points_of(*values), "t": points_of(*[0] * 50)})["all"]
    several = average_sets({"s": versions, "t": points_of(*[0] * 50)})["all"]
    assert several == single


def test_averages_where_nothing_varies():
    right = average_sets({"a": points_of(*[1] * 30), "b": points_of(*[1] * 10)})["all"]
    exact = (0.025 ** (1 / 30) + 0.025 ** (1 / 10)) / 2
    assert (right["low"], right["high"]) == pytest.approx((exact, 1))
    wrong = average_sets({"a": points_of(*[0] * 30), "b": points_of(*[0] * 10)})["all"]
    assert (wrong["low"], wrong["high"]) == pytest.approx((0, 1 - exact))


# ---- Comparison
def write_evaluation(folder, problems: dict[str, list[bool]]) -> str:
    """Write samples.jsonl: for each problem whether its samples are right."""
    folder.mkdir()
    with open(folder / "samples.jsonl", "w") as file:
        for problem, samples in problems.items():
            for number, is_right in enumerate(samples):
                verdict = "right" if is_right else "wrong"
                file.write(json.dumps(make_record(problem, number, "1", verdict)) + "\n")
    return str(folder)


def test_comparing_two_evaluations(tmp_path):
    before = {f"p{i}": [i < 4, i < 4] for i in range(10)}
    after = dict(before)
    after["p0"] = [False, False]
    after["p5"] = [True, True]
    after["p6"] = [True, True]
    after["p7"] = [True, False]
    a = write_evaluation(tmp_path / "a", before)
    b = write_evaluation(tmp_path / "b", after)
    text = compare(a, b)
    line = next(line for line in text.splitlines() if line.startswith("| s "))
    name, *cells, interval, better, worse, p = [cell.strip() for cell in line.split("|")[1:-1]]
    assert name == "s"
    assert cells == ["10", "40.0%", "55.0%", "+15.0"]
    assert (better, worse, p) == ("3", "1", "0.625")
    low, high = (float(bound) for bound in interval.split(" – "))
    assert low < 15 < high
    assert "3 problems flipped" in text
    assert "| s p0    | 100% |   0% | lost |" in text


def test_an_unjudged_question_is_left_out_of_both(tmp_path):
    a = write_evaluation(tmp_path / "a", {"p0": [True], "p1": [False]})
    b = write_evaluation(tmp_path / "b", {"p0": [True]})
    with open(tmp_path / "b" / "samples.jsonl", "a") as file:
        file.write(json.dumps(make_record("p1", 0, None, "unjudged")) + "\n")
    assert "| s  |        1 | 100.0% | 100.0% |" in compare(a, b)


def test_evaluations_that_cannot_be_compared(tmp_path):
    a = write_evaluation(tmp_path / "a", {"p0": [True], "p1": [False]})
    b = write_evaluation(tmp_path / "b", {"p0": [True]})
    with pytest.raises(ValueError, match="samples.jsonl does not exist"):
        compare(a, tmp_path)
    with pytest.raises(ValueError, match="1 problems in common of 2 and 1; compare the same"):
        compare(a, b)


def test_a_column_of_one_character_is_still_a_table():
    """Strict Markdown takes `-:` between heading and rows, and not `:`."""
    assert figures.markdown([["", "n"], ["a", "4"]]).splitlines() == [
        "|    |  n |",
        "| -- | -: |",
        "| a  |  4 |",
    ]
