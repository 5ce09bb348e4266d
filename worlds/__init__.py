"""The embedded worlds, and their offline start: what the commands need of them.

python -m worlds --folder runs/toy
"""

# first: torch reads what this sets when it is imported
import infra.waiting  # noqa: F401

# isort: split
from worlds.offline_start import make_flow
from worlds.toy import PRESETS, find_world

__all__ = ["PRESETS", "find_world", "make_flow"]
