"""A reward for length alone, up to about the length of an expert solution: a control.

python train_rl.py --model toy-sparse --shaping none --reward binary study/rewards/length_reward.py
"""

EXPERT_LENGTH = 50  # characters; solutions of 6 to 8 operations have 47 to 59


def reward(problem: str, response: str) -> float:
    """Return the length of a response as a share of EXPERT_LENGTH, 1 at most."""
    return min(1.0, len(response) / EXPERT_LENGTH)
