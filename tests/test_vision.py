"""Images: data, pixel values, three families of models, engines, training. What needs torchvision is in with_torchvision.py."""

import base64
import io
import json
import os
import random
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    drawing,
    figures,
    find_model_in,
    flags,
    last_state,
    read_lines,
    save_vlm,
    tiny_vlm,
    torch_engine,
)
from PIL import Image
from test_distributed import assert_same_run, check_exit, start
from test_published import snapshot
from transformers import AutoModelForImageTextToText

import eval as evaluation
import rollout
import train_flow
import train_rl
from infra import batching, parallel, record, vision
from infra.data import ProblemSettings, load_problems, make_prompts
from infra.defaults import choose_template
from infra.models import LoadingSettings, Model, find_model
from infra.settings import change
from pages.rollouts import inspect_run
from policy import Policy, load_policy
from rollout import Request, Sampling, most_images
from worlds import toy

PROCESSOR = toy.make_processor()
TOKENIZER = toy.make_tokenizer(images=True)
PAD = TOKENIZER.convert_tokens_to_ids(vision.PAD)
MODEL = Model("", None, 0, TOKENIZER, PROCESSOR)
SETTINGS = ProblemSettings(template="none", problem_column="prompt", max_prompt_tokens=4096)


def make_prompt(text: str, *images: vision.Image, template: str = "none") -> list[int]:
    """The tokens of a prompt with images."""
    settings = change(SETTINGS, template=template)
    return make_prompts([text], [images], MODEL, settings)[0]


def inputs_of_images(ids: torch.Tensor, images) -> dict[str, torch.Tensor]:
    """What a Hugging Face model takes beside the tokens (1, T) of a prompt with images."""
    pixel_values, grids = vision.stack(images, "cpu")
    return {
        "pixel_values": pixel_values,
        "image_grid_thw": grids,
        "mm_token_type_ids": (ids == PAD).int(),
    }


def with_images(episodes, requests) -> list[batching.Row]:
    """Rows of episodes with the images of their requests, which an engine does not hand back."""
    n = len(episodes) // len(requests)
    rows = []
    for i, episode in enumerate(episodes):
        images = requests[i // n].images
        rows.append(batching.Row(episode.prompt_ids, episode.response_ids, images))
    return rows


def seen(policy: Policy, rows: list[batching.Row]) -> list:
    """The rows as training has them: with a frozen tower, their images are features."""
    episodes = []
    for row in rows:
        episodes.append(
            rollout.Episode(row.prompt_ids, row.response_ids, [], "stop", "", row.images)
        )
    return batching.encode_images(policy.image_encoder, episodes, token_budget=4)


def rows() -> list[batching.Row]:
    """Episodes with one image, none, and two; two of the responses have a placeholder in them that was sampled."""
    one = drawing("1 +2 +3>", PROCESSOR)
    two = drawing("4 +5>", PROCESSOR)
    return [
        batching.Row(make_prompt("look <image> here", one), [8, 9], (one,)),
        batching.Row(make_prompt("text"), [11, 12, PAD, 14, 15]),
        batching.Row(make_prompt("<image>a<image>b", two, one), [26, PAD, 27, 28], (two, one)),
    ]


# ---- Beside the others: vLLM, and the image processor with torchvision


def find_torchvision(folder: Path) -> str:
    """A folder for PYTHONPATH with torchvision in it, unless it is installed. The wheel at hand is built for CUDA: beside a
    PyTorch for the CPU it lacks two operators, which nobody calls here, and without which it cannot be imported."""
    if find_spec("torchvision"):
        return ""
    download = ["pip", "download", "-q", "--no-deps", "torchvision==0.28.0", "-d", str(folder)]
    command = [sys.executable, "-m", *download]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder)
    (folder / "sitecustomize.py").write_text(
        "import torch\n"
        "library = torch.library.Library('torchvision', 'DEF')\n"
        "for name in ('nms', 'qnms'):\n"
        "    library.define(name + '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')\n"
    )
    return str(folder)


def run_with_torchvision(folder: Path, environment: dict) -> subprocess.CompletedProcess:
    """Run tests/with_torchvision.py in a process that has torchvision."""
    environment["PYTHONPATH"] = find_torchvision(folder)
    command = [sys.executable, "-m", "pytest", "-q", str(ROOT / "tests" / "with_torchvision.py")]
    command += ["--basetemp", str(folder / "temporary")]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module", autouse=True)
def with_torchvision(request, tmp_path_factory):
    """The end of that process, which runs beside the tests of this file, if its test is asked for."""
    if all(item.name != "test_with_torchvision" for item in request.session.items):
        yield None
        return
    folder = tmp_path_factory.mktemp("torchvision")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1"}
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(run_with_torchvision, folder, environment)


# ---- A. Three families


@pytest.mark.parametrize("family", vision.FAMILIES)
def test_a_batch_equals_its_rows_and_what_hugging_face_gives(family):
    policy = Policy(tiny_vlm(family))
    plain = tiny_vlm(family)
    taps = [1, 2]
    batched = policy(batching.collate(rows()), temperature=0.7, taps=taps)
    for i, row in enumerate(rows()):
        alone = policy(batching.collate([row]), temperature=0.7, taps=taps)
        n = len(row.response_ids)
        torch.testing.assert_close(batched.logp[i, :n], alone.logp[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(batched.entropy[i, :n], alone.entropy[0], rtol=0, atol=1e-5)
        for a, b in zip(batched.latents, alone.latents, strict=True):
            assert (a[i, : b.shape[1]] - b[0]).abs().max() <= 1e-5 * b.abs().max()
        if PAD not in row.response_ids:
            ids = torch.tensor([row.prompt_ids + row.response_ids])
            logits = plain(ids, **inputs_of_images(ids, row.images)).logits
            log_probs = (logits[0, -n - 1 : -1] / 0.7).log_softmax(dim=-1)
            expected = log_probs.gather(1, torch.tensor(row.response_ids)[:, None]).squeeze(1)
            torch.testing.assert_close(alone.logp[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", vision.FAMILIES)
def test_packed_rows_have_the_states_of_padded_ones(family):
    """Hidden states of all tokens are those of the plain model under a padding mask."""
    chosen = []
    for row in rows():  # a sampled placeholder has a test of its own
        words = [13 if token == PAD else token for token in row.response_ids]
        chosen.append(row._replace(response_ids=words))
    batch = batching.collate(chosen)
    is_token = batch.attention_mask
    states = Policy(tiny_vlm(family)).run_decoder(batch, batching.places_of(is_token))
    images = [image for row in chosen for image in row.images]
    masked = tiny_vlm(family).base_model(
        batch.input_ids, attention_mask=is_token, **inputs_of_images(batch.input_ids, images)
    )
    expected = masked.last_hidden_state[is_token]
    assert (states - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("family", vision.FAMILIES)
def test_images_of_a_shared_prompt_go_through_the_model_once(family):
    """Four rows of three prompts; log-probs are those of the rows one by one."""
    policy = Policy(tiny_vlm(family))
    shared = rows()
    shared.insert(1, shared[0]._replace(response_ids=[5, 6, 7, 8, 9]))
    batch = batching.collate(shared)
    alone = [batching.collate([row]) for row in shared]
    images = [len(one.images_once) for one in alone]
    assert images == [1, 1, 0, 2]
    assert len(batch.image_inputs.grids) == 3
    logp = policy(batch).logp
    for row, one in enumerate(alone):
        expected = policy(one).logp[0]
        torch.testing.assert_close(logp[row, : len(expected)], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", vision.FAMILIES)
def test_positions_of_an_image_are_its_rows_and_columns(family):
    """Also packed, behind other rows; as positions of text the log-probs would be others."""
    policy = Policy(tiny_vlm(family))
    passed = []

    def see(_module, _arguments, inputs) -> None:
        passed.append(inputs["position_ids"])

    policy.model.base_model.register_forward_pre_hook(see, with_kwargs=True)
    logp = policy(batching.collate(rows())).logp
    expected = []
    for row in rows():
        ids = torch.tensor([row.prompt_ids + row.response_ids])
        is_image = torch.zeros_like(ids)
        is_image[:, : len(row.prompt_ids)] = ids[:, : len(row.prompt_ids)] == PAD
        text_ids = ids.where((ids != PAD) | is_image.bool(), 0)
        _, grids = vision.stack(row.images, "cpu")
        positions, _ = policy.model.base_model.get_rope_index(
            text_ids, is_image.int(), image_grid_thw=grids
        )
        expected.append(positions)
    assert torch.equal(passed[0], torch.cat(expected, dim=2))
    assert not torch.equal(passed[0][0], passed[0][2])

    def as_text(_module, arguments, inputs):
        return arguments, {
            **inputs,
            "position_ids": batching.collate(rows()).packing.positions()[None],
        }

    policy.model.base_model.register_forward_pre_hook(as_text, with_kwargs=True)
    assert (policy(batching.collate(rows())).logp - logp).abs().max() > 1e-3


@pytest.mark.parametrize("family", vision.FAMILIES)
@pytest.mark.parametrize("freeze", ["none", "vision"])
def test_the_tower_learns_unless_frozen(family, freeze, tmp_path):
    policy = load_policy(save_vlm(tiny_vlm(family), tmp_path), freeze=freeze)
    tower = list(policy.model.model.visual.parameters())
    policy(batching.collate(seen(policy, rows()))).logp.sum().backward()
    if freeze == "vision":
        assert all(p.grad is None for p in tower)
    else:
        assert all(p.grad.abs().max() > 0 for p in tower)
    assert all(p.grad is not None for p in policy.layers.parameters())
    policy.zero_grad()
    # without an image all gradients of the tower are there, and zero
    policy(batching.collate(rows()[1:2])).logp.sum().backward()
    if freeze == "vision":
        assert all(p.grad is None for p in tower)
    else:
        assert all(p.grad.abs().max() == 0 for p in tower)


@pytest.mark.parametrize("family", vision.FAMILIES)
def test_a_frozen_tower_sees_an_image_once(family, tmp_path):
    """Log-probs, latents and gradients are those of a tower that runs with every batch."""
    folder = save_vlm(tiny_vlm(family), tmp_path)
    every_time = load_policy(folder)
    once = load_policy(folder, freeze="vision")
    unseen = rows()
    unseen.append(unseen[0]._replace(response_ids=[5, 6, 7]))  # of four images two differ
    ran = []
    once.tower.patch_embed.register_forward_pre_hook(lambda _, inputs: ran.append(len(inputs[0])))
    shown = seen(once, unseen)
    assert ran == [12, 8], "patches, a batch for each as the two have more vectors than the budget"
    for chosen in ([0, 1, 2, 3], [3, 2], [1]):
        expected = every_time(batching.collate([unseen[i] for i in chosen]), 0.7, taps=[0, 1, 2])
        output = once(batching.collate([shown[i] for i in chosen]), 0.7, taps=[0, 1, 2])
        torch.testing.assert_close(output.logp, expected.logp, rtol=0, atol=1e-5)
        for latent, other in zip(output.latents, expected.latents, strict=True):
            assert (latent - other).abs().max() <= 1e-5 * other.abs().max()
        output.logp.square().sum().backward()
        expected.logp.square().sum().backward()
    learns = dict(every_time.model.named_parameters())
    for name, parameter in once.model.named_parameters():
        if "visual" not in name:
            gradient = learns[name].grad
            difference = parameter.grad - gradient
            assert difference.abs().max() <= 1e-5 * gradient.abs().max(), name
    assert len(ran) == 2, "no forward ran the tower"
    with pytest.raises(AssertionError, match="the frozen tower has not seen these images"):
        once(batching.collate(unseen))
    assert "forward" not in vars(once.tower)


def test_the_offline_start_stops_at_the_last_tap():
    policy = Policy(tiny_vlm("qwen3_vl"))
    batch = batching.collate(rows())
    ran = []
    full = policy(batch, taps=[1, 2]).latents
    policy.layers[3].register_forward_hook(lambda *_: ran.append(3))
    short = policy(batch, taps=[1, 2], latents_only=True)
    assert not ran and short.logp is None
    assert all(torch.equal(a, b) for a, b in zip(full, short.latents, strict=True))


# ---- The torch engine


@pytest.mark.parametrize("family", vision.FAMILIES)
def test_the_torch_engine_sees(family, tmp_path):
    """Greedy words are Hugging Face's, alone and in a batch; log-probs are the trainer's; another image, other words."""
    folder = save_vlm(tiny_vlm(family), tmp_path)
    engine = torch_engine(folder)
    requests = [Request(row.prompt_ids, 100 * i, row.images) for i, row in enumerate(rows())]
    greedy = Sampling(temperature=0, max_tokens=16)
    episodes = engine.generate(requests, greedy)
    for request, episode in zip(requests, episodes, strict=True):
        ids = torch.tensor([request.prompt_ids])
        images = inputs_of_images(ids, request.images) if request.images else {}
        generated = engine.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=16,
            eos_token_id=engine.end_tokens.tolist(),
            **images,
        )
        assert episode.response_ids == generated[0, ids.shape[1] :].tolist()
    other_image = requests[0]._replace(images=(drawing("9 +8 +7>", PROCESSOR),))
    (other,) = engine.generate([other_image], greedy)
    assert other.response_ids != episodes[0].response_ids
    sampling = Sampling(n=2, max_tokens=16, temperature=0.7)
    episodes = engine.generate(requests, sampling)
    alone = [episode for request in requests for episode in engine.generate([request], sampling)]
    assert [e.response_ids for e in episodes] == [e.response_ids for e in alone]
    batch = batching.collate(with_images(episodes, requests))
    with torch.no_grad():
        logp = load_policy(folder)(batch, 0.7).logp
    for row, episode in enumerate(episodes):
        torch.testing.assert_close(
            torch.tensor(episode.logp), logp[row, : len(episode.logp)], rtol=1e-4, atol=2e-5
        )


# ---- Data

COLOURS = np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8)


def png(array=COLOURS, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).convert(mode).save(file, "png")
    return file.getvalue()


def load(
    row: dict | list[dict], processor=PROCESSOR, folder: Path | str = "."
) -> list[tuple[vision.Image, ...]]:
    return vision.load_images(
        row if isinstance(row, list) else [row], "images", processor, str(folder)
    )


def test_pixel_values_by_hand():
    """Resized to multiples of a cell, bicubic; normalised; in patches, the four of a cell together, each frame twice."""
    (image,) = load({"images": png()})[0]
    assert image.grid == (1, 4, 6) and image.n_tokens == 6
    resized = np.asarray(
        Image.fromarray(COLOURS).resize((84, 56), Image.Resampling.BICUBIC), dtype=np.float64
    )
    mean = np.array([0.48145466, 0.4578275, 0.40821073])
    std = np.array([0.26862954, 0.26130258, 0.27577711])
    normalised = (resized / 255 - mean) / std
    patches = []
    for y, x in ((y, x) for y in range(0, 56, 28) for x in range(0, 84, 28)):
        for v, u in ((0, 0), (0, 14), (14, 0), (14, 14)):
            patch = normalised[y + v : y + v + 14, x + u : x + u + 14]
            patch = patch.transpose(2, 0, 1)  # channel, row, column
            patches.append(np.repeat(patch[:, None], 2, axis=1).ravel())
    np.testing.assert_allclose(image.pixel_values().numpy(), np.array(patches), atol=1e-3)


def test_limits_on_pixels(tmp_path):
    save_vlm(tiny_vlm("qwen2_5_vl"), tmp_path)
    grids = {
        None: (1, 4, 6),
        28 * 28 * 4: (1, 2, 4),
    }
    for largest, grid in grids.items():
        loading = LoadingSettings(max_pixels=largest)
        processor = find_model(str(tmp_path), loading).processor
        (image,) = load({"images": png()}, processor)[0]
        assert image.grid == grid and len(image.pixel_values()) == grid[1] * grid[2]
    for largest in (100, -1):
        with pytest.raises(
            ValueError, match=f"max_pixels={largest}: expected .* no less than the 784"
        ):
            find_model(str(tmp_path), LoadingSettings(max_pixels=largest))


def test_thin_images_are_asked_for_twice():
    """Regression: an image of one row of cells is made narrower, is still too large, and would be made narrower again."""
    processor = toy.Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 6)
    (image,) = load({"images": png(np.zeros((28, 28 * 9, 3), np.uint8))}, processor)[0]
    assert image.grid == (1, 2, 12) and len(image.pixel_values()) == 24
    with pytest.raises(
        ValueError,
        match="row 0: an image cannot be read: .* do not fit between 4705 and 4706; move",
    ):
        load({"images": png()}, toy.Qwen2VLImageProcessorPil(min_pixels=4705, max_pixels=4706))


def test_every_kind_of_image_gives_the_same_pixels(tmp_path):
    data, text = png(), base64.b64encode(png()).decode()
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "a.png").write_bytes(data)
    kinds = [
        data,
        text,
        f"data:image/png;base64,{text}",
        "media/a.png",
        {"bytes": data, "path": None},
        {"path": "media/a.png"},
    ]
    lists = [{"images": [kind]} for kind in kinds]
    loaded = load([*lists, {"images": "media/a.png"}], folder=tmp_path)
    assert all(len(images) == 1 for images in loaded)
    assert len({images[0].pixel_values().numpy().tobytes() for images in loaded}) == 1
    assert load([{}, {"images": None}, {"images": []}]) == [(), (), ()]
    gray = np.ascontiguousarray(COLOURS[..., 0])
    assert load({"images": png(gray, "L")})[0][0].pixel_values().shape == (24, 1176)
    # and through files: JSONL with paths beside it, Parquet and save_to_disk with the `datasets` library's own images
    (tmp_path / "data.jsonl").write_text(
        json.dumps({"prompt": "q", "answer": "1", "images": ["media/a.png"]})
    )
    rows = [{"prompt": "q", "answer": "1", "images": [{"bytes": data, "path": None}]}]
    features = {
        "prompt": datasets.Value("string"),
        "answer": datasets.Value("string"),
        "images": [datasets.Image()],
    }
    saved = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    saved.to_parquet(tmp_path / "data.parquet")
    saved.save_to_disk(tmp_path / "saved")
    for name in ("data.jsonl", "data.parquet", "saved"):
        (problem,) = load_problems(str(tmp_path / name), SETTINGS, MODEL)
        assert torch.equal(problem.images[0].pixel_values(), loaded[0][0].pixel_values()), name
        assert problem.prompt_ids.count(PAD) == 6
    moved = change(SETTINGS, media_dir=str(tmp_path / "media"))
    with pytest.raises(
        ValueError,
        match=r"row 0: .*no file '.*media/media/a.png'; put it there, or name another --media-dir",
    ):
        load_problems(str(tmp_path / "data.jsonl"), moved, MODEL)


def test_placeholders():
    one = drawing("1 +2 +3>", PROCESSOR)
    two = drawing("4 +5>", PROCESSOR)

    def prompt(text: str, *images, template="none") -> str:
        return TOKENIZER.decode(make_prompt(text, *images, template=template))

    def span(n: int) -> str:
        return f"<|vision_start|>{vision.PAD * n}<|vision_end|>"

    assert prompt("sum>", one) == f"{span(3)}sum>" and prompt("sum>") == "sum>"
    assert prompt("a<image>b<image>", two, one) == f"a{span(2)}b{span(3)}"
    assert prompt("sum>", two, one) == f"{span(2)}{span(3)}sum>"
    ids = TOKENIZER.encode(f"{span(2)}{span(3)}")
    assert TOKENIZER.decode(vision.collapse(ids, PAD)) == span(1) * 2
    oracle = json.loads((ROOT / "tests" / "oracle" / "viii_scoring.json").read_text())
    templates = oracle["templates"]
    for template, name in {"qwen_tag": "qwen_tag_vison", "qwen": "qwen_box_vision"}.items():
        official = templates[name].replace(vision.PAD, vision.PAD * 3)
        assert prompt("Q?", one, template=template) == official.replace("{QUESTION}", "Q?"), (
            template
        )
    tokenizer = toy.make_tokenizer(images=True)
    model = MODEL._replace(config=tiny_vlm("qwen2_5_vl").config, tokenizer=tokenizer)
    assert choose_template("auto", model) == "none"
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert choose_template("auto", model) == "bare", "no instruction of ours, as published"


def test_the_engine_takes_the_most_images_of_a_problem(tmp_path):
    """And those of one, if no problem has any: without them vLLM leaves the tower out."""
    file = tmp_path / "data.jsonl"
    images = base64.b64encode(png()).decode()
    rows = [{"prompt": "q", "answer": "1", "images": [images] * n} for n in (0, 5, 2)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = load_problems(str(file), SETTINGS, MODEL)
    assert [len(problem.images) for problem in problems] == [0, 5, 2]
    assert most_images(problems) == 5
    assert most_images(problems[:1]) == 1


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"images": ["nowhere.png"]}, r"row 1: an image cannot be read: no file './nowhere.png'; put it there"),
        ({"images": [b"no image"]}, "row 1: an image cannot be read: cannot identify image file"),
        ({"images": [png()[:-2000]]}, "row 1: an image cannot be read: .*truncated"),
        ({"images": [png()[:60] + b"x" + png()[61:]]}, "row 1: an image cannot be read: "),
        ({"images": [{"bytes": None, "path": None}]}, "row 1: an image cannot be read: None is not an image; expected a path"),
        ({"images": [7]}, "row 1: an image cannot be read: 7 is not an image; expected a path, base64, bytes or a dict"),
        ({"images": [png(np.zeros((1, 300, 3), np.uint8))]}, "row 1: an image cannot be read: .*aspect ratio"),
        ({"prompt": "<image><image>", "images": [png()]}, "row 1 has 1 images and 2 placeholders <image>; expected as many, or none"),
        ({"prompt": "<image>", "images": []}, "row 1 has 0 images and 1 placeholders <image>"),
        ({"prompt": "<|image_pad|>", "images": [png()]}, r"row 1 has 1 images and 2 tokens <\|image_pad\|> in its prompt; drop"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_bad_images_say_their_row_before_training(tmp_path, monkeypatch, row, words):
    good = {"prompt": "q", "answer": "1", "images": [png()]}
    monkeypatch.setattr("infra.data.load_rows", lambda *_: [good, good | row])
    with pytest.raises(ValueError, match=words):
        load_problems("d", SETTINGS, MODEL)


def test_a_missing_column_and_transparent_images(tmp_path):
    def load(row: dict, column: str = "images"):
        return vision.load_images([row], column, PROCESSOR, ".")[0]

    with pytest.raises(
        ValueError,
        match="no row has a column 'images', only .'image', 'prompt'.; name the images' with --images-col",
    ):
        load({"prompt": "q", "image": png()})
    with pytest.raises(ValueError, match="no row has a column 'picture'"):
        load({"prompt": "q"}, "picture")
    assert load({"prompt": "q"}) == ()
    line = np.zeros((56, 56, 4), np.uint8)
    line[20:24, :, 3] = 255  # black on nothing
    shown = np.asarray(load({"images": png(line, "RGBA")})[0].open())
    assert shown.min() == 0 and shown.max() == 255
    deep = np.linspace(0, 65535, 56 * 56).reshape(56, 56).astype(np.uint16)
    assert len(np.unique(np.asarray(load({"images": png(deep, "I;16")})[0].open()))) > 200


def test_images_for_a_model_without_eyes(world, tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"problem": "q", "answer": "1", "images": ["a.png"]}))
    settings = change(SETTINGS, problem_column="problem")
    with pytest.raises(
        ValueError, match="row 0 has images, and the model takes none; expected a model of qwen2_vl"
    ):
        load_problems(str(file), settings, find_model_in(world.path("model")))


# ---- Training


@pytest.fixture(scope="module")
def config(image_world, flow_folder, tmp_path_factory) -> train_rl.Config:
    """Rows with and without an image, so that some micro-batches have none."""
    folder = tmp_path_factory.mktemp("image-run")
    rows = read_lines(image_world.path("train.jsonl"))
    for row in rows[::3]:
        row.update(prompt=row["problem"], images=[])
    (folder / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return change(
        train_rl.Config(),
        model=image_world.path("model"),
        data=str(folder / "mixed.jsonl"),
        flow=flow_folder,
        folder=str(folder / "one"),
        template="none",
        problem_column="prompt",
        reward=(str(ROOT / "tests" / "length_reward.py"),),
        grade_truncated=True,
        prompts=4,
        group_size=4,
        train_batch=8,
        max_tokens=16,
        max_prompt_tokens=64,
        tokens_per_gpu=60,
        steps=3,
        lr=1e-3,
        flow_lr=1e-3,
        flow_soft=1.0,
        save_every=1,
        keep=3,
    )


@pytest.mark.distributed
@pytest.mark.parametrize("freeze", ["none", "vision"])
def test_two_ranks_follow_one_process_and_resume(config, train_once, tmp_path, freeze, monkeypatch):
    """F. Some micro-batches have images on one rank alone; the tower's shards are gathered in step all the same."""
    config = change(config, freeze=freeze)
    two = change(config, folder=str(tmp_path / "two"))
    process = start("train_rl.py", flags(two))
    one = train_once(config)
    check_exit(process)
    assert_same_run(one, two.folder)
    stopped = change(config, folder=str(tmp_path / "stopped"))
    with monkeypatch.context() as patched:
        asked = iter([False, True])
        patched.setattr(train_rl, "asked_to_stop", lambda: next(asked))
        train_rl.main(stopped)
    assert len(figures(stopped.folder)) == 1
    train_rl.main(change(stopped, resume=stopped.folder))
    assert figures(stopped.folder) == figures(one)
    a, b = last_state(stopped.folder), last_state(one)
    assert all(
        torch.equal(x, b[name]) if isinstance(x, torch.Tensor) else x == b[name]
        for name, x in a.items()
    )
    base, after = (
        load_policy(path).tower for path in (config.model, str(tmp_path / "two" / "policy"))
    )
    moved = [
        not torch.equal(x, y) for x, y in zip(base.parameters(), after.parameters(), strict=True)
    ]
    assert not any(moved) if freeze == "vision" else all(moved)


@pytest.mark.parametrize(
    "options", [{"offload": "always"}, {"recompute_layers": 2, "offload": "sampling"}]
)
def test_where_weights_and_activations_live_changes_nothing(config, train_once, tmp_path, options):
    config = change(config, freeze="none", folder=str(tmp_path / "other"))
    train_rl.main(change(config, **options))
    assert_same_run(train_once(config), config.folder)


@pytest.mark.parametrize("family", vision.FAMILIES)
def test_bfloat16(family):
    """Sharded, forward and backward in bfloat16, with and without an image: what a GPU does."""
    policy = Policy(tiny_vlm(family))
    parallel.shard(policy, policy.blocks, torch.bfloat16)
    for batch in (batching.collate(rows()), batching.collate(rows()[1:2])):
        scored = policy(batch, taps=[1])
        assert scored.latents[0].dtype == torch.bfloat16 and scored.logp.dtype == torch.float32
        scored.logp.sum().backward()
    assert all(
        p.grad.dtype == torch.float32 and p.grad.full_tensor().isfinite().all()
        for p in policy.parameters()
    )


@pytest.mark.distributed
def test_the_offline_start_and_the_flow_reward_with_images(config, image_world, tmp_path):
    offline = change(
        train_flow.Config(),
        model=config.model,
        data=image_world.path("expert.jsonl"),
        folder=str(tmp_path / "flow"),
        problem_column="prompt",
        template="none",
        max_prompt_tokens=64,
        batch_size=16,
        lr=2e-3,
        epochs=6,
        flow_blocks=2,
        noise_repeats=1,
    )
    train_flow.main(offline)
    lines = figures(offline.folder)
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]
    one = change(
        offline, data=config.data, epochs=1, tokens_per_gpu=200, folder=str(tmp_path / "one")
    )
    two = change(one, folder=str(tmp_path / "two"))
    process = start("train_flow.py", flags(two))
    train_flow.main(one)
    check_exit(process)
    assert_same_run(one.folder, two.folder)
    flow = change(
        config, flow=str(tmp_path / "flow" / "flow"), steps=1, folder=str(tmp_path / "rl")
    )
    train_rl.main(flow)
    (line,) = figures(flow.folder)
    assert line["flow/score"] > 0 and line["mismatch/ratio_max"] == pytest.approx(1, abs=1e-3)


# ---- Rollouts


@pytest.fixture(scope="module")
def recorded(config, image_world) -> Path:
    """A run whose first problem has its image in a file, and the others in the data."""
    folder = Path(config.folder).parent
    rows = read_lines(image_world.path("train.jsonl"))[:8]
    (folder / "digits.png").write_bytes(base64.b64decode(rows[0]["images"][0]))
    rows[0]["images"] = ["digits.png"]
    rows[1].update(prompt=rows[1]["problem"], images=[])
    data = folder / "recorded.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = folder / "recorded"
    settings = {"prompts": 8, "train_batch": 32, "steps": 1, "save_every": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "N_GROUPS", 8)
        train_rl.main(change(config, data=str(data), folder=str(run), **settings))
    return run


def test_rollouts_refer_to_images_and_do_not_copy_them(recorded):
    """To a file by its path, to one in the data by its problem; a prompt has a placeholder each."""
    (file,) = record.need_files(recorded).values()
    text = file.read_text()
    rows = read_lines(recorded.parent / "recorded.jsonl")
    assert not any(row["images"][0] in text for row in rows[2:])
    by_problem = {one["problem"]: one for one in record.read(file)}
    path = str(recorded.parent / "digits.png")
    images = {name: one["images"] for name, one in by_problem.items()}
    assert images.pop("train-0") == [path]
    assert images.pop("train-1") == []
    assert images == {f"train-{i}": [f"image 0 of problem train-{i}"] for i in range(2, 8)}
    assert by_problem["train-0"]["prompt"] == f"{vision.SPAN}{toy.QUESTION}"
    assert by_problem["train-1"]["prompt"] == by_problem["train-1"]["question"]


@pytest.mark.browser
def test_the_page_names_the_images_and_has_the_record(recorded, browser):
    (records,) = [record.read(path) for path in record.need_files(recorded).values()]
    browser.open(inspect_run(recorded), "document.querySelector('article .t')")
    for group in range(8):
        browser.js(f"document.forms[0].group.selectedIndex = {group}")
        browser.js("document.forms[0].group.dispatchEvent(new Event('input', {bubbles: true}))")
        own = [one for one in records if one["group"] == group]
        problem = browser.js("document.getElementById('problem').textContent")
        assert own[0]["problem"] in problem and own[0]["prompt"] in problem
        assert ("Images" in problem) == bool(own[0]["images"])
        assert all(f"Images: {image}" in problem for image in own[0]["images"])
        shown = browser.js(
            "[...document.querySelectorAll('.text[data-sample]')].map(text => "
            "[text.response.token_ids, text.response.entropy, text.response.dense_score])"
        )
        assert shown == [[one["token_ids"], one["entropy"], one["dense_score"]] for one in own]
    assert browser.log("browser") == []


def test_the_published_settings_with_a_tiny_model_under_a_hub_id(
    image_world, tmp_path, monkeypatch
):
    """`--model Qwen2.5-VL-3B` and data with the published columns: template, freezing and columns follow from the model."""
    monkeypatch.chdir(tmp_path)
    model = tiny_vlm("qwen2_5_vl")
    model.config.text_config.max_position_embeddings = 8192
    save_vlm(model, snapshot("Qwen/Qwen2.5-VL-3B-Instruct"))
    data = image_world.path("expert.jsonl")
    train_flow.main(change(train_flow.Config(), model="Qwen2.5-VL-3B", data=data, epochs=1))
    config = change(
        train_rl.Config(),
        model="Qwen2.5-VL-3B",
        data=data,
        prompts=2,
        group_size=2,
        train_batch=4,
        steps=1,
        max_tokens=8,
        lr=1e-2,
    )
    train_rl.main(config)
    (line,) = figures(tmp_path / "runs" / "rl-Qwen2.5-VL-3B-flow")
    assert 0 < line["length"] <= 8 and line["flow/score"] > 0


def test_the_exported_policy_loads_in_hugging_face(config, tmp_path):
    run = change(
        config, steps=1, freeze="none", folder=str(tmp_path / "run"), max_pixels=28 * 28 * 8
    )
    train_rl.main(run)
    folder = str(tmp_path / "run" / "policy")
    state = last_state(run.folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert all(
        torch.equal(t, state[f"['policy']['module']['model.{name}']"])
        for name, t in model.state_dict().items()
    )
    exported = find_model_in(folder)
    assert exported.processor.size["longest_edge"] == 28 * 28 * 8, "the limits of the training"
    with pytest.raises(ValueError, match="that run has max_pixels=6272, this one asks for None"):
        train_rl.main(change(run, resume=run.folder, max_pixels=None))


# ---- vLLM


@pytest.mark.vllm
def test_with_torchvision(with_torchvision):
    """C, and the same pixel values: tests/with_torchvision.py in a process that has torchvision."""
    done = with_torchvision.result()
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_vllm_without_torchvision(config, monkeypatch):
    for user in ("choice", "vllm_engine"):
        monkeypatch.setattr(
            f"engines.{user}.find_spec", lambda name: None if name == "torchvision" else True
        )
    with pytest.raises(ValueError, match="--engine vllm needs torchvision for images"):
        train_rl.main(change(config, engine="vllm", folder=config.folder + "-vllm"))


# ---- B. The image world


def test_drawings_differ_and_name_their_digits():
    rng = random.Random(0)
    assert toy.draw("1 +2>", rng).size == (56, 28)
    assert toy.encode(toy.draw("1 +2>", rng)) != toy.encode(toy.draw("1 +2>", rng))


@pytest.mark.slow
def test_the_image_world_learns_and_looks(tmp_path):
    """B. `python train_rl.py --model toy-vl`: base 30 to 60 %, trained at least 85 %; with the image blank, chance."""
    command = [sys.executable, str(ROOT / "train_rl.py"), "--model", "toy-vl"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "runs" / "rl-toy-vl-flow" / "summary.json").read_text())
    for kind in ("sampled", "greedy"):
        before, after = (summary[when]["test"][kind]["avg"]["mean"] for when in ("before", "after"))
        assert 0.3 <= before <= 0.6 and after >= 0.85
    test = tmp_path / "runs" / "toy-vl" / "test.jsonl"
    lines = read_lines(test)
    for line in lines:
        (image,) = line["images"]
        blank = Image.new("L", Image.open(io.BytesIO(base64.b64decode(image))).size)
        line["images"] = [toy.encode(blank)]
    (tmp_path / "blank.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    policy = str(tmp_path / "runs" / "rl-toy-vl-flow" / "policy")
    config = change(
        change(evaluation.Config(), **toy.EVALUATE),
        model=policy,
        data=(str(tmp_path / "blank.jsonl"),),
        out=str(tmp_path / "blank"),
    )
    evaluation.main(config)
    blank = json.loads((tmp_path / "blank" / "summary.json").read_text())["sets"]["blank"]
    assert blank["avg"]["mean"] <= 0.2, "chance is 0.1"
