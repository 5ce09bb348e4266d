"""The plan of a run on GPUs that are not there, against what an H100 measured (benchmarks/RESULTS.md)."""

from pathlib import Path
from typing import NamedTuple

import forks
import pytest
import torch
import torch.distributed as dist
from test_published import CONFIGS
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config

import train_rl
from infra.defaults import published_settings
from infra.models import Model, count_parameters
from infra.settings import change, with_defaults
from plan import command, estimate, gpus, trial
from plan.tracing import Trace, start_ranks

DEPTH = 28  # layers of the published models; tests trace few and go on along a line
FEW = (2, 4)


@pytest.fixture
def ranks():
    """Let this process be one of several ranks that are not there."""

    def start(n_ranks: int) -> None:
        dist.destroy_process_group()
        start_ranks(n_ranks)

    yield start
    dist.destroy_process_group()  # the next test gets a group anew


class Figures(NamedTuple):
    """What a plan traces, of a model of some layers."""

    held: float  # bytes, with the gradients of the policy
    peak_of_score: float
    peak_of_update: float
    score: float  # seconds on an H100
    update: float


def figures(
    name: str, shape: trial.Shape, folder: Path, n_gpus: int = 1, compiled: bool = True, **values
) -> Figures:
    """Return the figures of a published model, from two of few layers."""
    few, more = (
        figures_of_depth(name, n_layers, shape, folder, n_gpus, compiled, values)
        for n_layers in FEW
    )
    factor = (DEPTH - FEW[0]) / (FEW[1] - FEW[0])
    return Figures(*(a + factor * (b - a) for a, b in zip(few, more, strict=True)))


def figures_of_depth(
    name: str, n_layers: int, shape: trial.Shape, folder: Path, n_gpus: int, compiled: bool, values
) -> Figures:
    sizes = CONFIGS[name].to_dict() | {"num_hidden_layers": n_layers, "layer_types": None}
    config_of_model = type(CONFIGS[name])(**sizes)
    config_of_model.save_pretrained(folder)
    n_parameters = count_parameters(CONFIGS[name], trust_remote_code=False)  # tells the flow's size
    model = Model(str(folder), config_of_model, n_parameters, tokenizer=None)
    config = with_defaults(command.Config(), **published_settings(model))
    # the benchmark's 128 episodes, no two with one prompt, in one optimiser step
    record = {"prompts": 128, "group_size": 1, "prompt_tokens": 128, "response_tokens": 516}
    record["max_sequences"] = 256
    config = change(config, flow="new", compile="on" if compiled else "off", **record | values)
    with Trace() as trace:
        models = trial.make_models(config, model)
        held = trace.held + trial.held_by(models).gradients
        traced = trial.try_out(models, shape, config, trace)
    times = estimate.times_of_step(
        config, model, n_parameters, traced, 1e9, gpus.Machine(n_gpus, "H100")
    )
    return Figures(held, traced.score.peak, traced.update.peak, times.score, times.update)


LARGEST = trial.Shape(n_rows=14, n_prompt=128, n_response=1024)  # micro-batch of the benchmark


@pytest.mark.parametrize(("recompute", "gigabytes", "seconds"), [(DEPTH, 32, 3.74), (0, 76, 3.11)])
def test_an_update_is_what_an_h100_measured(ranks, tmp_path, recompute, gigabytes, seconds):
    """The seconds of the second case are no input: the rates are those of the first."""
    ranks(1)
    options = {"recompute_layers": recompute, "compiled": False}
    found = figures("Qwen/Qwen2.5-Math-1.5B", LARGEST, tmp_path, **options)
    assert found.peak_of_update / 1e9 == pytest.approx(gigabytes, rel=0.1)
    assert found.update == pytest.approx(seconds, rel=0.1)
    assert found.score == pytest.approx(1.45, rel=0.1)


def test_a_7b_model_on_eight_gpus(ranks, tmp_path):
    """By hand: 16 bytes a weight over eight ranks; activations, logits and gathered layers on top."""
    ranks(8)
    found = figures("Qwen/Qwen2.5-Math-7B", LARGEST, tmp_path, 8, recompute_layers=DEPTH)
    assert found.held / 1e9 == pytest.approx(16.2, rel=0.02)
    assert found.peak_of_update / 1e9 == pytest.approx(35, rel=0.15)


def test_a_trace_does_the_operations_of_a_real_run(ranks, tmp_path):
    """Scored and updated once on numbers and once without, a tiny policy takes as many operations."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    Qwen2Config(**sizes, **heads).save_pretrained(tmp_path)
    model = command.find_model(str(tmp_path), trust_remote_code=False)
    config = with_defaults(command.Config(), **published_settings(model))
    config = change(config, flow="new", recompute_layers=3)
    shape = trial.Shape(n_rows=3, n_prompt=5, n_response=7)
    ranks(1)
    with Trace() as trace:
        traced = trial.try_out(trial.make_models(config, model), shape, config, trace)
    real = train_rl.with_learners(
        train_rl.make_models(config, model, is_flow_named=True, load=trial.empty_policy), 0.0
    )
    episodes = trial.make_episodes(shape.n_rows, shape)
    with FlopCounterMode(display=False) as counted:
        experience = train_rl.score(real, episodes, 0, 1.0, token_budget=100)
    assert counted.get_total_flops() == traced.score.products
    advantage = torch.ones(experience.mask.shape)
    config = change(config, train_batch=shape.n_rows, tokens_per_gpu=100)
    with FlopCounterMode(display=False) as counted:
        train_rl.update_policy(real, experience, advantage, config, step=0, lr=0.0)
    assert counted.get_total_flops() == traced.update.products


# ---- The command
def test_the_command_prints_a_plan(tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    Qwen2Config(**sizes, **heads).save_pretrained(tmp_path)
    arguments = ["--on", "2xA100-40", "--model", str(tmp_path), "--prompt-tokens", "100"]
    process = forks.Run("run.py", ["plan", *arguments])
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    assert "2 x A100-40 of 42 GB" in printed and "1024 episodes, 100 + 614" in printed
    for name in ("roll out", "score", "update"):
        lines = [line for line in printed.splitlines() if line.startswith(f"{name} ")]
        assert len(lines) == 2 and lines[0].endswith("  fits")


def test_what_to_lower():
    machine = gpus.find_machine("8xH100")
    config = change(command.Config(), recompute_layers=14)
    work = estimate.Phase("update", trainer=40e9, work=50e9, engine=0, cache=0)
    weights = estimate.Phase("update", trainer=90e9, work=1e9, engine=0, cache=0)
    cache = estimate.Phase("roll out", trainer=40e9, work=0, engine=20e9, cache=30e9)
    model = Model("", CONFIGS["Qwen/Qwen2.5-Math-7B"], 7e9, tokenizer=None)
    lower = []
    for each in (work, weights, cache):
        lower.append(" ".join(command.what_to_lower(config, model, each, machine)))
    config = change(config, recompute_layers=DEPTH)
    assert "--recompute-layers" not in str(command.what_to_lower(config, model, work, machine))
    assert "--tokens-per-gpu (now 16384)" in lower[0] and "--lora-rank 32" in lower[0]
    assert "a larger --recompute-layers (now 14)" in lower[0]
    assert "--tokens-per-gpu" not in lower[1] and "--offload always" in lower[1]
    assert "--cache-share (now 0.5)" in lower[2] and "--tensor-parallel 2" in lower[2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--on", "8xH1000"],
            "--on 8xH1000: expected a number from 1 to 1,024 and a kind of GPU, such as 8xH100",
        ),
        (["--model", "toy"], "--model toy: the embedded world runs on a CPU"),
        (["--model", "Qwen2.5-7B"], "put the model's config.json into a folder"),
    ],
)
def test_a_plan_that_cannot_be_made(arguments, words):
    config = command.Config(model="Qwen2.5-7B")
    values = dict(zip(arguments[::2], arguments[1::2], strict=True))
    config = change(config, **{name.removeprefix("--"): value for name, value in values.items()})
    with pytest.raises(ValueError, match=words):
        command.main(config)
