"""Checks of exercise 6: pairs by hand, then the reward in a small world."""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

from course.exercises import tiny_world
from course.exercises.cases import Case, Mistake
from infra.batching import Row, collate

NGRAM = Path(__file__).parents[3] / "study" / "rewards" / "ngram.py"
BEFORE = torch.tensor([2, 3, 2])
TOKEN = torch.tensor([3, 2, 3])
COUNTS = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 2], [0, 0, 1, 0]])


def pair_cases(student: ModuleType) -> Iterator[Case]:
    """Yield the questions to pairs and count."""
    part = SimpleNamespace(batch=collate([Row([11, 12], [13, 14, 15]), Row([17], [18])]))
    yield Case(
        "pairs: the tokens before those of responses 13 14 15 (prompt 11 12) and 18 (prompt 17)",
        lambda: student.pairs(part)[0],
        torch.tensor([12, 13, 14, 17]),
        [
            Mistake(
                torch.tensor([14, 15, 11, 0]),
                "these are the tokens after, and 11 came round from the row's beginning; shift the "
                "other way",
            ),
            Mistake(
                torch.tensor([14, 15, 0, 0]), "these are the tokens after; shift the other way"
            ),
            Mistake(
                torch.tensor([13, 14, 15, 18]),
                "these are the response tokens themselves, the second of the pair",
            ),
        ],
    )
    yield Case(
        "pairs: the response tokens",
        lambda: student.pairs(part)[1],
        torch.tensor([13, 14, 15, 18]),
    )
    yield Case(
        "count: the pairs 2 3, 3 2 and again 2 3, V = 4",
        lambda: student.count(BEFORE, TOKEN, 4),
        COUNTS,
        [
            Mistake(COUNTS.T, "the row is the token before, the column the token"),
            Mistake(
                COUNTS.clamp(max=1),
                "counts[before, token] += 1 writes a pair that comes twice only once: torch.bincount "
                "of before * V + token, or index_put_ with accumulate=True",
            ),
        ],
    )


def surprise_cases(student: ModuleType) -> Iterator[Case]:
    """Yield the question to surprise."""
    n, s, v = COUNTS[BEFORE, TOKEN], 0.1, 4
    total = COUNTS.sum(dim=1)[BEFORE]
    expected = -((n + s) / (total + s * v)).log()
    yield Case(
        "surprise of these pairs by these counts",
        lambda: student.surprise(COUNTS, BEFORE, TOKEN),
        expected,
        [
            Mistake(-expected, "the surprise is minus the log of the probability"),
            Mistake(expected / torch.tensor(2.0).log(), "the natural logarithm"),
            Mistake(-((n + s) / (total + s)).log(), "s is added for each of V tokens: s*V below"),
            Mistake(
                -((n + s) / (COUNTS.sum() + s * v)).log(),
                "the probability is that after this token before: divide by its row's sum",
            ),
        ],
    )


def cases(student: ModuleType) -> Iterator[Case]:
    """Yield the questions to a student's file."""
    yield from pair_cases(student)
    yield from surprise_cases(student)
    rows = tiny_world.rows_of("idle")[:20]
    right, _ = tiny_world.scores_of(tiny_world.make_reward(NGRAM), rows)
    yield Case(
        "score of twenty idle responses, as study/rewards/ngram.py with n=2",
        lambda: tiny_world.scores_of(tiny_world.make_reward(student.__file__), rows)[0],
        right,
        [Mistake(-right, "higher is better: minus the excess of the surprise")],
        tolerance=1e-3,
    )


def show(student: ModuleType) -> None:
    """Print what the reward sees in a small world."""
    tiny_world.show({"pairs of tokens": tiny_world.make_reward(student.__file__)})
