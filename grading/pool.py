"""A pool of processes that compare answers, each within a deadline.

    with Pool(n_workers=2, deadline=5.0) as pool:
        pool.judge(["1/2", "2/4"], "0.5")    -> "right"; also "wrong" and "timeout"

Comparing answers means computing with text that a language model wrote: it may never end, or fill
the memory. So it happens in worker processes (worker.py) that may do nothing else. The pool keeps
the deadline, kills a worker that misses it and starts another. A pair that misses its deadline is
compared once more, while no other is: the machine may just have been busy. Verdicts are remembered,
so that a repeated pair is not compared twice; that a pair timed out or crashed is not a verdict.
"""

import json
import os
import queue
import re
import select
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from typing import Literal

from grading.answers import MAX_LENGTH, Gold
from infra.cores import cores_of_rank

ROOT = Path(__file__).parents[1]  # the repository: where a worker can import grading
START_LIMIT = 120  # seconds for a worker to start, or to import math-verify
MAX_WORKERS = 8  # by default
DEADLINE = 5.0  # seconds for one comparison, by default
N_REMEMBERED = 100_000  # verdicts
WORKER_VERDICTS = {"1": "right", "0": "wrong", None: "timeout"}
INTEGER = re.compile(r"-?\d{1,18}")

Judgement = Literal["right", "wrong", "timeout"]


class Worker:
    """A worker process as its parent sees it: started when first asked, and after each stop."""

    def __init__(self):
        self.process: Popen | None = None
        self.unread = b""  # what the process has written and nobody has read

    def start(self) -> None:
        command = [sys.executable, "-m", "grading.worker"]
        self.process = Popen(command, cwd=ROOT, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, bufsize=0)
        self.unread = b""
        if self.read_reply(START_LIMIT) != "ready":
            self.stop()
            raise RuntimeError(f"a grading process does not start; try `{' '.join(command)}`")

    def stop(self) -> None:
        if self.process is None:
            return
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(BrokenPipeError):  # what was still to be written
                pipe.close()
        self.process = None

    def ask(self, gold: str, prediction: str, deadline: float) -> str:
        """Return the verdict on a pair: right, wrong, timeout or crashed."""
        reply = self.exchange(gold, prediction, deadline)
        if reply == "":  # the process died, perhaps not of this pair: once more
            reply = self.exchange(gold, prediction, deadline)
        return WORKER_VERDICTS.get(reply, "crashed")

    def exchange(self, gold: str, prediction: str, deadline: float) -> str | None:
        """Send a pair, return the reply as read_reply does, stop a process that gave no verdict."""
        if self.process is None:
            self.start()
        try:
            self.process.stdin.write(json.dumps([gold, prediction]).encode() + b"\n")
            reply = self.read_reply(deadline)
        except BrokenPipeError:
            reply = ""
        if reply == "loading":
            self.wait_for_math_verify()
            reply = self.read_reply(deadline)
        if reply not in ("0", "1"):
            self.stop()
        return reply

    def wait_for_math_verify(self) -> None:
        if self.read_reply(START_LIMIT) != "loaded":
            self.stop()
            raise RuntimeError("a grading process cannot import math-verify; is it installed?")

    def read_reply(self, deadline: float) -> str | None:
        """Return the next line, "" if the process died, None if the deadline (seconds) passed."""
        end = time.monotonic() + deadline
        output = select.poll()  # select() takes no file beyond the 1024th of a process
        output.register(self.process.stdout, select.POLLIN)
        while b"\n" not in self.unread:
            time_left = max(0.0, end - time.monotonic())
            if not output.poll(1000 * time_left):
                return None
            data = os.read(self.process.stdout.fileno(), 4096)
            if not data:
                return ""
            self.unread += data
        line, _, self.unread = self.unread.partition(b"\n")
        return line.decode()


class Pool(AbstractContextManager):
    """Worker processes that compare predictions with golds: a context manager, or call close().

    Attributes:
        counts: What went wrong so far: timeout, crashed (e.g. out of memory), and capped, which is
            an answer longer than MAX_LENGTH. None of these is right.
    """

    def __init__(self, n_workers: int | None = None, deadline: float = DEADLINE):
        """Make a pool whose processes start when an answer first needs them.

        Args:
            n_workers: Number of processes, by default this rank's share of the cores, at most 8.
            deadline: Seconds that one comparison may take.
        """
        if deadline <= 0:
            raise ValueError(f"deadline={deadline}: expected a positive number of seconds")
        n_workers = n_workers or min(MAX_WORKERS, cores_of_rank())
        self.deadline = deadline
        self.workers = [Worker() for _ in range(n_workers)]
        self.idle_workers = queue.SimpleQueue()
        for worker in self.workers:
            self.idle_workers.put(worker)
        self.threads = ThreadPoolExecutor(n_workers)
        self.counts = Counter()
        self.counts_lock = threading.Lock()
        self.all_workers_lock = threading.Lock()  # held by the one thread that wants all workers
        self.verdicts: dict[tuple[str, str], str] = {}  # the oldest first
        self.verdicts_lock = threading.Lock()

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        """End the threads and the worker processes."""
        self.threads.shutdown()
        for worker in self.workers:
            worker.stop()

    def map(self, function: Callable, *iterables) -> list:
        """Call a function of each item in the pool's threads, and return the results in order.

        The function may call judge and equal, but not map: all threads might wait for a free one.
        """
        return list(self.threads.map(function, *iterables))

    def judge(self, gold: Gold, prediction: str) -> Judgement:
        """Compare a prediction with the gold answer, or with each of a list until one is met."""
        golds = [gold] if isinstance(gold, str) else gold
        troubles = set()
        for each in golds:
            verdict = self.compare_once(each, prediction)
            if verdict == "right":
                return "right"
            if verdict != "wrong":
                troubles.add(verdict)
        with self.counts_lock:
            self.counts.update(troubles)
        return "timeout" if "timeout" in troubles else "wrong"

    def equal(self, gold: Gold, prediction: str) -> bool:
        """Return whether a prediction equals the gold answer, or any of a list of them."""
        return self.judge(gold, prediction) == "right"

    def compare_once(self, gold: str, prediction: str) -> str:
        """Compare as `compare` does, unless the pair's verdict is remembered."""
        pair = (gold, prediction)
        with self.verdicts_lock:
            remembered = self.verdicts.get(pair)
        if remembered is not None:
            return remembered
        verdict = self.compare(gold, prediction)
        if verdict in ("right", "wrong"):
            self.remember(pair, verdict)
        return verdict

    def remember(self, pair: tuple[str, str], verdict: str) -> None:
        with self.verdicts_lock:
            if len(self.verdicts) >= N_REMEMBERED:
                oldest = next(iter(self.verdicts))
                del self.verdicts[oldest]
            self.verdicts[pair] = verdict

    def compare(self, gold: str, prediction: str) -> str:
        """Return right, wrong, timeout, crashed or capped; the plainest cases need no worker."""
        gold = gold.strip()
        prediction = prediction.strip()
        if not gold or not prediction:
            return "wrong"
        if max(len(gold), len(prediction)) > MAX_LENGTH:
            return "capped"
        if gold == prediction:
            return "right"
        if INTEGER.fullmatch(gold) and INTEGER.fullmatch(prediction):
            return "right" if int(gold) == int(prediction) else "wrong"
        with self.borrow_workers(1) as (worker,):
            verdict = worker.ask(gold, prediction, self.deadline)
        if verdict != "timeout":
            return verdict
        return self.compare_alone(gold, prediction)

    def compare_alone(self, gold: str, prediction: str) -> str:
        """Compare a pair within the deadline while no other is compared."""
        with self.all_workers_lock, self.borrow_workers(len(self.workers)) as workers:
            return workers[0].ask(gold, prediction, self.deadline)

    @contextmanager
    def borrow_workers(self, n: int) -> Iterator[list[Worker]]:
        """Wait until this thread has as many workers, and give them back afterwards."""
        workers = []
        try:
            while len(workers) < n:
                workers.append(self.idle_workers.get())
            yield workers
        finally:
            for worker in workers:
                self.idle_workers.put(worker)
