"""A reward for problems with a short answer: 1 if the last box of a response holds exactly it.

    python train_rl.py … --reward study/rewards/boxed_reward.py

The embedded worlds need no more: their answers are digits. Two programs that are compared can both
call this function, see benchmarks/peers.py.
"""

import re

BOX = re.compile(r"\\boxed\{([^{}]*)\}")


def reward(problem: str, response: str, answer: str) -> float:
    """Return 1 for a response whose last box holds the answer, letter by letter, else 0."""
    boxes = BOX.findall(response)
    return float(bool(boxes) and boxes[-1] == answer)
