"""Ranges of numbers: each stands in the type of its setting, and one function checks all settings.

    keep: PositiveInt = 2                              a setting; the parser of flags sees an int
    flow_blocks: Annotated[int, Range(1, 100)] | None  a range of its own; None is not checked
    times: tuple[OpenFraction, ...]                    each is checked, and there must be one
    check_values(settings)                             ValueError names the flag and what it takes

No number may be infinite or nan, and no text empty: what a run does with those shows only when it
has begun.
"""

from dataclasses import fields, is_dataclass
from typing import Annotated, Literal, NamedTuple, get_args, get_type_hints


class Range(NamedTuple):
    """The numbers from low to high; whole ones if these are ints and the setting is."""

    low: float
    high: float
    without: Literal["neither", "low", "both"] = "neither"  # which of the ends are outside

    def holds(self, value: float) -> bool:
        """Return whether a number is in the range; nan and infinity never are."""
        if self.without == "neither":
            return self.low <= value <= self.high
        if self.without == "low":
            return self.low < value <= self.high
        return self.low < value < self.high

    def describe(self) -> str:
        """Return the range in words that follow `a number`."""
        words = {
            "neither": "from {low:,} to {high:,}",
            "low": "above {low:,}, at most {high:,}",
            "both": "between {low:,} and {high:,}",
        }
        return words[self.without].format(low=self.low, high=self.high)


PositiveInt = Annotated[int, Range(1, 10**9)]
NonNegativeInt = Annotated[int, Range(0, 10**9)]
BatchSize = Annotated[int, Range(1, 10**6)]  # of what is in memory at the same time
Seed = Annotated[int, Range(0, 2**63 - 1)]  # torch takes no larger ones
PositiveFloat = Annotated[float, Range(0, 10**6, without="low")]
NonNegativeFloat = Annotated[float, Range(0, 10**6)]
SignedFloat = Annotated[float, Range(-(10**6), 10**6)]
Fraction = Annotated[float, Range(0, 1)]
PositiveFraction = Annotated[float, Range(0, 1, without="low")]
OpenFraction = Annotated[float, Range(0, 1, without="both")]
Temperature = Annotated[float, Range(0.01, 100)]  # vLLM samples lower ones at 0.01


def check_values(settings) -> None:
    """Raise ValueError for a number outside its range, or an empty text, in nested settings.

    settings: a dataclass
    """
    types = get_type_hints(type(settings), include_extras=True)
    for field in fields(settings):
        value = getattr(settings, field.name)
        wanted = range_of(types[field.name])
        flag = f"--{field.name.replace('_', '-')}"
        if is_dataclass(value):
            check_values(value)
        elif isinstance(value, str | tuple) and wanted is None:
            check_text(flag, value)
        elif wanted is not None and value is not None:
            check_number(flag, value, wanted, is_whole=int in parts_of(types[field.name]))


def check_number(flag: str, value, wanted: Range, is_whole: bool) -> None:
    """Raise ValueError for a number, or for one of a tuple, that is outside a range."""
    values = value if isinstance(value, tuple) else (value,)
    kinds = int if is_whole else (int, float)
    for number in values:
        is_number = isinstance(number, kinds) and not isinstance(number, bool)
        if not is_number or not wanted.holds(number):
            kind = "whole number" if is_whole else "number"
            raise ValueError(f"{flag}={number}: expected a {kind} {wanted.describe()}")
    if not values:
        raise ValueError(f"{flag}: expected at least one number {wanted.describe()}")


def check_text(flag: str, value: str | tuple) -> None:
    """Raise ValueError for a text, or one of a tuple, that is empty."""
    values = value if isinstance(value, tuple) else (value,)
    if any(isinstance(text, str) and not text.strip() for text in values):
        raise ValueError(f"{flag}={value!r} is empty; give it a value, or leave the flag out")


def parts_of(kind) -> list:
    """Return all parts of a type, itself among them."""
    parts = [kind]
    for part in get_args(kind):
        parts += parts_of(part)
    return parts


def range_of(kind) -> Range | None:
    """Return the range in a type, None if it has none."""
    ranges = [part for part in parts_of(kind) if isinstance(part, Range)]
    return ranges[0] if ranges else None
