"""A control: another dense reward, a share of whose rewards change places.

What it makes of its scores is shuffled, so that the control gives as much reward, but to others.
Among the tokens of a response the mean of each response stays as it is. Among the responses to a
problem every token gets the mean reward of another response.

    python train_rl.py --model toy-sparse --shaping study/rewards/shuffled.py \\
        --dense of=study/rewards/ridge.py experts=runs/toy-sparse/expert.jsonl among=responses share=0.5

of=flow takes the flow of --flow with its flags. What is no setting of this file is one of the other's.
"""

from dataclasses import dataclass, fields
from typing import Literal

import torch

import rlfr
from dense import DenseReward, make, parse_settings
from infra.batching import permutation


@dataclass(frozen=True)
class Settings:
    """Settings of the control."""

    of: str  # flow, or the file of a reward
    among: Literal["tokens", "responses"] = "tokens"
    share: float = 1.0  # of the rewards that change places


class Reward(DenseReward):
    """The other reward, but for where it rewards."""

    @classmethod
    def make(cls, values, host):
        own = {field.name for field in fields(Settings)}
        settings = parse_settings(Settings, {k: v for k, v in values.items() if k in own})
        reward = make(settings.of, {k: v for k, v in values.items() if k not in own}, host)
        shape = reward.shape

        def shape_shuffled(score, mask):
            key = ("shuffled", host.seed, reward.step)
            group_size = host.config.sampling.group_size
            return shuffle_rewards(shape(score, mask), mask, settings, group_size, key)

        reward.shape = shape_shuffled
        return reward


def shuffle_rewards(reward, mask, settings, group_size, key):
    """Return rewards (B, T), of which a share have changed places."""
    if settings.among == "responses":
        groups = rlfr.mean_over_tokens(reward, mask).split(group_size)
        moved = [shuffle(group, settings.share, *key, i) for i, group in enumerate(groups)]
        return torch.cat(moved)[:, None] * mask
    reward = reward.clone()
    for row, scored in enumerate(mask):
        reward[row, scored] = shuffle(reward[row, scored], settings.share, *key, row)
    return reward


def shuffle(values, share, *key):
    """Return values (K,), of which a share have changed places."""
    order = permutation(len(values), *key)
    moved = torch.tensor(order[: round(share * len(values))], dtype=torch.long)
    values = values.clone()
    values[moved.sort().values] = values[moved]
    return values
