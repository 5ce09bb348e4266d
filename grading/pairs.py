"""Count a grader's errors on labelled pairs: `python rewards.py PAIRS.jsonl`.

A line of the file is a pair of answers that are the same, or are not:

    {"gold": "1/2", "pred": "0.5", "expected": true, "group": "rewriting"}

gold may be a list, any of which will do. group may be left out; the table has a row for each.
"""

import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

from grading.pool import DEADLINE, Pool
from infra import errors
from infra.ranges import PositiveFloat, Range, check_values


@dataclass(frozen=True)
class Settings:
    """Settings of a count of errors."""

    file: str  # JSONL with gold, pred, expected, and group where there are several
    # Grading processes; by default one a core, at most 8
    workers: Annotated[int, Range(1, 1024)] | None = None
    deadline: PositiveFloat = DEADLINE  # Seconds for one pair
    json: str | None = None  # Where figures go as well


class Pair(NamedTuple):
    """A gold answer, or a list of them, a prediction, and whether it should be accepted."""

    gold: str | list[str]
    prediction: str
    expected: bool


@dataclass(frozen=True)
class Count:
    """What came of some pairs."""

    n: int
    errors: int
    false_accepts: int  # errors where a wrong answer was accepted
    timeouts: int
    seconds: float


def read_pairs(file: str) -> dict[str, list[Pair]]:
    """Read labelled pairs by group; ValueError names the file and line of what is none."""
    groups = defaultdict(list)
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line.decode())
                pair = Pair(row["gold"], row["pred"], row["expected"])
                group = row.get("group", "all")
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                wanted = 'an object with "gold", "pred" and "expected"'
                raise ValueError(f"{file}, line {number}: {error!r}; expected {wanted}") from error
            check_types(pair, group, f"{file}, line {number}")
            groups[group].append(pair)
    if not groups:
        raise ValueError(f"{file} is empty; expected a labelled pair a line")
    return groups


def check_types(pair: Pair, group: object, place: str) -> None:
    """Raise ValueError, with the place, for fields of a pair that have the wrong type."""
    golds = pair.gold if isinstance(pair.gold, list) else [pair.gold]
    if not all(isinstance(gold, str) for gold in golds):
        raise ValueError(f"{place}: gold is {pair.gold!r}; expected a text or a list of texts")
    if not isinstance(pair.prediction, str):
        raise ValueError(f"{place}: pred is {pair.prediction!r}; expected a text")
    if not isinstance(group, str):
        raise ValueError(f"{place}: group is {group!r}; expected a text")
    if not isinstance(pair.expected, bool):
        raise ValueError(f"{place}: expected is {pair.expected!r}; expected true or false")


def count_errors(pool: Pool, pairs: Sequence[Pair]) -> Count:
    """Compare labelled pairs and count where the verdict is not the expected one."""
    began = time.perf_counter()
    timeouts_before = pool.counts["timeout"]
    verdicts = pool.map(lambda pair: pool.equal(pair.gold, pair.prediction), pairs)
    errors = 0
    false_accepts = 0
    for is_equal, pair in zip(verdicts, pairs, strict=True):
        errors += is_equal != pair.expected
        false_accepts += is_equal and not pair.expected
    timeouts = pool.counts["timeout"] - timeouts_before
    return Count(len(pairs), errors, false_accepts, timeouts, time.perf_counter() - began)


def add_counts(counts: Sequence[Count]) -> Count:
    return Count(
        n=sum(count.n for count in counts),
        errors=sum(count.errors for count in counts),
        false_accepts=sum(count.false_accepts for count in counts),
        timeouts=sum(count.timeouts for count in counts),
        seconds=sum(count.seconds for count in counts),
    )


def count_errors_by_group(settings: Settings) -> dict[str, Count]:
    """Compare the pairs of a file; return a count for each group, and of all as `total`."""
    groups = read_pairs(settings.file)
    counts = {}
    with Pool(settings.workers, settings.deadline) as pool:
        for group, pairs in groups.items():
            counts[group] = count_errors(pool, pairs)
    counts["total"] = add_counts(list(counts.values()))
    return counts


def table(counts: dict[str, Count]) -> str:
    """Lay out the counts, a line for each group, with errors and false accepts in per cent too."""
    lines = [
        f"{'group':14}{'pairs':>9}{'errors':>9}{'':>9}{'false accepts':>15}{'':>9}"
        f"{'timeouts':>10}{'seconds':>10}"
    ]
    for group, count in counts.items():
        lines.append(
            f"{group:14}{count.n:>9}"
            f"{count.errors:>9}{count.errors / count.n:>9.3%}"
            f"{count.false_accepts:>15}{count.false_accepts / count.n:>9.3%}"
            f"{count.timeouts:>10}{count.seconds:>10.2f}"
        )
    return "\n".join(lines)


def main(settings: Settings) -> None:
    """Print the counts as a table, and write them as JSON where asked to."""
    check_values(settings)
    counts = count_errors_by_group(settings)
    print(table(counts))
    if settings.json:
        rows = {group: asdict(count) for group, count in counts.items()}
        Path(settings.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    required_first = (tyro.conf.PositionalRequiredArgs,)
    errors.run(lambda: main(tyro.cli(Settings, config=required_first)))
