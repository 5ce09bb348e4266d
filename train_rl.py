"""Reinforcement learning with verifiable rewards and a dense reward, on one node (paper: RLFR).

    python train_rl.py                                              the embedded world, from nothing
    python train_rl.py --shaping none | entropy | flow | FILE.py    methods differ in this flag
    torchrun --nproc-per-node 8 train_rl.py --model Qwen2.5-7B --data problems.jsonl

Problems have the columns `problem` (vision-language models: `prompt`) and `answer`. A step is the
loop at the end of main(): roll out, verify, score, shape and advantage, update the policy, update
the dense reward, log.

Every rank knows all episodes, rewards and scores of a step, so that a step is the same on any
number of ranks. What is shared out is the work: sampling, grading, and the forward and backward
passes of micro-batches.
"""

# first: torch reads what this sets when it is imported
import infra.waiting  # noqa: F401

# isort: split
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

import dense
import flow as fl
import rlfr
import rollout
from engines import awake, check_engine, check_probes, make_engine, sample_probes
from evals import HeldOut, load_sets
from infra import batching, fingerprints, lora, memory, parallel
from infra.batching import group_order
from infra.data import ProblemSettings, load_problems, template_pattern
from infra.defaults import fill_in
from infra.exports import export_adapter, export_policy
from infra.models import LoadingSettings, Model, find_model, short_name
from infra.parallel import is_first, on_first, start
from infra.ranges import (
    BatchSize,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    Seed,
    check_values,
)
from infra.runs import Run, Stopwatch, asked_to_stop, check_folder, launch
from infra.settings import ComputeSettings, RunSettings, with_defaults
from pages import DensePart, Recording, make_records, write_pages, write_report
from policy import Freeze, Policy, load_policy
from rewards import Grader, RewardSettings
from worlds import PRESETS, find_world, make_flow

# Problems of the published runs: columns problem and answer; prompt, answer and images
PUBLISHED_DATA = {
    "text": "JingHaoZ/RLFR-Dataset-LM/math-lvl3to5-8k",
    "images": "JingHaoZ/RLFR-Dataset-VLM/mmeureka_prompt.jsonl",
}


# ---- Settings; None: from the model, or as the comment says
@dataclass(frozen=True)
class AdvantageSettings:
    """How the outcome becomes an advantage."""

    baseline: rlfr.Baseline = "grpo"  # How the outcome reward becomes an advantage


@dataclass(frozen=True)
class OptimisationSettings:
    """The policy's loss and optimiser."""

    train_batch: BatchSize = 128  # Episodes an optimiser step; divides prompts * group_size
    epochs: PositiveInt = 5  # Passes over the problems, unless `steps` is given
    warmup: Fraction = 0.03  # Fraction of the steps over which the rate rises
    weight_decay: NonNegativeFloat = 0.0  # AdamW weight decay of the policy
    clip_norm: PositiveFloat = 1.0  # Largest gradient norm
    # sequence: mean over episodes of token means; token: over all tokens; constant: Dr. GRPO
    normalisation: rlfr.Normalisation = "sequence"
    # ppo clips each token's ratio, gspo the response's; cispo clips weights and leaves no token out
    loss: rlfr.Loss = "ppo"
    # How far below and above 1 a ratio is not clipped: DAPO 0.2 0.28, GSPO 3e-4 4e-4; 1 below, as
    # in CISPO, is no clip
    clip: tuple[Fraction, NonNegativeFloat] = (0.2, 0.2)
    kl_coef: NonNegativeFloat = 0.0  # Scale of the KL to the initial policy
    kl_in: Literal["loss", "reward"] = "loss"  # Add it to the loss, or take it from tokens' rewards
    kl_kind: rlfr.KLKind = "k3"  # KL estimator; k1 has no gradient on average
    entropy_coef: NonNegativeFloat = 0.0  # Scale of the entropy bonus in the loss
    # Weight by the trainer-sampler ratio of the token or sequence, cut at the cap; mask: 0 above it
    mismatch: rlfr.Mismatch = "token"
    mismatch_cap: PositiveFloat = 2.0  # Where importance weights are truncated or masked
    # What does not learn; by default vision, the tower of a VL model
    freeze: Freeze | None = None
    # Rank of the adapters that learn in place of the decoder's weights (LoRA); 0: all weights learn
    lora_rank: Annotated[int, Range(0, 65_536)] = 0


@dataclass(frozen=True)
class EvaluationSettings:
    """How the policy is evaluated on the sets of --eval-data."""

    eval_every: NonNegativeInt = 0  # Steps between evaluations; 0: only before and after
    eval_samples: BatchSize = 4  # Responses a held-out problem in sampled evaluation


@dataclass(frozen=True)
class RecordSettings:
    """Which rollouts are written to rollouts/step-N.jsonl, for inspector.py; see infra/record.py."""

    # Steps between those whose rollouts are written, besides those of a fall; 0: none
    log_rollouts: NonNegativeInt = 10


@dataclass(frozen=True)
class TrainingComputeSettings(ComputeSettings):
    """How the work is cut to fit the memory, and what is compiled."""

    # Decoder layers, from the first on, whose activations the backward computes again; 0: none; by
    # default as few as the memory allows
    recompute_layers: NonNegativeInt | None = None
    # Keep weights and optimisers in host memory, while the engine samples or always
    offload: Literal["never", "sampling", "always"] = "never"


@dataclass(frozen=True)
class Config:
    """Train a policy with GRPO and the flow reward."""

    script: ClassVar[str] = "train_rl"  # whose part of a file counts, see infra/config_files.py

    model: str = "toy"  # A path, a hub id, a short name such as Qwen2.5-7B, or toy
    # Problems: JSONL or Parquet file, save_to_disk folder, hub id, or ORG/NAME/PATH inside one;
    # :SPLIT after it names the split, by default train
    data: str | None = None
    # Sets for evaluation before and after, as --data of eval.py
    eval_data: tuple[str, ...] | None = None
    # Parts NAME or NAME=WEIGHT, see rewards.py; by default binary, for VL models vlm tags=0.5
    reward: tuple[str, ...] | None = None
    # Dense part of the advantage: flow, entropy, none (plain RLVR), or a file, see dense.py
    shaping: str = "flow"
    # Flow of the offline start: folder or file, new for an untrained one; by default the newest
    flow: str | None = None
    steps: PositiveInt | None = None  # RL steps; by default as `epochs` says
    lr: PositiveFloat = 1e-6  # Peak learning rate of the policy
    folder: str | None = None  # Run folder; by default one in runs/, named after the model
    resume: str | None = None  # Run folder to go on with
    seed: Seed = 0  # Seed of initialisation, order, sampling and noise
    sampling: rollout.SamplingSettings = rollout.SamplingSettings()
    problems: ProblemSettings = ProblemSettings()
    grading: RewardSettings = RewardSettings()
    advantage: AdvantageSettings = AdvantageSettings()
    dense_reward: dense.DenseSettings = dense.DenseSettings()
    flow_reward: dense.FlowRewardSettings = dense.FlowRewardSettings()
    flow_update: dense.FlowUpdateSettings = dense.FlowUpdateSettings()
    optimisation: OptimisationSettings = OptimisationSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    record: RecordSettings = RecordSettings()
    engine: rollout.EngineSettings = rollout.EngineSettings()
    compute: TrainingComputeSettings = TrainingComputeSettings()
    loading: LoadingSettings = LoadingSettings(max_pixels=501_760)
    run: RunSettings = RunSettings()


def check(config: Config) -> None:
    """Raise ValueError for settings that cannot work."""
    check_values(config)
    template_pattern(config.problems.template)
    n_ranks = dist.get_world_size()
    check_engine(config.engine, n_ranks)
    prompts = config.sampling.prompts
    group_size = config.sampling.group_size
    train_batch = config.optimisation.train_batch
    baseline = config.advantage.baseline
    if group_size == 1 and baseline != "reinforce":
        raise ValueError(
            f"group_size=1 with baseline {baseline!r}: use 2 or more, or --baseline reinforce"
        )
    if prompts * group_size % train_batch:
        raise ValueError(
            f"prompts * group_size = {prompts} * {group_size} = {prompts * group_size} is not a "
            f"multiple of train_batch={train_batch}; choose a divisor of it"
        )
    if train_batch % n_ranks:
        raise ValueError(
            f"train_batch={train_batch} is not a multiple of the {n_ranks} ranks; choose one"
        )
    if config.optimisation.lora_rank:
        lora.check_installed()
    dense.check(config.shaping, config.dense_reward, config.flow_reward)


def resolve(config: Config) -> tuple[Config, Model]:
    """Check the settings and fill in what follows from the model; return them and the model."""
    check(config)
    on_first(lambda: check_folder(config))
    name = config.model
    flow_folder = f"runs/flow-{short_name(config.model)}"
    needs_flow = dense.uses_flow(config.shaping, config.dense_reward)
    world = on_first(lambda: find_world(config.model))
    if world:
        name = world.path("model")
        data = world.path("train.jsonl")
        config = with_defaults(config, data=data, eval_data=(world.path("test.jsonl"),))
        if needs_flow and config.flow is None:
            on_first(lambda: make_flow(config.model, flow_folder))
    if needs_flow and config.flow is None:
        config = with_defaults(config, flow=on_first(lambda: fl.newest_flow(flow_folder)))
    model = find_model(name, config.loading)
    if config.data is None:
        data = PUBLISHED_DATA["text" if model.processor is None else "images"]
        config = with_defaults(config, data=data)
        if is_first():
            print(f"no --data given: taking the published problems, {data}")
    config = fill_in(config, model)
    if config.compute.recompute_layers is None:
        _, room = parallel.memory_of_device()
        room = min(parallel.gather_objects(room))
        n_layers = memory.layers_to_recompute(config, model, dist.get_world_size(), room)
        config = with_defaults(config, recompute_layers=n_layers)
        if is_first():
            print(f"activations of {n_layers} layers are computed again (recompute_layers)")
    rank = config.optimisation.lora_rank
    if rank and model.processor is not None and config.optimisation.freeze == "none":
        raise ValueError(
            f"freeze='none' with lora_rank={rank}: the tower has no adapters and does not learn; "
            "leave --freeze out, or --lora-rank"
        )
    check_lengths(config, model)
    return config, model


def check_lengths(config: Config, model: Model) -> None:
    """Raise ValueError if an episode may be longer than what the model has positions for."""
    prompt = config.problems.max_prompt_tokens
    response = config.sampling.max_tokens
    positions = model.text_config.max_position_embeddings
    if prompt + response > positions:
        raise ValueError(
            f"max_prompt_tokens + max_tokens = {prompt} + {response} is more than "
            f"the model's {positions} positions; lower one of them"
        )


# ---- Policy, reference
def make_policy(config: Config, model: Model, load: Callable = load_policy) -> Policy:
    """Load the policy, compiled and sharded, with adapters if it has them."""
    settings = config.optimisation
    policy = load(
        model.path,
        config.loading.trust_remote_code,
        config.compute.recompute_layers,
        settings.freeze,
    )
    if settings.lora_rank:
        lora.add_adapters(policy.model, policy.layers, settings.lora_rank, config.seed)
    policy.compile_parts(config.compute.compile)
    dtype = parallel.compute_dtype(config.loading.dtype)
    parallel.shard(
        policy, policy.blocks, dtype, config.compute.always_offloads, methods=["tower_features"]
    )
    return policy


def make_reference(
    policy: Policy, config: Config, model: Model, load: Callable = load_policy
) -> Policy | lora.WithoutAdapters:
    """Return the initial policy, for a KL: without the adapters the policy itself, or a copy."""
    if config.optimisation.lora_rank:
        return lora.WithoutAdapters(policy)
    reference = load(
        model.path,
        config.loading.trust_remote_code,
        freeze=config.optimisation.freeze,  # a frozen tower is the policy's: features serve both
    )
    reference.requires_grad_(False)
    dtype = parallel.compute_dtype(config.loading.dtype)
    parallel.shard(reference, reference.blocks, dtype, config.compute.always_offloads)
    return reference


class Models(NamedTuple):
    """What a step scores with, and what learns in it."""

    policy: Policy
    reference: Policy | lora.WithoutAdapters | None  # the initial policy, for a KL
    dense: dense.DenseReward | None
    learners: dict[str, parallel.Learner]  # of the policy, and of the dense reward if it learns


def make_models(
    config: Config, model: Model, is_flow_named: bool, load: Callable = load_policy
) -> Models:
    """Load the policy, the policy before it learnt where it is needed, and the dense reward."""
    host = dense.Host(model, config, partial(make_policy, config, model, load), is_flow_named)
    dense_reward = None
    if config.shaping not in ("none", "entropy"):
        own = dense.as_values(config.dense_reward.dense)
        dense_reward = dense.make(config.shaping, own, host)
        dtype = parallel.compute_dtype(config.loading.dtype)
        dense.prepare(dense_reward, host.policy.n_layers, dtype, config.compute.always_offloads)
    if config.flow and not isinstance(dense_reward, dense.FlowReward) and is_first():
        print(
            f"--flow {config.flow} has no part in --shaping {config.shaping}, which reads no flow"
        )
    reference = None
    if config.optimisation.kl_coef or (dense_reward and dense_reward.reads_first):
        reference = make_reference(host.policy, config, model, load)
    return Models(host.policy, reference, dense_reward, learners={})


def with_learners(models: Models, weight_decay: float) -> Models:
    """Give all that learns an optimiser."""
    learners = {"policy": parallel.Learner(models.policy, (0.9, 0.95), weight_decay)}
    dense_reward = models.dense
    if dense_reward and dense_reward.learns:
        learners[dense_reward.name] = parallel.Learner(
            dense_reward.module, dense_reward.betas, dense_reward.weight_decay
        )
    return models._replace(learners=learners)


def tensors_of(models: Models) -> list[Tensor]:
    """Return the tensors that may leave the GPU while the engine samples."""
    tensors = [tensor for learner in models.learners.values() for tensor in learner.tensors()]
    if models.reference:
        tensors += models.reference.parameters()
    return tensors


def ways_to_sample(config: Config) -> dict[str, rollout.Sampling]:
    """Return how held-out problems are sampled, by name."""
    n = config.evaluation.eval_samples
    max_tokens = config.sampling.max_tokens
    return {
        "sampled": rollout.Sampling(n, config.sampling.temperature, max_tokens),
        "greedy": rollout.Sampling(1, 0.0, max_tokens),
    }


# ---- 3. Score
@dataclass
class Experience:
    """A step's episodes, and what is known of them after the scoring pass; the same on every rank.

    (B, T) each, but for what says otherwise.
    """

    episodes: list[rollout.Episode]  # B of them, G in a row for each problem
    reward: Tensor  # (B,) of the outcome
    correct: Tensor  # (B,) bool
    mask: Tensor  # bool, response tokens that the policy sampled
    sampled_logp: Tensor  # log-probs by the engine
    old_logp: Tensor  # log-probs by the policy, before the update
    entropy: Tensor
    ref_logp: Tensor  # 0 without a reference
    dense_score: Tensor  # (L, B, T) what the dense reward says of each token, by tap
    scored: Tensor  # bool, tokens of which it says anything

    @classmethod
    def before_scoring(cls, episodes: list[rollout.Episode], n_levels: int) -> "Experience":
        """Return what is known before the scoring pass, and zeros elsewhere."""
        device = parallel.DEVICE
        lengths = torch.tensor([len(episode.response_ids) for episode in episodes], device=device)
        is_token = torch.arange(int(lengths.max()), device=device) < lengths[:, None]
        mask = batching.only_sampled(is_token, episodes)
        sampled_logp = torch.zeros(mask.shape, device=device)
        all_logp = np.concatenate([episode.logp for episode in episodes])
        sampled_logp[is_token] = torch.from_numpy(all_logp).to(device, torch.float32)
        sampled_logp.masked_fill_(~mask, 0.0)
        reward = [episode.verdict.reward for episode in episodes]
        correct = [episode.verdict.correct for episode in episodes]
        return cls(
            episodes,
            torch.tensor(reward, device=device),
            torch.tensor(correct, device=device),
            mask,
            sampled_logp,
            old_logp=torch.zeros(mask.shape, device=device),
            entropy=torch.zeros(mask.shape, device=device),
            ref_logp=torch.zeros(mask.shape, device=device),
            dense_score=torch.zeros(n_levels, *mask.shape, device=device),
            scored=torch.zeros_like(mask),
        )

    def sum_over_ranks(self) -> None:
        """Add up what each rank has scored; it left zeros for the others' episodes."""
        for tensor in (self.old_logp, self.entropy, self.ref_logp, self.dense_score):
            parallel.sum_over_ranks(tensor)
        self.scored = parallel.sum_over_ranks(self.scored.float()).bool()

    @property
    def score(self) -> Tensor:
        """The mean of the dense score over taps, (B, T)."""
        return self.dense_score.mean(dim=0)


def score(
    models: Models,
    episodes: Sequence[rollout.Episode],
    step: int,
    temperature: float,
    token_budget: int,
) -> Experience:
    """Run the policy once over graded episodes, without gradient: log-probs, entropies, scores.

    A dense reward that learns gets its gradient here. Latents are not kept.
    """
    policy, reference, dense_reward, _ = models
    layers = dense_reward.layers if dense_reward else ()
    if dense_reward:
        dense_reward.begin(step, episodes)
    episodes = batching.encode_images(policy.image_encoder, episodes, token_budget)
    experience = Experience.before_scoring(episodes, max(1, len(layers)))
    for indices, batch in my_micro_batches(episodes, token_budget, "score"):
        places = parallel.send(torch.tensor(indices))
        cells = (places, slice(batch.response_mask.shape[1]))  # of the micro-batch in (B, T)
        with torch.no_grad():
            output = policy(batch, temperature, layers)
            experience.old_logp[cells] = output.logp
            experience.entropy[cells] = output.entropy
            first = reference(batch, temperature, layers) if reference else None
            if first:
                experience.ref_logp[cells] = first.logp
        if dense_reward:
            chosen = [episodes[index] for index in indices]
            part = dense.MicroBatch(batch, chosen, indices, output, dense_reward.taps, first)
            values, mask = dense.checked_scores(dense_reward, part)
            experience.dense_score[:, *cells] = values
            experience.scored[cells] = mask
    if dense_reward:
        dense_reward.end()
    experience.sum_over_ranks()
    return experience


def my_micro_batches(episodes: Sequence, token_budget: int, phase: str):
    """Yield indices and batch of this rank's share of episodes, behind a progress bar."""
    batches = batching.micro_batches(episodes, token_budget, dist.get_rank(), dist.get_world_size())
    return tqdm(batches, desc=phase, leave=False, delay=3, disable=not is_first())


# ---- 4. Shape and advantage
def shape_advantage(
    experience: Experience, dense_reward: dense.DenseReward | None, config: Config, step: int
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Return each token's advantage and dense reward, (B, T) each, and figures of them.

    The advantage is the outcome, and the dense part that `shaping` adds.
    """
    mask = experience.mask
    group_size = config.sampling.group_size
    baseline = config.advantage.baseline
    outcome = rlfr.outcome_advantage(experience.reward, group_size, baseline)
    advantage = outcome[:, None] * mask
    token_rewards = torch.zeros_like(advantage)
    metrics = {}
    if dense_reward:
        settings = config.dense_reward
        score = experience.score
        scored = experience.scored
        if dense.counts(settings, step):
            if step == 0 and (error := dense.find_sameness(dense_reward, score, scored)):
                raise ValueError(error)
            token_rewards = dense.token_rewards(dense_reward, score, scored, settings, group_size)
        advantage += dense.credit(token_rewards, scored, mask, settings, group_size, baseline)
        metrics = dense.metrics(
            dense_reward.name, score, scored, token_rewards, experience.correct, settings
        )
    optimisation = config.optimisation
    if optimisation.kl_coef and optimisation.kl_in == "reward":
        kl = rlfr.kl_divergence(experience.old_logp, experience.ref_logp, optimisation.kl_kind)
        kl_reward = -optimisation.kl_coef * kl
        advantage += rlfr.token_returns(kl_reward, mask, config.dense_reward.gamma)
        metrics["kl_reward"] = kl_reward[mask].mean().item()
    if config.shaping == "entropy":
        shaped = rlfr.entropy_advantage(advantage, experience.entropy) * mask
        metrics["entropy_advantage"] = (shaped - advantage)[mask].mean().item()
        advantage = shaped
    if baseline == "reinforce++":
        advantage = rlfr.whiten(advantage, mask)
    metrics["advantage_abs"] = advantage[mask].abs().mean().item()
    return advantage, token_rewards, metrics


def try_dense(models: Models, episodes: Sequence[rollout.Episode], config: Config) -> None:
    """Do 3 and 4 for a dense reward on stand-ins, so that its errors come before anything slow.

    The run that follows is as without them.
    """
    reward = models.dense
    settings = config.dense_reward
    sampling = config.sampling
    if is_first():
        print(f"trying {config.shaping} on {len(episodes)} stand-ins for responses")
    with dense.without_trace(reward):
        seen = score(models, episodes, 0, sampling.temperature, config.compute.tokens_per_gpu)
        dense.own_figures(reward)
        if not dense.counts(settings, 0):
            return
        dense.token_rewards(reward, seen.score, seen.scored, settings, sampling.group_size)
        error = dense.find_sameness(reward, seen.score, seen.scored)
        if error and is_first():  # it may reward what only a policy writes
            print(f"{error}: if responses have it, too, the run ends at its first step")


# ---- 5. Update the policy
def other_terms(settings: OptimisationSettings) -> dict[str, float]:
    """Return the coefficients of the loss's terms that are no multiple of the advantage."""
    coefficients = {"token_entropy": -settings.entropy_coef}
    if settings.kl_in == "loss":
        coefficients["kl"] = settings.kl_coef
    return {name: coefficient for name, coefficient in coefficients.items() if coefficient}


def update_policy(
    models: Models, experience: Experience, advantage: Tensor, config: Config, step: int, lr: float
) -> dict[str, float]:
    """Take the optimiser steps of one RL step, a mini-batch each; return their mean figures.

    The advantage is (B, T). The ratio in the loss is to the scoring pass, hence 1 in the first
    mini-batch. Episodes whose advantage is 0 are not run, but count in the loss's denominator; a
    term of the loss that is no multiple of the advantage runs all.
    """
    settings = config.optimisation
    group_size = config.sampling.group_size
    temperature = config.sampling.temperature
    n_episodes = settings.train_batch
    # whole groups, as a forward computes their prompt once
    order = group_order(len(advantage), group_size, "mini-batches", config.seed, step)
    share = n_episodes / len(advantage)  # of a mini-batch in the step
    coefficients = other_terms(settings)
    names = ("loss", "clipped", "kl", *coefficients)
    sums = {name: torch.zeros((), device=parallel.DEVICE) for name in names}
    grad_norm = 0.0
    for mini_batch in torch.tensor(order).split(n_episodes):
        # over all micro-batches and ranks: one denominator for each optimiser step
        n_tokens = int(experience.mask[mini_batch].sum())
        if not coefficients:
            has_gradient = advantage[mini_batch] != 0
            runs = batching.rows_to_run(has_gradient, dist.get_world_size())
            mini_batch = mini_batch[runs]
        chosen = [experience.episodes[i] for i in mini_batch]
        for indices, batch in my_micro_batches(chosen, config.compute.tokens_per_gpu, "update"):
            mask = batch.response_mask
            places = parallel.send(mini_batch[indices])
            cells = (places, slice(mask.shape[1]))  # of the micro-batch in (B, T)
            old_logp = experience.old_logp[cells]
            output = models.policy(batch, temperature)
            loss, is_clipped = rlfr.policy_loss(
                output.logp,
                old_logp,
                advantage[cells],
                mask,
                loss=settings.loss,
                clip=settings.clip,
            )
            sampled_logp = experience.sampled_logp[cells]
            loss = loss * rlfr.importance_weights(
                old_logp, sampled_logp, mask, settings.mismatch, settings.mismatch_cap
            )
            token_weight = rlfr.token_weights(
                mask, settings.normalisation, n_episodes, n_tokens, config.sampling.max_tokens
            )
            for name, coefficient in coefficients.items():
                term = output.entropy
                if name == "kl":
                    ref_logp = experience.ref_logp[cells]
                    term = rlfr.kl_divergence(output.logp, ref_logp, settings.kl_kind)
                loss = loss + coefficient * term
                sums[name] += share * (term * token_weight).sum().detach()
            loss = (loss * token_weight).sum()
            loss.backward()
            sums["loss"] += share * loss.detach()
            sums["clipped"] += share * (is_clipped & mask).sum() / n_tokens
        # clips, steps, clears
        grad_norm += share * models.learners["policy"].step(lr, settings.clip_norm)
    metrics = {"policy/grad_norm": grad_norm}
    for name, value in sums.items():
        metrics[f"policy/{name}"] = parallel.sum_over_ranks(value).item()
    return metrics


# ---- 6. Update the dense reward
def update_dense(models: Models, clip_norm: float) -> dict[str, float]:
    """Take the optimiser step of a dense reward that learns, with the gradient of 3; return figures."""
    if not models.dense:
        return {}
    name = models.dense.name
    metrics = dense.own_figures(models.dense)
    if name in models.learners:
        metrics |= models.dense.update(models.learners[name], clip_norm)
    return metrics


# ---- 7. Log
def step_metrics(experience: Experience, config: Config) -> dict[str, float]:
    """Return the figures of a step's episodes: outcomes, lengths, parts of the reward, mismatch."""
    episodes = experience.episodes
    mask = experience.mask
    n_truncated = sum(episode.finish_reason == "length" for episode in episodes)
    varied = rlfr.varied_groups(experience.reward, config.sampling.group_size)
    metrics = {
        "reward": experience.reward.mean().item(),
        "correct": experience.correct.float().mean().item(),
        "varied_groups": varied.float().mean().item(),
        "length": mask.sum(dim=1).float().mean().item(),
        "truncated": n_truncated / len(episodes),
        "entropy": experience.entropy[mask].mean().item(),
    }
    for part in episodes[0].verdict.parts:
        values = [episode.verdict.parts[part] for episode in episodes]
        metrics[f"reward/{part}"] = sum(values) / len(values)
    mismatch = rlfr.mismatch_figures(
        experience.old_logp,
        experience.sampled_logp,
        mask=mask,
        cap=config.optimisation.mismatch_cap,
    )
    return metrics | mismatch


def describe_rollouts(
    models: Models,
    experience: Experience,
    shaped: dict[str, Tensor],
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    n_groups: int,
) -> list[dict]:
    """Return the record of a step's first groups, out of the tensors of the step.

    shaped: (B, T) each, what phase 4 made of the experience, by the name in the record
    """
    per_token = {
        "logp": experience.old_logp,
        "entropy": experience.entropy,
        **shaped,
        "ratio": (experience.old_logp - experience.sampled_logp).exp(),
    }
    for name, values in per_token.items():  # of a token that was not sampled there are no numbers
        per_token[name] = values.masked_fill(~experience.mask, torch.nan)
    scores = experience.dense_score.masked_fill(~experience.scored, torch.nan)
    dense_part = None
    if models.dense:
        dense_part = DensePart(models.dense.name, models.dense.layers, scores)
    group_size = config.sampling.group_size
    outcome = rlfr.outcome_advantage(experience.reward, group_size, config.advantage.baseline)
    chosen = experience.episodes[: n_groups * group_size]
    return make_records(chosen, group_size, per_token, dense_part, outcome, tokenizer=tokenizer)


def step_line(step: int, metrics: dict[str, float], dense_reward) -> str:
    """Return one line of figures of a step, for the screen."""
    dense_part = ""
    if dense_reward:
        name = dense_reward.name
        dense_part = f"{name} {metrics[f'{name}/score']:.3f}  "
    return (
        f"step {step:4d}  reward {metrics['reward']:.3f}  length {metrics['length']:6.1f}  "
        f"entropy {metrics['entropy']:.3f}  {dense_part}"
        f"loss {metrics['policy/loss']:+.4f}  grad {metrics['policy/grad_norm']:.3f}  "
        f"{metrics['time/step']:.1f} s"
    )


def main(config: Config, update: Callable[..., dict[str, float]] = update_policy) -> None:
    """Train a policy; another phase 5 may be given in the place of update_policy."""
    # ---- Problems and grader
    start()
    is_flow_named = config.flow is not None
    config, model = resolve(config)
    run = Run(config, f"rl-{short_name(config.model)}-{Path(config.shaping).stem}")
    problems = load_problems(config.data, config.problems, model)
    sampling = config.sampling
    total_steps = config.steps or config.optimisation.epochs * len(problems) // sampling.prompts
    if not total_steps:
        raise ValueError(
            f"{len(problems)} problems in {config.optimisation.epochs} epochs do not fill "
            f"a step of {sampling.prompts}; lower --prompts"
        )
    held_out_problems = load_sets(config.eval_data or (), config.problems, model)
    run.check_data(training=fingerprints.of_problems(problems))
    grader = Grader(config.reward, config.grading, sampling.max_tokens)

    # ---- Models, and their learners
    models = make_models(config, model, is_flow_named)
    if dense.is_file(config.shaping):
        stand_ins = rollout.stand_ins(problems, sampling, model.tokenizer, grader)
        try_dense(models, stand_ins, config)
    models = with_learners(models, config.optimisation.weight_decay)
    policy = models.policy

    # ---- Begin, or go on from a checkpoint
    progress = {"step": 0, "cursor": 0, "lengths": torch.zeros(len(problems))}
    state = {"progress": progress, **dense.kept(models.dense), **models.learners}
    run.begin(state)
    if isinstance(models.dense, dense.FlowReward):  # an export of a checkpoint needs it
        run.write_json("flow.json", asdict(models.dense.module.config))

    # ---- Engine: it starts in the memory that it will have, so that its cache is of the right size
    host_copy = None
    if config.compute.offload == "sampling":
        host_copy = parallel.HostCopy(tensors_of(models))
        host_copy.offload()
    dtype = parallel.compute_dtype(config.loading.dtype)
    longest = config.problems.max_prompt_tokens + sampling.max_tokens
    all_problems = chain(problems, *held_out_problems.values())
    engine = make_engine(
        model,
        config.engine,
        rollout.Capacity(longest, rollout.most_images(all_problems)),
        device=parallel.DEVICE,
        dtype=dtype,
        can_sleep=True,
    )
    engine.sleep()
    if host_copy:
        host_copy.restore()
    weights = partial(policy.whole_weights, dtype)
    sampler = rollout.Sampler(
        engine, grader, problems, progress["lengths"], settings=sampling, seed=config.seed
    )

    def export(folder: Path) -> None:
        """Write the policy and the flow for other programs."""
        run.wait_for_save()  # its collectives shall not run beside those that gather weights
        run.check_weights(progress["step"], [each.module for each in models.learners.values()])
        processors = [model.tokenizer, model.processor]
        export_policy(policy, dtype, processors, folder / "policy")
        if config.optimisation.lora_rank:
            export_adapter(policy, model.path, folder / "adapter")
        if models.dense:
            models.dense.export(folder)

    # ---- Does the engine sample from the model that is trained?
    with awake(engine, weights, host_copy):
        probes = sample_probes(engine, config.problems.max_prompt_tokens, sampling.max_tokens)
    check_probes(policy, probes, model.path)

    # ---- Before the first step
    recording = Recording(config.record.log_rollouts, total_steps, sampling, run.folder)
    if is_first():
        print(config)
        print(
            f"{len(problems)} problems, {total_steps} steps of {sampling.prompts} * "
            f"{sampling.group_size} episodes, {dist.get_world_size()} ranks, "
            f"{parallel.DEVICE} in {dtype}, run folder {run.folder}"
        )
        if recording.every:
            print(recording.describe_size())
    held_out = HeldOut(held_out_problems, run, grader, ways_to_sample(config))
    if progress["step"]:
        held_out.read_summary()
    if held_out.new_sets():
        with awake(engine, weights, host_copy):
            held_out.add_figures_before(engine, progress["step"])
    if run.lacks_export(progress["step"]):
        run.export(progress["step"], export)

    def keep(step: int) -> None:
        """Save a checkpoint, the page of curves and an export, where they are due after a step."""
        if config.run.save_every and step % config.run.save_every == 0:
            run.save(state)
            write_report(run.folder)
        if run.is_export_due(step):
            run.export(step, export)

    # ---- The loop
    optimisation = config.optimisation
    token_budget = config.compute.tokens_per_gpu
    bar = tqdm(
        initial=progress["step"], total=total_steps, desc="rl", unit="step", disable=not is_first()
    )
    while (step := progress["step"]) < total_steps and not asked_to_stop():
        clock = Stopwatch()

        # ---- 1. Roll out
        with awake(engine, weights, host_copy):
            clock.lap("sync")
            episodes, cursor = sampler.roll_out(progress["cursor"])
            clock.note_memory()
        clock.lap("roll_out")

        # ---- 2. Verify
        sampler.verify(episodes)
        clock.lap("verify")

        # ---- 3. Score; a dense reward that learns gets its gradient
        experience = score(models, episodes, step, sampling.temperature, token_budget=token_budget)
        clock.lap("score")

        # ---- 4. Shape and advantage
        advantage, dense_reward, metrics = shape_advantage(experience, models.dense, config, step)

        # ---- 5. Update the policy
        lr = rlfr.learning_rate(config.lr, step, total_steps, warmup=optimisation.warmup)
        metrics |= update(models, experience, advantage, config=config, step=step, lr=lr)

        # ---- 6. Update the dense reward, with the gradient of 3
        metrics |= update_dense(models, optimisation.clip_norm)
        clock.lap("update")

        # ---- 7. Log, evaluate, save
        progress |= {"step": step + 1, "cursor": cursor}
        shaped = {"advantage": advantage, "dense_reward": dense_reward}
        describe = partial(describe_rollouts, models, experience, shaped, config, engine.tokenizer)
        for recorded_step, records in recording.due(step, experience.reward, describe):
            run.log_rollouts(recorded_step, records)
        clock.lap("record")
        metrics |= step_metrics(experience, config) | sampler.metrics()
        if held_out.is_due(step + 1, config.evaluation.eval_every):
            with awake(engine, weights, host_copy):
                metrics |= held_out.metrics(engine)
        clock.lap("evaluate")
        metrics |= {"lr": lr, "cursor": cursor} | clock.metrics(engine.held_memory)
        run.log(step + 1, metrics, state)
        if is_first():
            bar.update()
            tqdm.write(step_line(step + 1, metrics, models.dense))
        keep(step + 1)

    # ---- Write the results
    if run.end(state, total_steps, write_report):
        export(run.folder)
        if is_first():
            print(f"the policy is in {run.folder / 'policy'}, the figures in {run.folder}")
        try:
            if held_out.problems:
                with awake(engine, weights, host_copy):
                    held_out.add_figures_after(engine)
        finally:  # what an evaluation meets shall not cost the page of the training
            report = write_pages(run.folder)
            run.release()
        if is_first():
            if held_out.problems:
                print(held_out.table())
            print(f"open {report} to see what happened")
    grader.close()


if __name__ == "__main__":
    launch(main, Config, PRESETS["train_rl"])
