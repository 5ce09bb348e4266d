"""What recording rollouts costs: steps of the embedded world with them and without, in pairs.

    python benchmarks/recording.py                     five pairs of short runs, a minute on an idle CPU
    python benchmarks/recording.py --pairs 9 --json FILE

The two runs of a pair differ in --log-rollouts, 1 or 0, and take turns at going first. Their
figures must be the same. Time is CPU seconds of this process, `time/cpu`, without the first step: on a
machine with other work, seconds of the clock say more about that work.
"""

import repository  # noqa: F401

# isort: split
import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

import train_rl
from common import keep, machine
from infra import errors
from infra.metrics import read_metrics
from infra.settings import change
from worlds import toy


@dataclass(frozen=True)
class Settings:
    """Compare steps that record rollouts with steps that do not."""

    pairs: int = 5  # Pairs of runs
    steps: int = 4  # Steps of a run; the first is a warm-up
    json: str | None = None  # File for the figures


def run_steps(config: train_rl.Config) -> tuple[list[float], list[dict]]:
    """Train; return the CPU seconds of each step but the first, and the figures of all."""
    train_rl.main(config)
    lines = read_metrics(Path(config.folder) / "metrics.jsonl")
    figures = []
    for line in lines:
        untimed = {name: value for name, value in line.items() if not name.startswith("time/")}
        figures.append(untimed)
    return [line["time/cpu"] for line in lines[1:]], figures


def run_pair(config: train_rl.Config, number: int, folder: Path) -> dict[str, float]:
    """Run a pair in the folder; return the median seconds of a step with rollouts and without."""
    order = (1, 0) if number % 2 else (0, 1)
    runs = {}
    for every in order:
        own_folder = str(folder / f"pair-{number}-every-{every}")
        runs[every] = run_steps(change(config, log_rollouts=every, folder=own_folder))
    assert runs[1][1] == runs[0][1], "recording rollouts has changed the figures of the run"
    return {
        name: statistics.median(runs[every][0]) for name, every in (("with", 1), ("without", 0))
    }


def main(settings: Settings) -> None:
    """Print the seconds of each pair and the cost."""
    if settings.steps < 2 or settings.pairs < 1:
        raise ValueError(
            f"steps={settings.steps}, pairs={settings.pairs}: expected 2 steps or more, of which "
            "the first is a warm-up, and a pair"
        )
    config = change(train_rl.Config(), **toy.PRESETS["train_rl"]["toy"])
    config = change(config, steps=settings.steps, save_every=0, eval_data=())
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(settings.pairs):
            pairs.append(run_pair(config, number, Path(folder)))
    print(f"{machine()}\n{'pair':>4}{'with':>10}{'without':>10}{'ratio':>8}")
    for number, pair in enumerate(pairs):
        ratio = pair["with"] / pair["without"]
        print(f"{number:>4}{pair['with']:>10.3f}{pair['without']:>10.3f}{ratio:>8.3f}")
    cost = statistics.median(pair["with"] / pair["without"] for pair in pairs) - 1
    every = train_rl.RecordSettings().log_rollouts
    print(
        f"a recorded step costs {100 * cost:+.1f} %, every {every}th one {100 * cost / every:+.2f} %"
    )
    result = {"machine": machine(), "settings": asdict(settings), "pairs": pairs, "cost": cost}
    keep(result, settings.json)


if __name__ == "__main__":
    errors.run(lambda: main(tyro.cli(Settings)))
