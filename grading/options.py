r"""Answers of vision-language models: option letters, think/answer tags, and the rewards of training that use them.

A letter counts only in the form of an answer: `B`, `(B)`, `B.`, `\text{B}`, `**B**`, `Answer: B`, `the answer is B`, `option B`,
`B. 12 cm` where 12 cm is what option B says, or the text of exactly one option. The official code looks for the letter
anywhere in the answer: there `the area` and `A or B` are right where A is, and any answer is where the gold does not parse.
"""

import re
from collections.abc import Callable, Mapping, Sequence

from grading.latex import boxes

LETTERS = "ABCDEFGH"
LONGEST = 500  # characters of an answer; a longer text names no option
DRESS = r"\\(?:text|textbf|mathrm|mathbf|mathsf|boxed)\s*\{"
OPEN = rf"(?:[\s$*_`\"'“‘(\[{{<]|\\[(\[]|{DRESS})*"
CLOSE = r"(?:[\s$*_`\"'”’)\]}>]|\\[)\]])*"
NAMES = r"(?:(?:correct|right|best|final)\s+)*(?:options?|choices?|answers?)\b\s*(?:(?:is|are)\b)?\s*[:=]?\s*"
LEAD = rf"(?i:(?:(?:so|thus|hence|therefore)\b,?\s*)?(?:the\s+)?{NAMES}(?:{NAMES})?)"  # as in: the answer is option
BARE = re.compile(rf"{OPEN}(?:{LEAD})?{OPEN}([{LETTERS}]){CLOSE}[.:,;!]*{CLOSE}")
ALONE = re.compile(rf"{OPEN}([{LETTERS.lower()}]){CLOSE}[.:,;!]*{CLOSE}")
LABELLED = re.compile(
    rf"{OPEN}(?:{LEAD})?{OPEN}([{LETTERS}])(?:{CLOSE}[.:]|[\s$*}}]*[)\]]){CLOSE}(\S.*)"
)
SEVERAL = re.compile(
    rf"[{LETTERS}](?:\s*(?:,\s*and\b|[,;&]|and\b)\s*[{LETTERS}])+|[{LETTERS}]{{2,}}"
)
ANOTHER = re.compile(rf"\s*[,/&;]?\s*(?:(?:or|and)\b)?\s*(?:option\s+)?{OPEN}[{LETTERS}](?![\w'’])")
REASON = re.compile(
    r"\s*(?:[,;]|\.\s|\.$|because\b|since\b|as\b)"
)  # goes on behind a letter, and is no part of the answer
STATED = re.compile(
    r"(?i:\b(?:answers?|(?:correct|right|best)\s+(?:options?|choices?))\b[*_>]*\s*(?:(?:is|are)\b\s*:?|should be\b|[:=]))"
)
WITHDRAWN = re.compile(
    r"\b(?:or|wait|no|not|alternatively|possibly|maybe)\b", re.IGNORECASE
)  # behind a letter: not sure of it
SUPPOSED = re.compile(
    r"\b(?:if|whether|check|suppose|assume|unless)\b[^.\n]{0,30}$", re.IGNORECASE
)  # before `the answer is`
VERDICT = re.compile(
    rf"(?:^|[\s:,])(?i:options?\s+)?\(?([{LETTERS}])\)?\s+is\s+(?:the\s+)?(?:correct|right|best)\b[^.]{{0,20}}[.!]?$"
)
JOINED_BOXES = re.compile(r"\}\s*\$?\s*(?:,|;|/|&|\bor\b|\band\b)[\s$]{0,4}\\+boxed")
HEDGED = re.compile(r"(?:\$|\})\s*(?:,|;|/|\bor\b|\band\b)[\s]{0,4}(?:\$|\\+boxed)")  # $1$ or $2$
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


# ---- Option letters
def blank(text: str) -> str:
    """Turn LaTeX's spaces into plain ones, one at a time."""
    return " ".join(
        re.sub(r"\\[ ;,!:]|\\&", lambda match: " & " if match[0] == r"\&" else " ", text).split()
    )


def bare_letter(text: str) -> str | None:
    """Return the letter of a text that is nothing but one letter in the form of an answer, or None."""
    text = blank(text[:LONGEST])
    match = BARE.fullmatch(text) or ALONE.fullmatch(text)
    return match[1].upper() if match else None


def plain(text: str) -> str:
    """Rewrite the text of an option so that the same text in another dress becomes the same string."""
    text = re.sub(
        r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}|\\[()\[\]]|<<|>>|[$*`]", r"\1", text
    )
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text).casefold().rstrip(".")  # 1 1/2 is not 11/2


def option_letter(text: str, choices: Mapping[str, str] | None = None) -> str | None:
    """Return the letter of the option that an answer names, or None if it names none, or more than one.

    text is an answer, as from a box or a tag, not a whole response. choices are the options' texts by letter; a text may
    be empty where it is not known, and choices None where not even the letters are.
    """
    if len(text) > LONGEST:
        return None
    said = {letter: plain(option) for letter, option in (choices or {}).items() if plain(option)}
    letter = bare_letter(text)
    if (
        letter is None
        and (match := LABELLED.fullmatch(blank(text)))
        and not ANOTHER.match(match[2])
    ):
        letter = match[1] if said.get(match[1]) in (None, plain(match[2])) else None
    if letter is None:
        same = [option for option in said if said[option] == plain(text)]
        letter = same[0] if len(same) == 1 else None
    return letter if not choices or letter in choices else None


def option_letters(text: str) -> str | None:
    """Return all letters of an answer that may name several, sorted (`A, C`, `A and C`, `CA` -> AC), or None."""
    if letter := option_letter(text):
        return letter
    text = re.sub(rf"{DRESS}|\\[()\[\]]|[$*`\"'(){{}}\[\]<>.]", " ", blank(text[:LONGEST]))
    text = re.sub(rf"^{LEAD}", "", " ".join(text.split())).strip(" :")
    letters = "".join(sorted(re.findall(rf"[{LETTERS}]", text)))
    return letters if SEVERAL.fullmatch(text) and len(set(letters)) == len(letters) else None


def stated(response: str) -> str | None:
    """Return what a response says behind its last `answer:` or `the answer is`, to the end of the line, or None."""
    found = (
        match
        for match in STATED.finditer(response)
        if not SUPPOSED.search(response[max(0, match.start() - 60) : match.start()])
    )
    *_, match = [None, *found]
    return response[match.end() :].strip().split("\n", 1)[0].strip() or None if match else None


def letter_in_response(response: str, choices: Mapping[str, str] | None = None) -> str | None:
    """Return the letter that a whole response ends up with: behind its last `answer is`, or in its last line; or None."""
    said, last = stated(response) or "", response.strip().rpartition("\n")[2]
    said = "" if said in LETTERS.lower() else said  # `the answer is a`, cut off
    if letter := option_letter(said, choices) or option_letter(last, choices):
        return letter
    if (match := VERDICT.search(last)) and (not choices or match[1] in choices):
        return match[1]
    match = re.match(rf"{OPEN}(?:{LEAD})?{OPEN}([{LETTERS}])(?![\w'’]){CLOSE}", said[:LONGEST])
    rest = said[match.end() :] if match else ""
    if (
        not REASON.match(rest)
        or ANOTHER.match(rest)
        or WITHDRAWN.search(rest)
        or (choices and match[1] not in choices)
    ):
        return None
    others = {plain(option) for option in (choices or {}).values()} - {""}
    return (
        None if plain(rest.lstrip(" .,;")) in others else match[1]
    )  # `B. 12 cm` where option C says 12 cm


def value(text: str) -> str | None:
    """Return a text without words around it: one word, a number with its unit, a formula or a list; None for a sentence."""
    text = text.strip().rstrip(".").strip("*` ")
    words = text.split()
    bare = len(words) == 1 or (len(words) == 2 and re.match(r"[-+.\d\\]", text))
    return (
        text
        if bare or re.fullmatch(r"\$[^$]+\$|\\\(.+\\\)|\[[^\[\]]*\]|\([^()]*\)", text)
        else None
    )


# ---- Rewards of training
def tag_format(response: str) -> bool:
    """Return whether a response has the published form: one thought, not empty, and then one answer, each in its tags."""
    once = all(response.count(tag) == 1 for tag in TAGS)
    return (
        once
        and re.search(r"<think>.+?</think>\s*<answer>.+?</answer>", response, re.DOTALL) is not None
    )


def tagged(response: str) -> str | None:
    """Return what stands in the first answer tag, or None."""
    match = re.search(r"<answer>(.*?)</answer>", response, re.DOTALL)
    return match[1].strip() if match else None


def candidate(text: str) -> str:
    """Return the mathematics of an answer: its last box, or else its last formula between dollars, or else all of it; all of
    one that leaves open which of several it means."""
    found, said = (
        boxes(text),
        {text[match.end() :].split("\n")[0].strip(" .,") for match in STATED.finditer(text)},
    )
    if len({box.strip() for box in found}) > 1 or HEDGED.search(text[-150:]) or len(said) > 1:
        return text
    if found:
        return found[-1]
    formulas = re.findall(r"\$\$(.+?)\$\$|\$(.+?)\$", text, re.DOTALL)
    return "".join(formulas[-1]) if formulas else (stated(text) or text)


def vlm_accuracy(
    response: str, gold: str | Sequence[str], equal: Callable[[str, str], bool]
) -> bool:
    """Return whether a response is right by the official rules for vision-language models, their mistakes mended.

    The first answer tag counts, or without one what follows an opening tag, or else all. A gold that is an option letter
    wants a bare letter: its text alone, or behind the letter, does not count. An empty gold is never met. Of several golds
    any may be met. equal(gold, prediction) compares the rest.
    """
    if not isinstance(gold, str):
        return any(vlm_accuracy(response, each, equal) for each in gold)
    answer = tagged(response)
    answer = response.rpartition("<answer>")[2].strip() if answer is None else answer
    if not gold.strip() or not answer:
        return False
    found = candidate(answer)
    if re.fullmatch(rf"[{LETTERS}]", letter := re.sub(r"\\text\{(.*)\}|\$", r"\1", gold.strip())):
        return letter in (bare_letter(answer), bare_letter(found))
    return equal(gold, found)
