"""Look at rollouts: tokens coloured by flow reward, deviation, log-prob, entropy or advantage.

    python inspector.py runs/rl-toy-flow                     rollouts of a run -> its rollouts.html
    python inspector.py --model M --flow F --data D          those of any model, flow and problems

The first form reads what train_rl.py has written with --log-rollouts. The second samples a few
groups, four unless --prompts says otherwise, and scores them as a step of training would, but
learns nothing. It takes the settings of train_rl.py, of which those of the update have no effect,
and makes a run's folder: in runs/, unless --folder names one.
"""

# first: torch reads what this sets when it is imported
import infra.waiting  # noqa: F401

# isort: split
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import parallel
import rlfr
import rollout
import toy
import train_rl
from infra import errors
from pages.rollouts import inspect_run
from rewards import Grader
from run import Run, change, launch


@dataclass(frozen=True)
class Config(train_rl.Config):
    """Look at rollouts of a model; the settings are those of train_rl.py."""

    sampling: train_rl.SamplingSettings = train_rl.SamplingSettings(prompts=4)


def sample_and_inspect(config: Config) -> None:
    """Sample and score rollouts of a model, and write their page."""
    parallel.start()
    if config.resume:
        raise ValueError(
            f"--resume {config.resume}: inspector.py samples into a folder of its own; give "
            f"--model {config.resume}/policy, or the run alone to see the rollouts that it has"
        )
    prompts = config.sampling.prompts
    n_episodes = prompts * config.sampling.group_size
    config = change(config, freeze_flow=True, train_batch=n_episodes, log_groups=prompts)
    config, model = train_rl.resolve(config)
    run = Run(config, f"inspect-{Path(config.model).name}")
    problems = rollout.load_problems(config.data, config.problems, model)
    flow = train_rl.make_flow(config, model) if config.shaping == "flow" else None
    policy = rlfr.load_policy(model.path, config.loading.trust_remote_code)
    run.begin({})
    write_step(config, model, run, problems, flow, policy)
    if parallel.is_first():
        print(f"open {inspect_run(run.folder)}")


def write_step(
    config: Config,
    model: rollout.Model,
    run: Run,
    problems: list[rollout.Problem],
    flow,
    policy: rlfr.Policy,
) -> None:
    """Do the first half of a step of training, and write its rollouts."""
    dtype = parallel.compute_dtype(config.loading.dtype)
    max_tokens = config.sampling.max_tokens
    engine = rollout.make_engine(
        model,
        config.engine,
        config.problems.max_prompt_tokens + max_tokens,
        config.problems.max_images,
        parallel.DEVICE,
        dtype,
        can_sleep=True,
    )
    engine.sleep()
    parallel.shard(policy, policy.blocks, dtype, config.compute.cpu_offload)
    if flow:
        parallel.shard(flow, (), dtype, config.compute.cpu_offload)
    lengths = torch.zeros(len(problems))
    with Grader(config.reward, config.grading, max_tokens) as grader:
        sampler = train_rl.Sampler(engine, grader, problems, lengths, config.sampling, config.seed)
        engine.load_weights(parallel.full_weights(policy, dtype, prefix="model."))
        probes = rollout.sample_probes(engine, config.problems.max_prompt_tokens, max_tokens)
        train_rl.check_probes(policy, probes, model.path)
        episodes, verdicts, _ = train_rl.roll_out(sampler, 0)
        engine.sleep()
        scores, _ = train_rl.score(
            *(policy, None, flow, episodes, verdicts, config), step=0, with_logp=True
        )
        reward = [verdict.reward for verdict in verdicts()]
        reward = torch.tensor(reward, device=parallel.DEVICE)
        advantage, flow_reward, _ = train_rl.shape_advantage(scores, reward, config, 0)
        if parallel.is_first():
            train_rl.write_rollouts(
                run,
                0,
                policy,
                flow,
                model.tokenizer,
                episodes,
                verdicts(),
                scores,
                advantage,
                flow_reward,
                config,
            )


def main() -> None:
    """Do what the command line asks for: a folder alone is a run, flags are a model's settings."""
    arguments = [argument for argument in sys.argv[1:] if argument != errors.FLAG]
    if len(arguments) == 1 and not arguments[0].startswith("-"):
        errors.run(lambda: print(f"open {inspect_run(arguments[0])}"))
    else:
        presets = {}
        for name, preset in toy.PRESETS["train_rl"].items():
            presets[name] = {**preset, "prompts": Config().sampling.prompts}
        launch(sample_and_inspect, Config, presets)


if __name__ == "__main__":
    main()
