r"""A page to read an evaluation by: one HTML file that needs no network, with every problem and every response.

    python report.py runs/eval      # samples.jsonl and summary.json of that folder -> report.html
Maths in $…$, $$…$$, \(…\), \[…\], equation environments and \boxed{…} becomes MathML, which browsers draw themselves; what
cannot be converted is shown as source. Text is escaped everywhere: a response may hold a script. Cards lie compressed in the
page and are unpacked as the reader comes to them, so that a page of 5,000 responses stays quick.
"""

import base64
import hashlib
import json
import re
import sys
import zlib
from functools import lru_cache
from html import escape, unescape
from itertools import accumulate, pairwise
from pathlib import Path
from string import Template
from xml.etree.ElementTree import tostring

from latex2mathml.commands import MATRICES
from latex2mathml.converter import Converter

VERDICTS = ("right", "wrong", "no answer", "cut", "timeout", "unjudged")
FIELDS = {
    "set": str,
    "problem": str,
    "sample": int,
    "question": str,
    "prompt": str,
    "answer": str | list,
    "response": str,
}
FIELDS |= {"extracted": str | None, "correct": bool, "verdict": str, "tokens": int}

# ---- Maths
MAX_FORMULA = 2000  # characters; it bounds the time that unclosed brackets cost
MAX_DEPTH = 50  # braces in braces
SOME = rf"{{1,{MAX_FORMULA}}}"
BRACED = r"\{\}"
for _ in range(8):  # braces in braces; possessive (+), so that unbalanced ones fail at once
    BRACED = rf"\{{(?:[^{{}}\\]|\\.|{BRACED}){{0,{MAX_FORMULA}}}+\}}"
# Environments that the converter would run together or number, and what stands for them.
SAME = dict.fromkeys(["align", "align*", "aligned", "eqnarray", "eqnarray*"], "split") | {
    "dcases": "cases"
}
SAME |= dict.fromkeys(
    ["gather", "gather*", "gathered", "equation", "equation*", "multline", "multline*"],
    "displaylines",
)
IN_TEXT = "|".join(map(re.escape, [*SAME, "array", "cases"]))
SEGMENT = re.compile(
    rf"""\[asy\](?P<figure>.{{0,5000}}?)\[/asy\] | ```(?P<code>.{{0,5000}}?)```
    | \n?[ ]?\$\$(?P<dollars>.{SOME}?)\$\$[ ]?\n? | \n?[ ]?(?<!\\)\\\[(?P<brackets>.{SOME}?)\\\][ ]?\n?
    | \n?(?P<environment>\\begin\{{(?P<name>{IN_TEXT})\}}.{SOME}?\\end\{{(?P=name)\}})\n?
    | (?<!\\)\\\((?P<parens>.{SOME}?)\\\) | (?P<boxed>\\boxed\s{{0,9}}{BRACED})
    | (?<![\\$])\$(?P<tight>(?!\s)(?:\\.|[^$\\]){SOME}+(?<!\s))\$(?!\d)  # not the dollars of "$5 and $6"
    | (?<![\\$])\$[ ](?P<loose>(?:\\.|[^$\\]){SOME}+)(?<=[ ])\$(?!\d)""",
    re.DOTALL | re.VERBOSE,
)
# Definitions can grow without bound, the others would put foreign attributes or boxes of any size on the page.
REFUSED = re.compile(
    r"\\(?:def|newcommand|newenvironment|DeclareMathOperator|class|style|href|rule|raise|lower)(?![A-Za-z])"
)


@lru_cache(maxsize=1 << 16)
def to_mathml(latex: str, display: bool = False) -> str:
    """Convert LaTeX to a <math> element, or to its source in <code> where that fails."""
    source = f"<code>{escape(latex)}</code>"
    latex = re.sub(r"(?<=[dn]\{)[a-z]+\*?(?=\})", lambda name: SAME.get(name[0], name[0]), latex)
    environments = re.findall(r"\\begin\s*\{([^}]*)", latex)
    depth = max(
        accumulate((c == "{") - (c == "}") for c in latex), default=0
    )  # the converter recurses
    if (
        len(latex) > MAX_FORMULA
        or depth > MAX_DEPTH
        or REFUSED.search(latex)
        or any(f"\\{name}" not in MATRICES for name in environments)
    ):
        return source
    try:
        tree = Converter(display="block" if display else "inline").convert_to_element(latex)
        for node in tree.iter():
            node.text = unescape(
                node.text or ""
            )  # the converter writes references, which tostring would escape again
            if re.match(r"\\[A-Za-z]", node.text):  # a command that it does not know
                return source
            if node.get("linebreak") and not latex.startswith(
                r"\begin{displaylines}"
            ):  # browsers ignore line breaks
                return to_mathml(rf"\begin{{displaylines}}{latex}\end{{displaylines}}", display)
            if (
                node.tag == "menclose"
            ):  # browsers ignore it: the style sheet draws boxes and strikes
                node.tag, node.attrib = "mrow", {"class": node.get("notation", "")}
            if node.text == "|":  # spaced like an operator otherwise
                node.attrib |= {"lspace": "0", "rspace": "0"}
        for row in tree.iter("mrow"):
            for before, node in pairwise(row):
                if (
                    node.text in ("+", "−")
                    and before.tag == "mo"
                    and before.text not in tuple(")]}|!")
                ):
                    node.set("form", "prefix")  # a sign, not a sum
        del tree.attrib["xmlns"]
        return tostring(tree, encoding="unicode")
    except Exception:  # on bad LaTeX the converter raises nearly anything: its own errors, IndexError, RecursionError
        return source


def render(text: str) -> str:
    """Convert text with maths to HTML."""
    html, end = [], 0
    for match in SEGMENT.finditer(text):
        html.append(escape(text[end : match.start()]))
        kind, end = match.lastgroup, match.end()
        if kind in ("figure", "code"):
            code = f"<code class=block>{escape(match[kind].strip())}</code>"
            html.append(
                code
                if kind == "code"
                else f"<details><summary>Figure (Asymptote)</summary>{code}</details>"
            )
        else:
            html.append(
                to_mathml(match[kind].strip(), kind in ("dollars", "brackets", "environment"))
            )
    return "".join(html) + escape(text[end:])


def render_answer(answer: str | list[str] | None) -> str:
    """Convert a bare answer, or several accepted ones, to HTML: words stay words."""
    if answer is None:
        return "<i>none</i>"
    if isinstance(answer, list):
        return " <i>or</i> ".join(render_answer(str(one)) for one in answer)
    bare_maths = re.search(r"[\\^_{}]", answer) and "$" not in answer
    return f'<span title="{escape(answer)}">{to_mathml(answer) if bare_maths else render(answer)}</span>'


# ---- Reading
def parse(text: bytes, path: Path, line: int = 1) -> dict:
    """Parse a JSON object that begins at a line of a file."""
    try:
        value = json.loads(text)
    except ValueError as error:  # JSONDecodeError knows its line, UnicodeDecodeError does not
        line += getattr(error, "lineno", 1) - 1
        raise ValueError(f"{path}, line {line}: not JSON ({error}): {text[:60]!r}") from error
    if isinstance(value, dict):
        return value
    raise ValueError(f"{path}, line {line}: {text[:60]!r}; expected a JSON object")


def read_samples(path: Path) -> list[dict]:
    """Read a sample a line."""
    samples = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        samples.append(parse(line, path, number))
        for key, kind in FIELDS.items():
            value = samples[-1].get(key)
            if not isinstance(value, kind) or key == "verdict" and value not in VERDICTS:
                expected = f"one of {', '.join(VERDICTS)}" if key == "verdict" else kind
                raise ValueError(
                    f"{path}, line {number}: {key} is {value!r}; expected {expected}, as eval.py writes it"
                )
    if not samples:
        raise ValueError(f"{path} is empty; expected a sample a line, as eval.py writes them")
    return samples


# ---- Templates
STYLE = """
:root { color-scheme: light dark; --ink: light-dark(#1c2128, #d8dee6); --back: light-dark(#fff, #14181d);
  --accent: light-dark(#0a58ca, #79b0ff); --line: light-dark(#d5dae1, #333b45); --soft: light-dark(#f4f6f8, #1c2229);
  --faint: light-dark(#5c6672, #98a3b0) }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--back); max-width: 68rem;
  margin: 0 auto; padding: 1rem } h1 { font-size: 1.4rem } h2 { font-size: 1rem; margin: 0 0 .6rem }
small, i, output { color: var(--faint) } summary { cursor: pointer }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px } .wide { overflow-x: auto }
table { border-collapse: collapse; margin: .8rem 0; font-size: .9rem; font-variant-numeric: tabular-nums }
td small { display: block } th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid var(--line) }
.sets :is(td, th + th) { text-align: right; white-space: nowrap }
form { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: center;
  padding: .6rem 0; background: var(--back); border-bottom: 1px solid var(--line) } output { flex-basis: 100% }
[type=search] { flex: 1 1 14rem }
select, button, [type=search] { font: inherit; color: inherit; background: var(--soft); border: 1px solid var(--line);
  border-radius: 4px; padding: .2rem .5rem }
article { border: 1px solid var(--line); border-radius: 6px; padding: .9rem 1.1rem; margin: 1rem 0; min-height: 7rem;
  content-visibility: auto; contain-intrinsic-size: auto 20rem } .sample { margin: .4rem 0 }
.text { white-space: pre-wrap; overflow-wrap: anywhere; overflow: auto hidden; padding: .2rem 0 }
.sample > .text, .block { display: block; background: var(--soft); padding: .7rem; border-radius: 4px;
  margin: .4rem 0 .8rem }
code { font: .85em/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; background: var(--soft) }
.sample code { background: var(--back) }
.badge { font-size: .75rem; padding: .1rem .5rem; border-radius: 1rem; white-space: nowrap; color: #fff;
  background: #57606a } .right { background: #1a7f37 } .wrong { background: #c2332c } .cut, .timeout { background: #9a6200 }
math { font-family: 'Latin Modern Math', 'STIX Two Math', 'Cambria Math', 'DejaVu Math TeX Gyre', math; font-size: 1.08em }
math[display=block] { margin: .5em 0 } [mathvariant^=bold] { font-weight: bold }
[mathvariant$=italic] { font-style: italic } mtd { padding: .25em .4em } [columnalign=left] { text-align: left }
[columnalign=right] { text-align: right; padding-right: 0 } [columnalign=right] + mtd { padding-left: .1em }
.box { border: 1.5px solid var(--accent); background: color-mix(in srgb, var(--accent) 14%, transparent);
  padding: .15em .3em }
[class*=strike] { background: linear-gradient(to top right, transparent 47%, currentcolor 48% 52%, transparent 53%) }
"""

SCRIPT = """
const $ = id => document.getElementById(id), form = document.forms[0], data = JSON.parse($('data').textContent), STEP = 20;
for (const problem of data) problem.text = problem.text.toLowerCase();
let found = [], shown = 0;

async function fill(article, problem) {  // innerHTML is safe: report.py has escaped the text
  const bytes = Uint8Array.from(atob(problem.html), c => c.charCodeAt(0));
  article.innerHTML = await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream('deflate'))).text();
  unfold(article);
}
function unfold(parent) {
  for (const sample of parent.querySelectorAll('.sample'))
    sample.open = form.open.checked || sample.dataset.verdict === form.verdict.value;
}
function more() {
  for (const problem of found.slice(shown, shown += STEP))
    fill($('list').appendChild(document.createElement('article')), problem);
  $('more').hidden = shown >= found.length;
}
function filter() {
  const set = form.set.value, verdict = form.verdict.value, text = form.text.value.toLowerCase();
  found = data.filter(p => (!set || p.set === set) && (!verdict || p.verdicts.includes(verdict))
    && (!form.mixed.checked || p.mixed) && p.text.includes(text));
  const all = found.flatMap(p => p.verdicts), names = [...form.verdict].map(option => option.value);
  const counts = names.map(name => [all.filter(v => v === name).length, name]).filter(([n]) => n).map(c => c.join(' '));
  $('count').value = [`${found.length} of ${data.length} problems`, ...counts].join(' · ');
  $('list').replaceChildren();
  shown = 0;
  more();
}
form.oninput = event => event.target === form.open ? unfold($('list')) : filter();
form.onsubmit = event => event.preventDefault();
$('more').onclick = more;
new IntersectionObserver(entries => entries.at(-1).isIntersecting && more(), {rootMargin: '600px'}).observe($('more'));
filter();
"""

PAGE = Template("""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>$title</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src '$style_hash'; script-src '$script_hash'">
<style>$style</style>
<h1>$title</h1>
<div class="wide">$table</div><p><small>Shares in percent, with 95 % intervals over problems.</small></p>
<details class="settings"><summary>Settings and versions</summary><div class="wide">$settings</div></details>
<form><label>Set <select name="set"><option value="">all$sets</select></label>
<label>Verdict <select name="verdict"><option value="">any$verdicts</select></label>
<input type="search" name="text" placeholder="Search question, response, answer" aria-label="Search question, response, answer">
<label><input type="checkbox" name="mixed"> samples disagree</label>
<label><input type="checkbox" name="open"> open responses</label>
<output id="count" aria-live="polite"></output></form>
<noscript>The list of problems needs JavaScript; nothing is loaded from elsewhere.</noscript>
<main id="list"></main><button id="more" hidden>Show more</button>
<script type="application/json" id="data">$data</script><script>$script</script></html>
""")


def digest(text: str) -> str:
    """Return a hash for the page's content security policy, which then allows this text and no other."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


# ---- The page
def settings(values: dict) -> str:
    """Lay out settings, a row each."""
    rows = {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in values.items()
    }
    return f"<table>{''.join(f'<tr><th scope=row>{escape(key)}<td>{escape(value)}' for key, value in rows.items())}</table>"


def interval(figure: dict | None) -> str:
    """Lay out a share with its 95 % interval, in percent."""
    if figure is None:
        return "–"
    return f"{100 * figure['mean']:.1f} <small>{100 * figure['low']:.1f} – {100 * figure['high']:.1f}</small>"


def figures(row: dict, counts: list[int]) -> dict[str, str]:
    """Return the cells of a set by column; pass@k and maj@k for the given k."""
    cells = {
        "problems": f"{row.get('problems', '–')} × {row.get('samples', '–')}",
        "avg": interval(row.get("avg")),
    }
    cells |= {
        f"{key}@{k}": interval(row.get(key, {}).get(str(k)))
        for key in ("pass", "maj")
        for k in counts
    }
    plain = {
        "cut": ("truncated", ".1%"),
        "boxed": ("boxed", ".1%"),
        "tokens": ("length_mean", ",.0f"),
    }
    plain |= {"p95": ("length_p95", ",.0f"), "timeouts": ("timeouts", ",")}
    return cells | {
        name: format(row[key], style) if key in row else "–" for name, (key, style) in plain.items()
    }


def sets_table(sets: dict[str, dict]) -> str:
    """Lay out the figures of summary.json, a row a set; k powers of two and the largest, as at 1 both are the average."""
    counts = sorted({int(k) for row in sets.values() for k in row.get("pass", {})} - {1})
    rows = {
        name: figures(row, [k for k in counts if k & (k - 1) == 0 or k == counts[-1]])
        for name, row in sets.items()
    }
    html = "".join(f"<th scope=col>{column}" for column in ["set", *next(iter(rows.values()), {})])
    for name, cells in rows.items():
        html += f"<tr><th scope=row>{escape(name)}" + "".join(
            f"<td>{cell}" for cell in cells.values()
        )
    return f"<table class=sets><tr>{html}</table>"


def card(samples: list[dict]) -> str:
    """Lay out a problem and its responses."""
    first = samples[0]
    badges = [f'<b class="badge {sample["verdict"]}">{sample["verdict"]}</b>' for sample in samples]
    html = f"<h2>{escape(first['problem'])} {' '.join(badges)}</h2><div class=text>{render(first['question'])}</div>"
    html += f"<p>Gold: {render_answer(first['answer'])}</p>"
    for sample, badge in zip(samples, badges, strict=True):
        facts = " · ".join(
            f"{key} {sample[key]}" for key in ("tokens", "reward", "seed") if key in sample
        )
        html += f'<details class=sample data-verdict="{sample["verdict"]}"><summary>{badge} sample {sample["sample"]}: '
        html += f"{render_answer(sample['extracted'])} <small>{escape(facts)}</small></summary>"
        html += f"<div class=text>{render(sample['response'])}</div></details>"
    for prompt in dict.fromkeys(
        sample["prompt"] for sample in samples
    ):  # as a rule one for all samples
        html += f"<details><summary><small>Prompt</small></summary><code class=block>{escape(prompt)}</code></details>"
    return html


def pack(samples: list[dict]) -> dict:
    """Return what the page's script needs of a problem: what it filters by, and the compressed card."""
    golds = (
        samples[0]["answer"] if isinstance(samples[0]["answer"], list) else [samples[0]["answer"]]
    )
    texts = [
        samples[0]["problem"],
        samples[0]["question"],
        *map(str, golds),
        *(sample["response"] for sample in samples),
    ]
    return {
        "set": samples[0]["set"],
        "verdicts": [sample["verdict"] for sample in samples],
        "mixed": len({sample["correct"] for sample in samples}) > 1,
        "text": "\n".join(texts),
        "html": base64.b64encode(zlib.compress(card(samples).encode(errors="replace"), 9)).decode(),
    }


def write_report(folder: Path) -> Path:
    """Write report.html next to samples.jsonl and summary.json, and return its path.

    Raises ValueError, naming file and line, where one of them is missing or not what eval.py writes.
    """
    lines, figures = folder / "samples.jsonl", folder / "summary.json"
    for path in (lines, figures):
        if not path.is_file():
            raise ValueError(f"{path} does not exist; expected a folder that eval.py wrote")
    summary = {"config": {}, "versions": {}} | parse(figures.read_bytes(), figures)
    if not isinstance(summary.get("sets"), dict):
        raise ValueError(
            f"{figures}: sets is {summary.get('sets')!r}; expected figures by set, as eval.py writes them"
        )
    problems: dict[tuple[str, str], list[dict]] = {}
    for sample in read_samples(lines):
        problems.setdefault((sample["set"], sample["problem"]), []).append(sample)
    data = json.dumps([pack(samples) for samples in problems.values()], ensure_ascii=False).replace(
        "<", "\\u003c"
    )
    page = PAGE.substitute(
        title=escape(f"Evaluation of {summary['config'].get('model', folder.name)}"),
        settings=settings(summary["config"]) + settings(summary["versions"]), table=sets_table(summary["sets"]),
        sets="".join(f"<option>{escape(name)}" for name in dict.fromkeys(name for name, _ in problems)),
        verdicts="".join(f"<option>{verdict}" for verdict in VERDICTS),
        data=data, style=STYLE, script=SCRIPT, style_hash=digest(STYLE), script_hash=digest(SCRIPT),
    )  # fmt: skip
    (folder / "report.html").write_bytes(page.encode(errors="replace"))
    return folder / "report.html"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python report.py FOLDER")
    print(write_report(Path(sys.argv[1])))
