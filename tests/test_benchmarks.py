"""Each benchmark runs in small and writes what it promises."""

# ruff: noqa: E402

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import forks
import pytest
import torch
from conftest import ROOT

FOLDER = ROOT / "benchmarks"
sys.path += [str(FOLDER), str(ROOT / "study" / "rewards")]
import boxed_reward
import busy
import gpu
import peers
import rl_step
import rollout
from infra import parallel, waiting

SMALL = {
    "logprob": ["--tokens", "64", "--dim", "16", "--vocabulary", "500"],
    "flow_start": ["--sequences=2", "--prompt=8", "--response=8", "--dim=32", "--layers=4", "--vocabulary=100"],
    "packing": ["--groups=2", "--prompt=4", "--longest=4", "--dim=16", "--layers=1", "--vocabulary=50"],
    "grading": ["{folder}/pairs.jsonl"],
}  # fmt: skip


# What has tests of its own, or is no benchmark by itself
OTHERS = {
    "busy",
    "common",
    "first_gpu",
    "gpu",
    "peer_trl",
    "peers",
    "recording",
    "rehearse",
    "repository",
    "rl_step",
    "smollm2",
    "walkthrough",
    "word_problems",
}


def test_every_benchmark_is_here():
    assert {path.stem for path in FOLDER.glob("*.py")} - OTHERS == set(SMALL)


@pytest.fixture
def small_gpu(tmp_path) -> gpu.Settings:
    """Settings of the benchmark for a GPU, small enough for any machine."""
    return gpu.Settings(
        shape="tiny",
        episodes=8,
        prompts=2,
        group_size=2,
        prompt_tokens=8,
        response_tokens=16,
        steps=2,
        engine="torch",
        tokens_per_gpu=64,
        compile=False,
        json=str(tmp_path / "gpu.json"),
    )


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory) -> dict[str, tuple[subprocess.CompletedProcess, Path]]:
    """All benchmarks: what each printed, and the file with its figures."""
    folder = tmp_path_factory.mktemp("benchmarks")
    (folder / "pairs.jsonl").write_text('{"gold": "1/2", "pred": "0.5", "expected": true}\n' * 3)
    done = {}
    for name, arguments in SMALL.items():
        file = folder / "new" / f"{name}.json"  # whose folder is made
        given = [argument.format(folder=folder) for argument in arguments]
        command = [sys.executable, str(FOLDER / f"{name}.py"), *given, "--repeats", "1"]
        done[name] = (forks.call([*command, "--json", str(file)]), file)
    return done


def test_whole_steps(small_gpu):
    """All phases are there. How much of the device is used depends on what else runs there."""
    figures = gpu.main(replace(small_gpu, part="steps"))
    assert figures["phases"].keys() == {"sync", "roll_out", "score", "verify", "update", "step"}
    assert all(figures["phases"][phase]["utilisation"] > 0 for phase in ("score", "update"))
    assert len(figures["lines"]) == 2


def test_a_figure_that_some_steps_lack():
    """Regression: a figure of the last step that another step lacked ended the benchmark."""
    lines = [{"time": 3.0}, {"time": 1.0, "flow/score_right": 0.5}]
    assert gpu.medians(lines) == {"time": 2.0, "flow/score_right": 0.5}


def test_variants_of_learning_agree(small_gpu):
    figures = gpu.main(replace(small_gpu, part="learn"))
    assert json.loads(Path(small_gpu.json).read_text()) == figures
    assert figures["variants"].keys() == gpu.VARIANTS.keys() - {"compiled"}
    base, *others = figures["variants"].values()
    assert base["gradient_norm"] > 0 and base["mean_flow_score"] > 0
    for other in others:
        for name in ("gradient_norm", "mean_logp", "mean_flow_score"):
            assert other[name] == pytest.approx(base[name], rel=1e-4)


def test_profile_and_offline_start(small_gpu, capsys):
    profile = gpu.main(replace(small_gpu, part="profile"))
    assert any("attention" in row["name"] for row in profile["attention"])
    offline = gpu.main(replace(small_gpu, part="offline"))
    assert offline["steps"][-1]["latents"] > 0 and "tokens/s" in capsys.readouterr().out


def test_operations_count_the_weights():
    """The matrices of the decoder, and its head, which is the embedding."""
    shape = gpu.SHAPES["tiny"]
    body, head = gpu.count_parameters(shape)
    model = gpu.make_model(shape, torch.device("cpu"))
    matrices = [p.numel() for p in model.parameters() if p.ndim == 2]
    assert body + head == sum(matrices)


def test_a_job_that_fails_is_reported_and_the_others_go_on(small_gpu, monkeypatch, tmp_path):
    jobs = {
        "late": gpu.Job("offline", "tiny", None, timeout=0.1),
        "good": gpu.Job("correct", "tiny", None, timeout=1200),
        "steps": gpu.Job("steps", "tiny", None, timeout=1200),
    }
    monkeypatch.setattr(gpu, "PLAN", jobs)
    monkeypatch.setattr(gpu, "subprocess", forks.SUBPROCESS)
    figures = gpu.main(replace(small_gpu, engine="none"))
    assert json.loads(Path(small_gpu.json).read_text()) == figures
    assert figures["jobs"].keys() == {"late", "good"}, "nothing samples with --engine none"
    assert figures["jobs"]["late"]["error"] == "not done after 0.1 s"
    assert "error" not in figures["jobs"]["good"]
    differences = figures["jobs"]["good"]["differences"]
    assert differences["float32"]["logp"]["max"] == 0 < differences["bfloat16"]["logp"]["max"]


@pytest.mark.parametrize("name", SMALL)
def test_benchmark(benchmarks, name):
    done, file = benchmarks[name]
    assert done.returncode == 0, done.stderr
    figures = json.loads(file.read_text())
    assert figures.keys() == {"machine", "settings", "rows", "ratio", "runs"}
    assert len(figures["rows"]) >= 2 and all(len(runs) == 1 for runs in figures["runs"].values())
    assert all(row["seconds"] > 0 for row in figures["rows"]) and all(
        v > 0 for k, v in figures["ratio"].items() if "seconds" in k
    )
    assert figures["machine"] in done.stdout


# ---- peers.py
def test_a_step_of_ours_and_of_trl(world, tmp_path, capsys):
    """Both train on the same prompts, with two optimiser steps a rollout."""
    settings = peers.Settings(
        model=world.path("model"),
        data=world.path("train.jsonl"),
        prompts=2,
        group_size=2,
        max_tokens=16,
        mini_batches=(2,),
        threads=1,
        steps=2,
        skip=1,
        rounds=1,
        json=str(tmp_path / "peers.json"),
    )
    figures = peers.main(settings)
    assert json.loads(Path(settings.json).read_text()) == json.loads(json.dumps(figures))
    ours, trl = figures["rows"]
    assert (ours["variant"], trl["variant"]) == ("ours", "TRL")
    for row in (ours, trl):
        assert row["seconds"] == row["all_seconds"][0][1] > 0
        assert row["cpu_seconds"] > 0
        assert len(row["reward_by_step"]) == 2
        assert all(0 <= reward <= 1 for reward in row["reward_by_step"])
        assert all(1 <= length <= 16 for length in row["length_by_step"])
    expected = ours["seconds"] / trl["seconds"]
    assert figures["ratio"]["ours, 2 mini-batches seconds"] == pytest.approx(expected)
    assert "reward of each step" in capsys.readouterr().out


def test_ratio_to_trl_by_hand():
    """Of the medians over all steps; the spread is that of the rounds."""
    ours = [
        peers.StepFigures([9.0, 1.0, 3.0], [0.0, 0.5, 1.0], [4.0, 5.0, 6.0], [8.0, 1.0, 3.0]),
        peers.StepFigures([9.0, 2.0, 4.0], [0.5, 0.5, 1.0], [4.0, 7.0, 6.0], [8.0, 3.0, 5.0]),
    ]
    row = peers.summarise("ours", 1, ours, skip=1)
    assert (row["seconds"], row["seconds_of_runs"], row["cpu_seconds"]) == (2.5, [2.0, 3.0], 3.0)
    assert row["reward_by_step"] == [0.25, 0.5, 1.0] and row["length"] == 6.0
    trl = {
        "seconds": 5.0,
        "seconds_of_runs": [4.0, 12.0],
        "cpu_seconds": 6.0,
        "cpu_seconds_of_runs": [8.0, 4.0],
    }
    assert peers.compare(row, trl) == {
        "seconds": 0.5,
        "seconds low": 0.25,
        "seconds high": 0.5,
        "cpu_seconds": 0.5,
        "cpu_seconds low": 0.25,
        "cpu_seconds high": 1.0,
    }


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("print('no memory'); raise SystemExit(3)", "code 3 after 0 of 2 steps:\nno memory"),
        ("import sys; open(sys.argv[1], 'w').write('{}\\n')", "code 0 after 1 of 2 steps"),
    ],
)
def test_a_trainer_that_fails_or_stops_early_is_an_error(code, message, tmp_path):
    figures = tmp_path / "figures.jsonl"
    command = [sys.executable, "-c", code, str(figures)]
    with pytest.raises(RuntimeError, match=message):
        peers.measure(command, figures, peers.Settings(steps=2))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"skip": 0}, "skip=0, steps=12: expected at least one step to skip"),
        ({"skip": 12}, "skip=12, steps=12"),
        ({"threads": 0}, "threads=0: expected 1 or more"),
        ({"mini_batches": (1, 3)}, "mini_batches=3: expected a divisor of 128 episodes"),
        ({"trl_micro_batch": 32}, "trl_micro_batch=32: expected a divisor of the 16 episodes"),
        ({"model": "runs/other"}, "without data: name its problems with --data"),
        ({"python": "/no/python"}, "expected an interpreter with TRL 1.16, found .*No such file"),
        ({"python": "/bin/false"}, "expected an interpreter with TRL 1.16, found ''"),
    ],
)
def test_work_that_peers_cannot_do(values, message):
    with pytest.raises(ValueError, match=message):
        peers.main(replace(peers.Settings(), **values))


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        (r"7+5=2. \boxed{2}", 1.0),
        (r"\boxed{2}", 1.0),
        (r"\boxed{3} \boxed{2}", 1.0),
        (r"\boxed{2} \boxed{3}", 0.0),
        (r"\boxed{12}", 0.0),
        ("2", 0.0),
        (r"\boxed{2", 0.0),
    ],
)
def test_the_last_box_holds_the_answer(response, reward):
    assert boxed_reward.reward("", response, "2") == reward


# ---- rl_step.py
SMALL_STEP = rl_step.Settings(
    episodes=8,
    group_size=4,
    prompt_tokens=4,
    response_tokens=6,
    growth=(1, 2, 3),
    mini_batches=(1,),
    max_sequences=8,
    hidden_size=32,
    n_layers=2,
    threads=1,
    repeats=1,
    rounds=1,
)


def test_three_passes_score_and_learn_as_one(tmp_path):
    """Both variants give the same scores, and leave the flow with the same weights."""
    experiences = []
    flows = []
    for variant in (rl_step.FLOW, rl_step.THREE_PASSES):
        case = rl_step.Case(variant, 2, 8, 6)
        parts = rl_step.make_parts(SMALL_STEP, case, str(tmp_path / variant))
        flow = parts.models.dense.module
        torch.manual_seed(1)
        for parameter in flow.parameters():  # zeros at the start would let little through
            torch.nn.init.normal_(parameter, std=0.05)
        before = [parallel.gather(parameter).clone() for parameter in flow.parameters()]
        episodes = parts.engine.generate(parts.requests, rollout.Sampling(4, 1.0, 6))
        assert {len(episode.response_ids) for episode in episodes} == {6}
        rl_step.grade(episodes)
        experiences.append(rl_step.score(parts, variant, episodes, step=0))
        rl_step.learn(parts, experiences[-1], step=0)
        flows.append([parallel.gather(parameter) for parameter in flow.parameters()])
        assert not any(torch.equal(*pair) for pair in zip(before, flows[-1], strict=True))
    one, three = experiences
    for name in ("old_logp", "entropy", "score"):
        assert getattr(one, name).abs().sum() > 0
        torch.testing.assert_close(getattr(one, name), getattr(three, name))
    for weight, other in zip(*flows, strict=True):
        torch.testing.assert_close(weight, other)


def test_an_rl_step_and_its_growth(tmp_path, capsys):
    settings = replace(SMALL_STEP, json=str(tmp_path / "rl_step.json"))
    figures = rl_step.main(settings)
    assert json.loads(Path(settings.json).read_text()) == json.loads(json.dumps(figures))
    sizes = {(row["episodes"], row["response_tokens"]) for row in figures["rows"]}
    assert sizes == {(8, 6), (16, 6), (24, 6), (8, 12), (8, 18)}
    for row in figures["rows"]:
        assert row["seconds"] > 0 and row["peak_mb"] > 100
        assert sum(row[phase] for phase in rl_step.PHASES) == pytest.approx(row["seconds"])
    assert figures["ratio"].keys() == {
        "flow / none, 1 mini-batches",
        "three passes / flow, 1 mini-batches",
    }
    assert figures["growth"].keys() == {
        f"{variant}, {by}" for variant in ("none", "flow") for by in ("episodes", "response_tokens")
    }
    assert "largest deviation" in capsys.readouterr().out


def test_ratios_of_steps_by_hand():
    """Each round by itself: the others may have had another machine."""
    settings = replace(SMALL_STEP, mini_batches=(1,), episodes=8, response_tokens=6)
    seconds = {"none": [1.0, 2.0], "flow": [2.0, 3.0], "three passes": [3.0, 3.0]}
    rounds = {}
    for variant, of_rounds in seconds.items():
        rounds[rl_step.Case(variant, 1, 8, 6)] = [{"seconds": found} for found in of_rounds]
    assert rl_step.compare(rounds, settings) == {
        "flow / none, 1 mini-batches": [2.0, 1.5],
        "three passes / flow, 1 mini-batches": [1.5, 1.0],
    }


def test_the_line_of_growth_by_hand():
    """Through 1, 2, 4 s at 1, 2, 3 episodes: 7/3 + 3/2 * (n - 2), 5/6, 7/3, 23/6 s there."""
    cases = [rl_step.Case("none", 1, n, 5) for n in (1, 2, 3)]
    rows = {case: {"seconds": s} for case, s in zip(cases, (1.0, 2.0, 4.0), strict=True)}
    fit = rl_step.fit_growth(rows, cases, "episodes")
    assert fit["slope"] == pytest.approx(1.5)
    assert fit["intercept"] == pytest.approx(7 / 3 - 3)
    assert fit["deviation"] == pytest.approx((1 - 5 / 6) / (5 / 6))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"episodes": 60}, "episodes=60: expected a multiple of group_size=8"),
        ({"mini_batches": (3,)}, "mini_batches=3: expected a divisor of 64"),
        ({"growth": (1, 2)}, "a line fits any two points"),
    ],
)
def test_steps_that_cannot_be(values, message):
    with pytest.raises(ValueError, match=message):
        rl_step.main(replace(rl_step.Settings(), **values))


# ---- busy.py
def test_shares_of_a_busy_machine_by_hand():
    """Two threads on two cores have 4/3 of them beside one loop, and one of them beside two."""
    found = {0: [[1.0, 3.0], [2.0]], 1: [[6.0]], 2: [[4.0]]}
    runs = {busy.Case("a", loops): steps for loops, steps in found.items()}
    rows = busy.summarise(runs, threads=2, n_cores=2)
    figures = [(row["loops"], row["seconds"], row["share"], row["of_share"]) for row in rows]
    assert figures == [(0, 2.0, 2.0, 1.0), (1, 6.0, 3.0, 2.0), (2, 4.0, 4.0, 1.0)]
    (alone,) = busy.summarise({busy.Case("a", 0): [[1.0]]}, threads=1, n_cores=4)
    assert alone["share"] == 1.0


def test_a_way_of_waiting_holds_for_processes_meanwhile(monkeypatch):
    for name in waiting.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    names = "os.environ['OMP_WAIT_POLICY'], 'GOMP_SPINCOUNT' in os.environ"
    command = [sys.executable, "-c", f"import infra.waiting, os; print({names})"]
    with busy.waits("OMP_WAIT_POLICY=active"):
        printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    assert printed == "active False\n"
    assert os.environ["GOMP_SPINCOUNT"] == "7" and "OMP_WAIT_POLICY" not in os.environ


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"waiting": ("passive",)}, "waiting='passive': expected NAME=VALUE, of GOMP_SPINCOUNT"),
        ({"loops": (1, 2)}, "expected 0 first"),
    ],
)
def test_ways_of_waiting_that_cannot_be(values, message):
    with pytest.raises(ValueError, match=message):
        busy.check(replace(busy.Settings(), **values))
