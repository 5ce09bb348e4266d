"""What each benchmark imports first: the way to the repository's modules, and how threads wait."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import infra.waiting  # noqa: E402, F401
