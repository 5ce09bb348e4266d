"""Tables and pictures of the study, drawn from the figures in study/.

    python study/evidence.py              the page with tables and pictures drawn anew, in runs/evidence
    python study/evidence.py --folder F   the same of other figures
    python study/evidence.py --tracked    tables into docs/evidence.md, pictures into study/
    python study/evidence.py --check      fails if the tables there are not those of the figures

Tables stand between `<!-- NAME -->` and `<!-- end of NAME -->` in docs/evidence.md; the prose
around them stays. Of a file that is not there the page shows nothing. What is read:

    study/study*.json           of study.py; their runs are put together. Seeds from 100 on, on
                                which settings were chosen, are left out
    study/tuning.json           of study.py, on those seeds
    study/toy-study.json        of study.py, in the world toy
    study/default-run.json      of study.py, the default run on several base models
    study/default-tuning.json   of study.py, the same on seeds from 100 on
    study/signal.json           of flow_signal.py
    study/signal-text.json      of text_signal.py
    study/worlds.json           of accept.py
    study/form.json             of study.py with --reward, in the world toy-form; and content.json,
                                gsm.json of the worlds of these names
    study/beyond*.json          of study.py, in toy-beyond with other numbers of expert solutions

measures.py says what is measured.
"""

import repository  # noqa: F401

# isort: split
import io
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import tyro
from PIL import Image

matplotlib.use("Agg")
from matplotlib import pyplot as plt

import accept
import flow_signal
import referee
import tuning
from common import put_tables, relink, table
from figures import FIRST_TUNING_SEED, merge, read_study
from infra import errors
from measures import (
    LEVELS,
    WINDOW,
    Interval,
    area,
    bootstrap,
    captured,
    has_escaped,
    interval,
    largest_fall,
    last_accuracy,
    nested,
    number,
    resample,
    running_mean,
    steps_to,
    t_interval,
)
from methods import ARMS, to_flags
from repository import ROOT

STUDY = ROOT / "study"
PAGE = ROOT / "docs" / "evidence.md"
BASELINE = "rlvr"
CEILING = "process"
N_COLUMNS = 3  # of panels
RIVALS = ("sft", "sft-rlvr")  # what learns from expert solutions without a dense reward
NOTHING = "–"  # in a cell of what was not measured
SHOWN = ("rlvr", "published", "calibrated", "process", "sft")  # where the page begins


@dataclass(frozen=True)
class Settings:
    """Write the tables and pictures of the study."""

    folder: str = str(STUDY)  # Where figures are read
    out: str = "runs/evidence"  # Folder for the page and its pictures
    tracked: bool = False  # Rewrite docs/evidence.md and the pictures in study/ in place of that
    check: bool = False  # Write nothing: fail if docs/evidence.md has not the tables of the figures


# ---- Runs
Runs = dict[str, dict[int, dict]]  # arm -> seed -> run


def load_study(folder: Path) -> dict | None:
    """Return the study whose figures are in a folder, or None; several files are put together."""
    files = sorted(folder.glob("study*.json"))
    if not files:
        return None
    return merge([read_study(file) for file in files])


def reported_runs(study: dict) -> Runs:
    """Return the finished runs of the seeds that count, of arms as they are, not as changed."""
    runs: Runs = {}
    for run in study["runs"]:
        counts = run["arm"] in ARMS and run["seed"] < FIRST_TUNING_SEED
        if counts and run["status"] == "finished":
            runs.setdefault(run["arm"], {})[run["seed"]] = run
    return runs


def accuracies(runs: dict[int, dict]) -> dict[int, float]:
    """Return the accuracy in the last steps of each seed."""
    return {seed: last_accuracy(run["series"]["correct"]) for seed, run in runs.items()}


def paired(runs: Runs, *arms: str) -> list[list[float]]:
    """Return the accuracies of several arms on the seeds that all of them have."""
    by_arm = [accuracies(runs.get(arm, {})) for arm in arms]
    common = sorted(set.intersection(*(set(values) for values in by_arm)))
    return [[values[seed] for seed in common] for values in by_arm]


def difference(runs: Runs, arm: str, other: str) -> list[float]:
    """Return the arm's accuracy minus the other's, for each seed that both have."""
    own, others = paired(runs, arm, other)
    return [a - b for a, b in zip(own, others, strict=True)]


# ---- Tables
def measures_table(runs: Runs) -> str:
    """Return the table of each arm's measures, over its seeds."""
    levels = " / ".join(f"{level}" for level in LEVELS)
    head = ("arm", "seeds", "accuracy", "escaped", "area", f"steps to {levels}")
    head += ("length", "entropy", "held-out")
    return table(head, [measures_row(arm, list(seeds.values())) for arm, seeds in runs.items()])


def measures_row(arm: str, runs: Sequence[dict]) -> list[str]:
    """Return an arm's row: means over seeds, of steps the median."""
    curves = [run["series"]["correct"] for run in runs]
    last = [last_accuracy(curve) for curve in curves]
    escaped = sum(map(has_escaped, curves))
    steps = []
    for level in LEVELS:
        steps.append(number(float(np.median([steps_to(curve, level) for curve in curves])), 0))
    after = [run["held_out"]["after"]["sampled"] for run in runs if "after" in run["held_out"]]
    return [
        f"`{arm}`",
        str(len(runs)),
        number(float(np.mean(last))),
        f"{escaped} of {len(runs)}",
        number(float(np.mean([area(curve) for curve in curves]))),
        " / ".join(steps),
        number(mean_of_last("length", runs), 1),
        number(mean_of_last("entropy", runs)),
        number(float(np.mean(after))) if after else NOTHING,
    ]


def mean_of_last(name: str, runs: Sequence[dict]) -> float:
    """Return the mean of a figure over the last steps and over runs."""
    return float(np.mean([run["series"][name][-WINDOW:] for run in runs]))


def differences_table(runs: Runs) -> str:
    """Return the table of differences from the baseline, and of what was captured of the gain."""
    head = ("arm", "pairs", f"minus `{BASELINE}`", "95 %, paired t", "95 %, bootstrap")
    head += ("captured", "95 %, bootstrap")
    rows = []
    for arm in runs:
        if arm == BASELINE or not difference(runs, arm, BASELINE):
            continue
        share = Interval(math.nan, math.nan, math.nan)
        own, baseline, ceiling = paired(runs, arm, BASELINE, CEILING)
        if own and arm != CEILING:
            share = captured(own, baseline, ceiling)
        cells = difference_cells(runs, arm, BASELINE)
        rows.append([f"`{arm}`", *cells, number(share.value), interval(share)])
    return table(head, rows)


def controls_table(runs: Runs) -> str:
    """Return the table of differences between controls or variants and what they are of."""
    head = ("arm", "compared with", "pairs", "minus that", "95 %, paired t", "95 %, bootstrap")
    rows = []
    for arm in runs:
        other = ARMS[arm].beside
        if other in runs and difference(runs, arm, other):
            rows.append([f"`{arm}`", f"`{other}`", *difference_cells(runs, arm, other)])
    return table(head, rows)


def difference_cells(runs: Runs, arm: str, other: str) -> list[str]:
    """Return the cells on the difference of two arms: pairs, mean and two intervals."""
    differences = difference(runs, arm, other)
    by_t = t_interval(differences)
    by_bootstrap = bootstrap(differences)
    return [str(len(differences)), f"{by_t.value:+.2f}", interval(by_t), interval(by_bootstrap)]


def tuning_table(study: dict) -> str:
    """Return the table of what was tried: every arm of a study, with changed settings or without."""
    runs: Runs = {}
    for run in study["runs"]:
        if run["status"] == "finished":
            runs.setdefault(run["arm"], {})[run["seed"]] = run
    rows = []
    for arm, seeds in runs.items():
        last = list(accuracies(seeds).values())
        escaped = sum(has_escaped(run["series"]["correct"]) for run in seeds.values())
        cells = [str(len(last)), number(float(np.mean(last))), f"{escaped} of {len(last)}"]
        differences = difference(runs, arm, BASELINE)
        cells.append(f"{np.mean(differences):+.2f}" if differences else NOTHING)
        rows.append([f"`{arm}`", *cells])
    return table(("arm", "seeds", "accuracy", "escaped", f"minus `{BASELINE}`"), rows)


def small_tables(study: dict) -> str:
    """Return the tables of measures and of differences of a study in another world."""
    runs = reported_runs(study)
    return f"{measures_table(runs)}\n\n{differences_table(runs)}"


# ---- Studies of rewards, in worlds that decide
JUDGED = ("form", "content", "gsm")  # files, and worlds


def judged_section(name: str, study: dict) -> str:
    """Return the section of a study: what ran, a picture of every run, the referee's tables."""
    runs = referee.reported_runs(study)
    if not runs:
        return ""
    of_world = study["world"]
    bases = {run["base"] for seeds in runs.values() for run in seeds.values()}
    seeds = {seed for of_arm in runs.values() for seed in of_arm}
    n_runs = sum(map(len, runs.values()))
    hours = sum(run["seconds"] for of_arm in runs.values() for run in of_arm.values()) / 3600
    first, last = study.get("registered", {}).get("seeds", (min(seeds), max(seeds)))
    left = ""
    if max(seeds) < last:
        left = f" Registered are seeds {first} to {last}; not all have been run."
    parts = [
        f"### The world `{of_world.get('kind', f'toy-{name}')}`",
        f"{n_runs} finished runs of {len(runs)} arms, {study['settings']['steps']} steps each, seeds "
        f"{min(seeds)} to {max(seeds)} on {len(bases)} base models; {hours:.1f} hours of one core.{left}",
        f"![Training accuracy of every run, a panel an arm, in grey those of {BASELINE}]"
        f"(../study/{name}.png)",
    ]
    for title, text in referee.tables_of(study).items():
        parts += [f"{title}:", text]
    for joined in study.get("registered", {}).get("joined", ()):
        arms = ", ".join(f"`{arm}`" for arm in joined["arms"])
        parts.append(f"Registered after {joined['after_finished_runs']} runs had finished: {arms}.")
    return "\n\n".join(parts)


def draw_every_run(study: dict) -> plt.Figure:
    """Draw a panel for each arm with a line for each run, and those of the baseline behind them."""
    runs = referee.reported_runs(study)
    n_rows = math.ceil(len(runs) / N_COLUMNS)
    figure, grid = plt.subplots(
        n_rows,
        N_COLUMNS,
        figsize=(8.5, 1.7 * n_rows + 0.4),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes in grid.flat[len(runs) :]:
        axes.set_axis_off()
    for axes, (arm, seeds) in zip(grid.flat, runs.items(), strict=False):
        for run in runs.get(BASELINE, {}).values() if arm != BASELINE else ():
            draw_run(axes, run, "#bbbbbb")
        for run in seeds.values():
            draw_run(axes, run, COLOURS[run["base"] % len(COLOURS)])
        axes.set(ylim=(0, 1))
        axes.set_title(f"{arm} ({len(seeds)})", fontsize=8)
    figure.supxlabel("step; a colour is a base model", fontsize=10)
    figure.supylabel(f"training accuracy, mean of {WINDOW} steps", fontsize=10)
    return figure


def draw_run(axes: plt.Axes, run: dict, colour: str) -> None:
    """Draw the running mean of a run's accuracy."""
    values = running_mean(run["series"]["correct"])
    axes.plot(range(WINDOW, WINDOW + len(values)), values, color=colour, linewidth=0.7)


def beyond_section(studies: Sequence[dict]) -> str:
    """Return the section on the number of expert solutions, and on wrong ones among them."""
    by_column: dict[tuple[int, float], Runs] = {}
    for study in studies:
        world = study["world"]
        column = (world["n_expert"], world.get("expert_wrong", 0.0))
        by_column[column] = referee.reported_runs(study)
    columns = sorted(by_column, key=lambda column: (column[1], column[0]))
    found = dict.fromkeys(arm for column in columns for arm in by_column[column])
    if not found:
        return ""
    arms = [arm for arm in ARMS if arm in found]  # in one order, whatever a study ran first
    arms += [arm for arm in found if arm not in ARMS]
    head = ["arm"]
    for n_expert, wrong in columns:
        head.append(f"{n_expert}, {wrong:.0%} wrong" if wrong else str(n_expert))
    means = []
    for arm in arms:
        cells = [mean_cell(by_column[column].get(arm, {})) for column in columns]
        means.append([f"`{arm}`", *cells])
    parts = [
        "### Beyond the experts",
        "In `toy-beyond` experts solve chains of 3 to 5 operations, and the policy trains and is "
        "tested on 6 to 8. By the number of expert solutions: accuracy of the last "
        f"{WINDOW} steps, with 95 % bootstrap intervals over bases and seeds, and runs:",
        table(tuple(head), means),
    ]
    for rival in RIVALS:
        rows = []
        for arm in arms:
            cells = [beside(rival, arm, by_column[column]) for column in columns]
            if set(cells) != {NOTHING}:
                rows.append([f"`{arm}`", *cells])
        if rows:
            parts.append(f"Minus `{rival}` on the same seeds, with the exact p of the sign flip:")
            parts.append(table(tuple(head), rows))
    for study in studies:
        if chosen := tuning.chosen_in(study):
            n_expert = study["world"]["n_expert"]
            parts.append(f"Chosen with {n_expert} solutions, on seeds from {FIRST_TUNING_SEED} on:")
            parts.append(tuning.tuning_table(study, chosen))
    return "\n\n".join(parts)


def mean_cell(seeds: dict[int, dict]) -> str:
    """Return the mean accuracy of an arm's runs, its interval and their number."""
    if not seeds:
        return NOTHING
    by_base: dict[int, list[float]] = {}
    for run in seeds.values():
        by_base.setdefault(run["base"], []).append(last_accuracy(run["series"]["correct"]))
    estimate = nested(list(by_base.values()))
    bounds = "" if math.isnan(estimate.low) else f" ({estimate.low:.2f} to {estimate.high:.2f})"
    return f"{estimate.value:.2f}{bounds}, {len(seeds)}"


def beside(rival: str, arm: str, runs: Runs) -> str:
    """Return by how much an arm is better than a rival on seeds that both have, and the exact p."""
    if arm == rival or not difference(runs, arm, rival):
        return NOTHING
    minus, bounds, p, _ = referee.comparison(arm, rival, runs)
    return f"{minus} ({bounds}), p {p}"


SETTLED = 30  # steps, after which the default run shall not fall far


def finished(study: dict) -> list[dict]:
    """Return the runs of a study that came to their end."""
    return [run for run in study["runs"] if run["status"] == "finished"]


def default_table(study: dict) -> str:
    """Return the table of default runs, a row each: how far they came, how far one fell back, and
    what the flow reward prefers."""
    rows = []
    for run in finished(study):
        series = run["series"]
        accuracy = series["correct"]
        held_out = run["held_out"]
        rows.append(
            [
                f"`{run['arm']}`",
                str(run["seed"]),
                str(run.get("base", 0)),
                number(accuracy[0]),
                number(last_accuracy(accuracy)),
                number(largest_fall(accuracy, SETTLED)),
                number(held_out["before"]["sampled"]),
                number(held_out["after"]["sampled"]),
                number(held_out["before"]["greedy"]),
                number(held_out["after"]["greedy"]),
                f"{series['length'][0]:.0f} → {last_accuracy(series['length']):.0f}",
                str(steps_below(series["flow/reward_right"], series["flow/reward_wrong"])),
            ]
        )
    head = ("arm", "seed", "base model", "first step", "last 10 steps")
    head += (f"largest fall after step {SETTLED}", "held-out before", "after")
    head += ("greedy before", "after", "tokens", "steps that pay right responses less")
    return table(head, rows)


def steps_below(some: Sequence[float | None], others: Sequence[float | None]) -> int:
    """Return at how many steps a figure is below another one, where both are known."""
    pairs = zip(some, others, strict=True)
    return sum(one < other for one, other in pairs if None not in (one, other))


def draw_default_runs(study: dict) -> plt.Figure:
    """Draw the training accuracy of each step of each default run."""
    figure, axes = plt.subplots(figsize=(8.5, 4.2), layout="constrained")
    for run in finished(study):
        accuracy = run["series"]["correct"]
        colour = COLOURS[run.get("base", 0) % len(COLOURS)]
        axes.plot(range(1, len(accuracy) + 1), accuracy, color=colour, linewidth=0.9)
    for base in sorted({run.get("base", 0) for run in finished(study)}):
        axes.plot([], [], color=COLOURS[base % len(COLOURS)], label=f"base model {base}")
    axes.set(xlabel="step", ylabel="training accuracy of a step", ylim=(0, 1))
    axes.legend(loc="lower right")
    return figure


def arms_table(study: dict) -> str:
    """Return the table of what each arm asks, with its settings as today's flags."""
    has_run = {run["arm"] for run in study["runs"]}
    rows = []
    for name, arm in ARMS.items():
        if name in has_run:
            flags = " ".join([*arm.script, *to_flags(arm.settings)])
            rows.append([f"`{name}`", arm.asks, f"`{flags}`"])
    return table(("arm", "what it asks", "its command"), rows)


def runs_line(study: dict, runs: Runs) -> str:
    """Return a sentence on what ran, and what did not end."""
    reported = [
        run for run in study["runs"] if run["arm"] in ARMS and run["seed"] < FIRST_TUNING_SEED
    ]
    n_finished = sum(run["status"] == "finished" for run in reported)
    unfinished = [
        f"`{run['arm']}` {run['seed']}" for run in reported if run["status"] != "finished"
    ]
    versions = sorted({run["versions"] for run in reported})
    minutes = sum(run["seconds"] for run in reported) / 60
    text = (
        f"{n_finished} finished runs of {len(runs)} arms, {study['settings']['steps']} steps of "
        f"{study['settings']['prompts']} problems each; {minutes:.0f} minutes of one core; "
        f"{'; '.join(versions)}; base model {study['base']}."
    )
    if unfinished:
        text += f" Not finished, and left out: {', '.join(unfinished)}."
    return text


# ---- Figures: dark ink on an opaque light ground, which reads on light and on dark pages
INK = "#333333"
GROUND = "#f6f6f2"
# Okabe and Ito's colours, which the colour-blind can tell apart
BLUE = "#0072B2"
ORANGE = "#D55E00"
COLOURS = ("#000000", "#56B4E9", ORANGE, BLUE, "#009E73")
N_COLOURS = 96  # of a picture: as few as keep its file small
STYLE = {
    "figure.facecolor": GROUND,
    "axes.facecolor": GROUND,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "font.size": 10,
    "figure.dpi": 110,
}


def draw_curve(axes: plt.Axes, arm: str, runs: Runs, colour: str) -> None:
    """Draw the mean learning curve of an arm over its seeds, with its 95 % band."""
    curves = np.array([running_mean(run["series"]["correct"]) for run in runs[arm].values()])
    low, high = band(curves)
    steps = np.arange(WINDOW, WINDOW + curves.shape[1])
    label = f"{arm} ({len(curves)})"
    axes.plot(steps, curves.mean(axis=0), color=colour, label=label, linewidth=1.8)
    axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_ylim(0, 1)


def band(curves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a 95 % bootstrap band of the mean of curves, one a seed, (n, steps)."""
    means = resample(len(curves)) @ curves / len(curves)
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    return low, high


def draw_seeds(runs: Runs) -> plt.Figure:
    """Draw a panel for each arm that the page begins with, and in it a line a seed."""
    arms = [arm for arm in SHOWN if arm in runs]
    figure, panels = plt.subplots(
        1, len(SHOWN), figsize=(11, 2.7), sharex=True, sharey=True, layout="constrained"
    )
    for axes in panels[len(arms) :]:
        axes.set_axis_off()
    for axes, arm in zip(panels, arms, strict=False):
        curves = [run["series"]["correct"] for run in runs[arm].values()]
        for curve in curves:
            means = running_mean(curve)
            colour = BLUE if has_escaped(curve) else ORANGE
            axes.plot(range(WINDOW, WINDOW + len(means)), means, color=colour, linewidth=1.2)
        axes.set_title(f"{arm}: {sum(map(has_escaped, curves))} of {len(curves)}", fontsize=10)
        axes.set(ylim=(0, 1), xlabel="step")
    panels[0].set_ylabel(f"training accuracy,\nmean of {WINDOW} steps")
    return figure


def draw_methods(runs: Runs) -> plt.Figure:
    """Draw the learning curves of the methods and the ceiling."""
    figure, axes = plt.subplots(figsize=(8.5, 4.6), layout="constrained")
    methods = [arm for arm in runs if ARMS[arm].beside is None]
    for arm, colour in zip(methods, COLOURS, strict=False):
        draw_curve(axes, arm, runs, colour)
    axes.set(xlabel="step", ylabel=f"training accuracy, mean of {WINDOW} steps")
    axes.legend(loc="upper left", title="arm (seeds)")
    return figure


def draw_controls(runs: Runs) -> plt.Figure:
    """Draw a panel for each control or variant, with what it is compared with and the baseline."""
    arms = [arm for arm in runs if ARMS[arm].beside is not None]
    n_rows = max(1, math.ceil(len(arms) / N_COLUMNS))
    size = (8.5, 2.3 * n_rows + 0.4)
    figure, grid = plt.subplots(
        n_rows,
        N_COLUMNS,
        figsize=size,
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes in grid.flat[len(arms) :]:
        axes.set_axis_off()
    for axes, arm in zip(grid.flat, arms, strict=False):
        for other, colour in ((BASELINE, COLOURS[0]), (ARMS[arm].beside, BLUE), (arm, ORANGE)):
            if other in runs:
                draw_curve(axes, other, runs, colour)
        axes.legend(loc="upper left", fontsize=7, handlelength=1.2)
    figure.supxlabel("step", fontsize=10)
    figure.supylabel(f"training accuracy, mean of {WINDOW} steps", fontsize=10)
    return figure


def draw_differences(runs: Runs) -> plt.Figure:
    """Draw each arm's paired difference from the baseline: the seeds, their mean, its interval."""
    arms = [arm for arm in runs if arm != BASELINE and difference(runs, arm, BASELINE)]
    arms.sort(key=lambda arm: np.mean(difference(runs, arm, BASELINE)))
    figure, axes = plt.subplots(figsize=(8.5, 1.2 + 0.34 * len(arms)), layout="constrained")
    for place, arm in enumerate(arms):
        differences = difference(runs, arm, BASELINE)
        estimate = t_interval(differences)
        colour = BLUE if ARMS[arm].beside is None else ORANGE
        axes.plot(differences, [place] * len(differences), "o", color=colour, alpha=0.3, ms=4)
        axes.plot([estimate.low, estimate.high], [place, place], "-", color=colour, linewidth=2)
        axes.plot(estimate.value, place, "D", color=colour, ms=6)
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_yticks(range(len(arms)), arms)
    axes.set_xlabel(f"accuracy in the last {WINDOW} steps, minus {BASELINE}'s of the same seed")
    for colour, label in ((BLUE, "methods and ceiling"), (ORANGE, "controls and variants")):
        axes.plot([], [], "D-", color=colour, label=label)
    axes.legend(loc="lower right")
    return figure


def save(figure: plt.Figure, file: Path) -> None:
    """Write a figure as a PNG of few colours, and close it."""
    data = io.BytesIO()
    figure.savefig(data, format="png")
    plt.close(figure)
    picture = Image.open(data).convert("RGB")
    picture.quantize(N_COLOURS).save(file, optimize=True)


PICTURES = {
    "study-seeds.png": draw_seeds,
    "study-methods.png": draw_methods,
    "study-controls.png": draw_controls,
    "study-differences.png": draw_differences,
}


def draw(runs: Runs, figures: Path, folder: Path) -> list[str]:
    """Draw all pictures that there are figures for into a folder, and return their names."""
    makers = {name: partial(make, runs) for name, make in PICTURES.items()} if runs else {}
    others = {"default-run": draw_default_runs, **dict.fromkeys(JUDGED, draw_every_run)}
    for name, make in others.items():
        file = figures / f"{name}.json"
        if file.exists():
            makers[f"{name}.png"] = lambda make=make, file=file: make(read_study(file))
    with plt.rc_context(STYLE):
        for name, make in makers.items():
            save(make(), folder / name)
            print(f"{folder / name}: {(folder / name).stat().st_size / 1000:.0f} kB")
    return list(makers)


# ---- The page
STUDY_TABLES = ("runs", "arms", "measures", "differences", "controls")


def study_tables(study: dict, runs: Runs) -> dict[str, str]:
    """Return the tables of the study by their names."""
    return {
        "runs": runs_line(study, runs),
        "arms": arms_table(study),
        "measures": measures_table(runs),
        "differences": differences_table(runs),
        "controls": controls_table(runs),
    }


def other_tables(folder: Path) -> dict[str, str]:
    """Return the tables of the other files of figures, of those that are not there none."""
    makers = {
        "tuning": lambda file: tuning_table(read_study(file)),
        "toy-study": lambda file: small_tables(read_study(file)),
        "default-run": lambda file: default_table(read_study(file)),
        "default-tuning": lambda file: default_table(read_study(file)),
        "signal": flow_signal.tables,
        "signal-text": flow_signal.tables,
        "worlds": accept.all_tables,
    }
    for name in JUDGED:
        makers[name] = lambda file, name=name: judged_section(name, read_study(file))
    tables = {}
    for name, make in makers.items():
        file = folder / f"{name}.json"
        tables[name] = make(file).strip() if file.exists() else ""
    beyond = sorted(folder.glob("beyond*.json"))
    tables["beyond"] = beyond_section([read_study(file) for file in beyond])
    return tables


def main(settings: Settings) -> int:
    """Write the page with its tables and the pictures, or check the tables; return the exit code."""
    folder = Path(settings.folder)
    study = load_study(folder)
    runs = reported_runs(study) if study else {}
    tables = other_tables(folder)
    if runs:
        tables.update(study_tables(study, runs))
    else:
        tables.update(dict.fromkeys(STUDY_TABLES, ""))
    written = PAGE.read_text()
    drawn = put_tables(written, tables)
    if settings.check:
        if drawn != written:
            print(
                f"the tables of {PAGE} are not those of the figures; run study/evidence.py --tracked"
            )
        return int(drawn != written)
    page = PAGE if settings.tracked else Path(settings.out, PAGE.name)
    page.parent.mkdir(parents=True, exist_ok=True)
    pictures = draw(runs, folder, STUDY if settings.tracked else page.parent)
    page.write_text(
        drawn if settings.tracked else relink(drawn, PAGE.parent, page.parent, pictures)
    )
    print(f"open {page}: {len(tables)} tables, of {sum(map(len, runs.values()))} runs")
    return 0


if __name__ == "__main__":
    errors.run(lambda: sys.exit(main(tyro.cli(Settings))))
