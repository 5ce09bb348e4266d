"""Checks of exercise 2: small rows by hand, then two responses of a recorded step."""

from collections.abc import Iterator
from types import ModuleType

import torch

import rlfr
from course.exercises import picture
from course.exercises.cases import Case, Mistake

SCORE = torch.tensor([[4.0, 6.0, 5.0, 0.0], [40.0, 60.0, 45.0, 50.0]])
MASK = torch.tensor([[True, True, True, False], [True, True, True, True]])
UNIT = torch.tensor([[0.2, 0.7, 0.9, 0.65, 1.0], [0.1, 0.8, 0.3, 0.2, 0.0]])


def unequal_cases(student: ModuleType) -> Iterator[Case]:
    """Yield the question of responses whose scores differ."""
    padded = SCORE / torch.tensor([[6.0], [60.0]])
    padded[1] = torch.tensor([0.0, 1.0, 0.25, 0.5])
    of_batch = (SCORE - 4) / 56
    yield Case(
        "normalise: two responses, of which the first has three tokens and padding",
        lambda: student.normalise(SCORE, MASK),
        torch.tensor([[0.0, 1.0, 0.5, 0.0], [0.0, 1.0, 0.25, 0.5]]),
        [
            Mistake(
                padded,
                "the least score of the first response was taken from its padding, so that every real "
                "token comes above the threshold: fill padding with +inf before the minimum, and "
                "with -inf before the maximum",
            ),
            Mistake(
                torch.where(MASK, of_batch, 0.0),
                "least and largest are those of each response, not of the whole batch: amin(dim=1)",
            ),
            Mistake(
                torch.where(MASK, SCORE / torch.tensor([[6.0], [60.0]]), 0.0),
                "subtract the least score first",
            ),
            Mistake(
                torch.tensor([[0.0, 1.0, 0.5, -2.0], [0.0, 1.0, 0.25, 0.5]]),
                "padding gets 0: torch.where(mask, …, 0.0) at the end",
            ),
        ],
    )


def normalise_cases(student: ModuleType) -> Iterator[Case]:
    """Yield the questions to normalise."""
    yield from unequal_cases(student)
    yield Case(
        "normalise: a response whose scores are equal",
        lambda: student.normalise(torch.full((1, 3), 5.0), torch.ones(1, 3, dtype=torch.bool)),
        torch.zeros(1, 3),
        [
            Mistake(
                torch.full((1, 3), torch.nan),
                "0/0 is NaN, and one NaN is enough to make every weight of the policy NaN: say "
                "what happens where the largest score is the least",
            ),
            Mistake(torch.ones(1, 3), "no token deviates more than another; nothing is penalised"),
        ],
    )


def select_cases(student: ModuleType) -> Iterator[Case]:
    """Yield the questions to select."""
    only_threshold = torch.where(UNIT > 0.6, UNIT, 0.0)
    only_top = torch.tensor([[0.0, 0.0, 0.9, 0.0, 1.0], [0.0, 0.8, 0.3, 0.0, 0.0]])
    yield Case(
        "select: threshold 0.6, the two largest",
        lambda: student.select(UNIT, 0.6, 2),
        torch.tensor([[0.0, 0.0, 0.9, 0.0, 1.0], [0.0, 0.8, 0.0, 0.0, 0.0]]),
        [
            Mistake(only_threshold, "of those above the threshold only the k largest are kept"),
            Mistake(only_top, "the k largest are taken among those above the threshold"),
            Mistake(
                torch.where(UNIT >= 0.9, UNIT, 0.0),
                "the k largest of each response, not of the whole batch: topk(k, dim=1)",
            ),
            Mistake(
                (UNIT >= 0.8).float() * (UNIT > 0.6),
                "the kept scores keep their values; here they became 1",
            ),
        ],
    )
    yield Case(
        "select: k = 15 of five tokens",
        lambda: student.select(UNIT, 0.6, 15),
        only_threshold,
        [Mistake(RuntimeError, "topk fails where k is larger than T: min(top_k, score.shape[1])")],
    )


def cases(student: ModuleType) -> Iterator[Case]:
    """Yield the questions to a student's file."""
    yield from normalise_cases(student)
    yield from select_cases(student)
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(20, 30, generator=generator)
    mask = torch.arange(30) < torch.randint(2, 31, (20, 1), generator=generator)
    yield Case(
        "both, for twenty random responses",
        lambda: student.select(student.normalise(score, mask), 0.6, 5),
        rlfr.select(rlfr.normalise(score, mask, False), 0.6, 5, False),
    )


def show(student: ModuleType) -> None:
    """Mark the penalised tokens of a right and of a wrong response of the recorded run."""
    print("Penalised tokens of two responses to the same problem, by your functions:\n")
    for episode in picture.two_responses():
        score = torch.tensor(episode["dense_score"]).mean(dim=0)[None]  # (1, T)
        unit = student.normalise(score, torch.ones_like(score, dtype=torch.bool))
        kept = student.select(unit, 0.6, 15)[0]
        signs = ["^" if weight > 0 else " " for weight in kept.tolist()]
        print(f"{episode['verdict']}, {int((kept > 0).sum())} of {len(kept)} tokens")
        print(picture.below(episode["tokens"], signs))
