"""Noise: a normal number for each token. What a reward does that knows nothing.

python train_rl.py --model toy-sparse --shaping study/rewards/noise.py
"""

import torch

from dense import DenseReward
from infra.batching import keyed_seed


class Reward(DenseReward):
    """Random numbers, the same whatever the batching."""

    def __init__(self, settings, host):
        self.seed = host.seed

    def score(self, part):
        score = torch.zeros(part.batch.response_mask.shape)
        for row, index in enumerate(part.indices):
            generator = torch.Generator().manual_seed(
                keyed_seed("noise", self.seed, self.step, index)
            )
            length = len(part.episodes[row].response_ids)
            score[row, :length] = torch.randn(length, generator=generator)
        return score.to(part.batch.input_ids.device)
