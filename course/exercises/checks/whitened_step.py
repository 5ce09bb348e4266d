"""Checks of exercise 7: a covariance by hand, then the reward in the small world."""

from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

from course.exercises import tiny_world
from course.exercises.cases import Case, Mistake

# Mean 1 and 2; the second dimension follows the first, and is ten times as wide
STEPS = torch.tensor([[0.0, -9.0], [2.0, 13.0], [0.0, -7.0], [2.0, 11.0]])

SPREAD = torch.cov(STEPS.T) + 1e-6 * torch.eye(2)


def fit_cases(student: ModuleType) -> Iterator[Case]:
    """Yield the questions to fit."""
    yield Case(
        "fit: the mean of four steps",
        lambda: student.fit(STEPS)[0],
        torch.tensor([1.0, 2.0]),
        [
            Mistake(torch.tensor(1.5), "a mean for each dimension: dim=0"),
            Mistake(RuntimeError, "torch.cov wants the dimensions as rows: steps.T"),
        ],
    )
    yield Case(
        "fit: L L^T is the covariance",
        lambda: student.fit(STEPS)[1] @ student.fit(STEPS)[1].T,
        SPREAD,
        [
            Mistake(SPREAD @ SPREAD, "this is the covariance itself: take its Cholesky factor"),
            Mistake(
                torch.diag(SPREAD.diag()),
                "each dimension was scaled by itself; the covariance between them counts, too",
            ),
            Mistake(
                torch.cov(STEPS.T, correction=0) + 1e-6 * torch.eye(2),
                "torch.cov divides by M - 1; here it was M",
            ),
        ],
    )


def distance_cases(student: ModuleType) -> Iterator[Case]:
    """Yield the question to distance."""
    mean, factor = STEPS.mean(dim=0), torch.linalg.cholesky(SPREAD)
    centred = (STEPS - mean).T
    white = torch.linalg.solve_triangular(factor, centred, upper=False)
    transposed = torch.linalg.solve_triangular(factor.T, centred, upper=True)
    yield Case(
        "distance of these steps",
        lambda: student.distance(STEPS, mean, factor),
        white.square().mean(dim=0),
        [
            Mistake(centred.square().mean(dim=0), "the steps were not whitened"),
            Mistake(white.square().sum(dim=0), "mean over D, so that it is about 1 for an expert"),
            Mistake(white.square().mean(dim=0).sqrt(), "the squared distance, without the root"),
            Mistake(
                torch.linalg.solve_triangular(factor, STEPS.T, upper=False).square().mean(dim=0),
                "subtract the mean step first",
            ),
            Mistake(transposed.square().mean(dim=0), "L^-1 times the step, not its transpose"),
            Mistake(
                (factor.T @ centred).square().mean(dim=0), "divide by L, do not multiply by it"
            ),
        ],
    )


def white_cases(student: ModuleType) -> Iterator[Case]:
    """Yield the questions to fit and distance."""
    yield from fit_cases(student)
    yield from distance_cases(student)


def cases(student: ModuleType) -> Iterator[Case]:
    """Yield the questions to a student's file."""
    yield from white_cases(student)
    latents = torch.arange(12.0).view(6, 2).square()

    def at_tap(tap: float, back: int = 0, first: bool = False) -> Tensor:
        return latents[1 - back : 6 - back]

    part = SimpleNamespace(latents=at_tap)
    yield Case(
        "steps: five latents less those before",
        lambda: student.Reward.steps(None, part),
        latents[1:] - latents[:-1],
        [
            Mistake(latents[:-1] - latents[1:], "h_k - h_(k-1), not the other way round"),
            Mistake(latents[1:], "these are the latents; subtract those before, back=1"),
        ],
    )
    rows = tiny_world.rows_of("slipped")[:20]
    solution = tiny_world.make_reward(tiny_world.SOLUTIONS / "whitened_step.py")
    right, _ = tiny_world.scores_of(solution, rows)
    yield Case(
        "score of twenty responses with a wrong digit",
        lambda: tiny_world.scores_of(tiny_world.make_reward(student.__file__), rows)[0],
        right,
        [Mistake(-right, "higher is better: minus the excess of the distance")],
        tolerance=1e-3,
    )


def show(student: ModuleType) -> None:
    """Print what the reward sees, with whitening and without, beside pairs of tokens."""
    white = tiny_world.make_reward(student.__file__)
    plain = tiny_world.make_reward(student.__file__)
    plain.keep(factor=torch.eye(len(plain.module.factor)))
    tiny_world.show(
        {
            "steps, not whitened": plain,
            "steps, whitened": white,
            "pairs of tokens": tiny_world.make_reward(tiny_world.SOLUTIONS / "bigram.py"),
        }
    )
