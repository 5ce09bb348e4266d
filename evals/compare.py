"""Paired comparison of two evaluations of the same problems: is B better than A?

The difference of their accuracies has a 95 % bootstrap interval over problems. A sign test counts
the problems on which B is better or worse. Problems that flipped, from mostly wrong to mostly right
or back, are listed by name. Questions that nobody could judge in one of the two are left out.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from evals.figures import bootstrap, group_by, markdown, read_samples, sign_test

HEADING = ["", "problems", "A", "B", "B − A", "95 % interval", "better", "worse", "sign test p"]


class Pair(NamedTuple):
    """A problem's share of right samples in the two evaluations."""

    name: str  # the set and the problem
    before: float  # in A
    after: float  # in B


def compare(folder_a: str | Path, folder_b: str | Path) -> str:
    """Return the comparison of two evaluations as Markdown.

    Raises:
        ValueError: a folder holds no evaluation, the two have no set in common, or they have
            different problems of a set.
    """
    records_a = read_samples(folder_a)
    records_b = read_samples(folder_b)
    unjudged = find_unjudged([*records_a, *records_b])
    rates_a = rates_by_set(records_a)
    rates_b = rates_by_set(records_b)
    names = [name for name in rates_a if name in rates_b]
    if not names:
        raise ValueError(
            f"--compare {folder_a} {folder_b}: no set in common; "
            f"one has {list(rates_a)}, the other {list(rates_b)}"
        )
    rows = []
    flips = []
    for name in names:
        pairs = pair_problems(name, rates_a[name], rates_b[name], unjudged)
        rows.append([name, *summarise_pairs(pairs)])
        flips += [pair for pair in pairs if (pair.before > 0.5) != (pair.after > 0.5)]
    text = f"A: {folder_a}\n\nB: {folder_b}\n\n{markdown([HEADING, *rows])}\n\n"
    return text + list_flips(flips)


def find_unjudged(records: list[dict]) -> set[tuple[str, str]]:
    """Return set and problem of the records that nobody could judge."""
    return {(r["set"], r["problem"]) for r in records if r["verdict"] == "unjudged"}


def rates_by_set(records: list[dict]) -> dict[str, dict[str, float]]:
    """Return set -> problem -> share of its samples that are right."""
    rates = {}
    for name, of_set in group_by("set", records).items():
        rates[name] = {}
        for problem, samples in group_by("problem", of_set).items():
            rates[name][problem] = np.mean([sample["correct"] for sample in samples])
    return rates


def pair_problems(
    name: str,
    rates_a: dict[str, float],
    rates_b: dict[str, float],
    unjudged: set[tuple[str, str]],
) -> list[Pair]:
    """Pair the judged problems of a set; ValueError if one evaluation has problems more."""
    judged_a = [problem for problem in rates_a if (name, problem) not in unjudged]
    judged_b = [problem for problem in rates_b if (name, problem) not in unjudged]
    common = [problem for problem in judged_a if problem in rates_b]
    if len(common) < max(len(judged_a), len(judged_b)):
        raise ValueError(
            f"{name}: {len(common)} problems in common of {len(judged_a)} and {len(judged_b)}; "
            "compare the same problems"
        )
    return [Pair(f"{name} {problem}", rates_a[problem], rates_b[problem]) for problem in common]


def summarise_pairs(pairs: list[Pair]) -> list[str]:
    """Return the cells of a set, but for its name."""
    before = np.array([pair.before for pair in pairs])
    after = np.array([pair.after for pair in pairs])
    difference = after - before
    low, high = bootstrap(difference[:, None], are_rates=False)[:, 0]
    n_better = int((difference > 0).sum())
    n_worse = int((difference < 0).sum())
    return [
        str(len(pairs)),
        f"{before.mean():.1%}",
        f"{after.mean():.1%}",
        f"{100 * difference.mean():+.1f}",
        f"{100 * low:+.1f} – {100 * high:+.1f}",
        str(n_better),
        str(n_worse),
        f"{sign_test(n_better, n_worse):.3g}",
    ]


def list_flips(flips: list[Pair]) -> str:
    """List the problems that B has lost, then those that it has won."""
    text = f"{len(flips)} problems flipped\n"
    if not flips:
        return text
    rows = []
    for pair in flips:
        outcome = "won" if pair.after > pair.before else "lost"
        rows.append([pair.name, f"{pair.before:.0%}", f"{pair.after:.0%}", outcome])
    rows.sort(key=lambda row: row[-1])
    return f"{text}\n{markdown([['problem', 'A', 'B', ''], *rows])}\n"
