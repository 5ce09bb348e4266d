"""The HTML report: text and maths as HTML, errors, and the page itself in headless Chromium."""

import json
import re
import time
from html.parser import HTMLParser

import pytest

from evals.report import render, render_answer, to_mathml, write_report

FIGURE = {"mean": 0.5, "low": 0.25, "high": 0.75}
HOSTILE = r"""<script>document.title = "hacked"</script>
<img src=x onerror='document.title = "hacked"'> </script> {"a": 1}
$\text{<img src=x onerror=alert(1)>}$ $\style{position:fixed}{x}$ \(a<b>c\) ]]> &lt;
$$<svg onload=alert(1)>$$"""
HOSTILE += "\ud800\x00"  # half a character, as a cut response may end


def sample(problem: str, number: int, verdict: str, response: str, **changes) -> dict:
    """A line of samples.jsonl."""
    record = {
        "set": "math500",
        "problem": problem,
        "sample": number,
        "seed": 7,
        "question": "What is $\\frac{1}{2}+1$?",
        "prompt": "<|im_start|>user",
        "answer": "\\frac{3}{2}",
        "response": response,
        "extracted": "2",
        "tokens": 99,
        "reward": 0.0,
        "correct": verdict == "right",
        "verdict": verdict,
        "finish_reason": "stop",
    }
    return record | changes


def write_folder(folder, samples: list[dict]):
    """Write what eval.py writes."""
    figures = {
        "problems": 3,
        "samples": 2,
        "avg": FIGURE,
        "pass": {"1": FIGURE, "2": FIGURE | {"mean": 0.625}},
        "maj": {"1": FIGURE, "2": FIGURE},
        "truncated": 0.125,
        "boxed": 0.9,
        "length_mean": 1234.4,
        "length_p95": 2345.6,
        "timeouts": 0,
    }
    summary = {
        "config": {"model": "toy <1>", "samples": 2},
        "versions": {"torch": "2.13.0"},
        "sets": {"math500": figures},
        "averages": {"all": FIGURE | {"mean": 0.4375, "sets": ["math500", "<aime>"]}},
    }
    folder.mkdir(exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in samples))
    return folder


def some_samples() -> list[dict]:
    """Three problems of two sets: the samples of one agree, those of one differ, one is hostile."""
    hostile = {
        "set": "gsm8k",
        "question": HOSTILE,
        "prompt": HOSTILE,
        "answer": ["7", HOSTILE],
        "extracted": HOSTILE,
    }
    return [
        sample("math500-0", 0, "right", "so \\boxed{\\frac{3}{2}}"),
        sample("math500-0", 1, "wrong", "Perhaps \\[\\sum_{k=1}^n k\\]"),
        sample("math500-1", 0, "right", "easy"),
        sample("math500-1", 1, "right", "easy"),
        sample("gsm8k-0", 0, "cut", HOSTILE, **hostile),
        sample("gsm8k-0", 1, "no answer", "UPPER $5 and $6", set="gsm8k", extracted=None),
    ]


# ---- Text and maths
class Tags(HTMLParser):
    """Names and attributes of all tags in a piece of HTML."""

    def __init__(self, html: str):
        super().__init__()
        self.names = set()
        self.attributes = set()
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}


@pytest.mark.parametrize(
    "html",
    [
        render(HOSTILE),
        render_answer(HOSTILE),
        render_answer([HOSTILE, "7"]),
        to_mathml(HOSTILE),
    ],
)
def test_hostile_text_is_escaped(html):
    tags = Tags(html)
    assert not tags.names & {"script", "img", "svg"}
    assert not tags.attributes & {"onerror", "onload", "style", "src"}


def test_text_is_escaped():
    assert render('a < b & "c"') == "a &lt; b &amp; &quot;c&quot;"


@pytest.mark.parametrize(
    "text",
    [
        "$x^2$",
        r"\(x^2\)",
        "$$x^2$$",
        r"\[x^2\]",
        r"\boxed{x^{2}}",
        r"\begin{align*}x^2\end{align*}",
    ],
)
def test_maths_becomes_mathml(text):
    is_displayed = text.startswith(("$$", r"\[", r"\begin"))
    html = render(f"before {text} after")
    assert html.startswith("before")
    assert html.endswith("after")
    assert html.count("<math") == 1
    assert re.search("<msup><mi>x</mi><m[nr]", html)
    assert ('display="block"' in html) == is_displayed


def test_boxes_are_marked_and_balanced():
    html = render(r"so \boxed{\left\{\frac{1}{\sqrt{2}}\right\}} and \boxed{3}")
    assert html.count('class="box"') == 2
    assert "<msqrt>" in html
    assert "boxed" not in html
    assert "boxed{3" in render(r"\boxed{3")


def test_lines_of_a_formula_become_rows():
    assert to_mathml(r"a = b \\ c = d", True).count("<mtr>") == 2
    for name in ("align*", "aligned", "gathered", "eqnarray", "equation", "pmatrix", "dcases"):
        html = to_mathml(rf"\begin{{{name}}} a &= b \\ &= d \end{{{name}}}")
        assert html.count("<mtr>") == 2, name
        assert html.count("<mtd") >= 4, name


@pytest.mark.parametrize(
    "latex",
    [
        r"\frac{1}{",
        r"\foo{x}",
        r"\left( x",
        "x^",
        "x^2^3",
        r"\end{cases}",
        r"\def\a{\b\b}\a",
        r"\rule{9em}{9999em}",
        "{" * 999 + "}" * 999,
        "x" * 2001,
        r"\begin{matrix} a & b",
        r"\begin{foo} a \\ b \end{foo}",
    ],
)
def test_what_cannot_be_converted_is_shown_as_source(latex):
    assert to_mathml(latex) == f"<code>{latex}</code>".replace("&", "&amp;")


def test_signs_and_bars_are_spaced_as_in_latex():
    assert to_mathml("f(-2)-1").count('form="prefix"') == 1
    assert 'form="prefix"' not in to_mathml("(a)-1")
    assert to_mathml("|a|").count('lspace="0" rspace="0"') == 2


def test_money_code_and_figures_are_no_maths():
    assert render("$5 and $6, or $7 more; \\$8 and \\$9") == "$5 and $6, or $7 more; \\$8 and \\$9"
    assert "<math" not in render("```\nx = '$a$'\n```")
    assert "<math" not in render('[asy]\nlabel("$O$");\n[/asy]')


def test_long_hostile_texts_are_quick():
    parts = ["\\boxed{", "\\[", "$$ ", "$", "{", " ", "\\begin{align}", "```", "[asy]", "\n"]
    parts += ["\\(", "$ a"]
    began = time.process_time()
    for part in parts:
        render(part * 20_000)
        render("\\boxed{" + part * 20_000)
    assert time.process_time() - began < 20


def test_answers():
    assert render_answer(None) == "<i>none</i>"
    assert ">Evelyn<" in render_answer("Evelyn")
    assert "<mfrac>" in render_answer(r"\frac{1}{2}")
    several = render_answer(["3", r"\sqrt{4}"])
    assert re.fullmatch("<span.*>3</span> <i>or</i> <span.*<msqrt>.*</span>", several)


# ---- The file
def test_a_missing_file_is_named(tmp_path):
    folder = write_folder(tmp_path, some_samples())
    for name in ("summary.json", "samples.jsonl"):
        (folder / name).unlink()
        with pytest.raises(ValueError, match=f"{name} does not exist"):
            write_report(folder)


def test_an_evaluation_without_figures_has_a_page(tmp_path):
    """As after a vision-language benchmark of which nobody could judge a question."""
    write_folder(tmp_path, some_samples())
    summary = {"config": {"model": "toy"}, "versions": {}, "sets": {}, "averages": {}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert "Evaluation of toy" in write_report(tmp_path).read_text()


def test_the_page_holds_the_figures(tmp_path):
    page = write_report(write_folder(tmp_path, some_samples())).read_text()
    assert "Evaluation of toy &lt;1&gt;" in page
    assert "3 × 2" in page
    assert "2.13.0" in page
    assert "pass@1" not in page
    assert "62.5 <small>25.0 – 75.0</small>" in page
    assert "43.8 <small>25.0 – 75.0</small><td>math500, &lt;aime&gt;" in page
    assert "1,234" in page
    assert "12.5%" in page
    assert page.count("<script") == 2
    assert not re.search("https?:", page)


# ---- The page in a browser
@pytest.fixture
def page(browser, tmp_path):
    browser.open(write_report(write_folder(tmp_path, some_samples())))
    return browser


@pytest.mark.browser
def test_filters_and_counts(page):
    everything = ["math500-0", "math500-1", "gsm8k-0"]
    assert page.cards() == everything
    assert page.count() == "3 of 3 problems · 3 right · 1 wrong · 1 no answer · 1 cut"
    page.set("verdict", "wrong")
    assert page.cards() == ["math500-0"]
    assert page.count() == "1 of 3 problems · 1 right · 1 wrong"
    assert page.opened() == [False, True]
    page.set("verdict", "no answer")
    assert page.cards() == ["gsm8k-0"]
    page.set("set", "math500")
    assert page.cards() == []
    assert page.count() == "0 of 3 problems"
    page.set("verdict", "")
    assert page.cards() == everything[:2]
    page.set("mixed", True)
    assert page.cards() == ["math500-0"]
    page.set("mixed", False)
    page.set("set", "")
    assert page.cards() == everything


@pytest.mark.browser
def test_search(page):
    expected = {
        "sum_{K": ["math500-0"],
        "upper $5": ["gsm8k-0"],
        "{3}{2}": ["math500-0", "math500-1"],
        "frac{1}{2}+1": ["math500-0", "math500-1"],
        "</script>": ["gsm8k-0"],
        "math500-1": ["math500-1"],
        "nowhere": [],
        "": ["math500-0", "math500-1", "gsm8k-0"],
    }
    for text, cards in expected.items():
        page.set("text", text)
        assert page.cards() == cards, text


@pytest.mark.browser
def test_maths_is_drawn(page):
    page.set("open", True)
    boxes = "[...document.querySelectorAll('math')].map(m => m.getBoundingClientRect())"
    sizes = page.js(f"{boxes}.map(box => [box.width, box.height])")
    assert len(sizes) >= 8
    assert all(width > 4 and height > 4 for width, height in sizes)
    parts = "[...document.querySelector('mfrac').children].map(c => c.getBoundingClientRect().top)"
    numerator, denominator = page.js(parts)
    assert denominator > numerator + 4
    assert page.js("getComputedStyle(document.querySelector('math .box')).borderTopWidth") != "0px"


@pytest.mark.browser
def test_nothing_is_loaded_run_or_complained_about(page):
    page.set("open", True)
    assert page.js("document.title") == "Evaluation of toy <1>"
    assert page.js("document.querySelectorAll('main :is(script, img, svg)').length") == 0
    text = page.js("document.querySelector('article:last-child .sample .text').textContent")
    assert text.startswith('<script>document.title = "hacked"')
    assert page.log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in page.log("performance")]
    requests = [event for event in events if event["method"] == "Network.requestWillBeSent"]
    urls = [event["params"]["request"]["url"] for event in requests]
    assert len(urls) == 1
    assert urls[0].startswith("file://")
    assert urls[0].endswith("/report.html")
    # The control: the page's policy forbids a request, and the log says so.
    page.js("fetch('http://127.0.0.1:9/').catch(() => 0) && 0")
    assert any("Content Security Policy" in entry["message"] for entry in page.log("browser"))


@pytest.mark.browser
def test_keyboard_reaches_everything(page):
    focus = "document.activeElement.name || document.activeElement.textContent.trim().slice(0, 8)"
    stops = []
    while not stops or not stops[-1].startswith("right sa"):
        page.press("\ue004")  # Tab
        stops.append(page.js(focus))
        assert len(stops) < 20, stops
    # There is no stop in the text in between.
    assert stops[-7:-1] == ["Settings", "set", "verdict", "text", "mixed", "open"]
    page.press("\ue007")  # Enter
    assert page.opened()[:2] == [True, False]


@pytest.mark.browser
def test_light_and_dark(page):
    brightness = {}
    for scheme in ("light", "dark"):
        feature = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        page.call("/goog/cdp/execute", {"cmd": "Emulation.setEmulatedMedia", "params": feature})
        for name in ("color", "backgroundColor"):
            colour = page.js(f"getComputedStyle(document.body).{name}")  # e.g. rgb(28, 33, 40)
            brightness[scheme, name] = int(re.search(r"\d+", colour)[0])
    assert brightness["light", "backgroundColor"] - brightness["light", "color"] > 180
    assert brightness["dark", "color"] - brightness["dark", "backgroundColor"] > 150


@pytest.mark.browser
def test_cards_come_as_the_reader_scrolls(browser, tmp_path):
    samples = [sample(f"p{i}", 0, "right", "x\n" * 50) for i in range(70)]
    browser.open(write_report(write_folder(tmp_path, samples)))
    browser.set("open", True)
    assert 20 <= len(browser.cards()) < 70
    assert browser.count() == "70 of 70 problems · 70 right"
    button = "document.querySelector('#more')"
    for _ in range(3):
        browser.js("scrollTo(0, document.body.scrollHeight)")
        browser.wait(f"{button}.hidden || {button}.getBoundingClientRect().top > innerHeight")
    browser.wait("document.querySelectorAll('article h2').length === 70")
    assert browser.js(f"{button}.hidden")
