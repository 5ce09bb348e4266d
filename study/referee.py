"""The page that says what came of a dense reward: FOLDER/verdict.html, and its table as text.

It is made of the study's JSON file alone, which holds what was registered. Escapes and the time to them
stand first, since runs of these worlds either leave the base model's habit or do not. evidence.py puts
the same tables into docs/evidence.md.
"""

import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from common import table
from figures import FIRST_TUNING_SEED
from infra.files import written_whole
from measures import (
    ESCAPED,
    WINDOW,
    Interval,
    captured,
    has_escaped,
    interval,
    last_accuracy,
    mcnemar,
    nested,
    number,
    p_value,
    running_mean,
    sign_flip,
    steps_to,
)
from methods import ARMS
from pages.page import FOLDER as PAGES
from repository import ROOT
from tuning import tuning_table

BASELINE = "rlvr"
CEILING = "process"
KNOW_NOTHING = ("noise", "length")  # arms that every reward is compared with
WIDTH, HEIGHT = 260, 140  # of a chart
Runs = dict[str, dict[int, dict]]  # arm -> seed -> run


def write_verdict(figures: dict, folder: Path) -> str:
    """Write the page of a study's figures into its folder; return the same in words and tables."""
    registered = figures["registered"]
    runs = reported_runs(figures)
    tables = tables_of(figures)
    said = "\n".join(sentences(runs))
    path = folder / "verdict.html"
    page = make_page(said, runs, tables, registered)
    with written_whole(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    shown = "\n\n".join(tables.values())
    return f"\n{shown}\n\n{said}\nopen {path}"


def tables_of(figures: dict) -> dict[str, str]:
    """Return the tables of a study by their titles; those that would be empty are left out."""
    runs = reported_runs(figures)
    tables = {"Methods": methods_table(runs)}
    controls = control_rows(runs)
    if controls:
        tables["Controls and variants"] = table(CONTROLS_HEAD, controls)
    chosen = figures.get("registered", {}).get("tuned")
    if chosen:
        tables[f"Chosen on seeds from {FIRST_TUNING_SEED} on"] = tuning_table(figures, chosen)
    return tables


# ---- Runs
def reported_runs(figures: dict) -> Runs:
    """Return the finished runs of the arms and seeds that were registered, or else of all that count."""
    registered = figures.get("registered", {})
    first, last = registered.get("seeds", (0, FIRST_TUNING_SEED - 1))
    runs: Runs = {arm: {} for arm in registered.get("arms", ())}
    for run in figures["runs"]:
        if run["status"] != "finished" or not first <= run["seed"] <= last:
            continue
        if not registered:
            runs.setdefault(run["arm"], {})
        if run["arm"] in runs:
            runs[run["arm"]][run["seed"]] = run
    return {arm: seeds for arm, seeds in runs.items() if seeds}


def curve(run: dict) -> list[float]:
    """Return the training accuracy of each step of a run."""
    return run["series"]["correct"]


def pairs(runs: Runs, *arms: str) -> list[list[list[float]]]:
    """Return the curves of several arms on the seeds that all of them have, a list for each arm."""
    common = sorted(set.intersection(*(set(runs.get(arm, {})) for arm in arms)))
    return [[curve(runs[arm][seed]) for seed in common] for arm in arms]


def by_base(runs: Runs, arm: str, other: str) -> list[list[float]]:
    """Return the differences of accuracy of two arms, a list for each base model."""
    groups: dict[int, list[float]] = {}
    for seed in sorted(set(runs[arm]) & set(runs[other])):
        own, its = runs[arm][seed], runs[other][seed]
        difference = last_accuracy(curve(own)) - last_accuracy(curve(its))
        groups.setdefault(own["base"], []).append(difference)
    return list(groups.values())


# ---- Tables
def methods_table(runs: Runs) -> str:
    """Return the table of each arm, and of it against the baseline."""
    head = ("arm", "runs", "escaped", "steps to 0.5", "accuracy", "AUC of steps", "length")
    head += (
        f"minus `{BASELINE}`",
        "95 %",
        "p",
        "p of escapes",
        "captured",
        "pass@4",
        "tokens",
        "minutes of a core",
        "minutes before",
    )
    return table(head, [method_row(arm, runs) for arm in runs])


def method_row(arm: str, runs: Runs) -> list[str]:
    """Return the cells of an arm."""
    own = list(runs[arm].values())
    curves = [curve(run) for run in own]
    escaped = sum(map(has_escaped, curves))
    return [
        f"`{arm}`",
        str(len(own)),
        f"{escaped} of {len(own)}",
        number(float(np.median([steps_to(each, ESCAPED) for each in curves])), 0),
        number(float(np.mean([last_accuracy(each) for each in curves]))),
        auc_cell(own),
        number(float(np.mean([run["series"]["length"][-WINDOW:] for run in own])), 0),
        *comparison(arm, BASELINE, runs),
        number(share_captured(arm, runs)),
        pass_cell(own),
        f"{np.mean([sampled_tokens(run) for run in own]) / 1e6:.2f} M",
        f"{np.mean([run['seconds'] for run in own]) / 60:.1f}",
        f"{np.mean([run.get('prepared_seconds', 0) for run in own]) / 60:.1f}",
    ]


def comparison(arm: str, other: str, runs: Runs) -> list[str]:
    """Return the cells that compare an arm with another: difference, interval, two exact p."""
    if arm == other or not set(runs[arm]) & set(runs.get(other, {})):
        return ["–"] * 4
    groups = by_base(runs, arm, other)
    estimate: Interval = nested(groups)
    differences = [value for group in groups for value in group]
    own, its = pairs(runs, arm, other)
    p_escape = mcnemar([*map(has_escaped, own)], [*map(has_escaped, its)])
    p = p_value(sign_flip(differences))
    return [f"{estimate.value:+.2f}", interval(estimate), p, p_value(p_escape)]


def share_captured(arm: str, runs: Runs) -> float:
    """Return how much of the way from baseline to ceiling an arm went, NaN if unknown."""
    if arm in (BASELINE, CEILING):
        return math.nan
    curves = pairs(runs, arm, BASELINE, CEILING)
    own, baseline, ceiling = ([last_accuracy(each) for each in some] for some in curves)
    return captured(own, baseline, ceiling).value if own else math.nan


def auc_cell(runs: Sequence[dict]) -> str:
    """Return the AUC of the dense reward of tokens for right against wrong steps.

    At the steps that all runs have recorded: those at which the reward of one fell are left out.
    """
    recorded = [run.get("auc", {}) for run in runs]
    steps = [step for step in recorded[0] if all(step in of_run for of_run in recorded)]
    means = []
    for step in steps:
        values = [run["auc"][step] for run in runs if run.get("auc", {}).get(step) is not None]
        means.append(number(float(np.mean(values))) if values else "–")
    return " / ".join(means) if set(means) - {"–"} else "–"


def pass_cell(runs: Sequence[dict]) -> str:
    """Return the mean pass@4 of the trained policies on held-out problems."""
    values = [run["held_out"].get("after", {}).get("pass@4") for run in runs if "held_out" in run]
    known = [value for value in values if value is not None]
    return number(float(np.mean(known))) if known else "–"


def sampled_tokens(run: dict) -> float:
    """Return how many tokens a run sampled in training."""
    settings = run["settings"]
    episodes = int(settings["prompts"]) * int(settings.get("group_size", 8))
    return episodes * sum(run["series"]["length"])


CONTROLS_HEAD = (
    "arm",
    "of",
    "pairs",
    "escaped",
    "of that",
    "minus that",
    "95 %",
    "p",
    "p of escapes",
)


def control_rows(runs: Runs) -> list[list[str]]:
    """Return a row for each control or variant, against what it is of."""
    of_whom = []
    for arm, seeds in runs.items():
        other = next(iter(seeds.values())).get("beside")
        if other in runs:
            of_whom.append((arm, other))
    for nothing in KNOW_NOTHING:
        of_whom += [(nothing, reward) for reward in judged(runs) if nothing in runs]
    rows = []
    for arm, other in of_whom:
        own, others = pairs(runs, arm, other)
        counts = [len(own), sum(map(has_escaped, own)), sum(map(has_escaped, others))]
        rows.append([f"`{arm}`", f"`{other}`", *map(str, counts), *comparison(arm, other, runs)])
    return rows


def judged(runs: Runs) -> list[str]:
    """Return the arms of rewards of files, which are no arms of every study and controls of none."""
    found = []
    for arm, seeds in runs.items():
        is_variant = next(iter(seeds.values())).get("beside") is not None
        if arm not in ARMS and not is_variant:
            found.append(arm)
    return found


# ---- In words
def sentences(runs: Runs) -> list[str]:
    """Say what came of each reward, and how little the pairs can show."""
    said = []
    for arm in judged(runs):
        own, others = pairs(runs, arm, BASELINE)
        if not own:
            continue
        p = mcnemar([*map(has_escaped, own)], [*map(has_escaped, others)])
        differences = [value for group in by_base(runs, arm, BASELINE) for value in group]
        said.append(
            f"{arm}: {sum(map(has_escaped, own))} of {len(own)} runs escaped, of {BASELINE} "
            f"{sum(map(has_escaped, others))} (McNemar p {p_value(p)}); accuracy "
            f"{np.mean(differences):+.2f} (sign flip p {p_value(sign_flip(differences))}; no p of "
            f"{len(own)} pairs is below {p_value(2 / 2 ** len(own))})."
        )
    bases = {run["base"] for seeds in runs.values() for run in seeds.values()}
    if len(bases) == 1:
        said.append("All runs begin with one base model: of others this says nothing.")
    return said


# ---- The page
def make_page(said: str, runs: Runs, tables: dict[str, str], registered: dict) -> str:
    """Return the page as HTML: sentences, curves, tables, and what was registered."""
    charts = "".join(chart(arm, runs) for arm in runs)
    style = (PAGES / "page.css").read_text() + (ROOT / "study" / "referee.css").read_text()
    parts = "".join(f"<h2>{name}</h2>{html_table(text)}" for name, text in tables.items())
    paragraphs = "".join(f"<p>{escape(line)}</p>" for line in said.splitlines())
    plan = escape(json.dumps(registered, indent=1))
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>Does it help?</title><style>{style}</style>"
        f"<h1>Does it help?</h1>{paragraphs}"
        f"<h2>Every run</h2><p>Training accuracy, mean of {WINDOW} steps; in grey the runs of "
        f"{BASELINE}; a run above the line has escaped.</p><div class=charts>{charts}</div>"
        f"{parts}<h2>Registered before the first run</h2><pre>{plan}</pre></html>\n"
    )


def chart(arm: str, runs: Runs) -> str:
    """Return the chart of an arm as SVG, a line a run, those of the baseline behind them."""
    lines = ""
    if arm != BASELINE:
        for run in runs.get(BASELINE, {}).values():
            lines += polyline(curve(run), "behind")
    for run in runs[arm].values():
        lines += polyline(curve(run), "own")
    y = HEIGHT * (1 - ESCAPED)
    return (
        f"<figure><figcaption>{escape(arm)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(arm)}">'
        f'<line x1="0" x2="{WIDTH}" y1="{y}" y2="{y}"/>{lines}</svg></figure>'
    )


def polyline(accuracy: Sequence[float], kind: str) -> str:
    """Return a run's running mean as a line of SVG."""
    if len(accuracy) < WINDOW:
        return ""
    values = running_mean(accuracy)
    width = max(1, len(values) - 1)
    points = [f"{WIDTH * k / width:.1f},{HEIGHT * (1 - v):.1f}" for k, v in enumerate(values)]
    return f'<polyline class="{kind}" points="{" ".join(points)}"/>'


def html_table(text: str) -> str:
    """Return a table of Markdown as HTML."""
    lines = text.splitlines()
    if len(lines) < 3:
        return "<p>There are none.</p>"
    rows = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]
    head = "".join(f"<th>{escape(cell.replace('`', ''))}" for cell in rows[0])
    body = ""
    for row in rows[2:]:
        body += "<tr>" + "".join(f"<td>{escape(cell)}" for cell in row)
    return f'<div class="wide"><table><tr>{head}{body}</table></div>'
