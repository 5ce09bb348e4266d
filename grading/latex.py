r"""Read an answer, LaTeX or plain text, into a tree.

    read("x = 3\\frac{1}{2}\\text{ cm}") -> one Answer: x named as the sum of 3 and 1/2, in cm
    boxes("so \\boxed{5}") -> ["5"]

`read` brings the answer to one spelling (spelling.py), splits a unit off (units.py), and parses the
rest by recursive descent. A node of the tree is a tuple whose first item is its kind:

    ("number", Fraction, last_place)        ("numeral", digits, base)
    ("symbol", name)                        ("infinity",)
    ("text", words)                         ("matrix", *rows)
    ("sum", *terms)                         ("product", *factors)
    ("quotient", top, bottom)               ("power", base, exponent)
    ("pm", left or None, right, sign)       ("degree", angle)
    ("call", function, *arguments)          ("relation", operators, *sides)
    ("list", *items)                        ("group", opening, closing, *items)
    ("ratio", *terms)                       ("clock", hours, minutes)
    ("union" | "intersection" | "difference", left, right)

The last place of a decimal is what one unit there is of the whole: 1/314 for 3.14. That of other
numbers is None.
"""

import re
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from grading.spelling import (
    CHOICE,
    CONJUNCTION,
    FUNCTION_NAMES,
    PHRASE,
    QUALIFIERS,
    TEXT_COMMANDS,
    normalise_words,
    spell,
    strip_introduction,
    unwrap,
)
from grading.units import split_unit, unit_of

# What others import, with the names that they need of spelling.py and units.py.
__all__ = [
    "CHOICE",
    "QUALIFIERS",
    "Answer",
    "TooLargeError",
    "UnreadableError",
    "boxes",
    "negative",
    "read",
    "spell",
    "unit_of",
]

MAX_DEPTH = 40  # nested atoms: brackets, arguments, exponents
# Characters that are kept of a box. Longer answers are wrong anyway, and nested boxes would fill
# the memory.
LONGEST_BOX = 3_000


class UnreadableError(ValueError):
    """An answer that the parser does not understand, or a value that cannot be computed."""


class TooLargeError(UnreadableError):
    """A value that is too large to compute."""


# ---- Boxes

# Backslashes with the box or the brace after them, or a brace alone. A run of backslashes matches
# as a whole, whatever follows it, so that no text is read twice.
BOX_OR_BRACE = re.compile(r"(\\+)(boxed\s*\{|[{}])?|[{}]")


def boxes(text: str) -> list[str]:
    r"""Return what every `\boxed{…}` with balanced braces holds, in order of their beginning."""
    spans = []  # start and end of the contents of each closed box
    open_braces = []  # for each open brace: where the contents of its box start, None if not a box
    for match in BOX_OR_BRACE.finditer(text):
        backslashes, after = match.groups()
        mark = after if backslashes else match[0]
        # a pair of backslashes is a line break, and escapes nothing
        is_escaped = mark in ("{", "}") and len(backslashes or "") % 2 == 1
        if mark is None or is_escaped:
            continue
        if mark == "{":
            open_braces.append(None)
        elif mark != "}":
            open_braces.append(match.end())
        elif open_braces:
            start = open_braces.pop()
            if start is not None:
                spans.append((start, match.end() - 1))
    return [text[start : min(end, start + LONGEST_BOX)] for start, end in sorted(spans)]


# ---- Nodes


def integer(value: int) -> tuple:
    """Make the node of an exact integer."""
    return ("number", Fraction(value), None)


def number(text: str) -> tuple:
    """Make the node of a number, e.g. `12`, `0.5` or `1e-7`, with its exact value."""
    text = text.lower()
    mantissa, _, exponent = text.partition("e")
    if len(exponent) > 5 or len(text) > 1000:
        raise TooLargeError(f"{text[:20]} is too large")
    if mantissa.endswith("."):
        mantissa += "0"
    value = Fraction(mantissa) * Fraction(10) ** int(exponent or 0)
    if "." not in text and "e" not in text:
        return ("number", value, None)
    digits = int(mantissa.replace(".", ""))
    return ("number", value, Fraction(1, max(1, digits)))


def negative(node: tuple) -> tuple:
    """Make the node of the negative of a node."""
    if node[0] == "number":
        return ("number", -node[1], node[2])
    return ("product", integer(-1), node)


def add(terms: list[tuple]) -> tuple:
    """Make the node of a sum; one term is itself."""
    if len(terms) == 1:
        return terms[0]
    return ("sum", *terms)


def multiply(left: tuple, right: tuple) -> tuple:
    """Make the node of a product, and append to a product on the left."""
    if left[0] == "product":
        return (*left, right)
    return ("product", left, right)


def enclose(opening: str, node: tuple, closing: str) -> tuple:
    """Make a group of a list; brackets around one thing change nothing."""
    if node[0] == "list":
        return ("group", opening, closing, *node[1:])
    return node


# ---- Tokens


class Token(NamedTuple):
    """A piece of an answer."""

    kind: str  # clock, number, command, char, text, matrix or end
    value: str  # as written; what the braces of a text, or begin and end of a matrix, hold


TOKEN = re.compile(
    r"\s+"
    # 9:05, perhaps a time of day; but neither the ratio 3:4 nor a part of 1:10:100
    r"|(?P<clock>(?<![\d.:^_/*-])\d{1,2}:\d{2}(?!\s*[\d.:^_!/*A-Za-z\\]))"
    r"|(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)"
    r"|(?P<command>\\(?:[A-Za-z]+|.))"
    r"|(?P<char>.)",
    re.DOTALL,
)
TEXT = re.compile(rf"\\(?:{TEXT_COMMANDS})\s*(?=\{{)")
MATRIX = re.compile(r"\\begin\s*\{([pbB]?matrix|array)\}(?:\{[^{}]*\})?")
BRACE = re.compile(r"\\[{}\\]|[{}]")


def tokenise(text: str) -> Iterator[Token]:
    """Yield the tokens of an answer; a text and a matrix are one token each."""
    position = 0
    while position < len(text):
        if match := TEXT.match(text, position):
            content, position = braced(text, match.end())
            yield Token("text", content)
        elif match := MATRIX.match(text, position):
            ending = rf"\end{{{match[1]}}}"
            stop = text.find(ending, match.end())
            if stop < 0:
                raise UnreadableError("a matrix without an end")
            yield Token("matrix", text[match.end() : stop])
            position = stop + len(ending)
        else:
            match = TOKEN.match(text, position)
            position = match.end()
            if match.lastgroup is not None:
                yield Token(match.lastgroup, match[0])


def braced(text: str, start: int) -> tuple[str, int]:
    """Return what the brace at `start` holds, and the position after its closing brace."""
    depth = 0
    for match in BRACE.finditer(text, start):
        if match[0] == "{":
            depth += 1
        elif match[0] == "}":
            depth -= 1
        if depth == 0:
            return text[start + 1 : match.start()], match.end()
    raise UnreadableError("a brace that nothing closes")


# ---- The parser

NUMERIC = ("number", "clock")
SIGNS = ("+", "-", r"\pm", r"\mp")
TIMES = ("*", r"\cdot", r"\times", r"\ast")
COLONS = (":", r"\colon")
OVER = ("/", r"\div")
RELATIONS = {
    "=": "=",
    "<": "<",
    ">": ">",
    r"\lt": "<",
    r"\gt": ">",
    r"\le": "<=",
    r"\ge": ">=",
    r"\ne": "!=",
    r"\approx": "~",
    r"\simeq": "~",
    r"\sim": "~",
    r"\in": "in",
    r"\equiv": "=",
}
SETS = {r"\cup": "union", r"\cap": "intersection", r"\setminus": "difference"}
BRACKETS = {
    "(": ")",
    "[": "]",
    "{": "}",
    r"\{": r"\}",
    r"\langle": r"\rangle",
    r"\lfloor": r"\rfloor",
    r"\lceil": r"\rceil",
    r"\lvert": r"\rvert",
}
CALLED_BRACKETS = {r"\lfloor": "floor", r"\lceil": "ceil", r"\lvert": "abs"}
# Commands that do not begin an atom.
CONNECTIVES = frozenset([*RELATIONS, *SETS, *TIMES, *OVER, *COLONS, *SIGNS, *BRACKETS.values()])
FUNCTIONS = frozenset(FUNCTION_NAMES.split("|"))
CALLS = {rf"\{name}": name for name in FUNCTIONS if name != "sqrt"}
# Commands that belong to the name of the letter after them.
ACCENTS = re.compile(
    r"\\(?:hat|widehat|vec|bar|dot|ddot|tilde|widetilde|overline|underline|overrightarrow"
    r"|mathcal|mathbb|mathfrak)"
)
# Commands that would change the meaning of what is around them, and that the parser does not know.
REFUSED = re.compile(
    r"\\(?:sum|prod|int|iint|oint|lim"
    r"|pmod|bmod|mod|mid|choose|over"
    r"|begin|end|cases|substack|underbrace|overbrace|xrightarrow|left|right"
    r"|dots|ldots|cdots|vdots"
    r"|not|forall|exists|to|mapsto|rightarrow|Rightarrow|implies|iff)"
)


class Parser:
    r"""A recursive-descent parser of one answer, with a method for each rule of this grammar:

        list      = relation {("," | ";") relation}
        relation  = [sets] {("=" | "<" | "\in" | …) sets}
        sets      = ratio {("\cup" | "\cap" | "\setminus") ratio}
        ratio     = sum {":" sum}
        sum       = [sign] product {sign product}
        product   = ("-" | "+") product | power {[times | over] power}
        power     = atom {postfix} ["^" script {postfix}]
        postfix   = "!" | "%" | "\degree"
        atom      = clock | number | numeral | symbol | text | matrix | bracketed | command

    Every method raises UnreadableError where it does not understand.
    """

    def __init__(self, text: str):
        self.tokens = list(tokenise(text))
        self.position = 0
        self.depth = 0  # of atoms within atoms
        self.n_open_bars = 0  # absolute values that are open since the last bracket

    # -- The next tokens

    def peek(self) -> Token:
        """Return the next token."""
        if self.position < len(self.tokens):
            return self.tokens[self.position]
        return Token("end", "")

    def take(self, *values: str) -> str | None:
        """Step over the next token if it is one of these characters or commands, and return it."""
        token = self.peek()
        if token.kind in ("char", "command") and token.value in values:
            self.position += 1
            return token.value
        return None

    def need(self, value: str) -> None:
        """Step over the next token, which must be this character or command."""
        if not self.take(value):
            raise UnreadableError(f"expected {value} at {self.peek().value!r}")

    # -- From lists down to powers

    def parse(self) -> tuple:
        """Parse the whole answer."""
        node = self.parse_list()
        if self.position < len(self.tokens):
            raise UnreadableError(f"cannot go on at {self.peek().value!r}")
        return node

    def parse_list(self) -> tuple:
        items = [self.parse_relation()]
        while self.take(",", ";"):
            items.append(self.parse_relation())
        if len(items) == 1:
            return items[0]
        return ("list", *items)

    def parse_relation(self) -> tuple:
        operators = []
        sides = []
        if not self.starts_relation():
            sides.append(self.parse_sets())
        while self.starts_relation():
            operators.append(RELATIONS[self.peek().value])
            self.position += 1
            sides.append(self.parse_sets())
        begins_with_operator = len(sides) == len(operators)
        if begins_with_operator and operators[0] in ("=", "~"):  # "= 5" is 5
            operators.pop(0)
        elif begins_with_operator:  # "> 5" does not name its letter
            sides.insert(0, ("symbol", ""))
        if not operators:
            return sides[0]
        return ("relation", tuple(operators), *sides)

    def starts_relation(self) -> bool:
        """Return whether the next token is the sign of a relation, and not a text that says `=`."""
        token = self.peek()
        return token.kind in ("char", "command") and token.value in RELATIONS

    def parse_sets(self) -> tuple:
        node = self.parse_ratio()
        while operator := self.take(*SETS):
            node = (SETS[operator], node, self.parse_ratio())
        return node

    def parse_ratio(self) -> tuple:
        terms = [self.parse_sum()]
        while self.take(*COLONS):
            terms.append(self.parse_sum())
        if len(terms) == 1:
            return terms[0]
        return ("ratio", *terms)

    def parse_sum(self) -> tuple:
        terms = []
        sign = self.take(*SIGNS)
        while sign or not terms:
            term = self.parse_product()
            if sign in (r"\pm", r"\mp"):
                left = add(terms) if terms else None
                terms = [("pm", left, term, 1 if sign == r"\pm" else -1)]
            elif sign == "-":
                terms.append(negative(term))
            else:
                terms.append(term)
            sign = self.take(*SIGNS)
        return add(terms)

    def parse_product(self) -> tuple:
        if self.take("-"):  # the second sign of 5 + -3
            return negative(self.parse_product())
        if self.take("+"):
            return self.parse_product()
        node = self.parse_power()
        while True:
            previous = self.tokens[self.position - 1]
            if self.take(*TIMES):
                node = multiply(node, self.parse_signed_power())
            elif self.take(*OVER):
                node = ("quotient", node, self.parse_signed_power())
            elif self.starts_atom():
                if previous.kind in NUMERIC and self.peek().kind in NUMERIC:
                    raise UnreadableError("two numbers beside each other")
                node = multiply(node, self.parse_power())
            else:
                return node

    def parse_signed_power(self) -> tuple:
        if self.take("-"):  # 5 * -3
            return negative(self.parse_power())
        return self.parse_power()

    def parse_power(self) -> tuple:
        node = self.parse_postfix(self.parse_atom())
        if not self.take("^"):
            return node
        if self.peek().value == r"\circ":
            self.position += 1
            return self.parse_postfix(("degree", node))
        exponent = self.parse_script()
        if exponent == ("symbol", r"\circ"):  # ^{\circ}
            return self.parse_postfix(("degree", node))
        return self.parse_postfix(("power", node, exponent))

    def parse_postfix(self, node: tuple) -> tuple:
        """Parse the marks after an operand: factorials, per cent and degrees."""
        while True:
            if self.take("!"):
                node = ("call", "factorial", node)
            elif self.take(r"\%", "%"):
                node = ("quotient", node, integer(100))
            elif self.take(r"\degree", r"\circ"):
                node = ("degree", node)
            else:
                return node

    def parse_script(self) -> tuple:
        """Parse what follows a `^` or `_`: an operand, with a sign or without (10^-12)."""
        if self.take("-"):
            return negative(self.parse_script())
        return self.parse_operand()

    def parse_operand(self) -> tuple:
        """Parse a number, whose subscript is not a base here, or another atom."""
        token = self.peek()
        if token.kind == "number":
            self.position += 1
            return number(token.value)
        return self.parse_atom()

    # -- Atoms

    def starts_atom(self) -> bool:
        """Return whether the next token begins an atom, which is then a factor of a product."""
        token = self.peek()
        if token.kind == "command":
            return token.value not in CONNECTIVES
        if token.value == "|":
            return token.kind == "char" and self.n_open_bars == 0
        if token.kind == "char":
            return token.value.isalpha() or token.value in "([{"
        return token.kind in ("clock", "number", "matrix", "text")

    def parse_atom(self) -> tuple:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise UnreadableError("nested too deeply")
        token = self.peek()
        self.position += 1
        node = self.parse_atom_from(token)
        self.depth -= 1
        return node

    def parse_atom_from(self, token: Token) -> tuple:
        """Parse the atom that begins with a token, which the parser has already stepped over."""
        kind, value = token
        if kind == "number":
            return self.parse_numeral(value) if self.take("_") else number(value)
        if kind == "clock":
            hours, minutes = value.split(":")
            return ("clock", int(hours), minutes)
        if kind == "matrix":
            return parse_matrix(value)
        if kind == "text":
            return self.parse_text(value)
        if kind == "char" and value.isalpha():
            return self.parse_symbol(value)
        if value == "|":
            return self.parse_absolute_value()
        if value in BRACKETS:
            return self.parse_bracketed(value)
        if kind == "command":
            return self.parse_command(value)
        raise UnreadableError(f"cannot read {value!r}")

    def parse_numeral(self, digits: str) -> tuple:
        """Parse the base of a numeral: 204_5."""
        base = re.sub(r"\D", "", self.take_argument())
        if not base or not digits.isdigit():
            raise UnreadableError("a subscript that is not a base")
        return ("numeral", digits.lstrip("0"), base)

    def parse_symbol(self, name: str) -> tuple:
        """Parse the rest of a letter's name: subscripts, primes, and a number in brackets."""
        while True:
            if self.take("_"):
                name += "_" + self.take_argument()
            elif self.take("'", r"\prime"):
                name += "'"
            elif value := self.take_bracketed_number():
                name += f"({value})"
            else:
                return ("symbol", name)

    def take_bracketed_number(self) -> str | None:
        """Step over a number in brackets and return it: f(0) is a value of f, not a product."""
        ahead = self.tokens[self.position : self.position + 3]
        if [token.kind for token in ahead] != ["char", "number", "char"]:
            return None
        opening, inside, closing = ahead
        if opening.value != "(" or closing.value != ")":
            return None
        self.position += 3
        return inside.value

    def take_argument(self) -> str:
        """Step over an argument, one token or what braces hold, and return it as it is written."""
        start = self.position
        depth = 0
        while True:
            token = self.peek()
            if token.kind == "end":
                raise UnreadableError("an argument is missing")
            self.position += 1
            if token.kind == "char" and token.value == "{":
                depth += 1
            elif token.kind == "char" and token.value == "}":
                depth -= 1
            if depth <= 0:
                break
        written = "".join(token.value for token in self.tokens[start : self.position])
        return written.strip("{}").replace(" ", "")

    def parse_text(self, content: str) -> tuple:
        """Parse a text: several items, mathematics, a function, a letter, or words."""
        content = content.strip()
        items = [item for item in content.split(",") if item.strip()]
        if len(items) > 1:  # \text{A, B}
            return ("list", *(self.parse_text(item) for item in items))
        if re.search(r"\d", content):
            return Parser(content).parse()
        name = content.lstrip("\\")
        if name in FUNCTIONS:
            return self.parse_call(name)
        if len(content) == 1 and content.isalpha():
            return self.parse_symbol(content)
        words = normalise_words(content)
        if not words:
            raise UnreadableError("an empty text")
        return ("text", words)

    # -- Brackets

    def parse_absolute_value(self) -> tuple:
        self.n_open_bars += 1
        node = self.parse_sum()
        self.n_open_bars -= 1
        self.need("|")
        return ("call", "abs", node)

    def parse_bracketed(self, opening: str) -> tuple:
        """Parse what an opening bracket begins, to its closing bracket."""
        if opening in ("{", r"\{") and self.take(BRACKETS[opening]):
            return ("symbol", r"\emptyset")
        if (
            opening == "{"
        ):  # invisible when typeset: a bar inside may close one that is open outside
            node = self.parse_list()
            self.need("}")
            return enclose("{", node, "}")
        node = self.parse_inside()
        if opening in ("(", "["):
            return enclose(opening, node, self.take_closing(opening))
        self.need(BRACKETS[opening])
        if opening == r"\langle":
            return enclose("(", node, ")")
        if opening == r"\{":
            if node[0] != "list":  # a set of one element
                return ("group", "{", "}", node)
            return enclose("{", node, "}")
        return ("call", CALLED_BRACKETS[opening], node)

    def parse_inside(self) -> tuple:
        """Parse what brackets hold, where a bar cannot end an absolute value from outside."""
        n_open_bars = self.n_open_bars
        self.n_open_bars = 0
        node = self.parse_list()
        self.n_open_bars = n_open_bars
        return node

    def take_closing(self, opening: str) -> str:
        """Step over the bracket that closes `(` or `[`, and return it; intervals may mix them.

        It may be missing right after another of its shape: y = ((1, 2) is y = (1, 2).
        """
        if closing := self.take(")", "]"):
            return closing
        if self.tokens[self.position - 1].value != BRACKETS[opening]:
            raise UnreadableError(f"no bracket closes {opening}")
        return BRACKETS[opening]

    # -- Commands

    def parse_command(self, command: str) -> tuple:
        """Parse the arguments of a command."""
        if command in CALLS:
            return self.parse_call(CALLS[command])
        if command == r"\frac":
            top = self.parse_argument()
            bottom = self.parse_argument()
            return ("quotient", top, bottom)
        if command == r"\binom":
            n = self.parse_argument()
            k = self.parse_argument()
            return ("call", "binom", n, k)
        if command == r"\sqrt":
            return self.parse_root()
        if command == r"\infty":
            return ("infinity",)
        if REFUSED.fullmatch(command) or not command[1:].isalpha():
            raise UnreadableError(f"cannot read {command}")
        if ACCENTS.fullmatch(command):
            return self.parse_symbol(command + self.take_argument())
        return self.parse_symbol(command)

    def parse_argument(self) -> tuple:
        """Parse an argument of a command: what braces hold, or one digit, letter or command."""
        token = self.peek()
        if token.kind == "number" and token.value.isdigit():  # \frac12 is a half
            digits = [Token("number", digit) for digit in token.value]
            self.tokens[self.position : self.position + 1] = digits
        if self.take("-"):
            return negative(self.parse_argument())
        return self.parse_atom()

    def parse_root(self) -> tuple:
        r"""Parse \sqrt{x} or \sqrt[n]{x} into a power."""
        degree = integer(2)
        if self.take("["):
            degree = self.parse_list()
            self.need("]")
        radicand = self.parse_operand()
        return ("power", radicand, ("quotient", integer(1), degree))

    def parse_call(self, function: str) -> tuple:
        r"""Parse a function's base, power and arguments: \log_2 8, \sin^2 x, \cos(2t)."""
        base = None
        power = None
        while mark := self.take("_", "^"):
            if mark == "_":
                base = self.parse_script()
            else:
                power = self.parse_script()
        arguments = self.parse_call_arguments()
        if base is not None:
            arguments.append(base)
        if power == integer(-1):  # \sin^{-1} is the inverse function
            return ("call", f"arc{function}", *arguments)
        if power is not None:
            return ("power", ("call", function, *arguments), power)
        return ("call", function, *arguments)

    def parse_call_arguments(self) -> list[tuple]:
        token = self.peek()
        if token.kind != "char" or token.value not in ("(", "{", "["):
            return [self.parse_bare_argument()]
        node = self.parse_atom()
        if node[0] == "group":
            return list(node[3:])
        return [node]

    def parse_bare_argument(self) -> tuple:
        """Parse an argument without brackets: a product that ends at the next function or sum."""
        node = self.parse_power()
        while self.continues_argument():
            node = multiply(node, self.parse_power())
        if self.take("/"):
            node = ("quotient", node, self.parse_power())
        return node

    def continues_argument(self) -> bool:
        """Return whether the next token begins one more factor of an argument without brackets."""
        token = self.peek()
        if token.kind == "text" or token.value == "(" or token.value in CALLS:
            return False
        return self.starts_atom()


def parse_matrix(text: str) -> tuple:
    """Parse the rows of a matrix."""
    rows = []
    for row in re.split(r"\\\\", text):
        if row.strip():
            rows.append(tuple(Parser(cell).parse() for cell in row.split("&")))
    return ("matrix", *rows)


# ---- Reading

WHOLE_TEXT = re.compile(rf"\\(?:{TEXT_COMMANDS})\s*\{{([^{{}}]*)\}}")
# A number with commas between groups of three digits, and perhaps words around it.
THOUSANDS = re.compile(
    r"[^()\[\]{}]*?(?<![\d.,])\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![\d,])[^()\[\]{},\d]*"
)
PERCENT = re.compile(
    r"\s*\\?%\s*$|\s*\\text\s*\{\s*\\?(?:%|percent)\s*\}\s*$|\s+percent\s*$",
)
MAGNITUDES = {
    "dozen": 12,
    "hundred": 100,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}


class Answer(NamedTuple):
    """One reading of an answer."""

    node: tuple
    unit: str | None = None  # as written
    percent: bool = False  # whether a per cent sign followed it; node is the number before it


@lru_cache(maxsize=4096)
def read(text: str) -> list[Answer]:
    """Return the readings of an answer.

    There are two where commas may separate thousands or items, and where letters may be a word or
    a product.

    Raises:
        UnreadableError: there is no reading, or a part of a reading is not understood.
    """
    text = unwrap(strip_introduction(unwrap(spell(text))))
    if not text:
        raise UnreadableError("nothing there")
    match = WHOLE_TEXT.fullmatch(text)
    if match and (re.search(r"\d", match[1]) or CONJUNCTION.search(match[1])):
        text = match[1].strip()  # \text{7 ways}
    if not PHRASE.fullmatch(text) or CONJUNCTION.search(text):
        return read_mathematics(text)
    as_words = Answer(("text", normalise_words(text)))
    if text.isalpha() and len(text) < 4:  # mgh
        return [as_words, *read_mathematics(text)]
    return [as_words]


def read_mathematics(text: str) -> list[Answer]:
    """Return the readings of a formula: one, or two where commas are ambiguous."""
    text = CONJUNCTION.sub(" , ", text)
    text = re.sub(r",\s*,", ",", text)
    if THOUSANDS.fullmatch(text):
        return [read_value(text.replace(",", "")), read_value(text)]
    return [read_value(text)]


def read_value(text: str) -> Answer:
    """Split off per cent sign and unit, and parse the rest."""
    text, n_percent_signs = PERCENT.subn("", text)
    text, unit = split_unit(text)
    node = Parser(text).parse()
    if node[0] == "relation" and node[1] == ("in",):  # x \in (0, 1) is the interval
        node = node[3]
    if unit:
        node, unit = apply_magnitude(node, unit)
    return Answer(node, unit, percent=n_percent_signs > 0)


def apply_magnitude(node: tuple, unit: str) -> tuple[tuple, str | None]:
    """Multiply by the magnitude that a unit begins with: 3 and "million m" are 3 * 10^6 and "m"."""
    first_word, _, rest = unit.partition(" ")
    magnitude = MAGNITUDES.get(first_word.lower().removesuffix("s"))
    if magnitude is None:
        return node, unit
    return ("product", node, integer(magnitude)), rest or None
