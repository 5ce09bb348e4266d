"""Solution of exercise 4: rlfr.outcome_advantage with the baseline grpo."""

import torch
from torch import Tensor


def outcome_advantage(reward: Tensor, group_size: int) -> Tensor:
    """Return the advantage of each episode, (B,)."""
    groups = reward.view(-1, group_size)  # (N, G)
    centred = groups - groups.mean(dim=1, keepdim=True)
    advantage = centred / (groups.std(dim=1, keepdim=True) + 1e-9)
    # not by the std: that of eight times 0.7 is a rounding error, and so is the difference
    is_varied = groups.amax(dim=1, keepdim=True) > groups.amin(dim=1, keepdim=True)
    return torch.where(is_varied, advantage, 0.0).flatten()
