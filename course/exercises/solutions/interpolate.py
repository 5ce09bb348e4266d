"""Solution of exercise 1: flow.interpolate and flow.velocity_error."""

from torch import Tensor, nn


def interpolate(x_1: Tensor, x_0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return x_t and u, both (P, D)."""
    time = t[:, None]  # (P, 1), so that a row's time goes with all its D dimensions
    x_t = time * x_1 + (1 - time) * x_0
    u = x_1 - x_0
    return x_t, u


def velocity_error(
    flow: nn.Module, x_1: Tensor, context: Tensor, depth: Tensor, x_0: Tensor, t: Tensor
) -> Tensor:
    """Return delta(t) of each row, (P,)."""
    x_t, u = interpolate(x_1, x_0, t)
    v = flow(x_t, t, context, depth)
    return (v - u).square().mean(dim=-1)
