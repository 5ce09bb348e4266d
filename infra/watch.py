"""What takes long is named while it runs, e.g. a function of the user's that never returns.

    watch = Watch(patience=60)
    with watch.over("mine.py, problem '17'"):     after a minute, on the error output:
        ...                                       mine.py, problem '17': not done after 60 s; …

A process of its own keeps the time, because no thread could: a pattern of Python's `re` that goes
on for ever holds the interpreter, and all threads with it. Watch tells that process what begins and
what is done, a line each; it says so again after twice, four times, … as long.

    parent    {"key": 1, "what": "mine.py, problem '17'"}      begun
              {"key": 1}                                       done
"""

import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

PATIENCE = 60.0  # seconds
ADVICE = "this process waits for it; a second Ctrl-C ends it"


class Watch:
    """Names what is not done for a while; its process starts with the first thing to watch."""

    def __init__(self, patience: float = PATIENCE):
        self.patience = patience  # seconds until the first message
        self.process: subprocess.Popen | None = None
        self.lock = threading.Lock()

    @contextmanager
    def over(self, what: str) -> Iterator[None]:
        """Watch over what this thread does in the block."""
        key = threading.get_ident()
        self.tell({"key": key, "what": what})
        try:
            yield
        finally:
            self.tell({"key": key})

    def tell(self, note: dict) -> None:
        line = json.dumps(note).encode() + b"\n"
        with self.lock:
            if self.process is None:
                command = [sys.executable, "-I", "-S", __file__, str(self.patience)]
                # in a session of its own: Ctrl-C is for the parent
                self.process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, bufsize=0, start_new_session=True
                )
            with suppress(BrokenPipeError):  # somebody killed it: only the messages are lost
                self.process.stdin.write(line)

    def close(self) -> None:
        """End the process."""
        with self.lock:
            if self.process is not None:
                self.process.stdin.close()
                self.process.wait()
                self.process = None


def serve(patience: float) -> None:
    """Read notes from the standard input until it ends, and print what is overdue."""
    running: dict[int, list] = {}  # by key: what, when it began, after how long to speak next
    unread = b""
    while True:
        dues = [began + wait for _, began, wait in running.values()]
        timeout = max(0.0, min(dues) - time.monotonic()) if dues else None
        readable, _, _ = select.select([0], [], [], timeout)
        if readable:
            data = os.read(0, 65536)
            if not data:
                return
            *lines, unread = (unread + data).split(b"\n")
            for line in lines:
                note = json.loads(line)
                if "what" in note:
                    running[note["key"]] = [note["what"], time.monotonic(), patience]
                else:
                    running.pop(note["key"], None)
        for entry in running.values():
            speak_of(entry)


def speak_of(entry: list) -> None:
    """Print what is overdue, and double the time until it is said again."""
    what, began, wait = entry
    if time.monotonic() < began + wait:
        return
    print(f"{what}: not done after {wait:g} s; {ADVICE}", file=sys.stderr, flush=True)
    entry[2] = 2 * wait


if __name__ == "__main__":
    serve(float(sys.argv[1]))
