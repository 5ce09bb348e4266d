"""A dense reward that learns: how well a small network tells the latents of right responses."""

import torch

from dense import DenseReward
from infra import parallel


class Reward(DenseReward):
    """The log-odds of a network that learns which latents right responses have."""

    taps = (0.5,)
    learns = True
    lr = 1e-2

    def __init__(self, settings, host):
        dim = host.model.text_config.hidden_size
        self.module = torch.nn.Sequential(
            torch.nn.Linear(dim, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
        )

    def begin(self, step, episodes):
        super().begin(step, episodes)
        self.n_tokens = sum(len(episode.response_ids) for episode in episodes)
        self.loss = torch.zeros((), device=parallel.DEVICE)

    def score(self, part):
        mask = part.batch.response_mask
        right = torch.tensor([episode.verdict.correct for episode in part.episodes]).to(mask.device)
        target = right[:, None].expand(mask.shape)[mask]
        odds = self.module(part.latents(0.5)).squeeze(1)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            odds, target.float(), reduction="sum"
        )
        (loss / self.n_tokens).backward()
        self.loss += loss.detach() / self.n_tokens
        return part.per_token(odds.detach())

    def figures(self):
        return {"cross_entropy": parallel.sum_over_ranks(self.loss).item()}
