"""--config: settings from a file, above a world's preset and below flags."""

import json
import os
import subprocess
import sys
from dataclasses import asdict

import forks
import pytest
import yaml
from conftest import ROOT

import eval as evaluation
import inspector
import train_flow
import train_rl
from infra import runs
from infra.kinds import describe, is_of_kind
from infra.settings import change, flatten, kinds_of, parse_config
from worlds import toy


@pytest.fixture
def write(tmp_path):
    """write(content, name) makes a file, by default of JSON, and returns its path."""

    def write(content, name: str = "settings.json") -> str:
        path = tmp_path / name
        if not isinstance(content, str):
            content = json.dumps(content) if name.endswith(".json") else yaml.safe_dump(content)
        path.write_text(content, encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def parse(monkeypatch):
    """parse(flag, …) reads a command line, by default of train_rl.py."""

    def parse(*arguments, config_class=train_rl.Config):
        monkeypatch.setattr(sys, "argv", ["script.py", *arguments])
        return parse_config(config_class, toy.PRESETS[config_class.script])

    return parse


# ---- What wins
SETTINGS = {"model": "Qwen2.5-7B", "prompts": 64, "lr": 2e-6, "reward": ["binary", "format=0.1"]}


@pytest.mark.parametrize("name", ["a.json", "a.yaml", "a.yml"])
def test_a_file_by_flag_names(write, parse, name):
    expected = change(train_rl.Config(), **{**SETTINGS, "reward": ("binary", "format=0.1")})
    assert parse("--config", write(SETTINGS, name)) == expected
    assert parse(f"--config={write(SETTINGS, name)}") == expected


def test_a_file_in_groups(write, parse):
    file = write({"lr": 2e-6, "sampling": {"prompts": 64}, "mine": {"clip": [0.2, 0.28]}})
    config = parse("--model", "Qwen2.5-7B", "--config", file)
    assert config == change(
        train_rl.Config(), model="Qwen2.5-7B", lr=2e-6, prompts=64, clip=(0.2, 0.28)
    )


def test_flags_win_over_a_file(write, parse):
    config = parse("--lr", "1e-5", "--config", write(SETTINGS), "--reward", "binary", "tags=0.5")
    assert config.lr == 1e-5 and config.reward == ("binary", "tags=0.5")
    assert config.sampling.prompts == 64 and config.model == "Qwen2.5-7B"


def test_a_file_wins_over_the_preset_of_a_world(write, parse):
    """The world is that of the flag, else of the file, else the default one."""
    file = write({"lr": 2e-6})
    assert parse("--config", file) == change(train_rl.Config(), **{**toy.TRAIN_RL, "lr": 2e-6})
    assert parse("--config", file, "--steps", "7").steps == 7
    file = write({"model": "toy-sparse", "lr": 2e-6})
    assert parse("--config", file) == change(
        train_rl.Config(), model="toy-sparse", **{**toy.TRAIN_RL_SPARSE, "lr": 2e-6}
    )
    config = parse("--config", file, "--model", "toy")
    assert config == change(train_rl.Config(), **{**toy.TRAIN_RL, "lr": 2e-6})
    config = parse("--config", file, "--model", "Qwen2.5-7B")
    assert config == change(train_rl.Config(), model="Qwen2.5-7B", lr=2e-6)


def test_switches_and_nulls(write, parse):
    file = write({"dense_centre": True, "flow_top_k": None, "steps": None})
    config = parse("--config", file)
    assert config.dense_reward.dense_centre and config.steps is None
    assert config.flow_reward.flow_top_k is None
    assert not parse("--config", file, "--no-dense-centre").dense_reward.dense_centre


def test_settings_of_an_earlier_version(write, parse):
    """Regression: what two settings have become one list was refused as a list."""
    file = write({"clip_low": 0.2, "clip_high": 0.28, "freeze_flow": True, "rehearse": False})
    config = parse("--model", "Qwen2.5-7B", "--config", file)
    assert config == change(train_rl.Config(), model="Qwen2.5-7B", clip=(0.2, 0.28), flow_lr=0.0)


@pytest.mark.parametrize(("recomputes", "n_layers"), [(True, 10**6), (False, 0), (None, None)])
def test_a_switch_of_an_earlier_version_means_all_layers_or_none(
    write, parse, recomputes, n_layers
):
    file = write({"gradient_checkpointing": recomputes})
    assert parse("--config", file).compute.recompute_layers == n_layers


# ---- Whose files
@pytest.mark.parametrize("config_class", [train_rl.Config, train_flow.Config])
def test_the_settings_of_a_run(tmp_path, parse, config_class):
    """Its folder stays its own."""
    settings = {"lr": 5e-5, "percentiles": (0.5,), "tokens_per_gpu": 300, "keep": 3, "seed": 2}
    config = change(config_class(), model="toy", folder=str(tmp_path / "run"), **settings)
    runs.Run(config, "x").begin({})
    file = str(tmp_path / "run" / "config.json")
    assert "config" not in json.loads((tmp_path / "run" / "config.json").read_text())
    again = parse("--config", file, config_class=config_class)
    assert again == change(config, folder=None)
    elsewhere = parse("--config", file, "--folder", "runs/x", config_class=config_class)
    assert elsewhere == change(config, folder="runs/x")


def test_the_default_settings_of_each_script_come_back(write, parse):
    for config_class in (train_rl.Config, train_flow.Config, evaluation.Config, inspector.Config):
        config = change(config_class(), model="Qwen2.5-7B")
        assert parse("--config", write(asdict(config)), config_class=config_class) == config


def test_the_settings_of_an_evaluation(write, parse):
    stored = {"model": "toy", "samples": 4, "temperature": 0.6, "data": ["math500"]}
    file = write({"config": stored, "weights": "abc", "versions": {"python": "3.11"}})
    config = parse("--config", file, config_class=evaluation.Config)
    assert config.samples == 4 and config.data == ("math500",) and config.max_tokens == 96


def test_the_settings_of_an_earlier_version(write, parse):
    old = {"flow_accept": "all", "dynamic_sampling": True, "max_rounds": 6, "ratio_cap": 3.0}
    config = parse("--config", write({**old, "log_groups": 3, "entropy_alpha": 0.1}))
    assert config.flow_update.flow_soft == 1.0 and config.sampling.dynamic_sampling == 6
    file = write({"ratio_cap": 2.0})
    with pytest.raises(ValueError) as error:
        parse("--config", file)
    assert str(error.value) == (
        f"{file} has ratio_cap=2.0, which is no setting any more, and 3.0 in all runs: take that "
        "version, or leave it out"
    )
    with pytest.raises(ValueError, match="flow_optimiser='official', which is no setting"):
        parse("--config", write({"flow_optimiser": "official"}))


def test_a_part_for_each_script(write, parse):
    parts = {"model": "Qwen2.5-7B", "train_flow": {"lr": 3e-4}, "train_rl": {"run": {"keep": 5}}}
    file = write(parts)
    assert parse("--config", file) == change(train_rl.Config(), model="Qwen2.5-7B", keep=5)
    config = parse("--config", file, config_class=train_flow.Config)
    assert config == change(train_flow.Config(), model="Qwen2.5-7B", lr=3e-4)
    assert parse("--config", file, config_class=inspector.Config).run.keep == 5
    with pytest.raises(ValueError, match="settings of train_rl and train_flow, and none of eval;"):
        parse("--config", file, config_class=evaluation.Config)


# ---- YAML
def test_plain_words_of_yaml(write, parse):
    """Regression: YAML 1.1 reads 1e-6 as a text, and off as false."""
    lines = ("lr: 1e-6", "kl_coef: 1", "compile: off", "freeze: none", "steps: null", "seed: 7")
    text = "\n".join([*lines, "dense_reward: {dense_centre: true}", "reward_times: [.5, 0.8]"])
    config = parse("--model", "Qwen2.5-7B", "--config", write(text, "a.yaml"))
    settings = {"lr": 1e-6, "kl_coef": 1, "compile": "off", "freeze": "none", "seed": 7}
    settings |= {"dense_centre": True, "reward_times": (0.5, 0.8)}
    assert config == change(train_rl.Config(), model="Qwen2.5-7B", **settings)


@pytest.mark.parametrize(
    "text",
    [
        "lr: !!python/object/apply:os.system ['touch x']",
        "lr: [1",
        "? [a]\n: 1",
        "a: *nowhere",
        "\t- 1",
        "lr: \x07",
    ],
)
def test_yaml_that_cannot_be_read(write, parse, text):
    with pytest.raises(ValueError, match="a.yaml is not YAML .*expected a JSON or YAML file of"):
        parse("--config", write(text, "a.yaml"))


# ---- What is refused
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"promts": 4}, "has 'promts': expected settings of train_rl.py, which --help lists"),
        ({str(i): i for i in range(5)}, "has '0', '1', '2' and 2 more: expected settings"),
        ({"config": "other.json"}, "has 'config': expected settings of train_rl.py"),
        ({"train_rl": 5}, "has 'train_rl': expected settings of train_rl.py"),
        ({"prompts": "4"}, "has prompts='4': expected a whole number; change it there"),
        ({"prompts": 4.0}, "has prompts=4.0: expected a whole number; change it there"),
        ({"prompts": True}, "has prompts=True: expected a whole number; change it there"),
        ({"lr": None}, "has lr=None: expected a number; change it there"),
        ({"model": 5}, "has model=5: expected a text; change it there"),
        ({"reward": "binary"}, "has reward='binary': expected a list, each a text or null"),
        ({"reward": [["binary"]]}, "expected a list, each a text or null; change it there"),
        ({"steps": [4]}, "has steps=(4,): expected a whole number or null; change it there"),
        ({"loss": "grpo"}, "has loss='grpo': expected one of ppo, gspo, cispo; change it there"),
        ({"freeze": "all"}, "has freeze='all': expected one of none, vision or null"),
        ({"lr": 0.0}, "--lr=0.0: expected a number above 0, at most 1,000,000; change it there"),
        ({"reward_times": [0.5, 1]}, "--reward-times=1: expected a number between 0 and 1"),
        ({"data": " "}, "--data=' ' is empty; give it a value, or leave the flag out"),
        ({"lr": 1e-6, "mine": {"lr": 1e-5}}, "has 'lr' twice; leave one of them"),
        ({"a": {"b": {"c": {"lr": 1.0}}}}, "has 'c': expected settings of train_rl.py"),
        ([1], "[1] is no object; expected a JSON or YAML file of settings, such as the config"),
        (None, "None is no object; expected a JSON or YAML file of settings"),
    ],
)
@pytest.mark.parametrize("name", ["settings.json", "settings.yaml"])
def test_settings_that_are_wrong(write, parse, content, words, name):
    file = write(content, name)
    with pytest.raises(ValueError) as error:
        parse("--config", file)
    assert words in str(error.value) and file in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [("", "is not JSON"), ('{"lr": ', "is not JSON"), ("lr: 5", "is not JSON")],
)
def test_json_that_cannot_be_read(write, parse, content, words):
    with pytest.raises(ValueError, match=f"settings.json.*{words}.*expected a JSON or YAML file"):
        parse("--config", write(content))


def test_a_list_of_a_fixed_length(write, parse):
    file = write({"compare": ["a", "b", "c"]})
    with pytest.raises(ValueError, match="expected a list of 2, each a text or null"):
        parse("--config", file, config_class=evaluation.Config)
    file = write({"compare": ["a", "b"]})
    assert parse("--config", file, config_class=evaluation.Config).compare == ("a", "b")


def test_a_yaml_file_that_holds_itself(write, parse):
    with pytest.raises(ValueError, match="expected settings of train_rl.py"):
        parse("--config", write("a: &a {b: *a}", "a.yaml"))


def test_files_that_are_none(tmp_path, write, parse):
    with pytest.raises(ValueError, match="nowhere.json does not exist; expected a JSON or YAML"):
        parse("--config", str(tmp_path / "nowhere.json"))
    with pytest.raises(ValueError, match="is a folder; expected .* such as the config.json of a"):
        parse("--config", str(tmp_path))
    with pytest.raises(ValueError, match=r"expected a name that ends in .json, .yaml or .yml"):
        parse("--config", write("lr = 1", "settings.toml"))
    for arguments in (("--config", ""), ("--config=",)):
        with pytest.raises(ValueError, match="--config is empty; expected a JSON or YAML file"):
            parse(*arguments)


def test_a_run_goes_on_without_a_file(parse):
    """Neither is read."""
    with pytest.raises(ValueError, match="--resume a and --config b.json exclude each other"):
        parse("--resume", "a", "--config", "b.json")


def test_kinds_of_all_settings_can_be_said():
    for config in (train_rl.Config(), train_flow.Config(), evaluation.Config()):
        kinds = kinds_of(config)
        for name, value in flatten(config).items():
            assert is_of_kind(value, kinds[name]), name
            assert describe(kinds[name])


# ---- Settings by which code runs
@pytest.mark.parametrize("model", ["toy", "Qwen2.5-7B"])
@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"reward": ["mine.py=2", "tags"]}, ("--reward", "mine.py=2", "tags")),
        ({"trust_remote_code": True}, ("--trust-remote-code",)),
    ],
)
def test_code_that_a_file_names_is_asked_for_again(write, parse, settings, flag, model):
    """A world's preset, which has a reward, takes the place of none that a file names."""
    file = write({"model": model, **settings})
    with pytest.raises(ValueError) as error:
        parse("--config", file)
    assert str(error.value).startswith(f"--config {file}: that file has {next(iter(settings))}=")
    assert f"give {' '.join(flag)} again if you trust it" in str(error.value)
    config = flatten(parse("--config", file, *flag))
    for name, value in settings.items():
        assert config[name] == (tuple(value) if isinstance(value, list) else value)


# ---- The commands
@pytest.mark.parametrize("script", ["train_rl.py", "train_flow.py", "eval.py", "inspector.py"])
def test_a_command_that_is_given_a_wrong_file_says_so_in_one_line(write, script):
    file = write({"promts": 4})
    command = [sys.executable, str(ROOT / script), "--config", file]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    # one of the commands from nothing, whose imports might say something, too
    run = subprocess.run if script == "train_rl.py" else forks.call
    done = run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"error: {file} has 'promts': expected settings of ")


def test_the_help_says_what_its_defaults_come_from(write, parse, capsys):
    file = write({"lr": 2e-6, "model": "Qwen2.5-7B"}, "x.json")
    with pytest.raises(SystemExit):
        parse("--config", file, "--help")
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--config FILE takes settings from a JSON or YAML file" in shown
    assert "and, below it, --model Qwen2.5-7B" in shown and "2e-06" in shown
