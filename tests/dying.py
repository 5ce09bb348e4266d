"""Run a script in a process that dies when it comes to a point for so many times.

python tests/dying.py POINT COUNT SCRIPT ARGUMENT ...
"""

import os
import runpy
import signal
import sys

import torch

from infra import runs

point, count, *sys.argv = sys.argv[1:]
calls = 0


def dying(real, before=lambda *_: None):
    """Return a function that does what another does, until its process dies of the call number `count`."""

    def wrapped(*arguments, **options):
        global calls
        calls += 1
        if calls == int(count):
            before(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)

    return wrapped


def half_a_file(_state, stream):
    stream.write(b"half")
    stream.flush()


if point == "update":
    torch.optim.AdamW.step = dying(torch.optim.AdamW.step)
if point == "half a checkpoint":
    torch.save = dying(torch.save, half_a_file)
if point == "before the rename":
    os.fsync = dying(os.fsync)
if point == "between log and checkpoint":
    runs.Run.save = dying(runs.Run.save)
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
