"""Exercise 4, 20 minutes: what an outcome is worth beside those of its group.

The policy answers each problem G times. The outcome advantage compares a reward with the rewards of
the other answers to the same problem (GRPO):

    A = (r - mean)/(std + 1e-9)        mean and std over the group; std divides by G - 1

Where all rewards of a group are equal there is nothing to compare: the advantage is exactly 0.

B = N*G episodes; episodes 0 to G - 1 answer the first problem, the next G the second one, and so on.

Bar: every case is right. The check then counts which groups teach something, and how much.
"""

from torch import Tensor


def outcome_advantage(reward: Tensor, group_size: int) -> Tensor:
    """Return the advantage of each episode, (B,).

    reward: (B,), G = group_size consecutive episodes a group
    """
    raise NotImplementedError
