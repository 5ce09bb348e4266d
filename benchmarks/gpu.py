"""Whole RL steps on one GPU with random weights of a real shape: seconds a phase, tokens a second, memory, utilisation.

    python benchmarks/gpu.py --shape 1.5B        python benchmarks/gpu.py --shape 7B --offload

Model operations a token: policy forward 2P, training 6P (recomputation not counted), flow forward 2F and learning 6F a tap,
F = (5*blocks + 7) * D^2. Utilisation is against the rate of a large bfloat16 matrix product, measured in the same run.
"""

import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import tyro
from common import machine
from transformers import Qwen2Config, Qwen2ForCausalLM

import flow as fl
import parallel
import toy
import train_rl
from run import change

SHAPES = {  # of Qwen2.5: hidden size, layers, heads, heads of keys, feed-forward width, vocabulary, tied embeddings
    "tiny": (64, 2, 2, 2, 128, 512, True),
    "1.5B": (1536, 28, 12, 2, 8960, 151936, True),
    "7B": (3584, 28, 28, 4, 18944, 152064, False),
}


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    shape: Literal["tiny", "1.5B", "7B"] = "1.5B"  # Shape of the policy
    prompts: int = 32  # Prompts a step
    group_size: int = 8  # Responses a prompt
    prompt_tokens: int = 128  # Tokens of a prompt
    response_tokens: int = 1024  # Tokens of a response: random weights seldom end one
    steps: int = 3  # Steps; the first is a warm-up
    engine: Literal["auto", "vllm", "torch"] = "auto"  # What samples
    tokens_per_gpu: int = 16384  # Padded tokens of a micro-batch
    offload: bool = False  # Trainer in host memory while the engine samples
    json: str | None = None  # File for the figures


def write_inputs(folder: Path, settings: Settings) -> None:
    """Write a policy, a flow and problems, all random."""
    hidden, layers, heads, kv_heads, width, vocabulary, tied = SHAPES[settings.shape]
    tokenizer = toy.make_tokenizer()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, intermediate_size=width, tie_word_embeddings=tied, max_position_embeddings=4096,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None, dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device(parallel.DEVICE):
        model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    flow = fl.Flow(fl.FlowConfig(hidden, n_blocks=6 if settings.shape == "7B" else 4))
    (folder / "flow").mkdir()
    fl.save_flow(flow.config, flow.state_dict(), folder / "flow")
    problems = [
        {"problem": f"{i:0{settings.prompt_tokens}d}", "answer": "1"}
        for i in range(settings.prompts)
    ]  # bytes are tokens
    (folder / "problems.jsonl").write_text(
        "".join(json.dumps(problem) + "\n" for problem in problems)
    )


def matrix_rate(n: int) -> float:
    """Return operations a second of an n x n x n product in bfloat16."""
    a, b = (torch.randn(n, n, device=parallel.DEVICE, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(8):
        began = time.perf_counter()
        a @ b
        if parallel.DEVICE.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return 2 * n**3 / statistics.median(seconds[2:])


def operations(settings: Settings, length: float) -> dict[str, float]:
    """Return model operations of the scoring and the updating phase, responses being `length` tokens on average."""
    hidden, layers, heads, kv_heads, width, vocabulary, _ = SHAPES[settings.shape]
    attention = hidden * (2 * hidden + 2 * kv_heads * hidden // heads)
    body, head = layers * (attention + 3 * hidden * width), vocabulary * hidden
    episodes = settings.prompts * settings.group_size
    forward = 2 * episodes * ((settings.prompt_tokens + length) * body + length * head)
    flow = (5 * (6 if settings.shape == "7B" else 4) + 7) * hidden**2
    return {"score": forward + 3 * 6 * flow * episodes * length, "update": 3 * forward}


def main(settings: Settings) -> dict:
    """Measure, print a table and write JSON."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder, settings)
        rate = matrix_rate(8192 if parallel.DEVICE.type == "cuda" else 512)
        episodes = settings.prompts * settings.group_size
        train_rl.main(
            change(train_rl.Config(), model=str(folder / "model"), data=str(folder / "problems.jsonl"), flow=str(folder / "flow"), template="none",
                folder=str(folder / "run"), prompts=settings.prompts, group_size=settings.group_size, train_batch=episodes,
                max_prompt_tokens=settings.prompt_tokens, max_tokens=settings.response_tokens, steps=settings.steps,
                max_sequences=episodes, engine=settings.engine, tokens_per_gpu=settings.tokens_per_gpu,
                offload=settings.offload, flow_accept="all", grade_truncated=True, save_every=0,
            )
        )  # fmt: skip
        lines = [
            json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()
        ]
    figures = {name: statistics.median(line[name] for line in lines[1:]) for name in lines[-1]}
    length, work = figures["length"], operations(settings, figures["length"])
    counted = {"roll_out": episodes * length, "score": episodes * (settings.prompt_tokens + length)}
    counted["update"] = counted["score"]
    print(f"{settings.shape} shape, {episodes} episodes of {length:.0f} tokens\n{machine()}")
    print(
        f"bfloat16 matrix product: {rate / 1e12:.1f} TFLOP/s\n{'':10}{'seconds':>10}{'tokens/s':>12}{'utilisation':>13}"
    )
    rows = {}
    for phase in ("sync", "roll_out", "score", "verify", "update", "step"):
        seconds = figures[f"time/{phase}"]
        rows[phase] = {"seconds": seconds}
        if phase in counted:
            rows[phase]["tokens_per_second"] = counted[phase] / seconds
        if phase in work:
            rows[phase]["utilisation"] = work[phase] / seconds / rate
        cells = [
            f"{rows[phase].get('tokens_per_second', 0):12.0f}" if phase in counted else " " * 12
        ]
        cells += [f"{rows[phase]['utilisation']:13.1%}" if phase in work else ""]
        print(f"{phase:10}{seconds:10.2f}{''.join(cells)}")
    peak = figures.get("memory/peak_gb", 0.0)
    print(
        f"peak memory of the trainer: {peak:.1f} GB; mismatch ratio: max {figures['mismatch/ratio_max']:.3f}"
    )
    result = {
        "machine": machine(),
        "settings": asdict(settings),
        "rate": rate,
        "phases": rows,
        "peak_gb": peak,
    }
    if settings.json:
        Path(settings.json).write_text(json.dumps(result | {"figures": figures}, indent=1))
    return result


if __name__ == "__main__":
    parallel.start()
    main(tyro.cli(Settings))
