"""recipes/official-*.json: what settings can say of the official runs, against their scripts.

The tables below were read from the official scripts and yaml files, not from the recipes.
"""

import json
import re
import sys

import pytest
from conftest import ROOT
from test_published import CONFIGS, save_tokenizer, set_chat_template, snapshot

import train_flow
import train_rl
from infra.kinds import as_tuple
from infra.ranges import check_values
from infra.settings import change, flatten, parse_config
from worlds import toy

RECIPES = sorted((ROOT / "recipes").glob("official-*.json"))
# flow blocks, noise repeats, response tokens, template
OF_THE_MODEL = {
    "Qwen/Qwen2.5-Math-1.5B": (4, 4, 1024, "qwen"),
    "Qwen/Qwen2.5-Math-7B": (6, 2, 1024, "qwen"),
    "meta-llama/Llama-3.1-8B": (6, 2, 1024, "llama"),
    "Qwen/Qwen2.5-VL-3B-Instruct": (4, 4, 1024, "bare"),
    "Qwen/Qwen2.5-VL-7B-Instruct": (6, 4, 3072, "bare"),
}
OFFLINE = {
    "contexts": ("next",),  # token_pre
    "percentiles": (0.25, 0.5, 0.75),
    "shift": 1,
    "flow_times": "random",  # sigmoid of a normal
    "standardise": False,
    "held_out": 0,
    "epochs": 2,
    "batch_size": 128,  # 2 x 16, for images 4 x 8, on 4 GPUs
    "lr": 1e-4,
    "warmup": 0.1,
    "weight_decay": 0.01,
    "drop_empty": True,
    "seed": 42,
}
OFFLINE_TEXT = {
    "data": "JingHaoZ/RLFR-Dataset-LM/openr1_math_default",
    "cutoff": 8192,
    "clip_norm": 1 / 16,  # of a sum over 16 accumulations
}
OFFLINE_IMAGES = {
    "data": "JingHaoZ/RLFR-Dataset-VLM/MMPRv1.1_Math",
    "cutoff": 16384,
    "clip_norm": 1 / 8,
    "images_column": "images",
    "max_pixels": 262_144,
}
RL = {
    "answer_column": "answer",
    "max_prompt_tokens": 3000,
    "prompts": 128,
    "group_size": 8,
    "temperature": 1.0,
    "dynamic_sampling": 0,
    "stop_tokens": "eos",
    "grade_truncated": False,
    "baseline": "grpo",  # group_norm
    "shaping": "flow",
    "dense_after": 0,
    "dense_coef": 0.01,
    "dense_on": "token",
    "reward_times": (0.8,),
    "flow_threshold": 0.6,
    "flow_top_k": 15,
    "flow_scope": "response",
    "dense_clamp": None,
    "dense_centre": False,
    "dense_until": None,
    "dense": (),
    "flow_bilateral": False,
    "gamma": 1.0,
    "contexts": ("previous",),  # token_post
    "percentiles": (0.25, 0.5, 0.75),
    "flow_lr": 0.0,  # no gradient arrives
    "flow_soft": 0.0,  # batch_correct
    "flow_times": "reward",
    "train_batch": 128,
    "epochs": 5,
    "lr": 1e-6,
    "warmup": 0.03,
    "weight_decay": 0.0,
    "clip_norm": 1.0,
    "loss": "ppo",
    "normalisation": "sequence",
    "clip": (0.2, 0.2),
    "kl_coef": 0.0,
    "mismatch": "none",
    "lora_rank": 0,
    "save_every": 50,
    "keep": 3,
    "export_every": 50,
    "seed": 42,
}
RL_TEXT = {
    "data": "JingHaoZ/RLFR-Dataset-LM/math-lvl3to5-8k",
    "problem_column": "problem",
    "reward": ("official",),
    "freeze": "none",
}
RL_IMAGES = {
    "data": "JingHaoZ/RLFR-Dataset-VLM/mmeureka_prompt.jsonl",
    "problem_column": "prompt",
    "images_column": "images",
    "reward": ("vlm", "tags=0.5"),
    "freeze": "vision",
    "max_pixels": 640 * 28**2,
}


def read(path) -> dict:
    """A recipe, with lists as the tuples that settings have."""
    recipe = json.loads(path.read_text())
    for script in ("train_flow", "train_rl"):
        recipe[script] = {name: as_tuple(value) for name, value in recipe[script].items()}
    return recipe


def test_there_is_a_recipe_for_each_published_model():
    names = {f"official-{model.split('/')[1]}.json": model for model in OF_THE_MODEL}
    assert {path.name: read(path)["model"] for path in RECIPES} == names


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_what_the_official_run_did(path):
    recipe = read(path)
    blocks, repeats, n_tokens, template = OF_THE_MODEL[recipe["model"]]
    has_images = template == "bare"
    offline = {"flow_blocks": blocks, "noise_repeats": repeats, "template": template}
    rl = {"max_tokens": n_tokens, "template": template}
    assert (
        recipe["train_flow"] == OFFLINE | (OFFLINE_IMAGES if has_images else OFFLINE_TEXT) | offline
    )
    assert recipe["train_rl"] == RL | (RL_IMAGES if has_images else RL_TEXT) | rl


def save_model(world, name: str) -> None:
    """Put all of a published model but its weights into the local hub cache."""
    CONFIGS[name].save_pretrained(snapshot(name))
    save_tokenizer(world, snapshot(name), llama="Llama" in name)
    if "VL" in name:
        toy.make_processor().save_pretrained(snapshot(name))
        set_chat_template(snapshot(name))


def commands_of_the_page(model: str) -> dict[str, list[str]]:
    """The flags of docs/departures.md for a model, by script."""
    page = (ROOT / "docs" / "departures.md").read_text()
    commands = {}
    for script, flags in re.findall(r"^torchrun .* (train_\w+).py (.*)$", page, re.MULTILINE):
        flags = flags.replace("Qwen2.5-Math-7B", model)
        if "VL" in model:
            flags = flags.replace("--clip-norm 0.0625", "--clip-norm 0.125")
            flags = flags.replace("--reward official ", "")
        commands[script] = flags.split()
    return commands


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_accepted_and_is_what_the_flags_of_the_page_say(world, monkeypatch, path):
    recipe = read(path)
    save_model(world, recipe["model"])
    commands = commands_of_the_page(recipe["model"])
    for script, module in {"train_flow": train_flow, "train_rl": train_rl}.items():
        config = change(module.Config(), model=recipe["model"], **recipe[script])
        check_values(config)
        resolved, _ = module.resolve(config)
        values = flatten(resolved)
        assert {key: values[key] for key in recipe[script]} == recipe[script]
        monkeypatch.setattr(sys, "argv", [script, *commands[script]])
        flags = parse_config(module.Config, toy.PRESETS[script])
        assert module.resolve(flags)[0] == resolved
        monkeypatch.setattr(sys, "argv", [script, "--config", str(path)])
        assert parse_config(module.Config, toy.PRESETS[script]) == config
