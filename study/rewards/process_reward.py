"""A perfect process reward for the embedded worlds of text: the share of the steps that are right.

It is what a dense reward could reach at best, beside which others are measured. The world itself
labels the steps; see label_steps of worlds/toy.py and of worlds/gsm.py.

    python train_rl.py --model toy-sparse --shaping none --reward binary study/rewards/process_reward.py
"""

import worlds


def reward(problem: str, response: str, answer: str, solution: str | None) -> float:
    """Return how many of the problem's steps the response writes and gets right, in [0, 1]."""
    return worlds.progress(problem, solution, response)
