r"""Read an answer, LaTeX or plain text, into a tree: spelling, a recursive-descent reader, units.

    read("x = 3\\frac{1}{2}\\text{ cm}") -> one Answer: x named as the sum of 3 and 1/2, in cm

Nodes are tuples, the first item of each its kind:
    ("number", Fraction, is_decimal)   ("numeral", digits, base)   ("symbol", name)   ("infinity",)   ("text", words)
    ("sum", *terms)   ("product", *factors)   ("quotient", a, b)   ("power", a, b)   ("degree", a)   ("pm", a, b, sign)
    ("call", function, *arguments)   ("matrix", *rows)   ("relation", operators, *sides)
    ("list", *items)   ("group", open, close, *items)   ("union" | "intersection" | "difference", a, b)
"""

import re
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

MAX_DEPTH = 40  # nested brackets


class UnreadableError(ValueError):
    """An answer that the reader does not understand, or a value that it does not compute."""


class TooLargeError(UnreadableError):
    """A value beyond MAX_BITS."""


# ---- Extraction
LONGEST_BOX = 3_000  # characters that are kept of a box: answers as long are wrong, and boxes in boxes would fill the memory


def boxes(text: str) -> list[str]:
    r"""Return the contents of every `\boxed{…}` with balanced braces, in order of their beginning."""
    found, opened = [], []  # where a box began, or None for a brace that is no box's
    for match in re.finditer(r"\\+boxed\s*\{|\\[{}\\]|[{}]", text):
        if match[0] in (r"\{", r"\}", r"\\"):
            continue
        if match[0] != "}":
            opened.append(None if match[0] == "{" else match.end())
        elif opened and (start := opened.pop()) is not None:
            found.append((start, match.start()))
    return [text[start : min(end, start + LONGEST_BOX)] for start, end in sorted(found)]


# ---- Spelling
STYLES = r"mathbf|boldsymbol|bm|mathit|mathsf|mathnormal|bf|it|displaystyle|textstyle|limits|left\.?|right\.?|[bB]igg?[lrm]?|f?boxed"
TEXTS = "text|textbf|textit|textrm|textsf|textnormal|mathrm|mbox|hbox|operatorname|rm"
FUNCTION_NAMES = "arcsin arccos arctan arcsinh arccosh arctanh sinh cosh tanh sin cos tan cot sec csc ln log lg exp sqrt gcd lcm min max"
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
    (r"^\s*\*+|\*+\s*$|\\(?:text)?color\s*\{[^{}]*\}", " "),  # **5**
    (
        rf"(?:\(\s*(\d+)\s*\)|\\(?:{TEXTS})\s*\{{\s*(\d+)\s*\}})(?=\s*_)",
        lambda m: m[1] or m[2],
    ),  # (204)_5
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\\(?:le|ge)qslant(?![A-Za-z])", lambda match: match[0][:3]),
    (r"\\(?:le|ge|ne)q(?![A-Za-z])", lambda match: match[0][:3]),
    (r"!=|<=|>=", lambda match: {"!": r"\ne ", "<": r"\le ", ">": r"\ge "}[match[0][0]]),
    (r"\*\*", "^"),
    (r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", r"\\times "),
    (r"\\varnothing(?![A-Za-z])", r"\\emptyset"),
    (
        r"(?<=\d)(?:\\,|\\!|\\;|\\ |\{,\}|,\\!|,\\,|\s)+(?=\d{3}(?!\d))",
        "\u00b6",
    ),  # what may separate thousands
    (r"(?<!\\)\\(?:[,;:!> ]|quad(?![A-Za-z])|qquad(?![A-Za-z]))|~|\\nobreakspace", " "),
    (r"(?<!\d)(\d{1,3}(?:\u00b6\d{3})+)(?!\d)", lambda match: match[0].replace("\u00b6", "")),
    ("\u00b6", " "),
    (r"(?:\\\\|[.,;:\s])+$", ""),
    (rf"(?<![\\A-Za-z])({FUNCTION_NAMES.replace(' ', '|')})(?![A-Za-z])", r"\\\1"),
    (
        r"(?<![\\A-Za-z])(pi|infinity|infty|oo)(?![A-Za-z])",
        lambda match: {"pi": r"\pi "}.get(match[0], r"\infty "),
    ),
    (r"(\d*)\.(\d*)\\overline\s*\{\s*(\d{1,30})\s*\}", lambda match: repeating(*match.groups())),
    # mixed numbers: 1 1/2 and 1\frac{1}{2}
    (r"(?<![\d./^_])(?<!\^\{)(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d/])", r"(\1+\2/\3)"),
    (
        r"(?<![\d./^_}])(?<!\^\{)(\d+)\s*\\frac\s*(?:\{\s*(\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))",
        lambda m: mixed(m),
    ),
]
REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in REWRITES]
WORDS = re.compile(r"(?=.*[A-Za-z]{2})[A-Za-z]+(?:[ '’-]+[A-Za-z]+)*")
QUALIFIERS = re.compile(  # words that change what is said: on both sides, or on neither
    r"(?<![\\A-Za-z])(?:not|no|none|neither|never|except|unless|cannot|than|least|most|half|twice|between|wrong|base|binary|mod"
    r"|[a-z]+n['’]t)(?![A-Za-z])|\d\s*(?:\\[a-z]+\s*\{)?\s*(?:squared|cubed|factorial|halves|thirds|tenths|hundredths)",
    re.IGNORECASE,
)
SCALE = re.compile(
    r"\^\s*\{?\s*\\circ\s*\}?\s*(?:\\(?:text|mathrm)\s*\{\s*([CFK])\s*\}|([CFK]))\s*$"
)
MAGNITUDES = {
    "dozen": 12,
    "hundred": 100,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
WHOLE_TEXT = re.compile(rf"\\(?:{TEXTS})\s*\{{([^{{}}]*)\}}")
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
THOUSANDS = re.compile(
    r"[^()\[\]{}]*?(?<![\d.,])\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![\d,])[^()\[\]{},\d]*"
)
JOINED = re.compile(
    r"(?<![\\A-Za-z])(?:and|or)(?![A-Za-z])|\\text\s*\{\s*,?\s*(?:and|or)\s*\}|\\(?:land|lor|vee|wedge)(?![A-Za-z])"
)


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
    found = re.findall(r"[A-Za-z0-9]+", re.sub(r"\\[A-Za-z]+", " ", text))
    articles = [
        word in ("a", "an", "the") or (i == 0 and word in ("A", "An", "The"))
        for i, word in enumerate(found)
    ]
    return " ".join(
        [word for word, drop in zip(found, articles, strict=True) if not drop] or found
    ).lower()


# ---- Reading
TOKEN = re.compile(
    r"\s+|(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)|(?P<command>\\(?:[A-Za-z]+|.))|(?P<char>.)",
    re.DOTALL,
)
TEXT = re.compile(rf"\\(?:{TEXTS})\s*(?=\{{)")
MATRIX = re.compile(r"\\begin\s*\{([pbB]?matrix|array)\}(?:\{[^{}]*\})?")
RELATIONS = {
    "=": "=", "<": "<", ">": ">", r"\lt": "<", r"\gt": ">", r"\le": "<=", r"\ge": ">=", r"\ne": "!=", r"\approx": "~",
    r"\simeq": "~", r"\sim": "~", r"\in": "in", r"\equiv": "=",
}  # fmt: skip
SETS = {r"\cup": "union", r"\cap": "intersection", r"\setminus": "difference"}
TIMES = ("*", r"\cdot", r"\times", r"\ast")
OVER = ("/", r"\div", ":", r"\colon")
OPENING = {
    "(": ")",
    "[": "]",
    r"\{": r"\}",
    r"\langle": r"\rangle",
    r"\lfloor": r"\rfloor",
    r"\lceil": r"\rceil",
}
ACCENTS = frozenset(
    re.split(
        " ",
        "hat vec bar dot ddot tilde overline overrightarrow widehat mathcal mathbb mathfrak underline widetilde",
    )
)
REFUSED = frozenset(
    re.split(
        " ",
        "sum int iint oint prod lim begin end pmod bmod mod cases mid substack underbrace overbrace xrightarrow dots ldots "
        "cdots vdots not rightarrow to mapsto implies iff Rightarrow forall exists over choose left right",
    )
)
CALLS = {f"\\{name}": name for name in FUNCTION_NAMES.split() if name != "sqrt"}


class Reader:
    """A recursive-descent reader of one answer; UnreadableError where it does not understand."""

    def __init__(self, text: str):
        self.tokens, self.place = list(self.tokenise(text)), 0
        self.depth, self.depth_of_bars = (
            0,
            0,
        )  # of brackets, and of absolute values since the last one

    @staticmethod
    def tokenise(text: str) -> Iterator[tuple[str, str]]:
        place = 0
        while place < len(text):
            if match := TEXT.match(text, place):
                content, place = braced(text, match.end())
                yield "text", content
                continue
            if match := MATRIX.match(text, place):
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
        if len(sides) == len(operators) and operators[0] in ("=", "~"):  # "= 5"
            operators.pop(0)
        elif len(sides) == len(operators):  # "> 5", of what is not said
            sides.insert(0, ("symbol", ""))
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
            return (
                value not in RELATIONS
                and value not in SETS
                and value not in (r"\pm", r"\mp", *OPENING.values(), *TIMES, *OVER)
            )
        if kind == "char":
            return value.isalpha() or value in "([{" or (value == "|" and not self.depth_of_bars)
        return kind in ("number", "matrix", "text")

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
        opening, closing = {r"\langle": ("(", ")"), r"\{": ("{", "}")}.get(
            opening, (opening, closing)
        )
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
            return (
                "power",
                inner,
                (
                    "quotient",
                    ("number", Fraction(1), False),
                    degree or ("number", Fraction(2), False),
                ),
            )
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
        return (
            "".join(value for _, value in self.tokens[start : self.place])
            .strip("{}")
            .replace(" ", "")
        )

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
        found = [kind for kind, _ in ahead] == ["char", "number", "char"] and ahead[0][1] + ahead[
            2
        ][1] == "()"
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
        while (
            self.starts_atom()
            and self.peek()[1] not in CALLS
            and self.peek()[1] != "("
            and self.peek()[0] != "text"
        ):
            node = multiply(node, self.power())
        if self.take("/"):
            node = ("quotient", node, self.power())
        return node

    def text(self, content: str) -> tuple:
        """Read a text: mathematics in it, a letter, or words."""
        content = content.strip()
        if len(items := [item for item in content.split(",") if item.strip()]) > 1:  # \text{A, B}
            return ("list", *(self.text(item) for item in items))
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
    value = Fraction(mantissa if mantissa[-1] != "." else mantissa + "0") * Fraction(10) ** int(
        exponent or 0
    )
    return ("number", value, "." in text or "e" in text.lower())


def matrix(text: str) -> tuple:
    """Rows of a matrix."""
    rows = [row for row in re.split(r"\\\\", text) if row.strip()]
    return ("matrix", *(tuple(Reader(cell).whole() for cell in row.split("&")) for row in rows))


def negative(node: tuple) -> tuple:
    return (
        ("number", -node[1], node[2])
        if node[0] == "number"
        else ("product", ("number", Fraction(-1), False), node)
    )


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
    if (match := WHOLE_TEXT.fullmatch(text)) and (
        re.search(r"\d", match[1]) or JOINED.search(match[1])
    ):
        text = match[1].strip()  # \text{7 ways}
    if WORDS.fullmatch(text) and not JOINED.search(text):
        found = [Answer(("text", words(text)))]
        return (
            [*found, *readings(text)] if text.isalpha() and len(text) < 4 else found
        )  # mgh may be a product
    return readings(text)


def readings(text: str) -> list[Answer]:
    text = JOINED.sub(" , ", text)
    text = re.sub(r",\s*,", ",", text)
    texts = [text.replace(",", ""), text] if THOUSANDS.fullmatch(text) else [text]
    found = []
    for each in texts:
        each, percent = re.subn(
            r"\s*\\?%\s*$|\s*\\text\s*\{\s*\\?(?:%|percent)\s*\}\s*$|\s+percent\s*$", "", each
        )
        each, unit = split_unit(each)
        node = plain(Reader(each).whole())
        if factor := MAGNITUDES.get(
            (unit or "").partition(" ")[0].lower().removesuffix("s")
        ):  # 3 million
            node, unit = (
                ("product", node, ("number", Fraction(factor), False)),
                unit.partition(" ")[2] or None,
            )
        found.append(Answer(node, unit, bool(percent)))
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
        if (
            match.end() != len(text)
            or match[0] != {"{": "}", "(": ")"}[text[0]]
            or (several and text[0] == "(")
        ):
            break
        text = text[1:-1].strip().rstrip(" .")
    return text


def strip_prefix(text: str) -> str:
    """Take away an introduction: `\\text{The answer is } 5`, `answer: 5`."""
    match = PREFIX.match(text)
    return text[match.end() :] if match else text


def split_unit(text: str) -> tuple[str, str | None]:
    """Split a unit off the end of what holds a number."""
    if match := SCALE.search(text):
        return text[: match.start()] + r"^{\circ}", match[1] or match[2]
    tail = re.compile(
        rf"(?<=[\w}})!\]])\s*((?:\\(?:{TEXTS})\s*\{{([^{{}}]*)\}}(?:\s*\^\s*\{{?\s*-?\d\s*\}}?)?[\s/\\]*(?:cdot)?\s*)+)$"
    )
    if (
        (match := tail.search(text))
        and re.search(r"[A-Za-z]", match[1])
        and re.search(r"\d", text[: match.start()])
    ):
        content = re.sub(rf"\\(?:{TEXTS})|[{{}}\\]", " ", match[1])
        if not re.search(r"\b(?:or|and|if|when|for|not)\b", content) and not (
            len(content.strip()) == 1 and "mathrm" in match[1] and content.strip() not in UNITS
        ):
            return text[: match.start()], content.strip()
    if match := PLAIN_UNIT.search(text):
        content = match[2].strip()
        single = len(re.match(r"[A-Za-z]*", content)[0]) == 1  # 5 m, but not 5m
        known = unit_of(content) is not None and not (
            single
            and not (
                match[1]
                and re.fullmatch(r"(?:\\times|\\cdot|[-+\d.,/ eE^{}])+", text[: match.start()])
            )
        )
        word = (
            match[1]
            and re.search(r"[A-Za-z]{2}", content)
            and not re.search(r"\b(?:or|and|if|when|for|not|mod)\b", content)
        )
        before = text[: match.start()]
        if (known or word) and not re.search(r"(?:\\[A-Za-z]+|[_^]\{?[^{}]*)$", before):
            return before, content
    return text, None


def plain(node: tuple) -> tuple:
    """Take off what does not change an answer: `x \\in`, one-element brackets of a list."""
    if node[0] == "relation" and node[1] == ("in",):
        return node[3]
    return node


# ---- Units: a dimension and a factor, where known. Of unknown ones nothing is asked.
KNOWN_UNITS = {
    "length": "mm .001 millimeter .001 millimetre .001 cm .01 centimeter .01 centimetre .01 dm .1 m 1 meter 1 metre 1 km 1000 "
    "kilometer 1000 kilometre 1000 in .0254 inch .0254 inche .0254 ft .3048 feet .3048 foot .3048 yd .9144 yard .9144 "
    "mile 1609.344 mi 1609.344",
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
