"""Ridge: how badly a latent follows, linearly, from the latent before. The flow's linear null model.

Fitted in closed form to expert solutions. With whiten=True the residual counts by its covariance, the
best of the closed forms that were tried. With first=True it reads the latents of the policy before
it learnt, on the policy's text: what is left then is no drift of the latents.

    python train_rl.py --model toy-sparse --shaping study/rewards/ridge.py --dense-on response \\
        --dense experts=runs/toy-sparse/expert.jsonl whiten=True
"""

from dataclasses import dataclass

import torch

from dense import DenseReward, ExpertSettings, all_latents


@dataclass(frozen=True)
class Settings(ExpertSettings):
    """Settings of the reward."""

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
        self.fit(list(host.run_policy(fitted, self.taps)), settings)
        self.calibrate(self.errors(part) for part in host.run_policy(held_out, self.taps))

    def fit(self, parts, settings):
        """Keep the regression of each tap, and what whitens its residual."""
        fits = [regress(*pairs(parts, tap), settings.whiten) for tap in self.taps]
        weights, whiteners = zip(*fits, strict=True)
        self.keep(weights=torch.stack(weights), whiteners=torch.stack(whiteners))

    def residuals(self, part, first=False):
        """Return what the latents before leave open of each response token's, whitened, (L, M, D)."""
        before, latent = zip(*[pairs([part], tap, first) for tap in self.taps], strict=True)
        residuals = torch.stack(latent) - torch.stack(before) @ self.module.weights
        return residuals @ self.module.whiteners

    def errors(self, part, first=False):
        """Return the mean squared residual of each response token at each tap, (L, M)."""
        return self.residuals(part, first).square().mean(dim=2)

    def score(self, part):
        return part.per_tap(-self.excess(self.errors(part, first=self.reads_first)))


def pairs(parts, tap, first=False):
    """Return the latents before response tokens, with a constant, and theirs: (M, D + 1), (M, D)."""
    before = all_latents(parts, tap, back=1, first=first)
    latent = all_latents(parts, tap, first=first)
    return torch.nn.functional.pad(before, (0, 1), value=1.0), latent


def regress(before, latent, whiten):
    """Return the weights (D + 1, D) of the regression, and what whitens its residual (D, D)."""
    eye = torch.eye(before.shape[1]).to(before)
    penalty = 1e-3 * before.square().sum() / len(eye) * eye
    weights = torch.linalg.solve(before.T @ before + penalty, before.T @ latent)
    residual = latent - before @ weights
    spread = torch.cov(residual.T) + 1e-6 * eye[1:, 1:] if whiten else eye[1:, 1:]
    return weights, torch.linalg.inv(torch.linalg.cholesky(spread)).T
