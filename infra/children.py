"""A command that a command runs as a part of its own work, and that stops with it.

The child holds one end of a pipe, the parent the other. The pipe closes when the parent is asked to
stop, and when it ends, even by SIGKILL. The child then stops as if it had had a SIGTERM: it saves.
"""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO

PIPE = "RLFR_PIPE_OF_PARENT"  # in a child's environment: the number of its end
OWN_SIGNAL = 1.0  # seconds for a signal that went to the child itself: two would end it at once


def call(command: Sequence[str], environment: Mapping[str, str], lock: IO) -> int:
    """Run a command, wait until it ends, and return its exit code.

    If a signal raises an exception here, the child is asked to stop and waited for.

    Args:
        environment: What the child gets.
        lock: An open file that the child holds, too, so that a lock on it lasts until both end.
    """
    reader, writer = os.pipe()
    try:
        process = subprocess.Popen(
            command,
            env={**environment, PIPE: str(reader)},
            pass_fds=(reader, lock.fileno()),
            start_new_session=True,  # a Ctrl-C reaches it through the pipe alone
        )
    finally:
        os.close(reader)
    try:
        return process.wait()
    finally:
        os.close(writer)
        process.wait()


def follow_parent(received: Sequence[int]) -> None:
    """Let this process get a SIGTERM when its parent stops, if it is the child of call().

    received: the signals that this process has had; after one of them it gets none from here
    """
    pipe = os.environ.pop(PIPE, None)  # children of this process have nothing to do with it
    if pipe is not None:
        threading.Thread(target=stop_with_pipe, args=(int(pipe), received), daemon=True).start()


def stop_with_pipe(pipe: int, received: Sequence[int]) -> None:
    """Wait until a pipe closes, then send a SIGTERM to this process unless it has had a signal."""
    os.read(pipe, 1)
    time.sleep(OWN_SIGNAL)
    if not received:
        os.kill(os.getpid(), signal.SIGTERM)
