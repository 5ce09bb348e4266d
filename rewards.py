"""Outcome rewards: extract the boxed answer, verify it in worker processes, add up the parts of a reward.

A reward is a weighted sum of parts, `--reward binary format=0.1 overlong=0.5`:
    binary      1 for a right boxed answer, else 0
    official    the rule set of the official code: 1 right, 0.5 wrong but boxed, 0 without a box, with five or more, or garbage
    format      1 for a response that ends by itself and has one to four boxes
    vlm         1 for a right answer by the rules for vision-language models: in its tag, in a box, or bare (options.py)
    tags        1 for `<think>…</think> <answer>…</answer>`, as the official rules want it of vision-language models
    overlong    DAPO's soft penalty (eq. 13): 0 up to max_tokens - buffer, then down to -1 at max_tokens
    FILE.py     a Python file with `reward(problem, response) -> float`
An episode is correct where `binary`, `official` or `vlm` says so; with none of them, where the first file's value is 1 or more.

Whether two answers are the same says answers.py, in worker processes that know nothing else: the parent keeps the deadline,
kills a worker that misses it and starts another. A repeated pair is not graded twice.

    python rewards.py PAIRS.jsonl        count errors on labelled pairs: columns gold (any of a list), pred, expected, group
"""

import importlib.util
import json
import math
import os
import queue
import re
import select
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from typing import Literal, NamedTuple

from grading.answers import MAX_LENGTH
from grading.latex import boxes
from grading.options import candidate, tag_format, tagged, vlm_accuracy

PARTS = ("binary", "official", "vlm", "format", "tags", "overlong")
START_LIMIT = 120  # seconds for a worker to start, or to import math-verify


class Verdict(NamedTuple):
    """What an episode is worth, and why."""

    reward: float
    correct: bool
    parts: dict[str, float]  # unweighted, by name
    extracted: str | None  # the last boxed answer; by the rules of `vlm` what is compared
    kind: Literal["right", "wrong", "no answer", "cut", "timeout"]


def degenerate(response: str) -> bool:
    """Return whether a response is garbage by the official rules: a pattern five times in a row, or mostly odd characters."""
    odd = sum(
        not (c.isascii() or "\u0370" <= c <= "\u03ff" or "\u2000" <= c <= "\u2bff")
        for c in response
    )
    return re.search(r"(.{5,200}?)\1{4}", response) is not None or odd > 0.3 * len(response)


def overlong(n_tokens: int, max_tokens: int, buffer: int) -> float:
    """Return the soft penalty of a length (DAPO eq. 13), from 0 to -1 over the last `buffer` tokens before max_tokens."""
    return -min(1.0, max(0.0, (n_tokens - (max_tokens - buffer)) / buffer))


# ---- Worker processes
class Worker:
    """A grading process (answers.py), started when first asked and again after it was killed."""

    process = None

    def start(self) -> None:
        command = [sys.executable, "-m", "grading.answers"]
        pipes = {"stdin": PIPE, "stdout": PIPE, "stderr": DEVNULL, "bufsize": 0}
        self.process, self.buffer = Popen(command, cwd=Path(__file__).parent, **pipes), b""
        if self.reply(START_LIMIT) != "ready":
            self.stop()
            raise RuntimeError(f"a grading process does not start; try `{' '.join(command)}`")

    def reply(self, deadline: float) -> str | None:
        """Return the next line, "" if the process died, None if the deadline passed."""
        end = time.monotonic() + deadline
        while b"\n" not in self.buffer:
            if not select.select([self.process.stdout], [], [], max(0.0, end - time.monotonic()))[
                0
            ]:
                return None
            if not (data := os.read(self.process.stdout.fileno(), 4096)):
                return ""
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line.decode()

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                with suppress(BrokenPipeError):  # what was still to be written
                    pipe.close()
            self.process = None

    def ask(self, gold: str, prediction: str, deadline: float) -> str:
        """Return the verdict on a pair: right, wrong, timeout or crashed."""
        reply = self.exchange(gold, prediction, deadline)
        if reply == "":  # it died, perhaps not of this pair: once more
            reply = self.exchange(gold, prediction, deadline)
        return {"1": "right", "0": "wrong", None: "timeout"}.get(reply, "crashed")

    def exchange(self, gold: str, prediction: str, deadline: float) -> str | None:
        """Send a pair and return the reply; a process that gave no verdict is stopped."""
        if self.process is None:
            self.start()
        try:
            self.process.stdin.write(json.dumps([gold, prediction]).encode() + b"\n")
            reply = self.reply(deadline)
        except BrokenPipeError:
            reply = ""
        if reply == "loading":  # math-verify, for the first answer that needs it
            if self.reply(START_LIMIT) != "loaded":
                self.stop()
                raise RuntimeError("a grading process cannot import math-verify; is it installed?")
            reply = self.reply(deadline)
        if reply not in ("0", "1"):
            self.stop()
        return reply


# ---- Rewards
class Grader(AbstractContextManager):
    """Rewards for episodes, in order, from worker processes; use it as a context manager or call close().

    `reward` lists parts as NAME or NAME=WEIGHT. An answer that takes longer than `deadline` seconds is wrong. A response
    that ran out of room scores only with `grade_truncated` (the official code lets it). The `n_workers` processes start when
    an answer first needs them. `counts` holds what was graded so far: timeouts, crashed, capped (longer than MAX_LENGTH).
    """

    def __init__(
        self, reward: Sequence[str] = ("binary",), n_workers: int | None = None, deadline: float = 5.0, grade_truncated=False,
        max_tokens: int = 0, overlong_buffer: int | None = None,
    ):  # fmt: skip
        self.weights, self.functions = read_parts(reward)
        if "overlong" in self.weights and not max_tokens:
            raise ValueError("the reward part overlong needs max_tokens, the longest response")
        buffer = max_tokens // 5 if overlong_buffer is None else overlong_buffer
        if "overlong" in self.weights and not 0 < buffer <= max_tokens:
            raise ValueError(
                f"overlong_buffer={buffer} is outside (0, max_tokens={max_tokens}]; choose a part of max_tokens"
            )
        self.overlong = max_tokens, buffer
        if deadline <= 0:
            raise ValueError(f"deadline={deadline}: expected a positive number of seconds")
        self.deadline, self.grade_truncated, self.counts, self.lock = (
            deadline,
            grade_truncated,
            Counter(),
            threading.Lock(),
        )
        n_workers = n_workers or min(8, os.cpu_count() or 1)
        self.workers, self.idle = [Worker() for _ in range(n_workers)], queue.SimpleQueue()
        for worker in self.workers:
            self.idle.put(worker)
        self.threads, self.batches = ThreadPoolExecutor(n_workers), ThreadPoolExecutor(1)
        self.compare = lru_cache(100_000)(self.ask)

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        """End the worker processes."""
        self.batches.shutdown()
        self.threads.shutdown()
        for worker in self.workers:
            worker.stop()

    def ask(self, gold: str, prediction: str) -> str:
        """Return right, wrong, timeout, crashed or capped; the plainest cases need no worker."""
        gold, prediction = gold.strip(), prediction.strip()
        if not gold or not prediction:
            return "wrong"
        if max(len(gold), len(prediction)) > MAX_LENGTH:
            return "capped"
        if gold == prediction:
            return "right"
        if re.fullmatch(r"-?\d{1,18}", gold) and re.fullmatch(r"-?\d{1,18}", prediction):
            return "right" if int(gold) == int(prediction) else "wrong"
        worker = self.idle.get()
        try:
            return worker.ask(gold, prediction, self.deadline)
        finally:
            self.idle.put(worker)

    def judge(self, gold: str | Sequence[str], prediction: str) -> str:
        """Return right, wrong or timeout for a prediction and a gold, or any of a list of golds."""
        found = []
        for each in [gold] if isinstance(gold, str) else gold:
            found.append(self.compare(each, prediction))
            if found[-1] == "right":
                return "right"
        with self.lock:
            self.counts.update(set(found) - {"wrong"})
        return "timeout" if "timeout" in found else "wrong"

    def equal(self, gold: str | Sequence[str], prediction: str) -> bool:
        """Return whether a prediction equals the gold, or any of a list of golds."""
        return self.judge(gold, prediction) == "right"

    def grade(self, problem: str, answer: str | Sequence[str] | None, response: str, finished: bool, n_tokens: int = 0) -> Verdict:  # fmt: skip
        """Return the verdict on one response; `finished` says that it ended by itself."""
        found, finished = boxes(response), finished or self.grade_truncated
        extracted = found[-1] if found else None
        boxed = (
            finished and 0 < len(found) < 5
        )  # no box, no credit; five or more are a way of guessing (official rules)
        clean = boxed and bool(answer) and not ("official" in self.weights and degenerate(response))
        kind = "cut" if not finished else "no answer" if not boxed else "wrong"
        if "vlm" in self.weights:
            extracted = candidate(tagged(response) or response).strip() or None
            if finished:
                kinds = []

                def equal(gold: str, prediction: str) -> bool:
                    kinds.append(self.judge(gold, prediction))
                    return kinds[-1] == "right"

                right = bool(answer) and vlm_accuracy(response, answer, equal)
                kind = (
                    "right"
                    if right
                    else "timeout"
                    if "timeout" in kinds
                    else "wrong"
                    if extracted
                    else "no answer"
                )
        elif clean:
            kind = self.judge(answer, extracted)
        right = kind == "right"
        parts = {}
        for name in self.weights:
            if name in self.functions:
                parts[name] = float(self.functions[name](problem, response)) if finished else 0.0
            elif name == "overlong":
                parts[name] = overlong(n_tokens, *self.overlong)
            else:
                scores = {
                    "binary": right,
                    "vlm": right,
                    "official": 1.0 if right else 0.5 * clean,
                    "format": boxed,
                }
                parts[name] = float(
                    finished and tag_format(response) if name == "tags" else scores[name]
                )
        if (
            not {"binary", "official", "vlm"} & self.weights.keys() and self.functions
        ):  # the user's function decides
            right = parts[next(iter(self.functions))] >= 1
            kind = kind if kind == "cut" else "right" if right else "wrong"
        reward = sum(weight * parts[name] for name, weight in self.weights.items())
        return Verdict(reward, right, parts, extracted, kind)

    def submit(self, problems: Sequence, episodes: Sequence) -> Future[list[Verdict]]:
        """Grade episodes in the background, in order; problems have `text` and `answer`, each as many episodes in a row."""
        n = len(episodes) // max(1, len(problems))
        asked = [problem for problem in problems for _ in range(n)]

        def grade(problem, episode) -> Verdict:
            finished, length = episode.finish_reason == "stop", len(episode.response_ids)
            return self.grade(problem.text, problem.answer, episode.text, finished, length)

        return self.batches.submit(lambda: list(self.threads.map(grade, asked, episodes)))


def read_parts(
    reward: Sequence[str],
) -> tuple[dict[str, float], dict[str, Callable[[str, str], float]]]:
    """Read NAME or NAME=WEIGHT; return weights and the user's functions by name. ValueError for what is neither."""
    weights, functions = {}, {}
    if {"binary", "official"} & {part.partition("=")[0] for part in reward} and any(
        p.partition("=")[0] == "vlm" for p in reward
    ):
        raise ValueError(
            f"reward {' '.join(reward)}: vlm reads answers by other rules than binary and official; choose one"
        )
    for part in reward:
        name, _, weight = part.partition("=")
        try:
            value = float(weight or 1)
            if not math.isfinite(value):
                raise ValueError(weight)
        except ValueError as error:
            raise ValueError(
                f"reward {part!r}: {weight!r} is no weight; expected NAME=NUMBER"
            ) from error
        if name not in PARTS:
            function = load_reward(name)
            name = Path(name).stem
            functions[name] = function
        if name in weights:
            raise ValueError(f"reward {part!r}: {name} is given twice")
        weights[name] = value
    if not weights:
        raise ValueError(f"no reward; expected {', '.join(PARTS)} or a Python file")
    return weights, functions


def load_reward(path: str) -> Callable[[str, str], float]:
    """Load `reward(problem, response)` from a user's Python file."""
    if not (path.endswith(".py") and Path(path).is_file()):
        kinds = (
            f"neither {', '.join(PARTS)} nor a Python file that defines reward(problem, response)"
        )
        raise ValueError(f"reward {path!r}: {kinds}")
    name = f"reward_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, "reward", None)):
        raise ValueError(f"{path} defines no function reward(problem, response) -> float")
    return module.reward


# ---- Labelled pairs
@dataclass(frozen=True)
class Pairs:
    """Settings of a count of errors."""

    file: str  # JSONL with gold, pred, expected, and group where there are several
    workers: int | None = None  # Grading processes; by default one a core, at most 8
    deadline: float = 5.0  # Seconds for one pair
    json: str | None = None  # Where figures go as well


def read_pairs(file: str) -> dict[str, list[dict]]:
    """Read labelled pairs by group; ValueError names the file and line of what is none."""
    groups = defaultdict(list)
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                pair = json.loads(line)
                gold, _, expected = pair["gold"], pair["pred"] + "", pair["expected"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                wanted = 'an object with "gold", "pred" and "expected"'
                raise ValueError(f"{file}, line {number}: {error!r}; expected {wanted}") from error
            if not isinstance(expected, bool) or not isinstance(gold, str | list):
                raise ValueError(
                    f"{file}, line {number}: gold {gold!r}, expected {expected!r}; expected text or list, and a bool"
                )
            groups[pair.get("group", "all")].append(pair)
    return groups


def count_errors(settings: Pairs) -> dict[str, dict[str, float]]:
    """Grade labelled pairs; return pairs, errors, false accepts, timeouts and seconds of each group and in total."""
    rows = {}
    with Grader(n_workers=settings.workers, deadline=settings.deadline) as grader:
        for group, pairs in read_pairs(settings.file).items():
            began, before = time.perf_counter(), grader.counts["timeout"]
            found = list(
                grader.threads.map(lambda pair: grader.equal(pair["gold"], pair["pred"]), pairs)
            )
            wrong = [
                (is_equal, pair["expected"])
                for is_equal, pair in zip(found, pairs, strict=True)
                if is_equal != pair["expected"]
            ]
            figures = {
                "n": len(pairs),
                "errors": len(wrong),
                "false_accepts": sum(is_equal for is_equal, _ in wrong),
            }
            rows[group] = figures | {
                "timeouts": grader.counts["timeout"] - before,
                "seconds": time.perf_counter() - began,
            }
    rows["total"] = {
        name: sum(row[name] for row in rows.values()) for name in next(iter(rows.values()))
    }
    return rows


def main(settings: Pairs) -> None:
    """Print the count of errors as a table."""
    rows = count_errors(settings)
    print(
        f"{'group':14}{'pairs':>9}{'errors':>9}{'':>9}{'false accepts':>15}{'':>9}{'timeouts':>10}{'seconds':>10}"
    )
    for group, row in rows.items():
        errors, accepts = (
            f"{row['errors']:>9}{row['errors'] / row['n']:>9.3%}",
            f"{row['false_accepts']:>15}",
        )
        share = f"{row['false_accepts'] / row['n']:>9.3%}"
        print(
            f"{group:14}{row['n']:>9}{errors}{accepts}{share}{row['timeouts']:>10}{row['seconds']:>10.2f}"
        )
    if settings.json:
        Path(settings.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Pairs, config=(tyro.conf.PositionalRequiredArgs,)))
