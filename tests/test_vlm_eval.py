"""Vision-language benchmarks on files written here, with scores worked out by hand; option letters; judges on real servers."""

import base64
import csv
import gc
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

import eval as evaluation
import parallel
import rollout
from evals import judge as judging
from evals import vlm as vlm_eval
from evals.judge import LocalJudge, Reply, ServerJudge
from grading import options
from rewards import Grader

ORACLE = Path(os.environ.get("ORACLE_DIR", Path(__file__).parent / "oracle"))
CHOICES = {"A": "10 cm", "B": "12 cm", "C": "a triangle", "D": r"$\frac{1}{2}$"}


@pytest.fixture(scope="module")
def grader():
    with Grader(n_workers=1) as grader:
        yield grader


# ---- Option letters and rewards
@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A", "A"), ("(A)", "A"), ("A.", "A"), ("A)", "A"), ("b", "B"), ("(b)", "B"), ("$A$", "A"), (r"\text{A}", "A"),
        (r"$\mathrm{(B)}$", "B"), ("**A**", "A"), ("**(A)**.", "A"), ("<<B>>", "B"), ('"B"', "B"), ("Answer: A", "A"),
        ("**Answer:** A", "A"), ("the answer is A", "A"), ("So the correct answer is option (B).", "B"), ("option A", "A"),
        ("Choice C", "C"), ("The final answer is: $D$.", "D"), ("A. 10 cm", "A"), ("(B) 12 cm.", "B"), ("**B**: $12$ cm", "B"),
        ("Option B: 12 cm", "B"), ("12 cm", "B"), ("A triangle.", "C"), (r"\frac{1}{2}", "D"), ("a triangle", "C"),
        ("", None), ("E", None), ("12", None), ("the area", None), ("A or B", None), ("A and B", None), ("A, B", None),
        ("A/B", None), ("AB", None), ("A. or B.", None), ("A. B", None), ("A. 12 cm", None), ("the answer is a", None),
        ("A square", None), ("a", "A"), ("not A", None), ("Area", None), ("A's", None), ("option a or b", None),
        ("A" * 10_000, None),
    ],
)  # fmt: skip
def test_option_letter(text, letter):
    assert options.option_letter(text, CHOICES) == letter


def test_option_letter_without_known_texts():
    unknown = dict.fromkeys("ABCD", "")
    for choices in (None, unknown):
        assert options.option_letter("A. 12 cm", choices) == "A"
        for text in ("the area", "A or B", "A and B", "a triangle", "12 cm", "A triangle"):
            assert options.option_letter(text, choices) is None
    assert options.option_letter("E") == "E" and options.option_letter("E", unknown) is None
    same = {"A": "2", "B": "2", "C": "1 1/2"}
    assert options.option_letter("2", same) is None, "the text of two options"
    assert options.option_letter("11/2", same) is None


@pytest.mark.parametrize(
    ("text", "letters"),
    [
        ("A", "A"), ("A, C", "AC"), ("C and A", "AC"), ("CA", "AC"), (r"\text{A}, \text{C}", "AC"), ("(B), (D).", "BD"),
        ("The correct options are A and C", "AC"), ("A, B, and D", "ABD"), ("A or B", None), ("AA", None), ("a cat", None),
        ("A, x", None),
    ],
)  # fmt: skip
def test_option_letters(text, letters):
    assert options.option_letters(text) == letters


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("First I thought the answer is A.\nBut the answer is B because it fits.", "B"), ("It is long.\n\n(C)", "C"),
        ("Option A is wrong.\n**Answer:** B", "B"), ("The final answer is:\n\n(C)", "C"), ("The answer is 12 cm.", "B"),
        ("<Thought process>: <<it is>> <Answer>: <<C>>", "C"), ("The answer is A. 12 cm", None),
        ("<Answer>: <<A. 12 cm>>", None), ("<Answer>: <<B. 12 cm>>", "B"), ("The answer is A, B", None),
        ("The answer is not A.", None), ("Answer: A or B", None), ("The answer is A square", None), ("so the answer is a", None),
        ("Option A looks good, and so does B", None), ("", None), ("The answer is E, I think", None),
    ],
)  # fmt: skip
def test_letter_in_response(response, letter):
    assert options.letter_in_response(response, CHOICES) == letter


def test_hostile_answers_cost_no_time():
    start = time.perf_counter()
    for text in [
        "(" * 9999,
        "A" + " " * 9999 + "x",
        "A. " + ")\n" * 9999,
        "the answer is " + "$" * 9999,
        "Answer is " * 9999,
    ]:
        options.option_letter(text, CHOICES)
        options.option_letters(text)
        options.letter_in_response(text, CHOICES)
        options.tag_format(text)
    assert time.perf_counter() - start < 2


MENDED = {
    "letter found inside a word": 0.0,
    "two letters": 0.0,
    "gold that does not parse": 0.0,
}  # accuracies


def test_viii_official_vlm_rewards(grader):
    cases = json.loads((ORACLE / "viii_scoring.json").read_text())["vlm"]
    assert len(cases) == 30
    wrong = []
    for case in cases:
        response = (
            case["query"].partition("<|im_start|>assistant\n")[2].replace("<|im_end|>", "").strip()
        )
        accuracy = float(options.vlm_accuracy(response, case["gold"], grader.equal))
        found = accuracy, 0.5 * options.tag_format(response)
        expected = MENDED.get(case["name"], case["accuracy"]), case["format"]
        if found != expected:
            wrong.append((case["name"], found, expected))
    assert not wrong


def test_vlm_accuracy_of_several_golds_and_forms(grader):
    def right(response: str, gold) -> bool:
        return options.vlm_accuracy(response, gold, grader.equal)

    assert right("<answer> $2$ </answer>", ["3", "2"]) and not right(
        "<answer> $4$ </answer>", ["3", "2"]
    )
    assert right(r"<answer> The answer is $\boxed{B}$ </answer>", "B") and right(
        "<answer>the answer is B</answer>", r"\text{B}"
    )
    assert not right("<answer>B because A is not</answer>", "A") and not right(
        "<answer></answer>", "A"
    )
    assert not right("<answer> anything </answer>", " ")


# ---- Files
def picture(colour: str) -> str:
    data = io.BytesIO()
    Image.new("RGB", (28, 28), colour).save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


RED, BLUE = picture("red"), picture("blue")


def write(path: Path, rows: list[dict], **shared) -> Path:
    """Write a TSV file; rows get an index and, from the second on, the first row's image."""
    rows = [
        {"index": str(i), "image": RED if i == 0 else "0"} | shared | row
        for i, row in enumerate(rows)
    ]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(
            file, list(dict.fromkeys(key for row in rows for key in row)), delimiter="\t"
        )
        writer.writeheader()
        writer.writerows(rows)
    return path


def run(name: str, path: Path, rows: list[dict], grader, judge=None, **shared):
    """Write the rows, load them, score their `response`."""
    asked = [{key: value for key, value in row.items() if key != "response"} for row in rows]
    questions = vlm_eval.load_benchmark(name, write(path, asked, **shared))
    figures, records = vlm_eval.score(
        name, questions, [row["response"] for row in rows], grader, judge
    )
    assert [record["gold"] for record in records] == [question.gold for question in questions]
    return questions, figures, records


def outcomes(records) -> list[tuple]:
    return [(record["extracted"], record["how"], record["verdict"]) for record in records]


def mathvista(**given) -> dict:
    given = {
        "question_type": "multi_choice",
        "answer_type": "text",
        "choices": "[]",
        "answer_option": "",
    } | given
    return {
        "question": "What?",
        "answer": "8/11",
        "task": "VQA",
        "skills": "['algebra', 'counting']",
    } | given


MATHVISTA = [
    mathvista(
        choices="['3/11', '8/11', '3/5']",
        answer_option="B",
        response=r"<answer> $\boxed{B}$ </answer>",
    ),
    mathvista(
        choices="['3/11', '8/11', '3/5']",
        answer_option="B",
        response=r"It is \boxed{\frac{8}{11}}.",
        task="geometry",
    ),
    mathvista(
        choices="['3/11', '8/11', '3/5']",
        answer_option="B",
        response="Either A or B.",
        task="geometry",
    ),
    mathvista(
        question_type="free_form",
        answer_type="integer",
        answer="14",
        response=r"\boxed{13} or rather \boxed{14}",
    ),
    mathvista(
        question_type="free_form",
        answer_type="float",
        answer="1.45",
        response="<think>2</think><answer> $1.450$ </answer>",
    ),
    mathvista(
        question_type="free_form",
        answer_type="text",
        answer="Yes",
        response=r"\boxed{\text{yes}}",
        skills="logic",
    ),
    mathvista(
        question_type="free_form",
        answer_type="list",
        answer="[2007, 2008]",
        response=r"\boxed{[2007, 2009]}",
    ),
    mathvista(
        question_type="free_form",
        answer_type="list",
        answer="[2007, 2008]",
        response="The answer is [2007, 2008].",
    ),
    mathvista(question_type="free_form", answer_type="integer", answer="3", response=""),
]


def test_mathvista(tmp_path, grader):
    questions, figures, records = run("MathVista_MINI", tmp_path / "m.tsv", MATHVISTA, grader)
    assert [question.type for question in questions] == ["choice"] * 3 + ["free"] * 3 + [
        "list"
    ] * 2 + ["free"]
    assert outcomes(records) == [
        ("B", "boxed", "correct"), ("B", "boxed", "correct"), (None, "none", "unjudged"), ("14", "boxed", "correct"),
        ("$1.450$", "tag", "correct"), (r"\text{yes}", "boxed", "correct"), ("[2007, 2009]", "boxed", "wrong"),
        ("[2007, 2008]", "phrase", "correct"), (None, "none", "wrong"),
    ]  # fmt: skip
    assert records[2][
        "error"
    ] == "no judge" and "unjudged, 1 questions: no judge: 2" in vlm_eval.unjudged(records)
    assert (figures["score"], figures["low"], figures["high"]) == (6 / 8, 6 / 9, 7 / 9)
    assert (figures["unextracted"], figures["judged"], figures["unjudged"], figures["correct"]) == (
        2 / 9,
        0,
        1,
        6,
    )
    expected = {"VQA": 5 / 7, "geometry": 1.0, "algebra": 5 / 7, "counting": 5 / 7, "logic": 1.0}
    assert figures["groups"] == expected
    text = vlm_eval.table({"MathVista_MINI": figures})
    assert "75.0%" in text and "66.7% – 77.8%" in text and "geometry" in text
    prompt = questions[0].prompt
    assert prompt.startswith("Solve the question. The user asks") and prompt.endswith(
        "with </answer>.\nWhat?<image>"
    )
    assert r"using the \\boxed{} command" in prompt and questions[1].images == questions[0].images


def test_mathvision(tmp_path, grader):
    shared = {"question": "Which?", "level": "3"}
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
    questions, figures, records = run("MathVision_MINI", tmp_path / "m.tsv", rows, grader, **shared)
    assert [record["verdict"] for record in records] == ["correct", "correct", "correct", "wrong"]
    assert [record["how"] for record in records] == ["letter", "boxed", "tag", "boxed"]
    assert figures["score"] == figures["low"] == 0.75 and figures["groups"] == {
        "algebra": 1.0,
        "angle": 0.5,
    }
    assert questions[0].prompt.startswith("Which?\nAnswer the preceding question. You first thinks")


def test_mathverse_is_the_mean_of_versions(tmp_path, grader):
    asked = "How long?\nChoices:\nA:2\nB:2√3\nC:√3\nD:2√2"
    metadata = "{'split': 'testmini', 'subject': 'Plane Geometry', 'subfield': 'Length'}"
    shared = {
        "metadata": metadata,
        "question_for_eval": asked,
        "answer": "B",
        "question_type": "multi-choice",
    }
    right, wrong = r"\boxed{B}", r"\boxed{C}"
    rows = [
        {"problem_version": version, "question": "" if version == "Vision Only" else asked, "response": response}
        for version, responses in {
            "Text Dominant": [right, right, right, right], "Text Lite": [right, wrong], "Vision Intensive": ["B: 2√3"],
            "Vision Dominant": [wrong],
        }.items()
        for response in responses
    ]  # fmt: skip
    free = {
        "question_type": "free-form",
        "answer": "27 cm",
        "problem_version": "Vision Only",
        "question": "",
    }
    rows += [
        free | {"response": r"<answer> $\boxed{27}$ </answer>"},
        free | {"response": r"\boxed{28\text{ cm}}"},
    ]
    questions, figures, _ = run("MathVerse_MINI", tmp_path / "m.tsv", rows, grader, **shared)
    assert questions[0].choices == {"A": "2", "B": "2√3", "C": "√3", "D": "2√2"}
    assert (
        figures["score"] == pytest.approx((1 + 0.5 + 1 + 0 + 0.5) / 5) and figures["versions"] == 5
    )
    assert figures["correct"] / figures["questions"] == 7 / 10, (
        "the mean over all rows is another number"
    )
    assert figures["groups"]["Plane Geometry"] == 0.7 and figures["groups"]["Vision Only"] == 0.5
    prompt = questions[-1].prompt
    assert prompt.endswith(
        "</answer>.\n\nThink step by step logically, considering all relevant information before answering.<image>"
    )


def problem(steps: int, identity: str, verdicts: str) -> list[dict]:
    """Rows of a WeMath problem, with responses right (1), wrong (0) or unreadable (?): first the steps, then the whole."""
    said = {"1": "<Answer>: <<A>>", "0": "<Answer>: <<B>>", "?": "I cannot tell A from B"}
    keys = [f"{steps}steps_{part}" for part in [*range(1, steps + 1), "multi"]]
    return [
        {"ID": identity, "key": key, "response": said[v]}
        for key, v in zip(keys, verdicts, strict=True)
    ]


WEMATH = {
    "question": "How far? ",
    "answer": "A",
    "A": "1 m",
    "B": "2 m",
    "C": "",
    "hint": "",
    "knowledge concept": "Distance",
}


def test_wemath_four_kinds(tmp_path, grader):
    two = ["111", "110", "011", "001", "100", "000"]  # CM, IG, RM strict, RM both, IK, IK
    three = ["1111", "1110", "0101", "0001", "0000"]  # CM, IG, RM strict, RM both, IK
    rows = [row for i, v in enumerate(two) for row in problem(2, str(i), v)]
    rows += [
        row for i, v in enumerate(three) for row in problem(3, str(i), v)
    ]  # the same IDs, another number of steps
    questions, figures, records = run("WeMath", tmp_path / "w.tsv", rows, grader, **WEMATH)
    expected = {
        "IG": 2,
        "IK": 3,
        "RM_strict": 4,
        "RM_loose": 2,
        "CM_strict": 2,
        "CM_loose": 4,
        "problems": 11,
    }
    assert {key: figures[key] for key in expected} == expected
    assert figures["score"] == pytest.approx((11 - 0.5 * 2 - 4 - 3) / 11)
    assert figures["loose"] == pytest.approx((11 - 0.5 * 2 - 2 - 3) / 11)
    assert figures["low"] == figures["high"] == figures["score"]
    assert figures["groups"] == {"1-step": (6 + 7) / 27, "2-step": 3 / 6, "3-step": 3 / 5}
    assert questions[0].prompt == "How far? Options:\nA. 1 m\nB. 2 m<image>"
    assert {record["how"] for record in records} == {
        "letter"
    } and "of 11 problems" in vlm_eval.table({"WeMath": figures})


def test_wemath_leaves_out_problems_with_an_unjudged_part(tmp_path, grader):
    rows = problem(2, "0", "111") + problem(2, "1", "1?1") + problem(2, "2", "110")
    _, figures, _ = run("WeMath", tmp_path / "w.tsv", rows, grader, **WEMATH | {"hint": "look"})
    assert (
        figures["problems"] == 2 and figures["unjudged"] == 1 and figures["score"] == (2 - 0.5) / 2
    )
    assert figures["low"] == pytest.approx((3 - 0.5 - 1) / 3) and figures["high"] == pytest.approx(
        (3 - 0.5) / 3
    )


def test_logicvista(tmp_path, grader):
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
    questions, figures, records = run(
        "LogicVista", tmp_path / "l.tsv", rows, grader, question="Select from A, B, C and D."
    )
    assert [record["verdict"] for record in records] == [
        "correct",
        "correct",
        "wrong",
        "wrong",
        "correct",
        "correct",
    ]
    assert [record["extracted"] for record in records] == ["B", "AC", "AB", "AC", "D", "5"]
    assert figures["score"] == 4 / 6
    groups = {
        "inductive": 1.0,
        "deductive": 1.0,
        "spatial": 0.0,
        "mechanical": 0.0,
        "numerical": 1.0,
    }
    assert figures["groups"] == groups
    assert questions[0].prompt.startswith(
        "Select from A, B, C and D.\nAnswer the preceding question. The last line"
    )


def test_visulogic(tmp_path, grader):
    rows = [
        {"answer": "A", "category": "Other", "response": r"Answer: \boxed{\text{A}}"},
        {"answer": "B", "category": "Other", "response": r"\boxed{A}. No: Answer: \boxed{$B$}"},
        {"answer": "C", "category": "Spatial Reasoning", "response": "the correct answer is D."},
        {"answer": "D", "category": "Spatial Reasoning", "response": r"\boxed{E}"},
        {
            "answer": "A",
            "category": "Spatial Reasoning",
            "response": "The area of the answer grows.",
        },
        {
            "answer": "A",
            "category": "Spatial Reasoning",
            "response": r"The answer is A. Or rather: \boxed{A or B}",
        },
    ]
    questions, figures, records = run(
        "VisuLogic", tmp_path / "v.tsv", rows, grader, question="Which fits?", image=BLUE
    )
    words = ["correct", "correct", "wrong", "unjudged", "unjudged", "unjudged"]
    assert [record["verdict"] for record in records] == words
    assert (figures["score"], figures["low"], figures["high"]) == (2 / 3, 2 / 6, 5 / 6)
    assert figures["groups"] == {"Other": 1.0, "Spatial Reasoning": 0.0}
    assert questions[0].prompt.startswith(
        "Which fits?\nAnswer the question directly.\nAnswer the preceding multiple choice"
    )


def test_several_images_and_a_placeholder_in_the_text(tmp_path):
    row = {
        "question": "Left <image> or right?",
        "answer": "A",
        "category": "Other",
        "image": str([RED, BLUE]),
    }
    (question,) = vlm_eval.load_benchmark("VisuLogic", write(tmp_path / "v.tsv", [row]))
    assert question.prompt.count("<image>") == 2 == len(
        question.images
    ) and question.prompt.endswith("<image><image>")
    assert [Image.open(io.BytesIO(data)).getpixel((0, 0)) for data in question.images] == [
        (255, 0, 0),
        (0, 0, 255),
    ]


BROKEN = base64.b64encode(base64.b64decode(RED)[:-30]).decode()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": RED[:-9] + "?"}, r"row 1: broken image"),
        ({"image": BROKEN}, r"row 1: broken image"),
        (
            {
                "image": base64.b64encode(
                    b"no picture at all, but long enough to be one" * 3
                ).decode()
            },
            "row 1: broken image",
        ),
        ({"image": "7"}, "row 1: image '7' is neither an image nor a row's index"),
        ({"image": "1"}, "row 1: image '1' refers to a row without one of its own"),
        ({"image": ""}, "row 1: image '' is neither"),
        ({"index": "0"}, "index 0 is there twice"),
        ({"answer": "E"}, "row 1: answer 'E'; expected one of A, B, C, D"),
    ],
)
def test_broken_rows_name_themselves(tmp_path, change, message):
    rows = [{"question": "Which?", "answer": "A", "category": "Other"}] * 2
    path = write(tmp_path / "v.tsv", [rows[0], rows[1] | change])
    with pytest.raises(ValueError, match=message):
        vlm_eval.load_benchmark("VisuLogic", path)


def test_files_that_cannot_be(tmp_path):
    path = write(tmp_path / "v.tsv", [{"question": "Which?", "answer": "A"}])
    with pytest.raises(
        ValueError, match="no column category; found index, image, question, answer"
    ):
        vlm_eval.load_benchmark("VisuLogic", path)
    with pytest.raises(
        ValueError,
        match="no column question_type, answer_type, choices, answer_option, task, skills",
    ):
        vlm_eval.load_benchmark("MathVista_MINI", path)
    with pytest.raises(ValueError, match="expected one of MathVista_MINI"):
        vlm_eval.load_benchmark("MMMU", path)
    with pytest.raises(ValueError, match="no file"):
        vlm_eval.load_benchmark("VisuLogic", tmp_path / "none.tsv")
    whole = write(
        tmp_path / "w.tsv", [{"question": "Which?", "answer": "A", "category": "Other"}] * 2
    ).read_text()
    (tmp_path / "cut.tsv").write_text(whole[: whole.rindex("\tA\tOther")])
    with pytest.raises(ValueError, match="row 1: other than 5 cells"):
        vlm_eval.load_benchmark("VisuLogic", tmp_path / "cut.tsv")
    with pytest.raises(ValueError, match="WeMath problem 3 lacks 2steps_2"):
        rows = [{k: v for k, v in row.items() if k != "response"} for row in problem(2, "3", "111")]
        vlm_eval.load_benchmark("WeMath", write(tmp_path / "p.tsv", [rows[0], rows[2]], **WEMATH))
    bad = {k: v for k, v in mathvista(choices="__import__('os')", answer_option="A").items()}
    with pytest.raises(ValueError, match="row 0: .*is not a Python list"):
        vlm_eval.load_benchmark("MathVista_MINI", write(tmp_path / "m.tsv", [bad]))


# ---- Judges
class Server(ThreadingHTTPServer):
    """An endpoint that does what the response under judgement says: `answer X`, `429 X`, `500`, `garbage`, `hang`, `die`…"""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def send(self, status: int, body: bytes, length: int | None = None, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(length or len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = asked["messages"][0]["content"]
        what, _, said = prompt.rpartition("DO ")[2].partition("\n")[0].partition(" ")
        self.server.asked.append(what)
        reply = json.dumps({"choices": [{"message": {"content": said}}]}).encode()
        if what == "429" and self.server.asked.count("429") == 1:
            self.send(429, b"slow down", Retry_After="0")
        elif what in ("answer", "429"):
            self.send(200, reply)
        elif what in ("500", "400"):
            self.send(int(what), b"it broke")
        elif what == "garbage":
            self.send(200, b"<html>a proxy's page</html>")
        elif what == "shape":
            self.send(200, b'{"choices": []}')
        elif what == "hang":
            time.sleep(3)
        elif what == "drip":
            self.send(200, b"{", length=10**6)
            for _ in range(20):
                time.sleep(0.2)
                self.wfile.write(b" ")
        elif what == "die":
            self.send(200, reply[:20], length=len(reply))
            self.connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def server():
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


def judge(server, **given) -> ServerJudge:
    return ServerJudge(
        server.url, "judge", **{"attempts": 3, "timeout": 0.5, "wait": 0.01, "give_up": 99} | given
    )


def choice(response: str, answer: str = "B") -> dict:
    return mathvista(choices="['3/11', '8/11', '3/5']", answer_option=answer, response=response)


FREE = {"question_type": "free_form", "answer_type": "integer", "answer": "14"}


def test_a_judge_reads_what_rules_cannot(tmp_path, grader, server):
    rows = [
        choice(r"\boxed{B}"), choice("I waver. DO answer B"), choice("I waver. DO answer (C) 3/5"),
        choice("I waver. DO answer Z"), choice("I waver. DO 429 Output: B"), choice("I waver. DO answer A or B"),
        mathvista(**FREE, response="some of them DO answer `14`"),
        mathvista(**FREE, response="none DO answer null"),
    ]  # fmt: skip
    _, figures, records = run("MathVista_MINI", tmp_path / "m.tsv", rows, grader, judge(server))
    assert outcomes(records) == [
        ("B", "boxed", "correct"), ("B", "judge", "correct"), ("C", "judge", "wrong"), ("", "judge", "wrong"),
        ("B", "judge", "correct"), (None, "none", "unjudged"), ("14", "judge", "correct"), ("", "judge", "wrong"),
    ]  # fmt: skip
    assert server.asked.count("429") == 2, "asked again"
    assert "not understood: 'A or B'" in records[5]["error"]
    assert (figures["unextracted"], figures["judged"], figures["unjudged"]) == (7 / 8, 6 / 8, 1)
    assert (figures["score"], figures["low"], figures["high"]) == (4 / 7, 4 / 8, 5 / 8)


@pytest.mark.parametrize(
    ("what", "reason", "requests"),
    [
        ("500", "HTTP 500: it broke", 3),
        ("400", "HTTP 400: it broke", 1),
        ("garbage", "not a chat completion", 3),
        ("shape", "not a chat completion", 3),
        ("answer", "an empty reply", 3),
        ("hang", "timed out", 3),
        ("drip", "no end after", 3),
        ("die", "", 3),
    ],
)
def test_a_failing_judge_is_reported(tmp_path, grader, server, what, reason, requests):
    rows = [choice(r"\boxed{B}"), choice(f"I waver. DO {what}"), choice("I waver. DO answer B")]
    _, figures, records = run(
        "MathVista_MINI", tmp_path / "m.tsv", rows, grader, judge(server, cache=tmp_path / "c")
    )
    assert [record["verdict"] for record in records] == ["correct", "unjudged", "correct"]
    assert reason in records[1]["error"] and server.url in records[1]["error"]
    assert server.asked.count(what) - (what == "answer") == requests
    assert (figures["score"], figures["low"], figures["high"], figures["unjudged"]) == (
        1.0,
        2 / 3,
        1.0,
        1,
    )
    assert records[1]["error"] in vlm_eval.unjudged(records)
    assert len((tmp_path / "c").read_text().splitlines()) == 1, "a failure is not kept"


def test_a_dead_judge_is_given_up(tmp_path, grader):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    dead = ServerJudge(url, "judge", attempts=2, wait=0.01, give_up=3, concurrency=1)
    rows = [choice(f"I waver between A and B, {i}") for i in range(20)]
    _, figures, records = run("MathVista_MINI", tmp_path / "m.tsv", rows, grader, dead)
    assert {record["verdict"] for record in records} == {"unjudged"}
    assert (
        figures["score"] is None
        and figures["low"] == 0
        and figures["high"] == 1
        and figures["unjudged"] == 20
    )
    assert sum("Connection refused" in record["error"] for record in records) == 3
    assert sum("not asked" in record["error"] for record in records) == 17
    assert "–" in vlm_eval.table(
        {"MathVista_MINI": figures}
    ) and "unjudged, 17 questions" in vlm_eval.unjudged(records)


def test_the_cache_outlives_a_run_and_a_torn_line(tmp_path, server):
    cache = tmp_path / "deep" / "replies.jsonl"
    assert judge(server, cache=cache).ask(["DO answer A", "DO answer B", "DO answer A"]) == [
        Reply("A"),
        Reply("B"),
        Reply("A"),
    ]
    assert len(server.asked) == 2, "equal prompts are asked once"
    whole = cache.read_text()
    cache.write_text(whole[:-5])  # killed while it wrote
    assert [
        reply.text for reply in judge(server, cache=cache).ask(["DO answer A", "DO answer B"])
    ] == ["A", "B"]
    assert len(server.asked) == 3
    assert (
        judge(server, cache=cache).ask(["DO answer B"]) == [Reply("B")] and len(server.asked) == 3
    )
    other = ServerJudge(server.url, "another", cache=cache, wait=0.01)
    assert other.ask(["DO answer A"]) == [Reply("A")] and len(server.asked) == 4, (
        "another model's replies are its own"
    )


def test_the_judge_bounds_its_requests(server):
    running, most, lock, handle = 0, 0, threading.Lock(), Handler.do_POST

    class Slow(Handler):
        def do_POST(self):
            nonlocal running, most
            with lock:
                running += 1
                most = max(most, running)
            time.sleep(0.05)
            handle(self)
            with lock:
                running -= 1

    server.RequestHandlerClass = Slow
    replies = judge(server, concurrency=3, timeout=10).ask(
        [f"{i} DO answer {i}" for i in range(12)]
    )
    assert [reply.text for reply in replies] == [str(i) for i in range(12)] and 1 < most <= 4, (
        "one more: a reply is read before its thread has ended"
    )


def test_what_a_judge_is_told(tmp_path):
    questions = vlm_eval.load_benchmark(
        "MathVista_MINI", write(tmp_path / "m.tsv", [choice("x"), mathvista(**FREE)])
    )
    prompt = judging.judge_prompt(questions[0], "It is {question}.")
    assert (
        "What? Options: A. 3/11 B. 8/11 C. 3/5\nAnswer: It is {question}." in prompt
        and "null" not in prompt
    )
    assert judging.judge_prompt(questions[1], "So 14.").endswith(
        "Question: What?\nResponse: So 14.\nExtracted answer:"
    )
    with pytest.raises(ValueError, match="expected http"):
        ServerJudge("127.0.0.1:8000", "judge")
    with pytest.raises(ValueError, match="--judge-model"):
        judging.make_judge("http://127.0.0.1:8000/v1", None)
    assert judging.make_judge(None, None) is None
    assert (
        judging.make_judge("http://127.0.0.1:8000/v1/", "big").url
        == "http://127.0.0.1:8000/v1/chat/completions"
    )


@pytest.mark.vllm
def test_a_served_model_and_one_in_this_process_say_the_same(world, tmp_path, grader):
    """The toy judges: it does not understand its task, which has to end in a report and not in a verdict."""

    def said(
        reply: Reply,
    ) -> str:  # the toy seldom comes to an end: what it said is then in the error
        return reply.text or reply.error.partition("tokens: ")[2].partition(" (try")[0]

    model = world.path("model")
    (tmp_path / "template").write_text(
        "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    command += [
        "--model",
        model,
        "--served-model-name",
        "toy",
        "--dtype",
        "float32",
        "--max-model-len",
        "4096",
    ]
    command += [
        "--enforce-eager",
        "--chat-template",
        str(tmp_path / "template"),
        "--generation-config",
        "vllm",
    ]
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
    }
    settings |= {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=os.environ | settings, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 90
        while True:
            assert process.poll() is None and time.monotonic() < deadline, (
                tmp_path / "log"
            ).read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except OSError:
                time.sleep(0.5)
        served = ServerJudge(f"http://127.0.0.1:{port}/v1", "toy", attempts=2, timeout=20)
        prompts = ["7+5*3=", "9-4+2=", "3*3*3="]
        replies = served.ask(prompts)
        assert all(said(reply) for reply in replies), replies
        rows = [choice(r"\boxed{B}"), choice("I waver between A and B.")]
        _, figures, records = run("MathVista_MINI", tmp_path / "m.tsv", rows, grader, served)
        assert records[0]["verdict"] == "correct"
        if records[1]["verdict"] == "unjudged":
            assert (
                re.search("not understood|more than 128 tokens", records[1]["error"])
                and figures["unjudged"] == 1
            )
        else:
            assert records[1]["how"] == "judge"
        (unknown,) = ServerJudge(f"http://127.0.0.1:{port}/v1", "another", attempts=3).ask(["7+5="])
        assert (
            unknown.text is None and "HTTP 404" in unknown.error and "try 1 of 3" in unknown.error
        )
    finally:
        process.terminate()
        process.wait(20)
    (dead,) = served.ask(["1+1="])
    assert dead.text is None and "try 2 of 2" in dead.error
    gc.collect()  # engines of other tests, whose end takes the process group with it
    parallel.start()
    local = LocalJudge(model, max_length=400)
    *same, long = local.ask([*prompts, "9" * 500])
    assert [said(reply) for reply in same] == [said(reply) for reply in replies]
    assert long == Reply(None, "not asked: 500 tokens, the judge takes 272")


@pytest.mark.parametrize(
    ("gold", "response"),
    [
        ("B", "<answer>$A$ or $B$</answer>"), ("B", r"<answer>\boxed{A} or \boxed{B}</answer>"), ("2", "<answer>$1$ or $2$</answer>"),
        ("B", "<answer>The answer is A, or the answer is B</answer>"), ("D", r"\boxed{A}\boxed{B}\boxed{C}\boxed{D}"),
        ("2", "<answer>$x=1$, $x=2$</answer>"), ("12", "<answer>between $3$ and $12$</answer>"),
    ],
)  # fmt: skip
def test_hedged_answers_earn_nothing(grader, gold, response):
    assert not options.vlm_accuracy(response, gold, grader.equal)


@pytest.mark.parametrize(
    "reply",
    [
        "Rate limit exceeded, please retry",
        "I cannot determine the answer.",
        "8/11\n\nQuestion: What is z?",
        "=" * 128,
    ],
)
def test_talk_of_a_judge_is_no_answer(reply, tmp_path):
    (question,) = vlm_eval.load_benchmark(
        "MathVista_MINI", write(tmp_path / "b.tsv", [mathvista(question_type="free_form")])
    )
    assert judging.understand(question, reply) is None or len(reply) == 128
    for said in ("8/11", "**Answer:** 8/11", "<think>\n\n</think>\n\n8/11", "Output: 8/11"):
        assert judging.understand(question, said) == "8/11"


def test_letters_beside_each_other(tmp_path, grader):
    rows = [{"question": "?", "skill": "spatial", "answer": "A, C"}]
    (letters,) = vlm_eval.load_benchmark("LogicVista", write(tmp_path / "l.tsv", rows))
    assert vlm_eval.extract(letters, r"Answer: \boxed{A}, \boxed{C}", grader.equal) == (
        "AC",
        "boxed",
    )
    (choice,) = vlm_eval.load_benchmark(
        "MathVista_MINI",
        write(
            tmp_path / "m.tsv",
            [mathvista(choices="['30^\\\\circ', '45^\\\\circ']", answer_option="B")],
        ),
    )
    for response, answer in {
        r"either \boxed{A} or \boxed{B}": None, "If the answer is B, then x=2, which is false.\nI cannot decide.": None,
        "The answer is B, or possibly A": None, r"\boxed{B. 45^\circ}": "B", r"$\\boxed{B}$": "B", "B is the correct answer.": "B",
        r"\boxed{\text{(B)}\ 45^\circ}": "B",
    }.items():  # fmt: skip
        assert vlm_eval.extract(choice, response, grader.equal)[0] == answer, response


def test_a_cell_that_groups_cannot_read_names_its_row(tmp_path):
    with pytest.raises(ValueError, match="row 0: .*is not a Python list"):
        vlm_eval.load_benchmark(
            "MathVista_MINI",
            write(tmp_path / "b.tsv", [mathvista(question_type="free_form", skills="[a")]),
        )


# ---- Whole evaluations
@pytest.mark.parametrize("name", vlm_eval.BENCHMARKS)
def test_an_evaluation_of_each_benchmark(tmp_path, image_world, capsys, name):
    """eval.py samples with the image model, asks a judge that is dead, and loses no question."""
    columns = {
        "MathVista_MINI": mathvista(question_type="free_form"), "MathVision_MINI": {"choices": "[]", "category": "algebra", "answer": "4"},
        "MathVerse_MINI": {
            "question_type": "free-form", "problem_version": "Vision Only", "metadata": "{'subject': 'x'}", "answer": "4"
        },
        "LogicVista": {"skill": "spatial", "answer": "A, C"}, "VisuLogic": {"category": "shape", "answer": "B"},
    }  # fmt: skip
    rows = (
        [row | WEMATH for row in problem(2, "7", "111")]
        if name == "WeMath"
        else [columns[name]] * 3
    )
    rows = [
        {key: value for key, value in row.items() if key != "response"} | {"question": "sum>"}
        for row in rows
    ]
    file = write(tmp_path / "b.tsv", rows)
    config = evaluation.Config(
        model=image_world.path("model"), data=(f"{name}={file}",), template="none", max_tokens=12, max_prompt_tokens=4096,
        out=str(tmp_path / "out"), judge_url="http://127.0.0.1:9/v1", judge_model="gone",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evals.judge.time.sleep", lambda _: None)
        evaluation.main(config)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    figures, said = summary["benchmarks"][name], capsys.readouterr().out
    samples = [
        json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    ]
    assert figures["questions"] == len(rows) == len(samples)
    assert len(rows) - figures["unjudged"] == summary["sets"].get(name, {"problems": 0})["problems"]
    assert figures["unjudged"] == sum(bool(sample["error"]) for sample in samples) and name in said
    assert figures["correct"] == sum(sample["correct"] for sample in samples)
    assert all("<|image_pad|><|image_pad|>" not in sample["prompt"] for sample in samples)
    assert ("refused" in said) == (figures["unjudged"] > 0)


def test_benchmarks_where_they_cannot_be(tmp_path, image_world, world):
    file = write(tmp_path / "b.tsv", [mathvista(question_type="free_form")])
    config = evaluation.Config(
        model=image_world.path("model"), template="none", problem_column="prompt"
    )
    model, data = rollout.find_model(config.model), f"MathVista_MINI={file}"
    for arguments, words in [
        (
            (("MathVista_MINI",), config, model, {}),
            "needs its TSV file: --data MathVista_MINI=FILE",
        ),
        (((data,), config, model), "scored from one sample a question, by eval.py"),
        (((data,), replace(config, samples=2), model, {}), "one sample a question"),
        (
            ((data,), config, rollout.find_model(world.path("model")), {}),
            "takes none; expected a vision-language model",
        ),
    ]:
        with pytest.raises(ValueError, match=words):
            evaluation.load_sets(*arguments)
