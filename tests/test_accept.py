"""Whether a world can decide: labels and AUCs by hand, what tokens know of habits, the decision."""

import json
import random
import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "study"))
import accept
import study
import train_rl
import trial
from infra.data import load_problems
from worlds import toy

SETTINGS = accept.Settings(n_responses=40, n_written=40)


def test_a_world_is_accepted_if_only_the_perfect_reward_solves_it():
    """Of four bases one may fail, and RLVR must stay below on three."""

    def decide(process: list[float], rlvr: list[float]) -> bool | None:
        pairs = zip(process, rlvr, strict=True)
        return accept.decide([{"process": p, "rlvr": r} for p, r in pairs])

    assert decide([0.9, 0.8, 0.85, 0.2], [0.1, 0.1, 0.29, 0.9])
    assert not decide([0.9, 0.79, 0.85, 0.2], [0.1, 0.1, 0.1, 0.1])
    assert not decide([0.9, 0.9, 0.9, 0.9], [0.1, 0.1, 0.3, 0.9])
    assert accept.decide([{"process": 0.9}]) is None


def test_the_runs_that_decide_are_on_seeds_that_nobody_reports():
    for bases, seeds in ((4, [200, 201, 202, 203]), (3, [201, 202, 203])):
        asked = accept.study_of("toy-form:n_expert=64", replace(SETTINGS, bases=bases, steps=7))
        _, runs = study.plan(asked)
        assert {(run.label["arm"], run.label["seed"], run.base) for run in runs} == {
            (arm, seed, base) for base, seed in enumerate(seeds) for arm in ("process", "rlvr")
        }
        assert asked.folder == "runs/accept/toy-form-n_expert-64"


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> toy.World:
    """A world with an untrained base and expert solutions enough to count in."""
    folder = str(tmp_path_factory.mktemp("accept") / "world")
    return toy.make(replace(trial.WORLD, folder=folder, n_train=80, n_expert=400))


@pytest.fixture(scope="module")
def setting(small):
    """The settings of the scoring and the model of the small world."""
    return train_rl.resolve(accept.scoring_settings(small, SETTINGS))


def respond(setting, habit: toy.Habit) -> accept.Responses:
    """Return responses with a habit, as if they were sampled, and complete ones to other problems."""
    config, model = setting
    rng = random.Random(0)
    episodes = []
    for i, problem in enumerate(load_problems(config.data, config.problems, model)):
        asked = toy.misread(problem.text, rng, habit, 0.7) if i < 40 else problem.text
        solution, _ = toy.solve(asked)
        episodes.append(accept.make_episode(problem, solution, model))
    return accept.label(episodes, 40, model)


def test_labels(setting):
    responses = respond(setting, "repeating")
    assert responses.is_incomplete[:40].all()
    assert not responses.is_incomplete[40:].any()
    assert {i for i, _ in responses.steps} == set(range(40))
    assert all(step.start > 0 for _, step in responses.steps)
    counts = accept.describe(responses)
    assert (counts["responses"], counts["complete"], counts["written"]) == (40, 0, 40)
    assert 0.6 < counts["wrong_steps"] / counts["steps"] < 0.8


def test_what_is_higher_for_wrong_steps_has_an_auc_of_1(setting):
    responses = respond(setting, "idling")
    values = [np.zeros(len(episode.response_ids)) for episode in responses.episodes]
    for i, step in responses.steps:
        values[i][step.start : step.end] = 0.0 if step.is_right else 1.0
    measured = accept.measure(values, responses)
    assert measured == {"steps": [1.0, 1.0, 1.0], "responses": [1.0, 1.0, 1.0]}
    reverse = accept.measure([-of_tokens for of_tokens in values], responses)
    assert reverse["steps"][0] == 0


def test_counting_tokens_tells_idle_steps_and_not_repeated_ones(setting, small):
    found = {}
    for habit in ("idling", "repeating"):
        responses = respond(setting, habit)
        paths = {"solutions": small.path("expert.jsonl")}
        scorers = accept.score(responses, ["3-gram"], paths, *setting)
        assert scorers.keys() == {
            "-log-prob of the base",
            "entropy of the base",
            "shortness",
            "3-gram",
        }
        found[habit] = scorers["3-gram"]
    assert found["idling"]["steps"][0] > 0.95
    assert found["idling"]["responses"][0] > 0.95
    assert found["repeating"]["steps"][0] == pytest.approx(0.5, abs=0.15)
    assert found["repeating"]["responses"][0] == pytest.approx(0.5, abs=0.2)


def test_a_world_is_examined_and_kept_beside_others(tmp_path, capsys):
    """A scorer of each kind scores what a base samples; what is asked later joins them."""
    sizes = "steps=2,batch_size=8,hidden_size=32,n_layers=4,n_train=32,n_test=8,n_expert=128"
    settings = accept.Settings(
        worlds=(f"toy-content:{sizes}",),
        bases=1,
        n_responses=8,
        n_written=8,
        folder=str(tmp_path / "runs"),
        json=str(tmp_path / "worlds.json"),
        scorers=("3-gram", "whitened ridge"),
        runs=False,
    )
    (tmp_path / "worlds.json").write_text("{}")
    accept.main(settings)
    (before,) = json.loads((tmp_path / "worlds.json").read_text()).values()
    accept.main(replace(settings, scorers=("whitened ridge", "untrained flow")))
    (found,) = json.loads((tmp_path / "worlds.json").read_text()).values()
    assert found["accepted"] is None
    assert found["world"]["habit"] == "repeating"
    (base,) = found["bases"]
    assert (base["responses"], base["written"]) == (8, 8)
    assert list(base["scorers"])[-3:] == ["3-gram", "whitened ridge", "untrained flow"]
    assert base["scorers"].items() >= before["bases"][0]["scorers"].items()
    for measured in base["scorers"].values():
        value, low, high = measured["responses"]
        assert 0 <= low <= value <= high <= 1
    accept.main(replace(settings, render=True))
    printed = capsys.readouterr().out
    assert printed.count("undecided, runs are missing") == 3
    assert "| whitened ridge |" in printed
    with pytest.raises(ValueError, match=r"scorers=\['tea leaves'\]: expected some of 2-gram"):
        accept.main(replace(settings, scorers=("tea leaves",)))


def test_scorers_of_a_flow_reward_as_the_calibrated_arm_does():
    """The flow's own reward is an excess, and a file's what its score() says."""
    settings = accept.reward_settings("flow, 5 x offline", {"flow_5x": "somewhere"})
    assert (settings["flow_scope"], settings["flow"]) == ("expert", "somewhere")
    for what, _ in accept.SCORERS.values():
        assert what in accept.PREPARATIONS or (accept.REWARDS / what).is_file()
