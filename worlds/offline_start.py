"""The offline start of an embedded world, which train_rl.py runs before its first step."""

import os
import sys
from pathlib import Path
from typing import IO

from flow import FLOW_FILE
from infra import children
from worlds.shared import locked

# What torchrun tells a rank
RANK_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


def make_flow(model: str, folder: str) -> None:
    """Run the offline start of an embedded world, in one process, unless it has been run."""
    with locked(Path(f"{folder}.lock")) as lock:
        if not Path(folder, "flow", FLOW_FILE).exists():
            run_offline_start(model, folder, lock)


def run_offline_start(model: str, folder: str, lock: IO) -> None:
    """Run train_flow.py in a process of its own, or go on with it if it was interrupted.

    That process shares `lock`: no other start comes beside it, even if this process is killed.
    """
    has_begun = Path(folder, "config.json").exists()
    script = str(Path(__file__).parents[1] / "train_flow.py")
    command = [sys.executable, script, "--resume" if has_begun else "--folder", folder]
    environment = {}
    for variable, value in os.environ.items():
        if variable not in RANK_VARIABLES and "TORCHELASTIC" not in variable:
            environment[variable] = value
    code = children.call([*command, "--model", model], environment, lock)
    if code:
        raise RuntimeError(
            f"the offline start in {folder} ended with exit code {code}, see its error above; "
            "the same command goes on with it"
        )
    if not Path(folder, "flow", FLOW_FILE).exists():
        raise ValueError(
            f"the offline start in {folder} was stopped before its end; "
            "the same command goes on with it"
        )
