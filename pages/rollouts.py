"""A page to read rollouts by: tokens coloured by what training computed of them, step by step.

The page is rollouts.html, rollouts.css and rollouts.js in the skeleton of page.py; inspector.py is
the command. Records are those of infra/record.py. The groups of a step lie compressed in the page
and are unpacked when the reader comes to the step.
"""

import json
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from infra import record
from infra.files import need_keys, shown
from infra.metrics import read_metrics
from pages.falls import find_lowest, say_falls
from pages.page import FOLDER, escape, fill, make_page, pack, write_page

MAX_BYTES = 2.9e6  # of the rollouts in a page
OF_THE_GROUP = ("problem", "question", "answer", "prompt", "images")
OF_A_RESPONSE = (
    "sample",
    "reward",
    "parts",
    "correct",
    "verdict",
    "extracted",
    "finish_reason",
    "text",
    "outcome",
    "tokens",
    "token_ids",
    "logp",
    "entropy",
    "dense_reward",
    "advantage",
    "ratio",
    "dense_score",
)
OF_EACH_TOKEN = ("tokens", "token_ids", "logp", "entropy", "dense_reward", "advantage", "ratio")
# A problem of the worlds of worlds/toy.py, and what such a problem does not say itself
CHAIN = re.compile(r"\d( [-+*]\d)+>|(<image>)?sum>")
OF_CHAINS = "Problems are calculated from left to right, modulo 10: 6+7=3."
MEASURED = ("dense_reward", "logp", "entropy", "ratio", "outcome")  # if they are known


def inspect_run(folder: str | Path) -> Path:
    """Write rollouts.html into a run's folder, and return its path; ValueError without rollouts."""
    folder = Path(folder)
    steps = {}
    for step, path in record.need_files(folder).items():
        steps[step] = record.read(path)
        check_records(steps[step], path)
    metrics: list[dict[str, float]] = []
    if (folder / "metrics.jsonl").is_file():
        metrics = read_metrics(folder / "metrics.jsonl")
    title = f"Rollouts of {folder.resolve().name}"
    return write_rollouts_page(folder / "rollouts.html", title, steps, metrics)


def check_records(records: list[dict], path: Path) -> None:
    """Raise ValueError for a record of which a part is missing, or of another kind."""
    need_keys(records, path, [*OF_THE_GROUP, *OF_A_RESPONSE])
    for number, one in enumerate(records, 1):
        if not isinstance(one["group"], int):
            raise ValueError(
                f"{path}, object {number}: group is {shown(one['group'])}; expected a number"
            )
        for name in OF_EACH_TOKEN:
            values = one[name]
            if not isinstance(values, list) or len(values) != len(one["tokens"]):
                raise ValueError(
                    f"{path}, object {number}: {name} is {shown(values)}; expected a list with a "
                    "value for each token"
                )


def write_rollouts_page(
    path: Path,
    title: str,
    steps: dict[int, list[dict]],
    metrics: Sequence[dict[str, float]] = (),
    max_bytes: float = MAX_BYTES,
) -> Path:
    """Write the page of a run's records by step, of at most about max_bytes, and return its path.

    Where they do not fit, later groups of each step are left out, and then steps; the page says so.

    metrics: the figures of each step, which say where the reward fell; these steps and the ones before
        them are left out last
    """
    falls = find_lowest(metrics)
    rewards = {line["step"]: line.get("reward") for line in metrics}
    first = next(iter(steps.values()))[0]
    packed = {step: list(pack_groups(records)) for step, records in steps.items()}
    wanted = {step for fall in falls for step in (fall - 1, fall)}
    chosen = choose(packed, wanted, max_bytes)
    known = ["advantage", *(name for name in MEASURED if any_number(first[name]))]
    data = {
        "dense": first["dense"],
        "taps": first["taps"],
        "known": known,
        "falls": falls,
        "steps": [
            {"step": step, "reward": rewards.get(step), "groups": groups}
            for step, groups in chosen.items()
        ],
    }
    of_chains = OF_CHAINS if CHAIN.fullmatch(first["question"]) else ""
    body = fill(
        FOLDER / "rollouts.html",
        about=escape(f"{describe(packed, chosen)} {of_chains}"),
        falls=say_falls(metrics, chosen, ""),
        last=str(len(chosen) - 1),
    )
    page = make_page(title, body, data, FOLDER / "rollouts.css", FOLDER / "rollouts.js")
    return write_page(path, page)


def pack_groups(records: list[dict]) -> Iterator[str]:
    """Yield each group of a step, its problem and responses, compressed."""
    groups: dict[int, list[dict]] = {}
    for one in records:
        groups.setdefault(one["group"], []).append(one)
    for members in groups.values():
        group = {name: members[0][name] for name in OF_THE_GROUP}
        group["solution"] = members[0].get("solution")  # where the data has one
        group["responses"] = [{name: one[name] for name in OF_A_RESPONSE} for one in members]
        yield pack(json.dumps(group, ensure_ascii=False))


def any_number(value: object) -> bool:
    """Return whether a part of a record, a number or one for each token, is known at all."""
    if isinstance(value, list):
        return any(map(any_number, value))
    return value is not None


def choose(
    packed: dict[int, list[str]], wanted: Collection[int], max_bytes: float
) -> dict[int, list[str]]:
    """Return as many packed groups as fit: fewer of each step first, then fewer steps.

    The first and the last step stay, and wanted ones, with a group each, whatever their size.
    """
    n_groups = max(len(groups) for groups in packed.values())
    chosen = packed
    while n_groups > 1 and size_of(chosen) > max_bytes:
        n_groups -= 1
        chosen = {step: groups[:n_groups] for step, groups in packed.items()}
    steps = list(chosen)
    n_steps = len(steps)
    while n_steps > 2 and size_of(chosen) > max_bytes:
        n_steps -= 1
        kept = {steps[round(i * (len(steps) - 1) / (n_steps - 1))] for i in range(n_steps)}
        kept.update(wanted)
        chosen = {step: packed[step][:1] for step in steps if step in kept}
    return chosen


def size_of(packed: dict[int, list[str]]) -> int:
    """Return how many bytes packed groups take."""
    return sum(len(group) for groups in packed.values() for group in groups)


def describe(packed: dict[int, list[str]], chosen: dict[int, list[str]]) -> str:
    """Return a sentence on what the page shows of what there is."""
    n_groups, n_chosen = map(count_groups, (packed, chosen))
    if packed == chosen:
        return f"Recorded steps: {len(packed)}; problems in each: {n_groups}."
    return (
        f"Recorded steps: {len(packed)}, of which {len(chosen)} are here; problems in each: "
        f"{n_groups}, of which {n_chosen} are here. The others would make this page too large."
    )


def count_groups(packed: dict[int, list[str]]) -> str:
    """Say how many groups a step has: "4", or "4 to 16" where steps differ."""
    sizes = [len(groups) for groups in packed.values()]
    return " to ".join(str(size) for size in sorted({min(sizes), max(sizes)}))
