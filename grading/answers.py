r"""Are two mathematical answers the same? Read LaTeX or plain text into a tree, compare trees by meaning.

    equal("\\frac{1}{2}", "0.5") -> True      equal("(1,2)", "\\{1,2\\}") -> False      equal("?!", "5") -> False

What is the same: spellings (sizes, fonts, spaces, dollars, degrees, thousands, units, `x =`, `the answer is`), numbers of equal
value (integers and fractions exactly; where a decimal is involved, to a ratio of 1e-6), expressions of equal value (at points
chosen for their letters, with exact fractions as long as possible), lists and sets in any order, tuples and intervals with
the same brackets in the same order, matrices, numerals in the same base, equations up to a factor, inequalities and intervals.
Gold and prediction are both read as mathematics (the official code reads bare text: 51 of 500 MATH-500 answers then fail
against themselves and `2` passes for `2\pi`).

What cannot be read goes to math-verify. All of it may meet hostile text, so `python answers.py` is a worker process: it
answers lines of [gold, prediction] for a parent that keeps the time (rewards.py).
"""

import cmath
import json
import math
import os
import random
import re
import sys
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise

from grading.latex import (
    CHOICE,
    QUALIFIERS,
    Answer,
    TooLargeError,
    UnreadableError,
    negative,
    read,
    spell,
    unit_of,
)

MAX_LENGTH = 2_000  # characters of an answer; a longer one is wrong
MAX_BITS = 20_000  # of an integer on the way to a value
TOLERANCE = Fraction(1, 10**6)  # largest ratio of difference to value where a decimal is involved
MEMORY_LIMIT = 2**30  # bytes of address space of a worker


# ---- Values
def symbols(node) -> set[str]:
    """Names of the letters in a tree."""
    if not isinstance(node, tuple) or not node:
        return set()
    if node[0] == "symbol":
        return {node[1]} - {"e", "i", r"\pi"}
    return set().union(*(symbols(part) for part in node[1:])) if len(node) > 1 else set()


def holds(node, kind: str, test=lambda node: True) -> bool:
    """Whether a tree has a node of a kind that passes a test."""
    if not isinstance(node, tuple) or not node:
        return False
    return (node[0] == kind and test(node)) or any(holds(part, kind, test) for part in node)


@lru_cache(4096)
def chosen(name: str, point: int) -> Fraction:
    """The value of a letter at a point: of its order, negative at odd ones; from the tenth on anywhere up to 70."""
    if point >= 10:
        return Fraction(random.Random(f"{name} {point}").randint(1, 5000), 73)
    value = (1, 7, 3, 2, 5)[point // 2] * Fraction(
        random.Random(f"{name} {point // 2}").randint(40, 160), 73
    )
    return -value if point % 2 else value


def small(value):
    """Return a value, or TooLargeError for one that would take for ever."""
    if isinstance(value, Fraction):
        if value.numerator.bit_length() > MAX_BITS or value.denominator.bit_length() > MAX_BITS:
            raise TooLargeError("too many digits")
        return value
    value = complex(value)
    if not (math.isfinite(value.real) and math.isfinite(value.imag)):
        raise TooLargeError("not finite")
    return value


def real(value) -> complex:
    """A value as a complex number; TooLargeError if it does not fit."""
    try:
        converted = complex(value)
    except OverflowError as error:
        raise TooLargeError("too large for a float") from error
    if converted == 0 and value != 0:
        raise TooLargeError("too small for a float")
    return converted


def evaluate(node: tuple, point: int, in_angle: bool = False):
    """Return the value of an expression at a point: a Fraction as long as it is exact, else complex."""
    kind = node[0]
    if kind == "number":
        return node[1]
    if kind == "symbol":
        constant = {"e": math.e, "i": 1j, r"\pi": math.pi}.get(node[1])
        return chosen(node[1], point) if constant is None else complex(constant)
    if kind == "degree":
        value = evaluate(node[1], point)
        return real(value) * math.pi / 180 if in_angle else value
    if kind == "sum":
        parts = [evaluate(part, point, in_angle) for part in node[1:]]
        if all(isinstance(part, Fraction) for part in parts):
            return small(sum(parts))
        parts = [real(part) for part in parts]
        total = sum(parts)
        return (
            Fraction(0) if abs(total) <= 1e-13 * max(map(abs, parts)) else small(total)
        )  # what is left by rounding
    if kind == "product":
        value = evaluate(node[1], point, in_angle)
        for part in node[2:]:
            value = combine(value, evaluate(part, point, in_angle), lambda a, b: a * b)
        return value
    if kind == "quotient":
        top, bottom = evaluate(node[1], point, in_angle), evaluate(node[2], point, in_angle)
        if bottom == 0:
            raise UnreadableError("division by zero")
        return combine(top, bottom, lambda a, b: a / b)
    if kind == "power":
        return power(evaluate(node[1], point), evaluate(node[2], point))
    if kind == "call":
        return call(
            node[1], [evaluate(part, point, in_angle=node[1] in ANGLES) for part in node[2:]]
        )
    raise UnreadableError(f"{kind} has no value")


def combine(a, b, operation):
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return small(operation(a, b))
    return small(operation(real(a), real(b)))


def power(base, exponent):
    """Return base ** exponent; odd roots of negative numbers are negative."""
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        if exponent.denominator == 1:
            size = max(base.numerator.bit_length(), base.denominator.bit_length())
            if abs(exponent.numerator) * size > MAX_BITS and abs(base) != 1:
                raise TooLargeError("too large a power")
            if base == 0 and exponent < 0:
                raise UnreadableError("division by zero")
            return Fraction(base ** int(exponent))
        if base < 0 and exponent.denominator % 2:
            return -power(-base, exponent) if exponent.numerator % 2 else power(-base, exponent)
        if base > 0 and exponent.denominator == 2:  # exact roots of squares
            roots = math.isqrt(base.numerator), math.isqrt(base.denominator)
            if roots[0] ** 2 == base.numerator and roots[1] ** 2 == base.denominator:
                return power(Fraction(*roots), Fraction(exponent.numerator))
    try:
        return small(real(base) ** real(exponent))
    except (OverflowError, ZeroDivisionError) as error:
        raise TooLargeError("too large a power") from error


def cot(z):
    return 1 / cmath.tan(z)


ANGLES = ("sin", "cos", "tan", "cot", "sec", "csc")
SMOOTH = {
    "sin": cmath.sin, "cos": cmath.cos, "tan": cmath.tan, "cot": cot, "sec": lambda z: 1 / cmath.cos(z),
    "csc": lambda z: 1 / cmath.sin(z), "arcsin": cmath.asin, "arccos": cmath.acos, "arctan": cmath.atan,
    "sinh": cmath.sinh, "cosh": cmath.cosh, "tanh": cmath.tanh, "arcsinh": cmath.asinh, "arccosh": cmath.acosh,
    "arctanh": cmath.atanh, "ln": cmath.log, "exp": cmath.exp, "abs": abs,
}  # fmt: skip


def call(function: str, values: list):
    """Return a function's value."""
    first = values[0]
    exact = all(isinstance(value, Fraction) for value in values)
    if function in ("floor", "ceil", "min", "max", "abs") and exact:
        found = {"floor": math.floor, "ceil": math.ceil, "min": min, "max": max, "abs": abs}[
            function
        ]
        return Fraction(found(values) if function in ("min", "max") else found(first))
    if function in ("floor", "ceil") and real(first).imag == 0:
        near = round(real(first).real)
        exactly = abs(real(first).real - near) < 1e-9
        return Fraction(near if exactly else getattr(math, function)(real(first).real))
    if function in ("gcd", "lcm", "binom", "factorial"):
        if not exact or any(value.denominator != 1 for value in values):
            if function == "binom" and len(values) == 2 or function == "factorial":
                return gamma_of(function, values)
            raise UnreadableError(f"{function} of what is no integer")
        if (
            any(abs(value) > 2_000 and function in ("binom", "factorial") for value in values)
            or min(values) < 0
        ):
            raise TooLargeError(f"too large a {function}")
        name = {"binom": "comb"}.get(function, function)
        return small(Fraction(getattr(math, name)(*(int(value) for value in values))))
    if function in ("log", "lg"):
        base = real(values[1]) if len(values) > 1 else 10.0
        if base in (0, 1):
            raise UnreadableError("a logarithm to no base")
        function, divisor = "ln", cmath.log(base)
    else:
        divisor = 1
    if function not in SMOOTH or (len(values) > 1 and divisor == 1):
        raise UnreadableError(f"{function} of {len(values)} arguments")
    try:
        value = complex(SMOOTH[function](real(first))) / divisor
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise UnreadableError(f"{function} has no value there") from error
    value = complex(
        0 if abs(value.real) < 1e-15 else value.real, 0 if abs(value.imag) < 1e-15 else value.imag
    )
    return Fraction(0) if value == 0 else small(value)


def gamma_of(function: str, values: list):
    """Continue factorials and binomials to what letters stand for."""
    if any(real(value).imag for value in values):
        raise UnreadableError(f"{function} of a complex number")
    try:
        parts = [math.gamma(real(value).real + 1) for value in values]
        if function == "factorial":
            return small(parts[0])
        return small(parts[0] / parts[1] / math.gamma(real(values[0] - values[1]).real + 1))
    except (ValueError, OverflowError, ZeroDivisionError) as error:
        raise UnreadableError(f"{function} has no value there") from error


def close(a, b, tolerance: Fraction) -> bool:
    """Whether two values are equal to a ratio; exact ones exactly if the tolerance is 0."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return abs(a - b) <= tolerance * max(abs(a), abs(b))
    a, b = real(a), real(b)
    return abs(a - b) <= max(float(tolerance), 1e-9) * max(abs(a), abs(b))


# ---- Comparison of trees
def equal(gold: str, prediction: str) -> bool | None:
    """Return whether two answers are the same; None if it takes more than this reader to tell."""
    if len(prediction) > MAX_LENGTH or not re.search(
        r"[^\W_]|\\infty|\\emptyset|\\varnothing|∞|∅|\\\{", prediction
    ):
        return False
    if squeeze(gold) == squeeze(prediction):
        return True
    if bool(QUALIFIERS.search(gold)) != bool(QUALIFIERS.search(prediction)):
        return False
    try:
        golds, predictions = read(gold), read(prediction)
        verdicts = [same_answer(a, b) for a in golds for b in predictions]
    except (UnreadableError, RecursionError):
        return None
    return True if True in verdicts else None if None in verdicts else False


def squeeze(text: str) -> str:
    """An answer without what makes no difference and without spaces, but for those between digits (1 1/2 is not 11/2)."""
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", spell(text))


def same_answer(gold: Answer, prediction: Answer) -> bool | None:
    """Compare with units and percent in mind; None if a value cannot be computed."""
    scale = Fraction(1)
    units = [unit_of(unit) if unit else None for unit in (gold.unit, prediction.unit)]
    if all(units):
        if units[0][0] == units[1][0]:
            scale = units[1][1] / units[0][1]
        elif re.sub(r"-?\d", "", units[0][0]) != re.sub(
            r"-?\d", "", units[1][0]
        ):  # cm for cm^2 is a slip
            return False
    elif (
        gold.unit
        and prediction.unit
        and not any(units)
        and bare_words(gold.unit) != bare_words(prediction.unit)
    ):
        return False
    nodes = gold.node, scaled(prediction.node, scale)
    try:
        if gold.percent == prediction.percent:
            return same(*nodes)
        hundredth = Fraction(1, 100)
        if gold.percent:  # 50 % may be given as 50 or 0.5
            return same(*nodes) or same(scaled(nodes[0], hundredth), nodes[1])
        if same(nodes[0], scaled(nodes[1], hundredth)):
            return True
        return (
            same(*nodes) and abs(real(evaluate(nodes[0], 0))) >= 1
        )  # so many per cent were asked for
    except TooLargeError:
        return None if too_large(gold.node) and too_large(prediction.node) else False
    except UnreadableError:
        return None


def bare_words(unit: str) -> list[str]:
    """Words of a unit that is not known, without plural and dots."""
    return [word.rstrip("s") for word in re.findall(r"[a-z]+", unit.lower().replace(".", ""))]


def too_large(node: tuple) -> bool:
    """Whether a value cannot be computed because of its size."""
    try:
        evaluate(node, 0)
    except TooLargeError:
        return True
    except UnreadableError:
        return False
    return False


def scaled(node: tuple, factor: Fraction) -> tuple:
    return node if factor == 1 else ("product", node, ("number", factor, False))


def same(a: tuple, b: tuple, strict: bool = False) -> bool:
    """Compare gold and prediction; `strict` asks for the same name before an equals sign."""
    if a == b:
        return True
    several = [node for node in (a, b) if is_collection(node)]
    if several or holds(a, "pm") or holds(b, "pm"):
        x, y = elements(a), elements(b)
        if any(node[0] == "group" for node in several):  # a set holds each thing once
            x, y = (list(dict.fromkeys(items)) for items in (x, y))
        named = [
            all(is_named(item) for item in items) and len({item[2] for item in items}) == len(items)
            for items in (x, y)
        ]
        if (
            len(x) == len(y) > 1
            and named[0] != named[1]
            and not any(is_named(i) for i in (y if named[0] else x))
        ):
            return all(
                same(p, q) for p, q in zip(x, y, strict=True)
            )  # x = 1, y = 2 is 1, 2 in this order
        both_named = strict or sum(is_named(item) for item in (*x, *y)) == len(x) + len(y)
        return len(x) == len(y) and matched(x, y, both_named and len(x) > 1)
    if a[0] == "relation" or b[0] == "relation":
        return same_relation(a, b, strict)
    if (
        a[0] == "text" or b[0] == "text" or (a[0] == b[0] == "symbol" and a[1] in "ABCDEFGHIJ")
    ):  # the letter of a choice
        return letters(a) is not None and letters(a) == letters(b)
    for kind in ("group", "matrix", "numeral", "union", "intersection", "difference"):
        if kind in (a[0], b[0]):
            return a[0] == b[0] and same_shape(a, b)
    if ("infinity",) in (a, b) or holds(a, "infinity") or holds(b, "infinity"):
        a, b = (replace_infinity(node) for node in (a, b))
    return same_value(a, b)


def is_collection(node: tuple) -> bool:
    return node[0] == "list" or (node[0] == "group" and node[1] == "{")


def elements(node: tuple) -> list[tuple]:
    """Items of a list or set, or the one thing itself; both signs of a plus-minus."""
    items = node[1:] if node[0] == "list" else node[3:] if is_collection(node) else (node,)
    if len(items) > 100:
        raise UnreadableError("too many items")
    found = [
        each
        for item in items
        for each in ((with_sign(item, 1), with_sign(item, -1)) if holds(item, "pm") else (item,))
    ]
    # x = 3, 4: the name stands for all
    if (
        len(found) > 1
        and is_named(found[0])
        and not any(item[0] == "relation" for item in found[1:])
    ):
        found[0] = found[0][3]
    return found


def with_sign(node, sign: int):
    if not isinstance(node, tuple) or not node:
        return node
    if node[0] == "pm":
        term = with_sign(node[2], sign)
        term = term if node[3] * sign > 0 else negative(term)
        return term if node[1] is None else ("sum", with_sign(node[1], sign), term)
    return tuple(with_sign(part, sign) for part in node)


def matched(x: list, y: list, strict: bool) -> bool:
    """Whether each item of one has a partner in the other."""
    rest = list(y)
    for item in x:
        partner = next((i for i, other in enumerate(rest) if same(item, other, strict)), None)
        if partner is None:
            return False
        rest.pop(partner)
    return True


def letters(node: tuple) -> str | None:
    """The text that a node stands for, if it is one: words, or the letter of a choice."""
    if node[0] == "text":
        match = CHOICE.fullmatch(node[1])
        return match[1].lower() if match else node[1]
    return node[1].lower() if node[0] == "symbol" and node[1].isalpha() else None


def same_shape(a: tuple, b: tuple) -> bool:
    """Compare tuples, intervals, matrices, numerals and unions part by part."""
    if a[0] == "numeral":
        return a == b
    if a[0] == "matrix":
        shapes = [[len(row) for row in node[1:]] for node in (a, b)]
        return shapes[0] == shapes[1] and all(
            same(x, y) for r, s in zip(a[1:], b[1:], strict=True) for x, y in zip(r, s, strict=True)
        )
    if a[0] == "group":
        return (
            a[1:3] == b[1:3]
            and len(a) == len(b)
            and all(same(x, y) for x, y in zip(a[3:], b[3:], strict=True))
        )
    if a[0] == "difference":
        return same(a[1], b[1]) and same(a[2], b[2])
    parts = [list(flatten(node, a[0])) for node in (a, b)]
    return len(parts[0]) == len(parts[1]) and matched(*parts, strict=False)


def flatten(node: tuple, kind: str) -> Iterator[tuple]:
    if node[0] == kind:
        for part in node[1:]:
            yield from flatten(part, kind)
    else:
        yield node


def replace_infinity(node):
    """Infinity as a letter of its own: equal to itself, and to nothing else."""
    if not isinstance(node, tuple) or not node:
        return node
    return (
        ("symbol", r"\infty")
        if node == ("infinity",)
        else tuple(replace_infinity(part) for part in node)
    )


def same_value(a: tuple, b: tuple) -> bool:
    """Compare expressions by their values at points; at negative ones as well where absolute values are taken."""
    decimal = holds(a, "number", lambda node: node[2]) or holds(b, "number", lambda node: node[2])
    if not symbols(a) | symbols(b):
        return same_number(evaluate(a, 0), evaluate(b, 0), decimal)
    signed = holds(a, "call", lambda node: node[1] == "abs") or holds(
        b, "call", lambda node: node[1] == "abs"
    )
    pairs, error = [], None
    stepped = any(
        holds(node, "call", lambda node: node[1] in ("floor", "ceil", "min", "max"))
        for node in (a, b)
    )
    for point in range(10, 50) if stepped else range(0, 10, 1 if signed else 2):
        try:
            pairs.append((evaluate(a, point), evaluate(b, point)))
        except TooLargeError:
            raise
        except UnreadableError as caught:  # a division by zero there
            error = caught
            continue
        if not same_number(*pairs[-1], decimal):
            return False
        if len(pairs) == (40 if stepped else 5 if signed else 3):
            break
    if len(pairs) < 2 or all(
        x == 0 for x, _ in pairs
    ):  # an expression that is zero everywhere was misread
        raise error or UnreadableError("no value")
    return True


def same_number(gold, value, decimal: bool) -> bool:
    """Compare two values; integers and decimals of up to four places are meant exactly, where the other is no root or the like."""
    short = isinstance(gold, Fraction) and (
        gold.denominator == 1 or (10**4 % gold.denominator == 0 and terminates(value))
    )
    return close(gold, value, TOLERANCE if decimal and not short else Fraction(0))


def terminates(value) -> bool:
    """Whether a value is a decimal of at most thirty places."""
    return isinstance(value, Fraction) and 10**30 % value.denominator == 0


# -- relations
FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!=", "~": "~"}


def is_named(node: tuple) -> bool:
    """Whether a relation only names a value: x = 5, f(x) = 2x, AB = 5, (x, y) = (1, 2)."""
    if (
        node[0] != "relation"
        or node[1][0] not in ("=", "~")
        or any(op not in ("=", "~") for op in node[1])
    ):
        return False
    left = node[2]
    lettered = symbols(left) or left in (("symbol", "i"), ("symbol", "e"))
    return left[0] == "text" or bool(
        lettered and not holds(left, "number") and not holds(left, "sum")
    )


def value_of(node: tuple) -> tuple:
    """The value that a chain of equalities ends in, if all after a name are equal; else UnreadableError."""
    sides = node[3:] if is_named(node) else node[2:]
    if any(op not in ("=", "~") for op in node[1]):
        raise UnreadableError("no value")
    operators = node[1][-(len(sides) - 1) :] if len(sides) > 1 else ()
    for (x, y), operator in zip(pairwise(sides), operators, strict=True):
        if not (same(x, y) or (operator == "~" and nearly(x, y))):
            raise UnreadableError("a chain of different values")
    return sides[-1]


def nearly(a: tuple, b: tuple) -> bool:
    return close(evaluate(a, 0), evaluate(b, 0), Fraction(1, 20))


def same_relation(a: tuple, b: tuple, strict: bool) -> bool:
    """Compare where at least one side is a relation."""
    if a[0] == "relation" == b[0]:
        named = is_named(a), is_named(b)
        if all(named):
            if same(a[2], b[2]):
                return same(value_of(a), value_of(b))
            if not strict and not (
                symbols(a[2]) & (symbols(b[2]) | symbols(b[-1])) or symbols(b[2]) & symbols(a[-1])
            ):
                return same(value_of(a), value_of(b))
        return len(a) == len(b) and (same_sides(a, b) or same_sides(a, flip(b)))
    relation, other = (a, b) if a[0] == "relation" else (b, a)
    if all(op in ("=", "~") for op in relation[1]):
        if not is_named(relation) and symbols(relation) - symbols(other):
            flipped = flip(relation)  # 5 = x
            if not is_named(flipped):
                return False
            relation = flipped
        try:
            ends = {
                value_of(relation),
                *([relation[3]] if is_named(relation) and "~" in relation[1] else ()),
            }
        except UnreadableError:
            return False
        return any(same(other, end) if relation is b else same(end, other) for end in ends)
    interval = as_interval(relation)
    ambiguous = (
        other[0] == "group" and other[1:3] == ("(", ")") and not holds(other, "infinity")
    )  # (1, 2) may be a point
    return interval is not None and not ambiguous and same(interval, other)


def flip(node: tuple) -> tuple:
    return ("relation", tuple(FLIPPED.get(op, op) for op in reversed(node[1])), *reversed(node[2:]))


def same_sides(a: tuple, b: tuple) -> bool:
    """Whether relations of the same operators say the same: side by side, or after moving terms and dividing by a constant."""
    if a[1] != b[1]:
        return False
    if all(same(x, y) for x, y in zip(a[2:], b[2:], strict=True)):
        return True
    if (
        len(a) != 4
        or a[1] == ("~",)
        or any(holds(n, k) for n in (a, b) for k in ("group", "text", "infinity", "matrix", "list"))
    ):
        return False
    ratios = []
    signed = any(holds(node, "call", lambda node: node[1] == "abs") for node in (a, b))
    for point in range(5) if signed else (0, 2, 4):
        x, y = (evaluate(("sum", node[2], negative(node[3])), point) for node in (a, b))
        if x == 0 or y == 0:
            return False
        ratios.append(combine(x, y, lambda p, q: p / q))
    positive = a[1] in (("=",), ("!=",)) or real(ratios[0]).real > 0
    return positive and all(close(ratios[0], ratio, Fraction(0)) for ratio in ratios[1:])


def as_interval(node: tuple) -> tuple | None:
    """The interval that 1 < x <= 2 or x > 3 describes; None for another relation."""
    operators, sides = node[1], node[2:]
    if operators[0] in (">", ">="):
        operators, sides = flip(node)[1], flip(node)[2:]
    if any(op not in ("<", "<=") for op in operators):
        return None
    if len(sides) == 3 and sides[1][0] == "symbol":
        return (
            "group",
            "[" if operators[0] == "<=" else "(",
            "]" if operators[1] == "<=" else ")",
            sides[0],
            sides[2],
        )
    if len(sides) != 2:
        return None
    if sides[0][0] == "symbol":
        return (
            "group",
            "(",
            "]" if operators[0] == "<=" else ")",
            negative(("infinity",)),
            sides[1],
        )
    if sides[1][0] == "symbol":
        return ("group", "[" if operators[0] == "<=" else "(", ")", sides[0], ("infinity",))
    return None


# ---- The worker process
def with_math_verify(gold: str, prediction: str) -> bool:
    """Compare with math-verify, LaTeX only: its reader of plain expressions evaluates them as Python."""
    from math_verify import LatexExtractionConfig, parse, verify

    settings = {"extraction_config": [LatexExtractionConfig()], "parsing_timeout": None}
    try:
        parsed = [parse(f"${spell(text)}$", **settings) for text in (gold, prediction)]
        return all(parsed) and bool(verify(*parsed, timeout_seconds=None))
    except Exception:  # noqa: BLE001 — whatever a parser makes of hostile text, the answer is not verified
        return False


def confine(memory: int) -> None:
    """Let this process touch nothing: no file but what imports read, no network, no program; bounded memory."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    sys.dont_write_bytecode = True
    forbidden = (
        "socket.",
        "subprocess.",
        "shutil.",
        "os.system",
        "os.exec",
        "os.posix_spawn",
        "os.fork",
        "os.remove",
        "os.rename",
    )
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def refuse(event: str, arguments: tuple) -> None:
        writes = event == "open" and (
            set(arguments[1] or "") & set("wax+") or arguments[2] & writing
        )
        if writes or event.startswith(forbidden):
            raise PermissionError(f"a grading process may not {event} {arguments[:1]}")

    sys.addaudithook(refuse)


def serve() -> None:
    """Answer lines of [gold, prediction] with 1, 0 or `memory`, until the parent goes; the parent keeps the time.

    `loading` and `loaded` stand around the import of math-verify, which takes seconds and is not the answer's fault.
    """
    import signal

    for stop in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # sent to the whole process group they are the parent's to heed
        signal.signal(stop, signal.SIG_IGN)
    confine(MEMORY_LIMIT)
    print("ready", flush=True)
    for line in sys.stdin:
        signal.alarm(600)  # ends a worker that is lost in an expression after its parent was killed
        try:
            gold, prediction = json.loads(line)
            verdict = equal(gold, prediction)
            if verdict is None:
                if "math_verify" not in sys.modules:
                    print("loading", flush=True)
                    import math_verify  # noqa: F401

                    print("loaded", flush=True)
                verdict = with_math_verify(gold, prediction)
            reply = str(int(verdict))
        except MemoryError:
            reply = "memory"
        signal.alarm(0)
        print(reply, flush=True)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    serve()
