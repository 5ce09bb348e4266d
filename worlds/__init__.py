"""The embedded worlds, and their offline start: what the commands need of them.

python -m worlds --folder runs/toy
"""

from worlds.offline_start import make_flow
from worlds.toy import PRESETS, find_world

__all__ = ["PRESETS", "find_world", "make_flow"]
