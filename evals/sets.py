"""Sets of problems: where they come from, and records of a model's samples.

    problems = load_sets(["math500", "mine=problems.jsonl", "org/set:validation"], settings, model)
    records = sample(engine, "math500", problems["math500"], grader, sampling, seed=0)

To add a set of the Hugging Face hub, add an entry to HUB_SETS.
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import rollout
from grading import Pool
from infra import batching, vision
from infra.batching import keyed_seed
from infra.data import Problem, ProblemSettings, check_split, cut_split, load_problems
from infra.models import Model
from infra.parallel import on_first
from rewards import Grader, Verdict
from rollout import Episode, Request, Sampling


class Specification(NamedTuple):
    """What names a set on the command line."""

    name: str
    source: str  # a file, a folder or a hub id; empty for a key of HUB_SETS
    split: str | None = None


class HubSet(NamedTuple):
    """A set of problems on the hub."""

    source: str  # its hub id
    subset: str | None = None
    split: str = "test"
    problem_column: str = "problem"
    answer_column: str = "answer"


HUB_SETS = {
    "aime24": HubSet("HuggingFaceH4/aime_2024", split="train"),
    "aime25": HubSet("math-ai/aime25"),
    "amc": HubSet("AI-MO/aimo-validation-amc", split="train"),
    "math500": HubSet("HuggingFaceH4/MATH-500"),
    "minerva": HubSet("math-ai/minervamath", problem_column="question"),
    "olympiad_bench": HubSet(
        "math-ai/olympiadbench", problem_column="question", answer_column="final_answer"
    ),
    "gsm8k": HubSet("openai/gsm8k", subset="main", problem_column="question"),
}


# ---- Loading
def load_sets(
    specifications: Sequence[str], settings: ProblemSettings, model: Model
) -> dict[str, list[Problem]]:
    """Load sets of problems, by name.

    Args:
        specifications: For each set a key of HUB_SETS, NAME=SOURCE, or SOURCE alone: a file, a
            folder or a hub id; :SPLIT after it names the split.
        settings: How rows become problems; HUB_SETS knows the columns of its own sets, and their
            split if none is named. That of the other sets is then `test`.

    Raises:
        ValueError: two sets share a name, two problems of a set share an id, or a set cannot be
            loaded (see data.load_problems).
    """
    sets = {}
    for name, specification in name_sets(specifications).items():
        sets[name] = load_set(specification, settings, model)
    return sets


def name_sets(specifications: Sequence[str]) -> dict[str, str]:
    """Return each set's specification by the set's name; ValueError if two share a name."""
    named = {}
    for specification in specifications:
        name = parse_specification(specification).name
        check_name(name, specification)
        if name in named:
            raise ValueError(f"two sets are named {name!r}; name them apart with NAME=SOURCE")
        named[name] = specification
    return named


LONGEST_NAME = 100  # characters


def check_name(name: str, specification: str) -> None:
    """Raise ValueError for the name of a set that tables, metrics and files cannot take."""
    is_short = 0 < len(name) <= LONGEST_NAME
    if not (is_short and name.strip(".") and name.isprintable() and "/" not in name):
        raise ValueError(
            f"the set {specification[:80]!r} is called {name[:80]!r}; expected a name of 1 to "
            f"{LONGEST_NAME} printable characters, without / and not of dots alone: give "
            "NAME=SOURCE"
        )


def parse_specification(text: str) -> Specification:
    """Read NAME, NAME=SOURCE or SOURCE, perhaps with :SPLIT after it."""
    if os.path.exists(text):  # there may be a `=` or a `:` in the name of a file
        return Specification(Path(text).stem, text)
    name, _, source = text.partition("=")
    if name and source:
        return Specification(name, *cut_split(source))
    source, split = cut_split(name or source)
    if source in HUB_SETS:
        return Specification(source, "", split)
    return Specification(Path(source).stem, source, split)


def load_set(text: str, settings: ProblemSettings, model: Model) -> list[Problem]:
    """Load one set of problems; see load_sets."""
    name, source, split = parse_specification(text)
    usual_split = "test"
    if not source:
        hub_set = HUB_SETS[name]
        source = hub_set.source
        usual_split = hub_set.split
        settings = replace(
            settings,
            subset=hub_set.subset,
            problem_column=hub_set.problem_column,
            answer_column=hub_set.answer_column,
        )
    check_split(source, split)
    problems = load_problems(source, settings, model, split or usual_split)
    counts = Counter(problem.id for problem in problems)
    repeated = [i for i, count in counts.items() if count > 1]
    if repeated:
        raise ValueError(
            f"{source}: {len(repeated)} ids stand more than once, e.g. {repeated[0]!r}; "
            "make them unique or leave out the column id"
        )
    return problems


# ---- Sampling
def sample(
    engine,
    name: str,
    problems: Sequence[Problem],
    grader: Grader,
    sampling: Sampling,
    seed: int = 0,
) -> list[dict]:
    """Sample and grade problems of a set; all ranks together.

    Returns:
        A record for each sample, sampling.n in a row for each problem.
    """
    requests = []
    for problem in problems:
        problem_seed = keyed_seed("evaluation", seed, name, problem.id)
        requests.append(Request(problem.prompt_ids, problem_seed, problem.images))
    lengths = [len(request.prompt_ids) for request in requests]
    episodes = rollout.generate_on_all_ranks(engine, requests, sampling, lengths)
    verdicts = rollout.grade_on_all_ranks(grader, problems, episodes)
    records = []
    for i, (episode, verdict) in enumerate(zip(episodes, verdicts, strict=True)):
        row, number = divmod(i, sampling.n)
        records.append(
            {
                "set": name,
                "problem": problems[row].id,
                "sample": number,
                "seed": requests[row].seed + number,
                **describe_sample(problems[row], episode, verdict, engine.tokenizer),
            }
        )
    return number_answers(records, sampling.n, grader.pool)


def describe_sample(problem: Problem, episode: Episode, verdict: Verdict, tokenizer) -> dict:
    """Return what a record says of a problem, a response to it and the verdict on that."""
    prompt_ids = problem.prompt_ids
    if problem.images:
        pad = tokenizer.convert_tokens_to_ids(vision.PAD)
        prompt_ids = vision.collapse(prompt_ids, pad)  # one placeholder for each image
    record = {
        "question": problem.text,
        "prompt": tokenizer.decode(prompt_ids),
        "answer": problem.answer,
        "response": episode.text,
        "extracted": verdict.extracted,
        "reward": verdict.reward,
        "correct": verdict.correct,
        "verdict": verdict.kind,
        "finish_reason": episode.finish_reason,
        "tokens": sum(batching.sampled_flags(episode)),
    }
    if verdict.text:
        record["text"] = verdict.text  # of a user's reward
    return record


def number_answers(records: Sequence[dict], n: int, pool: Pool) -> list[dict]:
    """Add to each record `cluster`, a number that equal answers to a problem share.

    Args:
        records: n in a row for each problem.
        pool: What compares answers, on the first rank alone.
    """
    groups = [records[start : start + n] for start in range(0, len(records), n)]
    numbers = on_first(lambda: list(pool.map(lambda group: cluster(group, pool), groups)))
    numbered = []
    for group, numbers_of_group in zip(groups, numbers, strict=True):
        for record, number in zip(group, numbers_of_group, strict=True):
            numbered.append({**record, "cluster": number})
    return numbered


def cluster(records: Sequence[dict], pool: Pool) -> list[int | None]:
    """Number the answers of one problem's samples; equal answers share a number.

    Returns:
        A number for each record, None where it has no answer that could be graded.
    """
    numbers: list[int | None] = []
    representatives: list[str] = []  # the first answer of each number
    for record in records:
        answer = record["extracted"]
        if answer is None or record["verdict"] not in ("right", "wrong", "timeout"):
            numbers.append(None)
            continue
        # An answer that took the grader too long would do so again: only its text is compared.
        by_text_alone = record["verdict"] == "timeout"
        number = find_equal(answer, representatives, pool, by_text_alone)
        if number is None:
            number = len(representatives)
            representatives.append(answer)
        numbers.append(number)
    return numbers


def find_equal(answer: str, others: Sequence[str], pool: Pool, by_text_alone: bool) -> int | None:
    """Return the index of the first of the others that equals an answer, or None."""
    for i, other in enumerate(others):
        if answer == other:
            return i
        if not by_text_alone and pool.equal(other, answer):
            return i
    return None
