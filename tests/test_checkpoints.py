"""Resuming and exporting: what a checkpoint, a run's settings and its data may do and may not."""

import io
import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import BY_LENGTH, figures, small_run
from safetensors.torch import load_file
from torch.distributed.checkpoint import metadata as dcp_metadata

import train_flow
import train_rl
from infra import checkpoints, parallel, runs
from infra.settings import change, flatten, parse_config, stored_settings, upgraded
from run import export_checkpoint


@pytest.fixture(scope="module")
def finished(world, flow_folder, tmp_path_factory) -> train_rl.Config:
    """A run of two steps with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    config = small_run(world, flow_folder, folder, **BY_LENGTH, save_every=1)
    train_rl.main(config)
    return config


@pytest.fixture
def copied(finished, tmp_path) -> train_rl.Config:
    """The same, in a folder of its own, to be resumed for a third step."""
    folder = str(tmp_path / "run")
    shutil.copytree(finished.folder, folder)
    return change(finished, folder=folder, resume=folder, steps=3)


def contents(folder) -> dict[str, bytes]:
    """The bytes of all files in a folder but its lock."""
    found = [path for path in Path(folder).rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


# ---- A checkpoint that is damaged
def remove(file: Path) -> None:
    file.unlink()


def empty(file: Path) -> None:
    file.write_bytes(b"")


def halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def scramble(file: Path) -> None:
    file.write_bytes(bytes(255 - byte for byte in file.read_bytes()))


def flip_one_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("damage", [remove, empty, halve, scramble])
def test_a_damaged_checkpoint_is_named_and_the_older_one_offered(copied, name, damage):
    newest = Path(copied.folder, "checkpoints", "step-2")
    damage(newest / name)
    before = contents(copied.folder)
    with pytest.raises(ValueError) as error:
        train_rl.main(copied)
    for words in (str(newest), name, "step-1 is whole", f"mv {newest}", "goes on from step 1"):
        assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert contents(copied.folder) == before, "nothing is deleted or cut"
    with pytest.raises(ValueError, match=f"step-2 is damaged .{name}.*step-1 is whole"):
        export_checkpoint(copied.folder)


def test_a_byte_of_a_weight_that_has_changed_is_found(copied):
    flip_one_byte(Path(copied.folder, "checkpoints", "step-2", "__0_0.distcp"))
    with pytest.raises(ValueError, match="step-2 is damaged .__0_0.distcp: .*step-1 is whole"):
        train_rl.main(copied)


def test_the_run_goes_on_from_the_older_checkpoint_as_advised(copied):
    newest = Path(copied.folder, "checkpoints", "step-2")
    halve(newest / "__0_0.distcp")
    newest.rename(f"{newest}.damaged")
    train_rl.main(change(copied, steps=2))
    assert {path.name for path in newest.parent.iterdir()} == {"step-1", "step-2", "step-2.damaged"}


def test_no_older_checkpoint_is_whole(copied):
    for step in (1, 2):
        empty(Path(copied.folder, "checkpoints", f"step-{step}", ".metadata"))
    with pytest.raises(ValueError, match="step-2 is damaged.*no older one is whole"):
        train_rl.main(copied)


# ---- A checkpoint that would run code
class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path):
        self.file = str(file)

    def __reduce__(self):
        return (open, (self.file, "w"))


def put_into_metadata(checkpoint: Path, evil: Evil) -> None:
    """Put code into the metadata of a checkpoint."""
    with open(checkpoint / ".metadata", "rb") as file:
        metadata = pickle.load(file)
    metadata.planner_data["more"] = evil
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def put_into_a_value(checkpoint: Path, evil: Evil) -> None:
    """Write a checkpoint anew with code as the value of a setting of AdamW."""
    state = {
        "progress": {"step": evil, "cursor": evil, "lengths": torch.zeros(64)},
    }
    shutil.rmtree(checkpoint)
    dcp.save(state, checkpoint_id=checkpoint, no_dist=True)


@pytest.mark.parametrize("attack", [put_into_metadata, put_into_a_value])
def test_a_checkpoint_runs_no_code(copied, tmp_path, attack):
    newest = Path(copied.folder, "checkpoints", "step-2")
    attack(newest, Evil(tmp_path / "ran"))
    assert not (tmp_path / "ran").exists()
    state = {"progress": {"step": 0, "cursor": 0, "lengths": torch.zeros(64)}}
    with pytest.raises(ValueError) as error:
        checkpoints.load(state, newest, no_dist=True)
    assert "step-2" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="step-2"):
        train_rl.main(copied)
    with pytest.raises(ValueError, match="step-2"):
        export_checkpoint(copied.folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name", ["os.system", "builtins.eval", "torch.load", "pathlib.Path.unlink"]
)
def test_metadata_names_only_what_a_checkpoint_needs(name):
    module, _, attribute = name.rpartition(".")
    with pytest.raises(pickle.UnpicklingError, match=f"it names {name}, which is not loaded"):
        checkpoints.Unpickler(io.BytesIO()).find_class(module, attribute)


def test_a_member_of_an_enumeration_is_read_as_early_pythons_write_it():
    """Regression: with Python 3.11.2, that of Debian 12, no run could go on."""

    class Member:
        def __init__(self, *arguments):
            self.arguments = arguments

        def __reduce__(self):
            return getattr, self.arguments

    kind = dcp_metadata._MEM_FORMAT_ENCODING
    written = pickle.dumps(Member(kind, "TORCH_PRESERVE_FORMAT"))
    assert checkpoints.Unpickler(io.BytesIO(written)).load() is kind.TORCH_PRESERVE_FORMAT
    for other, name in ((kind, "mro"), (torch.Size, "numel"), (Path, "unlink")):
        written = pickle.dumps(Member(other, name))
        with pytest.raises(pickle.UnpicklingError, match=f"an attribute {name} that is no member"):
            checkpoints.Unpickler(io.BytesIO(written)).load()


# ---- Settings by which a run runs code
def parse(monkeypatch, *arguments):
    """Read a command line of train_rl.py."""
    monkeypatch.setattr(sys, "argv", ["train_rl.py", *arguments])
    return parse_config(train_rl.Config, {})


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"reward": ("mine.py=2", "tags")}, ("--reward", "mine.py=2", "tags")),
        ({"trust_remote_code": True}, ("--trust-remote-code",)),
    ],
)
def test_code_that_a_run_names_is_asked_for_again(tmp_path, monkeypatch, settings, flag):
    folder = str(tmp_path / "run")
    runs.Run(change(train_rl.Config(), folder=folder, **settings), "x").begin({})
    with pytest.raises(ValueError) as error:
        parse(monkeypatch, "--resume", folder)
    assert " ".join(flag) in str(error.value)
    config = parse(monkeypatch, "--resume", folder, *flag)
    for name, value in settings.items():
        assert flatten(config)[name] == value


def test_another_reward_takes_the_place_of_code(tmp_path, monkeypatch):
    folder = str(tmp_path / "run")
    runs.Run(change(train_rl.Config(), folder=folder, reward=("mine.py",)), "x").begin({})
    assert parse(monkeypatch, "--resume", folder, "--reward", "binary").reward == ("binary",)


def test_an_export_asks_for_remote_code_again(copied):
    stored = json.loads(Path(copied.folder, "config.json").read_text())
    stored["loading"]["trust_remote_code"] = True
    Path(copied.folder, "config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="--trust-remote-code"):
        export_checkpoint(copied.folder)
    export_checkpoint(copied.folder, trust_remote_code=True)


@pytest.mark.parametrize("arguments", [("--resume", ""), ("--resume=",)])
def test_an_empty_name_of_a_run(monkeypatch, arguments):
    with pytest.raises(ValueError, match="--resume is empty; expected the folder of a run"):
        parse(monkeypatch, *arguments)


# ---- Settings and data of a resumed run
# Settings of a resumed run that act from there on: a new setting stands here or in FIXED_AT_START
MAY_CHANGE = {
    *("steps", "epochs", "lr", "warmup", "weight_decay", "clip_norm", "train_batch"),
    *("prompts", "group_size", "max_tokens", "temperature", "dynamic_sampling"),
    *("media_dir", "max_prompt_tokens"),  # data whose place or limits may change
    *("reward", "grade_truncated"),
    *("baseline", "loss", "normalisation", "clip", "mismatch", "mismatch_cap"),
    *("kl_coef", "kl_in", "kl_kind", "entropy_coef"),
    *("dense_after", "dense_coef", "dense_on", "reward_times", "flow_threshold", "flow_top_k"),
    *("flow_scope", "dense_clamp", "dense_centre", "dense_until", "flow_bilateral", "gamma"),
    *("flow_lr", "flow_soft", "flow_entropy_quantile", "flow_times", "noise_repeats"),
    *("eval_data", "eval_every", "eval_samples", "log_rollouts"),
    *("engine", "max_sequences", "cache_share", "tensor_parallel", "stop_tokens"),
    *("tokens_per_gpu", "compile", "recompute_layers", "offload"),
    *("dtype", "save_every", "keep", "export_every", "track"),
}


@pytest.mark.parametrize("config_class", [train_rl.Config, train_flow.Config])
def test_each_setting_is_fixed_at_the_start_or_may_change(config_class):
    for name in flatten(config_class()):
        lists = (name in runs.FIXED_AT_START, name in MAY_CHANGE, name in runs.WHERE)
        assert sum(lists) == 1, f"name {name} in one of FIXED_AT_START and MAY_CHANGE"


def test_lists_of_settings_name_settings():
    known = {*flatten(train_rl.Config()), *flatten(train_flow.Config())}
    assert {*runs.FIXED_AT_START, *MAY_CHANGE} <= known


def test_settings_of_adamw_are_those_of_the_run_that_goes_on():
    """The moments come from the checkpoint; betas, decay and learning rate do not."""
    torch.manual_seed(0)

    def learner(*settings) -> parallel.Learner:
        return parallel.Learner(torch.nn.Linear(3, 2), *settings)

    old, new = learner((0.9, 0.95), 0.0), learner((0.8, 0.99), 0.5)
    old.module(torch.ones(1, 3)).sum().backward()
    old.step(1e-3, 1.0)
    new.load_state_dict(old.state_dict())
    groups = new.optimizer.param_groups
    assert [group["betas"] for group in groups] == [(0.8, 0.99)] * 2
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    for ours, theirs in zip(new.parameters, old.parameters, strict=True):
        assert torch.equal(ours, theirs)
        moments = (made.optimizer.state[p] for made, p in ((new, ours), (old, theirs)))
        for name, value in next(moments).items():
            assert torch.equal(value, old.optimizer.state[theirs][name]), name


def test_weight_decay_acts_when_a_run_goes_on(copied):
    """With decay, weights end smaller than without."""
    plain, decayed = copied.folder, f"{copied.folder}-decayed"
    shutil.copytree(plain, decayed)
    train_rl.main(copied)
    train_rl.main(change(copied, folder=decayed, resume=decayed, weight_decay=100.0))
    norms = []
    for folder in (plain, decayed):
        weights = load_file(Path(folder, "policy", "model.safetensors")).values()
        norms.append(sum(tensor.norm() for tensor in weights if tensor.ndim > 1))
    assert norms[1] < 0.95 * norms[0]


def reversed_rows(file: str, to: Path) -> str:
    lines = Path(file).read_text().splitlines(keepends=True)
    to.write_text("".join(reversed(lines)))
    return str(to)


def test_data_in_another_order_are_refused(world, flow_folder, tmp_path):
    data = tmp_path / "train.jsonl"
    shutil.copy(world.path("train.jsonl"), data)
    config = small_run(world, flow_folder, tmp_path / "run", data=str(data), steps=1, save_every=1)
    train_rl.main(config)
    reversed_rows(world.path("train.jsonl"), data)
    resumed = change(config, resume=config.folder, steps=2)
    before = contents(config.folder)
    with pytest.raises(ValueError, match="has other rows than when the run began"):
        train_rl.main(resumed)
    assert contents(config.folder) == before
    Path(config.folder, "data.json").unlink()  # as a run of an earlier version
    train_rl.main(resumed)


def test_a_new_set_has_figures_of_the_step_that_the_run_goes_on_from(copied, world, capsys):
    """Its table says so; figures of a set of that name with other problems are replaced."""
    new = reversed_rows(world.path("test.jsonl"), Path(copied.folder).with_name("new.jsonl"))
    train_rl.main(change(copied, eval_data=(new,)))
    said = capsys.readouterr().out
    assert "the figures of new before training are those after step 2" in said
    assert "new after step 2, greedy" in said and "new after, greedy" in said
    summary = json.loads(Path(copied.folder, "summary.json").read_text())
    assert set(summary["before"]["new"]) == set(summary["after"]["new"])


# ---- A run of an earlier version
def with_old_settings(folder: str, **settings) -> None:
    """Write settings into a run's config.json, as an earlier version had them in its groups."""
    path = Path(folder, "config.json")
    stored = json.loads(path.read_text())
    stored["optimisation"].update(lr_floor=0.1, ratio_cap=3.0)
    stored["advantage"].update(entropy_alpha=0.4, entropy_kappa=2.0)
    stored["evaluation"]["eval_split"] = "test"
    stored["dense_reward"]["flow_power"] = 1.0
    stored["record"]["log_groups"] = 3
    stored["grading"]["grader_deadline"] = 7.0
    stored["problems"].update(max_images=8, split="train")
    stored["flow_update"].update(flow_optimiser="rollout", flow_accept="correct")
    del stored["optimisation"]["entropy_coef"]
    stored["sampling"].update(dynamic_sampling=False, max_rounds=4)
    for group in stored.values():
        if isinstance(group, dict):
            group.update({name: settings[name] for name in settings if name in group})
    path.write_text(json.dumps(stored))


def resumed(monkeypatch, config: train_rl.Config) -> train_rl.Config:
    """What the command line makes of a run's settings, for one more step."""
    arguments = ["--resume", config.folder, "--steps", "3", "--reward", *config.reward]
    return parse(monkeypatch, *arguments)


def test_a_run_of_an_earlier_version_goes_on(copied, monkeypatch, capsys):
    old = {"flow_accept": "all", "dynamic_sampling": True, "max_rounds": 6}
    with_old_settings(copied.folder, **old)
    config = resumed(monkeypatch, copied)
    assert config.flow_update.flow_soft == 1.0
    assert config.sampling.dynamic_sampling == 6
    train_rl.main(config)
    said = capsys.readouterr().out
    assert "resumed with steps=3, which was 2 until here" in said
    assert said.count("resumed with") == 1, "the others mean what they meant"
    assert [line["step"] for line in figures(copied.folder)] == [1, 2, 3]
    stored = stored_settings(copied.folder)
    assert stored["flow_soft"] == 1.0 and stored["dynamic_sampling"] == 6


def test_usual_settings_of_an_earlier_version(copied, monkeypatch):
    today = resumed(monkeypatch, copied)
    with_old_settings(copied.folder)
    earlier = resumed(monkeypatch, copied)
    assert earlier == today
    assert type(earlier.sampling.dynamic_sampling) is int


def test_the_split_of_an_earlier_version_becomes_part_of_the_data(tmp_path, world):
    """A file had none, whatever was set."""
    for data in ("org/set", str(tmp_path), world.path("train.jsonl")):
        path = tmp_path / "config.json"
        path.write_text(json.dumps({"data": data, "problems": {"split": "easy"}}))
        expected = data if data.endswith(".jsonl") else f"{data}:easy"
        assert upgraded(stored_settings(tmp_path), tmp_path) == {"data": expected}
    path.write_text(json.dumps({"data": "org/set", "problems": {"split": "train"}}))
    assert upgraded(stored_settings(tmp_path), tmp_path) == {"data": "org/set"}


@pytest.mark.parametrize(
    "settings",
    [
        {"flow_optimiser": "official"},
        {"ratio_cap": 2.0},
        {"flow_power": 2.0},
        {"eval_split": "validation"},
        {"flow_accept": "all", "flow_entropy_quantile": 0.8},
    ],
    ids=str,
)
def test_a_value_that_is_no_longer_possible_is_refused(copied, monkeypatch, settings):
    with_old_settings(copied.folder, **settings)
    before = contents(copied.folder)
    name, value = next(iter(settings.items()))
    message = f"that run has {name}={value!r}.*resume with the version that began the run"
    with pytest.raises(ValueError, match=message):
        resumed(monkeypatch, copied)
    with pytest.raises(ValueError, match=message):
        train_rl.main(copied)
    assert contents(copied.folder) == before


def test_a_value_that_had_no_effect_is_no_hindrance(tmp_path):
    stored = {"shaping": "none", "entropy_alpha": 0.1, "flow_optimiser": "official"}
    assert upgraded(stored, tmp_path) == {"shaping": "none"}


# ---- Weights that are not finite
@pytest.mark.parametrize("save_every", [0, 1])
def test_weights_that_are_not_finite_are_not_written(copied, monkeypatch, save_every):
    """They become so in the last step, whose figures are those of the step before."""
    step = parallel.Learner.step

    def break_weights(learner, *arguments, **options) -> float:
        norm = step(learner, *arguments, **options)
        with torch.no_grad():
            learner.parameters[0].view(-1)[0] = torch.nan
        return norm

    monkeypatch.setattr(parallel.Learner, "step", break_weights)
    before = contents(Path(copied.folder, "policy"))
    with pytest.raises(FloatingPointError, match="weights after step 3 are not finite.*step-2"):
        train_rl.main(change(copied, save_every=save_every, train_batch=16))
    assert contents(Path(copied.folder, "policy")) == before
    assert not Path(copied.folder, "checkpoints", "step-3").exists()


def test_a_checkpoint_whose_weights_are_not_finite_is_not_exported(copied):
    newest = Path(copied.folder, "checkpoints", "step-2")
    state = {"policy": {"module": {}}, "flow": {"module": {}}}
    metadata = checkpoints.read_metadata(newest)
    for name, about in metadata.state_dict_metadata.items():
        part, _, rest = name.partition(".")
        if rest.startswith("module."):
            values = torch.full(about.size, torch.nan, dtype=about.properties.dtype)
            state[part]["module"][name.removeprefix(f"{part}.module.")] = values
    shutil.rmtree(newest)
    dcp.save(state, checkpoint_id=newest, no_dist=True)
    with pytest.raises(FloatingPointError, match="not finite and are not exported"):
        export_checkpoint(copied.folder, 2)
    assert not Path(copied.folder, "exports").exists()


# ---- Other files of a run that are of another kind
def test_fingerprints_of_another_kind(copied):
    """A KeyError."""
    Path(copied.folder, "data.json").write_text('{"held_out": 3}')
    with pytest.raises(ValueError, match="data.json, object 1: expected one with training"):
        train_rl.main(copied)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"n_layers": 3}, "flow.json has a configuration that is none: .*n_layers"),
        ({"n_blocks": 10_000_000}, "flow.json is cut, .* n_blocks=10000000 and holds 2"),
        ({"contexts": 5}, "flow.json has a configuration that is none: contexts=5"),
    ],
)
def test_an_export_with_the_settings_of_another_flow(copied, changed, words):
    """A TypeError, or minutes of allocating memory."""
    file = Path(copied.folder, "flow.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(ValueError, match=words):
        export_checkpoint(copied.folder)


def test_an_export_without_the_settings_of_its_flow(copied):
    """The policy was exported, and the flow left out without a word."""
    Path(copied.folder, "flow.json").unlink()
    with pytest.raises(ValueError, match="flow.json does not exist; expected the settings of a f"):
        export_checkpoint(copied.folder)
    assert not Path(copied.folder, "exports").exists()


def test_an_export_with_settings_that_lack_the_model(copied):
    """A KeyError."""
    Path(copied.folder, "config.json").write_text('{"group": {"shaping": "flow"}}')
    with pytest.raises(ValueError, match="config.json, object 1: expected one with model, dtype"):
        export_checkpoint(copied.folder)
