"""Outcome rewards: extract the boxed answer, normalise, compare, verify in worker processes.

A verdict is (reward, correct). Reward sets: `binary` 1 for a right boxed answer, else 0; `official` the rule set of the
official code, 0 / 0.5 / 1; or a Python file with `reward(problem, response) -> float`, correct from 1 on.

Gold and prediction are both parsed as mathematics (the official code parses bare text: 51 of 500 MATH-500 answers then
fail against themselves and `2` passes for `2\\pi`). math-verify runs in worker processes, `python rewards.py`: its own
timeouts are signals, which fail in threads, so the parent keeps the deadline, kills a worker that misses it, starts another.
"""

import importlib.util
import json
import os
import queue
import re
import select
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from fractions import Fraction
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from typing import NamedTuple

MAX_ANSWER = 2_000  # characters of a boxed answer; a longer one is wrong
MEMORY_LIMIT = 2 * 2**30  # bytes of address space of a worker


class Verdict(NamedTuple):
    """What an episode is worth."""

    reward: float
    correct: bool


# ---- Extraction
def boxes(text: str) -> list[str]:
    r"""Return the contents of every `\boxed{…}` with balanced braces, in order of their beginning."""
    found, opened = [], []  # where a box began, or None for a brace that is no box's
    for match in re.finditer(r"\\boxed\s*\{|\\[{}\\]|[{}]", text):
        if match[0] in (r"\{", r"\}", r"\\"):
            continue
        if match[0] != "}":
            opened.append(None if match[0] == "{" else match.end())
        elif opened and (start := opened.pop()) is not None:
            found.append((start, text[start : match.start()]))
    return [content for _, content in sorted(found)]


def degenerate(response: str) -> bool:
    """Return whether a response is garbage by the official rules: a pattern five times in a row, or mostly odd characters."""
    odd = sum(not (c.isascii() or "\u0370" <= c <= "\u03ff" or "\u2000" <= c <= "\u2bff") for c in response)
    return re.search(r"(.{5,200}?)\1{4}", response) is not None or odd > 0.3 * len(response)


# ---- Comparison. Cheap and certain cases are decided here; what is left goes to math-verify in a worker.

UNICODE = str.maketrans(
    {"°": r"^\circ", "×": r"\times ", "·": r"\cdot ", "π": r"\pi ", "√": r"\sqrt", "−": "-", "–": "-", "∞": r"\infty "}
)
REWRITES = [
    (r"\\(?:displaystyle|textstyle|left|right|bigl|bigr|Bigl|Bigr|big|Big)(?![a-zA-Z])", ""),
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\(?:mathbf|mathrm|boldsymbol|bm|textbf|operatorname|mathit)\s*\{([^{}]*)\}", r"\1"),
    (r"^\\text\s*\{[^{}]*\b(?:is|are|equals)\s*:?\s*\}", ""),  # \text{the answer is} 5
    (r"\\(?:[!,;:> ]|quad|qquad)|~", " "),
    (r"(?<=\d)(?:\s*\\text\s*\{[^{}]*\}(?:\s*\^\s*\{?\d\}?)?)+\s*$", ""),  # a unit behind a number
    (r"(?<=\d)\s*(?:\^\s*\{?\s*\\circ\s*\}?|\\degree)\s*$", ""),
    (r"(?<=\d)\s*\\?%\s*$", ""),
    (r"^\\text\s*\{([^{}]*)\}$", r"\1"),
    (r"^\s*\$+|\$+\s*$", ""),
    (r"\.\s*$", ""),
    (r"\s+", " "),
    (r"^[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?$", lambda match: match[0].replace(",", "")),  # 1,000 but not (1,000)
]
NUMBER = re.compile(r"([+-]?)(\d+(?:\.\d*)?|\.\d+)(?:e([+-]?\d{1,4}))?", re.IGNORECASE)
POWER = re.compile(r"([+-]?)(?:(\d+(?:\.\d*)?|\.\d+)\s*\\(?:times|cdot)\s*)?10\s*\^\s*(?:\{\s*([+-]?\d{1,4})\s*\}|(\d))")
FRACTION = re.compile(r"([+-]?)\s*(?:\\frac\s*\{?\s*(\d{1,50})\s*\}?\s*\{?\s*(\d{1,50})\s*\}?|(\d{1,50})\s*/\s*(\d{1,50}))")


def canonical(answer: str) -> str:
    """Rewrite an answer so that spellings of the same thing become equal strings."""
    answer = answer.strip().translate(UNICODE)
    for pattern, replacement in REWRITES:
        answer = re.sub(pattern, replacement, answer.strip())
    return answer.strip()


def number(text: str) -> Fraction | None:
    """Return a plain number, fraction or power of ten exactly, or None."""
    text = re.sub(r"^\{+([^{}]*)\}+$", r"\1", text).strip()
    if match := FRACTION.fullmatch(text):
        top, bottom = match[2] or match[4], match[3] or match[5]
        value = Fraction(int(top), int(bottom)) if int(bottom) else None
    elif (match := NUMBER.fullmatch(text) or POWER.fullmatch(text)) and len(text) < 400:
        value = Fraction(match[2] or 1) * Fraction(10) ** int(next(filter(None, match.groups()[2:]), 0))
    else:
        return None
    return -value if value and match[1] == "-" else value


def compare(gold: str, prediction: str) -> bool | None:
    """Decide the cheap cases: equal strings and plain numbers; None where mathematics is needed."""
    gold, prediction = canonical(gold), canonical(prediction[: MAX_ANSWER + 1])
    if not gold or not prediction or len(prediction) > MAX_ANSWER:
        return False
    if re.sub(r"(?<!\d) | (?!\d)", "", gold) == re.sub(r"(?<!\d) | (?!\d)", "", prediction):  # 1 1/2 is not 11/2
        return True
    a, b = number(gold), number(prediction)
    if a is None or b is None:
        return None
    if a.denominator == 1:
        return a == b
    return abs(a - b) <= max(abs(a), abs(b)) / 1_000_000  # a ratio: tiny numbers are not equal because both are tiny


def serve() -> None:
    """Answer lines of [gold, prediction] with 0 or 1 until the parent goes; the parent keeps the time."""
    import resource

    import math_verify

    for stop in (signal.SIGINT, signal.SIGTERM):  # sent to the whole process group they are the parent's to heed
        signal.signal(stop, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    print("ready", flush=True)
    for line in sys.stdin:
        signal.alarm(600)  # ends a worker that is lost in an expression after its parent was killed
        try:
            gold, prediction = (math_verify.parse(f"${canonical(text)}$", parsing_timeout=None) for text in json.loads(line))
            verdict = bool(gold and prediction and math_verify.verify(gold, prediction, timeout_seconds=None))
        except Exception:  # noqa: BLE001 — whatever a parser makes of hostile text, the answer is not verified
            verdict = False
        signal.alarm(0)
        print(int(verdict), flush=True)


class Worker:
    """A grading process, started when first asked and again after it was killed."""

    process = None

    def start(self) -> None:
        command = [sys.executable, str(Path(__file__).resolve())]
        self.process = Popen(command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL)
        if self.reply(deadline=120) != b"ready\n":
            self.stop()
            raise RuntimeError(f"a grading process does not start; try `{' '.join(command)}` (is math-verify installed?)")

    def reply(self, deadline: float) -> bytes | None:
        ready, _, _ = select.select([self.process.stdout], [], [], deadline)
        return self.process.stdout.readline() if ready else None

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def ask(self, gold: str, prediction: str, deadline: float) -> bool | None:
        """Return the verdict, or None if the deadline passed or the process died of the question."""
        if self.process is None or self.process.poll() is not None:
            self.stop()
            self.start()
        self.process.stdin.write(json.dumps([gold, prediction]).encode() + b"\n")
        self.process.stdin.flush()
        reply = self.reply(deadline)
        if not reply:
            self.stop()
            return None
        return reply == b"1\n"


# ---- Rewards
class Grader(AbstractContextManager):
    """Rewards for episodes, in order, from worker processes; use it as a context manager or call close().

    `reward` is binary, official, or a Python file with `reward(problem, response) -> float`. An answer that takes longer
    than `deadline` seconds is wrong and counted in `timeouts`. A response that ran out of room scores only with
    `grade_truncated` (the official code lets it). The `n_workers` processes start when an answer first needs them.
    """

    def __init__(self, reward: str = "binary", n_workers: int | None = None, deadline: float = 5.0, grade_truncated=False):
        self.user = None if reward in ("binary", "official") else load_reward(reward)
        self.kind, self.deadline, self.grade_truncated, self.timeouts = reward, deadline, grade_truncated, 0
        n_workers = n_workers or min(8, os.cpu_count() or 1)
        self.workers, self.idle = [Worker() for _ in range(n_workers)], queue.SimpleQueue()
        for worker in self.workers:
            self.idle.put(worker)
        self.threads, self.batches = ThreadPoolExecutor(n_workers), ThreadPoolExecutor(1)

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        """End the worker processes."""
        self.batches.shutdown()
        self.threads.shutdown()
        for worker in self.workers:
            worker.stop()

    def equal(self, gold: str | Sequence[str], prediction: str) -> bool:
        """Return whether a prediction equals the gold, or any of a list of golds."""
        if not isinstance(gold, str):
            return any(self.equal(each, prediction) for each in gold)
        decided = compare(gold, prediction)
        if decided is not None:
            return decided
        worker = self.idle.get()
        try:
            verdict = worker.ask(gold, prediction, self.deadline)
        finally:
            self.idle.put(worker)
        self.timeouts += verdict is None
        return bool(verdict)

    def grade(self, problem: str, answer: str | Sequence[str] | None, response: str, finished: bool) -> Verdict:
        """Return the verdict on one response; `finished` says that it ended by itself."""
        finished = finished or self.grade_truncated
        if self.user is not None:
            value = float(self.user(problem, response)) if finished else 0.0
            return Verdict(value, value >= 1)
        found = boxes(response)
        # no box, no credit; five or more are a way of guessing (official rules)
        candidate = finished and answer and 0 < len(found) < 5
        if self.kind == "official" and candidate:
            candidate = not degenerate(response)
        correct = bool(candidate) and self.equal(answer, found[-1])
        half = 0.5 if self.kind == "official" and candidate else 0.0
        return Verdict(1.0 if correct else half, correct)

    def submit(self, problems: Sequence, episodes: Sequence) -> Future[list[Verdict]]:
        """Grade episodes in the background, in order; problems have `text` and `answer`, each as many episodes in a row."""
        n = len(episodes) // max(1, len(problems))
        asked = [problem for problem in problems for _ in range(n)]

        def grade(problem, episode) -> Verdict:
            return self.grade(problem.text, problem.answer, episode.text, episode.finish_reason == "stop")

        return self.batches.submit(lambda: list(self.threads.map(grade, asked, episodes)))


def load_reward(path: str) -> Callable[[str, str], float]:
    """Load `reward(problem, response)` from a user's Python file."""
    if not (path.endswith(".py") and Path(path).is_file()):
        raise ValueError(f"reward {path!r}: neither binary, official nor a Python file that defines reward(problem, response)")
    spec = importlib.util.spec_from_file_location("user_reward", path)
    module = sys.modules["user_reward"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, "reward", None)):
        raise ValueError(f"{path} defines no function reward(problem, response) -> float")
    return module.reward


if __name__ == "__main__":
    serve()
