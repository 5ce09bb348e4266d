"""Exercise 2, 25 minutes: from scores to the tokens that are penalised.

A score says of each response token how far its latent lies from expert latents. The paper shapes it in
two moves. Within each response, scores are brought to [0, 1] by their least and largest:

    s' = (s - min)/(max - min)

Then those above a threshold are kept, and of these the k largest; all others become 0.

B counts responses and T their tokens; shorter responses are padded, and mask is false there.

Bar: every case is right. The check then marks which tokens of two recorded responses are penalised.
"""

from torch import Tensor


def normalise(score: Tensor, mask: Tensor) -> Tensor:
    """Return scores between 0 and 1, (B, T), by the least and the largest of each response.

    score: (B, T); mask: (B, T) bool, true for response tokens. Padding gets 0, and so do all tokens
    of a response whose scores are equal.
    """
    raise NotImplementedError


def select(score: Tensor, threshold: float, top_k: int) -> Tensor:
    """Keep of normalised scores (B, T) those above a threshold, of each response the k largest.

    The others become 0. top_k may be larger than T.
    """
    raise NotImplementedError
