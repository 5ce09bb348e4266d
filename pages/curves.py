"""A page to see a run at a glance, or several: curves of its figures, and the settings that differ.

The page is curves.html, curves.css and curves.js in the skeleton of page.py; `python run.py report
RUN` is the command. It reads config.json, metrics.jsonl and summary.json of each run's folder. The
curves are SVG, drawn here; the script only reads values off them.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from infra.files import read_json
from infra.metrics import read_metrics
from pages.page import FOLDER, escape, fill, make_page, write_page

MAX_POINTS = 300  # of a line; more steps are averaged
N_COLOURS = 8
WIDTH, HEIGHT = 360, 180  # of a chart, with its labels; curves.js has the same numbers
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 22  # room around the lines

# Section -> title of a chart -> the metrics in it. What is in none has a chart of its own.
CHARTS = {
    "Outcome": {
        "Reward": ("reward",),
        "Right answers in training": ("correct",),
        "Groups with different rewards": ("varied_groups",),
    },
    "Responses": {
        "Tokens a response": ("length",),
        "Ran out of room": ("truncated",),
        "Entropy a token": ("entropy",),
    },
    "Flow": {
        "Velocity deviation a token": ("flow/score", "flow/score_right", "flow/score_wrong"),
        "Flow reward a response": ("flow/reward", "flow/reward_right", "flow/reward_wrong"),
        "Share of tokens with a flow reward": ("flow/share",),
        "Loss of the flow": ("flow/loss", "loss"),
    },
    "Optimisation": {
        "Policy loss": ("policy/loss",),
        "Gradient norm": ("policy/grad_norm", "flow/grad_norm", "grad_norm"),
        "Clipped tokens": ("policy/clipped",),
        "Learning rate": ("lr",),
        "Size of the advantage": ("advantage_abs",),
    },
    "Time": {
        "Seconds a step": ("time/step", "time/roll_out", "time/score", "time/update"),
        "Seconds a step, the rest": ("time/sync", "time/verify", "time/record", "time/evaluate"),
    },
}
SIDES = ("", "_right", "_wrong")  # a figure of all episodes, and of right and wrong ones
NOT_SHOWN = {"step", "cursor", "epoch", "rows", "time/cpu"}
EVALUATION = re.compile(r"eval/(?P<set>.+)/(?P<kind>sampled|greedy)")


# ---- What there is
class RunFiles(NamedTuple):
    """What a run has written."""

    name: str
    folder: Path
    settings: dict[str, object]  # by flag
    metrics: list[dict[str, float]]  # a step each
    summary: dict


def read_run(folder: Path) -> RunFiles:
    """Read a run's folder; ValueError if it is none, or has no step yet."""
    config_file = folder / "config.json"
    metrics_file = folder / "metrics.jsonl"
    for file in (config_file, metrics_file):
        if not file.is_file():
            raise ValueError(f"{file} does not exist; expected the folder of a run with a step")
    settings = {}
    for name, value in read_json(config_file, "the settings of a run").items():
        settings.update(value if isinstance(value, dict) else {name: value})
    metrics = read_metrics(metrics_file)
    if not metrics:
        raise ValueError(f"{metrics_file} has no line; expected a run with a step")
    summary_file = folder / "summary.json"
    summary = read_json(summary_file, "the figures of a run") if summary_file.is_file() else {}
    if not all(isinstance(summary.get(when, {}), dict) for when in ("before", "after")):
        raise ValueError(f"{summary_file}: expected figures by set under before and after")
    name = folder.resolve().name
    return RunFiles(name, folder, settings, metrics, summary)


# ---- Lines
@dataclass
class Line:
    """A metric of a run over its steps, or its evaluations, which have intervals."""

    name: str
    colour: int
    steps: list[int]
    values: list[float]
    low: list[float] | None = None
    high: list[float] | None = None


@dataclass
class Chart:
    """Lines with common axes."""

    title: str
    lines: list[Line]
    first: int  # step at the left
    last: int  # step at the right


def line_of(run: RunFiles, metric: str, name: str, colour: int) -> Line | None:
    """Return the line of a metric, None if the run has no such metric; long ones are averaged."""
    points = [(line["step"], line[metric]) for line in run.metrics if metric in line]
    if not points:
        return None
    size = math.ceil(len(points) / MAX_POINTS)
    steps = []
    values = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        steps.append(part[-1][0])
        values.append(sum(value for _, value in part) / len(part))
    return Line(name, colour, steps, values)


class Accuracy(NamedTuple):
    """An evaluation, with its 95 % interval."""

    mean: float
    low: float
    high: float


def find_evaluations(run: RunFiles) -> dict[tuple[str, str], dict[int, Accuracy]]:
    """Return a run's evaluations by set and kind of sampling, and by step: 0 is before training."""
    found: dict[tuple[str, str], dict[int, Accuracy]] = {}
    for line in run.metrics:
        for metric, mean in line.items():
            match = EVALUATION.fullmatch(metric)
            if match:
                accuracy = Accuracy(mean, line[f"{metric}/low"], line[f"{metric}/high"])
                found.setdefault((match["set"], match["kind"]), {})[line["step"]] = accuracy
    last = run.metrics[-1]["step"]
    for when, step in (("before", 0), ("after", last)):
        for set_name, kinds in run.summary.get(when, {}).items():
            for kind, figures in kinds.items():
                avg = figures["avg"]
                accuracy = Accuracy(avg["mean"], avg["low"], avg["high"])
                found.setdefault((set_name, kind), {})[step] = accuracy
    return found


def evaluation_lines(run: RunFiles, prefix: str) -> dict[str, list[Line]]:
    """Return the lines of a run's evaluations by set: before, in between and after training.

    prefix: what tells the run from others in the names of lines
    """
    by_set: dict[str, list[Line]] = {}
    for (set_name, kind), by_step in find_evaluations(run).items():
        steps = sorted(by_step)
        points = [by_step[step] for step in steps]
        line = Line(
            f"{prefix}{kind}",
            colour=0,  # accuracy_charts knows the lines of all runs
            steps=steps,
            values=[point.mean for point in points],
            low=[point.low for point in points],
            high=[point.high for point in points],
        )
        by_set.setdefault(set_name, []).append(line)
    return by_set


def make_charts(runs: Sequence[RunFiles]) -> Iterator[tuple[str, list[Chart]]]:
    """Yield each section's title and charts, those that have a line."""
    for section, charts in known_charts(runs).items():
        made = accuracy_charts(runs) if section == "Outcome" else []
        for title, metrics in charts.items():
            made.append(chart_of(runs, title, metrics))
        yield section, [chart for chart in made if chart.lines]
    yield "Other figures", [chart for chart in other_charts(runs) if not is_constant(chart)]


def known_charts(runs: Sequence[RunFiles]) -> dict[str, dict[str, tuple[str, ...]]]:
    """Return CHARTS, with a section for each dense reward beside the flow that a run had."""
    sections = dict(CHARTS)
    for metric in logged_metrics(runs):
        name = metric.removesuffix("/share")  # which every dense reward logs
        if name != metric and name != "flow":
            sections[f"Dense reward: {name}"] = {
                "Score of a token": tuple(f"{name}/score{side}" for side in SIDES),
                "Reward of a response": tuple(f"{name}/reward{side}" for side in SIDES),
                "Share of tokens with a reward": (metric,),
            }
    return sections


def other_charts(runs: Sequence[RunFiles]) -> list[Chart]:
    """Return a chart for each metric that no section has."""
    known = set(NOT_SHOWN)
    for charts in known_charts(runs).values():
        for metrics in charts.values():
            known.update(metrics)
    others = []
    for metric in logged_metrics(runs):
        if metric not in known and not metric.startswith("eval/"):
            others.append(chart_of(runs, metric, (metric,)))
    return others


def is_constant(chart: Chart) -> bool:
    """Return whether all lines of a chart have one value throughout."""
    return len({value for line in chart.lines for value in line.values}) == 1


def chart_of(runs: Sequence[RunFiles], title: str, metrics: Sequence[str]) -> Chart:
    """Return the chart of some metrics, with a line and a colour for each run and metric."""
    logged = logged_metrics(runs)
    names = names_of_lines([metric for metric in metrics if metric in logged])
    lines = []
    for i, run in enumerate(runs):
        for j, (metric, own_name) in enumerate(names.items()):
            name = f"{run_prefix(runs, run)}{own_name}".strip()
            line = line_of(run, metric, name, i * len(names) + j)
            if line:
                lines.append(line)
    return on_axes(title, lines)


def run_prefix(runs: Sequence[RunFiles], run: RunFiles) -> str:
    """Return what tells the lines of a run from those of others: nothing where there is one."""
    return f"{run.name} " if len(runs) > 1 else ""


def names_of_lines(metrics: Sequence[str]) -> dict[str, str]:
    """Return what tells each metric of a chart from the others: nothing where there is one."""
    if len(metrics) == 1:
        return {metrics[0]: ""}
    last_parts = {metric.split("/")[-1] for metric in metrics}
    part = -1 if len(last_parts) == len(metrics) else 0
    return {metric: metric.split("/")[part].replace("_", " ") for metric in metrics}


def logged_metrics(runs: Sequence[RunFiles]) -> list[str]:
    """Return the metrics that any step of any run has, in the order of their first step."""
    return list(dict.fromkeys(metric for run in runs for line in run.metrics for metric in line))


def accuracy_charts(runs: Sequence[RunFiles]) -> list[Chart]:
    """Return a chart for each set of evaluation."""
    lines: dict[str, list[Line]] = {}
    for run in runs:
        for set_name, own in evaluation_lines(run, run_prefix(runs, run)).items():
            lines.setdefault(set_name, []).extend(own)
    last = max(run.metrics[-1]["step"] for run in runs)
    charts = []
    for set_name, own in lines.items():
        for colour, line in enumerate(own):
            line.colour = colour
        charts.append(Chart(f"Accuracy on {set_name}, 95 % intervals", own, 0, last))
    return charts


def on_axes(title: str, lines: list[Line]) -> Chart:
    """Return a chart with the steps that its lines span."""
    steps = [step for line in lines for step in line.steps] or [0]
    return Chart(title, lines, min(steps), max(steps))


# ---- Drawing
class Scale(NamedTuple):
    """From values to places: low is at `start`, high at `end`."""

    low: float
    high: float
    start: float
    end: float

    def place(self, value: float) -> float:
        share = (value - self.low) / ((self.high - self.low) or 1)
        return self.start + share * (self.end - self.start)


def draw(chart: Chart, number: int) -> str:
    """Return a chart as a <figure>."""
    values = [value for line in chart.lines for value in all_values(line)]
    low, high = padded(min(values), max(values))
    across = Scale(chart.first, chart.last, LEFT, WIDTH - RIGHT)
    up = Scale(low, high, HEIGHT - BOTTOM, TOP)
    marks = draw_axes(across, up)
    for line in chart.lines:
        marks += draw_line(line, across, up)
    marks += f"<line class=cursor y1={TOP} y2={HEIGHT - BOTTOM} visibility=hidden></line>"
    names = ""
    for line in chart.lines:
        last = shorten(line.values[-1])
        names += f"<li class=c{line.colour % N_COLOURS}>{escape(line.name)} <b>{last}</b></li>"
    title = escape(chart.title)
    return (
        f"<figure data-chart={number}><figcaption>{title} <small>step {chart.last}</small>"
        f'</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role=img tabindex=0 '
        f'aria-label="{title}">{marks}</svg><ul class=lines>{names}</ul></figure>'
    )


def all_values(line: Line) -> list[float]:
    """Return the values of a line, with the bounds of its intervals."""
    return [*line.values, *(line.low or []), *(line.high or [])]


def padded(low: float, high: float) -> tuple[float, float]:
    """Return the ends of an axis: a little beyond the values, and beyond 0 only if they are."""
    if low == high == 0:
        return 0.0, 1.0
    least_room = 1e-3 * max(abs(low), abs(high))  # else labels of an axis would all look the same
    room = max(0.06 * (high - low), least_room)
    bottom = low - room
    top = high + room
    if low >= 0 > bottom:
        bottom = 0.0
    if high <= 0 < top:
        top = 0.0
    return bottom, top


def draw_axes(across: Scale, up: Scale) -> str:
    """Return lines and labels of the axes."""
    marks = ""
    for value in ticks(up.low, up.high, 5):
        y = round(up.place(value), 1)
        marks += f'<line class=axis x1={LEFT} x2={WIDTH - RIGHT} y1="{y}" y2="{y}"></line>'
        marks += f'<text x={LEFT - 5} y="{y + 4}" text-anchor=end>{shorten(value, 5)}</text>'
    for value in ticks(across.low, across.high, 5):
        if value == int(value):
            x = round(across.place(value), 1)
            marks += f'<text x="{x}" y={HEIGHT - 6} text-anchor=middle>{int(value)}</text>'
    return marks


def ticks(low: float, high: float, about: int) -> list[float]:
    """Return round values between two, about so many: multiples of 1, 2 or 5 times a power of 10."""
    rough = (high - low) / about or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step)
    last = math.floor(high / step)
    return [k * step for k in range(first, last + 1)]


def draw_line(line: Line, across: Scale, up: Scale) -> str:
    """Return a line: points with intervals, or each step thin and the mean of a window thick."""
    own = f"c{line.colour % N_COLOURS}"
    xs = [round(across.place(step), 1) for step in line.steps]
    marks = ""
    if line.low is None:
        marks += polyline(f"raw {own}", xs, line.values, up)
        marks += polyline(f"mean {own}", xs, window_means(line.values), up)
        return marks
    marks += polyline(f"mean {own}", xs, line.values, up)
    for x, value, low, high in zip(xs, line.values, line.low, line.high, strict=True):
        bottom, y, top = (round(up.place(each), 1) for each in (low, value, high))
        marks += f'<line class="interval {own}" x1="{x}" x2="{x}" y1="{bottom}" y2="{top}"></line>'
        marks += f'<circle class="point {own}" cx="{x}" cy="{y}" r=3></circle>'
    return marks


def polyline(classes: str, xs: Sequence[float], values: Sequence[float], up: Scale) -> str:
    """Return a line through points."""
    points = " ".join(f"{x},{round(up.place(y), 1)}" for x, y in zip(xs, values, strict=True))
    return f'<polyline class="{classes}" points="{points}"></polyline>'


def window_means(values: Sequence[float]) -> list[float]:
    """Return the mean of the values around each: a twelfth of all of them."""
    reach = len(values) // 24
    means = []
    for i in range(len(values)):
        window = values[max(0, i - reach) : i + reach + 1]
        means.append(sum(window) / len(window))
    return means


def shorten(value: float, digits: int = 4) -> str:
    """Return a number with at most so many digits, and a proper minus."""
    return f"{value:.{digits}g}".replace("-", "−")


# ---- Tables
def figures_table(runs: Sequence[RunFiles]) -> str:
    """Lay out the figures of each run's last tenth of steps, a row a run."""
    columns = {
        "reward": "reward",
        "right": "correct",
        "tokens": "length",
        "entropy": "entropy",
        "deviation": "flow/score",
        "flow loss": "flow/loss",
        "loss": "loss",
        "seconds a step": "time/step",
    }
    present = {}
    for title, metric in columns.items():
        if any(metric in run.metrics[-1] for run in runs):
            present[title] = metric
    html = "<table class=figures><tr><th scope=col>last tenth of the steps<th scope=col>steps"
    html += "".join(f"<th scope=col>{title}" for title in present)
    for run in runs:
        html += f"<tr><th scope=row>{escape(run.name)}<td>{run.metrics[-1]['step']}"
        last = run.metrics[-math.ceil(len(run.metrics) / 10) :]
        for metric in present.values():
            values = [line[metric] for line in last if metric in line]
            html += f"<td>{shorten(sum(values) / len(values)) if values else '–'}"
    return html + "</table>"


def settings_tables(runs: Sequence[RunFiles]) -> str:
    """Lay out the settings: those that differ between runs, and, folded, all others."""
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    differing = []
    for name in names:
        values = {json.dumps(run.settings.get(name)) for run in runs}
        if len(values) > 1 and name != "folder":
            differing.append(name)
    others = [name for name in names if name not in differing]
    html = ""
    if len(runs) > 1:
        html += "<h2>Settings that differ</h2>" + settings_table(runs, differing)
    html += f"<details><summary>{'The other settings' if len(runs) > 1 else 'Settings'}</summary>"
    return html + settings_table(runs[:1], others) + "</details>"


def settings_table(runs: Sequence[RunFiles], names: Sequence[str]) -> str:
    """Lay out settings, a row each, with a column for each run."""
    html = "<div class=wide><table>"
    if len(runs) > 1:
        html += "<tr><th scope=col>setting"
        html += "".join(f"<th scope=col>{escape(run.name)}" for run in runs)
    for name in names:
        html += f"<tr><th scope=row>{escape(name)}"
        for run in runs:
            value = run.settings.get(name)
            text = value if isinstance(value, str) else json.dumps(value)
            html += f"<td>{escape(text)}"
    return html + "</table></div>"


# ---- The page
def write_run_report(folders: Sequence[Path], path: Path) -> Path:
    """Write the page of one run or several, and return its path; ValueError for what is no run."""
    runs = [read_run(folder) for folder in folders]
    charts: list[Chart] = []
    html = ""
    for section, own in make_charts(runs):
        if not own:
            continue
        html += f"<h2>{section}</h2><div class=charts>"
        for chart in own:
            html += draw(chart, len(charts))
            charts.append(chart)
        html += "</div>"
    body = fill(
        FOLDER / "curves.html",
        about=about(runs, path),
        table=figures_table(runs),
        legend=legend(runs),
        charts=html,
        constants=escape(constants(runs)),
        settings=settings_tables(runs),
    )
    title = f"Run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs"
    data = [asdict(chart) for chart in charts]
    page = make_page(title, body, data, FOLDER / "curves.css", FOLDER / "curves.js")
    return write_page(path, page)


def about(runs: Sequence[RunFiles], path: Path) -> str:
    """Lay out a sentence on what is here, with the page of rollouts if it stands beside this one."""
    if len(runs) > 1:
        return escape(", ".join(str(run.folder) for run in runs))
    html = escape(f"{runs[0].metrics[-1]['step']} steps in {runs[0].folder}.")
    if (path.parent / "rollouts.html").exists():
        html += " Its responses, token by token: <a href=rollouts.html>rollouts.html</a>."
    return html


def constants(runs: Sequence[RunFiles]) -> str:
    """Return a sentence on the figures that have no chart, because they never change."""
    parts = []
    for chart in other_charts(runs):
        if is_constant(chart):
            parts.append(f"{chart.title} {shorten(chart.lines[0].values[0])}")
    return f"The same in every step: {', '.join(parts)}." if parts else ""


def legend(runs: Sequence[RunFiles]) -> str:
    """Lay out the colours of several runs; the charts name their lines in any case."""
    if len(runs) == 1:
        return ""
    items = [f"<li class=c{i % N_COLOURS}>{escape(run.name)}</li>" for i, run in enumerate(runs)]
    return "".join(items)
