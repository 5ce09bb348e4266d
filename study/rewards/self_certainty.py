"""Self-certainty: how far the policy's distribution is from a uniform one. It needs nothing but itself.

This is log V - H, the KL from the policy to the uniform distribution, which rewards what minimising
entropy does (arXiv 2505.22660). Intuitor (2505.19590) takes the KL the other way round.

    python train_rl.py --model toy-sparse --shaping study/rewards/self_certainty.py
"""

import math

from dense import DenseReward


class Reward(DenseReward):
    """log V - H of each token."""

    def __init__(self, settings, host):
        self.largest = math.log(host.model.text_config.vocab_size)

    def score(self, part):
        return self.largest - part.output.entropy
