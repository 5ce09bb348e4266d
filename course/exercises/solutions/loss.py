"""Solution of exercise 5: rlfr.ppo_loss, which rlfr.policy_loss calls for `--loss ppo`."""

import torch
from torch import Tensor

RATIO_CAP = 3.0


def ppo_loss(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, clip: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Return the loss of each token, (B, T), and where the clip binds, (B, T) bool."""
    low, high = clip
    ratio = (logp - old_logp).exp().clamp(max=RATIO_CAP)
    unclipped = ratio * advantage
    clipped = ratio.clamp(1 - low, 1 + high) * advantage
    return -torch.minimum(unclipped, clipped), clipped < unclipped
