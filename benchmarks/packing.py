"""Scoring and update of a step's episodes, packed in one way after another, and with their padding.

    python benchmarks/packing.py --json runs/packing.json
    python benchmarks/packing.py --prompt 200 --longest 40      long prompts, short responses

Each variant has what the one after it has, and one thing more: prompts that are computed once, and
no padding but in attention.
The policy has random weights and, by default, the size of the embedded world's.
"""

import repository  # noqa: F401

# isort: split
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import tyro
from transformers import Qwen2Config, Qwen2ForCausalLM

from common import compare
from infra import batching, errors
from infra.parallel import DEVICE
from policy import Policy

SHARED = "packed, prompts shared (ours)"
PACKED = "packed"
PADDED = "padded"


@dataclass(frozen=True)
class Settings:
    """Episodes and policy of the embedded world's size."""

    groups: int = 16  # prompts
    group_size: int = 8  # responses a prompt
    prompt: int = 20  # tokens of a prompt
    longest: int = 30  # tokens of the longest response; the others have from 1 on
    token_budget: int = 4096  # tokens of a micro-batch
    dim: int = 128  # hidden size
    layers: int = 4  # decoder layers
    vocabulary: int = 272  # words
    repeats: int = 9  # runs of each variant, in turns; the median counts
    json: str | None = None  # file for the figures


def make_policy(settings: Settings) -> Policy:
    """Return a policy with random weights."""
    config = Qwen2Config(
        vocab_size=settings.vocabulary,
        hidden_size=settings.dim,
        intermediate_size=3 * settings.dim,
        num_hidden_layers=settings.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    torch.manual_seed(0)
    return Policy(Qwen2ForCausalLM(config).train()).to(DEVICE)


def make_rows(settings: Settings) -> list[batching.Row]:
    """Return groups of random episodes."""
    generator = random.Random(0)

    def words(count: int) -> list[int]:
        return [generator.randrange(settings.vocabulary) for _ in range(count)]

    rows = []
    for _ in range(settings.groups):
        prompt = words(settings.prompt)
        for _ in range(settings.group_size):
            rows.append(batching.Row(prompt, words(generator.randint(1, settings.longest))))
    return rows


def prepare(settings: Settings, variant: str):
    """Return a function that scores and updates once."""
    policy = make_policy(settings)
    rows = make_rows(settings)
    policy.packs = variant != PADDED

    def micro_batches() -> Iterator[batching.Batch]:
        for _, batch in batching.micro_batches(rows, settings.token_budget, 0, 1):
            if variant == SHARED:
                yield batch
            else:  # as if no two rows had the same prompt
                masks = (batch.attention_mask, batch.in_response)
                no_two = torch.arange(len(batch.input_ids), device=DEVICE)
                yield replace(batch, packing=batching.find_packing(*masks, first_row=no_two))

    def work() -> None:
        for batch in micro_batches():
            with torch.no_grad():
                policy(batch)
        for batch in micro_batches():
            policy(batch).logp.sum().backward()

    return work


if __name__ == "__main__":
    title = "scoring and update of a step's episodes"
    errors.run(lambda: compare(title, prepare, tyro.cli(Settings), [SHARED, PACKED, PADDED]))
