"""Does the flow's score see a wrong number in a real language model's latents?

    python benchmarks/smollm2.py --folder runs/smollm2
    python study/text_signal.py --solutions GSM8K_TRAIN.jsonl
    python study/flow_signal.py --render study/signal-text.json

Flows are fitted to solutions (columns problem, solution). In each of some others one result, a
number after `=`, is changed to another of as many digits. The figures compare the two:

    place               AUC of the number's tokens, changed, against the same place unchanged
    place in pairs      share of pairs in which the changed number scores higher, ties half
    others              AUC of the changed number's tokens against all other tokens of the solution
    responses in pairs  share of pairs in which the changed solution scores higher in the mean

Scores: the published one at three times and its excess over expert tokens, with latents as they are
and standardised, after more and less training; beside them log-prob and entropy. Both solutions of
a pair get the same noise.
"""

import repository  # noqa: F401

# isort: split
import json
import math
import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro

import train_flow
from common import machine
from flow_signal import (
    TIMES,
    Scored,
    auc,
    excess_of,
    figure,
    mean,
    read_flow,
    resampling_weights,
    response_means,
    score_responses,
    tables,
    write_untrained,
)
from infra import batching, errors, parallel
from infra.data import DataSettings, load_rows, make_prompts, solution_end
from infra.models import LoadingSettings, Model, find_model
from infra.settings import change
from policy import load_policy

ANNOTATION = re.compile(r"<<.*?>>")  # of GSM8K: 48/2 = <<48/2=24>>24
RESULT = re.compile(r"= ?\$?(\d+)(?![\d,.]*\d)")  # a whole number after an equals sign


@dataclass(frozen=True)
class Settings:
    """What to fit and to compare."""

    solutions: str  # JSONL with problem and solution, such as GSM8K's training set
    model: str = "runs/smollm2"  # Folder of the language model
    n_train: int = 576  # Solutions that flows are fitted to
    n_held_out: int = 64  # Solutions for the scale of expert tokens
    n_pairs: int = 128  # Solutions that are compared with changed ones
    epochs: tuple[int, ...] = (0, 2)  # Passes of the offline start; 0: untrained
    batch_size: int = 8  # Solutions a step
    lr: float = 1e-3  # Peak learning rate of the offline start
    blocks: int = 2  # Residual blocks of the flow
    folder: str = "runs/signal-text"  # Where flows are kept
    json: str | None = None  # File for the figures


# ---- Solutions
def clean(solution: str) -> str:
    """Return a solution of GSM8K without its calculator annotations."""
    return ANNOTATION.sub("", solution)


def change_result(solution: str, seed: int) -> tuple[str, int, int] | None:
    """Change one result to another number of as many digits.

    Returns the changed solution and where the number starts and ends; None without a result.
    """
    places = [match.span(1) for match in RESULT.finditer(solution)]
    if not places:
        return None
    rng = random.Random(f"change {seed}")
    start, end = rng.choice(places)
    number = solution[start:end]
    lowest = 10 ** (len(number) - 1)  # no leading zero
    others = [n for n in range(lowest, 10 * lowest) if str(n) != number]
    return solution[:start] + str(rng.choice(others)) + solution[end:], start, end


class Pair(NamedTuple):
    """A solution and the same with one number changed, in tokens."""

    original: batching.Row
    changed: batching.Row
    places: list[int]  # tokens of the number


def make_pairs(rows: Sequence[dict], model: Model) -> list[Pair]:
    """Make pairs of the solutions that have a result."""
    settings = DataSettings(template="bare", max_prompt_tokens=2048)
    end = solution_end(model, "bare")
    pairs = []
    for seed, row in enumerate(rows):
        solution = clean(row["solution"])
        found = change_result(solution, seed)
        if found is None:
            continue
        changed, first, last = found
        (prompt,) = make_prompts([row["problem"]], [()], model, settings)
        ids = model.tokenizer(solution, add_special_tokens=False, return_offsets_mapping=True)
        changed_ids = model.tokenizer(changed, add_special_tokens=False)["input_ids"]
        offsets = ids["offset_mapping"]
        places = [i for i, (a, b) in enumerate(offsets) if a < last and b > first]
        if len(changed_ids) != len(offsets):
            continue  # the tokenizer has cut the other number elsewhere
        original = batching.Row(prompt, ids["input_ids"] + end)
        pairs.append(Pair(original, batching.Row(prompt, changed_ids + end), places))
    return pairs


# ---- Flows
class Fit(NamedTuple):
    """How a flow is fitted."""

    is_standardised: bool
    epochs: int


def list_fits(epochs: Sequence[int]) -> list[Fit]:
    """Return the fits to compare."""
    return [Fit(is_standardised, n) for n in epochs for is_standardised in (False, True)]


def keep_flow(fit: Fit, settings: Settings, data: Path) -> Path:
    """Return the folder of a fit's flow, which is made if it is not there."""
    kind = "standardised" if fit.is_standardised else "plain"
    folder = Path(settings.folder) / f"{kind}-{fit.epochs}"
    config = change(
        train_flow.Config(),
        model=settings.model,
        data=str(data),
        template="bare",
        standardise=fit.is_standardised,
        calibrate_at=TIMES,
        held_out=settings.n_held_out,
        batch_size=settings.batch_size,
        epochs=max(1, fit.epochs),
        lr=settings.lr,
        flow_blocks=settings.blocks,
        noise_repeats=1,
        save_every=0,
        compile="off",  # several fits in one process
        dtype="float32",
        folder=str(folder),
    )
    if not (folder / "flow").exists():
        if fit.epochs:
            train_flow.main(config)
        else:
            write_untrained(config)
    return folder / "flow"


# ---- Comparison
class Comparison(NamedTuple):
    """Pairs with resampling weights, and which tokens are the changed numbers."""

    pairs: list[Pair]
    weight: np.ndarray  # (R, pairs)
    scored: Scored  # of the originals; tokens of the changed ones are in the same places

    def is_changed(self) -> np.ndarray:
        """Return which tokens are the changed numbers', (M,) bool."""
        chosen = np.zeros(len(self.scored.response), bool)
        for start, pair in zip(self.scored.start, self.pairs, strict=True):
            chosen[start + np.array(pair.places)] = True
        return chosen

    def compare(self, original: np.ndarray, changed: np.ndarray) -> dict:
        """Compare values of the tokens (M,) of originals and of changed solutions."""
        is_number = self.is_changed()
        of_number = self.scored.response[is_number]
        number_weight = self.weight[:, of_number]
        is_positive = np.repeat([True, False], is_number.sum())
        both = np.concatenate([changed[is_number], original[is_number]])
        place = auc(both, is_positive, np.hstack([number_weight, number_weight]))
        others = auc(changed, is_number, self.weight[:, self.scored.response])
        sums = [np.bincount(of_number, weights=v[is_number]) for v in (changed, original)]
        means = [response_means(values, self.scored) for values in (changed, original)]
        return {
            "place": figure(place),
            "place in pairs": figure(mean(wins(*sums), self.weight)),
            "others": figure(others),
            "responses in pairs": figure(mean(wins(*means), self.weight)),
        }


def wins(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return 1 where a is larger, 0 where b is, and a half where they are equal."""
    return (a > b) + (a == b) / 2


def compare_flows(settings: Settings, fits: dict[Fit, Path], pairs: list[Pair]) -> list[dict]:
    """Return the figures of every score."""
    policy = load_policy(settings.model).float().to(parallel.DEVICE)
    flows = [read_flow(path) for path in fits.values()]
    of_originals = score_responses(policy, flows, [pair.original for pair in pairs], 1)
    of_changed = score_responses(policy, flows, [pair.changed for pair in pairs], 1)
    weight = resampling_weights(len(pairs))
    comparison = Comparison(pairs, weight, of_originals[0])
    kinds = {
        "-log-prob": (-of_originals[0].logp, -of_changed[0].logp),
        "entropy": (of_originals[0].entropy, of_changed[0].entropy),
    }
    rows = []
    for name, values in kinds.items():
        figures = comparison.compare(*values)
        rows.append({"score": name, "latents": None, "steps": None, **figures})
    for fit, flow, original, changed in zip(fits, flows, of_originals, of_changed, strict=True):
        steps = math.ceil(fit.epochs * settings.n_train / settings.batch_size)
        kind = "standardised" if fit.is_standardised else "as published"
        for name, values in flow_scores(flow, original.errors[0], changed.errors[0]).items():
            figures = comparison.compare(*values)
            rows.append({"score": name, "latents": kind, "steps": steps, **figures})
    return rows


def flow_scores(flow, original: np.ndarray, changed: np.ndarray) -> dict:
    """Return scores of tokens by errors (times, taps, M), for originals and changed solutions."""
    scores = {}
    excess = (excess_of(original, flow), excess_of(changed, flow))
    for i, time in enumerate(TIMES):
        scores[f"deviation, t = {time}"] = (original[i].mean(axis=0), changed[i].mean(axis=0))
        scores[f"excess, t = {time}"] = (excess[0][i].mean(axis=0), excess[1][i].mean(axis=0))
    return scores


# ---- Main
def main(settings: Settings) -> None:
    """Fit the flows, compare the pairs, write the figures and print the table."""
    parallel.start()
    rows = load_rows(settings.solutions, ("problem", "solution"), "train", None)
    n_fitted = settings.n_train + settings.n_held_out
    if len(rows) < n_fitted + settings.n_pairs:
        raise ValueError(
            f"{settings.solutions} has {len(rows)} solutions, expected "
            f"{n_fitted + settings.n_pairs}: lower --n-train or --n-pairs"
        )
    folder = Path(settings.folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "solutions.jsonl"
    with open(data, "w") as lines:
        for row in rows[:n_fitted]:
            solution = {"problem": row["problem"], "solution": clean(row["solution"])}
            lines.write(json.dumps(solution) + "\n")
    fits = {fit: keep_flow(fit, settings, data) for fit in list_fits(settings.epochs)}
    model = find_model(settings.model, LoadingSettings())
    pairs = make_pairs(rows[n_fitted : n_fitted + settings.n_pairs], model)
    found = {
        "model": Path(settings.model).name,
        "pairs": len(pairs),
        "rows": compare_flows(settings, fits, pairs),
    }
    named = {**asdict(settings), "solutions": Path(settings.solutions).name}
    result = {"machine": machine(), "settings": named, "text": found}
    file = Path(settings.json or folder / "signal-text.json")
    file.write_text(json.dumps(result) + "\n")
    print(tables(file))


if __name__ == "__main__":
    errors.run(lambda: main(tyro.cli(Settings)))
