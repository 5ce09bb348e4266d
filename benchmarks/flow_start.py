"""An offline start: early exit and response tokens alone, against the official way.

    python benchmarks/flow_start.py --json runs/flow_start.json    two passes, the default of train_flow.py
    python benchmarks/flow_start.py --epochs 1                 one pass

Ours runs the policy up to the last tap, and the flow learns from response tokens. One process keeps
the latents of few solutions, up to 1 GiB, for the passes that follow; on several ranks, or with more
solutions, each pass costs what the first does. The official way runs the whole policy in every pass,
and the flow learns from every position. A pass is one batch, and one step of the flow.
"""

import repository  # noqa: F401

# isort: split
from dataclasses import dataclass

import torch
import tyro
from transformers import AutoModelForCausalLM, Qwen2Config

import flow as fl
import train_flow
from common import compare
from infra import batching, errors, parallel
from policy import Policy, tap_layers

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
    epochs: int = 2  # passes over the batch
    repeats: int = 3  # runs of each variant, in turns; the median counts
    json: str | None = None  # file for the figures


def make_policy(settings: Settings) -> Policy:
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
    policy = Policy(AutoModelForCausalLM.from_config(config))
    return policy.to(parallel.DEVICE).requires_grad_(False)


def prepare(settings: Settings, variant: str):
    """Return a function that does the offline start of a variant."""
    parallel.start()
    torch.manual_seed(0)
    policy = make_policy(settings)
    flow_config = fl.FlowConfig(settings.dim)
    flow = fl.Flow(flow_config).to(parallel.DEVICE)
    learner = parallel.Learner(flow, (0.9, 0.999), 0.01)
    n_tokens = settings.prompt + settings.response
    ids = torch.randint(settings.vocabulary, (settings.sequences, n_tokens)).tolist()
    solutions = [batching.Row(row[: settings.prompt], row[settings.prompt :]) for row in ids]
    keys = [("benchmark", i) for i in range(settings.sequences)]

    def learn(rows: fl.FlowRows, n_targets: int) -> None:
        """Take a step of the flow; each solution has n_targets positions."""
        lengths = [n_targets] * settings.sequences
        noise, z = fl.draw(flow_config, keys, lengths, parallel.DEVICE)
        losses = fl.matching_loss(flow, rows, noise, fl.draw_times(z, "random"))
        learner.step(1e-4, 1.0, denominator=len(losses))

    def ours() -> None:
        everything = settings.sequences * n_tokens
        latents = train_flow.Latents(policy, flow_config, solutions, token_budget=everything)
        for _ in range(settings.epochs):
            for _, rows in latents.flow_rows(range(settings.sequences)):
                learn(rows, settings.response)

    @torch.no_grad()
    def official_latents(batch: batching.Batch, taps: list[int]) -> list[torch.Tensor]:
        output = policy.model(
            batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True
        )
        return [output.hidden_states[tap + 1] for tap in taps]

    def official() -> None:
        taps = tap_layers(settings.layers, flow_config.percentiles)
        depths = [tap / settings.layers for tap in taps]
        batch = batching.collate(solutions)
        mask = batch.attention_mask
        for _ in range(settings.epochs):
            latents = official_latents(batch, taps)
            learn(fl.make_rows(flow_config, latents, depths, mask, mask), n_tokens)

    return ours if variant == OURS else official


if __name__ == "__main__":
    title = "an offline start"
    errors.run(lambda: compare(title, prepare, tyro.cli(Settings), [OURS, OFFICIAL]))
