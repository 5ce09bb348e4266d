"""The truth: 1 for the tokens of a step that is right, -1 of one that is wrong, as the world labels it.

What a perfect process reward would say (arXiv 2305.20050), for the embedded worlds of text alone: the
ceiling of all others.

    python train_rl.py --model toy-sparse --shaping study/rewards/steps.py --gamma 0 --dense-coef 0.3
"""

import torch

import worlds
from dense import DenseReward


class Reward(DenseReward):
    """1 and -1 in steps, 0 elsewhere."""

    def __init__(self, settings, host):
        self.tokenizer = host.model.tokenizer

    def score(self, part):
        score = torch.zeros(part.batch.response_mask.shape)
        for row, episode in enumerate(part.episodes):
            texts = self.tokenizer.batch_decode([[token] for token in episode.response_ids])
            ends = torch.tensor([len(text) for text in texts]).cumsum(0)
            problem = episode.problem
            for step in worlds.label_steps(problem.text, problem.solution, "".join(texts)):
                inside = (ends > step.start) & (ends <= step.end)
                score[row, : len(ends)][inside] = 1.0 if step.is_right else -1.0
        return score.to(part.batch.input_ids.device)
