"""From rows of data to problems: reading, prompt templates, expert solutions, checks of lengths.

Data is a JSON, CSV or Parquet file, a `save_to_disk` folder, a hub id, or ORG/NAME/PATH for a part
of a hub repository; :SPLIT after it names the split. The templates are the same in the offline
start, in training and in evaluation.
"""

import glob
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from infra import hub, vision
from infra.errors import in_short
from infra.files import read_text
from infra.models import Model
from infra.ranges import PositiveInt
from infra.rows import check_answers, check_texts, final_answer, read_rows

INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."
TAG_INSTRUCTION = (  # for vision-language models, word for word as published
    "You should first thinks about the reasoning process in the mind and then provides the user "
    "with the answer. Your answer must be in latex format and wrapped in $...$. The reasoning "
    "process and answer are enclosed within <think> </think> and <answer> </answer> tags, "
    "respectively, i.e., <think> Since $1+1=2$, so the answer is $2$. </think><answer> $2$ "
    "</answer>, which means your output should start with <think> and end with </answer>."
)
QWEN_CHAT = (
    "<|im_start|>system\n{instruction}<|im_end|>\n"
    "<|im_start|>user\n{{problem}}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
LLAMA_CHAT = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n{instruction}\n<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n{{problem}}\n<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n"
)
TEMPLATES = {  # one for each family: the same in the offline start, in training and in evaluation
    "qwen": QWEN_CHAT.format(instruction=INSTRUCTION),
    "qwen_tag": QWEN_CHAT.format(instruction=TAG_INSTRUCTION),
    "llama": LLAMA_CHAT.format(instruction=INSTRUCTION),
    "none": "{problem}",
}
# What ends the assistant's turn in these templates
SOLUTION_ENDS = {
    "qwen": "<|im_end|>\n",
    "qwen_tag": "<|im_end|>\n",
    "llama": "<|eot_id|>",
}
DATA_FILES = (".json", ".jsonl", ".csv", ".parquet")
TABLES = (".parquet", ".arrow")  # read by `datasets`, which would look for other names on the hub


# ---- Settings
@dataclass(frozen=True)
class DataSettings:
    """Where rows of data are found, and how they become prompts."""

    subset: str | None = None  # Subset (configuration) of a hub data set
    # Column with the text; by default problem, for VL models prompt
    problem_column: str | None = None
    images_column: str = "images"  # Column with images, if there are any: paths, base64 or bytes
    # Folder that image paths start from; by default that of the data, or its repository on the hub
    media_dir: str | None = None
    # auto, qwen, qwen_tag, llama, chat, bare, none, or a file with {problem} in it
    template: str = "auto"
    # Longest prompt accepted; by default 3000
    max_prompt_tokens: PositiveInt | None = None


@dataclass(frozen=True)
class ProblemSettings(DataSettings):
    """Where problems and answers are found, and how problems become prompts."""

    answer_column: str = "answer"  # Column with the answer, or a list of accepted answers


# ---- Splits
# A split, perhaps a part of it such as train[:100], after the last colon that can precede one
SPLIT = re.compile(r"(.+):(\w[^/:\[\]]*(?:\[[^/\]]*\])?)")


def cut_split(text: str) -> tuple[str, str | None]:
    """Return a source without its split, and the split or None."""
    match = SPLIT.fullmatch(text)
    if match is None or os.path.exists(text):  # there may be a `:` in the name of a file
        return text, None
    return match[1], match[2]


def has_splits(source: str) -> bool:
    """Return whether a source may have splits: a file has none, nor a data set saved without."""
    is_file = source.endswith(DATA_FILES) or Path(source).is_file()  # perhaps one on the hub
    return not (is_file or Path(source, "state.json").exists())


def choose_split(text: str, usual: str) -> tuple[str, str]:
    """Return a source and the split that follows it as :SPLIT, or else the usual one.

    Errors as of check_split.
    """
    source, split = cut_split(text)
    check_split(source, split)
    return source, split or usual


def check_split(source: str, split: str | None) -> None:
    """Raise ValueError if a split is named of a source that has none."""
    if split is not None and not has_splits(source):
        raise ValueError(f"{source} has no splits; leave out :{split}")


# ---- Problems
class Problem(NamedTuple):
    """One row of a data set, ready to be sampled."""

    id: str
    text: str
    answer: str | list[str]  # any of a list
    prompt_ids: list[int]
    images: tuple[vision.Image, ...] = ()  # in the order of their placeholders in prompt_ids
    solution: str | None = None  # a worked one, where the data has the column


def load_rows(
    source: str, columns: Sequence[str], split: str, subset: str | None
) -> Sequence[Mapping[str, object]]:
    """Read a data set; ValueError if there is none, or a column is missing or has empty values."""
    if not source.strip():
        raise ValueError(f"data {source!r} has no name; expected {hub.SOURCES}")
    path = hub.find_data(source)
    if path.endswith((".jsonl", ".json", ".csv")) and Path(path).is_file():
        rows = read_rows(path)
    elif source.endswith(".tsv"):
        raise ValueError(
            f"{source}: a TSV file is a vision-language benchmark for eval.py, e.g. --data "
            f"WeMath=FILE.tsv; expected {hub.SOURCES}"
        )
    elif Path(path).is_file() and not path.endswith(TABLES):
        raise ValueError(
            f"{source}: no format is known by that name; expected a file whose name ends in "
            f"{', '.join((*DATA_FILES, '.arrow'))}"
        )
    elif not Path(path).exists() and (path.endswith(DATA_FILES) or path[0] in "./~"):
        raise ValueError(f"no data at {source!r} (no such file); expected {hub.SOURCES}")
    else:
        rows = read_with_datasets(path, split, subset)
    if not rows:
        raise ValueError(f"{source} holds no rows; expected at least one problem")
    check_columns(rows, source, columns)
    return rows


def is_empty(value: object) -> bool:
    """Return whether a row has nothing in a column."""
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def check_columns(rows: Sequence[Mapping], source: str, columns: Sequence[str]) -> None:
    """Raise ValueError if a column is missing or has empty values."""
    for column in columns:
        if column not in rows[0]:
            raise ValueError(
                f"{source} has no column {column!r}, only {sorted(rows[0])}; "
                f"name it with a --…-column flag"
            )
        empty = [i for i, row in enumerate(rows) if is_empty(row.get(column))]
        if empty:
            raise ValueError(
                f"column {column!r} of {source} is empty in {len(empty)} of {len(rows)} rows, "
                f"first in row {empty[0]}; fill or drop them (train_flow.py: --drop-empty)"
            )


class StoredRow(Mapping):
    """A row of an Arrow table: a value becomes a Python object only when it is asked for.

    A data set may have columns that nobody reads, of many kilobytes a row.
    """

    def __init__(self, columns: Mapping[str, "pyarrow.ChunkedArray"], index: int):  # noqa: F821
        self.columns = columns
        self.index = index

    def __getitem__(self, name: str) -> object:
        return self.columns[name][self.index].as_py()

    def __contains__(self, name: object) -> bool:
        return name in self.columns

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __len__(self) -> int:
        return len(self.columns)


def read_with_datasets(source: str, split: str, subset: str | None) -> list[StoredRow]:
    """Open a Parquet or JSON file, a folder or a hub id with the `datasets` library."""
    import datasets

    path = Path(source)
    try:
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            data = datasets.load_from_disk(source)
            if isinstance(data, datasets.DatasetDict):
                data = data[split]
        elif path.is_file():
            # the library reads names as patterns
            file = glob.escape(os.path.abspath(source))
            data = datasets.load_dataset(path.suffix[1:], data_files=file, split="train")
        elif path.is_dir() and glob.has_magic(os.path.abspath(source)):
            raise ValueError("the library takes *, ? and [ in a path for a pattern: rename it")
        else:
            data = datasets.load_dataset(source, subset, split=split)
    except Exception as error:  # `datasets` passes on whatever its readers raise
        reason = f"split {split!r}, {first_cause(error)}"
        raise ValueError(f"no data at {source!r} ({reason}); {what_to_name(path)}") from error
    table = data.with_format("arrow")[:]  # as stored: images stay encoded
    columns = dict(zip(table.column_names, table.columns, strict=True))
    return [StoredRow(columns, index) for index in range(len(table))]


def what_to_name(path: Path) -> str:
    """Return what to name as --data where something at a path, or on the hub, cannot be read."""
    files = sorted(file.name for file in path.glob("*") if file.suffix in DATA_FILES)
    if len(files) > 1:
        return f"it holds {', '.join(files)}: name one of them, as in --data {path / files[0]}"
    return f"expected {hub.SOURCES}"


def first_cause(error: BaseException) -> str:
    """Return in one line the error that an error was first raised from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {in_short(error)}"


def load_problems(
    data: str, settings: ProblemSettings, model: Model, usual_split: str = "train"
) -> list[Problem]:
    """Load problems with answers, images and prompts, from a source that may name its split.

    Errors as of choose_split, load_rows and make_prompts.
    """
    source, split = choose_split(data, usual_split)
    columns = (settings.problem_column, settings.answer_column)
    rows = load_rows(source, columns, split, settings.subset)
    texts, answers = ([row[column] for row in rows] for column in columns)
    check_texts(texts, source, settings.problem_column)
    check_texts([str(row.get("id", i)) for i, row in enumerate(rows)], source, "id")
    check_answers(answers, source, settings.answer_column)
    return make_problems(rows, source, settings, model)


def make_problems(
    rows: Sequence[Mapping], source: str, settings: ProblemSettings, model: Model
) -> list[Problem]:
    """Build problems from rows; image paths are relative to the folder of `source`."""
    texts = [row[settings.problem_column] for row in rows]
    images = read_images(rows, source, settings, model.processor)
    prompts = make_prompts(texts, images, model, settings)
    problems = []
    for i, row in enumerate(rows):
        answer = row[settings.answer_column]
        if isinstance(answer, list):
            answer = [final_answer(each) for each in answer]
        else:
            answer = final_answer(answer)
        solution = row.get("solution")
        if not isinstance(solution, str):
            solution = None
        problem = Problem(str(row.get("id", i)), texts[i], answer, prompts[i], images[i], solution)
        problems.append(problem)
    return problems


def read_images(
    rows: Sequence[Mapping], source: str, settings: DataSettings, processor
) -> list[tuple[vision.Image, ...]]:
    """Return each row's images, all ranks together; ValueError names the row of a bad one."""
    names_files = vision.hold_paths(rows, settings.images_column, processor)
    folder = settings.media_dir or hub.media_folder(source, names_files)
    return vision.load_images(rows, settings.images_column, processor, folder)


def make_prompts(
    texts: Sequence[str], images: Sequence[tuple], model: Model, settings: DataSettings
) -> list[list[int]]:
    """Put problems into the prompt template and tokenise them.

    A prompt has a placeholder for each vector of its images. The template is a key of TEMPLATES,
    `chat` (the tokenizer's own, with an instruction), `bare` (without it), or a file that has
    {problem} in it.
    ValueError if a prompt is longer than the limit, or if images and placeholders do not match:
    an engine would take a placeholder for an image that is not there.
    """
    if model.processor is None:
        texts_with_images = texts
    else:
        texts_with_images = []
        for i, text in enumerate(texts):
            texts_with_images.append(vision.place(text, len(images[i]), i))
    prompts = apply_template(texts_with_images, model.tokenizer, settings.template)
    add_special_tokens = settings.template == "none"  # the other templates write them out
    ids = model.tokenizer(prompts, add_special_tokens=add_special_tokens)["input_ids"]
    pad = model.tokenizer.get_vocab().get(vision.PAD)
    ids = [vision.expand(row, images[i], pad, i) for i, row in enumerate(ids)]
    check_lengths(ids, texts, settings.max_prompt_tokens, model.processor is not None)
    return ids


def apply_template(texts: Sequence[str], tokenizer, template: str) -> list[str]:
    """Return the prompts of problems; see make_prompts for the templates."""
    pattern = template_pattern(template)
    if pattern is None:
        # the instruction goes to the user's turn: some models know no system role
        suffix = f"\n{INSTRUCTION}" if template == "chat" else ""
        prompts = []
        for text in texts:
            chat = [{"role": "user", "content": text + suffix}]
            prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            prompts.append(prompt)
        return prompts
    return [pattern.replace("{problem}", text) for text in texts]


def template_pattern(template: str) -> str | None:
    """Return the text of a template, None where the tokenizer or the model decides.

    ValueError if there is no such template, or none with {problem} in it.
    """
    if template in ("auto", "chat", "bare"):
        return None
    if template in TEMPLATES:
        return TEMPLATES[template]
    if not Path(template).exists():
        known = ", ".join(TEMPLATES)
        raise ValueError(f"template {template!r}: neither {known}, chat, bare, auto nor a file")
    pattern = read_text(template, "a template, a text with {problem} in it")
    if "{problem}" not in pattern:
        raise ValueError(
            f"template {template!r} has no {{problem}} in it; put it where the problem goes"
        )
    return pattern


def solution_end(model: Model, template: str) -> list[int]:
    """Return the tokens that end an expert solution: those that end the assistant's turn.

    Where a template says nothing of that, it is the tokenizer's EOS.
    """
    tokenizer = model.tokenizer
    if template in SOLUTION_ENDS:
        end = SOLUTION_ENDS[template]
    elif template in ("chat", "bare"):
        mark = "the solution"
        chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": mark}]
        end = tokenizer.apply_chat_template(chat, tokenize=False).rpartition(mark)[2]
    else:
        return [tokenizer.eos_token_id]
    return tokenizer(end, add_special_tokens=False)["input_ids"]


def read_exchange(row: Mapping, place: str) -> tuple[str, str]:
    """Return the first problem and solution of a chat row; ValueError names a place without one."""
    exchange = find_exchange(row)
    if exchange is None:
        raise ValueError(
            f"{place} has no user turn followed by an assistant's; expected messages such as "
            f'{{"role": "user", "content": …}}, {{"role": "assistant", "content": …}}'
        )
    return exchange


def find_exchange(row: Mapping) -> tuple[str, str] | None:
    """Return the first problem and solution of a chat row, or None.

    Rows have `messages` of role and content, or `conversations` of from and value.
    """
    problem = None
    turns = row.get("messages") or row.get("conversations")
    for turn in turns if isinstance(turns, list) else []:
        if not isinstance(turn, Mapping):
            break
        role = turn.get("role") or turn.get("from")
        content = turn.get("content") or turn.get("value")
        if role in ("user", "human"):
            problem = content
        elif role in ("assistant", "gpt") and problem and content:
            return problem, content
    return None


def check_lengths(
    ids: Sequence[list[int]], texts: Sequence[str], limit: int, has_vision: bool
) -> None:
    """Raise ValueError if a prompt is longer than the limit."""
    too_long = [i for i, row in enumerate(ids) if len(row) > limit]
    if not too_long:
        return
    first = too_long[0]
    pixels = ", lower --max-pixels" if has_vision else ""
    raise ValueError(
        f"{len(too_long)} of {len(ids)} prompts are longer than {limit} tokens, e.g. row {first} "
        f"with {len(ids[first])}, {texts[first][:60]!r}; "
        f"raise --max-prompt-tokens{pixels} or drop them"
    )
