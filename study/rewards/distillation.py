"""On-policy distillation: log p of an expert policy less the policy's own (arXiv 2306.13649, 2306.08543).

Its expectation is minus the KL from the policy to the expert, token by token, on the policy's own
text. It needs a policy that was fitted to expert solutions.

    python train_rl.py --model toy-sparse --shaping study/rewards/distillation.py --gamma 0 \\
        --dense-coef 0.1 --dense expert=runs/sft/policy
"""

from dataclasses import dataclass

import torch

from dense import DenseReward


@dataclass(frozen=True)
class Settings:
    """Settings of the reward."""

    expert: str  # folder of the expert policy


class Reward(DenseReward):
    """log p_expert - log p of each token."""

    Settings = Settings
    clamp = (-10.0, 10.0)

    def __init__(self, settings, host):
        self.expert = host.load_policy(settings.expert)
        self.temperature = host.config.sampling.temperature

    @torch.no_grad()
    def score(self, part):
        return self.expert(part.batch, self.temperature).logp - part.output.logp
