"""Outcome rewards: extraction, comparison, worker processes that keep their deadline."""

import time
from types import SimpleNamespace

import pytest

from rewards import Grader, boxes, compare


@pytest.fixture(scope="module")
def grader():
    with Grader(n_workers=2, deadline=4.0) as grader:
        yield grader


def test_boxes():
    assert boxes(r"so \boxed{\frac{1}{2}} and \boxed {3}") == [r"\frac{1}{2}", "3"]
    assert boxes(r"\boxed{\{1, 2\}}") == [r"\{1, 2\}"]
    assert boxes(r"\boxed{a} } \boxed{b") == ["a"]
    assert boxes(r"\boxed{\boxed{2}}") == [r"\boxed{2}", "2"]
    assert boxes(r"\fbox{2} \boxed 2 \boxed{}") == [""]


def test_extraction_of_a_megabyte_is_quick():
    began = time.perf_counter()
    assert boxes(r"\boxed{" * 150_000) == [] and len(boxes("{" * 100_000 + r"\boxed{1}" * 50_000)) == 50_000
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize(
    ("gold", "prediction", "expected"),
    [
        ("2", "2.0", True), ("2", "3", False), ("025", "25", True), ("1,000", "1000", True), ("50\\%", "50", True),
        ("90^\\circ", "90", True), ("2", "2\\text{ apples}", True), ("\\frac{1}{2}", "0.5", True),
        ("\\frac{1}{2}", "1/2", True), ("\\frac12", "\\dfrac{1}{2}", True), ("\\frac{1}{2}", "\\frac{3}{2}", False),
        ("-\\frac{3}{4}", "-0.75", True), ("10^{-20}", "10^{-21}", False), ("3 \\times 10^{-20}", "3e-20", True), ("0.333", "\\frac{1}{3}", False),
        ("2", "", False), ("", "2", False), ("2", "9" * 3000, False), ("\\text{Evelyn}", "Evelyn", True),
        ("x^2+1", "1+x^2", True), ("(1,2)", "(1, 2)", True), ("(1,2)", "(2,1)", False), ("2\\pi", "2", False),
        ("\\sqrt{8}", "2\\sqrt{2}", True), ("\\pi", "π", True), ("5", "\\mathbf{5}.", True),
        ("(1,200)", "1200", False), ("[0,100]", "[0100]", False), ("1 1/2", "11/2", False), ("2 3", "23", False),
        ("1000000", "1000000.5", False), ("x + 1", "x+1", True),
    ],
)  # fmt: skip
def test_equality(grader, gold, prediction, expected):
    assert grader.equal(gold, prediction) is expected


def test_any_of_several_golds(grader):
    assert grader.equal(["3", "\\sqrt{4}"], "2") and not grader.equal(["3", "4"], "2")


def test_plain_numbers_need_no_worker():
    assert compare("1/3", "0.3333333333") is True and compare("4", "4.5") is False
    assert compare("x", "y+1") is None
    assert compare("1e-30", "2e-30") is False and compare("12", "1" * 500) is None


@pytest.mark.parametrize(
    ("response", "finished", "binary", "official"),
    [
        ("so \\boxed{2}", True, 1, 1),
        ("so \\boxed{3}", True, 0, 0.5),
        ("so 2", True, 0, 0),
        ("so \\boxed{2}", False, 0, 0),
        ("first \\boxed{3}, no \\boxed{2}", True, 1, 1),
        ("\\boxed{2}" * 5, True, 0, 0),
        ("abcde" * 6 + "\\boxed{2}", True, 1, 0),
        ("字符" * 20 + "\\boxed{2}", True, 1, 0),
    ],
)
def test_reward_sets(response, finished, binary, official):
    for kind, expected in (("binary", binary), ("official", official)):
        with Grader(kind, n_workers=1) as grader:
            verdict = grader.grade("", "2", response, finished)
            assert verdict.reward == expected and verdict.correct == (expected == 1)


def test_truncated_responses_may_count():
    with Grader(n_workers=1, grade_truncated=True) as grader:
        assert grader.grade("", "2", "\\boxed{2} and", finished=False).correct


def test_hostile_answers_cost_a_deadline_and_no_more(grader):
    """A tower, a factorial and nested braces between good answers: order, verdicts and the pool survive."""
    hostile = ["9^{9^{9^{9^9}}}", "9!!!!!!", "{" * 400 + "x" + "}" * 400, "\\frac" * 300, "x^{" * 200]
    answers = ["\\sqrt{8}", *hostile, "\\sqrt{8}"]
    problems = [SimpleNamespace(text="", answer="2\\sqrt{2}") for _ in answers]
    episodes = [SimpleNamespace(text=f"\\boxed{{{answer}}}", finish_reason="stop") for answer in answers]
    began = time.perf_counter()
    verdicts = [verdict.correct for verdict in grader.submit(problems, episodes).result()]
    assert verdicts == [True, *[False] * len(hostile), True]
    assert time.perf_counter() - began < 4.0 * len(hostile) + 20
    assert 1 <= grader.timeouts <= len(hostile)


def test_a_users_function(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def reward(problem, response):\n    return len(response) / len(problem)\n")
    with Grader(str(file)) as grader:
        assert grader.grade("abcd", None, "ab", True) == (0.5, False)
        assert grader.grade("abcd", None, "abcd", True) == (1.0, True)
        assert grader.grade("abcd", None, "abcd", False) == (0.0, False), "a response that ran out of room is no answer"
    file.write_text("x = 1\n")
    with pytest.raises(ValueError, match="defines no function reward"):
        Grader(str(file))
    with pytest.raises(ValueError, match="reward 'bleu': neither binary, official nor a Python file"):
        Grader("bleu")
