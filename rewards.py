"""Outcome rewards: what a response is worth. This is the file to edit for another reward.

A reward is a weighted sum of parts, `--reward binary format=0.1 overlong=0.5`:
    binary      1 for a right boxed answer, else 0
    official    the rules of the official code: 1 for a right answer, 0.5 for a wrong one in a box,
                0 without a box, with five or more, and for garbage
    vlm         1 for a right answer by the rules for vision-language models: in its tag, in a box,
                or bare (grading/options.py)
    format      1 for a response that ends by itself and has one to four boxes
    tags        1 for `<think>…</think> <answer>…</answer>`, as the official rules want it of
                vision-language models
    overlong    DAPO's soft penalty of length (eq. 13), from 0 to -1
    FILE.py     a Python file with `reward(problem, response) -> float`
An episode is correct where `binary`, `official` or `vlm` says so; with none of them, where the
first file's value is 1 or more.

To add a part, write a function of a Response and the kind of its verdict, and name it in PARTS.

Whether an answer is right is decided in grading/, in worker processes. Count its errors on labelled
pairs, columns gold (or a list of them), pred, expected and group:

    python rewards.py PAIRS.jsonl
"""

import importlib.util
import math
import re
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from grading import Gold, Pool, boxes, candidate, judge_response, tag_format, tagged

Kind = Literal["right", "wrong", "no answer", "cut", "timeout"]


class Verdict(NamedTuple):
    """What an episode is worth, and why."""

    reward: float
    correct: bool
    parts: dict[str, float]  # unweighted, by name
    extracted: str | None  # the last boxed answer; by the rules of `vlm` what is compared
    kind: Kind


@dataclass(frozen=True)
class RewardSettings:
    """How responses are graded."""

    # Tokens before max_tokens in which the part overlong falls to -1; by default a fifth
    overlong_buffer: int | None = None
    grade_truncated: bool = False  # Let a response that ran out of room score
    grader_deadline: float = 5.0  # Seconds for grading one answer


# ---- Parts
class Response(NamedTuple):
    """A response as the parts of a reward see it, with the kind of its verdict beside it."""

    problem: str
    text: str
    finished: bool  # ended by itself, or may score although it ran out of room
    n_tokens: int
    max_tokens: int  # the longest response
    overlong_buffer: int  # tokens before max_tokens where the penalty of length begins
    has_box: bool  # finished, with one to four boxes: more are a way of guessing (official rules)
    is_comparable: bool  # has a box, is no garbage where that matters, and the answer is known
    extracted: str | None  # as in Verdict


def is_right(response: Response, kind: Kind) -> float:
    return float(kind == "right")


def official_score(response: Response, kind: Kind) -> float:
    if kind == "right":
        return 1.0
    return 0.5 if response.is_comparable else 0.0


def has_format(response: Response, kind: Kind) -> float:
    return float(response.has_box)


def has_tags(response: Response, kind: Kind) -> float:
    return float(response.finished and tag_format(response.text))


def overlong_penalty(response: Response, kind: Kind) -> float:
    """Return DAPO's soft penalty (eq. 13): from 0 to -1 over the last tokens before max_tokens."""
    start = response.max_tokens - response.overlong_buffer
    share = (response.n_tokens - start) / response.overlong_buffer
    return -min(1.0, max(0.0, share))


PARTS = {
    "binary": is_right,
    "official": official_score,
    "vlm": is_right,
    "format": has_format,
    "tags": has_tags,
    "overlong": overlong_penalty,
}
VERIFYING_PARTS = {"binary", "official", "vlm"}  # these decide what is correct


class Part(NamedTuple):
    """A part of a reward, with its weight."""

    name: str
    weight: float
    score: Callable[[Response, Kind], float]
    is_users: bool = False  # from a Python file


def is_degenerate(response: str) -> bool:
    """Return whether a response is garbage by the official rules.

    It repeats a pattern five times in a row, or is mostly odd characters.
    """
    n_odd = 0
    for character in response:
        is_greek = "\u0370" <= character <= "\u03ff"
        is_symbol = "\u2000" <= character <= "\u2bff"
        n_odd += not (character.isascii() or is_greek or is_symbol)
    repeats = re.search(r"(.{5,200}?)\1{4}", response) is not None
    return repeats or n_odd > 0.3 * len(response)


# ---- Reading --reward
def read_parts(reward: Sequence[str]) -> list[Part]:
    """Read NAME or NAME=WEIGHT, where NAME is one of PARTS or a Python file.

    Raises:
        ValueError: Something is neither, is given twice, or does not go with another part.
    """
    parts = []
    for text in reward:
        part = read_part(text)
        if part.name in [other.name for other in parts]:
            raise ValueError(f"reward {text!r}: {part.name} is given twice")
        parts.append(part)
    if not parts:
        raise ValueError(f"no reward; expected {', '.join(PARTS)} or a Python file")
    names = {part.name for part in parts}
    if "vlm" in names and names & {"binary", "official"}:
        raise ValueError(
            f"reward {' '.join(reward)}: vlm reads answers by other rules than binary and "
            "official; choose one"
        )
    return parts


def read_part(text: str) -> Part:
    name, _, weight_text = text.partition("=")
    weight = read_weight(text, weight_text)
    if name in PARTS:
        return Part(name, weight, PARTS[name])
    return Part(Path(name).stem, weight, score_by(load_reward(name)), is_users=True)


def read_weight(part: str, text: str) -> float:
    """Read the weight of a part, 1 if it has none."""
    message = f"reward {part!r}: {text!r} is no weight; expected NAME=NUMBER"
    try:
        weight = float(text or 1)
    except ValueError as error:
        raise ValueError(message) from error
    if not math.isfinite(weight):
        raise ValueError(message)
    return weight


def load_reward(path: str) -> Callable[[str, str], float]:
    """Load `reward(problem, response)` from a user's Python file."""
    if not path.endswith(".py") or not Path(path).is_file():
        raise ValueError(
            f"reward {path!r}: neither {', '.join(PARTS)} nor a Python file that defines "
            "reward(problem, response)"
        )
    name = f"reward_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    function = getattr(module, "reward", None)
    if not callable(function):
        raise ValueError(f"{path} defines no function reward(problem, response) -> float")
    return function


def score_by(function: Callable[[str, str], float]) -> Callable[[Response, Kind], float]:
    """Make a part of a user's function; a response that ran out of room is no answer."""

    def score(response: Response, kind: Kind) -> float:
        if not response.finished:
            return 0.0
        return float(function(response.problem, response.text))

    return score


# ---- Grading
class Grader(AbstractContextManager):
    """Grade episodes: a context manager, or call close().

    Attributes:
        pool: The worker processes that compare answers; they start when an answer first needs them.
        counts: What went wrong so far: timeout, crashed, capped (see Pool).
    """

    def __init__(
        self,
        reward: Sequence[str],
        settings: RewardSettings = RewardSettings(),
        max_tokens: int = 0,
        n_workers: int | None = None,
    ):
        """Read the parts of the reward.

        Args:
            reward: Parts, NAME or NAME=WEIGHT.
            max_tokens: The longest response; only the part overlong needs it.
            n_workers: Number of grading processes, by default the number of cores, at most 8.

        Raises:
            ValueError: A part or a setting is not possible.
        """
        self.parts = read_parts(reward)
        self.names = {part.name for part in self.parts}
        self.settings = settings
        self.max_tokens = max_tokens
        self.overlong_buffer = settings.overlong_buffer
        if settings.overlong_buffer is None:
            self.overlong_buffer = max_tokens // 5
        if "overlong" in self.names:
            self.check_overlong()
        self.pool = Pool(n_workers, settings.grader_deadline)
        self.counts = self.pool.counts
        self.background = ThreadPoolExecutor(1)

    def check_overlong(self) -> None:
        if not self.max_tokens:
            raise ValueError("the reward part overlong needs max_tokens, the longest response")
        if not 0 < self.overlong_buffer <= self.max_tokens:
            raise ValueError(
                f"overlong_buffer={self.overlong_buffer} is outside "
                f"(0, max_tokens={self.max_tokens}]; choose a part of max_tokens"
            )

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        """Finish what was submitted, and end the worker processes."""
        self.background.shutdown()
        self.pool.close()

    def grade(
        self,
        problem: str,
        answer: Gold | None,
        response: str,
        finished: bool,
        n_tokens: int = 0,
    ) -> Verdict:
        """Grade one response.

        Args:
            problem: Text of the problem; only users' functions look at it.
            answer: The right answer, or a list of them, any of which will do; None if not known.
            response: Text of the response.
            finished: Whether it ended by itself.
            n_tokens: Its length; only the part overlong looks at it.
        """
        seen = self.examine(problem, response, finished, n_tokens, has_answer=bool(answer))
        kind = self.judge(answer, seen)
        scores = {part.name: part.score(seen, kind) for part in self.parts}
        reward = sum(part.weight * scores[part.name] for part in self.parts)
        if not self.names & VERIFYING_PARTS:
            kind = self.judge_by_function(scores, kind)
        return Verdict(reward, kind == "right", scores, seen.extracted, kind)

    def examine(
        self, problem: str, text: str, finished: bool, n_tokens: int, has_answer: bool
    ) -> Response:
        """Find out about a response what can be told without comparing answers."""
        finished = finished or self.settings.grade_truncated
        found_boxes = boxes(text)
        has_box = finished and 0 < len(found_boxes) < 5
        is_comparable = has_box and has_answer
        if is_comparable and "official" in self.names:
            is_comparable = not is_degenerate(text)
        if "vlm" in self.names:
            extracted = candidate(tagged(text) or text).strip() or None
        else:
            extracted = found_boxes[-1] if found_boxes else None
        return Response(
            problem=problem,
            text=text,
            finished=finished,
            n_tokens=n_tokens,
            max_tokens=self.max_tokens,
            overlong_buffer=self.overlong_buffer,
            has_box=has_box,
            is_comparable=is_comparable,
            extracted=extracted,
        )

    def judge(self, answer: Gold | None, response: Response) -> Kind:
        """Compare a response with the answer: its last box, or all of it by the rules of `vlm`."""
        if not response.finished:
            return "cut"
        if "vlm" in self.names:
            return self.judge_by_vlm_rules(answer, response)
        if not response.has_box:
            return "no answer"
        if not response.is_comparable:
            return "wrong"
        return self.pool.judge(answer, response.extracted)

    def judge_by_vlm_rules(self, answer: Gold | None, response: Response) -> Kind:
        kind = "wrong"
        if answer:
            kind = judge_response(response.text, answer, self.pool.judge)
        if kind == "wrong" and response.extracted is None:
            return "no answer"
        return kind

    def judge_by_function(self, scores: dict[str, float], kind: Kind) -> Kind:
        """Let the first of the user's functions decide what is right, if there is one."""
        for part in self.parts:
            if part.is_users and kind != "cut":
                return "right" if scores[part.name] >= 1 else "wrong"
        return kind

    def submit(self, problems: Sequence, episodes: Sequence) -> Future[list[Verdict]]:
        """Grade episodes in the background, in order.

        Problems have `text` and `answer`; each has as many consecutive episodes as the others.
        """
        n_each = len(episodes) // max(1, len(problems))
        problem_of_episode = [problem for problem in problems for _ in range(n_each)]
        return self.background.submit(
            self.pool.map, self.grade_episode, problem_of_episode, episodes
        )

    def grade_episode(self, problem, episode) -> Verdict:
        finished = episode.finish_reason == "stop"
        n_tokens = len(episode.response_ids)
        return self.grade(problem.text, problem.answer, episode.text, finished, n_tokens)


if __name__ == "__main__":
    import tyro

    from grading import pairs

    pairs.main(tyro.cli(pairs.Settings, config=(tyro.conf.PositionalRequiredArgs,)))
