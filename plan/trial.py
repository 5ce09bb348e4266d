"""A step in small: micro-batches are scored and learnt from, on tensors without numbers."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.tensor import DTensor

import rollout
import train_rl
from infra.data import Problem
from infra.models import Model
from infra.settings import change
from plan.models import empty_policy
from plan.tracing import Cost, Trace


class Shape(NamedTuple):
    """A micro-batch of a rank."""

    n_rows: int
    n_prompt: int  # tokens
    n_response: int

    @property
    def row_length(self) -> int:
        """Tokens of a row."""
        return self.n_prompt + self.n_response


class Trial(NamedTuple):
    """What a micro-batch took of a rank, with all that is there besides."""

    shape: Shape
    score: Cost
    update: Cost


class Held(NamedTuple):
    """What a rank holds from step to step, in bytes."""

    policy: int  # its weights, and those of a reference
    optimiser: int  # two moments of each weight that learns
    dense: int  # weights and moments of the dense reward
    gradients: int  # of the policy's weights, while it is updated


def make_models(config: "train_rl.Config", model: Model) -> train_rl.Models:
    """Make all that a run holds; the weights have no numbers."""
    models = train_rl.make_models(config, model, is_flow_named=True, load=empty_policy)
    return train_rl.with_learners(models, config.optimisation.weight_decay)


def try_out(
    models: train_rl.Models, shape: Shape, config: "train_rl.Config", trace: Trace
) -> Trial:
    """Score a micro-batch and update the policy with it.

    The gradients of the policy are there already, as from the second micro-batch of an optimiser step
    on.
    """
    n_episodes = shape.n_rows * dist.get_world_size()
    budget = max(config.compute.tokens_per_gpu, shape.row_length)
    config = change(config, train_batch=n_episodes, tokens_per_gpu=budget)
    episodes = make_episodes(n_episodes, shape)
    temperature = config.sampling.temperature
    score = partial(train_rl.score, models, episodes, 0, temperature, token_budget=budget)
    experience, cost_of_score = trace.measure(score)
    learner = models.learners["policy"]
    for parameter in learner.parameters:
        parameter.grad = torch.zeros_like(parameter)
    with unset_fake_temporarily():  # its zeros decide which rows run
        advantage = torch.ones(experience.mask.shape)

    def update() -> None:
        train_rl.update_policy(models, experience, advantage, config, step=0, lr=0.0)
        train_rl.update_dense(models, config.optimisation.clip_norm)

    _, cost_of_update = trace.measure(update)
    return Trial(shape, cost_of_score, cost_of_update)


def make_episodes(count: int, shape: Shape) -> list[rollout.Episode]:
    """Return stand-ins of right responses; no two share their prompt, which would save memory."""
    episodes = []
    for i in range(count):
        prompt_ids = [i] + [0] * (shape.n_prompt - 1)
        problem = Problem(id=str(i), text="", answer="", prompt_ids=prompt_ids)
        episodes.append(rollout.stand_in(problem, [0] * shape.n_response))
    return episodes


def held_by(models: train_rl.Models) -> Held:
    """Return what a rank holds of models, in bytes."""
    policy = list(models.policy.parameters())
    reference = [] if models.reference is None else list(models.reference.parameters())
    learner = models.learners["policy"]
    dense = []
    if models.dense and models.dense.module is not None:
        dense = list(models.dense.module.parameters())
        if models.dense.name in models.learners:
            dense = models.learners[models.dense.name].tensors()
    return Held(
        policy=n_bytes([*policy, *reference]),
        optimiser=n_bytes(learner.tensors()) - n_bytes(policy),
        dense=n_bytes(dense),
        gradients=n_bytes(learner.parameters),
    )


def n_bytes(tensors: Sequence[Tensor] | Iterator[Tensor]) -> int:
    """Return the bytes of a rank's parts of tensors; what is there twice counts once."""
    parts = {}
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        parts[id(tensor)] = local.numel() * local.element_size()
    return sum(parts.values())
