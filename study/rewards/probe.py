"""A logistic probe: is this the latent of an expert's token, or of the policy's own?

It is fitted in the first step to expert solutions against that step's own responses: a discriminator
as in GAIL (arXiv 1606.03476). By default it does not go on learning. Latents change with the policy,
and such a probe may come to see that change alone: refit=N fits it anew every N steps, to what the
policy of now makes of the expert solutions and of its own responses.

    python train_rl.py --model toy-sparse --shaping study/rewards/probe.py --dense-on response \\
        --dense experts=runs/toy-sparse/expert.jsonl
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dense import DenseReward, all_latents


@dataclass(frozen=True)
class Settings:
    """Settings of the reward."""

    experts: str  # file of expert solutions
    penalty: float = 1e-2  # of the squared weights
    refit: int = 0  # steps between refits on the policy of now; 0: fitted once


class Reward(DenseReward):
    """The log-odds that a latent is an expert's."""

    Settings = Settings
    taps = (0.5,)
    clamp = (-5.0, 5.0)

    def __init__(self, settings, host):
        self.host = host
        self.settings = settings
        self.experts, _ = host.solutions(settings.experts)
        self.keep(weight=torch.zeros(host.model.text_config.hidden_size + 1))

    def begin(self, step, episodes):
        super().begin(step, episodes)
        is_fitted = self.module.weight.any()  # or resumed
        if not is_fitted or (self.settings.refit and step % self.settings.refit == 0):
            self.fit(self.latents(self.experts), self.latents(episodes))

    def latents(self, rows):
        """Return the latents of all response tokens of rows, with a constant, (M, D + 1)."""
        return with_constant(all_latents(self.host.run_policy(rows, self.taps), 0.5))

    def fit(self, expert, own):
        """Fit the probe to latents of both kinds, which count the same in all."""
        weight = torch.zeros_like(expert[0]).requires_grad_()
        optimiser = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

        def loss():
            optimiser.zero_grad()
            errors = F.softplus(-expert @ weight).mean() + F.softplus(own @ weight).mean()
            total = errors + self.settings.penalty * weight.square().sum()
            total.backward()
            return total

        optimiser.step(loss)
        self.module.weight.copy_(weight.detach())

    def score(self, part):
        return part.per_token(with_constant(part.latents(0.5)) @ self.module.weight)


def with_constant(latents):
    """Return latents (M, D) with a 1 behind them."""
    return F.pad(latents, (0, 1), value=1.0)
