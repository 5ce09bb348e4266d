"""A process that ends with the one that started it."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # of Linux's prctl


def end_with_parent(number: int = signal.SIGKILL) -> None:
    """Let the system send this process a signal when its parent ends, however it ends.

    On Linux. More exactly, it is sent when the thread ends that started this process.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it ended in between, and nothing will be sent
        os.kill(os.getpid(), number)
