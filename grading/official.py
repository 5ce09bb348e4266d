"""The rules by which the official code refuses a response before it reads its answer."""

import numpy as np

MAX_OFFICIAL_BOXES = 4


def obeys_official_rules(response: str, n_boxes: int) -> bool:
    """Return whether the official rules look into the last box: more than four are guessing."""
    return 0 < n_boxes <= MAX_OFFICIAL_BOXES and not is_degenerate(response)


def is_degenerate(response: str) -> bool:
    """Return whether a response is garbage by the official rules.

    It repeats a pattern five times in a row, or more than three tenths of it are odd characters:
    all but ASCII, white space and mathematical operators. Greek letters, arrows, dashes, curly
    quotes, × and ÷ are odd.
    """
    response = response.strip()
    n_odd = 0
    for character in response:
        is_ascii = character.isascii() and character.isprintable()
        is_operator = "\u2200" <= character <= "\u22ff"
        n_odd += not (is_ascii or is_operator or character.isspace())
    return n_odd > 0.3 * len(response) or repeats_a_pattern(response)


def repeats_a_pattern(text: str) -> bool:
    r"""Return whether `(.{5,200})\1{4}` is found in a text, in a time that grows as the text does.

    Five times in a row is a run of characters, four times as long as the pattern, each equal to the
    character that stands the pattern's length after it.
    """
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    is_line_end = codes == ord("\n")
    for length in range(5, min(200, len(codes) // 5) + 1):
        differs = (codes[length:] != codes[:-length]) | is_line_end[:-length]
        breaks = np.flatnonzero(np.concatenate([[True], differs, [True]]))
        if np.diff(breaks).max() > 4 * length:
            return True
    return False
