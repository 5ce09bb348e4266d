"""Solution of exercise 11: on seed 3 the reward helps greatly, and eight seeds cannot tell."""

import math
from statistics import mean, stdev

from scipy import stats

SEED = 3
CLAIM = "helps"
VERDICT = "cannot tell"


def paired_interval(differences: list[float]) -> tuple[float, float, float]:
    """Return the mean of differences, one a seed, and the bounds of its 95 % interval."""
    n = len(differences)
    half = float(stats.t.ppf(0.975, n - 1)) * stdev(differences) / math.sqrt(n)
    return mean(differences), mean(differences) - half, mean(differences) + half
