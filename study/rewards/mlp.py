"""A small network that tells a latent from the one before: the flow without its noise and times.

It is fitted to expert solutions by squared errors, one network for each tap. A token is penalised
by its error beyond that of expert tokens.

    python train_rl.py --model toy-sparse --shaping study/rewards/mlp.py --dense-on response \\
        --dense experts=runs/toy-sparse/expert.jsonl
"""

from dataclasses import dataclass

import torch
from torch import nn

from dense import DenseReward, ExpertSettings, all_latents


@dataclass(frozen=True)
class Settings(ExpertSettings):
    """Settings of the reward."""

    steps: int = 500  # of the fit, 1024 tokens each
    width: int = 256


class Reward(DenseReward):
    """Minus the excess of the mean squared error over that of expert tokens, by tap."""

    Settings = Settings
    taps = (0.25, 0.5, 0.75)
    clamp = (-10.0, 0.0)

    def __init__(self, settings, host):
        fitted, held_out = host.solutions(settings.experts, settings.held_out)
        parts = list(host.run_policy(fitted, self.taps))
        self.module = nn.Module()
        self.module.nets = nn.ModuleList(fit(parts, tap, settings) for tap in self.taps)
        self.calibrate(self.errors(part) for part in host.run_policy(held_out, self.taps))

    def errors(self, part):
        """Return the mean squared error of each response token at each tap, (L, M)."""
        before = [part.latents(tap, back=1) for tap in self.taps]
        guess = [net(latent) for net, latent in zip(self.module.nets, before, strict=True)]
        latent = [part.latents(tap) for tap in self.taps]
        return (torch.stack(latent) - torch.stack(guess)).square().mean(dim=2)

    def score(self, part):
        return part.per_tap(-self.excess(self.errors(part)))


def fit(parts, tap, settings):
    """Return a network that is fitted to the latents of a tap."""
    before = all_latents(parts, tap, back=1)
    latent = all_latents(parts, tap)
    dim, width = latent.shape[1], settings.width
    net = nn.Sequential(nn.Linear(dim, width), nn.SiLU(), nn.Linear(width, dim)).to(latent.device)
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for _ in range(settings.steps):
        chosen = torch.randint(len(latent), (1024,), device=latent.device)
        loss = (net(before[chosen]) - latent[chosen]).square().mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return net.requires_grad_(False)
