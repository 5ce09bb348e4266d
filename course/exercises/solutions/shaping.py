"""Solution of exercise 2: rlfr.normalise and rlfr.select, without their options."""

import torch
from torch import Tensor


def normalise(score: Tensor, mask: Tensor) -> Tensor:
    """Return scores between 0 and 1, (B, T), by the least and the largest of each response."""
    low = score.masked_fill(~mask, torch.inf).amin(dim=1, keepdim=True)
    high = score.masked_fill(~mask, -torch.inf).amax(dim=1, keepdim=True)
    spread = high - low
    return torch.where(mask & (spread > 0), (score - low) / spread, 0.0)


def select(score: Tensor, threshold: float, top_k: int) -> Tensor:
    """Keep of normalised scores (B, T) those above a threshold, of each response the k largest."""
    tail = torch.where(score > threshold, score, 0.0)
    largest = tail.topk(min(top_k, tail.shape[1]), dim=1)
    return torch.zeros_like(tail).scatter(1, largest.indices, largest.values)
