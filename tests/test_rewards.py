"""Outcome rewards: parts and their weights, verdicts, grading in the background."""

import json
import re
from types import SimpleNamespace

import pytest
from conftest import ROOT

from grading.official import is_degenerate
from rewards import Grader, RewardSettings


@pytest.fixture(scope="module")
def grader():
    with Grader(["binary"], n_workers=2) as grader:
        yield grader


# ---- Verdicts
@pytest.mark.parametrize(
    ("response", "finished", "binary", "official", "kind"),
    [
        ("so \\boxed{2}", True, 1, 1, "right"),
        ("so \\boxed{3}", True, 0, 0.5, "wrong"),
        ("so 2", True, 0, 0, "no answer"),
        ("so \\boxed{2}", False, 0, 0, "cut"),
        ("first \\boxed{3}, no \\boxed{2}", True, 1, 1, "right"),
        ("\\boxed{2}" * 5, True, 1, 0, "right"),
        ("\\boxed{2}" * 4 + "\\boxed{3}", True, 0, 0, "wrong"),
        ("abcde" * 6 + "\\boxed{2}", True, 1, 0, "right"),
        ("字符" * 20 + "\\boxed{2}", True, 1, 0, "right"),
    ],
)
def test_reward_sets(response, finished, binary, official, kind):
    for name, expected in (("binary", binary), ("official", official)):
        with Grader([name], n_workers=1) as grader:
            verdict = grader.grade("", "2", response, finished)
            assert verdict.reward == expected
            assert verdict.correct == (expected == 1)
            assert verdict.parts == {name: expected}
            assert name == "official" or verdict.kind == kind


def test_five_boxes_are_refused_by_the_part_official_alone():
    """The rule of the official code was every part's."""
    response = "\\boxed{3}" * 5 + "\\boxed{2}"
    with Grader(["binary", "official", "format"], n_workers=1) as grader:
        verdict = grader.grade("", "2", response, True)
        assert verdict.parts == {"binary": 1.0, "official": 0.0, "format": 1.0}
        assert (verdict.kind, verdict.extracted) == ("right", "2")
        verdict = grader.grade("", "2", "abcde" * 6 + "\\boxed{2}", True)
        assert verdict.parts == {"binary": 1.0, "official": 0.0, "format": 1.0}
    with Grader(["official", "format"], n_workers=1) as grader:
        verdict = grader.grade("", "2", response, True)
        assert verdict.parts == {"official": 0.0, "format": 1.0}
        assert (verdict.kind, verdict.extracted) == ("no answer", "2")
        assert grader.grade("", "2", "abcde" * 6 + "\\boxed{2}", True).kind == "wrong"


def test_garbage_by_the_official_rules():
    assert is_degenerate("so " + "abcde" * 5)
    assert not is_degenerate("so " + "abcde" * 4)
    assert is_degenerate("字符字x") and not is_degenerate("字xyz")
    assert not is_degenerate("∀x∃y∈∅"), "mathematical operators are not odd"
    assert not is_degenerate("α" * 3 + "x" * 7), "three tenths may be odd"
    assert is_degenerate("α" * 4 + "x" * 8 + " " * 5), "white space at the ends does not count"
    for odd in "αΩ→⇒–—“”‘’×÷π°\x00":
        assert is_degenerate(f"{odd}{odd}xyz"), f"{odd!r} is odd"


def test_several_golds_and_none(grader):
    assert grader.grade("", ["3", "\\sqrt{4}"], "\\boxed{2}", True).kind == "right"
    assert grader.grade("", None, "\\boxed{2}", True).kind == "wrong"
    assert grader.grade("", [], "\\boxed{2}", True).kind == "wrong"


def test_rewards_of_vision_language_models():
    """The official cases: accuracy, and half a point for the form.

    Some mistakes of the official code are mended, see test_vlm_eval.py.
    """
    cases = json.loads((ROOT / "tests" / "oracle" / "viii_scoring.json").read_text())["vlm"]
    mended = {
        "letter found inside a word": 0.5,
        "two letters": 0.5,
        "gold that does not parse": 0.5,
    }
    with Grader(["vlm", "tags=0.5"], n_workers=1) as grader:
        for case in cases:
            _, _, response = case["query"].rpartition("<|im_start|>assistant\n")
            response = response.removesuffix("<|im_end|>")
            verdict = grader.grade("", case["gold"], response, True)
            assert verdict.reward == mended.get(case["name"], case["reward"]), case["name"]
        verdict = grader.grade("", "B", "<think> x </think> <answer> B </answer>", True)
        assert verdict.kind == "right"
        assert verdict.extracted == "B"
        assert verdict.parts == {"vlm": 1.0, "tags": 1.0}
        verdict = grader.grade("", "B", "<think> x </think> <answer> B </answer>", False)
        assert (verdict.kind, verdict.reward) == ("cut", 0)


@pytest.mark.parametrize(
    ("gold", "response", "kind"),
    [
        ("2", "<answer>2</answer>", "right"),
        ("3", "<answer>2</answer>", "wrong"),
        (["3", "2"], "<answer>2</answer>", "right"),
        (None, "<answer>2</answer>", "wrong"),
        ("2", "", "no answer"),
        ("slow", "<answer>2</answer>", "timeout"),
        (["slow", "3"], "<answer>2</answer>", "timeout"),
        (["slow", "2"], "<answer>2</answer>", "right"),
    ],
)
def test_kinds_of_verdicts_by_the_rules_of_vision_language_models(
    gold, response, kind, monkeypatch
):
    with Grader(["vlm"], n_workers=1) as grader:
        compare = grader.pool.compare
        monkeypatch.setattr(
            grader.pool,
            "compare_once",
            lambda gold, answer: "timeout" if gold == "slow" else compare(gold, answer),
        )
        verdict = grader.grade("", gold, response, True)
    assert verdict.kind == kind
    assert verdict.reward == (kind == "right")


@pytest.mark.parametrize(
    ("response", "gold", "extracted"),
    [
        ("<think>$5$</think><answer></answer>", "5", None),
        ("<think>$5$</think><answer> </answer>", "5", None),
        ("<think>$5$</think><answer>$6$</answer>", "6", "6"),
        ("<think>$5$</think><answer>six is $6$", "6", "6"),
        ("<think>$5$</think><answer>", "5", None),
        ("<think> x </think><answer>**B**</answer>", "B", "**B**"),
        (r"<answer>The answer is \boxed{B}</answer>", "B", "B"),
        ("<answer>$1$ or $2$</answer>", "2", "$1$ or $2$"),
        ("", "5", None),
    ],
)
def test_what_is_logged_is_what_was_compared(response, gold, extracted, monkeypatch):
    """An empty answer tag was wrong, but the log showed what stood in the thought."""
    compared = []
    with Grader(["vlm"], n_workers=1) as grader:
        judge = grader.pool.judge
        monkeypatch.setattr(
            grader.pool,
            "judge",
            lambda gold, answer: compared.append(answer) or judge(gold, answer),
        )
        verdict = grader.grade("", gold, response, True)
    assert verdict.extracted == extracted
    assert set(compared) <= {extracted}
    if extracted is None:
        assert (verdict.kind, compared) == ("no answer", [])


def test_an_answer_that_takes_too_long_is_wrong(grader, monkeypatch):
    monkeypatch.setattr(grader.pool, "compare_once", lambda gold, answer: "timeout")
    grader.counts.clear()
    verdict = grader.grade("", "2", "\\boxed{3}", True)
    assert (verdict.kind, verdict.correct, verdict.reward) == ("timeout", False, 0)
    assert grader.counts["timeout"] == 1


def test_truncated_responses_may_count():
    with Grader(["binary"], RewardSettings(grade_truncated=True), n_workers=1) as grader:
        assert grader.grade("", "2", "\\boxed{2} and", finished=False).correct


# ---- Parts and weights
def test_parts_add_up_with_their_weights(tmp_path):
    file = tmp_path / "brevity.py"
    file.write_text("def reward(problem, response):\n    return 1 / len(response)\n")
    parts = ["binary=2", "format=0.5", "overlong", f"{file}=10"]
    with Grader(parts, max_tokens=100, n_workers=1) as grader:
        verdict = grader.grade("", "2", "\\boxed{2}", True, n_tokens=90)
        assert verdict.parts == {"binary": 1.0, "format": 1.0, "overlong": -0.5, "brevity": 1 / 9}
        assert verdict.reward == pytest.approx(2 + 0.5 - 0.5 + 10 / 9)
        assert verdict.correct
        verdict = grader.grade("", "2", "two", False, n_tokens=100)
        assert verdict.parts == {"binary": 0.0, "format": 0.0, "overlong": -1.0, "brevity": 0.0}
        assert verdict.kind == "cut"


@pytest.mark.parametrize(
    ("n_tokens", "penalty"), [(10, 0), (80, 0), (85, -0.25), (90, -0.5), (100, -1), (120, -1)]
)
def test_soft_penalty_of_overlong_responses(n_tokens, penalty):
    """DAPO, equation 13, with a limit of 100 and a buffer of 20, a fifth."""
    with Grader(["overlong"], max_tokens=100) as grader:
        assert grader.grade("", "2", "two", True, n_tokens).reward == penalty


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (
            ["bleu"],
            "reward 'bleu': neither binary, official, vlm, format, tags, overlong nor a Python",
        ),
        (["binary=x"], "reward 'binary=x': 'x' is no weight"),
        (["binary=nan"], "is no weight"),
        (["binary", "binary=2"], "given twice"),
        ([], "no reward"),
        (["overlong"], "needs max_tokens"),
        (["vlm", "binary"], "vlm reads answers by other rules"),
        (["official=2", "vlm"], "vlm reads answers by other rules"),
    ],
)
def test_bad_rewards_are_refused(reward, message):
    with pytest.raises(ValueError, match=message):
        Grader(reward)


def test_bad_settings_are_refused(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("x = 1\n")
    with pytest.raises(ValueError, match="defines no function reward"):
        Grader([str(file)])
    with pytest.raises(ValueError, match="overlong needs max_tokens"):
        Grader(["overlong"])


def test_a_users_function(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def reward(problem, response):\n    return len(response) / len(problem)\n")
    with Grader([str(file)]) as grader:
        verdict = grader.grade("abcd", None, "ab", True)
        assert (verdict.reward, verdict.kind, verdict.correct) == (0.5, "wrong", False)
        verdict = grader.grade("abcd", None, "abcd", True)
        assert (verdict.reward, verdict.kind, verdict.correct) == (1.0, "right", True)
        verdict = grader.grade("abcd", None, "abcd", False)
        assert (verdict.reward, verdict.kind, verdict.correct) == (0.0, "cut", False), (
            "a response that ran out of room is no answer"
        )


def grade_by_file(tmp_path, source: str, answer="7", finished: bool = True):
    file = tmp_path / "mine.py"
    file.write_text(source)
    with Grader([str(file)]) as grader:
        return grader.grade("problem", answer, "response", finished)


def test_a_users_function_sees_the_answer(tmp_path):
    source = "def reward(problem, response, answer):\n    return 0.5 if answer == {} else 0\n"
    assert grade_by_file(tmp_path, source.format("'7'")).reward == 0.5
    assert grade_by_file(tmp_path, source.format("['7', '8']"), ["7", "8"]).reward == 0.5
    assert grade_by_file(tmp_path, source.format("None"), None).reward == 0.5


def test_a_users_function_may_return_a_text_for_logs(tmp_path):
    source = "def reward(problem, response):\n    return {'reward': 2, 'text': f'{problem}!'}\n"
    verdict = grade_by_file(tmp_path, source)
    assert (verdict.reward, verdict.parts, verdict.text) == (2.0, {"mine": 2.0}, "problem!")
    verdict = grade_by_file(tmp_path, source, finished=False)
    assert (verdict.reward, verdict.text) == (0.0, "")
    verdict = grade_by_file(tmp_path, "def reward(problem, response):\n    return {'reward': 1}\n")
    assert (verdict.reward, verdict.text) == (1.0, "")


def test_texts_of_several_functions_are_lines(tmp_path):
    files = []
    for name in ("first", "second"):
        file = tmp_path / f"{name}.py"
        file.write_text(
            f"def reward(problem, response):\n    return dict(reward=1, text='{name}')\n"
        )
        files.append(str(file))
    with Grader(files) as grader:
        assert grader.grade("", None, "", True).text == "first\nsecond"


def test_names_of_a_users_function_are_free(tmp_path):
    verdict = grade_by_file(tmp_path, "def reward(p, r, gold):\n    return float(gold == '7')\n")
    assert verdict.reward == 1


@pytest.mark.parametrize(
    ("signature", "named"),
    [
        ("response", r"reward\(response\)"),
        ("response, problem", r"reward\(response, problem\)"),
        ("problem, response, weight=0.5", r"reward\(problem, response, weight=0.5\)"),
        ("*problem, response", r"reward\(\*problem, response\)"),
        ("problem, response, answer, more", r"reward\(problem, response, answer, more\)"),
        ("problem, response, *, answer", r"reward\(problem, response, \*, answer\)"),
        ("problem, answer", r"reward\(problem, answer\)"),
    ],
)
def test_a_users_function_of_other_arguments_is_refused(tmp_path, signature, named):
    file = tmp_path / "mine.py"
    file.write_text(f"def reward({signature}):\n    return 1\n")
    with pytest.raises(ValueError, match=f"mine.py defines {named}; expected reward.problem, resp"):
        Grader([str(file)])


@pytest.mark.parametrize(
    "result",
    [
        "None", "'1.5'", "float('nan')", "-float('inf')", "10**400", "[1.0]", "1j", "{}",
        "{'text': 'x'}", "{'reward': 1, 'texts': 'x'}", "{'reward': 1, 'text': None}",
        "{'reward': float('nan')}", "{'reward': '1'}",
    ],
)  # fmt: skip
def test_a_users_function_that_returns_no_finite_number_is_an_error(tmp_path, result):
    source = f"def reward(problem, response):\n    return {result}\n"
    shown = re.escape(repr(eval(result)))
    with pytest.raises(ValueError, match=f"mine.py: reward returned {shown}; expected a finite"):
        grade_by_file(tmp_path, source)


# ---- In the background
def test_episodes_are_graded_in_order(grader):
    def episode(text: str) -> SimpleNamespace:
        return SimpleNamespace(text=text, finish_reason="stop", response_ids=[0])

    problems = [SimpleNamespace(text="", answer=answer) for answer in ("2\\sqrt{2}", "3")]
    texts = [
        r"\boxed{\sqrt{8}}",
        r"\boxed{9^{9^{9^9}}}",
        r"\boxed{" + "x" * 100_000 + "}",
        r"\boxed{" + "{" * 50_000,
        r"\boxed{2^{3/2}}",
        r"\boxed{3}",
        r"\boxed{2}",
        "3",
        r"\boxed{\sqrt{9}}",
        r"\boxed{6/2}",
    ]
    grader.counts.clear()
    verdicts = grader.grade_all(problems, [episode(text) for text in texts])
    assert [verdict.kind for verdict in verdicts] == [
        "right", "wrong", "wrong", "no answer", "right",
        "right", "wrong", "no answer", "right", "right",
    ]  # fmt: skip
    assert grader.counts == {"capped": 1}
    assert grader.grade_all([], []) == []
