"""Vision-language benchmarks on files written here, with scores worked out by hand."""

import base64
import io
import json

import pytest
from benchmark_files import (
    BLUE,
    RED,
    choice_row,
    integer_row,
    load_rows,
    mathvista_row,
    outcomes,
    score_rows,
    without_response,
    write_rows,
)
from conftest import read_lines
from PIL import Image

import eval as evaluation
from evals import vlm
from evals.figures import average_sets, score_points
from evals.question import Question
from grading import Pool
from infra.settings import change


@pytest.fixture(scope="module")
def pool():
    with Pool(n_workers=1) as pool:
        yield pool


def mean_of_points(name: str, questions: list[Question], records: list[dict]) -> float:
    """The score as an average over sets has it."""
    read = {"correct": True, "wrong": False, "unjudged": None}
    judged = [read[record["verdict"]] for record in records]
    points = vlm.BENCHMARKS[name].list_points(questions, judged)
    return score_points(points)


def verdicts(records: list[dict]) -> list[str]:
    return [record["verdict"] for record in records]


# ---- One benchmark after another
def test_mathvista(tmp_path, pool):
    years = {"question_type": "free_form", "answer_type": "list", "answer": "[2007, 2008]"}
    rows = [
        choice_row(r"<answer> $\boxed{B}$ </answer>"),
        choice_row(r"It is \boxed{\frac{8}{11}}.", task="geometry"),
        choice_row("Either A or B.", task="geometry"),
        integer_row(r"\boxed{13} or rather \boxed{14}"),
        mathvista_row(
            question_type="free_form",
            answer_type="float",
            answer="1.45",
            response="<think>2</think><answer> $1.450$ </answer>",
        ),
        mathvista_row(
            question_type="free_form",
            answer="Yes",
            response=r"\boxed{\text{yes}}",
            skills="logic",
        ),
        mathvista_row(**years, response=r"\boxed{[2007, 2009]}"),
        mathvista_row(**years, response="The answer is [2007, 2008]."),
        integer_row("", answer="3"),
    ]
    questions, figures, records = score_rows("MathVista_MINI", tmp_path / "m.tsv", rows, pool)
    types = [question.type for question in questions]
    assert types == ["choice"] * 3 + ["free"] * 3 + ["list"] * 2 + ["free"]
    assert outcomes(records) == [
        ("B", "boxed", "correct"),
        ("B", "boxed", "correct"),
        (None, "none", "unjudged"),
        ("14", "boxed", "correct"),
        ("$1.450$", "tag", "correct"),
        (r"\text{yes}", "boxed", "correct"),
        ("[2007, 2009]", "boxed", "wrong"),
        ("[2007, 2008]", "phrase", "correct"),
        (None, "none", "wrong"),
    ]
    assert records[2]["error"] == "no judge"
    assert "unjudged, 1 questions: no judge: 2" in vlm.unjudged(records)
    assert (figures["score"], figures["low"], figures["high"]) == (6 / 8, 6 / 9, 7 / 9)
    assert mean_of_points("MathVista_MINI", questions, records) == figures["score"]
    assert figures["unextracted"] == 2 / 9
    assert figures["judged"] == 0
    assert figures["unjudged"] == 1
    assert figures["correct"] == 6
    assert figures["groups"] == {
        "VQA": 5 / 7,
        "geometry": 1.0,
        "algebra": 5 / 7,
        "counting": 5 / 7,
        "logic": 1.0,
    }
    text = vlm.table({"MathVista_MINI": figures})
    assert "75.0%" in text
    assert "66.7% – 77.8%" in text
    assert "geometry" in text
    prompt = questions[0].prompt
    assert prompt.startswith("Solve the question. The user asks")
    assert prompt.endswith("with </answer>.\nWhat?<image>")
    assert r"using the \\boxed{} command" in prompt
    assert questions[1].images == questions[0].images


def test_mathvision(tmp_path, pool):
    rows = [
        {
            "choices": "['A', 'B', 'C', 'D', 'E']",
            "answer": "E",
            "category": "algebra",
            "response": "The answer is (E).",
        },
        {
            "choices": "['2', '4', '6', '8', '10']",
            "answer": "C",
            "category": "algebra",
            "response": r"$\boxed{6}$",
        },
        {
            "choices": "[]",
            "answer": r"\frac{1}{2}",
            "category": "angle",
            "response": "<answer> The answer is $0.5$ </answer>",
        },
        {
            "choices": "[]",
            "answer": "12",
            "category": "angle",
            "response": r"\boxed{__import__('os').getpid()}",
        },
    ]
    questions, figures, records = score_rows(
        "MathVision_MINI", tmp_path / "m.tsv", rows, pool, question="Which?", level="3"
    )
    assert verdicts(records) == ["correct", "correct", "correct", "wrong"]
    assert [record["how"] for record in records] == ["letter", "boxed", "tag", "boxed"]
    assert figures["score"] == figures["low"] == 0.75
    assert figures["groups"] == {"algebra": 1.0, "angle": 0.5}
    prompt = questions[0].prompt
    assert prompt.startswith("Which?\nAnswer the preceding question. You first thinks")


def test_mathverse_is_the_mean_of_versions(tmp_path, pool):
    text = "How long?\nChoices:\nA:2\nB:2√3\nC:√3\nD:2√2"
    shared = {
        "metadata": "{'split': 'testmini', 'subject': 'Plane Geometry', 'subfield': 'Length'}",
        "question_for_eval": text,
        "answer": "B",
        "question_type": "multi-choice",
        "question": text,
    }
    right = r"\boxed{B}"
    wrong = r"\boxed{C}"
    rows = [
        {"problem_version": "Text Dominant", "response": right},
        {"problem_version": "Text Dominant", "response": right},
        {"problem_version": "Text Dominant", "response": right},
        {"problem_version": "Text Dominant", "response": right},
        {"problem_version": "Text Lite", "response": right},
        {"problem_version": "Text Lite", "response": wrong},
        {"problem_version": "Vision Intensive", "response": "B: 2√3"},
        {"problem_version": "Vision Dominant", "response": wrong},
    ]
    vision_only = {
        "question_type": "free-form",
        "answer": "27 cm",
        "problem_version": "Vision Only",
        "question": "",
    }
    rows.append({**vision_only, "response": r"<answer> $\boxed{27}$ </answer>"})
    rows.append({**vision_only, "response": r"\boxed{28\text{ cm}}"})
    questions, figures, records = score_rows(
        "MathVerse_MINI", tmp_path / "m.tsv", rows, pool, **shared
    )
    assert mean_of_points("MathVerse_MINI", questions, records) == pytest.approx(figures["score"])
    assert questions[0].choices == {"A": "2", "B": "2√3", "C": "√3", "D": "2√2"}
    assert figures["versions"] == 5
    assert figures["score"] == pytest.approx((1 + 0.5 + 1 + 0 + 0.5) / 5)
    mean_over_rows = figures["correct"] / figures["questions"]
    assert mean_over_rows == 7 / 10, "another number"
    assert figures["groups"]["Plane Geometry"] == 0.7
    assert figures["groups"]["Vision Only"] == 0.5
    assert questions[-1].prompt.endswith(
        "</answer>.\n\nThink step by step logically, considering all relevant information "
        "before answering.<image>"
    )


WEMATH = {
    "question": "How far? ",
    "answer": "A",
    "A": "1 m",
    "B": "2 m",
    "C": "",
    "hint": "",
    "knowledge concept": "Distance",
}


def wemath_rows(n_steps: int, identity: str, outcome: str) -> list[dict]:
    """Rows of a WeMath problem: first the steps, then the whole.

    outcome has a character for each row: its response is right (1), wrong (0) or unreadable (?).
    """
    responses = {"1": "<Answer>: <<A>>", "0": "<Answer>: <<B>>", "?": "I cannot tell A from B"}
    parts = [*range(1, n_steps + 1), "multi"]
    rows = []
    for part, character in zip(parts, outcome, strict=True):
        key = f"{n_steps}steps_{part}"
        rows.append({"ID": identity, "key": key, "response": responses[character]})
    return rows


def test_wemath_four_kinds(tmp_path, pool):
    two_steps = ["111", "110", "011", "001", "100", "000"]  # CM, IG, RM strict, RM both, IK, IK
    three_steps = ["1111", "1110", "0101", "0001", "0000"]  # CM, IG, RM strict, RM both, IK
    rows = []
    for i, outcome in enumerate(two_steps):
        rows += wemath_rows(2, str(i), outcome)
    for i, outcome in enumerate(three_steps):
        rows += wemath_rows(3, str(i), outcome)  # the same IDs, another number of steps
    questions, figures, records = score_rows("WeMath", tmp_path / "w.tsv", rows, pool, **WEMATH)
    expected = {
        "IG": 2,
        "IK": 3,
        "RM_strict": 4,
        "RM_loose": 2,
        "CM_strict": 2,
        "CM_loose": 4,
        "problems": 11,
    }
    assert {name: figures[name] for name in expected} == expected
    assert figures["score"] == pytest.approx((11 - 0.5 * 2 - 4 - 3) / 11)
    assert figures["loose"] == pytest.approx((11 - 0.5 * 2 - 2 - 3) / 11)
    assert figures["low"] == figures["high"] == figures["score"]
    assert figures["groups"] == {"1-step": (6 + 7) / 27, "2-step": 3 / 6, "3-step": 3 / 5}
    assert questions[0].prompt == "How far? Options:\nA. 1 m\nB. 2 m<image>"
    assert {record["how"] for record in records} == {"letter"}
    assert "of 11 problems" in vlm.table({"WeMath": figures})
    assert mean_of_points("WeMath", questions, records) == pytest.approx(figures["score"])


def test_wemath_leaves_out_problems_with_an_unjudged_part(tmp_path, pool):
    rows = [
        *wemath_rows(2, "0", "111"),
        *wemath_rows(2, "1", "1?1"),
        *wemath_rows(2, "2", "110"),
    ]
    shared = {**WEMATH, "hint": "look"}
    questions, figures, records = score_rows("WeMath", tmp_path / "w.tsv", rows, pool, **shared)
    assert mean_of_points("WeMath", questions, records) == figures["score"]
    assert questions[0].prompt.startswith("Hint: look\nQuestion: How far? \nOptions:\nA. 1 m")
    assert figures["problems"] == 2
    assert figures["unjudged"] == 1
    assert figures["score"] == (2 - 0.5) / 2
    assert figures["low"] == pytest.approx((3 - 0.5 - 1) / 3)
    assert figures["high"] == pytest.approx((3 - 0.5) / 3)


def test_wemath_without_a_judged_problem(tmp_path, pool):
    rows = wemath_rows(2, "0", "?11")
    _, figures, _ = score_rows("WeMath", tmp_path / "w.tsv", rows, pool, **WEMATH)
    assert figures["problems"] == 0
    assert (figures["score"], figures["loose"]) == (None, None)
    assert (figures["low"], figures["high"]) == (0, 1)


def test_logicvista(tmp_path, pool):
    rows = [
        {"answer": "B", "skill": "inductive", "response": r"Answer: \boxed{B}"},
        {"answer": "A, C", "skill": "deductive", "response": r"Answer: \boxed{C \text{ and } A}"},
        {
            "answer": "AC",
            "skill": "['spatial', 'mechanical']",
            "response": r"\boxed{\text{A}, \text{B}}",
        },
        {"answer": "C", "skill": "spatial", "response": r"\boxed{A, C}"},
        {"answer": "D", "skill": "numerical", "response": "Answer: D"},
        {"answer": "5", "skill": "numerical", "response": r"\boxed{5}"},
    ]
    questions, figures, records = score_rows(
        "LogicVista", tmp_path / "l.tsv", rows, pool, question="Select from A, B, C and D."
    )
    assert verdicts(records) == ["correct", "correct", "wrong", "wrong", "correct", "correct"]
    assert [record["extracted"] for record in records] == ["B", "AC", "AB", "AC", "D", "5"]
    assert figures["score"] == 4 / 6
    assert figures["groups"] == {
        "inductive": 1.0,
        "deductive": 1.0,
        "spatial": 0.0,
        "mechanical": 0.0,
        "numerical": 1.0,
    }
    assert questions[0].prompt.startswith(
        "Select from A, B, C and D.\nAnswer the preceding question. The last line"
    )


def test_visulogic(tmp_path, pool):
    other = {"category": "Other"}
    spatial = {"category": "Spatial Reasoning"}
    rows = [
        {**other, "answer": "A", "response": r"Answer: \boxed{\text{A}}"},
        {**other, "answer": "B", "response": r"\boxed{A}. No: Answer: \boxed{$B$}"},
        {**spatial, "answer": "C", "response": "the correct answer is D."},
        {**spatial, "answer": "D", "response": r"\boxed{E}"},
        {**spatial, "answer": "A", "response": "The area of the answer grows."},
        {**spatial, "answer": "A", "response": r"The answer is A. Or rather: \boxed{A or B}"},
    ]
    questions, figures, records = score_rows(
        "VisuLogic", tmp_path / "v.tsv", rows, pool, question="Which fits?", image=BLUE
    )
    assert verdicts(records) == ["correct", "correct", "wrong", "unjudged", "unjudged", "unjudged"]
    assert (figures["score"], figures["low"], figures["high"]) == (2 / 3, 2 / 6, 5 / 6)
    assert figures["groups"] == {"Other": 1.0, "Spatial Reasoning": 0.0}
    assert questions[0].prompt.startswith(
        "Which fits?\nAnswer the question directly.\nAnswer the preceding multiple choice"
    )


def test_visulogic_with_options(tmp_path):
    row = {"question": "Which fits?", "answer": "B", "category": "Other", "A": "one", "B": "two"}
    (question,) = load_rows("VisuLogic", tmp_path / "v.tsv", [row])
    assert question.choices == {"A": "one", "B": "two"}
    assert question.prompt.startswith(
        "Which fits?Options:\nA. one\nB. two\n\n"
        "Please select the correct answer from the options above.\nAnswer the preceding"
    )


# ---- Answers by the rules
def test_boxes_beside_each_other_are_several_letters(tmp_path, pool):
    row = {"question": "?", "skill": "spatial", "answer": "A, C"}
    (question,) = load_rows("LogicVista", tmp_path / "l.tsv", [row])
    reading = vlm.extract(question, r"Answer: \boxed{A}, \boxed{C}", pool.equal)
    assert reading == vlm.Reading("AC", "boxed")


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"either \boxed{A} or \boxed{B}", None),
        ("If the answer is B, then x=2, which is false.\nI cannot decide.", None),
        ("The answer is B, or possibly A", None),
        (r"\boxed{B. 45^\circ}", "B"),
        (r"$\\boxed{B}$", "B"),
        ("B is the correct answer.", "B"),
        (r"\boxed{\text{(B)}\ 45^\circ}", "B"),
    ],
)
def test_letter_of_a_response(tmp_path, pool, response, answer):
    row = mathvista_row(choices=r"['30^\\circ', '45^\\circ']", answer_option="B")
    (question,) = load_rows("MathVista_MINI", tmp_path / "m.tsv", [row])
    assert vlm.extract(question, response, pool.equal).answer == answer


# ---- Files
def test_several_images_and_a_placeholder_in_the_text(tmp_path):
    row = {
        "question": "Left <image> or right?",
        "answer": "A",
        "category": "Other",
        "image": str([RED, BLUE]),
    }
    (question,) = load_rows("VisuLogic", tmp_path / "v.tsv", [row])
    assert question.prompt.count("<image>") == 2
    assert question.prompt.endswith("<image><image>")
    colours = [Image.open(io.BytesIO(data)).getpixel((0, 0)) for data in question.images]
    assert colours == [(255, 0, 0), (0, 0, 255)]


CUT_OFF = base64.b64encode(base64.b64decode(RED)[:-30]).decode()
NO_PICTURE = base64.b64encode(b"no picture at all, but long enough to be one" * 3).decode()
VISULOGIC = {"question": "Which?", "answer": "A", "category": "Other"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": RED[:-9] + "?"}, "row 1: broken image"),
        ({"image": CUT_OFF}, "row 1: broken image"),
        ({"image": NO_PICTURE}, "row 1: broken image"),
        ({"image": "7"}, "row 1: image '7' is neither an image nor a row's index"),
        ({"image": "1"}, "row 1: image '1' refers to a row without one of its own"),
        ({"image": ""}, "row 1: image '' is neither"),
        ({"index": "0"}, "index 0 is there twice"),
        ({"answer": "E"}, "row 1: answer 'E'; expected one of A, B, C, D"),
    ],
    ids=["base64", "cut off", "no picture", "no row", "itself", "empty", "twice", "no option"],
)
def test_broken_rows_name_themselves(tmp_path, change, message):
    rows = [VISULOGIC, {**VISULOGIC, **change}]
    with pytest.raises(ValueError, match=message):
        load_rows("VisuLogic", tmp_path / "v.tsv", rows)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"choices": "__import__('os')", "answer_option": "A"}, "row 0: .*is not a Python list"),
        ({"question_type": "free_form", "skills": "[a"}, "row 0: .*is not a Python list"),
        ({"choices": "{'A': 1}"}, "row 0: .*is a dict; expected a list"),
        ({"question_type": "essay"}, "'essay'; expected multi_choice or free_form"),
        ({"question_type": "free_form", "answer": " "}, "answer ''; expected an answer"),
    ],
)
def test_cells_that_cannot_be_read(tmp_path, cells, message):
    with pytest.raises(ValueError, match=message):
        load_rows("MathVista_MINI", tmp_path / "m.tsv", [mathvista_row(**cells)])


def test_missing_files_and_columns(tmp_path):
    file = write_rows(tmp_path / "v.tsv", [{"question": "Which?", "answer": "A"}])
    message = "no column category; found index, image, question, answer"
    with pytest.raises(ValueError, match=message):
        vlm.load_benchmark("VisuLogic", file)
    message = "no column question_type, answer_type, choices, answer_option, task, skills"
    with pytest.raises(ValueError, match=message):
        vlm.load_benchmark("MathVista_MINI", file)
    with pytest.raises(ValueError, match="expected one of MathVista_MINI"):
        vlm.load_benchmark("MMMU", file)
    with pytest.raises(ValueError, match="no file"):
        vlm.load_benchmark("VisuLogic", tmp_path / "none.tsv")


def test_a_file_that_is_cut_off(tmp_path):
    file = write_rows(tmp_path / "v.tsv", [VISULOGIC, VISULOGIC])
    whole = file.read_text()
    file.write_text(whole[: whole.rindex("\tA\tOther")])
    with pytest.raises(ValueError, match="row 1: does not have 5 cells"):
        vlm.load_benchmark("VisuLogic", file)


def test_wemath_problems_that_are_not_whole(tmp_path):
    first, second, whole = wemath_rows(2, "3", "111")
    with pytest.raises(ValueError, match="WeMath problem 3 lacks 2steps_2"):
        load_rows("WeMath", tmp_path / "p.tsv", [first, whole], **WEMATH)
    with pytest.raises(ValueError, match="2steps_2 is there twice, in row 2"):
        load_rows("WeMath", tmp_path / "p.tsv", [first, second, second, whole], **WEMATH)


# ---- Whole evaluations
ROWS = {
    "MathVista_MINI": [mathvista_row(question_type="free_form")] * 3,
    "MathVision_MINI": [{"choices": "[]", "category": "algebra", "answer": "4"}] * 3,
    "MathVerse_MINI": [
        {
            "question_type": "free-form",
            "problem_version": "Vision Only",
            "metadata": "{'subject': 'x'}",
            "answer": "4",
        }
    ]
    * 3,
    "WeMath": [{**row, **WEMATH} for row in wemath_rows(2, "7", "111")],
    "LogicVista": [{"skill": "spatial", "answer": "A, C"}] * 3,
    "VisuLogic": [{"category": "shape", "answer": "B"}] * 3,
}


@pytest.mark.parametrize("name", vlm.BENCHMARKS)
def test_an_evaluation_of_each_benchmark(tmp_path, image_world, capsys, monkeypatch, name):
    """eval.py samples with the image model, asks a judge that is dead, and loses no question."""
    rows = [{**without_response(row), "question": "sum>"} for row in ROWS[name]]
    file = write_rows(tmp_path / "b.tsv", rows)
    out = tmp_path / "out"
    config = change(
        evaluation.Config(),
        model=image_world.path("model"),
        data=(f"{name}={file}",),
        template="none",
        max_tokens=12,
        max_prompt_tokens=4096,
        out=str(out),
        judge_url="http://127.0.0.1:9/v1",
        judge_model="gone",
    )
    monkeypatch.setattr("evals.judge.time.sleep", lambda _: None)
    evaluation.main(config)
    summary = json.loads((out / "summary.json").read_text())
    figures = summary["benchmarks"][name]
    samples = read_lines(out / "samples.jsonl")
    assert figures["questions"] == len(samples) == len(rows)
    n_judged = summary["sets"].get(name, {"problems": 0})["problems"]
    assert n_judged == len(rows) - figures["unjudged"]
    assert figures["unjudged"] == sum(bool(sample["error"]) for sample in samples)
    assert figures["correct"] == sum(sample["correct"] for sample in samples)
    assert all("<|image_pad|><|image_pad|>" not in sample["prompt"] for sample in samples)
    printed = capsys.readouterr().out
    assert name in printed
    assert ("refused" in printed) == (figures["unjudged"] > 0)


def test_an_average_takes_a_benchmark_by_its_own_score(tmp_path, image_world):
    """WeMath's is by problem; the questions of both are one set each, in the group `maths`."""
    data = []
    for name in ("WeMath", "MathVerse_MINI"):
        rows = [{**without_response(row), "question": "sum>"} for row in ROWS[name]]
        data.append(f"{name}={write_rows(tmp_path / f'{name}.tsv', rows)}")
    config = change(
        evaluation.Config(),
        model=image_world.path("model"),
        data=tuple(data),
        template="none",
        max_tokens=12,
        max_prompt_tokens=4096,
        out=str(tmp_path / "out"),
    )
    questions = evaluation.load_data(*evaluation.resolve(config))[1]
    samples = []
    verdicts_by_set = {"WeMath": ["right", "right", "wrong"], "MathVerse_MINI": ["wrong"] * 3}
    for name, verdicts_of_set in verdicts_by_set.items():
        for question, verdict in zip(questions[name], verdicts_of_set, strict=True):
            correct = verdict == "right"
            samples.append(
                {"set": name, "problem": question.index, "correct": correct, "verdict": verdict}
            )
    averages = average_sets(evaluation.list_points(samples, questions))
    assert averages["maths"]["mean"] == 0.25, "half a point: both steps are right, the whole not"
    samples[0]["verdict"] = "unjudged"
    assert list(evaluation.list_points(samples, questions)) == ["MathVerse_MINI"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": ("MathVista_MINI",)}, "needs its TSV file: --data MathVista_MINI=FILE"),
        ({"samples": 2, "temperature": 1.0}, "one sample a question"),
    ],
)
def test_a_benchmark_that_cannot_be_scored(tmp_path, image_world, settings, message):
    file = write_rows(tmp_path / "b.tsv", ROWS["MathVista_MINI"])
    config = change(
        evaluation.Config(),
        model=image_world.path("model"),
        data=(f"MathVista_MINI={file}",),
        out=str(tmp_path / "out"),
    )
    with pytest.raises(ValueError, match=message):
        evaluation.main(change(config, **settings))


def test_a_model_that_takes_no_images(tmp_path, world):
    file = write_rows(tmp_path / "b.tsv", ROWS["MathVista_MINI"])
    config = change(
        evaluation.Config(),
        model=world.path("model"),
        data=(f"MathVista_MINI={file}",),
        out=str(tmp_path / "out"),
    )
    with pytest.raises(ValueError, match="takes none; expected a vision-language model"):
        evaluation.main(config)


def test_a_judge_without_a_server(tmp_path, image_world):
    file = write_rows(tmp_path / "b.tsv", ROWS["MathVista_MINI"])
    config = change(
        evaluation.Config(),
        model=image_world.path("model"),
        data=(f"MathVista_MINI={file}",),
        template="none",
        max_prompt_tokens=4096,
        out=str(tmp_path / "out"),
        judge_model="big",
    )
    with pytest.raises(ValueError, match="`vllm serve big` and give --judge-url"):
        evaluation.main(config)
