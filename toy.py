"""The embedded world: problems, a tokenizer, a small base model and expert solutions, made on a laptop in minutes.

A problem is a chain of operations modulo 10, `7 +5 *3 -4>`. Careful solutions write every step,
`7+5=2,2*3=6,6-4=2. \\boxed{2}`; hasty ones only the box. The base model learns from demonstrations that are hasty where
care is needed most, on long chains: it knows how to reason and too seldom does, until reinforcement learning finds out
that it pays. A step is a table look-up; composing a chain in the head is beyond a small model.

In the image world, `--model toy-vl`, the chain is a sum of digits, each drawn in a cell of 28 x 28 pixels (one vector of the
vision tower), and the text asks `sum>`. Its tower first learns to tell digits, as real towers have learnt to see before.

    python toy.py --folder runs/toy        (train_rl.py and train_flow.py make it by themselves for --model toy)
"""

import base64
import io
import json
import os
import random
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from torch.nn.utils.rnn import pad_sequence
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

HASTY = {
    3: 0.05,
    4: 0.2,
    5: 0.6,
    6: 0.8,
    7: 0.85,
    8: 0.9,
}  # operations in a problem -> chance of a hasty solution
SLIP = 0.02  # chance that a careful demonstrator gets a step wrong
EOS, PAD = "<|im_end|>", "<|endoftext|>"
QUESTION = "sum>"  # what the text of a drawn problem says
CELL = 28  # pixels a side
FONT = (  # five columns, seven rows a digit
    "01110100011001110101110011000101110 00100011000010000100001000010001110 01110100010000100010001000100011111 "
    "11111000100010000010000011000101110 00010001100101010010111110001000010 11111100001111000001000011000101110 "
    "00110010001000011110100011000101110 11111000010001000100010000100001000 01110100011000101110100011000101110 "
    "01110100011000101111000010001001100"
)
GLYPHS = [
    np.kron(np.array(list(bits), np.uint8).reshape(7, 5), np.ones((3, 3), np.uint8))
    for bits in FONT.split()
]

# Defaults of the training scripts that fit this world (the published ones stand in the scripts).
TRAIN_RL = dict(
    model="toy", prompts=16, lr=3e-4, max_tokens=96, max_prompt_tokens=64, steps=140, flow_lr=1e-3, template="none",
    reward=("binary",),
)  # fmt: skip
EVALUATE = dict(model="toy", template="none", max_tokens=96, reward=("binary",))
TRAIN_FLOW = dict(
    model="toy",
    lr=2e-3,
    epochs=4,
    batch_size=32,
    flow_blocks=2,
    noise_repeats=1,
    template="none",
    save_every=100,
)
PRESETS = {  # of each script
    name: {"toy": preset, "toy-vl": preset | {"model": "toy-vl"}}
    for name, preset in {"train_rl": TRAIN_RL, "train_flow": TRAIN_FLOW, "eval": EVALUATE}.items()
}


@dataclass(frozen=True)
class World:
    """What the world is made with; a folder made with other values is made anew."""

    folder: str = "runs/toy"  # Where the world is kept
    steps: int = 600  # Training steps of the base model
    batch_size: int = 64  # Demonstrations a step
    lr: float = 2e-3  # Peak learning rate of the base model
    hidden_size: int = 128  # Width of the base model
    n_layers: int = 4  # Decoder layers of the base model
    n_train: int = 4000  # Training problems
    n_test: int = (
        256  # Held-out problems: no chain among them is a training problem or a demonstration
    )
    n_expert: int = (
        2000  # Expert solutions for the offline start of the flow: careful, without a slip
    )
    seed: int = 0  # Seed of everything above
    images: bool = False  # Draw the problems

    @property
    def signs(self) -> str:
        """Operations that problems are made of: drawings are summed."""
        return "+" if self.images else "+-*"

    def path(self, name: str) -> str:
        """Path of a part: `model`, `train.jsonl`, `test.jsonl` or `expert.jsonl`."""
        return str(Path(self.folder) / name)


WORLDS = {"toy": World(), "toy-vl": World("runs/toy-vl", images=True)}


def make_problem(rng: random.Random, signs: str = "+-*") -> str:
    """A chain of 3 to 8 operations, such as `7 +5 *3 -4>`."""
    operations = [
        f" {rng.choice(signs)}{rng.randint(2, 9)}" for _ in range(rng.choice(list(HASTY)))
    ]
    return f"{rng.randint(0, 9)}" + "".join(operations) + ">"


def solve(problem: str, rng: random.Random | None = None, hasty: bool = False) -> tuple[str, str]:
    """Solution and answer of a problem; with `rng` a careful solution slips at times, and its box follows the slip."""
    start, *operations = problem.rstrip(">").split()
    value, steps = int(start), []
    for operation in operations:
        sign, operand = operation[0], int(operation[1:])
        result = {"+": value + operand, "-": value - operand, "*": value * operand}[sign] % 10
        if rng is not None and not hasty and rng.random() < SLIP:
            result = rng.randint(0, 9)
        steps.append(f"{value}{sign}{operand}={result}")
        value = result
    box = rf"\boxed{{{value}}}"
    return (box if hasty else ",".join(steps) + ". " + box), str(value)


def draw(problem: str, rng: random.Random) -> Image.Image:
    """Draw a chain's digits side by side, each somewhere in its cell, more or less bright, with specks."""
    digits = [int(c) for c in problem if c.isdigit()]
    pixels = np.zeros((CELL, CELL * len(digits)), np.uint8)
    for i, digit in enumerate(digits):
        y, x = rng.randint(1, 6), CELL * i + rng.randint(2, 11)
        pixels[y : y + 21, x : x + 15] = GLYPHS[digit] * rng.randint(128, 255)
    for _ in range(len(digits) * 8):
        pixels[rng.randrange(CELL), rng.randrange(pixels.shape[1])] = rng.randrange(256)
    return Image.fromarray(pixels)


def encode(image: Image.Image) -> str:
    """An image as base64 of PNG."""
    image.save(file := io.BytesIO(), "png")
    return base64.b64encode(file.getvalue()).decode()


def make_tokenizer(images: bool = False) -> Qwen2Tokenizer:
    """Byte-level BPE without merges: 256 bytes and the special tokens, in the Qwen2 format that every loader reads."""
    vocab = {byte: index for index, byte in enumerate(sorted(ByteLevel.alphabet()))}
    specials = [PAD, "<|im_start|>", EOS, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], unk_token=None, pad_token=PAD, eos_token=EOS)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": specials + ["<|video_pad|>"] * images}
    )
    return tokenizer


def make_model(world: World, tokenizer: Qwen2Tokenizer) -> PreTrainedModel:
    """The untrained base model: a Qwen2 decoder with tied embeddings, under a million parameters by default, or a Qwen2.5-VL
    of such a decoder and a tower of one block."""
    heads = max(1, world.hidden_size // 32)
    text = dict(
        vocab_size=len(tokenizer), hidden_size=world.hidden_size, intermediate_size=world.hidden_size * 11 // 4,
        num_hidden_layers=world.n_layers, num_attention_heads=heads, num_key_value_heads=heads,
        max_position_embeddings=8192, tie_word_embeddings=True, initializer_range=0.05,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    if not world.images:
        return Qwen2ForCausalLM(Qwen2Config(**text))
    # a row of cells differs in its columns alone: most of the rotations, and fast ones, are for them
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 30.0,
        "mrope_section": [1, 1, 14],
    }
    tower = dict(
        depth=1, hidden_size=64, intermediate_size=128, num_heads=2, out_hidden_size=world.hidden_size,
        fullatt_block_indexes=[0], initializer_range=0.05,
    )  # fmt: skip
    names = {"image_token_id": "image_pad", "video_token_id": "video_pad"}
    names |= {"vision_start_token_id": "vision_start", "vision_end_token_id": "vision_end"}
    tokens = {key: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for key, name in names.items()}
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=tower, tie_word_embeddings=True, **tokens
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def make_processor() -> Qwen2VLImageProcessorPil:
    """The image processor: from one cell to sixteen, as they are."""
    return Qwen2VLImageProcessorPil(min_pixels=CELL**2, max_pixels=16 * CELL**2)


def train_tower(world: World, model: PreTrainedModel, tokenizer: Qwen2Tokenizer) -> None:
    """Fit the vision tower, and the embedding, so that a drawn digit's vector is likest to the embedding of that digit."""
    rng, tower, words = (
        random.Random(f"drawings {world.seed}"),
        model.model.visual,
        model.get_input_embeddings().weight,
    )
    optimizer, processor = (
        torch.optim.AdamW([*tower.parameters(), words], lr=world.lr),
        make_processor(),
    )
    bar = tqdm(range(world.steps // 3), desc="toy: vision tower", unit="step")
    for _ in bar:
        problems = [make_problem(rng) for _ in range(world.batch_size // 2)]
        seen = processor(images=[draw(p, rng) for p in problems], return_tensors="pt")
        digits = torch.tensor(
            tokenizer.encode("".join(c for p in problems for c in p if c.isdigit()))
        )
        vectors = tower(
            seen["pixel_values"], grid_thw=seen["image_grid_thw"]
        ).pooler_output  # one a cell
        loss = torch.nn.functional.cross_entropy(vectors @ words.T, digits)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")


def train_base(
    world: World, model: PreTrainedModel, tokenizer: Qwen2Tokenizer, forbidden: set[str]
) -> None:
    """Fit the base model to demonstrations; the loss is on the solution's tokens."""
    rng = random.Random(f"demonstrations {world.seed}")
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=world.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, world.lr, total_steps=world.steps, pct_start=0.1
    )
    bar = tqdm(range(world.steps), desc="toy: base model", unit="step")
    for _ in bar:
        made = (make_problem(rng, world.signs) for _ in range(2 * world.batch_size))
        problems = [p for p in made if p not in forbidden][: world.batch_size]
        solutions = [
            solve(p, rng, hasty=rng.random() < HASTY[p.count(" ")])[0] + EOS for p in problems
        ]
        prompts, seen = show(problems, rng) if world.images else (problems, {})
        rows = [
            (tokenizer.encode(p), tokenizer.encode(s))
            for p, s in zip(prompts, solutions, strict=True)
        ]
        # right-padded: causal attention never looks at the padding
        ids = pad_sequence(
            [torch.tensor(p + s) for p, s in rows],
            batch_first=True,
            padding_value=tokenizer.pad_token_id,
        )
        labels = pad_sequence(
            [torch.tensor([-100] * len(p) + s) for p, s in rows],
            batch_first=True,
            padding_value=-100,
        )
        if world.images:
            seen["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
        loss = model(input_ids=ids, labels=labels, **seen).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")


def show(problems: list[str], rng: random.Random) -> tuple[list[str], dict]:
    """Prompts of drawn problems, with a placeholder for each cell, and the drawings' pixel values."""
    cells = [sum(c.isdigit() for c in problem) for problem in problems]
    prompts = [f"<|vision_start|>{'<|image_pad|>' * n}<|vision_end|>{QUESTION}" for n in cells]
    return prompts, dict(
        make_processor()(images=[draw(p, rng) for p in problems], return_tensors="pt")
    )


def make(world: World = World()) -> World:
    """Make the world in its folder, or find it there; the folder appears only when it is whole."""
    folder = Path(world.folder)
    settings = json.loads(
        json.dumps(asdict(world) | {"folder": None, "hasty": HASTY, "slip": SLIP})
    )
    if (folder / "world.json").exists() and json.loads(
        (folder / "world.json").read_text()
    ) == settings:
        return world
    if folder.exists() and any(folder.iterdir()) and not (folder / "world.json").exists():
        raise ValueError(
            f"{folder} exists and is not an embedded world; name another folder or remove it"
        )
    rng = random.Random(f"problems {world.seed}")
    problems = list(
        dict.fromkeys(
            make_problem(rng, world.signs)
            for _ in range(2 * (world.n_train + world.n_test + world.n_expert))
        )
    )
    test, rest = problems[: world.n_test], problems[world.n_test :]
    train, expert = rest[: world.n_train], rest[world.n_train : world.n_train + world.n_expert]
    making = folder.with_name(f"{folder.name}.making-{os.getpid()}")
    making.mkdir(parents=True, exist_ok=True)
    for name, part in {"train": train, "test": test, "expert": expert}.items():
        with open(making / f"{name}.jsonl", "w") as file:
            for i, problem in enumerate(part):
                solution, answer = solve(problem)
                row = {
                    "id": f"{name}-{i}",
                    "problem": problem,
                    "solution": solution,
                    "answer": answer,
                }
                if world.images:
                    row |= {"prompt": f"<image>{QUESTION}", "images": [encode(draw(problem, rng))]}
                file.write(json.dumps(row) + "\n")
    with torch.random.fork_rng():
        torch.manual_seed(world.seed)
        tokenizer = make_tokenizer(world.images)
        model = make_model(world, tokenizer)
        if world.images:
            train_tower(world, model, tokenizer)
            model.model.visual.requires_grad_(False)
            make_processor().save_pretrained(making / "model")
        train_base(world, model, tokenizer, forbidden=set(test))
    model.save_pretrained(making / "model")
    tokenizer.save_pretrained(making / "model")
    (making / "world.json").write_text(json.dumps(settings))
    shutil.rmtree(folder, ignore_errors=True)
    making.rename(folder)
    return world


if __name__ == "__main__":
    made = make(tyro.cli(World))
    print(f"the embedded world is in {made.folder}")
