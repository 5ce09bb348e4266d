"""Log-probs and entropies of response tokens, without (B, S, V) logits.

log pi(y_k) and H_k come from hidden states, chunk by chunk; the backward makes the chunks again.
M is the number of response tokens of a batch, V the size of the vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from infra.parallel import DEVICE

# Logits held at a time: large products keep a GPU busy, small chunks stay in the caches of a CPU
CHUNK_LOGITS_OF_GPU = 2**28
CHUNK_LOGITS = CHUNK_LOGITS_OF_GPU if DEVICE.type == "cuda" else 2**23
# A forward keeps the first chunks of logits for its backward, up to so many logits (400 MB); the
# backward makes the rest again. That is for a CPU, whose chunks are small: on a GPU the first chunk
# is larger than this, unless a micro-batch has but a few hundred response tokens, and none is kept
KEPT_LOGITS = 96 * 2**20


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
