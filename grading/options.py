r"""Answers of vision-language models: option letters, think and answer tags, their rewards.

A letter counts only in the form of an answer: `B`, `(B)`, `B.`, `\text{B}`, `**B**`, `Answer: B`,
`the answer is B`, `option B`, `B. 12 cm` where 12 cm is what option B says, or the text of exactly
one option. The official code looks for the letter anywhere in the answer: there `the area` and
`A or B` are right where A is, and any answer is right where the gold does not parse.
"""

import re
from collections.abc import Callable, Iterator, Mapping

from grading.answers import Gold
from grading.latex import boxes

LETTERS = "ABCDEFGH"
LONGEST = 500  # characters of an answer; a longer text names no option

# ---- Patterns, from parts to wholes
# Responses are hostile text: a run of marks or spaces is possessive (`*+`, `++`), and no two runs
# that take the same characters follow each other, so that no text is read over and over.
# What may stand around a letter: spaces, quotes, brackets, Markdown, LaTeX
DRESS = r"\\(?:text|textbf|mathrm|mathbf|mathsf|boxed)\s*\{"
OPEN = rf"(?:[\s$*_`\"'“‘(\[{{<]|\\[(\[]|{DRESS})*+"
CLOSE = r"(?:[\s$*_`\"'”’)\]}>]|\\[)\]])*+"

# What may introduce it: `the answer is option`, `so the correct choice:`
NAMES = (
    r"(?:(?:correct|right|best|final)\s++)*+(?:options?|choices?|answers?)\b"
    r"\s*+(?:(?:is|are)\b\s*+)?(?:[:=]\s*+)?"
)
LEAD = rf"(?i:(?:(?:so|thus|hence|therefore)\b,?\s*+)?(?:the\s++)?{NAMES}(?:{NAMES})?)"

# A letter and nothing else; a lower-case one, without an introduction: `the answer is a` goes on
BARE = re.compile(rf"{OPEN}(?:{LEAD})?{OPEN}([{LETTERS}]){CLOSE}[.:,;!]*{CLOSE}")
ALONE = re.compile(rf"{OPEN}([{LETTERS.lower()}]){CLOSE}[.:,;!]*{CLOSE}")
# A letter and the text of its option: `B. 12 cm`, `(B) 12 cm`
LABELLED = re.compile(
    rf"{OPEN}(?:{LEAD})?{OPEN}([{LETTERS}])(?:{CLOSE}[.:]|[\s$*}}]*[)\]]){CLOSE}(\S.*)"
)
# Several letters: `A, C`, `A and C`, `AC`
SEVERAL = re.compile(
    rf"[{LETTERS}](?:\s*(?:,\s*and\b|[,;&]|and\b)\s*[{LETTERS}])+|[{LETTERS}]{{2,}}"
)
# A letter at the beginning of a text that goes on
LEADING = re.compile(rf"{OPEN}(?:{LEAD})?{OPEN}([{LETTERS}])(?![\w'’]){CLOSE}")

# What may follow a letter: a second one; an explanation; a change of mind
ANOTHER = re.compile(
    rf"\s*+(?:[,/&;]\s*+)?(?:(?:or|and)\b\s*+)?(?:option\s++)?{OPEN}[{LETTERS}](?![\w'’])"
)
REASON = re.compile(r"\s*(?:[,;]|\.\s|\.$|because\b|since\b|as\b)")
WITHDRAWN = re.compile(r"\b(?:or|wait|no|not|alternatively|possibly|maybe)\b", re.IGNORECASE)

# In a response: `the answer is`; a condition before it; `B is the correct answer`
STATED = re.compile(
    r"(?i:\b(?:answers?|(?:correct|right|best)\s+(?:options?|choices?))\b[*_>]*"
    r"\s*(?:(?:is|are)\b\s*:?|should be\b|[:=]))"
)
SUPPOSED = re.compile(r"\b(?:if|whether|check|suppose|assume|unless)\b[^.\n]{0,30}$", re.IGNORECASE)
VERDICT = re.compile(
    rf"(?:^|[\s:,])(?i:options?\s+)?\(?([{LETTERS}])\)?"
    r"\s+is\s+(?:the\s+)?(?:correct|right|best)\b[^.]{0,20}[.!]?$"
)

# Several answers beside each other: `\boxed{A} or \boxed{B}`, `$1$ or $2$`
JOINED_BOXES = re.compile(r"\}\s*+(?:\$\s*+)?(?:,|;|/|&|\bor\b|\band\b)[\s$]{0,4}\\+boxed")
HEDGED = re.compile(r"(?:\$|\})\s*(?:,|;|/|\bor\b|\band\b)[\s]{0,4}(?:\$|\\+boxed)")

TAGS = ("<think>", "</think>", "<answer>", "</answer>")


# ---- Option letters
def blank(text: str) -> str:
    """Turn LaTeX's spaces into plain ones, one at a time."""
    text = re.sub(r"\\[ ;,!:]", " ", text)
    text = text.replace(r"\&", " & ")
    return " ".join(text.split())


def normalise_option(text: str) -> str:
    """Rewrite the text of an option so that the same text in another dress is the same string."""
    text = re.sub(
        r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}|\\[()\[\]]|<<|>>|[$*`]", r"\1", text
    )
    text = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)  # spaces, but 1 1/2 is not 11/2
    return text.casefold().rstrip(".")


def bare_letter(text: str) -> str | None:
    """Return the letter of a text that is one letter in the form of an answer, or None."""
    text = blank(text[:LONGEST])
    match = BARE.fullmatch(text) or ALONE.fullmatch(text)
    return match[1].upper() if match else None


def labelled_letter(text: str, option_texts: Mapping[str, str]) -> str | None:
    """Return the letter before the text of its option, e.g. `B. 12 cm`, or None.

    An option whose text is not known may say anything.
    """
    match = LABELLED.fullmatch(blank(text))
    if match is None or ANOTHER.match(match[2]):
        return None
    letter, content = match.groups()
    if letter in option_texts and option_texts[letter] != normalise_option(content):
        return None
    return letter


def letter_of_text(text: str, option_texts: Mapping[str, str]) -> str | None:
    """Return the letter of the only option that says `text`, or None."""
    content = normalise_option(text)
    letters = [letter for letter, option in option_texts.items() if option == content]
    if len(letters) != 1:
        return None
    return letters[0]


def option_letter(text: str, choices: Mapping[str, str] | None = None) -> str | None:
    """Return the letter of the option that an answer names, None if it names none or several.

    Args:
        text: An answer, such as a box or a tag holds, not a whole response.
        choices: The options' texts by letter. A text may be empty where it is not known; choices
            are None where not even the letters are.
    """
    if len(text) > LONGEST:
        return None
    option_texts = {}
    for letter, option in (choices or {}).items():
        option = normalise_option(option)
        if option:
            option_texts[letter] = option
    letter = (
        bare_letter(text)
        or labelled_letter(text, option_texts)
        or letter_of_text(text, option_texts)
    )
    if choices and letter not in choices:
        return None
    return letter


def option_letters(text: str) -> str | None:
    """Return all letters that an answer names, sorted, e.g. AC for `C and A`, or None."""
    letter = option_letter(text)
    if letter:
        return letter
    text = re.sub(rf"{DRESS}|\\[()\[\]]|[$*`\"'(){{}}\[\]<>.]", " ", blank(text[:LONGEST]))
    text = " ".join(text.split())
    text = re.sub(rf"^{LEAD}", "", text).strip(" :")
    if not SEVERAL.fullmatch(text):
        return None
    letters = sorted(re.findall(rf"[{LETTERS}]", text))
    if len(set(letters)) < len(letters):
        return None
    return "".join(letters)


# ---- Whole responses
def stated(response: str) -> str | None:
    """Return the line after the last `answer:` or `the answer is` of a response, or None."""
    end = None  # of the last statement that is no supposition
    for match in STATED.finditer(response):
        before = response[max(0, match.start() - 60) : match.start()]
        if not SUPPOSED.search(before):
            end = match.end()
    if end is None:
        return None
    first_line = response[end:].strip().split("\n", 1)[0]
    return first_line.strip() or None


def letter_in_response(response: str, choices: Mapping[str, str] | None = None) -> str | None:
    """Return the letter that a whole response ends up with, or None.

    It stands after the last `the answer is`, or in the last line.
    """
    statement = stated(response) or ""
    if statement in LETTERS.lower():  # `the answer is a`, cut off
        statement = ""
    last_line = response.strip().rpartition("\n")[2]
    letter = option_letter(statement, choices) or option_letter(last_line, choices)
    if letter:
        return letter
    match = VERDICT.search(last_line)
    if match and (not choices or match[1] in choices):
        return match[1]
    return letter_with_reason(statement, choices)


def letter_with_reason(statement: str, choices: Mapping[str, str] | None) -> str | None:
    """Return B for `B because it fits`; None if another letter or a doubt follows."""
    match = LEADING.match(statement[:LONGEST])
    if match is None:
        return None
    letter = match[1]
    rest = statement[match.end() :]
    if not REASON.match(rest) or ANOTHER.match(rest) or WITHDRAWN.search(rest):
        return None
    if choices and letter not in choices:
        return None
    option_texts = {normalise_option(option) for option in (choices or {}).values()}
    content = normalise_option(rest.lstrip(" .,;"))
    if content != "" and content in option_texts:  # `B. 12 cm` where C says 12 cm
        return None
    return letter


def value(text: str) -> str | None:
    """Return a short answer without what is around it, None for a sentence.

    Short are one word, a number with its unit, a formula and a list.
    """
    text = text.strip().rstrip(".").strip("*` ")
    words = text.split()
    is_word = len(words) == 1
    is_quantity = len(words) == 2 and re.match(r"[-+.\d\\]", text)
    is_enclosed = re.fullmatch(r"\$[^$]+\$|\\\(.+\\\)|\[[^\[\]]*\]|\([^()]*\)", text)
    return text if is_word or is_quantity or is_enclosed else None


# ---- Rewards of training
def tag_format(response: str) -> bool:
    """Return whether a response is one thought and then one answer, each in its tags, not empty."""
    if any(response.count(tag) != 1 for tag in TAGS):
        return False
    _, _, after = response.partition("<think>")
    thought, _, after = after.partition("</think>")
    between, _, after = after.partition("<answer>")
    answer, ending, _ = after.partition("</answer>")
    return bool(thought and not between.strip() and answer and ending)


def tagged(response: str) -> Iterator[str]:
    """Yield what stands in each answer tag that is closed."""
    end = 0
    while (start := response.find("<answer>", end)) >= 0:
        start += len("<answer>")
        end = response.find("</answer>", start)
        if end < 0:
            return
        yield response[start:end]


def is_undecided(text: str) -> bool:
    """Return whether an answer leaves open which of several it means."""
    if HEDGED.search(text[-150:]):
        return True
    box_contents = {box.strip() for box in boxes(text)}
    return len(box_contents) > 1 or states_several(text)


def states_several(text: str) -> bool:
    """Return whether `the answer is` is said of two answers; each lasts to the end of its line."""
    first = None
    for match in STATED.finditer(text):
        end = text.find("\n", match.end())
        statement = text[match.end() : end if end >= 0 else None].strip(" .,")
        if first is None:
            first = statement
        elif statement != first:
            return True
    return False


def candidate(text: str) -> str:
    """Return the mathematics of an answer: its last box, or else its last formula between dollars.

    Without either, it is what follows the last `the answer is`, or else the whole answer;
    and the whole answer where that leaves open which of several it means.
    """
    if is_undecided(text):
        return text
    box_contents = boxes(text)
    if box_contents:
        return box_contents[-1]
    formulas = re.findall(r"\$\$(.+?)\$\$|\$(.+?)\$", text, re.DOTALL)
    if formulas:
        displayed, inline = formulas[-1]
        return displayed or inline
    return stated(text) or text


def answer_part(response: str) -> str:
    """Return the part of a response that is its answer.

    It is what the first answer tag holds, or without one what follows an opening tag, or else all.
    """
    answer = next(tagged(response), None)
    if answer is None:
        answer = response.rpartition("<answer>")[2]
    return answer.strip()


def extract(response: str) -> str | None:
    """Return what of a response is compared with the gold, None if there is nothing.

    It is the candidate of its answer, or the whole answer where only that is an option letter.
    """
    answer = answer_part(response)
    part = candidate(answer).strip()
    if bare_letter(part) is None and bare_letter(answer) is not None:
        part = answer
    return part or None


def judge_response(response: str, gold: Gold, judge: Callable[[str, str], str]) -> str:
    """Judge a response by the official rules for vision-language models, their mistakes mended.

    What `extract` returns is compared. A gold that is an option letter wants a bare letter: its
    text alone, or after the letter, does not count. An empty gold is never met.

    Args:
        response: A whole response.
        gold: The answer, or a list of answers, any of which may be met.
        judge: judge(gold, prediction) compares what is no option letter, as Pool.judge does.

    Returns:
        "right", "wrong", or "timeout" where a comparison took too long and none was right.
    """
    golds = [gold] if isinstance(gold, str) else gold
    answer = extract(response)
    if answer is None:
        return "wrong"
    verdict = "wrong"
    for each in golds:
        one_verdict = judge_against(answer, each, judge)
        if one_verdict == "right":
            return "right"
        if one_verdict == "timeout":
            verdict = "timeout"
    return verdict


def judge_against(answer: str, gold: str, judge: Callable[[str, str], str]) -> str:
    """Compare an answer with one gold; see judge_response."""
    if not gold.strip():
        return "wrong"
    letter = re.sub(r"\\text\{(.*)\}|\$", r"\1", gold.strip())
    if re.fullmatch(rf"[{LETTERS}]", letter):
        return "right" if bare_letter(answer) == letter else "wrong"
    return judge(gold, answer)
