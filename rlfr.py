"""The algorithm: a policy with taps, token log-probs without logits, flow-reward shaping, advantages, policy loss.

Vision-language models are tapped in their text layers; a batch has the images of its episodes. Shapes as in flow.py.
Equations, each with its function:
    taps: layers round(p*n), latent = the layer's output                     tap_layers, Policy.forward
    log pi(y_k), H_k from hidden states, chunk by chunk                      TokenLogProbs
    s' = (s - min)/(max - min) per response or group                         normalise
    keep s' > threshold, then the top k (times -coef in train_rl.py)         select
    A_outcome = (r - mean)/(std + 1e-9), or rloo, dr_grpo, reinforce++        outcome_advantage
    A_k = A_outcome + sum_{j>=k} gamma^(j-k) * flow_reward_j                 token_returns
    A_k + min(alpha*H_k, |A_k|/kappa)                                        entropy_advantage
    -min(rho*A, clip(rho, 1-eps, 1+eps_high)*A)                              policy_loss
    k1, k2, k3 to a reference                                                kl_divergence
    weights pi_train/pi_sampler, truncated or masked                         importance_weights
    rejection sampling for the online flow update                            online_flow_weights

Departures from the official code: masked minimum (there the second-smallest value, NaN for constant rows); equal rewards
have advantage 0 (there -0.83 from rounding); one denominator an optimiser step (there a mean of micro-batch means).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

import vision
from flow import keyed_seed
from parallel import DEVICE

Baseline = Literal["grpo", "rloo", "dr_grpo", "reinforce++", "reinforce"]
Freeze = Literal["none", "vision"]
Normalisation = Literal["sequence", "token", "constant"]
Row = tuple  # of one episode: prompt ids, response ids and, if there are any, vision.Images
CHUNK_LOGITS = 2**25  # logits held at a time (128 MB in float32)


# ---- Batches: right-padded rows of prompt + response. Per-token results are (B, T), response token k in column k.
@dataclass
class Batch:
    """Right-padded episodes. Example, prompt lengths 2 and 1, responses 2 and 3 (`.` is padding):

    input_ids      p p r r      attention_mask 1 1 1 1      targets 0 0 1 1      response_mask 1 1 0
                   p r r r                     1 1 1 1              0 1 1 1                    1 1 1
    """

    input_ids: Tensor  # (B, S)
    attention_mask: Tensor  # (B, S) bool
    targets: Tensor  # (B, S) bool, positions of response tokens
    response_mask: Tensor  # (B, T) bool
    pixel_values: Tensor | None = None  # (n_patches, dim), of all rows' images in order
    image_grid_thw: Tensor | None = None  # (n_images, 3), patches of each: time, height, width

    def unflatten(self, values: Tensor) -> Tensor:
        """Spread values of response tokens (M,) into (B, T), zero elsewhere."""
        out = torch.zeros(self.response_mask.shape, dtype=values.dtype, device=values.device)
        out[self.response_mask] = values
        return out


def collate(rows: Sequence[Row]) -> Batch:
    """Make a batch of (prompt, response) token ids, each with at least one token, or (prompt, response, images)."""
    pairs, images = (
        [row[:2] for row in rows],
        [image for row in rows for image in row[2:] and row[2]],
    )
    lengths = [(len(prompt), len(prompt) + len(response)) for prompt, response in pairs]
    assert all(0 < start < end for start, end in lengths), (
        "an episode needs a prompt token and a response token"
    )
    width = max(end for _, end in lengths)
    ids = [
        [*prompt, *response] + [0] * (width - end)
        for (prompt, response), (_, end) in zip(pairs, lengths, strict=True)
    ]
    start, end = torch.tensor(lengths, device=DEVICE).T[:, :, None]  # (B, 1) each
    position = torch.arange(width, device=DEVICE)
    attention_mask, response_mask = (
        position < end,
        position[: int((end - start).max())] < end - start,
    )
    targets = attention_mask & (position >= start)
    return Batch(
        torch.tensor(ids, device=DEVICE),
        attention_mask,
        targets,
        response_mask,
        *vision.stack(images, DEVICE),
    )


def micro_batches(
    pairs: Sequence[Row], token_budget: int, rank: int = 0, n_ranks: int = 1
) -> Iterator[tuple[list[int], Batch]]:  # fmt: skip
    """Yield indices and batch of this rank's rows, like lengths together, longest first, rows * longest within the budget.

    Every rank has as many rows, of about as many tokens, and yields as many batches: sharded modules run in step.
    """
    assert len(pairs) % n_ranks == 0, f"{len(pairs)} rows for {n_ranks} ranks"
    lengths = [len(prompt) + len(response) for prompt, response, *_ in pairs]
    order = sorted(range(len(pairs)), key=lambda i: -lengths[i])
    plans = []
    for r in range(n_ranks):  # dealt back and forth: 0 1 2 2 1 0 0 1 2 ...
        share = [
            i for place, i in enumerate(order) if place % (2 * n_ranks) in (r, 2 * n_ranks - 1 - r)
        ]
        plan: list[list[int]] = []
        while share:
            size = max(1, token_budget // lengths[share[0]])
            plan, share = [*plan, share[:size]], share[size:]
        plans.append(plan)
    plan = plans[rank]
    while len(plan) < max(map(len, plans)):  # a rank with fewer batches splits its largest
        largest = max(range(len(plan)), key=lambda b: len(plan[b]))
        half = len(plan[largest]) // 2
        plan[largest : largest + 1] = [plan[largest][:half], plan[largest][half:]]
    for rows in plan:
        yield rows, collate([pairs[i] for i in rows])


# ---- Policy
def tap_layers(n_layers: int, percentiles: Sequence[float]) -> list[int]:
    """Return layer indices round(p * n_layers), clamped to n_layers - 1 (paper: p = 0.25, 0.5, 0.75)."""
    return [min(round(p * n_layers), n_layers - 1) for p in percentiles]


class TokenLogProbs(torch.autograd.Function):
    """log pi(target) and entropy of each row from hidden states; logits live a chunk at a time, in both directions.

    apply(hidden (M, D), weight (V, D), targets (M,), temperature, softcap | None) -> logp (M,), entropy (M,), float32.
    The backward recomputes each chunk: the gradient by scaled logits is p*(-g_logp - g_H*(log p + H)), + g_logp at the target.
    """

    @staticmethod
    def scaled_logits(
        hidden: Tensor, weight: Tensor, temperature: float, softcap: float | None
    ) -> Tensor:
        logits = (hidden @ weight.T).float()
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return logits / temperature

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, softcap):
        logp, entropy, lse = (torch.empty(len(hidden), device=hidden.device) for _ in range(3))
        for rows in torch.arange(len(hidden), device=hidden.device).split(
            max(1, CHUNK_LOGITS // len(weight))
        ):
            z = TokenLogProbs.scaled_logits(hidden[rows], weight, temperature, softcap)
            lse[rows] = z.logsumexp(dim=-1)
            logp[rows] = z.gather(1, targets[rows, None]).squeeze(1) - lse[rows]
            entropy[rows] = lse[rows] - torch.linalg.vecdot((z - lse[rows, None]).exp_(), z)
        ctx.save_for_backward(hidden, weight, targets, lse, entropy)
        ctx.scaling = temperature, softcap
        return logp, entropy

    @staticmethod
    def backward(ctx, g_logp, g_entropy):
        hidden, weight, targets, lse, entropy = ctx.saved_tensors
        temperature, softcap = ctx.scaling
        d_hidden = torch.empty_like(hidden)
        d_weight = (
            torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        )
        for rows in torch.arange(len(hidden), device=hidden.device).split(
            max(1, CHUNK_LOGITS // len(weight))
        ):
            z = TokenLogProbs.scaled_logits(hidden[rows], weight, temperature, softcap)
            slope = (
                1 / temperature
                if softcap is None
                else (1 - (z * (temperature / softcap)).square()) / temperature
            )
            log_p = z.sub_(lse[rows, None])
            d = log_p.exp()
            d *= (
                log_p.add_(entropy[rows, None])
                .mul_(-g_entropy[rows, None])
                .sub_(g_logp[rows, None])
            )
            d = (
                d.scatter_add_(1, targets[rows, None], g_logp[rows, None])
                .mul_(slope)
                .to(hidden.dtype)
            )
            d_hidden[rows] = d @ weight
            if (
                d_weight is not None
            ):  # summed in float32, without a temporary where the dtypes allow it
                d_weight.addmm_(d.T, hidden[rows]) if d.dtype == torch.float32 else d_weight.add_(
                    d.T @ hidden[rows]
                )
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None, None


class Scored(NamedTuple):
    """What one forward of the policy gives."""

    logp: Tensor | None  # (B, T) log-prob of each response token at the temperature
    entropy: Tensor | None  # (B, T) of the distribution that it was drawn from
    latents: list[Tensor]  # one (B, S, D) a tap


class LastTap(Exception):  # noqa: N818 (a signal, not an error)
    """Ends a forward pass whose layers above the last tap nobody needs."""


class Policy(nn.Module):
    """A Hugging Face decoder that returns log-probs, entropies and tapped latents of a batch of episodes."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        text, head = model.config.get_text_config(), model.get_output_embeddings()
        self.n_layers, self.softcap = (
            text.num_hidden_layers,
            getattr(text, "final_logit_softcapping", None),
        )
        scaled = [
            name
            for name in ("logit_scale", "logits_scaling")
            if getattr(text, name, None) not in (None, 1)
        ]
        if scaled or getattr(head, "bias", None) is not None:
            raise ValueError(
                f"{type(model).__name__}: {scaled or 'a bias'} on its logits; expected a plain linear head"
            )

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, in order."""
        return self.model.get_decoder().layers

    @property
    def blocks(self) -> list[nn.Module]:
        """What is sharded by itself: decoder layers and the vision tower's blocks."""
        return [*self.layers, *(self.tower.blocks if self.tower else ())]

    @property
    def tower(self) -> nn.Module | None:
        """The vision tower, of a model that has one."""
        return self.model.base_model.visual if vision.sees(self.model.config) else None

    def look(self, batch: Batch) -> tuple[dict, Tensor | float]:
        """Return what the body needs to see a batch's images, and a zero that hangs on the tower's output.

        Ranks gather the tower's shards together, forward and backward: without images it looks at one, for nothing.
        """
        if self.tower is None:
            return {}, 0.0
        kinds = (batch.input_ids == self.model.config.image_token_id) & ~batch.targets
        seen = {
            "mm_token_type_ids": kinds.int()
        }  # 1 image, 0 text: left out, positions would be wrong, silently
        if batch.pixel_values is not None:
            return seen | {
                "pixel_values": batch.pixel_values,
                "image_grid_thw": batch.image_grid_thw,
            }, 0.0
        size, patch = (
            self.model.config.vision_config.spatial_merge_size,
            self.tower.patch_embed.proj.weight[0],
        )
        grid = torch.tensor([[1, size, size]], device=patch.device)
        output = self.tower(patch.new_zeros(size * size, patch.numel()), grid_thw=grid)
        parts = [output.pooler_output, *(getattr(output, "deepstack_features", None) or [])]
        return seen, sum(part.sum() for part in parts) * 0

    def forward(self, batch: Batch, temperature: float = 1.0, taps: Sequence[int] = (), latents_only: bool = False) -> Scored:  # fmt: skip
        """Run a batch at a temperature, which divides the logits; return what `taps`, indices of layers, output as well.

        latents_only stops after the last tap: neither the layers above nor the head run.
        """
        latents: dict[int, Tensor] = {}

        def catch(index: int):
            def hook(_module, _arguments, output):
                latents[index] = (output[0] if isinstance(output, tuple) else output).detach()
                if latents_only and index == max(taps):
                    raise LastTap

            return hook

        body, (images, nothing), ids = self.model.base_model, self.look(batch), batch.input_ids
        hooks = [self.layers[index].register_forward_hook(catch(index)) for index in set(taps)]
        if images:  # a placeholder that was sampled is a word like others: the body must not take it for an image
            ids = ids.masked_fill(batch.targets & (ids == self.model.config.image_token_id), 0)
            embedding = self.model.get_input_embeddings()
            hooks.append(embedding.register_forward_pre_hook(lambda *_: (batch.input_ids,)))
        try:
            output = body(
                input_ids=ids, attention_mask=batch.attention_mask, use_cache=False, **images
            )
        except LastTap:
            return Scored(None, None, [latents[index] for index in taps])
        finally:
            for hook in hooks:
                hook.remove()
        before = batch.targets.roll(-1, dims=1)  # the position before predicts a token
        hidden = output.last_hidden_state[before] + nothing  # (M, D)
        weight, tokens = self.model.get_output_embeddings().weight, batch.input_ids[batch.targets]
        logp, entropy = TokenLogProbs.apply(hidden, weight, tokens, temperature, self.softcap)
        return Scored(
            batch.unflatten(logp), batch.unflatten(entropy), [latents[index] for index in taps]
        )


def load_policy(
    path: str, trust_remote_code: bool = False, checkpointing: bool = False, freeze: Freeze = "none"
) -> Policy:
    """Load a Hugging Face decoder to host memory, as it is stored; dropout must be off, or its scores would not repeat."""
    model = vision.load_model(path, "auto", trust_remote_code)
    for name in ("attention_dropout", "resid_pdrop", "embd_pdrop", "hidden_dropout"):
        if getattr(model.config.get_text_config(), name, 0):
            raise ValueError(
                f"{path} sets {name}; expected 0, as log-probs under dropout do not repeat: edit its config.json"
            )
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = Policy(model.train())
    if freeze == "vision" and policy.tower:
        policy.tower.requires_grad_(False)
    return policy


# ---- Flow reward (paper: flow reward shaping)
def normalise(
    score: Tensor, mask: Tensor, bilateral: bool = False, power: float = 1.0, group_size: int = 1
) -> Tensor:
    """Min-max normalise scores (B, T) over mask (B, T) to [0, 1], or [-1, 1] if bilateral; zero outside mask.

    The power is applied in [0, 1]. `group_size` rows share a minimum and maximum: 1 (paper), or G to keep what tells the
    responses of a group apart. Equal scores are zero.
    """
    rows = mask.view(-1, group_size * mask.shape[1])  # what shares a minimum and maximum
    values = score.reshape(rows.shape)
    low = values.masked_fill(~rows, torch.inf).amin(dim=1, keepdim=True)
    spread = values.masked_fill(~rows, -torch.inf).amax(dim=1, keepdim=True) - low
    unit = ((values - low) / spread).pow(power)
    unit = 2 * unit - 1 if bilateral else unit
    return torch.where(rows & (spread > 0), unit, 0.0).view(mask.shape)


def select(
    score: Tensor, threshold: float = 0.6, top_k: int | None = 15, bilateral: bool = False
) -> Tensor:
    """Keep the tails of normalised scores (B, T): beyond the threshold, then the k largest; zero elsewhere.

    A threshold of 0 and a top_k of None keep everything. Bilateral keeps scores beyond the threshold on both sides and
    k//2 of each; as in the official code, only rows with at least k tokens left are cut to k.
    """
    if threshold > 0:
        score = torch.where((score > threshold) | (bilateral & (score < -threshold)), score, 0.0)
    if top_k is None or top_k >= score.shape[1]:
        return score
    kept = torch.zeros_like(score, dtype=torch.bool)
    for largest in (True, False) if bilateral else (True,):
        kept.scatter_(
            1, score.topk(top_k // 2 if bilateral else top_k, dim=1, largest=largest).indices, True
        )
    few = (score != 0).sum(dim=1, keepdim=True) < top_k
    return torch.where(kept | few, score, 0.0)


# ---- Advantages
def varied_groups(reward: Tensor, group_size: int) -> Tensor:
    """Return which groups (N,) of reward (B,) hold different rewards; the others have nothing to teach."""
    groups = reward.view(-1, group_size)
    return groups.amax(dim=1) > groups.amin(dim=1)


def outcome_advantage(reward: Tensor, group_size: int, baseline: Baseline = "grpo") -> Tensor:
    """Return the outcome advantage (B,) of rewards (B,), G consecutive episodes a group.

    grpo: (r - mean)/(std + 1e-9), std with G - 1; rloo: r - mean of the others; dr_grpo, reinforce++: r - mean (the
    latter is whitened over the batch after the token part is added); reinforce: r. Equal rewards give exactly 0.
    """
    if baseline == "reinforce":
        return reward.clone()
    groups = reward.view(-1, group_size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    if baseline == "grpo":
        centred = centred / (groups.std(dim=1, keepdim=True) + 1e-9)
    elif baseline == "rloo":
        centred = centred * group_size / (group_size - 1)
    return torch.where(varied_groups(reward, group_size)[:, None], centred, 0.0).flatten()


def token_returns(reward: Tensor, mask: Tensor, gamma: float = 1.0) -> Tensor:
    """Return sum_{j>=k} gamma^(j-k) * reward_j over response tokens, (B, T), from rewards (B, T)."""
    reward = reward * mask
    if gamma == 1.0:
        return reward.flip(1).cumsum(dim=1).flip(1) * mask
    returns, following = torch.zeros_like(reward), torch.zeros_like(reward[:, 0])
    for k in reversed(range(reward.shape[1])):
        following = returns[:, k] = reward[:, k] + gamma * following
    return returns * mask


def entropy_advantage(
    advantage: Tensor, entropy: Tensor, alpha: float = 0.4, kappa: float = 2.0
) -> Tensor:
    """Return A_k + min(alpha * H_k, |A_k| / kappa), (B, T), no gradient through H: the entropy-shaping baseline."""
    return advantage + torch.minimum(alpha * entropy.detach(), advantage.abs() / kappa)


def whiten(advantage: Tensor, mask: Tensor) -> Tensor:
    """Return advantages (B, T) with mean 0 and standard deviation 1 over all response tokens (REINFORCE++-baseline)."""
    values = advantage[mask]
    return torch.where(mask, (advantage - values.mean()) / (values.std() + 1e-8), 0.0)


# ---- Losses
def token_weights(mask: Tensor, normalisation: Normalisation, n_episodes: int, n_tokens: int, max_tokens: int) -> Tensor:  # fmt: skip
    """Return the weight (B, T) of each token in the loss of a whole optimiser step.

    sequence: mean over episodes of the mean over tokens; token: mean over all tokens; constant: sum over tokens divided
    by episodes * max_tokens (Dr. GRPO). n_episodes and n_tokens count the step's mini-batch, over all micro-batches.
    """
    if normalisation == "sequence":
        return mask / mask.sum(dim=1, keepdim=True).clamp(min=1) / n_episodes
    return mask / (n_tokens if normalisation == "token" else n_episodes * max_tokens)


def policy_loss(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, clip_low: float = 0.2, clip_high: float = 0.2, ratio_cap: float = 3.0
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the PPO-clip loss of each token (B, T) and where it was clipped (B, T) bool.

    -min(rho*A, clip(rho, 1-clip_low, 1+clip_high)*A) with rho = min(exp(logp - old_logp), ratio_cap); DAPO's
    clip-higher is clip_high = 0.28. The cap (as official) bounds the loss of negative advantages.
    """
    ratio = (logp - old_logp).clamp(max=math.log(ratio_cap)).exp()
    plain, clipped = ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage
    return -torch.minimum(plain, clipped), clipped < plain


def kl_divergence(logp: Tensor, ref_logp: Tensor, kind: Literal["k1", "k2", "k3"] = "k3") -> Tensor:
    """Return the per-token KL estimate (B, T), d = logp - ref_logp: k1 = d (no gradient on average), k2 = d^2/2, k3 = e^-d - 1 + d."""
    d = logp - ref_logp
    return {"k1": lambda: d, "k2": lambda: d.square() / 2, "k3": lambda: torch.expm1(-d) + d}[
        kind
    ]()


def importance_weights(
    old_logp: Tensor, sampled_logp: Tensor, mask: Tensor, mode: Literal["none", "token", "sequence", "mask"], cap: float = 2.0
) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
    """Correct for a sampler whose probabilities differ from the trainer's.

    Everything is (B, T); NaN log-probs of the sampler count as ratio 1. mode: `token` is min(ratio, cap), `sequence` the
    same on the response's product of ratios, `mask` 0 beyond the cap. Returns the weights, and figures of the raw ratios.
    """
    broken = sampled_logp.isnan() & mask
    difference = torch.where(mask & ~broken, old_logp - sampled_logp, 0.0)
    ratio = difference.exp()
    statistics = {
        "mismatch/ratio_mean": ratio[mask].mean().item(),
        "mismatch/ratio_max": ratio[mask].max().item(),
        "mismatch/over_cap": (ratio[mask] > cap).float().mean().item(),
        "mismatch/nan": broken.sum().item(),
    }
    if mode == "sequence":
        ratio = difference.sum(dim=1, keepdim=True).exp().expand_as(ratio)
    if mode == "none":
        ratio = torch.ones_like(ratio)
    return torch.where(ratio > cap, 0.0, ratio) if mode == "mask" else ratio.clamp(
        max=cap
    ), statistics


def online_flow_weights(
    mask: Tensor, correct: Tensor | None, entropy: Tensor | None = None, quantile: float = 0.6, soft: float = 0.0,
    quantile_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Weight tokens of the online flow loss by rejection sampling: sum_rows(b * sum(w*loss)/sum(w)) / sum(b).

    Correct rows (B,) have b = 1, others b = soft. Tokens whose entropy (B, T) reaches their row's quantile over
    quantile_mask (default mask; the official code includes padding) have w = 1, others w = soft. None accepts all.
    Returns w/sum(w), (B, T), and b, (B,); the caller divides by the step's sum of b.
    """
    rows = (
        torch.ones(len(mask), device=mask.device)
        if correct is None
        else torch.where(correct, 1.0, soft)
    )
    tokens = mask.float()
    if entropy is not None:
        seen = entropy.masked_fill(~(mask if quantile_mask is None else quantile_mask), torch.nan)
        tokens = tokens * torch.where(
            entropy >= seen.nanquantile(quantile, dim=1, keepdim=True), 1.0, soft
        )
    return tokens / tokens.sum(dim=1, keepdim=True), rows


# ---- Schedule and order
def learning_rate(peak: float, step: int, total: int, warmup: float, floor: float) -> float:
    """Return the rate of a step: linear warm-up over a fraction of the steps, then a cosine to floor * peak."""
    n_warmup = math.ceil(warmup * total)
    progress = (step - n_warmup) / max(1, total - n_warmup)
    cosine = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    return peak * ((step + 1) / n_warmup if step < n_warmup else cosine)


def passes(n: int, start: int, count: int, *key: int | str) -> list[tuple[int, int]]:
    """Return (epoch, index) of places start, start + 1, ... in endless passes over range(n), each in an order of its own."""
    places, orders = [divmod(place, n) for place in range(start, start + count)], {}
    for epoch in {epoch for epoch, _ in places}:
        orders[epoch] = permutation(n, *key, epoch)
    return [(epoch, orders[epoch][place]) for epoch, place in places]


def permutation(n: int, *key: int | str) -> list[int]:
    """Return a random order of range(n) that depends on the key alone."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(keyed_seed(*key))).tolist()
