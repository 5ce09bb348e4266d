"""The world in English: worked solutions, exact labels of steps, the split of templates.

gsm_symbolic.jsonl holds what four templates of reasoning-gym 0.1.25 give for the seed 0; the package
itself needs a C compiler to be installed, and is not needed here.
"""

import itertools
import json
import random
import sys
from pathlib import Path

import pytest
from conftest import ROOT, read_lines

sys.path.append(str(ROOT / "study"))
import eval as evaluation
import study
import train_flow
import train_rl
import worlds
from infra import batching
from infra.data import ProblemSettings, load_problems
from infra.models import LoadingSettings, find_model
from infra.settings import change
from policy import load_policy
from rewards import Grader
from worlds import gsm, toy

MADE = {made["template"]: made for made in read_lines(Path(__file__).parent / "gsm_symbolic.jsonl")}
PLANTS, SPOTS, BALLS = (gsm.make_row(MADE[number]) for number in (7, 29, 44))
PROCESS_REWARD = ROOT / "study" / "rewards" / "process_reward.py"


# ---- Worked solutions
def test_a_worked_solution_becomes_lines():
    assert PLANTS["solution"] == "63*13=819\n819+32=851\n63*3=189\n851-189=662\n\\boxed{662}"
    assert PLANTS["answer"] == "662"
    assert PLANTS["problem"].endswith("remain with?\n")


@pytest.mark.parametrize(
    ("text", "equations"),
    [
        ("240 shrimp / 4 shrimp/minute = 60 minutes", ["240/4=60"]),
        ("There are 80 questions x 35/100 = 28 in all", ["35/100=28"]),  # for holds() to refuse
        ("He spent 8 x €9.50 = €76.00, so €80 - €76.00 = €4.", ["8*9.5=76", "80-76=4"]),
        ("350 puppies / 1,400 puppies * 100% = 25%", ["350/1400*100=25"]),
        ("Then $1900 * 30% = $570", ["1900*30/100=570"]),
        ("She needs 135 - 71 signatures. 135 - 71 = 64 signatures", ["135-71=64"]),
        ("The room's perimeter is 2(24+7) = 62", ["2*(24+7)=62"]),
        ("Thus 73 + 36 + T = 109 + T = 222", []),
        ("There are 7 girls and 3 boys, 10 in all", []),
        ("12÷6 = 2 times", ["12/6=2"]),
        ("He has 17-3=15 left", ["17-3=15"]),  # found, and for holds() to refuse
    ],
)
def test_find_equations(text, equations):
    assert gsm.find_equations(text) == equations


def test_a_solution_that_is_no_exact_chain_is_refused():
    assert gsm.make_row(MADE[36]) is None  # "80 questions x 35/100 = 28"
    wrong = {"answer_cot": "5 + 3 = 8\n8 * 2 = 17\n#### 17"}
    assert gsm.make_row({"question": "?", "answer": "17", "metadata": wrong}) is None
    elsewhere = {"answer_cot": "5 + 3 = 8\n8 * 2 = 16\n#### 17"}
    assert gsm.make_row({"question": "?", "answer": "17", "metadata": elsewhere}) is None
    short = {"answer_cot": "5 + 3 = 8\n#### 8"}
    assert gsm.make_row({"question": "?", "answer": "8", "metadata": short}) is None


@pytest.mark.parametrize(
    ("expression", "values"),
    [("3+4*5", [20, 23]), ("3+4+5", [7, 12]), ("2*(24+7)", [31, 62]), ("12/8", [1.5])],
)
def test_values_of_parts(expression, values):
    assert gsm.part_values(expression) == values


@pytest.mark.parametrize("expression", ["", "3+", "1/0", "2**9", "a+1", "-3+5", "f(2)", "3,4"])
def test_what_is_no_expression(expression):
    with pytest.raises(ValueError, match="no expression"):
        gsm.part_values(expression)


# ---- Labels
def labels(row: dict, response: str) -> list[bool]:
    return [step.is_right for step in gsm.label_steps(row["problem"], row["solution"], response)]


@pytest.mark.parametrize("row", [PLANTS, SPOTS, BALLS])
def test_worked_solutions_are_right_in_every_step(row):
    steps = gsm.label_steps(row["problem"], row["solution"], row["solution"])
    assert [row["solution"][step.start : step.end] for step in steps] == row["solution"].split(
        "\n"
    )[:-1]
    assert all(step.is_right for step in steps)
    assert gsm.progress(row["problem"], row["solution"], row["solution"]) == 1


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("63*3=189\n63*13=819\n819+32=851\n851-189=662\n\\boxed{662}", [True] * 4),  # any order
        ("63*13=819\n\\boxed{662}", [True]),
        ("63*13=829\n829+32=861\n63*3=189", [False, False, True]),  # a slip, and what follows
        ("63*13=829\n819+32=851", [False, False]),  # 819 was not found
        ("819+32=851", [False]),
        ("63*32=2016\n63-13=50", [False, False]),  # well calculated, and not on the way
        ("63*13=819\n63*13=819\n13*63=819", [True, False, False]),  # a step counts once
        ("600+219=819", [False]),  # the right result of numbers from nowhere
        ("63*13 = 819", [False]),  # not the form
        ("so 63*13=819", [False]),
        ("63*13=819 plants", [False]),
        ("819=819\n=819\n63*13=", [False, False, False]),
        ("63*13=819.0", [True]),
        ("63*13=819\\boxed{1}\n63*3=189", [True]),  # nothing counts after the box
        ("63*13=819\n63*3", [True]),  # no equals sign, no step
        ("63*13=819=819", [False]),
        ("63" + "*1" * 50 + "=63", [False]),  # too long
        ("", []),
    ],
)
def test_labels(response, right):
    assert labels(PLANTS, response) == right


def test_parts_of_a_step_are_right():
    """171+200+160=531 may be done in two steps, from left to right; they are one result."""
    products = "19*9=171\n20*10=200\n40*4=160\n"
    assert labels(BALLS, products + "171+200=371\n371+160=531") == [True] * 5
    assert labels(BALLS, products + "200+160=360\n360+171=531") == [True] * 3 + [False, False]
    of_balls = (BALLS["problem"], BALLS["solution"])
    assert gsm.progress(*of_balls, products + "171+200=371\n371+160=531") == 1
    assert gsm.progress(*of_balls, products + "171+200=371") == 0.75
    assert gsm.progress(*of_balls, "\\boxed{531}") == 0


def test_constants_are_those_that_the_solution_brings_in():
    assert gsm.constants(SPOTS["problem"], SPOTS["solution"]) == [100]
    assert gsm.constants(PLANTS["problem"], PLANTS["solution"]) == []
    assert labels(SPOTS, "230+120=350\n990+410=1400\n350/1400*100=25") == [True] * 3
    assert labels(SPOTS, "230+120=350\n990+410=1400\n350/1400=0.25\n0.25*100=25") == [True] * 4


def test_a_problem_finds_the_labels_of_its_world():
    problem, response = "7 +5 *3 -4>", r"7+5=2,2*3=6,6-4=2. \boxed{2}"
    assert worlds.label_steps(problem, None, response) == toy.label_steps(problem, response)
    assert worlds.progress(problem, None, r"7+5=2,2*3=5. \boxed{5}") == pytest.approx(1 / 3)
    steps = worlds.label_steps(PLANTS["problem"], PLANTS["solution"], "63*3=189\n3*3=9")
    assert steps == [(0, 8, True), (9, 14, False)]


def test_process_reward_sees_the_worked_solution(world, tmp_path):
    file = tmp_path / "train.jsonl"
    gsm.write_rows([PLANTS], file)
    model = find_model(world.path("model"), LoadingSettings())
    settings = ProblemSettings(problem_column="problem", template="none", max_prompt_tokens=1000)
    (problem,) = load_problems(str(file), settings, model)
    assert problem.solution == PLANTS["solution"]
    with Grader(("binary", str(PROCESS_REWARD)), n_workers=1) as grader:
        verdict = grader.grade(problem.text, "662", "63*3=189\n\\boxed{662}", True, row=problem)
    assert verdict.parts == {"binary": 1.0, "process_reward": 0.25}


# ---- Making the world
def stored_templates() -> dict:
    """Return the stored examples in the place of the package's functions: new names each time."""
    counter = itertools.count()

    def with_another_name(made: dict):
        def make(rng: random.Random, difficulty: float) -> dict:
            return {**made, "question": f"Nr. {next(counter)}: {made['question']}"}

        return make

    return {number: with_another_name(made) for number, made in MADE.items()}


def test_no_template_is_in_both_parts():
    training, testing = gsm.split_templates(gsm.World())
    assert len(testing) == 12
    assert sorted(training + testing) == sorted(gsm.TEMPLATES)
    assert gsm.split_templates(gsm.World()) == (training, testing)
    assert gsm.split_templates(gsm.World(seed=1)) != (training, testing)


def test_a_world_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setattr(gsm, "TEMPLATES", (7, 29, 36, 44))
    monkeypatch.setattr(gsm, "load_templates", stored_templates)
    fitted = []
    monkeypatch.setattr(gsm, "make_base", lambda world, rows, folder: fitted.append(rows))
    sizes = {"n_test_templates": 1, "n_train": 20, "n_test": 4, "n_expert": 5, "n_sft": 6}
    asked = gsm.World(str(tmp_path / "gsm"), **sizes, seed=1)
    made = worlds.make(asked)
    rows = {name: read_lines(made.path(f"{name}.jsonl")) for name in ("train", "test", "expert")}
    assert [len(part) for part in rows.values()] == [20, 4, 5]
    assert len(fitted[0]) == 6
    used = [{row["template"] for row in part} for part in rows.values()]
    assert not used[1] & (used[0] | used[2])
    problems = [row["problem"] for part in (*rows.values(), fitted[0]) for row in part]
    assert len(set(problems)) == 35
    assert worlds.kind_of(made.folder) == "gsm"
    worlds.make(asked)
    assert len(fitted) == 1
    with pytest.raises(ValueError, match="other settings .n_sft: 6, not 7"):
        worlds.make(gsm.World(made.folder, **{**sizes, "n_sft": 7}, seed=1))


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(gsm.PACKAGES, "no_such_module", "no-such-package")
    with pytest.raises(ValueError, match="needs .*no-such-package: pip install -r study/req"):
        worlds.make(gsm.World(str(tmp_path / "gsm")))
    assert not (tmp_path / "gsm").exists()


def test_fine_tuning_learns_the_solutions(world):
    """On a small model of another kind: the loss of the solutions falls, that of prompts is not in it."""
    policy = load_policy(world.path("model")).float()
    tokenizer = find_model(world.path("model"), LoadingSettings()).tokenizer
    solutions = [gsm.as_tokens(row, tokenizer) for row in (PLANTS, SPOTS)]
    assert tokenizer.decode(solutions[0].response_ids) == PLANTS["solution"] + tokenizer.eos_token
    batch = batching.collate(solutions)
    before = policy(batch).logp[batch.response_mask].mean().item()
    gsm.fine_tune(gsm.World(steps=8, batch_size=2, lr=3e-3), policy, solutions)
    assert policy(batch).logp[batch.response_mask].mean().item() > before + 0.5


def test_presets_are_settings_of_the_scripts():
    for script, module in {
        "train_rl": train_rl,
        "train_flow": train_flow,
        "eval": evaluation,
    }.items():
        preset = worlds.PRESETS[script]["gsm"]
        assert change(module.Config(), **preset) != module.Config()
        assert worlds.PRESETS[script]["toy"] == toy.PRESETS[script]["toy"]


def test_the_study_takes_the_settings_of_a_folder(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "world.json").write_text(json.dumps(gsm.settings_of(gsm.World())))
    asked = study.Study(world=str(folder))
    assert study.preset("train_rl", asked)["max_tokens"] == gsm.TRAIN_RL["max_tokens"]
    assert study.find_worlds(asked) == [gsm.World(str(folder))]
