"""One step of the offline start: early exit and response tokens only, against a full forward and every position.

python benchmarks/flow_start.py --json flow_start.json
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from transformers import AutoModelForCausalLM, Qwen2Config

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
from common import compare  # noqa: E402

import flow as fl  # noqa: E402
import parallel  # noqa: E402
import rlfr  # noqa: E402


@dataclass(frozen=True)
class Settings:
    """A random decoder and solutions of which half is prompt."""

    sequences: int = 8  # rows of a batch
    prompt: int = 256  # prompt tokens a row
    response: int = 256  # response tokens a row
    dim: int = 256  # hidden size
    layers: int = 12  # decoder layers
    vocabulary: int = 32_000  # rows of the head
    repeats: int = 3  # measured runs; the median counts
    json: str | None = None  # file for the figures


def prepare(settings: Settings, variant: str):
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=settings.dim, intermediate_size=4 * settings.dim, num_hidden_layers=settings.layers,
        num_attention_heads=settings.dim // 32, num_key_value_heads=settings.dim // 32, vocab_size=settings.vocabulary,
    )  # fmt: skip
    policy = (
        rlfr.Policy(AutoModelForCausalLM.from_config(config)).to(rlfr.DEVICE).requires_grad_(False)
    )
    flow_config = fl.FlowConfig(settings.dim)
    flow = fl.Flow(flow_config).to(rlfr.DEVICE)
    learner = parallel.Learner(flow, (0.9, 0.999), 0.01)
    ids = torch.randint(
        settings.vocabulary, (settings.sequences, settings.prompt + settings.response)
    ).tolist()
    batch = rlfr.collate([(row[: settings.prompt], row[settings.prompt :]) for row in ids])
    taps = rlfr.tap_layers(settings.layers, flow_config.percentiles)
    depths = [tap / settings.layers for tap in taps]
    ours = variant == "early exit, responses (ours)"

    def work():
        with torch.no_grad():
            if ours:
                latents = policy(batch, taps=taps, latents_only=True).latents
            else:
                output = policy.model(
                    batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True
                )
                latents = [output.hidden_states[tap + 1] for tap in taps]
        targets = batch.targets if ours else batch.attention_mask
        pairs = fl.pair(flow_config, latents, depths, batch.attention_mask, targets)
        keys = [("benchmark", i) for i in range(settings.sequences)]
        noise, z = fl.draw(flow_config, keys, targets.sum(dim=1).tolist(), rlfr.DEVICE)
        losses = fl.matching_loss(flow, pairs, noise, z)
        learner.step(1e-4, 1.0, denominator=len(losses))

    return work


if __name__ == "__main__":
    variants = ["early exit, responses (ours)", "full forward, all positions"]
    compare("one step of the offline start", prepare, tyro.cli(Settings), variants)
