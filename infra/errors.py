"""How a command ends with an error: in one line for a mistake of input, in a traceback for a bug.

An error that this project raises on purpose says in its message what was wrong and what to do, and
so does one of the system that names a file; where in the code it was raised helps nobody. Any other
error is a bug. `--traceback`, a flag of every command, shows the traceback of either.
"""

import dis
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

PROJECT = Path(__file__).resolve().parents[1]
FLAG = "--traceback"
RAISE = dis.opmap["RAISE_VARARGS"]
ON_PURPOSE = (ValueError, OSError, MemoryError, ArithmeticError, RuntimeError)
LONGEST = 300  # characters of a library's error in a message of ours


def run(main: Callable[[], None]) -> None:
    """Run a command's main; an error is shown, and ends the process with code 1."""
    in_full = take_flag(sys.argv)
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        show(error, in_full)
        sys.exit(1)


def take_flag(arguments: list[str]) -> bool:
    """Return whether --traceback is among the arguments of a command, and take it out."""
    is_given = FLAG in arguments
    arguments[:] = [argument for argument in arguments if argument != FLAG]
    return is_given


def show(error: BaseException, in_full: bool = False) -> None:
    """Print an error: its message where that is enough, else its traceback."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()  # it would share its line with the error
    sys.stdout.flush()
    if in_full or not speaks_for_itself(error):
        traceback.print_exception(error)
        return
    message = " ".join(str(error).splitlines()) or type(error).__name__
    print(f"error: {message}", file=sys.stderr)


def speaks_for_itself(error: BaseException) -> bool:
    """Return whether the message of an error is enough for whoever runs the command."""
    is_of_a_file = isinstance(error, OSError) and error.filename is not None
    return is_of_a_file or (isinstance(error, ON_PURPOSE) and raised_here(error))


def raised_here(error: BaseException) -> bool:
    """Return whether an error comes from a `raise` in a file of this project."""
    place = error.__traceback__
    if place is None:
        return False
    while place.tb_next:
        place = place.tb_next
    code = place.tb_frame.f_code
    return is_of_project(code.co_filename) and code.co_code[place.tb_lasti] == RAISE


def is_of_project(file: str) -> bool:
    """Return whether a file of code is one of this project, and not of a library."""
    path = Path(file).resolve()
    is_library = "site-packages" in path.parts  # an environment inside the project
    return path.is_file() and path.is_relative_to(PROJECT) and not is_library


# ---- A library's error, as a part of a message of ours
def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its kind where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def in_short(error: BaseException) -> str:
    """Return an error's message in one line, cut if it is long, or its kind where it has none."""
    message = " ".join(str(error).split()) or type(error).__name__
    return message if len(message) <= LONGEST else f"{message[:LONGEST]} …"
