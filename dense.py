"""The dense reward: what the policy's own latents say about each response token, here by the flow.

It takes part in a step three times:
    FlowReward.begin_scoring, score, end_scoring    while the policy scores: latents -> scores
    token_rewards, credit                           scores -> rewards of tokens -> their advantage
    FlowReward.update                               the optimiser step of its own network

Equations, each with its function:
    reward of token k = -coef * s', s' the selected score (paper) or clamped excess    token_rewards
    its advantage: sum_{j>=k} gamma^(j-k) * reward_j, or the response's, centred       credit
    online loss: flow matching on accepted episodes, by rejection sampling       FlowReward.score
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

import flow as fl
import rlfr
from infra import batching, parallel
from infra.models import Model
from infra.ranges import (
    Fraction,
    NonNegativeInt,
    OpenFraction,
    PositiveFloat,
    PositiveInt,
    SignedFloat,
)
from policy import PolicyOutput, tap_layers


# ---- Settings; None: from the flow, or as the comment says
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
    # expert: the flow's own on expert tokens, and threshold, top-k and bilateral do not count
    flow_scope: Literal["response", "group", "expert"] = "response"
    flow_cap: PositiveFloat = 10.0  # Largest excess over expert tokens, in their spreads
    flow_centre: bool = False  # Subtract the group's mean from the tokens' flow rewards
    flow_bilateral: bool = False  # Normalise to [-1, 1] and keep both tails
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
    # Weight of episodes and tokens that are not accepted; 1: the flow learns from all alike
    flow_soft: Fraction = 0.0
    # Learn only from tokens at or above this quantile of entropy
    flow_entropy_quantile: Fraction | None = None
    # Times to learn at: those of the reward, or drawn, as a sigmoid of a normal or uniformly
    flow_times: Literal["reward", "random", "uniform"] = "reward"


def check(settings: FlowRewardSettings) -> None:
    """Raise ValueError for settings of the flow reward that cannot work."""
    if settings.contexts is not None:
        fl.check_contexts(settings.contexts)
    if not settings.other_contexts:
        return
    if settings.contexts is None:
        raise ValueError("other_contexts without contexts: name those to score with in --contexts")
    if settings.flow_scope == "expert":
        raise ValueError(
            "other_contexts with flow_scope='expert': the flow was calibrated with its own "
            "contexts; leave --other-contexts out, or choose another --flow-scope"
        )


# ---- The flow
def make_flow(
    path: str, settings: FlowRewardSettings, model: Model, n_blocks: int, seed: int
) -> fl.Flow:
    """Load the flow of the offline start, or make an untrained one of n_blocks for the path `new`."""
    dim = model.text_config.hidden_size
    if path != "new":
        expected = {"contexts": settings.contexts, "percentiles": settings.percentiles}
        flow = fl.load_flow(path, dim, model.norm_eps, settings.other_contexts, **expected)
        if settings.flow_scope == "expert":
            flow.expert_scale(settings.reward_times)  # raises where there is none
        return flow
    if settings.flow_scope == "expert":
        raise ValueError(
            "flow_scope=expert needs a flow that train_flow.py has calibrated on expert solutions; "
            "expected --flow FOLDER, got new"
        )
    flow_config = fl.FlowConfig(dim, n_blocks, norm_eps=model.norm_eps)
    if settings.contexts:
        flow_config = replace(flow_config, contexts=settings.contexts)
    if settings.percentiles:
        flow_config = replace(flow_config, percentiles=settings.percentiles)
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


# ---- The flow reward
class LatentScores(NamedTuple):
    """What the flow says of a micro-batch."""

    deviation: Tensor  # (L, B, T) velocity deviation, or its excess over expert tokens, by tap
    mask: (
        Tensor  # (B, T) bool, tokens that have a score: not the last one if the context is the next
    )


class FlowReward:
    """Reward tokens whose latents fit the flow; the flow learns from the policy's right answers."""

    def __init__(
        self,
        flow: fl.Flow,
        n_layers: int,
        settings: FlowRewardSettings,
        learning: FlowUpdateSettings,
        seed: int,
    ):
        """Take a flow and the number of the policy's layers; the seed is that of its noise."""
        self.flow = flow
        self.taps = tap_layers(n_layers, flow.config.percentiles)
        self.depths = [tap / n_layers for tap in self.taps]
        self.settings = settings
        self.learning = learning
        self.learns = not learning.freeze_flow
        self.seed = seed

    def begin_scoring(self, step: int, correct: Tensor) -> None:
        """Begin to score a step's episodes; correct (B,) bool says which of them the flow accepts."""
        self.step = step
        self.accepted = correct
        self.loss = torch.zeros((), device=parallel.DEVICE)
        parallel.begin_calls(self.flow)

    def score(
        self, batch: batching.Batch, output: PolicyOutput, indices: Sequence[int]
    ) -> LatentScores:
        """Score the latents of a micro-batch's response tokens, and let the flow learn from them.

        indices: of the micro-batch's episodes in the step; they key the noise, so that a score does
            not depend on how episodes are batched
        The flow's loss leaves its gradient on the flow, none on the policy.
        """
        config = self.flow.config
        rows = fl.make_rows(
            config, output.latents, self.depths, batch.attention_mask, batch.targets
        )
        rows = self.flow.standardise(rows)
        lengths = batch.response_mask.sum(dim=1).tolist()
        keys = [("flow noise", self.seed, self.step, index) for index in indices]
        noise, z = fl.draw(config, keys, lengths, parallel.DEVICE)
        times = self.settings.reward_times
        learn_at = None  # the times of the reward
        if self.learning.flow_times != "reward":
            learn_at = fl.draw_times(z, self.learning.flow_times)
        scale = None
        if self.settings.flow_scope == "expert":
            scale = self.flow.expert_scale(times)
        weight = self.loss_weights(batch, output.entropy, indices) if self.learns else None
        _, loss, by_tap = fl.score_and_learn(
            self.flow, rows, noise, times, weight, learn_at=learn_at, scale=scale
        )
        if self.learns:
            self.loss += (weight * loss).sum()
        has_context = rows.exists.any(dim=1).any(dim=0)  # (M,)
        deviation = torch.stack([batch.unflatten(values) for values in by_tap])
        return LatentScores(deviation, batch.unflatten(has_context))

    def loss_weights(
        self, batch: batching.Batch, entropy: Tensor, indices: Sequence[int]
    ) -> Tensor:
        """Return the weight of each response token of a micro-batch in the online flow loss, (M,).

        Over all episodes of the step, on all ranks, the weights sum to 1, unless all of them are 0.
        """
        soft = self.learning.flow_soft
        token_weight, episode_weight = rlfr.online_flow_weights(
            batch.response_mask,
            self.accepted[indices],
            entropy,
            self.learning.flow_entropy_quantile,
            soft,
        )
        total = torch.where(self.accepted, 1.0, soft).sum().clamp(min=1e-9)
        weight = token_weight * episode_weight[:, None] / total  # (B, T) of the micro-batch
        return weight[batch.response_mask]

    def end_scoring(self) -> None:
        """Sum the flow's gradient over the ranks."""
        has_learnt = self.learns and bool(self.accepted.any() or self.learning.flow_soft > 0)
        parallel.end_calls(self.flow, self.flow.example(parallel.DEVICE), has_learnt)

    def update(self, learner: parallel.Learner, clip_norm: float) -> dict[str, float]:
        """Take the flow's optimiser step, with the gradient of the scoring; return its figures."""
        return {
            "flow/loss": parallel.sum_over_ranks(self.loss).item(),
            "flow/grad_norm": learner.step(self.learning.flow_lr, clip_norm),
        }


# ---- From scores to rewards, and from rewards to advantages
def token_rewards(
    score: Tensor, mask: Tensor, settings: FlowRewardSettings, group_size: int
) -> Tensor:
    """Return each token's flow reward (B, T): -flow_coef times its score in [0, 1] or [-1, 1].

    That is the selected, normalised score (paper), or the clamped excess over expert tokens. The
    excess of a response, --flow-on response, is averaged before it is clamped: single tokens of an
    expert have an excess, too, but in the mean they have none.

    score: (B, T), mean over taps; mask: (B, T) bool, tokens that have one
    """
    if settings.flow_scope == "expert":
        if settings.flow_on == "response":
            score = rlfr.mean_over_tokens(score, mask)[:, None].expand(mask.shape)
        penalty = rlfr.clamp_excess(score, mask, settings.flow_cap)
    else:
        rows_together = group_size if settings.flow_scope == "group" else 1
        normalised = rlfr.normalise(
            score, mask, settings.flow_bilateral, rows_together=rows_together
        )
        penalty = rlfr.select(
            normalised, settings.flow_threshold, settings.flow_top_k, settings.flow_bilateral
        )
    reward = -settings.flow_coef * penalty
    if settings.flow_centre:
        return rlfr.centre(reward, mask, group_size)
    return reward


def reward_of_responses(reward: Tensor, mask: Tensor, settings: FlowRewardSettings) -> Tensor:
    """Return the flow reward of each response, (B,): the sum of its tokens', or the mean.

    With --flow-on response every token has the response's reward, of which the mean is that.
    """
    if settings.flow_on == "response":
        return rlfr.mean_over_tokens(reward, mask)
    return reward.sum(dim=1)


def credit(
    reward: Tensor,
    scored: Tensor,
    mask: Tensor,
    settings: FlowRewardSettings,
    group_size: int,
    baseline: rlfr.Baseline,
) -> Tensor:
    """Return what token rewards (B, T) add to the advantage of each response token, (B, T).

    scored: (B, T) bool, tokens that have a score; mask: (B, T) bool, response tokens
    """
    if settings.flow_on == "token":
        return rlfr.token_returns(reward, mask, settings.gamma)
    of_response = reward_of_responses(reward, scored, settings)
    # grpo only centres it: divided by its own spread, no coefficient would be left of it
    centring = "dr_grpo" if baseline == "grpo" else baseline
    centred = rlfr.outcome_advantage(of_response, group_size, centring)
    return centred[:, None] * mask


# ---- Figures
def metrics(
    score: Tensor, scored: Tensor, reward: Tensor, correct: Tensor, settings: FlowRewardSettings
) -> dict[str, float]:
    """Return the figures of a step's flow rewards, and those of right and of wrong episodes.

    They are the mean velocity deviation of a token, the mean flow reward of a response, and how
    many tokens have a reward. A step without right episodes has no figures of these, or of wrong.

    score, scored, reward: (B, T); correct: (B,) bool
    """
    n_scored = scored.sum().clamp(min=1)
    n_rewarded = (reward != 0).sum(dim=1).float()
    of_response = reward_of_responses(reward, scored, settings)
    figures = {
        "flow/score": (score.sum() / n_scored).item(),
        "flow/reward": of_response.mean().item(),
        "flow/tokens": n_rewarded.mean().item(),
        "flow/share": (n_rewarded.sum() / n_scored).item(),
    }
    for name, chosen in (("right", correct), ("wrong", ~correct)):
        if scored[chosen].any():
            deviation = score[chosen].sum() / scored[chosen].sum()
            figures[f"flow/score_{name}"] = deviation.item()
            figures[f"flow/reward_{name}"] = of_response[chosen].mean().item()
    return figures
