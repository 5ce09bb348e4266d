"""Rollouts that other trainers have written, as the records of infra/record.py.

    trainer    file                                               what makes the trainer write it
    TRL        completions/completions_00010.parquet              log_completions=True
    verl       10.jsonl                                           trainer.rollout_data_dir=FOLDER
    prime-rl   rollouts/step_10/train/effective/traces.jsonl      its file monitor, on by default

A row of TRL has `step`, `prompt` and `completion` (texts or lists of messages), a column for each
reward function, and `advantage`. A row of verl has `input`, `output`, `gts` (the right answer),
`score`, `step`, and what the reward function adds, such as `acc` and `pred`. A line of prime-rl is
an episode of verifiers: its traces have `rewards`, and nodes with a message each; a sampled node has
log-probs and advantages of its tokens.

prime-rl alone gives values of tokens, and their ids, whose texts are known to the tokenizer. For the
others, and without a tokenizer, words stand for tokens.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real

import pyarrow
import pyarrow.parquet

from infra.errors import in_short
from infra.files import need_file, read_json_lines
from infra.record import mean
from pages.describe import shorten, token_texts

KIND = "rollouts of TRL (Parquet), verl or prime-rl (JSONL)"
VERDICTS = {True: "right", False: "wrong"}
Number = float | None
RIGHT = 0.5  # a reward above it counts as a right answer, where the trainer does not say


@dataclass
class Rollout:
    """A response with what its trainer says of it."""

    step: int
    group: str  # what the responses to one problem have in common
    prompt: str
    response: str
    parts: dict[str, float]  # of the reward, which is their sum
    answer: str = "not recorded"
    extracted: str = ""
    correct: bool | None = None
    advantage: Number = None  # of the response, where tokens have none of their own
    token_ids: list[int] = field(default_factory=list)
    is_sampled: list[bool] = field(default_factory=list)  # by the policy, each token
    logp: list[Number] = field(default_factory=list)
    advantages: list[Number] = field(default_factory=list)

    @property
    def reward(self) -> float:
        return sum(self.parts.values())


# ---- A reader for each trainer
def read_trl(row: dict) -> Iterator[Rollout]:
    """Yield the rollout of a row: numbers between the completion and the advantage are rewards."""
    columns = list(row)
    parts = {}
    for name in columns[columns.index("completion") + 1 :]:
        value = row[name]
        is_number = isinstance(value, Real) and value == value  # NaN: it does not apply
        if is_number and name != "advantage":
            parts[name] = value
    prompt = text_of(row["prompt"])
    response = text_of(row["completion"])
    yield Rollout(row["step"], prompt, prompt, response, parts, advantage=row["advantage"])


def read_verl(row: dict) -> Iterator[Rollout]:
    """Yield the rollout of a row."""
    rollout = Rollout(
        row["step"], row["input"], row["input"], row["output"], {"score": row["score"]}
    )
    if row.get("gts") is not None:
        rollout.answer = str(row["gts"])
    if row.get("pred") is not None:
        rollout.extracted = str(row["pred"])
    if row.get("acc") is not None:
        rollout.correct = bool(row["acc"])
    yield rollout


def read_prime_rl(episode: dict) -> Iterator[Rollout]:
    """Yield the rollout of each trace of an episode, its last branch."""
    work = episode.get("run", {}).get("work", {})
    for trace in episode["traces"]:
        nodes = last_branch(trace["nodes"])
        sampled = [bool(node.get("sampled")) for node in nodes]
        if not any(sampled):
            continue
        first = sampled.index(True)
        prompt = text_of([node["message"] for node in nodes[:first]])
        response = text_of([node["message"] for node in nodes[first:]])
        group = episode.get("group", {}).get("id", prompt)
        parts = {}
        for name, reward in trace.get("rewards", {}).items():
            if reward is not None:
                parts[name] = reward["score"] * reward.get("weight", 1.0)
        rollout = Rollout(work.get("step", 1), group, prompt, response, parts)
        answer = episode.get("task", {}).get("data", {}).get("answer")
        if answer is not None:
            rollout.answer = str(answer)
        for node in nodes[first:]:
            add_tokens(rollout, node)
        yield rollout


def last_branch(nodes: Sequence[dict]) -> list[dict]:
    """Return the nodes from the root to the last one: each names its parent, which stands before it."""
    path: list[dict] = []
    place = len(nodes) - 1
    while nodes and place is not None:
        path.append(nodes[place])
        parent = nodes[place].get("parent")
        if parent is not None and not 0 <= parent < place:
            raise ValueError(f"node {place} has the parent {parent}, which is none before it")
        place = parent
    return path[::-1]


def add_tokens(rollout: Rollout, node: dict) -> None:
    """Add a node's tokens to a rollout; numbers stand for the tokens of its mask alone."""
    logp = iter(node.get("logprobs") or ())
    advantages = iter(node.get("advantages") or ())
    for token, is_sampled in zip(node.get("token_ids", ()), node.get("mask", ()), strict=True):
        if not is_sampled and not rollout.token_ids:
            continue  # what the template puts before the response
        values = (None, None)
        if is_sampled:
            values = (next(logp, None), next(advantages, None))
        rollout.token_ids.append(token)
        rollout.is_sampled.append(is_sampled)
        rollout.logp.append(values[0])
        rollout.advantages.append(values[1])


def text_of(messages: str | Sequence[dict]) -> str:
    """Return the text of messages, or the text that stands in their place."""
    if isinstance(messages, str):
        return messages
    texts = []
    for message in messages:
        content = message.get("content") or ""
        if not isinstance(content, str):
            content = "".join(part.get("text") or "" for part in content)
        texts.append(content)
    return "\n".join(texts)


READERS = {
    ("step", "prompt", "completion", "advantage"): read_trl,
    ("step", "input", "output", "score"): read_verl,
    ("traces",): read_prime_rl,
}


# ---- From files to records
def read_files(paths: Sequence[str], tokenizer=None) -> dict[int, list[dict]]:
    """Return the records of files by step; ValueError for what none of the trainers writes.

    tokenizer: of the policy, for the texts of tokens of which the ids are known
    """
    if not paths:
        raise ValueError(f"no file; expected {KIND}")
    rollouts = [rollout for path in paths for rollout in read_file(path)]
    if not rollouts:
        raise ValueError(f"{', '.join(paths)}: no response; expected {KIND}")
    groups: dict[tuple[int, str], list[Rollout]] = {}
    for rollout in sorted(rollouts, key=lambda rollout: rollout.step):
        groups.setdefault((rollout.step, rollout.group), []).append(rollout)
    steps: dict[int, list[dict]] = {}
    for (step, _), members in groups.items():
        records = steps.setdefault(step, [])
        group = records[-1]["group"] + 1 if records else 0
        for sample, rollout in enumerate(members):
            numbers = {"step": step, "group": group, "problem": str(group), "sample": sample}
            records.append(numbers | as_record(rollout, tokenizer))
    return steps


def read_file(path: str) -> Iterator[Rollout]:
    """Yield the rollouts of a file, by the reader whose columns it has."""
    if need_file(path, KIND).suffix == ".parquet":
        rows = read_parquet(path)
    else:
        rows = read_json_lines(path, KIND)
    for number, row in enumerate(rows, 1):
        readers = [reader for columns, reader in READERS.items() if row.keys() >= set(columns)]
        if not readers:
            raise ValueError(f"{path}, row {number} has {', '.join(row)}; expected {KIND}")
        try:
            for rollout in readers[0](row):
                check(rollout)
                yield rollout
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, row {number}: {error!r}; expected {KIND}") from error


def read_parquet(path: str) -> list[dict]:
    """Return the rows of a Parquet file; ValueError if it is none."""
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path} is not Parquet ({in_short(error)}); expected {KIND}") from error


def check(rollout: Rollout) -> None:
    """Raise TypeError for a rollout whose parts are of another kind than they should be."""
    if not isinstance(rollout.prompt, str) or not isinstance(rollout.response, str):
        raise TypeError("expected texts as prompt and response")
    is_step = isinstance(rollout.step, int) and 0 <= rollout.step <= 10**9
    if not is_step or not isinstance(rollout.reward, Real) or not math.isfinite(rollout.reward):
        raise TypeError("expected a whole number as step and a finite number as reward")
    numbers = [rollout.advantage, *rollout.logp, *rollout.advantages]
    if not all(number is None or isinstance(number, Real) for number in numbers):
        raise TypeError("expected numbers as advantages and log-probs")
    if not all(isinstance(token, int) and 0 <= token <= 10**9 for token in rollout.token_ids):
        raise TypeError("expected whole numbers as ids of tokens")


def with_words(rollout: Rollout, n: int) -> Rollout:
    """Return a rollout with n words in the place of tokens: all have the advantage of the response."""
    advantage = rollout.advantage
    if rollout.advantages:
        advantage = mean(rollout.advantages)
    nothing = [None] * n
    return replace(
        rollout,
        token_ids=nothing,
        is_sampled=[True] * n,
        logp=nothing,
        advantages=[advantage] * n,
    )


def as_record(rollout: Rollout, tokenizer) -> dict:
    """Return the record of a rollout: what the trainer does not say is null."""
    if tokenizer and rollout.token_ids:
        tokens = token_texts(tokenizer, rollout.token_ids)
    else:
        tokens = re.findall(r"\s*\S+|\s+$", rollout.response)
        rollout = with_words(rollout, len(tokens))
    correct = rollout.correct
    if correct is None:
        correct = rollout.reward > RIGHT
    nothing = [None] * len(tokens)
    no_reward = [0.0 if is_sampled else None for is_sampled in rollout.is_sampled]
    return {
        "question": rollout.prompt,
        "answer": rollout.answer,
        "prompt": rollout.prompt,
        "images": [],
        "response": rollout.response,
        "finish_reason": None,
        "reward": rollout.reward,
        "parts": rollout.parts,
        "correct": correct,
        "verdict": VERDICTS[correct],
        "extracted": rollout.extracted,
        "text": "",
        "outcome": None,
        "dense": None,
        "taps": [],
        "token_ids": rollout.token_ids,
        "tokens": tokens,
        "logp": shorten(rollout.logp),
        "entropy": nothing,
        "dense_reward": no_reward,
        "advantage": shorten(rollout.advantages),
        "ratio": nothing,
        "dense_score": [],
    }
