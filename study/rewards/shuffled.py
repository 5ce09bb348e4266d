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
from dense import Wrapper, parse_settings
from infra.seeds import permutation


@dataclass(frozen=True)
class Settings:
    """Settings of the control."""

    of: str  # flow, or the file of a reward
    among: Literal["tokens", "responses"] = "tokens"
    share: float = 1.0  # of the scores that change places


class Reward(Wrapper):
    """The other reward, but for where its scores are."""

    @classmethod
    def make(cls, values, host):
        own = {field.name for field in fields(Settings)}
        self = cls.around(values["of"], {k: v for k, v in values.items() if k not in own}, host)
        self.settings = parse_settings(Settings, {k: v for k, v in values.items() if k in own})
        self.seed = host.seed
        return self

    def shape(self, score, mask):
        if self.settings.among == "responses":
            mean = rlfr.mean_over_tokens(score, mask)  # (B,)
            return super().shape(self.shuffle(mean, "responses")[:, None] * mask, mask)
        score = score.clone()
        for row, scored in enumerate(mask):
            score[row, scored] = self.shuffle(score[row, scored], "tokens", row)
        return super().shape(score, mask)

    def shuffle(self, values, *key):
        """Return values (K,), of which a share have changed places."""
        order = permutation(len(values), "shuffled", *key, self.seed, self.step)
        moved = torch.tensor(order[: round(self.settings.share * len(values))], dtype=torch.long)
        values = values.clone()
        values[moved.sort().values] = values[moved]
        return values
