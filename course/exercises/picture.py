"""Responses as text with signs beneath, and the responses of the recorded run."""

from collections.abc import Sequence
from pathlib import Path

from infra import record

RUN = Path(__file__).parent / "recorded"  # a part of a run of train_rl.py, see exercise 10


def stored(step: int) -> list[dict]:
    """Return the episodes of a step of the recorded run, as infra/record.py describes them."""
    return record.read(RUN / record.FOLDER / f"step-{step}.jsonl")


def below(tokens: Sequence[str], signs: Sequence[str]) -> str:
    """Return a response, and beneath each token its sign, as two lines; a token is a character.

    The end of the response, which has no character, is shown as ¶.
    """
    characters = [token if len(token) == 1 else "¶" for token in tokens]
    return f"  {''.join(characters)}\n  {''.join(signs)}".rstrip()


def two_responses() -> list[dict]:
    """Return the longest right response of the first stored step, and a wrong one to its problem."""
    episodes = stored(1)
    right = max((one for one in episodes if one["correct"]), key=lambda one: len(one["tokens"]))
    wrong = next(
        one for one in episodes if one["question"] == right["question"] and not one["correct"]
    )
    return [right, wrong]
