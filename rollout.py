"""Problems in, episodes out: data sets, prompt templates, model names, and the engines that sample.

Tokens are never rewritten: a response that ran out of room keeps its last token and says "length".
(The official code writes EOS over that token, and the response can then score as finished.)
"""

import glob
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

import rlfr
import vision
from flow import keyed_seed
from infra import families, hub
from infra.errors import in_short
from infra.files import read_text
from infra.ranges import BatchSize, NonNegativeInt, OpenFraction, PositiveInt, Temperature
from infra.rows import check_answers, check_texts, final_answer, read_rows
from parallel import fork_rng, gather_objects, is_first, sum_over_ranks, tensor_memory
from rewards import Grader, Verdict
from run import change, flatten, unset_among

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
# Folders of that name are in every run, and say nothing of a model
OF_EVERY_RUN = re.compile(r"policy|exports|step-\d+")
# Tokens that end a response besides the model's own EOS, see --stop-tokens
StopTokens = Literal["turn-ends", "eos"]
TURN_ENDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>")
DATA_FILES = (".json", ".jsonl", ".csv", ".parquet")
TABLES = (".parquet", ".arrow")  # read by `datasets`, which would look for other names on the hub
ORGANISATIONS = {"Qwen": "Qwen", "Llama": "meta-llama", "gemma": "google", "Mistral": "mistralai"}


# ---- Settings that the scripts share
@dataclass(frozen=True)
class LoadingSettings:
    """How a model is loaded."""

    # Compute dtype of forward and backward; auto: bfloat16 on a GPU
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    trust_remote_code: bool = False  # Run code that comes with the model
    # Smaller images are enlarged to this size; None: the processor's
    min_pixels: PositiveInt | None = None
    # Larger images are reduced to this size; None: the processor's
    max_pixels: PositiveInt | None = None


@dataclass(frozen=True)
class DataSettings:
    """Where rows of data are found, and how they become prompts."""

    split: str = "train"  # Split of a hub data set
    subset: str | None = None  # Subset (configuration) of a hub data set
    # Column with the text; by default problem, for VL models prompt
    problem_column: str | None = None
    images_column: str = "images"  # Column with images, if there are any: paths, base64 or bytes
    # Folder that image paths start from; by default that of the data, or its repository on the hub
    media_dir: str | None = None
    max_images: NonNegativeInt = 4  # Most images a problem may have
    # auto, qwen, qwen_tag, llama, chat, bare, none, or a file with {problem} in it
    template: str = "auto"
    # Longest prompt accepted; by default 3000
    max_prompt_tokens: PositiveInt | None = None


@dataclass(frozen=True)
class ProblemSettings(DataSettings):
    """Where problems and answers are found, and how problems become prompts."""

    answer_column: str = "answer"  # Column with the answer, or a list of accepted answers


@dataclass(frozen=True)
class EngineSettings:
    """What samples responses."""

    # auto: vLLM on a GPU where it is installed, else torch
    engine: Literal["auto", "vllm", "torch"] = "auto"
    max_sequences: BatchSize = 256  # Responses sampled at a time by an engine; bounds its KV cache
    # Largest share of a GPU's free memory for vLLM's KV cache; its weights need some of the rest
    cache_share: OpenFraction = 0.5
    tensor_parallel: PositiveInt = 1  # Ranks that share a vLLM engine
    # What ends a response: also the ends of turns of known templates, or the model's EOS alone
    stop_tokens: StopTokens = "turn-ends"


# ---- Models
class Model(NamedTuple):
    """What is known of a model before a weight is loaded."""

    path: str  # a folder or a hub id
    config: PretrainedConfig
    n_parameters: int  # of the text decoder, without an untied head
    tokenizer: PreTrainedTokenizerBase
    processor: Callable | None = None  # of images, for a vision-language model
    trust_remote_code: bool = False  # run code that comes with the model

    @property
    def text_config(self) -> PretrainedConfig:
        """The configuration of the text decoder."""
        return self.config.get_text_config()

    @property
    def norm_eps(self) -> float:
        """Eps of the decoder's RMS norms; a flow's norms have the same, as in the official code."""
        return getattr(self.text_config, "rms_norm_eps", 1e-6)


def short_name(name: str) -> str:
    """Return a name for runs of a model: the last part of its path or hub id.

    Folders that every run has, such as RUN/policy and RUN/exports/step-20/policy, take that of the
    run before them.
    """
    parts = Path(name).parts
    taken = [parts[-1]] if parts else ["model"]
    for part in reversed(parts[:-1]):
        if not OF_EVERY_RUN.fullmatch(taken[0]):
            break
        taken.insert(0, part)
    return "-".join(part.strip("/") for part in taken if part != "exports")


def full_name(name: str) -> str:
    """Return a folder or hub id as it is, and the hub id of a short name such as Qwen2.5-7B."""
    if Path(name).is_dir() or "/" in name:
        return name
    for prefix, organisation in ORGANISATIONS.items():
        if name.startswith(prefix):
            name = f"{organisation}/{name}"
            break
    return re.sub(r"(-VL-\d+B)$", r"\1-Instruct", name)  # there are no base models of these


def find_model(name: str, loading: LoadingSettings) -> Model:
    """Find a model by path, hub id or short name; ValueError if there is none."""
    path = full_name(name)
    remote_code = loading.trust_remote_code
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=remote_code)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=remote_code)
        check_vocabulary(path, tokenizer, config.get_text_config().vocab_size)
        with torch.device("meta"):
            body = AutoModel.from_config(config.get_text_config(), trust_remote_code=remote_code)
    except Exception as error:  # transformers passes on whatever its readers raise
        raise ValueError(
            f"model {name!r}: {path!r} cannot be loaded ({in_short(error)}); expected a folder, a "
            f"hub id, a short name such as Qwen2.5-7B, or toy"
        ) from error
    n_parameters = sum(parameter.numel() for parameter in body.parameters())
    processor = None
    if vision.takes_images(config):
        limits = (loading.min_pixels, loading.max_pixels)
        processor = vision.load_processor(path, *limits, remote_code)
    return Model(path, config, n_parameters, tokenizer, processor, remote_code)


def check_vocabulary(path: str, tokenizer: PreTrainedTokenizerBase, n_embeddings: int) -> None:
    """Raise ValueError if a tokenizer knows no words, or more than the model has embeddings for.

    Where a folder has no tokenizer, transformers makes one of special tokens alone.
    """
    ids = tokenizer("1+1=2", add_special_tokens=False)["input_ids"]
    if not set(ids) - {tokenizer.unk_token_id}:
        raise ValueError(f"its tokenizer knows no words: is tokenizer.json in {path}?")
    largest = max(tokenizer.get_vocab().values())
    if largest >= n_embeddings:
        raise ValueError(
            f"its tokenizer has tokens up to {largest}, and the model embeddings for {n_embeddings}"
        )


def fill_in(config, model: Model):
    """Fill in what is None or `auto` in a script's settings from the model, and print it."""
    has_vision = vision.takes_images(model.config)
    published = published_settings(model)
    flat = flatten(config)
    if flat.get("freeze") == "vision" and not has_vision:
        raise ValueError(f"freeze='vision': {model.path} has no vision tower; leave --freeze out")
    heads = model.text_config.num_attention_heads
    if heads % flat.get("tensor_parallel", 1):
        raise ValueError(
            f"tensor_parallel={flat['tensor_parallel']} does not divide "
            f"the model's {heads} attention heads"
        )
    derived = unset_among(config, published)
    derived["template"] = choose_template(flat["template"], model)
    if is_first():
        settings = "  ".join(f"{name}={value}" for name, value in derived.items())
        size = f"{model.n_parameters / 1e9:.3g}B parameters"
        print(f"from the model {model.path} ({size}):  {settings}")
    return change(config, **derived)


def published_settings(model: Model) -> dict[str, object]:
    """Return the settings of the official runs that differ among models (official scripts).

    The reward of language models is that of the paper's page.
    """
    is_large = model.n_parameters > 5e9
    settings = {
        "flow_blocks": 6 if is_large else 4,
        "max_prompt_tokens": 3000,
    }
    if vision.takes_images(model.config):
        settings["noise_repeats"] = 4
        settings["cutoff"] = 16384
        settings["max_tokens"] = 3072 if is_large else 1024
        settings["problem_column"] = "prompt"
        settings["reward"] = ("vlm", "tags=0.5")
        settings["freeze"] = "vision"
    else:
        settings["noise_repeats"] = 2 if is_large else 4
        settings["cutoff"] = 8192
        settings["max_tokens"] = 1024
        settings["problem_column"] = "problem"
        settings["reward"] = ("binary",)
        settings["freeze"] = "none"
    return settings


def choose_template(template: str, model: Model) -> str:
    """Return the template; `auto` becomes the family's, or else `chat` or `none`.

    Vision-language models get their chat template without an instruction of ours, as published:
    the prompts of the data set say how to answer.
    """
    if template in ("chat", "bare") and not model.tokenizer.chat_template:
        raise ValueError(
            f"template {template!r}: the tokenizer of {model.path} has no chat template; "
            f"expected one of {', '.join(TEMPLATES)}, or a file"
        )
    if template != "auto":
        return template
    if vision.takes_images(model.config):
        return "bare" if model.tokenizer.chat_template else "none"
    vocabulary = model.tokenizer.get_vocab()
    model_type = model.config.model_type
    for family, pattern in TEMPLATES.items():
        first_token = pattern.partition(">")[0] + ">"
        if first_token in vocabulary and model_type.startswith(family):
            return family
    return "chat" if model.tokenizer.chat_template else "none"


# ---- Problems
class Problem(NamedTuple):
    """One row of a data set, ready to be sampled."""

    id: str
    text: str
    answer: str | list[str]  # any of a list
    prompt_ids: list[int]
    images: tuple[vision.Image, ...] = ()  # in the order of their placeholders in prompt_ids


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


def load_problems(source: str, settings: ProblemSettings, model: Model) -> list[Problem]:
    """Load problems with answers, images and prompts; errors as of load_rows and make_prompts."""
    columns = (settings.problem_column, settings.answer_column)
    rows = load_rows(source, columns, settings.split, settings.subset)
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
        problem = Problem(str(row.get("id", i)), texts[i], answer, prompts[i], images[i])
        problems.append(problem)
    return problems


def read_images(
    rows: Sequence[Mapping], source: str, settings: DataSettings, processor
) -> list[tuple[vision.Image, ...]]:
    """Return each row's images, all ranks together; ValueError names the row of a bad one."""
    names_files = vision.hold_paths(rows, settings.images_column, processor)
    folder = settings.media_dir or hub.media_folder(source, names_files)
    return vision.load_images(rows, settings.images_column, processor, folder, settings.max_images)


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


# ---- Engines
class Request(NamedTuple):
    """A prompt to sample from."""

    prompt_ids: list[int]
    seed: int  # of its first response; response i has seed + i
    images: tuple[vision.Image, ...] = ()


@dataclass(frozen=True)
class Sampling:
    """How to sample."""

    n: int = 1  # responses a prompt
    temperature: float = 1.0  # 0 is greedy
    max_tokens: int = 1024  # response tokens, EOS included
    top_p: float = 1.0
    # prompt and response tokens together: a long prompt shortens its own responses, no others
    max_length: int | None = None

    def room(self, request: Request) -> int:
        """Return how many tokens a response to a request may have."""
        if self.max_length is None:
            return self.max_tokens
        return min(self.max_tokens, self.max_length - len(request.prompt_ids))


@dataclass
class Episode:
    """One sampled response."""

    prompt_ids: list[int]
    response_ids: list[int]  # with EOS if it came
    logp: list[float]  # the sampler's log-prob of each token, at the temperature
    finish_reason: Literal["stop", "length"]
    text: str  # the response without special tokens
    images: tuple[vision.Image, ...] = ()  # of the prompt
    problem: Problem | None = None  # what the prompt asks, where that is known
    verdict: Verdict | None = None  # on the response, once it is graded


def stand_in(problem: Problem, n_tokens: int) -> Episode:
    """Return an episode that nobody has sampled, of a right response of so many tokens."""
    return Episode(
        prompt_ids=problem.prompt_ids,
        response_ids=[0] * n_tokens,
        logp=[0.0] * n_tokens,
        finish_reason="length",
        text="",
        images=problem.images,
        problem=problem,
        verdict=Verdict(1.0, correct=True, parts={}, extracted=None, kind="cut"),
    )


class Capacity(NamedTuple):
    """What an engine must be able to take."""

    max_length: int  # prompt + response, in tokens
    max_images: int = 0  # of a prompt


class Engine(Protocol):
    """Samples with the policy's weights."""

    n_ranks: int  # ranks that share the engine
    tokenizer: PreTrainedTokenizerBase
    held_memory: int  # bytes that torch counts as the engine's tensors even while it sleeps

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Episode]:
        """Return n consecutive episodes for each request."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Wake up and take all weights, by their names in the state dict."""

    def sleep(self) -> None:
        """Free the accelerator; the weights are lost."""


def check_engine(settings: EngineSettings, n_ranks: int) -> None:
    """Raise ValueError for engine settings that cannot work."""
    if settings.engine == "vllm" and find_spec("vllm") is None:
        raise ValueError(
            "--engine vllm: vLLM is not installed; pip install -r requirements.txt, "
            "or take --engine torch"
        )
    shared = settings.tensor_parallel
    if n_ranks % shared or (shared > 1 and settings.engine == "torch"):
        raise ValueError(
            f"tensor_parallel={shared}: expected a divisor of {n_ranks} ranks, and vLLM"
        )


def make_engine(
    model: Model,
    settings: EngineSettings,
    capacity: Capacity,
    device: torch.device,
    dtype: torch.dtype,
    can_sleep: bool,
) -> Engine:
    """Start the engine that the settings ask for, and say which; all ranks together.

    Of the engines of a process that run on vLLM only one can sleep.
    """
    kind, reason = choose_engine(settings.engine, device)
    if kind == "vllm" and device.type == "cuda" and is_first():
        print("vLLM starts, which takes one to four minutes", flush=True)
    began = time.perf_counter()
    if kind == "torch":
        sizes = (settings.max_sequences, device, dtype)
        engine = TorchEngine(model, *sizes, settings.stop_tokens)
    else:
        engine = VllmEngine(model, settings, capacity, device, dtype, can_sleep)
    if is_first():
        seconds = time.perf_counter() - began
        print(f"engine: {kind} on {device} in {dtype}, {reason}; started in {seconds:.1f} s")
    return engine


def choose_engine(engine: str, device: torch.device) -> tuple[str, str]:
    """Return the kind of engine, vllm or torch, and why it was chosen."""
    if engine != "auto":
        return engine, "as --engine says"
    if device.type != "cuda":
        return "torch", "there is no GPU"
    if find_spec("vllm") is None:
        return "torch", "vLLM is not installed"
    return "vllm", "installed"


PROBES = ("1 + 1 =", "Let x be", "Find all n.")  # short texts that any model continues
LARGEST_DIFFERENCE = 0.1  # of log-probs; in bfloat16 the mean is about 0.01


def sample_probes(engine: Engine, max_prompt_tokens: int, max_tokens: int) -> list[Episode]:
    """Sample a few short texts greedily, for check_log_probs; all ranks together."""
    requests = []
    for text in PROBES:
        ids = engine.tokenizer(text)["input_ids"][:max_prompt_tokens]
        requests.append(Request(ids, seed=0))
    with fork_rng():  # an engine may draw from the global generator
        return engine.generate(requests, Sampling(temperature=0.0, max_tokens=min(16, max_tokens)))


def check_log_probs(probes: Sequence[Episode], logp: Tensor, model: str) -> None:
    """Raise ValueError if an engine's log-probs are not those of the trainer; all ranks together.

    Both have the same weights. They differ where the two do not compute the same model, where a
    weight did not arrive, or where the engine lost a part of its state while it slept.

    Args:
        probes: what sample_probes() returned.
        logp: the trainer's log-probs of the responses' tokens, one after the other, (M,).
        model: its name.
    """
    sampled = torch.tensor([value for episode in probes for value in episode.logp])
    difference = (sampled - logp.cpu()).abs().mean().item()
    largest = torch.tensor(gather_objects(difference)).max().item()
    if not largest <= LARGEST_DIFFERENCE:  # or it is not a number
        raise ValueError(
            f"{model}: the engine's log-probs differ from the trainer's by {largest:.2f} in the "
            f"mean, more than {LARGEST_DIFFERENCE}: with the same weights it samples from another "
            "model than is trained; take another --engine, or another version of vLLM"
        )


def generate_on_all_ranks(
    engine: Engine,
    requests: Sequence[Request],
    sampling: Sampling,
    expected_tokens: Sequence[float],
) -> list[Episode]:
    """Share requests out to the ranks' engines; return all episodes, in order, on every rank.

    expected_tokens holds the work that each request is likely to be, to balance the shares.
    """
    n_engines = dist.get_world_size() // engine.n_ranks
    shares = balanced_shares(expected_tokens, n_engines)
    my_share = shares[dist.get_rank() // engine.n_ranks]
    episodes = engine.generate([requests[i] for i in my_share], sampling)
    gathered = gather_objects(episodes)
    by_request: dict[int, list[Episode]] = {}
    for share, sampled in zip(shares, gathered[:: engine.n_ranks], strict=True):
        by_request.update(zip(share, in_groups(sampled, sampling.n), strict=True))
    ordered = []
    for i, request in enumerate(requests):
        for episode in by_request[i]:
            # every rank has the images: they did not travel with the episodes
            ordered.append(replace(episode, images=request.images))
    return ordered


def in_groups(items: list, size: int) -> list[list]:
    """Cut a list into consecutive groups of one size."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def balanced_shares(work: Sequence[float], n_shares: int) -> list[list[int]]:
    """Share out indices, the largest work first, each to the share with the least work so far."""
    shares: list[list[int]] = [[] for _ in range(n_shares)]
    load = [0.0] * n_shares
    for i in sorted(range(len(work)), key=lambda i: -work[i]):
        lightest = load.index(min(load))
        shares[lightest].append(i)
        load[lightest] += work[i]
    return shares


def grade_on_all_ranks(
    grader: Grader, problems: Sequence[Problem], episodes: Sequence[Episode]
) -> list[Verdict]:
    """Have every rank grade a share; return all verdicts, in the order of the episodes.

    Episodes are the same number in a row for each problem. All ranks must call this together.
    """
    rank = dist.get_rank()
    n_ranks = dist.get_world_size()
    group_size = len(episodes) // len(problems)
    my_problems = range(rank, len(problems), n_ranks)
    my_episodes = []
    for i in my_problems:
        my_episodes += episodes[i * group_size : (i + 1) * group_size]
    verdicts = grader.grade_all([problems[i] for i in my_problems], my_episodes)
    gathered = gather_objects(verdicts)
    ordered = []
    for i in range(len(problems)):
        graded = gathered[i % n_ranks]
        start = i // n_ranks * group_size
        ordered += graded[start : start + group_size]
    return ordered


# ---- The phases of a step: problems in, graded episodes out
@dataclass(frozen=True)
class SamplingSettings:
    """How many episodes a step has, and how they are sampled."""

    prompts: BatchSize = 128  # N, prompts a step
    group_size: BatchSize = 8  # G, samples a prompt
    max_tokens: PositiveInt | None = None  # Longest response; by default 1024, for VL-7B 3072
    temperature: Temperature = 1.0  # Sampling temperature
    # Rounds of dynamic sampling (DAPO), 0: none. It drops groups of equal reward and samples others
    # in their place; after so many rounds dropped groups fill what is missing
    dynamic_sampling: NonNegativeInt = 0


@dataclass
class Sampler:
    """What samples groups of responses and grades them."""

    engine: Engine
    grader: Grader
    problems: list[Problem]
    # (n_problems,) mean response tokens when last sampled, 0 before; kept up to date
    lengths: Tensor
    settings: SamplingSettings
    seed: int

    def roll_out(self, cursor: int) -> tuple[list[Episode], int]:
        """Sample G responses for each of N problems from the cursor on.

        Returns the episodes, G in a row for each problem, and the cursor after the last problem.
        """
        self.grader.counts.clear()
        n_problems = self.settings.prompts
        if self.settings.dynamic_sampling:
            return self.roll_out_varied(cursor)
        return self.sample_groups(cursor, n_problems), cursor + n_problems

    def roll_out_varied(self, cursor: int) -> tuple[list[Episode], int]:
        """Roll out and verify until the rewards of every group differ: dynamic sampling."""
        group_size = self.settings.group_size
        wanted = self.settings.prompts * group_size
        kept: list[Episode] = []
        dropped: list[Episode] = []
        for _ in range(self.settings.dynamic_sampling):
            n_missing = (wanted - len(kept)) // group_size
            episodes = self.sample_groups(cursor, n_missing)
            cursor += n_missing
            self.verify(episodes)
            reward = torch.tensor([episode.verdict.reward for episode in episodes])
            is_varied = rlfr.varied_groups(reward, group_size)
            for varied, group in zip(is_varied, in_groups(episodes, group_size), strict=True):
                if varied:
                    kept += group
                else:
                    dropped += group
            if len(kept) == wanted:
                break
        return (kept + dropped)[:wanted], cursor

    def sample_groups(self, cursor: int, n_problems: int) -> list[Episode]:
        """Sample a group for each of n_problems from the cursor on."""
        settings = self.settings
        order = rlfr.passes(len(self.problems), cursor, n_problems, "problem order", self.seed)
        chosen = [self.problems[index] for _, index in order]
        requests = []
        for (epoch, index), problem in zip(order, chosen, strict=True):
            seed = keyed_seed("roll out", self.seed, epoch, index)
            requests.append(Request(problem.prompt_ids, seed, problem.images))
        indices = [index for _, index in order]
        sampling = Sampling(settings.group_size, settings.temperature, settings.max_tokens)
        expected_tokens = self.expected_tokens(indices)
        episodes = generate_on_all_ranks(self.engine, requests, sampling, expected_tokens)
        groups = in_groups(episodes, settings.group_size)
        for index, problem, group in zip(indices, chosen, groups, strict=True):
            n_tokens = [len(episode.response_ids) for episode in group]
            self.lengths[index] = sum(n_tokens) / len(n_tokens)
            for episode in group:
                episode.problem = problem
        return episodes

    def expected_tokens(self, indices: Sequence[int]) -> list[float]:
        """Return the tokens that problems with these indices are likely to need."""
        known = self.lengths[self.lengths > 0]
        usual_length = known.mean().item() if len(known) else float(self.settings.max_tokens)
        expected = []
        for index in indices:
            length = self.lengths[index].item() or usual_length
            n_prompt = len(self.problems[index].prompt_ids)
            expected.append(n_prompt + self.settings.group_size * length)
        return expected

    def verify(self, episodes: Sequence[Episode]) -> None:
        """Grade the episodes that have no verdict yet, groups that follow one another."""
        ungraded = [episode for episode in episodes if episode.verdict is None]
        problems = [episode.problem for episode in ungraded[:: self.settings.group_size]]
        if not ungraded:
            return
        verdicts = grade_on_all_ranks(self.grader, problems, ungraded)
        for episode, verdict in zip(ungraded, verdicts, strict=True):
            episode.verdict = verdict

    def metrics(self) -> dict[str, float]:
        """Return how often grading went wrong in this step, over all ranks."""
        metrics = {}
        for trouble in ("timeout", "crashed", "capped"):
            count = torch.tensor(float(self.grader.counts[trouble]))
            metrics[f"grader/{trouble}"] = sum_over_ranks(count).item()
        return metrics


def end_tokens(model: Model, stop_tokens: StopTokens = "turn-ends") -> list[int]:
    """Return the tokens that end a response: the model's, the tokenizer's, maybe ends of turns."""
    try:
        ends = GenerationConfig.from_pretrained(model.path).eos_token_id
    except OSError:  # the model has no generation configuration
        ends = model.text_config.eos_token_id
    ends = set(ends) if isinstance(ends, list) else {ends}
    vocabulary = model.tokenizer.get_vocab()
    if stop_tokens == "turn-ends":
        ends.update(vocabulary[token] for token in TURN_ENDS if token in vocabulary)
    ends.add(model.tokenizer.eos_token_id)
    ends.discard(None)
    return sorted(ends)


class VllmEngine:
    """vLLM in this process: an engine a rank, or one that neighbouring ranks call together.

    Asleep it holds neither weights nor cache (sleep level 2) and must be given weights before it
    samples. An engine that can sleep starts asleep, as it has not read the model's weights. On a
    CPU sleeping frees nothing.
    """

    def __init__(
        self,
        model: Model,
        settings: EngineSettings,
        capacity: Capacity,
        device: torch.device,
        dtype: torch.dtype,
        can_sleep: bool,
    ):
        # the engine's loop runs in this process, not in one of its own
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        warnings.filterwarnings("ignore", module="vllm")
        import vllm

        from infra import vllm_setup

        if device.type == "cpu":
            vllm_setup.keep_weights_unpacked()
        self.path = model.path
        self.tokenizer = model.tokenizer
        self.n_ranks = settings.tensor_parallel
        self.end_tokens = end_tokens(model, settings.stop_tokens)
        self.SamplingParams = vllm.SamplingParams
        self.state: Literal["awake", "no cache", "asleep"] = "awake"
        options = device_options(device, can_sleep)
        if can_sleep:
            vllm_setup.zero_woken_memory()
            options["load_format"] = vllm_setup.UNREAD
        if "RANK" in os.environ:
            options["distributed_executor_backend"] = "external_launcher"
        if model.processor is not None:
            options.update(image_options(model.processor, *capacity))
        n_threads = torch.get_num_threads()
        memory_before = tensor_memory()
        self.llm = vllm.LLM(
            model.path,
            dtype=str(dtype).removeprefix("torch."),
            trust_remote_code=model.trust_remote_code,
            generation_config="vllm",
            tensor_parallel_size=settings.tensor_parallel,
            max_model_len=capacity.max_length,
            max_num_seqs=settings.max_sequences,
            kv_cache_memory_bytes=cache_bytes(
                model, settings, capacity.max_length, dtype, free_memory(device)
            ),
            gpu_memory_utilization=0.01,  # checked at the start, no more: the size is given
            max_num_batched_tokens=max(8192, capacity.max_length),
            logprobs_mode="processed_logprobs",  # at the temperature, which raw ones are not
            disable_log_stats=True,
            use_tqdm_on_load=False,
            seed=0,
            **options,
        )
        # vLLM leaves one thread to torch: too few for an optimiser in host memory
        torch.set_num_threads(n_threads)
        self.held_memory = tensor_memory() - memory_before
        if can_sleep:
            self.sleep()  # it has no weights yet

    def sleep(self) -> None:
        if self.state == "no cache":  # vLLM may ignore a sleep when it is only partly awake
            self.wake_up("kv_cache")
        if self.state != "asleep":
            self.llm.sleep(level=2)
        self.state = "asleep"

    def wake_up(self, part: Literal["weights", "kv_cache"]) -> None:
        """Let vLLM take the memory of a part again: first that of the weights, then the cache's."""
        torch.cuda.empty_cache()
        self.llm.wake_up(tags=[part])
        engine = self.llm.llm_engine
        sleeps = part in engine.model_executor.sleeping_tags
        if part == "kv_cache":  # the last
            sleeps = engine.is_sleeping()
        if sleeps:  # vLLM only warns of a call that it ignores
            raise RuntimeError(f"vLLM still sleeps after it was told to wake its {part}")

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        if self.state == "asleep":
            # only the weights: the trainer still needs the cache's memory to gather them
            self.wake_up("weights")
            self.state = "no cache"

        def load(model) -> None:
            loaded = model.load_weights(weights)
            check_all_given(dict(model.named_parameters()).keys() - loaded)

        self.llm.apply_model(load)
        # it holds keys and values of the old weights
        if not self.llm.reset_prefix_cache():
            raise RuntimeError(
                "vLLM cannot reset its prefix cache: it would sample with keys and values of the "
                "old weights; requests must have ended before a sync"
            )
        self.llm.llm_engine.reset_encoder_cache()  # it holds their image vectors

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Episode]:
        if self.state == "asleep":
            raise RuntimeError("the engine sleeps without weights; call load_weights first")
        if self.state == "no cache":  # without a cache vLLM would wait for ever
            self.wake_up("kv_cache")
            self.state = "awake"
        prompts = [self.to_vllm_prompt(request) for request in requests]
        parameters = [self.sampling_parameters(sampling, request) for request in requests]
        # the bar shows tokens a second
        bar = partial(tqdm, leave=False, delay=3) if is_first() else False
        outputs = self.llm.generate(prompts, parameters, use_tqdm=bar)
        episodes = []
        for request, output in zip(requests, outputs, strict=True):
            sampled = [self.to_episode(request, child) for child in output.outputs]
            if all(math.isnan(logp) for episode in sampled for logp in episode.logp):
                raise not_finite(self.path)  # vLLM's own slips are of single tokens
            episodes += sampled
        return episodes

    def sampling_parameters(self, sampling: Sampling, request: Request):
        """Return vLLM's parameters of one request."""
        return self.SamplingParams(
            n=sampling.n,
            seed=request.seed,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=0,
            max_tokens=sampling.room(request),
            stop_token_ids=self.end_tokens,
            logprobs=0,  # only that of the sampled token
            detokenize=False,
        )

    def to_vllm_prompt(self, request: Request) -> dict:
        """Return what vLLM calls a prompt: tokens with one placeholder an image, and the images."""
        if not request.images:
            return {"prompt_token_ids": request.prompt_ids}
        pad = self.tokenizer.convert_tokens_to_ids(vision.PAD)
        return {
            "prompt_token_ids": vision.collapse(request.prompt_ids, pad),
            "multi_modal_data": {"image": [image.open() for image in request.images]},
        }

    def to_episode(self, request: Request, output) -> Episode:
        """Return the episode of one of vLLM's outputs."""
        ids = list(output.token_ids)
        logp = [step[token].logprob for token, step in zip(ids, output.logprobs, strict=True)]
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return Episode(request.prompt_ids, ids, logp, output.finish_reason, text)


def device_options(device: torch.device, can_sleep: bool) -> dict:
    """Return vLLM's options that differ between a CPU and a GPU.

    Only an engine that can sleep keeps its memory in vLLM's pool, which a process has once.
    """
    if device.type == "cpu":
        # parts of a prompt cannot be seeded there
        return {"enforce_eager": True, "enable_chunked_prefill": False}
    return {"enable_sleep_mode": can_sleep}


def free_memory(device: torch.device) -> float:
    """Return how many bytes of a GPU nobody uses; on a CPU there is no limit."""
    if device.type == "cpu":
        return math.inf
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return free


def cache_bytes(
    model: Model, settings: EngineSettings, max_length: int, dtype: torch.dtype, free: float
) -> int:
    """Return the size of a rank's KV cache: room for all sequences, within its share of free bytes.

    ValueError if a sequence of max_length tokens does not fit.
    """
    text = model.text_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    # ranks that share fewer heads of keys than they are hold copies of them
    n_heads = max(1, text.num_key_value_heads // settings.tensor_parallel)
    token_bytes = 2 * text.num_hidden_layers * n_heads * head_dim * dtype.itemsize
    sequence_bytes = (max_length + 128) * token_bytes  # 128: a sequence ends within a block
    room = settings.cache_share * free
    if sequence_bytes > room:
        raise ValueError(
            f"a sequence of {max_length} tokens needs {sequence_bytes / 1e9:.2f} GB of KV cache, "
            f"but cache_share={settings.cache_share} of {free / 1e9:.2f} GB free is less; give "
            "--offload, a larger --tensor-parallel or fewer tokens"
        )
    return int(min(settings.max_sequences * sequence_bytes, room))


def image_options(processor, max_length: int, max_images: int) -> dict:
    """Return vLLM's options for images: the trainer's limits of size, and how many a prompt has.

    vLLM plans for the largest image: one that no prompt has room for is left out of the plan.
    """
    if find_spec("torchvision") is None:
        raise ValueError(
            "--engine vllm needs torchvision for images: pip install it, or take --engine torch"
        )
    smallest, largest = vision.pixel_limits(processor)
    pixels_per_token = (processor.patch_size * processor.merge_size) ** 2
    largest = max(smallest, min(largest, max_length * pixels_per_token))
    return {
        "limit_mm_per_prompt": {"image": max_images, "video": 0},
        "mm_processor_kwargs": {"min_pixels": smallest, "max_pixels": largest},
    }


def check_all_given(missing: set[str]) -> None:
    """Raise ValueError if an engine was not given all of its weights."""
    if missing:
        examples = sorted(missing)[:3]
        raise ValueError(
            f"{len(missing)} weights were not given, e.g. {examples}; expected the whole state dict"
        )


class TorchEngine:
    """A Hugging Face model in a plain decoding loop on a KV cache.

    What it samples for a request does not depend on the batch.
    """

    n_ranks = 1
    held_memory = 0

    def __init__(
        self,
        model: Model,
        max_sequences: int,
        device: torch.device,
        dtype: torch.dtype,
        stop_tokens: StopTokens = "turn-ends",
    ):
        self.path = model.path
        self.model = vision.load_model(model.path, dtype, model.trust_remote_code).eval()
        self.model.to(device)
        attention = families.faithful_attention(self.model, device)
        families.set_attention(self.model.get_decoder(), attention)
        self.device = device
        self.tokenizer = model.tokenizer
        self.max_sequences = max_sequences
        self.end_tokens = torch.tensor(end_tokens(model, stop_tokens), device=device)
        self.check_cache(model.path)

    @torch.inference_mode()
    def check_cache(self, path: str) -> None:
        """Raise ValueError if the model keeps what it has read elsewhere than in a given cache."""
        cache = DynamicCache(config=self.model.config)
        token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        output = self.model(token, past_key_values=cache)
        if getattr(output, "past_key_values", None) is not cache:
            raise ValueError(
                f"{path}: --engine torch cannot sample from {type(self.model).__name__}, "
                "which keeps its state elsewhere than in a KV cache; take --engine vllm"
            )

    def sleep(self) -> None:
        self.model.to("cpu")

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        state = self.model.to(self.device).state_dict()
        given = set()
        for name, tensor in weights:
            if name not in state:
                raise ValueError(
                    f"weight {name!r} is not one of the engine's model; "
                    f"expected Hugging Face parameter names"
                )
            state[name].copy_(tensor)
            given.add(name)
        check_all_given(state.keys() - given)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Episode]:
        # prompts of like lengths go together: little padding
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids))
        batch_size = max(1, self.max_sequences // sampling.n)
        bar = tqdm(
            total=len(requests) * sampling.n,
            desc="roll out",
            unit="seq",
            leave=False,
            delay=3,
            disable=not is_first(),
        )
        n_tokens = 0
        began = time.perf_counter()
        by_request: dict[int, list[Episode]] = {}
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            sampled = self.sample([requests[i] for i in chosen], sampling)
            by_request.update(zip(chosen, in_groups(sampled, sampling.n), strict=True))
            n_tokens += sum(len(episode.response_ids) for episode in sampled)
            bar.update(len(sampled))
            bar.set_postfix_str(f"{n_tokens / (time.perf_counter() - began):.0f} tokens/s")
        bar.close()
        episodes = []
        for i in range(len(requests)):
            episodes += by_request[i]
        return episodes

    @torch.inference_mode()
    def sample(self, requests: Sequence[Request], sampling: Sampling) -> list[Episode]:
        """Sample one batch: one prefill a prompt; rows leave the cache when they have finished."""
        prompts = torch.arange(len(requests), device=self.device).repeat_interleave(sampling.n)
        n_rows = len(prompts)
        limits = torch.tensor([sampling.room(request) for request in requests], device=self.device)
        limits = limits[prompts]  # (rows,)
        longest = int(limits.max())
        uniform = self.draw_uniform(requests, sampling.n, longest)  # (rows, longest)
        cache = DynamicCache(config=self.model.config)
        prefilled = self.prefill(requests, cache)
        cache.reorder_cache(prompts)
        # (rows, V), (rows, S), (rows, 1)
        logits, mask, position = (part[prompts] for part in prefilled)

        tokens = torch.zeros(n_rows, longest, dtype=torch.long, device=self.device)
        logp = torch.zeros(n_rows, longest, device=self.device)
        stopped = torch.zeros(n_rows, dtype=torch.bool, device=self.device)
        rows = torch.arange(n_rows, device=self.device)  # those that are still in the cache
        for k in range(longest):
            token, token_logp = choose(logits.float(), uniform[rows, k], sampling)
            if token_logp.isnan().any():
                raise not_finite(self.path)
            tokens[rows, k] = token
            logp[rows, k] = token_logp
            has_room = k < limits[rows]  # a row without room may still be in the cache
            stopped[rows] |= torch.isin(token, self.end_tokens) & has_room
            running = (~stopped[rows] & (k + 1 < limits[rows])).nonzero().squeeze(1)
            if not len(running):
                break
            # each token copies the cache, as it grows: a tenth fewer rows are worth one copy more
            if len(running) <= 0.9 * len(rows):
                cache.reorder_cache(running)
                rows = rows[running]
                token = token[running]
                mask = mask[running]
                position = position[running]
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            position = position + 1
            output = self.model(
                token[:, None], attention_mask=mask, position_ids=position, past_key_values=cache
            )
            logits = output.logits[:, -1]
        first_end = torch.isin(tokens, self.end_tokens).int().argmax(dim=1)
        lengths = torch.where(stopped, first_end + 1, limits).tolist()
        return self.to_episodes(requests, tokens, logp, stopped, lengths)

    def draw_uniform(self, requests: Sequence[Request], n: int, n_tokens: int) -> Tensor:
        """Return a uniform number for each of n rows a request and token, from the row's seed."""
        rows = []
        for request in requests:
            for i in range(n):
                generator = torch.Generator().manual_seed((request.seed + i) % 2**63)
                rows.append(torch.rand(n_tokens, generator=generator, dtype=torch.float64))
        return torch.stack(rows).to(self.device)

    def prefill(
        self, requests: Sequence[Request], cache: DynamicCache
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run left-padded prompts; return last logits (N, V), mask (N, S), last position (N, 1)."""
        width = max(len(request.prompt_ids) for request in requests)
        padded = []
        masked = []
        for request in requests:
            n_padding = width - len(request.prompt_ids)
            padded.append([0] * n_padding + request.prompt_ids)
            masked.append([0] * n_padding + [1] * len(request.prompt_ids))
        ids = torch.tensor(padded, device=self.device)
        mask = torch.tensor(masked, device=self.device)
        position = mask.cumsum(dim=1) - 1
        position_ids = position.clamp(min=0)
        images = [image for request in requests for image in request.images]
        inputs = {}
        if images:
            # an image's positions are its rows and columns: text goes on from the larger of the two
            pixel_values, grid = vision.stack(images, self.device)
            inputs = {"pixel_values": pixel_values, "image_grid_thw": grid}
            token_types = (ids == self.model.config.image_token_id).int()
            position_ids, shift = self.model.base_model.get_rope_index(
                ids, token_types, image_grid_thw=grid, attention_mask=mask
            )
            position = position + shift
        output = self.model(
            ids,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            logits_to_keep=1,
            **inputs,
        )
        return output.logits[:, -1], mask, position[:, -1:]

    def to_episodes(
        self,
        requests: Sequence[Request],
        tokens: Tensor,
        logp: Tensor,
        stopped: Tensor,
        lengths: Sequence[int],
    ) -> list[Episode]:
        """Cut the sampled rows to their lengths, and make episodes of them."""
        n = len(tokens) // len(requests)
        responses = [row[:length] for row, length in zip(tokens.tolist(), lengths, strict=True)]
        texts = self.tokenizer.batch_decode(responses, skip_special_tokens=True)
        token_logp = logp.tolist()
        episodes = []
        for i, response in enumerate(responses):
            episode = Episode(
                prompt_ids=requests[i // n].prompt_ids,
                response_ids=response,
                logp=token_logp[i][: lengths[i]],
                finish_reason="stop" if stopped[i] else "length",
                text=texts[i],
            )
            episodes.append(episode)
        return episodes


def not_finite(path: str) -> FloatingPointError:
    """Return the error for a model that gives every token the probability NaN."""
    return FloatingPointError(
        f"the model {path} gives tokens the probability NaN: its weights, or those that training "
        "gave it, are not finite or too large; look at them, or take an earlier export or "
        "checkpoint"
    )


def choose(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Choose a token for each row of logits (B, V) by inverting the CDF at uniform (B,).

    Returns tokens and their log-probs, (B,) each.
    """
    if sampling.temperature == 0:
        token = logits.argmax(dim=-1)
        logp = logits.log_softmax(dim=-1)
        return token, logp.gather(1, token[:, None]).squeeze(1)
    logits = logits / sampling.temperature
    if sampling.top_p < 1:
        logits = keep_nucleus(logits, sampling.top_p)
    logp = logits.log_softmax(dim=-1)
    cdf = logp.double().exp().cumsum(dim=-1)
    level = uniform[:, None] * cdf[:, -1:]
    token = torch.searchsorted(cdf, level, right=True).clamp(max=logits.shape[1] - 1)
    return token.squeeze(1), logp.gather(1, token).squeeze(1)


def keep_nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Mask all tokens but the likeliest ones that reach a mass of top_p together, logits (B, V)."""
    ordered, order = logits.sort(dim=-1, descending=True)
    probability = ordered.softmax(dim=-1)
    mass_before = probability.cumsum(dim=-1) - probability  # of the likelier tokens
    outside = (mass_before >= top_p).gather(1, order.argsort(dim=-1))
    return logits.masked_fill(outside, -torch.inf)
