"""Flow files that are torn, absurd or of another model, and the names of models' runs."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import save_flow, small_run
from safetensors.torch import load_file, save_file

import flow as fl
import train_flow
import train_rl
from infra import fingerprints
from infra.models import short_name
from infra.settings import change
from policy import load_policy
from worlds import toy

CONFIG = fl.FlowConfig(dim=8, n_blocks=2)


def write(folder: Path, text: str) -> Path:
    """Write a flow's file whose configuration is a text."""
    file = folder / fl.FLOW_FILE
    save_file(fl.Flow(CONFIG).state_dict(), file, metadata={"config": text})
    return file


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"n_blocks": 10_000_000}, "says n_blocks=10000000 and holds 2"),
        ({"n_blocks": -1}, "n_blocks=-1"),
        ({"n_blocks": "2"}, "n_blocks='2': expected a whole number"),
        ({"n_blocks": 2.0}, "n_blocks=2.0: expected a whole number"),
        ({"n_blocks": True}, "n_blocks=True"),
        ({"dim": -8}, "dim=-8"),
        ({"dim": None}, "dim=None: expected a whole number"),
        ({"dim": 10**30}, "dim=1"),
        ({"dim": 1_000_000}, "of another network"),
        ({"width": 10**9}, "of another network"),
        ({"norm_eps": "small"}, "norm_eps='small': expected a number"),
        ({"norm_eps": float("nan")}, "norm_eps=nan"),
        ({"contexts": "previous"}, "contexts='previous': expected a list, each a text"),
        ({"contexts": [1]}, "contexts="),
        ({"percentiles": [[0.5]]}, "percentiles="),
        ({"calibrated_at": {"0.8": 1}}, "calibrated_at="),
        ({"calibrated_at": [0.5]}, "of another network.*expert_mean"),
        ({"standardised": "no"}, "standardised='no': expected true or false"),
        ({"standardised": True}, "of another network.*latent_mean"),
        ({"fitted_to": 5}, "fitted_to=5"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_fields_that_are_absurd(tmp_path, fields, words):
    file = write(tmp_path, json.dumps({"dim": 8, "n_blocks": 2, **fields}))
    with pytest.raises(ValueError, match=f"(?s){file}.*{words}"):
        fl.load_flow(tmp_path, 8)


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "null", "{}", "[" * 100_000])
def test_a_configuration_that_is_none(tmp_path, text):
    file = write(tmp_path, text)
    with pytest.raises(ValueError, match=str(file)):
        fl.load_flow(tmp_path, 8)


@pytest.mark.parametrize("name", [fl.FLOW_FILE, fl.OFFICIAL_FILE])
@pytest.mark.parametrize("content", [b"", b"\x00" * 64, b"{}", b"\xff" * 64, None])
def test_a_torn_file(tmp_path, name, content):
    file = tmp_path / name
    if name == fl.FLOW_FILE:
        write(tmp_path, '{"dim": 8, "n_blocks": 2}')
    else:
        torch.save(fl.Flow(CONFIG).state_dict(), file)
    file.write_bytes(file.read_bytes()[:1000] if content is None else content)
    with pytest.raises(ValueError, match=str(file)):
        fl.load_flow(tmp_path, 8, contexts=("next",))


@pytest.mark.parametrize("state", [[1], {"model.input_proj.weight": 5}, torch.zeros(2)])
def test_an_official_file_of_something_else(tmp_path, state):
    torch.save(state, tmp_path / fl.OFFICIAL_FILE)
    with pytest.raises(ValueError, match="no official flow"):
        fl.load_flow(tmp_path, 8, contexts=("next",))


# ---- Which policy a flow was fitted to
def test_a_fingerprint_does_not_depend_on_the_dtype_but_on_each_tensor(world):
    policy = load_policy(world.path("model"))
    whole = fingerprints.of_weights(policy.model.bfloat16())
    assert fingerprints.of_weights(policy.model.float()) == whole
    with torch.no_grad():
        policy.model.get_output_embeddings().weight[0, 0] += 1
    assert fingerprints.of_weights(policy.model) != whole


def offline_start(world: toy.World, folder: Path, **settings) -> train_flow.Config:
    """A short offline start in a small world."""
    values = {"model": world.path("model"), "data": world.path("expert.jsonl"), "epochs": 1}
    values |= {"template": "none", "max_prompt_tokens": 64, "cutoff": 128, "flow_blocks": 1}
    values |= {"batch_size": 16, "folder": str(folder), "save_every": 1}
    return change(train_flow.Config(), **{**values, **settings})


@pytest.fixture(scope="module")
def fitted(world, tmp_path_factory) -> train_flow.Config:
    """An offline start that has ended."""
    config = offline_start(world, tmp_path_factory.mktemp("fitted") / "run", held_out=5)
    train_flow.main(config)
    return config


def test_a_flow_of_other_weights_is_refused_unless_it_is_named(
    world, fitted, tmp_path, monkeypatch, capsys
):
    """A folder of the same name holds a model with other weights."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(fitted.folder, "runs/flow-model")
    config = small_run(world, None, tmp_path / "run", steps=1)
    train_rl.main(config)
    assert "was fitted to" not in capsys.readouterr().out
    shutil.copytree(world.path("model"), "model")
    weights = load_file("model/model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, "model/model.safetensors", metadata={"format": "pt"})
    other = change(config, model="model", folder=None)
    with pytest.raises(ValueError, match="fitted to the latents of other weights.*--flow runs/"):
        train_rl.main(other)
    train_rl.main(change(other, flow="runs/flow-model/flow"))
    assert "was fitted to the latents of other weights" in capsys.readouterr().out


def test_a_flow_without_a_fingerprint_loads(tmp_path):
    save_flow(fl.Flow(CONFIG), tmp_path)
    assert fl.load_flow(tmp_path, 8).config.fitted_to is None


# ---- What an offline start cannot change when it goes on
@pytest.mark.parametrize(
    "settings",
    [
        {"held_out": 16},
        {"standardise": True},
        {"calibrate_at": (0.8,)},
        {"cutoff": 100},
        {"shift": 2},
    ],
)
def test_what_an_offline_start_fixes(fitted, settings):
    (name,) = settings
    with pytest.raises(ValueError, match=f"that run has {name}="):
        train_flow.main(change(fitted, resume=fitted.folder, epochs=2, **settings))


def test_solutions_in_another_order_are_refused(world, tmp_path):
    data = tmp_path / "expert.jsonl"
    lines = Path(world.path("expert.jsonl")).read_text().splitlines(keepends=True)
    data.write_text("".join(lines))
    config = offline_start(world, tmp_path / "run", data=str(data))
    train_flow.main(config)
    data.write_text("".join(reversed(lines)))
    with pytest.raises(ValueError, match="has other rows than when the run began"):
        train_flow.main(change(config, resume=config.folder, epochs=2))


# ---- Names of runs
@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("toy", "toy"),
        ("Qwen2.5-7B", "Qwen2.5-7B"),
        ("Qwen/Qwen2.5-7B", "Qwen2.5-7B"),
        ("runs/rl-toy-flow/policy", "rl-toy-flow-policy"),
        ("runs/rl-toy-flow/policy/", "rl-toy-flow-policy"),
        ("/data/a/policy", "a-policy"),
        ("runs/a/exports/step-20/policy", "a-step-20-policy"),
        ("policy", "policy"),
    ],
)
def test_names_of_runs_tell_models_apart(model, name):
    assert short_name(model) == name
