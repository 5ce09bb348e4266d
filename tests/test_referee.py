"""The referee of dense rewards: exact tests by hand, the arms of a reward, what is refused, its page."""

import json
import math
import shutil
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import forks
import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "study"))
import evidence
import figures
import measures
import methods
import referee
import study
import trial
import tuning
from infra.settings import change

REWARDS = ROOT / "study" / "rewards"


# ---- Exact tests, by hand
def test_mcnemar():
    """Only pairs of which one escaped count, as tosses of a coin."""
    assert measures.mcnemar([True] * 4, [False] * 4) == pytest.approx(2 / 2**4)
    assert measures.mcnemar([True, True, False], [True, True, False]) == 1
    # 5 against 1 of 6 tosses: 2 * (1 + 6) / 64
    own, others = [True] * 5 + [False], [False] * 5 + [True]
    assert measures.mcnemar(own + [True], others + [True]) == pytest.approx(14 / 64)


@pytest.mark.parametrize(
    ("p", "text"), [(1.0, "1.0000"), (2 / 2**4, "0.1250"), (2 / 2**16, "3e-05")]
)
def test_no_p_is_written_as_0(p, text):
    """Regression: that of sixteen pairs was 0.0000."""
    assert measures.p_value(p) == text


def test_sign_flip():
    """All signs of the differences are tried."""
    assert measures.sign_flip([0.1, 0.2, 0.3, 0.4]) == pytest.approx(2 / 16)
    assert measures.sign_flip([0.0] * 5) == 1
    differences = [0.3, -0.1, 0.2, 0.05, -0.4]
    observed = abs(sum(differences))
    as_large = 0
    for signs in product((1, -1), repeat=5):
        flipped = sum(sign * value for sign, value in zip(signs, differences, strict=True))
        as_large += abs(flipped) >= observed - 1e-9
    assert measures.sign_flip(differences) == pytest.approx(as_large / 32)
    assert measures.sign_flip([-value for value in differences]) == pytest.approx(as_large / 32)
    with pytest.raises(ValueError, match="17 pairs: expected 1 to 16"):
        measures.sign_flip([0.1] * 17)


def test_an_interval_over_bases_is_wider_than_one_over_their_seeds():
    """Seeds of a base that are all alike say nothing of other bases."""
    value, low, high = measures.nested([[0.8] * 8, [0.0] * 8])
    assert (value, low, high) == pytest.approx((0.4, 0.0, 0.8))
    assert measures.nested([[0.3, 0.3]]) == pytest.approx((0.3, 0.3, 0.3))
    assert math.isnan(measures.nested([[0.5]]).low)
    # a base counts as one, however many seeds it has
    assert measures.nested([[1.0] * 9, [0.0]]).value == pytest.approx(0.5)


def test_auc():
    assert measures.auc([3, 2, 1, 0], [True, True, False, False]) == 1
    assert measures.auc([0, 1], [True, False]) == 0
    assert measures.auc([1, 1, 1], [True, False, False]) == 0.5, "ties count half"
    assert measures.auc([2, 1, 3], [True, False, False]) == 0.5
    assert math.isnan(measures.auc([1, 2], [True, True]))


# ---- The arms of a reward
def test_a_reward_of_experts_gets_them_and_its_controls():
    reward = methods.read_reward(f"{REWARDS / 'ridge.py'}:whiten=True,gamma=0.9")
    assert reward.own == {"experts": "{solutions}", "held_out": "{n_held_out}", "whiten": True}
    assert reward.settings["gamma"] == "0.9" and reward.settings["dense_on"] == "response"
    arms = reward.arms()
    shuffled = [f"ridge.py-shuffled-{share}" for share in (25, 50, 75, 100)]
    assert list(arms) == ["ridge.py", *shuffled, "ridge.py-wrong"]
    half = arms["ridge.py-shuffled-50"].settings["dense"]
    assert {"of={rewards}/ridge.py", "among=responses", "share=0.5", "whiten=True"} <= set(half)
    assert "experts={hasty_solutions}" in arms["ridge.py-wrong"].settings["dense"]
    clamped = methods.read_reward(f"{REWARDS / 'ridge.py'}:dense_clamp=-2,0,gamma=0.9")
    assert clamped.settings["dense_clamp"] == ("-2", "0") and clamped.settings["gamma"] == "0.9"
    assert all(arm.beside == "ridge.py" for name, arm in arms.items() if name != "ridge.py")


def test_a_reward_with_weights_is_also_tried_before_they_learn():
    """Without the steps of its fit, or with a flow that never learns; nothing else differs."""
    for name, given, changed in (
        ("mlp.py", ":steps=90", {"steps=0"}),
        ("whitened_flow.py", "", {"steps=0"}),
        ("squared_flow.py", "", {"flow": "{untrained_flow}", "flow_lr": 0.0}.items()),
    ):
        arms = methods.read_reward(f"{REWARDS / name}{given}").arms()
        assert arms[f"{name}-untrained"].beside == name
        trained, untrained = arms[name].settings, arms[f"{name}-untrained"].settings
        if "flow" in untrained:
            assert untrained.items() - trained.items() == changed
        else:
            assert set(untrained.pop("dense")) - set(trained.pop("dense")) == changed
            assert untrained == trained
    assert "ridge.py-untrained" not in methods.read_reward(str(REWARDS / "ridge.py")).arms()
    squared = (str(REWARDS / "squared_flow.py"),)
    asked = study.Study(reward=squared, arms=("squared_flow.py-untrained",), seeds=1)
    assert "untrained_flow" in [job.name for job in study.plan(asked)[0]]


def test_the_coefficient_is_measured_unless_it_is_given():
    measured = methods.read_reward(str(REWARDS / "noise.py"))
    assert measured.settings["dense_coef"] == "{coefficient_of_noise}"
    assert list(measured.preparations()) == ["coefficient_of_noise"]
    given = methods.read_reward(f"{REWARDS / 'noise.py'}:dense_coef=2.0,dense_on=token")
    assert given.settings["dense_coef"] == "2.0" and not given.preparations()
    assert "among=tokens" in given.arms()["noise.py-shuffled-25"].settings["dense"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nowhere.py", "no file 'nowhere.py'; expected a Python file"),
        (str(ROOT / "README.md"), "expected a Python file, FILE.py"),
        (str(REWARDS / "length_reward.py"), r"defines no class Reward\(dense.DenseReward\)"),
        (f"{REWARDS / 'noise.py'}:colour=red", r"\['colour'\] are no settings of train_rl.py"),
    ],
    ids=str,
)
def test_what_is_no_reward_is_refused(text, words):
    with pytest.raises(ValueError, match=words):
        study.main(study.Study(reward=(text,)))


def test_a_reward_that_is_called_like_a_built_in_arm_leaves_that_as_it_is(tmp_path):
    file = tmp_path / "noise.py"
    file.write_text((REWARDS / "self_certainty.py").read_text())
    catalogue = methods.make_catalogue([methods.read_reward(str(file))])
    assert catalogue.preparations["scale_noise"] == methods.PREPARATIONS["scale_noise"]
    assert catalogue.arms["noise"] == methods.ARMS["noise"]
    file.write_text(
        "from dataclasses import dataclass\nfrom dense import DenseReward\n\n\n@dataclass\n"
        "class Own:\n    share: float = 0.3\n\n\nclass Reward(DenseReward):\n    Settings = Own\n"
    )
    with pytest.raises(ValueError, match="settings called share, as rewards/shuffled.py has"):
        methods.read_reward(str(file))


def test_a_reward_of_a_flow_gets_the_flow():
    assert methods.read_reward(str(REWARDS / "squared_flow.py")).settings["flow"] == "{flow}"


def test_which_arms_run():
    text = (str(REWARDS / "distillation.py"),)
    quick = study.Study(reward=text, quick=True).chosen_arms
    assert quick == ["rlvr", "distillation.py", "distillation.py-shuffled-100", "process"]
    whole = study.Study(reward=text).chosen_arms
    assert whole[: len(study.METHODS)] == list(study.METHODS)
    assert "noise" in whole and "distillation.py-shuffled-25" in whole
    assert not {"distillation", "noise"} & set(study.Study().chosen_arms), "of the flow's own study"
    with pytest.raises(ValueError, match="quick: expected --reward"):
        study.main(study.Study(quick=True))
    with pytest.raises(ValueError, match="bases=4 with seeds=2: some bases would have no run"):
        study.main(study.Study(reward=text, bases=4, seeds=2))
    with pytest.raises(ValueError, match="seeds up to 107 are reported"):
        study.main(study.Study(reward=text, tune=True, first_seed=100))
    with pytest.raises(ValueError, match="has dense_coef=2.0, which --tune would choose"):
        study.main(study.Study(reward=(f"{text[0]}:dense_coef=2.0",), tune=True))
    with pytest.raises(ValueError, match="two rewards are called distillation.py"):
        study.main(study.Study(reward=text * 2))
    assert study.Study(quick=True).n_seeds == 4 and study.Study(quick=True, seeds=7).n_seeds == 7
    with pytest.raises(ValueError, match="seeds=17: the exact tests take at most 16"):
        study.main(study.Study(reward=text, seeds=17))


def test_bases_are_nested_and_have_preparations_of_their_own(tmp_path):
    asked = study.Study(reward=(str(REWARDS / "ridge.py"),), bases=2, seeds=4, arms=("ridge.py",))
    preparations, runs = study.plan(asked)
    assert [job.name for job in preparations] == ["coefficient_of_ridge", "coefficient_of_ridge@1"]
    assert [(job.label["seed"], job.base) for job in runs] == [(0, 0), (1, 1), (2, 0), (3, 1)]
    assert runs[1].needs == ("coefficient_of_ridge@1",)
    assert preparations[1].folder.parent.name == "base-1"
    (tmp_path / "world.json").write_text("{}")
    with pytest.raises(ValueError, match="bases=2: the world .* is a folder, with one base"):
        study.find_worlds(change(asked, world=str(tmp_path)))


# ---- What comes out
def a_run(arm: str, seed: int, accuracy: float, **more) -> dict:
    series = {"correct": [accuracy] * 12, "length": [20.0] * 12}
    settings = {"prompts": 8}
    run = {"arm": arm, "seed": seed, "base": seed % 2, "status": "finished", "seconds": 60}
    return {**run, "series": series, "settings": settings, "beside": None, **more}


def test_the_page_says_escapes_first(tmp_path):
    own = [a_run("good.py", seed, 0.9, auc={"1": 1.0, "12": None}) for seed in range(4)]
    plain = [a_run("rlvr", seed, 0.9 if seed == 3 else 0.1) for seed in range(4)]
    control = [a_run("good.py-shuffled-100", seed, 0.1, beside="good.py") for seed in range(4)]
    cut = a_run("rlvr", 4, 0.9, status="failed")
    figures = {"runs": [*plain, cut, *own, *control, a_run("rlvr", 100, 0.9)]}
    arms = ["rlvr", "good.py", "good.py-shuffled-100"]
    figures["registered"] = {"arms": arms, "seeds": [0, 4], "bases": 2}
    said = referee.write_verdict(figures, tmp_path)
    assert "good.py: 4 of 4 runs escaped, of rlvr 1 (McNemar p 0.2500)" in said
    assert "accuracy +0.60 (sign flip p 0.2500; no p of 4 pairs is below 0.1250)" in said
    rows = {line.split("|")[1].strip(): line for line in said.splitlines() if line[:1] == "|"}
    assert "| 4 of 4 | 10 | 0.90 | 1.00 / – | 20 | +0.60 |" in rows["`good.py`"]
    assert "| `good.py` | 4 | 0 | 4 | -0.80 |" in rows["`good.py-shuffled-100`"]
    page = (tmp_path / "verdict.html").read_text()
    assert page.count("<polyline") == 4 + 8 + 8 and "Registered before" in page
    assert "All runs begin with one base model" not in said


def test_a_reward_with_a_bug_is_refused_before_anything_slow(tmp_path, monkeypatch):
    file = tmp_path / "broken.py"
    file.write_text(
        "from dense import DenseReward\n\n\nclass Reward(DenseReward):\n"
        "    def score(self, part):\n        return part.output.logp * float('nan')\n"
    )

    def slow(*_):
        raise AssertionError("a world was made before the trial")

    monkeypatch.setattr(study, "find_worlds", slow)
    monkeypatch.setattr(trial, "subprocess", forks.SUBPROCESS)
    with pytest.raises(ValueError, match=r"reward .*broken.py: broken: .* are not finite"):
        study.main(study.Study(reward=(str(file),), quick=True, folder=str(tmp_path / "runs")))
    assert not (tmp_path / "runs").exists()


@pytest.fixture(scope="module")
def forked():
    """Fork the runs of studies, which then import nothing."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (study, trial):
            patch.setattr(module, "subprocess", forks.SUBPROCESS)
        yield


@pytest.fixture(scope="module")
def judged(forked, tmp_path_factory) -> study.Study:
    """The truth, a control of it and noise, put through the referee in a small world, and RLVR tuned."""
    folder = tmp_path_factory.mktemp("judged")
    sizes = {"steps": 150, "batch_size": 32, "hidden_size": 64}
    world = trial.toy.make(replace(trial.WORLD, folder=str(folder / "world"), **sizes))
    asked = study.Study(
        reward=(
            f"{REWARDS / 'steps.py'}:dense_on=token,gamma=0.0",
            f"{REWARDS / 'noise.py'}:dense_on=token,gamma=0.0",
        ),
        world=world.folder,
        arms=("rlvr", "steps.py", "steps.py-shuffled-100", "noise.py"),
        seeds=1,
        steps=1,
        tune=True,
        folder=str(folder / "runs"),
        eval_problems=2,
        held_out=8,
    )
    with pytest.MonkeyPatch.context() as patch:
        # equal after a step: the first is chosen
        patch.setattr(tuning, "CANDIDATES", {"rlvr": ("lr=1e-4", "")})
        patch.setattr(tuning, "FACTORS", ())
        patch.setattr(tuning, "N_SEEDS", 1)
        assert study.main(asked) == 0
    return asked


def runs_of(asked: study.Study) -> dict[str, dict]:
    """The reported runs of a study with a seed, by arm."""
    runs = figures.read_study(asked.json_file)["runs"]
    return {run["arm"]: run for run in runs if run["seed"] == 0}


def test_a_perfect_a_shuffled_and_a_random_signal_come_out_as_what_they_are(judged):
    """Shuffled among the tokens of a response, the truth still knows which responses are good."""
    runs = runs_of(judged)
    assert runs["steps.py"]["auc"]["1"] == 1
    assert runs["steps.py-shuffled-100"]["auc"]["1"] < 0.9
    assert runs["noise.py"]["auc"]["1"] == pytest.approx(0.5, abs=0.15)


def test_the_reported_runs_have_the_settings_that_were_chosen(judged):
    known = figures.read_study(judged.json_file)
    assert known["registered"]["tuned"] == {"rlvr": "lr=1e-4"}
    tried = {run["arm"]: run for run in known["runs"] if run["seed"] == 100}
    assert tried.keys() == {"rlvr", "rlvr:lr=1e-4"}
    assert tried["rlvr"]["series"].keys() == {"correct", "length"}, "the file is to stay small"
    own = runs_of(judged)["rlvr"]["settings"]
    assert {**own, "seed": 100} == tried["rlvr:lr=1e-4"]["settings"]
    assert own["lr"] == "1e-4" and tried["rlvr"]["settings"]["lr"] == 2e-4
    page = Path(judged.folder, "verdict.html").read_text()
    assert "**lr=1e-4 " in page, "the tuning table is part of the page"


def test_another_seed_is_another_plan(judged):
    """Which is said before settings are chosen, a matter of hours."""
    with pytest.raises(ValueError, match=r"registered.json has seeds=\[0, 0\], expected \[0, 1\]"):
        study.main(change(judged, seeds=2))


def test_a_study_goes_on_from_its_json_file_alone(judged, tmp_path):
    """What is missing there is run with the settings that were chosen, and gives the same curve."""
    known = figures.read_study(judged.json_file)
    before = runs_of(judged)
    left = [run for run in known["runs"] if (run["arm"], run["seed"]) != ("rlvr", 0)]
    elsewhere = change(
        judged, tune=False, folder=str(tmp_path / "runs"), json=str(tmp_path / "study.json")
    )
    figures.write_study(elsewhere.json_file, {**known, "runs": left})
    assert study.main(elsewhere) == 0
    assert [file.parent.name for file in tmp_path.glob("runs/*/seed-*.json")] == ["rlvr"]
    for name in ("settings", "series", "held_out"):
        assert runs_of(elsewhere)["rlvr"][name] == before["rlvr"][name]
    assert figures.read_study(elsewhere.json_file)["registered"] == known["registered"]


def test_a_machine_that_makes_other_base_models_takes_other_seeds(judged, tmp_path):
    """Runs of a seed are pairs only on one base model; what was begun elsewhere is not run here."""
    known = figures.read_study(judged.json_file)
    left = [run for run in known["runs"] if (run["arm"], run["seed"]) != ("rlvr", 0)]
    known["registered"]["seeds"] = [0, 1]
    folder = str(tmp_path / "runs")
    here = change(judged, tune=False, seeds=2, folder=folder, json=str(tmp_path / "study.json"))
    figures.write_study(here.json_file, {**known, "base": "another machine's", "runs": left})
    with pytest.raises(ValueError, match="seed 0 has runs on another base model in"):
        study.main(here)
    assert study.main(change(here, first_seed=1, seeds=1, arms=("rlvr",))) == 0
    both = figures.read_study(here.json_file)
    assert figures.bases_of(both) == ["another machine's", known["base"]]
    bases = {run["seed"]: run["base"] for run in both["runs"]}
    assert bases == {0: 0, 1: 1, 100: 0}


def test_the_page_of_evidence_has_a_section_for_each_study_that_is_there(
    judged, tmp_path, monkeypatch
):
    """And nothing for those that are not."""
    page = Path(shutil.copy(ROOT / "docs" / "evidence.md", tmp_path))
    monkeypatch.setattr(evidence, "PAGE", page)
    monkeypatch.setattr(evidence, "STUDY", tmp_path)
    settings = evidence.Settings(folder=str(tmp_path), tracked=True)
    assert evidence.main(settings) == 0
    empty = page.read_text()
    for name in (*evidence.JUDGED, "beyond", "worlds"):
        assert f"<!-- {name} -->\n\n<!-- end of {name} -->" in empty
    shutil.copy(judged.json_file, tmp_path / "content.json")
    known = figures.read_study(judged.json_file)
    for n_expert, wrong, arm in (
        (48, {}, "rlvr"),
        (9, {}, "noise.py"),
        (48, {"expert_wrong": 0.1}, ""),
    ):
        world = {**known["world"], "n_expert": n_expert, **wrong}
        runs = []
        for run in known["runs"]:
            if run["seed"] == 0 or n_expert == 9:  # one study has chosen its settings
                runs.append({**run, "arm": "sft"} if run["arm"] == arm else run)
        figures.write_study(
            tmp_path / f"beyond-{n_expert}-{len(wrong)}.json",
            {"base": "x", "world": world, "runs": runs},
        )
    assert evidence.main(settings) == 0
    assert evidence.main(change(settings, check=True)) == 0
    text = page.read_text()
    assert "4 finished runs of 4 arms, 1 steps each, seeds 0 to 0 on 1 base models" in text
    assert "| `steps.py-shuffled-100` | `steps.py` | 1 |" in text
    assert "**lr=1e-4 " in text and "### Beyond the experts" in text
    assert "| arm | 9 | 48 | 48, 10% wrong |" in text
    assert "Chosen with 9 solutions, on seeds from 100 on:" in text
    assert "| `rlvr` | **as it is " in text, "of equals the one that is named first"
    assert "Chosen with 48" not in text
    (row,) = [line for line in text.splitlines() if line.startswith("| `sft` |")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[3] == "–" and cells[1].endswith(", 1")
    assert (tmp_path / "content.png").stat().st_size > 3000
    assert "<!-- form -->\n\n<!-- end of form -->" in text


# ---- What is registered
def test_all_files_of_a_reward_are_registered(tmp_path):
    """Regression: whitened_flow.py begins with what ridge.py fits, and only the former was hashed."""
    asked = study.Study(
        reward=(f"white={REWARDS / 'whitened_flow.py'}",),
        arms=("white", "white-shuffled-100", "process"),
        folder=str(tmp_path),
    )
    files = study.plan_of(asked)["files"]
    assert list(files) == ["process_reward.py", "ridge.py", "shuffled.py", "whitened_flow.py"]
    file = tmp_path / "mine.py"
    for text, imported in (
        ("import helper", True),
        ("from helper import x", True),
        ("x = 'helper.py'", True),
        ('"""Better than helper.py."""', False),
    ):
        (tmp_path / "helper.py").write_text("x = 1\n")
        file.write_text(text)
        assert (tmp_path / "helper.py" in methods.files_of(file)) == imported, text


def test_a_hash_is_of_what_code_does(tmp_path):
    def hash_of(text: str) -> str:
        (tmp_path / "a.py").write_text(text)
        return study.hash_of(tmp_path / "a.py")

    code = hash_of('"""Says."""\n\ndef f():\n    """More."""\n    return "1"\n')
    assert code == hash_of("def f():  # why\n    return '1'\n")
    assert code != hash_of('"""Says."""\n\ndef f():\n    """More."""\n    return "2"\n')


def test_arms_may_join_a_plan_and_nothing_else_changes():
    plan = {"arms": ["rlvr"], "settings": {"rlvr": {"lr": 1}}, "seeds": [0, 15], "steps": 60}
    part = {**plan, "seeds": [0, 3]}
    assert figures.extend(plan, part, 9, "it") == plan
    more = {**part, "arms": ["sft", "rlvr"], "settings": {"sft": {"lr": 2}}}
    whole = figures.extend(plan, more, 9, "it")
    assert whole["arms"] == ["rlvr", "sft"] and whole["settings"].keys() == {"rlvr", "sft"}
    assert whole["joined"] == [{"arms": ["sft"], "after_finished_runs": 9}]
    assert figures.extend(whole, plan, 12, "it") == whole
    for change_ in ({"steps": 61}, {"seeds": [0, 16]}, {"settings": {"rlvr": {"lr": 3}}}):
        with pytest.raises(ValueError, match="it has "):
            figures.extend(plan, {**plan, **change_}, 9, "it")
    there = {**whole, "seeds": [16, 19]}
    assert figures.join([plan, there])["seeds"] == [0, 19]


# ---- Tuning
def test_every_method_is_tuned_as_much():
    assert {len(each) for each in tuning.CANDIDATES.values()} == {tuning.N_CANDIDATES}
    assert len(tuning.candidates("mine.py", "coefficient_of_mine")) == tuning.N_CANDIDATES
    know_nothing = {"length", "noise"}
    assert set(study.METHODS) - know_nothing <= tuning.CANDIDATES.keys()
    for arm, candidates in tuning.CANDIDATES.items():
        assert candidates[0] == "" and len(set(candidates)) == tuning.N_CANDIDATES
        for changes in candidates[1:]:
            changed = study.make_run(tuning.with_changes(arm, changes), 0, study.Study())
            plain = study.make_run(arm, 0, study.Study())
            assert (changed.script, changed.settings) != (plain.script, plain.settings), changes


def test_methods_are_tuned_without_a_reward_of_a_file(judged, tmp_path, monkeypatch):
    """And from the JSON file alone, whose runs are not made again."""
    monkeypatch.setattr(tuning, "CANDIDATES", {"rlvr": ("lr=1e-4", "")})
    monkeypatch.setattr(tuning, "N_SEEDS", 1)
    known = figures.read_study(judged.json_file)
    del known["registered"]
    file = tmp_path / "study.json"
    asked = change(judged, reward=(), arms=("rlvr",), folder=str(tmp_path / "runs"), json=str(file))
    known["settings"] = study.preset("train_rl", asked)  # it evaluates with fewer samples
    figures.write_study(file, known)
    assert study.main(asked) == 0
    assert tuning.read_chosen(asked.folder) == tuning.chosen_in(known) == {"rlvr": "lr=1e-4"}


def test_a_control_takes_the_choice_of_what_it_is_of():
    catalogue = methods.make_catalogue([methods.read_reward(str(REWARDS / "mlp.py"))])

    def choice(arm: str, changes: str = "dense_coef=2.0") -> str:
        chosen = {"calibrated": changes, "mlp.py": "dense_coef={coefficient_of_mlp:4}"}
        return tuning.choice_of(arm, catalogue, chosen)

    for arm in ("calibrated", "calibrated-shuffled", "untrained", "hasty-flow", "calibrated-20x"):
        assert choice(arm) == "dense_coef=2.0", arm
    for arm in ("sft", "length", "noise", "logprob", "published", "rlvr"):
        assert choice(arm) == "", arm
    assert choice("calibrated-token") == "", "its coefficient is one of tokens"
    assert choice("mlp.py-untrained") == choice("mlp.py-shuffled-25") == choice("mlp.py") != ""


def test_an_arm_may_change_what_its_script_and_its_reward_are_told():
    catalogue = methods.make_catalogue()
    assert catalogue.find("entropy:alpha=0.8").script == ("study/entropy.py", "--alpha", "0.8")
    arm = catalogue.find("logprob:lowest=True,dense_clamp=-10.0,0.0")
    assert arm.settings["dense"][-1] == "lowest=True" and len(arm.settings["dense"]) == 4
    assert arm.settings["dense_clamp"] == ("-10.0", "0.0")
    with pytest.raises(ValueError, match=r"\['alpha'\] are no settings"):
        catalogue.find("rlvr:alpha=0.8")


def test_the_best_of_the_candidates_is_chosen_and_its_controls_follow(tmp_path):
    reward = (str(REWARDS / "noise.py"),)
    asked = study.Study(reward=reward, folder=str(tmp_path), arms=("rlvr", "noise.py"), seeds=1)
    tried = {
        "rlvr": tuning.candidates("rlvr", None),
        "noise.py": tuning.candidates("noise.py", "coefficient_of_noise"),
    }
    accuracies = {"rlvr": 0.2, "rlvr:lr=1e-4": 0.2, "rlvr:lr=4e-4": 0.1}
    accuracies |= dict.fromkeys(
        map("noise.py:dense_coef={{coefficient_of_noise:{}}}".format, (0.3, 2)), 0.5
    )
    runs = [a_run(arm, 100, value) for arm, value in accuracies.items()]
    runs.append(a_run("noise.py", 100, 0.9, status="failed"))
    runs.append(a_run("rlvr:lr=4e-4", 1, 1.0))
    chosen = tuning.choose({"runs": runs}, tried)
    assert chosen == {"rlvr": "", "noise.py": "dense_coef={coefficient_of_noise:0.3}"}
    (tmp_path / "chosen.json").write_text(json.dumps(chosen))
    for arm in ("noise.py", "noise.py-shuffled-25"):
        job = study.make_run(arm, 0, asked)
        assert job.settings["dense_coef"] == "{coefficient_of_noise:0.3}" and job.needs == (
            "coefficient_of_noise",
        )
    assert study.make_run("noise", 0, asked).settings["dense_coef"] == "{scale_noise}"
    for arm in ("sft", "distillation"):
        (tmp_path / "chosen.json").write_text(json.dumps({arm: "lr=4e-4"}))
        assert study.make_run(arm, 0, asked).settings["lr"] == "4e-4", "no control of calibrated"
    table = tuning.tuning_table({"runs": runs}, chosen)
    assert "| `rlvr` | **as it is 0.20 (0 of 1)**; lr=1e-4 0.20 (0 of 1); lr=4e-4 0.10" in table
    table = tuning.tuning_table({"runs": []}, {"sft": "lr=4e-4"})
    assert "| `sft` | **lr=4e-4**, as chosen in another study |" in table
    assert tuning.read_chosen(tmp_path / "nowhere") == {}


def test_a_chosen_setting_and_the_default_that_was_tried_are_kept_side_by_side():
    """Regression: after hours of runs their figures could not be put together."""
    tried = {**a_run("rlvr", 100, 0.2), "script": [], "settings": {"lr": 2e-4}}
    reported = {**a_run("rlvr", 2, 0.2), "script": [], "settings": {"lr": 4e-4}}
    bases = {"base": "x", "other_bases": ["y"]}
    here, there = ({**bases, "runs": [run]} for run in (tried, reported))
    assert len(figures.merge([here, there])["runs"]) == 2
    other = {**a_run("rlvr", 1, 0.2), "script": [], "settings": {"lr": 2e-4}}
    with pytest.raises(ValueError, match="runs of rlvr differ in settings"):
        figures.merge([there, {**bases, "runs": [other]}])


def test_a_number_that_is_read_later_may_be_multiplied(tmp_path):
    (tmp_path / "coefficient.txt").write_text("0.25")
    number = study.ReadLater(tmp_path / "coefficient.txt")
    assert f"{number} {number:3}" == "0.25 0.75"
