"""One step of the offline start: early exit and response tokens alone, against the official way.

The latter runs the whole policy, and learns from every position.

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

OURS = "early exit, responses (ours)"
OFFICIAL = "full forward, all positions"


@dataclass(frozen=True)
class Settings:
    """A random decoder and solutions of which half is prompt."""

    sequences: int = 8  # rows of a batch
    prompt: int = 256  # prompt tokens a row
    response: int = 256  # response tokens a row
    dim: int = 256  # hidden size
    layers: int = 12  # decoder layers
    vocabulary: int = 32_000  # rows of the head
    repeats: int = 3  # runs of each variant, in turns; the median counts
    json: str | None = None  # file for the figures


def make_policy(settings: Settings) -> rlfr.Policy:
    """Make a random decoder that does not learn."""
    n_heads = settings.dim // 32
    config = Qwen2Config(
        hidden_size=settings.dim,
        intermediate_size=4 * settings.dim,
        num_hidden_layers=settings.layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_heads,
        vocab_size=settings.vocabulary,
    )
    policy = rlfr.Policy(AutoModelForCausalLM.from_config(config))
    return policy.to(parallel.DEVICE).requires_grad_(False)


def prepare(settings: Settings, variant: str):
    """Return a function that runs a step of a variant."""
    torch.manual_seed(0)
    policy = make_policy(settings)
    flow_config = fl.FlowConfig(settings.dim)
    flow = fl.Flow(flow_config).to(parallel.DEVICE)
    learner = parallel.Learner(flow, (0.9, 0.999), 0.01)
    n_tokens = settings.prompt + settings.response
    ids = torch.randint(settings.vocabulary, (settings.sequences, n_tokens)).tolist()
    batch = rlfr.collate([rlfr.Row(s[: settings.prompt], s[settings.prompt :]) for s in ids])
    taps = rlfr.tap_layers(settings.layers, flow_config.percentiles)
    depths = [tap / settings.layers for tap in taps]
    keys = [("benchmark", i) for i in range(settings.sequences)]

    @torch.no_grad()
    def find_latents() -> list[torch.Tensor]:
        if variant == OURS:
            return policy(batch, taps=taps, latents_only=True).latents
        output = policy.model(
            batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True
        )
        return [output.hidden_states[tap + 1] for tap in taps]

    def work():
        latents = find_latents()
        targets = batch.targets if variant == OURS else batch.attention_mask
        rows = fl.make_rows(flow_config, latents, depths, batch.attention_mask, targets)
        lengths = targets.sum(dim=1).tolist()
        noise, z = fl.draw(flow_config, keys, lengths, parallel.DEVICE)
        losses = fl.matching_loss(flow, rows, noise, fl.draw_times(z, "random"))
        learner.step(1e-4, 1.0, denominator=len(losses))

    return work


if __name__ == "__main__":
    title = "one step of the offline start"
    compare(title, prepare, tyro.cli(Settings), [OURS, OFFICIAL])
