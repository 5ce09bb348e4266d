"""Reinforcement learning with verifiable rewards and the flow reward, on one node (paper: RLFR).

    python train_rl.py                                    the embedded world, from nothing
    python train_rl.py --shaping none | entropy | flow    methods to compare differ in this flag
    torchrun --nproc-per-node 8 train_rl.py --model Qwen2.5-7B --data problems.jsonl

Problems have the columns `problem` (vision-language models: `prompt`) and `answer`. A step is the
loop at the end of main(): roll out, verify, score, shape and advantage, update the policy, update
the flow, log.

Every rank knows all episodes, rewards and scores of a step, so that a step is the same on any
number of ranks. What is shared out is the work: sampling, grading, and the forward and backward
passes of micro-batches.
"""

# first: torch reads what this sets when it is imported
import infra.waiting  # noqa: F401

# isort: split
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Annotated, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import flow as fl
import lora
import parallel
import record
import rlfr
import rollout
import toy
from evals import figures, sets
from infra import children, fingerprints
from infra.files import locked, read_json
from infra.ranges import (
    BatchSize,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    OpenFraction,
    PositiveFloat,
    PositiveInt,
    Range,
    Seed,
    SignedFloat,
    Temperature,
    check_values,
)
from infra.stopping import asked_to_stop
from parallel import is_first, on_first, start
from rewards import Grader, RewardSettings, Verdict
from run import (
    DATA_FILE,
    ComputeSettings,
    Run,
    RunSettings,
    Stopwatch,
    check_folder,
    export_adapter,
    export_flow,
    export_policy,
    launch,
    with_defaults,
)

# Problems of the published runs: columns problem and answer; prompt, answer and images
PUBLISHED_DATA = {
    "text": "JingHaoZ/RLFR-Dataset-LM/math-lvl3to5-8k",
    "images": "JingHaoZ/RLFR-Dataset-VLM/mmeureka_prompt.jsonl",
}
# What torchrun tells a rank
RANK_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


# ---- Settings; None: from the model, or as the comment says
@dataclass(frozen=True)
class SamplingSettings:
    """How many episodes a step has, and how they are sampled."""

    prompts: BatchSize = 128  # N, prompts a step
    group_size: BatchSize = 8  # G, samples a prompt
    max_tokens: PositiveInt | None = None  # Longest response; by default 1024, for VL-7B 3072
    temperature: Temperature = 1.0  # Sampling temperature
    dynamic_sampling: bool = False  # Drop groups of equal reward and sample others in their place
    # Rounds of dynamic sampling a step; dropped groups fill what is then missing
    max_rounds: PositiveInt = 4


@dataclass(frozen=True)
class AdvantageSettings:
    """How the outcome becomes an advantage; the baseline that rewards entropy."""

    baseline: rlfr.Baseline = "grpo"  # How the outcome reward becomes an advantage
    entropy_alpha: NonNegativeFloat = 0.4  # Scale of the entropy advantage
    entropy_kappa: PositiveFloat = 2.0  # The entropy advantage stays below |A| / kappa


@dataclass(frozen=True)
class FlowRewardSettings:
    """How velocity deviations become rewards of tokens."""

    # Steps before the flow reward counts; until then the flow only learns
    flow_after: NonNegativeInt = 0
    flow_coef: SignedFloat = 0.01  # Scale of the flow reward
    # Where it acts: on the tokens' returns (paper), or on the response, whose mean, less the
    # group's, then joins the outcome advantage; nothing divides it by its spread
    flow_on: Literal["token", "response"] = "token"
    # T_r, times at which the deviation is taken, in (0, 1)
    reward_times: tuple[OpenFraction, ...] = (0.8,)
    flow_threshold: Fraction = 0.6  # Only normalised scores above it are kept, in [0, 1]
    # Tokens of a response that get a flow reward; None: no limit
    flow_top_k: PositiveInt | None = 15
    # What scores are compared with: those of the response (paper) or of the group, by a min-max;
    # expert: the flow's own on expert tokens, and threshold, top-k, bilateral and power do not count
    flow_scope: Literal["response", "group", "expert"] = "response"
    flow_cap: PositiveFloat = 10.0  # Largest excess over expert tokens, in their spreads
    flow_centre: bool = False  # Subtract the group's mean from the tokens' flow rewards
    flow_bilateral: bool = False  # Normalise to [-1, 1] and keep both tails
    flow_power: PositiveFloat = 1.0  # Exponent applied to normalised scores
    gamma: Fraction = 1.0  # Discount of the tokens' rewards: the flow's, and the KL's
    # Context modes that the flow must have, or gets if it is new; an official file needs them
    contexts: tuple[str, ...] | None = None
    # Score with `contexts` whatever the flow was fitted with; officially next, then previous
    other_contexts: bool = False
    # Tapped layers that the flow must have, or gets if it is new, as fractions of the depth
    percentiles: tuple[Fraction, ...] | None = None


@dataclass(frozen=True)
class FlowUpdateSettings:
    """How the flow goes on learning from the policy's own episodes."""

    freeze_flow: bool = False  # No online flow update
    flow_lr: PositiveFloat = 1e-4  # Learning rate of the online flow update
    flow_accept: Literal["correct", "all"] = "correct"  # Rejection sampling: episodes to learn from
    flow_soft: Fraction = 0.0  # Weight of episodes and tokens that are not accepted
    # Learn only from tokens at or above this quantile of entropy
    flow_entropy_quantile: Fraction | None = None
    # Times to learn at: those of the reward, or drawn, as a sigmoid of a normal or uniformly
    flow_times: Literal["reward", "random", "uniform"] = "reward"
    # rollout: a step of AdamW a rollout; official: with every mini-batch, as the policy's optimiser
    flow_optimiser: Literal["rollout", "official"] = "rollout"


@dataclass(frozen=True)
class OptimisationSettings:
    """The policy's loss and optimiser."""

    train_batch: BatchSize = 128  # Episodes an optimiser step; divides prompts * group_size
    epochs: PositiveInt = 5  # Passes over the problems, unless `steps` is given
    warmup: Fraction = 0.03  # Fraction of the steps over which the rate rises
    lr_floor: Fraction = 0.1  # Rate at the end of the cosine, as a fraction of the peak
    weight_decay: NonNegativeFloat = 0.0  # AdamW weight decay of the policy
    clip_norm: PositiveFloat = 1.0  # Largest gradient norm
    # sequence: mean over episodes of token means; token: over all tokens; constant: Dr. GRPO
    normalisation: rlfr.Normalisation = "sequence"
    clip_low: Fraction = 0.2  # PPO clip below 1
    clip_high: NonNegativeFloat = 0.2  # PPO clip above 1; 0.28 for DAPO's clip-higher
    ratio_cap: PositiveFloat = 3.0  # Largest probability ratio
    kl_coef: NonNegativeFloat = 0.0  # Scale of the KL to the initial policy
    kl_in: Literal["loss", "reward"] = "loss"  # Add it to the loss, or take it from tokens' rewards
    kl_kind: rlfr.KLKind = "k3"  # KL estimator; k1 has no gradient on average
    # Weight by the trainer-sampler ratio of the token or sequence, cut at the cap; mask: 0 above it
    mismatch: rlfr.Mismatch = "token"
    mismatch_cap: PositiveFloat = 2.0  # Where importance weights are truncated or masked
    # What does not learn; by default vision, the tower of a VL model
    freeze: rlfr.Freeze | None = None
    # Rank of the adapters that learn in place of the decoder's weights (LoRA); 0: all weights learn
    lora_rank: Annotated[int, Range(0, 65_536)] = 0
    # Adapters count alpha / rank; by default twice the rank
    lora_alpha: PositiveFloat | None = None


@dataclass(frozen=True)
class EvaluationSettings:
    """How the policy is evaluated on the sets of --eval-data."""

    eval_every: NonNegativeInt = 0  # Steps between evaluations; 0: only before and after
    eval_samples: BatchSize = 4  # Responses a held-out problem in sampled evaluation
    eval_split: str = "test"  # Split of hub data for evaluation


@dataclass(frozen=True)
class RecordSettings:
    """Which rollouts are written to rollouts/step-N.jsonl, for inspector.py; see record.py."""

    log_rollouts: NonNegativeInt = 10  # Steps between those whose rollouts are written; 0: none
    log_groups: PositiveInt = 4  # Groups of such a step that are written, each as a whole


@dataclass(frozen=True)
class TrainingComputeSettings(ComputeSettings):
    """How the work is cut to fit the memory, and what is compiled."""

    # Recompute activations; by default where keeping them takes too much memory
    gradient_checkpointing: bool | None = None
    offload: bool = False  # Keep weights and optimisers in host memory while the engine samples
    rehearse: bool = False  # Do the largest update first, to see that it fits; it changes nothing


@dataclass(frozen=True)
class Config:
    """Train a policy with GRPO and the flow reward."""

    model: str = "toy"  # A path, a hub id, a short name such as Qwen2.5-7B, or toy
    # Problems: JSONL or Parquet file, save_to_disk folder, hub id, or ORG/NAME/PATH inside one
    data: str | None = None
    # Sets for evaluation before and after, as --data of eval.py
    eval_data: tuple[str, ...] | None = None
    # Parts NAME or NAME=WEIGHT, see rewards.py; by default binary, for VL models vlm tags=0.5
    reward: tuple[str, ...] | None = None
    # Dense part of the advantage; none: plain RLVR
    shaping: Literal["flow", "entropy", "none"] = "flow"
    # Flow of the offline start: folder or file, new for an untrained one; by default the newest
    flow: str | None = None
    steps: PositiveInt | None = None  # RL steps; by default as `epochs` says
    lr: PositiveFloat = 1e-6  # Peak learning rate of the policy
    folder: str | None = None  # Run folder; by default one in runs/, named after the model
    resume: str | None = None  # Run folder to go on with
    seed: Seed = 0  # Seed of initialisation, order, sampling and noise
    sampling: SamplingSettings = SamplingSettings()
    problems: rollout.ProblemSettings = rollout.ProblemSettings()
    grading: RewardSettings = RewardSettings()
    advantage: AdvantageSettings = AdvantageSettings()
    flow_reward: FlowRewardSettings = FlowRewardSettings()
    flow_update: FlowUpdateSettings = FlowUpdateSettings()
    optimisation: OptimisationSettings = OptimisationSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    record: RecordSettings = RecordSettings()
    engine: rollout.EngineSettings = rollout.EngineSettings()
    compute: TrainingComputeSettings = TrainingComputeSettings()
    loading: rollout.LoadingSettings = rollout.LoadingSettings(max_pixels=501_760)
    run: RunSettings = RunSettings()


class FlowRecipe(NamedTuple):
    """What an optimiser of the online flow update is made with."""

    betas: tuple[float, float]
    weight_decay: float


FLOW_RECIPES = {
    "rollout": FlowRecipe((0.9, 0.999), 0.01),  # a step with every rollout, constant rate
    "official": FlowRecipe((0.9, 0.95), 0.0),  # a step with every mini-batch, the policy's schedule
}


def check(config: Config) -> None:
    """Raise ValueError for settings that cannot work."""
    check_values(config)
    rollout.template_pattern(config.problems.template)
    n_ranks = dist.get_world_size()
    rollout.check_engine(config.engine, n_ranks)
    if config.compute.offload and config.compute.cpu_offload:
        raise ValueError(
            "offload and cpu_offload exclude each other: "
            "choose whether weights are in host memory sometimes or always"
        )
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
    check_adapters(config)
    if config.flow_reward.contexts is not None:
        fl.check_contexts(config.flow_reward.contexts)
    if config.flow_reward.other_contexts:
        check_other_contexts(config.flow_reward)


def check_other_contexts(settings: FlowRewardSettings) -> None:
    """Raise ValueError where a flow cannot score with other contexts than its own."""
    if settings.contexts is None:
        raise ValueError("other_contexts without contexts: name those to score with in --contexts")
    if settings.flow_scope == "expert":
        raise ValueError(
            "other_contexts with flow_scope='expert': the flow was calibrated with its own "
            "contexts; leave --other-contexts out, or choose another --flow-scope"
        )


def check_adapters(config: Config) -> None:
    """Raise ValueError for settings of adapters that cannot work."""
    rank = config.optimisation.lora_rank
    alpha = config.optimisation.lora_alpha
    if rank > 0:
        lora.check_installed()
    elif alpha is not None and not config.resume:  # a resumed run keeps its rank: see run.py
        raise ValueError(
            f"lora_alpha={alpha} without adapters; give --lora-rank, or leave --lora-alpha out"
        )


def resolve(config: Config) -> tuple[Config, rollout.Model]:
    """Check the settings and fill in what follows from the model; return them and the model."""
    check(config)
    on_first(lambda: check_folder(config))
    name = config.model
    flow_folder = f"runs/flow-{rollout.short_name(config.model)}"
    world = on_first(lambda: toy.find_world(config.model))
    if world:
        name = world.path("model")
        data = world.path("train.jsonl")
        config = with_defaults(config, data=data, eval_data=(world.path("test.jsonl"),))
        if config.shaping == "flow" and config.flow is None:
            on_first(lambda: make_toy_flow(config.model, flow_folder))
    if config.shaping == "flow" and config.flow is None:
        config = with_defaults(config, flow=on_first(lambda: newest_flow(flow_folder)))
    model = rollout.find_model(name, config.loading)
    if config.data is None:
        data = PUBLISHED_DATA["text" if model.processor is None else "images"]
        config = with_defaults(config, data=data)
        if is_first():
            print(f"no --data given: taking the published problems, {data}")
    config = rollout.fill_in(config, model)
    if config.compute.gradient_checkpointing is None:
        room = min(parallel.gather_objects(parallel.total_memory()))
        recompute = recomputes_activations(config, model, dist.get_world_size(), room)
        config = with_defaults(config, gradient_checkpointing=recompute)
        if is_first():
            print(
                f"activations are {'recomputed' if recompute else 'kept'} (gradient_checkpointing)"
            )
    rank = config.optimisation.lora_rank
    if rank and model.processor is not None and config.optimisation.freeze == "none":
        raise ValueError(
            f"freeze='none' with lora_rank={rank}: the tower has no adapters and does not learn; "
            "leave --freeze out, or --lora-rank"
        )
    if rank:
        config = with_defaults(config, lora_alpha=2.0 * rank)
    prompt = config.problems.max_prompt_tokens
    response = config.sampling.max_tokens
    positions = model.text_config.max_position_embeddings
    if prompt + response > positions:
        raise ValueError(
            f"max_prompt_tokens + max_tokens = {prompt} + {response} is more than "
            f"the model's {positions} positions; lower one of them"
        )
    return config, model


def recomputes_activations(config: Config, model: rollout.Model, n_ranks: int, room: int) -> bool:
    """Return whether the backward recomputes activations, because keeping them takes too much.

    room is the size of a GPU's memory, in bytes, of which a fifth is left to the sleeping engine, to
    what is gathered and to fragments. Without a GPU, and where the arithmetic does not hold, models
    above 1B parameters recompute.
    """
    text_config = model.text_config
    is_plain = text_config.model_type in rlfr.PLAIN_DECODERS and not config.optimisation.lora_rank
    if room == 0 or not is_plain:
        return model.n_parameters > 1e9
    dim = text_config.hidden_size
    n_parameters = model.n_parameters
    if not text_config.tie_word_embeddings:
        n_parameters += text_config.vocab_size * dim
    if config.shaping == "flow":
        flow_blocks = rollout.published_settings(model)["flow_blocks"]
        n_parameters += (5 * flow_blocks + 7) * dim**2
    if config.compute.cpu_offload:
        n_parameters = 0  # they are in host memory
    longest = config.problems.max_prompt_tokens + config.sampling.max_tokens
    n_tokens = max(config.compute.tokens_per_gpu, longest)  # a single row may exceed the budget
    kept = rlfr.update_bytes(text_config, n_parameters, n_tokens, n_ranks, recompute=False)
    return kept > 0.8 * room


def newest_flow(folder: str) -> str:
    """Return the newest flow among those of the offline start, `folder` and `folder-N`; say it."""
    name = Path(folder).name
    flows = []
    for run_folder in Path(folder).parent.glob(f"{name}*"):
        suffix = run_folder.name.removeprefix(name)
        file = run_folder / "flow" / fl.FLOW_FILE
        if re.fullmatch(r"(-\d+)?", suffix) and file.exists():
            flows.append(file)
    if not flows:
        return f"{folder}/flow"  # it will be missed, with what to do about it, when it is loaded
    newest = max(flows, key=lambda file: file.stat().st_mtime)
    written = time.strftime("%Y-%m-%d %H:%M", time.localtime(newest.stat().st_mtime))
    print(f"no --flow given: taking the newest one, {newest.parent}, written {written}")
    return str(newest.parent)


def make_toy_flow(model: str, folder: str) -> None:
    """Run the offline start of an embedded world, in one process, unless it has been run."""
    with locked(Path(f"{folder}.lock")) as lock:
        if not Path(folder, "flow", fl.FLOW_FILE).exists():
            run_offline_start(model, folder, lock)


def run_offline_start(model: str, folder: str, lock: IO) -> None:
    """Run train_flow.py in a process of its own, or go on with it if it was interrupted.

    That process shares `lock`: no other start comes beside it, even if this process is killed.
    """
    has_begun = Path(folder, "config.json").exists()
    script = str(Path(__file__).with_name("train_flow.py"))
    command = [sys.executable, script, "--resume" if has_begun else "--folder", folder]
    environment = {}
    for variable, value in os.environ.items():
        if variable not in RANK_VARIABLES and "TORCHELASTIC" not in variable:
            environment[variable] = value
    code = children.call([*command, "--model", model], environment, lock)
    if code:
        raise RuntimeError(
            f"the offline start in {folder} ended with exit code {code}, see its error above; "
            "the same command goes on with it"
        )
    if not Path(folder, "flow", fl.FLOW_FILE).exists():
        raise ValueError(
            f"the offline start in {folder} was stopped before its end; "
            "the same command goes on with it"
        )


def make_flow(config: Config, model: rollout.Model) -> fl.Flow:
    """Load the flow of the offline start, or make an untrained one for `--flow new`."""
    dim = model.text_config.hidden_size
    contexts = config.flow_reward.contexts
    percentiles = config.flow_reward.percentiles
    if config.flow != "new":
        expected = {"contexts": contexts, "percentiles": percentiles}
        other_contexts = config.flow_reward.other_contexts
        flow = fl.load_flow(config.flow, dim, model.norm_eps, other_contexts, **expected)
        if config.flow_reward.flow_scope == "expert":
            flow.expert_scale(config.flow_reward.reward_times)  # raises where there is none
        return flow
    if config.flow_reward.flow_scope == "expert":
        raise ValueError(
            "flow_scope=expert needs a flow that train_flow.py has calibrated on expert solutions; "
            "expected --flow FOLDER, got new"
        )
    n_blocks = rollout.published_settings(model)["flow_blocks"]
    flow_config = fl.FlowConfig(dim, n_blocks, norm_eps=model.norm_eps)
    if contexts:
        flow_config = replace(flow_config, contexts=contexts)
    if percentiles:
        flow_config = replace(flow_config, percentiles=percentiles)
    torch.manual_seed(config.seed)  # the same flow on all ranks
    return fl.Flow(flow_config)


def check_fitted(flow: fl.Flow, policy: rlfr.Policy, path: str, is_named: bool) -> None:
    """Say that a flow was fitted to another policy; ValueError if nobody has named it."""
    if flow.config.fitted_to in (None, policy.fingerprint):
        return
    found = f"the flow {path} was fitted to the latents of other weights than this model's"
    if not is_named:
        raise ValueError(
            f"{found}; fit one to these with train_flow.py, or name this one with --flow {path} "
            "if you mean it"
        )
    if is_first():
        print(f"{found}, as --flow asks")


# ---- Policy, reference
def make_policy(config: Config, model: rollout.Model) -> rlfr.Policy:
    """Load the policy, compiled and sharded, with adapters if it has them."""
    settings = config.optimisation
    policy = rlfr.load_policy(
        model.path,
        config.loading.trust_remote_code,
        config.compute.gradient_checkpointing,
        settings.freeze,
    )
    policy.fingerprint = fingerprints.of_weights(policy.model)
    if settings.lora_rank:
        sizes = (settings.lora_rank, settings.lora_alpha)
        lora.add_adapters(policy.model, policy.layers, *sizes, config.seed)
    parallel.compile_forward(policy.layer_parts(), config.compute.compile)
    dtype = parallel.compute_dtype(config.loading.dtype)
    parallel.shard(policy, policy.blocks, dtype, config.compute.cpu_offload, methods=["see"])
    return policy


def make_reference(
    policy: rlfr.Policy, config: Config, model: rollout.Model
) -> rlfr.Policy | lora.Base:
    """Return the initial policy, for a KL: without the adapters the policy itself, or a copy."""
    if config.optimisation.lora_rank:
        return lora.Base(policy)
    reference = rlfr.load_policy(
        model.path,
        config.loading.trust_remote_code,
        freeze=config.optimisation.freeze,  # a frozen tower is the policy's: features serve both
    )
    reference.requires_grad_(False)
    dtype = parallel.compute_dtype(config.loading.dtype)
    parallel.shard(reference, reference.blocks, dtype, config.compute.cpu_offload)
    return reference


# ---- 1. and 2. Roll out and verify
# The first call waits for the verdicts on all episodes; later calls return them immediately
Verdicts = Callable[[], list[Verdict]]


@torch.no_grad()
def check_probes(policy: rlfr.Policy, probes: list[rollout.Episode], model: str) -> None:
    """Raise ValueError if the policy's log-probs are not the engine's, see sample_probes()."""
    batch = rlfr.collate(probes)
    rollout.check_log_probs(probes, policy(batch).logp[batch.response_mask], model)


class Sampler(NamedTuple):
    """What samples groups of responses and grades them."""

    engine: rollout.Engine
    grader: Grader
    problems: list[rollout.Problem]
    lengths: (
        Tensor  # (n_problems,) mean response tokens when last sampled, 0 before; kept up to date
    )
    settings: SamplingSettings
    seed: int


def roll_out(sampler: Sampler, cursor: int) -> tuple[list[rollout.Episode], Verdicts, int]:
    """Sample G responses for each of N problems from the cursor on, and begin to grade them.

    Returns the episodes, G in a row for each problem, a function that waits for their verdicts,
    and the cursor after the last problem.
    """
    settings = sampler.settings
    if not settings.dynamic_sampling:
        episodes, verdicts = sample_groups(sampler, cursor, settings.prompts)
        return episodes, verdicts, cursor + settings.prompts

    # Dynamic sampling (DAPO): groups of equal reward have no outcome to compare; others take their
    # place
    group_size = settings.group_size
    wanted = settings.prompts * group_size
    kept = []  # pairs of episode and verdict
    dropped = []
    for _ in range(settings.max_rounds):
        n_missing = (wanted - len(kept)) // group_size
        episodes, verdicts = sample_groups(sampler, cursor, n_missing)
        cursor += n_missing
        graded = list(zip(episodes, verdicts(), strict=True))
        reward = torch.tensor([verdict.reward for _, verdict in graded])
        for i, is_varied in enumerate(rlfr.varied_groups(reward, group_size)):
            group = graded[i * group_size : (i + 1) * group_size]
            if is_varied:
                kept += group
            else:
                dropped += group
        if len(kept) == wanted:
            break
    graded = (kept + dropped)[:wanted]
    final_verdicts = [verdict for _, verdict in graded]
    return [episode for episode, _ in graded], lambda: final_verdicts, cursor


def sample_groups(
    sampler: Sampler, cursor: int, n_problems: int
) -> tuple[list[rollout.Episode], Verdicts]:
    """Sample a group for each of n_problems from the cursor on, and begin to grade them."""
    engine, grader, problems, lengths, settings, seed = sampler
    group_size = settings.group_size
    order = rlfr.passes(len(problems), cursor, n_problems, "problem order", seed)
    indices = [index for _, index in order]
    known = lengths[lengths > 0]
    usual_length = known.mean() if len(known) else torch.tensor(float(settings.max_tokens))
    requests = []
    expected_tokens = []
    for epoch, index in order:
        problem = problems[index]
        request_seed = fl.keyed_seed("roll out", seed, epoch, index)
        requests.append(rollout.Request(problem.prompt_ids, request_seed, problem.images))
        length = lengths[index] if lengths[index] > 0 else usual_length
        expected_tokens.append(len(problem.prompt_ids) + group_size * length.item())
    sampling = rollout.Sampling(group_size, settings.temperature, settings.max_tokens)
    episodes = rollout.generate_on_all_ranks(engine, requests, sampling, expected_tokens)
    sampled = torch.tensor([len(episode.response_ids) for episode in episodes])
    lengths[indices] = sampled.view(n_problems, group_size).float().mean(dim=1)
    chosen = [problems[index] for index in indices]
    for problem, group in zip(chosen, rollout.in_groups(episodes, group_size), strict=True):
        for episode in group:
            episode.problem = problem
    return episodes, rollout.grade_on_all_ranks(grader, chosen, episodes)


# ---- 3. Score
def needs_old_logp(config: Config) -> bool:
    """Return whether log-probs or entropies are needed before the update of an RL step.

    If not, the update's own forward gives them on the way: with a single mini-batch its log-probs
    are the old ones, as no weight has changed yet.
    """
    n_episodes = config.sampling.prompts * config.sampling.group_size
    flow_learns = config.shaping == "flow" and not config.flow_update.freeze_flow
    return (
        config.shaping == "entropy"
        or (flow_learns and config.flow_update.flow_entropy_quantile is not None)
        or config.optimisation.kl_coef > 0
        or config.optimisation.train_batch < n_episodes
    )


def see_images(
    policy: rlfr.Policy, episodes: Sequence[rollout.Episode], token_budget: int
) -> list[rollout.Episode]:
    """Run a frozen vision tower over the step's images; return the episodes with its features.

    The tower sees each image once, however many episodes share it and however often they are
    scored and trained on. All ranks call this together: each runs the tower on a share, batches of
    at most token_budget vectors, and all get the features, which wait in host memory.
    """
    images = list(dict.fromkeys(image for episode in episodes for image in episode.images))
    if not images or not policy.takes_features:
        return list(episodes)
    n_ranks = dist.get_world_size()
    images += [images[-1]] * (-len(images) % n_ranks)  # every rank runs the tower as often
    sizes = [image.n_tokens for image in images]
    each_alone = [[index] for index in range(len(images))]
    plans = rlfr.plan_batches(each_alone, sizes, token_budget, n_ranks)
    seen = {}
    for batches in zip(*plans, strict=True):  # one of each rank
        mine = [images[index] for index in batches[dist.get_rank()]]
        counts = [sum(sizes[index] for index in batch) for batch in batches]
        gathered = parallel.gather_rows(policy.see(mine), counts)
        for batch, features in zip(batches, gathered, strict=True):
            parts = features.cpu().split([sizes[index] for index in batch])
            for index, part in zip(batch, parts, strict=True):
                seen[images[index]] = replace(images[index], features=part)
    shown = []
    for episode in episodes:
        shown.append(replace(episode, images=tuple(seen[image] for image in episode.images)))
    return shown


@dataclass
class Scores:
    """What is known of a step's episodes after the scoring pass, on every rank.

    (B, T) each, but for the deviation.
    """

    mask: Tensor  # bool, response tokens
    sampled_logp: Tensor
    old_logp: Tensor
    entropy: Tensor
    ref_logp: Tensor  # 0 without a reference
    flow_score: Tensor  # 0 without a flow
    deviation: Tensor  # (L, B, T), by tap; its mean over taps is flow_score
    flow_mask: Tensor  # bool, tokens with a flow score: not the last one if the context is the next
    has_logp: bool = False  # until scoring or the update has filled in old_logp and entropy

    @classmethod
    def before_the_pass(cls, episodes: Sequence[rollout.Episode], n_taps: int) -> "Scores":
        """Return what is known before the pass, mask and sampled log-probs, and zeros elsewhere."""
        device = parallel.DEVICE
        lengths = torch.tensor([len(episode.response_ids) for episode in episodes], device=device)
        mask = torch.arange(int(lengths.max()), device=device) < lengths[:, None]
        sampled_logp = torch.zeros(mask.shape, device=device)
        all_logp = [logp for episode in episodes for logp in episode.logp]
        sampled_logp[mask] = torch.tensor(all_logp, device=device)
        return cls(
            mask,
            sampled_logp,
            old_logp=torch.zeros(mask.shape, device=device),
            entropy=torch.zeros(mask.shape, device=device),
            ref_logp=torch.zeros(mask.shape, device=device),
            flow_score=torch.zeros(mask.shape, device=device),
            deviation=torch.zeros(n_taps, *mask.shape, device=device),
            flow_mask=torch.zeros_like(mask),
        )

    def sum_over_ranks(self) -> None:
        """Add up what each rank has scored; it left zeros for the others' episodes."""
        per_token = (self.old_logp, self.entropy, self.ref_logp, self.flow_score)
        for tensor in (*per_token, self.deviation):
            parallel.sum_over_ranks(tensor)
        self.flow_mask = parallel.sum_over_ranks(self.flow_mask.float()).bool()


def score(
    policy: rlfr.Policy,
    reference: rlfr.Policy | lora.Base | None,
    flow: fl.Flow | None,
    episodes: Sequence[rollout.Episode],
    verdicts: Verdicts,
    config: Config,
    step: int,
    with_logp: bool,
) -> tuple[Scores, dict[str, float]]:
    """Run the policy once over the episodes, without gradient, as far as it is needed.

    Gives the flow's score of the latents and, with_logp, log-probs and entropies; without them the
    policy ends at the last tap, or does not run at all. The flow's own loss on accepted episodes
    leaves its gradient on the flow, none on the policy. Latents are not kept.
    """
    temperature = config.sampling.temperature
    flow_learns = flow is not None and learns_while_scoring(config.flow_update)
    flow_loss = torch.zeros((), device=parallel.DEVICE)
    taps = []
    if flow:
        taps = rlfr.tap_layers(policy.n_layers, flow.config.percentiles)
        parallel.begin_calls(flow)
    scores = Scores.before_the_pass(episodes, len(taps))
    scores.has_logp = with_logp
    if not with_logp and not flow:
        return scores, {}
    for indices, batch in my_micro_batches(episodes, config, "score"):
        cells = (indices, slice(batch.response_mask.shape[1]))  # of the micro-batch in (B, T)
        with torch.no_grad():
            output = policy(batch, temperature, taps, latents_only=not with_logp)
            if with_logp:
                scores.old_logp[cells] = output.logp
                scores.entropy[cells] = output.entropy
            if reference:
                scores.ref_logp[cells] = reference(batch, temperature).logp
        if flow:
            weight = None
            if flow_learns:
                # which episodes to learn from: the first micro-batch waits here for all verdicts,
                # while the kernels that are already queued keep the GPU busy
                accepted = accepted_episodes(verdicts(), config.flow_update)
                weight = flow_loss_weights(
                    batch, indices, output.entropy, accepted, config.flow_update
                )
            depths = [tap / policy.n_layers for tap in taps]
            keys = [("flow noise", config.seed, step, index) for index in indices]
            latent_scores = score_latents(flow, batch, output.latents, depths, keys, weight, config)
            scores.flow_score[cells] = latent_scores.score
            scores.deviation[:, *cells] = latent_scores.deviation
            scores.flow_mask[cells] = latent_scores.exists
            flow_loss += latent_scores.loss
    metrics = {}
    has_learnt = False
    if flow_learns:
        accepted = accepted_episodes(verdicts(), config.flow_update)
        has_learnt = bool(accepted.any()) or config.flow_update.flow_soft > 0
        metrics["flow/loss"] = parallel.sum_over_ranks(flow_loss).item()
    if flow:  # FSDP sums gradients over ranks only in a backward: here one of weight 0
        parallel.end_calls(flow, flow.example(parallel.DEVICE), has_learnt)
    scores.sum_over_ranks()
    return scores, metrics


def learns_while_scoring(settings: FlowUpdateSettings) -> bool:
    """Return whether the flow's gradient comes from the scoring pass; else see update_flow."""
    return not settings.freeze_flow and settings.flow_optimiser == "rollout"


class LatentScores(NamedTuple):
    """What the flow says of a micro-batch."""

    score: Tensor  # (B, T) velocity deviation, or its excess over expert tokens; mean over taps
    deviation: Tensor  # (L, B, T) the same, by tap
    exists: Tensor  # (B, T) bool, tokens that have a score
    loss: Tensor  # (), this micro-batch's part of the online flow loss


def score_latents(
    flow: fl.Flow,
    batch: rlfr.Batch,
    latents: Sequence[Tensor],
    depths: Sequence[float],
    keys: Sequence[tuple],
    weight: Tensor | None,
    config: Config,
) -> LatentScores:
    """Score the latents of response tokens; with a weight (M,), let the flow learn from them."""
    flow_rows = fl.make_rows(flow.config, latents, depths, batch.attention_mask, batch.targets)
    flow_rows = flow.standardise(flow_rows)
    lengths = batch.response_mask.sum(dim=1).tolist()
    noise, z = fl.draw(flow.config, keys, lengths, parallel.DEVICE)
    times = config.flow_reward.reward_times
    learn_at = None  # the times of the reward
    if config.flow_update.flow_times != "reward":
        learn_at = fl.draw_times(z, config.flow_update.flow_times)
    scale = None
    if config.flow_reward.flow_scope == "expert":
        scale = flow.expert_scale(times)
    score, loss, by_tap = fl.score_and_learn(flow, flow_rows, noise, times, weight, learn_at, scale)
    deviation = torch.stack([batch.unflatten(each) for each in by_tap])
    has_context = flow_rows.exists.any(dim=1).any(dim=0)  # (M,)
    total = torch.zeros((), device=parallel.DEVICE) if weight is None else (weight * loss).sum()
    return LatentScores(batch.unflatten(score), deviation, batch.unflatten(has_context), total)


def accepted_episodes(verdicts: Sequence[Verdict], settings: FlowUpdateSettings) -> Tensor:
    """Return which episodes the flow learns from, (B,) bool: rejection sampling."""
    accepts_all = settings.flow_accept == "all"
    accepted = [accepts_all or verdict.correct for verdict in verdicts]
    return torch.tensor(accepted, device=parallel.DEVICE)


def flow_loss_weights(
    batch: rlfr.Batch,
    indices: Sequence[int],
    entropy: Tensor | None,
    accepted: Tensor,
    settings: FlowUpdateSettings,
) -> Tensor:
    """Return the weight of each response token of a micro-batch in the online flow loss, (M,).

    `indices` are those of the micro-batch's episodes in accepted (B,). Over all of its episodes,
    on all ranks, the weights sum to 1, unless all of them are 0.
    """
    quantile = settings.flow_entropy_quantile
    assert quantile is None or entropy is not None, "a quantile of entropies that were not scored"
    token_weight, episode_weight = rlfr.online_flow_weights(
        batch.response_mask,
        accepted[indices],
        None if quantile is None else entropy,
        quantile,
        settings.flow_soft,
    )
    total = torch.where(accepted, 1.0, settings.flow_soft).sum().clamp(min=1e-9)
    weight = token_weight * episode_weight[:, None] / total  # (B, T) of the micro-batch
    return weight[batch.response_mask]


def my_micro_batches(
    episodes: Sequence, config: Config, phase: str
) -> Iterator[tuple[list[int], rlfr.Batch]]:
    """Yield indices and batch of this rank's share of episodes, behind a progress bar."""
    budget = config.compute.tokens_per_gpu
    batches = rlfr.micro_batches(episodes, budget, dist.get_rank(), dist.get_world_size())
    return tqdm(batches, desc=phase, leave=False, delay=3, disable=not is_first())


# ---- 4. Shape and advantage
def shape_advantage(
    scores: Scores, reward: Tensor, config: Config, step: int
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Return each token's advantage and flow reward, (B, T) each, and figures of them.

    The advantage is the outcome, and the dense part that `shaping` adds.
    """
    mask = scores.mask
    gamma = config.flow_reward.gamma
    settings = config.advantage
    group_size = config.sampling.group_size
    flow_reward = torch.zeros_like(scores.flow_score)
    metrics = {}
    flow_return = torch.zeros(mask.shape, device=mask.device)
    if config.shaping == "flow":
        flow_reward = shape_flow_reward(scores, config.flow_reward, group_size)
        if step < config.flow_reward.flow_after:
            flow_reward = torch.zeros_like(flow_reward)
        n_scored = scores.flow_mask.sum().clamp(min=1)
        metrics["flow/score"] = (scores.flow_score.sum() / n_scored).item()
        of_response = reward_of_responses(flow_reward, scores.flow_mask, config.flow_reward)
        metrics["flow/reward"] = of_response.mean().item()
        metrics["flow/tokens"] = (flow_reward != 0).sum(dim=1).float().mean().item()
        metrics["flow/share"] = ((flow_reward != 0).sum() / n_scored).item()
        if config.flow_reward.flow_on == "response":
            # grpo only centres it: divided by its own spread, no coefficient would be left of it
            centring = "dr_grpo" if settings.baseline == "grpo" else settings.baseline
            centred = rlfr.outcome_advantage(of_response, group_size, centring)
            flow_return = centred[:, None] * mask
        else:
            flow_return = rlfr.token_returns(flow_reward, mask, gamma)
    outcome = rlfr.outcome_advantage(reward, group_size, settings.baseline)
    advantage = outcome[:, None] * mask + flow_return
    optimisation = config.optimisation
    if optimisation.kl_coef and optimisation.kl_in == "reward":
        kl = rlfr.kl_divergence(scores.old_logp, scores.ref_logp, optimisation.kl_kind)
        kl_reward = -optimisation.kl_coef * kl
        advantage = advantage + rlfr.token_returns(kl_reward, mask, gamma)
        metrics["kl_reward"] = kl_reward[mask].mean().item()
    if config.shaping == "entropy":
        shaped = rlfr.entropy_advantage(
            advantage, scores.entropy, settings.entropy_alpha, settings.entropy_kappa
        )
        shaped = shaped * mask
        metrics["entropy_advantage"] = (shaped - advantage)[mask].mean().item()
        advantage = shaped
    if settings.baseline == "reinforce++":
        advantage = rlfr.whiten(advantage, mask)
    return advantage, flow_reward, metrics


def shape_flow_reward(scores: Scores, settings: FlowRewardSettings, group_size: int) -> Tensor:
    """Return each token's flow reward (B, T): -flow_coef times its score in [0, 1] or [-1, 1].

    That is the selected, normalised score (paper), or the clamped excess over expert tokens. The
    excess of a response, --flow-on response, is averaged before it is clamped: single tokens of an
    expert have an excess, too, but in the mean they have none.
    """
    score = scores.flow_score
    mask = scores.flow_mask
    if settings.flow_scope == "expert":
        if settings.flow_on == "response":
            score = rlfr.mean_over_tokens(score, mask)[:, None].expand(mask.shape)
        penalty = rlfr.clamp_excess(score, mask, settings.flow_cap)
    else:
        rows_together = group_size if settings.flow_scope == "group" else 1
        normalised = rlfr.normalise(
            score, mask, settings.flow_bilateral, settings.flow_power, rows_together
        )
        penalty = rlfr.select(
            normalised, settings.flow_threshold, settings.flow_top_k, settings.flow_bilateral
        )
    flow_reward = -settings.flow_coef * penalty
    if settings.flow_centre:
        return rlfr.centre(flow_reward, mask, group_size)
    return flow_reward


def reward_of_responses(flow_reward: Tensor, mask: Tensor, settings: FlowRewardSettings) -> Tensor:
    """Return the flow reward of each response, (B,): the sum of its tokens', or the mean.

    With --flow-on response every token has the response's reward, of which the mean is that.
    """
    if settings.flow_on == "response":
        return rlfr.mean_over_tokens(flow_reward, mask)
    return flow_reward.sum(dim=1)


# ---- 5. Update the policy
def update_policy(
    policy: rlfr.Policy,
    learner: parallel.Learner,
    episodes: Sequence[rollout.Episode],
    scores: Scores,
    advantage: Tensor,
    config: Config,
    step: int,
    lr: float,
    learn_flow: Callable[[Tensor], dict[str, float]] | None,
) -> dict[str, float]:
    """Take the optimiser steps of one RL step, a mini-batch each; return their mean figures.

    The advantage is (B, T). The ratio in the loss is to the scoring pass, hence 1 in the first
    mini-batch; log-probs that it did not give are filled in here. Episodes without a gradient are
    not run, but count in the loss's denominator. learn_flow is called with the indices of each
    mini-batch's episodes before its optimiser step, and returns figures.
    """
    settings = config.optimisation
    # whole groups, as a forward computes their prompt once
    group_size = config.sampling.group_size
    order = rlfr.group_order(len(episodes), group_size, "mini-batches", config.seed, step)
    share = settings.train_batch / len(episodes)  # of a mini-batch in the step
    sums = {name: torch.zeros((), device=parallel.DEVICE) for name in ("loss", "kl", "clipped")}
    grad_norm = 0.0
    metrics: dict[str, float] = {}
    for mini_batch in torch.tensor(order).split(settings.train_batch):
        # over all micro-batches and ranks: one denominator for each optimiser step
        n_tokens = int(scores.mask[mini_batch].sum())
        n_episodes = len(mini_batch)
        learning, left_out = split_by_gradient(mini_batch, advantage, config)
        if len(left_out) and not scores.has_logp:
            score_left_out(policy, episodes, scores, left_out, config)
        chosen = [episodes[i] for i in learning]
        for indices, batch in my_micro_batches(chosen, config, "update"):
            mask = batch.response_mask
            cells = (learning[indices], slice(mask.shape[1]))  # of the micro-batch in (B, T)
            logp, entropy, _ = policy(batch, config.sampling.temperature)
            if not scores.has_logp:
                scores.old_logp[cells] = logp.detach()
                scores.entropy[cells] = entropy.detach()
            loss, is_clipped = rlfr.policy_loss(
                logp,
                scores.old_logp[cells],
                advantage[cells],
                settings.clip_low,
                settings.clip_high,
                settings.ratio_cap,
            )
            loss = loss * rlfr.importance_weights(
                scores.old_logp[cells],
                scores.sampled_logp[cells],
                mask,
                settings.mismatch,
                settings.mismatch_cap,
            )
            token_weight = rlfr.token_weights(
                mask, settings.normalisation, n_episodes, n_tokens, config.sampling.max_tokens
            )
            if settings.kl_coef and settings.kl_in == "loss":
                kl = rlfr.kl_divergence(logp, scores.ref_logp[cells], settings.kl_kind)
                loss = loss + settings.kl_coef * kl
                sums["kl"] += share * (kl * token_weight).sum().detach()
            loss = (loss * token_weight).sum()
            loss.backward()
            sums["loss"] += share * loss.detach()
            sums["clipped"] += share * (is_clipped & mask).sum() / n_tokens
        if learn_flow:
            for name, value in learn_flow(mini_batch).items():
                metrics[name] = metrics.get(name, 0.0) + share * value
        grad_norm += share * learner.step(lr, settings.clip_norm)  # clips, steps, clears
    if not scores.has_logp:
        scores.has_logp = True
        parallel.sum_over_ranks(scores.old_logp)
        parallel.sum_over_ranks(scores.entropy)
    for name, value in sums.items():
        metrics[f"policy/{name}"] = parallel.sum_over_ranks(value).item()
    metrics["policy/grad_norm"] = grad_norm
    return metrics


def split_by_gradient(
    mini_batch: Tensor, advantage: Tensor, config: Config
) -> tuple[Tensor, Tensor]:
    """Split a mini-batch (b,) into the episodes that the update runs and those that it leaves out.

    An episode whose advantages are all zero has no gradient, e.g. in a group of equal rewards
    without a dense part. A KL to the reference in the loss gives it one.
    """
    settings = config.optimisation
    if settings.kl_coef and settings.kl_in == "loss":
        return mini_batch, mini_batch[:0]
    has_gradient = advantage[mini_batch] != 0
    runs = rlfr.rows_to_run(has_gradient, config.sampling.group_size, dist.get_world_size())
    return mini_batch[runs], mini_batch[~runs]


@torch.no_grad()
def score_left_out(
    policy: rlfr.Policy,
    episodes: Sequence[rollout.Episode],
    scores: Scores,
    left_out: Tensor,
    config: Config,
) -> None:
    """Fill in the log-probs and entropies of episodes that the update leaves out."""
    chosen = [episodes[i] for i in left_out]
    for indices, batch in my_micro_batches(chosen, config, "score"):
        cells = (left_out[indices], slice(batch.response_mask.shape[1]))
        output = policy(batch, config.sampling.temperature)
        scores.old_logp[cells] = output.logp
        scores.entropy[cells] = output.entropy


# ---- 6. Update the flow, if it takes a step with every mini-batch
def update_flow(
    policy: rlfr.Policy,
    flow: fl.Flow,
    learner: parallel.Learner,
    episodes: Sequence[rollout.Episode],
    scores: Scores,
    accepted: Tensor,
    config: Config,
    step: int,
    lr: float,
    mini_batch: Tensor,
) -> dict[str, float]:
    """Let the flow learn from a mini-batch and take a step, as the official code intended.

    accepted (B,) bool says which episodes it learns from; mini_batch holds indices of episodes.
    """
    taps = rlfr.tap_layers(policy.n_layers, flow.config.percentiles)
    depths = [tap / policy.n_layers for tap in taps]
    accepted = accepted[mini_batch]
    chosen = [episodes[i] for i in mini_batch]
    loss = torch.zeros((), device=parallel.DEVICE)
    parallel.begin_calls(flow)
    for indices, batch in my_micro_batches(chosen, config, "flow"):
        with torch.no_grad():
            latents = policy(batch, taps=taps, latents_only=True).latents
        in_step = mini_batch[indices]
        entropy = scores.entropy[in_step, : batch.response_mask.shape[1]]
        weight = flow_loss_weights(batch, indices, entropy, accepted, config.flow_update)
        keys = [("flow noise", config.seed, step, index) for index in in_step.tolist()]
        loss += score_latents(flow, batch, latents, depths, keys, weight, config).loss
    has_learnt = bool(accepted.any()) or config.flow_update.flow_soft > 0
    parallel.end_calls(flow, flow.example(parallel.DEVICE), has_learnt)
    return {
        "flow/loss": parallel.sum_over_ranks(loss).item(),
        "flow/grad_norm": learner.step(lr, config.optimisation.clip_norm),
    }


# ---- Before the first step
def rehearse(
    policy: rlfr.Policy,
    reference: rlfr.Policy | lora.Base | None,
    flow: fl.Flow | None,
    learners: dict[str, parallel.Learner],
    problems: Sequence[rollout.Problem],
    config: Config,
) -> None:
    """Score and update at the longest lengths that the settings allow; say what memory it took.

    The longest prompts are filled up to max_prompt_tokens. The shortest have their turn, too: a
    micro-batch of them has more response tokens, on which head and flow work. No row shares its
    prompt with another, which would save memory.
    Nothing that a step depends on is changed: weights, optimisers, generators.
    Raises MemoryError, with the settings to lower, if a GPU's memory is too small.
    """
    shortest_first = sorted(problems, key=lambda problem: len(problem.prompt_ids))
    filled = []
    for problem in reversed(shortest_first):
        filling = [0] * (config.problems.max_prompt_tokens - len(problem.prompt_ids))
        filled.append(problem._replace(prompt_ids=filling + problem.prompt_ids))
    stand_ins = {name: parallel.Rehearsal(learner) for name, learner in learners.items()}
    parallel.take_peak_memory()
    try:
        with parallel.fork_rng():
            for chosen in (filled, shortest_first):
                episodes = longest_episodes(chosen, config)
                rehearse_update(policy, reference, flow, stand_ins, episodes, config)
    except torch.OutOfMemoryError as error:
        raise MemoryError(what_to_lower(config)) from error
    peaks = parallel.gather_objects(parallel.take_peak_memory())
    if not is_first():
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


def longest_episodes(problems: Sequence[rollout.Problem], config: Config) -> list[rollout.Episode]:
    """Return episodes that fill a micro-batch of each rank, with responses of max_tokens.

    They are those of the first problems, whose prompts must not become shorter in their order.
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
    episodes = []
    for problem in problems[:n_episodes]:
        response = ([0] * max_tokens, [0.0] * max_tokens, "length", "")
        episodes.append(rollout.Episode(problem.prompt_ids, *response, problem.images))
    return episodes


def rehearse_update(
    policy: rlfr.Policy,
    reference: rlfr.Policy | lora.Base | None,
    flow: fl.Flow | None,
    stand_ins: dict[str, parallel.Rehearsal],
    episodes: Sequence[rollout.Episode],
    config: Config,
) -> None:
    """Do what a step does with its episodes, 3 to 6 of main(), but for the optimisers' steps."""
    verdict = Verdict(1.0, correct=True, parts={}, extracted=None, kind="cut")
    verdicts = [verdict] * len(episodes)  # the flow learns from all
    episodes = see_images(policy, episodes, config.compute.tokens_per_gpu)
    scores, _ = score(
        *(policy, reference, flow, episodes, lambda: verdicts, config),
        step=0,
        with_logp=needs_old_logp(config),
    )
    advantage = torch.ones_like(scores.old_logp)
    learn_flow = None
    if "flow" in stand_ins and not learns_while_scoring(config.flow_update):
        accepted = accepted_episodes(verdicts, config.flow_update)
        learn_flow = partial(
            update_flow,
            *(policy, flow, stand_ins["flow"], episodes, scores, accepted),
            *(config, 0, 0.0),
        )
    update_policy(
        *(policy, stand_ins["policy"], episodes, scores, advantage),
        *(config, 0, 0.0, learn_flow),
    )
    if "flow" in stand_ins:
        stand_ins["flow"].step(0.0, config.optimisation.clip_norm)


def what_to_lower(config: Config) -> str:
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
    if not config.compute.cpu_offload:
        ways.append("--cpu-offload")
    ways.append("more GPUs")
    return (
        "the largest update that these settings allow does not fit into the GPU's memory; "
        f"any of these helps: {'; '.join(ways)}"
    )


# ---- 7. Log and evaluate
def episode_metrics(
    episodes: Sequence[rollout.Episode], verdicts: Sequence[Verdict], scores: Scores, config: Config
) -> dict[str, float]:
    """Return the figures of a step's episodes: outcomes, lengths, parts of the reward, grading."""
    reward = torch.tensor([verdict.reward for verdict in verdicts])
    n_episodes = len(episodes)
    n_truncated = sum(episode.finish_reason == "length" for episode in episodes)
    varied = rlfr.varied_groups(reward, config.sampling.group_size)
    metrics = {
        "reward": reward.mean().item(),
        "correct": sum(verdict.correct for verdict in verdicts) / n_episodes,
        "varied_groups": varied.float().mean().item(),
        "length": scores.mask.sum(dim=1).float().mean().item(),
        "truncated": n_truncated / n_episodes,
        "entropy": scores.entropy[scores.mask].mean().item(),
    }
    for part in verdicts[0].parts:
        metrics[f"reward/{part}"] = sum(verdict.parts[part] for verdict in verdicts) / n_episodes
    return metrics


def outcome_metrics(
    scores: Scores, flow_reward: Tensor, verdicts: Sequence[Verdict], settings: FlowRewardSettings
) -> dict[str, float]:
    """Return the flow's figures of right and of wrong episodes, apart; nothing where there is none.

    They are the mean velocity deviation of a token, and the mean flow reward of a response.
    """
    correct = torch.tensor([verdict.correct for verdict in verdicts], device=parallel.DEVICE)
    of_response = reward_of_responses(flow_reward, scores.flow_mask, settings)
    metrics = {}
    for name, chosen in (("right", correct), ("wrong", ~correct)):
        n_scored = scores.flow_mask[chosen].sum()
        if n_scored == 0:
            continue
        deviation = scores.flow_score[chosen].sum() / n_scored
        metrics[f"flow/score_{name}"] = deviation.item()
        metrics[f"flow/reward_{name}"] = of_response[chosen].mean().item()
    return metrics


def write_rollouts(
    run: Run,
    step: int,
    policy: rlfr.Policy,
    flow: fl.Flow | None,
    tokenizer,
    episodes: Sequence[rollout.Episode],
    verdicts: Sequence[Verdict],
    scores: Scores,
    advantage: Tensor,
    flow_reward: Tensor,
    config: Config,
) -> None:
    """Write a step's first groups to the run's folder, out of the tensors of the step."""
    taps = rlfr.tap_layers(policy.n_layers, flow.config.percentiles) if flow else []
    per_token = {
        "logp": scores.old_logp,
        "entropy": scores.entropy,
        "flow_reward": flow_reward,
        "advantage": advantage,
        "ratio": (scores.old_logp - scores.sampled_logp).exp(),
    }
    deviation = scores.deviation.masked_fill(~scores.flow_mask, torch.nan)
    group_size = config.sampling.group_size
    n_episodes = config.record.log_groups * group_size
    records = record.describe(
        step,
        episodes[:n_episodes],
        verdicts[:n_episodes],
        per_token,
        deviation,
        taps,
        tokenizer,
        group_size,
    )
    run.log_rollouts(step + 1, records)


def memory_metrics(
    peaks: dict[str, int], engine: rollout.Engine, used_in_roll_out: int
) -> dict[str, float]:
    """Return what a step needed of a GPU's memory, in GB.

    While it scores and updates these are the trainer's tensors: the engine sleeps then, but torch
    counts what it holds. At the end of a rollout it is all that is in use, by the engine, too.
    """
    if parallel.DEVICE.type == "cpu":
        return {}
    metrics = {"memory/roll_out_gb": used_in_roll_out / 1e9}
    for phase in ("score", "update"):
        metrics[f"memory/{phase}_gb"] = (peaks[phase] - engine.held_memory) / 1e9
    return metrics


def grader_metrics(grader: Grader) -> dict[str, float]:
    """Return how often grading went wrong in this step, over all ranks."""
    metrics = {}
    for trouble in ("timeout", "crashed", "capped"):
        count = torch.tensor(float(grader.counts[trouble]))
        metrics[f"grader/{trouble}"] = parallel.sum_over_ranks(count).item()
    return metrics


def evaluate(
    engine: rollout.Engine, grader: Grader, held_out: dict[str, list], config: Config
) -> dict[str, dict[str, dict]]:
    """Evaluate the engine's weights; return figures by set and by kind of sampling."""
    max_tokens = config.sampling.max_tokens
    samplings = {
        "sampled": rollout.Sampling(
            config.evaluation.eval_samples, config.sampling.temperature, max_tokens
        ),
        "greedy": rollout.Sampling(1, 0.0, max_tokens),
    }
    results: dict[str, dict[str, dict]] = {}
    with parallel.fork_rng():  # an engine may draw from the global generator
        for name, problems in held_out.items():
            results[name] = {}
            for kind, sampling in samplings.items():
                records = sets.sample(engine, name, problems, grader, sampling)
                results[name][kind] = figures.summarise(records)
    return results


def fingerprint(problems: Sequence[rollout.Problem]) -> str:
    """Return a fingerprint of problems and their answers, in their order."""
    return fingerprints.of_texts((problem.text, problem.answer) for problem in problems)


def sets_without_figures(summary: dict, held_out: dict[str, list], data: dict) -> dict[str, list]:
    """Return the sets that have no figures before training, or had other problems then."""
    known = data.get("sets", {})
    new_sets = {}
    for name, problems in held_out.items():
        is_other = name in known and known[name]["fingerprint"] != fingerprint(problems)
        if is_other or name not in summary.get("before", {}):
            new_sets[name] = problems
    return new_sets


def add_figures_before(
    summary: dict, results: dict, new_sets: dict[str, list], run: Run, step: int
) -> None:
    """Put the figures of sets into the summary; note what problems and what step they are of.

    A resumed run that gets a new set has no figures of it before the first step.
    """
    if step and is_first():
        print(f"the figures of {', '.join(new_sets)} before training are those after step {step}")
    summary.setdefault("before", {}).update(results)
    noted = run.data.setdefault("sets", {})
    for name, problems in new_sets.items():
        noted[name] = {"fingerprint": fingerprint(problems), "step": step}
    run.write_json(DATA_FILE, run.data)


def print_summary(summary: dict, names: Sequence[str], data: dict) -> None:
    """Print the accuracy before and after training, a row for each set and kind of sampling."""
    rows = {}
    for name in names:
        step = data.get("sets", {}).get(name, {}).get("step", 0)
        begun = f"after step {step}" if step else "before"
        for label, when in ((begun, "before"), ("after", "after")):
            for kind, row in summary[when][name].items():
                rows[f"{name} {label}, {kind}"] = row
    print(figures.table(rows))


def step_line(step: int, metrics: dict[str, float]) -> str:
    """Return one line of figures of a step, for the screen."""
    return (
        f"step {step:4d}  reward {metrics['reward']:.3f}  length {metrics['length']:6.1f}  "
        f"entropy {metrics['entropy']:.3f}  flow {metrics.get('flow/score', 0):.3f}  "
        f"loss {metrics['policy/loss']:+.4f}  grad {metrics['policy/grad_norm']:.3f}  "
        f"{metrics['time/step']:.1f} s"
    )


def main(config: Config) -> None:
    """Train a policy."""
    # ---- Problems and grader
    start()
    is_flow_named = config.flow is not None
    config, model = resolve(config)
    run = Run(config, f"rl-{rollout.short_name(config.model)}-{config.shaping}")
    problems = rollout.load_problems(config.data, config.problems, model)
    prompts = config.sampling.prompts
    total_steps = config.steps or config.optimisation.epochs * len(problems) // prompts
    if not total_steps:
        raise ValueError(
            f"{len(problems)} problems in {config.optimisation.epochs} epochs do not fill "
            f"a step of {prompts}; lower --prompts"
        )
    evaluation_problems = replace(config.problems, split=config.evaluation.eval_split)
    held_out = sets.load_sets(config.eval_data or (), evaluation_problems, model)
    run.check_data(training=fingerprint(problems))
    max_tokens = config.sampling.max_tokens
    grader = Grader(config.reward, config.grading, max_tokens)

    # ---- Flow and policy
    dtype = parallel.compute_dtype(config.loading.dtype)
    flow = None
    if config.shaping == "flow":
        flow = make_flow(config, model)
    policy = make_policy(config, model)
    if flow:
        check_fitted(flow, policy, config.flow, is_flow_named)
    weight_decay = config.optimisation.weight_decay
    learners = {"policy": parallel.Learner(policy, (0.9, 0.95), weight_decay)}
    reference = None
    if config.optimisation.kl_coef:
        reference = make_reference(policy, config, model)
    if flow:
        parallel.compile_forward([flow.model], config.compute.compile)
        parallel.shard(flow, (), dtype, config.compute.cpu_offload)
        if not config.flow_update.freeze_flow:
            recipe = FLOW_RECIPES[config.flow_update.flow_optimiser]
            learners["flow"] = parallel.Learner(flow, recipe.betas, recipe.weight_decay)

    # ---- Begin, or go on from a checkpoint
    progress = {"step": 0, "cursor": 0, "lengths": torch.zeros(len(problems))}
    state = {"progress": progress, **learners}
    run.begin(state)
    if flow:
        run.write_json("flow.json", asdict(flow.config))  # an export of a checkpoint needs it
    if config.compute.rehearse:
        rehearse(policy, reference, flow, learners, problems, config)

    # ---- Engine: it starts in the memory that it will have, so that its cache is of the right size
    host_copy = None
    if config.compute.offload:
        tensors = [tensor for learner in learners.values() for tensor in learner.tensors()]
        if reference:
            tensors += reference.parameters()
        host_copy = parallel.HostCopy(tensors)
        host_copy.offload()
    engine = rollout.make_engine(
        model,
        config.engine,
        config.problems.max_prompt_tokens + config.sampling.max_tokens,
        config.problems.max_images,
        parallel.DEVICE,
        dtype,
        can_sleep=True,
    )
    engine.sleep()
    if host_copy:
        host_copy.restore()
    sampler = Sampler(engine, grader, problems, progress["lengths"], config.sampling, config.seed)
    if is_first():
        print(config)
        print(
            f"{len(problems)} problems, {total_steps} steps of {prompts} * "
            f"{config.sampling.group_size} episodes, {dist.get_world_size()} ranks, "
            f"{parallel.DEVICE} in {dtype}, run folder {run.folder}"
        )
        if config.record.log_rollouts:
            n_episodes = min(config.record.log_groups, prompts) * config.sampling.group_size
            every = config.record.log_rollouts
            print(record.describe_size(total_steps, every, n_episodes, config.sampling.max_tokens))

    @contextmanager
    def engine_awake():
        """Give the engine the policy's weights and the GPU's memory, and take the memory back."""
        engine.load_weights(policy.whole_weights(dtype))
        if host_copy:
            host_copy.offload()
        yield
        engine.sleep()
        if host_copy:
            host_copy.restore()

    # ---- Does the engine sample from the model that is trained?
    with engine_awake():
        probes = rollout.sample_probes(engine, config.problems.max_prompt_tokens, max_tokens)
    check_probes(policy, probes, model.path)

    def export(folder: Path) -> None:
        """Write the policy and the flow for other programs."""
        run.wait_for_save()  # its collectives shall not run beside those that gather weights
        run.check_weights(progress["step"], [policy, flow] if flow else [policy])
        processors = [model.tokenizer, model.processor]
        export_policy(policy, dtype, processors, folder / "policy")
        if config.optimisation.lora_rank:
            export_adapter(policy, model.path, folder / "adapter")
        if flow:
            export_flow(flow, folder / "flow")

    summary_file = run.folder / "summary.json"
    summary = {}
    if progress["step"] and summary_file.exists():
        summary = read_json(summary_file, "the figures of a run")
    new_sets = sets_without_figures(summary, held_out, run.data)
    if new_sets:
        with engine_awake():
            results = evaluate(engine, grader, new_sets, config)
        add_figures_before(summary, results, new_sets, run, progress["step"])
        run.write_json("summary.json", summary)

    if run.lacks_export(progress["step"]):
        run.export(progress["step"], export)
    bar = tqdm(
        initial=progress["step"], total=total_steps, desc="rl", unit="step", disable=not is_first()
    )
    while (step := progress["step"]) < total_steps and not asked_to_stop():
        clock = Stopwatch()
        grader.counts.clear()

        # ---- 1. Roll out, and 2. verify: worker processes grade beside the start of 3
        with engine_awake():
            clock.lap("sync")
            episodes, verdicts, cursor = roll_out(sampler, progress["cursor"])
            used_in_roll_out = parallel.used_memory()
        clock.lap("roll_out")

        # ---- 3. Score, and let the flow's gradient add up
        episodes = see_images(policy, episodes, config.compute.tokens_per_gpu)
        scores, flow_metrics = score(
            *(policy, reference, flow, episodes, verdicts, config, step), needs_old_logp(config)
        )
        clock.lap("score")
        reward = [verdict.reward for verdict in verdicts()]
        reward = torch.tensor(reward, device=parallel.DEVICE)
        clock.lap("verify")

        # ---- 4. Shape and advantage
        advantage, flow_reward, shaping_metrics = shape_advantage(scores, reward, config, step)

        # ---- 5. Update the policy
        schedule = (config.optimisation.warmup, config.optimisation.lr_floor)
        lr = rlfr.learning_rate(config.lr, step, total_steps, *schedule)
        flow_lr = config.flow_update.flow_lr
        learn_flow = None
        if "flow" in learners and not learns_while_scoring(config.flow_update):
            flow_lr = rlfr.learning_rate(flow_lr, step, total_steps, *schedule)
            accepted = accepted_episodes(verdicts(), config.flow_update)
            learn_flow = partial(
                update_flow,
                *(policy, flow, learners["flow"], episodes, scores, accepted),
                *(config, step, flow_lr),
            )
        policy_metrics = update_policy(
            *(policy, learners["policy"], episodes, scores, advantage),
            *(config, step, lr, learn_flow),
        )

        # ---- 6. Step the flow, with the gradient of 3
        if "flow" in learners and learns_while_scoring(config.flow_update):
            flow_metrics["flow/grad_norm"] = learners["flow"].step(
                flow_lr, config.optimisation.clip_norm
            )
        clock.lap("update")

        # ---- 7. Log, evaluate, save
        if is_first() and record.is_due(step, total_steps, config.record.log_rollouts):
            write_rollouts(
                *(run, step, policy, flow, model.tokenizer, episodes, verdicts()),
                *(scores, advantage, flow_reward, config),
            )
        clock.lap("record")
        progress["step"] = step + 1
        progress["cursor"] = cursor
        metrics = {
            **episode_metrics(episodes, verdicts(), scores, config),
            "lr": lr,
            "cursor": cursor,
            "advantage_abs": advantage[scores.mask].abs().mean().item(),
            **grader_metrics(grader),
            **policy_metrics,
            **shaping_metrics,
            **outcome_metrics(scores, flow_reward, verdicts(), config.flow_reward),
            **flow_metrics,
            **rlfr.mismatch_figures(
                scores.old_logp, scores.sampled_logp, scores.mask, config.optimisation.mismatch_cap
            ),
        }
        eval_every = config.evaluation.eval_every
        if held_out and eval_every and (step + 1) % eval_every == 0:
            with engine_awake():
                results = evaluate(engine, grader, held_out, config)
            for name, kinds in results.items():
                for kind, row in kinds.items():
                    metrics[f"eval/{name}/{kind}"] = row["avg"]["mean"]
                    for bound in ("low", "high"):
                        metrics[f"eval/{name}/{kind}/{bound}"] = row["avg"][bound]
        clock.lap("evaluate")
        metrics.update(clock.metrics())
        metrics.update(memory_metrics(clock.peaks, engine, used_in_roll_out))
        run.log(step + 1, metrics)
        if is_first():
            bar.update()
            tqdm.write(step_line(step + 1, metrics))
        if config.run.save_every and (step + 1) % config.run.save_every == 0:
            run.save(state)
        if run.is_export_due(step + 1):
            run.export(step + 1, export)

    # ---- Write the results
    if run.end(state, total_steps):
        export(run.folder)
        if is_first():
            print(f"the policy is in {run.folder / 'policy'}, the figures in {run.folder}")
        try:
            if held_out:
                with engine_awake():
                    summary["after"] = evaluate(engine, grader, held_out, config)
                run.write_json("summary.json", summary)
        finally:  # what an evaluation meets shall not cost the page of the training
            report = run.finish_report()
        if is_first():
            if held_out:
                print_summary(summary, list(held_out), run.data)
            print(f"open {report} to see what happened")
    grader.close()


if __name__ == "__main__":
    launch(main, Config, toy.PRESETS["train_rl"])
