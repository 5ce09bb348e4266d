"""Solution of exercise 9.

u and x_t are normal with mean 0, and

    Var(u) = s^2 + 1
    Var(x_t) = t^2 s^2 + (1 - t)^2
    Cov(u, x_t) = Cov(x_1 - x_0, t*x_1 + (1 - t)*x_0) = t*s^2 - (1 - t)

so that Var(u | x_t) = Var(u) - Cov(u, x_t)^2 / Var(x_t)

    = ((s^2 + 1)(t^2 s^2 + (1 - t)^2) - (t*s^2 - (1 - t))^2) / Var(x_t)
    = (s^2 (1 - t)^2 + s^2 t^2 + 2 s^2 t(1 - t)) / Var(x_t)        the terms s^4 t^2 and (1 - t)^2 cancel
    = s^2 / (t^2 s^2 + (1 - t)^2)                                  as ((1 - t) + t)^2 = 1

The other way: given x_t, u = (x_1 - x_t)/(1 - t), so its variance is Var(x_1 | x_t)/(1 - t)^2. For
s -> infinity the variance is 1/t^2, and t/(1 - t) times that is 1/(t(1 - t)): at t = 0.8 it is 6.25,
whatever the latent is. It is 5.88 for s = 1. A score of 5 says little of a token, then; a score below
is what the flow has learnt from the context.
"""


def best_error(s: float, t: float) -> float:
    """Return Var(u | x_t) for a dimension of spread s at time t in (0, 1)."""
    return s**2 / (t**2 * s**2 + (1 - t) ** 2)


def wide_score(t: float) -> float:
    """Return the limit of t/(1-t) * Var(u | x_t) for s to infinity."""
    return 1 / (t * (1 - t))
