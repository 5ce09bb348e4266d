"""What to lower where a step does not fit into a GPU's memory."""


def for_update(config, n_layers: int) -> list[str]:
    """Return the ways to an update of a model of n_layers that takes less memory, as flags."""
    ways = [
        f"a lower --tokens-per-gpu (now {config.compute.tokens_per_gpu})",
        f"a lower --max-tokens (now {config.sampling.max_tokens})",
        f"a lower --max-prompt-tokens (now {config.problems.max_prompt_tokens})",
    ]
    if config.compute.recompute_layers < n_layers:
        ways.append(f"a larger --recompute-layers (now {config.compute.recompute_layers})")
    return ways + for_weights(config)


def for_weights(config) -> list[str]:
    """Return the ways to a trainer that holds less from step to step, as flags."""
    ways = []
    if config.optimisation.lora_rank:
        ways.append(f"a lower --lora-rank (now {config.optimisation.lora_rank})")
    else:
        ways.append("--lora-rank 32, which trains adapters in place of all weights")
    if not config.compute.always_offloads:
        ways.append("--offload always")
    return [*ways, "more GPUs"]


def for_rollout(config, n_gpus: int) -> list[str]:
    """Return the ways to an engine that fits beside the trainer, as flags."""
    ways = [
        f"a lower --cache-share (now {config.engine.cache_share})",
        f"a lower --max-sequences (now {config.engine.max_sequences})",
    ]
    larger = 2 * config.engine.tensor_parallel
    if n_gpus % larger == 0:
        ways.append(f"--tensor-parallel {larger}")
    if config.compute.offload == "never":
        ways.append("--offload sampling")
    return ways
