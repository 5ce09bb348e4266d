"""Data on the hub: repositories of several sets, relative images. The hub is a local cache of it."""

import json
import os
import random
import shutil
from pathlib import Path

import datasets
import pytest
from conftest import find_model_in
from PIL import Image

import train_flow
import train_rl
from infra import hub
from infra.data import DataSettings, Problem, ProblemSettings, load_problems, load_rows, read_images
from infra.settings import change
from infra.solutions import SolutionSettings, load_solutions
from worlds import toy

CHAT = [{"from": "human", "value": "<image>1+1>"}, {"from": "gpt", "value": "2"}]


def make_repository(name: str) -> Path:
    """Make the folder of a repository of data in the local hub cache."""
    repository = Path(os.environ["HF_HUB_CACHE"]) / f"datasets--{name.replace('/', '--')}"
    folder = repository / "snapshots" / ("1" * 40)
    folder.mkdir(parents=True, exist_ok=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text("1" * 40)
    return folder


def write_lines(file: Path, *rows: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(autouse=True)
def empty_cache():
    """Other tests miss these repositories."""
    yield
    for repository in Path(os.environ["HF_HUB_CACHE"]).glob("datasets--*"):
        shutil.rmtree(repository)


@pytest.fixture
def with_text() -> Path:
    """A repository as the published one for language models: a saved folder, and a named file."""
    folder = make_repository("JingHaoZ/RLFR-Dataset-LM")
    rows = {"problem": ["1+1>", "2+2>"], "answer": ["2", "4"]}
    saved = datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows)})
    saved.save_to_disk(folder / "math-lvl3to5-8k")
    write_lines(folder / "offline" / "a.json", {"problem": "1+1>", "solution": "2"})
    registry = {"openr1_math_default": {"file_name": "offline/a.json"}, "far": {"hf_hub_url": "x"}}
    (folder / "dataset_info.json").write_text(json.dumps(registry))
    return folder


@pytest.fixture
def with_images() -> Path:
    """As the published one for vision-language models: two files whose images are beside them."""
    folder = make_repository("JingHaoZ/RLFR-Dataset-VLM")
    (folder / "images").mkdir(exist_ok=True)
    Image.new("RGB", (56, 28), "red").save(folder / "images" / "a.png")
    row = {"prompt": "<image>1+1>", "answer": "2", "images": ["images/a.png"]}
    write_lines(folder / "mmeureka_prompt.jsonl", row)
    row = {"conversations": CHAT, "images": ["images/a.png"]}
    write_lines(folder / "MMPRv1.1_Math" / "part.jsonl", row)
    return folder


def problems_of(source: str, folder, column: str) -> list[Problem]:
    settings = ProblemSettings(template="none", problem_column=column, max_prompt_tokens=300)
    return load_problems(source, settings, find_model_in(folder))


def solutions_of(source: str, folder, **options) -> list:
    settings = SolutionSettings(
        template="none", problem_column="problem", max_prompt_tokens=300, cutoff=400
    )
    return load_solutions(source, change(settings, **options), find_model_in(folder))


def test_the_published_text(world, with_text):
    """Regression: the repository alone was named, which holds the offline set as well."""
    source = train_rl.PUBLISHED_DATA["text"]
    problems = problems_of(source, world.path("model"), "problem")
    assert [problem.answer for problem in problems] == ["2", "4"]
    (solution,) = solutions_of(train_flow.PUBLISHED_DATA["text"], world.path("model"))
    assert find_model_in(world.path("model")).tokenizer.decode(solution.prompt_ids) == "1+1>"


def test_the_published_images_are_relative_to_the_repository(image_world, with_images):
    """Regression: their folder was said to be "JingHaoZ"."""
    model = image_world.path("model")
    (problem,) = problems_of(train_rl.PUBLISHED_DATA["images"], model, "prompt")
    assert Path(problem.images[0].source) == with_images / "images" / "a.png"
    (solution,) = solutions_of(train_flow.PUBLISHED_DATA["images"], model)
    assert Path(solution.images[0].source) == with_images / "images" / "a.png"


def test_images_that_are_in_the_data_need_no_repository(image_world, tmp_path, monkeypatch):
    def download(*_):
        raise AssertionError("nothing of the hub is needed")

    model = image_world.path("model")
    drawn = toy.encode(toy.draw("1+1>", random.Random(0)))
    rows = [{"images": [drawn]}, {"images": []}]
    monkeypatch.setattr(hub, "download", download)
    images = read_images(rows, "nobody/nothing", DataSettings(), find_model_in(model).processor)
    assert [len(row) for row in images] == [1, 0]


def test_names_of_places():
    assert hub.parse("org/name") == ("org/name", "")
    assert hub.parse("org/name.v1/a/b.jsonl") == ("org/name.v1", "a/b.jsonl")
    here = os.path.relpath(__file__)
    for source in ("name", "./org/name/a", "/org/name/a", "hf://datasets/org/name", here):
        assert hub.parse(source) is None
        assert hub.find_data(source) == source


def test_a_copy_of_a_repository_is_read_by_the_same_names(image_world, tmp_path, with_images):
    copy = tmp_path / "RLFR-Dataset-VLM"
    shutil.copytree(with_images, copy)
    (copy / "MMPRv1.1_Math").rename(copy / "texts")
    registry = copy / "dataset_info.json"
    registry.write_text(json.dumps({"MMPRv1.1_Math": {"file_name": "texts/part.jsonl"}}))
    (solution,) = solutions_of(str(copy / "MMPRv1.1_Math"), image_world.path("model"))
    assert Path(solution.images[0].source) == copy / "images" / "a.png"
    for content in ("[1]", "not json", '{"MMPRv1.1_Math": 3}'):
        registry.write_text(content)
        with pytest.raises(ValueError, match="dataset_info.json.*expected names of sets"):
            load_rows(str(copy / "MMPRv1.1_Math"), (), "train", None)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("JingHaoZ/RLFR-Dataset-LM/other", "of JingHaoZ/RLFR-Dataset-LM there is .*math-lvl3to5"),
        ("JingHaoZ/RLFR-Dataset-LM/far", "and no far; expected a file or folder of that repo"),
        ("nobody/nothing/a.jsonl", "no data at 'nobody/nothing/a.jsonl'.*ORG/NAME/PATH"),
    ],
)
def test_places_that_are_not_there(with_text, source, words):
    with pytest.raises(ValueError, match=words):
        load_rows(source, (), "train", None)


@pytest.mark.parametrize(
    "source", ["no.jsonl", "here/no.parquet", "here/no/no.json", "/no/where", "./no", "../no/no"]
)
def test_the_hub_is_not_asked_for_a_file_that_is_missing_here(source, tmp_path, monkeypatch):
    """Regression: a missing file of expert solutions was looked for on the hub, for minutes."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delattr(hub, "snapshot_download")
    monkeypatch.delattr(datasets, "load_dataset")
    with pytest.raises(ValueError, match=rf"no data at '{source}' \(no such file\); expected a JS"):
        load_rows(source, (), "train", None)


def test_an_error_of_the_hub_without_a_message_is_named(monkeypatch):
    def fail(*_, **__):
        raise TimeoutError

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(ValueError, match="no data at 'org/set/part.jsonl' .TimeoutError"):
        hub.find_data("org/set/part.jsonl")


def test_a_folder_of_files_with_different_columns_names_them(tmp_path):
    """Regression: the error was that of the library, which names neither files nor a way out."""
    write_lines(tmp_path / "data" / "offline.jsonl", {"conversations": CHAT})
    write_lines(tmp_path / "data" / "rl.jsonl", {"prompt": "1+1>", "answer": "2"})
    words = "it holds offline.jsonl, rl.jsonl: name one of them, as in --data .*/data/offline.jsonl"
    with pytest.raises(ValueError, match=words):
        load_rows(str(tmp_path / "data"), (), "train", None)


def test_empty_solutions_are_named_and_can_be_left_out(world, tmp_path, capsys):
    file = tmp_path / "expert.jsonl"
    rows = [{"problem": "1+1>", "solution": text} for text in ("2", "", "2")]
    write_lines(file, *rows)
    model = world.path("model")
    with pytest.raises(ValueError, match="empty in 1 of 3 rows, first in row 1; .*--drop-empty"):
        solutions_of(str(file), model)
    assert len(solutions_of(str(file), model, drop_empty=True)) == 2
    assert "1 of 3 rows of" in capsys.readouterr().out
    write_lines(file, *rows, {"problem": "1+1>", "solution": " "})
    assert len(solutions_of(str(file), model, drop_empty=True)) == 2
    write_lines(file, {"conversations": CHAT[:1]}, {"conversations": CHAT})
    assert len(solutions_of(str(file), model, drop_empty=True)) == 1
    write_lines(file, {"problem": "1+1>", "solution": ""})
    with pytest.raises(ValueError, match="none of the 1 rows of .* has a problem and a solution"):
        solutions_of(str(file), model, drop_empty=True)


def test_which_text_of_a_row_is_the_solution_is_said(world, tmp_path, capsys):
    file = tmp_path / "expert.jsonl"
    messages = [{"role": "user", "content": "1+1>"}, {"role": "assistant", "content": "1+1=2"}]
    write_lines(file, {"problem": "1+1>", "solution": "2", "messages": messages})
    tokenizer = find_model_in(world.path("model")).tokenizer
    (solution,) = solutions_of(str(file), world.path("model"))
    assert tokenizer.decode(solution.response_ids) == "2<|im_end|>"
    said = capsys.readouterr().out
    assert "from the column 'solution', not from the chats in 'messages'" in said
    (solution,) = solutions_of(str(file), world.path("model"), solution_column="messages")
    assert tokenizer.decode(solution.response_ids) == "1+1=2<|im_end|>"
