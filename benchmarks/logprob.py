"""Log-probs and entropies with their backward: chunks of the vocabulary, against full logits.

    python benchmarks/logprob.py --json runs/logprob.json
    python benchmarks/logprob.py --dtype bfloat16

The backward makes those logits again that the forward did not keep. In bfloat16 full logits become float32 before
the softmax, as they do in chunks.
"""

import repository  # noqa: F401

# isort: split
from dataclasses import dataclass
from typing import Literal

import torch
import tyro

from common import compare
from infra import errors
from infra.logprobs import Scaling, TokenLogProbs
from infra.parallel import DEVICE

CHUNKS = "chunks (ours)"
FULL = "full logits"


@dataclass(frozen=True)
class Settings:
    """A head of Qwen2.5-1.5B's size, on 1,024 tokens."""

    tokens: int = 1024  # response tokens
    dim: int = 1536  # hidden size
    vocabulary: int = 151_936  # rows of the head
    dtype: Literal["float32", "bfloat16"] = "float32"  # of hidden states and head
    repeats: int = 3  # runs of each variant, in turns; the median counts
    json: str | None = None  # file for the figures


def full_logits(hidden, weight, targets):
    """Return log-probs and entropies from log-probs of all words."""
    log_p = (hidden @ weight.T).float().log_softmax(dim=-1)
    logp = log_p.gather(1, targets[:, None]).squeeze(1)
    entropy = -(log_p.exp() * log_p).sum(dim=-1)
    return logp, entropy


def prepare(settings: Settings, variant: str):
    """Return a function that runs a variant once."""
    torch.manual_seed(0)
    kind = {"device": DEVICE, "dtype": getattr(torch, settings.dtype)}
    hidden = torch.randn(settings.tokens, settings.dim, requires_grad=True, **kind)
    weight = torch.randn(settings.vocabulary, settings.dim, **kind) / settings.dim**0.5
    weight.requires_grad_()
    targets = torch.randint(settings.vocabulary, (settings.tokens,), device=DEVICE)

    def work():
        if variant == CHUNKS:
            logp, entropy = TokenLogProbs.apply(hidden, weight, targets, Scaling(1.0))
        else:
            logp, entropy = full_logits(hidden, weight, targets)
        loss = logp.sum() + 0.1 * entropy.sum()
        loss.backward()
        hidden.grad = None
        weight.grad = None

    return work


if __name__ == "__main__":
    title = "log-probs and entropies, forward and backward"
    errors.run(lambda: compare(title, prepare, tyro.cli(Settings), [CHUNKS, FULL]))
