"""Log-probs and entropies of response tokens, without (B, S, V) logits.

log pi(y_k) and H_k come from hidden states, chunk by chunk; the backward makes the chunks again.
M is the number of response tokens of a batch, V the size of the vocabulary.
"""

from collections.abc import Iterator
from typing import NamedTuple

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


class Scaling(NamedTuple):
    """How z comes of logits a: z = a/temperature, or c * tanh(a/c)/temperature with a softcap c."""

    temperature: float
    softcap: float | None = None  # of the model (Gemma 2)


class OfRows(NamedTuple):
    """What the backward of a chunk needs of each row, (M,) float32."""

    lse: Tensor  # logsumexp over the vocabulary
    entropy: Tensor
    g_logp: Tensor  # gradient by the log-prob
    g_entropy: Tensor
    g_target: Tensor  # g_logp of rows whose target is in the chunk, 0 elsewhere


# ---- What is done with a chunk of logits; on a GPU this is compiled, as it reads them a dozen times
def chunk_figures(logits: Tensor, place: Tensor, scaling: Scaling) -> tuple[Tensor, Tensor, Tensor]:
    """Return z at the place of the target, logsumexp of z, and mean z by the chunk's distribution.

    logits: (M, chunk); place and each result: (M,)
    """
    z = scale(logits, scaling)
    lse = z.logsumexp(dim=-1)
    p = (z - lse[:, None]).exp_()
    return z.gather(1, place[:, None]).squeeze(1), lse, torch.linalg.vecdot(p, z)


def chunk_gradient(logits: Tensor, place: Tensor, rows: OfRows, scaling: Scaling) -> Tensor:
    """Return the gradient by logits (M, chunk), as TokenLogProbs derives it.

    All steps are in place, because a chunk is large.
    """
    lse, entropy, g_logp, g_entropy, g_target = (values[:, None] for values in rows)  # (M, 1)
    z = scale(logits, scaling)
    slope = 1 / scaling.temperature  # dz/da
    if scaling.softcap is not None:
        slope = slope * (1 - (z * (scaling.temperature / scaling.softcap)).square())
    log_p = z.sub_(lse)
    d_z = log_p.exp()  # p
    d_z.mul_(log_p.add_(entropy).mul_(-g_entropy).sub_(g_logp))
    d_z.scatter_add_(1, place[:, None], g_target)
    return d_z.mul_(slope).to(logits.dtype)


CHUNK_WORK = (chunk_figures, chunk_gradient)


def scale(logits: Tensor, scaling: Scaling) -> Tensor:
    """Return the scaled logits z in float32, in memory of their own."""
    logits = logits.float()
    if scaling.softcap is not None:
        logits = scaling.softcap * torch.tanh(logits / scaling.softcap)
    return logits / scaling.temperature


class TokenLogProbs(torch.autograd.Function):
    """log pi(target) and entropy of each row of hidden states; logits are made a few words at a time.

    apply(hidden (M, D), weight (V, D), targets (M,), scaling) -> logp (M,), entropy (M,), in float32
    A last argument may hold CHUNK_WORK, compiled.

    The vocabulary is cut into chunks, not the rows: so each word of the head gets its gradient by one
    product. The backward makes the logits again, but for the first KEPT_LOGITS, which the forward
    leaves to it. With z the scaled logits of a row, y its target, p = softmax(z) and g the incoming
    gradients:
        log p_y = z_y - logsumexp(z)             so  d log p_y / dz_j = [j = y] - p_j
        H = logsumexp(z) - sum_j p_j * z_j       so  d H / dz_j = -p_j * (log p_j + H)
        d loss / dz_j = g_logp * [j = y] + p_j * (-g_H * (log p_j + H) - g_logp)
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, scaling, chunk_work=CHUNK_WORK):
        figures, ctx.gradient = chunk_work
        z_target = torch.zeros(len(hidden), device=hidden.device)
        lse_of_chunks = []
        mean_of_chunks = []
        kept = []  # logits of the first chunks
        may_keep = KEPT_LOGITS if ctx.needs_input_grad[0] else 0
        for words in vocabulary_chunks(len(hidden), len(weight)):
            logits = hidden @ weight[words].T  # (M, chunk)
            place, is_here = find_targets(targets, words)
            z_place, lse, mean = figures(logits, place, scaling)
            z_target += z_place * is_here
            lse_of_chunks.append(lse)
            mean_of_chunks.append(mean)
            may_keep -= logits.numel()
            if may_keep >= 0:
                kept.append(logits)
        lse_of_chunks = torch.stack(lse_of_chunks)  # (n_chunks, M)
        lse = lse_of_chunks.logsumexp(dim=0)
        p_of_chunks = (lse_of_chunks - lse).exp()
        entropy = lse - (p_of_chunks * torch.stack(mean_of_chunks)).sum(dim=0)
        ctx.save_for_backward(hidden, weight, targets, lse, entropy, *kept)
        ctx.scaling = scaling
        return z_target - lse, entropy

    @staticmethod
    def backward(ctx, g_logp, g_entropy):
        hidden, weight, targets, lse, entropy, *kept = ctx.saved_tensors
        d_hidden = torch.zeros_like(hidden, dtype=torch.float32)  # summed over the chunks
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for i, words in enumerate(vocabulary_chunks(len(hidden), len(weight))):
            logits = kept[i] if i < len(kept) else hidden @ weight[words].T
            place, is_here = find_targets(targets, words)
            rows = OfRows(lse, entropy, g_logp, g_entropy, g_logp * is_here)
            d_logits = ctx.gradient(logits, place, rows, ctx.scaling)  # (M, chunk)
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
