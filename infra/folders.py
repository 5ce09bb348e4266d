"""Who may write into a folder: one process at a time, which claims it.

A run, an evaluation and the offline start each claim their folder before they write anything there.
The lock is one of POSIX on the file .lock: it goes with the process, however that ends, and workers
that the process forks do not have it.
"""

import errno
import fcntl
import os
import shlex
import socket
import sys
from pathlib import Path
from typing import IO

from infra.files import UNFINISHED, cannot_write

LOCK = ".lock"  # in a folder that a process has claimed
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # said by some network file systems


class InUseError(ValueError):
    """Another process writes into a folder."""


# The lock files that a process holds, by its id, which a fork changes, and the file's place on the
# disk. They stay open: once a process closes a file, it has no POSIX lock of it any more.
held: dict[tuple[int, int, int], IO] = {}


def claim(folder: Path) -> None:
    """Make a folder, and hold it until this process ends or releases it.

    Raises:
        InUseError: another process holds the folder; the message says which.
    """
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if key_of(path) not in held:
            file = lock(path)  # it may make the file, which has no key before
            held[key_of(path)] = file
    except OSError as error:
        raise cannot_write(folder, error) from error


def lock(path: Path) -> IO:
    """Lock a file, write into it who has it, and return it open; InUseError if another has it."""
    file = open_and_lock(path)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}: {shlex.join(sys.argv)}\n")
    file.flush()
    return file


def open_and_lock(path: Path) -> IO:
    """Open a file and lock it; InUseError if another process has it locked."""
    file = open(path, "a+")  # noqa: SIM115, it stays open
    if not lock_if_free(file):
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise InUseError(
            f"{path.parent} is in use by {holder}; wait until that has ended, or name another "
            "folder"
        )
    return file


def check_unused(folder: Path) -> None:
    """Raise InUseError if another process holds a folder; change nothing."""
    path = folder / LOCK
    if key_of(path) is not None and key_of(path) not in held:
        open_and_lock(path).close()


def lock_if_free(file: IO) -> bool:
    """Lock a file unless another process has it locked; return whether nobody else has it."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            print(f"{file.name}: no locks on this file system; start no second run in the folder")
            return True
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    return True


def key_of(path: Path) -> tuple[int, int, int] | None:
    """Return the key of a file in `held`; None if there is no such file."""
    if not os.path.exists(path):
        return None
    status = os.stat(path)
    return os.getpid(), status.st_dev, status.st_ino


def release(folder: Path) -> None:
    """Let other processes write into a folder, if this one has claimed it."""
    key = key_of(folder / LOCK)
    if key in held:
        held.pop(key).close()


def is_free(folder: Path) -> bool:
    """Return whether something new may begin in a folder: it is not there, or nothing is in it.

    OSError says why a folder can neither be there nor be made, e.g. because its name is too long.
    """
    try:
        os.lstat(folder)
    except FileNotFoundError:
        return True
    except OSError as error:
        raise cannot_write(folder, error) from error
    return os.path.isdir(folder) and not contents(folder)


def contents(folder: Path) -> list[str]:
    """Return the names of what a folder holds, besides a lock and what was never finished."""
    return sorted(n for n in os.listdir(folder) if n != LOCK and not n.endswith(UNFINISHED))


def claim_free(folder: Path) -> Path:
    """Claim the first of folder, folder-2, folder-3 … that is free, and return it."""
    candidate = folder
    number = 1
    while not claim_if_free(candidate):
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def claim_if_free(folder: Path) -> bool:
    """Claim a folder if it is free and no other process holds it; return whether it was claimed."""
    if not is_free(folder):
        return False
    try:
        claim(folder)
    except InUseError:
        return False
    if is_free(folder):
        return True
    release(folder)  # a process has filled it since, and ended
    return False
