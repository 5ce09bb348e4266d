"""docs/theory.md: course/theory.py prints its tables, and its text has no other numbers."""

import contextlib
import io
import re

import pytest
from conftest import ROOT

from course import theory

PAGE = (ROOT / "docs" / "theory.md").read_text()
TABLES = re.findall(r"^```text\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
NUMBER = r"(-?\d+(?:\.\d+)?)"


@pytest.fixture(scope="module")
def printed() -> list[str]:
    """The tables that the program prints."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        theory.main()
    return output.getvalue().split("\n\n")[:-1]


def assert_same(found: str, shown: str) -> None:
    """Assert that two texts are equal but for spaces and for one unit of a number's last place."""
    found_parts = re.split(NUMBER, found)
    shown_parts = re.split(NUMBER, shown)
    assert [part.split() for part in found_parts[::2]] == [
        part.split() for part in shown_parts[::2]
    ]
    for number, expected in zip(found_parts[1::2], shown_parts[1::2], strict=True):
        n_places = len(expected.partition(".")[2])
        unit = 10.0**-n_places if n_places else 0.0
        assert abs(float(number) - float(expected)) <= 1.01 * unit, (number, expected)


def test_the_program_prints_what_the_page_shows(printed):
    assert PAGE.count("```") == 2 * len(TABLES) == 14
    for found, shown in zip(printed, TABLES, strict=True):
        assert_same(found + "\n", shown)


def test_the_page_is_short():
    assert len(PAGE.splitlines()) <= 180


def test_a_number_that_was_edited_is_noticed():
    assert_same("spread 1.0:  4.50\n", "spread 1.0: 4.51\n")
    for edited in ("spread 1.0: 4.52\n", "spread 2: 4.50\n", "width 1.0: 4.50\n"):
        with pytest.raises(AssertionError):
            assert_same("spread 1.0: 4.50\n", edited)


def stands_in(number: str, text: str) -> bool:
    """Return whether a text has a number that is this one when it is rounded to as many places."""
    n_places = len(number.partition(".")[2])
    known = (float(other) for other in re.findall(NUMBER, text))
    return any(abs(abs(other) - float(number)) <= 0.501 * 10.0**-n_places for other in known)


def test_numbers_of_the_text_are_printed_or_in_a_page_that_the_paragraph_links():
    in_blocks = " ".join([*TABLES, (ROOT / "course" / "theory.py").read_text()])
    prose = re.sub(r"^```.*?^```", "", PAGE, flags=re.DOTALL | re.MULTILINE)
    n_numbers = 0
    for paragraph in prose.split("\n\n"):
        sources = in_blocks
        for link in re.findall(r"\]\(([\w./-]+\.md)\)", paragraph):
            sources += (ROOT / "docs" / link).read_text()
        text = re.sub(r"`[^`]*`|\[[^]]*\]\([^)]*\)", "", paragraph)
        for number in re.findall(r"(?<![\w.])\d+\.?\d+(?!\w)", text):
            assert stands_in(number, sources), f"{number} in: {paragraph}"
            n_numbers += 1
    assert n_numbers >= 25
    assert not stands_in("3.2", in_blocks) and not stands_in("0.065", in_blocks)


def test_rewards_grow_with_length(printed):
    """What the text concludes from the last table, from its numbers."""
    rows = [[float(cell) for cell in row.split()] for row in printed[-1].splitlines()[1:]]
    penalties = [row[1] for row in rows]
    assert penalties == sorted(penalties, reverse=True) and len(set(penalties)) == 4
    assert all(row[1] == row[2] for row in rows)
