"""Checks of exercise 11: a claim of one seed, an interval over all of them, and what it allows."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from types import ModuleType

from scipy import stats

from course.exercises.cases import Case, Mistake

STUDY = Path(__file__).parents[3] / "study" / "study.json"
SEEDS = range(8)
ENOUGH = 0.1  # a difference that one would speak of


@cache
def accuracies() -> dict[str, list[float]]:
    """Return by arm, for each seed, the share of right answers in the last ten steps."""
    found: dict[str, dict[int, float]] = {}
    for run in json.loads(STUDY.read_text())["runs"]:
        of_arm = found.setdefault(run["arm"], {})
        of_arm[run["seed"]] = mean(run["series"]["correct"][-10:])
    return {
        arm: [of_arm[seed] for seed in SEEDS]
        for arm, of_arm in found.items()
        if set(SEEDS) <= of_arm.keys()
    }


def differences(arm: str) -> list[float]:
    """Return the differences of an arm from RLVR, one a seed."""
    pairs = zip(accuracies()[arm], accuracies()["rlvr"], strict=True)
    return [own - plain for own, plain in pairs]


def claim_of(difference: float) -> str:
    """Return what one would claim of a difference."""
    if abs(difference) < ENOUGH:
        return "no difference"
    return "helps" if difference > 0 else "harms"


def interval(values: list[float], q: float | None = None, divisor: int = 1) -> list[float]:
    """Return mean, low and high; with another quantile or divisor, what a known mistake gives."""
    n = len(values)
    if q is None:
        q = float(stats.t.ppf(0.975, n - 1))
    half = q * stdev(values) / math.sqrt(n) * math.sqrt((n - 1) / (n - divisor))
    return [mean(values), mean(values) - half, mean(values) + half]


def verdict_of(low: float, high: float) -> str:
    """Return what may be said of an interval."""
    if low <= 0 <= high:
        return "cannot tell"
    return "helps" if low > 0 else "harms"


def claim_cases(student: ModuleType) -> Iterator[Case]:
    """Yield the questions of one seed."""
    yield Case(
        "SEED",
        lambda: student.SEED,
        student.SEED if student.SEED in SEEDS else 0,
        expects="a seed of the study, 0 to 7",
    )
    rlvr, published = (accuracies()[arm][student.SEED] for arm in ("rlvr", "published"))
    yield Case(
        f"CLAIM of seed {student.SEED}, where RLVR has {rlvr:.2f} and the published reward "
        f"{published:.2f}",
        lambda: student.CLAIM,
        claim_of(published - rlvr),
        [
            Mistake(
                "no difference", "these two runs differ by more than 0.1, and one would speak of it"
            )
        ],
        expects='another of "helps", "harms" and "no difference"',
    )


def interval_cases(student: ModuleType) -> Iterator[Case]:
    """Yield the questions to paired_interval."""
    values = differences("published")
    small = [0.1, 0.3, -0.1, 0.5]
    for name, sample in (("0.1, 0.3, -0.1, 0.5", small), ("the eight pairs", values)):
        yield Case(
            f"paired_interval of {name}: mean, low, high",
            lambda sample=sample: list(student.paired_interval(sample)),
            interval(sample),
            [
                Mistake(
                    interval(sample, q=1.96),
                    "1.96 is the quantile for many seeds; for few, that of Student's t with n - 1 "
                    "degrees of freedom",
                ),
                Mistake(interval(sample, q=2.365), "q depends on n: stats.t.ppf(0.975, n - 1)"),
                Mistake(interval(sample, divisor=0), "std divides by n - 1, not by n"),
                Mistake(
                    interval(
                        sample, q=float(stats.t.ppf(0.975, len(sample) - 1)) * len(sample) ** 0.5
                    ),
                    "this says where a single seed lies; the mean of n varies less: divide by sqrt(n)",
                ),
                Mistake(
                    interval(sample, q=float(stats.t.ppf(0.95, len(sample) - 1))),
                    "2.5 % on either side make 95 %: the 0.975 quantile",
                ),
            ],
            tolerance=1e-3,
        )


def verdict_cases(student: ModuleType) -> Iterator[Case]:
    """Yield the question of all seeds."""
    _, low, high = interval(differences("published"))
    yield Case(
        f"VERDICT, with an interval from {low:+.2f} to {high:+.2f}",
        lambda: student.VERDICT,
        verdict_of(low, high),
        [
            Mistake(
                "no difference",
                "an interval that holds 0 shows no difference, and it does not show that there is "
                "none: this one holds large gains and large losses",
            ),
            Mistake("harms", "the interval reaches far above 0"),
            Mistake("helps", "the interval reaches far below 0"),
        ],
        expects='another of "helps", "harms" and "cannot tell"',
    )


def cases(student: ModuleType) -> Iterator[Case]:
    """Yield the questions to a student's file."""
    yield from claim_cases(student)
    yield from interval_cases(student)
    yield from verdict_cases(student)


def show(student: ModuleType) -> None:
    """Print all seeds, what any few of them would have said, and the calibrated reward beside."""
    print("seed   RLVR   published   one would claim")
    for seed in SEEDS:
        rlvr, published = (accuracies()[arm][seed] for arm in ("rlvr", "published"))
        claim = claim_of(published - rlvr)
        mark = "   <- yours" if seed == student.SEED else ""
        print(f"{seed:4}   {rlvr:4.2f}   {published:9.2f}   {claim}{mark}")
    print()
    values = differences("published")
    for n in (1, 2, 3):
        claims = Counter(claim_of(mean(chosen)) for chosen in combinations(values, n))
        counted = ", ".join(
            f"{claim} {claims[claim]}" for claim in ("helps", "harms", "no difference")
        )
        print(f"means of {n} of 8 seeds, {claims.total()} choices: {counted}")
    print()
    for arm in ("published", "calibrated"):
        average, low, high = student.paired_interval(differences(arm))
        print(f"{arm:10} - RLVR: {average:+.2f}, 95 % {low:+.2f} to {high:+.2f}", end="")
        print(f": {verdict_of(low, high)}")
    print(
        "\nThe interval of the calibrated reward speaks of new seeds on this base model. On the next one\n"
        "three seeds ended at 0.11, 0.11 and 0.09 (docs/evidence.md): a base model is a draw, too."
    )
