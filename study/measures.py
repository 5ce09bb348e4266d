"""What is measured of a run, and what may be said of several: intervals and exact tests.

Measures of a run, from its training accuracy in each step:
    accuracy        mean of the last 10 steps                            last_accuracy
    area            mean of all steps                                    area
    largest fall    how far a step is below the best before it           largest_fall
    steps to A      first step whose 10-step mean reaches A              steps_to
    escaped         accuracy > 0.5                                       has_escaped

And of an arm against another, on the seeds that both have:
    difference      of accuracy, with a 95 % interval by the paired t-test and one by the bootstrap
                    over seeds, or over bases and the seeds of each      t_interval, bootstrap, nested
    McNemar         exact p of the escapes: is one arm's run the only one that escaped as often as
                    the other's?                                         mcnemar
    sign flip       exact p of the mean difference: all signs of the differences   sign_flip
    captured        (arm - baseline)/(ceiling - baseline)                captured

n pairs reach no lower p than 2/2^n.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

WINDOW = 10  # steps of the primary measure and of running means
LEVELS = (0.3, 0.5, 0.7)
ESCAPED = 0.5  # accuracy above which a run has escaped the base model's habit
N_RESAMPLES = 10_000  # of a bootstrap
MOST_FLIPPED = 16  # pairs of which all signs are tried: 65,536


# ---- Measures of a run
def last_accuracy(accuracy: Sequence[float]) -> float:
    """Return the mean accuracy of the last steps."""
    return float(np.mean(accuracy[-WINDOW:]))


def has_escaped(accuracy: Sequence[float]) -> bool:
    """Return whether a run has left the base model's habit."""
    return last_accuracy(accuracy) > ESCAPED


def area(accuracy: Sequence[float]) -> float:
    """Return the area under the curve of accuracy, as the mean over all steps."""
    return float(np.mean(accuracy))


def largest_fall(accuracy: Sequence[float], after: int) -> float:
    """Return how far a run fell below its best step so far, in its steps from `after` on."""
    best = np.maximum.accumulate(accuracy)
    return float(np.max((best - np.asarray(accuracy))[after:], initial=0.0))


def running_mean(values: Sequence[float]) -> np.ndarray:
    """Return the mean of each step and the WINDOW - 1 before it, from step WINDOW on."""
    return np.convolve(values, np.full(WINDOW, 1 / WINDOW), mode="valid")


def steps_to(accuracy: Sequence[float], level: float) -> float:
    """Return after how many steps the running mean has reached a level, infinity if never."""
    reached = np.flatnonzero(running_mean(accuracy) >= level - 1e-9)
    if len(reached) == 0:
        return math.inf
    return float(reached[0] + WINDOW)


# ---- Estimates over seeds
class Interval(NamedTuple):
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float


def t_interval(differences: Sequence[float]) -> Interval:
    """Return the mean of paired differences with the interval of the paired t-test."""
    n = len(differences)
    mean = float(np.mean(differences))
    if n < 2:
        return Interval(mean, math.nan, math.nan)
    error = float(np.std(differences, ddof=1)) / math.sqrt(n)
    half = float(stats.t.ppf(0.975, n - 1)) * error
    return Interval(mean, mean - half, mean + half)


def resample(n: int) -> np.ndarray:
    """Return how often each of n seeds is in each of N_RESAMPLES bootstrap samples."""
    rng = np.random.default_rng(0)
    return rng.multinomial(n, [1 / n] * n, size=N_RESAMPLES)  # (N_RESAMPLES, n)


def bootstrap(values: Sequence[float]) -> Interval:
    """Return the mean of values, one a seed, with a percentile interval by resampling seeds."""
    n = len(values)
    if n < 2:
        return Interval(float(np.mean(values)), math.nan, math.nan)
    means = resample(n) @ np.asarray(values) / n
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(np.mean(values)), float(low), float(high))


def captured(arm: Sequence[float], baseline: Sequence[float], ceiling: Sequence[float]) -> Interval:
    """Return the share of the way from the baseline to the ceiling, resampling seeds together.

    Where the ceiling is no higher than the baseline there is no way, and the share is NaN.
    """
    gain = np.asarray(arm) - np.asarray(baseline)
    room = np.asarray(ceiling) - np.asarray(baseline)
    if room.mean() <= 0:
        return Interval(math.nan, math.nan, math.nan)
    times_drawn = resample(len(gain))
    drawn_room = times_drawn @ room
    has_room = drawn_room > 0
    shares = (times_drawn @ gain)[has_room] / drawn_room[has_room]
    low, high = np.quantile(shares, [0.025, 0.975])
    return Interval(float(gain.mean() / room.mean()), float(low), float(high))


def nested(by_base: Sequence[Sequence[float]]) -> Interval:
    """Return the mean of values of seeds within bases, resampling bases and then their seeds.

    Each base counts the same. With one base the interval says nothing of others.
    """
    rng = np.random.default_rng(0)
    value = float(np.mean([np.mean(values) for values in by_base]))
    if sum(map(len, by_base)) < 2:
        return Interval(value, math.nan, math.nan)
    means = np.empty((N_RESAMPLES, len(by_base)))
    drawn = rng.integers(len(by_base), size=means.shape)
    for base, values in enumerate(by_base):
        chosen = drawn == base
        picks = rng.integers(len(values), size=(chosen.sum(), len(values)))
        means[chosen] = np.asarray(values)[picks].mean(axis=1)
    low, high = np.quantile(means.mean(axis=1), [0.025, 0.975])
    return Interval(value, float(low), float(high))


# ---- Exact tests of pairs
def mcnemar(own: Sequence[bool], others: Sequence[bool]) -> float:
    """Return the exact two-sided p that pairs of which only one escaped favour neither arm."""
    only_own = sum(a and not b for a, b in zip(own, others, strict=True))
    only_other = sum(b and not a for a, b in zip(own, others, strict=True))
    if only_own + only_other == 0:
        return 1.0
    return float(stats.binomtest(only_own, only_own + only_other).pvalue)


def sign_flip(differences: Sequence[float]) -> float:
    """Return the exact two-sided p that the mean of paired differences is 0.

    All signs are tried; a mean that differs from the observed one by rounding alone counts as it.
    Raises ValueError for more pairs than MOST_FLIPPED.
    """
    n = len(differences)
    if not 1 <= n <= MOST_FLIPPED:
        raise ValueError(f"{n} pairs: expected 1 to {MOST_FLIPPED}")
    bits = np.arange(2**n)[:, None] >> np.arange(n) & 1
    sums = (1 - 2 * bits) @ np.asarray(differences, dtype=float)
    observed = abs(sums[0])
    return float(np.mean(np.abs(sums) >= observed - 1e-9))


# ---- A signal against labels
def auc(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """Return the chance that a score of a true label is above one of a false; NaN without both."""
    scores, labels = np.asarray(scores), np.asarray(labels, dtype=bool)
    n_true, n_false = labels.sum(), (~labels).sum()
    if not n_true or not n_false:
        return math.nan
    rank_sum = stats.rankdata(scores)[labels].sum()
    return float((rank_sum - n_true * (n_true + 1) / 2) / (n_true * n_false))


# ---- As texts
def number(value: float, digits: int = 2) -> str:
    """Return a figure as a text; a dash if there is none."""
    if not math.isfinite(value):
        return "–"
    return f"{value:.{digits}f}"


def p_value(p: float) -> str:
    """Return a p-value as a text, a tiny one by its leading digit: none is 0."""
    return f"{p:.4f}" if p >= 1e-4 else f"{p:.0e}"


def interval(estimate: Interval) -> str:
    """Return the bounds of an interval as a text."""
    if math.isnan(estimate.low):
        return "–"
    return f"{estimate.low:+.2f} to {estimate.high:+.2f}"
