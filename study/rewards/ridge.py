"""Ridge: how badly a latent follows, linearly, from the latent before. The flow's linear null model.

Fitted in closed form to expert solutions. With whiten=True the residual counts by its covariance, the
best of the closed forms that were tried. With first=True it reads the latents of the policy before
it learnt, on the policy's text: what is left then is no drift of the latents.

    python train_rl.py --model toy-sparse --shaping study/rewards/ridge.py --dense-on response \\
        --dense experts=runs/toy-sparse/expert.jsonl whiten=True
"""

from dataclasses import dataclass

import torch

from dense import DenseReward


@dataclass(frozen=True)
class Settings:
    """Settings of the reward."""

    experts: str  # file of expert solutions
    held_out: int = 64  # the last of them, on which the residual is calibrated
    whiten: bool = False  # measure the residual in its own spreads
    first: bool = False  # read the latents of the policy before it learnt


class Reward(DenseReward):
    """Minus the excess of the mean squared residual over that of expert tokens, by tap."""

    Settings = Settings
    taps = (0.25, 0.5, 0.75)
    clamp = (-10.0, 0.0)

    def __init__(self, settings, host):
        self.reads_first = settings.first
        fitted, held_out = host.solutions(settings.experts, settings.held_out)
        parts = list(host.run_policy(fitted, self.taps))
        fits = [fit(*pairs(parts, tap), settings.whiten) for tap in self.taps]
        weights, whiteners = zip(*fits, strict=True)
        self.keep(weights=torch.stack(weights), whiteners=torch.stack(whiteners))
        errors = [self.errors(part) for part in host.run_policy(held_out, self.taps)]
        self.calibrate(torch.cat(errors, dim=1))

    def errors(self, part, first=False):
        """Return the mean squared residual of each response token at each tap, (L, M)."""
        errors = []
        for i, tap in enumerate(self.taps):
            before, latent = pairs([part], tap, first)
            residual = (latent - before @ self.module.weights[i]) @ self.module.whiteners[i]
            errors.append(residual.square().mean(dim=1))
        return torch.stack(errors)

    def score(self, part):
        excess = self.excess(self.errors(part, first=self.reads_first))  # (L, M)
        return part.per_token(-excess.T).movedim(2, 0)  # (L, B, T)


def pairs(parts, tap, first=False):
    """Return the latents before response tokens, with a constant, and theirs: (M, D + 1), (M, D)."""
    before = torch.cat([part.latents(tap, back=1, first=first) for part in parts]).float()
    latent = torch.cat([part.latents(tap, first=first) for part in parts]).float()
    return torch.nn.functional.pad(before, (0, 1), value=1.0), latent


def fit(before, latent, whiten):
    """Return the weights (D + 1, D) of the regression, and what whitens its residual (D, D)."""
    eye = torch.eye(before.shape[1]).to(before)
    penalty = 1e-3 * before.square().sum() / len(eye) * eye
    weights = torch.linalg.solve(before.T @ before + penalty, before.T @ latent)
    residual = latent - before @ weights
    spread = torch.cov(residual.T) + 1e-6 * eye[1:, 1:] if whiten else eye[1:, 1:]
    return weights, torch.linalg.inv(torch.linalg.cholesky(spread)).T
