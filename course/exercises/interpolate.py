"""Exercise 1, 25 minutes: the path from noise to a latent, and the error of a velocity.

A flow learns to carry noise x_0 (t = 0) along a straight line to a latent x_1 (t = 1):

    x_t = t*x_1 + (1 - t)*x_0                                 a point of the line
    u = x_1 - x_0                                             its velocity, the same all along
    delta(t) = mean_D (v(x_t, t, context, depth) - u)^2       how wrong the flow's velocity v is

P counts rows, each with a time of its own; D is the width of a latent. flow.py has the legend.

Bar: every case is right. The check then fits a flow to points of a ring with your two functions, and
draws the plane: it is blank where a point has a small error.
"""

from torch import Tensor, nn


def interpolate(x_1: Tensor, x_0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return x_t and u, both (P, D).

    x_1: (P, D) latents; x_0: (P, D) noise; t: (P,) times in [0, 1], or (1,), one for all rows
    """
    raise NotImplementedError


def velocity_error(
    flow: nn.Module, x_1: Tensor, context: Tensor, depth: Tensor, x_0: Tensor, t: Tensor
) -> Tensor:
    """Return delta(t) of each row, (P,).

    flow: called as flow(x_t, t, context, depth), returns the velocity v (P, D)
    x_1, context, x_0: (P, D); depth, t: (P,) or (1,)
    """
    raise NotImplementedError
