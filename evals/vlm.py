r"""Six vision-language benchmarks: their public TSV files, prompts, answers and scores.

    questions = load_benchmark("WeMath", "WeMath.tsv")
    figures, records = score("WeMath", questions, responses, pool, judge)
    print(table({"WeMath": figures}))

The files are those of VLMEvalKit: one row for each question, with its image in base64 or the index
of the row that holds the image. The prompts are those that the official run sends with its copy of
VLMEvalKit: the text, then the images, to a chat model without a system prompt of its own.

The answer is taken from the last `\boxed{…}`, else from the answer tag, else by the rules of the
benchmark. A judge (judge.py) reads the responses in which the rules find no answer. A question that
nobody could read is *unjudged*, neither right nor wrong. The score is taken over the other
questions; `low` and `high` are what it would be if all unjudged answers were wrong, or right.

Scores depart from VLMEvalKit's where those are wrong: VLMEvalKit guesses an option at random when
the judge fails, evaluates texts as Python, and marks every free text of MathVista as wrong.
"""

import ast
import base64
import csv
import io
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from PIL import Image

from evals.figures import Point, percent
from evals.judge import Judge, Reply, judge_prompt, understand
from evals.question import Question, QuestionType, Row
from grading.latex import boxes
from grading.options import (
    JOINED_BOXES,
    LABELLED,
    blank,
    letter_in_response,
    option_letter,
    option_letters,
    stated,
    tagged,
    value,
)

Equal = Callable[[str, str], bool]  # equal(gold, prediction)
Verdict = bool | None  # whether an answer is right; None where nobody could read it


class Task(NamedTuple):
    """What a row asks, before the benchmark's prompt is put around it."""

    text: str
    gold: str
    choices: dict[str, str]
    type: QuestionType


class Benchmark(NamedTuple):
    """What sets a benchmark apart from the others."""

    columns: tuple[str, ...]  # those needed beside index, image, question and answer
    read: Callable[[Row], Task]  # raises ValueError for a cell that it cannot read
    groups: Callable[[Row], list[str]]  # names of the groups that a row counts in; may raise too
    score: Callable[[Sequence[Question], Sequence[Verdict]], dict]  # with at least `score`
    # What `score` is made of; nothing of what nobody could judge
    list_points: Callable[[Sequence[Question], Sequence[Verdict]], list[Point]]


# ---- Prompts, word for word as in the official run, with its slips and doubled backslashes
class Prompt(NamedTuple):
    """What stands around a question."""

    before: str = ""
    after: str = ""


SOLVE = (
    "Solve the question. The user asks a question, and you solves it. You first thinks about the "
    "reasoning process in the mind and then provides the user with the answer. "
)
LATEX = (
    "The answer is in latex format and wrapped in $...$. "
    r"The final answer must be wrapped using the \\boxed{} command. "
)
THINK = "Think step by step logically, considering all relevant information before answering."
GUESS = (
    "If you are uncertain or the problem is too complex, make a reasoned guess based on the "
    "information provided. Avoid repeating steps indefinitely—provide your best guess even if "
    "unsure. " + THINK
)
MATHVISTA_FORM = (
    "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> "
    "tags, respectively, i.e., <think> Since $1+1=2$, so the answer is $2$. </think>"
    r"<answer> The answer is $\\boxed{2}$ </answer>, "
    "which means assistant's output should start with <think> and end with </answer>.\n"
)
MATHVISION_FORM = (
    "\nAnswer the preceding question. You first thinks about the reasoning process in the mind "
    "and then provides the user with the answer. "
    + LATEX
    + "The answer should be enclosed within <answer> </answer> tags, i.e., Since $1+1=2$, so the "
    r"answer is $2$. <answer> The answer is $\\boxed{2}$ </answer>, "
    "which means the final answer assistant's output should start with <answer> and end with "
    "</answer>. "
)
MATHVERSE_FORM = (
    r"The final answer should be wrapped using the \\boxed{} command and enclosed within <answer> "
    "</answer> tags, i.e., Since $1+1=2$, so the answer is $2$. "
    r"<answer> $\\boxed{2}$ </answer>."
    "\n"
)
LOGICVISTA_FORM = (
    "\nAnswer the preceding question. The last line of your response should follow this format: "
    r"'Answer: \boxed{$FINAL_ANSWER}' (without quotes), where 'FINAL_ANSWER' is your conclusion "
    "based on the reasoning provided. "
)
VISULOGIC_FORM = (
    "\nAnswer the preceding multiple choice question. The last line of your response should follow "
    r"this format: 'Answer: \boxed{$LETTER}' (without quotes), where LETTER is one of the options. "
)
PROMPTS = {
    "MathVista_MINI": Prompt(before=SOLVE + LATEX + MATHVISTA_FORM),
    "MathVision_MINI": Prompt(after=MATHVISION_FORM + THINK),
    "MathVerse_MINI": Prompt(before=SOLVE + MATHVERSE_FORM, after="\n" + THINK),
    "WeMath": Prompt(),  # its questions say how to answer
    "LogicVista": Prompt(after=LOGICVISTA_FORM + GUESS),
    "VisuLogic": Prompt(after=VISULOGIC_FORM + GUESS),
}


# ---- Files
LONGEST_REFERENCE = 64  # characters of an image cell: a longer one is an image, not an index


def load_benchmark(name: str, file: str | Path) -> list[Question]:
    """Load the questions of a benchmark from its TSV file.

    Args:
        name: A key of BENCHMARKS.
        file: The TSV file as VLMEvalKit's data server has it.

    Raises:
        ValueError: For an unknown name, a missing file or column, and, with the index of its row,
            for a value or an image that is not as it should be.
    """
    benchmark = find_benchmark(name)
    columns = ("index", "image", "question", "answer", *benchmark.columns)
    rows = read_tsv(Path(file), columns)
    images = read_images(rows)
    questions = []
    for row in rows:
        try:
            task = read_task(benchmark, row)
        except ValueError as error:
            raise ValueError(f"{file}, row {row['index']}: {error}") from error
        questions.append(make_question(PROMPTS[name], row, task, images[row["index"]]))
    if name == "WeMath":
        wemath_problems(questions)  # raises for a problem that is not whole
    return questions


def read_task(benchmark: Benchmark, row: Row) -> Task:
    """Read what a row asks, and check all of its cells that are used later."""
    task = benchmark.read(row)
    benchmark.groups(row)  # raises for a cell that it cannot read
    is_no_option = task.type == "choice" and task.gold not in task.choices
    if not task.gold or is_no_option:
        expected = f"one of {', '.join(task.choices)}" if task.choices else "an answer"
        raise ValueError(f"answer {task.gold!r}; expected {expected}")
    return task


def make_question(prompt: Prompt, row: Row, task: Task, images: tuple[bytes, ...]) -> Question:
    """Put the prompt around a task, and its images at the end."""
    text = task.text.replace("<image>", "")  # would ask for one more image
    placeholders = "<image>" * len(images)
    return Question(
        index=row["index"],
        prompt=prompt.before + text + prompt.after + placeholders,
        images=images,
        gold=task.gold,
        choices=task.choices,
        type=task.type,
        row={column: cell for column, cell in row.items() if column != "image"},
    )


def read_tsv(file: Path, columns: Sequence[str]) -> list[Row]:
    """Read a TSV file that starts with a line of column names.

    Raises:
        ValueError: If the file does not exist, is cut short, or lacks one of the columns.
    """
    if not file.is_file():
        raise ValueError(
            f"no file {file}; expected a benchmark's TSV file, as VLMEvalKit's data server has it"
        )
    csv.field_size_limit(2**31 - 1)  # an image is one field
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, delimiter="\t", strict=True)
            rows = list(reader)
    except (csv.Error, UnicodeDecodeError) as error:
        place = f"{file}, near line {reader.line_num + 1}"
        raise ValueError(f"{place}: {error}; expected tab-separated UTF-8") from error
    names = reader.fieldnames or []
    missing = [column for column in columns if column not in names]
    if missing:
        present = ", ".join(names) or "nothing"
        raise ValueError(f"{file} has no column {', '.join(missing)}; found {present}")
    if not rows:
        raise ValueError(f"{file} holds no rows; expected one for each question")
    check_rows(file, rows, len(names))
    return rows


def check_rows(file: Path, rows: Sequence[Row], n_columns: int) -> None:
    """Raise ValueError for a row with too many or too few cells, or an index that stands twice."""
    indices = set()
    for row in rows:
        index = row["index"]
        # DictReader puts spare cells under the key None, and None into missing ones.
        if None in row or None in row.values():
            raise ValueError(
                f"{file}, row {index}: does not have {n_columns} cells; is the file whole?"
            )
        if index in indices:
            raise ValueError(f"{file}: index {index} is there twice")
        indices.add(index)


def read_images(rows: Sequence[Row]) -> dict[str, tuple[bytes, ...]]:
    """Return index -> images of every row; a row may name another row that holds its images."""
    cells = {row["index"]: row["image"].strip() for row in rows}
    decoded = {}
    for index, cell in cells.items():
        if len(cell) > LONGEST_REFERENCE:
            decoded[index] = decode(cell, index)
    images = dict(decoded)
    for index, cell in cells.items():
        if index in decoded:
            continue
        if cell in decoded:
            images[index] = decoded[cell]
        elif cell in cells:
            raise ValueError(f"row {index}: image {cell!r} refers to a row without one of its own")
        else:
            raise ValueError(f"row {index}: image {cell!r} is neither an image nor a row's index")
    return images


def decode(cell: str, index: str) -> tuple[bytes, ...]:
    """Decode a cell with one image in base64, or with a Python list of such images."""
    texts = [cell]
    if cell.startswith("["):
        texts = [str(item) for item in read_literal(cell, list)]
    return tuple(decode_image(text, index) for text in texts)


def decode_image(text: str, index: str) -> bytes:
    """Decode an image in base64; ValueError if it is none, or not whole."""
    try:
        data = base64.b64decode(re.sub(r"\s", "", text), validate=True)
        Image.open(io.BytesIO(data)).load()
    except (ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"row {index}: broken image {text[:40]!r}… ({error}); expected PNG or JPEG in base64"
        ) from error
    return data


def read_literal(text: str, kind: type):
    """Read a Python literal of a type without evaluating anything; ValueError if it is none."""
    try:
        content = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"{text[:80]!r} is not a Python {kind.__name__} ({error})") from error
    if not isinstance(content, kind):
        actual = type(content).__name__
        raise ValueError(f"{text[:80]!r} is a {actual}; expected a {kind.__name__}")
    return content


# ---- Rows: what a row of each benchmark asks, and the groups that it counts in.
# All of these functions raise ValueError for a cell that they cannot read.
VERSIONS = ("Text Dominant", "Text Lite", "Vision Intensive", "Vision Dominant", "Vision Only")
SKILLS = ("inductive", "deductive", "numerical", "spatial", "mechanical")
WEMATH_KEYS = re.compile(r"(2steps_([12]|multi)|3steps_([123]|multi))")
MATHVERSE_OPTION = re.compile(r"^\s*\(?([A-H])\s*[:.)]\s*(.*?)\s*$", re.MULTILINE)


def without_texts(letters: str) -> dict[str, str]:
    """Return options whose texts are not known, e.g. since they stand in the image."""
    return dict.fromkeys(letters, "")


def read_options(cell: str) -> dict[str, str]:
    """Return letter -> text of the options in a Python list; none for an empty cell."""
    if not cell.strip():
        return {}
    options = read_literal(cell, list)
    return {chr(ord("A") + i): str(option) for i, option in enumerate(options)}


def check_cell(row: Row, column: str, expected: Sequence[str]) -> str:
    """Return a cell that has one of the expected values; ValueError if it has another."""
    cell = row[column]
    if cell not in expected:
        raise ValueError(f"{column} {cell!r}; expected {' or '.join(expected)}")
    return cell


def read_mathvista(row: Row) -> Task:
    question_type = check_cell(row, "question_type", ("multi_choice", "free_form"))
    if question_type == "multi_choice":
        choices = read_options(row["choices"])
        return Task(row["question"], row["answer_option"].strip(), choices, "choice")
    answer_type = check_cell(row, "answer_type", ("integer", "float", "text", "list"))
    gold = row["answer"].strip()
    if answer_type == "list":
        return Task(row["question"], gold, {}, "list")
    return Task(row["question"], gold, {}, "free")


def mathvista_groups(row: Row) -> list[str]:
    if not row["skills"].strip().startswith("["):
        return [row["task"], row["skills"]]
    skills = read_literal(row["skills"], list)
    return [row["task"], *map(str, skills)]


def read_mathvision(row: Row) -> Task:
    gold = row["answer"].strip()
    choices = read_options(row["choices"])
    if choices:
        return Task(row["question"], gold, choices, "choice")
    return Task(row["question"], gold, {}, "free")


def category_groups(row: Row) -> list[str]:
    return [row["category"]]


def read_mathverse(row: Row) -> Task:
    gold = row["answer"].strip()
    check_cell(row, "problem_version", VERSIONS)
    question_type = check_cell(row, "question_type", ("multi-choice", "free-form"))
    if question_type == "free-form":
        return Task(row["question"], gold, {}, "free")
    # In some versions the question stands in the image alone; this column has it as text.
    text = row.get("question_for_eval") or row["question"]
    choices = dict(MATHVERSE_OPTION.findall(text.rpartition("Choices:")[2]))
    if gold not in choices:
        choices = without_texts("ABCDEFGH")
    return Task(row["question"], gold, choices, "choice")


def mathverse_groups(row: Row) -> list[str]:
    metadata = read_literal(row["metadata"], dict)
    groups = [row["problem_version"]]
    for key in ("subject", "subfield"):
        if key in metadata:
            groups.append(str(metadata[key]))
    return groups


def read_wemath(row: Row) -> Task:
    if not WEMATH_KEYS.fullmatch(row["key"]):
        raise ValueError(
            f"key {row['key']!r}; "
            "expected 2steps_1, 2steps_2, 2steps_multi, 3steps_1 … 3steps_multi"
        )
    options = options_of_columns(row)
    text = add_options(row, options).rstrip()
    return Task(text, row["answer"].strip(), options, "choice")


def wemath_groups(row: Row) -> list[str]:
    """Return `1-step` for a step, else the number of steps of the whole problem."""
    if row["key"].endswith("multi"):
        return [f"{row['key'][0]}-step"]
    return ["1-step"]


def read_logicvista(row: Row) -> Task:
    gold = row["answer"].strip()
    letters = option_letters(gold)
    if letters:
        return Task(row["question"], letters, {}, "letters")
    return Task(row["question"], gold, {}, "free")


def logicvista_groups(row: Row) -> list[str]:
    return [skill for skill in SKILLS if skill in row["skill"].lower()]


def read_visulogic(row: Row) -> Task:
    options = options_of_columns(row)
    request = "Answer the question directly."
    if options:
        request = "Please select the correct answer from the options above."
    text = f"{add_options(row, options)}\n{request}"
    return Task(text, row["answer"].strip(), options or without_texts("ABCD"), "choice")


def options_of_columns(row: Row) -> dict[str, str]:
    """Return letter -> text of the options in the columns A to H, where there is one."""
    options = {}
    for letter in "ABCDEFGH":
        text = row.get(letter, "").strip()
        if text:
            options[letter] = text
    return options


def add_options(row: Row, options: Mapping[str, str]) -> str:
    """Return a question with its hint and its options, laid out as in VLMEvalKit."""
    text = row["question"]
    hint = row.get("hint", "").strip()
    if hint:
        text = f"Hint: {hint}\nQuestion: {text}\n"
    if options:
        text += "Options:\n"
    for letter, option in options.items():
        text += f"{letter}. {option}\n"
    return text


# ---- Answers
LIST_START = re.compile(r"^[\s$\\\[({]+")
LIST_END = re.compile(r"(?<![\s$\\\])}])[\s$\\\])}]++$")  # a run is tried from its beginning alone


class Reading(NamedTuple):
    """What was read in a response."""

    answer: str | None  # '' where the judge says that the response gives none
    how: Literal["boxed", "tag", "letter", "phrase", "judge", "none"]
    error: str | None = None  # why nobody could read it


def extract(question: Question, response: str, equal: Equal) -> Reading:
    """Find the answer of a response by the rules.

    Args:
        equal: equal(gold, prediction) -> bool compares an answer with the texts of options.

    Returns:
        The answer and the rule that found it; None and "none" where they find no answer. Where a
        response has a final answer, in a box or a tag, nothing before it counts: if the rules
        cannot read that answer, it is for the judge.
    """
    filled = [box for box in boxes(response) if box.strip()]
    tags = list(tagged(response))
    if filled:
        how = "boxed"
        answer = read_boxes(question, response, filled, equal)
    elif any(tag.strip() for tag in tags):
        how = "tag"
        content = value(stated(tags[-1]) or tags[-1])
        answer = read_answer(question, tags[-1], content, equal)
    elif question.type in ("choice", "letters"):
        how = "letter"
        answer = read_letters(question, after_thought(response))
    else:
        how = "phrase"
        text = after_thought(response)
        answer = value(stated(text) or text)
    if not answer:
        return Reading(None, "none")
    return Reading(answer, how)


def after_thought(response: str) -> str:
    """Return what follows the thought of a response, all of it if no thought is marked."""
    return response.rpartition("</think>")[2]


def read_boxes(
    question: Question, response: str, filled: Sequence[str], equal: Equal
) -> str | None:
    r"""Return the answer in the boxes of a response that are not empty, or None.

    The last box counts. Several boxes beside each other, e.g. `\boxed{A}, \boxed{C}`, are one
    answer where several letters are asked for, and otherwise no answer.
    """
    distinct = list(dict.fromkeys(filled))
    if len(distinct) == 1 or not JOINED_BOXES.search(response):
        return read_answer(question, filled[-1], filled[-1].strip(), equal)
    if question.type == "letters":
        return option_letters(", ".join(distinct))
    return None


def read_answer(question: Question, text: str, content: str | None, equal: Equal) -> str | None:
    """Return the answer in the text of a box or a tag, or None.

    Args:
        content: The text without words around it, None if there is nothing but words.
    """
    if question.type == "letters":
        return option_letters(text)
    if question.type == "choice":
        return read_option(question.choices, text, content, equal)
    return content or None


def read_option(
    choices: Mapping[str, str], text: str, content: str | None, equal: Equal
) -> str | None:
    """Return the letter of the one option that a text names, by its letter or by what it says."""
    letter = option_letter(text, choices) or letter_in_response(text, choices)
    if letter:
        return letter
    labelled = LABELLED.fullmatch(blank(text))  # e.g. `B. 12 cm`
    if labelled and equal(choices.get(labelled[1], ""), labelled[2]):
        return labelled[1]
    if not content:
        return None
    same = [letter for letter, option in choices.items() if option and equal(option, content)]
    return same[0] if len(same) == 1 else None


def read_letters(question: Question, text: str) -> str | None:
    """Return the letter that a response without boxes and tags ends up with, or its letters."""
    if question.type == "letters":
        letters = option_letters(stated(text) or "")
        if letters:
            return letters
    return letter_in_response(text, question.choices)


def is_right(question: Question, answer: str, equal: Equal) -> bool:
    """Return whether an answer is the gold."""
    if question.type in ("choice", "letters"):
        return answer == question.gold
    if answer.strip().casefold() == question.gold.casefold():
        return True
    if question.type == "free":
        return equal(question.gold, answer)
    golds = split_list(question.gold)
    items = split_list(answer)
    if len(golds) != len(items):
        return False
    return all(equal(gold, item) for gold, item in zip(golds, items, strict=True))


def split_list(text: str) -> list[str]:
    r"""Return the items of a list such as `[1, 2]` or `$\{1, 2\}$`."""
    inner = LIST_END.sub("", LIST_START.sub("", text))
    return inner.split(",")


# ---- Scores
def accuracy(verdicts: Sequence[float | None]) -> float | None:
    """Return the mean over what is judged, None if nothing is."""
    judged = [verdict for verdict in verdicts if verdict is not None]
    if not judged:
        return None
    return sum(judged) / len(judged)


def score_by_question(questions: Sequence[Question], verdicts: Sequence[Verdict]) -> dict:
    """Return the mean over all questions as `score`."""
    return {"score": accuracy(verdicts)}


def list_questions(questions: Sequence[Question], verdicts: Sequence[Verdict]) -> list[Point]:
    """Return a point for each question that was judged."""
    points = []
    for question, verdict in zip(questions, verdicts, strict=True):
        if verdict is not None:
            points.append(Point(question.index, float(verdict)))
    return points


def score_mathverse(questions: Sequence[Question], verdicts: Sequence[Verdict]) -> dict:
    """Return the mean of the accuracies of the versions, which weigh the same, as `score`."""
    versions = defaultdict(list)
    for question, verdict in zip(questions, verdicts, strict=True):
        versions[question.row["problem_version"]].append(verdict)
    accuracies = [accuracy(version) for version in versions.values()]
    return {"score": accuracy(accuracies), "versions": len(versions)}


def list_mathverse(questions: Sequence[Question], verdicts: Sequence[Verdict]) -> list[Point]:
    """Return a point for each question that was judged, with its version as the part.

    Where the file says which questions are versions of one problem, they are drawn together.
    """
    points = []
    for question, verdict in zip(questions, verdicts, strict=True):
        if verdict is not None:
            problem = question.row.get("problem_index") or question.index
            points.append(Point(problem, float(verdict), question.row["problem_version"]))
    return points


def wemath_problems(questions: Sequence[Question]) -> dict[tuple[str, str], dict[str, int]]:
    """Group WeMath's questions into problems.

    Returns:
        (number of steps, ID) -> part -> index into questions; the parts of a problem of two steps
        are `1`, `2` and `multi`, the whole problem.

    Raises:
        ValueError: If a part of a problem is missing or stands twice.
    """
    problems = defaultdict(dict)
    for i, question in enumerate(questions):
        identity = question.row["ID"]
        key = question.row["key"]
        n_steps, part = key.split("steps_")
        parts = problems[n_steps, identity]
        if part in parts:
            raise ValueError(
                f"WeMath problem {identity}: {key} is there twice, in row {question.index}"
            )
        parts[part] = i
    for (n_steps, identity), parts in problems.items():
        expected = [*"123"[: int(n_steps)], "multi"]
        missing = [f"{n_steps}steps_{part}" for part in expected if part not in parts]
        if missing:
            raise ValueError(f"WeMath problem {identity} lacks {', '.join(missing)}")
    return dict(problems)


def score_wemath(questions: Sequence[Question], verdicts: Sequence[Verdict]) -> dict:
    """Return WeMath's strict and loose scores and the number of problems of each of its four kinds.

    All steps right, the whole wrong:      IG, inadequate generalisation
    A step wrong, the whole wrong:         IK, insufficient knowledge
    A step wrong, the whole right:         RM, rote memorisation (loose: every step is wrong)
    otherwise, the whole right:            CM, complete mastery

    score = (N - 0.5 IG - IK - RM) / N over the N problems all of whose parts have a verdict.
    """
    counts = dict.fromkeys(["IG", "IK", "RM_strict", "RM_loose", "CM_strict", "CM_loose"], 0)
    n = 0
    for parts in wemath_problems(questions).values():
        whole = verdicts[parts["multi"]]
        steps = [verdicts[i] for part, i in parts.items() if part != "multi"]
        if whole is None or None in steps:
            continue
        n += 1
        if whole:
            counts["CM_strict"] += all(steps)
            counts["RM_strict"] += not all(steps)
            counts["CM_loose"] += any(steps)
            counts["RM_loose"] += not any(steps)
        else:
            counts["IG"] += all(steps)
            counts["IK"] += not all(steps)
    figures = {"score": None, "loose": None, "problems": n}
    if n > 0:
        points = n - 0.5 * counts["IG"] - counts["IK"]
        figures["score"] = (points - counts["RM_strict"]) / n
        figures["loose"] = (points - counts["RM_loose"]) / n
    figures.update(counts)
    return figures


def list_wemath(questions: Sequence[Question], verdicts: Sequence[Verdict]) -> list[Point]:
    """Return a point for each problem whose parts were all judged: its share of the strict score."""
    points = []
    for (n_steps, identity), parts in wemath_problems(questions).items():
        whole = verdicts[parts["multi"]]
        steps = [verdicts[i] for part, i in parts.items() if part != "multi"]
        if whole is None or None in steps:
            continue
        value = 0.0  # IK or RM
        if all(steps):
            value = 1.0 if whole else 0.5  # CM or IG
        points.append(Point(f"{n_steps} {identity}", value))
    return points


BENCHMARKS = {
    "MathVista_MINI": Benchmark(
        columns=("question_type", "answer_type", "choices", "answer_option", "task", "skills"),
        read=read_mathvista,
        groups=mathvista_groups,
        score=score_by_question,
        list_points=list_questions,
    ),
    "MathVision_MINI": Benchmark(
        columns=("choices", "category"),
        read=read_mathvision,
        groups=category_groups,
        score=score_by_question,
        list_points=list_questions,
    ),
    "MathVerse_MINI": Benchmark(
        columns=("question_type", "problem_version", "metadata"),
        read=read_mathverse,
        groups=mathverse_groups,
        score=score_mathverse,
        list_points=list_mathverse,
    ),
    "WeMath": Benchmark(
        columns=("ID", "key", "A", "B"),
        read=read_wemath,
        groups=wemath_groups,
        score=score_wemath,
        list_points=list_wemath,
    ),
    "LogicVista": Benchmark(
        columns=("skill",),
        read=read_logicvista,
        groups=logicvista_groups,
        score=score_by_question,
        list_points=list_questions,
    ),
    "VisuLogic": Benchmark(
        columns=("category",),
        read=read_visulogic,
        groups=category_groups,
        score=score_by_question,
        list_points=list_questions,
    ),
}


def find_benchmark(name: str) -> Benchmark:
    if name not in BENCHMARKS:
        raise ValueError(f"benchmark {name!r}; expected one of {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def score(
    name: str,
    questions: Sequence[Question],
    responses: Sequence[str],
    pool,
    judge: Judge | None = None,
) -> tuple[dict, list[dict]]:
    """Score the responses to a benchmark's questions.

    Args:
        name: A key of BENCHMARKS.
        responses: One for each question. An empty one is wrong.
        pool: A grading.Pool, of which `equal(gold, prediction)` and `counts` are used.
        judge: Reads the responses in which the rules find no answer.

    Returns:
        The figures and a record for each question. Figures: `score`, and `low` and `high` if all
        unjudged were wrong or right; `groups`, the accuracy of each group; `timeouts`, how many
        answers took the pool too long; the numbers of `questions`, of `correct` and of `unjudged`;
        the shares `unextracted`, which the rules could not read, and `judged`, which the judge
        read; for MathVerse the number of `versions`; for WeMath what score_wemath returns.

    Raises:
        ValueError: For an unknown name, or a number of responses that is not that of questions.
    """
    benchmark = find_benchmark(name)
    n = len(questions)
    if n == 0 or n != len(responses):
        raise ValueError(
            f"{len(responses)} responses to {n} questions; expected one each, and at least one"
        )
    timeouts_before = pool.counts["timeout"]
    with ThreadPoolExecutor(8) as threads:  # they wait for the processes of the pool
        by_rules = list(threads.map(partial(extract, equal=pool.equal), questions, responses))
        readings = read_rest(questions, responses, by_rules, judge)
        verdicts = list(threads.map(partial(decide, equal=pool.equal), questions, readings))
    figures = summarise(benchmark, questions, verdicts)
    figures["timeouts"] = pool.counts["timeout"] - timeouts_before
    figures["questions"] = n
    figures["correct"] = sum(verdict is True for verdict in verdicts)
    figures["unextracted"] = sum(reading.answer is None for reading in by_rules) / n
    figures["judged"] = sum(reading.how == "judge" for reading in readings) / n
    figures["unjudged"] = sum(verdict is None for verdict in verdicts)
    return figures, list(map(make_record, questions, readings, verdicts))


def read_rest(
    questions: Sequence[Question],
    responses: Sequence[str],
    readings: Sequence[Reading],
    judge: Judge | None,
) -> list[Reading]:
    """Return the readings with those of the judge where the rules found no answer, or an error."""
    rest = [i for i, reading in enumerate(readings) if reading.answer is None]
    rest = [i for i in rest if responses[i].strip()]
    completed = list(readings)
    if judge is None:
        for i in rest:
            completed[i] = Reading(None, "none", error="no judge")
    elif rest:
        prompts = [judge_prompt(questions[i], responses[i]) for i in rest]
        questions_by_prompt = defaultdict(list)
        for i, prompt in zip(rest, prompts, strict=True):
            questions_by_prompt[prompt].append(questions[i])

        def is_understood(prompt: str, reply: str) -> bool:
            """Return whether the reply has an answer to every question that asks so."""
            asking = questions_by_prompt[prompt]
            return all(understand(question, reply) is not None for question in asking)

        replies = judge.ask(prompts, is_understood)
        for i, reply in zip(rest, replies, strict=True):
            completed[i] = read_reply(questions[i], reply)
    return completed


def read_reply(question: Question, reply: Reply) -> Reading:
    """Return the answer in a judge's reply, or the error why there is none."""
    if reply.text is None:
        return Reading(None, "none", error=reply.error)
    answer = understand(question, reply.text)
    if answer is None:
        error = f"the judge's reply is not understood: {reply.text[:200]!r}"
        return Reading(None, "none", error=error)
    return Reading(answer, "judge")


def decide(question: Question, reading: Reading, equal: Equal) -> Verdict:
    """Return whether what was read is right, or None if nobody could read the response."""
    if reading.error is not None:
        return None
    if not reading.answer:
        return False
    return is_right(question, reading.answer, equal)


def make_record(question: Question, reading: Reading, verdict: Verdict) -> dict:
    words = {True: "correct", False: "wrong", None: "unjudged"}
    record = {
        "index": question.index,
        "gold": question.gold,
        "extracted": reading.answer,
        "how": reading.how,
        "verdict": words[verdict],
    }
    if reading.error is not None:
        record["error"] = reading.error
    return record


def summarise(
    benchmark: Benchmark, questions: Sequence[Question], verdicts: Sequence[Verdict]
) -> dict:
    """Return the benchmark's own figures, the bounds of its score and each group's accuracy."""
    if_wrong = [verdict is True for verdict in verdicts]
    if_right = [verdict is not False for verdict in verdicts]
    figures = benchmark.score(questions, verdicts)
    figures["low"] = benchmark.score(questions, if_wrong)["score"]
    figures["high"] = benchmark.score(questions, if_right)["score"]
    groups = defaultdict(list)
    for question, verdict in zip(questions, verdicts, strict=True):
        for group in benchmark.groups(question.row):
            groups[group].append(verdict)
    figures["groups"] = {group: accuracy(groups[group]) for group in sorted(groups)}
    return figures


# ---- For the screen
WIDTHS = {
    "score": 8,
    "if unjudged wrong – right": 28,
    "questions": 11,
    "unextracted": 13,
    "judged": 9,
    "unjudged": 10,
}
MOST_REASONS = 5
MOST_INDICES = 10  # that are listed for a reason


def table(rows: dict[str, dict]) -> str:
    """Lay out the figures of score(), by name of the benchmark, with a line for each group."""
    lines = [table_line("", list(WIDTHS))]
    for name, figures in rows.items():
        bounds = ""
        if figures["unjudged"]:
            bounds = f"{percent(figures['low'])} – {percent(figures['high'])}"
        cells = [
            percent(figures["score"]),
            bounds,
            str(figures["questions"]),
            percent(figures["unextracted"]),
            percent(figures["judged"]),
            str(figures["unjudged"]),
        ]
        lines.append(table_line(name, cells))
        if "loose" in figures:
            loose = percent(figures["loose"])
            lines.append(f"{loose:>26}  loose, both of {figures['problems']} problems")
        for group, share in figures["groups"].items():
            lines.append(f"{percent(share):>26}  {group}")
    return "\n".join(lines)


def table_line(name: str, cells: Sequence[str]) -> str:
    padded = [cell.rjust(width) for cell, width in zip(cells, WIDTHS.values(), strict=True)]
    return f"{name:18}{''.join(padded)}"


def unjudged(records: Sequence[dict]) -> str:
    """List the questions that nobody judged by reason, the most frequent ones; '' without any."""
    indices_by_reason = defaultdict(list)
    for record in records:
        if record["verdict"] == "unjudged":
            indices_by_reason[record["error"]].append(record["index"])
    reasons = sorted(indices_by_reason, key=lambda reason: -len(indices_by_reason[reason]))
    lines = []
    for reason in reasons[:MOST_REASONS]:
        indices = indices_by_reason[reason]
        line = f"unjudged, {len(indices)} questions: {reason}: {', '.join(indices[:MOST_INDICES])}"
        if len(indices) > MOST_INDICES:
            line += f" and {len(indices) - MOST_INDICES} more"
        lines.append(line)
    if len(reasons) > MOST_REASONS:
        lines.append(f"and {len(reasons) - MOST_REASONS} other reasons, see the records")
    return "\n".join(lines)
