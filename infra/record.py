"""Rollouts as a record: what a step computed of some episodes, one JSON object an episode.

    runs/NAME/rollouts/step-N.jsonl      inspector.py shows them, study/behaviour.py counts

An episode has
    step group sample          where it comes from; group counts the step's problems
    problem question answer    the problem's id, text and right answer
    solution                   the problem's worked solution, if the data has one
    prompt images              the prompt as text, and where its images are: they are not copied
    response finish_reason     the response as text without special tokens, and how it ended
    reward parts correct verdict extracted text    what the verdict says, see rewards.py
    outcome                    its advantage by the outcome alone, before the dense reward joins
    dense taps                 name of the dense reward, null if there is none; indices of the layers it taps
    token_ids tokens           of the response; tokens are texts, which together are the response
    logp entropy dense_reward advantage ratio      a number for each token of the response
    dense_score                for each tap a number for each token, whose mean is the dense score
ratio is the trainer's probability of a token over the sampler's. Numbers have six digits; null
stands for a number that is not there: a token without a context has no deviation from a flow, and one
that the policy did not sample, such as a tool's result, has no numbers at all. Files of earlier
versions say `flow_reward` and `deviation` and have no `outcome`, and are read as well.

A token takes about 100 bytes. A file of a training holds at most N_GROUPS * group_size * max_tokens of them;
that of a step at which the reward fell, and of the one before, holds all groups of the step.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from infra.files import need_keys, read_json_lines

FOLDER = "rollouts"  # in a run's folder
N_GROUPS = 4  # of a step that are written, the first ones, each as a whole


# ---- Tables
def summary_rows(records: Sequence[dict]) -> tuple[list[str], list[list]]:
    """Return columns and rows of a table of episodes, for those who follow a run elsewhere."""
    columns = ["problem", "sample", "question", "response", "answer", "extracted", "verdict"]
    columns += ["reward", "finish_reason"]
    rows = []
    for one in records:
        row = [one[column] for column in columns]
        dense_reward = sum(x for x in one["dense_reward"] if x is not None)
        row += [len(one["tokens"]), mean(one["entropy"]), dense_reward]
        row.append(mean([mean(values) for values in one["dense_score"]]))
        rows.append(row)
    return [*columns, "tokens", "entropy", "dense reward", "dense score"], rows


def mean(numbers: Sequence[float | None]) -> float | None:
    """Return the mean of the numbers that are there; None if none is."""
    known = [x for x in numbers if x is not None]
    return sum(known) / len(known) if known else None


# ---- Reading
def find_files(run: str | Path) -> dict[int, Path]:
    """Return the files of a run's rollouts by step, the first one first."""
    found = {}
    for path in Path(run, FOLDER).glob("step-*.jsonl"):
        match = re.fullmatch(r"step-(\d+)", path.stem)
        if match:
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def need_files(run: str | Path) -> dict[int, Path]:
    """Return the files of a run's rollouts by step, the first one first; ValueError if none."""
    found = find_files(run)
    if not found:
        raise ValueError(
            f"{run} has no {FOLDER}/step-N.jsonl; expected the folder of a run of train_rl.py "
            "with --log-rollouts 1 or more"
        )
    return found


# What earlier versions called parts of a record
OLD_NAMES = {"flow_reward": "dense_reward", "deviation": "dense_score"}


def by_todays_names(one: dict) -> dict:
    """Return a record, perhaps of an earlier version, with the names that its parts have now."""
    renamed = {OLD_NAMES.get(name, name): value for name, value in one.items()}
    renamed.setdefault("dense", "flow" if one.get("taps") else None)
    renamed.setdefault("outcome", None)
    return renamed


def read(path: Path) -> list[dict]:
    """Read the records of a step."""
    records = [by_todays_names(one) for one in read_json_lines(path, "a rollout a line")]
    need_keys(records, path, ["step", "group", "response", "reward", "taps", "tokens"])
    if not records:
        raise ValueError(f"{path} is empty; expected the rollouts of a step: remove it")
    return records
