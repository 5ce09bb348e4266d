"""Exercise 6, 40 minutes: a dense reward that counts pairs of tokens.

The null model of all dense rewards: how unlikely is a token after the one before it, among the tokens
of experts? It reads no latents. With counts n of pairs, V tokens in the vocabulary and s = SMOOTHING:

    surprise = -log((n(before, token) + s)/(n(before, anything) + s*V))

The score is minus the surprise, less its mean over expert tokens, in their spreads: self.excess().
Write pairs, count, surprise and score; __init__ calls them. M counts the response tokens of a
micro-batch, row by row; docs/dense-rewards.md has what else a part holds.

Bar: the scores are those of study/rewards/ngram.py with n=2. The check then asks how often an expert's
response is preferred to one that is garbled, idle or wrong.
"""

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
    raise NotImplementedError


def count(before: Tensor, token: Tensor, n_tokens: int) -> Tensor:
    """Return how often each pair occurs, (V, V); the row is the token before.

    before, token: (K,); n_tokens: V
    """
    raise NotImplementedError


def surprise(counts: Tensor, before: Tensor, token: Tensor) -> Tensor:
    """Return the surprise of each token, (M,), by counts of pairs (V, V)."""
    raise NotImplementedError


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
        raise NotImplementedError
