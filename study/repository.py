"""What each file of the study imports first: the way to all modules, and how threads wait."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "study"), str(ROOT / "benchmarks")]
import infra.waiting  # noqa: E402, F401
