"""Adapters: what learns, what engines and exports get, checkpoints; and a rehearsal of the largest update."""

import re
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    figures,
    find_model_in,
    flags,
    last_state,
    problems_in,
    requests,
    save_vlm,
    tiny_vlm,
    torch_engine,
    vllm_engine,
)
from peft import PeftModel
from test_distributed import assert_same_run, finish, start, wait_for_step
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.append(str(ROOT / "benchmarks"))
import flow as fl
import rehearse
import rollout
import train_rl
from engines.common import end_tokens
from infra import batching, lora, parallel
from infra.attention import PACKED
from infra.exports import export_adapter, export_policy
from infra.settings import change
from policy import Policy, load_policy
from run import export_checkpoint

RANK = 4
GREEDY = rollout.Sampling(1, 0.0, 24)


def adapted_policy(path: str) -> Policy:
    """A policy with adapters that have learnt: B is not zero."""
    policy = load_policy(path)
    lora.add_adapters(policy.model, policy.layers, RANK, seed=0)
    torch.manual_seed(1)
    for layer in lora.adapted_layers(policy).values():
        torch.nn.init.normal_(layer.lora_B[lora.ADAPTER].weight, std=0.1)
    return policy


def sharded(policy: Policy, dtype=torch.float32) -> Policy:
    parallel.shard(policy, policy.blocks, dtype)
    return policy


@pytest.fixture(scope="module")
def adapted(world) -> Policy:
    return sharded(adapted_policy(world.path("model")))


@pytest.fixture(scope="module")
def batch() -> batching.Batch:
    return batching.collate([batching.Row([1, 2, 3], [4, 5, 6, 7]), batching.Row([3, 1], [8, 9])])


@pytest.fixture(scope="module")
def config(world, flow_folder, tmp_path_factory) -> train_rl.Config:
    """A few small steps with adapters."""
    return change(
        train_rl.Config(),
        model=world.path("model"),
        data=world.path("train.jsonl"),
        flow=flow_folder,
        template="none",
        prompts=4,
        group_size=4,
        train_batch=8,
        max_tokens=16,
        max_prompt_tokens=64,
        steps=4,
        lr=1e-3,
        flow_lr=1e-3,
        lora_rank=RANK,
        seed=1,  # with 0 a gradient is 0 but for rounding, which AdamW blows up
        save_every=1,
        tokens_per_gpu=300,
        grade_truncated=True,
        reward=(str(ROOT / "tests" / "length_reward.py"),),
        folder=str(tmp_path_factory.mktemp("lora") / "one"),
    )


@pytest.fixture(scope="module")
def one(config) -> str:
    """The run of one process."""
    train_rl.main(config)
    return config.folder


# ---- What learns


def test_only_adapters_have_gradients_and_optimiser_state(world, batch):
    policy = sharded(adapted_policy(world.path("model")), torch.bfloat16)
    learner = parallel.Learner(policy, (0.9, 0.95), 0.0)
    policy(batch).logp.sum().backward()
    for name, parameter in policy.named_parameters():
        assert (parameter.grad is not None) == lora.is_adapter(name), name
        expected = torch.float32 if lora.is_adapter(name) else torch.bfloat16
        assert parameter.dtype == expected, name
    buffers = {buffer.dtype for buffer in policy.buffers() if buffer.is_floating_point()}
    assert buffers == {torch.float32}, "rotary frequencies"

    # in and out of q and o, k and v, and the three of the feed-forward
    text = policy.model.config
    n_keys = text.num_key_value_heads * (text.hidden_size // text.num_attention_heads)
    width, inner = text.hidden_size, text.intermediate_size
    in_and_out = 2 * (width + width) + 2 * (width + n_keys) + 3 * (width + inner)
    n_adapters = text.num_hidden_layers * RANK * in_and_out
    assert sum(p.numel() for p in learner.parameters) == n_adapters
    state = learner.state_dict()
    assert sum(tensor.numel() for tensor in state["module"].values()) == n_adapters
    kept = [t for values in state["optimizer"]["state"].values() for t in values.values()]
    assert sum(tensor.numel() for tensor in kept if tensor.ndim) == 2 * n_adapters


def test_adapters_start_as_the_model_and_follow_the_seed(world, policy, batch):
    starts = []
    for seed in (0, 0, 1):
        other = load_policy(world.path("model"))
        before = torch.random.get_rng_state()
        lora.add_adapters(other.model, other.layers, RANK, seed)
        assert torch.equal(torch.random.get_rng_state(), before)
        starts.append(dict(lora.adapter_weights(other, "model.")))
    assert torch.equal(other(batch).logp, policy(batch).logp)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    assert torch.equal(starts[0][name], starts[1][name])
    assert not torch.equal(starts[0][name], starts[2][name])


def test_the_tower_of_a_vision_language_model_has_no_adapters(tmp_path, batch):
    folder = save_vlm(tiny_vlm("qwen2_5_vl"), tmp_path)
    plain = {name for name, _ in load_policy(folder).model.named_parameters()}
    policy = sharded(adapted_policy(folder))
    assert set(dict(policy.whole_weights(torch.float32))) >= plain
    policy(batch).logp.sum().backward()
    names = {name for name, p in policy.named_parameters() if p.grad is not None}
    assert names == {name for name, _ in policy.named_parameters() if lora.is_adapter(name)}
    assert names and all("language_model.layers" in name for name in names)


# ---- What engines and exports get


def test_merged_weights_are_w_plus_scale_b_a(world, adapted, batch):
    plain = load_policy(world.path("model"))
    state = plain.model.state_dict()
    merged = dict(adapted.whole_weights(torch.float32))
    assert merged.keys() == state.keys()
    parts = {name: parallel.gather(t) for name, t in adapted.state_dict().items()}
    n_changed = 0
    for name, weight in state.items():
        layer = f"model.{name.removesuffix('.weight')}"
        expected = weight
        if f"{layer}.lora_A.default.weight" in parts:
            a = parts[f"{layer}.lora_A.default.weight"].double()
            b = parts[f"{layer}.lora_B.default.weight"].double()
            expected = (weight.double() + 2.0 * (b @ a)).float()  # alpha is twice the rank
            assert not torch.allclose(expected, weight)
            n_changed += 1
        torch.testing.assert_close(merged[name], expected)
    assert n_changed == 7 * plain.n_layers

    plain.model.load_state_dict(merged)
    with torch.no_grad():
        expected = adapted(batch, 0.7, taps=[1])
        got = plain(batch, 0.7, taps=[1])
    torch.testing.assert_close(got.logp, expected.logp, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.latents[0], expected.latents[0], rtol=1e-4, atol=1e-4)


def likeliest(model, prompts: list[list[int]], ends: list[int]) -> list[list[int]]:
    """What transformers' greedy decoding makes of a model."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        generated = model.generate(
            ids, do_sample=False, max_new_tokens=GREEDY.max_tokens, eos_token_id=ends
        )
        found.append(generated[0, len(prompt) :].tolist())
    return found


@pytest.mark.parametrize("kind", ["torch", pytest.param("vllm", marks=pytest.mark.vllm)])
def test_engines_and_exports_say_what_the_policy_finds_likeliest(world, adapted, tmp_path, kind):
    path = world.path("model")
    prompts = [problem.prompt_ids for problem in problems_in(world.path("test.jsonl"))[:6]]
    ends = end_tokens(find_model_in(path))
    expected = likeliest(adapted_policy(path).model, prompts, ends)
    base = AutoModelForCausalLM.from_pretrained(path)
    assert likeliest(base, prompts, ends) != expected, "the adapters change what is said"

    engine = torch_engine(path) if kind == "torch" else vllm_engine(path, 128)
    engine.load_weights(adapted.whole_weights(torch.float32))
    episodes = engine.generate(requests(prompts), GREEDY)
    assert [episode.response_ids for episode in episodes] == expected
    if kind == "vllm":
        return
    export_policy(adapted, torch.float32, [None], tmp_path / "policy")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert likeliest(exported, prompts, ends) == expected
    export_adapter(adapted, path, tmp_path / "adapter")
    beside = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert likeliest(beside, prompts, ends) == expected


def test_the_base_is_the_model_before_it_learnt(world, policy, batch):
    adapted = sharded(adapted_policy(world.path("model")))
    base = lora.WithoutAdapters(adapted)
    with torch.no_grad():
        torch.testing.assert_close(base(batch, 0.7).logp, policy(batch, 0.7).logp)
        assert not torch.allclose(adapted(batch, 0.7).logp, policy(batch, 0.7).logp)
    adapted(batch, 0.7).logp.sum().backward()
    assert sum(p.grad is not None for p in adapted.parameters()) == 2 * 7 * policy.n_layers


def test_a_kl_to_the_base(config, tmp_path):
    settings = {
        "kl_coef": 0.1,
        "steps": 2,
        "train_batch": 16,
        "save_every": 0,
        "offload": "sampling",
    }
    train_rl.main(change(config, folder=str(tmp_path / "run"), **settings))
    first, second = figures(tmp_path / "run")
    assert first["policy/kl"] == pytest.approx(0.0, abs=1e-9), "B is zero"
    assert second["policy/kl"] > 1e-6


# ---- Runs


def test_a_vision_language_model_learns_in_its_decoder_alone(config, image_world, tmp_path):
    """What it exports has the names and the other weights it had."""
    folder = tmp_path / "run"
    images = {"model": image_world.path("model"), "data": image_world.path("train.jsonl")}
    options = {"problem_column": "prompt", "steps": 1, "save_every": 0}
    train_rl.main(change(config, folder=str(folder), **images, **options))
    before = load_policy(images["model"]).model.state_dict()
    after = load_policy(str(folder / "policy")).model.state_dict()
    assert before.keys() == after.keys()
    for name, weight in before.items():
        is_adapted = re.search(r"language_model\.layers\..*_proj\.weight$", name) is not None
        assert torch.equal(weight, after[name]) != is_adapted, name


def test_two_ranks_follow_one_process(one, config, tmp_path):
    folder = str(tmp_path / "two")
    finish("train_rl.py", flags(change(config, folder=folder)))
    assert_same_run(one, folder)


def test_a_killed_run_goes_on_bit_for_bit(one, config, tmp_path):
    folder = str(tmp_path / "run")
    process = start("train_rl.py", flags(change(config, folder=folder)), 1)
    wait_for_step(folder, 2, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    train_rl.main(change(config, folder=folder, resume=folder))
    assert figures(folder) == figures(one)
    got, expected = last_state(folder), last_state(one)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        same = torch.equal(got[name], value) if torch.is_tensor(value) else got[name] == value
        assert same, name
    weights = [name for name in expected if name.startswith("['policy']['module']")]
    assert weights and all(lora.is_adapter(name) for name in weights), "the base is on the disk"


def test_a_checkpoint_is_exported(one, tmp_path):
    """As the run itself exported it at its end."""
    export_checkpoint(one, 4, str(tmp_path))
    for file in ("policy/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / file).read_bytes() == (Path(one) / file).read_bytes(), file


def test_offloading_changes_nothing(one, config, tmp_path):
    train_rl.main(change(config, folder=str(tmp_path / "run"), offload="sampling"))
    assert_same_run(one, str(tmp_path / "run"))


def test_compiled_and_recomputed_it_is_the_same(config, batch, monkeypatch):
    """With the adapters on and off: what is traced is run, without code made for it."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    results = []
    for options in ({}, {"compile": "on", "recompute_layers": 2}):
        policy = train_rl.make_policy(
            change(config, freeze="none", **options), find_model_in(config.model)
        )
        for layer in lora.adapted_layers(policy).values():
            torch.nn.init.constant_(layer.lora_B[lora.ADAPTER].weight, 0.1)
        output = policy(batch, 0.7, taps=[1])
        with torch.no_grad():
            base = lora.WithoutAdapters(policy)(batch, 0.7).logp
        output.logp.sum().backward()
        gradients = [parallel.gather(p.grad) for p in policy.parameters() if p.grad is not None]
        results.append([output.logp, base, output.latents[0], *gradients])
    assert len(results[0]) == 3 + 2 * 7 * policy.n_layers
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


# ---- Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_rank": -1}, "--lora-rank=-1: expected a whole number from 0"),
    ],
    ids=str,
)
def test_bad_settings(config, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        train_rl.main(change(config, folder=None, **options))


def test_without_peft_it_says_what_to_install(config, monkeypatch):
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install peft"):
        train_rl.main(config)


def test_a_tower_that_should_learn_is_refused(config, tmp_path):
    folder = save_vlm(tiny_vlm("qwen2_5_vl"), tmp_path)
    with pytest.raises(ValueError, match="freeze='none' with lora_rank=4: the tower has no"):
        train_rl.resolve(change(config, model=folder, freeze="none", folder=None))


@pytest.mark.parametrize("options", [{"lora_rank": 8}, {"lora_rank": 0}], ids=str)
def test_a_resumed_run_keeps_its_adapters(one, config, options):
    (name,) = options
    settings = change(config, resume=one)
    with pytest.raises(ValueError, match=f"that run has {name}=.*, this one asks for"):
        train_rl.main(change(settings, **options))


# ---- Rehearsal


@pytest.mark.parametrize(
    "options",
    [{}, {"lora_rank": 0, "flow_soft": 1.0}, {"kl_coef": 0.1, "shaping": "none"}],
    ids=str,
)
def test_a_rehearsal_meets_the_longest_lengths(config, tmp_path, options, monkeypatch, capsys):
    sizes = []
    forward = Policy.forward

    def spy(policy, batch, *arguments, **named):
        learns = torch.is_grad_enabled()
        n_prompts = len(batch.input_ids[:, :64].unique(dim=0))
        sizes.append((learns, n_prompts, *batch.input_ids.shape, batch.response_mask.shape[1]))
        return forward(policy, batch, *arguments, **named)

    monkeypatch.setattr(Policy, "forward", spy)
    rehearse.main(change(config, folder=str(tmp_path / "run"), **options))
    # 300 tokens have room for 3 rows of 80, scored and then learnt from, and for more short ones
    assert (False, 3, 3, 80, 16) in sizes and (True, 3, 3, 80, 16) in sizes
    shortest = len(min(problems_in(config.data), key=lambda p: len(p.prompt_ids)).prompt_ids)
    widths = {size[3] for size in sizes if size[2] > 3 and size[4] == 16}
    assert any(shortest + 16 <= width < 80 for width in widths)
    assert "rehearsed an update at 64 + 16 tokens; there is no GPU" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_what_does_not_fit_names_the_settings_to_lower(config, tmp_path, monkeypatch):
    """Planted: a CPU never says that a GPU is full."""

    def is_full(*_arguments, **_named):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Policy, "forward", is_full)
    with pytest.raises(MemoryError) as caught:
        rehearse.main(change(config, folder=str(tmp_path / "run")))
    for setting in ("--tokens-per-gpu (now 300)", "--max-tokens (now 16)", "--lora-rank (now 4)"):
        assert f"a lower {setting}" in str(caught.value)
    assert "a larger --recompute-layers (now 0)" in str(caught.value)


# ---- Memory

SHAPES = {  # of the published configurations
    "Qwen2.5-1.5B": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "Qwen2.5-7B": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}


def n_bytes(parameters) -> int:
    return sum(parameter.nbytes for parameter in parameters)


@pytest.mark.parametrize("rank", [0, 32])
@pytest.mark.parametrize("name", SHAPES)
def test_the_table_of_memory(name, rank):
    """What lives on one GPU between forward and backward, and while the engine samples."""
    config = AutoConfig.for_model("qwen2", **SHAPES[name])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        policy = Policy(model, PACKED)  # it has no weights that could tell
        flow = fl.Flow(fl.FlowConfig(config.hidden_size, 6 if name == "Qwen2.5-7B" else 4))
    engine = n_bytes(policy.parameters())
    if rank:
        lora.add_adapters(policy.model, policy.layers, rank, seed=0)
    parallel.set_dtypes(policy, torch.bfloat16)
    learns = n_bytes(p for p in policy.parameters() if p.requires_grad)
    # weights, gradients and the two moments of AdamW, likewise for the flow
    sizes = [n_bytes(policy.parameters()), learns, 2 * learns, 4 * n_bytes(flow.parameters()), engine]  # fmt: skip
    cells = [f"{size / 1e9:.1f}" for size in [*sizes, sum(sizes)]]
    what = f"adapters, `--lora-rank {rank}`" if rank else "all weights"
    row = f"| {name} | {what} | {' | '.join(cells)} |"
    assert row in (ROOT / "docs" / "running.md").read_text()
    fits = sum(sizes) < 80e9
    assert fits == (rank > 0 or name == "Qwen2.5-1.5B")
