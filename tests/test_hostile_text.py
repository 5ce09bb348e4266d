"""Responses that would take a pattern with backtracking for ever are read in linear time.

A test allows CPU seconds, not seconds: what is linear needs a hundredth of them, and what is
quadratic a hundred times as many.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from evals import vlm
from evals.question import Question
from grading import boxes, judge_response, tag_format
from grading.official import is_degenerate
from grading.options import letter_in_response

LENGTH = 300_000  # characters
CPU_LIMIT = 10  # seconds
CHOICES = {"A": "12 cm", "B": "5", "C": ""}


@contextmanager
def cpu_limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError when this process has computed so long in the block."""

    def stop(*_):
        raise TimeoutError(f"not done after {seconds} s of computing")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def judge_by_vlm_rules(text: str) -> None:
    judge_response(text, ["B", "5"], lambda gold, answer: "wrong")
    tag_format(text)


def score_benchmark(text: str) -> None:
    """Read and compare a response by the rules of each type of question."""
    for kind, gold in (("choice", "B"), ("letters", "AB"), ("list", "[1, 2]"), ("free", "5")):
        question = Question("0", "", (), gold, CHOICES, kind, {})
        reading = vlm.extract(question, text, lambda gold, answer: False)
        if reading.answer:
            vlm.is_right(question, reading.answer, lambda gold, answer: False)


# What stands before, what is repeated, what stands behind
HOSTILE = [
    ("", "<answer>", ""),
    ("", "<think><answer>", "</think>"),
    ("", "\\", ""),
    ("", "\\", "boxed"),
    ("\\boxed", " ", "x"),
    ("\\\\\\\\boxed", " ", "x"),
    ("", "answer: ", ""),
    ("", "the answer is\n", ""),
    ("", "correct ", "x"),
    ("<answer>", "(", "x</answer>"),
    ("<answer>(B", ")", "x</answer>"),
    ("<answer>B.", " )", "x</answer>"),
    ("The answer is B,", " ", "x"),
    ("The answer is B. option", " ", "x"),
    ("\\boxed{A} \\boxed{B} }", " ", "x"),
    ("\\boxed{A} \\boxed{B} } $", " ", "x"),
    ("<answer>", "]", "x</answer>"),
    ("<answer>", "$", "x</answer>"),
    ("", "\\text{", ""),
    ("", "{", ""),
]


@pytest.mark.parametrize(
    ("read", "length"),
    [
        (boxes, LENGTH),
        (judge_by_vlm_rules, LENGTH),
        (letter_in_response, LENGTH),
        (score_benchmark, LENGTH // 4),  # reads it four times
    ],
)
@pytest.mark.parametrize("parts", HOSTILE, ids=repr)
def test_hostile_responses_are_read_in_linear_time(read, length, parts):
    """60,000 opening tags or backslashes took a quarter of a minute, spaces after a letter for ever."""
    before, repeated, after = parts
    text = before + repeated * (length // len(repeated)) + after
    with cpu_limit(CPU_LIMIT):
        read(text)


@pytest.mark.parametrize(
    ("before", "after"),
    [("(" * 165, ")" * 330 + "x"), ("answer" + " " * 400, "x"), ("$" * 240, "B" + "$" * 240 + "x")],
)
def test_short_answers_of_marks_alone_are_read_at_once(before, after):
    """Up to 500 characters are looked at closely: with the fourth power, that took minutes."""
    with cpu_limit(CPU_LIMIT):
        for _ in range(200):
            judge_by_vlm_rules(f"{before}{after}")
            letter_in_response(f"The answer is {before}{after}")


@pytest.mark.parametrize("length", [4, 5, 6, 199, 200, 201])
@pytest.mark.parametrize("repeats", [4, 5])
def test_a_pattern_of_5_to_200_characters_five_times_in_a_row_is_garbage(length, repeats):
    pattern = "".join(map(chr, range(0x2200, 0x2200 + length)))  # operators, all different
    whole = f"so {pattern * repeats}!"
    assert is_degenerate(whole) == (repeats == 5 and 5 <= length <= 200)
    assert not is_degenerate(whole.replace(pattern[-1] + "!", "!")), "the last one is not whole"
    assert not is_degenerate(whole.replace(pattern[0], "\n")), "a pattern is within a line"


def test_garbage_is_found_in_linear_time():
    nearly_five_times = "".join(map(chr, range(0x2200, 0x22C8))) * 4 + "x"
    with cpu_limit(CPU_LIMIT):
        assert not is_degenerate(nearly_five_times * (LENGTH // len(nearly_five_times)))


# ---- What is read stays what it was
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{1}", ["1"]),
        (r"\\boxed{1}", ["1"]),
        (r"\\\boxed{1}", ["1"]),
        (r"\boxed  {1}", ["1"]),
        (r"\boxed{a\}b}", [r"a\}b"]),
        (r"\boxed{a\\}b}", [r"a\\"]),
        (r"\boxed{a\\\}b}", [r"a\\\}b"]),
        (r"\boxed{1", []),
        (r"\boxed{\boxed{2}}", [r"\boxed{2}", "2"]),
        (r"\boxed x{1}", []),
        (r"{\boxed{1}", ["1"]),
        (r"\{\boxed{1}\}", ["1"]),
    ],
)
def test_boxes_with_backslashes(text, expected):
    assert boxes(text) == expected


@pytest.mark.parametrize(
    ("text", "is_form"),
    [
        ("<think>x</think><answer>5</answer>", True),
        ("so <think> x\n</think> \n <answer> 5 </answer> so", True),
        ("<think></think><answer>5</answer>", False),
        ("<think>x</think><answer></answer>", False),
        ("<think>x</think> so <answer>5</answer>", False),
        ("<answer>5</answer><think>x</think>", False),
        ("</think><think>x<answer>5</answer>", False),
        ("<think>x<answer>5</answer></think>", False),
        ("<think>x</think><answer>5</answer></answer>", False),
        ("<think>x</think><answer>5", False),
    ],
)
def test_the_form_of_tags(text, is_form):
    assert tag_format(text) == is_form
