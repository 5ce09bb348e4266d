"""Files and folders that are whole or absent, and locks: what all that writes to the disk stands on.

Until something is written whole, what stood in its place stays.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path, must_be_new: bool = False) -> Iterator[Path]:
    """Yield a temporary path for a file or folder, which takes the place of `path` at the end.

    Until then, and if the block fails, whatever stood at `path` stays. With must_be_new, a file
    that another process has made in the meantime is a FileExistsError. OSError names the room left.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.writing")
    if must_be_new:  # another process may be about to make the same file
        temporary = path.with_name(f"{path.name}.{os.getpid()}.writing")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove(temporary)
    try:
        yield temporary
        flush_to_disk(temporary)
    except BaseException as error:
        remove(temporary)
        if isinstance(error, (OSError, RuntimeError)):  # torch reports a full disk as the latter
            raise cannot_write(path, error) from error
        raise
    if must_be_new:
        try:
            os.link(temporary, path)
        finally:
            temporary.unlink()
    elif path.is_dir():
        outdated = path.with_name(f"{path.name}.outdated")
        remove(outdated)
        path.rename(outdated)
        temporary.rename(path)
        remove(outdated)
    else:
        temporary.replace(path)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that one process of this machine has at a time; the others wait, and say so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another run works on {path.with_suffix('')}; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or all files of a folder, are on the disk."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    for file in files:
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())


def cannot_write(path: Path, error: BaseException) -> OSError:
    """Return the error for something that could not be written; it says how much room there is."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    folder = next(parent for parent in path.parents if parent.exists())
    room = f"{shutil.disk_usage(folder).free / 1e6:.0f} MB free there"
    hint = "what was saved before is whole; make room, then go on (a training: --resume)"
    return OSError(f"could not write {path} ({room}): {reason}; {hint}")


def write_json(path: Path, value: dict, must_be_new: bool = False) -> None:
    """Write a JSON file, whole or not at all."""
    with written_whole(path, must_be_new) as temporary:
        temporary.write_text(json.dumps(value, indent=1))
