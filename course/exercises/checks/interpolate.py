"""Checks of exercise 1: two rows by hand, then a flow that is fitted to a ring."""

import math
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

import flow as fl
from course.exercises.cases import Case, Mistake

X_1 = torch.tensor([[4.0, 0.0], [2.0, 2.0]])
X_0 = torch.tensor([[0.0, 2.0], [2.0, -2.0]])
T = torch.tensor([0.25, 0.5])
X_T = torch.tensor([[1.0, 1.5], [2.0, 0.0]])
U = torch.tensor([[4.0, -2.0], [0.0, 4.0]])
SHADES = " .:-=+*#%@"  # from a small error to a large one


def half_of(x_t: Tensor, t: Tensor, context: Tensor, depth: Tensor) -> Tensor:
    """Be a flow whose velocity is half of where it is, plus the context."""
    return x_t / 2 + context


def path_cases(student: ModuleType) -> Iterator[Case]:
    """Yield the questions to interpolate."""
    yield Case(
        "interpolate: the point x_t at t = 0.25 and 0.5",
        lambda: student.interpolate(X_1, X_0, T)[0],
        X_T,
        [
            Mistake(
                (1 - T[:, None]) * X_1 + T[:, None] * X_0,
                "t = 1 is the latent and t = 0 is the noise, not the other way round",
            ),
            Mistake(
                T * X_1 + (1 - T) * X_0,
                "t has one time for each row; here it went with the columns, as t * x_1 aligns the last "
                "dimension (with other sizes it would have been an error)",
            ),
            Mistake(
                TypeError, "interpolate returns a pair, the point and the velocity: return x_t, u"
            ),
        ],
    )
    yield Case(
        "interpolate: the velocity u",
        lambda: student.interpolate(X_1, X_0, T)[1],
        U,
        [
            Mistake(-U, "u points from the noise to the latent, the way that time runs"),
            Mistake(
                X_1 - X_T, "u is the velocity of the whole line, x_1 - x_0, also in the middle"
            ),
        ],
    )
    yield Case(
        "interpolate: one time (1,) for all rows",
        lambda: student.interpolate(X_1, X_0, torch.tensor([1.0]))[0],
        X_1,
    )


def error_cases(student: ModuleType) -> Iterator[Case]:
    """Yield the question to velocity_error of two rows."""
    context = torch.ones(2, 2)
    error = (half_of(X_T, T, context, T) - U).square()
    yield Case(
        "velocity_error of a flow with v = x_t/2 + context",
        lambda: student.velocity_error(half_of, X_1, context, T, X_0, T),
        error.mean(dim=1),
        [
            Mistake(error.sum(dim=1), "mean over the D dimensions, not their sum"),
            Mistake(error.mean(), "one error for each row, (P,): take the mean over D alone"),
            Mistake(error.mean(dim=0), "the mean went over the rows; D is the last dimension"),
            Mistake(
                (half_of(X_1, T, context, T) - U).square().mean(dim=1),
                "the flow is asked at x_t, the point of the path, not at the latent",
            ),
            Mistake(error.sqrt().mean(dim=1), "the difference is squared"),
        ],
    )


def cases(student: ModuleType) -> Iterator[Case]:
    """Yield the questions to a student's file."""
    yield from path_cases(student)
    yield from error_cases(student)
    generator = torch.Generator().manual_seed(0)
    x_1, x_0, context = torch.randn(3, 50, 7, generator=generator)
    t = torch.rand(50, generator=generator)
    yield Case(
        "velocity_error of fifty random rows",
        lambda: student.velocity_error(half_of, x_1, context, t, x_0, t),
        fl.velocity_error(half_of, x_1, context, t, x_0, t),
    )


def fit_ring(student: ModuleType, n_steps: int = 400) -> torch.nn.Module:
    """Fit a velocity network to points of a ring of radius 2 by the student's velocity error."""
    torch.manual_seed(0)
    net = fl.VelocityNet(dim=2, context_dim=2, width=48, n_blocks=2)
    optimiser = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for _ in range(n_steps):
        angle = 2 * math.pi * torch.rand(256)
        x_1 = 2 * torch.stack([angle.cos(), angle.sin()], dim=1)
        arguments = (x_1, torch.zeros_like(x_1), torch.zeros(1), torch.randn_like(x_1))
        student.velocity_error(net, *arguments, torch.rand(256)).mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    return net


@torch.no_grad()
def errors_at(student: ModuleType, net: torch.nn.Module, points: Tensor, n_draws: int) -> Tensor:
    """Return the mean velocity error of points (K, 2) at t = 0.8 over draws of noise, (K,)."""
    x_1 = points.repeat(n_draws, 1)
    x_0 = torch.randn(x_1.shape, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0.8])
    errors = student.velocity_error(net, x_1, torch.zeros_like(x_1), torch.zeros(1), x_0, t)
    return errors.view(n_draws, -1).mean(dim=0)


def show(student: ModuleType) -> None:
    """Draw the velocity error over the plane."""
    net = fit_ring(student)
    y, x = torch.meshgrid(torch.linspace(3, -3, 17), torch.linspace(-3, 3, 45), indexing="ij")
    errors = errors_at(student, net, torch.stack([x, y], dim=-1).view(-1, 2), n_draws=32)
    shade = (errors.log2().clamp(0, 4.99) * 2).long().view(x.shape)
    print(
        "The velocity error at t = 0.8 of a flow that has seen points of a ring, and nothing else:\n"
    )
    for row in shade.tolist():
        print("  " + "".join(SHADES[level] for level in row).rstrip())
    on, inside, outside = errors_at(
        student, net, torch.tensor([[2.0, 0.0], [0.0, 0.0], [3.0, 0.0]]), n_draws=256
    ).tolist()
    print(f"\non the ring {on:.1f}, in its middle {inside:.1f}, outside {outside:.1f}")
