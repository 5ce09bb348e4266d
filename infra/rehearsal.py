"""A rehearsal: the largest update that a run may meet, done before its first step.

It shows whether a GPU's memory is large enough, and changes nothing that a step depends on: weights,
optimisers, generators.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from infra import parallel


def rehearse(update: Callable[[list], None], problems: Sequence, config) -> None:
    """Score and update at the longest lengths that the settings allow; say what memory it took.

    The longest prompts are filled up to max_prompt_tokens. The shortest have their turn, too: a
    micro-batch of them has more response tokens, on which head and flow work. No row shares its
    prompt with another, which would save memory.

    update: takes problems; scores responses of max_tokens to them and trains on these, with learners
        that take no step
    config: the settings of the run
    Raises MemoryError, with the settings to lower, if a GPU's memory is too small.
    """
    shortest_first = sorted(problems, key=lambda problem: len(problem.prompt_ids))
    filled = []
    for problem in reversed(shortest_first):
        filling = [0] * (config.problems.max_prompt_tokens - len(problem.prompt_ids))
        filled.append(problem._replace(prompt_ids=filling + problem.prompt_ids))
    parallel.take_peak_memory()
    try:
        with parallel.fork_rng():
            for chosen in (filled, shortest_first):
                update(fill_micro_batches(chosen, config))
    except torch.OutOfMemoryError as error:
        raise MemoryError(what_to_lower(config)) from error
    peaks = parallel.gather_objects(parallel.take_peak_memory())
    if not parallel.is_first():
        return
    lengths = f"{config.problems.max_prompt_tokens} + {config.sampling.max_tokens} tokens"
    if parallel.DEVICE.type == "cpu":
        print(f"rehearsed an update at {lengths}; there is no GPU whose memory could be measured")
    else:
        room = parallel.total_memory()
        print(
            f"rehearsed an update at {lengths}: at most {max(peaks) / 1e9:.1f} GB of tensors "
            f"in {room / 1e9:.1f} GB of a GPU's memory"
        )


def fill_micro_batches(problems: Sequence, config) -> list:
    """Return the first problems: as many as fill a micro-batch of each rank with long responses.

    Their prompts must not become shorter in their order.
    """
    max_tokens = config.sampling.max_tokens
    n_ranks = dist.get_world_size()
    n_in_step = config.sampling.prompts * config.sampling.group_size
    n_episodes = n_ranks
    for n in range(2 * n_ranks, min(len(problems), n_in_step) + 1, n_ranks):
        longest = len(problems[n - 1].prompt_ids) + max_tokens
        if n // n_ranks * longest > config.compute.tokens_per_gpu:
            break
        n_episodes = n
    return list(problems[:n_episodes])


def what_to_lower(config) -> str:
    """Return the message for an update that does not fit into a GPU's memory."""
    ways = [
        f"a lower --tokens-per-gpu (now {config.compute.tokens_per_gpu})",
        f"a lower --max-tokens (now {config.sampling.max_tokens})",
        f"a lower --max-prompt-tokens (now {config.problems.max_prompt_tokens})",
    ]
    if not config.compute.gradient_checkpointing:
        ways.append("--gradient-checkpointing True")
    if config.optimisation.lora_rank:
        ways.append(f"a lower --lora-rank (now {config.optimisation.lora_rank})")
    else:
        ways.append("--lora-rank 32, which trains adapters in place of all weights")
    if not config.compute.always_offloads:
        ways.append("--offload always")
    ways.append("more GPUs")
    return (
        "the largest update that these settings allow does not fit into the GPU's memory; "
        f"any of these helps: {'; '.join(ways)}"
    )
