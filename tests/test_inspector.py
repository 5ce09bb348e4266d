"""The inspector: what its page holds, and the page itself in Chromium."""

import json
import random
import re
import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import inspector
import rlfr
import train_rl
from infra import record
from infra.settings import change
from pages import describe
from pages.curves import write_run_report
from pages.rollouts import inspect_run, write_rollouts_page
from worlds import toy

MEASURES = ("flow reward", "deviation", "tap 1 (layer 1)", "tap 2 (layer 2)", "log-prob")
MEASURES += ("entropy", "advantage", "advantage − outcome", "ratio")
HOSTILE = '<script>document.title = "hacked"</script><img src=x onerror=alert(1)>\ud800\x00'
READY = "document.querySelector('article .t')"


def one_record(group: int, sample: int, tokens: list[str], **changes) -> dict:
    """A record of two taps, whose numbers follow from their place."""
    n = len(tokens)
    flow_reward = [-0.001 * (k % 3) for k in range(n)]
    record = {
        "step": 1,
        "group": group,
        "sample": sample,
        "problem": f"p{group}",
        "question": "1 +1>",
        "answer": "2",
        "prompt": "1 +1>",
        "images": [],
        "response": "".join(tokens),
        "finish_reason": "stop",
        "reward": float(sample % 2),
        "parts": {"binary": float(sample % 2)},
        "correct": sample % 2 == 1,
        "verdict": "right" if sample % 2 else "wrong",
        "extracted": "2",
        "text": "",
        "outcome": 0.5 - 0.5 * sample,
        "taps": [1, 2],
        "token_ids": list(range(n)),
        "tokens": tokens,
        "logp": [-0.1 * k for k in range(n)],
        "entropy": [0.2 * k for k in range(n)],
        "dense": "flow",
        "dense_reward": flow_reward,
        "advantage": [1.0 - 0.5 * sample] * n,
        "ratio": [1.0] * n,
        "dense_score": [[1.0 + k for k in range(n)], [3.0 + k for k in range(n)]],
    }
    return record | changes


def some_records() -> list[dict]:
    """Two problems with three responses each."""
    records = []
    for group in range(2):
        for sample in range(3):
            tokens = ["a", " b", "\n", "a", "", "é"][: 4 + sample]
            records.append(one_record(group, sample, tokens))
    return records


def write(path: Path, steps: dict[int, list[dict]], max_bytes: float = 3e6) -> Path:
    page = path / "rollouts.html"
    return write_rollouts_page(page, "Rollouts of a & b", steps, max_bytes=max_bytes)


# ---- The file
def test_the_page_is_one_file_that_asks_nobody(tmp_path):
    page = write(tmp_path, {1: some_records()}).read_text()
    assert "<title>Rollouts of a &amp; b</title>" in page
    assert page.count("<script") == 2
    assert not re.search("https?:", page)
    assert "Recorded steps: 1; problems in each: 2." in page


def test_what_does_not_fit_is_left_out_and_said(tmp_path):
    """Groups first, then steps; the first step and the last one stay."""
    steps = {step: some_records() for step in range(1, 42, 10)}
    whole = write(tmp_path, steps).stat().st_size
    empty = write(tmp_path, steps, 0).stat().st_size
    page = write(tmp_path, steps, 0).read_text()
    assert "Recorded steps: 5, of which 2 are here; problems in each: 2, of which 1 are" in page
    assert '"step": 1,' in page and '"step": 41,' in page and '"step": 11,' not in page
    page = write(tmp_path, steps, (whole - empty) * 0.65).read_text()
    assert "Recorded steps: 5, of which 5 are here; problems in each: 2, of which 1 are" in page


def test_steps_of_several_sizes_are_counted(tmp_path):
    """Regression: the largest number of problems was said of each step."""
    steps = {1: some_records()[:3], 11: some_records(), 21: some_records()[:3]}
    page = write(tmp_path, steps).read_text()
    assert "Recorded steps: 3; problems in each: 1 to 2." in page


@pytest.mark.parametrize(
    ("question", "is_said"),
    [
        (toy.make_problem(random.Random(0)), True),
        (f"<image>{toy.QUESTION}", True),
        ("What is 7 +5?", False),
    ],
)
def test_the_page_says_what_the_arithmetic_of_an_embedded_world_is(tmp_path, question, is_said):
    page = write(tmp_path, {1: [one_record(0, 0, ["a"], question=question)]}).read_text()
    said = "Problems are calculated from left to right, modulo 10: 6+7=3."
    assert (said in page) == is_said


def falling(n_steps: int, rewards: dict[int, float]) -> list[dict[str, float]]:
    """Figures of a run whose mean reward is 0.5 but at the given steps."""
    return [{"step": step, "reward": rewards.get(step, 0.5)} for step in range(1, n_steps + 1)]


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        (
            0.3,
            "<b>The reward fell</b> at step {} (0.30): the mean reward of such a step lies more than 0.15 "
            "below the mean of the 3 or of the 10 steps before it.",
        ),
        (
            0.38,
            "<b>The reward fell most</b> at step {} (0.38): 0.12 below the mean of the 3 or of the 10 steps before it.",
        ),
    ],
)
def test_a_step_at_which_the_reward_fell_stays(tmp_path, reward, said):
    """With the one before. Also where it fell by less than makes a fall: the deepest one is named."""
    steps = {step: some_records() for step in (1, 11, 16, 17, 21, 31, 41)}
    metrics = falling(41, {17: reward})
    page = write_rollouts_page(tmp_path / "page.html", "a", steps, metrics, max_bytes=0)
    kept = re.findall(r'"step": (\d+),', page.read_text())
    assert kept == ["1", "16", "17", "41"]
    assert said.format("<a href=#step=17>17</a>") in page.read_text()
    assert "The best step before step 17 was <a href=#step=16>16</a> (0.50)." in page.read_text()


def test_a_run_that_never_fell_says_nothing_of_it(tmp_path):
    for metrics in ([], falling(3, {3: 0.0}), falling(30, {}), falling(30, {20: 0.495})):
        page = write_rollouts_page(tmp_path / "page.html", "a", {1: some_records()}, metrics)
        assert "The reward fell" not in page.read_text()


def test_a_page_of_long_responses_is_small(tmp_path):
    """16 responses of 256 tokens, with random numbers everywhere."""
    rng = random.Random(0)

    def numbers() -> list[float]:
        return describe.shorten([rng.random() for _ in range(256)])

    records = []
    for sample in range(16):
        words = [f" w{rng.randrange(1000)}" for _ in range(256)]
        columns = ("logp", "entropy", "dense_reward", "advantage", "ratio")
        values = {name: numbers() for name in columns}
        deviation = [numbers(), numbers(), numbers()]
        records.append(one_record(0, sample, words, dense_score=deviation, **values))
    page = write(tmp_path, {1: records})
    assert "Recorded steps: 1; problems in each: 1." in page.read_text(), "nothing is left out"
    assert page.stat().st_size < 3e6


def test_a_folder_without_rollouts_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["inspector.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="1"):
        inspector.main()
    said = capsys.readouterr().err
    assert "has no rollouts/step-N.jsonl; expected the folder of a" in said


MAHALANOBIS = str(Path(__file__).parents[1] / "study" / "rewards" / "mahalanobis.py")


@pytest.mark.parametrize("shaping", ["flow", "none", MAHALANOBIS])
def test_any_model_flow_and_problems(world, flow_folder, tmp_path, shaping):
    """Sampled and scored, but nothing learnt; the same again from the folder."""
    of_experts = (f"experts={world.path('expert.jsonl')}", "held_out=16")
    config = change(
        inspector.Config(),
        model=world.path("model"),
        data=world.path("test.jsonl"),
        shaping=shaping,
        flow=flow_folder if shaping == "flow" else None,
        dense=of_experts if shaping == MAHALANOBIS else (),
        template="none",
        prompts=2,
        group_size=3,
        max_tokens=8,
        max_prompt_tokens=64,
        folder=str(tmp_path / "look"),
    )
    inspector.sample_and_inspect(config)
    records = record.read(record.need_files(config.folder)[1])
    assert [(one["group"], one["sample"]) for one in records] == [
        (group, sample) for group in range(2) for sample in range(3)
    ]
    name = None if shaping == "none" else Path(shaping).stem
    for one in records:
        assert one["dense"] == name and len(one["taps"]) == (3 if name else 0)
        assert all(any(of_tap) for of_tap in one["dense_score"])
    # regression: without a flow they were 0
    assert all(all(one["logp"]) and all(one["entropy"]) for one in records)
    page = (tmp_path / "look" / "rollouts.html").read_text()
    assert inspect_run(config.folder).read_text() == page
    assert squeezed(f'"dense": {json.dumps(name)}, "taps": {records[0]["taps"]}') in squeezed(page)
    assert not (tmp_path / "look" / "policy").exists()


def squeezed(text: str) -> str:
    """Return a text without its spaces."""
    return text.replace(" ", "")


# ---- The page in a browser
def facts(browser) -> dict[str, str]:
    """What the foot of the window says of a token, by name."""
    pairs = browser.js(
        "[...document.querySelectorAll('#facts div')]"
        ".map(d => [d.children[0].textContent, d.children[1].textContent])"
    )
    return dict(pairs)


def number(text: str) -> float | None:
    return None if text == "–" else float(text.replace("−", "-"))


def token(sample: int, place: int) -> str:
    return f"document.querySelectorAll('.text[data-sample]')[{sample}].children[{place}]"


def table(browser, name: str) -> list[list[str]]:
    """The cells of a table, without its head."""
    rows = browser.js(
        f"[...document.querySelectorAll('#{name} tr')]"
        ".map(r => [...r.children].map(c => c.textContent))"
    )
    return rows[1:]


def shown(browser) -> list[str]:
    return browser.js("[...document.querySelectorAll('article h2')].map(h => h.textContent)")


def colours(browser) -> list[str]:
    """Hue and strength of the first response's tokens."""
    return browser.js(
        "[...document.querySelectorAll('.text[data-sample]')[0].children]"
        ".map(t => t.className.replace('t ', '') + ' ' + t.style.getPropertyValue('--s'))"
    )


@pytest.fixture
def page(browser, tmp_path):
    steps = {1: some_records(), 11: some_records()[:3]}
    for one in steps[11]:
        one["entropy"] = [7.0] * len(one["tokens"])
    browser.open(write(tmp_path, steps), READY)
    return browser


@pytest.mark.browser
def test_values_of_a_token(page):
    page.js(f"{token(1, 3)}.focus()")
    found = facts(page)
    assert found["token"] == "a"
    assert found["place"] == "4 of 5, sample 1"
    expected = {
        "flow reward": 0,
        "deviation": 5,
        "tap 1 (layer 1)": 4,
        "tap 2 (layer 2)": 6,
        "log-prob": -0.3,
        "entropy": 0.6,
        "advantage": 0.5,
        "advantage − outcome": 0.5,
        "ratio": 1,
    }
    assert {name: number(found[name]) for name in expected} == pytest.approx(expected)
    page.js(f"{token(2, 4)}.dispatchEvent(new Event('pointerover', {{bubbles: true}}))")
    assert facts(page)["token"] == "◌"
    assert facts(page)["id"] == "4"


@pytest.mark.browser
@pytest.mark.parametrize(("name", "taps"), [("ridge", [1, 2]), ("ngram", []), (None, [])])
def test_a_dense_reward_is_shown_by_its_name_and_tap(browser, tmp_path, name, taps):
    """One that reads no latents has a score and no taps; without one the page has neither."""
    scores = [[1.0, 2.0]] * max(1, len(taps)) if name else []
    record = one_record(0, 0, ["a", "b"], dense=name, taps=taps, dense_score=scores)
    browser.open(write(tmp_path, {1: [record]}), READY)
    browser.js(f"{token(0, 1)}.focus()")
    found = facts(browser)
    named = {key for key in found if key.endswith(("reward", "score")) or key.startswith("tap")}
    expected = {f"{name} reward", f"{name} score"} if name else set()
    assert named == expected | {f"tap {layer} (layer {layer})" for layer in taps}
    if name:
        assert number(found[f"{name} score"]) == 2
        assert f"{name} reward a response" in browser.js("document.body.textContent")


@pytest.mark.browser
def test_every_colour(page):
    """Strengths go from the weakest to the strongest, and the legend has the ends."""
    seen = {}
    for name in MEASURES:
        page.js(f"document.querySelector('[name=colour][value=\"{name}\"]').click()")
        seen[name] = colours(page)
        assert page.js("document.forms[0].colour.value") == name
    assert seen["flow reward"] == ["high 0.000", "low 0.500", "low 1.000", "high 0.000"]
    assert seen["deviation"][0] == "only 0.000"
    assert seen["log-prob"][:2] == ["only 0.000", "only 0.200"]
    assert seen["entropy"][:2] == ["only 0.000", "only 0.200"]
    assert seen["advantage"] == ["high 1.000"] * 4
    assert seen["ratio"] == ["0.000"] * 4 or seen["ratio"] == ["t 0.000"] * 4
    page.js("document.querySelector('[name=colour][value=\"log-prob\"]').click()")
    ends = [page.js(f"document.getElementById('{end}').textContent") for end in ("low", "high")]
    assert [number(end) for end in ends] == [0, -0.5]


@pytest.mark.browser
def test_step_problem_and_verdict(page):
    assert len(shown(page)) == 3
    assert shown(page)[1] == (
        "sample 1right2outcome reward 1 · 5 tokens · advantage 0.5 (outcome 0) · "
        "flow reward −0.004, −0.0008 a token"
    )
    page.set_plain("verdict", "right")
    assert [text[:8] for text in shown(page)] == ["sample 1"]
    page.set_plain("verdict", "wrong")
    assert [text[:8] for text in shown(page)] == ["sample 0", "sample 2"]
    assert page.js("document.getElementById('count').value") == "2 of 3 responses shown · 1 right"
    page.set_plain("verdict", "")
    page.js("document.forms[0].group.selectedIndex = 1")
    page.js("document.forms[0].group.dispatchEvent(new Event('input', {bubbles: true}))")
    assert page.js("document.querySelector('#problem h2').textContent").startswith("Problem p1")
    page.set_plain("step", "1")
    page.wait("document.getElementById('now').value === '11 · 2 of 2 on this page'")
    page.js(f"{token(0, 0)}.focus()")
    assert number(facts(page)["entropy"]) == 7
    assert page.js("document.forms[0].group.options.length") == 1


@pytest.mark.browser
def test_the_place_where_a_wrong_response_leaves_the_right_ones(browser, tmp_path):
    """Of two right responses the one that it follows longer counts."""
    texts = ["abx!", "ab!", "a?", "xyz"]
    records = []
    for sample, text in enumerate(texts):
        is_right = sample < 2
        records.append(one_record(0, sample, list(text), correct=is_right))
    records.append(one_record(0, 4, list("ab"), correct=False))  # a right one goes on from it
    browser.open(write(tmp_path, {1: records}), READY)
    marked = "[...document.querySelectorAll('.leaves')].map(t => [t.textContent, t.place])"
    assert browser.js(marked) == [["?", 1], ["x", 0]]
    assert "leaves the right ones at token 2: ? for b" in shown(browser)[2]
    assert "leaves the right ones at token 1: x for a" in shown(browser)[3]
    assert "leaves" not in shown(browser)[4]
    titles = browser.js("[...document.querySelectorAll('.leaves')].map(t => t.title)")
    assert titles == [f"Here it leaves the right ones: there {x} is written" for x in "ba"]


@pytest.mark.browser
def test_what_several_right_responses_have_at_that_place(browser, tmp_path):
    """By frequency, of those that have the same tokens before."""
    records = []
    for sample, text in enumerate(["ab!", "ac!", "ab.", "ad", "ae", "a", "x"]):
        records.append(one_record(0, sample, list(text), correct=True))
    records.append(one_record(0, 7, list("az"), correct=False))
    browser.open(write(tmp_path, {1: records}), READY)
    assert (
        "leaves the right ones at token 2: z for b (2 of 6), c (1 of 6), d (1 of 6), …"
        in (shown(browser)[7])
    )


def causes(browser) -> list[list[str]]:
    return table(browser, "causes")


@pytest.mark.browser
def test_the_causes_of_a_step_are_summed(browser, tmp_path):
    """Over all its problems, the most frequent one first; the page opens on a problem that has it."""

    def spelled(group: int, sample: int, text: str, **changes) -> dict:
        rewards = {"dense_reward": [0.0] * len(text)} | changes
        return one_record(group, sample, list(text), correct=text.endswith("=0"), **rewards)

    six = {"solution": "6-6=0"}
    records = [
        spelled(0, 0, "6-6=0", **six),
        spelled(0, 1, "6+6=2", **six),
        spelled(1, 0, "6-6=0", **six),
        spelled(1, 1, "6-6=9", dense_reward=[0.0] * 4 + [-0.1], **six),
        spelled(1, 2, "6-6=9!", **six),
        # in the same way, more often, where nothing is right
        *(spelled(2, sample, "5-5=9", solution="5-5=0") for sample in range(3)),
        spelled(3, 0, "1-1=0", solution="1-1=0"),
        spelled(3, 1, "1-1"),  # it ends amid the right one
        spelled(3, 2, "1-1=0, so"),
    ]
    browser.open(write(tmp_path, {1: records}), READY)
    assert causes(browser) == [
        ["5-5=99 instead of 0: 5 responses, 3 of them after 5-5=", "5-5=0", "5", "2", "1"],
        ["6+6=2", "6-6=0", "1", "1", "0"],
        ["-1=0, so", "-1=0 the end", "1", "1", "0"],
    ]
    said = browser.js("document.querySelector('#causes p').textContent")
    assert said.startswith(
        "Problems: 4. Responses: 11, not right: 8. 7 of these leave the solution of their problem."
    )
    assert browser.js("document.querySelector('#problem h2').textContent").startswith("Problem p1")
    browser.js("document.querySelectorAll('#causes button')[1].click()")
    assert browser.js("document.querySelector('#problem h2').textContent").startswith("Problem p0")
    assert facts(browser)["token"] == "+" and facts(browser)["place"] == "2 of 5, sample 1"
    assert browser.log("browser") == []


@pytest.mark.browser
def test_causes_beyond_the_most_frequent_are_counted(browser, tmp_path):
    records = [one_record(0, 0, ["a"], correct=True)]
    records += [one_record(0, 1 + i, [x], correct=False) for i, x in enumerate("bcdefghi")]
    browser.open(write(tmp_path, {1: records}), READY)
    assert len(causes(browser)) == 6
    text = "document.getElementById('causes').textContent"
    assert "Not shown: 2 other differences, none of them more frequent." in browser.js(text)


@pytest.mark.browser
def test_a_step_without_anything_to_compare_says_so(browser, tmp_path):
    records = [one_record(0, sample, ["a"], correct=False) for sample in range(2)]
    browser.open(write(tmp_path, {1: records}), READY)
    assert browser.js("document.querySelector('#causes p').textContent") == (
        "Problems: 1. Responses: 2, not right: 2. There is nothing that they could be compared with."
    )
    assert causes(browser) == []


@pytest.mark.browser
def test_right_responses_are_counted_by_length(browser, tmp_path):
    """Of the problem and of the response, in four parts, fewer where lengths are equal."""
    records = []
    for group, n in enumerate((1, 2, 3, 4, 5)):
        for sample in range(2):
            question = "q" * (5 if group < 2 else 9)
            is_right = sample == 0 or group < 2
            records.append(
                one_record(group, sample, ["a"] * n, question=question, correct=is_right)
            )
    browser.open(write(tmp_path, {1: records}), READY)
    assert table(browser, "lengths") == [
        ["problem of 5 characters", "4", "0"],
        ["problem of 9 characters", "3", "3"],
        ["response of 1 to 2 tokens", "4", "0"],
        ["response of 3 tokens", "1", "1"],
        ["response of 4 tokens", "1", "1"],
        ["response of 5 tokens", "1", "1"],
    ]


def solved(sample: int, text: str, answer: str = "4", **changes) -> dict:
    """A record of a problem whose solution is `1+1=2,2*2=4. 4`."""
    right = {"answer": "4", "solution": "1+1=2,2*2=4. 4", "extracted": answer}
    own = {"correct": answer == "4", "reward": float(answer == "4")}
    return one_record(0, sample, [*text, "<end>"], **right, **own, **changes)


MARKED = "[...document.querySelectorAll('.leaves')].map(t => [t.textContent, t.place, t.title])"


@pytest.mark.browser
@pytest.mark.parametrize("writes_solutions", [True, False])
def test_the_place_where_a_response_leaves_the_solution(browser, tmp_path, writes_solutions):
    """Where no response is right; the policy must write as the data's solutions do."""
    records = [solved(sample, "1+1=2,2+2=4. 5", "5") for sample in range(2)]
    if writes_solutions:
        records.append(solved(0, "1+1=2,2*2=4. 4") | {"group": 1})
    else:
        records.append(solved(0, "It is 4") | {"group": 1})
    browser.open(write(tmp_path, {1: records}), READY)
    browser.set_plain("group", browser.js("document.forms[0].group.options[0].value"))
    expected = (
        [["+", 7, "Here it leaves the solution: there * is written"]] * 2
        if writes_solutions
        else []
    )
    assert browser.js(MARKED) == expected
    said = browser.js("document.querySelector('#problem p').textContent")
    assert said.startswith(
        "Answers given: 5 (2 of 2). All rewards are equal, so that the outcome gives no advantage here."
    )
    assert browser.js("document.querySelector('#problem details').open"), "the solution is shown"


@pytest.mark.browser
def test_a_right_answer_that_comes_from_a_wrong_step_is_no_measure(browser, tmp_path):
    """Regression: a wrong response was boxed where it calculated rightly and a lucky one did not."""
    records = [
        solved(0, "1+1=2,2*2=4. 4"),
        solved(1, "1+1=3,2*2=4. 4"),
        solved(2, "1+1=3,2*2=5. 5", "5"),
    ]
    browser.open(write(tmp_path, {1: records}), READY)
    title = "Here it leaves the solution: there 2 is written"
    assert browser.js(MARKED) == [["3", 4, title]]
    assert causes(browser)[0][:2] == ["1+1=3,2*2", "1+1=2,2*2"]
    assert ["as in the solution", "1", "0"] in table(browser, "outcomes")
    heads = [text for text in shown(browser) if "a right answer, but not the steps" in text]
    assert [head[:8] for head in heads] == ["sample 1"]


@pytest.mark.browser
def test_a_step_with_harder_problems_says_what_they_cost(browser, tmp_path):
    """With the shares of the step before: all of the short ones and a quarter of the long ones."""

    def step(n_short: int, n_right: int) -> list[dict]:
        records = []
        for sample in range(8):
            is_right = sample < n_right
            group, question = (0, "1+1>") if sample < n_short else (1, "1+1+1+1>")
            records.append(one_record(group, sample, ["a"], question=question, correct=is_right))
        return records

    browser.open(write(tmp_path, {1: step(4, 5), 2: step(2, 3)}), READY)
    mix = "document.getElementById('mix').textContent"
    assert browser.js(mix) == "", "there is no step before it"
    browser.set_plain("step", "1")
    browser.wait(f"{mix} !== ''")
    assert browser.js(mix) == (
        "Right in step 1: 63 %, and here 38 %. With its shares for each length of a problem, this step would have "
        "44 %: so far the lengths of the problems explain the change. The rest is the policy, or harder problems of equal length."
    )
    assert table(browser, "lengths")[0] == ["problem of 4 characters", "2", "0", "100 %"]


@pytest.mark.browser
def test_a_page_opens_on_a_fall_and_on_a_problem_that_shows_something(browser, tmp_path):
    """On one with right and wrong responses; regression: on one with the fewest right ones."""
    all_right, few_wrong, many_wrong, none = ([1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0])
    records = []
    for group, outcomes in enumerate((all_right, few_wrong, many_wrong, none)):
        for sample, is_right in enumerate(outcomes):
            text = ["a"] if is_right else ["b"]
            records.append(one_record(group, sample, text, correct=bool(is_right)))
    page = tmp_path / "rollouts.html"
    steps = {1: records[:6], 14: records, 15: records[3:6]}
    write_rollouts_page(page, "Rollouts", steps, falling(15, {14: 0.0}))
    browser.open(page, READY)
    now = "document.getElementById('now').value === '{}'"
    shown_problem = "document.querySelector('#problem h2').textContent.slice(0, 10)"
    assert browser.js(now.format("14 · reward 0.00 · 2 of 3 on this page"))
    assert browser.js(shown_problem) == "Problem p2"
    browser.set_plain("step", "0")
    browser.wait(now.format("1 · reward 0.50 · 1 of 3 on this page"))
    assert browser.js(shown_problem) == "Problem p1"


@pytest.mark.browser
def test_the_verdict_on_the_dense_reward(browser, tmp_path):
    """Of three places where wrong responses leave the right one it penalises two."""
    records = [
        one_record(0, 0, list("abc"), correct=True, dense_reward=[0.0, 0.0, -0.01]),
        one_record(0, 1, list("axc"), correct=False, dense_reward=[0.0, -0.02, 0.0]),
        one_record(0, 2, list("aby"), correct=False, dense_reward=[-0.03, 0.0, 0.0]),
        # a right response that is better off as it is short, and wrong ones that are nowhere compared
        one_record(1, 0, ["a"], correct=True, dense_reward=[-0.02]),
        one_record(1, 1, list("xbc"), correct=False, dense_reward=[-0.01, -0.02, -0.01]),
        one_record(2, 0, ["x"], correct=False, dense_reward=[0.0]),
    ]
    browser.open(write(tmp_path, {1: records}), READY)
    assert browser.js("document.getElementById('verdict').textContent") == (
        "Within a problem: the right responses get more flow reward than the wrong ones in 2 of 2 problems that have "
        "both, summed over tokens, and in 1 as a mean of tokens; half would be chance. It penalises 2 of 3 framed "
        "tokens, at which wrong responses leave the right ones: 67 %. Of all tokens of wrong responses it penalises "
        "50 %, of right ones 50 %. Of its penalties 29 % are on c, the most."
    )


@pytest.mark.browser
def test_the_pages_of_the_recorded_run_say_where_and_why_it_fell(browser, tmp_path):
    """Exercise 10's run, from its report: the step, the cause, and whether the reward saw it."""
    run = tmp_path / "recorded"
    shutil.copytree(ROOT / "course" / "exercises" / "recorded", run)
    inspect_run(run)
    browser.open(write_run_report([run], run / "report.html"), "document.querySelector('svg')")
    link = "document.querySelector('b + a')"
    said = browser.js("document.querySelector('p').textContent")
    assert "The reward fell at step 14 (0.60):" in said, "regression: it fell most, but not enough"
    assert "The best step before step 14 was 13 (0.89)." in said
    assert browser.js(f"{link}.textContent") == "14"
    browser.js(f"{link}.click()")
    browser.wait(READY)
    problem = browser.js("document.getElementById('problem').textContent")
    assert "7 +9 +4 -3 -3 -8 +5 *2 +7>" in problem and "right answer 9" in problem
    assert "Answers given: 0 (7 of 8), 7 (1 of 8). All rewards are equal" in problem
    assert "The flow reward penalises 1 of 8 framed tokens." in problem
    assert "6+5=1,1*2=2,2+7=9" in problem, "the solution"
    places = [place for text, place, _ in browser.js(MARKED) if text == "+"]
    assert len(places) == 7, "1+2=3, where the problem says *2"
    assert causes(browser)[0] == ["=1,1+2=3,", "=1,1*2=2,", "7", "1", "0"]
    for sample in (0, 1):
        text = browser.js(f"document.querySelectorAll('.text[data-sample]')[{sample}].textContent")
        assert text[places[0] - 1 :].startswith("1+2=3,3+7=0")
    assert "of 17 framed tokens" in browser.js("document.getElementById('verdict').textContent")


@pytest.mark.browser
def test_the_address_names_a_step(browser, tmp_path):
    """The nearest one that is here is shown, which the page says; a link and the slider change both."""
    steps = {step: [one_record(0, 0, [f"s{step}"], step=step)] for step in (1, 11, 21)}
    page = tmp_path / "rollouts.html"
    write_rollouts_page(page, "Rollouts", steps, falling(21, {11: 0.0, 15: 0.0}))
    shows = "document.querySelector('article .t')?.textContent === '{}'"
    said = "document.querySelector('#nearest:not([hidden])')?.textContent"
    browser.open(page, shows.format("s11"))
    links = "[...document.querySelectorAll('p a')].map(a => a.textContent)"
    assert browser.js(links) == ["11", "1"], (
        "the fall that is recorded, and the last step before it"
    )
    browser.js("document.querySelectorAll('p a')[1].click()")
    browser.wait(shows.format("s1"))
    assert browser.js(said) is None
    browser.js("location.hash = '#step=17'")
    browser.wait(shows.format("s21"))
    browser.wait("location.hash === '#step=21'")
    assert browser.js(said) == (
        "Step 17 is not on this page. This is step 21, the nearest that is."
    )
    browser.set_plain("step", "0")
    browser.wait("location.hash === '#step=1'")
    assert browser.js(said) is None
    assert browser.log("browser") == []


@pytest.mark.browser
def test_right_against_not_right(page):
    cells = {name: (number(right), number(other)) for name, right, other in table(page, "outcomes")}
    assert cells["responses"] == (2, 4)
    assert cells["tokens a response"] == (5, 5)
    assert cells["deviation"] == (4, 4.1)
    assert cells["flow reward a response"] == pytest.approx((-0.004, -0.0045))


@pytest.mark.browser
def test_the_table_of_tokens_is_a_recount_and_filters(page):
    counts: dict[str, list] = {}
    for one in some_records():
        for k, text in enumerate(one["tokens"]):
            mean = (one["dense_score"][0][k] + one["dense_score"][1][k]) / 2
            counts.setdefault(text, []).append((one["dense_reward"][k], mean))
    signs = {"◌": "", "↵": "\n", "␣b": " b"}
    found = table(page, "tokens")
    assert [signs.get(row[0], row[0]) for row in found] == ["\n", " b", "é", "", "a"]
    for name, n, share, reward, deviation in found:
        entries = counts.pop(signs.get(name, name))
        rewards = [each for each, _ in entries]
        assert int(n) == len(entries)
        assert share == f"{100 * sum(r != 0 for r in rewards) / len(rewards):.0f} %"
        assert number(reward) == pytest.approx(sum(rewards) / len(rewards), abs=1e-6)
        assert number(deviation) == pytest.approx(sum(d for _, d in entries) / len(entries))
    assert not counts
    page.js("document.querySelector('[name=order][value=rewarded]').click()")
    assert [row[0] for row in table(page, "tokens")] == ["a", "◌", "é", "␣b", "↵"]
    page.js("[...document.querySelectorAll('#tokens button')][2].click()")
    assert [text[:8] for text in shown(page)] == ["sample 2"]
    assert page.js("document.querySelectorAll('.marked').length") == 1
    assert page.js("document.activeElement.textContent") == "é"
    page.js("document.getElementById('unmark').click()")
    assert len(shown(page)) == 3
    assert page.js("document.querySelectorAll('.marked').length") == 0


@pytest.mark.browser
def test_keyboard(page):
    page.js(f"{token(0, 0)}.focus()")
    keys = {"right": "\ue014", "left": "\ue012", "down": "\ue015", "up": "\ue013", "end": "\ue010"}
    place = {
        "right": "2 of 4, sample 0",
        "down": "2 of 5, sample 1",
        "end": "5 of 5, sample 1",
        "left": "4 of 5, sample 1",
        "up": "4 of 4, sample 0",
    }
    for key, expected in place.items():
        page.press(keys[key])
        assert facts(page)["place"] == expected, key
    page.press("\ue00c")  # Escape
    assert not page.js("document.getElementById('facts').open")
    page.press("\ue004")  # Tab: a response is one stop
    assert facts(page)["place"] == "1 of 5, sample 1"


@pytest.mark.browser
def test_hostile_texts_change_nothing_but_their_row(browser, tmp_path):
    records = some_records()
    texts = [HOSTILE, "</script>", "سلام", "\u202e", '{"a": 1}', "&lt;"]
    hostile = {"question": HOSTILE, "prompt": HOSTILE, "extracted": HOSTILE, "text": HOSTILE}
    many = ["<b>"] * 100_000
    records[0] = one_record(0, 0, texts, verdict='" onload="x', **hostile)
    records[2] = one_record(0, 2, many)
    path = write(tmp_path, {1: records})
    browser.open(path, READY)
    assert browser.js("document.title") == "Rollouts of a & b"
    assert (
        browser.js("document.querySelectorAll(':is(main, aside) :is(script, img, svg)').length")
        == 0
    )
    text = browser.js(f"{token(0, 0)}.textContent")
    assert text.startswith('<script>document.title = "hacked"</script>')
    assert browser.js(f"{token(0, 1)}.textContent") == "</script>"
    heights = browser.js("[...document.querySelectorAll('article')].map(a => a.offsetHeight)")
    assert max(heights) < 700
    assert browser.js(f"{token(2, 0)}.parentElement.children.length") == 3000
    browser.js("document.querySelector('article > button').click()")
    assert browser.js(f"{token(2, 0)}.parentElement.children.length") == 6000
    assert browser.log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.log("performance")]
    urls = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert urls == [path.as_uri()]


@pytest.mark.browser
def test_tokens_of_a_real_tokenizer(browser, tmp_path, merging_tokenizer):
    """Parts of words and of characters, and text from right to left: as the tokenizer decodes it."""
    texts = ["  the\n\n policy\t", " 😁 日本語 naïve", "سلام, the עולם", "cut \u200b😁"]
    records = []
    for sample, text in enumerate(texts):
        ids = merging_tokenizer.encode(text, add_special_tokens=False)
        if sample == 3:
            ids = ids[:-1]  # amid a character
        tokens = describe.token_texts(merging_tokenizer, ids)
        records.append(one_record(0, sample, tokens, token_ids=ids))
    browser.open(write(tmp_path, {1: records}), READY)
    shown = browser.js(
        "[...document.querySelectorAll('.text[data-sample]')].map(text => "
        "[...text.children].map(token => token.textContent))"
    )
    for one, tokens in zip(records, shown, strict=True):
        plain = [token.replace("↵\n", "\n").replace("⇥\t", "\t") for token in tokens]
        assert plain == one["tokens"]
        decoded = merging_tokenizer.decode(one["token_ids"], clean_up_tokenization_spaces=False)
        assert "".join(plain) == decoded
    assert shown[3][-1] == describe.BROKEN
    first = "document.querySelectorAll('.text[data-sample]')[0].firstChild"
    assert browser.js(f"{first}.dataset.spaces") == "·" * len(records[0]["tokens"][0])
    widths = browser.js("[...document.querySelectorAll('.t')].map(t => t.offsetWidth)")
    assert min(widths) > 2, "each token can be pointed at"
    assert browser.log("browser") == []


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_the_window(page, width, scheme):
    feature = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    page.cdp("Emulation.setEmulatedMedia", feature)
    page.cdp("Emulation.setDeviceMetricsOverride", size)
    try:
        assert page.js("document.documentElement.scrollWidth") <= width
        widths = page.js("[...document.querySelectorAll('article')].map(a => a.offsetWidth)")
        assert max(widths) < width
        page.js(f"{token(0, 0)}.focus()")
        assert page.js("document.getElementById('facts').getBoundingClientRect().height") < 250
    finally:
        page.cdp("Emulation.clearDeviceMetricsOverride", {})
    assert page.log("browser") == []


@pytest.mark.browser
def test_the_page_shows_the_tensors_of_the_step(browser, config, seen):
    """From a run of training to what a reader reads, every token of two responses."""
    train_rl.main(change(config, steps=1))
    experience, advantage, flow_reward = seen[0]
    outcome = rlfr.outcome_advantage(experience.reward, 4, "grpo")
    episodes = experience.episodes
    browser.open(inspect_run(config.folder), READY)
    for sample in range(2):
        for k in range(len(episodes[sample].response_ids)):
            browser.js(f"{token(sample, k)}.focus()")
            found = facts(browser)
            expected = {
                "flow reward": flow_reward[sample, k],
                "deviation": experience.score[sample, k],
                "tap 1 (layer 1)": experience.dense_score[0, sample, k],
                "tap 3 (layer 2)": experience.dense_score[2, sample, k],
                "log-prob": experience.old_logp[sample, k],
                "entropy": experience.entropy[sample, k],
                "advantage": advantage[sample, k],
                "advantage − outcome": advantage[sample, k] - outcome[sample],
            }
            assert found["id"] == str(episodes[sample].response_ids[k])
            for name, value in expected.items():
                assert number(found[name]) == pytest.approx(value.item(), rel=2e-5, abs=2e-6), name
