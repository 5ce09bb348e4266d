"""The figures of a study: those of each run, and the JSON file that keeps them.

A run's series are rounded; runs of several machines are put together if they are comparable.
"""

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import worlds
from infra import record
from infra.files import need_keys, read_json, written_whole
from infra.metrics import read_metrics
from measures import auc
from methods import ARMS

# Figures of a step that the JSON file keeps, besides those of the flow
SERIES = ("correct", "reward", "length", "entropy", "truncated", "varied_groups")
SERIES_OF_TRIALS = ("correct", "length")  # of runs on seeds that nobody reports
N_DIGITS = 4  # of each, after the point


# What files of a study hold, for an error
OF_ALL = "what the runs of a study have in common"
OF_THE_PLAN = "what a study registered"
OF_A_JOB = "what a study notes of a run or of a preparation"

FIRST_TUNING_SEED = 100  # from here on settings are chosen, and nothing is reported


# ---- Runs
def collect(folder: str) -> dict:
    """Return the figures of all runs in a study's folder, finished or not."""
    common = Path(folder, "common.json")
    if not common.exists():
        raise ValueError(f"{folder} holds no study; expected the --folder of one")
    plan = Path(folder, "registered.json")
    registered = {"registered": read_json(plan, OF_THE_PLAN)} if plan.exists() else {}
    runs = []
    for record_file in Path(folder).glob("*/seed-*.json"):
        runs.append(read_run(record_file))
    return {**read_json(common, OF_ALL), **registered, "runs": in_order(runs)}


def read_run(record_file: Path) -> dict:
    """Return the figures of a run: what the study noted of it, and its series."""
    record = read_json(record_file, OF_A_JOB)
    need_keys([record], record_file, ["arm", "seed", "status", "settings"])
    folder = record_file.with_suffix("")
    steps = read_steps(folder / "metrics.jsonl")
    kept = ("arm", "seed", "base", "beside", "status", "error", "settings", "script", "versions")
    run = {key: record[key] for key in kept if key in record}
    run["seconds"] = record.get("seconds", 0)
    if "needs" in record:
        run["prepared_seconds"] = preparing_seconds(record["needs"], record_file.parents[1])
    series = read_series(steps)
    if run["seed"] >= FIRST_TUNING_SEED:
        series = {name: series[name] for name in series if name in SERIES_OF_TRIALS}
    run["series"] = series
    run["held_out"] = read_evaluations(folder / "summary.json")
    if "log_rollouts" in run["settings"]:
        run["auc"] = read_aucs(folder, record["settings"].get("dense_on", "token"))
    return run


def preparing_seconds(needs: Sequence[str], study: Path) -> int:
    """Return the seconds of a core that it took to prepare what a run needs, such as an offline start."""
    seconds: dict[str, int] = {}
    waiting = list(needs)
    while waiting:
        needed = waiting.pop()
        name, _, base = needed.partition("@")
        folder = study / "prepared" / f"base-{base}" if base else study / "prepared"
        file = folder / f"{name}.json"
        if needed not in seconds and file.exists():
            of_job = read_json(file, OF_A_JOB)
            seconds[needed] = of_job.get("seconds", 0)
            waiting += of_job.get("needs", ())
    return sum(seconds.values())


def read_aucs(folder: Path, dense_on: str) -> dict[str, float | None]:
    """Return how well what recorded tokens get tells right steps from wrong ones, by step.

    That is a token's reward; with --dense-on response, where all tokens have the same, its score.
    """
    aucs = {}
    for step, file in record.find_files(folder).items():
        value = auc(*label_tokens(record.read(file), dense_on))
        aucs[str(step)] = None if math.isnan(value) else round(value, N_DIGITS)
    return aucs


def label_tokens(records: Sequence[dict], dense_on: str) -> tuple[list[float], list[bool]]:
    """Return a value of each token inside a step (higher is better) and whether that is right."""
    values = []
    labels = []
    for one in records:
        of_tokens = one["dense_reward"] if dense_on == "token" else scores_of(one)
        ends = list(itertools.accumulate(len(text) for text in one["tokens"]))
        steps = worlds.label_steps(one["question"], one.get("solution"), one["response"])
        for step in steps:
            for end, value in zip(ends, of_tokens, strict=True):
                if one["dense"] and value is not None and step.start < end <= step.end:
                    values.append(value)
                    labels.append(step.is_right)
    return values, labels


def scores_of(one: dict) -> list[float | None]:
    """Return the score of each token, mean over taps, higher is better; None if unknown.

    Of a control that shuffles rewards the scores are those of the reward that it shuffles, so that
    they say nothing of it.
    """
    if one["dense"] == "shuffled" or not one["dense_score"]:
        return [None] * len(one["tokens"])
    sign = -1 if one["dense"] == "flow" else 1  # the flow's is a deviation
    scores = []
    for by_tap in zip(*one["dense_score"], strict=True):
        known = [value for value in by_tap if value is not None]
        scores.append(sign * sum(known) / len(known) if known else None)
    return scores


def read_steps(file: Path) -> list[dict[str, float]]:
    """Return the figures of each step that a run has logged so far, without those not finite."""
    return read_metrics(file) if file.exists() else []


def read_series(steps: Sequence[dict]) -> dict[str, list[float | None]]:
    """Return the figures of steps that are kept, by name, rounded; None where a step has none.

    A step without right answers, for instance, has no flow reward of right ones, and a figure that
    was not finite is none.
    """
    names = dict.fromkeys(name for step in steps for name in step)
    series: dict[str, list[float | None]] = {}
    for name in names:
        is_score = name.endswith("/score") and not name.startswith("time/")
        if name in SERIES or name.startswith("flow/") or is_score:
            values = [step.get(name) for step in steps]
            series[name] = [None if value is None else round(value, N_DIGITS) for value in values]
    return series


def read_evaluations(file: Path) -> dict[str, dict[str, float]]:
    """Return the accuracies on held-out problems, before and after, and pass@k."""
    accuracies: dict[str, dict[str, float]] = {}
    summary = read_json(file, "the evaluations of a run") if file.exists() else {}
    for when, sets in summary.items():
        (kinds,) = sets.values()
        accuracies[when] = {
            kind: round(row["avg"]["mean"], N_DIGITS) for kind, row in kinds.items()
        }
        passed = kinds["sampled"]["pass"]
        k = max(passed, key=int)
        if int(k) > 1:
            accuracies[when][f"pass@{k}"] = round(passed[k]["mean"], N_DIGITS)
    return accuracies


# ---- The file of figures
def in_order(runs: Sequence[dict]) -> list[dict]:
    """Sort runs by arm, in the order of ARMS, then the arms of rewards, and by seed."""
    places = {name: place for place, name in enumerate(ARMS)}

    def key(run: dict) -> tuple:
        name = run["arm"].partition(":")[0]
        return places.get(name, len(places)), run["arm"], run["seed"]

    return sorted(runs, key=key)


def merge(studies: Sequence[dict]) -> dict:
    """Put the runs of several studies together; ValueError if they are not comparable.

    Of a run that is in several of them, the one that came furthest stays, or the last of equals. The
    base models of all are numbered anew: another machine makes others, as rounding differs.
    """
    bases = list(dict.fromkeys(base for study in studies for base in bases_of(study)))
    common = {key: value for key, value in without_bases(studies[0]).items() if key != "runs"}
    common["base"], *others = bases
    if others:
        common["other_bases"] = others
    plans = [study["registered"] for study in studies if "registered" in study]
    if plans:
        common["registered"] = join(plans)
    runs: dict[tuple[str, int], dict] = {}
    settings: dict[tuple[str, bool], dict] = {}
    base_of_pairs: dict[tuple[int, str], int] = {}
    for study in studies:
        check_equal(without_bases(study), without_bases(common), "a study to be merged")
        for run in numbered(study, bases):
            key = (run["arm"], run["seed"])
            if base_of_pairs.setdefault(pairs_of(run), run["base"]) != run["base"]:
                raise ValueError(
                    f"seed {run['seed']} was run on two base models, so that its runs are no pairs; "
                    "leave one file out"
                )
            is_tuning = (
                run["seed"] >= FIRST_TUNING_SEED
            )  # with the settings among which one chooses
            expected = settings.setdefault((run["arm"], is_tuning), without_seed(run))
            if without_seed(run) != expected:
                raise ValueError(
                    f"runs of {run['arm']} differ in settings, {without_seed(run)} and {expected}: "
                    "they are not comparable; leave one file out"
                )
            if key not in runs or progress(run) >= progress(runs[key]):
                runs[key] = run
    return {**common, "runs": in_order(list(runs.values()))}


def bases_of(study: dict) -> list[str]:
    """Return the hashes of a study's base models, in the order of their numbers."""
    return [study["base"], *study.get("other_bases", ())]


def without_bases(study: dict) -> dict:
    """Return a study, or what its runs have in common, without its base models."""
    return {key: value for key, value in study.items() if key not in ("base", "other_bases")}


def pairs_of(run: dict) -> tuple[int, str]:
    """Return what is equal for runs that are compared, and therefore need one base model.

    These are the runs of a seed. Of those that choose settings, only an arm's own are compared.
    """
    is_tuning = run["seed"] >= FIRST_TUNING_SEED
    return run["seed"], run["arm"].partition(":")[0] if is_tuning else ""


def numbered(study: dict, bases: Sequence[str]) -> list[dict]:
    """Return a study's runs with the numbers that their base models have among others."""
    own = bases_of(study)
    return [{**run, "base": bases.index(own[run.get("base", 0)])} for run in study["runs"]]


def extend(stored: dict, asked: dict, n_runs: int, name: str) -> dict:
    """Return a plan with what is asked beside it, noting after how many finished runs arms joined.

    ValueError for anything but other arms, with what is theirs, or a part of the seeds.
    """
    first, last = stored["seeds"]
    if first <= asked["seeds"][0] and asked["seeds"][1] <= last:
        asked = {**asked, "seeds": stored["seeds"]}
    whole = dict(stored)
    for key, value in asked.items():
        if key == "joined":
            continue
        known = stored.get(key)
        if isinstance(value, dict):
            known = known or {}
            common = known.keys() & value.keys()
            check_equal({k: known[k] for k in common}, {k: value[k] for k in common}, name)
            whole[key] = {**known, **value}
        elif key != "arms":
            check_equal({key: known}, {key: value}, name)
    new = [arm for arm in asked["arms"] if arm not in stored["arms"]]
    if new:
        whole["arms"] = [*stored["arms"], *new]
        joined = {"arms": new, "after_finished_runs": n_runs}
        whole["joined"] = [*stored.get("joined", ()), joined]
    return whole


def join(plans: Sequence[dict]) -> dict:
    """Return the plan of several machines; ValueError if they differ in more than arms and seeds."""
    bounds = [seed for plan in plans for seed in plan["seeds"]]
    seeds = [min(bounds), max(bounds)]
    whole = {**plans[0], "seeds": seeds}
    for plan in plans[1:]:
        whole = extend(whole, {**plan, "seeds": seeds}, 0, "what was registered")
    return whole


def without_seed(run: dict) -> dict:
    """Return the settings that all runs of an arm share."""
    settings = {name: value for name, value in run["settings"].items() if name != "seed"}
    return {"script": run["script"], **settings}


def progress(run: dict) -> tuple[bool, int]:
    """Return how far a run came."""
    return run["status"] == "finished", len(run["series"].get("correct", ()))


def read_study(file: str | Path) -> dict:
    """Read a file of figures; ValueError if it is none."""
    study = read_json(file, "a file that study/study.py wrote")
    runs = study.get("runs")
    if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
        raise ValueError(f"{file} holds no runs; expected a file that study/study.py wrote")
    need_keys(runs, Path(file), ["arm", "seed", "status", "script", "settings", "series"])
    return study


def write_study(file: Path, study: dict) -> None:
    """Write a file of figures, a run a line."""
    head = [
        f"{json.dumps(key)}: {json.dumps(value)},\n"
        for key, value in study.items()
        if key != "runs"
    ]
    runs = ",\n".join(json.dumps(run, separators=(",", ":")) for run in study["runs"])
    with written_whole(file) as temporary:
        temporary.write_text("{\n" + "".join(head) + '"runs": [\n' + runs + "\n]}\n")


def update_file(file: Path, folder: str) -> None:
    """Put the figures of the runs in a study's folder into a file; what else it holds stays."""
    studies = [read_study(file)] if file.exists() else []
    write_study(file, merge([*studies, collect(folder)]))


def check_equal(stored: dict, asked: dict, name: str) -> None:
    """Raise ValueError if runs of two studies are not comparable."""
    for key in sorted((stored.keys() | asked.keys()) - {"runs", "registered"}):
        if stored.get(key) != asked.get(key):
            raise ValueError(
                f"{name} has {key}={stored.get(key)}, expected {asked.get(key)}: their runs are not "
                "comparable; name another --folder or --json"
            )
