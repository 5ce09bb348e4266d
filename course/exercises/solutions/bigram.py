"""Solution of exercise 6: pairs of tokens, as study/rewards/ngram.py counts groups of them."""

from dataclasses import dataclass

import torch
from torch import Tensor

import dense

SMOOTHING = 0.1


def pairs(part: dense.MicroBatch) -> tuple[Tensor, Tensor]:
    """Return the token before each response token, and the response token itself, (M,) each.

    part.batch.input_ids: (B, S), prompts and responses; part.batch.targets: (B, S) bool, true for
    response tokens. The first token of a response comes after the last one of its prompt.
    """
    ids, targets = part.batch.input_ids, part.batch.targets
    return ids[:, :-1][targets[:, 1:]], ids[targets]


def count(before: Tensor, token: Tensor, n_tokens: int) -> Tensor:
    """Return how often each pair occurs, (V, V); the row is the token before.

    before, token: (K,); n_tokens: V
    """
    numbers = before * n_tokens + token  # of the pairs
    return torch.bincount(numbers, minlength=n_tokens**2).view(n_tokens, n_tokens)


def surprise(counts: Tensor, before: Tensor, token: Tensor) -> Tensor:
    """Return the surprise of each token, (M,), by counts of pairs (V, V)."""
    n_of_before = counts.sum(dim=1)[before]
    probability = (counts[before, token] + SMOOTHING) / (n_of_before + SMOOTHING * len(counts))
    return -probability.log()


@dataclass(frozen=True)
class Settings:
    """Settings of the reward."""

    experts: str  # file of expert solutions
    held_out: int = 64  # the last of them, on which the surprise is calibrated


class Reward(dense.DenseReward):
    """Minus the excess of a token's surprise over that of expert tokens."""

    Settings = Settings
    clamp = (-10.0, 0.0)

    def __init__(self, settings, host):
        fitted, held_out = host.solutions(settings.experts, settings.held_out)
        n_tokens = len(host.model.tokenizer)
        counts = [count(*pairs(part), n_tokens) for part in host.run_policy(fitted, ())]
        self.keep(counts=sum(counts))
        parts = host.run_policy(held_out, ())
        self.calibrate(torch.cat([surprise(self.module.counts, *pairs(part)) for part in parts]))

    def score(self, part):
        """Return the score of each response token, (B, T); part.per_token spreads (M,)."""
        return part.per_token(-self.excess(surprise(self.module.counts, *pairs(part))))
