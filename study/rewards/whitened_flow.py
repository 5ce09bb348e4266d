"""A flow of what ridge regression leaves open: the flow reward on whitened latents.

The flow's error is a mean over dimensions, which in the latents themselves those of a wide spread
decide. Here ridge.py first takes from a latent what follows linearly from the latent before, and
measures the rest in its own spreads. A flow is fitted to that, on expert solutions, given the latent
before (the context `previous` of flow.py). It does not learn from the policy. With whiten=False the
residual keeps its spreads, with first=True all latents are those of the policy before it learnt.

    python train_rl.py --model toy-sparse --shaping study/rewards/whitened_flow.py \\
        --dense-on response --dense experts=runs/toy-sparse/expert.jsonl
"""

from dataclasses import dataclass
from pathlib import Path

import torch

import flow as fl
from infra.files import import_file

ridge = import_file(str(Path(__file__).with_name("ridge.py")))
TIMES = (0.2, 0.5, 0.8)  # at which the error counts


@dataclass(frozen=True)
class Settings(ridge.Settings):
    """Settings of the reward."""

    whiten: bool = True
    steps: int = 200  # of the fit, a micro-batch each


class Reward(ridge.Reward):
    """Minus the excess of the flow's deviation over that of expert tokens, by tap."""

    Settings = Settings

    def fit(self, parts, settings):
        """Fit the regressions, and the flow to their residuals."""
        super().fit(parts, settings)
        n_taps, _, dim = self.module.weights.shape
        self.keep(noise=torch.randn(n_taps, 1, 1, dim))
        flow = fl.VelocityNet(dim, dim, width=dim, n_blocks=1).to(self.module.noise.device)
        optimiser = torch.optim.AdamW(flow.parameters(), lr=1e-3)
        for step in range(settings.steps):
            rows = self.rows(parts[step % len(parts)])
            noise = torch.randn(*rows.exists.shape, dim, device=rows.x_1.device)
            times = fl.draw_times(torch.randn_like(noise[..., 0]), "random")
            fl.matching_loss(flow, rows, noise, times)
            optimiser.step()
            optimiser.zero_grad()
        self.module.flow = flow.requires_grad_(False)

    def rows(self, part, first=False):
        """Return the whitened residuals of a micro-batch as rows of the flow, L * M of them."""
        residuals = self.residuals(part, first)
        before = [part.latents(tap, back=1, first=first) for tap in self.taps]
        exists = torch.ones_like(residuals[:, None, :, 0], dtype=torch.bool)  # (L, 1, M)
        depth = torch.tensor(self.taps, device=residuals.device)
        return fl.FlowRows(residuals.flatten(0, 1), torch.cat(before), depth, exists)

    def errors(self, part, first=False):
        """Return the velocity deviation of each response token at each tap, (L, M).

        All tokens have the same noise, and its opposite, so that a score is of the latents alone.
        """
        rows = self.rows(part, first)
        noise = self.module.noise.expand(*rows.exists.shape, -1)
        both = [fl.errors_of_rows(self.module.flow, rows, each, TIMES) for each in (noise, -noise)]
        return fl.deviation_score(sum(both) / 2, TIMES).view(len(self.taps), -1)
