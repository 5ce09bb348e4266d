"""Write arithmetic word problems of one step: a task that a small language model does in part.

    python benchmarks/word_problems.py --folder runs/words

Writes train.jsonl and test.jsonl (columns problem, answer), and solutions.jsonl (problem, solution)
for the offline start of the flow. No problem stands in two of the files. A solution is a sentence
with the calculation in it, such as `Anna has 5 + 3 = 8 apples now.`

And template.txt, a prompt in the format of ChatML with three examples: without them a model of 135 M
parameters, sampled at temperature 1, tells stories of its own.
"""

import repository  # noqa: F401

# isort: split
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

from infra import errors
from infra.ranges import BatchSize, Range, Seed, check_values

NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Frank", "Grace", "Henry", "Ines", "Jack")
THINGS = ("apples", "books", "coins", "eggs", "flowers", "marbles", "pencils", "stickers")

EXAMPLES = (
    (
        "Leo has 4 pens and gets 3 more. How many pens does Leo have now?",
        "Leo has 4 + 3 = 7 pens now.",
    ),
    (
        "There are 9 cups on a table. Mia takes 2. How many cups are left?",
        "There are 9 - 2 = 7 cups left.",
    ),
    ("Tom has 3 bags with 5 nuts each. How many nuts does Tom have?", "Tom has 3 * 5 = 15 nuts."),
)


class Story(NamedTuple):
    """A kind of problem: the text, and the sentence that solves it."""

    sign: str
    problem: str
    solution: str


STORIES = (
    Story(
        "+",
        "{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?",
        "{name} has {a} + {b} = {c} {things} now.",
    ),
    Story(
        "+",
        "{name} finds {a} {things} on Monday and {b} {things} on Tuesday. "
        "How many {things} does {name} find in total?",
        "{name} finds {a} + {b} = {c} {things} in total.",
    ),
    Story(
        "-",
        "{name} has {a} {things} and gives {b} of them away. "
        "How many {things} does {name} have left?",
        "{name} has {a} - {b} = {c} {things} left.",
    ),
    Story(
        "-",
        "There are {a} {things} in a box. {name} takes out {b}. How many {things} are left?",
        "There are {a} - {b} = {c} {things} left.",
    ),
    Story(
        "*",
        "{name} has {a} boxes with {b} {things} each. How many {things} does {name} have?",
        "{name} has {a} * {b} = {c} {things}.",
    ),
    Story(
        "/",
        "{name} puts {a} {things} into {b} boxes, the same number in each. "
        "How many {things} are in a box?",
        "There are {a} / {b} = {c} {things} in a box.",
    ),
)


@dataclass(frozen=True)
class Settings:
    """How many problems, and where."""

    folder: str = "runs/words"  # Folder for the files
    n_train: BatchSize = 2000  # Training problems
    n_test: BatchSize = 128  # Held-out problems
    n_solutions: BatchSize = 1000  # Problems with solutions
    # Largest number in a sum or difference
    largest: Annotated[int, Range(3, 10**6)] = 12
    seed: Seed = 0  # Seed of the problems


def draw_numbers(sign: str, largest: int, rng: random.Random) -> tuple[int, int, int]:
    """Return two numbers and what the operation makes of them, all at least 1."""
    if sign == "+":
        a = rng.randint(2, largest)
        b = rng.randint(2, largest)
        return a, b, a + b
    if sign == "-":
        a = rng.randint(3, largest)
        b = rng.randint(2, a - 1)
        return a, b, a - b
    a = rng.randint(2, 9)
    b = rng.randint(2, 9)
    if sign == "*":
        return a, b, a * b
    return a * b, b, a


def make_problem(largest: int, rng: random.Random) -> dict[str, str]:
    """Return a random problem with its solution and answer."""
    story = rng.choice(STORIES)
    a, b, c = draw_numbers(story.sign, largest, rng)
    words = {"name": rng.choice(NAMES), "things": rng.choice(THINGS), "a": a, "b": b, "c": c}
    return {
        "problem": story.problem.format(**words),
        "solution": story.solution.format(**words),
        "answer": str(c),
    }


def make_problems(settings: Settings) -> list[dict[str, str]]:
    """Return as many different problems as all files need."""
    rng = random.Random(f"word problems {settings.seed}")
    n_problems = settings.n_train + settings.n_test + settings.n_solutions
    by_text = {}
    for _ in range(4 * n_problems):
        problem = make_problem(settings.largest, rng)
        by_text[problem["problem"]] = problem
        if len(by_text) == n_problems:
            return list(by_text.values())
    raise ValueError(
        f"only {len(by_text)} different problems with numbers up to {settings.largest}, expected "
        f"{n_problems}: ask for fewer, or raise --largest"
    )


def make_template() -> str:
    """Return a prompt with examples, and {problem} where the problem goes."""
    turns = []
    for problem, solution in EXAMPLES:
        turns.append(f"<|im_start|>user\n{problem}<|im_end|>\n")
        turns.append(f"<|im_start|>assistant\n{solution}<|im_end|>\n")
    turns.append("<|im_start|>user\n{problem}<|im_end|>\n<|im_start|>assistant\n")
    return "".join(turns)


def write(file: Path, problems: list[dict[str, str]], columns: tuple[str, ...]) -> None:
    """Write some columns of problems, one JSON object a line."""
    with open(file, "w") as lines:
        for i, problem in enumerate(problems):
            row = {"id": f"{file.stem}-{i}"}
            row.update({column: problem[column] for column in columns})
            lines.write(json.dumps(row) + "\n")


def main(settings: Settings) -> None:
    """Write the three files of problems, and the template."""
    check_values(settings)
    problems = make_problems(settings)
    end_of_test = settings.n_test
    end_of_train = end_of_test + settings.n_train
    folder = Path(settings.folder)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "test.jsonl", problems[:end_of_test], ("problem", "answer"))
    write(folder / "train.jsonl", problems[end_of_test:end_of_train], ("problem", "answer"))
    write(folder / "solutions.jsonl", problems[end_of_train:], ("problem", "solution"))
    (folder / "template.txt").write_text(make_template())
    print(f"{len(problems)} word problems are in {folder}")


if __name__ == "__main__":
    errors.run(lambda: main(tyro.cli(Settings)))
