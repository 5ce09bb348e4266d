"""The published settings: everything but --model and --data follows from the model. Hub ids come from a local hub cache."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import find_model_in, read_lines
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import train_flow
import train_rl
from infra import memory
from infra.data import DataSettings, ProblemSettings, load_problems, load_rows, make_prompts
from infra.models import Model
from infra.settings import change, flatten, parse_config
from infra.solutions import SolutionSettings, load_solutions
from worlds import toy

CONFIGS = {
    "Qwen/Qwen2.5-Math-1.5B": Qwen2Config(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True,
    ),
    "Qwen/Qwen2.5-Math-7B": Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, max_position_embeddings=4096,
    ),
    "meta-llama/Llama-3.1-8B": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131072,
    ),
    "Qwen/Qwen2.5-VL-3B-Instruct": Qwen2_5_VLConfig(text_config=dict(
        vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
        num_key_value_heads=2, max_position_embeddings=128000, tie_word_embeddings=True,
    )),
    "Qwen/Qwen2.5-VL-7B-Instruct": Qwen2_5_VLConfig(text_config=dict(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, max_position_embeddings=128000,
    )),
}  # fmt: skip


def snapshot(name: str) -> Path:
    """Make the folder of a model in the local hub cache."""
    repository = Path(os.environ["HF_HUB_CACHE"]) / f"models--{name.replace('/', '--')}"
    folder = repository / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True, exist_ok=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text("0" * 40)
    return folder


def save_tokenizer(world, folder: Path, llama: bool) -> None:
    """Save the embedded world's tokenizer, for a Llama with that family's special tokens."""
    tokenizer = AutoTokenizer.from_pretrained(world.path("model"))
    if llama:
        specials = [
            "<|begin_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
            "<|end_of_text|>",
        ]
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|end_of_text|>"
        )
        tokenizer.add_special_tokens({"additional_special_tokens": specials})
    tokenizer.save_pretrained(folder)


CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def set_chat_template(folder: Path) -> None:
    """Give a model's tokenizer a chat template, as those of vision-language models have one."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("short", "blocks", "repeats", "tokens", "template"),
    [
        ("Qwen2.5-Math-1.5B", 4, 4, 1024, "qwen"),
        ("Qwen2.5-Math-7B", 6, 2, 1024, "qwen"),
        ("Llama-3.1-8B", 6, 2, 1024, "llama"),
        ("Qwen2.5-VL-3B-Instruct", 4, 4, 1024, "bare"),
        ("Qwen2.5-VL-7B-Instruct", 6, 4, 3072, "bare"),
    ],
)
def test_model_and_data_are_enough(
    world, monkeypatch, capsys, short, blocks, repeats, tokens, template
):
    name = next(name for name in CONFIGS if name.endswith(short))
    CONFIGS[name].save_pretrained(snapshot(name))
    save_tokenizer(world, snapshot(name), llama="Llama" in name)
    if "VL" in name:
        toy.make_processor().save_pretrained(snapshot(name))
        set_chat_template(snapshot(name))
    for given in (short, name):  # a short name, a hub id
        monkeypatch.setattr(
            sys, "argv", ["train_rl.py", "--model", given, "--data", "problems.jsonl"]
        )
        rl, model = train_rl.resolve(parse_config(train_rl.Config, toy.PRESETS["train_rl"]))
        offline, _ = train_flow.resolve(parse_config(train_flow.Config, toy.PRESETS["train_flow"]))
        assert model.path == name
    said = capsys.readouterr().out
    assert (
        f"flow_blocks={blocks}" in said
        and f"noise_repeats={repeats}" in said
        and f"max_tokens={tokens}" in said
        and f"template={template}" in said
    )
    has_vision = "VL" in name
    assert offline.batch_size == 128 and offline.epochs == 2 and offline.lr == 1e-4
    assert flatten(offline).items() >= {
        "flow_blocks": blocks, "noise_repeats": repeats, "template": template, "warmup": 0.1,
        "weight_decay": 0.01, "cutoff": 16384 if has_vision else 8192, "max_pixels": 262_144,
        "flow_times": "random",
    }.items()  # fmt: skip
    assert flatten(rl).items() >= {
        "max_tokens": tokens, "template": template, "max_prompt_tokens": 3000, "max_pixels": 640 * 28**2,
        "reward": ("vlm", "tags=0.5") if has_vision else ("binary",), "prompts": 128,
        "group_size": 8, "train_batch": 128, "lr": 1e-6, "warmup": 0.03,
        "clip_norm": 1.0, "temperature": 1.0, "kl_coef": 0.0, "flow_lr": 1e-4, "epochs": 5,
        "dense_coef": 0.01, "flow_threshold": 0.6, "flow_top_k": 15, "reward_times": (0.8,),
        "shaping": "flow", "baseline": "grpo", "clip": (0.2, 0.2),
        "normalisation": "sequence",
        "recompute_layers": model.text_config.num_hidden_layers * (model.n_parameters > 1e9),
        "problem_column": "prompt" if has_vision else "problem",
        "freeze": "vision" if has_vision else "none",
    }.items()  # fmt: skip


@pytest.mark.parametrize(("n_recomputed", "measured"), [(28, 32e9), (0, 76e9)])
def test_the_memory_of_an_update_is_what_an_h100_measured(monkeypatch, n_recomputed, measured):
    """benchmarks/RESULTS.md: 1.544e9 weights of the policy and 0.064e9 of the flow, on one rank.

    With a budget of 16,384, the largest micro-batch of those episodes had 16,128 padded tokens.
    """
    monkeypatch.setattr("infra.logprobs.CHUNK_LOGITS", 2**28)  # as on a GPU
    sizes = CONFIGS["Qwen/Qwen2.5-Math-1.5B"]
    estimate = memory.update_bytes(sizes, 1.608e9, 16_128, 1, n_recomputed)
    assert estimate == pytest.approx(measured, rel=0.05)


H100, H200 = 85e9, 150e9  # bytes
N_PARAMETERS = {  # without an untied head
    "Qwen/Qwen2.5-Math-1.5B": 1.544e9,
    "Qwen/Qwen2.5-Math-7B": 7.07e9,
    "Qwen/Qwen2.5-VL-3B-Instruct": 3.09e9,
}


@pytest.mark.parametrize(
    ("name", "options", "n_ranks", "room", "expected"),
    [
        ("Qwen/Qwen2.5-Math-1.5B", {}, 1, H100, 6),  # keeping all would take 78 of 68 GB
        ("Qwen/Qwen2.5-Math-1.5B", {"tokens_per_gpu": 8192}, 1, H100, 0),  # 54 GB
        ("Qwen/Qwen2.5-Math-1.5B", {"offload": "always"}, 1, H100, 0),  # 52 GB
        ("Qwen/Qwen2.5-Math-1.5B", {}, 8, H100, 0),  # 55 GB
        ("Qwen/Qwen2.5-Math-1.5B", {}, 1, H200, 0),  # 78 of 120 GB
        # a row of 35,768 tokens, over the budget of a micro-batch: 111 GB
        ("Qwen/Qwen2.5-Math-1.5B", {"max_tokens": 32_768}, 8, H100, 13),
        ("Qwen/Qwen2.5-Math-1.5B", {"max_prompt_tokens": 32_768}, 8, H100, 12),
        ("Qwen/Qwen2.5-Math-1.5B", {"lora_rank": 8}, 8, H100, 28),  # no arithmetic for it
        ("Qwen/Qwen2.5-Math-1.5B", {}, 8, 0, 28),  # no GPU
        ("Qwen/Qwen2.5-Math-7B", {}, 8, H100, 17),  # 126 GB
        ("Qwen/Qwen2.5-Math-7B", {}, 1, H100, 28),  # not even so
        ("Qwen/Qwen2.5-VL-3B-Instruct", {}, 8, H200, 36),  # no arithmetic for it
    ],
)
def test_how_many_layers_recompute_activations(monkeypatch, name, options, n_ranks, room, expected):
    """As few as fit into four fifths of the memory; one fewer would not."""
    monkeypatch.setattr("infra.logprobs.CHUNK_LOGITS", 2**28)  # as on a GPU
    model = Model("", CONFIGS[name], N_PARAMETERS[name], None)
    settings = {"tokens_per_gpu": 16_384, "max_prompt_tokens": 3000, "max_tokens": 1024, **options}
    config = change(train_rl.Config(), **settings)
    assert memory.layers_to_recompute(config, model, n_ranks, room) == expected


def test_a_tiny_model_under_a_hub_id_trains(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = snapshot("Qwen/Qwen2.5-0.5B")
    torch.manual_seed(0)
    config = Qwen2Config.from_pretrained(world.path("model"), max_position_embeddings=8192)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    save_tokenizer(world, folder, llama=False)
    train_flow.main(
        change(train_flow.Config(), model="Qwen2.5-0.5B", data=world.path("expert.jsonl"), epochs=1)
    )
    train_rl.main(
        change(
            train_rl.Config(),
            model="Qwen2.5-0.5B",
            data=world.path("train.jsonl"),
            prompts=2,
            group_size=2,
            train_batch=4,
            steps=1,
            max_tokens=8,
        )
    )
    (line,) = read_lines(tmp_path / "runs" / "rl-Qwen2.5-0.5B-flow" / "metrics.jsonl")
    assert 0 < line["length"] <= 8 and line["flow/score"] > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tensor_parallel": 2}, "tensor_parallel=2: expected a divisor of 1 ranks, and vLLM"),
        ({"cache_share": 1.5}, "--cache-share=1.5: expected a number between 0 and 1"),
    ],
)
def test_settings_of_ranks_and_engines(options, words):
    with pytest.raises(ValueError, match=words):
        train_rl.resolve(change(change(train_rl.Config(), **toy.TRAIN_RL), **options))


def test_an_engine_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("engines.choice.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match="--engine vllm: vLLM is not installed; pip install -r requirements.txt"
    ):
        train_rl.resolve(change(train_rl.Config(), **toy.TRAIN_RL, engine="vllm"))


def test_placeholders_of_images_are_refused(world):
    """Regression: an engine expands a placeholder without an image, or expands expanded ones again, silently."""
    model = find_model_in(world.path("model"))
    settings = DataSettings(template="none", max_prompt_tokens=64)
    with pytest.raises(
        ValueError, match=r"row 1 has 0 images and 1 tokens <\|image_pad\|> in its prompt; drop"
    ):
        make_prompts(["a", "b <|image_pad|>"], [(), ()], model, settings)


# ---- Expert solutions


@pytest.mark.parametrize(
    ("template", "end"),
    [
        ("qwen", "<|im_end|>\n"),
        ("llama", "<|eot_id|>"),
        ("bare", "<|im_end|>\n"),
        ("none", "<|im_end|>"),  # the tokenizer's EOS
    ],
)
def test_an_expert_solution_ends_as_a_turn_does(world, tmp_path, template, end):
    data = tmp_path / "expert.jsonl"
    data.write_text('{"problem": "1+1>", "solution": "2"}\n')
    model = find_model_in(world.path("model"))
    model.tokenizer.chat_template = CHAT
    settings = SolutionSettings(
        template=template, problem_column="problem", max_prompt_tokens=300, cutoff=400
    )
    (solution,) = load_solutions(str(data), settings, model)
    assert model.tokenizer.decode(solution.response_ids) == "2" + end
    cut = replace(settings, cutoff=len(solution.prompt_ids) + 1)
    (solution,) = load_solutions(str(data), cut, model)
    assert model.tokenizer.decode(solution.response_ids) == "2", "a cut solution does not end"


def test_chats_are_expert_solutions(world, tmp_path):
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "1+1>"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": "3"},
    ]
    conversations = [{"from": "human", "value": "1+1>"}, {"from": "gpt", "value": "2"}]
    model = find_model_in(world.path("model"))
    settings = SolutionSettings(
        template="none", problem_column="problem", max_prompt_tokens=300, cutoff=400
    )
    for column, turns in {"messages": messages, "conversations": conversations}.items():
        data = tmp_path / f"{column}.jsonl"
        data.write_text(json.dumps({column: turns}) + "\n")
        (solution,) = load_solutions(str(data), settings, model)
        assert model.tokenizer.decode(solution.prompt_ids) == "1+1>"
        assert model.tokenizer.decode(solution.response_ids) == "2<|im_end|>"
        data.write_text(json.dumps({column: turns}) + "\n" + json.dumps({column: turns[:1]}) + "\n")
        with pytest.raises(ValueError, match="row 1 has no user turn followed by an assistant's"):
            load_solutions(str(data), settings, model)


@pytest.mark.parametrize(
    ("name", "offline", "rl"),
    [
        ("Qwen/Qwen2.5-Math-1.5B", "LM/openr1_math_default", "LM/math-lvl3to5-8k"),
        ("Qwen/Qwen2.5-VL-3B-Instruct", "VLM/MMPRv1.1_Math", "VLM/mmeureka_prompt.jsonl"),
    ],
)
def test_without_data_the_published_sets_are_taken(world, capsys, name, offline, rl):
    CONFIGS[name].save_pretrained(snapshot(name))
    save_tokenizer(world, snapshot(name), llama=False)
    if "VL" in name:
        toy.make_processor().save_pretrained(snapshot(name))
    sets = [f"JingHaoZ/RLFR-Dataset-{each}" for each in (offline, rl)]
    config, _ = train_flow.resolve(train_flow.Config(model=name))
    assert config.data == sets[0]
    config, _ = train_rl.resolve(train_rl.Config(model=name))
    assert config.data == sets[1]
    said = capsys.readouterr().out
    assert f"taking the published expert solutions, {sets[0]}" in said
    assert f"taking the published problems, {sets[1]}" in said


def test_subsets_of_a_hub_data_set(tmp_path):
    folder = tmp_path / "hub"
    for subset, answer in (("main", "1"), ("hard", "2")):
        (folder / subset).mkdir(parents=True)
        row = {"problem": "a", "answer": answer}
        (folder / subset / "train.jsonl").write_text(json.dumps(row) + "\n")
    card = "---\nconfigs:\n" + "".join(
        f"- config_name: {name}\n  data_files: {name}/train.jsonl\n" for name in ("main", "hard")
    )
    (folder / "README.md").write_text(card + "---\n")
    rows = load_rows(str(folder), ("problem", "answer"), "train", "hard")
    assert [row["answer"] for row in rows] == ["2"]


def test_the_subset_of_the_settings_is_read(world, tmp_path, monkeypatch):
    import datasets.config

    # datasets caches by the folder's name and subset alone: a run before this one would answer
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "hub"
    for subset, answer in (("main", "1"), ("hard", "2")):
        (folder / subset).mkdir(parents=True)
        row = {"problem": "1+1>", "answer": answer, "solution": answer}
        (folder / subset / "train.jsonl").write_text(json.dumps(row) + "\n")
    card = "---\nconfigs:\n" + "".join(
        f"- config_name: {name}\n  data_files: {name}/train.jsonl\n" for name in ("main", "hard")
    )
    (folder / "README.md").write_text(card + "---\n")
    model = find_model_in(world.path("model"))
    common = dict(subset="hard", template="none", problem_column="problem", max_prompt_tokens=300)
    (problem,) = load_problems(str(folder), ProblemSettings(**common), model)
    assert problem.answer == "2"
    settings = SolutionSettings(**common, cutoff=400)
    (solution,) = load_solutions(str(folder), settings, model)
    assert model.tokenizer.decode(solution.response_ids).startswith("2")


def test_the_bare_template_adds_no_instruction(world):
    model = find_model_in(world.path("model"))
    model.tokenizer.chat_template = CHAT
    settings = DataSettings(template="bare", max_prompt_tokens=300)
    (ids,) = make_prompts(["1+1?"], [()], model, settings)
    expected = "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    assert model.tokenizer.decode(ids) == expected
