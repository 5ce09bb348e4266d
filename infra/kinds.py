"""Whether values that were read from a file are of the kinds that a dataclass declares."""

import ast
from dataclasses import fields
from types import NoneType, UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints


def check_kinds(values) -> None:
    """Raise ValueError if a field of a dataclass does not hold what its annotation says."""
    hints = get_type_hints(type(values))
    for field in fields(values):
        value = getattr(values, field.name)
        if not is_of_kind(value, hints[field.name]):
            raise ValueError(f"{field.name}={value!r}: expected {describe(hints[field.name])}")


def is_of_kind(value, hint) -> bool:
    """Return whether a value is of a kind.

    A kind is a class, a union of kinds, Literal, tuple[KIND, ...], or a tuple of a kind for each
    part.
    """
    if is_union(hint):
        return any(is_of_kind(value, kind) for kind in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and are_of_kinds(value, get_args(hint))
    if hint in (int, float):  # a bool is no number, a whole number may stand for any
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint)


def is_union(hint) -> bool:
    """Return whether a kind is a union; those with a Literal are of another class than others."""
    return get_origin(hint) in (Union, UnionType)


def are_of_kinds(values: tuple, kinds: tuple) -> bool:
    """Return whether each of a tuple's parts is of its kind: the arguments of tuple[...]."""
    if kinds[-1] is Ellipsis:
        return all(is_of_kind(value, kinds[0]) for value in values)
    return len(values) == len(kinds) and all(map(is_of_kind, values, kinds))


def describe(hint) -> str:
    """Return a kind in words."""
    if is_union(hint):
        return " or ".join(describe(kind) for kind in get_args(hint))
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if get_origin(hint) is tuple:
        kind, *others = get_args(hint)
        n_parts = "" if others == [Ellipsis] else f" of {len(others) + 1}"
        return f"a list{n_parts}, each {describe(kind)}"
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a text",
        NoneType: "null",
    }
    return words.get(hint, hint.__name__)


def from_text(text: str, hint):
    """Return what a text from the command line stands for where a kind is wanted."""
    if is_of_kind(text, hint):
        return text
    try:
        return as_tuple(ast.literal_eval(text))
    except (ValueError, SyntaxError):  # check_kinds() says what was expected
        return text


def as_tuple(value):
    """Return a list as a tuple, which it was before it went through JSON; others as they are."""
    if isinstance(value, list):
        return tuple(value)
    return value
