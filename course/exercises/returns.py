"""Exercise 3, 20 minutes: who pays for a penalty that comes later.

A token is responsible for what follows. Its return is the discounted sum of the rewards from it on:

    R_k = sum_{j>=k} gamma^(j-k) * r_j

With gamma = 1, as in the paper, every token before a penalty pays for all of it; with gamma = 0 only
the penalised token does. A response may hold tokens that the policy did not write, such as the result
of a tool. They have no reward and no return, and they discount nothing: j - k counts own tokens.

B counts responses and T their tokens.

Bar: every case is right. The check then draws who pays in a recorded response.
"""

from torch import Tensor


def token_returns(reward: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Return R_k of each response token, (B, T), zero outside mask.

    reward: (B, T); mask: (B, T) bool, the policy's own tokens; gamma: in [0, 1]
    """
    raise NotImplementedError
