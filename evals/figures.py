r"""Figures of an evaluation: accuracies with 95 % intervals, and the tables that show them.

For a problem with n samples, c of them right:

    avg@n   c / n
    pass@k  1 - C(n-c, k) / C(n, k), unbiased: the chance that one of k samples is right    pass_at
    maj@k   the chance that the answer which most of k samples give is right                maj_at

pass@k is eq. 1 of the Codex paper (arXiv:2107.03374). Intervals are over problems (bootstrap).

A *record* is a dict with what is known of one sample, a line of samples.jsonl; see evals/sets.py.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np

from infra.files import need_keys, read_json_lines

N_RESAMPLES = 10_000  # of a bootstrap
RESAMPLES_AT_A_TIME = 500  # bounds the memory of a bootstrap
MAX_SUBSETS = 2_000  # of samples; where there are more, maj@k takes so many at random
SEED = 0  # of resamples and random subsets: the same records always give the same figures

GROUPS = {  # sets that the paper averages over
    "maths": (
        "aime24",
        "aime25",
        "amc",
        "math500",
        "minerva",
        "olympiad_bench",
        "MathVista_MINI",
        "MathVision_MINI",
        "MathVerse_MINI",
        "WeMath",
    ),
    "logic": ("LogicVista", "VisuLogic"),
}


def read_samples(folder: str | Path) -> list[dict]:
    """Read the records of an evaluation from its folder.

    A last line without an end is left out: an interruption has cut it off.

    Raises:
        ValueError: the folder holds no samples.jsonl.
    """
    file = Path(folder, "samples.jsonl")
    if not file.is_file():
        raise ValueError(f"{file} does not exist; expected the folder of an evaluation")
    keys = ["set", "problem", "correct", "verdict"]
    records = read_json_lines(file, "a sample a line", may_be_cut=True)
    need_keys(records, file, keys)
    return records


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
    columns = defaultdict(list)
    for group in groups:
        answers = [record["cluster"] for record in group]
        right = [record["correct"] for record in group]
        n_right = sum(right)
        columns["avg", n].append(n_right / n)
        for k in range(1, n + 1):
            columns["pass", k].append(pass_at(k, n, n_right))
        for k in powers_of_two(n):
            columns["maj", k].append(maj_at(k, answers, right))
    return columns


def describe_responses(records: Sequence[dict]) -> dict:
    """Return how long responses are, and what share of them was cut off or has an answer."""
    lengths = []
    n_truncated = 0
    n_boxed = 0
    n_timeouts = 0
    for record in records:
        lengths.append(record["tokens"])
        n_truncated += record["finish_reason"] == "length"
        n_boxed += record["extracted"] is not None
        n_timeouts += record["verdict"] == "timeout"
    share = 1 / len(records)
    return {
        "truncated": share * n_truncated,
        "boxed": share * n_boxed,
        "length_mean": float(np.mean(lengths)),
        "length_p95": float(np.quantile(lengths, 0.95)),
        "timeouts": n_timeouts,
    }


# ---- Averages over sets
class Point(NamedTuple):
    """What a problem, or a question of it, adds to the score of its set.

    The score of a part is the mean of its values, and that of the set is the mean over its parts.
    A set has one part as a rule; the versions of MathVerse are five.
    """

    problem: str  # what the bootstrap draws: points of a problem are drawn together
    value: float  # in [0, 1]
    part: str = ""


def list_points(records: Sequence[dict]) -> list[Point]:
    """Return the points of one set from its records: of each problem the share of right samples."""
    points = []
    for problem, samples in group_by("problem", records).items():
        n_right = sum(sample["correct"] for sample in samples)
        points.append(Point(problem, n_right / len(samples)))
    return points


def average_sets(sets: dict[str, Sequence[Point]]) -> dict[str, dict]:
    """Return averages of scores: over all sets, and over those of each of GROUPS.

    An average is there if it is over two sets or more. Its 95 % interval is a bootstrap that draws
    the problems of each set by themselves.

    Returns:
        Name of the average -> `mean`, `low`, `high`, and the names of its `sets`.
    """
    rng = np.random.default_rng(SEED)
    resamples = {name: resample_score(points, rng) for name, points in sets.items()}
    averages = {}
    for group, members in {"all": tuple(sets), **GROUPS}.items():
        names = [name for name in sets if name in members]
        if len(names) < 2:
            continue
        mean = float(np.mean([score_points(sets[name]) for name in names]))
        resampled = np.mean([resamples[name] for name in names], axis=0)
        low, high = np.quantile(resampled, [0.025, 0.975])
        # Where nothing varies, the far bound is the mean of the exact ones, as in bootstrap.
        exact = np.mean([0.025 ** (1 / count_problems(sets[name])) for name in names])
        if mean == 1:
            low = exact
        if mean == 0:
            high = 1 - exact
        averages[group] = {"mean": mean, "low": float(low), "high": float(high), "sets": names}
    return averages


def count_problems(points: Sequence[Point]) -> int:
    """Return the number of different problems."""
    return len({point.problem for point in points})


def score_points(points: Sequence[Point]) -> float:
    """Return the score of a set."""
    sums, counts = tabulate(points)
    return float(np.mean(sums.sum(axis=0) / counts.sum(axis=0)))


def resample_score(points: Sequence[Point], rng: np.random.Generator) -> np.ndarray:
    """Return the scores of N_RESAMPLES draws of as many problems as the set has."""
    sums, counts = tabulate(points)
    n = len(sums)
    scores = []
    for _ in range(N_RESAMPLES // RESAMPLES_AT_A_TIME):
        times_drawn = rng.multinomial(n, [1 / n] * n, size=RESAMPLES_AT_A_TIME)
        drawn_counts = times_drawn @ counts  # (resamples, parts)
        is_drawn = drawn_counts > 0
        means = times_drawn @ sums / np.maximum(1, drawn_counts)
        scores.append((means * is_drawn).sum(axis=1) / is_drawn.sum(axis=1))
    return np.concatenate(scores)


def tabulate(points: Sequence[Point]) -> tuple[np.ndarray, np.ndarray]:
    """Return the sums of the values and the numbers of points, (problems, parts) each."""
    problems = {problem: i for i, problem in enumerate(dict.fromkeys(p.problem for p in points))}
    parts = {part: i for i, part in enumerate(dict.fromkeys(p.part for p in points))}
    sums = np.zeros((len(problems), len(parts)))
    counts = np.zeros((len(problems), len(parts)))
    for point in points:
        place = (problems[point.problem], parts[point.part])
        sums[place] += point.value
        counts[place] += 1
    return sums, counts


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


def average_table(averages: dict[str, dict]) -> str:
    """Lay out the averages of average_sets() as Markdown."""
    lines = [["average over sets", "avg@n", "95 % interval", "sets"]]
    for name, average in averages.items():
        bounds = f"{100 * average['low']:.1f} – {100 * average['high']:.1f}"
        lines.append([name, percent(average["mean"]), bounds, ", ".join(average["sets"])])
    return markdown(lines)


def percent(share: float | None) -> str:
    """Format a share in [0, 1], e.g. 25.0%; a dash for one that there is not."""
    if share is None:
        return "–"
    return f"{share:.1%}"


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Lay out a heading and rows as a Markdown table with padded cells."""
    # a rule to the right needs two characters: `-:`
    widths = [max(2, *map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * widths[0]]
    rule += ["-" * (width - 1) + ":" for width in widths[1:]]
    heading, *rows = lines
    padded = [pad(heading, widths), rule]
    for row in rows:
        padded.append(pad(row, widths))
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def pad(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Pad the cells of a line: the first to the left, the others to the right."""
    first = line[0].ljust(widths[0])
    others = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
    return [first, *others]
