"""The embedded worlds, and their offline start: what the commands need of them.

    python -m worlds --folder runs/toy
    python -m worlds gsm --folder runs/gsm

A world is a folder with problems, expert solutions, a base model and its settings, world.json.
"""

# first: torch reads what this sets when it is imported
import infra.waiting  # noqa: F401

# isort: split
from pathlib import Path

from infra.files import read_json
from worlds import gsm, toy
from worlds.offline_start import make_flow
from worlds.shared import Step

__all__ = [
    "PRESETS",
    "WORLDS",
    "World",
    "find_world",
    "kind_of",
    "label_steps",
    "make",
    "make_flow",
    "progress",
]

World = toy.World | gsm.World
WORLDS: dict[str, World] = {**toy.WORLDS, **gsm.WORLDS}
PRESETS = {  # script -> value of --model -> flag -> value
    script: {**presets, **gsm.PRESETS[script]} for script, presets in toy.PRESETS.items()
}


def make(world: World) -> World:
    """Make a world unless its folder has it; errors as of make() in its module."""
    return gsm.make(world) if isinstance(world, gsm.World) else toy.make(world)


def find_world(model: str) -> World | None:
    """Return the world that a script's --model names, made if it is not there; None: no world."""
    return make(WORLDS[model]) if model in WORLDS else None


def kind_of(name: str) -> str:
    """Return the name of the world whose presets fit one that is named, or a folder that holds one."""
    if name in WORLDS:
        return name
    file = Path(name, "world.json")
    if not file.exists():
        known = ", ".join(WORLDS)
        raise ValueError(f"world {name!r}: neither {known} nor a folder that holds a world")
    return read_json(file, "the settings of an embedded world").get("kind", "toy-sparse")


def label_steps(problem: str, solution: str | None, response: str) -> list[Step]:
    """Label every step that a response writes, by the rules of the world that the problem is of.

    solution: the worked one; the chains of the toy worlds need none
    """
    if toy.PROBLEM.fullmatch(problem):
        return toy.label_steps(problem, response)
    return gsm.label_steps(problem, solution, response)


def progress(problem: str, solution: str | None, response: str) -> float:
    """Return how much of a problem's solution the right steps of a response are, in [0, 1]."""
    if toy.PROBLEM.fullmatch(problem):
        return toy.progress(problem, response)
    return gsm.progress(problem, solution, response)
