"""Outcome rewards: what a response is worth. This is the file to edit for another reward.

A reward is a weighted sum of parts, `--reward binary format=0.1 overlong=0.5`:
    binary      1 for a right answer in the last box, else 0
    official    the rules of the official code: 1 for a right answer, 0.5 for a wrong one in a box,
                0 without a box, with five or more, and for garbage
    vlm         1 for a right answer by the rules for vision-language models: in its tag, in a box,
                or bare (grading/options.py)
    format      1 for a response that ends by itself and has a box
    tags        1 for `<think>…</think> <answer>…</answer>`, as the official rules want it of
                vision-language models
    overlong    DAPO's soft penalty of length (eq. 13), from 0 to -1
    FILE.py     a Python file, whatever its name, with `reward(problem, response) -> float` or
                `reward(problem, response, answer) -> float`, where answer is the right one, a list
                of right ones, or None; a fourth argument, `solution`, is the data's worked solution
                or None. It may return {"reward": float, "text": str} instead: the text is for logs,
                and may be left out
An episode is correct where `binary`, `vlm` or, without these, `official` says so; with none of
them, where the first file's value is 1 or more.

To add a part, write a function of a Response and the kind of its verdict, and name it in PARTS.

Whether an answer is right is decided in grading/, in worker processes. Count its errors on labelled
pairs, columns gold (or a list of them), pred, expected and group:

    python rewards.py PAIRS.jsonl
"""

# first: torch reads what this sets when it is imported
import infra.waiting  # noqa: F401

# isort: split
import inspect
import runpy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, SupportsFloat

from grading import (
    MAX_OFFICIAL_BOXES,
    Gold,
    Pool,
    boxes,
    extract,
    judge_response,
    obeys_official_rules,
    tag_format,
)
from infra.files import blamed_on, import_file
from infra.watch import PATIENCE, Watch

Kind = Literal["right", "wrong", "no answer", "cut", "timeout"]


class Verdict(NamedTuple):
    """What an episode is worth, and why."""

    reward: float
    correct: bool
    parts: dict[str, float]  # unweighted, by name
    extracted: str | None  # the last boxed answer; by the rules of `vlm` what is compared
    kind: Kind
    text: str = ""  # what users' functions say of the response


@dataclass(frozen=True)
class RewardSettings:
    """How responses are graded."""

    grade_truncated: bool = False  # Let a response that ran out of room score


OVERLONG_SHARE = 0.2  # of max_tokens: the last tokens, in which the part overlong falls to -1


# ---- Parts
class Response(NamedTuple):
    """A response as the parts of a reward see it, with the kind of its verdict beside it."""

    problem: str
    problem_id: str  # in its data set, empty if not known
    solution: str | None  # a worked one, if the data has it
    answer: Gold | None  # the right one, or a list of them
    text: str
    finished: bool  # ended by itself, or may score although it ran out of room
    n_tokens: int
    max_tokens: int  # the longest response
    n_boxes: int
    obeys_official_rules: bool  # see obeys_official_rules; only the part official looks at it
    extracted: str | None  # as in Verdict

    @property
    def place(self) -> str:
        """What a message calls the problem."""
        name = f"problem {self.problem_id!r}, " if self.problem_id else "problem "
        return name + repr(self.problem[:60])

    @property
    def has_box(self) -> bool:
        return self.finished and self.n_boxes > 0


def is_right(response: Response, kind: Kind) -> float:
    return float(kind == "right")


def official_score(response: Response, kind: Kind) -> float:
    if not response.obeys_official_rules:
        return 0.0
    return 1.0 if kind == "right" else 0.5


def official_kind(response: Response, kind: Kind) -> Kind:
    """Return the kind of a verdict by the official rules, which refuse some boxes unread."""
    if not response.has_box or response.obeys_official_rules:
        return kind
    return "no answer" if response.n_boxes > MAX_OFFICIAL_BOXES else "wrong"


def has_format(response: Response, kind: Kind) -> float:
    return float(response.has_box)


def has_tags(response: Response, kind: Kind) -> float:
    return float(response.finished and tag_format(response.text))


def overlong_penalty(response: Response, kind: Kind) -> float:
    """Return DAPO's soft penalty (eq. 13): from 0 to -1 over the last tokens before max_tokens."""
    buffer = max(1, int(OVERLONG_SHARE * response.max_tokens))
    share = (response.n_tokens - (response.max_tokens - buffer)) / buffer
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


class Score(NamedTuple):
    """What a part says of a response."""

    value: float
    text: str = ""  # for logs


class Part(NamedTuple):
    """A part of a reward, with its weight."""

    name: str
    weight: float
    score: Callable[[Response, Kind], float | Score]
    is_users: bool = False  # from a Python file; its score is a Score


# ---- Reading --reward
def read_parts(reward: Sequence[str], watch: Watch) -> list[Part]:
    """Read NAME or NAME=WEIGHT, where NAME is one of PARTS, or a Python file, which ends in .py.

    Args:
        watch: Names a file that does not come to an end while it is loaded or called.

    Raises:
        ValueError: Something is neither, is given twice, or does not go with another part.
    """
    parts = []
    for text in reward:
        part = read_part(text, watch)
        if part.name in [other.name for other in parts]:
            raise ValueError(f"reward {text!r}: {part.name} is given twice")
        parts.append(part)
    if not parts:
        raise ValueError(f"no reward; expected {', '.join(PARTS)} or a Python file")
    names = built_in_names(parts)
    if "vlm" in names and names & {"binary", "official"}:
        raise ValueError(
            f"reward {' '.join(reward)}: vlm reads answers by other rules than binary and "
            "official; choose one"
        )
    return parts


def built_in_names(parts: Sequence[Part]) -> set[str]:
    """Return the names of those parts that are not of a user's file."""
    return {part.name for part in parts if not part.is_users}


def read_part(text: str, watch: Watch) -> Part:
    source, equals, weight_text = text.rpartition("=")
    weight = 1.0
    if text.endswith(".py") or not equals:  # there may be a `=` in the name of a file
        source = text
    else:
        weight = read_weight(text, weight_text)
    if source in PARTS:
        return Part(source, weight, PARTS[source])
    file = Path(source)
    name = file.name if file.stem in PARTS else file.stem  # binary.py is not the part binary
    return Part(name, weight, load_reward(source, watch), is_users=True)


def read_weight(part: str, text: str) -> float:
    """Read the weight of a part."""
    message = f"reward {part!r}: {text!r} is no weight; expected NAME=NUMBER, within ±{LARGEST:g}"
    try:
        weight = float(text)
    except ValueError as error:
        raise ValueError(message) from error
    if not abs(weight) <= LARGEST:
        raise ValueError(message)
    return weight


# ---- Users' functions
LARGEST = 1e9  # of a value or a weight: single precision holds the squares of their products
# Of a user's function; the last two may be left out
ARGUMENTS = ("problem", "response", "answer", "solution")
EXPECTED_SIGNATURE = "reward(problem, response), perhaps with answer, or answer and solution"
EXPECTED_RESULT = (
    f'a finite number within ±{LARGEST:g}, or {{"reward": such a number, "text": a text for logs}}'
)
MAX_SHOWN = 500  # characters of a result


def load_reward(path: str, watch: Watch) -> Callable[[Response, Kind], Score]:
    """Make a part of the function `reward` of a user's Python file.

    Raises:
        ValueError: There is no such file, it defines no such function, or it fails, with its line.
    """
    if not path.endswith(".py") or not Path(path).is_file():
        raise ValueError(
            f"reward {path!r}: neither {', '.join(PARTS)} nor a Python file that defines "
            f"{EXPECTED_SIGNATURE}"
        )
    with watch.over(f"{path}, at its import"):
        function = getattr(import_file(path), "reward", None)
    if not inspect.isfunction(function):
        raise ValueError(f"{path} defines no function reward; expected {EXPECTED_SIGNATURE}")
    n_arguments = count_arguments(path, function)
    return score_by(path, lambda *arguments: function(*arguments[:n_arguments]), watch)


def count_arguments(path: str, function: Callable) -> int:
    """Return how many arguments a user's function takes, 2 to 4; ValueError for other signatures.

    Their names are free, but for those of ARGUMENTS, which must stand in that order, and the fourth.
    """
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    is_expected = len(parameters) in (2, 3) or list(signature.parameters)[3:] == ["solution"]
    for parameter, argument in zip(parameters, ARGUMENTS, strict=False):
        is_plain = parameter.kind == inspect.Parameter.POSITIONAL_OR_KEYWORD
        has_default = parameter.default is not inspect.Parameter.empty
        is_misplaced = parameter.name in ARGUMENTS and parameter.name != argument
        if not is_plain or has_default or is_misplaced:
            is_expected = False
    if not is_expected:
        raise ValueError(f"{path} defines reward{signature}; expected {EXPECTED_SIGNATURE}")
    return len(parameters)


def score_by(path: str, function: Callable, watch: Watch) -> Callable[[Response, Kind], Score]:
    """Make a part of a user's function; a response that ran out of room is no answer.

    Args:
        function: Of a problem, a response, the right answer and a worked solution.
    """

    def score(response: Response, kind: Kind) -> Score:
        if not response.finished:
            return Score(0.0)
        with blamed_on(path, f"on {response.place}"), watch.over(f"{path}, on {response.place}"):
            result = function(response.problem, response.text, response.answer, response.solution)
            value, text = read_result(result)
            shown = repr(result) if value is None else ""
        if value is None:
            raise ValueError(
                f"{path}: reward returned {shown[:MAX_SHOWN]}; expected {EXPECTED_RESULT} "
                f"(on {response.place})"
            )
        return Score(value, text)

    return score


def read_result(result: object) -> tuple[float | None, str]:
    """Return the value and the text that a user's function returned; no value if it is none."""
    value = result
    text = ""
    if isinstance(result, dict):
        if "reward" not in result or not set(result) <= {"reward", "text"}:
            return None, ""
        value = result["reward"]
        text = result.get("text", "")
    if not isinstance(value, SupportsFloat) or not isinstance(text, str):
        return None, ""
    try:
        value = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # e.g. of an array
        return None, ""
    return (value, text) if abs(value) <= LARGEST else (None, "")


# ---- Grading
def has_gold(answer: Gold | None) -> bool:
    """Return whether there is anything that a response could meet."""
    golds = [answer] if isinstance(answer, str) else answer or []
    return any(gold.strip() for gold in golds)


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
        patience: float = PATIENCE,
    ):
        """Read the parts of the reward.

        Args:
            reward: Parts, NAME or NAME=WEIGHT.
            max_tokens: The longest response; only the part overlong needs it.
            n_workers: Number of grading processes; see Pool.
            patience: Seconds until a user's file that does not come to an end is named.

        Raises:
            ValueError: A part or a setting is not possible.
        """
        self.watch = Watch(patience)
        self.parts = read_parts(reward, self.watch)
        self.names = built_in_names(self.parts)
        self.settings = settings
        self.max_tokens = max_tokens
        if "overlong" in self.names and not max_tokens:
            raise ValueError("the reward part overlong needs max_tokens, the longest response")
        self.pool = Pool(n_workers)
        self.counts = self.pool.counts

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        """End the worker processes."""
        self.pool.close()
        self.watch.close()

    def grade(
        self,
        problem: str,
        answer: Gold | None,
        response: str,
        finished: bool,
        n_tokens: int = 0,
        row: object = None,
    ) -> Verdict:
        """Grade one response.

        Args:
            problem: Text of the problem; only users' functions look at it.
            answer: The right answer, or a list of them, any of which will do; None if not known.
            response: Text of the response.
            finished: Whether it ended by itself.
            n_tokens: Its length; only the part overlong looks at it.
            row: What has more of the problem: perhaps an `id`, which messages call it by, and a
                worked `solution`, which users' functions may take.
        """
        seen = self.examine(problem, row, answer, response, finished, n_tokens)
        kind = self.judge(seen)
        scores = {}
        texts = []
        for part in self.parts:
            score = part.score(seen, kind)
            if part.is_users:
                texts.append(score.text)
                score = score.value
            scores[part.name] = score
        reward = sum(part.weight * scores[part.name] for part in self.parts)
        kind = self.kind_by_parts(seen, scores, kind)
        text = "\n".join(filter(None, texts))
        return Verdict(reward, kind == "right", scores, seen.extracted, kind, text)

    def examine(
        self,
        problem: str,
        row: object,
        answer: Gold | None,
        text: str,
        finished: bool,
        n_tokens: int,
    ) -> Response:
        """Find out about a response what can be told without comparing answers."""
        finished = finished or self.settings.grade_truncated
        box_contents = boxes(text)
        obeys_rules = False
        if "official" in self.names and finished and has_gold(answer):
            obeys_rules = obeys_official_rules(text, len(box_contents))
        if "vlm" in self.names:
            extracted = extract(text)
        else:
            extracted = box_contents[-1] if box_contents else None
        return Response(
            problem=problem,
            problem_id=getattr(row, "id", ""),
            solution=getattr(row, "solution", None),
            answer=answer,
            text=text,
            finished=finished,
            n_tokens=n_tokens,
            max_tokens=self.max_tokens,
            n_boxes=len(box_contents),
            obeys_official_rules=obeys_rules,
            extracted=extracted,
        )

    def judge(self, response: Response) -> Kind:
        """Compare a response with the answer: its last box, or all of it by the rules of `vlm`."""
        if not response.finished:
            return "cut"
        if "vlm" in self.names:
            return self.judge_by_vlm_rules(response)
        if not response.has_box:
            return "no answer"
        if not has_gold(response.answer):
            return "wrong"
        return self.pool.judge(response.answer, response.extracted)

    def judge_by_vlm_rules(self, response: Response) -> Kind:
        if response.extracted is None:
            return "no answer"
        if not has_gold(response.answer):
            return "wrong"
        return judge_response(response.text, response.answer, self.pool.judge)

    def kind_by_parts(self, response: Response, scores: dict[str, float], kind: Kind) -> Kind:
        """Let the part that decides what is correct decide, or the first of the user's functions.

        Args:
            scores: What the parts say, by name.
            kind: The kind that the comparison gives.
        """
        if self.names & VERIFYING_PARTS == {"official"}:
            return official_kind(response, kind)
        if self.names & VERIFYING_PARTS:
            return kind
        for part in self.parts:
            if part.is_users and kind != "cut":
                return "right" if scores[part.name] >= 1 else "wrong"
        return kind

    def grade_all(self, problems: Sequence, episodes: Sequence) -> list[Verdict]:
        """Grade episodes, several at a time; return their verdicts in order.

        Problems have `text` and `answer`, perhaps an `id` and a `solution`; each has the same
        number of consecutive episodes.
        """
        n_each = len(episodes) // max(1, len(problems))
        problem_of_episode = [problem for problem in problems for _ in range(n_each)]
        return self.pool.map(self.grade_episode, problem_of_episode, episodes)

    def grade_episode(self, problem, episode) -> Verdict:
        finished = episode.finish_reason == "stop"
        n_tokens = len(episode.response_ids)
        return self.grade(
            problem.text, problem.answer, episode.text, finished, n_tokens, row=problem
        )


if __name__ == "__main__":
    runpy.run_module("grading.pairs", run_name="__main__")
