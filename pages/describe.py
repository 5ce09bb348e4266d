"""Episodes as records: what a step computed of each, and the text of each of its tokens.

infra/record.py says what a record has, and reads and counts them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from infra import record, vision
from infra.parallel import is_first
from pages.falls import N_BEFORE, is_fall, last_values

BYTES_PER_TOKEN = 100  # of a file, about: ten numbers and a text
BROKEN = "\ufffd"  # what a decoder puts for bytes that are no character
BYTES_OF_A_CHARACTER = 4  # at most, in UTF-8


class DensePart(NamedTuple):
    """What a dense reward says of the tokens of a step."""

    name: str | None
    layers: Sequence[int]  # that it taps; they may coincide
    scores: Sequence[Tensor]  # (B, T) for each of them, or one of no tap; NaN where there is none


@dataclass
class Recording:
    """Which steps of a run are written, and how much of each."""

    every: int  # steps between those that are written in any case; 0: none is
    total_steps: int
    sampling: Any  # settings with the prompts of a step, group_size and max_tokens
    folder: Path  # of the run
    previous: Callable[[int], list[dict]] | None = (
        None  # of the step before, until it is written whole
    )

    def is_regular(self, step: int) -> bool:
        """Return whether a step is written whatever its reward: each so many steps, and the last."""
        return step % self.every == 0 or step + 1 == self.total_steps

    def due(
        self, step: int, reward: Tensor, describe: Callable[[int], list[dict]]
    ) -> Iterator[tuple[int, list[dict]]]:
        """Yield the steps that the first rank writes after a step, counted from 1, and their records.

        Where the mean reward fell these are the step and the one before it, whole, to be compared. The
        tensors of the step before are kept for that: (B, T) each, none of the size of the model. A run
        that goes on has none of them in its first step.

        reward: (B,) of the step's episodes. Those of the steps before are read from metrics.jsonl,
            which a run that goes on still has.
        describe: returns the records of the step's first groups, as many as are asked for
        """
        if not self.every or not is_first():
            return
        before = last_values(self.folder / "metrics.jsonl", "reward", N_BEFORE)
        if is_fall(reward.mean().item(), before):
            if self.previous:
                yield step, self.previous(self.sampling.prompts)
            yield step + 1, describe(self.sampling.prompts)
            self.previous = None
            return
        if self.is_regular(step):
            yield step + 1, describe(self.regular_groups())
        self.previous = describe

    def regular_groups(self) -> int:
        """Return how many groups of a step are written whose reward has not fallen."""
        return min(record.N_GROUPS, self.sampling.prompts)

    def describe_size(self) -> str:
        """Return a line on how large the rollouts of the run can become."""
        n_files = sum(self.is_regular(step) for step in range(self.total_steps))
        n_episodes = self.regular_groups() * self.sampling.group_size
        largest = self.size_of(n_episodes)
        whole = self.size_of(self.sampling.prompts * self.sampling.group_size)
        return (
            f"rollouts of {n_files} steps go to {record.FOLDER}/, {n_episodes} episodes each: at "
            f"most about {largest:.1f} MB a step, {n_files * largest:.0f} MB in all, and "
            f"{whole:.1f} MB for each step at which the reward falls and the one before"
        )

    def size_of(self, n_episodes: int) -> float:
        """Return how many MB episodes take at most, about."""
        return n_episodes * self.sampling.max_tokens * BYTES_PER_TOKEN / 1e6


def make_records(
    episodes: Sequence,
    group_size: int,
    per_token: dict[str, Tensor],
    dense_part: DensePart | None,
    outcome: Tensor,
    tokenizer,
) -> list[dict]:
    """Return the records of a step's first episodes, group_size in a row for a problem.

    episodes: graded, as many as there are to be records
    per_token: (B, T) each, of all episodes of the step, NaN where there is no number
    dense_part: what the dense reward says of each token, None if there is no such reward
    outcome: (B,) the advantage of each episode of the step by the outcome alone
    """
    numbers = {name: values[: len(episodes)].tolist() for name, values in per_token.items()}
    dense_part = dense_part or DensePart(None, (), ())
    scores = [values[: len(episodes)].tolist() for values in dense_part.scores]
    outcomes = shorten(outcome[: len(episodes)].tolist())
    records = []
    for i, episode in enumerate(episodes):
        length = len(episode.response_ids)
        verdict = episode.verdict
        records.append(
            {
                "group": i // group_size,
                "sample": i % group_size,
                **describe_problem(episode, tokenizer),
                "response": episode.text,
                "finish_reason": episode.finish_reason,
                "reward": verdict.reward,
                "parts": verdict.parts,
                "correct": verdict.correct,
                "verdict": verdict.kind,
                "extracted": verdict.extracted,
                "text": verdict.text,
                "outcome": outcomes[i],
                "dense": dense_part.name,
                "taps": list(dense_part.layers),
                "token_ids": episode.response_ids,
                "tokens": token_texts(tokenizer, episode.response_ids),
                **{name: shorten(rows[i][:length]) for name, rows in numbers.items()},
                "dense_score": [shorten(rows[i][:length]) for rows in scores],
            }
        )
    return records


def describe_problem(episode, tokenizer) -> dict:
    """Return the part of a record that tells the problem."""
    problem = episode.problem
    images = []
    for number, image in enumerate(episode.images):
        is_file = isinstance(image.source, str)
        images.append(image.source if is_file else f"image {number} of problem {problem.id}")
    prompt_ids = episode.prompt_ids
    if episode.images:
        prompt_ids = vision.collapse(prompt_ids, tokenizer.convert_tokens_to_ids(vision.PAD))
    return {
        "problem": problem.id,
        "question": problem.text,
        "answer": problem.answer,
        "solution": problem.solution,
        "prompt": tokenizer.decode(prompt_ids),
        "images": images,
    }


def shorten(numbers: Sequence[float | None]) -> list[float | None]:
    """Return numbers with six significant digits; None for those that are not there or not finite."""
    short: list[float | None] = [None] * len(numbers)
    for i, x in enumerate(numbers):
        if x is not None and math.isfinite(x):
            short[i] = float(f"{x:.6g}")
    return short


def token_texts(tokenizer, ids: Sequence[int]) -> list[str]:
    """Return the text of each token, special ones included; together they are the response.

    A character may consist of several tokens: the last one of them has the character, and the
    others have an empty text. Bytes that are no character are U+FFFD, likewise.
    """
    single = {token: text_of_token(tokenizer, token) for token in set(ids)}
    texts = [single[token] for token in ids]
    first = 0  # token after the last whole character
    part = 0  # token in which the last broken character begins
    for end, text in enumerate(texts):
        if BROKEN not in text:
            first = part = end + 1
            continue
        start = find_character(tokenizer, ids, first, end)
        if start is not None:
            first = part = end + 1
        elif end > part and decode(tokenizer, ids[part : end + 1]) != texts[end - 1] + text:
            start = part  # the token goes on with the broken character
        else:
            part = end
        if start is not None:
            texts[start:end] = [""] * (end - start)
            texts[end] = decode(tokenizer, ids[start : end + 1])
    return texts


def find_character(tokenizer, ids: Sequence[int], first: int, end: int) -> int | None:
    """Return where the character begins that token `end` completes, `first` or later; or None."""
    for start in range(max(first, end + 1 - BYTES_OF_A_CHARACTER), end):
        if BROKEN not in decode(tokenizer, ids[start : end + 1]):
            return start
    return None


def decode(tokenizer, ids: Sequence[int]) -> str:
    """Return the text of tokens as it is, without what some tokenizers tidy up in it."""
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def text_of_token(tokenizer, token: int) -> str:
    """Return the text of one token; a decoder of a lone token may drop the space before a word."""
    text = decode(tokenizer, [token])
    piece = tokenizer.convert_ids_to_tokens(token) or ""
    if piece.startswith("▁") and not text.startswith(" "):
        return f" {text}"
    return text
