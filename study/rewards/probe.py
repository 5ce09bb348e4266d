"""A logistic probe: is this the latent of an expert's token, or of the first policy's own?

It is fitted once, in the first step, to expert solutions against that step's own responses: a
discriminator as in GAIL (arXiv 1606.03476) that does not go on learning.

    python train_rl.py --model toy-sparse --shaping study/rewards/probe.py --dense-on response \\
        --dense experts=runs/toy-sparse/expert.jsonl
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dense import DenseReward


@dataclass(frozen=True)
class Settings:
    """Settings of the reward."""

    experts: str  # file of expert solutions
    penalty: float = 1e-2  # of the squared weights


class Reward(DenseReward):
    """The log-odds that a latent is an expert's."""

    Settings = Settings
    taps = (0.5,)
    clamp = (-5.0, 5.0)

    def __init__(self, settings, host):
        self.host = host
        self.penalty = settings.penalty
        self.experts, _ = host.solutions(settings.experts)
        self.keep(weight=torch.zeros(host.model.text_config.hidden_size + 1))

    def begin(self, step, episodes):
        super().begin(step, episodes)
        if not self.module.weight.any():  # neither fitted nor resumed
            self.fit(self.latents(self.experts), self.latents(episodes))

    def latents(self, rows):
        """Return the latents of all response tokens of rows, with a constant, (M, D + 1)."""
        parts = self.host.run_policy(rows, self.taps)
        return torch.cat([with_constant(part.latents(0.5)) for part in parts])

    def fit(self, expert, own):
        """Fit the probe to latents of both kinds, which count the same in all."""
        weight = torch.zeros_like(expert[0]).requires_grad_()
        optimiser = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

        def loss():
            optimiser.zero_grad()
            errors = F.softplus(-expert @ weight).mean() + F.softplus(own @ weight).mean()
            total = errors + self.penalty * weight.square().sum()
            total.backward()
            return total

        optimiser.step(loss)
        self.module.weight.copy_(weight.detach())

    def score(self, part):
        return part.per_token(with_constant(part.latents(0.5)) @ self.module.weight)


def with_constant(latents):
    """Return latents (M, D) with a 1 behind them."""
    return F.pad(latents, (0, 1), value=1.0)
