"""Rows of JSON and CSV files, and checks of the texts and answers in them.

Errors name the file, the row (the first is 0) or the line (the first is 1), the value, and what was
expected.
"""

import csv
import math
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path

from grading import can_be_met
from infra.files import need_file, parse_json, read_json_lines, shown

ANSWER_MARK = "####"  # a GSM8K solution ends in it and the answer
SAFE_INTEGERS = 2**53  # a float has all whole numbers below, and not all above


# ---- Reading
def read_rows(path: str) -> list[dict]:
    """Read a JSONL, JSON or CSV file; values of a column may differ in type."""
    if path.endswith(".csv"):
        return read_csv(path)
    if path.endswith(".json") and starts_with_bracket(path):
        return read_array(path)
    return read_json_lines(path, "one object a line")


def starts_with_bracket(path: str) -> bool:
    """Return whether a file begins as a JSON array does."""
    return need_file(path, "rows").read_bytes().removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def read_array(path: str) -> list[dict]:
    """Read a file of one JSON array of objects."""
    kind = "an array of objects, or an object a line"
    rows = parse_json(Path(path).read_bytes(), path, kind)
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {i}: {shown(row)} is no object; expected {kind}")
    return rows


def read_csv(path: str) -> list[dict]:
    """Read a CSV file that starts with a line of column names; all values are texts.

    A reader that guesses types makes 1.23e+17 of a long integer.
    """
    csv.field_size_limit(2**31 - 1)  # an image may be one field
    line = 0
    try:
        with open(path, encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, strict=True)
            rows = []
            for row in reader:
                line = reader.line_num
                rows.append(row)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}, after line {line}: {error}; expected CSV in UTF-8") from error
    for i, row in enumerate(rows):
        if None in row or None in row.values():  # spare cells, and missing ones
            names = ", ".join(reader.fieldnames)
            raise ValueError(f"{path}, row {i}: expected a cell for each of {names}")
    return rows


# ---- Checks
def check_texts(values: Sequence[object], source: str, column: str) -> None:
    """Raise ValueError for a value of a column that is no text, or that nobody can encode."""
    for i, value in enumerate(values):
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{source}, row {i}: {column} is {shown(value)}; expected a text")
        check_characters(value, f"{source}, row {i}: {column}")


def check_characters(text: str, place: str) -> None:
    """Raise ValueError for half of a surrogate pair, which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{place} has the lone surrogate {text[error.start]!r}; expected Unicode characters"
        ) from error


def check_answers(answers: Sequence[object], source: str, column: str) -> None:
    """Raise ValueError for an answer, or one of a list, that no response can meet."""
    for i, answer in enumerate(answers):
        for accepted in answer if isinstance(answer, list) else [answer]:
            place = f"{source}, row {i}: {column}"
            if not is_answer(accepted):
                raise ValueError(
                    f"{place} is {shown(answer)}, which no response can meet; "
                    "expected a text with a letter or a digit, a number, or a list of these"
                )
            if isinstance(accepted, float) and abs(accepted) >= SAFE_INTEGERS:
                raise ValueError(
                    f"{place} is {accepted}, a float that has lost digits; "
                    "expected such a number as a text"
                )
            check_characters(str(accepted), place)


def is_answer(value: object) -> bool:
    """Return whether a value is an answer that a response can meet."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, str | int | Decimal) and can_be_met(final_answer(value))


def final_answer(answer: object) -> str:
    """Return an answer as text; of a GSM8K solution, `... #### 18`, what follows the mark."""
    return str(answer).rpartition(ANSWER_MARK)[2].strip()
