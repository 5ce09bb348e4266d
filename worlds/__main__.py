"""Make the world that the command line asks for: `python -m worlds --folder runs/toy`."""

import tyro

from infra import errors
from worlds import toy


def main() -> None:
    """Make a world."""
    made = toy.make(tyro.cli(toy.World))
    print(f"the embedded world is in {made.folder}")


if __name__ == "__main__":
    errors.run(main)
