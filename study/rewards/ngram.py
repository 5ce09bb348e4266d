"""Counting: how unlikely a token is after the n - 1 before, among expert tokens.

It reads no latents, and is the null model of all rewards that do: where counting pairs of tokens
(n=2), or groups of four, tells good steps from bad ones, latents have nothing to add.

    python train_rl.py --model toy-sparse --shaping study/rewards/ngram.py --dense-on response \\
        --dense experts=runs/toy-sparse/expert.jsonl n=4
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dense import DenseReward

FACTOR = 6364136223846793005  # keys are polynomials of it, modulo 2**64


@dataclass(frozen=True)
class Settings:
    """Settings of the reward."""

    experts: str  # file of expert solutions
    held_out: int = 64  # the last of them, on which the surprise is calibrated
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
        parts = [self.keys(part) for part in host.run_policy(fitted, ())]
        groups, contexts = (torch.cat(keys) for keys in zip(*parts, strict=True))
        groups, group_counts = groups.unique(return_counts=True)
        contexts, context_counts = contexts.unique(return_counts=True)
        self.keep(groups=groups, group_counts=group_counts)
        self.keep(contexts=contexts, context_counts=context_counts)
        surprise = [self.surprise(part) for part in host.run_policy(held_out, ())]
        self.calibrate(torch.cat(surprise))

    def keys(self, part):
        """Return a number for each token's group, and for the tokens before it, (M,) each."""
        ids, targets = part.batch.input_ids, part.batch.targets
        before = torch.zeros_like(ids)
        for place in range(self.settings.n - 1, 0, -1):
            shifted = F.pad(ids, (place, 0))[:, : ids.shape[1]]  # 0 before the row's beginning
            before = before * FACTOR + shifted + 1
        return (before * FACTOR + ids + 1)[targets], before[targets]

    def surprise(self, part):
        """Return -log p of each response token after those before it, (M,)."""
        groups, contexts = self.keys(part)
        count = look_up(groups, self.module.groups, self.module.group_counts)
        total = look_up(contexts, self.module.contexts, self.module.context_counts)
        smoothing = self.settings.smoothing
        return -((count + smoothing) / (total + smoothing * self.n_tokens)).log()

    def score(self, part):
        return part.per_token(-self.excess(self.surprise(part)))


def look_up(keys, known, counts):
    """Return the counts of keys (M,) among known ones, which are sorted; 0 of others."""
    place = torch.searchsorted(known, keys).clamp(max=len(known) - 1)
    return torch.where(known[place] == keys, counts[place], 0)
