"""Make the world that the command line asks for: `python -m worlds --folder runs/toy`.

`python -m worlds gsm --folder runs/gsm` makes the one in English.
"""

import sys

import tyro

import worlds
from infra import errors
from worlds import gsm, toy


def main() -> None:
    """Make a world."""
    arguments = sys.argv[1:]
    kind = toy.World
    if arguments[:1] == ["gsm"]:
        kind = gsm.World
        del arguments[0]
    made = worlds.make(tyro.cli(kind, args=arguments))
    print(f"the embedded world is in {made.folder}")


if __name__ == "__main__":
    errors.run(main)
