"""Attention within the rows of a packed batch.

All else in a decoder works token by token, so it gets the batch's tokens in one row, without the
padding. Importing this registers the attention with transformers under the name PACKED.
"""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from infra import batching

PACKED = "packed"  # name of the attention below, among those of Hugging Face


def attend_packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: batching.Packing | None = None,
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
