"""The HTML report: text and maths to HTML, errors, and the page itself in headless Chromium."""

import json
import re
import shutil
import subprocess
import time
import urllib.request
from html.parser import HTMLParser

import pytest

from evals.report import render, render_answer, to_mathml, write_report

FIGURE = {"mean": 0.5, "low": 0.25, "high": 0.75}
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
HOSTILE = r"""<script>document.title = "hacked"</script><img src=x onerror='document.title = "hacked"'> </script> {"a": 1}
$\text{<img src=x onerror=alert(1)>}$ $\style{position:fixed}{x}$ \(a<b>c\) ]]> &lt; $$<svg onload=alert(1)>$$"""
HOSTILE += "\ud800\x00"  # half a character, as a cut response may end


def sample(problem: str, number: int, verdict: str, response: str, **changes) -> dict:
    """A line of samples.jsonl."""
    fields = {
        "set": "math500",
        "problem": problem,
        "sample": number,
        "seed": 7,
        "question": "What is $\\frac{1}{2}+1$?",
    }
    fields |= {
        "prompt": "<|im_start|>user",
        "answer": "\\frac{3}{2}",
        "response": response,
        "extracted": "2",
        "tokens": 99,
    }
    fields |= {
        "reward": 0.0,
        "correct": verdict == "right",
        "verdict": verdict,
        "finish_reason": "stop",
    }
    return fields | changes


def write_folder(folder, samples: list[dict], **changes):
    """Write what eval.py writes."""
    folder.mkdir(exist_ok=True)
    sets = {
        "math500": {"problems": 3, "samples": 2, "avg": FIGURE, "pass": {"1": FIGURE, "2": FIGURE | {"mean": 0.625}}}
        | {"maj": {"1": FIGURE, "2": FIGURE}, "truncated": 0.125, "boxed": 0.9, "timeouts": 0}
        | {"length_mean": 1234.4, "length_p95": 2345.6}
    }  # fmt: skip
    summary = {
        "config": {"model": "toy <1>", "samples": 2},
        "versions": {"torch": "2.13.0"},
        "sets": sets,
    }
    (folder / "summary.json").write_text(json.dumps(summary | changes, indent=1))
    (folder / "samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in samples))
    return folder


def some_samples() -> list[dict]:
    """Three problems of two sets: one that the samples agree on, one that they do not, and one that is hostile."""
    hostile = ("question", "prompt", "extracted")
    return [
        sample("math500-0", 0, "right", "so \\boxed{\\frac{3}{2}}"),
        sample("math500-0", 1, "wrong", "Perhaps \\[\\sum_{k=1}^n k\\]"),
        sample("math500-1", 0, "right", "easy"), sample("math500-1", 1, "right", "easy"),
        sample("gsm8k-0", 0, "cut", HOSTILE, set="gsm8k", answer=["7", HOSTILE], **dict.fromkeys(hostile, HOSTILE)),
        sample("gsm8k-0", 1, "no answer", "UPPER $5 and $6", set="gsm8k", extracted=None),
    ]  # fmt: skip


# ---- Text and maths
class Tags(HTMLParser):
    """Names and attributes of all tags in a piece of HTML."""

    def __init__(self, html: str):
        super().__init__()
        self.names, self.attributes = set(), set()
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}


def test_text_is_escaped_everywhere():
    for html in (
        render(HOSTILE),
        render_answer(HOSTILE),
        render_answer([HOSTILE, "7"]),
        to_mathml(HOSTILE),
    ):
        tags = Tags(html)
        assert not tags.names & {"script", "img", "svg"} and not tags.attributes & {
            "onerror",
            "onload",
            "style",
            "src",
        }
    assert render("a < b & \"c\"") == "a &lt; b &amp; &quot;c&quot;"  # fmt: skip


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
    html = render(f"before {text} after")
    assert html.startswith("before") and html.endswith("after") and html.count("<math") == 1
    assert re.search("<msup><mi>x</mi><m[nr]", html) and ('display="block"' in html) == (
        text[:2] in ("$$", r"\[", r"\b") and "boxed" not in text
    )


def test_boxes_are_marked_and_balanced():
    html = render(r"so \boxed{\left\{\frac{1}{\sqrt{2}}\right\}} and \boxed{3}")
    assert html.count('class="box"') == 2 and "<msqrt>" in html and "boxed" not in html
    assert "boxed{3" in render(r"\boxed{3")


def test_lines_of_a_formula_become_rows():
    assert to_mathml(r"a = b \\ c = d", True).count("<mtr>") == 2
    for name in ("align*", "aligned", "gathered", "eqnarray", "equation", "pmatrix", "dcases"):
        html = to_mathml(rf"\begin{{{name}}} a &= b \\ &= d \end{{{name}}}")
        assert html.count("<mtr>") == 2 and html.count("<mtd") >= 4, name


@pytest.mark.parametrize(
    "latex",
    [r"\frac{1}{", r"\foo{x}", r"\left( x", "x^", "x^2^3", r"\end{cases}", r"\def\a{\b\b}\a", r"\rule{9em}{9999em}",
     "{" * 999 + "}" * 999, "x" * 2001, r"\begin{matrix} a & b", r"\begin{foo} a \\ b \end{foo}"],
)  # fmt: skip
def test_what_cannot_be_converted_is_shown_as_source(latex):
    assert to_mathml(latex) == f"<code>{latex}</code>".replace("&", "&amp;")


def test_signs_and_bars_are_spaced_as_in_latex():
    assert to_mathml("f(-2)-1").count('form="prefix"') == 1 and 'form="prefix"' not in to_mathml(
        "(a)-1"
    )
    assert to_mathml("|a|").count('lspace="0" rspace="0"') == 2


def test_money_code_and_figures_are_no_maths():
    assert render("$5 and $6, or $7 more; \\$8 and \\$9") == "$5 and $6, or $7 more; \\$8 and \\$9"
    assert "<math" not in render("```\nx = '$a$'\n```") + render('[asy]\nlabel("$O$");\n[/asy]')


def test_long_hostile_texts_are_quick():
    began = time.perf_counter()
    for part in (
        "\\boxed{",
        "\\[",
        "$$ ",
        "$",
        "{",
        " ",
        "\\begin{align}",
        "```",
        "[asy]",
        "\n",
        "\\(",
        "$ a",
    ):
        render(part * 20_000)
        render("\\boxed{" + part * 20_000)
    assert time.perf_counter() - began < 20


def test_answers():
    assert render_answer(None) == "<i>none</i>" and ">Evelyn<" in render_answer("Evelyn")
    assert "<mfrac>" in render_answer(r"\frac{1}{2}")
    assert re.fullmatch(
        "<span.*>3</span> <i>or</i> <span.*<msqrt>.*</span>", render_answer(["3", r"\sqrt{4}"])
    )


# ---- Reading
def test_a_missing_file_is_named(tmp_path):
    folder = write_folder(tmp_path, some_samples())
    for name in ("summary.json", "samples.jsonl"):
        (folder / name).unlink()
        with pytest.raises(ValueError, match=f"{name} does not exist"):
            write_report(folder)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{'a': 1}", "not JSON"), (b"", "not JSON"), (b'{"a": 1,', "not JSON"), (b'"\xff"', "not JSON"),
        (b"[1]", "expected a JSON object"), (b"{}", "set is None"),
        (json.dumps(sample("p", 0, "maybe", "")).encode(), "'maybe'; expected one of right, "),
        (json.dumps(sample("p", 0, "right", None)).encode(), "response is None; expected .*str"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named(tmp_path, line, message):
    file = write_folder(tmp_path, some_samples()[:2]) / "samples.jsonl"
    file.write_bytes(file.read_bytes() + line + b"\n")
    with pytest.raises(ValueError, match=rf"samples\.jsonl, line 3: .*{message}"):
        write_report(tmp_path)


def test_a_bad_summary_is_named(tmp_path):
    write_folder(tmp_path, some_samples())
    (tmp_path / "summary.json").write_text('{"config": {},\n"sets": }')
    with pytest.raises(ValueError, match=r"summary\.json, line 2: not JSON"):
        write_report(tmp_path)
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match=r"summary\.json: sets is None; expected"):
        write_report(tmp_path)
    write_folder(tmp_path, [])
    with pytest.raises(ValueError, match=r"samples\.jsonl is empty"):
        write_report(tmp_path)


def test_the_page_holds_the_figures(tmp_path):
    page = write_report(write_folder(tmp_path, some_samples())).read_text()
    assert "Evaluation of toy &lt;1&gt;" in page and "3 × 2" in page and "2.13.0" in page
    assert (
        "pass@1" not in page
        and "62.5 <small>25.0 – 75.0</small>" in page
        and "1,234" in page
        and "12.5%" in page
    )
    assert page.count("<script") == 2 and not re.search("https?:", page)


# ---- The page in a browser
class Browser:
    """Chromium behind chromedriver, by plain HTTP (W3C WebDriver)."""

    def __init__(self, url: str, profile):
        options = {
            "args": [
                *FLAGS.split(),
                "--disable-component-update",
                "--disable-sync",
                f"--user-data-dir={profile}",
            ]
        }
        logs = {"browser": "ALL", "performance": "ALL"}
        capabilities = {
            "browserName": "chrome",
            "goog:chromeOptions": options,
            "goog:loggingPrefs": logs,
        }
        self.url = f"{url}/session"
        self.url += (
            "/" + self.call("", {"capabilities": {"alwaysMatch": capabilities}})["sessionId"]
        )

    def call(self, path: str, body: dict | None, method: str = "POST"):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, {"Content-Type": "application/json"}, method=method
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, path) -> None:
        """Open a page afresh, without the last one's logs, and wait for its first cards."""
        self.call("/url", {"url": "about:blank"})
        self.log("browser"), self.log("performance")
        self.call("/url", {"url": path.as_uri()})
        self.wait("document.querySelector('article h2')")

    def js(self, expression: str):
        return self.call("/execute/sync", {"script": f"return {expression}", "args": []})

    def wait(self, expression: str) -> None:
        deadline = time.monotonic() + 20
        while not self.js(f"!!({expression})"):
            assert time.monotonic() < deadline, f"never true: {expression}"
            time.sleep(0.05)

    def set(self, name: str, value) -> None:
        """Change a filter as a reader would, and wait until the cards are filled."""
        attribute = "checked" if isinstance(value, bool) else "value"
        self.js(f"((f = document.forms[0][{json.dumps(name)}]) => {{ f.{attribute} = {json.dumps(value)};"
                "f.dispatchEvent(new Event('input', {bubbles: true})) })()")  # fmt: skip
        self.wait("[...document.querySelectorAll('article')].every(a => a.children.length)")

    def press(self, key: str) -> None:
        keys = {
            "type": "key",
            "id": "keyboard",
            "actions": [{"type": kind, "value": key} for kind in ("keyDown", "keyUp")],
        }
        self.call("/actions", {"actions": [keys]})

    def log(self, kind: str) -> list[dict]:
        return self.call("/se/log", {"type": kind})

    def cards(self) -> list[str]:
        return self.js(
            "[...document.querySelectorAll('article h2')].map(h => h.firstChild.data.trim())"
        )

    def count(self) -> str:
        return self.js("document.querySelector('output').value")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    assert shutil.which("chromedriver"), (
        "these tests need Chromium: apt-get install chromium chromium-driver"
    )
    with subprocess.Popen(
        ["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True
    ) as driver:
        try:
            port = next(
                match[1]
                for line in driver.stdout
                if (match := re.search(r"successfully on port (\d+)", line))
            )
            browser = Browser(f"http://127.0.0.1:{port}", tmp_path_factory.mktemp("profile"))
            yield browser
            browser.call("", None, "DELETE")
        finally:
            driver.terminate()


@pytest.fixture
def page(browser, tmp_path):
    browser.open(write_report(write_folder(tmp_path, some_samples())))
    return browser


@pytest.mark.browser
def test_filters_and_counts(page):
    everything = ["math500-0", "math500-1", "gsm8k-0"]
    assert (
        page.cards() == everything
        and page.count() == "3 of 3 problems · 3 right · 1 wrong · 1 no answer · 1 cut"
    )
    page.set("verdict", "wrong")
    assert page.cards() == ["math500-0"] and page.count() == "1 of 3 problems · 1 right · 1 wrong"
    assert page.js("[...document.querySelectorAll('.sample')].map(s => s.open)") == [False, True]
    page.set("verdict", "no answer")
    assert page.cards() == ["gsm8k-0"]
    page.set("set", "math500")
    assert page.cards() == [] and page.count() == "0 of 3 problems"
    page.set("verdict", "")
    assert page.cards() == everything[:2]
    page.set("mixed", True)
    assert page.cards() == ["math500-0"]
    page.set("mixed", False)
    page.set("set", "")
    for text, expected in (("sum_{K", ["math500-0"]), ("upper $5", ["gsm8k-0"]), ("{3}{2}", everything[:2]),
                           ("frac{1}{2}+1", everything[:2]),
                           ("</script>", ["gsm8k-0"]), ("math500-1", ["math500-1"]), ("nowhere", [])):  # fmt: skip
        page.set("text", text)
        assert page.cards() == expected, text
    page.set("text", "")
    assert page.cards() == everything


@pytest.mark.browser
def test_maths_is_drawn(page):
    page.set("open", True)
    boxes = "[...document.querySelectorAll('math')].map(m => m.getBoundingClientRect()).map(b => [b.width, b.height])"
    assert len(page.js(boxes)) >= 8 and all(
        width > 4 and height > 4 for width, height in page.js(boxes)
    )
    top, bottom = page.js(
        "[...document.querySelector('mfrac').children].map(c => c.getBoundingClientRect().top)"
    )
    assert bottom > top + 4  # the denominator stands below the numerator
    assert page.js("getComputedStyle(document.querySelector('math .box')).borderTopWidth") != "0px"


@pytest.mark.browser
def test_nothing_is_loaded_run_or_complained_about(page):
    page.set("open", True)
    assert (
        page.js("document.title") == "Evaluation of toy <1>"
        and page.js("document.querySelectorAll('main :is(script, img, svg)').length") == 0
    )
    assert page.js(
        "document.querySelector('article:last-child .sample .text').textContent"
    ).startswith('<script>document.title = "hacked"')
    assert page.log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in page.log("performance")]
    urls = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert len(urls) == 1 and urls[0].startswith("file://") and urls[0].endswith("/report.html")
    page.js(
        "fetch('http://127.0.0.1:9/').catch(() => 0) && 0"
    )  # the control: the policy forbids it, and the log says so
    assert any("Content Security Policy" in entry["message"] for entry in page.log("browser"))


@pytest.mark.browser
def test_keyboard_reaches_everything(page):
    seen = []
    while not seen or not seen[-1].startswith("right sa"):
        page.press("\ue004")  # Tab
        seen.append(
            page.js("document.activeElement.name || document.activeElement.textContent.slice(0, 8)")
        )
        assert len(seen) < 20, seen
    assert seen[-7:-1] == [
        "Settings",
        "set",
        "verdict",
        "text",
        "mixed",
        "open",
    ]  # and no stop in the text between
    page.press("\ue007")  # Enter
    assert page.js("[...document.querySelectorAll('.sample')].map(s => s.open).slice(0, 2)") == [
        True,
        False,
    ]


@pytest.mark.browser
def test_light_and_dark(page):
    colours = []
    for scheme in ("light", "dark"):
        feature = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        page.call("/goog/cdp/execute", {"cmd": "Emulation.setEmulatedMedia", "params": feature})
        colours.append(
            page.js(
                "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
            )
        )
    (light_ink, light_back), (dark_ink, dark_back) = [
        [int(re.search(r"\d+", c)[0]) for c in pair] for pair in colours
    ]
    assert light_back - light_ink > 180 and dark_ink - dark_back > 150


@pytest.mark.browser
def test_cards_come_as_the_reader_scrolls(browser, tmp_path):
    browser.open(
        write_report(
            write_folder(tmp_path, [sample(f"p{i}", 0, "right", "x\n" * 50) for i in range(70)])
        )
    )
    browser.set("open", True)
    assert 20 <= len(browser.cards()) < 70 and browser.count() == "70 of 70 problems · 70 right"
    for _ in range(3):
        browser.js("scrollTo(0, document.body.scrollHeight)")
        browser.wait(
            "(more => more.hidden || more.getBoundingClientRect().top > innerHeight)(document.querySelector('#more'))"
        )
    browser.wait("document.querySelectorAll('article h2').length === 70")
    assert browser.js("document.querySelector('#more').hidden")
