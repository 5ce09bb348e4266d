"""The embedded world: problems, a tokenizer, a small base model and expert solutions, made on a laptop in minutes.

A problem is a chain of operations modulo 10, `7 +5 *3 -4>`. Careful solutions write every step,
`7+5=2,2*3=6,6-4=2. \\boxed{2}`; hasty ones only the box. The base model learns from demonstrations that are hasty where
care is needed most, on long chains: it knows how to reason and too seldom does, until reinforcement learning finds out
that it pays. A step is a table look-up; composing a chain in the head is beyond a small model.

    python toy.py --folder runs/toy        (train_rl.py and train_flow.py make it by themselves for --model toy)
"""

import json
import os
import random
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from tokenizers.pre_tokenizers import ByteLevel
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

HASTY = {3: 0.05, 4: 0.2, 5: 0.6, 6: 0.8, 7: 0.85, 8: 0.9}  # operations in a problem -> chance of a hasty solution
SLIP = 0.02  # chance that a careful demonstrator gets a step wrong
EOS, PAD = "<|im_end|>", "<|endoftext|>"

# Defaults of the training scripts that fit this world (the published ones stand in the scripts).
TRAIN_RL = dict(model="toy", prompts=16, lr=3e-4, max_tokens=96, max_prompt_tokens=64, steps=140, flow_lr=1e-3, template="none")
EVALUATE = dict(model="toy", template="none", max_tokens=96)
TRAIN_FLOW = dict(
    model="toy", lr=2e-3, epochs=4, batch_size=32, flow_blocks=2, noise_repeats=1, template="none", save_every=100
)


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
    n_test: int = 256  # Held-out problems: no chain among them is a training problem or a demonstration
    n_expert: int = 2000  # Expert solutions for the offline start of the flow: careful, without a slip
    seed: int = 0  # Seed of everything above

    def path(self, name: str) -> str:
        """Path of a part: `model`, `train.jsonl`, `test.jsonl` or `expert.jsonl`."""
        return str(Path(self.folder) / name)


def make_problem(rng: random.Random) -> str:
    """A chain of 3 to 8 operations, such as `7 +5 *3 -4>`."""
    operations = [f" {rng.choice('+-*')}{rng.randint(2, 9)}" for _ in range(rng.choice(list(HASTY)))]
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


def make_tokenizer() -> Qwen2Tokenizer:
    """Byte-level BPE without merges: 256 bytes and the special tokens, in the Qwen2 format that every loader reads."""
    vocab = {byte: index for index, byte in enumerate(sorted(ByteLevel.alphabet()))}
    specials = [PAD, "<|im_start|>", EOS, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], unk_token=None, pad_token=PAD, eos_token=EOS)
    tokenizer.add_special_tokens({"additional_special_tokens": specials})
    return tokenizer


def make_model(world: World, tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    """The untrained base model: a Qwen2 decoder with tied embeddings, under a million parameters by default."""
    heads = max(1, world.hidden_size // 32)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=world.hidden_size, intermediate_size=world.hidden_size * 11 // 4,
        num_hidden_layers=world.n_layers, num_attention_heads=heads, num_key_value_heads=heads,
        max_position_embeddings=8192, tie_word_embeddings=True, initializer_range=0.05,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def train_base(world: World, model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, forbidden: set[str]) -> None:
    """Fit the base model to demonstrations; the loss is on the solution's tokens."""
    rng = random.Random(f"demonstrations {world.seed}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=world.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, world.lr, total_steps=world.steps, pct_start=0.1)
    bar = tqdm(range(world.steps), desc="toy: base model", unit="step")
    for _ in bar:
        problems = [p for p in (make_problem(rng) for _ in range(2 * world.batch_size)) if p not in forbidden]
        solutions = [solve(p, rng, hasty=rng.random() < HASTY[p.count(" ")])[0] + EOS for p in problems[: world.batch_size]]
        rows = [(tokenizer.encode(p), tokenizer.encode(s)) for p, s in zip(problems, solutions, strict=False)]
        # right-padded: causal attention never looks at the padding
        ids = pad_sequence([torch.tensor(p + s) for p, s in rows], batch_first=True, padding_value=tokenizer.pad_token_id)
        labels = pad_sequence([torch.tensor([-100] * len(p) + s) for p, s in rows], batch_first=True, padding_value=-100)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")


def make(world: World = World()) -> World:
    """Make the world in its folder, or find it there; the folder appears only when it is whole."""
    folder = Path(world.folder)
    settings = json.loads(json.dumps(asdict(world) | {"folder": None, "hasty": HASTY, "slip": SLIP}))
    if (folder / "world.json").exists() and json.loads((folder / "world.json").read_text()) == settings:
        return world
    if folder.exists() and any(folder.iterdir()) and not (folder / "world.json").exists():
        raise ValueError(f"{folder} exists and is not an embedded world; name another folder or remove it")
    rng = random.Random(f"problems {world.seed}")
    problems = list(dict.fromkeys(make_problem(rng) for _ in range(2 * (world.n_train + world.n_test + world.n_expert))))
    test, rest = problems[: world.n_test], problems[world.n_test :]
    train, expert = rest[: world.n_train], rest[world.n_train : world.n_train + world.n_expert]
    making = folder.with_name(f"{folder.name}.making-{os.getpid()}")
    making.mkdir(parents=True, exist_ok=True)
    for name, part in {"train": train, "test": test, "expert": expert}.items():
        with open(making / f"{name}.jsonl", "w") as file:
            for i, problem in enumerate(part):
                solution, answer = solve(problem)
                row = {"id": f"{name}-{i}", "problem": problem, "solution": solution, "answer": answer}
                file.write(json.dumps(row) + "\n")
    with torch.random.fork_rng():
        torch.manual_seed(world.seed)
        tokenizer = make_tokenizer()
        model = make_model(world, tokenizer)
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
