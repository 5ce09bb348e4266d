"""Counting: how unlikely a token is after the n - 1 before, among expert tokens.

It reads no latents, and is the null model of all rewards that do: where counting pairs of tokens
(n=2), or groups of four, tells good steps from bad ones, latents have nothing to add.

    python train_rl.py --model toy-sparse --shaping study/rewards/ngram.py --dense-on response \\
        --dense experts=runs/toy-sparse/expert.jsonl n=4
"""

from dataclasses import dataclass

import torch

from dense import DenseReward, ExpertSettings

FACTOR = 6364136223846793005  # keys are polynomials of it, modulo 2**64


@dataclass(frozen=True)
class Settings(ExpertSettings):
    """Settings of the reward."""

    n: int = 2  # tokens of a group
    smoothing: float = 0.1  # added to the count of each group


class Reward(DenseReward):
    """Minus the excess of -log p(token | n - 1 tokens before) over that of expert tokens."""

    Settings = Settings
    clamp = (-10.0, 0.0)

    def __init__(self, settings, host):
        if settings.n < 1:
            raise ValueError(f"n={settings.n}: expected 1 or more tokens")
        self.settings = settings
        self.n_tokens = len(host.model.tokenizer)
        fitted, held_out = host.solutions(settings.experts, settings.held_out)
        keys = torch.cat([self.keys(part) for part in host.run_policy(fitted, ())], dim=1)
        known, counts = keys.unique(return_counts=True)
        self.keep(known=known, counts=counts)
        self.calibrate(self.surprise(part) for part in host.run_policy(held_out, ()))

    def keys(self, part):
        """Return a number for each token's group, and one for the tokens before it, (2, M)."""
        ids, targets = part.batch.input_ids, part.batch.targets
        before = torch.zeros_like(ids)
        for place in range(self.settings.n - 1, 0, -1):
            # 0 before the row's beginning
            shifted = torch.nn.functional.pad(ids, (place, 0))[:, : ids.shape[1]]
            before = before * FACTOR + shifted + 1
        return torch.stack([before * FACTOR + ids + 1, before])[:, targets]

    def count(self, keys):
        """Return how often experts wrote what has these keys."""
        known = self.module.known  # sorted
        place = torch.searchsorted(known, keys).clamp(max=len(known) - 1)
        return torch.where(known[place] == keys, self.module.counts[place], 0)

    def surprise(self, part):
        """Return -log p of each response token after those before it, (M,)."""
        of_group, of_before = self.count(self.keys(part))
        smoothing = self.settings.smoothing
        return -((of_group + smoothing) / (of_before + smoothing * self.n_tokens)).log()

    def score(self, part):
        return part.per_token(-self.excess(self.surprise(part)))
