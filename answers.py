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
from typing import NamedTuple

MAX_LENGTH = 2_000  # characters of an answer; a longer one is wrong
MAX_DEPTH = 40  # nested brackets
MAX_BITS = 20_000  # of an integer on the way to a value
TOLERANCE = Fraction(1, 10**6)  # largest ratio of difference to value where a decimal is involved
MEMORY_LIMIT = 2**30  # bytes of address space of a worker


class UnreadableError(ValueError):
    """An answer that the reader does not understand, or a value that it does not compute."""


class TooLargeError(UnreadableError):
    """A value beyond MAX_BITS."""


# ---- Spelling
STYLES = r"mathbf|boldsymbol|bm|mathit|mathsf|mathnormal|bf|it|displaystyle|textstyle|limits|left\.?|right\.?|[bB]igg?[lrm]?"
TEXTS = "text|textbf|textit|textrm|textsf|textnormal|mathrm|mbox|hbox|operatorname|rm"
FUNCTION_NAMES = (
    "arcsin arccos arctan arcsinh arccosh arctanh sinh cosh tanh sin cos tan cot sec csc ln log lg exp sqrt gcd lcm min max"
)
UNICODE = {
    "°": r"^\circ ", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": r"\div ", "−": "-", "–": "-", "—": "-", "∞": r"\infty ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "±": r"\pm ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ",
    "√": r"\sqrt ", "π": r"\pi ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "λ": r"\lambda ",
    "μ": r"\mu ", "ω": r"\omega ", "Δ": r"\Delta ", "′": "'", "’": "'", "²": "^2", "³": "^3", "½": r"\frac{1}{2}", "\xa0": " ",
    "\u2009": " ", "\u202f": " ", "（": "(", "）": ")", "，": ",", "ℝ": r"\mathbb{R}", "∅": r"\emptyset ",
}  # fmt: skip
REWRITES = [
    (r"(?<!\\)\\[\[\]()]|(?<!\\)\$", " "),  # delimiters of mathematics
    (rf"\\(?:{STYLES})(?![A-Za-z])", " "),
    (r"\\\$", ""),  # a currency
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\\(?:le|ge)qslant(?![A-Za-z])", lambda match: match[0][:3]),
    (r"\\(?:le|ge|ne)q(?![A-Za-z])", lambda match: match[0][:3]),
    (r"!=|<=|>=", lambda match: {"!=": r"\\ne ", "<=": r"\\le ", ">=": r"\\ge "}[match[0]].replace("\\\\", "\\")),
    (r"\*\*", "^"),
    (r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", r"\\times "),
    (r"\\varnothing(?![A-Za-z])", r"\\emptyset"),
    (r"(?<=\d)(?:\\,|\\!|\\;|\\ |\{,\}|,\\!|,\\,|\s)+(?=\d{3}(?!\d))", "\u00b6"),  # what may separate thousands
    (r"(?<!\\)\\(?:[,;:!> ]|quad(?![A-Za-z])|qquad(?![A-Za-z]))|~|\\nobreakspace", " "),
    (r"(?<!\d)(\d{1,3}(?:\u00b6\d{3})+)(?!\d)", lambda match: match[0].replace("\u00b6", "")),
    ("\u00b6", " "),
    (r"(?:\\\\|[.,;:\s])+$", ""),
    (rf"(?<![\\A-Za-z])(?={'|'.join(FUNCTION_NAMES.split())})({'|'.join(FUNCTION_NAMES.split())})(?![A-Za-z])", r"\\\1"),
    (r"(?<![\\A-Za-z])(pi|infinity|infty|oo)(?![A-Za-z])", lambda match: {"pi": r"\pi "}.get(match[0], r"\infty ")),
    (r"(\d*)\.(\d*)\\overline\s*\{\s*(\d{1,30})\s*\}", lambda match: repeating(*match.groups())),
    # mixed numbers: 1 1/2 and 1\frac{1}{2}
    (r"(?<![\d./^_])(?<!\^\{)(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d/])", r"(\1+\2/\3)"),
    (r"(?<![\d./^_}])(?<!\^\{)(\d+)\s*\\frac\s*(?:\{\s*(\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))", lambda match: mixed(match)),
]
REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in REWRITES]
WORDS = re.compile(r"(?=.*[A-Za-z]{2})[A-Za-z]+(?:[ '’-]+[A-Za-z]+)*")
NEGATION = re.compile(r"(?<![\\A-Za-z])(?:not|neither|never|except|unless|cannot)(?![A-Za-z])", re.IGNORECASE)
CHOICE = re.compile(r"\(?\s*([A-Za-z])\s*[).:]?")
INTRODUCES = r"(?:is|are|be|equals?|answer|get|have|has)\s*[:=]?|[:=]"
PREFIX = re.compile(
    rf"\s*\\(?:{TEXTS})\s*\{{[^{{}}]*(?:\b|(?=[:=]))(?:{INTRODUCES})\s*\}}\s*[:=]?\s*(?=\S)"  # \text{The answer is } 5
    rf"|[A-Za-z ,'’]*\b(?:is|are|be|equals?|answer|get|have|has)\b\s*[:=]?\s*(?=\S)",
    re.IGNORECASE,
)
PLAIN_UNIT = re.compile(
    r"(?<=[\d})!])(\s*)((?:[A-Za-z][A-Za-z.]*\s*)+(?:\^\s*\{?\s*-?\d\s*\}?)?"
    r"(?:\s*(?:/|per)\s*[A-Za-z]+(?:\^\s*\{?\s*-?\d\s*\}?)?)*)\s*$"
)
THOUSANDS = re.compile(r"[^()\[\]{}]*?(?<![\d.,])\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![\d,])[^()\[\]{},\d]*")
JOINED = re.compile(r"(?<![\\A-Za-z])(?:and|or)(?![A-Za-z])|\\text\s*\{\s*,?\s*(?:and|or)\s*\}|\\(?:land|lor|vee|wedge)(?![A-Za-z])")


def repeating(whole: str, start: str, period: str) -> str:
    """Write a repeating decimal as a fraction."""
    top = int((whole + start + period) or "0") - int((whole + start) or "0")
    return rf"\frac{{{top}}}{{{'9' * len(period) + '0' * len(start)}}}"


def mixed(match: re.Match) -> str:
    """Write a mixed number as a sum; what is no proper fraction stays a product."""
    whole, top, bottom = match[1], match[2] or match[3], match[4] or match[5]
    return f"({whole}+{top}/{bottom})" if int(top) < int(bottom) else match[0]


def spell(text: str) -> str:
    """Rewrite spellings that make no difference."""
    text = "".join(UNICODE.get(c, c) for c in text)
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    return text.strip()


def words(text: str) -> str:
    """Reduce a text to what must be equal: lower case, letters and digits, without articles."""
    text = re.sub(r"\\[A-Za-z]+", " ", text.lower())
    found = re.findall(r"[a-z0-9]+", text)
    return " ".join(word for word in found if word not in ("a", "an", "the") or len(found) == 1)


# ---- Units: a dimension and a factor, where known. Of unknown ones nothing is asked.
KNOWN_UNITS = {
    "length": "mm .001 millimeter .001 millimetre .001 cm .01 centimeter .01 centimetre .01 dm .1 m 1 meter 1 metre 1 km 1000 "
    "kilometer 1000 kilometre 1000 in .0254 inch .0254 inche .0254 ft .3048 feet .3048 foot .3048 yd .9144 yard .9144 mile 1609.344 mi 1609.344",
    "time": "ms .001 s 1 sec 1 second 1 min 60 minute 60 h 3600 hr 3600 hour 3600 day 86400 week 604800 year 31557600",
    "mass": "mg .001 g 1 gram 1 kg 1000 kilogram 1000 lb 453.59237 pound 453.59237 oz 28.349523125 ounce 28.349523125",
    "money": "dollar 1 usd 1 buck 1 cent .01",
    "angle": "degree 1 deg 1",
    "energy": "j 1 joule 1 kj 1000 ev 1.602176634e-19 erg 1e-7",
    "frequency": "hz 1 hertz 1 khz 1000 mhz 1e6 ghz 1e9",
}  # fmt: skip
UNITS = {
    name: (dimension, Fraction(factor))
    for dimension, table in KNOWN_UNITS.items()
    for name, factor in zip(table.split()[::2], table.split()[1::2], strict=True)
}


@lru_cache(1024)
def unit_of(text: str) -> tuple[str, Fraction] | None:
    """Return dimension and factor of a unit such as `cm^2`, `square inches` or `km/h`; None for one that is not known."""
    dimension, factor = [], Fraction(1)
    sign, square = 1, 1
    for part in re.findall(r"[A-Za-z]+|/|\^\s*\{?\s*-?\d", text.replace("per ", "/")):
        if part == "/":
            sign = -1
        elif part.startswith("^"):
            if not dimension:
                return None
            power = int(re.sub(r"[^-\d]", "", part))
            name, once, value = dimension.pop()
            dimension.append((name, once * power, value))
        elif part.lower() in ("square", "sq", "cubic", "cu"):
            square = 2 if part.lower().startswith("s") else 3
        else:
            name = part.lower() if part.lower() in UNITS else part.lower().removesuffix("s")
            if name not in UNITS:
                return None
            dimension.append((UNITS[name][0], sign * square, UNITS[name][1]))
            square = 1
    if not dimension:
        return None
    powers: dict[str, int] = {}
    for name, power, value in dimension:
        powers[name] = powers.get(name, 0) + power
        factor *= value**power
    return " ".join(f"{name}{power}" for name, power in sorted(powers.items()) if power), factor


# ---- Reading: a tree of tuples, the first item of each its kind
#   ("number", Fraction, is_decimal) ("symbol", name) ("sum", *terms) ("product", *factors) ("quotient", a, b) ("power", a, b)
#   ("call", function, *arguments) ("pm", a, b, sign) ("degree", a) ("list", *items) ("group", open, close, *items)
#   ("union" | "intersection" | "difference", a, b) ("matrix", *rows) ("numeral", digits, base) ("text", words)
#   ("relation", operators, *sides) ("infinity",)
TOKEN = re.compile(r"\s+|(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)|(?P<command>\\(?:[A-Za-z]+|.))|(?P<char>.)", re.DOTALL)
RELATIONS = {
    "=": "=", "<": "<", ">": ">", r"\lt": "<", r"\gt": ">", r"\le": "<=", r"\ge": ">=", r"\ne": "!=", r"\approx": "~",
    r"\simeq": "~", r"\sim": "~", r"\in": "in", r"\equiv": "=",
}  # fmt: skip
SETS = {r"\cup": "union", r"\cap": "intersection", r"\setminus": "difference"}
TIMES = ("*", r"\cdot", r"\times", r"\ast")
OVER = ("/", r"\div", ":", r"\colon")
OPENING = {"(": ")", "[": "]", r"\{": r"\}", r"\langle": r"\rangle", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil"}
ACCENTS = "hat vec bar dot ddot tilde overline overrightarrow widehat mathcal mathbb mathfrak underline widetilde".split()
REFUSED = r"""sum int iint oint prod lim begin end pmod bmod mod cases mid substack underbrace overbrace xrightarrow dots ldots cdots
 vdots not rightarrow to mapsto implies iff Rightarrow forall exists over choose left right""".split()
CALLS = {f"\\{name}": name for name in FUNCTION_NAMES.split() if name != "sqrt"}


class Reader:
    """A recursive-descent reader of one answer; UnreadableError where it does not understand."""

    def __init__(self, text: str):
        self.tokens, self.place, self.depth = list(self.tokenise(text)), 0, 0

    @staticmethod
    def tokenise(text: str) -> Iterator[tuple[str, str]]:
        place = 0
        while place < len(text):
            if match := re.compile(rf"\\(?:{TEXTS})\s*(?=\{{)").match(text, place):
                content, place = braced(text, match.end())
                yield "text", content
                continue
            if match := re.compile(r"\\begin\s*\{([pbvBV]?matrix|array)\}(?:\{[^{}]*\})?").match(text, place):
                end = rf"\end{{{match[1]}}}"
                stop = text.find(end, match.end())
                if stop < 0:
                    raise UnreadableError("a matrix without an end")
                yield "matrix", text[match.end() : stop]
                place = stop + len(end)
                continue
            match = TOKEN.match(text, place)
            place = match.end()
            if match.lastgroup:
                yield match.lastgroup, match[0]

    # -- what comes next
    def peek(self) -> tuple[str, str]:
        return self.tokens[self.place] if self.place < len(self.tokens) else ("end", "")

    def take(self, *values: str) -> str | None:
        """Step over the next token and return it if it is one of the values."""
        kind, value = self.peek()
        if kind in ("char", "command") and value in values:
            self.place += 1
            return value
        return None

    def need(self, value: str) -> None:
        if not self.take(value):
            raise UnreadableError(f"expected {value} at {self.peek()[1]!r}")

    def whole(self) -> tuple:
        """Read everything."""
        node = self.items()
        if self.place < len(self.tokens):
            raise UnreadableError(f"cannot go on at {self.peek()[1]!r}")
        return node

    # -- from lists down to atoms
    def items(self) -> tuple:
        found = [self.relation()]
        while self.take(",", ";"):
            found.append(self.relation())
        return found[0] if len(found) == 1 else ("list", *found)

    def relation(self) -> tuple:
        sides, operators = [], []
        if self.peek()[1] not in RELATIONS:
            sides.append(self.sets())
        while (operator := RELATIONS.get(self.peek()[1])) and self.peek()[0] != "text":
            self.place += 1
            operators.append(operator)
            sides.append(self.sets())
        if len(sides) == len(operators):  # "= 5"
            operators.pop(0)
        return sides[0] if not operators else ("relation", tuple(operators), *sides)

    def sets(self) -> tuple:
        node = self.sum()
        while operator := self.take(*SETS):
            node = (SETS[operator], node, self.sum())
        return node

    def sum(self) -> tuple:
        terms, first = [], True
        node = None
        while (sign := self.take("+", "-", r"\pm", r"\mp")) or first:
            term = self.product()
            if sign in (r"\pm", r"\mp"):
                node = ("pm", add(terms) if terms else None, term, 1 if sign == r"\pm" else -1)
                terms = [node]
            else:
                terms.append(negative(term) if sign == "-" else term)
            first = False
        return add(terms)

    def product(self) -> tuple:
        if self.take("-"):  # 5 * -3
            return negative(self.product())
        if self.take("+"):
            return self.product()
        node = self.power()
        while True:
            previous = self.tokens[self.place - 1][0]
            if self.take(*TIMES):
                node = multiply(node, self.signed_power())
            elif self.take(*OVER):
                node = ("quotient", node, self.signed_power())
            elif self.starts_atom():
                if previous == "number" == self.peek()[0]:
                    raise UnreadableError("two numbers beside each other")
                node = multiply(node, self.power())
            else:
                return node

    def signed_power(self) -> tuple:
        return negative(self.power()) if self.take("-") else self.power()

    def starts_atom(self) -> bool:
        kind, value = self.peek()
        if kind == "command":
            return value not in RELATIONS and value not in SETS and value not in (r"\pm", r"\mp", *OPENING.values(), *TIMES, *OVER)
        if kind == "char":
            return value.isalpha() or value in "([{" or (value == "|" and not self.depth_of_bars)
        return kind in ("number", "matrix", "text")

    depth_of_bars = 0

    def power(self) -> tuple:
        node = self.postfix(self.atom())
        if self.take("^"):
            if self.peek()[1] == r"\circ":
                self.place += 1
                return self.postfix(("degree", node))
            exponent = self.script()
            if exponent == ("symbol", r"\circ"):
                return self.postfix(("degree", node))
            node = self.postfix(("power", node, exponent))
        return node

    def postfix(self, node: tuple) -> tuple:
        while True:
            if self.take("!"):
                node = ("call", "factorial", node)
            elif self.take(r"\%", "%"):
                node = ("quotient", node, ("number", Fraction(100), False))
            elif self.take(r"\degree", r"\circ"):
                node = ("degree", node)
            else:
                return node

    def script(self) -> tuple:
        """Read what a ^ is followed by: braces, or one token, or a plain signed number (10^-12)."""
        if self.take("-"):
            return negative(self.script())
        kind, value = self.peek()
        if kind == "char" and value == "{":
            return self.atom()
        if kind == "number":
            self.place += 1
            return number(value)
        return self.atom()

    def atom(self) -> tuple:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise UnreadableError("nested too deeply")
        try:
            kind, value = self.peek()
            self.place += 1
            if kind == "number":
                return self.numeral(value) if self.take("_") else number(value)
            if kind == "matrix":
                return matrix(value)
            if kind == "text":
                return self.text(value)
            if kind == "char" and value.isalpha():
                return self.symbol(value)
            if kind == "command" or value in "([{|":
                return self.bracketed(value) or self.command(value)
            raise UnreadableError(f"cannot read {value!r}")
        finally:
            self.depth -= 1

    def bracketed(self, opening: str) -> tuple | None:
        """Read what an opening bracket begins; None for another token."""
        if opening in ("|", r"\lvert", r"\vert"):
            closing = {"|": "|", r"\lvert": r"\rvert", r"\vert": r"\vert"}[opening]
            self.depth_of_bars += 1
            node = self.sum()
            self.depth_of_bars -= 1
            self.need(closing)
            return ("call", "abs", node)
        if opening == "{":
            if self.take("}"):
                return ("symbol", r"\emptyset")
            node = self.items()
            self.need("}")
            return ("group", "{", "}", *node[1:]) if node[0] == "list" else node
        if opening not in OPENING:
            return None
        closing = OPENING[opening]
        if opening == r"\{" and self.take(r"\}"):
            return ("symbol", r"\emptyset")
        bars, self.depth_of_bars = self.depth_of_bars, 0
        node = self.items()
        self.depth_of_bars = bars
        if opening in "([":
            closing = self.take(")", "]") or closing
            if self.tokens[self.place - 1][1] != closing:
                raise UnreadableError(f"no bracket closes {opening}")
        else:
            self.need(closing)
        if opening in (r"\lfloor", r"\lceil"):
            return ("call", opening[2:], node)
        opening, closing = {r"\langle": ("(", ")"), r"\{": ("{", "}")}.get(opening, (opening, closing))
        if node[0] == "list":
            return ("group", opening, closing, *node[1:])
        return ("group", "{", "}", node) if opening == "{" else node

    def command(self, name: str) -> tuple:
        if name in CALLS:
            return self.call(CALLS[name])
        if name in (r"\frac", r"\binom"):
            parts = [self.argument() for _ in range(2)]
            return ("quotient", *parts) if name == r"\frac" else ("call", "binom", *parts)
        if name == r"\sqrt":
            degree = self.items() if self.take("[") and self.peek()[1] != "]" else None
            if degree:
                self.need("]")
            kind, value = self.peek()
            inner = number(value) if kind == "number" else self.atom()
            self.place += kind == "number"
            return ("power", inner, ("quotient", ("number", Fraction(1), False), degree or ("number", Fraction(2), False)))
        if name == r"\infty":
            return ("infinity",)
        if name[1:] in REFUSED or not name[1:].isalpha():
            raise UnreadableError(f"cannot read {name}")
        if name[1:] in ACCENTS:
            return self.symbol(f"{name}{self.raw_argument()}")
        return self.symbol(name)

    def argument(self) -> tuple:
        """Read an argument of a command: braces, or one digit, letter or command."""
        kind, value = self.peek()
        if kind == "number" and len(value) > 1 and value.isdigit():  # \frac12 is a half
            self.tokens[self.place : self.place + 1] = [("number", digit) for digit in value]
        if self.take("-"):
            return negative(self.argument())
        return self.atom()

    def raw_argument(self) -> str:
        """Return the text of an argument: one token, or what braces hold."""
        start, depth = self.place, 0
        while True:
            kind, value = self.peek()
            if kind == "end":
                raise UnreadableError("an argument is missing")
            self.place += 1
            depth += (value == "{") - (value == "}") if kind == "char" else 0
            if depth <= 0:
                break
        return "".join(value for _, value in self.tokens[start : self.place]).strip("{}").replace(" ", "")

    def symbol(self, name: str) -> tuple:
        """Read the rest of a letter's name: a subscript and primes."""
        while True:
            if self.take("_"):
                name += "_" + self.raw_argument()
            elif self.take("'", r"\prime"):
                name += "'"
            elif self.applied():
                name += f"({self.tokens[self.place - 2][1]})"
            else:
                return ("symbol", name)

    def applied(self) -> bool:
        """Step over a number in brackets behind a letter: f(0) is the function's value, not a product."""
        ahead = self.tokens[self.place : self.place + 3]
        found = [kind for kind, _ in ahead] == ["char", "number", "char"] and ahead[0][1] + ahead[2][1] == "()"
        self.place += 3 * found
        return found

    def numeral(self, digits: str) -> tuple:
        """Read the base of a number: 204_5."""
        base = re.sub(r"\D", "", self.raw_argument())
        if not base or not digits.isdigit():
            raise UnreadableError("a subscript that is no base")
        return ("numeral", digits.lstrip("0"), base)

    def call(self, function: str) -> tuple:
        """Read a function's base, power and argument: \\log_2 8, \\sin^2 x, \\cos(2t)."""
        base = power = None
        while mark := self.take("_", "^"):
            if mark == "_":
                base = self.script()
            else:
                power = self.script()
        if self.peek() in (("char", "("), ("char", "{"), ("char", "[")):
            node = self.atom()
            arguments = node[3:] if node[0] == "group" else (node,)
        else:
            arguments = (self.function_argument(),)
        if power == negative(("number", Fraction(1), False)):
            function, power = f"arc{function}", None
        node = ("call", function, *arguments, *([base] if base else []))
        return node if power is None else ("power", node, power)

    def function_argument(self) -> tuple:
        """Read what follows a function without brackets: a product that ends at the next function or sum."""
        node = self.power()
        while self.starts_atom() and self.peek()[1] not in CALLS and self.peek()[1] != "(" and self.peek()[0] != "text":
            node = multiply(node, self.power())
        if self.take("/"):
            node = ("quotient", node, self.power())
        return node

    def text(self, content: str) -> tuple:
        """Read a text: mathematics in it, a letter, or words."""
        content = content.strip()
        if re.search(r"\d", content):
            return Reader(content).whole()
        if content.lstrip("\\") in FUNCTION_NAMES.split():
            return self.call(content.lstrip("\\"))
        if len(content) == 1 and content.isalpha():
            return self.symbol(content)
        if not words(content):
            raise UnreadableError("an empty text")
        return ("text", words(content))


def braced(text: str, start: str) -> tuple[str, int]:
    """Return what the brace at `start` holds, and the place after its closing brace."""
    depth = 0
    for match in re.compile(r"\\[{}\\]|[{}]").finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return text[start + 1 : match.start()], match.end()
    raise UnreadableError("a brace that nothing closes")


def number(text: str) -> tuple:
    """A number as an exact fraction, and whether it was written as a decimal."""
    mantissa, _, exponent = text.lower().partition("e")
    if len(exponent) > 5 or len(text) > 1000:
        raise TooLargeError(f"{text[:20]} is too large")
    value = Fraction(mantissa if mantissa[-1] != "." else mantissa + "0") * Fraction(10) ** int(exponent or 0)
    return ("number", value, "." in text or "e" in text.lower())


def matrix(text: str) -> tuple:
    """Rows of a matrix."""
    rows = [row for row in re.split(r"\\\\", text) if row.strip()]
    return ("matrix", *(tuple(Reader(cell).whole() for cell in row.split("&")) for row in rows))


def negative(node: tuple) -> tuple:
    return ("number", -node[1], node[2]) if node[0] == "number" else ("product", ("number", Fraction(-1), False), node)


def add(terms: list) -> tuple:
    return terms[0] if len(terms) == 1 else ("sum", *terms)


def multiply(a: tuple, b: tuple) -> tuple:
    return (*a, b) if a[0] == "product" else ("product", a, b)


class Answer(NamedTuple):
    """One reading of an answer."""

    node: tuple
    unit: str | None = None
    percent: bool = False


@lru_cache(4096)
def read(text: str) -> list[Answer]:
    """Return the readings of an answer, more than one where commas may separate thousands or items; UnreadableError if none."""
    text = unwrap(strip_prefix(unwrap(spell(text))))
    if not text:
        raise UnreadableError("nothing there")
    if WORDS.fullmatch(text) and not JOINED.search(text):
        found = [Answer(("text", words(text)))]
        return [*found, *readings(text)] if text.isalpha() and len(text) < 4 else found  # mgh may be a product
    return readings(text)


def readings(text: str) -> list[Answer]:
    text = JOINED.sub(" , ", text)
    text = re.sub(r",\s*,", ",", text)
    texts = [text.replace(",", ""), text] if THOUSANDS.fullmatch(text) else [text]
    found = []
    for each in texts:
        each, percent = re.subn(r"\s*\\?%\s*$|\s*\\text\s*\{\s*\\?(?:%|percent)\s*\}\s*$|\s+percent\s*$", "", each)
        each, unit = split_unit(each)
        found.append(Answer(plain(Reader(each).whole()), unit, bool(percent)))
    return found


def unwrap(text: str) -> str:
    """Take away brackets around the whole of one thing."""
    while text[:1] in ("{", "("):
        depth, several = 0, False
        for match in re.finditer(r"\\.|[{}()\[\],;]", text):
            depth += {"{": 1, "(": 1, "[": 1, "}": -1, ")": -1, "]": -1}.get(match[0], 0)
            several |= depth == 1 and match[0] in (",", ";")
            if depth == 0:
                break
        if match.end() != len(text) or match[0] != {"{": "}", "(": ")"}[text[0]] or (several and text[0] == "("):
            break
        text = text[1:-1].strip().rstrip(" .")
    return text


def strip_prefix(text: str) -> str:
    """Take away an introduction: `\\text{The answer is } 5`, `answer: 5`."""
    match = PREFIX.match(text)
    return text[match.end() :] if match else text


def split_unit(text: str) -> tuple[str, str | None]:
    """Split a unit off the end of what holds a number."""
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?\s*(?:\\(?:text|mathrm)\s*\{\s*([CFK])\s*\}|([CFK]))\s*$", r"^{\\circ}", text)
    tail = re.compile(
        rf"(?<=[\w}})!\]])\s*((?:\\(?:{TEXTS})\s*\{{([^{{}}]*)\}}(?:\s*\^\s*\{{?\s*-?\d\s*\}}?)?[\s/\\]*(?:cdot)?\s*)+)$"
    )
    if (match := tail.search(text)) and re.search(r"[A-Za-z]", match[1]) and re.search(r"\d", text[: match.start()]):
        content = re.sub(rf"\\(?:{TEXTS})|[{{}}\\]", " ", match[1])
        if not re.search(r"\b(?:or|and|if|when|for|not)\b", content) and not (len(content.strip()) == 1 and "mathrm" in match[1] and content.strip() not in UNITS):
            return text[: match.start()], content.strip()
    if match := PLAIN_UNIT.search(text):
        content = match[2].strip()
        known = unit_of(content) is not None and len(re.match(r"[A-Za-z]*", content)[0]) > 1
        word = match[1] and re.search(r"[A-Za-z]{2}", content) and not re.search(r"\b(?:or|and|if|when|for|not|mod)\b", content)
        before = text[: match.start()]
        if (known or word) and not re.search(r"(?:\\[A-Za-z]+|[_^]\{?[^{}]*)$", before):
            return before, content
    return text, None


def plain(node: tuple) -> tuple:
    """Take off what does not change an answer: `x \\in`, one-element brackets of a list."""
    if node[0] == "relation" and node[1] == ("in",):
        return node[3]
    return node


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
    """The value of a letter at a point; negative at odd ones."""
    value = (1, 7, 3, 2, 5)[point // 2] * Fraction(random.Random(f"{name} {point // 2}").randint(40, 160), 73)
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
        return Fraction(0) if abs(total) <= 1e-13 * max(map(abs, parts)) else small(total)  # what is left by rounding
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
        return call(node[1], [evaluate(part, point, in_angle=node[1] in ANGLES) for part in node[2:]])
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


ANGLES = "sin cos tan cot sec csc".split()
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
        found = {"floor": math.floor, "ceil": math.ceil, "min": min, "max": max, "abs": abs}[function]
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
        if any(abs(value) > 2_000 and function in ("binom", "factorial") for value in values) or min(values) < 0:
            raise TooLargeError(f"too large a {function}")
        name = {"binom": "comb"}.get(function, function)
        return small(Fraction(getattr(math, name)(*(int(value) for value in values))))
    if function in ("log", "lg"):
        base = real(values[1]) if len(values) > 1 else {"log": 10.0, "lg": 10.0}[function]
        function, divisor = "ln", cmath.log(base)
    else:
        divisor = 1
    if function not in SMOOTH or (len(values) > 1 and divisor == 1):
        raise UnreadableError(f"{function} of {len(values)} arguments")
    try:
        value = complex(SMOOTH[function](real(first))) / divisor
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise UnreadableError(f"{function} has no value there") from error
    value = complex(0 if abs(value.real) < 1e-15 else value.real, 0 if abs(value.imag) < 1e-15 else value.imag)
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
    if len(prediction) > MAX_LENGTH or not re.search(r"[^\W_]|\\infty|\\emptyset|\\varnothing|∞|∅|\\\{", prediction):
        return False
    if squeeze(gold) == squeeze(prediction):
        return True
    if bool(NEGATION.search(gold)) != bool(NEGATION.search(prediction)):
        return False
    try:
        golds, predictions = read(gold), read(prediction)
    except (UnreadableError, RecursionError):
        return None
    verdicts = [same_answer(a, b) for a in golds for b in predictions]
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
        elif re.sub(r"-?\d", "", units[0][0]) != re.sub(r"-?\d", "", units[1][0]):  # cm for cm^2 is a slip
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
        return same(*nodes) and abs(real(evaluate(nodes[0], 0))) >= 1  # so many per cent were asked for
    except TooLargeError:
        return None if too_large(gold.node) and too_large(prediction.node) else False
    except UnreadableError:
        return None


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
        both_named = strict or sum(is_named(item) for item in (*x, *y)) == len(x) + len(y)
        return len(x) == len(y) and matched(x, y, both_named and len(x) > 1)
    if a[0] == "relation" or b[0] == "relation":
        return same_relation(a, b, strict)
    if a[0] == "text" or b[0] == "text" or (a[0] == b[0] == "symbol" and a[1] in "ABCDEFGHIJ"):  # the letter of a choice
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
    found = [each for item in items for each in ((with_sign(item, 1), with_sign(item, -1)) if holds(item, "pm") else (item,))]
    # x = 3, 4: the name stands for all
    if len(found) > 1 and is_named(found[0]) and not any(item[0] == "relation" for item in found[1:]):
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
        return shapes[0] == shapes[1] and all(same(x, y) for r, s in zip(a[1:], b[1:], strict=True) for x, y in zip(r, s, strict=True))
    if a[0] == "group":
        return a[1:3] == b[1:3] and len(a) == len(b) and all(same(x, y) for x, y in zip(a[3:], b[3:], strict=True))
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
    return ("symbol", r"\infty") if node == ("infinity",) else tuple(replace_infinity(part) for part in node)


def same_value(a: tuple, b: tuple) -> bool:
    """Compare expressions by their values at points; at negative ones as well where absolute values are taken."""
    decimal = holds(a, "number", lambda node: node[2]) or holds(b, "number", lambda node: node[2])
    if not symbols(a) | symbols(b):
        return same_number(evaluate(a, 0), evaluate(b, 0), decimal)
    signed = holds(a, "call", lambda node: node[1] == "abs") or holds(b, "call", lambda node: node[1] == "abs")
    pairs, error = [], None
    for point in range(0, 10, 1 if signed else 2):
        try:
            pairs.append((evaluate(a, point), evaluate(b, point)))
        except TooLargeError:
            raise
        except UnreadableError as caught:  # a division by zero there
            error = caught
            continue
        if not same_number(*pairs[-1], decimal):
            return False
        if len(pairs) == (5 if signed else 3):
            break
    if len(pairs) < 2 or all(x == 0 for x, _ in pairs):  # an expression that is zero everywhere was misread
        raise error or UnreadableError("no value")
    return True


def same_number(gold, value, decimal: bool) -> bool:
    """Compare two values; an integer is meant exactly."""
    whole = isinstance(gold, Fraction) and gold.denominator == 1
    return close(gold, value, TOLERANCE if decimal and not whole else Fraction(0))


# -- relations
FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!=", "~": "~"}


def is_named(node: tuple) -> bool:
    """Whether a relation only names a value: x = 5, f(x) = 2x, AB = 5, (x, y) = (1, 2)."""
    if node[0] != "relation" or node[1][0] not in ("=", "~") or any(op not in ("=", "~") for op in node[1]):
        return False
    left = node[2]
    return left[0] == "text" or (
        bool(symbols(left) or left in (("symbol", "i"), ("symbol", "e"))) and not holds(left, "number") and not holds(left, "sum")
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
                return any_value(a, b)
            if not strict and not (symbols(a[2]) & symbols(b[-1]) or symbols(b[2]) & symbols(a[-1])):
                return any_value(a, b)
        return len(a) == len(b) and (same_sides(a, b) or same_sides(a, flip(b)))
    relation, other = (a, b) if a[0] == "relation" else (b, a)
    if all(op in ("=", "~") for op in relation[1]):
        if not is_named(relation) and symbols(relation) - symbols(other):
            flipped = flip(relation)  # 5 = x
            if not is_named(flipped):
                return False
            relation = flipped
        try:
            ends = {value_of(relation), *([relation[3]] if is_named(relation) and "~" in relation[1] else ())}
        except UnreadableError:
            return False
        return any(same(other, end) if relation is b else same(end, other) for end in ends)
    interval = as_interval(relation)
    ambiguous = other[0] == "group" and other[1:3] == ("(", ")") and not holds(other, "infinity")  # (1, 2) may be a point
    return interval is not None and not ambiguous and same(interval, other)


def any_value(a: tuple, b: tuple) -> bool:
    return same(value_of(a), value_of(b))


def flip(node: tuple) -> tuple:
    return ("relation", tuple(FLIPPED.get(op, op) for op in reversed(node[1])), *reversed(node[2:]))


def same_sides(a: tuple, b: tuple) -> bool:
    """Whether relations of the same operators say the same: side by side, or after moving terms and dividing by a constant."""
    if a[1] != b[1]:
        return False
    if all(same(x, y) for x, y in zip(a[2:], b[2:], strict=True)):
        return True
    if len(a) != 4 or a[1] == ("~",) or any(holds(n, k) for n in (a, b) for k in ("group", "text", "infinity", "matrix", "list")):
        return False
    ratios = []
    for point in (0, 2, 4):
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
        return ("group", "[" if operators[0] == "<=" else "(", "]" if operators[1] == "<=" else ")", sides[0], sides[2])
    if len(sides) != 2:
        return None
    if sides[0][0] == "symbol":
        return ("group", "(", "]" if operators[0] == "<=" else ")", negative(("infinity",)), sides[1])
    if sides[1][0] == "symbol":
        return ("group", "[" if operators[0] == "<=" else "(", ")", sides[0], ("infinity",))
    return None


# ---- The worker process
def judge(gold: str, prediction: str) -> bool:
    """Return the verdict on a pair: this reader's, or math-verify's where it cannot tell."""
    verdict = equal(gold, prediction)
    return with_math_verify(gold, prediction) if verdict is None else verdict


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
    forbidden = ("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.remove", "os.rename", "shutil.")

    def refuse(event: str, arguments: tuple) -> None:
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if writes or event.startswith(forbidden):
            raise PermissionError(f"a grading process may not {event}")

    sys.addaudithook(refuse)


def serve() -> None:
    """Answer lines of [gold, prediction] with 1, 0 or `memory`, until the parent goes; the parent keeps the time.

    `loading` and `loaded` stand around the import of math-verify, which takes seconds and is not the answer's fault.
    """
    import signal

    for stop in (signal.SIGINT, signal.SIGTERM):  # sent to the whole process group they are the parent's to heed
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
