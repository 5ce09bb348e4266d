"""Data that cannot be used: one sentence that names file, row and value, in training and evaluation."""

import json
import shutil

import pyarrow
import pytest
from conftest import find_model_in
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from engines.torch_engine import TorchEngine
from evals import sets
from infra import vision
from infra.data import ProblemSettings, load_problems, load_rows, template_pattern
from infra.defaults import choose_template
from infra.rows import check_answers, read_rows
from infra.solutions import SolutionSettings, load_solutions

GOOD = {"problem": "1 +2>", "answer": "3", "solution": r"\boxed{3}"}
SETTINGS = {"problem_column": "problem", "template": "none", "max_prompt_tokens": 64}


def lines(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


# name of the file, its contents, words of the error
BAD_FILES = {
    "a number": ("d.jsonl", lines(GOOD, 5), "line 2: 5 is no object; expected one object a line"),
    "a list": ("d.jsonl", lines(GOOD, [1, 2]), r"line 2: \[1, 2\] is no object"),
    "null": ("d.jsonl", lines(GOOD, None), "line 2: None is no object"),
    "a text": ("d.jsonl", lines(GOOD, "x"), "line 2: 'x' is no object"),
    "arrays in an array": ("d.json", "[[1, 2], [3, 4]]", r"row 0: \[1, 2\] is no object; .*array"),
    "arrays in a line": ("d.jsonl", "[[1, 2], [3, 4]]", r"line 1: \[\[1, 2\].* is no object"),
    "null in an array": ("d.json", json.dumps([GOOD, None]), "row 1: None is no object"),
    "a torn line": ("d.jsonl", lines(GOOD, GOOD)[:-9], "line 2: .* is not JSON"),
    "a torn array": ("d.json", json.dumps([GOOD, GOOD])[:-9], "is not JSON"),
    "Latin-1": ("d.jsonl", '{"problem": "ü"}\n'.encode("latin-1"), "line 1: byte 0xfc is not UTF-8"),
    "UTF-16": ("d.jsonl", lines(GOOD).encode("utf-16"), "line 1: byte 0xff is not UTF-8"),
    "Latin-1 in CSV": ("d.csv", "problem,answer\nü,1\n".encode("latin-1"), "expected CSV in UTF-8"),
    "bytes": ("d.jsonl", b"\x00\x01\x02\xff" * 99, "line 1: byte 0xff is not UTF-8"),
    "brackets": ("d.jsonl", '{"problem": ' + "[" * 10_000 + "]" * 10_000 + "}\n", "is not JSON"),
    "a number without end": ("d.jsonl", '{"problem": ' + "1" * 9_999 + "}\n", "line 1: .* is not JSON"),
    "nothing": ("d.jsonl", "", "holds no rows"),
    "nothing in JSON": ("d.json", "", "holds no rows"),
    "an empty array": ("d.json", "[]", "holds no rows"),
    "nothing in CSV": ("d.csv", "", "holds no rows"),
    "only names": ("d.csv", "problem,answer\n", "holds no rows"),
    "a cell too few": ("d.csv", "problem,answer,solution\na,1\n", "row 0: expected a cell for each of problem, answer"),
    "a cell too many": ("d.csv", "problem,answer,solution\na,1,b,c\n", "row 0: expected a cell for each"),
    "an open quote": ("d.csv", 'problem,answer\n"a,1\n', "expected CSV in UTF-8"),
    "a problem that is a number": ("d.jsonl", lines(GOOD, GOOD | {"problem": 7}), "row 1: problem is 7; expected a text"),
    "a problem that is a list": ("d.jsonl", lines(GOOD, GOOD | {"problem": ["a"]}), r"row 1: problem is \['a'\]; expected a text"),
    "a problem that is blank": ("d.jsonl", lines(GOOD, GOOD | {"problem": " \n"}), "'problem' of .* is empty .* row 1"),
    "half a surrogate pair": ("d.jsonl", '{"problem": "\\ud800", "answer": "1", "solution": "2"}\n', r"row 0: problem has the lone surrogate '\\ud800'"),
}  # fmt: skip


def write(folder, name: str, content: str | bytes) -> str:
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(file)


@pytest.fixture(scope="module")
def model(world):
    return find_model_in(world.path("model"))


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files(model, tmp_path, kind):
    name, content, words = BAD_FILES[kind]
    file = write(tmp_path, name, content)
    settings = ProblemSettings(**SETTINGS)
    for load in (
        lambda: load_problems(file, settings, model),
        lambda: sets.load_sets([f"mine={file}"], settings, model),
        lambda: load_solutions(file, SolutionSettings(cutoff=128, **SETTINGS), model),
    ):
        with pytest.raises(ValueError, match=words) as refused:
            load()
        assert str(refused.value).count(file) == 1 and "\n" not in str(refused.value)


# Of no answer in these can a response be right
BAD_ANSWERS = [
    " ",
    "####",
    "so it is 5 #### ",
    "$$",
    r"\boxed{}",
    r"\text{ }",
    "...",
    "+",
    {"a": 1},
]
BAD_ANSWERS += [["1", None], ["1", " "], [["1"]], float("nan"), float("inf")]


@pytest.mark.parametrize("answer", BAD_ANSWERS, ids=repr)
def test_an_answer_that_nothing_can_meet(model, tmp_path, answer):
    file = write(tmp_path, "d.jsonl", lines(GOOD, GOOD | {"answer": answer}))
    with pytest.raises(ValueError, match="row 1") as refused:
        load_problems(file, ProblemSettings(**SETTINGS), model)
    assert "answer" in str(refused.value) and file in str(refused.value)


def test_a_float_that_has_lost_digits():
    with pytest.raises(
        ValueError, match=r"d, row 0: answer is 1.23\d*e\+17, a float that has lost"
    ):
        check_answers([123456789012345678.0], "d", "answer")


def test_answers_that_can_be_met():
    answers = ["3", r"\pi", "∅", "π", "十", "so #### 18", 0, -1, 0.5, 123456789012345678, True]
    check_answers([*answers, ["1", 2]], "d", "answer")


def test_csv_keeps_long_integers_and_leading_zeros(model, tmp_path):
    file = write(tmp_path, "d.csv", '﻿problem,answer\n"a, b",123456789012345678\nc,007\n')
    problems = load_problems(file, ProblemSettings(**SETTINGS), model)
    assert [problem.answer for problem in problems] == ["123456789012345678", "007"]
    assert problems[0].text == "a, b"


def test_arrays_and_lines_give_the_same_rows(tmp_path):
    rows = [GOOD, GOOD | {"answer": ["1", 2], "extra": " "}]
    array = write(tmp_path, "a.json", "﻿ " + json.dumps(rows, indent=1))
    assert read_rows(array) == rows
    for name in ("b.json", "b.jsonl"):
        assert read_rows(write(tmp_path, name, "\n" + lines(*rows) + "\n")) == rows


@pytest.mark.parametrize("name", ["a[1]", "b*c", "d?e", "f[!x]", "g**h"])
def test_names_that_look_like_patterns(tmp_path, name):
    """A pattern also matches the file of another name."""
    for stem in (name, name.replace("*", "x").replace("?", "x")):
        table = pyarrow.table({"problem": [stem], "answer": ["1"]})
        parquet.write_table(table, tmp_path / f"{stem}.parquet")
    file = str(tmp_path / f"{name}.parquet")
    (row,) = load_rows(file, ("problem",), "train", None)
    assert row["problem"] == name
    folder = tmp_path / name
    folder.mkdir()
    shutil.copy(file, folder / "train.parquet")
    with pytest.raises(ValueError, match="a pattern: rename it"):
        load_rows(str(folder), ("problem",), "train", None)


def test_data_without_a_name(model):
    with pytest.raises(ValueError, match="data '' has no name"):
        load_rows("", (), "train", None)
    for specification, words in {"": "is called ''", "  ": "has no name"}.items():
        with pytest.raises(ValueError, match=words):
            sets.load_sets([specification], ProblemSettings(**SETTINGS), model)


CHATS = [None, 5, "text", [5], [{"role": "user"}], [{"role": "user", "content": "a"}]]


@pytest.mark.parametrize("messages", CHATS, ids=repr)
def test_chats_that_are_none(model, tmp_path, messages):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    file = write(tmp_path, "d.jsonl", lines({"messages": turns}, {"messages": messages}))
    settings = SolutionSettings(cutoff=128, **SETTINGS)
    with pytest.raises(ValueError, match="d.jsonl, row 1 has no user turn followed by"):
        load_solutions(file, settings, model)


# ---- Templates and models
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe\x00{problem}", "byte 0xff is not UTF-8; expected a template"),
        ("ü {problem}".encode("latin-1"), "byte 0xfc is not UTF-8; expected a template"),
        (b"no place", "has no {problem} in it"),
        (None, "is a folder; expected a template"),
    ],
)
def test_templates_that_are_none(tmp_path, content, words):
    file = tmp_path / "template"
    file.mkdir() if content is None else file.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        template_pattern(str(file))


def test_a_chat_template_that_the_tokenizer_does_not_have(model):
    with pytest.raises(
        ValueError, match="template 'chat': the tokenizer of .* has no chat template"
    ):
        choose_template("chat", model)


def remove_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()


def set_value(name: str, value):
    def change(folder):
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(settings | {name: value}))

    return change


BAD_MODELS = {
    "without a tokenizer": (remove_tokenizer, "its tokenizer knows no words"),
    "without tokenizer.json": (lambda f: (f / "tokenizer.json").unlink(), "knows no words"),
    "with half a tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), "cannot be loaded"),
    "with a list of settings": (lambda f: (f / "config.json").write_text("[]"), "cannot be loaded"),
    "with few embeddings": (set_value("vocab_size", 258), "tokens up to 261, and the model embed.* 258"),
    "with a wrong size": (set_value("hidden_size", "x"), "cannot be loaded .*'hidden_size'"),
    "without heads": (set_value("num_attention_heads", 0), "cannot be loaded"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_MODELS)
def test_bad_models(world, tmp_path, kind):
    damage, words = BAD_MODELS[kind]
    folder = tmp_path / "model"
    shutil.copytree(world.path("model"), folder)
    damage(folder)
    with pytest.raises(ValueError, match=f"model '{folder}': .*{words}") as refused:
        find_model_in(folder)
    assert "\n" not in str(refused.value)


def be_of_another_family(folder):
    AutoConfig.for_model("gpt2").save_pretrained(folder)


def lose_a_weight(folder):
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights.pop("model.norm.weight")
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize("damage", [be_of_another_family, lose_a_weight])
def test_weights_that_are_missing(world, tmp_path, damage):
    """Regression: they were drawn at random, and the model was scored like that."""
    folder = shutil.copytree(world.path("model"), tmp_path / "model")
    damage(folder)
    with pytest.raises(ValueError, match=r"weights? of .* missing, e.g. .*config.json says"):
        vision.load_model(str(folder), "auto")


def test_weights_of_other_sizes(world, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(world.path("model"), folder)
    set_value("vocab_size", 300)(folder)
    with pytest.raises(ValueError, match="the weights of .* cannot be loaded"):
        TorchEngine(find_model_in(folder), 4, "cpu", None)
