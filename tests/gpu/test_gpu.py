"""On one CUDA device: the engine's memory asleep, its weights after a sync, log-probs in bfloat16, whole steps.

python -m pytest -m gpu tests/gpu          torch >= 2.11, transformers >= 5.17; tests with vLLM need vLLM >= 0.26
"""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import ROOT, figures, load_problems, requests, vllm_engine
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import parallel
import rlfr
import train_rl
from rollout import Sampling
from run import change

pytestmark = pytest.mark.gpu
needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
GREEDY = Sampling(temperature=0.0, max_tokens=32)


def save_model(world, folder: Path, seed: int) -> str:
    """A random model of 0.1B parameters in bfloat16."""
    torch.manual_seed(seed)
    config = Qwen2Config.from_pretrained(
        world.path("model"), hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=12, initializer_range=0.06, max_position_embeddings=1024, layer_types=["full_attention"] * 12,
    )  # fmt: skip
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(world.path("model")).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(world, tmp_path_factory) -> list[str]:
    return [save_model(world, tmp_path_factory.mktemp("model"), seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def prompts(world) -> list[list[int]]:
    return [problem.prompt_ids for problem in load_problems(world.path("test.jsonl"))[:10]]


@pytest.fixture(scope="module")
def engine(folders):
    return vllm_engine(folders[0], 512, 256, parallel.DEVICE, torch.bfloat16)


def sharded(folder: str) -> rlfr.Policy:
    policy = rlfr.load_policy(folder)
    parallel.shard(policy, policy.layers, torch.bfloat16)
    return policy


def sync(engine, policy) -> None:
    engine.load_weights(parallel.full_weights(policy, torch.bfloat16, prefix="model."))


def used() -> int:
    """Bytes of the device's memory in use, by anyone."""
    free, total = torch.cuda.mem_get_info()
    return total - free


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
        f"device memory in use: awake {before / 1e9:.2f} GB, asleep {asleep / 1e9:.2f} GB, awake again {after / 1e9:.2f} GB"
    )
    weights = 2 * sum(p.numel() for p in policy.parameters())
    cache = 256 * 512 * 2 * 12 * 768 * 2
    assert before - asleep > 0.9 * (weights + cache) and abs(after - before) < 0.2 * (
        before - asleep
    )


@needs_vllm
def test_greedy_tokens_follow_a_sync(engine, folders, prompts):
    """The engine with another model's weights gives what an engine that loaded them itself gives."""
    fresh = vllm_engine(folders[1], 512, 256, parallel.DEVICE, torch.bfloat16)
    expected = [episode.response_ids for episode in fresh.generate(requests(prompts), GREEDY)]
    fresh.sleep()
    policies = [sharded(folder) for folder in folders]
    sync(engine, policies[0])
    assert [
        episode.response_ids for episode in engine.generate(requests(prompts), GREEDY)
    ] != expected
    for asleep in (False, True):
        sync(engine, policies[0])
        if asleep:
            engine.sleep()
        sync(engine, policies[1])
        assert [
            episode.response_ids for episode in engine.generate(requests(prompts), GREEDY)
        ] == expected


@needs_vllm
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_in_bfloat16(engine, folders, prompts, temperature):
    policy = sharded(folders[0])
    sync(engine, policy)
    episodes = engine.generate(
        requests(prompts, range(0, 1000, 100)), Sampling(4, temperature, 128)
    )
    with torch.no_grad():
        batch = rlfr.collate(episodes)
        logp = policy(batch, temperature).logp[batch.response_mask].cpu()
    difference = (torch.tensor([x for episode in episodes for x in episode.logp]) - logp).abs()
    print(
        f"|difference| of log-probs at {temperature}: mean {difference.mean():.4f}, max {difference.max():.3f}"
    )
    assert difference.mean() < 0.03 and difference.max() < 0.6


@pytest.mark.parametrize("engine", [pytest.param("vllm", marks=needs_vllm), "torch"])
@pytest.mark.parametrize(
    "options",
    [{}, {"offload": True}, {"cpu_offload": True, "gradient_checkpointing": True}],
    ids=str,
)
def test_whole_steps(world, flow_folder, tmp_path, engine, options):
    config = change(train_rl.Config(), model=world.path("model"), data=world.path("train.jsonl"), flow=flow_folder, template="none", prompts=8, group_size=4,
        train_batch=16, max_tokens=16, max_prompt_tokens=64, steps=3, lr=1e-3, flow_lr=1e-3, flow_accept="all", save_every=2,
        grade_truncated=True, reward=(str(ROOT / "tests" / "length_reward.py"),), folder=str(tmp_path / "run"), engine=engine,
    )  # fmt: skip
    train_rl.main(change(config, **options))
    lines = figures(config.folder)
    assert len(lines) == 3 and lines[0]["flow/grad_norm"] > 0 and lines[0]["policy/grad_norm"] > 0
    assert 0.8 < lines[0]["mismatch/ratio_mean"] < 1.2 and lines[0]["memory/peak_gb"] > 0
    train_rl.main(change(config, resume=config.folder, **options))
