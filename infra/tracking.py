"""Where else the figures of a run go: tensorboard or wandb (--track)."""

import json
from collections.abc import Sequence
from pathlib import Path


class Tracker:
    """Sends figures to tensorboard or wandb, besides metrics.jsonl; `none` sends nothing."""

    def __init__(self, kind: str, folder: Path, settings: dict):
        self.writer = None
        self.wandb_run = None
        if kind == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(folder / "tensorboard")
        if kind == "wandb":
            import wandb

            self.wandb_run = wandb.init(
                project="rlfr", name=folder.name, dir=str(folder), config=settings, resume="allow"
            )

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Send the figures of a step."""
        if self.writer:
            for name, value in metrics.items():
                self.writer.add_scalar(name, value, step)
        if self.wandb_run:
            self.wandb_run.log(metrics, step=step)

    def log_rollouts(self, columns: list[str], rows: list[list], step: int) -> None:
        """Send a table of a step's episodes, a row each."""
        if self.writer:
            self.writer.add_text("rollouts", markdown_table(columns, rows), step)
        if self.wandb_run:
            import wandb

            cells = [[to_cell(value) for value in row] for row in rows]
            self.wandb_run.log({"rollouts": wandb.Table(columns, cells)}, step=step)

    def close(self) -> None:
        """Send what is still on its way: the process ends without waiting for anybody's threads."""
        if self.writer:
            self.writer.close()
        if self.wandb_run:
            self.wandb_run.finish()


def to_cell(value) -> str | float | None:
    """Return a value of a table as a column of one type takes it: an answer may be a list."""
    return json.dumps(value) if isinstance(value, list) else value


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence]) -> str:
    """Lay out a table in Markdown; a cell is JSON, in which no text ends a row."""
    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        lines.append([json.dumps(value).replace("|", "\\|").replace("<", "&lt;") for value in row])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
