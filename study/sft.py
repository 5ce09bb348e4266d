"""Supervised fine-tuning on expert solutions, step by step beside reinforcement learning.

    python study/sft.py --expert-solutions FILE [--held-out N] FLAGS of train_rl.py

It is train_rl.py but for one phase: in place of a step on the policy's own episodes, one on as many
expert solutions. Episodes are sampled and graded all the same, for the figures. Of the solutions the
last --held-out are those that flows are calibrated on: nothing is learnt from them.
"""

import repository  # noqa: F401

# isort: split
import argparse
import sys
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

import dense
import rlfr
import train_rl
from infra import batching, parallel
from infra.batching import passes
from infra.models import find_model
from infra.runs import launch
from policy import Policy
from worlds import PRESETS


class SupervisedUpdate:
    """What takes the place of train_rl.update_policy: a step on as many expert solutions as there are episodes."""

    def __init__(self, solutions_file: str, n_held_out: int):
        self.solutions_file = solutions_file
        self.n_held_out = n_held_out
        self.solutions: list[batching.Row] = []

    def __call__(
        self,
        models: train_rl.Models,
        experience: train_rl.Experience,
        _advantage: Tensor,
        config: train_rl.Config,
        step: int,
        lr: float,
    ) -> dict[str, float]:
        if not self.solutions:
            model = find_model(config.model, config.loading)
            host = dense.Host(model, config, lambda: models.policy, names_flow=True)
            self.solutions, _ = host.solutions(self.solutions_file, self.n_held_out)
        n_rows = len(experience.episodes)
        order = passes(len(self.solutions), step * n_rows, n_rows, "solutions", config.seed)
        chosen = [self.solutions[index] for _, index in order]
        loss = learn(models.policy, chosen, config)
        grad_norm = models.learners["policy"].step(lr, config.optimisation.clip_norm)
        return {"policy/loss": loss, "policy/grad_norm": grad_norm}


def learn(policy: Policy, rows: Sequence[batching.Row], config: train_rl.Config) -> float:
    """Add the gradient of the mean of -log p to the policy's; return that mean, weighted as in RL."""
    n_tokens = sum(sum(batching.sampled_flags(row)) for row in rows)
    total = torch.zeros((), device=parallel.DEVICE)
    token_budget = config.compute.tokens_per_gpu
    for _, batch in train_rl.my_micro_batches(rows, token_budget, "supervised"):
        weight = rlfr.token_weights(
            batch.response_mask,
            config.optimisation.normalisation,
            len(rows),
            n_tokens,
            config.sampling.max_tokens,
        )
        loss = -(policy(batch).logp * weight).sum()
        loss.backward()
        total += loss.detach()
    return parallel.sum_over_ranks(total).item()


def main() -> None:
    """Fine-tune as the command line says."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--expert-solutions", required=True)
    parser.add_argument("--held-out", type=int, default=64)
    arguments, flags = parser.parse_known_args()
    sys.argv[1:] = flags
    update = SupervisedUpdate(arguments.expert_solutions, arguments.held_out)
    launch(partial(train_rl.main, update=update), train_rl.Config, PRESETS["train_rl"])


if __name__ == "__main__":
    main()
