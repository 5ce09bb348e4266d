r"""Split a unit off the end of an answer, and convert between known units.

    split_unit("5\\text{ cm}^2") -> ("5", "cm ^2")      split_unit("5 apples") -> ("5", "apples")
    unit_of("km/h") -> ("length1 time-1", Fraction(5, 18))

A known unit has a dimension and a size, so that 100 cm can be compared with 1 m. An unknown unit is
a word like any other.
"""

import re
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from grading.spelling import TEXT_COMMANDS

# ---- Known units

# Dimension, size in the dimension's base unit, names in lower case without the plural's s
# ("inche" is what remains of inches).
UNIT_TABLE = [
    ("length", "0.001", "mm millimeter millimetre"),
    ("length", "0.01", "cm centimeter centimetre"),
    ("length", "0.1", "dm"),
    ("length", "1", "m meter metre"),
    ("length", "1000", "km kilometer kilometre"),
    ("length", "0.0254", "in inch inche"),
    ("length", "0.3048", "ft feet foot"),
    ("length", "0.9144", "yd yard"),
    ("length", "1609.344", "mi mile"),
    ("time", "0.001", "ms"),
    ("time", "1", "s sec second"),
    ("time", "60", "min minute"),
    ("time", "3600", "h hr hour"),
    ("time", "86400", "day"),
    ("time", "604800", "week"),
    ("time", "31557600", "year"),
    ("mass", "0.001", "mg"),
    ("mass", "1", "g gram"),
    ("mass", "1000", "kg kilogram"),
    ("mass", "453.59237", "lb pound"),
    ("mass", "28.349523125", "oz ounce"),
    ("money", "1", "dollar usd buck"),
    ("money", "0.01", "cent"),
    ("angle", "1", "degree deg"),
    ("energy", "1", "j joule"),
    ("energy", "1000", "kj"),
    ("energy", "1.602176634e-19", "ev"),
    ("energy", "1e-7", "erg"),
    ("frequency", "1", "hz hertz"),
    ("frequency", "1000", "khz"),
    ("frequency", "1e6", "mhz"),
    ("frequency", "1e9", "ghz"),
]
UNITS = {
    name: (dimension, Fraction(size))
    for dimension, size, names in UNIT_TABLE
    for name in names.split()
}


class UnitPower(NamedTuple):
    """One unit within a compound one: the hours of km/h are time, -1, 3600."""

    dimension: str
    exponent: int
    size: Fraction


@lru_cache(maxsize=1024)
def unit_of(text: str) -> tuple[str, Fraction] | None:
    """Return dimension and size of a unit such as `cm^2`, `square inches` or `km/h`.

    The dimension reads e.g. "length1 time-1"; the size is in the base units of UNIT_TABLE.
    Return None for a unit that is not known.
    """
    parts = parse_unit(text)
    if not parts:
        return None
    exponents: dict[str, int] = {}
    size = Fraction(1)
    for part in parts:
        exponents[part.dimension] = exponents.get(part.dimension, 0) + part.exponent
        size *= part.size**part.exponent
    dimension = " ".join(f"{name}{power}" for name, power in sorted(exponents.items()) if power)
    return dimension, size


def forgets_power(gold: str, prediction: str) -> bool:
    """Return whether a known unit is another one but for forgotten powers: cm for cm^2."""
    gold_exponents = exponents_of(gold)
    exponents = exponents_of(prediction)
    if gold_exponents.keys() != exponents.keys():
        return False
    for unit, gold_exponent in gold_exponents.items():
        without_power = 1 if gold_exponent > 0 else -1
        if exponents[unit] not in (gold_exponent, without_power):
            return False
    return True


def exponents_of(text: str) -> dict[tuple[str, Fraction], int]:
    """Return the exponent of each unit, by dimension and size, in a known compound unit."""
    exponents: dict[tuple[str, Fraction], int] = {}
    for part in parse_unit(text) or []:
        unit = (part.dimension, part.size)
        exponents[unit] = exponents.get(unit, 0) + part.exponent
    return exponents


def parse_unit(text: str) -> list[UnitPower] | None:
    """Return the parts of a compound unit; None if one of them is not known."""
    parts = []
    sign = 1  # -1 behind a slash, to the end
    multiplicity = 1  # 2 or 3 behind `square` or `cubic`
    for token in re.findall(r"[A-Za-z]+|/|\^\s*\{?\s*-?\d", text.replace("per ", "/")):
        word = token.lower()
        if token == "/":
            sign = -1
        elif token.startswith("^"):
            if not parts:
                return None
            power = int(re.sub(r"[^-\d]", "", token))
            base = parts.pop()
            parts.append(base._replace(exponent=base.exponent * power))
        elif word in ("square", "sq"):
            multiplicity = 2
        elif word in ("cubic", "cu"):
            multiplicity = 3
        else:
            known = UNITS.get(word) or UNITS.get(word.removesuffix("s"))
            if known is None:
                return None
            dimension, size = known
            parts.append(UnitPower(dimension, sign * multiplicity, size))
            multiplicity = 1
    return parts


# ---- Units at the end of an answer

# ^\circ C, ^{\circ}\text{F}
TEMPERATURE_SCALE = re.compile(
    r"\^\s*\{?\s*\\circ\s*\}?\s*(?:\\(?:text|mathrm)\s*\{\s*([CFK])\s*\}|([CFK]))\s*$"
)
# 12:30 p.m.
HALF_OF_DAY = re.compile(r"(?<=:\d\d)\s*([ap]\.?m)\.?\s*$", re.IGNORECASE)
# \text{cm}^2, \mathrm{m}/\mathrm{s}. Alternatives are not repeated possessively: Python 3.11.2 does
# not go on behind them.
TEXT_UNIT = re.compile(
    rf"(?<=[\w}})!\]])\s*((?:\\(?:{TEXT_COMMANDS})\s*\{{(?:[^{{}}]|(?<=\^)\{{-?\d\}})*\}}"
    r"(?:\s*\^\s*\{?\s*-?\d\s*\}?)?"
    rf"(?:[\s/]|\\(?!(?:{TEXT_COMMANDS})\s*\{{))*(?:cdot)?\s*+)++)$"
)
# Units that are spelled like functions, which by now have a backslash: 5 \min
FUNCTION_UNIT = re.compile(r"(?<=\d)\s*\\(min|sec)\s*$")
# cm^2, miles per hour. Possessive quantifiers keep it linear: a text has one reading alone.
UNIT_EXPONENT = r"(?:\^\s*\{?\s*-?\d\s*\}?)?"
PLAIN_UNIT = re.compile(
    rf"(?<=[\d}})!])(\s*+)((?:[A-Za-z][A-Za-z.]*+\s*+)++{UNIT_EXPONENT}"
    rf"(?:\s*+(?:/|per)\s*+[A-Za-z]++{UNIT_EXPONENT})*+)\s*+$"
)
PLAIN_NUMBER = re.compile(r"(?:\\times|\\cdot|[-+\d.,/ eE^{}])+")
# Words that are in no unit
SENTENCE_WORD = re.compile(r"\b(?:or|and|if|when|for|not|mod|is|are|was|were|be|too)\b")
# A command's name, or an open subscript or exponent: letters behind it are not a unit.
OPEN_END = re.compile(r"(?:\\[A-Za-z]+|[_^]\{?[^{}]*)$")


def split_unit(text: str) -> tuple[str, str | None]:
    """Return an answer without the unit at its end, and the unit, or None if it has none."""
    text = FUNCTION_UNIT.sub(r" \1", text)
    return (
        split_temperature_scale(text)
        or split_half_of_day(text)
        or split_text_unit(text)
        or split_plain_unit(text)
        or (text, None)
    )


def split_temperature_scale(text: str) -> tuple[str, str] | None:
    r"""Split `20^\circ\text{C}` into degrees and their scale; None for another text."""
    match = TEMPERATURE_SCALE.search(text)
    if match is None:
        return None
    return text[: match.start()] + r"^{\circ}", match[1] or match[2]


def split_half_of_day(text: str) -> tuple[str, str] | None:
    """Split `12:30 p.m.` into time and half of the day; None for another text."""
    match = HALF_OF_DAY.search(text)
    if match is None:
        return None
    return text[: match.start()], match[1]


def split_text_unit(text: str) -> tuple[str, str] | None:
    r"""Split `5\text{ cm}` into number and unit; None if the text at the end is not a unit."""
    match = TEXT_UNIT.search(text)
    if match is None:
        return None
    before = text[: match.start()]
    if not re.search(r"\d", before):
        return None
    content = re.sub(rf"\\(?:{TEXT_COMMANDS})|[{{}}\\]", " ", match[1])
    if re.search(r"\b(?:or|and|if|when|for|not)\b", content):
        return None
    unit = content.strip()
    is_upright_symbol = len(unit) == 1 and "mathrm" in match[1] and unit not in UNITS
    if is_upright_symbol:
        return None
    return before, unit


def split_plain_unit(text: str) -> tuple[str, str] | None:
    """Split `5 cm` into number and unit; None if the letters at the end are not a unit."""
    match = PLAIN_UNIT.search(text)
    if match is None:
        return None
    before = text[: match.start()]
    has_gap = match[1] != ""
    unit = match[2].strip()
    if not is_known_unit(unit, before, has_gap) and not (has_gap and is_word_unit(unit)):
        return None
    if OPEN_END.search(before):
        return None
    return before, unit


def is_known_unit(unit: str, before: str, has_gap: bool) -> bool:
    """Return whether letters behind a number are a known unit.

    A single letter is a unit only behind a gap and a plain number: 5 m, but not 5m or 2x + 5 m.
    """
    if unit_of(unit) is None:
        return False
    is_single_letter = len(re.match(r"[A-Za-z]*", unit)[0]) == 1
    if not is_single_letter:
        return True
    return has_gap and PLAIN_NUMBER.fullmatch(before) is not None


def is_word_unit(unit: str) -> bool:
    """Return whether letters may be an unknown unit: a word, but not part of a sentence."""
    has_word = re.search(r"[A-Za-z]{2}", unit) is not None
    return has_word and not SENTENCE_WORD.search(unit)
