"""The algorithm: shaping of the flow reward, advantages, losses, weights, the learning rate.

Shapes as in flow.py. Tensors in, tensors out: this file imports none of ours.

Equations, each with its function:
    s' = (s - min)/(max - min) per response or group                     normalise
    keep s' > threshold, then the top k (times -coef in dense.py)        select
    A_outcome = (r - mean)/(std + 1e-9), or rloo, dr_grpo, reinforce++   outcome_advantage
    A_k = A_outcome + sum_{j>=k} gamma^(j-k) * flow_reward_j             token_returns
    A_k + min(alpha*H_k, |A_k|/kappa)                                    entropy_advantage
    ppo    -min(rho*A, clip(rho, 1-eps, 1+eps_high)*A)                   ppo_loss
    gspo   ppo with s*pi/sg[pi] for rho, s = sg[exp(mean of log rho)]    gspo_loss
    cispo  -sg[clip(rho, 1-eps, 1+eps_high)]*A*log pi                    cispo_loss
    k1, k2, k3 to a reference                                            kl_divergence
    weights pi_train/pi_sampler, truncated or masked                     importance_weights
    rejection sampling for the online flow update                        online_flow_weights
rho is the ratio pi/pi_old of a token, and sg stops the gradient.

Departures from the official code: the minimum is taken over the response (there it is the second
smallest value, and constant rows give NaN); equal rewards have advantage 0 (there a group of 0.7
gets 0.92 from rounding); the flow's losses have one denominator, as the policy's (there they are
means of micro-batch means).
"""

import math
from typing import Literal

import torch
from torch import Tensor

# A new baseline is a name here and a branch in outcome_advantage, and nothing else
Baseline = Literal["grpo", "rloo", "dr_grpo", "reinforce++", "reinforce"]
Normalisation = Literal["sequence", "token", "constant"]
KLKind = Literal["k1", "k2", "k3"]
Mismatch = Literal["none", "token", "sequence", "mask"]
Loss = Literal["ppo", "gspo", "cispo"]

RATIO_CAP = 3.0  # largest ratio in the PPO loss


# ---- Flow reward (paper: flow reward shaping)
def normalise(
    score: Tensor, mask: Tensor, bilateral: bool, power: float = 1.0, rows_together: int = 1
) -> Tensor:
    """Min-max normalise scores (B, T) over mask (B, T) to [0, 1]; zero outside mask.

    bilateral: to [-1, 1]
    power: exponent, applied in [0, 1]; the official code has it, and training leaves it at 1
    rows_together: how many rows share a minimum and a maximum: 1 (paper), or G to keep what tells
        the responses of a group apart
    Scores that are all equal become zero.
    """
    # a row is what is normalised together
    scope_mask = mask.view(-1, rows_together * mask.shape[1])
    values = score.reshape(scope_mask.shape)
    low = values.masked_fill(~scope_mask, torch.inf).amin(dim=1, keepdim=True)
    high = values.masked_fill(~scope_mask, -torch.inf).amax(dim=1, keepdim=True)
    spread = high - low
    unit = ((values - low) / spread).pow(power)
    if bilateral:
        unit = 2 * unit - 1
    return torch.where(scope_mask & (spread > 0), unit, 0.0).view(mask.shape)


def select(score: Tensor, threshold: float, top_k: int | None, bilateral: bool) -> Tensor:
    """Keep the tail of normalised scores (B, T): above the threshold, then the k largest.

    The others become zero. A threshold of 0 and a top_k of None keep everything. Bilateral keeps
    scores beyond the threshold on both sides: all of them if they are fewer than k, as in the
    official code, else the k//2 largest of each side.
    """
    tail = score
    if threshold > 0:
        is_beyond = score > threshold
        if bilateral:
            is_beyond = is_beyond | (score < -threshold)
        tail = torch.where(is_beyond, score, 0.0)
    if top_k is None or top_k >= score.shape[1]:
        return tail
    is_kept = torch.zeros_like(tail, dtype=torch.bool)
    if bilateral:
        largest = tail.topk(top_k // 2, dim=1)
        smallest = tail.topk(top_k // 2, dim=1, largest=False)
        is_kept.scatter_(1, largest.indices, True)
        is_kept.scatter_(1, smallest.indices, True)
    else:
        largest = tail.topk(top_k, dim=1)
        is_kept.scatter_(1, largest.indices, True)
    has_few = (tail != 0).sum(dim=1, keepdim=True) < top_k
    return torch.where(is_kept | has_few, tail, 0.0)


def mean_over_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of each row of values (B, T) over mask (B, T), (B,); 0 for an empty row."""
    count = mask.sum(dim=1).clamp(min=1)
    return (values * mask).sum(dim=1) / count


def centre(reward: Tensor, mask: Tensor, group_size: int) -> Tensor:
    """Subtract from token rewards (B, T) their mean over all tokens of the group; zero outside mask.

    Penalties alone make short responses better than long ones; centred, they do not.
    """
    n_tokens = mask.shape[1]
    group_mask = mask.view(-1, group_size * n_tokens)  # (N, G * T)
    mean = mean_over_tokens(reward.reshape(group_mask.shape), group_mask)  # (N,)
    per_episode = mean.repeat_interleave(group_size)[:, None]  # (B, 1)
    return torch.where(mask, reward - per_episode, 0.0)


# ---- Advantages
def varied_groups(reward: Tensor, group_size: int) -> Tensor:
    """Return which groups (N,) bool of rewards (B,) differ; in others no outcome is better."""
    groups = reward.view(-1, group_size)
    return groups.amax(dim=1) > groups.amin(dim=1)


def outcome_advantage(
    reward: Tensor, group_size: int, baseline: Baseline, scaled: bool = True
) -> Tensor:
    """Return the outcome advantage (B,) of rewards (B,), G consecutive episodes a group.

    grpo: (r - mean)/(std + 1e-9), where std divides by G - 1
    rloo: r - mean of the others
    dr_grpo, reinforce++: r - mean; the latter is whitened once the token part is added
    reinforce: r
    A group of equal rewards gets exactly 0, but for reinforce, the only one that takes G = 1.
    scaled: divide by spreads; dense.credit() does not, or its coefficient would cancel
    """
    if baseline == "reinforce":
        return reward.clone()
    groups = reward.view(-1, group_size)  # (N, G)
    advantage = groups - groups.mean(dim=1, keepdim=True)
    if baseline == "grpo" and scaled:
        advantage = advantage / (groups.std(dim=1, keepdim=True) + 1e-9)
    elif baseline == "rloo":
        advantage = advantage * group_size / (group_size - 1)
    else:
        assert baseline in ("grpo", "dr_grpo", "reinforce++"), f"unknown baseline {baseline!r}"
    is_varied = varied_groups(reward, group_size)[:, None]
    return torch.where(is_varied, advantage, 0.0).flatten()


def token_returns(reward: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Return sum_{j>=k} gamma^(j-k) * reward_j over response tokens, (B, T), of rewards (B, T).

    Tokens outside mask (B, T) bool, such as a tool's result, have no reward and discount nothing.
    """
    reward = reward * mask
    if gamma == 1.0:
        return reward.flip(1).cumsum(dim=1).flip(1) * mask
    returns = torch.zeros_like(reward)
    following = torch.zeros_like(reward[:, 0])  # (B,) the return from token k + 1 on
    for k in reversed(range(reward.shape[1])):
        following = torch.where(mask[:, k], reward[:, k] + gamma * following, following)
        returns[:, k] = following
    return returns * mask


def entropy_advantage(
    advantage: Tensor, entropy: Tensor, alpha: float = 0.4, kappa: float = 2.0
) -> Tensor:
    """Return A_k + min(alpha * H_k, |A_k| / kappa), (B, T), without a gradient through H.

    This is the baseline that the paper compares with, entropy-based advantage shaping.
    """
    bonus = torch.minimum(alpha * entropy.detach(), advantage.abs() / kappa)
    return advantage + bonus


def whiten(advantage: Tensor, mask: Tensor) -> Tensor:
    """Return advantages (B, T) with mean 0 and standard deviation 1 over all response tokens.

    For REINFORCE++-baseline. A single token gets 0.
    """
    values = advantage[mask]
    spread = values.std() if len(values) > 1 else 0.0  # a single token's is not defined
    whitened = (advantage - values.mean()) / (spread + 1e-8)
    return torch.where(mask, whitened, 0.0)


# ---- Losses
def token_weights(
    mask: Tensor, normalisation: Normalisation, n_episodes: int, n_tokens: int, max_tokens: int
) -> Tensor:
    """Return the weight (B, T) of each token in the loss of a whole optimiser step.

    sequence: mean over episodes of the mean over tokens
    token: mean over all tokens
    constant: sum over tokens divided by episodes * max_tokens (Dr. GRPO)
    n_episodes and n_tokens count the step's mini-batch, over all micro-batches and ranks.
    """
    if normalisation == "sequence":
        lengths = mask.sum(dim=1, keepdim=True).clamp(min=1)
        return mask / lengths / n_episodes
    if normalisation == "token":
        return mask / n_tokens
    return mask / (n_episodes * max_tokens)


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    mask: Tensor,
    loss: Loss,
    clip: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """Return the loss of each token (B, T), and where its clip binds (B, T) bool.

    logp, old_logp, advantage: (B, T), log-probs of the policy now and before the update
    mask: (B, T) bool, response tokens; a row is a whole response
    clip: how far below and above 1 a ratio counts, (low, high)
    Outside mask the results mean nothing. The caller weighs the tokens, see token_weights, and sums.
    A new loss is a name in Loss and a function that is called here, and nothing else.
    """
    if loss == "gspo":
        return gspo_loss(logp, old_logp, advantage, mask, clip)
    if loss == "cispo":
        return cispo_loss(logp, old_logp, advantage, clip)
    assert loss == "ppo", f"unknown loss {loss!r}"
    return ppo_loss(logp, old_logp, advantage, clip)


def ppo_loss(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, clip: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Return the PPO-clip loss, -min(rho*A, clip(rho, 1-low, 1+high)*A), and where the clip binds.

    rho = min(exp(logp - old_logp), RATIO_CAP). DAPO's clip-higher is high = 0.28. The cap, as
    official, bounds the loss of tokens with a negative advantage, which the clip does not.
    """
    log_ratio = (logp - old_logp).clamp(max=math.log(RATIO_CAP))
    return clipped_loss(log_ratio.exp(), advantage, clip)


def gspo_loss(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, mask: Tensor, clip: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Return the loss of GSPO-token, and where the clip binds (arXiv 2507.18071, section 4.3).

    As PPO's, with s_k = sg[s] * pi_k/sg[pi_k] in place of rho_k; s = exp(mean of logp - old_logp) is
    one number a response. So all its tokens are clipped by the same ratio, while each keeps an
    advantage of its own: where the clip does not bind, the gradient is -s * A_k * grad logp_k.
    The paper clips at low = 3e-4 and high = 4e-4, as s differs little from 1.
    """
    log_ratio = mean_over_tokens(logp - old_logp, mask)[:, None]  # (B, 1)
    of_token = (logp - logp.detach()).exp()  # (B, T) of ones, with the gradient of logp
    return clipped_loss(log_ratio.detach().exp() * of_token, advantage, clip)


def cispo_loss(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, clip: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Return the loss of CISPO, -sg[clip(rho, 1-low, 1+high)]*A*logp, and where the clip binds.

    The clip bounds a token's weight and drops no token's gradient (MiniMax-M1, arXiv 2506.13585,
    section 3.1). The paper bounds it from above alone, which low = 1 does, and takes the mean over
    all tokens, which is the normalisation `token`.
    """
    ratio = (logp.detach() - old_logp).exp()
    weight = ratio.clamp(1 - clip[0], 1 + clip[1])
    is_clipped = (weight != ratio) & (advantage != 0)
    return -weight * advantage * logp, is_clipped


def clipped_loss(
    ratio: Tensor, advantage: Tensor, clip: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Return -min(ratio*A, clip(ratio, 1-low, 1+high)*A), and where the second is less."""
    unclipped = ratio * advantage
    clipped = ratio.clamp(1 - clip[0], 1 + clip[1]) * advantage
    return -torch.minimum(unclipped, clipped), clipped < unclipped


def kl_divergence(logp: Tensor, ref_logp: Tensor, kind: KLKind) -> Tensor:
    """Return an estimate of the KL to a reference for each token, (B, T); d = logp - ref_logp.

    k1 = d (its gradient is 0 on average), k2 = d^2/2, k3 = e^-d - 1 + d.
    """
    d = logp - ref_logp
    if kind == "k1":
        return d
    if kind == "k2":
        return d.square() / 2
    assert kind == "k3", kind
    return torch.expm1(-d) + d


def mismatch_log_ratio(old_logp: Tensor, sampled_logp: Tensor, mask: Tensor) -> Tensor:
    """Return log of trainer's over sampler's probability, (B, T); 0 outside mask, and for NaN.

    old_logp, sampled_logp: (B, T), of trainer and sampler, which may give NaN
    """
    is_known = mask & ~sampled_logp.isnan()
    return torch.where(is_known, old_logp - sampled_logp, 0.0)


def importance_weights(
    old_logp: Tensor, sampled_logp: Tensor, mask: Tensor, mode: Mismatch, cap: float
) -> Tensor:
    """Return weights (B, T) that correct for a sampler whose probabilities differ from the trainer's.

    mode: none, weights of 1; token, min(ratio, cap); sequence, the same with the product of the
        response's ratios; mask, the ratio where it is at most the cap, 0 elsewhere
    """
    log_ratio = mismatch_log_ratio(old_logp, sampled_logp, mask)
    ratio = log_ratio.exp()
    if mode == "none":
        return torch.ones_like(ratio)
    if mode == "mask":
        return torch.where(ratio > cap, 0.0, ratio)
    if mode == "sequence":
        log_product = log_ratio.sum(dim=1, keepdim=True)
        ratio = log_product.exp().expand_as(ratio)
    return ratio.clamp(max=cap)


def mismatch_figures(
    old_logp: Tensor, sampled_logp: Tensor, mask: Tensor, cap: float
) -> dict[str, float]:
    """Return figures of the ratios of trainer's to sampler's probabilities, before the cap."""
    ratio = mismatch_log_ratio(old_logp, sampled_logp, mask)[mask].exp()
    return {
        "mismatch/ratio_mean": ratio.mean().item(),
        "mismatch/ratio_max": ratio.max().item(),
        "mismatch/over_cap": (ratio > cap).float().mean().item(),
        "mismatch/nan": sampled_logp[mask].isnan().sum().item(),
    }


def online_flow_weights(
    mask: Tensor, accepted: Tensor, entropy: Tensor | None, quantile: float | None, soft: float
) -> tuple[Tensor, Tensor]:
    """Weight tokens and rows of the online flow loss, by rejection sampling.

    The loss is sum_rows(b * sum_tokens(w*loss)/sum_tokens(w)) / sum_rows(b).
    accepted: (B,) bool, rows that have b = 1; the others have b = soft
    entropy: (B, T); tokens that reach the `quantile` of their response have w = 1, the others
        w = soft; without a quantile all have w = 1. (The official code takes the quantile over
        padding, too.)
    Returns w/sum(w), (B, T), and b, (B,); the caller divides by the step's sum of b.
    """
    row_weight = torch.where(accepted, 1.0, soft)
    token_weight = mask.float()
    if quantile is not None:
        response_entropy = entropy.masked_fill(~mask, torch.nan)
        threshold = response_entropy.nanquantile(quantile, dim=1, keepdim=True)  # (B, 1)
        token_weight = token_weight * torch.where(entropy >= threshold, 1.0, soft)
    return token_weight / token_weight.sum(dim=1, keepdim=True), row_weight


# ---- Schedule
def learning_rate(peak: float, step: int, total: int, warmup: float, floor: float = 0.1) -> float:
    """Return the rate of a step: it rises linearly, then falls along a cosine to floor * peak.

    warmup is the fraction of the total steps over which the rate rises.
    """
    n_warmup = math.ceil(warmup * total)
    if step < n_warmup:
        return peak * ((step + 1) / n_warmup)
    progress = (step - n_warmup) / max(1, total - n_warmup)
    cosine = 1 + math.cos(math.pi * progress)  # from 2 down to 0
    return peak * (floor + (1 - floor) * 0.5 * cosine)
