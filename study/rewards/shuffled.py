"""A control: another dense reward, a share of whose scores change places.

Among the tokens of a response the mean of each response stays as it is. Among the responses of a step
every token gets the mean score of another response.

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
    share: float = 1.0  # of the scores that change places


class Reward(DenseReward):
    """The other reward, but for where its scores are."""

    @classmethod
    def make(cls, values, host):
        own = {field.name for field in fields(Settings)}
        settings = parse_settings(Settings, {k: v for k, v in values.items() if k in own})
        reward = make(settings.of, {k: v for k, v in values.items() if k not in own}, host)
        shape = reward.shape

        def shape_shuffled(score, mask):
            return shape(
                shuffle_scores(score, mask, settings, ("shuffled", host.seed, reward.step)), mask
            )

        reward.shape = shape_shuffled
        return reward


def shuffle_scores(score, mask, settings, key):
    """Return scores (B, T), of which a share have changed places."""
    if settings.among == "responses":
        mean = rlfr.mean_over_tokens(score, mask)  # (B,)
        return shuffle(mean, settings.share, *key)[:, None] * mask
    score = score.clone()
    for row, scored in enumerate(mask):
        score[row, scored] = shuffle(score[row, scored], settings.share, *key, row)
    return score


def shuffle(values, share, *key):
    """Return values (K,), of which a share have changed places."""
    order = permutation(len(values), *key)
    moved = torch.tensor(order[: round(share * len(values))], dtype=torch.long)
    values = values.clone()
    values[moved.sort().values] = values[moved]
    return values
