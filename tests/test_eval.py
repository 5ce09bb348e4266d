"""Evaluation: names of sets, equal answers, whole evaluations, resuming, both engines."""

import json
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from conftest import ROOT, find_model_in, flags, problems_in, read_lines, run_with_vllm
from safetensors.torch import load_file, save_file
from test_distributed import output_of, start

import eval as evaluation
import rollout
import train_rl
from evals import sets
from evals.figures import GROUPS
from evals.sets import HUB_SETS, cluster
from grading import Pool
from infra.data import Problem
from infra.settings import change, flatten, parse_config
from rewards import Grader
from worlds import toy


# ---- Equal answers are one vote
def graded(*answers: tuple[str | None, str]) -> list[dict]:
    """Records of samples with these answers and verdicts."""
    return [{"extracted": extracted, "verdict": verdict} for extracted, verdict in answers]


def test_equal_answers_share_a_number():
    records = graded(
        ("1/2", "right"),
        ("0.5", "right"),
        ("2", "wrong"),
        (None, "no answer"),
        (r"\frac12", "right"),
        ("2.0", "wrong"),
        ("7", "cut"),
    )
    with Pool(1) as pool:
        assert cluster(records, pool) == [0, 0, 1, None, 0, 1, None]


def test_answers_that_took_too_long_are_compared_by_text():
    records = graded(("1/2", "right"), ("0.5", "timeout"), ("1/2", "timeout"), ("0.5", "timeout"))
    with Pool(1) as pool:
        assert cluster(records, pool) == [0, 1, 0, 1]


def test_long_answers_cost_no_deadlines():
    records = graded(*[("x" * (3000 + i // 2), "wrong") for i in range(8)])
    with Pool(1) as pool:
        assert cluster(records, pool) == [0, 0, 1, 1, 2, 2, 3, 3]
        assert pool.workers[0].process is None, "no worker was asked"


# ---- Sets
@pytest.fixture
def config(world, tmp_path) -> evaluation.Config:
    """An evaluation of the small world."""
    return change(
        evaluation.Config(),
        model=world.path("model"),
        data=(world.path("test.jsonl"),),
        template="none",
        max_tokens=16,
        samples=4,
        temperature=1.0,
        chunk=16,
        out=str(tmp_path / "out"),
    )


def test_names_of_sets(tmp_path):
    file = tmp_path / "a=b.jsonl"
    file.touch()
    specifications = ("math500", "mine=data/test.jsonl", "data/train.jsonl", "org/set", str(file))
    assert list(sets.name_sets(specifications)) == ["math500", "mine", "train", "set", "a=b"]
    with pytest.raises(ValueError, match="two sets are named 'test'"):
        sets.name_sets(("a/test.jsonl", "b/test.jsonl"))


@pytest.mark.parametrize(
    "specification",
    ["x" * 101 + "=test.jsonl", "x" * 300 + "=test.jsonl", "x" * 300, "a/b=test.jsonl", "../a=x.jsonl",
     "..=test.jsonl", "..", "a\nb=test.jsonl", ""],
)  # fmt: skip
def test_a_name_that_no_file_or_table_can_take_is_refused(specification):
    with pytest.raises(ValueError, match="is called .* expected a name of 1 to 100 printable"):
        sets.name_sets([specification])


@pytest.mark.parametrize(
    "twice", [["a.jsonl", "a.jsonl"], ["a=x.jsonl", "a=y.jsonl"], ["math500"] * 2]
)
def test_a_set_that_is_named_twice_is_refused(twice):
    with pytest.raises(
        ValueError, match="two sets are named '.*'; name them apart with NAME=SOURC"
    ):
        sets.name_sets(twice)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("math500", ("math500", "", None)),
        ("math500=mine.jsonl", ("math500", "mine.jsonl", None)),
        ("gsm8k:train", ("gsm8k", "", "train")),
        ("org/set:validation", ("set", "org/set", "validation")),
        ("mine=org/set:train[:100]", ("mine", "org/set", "train[:100]")),
        ("mine=a:10/set:test", ("mine", "a:10/set", "test")),
        ("mine=hf://datasets/set", ("mine", "hf://datasets/set", None)),
        ("mine=here:train", ("mine", "here:train", None)),
        ("here:train", ("here:train", "here:train", None)),
        ("mine=here:train:test", ("mine", "here:train", "test")),
    ],
)
def test_splits_of_sets(text, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("here:train").mkdir()
    assert sets.parse_specification(text) == expected


def test_the_text_of_a_users_reward_is_in_the_samples(config, world, tmp_path):
    file = tmp_path / "mine.py"
    source = "def reward(problem, response, answer):\n    return {'reward': 1, 'text': f'for {answer}'}\n"
    file.write_text(source)
    evaluation.main(change(config, reward=(str(file),), out=str(tmp_path / "out")))
    records = read_lines(tmp_path / "out" / "samples.jsonl")
    finished = [record for record in records if record["finish_reason"] == "stop"]
    assert finished and all(record["text"] == f"for {record['answer']}" for record in finished)


def test_two_splits_of_one_folder(config, tmp_path):
    rows = {split: [{"problem": "1+1>", "answer": split}] for split in ("easy", "hard", "test")}
    splits = {split: datasets.Dataset.from_list(rows[split]) for split in rows}
    saved = tmp_path / "saved"
    datasets.DatasetDict(splits).save_to_disk(saved)
    folder = tmp_path / "folder"
    folder.mkdir()
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text(json.dumps({"problem": "2>", "answer": split}))
    settings = change(config.problems, problem_column="problem", max_prompt_tokens=64)
    specifications = (f"a={saved}:easy", f"b={saved}:hard", str(saved), f"{folder}:validation")
    loaded = sets.load_sets(specifications, settings, find_model_in(config.model))
    answers = {name: problems[0].answer for name, problems in loaded.items()}
    assert answers == {"a": "easy", "b": "hard", "saved": "test", "folder": "validation"}
    for source in (saved / "easy", folder / "train.jsonl"):
        with pytest.raises(ValueError, match=f"{source} has no splits; leave out :easy"):
            sets.load_sets((f"a={source}:easy",), settings, find_model_in(config.model))


def test_sets_are_loaded_by_name(config, world):
    model = find_model_in(config.model)
    settings = change(config.problems, problem_column="problem", max_prompt_tokens=64)
    specifications = (f"mine={world.path('test.jsonl')}", world.path("train.jsonl"))
    loaded = sets.load_sets(specifications, settings, model)
    assert {name: len(problems) for name, problems in loaded.items()} == {"mine": 16, "train": 64}


def test_ids_must_be_unique(config, tmp_path):
    file = tmp_path / "double.jsonl"
    file.write_text('{"id": "a", "problem": "1", "answer": "1"}\n' * 2)
    settings = change(config.problems, problem_column="problem", max_prompt_tokens=64)
    with pytest.raises(ValueError, match="1 ids stand more than once, e.g. 'a'"):
        sets.load_sets((str(file),), settings, find_model_in(config.model))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "samples=4 at temperature 0 are copies"),
        ({"temperature": -1.0}, "--temperature=-1.0: expected a number from 0 to 100"),
        ({"top_p": 1.5}, "--top-p=1.5: expected a number above 0, at most 1"),
        ({"samples": 0}, "--samples=0: expected a whole number from 1"),
        ({"max_tokens": 8192}, r"\d+ \+ 8192, are more than the model's 8192 positions"),
        ({"data": None}, "no data given"),
        ({"judge_model": "m"}, "a judge is given, and no set of .'test'. asks one"),
    ],
)
def test_bad_settings(config, changes, message):
    with pytest.raises(ValueError, match=message):
        evaluation.main(change(config, **changes))


def test_a_folder_of_something_else_is_left_alone(config, world):
    with pytest.raises(ValueError, match="something other than an evaluation"):
        evaluation.main(change(config, out=world.folder))


# ---- How long a response may be
def make_problems_of(*lengths: int) -> list[Problem]:
    """Problems whose prompts have these lengths."""
    return [Problem(str(length), "1+1", "2", [0] * length) for length in lengths]


def model_with(positions: int, processor=None) -> SimpleNamespace:
    """What choose_limits looks at in a model."""
    text_config = SimpleNamespace(max_position_embeddings=positions)
    return SimpleNamespace(text_config=text_config, processor=processor)


@pytest.mark.parametrize(
    ("positions", "processor", "expected"),
    [
        (32768, None, {100: 8192, 300: 8192}),
        (4096, None, {100: 3996, 300: 3796}),
        (8300, None, {100: 8192, 300: 8000}),
        (128000, "images", {100: 8092, 300: 7892}),
        (4096, "images", {100: 3996, 300: 3796}),
    ],
)
def test_responses_are_as_long_as_in_the_official_evaluation(
    positions, processor, expected, capsys
):
    """Each response by its own prompt: the longest prompt of all sets shortens no others."""
    problems = {"a": make_problems_of(100, 300), "b": make_problems_of(200)}
    longest_prompt = evaluation.find_longest_prompt(problems)
    assert longest_prompt == 300
    model = model_with(positions, processor)
    config, max_length = evaluation.choose_limits(evaluation.Config(), model, longest_prompt)
    sampling = rollout.Sampling(max_tokens=config.max_tokens, max_length=max_length)
    for length, room in expected.items():
        assert sampling.room(rollout.Request([0] * length, seed=0)) == room
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == int(expected[300] < 8192)


def test_a_prompt_that_leaves_no_room():
    with pytest.raises(ValueError, match="has 512 tokens, which leaves no room in 512"):
        evaluation.choose_limits(evaluation.Config(), model_with(512), 512)


def test_the_engine_has_room_for_the_longest_prompt_and_response(config, monkeypatch, capsys):
    class Stop(Exception):
        pass

    def make_engine(model, settings, capacity, **_):
        raise Stop(capacity.max_length)

    monkeypatch.setattr(evaluation, "make_engine", make_engine)
    positions = find_model_in(config.model).text_config.max_position_embeddings
    with pytest.raises(Stop) as stopped:
        evaluation.main(change(config, max_tokens=None))
    assert stopped.value.args == (positions,)
    assert f"may have {positions} tokens together" in capsys.readouterr().out
    stored = json.loads(Path(config.out, "config.json").read_text())["config"]
    assert stored["max_tokens"] == positions
    longest_prompt = max(len(problem.prompt_ids) for problem in problems_in(config.data[0]))
    with pytest.raises(Stop) as stopped:
        evaluation.main(change(config, out=f"{config.out}-16"))
    assert stopped.value.args == (longest_prompt + 16,)


def test_a_set_is_scored_alike_whatever_sets_are_beside_it(config, tmp_path):
    """Regression: the longest prompt of all sets bounded the responses of every set."""
    model = tmp_path / "model"  # of few positions, so that prompts leave little
    shutil.copytree(config.model, model)
    values = json.loads((model / "config.json").read_text())
    values["max_position_embeddings"] = 60
    (model / "config.json").write_text(json.dumps(values))
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"problem": "7 " + "+5 " * 17 + ">", "answer": "1"}) + "\n")
    responses = {}
    for name, beside in {"alone": (), "beside": (str(long),)}.items():
        out = tmp_path / name
        data = (*config.data, *beside)
        settings = {"model": str(model), "data": data, "max_tokens": None, "out": str(out)}
        evaluation.main(change(config, **settings))
        records = read_lines(out / "samples.jsonl")
        responses[name] = {}
        for record in records:
            key = (record["set"], record["problem"], record["sample"])
            responses[name][key] = (record["response"], record["tokens"])
    assert max(n_tokens for _, n_tokens in responses["alone"].values()) > 10
    of_the_long = [n for (name, *_), (_, n) in responses["beside"].items() if name == "long"]
    assert max(of_the_long) == 60 - 54, "what its own prompt leaves"
    for key, response in responses["alone"].items():
        assert responses["beside"][key] == response


# ---- Responses that ran out of room
@pytest.mark.parametrize(
    ("arguments", "is_graded"),
    [([], True), (["--no-grade-truncated"], False), (["--grade-truncated"], True)],
)
def test_a_response_that_was_cut_is_graded_unless_told_otherwise(arguments, is_graded, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["eval.py", *arguments])
    config = parse_config(evaluation.Config, toy.PRESETS["eval"])
    assert config.max_tokens == 96, "the preset of the embedded world still holds"
    with Grader(config.reward, config.grading, n_workers=1) as grader:
        verdict = grader.grade("1+1", "2", r"so \boxed{1} or \boxed{2}, or", finished=False)
    assert verdict.kind == ("right" if is_graded else "cut")
    assert not train_rl.Config().grading.grade_truncated, "training is strict"


# ---- Whole evaluations
def test_a_killed_evaluation_goes_on_to_the_same_file(config, tmp_path):
    evaluation.main(config)
    out = tmp_path / "out"
    file = out / "samples.jsonl"
    whole = file.read_bytes()
    summary = (out / "summary.json").read_text()
    for size in (0, 1, len(whole) // 3, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])  # a kill may have cut it off anywhere
        (out / "summary.json").unlink()
        evaluation.main(config)
        assert file.read_bytes() == whole
        assert (out / "summary.json").read_text() == summary


def test_the_folder_of_an_evaluation(config, tmp_path):
    evaluation.main(config)
    out = tmp_path / "out"
    records = read_lines(out / "samples.jsonl")
    assert len(records) == 64
    assert len({(record["problem"], record["sample"]) for record in records}) == 64
    keys = "set problem sample seed question prompt answer response extracted reward correct"
    keys += " verdict finish_reason tokens cluster"
    assert list(records[0]) == keys.split()
    stored = json.loads((out / "config.json").read_text())
    assert stored["config"]["samples"] == 4
    assert "torch" in stored["versions"]
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary) == ["config", "versions", "sets", "averages", "benchmarks"]
    assert summary["averages"] == {}, "there is one set"
    assert summary["config"] == stored["config"] | {"judge_url": None, "judge_model": None}
    assert "avg@n" in (out / "summary.md").read_text()
    assert (out / "report.html").exists()


def test_averages_of_an_evaluation(config, world, tmp_path, capsys):
    data = (f"math500={world.path('test.jsonl')}", f"minerva={world.path('train.jsonl')}")
    evaluation.main(change(config, data=(*data, world.path("test.jsonl"))))
    out = tmp_path / "out"
    summary = json.loads((out / "summary.json").read_text())
    means = {name: row["avg"]["mean"] for name, row in summary["sets"].items()}
    averages = summary["averages"]
    assert list(averages) == ["all", "maths"]
    assert averages["all"]["mean"] == pytest.approx(sum(means.values()) / 3)
    assert averages["maths"]["mean"] == pytest.approx((means["math500"] + means["minerva"]) / 2)
    mean = f"{averages['maths']['mean']:.1%}"
    row = f"| maths             | {mean:>5} |"
    assert row in (out / "summary.md").read_text()
    assert row in capsys.readouterr().out
    assert "average over sets" in (out / "report.html").read_text()


def test_a_folder_with_other_settings_is_left_alone(config, tmp_path):
    evaluation.main(config)
    expected = "holds an evaluation with seed=0 .now 1.; give the same settings, or another --out"
    with pytest.raises(ValueError, match=expected):
        evaluation.main(change(config, seed=1))
    file = tmp_path / "out" / "config.json"
    stored = json.loads(file.read_text())
    del stored["config"]["grade_truncated"]  # as an earlier version wrote it
    file.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="another version of eval.py.* has no grade_truncated"):
        evaluation.main(config)


@pytest.mark.parametrize(
    ("model", "folder"),
    [
        ("runs/rl-a-flow/policy", "runs/eval-rl-a-flow"),
        ("runs/rl-b-none/policy/", "runs/eval-rl-b-none"),
        ("runs/rl-a-flow/exports/step-50/policy", "runs/eval-rl-a-flow-step-50"),
        ("models/Qwen", "runs/eval-Qwen"),
        ("models/../models/Qwen", "runs/eval-Qwen"),
        ("Qwen/Qwen2.5-7B", "runs/eval-Qwen2.5-7B"),
        ("org/policy", "runs/eval-policy"),
        ("toy", "runs/eval-toy"),
    ],
)
def test_the_default_folder_is_named_after_the_run(model, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if model.startswith(("runs", "models")):
        Path(model).mkdir(parents=True)
    assert evaluation.default_folder(model) == folder


def test_the_default_folder_from_within_a_run(tmp_path, monkeypatch):
    (tmp_path / "rl-a" / "policy").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "rl-a")
    assert evaluation.default_folder("policy") == "runs/eval-rl-a"
    monkeypatch.chdir(tmp_path / "rl-a" / "policy")
    assert evaluation.default_folder(".") == "runs/eval-rl-a"


def test_an_evaluation_does_not_go_on_with_other_weights(config, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(config.model, model)
    config = change(config, model=str(model))
    evaluation.main(config)
    file = tmp_path / "out" / "config.json"
    stored = json.loads(file.read_text())
    assert len(stored["weights"]) == 32
    (weights,) = model.glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match="evaluation of other weights, .*; name another --out"):
        evaluation.main(config)
    content[-1] ^= 1
    weights.write_bytes(content)
    evaluation.main(config)
    del stored["weights"]  # as an earlier version wrote it
    file.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="another version of eval.py.* has no weights"):
        evaluation.main(config)


def model_in(path, commit: str | None = None) -> SimpleNamespace:
    """What identify_weights looks at in a model."""
    return SimpleNamespace(path=str(path), config=SimpleNamespace(_commit_hash=commit))


def test_what_tells_weights_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "SMALL_FILE", 1000)
    monkeypatch.setattr(evaluation, "BLOCK", 10)
    seen = {evaluation.identify_weights(model_in("org/model", "c0ffee"))}
    assert seen == {"c0ffee"}
    assert evaluation.identify_weights(model_in("org/model")) is None

    def is_new() -> bool:
        identity = evaluation.identify_weights(model_in(tmp_path))
        if identity in seen:
            return False
        seen.add(identity)
        return True

    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(bytes(1000))
    assert is_new()
    file.write_bytes(bytes(999) + b"1")
    assert is_new(), "a small file is read to its end"
    file.write_bytes(bytes(1001))
    assert is_new()
    file.write_bytes(bytes(1000) + b"1")
    assert is_new(), "the last block of a large file reaches to its end"
    file.write_bytes(b"1" + bytes(1000))
    assert is_new()
    file.rename(tmp_path / "another.bin")
    assert is_new()
    (tmp_path / "model.safetensors").write_bytes(b"1")
    assert is_new()
    (tmp_path / "config.json").write_text("{}")
    assert not is_new(), "it holds no weights"


def test_a_comparison_is_printed_and_written(config, tmp_path, capsys):
    evaluation.main(config)
    folder = config.out
    evaluation.main(evaluation.Config(compare=(folder, folder), out=str(tmp_path / "comparison")))
    text = (tmp_path / "comparison" / "comparison.md").read_text()
    assert "0 problems flipped" in text
    assert text in capsys.readouterr().out


def test_the_page_on_evaluation_agrees_with_the_code(config, tmp_path):
    """Flags, sets, groups, and what a folder holds, as evals/README.md names them."""
    page = " ".join((ROOT / "evals" / "README.md").read_text().split())
    known = {f"--{name.replace('_', '-')}" for name in flatten(evaluation.Config())}
    known.add("--eval-data")  # of train_rl.py
    known.add("--no-grade-truncated")
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page)) <= known
    assert f"a name: `{' '.join(HUB_SETS)}`" in page
    for group, members in GROUPS.items():
        assert f"`{group}` over `{' '.join(members)}`" in page
    assert f"may have {evaluation.OFFICIAL_LENGTH} tokens" in page
    assert f"have {toy.EVALUATE['max_tokens']}." in page
    evaluation.main(config)
    keys = read_lines(tmp_path / "out" / "samples.jsonl")[0]
    assert f"`{' '.join(keys)}`" in page
    for file in (tmp_path / "out").iterdir():
        assert f"| `{file.name}` |" in page


@pytest.fixture(scope="module")
def never_killed(world, tmp_path_factory) -> evaluation.Config:
    """An evaluation on one rank that nobody kills."""
    config = change(
        evaluation.Config(),
        model=world.path("model"),
        data=(world.path("train.jsonl"),),
        template="none",
        max_tokens=48,
        samples=2,
        temperature=1.0,
        chunk=8,
        out=str(tmp_path_factory.mktemp("never-killed") / "out"),
    )
    evaluation.main(config)
    return config


@pytest.mark.distributed
# how a signal stops an evaluation stands in tests/test_stopping.py
@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_process_killed_halfway_goes_on(never_killed, tmp_path, number):
    """Killed on two ranks and finished on one, it is the file of one that was never killed."""
    killed = tmp_path / "out"
    config = change(never_killed, out=str(killed))
    process = start("eval.py", flags(config))
    file = killed / "samples.jsonl"
    while not (file.exists() and file.stat().st_size > 2000):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    output_of(process)
    size_when_killed = file.stat().st_size
    evaluation.main(config)
    assert size_when_killed < file.stat().st_size
    assert file.read_bytes() == Path(never_killed.out, "samples.jsonl").read_bytes()


def write_hub_set(name: str, problems: list[dict]) -> None:
    """Write problems into a folder with the name, columns and splits that a set has on the hub."""
    hub_set = HUB_SETS[name]
    rows = []
    for problem in problems:
        answer = problem["answer"]
        if name == "gsm8k":
            answer = f"so\n#### {answer}"
        if name == "olympiad_bench":
            answer = [answer]
        rows.append({hub_set.problem_column: problem["problem"], hub_set.answer_column: answer})
    folder = Path(hub_set.source, hub_set.subset or "")
    folder.mkdir(parents=True)
    (folder / f"{hub_set.split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    if hub_set.subset:
        (folder.parent / "README.md").write_text(
            f"---\nconfigs:\n- config_name: {hub_set.subset}\n  data_files:\n"
            f"  - split: {hub_set.split}\n    path: {hub_set.subset}/{hub_set.split}.jsonl\n---\n"
        )


@pytest.mark.parametrize("engine", ["torch", pytest.param("vllm", marks=pytest.mark.vllm)])
def test_all_sets_by_their_hub_ids(config, world, tmp_path, monkeypatch, engine):
    monkeypatch.chdir(tmp_path)
    problems = read_lines(world.path("test.jsonl"))[:3]
    for name in HUB_SETS:
        write_hub_set(name, problems)
    data = tuple(HUB_SETS)
    run_with_vllm(evaluation.main, change(config, data=data, engine=engine, max_sequences=16))
    rows = json.loads((tmp_path / "out" / "summary.json").read_text())["sets"]
    assert list(rows) == list(HUB_SETS)
    assert all((row["problems"], row["samples"]) == (3, 4) for row in rows.values())
    answers = {name: [] for name in HUB_SETS}
    for record in read_lines(tmp_path / "out" / "samples.jsonl"):
        if record["sample"] == 0:
            answers[record["set"]].append(record["answer"])
    expected = [problem["answer"] for problem in problems]
    assert answers["gsm8k"] == expected
    assert answers["olympiad_bench"] == [[answer] for answer in expected]


def test_an_evaluation_is_written_to_the_folder_of_its_run(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for run in ("rl-a", "rl-b"):
        shutil.copytree(config.model, f"runs/{run}/policy")
        evaluation.main(
            change(
                config,
                model=f"runs/{run}/policy",
                out=None,
                max_tokens=1,
                samples=1,
                temperature=0.0,
            )
        )
        assert Path(f"runs/eval-{run}/summary.json").exists()


def test_the_switch_for_cut_responses_reaches_the_grader(config, tmp_path):
    for graded in (True, False):
        out = tmp_path / str(graded)
        evaluation.main(change(config, max_tokens=1, grade_truncated=graded, out=str(out)))
        cut = [r for r in read_lines(out / "samples.jsonl") if r["finish_reason"] == "length"]
        assert cut and all((r["verdict"] == "cut") != graded for r in cut)


# ---- Rewards that are refused
def test_a_reward_that_is_refused_claims_no_folder(config, tmp_path):
    """The folder of a mistyped reward refused the right one."""
    with pytest.raises(ValueError, match="reward 'binari': neither binary"):
        evaluation.main(change(config, reward=("binari",)))
    assert not (tmp_path / "out").exists()


# ---- Models that compute nothing
def damage(model: str, folder: Path) -> str:
    """Copy a model and make one of its weights NaN."""
    shutil.copytree(model, folder)
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, file, {"format": "pt"})
    return str(folder)


@pytest.mark.parametrize(
    ("engine", "temperature"),
    [("torch", 0.0), ("torch", 1.0), pytest.param("vllm", 0.0, marks=pytest.mark.vllm)],
)
def test_a_model_of_nan_is_an_error(config, tmp_path, engine, temperature):
    """It was 0 % of the problems, with exit code 0."""
    samples = {"samples": 1 if temperature == 0 else 2, "temperature": temperature}
    model = damage(config.model, tmp_path / "broken")
    broken = change(config, model=model, engine=engine, **samples)
    with pytest.raises(
        FloatingPointError, match="the model .*broken gives tokens the probability NaN"
    ):
        run_with_vllm(evaluation.main, broken)
    assert not (tmp_path / "out" / "summary.json").exists()
