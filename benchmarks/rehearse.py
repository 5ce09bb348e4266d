"""Does the largest update fit into the memory? Do one before a run that takes days.

    torchrun --nproc-per-node 8 benchmarks/rehearse.py --model Qwen2.5-7B ...

The flags are those of train_rl.py. Scoring, the dense reward's part, forward and backward of a
micro-batch are done at the longest lengths that the settings allow, max_prompt_tokens + max_tokens.
The largest size of all tensors is printed, or what to lower where they do not fit. No step is taken
and no run is written. Sampling is not rehearsed: an engine sizes its cache by what is free.
"""

import repository  # noqa: F401

# isort: split
from collections.abc import Sequence

import torch
import torch.distributed as dist

import rollout
import train_rl
from infra import parallel
from infra.data import Problem, load_problems
from infra.models import Model
from infra.runs import launch
from plan import advice
from worlds import PRESETS


class NoStep:
    """Stands for a learner: its steps only clear the gradients."""

    def __init__(self, learner: parallel.Learner):
        self.learner = learner

    def step(self, lr: float, max_norm: float, denominator: float = 1.0) -> float:
        """Clear the gradients; the arguments are those of Learner.step()."""
        self.learner.optimizer.zero_grad()
        return 0.0


def main(config: train_rl.Config) -> None:
    """Score and update at the longest lengths that the settings allow; say what memory it took.

    The longest prompts are filled up to max_prompt_tokens. The shortest have their turn, too: a
    micro-batch of them has more response tokens, on which head and flow work. No row shares its
    prompt with another, which would save memory.

    Raises MemoryError, with the settings to lower, if a GPU's memory is too small.
    """
    parallel.start()
    is_flow_named = config.flow is not None
    config, model = train_rl.resolve(config)
    problems = load_problems(config.data, config.problems, model)
    models = train_rl.make_models(config, model, is_flow_named)
    models = train_rl.with_learners(models, config.optimisation.weight_decay)
    learners = {name: NoStep(learner) for name, learner in models.learners.items()}
    models = models._replace(learners=learners)

    shortest_first = sorted(problems, key=lambda problem: len(problem.prompt_ids))
    filled = []
    for problem in reversed(shortest_first):
        filling = [0] * (config.problems.max_prompt_tokens - len(problem.prompt_ids))
        filled.append(problem._replace(prompt_ids=filling + problem.prompt_ids))
    parallel.take_peak_memory()
    try:
        for chosen in (filled, shortest_first):
            update(models, fill_micro_batches(chosen, config), config)
    except torch.OutOfMemoryError as error:
        raise MemoryError(what_to_lower(config, model)) from error
    peaks = parallel.gather_objects(parallel.take_peak_memory())
    if not parallel.is_first():
        return
    lengths = f"{config.problems.max_prompt_tokens} + {config.sampling.max_tokens} tokens"
    if parallel.DEVICE.type == "cpu":
        print(f"rehearsed an update at {lengths}; there is no GPU whose memory could be measured")
    else:
        _, room = parallel.memory_of_device()
        print(
            f"rehearsed an update at {lengths}: at most {max(peaks) / 1e9:.1f} GB of tensors "
            f"in {room / 1e9:.1f} GB of a GPU's memory"
        )


def update(models: train_rl.Models, problems: Sequence[Problem], config: train_rl.Config) -> None:
    """Do phases 3, 5 and 6 of a step on stand-ins of the longest responses."""
    sampling = config.sampling
    episodes = [rollout.stand_in(problem, [0] * sampling.max_tokens) for problem in problems]
    token_budget = config.compute.tokens_per_gpu
    experience = train_rl.score(
        models, episodes, 0, sampling.temperature, token_budget=token_budget
    )
    advantage = torch.ones_like(experience.old_logp)
    train_rl.update_policy(models, experience, advantage, config, step=0, lr=0.0)
    train_rl.update_dense(models, config.optimisation.clip_norm)


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


def what_to_lower(config, model: Model) -> str:
    """Return the message for an update that does not fit into a GPU's memory."""
    ways = advice.for_update(config, model.text_config.num_hidden_layers)
    return (
        "the largest update that these settings allow does not fit into the GPU's memory; "
        f"any of these helps: {'; '.join(ways)}"
    )


if __name__ == "__main__":
    launch(main, train_rl.Config, PRESETS["train_rl"])
