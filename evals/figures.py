r"""Figures of an evaluation: accuracies with 95 % intervals, and the tables that show them.

For a problem with n samples, c of them right:

    avg@n   c / n
    pass@k  1 - C(n-c, k) / C(n, k), unbiased: the chance that one of k samples is right    pass_at
    maj@k   the chance that the answer which most of k samples give is right                maj_at

pass@k is eq. 1 of the Codex paper (arXiv:2107.03374). Intervals are over problems (bootstrap).

A *record* is a dict with what is known of one sample, a line of samples.jsonl; see evals/sets.py.
"""

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

N_RESAMPLES = 10_000  # of a bootstrap
RESAMPLES_AT_A_TIME = 500  # bounds the memory of a bootstrap
MAX_SUBSETS = 2_000  # of samples; where there are more, maj@k takes so many at random
SEED = 0  # of resamples and random subsets: the same records always give the same figures


def read_samples(folder: str | Path) -> list[dict]:
    """Read the records of an evaluation from its folder.

    A last line without an end is left out: an interruption has cut it off.

    Raises:
        ValueError: the folder holds no samples.jsonl.
    """
    file = Path(folder, "samples.jsonl")
    if not file.is_file():
        raise ValueError(f"{file} does not exist; expected the folder of an evaluation")
    *lines, _unfinished = file.read_bytes().split(b"\n")
    return [json.loads(line) for line in lines]


def group_by(key: str, records: Sequence[dict]) -> dict[str, list[dict]]:
    """Return the records by their value of `key`, in the order in which the values first appear."""
    groups = defaultdict(list)
    for record in records:
        groups[record[key]].append(record)
    return dict(groups)


# ---- Estimates
def pass_at(k: int, n: int, n_right: int) -> float:
    """Return the unbiased estimate of pass@k from n samples, n_right of them right (eq. 1)."""
    return 1 - math.comb(n - n_right, k) / math.comb(n, k)


def maj_at(k: int, answers: Sequence[int | None], right: Sequence[bool]) -> float:
    """Return the chance that a majority vote of k samples is right.

    This is the mean over all subsets of k samples, or over MAX_SUBSETS random ones where there are
    more. Of the answers that tie for the most votes, each wins with the same chance.

    Args:
        k: Votes.
        answers: (n,) a number for each sample, the same for equal answers; None where a sample has
            no answer, and so no vote.
        right: (n,) whether each sample is right; an answer is right if any sample that gives it is.
    """
    n = len(answers)
    kinds = sorted({answer for answer in answers if answer is not None})
    if not kinds:
        return 0.0
    votes = np.zeros((n, len(kinds)))
    kind_is_right = np.zeros(len(kinds))
    for i, (answer, is_right) in enumerate(zip(answers, right, strict=True)):
        if answer is None:
            continue
        kind = kinds.index(answer)
        votes[i, kind] = 1
        if is_right:
            kind_is_right[kind] = 1
    counts = votes[choose_subsets(k, n)].sum(axis=1)  # (subsets, kinds)
    most = counts.max(axis=1, keepdims=True)
    wins = (counts == most) & (most > 0)
    chances = (wins * kind_is_right).sum(axis=1) / np.maximum(1, wins.sum(axis=1))
    return float(chances.mean())


def choose_subsets(k: int, n: int) -> np.ndarray:
    """Return subsets of k of n indices, (subsets, k): all of them, or MAX_SUBSETS random ones."""
    if math.comb(n, k) <= MAX_SUBSETS:
        return np.array(list(combinations(range(n), k)))
    order = np.random.default_rng(SEED).random((MAX_SUBSETS, n)).argsort(axis=1)
    return order[:, :k]


def bootstrap(values: np.ndarray, are_rates: bool = True) -> np.ndarray:
    """Return 95 % percentile intervals of the means of several values, resampling the problems.

    Where every rate is 0, or every rate is 1, resampling shows no spread: there the far bound is
    the exact binomial one (Clopper and Pearson).

    Args:
        values: (P, M) M values of each of P problems.
        are_rates: Whether the values are rates in [0, 1].

    Returns:
        (2, M) lower and upper bounds.
    """
    n = len(values)
    rng = np.random.default_rng(SEED)
    sums = []
    for _ in range(N_RESAMPLES // RESAMPLES_AT_A_TIME):
        times_drawn = rng.multinomial(n, [1 / n] * n, size=RESAMPLES_AT_A_TIME)
        sums.append(times_drawn @ values)
    means = np.concatenate(sums) / n
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    if are_rates:
        exact = 0.025 ** (1 / n)
        low = np.where((values == 1).all(axis=0), exact, low)
        high = np.where((values == 0).all(axis=0), 1 - exact, high)
    return np.stack([low, high])


def sign_test(n_better: int, n_worse: int) -> float:
    """Return the two-sided p-value of so many problems better and worse by chance alone.

    The test is the exact binomial one; problems that are neither better nor worse are left out.
    """
    n = n_better + n_worse
    outcomes = sum(math.comb(n, i) for i in range(min(n_better, n_worse) + 1))
    return min(1.0, 2 * outcomes / 2**n)


# ---- The figures of a set
def powers_of_two(n: int) -> list[int]:
    """Return the powers of two up to n, and n itself."""
    powers = {2**i for i in range(n.bit_length())}
    return sorted(powers | {n})


def summarise(records: Sequence[dict]) -> dict:
    """Return the figures of one set from its records, the same number of samples for each problem.

    Returns:
        `problems`, and `samples` of each; `avg`, and `pass` and `maj` by k, each with `mean`, `low`
        and `high`; the shares `truncated` and `boxed`; `length_mean` and `length_p95` in tokens;
        `timeouts`, how many answers took the grader too long.
    """
    groups = list(group_by("problem", records).values())
    n = len(groups[0])
    figures = {"problems": len(groups), "samples": n, "avg": {}, "pass": {}, "maj": {}}
    columns = score_problems(groups)
    values = np.array(list(columns.values())).T  # (problems, columns)
    lows, highs = bootstrap(values)
    for (kind, k), mean, low, high in zip(columns, values.mean(axis=0), lows, highs, strict=True):
        interval = {"mean": float(mean), "low": float(low), "high": float(high)}
        if kind == "avg":
            figures["avg"] = interval
        else:
            figures[kind][str(k)] = interval
    figures.update(describe_responses(records))
    return figures


def score_problems(groups: Sequence[Sequence[dict]]) -> dict[tuple[str, int], list[float]]:
    """Return (kind, k) -> values (problems,): avg@n, pass@k for every k, maj@k for powers of two.

    Args:
        groups: The records of each problem, n of them.
    """
    n = len(groups[0])
    n_right = np.array([sum(record["correct"] for record in group) for group in groups])
    columns = {("avg", n): list(n_right / n)}
    for k in range(1, n + 1):
        columns["pass", k] = [pass_at(k, n, int(count)) for count in n_right]
    for k in powers_of_two(n):
        column = []
        for group in groups:
            answers = [record["cluster"] for record in group]
            right = [record["correct"] for record in group]
            column.append(maj_at(k, answers, right))
        columns["maj", k] = column
    return columns


def describe_responses(records: Sequence[dict]) -> dict:
    """Return how long responses are, and what share of them was cut off or has an answer."""
    lengths = [record["tokens"] for record in records]
    share = 1 / len(records)
    return {
        "truncated": share * sum(record["finish_reason"] == "length" for record in records),
        "boxed": share * sum(record["extracted"] is not None for record in records),
        "length_mean": float(np.mean(lengths)),
        "length_p95": float(np.quantile(lengths, 0.95)),
        "timeouts": sum(record["verdict"] == "timeout" for record in records),
    }


# ---- Tables
def ks_to_show(rows: dict[str, dict]) -> list[int]:
    """Return the k for which a table of these sets shows pass@k and maj@k: at 1 both are avg@n."""
    largest = max((row["samples"] for row in rows.values()), default=1)
    return powers_of_two(largest)[1:]


def table(rows: dict[str, dict]) -> str:
    """Lay out figures of summarise() as Markdown that reads well on the screen: a row a set."""
    ks = ks_to_show(rows)
    heading = ["", "avg@n", "95 % interval"]
    heading += [f"{kind}@{k}" for kind in ("pass", "maj") for k in ks]
    heading += ["problems", "n", "length", "p95", "cut", "boxed", "timeouts"]
    lines = [heading]
    for name, row in rows.items():
        average = row["avg"]
        cells = [name, percent(average["mean"])]
        cells.append(f"{100 * average['low']:.1f} – {100 * average['high']:.1f}")
        for kind in ("pass", "maj"):
            for k in ks:
                interval = row[kind].get(str(k))  # None: this set has fewer samples than another
                cells.append(percent(interval["mean"]) if interval else "")
        cells += [str(row["problems"]), str(row["samples"])]
        cells += [f"{row['length_mean']:.1f}", f"{row['length_p95']:.0f}"]
        cells += [percent(row["truncated"]), percent(row["boxed"]), str(row["timeouts"])]
        lines.append(cells)
    return markdown(lines)


def percent(share: float | None) -> str:
    """Format a share in [0, 1], e.g. 25.0%; a dash for one that there is not."""
    if share is None:
        return "–"
    return f"{share:.1%}"


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Lay out a heading and rows as a Markdown table with padded cells."""
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    rule = ["-" * widths[0]]
    rule += ["-" * (width - 1) + ":" for width in widths[1:]]
    heading, *rows = (pad(line, widths) for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in [heading, rule, *rows])


def pad(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Pad the cells of a line: the first to the left, the others to the right."""
    first = line[0].ljust(widths[0])
    others = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
    return [first, *others]
