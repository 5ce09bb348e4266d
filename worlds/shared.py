"""What the embedded worlds share: labels of steps, folders that are made once, and a lock."""

import fcntl
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from infra.files import cannot_write, folder_written_whole, read_json
from infra.folders import is_free


class Step(NamedTuple):
    """A step of a response: the characters [start, end), and whether it is right."""

    start: int
    end: int
    is_right: bool


def make_once(path: str, settings: dict, write: Callable[[Path], None]) -> None:
    """Make the folder of a world unless it is there; it appears only when it is complete.

    Of several runs that ask for it at once, one makes it and the others wait.

    Args:
        path: The folder.
        settings: What the world is made with, for its world.json.
        write: Writes everything else into the folder that it is given, which does not exist yet.

    Raises:
        ValueError: if the folder holds something else, or a world of other settings.
    """
    folder = Path(path).resolve()  # `.` has no name to lock
    with locked(folder.with_name(f"{folder.name}.lock")):
        settings_file = folder / "world.json"
        if settings_file.exists():
            check_same(
                read_json(settings_file, "the settings of an embedded world"), settings, folder
            )
            return
        if not is_free(folder):
            raise ValueError(
                f"{folder} is not an embedded world, and stays as it is; name another folder"
            )
        with folder_written_whole(folder, overwrite=True) as making:
            write(making)
            (making / "world.json").write_text(json.dumps(settings))


def check_same(stored: dict, asked: dict, folder: Path) -> None:
    """Raise ValueError if a folder holds a world of other settings: runs and flows need that one."""
    names = sorted(asked.keys() | stored.keys())
    other = [name for name in names if stored.get(name) != asked.get(name)]
    if other:
        name = other[0]
        raise ValueError(
            f"{folder} holds an embedded world with other settings ({name}: {stored.get(name)}, "
            f"not {asked.get(name)}), which stays as it is; name another folder, or move that "
            "world away"
        )


@contextmanager
def locked(path: Path) -> Iterator[IO]:
    """Hold a lock that one process of this machine has at a time; the others wait, and say so.

    Processes that inherit the file which this yields hold the lock as well.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")  # noqa: SIM115, closed below
    except OSError as error:
        raise cannot_write(path.with_suffix(""), error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another run works on {path.with_suffix('')}; waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file
