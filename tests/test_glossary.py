"""The glossary: its terms are in order, what they point to is there, and pages lead to it."""

import importlib
import re

import pytest
from conftest import ROOT

TEXT = (ROOT / "docs" / "glossary.md").read_text()
ENTRIES = re.findall(r"^- \*\*(.+?)\*\*: (.+)$", TEXT, re.MULTILINE)


def test_terms_are_in_order():
    terms = [term for term, _ in ENTRIES]
    assert len(terms) == TEXT.count("\n- ") >= 25
    assert terms == sorted(set(terms), key=str.casefold)


def test_each_term_says_where_it_lives():
    for term, entry in ENTRIES:
        assert re.search(r"\]\(\.\./\S+\.py\)|`--[a-z-]+", entry), term


def test_what_an_entry_names_is_there():
    links = re.findall(r"\[`(\w+)\.(?!py`)([\w.]+)`\]\(\.\./([\w/]+)\.py\)", TEXT)
    assert len(links) >= 30
    for module, path, file in links:
        assert module == file.rpartition("/")[2]
        value = importlib.import_module(file.replace("/", "."))
        for name in path.split("."):
            fields = getattr(value, "__dataclass_fields__", {})
            value = fields[name] if name in fields else getattr(value, name)


@pytest.mark.parametrize(
    "page", ["README.md", "docs/walkthrough.md", "docs/dense-rewards.md", "docs/theory.md"]
)
def test_pages_lead_to_the_glossary(page):
    folder = (ROOT / page).parent
    links = re.findall(r"\]\(([\w./-]*glossary\.md)\)", (ROOT / page).read_text())
    assert links and all((folder / link).resolve() == ROOT / "docs/glossary.md" for link in links)
