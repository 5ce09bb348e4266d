"""Verifying answers: ours in one worker process, and plain math-verify in one process, on one core.

python benchmarks/grading.py PAIRS.jsonl [--limit 4000] [--json FILE]        labelled pairs, as `python rewards.py` reads
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from common import compare

sys.path.insert(0, str(Path(__file__).parents[1]))


@dataclass(frozen=True)
class Settings:
    """What is graded."""

    file: str  # JSONL with gold, pred and expected
    limit: int = 4000  # Pairs, evenly spaced; 0: all
    repeats: int = 3  # Timed repetitions
    json: str | None = None  # Where figures go as well


def prepare(settings: Settings, variant: str):
    """Return a function that grades all pairs and prints the share of errors."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    from rewards import Grader, read_pairs

    pairs = [pair for group in read_pairs(settings.file).values() for pair in group]
    pairs = pairs[:: max(1, len(pairs) // settings.limit)] if settings.limit else pairs

    def ours() -> None:
        with Grader(n_workers=1) as grader:  # started anew, with nothing cached
            report(pairs, [grader.equal(pair["gold"], pair["pred"]) for pair in pairs])

    def plain() -> None:
        from math_verify import parse, verify

        found = []
        for pair in pairs:
            golds = [pair["gold"]] if isinstance(pair["gold"], str) else pair["gold"]
            prediction = parse(rf"${pair['pred']}$")
            found.append(any(verify(parse(f"${gold}$"), prediction) for gold in golds))
        report(pairs, found)

    return ours if variant == "ours" else plain


def report(pairs: list[dict], found: list[bool]) -> None:
    wrong = sum(is_equal != pair["expected"] for is_equal, pair in zip(found, pairs, strict=True))
    print(f"{len(pairs)} pairs, {wrong} errors ({wrong / len(pairs):.2%})")


if __name__ == "__main__":
    settings = tyro.cli(Settings, config=(tyro.conf.PositionalRequiredArgs,))
    compare("verify answers", prepare, settings, ["ours", "plain math-verify"])
