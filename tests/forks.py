"""Processes that run a script at once: forks of one process that has imported torch and the scripts.

A command line takes 6 s of a core for its imports, and as much again for each rank of torchrun. From
there on a forked process does what the command does: it has its own arguments, environment, output,
signals and exit code. Where the start itself is tested, tests run the command.
"""

import math
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from multiprocessing.connection import wait
from multiprocessing.reduction import DupFd
from pathlib import Path
from types import SimpleNamespace

import torch.distributed.run as launcher
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

ROOT = Path(__file__).parents[1]
TORCHRUN = "torchrun"  # stands for a script
IMPORTED = ["infra.waiting", "train_rl", "train_flow", "eval", "forks"]
CONTEXT = multiprocessing.get_context("forkserver")


# ---- In the forked process
def run(script: str, arguments: list[str], environment: dict[str, str], files: list[int]) -> None:
    """Become the command `python script argument ...`, with its output in the first of the files."""
    for number in (1, 2):
        os.dup2(files[0], number)
    multiprocessing.current_process().daemon = False  # it may have children
    # what it would spawn, which imports torch anew, is forked, too
    contexts = multiprocessing.context._concrete_contexts
    contexts["spawn"] = contexts["fork"]
    become([script, *arguments], environment)


def become(command: list[str], environment: dict[str, str]) -> None:
    """Run a script as the main program, or torchrun, which forks its ranks."""
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = command
    if command[0] == TORCHRUN:
        subprocess_handler.Popen = Rank
        launcher.main()
        return
    elsewhere = [folder for folder in sys.path if not Path(folder).is_relative_to(ROOT)]
    sys.path[:] = [str(Path(command[0]).parent), *elsewhere]  # as a command has it
    runpy.run_path(command[0], run_name="__main__")


class Rank:
    """What torchrun has of a rank that it starts: of subprocess.Popen what it calls."""

    def __init__(self, args: list[str], env: dict[str, str], **_):
        sys.stdout.flush()
        self.returncode = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):  # torchrun has handlers
                signal.signal(number, signal.SIG_DFL)
            become([word for word in args[1:] if word != "-u"], env)
            os._exit(0)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a rank", timeout)
            time.sleep(0.01)
        return self.returncode


# ---- In the tests' process
class Inherited:
    """An open file of this process; in the forked one it is the number of its copy there."""

    def __init__(self, file: int):
        self.file = file

    def __reduce__(self):
        return detach, (DupFd(self.file),)


def detach(copy) -> int:
    """Return the number of an inherited file."""
    return copy.detach()


def start_server() -> None:
    """Start the process that forks, unless it runs: it alone waits for the imports."""
    before = os.environ.copy()
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    CONTEXT.set_forkserver_preload(IMPORTED)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


class Popen:
    """As subprocess.Popen of [python, script, argument, ...]; several environments make ranks."""

    def __init__(self, command: list[str], *, stdout, env, pass_fds=(), **_):
        start_server()
        _, script, *arguments = command
        files = [Inherited(file) for file in (stdout.fileno(), *pass_fds)]
        self.ranks = []
        for environment in env if isinstance(env, list) else [env]:
            work = (script, arguments, dict(environment), files)
            self.ranks.append(CONTEXT.Process(target=run, args=work, daemon=True))
            self.ranks[-1].start()
        self.pid = self.ranks[0].pid
        self.is_late = False  # was it ended after a timeout?

    def poll(self) -> int | None:
        """None while a rank runs, and then the first code that is not 0."""
        codes = [rank.exitcode for rank in self.ranks]
        return None if None in codes else next(filter(None, codes), 0)

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def send_signal(self, number: int) -> None:
        for rank in self.ranks:
            if rank.exitcode is None:
                os.kill(rank.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float = math.inf) -> int:
        """Wait for all ranks, of which one that fails ends the others; end all after the timeout."""
        deadline = time.monotonic() + timeout
        while running := [rank for rank in self.ranks if rank.exitcode is None]:
            wait([rank.sentinel for rank in running], timeout=min(timeout, 1))
            self.is_late = time.monotonic() > deadline
            if self.is_late or any(rank.exitcode for rank in self.ranks):
                for rank in running:
                    rank.kill()
                    rank.join()
        return self.poll()


class Run(Popen):
    """A script of the repository whose output is kept, on one rank or on several."""

    def __init__(self, script, arguments: list[str], n_ranks: int = 1, **variables: str):
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
        env = environment if n_ranks == 1 else environments_of_ranks(environment, n_ranks)
        path = script if script == TORCHRUN else str(ROOT / script)
        reader, writer = os.pipe()
        self.stdout = os.fdopen(reader)
        with os.fdopen(writer, "w") as output:
            super().__init__([sys.executable, path, *arguments], stdout=output, env=env)

    def communicate(self, timeout: float = math.inf) -> tuple[str, None]:
        """Wait for the end, as wait() does, and return what all ranks printed."""
        waiter = threading.Thread(target=self.wait, args=(timeout,))
        waiter.start()
        printed = self.stdout.read()
        waiter.join()
        return printed, None


def environments_of_ranks(environment: dict[str, str], n_ranks: int) -> list[dict[str, str]]:
    """Return what torchrun gives to each rank of a machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"WORLD_SIZE": str(n_ranks), "LOCAL_WORLD_SIZE": str(n_ranks)}
    return [
        environment | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        for rank in range(n_ranks)
    ]


def call(command, *, env=None, timeout=math.inf, **_) -> subprocess.CompletedProcess:
    """As subprocess.run of [python, script, argument, ...] with its output captured, as one text."""
    process = Run(command[1], command[2:], **(env or {}))
    output, _ = process.communicate(timeout)
    if process.is_late:
        raise subprocess.TimeoutExpired(command, timeout)
    return subprocess.CompletedProcess(command, process.returncode, output, output)


# For the `subprocess` of a module that starts scripts
SUBPROCESS = SimpleNamespace(
    Popen=Popen, run=call, STDOUT=subprocess.STDOUT, TimeoutExpired=subprocess.TimeoutExpired
)


def torchrun(script, arguments: list[str], n_ranks: int = 2) -> Run:
    """Start torchrun on this machine: a forked agent that forks its ranks."""
    options = ["--standalone", "--nproc-per-node", str(n_ranks)]
    return Run(TORCHRUN, [*options, str(ROOT / script), *arguments])
