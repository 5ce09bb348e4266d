"""A perfect process reward for the embedded worlds of text: the share of the chain that is right.

It is what a dense reward could reach at best, beside which others are measured. The world itself
labels the steps; see label_steps of worlds/toy.py.

    python train_rl.py --model toy-sparse --shaping none --reward binary study/rewards/process_reward.py
"""

from worlds import toy


def reward(problem: str, response: str, answer: str) -> float:
    """Return how many of the problem's steps the response writes and gets right, in [0, 1]."""
    n_right = sum(step.is_right for step in toy.label_steps(problem, response))
    n_operations = problem.count(" ")
    return n_right / n_operations
