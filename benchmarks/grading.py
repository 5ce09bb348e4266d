"""Compare answers with ours in one worker process, and with plain math-verify, on one core.

    python benchmarks/grading.py PAIRS.jsonl [--limit 4000] [--json FILE]

The pairs are labelled, as `python rewards.py` reads them.
"""

import repository  # noqa: F401

# isort: split
import os
from collections.abc import Callable
from dataclasses import dataclass

import tyro

from common import compare
from infra import errors


@dataclass(frozen=True)
class Settings:
    """What is graded."""

    file: str  # JSONL with gold, pred and expected
    limit: int = 4000  # Pairs, evenly spaced; 0: all
    repeats: int = 3  # Timed repetitions
    json: str | None = None  # Where figures go as well


def load_pairs(settings: Settings) -> list:
    from grading.pairs import read_pairs

    pairs = []
    for group in read_pairs(settings.file).values():
        pairs.extend(group)
    if settings.limit:
        pairs = pairs[:: max(1, len(pairs) // settings.limit)]
    return pairs


def prepare(settings: Settings, variant: str) -> Callable[[], None]:
    """Return a function that grades all pairs and prints the share of errors."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    pairs = load_pairs(settings)
    grade = grade_with_ours if variant == "ours" else grade_with_math_verify
    return lambda: report(pairs, grade(pairs))


def grade_with_ours(pairs: list) -> list[bool]:
    from grading import Pool

    with Pool(n_workers=1) as pool:  # started anew, with nothing remembered
        return [pool.equal(pair.gold, pair.prediction) for pair in pairs]


def grade_with_math_verify(pairs: list) -> list[bool]:
    from math_verify import parse, verify

    verdicts = []
    for pair in pairs:
        golds = [pair.gold] if isinstance(pair.gold, str) else pair.gold
        prediction = parse(rf"${pair.prediction}$")
        verdicts.append(any(verify(parse(f"${gold}$"), prediction) for gold in golds))
    return verdicts


def report(pairs: list, verdicts: list[bool]) -> None:
    n_errors = 0
    for is_equal, pair in zip(verdicts, pairs, strict=True):
        n_errors += is_equal != pair.expected
    print(f"{len(pairs)} pairs, {n_errors} errors ({n_errors / len(pairs):.2%})")


def main() -> None:
    """Read the pairs once before any is graded, and compare."""
    settings = tyro.cli(Settings, config=(tyro.conf.PositionalRequiredArgs,))
    load_pairs(settings)
    compare("verify answers", prepare, settings, ["ours", "plain math-verify"])


if __name__ == "__main__":
    errors.run(main)
