"""Exercise 5, 25 minutes: the loss of the policy, and what its clip is for.

A step samples once and updates several times. rho says how far a token's probability has moved since
it was sampled, and the clip takes the gradient away where it has moved far enough:

    rho = min(exp(logp - old_logp), 3)
    loss = -min(rho*A, clip(rho, 1 - low, 1 + high)*A)

The minimum makes the clip one-sided: it never stops a token that has moved the wrong way. The cap of 3
bounds the loss of a token with a negative advantage, which the clip does not.

B counts responses and T their tokens.

Bar: every case is right, its gradient included. The check then updates a small policy sixteen times on
the same samples, with the clip and without.
"""

from torch import Tensor

RATIO_CAP = 3.0


def ppo_loss(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, clip: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Return the loss of each token, (B, T), and where the clip binds, (B, T) bool.

    logp, old_logp, advantage: (B, T), log-probs of the policy now and when it sampled
    clip: (low, high); the clip binds where the second argument of the minimum is less than the first
    """
    raise NotImplementedError
