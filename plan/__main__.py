"""python -m plan, which `python run.py plan` starts in a process that sees no GPU."""

# first: torch reads what this sets when it is imported
import infra.waiting  # noqa: F401

# isort: split
import sys

from infra.runs import launch
from plan.command import Config, main
from worlds import PRESETS

if __name__ == "__main__":
    sys.argv[0] = "run.py plan"  # as --help names it
    launch(main, Config, PRESETS["train_rl"])
