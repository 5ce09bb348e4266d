"""Mahalanobis: how far a latent is from the mean of expert latents, in their spreads (arXiv 1807.03888).

    python train_rl.py --model toy-sparse --shaping study/rewards/mahalanobis.py --dense-on response \\
        --dense experts=runs/toy-sparse/expert.jsonl
"""

import torch

from dense import DenseReward, ExpertSettings, all_latents


class Reward(DenseReward):
    """Minus the excess of the squared distance over that of expert tokens, by tap."""

    Settings = ExpertSettings
    taps = (0.25, 0.5, 0.75)
    clamp = (-10.0, 0.0)

    def __init__(self, settings, host):
        fitted, held_out = host.solutions(settings.experts, settings.held_out)
        parts = list(host.run_policy(fitted, self.taps))
        latents = [all_latents(parts, tap) for tap in self.taps]
        spreads = [torch.cov(x.T) + 1e-6 * torch.eye(x.shape[1]).to(x) for x in latents]
        self.keep(
            means=torch.stack([x.mean(dim=0) for x in latents]),
            whiteners=torch.stack([torch.linalg.cholesky(spread) for spread in spreads]),
        )
        self.calibrate(self.distances(part) for part in host.run_policy(held_out, self.taps))

    def distances(self, part):
        """Return the squared distance of each response token at each tap, over D, (L, M)."""
        distances = []
        for i, tap in enumerate(self.taps):
            centred = (part.latents(tap) - self.module.means[i]).T
            whitened = torch.linalg.solve_triangular(self.module.whiteners[i], centred, upper=False)
            distances.append(whitened.square().mean(dim=0))
        return torch.stack(distances)

    def score(self, part):
        return part.per_tap(-self.excess(self.distances(part)))
