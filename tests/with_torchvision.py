"""Tests that need torchvision, as vLLM does for images; test_vision.py runs them in a process that has it."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    drawing,
    find_model_in,
    run_with_vllm,
    save_vlm,
    tiny_vlm,
    torch_engine,
    vllm_engine,
)
from PIL import Image

import train_rl
from infra import batching, parallel, vision
from infra.data import ProblemSettings, load_problems, make_prompts
from infra.settings import change
from policy import load_policy
from rollout import Request, Sampling
from worlds import toy

GREEDY = Sampling(temperature=0.0, max_tokens=24)
TEXTS = ["<image>sum>", "what?", "<image>a<image>b", "<image>c"]
DRAWN = [["1 +2 +3>"], [], ["4 +5>", "7 +7>"], ["1 +2 +3>"]]


def test_the_same_pixel_values_with_and_without_torchvision(tmp_path):
    toy.make_processor().save_pretrained(tmp_path)
    with_torchvision = vision.load_processor(str(tmp_path))
    with_pillow = toy.make_processor()
    assert type(with_torchvision) is not type(with_pillow)
    assert "Pil" in type(with_pillow).__name__
    rng = np.random.default_rng(0)
    smooth = np.kron(rng.integers(0, 256, (9, 13, 3)), np.ones((17, 15, 1))).astype(np.uint8)
    for array in (smooth, rng.integers(0, 256, (50, 90, 3), dtype=np.uint8)):
        file = io.BytesIO()
        Image.fromarray(array).save(file, "png")
        row = [{"images": file.getvalue()}]
        ((a,),) = vision.load_images(row, "images", with_torchvision, ".")
        ((b,),) = vision.load_images(row, "images", with_pillow, ".")
        assert a.grid == b.grid and (a.pixel_values() - b.pixel_values()).abs().max() <= 1e-5


@pytest.fixture(scope="module", params=vision.FAMILIES)
def folder(request, tmp_path_factory) -> str:
    return save_vlm(tiny_vlm(request.param), tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def engine(folder):
    dtype = parallel.compute_dtype("auto")
    return vllm_engine(folder, 352, max_sequences=32, device=parallel.DEVICE, dtype=dtype)


@pytest.fixture(scope="module")
def requests(folder) -> list[Request]:
    """Prompts with one image, none, two, and the first one again."""
    model = find_model_in(folder)
    settings = ProblemSettings(template="none", max_prompt_tokens=352)
    images = []
    for problems in DRAWN:
        images.append(tuple(drawing(problem, model.processor) for problem in problems))
    prompts = make_prompts(TEXTS, images, model, settings)
    return [Request(prompts[i], 100 * i, images[i]) for i in range(len(prompts))]


@pytest.fixture
def learner(folder) -> parallel.Learner:
    policy = load_policy(folder)
    parallel.shard(policy, policy.blocks, torch.float32)
    return parallel.Learner(policy, (0.9, 0.95), 0.0)


def sync(engine, learner: parallel.Learner) -> None:
    engine.load_weights(learner.module.whole_weights(torch.float32))


def move(learner: parallel.Learner) -> None:
    """Change every weight, those of the tower most."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in learner.module.named_parameters():
            scale = 1.5 if "visual" in name else 1.05
            parameter.mul_(scale)


def tokens(engine, requests) -> list[list[int]]:
    return [episode.response_ids for episode in engine.generate(requests, GREEDY)]


def test_greedy_tokens_follow_every_sync(engine, learner, folder, requests):
    reference = torch_engine(folder)
    seen = []
    for _ in range(3):
        sync(reference, learner)
        sync(engine, learner)
        seen.append(tokens(engine, requests))
        assert seen[-1] == tokens(reference, requests)
        move(learner)
    assert seen[0] != seen[1] != seen[2]
    assert len({word for rows in seen for row in rows for word in row}) > 20
    assert seen[0][0] != seen[0][3], "one image, two questions"


def test_without_the_encoder_reset_old_features_are_used(
    engine, learner, folder, requests, monkeypatch
):
    """Regression of the reset in load_weights: leaving it out changes what is seen, silently."""
    sync(engine, learner)
    tokens(engine, requests)
    move(learner)
    reference = torch_engine(folder)
    sync(reference, learner)
    with monkeypatch.context() as patched:
        patched.setattr(engine.llm.llm_engine, "reset_encoder_cache", lambda: None)
        sync(engine, learner)
        assert tokens(engine, requests) != tokens(reference, requests)
    sync(engine, learner)
    assert tokens(engine, requests) == tokens(reference, requests)


def besides_the_weights(model) -> list[torch.Tensor]:
    """Return a model's tensors that are neither parameters nor buffers: vLLM loses them in a deep sleep."""
    found = []
    for module in model.modules():
        for value in vars(module).values():
            parts = value if isinstance(value, list) else [value]
            found += [part for part in parts if isinstance(part, torch.Tensor)]
    return found


def test_a_prompt_of_text_alone_after_a_sleep(engine, learner, folder, requests):
    """Greedy tokens are those before it if such tensors wake as zeros; in Qwen3-VL other numbers show.

    A CPU's engine loses nothing: the numbers that it may wake with are planted. On a GPU it loses
    them, and tests/gpu runs this there.
    """
    sync(engine, learner)
    tokens(engine, requests)  # images have been there before
    text = [requests[1]]
    expected = tokens(engine, text)
    equal = []
    for number in (None, 3.0, 0.0):  # None: as they woke
        engine.sleep()
        sync(engine, learner)
        (lost,) = engine.llm.apply_model(besides_the_weights)
        for tensor in lost if number is not None else []:
            tensor.fill_(number)
        equal.append(tokens(engine, text) == expected)
    assert equal == [True, "qwen3_vl" not in folder, True]


def test_log_probs_are_those_of_the_trainer(engine, learner, requests):
    """Sampled at random, with placeholders among the words: these are words like others."""
    sync(engine, learner)
    episodes = engine.generate(requests, Sampling(8, 2.0, 48))
    rows = []
    for i, episode in enumerate(episodes):
        images = requests[i // 8].images
        rows.append(batching.Row(episode.prompt_ids, episode.response_ids, images))
    with torch.no_grad():
        logp = learner.module(batching.collate(rows), 2.0).logp
    for row, episode in enumerate(episodes):
        sampled = torch.tensor(episode.logp)
        assert (sampled - logp[row, : len(sampled)]).abs().max() <= 5e-5


def test_training_with_vllm_and_loading_what_it_exports(image_world, tmp_path):
    config = change(
        train_rl.Config(),
        model=image_world.path("model"),
        data=image_world.path("train.jsonl"),
        folder=str(tmp_path / "run"),
        engine="vllm",
        max_sequences=32,
        template="none",
        problem_column="prompt",
        max_pixels=28 * 28 * 6,
        reward=(str(ROOT / "tests" / "length_reward.py"),),
        grade_truncated=True,
        shaping="none",
        freeze="none",
        prompts=4,
        group_size=4,
        train_batch=8,
        max_tokens=16,
        max_prompt_tokens=64,
        steps=2,
        lr=1e-3,
    )
    run_with_vllm(train_rl.main, config)
    policy = find_model_in(tmp_path / "run" / "policy")
    problems = load_problems(config.data, config.problems, policy)[:8]
    requests = [Request(problem.prompt_ids, 0, problem.images) for problem in problems]
    engine = vllm_engine(policy.path, 80, max_sequences=8, can_sleep=False)
    reference = torch_engine(policy.path)
    assert tokens(engine, requests) == tokens(reference, requests)
    assert Path(os.path.join(policy.path, "preprocessor_config.json")).exists()
