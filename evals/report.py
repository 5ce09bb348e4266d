r"""A page to read an evaluation by: one HTML file that needs no network, with every response.

    python -m evals.report runs/eval-A   samples.jsonl and summary.json of the folder -> report.html

Maths in $…$, $$…$$, \(…\), \[…\], equation environments and \boxed{…} becomes MathML, which
browsers draw themselves; what cannot be converted is shown as its source. Text is escaped
everywhere, because a response may hold a script. The card of each problem lies compressed in the
page and is unpacked when the reader comes to it, so that a page of 5,000 responses stays quick.
report.html is the body of the page, report.css and report.js go with it; the rest is pages/page.py.
"""

import json
import re
import sys
from functools import lru_cache
from html import unescape
from itertools import pairwise
from pathlib import Path
from xml.etree.ElementTree import Element, tostring

from latex2mathml.commands import MATRICES
from latex2mathml.converter import Converter

from evals.figures import group_by, ks_to_show, percent, read_samples
from infra import errors
from infra.files import read_json, shown
from pages.page import escape, fill, make_page, options, pack, write_page

FOLDER = Path(__file__).parent
VERDICTS = ("right", "wrong", "no answer", "cut", "timeout", "unjudged")

# ---- Where maths stands in a text
MAX_FORMULA = 2000  # characters; it bounds the time that unclosed brackets cost
SOME = rf"{{1,{MAX_FORMULA}}}"

BRACED = r"\{\}"
for _ in range(8):  # braces in braces; possessive (+), so that unbalanced ones fail at once
    BRACED = rf"\{{(?:[^{{}}\\]|\\.|{BRACED}){{0,{MAX_FORMULA}}}+\}}"

# Environments that the converter would run together or number, and those that stand for them.
REPLACED_ENVIRONMENTS = {
    "align": "split",
    "align*": "split",
    "aligned": "split",
    "eqnarray": "split",
    "eqnarray*": "split",
    "dcases": "cases",
    "gather": "displaylines",
    "gather*": "displaylines",
    "gathered": "displaylines",
    "equation": "displaylines",
    "equation*": "displaylines",
    "multline": "displaylines",
    "multline*": "displaylines",
}
ENVIRONMENTS = "|".join(map(re.escape, [*REPLACED_ENVIRONMENTS, "array", "cases"]))

SEGMENT = re.compile(
    rf"""
      \[asy\](?P<figure>.{{0,5000}}?)\[/asy\]
    | ```(?P<code>.{{0,5000}}?)```
    | \n?[ ]?\$\$(?P<dollars>.{SOME}?)\$\$[ ]?\n?
    | \n?[ ]?(?<!\\)\\\[(?P<brackets>.{SOME}?)\\\][ ]?\n?
    | \n?(?P<environment>\\begin\{{(?P<name>{ENVIRONMENTS})\}}.{SOME}?\\end\{{(?P=name)\}})\n?
    | (?<!\\)\\\((?P<parens>.{SOME}?)\\\)
    | (?P<boxed>\\boxed\s{{0,9}}{BRACED})
    # a single dollar, but not those of "$5 and $6"
    | (?<![\\$])\$(?P<tight>(?!\s)(?:\\.|[^$\\]){SOME}+(?<!\s))\$(?!\d)
    | (?<![\\$])\$[ ](?P<loose>(?:\\.|[^$\\]){SOME}+)(?<=[ ])\$(?!\d)
    """,
    re.DOTALL | re.VERBOSE,
)
DISPLAYED = ("dollars", "brackets", "environment")  # formulas on a line of their own


def render(text: str) -> str:
    """Convert text with maths to HTML."""
    html = []
    end = 0
    for match in SEGMENT.finditer(text):
        html.append(escape(text[end : match.start()]))
        html.append(render_segment(match))
        end = match.end()
    html.append(escape(text[end:]))
    return "".join(html)


def render_segment(match: re.Match) -> str:
    """Convert what SEGMENT has matched to HTML: a formula, code, or the source of a figure."""
    kind = match.lastgroup
    content = match[kind].strip()
    code = f"<code class=block>{escape(content)}</code>"
    if kind == "code":
        return code
    if kind == "figure":
        return f"<details><summary>Figure (Asymptote)</summary>{code}</details>"
    return to_mathml(content, display=kind in DISPLAYED)


def render_answer(answer: str | list[str] | None) -> str:
    """Convert a bare answer, or several accepted ones, to HTML; words stay words."""
    if answer is None:
        return "<i>none</i>"
    if isinstance(answer, list):
        return " <i>or</i> ".join(render_answer(str(each)) for each in answer)
    is_bare_maths = re.search(r"[\\^_{}]", answer) and "$" not in answer
    html = to_mathml(answer) if is_bare_maths else render(answer)
    return f'<span title="{escape(answer)}">{html}</span>'


# ---- From LaTeX to MathML
MAX_DEPTH = 50  # braces in braces: the converter recurses
ENVIRONMENT_NAME = re.compile(r"(?<=[dn]\{)[a-z]+\*?(?=\})")  # of \begin{…} and \end{…}
# Definitions can grow without bound; the others would put foreign attributes, or boxes of any size,
# on the page.
REFUSED = re.compile(
    r"\\(?:def|newcommand|newenvironment|DeclareMathOperator|class|style|href|rule|raise|lower)"
    r"(?![A-Za-z])"
)


@lru_cache(maxsize=1 << 16)
def to_mathml(latex: str, display: bool = False) -> str:
    """Convert LaTeX to a <math> element, or to its source in <code> where that fails.

    Args:
        latex: A formula without its delimiters.
        display: Whether it stands on a line of its own.
    """
    source = f"<code>{escape(latex)}</code>"
    latex = ENVIRONMENT_NAME.sub(replace_environment, latex)
    if not is_acceptable(latex):
        return source
    converter = Converter(display="block" if display else "inline")
    try:
        tree = converter.convert_to_element(latex)
        for node in tree.iter():
            # The converter writes character references, which tostring would escape again.
            node.text = unescape(node.text or "")
            if re.match(r"\\[A-Za-z]", node.text):  # a command that the converter does not know
                return source
            # Browsers ignore line breaks: rows of a table take their place.
            if node.get("linebreak") and not latex.startswith(r"\begin{displaylines}"):
                rows = rf"\begin{{displaylines}}{latex}\end{{displaylines}}"
                return to_mathml(rows, display)
            adapt_to_browsers(node)
        mark_signs(tree)
        del tree.attrib["xmlns"]
        return tostring(tree, encoding="unicode")
    except Exception:  # on bad LaTeX the converter raises nearly anything, e.g. IndexError
        return source


def replace_environment(name: re.Match) -> str:
    """Return the name of the environment that stands for another."""
    return REPLACED_ENVIRONMENTS.get(name[0], name[0])


def is_acceptable(latex: str) -> bool:
    """Return whether a formula may be given to the converter."""
    if len(latex) > MAX_FORMULA or nesting(latex) > MAX_DEPTH or REFUSED.search(latex):
        return False
    environments = re.findall(r"\\begin\s*\{([^}]*)", latex)
    return all(f"\\{name}" in MATRICES for name in environments)


def nesting(latex: str) -> int:
    """Return how deep braces stand in braces."""
    depth = 0
    deepest = 0
    for character in latex:
        if character == "{":
            depth += 1
            deepest = max(deepest, depth)
        elif character == "}":
            depth -= 1
    return deepest


def adapt_to_browsers(node: Element) -> None:
    """Change what browsers do not draw as LaTeX does; in place."""
    if node.tag == "menclose":  # browsers ignore it: the style sheet draws boxes and strikes
        node.tag = "mrow"
        node.attrib = {"class": node.get("notation", "")}
    if node.text == "|":  # it would be spaced like an operator
        node.set("lspace", "0")
        node.set("rspace", "0")


def mark_signs(tree: Element) -> None:
    """Mark a plus or minus after an operator as a sign, which has less space; in place."""
    for row in tree.iter("mrow"):
        for before, node in pairwise(row):
            follows_operator = before.tag == "mo" and before.text not in tuple(")]}|!")
            if node.text in ("+", "−") and follows_operator:
                node.set("form", "prefix")


# ---- Tables above the list of problems
def settings_table(values: dict) -> str:
    """Lay out settings, a row each."""
    html = "<table>"
    for name, value in values.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        html += f"<tr><th scope=row>{escape(name)}<td>{escape(text)}"
    return html + "</table>"


def sets_table(sets: dict[str, dict]) -> str:
    """Lay out the figures of summary.json, a row a set."""
    ks = ks_to_show(sets)
    rows = {name: set_cells(figures, ks) for name, figures in sets.items()}
    columns = next(iter(rows.values()), {}).keys()
    html = "<table class=sets><tr>"
    for column in ["set", *columns]:
        html += f"<th scope=col>{column}"
    for name, cells in rows.items():
        html += f"<tr><th scope=row>{escape(name)}"
        for cell in cells.values():
            html += f"<td>{cell}"
    return html + "</table>"


def set_cells(figures: dict, ks: list[int]) -> dict[str, str]:
    """Return the cells of a set by column, with pass@k and maj@k for the given k."""
    cells = {
        "problems": f"{figures['problems']} × {figures['samples']}",
        "avg": interval(figures["avg"]),
    }
    for kind in ("pass", "maj"):
        for k in ks:
            cells[f"{kind}@{k}"] = interval(figures[kind].get(str(k)))
    cells["cut"] = percent(figures["truncated"])
    cells["boxed"] = percent(figures["boxed"])
    cells["tokens"] = f"{figures['length_mean']:,.0f}"
    cells["p95"] = f"{figures['length_p95']:,.0f}"
    cells["timeouts"] = f"{figures['timeouts']:,}"
    return cells


def interval(figure: dict | None) -> str:
    """Lay out a share with its 95 % interval, in percent; None: the set has not so many samples."""
    if figure is None:
        return "–"
    bounds = f"{100 * figure['low']:.1f} – {100 * figure['high']:.1f}"
    return f"{100 * figure['mean']:.1f} <small>{bounds}</small>"


def averages_table(averages: dict[str, dict]) -> str:
    """Lay out the averages over sets of summary.json, a row each; nothing without any."""
    if not averages:
        return ""
    html = "<table class=sets><tr><th scope=col>average over sets<th scope=col>avg<th scope=col>of"
    for name, average in averages.items():
        members = escape(", ".join(average["sets"]))
        html += f"<tr><th scope=row>{escape(name)}<td>{interval(average)}<td>{members}"
    return html + "</table>"


# ---- Problems
def pack_problem(samples: list[dict]) -> dict:
    """Return what report.js needs of a problem: what it filters by, and the compressed card."""
    first = samples[0]
    golds = first["answer"] if isinstance(first["answer"], list) else [first["answer"]]
    texts = [first["problem"], first["question"]]
    texts += [str(gold) for gold in golds]
    texts += [sample["response"] for sample in samples]
    return {
        "set": first["set"],
        "verdicts": [sample["verdict"] for sample in samples],
        "mixed": len({sample["correct"] for sample in samples}) > 1,
        "text": "\n".join(texts),
        "html": pack(card(samples)),
    }


def card(samples: list[dict]) -> str:
    """Lay out a problem and its responses."""
    first = samples[0]
    badges = " ".join(badge(sample["verdict"]) for sample in samples)
    html = f"<h2>{escape(first['problem'])} {badges}</h2>"
    html += f"<div class=text>{render(first['question'])}</div>"
    html += f"<p>Gold: {render_answer(first['answer'])}</p>"
    for sample in samples:
        html += response(sample)
    for prompt in dict.fromkeys(sample["prompt"] for sample in samples):  # as a rule there is one
        code = f"<code class=block>{escape(prompt)}</code>"
        html += f"<details><summary><small>Prompt</small></summary>{code}</details>"
    return html


def badge(verdict: str) -> str:
    """Lay out a verdict."""
    return f'<b class="badge {verdict}">{verdict}</b>'


def response(sample: dict) -> str:
    """Lay out a response, folded behind its verdict and answer."""
    verdict = sample["verdict"]
    facts = " · ".join(f"{key} {sample[key]}" for key in ("tokens", "reward", "seed"))
    html = f'<details class=sample data-verdict="{verdict}">'
    html += f"<summary>{badge(verdict)} sample {sample['sample']}: "
    html += f"{render_answer(sample['extracted'])} <small>{escape(facts)}</small></summary>"
    html += f"<div class=text>{render(sample['response'])}</div></details>"
    return html


# ---- The page
def write_report(folder: Path) -> Path:
    """Write report.html next to samples.jsonl and summary.json, and return its path.

    Raises:
        ValueError: one of the two is missing, or holds something else.
    """
    samples = read_samples(folder)
    summary_file = folder / "summary.json"
    if not summary_file.is_file():
        raise ValueError(f"{summary_file} does not exist; expected the folder of an evaluation")
    summary = read_json(summary_file, "the summary of an evaluation")
    for name in ("sets", "config", "versions"):
        if not isinstance(summary.get(name), dict):
            raise ValueError(
                f"{summary_file}: {name} is {shown(summary.get(name))}; expected the summary of an "
                "evaluation, in which it is an object"
            )
    page = make_report(samples, summary)
    return write_page(folder / "report.html", page)


def make_report(samples: list[dict], summary: dict) -> str:
    """Return the page of an evaluation."""
    sets = group_by("set", samples)
    problems = []
    for samples_of_set in sets.values():
        problems += [pack_problem(group) for group in group_by("problem", samples_of_set).values()]
    averages = summary.get("averages", {})  # an earlier version wrote none
    body = fill(
        FOLDER / "report.html",
        table=sets_table(summary["sets"]) + averages_table(averages),
        settings=settings_table(summary["config"]) + settings_table(summary["versions"]),
        sets=options(sets),
        verdicts=options(VERDICTS),
    )
    title = f"Evaluation of {summary['config']['model']}"
    return make_page(title, body, problems, FOLDER / "report.css", FOLDER / "report.js")


def main() -> None:
    """Write the page of the evaluation that the command line names."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m evals.report FOLDER")
    print(write_report(Path(sys.argv[1])))


if __name__ == "__main__":
    errors.run(main)
