"""The study of the flow reward: its statistics, its controls, runs that are cut short, its page."""

import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path

import forks
import numpy as np
import pytest
import torch
from conftest import ROOT, find_model_in, read_lines, small_run

sys.path.append(str(ROOT / "study"))
import accept
import dense
import entropy
import evidence
import figures
import hasty
import measures
import methods
import scale
import sft
import study
import train_flow
import train_rl
from infra.settings import change, flatten, parse_config
from infra.solutions import SolutionSettings, load_solutions
from policy import load_policy
from rewards import Grader
from worlds import toy

PAGE = ROOT / "docs" / "evidence.md"
SIDES = ("right", "wrong")
NAMING = ("results", "evidence", "seeing", "walkthrough")  # pages that name ranges


# ---- Statistics, by hand
def test_measures_of_a_run():
    accuracy = [0.0] * 10 + [1.0] * 10
    assert measures.last_accuracy(accuracy) == 1
    assert measures.last_accuracy([0.9] * 5 + [0.2] * 10) == pytest.approx(0.2)
    assert measures.area(accuracy) == 0.5
    # after step 13 three of the last ten steps are right, after 15 five
    assert measures.steps_to(accuracy, 0.3) == 13
    assert measures.steps_to(accuracy, 0.5) == 15
    assert measures.steps_to(accuracy[:14], 0.5) == math.inf
    assert measures.steps_to([0.5] * 10, 0.5) == 10


def test_interval_of_the_paired_t_test():
    # mean 0.2, standard error 0.1, quantile 12.706
    value, low, high = measures.t_interval([0.1, 0.3])
    assert (value, low, high) == pytest.approx((0.2, 0.2 - 1.2706, 0.2 + 1.2706), abs=1e-3)
    assert math.isnan(measures.t_interval([0.1]).low)


def test_bootstrap():
    assert measures.bootstrap([0.3, 0.3, 0.3]) == pytest.approx((0.3, 0.3, 0.3))
    # of two seeds, a quarter of the samples has only the one, a quarter only the other
    assert measures.bootstrap([0.0, 1.0]) == pytest.approx((0.5, 0.0, 1.0))


def test_captured():
    half = measures.captured(arm=[0.3, 0.5], baseline=[0.1, 0.3], ceiling=[0.5, 0.7])
    assert half == pytest.approx((0.5, 0.5, 0.5))
    # gains 0 and 0.4 of room 0.4 each: from nothing to everything
    spread = measures.captured(arm=[0.1, 0.7], baseline=[0.1, 0.3], ceiling=[0.5, 0.7])
    assert spread == pytest.approx((0.5, 0.0, 1.0))
    assert math.isnan(measures.captured([0.5], [0.6], [0.6]).value)


def a_run(arm: str, seed: int, accuracy: float, status: str = "finished", steps: int = 12) -> dict:
    """A run as the file of figures has it."""
    return {
        "arm": arm,
        "seed": seed,
        "status": status,
        "error": "",
        "settings": {"shaping": "none", "steps": steps, "seed": seed},
        "script": ["train_rl.py"],
        "versions": "torch 2.13.0",
        "seconds": 60,
        "series": {
            "correct": [accuracy] * steps,
            "length": [20.0] * steps,
            "entropy": [0.5] * steps,
        },
        "held_out": {"after": {"sampled": 0.5, "greedy": 0.6}},
    }


def a_study(*some_runs: dict) -> dict:
    """A study with some runs."""
    return {"base": "abc", "settings": {"steps": 12, "prompts": 8}, "runs": list(some_runs)}


def test_pairs_are_of_seeds_that_both_have_and_that_count():
    whole = a_study(
        a_run("rlvr", 0, 0.1),
        a_run("rlvr", 1, 0.2),
        a_run("rlvr", 100, 0.9),
        a_run("calibrated", 1, 0.6),
        a_run("calibrated", 2, 0.9),
        a_run("calibrated", 0, 0.9, status="unfinished"),
        a_run("calibrated", 100, 0.0),
        a_run("process", 1, 1.0),
    )
    reported = evidence.reported_runs(whole)
    assert evidence.difference(reported, "calibrated", "rlvr") == pytest.approx([0.4])
    rows = evidence.differences_table(reported).splitlines()
    assert rows[2].startswith("| `calibrated` | 1 | +0.40 | – | – | 0.50 |")
    measures = evidence.measures_table(reported)
    assert "| `calibrated` | 2 | 0.75 | 2 of 2 | 0.75 | 10 / 10 / – |" in measures
    assert "`calibrated` 0" in evidence.runs_line(whole, reported)


def test_studies_are_merged():
    here = a_study(a_run("rlvr", 0, 0.1), a_run("rlvr", 1, 0.1, "unfinished"))
    there = a_study(a_run("rlvr", 1, 0.3), a_run("calibrated", 0, 0.5))
    merged = figures.merge([here, there])
    kept = [(run["arm"], run["seed"], run["status"]) for run in merged["runs"]]
    assert kept == [
        (arm, seed, "finished") for arm, seed in (("rlvr", 0), ("rlvr", 1), ("calibrated", 0))
    ]
    assert figures.merge([merged, here, there]) == merged
    other = a_run("rlvr", 2, 0.1)
    other["settings"]["shaping"] = "flow"
    with pytest.raises(ValueError, match="runs of rlvr differ in settings"):
        figures.merge([here, a_study(other)])


def test_studies_of_other_machines_have_other_base_models():
    """Their runs are numbered anew; a seed has one base model, as its runs are pairs."""
    here = a_study(a_run("rlvr", 0, 0.1), a_run("process", 0, 0.9))
    there = {**a_study(a_run("rlvr", 1, 0.3), a_run("rlvr", 2, 0.4)), "base": "x"}
    there["other_bases"] = ["abc", "y"]
    there["runs"][0]["base"] = 2
    there["runs"][1]["base"] = 1
    merged = figures.merge([here, there])
    assert figures.bases_of(merged) == ["abc", "x", "y"]
    bases = {(run["arm"], run["seed"]): run["base"] for run in merged["runs"]}
    assert bases == {("rlvr", 0): 0, ("process", 0): 0, ("rlvr", 1): 2, ("rlvr", 2): 0}
    assert figures.merge([merged, there]) == merged
    tuned = [a_study(a_run("rlvr", 100, 0.3)), a_study(a_run("process:lr=1e-3", 100, 0.3))]
    assert len(figures.merge([tuned[0], {**tuned[1], "base": "x"}])["runs"]) == 2
    for arm in ("rlvr", "rlvr:lr=1e-3"):
        other = {**a_study(a_run(arm, 100, 0.3)), "base": "x"}
        with pytest.raises(ValueError, match="seed 100 was run on two base models"):
            figures.merge([tuned[0], other])
    other = {**a_study(a_run("calibrated", 0, 0.5)), "base": "x"}
    with pytest.raises(ValueError, match="seed 0 was run on two base models"):
        figures.merge([here, other])


# ---- Arms
def test_every_arm_has_settings_of_the_script_and_preparations_that_exist():
    for name in methods.ARMS:
        job = study.make_run(name, 0, study.Study())
        paths = dict.fromkeys(("base", "problems", "solutions", "evaluation", "rewards"), "x")
        paths |= dict.fromkeys((*methods.PREPARATIONS, "n_held_out"), "x")
        assert job.command([paths])
    flow_settings = flatten(train_flow.Config())
    for name, preparation in methods.PREPARATIONS.items():
        if preparation.script == ("train_flow.py",):
            assert preparation.settings.keys() <= flow_settings.keys(), name


@pytest.mark.parametrize(
    "file", sorted((ROOT / "study" / "arms").glob("*.json")), ids=lambda f: f.stem
)
def test_the_file_of_an_arm_begins_a_run(file, monkeypatch):
    own = json.loads(file.read_text())
    again = {}  # what runs code is named again, and all that a file of a reward is told
    for name, value in own.items():
        if ".py" in str(value) or name == "dense":
            again[name] = tuple(value) if isinstance(value, list) else value
    command = [
        "train_rl.py",
        "--model",
        "toy-sparse",
        "--config",
        str(file),
        *methods.to_flags(again),
    ]
    monkeypatch.setattr("sys.argv", command)
    config = flatten(parse_config(train_rl.Config, toy.PRESETS["train_rl"]))
    assert {name: json.loads(json.dumps(config[name])) for name in own} == own
    assert any(arm.file == file.stem for arm in methods.ARMS.values())


def test_an_arm_with_changed_settings():
    arm = methods.make_catalogue().find("calibrated:dense_coef=0.1,flow_lr=1e-3")
    calibrated = methods.ARMS["calibrated"].settings
    assert arm.settings == {**calibrated, "dense_coef": "0.1", "flow_lr": "1e-3"}
    assert methods.to_flags({"a_b": False, "c": (1, 2)}) == ["--no-a-b", "--c", "1", "2"]
    with pytest.raises(ValueError, match="arm 'nothing'"):
        methods.make_catalogue().find("nothing")
    with pytest.raises(ValueError, match="no settings of train_rl.py"):
        methods.make_catalogue().find("rlvr:colour=red")
    with pytest.raises(ValueError, match="neither toy"):
        study.find_worlds(study.Study(world="nowhere"))


# ---- Worlds
def test_a_world_with_changed_settings():
    changed = study.read_world("toy-beyond:n_expert=64,expert_longest=4,habit=idling,seed=10")
    beyond = toy.WORLDS["toy-beyond"]
    assert changed == change(beyond, n_expert=64, expert_longest=4, habit="idling", seed=10)
    asked = study.Study(world="toy-beyond:n_expert=64", steps=7)
    named = study.Study(world="toy-beyond", steps=7)
    for script in ("train_rl", "train_flow"):
        assert study.preset(script, asked) == study.preset(script, named)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("toy-form:colour=red", r"'toy-form:colour=red': \['colour'\] are no settings of a world"),
        ("toy-form:folder=elsewhere", r"\['folder'\] are no settings of a world"),
        ("toy-form:n_expert=many", "n_expert='many': expected a whole number"),
        ("toy-form:n_expert=0", "--n-expert=0: expected a whole number from 1"),
        ("toy-form:habit=lazy", "habit='lazy': expected one of hasty, idling, repeating"),
    ],
)
def test_what_is_no_setting_of_a_world_is_refused(text, words):
    with pytest.raises(ValueError, match=words):
        study.find_worlds(study.Study(world=text))


def test_a_changed_world_is_in_the_studys_folder_with_a_seed_for_each_base(tmp_path):
    sizes = "steps=1,batch_size=4,hidden_size=32,n_layers=1,n_train=8,n_test=4,n_expert=4,seed=10"
    asked = study.Study(world=f"toy-form:{sizes}", bases=2, folder=str(tmp_path))
    worlds = study.find_worlds(asked)
    assert [Path(world.folder) for world in worlds] == [tmp_path / f"worlds/{k}" for k in (0, 1)]
    stored = [json.loads(Path(world.path("world.json")).read_text()) for world in worlds]
    assert [settings["seed"] for settings in stored] == [10, 11]
    assert study.find_worlds(asked) == worlds


def test_a_world_of_other_experts_has_the_base_model_that_is_there(tmp_path, monkeypatch):
    """It would be the same if it was made anew, and so are all problems but those of the experts."""
    sizes = {
        "steps": 2,
        "batch_size": 8,
        "hidden_size": 32,
        "n_train": 16,
        "n_test": 8,
        "n_expert": 8,
    }
    plain = change(toy.WORLDS["toy-beyond"], folder=str(tmp_path / "plain"), **sizes)
    monkeypatch.setitem(toy.WORLDS, "toy-beyond", plain)
    monkeypatch.setitem(study.worlds.WORLDS, "toy-beyond", plain)
    changes = {"n_expert": 6, "expert_wrong": 0.5}
    anew = toy.make(change(plain, folder=str(tmp_path / "anew"), seed=1, **changes))
    named = "toy-beyond:n_expert=6,expert_wrong=0.5"
    asked = study.Study(world=named, bases=2, folder=str(tmp_path / "study"))
    _, made = study.find_worlds(asked)
    assert Path(made.folder) == tmp_path / "study" / "worlds" / "1"
    for name in ("train.jsonl", "test.jsonl", "expert.jsonl", "world.json"):
        assert Path(made.path(name)).read_text() == Path(anew.path(name)).read_text()
    assert study.hash_of_base(made) == study.hash_of_base(anew)
    monkeypatch.setattr(toy, "make_base", None)  # made once, and then copied
    changed = change(asked, world="toy-beyond:n_expert=5", folder=str(tmp_path / "other"))
    for base, world in enumerate(study.find_worlds(changed)):
        assert study.hash_of_base(world) == study.hash_of_base(study.find_worlds(asked)[base])


def test_preparations_come_before_what_needs_them():
    preparations, runs_of_seed = study.plan(study.Study(arms=("hasty-flow", "logprob"), seeds=2))
    names = [job.name for job in preparations]
    assert names == ["hasty_solutions", "hasty_flow", "sft"]
    assert [job.name for job in runs_of_seed][:2] == ["hasty-flow/seed-0", "logprob/seed-0"]


def test_a_flow_of_few_solutions_has_as_many_steps():
    def epochs(name: str, world: str) -> int:
        return study.make_preparation(name, 0, study.Study(world=world)).settings["epochs"]

    assert epochs("flow", "toy-beyond") == epochs("flow", "toy-beyond:expert_wrong=0.1") == 4
    assert epochs("flow", "toy-beyond:n_expert=64") == 125  # 4 * 2000/64
    assert epochs("flow_5x", "toy-beyond:n_expert=8") == 5000
    assert epochs("flow", "toy-beyond:n_expert=4000") == 4


def test_length_reward():
    file = ROOT / "study" / "rewards" / "length_reward.py"
    with Grader(("binary", f"{file}=0.3")) as grader:
        short, long = (grader.grade("1 +2>", "3", "x" * n, finished=True) for n in (25, 90))
    assert (short.reward, long.reward) == pytest.approx((0.15, 0.3))
    assert not long.correct


# ---- Controls
@pytest.fixture
def config(world, flow_folder, tmp_path) -> train_rl.Config:
    """RL on the small world, as the study's runs have it."""
    settings = {"shaping": "none", "train_batch": 16, "lr": 1e-2, "steps": 6}
    settings |= {"problem_column": "problem", "reward": ("binary",)}
    return small_run(world, None, tmp_path / "run", **settings)


def test_the_experts_likelihood_is_calibrated_on_solutions_that_were_held_out(config, world):
    own = {
        "expert": world.path("model"),
        "experts": world.path("expert.jsonl"),
        "held_out": "8",
    }
    model = find_model_in(world.path("model"))
    host = dense.Host(model, config, lambda: load_policy(model.path), names_flow=True)
    training, held_out = host.solutions(own["experts"], 8)
    assert (len(training), len(held_out)) == (40, 8)
    reward = dense.make(str(ROOT / "study" / "rewards" / "logprob.py"), own, host)
    excess = []
    for part in host.run_policy(held_out, ()):
        excess.append(-reward.score(part)[part.batch.response_mask])
    excess = torch.cat(excess)
    assert len(excess) == sum(len(row.response_ids) for row in held_out)
    assert excess.mean().item() == pytest.approx(0, abs=1e-4)
    assert excess.std().item() == pytest.approx(1, abs=1e-4)
    lowest = dense.make(str(methods.REWARDS / "logprob.py"), {**own, "lowest": "True"}, host)
    (part, *_) = host.run_policy(held_out, ())
    scores, worst = reward.score(part), lowest.score(part)
    for row, n_tokens in enumerate(part.batch.response_mask.sum(dim=1).tolist()):
        assert worst[row, :n_tokens].tolist() == [scores[row, :n_tokens].min().item()] * n_tokens
        assert not worst[row, n_tokens:].any()


def test_the_entropy_advantage_with_the_papers_alpha_is_that_of_the_trainer(config, tmp_path):
    config = change(
        config, reward=("binary", f"{methods.REWARDS / 'length_reward.py'}=1.0"), steps=2
    )
    norms = {}
    for name, shaping, update in (
        ("trainer", "entropy", train_rl.update_policy),
        ("0.4", "none", partial(entropy.update, alpha=0.4)),
        ("0.01", "none", partial(entropy.update, alpha=0.01)),
    ):
        folder = str(tmp_path / name)
        train_rl.main(change(config, shaping=shaping, folder=folder), update=update)
        lines = read_lines(Path(folder, "metrics.jsonl"))
        norms[name] = [line["policy/grad_norm"] for line in lines]
    assert norms["trainer"] == norms["0.4"] != norms["0.01"]


def test_supervised_steps_raise_the_likelihood_of_expert_solutions(config, world):
    update = sft.SupervisedUpdate(world.path("expert.jsonl"), 8)
    train_rl.main(config, update=update)
    losses = [line["policy/loss"] for line in read_lines(Path(config.folder, "metrics.jsonl"))]
    assert losses[-1] < 0.8 * losses[0]
    assert len(update.solutions) == 40


def test_hasty_solutions_are_wrong(world, tmp_path):
    settings = hasty.HastySettings(
        world.path("model"), world.path("train.jsonl"), world.path("expert.jsonl"), str(tmp_path)
    )
    hasty.write_hasty_solutions(settings)
    rows = read_lines(tmp_path / "solutions.jsonl")
    answers = {row["problem"]: row["answer"] for row in read_lines(world.path("train.jsonl"))}
    assert 0 < len(rows) <= 48
    for row in rows:
        assert not row["solution"].endswith(rf"\boxed{{{answers[row['problem']]}}}")
    training = load_solutions(
        str(tmp_path / "solutions.jsonl"),
        SolutionSettings(
            problem_column="problem", template="none", max_prompt_tokens=64, cutoff=200
        ),
        find_model_in(world.path("model")),
    )
    assert len(training) == len(rows)


# ---- A whole study in small: one arm fails, another is interrupted and goes on
def stop_once_begun(metrics: Path) -> None:
    """Send this process SIGTERM once a run has logged a step."""
    while not (metrics.exists() and metrics.read_text()):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def small_study(world, tmp_path_factory) -> tuple[study.Study, dict]:
    """A study that was interrupted and then brought to its end, and what it had in between."""
    folder = tmp_path_factory.mktemp("study")
    asked = study.Study(
        world=world.folder,
        arms=("rlvr:prompts=7", "rlvr", "published-shuffled"),
        seeds=1,
        steps=3,
        jobs=1,
        folder=str(folder / "runs"),
        eval_problems=2,
        held_out=8,
    )
    metrics = folder / "runs" / "rlvr" / "seed-0" / "metrics.jsonl"
    threading.Thread(target=stop_once_begun, args=(metrics,), daemon=True).start()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(study, "subprocess", forks.SUBPROCESS)
        assert study.main(asked) == 1
        interrupted = figures.read_study(asked.json_file)
        rest = change(asked, arms=asked.arms[1:])
        assert study.main(rest) == 0
    return rest, interrupted


def test_seconds_are_those_of_a_core():
    """However many processes share the cores."""
    began = time.process_time()
    while time.process_time() < began + 0.05:
        pass
    assert study.cpu_seconds(os.getpid()) == pytest.approx(sum(os.times()[:4]), abs=0.05)
    assert study.cpu_seconds(2**22 + 1) == 0


def test_an_interrupted_study(small_study):
    _, interrupted = small_study
    statuses = {run["arm"]: run["status"] for run in interrupted["runs"]}
    assert statuses == {"rlvr": "unfinished", "rlvr:prompts=7": "failed"}
    errors = {run["arm"]: run["error"] for run in interrupted["runs"]}
    assert "7 * 8 = 56 is not a multiple of train_batch=64" in errors["rlvr:prompts=7"]


def test_a_resumed_run_gives_the_same_series(small_study, world, tmp_path, monkeypatch):
    asked, interrupted = small_study
    whole = {run["arm"]: run for run in figures.read_study(asked.json_file)["runs"]}
    begun = {run["arm"]: run for run in interrupted["runs"]}["rlvr"]["series"]["correct"]
    assert 0 < len(begun) < 3
    job = study.make_run("rlvr", 0, asked)
    elsewhere = change(job, folder=tmp_path / "run")
    command = elsewhere.command(study.find_paths(asked, [world]))
    monkeypatch.setattr(sys, "argv", command[1:])
    train_rl.main(parse_config(train_rl.Config, {}))
    uninterrupted = figures.read_series(figures.read_steps(tmp_path / "run" / "metrics.jsonl"))
    assert whole["rlvr"]["series"] == uninterrupted
    assert whole["rlvr"]["held_out"].keys() == {"before", "after"}
    assert not any((job.folder / name).exists() for name in job.outdated)


def test_a_finished_study_runs_nothing_and_keeps_its_figures(small_study, tmp_path):
    asked, _ = small_study
    before = asked.json_file.read_bytes()
    assert study.main(asked) == 0
    assert asked.json_file.read_bytes() == before
    collected = change(asked, collect=True, json=str(tmp_path / "collected.json"))
    assert study.main(collected) == 0
    assert collected.json_file.read_bytes() == before
    merged = change(asked, merge=(str(asked.json_file),), json=collected.json)
    assert study.main(merged) == 0
    assert merged.json_file.read_bytes() == before


def test_a_folder_holds_one_study(small_study):
    asked, _ = small_study
    with pytest.raises(ValueError, match="name another --folder, or remove that run"):
        study.main(change(asked, steps=5))
    with pytest.raises(ValueError, match="their runs are not comparable"):
        study.main(change(asked, eval_problems=3))


def test_evidence_is_drawn_from_the_figures(small_study, tmp_path, monkeypatch):
    """A reader's page stands in a folder of its own, and the page that is kept changes if asked."""
    asked, _ = small_study
    docs = tmp_path / "docs"
    docs.mkdir()
    kept = Path(shutil.copy(PAGE, docs))
    figures = tmp_path / "figures"
    figures.mkdir()
    own = tmp_path / "runs" / "evidence"
    monkeypatch.setattr(evidence, "PAGE", kept)
    monkeypatch.setattr(evidence, "STUDY", figures)
    settings = evidence.Settings(folder=str(figures), out=str(own))
    assert evidence.main(change(settings, tracked=True)) == 0  # without figures none are shown
    empty = kept.read_text()
    assert "| `rlvr` | 8 |" not in empty and "## Results" in empty
    for name in ("study", "tuning"):
        shutil.copy(asked.json_file, figures / f"{name}.json")

    assert evidence.main(settings) == 0
    assert kept.read_text() == empty, "regression: the page's command rewrote it"
    text = (own / "evidence.md").read_text()
    assert text.count("| `published-shuffled` | 1 |") == 3  # measures, differences, tuning
    for name in evidence.PICTURES:
        assert 3_000 < (own / name).stat().st_size < 150_000
        assert f"]({name})" in text and not (figures / name).exists()
    linked = re.search(r"\]\(([^)]*theory\.md)", text)[1]
    assert (own / linked).resolve() == docs / "theory.md"

    checking = change(settings, check=True)
    assert evidence.main(checking) == 1
    assert evidence.main(change(settings, tracked=True)) == 0
    assert evidence.main(checking) == 0
    assert all((figures / name).exists() for name in evidence.PICTURES)


def test_the_committed_page_has_the_tables_of_the_committed_figures():
    assert evidence.main(evidence.Settings(check=True)) == 0


def as_range(values: list[float], unit: float, places: int = 0) -> str:
    """Return the least and the largest of values in a unit, as the pages write them."""
    return f"{min(values) / unit:.{places}f} to {max(values) / unit:.{places}f}"


def test_ranges_of_the_default_run_that_pages_name():
    """From the eight runs on four base models in study/default-run.json."""
    runs = figures.read_study(ROOT / "study" / "default-run.json")["runs"]
    assert {run["base"] for run in runs} == {0, 1, 2, 3} and len(runs) == 8
    series = [run["series"] for run in runs]
    ends = as_range([measures.last_accuracy(one["correct"]) for one in series], 0.01)
    held_out = {}
    for when in ("before", "after"):
        for kind in ("sampled", "greedy"):
            held_out[when, kind] = as_range([run["held_out"][when][kind] for run in runs], 0.01)
    below = [evidence.steps_below(s["flow/reward_right"], s["flow/reward_wrong"]) for s in series]
    first = as_range([one["length"][0] for one in series], 1)
    last = as_range([measures.last_accuracy(one["length"]) for one in series], 1)
    paid = {side: [np.mean(one[f"flow/reward_{side}"]) for one in series] for side in SIDES}
    lost = {side: as_range([-value for value in values], 1, 3) for side, values in paid.items()}
    text = {
        name: " ".join((ROOT / name).read_text().split())
        for name in ("README.md", *(f"docs/{page}.md" for page in NAMING))
    }
    for kind in ("sampled", "greedy"):
        said = f"before {held_out['before', kind]} %, after {held_out['after', kind]} %"
        assert said in text["README.md"]
        assert f"{held_out['before', kind]} %" in text["docs/evidence.md"]
        for when in ("before", "after"):
            assert f"{held_out[when, kind]} %" in text["docs/results.md"]
    assert f"training ends at {ends} %" in text["docs/results.md"]
    assert f"{first} tokens at first and {last}" in text["docs/results.md"]
    for page in ("docs/results.md", "docs/evidence.md"):
        assert f"{as_range(below, 1)} of 100 steps" in text[page]
    assert f"and {100 - max(below)} to {100 - min(below)} on four other" in text["docs/seeing.md"]
    walk = text["docs/walkthrough.md"]
    first_steps = {name: [one[name][0] for one in series] for name in series[0]}
    assert f"{as_range(first_steps['correct'], 0.01)} % of the responses were right" in walk
    assert f"a response had {first} tokens" in walk
    paid_at_first = as_range(first_steps["flow/reward"], 1, 3).replace("-", "−")
    assert f"a flow reward of {paid_at_first}" in walk
    assert f"mean score of a token was {as_range(first_steps['flow/score'], 1, 1)}" in walk
    said = f"a right response loses {lost['right']}, a wrong one {lost['wrong']}"
    assert said in text["docs/evidence.md"]


def test_flags_that_the_page_names():
    known = {"--expert-policy", "--expert-solutions", "--check", "--alpha"}
    for config in (train_rl.Config(), train_flow.Config(), study.Study(), accept.Settings()):
        for name in flatten(config):
            known |= {f"--{name.replace('_', '-')}", f"--no-{name.replace('_', '-')}"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", PAGE.read_text())) <= known


def test_figures_that_some_steps_lack(tmp_path):
    """Regression: a step without right answers has no flow reward of right ones.

    Nor is there a figure that was not finite, or a line that is still being written.
    """
    file = tmp_path / "metrics.jsonl"
    assert figures.read_steps(file) == []
    file.write_text(
        '{"step": 1, "correct": 0.0, "flow/reward_wrong": -0.12345, "flow/reward_right": null}\n'
        '{"step": 2, "correct": 0.5, "flow/reward_wrong": -0.2, "flow/reward_right": -0.1}\n'
        '{"step": 3, "corr'
    )
    assert figures.read_series(figures.read_steps(file)) == {
        "correct": [0.0, 0.5],
        "flow/reward_wrong": [-0.1235, -0.2],
        "flow/reward_right": [None, -0.1],
    }


# ---- Settings that are changed
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ("lr=fast", "lr=fast: expected a number"),
        ("lr=-1", "--lr=-1: expected a number above 0"),
        ("dense_coef=nan", "dense_coef=nan: expected a number"),
        ("prompts=2.5", "prompts=2.5: expected a whole number"),
        ("dense_on=words", "dense_on=words: expected one of token, response"),
        ("clip=0.2", "clip=0.2: expected a list of 2, each a number"),
    ],
)
def test_values_that_no_run_takes_are_refused_before_a_world_is_made(changes, words):
    with pytest.raises(ValueError, match=f"arm 'rlvr:{changes}': {words}"):
        methods.make_catalogue().find(f"rlvr:{changes}")


def test_no_arms_are_none():
    with pytest.raises(ValueError, match="--arms is empty"):
        study.main(study.Study(arms=()))


@pytest.mark.parametrize(
    "changes",
    ["lr=1e-4,prompts=8", "clip=0.2,0.3", "reward_times=0.5", "flow_top_k=None", "reward=binary"],
)
def test_values_that_runs_take(changes):
    methods.make_catalogue().find(f"rlvr:{changes}")


def test_a_coefficient_needs_a_reward_and_a_folder():
    with pytest.raises(ValueError, match="--shaping none: expected a dense reward"):
        scale.main(change(train_rl.Config(), shaping="none", folder="coefficient"))
    with pytest.raises(ValueError, match="--folder is not given"):
        scale.main(train_rl.Config())


# ---- Files that are torn, or of another kind
@pytest.mark.parametrize("content", ["", "{", "[]", "5"])
@pytest.mark.parametrize("name", ["common.json", "registered.json", "rlvr/seed-0.json"])
def test_a_folder_of_a_study_whose_json_is_wrong(tmp_path, name, content):
    (tmp_path / "rlvr").mkdir()
    (tmp_path / "common.json").write_text("{}")
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name}.* expected"):
        study.main(study.Study(folder=str(tmp_path), collect=True))
    assert not (tmp_path / "study.json").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"runs": [5]}', '{"runs": [{}]}'])
def test_a_file_of_figures_that_is_none(tmp_path, content):
    """It is named, and what the study's own file holds stays."""
    other = tmp_path / "other.json"
    other.write_text(content)
    own = tmp_path / "study.json"
    shutil.copy(ROOT / "study" / "toy-study.json", own)
    before = own.read_bytes()
    with pytest.raises(ValueError, match=r"other.json.* expected"):
        study.main(study.Study(folder=str(tmp_path), merge=(str(other),)))
    assert own.read_bytes() == before
