"""Exercise 9, 40 minutes: how small can the velocity error be?

A flow that has learnt nothing of a latent but its spread: let one dimension of x_1 be normal with mean
0 and standard deviation s, and x_0 normal with mean 0 and standard deviation 1, independent of x_1.

    x_t = t*x_1 + (1 - t)*x_0,    u = x_1 - x_0

The best guess of u is its mean given x_t, and its squared error is, on average, Var(u | x_t).

1. Derive Var(u | x_t) as a function of s and t. Pencil and paper; two ways lead there: the variance
   of a normal variable given another one, or u = (x_1 - x_t)/(1 - t), of which only x_1 is unknown.
2. The score is t/(1 - t) times the error. What does it tend to for very wide dimensions, s -> infinity?

Write both as functions. Bar: the numbers are right. The check then measures the error, on two million
draws, of the best linear guess, and shows what that says of scores in the embedded world.
"""


def best_error(s: float, t: float) -> float:
    """Return Var(u | x_t) for a dimension of spread s at time t in (0, 1)."""
    raise NotImplementedError


def wide_score(t: float) -> float:
    """Return the limit of t/(1-t) * Var(u | x_t) for s to infinity."""
    raise NotImplementedError
