"""Reinforcement learning with verifiable rewards and the flow reward (GRPO, paper's algorithm), on one node.

python train_rl.py                                                    the embedded world, from nothing
python train_rl.py --model Qwen2.5-7B --data problems.jsonl           columns `problem` and `answer`
python train_rl.py --shaping none | entropy | flow                    the baselines differ in this flag alone
"""

import json
import subprocess
import sys
import time
from concurrent.futures import Future
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, PretrainedConfig

import flow as fl
import rlfr
import rollout
import toy
from eval import evaluate, table
from rewards import Grader, Verdict
from run import Run, RunConfig, check_positive, parse_config, with_defaults, written_whole


@dataclass(frozen=True)
class Config(RunConfig, rollout.Source):
    """Settings of a training run; None is filled in from the model."""

    answer_column: str = "answer"  # Column with the answer, or a list of accepted answers
    eval_data: str | None = None  # Held-out problems, evaluated before and after training and every `eval_every` steps
    prompts: int = 128  # N, prompts a step
    group_size: int = 8  # G, samples a prompt
    train_batch: int = 128  # Episodes an optimiser step; prompts * group_size must be a multiple
    epochs: int = 5  # Passes over the problems, unless `steps` is given
    steps: int | None = None  # RL steps
    max_tokens: int = 1024  # Longest response
    max_sequences: int = 256  # Responses sampled at a time; bounds the engine's KV cache
    temperature: float = 1.0  # Sampling temperature
    dynamic_sampling: bool = False  # Drop groups of equal reward and sample others in their place
    max_rounds: int = 4  # Rounds of dynamic sampling a step; what is then missing is filled with dropped groups
    reward: str = "binary"  # Outcome reward: binary, official, or a Python file with reward(problem, response)
    grade_truncated: bool = False  # Let a response that ran out of room score
    grader_deadline: float = 5.0  # Seconds for grading one answer
    shaping: Literal["flow", "entropy", "none"] = "flow"  # Dense part of the advantage; none is plain RLVR
    baseline: rlfr.Baseline = "grpo"  # How the outcome reward becomes an advantage
    gamma: float = 1.0  # Discount of the flow reward
    flow: str | None = None  # Flow of the offline start: folder or file; by default runs/flow-MODEL/flow
    flow_coef: float = 0.01  # Scale of the flow reward
    reward_times: tuple[float, ...] = (0.8,)  # T_r, times at which the velocity deviation is taken, in (0, 1)
    flow_threshold: float = 0.6  # Normalised scores below are dropped, in [0, 1]
    flow_top_k: int | None = 15  # Tokens of a response that get a flow reward; None: all above the threshold
    flow_bilateral: bool = False  # Normalise to [-1, 1] and keep both tails
    flow_power: float = 1.0  # Exponent applied to normalised scores
    flow_scope: Literal["response", "group"] = "response"  # What is normalised together; response as in the paper
    contexts: tuple[str, ...] | None = None  # Expected context modes; None: the flow's. An official file needs them
    percentiles: tuple[float, ...] | None = None  # Expected taps; None: the flow's
    freeze_flow: bool = False  # No online flow update
    flow_lr: float = 1e-4  # Learning rate of the online flow update
    flow_accept: Literal["correct", "all"] = "correct"  # Rejection sampling: episodes that the flow learns from
    flow_entropy_quantile: float | None = None  # Learn only from tokens at or above this quantile of entropy
    flow_soft: float = 0.0  # Weight of episodes and tokens that are not accepted
    flow_times: Literal["reward", "random"] = "reward"  # Times of the flow's learning; random as in the offline start
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
    normalisation: rlfr.Normalisation = "sequence"  # Loss: mean of means, token: global mean, constant: Dr. GRPO
    kl_coef: float = 0.0  # Scale of the KL to the initial policy
    kl_kind: Literal["k1", "k2", "k3"] = "k3"  # KL estimator; k1 has no gradient on average
    mismatch: Literal["none", "token", "sequence", "mask"] = "token"  # Sampler-trainer mismatch: truncate by, or mask
    mismatch_cap: float = 2.0  # Where importance weights are truncated or masked
    gradient_checkpointing: bool = False  # Recompute activations in the backward
    tokens_per_micro_batch: int = 16384  # Padded tokens of one forward
    eval_every: int = 0  # Steps between evaluations; 0: only before and after
    eval_split: str = "test"  # Split of hub data for evaluation
    eval_samples: int = 4  # Responses a held-out problem in sampled evaluation


def check(config: Config) -> None:
    """Raise ValueError for settings that cannot work."""
    positive = """prompts group_size train_batch epochs steps max_tokens max_prompt_tokens temperature max_rounds grader_deadline
        flow_top_k flow_power lr flow_lr clip_norm tokens_per_micro_batch eval_samples save_every keep mismatch_cap
        ratio_cap entropy_kappa max_sequences"""
    check_positive(config, *positive.split())
    if config.group_size == 1 and config.baseline != "reinforce":
        raise ValueError(f"group_size=1 with baseline {config.baseline!r}: use 2 or more, or --baseline reinforce")
    if config.prompts * config.group_size % config.train_batch:
        product = f"prompts * group_size = {config.prompts} * {config.group_size} = {config.prompts * config.group_size}"
        raise ValueError(f"{product} is not a multiple of train_batch={config.train_batch}; choose a divisor of it")
    for name in ("flow_threshold", "flow_entropy_quantile", "flow_soft", "gamma"):
        if not 0 <= (getattr(config, name) or 0) <= 1:
            raise ValueError(f"{name}={getattr(config, name)} is outside [0, 1]")
    fl.check_times(config.reward_times)
    fl.FlowConfig(1, contexts=config.contexts or ("previous",), percentiles=config.percentiles or (0.5,))  # checks them


def resolve(config: Config) -> tuple[Config, str, PretrainedConfig]:
    """Check the settings and fill in what follows from the model; return them, the model's path and configuration."""
    check(config)
    flow_folder = f"runs/flow-{Path(config.model).name}"
    if config.model == "toy":
        world = toy.make()
        config = with_defaults(config, data=world.path("train.jsonl"), eval_data=world.path("test.jsonl"))
        if config.shaping == "flow" and config.flow is None and not Path(flow_folder, "flow", fl.FLOW_FILE).exists():
            begun = Path(flow_folder, "config.json").exists()
            arguments = ["--resume" if begun else "--folder", flow_folder]
            subprocess.run([sys.executable, Path(__file__).with_name("train_flow.py"), *arguments], check=True)
    path = toy.World().path("model") if config.model == "toy" else rollout.resolve_model(config.model, config.trust_remote_code)
    if config.data is None:
        raise ValueError("no data given; expected --data with problems (columns problem and answer)")
    model_config, _ = rlfr.model_facts(path, config.trust_remote_code)
    positions = model_config.get_text_config().max_position_embeddings
    if config.max_prompt_tokens + config.max_tokens > positions:
        room = f"max_prompt_tokens + max_tokens = {config.max_prompt_tokens} + {config.max_tokens}"
        raise ValueError(f"{room} is more than the model's {positions} positions; lower one of them")
    return with_defaults(config, flow=f"{flow_folder}/flow" if config.shaping == "flow" else None), path, model_config


# ---- The phases of a step
def roll_out(engine, grader, problems, config: Config, cursor: int) -> tuple[list[rollout.Episode], Future[list[Verdict]], int]:  # fmt: skip
    """Sample G responses for N problems from the cursor on and have them graded in the background.

    Returns the episodes, G in a row for each problem, their verdicts to come, and the cursor after the last problem.
    """
    sampling = rollout.Sampling(config.group_size, config.temperature, config.max_tokens)

    def sample(n: int) -> tuple[list[rollout.Episode], Future[list[Verdict]]]:
        places = [divmod(place, len(problems)) for place in range(cursor, cursor + n)]
        orders = {epoch: rlfr.permutation(len(problems), "problem order", config.seed, epoch) for epoch, _ in places}
        chosen = [problems[orders[epoch][index]] for epoch, index in places]
        seeds = [fl.keyed_seed("roll out", config.seed, *place) for place in places]
        episodes = engine.generate([problem.prompt_ids for problem in chosen], sampling, seeds)
        return episodes, grader.submit(chosen, episodes)

    if not config.dynamic_sampling:
        return *sample(config.prompts), cursor + config.prompts
    kept, dropped, wanted = [], [], config.prompts * config.group_size
    for _ in range(config.max_rounds):
        missing = (wanted - len(kept)) // config.group_size
        episodes, verdicts = sample(missing)
        cursor += missing
        pairs = list(zip(episodes, verdicts.result(), strict=True))
        varied = rlfr.varied_groups(torch.tensor([verdict.reward for _, verdict in pairs]), config.group_size)
        for i, keep in enumerate(varied.tolist()):
            (kept if keep else dropped).extend(pairs[i * config.group_size : (i + 1) * config.group_size])
        if len(kept) == wanted:
            break
    episodes, verdicts = zip(*(kept + dropped)[:wanted], strict=True)
    done: Future[list[Verdict]] = Future()
    done.set_result(list(verdicts))
    return list(episodes), done, cursor


@dataclass
class Scores:
    """What the scoring pass knows of a step's episodes, (B, T) each."""

    mask: Tensor
    sampled_logp: Tensor
    old_logp: Tensor
    entropy: Tensor
    ref_logp: Tensor
    flow_score: Tensor
    flow_mask: Tensor  # tokens with a flow score: all of mask, but for the last one where the context is the next


def score(policy, reference, flow, episodes, verdicts: Future, config: Config, step: int) -> tuple[Scores, dict]:
    """Run the policy once over the episodes, without gradient: log-probs, entropies, and the flow's score of the latents.

    The flow's own loss on accepted episodes leaves its gradient on the flow, none on the policy. Latents are not kept.
    """
    shape = (len(episodes), max(len(episode.response_ids) for episode in episodes))
    out = Scores(*(torch.zeros(shape, device=rlfr.DEVICE) for _ in fields(Scores)))
    out.mask, out.flow_mask = out.mask.bool(), out.flow_mask.bool()
    taps = rlfr.tap_layers(policy.n_layers, flow.config.percentiles) if flow else []
    flow_loss = 0.0
    pairs = [(episode.prompt_ids, episode.response_ids) for episode in episodes]
    batches = rlfr.micro_batches(pairs, config.tokens_per_micro_batch)
    for rows, batch in tqdm(batches, desc="score", leave=False, delay=3):
        mask = batch.response_mask
        here = (rows, slice(mask.shape[1]))  # where the micro-batch is in (B, T)
        out.mask[here] = mask
        out.sampled_logp[here] = batch.unflatten(torch.tensor([x for i in rows for x in episodes[i].logp]).to(mask.device))
        with torch.no_grad():
            out.old_logp[here], out.entropy[here], latents = policy(batch, config.temperature, taps)
            if reference:
                out.ref_logp[here] = reference(batch, config.temperature).logp
        if not flow:
            continue
        depths = [tap / policy.n_layers for tap in taps]
        rows_of_flow = fl.pair(flow.config, latents, depths, batch.attention_mask, batch.targets)
        keys = [("flow noise", config.seed, step, i) for i in rows]
        noise, z = fl.draw(flow.config, keys, mask.sum(dim=1).tolist(), rlfr.DEVICE)
        weight = None
        if not config.freeze_flow:  # the first micro-batch waits for the verdicts, while the accelerator works
            everyone = config.flow_accept == "all"
            accepted = torch.tensor([everyone or verdict.correct for verdict in verdicts.result()], device=mask.device)
            quantile, soft = config.flow_entropy_quantile, config.flow_soft
            entropy = None if quantile is None else out.entropy[here]
            token_weight, row_weight = rlfr.online_flow_weights(mask, accepted[rows], entropy, quantile, soft)
            total = torch.where(accepted, 1.0, soft).sum().clamp(min=1e-9)
            weight = (token_weight * row_weight[:, None] / total)[mask]
        learn_at = z if config.flow_times == "random" else None
        token_score, token_loss = fl.score_and_learn(flow, rows_of_flow, noise, config.reward_times, weight, learn_at)
        out.flow_score[here] = batch.unflatten(token_score)
        out.flow_mask[here] = batch.unflatten(rows_of_flow.exists.any(dim=1).any(dim=0))
        flow_loss += 0.0 if weight is None else (weight * token_loss).sum().item()
    return out, {"flow/loss": flow_loss} if flow and not config.freeze_flow else {}


def shape_advantage(scores: Scores, reward: Tensor, config: Config) -> tuple[Tensor, dict[str, float]]:
    """Return the advantage of each token (B, T): outcome part, and the dense part that `shaping` chooses."""
    mask, metrics = scores.mask, {}
    advantage = rlfr.outcome_advantage(reward, config.group_size, config.baseline)[:, None] * mask
    if config.shaping == "flow":
        scope = config.group_size if config.flow_scope == "group" else 1
        unit = rlfr.normalise(scores.flow_score, scores.flow_mask, config.flow_bilateral, config.flow_power, scope)
        kept = rlfr.select(unit, config.flow_threshold, config.flow_top_k, config.flow_bilateral)
        flow_reward = -config.flow_coef * kept
        advantage = advantage + rlfr.token_returns(flow_reward, mask, config.gamma)
        metrics["flow/score"] = (scores.flow_score.sum() / scores.flow_mask.sum().clamp(min=1)).item()
        metrics["flow/reward"] = flow_reward.sum(dim=1).mean().item()
        metrics["flow/tokens"] = (kept != 0).sum(dim=1).float().mean().item()
    if config.shaping == "entropy":
        shaped = rlfr.entropy_advantage(advantage, scores.entropy, config.entropy_alpha, config.entropy_kappa) * mask
        metrics["entropy_advantage"] = (shaped - advantage)[mask].mean().item()
        advantage = shaped
    if config.baseline == "reinforce++":
        advantage = rlfr.whiten(advantage, mask)
    return advantage, metrics


def update_policy(policy, optimizer, episodes, scores: Scores, advantage, weight, config: Config, step: int, lr: float) -> dict[str, float]:  # fmt: skip
    """Take the optimiser steps of one RL step, mini-batch by mini-batch; return the figures, averaged over them."""
    order = torch.tensor(rlfr.permutation(len(episodes), "mini-batches", config.seed, step))
    metrics = dict.fromkeys(("policy/loss", "policy/kl", "policy/clipped", "policy/grad_norm"), 0.0)
    share = config.train_batch / len(episodes)
    for mini in tqdm(order.split(config.train_batch), desc="update", leave=False, delay=3):
        n_tokens = int(scores.mask[mini].sum())
        pairs = [(episodes[i].prompt_ids, episodes[i].response_ids) for i in mini]
        for rows, batch in rlfr.micro_batches(pairs, config.tokens_per_micro_batch):
            mask = batch.response_mask
            here = (mini[rows], slice(mask.shape[1]))
            logp = policy(batch, config.temperature).logp
            clips = (config.clip_low, config.clip_high, config.ratio_cap)
            loss, clipped = rlfr.policy_loss(logp, scores.old_logp[here], advantage[here], *clips)
            loss = loss * weight[here]
            token_weight = rlfr.token_weights(mask, config.normalisation, len(mini), n_tokens, config.max_tokens)
            if config.kl_coef:
                kl = rlfr.kl_divergence(logp, scores.ref_logp[here], config.kl_kind)
                loss = loss + config.kl_coef * kl
                metrics["policy/kl"] += share * (kl * token_weight).sum().item()
            loss = (loss * token_weight).sum()
            loss.backward()
            metrics["policy/loss"] += share * loss.item()
            metrics["policy/clipped"] += share * (clipped & mask).sum().item() / n_tokens
        metrics["policy/grad_norm"] += share * rlfr.optimizer_step(optimizer, lr, config.clip_norm)
    return metrics


def main(config: Config) -> None:
    """Train a policy."""
    # ---- What there is: problems, policy, flow, engine, grader
    config, path, model_config = resolve(config)
    run = Run(config, f"rl-{Path(config.model).name}-{config.shaping}")
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    problems = rollout.load_problems(config.data, config, tokenizer, model_config.model_type)
    if not (total_steps := config.steps or config.epochs * len(problems) // config.prompts):
        few = f"{len(problems)} problems in {config.epochs} epochs"
        raise ValueError(f"{few} do not fill a step of {config.prompts}; lower --prompts")
    evaluated = replace(config, split=config.eval_split)
    held_out = config.eval_data and rollout.load_problems(config.eval_data, evaluated, tokenizer, model_config.model_type)
    grader = Grader(config.reward, deadline=config.grader_deadline, grade_truncated=config.grade_truncated)
    flow, dim = None, model_config.get_text_config().hidden_size
    if config.shaping == "flow":
        flow = fl.load_flow(config.flow, dim, contexts=config.contexts, percentiles=config.percentiles).to(rlfr.DEVICE)
    policy = rlfr.load_policy(path, config.trust_remote_code, config.gradient_checkpointing)
    reference = rlfr.load_policy(path, config.trust_remote_code).requires_grad_(False) if config.kl_coef else None
    engine = rollout.TorchEngine(path, tokenizer, rlfr.DEVICE, config.trust_remote_code, config.max_sequences)
    optimizer = torch.optim.AdamW(policy.parameters(), config.lr, (0.9, 0.95), weight_decay=config.weight_decay)
    learners = {"policy": policy, "policy_optimizer": optimizer}
    if flow and not config.freeze_flow:
        flow_optimizer = torch.optim.AdamW(flow.parameters(), config.flow_lr, weight_decay=0.01)
        learners |= {"flow": flow, "flow_optimizer": flow_optimizer}
    start, cursor = 0, 0
    if state := run.begin():
        start, cursor = state["step"], state["cursor"]
        for name, learner in learners.items():
            learner.load_state_dict(state.pop(name))
    print(config)
    sizes = f"{len(problems)} problems, {total_steps} steps of {config.prompts} * {config.group_size} episodes"
    print(f"{sizes}, on {rlfr.DEVICE}, run folder {run.folder}")

    def sync() -> None:
        engine.wake()
        engine.load_weights(policy.model.state_dict().items())

    def assess() -> dict[str, dict]:
        """Evaluate the engine's weights on the held-out problems."""
        samplings = [("sampled", config.eval_samples, config.temperature), ("greedy", 1, 0.0)]
        samplings = {kind: rollout.Sampling(n, temperature, config.max_tokens) for kind, n, temperature in samplings}
        return {kind: evaluate(engine, held_out, grader, sampling)[0] for kind, sampling in samplings.items()}

    summary_file = run.folder / "summary.json"
    summary = json.loads(summary_file.read_text()) if start and summary_file.exists() else {}
    if held_out and "before" not in summary:
        summary["before"] = assess()
        run.write_json("summary.json", summary)

    for step in tqdm(range(start, total_steps), initial=start, total=total_steps, desc="rl", unit="step"):
        laps, grader.timeouts = [time.perf_counter()], 0
        # ---- 1. Roll out, and 2. verify in worker processes, while the scores are computed
        sync()
        laps.append(time.perf_counter())
        episodes, verdicts, cursor = roll_out(engine, grader, problems, config, cursor)
        engine.sleep()
        laps.append(time.perf_counter())

        # ---- 3. Score
        scores, flow_metrics = score(policy, reference, flow, episodes, verdicts, config, step)
        laps.append(time.perf_counter())
        reward = torch.tensor([verdict.reward for verdict in verdicts.result()], device=rlfr.DEVICE)
        correct = sum(verdict.correct for verdict in verdicts.result()) / len(episodes)
        laps.append(time.perf_counter())

        # ---- 4. Shape and advantage
        advantage, shaping_metrics = shape_advantage(scores, reward, config)
        correction = (config.mismatch, config.mismatch_cap)
        weight, mismatch = rlfr.importance_weights(scores.old_logp, scores.sampled_logp, scores.mask, *correction)

        # ---- 5. Update the policy
        lr = rlfr.learning_rate(config.lr, step, total_steps, config.warmup, config.lr_floor)
        policy_metrics = update_policy(policy, optimizer, episodes, scores, advantage, weight, config, step, lr)

        # ---- 6. Update the flow
        if "flow" in learners:
            flow_metrics["flow/grad_norm"] = rlfr.optimizer_step(flow_optimizer, config.flow_lr, config.clip_norm)
        laps.append(time.perf_counter())

        # ---- 7. Log, evaluate, save
        mask, n_truncated = scores.mask, sum(episode.finish_reason == "length" for episode in episodes)
        metrics = {"reward": reward.mean().item(), "correct": correct, "lr": lr, "cursor": cursor}
        metrics["varied_groups"] = rlfr.varied_groups(reward, config.group_size).float().mean().item()
        metrics |= {"length": mask.sum(dim=1).float().mean().item(), "truncated": n_truncated / len(episodes)}
        metrics |= {"entropy": scores.entropy[mask].mean().item(), "advantage_abs": advantage[mask].abs().mean().item()}
        metrics |= {"grader_timeouts": grader.timeouts} | policy_metrics | shaping_metrics | flow_metrics | mismatch
        if held_out and config.eval_every and (step + 1) % config.eval_every == 0:
            sync()
            metrics |= {f"eval/{kind}": figures["mean"] for kind, figures in assess().items()}
        phases = ("time/sync", "time/roll_out", "time/score", "time/verify", "time/update")
        metrics |= dict(zip(phases, (after - before for before, after in pairwise(laps)), strict=True))
        metrics["time/step"] = time.perf_counter() - laps[0]
        run.log(step + 1, metrics)
        tqdm.write(
            f"step {step + 1:4d}  reward {metrics['reward']:.3f}  length {metrics['length']:6.1f}  "
            f"entropy {metrics['entropy']:.3f}  flow {metrics.get('flow/score', 0):.3f}  loss {metrics['policy/loss']:+.4f}  "
            f"grad {metrics['policy/grad_norm']:.3f}  {metrics['time/step']:.1f} s"
        )
        if (step + 1) % config.save_every == 0 or step + 1 == total_steps:
            run.save(step + 1, {"cursor": cursor} | {name: learner.state_dict() for name, learner in learners.items()})

    # ---- What came of it
    with written_whole(run.folder / "policy") as folder:
        policy.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    if flow:
        fl.save_flow(flow, run.folder / "flow")
    if held_out:
        sync()
        summary["after"] = assess()
        run.write_json("summary.json", summary)
        whens = [(when, kind) for when in ("before", "after") for kind in ("sampled", "greedy")]
        print(table({f"{when} {kind}": summary[when][kind] for when, kind in whens}))
    grader.close()
    print(f"the policy is in {run.folder / 'policy'}, the figures in {run.folder}")


if __name__ == "__main__":
    main(parse_config(Config, {"toy": toy.TRAIN_RL}))
