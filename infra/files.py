"""Files and folders that are whole or absent, and what is read from them.

A file takes the place of a file alone. A folder takes the place of another only if its writer asks
for that, and is kept if it has more than the new one.
"""

import errno
import importlib.util
import json
import os
import re
import reprlib
import shutil
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from infra.errors import in_short

UNFINISHED = ".writing"  # ends the name of what is not whole yet
NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


# ---- Whole or absent
@contextmanager
def written_whole(path: Path, must_be_new: bool = False) -> Iterator[Path]:
    """Yield a temporary path for a file, which takes the place of the file at `path` at the end.

    Until then, and if the block fails, whatever stood at `path` stays. OSError says why the file
    could not be written.

    Args:
        path: File; ValueError if it is a folder.
        must_be_new: Raise FileExistsError if another process has made the file in the meantime.
    """
    path = Path(path)
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder, which stays as it is; name a file")
    suffix = f".{os.getpid()}{UNFINISHED}" if must_be_new else UNFINISHED
    with made_beside(path, suffix) as temporary:
        yield temporary
    if not must_be_new:
        temporary.replace(path)
        return
    try:
        os.link(temporary, path)
    finally:
        temporary.unlink()


@contextmanager
def folder_written_whole(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary path for a folder, which takes the place of `path` at the end.

    Until then, and if the block fails, whatever stood at `path` stays. OSError says why the folder
    could not be written.

    Args:
        path: Folder; ValueError if it is a file, or if it has files and may not be replaced.
        overwrite: Replace a folder. One that has files which the new one lacks is kept under
            another name.
    """
    path = Path(path)
    check_free(path, overwrite)
    with made_beside(path, UNFINISHED) as temporary:
        yield temporary
    put_in_place(temporary, path)


def check_free(path: Path, overwrite: bool = False) -> None:
    """Raise ValueError if no folder can be written at a path."""
    if os.path.lexists(path) and not os.path.isdir(path):
        raise ValueError(f"{path} is a file, which stays as it is; name another folder")
    for parent in path.absolute().parents:
        if os.path.lexists(parent) and not os.path.isdir(parent):
            raise ValueError(f"{parent} is a file and cannot hold {path}; name another folder")
    if not overwrite and os.path.isdir(path) and os.listdir(path):
        raise ValueError(
            f"{path} has files in it, which stay as they are; name another folder, or replace "
            "this one with --overwrite"
        )


@contextmanager
def made_beside(path: Path, suffix: str) -> Iterator[Path]:
    """Yield the path with a suffix, under which something is made; remove it if the block fails."""
    temporary = path.with_name(f"{path.name}{suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(temporary)  # what a process left that was killed
        yield temporary
        flush_to_disk(temporary)
    except BaseException as error:
        remove(temporary)
        if is_of_writing(error):
            raise cannot_write(path, error) from error
        raise


def put_in_place(new: Path, path: Path) -> None:
    """Let a new folder take a path, and remove the folder that stands there.

    If that has files which the new one lacks, it is kept under another name.
    """
    if not os.path.isdir(path):
        new.rename(path)
        return
    old = free_name(path.with_name(f"{path.name}.before"))
    path.rename(old)
    new.rename(path)
    lost = sorted(names_below(old) - names_below(path))
    if lost:
        print(f"the folder that {path} replaces has {lost[0]}, too; it is kept as {old}")
    else:
        remove(old)


def free_name(path: Path) -> Path:
    """Return the path, or the first of path-2, path-3 … under which nothing stands."""
    candidate = path
    number = 1
    while os.path.lexists(candidate):
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def names_below(folder: Path) -> set[str]:
    """Return the paths of all files in a folder, relative to it."""
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if not file.is_dir()}


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there; of a link, the link."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        path.unlink()


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or all files of a folder, are on the disk."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    for file in files:
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())


def write_json(path: Path, value: dict, must_be_new: bool = False) -> None:
    """Write a JSON file, whole or not at all."""
    with written_whole(path, must_be_new) as temporary:
        temporary.write_text(json.dumps(value, indent=1))


# ---- What could not be written
def error_number(error: BaseException) -> int | None:
    """Return the system's number of an error, which libraries give in the text alone; or None."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = re.search(r"\[Errno (\d+)\]|os error (\d+)", str(error))  # Python's, and Rust's
    return int(found[1] or found[2]) if found else None


def is_of_writing(error: BaseException) -> bool:
    """Return whether an error may be one of the disk; torch reports those as RuntimeError."""
    is_of_system = isinstance(error, Exception) and error_number(error) is not None
    return is_of_system or isinstance(error, (OSError, RuntimeError))


def cannot_write(path: Path, error: BaseException) -> OSError:
    """Return the error for something that could not be written: it says why, and what to do."""
    number = error_number(error)
    if number in NO_PERMISSION:
        return OSError(
            f"could not write {path}: no permission ({os.strerror(number)}); change whose the "
            "folder is or what it allows, or name another"
        )
    reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    if number is not None and number not in NO_ROOM:
        return OSError(
            f"could not write {path}: {os.strerror(number)}; name another file or folder"
        )
    folder = next(parent for parent in path.absolute().parents if os.path.exists(parent))
    room = f"{shutil.disk_usage(folder).free / 1e6:.0f} MB free there"
    hint = "what was saved before is whole; make room, then go on (a training: --resume)"
    return OSError(f"could not write {path} ({room}): {reason}; {hint}")


# ---- Reading; ValueError says where a file is not what was expected
def read_text(path: str | Path, kind: str) -> str:
    """Return the text of a file.

    kind: what the file should be, for the error: `the settings of a run`
    """
    path = need_file(path, kind)
    return decode(path.read_bytes(), str(path), kind)


def read_json(path: str | Path, kind: str) -> dict:
    """Return the object that a JSON file holds; kind as for read_text."""
    path = need_file(path, kind)
    return parse_object(path.read_bytes(), str(path), kind)


def read_json_lines(path: str | Path, kind: str, may_be_cut: bool = False) -> list[dict]:
    """Return the objects of a file that holds one a line; empty lines do not count.

    kind: as for read_text
    may_be_cut: leave out a last line without an end: whoever wrote it was killed
    """
    path = need_file(path, kind)
    objects = []
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            is_cut = may_be_cut and not line.endswith(b"\n")
            if line.strip() and not is_cut:
                objects.append(parse_object(line, f"{path}, line {number}", kind))
    return objects


def need_keys(objects: list[dict], path: Path, keys: list[str]) -> None:
    """Raise ValueError for an object of a file that lacks one of the keys."""
    for number, each in enumerate(objects, 1):
        missing = [key for key in keys if key not in each]
        if missing:
            raise ValueError(f"{path}, object {number}: expected one with {', '.join(missing)}")


def need_file(path: str | Path, kind: str) -> Path:
    """Return the path of a file; ValueError if there is none."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; expected {kind}")
    if not path.exists():
        raise ValueError(f"{path} does not exist; expected {kind}")
    return path


def decode(content: bytes, place: str, kind: str) -> str:
    """Return bytes as text; ValueError if they are not UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{place}: byte {content[error.start]:#04x} is not UTF-8; "
            f"expected {kind}, saved as UTF-8"
        ) from error


def parse_json(content: bytes, place: str, kind: str) -> object:
    """Return the value that JSON stands for."""
    text = decode(content, place, kind)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # nested too deeply; or too long a number
        raise ValueError(
            f"{place}: {shown(text)} is not JSON ({error}); expected {kind}"
        ) from error


def parse_object(content: bytes, place: str, kind: str) -> dict:
    """Return the object that JSON stands for, a dict."""
    value = parse_json(content, place, kind)
    if not isinstance(value, dict):
        raise ValueError(f"{place}: {shown(value)} is no object; expected {kind}")
    return value


def shown(value: object) -> str:
    """Return a value as an error shows it: a line, not too long."""
    return SHORT.repr(value)


SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 80


# ---- Code of users
def import_file(path: str) -> ModuleType:
    """Import a Python file that is in no package; ValueError names the line at which it fails."""
    spec = importlib.util.spec_from_file_location(f"file_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    with blamed_on(path, "at its import"):
        spec.loader.exec_module(module)
    return module


@contextmanager
def blamed_on(path: str, occasion: str) -> Iterator[None]:
    """Make whatever a user's file raises a ValueError that names the file and its line.

    sys.exit() counts as an error, too: it would end the run as if that were complete.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        line = line_in(path, error)
        place = f"{path}, line {line}" if line else path
        raise ValueError(
            f"{place}: {type(error).__name__}: {in_short(error)} ({occasion})"
        ) from error


def line_in(path: str, error: BaseException) -> int | None:
    """Return the line of a file where an error came from, None if it came from elsewhere."""
    if isinstance(error, SyntaxError) and error.filename and is_same(path, error.filename):
        return error.lineno
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if is_same(path, frame.filename)]
    return lines[-1] if lines else None


def is_same(path: str, other: str) -> bool:
    return os.path.realpath(path) == os.path.realpath(other)
