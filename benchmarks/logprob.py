"""Log-probs and entropies with their backward: chunks that are recomputed, against full logits.

python benchmarks/logprob.py --json logprob.json
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
from common import compare  # noqa: E402

import rlfr  # noqa: E402


@dataclass(frozen=True)
class Settings:
    """A head of Qwen2.5-1.5B's size, on 1,024 tokens."""

    tokens: int = 1024  # response tokens
    dim: int = 1536  # hidden size
    vocabulary: int = 151_936  # rows of the head
    repeats: int = 3  # measured runs; the median counts
    json: str | None = None  # file for the figures


def prepare(settings: Settings, variant: str):
    torch.manual_seed(0)
    hidden = torch.randn(settings.tokens, settings.dim, device=rlfr.DEVICE, requires_grad=True)
    weight = (
        torch.randn(settings.vocabulary, settings.dim, device=rlfr.DEVICE) / settings.dim**0.5
    ).requires_grad_()
    targets = torch.randint(settings.vocabulary, (settings.tokens,), device=rlfr.DEVICE)

    def work():
        if variant == "chunks (ours)":
            logp, entropy = rlfr.TokenLogProbs.apply(hidden, weight, targets, 1.0, None)
        else:
            log_p = (hidden @ weight.T).log_softmax(dim=-1)
            logp, entropy = (
                log_p.gather(1, targets[:, None]).squeeze(1),
                -(log_p.exp() * log_p).sum(dim=-1),
            )
        (logp.sum() + 0.1 * entropy.sum()).backward()
        hidden.grad = weight.grad = None

    return work


if __name__ == "__main__":
    compare(
        "log-probs and entropies, forward and backward",
        prepare,
        tyro.cli(Settings),
        ["chunks (ours)", "full logits"],
    )
