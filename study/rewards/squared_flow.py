"""The flow reward in another shape: normalised deviations are squared before the largest are kept.

A file may subclass dense.FlowReward, and change what it likes of it; the flow has its own flags,
and self.own holds the settings of the file.

    python train_rl.py --shaping study/rewards/squared_flow.py --flow runs/flow-toy/flow
"""

from dataclasses import dataclass

import rlfr
from dense import FlowReward


@dataclass(frozen=True)
class Settings:
    """Settings of the reward."""

    power: float = 2.0  # to which normalised deviations are raised; 1: the published reward


class Reward(FlowReward):
    """The published reward, of squares."""

    Settings = Settings

    def shape(self, score, mask):
        settings = self.settings
        if settings.flow_scope != "response":
            raise ValueError(f"flow_scope={settings.flow_scope!r}: expected response, in this file")
        unit = rlfr.normalise(score, mask, settings.flow_bilateral, power=self.own.power)
        return -rlfr.select(
            unit, settings.flow_threshold, settings.flow_top_k, settings.flow_bilateral
        )
