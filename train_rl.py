"""Reinforcement learning with verifiable rewards and the flow reward (GRPO, paper's algorithm), on one node.

python train_rl.py                                                                  the embedded world, from nothing
torchrun --nproc-per-node 8 train_rl.py --model Qwen2.5-7B --data problems.jsonl    columns `problem` and `answer`
python train_rl.py --shaping none | entropy | flow                                  baselines differ in this flag alone

Every rank knows all episodes, rewards and scores of a step, so that a step is the same on any number of ranks; what is
shared out is the work: sampling, grading, and the forward and backward of micro-batches.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import flow as fl
import parallel
import rlfr
import rollout
import toy
from eval import evaluate, load_sets, table
from parallel import is_first, on_first, start
from rewards import Grader, Verdict
from run import Run, RunConfig, asked_to_stop, check_positive, launch, with_defaults, written_whole


@dataclass(frozen=True)
class Config(RunConfig, rollout.Sampler):
    """Settings of a training run; None is filled in from the model."""

    answer_column: str = "answer"  # Column with the answer, or a list of accepted answers
    eval_data: tuple[str, ...] | None = (
        None  # Sets, as --data of eval.py: before and after training and every `eval_every`
    )
    prompts: int = 128  # N, prompts a step
    group_size: int = 8  # G, samples a prompt
    train_batch: int = 128  # Episodes an optimiser step; prompts * group_size must be a multiple
    epochs: int = 5  # Passes over the problems, unless `steps` is given
    steps: int | None = None  # RL steps
    temperature: float = 1.0  # Sampling temperature
    top_p: float = 1.0  # Refused below 1
    top_k: int = 0  # Refused above 0
    dynamic_sampling: bool = False  # Drop groups of equal reward and sample others in their place
    max_rounds: int = (
        4  # Rounds of dynamic sampling a step; what is then missing is filled with dropped groups
    )
    reward: tuple[str, ...] | None = (
        None  # Parts NAME or NAME=WEIGHT, see rewards.py; by default binary
    )
    overlong_buffer: int | None = (
        None  # Tokens before max_tokens in which the part overlong falls to -1; by default a fifth
    )
    grade_truncated: bool = False  # Let a response that ran out of room score
    grader_deadline: float = 5.0  # Seconds for grading one answer
    shaping: Literal["flow", "entropy", "none"] = (
        "flow"  # Dense part of the advantage; none is plain RLVR
    )
    baseline: rlfr.Baseline = "grpo"  # How the outcome reward becomes an advantage
    gamma: float = 1.0  # Discount of the flow reward
    flow: str | None = (
        None  # Flow of the offline start: folder or file; by default runs/flow-MODEL/flow
    )
    flow_coef: float = 0.01  # Scale of the flow reward
    reward_times: tuple[float, ...] = (
        0.8,
    )  # T_r, times at which the velocity deviation is taken, in (0, 1)
    flow_threshold: float = 0.6  # Normalised scores below are dropped, in [0, 1]
    flow_top_k: int | None = (
        15  # Tokens of a response that get a flow reward; None: all above the threshold
    )
    flow_bilateral: bool = False  # Normalise to [-1, 1] and keep both tails
    flow_power: float = 1.0  # Exponent applied to normalised scores
    flow_scope: Literal["response", "group"] = (
        "response"  # What is normalised together; response as in the paper
    )
    contexts: tuple[str, ...] | None = (
        None  # Expected context modes; None: the flow's. An official file needs them
    )
    percentiles: tuple[float, ...] | None = None  # Expected taps; None: the flow's
    freeze_flow: bool = False  # No online flow update
    flow_lr: float = 1e-4  # Learning rate of the online flow update
    flow_accept: Literal["correct", "all"] = (
        "correct"  # Rejection sampling: episodes that the flow learns from
    )
    flow_entropy_quantile: float | None = (
        None  # Learn only from tokens at or above this quantile of entropy
    )
    flow_soft: float = 0.0  # Weight of episodes and tokens that are not accepted
    flow_times: Literal["reward", "random"] = (
        "reward"  # Times of the flow's learning; random as in the offline start
    )
    entropy_alpha: float = 0.4  # Scale of the entropy advantage
    entropy_kappa: float = 2.0  # The entropy advantage stays below |A| / kappa
    lr: float = 1e-6  # Peak learning rate of the policy
    warmup: float = 0.03  # Fraction of the steps over which the rate rises
    lr_floor: float = 0.1  # Rate at the end of the cosine, as a fraction of the peak
    weight_decay: float = 0.0  # AdamW weight decay of the policy
    clip_norm: float = 1.0  # Largest gradient norm
    clip_low: float = 0.2  # PPO clip below 1
    clip_high: float = 0.2  # PPO clip above 1; 0.28 for DAPO's clip-higher
    ratio_cap: float = 3.0  # Largest probability ratio
    normalisation: rlfr.Normalisation = (
        "sequence"  # Loss: mean of means, token: global mean, constant: Dr. GRPO
    )
    kl_coef: float = 0.0  # Scale of the KL to the initial policy
    kl_kind: Literal["k1", "k2", "k3"] = "k3"  # KL estimator; k1 has no gradient on average
    mismatch: Literal["none", "token", "sequence", "mask"] = (
        "token"  # Sampler-trainer mismatch: truncate by, or mask
    )
    mismatch_cap: float = 2.0  # Where importance weights are truncated or masked
    freeze: rlfr.Freeze | None = (
        None  # What does not learn; by default vision, the tower of a vision-language model
    )
    gradient_checkpointing: bool | None = (
        None  # Recompute activations in the backward; by default above 1B parameters
    )
    tokens_per_gpu: int = 16384  # Padded tokens of a micro-batch, one forward of one rank
    offload: bool = False  # Keep weights and optimisers in host memory while the engine samples
    cpu_offload: bool = False  # Keep them there always: slower steps, least GPU memory
    compile: Literal["auto", "on", "off"] = "auto"  # Compile the flow; auto: on a GPU
    eval_every: int = 0  # Steps between evaluations; 0: only before and after
    eval_split: str = "test"  # Split of hub data for evaluation
    eval_samples: int = 4  # Responses a held-out problem in sampled evaluation


def check(config: Config) -> None:
    """Raise ValueError for settings that cannot work."""
    positive = """prompts group_size train_batch epochs steps max_tokens max_prompt_tokens temperature max_rounds grader_deadline
        flow_top_k flow_power lr flow_lr clip_norm tokens_per_gpu eval_samples keep mismatch_cap overlong_buffer
        ratio_cap entropy_kappa max_sequences tensor_parallel"""
    check_positive(config, *positive.split())
    if config.top_p < 1 or config.top_k > 0:
        reason = "the engine's log-probs would be over the tokens kept, the trainer's over all: a biased ratio"
        raise ValueError(
            f"top_p={config.top_p}, top_k={config.top_k}: training samples from all tokens ({reason}); leave them out"
        )
    if config.offload and config.cpu_offload:
        raise ValueError(
            "offload and cpu_offload exclude each other: choose when weights are in host memory, sometimes or always"
        )
    rollout.check_engine(config, dist.get_world_size())
    if config.group_size == 1 and config.baseline != "reinforce":
        raise ValueError(
            f"group_size=1 with baseline {config.baseline!r}: use 2 or more, or --baseline reinforce"
        )
    if config.prompts * config.group_size % config.train_batch:
        product = f"prompts * group_size = {config.prompts} * {config.group_size} = {config.prompts * config.group_size}"
        raise ValueError(
            f"{product} is not a multiple of train_batch={config.train_batch}; choose a divisor of it"
        )
    if config.train_batch % dist.get_world_size():
        raise ValueError(
            f"train_batch={config.train_batch} is not a multiple of the {dist.get_world_size()} ranks; choose one"
        )
    for name in ("flow_threshold", "flow_entropy_quantile", "flow_soft", "gamma"):
        if not 0 <= (getattr(config, name) or 0) <= 1:
            raise ValueError(f"{name}={getattr(config, name)} is outside [0, 1]")
    fl.check_times(config.reward_times)
    fl.FlowConfig(
        1, contexts=config.contexts or ("previous",), percentiles=config.percentiles or (0.5,)
    )  # checks them


def resolve(config: Config) -> tuple[Config, rollout.Model]:
    """Check the settings and fill in what follows from the model; return them and where the model is."""
    check(config)
    name, flow_folder = config.model, f"runs/flow-{Path(config.model).name}"
    if config.model in toy.WORLDS:
        world = on_first(lambda: toy.make(toy.WORLDS[config.model]))
        name = world.path("model")
        config = with_defaults(
            config, data=world.path("train.jsonl"), eval_data=(world.path("test.jsonl"),)
        )
        if config.shaping == "flow" and config.flow is None:
            on_first(lambda: make_toy_flow(config.model, flow_folder))
    config = with_defaults(config, flow=f"{flow_folder}/flow" if config.shaping == "flow" else None)
    model = rollout.find_model(name, config.trust_remote_code, config.min_pixels, config.max_pixels)
    if config.data is None:
        raise ValueError(
            "no data given; expected --data with problems (columns problem and answer)"
        )
    config = rollout.fill_in(config, model)
    positions = model.config.get_text_config().max_position_embeddings
    if config.max_prompt_tokens + config.max_tokens > positions:
        room = f"max_prompt_tokens + max_tokens = {config.max_prompt_tokens} + {config.max_tokens}"
        raise ValueError(
            f"{room} is more than the model's {positions} positions; lower one of them"
        )
    return config, model


def make_toy_flow(model: str, folder: str) -> None:
    """Run the offline start of an embedded world, in one process, unless it has been run."""
    if not Path(folder, "flow", fl.FLOW_FILE).exists():
        arguments = [
            "--resume" if Path(folder, "config.json").exists() else "--folder",
            folder,
            "--model",
            model,
        ]
        of_ranks = (
            "RANK",
            "LOCAL_RANK",
            "WORLD_SIZE",
            "LOCAL_WORLD_SIZE",
            "MASTER_ADDR",
            "MASTER_PORT",
        )
        alone = {
            name: value
            for name, value in os.environ.items()
            if name not in of_ranks and "TORCHELASTIC" not in name
        }
        subprocess.run(
            [sys.executable, Path(__file__).with_name("train_flow.py"), *arguments],
            check=True,
            env=alone,
        )


# ---- The phases of a step
Verdicts = Callable[[], list[Verdict]]  # of rollout.grade_on_all_ranks


def roll_out(engine, grader, problems, lengths: Tensor, config: Config, cursor: int) -> tuple[list[rollout.Episode], Verdicts, int]:  # fmt: skip
    """Sample G responses for N problems from the cursor on and have them graded in the background.

    lengths (n_problems,) holds each problem's mean response tokens when last sampled, or 0, and is brought up to date.
    Returns the episodes, G in a row for each problem, their verdicts to come, and the cursor after the last problem.
    """
    group = config.group_size
    sampling = rollout.Sampling(group, config.temperature, config.max_tokens)

    def sample(n: int) -> tuple[list[rollout.Episode], Verdicts]:
        places = rlfr.passes(len(problems), cursor, n, "problem order", config.seed)
        rows = [index for _, index in places]
        chosen = [problems[index] for index in rows]
        seeds = [fl.keyed_seed("roll out", config.seed, *place) for place in places]
        usual = (
            lengths[lengths > 0].mean().nan_to_num(config.max_tokens)
        )  # for a problem that was not sampled before
        response = torch.where(lengths > 0, lengths, usual)[rows].tolist()
        expected = [
            len(problem.prompt_ids) + group * length
            for problem, length in zip(chosen, response, strict=True)
        ]
        prompts = [problem.prompt_ids for problem in chosen]
        images = [problem.images for problem in chosen]
        episodes = rollout.generate_on_all_ranks(engine, prompts, sampling, seeds, expected, images)
        lengths[rows] = (
            torch.tensor([len(e.response_ids) for e in episodes]).view(n, group).float().mean(dim=1)
        )
        return episodes, rollout.grade_on_all_ranks(grader, chosen, episodes)

    if not config.dynamic_sampling:
        return *sample(config.prompts), cursor + config.prompts
    kept, dropped, wanted = [], [], config.prompts * group
    for _ in range(config.max_rounds):
        missing = (wanted - len(kept)) // group
        episodes, verdicts = sample(missing)
        cursor += missing
        pairs = list(zip(episodes, verdicts(), strict=True))
        varied = rlfr.varied_groups(torch.tensor([verdict.reward for _, verdict in pairs]), group)
        for i, keep in enumerate(varied.tolist()):
            (kept if keep else dropped).extend(pairs[i * group : (i + 1) * group])
        if len(kept) == wanted:
            break
    episodes, verdicts = zip(*(kept + dropped)[:wanted], strict=True)
    return list(episodes), lambda: list(verdicts), cursor


@dataclass
class Scores:
    """What is known of a step's episodes after the scoring pass, (B, T) each, on every rank."""

    mask: Tensor  # response tokens
    sampled_logp: Tensor
    old_logp: Tensor
    entropy: Tensor
    ref_logp: Tensor
    flow_score: Tensor
    flow_mask: Tensor  # tokens with a flow score: all of mask, but for the last one where the context is the next


def score(
    policy, reference, flow, episodes, verdicts: Verdicts, config: Config, step: int
) -> tuple[Scores, dict[str, float]]:
    """Run the policy once over the episodes, without gradient: log-probs, entropies, and the flow's score of the latents.

    The flow's own loss on accepted episodes leaves its gradient on the flow, none on the policy. Latents are not kept.
    """
    lengths = torch.tensor(
        [len(episode.response_ids) for episode in episodes], device=parallel.DEVICE
    )
    mask = torch.arange(int(lengths.max()), device=parallel.DEVICE) < lengths[:, None]
    sampled_logp = torch.zeros(mask.shape, device=parallel.DEVICE)
    sampled_logp[mask] = torch.tensor(
        [x for episode in episodes for x in episode.logp], device=parallel.DEVICE
    )
    found = torch.zeros(5, *mask.shape, device=parallel.DEVICE)  # this rank's part of what follows
    old_logp, entropy, ref_logp, flow_score, flow_mask = found
    taps = rlfr.tap_layers(policy.n_layers, flow.config.percentiles) if flow else []
    flow_loss, learnt = torch.zeros((), device=parallel.DEVICE), False
    if flow:
        parallel.begin_calls(flow)
    pairs = [(episode.prompt_ids, episode.response_ids, episode.images) for episode in episodes]
    batches = rlfr.micro_batches(
        pairs, config.tokens_per_gpu, dist.get_rank(), dist.get_world_size()
    )
    for rows, batch in tqdm(batches, desc="score", leave=False, delay=3, disable=not is_first()):
        targets = batch.response_mask
        here = (rows, slice(targets.shape[1]))  # where the micro-batch is in (B, T)
        with torch.no_grad():
            old_logp[here], entropy[here], latents = policy(batch, config.temperature, taps)
            if reference:
                ref_logp[here] = reference(batch, config.temperature).logp
        if not flow:
            continue
        depths = [tap / policy.n_layers for tap in taps]
        rows_of_flow = fl.pair(flow.config, latents, depths, batch.attention_mask, batch.targets)
        keys = [("flow noise", config.seed, step, i) for i in rows]
        noise, z = fl.draw(flow.config, keys, targets.sum(dim=1).tolist(), parallel.DEVICE)
        weight = None
        if (
            not config.freeze_flow
        ):  # the first micro-batch waits for the verdicts, while the accelerator works
            everyone = config.flow_accept == "all"
            accepted = torch.tensor(
                [everyone or verdict.correct for verdict in verdicts()], device=parallel.DEVICE
            )
            quantile, soft = config.flow_entropy_quantile, config.flow_soft
            seen = None if quantile is None else entropy[here]
            token_weight, row_weight = rlfr.online_flow_weights(
                targets, accepted[rows], seen, quantile, soft
            )
            total = torch.where(accepted, 1.0, soft).sum()  # over all ranks
            learnt = bool(total > 0)
            weight = (token_weight * row_weight[:, None] / total.clamp(min=1e-9))[targets]
        learn_at = z if config.flow_times == "random" else None
        token_score, token_loss = fl.score_and_learn(
            flow, rows_of_flow, noise, config.reward_times, weight, learn_at
        )
        flow_score[here] = batch.unflatten(token_score)
        flow_mask[here] = batch.unflatten(rows_of_flow.exists.any(dim=1).any(dim=0)).float()
        flow_loss += 0.0 if weight is None else (weight * token_loss).sum()
    if flow:
        parallel.end_calls(flow, flow.example(parallel.DEVICE), learnt)
    parallel.sum_over_ranks(found)
    scores = Scores(mask, sampled_logp, *found[:4], found[4].bool())
    return scores, {
        "flow/loss": parallel.sum_over_ranks(flow_loss).item()
    } if flow and not config.freeze_flow else {}


def shape_advantage(
    scores: Scores, reward: Tensor, config: Config
) -> tuple[Tensor, dict[str, float]]:
    """Return the advantage of each token (B, T): outcome part, and the dense part that `shaping` chooses."""
    mask, metrics = scores.mask, {}
    advantage = rlfr.outcome_advantage(reward, config.group_size, config.baseline)[:, None] * mask
    if config.shaping == "flow":
        scope = config.group_size if config.flow_scope == "group" else 1
        unit = rlfr.normalise(
            scores.flow_score, scores.flow_mask, config.flow_bilateral, config.flow_power, scope
        )
        kept = rlfr.select(unit, config.flow_threshold, config.flow_top_k, config.flow_bilateral)
        flow_reward = -config.flow_coef * kept
        advantage = advantage + rlfr.token_returns(flow_reward, mask, config.gamma)
        metrics["flow/score"] = (
            scores.flow_score.sum() / scores.flow_mask.sum().clamp(min=1)
        ).item()
        metrics["flow/reward"] = flow_reward.sum(dim=1).mean().item()
        metrics["flow/tokens"] = (kept != 0).sum(dim=1).float().mean().item()
    if config.shaping == "entropy":
        shaped = (
            rlfr.entropy_advantage(
                advantage, scores.entropy, config.entropy_alpha, config.entropy_kappa
            )
            * mask
        )
        metrics["entropy_advantage"] = (shaped - advantage)[mask].mean().item()
        advantage = shaped
    if config.baseline == "reinforce++":
        advantage = rlfr.whiten(advantage, mask)
    return advantage, metrics


def update_policy(policy, learner, episodes, scores: Scores, advantage, weight, config: Config, step: int, lr: float) -> dict[str, float]:  # fmt: skip
    """Take the optimiser steps of one RL step, mini-batch by mini-batch; return the figures, averaged over them."""
    order = torch.tensor(rlfr.permutation(len(episodes), "mini-batches", config.seed, step))
    share, grad_norm = config.train_batch / len(episodes), 0.0
    loss_sum, kl_sum, clipped_sum = sums = torch.zeros(3, device=parallel.DEVICE)
    for mini in tqdm(
        order.split(config.train_batch), desc="update", leave=False, delay=3, disable=not is_first()
    ):
        n_tokens = int(scores.mask[mini].sum())  # over all micro-batches and ranks: one denominator
        pairs = [
            (episodes[i].prompt_ids, episodes[i].response_ids, episodes[i].images) for i in mini
        ]
        for rows, batch in rlfr.micro_batches(
            pairs, config.tokens_per_gpu, dist.get_rank(), dist.get_world_size()
        ):
            mask = batch.response_mask
            here = (mini[rows], slice(mask.shape[1]))
            logp = policy(batch, config.temperature).logp
            clips = (config.clip_low, config.clip_high, config.ratio_cap)
            loss, clipped = rlfr.policy_loss(logp, scores.old_logp[here], advantage[here], *clips)
            loss = loss * weight[here]
            token_weight = rlfr.token_weights(
                mask, config.normalisation, len(mini), n_tokens, config.max_tokens
            )
            if config.kl_coef:
                kl = rlfr.kl_divergence(logp, scores.ref_logp[here], config.kl_kind)
                loss = loss + config.kl_coef * kl
                kl_sum += share * (kl * token_weight).sum().detach()
            loss = (loss * token_weight).sum()
            loss.backward()
            loss_sum += share * loss.detach()
            clipped_sum += share * (clipped & mask).sum() / n_tokens
        grad_norm += share * learner.step(lr, config.clip_norm)
    figures = dict(
        zip(("loss", "kl", "clipped"), parallel.sum_over_ranks(sums).tolist(), strict=True)
    ) | {"grad_norm": grad_norm}
    return {f"policy/{name}": value for name, value in figures.items()}


def main(config: Config) -> None:
    """Train a policy."""
    # ---- What there is: problems, policy, flow, engine, grader
    start()
    config, model = resolve(config)
    run = Run(config, f"rl-{Path(config.model).name}-{config.shaping}")
    problems = rollout.load_problems(config.data, config, model)
    if not (total_steps := config.steps or config.epochs * len(problems) // config.prompts):
        few = f"{len(problems)} problems in {config.epochs} epochs"
        raise ValueError(f"{few} do not fill a step of {config.prompts}; lower --prompts")
    evaluated = replace(config, split=config.eval_split)
    held_out = load_sets(config.eval_data or (), evaluated, model)
    n_workers = max(1, (os.cpu_count() or 1) // dist.get_world_size())
    limits = (
        config.grader_deadline,
        config.grade_truncated,
        config.max_tokens,
        config.overlong_buffer,
    )
    grader = Grader(config.reward, n_workers, *limits)
    flow, reference, dtype = None, None, parallel.compute_dtype(config.dtype)
    if config.shaping == "flow":
        dim = model.config.get_text_config().hidden_size
        flow = fl.load_flow(
            config.flow, dim, contexts=config.contexts, percentiles=config.percentiles
        )
    engine = rollout.make_engine(model, config, parallel.DEVICE, dtype)
    engine.sleep()  # the policy has the GPU while it is sharded
    policy = rlfr.load_policy(
        model.path, config.trust_remote_code, config.gradient_checkpointing, config.freeze
    )
    parallel.shard(policy, policy.blocks, dtype, config.cpu_offload)
    learners = {"policy": parallel.Learner(policy, (0.9, 0.95), config.weight_decay)}
    if config.kl_coef:
        reference = rlfr.load_policy(model.path, config.trust_remote_code).requires_grad_(False)
        parallel.shard(reference, reference.blocks, dtype, config.cpu_offload)
    if flow:
        parallel.compile_flow(flow, config.compile)
        parallel.shard(flow, (), dtype, config.cpu_offload)
        if not config.freeze_flow:
            learners["flow"] = parallel.Learner(flow, (0.9, 0.999), 0.01)
    progress = {"step": 0, "cursor": 0, "lengths": torch.zeros(len(problems))}
    state = {"progress": progress} | learners
    run.begin(state)
    if is_first():
        print(config)
        sizes = f"{len(problems)} problems, {total_steps} steps of {config.prompts} * {config.group_size} episodes"
        print(
            f"{sizes}, {dist.get_world_size()} ranks, {parallel.DEVICE} in {dtype}, run folder {run.folder}"
        )

    def sync() -> None:
        """Give the engine the policy's weights, and room."""
        engine.load_weights(parallel.full_weights(policy, dtype, prefix="model."))
        if config.offload:
            parallel.move([*learners.values(), reference], "cpu")

    def rest() -> None:
        """Take the room back from the engine."""
        engine.sleep()
        if config.offload:
            parallel.move([*learners.values(), reference], parallel.DEVICE)

    def assess() -> dict[str, dict]:
        """Evaluate the policy on the held-out sets; return figures by set and kind of sampling."""
        samplings = [("sampled", config.eval_samples, config.temperature), ("greedy", 1, 0.0)]
        samplings = {
            kind: rollout.Sampling(n, temperature, config.max_tokens)
            for kind, n, temperature in samplings
        }
        sync()
        found: dict[str, dict] = {name: {} for name in held_out}
        with torch.random.fork_rng():  # an engine may draw from the global generator
            for name, problems in held_out.items():
                for kind, sampling in samplings.items():
                    found[name][kind] = evaluate(engine, name, problems, grader, sampling)
        rest()
        return found

    summary_file = run.folder / "summary.json"
    summary = (
        json.loads(summary_file.read_text()) if progress["step"] and summary_file.exists() else {}
    )
    if held_out and "before" not in summary:
        summary["before"] = assess()
        run.write_json("summary.json", summary)

    bar = tqdm(
        initial=progress["step"], total=total_steps, desc="rl", unit="step", disable=not is_first()
    )
    while (step := progress["step"]) < total_steps and not asked_to_stop():
        laps = [time.perf_counter()]
        grader.counts.clear()
        # ---- 1. Roll out, and 2. verify in worker processes, while the scores are computed
        sync()
        laps.append(time.perf_counter())
        episodes, verdicts, cursor = roll_out(
            engine, grader, problems, progress["lengths"], config, progress["cursor"]
        )
        rest()
        laps.append(time.perf_counter())

        # ---- 3. Score
        scores, flow_metrics = score(policy, reference, flow, episodes, verdicts, config, step)
        laps.append(time.perf_counter())
        reward = torch.tensor([verdict.reward for verdict in verdicts()], device=parallel.DEVICE)
        correct = sum(verdict.correct for verdict in verdicts()) / len(episodes)
        laps.append(time.perf_counter())

        # ---- 4. Shape and advantage
        advantage, shaping_metrics = shape_advantage(scores, reward, config)
        correction = (config.mismatch, config.mismatch_cap)
        weight, mismatch = rlfr.importance_weights(
            scores.old_logp, scores.sampled_logp, scores.mask, *correction
        )

        # ---- 5. Update the policy
        lr = rlfr.learning_rate(config.lr, step, total_steps, config.warmup, config.lr_floor)
        policy_metrics = update_policy(
            policy, learners["policy"], episodes, scores, advantage, weight, config, step, lr
        )

        # ---- 6. Update the flow
        if "flow" in learners:
            flow_metrics["flow/grad_norm"] = learners["flow"].step(config.flow_lr, config.clip_norm)
        laps.append(time.perf_counter())

        # ---- 7. Log, evaluate, save
        progress |= {"step": step + 1, "cursor": cursor}
        mask, n_truncated = (
            scores.mask,
            sum(episode.finish_reason == "length" for episode in episodes),
        )
        metrics = {"reward": reward.mean().item(), "correct": correct, "lr": lr, "cursor": cursor}
        metrics["varied_groups"] = (
            rlfr.varied_groups(reward, config.group_size).float().mean().item()
        )
        metrics |= {
            "length": mask.sum(dim=1).float().mean().item(),
            "truncated": n_truncated / len(episodes),
        }
        metrics |= {
            "entropy": scores.entropy[mask].mean().item(),
            "advantage_abs": advantage[mask].abs().mean().item(),
        }
        for part in verdicts()[0].parts:
            metrics[f"reward/{part}"] = sum(verdict.parts[part] for verdict in verdicts()) / len(
                episodes
            )
        for trouble in ("timeout", "crashed", "capped"):
            metrics[f"grader/{trouble}"] = parallel.sum_over_ranks(
                torch.tensor(float(grader.counts[trouble]))
            ).item()
        metrics |= policy_metrics | shaping_metrics | flow_metrics | mismatch
        if held_out and config.eval_every and (step + 1) % config.eval_every == 0:
            for name, kinds in assess().items():
                metrics |= {
                    f"eval/{name}/{kind}": figures["avg"]["mean"] for kind, figures in kinds.items()
                }
        laps.append(time.perf_counter())
        phases = ("sync", "roll_out", "score", "verify", "update", "evaluate")
        metrics |= {
            f"time/{phase}": b - a for phase, (a, b) in zip(phases, pairwise(laps), strict=True)
        }
        metrics["time/step"] = laps[-1] - laps[0]
        if parallel.DEVICE.type == "cuda":
            metrics["memory/peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        run.log(step + 1, metrics)
        if is_first():
            bar.update()
            tqdm.write(
                f"step {step + 1:4d}  reward {metrics['reward']:.3f}  length {metrics['length']:6.1f}  "
                f"entropy {metrics['entropy']:.3f}  flow {metrics.get('flow/score', 0):.3f}  "
                f"loss {metrics['policy/loss']:+.4f}  grad {metrics['policy/grad_norm']:.3f}  {metrics['time/step']:.1f} s"
            )
        if config.save_every and (step + 1) % config.save_every == 0:
            run.save(state)

    # ---- What came of it
    if not run.end(state, total_steps):
        return
    weights = {
        name: tensor.cpu()
        for name, tensor in parallel.full_weights(policy, dtype, prefix="model.")
        if is_first()
    }
    on_first(
        lambda: export(
            policy.model, weights, [model.tokenizer, model.processor], run.folder / "policy"
        )
    )
    if flow:
        fl.save_flow(flow, run.folder / "flow")
    if held_out:
        summary["after"] = assess()
        run.write_json("summary.json", summary)
    if held_out and is_first():
        rows = {}
        for name in held_out:
            for when in ("before", "after"):
                rows |= {
                    f"{name} {when}, {kind}": figures
                    for kind, figures in summary[when][name].items()
                }
        print(table(rows))
    if is_first():
        print(f"the policy is in {run.folder / 'policy'}, the figures in {run.folder}")
    grader.close()


def export(model, weights: dict[str, Tensor], processors: list, folder: Path) -> None:
    """Write the policy as Hugging Face does: weights, configurations, tokenizer and, where there is one, image processor."""
    stored = {
        name for tensors in (model.named_parameters(), model.named_buffers()) for name, _ in tensors
    }  # tied ones once
    weights = {name: tensor for name, tensor in weights.items() if name in stored}
    with torch.device("meta"):  # one that is not sharded, in the dtype of the weights
        plain = type(model)(model.config).to(next(iter(weights.values())).dtype)
    plain.generation_config = model.generation_config
    with written_whole(folder) as temporary:
        plain.save_pretrained(temporary, state_dict=weights)
        for processor in filter(None, processors):
            processor.save_pretrained(temporary)


if __name__ == "__main__":
    launch(main, Config, toy.PRESETS["train_rl"])
