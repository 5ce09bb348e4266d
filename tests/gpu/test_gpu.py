"""On one CUDA device: the engine's memory asleep, its weights after a sync, log-probs, whole steps.

python -m pytest -m gpu tests/gpu        torch >= 2.11, transformers >= 5.17; vLLM >= 0.26 if it is there
"""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import BY_LENGTH, ROOT, figures, flags, problems_in, requests, small_run, vllm_engine
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import train_rl
from engines.vllm_engine import VllmEngine
from infra import batching, parallel
from infra.cores import cores_of_rank
from infra.settings import change
from policy import Policy, load_policy
from rollout import Sampling

pytestmark = pytest.mark.gpu
needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
GREEDY = Sampling(temperature=0.0, max_tokens=32)
MAX_LENGTH = 512
MAX_SEQUENCES = 256


def save_model(world, folder: Path, seed: int) -> str:
    """Save a random model of 0.1B parameters in bfloat16."""
    torch.manual_seed(seed)
    config = Qwen2Config.from_pretrained(
        world.path("model"),
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
        initializer_range=0.06,
        max_position_embeddings=1024,
        layer_types=["full_attention"] * 12,
    )
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(world.path("model")).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(world, tmp_path_factory) -> list[str]:
    return [save_model(world, tmp_path_factory.mktemp("model"), seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def prompts(world) -> list[list[int]]:
    return [problem.prompt_ids for problem in problems_in(world.path("test.jsonl"))[:10]]


def start_engine(folder: str, can_sleep: bool) -> VllmEngine:
    return vllm_engine(
        folder, MAX_LENGTH, MAX_SEQUENCES, parallel.DEVICE, torch.bfloat16, can_sleep
    )


@pytest.fixture(scope="module")
def engine(folders):
    return start_engine(folders[0], can_sleep=True)


@pytest.fixture(scope="module")
def other_engine(folders):
    """A second engine in this process, of the other model: it never sleeps.

    It stays as long as the first one: the end of an engine takes the process group away.
    """
    return start_engine(folders[1], can_sleep=False)


def sharded(folder: str) -> Policy:
    policy = load_policy(folder)
    parallel.shard(policy, policy.layers, torch.bfloat16)
    return policy


def sync(engine, policy) -> None:
    engine.load_weights(policy.whole_weights(torch.bfloat16))


def greedy_tokens(engine, prompts) -> list[list[int]]:
    return [episode.response_ids for episode in engine.generate(requests(prompts), GREEDY)]


def used() -> int:
    """Bytes of the device's memory in use, by anyone."""
    free, total = torch.cuda.mem_get_info()
    return total - free


# ---- The trainer alone


def test_attention_runs_in_a_fused_causal_kernel(folders):
    """Regression: under a padding mask it does not, and keys and values are repeated."""
    policy = sharded(folders[0])
    batch = batching.collate([batching.Row([1] * 20, [2] * 300), batching.Row([3] * 10, [4] * 100)])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        policy(batch).logp.sum().backward()
        torch.cuda.synchronize()
    kernels = [event.key for event in profiler.key_averages()]
    attention = [name for name in kernels if "flash" in name.lower() or "cudnn" in name.lower()]
    print("attention:", attention)
    assert attention, kernels


def test_compiled_parts_give_the_same(folders):
    plain = sharded(folders[0])
    compiled = load_policy(folders[0])
    compiled.compile_parts("on")
    parallel.shard(compiled, compiled.layers, torch.bfloat16)
    batch = batching.collate([batching.Row([1] * 20, [2] * 300), batching.Row([3] * 10, [4] * 100)])
    with torch.no_grad():
        expected = plain(batch).logp
        difference = (compiled(batch).logp - expected).abs()
    print(f"mean {difference.mean():.4f}, max {difference.max():.3f} of {expected.abs().max():.1f}")
    assert difference.mean() < 0.02


def test_no_step_of_a_micro_batch_waits_for_the_gpu(folders):
    """tests/test_rlfr.py shows it on a CPU, on tensors without numbers."""
    policy = load_policy(folders[0]).to(parallel.DEVICE, torch.bfloat16)
    rows = [batching.Row([1] * 20, [2] * 300), batching.Row([1] * 20, [4] * 100)]
    policy(batching.collate(rows)).logp.sum().backward()  # the first calls set kernels up
    torch.cuda.set_sync_debug_mode("error")
    try:
        policy(batching.collate(rows)).logp.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- vLLM


@needs_vllm
def test_sleep_frees_memory(engine, folders, prompts):
    policy = sharded(folders[0])
    sync(engine, policy)
    engine.generate(requests(prompts), GREEDY)
    before = used()
    engine.sleep()
    asleep = used()
    sync(engine, policy)
    engine.generate(requests(prompts), GREEDY)
    after = used()
    print(
        f"device memory in use: awake {before / 1e9:.2f} GB, asleep {asleep / 1e9:.2f} GB, "
        f"awake again {after / 1e9:.2f} GB"
    )
    weights = 2 * sum(p.numel() for p in policy.parameters())
    cache = MAX_SEQUENCES * MAX_LENGTH * 2 * 12 * 768 * 2
    assert before - asleep > 0.9 * (weights + cache)
    assert abs(after - before) < 0.2 * (before - asleep)


@needs_vllm
def test_threads_stay_after_the_start(engine):
    assert torch.get_num_threads() == cores_of_rank()


@needs_vllm
def test_greedy_tokens_follow_a_sync(engine, other_engine, folders, prompts):
    """The engine with another model's weights gives what an engine that loaded them itself gives.

    Its sums are rounded alike: most tokens agree, where other weights give others throughout.
    """
    expected = greedy_tokens(other_engine, prompts)
    policies = [sharded(folder) for folder in folders]

    def agreement() -> float:
        equal = []
        for got, wanted in zip(greedy_tokens(engine, prompts), expected, strict=True):
            equal += [a == b for a, b in zip(got, wanted, strict=False)]
        return sum(equal) / len(equal)

    for asleep in (False, True):
        sync(engine, policies[0])
        before = agreement()
        if asleep:
            engine.sleep()
        sync(engine, policies[1])
        after = agreement()
        print(f"agreement of tokens: {before:.3f} with other weights, {after:.3f} with the same")
        assert before < 0.2
        assert after > 0.8


@needs_vllm
@pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed")
def test_a_prompt_of_text_alone_after_a_sleep():
    """Of Qwen3-VL, which keeps image vectors in tensors that are no buffers; in a process of its own."""
    file = str(ROOT / "tests" / "with_torchvision.py")
    command = [sys.executable, "-m", "pytest", "-q", file, "-k", "after_a_sleep and qwen3_vl"]
    subprocess.run(command, check=True, timeout=900)


@needs_vllm
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_in_bfloat16(engine, folders, prompts, temperature):
    policy = sharded(folders[0])
    sync(engine, policy)
    sampling = Sampling(4, temperature, 128)
    episodes = engine.generate(requests(prompts, range(0, 1000, 100)), sampling)
    batch = batching.collate(episodes)
    with torch.no_grad():
        logp = policy(batch, temperature).logp[batch.response_mask].cpu()
    sampled = torch.tensor([value for episode in episodes for value in episode.logp])
    difference = (sampled - logp).abs()
    print(
        f"|difference| of log-probs at {temperature}: mean {difference.mean():.4f}, "
        f"max {difference.max():.3f}"
    )
    assert difference.mean() < 0.03
    assert difference.max() < 0.6


# ---- Whole steps


def step_config(world, flow_folder: str, folder: Path, engine: str) -> train_rl.Config:
    settings = {"prompts": 8, "train_batch": 16, "steps": 3, "save_every": 2}
    return small_run(
        world,
        flow_folder,
        folder / "run",
        flow_soft=1.0,
        engine=engine,
        **settings,
        **BY_LENGTH,
    )


def check_steps(folder: str) -> None:
    """Check the metrics of three steps."""
    lines = figures(folder)
    assert len(lines) == 3
    assert lines[0]["flow/grad_norm"] > 0
    assert lines[0]["policy/grad_norm"] > 0
    assert 0.8 < lines[0]["mismatch/ratio_mean"] < 1.2
    print({name: value for name, value in lines[-1].items() if name.startswith("memory/")})
    assert lines[-1]["memory/update_gb"] > 0


@pytest.mark.parametrize(
    "options",
    [
        {"compile": "off"},
        {"compile": "on"},
        {"offload": "sampling"},
        {"offload": "always", "recompute_layers": 2},
    ],
    ids=str,
)
def test_whole_steps(world, flow_folder, tmp_path, options):
    config = change(step_config(world, flow_folder, tmp_path, "torch"), **options)
    train_rl.main(config)
    check_steps(config.folder)
    train_rl.main(change(config, resume=config.folder))


@needs_vllm
@pytest.mark.parametrize("options", [{}, {"offload": "sampling"}], ids=str)
def test_whole_steps_with_vllm(world, flow_folder, tmp_path, options):
    """In a process of its own: one engine of a process can sleep, and this one has it already."""
    config = step_config(world, flow_folder, tmp_path, "vllm")
    config = change(config, compile="off", **options)  # it would take minutes, in one thread
    command = [sys.executable, str(ROOT / "train_rl.py"), *flags(config)]
    subprocess.run(command, check=True, timeout=900)
    check_steps(config.folder)
