r"""The six vision-language benchmarks: their public TSV files, prompts, answers and scores.

    questions = load_benchmark("WeMath", "WeMath.tsv")
    figures, records = score("WeMath", questions, responses, grader, judge)
    print(table({"WeMath": figures}))

The files are VLMEvalKit's: a row a question, its image in base64 or the index of the row that has it. Prompts are those that the
official run sends with its copy of VLMEvalKit: the text, then the images, to a chat model without a system prompt of its own.

An answer is looked for in the last `\boxed{…}`, then in the answer tag, then by the benchmark's rules; a judge reads what is
left. A question that nobody could read is *unjudged*: neither right nor wrong. Scores are over the others, `low` and `high`
are the scores if all unjudged were wrong, or right. Scores depart from VLMEvalKit's where that is wrong: it guesses an option
at random when the judge fails, evaluates texts as Python, and no free text of MathVista can be right.
"""

import ast
import base64
import csv
import io
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

from PIL import Image

from evals.judge import Judge, judge_prompt, understand
from grading.latex import boxes
from grading.options import (
    JOINED_BOXES,
    LABELLED,
    blank,
    letter_in_response,
    option_letter,
    option_letters,
    stated,
    value,
)

LONGEST_REFERENCE = (
    64  # characters of an image cell; a longer one is an image, a shorter one a row's index
)
VERSIONS = ("Text Dominant", "Text Lite", "Vision Intensive", "Vision Dominant", "Vision Only")
SKILLS = ("inductive", "deductive", "numerical", "spatial", "mechanical")

# ---- Prompts, word for word as in the official run, its slips and doubled backslashes included
SOLVE = (
    "Solve the question. The user asks a question, and you solves it. You first thinks about the reasoning process in the mind "
    "and then provides the user with the answer. "
)
LATEX = r"The answer is in latex format and wrapped in $...$. The final answer must be wrapped using the \\boxed{} command. "
GUESS = (
    "If you are uncertain or the problem is too complex, make a reasoned guess based on the information provided. "
    "Avoid repeating steps indefinitely—provide your best guess even if unsure. "
    "Think step by step logically, considering all relevant information before answering."
)
STEPS = "Think step by step logically, considering all relevant information before answering."
PROMPTS = {  # what stands before and behind the question
    "MathVista_MINI": (
        SOLVE + LATEX + "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, "
        r"respectively, i.e., <think> Since $1+1=2$, so the answer is $2$. </think><answer> The answer is $\\boxed{2}$ </answer>, "
        "which means assistant's output should start with <think> and end with </answer>.\n",
        "",
    ),
    "MathVision_MINI": (
        "",
        "\nAnswer the preceding question. You first thinks about the reasoning process in the mind and then provides the user "
        "with the answer. " + LATEX + "The answer should be enclosed within <answer> </answer> tags, i.e., Since $1+1=2$, so the "
        r"answer is $2$. <answer> The answer is $\\boxed{2}$ </answer>, which means the final answer assistant's output should "
        "start with <answer> and end with </answer>. " + STEPS,
    ),
    "MathVerse_MINI": (
        SOLVE + r"The final answer should be wrapped using the \\boxed{} command and enclosed within <answer> </answer> tags, "
        r"i.e., Since $1+1=2$, so the answer is $2$. <answer> $\\boxed{2}$ </answer>." + "\n",
        "\n" + STEPS,
    ),
    "WeMath": ("", ""),  # its questions say themselves how to answer
    "LogicVista": (
        "",
        "\nAnswer the preceding question. The last line of your response should follow this format: "
        r"'Answer: \boxed{$FINAL_ANSWER}' (without quotes), where 'FINAL_ANSWER' is your conclusion based on the reasoning "
        "provided. " + GUESS,
    ),
    "VisuLogic": (
        "",
        "\nAnswer the preceding multiple choice question. The last line of your response should follow this format: "
        r"'Answer: \boxed{$LETTER}' (without quotes), where LETTER is one of the options. " + GUESS,
    ),
}  # fmt: skip


class Question(NamedTuple):
    """One row of a benchmark, ready to be asked and scored."""

    index: str
    prompt: str  # with `<image>` where an image goes
    images: tuple[bytes, ...]  # encoded, as PNG or JPEG
    gold: str  # a letter, several letters in order, a list as `[1, 2]`, or a text
    choices: dict[
        str, str
    ]  # texts of the options by letter, empty where they stand in the image; {} if there are none
    type: Literal["choice", "letters", "list", "free"]
    row: dict[str, str]  # the row's columns, without the image


# ---- Files
def load_benchmark(name: str, path: str | Path) -> list[Question]:
    """Load a benchmark's TSV file; ValueError with the row's index where a column, a value or an image is not as it should be."""
    benchmark = find(name)
    rows = read_tsv(Path(path), ("index", "image", "question", "answer", *benchmark.columns))
    images = read_images(rows)
    before, behind = PROMPTS[name]
    questions = []
    for row in rows:
        try:
            text, gold, choices, kind = benchmark.read(row)
            benchmark.groups(row)  # raises for a cell that it cannot read
            if not gold or (kind == "choice" and gold not in choices):
                raise ValueError(
                    f"answer {gold!r}; expected "
                    + (f"one of {', '.join(choices)}" if choices else "an answer")
                )
        except ValueError as error:
            raise ValueError(f"{path}, row {row['index']}: {error}") from error
        shown = "<image>" * len(images[row["index"]])
        prompt = (
            before + text.replace("<image>", "") + behind + shown
        )  # in a text it would ask for an image more
        rest = {column: value for column, value in row.items() if column != "image"}
        questions.append(
            Question(row["index"], prompt, images[row["index"]], gold, choices, kind, rest)
        )
    if name == "WeMath":
        problems(questions)
    return questions


def read_tsv(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Read a TSV file with a header; ValueError where it is not there, is cut short, or lacks columns."""
    if not path.is_file():
        raise ValueError(
            f"no file {path}; expected a benchmark's TSV file, as VLMEvalKit's data server has it"
        )
    csv.field_size_limit(2**31 - 1)  # an image is one field
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t", strict=True)
            rows = list(reader)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}, near line {reader.line_num + 1}: {error}; expected tab-separated UTF-8"
        ) from error
    found = reader.fieldnames or []
    if missing := [column for column in columns if column not in found]:
        raise ValueError(
            f"{path} has no column {', '.join(missing)}; found {', '.join(found) or 'nothing'}"
        )
    if not rows:
        raise ValueError(f"{path} holds no rows; expected one a question")
    seen = set()
    for row in rows:
        if None in row or None in row.values():
            raise ValueError(
                f"{path}, row {row['index']}: other than {len(found)} cells; is the file whole?"
            )
        if row["index"] in seen:
            raise ValueError(f"{path}: index {row['index']} is there twice")
        seen.add(row["index"])
    return rows


def read_images(rows: Sequence[dict[str, str]]) -> dict[str, tuple[bytes, ...]]:
    """Decode the images of all rows, by index; a row may name another that has them."""
    cells = {row["index"]: row["image"].strip() for row in rows}
    images = {
        index: decode(cell, index) for index, cell in cells.items() if len(cell) > LONGEST_REFERENCE
    }
    for index, cell in cells.items():
        if index not in images:
            if cell not in images or len(cells[cell]) <= LONGEST_REFERENCE:
                what = (
                    "refers to a row without one of its own"
                    if cell in cells
                    else "is neither an image nor a row's index"
                )
                raise ValueError(f"row {index}: image {cell!r} {what}")
            images[index] = images[cell]
    return images


def decode(cell: str, index: str) -> tuple[bytes, ...]:
    """Decode an image cell, one image in base64 or a list of them."""
    decoded = []
    for text in literal(cell, list) if cell.startswith("[") else [cell]:
        try:
            data = base64.b64decode(re.sub(r"\s", "", str(text)), validate=True)
            Image.open(io.BytesIO(data)).load()
        except (ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"row {index}: broken image {str(text)[:40]!r}… ({error}); expected PNG or JPEG in base64"
            ) from error
        decoded.append(data)
    return tuple(decoded)


def literal(text: str, kind: type):
    """Read a Python literal of a kind, without evaluating anything; ValueError if it is none."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"{text[:80]!r} is not a Python {kind.__name__} ({error})") from error
    if not isinstance(value, kind):
        raise ValueError(f"{text[:80]!r} is a {type(value).__name__}; expected a {kind.__name__}")
    return value


# ---- Rows: text, gold, choices, type
def listed(cell: str) -> dict[str, str]:
    """Return the options of a cell with a Python list, by letter."""
    options = literal(cell, list) if cell.strip() else []
    return {chr(ord("A") + i): str(option) for i, option in enumerate(options)}


def one_of(value: str, known: Sequence[str], column: str) -> str:
    if value not in known:
        raise ValueError(f"{column} {value!r}; expected {' or '.join(known)}")
    return value


def read_mathvista(row):
    if (
        one_of(row["question_type"], ("multi_choice", "free_form"), "question_type")
        == "multi_choice"
    ):
        return row["question"], row["answer_option"].strip(), listed(row["choices"]), "choice"
    kind = one_of(row["answer_type"], ("integer", "float", "text", "list"), "answer_type")
    return row["question"], row["answer"].strip(), {}, "list" if kind == "list" else "free"


def read_mathvision(row):
    choices = listed(row["choices"])
    return row["question"], row["answer"].strip(), choices, "choice" if choices else "free"


def read_mathverse(row):
    gold, _ = row["answer"].strip(), one_of(row["problem_version"], VERSIONS, "problem_version")
    if one_of(row["question_type"], ("multi-choice", "free-form"), "question_type") == "free-form":
        return row["question"], gold, {}, "free"
    said = (row.get("question_for_eval") or row["question"]).rpartition("Choices:")[2]
    choices = dict(re.findall(r"^\s*\(?([A-H])\s*[:.)]\s*(.*?)\s*$", said, re.MULTILINE))
    return (
        row["question"],
        gold,
        choices if gold in choices else dict.fromkeys("ABCDEFGH", ""),
        "choice",
    )


def with_options(row) -> tuple[str, dict[str, str]]:
    """Return a question with its hint and the options of the columns A, B, C …, and these options."""
    options = {letter: row[letter].strip() for letter in "ABCDEFGH" if row.get(letter, "").strip()}
    text = (
        f"Hint: {hint}\nQuestion: {row['question']}\n"
        if (hint := row.get("hint", "").strip())
        else row["question"]
    )
    return text + ("Options:\n" if options else "") + "".join(
        f"{k}. {option}\n" for k, option in options.items()
    ), options


def read_wemath(row):
    if not re.fullmatch(r"(2steps_([12]|multi)|3steps_([123]|multi))", row["key"]):
        raise ValueError(
            f"key {row['key']!r}; expected 2steps_1, 2steps_2, 2steps_multi, 3steps_1 … 3steps_multi"
        )
    text, options = with_options(row)
    return text.rstrip(), row["answer"].strip(), options, "choice"


def read_logicvista(row):
    letters = option_letters(row["answer"].strip())
    return row["question"], letters or row["answer"].strip(), {}, "letters" if letters else "free"


def read_visulogic(row):
    text, options = with_options(row)
    ask = (
        "Please select the correct answer from the options above."
        if options
        else "Answer the question directly."
    )
    return f"{text}\n{ask}", row["answer"].strip(), options or dict.fromkeys("ABCD", ""), "choice"


# ---- Answers
def extract(
    question: Question, response: str, equal: Callable[[str, str], bool]
) -> tuple[str | None, str]:
    """Return the answer of a response by the rules, None if they find none, and how: boxed, tag, letter, phrase or none."""

    def answer(text: str, sure: bool) -> str | None:
        if question.type == "letters":
            return option_letters(text)
        said = text.strip() if sure else value(stated(text) or text)
        if question.type != "choice":
            return said or None
        if letter := option_letter(text, question.choices) or letter_in_response(
            text, question.choices
        ):
            return letter
        if (match := LABELLED.fullmatch(blank(text))) and equal(
            question.choices.get(match[1], ""), match[2]
        ):
            return match[1]
        same = [
            letter
            for letter, option in question.choices.items()
            if option and said and equal(option, said)
        ]
        return same[0] if len(same) == 1 else None

    found = [box for box in boxes(response) if box.strip()]
    tags = re.findall(r"<answer>(.*?)</answer>", response, re.DOTALL)
    if found or any(
        tag.strip() for tag in tags
    ):  # a final answer that cannot be read is the judge's, whatever went before
        if (
            JOINED_BOXES.search(response) and len(set(found)) > 1
        ):  # several beside each other: all of them, or none
            found = [", ".join(dict.fromkeys(found))]
            read = answer(found[0], sure=True) if question.type == "letters" else None
            return read, "boxed" if read else "none"
        read, how = (
            (answer(found[-1], sure=True), "boxed")
            if found
            else (answer(tags[-1], sure=False), "tag")
        )
        return read, how if read else "none"
    rest = response.rpartition("</think>")[2]
    if question.type in ("choice", "letters"):
        several = option_letters(stated(rest) or "") if question.type == "letters" else None
        letter = several or letter_in_response(rest, question.choices)
        return letter, "letter" if letter else "none"
    phrase = value(stated(rest) or rest)
    return phrase, "phrase" if phrase else "none"


def right(question: Question, answer: str, equal: Callable[[str, str], bool]) -> bool:
    """Return whether an answer is the gold."""
    if question.type in ("choice", "letters"):
        return answer == question.gold
    if answer.strip().casefold() == question.gold.casefold():
        return True
    if question.type != "list":
        return equal(question.gold, answer)
    gold, found = (
        re.sub(r"^[\s$\\\[({]+|[\s$\\\])}]+$", "", text).split(",")
        for text in (question.gold, answer)
    )
    return len(gold) == len(found) and all(equal(*pair) for pair in zip(gold, found, strict=True))


# ---- Scores
def accuracy(verdicts: Sequence[bool | float | None]) -> float | None:
    """Return the mean over what is judged, None if nothing is."""
    judged = [verdict for verdict in verdicts if verdict is not None]
    return sum(judged) / len(judged) if judged else None


def mean_accuracy(questions: Sequence[Question], verdicts: Sequence[bool | None]) -> dict:
    return {"score": accuracy(verdicts)}


def mathverse(questions: Sequence[Question], verdicts: Sequence[bool | None]) -> dict:
    """Return the mean of the accuracies of the versions, each as heavy as the others."""
    versions: dict[str, list[bool | None]] = {}
    for question, verdict in zip(questions, verdicts, strict=True):
        versions.setdefault(question.row["problem_version"], []).append(verdict)
    return {
        "score": accuracy([accuracy(version) for version in versions.values()]),
        "versions": len(versions),
    }


def problems(questions: Sequence[Question]) -> dict[tuple[str, str], dict[str, int]]:
    """Return WeMath's problems: (2 or 3 steps, ID) to the place of each part, `1`, `2`, `3` and `multi`; ValueError if one lacks."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    for place, question in enumerate(questions):
        steps, part = question.row["key"].split("steps_")
        if part in (parts := found.setdefault((steps, question.row["ID"]), {})):
            raise ValueError(
                f"WeMath problem {question.row['ID']}: {question.row['key']} is there twice, in row {question.index}"
            )
        parts[part] = place
    for (steps, identity), parts in found.items():
        if len(parts) <= int(steps):
            lacking = sorted({*"123"[: int(steps)], "multi"} - parts.keys())
            raise ValueError(
                f"WeMath problem {identity} lacks {', '.join(f'{steps}steps_{part}' for part in lacking)}"
            )
    return found


def wemath(questions: Sequence[Question], verdicts: Sequence[bool | None]) -> dict:
    """Return strict and loose score and the four kinds of problems, over problems all of whose parts have a verdict.

    Steps right, whole wrong: inadequate generalisation. A step and the whole wrong: insufficient knowledge. Whole right though
    a step (loose: every step) is wrong: rote memorisation; else complete mastery. score = (N - 0.5 IG - RM - IK) / N.
    """
    counts = dict.fromkeys(["IG", "IK", "RM_strict", "RM_loose", "CM_strict", "CM_loose"], 0)
    n = 0
    for parts in problems(questions).values():
        steps = [verdicts[place] for part, place in parts.items() if part != "multi"]
        whole = verdicts[parts["multi"]]
        if None in (whole, *steps):
            continue
        n += 1
        counts["IG"] += all(steps) and not whole
        counts["IK"] += not all(steps) and not whole
        counts["CM_strict"] += whole and all(steps)
        counts["RM_strict"] += whole and not all(steps)
        counts["CM_loose"] += whole and any(steps)
        counts["RM_loose"] += whole and not any(steps)
    lost = 0.5 * counts["IG"] + counts["IK"]
    strict, loose = (
        (n - lost - counts[kind]) / n if n else None for kind in ("RM_strict", "RM_loose")
    )
    return {"score": strict, "loose": loose, "problems": n} | counts


def skills(cell: str) -> list[str]:
    return [str(skill) for skill in literal(cell, list)] if cell.strip().startswith("[") else [cell]


def mathverse_groups(row: dict[str, str]) -> list[str]:
    metadata = literal(row["metadata"], dict)
    return [
        row["problem_version"],
        *(str(metadata[key]) for key in ("subject", "subfield") if key in metadata),
    ]


class Benchmark(NamedTuple):
    """What is a benchmark's own."""

    columns: tuple[str, ...]  # beside index, image, question, answer
    read: Callable  # row to text, gold, choices, type
    groups: Callable[[dict], list[str]]  # row to the names of the groups that it counts in
    score: Callable[[Sequence[Question], Sequence[bool]], dict] = mean_accuracy


BENCHMARKS = {
    "MathVista_MINI": Benchmark(
        ("question_type", "answer_type", "choices", "answer_option", "task", "skills"),
        read_mathvista,
        lambda row: [row["task"], *skills(row["skills"])],
    ),
    "MathVision_MINI": Benchmark(
        ("choices", "category"), read_mathvision, lambda row: [row["category"]]
    ),
    "MathVerse_MINI": Benchmark(
        ("question_type", "problem_version", "metadata"),
        read_mathverse,
        mathverse_groups,
        mathverse,
    ),
    "WeMath": Benchmark(
        ("ID", "key", "A", "B"),
        read_wemath,
        lambda row: [f"{row['key'][0]}-step" if row["key"].endswith("multi") else "1-step"],
        wemath,
    ),
    "LogicVista": Benchmark(
        ("skill",), read_logicvista, lambda row: [s for s in SKILLS if s in row["skill"].lower()]
    ),
    "VisuLogic": Benchmark(("category",), read_visulogic, lambda row: [row["category"]]),
}


def find(name: str) -> Benchmark:
    if name not in BENCHMARKS:
        raise ValueError(f"benchmark {name!r}; expected one of {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def score(
    name: str,
    questions: Sequence[Question],
    responses: Sequence[str],
    grader,
    judge: Judge | None = None,
) -> tuple[dict, list[dict]]:
    """Score responses, one a question; return figures and a record a question.

    grader has equal(gold, prediction) -> bool; judge has ask(prompts), see judge.py, and reads what the rules cannot. Figures:
    score, low, high (see above), timeouts (of the grader), questions, correct, unextracted (share that the rules could not read), judged (share that
    the judge read), unjudged (number that nobody read), groups (accuracy of each), and WeMath's own. An empty response is wrong.
    """
    benchmark = find(name)
    if not questions or len(questions) != len(responses):
        raise ValueError(
            f"{len(responses)} responses to {len(questions)} questions; expected one each, and at least one"
        )
    timeouts = grader.counts["timeout"]
    with ThreadPoolExecutor(8) as pool:  # the grader's worker processes do the work
        found = list(
            pool.map(
                lambda pair: extract(*pair, grader.equal), zip(questions, responses, strict=True)
            )
        )
        errors = {
            i: "no judge"
            for i, (answer, _) in enumerate(found)
            if answer is None and responses[i].strip()
        }
        unextracted, asked = (
            sum(answer is None for answer, _ in found),
            list(errors) if judge else [],
        )
        replies = (
            judge.ask([judge_prompt(questions[i], responses[i]) for i in asked]) if asked else []
        )
        for i, reply in zip(asked, replies, strict=True):
            answer = None if reply.text is None else understand(questions[i], reply.text)
            if answer is None:
                errors[i] = (
                    reply.error or f"the judge's reply is not understood: {reply.text[:200]!r}"
                )
            else:
                found[i] = answer, "judge"
                del errors[i]

        def verdict(i: int) -> bool | None:
            answer = found[i][0]
            return (
                None if i in errors else bool(answer) and right(questions[i], answer, grader.equal)
            )

        verdicts = list(pool.map(verdict, range(len(questions))))
    words = {True: "correct", False: "wrong", None: "unjudged"}
    records = [
        {
            "index": question.index,
            "gold": question.gold,
            "extracted": answer,
            "how": how,
            "verdict": words[verdict],
        }
        | ({"error": errors[i]} if i in errors else {})
        for i, (question, (answer, how), verdict) in enumerate(
            zip(questions, found, verdicts, strict=True)
        )
    ]
    counts = {
        "timeouts": grader.counts["timeout"] - timeouts,
        "questions": len(questions),
        "correct": sum(verdict is True for verdict in verdicts),
    }
    counts |= {
        "unextracted": unextracted / len(questions),
        "judged": sum(how == "judge" for _, how in found) / len(questions),
    }
    return totals(benchmark, questions, verdicts) | counts | {"unjudged": len(errors)}, records


def totals(
    benchmark: Benchmark, questions: Sequence[Question], verdicts: Sequence[bool | None]
) -> dict:
    """Return the benchmark's own figures, the bounds of its score where some are unjudged, and each group's accuracy."""
    figures = benchmark.score(questions, verdicts)
    for bound, otherwise in {"low": False, "high": True}.items():
        taken = [otherwise if verdict is None else verdict for verdict in verdicts]
        figures[bound] = benchmark.score(questions, taken)["score"]
    groups: dict[str, list[bool | None]] = {}
    for question, verdict in zip(questions, verdicts, strict=True):
        for group in benchmark.groups(question.row):
            groups.setdefault(group, []).append(verdict)
    return figures | {"groups": {group: accuracy(found) for group, found in sorted(groups.items())}}


def table(rows: dict[str, dict]) -> str:
    """Lay out the figures of score(), one row a benchmark, for the screen."""

    def percent(share: float | None) -> str:
        return "–" if share is None else f"{share:.1%}"

    lines = [
        f"{'':18}{'score':>8}{'if unjudged wrong – right':>28}{'questions':>11}{'unextracted':>13}{'judged':>9}{'unjudged':>10}"
    ]
    for name, row in rows.items():
        bounds = f"{percent(row['low'])} – {percent(row['high'])}" if row["unjudged"] else ""
        shares = (
            f"{percent(row['unextracted']):>13}{percent(row['judged']):>9}{row['unjudged']:>10}"
        )
        lines.append(
            f"{name:18}{percent(row['score']):>8}{bounds:>28}{row['questions']:>11}{shares}"
        )
        if "loose" in row:
            lines.append(f"{percent(row['loose']):>26}  loose, both of {row['problems']} problems")
        lines += [f"{percent(share):>26}  {group}" for group, share in row["groups"].items()]
    return "\n".join(lines)


def unjudged(records: Sequence[dict], most: int = 5) -> str:
    """List the questions that nobody judged, by reason, for the screen; empty if there are none."""
    reasons: dict[str, list[str]] = {}
    for record in records:
        if record["verdict"] == "unjudged":
            reasons.setdefault(record["error"], []).append(record["index"])
    lines = []
    for reason, indices in sorted(reasons.items(), key=lambda item: -len(item[1]))[:most]:
        more = f" and {len(indices) - 10} more" if len(indices) > 10 else ""
        lines.append(
            f"unjudged, {len(indices)} questions: {reason}: {', '.join(indices[:10])}{more}"
        )
    if len(reasons) > most:
        lines.append(f"and {len(reasons) - most} other reasons, see the records")
    return "\n".join(lines)
