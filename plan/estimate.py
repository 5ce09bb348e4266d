"""From what a micro-batch took to the memory of each phase and the seconds of a step."""

import math
from typing import NamedTuple

import torch

from engines.vllm_engine import bytes_of_token, cache_bytes
from infra.models import Model
from plan.gpus import BESIDE, Machine, measured_shares
from plan.trial import Held, Trial

GRAPHS = 2e9  # bytes of vLLM's CUDA graphs and activations; assumed
OF_BANDWIDTH = 0.8  # what reading weights and keys reaches of a GPU's bandwidth; assumed
OVERHEAD = 0.5e-3  # seconds of a decoding step beside reading; assumed
SYNC_RATE = 8e9  # bytes of weights a second that reach an engine; assumed


# ---- Memory
class Phase(NamedTuple):
    """The memory of a phase on a GPU, in bytes."""

    name: str
    trainer: float  # what stays: weights, optimisers; in the update gradients, too
    work: float  # what comes and goes: activations, logits, gathered layers, noise of the flow
    engine: float  # weights of the engine and its graphs
    cache: float  # its keys and values

    @property
    def total(self) -> float:
        """All together, with what no tensor is."""
        return self.trainer + self.work + self.engine + self.cache + BESIDE


def engine_bytes(model: Model, n_parameters: int, tensor_parallel: int) -> float:
    """Return the bytes of an engine's weights on a rank, in bfloat16."""
    return 2 * n_parameters / tensor_parallel


def roll_out_phase(
    config, model: Model, n_parameters: int, held: float, machine: Machine
) -> Phase | str:
    """Return the memory while the engine samples; where its cache has no room, what it says."""
    weights = engine_bytes(model, n_parameters, config.engine.tensor_parallel)
    trainer = held if config.compute.offload == "never" else 0
    free = machine.gpu.memory - trainer - BESIDE
    longest = config.problems.max_prompt_tokens + config.sampling.max_tokens
    try:
        cache = cache_bytes(model, config.engine, longest, torch.bfloat16, free)
    except ValueError as error:
        return str(error)
    return Phase("roll out", trainer, 0, weights + GRAPHS, cache)


def learning_phases(config, held: Held, traced: Trial, n_held: float) -> list[Phase]:
    """Return the memory of scoring and of the update.

    n_held: bytes of all tensors before the trial
    """
    is_on_gpu = config.compute.offload != "always"
    phases = []
    for name, stays in (("score", n_held), ("update", n_held + held.gradients)):
        peak = getattr(traced, name).peak
        phases.append(Phase(name, stays * is_on_gpu, peak - stays, 0, 0))
    return phases


# ---- Seconds
class Times(NamedTuple):
    """Seconds of a step, by phase."""

    sync: float
    roll_out: float
    score: float
    update: float

    @property
    def step(self) -> float:
        """All phases."""
        return sum(self)


class Work(NamedTuple):
    """What a rank does in a step."""

    n_episodes: float
    n_packed: float  # tokens that the policy reads, a prompt once for its group
    score: float  # operations
    update: float


def work_of_rank(config, traced: Trial, n_ranks: int) -> Work:
    """Scale what a micro-batch took to a rank's share of a step.

    Products grow with tokens, attention with the squares of rows.
    """
    sampling = config.sampling
    n_episodes = sampling.prompts * sampling.group_size / n_ranks
    length = config.prompt_tokens + config.response_tokens
    n_packed = n_episodes * (config.response_tokens + config.prompt_tokens / sampling.group_size)
    tokens = n_packed / (traced.shape.n_rows * traced.shape.row_length)
    squares = n_episodes * length**2 / (traced.shape.n_rows * traced.shape.row_length**2)
    costs = (traced.score, traced.update)
    score, update = (tokens * cost.products + squares * cost.attention for cost in costs)
    return Work(n_episodes, n_packed, score, update)


def times_of_step(
    config, model: Model, n_parameters: int, traced: Trial, cache: float, machine: Machine
) -> Times:
    """Estimate the seconds of a step.

    cache: bytes of an engine's cache on a rank
    """
    work = work_of_rank(config, traced, machine.n_gpus)
    shares = measured_shares(model.text_config.hidden_size, config.compute.compile != "off")
    n_in_step = config.sampling.prompts * config.sampling.group_size
    n_optimiser_steps = n_in_step // config.optimisation.train_batch
    budget = config.compute.tokens_per_gpu
    n_batches = math.ceil(work.n_packed / budget)
    n_updates = n_optimiser_steps * math.ceil(work.n_packed / n_optimiser_steps / budget)
    seconds = {}
    for name, n_calls in (("score", n_batches), ("update", n_updates)):
        computes = getattr(work, name) / (getattr(shares, name) * machine.gpu.products)
        sends = n_calls * getattr(traced, name).sent / machine.link
        seconds[name] = max(computes, sends)  # the one behind the other
    weights = engine_bytes(model, n_parameters, 1)
    return Times(
        sync=weights / SYNC_RATE,
        roll_out=sampling_seconds(config, model, n_parameters, work, cache, machine),
        **seconds,
    )


def sampling_seconds(
    config, model: Model, n_parameters: int, work: Work, cache: float, machine: Machine
) -> float:
    """Return the seconds of a rollout: every step of decoding reads the weights and all keys.

    Or by --sample-rate. Sequences that do not fit the cache, or --max-sequences, wait. The longest
    response is taken to have --max-tokens.
    """
    if config.sample_rate:
        return work.n_episodes * config.response_tokens / config.sample_rate
    shared = config.engine.tensor_parallel
    length = config.prompt_tokens + config.response_tokens
    token_bytes = bytes_of_token(model, shared, torch.bfloat16)
    n_sequences = work.n_episodes * shared
    at_once = min(n_sequences, config.engine.max_sequences, cache / (length * token_bytes))
    reads = engine_bytes(model, n_parameters, shared) + at_once * length / 2 * token_bytes
    a_step = reads / (OF_BANDWIDTH * machine.gpu.bandwidth) + OVERHEAD
    n_steps = max(
        config.sampling.max_tokens, n_sequences * config.response_tokens / max(1.0, at_once)
    )
    return n_steps * a_step
