"""Expert solutions as further episodes of reinforcement learning (LUFFY, arXiv 2504.14945).

    python study/luffy.py --expert-solutions FILE [--held-out N] [--expert-prompts N] FLAGS of train_rl.py

It is train_rl.py but for one phase. In each step some problems that have an expert solution join the
batch. The policy answers each of them G times, as any other problem. The expert solution is graded as
those answers are, and is one more episode of their group:

    advantage           over the G + 1 episodes of a group      rlfr.outcome_advantage
    the policy's token  -ratio * A, clipped                     rlfr.policy_loss
    an expert's token   -f(p) * A, f(p) = p/(p + 0.1)           shaped_weight

p is the probability that the policy gives the expert's token, and the weight of importance sampling if
the expert's own is taken to be 1. As f is steep at 0, unlikely tokens count; nothing is clipped there.

Of the solutions the last --held-out are those that flows are calibrated on: nothing is learnt from them.
"""

import repository  # noqa: F401

# isort: split
import argparse
import sys
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

import dense
import rlfr
import rollout
import train_rl
from engines import awake, make_engine
from infra import batching, parallel
from infra.data import Problem, load_problems
from infra.models import find_model
from infra.runs import launch
from policy import Policy
from rewards import Grader
from rollout import Episode
from worlds import PRESETS

GAMMA = 0.1  # of f, as in the paper


def shaped_weight(logp: Tensor) -> Tensor:
    """Return f(p) = p/(p + GAMMA) of tokens with these log-probs, in the same shape."""
    p = logp.exp()
    return p / (p + GAMMA)


class MixedUpdate:
    """What takes the place of train_rl.update_policy: a step on its episodes and on expert groups."""

    def __init__(self, solutions_file: str, n_held_out: int, n_prompts: int, grader: Grader):
        self.solutions_file = solutions_file
        self.n_held_out = n_held_out
        self.n_prompts = n_prompts
        self.grader = grader
        self.sampler: rollout.Sampler | None = None
        self.solutions: dict[tuple[int, ...], list[int]] = {}  # prompt -> the expert's tokens

    def __call__(
        self,
        models: train_rl.Models,
        experience: train_rl.Experience,
        advantage: Tensor,
        config: train_rl.Config,
        step: int,
        lr: float,
    ) -> dict[str, float]:
        if self.sampler is None:
            self.prepare(models, config)
        groups = self.sample_groups(models, config, step)
        mixed = [episode for group in groups for episode in group]
        reward = torch.tensor([episode.verdict.reward for episode in mixed], device=parallel.DEVICE)
        baseline = config.advantage.baseline
        of_mixed = rlfr.outcome_advantage(reward, config.sampling.group_size + 1, baseline)
        is_expert = [False] * len(experience.episodes)
        for group in groups:
            is_expert += [False] * (len(group) - 1) + [True]
        loss = learn(
            models.policy,
            [*experience.episodes, *mixed],
            with_rows(advantage, of_mixed, mixed),
            torch.tensor(is_expert, device=parallel.DEVICE),
            config,
        )
        grad_norm = models.learners["policy"].step(lr, config.optimisation.clip_norm)
        return {"policy/loss": loss, "policy/grad_norm": grad_norm}

    def prepare(self, models: train_rl.Models, config: train_rl.Config) -> None:
        """Load the expert solutions, and make what samples answers to their problems."""
        model = find_model(config.model, config.loading)
        host = dense.Host(model, config, lambda: models.policy, names_flow=True)
        fitted, _ = host.solutions(self.solutions_file, self.n_held_out)
        self.solutions = {tuple(row.prompt_ids): row.response_ids for row in fitted}
        problems = []
        for problem in load_problems(self.solutions_file, config.problems, model):
            if tuple(problem.prompt_ids) in self.solutions:
                problems.append(problem)
        longest = config.problems.max_prompt_tokens + config.sampling.max_tokens
        engine = make_engine(
            model,
            config.engine,
            rollout.Capacity(longest, rollout.most_images(problems)),
            device=parallel.DEVICE,
            dtype=parallel.compute_dtype(config.loading.dtype),
            can_sleep=True,
        )
        engine.sleep()
        self.sampler = rollout.Sampler(
            engine,
            self.grader,
            problems,
            torch.zeros(len(problems)),
            settings=replace(config.sampling, prompts=self.n_prompts, dynamic_sampling=0),
            seed=config.seed,
        )

    def sample_groups(
        self, models: train_rl.Models, config: train_rl.Config, step: int
    ) -> list[list[Episode]]:
        """Return a step's groups of expert problems, graded: G answers and the expert's solution."""
        sampler = self.sampler
        dtype = parallel.compute_dtype(config.loading.dtype)
        with awake(sampler.engine, partial(models.policy.whole_weights, dtype)):
            answers, _ = sampler.roll_out(step * self.n_prompts)
        sampler.verify(answers)
        groups = rollout.in_groups(answers, config.sampling.group_size)
        problems = [group[0].problem for group in groups]
        experts = [self.expert_episode(problem) for problem in problems]
        verdicts = rollout.grade_on_all_ranks(self.grader, problems, experts)
        for group, expert, verdict in zip(groups, experts, verdicts, strict=True):
            group.append(replace(expert, verdict=verdict))
        return groups

    def expert_episode(self, problem: Problem) -> Episode:
        """Return the expert solution of a problem as an episode; its log-probs are nobody's."""
        response_ids = list(self.solutions[tuple(problem.prompt_ids)])
        text = self.sampler.engine.tokenizer.decode(response_ids, skip_special_tokens=True)
        return Episode(
            problem.prompt_ids,
            response_ids,
            logp=[0.0] * len(response_ids),
            finish_reason="stop",
            text=text,
            images=problem.images,
            problem=problem,
        )


def with_rows(advantage: Tensor, of_mixed: Tensor, mixed: list[Episode]) -> Tensor:
    """Append to token advantages (B, T) the rows of mixed episodes, whose tokens share one (M,)."""
    longest = max(len(episode.response_ids) for episode in mixed)
    n_rows, n_tokens = advantage.shape
    rows = advantage.new_zeros(n_rows + len(mixed), max(n_tokens, longest))
    rows[:n_rows, :n_tokens] = advantage
    rows[n_rows:] = of_mixed[:, None]
    return rows


def learn(
    policy: Policy,
    episodes: list[Episode],
    advantage: Tensor,
    is_expert: Tensor,
    config: train_rl.Config,
) -> float:
    """Add the gradient of a step's loss to the policy's; return the loss, weighted as in RL.

    advantage: (B, T), which padding has, too; is_expert: (B,) bool
    """
    settings = config.optimisation
    n_tokens = sum(sum(batching.sampled_flags(episode)) for episode in episodes)
    total = torch.zeros((), device=parallel.DEVICE)
    token_budget = config.compute.tokens_per_gpu
    for indices, batch in train_rl.my_micro_batches(episodes, token_budget, "update"):
        mask = batch.response_mask
        logp = policy(batch, config.sampling.temperature).logp
        of_tokens = advantage[indices, : mask.shape[1]]
        # one optimiser step a batch: the policy is still the one that has sampled
        loss, _ = rlfr.policy_loss(
            logp, logp.detach(), of_tokens, mask, loss=settings.loss, clip=settings.clip
        )
        of_experts = -shaped_weight(logp) * of_tokens
        loss = torch.where(is_expert[indices][:, None], of_experts, loss)
        weight = rlfr.token_weights(
            mask, settings.normalisation, len(episodes), n_tokens, config.sampling.max_tokens
        )
        loss = (loss * weight).sum()
        loss.backward()
        total += loss.detach()
    return parallel.sum_over_ranks(total).item()


def check(config: train_rl.Config, n_prompts: int) -> None:
    """Raise ValueError for settings that this update does not know."""
    if n_prompts < 1:
        raise ValueError(
            f"--expert-prompts {n_prompts}: expected 1 or more; train_rl.py is what has none"
        )
    n_episodes = config.sampling.prompts * config.sampling.group_size
    settings = config.optimisation
    if settings.train_batch != n_episodes:
        raise ValueError(
            f"--train-batch {settings.train_batch}: luffy.py takes one optimiser step a batch; "
            f"expected prompts * group_size = {n_episodes}"
        )
    others = train_rl.other_terms(settings)
    if others:
        raise ValueError(f"the loss of luffy.py has no {', '.join(others)}; leave its flag out")


def train(config: train_rl.Config, solutions_file: str, n_held_out: int, n_prompts: int) -> None:
    """Train with expert solutions in the groups of their problems."""
    check(config, n_prompts)
    with Grader(config.reward, config.grading, config.sampling.max_tokens or 0) as grader:
        update = MixedUpdate(solutions_file, n_held_out, n_prompts, grader)
        train_rl.main(config, update=update)


def main() -> None:
    """Train as the command line says."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--expert-solutions", required=True)
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--expert-prompts", type=int, default=2)
    arguments, flags = parser.parse_known_args()
    sys.argv[1:] = flags
    given = {
        "solutions_file": arguments.expert_solutions,
        "n_held_out": arguments.held_out,
        "n_prompts": arguments.expert_prompts,
    }
    launch(partial(train, **given), train_rl.Config, PRESETS["train_rl"])


if __name__ == "__main__":
    main()
