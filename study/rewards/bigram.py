"""Counting: how unlikely a token is after the one before, among expert tokens. It reads no latents.

The null model of all rewards that do: where counting pairs of tokens tells good steps from bad ones,
latents have nothing to add.

    python train_rl.py --model toy-sparse --shaping study/rewards/bigram.py --dense-on response \\
        --dense experts=runs/toy-sparse/expert.jsonl
"""

from dataclasses import dataclass

import torch

from dense import DenseReward


@dataclass(frozen=True)
class Settings:
    """Settings of the reward."""

    experts: str  # file of expert solutions
    held_out: int = 64  # the last of them, on which the surprise is calibrated
    smoothing: float = 0.1  # added to the count of each pair


class Reward(DenseReward):
    """Minus the excess of -log p(token | token before) over that of expert tokens."""

    Settings = Settings
    clamp = (-10.0, 0.0)

    def __init__(self, settings, host):
        self.smoothing = settings.smoothing
        self.n_tokens = len(host.model.tokenizer)
        fitted, held_out = host.solutions(settings.experts, settings.held_out)
        ids = [[row.prompt_ids[-1], *row.response_ids] for row in fitted]
        firsts = torch.tensor([token for row in ids for token in row[:-1]])
        pairs = firsts * self.n_tokens + torch.tensor([token for row in ids for token in row[1:]])
        known, counts = pairs.unique(return_counts=True)
        self.keep(pairs=known, counts=counts, firsts=firsts.bincount(minlength=self.n_tokens))
        surprise = [self.surprise(part) for part in host.run_policy(held_out, ())]
        self.calibrate(torch.cat(surprise))

    def surprise(self, part):
        """Return -log p of each response token after the one before it, (M,)."""
        ids = part.batch.input_ids
        before, token = ids.roll(1, dims=1)[part.batch.targets], ids[part.batch.targets]
        pair = before * self.n_tokens + token
        place = torch.searchsorted(self.module.pairs, pair).clamp(max=len(self.module.pairs) - 1)
        count = torch.where(self.module.pairs[place] == pair, self.module.counts[place], 0)
        total = self.module.firsts[before] + self.smoothing * self.n_tokens
        return -((count + self.smoothing) / total).log()

    def score(self, part):
        return part.per_token(-self.excess(self.surprise(part)))
