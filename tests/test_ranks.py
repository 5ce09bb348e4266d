"""What ranks tell each other beside collectives: who is stopped or stuck, and that a signal came."""

import os
import signal
import subprocess
import sys
import threading

import forks
import pytest
from conftest import ROOT
from test_distributed import TIMEOUT

from infra.ranks import PATIENCE, Beats


def beat(number: int, collectives: int) -> dict:
    return {
        "number": number, "process": 7, "host": "a", "collectives": collectives, "place": "in f, x.py:3",
    }  # fmt: skip


def test_a_rank_that_gives_no_sign_is_named_once_and_when_it_goes_on():
    known = Beats(3)
    told = []
    for second in range(0, 200, 10):
        is_stopped = 20 <= second < 120
        numbers = [second, 1 if is_stopped else second, second]
        beats = [beat(number, 5) for number in numbers]
        for line in known.look(beats, float(second)):
            told.append((second, known.speaker(), line))
    assert told == [
        (80, 0, "rank 1 (process 7 on a) has given no sign of life for 60 s: is it stopped, or its machine lost?"),
        (120, 0, "rank 1 (process 7 on a) goes on"),
    ]  # fmt: skip


def test_the_rank_that_others_wait_for_is_named_and_does_not_speak():
    known = Beats(3)
    told = []
    for second in range(0, 100, 10):
        counts = [4, 5, 5] if second < 90 else [6, 6, 6]
        for line in known.look([beat(second, count) for count in counts], float(second)):
            told.append((second, known.speaker(), line))
    assert told == [
        (60, 1, "rank 0 (process 7 on a) lets the others wait for 60 s already; it is in f, x.py:3"),
        (90, 0, "rank 0 (process 7 on a) goes on"),
    ]  # fmt: skip


def test_ranks_that_take_turns_at_being_late_are_not_named():
    known = Beats(2)
    for second in range(0, 600, 10):
        step = second // 40  # a step of 40 s, in which rank 0 and rank 1 are late in turns
        late = step % 2
        counts = [step + (rank != late) for rank in range(2)]
        assert known.look([beat(second, count) for count in counts], float(second)) == []
    assert PATIENCE == 60


SCRIPT = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
import torch.distributed as dist
from infra import ranks, runs

ranks.INTERVAL, ranks.PATIENCE, runs.GRACE = 0.2, 1.0, 0.2
from infra import parallel

parallel.start()
runs.listen()
# in one write: the ranks share a pipe, where print() may write word by word
os.write(1, f"rank {dist.get_rank()} is {os.getpid()}\\n".encode())
while dist.get_rank() == 1:
    time.sleep(0.05)
parallel.on_first(lambda: None)
"""


@pytest.mark.distributed
def test_a_stuck_and_a_stopped_rank_are_named_and_a_signal_to_another_ends_both(tmp_path):
    """Rank 0 waits in a collective, where Python heeds nothing, for rank 1: for hours, and silently."""
    script = tmp_path / "wait.py"
    script.write_text(SCRIPT)
    process = forks.torchrun(script, [str(ROOT)])
    pids = {}
    while len(pids) < 2:
        words = read_until(process, "rank ").split()
        pids[int(words[1])] = int(words[3])
    name = f"rank 1 (process {pids[1]} on "
    assert name in read_until(process, "lets the others wait for")
    os.kill(pids[1], signal.SIGSTOP)
    assert name in read_until(process, "has given no sign of life")
    os.kill(pids[1], signal.SIGCONT)
    read_until(process, "lets the others wait for")
    os.kill(pids[0], signal.SIGTERM)
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, output
    assert "stopped; the same command starts again" in output


def read_until(process: forks.Run, words: str) -> str:
    """Return the next line of a process that holds these words; a process that hangs is killed."""
    lines = []
    watchdog = threading.Timer(TIMEOUT, process.kill)
    watchdog.start()
    try:
        for line in process.stdout:
            lines.append(line)
            if words in line:
                return line
    finally:
        watchdog.cancel()
    raise AssertionError(f"the process ended without {words!r}: {''.join(lines)}")


AGENT = """
import subprocess, sys

subprocess.run([sys.executable, "-c", sys.argv[1]])
"""
RANK = "import time; from infra import parallel; parallel.start(); print('started', flush=True); time.sleep(120)"


def test_a_rank_ends_with_its_torchrun():
    """It outlived a torchrun that was killed, and waited for hours for the other ranks."""
    environment = os.environ | {"TORCHELASTIC_RUN_ID": "1"}
    command = [sys.executable, "-c", AGENT, RANK]
    streams = {"stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **streams) as agent:
        assert agent.stdout.readline() == "started\n"
        os.kill(agent.pid, signal.SIGKILL)
        output, _ = agent.communicate(timeout=60)  # the pipe closes when both are gone
    assert output == ""
