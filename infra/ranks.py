"""What ranks tell each other beside their collectives: that they live, and that they stop.

In a collective every rank waits for all, for hours if need be. Each rank has a thread, too. It
writes a beat into the store of torchrun every few seconds: who the rank is, how many collectives it
has begun, and where in this project its main thread is. It reads the beats of the others, and after
a minute it names a rank that gives none, or one that the others wait for. It only speaks: how long
collectives wait is another matter (parallel.PATIENCE).
"""

import contextlib
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch.distributed as dist

from infra.errors import PROJECT, is_of_project

INTERVAL = 10.0  # seconds between two beats
PATIENCE = 60.0  # seconds until a rank is named
ANSWERS_WITHIN = 10.0  # seconds until the store counts as gone; a busy machine may be slow
STOPPING = "stopping"  # key in the store
THREAD = "beats"
Trouble = Literal["silent", "awaited"] | None


def connect() -> dist.Store:
    """Connect to the store that the ranks have met in, for this purpose alone."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=ANSWERS_WITHIN))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # after it, all begin anew
    return dist.PrefixStore(f"beside collectives {attempt}", store)


# ---- Stopping
def say_stopping() -> None:
    """Tell the other ranks that this one stops because of a signal, and that nothing is wrong."""
    if is_alone():
        return
    with contextlib.suppress(dist.DistError):  # the store is gone, and the ranks with it
        connect().set(STOPPING, "yes")


def is_any_stopping() -> bool:
    """Return whether a rank has stopped because of a signal."""
    if is_alone():
        return False
    try:
        return connect().check([STOPPING])
    except dist.DistError:  # the store is gone: nobody has ended as a signal asks
        return False


def is_alone() -> bool:
    """Return whether this process has no other ranks."""
    return int(os.environ.get("WORLD_SIZE", "1")) == 1


# ---- Signs of life
class Beats:
    """What a rank knows of all ranks by their beats."""

    def __init__(self, n_ranks: int):
        self.beats: list[dict | None] = [None] * n_ranks
        self.heard = [0.0] * n_ranks  # when the beat was new, by this rank's clock
        self.moved = [0.0] * n_ranks  # when the rank began its last collective
        self.troubles: list[Trouble] = [None] * n_ranks

    def look(self, beats: list[dict], now: float) -> list[str]:
        """Take the beats of all ranks; return what there is to say, a sentence for each rank."""
        for rank, (beat, last) in enumerate(zip(beats, self.beats, strict=True)):
            if last is None or beat["number"] != last["number"]:
                self.heard[rank] = now
            if last is None or beat["collectives"] != last["collectives"]:
                self.moved[rank] = now
        self.beats = beats
        news = []
        for rank in range(len(beats)):
            before = self.troubles[rank]
            self.troubles[rank] = self.find_trouble(rank, now)
            if self.troubles[rank] != before:
                news.append(self.describe(rank, now))
        return news

    def find_trouble(self, rank: int, now: float) -> Trouble:
        """Return what is wrong with a rank."""
        if now - self.heard[rank] >= PATIENCE:
            return "silent"
        return "awaited" if now - self.awaited_since(rank, now) >= PATIENCE else None

    def awaited_since(self, rank: int, now: float) -> float:
        """Return since when a rank has been the one that others wait for; now, if it is not."""
        done = self.beats[rank]["collectives"]
        since = now
        for other, beat in enumerate(self.beats):
            if beat["collectives"] > done:
                since = min(since, max(self.moved[other], self.moved[rank]))
        return since

    def describe(self, rank: int, now: float) -> str:
        """Say how a rank does."""
        beat = self.beats[rank]
        name = f"rank {rank} (process {beat['process']} on {beat['host']})"
        if self.troubles[rank] == "silent":
            silence = f"has given no sign of life for {now - self.heard[rank]:.0f} s"
            return f"{name} {silence}: is it stopped, or its machine lost?"
        if self.troubles[rank] == "awaited":
            waiting = f"{now - self.awaited_since(rank, now):.0f} s"
            return f"{name} lets the others wait for {waiting} already; it is {beat['place']}"
        return f"{name} goes on"

    def speaker(self) -> int | None:
        """Return the first rank that seems well: it speaks."""
        return self.troubles.index(None) if None in self.troubles else None


def start_watch(find_groups: Callable[[], list]) -> None:
    """Start the thread, if there are several ranks and it does not run yet.

    `find_groups` returns the groups whose collectives count, None for a group that is gone.
    """
    names = [thread.name for thread in threading.enumerate()]
    if dist.get_world_size() > 1 and THREAD not in names:
        threading.Thread(target=keep_watch, args=(find_groups,), name=THREAD, daemon=True).start()


def keep_watch(find_groups: Callable[[], list]) -> None:
    """Beat, listen and speak until the process ends, or until the store is gone."""
    rank = dist.get_rank()
    n_ranks = dist.get_world_size()
    keys = [str(number) for number in range(n_ranks)]
    known = Beats(n_ranks)
    try:
        store = connect()
        for number in itertools.count():
            beat = make_beat(number, count_collectives(find_groups()))
            store.set(str(rank), json.dumps(beat))
            if store.check(keys):
                beats = [json.loads(value) for value in store.multi_get(keys)]
                news = known.look(beats, time.monotonic())
                if news and known.speaker() == rank:
                    print("\n" + "\n".join(news), file=sys.stderr, flush=True)
            is_stopping = store.check([STOPPING])
            time.sleep(INTERVAL)
            if is_stopping:  # this rank still waits for the one that has ended
                os._exit(0)
    except dist.DistError:
        return  # the store has ended, and the run with it


def make_beat(number: int, n_collectives: int) -> dict:
    """Return this rank's beat."""
    return {
        "number": number,
        "process": os.getpid(),
        "host": socket.gethostname(),
        "collectives": n_collectives,
        "place": find_place(),
    }


def count_collectives(groups: list) -> int:
    """Return how many collectives this rank has begun in its groups."""
    return sum(group._get_sequence_number_for_group() for group in groups if group is not None)


def find_place() -> str:
    """Return where in this project the main thread is."""
    frame = sys._current_frames().get(threading.main_thread().ident)
    while frame:
        file = frame.f_code.co_filename
        if is_of_project(file):
            place = Path(file).resolve().relative_to(PROJECT)
            return f"in {frame.f_code.co_name}, {place}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside of this project"
