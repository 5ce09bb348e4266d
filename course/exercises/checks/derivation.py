"""Checks of exercise 9: the formula at some spreads and times, and against a measurement."""

from collections.abc import Callable, Iterator
from types import ModuleType

import torch

from course.exercises.cases import Case, Mistake

PLACES = [(1.0, 0.5), (1.0, 0.8), (0.25, 0.8), (3.0, 0.3)]  # s and t


def values_of(formula: Callable[[float, float], float]) -> list[float]:
    """Return a formula's values at all places."""
    return [formula(s, t) for s, t in PLACES]


def right(s: float, t: float) -> float:
    """Return Var(u | x_t)."""
    return s**2 / (t**2 * s**2 + (1 - t) ** 2)


def error_cases(student: ModuleType) -> Iterator[Case]:
    """Yield the question to best_error."""
    yield Case(
        f"best_error at (s, t) = {', '.join(map(str, PLACES))}",
        lambda: values_of(student.best_error),
        values_of(right),
        [
            Mistake(
                values_of(lambda s, t: s**2 + 1),
                "this is the variance of u when x_t is not known, the error of a flow that says 0",
            ),
            Mistake(
                values_of(lambda s, t: (1 - t) ** 2 * right(s, t)),
                "this is Var(x_1 | x_t); u = (x_1 - x_t)/(1 - t), so divide it by (1 - t)^2",
            ),
            Mistake(
                values_of(lambda s, t: t**2 * right(s, t)),
                "this is Var(x_0 | x_t); u = (x_t - x_0)/t, so divide it by t^2",
            ),
            Mistake(
                values_of(lambda s, t: right(s, 1 - t)),
                "t belongs to x_1: x_t = t*x_1 + (1 - t)*x_0",
            ),
            Mistake(
                values_of(lambda s, t: s / (t**2 * s**2 + (1 - t) ** 2)),
                "a variance: s squared above, too",
            ),
            Mistake(
                values_of(lambda s, t: t**2 * s**2 + (1 - t) ** 2), "this is the variance of x_t"
            ),
            Mistake(
                values_of(lambda s, t: right(s, t) * t / (1 - t)),
                "the error alone here; t/(1 - t) times it is the score",
            ),
        ],
    )


def cases(student: ModuleType) -> Iterator[Case]:
    """Yield the questions to a student's file."""
    yield from error_cases(student)
    times = (0.5, 0.8, 0.3)
    yield Case(
        "wide_score at t = 0.5, 0.8, 0.3",
        lambda: [student.wide_score(t) for t in times],
        [1 / (t * (1 - t)) for t in times],
        [
            Mistake(
                [1 / t**2 for t in times], "this is the error; t/(1 - t) times it is the score"
            ),
            Mistake(
                [t / (1 - t) for t in times], "this is the weight alone; the error tends to 1/t^2"
            ),
        ],
    )


def measured_error(s: float, t: float, n_draws: int = 2_000_000) -> float:
    """Return the mean squared error of the best linear guess of u from x_t, on draws."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, n_draws, generator=generator, dtype=torch.double)
    x_1, x_0 = s * noise[0], noise[1]
    x_t, u = t * x_1 + (1 - t) * x_0, x_1 - x_0
    slope = (u * x_t).mean() / x_t.square().mean()
    return (u - slope * x_t).square().mean().item()


def show(student: ModuleType) -> None:
    """Print formula and measurement at t = 0.8."""
    t = 0.8
    print(f"At t = {t}, and t/(1 - t) = {t / (1 - t):.0f}:\n")
    print("  spread s   your error   measured   score   true weight of the dimension, 1/(2 s^2)")
    for s in (0.25, 1.0, 2.2, 7.4):
        error = student.best_error(s, t)
        print(
            f"  {s:8.2f}   {error:10.3f}   {measured_error(s, t):8.3f}   {t / (1 - t) * error:5.2f}"
            f"   {1 / (2 * s**2):22.3f}"
        )
    print(f"  {'wide':>8}   {1 / t**2:10.3f}   {'':8}   {student.wide_score(t):5.2f}")
    print(
        "\nExpert tokens of the embedded world score 4.3 to 4.6 with a flow that sees the context."
    )
