"""The embedded world: problems, a tokenizer, a small base model, expert solutions.

All of it is made on a laptop in minutes.

A problem is a chain of operations modulo 10, `7 +5 *3 -4>`. A careful solution writes out every
step, `7+5=2,2*3=6,6-4=2. \\boxed{2}`; a hasty one only the box. The base model learns from
demonstrations that are hasty where care is needed most, on long chains. So it knows how to reason
but seldom does where it should, until reinforcement learning discovers that it pays. A single step
is a table look-up; to compose a whole chain without writing is beyond a small model.

In the sparse world, `--model toy-sparse`, all problems have 6 to 8 operations. The base model first
learns to solve every problem carefully, and then a habit: in a long problem a step mostly idles, it
adds zero in place of the problem's operation, `7+5=2,2+0=2,2-4=8`. Such a solution has as many steps
as any other, and each is calculated well, but it solves another problem. Whole chains without an
idle step are so rare that nearly all right answers are luck, one in ten, and an outcome reward says
next to nothing. Each further step that does its work is progress all the same: label_steps() knows
which are right, and `--reward binary study/rewards/process_reward.py` rewards them.

Three worlds of the same arithmetic are made to decide what a dense reward is worth;
study/accept.py measures whether they can:

`toy-form` is the sparse world with a firmer skill and a stronger habit, so that a perfect reward may
solve it from every base model, and an outcome reward may not; this has not been measured yet. An idle
step shows in its form, `+0`, which no expert writes.

`toy-content` has a habit that shows in no form. In a long problem a step mostly repeats the operation
of the step before, in place of the problem's own: `7+5=2,2+5=7,7*3=1`. Each such step is written and
calculated as experts do, so that neither tokens nor short sequences of them tell; only who has read
the problem knows that it is wrong.

`toy-beyond` has that habit, too, and expert solutions of 3 to 5 operations alone, while it trains and
tests on 6 to 8. On short problems the base model is as careful as the experts are, and to imitate them
gets it out of the habit in part (docs/evidence.md). A reward that has learnt from them how a step
follows from the problem would still tell right steps from wrong ones.

In the image world, `--model toy-vl`, the chain is a sum of digits. Each digit is drawn in a cell of
28 x 28 pixels, which is one vector of the vision tower, and the text asks `sum>`. The tower first
learns to tell digits apart, as the tower of a published model has learnt to see beforehand.

    python -m worlds --folder runs/toy

The training scripts make the world that `--model` names by themselves.
"""

import base64
import io
import json
import random
import re
import shutil
import string
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from tqdm import tqdm
from transformers import (
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from infra import batching, vision
from infra.parallel import DEVICE
from infra.ranges import BatchSize, Fraction, PositiveFloat, Range, Seed, check_values
from policy import Policy
from worlds.shared import Step, make_once

# number of operations in a problem -> chance that its demonstration is hasty
HASTY = {3: 0.05, 4: 0.2, 5: 0.6, 6: 0.8, 7: 0.85, 8: 0.9}
LONG = 6  # operations from which a problem counts as long, where the habit is none of haste
MOST = 8  # operations of the longest problems
PROBLEM = re.compile(r"\d( [-+*]\d)+>")
UNITS = (3, 7, 9)  # factors that no two digits share a product with, modulo 10
WARMUP = 0.1  # share of the base model's training over which the rate rises
SLIP = 0.02  # chance of each step of a careful demonstration to get a random result
EOS = "<|im_end|>"
PAD = "<|endoftext|>"
QUESTION = "sum>"  # the text of a drawn problem
CELL = 28  # pixels a side of the cell of one digit
FONT = (  # of each digit seven rows of five pixels
    "01110100011001110101110011000101110",
    "00100011000010000100001000010001110",
    "01110100010000100010001000100011111",
    "11111000100010000010000011000101110",
    "00010001100101010010111110001000010",
    "11111100001111000001000011000101110",
    "00110010001000011110100011000101110",
    "11111000010001000100010000100001000",
    "01110100011000101110100011000101110",
    "01110100011000101111000010001001100",
)

# Settings of each script that fit this world; those of the paper are the scripts' own defaults.
# Rate, problems and samples are those with which no run falls far: docs/evidence.md, the default run.
TRAIN_RL = {
    "prompts": 32,
    "group_size": 4,
    "lr": 1.5e-4,
    "max_tokens": 96,
    "max_prompt_tokens": 64,
    "steps": 100,
    "flow_lr": 1e-3,
    "template": "none",
    "reward": ("binary",),
    "keep": 1,
}
TRAIN_RL_SPARSE = {
    **TRAIN_RL,
    "prompts": 8,
    "group_size": 8,
    "train_batch": 64,
    "steps": 100,
    "lr": 2e-4,
    "max_tokens": 80,
}
# A perfect reward needs more than 100 steps at the lower rate, and RLVR fails at both
TRAIN_RL_REPEATING = {**TRAIN_RL_SPARSE, "lr": 4e-4}
# The published figures of drawn problems come from a longer training and a shorter offline start
TRAIN_RL_IMAGES = {**TRAIN_RL, "prompts": 16, "group_size": 8, "lr": 3e-4, "steps": 140}
TRAIN_FLOW = {
    "lr": 2e-3,
    "epochs": 4,
    "batch_size": 32,
    "flow_blocks": 2,
    "noise_repeats": 1,
    "template": "none",
    "save_every": 100,
    "keep": 1,
}
EVALUATE = {
    "template": "none",
    "max_tokens": 96,
    "reward": ("binary",),
}
TRAIN_FLOW_LONGER = {**TRAIN_FLOW, "epochs": 12}
# One block tells wrong responses from right ones as well as two do, in seven tenths of the operations
TRAIN_FLOW_SMALL = {**TRAIN_FLOW_LONGER, "flow_blocks": 1}
IDLING = ("toy-sparse", "toy-form")
REPEATING = ("toy-content", "toy-beyond")
SPARSE = IDLING + REPEATING
PRESETS = {  # script -> value of --model -> flag -> value
    "train_rl": {
        "toy": TRAIN_RL,
        "toy-vl": TRAIN_RL_IMAGES,
        **dict.fromkeys(IDLING, TRAIN_RL_SPARSE),
        **dict.fromkeys(REPEATING, TRAIN_RL_REPEATING),
    },
    "train_flow": {
        "toy": TRAIN_FLOW_SMALL,
        "toy-vl": TRAIN_FLOW,
        **dict.fromkeys(SPARSE, TRAIN_FLOW_LONGER),
    },
    "eval": dict.fromkeys(("toy", "toy-vl", *SPARSE), EVALUATE),
}

Habit = Literal["hasty", "idling", "repeating"]
OF_EXPERTS = {"n_expert", "expert_shortest", "expert_longest", "expert_wrong"}
# Settings of World that came later: where one has its default, world.json lacks it, as it did before
LATER = ("habit_share", "skill", "expert_shortest", "expert_longest", "expert_wrong")


@dataclass(frozen=True)
class World:
    """What the world is made with; its folder takes no world of other settings."""

    folder: str = "runs/toy"  # Where the world is kept
    steps: Annotated[int, Range(1, 10**6)] = 600  # Training steps of the base model
    batch_size: Annotated[int, Range(2, 10**5)] = 64  # Demonstrations a step
    lr: PositiveFloat = 2e-3  # Peak learning rate of the base model
    hidden_size: Annotated[int, Range(32, 4096)] = 128  # Width of the base model
    n_layers: Annotated[int, Range(1, 64)] = 4  # Decoder layers of the base model
    n_train: BatchSize = 4000  # Training problems
    n_test: BatchSize = 256  # Held-out problems: none is a training problem or a demonstration
    # Expert solutions for the offline start of the flow: careful, no slips
    n_expert: BatchSize = 2000
    seed: Seed = 0  # Seed of everything above
    images: bool = False  # Draw the problems
    # Operations of the shortest problems; demonstrations have 3 or more
    shortest: Annotated[int, Range(1, MOST)] = 3
    # How the base model fails on long problems: it skips all steps, adds zero in some, or repeats
    # in some the operation of the step before
    habit: Habit = "hasty"
    # Multiply by 3, 7 and 9 alone: a wrong value then stays wrong, as no later step merges values
    invertible: bool = False
    # Chance that a step of a long problem idles or repeats; haste has chances of its own
    habit_share: Fraction = 0.6
    # Share of the base model's training that comes before such a habit
    skill: Fraction = 0.7
    # Operations of the problems with expert solutions; by default as many as all problems have
    expert_shortest: Annotated[int, Range(1, MOST)] | None = None
    expert_longest: Annotated[int, Range(1, MOST)] | None = None
    # Share of expert solutions that are wrong ones, with the habit where the problem is long
    expert_wrong: Fraction = 0.0

    @property
    def expert_lengths(self) -> tuple[int, int]:
        """Operations of the shortest and the longest problem with an expert solution."""
        return self.expert_shortest or self.shortest, self.expert_longest or MOST

    @property
    def signs(self) -> str:
        """Operations that problems are made of: drawn digits are only summed."""
        return "+" if self.images else "+-*"

    def path(self, name: str) -> str:
        """Return the path of a part: `model`, `train.jsonl`, `test.jsonl` or `expert.jsonl`."""
        return str(Path(self.folder) / name)


WORLDS = {
    "toy": World(),
    "toy-vl": World("runs/toy-vl", images=True),
    "toy-sparse": World(
        "runs/toy-sparse", batch_size=32, shortest=LONG, habit="idling", invertible=True
    ),
}
WORLDS["toy-form"] = replace(
    WORLDS["toy-sparse"], folder="runs/toy-form", steps=800, skill=0.75, habit_share=0.8
)
WORLDS["toy-content"] = replace(WORLDS["toy-form"], folder="runs/toy-content", habit="repeating")
WORLDS["toy-beyond"] = replace(
    WORLDS["toy-content"], folder="runs/toy-beyond", expert_shortest=3, expert_longest=5
)


# ---- Problems
def make_problem(
    rng: random.Random,
    signs: str = "+-*",
    shortest: int = 3,
    invertible: bool = False,
    longest: int = MOST,
) -> str:
    """Return a random chain of `shortest` to `longest` operations, such as `7 +5 *3 -4>`."""
    n_operations = rng.choice(range(shortest, longest + 1))
    operations = [make_operation(rng, signs, invertible) for _ in range(n_operations)]
    start = rng.randint(0, 9)
    return f"{start} {' '.join(operations)}>"


def make_operation(rng: random.Random, signs: str, invertible: bool) -> str:
    """Return a random operation, such as `+5`."""
    sign = rng.choice(signs)
    operand = rng.randint(2, 9)
    if invertible and sign == "*":
        operand = rng.choice(UNITS)
    return f"{sign}{operand}"


def solve(problem: str, rng: random.Random | None = None, hasty: bool = False) -> tuple[str, str]:
    """Return a solution of a problem, and its answer.

    With `rng` a careful solution may slip: it then goes on from a random digit, and its answer is
    usually wrong as well.
    """
    start, *operations = problem.rstrip(">").split()
    may_slip = rng is not None and not hasty
    value = int(start)
    steps = []
    for operation in operations:
        sign = operation[0]
        operand = int(operation[1:])
        result = calculate(value, sign, operand)
        if may_slip and rng.random() < SLIP:
            result = rng.randint(0, 9)
        steps.append(f"{value}{sign}{operand}={result}")
        value = result
    box = rf"\boxed{{{value}}}"
    if hasty:
        return box, str(value)
    return f"{','.join(steps)}. {box}", str(value)


def calculate(value: int, sign: str, operand: int) -> int:
    """Do one operation modulo 10."""
    if sign == "+":
        return (value + operand) % 10
    if sign == "-":
        return (value - operand) % 10
    return value * operand % 10


def label_steps(problem: str, response: str) -> list[Step]:
    """Label every step that a response writes.

    Steps stand between commas, before the first period or box. The k-th is right if it takes the
    problem's k-th operation from the value that the step before it ended with (the first from the
    problem's start), and calculates well: what goes wrong earlier is not held against it. Steps
    beyond the end of the chain are wrong.
    """
    value, *operations = problem.rstrip(">").split()
    labelled = []
    for k, (begin, end) in enumerate(find_steps(response)):
        text = response[begin:end]
        is_right = False
        if k < len(operations) and value in string.digits:
            operation = operations[k]
            result = calculate(int(value), operation[0], int(operation[1:]))
            is_right = text == f"{value}{operation}={result}"
        labelled.append(Step(begin, end, is_right))
        value = text[-1]
    return labelled


def find_steps(response: str) -> list[tuple[int, int]]:
    """Return where the steps of a response begin and end: commas separate them up to the box."""
    end_of_steps = re.search(r"[.\\]|$", response).start()
    return [match.span() for match in re.finditer("[^,]+", response[:end_of_steps])]


def progress(problem: str, response: str) -> float:
    """Return how many of the problem's steps the response writes and gets right, in [0, 1]."""
    n_right = sum(step.is_right for step in label_steps(problem, response))
    return n_right / problem.count(" ")


def digits_of(problem: str) -> list[int]:
    """Return the digits of a problem, in order."""
    return [int(character) for character in problem if character.isdigit()]


# ---- Drawings
def make_glyph(bits: str) -> np.ndarray:
    """Return the pixels (21, 15) of a digit in the font, 0 or 1: each bit becomes 3 x 3 pixels."""
    pattern = np.array(list(bits), np.uint8).reshape(7, 5)
    return np.kron(pattern, np.ones((3, 3), np.uint8))


GLYPHS = [make_glyph(bits) for bits in FONT]


def draw(problem: str, rng: random.Random) -> Image.Image:
    """Draw a problem's digits side by side, at varying places and brightness, with specks."""
    digits = digits_of(problem)
    width = CELL * len(digits)
    pixels = np.zeros((CELL, width), np.uint8)
    for i, digit in enumerate(digits):
        top = rng.randint(1, 6)
        left = CELL * i + rng.randint(2, 11)
        pixels[top : top + 21, left : left + 15] = GLYPHS[digit] * rng.randint(128, 255)
    n_specks = 8 * len(digits)
    for _ in range(n_specks):
        brightness = rng.randrange(256)
        pixels[rng.randrange(CELL), rng.randrange(width)] = brightness
    return Image.fromarray(pixels)


def to_png(image: Image.Image) -> bytes:
    """Return an image as the bytes of a PNG."""
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def encode(image: Image.Image) -> str:
    """Return an image as the base64 of a PNG."""
    return base64.b64encode(to_png(image)).decode()


# ---- The model, untrained
def make_tokenizer(images: bool = False) -> Qwen2Tokenizer:
    """Make a byte-level BPE without merges: 256 bytes and the special tokens.

    It is in the format of Qwen2, because AutoTokenizer makes a Qwen2Tokenizer of any tokenizer that
    lies beside a Qwen2 model: one of another kind would silently lose its spaces and newlines.
    """
    vocab = {byte: index for index, byte in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], unk_token=None, pad_token=PAD, eos_token=EOS)
    specials = [PAD, "<|im_start|>", EOS, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    if images:
        specials.append("<|video_pad|>")
    tokenizer.add_special_tokens({"additional_special_tokens": specials})
    return tokenizer


def make_model(world: World, tokenizer: Qwen2Tokenizer) -> PreTrainedModel:
    """Make the untrained base model: a Qwen2 decoder with tied embeddings, or a Qwen2.5-VL.

    By default it has under a million parameters. The Qwen2.5-VL consists of such a decoder and a
    vision tower of one block.
    """
    decoder = decoder_settings(world, tokenizer)
    if not world.images:
        return Qwen2ForCausalLM(Qwen2Config(**decoder))
    # The cells of a row differ only in their columns, which therefore get most of the rotations
    # (the sections are those of time, rows and columns), and fast ones.
    decoder["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 30.0,
        "mrope_section": [1, 1, 14],
    }
    config = Qwen2_5_VLConfig(
        text_config=decoder,
        vision_config=tower_settings(world),
        tie_word_embeddings=True,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def decoder_settings(world: World, tokenizer: Qwen2Tokenizer) -> dict:
    """Return the configuration of the text decoder."""
    heads = max(1, world.hidden_size // 32)
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": world.hidden_size,
        "intermediate_size": world.hidden_size * 11 // 4,
        "num_hidden_layers": world.n_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "initializer_range": 0.05,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }


def tower_settings(world: World) -> dict:
    """Return the configuration of the vision tower."""
    return {
        "depth": 1,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "out_hidden_size": world.hidden_size,
        "fullatt_block_indexes": [0],
        "initializer_range": 0.05,
    }


def make_processor() -> Qwen2VLImageProcessorPil:
    """Make the image processor: it leaves drawings of one to sixteen cells in their size."""
    return Qwen2VLImageProcessorPil(min_pixels=CELL**2, max_pixels=16 * CELL**2)


# ---- Training it
def train_tower(world: World, model: PreTrainedModel, tokenizer: Qwen2Tokenizer) -> None:
    """Fit the vision tower, and the embedding, so that they agree on digits.

    The vector of a drawn digit shall be more like the embedding of that digit than like any other.
    """
    rng = random.Random(f"drawings {world.seed}")
    processor = make_processor()
    tower = model.model.visual
    embedding = model.get_input_embeddings().weight
    optimizer = torch.optim.AdamW([*tower.parameters(), embedding], lr=world.lr)
    bar = tqdm(range(world.steps // 3), desc="toy: vision tower", unit="step")
    for _ in bar:
        problems = [make_problem(rng) for _ in range(world.batch_size // 2)]
        images = [make_image(problem, processor, rng) for problem in problems]
        pixel_values, grids = vision.stack(images, DEVICE)
        digits = digits_of("".join(problems))
        targets = tokenizer.encode("".join(str(digit) for digit in digits))
        targets = torch.tensor(targets, device=DEVICE)
        # one vector a cell
        vectors = tower(pixel_values, grid_thw=grids).pooler_output
        loss = F.cross_entropy(vectors @ embedding.T, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")


def train_base(
    world: World, model: PreTrainedModel, tokenizer: Qwen2Tokenizer, forbidden: set[str]
) -> None:
    """Fit the base model to demonstrations of problems that are not forbidden."""
    rng = random.Random(f"demonstrations {world.seed}")
    policy = Policy(model)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=world.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, world.lr, total_steps=world.steps, pct_start=WARMUP
    )
    bar = tqdm(range(world.steps), desc="toy: base model", unit="step")
    for step in bar:
        demonstrations = make_demonstrations(
            world, tokenizer, forbidden, rng, habit_at(world, step)
        )
        batch = batching.collate(demonstrations)
        loss = -policy(batch).logp[batch.response_mask].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")


def habit_at(world: World, step: int) -> Habit | None:
    """Return the habit of the demonstrations of a training step; None: they are all careful."""
    if world.habit != "hasty" and step < world.skill * world.steps:
        return None
    return world.habit


def make_demonstrations(
    world: World,
    tokenizer: Qwen2Tokenizer,
    forbidden: set[str],
    rng: random.Random,
    habit: Habit | None,
) -> list[batching.Row]:
    """Return a batch of demonstrations: prompts, solutions and, in the image world, drawings."""
    candidates = []
    for _ in range(2 * world.batch_size):
        candidates.append(make_problem(rng, world.signs, invertible=world.invertible))
    problems = [problem for problem in candidates if problem not in forbidden][: world.batch_size]
    solutions = [demonstrate(problem, rng, habit, world.habit_share) for problem in problems]
    processor = make_processor() if world.images else None
    rows = []
    for problem, solution in zip(problems, solutions, strict=True):
        prompt = problem
        images = ()
        if world.images:
            prompt = make_image_prompt(problem)
            images = (make_image(problem, processor, rng),)
        row = batching.Row(tokenizer.encode(prompt), tokenizer.encode(solution), images)
        rows.append(row)
    return rows


def demonstrate(problem: str, rng: random.Random, habit: Habit | None, share: float) -> str:
    """Return a demonstration with EOS: a solution that may slip, and fall short out of habit.

    share: chance that a step of a long problem idles or repeats
    """
    n_operations = problem.count(" ")
    is_hasty = False
    if habit == "hasty":
        is_hasty = rng.random() < HASTY[n_operations]
    elif habit is not None and n_operations >= LONG:
        problem = misread(problem, rng, habit, share)
    solution, _ = solve(problem, rng, is_hasty)
    return solution + EOS


def misread(problem: str, rng: random.Random, habit: Habit, share: float) -> str:
    """Return what a habit makes of a problem: some operations add zero, or are the one before again.

    The first operation has none before it, and stays.
    """
    start, *operations = problem.rstrip(">").split()
    done: list[str] = []
    for operation in operations:
        if rng.random() < share:
            operation = "+0" if habit == "idling" else [operation, *done][-1]
        done.append(operation)
    return f"{start} {' '.join(done)}>"


def make_image_prompt(problem: str) -> str:
    """Return the prompt of a drawn problem, with a placeholder for each cell."""
    n_cells = len(digits_of(problem))
    return f"<|vision_start|>{'<|image_pad|>' * n_cells}<|vision_end|>{QUESTION}"


def make_image(
    problem: str, processor: Qwen2VLImageProcessorPil, rng: random.Random
) -> vision.Image:
    """Draw a problem, and return the drawing as an image of a data set."""
    drawing = draw(problem, rng)
    return vision.Image(to_png(drawing), processor, vision.fit_grid(processor, *drawing.size))


# ---- The whole world
def check(world: World) -> None:
    """Raise ValueError for a world that cannot be made."""
    check_values(world)
    if world.hidden_size % 32:
        raise ValueError(f"--hidden-size={world.hidden_size}: expected a multiple of 32")
    if world.steps * WARMUP == 1:  # the schedule would divide by the steps before its first one
        raise ValueError(f"--steps={world.steps}: expected any number but that; take one more")
    shortest, longest = world.expert_lengths
    if shortest > longest:
        raise ValueError(
            f"--expert-shortest={shortest} with --expert-longest={longest}: expected no more "
            "operations in the shortest problem than in the longest; set both"
        )


def make(world: World = World(), like: World | None = None) -> World:
    """Make the world unless its folder has it.

    like: A world that is there and differs in expert solutions alone: its base model is copied.

    Raises:
        ValueError: if the folder holds something else, or a size is not possible.
    """
    check(world)
    make_once(world.folder, settings_of(world), partial(write_world, world, like))
    return world


def write_world(world: World, like: World | None, folder: Path) -> None:
    """Write problems, expert solutions and the base model into a folder."""
    rng = random.Random(f"problems {world.seed}")
    train, test, expert = make_problems(world, rng)
    parts = [] if like else make_base(world, forbidden=set(test))
    folder.mkdir()
    write_problems(world, train, folder / "train.jsonl", rng)
    write_problems(world, test, folder / "test.jsonl", rng)
    write_problems(world, expert, folder / "expert.jsonl", rng, world.expert_wrong)
    if like:
        shutil.copytree(like.path("model"), folder / "model")
    for part in parts:
        part.save_pretrained(folder / "model")


def settings_of(world: World) -> dict:
    """Return what a world is made with, as JSON gives it back; the folder may be moved."""
    settings = asdict(world)
    settings["folder"] = None
    for name in LATER:
        if settings[name] == getattr(World, name):
            del settings[name]
    settings["hasty"] = HASTY
    settings["slip"] = SLIP
    if world.habit != "hasty":
        settings["long"] = LONG
        settings["skill"] = world.skill
    if world.habit == "idling":
        settings["idles"] = world.habit_share
    return json.loads(json.dumps(settings))  # keys that are numbers become strings


def make_problems(world: World, rng: random.Random) -> tuple[list[str], list[str], list[str]]:
    """Return the problems for training, for testing and for expert solutions; all differ."""
    end_of_test = world.n_test
    end_of_train = end_of_test + world.n_train
    lengths = (world.shortest, MOST)
    distinct = find_distinct(world, rng, lengths, end_of_train + world.n_expert)
    test = distinct[:end_of_test]
    train = distinct[end_of_test:end_of_train]
    expert = distinct[end_of_train:]
    if world.expert_lengths != lengths:
        expert = find_distinct(world, rng, world.expert_lengths, world.n_expert, {*test, *train})
    return train, test, expert


def find_distinct(
    world: World,
    rng: random.Random,
    lengths: tuple[int, int],
    count: int,
    taken: Collection[str] = (),
) -> list[str]:
    """Return so many different problems of some lengths that are not taken."""
    candidates = []
    for _ in range(2 * count):
        problem = make_problem(rng, world.signs, lengths[0], world.invertible, longest=lengths[1])
        candidates.append(problem)
    distinct = [problem for problem in dict.fromkeys(candidates) if problem not in taken]
    if len(distinct) < count:
        raise ValueError(
            f"{count} different problems are asked for, and {len(distinct)} were found; "
            "lower --n-train, --n-test or --n-expert"
        )
    return distinct[:count]


def write_problems(
    world: World, problems: list[str], file: Path, rng: random.Random, share_wrong: float = 0.0
) -> None:
    """Write problems with solutions, answers and, in the image world, drawings.

    Solutions are careful, but for a share of wrong ones; the answer is always the right one.
    """
    choices = random.Random(f"wrong solutions {world.seed}")
    with open(file, "w") as lines:
        for i, problem in enumerate(problems):
            solution, answer = solve(problem)
            if choices.random() < share_wrong:
                solution = solve_wrongly(world, problem, choices)
            row = {
                "id": f"{file.stem}-{i}",
                "problem": problem,
                "solution": solution,
                "answer": answer,
            }
            if world.images:
                row["prompt"] = f"<image>{QUESTION}"
                row["images"] = [encode(draw(problem, rng))]
            lines.write(json.dumps(row) + "\n")


def solve_wrongly(world: World, problem: str, rng: random.Random) -> str:
    """Return a solution with a wrong answer: out of the world's habit, or else by slips."""
    _, right = solve(problem)
    is_read = world.habit == "hasty" or problem.count(" ") < LONG
    answer = right
    while answer == right:
        asked = problem if is_read else misread(problem, rng, world.habit, world.habit_share)
        solution, answer = solve(asked, rng)
    return solution


def make_base(world: World, forbidden: set[str]) -> list:
    """Make and train the base model; return it, its tokenizer and its image processor, if any."""
    parts = []
    with torch.random.fork_rng(devices=[]):  # random numbers are those of the CPU
        torch.manual_seed(world.seed)
        tokenizer = make_tokenizer(world.images)
        model = make_model(world, tokenizer).to(DEVICE)
        if world.images:
            train_tower(world, model, tokenizer)
            model.model.visual.requires_grad_(False)
            parts.append(make_processor())
        train_base(world, model, tokenizer, forbidden)
    return [*parts, model, tokenizer]
