"""The flow reward in another shape: normalised deviations are squared before the largest are kept.

A file may subclass dense.FlowReward, and change what it likes of it; the flow has its own flags.

    python train_rl.py --shaping study/rewards/squared_flow.py --flow runs/flow-toy/flow
"""

import rlfr
from dense import FlowReward


class Reward(FlowReward):
    """The published reward, of squares."""

    def shape(self, score, mask):
        settings = self.settings
        if settings.flow_scope != "response":
            raise ValueError(f"flow_scope={settings.flow_scope!r}: expected response, in this file")
        unit = rlfr.normalise(score, mask, settings.flow_bilateral, power=2.0)
        return -rlfr.select(
            unit, settings.flow_threshold, settings.flow_top_k, settings.flow_bilateral
        )
