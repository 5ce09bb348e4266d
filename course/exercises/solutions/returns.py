"""Solution of exercise 3: rlfr.token_returns."""

import torch
from torch import Tensor


def token_returns(reward: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Return R_k of each response token, (B, T), zero outside mask."""
    returns = torch.zeros_like(reward)
    following = torch.zeros_like(reward[:, 0])  # (B,) the return from token k + 1 on
    for k in reversed(range(reward.shape[1])):
        following = torch.where(mask[:, k], reward[:, k] + gamma * following, following)
        returns[:, k] = following
    return returns * mask
