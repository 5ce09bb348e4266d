"""Grade an exercise: what is expected, what came, and a hint for mistakes that are known.

    python course/exercises/check.py 1                grade course/exercises/interpolate.py
    python course/exercises/check.py 1 --solution     grade the solution
    python course/exercises/check.py                  list the exercises

docs/exercises.md leads through them. A check ends with code 0 if the exercise is passed, or else
with 1. What it draws at the end is made with the functions of the graded file.
"""

# ruff: noqa: E402

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
import infra.waiting  # noqa: F401

# isort: split
import argparse
from importlib import import_module
from types import ModuleType

import torch

from course.exercises.cases import judge
from infra import errors
from infra.files import import_file

EXERCISES = (
    "interpolate",
    "shaping",
    "returns",
    "advantage",
    "loss",
    "bigram",
    "whitened_step",
    "bug",
    "derivation",
    "fall",
    "seeds",
)


def file_of(number: int, solution: bool) -> Path:
    """Return the file of an exercise. ValueError if there is no such number."""
    if not 1 <= number <= len(EXERCISES):
        raise ValueError(f"there is no exercise {number}; expected 1 to {len(EXERCISES)}")
    folder = HERE / "solutions" if solution else HERE
    return folder / f"{EXERCISES[number - 1]}.py"


def title_of(number: int) -> str:
    """Return the first line of an exercise's file, which says its number, its minutes and its aim."""
    first_line = file_of(number, solution=False).read_text().splitlines()[0]
    return first_line.removeprefix('"""').rstrip(".")


def grade(number: int, file: Path) -> bool:
    """Grade a file as an exercise, print the result, and return whether it is passed."""
    print(f"{title_of(number)}\n{file}\n")
    student = load(file)
    if student is None:
        return False
    check = import_module(f"course.exercises.checks.{EXERCISES[number - 1]}")
    for case in check.cases(student):
        complaint = judge(case, student)
        if complaint:
            print(f"not yet: {complaint[0]}", *complaint[1:], sep="\n")
            return False
        print(f"right: {case.asks}")
    print()
    check.show(student)
    print("\npassed")
    return True


def load(file: Path) -> ModuleType | None:
    """Import a student's file; None if it cannot be, after saying why."""
    try:
        return import_file(str(file))
    except ValueError as error:  # whatever the student's code raises
        print(f"not yet: the file cannot be imported: {error}")
        return None


def main() -> None:
    """Grade the exercise that the command line names."""
    parser = argparse.ArgumentParser(description="Grade an exercise of docs/exercises.md.")
    parser.add_argument("number", type=int, nargs="?", help="of the exercise; none: list them")
    parser.add_argument("--solution", action="store_true", help="grade the solution")
    given = parser.parse_args()
    if given.number is None:
        print(*(title_of(number + 1) for number in range(len(EXERCISES))), sep="\n")
        return
    torch.set_num_threads(1)
    if not grade(given.number, file_of(given.number, given.solution)):
        sys.exit(1)


if __name__ == "__main__":
    errors.run(main)
