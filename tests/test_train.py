"""The training scripts, end to end on the small world."""

import json
import math
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import forks
import pytest
import torch
from conftest import (
    BY_LENGTH,
    ROOT,
    SOME_GROUPS,
    figures,
    files_of_at_most,
    flags,
    last_state,
    problems_in,
    read_lines,
    save_flow,
    small_run,
    tiny_model,
    torch_engine,
)
from transformers import AutoTokenizer

import flow as fl
import rlfr
import rollout
import train_flow
import train_rl
from evals import sets
from evals.figures import summarise
from infra import parallel, runs
from infra.data import make_prompts
from infra.settings import change, parse_config, stored_settings
from policy import Policy, load_policy
from rewards import Grader
from run import export_checkpoint
from worlds import toy
from worlds.shared import locked


@pytest.fixture
def config(world, flow_folder, tmp_path) -> train_rl.Config:
    """Three small steps."""
    settings = {"steps": 3, "save_every": 1, "flow_soft": 1.0, "tokens_per_gpu": 300}
    return small_run(world, flow_folder, tmp_path / "run", grade_truncated=True, **settings)


@pytest.fixture
def flow_config(world, tmp_path) -> train_flow.Config:
    return change(train_flow.Config(), model=world.path("model"), data=world.path("expert.jsonl"), template="none", batch_size=16, lr=1e-3, epochs=2,
        flow_blocks=2, noise_repeats=2, max_prompt_tokens=64, save_every=2, folder=str(tmp_path / "flow-run"),
    )  # fmt: skip


def same_state(a: dict, b: dict) -> bool:
    pairs = [(a[key], b.get(key, "missing")) for key in a]
    return a.keys() == b.keys() and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs
    )


# ---- Offline start


def test_offline_start_learns_and_stops_at_the_last_tap(flow_config, monkeypatch):
    asked, forward = [], Policy.forward
    monkeypatch.setattr(
        Policy,
        "forward",
        lambda *a, **k: (asked.append(k["latents_only"]), forward(*a, **k))[1],
    )
    train_flow.main(change(flow_config, epochs=8))
    lines = read_lines(Path(flow_config.folder) / "metrics.jsonl")
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"] and all(asked)
    flow = fl.load_flow(Path(flow_config.folder) / "flow", 32, n_blocks=2, contexts=("previous",))
    assert flow.config.percentiles == (0.25, 0.5, 0.75)


def test_offline_loss_does_not_depend_on_micro_batches(flow_config):
    for name, budget in (("a", 100_000), ("b", 200)):
        train_flow.main(
            change(flow_config, folder=flow_config.folder + name, tokens_per_gpu=budget)
        )
    a, b = (figures(flow_config.folder + name) for name in "ab")
    for one, other in zip(a, b, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-6) and one["rows"] == other["rows"]
    assert a[0]["loss"] == pytest.approx(b[0]["loss"], rel=1e-5)


def test_offline_start_and_training_share_the_prompts(flow_config, config, world, monkeypatch):
    """Regression: the official templates differ between the two."""
    made = []
    for user in ("infra.data", "infra.solutions"):
        monkeypatch.setattr(
            f"{user}.make_prompts", lambda *a: made.append(make_prompts(*a)) or made[-1]
        )
    template = {"template": "auto", "max_prompt_tokens": 300}
    train_flow.main(change(flow_config, epochs=1, **template))
    train_rl.main(change(config, data=world.path("expert.jsonl"), steps=1, **template))
    assert made[0] == made[1] and len(made[0][0]) > 80, (
        "the family's template, not the bare problem"
    )


# ---- D. One RL step


def test_a_step_moves_the_whole_flow_and_the_policy_gets_no_gradient_from_it(config, flow_folder):
    gradients, update = [], train_rl.update_policy

    def spy(models, *arguments, **options):
        # between the scoring pass, which runs the flow's backward, and the policy's own
        gradients.append([p.grad for p in models.policy.parameters()])
        return update(models, *arguments, **options)

    train_rl.main(change(config, steps=1), update=spy)
    assert len(gradients) == 1 and all(g is None for g in gradients[0])
    before, after = (fl.load_flow(path, 32) for path in (flow_folder, Path(config.folder) / "flow"))
    for name, parameter in before.named_parameters():
        assert not torch.equal(parameter, after.get_parameter(name)), f"{name} did not move"
    base, policy = (
        load_policy(path) for path in (config.model, str(Path(config.folder) / "policy"))
    )
    assert any(
        not torch.equal(a, b) for a, b in zip(base.parameters(), policy.parameters(), strict=True)
    )


def test_a_frozen_flow_stays(config, flow_folder):
    train_rl.main(change(config, steps=2, flow_lr=0.0))
    before, after = (
        fl.load_flow(path, 32).state_dict() for path in (flow_folder, Path(config.folder) / "flow")
    )
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (
        "flow/loss" not in figures(config.folder)[0] and "flow/score" in figures(config.folder)[0]
    )


def test_a_family_whose_rows_cannot_be_packed_is_trained(config, world, tmp_path, capsys):
    """Convolutions: trainer and sampler agree to rounding, in float32, also after an update."""
    changes = {"vocab_size": 300, "pad_token_id": None, "eos_token_id": None}
    model = tiny_model("lfm2", **changes)
    model.save_pretrained(tmp_path / "lfm2")
    AutoTokenizer.from_pretrained(world.path("model")).save_pretrained(tmp_path / "lfm2")
    train_rl.main(change(config, model=str(tmp_path / "lfm2"), steps=2, **BY_LENGTH))
    assert "lfm2: rows are padded" in capsys.readouterr().out
    lines = figures(config.folder)
    assert [line["mismatch/ratio_max"] for line in lines] == [pytest.approx(1, abs=1e-3)] * 2
    trained = load_policy(f"{config.folder}/policy").model
    change_of = [
        (new - old).abs().max().item()
        for new, old in zip(trained.parameters(), model.parameters(), strict=True)
    ]
    assert min(change_of) > 0, "a weight has learnt nothing"


@pytest.mark.parametrize("n_layers", [1, 10**6])
def test_activations_that_are_computed_again_change_nothing(config, train_once, n_layers):
    train_rl.main(change(config, recompute_layers=n_layers))
    for off, on in zip(figures(train_once(config)), figures(config.folder), strict=True):
        assert off == pytest.approx(on, rel=1e-4, abs=1e-6)


def test_micro_batches_change_nothing(config):
    """Figures and gradients do not depend on how a step's episodes are batched (one denominator)."""
    for name, budget in (("a", 100_000), ("b", 60)):
        train_rl.main(
            change(
                config,
                folder=config.folder + name,
                tokens_per_gpu=budget,
                steps=1,
                flow_entropy_quantile=0.5,
            )
        )
    a, b = (figures(config.folder + name)[0] for name in "ab")
    assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    states = [last_state(config.folder + name) for name in "ab"]
    for key, value in states[0].items():
        if "['module']" in key:
            torch.testing.assert_close(value, states[1][key], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("train_batch", "loss"), [(8, "ppo"), (16, "ppo"), (8, "gspo"), (8, "cispo")]
)
def test_episodes_without_a_gradient_are_not_trained_on(config, monkeypatch, train_batch, loss):
    """Groups of equal rewards are left out of the update: figures and weights are the same."""
    settings = {"train_batch": train_batch, "loss": loss, "mismatch": "token", "steps": 2}
    config = change(config, shaping="none", **SOME_GROUPS, **settings)
    n_trained = []
    forward = Policy.forward

    def count(policy, batch, *arguments, **options):
        if torch.is_grad_enabled():
            n_trained.append(len(batch.targets))
        return forward(policy, batch, *arguments, **options)

    monkeypatch.setattr(Policy, "forward", count)
    train_rl.main(change(config, folder=config.folder + "-some"))
    n_some = sum(n_trained)
    n_trained.clear()
    monkeypatch.setattr(
        "infra.batching.rows_to_run", lambda rows, *_: torch.ones(len(rows), dtype=torch.bool)
    )
    train_rl.main(change(config, folder=config.folder + "-all"))
    assert 0 < n_some < 0.8 * sum(n_trained)
    for a, b in zip(figures(config.folder + "-some"), figures(config.folder + "-all"), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    some, everything = (last_state(config.folder + name) for name in ("-some", "-all"))
    for name, value in some.items():
        if "['module']" in name and "k_proj.bias" not in name:
            assert (value - everything[name]).norm() <= 1e-5 * value.norm(), name


def test_an_entropy_bonus_reaches_groups_of_equal_rewards(config, tmp_path):
    """The policy-gradient loss has no gradient there; the bonus has, and makes the entropy larger."""
    reward = tmp_path / "reward.py"
    reward.write_text("def reward(problem, response):\n    return 1.0\n")
    settings = {"reward": (str(reward),), "shaping": "none", "normalisation": "token"}
    config = change(config, **settings, train_batch=16, save_every=0)
    base = load_policy(config.model)
    lines, has_moved = {}, {}
    for coef in (0.0, 0.1):
        folder = f"{config.folder}-{coef}"
        train_rl.main(change(config, folder=folder, entropy_coef=coef))
        lines[coef] = figures(folder)
        trained = load_policy(f"{folder}/policy")
        pairs = zip(base.parameters(), trained.parameters(), strict=True)
        has_moved[coef] = any(not torch.equal(a, b) for a, b in pairs)
    assert [line["policy/grad_norm"] for line in lines[0.0]] == [0.0] * 3
    assert has_moved == {0.0: False, 0.1: True}
    for line in lines[0.1]:
        assert line["varied_groups"] == 0 and line["policy/grad_norm"] > 0
        assert line["policy/token_entropy"] == pytest.approx(line["entropy"], rel=1e-4)
        assert line["policy/loss"] == pytest.approx(-0.1 * line["entropy"], rel=1e-4)
    assert lines[0.1][-1]["entropy"] > lines[0.0][-1]["entropy"]


THREADS = """
from pathlib import Path
import torch
import train_rl
from infra import parallel
from worlds import toy
from infra.settings import parse_config

def of_gloo():
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    return sum(name.startswith("pt_gloo") for name in names)

def update(*arguments, **options):
    counts.append(of_gloo())
    return train_rl.update_policy(*arguments, **options)

counts = []
torch.set_num_threads(2)
train_rl.main(parse_config(train_rl.Config, toy.PRESETS["train_rl"]), update=update)
counts.append(of_gloo())
parallel.gather_objects(bytes(10**6))
counts.append(of_gloo())
print("threads of gloo:", *counts, flush=True)
"""


@pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="threads are listed on Linux alone"
)
def test_gloo_starts_no_threads_of_openmp_in_a_single_process(config):
    """Regression: more threads than cores, and small operations took twice as long."""
    command = [sys.executable, "-c", THREADS, *flags(config)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    output = subprocess.run(command, capture_output=True, text=True, env=environment).stdout
    *in_steps, before, after = map(int, output.rpartition("threads of gloo:")[2].split())
    assert len(in_steps) == 3 and len(set(in_steps)) == 1, "a checkpoint started threads"
    assert before == after, "gathering started threads"


# ---- Options: each does something, and runs

OPTIONS = [  # what both runs have, what one has besides
    ({}, {"baseline": "rloo"}),
    ({}, {"baseline": "dr_grpo", "normalisation": "constant"}),
    ({}, {"baseline": "reinforce++"}),
    ({}, {"baseline": "reinforce"}),
    ({}, {"normalisation": "token"}),
    ({"train_batch": 4, "lr": 3e-2}, {"clip": (0.2, 0.28)}),
    ({"train_batch": 4, "lr": 3e-2}, {"clip": (0.5, 0.2)}),
    ({}, {"entropy_coef": 0.1}),
    ({}, {"kl_coef": 0.1, "kl_kind": "k1"}),
    ({"kl_coef": 0.1}, {"kl_kind": "k2"}),
    ({"kl_coef": 0.1}, {"kl_kind": "k1"}),
    ({"kl_coef": 1.0}, {"kl_in": "reward"}),
    ({}, {"gamma": 0.5}),
    ({}, {"dense_coef": 1.0}),
    ({}, {"reward_times": (0.5, 0.8)}),
    ({}, {"flow_threshold": 0.0}),
    ({}, {"flow_top_k": 1}),
    ({}, {"flow_bilateral": True}),
    ({}, {"flow_scope": "group"}),
    ({}, {"dense_after": 1}),
    ({}, {"shaping": "entropy"}),
    ({}, {"shaping": "none"}),
    ({}, {"mismatch": "mask", "mismatch_cap": 0.5}),
    ({}, {"mismatch": "sequence"}),
    ({}, {"temperature": 0.7}),
    ({}, {"seed": 1}),
]


@pytest.mark.parametrize(
    ("both", "options"),
    OPTIONS,
    ids=lambda options: " ".join(f"{k}={v}" for k, v in options.items()),
)
def test_every_option_changes_the_policy(config, train_once, both, options):
    """With rewards that differ inside groups, as the lengths do."""
    reward = str(ROOT / "tests" / "length_reward.py")
    config = change(config, reward=(reward,), steps=2, save_every=0, **both)
    without = train_once(config)
    train_rl.main(change(config, **options))
    policies = [load_policy(f"{folder}/policy") for folder in (without, config.folder)]
    assert any(
        not torch.equal(a, b) for a, b in zip(*(p.parameters() for p in policies), strict=True)
    )


@pytest.mark.parametrize(
    "options",
    [
        {"flow_soft": 0.0},
        {"flow_soft": 0.5, "flow_entropy_quantile": 0.8},
        {"flow_times": "random"},
        {"flow_times": "uniform"},
        {"flow_lr": 1e-4},
    ],
)
def test_every_option_changes_the_flow(config, train_once, options):
    config = change(config, steps=1)
    folders = (train_once(config), config.folder)
    train_rl.main(change(config, **options))
    flows = [fl.load_flow(f"{folder}/flow", 32) for folder in folders]
    assert any(not torch.equal(a, b) for a, b in zip(*(f.parameters() for f in flows), strict=True))
    first, second = (figures(folder)[0] for folder in folders)
    assert first["flow/score"] == second["flow/score"], (
        "scored with the flow before this step's update"
    )


def test_several_contexts_and_taps_of_the_flow(config, tmp_path):
    torch.manual_seed(0)
    flow = fl.Flow(
        fl.FlowConfig(
            dim=32, n_blocks=1, contexts=("next", "self"), percentiles=(0.1, 0.9), shift=2
        )
    )
    save_flow(flow, tmp_path / "other")
    train_rl.main(change(config, flow=str(tmp_path / "other"), contexts=("next", "self"), steps=1))
    assert figures(config.folder)[0]["flow/score"] > 0


def test_the_official_pair_of_contexts(config, tmp_path):
    """Fitted with the next token, scored with the previous one: on request alone."""
    flow = fl.Flow(fl.FlowConfig(dim=32, n_blocks=1, contexts=("next",)))
    torch.nn.init.normal_(flow.model.final_layer.linear.weight)
    for name, contexts in {"next": ("next",), "previous": ("previous",)}.items():
        fl_config = replace(flow.config, contexts=contexts)
        (tmp_path / name).mkdir()
        fl.save_flow(fl_config, flow.state_dict(), tmp_path / name)
    settings = {"contexts": ("previous",), "steps": 1}
    official = change(config, flow=str(tmp_path / "next"), **settings)
    train_rl.main(change(official, folder=str(tmp_path / "a")))
    train_rl.main(change(config, flow=str(tmp_path / "previous"), folder=str(tmp_path / "b")))
    first, second = (figures(tmp_path / name)[0] for name in "ab")
    assert first["flow/score"] == second["flow/score"]
    assert fl.load_flow(tmp_path / "a" / "flow", 32).config.contexts == ("previous",)


def test_a_mini_batch_has_whole_groups(config, monkeypatch):
    prompts = []
    cut = train_rl.my_micro_batches

    def spy(episodes, token_budget, phase):
        if phase == "update":
            prompts.append([tuple(episode.prompt_ids) for episode in episodes])
        return cut(episodes, token_budget, phase)

    monkeypatch.setattr(train_rl, "my_micro_batches", spy)
    train_rl.main(change(config, steps=1))
    group_size = config.sampling.group_size
    assert len(prompts) == 2
    for of_mini_batch in prompts:
        for start in range(0, len(of_mini_batch), group_size):
            assert len(set(of_mini_batch[start : start + group_size])) == 1


def test_an_untrained_flow_learns_before_its_reward_counts(config):
    train_rl.main(change(config, flow="new", dense_after=2, steps=3))
    lines = figures(config.folder)
    assert [line["flow/tokens"] > 0 for line in lines] == [False, False, True]
    assert all(line["flow/grad_norm"] > 0 for line in lines)
    assert lines[0]["flow/loss"] > lines[2]["flow/loss"]
    trained = fl.load_flow(Path(config.folder) / "flow", 32)
    assert trained.config == fl.FlowConfig(32), "4 blocks, previous, three taps"


def test_dynamic_sampling_drops_groups_of_equal_reward(config, tmp_path):
    file = tmp_path / "reward.py"  # half of the problems always give 0
    file.write_text(
        "def reward(problem, response):\n    return float(int(problem[0]) % 2 and len(response) % 3)\n"
    )
    config = change(config, reward=(str(file),), steps=1)
    train_rl.main(change(config, folder=config.folder + "-a"))
    train_rl.main(change(config, folder=config.folder + "-b", dynamic_sampling=8))
    without, with_it = (figures(f"{config.folder}-{name}")[0] for name in "ab")
    assert without["varied_groups"] < 1 and without["cursor"] == 4
    assert with_it["varied_groups"] == 1 and with_it["cursor"] > 4


def test_shapings_differ_in_the_advantage_alone(config):
    """G. The same first-step episodes and figures, apart from the advantage and what follows from it."""
    config, first = change(config, reward=(str(ROOT / "tests" / "length_reward.py"),)), {}
    for shaping in ("none", "entropy", "flow"):
        train_rl.main(
            change(config, folder=config.folder + shaping, shaping=shaping, steps=1, train_batch=16)
        )
        first[shaping] = figures(config.folder + shaping)[0]
    depends = {"advantage_abs", "policy/loss", "policy/grad_norm", "entropy_advantage"}
    for shaping, line in first.items():
        kept = {k: v for k, v in line.items() if k not in depends and not k.startswith("flow/")}
        assert kept == {k: v for k, v in first["none"].items() if k not in depends}, shaping
    assert len({line["advantage_abs"] for line in first.values()}) == 3


# ---- F. Repeating and resuming


def test_one_seed_gives_one_run(config, train_once):
    first = train_once(config)
    train_rl.main(config)
    assert figures(first) == figures(config.folder) and len(figures(first)) == 3
    assert same_state(last_state(first), last_state(config.folder))


def launch(script: str, arguments: list[str], point: str = "never", count: int = 1) -> int:
    """Run a script in a process that dies when it comes to a point for so many times; return its code."""
    command = [point, str(count), str(ROOT / script), *arguments]
    return forks.Run("tests/dying.py", command).wait()


KILLS = [  # where a run dies, and at which time it gets there
    ("update", 2),
    ("update", 8),
    ("half a checkpoint", 2),
    ("before the rename", 2),
    ("between log and checkpoint", 1),
]


@pytest.fixture(scope="module")
def never_killed(world, flow_folder, tmp_path_factory):
    """One RL run that nobody kills."""
    folder = tmp_path_factory.mktemp("never") / "run"
    settings = {"max_tokens": 12, "steps": 5, "save_every": 2, "flow_soft": 1.0}
    config = small_run(world, flow_folder, folder, **settings)
    train_rl.main(config)
    return config


@pytest.fixture(scope="module")
def killed(never_killed, tmp_path_factory) -> dict[tuple[str, int], train_rl.Config]:
    """Runs from the command line, two at a time, each killed at a point of its own."""
    parent = tmp_path_factory.mktemp("killed")
    configs = {
        (point, count): change(never_killed, folder=str(parent / f"{point}-{count}"))
        for point, count in KILLS
    }
    with ThreadPoolExecutor(2) as pool:
        done = pool.map(lambda kill: launch("train_rl.py", flags(configs[kill]), *kill), KILLS)
        assert list(done) == [-signal.SIGKILL] * len(KILLS)
    return configs


@pytest.mark.parametrize(("point", "count"), KILLS)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(never_killed, killed, point, count):
    config = killed[point, count]
    metrics = Path(config.folder, "metrics.jsonl")
    assert not metrics.exists() or len(figures(config.folder)) < 5
    train_rl.main(change(config, resume=config.folder))
    assert figures(config.folder) == figures(never_killed.folder)
    assert same_state(last_state(config.folder), last_state(never_killed.folder))
    assert not list(Path(config.folder).rglob("*.writing"))


def test_a_killed_offline_start_goes_on(flow_config):
    train_flow.main(change(flow_config, folder=flow_config.folder + "-whole"))
    assert launch("train_flow.py", flags(flow_config), "update", 4) == -signal.SIGKILL
    assert launch("train_flow.py", ["--resume", flow_config.folder]) == 0
    assert figures(flow_config.folder) == figures(flow_config.folder + "-whole")
    assert same_state(last_state(flow_config.folder), last_state(flow_config.folder + "-whole"))


def test_memory_of_the_phases(monkeypatch):
    """While the engine sleeps, torch still counts what it holds; a CPU has no such figures."""
    clock = runs.Stopwatch()
    clock.peaks = {"score": 9 * 10**9, "update": 12 * 10**9, "roll_out": 30 * 10**9}
    clock.used_in_roll_out = 40 * 10**9

    def memory() -> dict[str, float]:
        metrics = clock.metrics(held_by_engine=5 * 10**9)
        return {name: value for name, value in metrics.items() if name.startswith("memory/")}

    assert memory() == {}
    monkeypatch.setattr(parallel, "DEVICE", torch.device("cuda", 0))
    assert memory() == {
        "memory/roll_out_gb": 40.0,
        "memory/score_gb": 4.0,
        "memory/update_gb": 7.0,
    }


def test_full_disk_leaves_the_last_checkpoint(config, tmp_path):
    """The second save meets a limit on file size, which ends a write as a full disk does."""
    script = tmp_path / "limited.py"
    script.write_text(
        "import resource, runpy\n"
        "from infra import runs\n"
        "save = runs.Run.save\n"
        "def limited(self, state):\n"
        "    self.wait_for_save()\n"
        "    if state['progress']['step'] == 2: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))\n"
        "    save(self, state)\n"
        "runs.Run.save = limited\n"
        f"runpy.run_path({str(ROOT / 'train_rl.py')!r}, run_name='__main__')\n"
    )
    process = forks.Run(script, flags(config))
    output, _ = process.communicate()
    assert process.returncode == 1
    message = output.splitlines()[-1]
    assert (
        "could not write" in message
        and "step-2" in message
        and "MB free" in message
        and "--resume" in message
    )
    assert [p.name for p in (Path(config.folder) / "checkpoints").iterdir()] == ["step-1"]
    assert last_state(config.folder)["['progress']['step']"] == 1
    train_rl.main(change(config, resume=config.folder))
    assert [line["step"] for line in figures(config.folder)] == [1, 2, 3]


def test_a_loss_that_is_not_finite_stops_the_run(config):
    with pytest.raises(
        FloatingPointError,
        match=r"step 2: .*not finite; figures: .*Last checkpoint: .*step-2.*lower learning rate",
    ):
        train_rl.main(
            change(
                config,
                lr=1e6,
                train_batch=16,
                shaping="none",
                reward=(str(ROOT / "tests" / "length_reward.py"),),
            )
        )
    assert (Path(config.folder) / "checkpoints" / "step-1" / ".metadata").exists()
    known = [value for line in figures(config.folder) for value in line.values()]
    assert all(value is None or math.isfinite(value) for value in known)


def test_a_gradient_that_is_not_finite_ends_a_run_that_can_go_on(config, monkeypatch):
    """Also where a run keeps no checkpoints: the step has changed no weight of the policy."""
    config = change(config, save_every=0, train_batch=16, shaping="none", **BY_LENGTH)
    step = parallel.Learner.step
    norms = []

    def break_the_second(learner, *arguments):
        if len(norms) == 1:
            gradient = next(p.grad for p in learner.parameters if p.grad is not None)
            with torch.no_grad():
                gradient.fill_(torch.nan)
        norms.append(step(learner, *arguments))
        return norms[-1]

    with monkeypatch.context() as patched:
        patched.setattr(parallel.Learner, "step", break_the_second)
        with pytest.raises(FloatingPointError, match="step 2: policy/grad_norm not finite.*step-2"):
            train_rl.main(config)
    folder = Path(config.folder)
    assert math.isnan(norms[1]) and figures(folder)[1]["policy/grad_norm"] is None
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-2"]
    train_rl.main(change(config, resume=config.folder))
    assert [line["step"] for line in figures(folder)] == [1, 2, 3]
    assert figures(folder)[1]["policy/grad_norm"] is None
    assert all(value is not None for value in figures(folder)[2].values())
    assert (folder / "policy" / "model.safetensors").exists()


def test_a_figure_that_is_not_finite_is_null_and_the_run_goes_on(config, monkeypatch, capsys):
    """Planted in the second step; a resumed run keeps the line as it is."""
    measure = rlfr.mismatch_figures
    calls = []

    def break_the_second(*arguments, **options):
        calls.append(1)
        broken = {"mismatch/ratio_max": math.inf} if len(calls) == 2 else {}
        return measure(*arguments, **options) | broken

    monkeypatch.setattr(rlfr, "mismatch_figures", break_the_second)
    train_rl.main(config)
    assert "step 2: mismatch/ratio_max not finite" in capsys.readouterr().out
    folder = Path(config.folder)
    text = (folder / "metrics.jsonl").read_text()
    assert "Infinity" not in text and text.count("null") == 1
    ratios = [line["mismatch/ratio_max"] for line in figures(folder)]
    assert ratios == [pytest.approx(1), None, pytest.approx(1)]
    assert "mismatch/ratio_max" in (folder / "report.html").read_text()
    train_rl.main(change(config, resume=config.folder, steps=4))
    assert figures(folder)[1]["mismatch/ratio_max"] is None
    assert len(figures(folder)) == 4


# ---- What comes out


def test_the_policy_is_exported_for_hugging_face(config, world):
    train_rl.main(
        change(config, eval_data=(world.path("test.jsonl"),), eval_every=2, eval_samples=2)
    )
    folder = Path(config.folder)
    problems = problems_in(world.path("test.jsonl"))
    engine = torch_engine(folder / "policy")
    state = last_state(folder)
    assert all(
        torch.equal(t, state[f"['policy']['module']['model.{name}']"])
        for name, t in engine.model.state_dict().items()
    )
    summary = json.loads((folder / "summary.json").read_text())
    for when in ("before", "after"):
        for kind in ("sampled", "greedy"):
            interval = summary[when]["test"][kind]["avg"]
            assert 0 <= interval["low"] <= interval["mean"] <= interval["high"] <= 1
    with Grader(["binary"]) as grader:
        again = summarise(
            sets.sample(engine, "test", problems, grader, rollout.Sampling(2, 1.0, 16))
        )
    assert again == summary["after"]["test"]["sampled"]
    assert "eval/test/greedy" in read_lines(folder / "metrics.jsonl")[1]


def test_evaluating_changes_nothing(config, train_once, world):
    """Before the first step and after each, beside a run that never evaluates."""
    train_rl.main(change(config, eval_data=(world.path("test.jsonl"),), eval_every=1))
    lines = figures(config.folder)
    assert all("eval/test/sampled" in line for line in lines)
    without = [{k: v for k, v in line.items() if not k.startswith("eval/")} for line in lines]
    assert without == figures(train_once(config))


def test_tensorboard(config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_rl.main(change(config, steps=2, track="tensorboard"))
    events = EventAccumulator(str(Path(config.folder) / "tensorboard"))
    events.Reload()
    for name in ("reward", "policy/loss", "flow/score"):
        values = [event.value for event in events.Scalars(name)]
        assert values == pytest.approx([line[name] for line in figures(config.folder)]), name


def read_wandb(file: Path) -> list:
    """Read the records of an offline run: LevelDB's log format behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = file.read_bytes()
    position, records, parts = 7, [], b""
    while position + 7 <= len(data):
        room = 32768 - position % 32768
        if room < 7:  # the rest of a block is padding
            position += room
            continue
        length = int.from_bytes(data[position + 4 : position + 6], "little")
        kind = data[position + 6]  # 1 whole, 2 first, 3 middle, 4 last part of a record
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            records.append(Record.FromString(parts))
            parts = b""
    return records


def test_wandb(config):
    """Offline, in a process that ends as scripts do: every figure is in the file that is left."""
    arguments = flags(change(config, steps=2, track="wandb"))
    process = forks.Run("train_rl.py", arguments, WANDB_MODE="offline")
    output, _ = process.communicate()
    assert process.returncode == 0, output
    (file,) = Path(config.folder).glob("wandb/offline-run-*/*.wandb")
    logged = []
    finished = False
    for record in read_wandb(file):
        finished = finished or record.HasField("exit")
        if record.HasField("history"):
            items = record.history.item
            logged.append(
                {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}
            )
    assert finished, "the run was ended, not left"
    for line, row in zip(figures(config.folder), logged, strict=True):
        assert row["reward"] == line["reward"] and row["policy/loss"] == line["policy/loss"]
    assert all("rollouts" in row for row in logged), "of the first step, and of the last one"
    tables = Path(config.folder).glob("wandb/offline-run-*/files/media/table/rollouts_*.json")
    assert [len(json.loads(table.read_text())["data"]) for table in tables] == [16, 16]


# ---- H. Bad input: one clear error, before anything slow


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reward_times": (0.8, 1.0)}, "--reward-times=1.0: expected a number between 0 and 1"),
        ({"flow_top_k": 0}, "--flow-top-k=0: expected a whole number from 1"),
        ({"flow_top_k": -3}, "--flow-top-k=-3: expected a whole number from 1"),
        ({"flow_threshold": 1.5}, "--flow-threshold=1.5: expected a number from 0 to 1"),
        ({"flow_threshold": -0.1}, "--flow-threshold=-0.1: expected a number from 0 to 1"),
        ({"percentiles": (0.5, 2.0)}, "--percentiles=2.0: expected a number from 0 to 1"),
        ({"contexts": ("middle",)}, r"contexts=\('middle',\): expected one or more of previous, next, self"),
        ({"group_size": 1}, "group_size=1 with baseline 'grpo': use 2 or more, or --baseline reinforce"),
        ({"train_batch": 7}, r"4 \* 4 = 16 is not a multiple of train_batch=7; choose a divisor of it"),
        ({"steps": 0}, "--steps=0: expected a whole number from 1"),
        ({"steps": None, "epochs": 1, "prompts": 100}, "64 problems in 1 epochs do not fill a step of 100; lower --prompts"),
        ({"max_tokens": 9000}, "9000 is more than the model's 8192 positions; lower one of them"),
        ({"data": None}, "no data at 'JingHaoZ/RLFR-Dataset-LM/math-lvl3to5-8k'"),
        ({"data": "nowhere.jsonl"}, r"no data at 'nowhere.jsonl' \(no such file\)"),
        ({"model": "Qwen0-1B"}, "model 'Qwen0-1B': 'Qwen/Qwen0-1B' cannot be loaded"),
        ({"flow": "nowhere"}, "no flow at nowhere; .*train_flow.py"),
        ({"contexts": ("self",), "flow_scope": "expert"}, r"calibrated at the times \(\), not at \[0.8\]"),
        ({"percentiles": (0.5,)}, r"percentiles=\(0.25, 0.5, 0.75\).*expected percentiles=\(0.5,\)"),
        ({"answer_column": "gold"}, "no column 'gold'"),
        ({"max_prompt_tokens": 3}, "64 of 64 prompts are longer than 3 tokens"),
        ({"track": "no_such_tracker"}, "track='no_such_tracker' is not installed; run `pip install no_such_tracker`"),
        ({"reward": ("bleu",)}, "reward 'bleu': neither binary, official, vlm, format, tags, overlong nor a Python file"),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)  # fmt: skip
def test_bad_settings(config, options, words, monkeypatch):
    def slow(*_, **__):
        raise AssertionError("a model was loaded before the error")

    monkeypatch.setattr(train_rl, "make_policy", slow)
    with pytest.raises(ValueError, match=words):
        train_rl.main(change(config, **options))
    assert not Path(config.folder).exists(), "a run that cannot start leaves nothing behind"


def test_flow_of_another_width(config, tmp_path):
    save_flow(fl.Flow(fl.FlowConfig(dim=16)), tmp_path / "narrow")
    with pytest.raises(ValueError, match=r"dim=16 \(input \(16, 16\), 4 blocks.*expected dim=32"):
        train_rl.main(change(config, flow=str(tmp_path / "narrow")))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"data": None}, "no data at 'JingHaoZ/RLFR-Dataset-LM/openr1_math_default'"),
        ({"cutoff": 64}, "cutoff 64 leaves no room"),
        ({"percentiles": (1.2,)}, "--percentiles=1.2: expected a number from 0 to 1"),
        ({"contexts": ("before",)}, "contexts=.*expected one or more of"),
        ({"solution_column": "proof"}, "no column 'proof'"),
        ({"batch_size": 0}, "--batch-size=0: expected a whole number from 1"),
    ],
)
def test_bad_settings_of_the_offline_start(flow_config, options, words):
    with pytest.raises(ValueError, match=words):
        train_flow.main(change(flow_config, **options))
    assert not Path(flow_config.folder).exists()


def test_resume_checks_the_settings(config):
    with pytest.raises(ValueError, match="has no config.json; expected the folder of a run"):
        train_rl.main(change(config, resume="nowhere"))
    train_rl.main(change(config, steps=1))
    with pytest.raises(ValueError, match="holds a run; go on with --resume"):
        train_rl.main(config)
    unsaved = change(config, steps=1, save_every=0, folder=f"{config.folder}-unsaved")
    train_rl.main(unsaved)
    with pytest.raises(ValueError, match="holds a run; it has no checkpoint to go on from: remove"):
        train_rl.main(unsaved)
    for options, reason in [
        ({"seed": 1}, "seed=0, this one asks for 1; order, sampling and noise follow from it"),
        ({"shaping": "none"}, "the checkpoint holds other weights and optimisers than that needs"),
        ({"data": "other.jsonl"}, "the checkpoint's place in the data would mean other problems"),
        ({"flow_lr": 0.0}, "the checkpoint holds other weights and optimisers"),
    ]:
        with pytest.raises(ValueError, match=reason):
            train_rl.main(change(config, steps=1, resume=config.folder, **options))


def test_resuming_with_more_steps_and_other_settings(config, world, capsys):
    """With one checkpoint kept, as in the embedded worlds."""
    config = change(config, keep=1)
    train_rl.main(change(config, steps=1))
    more = {"steps": 3, "lr": 1e-4, "tokens_per_gpu": 50, "eval_data": (world.path("test.jsonl"),)}
    train_rl.main(change(config, resume=config.folder, **more))
    said = capsys.readouterr().out
    assert "resumed with steps=3, which was 1 until here" in said
    assert "resumed with lr=0.0001, which was 0.001 until here" in said
    assert [line["step"] for line in figures(config.folder)] == [1, 2, 3]
    assert [path.name for path in (Path(config.folder) / "checkpoints").iterdir()] == ["step-3"]
    summary = json.loads((Path(config.folder) / "summary.json").read_text())
    assert "test" in summary["before"] and "test" in summary["after"]
    assert stored_settings(config.folder)["lr"] == 1e-4, "the next resume goes on from these"
    old = json.loads((Path(config.folder) / "config-until-step-1.json").read_text())
    assert old["lr"] == 1e-3 and old["steps"] == 1


def test_the_newest_flow_of_a_model_is_taken(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert fl.newest_flow("runs/flow-m") == "runs/flow-m/flow"
    for age, name in enumerate(["flow-m-2", "flow-m", "flow-m-2x", "flow-m-3"]):
        folder = tmp_path / "runs" / name / "flow"
        if name != "flow-m-3":  # whose offline start has not ended
            save_flow(fl.Flow(fl.FlowConfig(dim=16)), folder)
            os.utime(folder / fl.FLOW_FILE, (1e9 + age * 86400,) * 2)
    assert fl.newest_flow("runs/flow-m") == "runs/flow-m/flow"
    assert "taking the newest one, runs/flow-m/flow, written 2001-09-10" in capsys.readouterr().out
    os.utime(tmp_path / "runs" / "flow-m-2" / "flow" / fl.FLOW_FILE, (2e9, 2e9))
    assert fl.newest_flow("runs/flow-m") == "runs/flow-m-2/flow"


def test_weights_of_a_checkpoint_are_exported(config, tmp_path):
    """As they are at the end, in between, and afterwards from any checkpoint."""
    train_rl.main(change(config, steps=2, export_every=1))
    folder = Path(config.folder)
    outs = {step: tmp_path / f"again-{step}" for step in (1, 2)}
    command = ["export", config.folder, "--step", "1", "--out", str(outs[1])]
    process = forks.Run("run.py", command)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    export_checkpoint(config.folder, 2, str(outs[2]))
    for step, out in outs.items():
        for name in ("policy/model.safetensors", "flow/flow.safetensors"):
            in_between = folder / "exports" / f"step-{step}" / name
            assert (out / name).read_bytes() == in_between.read_bytes(), (step, name)
        AutoTokenizer.from_pretrained(str(out / "policy"))
    at_the_end = folder / "policy" / "model.safetensors"
    assert at_the_end.read_bytes() == (outs[2] / "policy" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"no checkpoint of step 7, only of \[1, 2\]"):
        export_checkpoint(config.folder, 7)
    with pytest.raises(ValueError, match="has no config.json"):
        export_checkpoint("nowhere")
    whole = at_the_end.read_bytes()
    with pytest.raises(ValueError, match="policy has files in it, which stay .*--overwrite"):
        export_checkpoint(config.folder, 1, config.folder)
    assert at_the_end.read_bytes() == whole
    refused = pytest.raises(OSError, match="could not write .*policy .*MB free there")
    with refused, files_of_at_most(8000):
        export_checkpoint(config.folder, 1, config.folder, overwrite=True)
    assert at_the_end.read_bytes() == whole and not list(folder.glob("*.writing"))
    export_checkpoint(config.folder, 1, config.folder, overwrite=True)
    assert at_the_end.read_bytes() == (outs[1] / "policy" / "model.safetensors").read_bytes()


def test_an_export_that_a_kill_cut_off_is_made_up(config):
    config = change(config, steps=1, shaping="none", export_every=1)
    train_rl.main(config)
    exports = Path(config.folder, "exports")
    (exports / "step-1").rename(exports / "step-1.writing")
    (exports / "step-1.writing" / "policy" / "config.json").unlink()
    train_rl.main(change(config, resume=config.folder))
    assert [path.name for path in exports.iterdir()] == ["step-1"]
    for file in Path(config.folder, "policy").iterdir():
        assert (exports / "step-1" / "policy" / file.name).read_bytes() == file.read_bytes()


def test_the_command_line(world, flow_folder, tmp_path, monkeypatch):
    def parse(*arguments):
        monkeypatch.setattr(sys, "argv", ["train_rl.py", *arguments])
        return parse_config(train_rl.Config, {"toy": toy.TRAIN_RL})

    assert parse() == change(train_rl.Config(), **toy.TRAIN_RL) and parse().lr == 1.5e-4
    assert (
        parse("--model", "Qwen2.5-7B").lr == 1e-6
        and parse("--model=Qwen2.5-7B").sampling.prompts == 128
    )
    assert parse("--reward-times", "0.5", "0.8").flow_reward.reward_times == (0.5, 0.8)
    assert parse("--flow-top-k", "None").flow_reward.flow_top_k is None
    stored = runs.Run(change(train_rl.Config(), lr=5e-5, folder=str(tmp_path / "r")), "x")
    stored.begin({})
    monkeypatch.setattr(sys, "argv", ["train_flow.py", "--resume", stored.config.folder])
    with pytest.raises(ValueError, match=r"another script or version \(answer_column, .* more\)"):
        parse_config(train_flow.Config, {})
    assert parse("--resume", stored.config.folder) == change(
        stored.config, resume=stored.config.folder
    )


def test_run_folders_are_never_taken_twice(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    folders = []
    for _ in range(3):
        run = runs.Run(train_rl.Config(), "rl-x")
        run.begin({})
        folders.append(str(run.folder))
    assert folders == ["runs/rl-x", "runs/rl-x-2", "runs/rl-x-3"]


def test_runs_that_make_a_world_at_once_wait_for_each_other(tmp_path):
    folder = tmp_path / "toy"
    command = ["--folder", str(folder)]
    size = (
        "--steps 2 --batch-size 4 --hidden-size 32 --n-layers 2 --n-train 8 --n-test 8 --n-expert 8"
    )
    with locked(tmp_path / "toy.lock"):  # as another run has it that makes the world
        process = forks.Run("worlds/__main__.py", [*command, *size.split()])
        assert f"another run works on {folder}; waiting for it" in process.stdout.readline()
        assert not folder.exists()
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0 and f"the embedded world is in {folder}" in output
    assert (folder / "world.json").exists() and not list(tmp_path.glob("*.writing*"))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", "vllm"])
def test_the_default_run_learns(tmp_path, engine):
    """`python train_rl.py`, with either engine: base 30 to 60 %, trained at least 90 %, sampled and greedy."""
    command = [sys.executable, str(ROOT / "train_rl.py"), "--engine", engine]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "runs" / "rl-toy-flow" / "summary.json").read_text())
    for kind in ("sampled", "greedy"):
        before, after = (summary[when]["test"][kind]["avg"]["mean"] for when in ("before", "after"))
        assert 0.3 <= before <= 0.6 and after >= 0.9


def test_a_training_takes_the_newest_flow(config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(["flow-model", "flow-model-2"]):
        folder = Path("runs") / name / "flow"
        save_flow(fl.Flow(fl.FlowConfig(dim=32)), folder)
        os.utime(folder / fl.FLOW_FILE, (1e9 + age * 86400,) * 2)
    resolved, _ = train_rl.resolve(change(config, flow=None))
    assert resolved.flow == "runs/flow-model-2/flow"
    assert (
        "taking the newest one, runs/flow-model-2/flow, written 2001-09-10"
        in capsys.readouterr().out
    )


# ---- The evaluation after the training
@pytest.mark.parametrize("failure", ["__import__('sys').exit()", "1 / 0"])
def test_an_evaluation_that_fails_after_training_loses_nothing(world, config, tmp_path, failure):
    """The reward ends the process once the policy is there: in the last evaluation."""
    file = tmp_path / "ends.py"
    policy = Path(config.folder) / "policy" / "config.json"
    body = f"{failure} if os.path.exists({str(policy)!r}) else len(response) % 3"
    file.write_text(f"import os\ndef reward(problem, response):\n    return {body}\n")
    settings = {"reward": (str(file),), "eval_data": (world.path("test.jsonl"),), "steps": 2}
    settings["save_every"] = 2
    with pytest.raises(ValueError, match="ends.py, line 3: .*on problem "):
        train_rl.main(change(config, **settings))
    folder = Path(config.folder)
    assert policy.exists() and (folder / "report.html").exists()
    assert list(json.loads((folder / "summary.json").read_text())) == ["before"]
    assert len(read_lines(folder / "metrics.jsonl")) == 2

    file.write_text("def reward(problem, response):\n    return len(response) % 3\n")
    train_rl.main(change(config, resume=str(folder), **settings))
    assert list(json.loads((folder / "summary.json").read_text())) == ["before", "after"]
    assert len(read_lines(folder / "metrics.jsonl")) == 2


def test_a_set_that_comes_with_resume_is_in_the_table(world, config, tmp_path, capsys):
    """Training went to its end, and then failed in the table."""
    train_rl.main(change(config, eval_data=(world.path("test.jsonl"),), save_every=1, steps=1))
    other = f"other={world.path('test.jsonl')}"
    train_rl.main(change(config, eval_data=(other,), save_every=1, steps=2, resume=config.folder))
    assert "other after, greedy" in capsys.readouterr().out
