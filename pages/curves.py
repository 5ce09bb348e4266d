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

from safetensors import safe_open

import flow as fl
from infra import record
from infra.files import read_json
from infra.metrics import read_metrics
from pages.falls import say_falls
from pages.page import FOLDER, escape, fill, make_page, write_page

MAX_POINTS = 300  # of a line; more steps are averaged
N_COLOURS = 8
ROLLOUTS = "rollouts.html"  # the page of responses, in the folder of a run
WIDTH, HEIGHT = 360, 180  # of a chart, with its labels; curves.js has the same numbers
ROW_HEIGHT = 36  # of a chart that is a row
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 8, 22  # room around the lines


class Kind(NamedTuple):
    """A chart that is drawn where a run has one of its metrics."""

    title: str
    says: str  # what it shows, a line under it
    metrics: tuple[str, ...]
    is_log: bool = False  # a logarithmic axis, where no value is 0 or below


SIDES = ("", "_right", "_wrong")  # a figure of all episodes, and of right and wrong ones
# Section -> its charts. A metric that is in none has a chart of its own.
CHARTS = {
    "Outcome": (
        Kind("Reward", "Mean outcome reward of the step's responses.", ("reward",)),
        Kind("Right answers in training", "Share of the step's responses.", ("correct",)),
        Kind(
            "Problems with mixed outcomes",
            "Share of problems whose responses differ in reward: the others have no outcome advantage.",
            ("varied_groups",),
        ),
    ),
    "Responses": (
        Kind("Tokens a response", "Mean number of tokens that the policy sampled.", ("length",)),
        Kind(
            "Ran out of room", "Share of responses that were cut at --max-tokens.", ("truncated",)
        ),
        Kind(
            "Entropy a token",
            "How open the policy's choice of a token is; near 0 it tries nothing new.",
            ("entropy",),
        ),
    ),
    "Flow": (
        Kind(
            "Velocity deviation a token",
            "The flow's error on a token's hidden state, on a logarithmic axis: large is unlike experts.",
            tuple(f"flow/score{side}" for side in SIDES),
            is_log=True,
        ),
        Kind(
            "Flow reward a response",
            "Of its tokens together; it helps if right responses get more than wrong ones.",
            tuple(f"flow/reward{side}" for side in SIDES),
        ),
        Kind(
            "Share of tokens with a flow reward",
            "The others are below the threshold, or not among the top k.",
            ("flow/share",),
        ),
        Kind(
            "Loss of the flow",
            "On tokens that it has not learnt yet: where it rises, policy and flow drift apart.",
            ("flow/loss", "loss"),
        ),
    ),
    "Optimisation": (
        Kind("Policy loss", "Mean of the step's mini-batches; it need not fall.", ("policy/loss",)),
        Kind(
            "Gradient norm",
            "Before clipping; a peak can come before a fall of the reward.",
            ("policy/grad_norm", "flow/grad_norm", "grad_norm"),
        ),
        Kind(
            "Clipped tokens",
            "Share at which the clip binds: the policy has moved far within the step.",
            ("policy/clipped",),
        ),
        Kind("Learning rate", "Of the policy.", ("lr",)),
        Kind("Size of the advantage", "Mean of its absolute value a token.", ("advantage_abs",)),
    ),
    "Time": (
        Kind(
            "Seconds a step",
            "The whole step, and its three long phases.",
            ("time/step", "time/roll_out", "time/score", "time/update"),
        ),
        Kind(
            "Seconds a step, the rest",
            "The short phases.",
            ("time/sync", "time/verify", "time/record", "time/evaluate"),
        ),
    ),
}
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
    says: str = ""  # a line under it
    is_log: bool = False
    level: float | None = None  # of experts, a horizontal line


def line_of(run: RunFiles, metric: str, name: str, colour: int) -> Line | None:
    """Return the line of a metric, None if the run has no such metric; long ones are averaged."""
    points = [(line["step"], line[metric]) for line in run.metrics if metric in line]
    if not points:
        return None
    return line_through(points, name, colour)


def line_through(points: Sequence[tuple[int, float]], name: str, colour: int) -> Line:
    """Return the line of steps and values; long ones are averaged."""
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
    for section, kinds in known_charts(runs).items():
        made = accuracy_charts(runs) if section == "Outcome" else []
        made += [chart_of(runs, kind) for kind in kinds]
        yield section, [chart for chart in made if chart.lines]
    yield "Other figures", other_charts(runs)


def known_charts(runs: Sequence[RunFiles]) -> dict[str, tuple[Kind, ...]]:
    """Return CHARTS, with a section for each dense reward beside the flow that a run had."""
    sections = dict(CHARTS)
    for metric in logged_metrics(runs):
        name = metric.removesuffix("/share")  # which every dense reward logs
        if name != metric and name != "flow":
            scores = tuple(f"{name}/score{side}" for side in SIDES)
            rewards = tuple(f"{name}/reward{side}" for side in SIDES)
            sections[f"Dense reward: {name}"] = (
                Kind("Score of a token", f"What {name} says of a token, its mean.", scores),
                Kind("Reward of a response", "Sum over its tokens, or their mean.", rewards),
                Kind("Share of tokens with a reward", "Of those that have a score.", (metric,)),
            )
    return sections


def other_charts(runs: Sequence[RunFiles]) -> list[Chart]:
    """Return a chart for each metric that no section has."""
    known = set(NOT_SHOWN)
    for kinds in known_charts(runs).values():
        for kind in kinds:
            known.update(kind.metrics)
    others = []
    for metric in logged_metrics(runs):
        if metric not in known and not metric.startswith("eval/"):
            others.append(chart_of(runs, Kind(metric, "", (metric,))))
    return others


def is_constant(chart: Chart) -> bool:
    """Return whether all lines of a chart have one value throughout."""
    return len({value for line in chart.lines for value in line.values}) == 1


def set_aside(charts: Sequence[Chart]) -> tuple[list[Chart], list[str]]:
    """Return the charts that are worth drawing, and sentences on the others.

    Those are the figures that never change, and curves that another chart has. The first chart, of
    the reward or of an evaluation, is drawn in any case.
    """
    drawn: dict[str, Chart] = {}
    constant = []
    equal = []
    for chart in charts:
        curves = repr([(line.name, line.steps, line.values) for line in chart.lines])
        if drawn and is_constant(chart):
            constant.append(f"{chart.title} {shorten(chart.lines[0].values[0])}")
        elif curves in drawn:
            equal.append(f"{chart.title} has the curve of {drawn[curves].title}.")
        else:
            drawn[curves] = chart
    if constant:
        equal.append(f"The same in every step: {', '.join(constant)}.")
    return list(drawn.values()), equal


def chart_of(runs: Sequence[RunFiles], kind: Kind) -> Chart:
    """Return a chart with a line and a colour for each run and metric."""
    logged = logged_metrics(runs)
    names = names_of_lines([metric for metric in kind.metrics if metric in logged])
    lines = []
    for i, run in enumerate(runs):
        for j, (metric, own_name) in enumerate(names.items()):
            name = f"{run_prefix(runs, run)}{own_name}".strip()
            line = line_of(run, metric, name, i * len(names) + j)
            if line:
                lines.append(line)
    chart = on_axes(kind.title, lines)
    chart.says = kind.says
    values = [value for line in lines for value in line.values]
    if "flow/score" in kind.metrics and len(runs) == 1:
        chart.level = expert_level(runs[0])
        if chart.level is not None:
            values.append(chart.level)  # 0 where the score is an excess
    chart.is_log = kind.is_log and all(value > 0 for value in values)
    return chart


def expert_level(run: RunFiles) -> float | None:
    """Return the flow's score of expert tokens in its offline start; None if that is not known.

    It was measured at the times of --calibrate-at, and holds for the contexts of that start.
    """
    if run.settings.get("flow_scope") == "expert":
        return 0.0  # the score is the excess over it
    times = run.settings.get("reward_times")
    described = run.folder / "flow.json"
    folders = [run.folder / "flow", Path(str(run.settings.get("flow")))]
    files = [folder / fl.FLOW_FILE for folder in folders if (folder / fl.FLOW_FILE).is_file()]
    if not (times and files and described.is_file()):
        return None
    calibrated_at = read_json(described, "the settings of a flow").get("calibrated_at", ())
    if not set(times) <= set(calibrated_at):
        return None
    with safe_open(files[0], "pt") as tensors:
        mean = tensors.get_tensor("expert_mean")  # (times, taps)
    chosen = mean[[calibrated_at.index(time) for time in times]]
    return fl.deviation_score(chosen, times).mean().item() or None


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
        says = "Share of right answers to held-out problems, before training, in it and after it."
        charts.append(Chart(f"Accuracy on {set_name}, 95 % intervals", own, 0, last, says))
    return charts


def ranking_charts(runs: Sequence[RunFiles]) -> list[Chart]:
    """Return a chart for each run and dense reward: its mean for right responses less for wrong ones.

    Steps that have no right or no wrong responses are left out.
    """
    charts = []
    for run in runs:
        for name in dense_names(run):
            right, wrong = (f"{name}/reward_{side}" for side in ("right", "wrong"))
            points = []
            for line in run.metrics:
                if right in line and wrong in line:
                    points.append((line["step"], line[right] - line[wrong]))
            if points:
                title = f"{run_prefix(runs, run)}{name} reward of right responses minus that of wrong ones"
                chart = Chart(title, [line_through(points, "", 0)], 1, run.metrics[-1]["step"])
                n_above = sum(difference > 0 for _, difference in points)
                chart.says = (
                    f"The {name} reward of right responses is above that of wrong ones in "
                    f"{n_above} of {len(points)} steps that have both: means of all responses of a "
                    "step. A step's page compares them problem by problem."
                )
                charts.append(chart)
    return charts


def dense_names(run: RunFiles) -> list[str]:
    """Return the names of the dense rewards that a run has."""
    ending = "/reward_right"
    return [name.removesuffix(ending) for name in logged_metrics([run]) if name.endswith(ending)]


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
    is_log: bool = False

    def place(self, value: float) -> float:
        if self.is_log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / ((self.high - self.low) or 1)
        return self.start + share * (self.end - self.start)

    def ticks(self, about: int) -> list[float]:
        """Return round values on the axis, about so many."""
        if self.is_log:
            return log_ticks(self.low, self.high)
        return ticks(self.low, self.high, about)


def draw(chart: Chart, number: int) -> str:
    """Return a chart as a <figure>."""
    values = [value for line in chart.lines for value in all_values(line)]
    if chart.level is not None:
        values.append(chart.level)
    low, high = padded(min(values), max(values))
    if chart.is_log:
        low, high = min(values) / 1.1, max(values) * 1.1
    across = Scale(chart.first, chart.last, LEFT, WIDTH - RIGHT)
    up = Scale(low, high, HEIGHT - BOTTOM, TOP, chart.is_log)
    marks = draw_axes(across, up)
    if chart.level is not None:
        marks += draw_level(chart.level, up)
    for line in chart.lines:
        marks += draw_line(line, across, up)
    marks += f"<line class=cursor y1={TOP} y2={HEIGHT - BOTTOM} visibility=hidden></line>"
    return figure(chart, number, marks, HEIGHT)


def draw_level(level: float, up: Scale) -> str:
    """Return a horizontal line at the score of expert tokens, with its name."""
    y = round(up.place(level), 1)
    text_y = min(y + 12, HEIGHT - BOTTOM - 2)
    return (
        f'<line class=level x1={LEFT} x2={WIDTH - RIGHT} y1="{y}" y2="{y}"></line>'
        f'<text x={LEFT + 4} y="{text_y}">experts {shorten(level, 3)}</text>'
    )


def draw_row(chart: Chart, number: int) -> str:
    """Return a chart of one line as a low row: a bar for each step, up or down from 0."""
    (line,) = chart.lines
    across = Scale(chart.first, chart.last, LEFT, WIDTH - RIGHT)
    width = max(0.4, 0.8 * (WIDTH - LEFT - RIGHT) / max(1, len(line.steps)))
    largest = max(abs(value) for value in line.values) or 1.0
    middle = ROW_HEIGHT / 2
    marks = f"<line class=axis x1={LEFT} x2={WIDTH - RIGHT} y1={middle} y2={middle}></line>"
    for step, value in zip(line.steps, line.values, strict=True):
        height = middle * abs(value) / largest
        side, top = "below", middle
        if value > 0:
            side, top = "above", middle - height
        x = across.place(step) - width / 2
        marks += (
            f'<rect class={side} x="{x:.2f}" y="{top:.2f}" width="{width:.2f}" '
            f'height="{height:.2f}"></rect>'
        )
    marks += f"<line class=cursor y1=0 y2={ROW_HEIGHT} visibility=hidden></line>"
    return figure(chart, number, marks, ROW_HEIGHT, "class=row")


def figure(chart: Chart, number: int, marks: str, height: int, more: str = "") -> str:
    """Return what is drawn as a <figure>, with the title, the lines' names and a text."""
    names = ""
    for line in chart.lines:
        last = shorten(line.values[-1])
        names += f"<li class=c{line.colour % N_COLOURS}>{escape(line.name)} <b>{last}</b></li>"
    title = escape(chart.title)
    says = escape(chart.says)
    return (
        f"<figure data-chart={number} {more}><figcaption>{title} <small>step {chart.last}</small>"
        f'</figcaption><svg viewBox="0 0 {WIDTH} {height}" preserveAspectRatio=none role=img '
        f'tabindex=0 aria-label="{title}: {says}">{marks}</svg><ul class=lines>{names}</ul>'
        f"<p class=says>{says}</p></figure>"
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
    for value in up.ticks(5):
        y = round(up.place(value), 1)
        marks += f'<line class=axis x1={LEFT} x2={WIDTH - RIGHT} y1="{y}" y2="{y}"></line>'
        marks += f'<text x={LEFT - 5} y="{y + 4}" text-anchor=end>{shorten(value, 5)}</text>'
    for value in across.ticks(5):
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


def log_ticks(low: float, high: float) -> list[float]:
    """Return values between two for a logarithmic axis: 1, 2 or 5 times a power of 10."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    found = [value for value in found if low <= value <= high]
    return found if len(found) > 1 else ticks(low, high, 4)


def draw_line(line: Line, across: Scale, up: Scale) -> str:
    """Return a line: points with intervals, or each step thin and the mean of a window thick.

    Two evaluations alone, before and after, are no curve: nothing joins them.
    """
    own = f"c{line.colour % N_COLOURS}"
    xs = [round(across.place(step), 1) for step in line.steps]
    marks = ""
    if line.low is None:
        marks += polyline(f"raw {own}", xs, line.values, up)
        marks += polyline(f"mean {own}", xs, window_means(line.values), up)
        return marks
    xs = [x + 4 * (line.colour % 2) for x in xs]  # beside those of the other way to sample
    if len(xs) > 2:
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
    charts = ranking_charts(runs)
    rows = "".join(draw_row(chart, number) for number, chart in enumerate(charts))
    sections = list(make_charts(runs))
    drawn, left_out = set_aside([chart for _, own in sections for chart in own])
    html = ""
    for section, own in sections:
        own = [chart for chart in own if chart in drawn]
        if own:
            html += f"<h2>{section}</h2><div class=charts>"
            for chart in own:
                html += draw(chart, len(charts))
                charts.append(chart)
            html += "</div>"
    recorded = recorded_steps(runs, path)
    body = fill(
        FOLDER / "curves.html",
        about=about(runs, recorded),
        rows=rows,
        table=figures_table(runs),
        legend=legend(runs),
        charts=html,
        left_out=escape(" ".join(left_out)),
        settings=settings_tables(runs),
    )
    title = f"Run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs"
    data = {"charts": [asdict(chart) for chart in charts], "recorded": recorded}
    page = make_page(title, body, data, FOLDER / "curves.css", FOLDER / "curves.js")
    return write_page(path, page)


def recorded_steps(runs: Sequence[RunFiles], path: Path) -> list[int]:
    """Return the steps whose responses a reader can open: of one run, with their page beside this one."""
    if len(runs) > 1 or not (path.parent / ROLLOUTS).exists():
        return []
    return list(record.find_files(runs[0].folder))


def about(runs: Sequence[RunFiles], recorded: Sequence[int]) -> str:
    """Lay out what is here, a way to the responses, and the steps at which the reward fell."""
    html = ""
    for run in runs:
        n_steps = run.metrics[-1]["step"]
        folder = escape(str(run.folder))
        html += f"<p>{n_steps} steps in {folder}."
        if recorded:
            html += (
                f" Its responses, token by token: <a href={ROLLOUTS}>{ROLLOUTS}</a>; a click on a "
                "chart, or Enter, opens those of the nearest recorded step."
            )
        elif record.find_files(run.folder):
            html += f" <code>python inspector.py {folder}</code> makes a page of its responses."
        html += f" {say_falls(run.metrics, recorded, ROLLOUTS)}</p>"
    return html


def legend(runs: Sequence[RunFiles]) -> str:
    """Lay out the colours of several runs; the charts name their lines in any case."""
    if len(runs) == 1:
        return ""
    items = [f"<li class=c{i % N_COLOURS}>{escape(run.name)}</li>" for i, run in enumerate(runs)]
    return "".join(items)
