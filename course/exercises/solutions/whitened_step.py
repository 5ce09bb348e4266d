"""Solution of exercise 7: the step between latents, in the spreads of expert steps."""

from dataclasses import dataclass

import torch
from torch import Tensor

import dense


def fit(steps: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean m (D,) of expert steps (M, D), and L (D, D), the Cholesky factor of C.

    C = torch.cov(steps.T), which divides by M - 1; add 1e-6 to its diagonal.
    """
    spread = torch.cov(steps.T) + 1e-6 * torch.eye(steps.shape[1])
    return steps.mean(dim=0), torch.linalg.cholesky(spread)


def distance(steps: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
    """Return the distance of steps (M, D), (M,), by the mean (D,) and the factor L (D, D).

    torch.linalg.solve_triangular(factor, right, upper=False) returns L^-1 times right, (D, M).
    """
    white = torch.linalg.solve_triangular(factor, (steps - mean).T, upper=False)  # (D, M)
    return white.square().mean(dim=0)


@dataclass(frozen=True)
class Settings:
    """Settings of the reward."""

    experts: str  # file of expert solutions
    held_out: int = 64  # the last of them, on which the distance is calibrated


class Reward(dense.DenseReward):
    """Minus the excess of a step's distance over that of expert steps."""

    Settings = Settings
    taps = (0.5,)
    clamp = (-10.0, 0.0)

    def __init__(self, settings, host):
        fitted, held_out = host.solutions(settings.experts, settings.held_out)
        parts = host.run_policy(fitted, self.taps)
        mean, factor = fit(torch.cat([self.steps(part) for part in parts]))
        self.keep(mean=mean, factor=factor)
        parts = host.run_policy(held_out, self.taps)
        self.calibrate(torch.cat([self.distance(part) for part in parts]))

    def steps(self, part):
        """Return h_k - h_(k-1) of each response token at the tap, (M, D); see part.latents."""
        return (part.latents(0.5) - part.latents(0.5, back=1)).float()

    def distance(self, part):
        """Return the distance of the step of each response token, (M,)."""
        return distance(self.steps(part), self.module.mean, self.module.factor)

    def score(self, part):
        """Return the score of each response token, (B, T)."""
        return part.per_token(-self.excess(self.distance(part)))
