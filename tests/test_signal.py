"""The measurements of the flow's score: statistics and labels by hand, and a tiny run."""

# ruff: noqa: E402

import json
import shutil
import sys

import numpy as np
import pytest
from conftest import ROOT
from transformers import AutoTokenizer

import flow as fl
import worlds
from worlds import toy

sys.path += [str(ROOT / "study"), str(ROOT / "study" / "rewards")]
import flow_signal
import last_number_reward
import text_signal
import word_problems

ONCE = np.ones((1, 5))


# ---- Statistics
def test_auc_counts_pairs_and_halves_ties():
    score = np.array([3.0, 1.0, 2.0, 2.0, 0.0])
    is_positive = np.array([True, False, True, False, False])
    # of six pairs 3 > 1, 3 > 2, 3 > 0, 2 > 1, 2 > 0 and one tie
    assert flow_signal.auc(score, is_positive, ONCE)[0] == pytest.approx(5.5 / 6)


def test_auc_of_a_resample_is_that_of_the_drawn_items():
    score = np.array([3.0, 1.0, 2.0, 2.5, 0.0])
    is_positive = np.array([True, False, True, False, False])
    weight = np.array([[0.0, 0.0, 2.0, 1.0, 1.0]])
    drawn = np.array([2, 2, 3, 4])
    of_drawn = flow_signal.auc(score[drawn], is_positive[drawn], np.ones((1, 4)))
    np.testing.assert_allclose(flow_signal.auc(score, is_positive, weight), of_drawn)
    assert of_drawn[0] == pytest.approx(0.5)


def test_auc_without_one_of_the_kinds_is_missing():
    values = flow_signal.auc(np.arange(5.0), np.zeros(5, bool), ONCE)
    assert np.isnan(values[0])
    assert flow_signal.figure(values) is None


def test_correlation_is_pearsons():
    generator = np.random.default_rng(0)
    x = generator.normal(size=5)
    y = x + generator.normal(size=5)
    expected = np.corrcoef(x, y)[0, 1]
    assert flow_signal.correlation(x, y, ONCE)[0] == pytest.approx(expected)


def test_the_interval_of_a_mean_is_as_wide_as_its_standard_error_says():
    values = np.random.default_rng(0).normal(size=400)
    weight = flow_signal.resampling_weights(400)
    assert (weight.sum(axis=1) == 400).all()
    middle, low, high = flow_signal.figure(flow_signal.mean(values, weight))
    assert middle == pytest.approx(values.mean(), abs=1e-3)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


# ---- Labels
def test_results_are_judged_up_to_the_first_wrong_one():
    right = "7+5=2,2*3=6,6-4=2. \\boxed{2}"
    problem = "7 +5 *3 -4>"
    assert flow_signal.judge_results(problem, right) == [(4, False), (10, False), (16, False)]
    wrong = "7+5=2,2*3=5,5-4=1. \\boxed{1}"
    assert flow_signal.judge_results(problem, wrong) == [(4, False), (10, True)]
    assert wrong[10] == "5"


def test_a_step_that_is_not_the_problems_is_wrong():
    assert flow_signal.judge_results("7 +5 *3>", "7+4=1,1*3=3. \\boxed{3}") == [(4, True)]
    assert flow_signal.judge_results("7 +5 *3>", "7+5=2,2+0=2. \\boxed{2}") == [
        (4, False),
        (10, True),
    ]
    assert flow_signal.judge_results("7 +5 *3>", "\\boxed{6}") == []


def test_short_responses():
    replies = [
        flow_signal.Reply("7 +5 *3>", [], [], "7+5=2,2*3=6. \\boxed{6}"),
        flow_signal.Reply("7 +5 *3>", [], [], "7+5=2. \\boxed{2}"),
        flow_signal.Reply("7 +5 *3>", [], [], "7+5=2,2+0=2. \\boxed{2}"),
    ]
    labels = flow_signal.label(replies)
    assert labels.is_short.tolist() == [False, True, True]
    assert labels.step_response.tolist() == [0, 0, 1, 2, 2]
    assert labels.step_place.tolist() == [4, 10, 4, 4, 10]
    assert labels.step_is_wrong.tolist() == [False, False, False, False, True]


def test_steps_of_written_solutions_are_not_judged():
    reply = flow_signal.Reply("7 +5 *3>", [], [], "7+5=2,2*3=6. \\boxed{6}", is_sampled=False)
    labels = flow_signal.label([reply])
    assert labels.is_short.tolist() == [False]
    assert len(labels.step_is_wrong) == 0


def test_written_solutions_are_tokens_of_their_text(world):
    files = (world.path("model"), world.path("train.jsonl"))
    (reply,) = flow_signal.write_replies(*files, first=3, count=1)
    assert len(reply.response_ids) == len(reply.text) + 1, "and EOS"
    assert toy.solve(reply.problem)[0] == reply.text


def test_response_means_leave_out_what_is_missing():
    scored = flow_signal.Scored(np.array([0, 0, 1]), np.array([0, 2]), None, None, None)
    values = np.array([[1.0, 3.0, 5.0], [1.0, np.nan, 5.0]])
    means = flow_signal.response_means(values, scored)
    assert means.tolist() == [[2.0, 5.0], [1.0, 5.0]]


# ---- Text
def test_a_changed_number_is_another_of_the_same_length():
    text = "She sold 48/2 = 24 clips.\nThat is 48 + 24 = 72."
    for seed in range(20):
        changed, start, end = text_signal.change_result(text, seed)
        assert text[start:end] in ("24", "72")
        assert len(changed) == len(text)
        assert changed[:start] == text[:start] and changed[end:] == text[end:]
        assert changed[start:end] != text[start:end] and changed[start] != "0"


def test_a_solution_without_a_result_has_no_change():
    assert text_signal.change_result("There are 5 apples.", 0) is None


def test_annotations_are_taken_out():
    text = "Natalia sold 48/2 = <<48/2=24>>24 clips in May."
    assert text_signal.clean(text) == "Natalia sold 48/2 = 24 clips in May."


def test_comparison_of_pairs():
    rows = [text_signal.batching.Row([1], [2, 3]), text_signal.batching.Row([1], [4, 5])]
    pairs = [text_signal.Pair(row, row, [1]) for row in rows]
    scored = flow_signal.Scored(np.array([0, 0, 1, 1]), np.array([0, 2]), None, None, None)
    comparison = text_signal.Comparison(pairs, np.ones((2, 2)), scored)
    original = np.array([0.0, 1.0, 0.0, 3.0])
    changed = np.array([0.0, 2.0, 4.0, 2.5])
    found = comparison.compare(original, changed)
    middles = {name: figure[0] for name, figure in found.items()}
    assert middles == {
        "place": 0.5,  # of 2 and 2.5 against 1 and 3: two pairs of four
        "place in pairs": 0.5,  # 2 > 1, 2.5 < 3
        "others": 0.5,  # of 2 and 2.5 against 0 and 4
        "responses in pairs": 1.0,  # means 1 > 0.5, 3.25 > 1.5
    }


def test_text_is_measured(world, tmp_path, monkeypatch):
    """The small world stands in for text: its model gets a chat template."""
    monkeypatch.setattr(flow_signal, "N_RESAMPLES", 20)
    folder = tmp_path / "model"
    shutil.copytree(world.path("model"), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    tokenizer.save_pretrained(folder)
    file = tmp_path / "text.json"
    text_signal.main(
        text_signal.Settings(
            solutions=world.path("expert.jsonl"),
            model=str(folder),
            n_train=16,
            n_held_out=4,
            n_pairs=8,
            epochs=(0, 1),
            folder=str(tmp_path / "flows"),
            json=str(file),
        )
    )
    rows = json.loads(file.read_text())["text"]["rows"]
    assert len(rows) == 2 + 4 * 2 * len(flow_signal.TIMES)
    entropy = rows[1]
    assert entropy["place in pairs"] == [0.5, 0.5, 0.5], "what is before the number is the same"
    assert {row["steps"] for row in rows} == {None, 0, 2}
    assert flow_signal.tables(file).count("standardised") == 2 * 2 * len(flow_signal.TIMES)


# ---- Word problems
@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("She has 3 + 4 = 7 apples.", 1.0),
        ("7 or 8", 0.0),
        ("7.0", 1.0),
        ("none", 0.0),
        ("-7", 0.0),
    ],
)
def test_the_last_number_counts(response, score):
    assert last_number_reward.reward("", response, "7") == score


def test_a_thousand_may_have_a_comma():
    assert last_number_reward.reward("", "It costs $1,250.", "1250") == 1.0


def test_word_problems_are_right_and_different(tmp_path):
    settings = word_problems.Settings(str(tmp_path), n_train=40, n_test=10, n_solutions=30)
    word_problems.main(settings)
    problems = []
    for name in ("train", "test", "solutions"):
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        problems += [json.loads(line) for line in lines]
    assert len({row["problem"] for row in problems}) == 80
    solved = [row for row in problems if "solution" in row]
    assert len(solved) == 30
    for row in solved:
        left, _, right = row["solution"].partition(" = ")
        a, sign, b = left.split()[-3:]
        c = int(right.split()[0].rstrip("."))
        results = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}
        results["/"] = int(a) / int(b)
        assert c == results[sign]


def test_too_many_word_problems_are_refused():
    with pytest.raises(ValueError, match="raise --largest"):
        word_problems.make_problems(word_problems.Settings(n_train=12_000, largest=3))


# ---- The whole measurement, in small
@pytest.fixture(scope="module")
def measured(world, tmp_path_factory):
    """Figures of the small world: its flow untrained, and after the offline start."""
    folder = tmp_path_factory.mktemp("signal")
    file = folder / "signal.json"
    known = worlds.WORLDS["toy"]
    resamples = flow_signal.N_RESAMPLES
    worlds.WORLDS["toy"] = world
    flow_signal.N_RESAMPLES = 20
    try:
        flow_signal.main(
            flow_signal.Settings(
                worlds=("toy",),
                n_responses=24,
                amounts=(0, 1),
                draws=(1, 2),
                rl_steps=1,
                rl_responses=8,
                folder=str(folder),
                json=str(file),
            )
        )
    finally:
        worlds.WORLDS["toy"] = known
        flow_signal.N_RESAMPLES = resamples
    return folder, file


def test_all_parts_are_measured(measured):
    _, file = measured
    found = json.loads(file.read_text())["worlds"]["toy"]
    parts = {"counts", "baselines", "draws", "repeats", "fits", "drift"}
    assert found.keys() == parts
    kinds = [(fit["context"], fit["is_standardised"], fit["amount"]) for fit in found["fits"]]
    assert kinds == [
        ("previous", False, 1),
        ("next", False, 1),
        ("self", False, 1),
        ("previous", False, 0),
        ("previous", True, 0),
        ("previous", True, 1),
    ]
    assert [row["step"] for row in found["drift"]] == [0, 0, 1, 1]


def test_tables_show_every_fit(measured):
    _, file = measured
    text = flow_signal.tables(file)
    assert text.count("untrained") == 2
    assert "Along a run" in text
    assert "nan" not in text


def test_an_untrained_flow_errs_by_the_whole_velocity(measured):
    folder, _ = measured
    flow = flow_signal.read_flow(folder / "toy-previous-plain-0" / "flow")
    assert not any(flow.model.final_layer.linear.weight.flatten().tolist())
    scale = flow.expert_scale(flow_signal.TIMES)
    assert (scale.mean > 0.5).all(), "at least about the square of unit noise"
    assert scale.mean[0].tolist() == pytest.approx(scale.mean[2].tolist()), "the same at all times"
    assert isinstance(flow, fl.Flow)
