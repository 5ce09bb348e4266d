"""Files of vision-language benchmarks for tests, with rows that hold a response to be scored."""

import base64
import csv
import io
from pathlib import Path

from PIL import Image

from evals import vlm
from evals.question import Question


def picture(colour: str) -> str:
    """A small PNG image in base64."""
    data = io.BytesIO()
    Image.new("RGB", (28, 28), colour).save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


RED = picture("red")
BLUE = picture("blue")


def write_rows(file: Path, rows: list[dict], **shared) -> Path:
    """Write a TSV file; rows get an index and, from the second on, the first row's image."""
    complete = []
    for i, row in enumerate(rows):
        image = RED if i == 0 else "0"
        complete.append({"index": str(i), "image": image, **shared, **row})
    columns = dict.fromkeys(column for row in complete for column in row)
    with file.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, list(columns), delimiter="\t")
        writer.writeheader()
        writer.writerows(complete)
    return file


def without_response(row: dict) -> dict:
    return {column: cell for column, cell in row.items() if column != "response"}


def load_rows(name: str, file: Path, rows: list[dict], **shared) -> list[Question]:
    """Write the rows without their responses, and load them."""
    rows = [without_response(row) for row in rows]
    return vlm.load_benchmark(name, write_rows(file, rows, **shared))


def score_rows(name: str, file: Path, rows: list[dict], pool, judge=None, **shared):
    """Write the rows, load them, and score their responses; return questions, figures, records."""
    questions = load_rows(name, file, rows, **shared)
    responses = [row["response"] for row in rows]
    figures, records = vlm.score(name, questions, responses, pool, judge)
    assert [record["gold"] for record in records] == [question.gold for question in questions]
    return questions, figures, records


def outcomes(records: list[dict]) -> list[tuple]:
    return [(record["extracted"], record["how"], record["verdict"]) for record in records]


def mathvista_row(**cells) -> dict:
    """A row of MathVista, multiple choice and without options unless the cells say otherwise."""
    return {
        "question": "What?",
        "answer": "8/11",
        "task": "VQA",
        "skills": "['algebra', 'counting']",
        "question_type": "multi_choice",
        "answer_type": "text",
        "choices": "[]",
        "answer_option": "",
        **cells,
    }


def choice_row(response: str, **cells) -> dict:
    """A row of MathVista with three options, of which B is right."""
    choices = "['3/11', '8/11', '3/5']"
    return mathvista_row(choices=choices, answer_option="B", response=response, **cells)


def integer_row(response: str, answer: str = "14") -> dict:
    """A row of MathVista with a number as its answer."""
    return mathvista_row(
        question_type="free_form", answer_type="integer", answer=answer, response=response
    )
