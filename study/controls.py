"""Controls of the study that are no settings of train_rl.py: each is that script, but for one part.

    python study/controls.py shuffled-tokens FLAGS of train_rl.py
    python study/controls.py shuffled-responses FLAGS
    python study/controls.py logprob --expert-policy FOLDER --expert-solutions FILE FLAGS
    python study/controls.py sft --expert-solutions FILE FLAGS

    shuffled-tokens     the flow's scores of a response, dealt out anew among its tokens
    shuffled-responses  mean scores of responses, dealt out anew among the responses of the step
    logprob             in place of the flow's excess over expert tokens, that of -log p under a
                        policy that was fitted to expert solutions
    sft                 in place of a step on the policy's own episodes, one on as many expert
                        solutions; episodes are sampled and graded all the same, for the figures

Shuffled tokens leave the mean of a response as it is: for a flow reward on the response the control
is that of shuffled responses. Of the expert solutions the last --held-out are those that flows are
calibrated on: sft does not learn from them, logprob is calibrated on them as flows are.

    python study/controls.py hasty-solutions --model FOLDER --data FILE --like FILE --folder F

samples wrong responses of a model, as many as FILE has solutions, to fit a flow to.
"""

import repository  # noqa: F401

# isort: split
import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from torch import Tensor

import rlfr
import rollout
import train_rl
from engines.torch_engine import TorchEngine
from infra import batching, parallel
from infra.data import ProblemSettings, load_problems
from infra.files import written_whole
from infra.models import LoadingSettings, find_model
from infra.rows import read_rows
from infra.runs import launch
from infra.seeds import keyed_seed, passes, permutation
from infra.solutions import SolutionSettings, load_solutions
from policy import Policy, load_policy
from rewards import Grader
from worlds import toy


# ---- Shuffled scores
def change_scores(change: Callable) -> None:
    """Let `change(experience, config, step)` return what each step shapes its advantage from."""
    shape_advantage = train_rl.shape_advantage

    def change_and_shape(experience: train_rl.Experience, config: train_rl.Config, step: int):
        return shape_advantage(change(experience, config, step), config, step)

    train_rl.shape_advantage = change_and_shape


def with_score(
    experience: train_rl.Experience, score: Tensor, scored: Tensor
) -> train_rl.Experience:
    """Return the experience with other scores (B, T), of the tokens in `scored` (B, T) bool."""
    return replace(experience, deviation=score[None], scored=scored)


def shuffle_tokens(
    experience: train_rl.Experience, config: train_rl.Config, step: int
) -> train_rl.Experience:
    """Deal out the scores of each response anew among its tokens."""
    score = experience.score  # a tensor of its own
    for row, scored in enumerate(experience.scored):
        values = score[row, scored]
        order = permutation(len(values), "shuffled tokens", config.seed, step, row)
        score[row, scored] = values[order]
    return with_score(experience, score, experience.scored)


def shuffle_responses(
    experience: train_rl.Experience, config: train_rl.Config, step: int
) -> train_rl.Experience:
    """Give all tokens of a response the mean score of another response of the step."""
    mean = rlfr.mean_over_tokens(experience.score, experience.scored)  # (B,)
    order = permutation(len(mean), "shuffled responses", config.seed, step)
    score = mean[order][:, None] * experience.scored
    return with_score(experience, score, experience.scored)


# ---- Expert solutions
def load_expert(
    file: str, n_held_out: int, config: train_rl.Config
) -> tuple[list[batching.Row], list[batching.Row]]:
    """Return the expert solutions to learn from, and those that flows are calibrated on."""
    settings = SolutionSettings(
        problem_column=config.problems.problem_column,
        template=config.problems.template,
        max_prompt_tokens=config.problems.max_prompt_tokens,
        cutoff=config.problems.max_prompt_tokens + config.sampling.max_tokens,
    )
    model = find_model(config.model, config.loading)
    solutions = load_solutions(file, settings, model)
    n_training = len(solutions) - n_held_out
    if not 0 < n_training < len(solutions):
        raise ValueError(
            f"--held-out {n_held_out} of {len(solutions)} solutions in {file}: "
            "expected at least one, and fewer than there are"
        )
    return solutions[:n_training], solutions[n_training:]


class ExpertLikelihood:
    """Replaces scores by the excess of -log p under the expert policy over expert tokens."""

    def __init__(self, policy_folder: str, solutions_file: str, n_held_out: int):
        self.policy = load_policy(policy_folder).to(parallel.DEVICE).requires_grad_(False)
        self.solutions_file = solutions_file
        self.n_held_out = n_held_out
        self.mean: Tensor | None = None  # of expert tokens
        self.spread: Tensor | None = None

    def __call__(
        self, experience: train_rl.Experience, config: train_rl.Config, _step: int
    ) -> train_rl.Experience:
        if self.mean is None:
            self.calibrate(config)
        surprise, mask = self.surprise(experience.episodes, config)  # (B, T)
        excess = (surprise - self.mean) / self.spread
        return with_score(experience, torch.where(mask, excess, 0.0), mask)

    def calibrate(self, config: train_rl.Config) -> None:
        """Measure mean and spread on the tokens of expert solutions that were held out."""
        _, held_out = load_expert(self.solutions_file, self.n_held_out, config)
        surprise, mask = self.surprise(held_out, config)
        self.mean = surprise[mask].mean()
        self.spread = surprise[mask].std()

    @torch.no_grad()
    def surprise(
        self, rows: Sequence[batching.Row], config: train_rl.Config
    ) -> tuple[Tensor, Tensor]:
        """Return -log p of response tokens (B, T), and where there are tokens (B, T) bool."""
        longest = max(len(row.response_ids) for row in rows)
        surprise = torch.zeros(len(rows), longest, device=parallel.DEVICE)
        mask = torch.zeros(surprise.shape, dtype=torch.bool, device=parallel.DEVICE)
        # every rank does all rows
        for indices, batch in batching.micro_batches(rows, config.compute.tokens_per_gpu, 0, 1):
            cells = (indices, slice(batch.response_mask.shape[1]))
            surprise[cells] = -self.policy(batch, config.sampling.temperature).logp
            mask[cells] = batch.response_mask
        return surprise, mask


class SupervisedUpdate:
    """Replaces update_policy: a step on as many expert solutions as there are episodes."""

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
            self.solutions, _ = load_expert(self.solutions_file, self.n_held_out, config)
        n_rows = len(experience.episodes)
        order = passes(len(self.solutions), step * n_rows, n_rows, "solutions", config.seed)
        chosen = [self.solutions[index] for _, index in order]
        loss = learn(models.policy, chosen, config)
        grad_norm = models.learners["policy"].step(lr, config.optimisation.clip_norm)
        return {"policy/loss": loss, "policy/grad_norm": grad_norm}


def learn(policy: Policy, rows: Sequence[batching.Row], config: train_rl.Config) -> float:
    """Add the gradient of the mean of -log p to the policy's; return that mean, weighted as in RL."""
    n_tokens = sum(len(row.response_ids) for row in rows)
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


# ---- Wrong responses, to fit a flow to
@dataclass(frozen=True)
class HastySettings:
    """Sample a model's wrong responses."""

    model: str  # Folder of the model
    data: str  # Problems
    like: str  # File with as many solutions as are wanted
    folder: str  # Where solutions.jsonl goes
    seed: int = 0  # Seed of the sampling


def write_hasty_solutions(settings: HastySettings) -> None:
    """Sample a response to each problem and write those that are wrong, in the order of problems."""
    parallel.start()
    rows = sample_wrong(settings)
    n_wanted = len(read_rows(settings.like))
    if not rows:
        raise ValueError(f"{settings.model} solves all of {settings.data}; expected some failures")
    with written_whole(Path(settings.folder, "solutions.jsonl")) as temporary:
        lines = [json.dumps(row) + "\n" for row in rows[:n_wanted]]
        temporary.write_text("".join(lines))
    print(f"{len(lines)} of {n_wanted} wrong responses to {settings.data} in {settings.folder}")


def sample_wrong(settings: HastySettings) -> list[dict]:
    """Return the problems to which a sampled response is wrong, each with it as its solution."""
    model = find_model(settings.model, LoadingSettings())
    problem_settings = ProblemSettings(
        template=toy.EVALUATE["template"],
        problem_column="problem",
        max_prompt_tokens=toy.TRAIN_RL["max_prompt_tokens"],
    )
    problems = load_problems(settings.data, problem_settings, model)
    engine = TorchEngine(model, 256, parallel.DEVICE, torch.float32)
    requests = []
    for i, problem in enumerate(problems):
        seed = keyed_seed("hasty solutions", settings.seed, i)
        requests.append(rollout.Request(problem.prompt_ids, seed))
    sampling = rollout.Sampling(max_tokens=toy.EVALUATE["max_tokens"])
    episodes = engine.generate(requests, sampling)
    with Grader(toy.EVALUATE["reward"]) as grader:
        verdicts = grader.grade_all(problems, episodes)
    rows = []
    for problem, episode, verdict in zip(problems, episodes, verdicts, strict=True):
        if episode.finish_reason == "stop" and not verdict.correct:
            rows.append({"problem": problem.text, "solution": episode.text})
    return rows


# ---- From the command line
def replace_parts(control: str, arguments: argparse.Namespace) -> None:
    """Put a control's part into train_rl.py, in this process."""
    expert = (arguments.expert_solutions, arguments.held_out)
    if control == "shuffled-tokens":
        change_scores(shuffle_tokens)
    elif control == "shuffled-responses":
        change_scores(shuffle_responses)
    elif control == "logprob":
        change_scores(ExpertLikelihood(arguments.expert_policy, *expert))
    else:
        train_rl.update_policy = SupervisedUpdate(*expert)


def main() -> None:
    """Run the control that the command line names."""
    if sys.argv[1:] == ["--help"]:
        print(__doc__)  # behind a control's name, --help is train_rl.py's
        return
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    controls = ("shuffled-tokens", "shuffled-responses", "logprob", "sft", "hasty-solutions")
    parser.add_argument("control", choices=controls)
    parser.add_argument("--expert-policy")
    parser.add_argument("--expert-solutions")
    parser.add_argument("--held-out", type=int, default=64)
    arguments, flags = parser.parse_known_args()
    if arguments.control == "hasty-solutions":
        write_hasty_solutions(tyro.cli(HastySettings, args=flags))
        return
    sys.argv[1:] = flags
    replace_parts(arguments.control, arguments)
    launch(train_rl.main, train_rl.Config, toy.PRESETS["train_rl"])


if __name__ == "__main__":
    main()
