"""Log-prob under an expert policy: how much less likely a token is to it than an expert's own tokens.

The reward that needs no latents: VIP (arXiv 2204.05186) and DPO's implicit reward (2305.18290) are of
this kind. It needs a policy that was fitted to expert solutions, and some of these held out. With
lowest=True every token has the score of the response's worst one.

    python train_rl.py --model toy-sparse --shaping study/rewards/logprob.py --dense-on response \\
        --dense expert=runs/sft/policy experts=runs/toy-sparse/expert.jsonl
"""

from dataclasses import dataclass

import torch

from dense import DenseReward


@dataclass(frozen=True)
class Settings:
    """Settings of the reward."""

    expert: str  # folder of the expert policy
    experts: str  # file of expert solutions
    held_out: int = 64  # the last of them, which the expert policy has not learnt from
    lowest: bool = False  # whether the worst token of a response speaks for it


class Reward(DenseReward):
    """Minus the excess of -log p over that of expert tokens."""

    Settings = Settings
    clamp = (-10.0, 0.0)

    def __init__(self, settings, host):
        self.expert = host.load_policy(settings.expert)
        self.temperature = host.config.sampling.temperature
        self.lowest = settings.lowest
        _, held_out = host.solutions(settings.experts, settings.held_out)
        self.calibrate(self.surprise(part) for part in host.run_policy(held_out, ()))

    @torch.no_grad()
    def surprise(self, part):
        """Return -log p of response tokens, (M,)."""
        return -self.expert(part.batch, self.temperature).logp[part.batch.response_mask]

    def score(self, part):
        score = part.per_token(-self.excess(self.surprise(part)))
        if self.lowest:
            mask = part.batch.response_mask
            lowest = score.masked_fill(~mask, torch.inf).amin(dim=1, keepdim=True)
            score = lowest.where(mask, 0.0)
        return score
