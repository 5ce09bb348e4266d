"""What a check asks of a student's file, and how it judges the answer.

A check is a function cases(student) that yields Cases. Each has the right answer, and wrong answers
that are known, each with a hint.
"""

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

DIGITS = 4  # of numbers that are shown


@dataclass(frozen=True)
class Mistake:
    """A wrong answer that is known, or a kind of error, and what to think about."""

    answer: object
    hint: str


@dataclass(frozen=True)
class Case:
    """One question to a student's file."""

    asks: str
    answer: Callable[[], object]  # runs the student's code
    expected: object  # a tensor, a number or a text
    mistakes: Sequence[Mistake] = ()
    tolerance: float = 1e-4
    expects: str = ""  # what to say of the right answer, where to show it would give it away


def judge(case: Case, student: ModuleType) -> list[str]:
    """Return what is wrong with the answer to a case as lines, none if it is right."""
    try:
        got = case.answer()
    except NotImplementedError as error:
        return [f"{place_of(error, student)} is still blank: write it, then run this again"]
    except (Exception, SystemExit) as error:  # whatever the student's code raises
        complaint = (
            f"{case.asks}: {place_of(error, student)} raised {type(error).__name__}: {error}"
        )
        return [complaint, *hint_for_error(case, error)]
    if got is None:
        return [
            f"{case.asks}: still blank (None); expected {case.expects or kind_of(case.expected)}"
        ]
    if is_same(got, case.expected, case.tolerance):
        return []
    expected = case.expects or show(case.expected)
    lines = [case.asks, f"  expected {expected}", f"  got      {show(got)}"]
    return lines + about_shapes(got, case.expected) + hint_for_answer(case, got)


def about_shapes(got: object, expected: object) -> list[str]:
    """Return a line if a tensor has another shape than expected, else none."""
    if not (torch.is_tensor(got) and torch.is_tensor(expected)) or got.shape == expected.shape:
        return []
    return [f"  expected the shape {tuple(expected.shape)}, got {tuple(got.shape)}"]


def hint_for_answer(case: Case, got: object) -> list[str]:
    """Return the hint of the first known mistake with this answer as a line, or no line."""
    for mistake in case.mistakes:
        is_answer = not isinstance(mistake.answer, type)
        if is_answer and is_same(got, mistake.answer, case.tolerance):
            return [f"  hint: {mistake.hint}"]
    return []


def hint_for_error(case: Case, error: BaseException) -> list[str]:
    """Return the hint of the first known mistake that raises such an error as a line, or no line."""
    for mistake in case.mistakes:
        if isinstance(mistake.answer, type) and isinstance(error, mistake.answer):
            return [f"  hint: {mistake.hint}"]
    return []


def is_same(got: object, expected: object, tolerance: float) -> bool:
    """Return whether two answers are the same; numbers and tensors within a tolerance."""
    if isinstance(expected, str):
        return isinstance(got, str) and got.replace(" ", "") == expected.replace(" ", "")
    try:
        got, expected = (torch.as_tensor(x).double() for x in (got, expected))
    except (TypeError, ValueError, RuntimeError):
        return False
    if got.shape != expected.shape:
        return False
    return torch.allclose(got, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def show(answer: object) -> str:
    """Return an answer as a text, with few digits."""
    if torch.is_tensor(answer):
        answer = answer.detach().tolist()
    if isinstance(answer, list | tuple):
        return f"[{', '.join(show(x) for x in answer)}]"
    if isinstance(answer, float):
        return f"{answer:.{DIGITS}g}"
    return str(answer)


def kind_of(expected: object) -> str:
    """Return what kind of answer is expected, without giving it away."""
    if isinstance(expected, str):
        return "a text"
    return "a tensor" if torch.is_tensor(expected) else "a number"


def place_of(error: BaseException, student: ModuleType) -> str:
    """Return the innermost function of the student's file that an error came through, and its line."""
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename) == Path(student.__file__)
    ]
    if not own:
        return Path(student.__file__).name
    return f"{own[-1].name}() in {Path(student.__file__).name}, line {own[-1].lineno},"
