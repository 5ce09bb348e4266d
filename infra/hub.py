"""Data on the hub: a repository may hold several sets, of which ORG/NAME/PATH names one.

PATH is a file or a folder of the repository, or a name that its `dataset_info.json` gives to one
(LLaMA-Factory's way). Images are relative to the repository, wherever in it the set stands.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import snapshot_download

from infra.errors import first_line
from infra.files import read_json, shown

REGISTRY = "dataset_info.json"
# What --data takes, for errors
SOURCES = (
    "a JSONL or Parquet file, a folder or a hub id, perhaps with a file or folder of that "
    "repository: ORG/NAME/PATH"
)
# ORG/NAME, and what follows it
PLACE = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(/[^/].*)?")


class Place(NamedTuple):
    """A file or folder of a repository, or with an empty path all of it."""

    repository: str
    path: str


def parse(source: str) -> Place | None:
    """Read ORG/NAME or ORG/NAME/PATH; None if it is something else, as a path in a folder here."""
    match = PLACE.fullmatch(source)
    is_here = Path(source).exists() or (match and match[2] and Path(source).parents[-2].is_dir())
    if match is None or is_here:
        return None
    return Place(match[1], (match[2] or "").strip("/"))


def find_data(source: str) -> str:
    """Return the local path of ORG/NAME/PATH, downloaded unless it is there.

    FOLDER/NAME, where the folder's `dataset_info.json` has NAME, becomes the path of that set. Any
    other source is returned as it is.

    Raises:
        ValueError: the repository cannot be read, or holds nothing of that name.
    """
    place = parse(source)
    if place is None:
        folder, name = Path(source).parent, Path(source).name
        named = None if Path(source).exists() else read_registry(folder / REGISTRY).get(name)
        return str(folder / named) if named else source
    repository, path = place
    if not path:
        return source
    root = download(source, repository, (REGISTRY, path, f"{path}/*"))
    if not (root / path).exists():
        path = read_registry(root / REGISTRY).get(path, path)
        root = download(source, repository, (path, f"{path}/*"))
    if not (root / path).exists():
        raise ValueError(
            f"no data at {source!r}: of {repository} there is {sorted(os.listdir(root))[:9]}, and "
            f"no {path}; expected a file or folder of that repository, or a name in its {REGISTRY}"
        )
    return str(root / path)


def media_folder(source: str, names_files: bool) -> str:
    """Return the folder that images of a data set are relative to: the data's, or the repository.

    A repository of the hub is downloaded whole if the data set names files of images: nothing says
    where in it they are.
    """
    place = parse(source)
    if place is not None:
        return str(download(source, place.repository, None)) if names_files else "."
    path = Path(source)
    return str(path if path.is_dir() else path.parent)


def read_registry(file: Path) -> dict[str, str]:
    """Return what stands under each name of a `dataset_info.json`; nothing if there is none."""
    if not file.is_file():
        return {}
    kind = "names of sets, each with its file_name"
    paths = {}
    for name, entry in read_json(file, kind).items():
        if not isinstance(entry, dict):
            raise ValueError(f"{file}: {name!r} is {shown(entry)}; expected {kind}")
        if "file_name" in entry:
            paths[name] = entry["file_name"]
    return paths


def download(source: str, repository: str, patterns: Sequence[str] | None) -> Path:
    """Return the local copy of a repository with the files that match, or with all of them."""
    try:
        return Path(snapshot_download(repository, repo_type="dataset", allow_patterns=patterns))
    except Exception as error:  # whatever the transport raises
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"no data at {source!r} ({reason}); expected {SOURCES}") from error
