"""Checkpoints of torch.distributed.checkpoint, read without running code that somebody put there.

A checkpoint is a folder: `.metadata`, a pickle, says where in which file each tensor stands; the
files of the ranks hold tensors and, as pickles, the values that are no tensors. torch would run any
code that these pickles name. Here they can name what a checkpoint needs; anything else is refused.
"""

import enum
import io
import pickle
import zipfile
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from infra.errors import first_line

METADATA = ".metadata"
# What the metadata of a checkpoint may name, by module; besides these, torch's dtypes
KNOWN = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"Path", "PosixPath"},  # of the folder that it was written to
    "pathlib._local": {"Path", "PosixPath"},
}


class DamagedError(ValueError):
    """A checkpoint is not whole, or holds code."""


class Unpickler(pickle.Unpickler):
    """An unpickler that knows what the metadata of a checkpoint needs, and nothing else."""

    def find_class(self, module: str, name: str):
        """Return a class by its name; UnpicklingError if no checkpoint needs it."""
        if (module, name) == ("builtins", "getattr"):
            return member_of
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in KNOWN.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not loaded")
        return super().find_class(module, name)


def member_of(kind: type, name: str) -> enum.Enum:
    """Return a member of an enumeration, which Python 3.11.0 to 3.11.3 write as a call of getattr."""
    if not (isinstance(kind, enum.EnumMeta) and name in kind.__members__):
        raise pickle.UnpicklingError(f"it names an attribute {name} that is no member")
    return kind[name]


def damaged(file: Path, reason: str) -> DamagedError:
    """Return the error for a file of a checkpoint."""
    return DamagedError(f"checkpoint {file.parent} is damaged ({file.name}: {reason})")


def read_metadata(folder: Path) -> dcp.Metadata:
    """Read what a checkpoint holds and where; DamagedError if that is torn, or would run code."""
    file = Path(folder) / METADATA
    if not file.is_file():
        raise damaged(file, "there is no such file")
    if not file.stat().st_size:
        raise damaged(file, "it is empty")
    try:
        with open(file, "rb") as stream:
            metadata = Unpickler(stream).load()
    except Exception as error:  # a torn pickle raises whatever it meets
        raise damaged(file, first_line(error)) from error
    if not is_metadata(metadata):
        raise damaged(file, "it does not say what the checkpoint holds")
    return metadata


def is_metadata(value) -> bool:
    """Return whether a value says what a checkpoint holds, and where in its files."""
    entries = getattr(value, "storage_data", None)
    if not isinstance(value, dcp.Metadata) or not isinstance(entries, dict):
        return False
    for entry in entries.values():
        path = getattr(entry, "relative_path", None)
        sizes = (getattr(entry, "offset", None), getattr(entry, "length", None))
        is_own_file = isinstance(path, str) and Path(path).name == path
        if not is_own_file or not all(isinstance(size, int) and size >= 0 for size in sizes):
            return False
    return True


def check_sizes(folder: Path) -> None:
    """Raise DamagedError unless all files of a checkpoint are there and long enough."""
    ends: dict[str, int] = {}
    for entry in read_metadata(folder).storage_data.values():
        end = entry.offset + entry.length
        ends[entry.relative_path] = max(end, ends.get(entry.relative_path, 0))
    for name, end in sorted(ends.items()):
        file = folder / name
        if not file.is_file():
            raise damaged(file, "there is no such file")
        size = file.stat().st_size
        if size < end:
            state = f"{size} of {end} bytes" if size else "it is empty"
            raise damaged(file, state)


def is_whole(folder: Path) -> bool:
    """Return whether all files of a checkpoint are there and long enough."""
    try:
        check_sizes(folder)
    except DamagedError:
        return False
    return True


def check_contents(folder: Path, rank: int, n_ranks: int) -> None:
    """Raise DamagedError unless a rank's share of a checkpoint has the bytes that were written.

    Each entry is a file of torch.save, which holds a checksum of each of its parts.
    """
    entries = read_metadata(folder).storage_data.values()
    ordered = sorted(entries, key=lambda entry: (entry.relative_path, entry.offset))
    for entry in ordered[rank::n_ranks]:
        file = folder / entry.relative_path
        with open(file, "rb") as stream:
            stream.seek(entry.offset)
            content = io.BytesIO(stream.read(entry.length))
        try:
            broken = zipfile.ZipFile(content).testzip()
        except Exception as error:  # bytes that are no archive raise whatever they meet
            raise damaged(file, f"{first_line(error)} at byte {entry.offset}") from error
        if broken:
            raise damaged(file, f"other bytes than were written, from byte {entry.offset}")


def names_in(folder: Path) -> list[str]:
    """Return the names of all values of a checkpoint."""
    return list(read_metadata(folder).state_dict_metadata)


class Reader(dcp.FileSystemReader):
    """Reads the files of a checkpoint; its metadata can name nothing but what that needs."""

    def read_metadata(self) -> dcp.Metadata:
        """Read the metadata, which all ranks share."""
        metadata = read_metadata(Path(self.path))
        metadata.storage_meta = dcp_metadata.StorageMeta(load_id=self.load_id)
        return metadata


class Planner(DefaultLoadPlanner):
    """Puts what was read into a state; values other than tensors are numbers, texts and lists."""

    def load_bytes(self, read_item, value: io.BytesIO) -> None:
        """Put a value that is no tensor in its place."""
        loaded = torch.load(value, weights_only=True)
        place = self.mappings[read_item.dest_index.fqn]
        set_element(self.original_state_dict, place, loaded)


def load(state: dict, folder: Path, **options) -> None:
    """Load a checkpoint into a state; all ranks together.

    Args:
        state: as torch.distributed.checkpoint takes it.
        folder: the checkpoint.
        options: process_group and no_dist, of torch.distributed.checkpoint.load().

    Raises:
        ValueError: it is damaged, holds code, or is of another model.
    """
    reader = Reader(folder)
    try:
        dcp.load(state, storage_reader=reader, planner=Planner(), **options)
    except CheckpointException as error:  # no Exception; it holds those of all ranks
        cause, _ = next(iter(error.failures.values()))
        raise ValueError(f"checkpoint {folder} cannot be loaded: {first_line(cause)}") from error
