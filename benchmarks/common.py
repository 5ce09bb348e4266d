"""What the benchmarks share.

Measurements: one process a variant, medians, peak memory, a table and its JSON. Pages in Markdown:
tables, and their places in a page.
"""

import math
import multiprocessing
import os
import platform
import re
import resource
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from infra.files import write_json


def machine() -> str:
    """Name the device and the software."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        processor = (
            Path("/proc/cpuinfo")
            .read_text()
            .partition("model name")[2]
            .partition("\n")[0]
            .strip(" \t:")
        )
        device = f"{processor or platform.processor()}, {torch.get_num_threads()} threads"
    return f"{device}; torch {torch.__version__}, Python {platform.python_version()}"


def resident() -> int:
    """Return the resident memory of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def in_child(prepare: Callable, settings, variant: str, queue) -> None:
    """Prepare a variant, run it twice, and queue the second run's seconds and extra peak bytes."""
    work = prepare(settings, variant)
    cuda = torch.cuda.is_available()
    before = torch.cuda.memory_allocated() if cuda else resident()
    for _ in range(2):  # the first is a warm-up
        began = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    peak = (
        torch.cuda.max_memory_allocated()
        if cuda
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    queue.put({"seconds": seconds, "peak_mb": (peak - before) / 1e6})


def run_child(context, target: Callable, *arguments) -> dict[str, float]:
    """Run `target(*arguments, queue)` in a process of its own; return what it puts into the queue.

    `context` is one of multiprocessing's: it says how the process begins.
    """
    queue = context.Queue()
    child = context.Process(target=target, args=(*arguments, queue))
    child.start()
    child.join()
    if child.exitcode:
        raise RuntimeError(f"{arguments[-1]!r} ended with exit code {child.exitcode}")
    return queue.get()


def median_of(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the median of each figure over several runs."""
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def compare(title: str, prepare: Callable, settings, variants: list[str]) -> dict:
    """Measure variants in turns, print a table and write JSON; ratios are to the last variant.

    Each run is a process of its own: prepare(settings, variant) returns a function without
    arguments, which it runs. Medians of `settings.repeats` runs count; `settings.json` names the file.
    """
    context = multiprocessing.get_context("spawn")
    runs = {variant: [] for variant in variants}
    for _ in range(settings.repeats):
        for variant in variants:
            runs[variant].append(run_child(context, in_child, prepare, settings, variant))
    rows = [{"variant": variant, **median_of(runs[variant])} for variant in variants]
    base = rows[-1]
    ratio = {
        f"{row['variant']} {key}": row[key] / base[key]
        for row in rows[:-1]
        for key in ("seconds", "peak_mb")
    }
    width = max(len(variant) for variant in variants)
    print(f"{title}\n{machine()}\n{'':{width}}{'seconds':>10}{'extra peak MB':>16}")
    for row in rows:
        print(f"{row['variant']:{width}}{row['seconds']:>10.3f}{row['peak_mb']:>16.0f}")
    print(f"ratios to {base['variant']}")
    for name, value in ratio.items():
        print(f"{name:{width + len(' seconds')}}  {value:.2f}")
    result = {
        "machine": machine(),
        "settings": asdict(settings),
        "rows": rows,
        "ratio": ratio,
        "runs": runs,
    }
    keep(result, settings.json)
    return result


def keep(figures: dict, file: str | None) -> None:
    """Write figures to the file of --json, if it is given; its folder is made."""
    if file:
        write_json(Path(file), figures)


# ---- Pages in Markdown
# What a token shows in place of what would not be seen, or would end its cell
SIGNS = {" ": "␣", "`": "´", "|": "\\|"}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def code(text: str) -> str:
    """Return a token as code for a cell of a table: it can be seen, and ends no cell."""
    if not text:
        return "◌"
    shown = ""
    for character in text:
        if character in SIGNS:
            shown += SIGNS[character]
        elif character.isprintable():
            shown += character
        else:
            shown += character.encode("unicode_escape").decode()
    return f"`{shown}`"


def number(value: float, digits: int = 4) -> str:
    """Format a number with significant digits and a proper minus; a dash for none."""
    if math.isnan(value):
        return "–"
    without_signed_zero = value + 0.0
    return f"{without_signed_zero:.{digits}g}".replace("-", "−")


def relink(page: str, origin: Path, folder: Path, moved: Collection[str] = ()) -> str:
    """Return a page of the folder `origin` with links that lead to the same files from another one.

    moved: names of files that lie in the other folder itself
    """

    def link(match: re.Match) -> str:
        target = origin / match[1]
        return f"]({target.name if target.name in moved else os.path.relpath(target, folder)}"

    return re.sub(r"\]\((?!http)([^)#]+)", link, page)


def put_tables(page: str, tables: dict[str, str]) -> str:
    """Return the page with each table between its two comments; ValueError if they are missing."""
    for name, text in tables.items():
        begin = f"<!-- {name} -->"
        end = f"<!-- end of {name} -->"
        pattern = re.escape(begin) + ".*?" + re.escape(end)
        whole = f"{begin}\n{text}\n{end}"
        page, n_places = re.subn(pattern, lambda _, whole=whole: whole, page, flags=re.DOTALL)
        if n_places != 1:
            raise ValueError(
                f"the page has {n_places} places for the table {name!r}; "
                f"expected one, from {begin} to {end}"
            )
    return page
