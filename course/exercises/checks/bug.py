"""Checks of exercise 8: the program is the same but for the bug, and now it learns."""

from collections.abc import Iterator
from types import ModuleType

from course.exercises.cases import Case, Mistake

CONSTANTS = ("N_PROBLEMS", "N_ANSWERS", "GROUP_SIZE", "N_STEPS", "RATE")
SEEDS = (0, 1, 2)


def n_learnt(student: ModuleType) -> int:
    """Return for how many problems the best answer has a chance above 0.9, over all seeds."""
    worth = student.make_worth()
    return sum(int((student.train(worth, seed)[:, -1] > 0.9).sum()) for seed in SEEDS)


def cases(student: ModuleType) -> Iterator[Case]:
    """Yield the questions to a student's file."""
    yield Case(
        f"{', '.join(CONSTANTS)} are as they were",
        lambda: [getattr(student, name) for name in CONSTANTS],
        [8, 4, 8, 61, 2.0],
    )
    yield Case(
        "make_worth is as it was: what answers to problem 0 and 7 earn",
        lambda: student.make_worth()[[0, 7]],
        [[0.0, 0.0, 0.0, 0.1], [3.5, 3.5, 3.5, 3.6]],
    )
    yield Case(
        "problems whose best answer has a chance above 0.9, of 24 on three seeds",
        lambda: n_learnt(student),
        24,
        [
            Mistake(
                0,
                "print the problems of the episodes that stand in the first row of `groups`: which "
                "answers are compared with each other?",
            ),
        ],
    )


def show(student: ModuleType) -> None:
    """Print the curves of the mended program."""
    print("Chances of the best answer to problem 0, which pays least, to problem 7:\n")
    student.train(student.make_worth(), log_every=20)
