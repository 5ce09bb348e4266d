"""A small network that tells a latent from the one before: the flow without its noise and times.

It is fitted to expert solutions by squared errors, one network for each tap. A token is penalised
by its error beyond that of expert tokens.

    python train_rl.py --model toy-sparse --shaping study/rewards/mlp.py --dense-on response \\
        --dense experts=runs/toy-sparse/expert.jsonl
"""

from dataclasses import dataclass

import torch
from torch import nn

from dense import DenseReward


@dataclass(frozen=True)
class Settings:
    """Settings of the reward."""

    experts: str  # file of expert solutions
    held_out: int = 64  # the last of them, on which the error is calibrated
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
        dim, width = host.model.text_config.hidden_size, settings.width
        nets = []
        for tap in self.taps:
            net = nn.Sequential(nn.Linear(dim, width), nn.SiLU(), nn.Linear(width, dim))
            nets.append(fit(net.to(parts[0].latents(tap).device), parts, tap, settings.steps))
        self.module = nn.Module()
        self.module.nets = nn.ModuleList(nets).requires_grad_(False)
        self.calibrate(torch.cat([self.errors(p) for p in host.run_policy(held_out, self.taps)], 1))

    @torch.no_grad()
    def errors(self, part):
        """Return the mean squared error of each response token at each tap, (L, M)."""
        errors = []
        for net, tap in zip(self.module.nets, self.taps, strict=True):
            guess = net(part.latents(tap, back=1).float())
            errors.append((part.latents(tap).float() - guess).square().mean(dim=1))
        return torch.stack(errors)

    def score(self, part):
        return torch.stack([part.per_token(-v) for v in self.excess(self.errors(part))])


@torch.enable_grad()
def fit(net, parts, tap, steps):
    """Fit a network to the latents of a tap, and return it."""
    before = torch.cat([part.latents(tap, back=1) for part in parts]).float()
    latent = torch.cat([part.latents(tap) for part in parts]).float()
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for _ in range(steps):
        chosen = torch.randint(len(latent), (1024,), device=latent.device)
        loss = (net(before[chosen]) - latent[chosen]).square().mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return net
