r"""Bring an answer to one spelling, so that the parser meets fewer forms.

    spell("$\\dfrac{1}{2}.$") -> "\\frac{1}{2}"      spell("3 1/2") -> "(3+1/2)"
    spell("12\\,000 °") -> "12000 ^\\circ"            normalise_words("The blue car") -> "blue car"

Everything here rewrites text by regular expressions; nothing here knows the structure of a formula.
"""

import re

# ---- Names of LaTeX commands, as alternatives of a regular expression

# Commands that change the look of what follows.
STYLE_COMMANDS = (
    r"mathbf|boldsymbol|bm|mathit|mathsf|mathnormal|bf|it|displaystyle|textstyle|limits"
    r"|left\.?|right\.?|[bB]igg?[lrm]?|f?boxed"
)
# Commands whose argument is text.
TEXT_COMMANDS = "text|textbf|textit|textrm|textsf|textnormal|mathrm|mbox|hbox|operatorname|rm"
# Functions, also without a backslash.
FUNCTION_NAMES = (
    "arcsin|arccos|arctan|arcsinh|arccosh|arctanh|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc"
    "|ln|log|lg|exp|sqrt|gcd|lcm|min|max"
)

# ---- Spelling

UNICODE = {
    "°": r"^\circ ",
    "×": r"\times ",
    "·": r"\cdot ",
    "⋅": r"\cdot ",
    "÷": r"\div ",
    "−": "-",
    "–": "-",
    "—": "-",
    "∞": r"\infty ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "≠": r"\ne ",
    "≈": r"\approx ",
    "±": r"\pm ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
    "√": r"\sqrt ",
    "π": r"\pi ",
    "θ": r"\theta ",
    "α": r"\alpha ",
    "β": r"\beta ",
    "γ": r"\gamma ",
    "λ": r"\lambda ",
    "μ": r"\mu ",
    "ω": r"\omega ",
    "Δ": r"\Delta ",
    "′": "'",
    "’": "'",
    "²": "^2",
    "³": "^3",
    "½": r"\frac{1}{2}",
    "\xa0": " ",
    "\u2009": " ",
    "\u202f": " ",
    "（": "(",
    "）": ")",
    "，": ",",
    "ℝ": r"\mathbb{R}",
    "∅": r"\emptyset ",
}
UNICODE_TABLE = str.maketrans(UNICODE)

# Stands, between two rewrites, for a space that may separate thousands.
THOUSANDS_GAP = "\u00b6"


def join_thousands(match: re.Match) -> str:
    """Write groups of three digits as one number."""
    return match[0].replace(THOUSANDS_GAP, "")


def fraction_of_repeating_decimal(match: re.Match) -> str:
    r"""Write a repeating decimal as a fraction: 0.1\overline{6} is (16 - 1) / 90."""
    whole, start, period = match.groups()
    with_period = int((whole + start + period) or "0")
    without_period = int((whole + start) or "0")
    bottom = "9" * len(period) + "0" * len(start)
    return rf"\frac{{{with_period - without_period}}}{{{bottom}}}"


def sum_of_mixed_number(match: re.Match) -> str:
    r"""Write 3\frac{1}{2} as a sum; before an improper fraction it stays a product."""
    whole = match[1]
    top = match[2] or match[3]
    bottom = match[4] or match[5]
    if int(top) < int(bottom):
        return f"({whole}+{top}/{bottom})"
    return match[0]


# Patterns and their replacements, applied from top to bottom: later ones rely on earlier ones.
REWRITES = [
    # The delimiters of mathematics: \( \) \[ \] $
    (r"(?<!\\)\\[\[\]()]|(?<!\\)\$", " "),
    (rf"\\(?:{STYLE_COMMANDS})(?![A-Za-z])", " "),
    # A dollar that is a currency: a unit, where the amount is the whole answer
    (r"^\s*\\\$\s*(\d(?:[\d.,]*\d)?)[.\s]*$", r"\1 dollars"),
    (r"\\\$", ""),
    # Bold type in Markdown, and colours: **5**, \color{red}5
    (r"^\s*\*+|\*+\s*$|\\(?:text)?color\s*\{[^{}]*\}", " "),
    # Digits before a base: (204)_5 and \text{204}_5
    (rf"(?:\(\s*(\d+)\s*\)|\\(?:{TEXT_COMMANDS})\s*\{{\s*(\d+)\s*\}})(?=\s*_)", r"\1\2"),
    # Several commands for one thing
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\\(le|ge)qslant(?![A-Za-z])", r"\\\1"),
    (r"\\(le|ge|ne)q(?![A-Za-z])", r"\\\1"),
    (r"!=", r"\\ne "),
    (r"<=", r"\\le "),
    (r">=", r"\\ge "),
    (r"\*\*", "^"),
    (r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", r"\\times "),
    (r"\\varnothing(?![A-Za-z])", r"\\emptyset"),
    (r"\\vert(?![A-Za-z])", "|"),
    # Spaces: mark those that may separate thousands, make the others plain, close the marked ones
    (r"(?<=\d)(?:\\,|\\!|\\;|\\ |\{,\}|,\\!|,\\,|\s)+(?=\d{3}(?!\d))", THOUSANDS_GAP),
    (r"(?<!\\)\\(?:[,;:!> ]|quad(?![A-Za-z])|qquad(?![A-Za-z]))|~|\\nobreakspace", " "),
    (rf"(?<!\d)(\d{{1,3}}(?:{THOUSANDS_GAP}\d{{3}})+)(?!\d)", join_thousands),
    (THOUSANDS_GAP, " "),
    # Punctuation at the end
    (r"(?:\\\\|[.,;:\s])+$", ""),
    # Names without a backslash
    (rf"(?<![\\A-Za-z])({FUNCTION_NAMES})(?![A-Za-z])", r"\\\1"),
    (r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi "),
    (r"(?<![\\A-Za-z])(?:infinity|infty|oo)(?![A-Za-z])", r"\\infty "),
    # Numbers: 0.1\overline{6}, then the mixed numbers 1 1/2 and 1\frac{1}{2}
    (r"(\d*)\.(\d*)\\overline\s*\{\s*(\d{1,30})\s*\}", fraction_of_repeating_decimal),
    (r"(?<![\d./^_])(?<!\^\{)(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d/])", r"(\1+\2/\3)"),
    (
        r"(?<![\d./^_}])(?<!\^\{)(\d+)\s*\\frac\s*"
        r"(?:\{\s*(\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))",
        sum_of_mixed_number,
    ),
]
COMPILED_REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in REWRITES]


def spell(text: str) -> str:
    """Rewrite spellings that make no difference to what an answer says."""
    text = text.translate(UNICODE_TABLE)
    for pattern, replacement in COMPILED_REWRITES:
        text = pattern.sub(replacement, text)
    return text.strip()


# ---- What stands around an answer

INTRODUCTORY = r"(?:is|are|be|equals?|answer|get|have|has)"
INTRODUCTION = re.compile(
    # \text{The answer is } 5
    rf"\s*\\(?:{TEXT_COMMANDS})\s*\{{[^{{}}]*(?:\b|(?=[:=]))(?:{INTRODUCTORY}\s*[:=]?|[:=])\s*\}}"
    r"\s*[:=]?\s*(?=\S)"
    # the answer is 5
    rf"|[A-Za-z ,'’]*\b{INTRODUCTORY}\b\s*[:=]?\s*(?=\S)",
    re.IGNORECASE,
)
BRACKET_OR_SEPARATOR = re.compile(r"\\.|[{}()\[\],;]")


CONCLUSION = re.compile(r"(?<=\S)\s+is (?:the|my) (?:(?:final|correct|right) )?answer$")


def strip_introduction(text: str) -> str:
    r"""Take away an introduction: `\text{The answer is } 5`, `answer: 5`, `5 is the answer`."""
    text = CONCLUSION.sub("", text)
    match = INTRODUCTION.match(text)
    if match is None:
        return text
    return text[match.end() :]


def unwrap(text: str) -> str:
    """Take away brackets around the whole of one thing."""
    while is_wrapped(text):
        text = text[1:-1].strip().rstrip(" .")
    return text


def is_wrapped(text: str) -> bool:
    """Return whether `{…}` encloses the whole text, or `(…)` does and is not a tuple's."""
    closing = {"{": "}", "(": ")"}.get(text[:1])
    if closing is None:
        return False
    depth = 0
    has_separator = False
    for match in BRACKET_OR_SEPARATOR.finditer(text):
        mark = match[0]
        if mark in ("{", "(", "["):
            depth += 1
        elif mark in ("}", ")", "]"):
            depth -= 1
        elif mark in (",", ";") and depth == 1:
            has_separator = True
        if depth == 0:
            break
    # The last match closes the first bracket, or is the last mark of a text that never closes it.
    ends_with_it = match[0] == closing and match.end() == len(text)
    is_tuple = closing == ")" and has_separator
    return ends_with_it and not is_tuple


# ---- Words

# An answer in words, with at least one word of two letters.
PHRASE = re.compile(r"(?=.*[A-Za-z]{2})[A-Za-z]+(?:[ '’-]+[A-Za-z]+)*")
# The letter of a choice: (A), A., A
CHOICE = re.compile(r"\(?\s*([A-Za-z])\s*[).:]?")
# Words that change what an answer says: they must be on both sides, or on neither.
QUALIFIERS = re.compile(
    r"(?<![\\A-Za-z])(?:not|no|none|neither|never|except|unless|cannot|than|least|most|half|twice"
    r"|between|wrong|base|binary|mod|[a-z]+n['’]t)(?![A-Za-z])"
    r"|\d\s*(?:\\[a-z]+\s*\{)?\s*"
    r"(?:squared|cubed|factorial|halves|thirds|tenths|hundredths)",
    re.IGNORECASE,
)
# What joins the items of a list, instead of a comma.
CONJUNCTION = re.compile(
    r"(?<![\\A-Za-z])(?:and|or)(?![A-Za-z])"
    r"|\\text\s*\{\s*,?\s*(?:and|or)\s*\}"
    r"|\\(?:land|lor|vee|wedge)(?![A-Za-z])"
)


def normalise_words(text: str) -> str:
    """Reduce a text to what must agree: words and numbers in lower case, without articles.

    A capital `A` is an article at the beginning only; elsewhere it is a name. A text of nothing but
    articles keeps them.
    """
    all_words = re.findall(r"[A-Za-z0-9]+", re.sub(r"\\[A-Za-z]+", " ", text))
    kept = []
    for i, word in enumerate(all_words):
        starts_with_article = i == 0 and word in ("A", "An", "The")
        if word not in ("a", "an", "the") and not starts_with_article:
            kept.append(word)
    return " ".join(kept or all_words).lower()
