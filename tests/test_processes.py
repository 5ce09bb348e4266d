"""Processes that end with the one that started them."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

CHILD = """
import os, signal, sys, time
from infra.processes import end_with_parent

def answer(*_):
    os.write(1, b"asked\\n")  # a print would fail where the signal comes amid another print
    sys.exit()

end_with_parent(int(sys.argv[1]))
signal.signal(signal.SIGTERM, answer)
print("ready", flush=True)
time.sleep(120)
"""
PARENT = """
import subprocess, sys

subprocess.run([sys.executable, "-c", *sys.argv[1:]])
"""


@pytest.mark.parametrize(
    ("number", "last_words"), [(signal.SIGKILL, ""), (signal.SIGTERM, "asked\n")]
)
def test_a_child_ends_with_its_parent(number, last_words):
    command = [sys.executable, "-c", PARENT, CHILD, str(int(number))]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "ready\n"
        os.kill(parent.pid, signal.SIGKILL)
        # the pipe is the child's, too: it closes when both are gone
        assert parent.communicate(timeout=60)[0] == last_words
