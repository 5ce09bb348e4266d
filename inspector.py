"""Look at rollouts: tokens coloured by flow reward, deviation, log-prob, entropy or advantage.

    python inspector.py runs/rl-toy-flow                     rollouts of a run -> its rollouts.html
    python inspector.py --model M --flow F --data D          those of any model, flow and problems
    python inspector.py --jsonl FILE [FILE …] [--model M]    those of TRL, verl or prime-rl

The first form reads what train_rl.py has written with --log-rollouts. The second samples a few
groups, four unless --prompts says otherwise, and scores them as a step of training would, but
learns nothing. It takes the settings of train_rl.py, of which those of the update have no effect,
and makes a run's folder: in runs/, unless --folder names one. The third reads what
pages/other_trainers.py knows, and writes rollouts.html beside the first file.
"""

# first: torch reads what this sets when it is imported
import infra.waiting  # noqa: F401

# isort: split
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro

import rollout
import train_rl
from engines import awake, check_probes, make_engine, sample_probes
from infra import errors, parallel
from infra.data import Problem, load_problems
from infra.models import LoadingSettings, Model, find_model
from infra.runs import Run, launch
from infra.settings import change
from pages.other_trainers import read_files
from pages.page import check_place
from pages.rollouts import inspect_run, write_rollouts_page
from rewards import Grader
from worlds import PRESETS


@dataclass(frozen=True)
class Config(train_rl.Config):
    """Look at rollouts of a model; the settings are those of train_rl.py.

    A run's folder alone shows its rollouts; --jsonl FILE those of TRL, verl or prime-rl.
    """

    sampling: rollout.SamplingSettings = rollout.SamplingSettings(prompts=4)


def sample_and_inspect(config: Config) -> None:
    """Sample and score rollouts of a model, and write their page."""
    parallel.start()
    if config.resume:
        raise ValueError(
            f"--resume {config.resume}: inspector.py samples into a folder of its own; give "
            f"--model {config.resume}/policy, or the run alone to see the rollouts that it has"
        )
    n_episodes = config.sampling.prompts * config.sampling.group_size
    config = change(config, flow_lr=0.0, train_batch=n_episodes)
    is_flow_named = config.flow is not None
    config, model = train_rl.resolve(config)
    run = Run(config, f"inspect-{Path(config.model).name}")
    problems = load_problems(config.data, config.problems, model)
    models = train_rl.make_models(config, model, is_flow_named)
    run.begin({})
    with Grader(config.reward, config.grading, config.sampling.max_tokens) as grader:
        experience = sample_and_score(config, model, problems, models, grader)
    advantage, reward, _ = train_rl.shape_advantage(experience, models.dense, config, 0)
    if parallel.is_first():
        shaped = {"advantage": advantage, "dense_reward": reward}
        n_groups = config.sampling.prompts
        records = train_rl.describe_rollouts(
            models, experience, shaped, config, model.tokenizer, n_groups
        )
        run.log_rollouts(1, records)
        print(f"open {inspect_run(run.folder)}")


def sample_and_score(
    config: Config,
    model: Model,
    problems: list[Problem],
    models: train_rl.Models,
    grader: Grader,
) -> train_rl.Experience:
    """Do the first half of a step of training."""
    dtype = parallel.compute_dtype(config.loading.dtype)
    longest_prompt = config.problems.max_prompt_tokens
    max_tokens = config.sampling.max_tokens
    engine = make_engine(
        model,
        config.engine,
        rollout.Capacity(longest_prompt + max_tokens, rollout.most_images(problems)),
        device=parallel.DEVICE,
        dtype=dtype,
        can_sleep=True,
    )
    engine.sleep()
    lengths = torch.zeros(len(problems))
    sampler = rollout.Sampler(
        engine, grader, problems, lengths, settings=config.sampling, seed=config.seed
    )
    with awake(engine, partial(models.policy.whole_weights, dtype)):
        probes = sample_probes(engine, longest_prompt, max_tokens)
        check_probes(models.policy, probes, model.path)
        episodes, _ = sampler.roll_out(0)
    sampler.verify(episodes)
    token_budget = config.compute.tokens_per_gpu
    return train_rl.score(models, episodes, 0, config.sampling.temperature, token_budget)


@dataclass(frozen=True)
class OtherTrainers:
    """Look at rollouts that TRL, verl or prime-rl has written."""

    jsonl: tuple[str, ...]  # JSONL or Parquet files
    # Whose tokenizer made the tokens, where a file has their ids and values; by default words
    # stand for tokens
    model: str | None = None


def inspect_files(settings: OtherTrainers) -> None:
    """Write the page of files of another trainer beside the first of them."""
    tokenizer = None
    if settings.model:
        tokenizer = find_model(settings.model, LoadingSettings()).tokenizer
    steps = read_files(settings.jsonl, tokenizer)
    page = Path(settings.jsonl[0]).with_name("rollouts.html")
    check_place(page)
    print(f"open {write_rollouts_page(page, f'Rollouts of {page.resolve().parent.name}', steps)}")


def main() -> None:
    """Do what the command line asks for: a folder alone is a run, flags are a model's settings."""
    arguments = [argument for argument in sys.argv[1:] if argument != errors.FLAG]
    if len(arguments) == 1 and not arguments[0].startswith("-"):
        errors.run(lambda: print(f"open {inspect_run(arguments[0])}"))
    elif "--jsonl" in arguments:
        errors.run(lambda: inspect_files(tyro.cli(OtherTrainers, args=arguments)))
    else:
        presets = {}
        for name, preset in PRESETS["train_rl"].items():
            presets[name] = {**preset, "prompts": Config().sampling.prompts}
        launch(sample_and_inspect, Config, presets)


if __name__ == "__main__":
    main()
