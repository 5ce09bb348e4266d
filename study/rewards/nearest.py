"""Nearest neighbours: how far a latent is from the nearest of some expert latents (arXiv 2204.06507).

    python train_rl.py --model toy-sparse --shaping study/rewards/nearest.py --dense-on response \\
        --dense experts=runs/toy-sparse/expert.jsonl
"""

from dataclasses import dataclass

import torch

from dense import DenseReward, ExpertSettings, all_latents


@dataclass(frozen=True)
class Settings(ExpertSettings):
    """Settings of the reward."""

    n_latents: int = 4096  # expert latents that are kept, evenly spaced among all


class Reward(DenseReward):
    """Minus the excess of the distance over that of held-out expert tokens."""

    Settings = Settings
    taps = (0.5,)
    clamp = (-10.0, 0.0)

    def __init__(self, settings, host):
        fitted, held_out = host.solutions(settings.experts, settings.held_out)
        latents = all_latents(host.run_policy(fitted, self.taps), 0.5)
        chosen = torch.linspace(0, len(latents) - 1, min(settings.n_latents, len(latents)))
        self.keep(latents=latents[chosen.long()])
        self.calibrate(self.distance(part) for part in host.run_policy(held_out, self.taps))

    def distance(self, part):
        """Return the distance of each response token to the nearest expert latent, (M,)."""
        return torch.cdist(part.latents(0.5), self.module.latents).amin(dim=1)

    def score(self, part):
        return part.per_token(-self.excess(self.distance(part)))
