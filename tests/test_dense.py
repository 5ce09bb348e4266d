"""Dense rewards of files: each of study/rewards/ runs, on ranks, with adapters and images; bad ones are refused."""

import ast
import io
import math
import pickle
import re
import shutil
import tokenize
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import (
    BY_LENGTH,
    ROOT,
    figures,
    find_model_in,
    flags,
    flow_reward_of,
    last_state,
    read_lines,
    small_run,
)
from safetensors.torch import load_file
from test_distributed import finish
from test_train import launch

import dense
import flow as fl
import rlfr
import train_rl
from infra.files import import_file
from infra.settings import change, parse_config, upgraded
from run import export_checkpoint

FOLDER = ROOT / "study" / "rewards"
LEARNING = ROOT / "tests" / "learning_reward.py"
LATENTS = ("mahalanobis", "mlp", "nearest", "probe", "ridge", "whitened_flow")  # what reads latents
EXPERTS = ("ngram", *LATENTS)
OTHERS = ("noise", "self_certainty", "steps", "logprob", "distillation")


def own_settings(name: str, world) -> tuple[str, ...]:
    """The settings that a reward of study/rewards/ needs."""
    settings = ()
    if name in ("logprob", "distillation"):
        settings += (f"expert={world.path('model')}",)
    if name in (*EXPERTS, "logprob"):
        settings += (f"experts={world.path('expert.jsonl')}",)
    if name in (*EXPERTS, "logprob") and name != "probe":
        settings += ("held_out=16",)
    if name in ("mlp", "whitened_flow"):
        settings += ("steps=20",)
    return settings


def run_of(world, folder, file: Path | str, own: tuple[str, ...] = (), **settings):
    """Two steps with the dense reward of a file."""
    values = {"dense_coef": 0.1, "tokens_per_gpu": 300, **BY_LENGTH, **settings}
    flow = values.pop("flow", None)
    return small_run(world, flow, folder, shaping=str(file), dense=own, **values)


def all_runs(world, folder: Path) -> dict[str, train_rl.Config]:
    """A run of each dense reward, by name."""
    runs = {}
    for name in (*EXPERTS, *OTHERS):
        file = FOLDER / f"{name}.py"
        runs[name] = run_of(world, folder / name, file, own_settings(name, world))
    runs["learning_reward"] = run_of(world, folder / "learning", LEARNING)
    shuffled = ("of=flow", "among=tokens", "share=0.5")
    runs["shuffled"] = run_of(
        world, folder / "shuffled", FOLDER / "shuffled.py", shuffled, flow="new"
    )
    file = FOLDER / "squared_flow.py"
    runs["squared_flow"] = run_of(world, folder / "squared", file, flow="new", flow_lr=0.0)
    return runs


@pytest.fixture(scope="module")
def expert(world, tmp_path_factory) -> str:
    """Another policy than the base: what two steps make of it."""
    folder = tmp_path_factory.mktemp("expert") / "run"
    train_rl.main(small_run(world, None, folder, shaping="none", lr=1e-2, **BY_LENGTH))
    return str(folder / "policy")


@pytest.fixture(scope="module")
def runs(world, expert, tmp_path_factory) -> dict[str, train_rl.Config]:
    found = all_runs(world, tmp_path_factory.mktemp("dense"))
    for name in ("logprob", "distillation"):
        own = found[name].dense_reward.dense
        own = (f"expert={expert}", *own[1:])
        found[name] = change(found[name], dense=own)
    for config in found.values():
        train_rl.main(config)
    return found


def test_every_file_of_the_study_is_tried(runs):
    files = {file.stem for file in FOLDER.glob("*.py") if "class Reward" in file.read_text()}
    assert files == runs.keys() - {"learning_reward"} and len(files) >= 10


def code_lines(file: Path) -> int:
    """How many lines of a file hold code: no comments, no docstrings."""
    source = file.read_text()
    nothing = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in (*nothing, tokenize.ENDMARKER):
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):  # a docstring
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return len(lines)


@pytest.mark.parametrize("file", list(FOLDER.glob("*.py")), ids=lambda file: file.stem)
def test_a_file_has_at_most_40_lines_of_code(file):
    assert code_lines(file) <= 40


def test_each_reward_acts_in_the_default_batch(runs):
    """Regression: what was put into the scoring rewarded nothing where all is one batch."""
    plain = Path(runs["noise"].folder).parent / "plain"
    train_rl.main(change(runs["noise"], shaping="none", dense=(), folder=str(plain)))
    without = load_file(plain / "policy" / "model.safetensors")
    for name, config in runs.items():
        found = figures(config.folder)
        assert found[0][f"{name}/score"] != 0 and found[0][f"{name}/share"] > 0, name
        with_it = load_file(Path(config.folder) / "policy" / "model.safetensors")
        assert any(not torch.equal(with_it[key], without[key]) for key in without), name


SCRIPT = """
import pickle, sys
sys.path[:0] = sys.argv[1:2]
import train_rl
for config in pickle.load(open(sys.argv[2], "rb")):
    train_rl.main(config)
"""


@pytest.mark.distributed
def test_two_ranks_give_the_figures_of_one(runs, tmp_path):
    script = tmp_path / "all.py"
    script.write_text(SCRIPT)
    learning = ("learning_reward", "shuffled")  # a step of the others says all
    again = []
    for name, config in runs.items():
        n_steps = 2 if name in learning else 1
        again.append(change(config, folder=f"{config.folder}-two", steps=n_steps))
    (tmp_path / "configs").write_bytes(pickle.dumps(again))
    finish(script, [str(ROOT), str(tmp_path / "configs")], 2)
    for one, two in zip(runs.values(), again, strict=True):
        found = figures(two.folder)
        assert len(found) == two.steps
        for a, b in zip(figures(one.folder), found, strict=False):
            assert a == pytest.approx(b, rel=1e-4, abs=1e-5), one.shaping


def test_each_reward_with_adapters(runs, tmp_path):
    for name, config in runs.items():
        first = ("first=True", "whiten=True") if name in ("ridge", "whitened_flow") else ()
        own = (*config.dense_reward.dense, *first)
        folder = str(tmp_path / name)
        train_rl.main(change(config, steps=1, lora_rank=4, dense=own, folder=folder))
        assert figures(folder)[0][f"{name}/score"] != 0, name


@pytest.mark.parametrize(
    "file", [*(FOLDER / f"{name}.py" for name in LATENTS), LEARNING], ids=lambda file: file.stem
)
def test_rewards_of_latents_with_images(file, image_world, tmp_path):
    own = own_settings(file.stem, image_world)
    settings = {"problem_column": "prompt", "max_prompt_tokens": 64, "steps": 1}
    config = run_of(image_world, tmp_path / "run", file, own, **settings)
    train_rl.main(config)
    assert figures(config.folder)[0][f"{file.stem}/score"] != 0


@pytest.mark.parametrize("page", ["README.md", "docs/dense-rewards.md"])
def test_the_reward_of_a_page_runs(page, world, tmp_path):
    """Regression: that of the README lacked its import."""
    text = (ROOT / page).read_text()
    file = tmp_path / "smooth.py"
    file.write_text(
        re.search(r"^```python(?: smooth.py)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)[1]
    )
    train_rl.main(run_of(world, tmp_path / "run", file, steps=1))
    (line,) = figures(str(tmp_path / "run"))
    assert line["smooth/score"] < 0 and line["smooth/share"] == 1


# ---- A state
# The last update of the third step: the policy makes two a step, and what learns one more
@pytest.mark.parametrize(("name", "update"), [("learning_reward", 9), ("probe", 6)])
def test_a_reward_with_a_state_is_saved_killed_resumed_and_exported(name, update, world, tmp_path):
    file = LEARNING if name == "learning_reward" else FOLDER / "probe.py"
    own = own_settings(name, world)
    config = run_of(world, tmp_path / "whole", file, own, steps=3, save_every=1, keep=2)
    train_rl.main(config)
    cut = tmp_path / "cut"
    launch("train_rl.py", flags(change(config, folder=str(cut))), "update", update)
    assert len(figures(cut)) == 2 and (cut / "checkpoints" / "step-1").exists()
    train_rl.main(change(config, folder=None, resume=str(cut)))
    before, after = last_state(str(tmp_path / "whole")), last_state(str(cut))
    assert any(name in key for key in before)
    for key, tensor in before.items():
        if torch.is_tensor(tensor):
            assert torch.equal(tensor, after[key]), key
    export_checkpoint(str(cut), out=str(tmp_path / "out"))
    exported = load_file(tmp_path / "out" / name / "weights.safetensors")
    at_end = load_file(cut / name / "weights.safetensors")
    assert exported.keys() == at_end.keys() and exported
    assert all(torch.equal(exported[key], at_end[key]) for key in exported)


def test_what_a_reward_learns_is_of_its_seed_and_its_figures_are_logged(runs, tmp_path):
    config = change(runs["learning_reward"], folder=str(tmp_path / "run"))
    torch.rand(1)  # whatever was drawn before
    train_rl.main(config)
    for a, b in zip(figures(runs["learning_reward"].folder), figures(config.folder), strict=True):
        assert a == pytest.approx(b) and 0 < a["learning_reward/cross_entropy"] < 5


def test_a_reward_of_drift_is_0_before_the_first_update(world, tmp_path):
    body = (
        "    taps = (0.5,)\n    reads_first = True\n    def score(self, part):\n"
        "        drift = part.latents(0.5) - part.latents(0.5, first=True)\n"
        "        return part.per_token(-drift.norm(dim=1))\n"
    )
    file = tmp_path / "drift.py"
    file.write_text(HEAD + body)
    train_rl.main(run_of(world, tmp_path / "run", file))
    before, after = figures(str(tmp_path / "run"))
    assert before["drift/score"] == 0 > after["drift/score"]


def test_the_flow_that_a_control_shuffles_is_exported_as_a_flow(world, flow_folder, tmp_path):
    own = ("of=flow", "among=tokens")
    settings = {"steps": 1, "save_every": 1, "flow": flow_folder}
    config = run_of(world, tmp_path / "run", FOLDER / "shuffled.py", own, **settings)
    train_rl.main(config)
    export_checkpoint(config.folder, out=str(tmp_path / "out"))
    exported, at_end = (
        fl.load_flow(folder / "flow", 32) for folder in (tmp_path / "out", tmp_path / "run")
    )
    before = fl.load_flow(flow_folder, 32)
    for name, parameter in exported.named_parameters():
        assert torch.equal(parameter, at_end.get_parameter(name)), name
        assert not torch.equal(parameter, before.get_parameter(name)), name
    assert figures(config.folder)[0]["shuffled/loss"] > 0


def test_a_checkpoint_of_another_text_of_the_file_is_refused(world, tmp_path):
    file = tmp_path / "mine.py"
    shutil.copy(LEARNING, file)
    config = run_of(world, tmp_path / "run", file, steps=1, save_every=1)
    train_rl.main(config)
    shutil.copy(FOLDER / "noise.py", file)
    with pytest.raises(ValueError, match="holds mine, for which this run has no place"):
        train_rl.main(change(config, folder=None, resume=config.folder, steps=2))


def test_a_resumed_run_names_its_file_again(world, tmp_path, monkeypatch):
    """A run that somebody sent runs that person's code only if it is asked to."""
    config = run_of(world, tmp_path / "run", FOLDER / "noise.py", steps=1, save_every=1)
    train_rl.main(config)
    command = ["train_rl.py", "--resume", str(tmp_path / "run"), "--reward", *config.reward]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(ValueError, match=r"give --shaping .*noise.py again if you trust it"):
        parse_config(train_rl.Config, {})


def test_a_probe_is_fitted_once_or_again_and_again(runs, tmp_path):
    once = runs["probe"]
    own = (*once.dense_reward.dense, "refit=1")
    train_rl.main(change(once, dense=own, folder=str(tmp_path / "run")))
    (first, second), (same, other) = figures(once.folder), figures(str(tmp_path / "run"))
    assert same == pytest.approx(first) and other["probe/score"] != second["probe/score"]


def test_a_flow_of_whitened_residuals(world):
    """Before its fit its velocity is 0; after it the excess of expert tokens is 0 in the mean."""
    host = host_of(world)
    own = {"experts": world.path("expert.jsonl"), "held_out": "16"}
    file = str(FOLDER / "whitened_flow.py")
    untrained, trained = (dense.make(file, {**own, "steps": n}, host) for n in ("0", "200"))
    _, held_out = host.solutions(own["experts"], 16)
    parts = list(host.run_policy(held_out, trained.taps))
    x_1 = torch.cat([untrained.residuals(part) for part in parts], dim=1)
    noise = untrained.module.noise.squeeze(1)  # its opposite counts as much
    u_squared = ((x_1 - noise).square() + (x_1 + noise).square()) / 2  # (L, M, D)
    weight = (0.25 + 1 + 4) / 3  # the mean of t / (1 - t) over 0.2, 0.5, 0.8
    before = torch.cat([untrained.errors(part) for part in parts], dim=1)
    torch.testing.assert_close(before, weight * u_squared.mean(dim=2))
    after = torch.cat([trained.errors(part) for part in parts], dim=1)
    assert (after - before).abs().amax() > 0.1
    excess = trained.excess(after)
    torch.testing.assert_close(excess.mean(dim=1), torch.zeros(3), atol=1e-4, rtol=0)
    # whitened on the solutions that it was fitted to, where the residuals have unit spreads
    fitted, _ = host.solutions(own["experts"], 16)
    parts = host.run_policy(fitted, trained.taps)
    for of_tap in torch.cat([trained.residuals(part) for part in parts], dim=1):
        torch.testing.assert_close(torch.cov(of_tap.T), torch.eye(32), atol=0.05, rtol=0)


# ---- What is wrong is said
HEAD = "import torch\nfrom dense import DenseReward\n\n\nclass Reward(DenseReward):\n"
BAD = {
    "shape": ("    def score(self, part):\n        return torch.zeros(3)\n", "returned a tensor"),
    "none": ("    def score(self, part):\n        return None\n", "returned NoneType, no tensor"),
    "nan": (
        "    def score(self, part):\n        return part.output.logp * torch.nan\n",
        r"bad: (\d+) of \1 scores of response tokens in a micro-batch of step 1 are not finite",
    ),
    "tap": (
        "    taps = (0.5,)\n    def score(self, part):\n"
        "        return part.per_token(part.latents(0.9).sum(1))\n",
        r"latents at 0.9 of the depth are not there, only at \(0.5,\)",
    ),
    "first": (
        "    taps = (0.5,)\n    def score(self, part):\n"
        "        return part.per_token(part.latents(0.5, first=True).sum(1))\n",
        "latents of the first policy are not there",
    ),
    "spread": (
        "    def score(self, part):\n        return part.per_token(torch.zeros(3))\n",
        r"per_token\(\) got a tensor \(3,\); expected M = \d+ rows",
    ),
    "gradient": (
        "    def __init__(self, settings, host):\n        self.module = torch.nn.Linear(1, 1)\n"
        "    def score(self, part):\n        score = self.module(part.output.entropy[:, :, None])\n"
        "        score.sum().backward()\n        return score.squeeze(2)\n",
        "leaves a gradient on the module, which does not learn",
    ),
    "late": (
        "    def score(self, part):\n        self.keep(a=torch.zeros(2))\n"
        "        return part.output.logp\n",
        "a kept after the start; keep a tensor of that name",
    ),
    "calibrated": (
        "    def __init__(self, settings, host):\n        self.calibrate(torch.zeros(2, 3))\n",
        r"bad: calibrate\(\) got no list; expected a tensor for each part",
    ),
    "calibrated by nothing": (
        "    def __init__(self, settings, host):\n        self.calibrate([])\n",
        r"bad: calibrate\(\) got no list",
    ),
    "calibrated by one value": (
        "    def __init__(self, settings, host):\n"
        "        self.calibrate([torch.tensor([[1.0, 2.0], [3.0, 3.0]])])\n",
        r"bad: calibrate\(\) got 4 values .* 0 of them not finite, with the spread \[0.7.*, 0.0\]",
    ),
    "calibrated by nan": (
        "    def __init__(self, settings, host):\n"
        "        self.calibrate([torch.tensor([1.0, torch.nan])])\n",
        r"bad: calibrate\(\) got 2 values of expert tokens, 1 of them not finite",
    ),
    "not calibrated": (
        "    def score(self, part):\n        return self.excess(part.output.logp)\n",
        r"bad: excess\(\) without calibrate\(\)",
    ),
    "shaped": (
        "    def score(self, part):\n        return part.output.logp\n"
        "    def shape(self, score, mask):\n        return score / 0\n",
        "expected finite rewards",
    ),
    "shaped to nothing": (
        "    def score(self, part):\n        return part.output.logp\n"
        "    def shape(self, score, mask):\n        pass\n",
        r"bad: shape\(\) returned NoneType, no tensor",
    ),
    "no figures": (
        "    def score(self, part):\n        return part.output.logp\n"
        "    def figures(self):\n        pass\n",
        r"bad: figures\(\) returned None; expected a dict of numbers",
    ),
    "a tensor as a figure": (
        "    def score(self, part):\n        return part.output.logp\n"
        "    def figures(self):\n        return {'a': torch.zeros(())}\n",
        r"bad: figures\(\) returned {'a': tensor\(0.\)}; expected a dict of numbers",
    ),
    "one bound": ("    clamp = 1\n", "bad: clamp=1; expected two numbers, the lower one first"),
    "bounds": ("    clamp = (1, 0)\n", r"bad: clamp=\(1, 0\); expected two numbers, the lower one"),
    "rate": (
        "    learns = True\n    lr = float('nan')\n    module = torch.nn.Linear(1, 1)\n",
        "bad: lr=nan; expected a finite number, 0 or more",
    ),
    "text": ("    taps = 'ab'\n", "taps=ab; expected fractions of the depth"),
    "one tap": ("    taps = 0.5\n", "taps=0.5; expected fractions of the depth"),
    "depth": ("    taps = (2.0,)\n", r"taps=\(2.0,\); expected fractions of the depth"),
    "method": ("    pass\n", "has no method score"),
    "module": ("    learns = True\n", "learns = True, and no module"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_reward_is_refused_before_an_engine_starts(name, world, tmp_path, monkeypatch):
    body, words = BAD[name]
    file = tmp_path / "bad.py"
    file.write_text(HEAD + body)
    monkeypatch.delattr(train_rl, "make_engine")
    with pytest.raises(ValueError, match=words):
        train_rl.main(run_of(world, tmp_path / "run", file))
    assert not (tmp_path / "run").exists()


def test_a_score_that_raises_does_so_before_an_engine_starts(world, tmp_path, monkeypatch):
    file = tmp_path / "bad.py"
    file.write_text(HEAD + "    def score(self, part):\n        return part.nothing\n")
    monkeypatch.delattr(train_rl, "make_engine")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        train_rl.main(run_of(world, tmp_path / "run", file))


def test_a_constant_score_is_said_before_an_engine_starts(world, tmp_path, capsys):
    """It is an error in the first step: what rewards a policy's own habits finds none in stand-ins."""
    file = tmp_path / "same.py"
    constant = "    def score(self, part):\n        return part.output.logp * 0 + 0.5\n"
    file.write_text(HEAD + constant)
    with pytest.raises(
        ValueError, match="same: all .* tokens have the score 0.5; .* teaches nothi"
    ):
        train_rl.main(run_of(world, tmp_path / "run", file))
    printed = capsys.readouterr().out
    assert printed.index("teaches nothing: if responses have it") < printed.index("engine: torch")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_run_is_as_without_the_trial_of_its_reward(world, tmp_path, monkeypatch):
    """Of each kind of state: a random one, a list, a tensor, of the module, gradients, the global one."""
    body = """
    learns = True

    def __init__(self, settings, host):
        self.module = torch.nn.Linear(1, 1)
        self.module.register_buffer("n", torch.zeros(()))
        self.generator = torch.Generator().manual_seed(3)
        self.calls, self.total = [], torch.zeros(())

    def score(self, part):
        self.calls.append(1)
        self.total += 1
        self.module.n += 1
        score = self.module(part.output.entropy[:, :, None]).squeeze(2)
        score.mean().backward()
        known = len(self.calls) + self.total + self.module.n + torch.rand(1)
        return score.detach() + known + torch.rand(score.shape, generator=self.generator)
"""
    file = tmp_path / "stateful.py"
    file.write_text(HEAD + body)
    for folder in ("tried", "untried"):
        torch.manual_seed(5)
        train_rl.main(run_of(world, tmp_path / folder, file))
        monkeypatch.setattr(train_rl, "try_dense", lambda *_: None)
    tried, untried = (figures(str(tmp_path / folder)) for folder in ("tried", "untried"))
    assert tried == untried and tried[0]["stateful/score"] > 3


@pytest.mark.parametrize("shaping", [str(FOLDER / "self_certainty.py"), "none", "entropy"])
def test_a_flow_that_no_reward_reads_is_named(shaping, world, flow_folder, tmp_path, capsys):
    train_rl.main(run_of(world, tmp_path / "run", shaping, steps=1, flow=flow_folder))
    said = f"--flow {flow_folder} has no part in --shaping {shaping}, which reads no flow\n"
    assert said in capsys.readouterr().out


def test_an_excess_has_the_shape_of_its_values():
    """Regression: that of values (M,) was (1, M) where one tap was calibrated."""
    for calibrated in (torch.tensor([1.0, 3.0, 5.0]), torch.tensor([[1.0, 3.0, 5.0]])):
        reward = dense.DenseReward(None, None)
        reward.calibrate([calibrated])
        assert reward.excess(torch.tensor([3.0, 7.0])).tolist() == [0.0, 2.0]
        assert reward.excess(torch.tensor([[3.0, 7.0]])).tolist() == [[0.0, 2.0]]
    reward.calibrate([torch.tensor([[1.0, 3.0, 5.0], [0.0, 1.0, 2.0]])])
    assert reward.excess(torch.tensor([[3.0], [3.0]])).tolist() == [[0.0], [2.0]]


@pytest.mark.parametrize(
    ("shaping", "own", "words"),
    [
        ("nowhere.py", (), "nowhere.py: there is no such file"),
        ("flows", (), "--shaping flows: expected none, entropy, flow, or a Python file"),
        ("flow", ("a=1",), "has flags of its own"),
        ("{ridge}", ("experts",), "'experts': expected NAME=VALUE"),
        ("{ridge}", ("expertise=x",), "the dense reward has no such setting; expected experts"),
        ("{ridge}", (), "--dense: give it experts=VALUE, for which there is no default"),
        ("{logprob}", ("held_out=1",), "--dense held_out: give it expert=VALUE experts=VALUE, for"),
        (
            "{ridge}",
            ("experts={data}", "whiten=perhaps"),
            "whiten='perhaps': expected true or false",
        ),
        ("{ridge}", ("experts={data}", "held_out=48"), "48 of 48 solutions in"),
        ("{empty}", (), "defines no class Reward"),
        ("{torn}", (), r"torn.py, line 2: SyntaxError: .* \(at its import\)"),
        ("{leaving}", (), r"leaving.py, line 3: SystemExit: .* \(at its import\)"),
        ("{policy}", (), "the reward would be called policy, as other figures of a run are"),
        ("{dotted}", (), "expected a Python file with a name such as my_reward.py"),
    ],
)
def test_bad_settings_of_a_file_are_named(shaping, own, words, world, tmp_path):
    places = {
        "ridge": FOLDER / "ridge.py",
        "logprob": FOLDER / "logprob.py",
        "data": world.path("expert.jsonl"),
        "empty": tmp_path / "e.py",
        "policy": tmp_path / "policy.py",
        "dotted": tmp_path / "a.b.py",
        "torn": tmp_path / "torn.py",
        "leaving": tmp_path / "leaving.py",
    }
    places["empty"].write_text("")
    places["policy"].write_text("")
    places["dotted"].write_text("")
    places["torn"].write_text("import dense\nclass Reward(:\n")
    places["leaving"].write_text("import sys\n\nsys.exit()\n")
    own = tuple(text.format(**places) for text in own)
    with pytest.raises(ValueError, match=words):
        train_rl.main(run_of(world, tmp_path / "run", shaping.format(**places), own))


# ---- What is common to all
def test_the_reward_counts_from_a_step_to_another(world, flow_folder, tmp_path):
    settings = {"steps": 3, "dense_after": 1, "dense_until": 2}
    train_rl.main(small_run(world, flow_folder, tmp_path / "run", **settings))
    shares = [line["flow/share"] for line in figures(str(tmp_path / "run"))]
    assert shares[0] == shares[2] == 0 < shares[1]
    with pytest.raises(ValueError, match="dense_until=1 with dense_after=1"):
        train_rl.main(small_run(world, None, tmp_path / "x", dense_after=1, dense_until=1))


def test_the_clamp_is_of_tokens_or_of_the_mean_of_a_response():
    score = torch.tensor([[1.0, 5.0, -30.0], [1.0, 2.0, 0.0]])  # excess: a reward is minus it
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    config = change(train_rl.Config(), flow_scope="expert", dense_coef=0.5, dense_clamp=(-2.0, 0.0))
    reward = flow_reward_of(config)
    tokens = dense.token_rewards(reward, score, mask, config.dense_reward, 2)
    torch.testing.assert_close(tokens, torch.tensor([[-0.5, -1.0, 0.0], [-0.5, -1.0, 0.0]]))
    on_response = change(config, dense_on="response").dense_reward
    tokens = dense.token_rewards(reward, score, mask, on_response, 2)
    torch.testing.assert_close(tokens, torch.tensor([[0.0, 0.0, 0.0], [-0.75, -0.75, 0.0]]))


def host_of(world, **settings) -> dense.Host:
    """What a dense reward of the small world may ask of its run."""
    model = find_model_in(world.path("model"))
    config = run_of(world, None, LEARNING, problem_column="problem", **settings)
    return dense.Host(model, config, partial(train_rl.make_policy, config, model), names_flow=True)


def test_a_file_that_changes_the_flow_reward_has_settings_of_its_own(world):
    host = host_of(world, flow="new", flow_threshold=0.1)
    score = torch.tensor([[1.0, 2.0, 3.0, 5.0, 9.0]])  # the last one is no token
    mask = torch.tensor([[1, 1, 1, 1, 0]]).bool()
    for power, expected in (
        ("1", [0.0, -1 / 4, -1 / 2, -1.0, 0.0]),
        ("2", [0.0, 0.0, -1 / 4, -1.0, 0.0]),
        ("3", [0.0, 0.0, -1 / 8, -1.0, 0.0]),
    ):
        reward = dense.make(str(FOLDER / "squared_flow.py"), {"power": power}, host)
        assert reward.shape(score, mask).tolist() == [expected], power


def test_values_at_each_tap_are_spread_over_the_tokens(world):
    host = host_of(world)
    rows, _ = host.solutions(world.path("expert.jsonl"), 45)
    parts = list(host.run_policy(rows, (0.5, 1.0)))
    mask = parts[0].batch.response_mask
    values = torch.arange(2.0 * mask.sum()).view(2, -1)
    spread = parts[0].per_tap(values)
    assert spread.shape == (2, *mask.shape)
    assert spread[1][mask].tolist() == values[1].tolist() and not spread[:, ~mask].any()
    assert torch.equal(spread[0], parts[0].per_token(values[0]))
    before = dense.all_latents(parts, 1.0, back=1)
    assert len(before) == sum(len(row.response_ids) for row in rows)
    assert torch.equal(before, torch.cat([part.latents(1.0, back=1) for part in parts]))


def test_settings_of_earlier_versions_have_todays_names():
    old = {
        "shaping": "flow", "flow_coef": 1.0, "flow_on": "response", "flow_centre": False,
        "flow_after": 3, "flow_cap": 2.0, "flow_scope": "expert",
    }  # fmt: skip
    assert upgraded(old, "run") == {
        "shaping": "flow", "dense_coef": 0.5, "dense_on": "response", "dense_centre": False,
        "dense_after": 3, "dense_clamp": [-2.0, 0.0], "flow_scope": "expert",
    }  # fmt: skip
    assert upgraded({**old, "flow_scope": "response"}, "run")["dense_coef"] == 1.0
    del old["flow_cap"]  # it was 10 by default
    assert upgraded(old, "run")["dense_coef"] == 0.1
    for gone in (
        {"lora_rank": 4, "lora_alpha": 4.0},
        {"reward": ["overlong"], "overlong_buffer": 7},
    ):
        with pytest.raises(
            ValueError, match="run has (lora_alpha=4.0|overlong_buffer=7), where all"
        ):
            upgraded({"max_tokens": 100, **gone}, "run")
    kept = {
        "reward": ["overlong=0.5"],
        "overlong_buffer": 20,
        "max_tokens": 100,
        "cpu_offload": True,
    }
    assert upgraded(kept, "run") == {
        "reward": ["overlong=0.5"], "max_tokens": 100, "offload": "always",
    }  # fmt: skip


# ---- Shuffled
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_of_the_scores_changes_places(share):
    path = str(FOLDER / "shuffled.py")
    shuffled = import_file(path)
    mask = torch.arange(40) < torch.tensor([40, 25, 30, 38])[:, None]
    score = torch.arange(160.0).view(4, 40) * mask

    def shuffle(among):
        settings = shuffled.Settings(of="flow", among=among, share=share)
        return shuffled.shuffle_rewards(score, mask, settings, 2, ("a key", 0))

    among_tokens = shuffle("tokens")
    for row in range(4):
        assert sorted(among_tokens[row, mask[row]]) == sorted(score[row, mask[row]])
        moved = (among_tokens[row] != score[row]).float().sum() / mask[row].sum()
        assert share * 0.7 <= moved <= share
    means = rlfr.mean_over_tokens(score, mask).tolist()
    among_responses = rlfr.mean_over_tokens(shuffle("responses"), mask).tolist()
    for group in (slice(0, 2), slice(2, 4)):
        assert sorted(among_responses[group]) == pytest.approx(sorted(means[group]))
    if share < 1:  # of two, one alone stays where it is
        assert among_responses == pytest.approx(means)


# ---- What is shown
def test_records_and_pages_name_the_reward(runs):
    folder = Path(runs["ridge"].folder)
    (record, *_) = read_lines(folder / "rollouts" / "step-1.jsonl")
    assert record["dense"] == "ridge" and record["taps"] == [1, 2, 2]
    assert len(record["dense_score"]) == 3 and any(record["dense_reward"])
    assert "Dense reward: ridge" in (folder / "report.html").read_text()
    data = (folder / "rollouts.html").read_text()
    assert re.search(r'"dense": ?"ridge", ?"taps": ?\[1, ?2, ?2\]', data)
    (record, *_) = read_lines(Path(runs["noise"].folder) / "rollouts" / "step-1.jsonl")
    assert record["taps"] == [] and len(record["dense_score"]) == 1


def test_counts_of_groups_of_tokens(world):
    """Against counting in Python, for pairs and for groups of four."""
    rows = read_lines(world.path("expert.jsonl"))
    host = host_of(world)
    fitted, _ = host.solutions(world.path("expert.jsonl"), 16)
    assert len(fitted) == len(rows) - 16
    texts = [[*row.prompt_ids, *row.response_ids] for row in fitted]
    for n in (2, 4):
        own = {"experts": world.path("expert.jsonl"), "held_out": "16", "n": str(n)}
        reward = dense.make(str(FOLDER / "ngram.py"), own, host)
        counts = Counter()
        for row, ids in zip(fitted, texts, strict=True):
            for end in range(len(row.prompt_ids), len(ids)):
                counts[tuple(ids[end - n + 1 : end + 1])] += 1
                counts[tuple(ids[end - n + 1 : end])] += 1
        (part, *_) = host.run_policy(fitted[:1], ())
        ids, start = texts[0], len(fitted[0].prompt_ids)
        expected = []
        for end in range(start, len(ids)):
            group, before = tuple(ids[end - n + 1 : end + 1]), tuple(ids[end - n + 1 : end])
            of_before = counts[before] + 0.1 * len(host.model.tokenizer)
            expected.append(-math.log((counts[group] + 0.1) / of_before))
        assert reward.surprise(part).tolist() == pytest.approx(expected, abs=1e-5), n
