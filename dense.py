"""Dense rewards: what the policy's own state says about each response token. The flow is one of them.

    python train_rl.py --shaping flow                                     the flow reward, below
    python train_rl.py --shaping FILE.py --dense NAME=VALUE NAME=VALUE    one of your own

A file defines a subclass of DenseReward that is named Reward; docs/dense-rewards.md has what it may
ask for, and study/rewards/ has examples. A dense reward takes part in a step three times:

    begin, score, end    while the policy scores: the micro-batch with its latents -> scores (L, B, T)
    shape                with the scores of all episodes: scores -> rewards of tokens (B, T)
    update               the optimiser step of its own module, if it learns

What is common to all of them, each with its function:
    reward of a token = coef * clamp(shaped score), perhaps centred              token_rewards
    its advantage: sum_{j>=k} gamma^(j-k) * reward_j, or the response's, centred       credit
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import Literal, NamedTuple, get_type_hints

import torch
from torch import Tensor, nn

import flow as fl
import rlfr
from infra import batching, kinds, parallel
from infra.defaults import published_settings
from infra.exports import export_module
from infra.files import import_file, shown
from infra.models import Model
from infra.ranges import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    OpenFraction,
    PositiveInt,
    SignedFloat,
)
from infra.solutions import SolutionSettings, load_solutions
from policy import Policy, PolicyOutput, load_policy, tap_layers


# ---- Settings; None: as the comment says
@dataclass(frozen=True)
class DenseSettings:
    """How a dense reward counts, whichever it is."""

    dense: tuple[str, ...] = ()  # Settings of a reward file's own, as NAME=VALUE
    dense_coef: SignedFloat = 0.01  # Scale of the dense reward
    # Where it acts: on the tokens' returns (paper), or on the response, whose mean, less the
    # group's, then joins the outcome advantage; nothing divides it by its spread
    dense_on: Literal["token", "response"] = "token"
    # Lowest and highest reward before the scale; by default as the dense reward says
    dense_clamp: tuple[SignedFloat, SignedFloat] | None = None
    dense_centre: bool = False  # Subtract the group's mean from the tokens' rewards
    gamma: Fraction = 1.0  # Discount of the tokens' rewards: the dense ones, and the KL's
    dense_after: NonNegativeInt = 0  # Steps before it counts; until then it only learns
    dense_until: PositiveInt | None = None  # Step from which it counts no more; by default never


@dataclass(frozen=True)
class FlowRewardSettings:
    """How velocity deviations become rewards of tokens."""

    # T_r, times at which the deviation is taken, in (0, 1)
    reward_times: tuple[OpenFraction, ...] = (0.8,)
    flow_threshold: Fraction = 0.6  # Only normalised scores above it are kept, in [0, 1]
    # Tokens of a response that get a flow reward; None: no limit
    flow_top_k: PositiveInt | None = 15
    # What scores are compared with: those of the response (paper) or of the group, by a min-max;
    # expert: the flow's own on expert tokens, and threshold, top-k and bilateral do not count
    flow_scope: Literal["response", "group", "expert"] = "response"
    flow_bilateral: bool = False  # Normalise to [-1, 1] and keep both tails
    # Context modes to score with; by default those that the flow was fitted with, which an official
    # file does not say
    contexts: tuple[str, ...] | None = None
    # Tapped layers that the flow must have, or gets if it is new, as fractions of the depth
    percentiles: tuple[Fraction, ...] | None = None


@dataclass(frozen=True)
class FlowUpdateSettings:
    """How the flow goes on learning from the policy's own episodes."""

    flow_lr: NonNegativeFloat = 1e-4  # Learning rate of the online flow update; 0: there is none
    # Weight of episodes and tokens that are not accepted; 1: the flow learns from all alike
    flow_soft: Fraction = 0.0
    # Learn only from tokens at or above this quantile of entropy
    flow_entropy_quantile: Fraction | None = None
    # Times to learn at: those of the reward, or drawn, as a sigmoid of a normal or uniformly
    flow_times: Literal["reward", "random", "uniform"] = "reward"


def is_file(shaping: str) -> bool:
    """Return whether --shaping names a file with a dense reward."""
    return shaping.endswith(".py")


def uses_flow(shaping: str, settings: DenseSettings) -> bool:
    """Return whether the dense reward is that of the flow, or a file's that changes the flow's."""
    return shaping == "flow" or "of=flow" in settings.dense


def check(shaping: str, settings: DenseSettings, flow_reward: FlowRewardSettings) -> None:
    """Raise ValueError for settings of dense rewards that cannot work."""
    if is_file(shaping):
        if not Path(shaping).is_file():
            raise ValueError(f"--shaping {shaping}: there is no such file")
    elif shaping not in ("none", "entropy", "flow"):
        raise ValueError(
            f"--shaping {shaping}: expected none, entropy, flow, or a Python file with a dense "
            "reward, see docs/dense-rewards.md"
        )
    elif settings.dense:
        raise ValueError(
            f"--dense {' '.join(settings.dense)}: these are settings of a file's reward; "
            f"--shaping {shaping} has flags of its own"
        )
    as_values(settings.dense)
    until = settings.dense_until
    if until is not None and until <= settings.dense_after:
        raise ValueError(
            f"dense_until={until} with dense_after={settings.dense_after}: the dense reward would "
            "never count; raise the one, or lower the other"
        )
    if settings.dense_clamp and settings.dense_clamp[0] >= settings.dense_clamp[1]:
        raise ValueError(f"dense_clamp={settings.dense_clamp}: expected the lower bound first")
    if flow_reward.contexts is not None:
        fl.check_contexts(flow_reward.contexts)


# ---- What a dense reward sees
@dataclass
class MicroBatch:
    """Some episodes, and what the policy makes of them. M counts the tokens that it sampled."""

    batch: batching.Batch  # token ids and masks
    episodes: Sequence  # B of them: prompt, text, problem, verdict
    indices: Sequence[int]  # of the episodes in the step
    output: PolicyOutput  # log-probs and entropies (B, T), latents by tap
    taps: Sequence[float]  # fractions of the depth, for each of the latents
    first: PolicyOutput | None = None  # of the policy before it learnt, where the run has it

    def latents(self, tap: float, back: int = 0, first: bool = False) -> Tensor:
        """Return the latents (M, D) float32 at a tap of the sampled tokens, or of those `back` before.

        first: those of the policy before it learnt, which the reward asks for by `reads_first`
        """
        if tap not in self.taps:
            raise ValueError(
                f"latents at {tap} of the depth are not there, only at {tuple(self.taps)}: name "
                "all that the dense reward reads in its `taps`"
            )
        if first and self.first is None:
            raise ValueError(
                "latents of the first policy are not there: set `reads_first = True` in the reward"
            )
        source = self.first if first else self.output
        rows, positions = self.batch.targets.nonzero(as_tuple=True)
        of_tap = source.latents[self.taps.index(tap)]  # (B, S, D)
        return of_tap[rows, (positions - back).clamp(min=0)].float()

    def per_token(self, values: Tensor) -> Tensor:
        """Spread values of sampled tokens (M,) into (B, T), or (M, D) into (B, T, D), zero elsewhere.

        Tokens are ordered by row, then by place.
        """
        n_tokens = int(self.batch.response_mask.sum())
        if len(values) != n_tokens:
            raise parallel.OfOneRankError(
                f"per_token() got a tensor {tuple(values.shape)}; expected M = {n_tokens} rows, "
                "one for each response token"
            )
        return self.batch.unflatten(values)

    def per_tap(self, values: Tensor) -> Tensor:
        """Spread values of sampled tokens at each tap (L, M) into (L, B, T), zero elsewhere."""
        return torch.stack([self.per_token(of_tap) for of_tap in values])


def all_latents(
    parts: Iterable[MicroBatch], tap: float, back: int = 0, first: bool = False
) -> Tensor:
    """Return what MicroBatch.latents() says of the sampled tokens of several micro-batches, (M, D)."""
    return torch.cat([part.latents(tap, back, first) for part in parts])


class Host:
    """What a dense reward may ask of the run that it is made for."""

    def __init__(self, model: Model, config, make_policy: Callable[[], Policy], names_flow: bool):
        """Take the model, the run's settings, and what makes the policy; it has not learnt yet.

        names_flow: whether --flow names the flow, or it was found
        """
        self.model = model
        self.config = config  # of train_rl.py
        self.seed: int = config.seed
        self.make_policy = make_policy
        self.names_flow = names_flow

    @cached_property
    def policy(self) -> Policy:
        """The policy: loaded when it is first asked for, so that other errors come before."""
        return self.make_policy()

    def solutions(self, file: str, held_out: int = 0) -> tuple[list, list]:
        """Load expert solutions as rows of tokens: all but the last `held_out`, and these."""
        problems = self.config.problems
        settings = SolutionSettings(
            problem_column=problems.problem_column,
            images_column=problems.images_column,
            media_dir=problems.media_dir,
            template=problems.template,
            max_prompt_tokens=problems.max_prompt_tokens,
            cutoff=problems.max_prompt_tokens + self.config.sampling.max_tokens,
        )
        rows = load_solutions(file, settings, self.model)
        n_fitted = len(rows) - held_out
        if n_fitted < 1:
            raise ValueError(
                f"{held_out} of {len(rows)} solutions in {file} held out: expected fewer"
            )
        return rows[:n_fitted], rows[n_fitted:]

    @torch.no_grad()
    def run_policy(self, rows: Sequence, taps: Sequence[float]) -> Iterator[MicroBatch]:
        """Yield micro-batches of rows through the policy, the same ones on every rank.

        All ranks take all of them together.
        """
        layers = tap_layers(self.policy.n_layers, taps)
        budget = self.config.compute.tokens_per_gpu
        rows = batching.encode_images(self.policy.image_encoder, rows, budget)
        for indices, batch in batching.micro_batches(rows, budget, 0, 1):
            output = self.policy(batch, self.config.sampling.temperature, layers)
            chosen = [rows[index] for index in indices]
            yield MicroBatch(batch, chosen, indices, output, taps)

    def load_policy(self, folder: str) -> Policy:
        """Load another policy of the same tokenizer; it does not learn, and every rank holds it whole."""
        policy = load_policy(folder, self.config.loading.trust_remote_code)
        return policy.to(parallel.DEVICE).requires_grad_(False)


# ---- What a dense reward is
@dataclass(frozen=True)
class NoSettings:
    """A reward without settings of its own."""


@dataclass(frozen=True)
class ExpertSettings:
    """Settings of a reward that is fitted to expert solutions; a file's own may follow them."""

    experts: str  # file of expert solutions
    held_out: int = 64  # the last of them, on which nothing is fitted but the calibration


class DenseReward:
    """A reward of each response token. The defaults are those of one that neither learns nor taps."""

    Settings: type = NoSettings  # a dataclass; `--dense NAME=VALUE` sets its fields
    taps: Sequence[float] = ()  # fractions of the depth at which it reads latents
    reads_first = False  # also the latents of the policy before it learnt, on the same tokens
    clamp: tuple[float, float] | None = None  # of shaped scores, unless --dense-clamp is given
    layers: Sequence[int] = ()  # the decoder layers of its taps
    module: nn.Module | None = None  # what is saved, resumed and exported with the run
    learns = False  # whether the module gets gradients from score() and makes optimiser steps
    is_kept = True  # whether a checkpoint holds the module even if it does not learn
    takes_dtype = False  # whether the module computes in the policy's dtype, or else in float32
    lr = 1e-4
    betas = (0.9, 0.999)
    weight_decay = 0.01
    name = "dense"  # in figures, records and files; that of the file
    is_prepared = False  # whether the run knows what there is to save

    def __init__(self, settings, host: Host):
        """Take settings of the class Settings; fit here what is fitted to expert solutions."""

    @classmethod
    def make(cls, values: Mapping[str, str], host: Host) -> "DenseReward":
        """Make a reward with settings given as texts."""
        return cls(parse_settings(cls.Settings, values), host)

    def keep(self, **tensors: Tensor) -> None:
        """Keep tensors as self.module.NAME: they are saved, resumed and exported with the run."""
        if self.module is None:
            self.module = nn.Module()
        known = dict(self.module.named_buffers())
        for name, tensor in tensors.items():
            is_known = name in known and known[name].shape == tensor.shape
            if self.is_prepared and not is_known:
                raise ValueError(
                    f"{self.name}: {name} kept after the start; keep a tensor of that name and shape "
                    "in __init__, which a resumed run fills"
                )
            self.module.register_buffer(name, tensor.to(parallel.DEVICE))

    def calibrate(self, values: Iterable[Tensor]) -> None:
        """Keep mean and spread of the values of expert tokens, for excess().

        values: of each micro-batch, (M,) or (L, M)
        """
        parts = [] if torch.is_tensor(values) else list(values)
        if not parts:
            raise ValueError(
                f"{self.name}: calibrate() got no list; expected a tensor for each part"
            )
        of_all = torch.cat(parts, dim=-1)
        spread = of_all.std(dim=-1)
        n_broken = int((~of_all.isfinite()).sum())
        if n_broken or (of_all.amax(dim=-1) == of_all.amin(dim=-1)).any():
            raise ValueError(
                f"{self.name}: calibrate() got {of_all.numel()} values of expert tokens, {n_broken} "
                f"of them not finite, with the spread {spread.tolist()}, by which excess() would "
                "divide; expected finite values that differ"
            )
        self.keep(expert_mean=of_all.mean(dim=-1), expert_spread=spread)

    def excess(self, values: Tensor) -> Tensor:
        """Return by how many spreads of expert tokens values (M,) or (L, M) exceed their mean."""
        if not hasattr(self.module, "expert_mean"):
            raise ValueError(
                f"{self.name}: excess() without calibrate(), which __init__ has to call with the "
                "values of expert tokens"
            )
        mean, spread = self.module.expert_mean, self.module.expert_spread  # () or (L,)
        excess = (values - mean[..., None]) / spread[..., None]
        return excess.view_as(values) if excess.numel() == values.numel() else excess

    def begin(self, step: int, episodes: Sequence) -> None:
        """Begin to score a step's episodes, which are graded; all ranks know all of them."""
        self.step = step
        if self.module is not None:
            parallel.begin_calls(self.module)

    def score(self, part: MicroBatch) -> "Tensor | Scores":
        """Return the score of each response token: (B, T), or (L, B, T) by tap.

        A reward that learns leaves the gradient of its loss on its module here.
        """
        raise NotImplementedError

    def end(self) -> None:
        """End the scoring of a step: sum the module's gradient over the ranks."""
        if self.module is None:
            return
        has_gradient = any(p.grad is not None for p in self.module.parameters())
        if has_gradient and not self.learns:
            raise parallel.OfOneRankError(
                f"{self.name}: score() leaves a gradient on the module, which does not learn; set "
                "learns = True, or run the module under torch.no_grad()"
            )
        has_learnt = self.learns and any(parallel.gather_objects(has_gradient))
        parallel.end_calls(self.module, has_learnt)

    def shape(self, score: Tensor, mask: Tensor) -> Tensor:
        """Turn the scores (B, T) of a step, means over taps, into rewards (B, T), higher is better.

        mask: (B, T) bool, tokens that have a score
        """
        return score

    def figures(self) -> dict[str, float]:
        """Return figures of a step's scoring by names of your own; all ranks together."""
        return {}

    def update(self, learner: parallel.Learner, clip_norm: float) -> dict[str, float]:
        """Take the optimiser step of the module, with the gradient of the scoring; return figures."""
        return {f"{self.name}/grad_norm": learner.step(self.lr, clip_norm)}

    def export(self, folder: Path) -> None:
        """Write what is fitted or has learnt into folder/NAME; all ranks together."""
        if self.module is not None:
            export_module(self.module, folder / self.name)


class Scores(NamedTuple):
    """What a dense reward says of a micro-batch."""

    values: Tensor  # (L, B, T) by tap, or of no tap with L = 1
    mask: Tensor  # (B, T) bool, tokens that have a score


def parse_settings(kind: type, values: Mapping[str, str]):
    """Return a dataclass with fields given as texts; ValueError for one that is unknown or missing."""
    known = get_type_hints(kind)
    given = {}
    for name, text in values.items():
        if name not in known:
            raise ValueError(
                f"--dense {name}={text}: the dense reward has no such setting; "
                f"expected {', '.join(known) or 'none'}"
            )
        given[name] = kinds.from_text(text, known[name])
    try:
        needed = [f.name for f in fields(kind) if f.default is f.default_factory is MISSING]
        missing = [f"{name}=VALUE" for name in needed if name not in given]
        if missing:
            raise ValueError(f"give it {' '.join(missing)}, for which there is no default")
        settings = kind(**given)
        kinds.check_kinds(settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{' '.join(['--dense', *values])}: {error}") from error
    return settings


# What begins the names of a run's other figures, or names a part of its folder
TAKEN = (
    *("adapter", "checkpoints", "eval", "exports", "flow", "grader", "memory", "mismatch"),
    *("policy", "progress", "reward", "rollouts", "tensorboard", "time", "wandb"),
)


def make(name: str, values: Mapping[str, str], host: Host) -> DenseReward:
    """Make the flow reward, for the name `flow`, or that of a file with its settings."""
    if name == "flow":
        return FlowReward.make(values, host)
    return load_file(name, values, host)


def load_file(path: str, values: Mapping[str, str], host: Host) -> DenseReward:
    """Make the dense reward of a file. ValueError if the file or a setting does not do."""
    name = Path(path).stem
    if not is_file(path) or not name.isidentifier():
        raise ValueError(f"{path}: expected a Python file with a name such as my_reward.py")
    if name in TAKEN:
        raise ValueError(
            f"--shaping {path}: the reward would be called {name}, as other figures of a run are; "
            "give the file another name"
        )
    kind = getattr(import_file(path), "Reward", None)
    if not (isinstance(kind, type) and issubclass(kind, DenseReward)):
        raise ValueError(
            f"--shaping {path} defines no class Reward(dense.DenseReward), see docs/dense-rewards.md"
        )
    kind.name = name  # for what is wrong while it is made
    with parallel.fork_rng():
        torch.manual_seed(host.seed)  # the same weights on all ranks, and in every run of the seed
        reward = kind.make(values, host)
    reward.name = name  # it may have made one of another class
    return reward


def as_values(pairs: Sequence[str]) -> dict[str, str]:
    """Return NAME=VALUE texts as a dict."""
    values = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--dense {pair!r}: expected NAME=VALUE")
        values[name] = value
    return values


def prepare(reward: DenseReward, n_layers: int, dtype: torch.dtype, cpu_offload: bool) -> None:
    """Find the layers of a reward's taps, and shard its module over the ranks.

    Errors as of check_attributes.
    """
    check_attributes(reward)
    reward.layers = tap_layers(n_layers, reward.taps)
    reward.is_prepared = True
    if reward.module is not None and any(True for _ in reward.module.parameters()):
        kept_in = dtype if reward.takes_dtype else torch.float32
        parallel.shard(reward.module, (), kept_in, cpu_offload)


def check_attributes(reward: DenseReward) -> None:
    """Raise ValueError for what a reward has, or lacks, that cannot work."""
    taps, clamp = reward.taps, reward.clamp
    if not are_numbers(taps) or not all(0 <= tap <= 1 for tap in taps):
        raise ValueError(f"{reward.name}: taps={taps}; expected fractions of the depth in [0, 1]")
    is_interval = are_numbers(clamp) and len(clamp) == 2 and clamp[0] < clamp[1]
    if clamp is not None and not is_interval:
        raise ValueError(f"{reward.name}: clamp={clamp}; expected two numbers, the lower one first")
    if reward.learns and reward.module is None:
        raise ValueError(
            f"{reward.name}: learns = True, and no module; set self.module, or learns = False"
        )
    if reward.learns and not (are_numbers([reward.lr]) and 0 <= reward.lr < torch.inf):
        raise ValueError(f"{reward.name}: lr={reward.lr}; expected a finite number, 0 or more")
    if type(reward).score is DenseReward.score:
        raise ValueError(f"{reward.name}: its class Reward has no method score(part); write one")


def are_numbers(values: object) -> bool:
    """Return whether something is a sequence of numbers."""
    return isinstance(values, Sequence) and all(isinstance(value, Real) for value in values)


def kept(reward: DenseReward | None) -> dict[str, parallel.Kept]:
    """Return what a dense reward has fitted, for checkpoints; what learns is in its learner."""
    if not reward or reward.module is None or reward.learns or not reward.is_kept:
        return {}
    return {reward.name: parallel.Kept(reward.module)}


@contextmanager
def without_trace(reward: DenseReward) -> Iterator[None]:
    """Put back at the end what a block changes of a reward and of torch's generators.

    Of a reward these are its attributes, the contents of those that are tensors, generators, lists,
    dicts or sets, and the tensors and gradients of its module.
    """
    own = vars(reward).copy()
    state = copy.deepcopy(reward.module.state_dict()) if reward.module else {}
    for name, value in own.items():
        if isinstance(value, (Tensor, torch.Generator, list, dict, set)):
            vars(reward)[name] = value.clone() if torch.is_tensor(value) else copy.copy(value)
    with parallel.fork_rng():
        yield
    vars(reward).clear()
    vars(reward).update(own)
    if reward.module:
        reward.module.load_state_dict(state)
        reward.module.zero_grad()


def checked_scores(reward: DenseReward, part: MicroBatch) -> Scores:
    """Score a micro-batch; ValueError if what the reward returns is no score of its tokens."""
    result = reward.score(part)
    mask = part.batch.response_mask
    if isinstance(result, Scores):
        values, scored = result
        mask = mask & scored  # what the policy did not sample has no score
    else:
        values = result
    if not torch.is_tensor(values):
        raise ValueError(f"{reward.name}: score() returned {type(values).__name__}, no tensor")
    if values.ndim == 2:
        values = values[None]
    n_levels = max(1, len(reward.taps))
    shape = (n_levels if len(values) > 1 else 1, *mask.shape)
    if tuple(values.shape) != shape:
        raise ValueError(
            f"{reward.name}: score() returned a tensor {tuple(values.shape)}; expected (B, T) = "
            f"{tuple(mask.shape)}, or (L, B, T) with L = {n_levels} taps"
        )
    values = values.detach().float().masked_fill(~mask, 0.0)
    n_broken = int((~values.isfinite()).sum())
    if n_broken:
        raise parallel.OfOneRankError(
            f"{reward.name}: {n_broken} of {len(values) * int(mask.sum())} scores of response tokens "
            f"in a micro-batch of step {reward.step + 1} are not finite"
        )
    return Scores(values, mask)


def find_sameness(reward: DenseReward, score: Tensor, mask: Tensor) -> str | None:
    """Return an error if a reward says the same of every token: it could teach nothing.

    One that learns may do so at first, and one that compares the policy with what it was.

    score: (B, T) of a step's episodes; mask: (B, T) bool, tokens that have a score
    """
    values = score[mask]
    is_same = len(values) > 1 and values.max() == values.min()
    if reward.learns or reward.reads_first or not is_same:
        return None
    return (
        f"{reward.name}: all {len(values)} response tokens have the score {values[0].item():g}; "
        "a reward that is the same everywhere teaches nothing"
    )


# ---- From scores to rewards, and from rewards to advantages
def counts(settings: DenseSettings, step: int) -> bool:
    """Return whether the dense reward counts in a step, by --dense-after and --dense-until."""
    until = settings.dense_until
    return step >= settings.dense_after and (until is None or step < until)


def token_rewards(
    reward: DenseReward, score: Tensor, mask: Tensor, settings: DenseSettings, group_size: int
) -> Tensor:
    """Return each token's dense reward (B, T): dense_coef times its shaped score, clamped.

    With --dense-on response the mean of a response is clamped, not each token: single tokens of an
    expert differ from others, but in the mean they do not.

    score: (B, T), mean over taps; mask: (B, T) bool, tokens that have one
    """
    shaped = reward.shape(score, mask)
    if not torch.is_tensor(shaped):
        raise ValueError(f"{reward.name}: shape() returned {type(shaped).__name__}, no tensor")
    if shaped.shape != mask.shape or not shaped[mask].isfinite().all():
        raise ValueError(
            f"{reward.name}: shape() returned a tensor {tuple(shaped.shape)}; expected finite rewards "
            f"(B, T) = {tuple(mask.shape)}"
        )
    shaped = torch.where(mask, shaped, 0.0)
    if settings.dense_on == "response":
        shaped = rlfr.mean_over_tokens(shaped, mask)[:, None].expand(mask.shape)
    bounds = settings.dense_clamp or reward.clamp
    if bounds:
        shaped = shaped.clamp(*bounds)
    rewards = settings.dense_coef * torch.where(mask, shaped, 0.0)  # a clamp may not hold 0
    if settings.dense_centre:
        return rlfr.centre(rewards, mask, group_size)
    return rewards


def reward_of_responses(reward: Tensor, mask: Tensor, settings: DenseSettings) -> Tensor:
    """Return the dense reward of each response, (B,): the sum of its tokens', or the mean.

    With --dense-on response every token has the response's reward, of which the mean is that.
    """
    if settings.dense_on == "response":
        return rlfr.mean_over_tokens(reward, mask)
    return reward.sum(dim=1)


def credit(
    reward: Tensor,
    scored: Tensor,
    mask: Tensor,
    settings: DenseSettings,
    group_size: int,
    baseline: rlfr.Baseline,
) -> Tensor:
    """Return what token rewards (B, T) add to the advantage of each response token, (B, T).

    scored: (B, T) bool, tokens that have a score; mask: (B, T) bool, response tokens
    """
    if settings.dense_on == "token":
        return rlfr.token_returns(reward, mask, settings.gamma)
    of_response = reward_of_responses(reward, scored, settings)
    centred = rlfr.outcome_advantage(of_response, group_size, baseline, scaled=False)
    return centred[:, None] * mask


# ---- Figures
def own_figures(reward: DenseReward) -> dict[str, float]:
    """Return the figures that a reward has of its own, by their names in a run; ValueError if none."""
    figures = reward.figures()
    if not isinstance(figures, dict) or not are_numbers([*figures.values()]):
        raise ValueError(
            f"{reward.name}: figures() returned {shown(figures)}; expected a dict of numbers, "
            "tensors as .item()"
        )
    return {f"{reward.name}/{figure}": float(value) for figure, value in figures.items()}


def metrics(
    name: str,
    score: Tensor,
    scored: Tensor,
    reward: Tensor,
    correct: Tensor,
    settings: DenseSettings,
) -> dict[str, float]:
    """Return the figures of a step's dense rewards, and those of right and of wrong episodes.

    They are the mean score of a token, the mean dense reward of a response, and how many tokens
    have a reward. A step without right episodes has no figures of these, or of wrong.

    score, scored, reward: (B, T); correct: (B,) bool
    """
    n_scored = scored.sum().clamp(min=1)
    n_rewarded = (reward != 0).sum(dim=1).float()
    of_response = reward_of_responses(reward, scored, settings)
    figures = {
        f"{name}/score": (score.sum() / n_scored).item(),
        f"{name}/reward": of_response.mean().item(),
        f"{name}/tokens": n_rewarded.mean().item(),
        f"{name}/share": (n_rewarded.sum() / n_scored).item(),
    }
    for side, chosen in (("right", correct), ("wrong", ~correct)):
        if scored[chosen].any():
            mean = score[chosen].sum() / scored[chosen].sum()
            figures[f"{name}/score_{side}"] = mean.item()
            figures[f"{name}/reward_{side}"] = of_response[chosen].mean().item()
    return figures


# ---- The flow reward
def make_flow(
    path: str, settings: FlowRewardSettings, model: Model, n_blocks: int, seed: int
) -> fl.Flow:
    """Load the flow of the offline start, or make an untrained one of n_blocks for the path `new`."""
    dim = model.text_config.hidden_size
    if path != "new":
        flow = fl.load_flow(
            path, dim, model.norm_eps, settings.contexts, percentiles=settings.percentiles
        )
        if settings.flow_scope == "expert":
            flow.expert_scale(settings.reward_times)  # raises where there is none
        return flow
    if settings.flow_scope == "expert":
        raise ValueError(
            "flow_scope=expert needs a flow that train_flow.py has calibrated on expert solutions; "
            "expected --flow FOLDER, got new"
        )
    asked = {"contexts": settings.contexts, "percentiles": settings.percentiles}
    given = {name: value for name, value in asked.items() if value}
    flow_config = fl.FlowConfig(dim, n_blocks, norm_eps=model.norm_eps, **given)
    torch.manual_seed(seed)  # the same flow on all ranks
    return fl.Flow(flow_config)


def check_fitted(flow: fl.Flow, fingerprint: str, path: str, is_named: bool) -> None:
    """Say that a flow was fitted to another policy; ValueError if nobody has named it.

    fingerprint: of the policy's weights
    """
    if flow.config.fitted_to in (None, fingerprint):
        return
    found = f"the flow {path} was fitted to the latents of other weights than this model's"
    if not is_named:
        raise ValueError(
            f"{found}; fit one to these with train_flow.py, or name this one with --flow {path} "
            "if you mean it"
        )
    if parallel.is_first():
        print(f"{found}, as --flow asks")


class FlowReward(DenseReward):
    """Reward tokens whose latents fit the flow; the flow learns from the policy's right answers.

    Its score is the velocity deviation, or the excess of the velocity error over expert tokens.
    """

    name = "flow"
    takes_dtype = True
    is_kept = False  # a flow that is frozen is in its own file

    def __init__(
        self,
        flow: fl.Flow,
        n_layers: int,
        settings: FlowRewardSettings,
        learning: FlowUpdateSettings,
        seed: int,
        group_size: int,
    ):
        """Take a flow and the number of the policy's layers; the seed is that of its noise."""
        self.module = flow
        self.taps = flow.config.percentiles
        self.depths = [tap / n_layers for tap in tap_layers(n_layers, self.taps)]
        self.settings = settings
        self.learning = learning
        self.learns = learning.flow_lr > 0
        self.lr = learning.flow_lr
        self.seed = seed
        self.group_size = group_size
        if settings.flow_scope == "expert":
            self.clamp = (-10.0, 0.0)

    @classmethod
    def make(cls, values: Mapping[str, str], host: Host) -> "FlowReward":
        """Load the flow that the settings name, and make a reward of it; a file may subclass it."""
        own = parse_settings(cls.Settings, values)
        config = host.config
        if config.flow is None:
            raise ValueError("the reward is of a flow: name it with --flow FOLDER, or --flow new")
        n_blocks = published_settings(host.model)["flow_blocks"]
        flow = make_flow(
            config.flow, config.flow_reward, host.model, n_blocks=n_blocks, seed=config.seed
        )
        check_fitted(flow, host.policy.fingerprint, config.flow, is_named=host.names_flow)
        parallel.compile_forward([flow.model], config.compute.compile)
        settings = (config.flow_reward, config.flow_update)
        group_size = config.sampling.group_size
        reward = cls(flow, host.policy.n_layers, *settings, seed=config.seed, group_size=group_size)
        reward.own = own  # the settings of a file that subclasses this, of its class Settings
        return reward

    def begin(self, step: int, episodes: Sequence) -> None:
        """Begin to score a step's episodes; the flow accepts those that are right."""
        super().begin(step, episodes)
        correct = [episode.verdict.correct for episode in episodes]
        self.accepted = torch.tensor(correct, device=parallel.DEVICE)
        self.loss = torch.zeros((), device=parallel.DEVICE)

    def score(self, part: MicroBatch) -> Scores:
        """Score the latents of a micro-batch's response tokens, and let the flow learn from them.

        The indices of the episodes key the noise, so that a score does not depend on how episodes
        are batched. The flow's loss leaves its gradient on the flow, none on the policy.
        """
        flow = self.module
        batch = part.batch
        rows = fl.make_rows(
            flow.config, part.output.latents, self.depths, batch.attention_mask, batch.targets
        )
        rows = flow.standardise(rows)
        lengths = batch.response_mask.sum(dim=1).tolist()
        keys = [("flow noise", self.seed, self.step, index) for index in part.indices]
        noise, z = fl.draw(flow.config, keys, lengths, parallel.DEVICE)
        times = self.settings.reward_times
        learn_at = None  # the times of the reward
        if self.learning.flow_times != "reward":
            learn_at = fl.draw_times(z, self.learning.flow_times)
        scale = None
        if self.settings.flow_scope == "expert":
            scale = flow.expert_scale(times)
        weight = self.loss_weights(part) if self.learns else None
        by_tap, loss = fl.score_and_learn(
            flow, rows, noise, times, weight, learn_at=learn_at, scale=scale
        )
        if self.learns:
            self.loss += (weight * loss).sum()
        has_context = rows.exists.any(dim=1).any(dim=0)  # (M,)
        deviation = torch.stack([batch.unflatten(values) for values in by_tap])
        return Scores(deviation, batch.unflatten(has_context))

    def loss_weights(self, part: MicroBatch) -> Tensor:
        """Return the weight of each response token of a micro-batch in the online flow loss, (M,).

        Over all episodes of the step, on all ranks, the weights sum to 1, unless all of them are 0.
        """
        soft = self.learning.flow_soft
        mask = part.batch.response_mask
        token_weight, episode_weight = rlfr.online_flow_weights(
            mask,
            self.accepted[part.indices],
            part.output.entropy,
            self.learning.flow_entropy_quantile,
            soft,
        )
        total = torch.where(self.accepted, 1.0, soft).sum().clamp(min=1e-9)
        weight = token_weight * episode_weight[:, None] / total  # (B, T) of the micro-batch
        return weight[mask]

    def end(self) -> None:
        """Sum the flow's gradient over the ranks."""
        has_learnt = self.learns and bool(self.accepted.any() or self.learning.flow_soft > 0)
        parallel.end_calls(self.module, has_learnt)

    def shape(self, score: Tensor, mask: Tensor) -> Tensor:
        """Penalise deviation (B, T): the selected, normalised scores (paper), or the excess as it is."""
        settings = self.settings
        if settings.flow_scope == "expert":
            return -score
        rows_together = self.group_size if settings.flow_scope == "group" else 1
        normalised = rlfr.normalise(
            score, mask, settings.flow_bilateral, rows_together=rows_together
        )
        return -rlfr.select(
            normalised, settings.flow_threshold, settings.flow_top_k, settings.flow_bilateral
        )

    def update(self, learner: parallel.Learner, clip_norm: float) -> dict[str, float]:
        """Take the flow's optimiser step, with the gradient of the scoring; return its figures."""
        loss = parallel.sum_over_ranks(self.loss).item()
        return {f"{self.name}/loss": loss, **super().update(learner, clip_norm)}

    def export(self, folder: Path) -> None:
        """Write the flow as train_flow.py does; all ranks together."""
        fl.export_flow(self.module, folder / "flow")
