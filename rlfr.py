"""The algorithm: a policy with taps, token log-probs, flow reward, advantages, losses.

Shapes as in flow.py; in this file, M is the number of response tokens of a batch. Vision-language
models are tapped in their text layers, and a batch holds the images of its episodes.

Equations, each with its function:
    taps: layers round(p*n), latent = the layer's output                 tap_layers, Policy.forward
    log pi(y_k), H_k from hidden states, chunk by chunk                  TokenLogProbs
    s' = (s - min)/(max - min) per response or group                     normalise
    keep s' > threshold, then the top k (times -coef in train_rl.py)     select
    s' = clamp(excess over expert tokens, 0, cap)/cap (ours)             clamp_excess
    A_outcome = (r - mean)/(std + 1e-9), or rloo, dr_grpo, reinforce++   outcome_advantage
    A_k = A_outcome + sum_{j>=k} gamma^(j-k) * flow_reward_j             token_returns
    A_k + min(alpha*H_k, |A_k|/kappa)                                    entropy_advantage
    -min(rho*A, clip(rho, 1-eps, 1+eps_high)*A)                          policy_loss
    k1, k2, k3 to a reference                                            kl_divergence
    weights pi_train/pi_sampler, truncated or masked                     importance_weights
    rejection sampling for the online flow update                        online_flow_weights

Departures from the official code: the minimum is taken over the response (there it is the second
smallest value, and constant rows give NaN); equal rewards have advantage 0 (there a group of 0.7
gets 0.92 from rounding); the flow's losses have one denominator, as the policy's (there they are
means of micro-batch means).
"""

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from types import SimpleNamespace
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import lora
import vision
from flow import keyed_seed
from infra import families
from parallel import DEVICE, gather_rows, is_first

Baseline = Literal["grpo", "rloo", "dr_grpo", "reinforce++", "reinforce"]
Freeze = Literal["none", "vision"]
Normalisation = Literal["sequence", "token", "constant"]
KLKind = Literal["k1", "k2", "k3"]
Mismatch = Literal["none", "token", "sequence", "mask"]
# Logits held at a time: large products keep a GPU busy, small chunks stay in the caches of a CPU
CHUNK_LOGITS = 2**28 if DEVICE.type == "cuda" else 2**23
# A forward keeps the first chunks of logits for its backward, up to so many logits (400 MB); the
# backward makes the rest again. That is for a CPU, whose chunks are small: on a GPU the first chunk
# is larger than this, unless a micro-batch has but a few hundred response tokens, and none is kept
KEPT_LOGITS = 96 * 2**20


# ---- Batches: right-padded rows of prompt + response. What is returned for each response token is
# (B, T), with token k of the response in column k.
class Row(NamedTuple):
    """What the policy reads of one episode; any object with these attributes will do."""

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    images: Sequence[vision.Image] = ()


@dataclass
class Batch:
    """Right-padded episodes. Example, prompt lengths 1 and 2, responses 2 and 3 (`.` is padding):

    input_ids      p r r . .    attention_mask 1 1 1 0 0    targets 0 1 1 0 0    response_mask 1 1 0
                   p p r r r                   1 1 1 1 1            0 0 1 1 1                  1 1 1
    """

    input_ids: Tensor  # (B, S)
    attention_mask: Tensor  # (B, S) bool
    targets: Tensor  # (B, S) bool, positions of response tokens
    response_mask: Tensor  # (B, T) bool
    first_row: Tensor  # (B,) the first row that has the same prompt
    images: Sequence[vision.Image] = ()  # of all rows, in order
    images_once: Sequence[vision.Image] = ()  # of first rows

    @cached_property
    def packing(self) -> "Packing":
        """Where the tokens are; prompts that rows share are packed once."""
        rows = torch.arange(len(self.first_row), device=self.first_row.device)
        has_own_prompt = (self.first_row == rows)[:, None]  # (B, 1)
        is_packed = self.attention_mask & (has_own_prompt | self.targets)
        place = is_packed.flatten().cumsum(0).view_as(is_packed) - 1  # among the packed tokens
        source = torch.where(is_packed, place, place[self.first_row])
        source = source.masked_fill(~self.attention_mask, 0)
        places = is_packed.flatten().nonzero().squeeze(1)
        return Packing(places, source)

    @cached_property
    def image_inputs(self) -> vision.ImageInputs:
        """What the tower takes of the images of first rows, or what a frozen one has made."""
        return vision.stack_all(self.images_once, self.images, DEVICE)

    def unflatten(self, values: Tensor) -> Tensor:
        """Spread values of response tokens (M,) into (B, T), zero elsewhere."""
        out = torch.zeros(self.response_mask.shape, dtype=values.dtype, device=values.device)
        out[self.response_mask] = values
        return out


class Packing(NamedTuple):
    """Where the n tokens of a batch are among its positions: between (n, …) and padded (B, S, …).

    In a causal decoder the tokens of a prompt have the same states whatever follows. So a prompt
    that several rows share is packed once, and all of these rows read it.
    Attention alone needs rows, and gets them padded.
    """

    places: Tensor  # (n,) of B*S, where a packed token comes from
    source: Tensor  # (B, S) of n, the packed token that a position reads; any, for padding

    def pack(self, padded: Tensor) -> Tensor:
        """Leave out padding and repeated prompts: (B, S, …) -> (n, …)."""
        return padded.flatten(0, 1)[self.places]

    def pad(self, packed: Tensor) -> Tensor:
        """Put tokens in their places: (n, …) -> (B, S, …). What padding gets means nothing."""
        return take(packed, self.source)

    def positions(self) -> Tensor:
        """Return each token's position in its row, (n,)."""
        return self.places % self.source.shape[1]


def take(tensor: Tensor, indices: Tensor) -> Tensor:
    """Return tensor[indices] for indices of any shape, by index_select, which is faster."""
    return tensor.index_select(0, indices.flatten()).unflatten(0, indices.shape)


def collate(rows: Sequence[Row]) -> Batch:
    """Make a batch of episodes; each must have a prompt token and a response token."""
    prompt_lengths = [len(row.prompt_ids) for row in rows]
    response_lengths = [len(row.response_ids) for row in rows]
    assert min(prompt_lengths) > 0, "an episode needs a prompt token"
    assert min(response_lengths) > 0, "an episode needs a response token"

    token_ids = []
    images = []
    images_once = []
    first_rows: dict[tuple, int] = {}
    first_row = []
    for i, row in enumerate(rows):
        token_ids.append([*row.prompt_ids, *row.response_ids])
        images.extend(row.images)
        first_row.append(first_rows.setdefault(prompt_key(row), i))
        if first_row[i] == i:
            images_once.extend(row.images)
    width = max(len(ids) for ids in token_ids)  # S
    padded_ids = [ids + [0] * (width - len(ids)) for ids in token_ids]
    input_ids = torch.tensor(padded_ids, device=DEVICE)

    start = torch.tensor(prompt_lengths, device=DEVICE)[:, None]  # (B, 1)
    n_response = torch.tensor(response_lengths, device=DEVICE)[:, None]  # (B, 1)
    position = torch.arange(width, device=DEVICE)  # (S,)
    attention_mask = position < start + n_response
    targets = attention_mask & (position >= start)
    response_mask = position[: max(response_lengths)] < n_response
    first_row = torch.tensor(first_row, device=DEVICE)
    return Batch(input_ids, attention_mask, targets, response_mask, first_row, images, images_once)


def prompt_key(row: Row) -> tuple:
    """Return what is equal for rows whose prompts are."""
    return tuple(row.prompt_ids), tuple(row.images)


def micro_batches(
    rows: Sequence[Row], token_budget: int, rank: int, n_ranks: int
) -> Iterator[tuple[list[int], Batch]]:
    """Yield micro-batches of this rank's share of the rows: their indices, and the batch of them.

    The rows of a batch have as many tokens together as the budget at most (a single row may exceed
    it). Rows of one prompt go together, see Packing, and else rows of like length, the longest
    first, as attention pads them. Every rank has the same number of rows, of about the same number
    of tokens, and yields the same number of batches, because sharded modules run in step: as few as
    the budget allows, and of about the same size.
    """
    lengths = [len(row.prompt_ids) + len(row.response_ids) for row in rows]
    groups = prompt_groups(rows, n_ranks)
    for indices in plan_batches(groups, lengths, token_budget, n_ranks)[rank]:
        yield indices, collate([rows[index] for index in indices])


def prompt_groups(rows: Sequence[Row], n_ranks: int) -> list[list[int]]:
    """Return indices of rows by prompt, in groups that can be dealt to the ranks equally.

    For several ranks all groups are of one size, the largest that allows it. A prompt with more
    rows, as of a problem that occurs twice in a step, gets several groups, of like lengths.
    """
    by_prompt: dict[tuple, list[int]] = {}
    for index, row in enumerate(rows):
        by_prompt.setdefault(prompt_key(row), []).append(index)
    groups = list(by_prompt.values())
    if n_ranks == 1:
        return groups
    size = math.gcd(*(len(group) for group in groups), len(rows) // n_ranks)
    parts = []
    for group in groups:
        n_parts = len(group) // size
        group = sorted(group, key=lambda index: len(rows[index].response_ids), reverse=True)
        parts += [group[part::n_parts] for part in range(n_parts)]
    return parts


def plan_batches(
    groups: Sequence[Sequence[int]], lengths: Sequence[int], token_budget: int, n_ranks: int
) -> list[list[list[int]]]:
    """Return the micro-batches of every rank, as indices of rows with these lengths."""
    assert len(groups) % n_ranks == 0, f"{len(groups)} groups of rows for {n_ranks} ranks"
    shares = deal(groups, lengths, n_ranks)
    n_batches = max(len(pack(share, lengths, token_budget)) for share in shares)
    plans = []
    for share in shares:
        batches = pack_evenly(share, lengths, token_budget, n_batches)
        plans.append(split_to(batches, n_batches))
    return plans


def deal(groups: Sequence[Sequence[int]], lengths: Sequence[int], n_ranks: int) -> list[list[int]]:
    """Deal groups of rows to ranks, the longest first, back and forth: 0 1 2 2 1 0 0 1 2 …

    Returns each rank's rows; those of a group follow one another, the longest first.
    """

    def n_tokens(group: Sequence[int]) -> int:
        return sum(lengths[index] for index in group)

    shares: list[list[int]] = [[] for _ in range(n_ranks)]
    for place, group in enumerate(sorted(groups, key=n_tokens, reverse=True)):
        turn, rank = divmod(place, n_ranks)
        if turn % 2 == 1:
            rank = n_ranks - 1 - rank
        shares[rank] += sorted(group, key=lambda index: lengths[index], reverse=True)
    return shares


def pack(share: list[int], lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Cut a rank's rows, in their order, into batches whose tokens keep to the budget."""
    batches: list[list[int]] = []
    n_tokens = 0  # of the last batch
    for index in share:
        n_tokens += lengths[index]
        if not batches or n_tokens > token_budget:
            batches.append([])
            n_tokens = lengths[index]
        batches[-1].append(index)
    return batches


def pack_evenly(
    share: list[int], lengths: Sequence[int], token_budget: int, n_batches: int
) -> list[list[int]]:
    """Pack with the smallest budget that still needs n_batches or fewer: no short batch is left."""
    budgets = range(1, token_budget + 1)  # the larger, the fewer batches

    def is_enough(budget: int) -> bool:
        return len(pack(share, lengths, budget)) <= n_batches

    smallest = budgets[bisect_left(budgets, True, key=is_enough)]
    return pack(share, lengths, smallest)


def split_to(batches: list[list[int]], n_batches: int) -> list[list[int]]:
    """Halve the batch with the most rows, again and again, until there are n_batches."""
    parts = list(batches)
    while len(parts) < n_batches:
        sizes = [len(part) for part in parts]
        place = sizes.index(max(sizes))
        largest = parts.pop(place)
        half = len(largest) // 2
        parts.insert(place, largest[:half])
        parts.insert(place + 1, largest[half:])
    return parts


# ---- Token log-probs
class TokenLogProbs(torch.autograd.Function):
    """log pi(target) and entropy of each row of hidden states; logits are made a few words at a time.

    apply(hidden (M, D), weight (V, D), targets (M,), temperature, softcap or None)
    -> logp (M,), entropy (M,), both float32.

    The vocabulary is cut into chunks, not the rows: so each word of the head gets its gradient by one
    product. The backward makes the logits again, but for the first KEPT_LOGITS, which the forward
    leaves to it. With z the scaled logits of a row, y its target, p = softmax(z) and g the incoming
    gradients:
        log p_y = z_y - logsumexp(z)             so  d log p_y / dz_j = [j = y] - p_j
        H = logsumexp(z) - sum_j p_j * z_j       so  d H / dz_j = -p_j * (log p_j + H)
        d loss / dz_j = g_logp * [j = y] + p_j * (-g_H * (log p_j + H) - g_logp)
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, softcap):
        z_target = torch.zeros(len(hidden), device=hidden.device)
        lse_of_chunks = []  # logsumexp of the scaled logits
        mean_of_chunks = []  # mean logits, by the distribution within the chunk
        kept = []  # logits of the first chunks
        may_keep = KEPT_LOGITS if ctx.needs_input_grad[0] else 0
        for words in vocabulary_chunks(len(hidden), len(weight)):
            z = scaled_logits(hidden, weight[words], temperature, softcap)  # (M, chunk)
            place, is_here = find_targets(targets, words)
            z_target += z.gather(1, place[:, None]).squeeze(1) * is_here
            chunk_lse = z.logsumexp(dim=-1)
            lse_of_chunks.append(chunk_lse)
            mean_of_chunks.append(mean_logit(z, chunk_lse))
            may_keep -= z.numel()
            if may_keep >= 0:
                kept.append(z)
        lse_of_chunks = torch.stack(lse_of_chunks)  # (n_chunks, M)
        lse = lse_of_chunks.logsumexp(dim=0)
        p_of_chunks = (lse_of_chunks - lse).exp()
        entropy = lse - (p_of_chunks * torch.stack(mean_of_chunks)).sum(dim=0)
        ctx.save_for_backward(hidden, weight, targets, lse, entropy, *kept)
        ctx.temperature = temperature
        ctx.softcap = softcap
        return z_target - lse, entropy

    @staticmethod
    def backward(ctx, g_logp, g_entropy):
        hidden, weight, targets, lse, entropy, *kept = ctx.saved_tensors
        d_hidden = torch.zeros_like(hidden, dtype=torch.float32)  # summed over the chunks
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for i, words in enumerate(vocabulary_chunks(len(hidden), len(weight))):
            if i < len(kept):
                z = kept[i].clone()  # it is overwritten below, and a second backward may come
            else:
                z = scaled_logits(hidden, weight[words], ctx.temperature, ctx.softcap)
            slope = scaling_slope(z, ctx.temperature, ctx.softcap)
            place, is_here = find_targets(targets, words)
            d_logits = gradient_by_logits(
                z,
                lse[:, None],
                entropy[:, None],
                g_logp[:, None],
                g_entropy[:, None],
            )
            d_logits.scatter_add_(1, place[:, None], (g_logp * is_here)[:, None])
            d_logits = d_logits.mul_(slope).to(hidden.dtype)  # (M, chunk)
            d_hidden += d_logits @ weight[words]
            if d_weight is not None:
                torch.mm(d_logits.T, hidden, out=d_weight[words])
        return d_hidden.to(hidden.dtype), d_weight, None, None, None


def vocabulary_chunks(n_rows: int, n_words: int) -> Iterator[slice]:
    """Cut a vocabulary into chunks of words with at most CHUNK_LOGITS logits in all rows."""
    size = max(1, CHUNK_LOGITS // n_rows)
    for start in range(0, n_words, size):
        yield slice(start, min(start + size, n_words))


def find_targets(targets: Tensor, words: slice) -> tuple[Tensor, Tensor]:
    """Return the place of each target (M,) among the words, 0 if it is elsewhere; and if it is here."""
    is_here = (targets >= words.start) & (targets < words.stop)
    return torch.where(is_here, targets - words.start, 0), is_here


def scaled_logits(
    hidden: Tensor, weight: Tensor, temperature: float, softcap: float | None
) -> Tensor:
    """Return z = a/temperature with logits a = hidden @ weight.T, in float32.

    A model with a softcap c (Gemma 2) has logits c * tanh(a/c).
    """
    logits = (hidden @ weight.T).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / temperature


def scaling_slope(z: Tensor, temperature: float, softcap: float | None) -> Tensor | float:
    """Return dz/da of scaled_logits: 1/temperature, times 1 - tanh(a/c)^2 with a softcap c."""
    if softcap is None:
        return 1 / temperature
    tanh = z * (temperature / softcap)
    return (1 - tanh.square()) / temperature


def mean_logit(z: Tensor, lse: Tensor) -> Tensor:
    """Return sum_j p_j * z_j of each row, with p = exp(z - lse) its distribution."""
    p = (z - lse[:, None]).exp_()
    return torch.linalg.vecdot(p, z)


def gradient_by_logits(
    z: Tensor, lse: Tensor, entropy: Tensor, g_logp: Tensor, g_entropy: Tensor
) -> Tensor:
    """Return p * (-g_H * (log p + H) - g_logp), (M, chunk), as TokenLogProbs derives it.

    z (M, chunk) is overwritten and all steps are in place, because a chunk of logits is large; the
    others are (M, 1).
    """
    log_p = z.sub_(lse)
    d_z = log_p.exp()  # p
    factor = log_p.add_(entropy)
    factor.mul_(-g_entropy)
    factor.sub_(g_logp)
    return d_z.mul_(factor)


# ---- Attention within the rows of a packed batch. All else in a decoder works token by token, so it
# gets the batch's tokens in one row, without the padding.
PACKED = "packed"  # name of the attention below, among those of Hugging Face


def attend_packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Packing | None = None,
    sliding_window: int | None = None,
    **settings,
) -> tuple[Tensor, None]:
    """Attend within rows: queries, keys and values are (1, heads, n, head size) of packed tokens.

    Returns (1, n, heads, head size). Without a packing the rows are taken as they are. A mask is only
    needed where a row is longer than the layer's sliding window.
    """
    if packing is None:
        return attend(module, query, key, value, attention_mask, sliding_window, **settings), None
    rows = []
    for tensor in (query, key, value):
        padded = packing.pad(tensor[0].transpose(0, 1))  # (B, S, heads, head size)
        rows.append(padded.transpose(1, 2))
    output = attend(module, *rows, attention_mask, sliding_window, **settings)
    return packing.pack(output)[None], None


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sliding_window: int | None,
    **settings,
) -> Tensor:
    """Attend causally in rows of (B, heads, S, head size); return (B, S, heads, head size)."""
    width = query.shape[2]
    if attention_mask is None and sliding_window and width > sliding_window:
        position = torch.arange(width, device=query.device)
        distance = position[:, None] - position
        attention_mask = ((distance >= 0) & (distance < sliding_window))[None, None]
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    return output


def padding_mask_only(*, attention_mask: Tensor | None, **settings) -> Tensor | None:
    """Make a mask only of one that is passed: what is causal needs none in attend_packed."""
    if attention_mask is None:
        return None
    return sdpa_mask(attention_mask=attention_mask, **settings)


AttentionInterface.register(PACKED, attend_packed)
AttentionMaskInterface.register(PACKED, padding_mask_only)


# ---- Policy
def tap_layers(n_layers: int, percentiles: Sequence[float]) -> list[int]:
    """Return indices of layers, round(p * n_layers), n_layers - 1 at most (paper: .25, .5, .75).

    They count from 0: the latent of layer i is what Hugging Face calls hidden_states[i + 1], but
    for the last layer, whose entry there has passed the final norm.
    """
    return [min(round(p * n_layers), n_layers - 1) for p in percentiles]


class PolicyOutput(NamedTuple):
    """What one forward of the policy gives."""

    logp: Tensor | None  # (B, T) log-prob of each response token at the temperature
    entropy: Tensor | None  # (B, T) of the distribution that it was drawn from
    latents: list[Tensor]  # one (B, S, D) a tap


class LastTap(Exception):  # noqa: N818 (a signal, not an error)
    """Ends a forward pass whose layers above the last tap nobody needs."""


class Policy(nn.Module):
    """A Hugging Face decoder that returns log-probs, entropies and tapped latents of episodes."""

    def __init__(self, model: nn.Module, attention: str | None = None):
        """Take a model, and the name of its attention, by default the one that its family needs.

        Raises ValueError if the policy's log-probs would not be those of the model's own forward.
        """
        super().__init__()
        check_head(model)
        if attention is None:
            attention = find_attention(model)
        self.model = model
        self.packs = attention == PACKED
        families.set_attention(model.get_decoder(), attention)
        text_config = model.config.get_text_config()
        self.n_layers = text_config.num_hidden_layers
        self.softcap = getattr(text_config, "final_logit_softcapping", None)
        self.takes_features = False  # images come as features: no forward runs the tower

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, in order."""
        return self.model.get_decoder().layers

    @property
    def tower(self) -> nn.Module | None:
        """The vision tower, or None if the model takes no images."""
        if not vision.takes_images(self.model.config):
            return None
        return self.model.base_model.visual

    @property
    def blocks(self) -> list[nn.Module]:
        """The parts to shard one by one: decoder layers and the vision tower's blocks."""
        if self.tower is None:
            return list(self.layers)
        return [*self.layers, *self.tower.blocks]

    def layer_parts(self) -> list[nn.Module]:
        """Return attention, feed-forward and norms of all decoder layers: what can be compiled.

        Not the layers themselves, whose hooks return latents and end a forward.
        """
        return [part for layer in self.layers for part in layer.children()]

    def whole_weights(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yield Hugging Face's name and the whole tensor of each weight, adapters merged into them.

        One at a time; all ranks must take all of them together.
        """
        return lora.merged_weights(self, dtype, prefix="model.")

    def forward(
        self,
        batch: Batch,
        temperature: float = 1.0,
        taps: Sequence[int] = (),
        latents_only: bool = False,
    ) -> PolicyOutput:
        """Score the response tokens of a batch.

        temperature: of the distribution; the logits are divided by it
        taps: indices of the layers whose outputs are returned as latents, without a gradient
        latents_only: stop after the last tap, so that neither the layers above nor the head run
        """
        last_tap = max(taps) if latents_only else None
        tower_term = self.run_tower_without_images(batch)
        latents: dict[int, Tensor] = {}
        hooks = self.add_taps(batch, set(taps), last_tap, latents)
        try:
            predicts = batch.targets.roll(-1, dims=1)  # the position before a token predicts it
            states = self.run_decoder(batch, predicts)  # (M, D)
        except LastTap:
            return PolicyOutput(None, None, [latents[index] for index in taps])
        finally:
            for hook in hooks:
                hook.remove()

        logp, entropy = self.score_tokens(states + tower_term, batch, temperature)
        return PolicyOutput(
            logp=batch.unflatten(logp),
            entropy=batch.unflatten(entropy),
            latents=[latents[index] for index in taps],
        )

    def score_tokens(
        self, hidden: Tensor, batch: Batch, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Return log-prob and entropy (M,) of response tokens from the states (M, D) before each."""
        weight = self.model.get_output_embeddings().weight
        tokens = batch.input_ids[batch.targets]  # (M,)
        return TokenLogProbs.apply(hidden, weight, tokens, temperature, self.softcap)

    def add_taps(
        self, batch: Batch, taps: set[int], last_tap: int | None, latents: dict[int, Tensor]
    ) -> list:
        """Let the tapped layers put their outputs into `latents`, and `last_tap` end the forward.

        Returns the hooks, which the caller must remove.
        """

        def tap(index: int):
            def keep(_module, _arguments, output):
                latent = output[0] if isinstance(output, tuple) else output
                latent = latent.detach()
                latents[index] = batch.packing.pad(latent[0]) if self.packs else latent
                if index == last_tap:
                    raise LastTap

            return self.layers[index].register_forward_hook(keep)

        return [tap(index) for index in taps]

    def run_decoder(self, batch: Batch, wanted: Tensor) -> Tensor:
        """Return the last hidden states (M, D) at the M positions that are wanted, (B, S) bool.

        The tokens of all rows are packed into one, so that padding costs nothing but in attention,
        where the family allows it, see find_attention; else the rows are padded on the right.
        No attention mask is passed: no token sees the padding behind it, and without a mask
        attention runs in its fast causal kernel.
        """
        body = self.model.get_decoder() if self.tower is None else self.model.base_model
        inputs = {"attention_mask": None, "use_cache": False}
        if not self.packs:
            return body(input_ids=batch.input_ids, **inputs).last_hidden_state[wanted]
        packing = batch.packing
        inputs["packing"] = packing
        packed_ids = packing.pack(batch.input_ids)[None]  # (1, n)
        if self.tower is None:
            output = body(input_ids=packed_ids, position_ids=packing.positions()[None], **inputs)
            return take(output.last_hidden_state[0], packing.source[wanted])

        # A placeholder in a prompt stands for a part of an image; one that was sampled, in a
        # response, is a word like others. Its embedding is that word's; as an id the body gets 0.
        is_placeholder = batch.input_ids == self.model.config.image_token_id
        input_ids = batch.input_ids.masked_fill(is_placeholder & batch.targets, 0)
        inputs["input_ids"] = packing.pack(input_ids)[None]
        inputs["position_ids"] = packing.positions()[None]
        images = batch.image_inputs
        if images.grids is not None:
            # of an image: its rows and columns, which the body tells from the kinds of tokens
            is_image = is_placeholder & ~batch.targets
            positions, _ = body.get_rope_index(  # (3, B, S)
                input_ids, is_image.int(), image_grid_thw=images.all_grids
            )
            inputs["position_ids"] = positions.flatten(1)[:, None, packing.places]  # (3, 1, n)
            inputs["pixel_values"] = images.pixel_values
            inputs["image_grid_thw"] = images.grids
        if images.features is not None:
            inputs["pixel_values"] = images.features  # the body hands them to its tower
        embedding = self.model.get_input_embeddings()
        hook = embedding.register_forward_pre_hook(lambda *_: (packed_ids,))
        try:
            with tower_output(self.tower, images.features):
                output = body(**inputs)
        finally:
            hook.remove()
        return take(output.last_hidden_state[0], packing.source[wanted])

    @torch.no_grad()
    def see(self, images: Sequence[vision.Image]) -> Tensor:
        """Return what the vision tower makes of images, (n_vectors, K, D), without a gradient.

        Of each vector there are K levels: the first stands in the place of the word's embedding;
        Qwen3-VL adds the others to the hidden states after as many layers (deepstack).
        """
        pixel_values, grids = vision.stack(images, DEVICE)
        return self.run_tower(pixel_values, grids)

    def run_tower(self, pixel_values: Tensor, grids: Tensor) -> Tensor:
        """Return all that the tower makes of patches (n_patches, dim): (n_vectors, K, D)."""
        output = self.tower(pixel_values, grid_thw=grids)
        deepstack = getattr(output, "deepstack_features", None) or []
        return torch.stack([output.pooler_output, *deepstack], dim=1)

    def run_tower_without_images(self, batch: Batch) -> Tensor | float:
        """Run the vision tower on a blank image if the batch has none; return 0 times its output.

        Under FSDP each rank holds a part of the tower's weights, and all ranks must gather them at
        the same time, in the forward and again in the backward. A rank whose batch has no image
        would leave the others waiting, so it runs the tower, too. The term that is returned is 0:
        added to the hidden states it changes no number, but it makes the tower's parameters part
        of the graph, so that the backward reaches them, with gradients of 0.

        A frozen tower that has seen the images beforehand runs on no rank.
        """
        has_pixels = batch.image_inputs.pixel_values is not None
        if self.takes_features:
            assert not has_pixels, "the frozen tower has not seen these images"
            return 0.0
        if self.tower is None or has_pixels:
            return 0.0
        size = self.model.config.vision_config.spatial_merge_size  # the smallest image, in patches
        filters = self.tower.patch_embed.proj.weight
        blank = filters.new_zeros(size * size, filters[0].numel())  # (n_patches, dim)
        grid = torch.tensor([[1, size, size]], device=blank.device)  # time, height, width
        return self.run_tower(blank, grid).sum() * 0


def see_images(policy: Policy, episodes: Sequence[Row], token_budget: int) -> list[Row]:
    """Run a frozen vision tower over the episodes' images; return the episodes with its features.

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
    plans = plan_batches(each_alone, sizes, token_budget, n_ranks)
    seen = {}
    for batches in zip(*plans, strict=True):  # one of each rank
        mine = [images[index] for index in batches[dist.get_rank()]]
        counts = [sum(sizes[index] for index in batch) for batch in batches]
        gathered = gather_rows(policy.see(mine), counts)
        for batch, features in zip(batches, gathered, strict=True):
            parts = features.cpu().split([sizes[index] for index in batch])
            for index, part in zip(batch, parts, strict=True):
                seen[images[index]] = replace(images[index], features=part)
    shown = []
    for episode in episodes:
        shown.append(replace(episode, images=tuple(seen[image] for image in episode.images)))
    return shown


@contextmanager
def tower_output(tower: nn.Module, features: Tensor | None) -> Iterator[None]:
    """Let a vision tower return features (n_vectors, K, D), as Policy.see() gave them, unrun.

    Everything else of the model's own forward stays as it is: placeholders, positions, deepstack.
    Without features the tower runs.
    """
    if features is None:
        yield
        return
    first, *deepstack = features.unbind(dim=1)
    output = SimpleNamespace(pooler_output=first, deepstack_features=deepstack)
    tower.forward = lambda *_, **__: output
    try:
        yield
    finally:
        del tower.forward  # the class's is there again


def check_head(model: nn.Module) -> None:
    """Raise ValueError if the model's logits are more than a linear map of its hidden states."""
    text_config = model.config.get_text_config()
    additions = []
    for name in ("logit_scale", "logits_scaling"):
        if getattr(text_config, name, None) not in (None, 1):
            additions.append(name)
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        additions.append("a bias")
    if additions:
        raise ValueError(
            f"{families.model_name(model)}: {', '.join(additions)} on its logits; "
            "expected a plain linear head"
        )


LOGP_TOLERANCE = 1e-3  # what rounding in float32 may change of log-probs


def find_attention(model: nn.Module) -> str:
    """Return the attention with which a policy gives the log-probs of the model's own forward.

    That is PACKED, where nothing but plain attention passes between tokens, or else the model's own
    in padded rows. A few tokens through the first layers, one of every kind, show it.

    Raises ValueError if neither gives them, or the weights are not finite.
    """
    name = families.model_name(model)
    if not hasattr(model.get_decoder(), "layers"):
        raise ValueError(f"{name}: its decoder has no list `layers` to tap; take another family")
    small = families.in_small(model, DEVICE)
    faithful = families.faithful_attention(model, DEVICE)
    families.set_attention(small.get_decoder(), faithful)
    own = families.own_scores(small, DEVICE)
    if not own.states.isfinite().all():
        raise ValueError(
            f"{name}: its hidden states are not finite; expected a model with sound weights"
        )
    candidates = [faithful]
    if vision.takes_images(model.config):
        candidates = [PACKED]  # padded rows have no place for images
    elif families.can_pack(model):
        candidates.insert(0, PACKED)
    for attention in candidates:
        difference = find_difference(Policy(small, attention), own)
        if difference is None:
            return attention
    raise ValueError(f"{name}: a policy would not score as Hugging Face does: {difference}")


@torch.no_grad()
def find_difference(policy: "Policy", own: families.OwnScores) -> str | None:
    """Say in which way a policy differs from the model's own forward; None if it does not."""
    batch = collate([Row(*row) for row in families.example_rows(policy.model)])
    try:
        states = policy.run_decoder(batch, batch.attention_mask)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a family's code may raise anything where it gets what it never got
        return f"its code ends in {type(error).__name__}, {error}"
    change = families.change_of_states(states, own.states)
    if not change <= families.TOLERANCE:  # also if it is NaN
        return f"its last hidden states differ by {change:.2g} of the largest"
    is_before = batch.targets.roll(-1, dims=1)[batch.attention_mask]  # (n,) what predicts a word
    logp, _ = policy.score_tokens(states[is_before], batch, temperature=1.0)
    change = (logp - own.logp).abs().max().item()
    if not change <= LOGP_TOLERANCE:
        return f"its log-probs differ by {change:.2g}; expected a plain linear head"
    return None


def load_policy(
    path: str, trust_remote_code: bool = False, checkpointing: bool = False, freeze: Freeze = "none"
) -> Policy:
    """Load a Hugging Face decoder to host memory, in the dtype that it is stored in.

    checkpointing: recompute activations in the backward
    freeze: what does not learn; "vision" is the vision tower, which sees images beforehand then
    Raises ValueError if the model has dropout, under which log-probs do not repeat, or is of a
    family that a policy does not score as Hugging Face does.
    """
    model = vision.load_model(path, "auto", trust_remote_code)
    for name in ("attention_dropout", "resid_pdrop", "embd_pdrop", "hidden_dropout"):
        if getattr(model.config.get_text_config(), name, 0):
            raise ValueError(
                f"{path} sets {name}; expected 0, as log-probs under dropout do not repeat: "
                "edit its config.json"
            )
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = Policy(model.train())
    if not policy.packs and is_first():
        print(f"{path}: rows are padded, as its layers would differ if they were packed")
    if freeze == "vision" and policy.tower is not None:
        policy.tower.requires_grad_(False)
        policy.takes_features = True
    return policy


# ---- Flow reward (paper: flow reward shaping)
def normalise(
    score: Tensor, mask: Tensor, bilateral: bool, power: float, rows_together: int
) -> Tensor:
    """Min-max normalise scores (B, T) over mask (B, T) to [0, 1]; zero outside mask.

    bilateral: to [-1, 1]
    power: exponent, applied in [0, 1]
    rows_together: how many rows share a minimum and a maximum: 1 (paper), or G to keep what tells
        the responses of a group apart
    Scores that are all equal become zero.
    """
    scope_mask = mask.view(
        -1, rows_together * mask.shape[1]
    )  # a row is what is normalised together
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


def clamp_excess(excess: Tensor, mask: Tensor, cap: float) -> Tensor:
    """Return clamp(excess, 0, cap)/cap over mask (B, T), in [0, 1]; zero outside mask.

    excess (B, T) is in spreads of expert tokens, see flow.excess_score: nothing is penalised in
    what looks like an expert's, and nothing counts for more than the cap.
    """
    unit = excess.clamp(0, cap) / cap
    return torch.where(mask, unit, 0.0)


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


def outcome_advantage(reward: Tensor, group_size: int, baseline: Baseline) -> Tensor:
    """Return the outcome advantage (B,) of rewards (B,), G consecutive episodes a group.

    grpo: (r - mean)/(std + 1e-9), where std divides by G - 1
    rloo: r - mean of the others
    dr_grpo, reinforce++: r - mean; the latter is whitened once the token part is added
    reinforce: r
    A group of equal rewards gets exactly 0, but for reinforce.
    """
    if baseline == "reinforce":
        return reward.clone()
    groups = reward.view(-1, group_size)  # (N, G)
    advantage = groups - groups.mean(dim=1, keepdim=True)
    if baseline == "grpo":
        advantage = advantage / (groups.std(dim=1, keepdim=True) + 1e-9)
    elif baseline == "rloo":
        advantage = advantage * group_size / (group_size - 1)
    else:
        assert baseline in ("dr_grpo", "reinforce++"), f"unknown baseline {baseline!r}"
    is_varied = varied_groups(reward, group_size)[:, None]
    return torch.where(is_varied, advantage, 0.0).flatten()


def token_returns(reward: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Return sum_{j>=k} gamma^(j-k) * reward_j over response tokens, (B, T), of rewards (B, T)."""
    reward = reward * mask
    if gamma == 1.0:
        return reward.flip(1).cumsum(dim=1).flip(1) * mask
    returns = torch.zeros_like(reward)
    following = torch.zeros_like(reward[:, 0])  # (B,) the return from token k + 1 on
    for k in reversed(range(reward.shape[1])):
        following = reward[:, k] + gamma * following
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
    clip_low: float,
    clip_high: float,
    ratio_cap: float = 3.0,
) -> tuple[Tensor, Tensor]:
    """Return the PPO-clip loss of each token (B, T), and where it was clipped (B, T) bool.

    -min(rho*A, clip(rho, 1-clip_low, 1+clip_high)*A), rho = min(exp(logp - old_logp), ratio_cap).
    DAPO's clip-higher is clip_high = 0.28. The cap, as official, bounds the loss of tokens with a
    negative advantage, which the clip does not.
    """
    log_ratio = (logp - old_logp).clamp(max=math.log(ratio_cap))
    ratio = log_ratio.exp()
    unclipped = ratio * advantage
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantage
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
        w = soft; without a quantile all have w = 1. (The official code takes the quantile over padding, too.)
    Returns w/sum(w), (B, T), and b, (B,); the caller divides by the step's sum of b.
    """
    row_weight = torch.where(accepted, 1.0, soft)
    token_weight = mask.float()
    if quantile is not None:
        response_entropy = entropy.masked_fill(~mask, torch.nan)
        threshold = response_entropy.nanquantile(quantile, dim=1, keepdim=True)  # (B, 1)
        token_weight = token_weight * torch.where(entropy >= threshold, 1.0, soft)
    return token_weight / token_weight.sum(dim=1, keepdim=True), row_weight


# ---- Schedule and order
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


def permutation(n: int, *key: int | str) -> list[int]:
    """Return a random order of range(n) that depends only on the key."""
    generator = torch.Generator().manual_seed(keyed_seed(*key))
    return torch.randperm(n, generator=generator).tolist()


def group_order(n: int, group_size: int, *key: int | str) -> list[int]:
    """Return range(n) with its consecutive groups in a random order that depends only on the key."""
    starts = range(0, n, group_size)
    order: list[int] = []
    for place in permutation(len(starts), *key):
        first = starts[place]
        order += range(first, min(first + group_size, n))
    return order


def rows_to_run(has_gradient: Tensor, group_size: int, n_ranks: int) -> Tensor:
    """Return which rows (B,) bool, on the CPU, an optimiser step must run.

    They are those with a gradient at any token, has_gradient (B, T), and as many others as it takes
    for every rank to get the same number, one at least: a step is taken whatever the gradient.
    Several ranks run whole groups where these can be dealt out to them, as micro_batches() does,
    and a prompt is computed once for its responses.
    """
    n_rows = len(has_gradient)
    assert n_rows % n_ranks == 0, f"{n_rows} rows for {n_ranks} ranks"
    size = 1  # of what is run or left out as a whole
    if n_ranks > 1 and n_rows % (group_size * n_ranks) == 0:
        size = group_size
    chosen = has_gradient.view(n_rows // size, -1).any(dim=1).cpu()
    n_chosen = int(chosen.sum())
    n_wanted = max(1, math.ceil(n_chosen / n_ranks)) * n_ranks
    others = (~chosen).nonzero().squeeze(1)
    chosen[others[: n_wanted - n_chosen]] = True
    return chosen.repeat_interleave(size)


def passes(n: int, start: int, count: int, *key: int | str) -> list[tuple[int, int]]:
    """Return (epoch, index) of `count` places from `start` on, in endless passes over range(n).

    Each pass, or epoch, has an order of its own.
    """
    orders: dict[int, list[int]] = {}
    visits = []
    for place in range(start, start + count):
        epoch, position = divmod(place, n)
        if epoch not in orders:
            orders[epoch] = permutation(n, *key, epoch)
        visits.append((epoch, orders[epoch][position]))
    return visits
