"""The first SIGTERM or SIGINT ends a command soon and without an error; the second ends it at once.

A step, or another unit of work, is finished and saved: from asked_to_stop() on, a signal is noted.
Everywhere else, before the first step or after the last, the signal raises Stop where the command
stands. What is on the disk is whole there, and the next start goes on from it.

Python heeds a signal between two of its own instructions, so not while the main thread waits in a
collective. A thread of its own ends the process then.
"""

import os
import select
import signal
import sys
import threading

import torch
import torch.distributed as dist

from infra import ranks

SIGNALS = (signal.SIGTERM, signal.SIGINT)
GRACE = 5.0  # seconds that the main thread has to heed a signal
received: list[int] = []  # signals that it has heeded
unit: str | None = None  # of the work in progress; None: there is none to be finished
how_to_go_on = "the same command starts again"


class Stop(BaseException):
    """A signal came where no work is in progress; no Exception, which other code might catch."""


def listen() -> None:
    """Heed SIGTERM and SIGINT from now on."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)  # gets the number of each signal as soon as it comes
    threading.Thread(target=end_if_unheeded, args=(reader,), daemon=True).start()
    for number in SIGNALS:
        signal.signal(number, heed)
    os.register_at_fork(after_in_child=forget)


def forget() -> None:
    """Let signals end this process as they do without listen(): it is a child of the command."""
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def heed(number: int, _frame) -> None:
    """Note the first signal, or raise Stop; exit at the second."""
    if received:
        os._exit(128 + number)
    received.append(number)
    work = (
        f"finishing this {unit}, then saving" if unit else "stopping here, no step is in progress"
    )
    tell(f"\n{signal.Signals(number).name}: {work}; a second signal exits at once")
    if not unit:
        raise Stop


def end_if_unheeded(reader: int) -> None:
    """End the process if its main thread does not heed a signal, or at the second signal."""
    os.read(reader, 1)
    if not unit:
        has_second, _, _ = select.select([reader], [], [], GRACE)
        if not has_second and not received:
            leave()
    (second,) = os.read(reader, 1)
    os._exit(128 + second)


def leave() -> None:
    """End the process because a signal came, with code 0; say how to go on, on the first rank."""
    ranks.say_stopping()
    sys.stdout.flush()
    if os.environ.get("RANK", "0") == "0":
        tell(f"stopped; {how_to_go_on}")
    os._exit(0)


def tell(message: str) -> None:
    """Write a line to standard error; print() may be what a signal has interrupted."""
    os.write(2, f"{message}\n".encode())


def asked_to_stop(next_unit: str = "step") -> bool:
    """Begin a unit of work; return whether a signal came to any rank. All ranks ask together."""
    global unit
    unit = next_unit  # before they ask: a rank that raised Stop now would leave the others alone
    asked = torch.tensor(float(bool(received)))
    dist.all_reduce(asked)
    return bool(asked)


def end_work() -> None:
    """From here on there is nothing to be finished: a signal raises Stop."""
    global unit
    unit = None
    if received:
        raise Stop
