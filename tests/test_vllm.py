"""The vLLM engine in this process, against the torch engine and the trainer, with weights that change."""

import ctypes
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import (
    BY_LENGTH,
    figures,
    find_model_in,
    problems_in,
    read_lines,
    requests,
    run_with_vllm,
    small_run,
    torch_engine,
    vllm_engine,
)
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import rollout
import train_rl
from engines.common import end_tokens
from engines.vllm_engine import usual_sequences
from infra import batching, parallel
from infra.settings import change
from policy import load_policy
from rollout import Sampling

pytestmark = pytest.mark.vllm
LENGTH = 352  # prompt + response
GREEDY = Sampling(temperature=0.0, max_tokens=32)


@pytest.fixture(scope="module", params=["tied", "untied"])
def folder(request, world, tmp_path_factory) -> str:
    """A random model whose words are far from certain, its head tied to the embedding or not."""
    folder, base = str(tmp_path_factory.mktemp(request.param)), world.path("model")
    torch.manual_seed(0)
    config = Qwen2Config.from_pretrained(
        base, tie_word_embeddings=request.param == "tied", initializer_range=0.2
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def engine(folder, tokenizer, tmp_path_factory):
    """An engine that can sleep: it starts where there are no weights."""
    without = tmp_path_factory.mktemp("without")
    shutil.copytree(folder, without, dirs_exist_ok=True)
    (without / "model.safetensors").unlink()
    return vllm_engine(without, LENGTH)


@pytest.fixture(scope="module")
def prompts(world) -> list[list[int]]:
    """Ten prompts with a long common beginning: vLLM keeps its keys and values from one call to the next."""
    problems = problems_in(world.path("test.jsonl"))[:10]
    shared = [
        token
        for problem in problems_in(world.path("train.jsonl"))[:20]
        for token in problem.prompt_ids
    ][:256]
    return [shared + problem.prompt_ids for problem in problems]


@pytest.fixture
def learner(folder) -> parallel.Learner:
    policy = load_policy(folder)
    parallel.shard(policy, policy.layers, torch.float32)
    return parallel.Learner(policy, (0.9, 0.95), 0.0)


def move(learner: parallel.Learner, episodes: list[rollout.Episode]) -> None:
    """Take an optimiser step that makes the episodes less likely."""
    learner.module(batching.collate(episodes)).logp.mean().backward()
    learner.step(lr=3e-3, max_norm=1.0)


def sync(engine, learner: parallel.Learner) -> None:
    engine.load_weights(learner.module.whole_weights(torch.float32))


def tokens(engine, prompts, sampling=GREEDY) -> list[list[int]]:
    return [
        episode.response_ids
        for episode in engine.generate(
            requests(prompts, range(0, 100 * len(prompts), 100)), sampling
        )
    ]


def test_a_long_prompt_shortens_its_own_responses_alone(engine, learner, folder, prompts):
    """The last prompt leaves room for 8 tokens; both engines leave the others as they are."""
    chosen = [*prompts[:3], prompts[0] + prompts[1][: LENGTH - 8 - len(prompts[0])]]
    bounded = replace(GREEDY, max_length=LENGTH)
    sync(engine, learner)
    free = tokens(engine, prompts[:3])
    for each in (engine, torch_engine(folder)):
        got = tokens(each, chosen, bounded)
        assert got[:3] == free
        assert len(got[3]) <= 8


# ---- A. Weights in


def test_greedy_tokens_follow_every_step(engine, learner, folder, tokenizer, prompts):
    reference, seen = torch_engine(folder), []
    for step in range(3):
        sync(reference, learner)
        sync(engine, learner)
        episodes = engine.generate(requests(prompts), GREEDY)
        assert [episode.response_ids for episode in episodes] == tokens(reference, prompts), (
            f"step {step}"
        )
        seen.append([episode.response_ids for episode in episodes])
        if step == 1:
            engine.sleep()
        move(learner, episodes)
    assert seen[0] != seen[1] != seen[2], "the steps are large enough to be seen"
    words = [token for rows in seen for row in rows for token in row]
    assert len(words) > 600 and len(set(words)) > 8, (len(words), len(set(words)))


def test_without_the_cache_reset_old_keys_are_used(
    engine, learner, folder, tokenizer, prompts, monkeypatch
):
    """Regression of the reset in load_weights: leaving it out changes tokens, silently."""
    sync(engine, learner)
    episodes = engine.generate(requests(prompts), GREEDY)
    move(learner, episodes)
    reference = torch_engine(folder)
    sync(reference, learner)
    with monkeypatch.context() as patched:
        patched.setattr(engine.llm, "reset_prefix_cache", lambda: True)
        sync(engine, learner)
        assert tokens(engine, prompts) != tokens(reference, prompts)
    sync(engine, learner)
    assert tokens(engine, prompts) == tokens(reference, prompts)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_the_trainer(engine, learner, prompts, temperature):
    sync(engine, learner)
    episodes = engine.generate(requests(prompts, range(0, 1000, 100)), Sampling(2, temperature, 48))
    with torch.no_grad():
        logp = learner.module(batching.collate(episodes), temperature).logp
    for row, episode in enumerate(episodes):
        sampled = torch.tensor(episode.logp)
        assert (sampled - logp[row, : len(sampled)]).abs().max() <= 2e-5


def test_all_weights_must_be_given(engine, learner):
    weights = dict(learner.module.whole_weights(torch.float32))
    some = {name: tensor for name, tensor in weights.items() if "layers.1." not in name}
    with pytest.raises(
        ValueError, match="weights were not given, e.g. .*layers.1.*expected the whole state dict"
    ):
        engine.load_weights(some.items())
    with pytest.raises((ValueError, KeyError), match="nonsense"):
        engine.load_weights([*weights.items(), ("model.nonsense", torch.zeros(1))])
    engine.load_weights(weights.items())


# ---- Sampling


def test_seeds_and_the_order_of_children(engine, learner, prompts):
    sync(engine, learner)
    sampling = Sampling(3, 1.0, 24)
    together = engine.generate(requests(prompts, range(0, 1000, 100)), sampling)
    assert [e.prompt_ids for e in together] == [prompt for prompt in prompts for _ in range(3)]
    assert len({tuple(e.response_ids) for e in together}) == 30, "no two episodes share a seed"
    again = engine.generate(requests(prompts[4:6], [400, 500]), sampling)
    assert [e.response_ids for e in again] == [e.response_ids for e in together[12:18]]
    single = engine.generate(requests(prompts[4:5], [402]), Sampling(1, 1.0, 24))[0]
    assert single.response_ids == together[14].response_ids, "child i of a prompt has the seed + i"
    assert engine.generate([], sampling) == []


def test_ends_are_kept_and_nothing_else(engine, learner, prompts, tokenizer):
    sync(engine, learner)
    episodes = engine.generate(requests(prompts, range(0, 1000, 100)), Sampling(6, 1.0, 48))
    ends = end_tokens(find_model_in(engine.llm.model_config.model))
    for episode in episodes:
        stopped = episode.response_ids[-1] in ends
        assert len(episode.logp) == len(episode.response_ids) and not set(
            episode.response_ids[:-1]
        ) & set(ends)
        assert episode.finish_reason == ("stop" if stopped else "length") and (
            stopped or len(episode.response_ids) == 48
        )
        assert episode.text == tokenizer.decode(episode.response_ids, skip_special_tokens=True)
    assert any(episode.finish_reason == "stop" for episode in episodes)


def test_an_engine_asleep_needs_weights(engine, learner, prompts):
    sync(engine, learner)
    expected = tokens(engine, prompts)
    engine.sleep()
    engine.sleep()
    with pytest.raises(RuntimeError, match="sleeps without weights; call load_weights first"):
        engine.generate(requests(prompts), GREEDY)
    sync(engine, learner)  # weights, no cache
    engine.sleep()  # in this state vLLM may ignore it
    assert engine.state == "asleep" and engine.llm.llm_engine.is_sleeping()
    sync(engine, learner)
    assert (
        engine.state == "no cache"
        and tokens(engine, prompts) == expected
        and engine.state == "awake"
    )


def test_weights_that_are_not_read_leave_buffers_as_they_were_built(engine):
    """vLLM's own format for this makes the buffers of a state dict random, too."""
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader

    layer = torch.nn.BatchNorm1d(3)
    loader = get_model_loader(
        LoadConfig(load_format=engine.llm.llm_engine.vllm_config.load_config.load_format)
    )
    loader.load_weights(layer, None)
    assert layer.weight.abs().max() < 0.01 and layer.running_var.tolist() == [1, 1, 1]


def test_what_vllm_ignores_is_an_error(engine, learner, monkeypatch):
    """Regression: it only warns, unseen; old keys would be read, or generate() would hang."""
    engine.sleep()
    with monkeypatch.context() as patched:
        patched.setattr(engine.llm, "wake_up", lambda tags: None)
        with pytest.raises(
            RuntimeError, match="still sleeps after it was told to wake its weights"
        ):
            sync(engine, learner)
    sync(engine, learner)
    with monkeypatch.context() as patched:
        patched.setattr(engine.llm, "wake_up", lambda tags: None)
        with pytest.raises(RuntimeError, match="still sleeps .* wake its kv_cache"):
            engine.generate([], GREEDY)
    with monkeypatch.context() as patched:
        patched.setattr(engine.llm, "reset_prefix_cache", lambda: False)
        with pytest.raises(RuntimeError, match="cannot reset its prefix cache"):
            sync(engine, learner)
    sync(engine, learner)


@pytest.mark.parametrize(
    ("gpu", "gibibytes"),
    [("NVIDIA H100 80GB HBM3", 79.1), ("NVIDIA A100-SXM4-80GB", 79.3), ("NVIDIA L4", 22.5)],
)
def test_sequences_at_a_time_are_vllms_own_default(monkeypatch, gpu, gibibytes):
    from vllm.engine import arg_utils
    from vllm.usage.usage_lib import UsageContext

    memory = int(gibibytes * 2**30)
    here = {"get_device_total_memory": memory, "get_device_name": gpu, "is_cpu": False}
    for name, value in here.items():
        monkeypatch.setattr(arg_utils.current_platform, name, lambda *_, value=value: value)
    _, sequences = arg_utils.EngineArgs.get_batch_defaults(1)
    assert usual_sequences(gpu, memory) == sequences[UsageContext.LLM_CLASS]


class HostMemory:
    """What vLLM calls of CUDA, on host memory."""

    cudaMemset = ctypes.memset
    cudaMemcpy = ctypes.memmove
    cudaDeviceSynchronize = int


def test_memory_that_wakes_is_zero(monkeypatch):
    """Regression: a tensor that is no buffer held what was in the memory that woke."""
    from vllm.device_allocator import AllocationData, cumem

    from infra import vllm_setup

    monkeypatch.setattr(cumem, "libcudart", HostMemory)
    monkeypatch.setattr(cumem, "create_and_map", lambda handle: None)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    vllm_setup.zero_woken_memory()
    allocator = object.__new__(cumem.CuMemAllocator)
    allocator.pointer_to_data = {}
    memory = {}
    for tag in ("weights", "runtime", "kv_cache"):
        memory[tag] = torch.full((64,), 7, dtype=torch.uint8)
        pointer = memory[tag].data_ptr()
        allocator.pointer_to_data[pointer] = AllocationData((0, 64, pointer, 0), tag)
        allocator.pointer_to_data[pointer].is_asleep = True
        if tag == "runtime":  # kept while asleep
            kept = torch.arange(64, dtype=torch.uint8)
            allocator.pointer_to_data[pointer].cpu_backup_tensor = kept
    allocator.wake_up(["weights"])
    assert (memory["weights"] == 0).all()
    assert memory["runtime"].equal(kept)
    assert (memory["kv_cache"] == 7).all(), "still asleep"
    allocator.wake_up(["kv_cache"])
    assert (memory["kv_cache"] == 0).all()


def test_every_loader_sees_the_same_ids(engine, world):
    """Regression: a character tokenizer lost its spaces in AutoTokenizer, and with them the model its accuracy."""
    tokenizer, theirs = (
        AutoTokenizer.from_pretrained(world.path("model")),
        engine.llm.get_tokenizer(),
    )
    for name in ("train", "test", "expert"):
        for row in map(json.loads, Path(world.path(f"{name}.jsonl")).read_text().splitlines()):
            text = row["problem"] + row["solution"]
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert (
                tokenizer.decode(ids) == text
                and theirs(text, add_special_tokens=False)["input_ids"] == ids
            )


# ---- Training, and what comes out


@pytest.fixture
def config(world, flow_folder, tmp_path) -> train_rl.Config:
    settings = {"max_tokens": 48, "flow_soft": 1.0, "engine": "vllm"}
    return small_run(world, flow_folder, tmp_path / "run", **settings, **BY_LENGTH)


def test_training_with_vllm_repeats_and_its_phases_add_up(config, world):
    """Of two runs one evaluates, before the first step and after each, which changes nothing."""
    held_out = {"eval_data": (world.path("test.jsonl"),), "eval_every": 1, "eval_samples": 2}
    for name, evaluation in {"a": {}, "b": held_out}.items():
        began = time.perf_counter()
        run_with_vllm(train_rl.main, change(config, folder=config.folder + name, **evaluation))
        took = time.perf_counter() - began
    a, b = (read_lines(Path(config.folder + name) / "metrics.jsonl") for name in "ab")
    assert all("eval/test/sampled" in line for line in b)
    for line in a + b:
        names = ("sync", "roll_out", "score", "verify", "update", "record", "evaluate")
        phases = [line[f"time/{phase}"] for phase in names]
        assert sum(phases) == pytest.approx(line["time/step"], rel=0.05)
        assert line["mismatch/ratio_max"] == pytest.approx(1, abs=1e-3)
        assert line["mismatch/nan"] == 0
    assert sum(line["time/step"] for line in b) < took
    without = [
        {k: v for k, v in line.items() if "eval/" not in k} for line in figures(config.folder + "b")
    ]
    assert figures(config.folder + "a") == without


def test_the_exported_policy_loads_everywhere(config, world, tmp_path, prompts):
    """E. transformers, vLLM and TRL read it, and continue in the same words."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    train_rl.main(change(config, engine="torch"))
    folder = str(Path(config.folder) / "policy")
    assert {"generation_config.json", "tokenizer.json", "model.safetensors"} <= {
        p.name for p in Path(folder).iterdir()
    }
    ids = torch.tensor([prompt[-200:] for prompt in prompts])
    model = AutoModelForCausalLM.from_pretrained(folder)
    arguments = GRPOConfig(
        output_dir=str(tmp_path / "trl"),
        use_cpu=True,
        report_to="none",
        per_device_train_batch_size=8,
    )
    data = Dataset.from_list(
        [{"prompt": problem.text} for problem in problems_in(world.path("train.jsonl"))]
    )
    trainer = GRPOTrainer(
        folder,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=data,
    )
    greedy = dict(attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=32)
    by_transformers, by_trl = (
        each.eval().generate(ids, **greedy)[:, 200:].tolist() for each in (model, trainer.model)
    )
    by_vllm = tokens(vllm_engine(folder, LENGTH, can_sleep=False), ids.tolist())
    assert (
        by_trl == by_transformers
        and [row[: len(other)] for row, other in zip(by_transformers, by_vllm, strict=True)]
        == by_vllm
    )
