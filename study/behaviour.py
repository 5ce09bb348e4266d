"""What the flow rewards, counted over the rollouts of a run: tokens, outcomes, places, training.

    python study/behaviour.py runs/rl-toy-flow              tables and pictures, into the run's folder
    python study/behaviour.py runs/rl-toy-flow --tracked    those of docs/behaviour-toy.md

It reads rollouts/step-N.jsonl and metrics.jsonl. Early is the first third of the recorded steps,
late is the last third.

    tokens     those with the lowest and the highest sum of flow reward, early and late: how often,
               which share has a flow reward, their mean reward and deviation; the same by kind of
               token
    outcome    can the mean deviation of a response tell wrong from right? AUC (0.5: it cannot) with
               95 % bootstrap intervals over groups, beside those of length, entropy and -log-prob;
               and within groups, where the problem is the same
    place      mean deviation along a response, of right and of wrong ones
    training   deviation of right and of wrong responses, share of tokens with a flow reward, and
               the flow's loss on fresh rollouts, before it learns from them: where it rises, policy
               and flow drift apart
"""

import repository  # noqa: F401

# isort: split
import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tyro

from common import code, number, table
from evidence import BLUE, ORANGE, STYLE, plt, save
from flow_signal import auc, resampling_weights
from infra import errors, record
from infra.metrics import read_metrics
from pages.falls import find_falls
from repository import ROOT

SIDES = (("right", True, BLUE), ("not right", False, ORANGE))
N_TOKENS = 8  # of a table, at either end
N_DRAWN = 30  # tokens of a picture
N_PLACES = 10  # parts of a response
CONNECTIVES = (
    "so then thus hence therefore because since if but however now next first second finally also "
    "and or let we that which where when given note wait actually alternatively instead"
)


@dataclass(frozen=True)
class Settings:
    """Count what the flow rewards in the rollouts of a run."""

    run: tyro.conf.Positional[str]  # Run folder
    # Rewrite docs/behaviour-toy.md and its pictures, which the repository keeps; else the page is in
    # the run's folder
    tracked: bool = False


# ---- Tokens
@dataclass
class TokenCount:
    """What is counted of all tokens of one text, or of one kind."""

    text: str
    rewards: list[float] = field(default_factory=list)
    deviations: list[float] = field(default_factory=list)

    @property
    def n(self) -> int:
        return len(self.rewards)

    @property
    def total(self) -> float:
        return sum(self.rewards)

    @property
    def rewarded(self) -> float:
        return sum(reward != 0 for reward in self.rewards) / self.n

    @property
    def deviation(self) -> float:
        return float(np.mean(self.deviations)) if self.deviations else math.nan


def count_tokens(
    records: Sequence[dict], name: Callable[[list[str], int], str]
) -> list[TokenCount]:
    """Count tokens under the name that `name(tokens, place)` gives; the most penalised first."""
    counts: dict[str, TokenCount] = {}
    for one in records:
        deviation = mean_over_taps(one)
        for place, reward in enumerate(one["dense_reward"]):
            if reward is None:  # the policy did not sample it
                continue
            text = name(one["tokens"], place)
            count = counts.setdefault(text, TokenCount(text))
            count.rewards.append(reward)
            if deviation[place] is not None:
                count.deviations.append(deviation[place])
    return sorted(counts.values(), key=lambda count: (count.total, -count.deviation))


def mean_over_taps(one: dict) -> list[float | None]:
    """Return the deviation of each token of a record, the mean over taps."""
    return [record.mean(by_tap) for by_tap in zip(*one["dense_score"], strict=True)]


def text_of(tokens: list[str], place: int) -> str:
    """Name a token by its text."""
    return tokens[place]


def kind_of(tokens: list[str], place: int) -> str:
    """Name a token by its kind."""
    text = tokens[place].strip()
    if re.fullmatch(r"<.*>", text):
        return "special token"
    if re.fullmatch(r"[+\-*/×÷^]|\\(times|cdot|div|frac)", text):
        return "operator"
    if re.fullmatch(r"=|≈|\\approx", text):
        return "equals sign"
    if re.fullmatch(r"[\d.,]*\d", text):
        before = "".join(tokens[max(0, place - 3) : place]).rstrip()
        return "result" if re.search(r"=\s*-?\d*$", before) else "other number"
    if text.lower() in CONNECTIVES.split():
        return "connective"
    if re.search(r"\w", text):
        return "other word"
    return "blank" if not text else "mark"


# ---- Outcomes
@dataclass
class Responses:
    """Figures of responses, an array each: what may tell wrong from right."""

    is_wrong: np.ndarray  # bool
    group: np.ndarray  # number of the group, over all steps
    figures: dict[str, np.ndarray]


def collect(records: Sequence[dict]) -> Responses:
    """Return the figures of responses that have a deviation."""
    figures = defaultdict(list)
    is_wrong = []
    groups = []
    numbers: dict[tuple[int, int], int] = {}
    for one in records:
        deviation = record.mean(mean_over_taps(one))
        if deviation is None:
            continue
        figures["deviation"].append(deviation)
        figures["length"].append(len(one["tokens"]))
        figures["entropy"].append(record.mean(one["entropy"]))
        figures["-log-prob"].append(-record.mean(one["logp"]))
        is_wrong.append(not one["correct"])
        key = (one["step"], one["group"])
        groups.append(numbers.setdefault(key, len(numbers)))
    arrays = {name: np.array(values, dtype=float) for name, values in figures.items()}
    return Responses(np.array(is_wrong, dtype=bool), np.array(groups, dtype=int), arrays)


def outcome_auc(responses: Responses, name: str) -> list[float]:
    """Return the AUC of a figure for wrong responses, and its interval over groups; NaN if none."""
    return with_interval(auc, responses, responses.figures[name])


def within_groups(responses: Responses, name: str) -> list[float]:
    """Return the same, but of pairs of the same group alone: the problem is no help there."""

    def paired_auc(score: np.ndarray, is_wrong: np.ndarray, weight: np.ndarray) -> np.ndarray:
        wins = np.zeros(len(weight))
        pairs = np.zeros(len(weight))
        for group in np.unique(responses.group):
            members = responses.group == group
            wrong = score[members & is_wrong]
            right = score[members & ~is_wrong]
            differences = wrong[:, None] - right[None, :]
            times = weight[:, members][:, 0]
            wins += times * ((differences > 0) + 0.5 * (differences == 0)).sum()
            pairs += times * differences.size
        return np.divide(wins, pairs, out=np.full(len(wins), np.nan), where=pairs > 0)

    return with_interval(paired_auc, responses, responses.figures[name])


def with_interval(measure: Callable, responses: Responses, score: np.ndarray) -> list[float]:
    """Return a measure of a score and wrong responses, with its 95 % interval over groups."""
    if len(score) == 0:
        return [math.nan] * 3
    n_groups = int(responses.group.max()) + 1
    weight = resampling_weights(n_groups)[:, responses.group]
    values = measure(score, responses.is_wrong, weight)
    if np.isnan(values[0]):
        return [math.nan] * 3
    low, high = np.nanpercentile(values[1:], [2.5, 97.5])
    return [float(values[0]), float(low), float(high)]


def by_place(records: Sequence[dict]) -> np.ndarray:
    """Return the mean deviation in each tenth of the responses, (N_PLACES,); NaN where none is."""
    sums = np.zeros(N_PLACES)
    counts = np.zeros(N_PLACES)
    for one in records:
        deviation = mean_over_taps(one)
        for k, value in enumerate(deviation):
            if value is not None:
                place = k * N_PLACES // len(deviation)
                sums[place] += value
                counts[place] += 1
    return np.divide(sums, counts, out=np.full(N_PLACES, np.nan), where=counts > 0)


# ---- Tables
def estimate(values: Sequence[float]) -> str:
    """Format a value and its interval; a dash for none."""
    if math.isnan(values[0]):
        return "–"
    return f"{values[0]:.2f} ({values[1]:.2f} – {values[2]:.2f})"


def token_table(counts: Sequence[TokenCount], total: float, show: Callable[[str], str]) -> str:
    """Lay out tokens or kinds, a row each; total is the flow reward of all tokens there are."""
    rows = []
    for count in counts:
        rows.append(
            [
                show(count.text),
                f"{count.n:,}",
                f"{100 * count.rewarded:.0f} %",
                number(count.total / count.n, 3),
                f"{abs(100 * count.total / total):.0f} %" if total else "–",
                number(count.deviation),
            ]
        )
    head = [
        "",
        "count",
        "share with a flow reward",
        "mean flow reward",
        "of all flow reward",
        "deviation",
    ]
    return table(head, rows)


def describe_tokens(records: Sequence[dict]) -> str:
    """Lay out the tokens at either end, and the kinds of tokens."""
    counts = count_tokens(records, text_of)
    total = sum(count.total for count in counts)
    most = counts[:N_TOKENS]
    least = counts[N_TOKENS:][-N_TOKENS:][::-1]
    kinds = count_tokens(records, kind_of)
    return (
        f"Most penalised:\n\n{token_table(most, total, code)}\n\n"
        f"Most rewarded, or least penalised:\n\n{token_table(least, total, code)}\n\n"
        f"By kind:\n\n{token_table(kinds, total, str)}\n"
    )


def describe_outcomes(periods: dict[str, list[dict]]) -> str:
    """Lay out how well each figure of a response tells wrong from right, in each period."""
    rows = []
    for period, records in periods.items():
        responses = collect(records)
        n_wrong = int(responses.is_wrong.sum())
        for name in responses.figures:
            rows.append(
                [
                    period,
                    name,
                    f"{len(responses.is_wrong) - n_wrong} / {n_wrong}",
                    estimate(outcome_auc(responses, name)),
                    estimate(within_groups(responses, name)),
                ]
            )
    return table(["", "measure", "right / wrong", "AUC", "AUC within groups"], rows)


# ---- Pictures
def draw_tokens(periods: dict[str, list[dict]]) -> plt.Figure:
    """Draw the frequent tokens by their mean deviation, the larger the more often they occur."""
    figure, panels = plt.subplots(len(periods), 1, figsize=(9, 6.4))
    for axes, (period, records) in zip(panels, periods.items(), strict=True):
        counts = [count for count in count_tokens(records, text_of) if count.deviations]
        frequent = sorted(counts, key=lambda count: -count.n)[:N_DRAWN]
        largest = frequent[0].n
        for rank, count in enumerate(sorted(frequent, key=lambda count: count.deviation)):
            shown = code(count.text).strip("`")[:14].replace("\\|", "|").replace("$", r"\$")
            is_long = len(shown) > 4
            axes.text(
                rank,
                count.deviation,
                shown,
                fontsize=8 + 14 * math.sqrt(count.n / largest),
                color=ORANGE if count.rewarded > 0.1 else BLUE,
                ha="center",
                va="bottom",
                rotation=90 if is_long else 0,
            )
        deviations = [count.deviation for count in frequent]
        axes.set_xlim(-1, len(frequent))
        axes.set_ylim(0.95 * min(deviations), 1.25 * max(deviations))
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:.3g}")
        axes.yaxis.set_minor_formatter("{x:.3g}")
        axes.set_xticks([])
        axes.set_title(period, fontsize=10)
        axes.set_ylabel("mean velocity deviation")
    figure.suptitle("Frequent tokens by deviation; orange: over a tenth have a flow reward")
    figure.tight_layout()
    return figure


def draw_outcomes(periods: dict[str, list[dict]]) -> plt.Figure:
    """Draw the densities of the mean deviation of right and of other responses."""
    figure, panels = plt.subplots(1, len(periods), figsize=(9, 3.4))
    for axes, (period, records) in zip(panels, periods.items(), strict=True):
        responses = collect(records)
        deviation = responses.figures["deviation"]
        edges = np.linspace(deviation.min(), np.quantile(deviation, 0.99) + 1e-6, 40)
        for name, is_right, colour in SIDES:
            chosen = deviation[responses.is_wrong != is_right]
            if len(chosen):
                label = f"{name} ({len(chosen)})"
                axes.hist(chosen, edges, density=True, alpha=0.55, color=colour, label=label)
        area = estimate(outcome_auc(responses, "deviation"))
        axes.set_title(f"{period}: AUC {area}", fontsize=10)
        axes.set_xlabel("mean velocity deviation of a response")
        axes.legend()
    panels[0].set_ylabel("density")
    figure.tight_layout()
    return figure


def draw_places(periods: dict[str, list[dict]]) -> plt.Figure:
    """Draw the mean deviation along right and other responses."""
    figure, panels = plt.subplots(1, len(periods), figsize=(9, 3.4), sharey=True)
    places = (np.arange(N_PLACES) + 0.5) / N_PLACES
    for axes, (period, records) in zip(panels, periods.items(), strict=True):
        for name, is_right, colour in SIDES:
            chosen = [one for one in records if one["correct"] == is_right]
            axes.plot(places, by_place(chosen), color=colour, marker="o", markersize=4, label=name)
        axes.set_title(period)
        axes.set_xlabel("place in the response, from 0 to 1")
        axes.legend()
    panels[0].set_ylabel("mean velocity deviation")
    figure.tight_layout()
    return figure


def draw_training(metrics: Sequence[dict]) -> plt.Figure:
    """Draw the flow's figures over the steps of training."""
    curves = {
        "velocity deviation": {"flow/score_right": BLUE, "flow/score_wrong": ORANGE},
        "share of tokens with a flow reward": {"flow/share": BLUE},
        "flow loss on fresh rollouts": {"flow/loss": BLUE},
    }
    figure, panels = plt.subplots(1, len(curves), figsize=(11, 3.4))
    for axes, (title, own) in zip(panels, curves.items(), strict=True):
        for metric, colour in own.items():
            points = [(line["step"], line[metric]) for line in metrics if metric in line]
            if points:
                side = metric.rpartition("_")[2] if "_" in metric else None
                axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.2, label=side)
        if len(own) > 1:
            axes.legend()
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
    figure.tight_layout()
    return figure


# ---- The page
def split_periods(run: str) -> dict[str, list[dict]]:
    """Return the records of the first and of the last third of the recorded steps."""
    files = record.need_files(run)
    # a step at which the reward fell, and the one before, are not recorded for their numbers: they are
    # no sample of the run
    falls = find_falls(read_metrics(Path(run, "metrics.jsonl")))
    steps = [step for step in files if step not in falls and step + 1 not in falls]
    size = max(1, len(steps) // 3)
    periods = {}
    for name, chosen in (("early", steps[:size]), ("late", steps[-size:])):
        title = f"{name}, steps {chosen[0]} to {chosen[-1]}"
        periods[title] = [one for step in chosen for one in record.read(files[step])]
        if not periods[title][0]["taps"]:
            raise ValueError(
                f"{run} has rollouts without a flow; expected a run with --shaping flow"
            )
    return periods


def make_page(settings: Settings, periods: dict[str, list[dict]], pictures: dict[str, str]) -> str:
    """Return the page in Markdown; pictures are paths from the page, by subject."""
    parts = [
        f"# What the flow rewards: {Path(settings.run).name}\n",
        f"`python study/behaviour.py {settings.run}` counted this over the recorded rollouts of one "
        "run. Tokens of a response depend on each other, and responses on the "
        "policy of their step: these are descriptions of this run, not tests of the method.\n",
    ]
    for period, records in periods.items():
        parts.append(f"## Tokens, {period}\n\n{describe_tokens(records)}")
    parts.append(f"![tokens]({pictures['tokens']})\n")
    parts.append(
        "## Deviation against correctness\n\n"
        "AUC is the probability that a wrong response has the larger value of the named measure than "
        "a right one; 0.5 is chance. Intervals are 95 % bootstrap intervals over groups. Within "
        "groups, responses to the same problem are compared.\n\n"
        f"{describe_outcomes(periods)}\n\n![outcomes]({pictures['outcomes']})\n"
    )
    parts.append(f"## Along a response\n\n![places]({pictures['places']})\n")
    parts.append(
        "## Over training\n\nThe flow's loss is that on fresh rollouts, before it learns from "
        f"them: where it rises, policy and flow drift apart.\n\n![training]({pictures['training']})\n"
    )
    return "\n".join(parts)


def main(settings: Settings) -> None:
    """Write the page and its pictures."""
    periods = split_periods(settings.run)
    metrics = read_metrics(Path(settings.run, "metrics.jsonl"))
    page = Path(settings.run, "behaviour.md")
    picture_folder = page.parent
    if settings.tracked:
        page = ROOT / "docs" / "behaviour-toy.md"
        picture_folder = ROOT / "study"
    pictures = {}
    with plt.rc_context(STYLE):
        for subject, figure in (
            ("tokens", draw_tokens(periods)),
            ("outcomes", draw_outcomes(periods)),
            ("places", draw_places(periods)),
            ("training", draw_training(metrics)),
        ):
            picture = picture_folder / f"{page.stem}-{subject}.png"
            save(figure, picture)
            pictures[subject] = os.path.relpath(picture, page.parent)
    page.write_text(make_page(settings, periods, pictures), encoding="utf-8")
    print(f"open {page}")


if __name__ == "__main__":
    errors.run(lambda: main(tyro.cli(Settings)))
