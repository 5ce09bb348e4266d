"""Tests that need torchvision, as vLLM does for images; test_vision.py runs them in a process that has it."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, drawing, save_vlm, tiny_vlm
from PIL import Image

import parallel
import rlfr
import rollout
import toy
import train_rl
import vision
from rollout import Sampling

GREEDY = Sampling(temperature=0.0, max_tokens=24)
TOKENIZER = toy.make_tokenizer(images=True)
TEXTS, DRAWN = (
    ["<image>sum>", "what?", "<image>a<image>b", "<image>c"],
    [["1 +2 +3>"], [], ["4 +5>", "7 +7>"], ["1 +2 +3>"]],
)


def test_the_same_pixel_values_with_and_without_torchvision(tmp_path):
    toy.make_processor().save_pretrained(tmp_path)
    fast, plain = vision.load_processor(str(tmp_path)), toy.make_processor()
    assert type(fast) is not type(plain) and "Pil" in type(plain).__name__
    rng = np.random.default_rng(0)
    smooth = np.kron(rng.integers(0, 256, (9, 13, 3)), np.ones((17, 15, 1))).astype(np.uint8)
    for array in (smooth, rng.integers(0, 256, (50, 90, 3), dtype=np.uint8)):
        Image.fromarray(array).save(file := io.BytesIO(), "png")
        row = [{"images": file.getvalue()}]
        a, b = (
            vision.load_images(row, "images", processor, ".", 1)[0][0]
            for processor in (fast, plain)
        )
        assert a.grid == b.grid and (a.pixel_values() - b.pixel_values()).abs().max() <= 1e-5


@pytest.fixture(scope="module", params=vision.FAMILIES)
def folder(request, tmp_path_factory) -> str:
    return save_vlm(tiny_vlm(request.param), tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def model(folder) -> rollout.Model:
    return rollout.find_model(folder)


@pytest.fixture(scope="module")
def engine(model):
    return rollout.VllmEngine(
        model.path, TOKENIZER, 352, max_sequences=32, processor=model.processor
    )


@pytest.fixture(scope="module")
def images(model) -> list[tuple[vision.Image, ...]]:
    return [tuple(drawing(problem, model.processor) for problem in drawn) for drawn in DRAWN]


@pytest.fixture(scope="module")
def prompts(images) -> list[list[int]]:
    return rollout.make_prompts(TEXTS, TOKENIZER, rollout.Source(template="none"), images)


@pytest.fixture
def learner(folder) -> parallel.Learner:
    policy = rlfr.load_policy(folder)
    parallel.shard(policy, policy.blocks, torch.float32)
    return parallel.Learner(policy, (0.9, 0.95), 0.0)


def sync(engine, learner: parallel.Learner) -> None:
    engine.load_weights(parallel.full_weights(learner.module, torch.float32, prefix="model."))


def move(learner: parallel.Learner) -> None:
    """Change every weight, those of the tower most."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in learner.module.named_parameters():
            scale = 1.5 if "visual" in name else 1.05
            parameter.mul_(scale)


def tokens(engine, prompts, images) -> list[list[int]]:
    return [
        episode.response_ids
        for episode in engine.generate(prompts, GREEDY, range(0, 400, 100), images)
    ]


def test_greedy_tokens_follow_every_sync(engine, learner, folder, prompts, images):
    reference, seen = rollout.TorchEngine(folder, TOKENIZER), []
    for _ in range(3):
        sync(reference, learner)
        sync(engine, learner)
        seen.append(tokens(engine, prompts, images))
        assert seen[-1] == tokens(reference, prompts, images)
        move(learner)
    assert seen[0] != seen[1] != seen[2]
    assert len({word for rows in seen for row in rows for word in row}) > 20
    assert seen[0][0] != seen[0][3], "one image, two questions"


def test_without_the_encoder_reset_old_features_are_used(
    engine, learner, folder, prompts, images, monkeypatch
):
    """Regression of the reset in load_weights: leaving it out changes what is seen, silently."""
    sync(engine, learner)
    tokens(engine, prompts, images)
    move(learner)
    reference = rollout.TorchEngine(folder, TOKENIZER)
    sync(reference, learner)
    with monkeypatch.context() as patched:
        patched.setattr(engine.llm.llm_engine, "reset_encoder_cache", lambda: None)
        sync(engine, learner)
        assert tokens(engine, prompts, images) != tokens(reference, prompts, images)
    sync(engine, learner)
    assert tokens(engine, prompts, images) == tokens(reference, prompts, images)


def test_log_probs_are_those_of_the_trainer(engine, learner, prompts, images):
    """Sampled at random, with placeholders among the words: these are words like others."""
    sync(engine, learner)
    episodes = engine.generate(prompts, Sampling(8, 2.0, 48), range(0, 400, 100), images)
    batch = rlfr.collate(
        [(e.prompt_ids, e.response_ids, images[i // 8]) for i, e in enumerate(episodes)]
    )
    with torch.no_grad():
        logp = learner.module(batch, 2.0).logp
    for row, episode in enumerate(episodes):
        sampled = torch.tensor(episode.logp)
        assert (sampled - logp[row, : len(sampled)]).abs().max() <= 5e-5


def test_training_with_vllm_and_loading_what_it_exports(image_world, tmp_path):
    config = train_rl.Config(
        model=image_world.path("model"), data=image_world.path("train.jsonl"), template="none", prompts=4, group_size=4,
        train_batch=8, max_tokens=16, max_prompt_tokens=64, steps=2, lr=1e-3, engine="vllm", freeze="none", shaping="none",
        grade_truncated=True, reward=(str(ROOT / "tests" / "length_reward.py"),), folder=str(tmp_path / "run"), max_sequences=32,
        max_pixels=28 * 28 * 6, problem_column="prompt",
    )  # fmt: skip
    train_rl.main(config)
    parallel.start()  # an engine that goes takes the process group with it
    policy = rollout.find_model(str(tmp_path / "run" / "policy"))
    problems = rollout.load_problems(config.data, config, policy)[:8]
    prompts, images = (
        [problem.prompt_ids for problem in problems],
        [problem.images for problem in problems],
    )
    engine = rollout.VllmEngine(
        policy.path, policy.tokenizer, 80, max_sequences=8, processor=policy.processor
    )
    seeds = [0] * 8
    a, b = (
        e.generate(prompts, GREEDY, seeds, images)
        for e in (engine, rollout.TorchEngine(policy.path, policy.tokenizer))
    )
    assert [episode.response_ids for episode in a] == [episode.response_ids for episode in b]
    assert Path(os.path.join(policy.path, "preprocessor_config.json")).exists()
