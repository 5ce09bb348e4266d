"""Problems in, episodes out: data sets, prompt templates, model names, and the engines that sample.

Images come from vision.py. Tokens are never rewritten: a response that ran out of room keeps its last token and says "length"
(the official code writes EOS over it, and it can then score as finished).
"""

import json
import os
import re
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
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

import vision

INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."
TAGS = (  # for vision-language models, word for word as published
    "You should first thinks about the reasoning process in the mind and then provides the user with the answer. Your answer must "
    "be in latex format and wrapped in $...$. The reasoning process and answer are enclosed within <think> </think> and <answer> "
    "</answer> tags, respectively, i.e., <think> Since $1+1=2$, so the answer is $2$. </think><answer> $2$ </answer>, which means "
    "your output should start with <think> and end with </answer>."
)
TEMPLATES = {  # one a family, the same for the offline start, training and evaluation
    "qwen": f"<|im_start|>system\n{INSTRUCTION}<|im_end|>\n<|im_start|>user\n{{problem}}<|im_end|>\n<|im_start|>assistant\n",
    "qwen_tag": f"<|im_start|>system\n{TAGS}<|im_end|>\n<|im_start|>user\n{{problem}}<|im_end|>\n<|im_start|>assistant\n",
    "llama": f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n{INSTRUCTION}\n<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n{problem}\n<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n",
    "none": "{problem}",
}
TURN_ENDS = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|end_of_text|>",
)  # end a response, whatever the model's own EOS
ORGANISATIONS = {"Qwen": "Qwen", "Llama": "meta-llama", "gemma": "google", "Mistral": "mistralai"}


# ---- Models and problems
@dataclass(frozen=True)
class Source:
    """Settings that every script has: which model, which problems, how they become prompts."""

    model: str = "toy"  # A path, a hub id, a short name such as Qwen2.5-7B, or toy
    data: str | None = None  # JSONL or Parquet file, save_to_disk folder or hub id
    split: str = "train"  # Split of a hub data set
    problem_column: str | None = (
        None  # Column with its text; by default problem, for vision-language models prompt
    )
    images_column: str = (
        "images"  # Column with a problem's images, if it has any: paths, base64 or bytes
    )
    media_dir: str | None = (
        None  # Folder that paths of images are relative to; by default that of the data
    )
    min_pixels: int | None = (
        None  # Smaller images are enlarged to so many pixels; by default as the model's processor says
    )
    max_pixels: int | None = (
        None  # Larger images are reduced to so many pixels; by default as the model's processor says
    )
    max_images: int = 4  # Most images a problem
    template: str = (
        "auto"  # Prompt template: auto, qwen, qwen_tag, llama, chat, none, or a file with {problem}
    )
    max_prompt_tokens: int | None = (
        None  # Longest prompt accepted; by default 1024, for vision-language models 4096
    )
    trust_remote_code: bool = False  # Run code that comes with the model
    dtype: Literal["auto", "bfloat16", "float32"] = (
        "auto"  # Of forward and backward; auto: bfloat16 on a GPU
    )


@dataclass(frozen=True)
class Sampler(Source):
    """Settings of the scripts that sample."""

    engine: Literal["auto", "vllm", "torch"] = (
        "auto"  # What samples; auto: vLLM on a GPU where it is installed, else torch
    )
    max_tokens: int | None = (
        None  # Longest response; by default 1024, for vision-language models 3072
    )
    max_sequences: int = 256  # Responses that an engine samples at a time; bounds its KV cache
    cache_share: float = 0.45  # Largest share of a GPU's memory for vLLM's KV cache
    tensor_parallel: int = 1  # Ranks that share a vLLM engine; the others have one each


class Model(NamedTuple):
    """What is known of a model before a weight is loaded."""

    path: str  # a folder or a hub id
    config: PretrainedConfig
    n_parameters: int  # of the text decoder, without an untied head
    tokenizer: PreTrainedTokenizerBase
    processor: Callable | None = None  # of images, for a vision-language model


def find_model(
    name: str,
    trust_remote_code: bool = False,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> Model:
    """Find a model by path, hub id or short name (`Qwen2.5-7B`); ValueError if there is none. Limits are those of images."""
    path = name
    if not Path(name).is_dir() and "/" not in name:
        path = next(
            (f"{org}/{name}" for prefix, org in ORGANISATIONS.items() if name.startswith(prefix)),
            name,
        )
        path = re.sub(r"(-VL-\d+B)$", r"\1-Instruct", path)  # of these there is no base model
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        reason, kinds = (
            str(error).splitlines()[0],
            "a folder, a hub id, a short name such as Qwen2.5-7B, or toy",
        )
        raise ValueError(
            f"model {name!r}: {path!r} cannot be loaded ({reason}); expected {kinds}"
        ) from error
    with torch.device("meta"):
        body = AutoModel.from_config(config.get_text_config(), trust_remote_code=trust_remote_code)
    processor = (
        vision.load_processor(path, min_pixels, max_pixels, trust_remote_code)
        if vision.sees(config)
        else None
    )
    return Model(path, config, sum(p.numel() for p in body.parameters()), tokenizer, processor)


def fill_in(config: Source, model: Model) -> Source:
    """Fill in what is None or `auto` from the model, and say it: published settings (paper, implementation details), the
    family's template, and gradient checkpointing where activations would be large."""
    large, sees = model.n_parameters > 5e9, vision.sees(model.config)
    published = {
        "flow_blocks": 6 if large else 4, "noise_repeats": 2 if large else 4, "max_tokens": 3072 if sees else 1024,
        "problem_column": "prompt" if sees else "problem", "reward": ("vlm", "tags=0.5") if sees else ("binary",),
        "freeze": "vision" if sees else "none", "max_prompt_tokens": 4096 if sees else 1024,
        "gradient_checkpointing": model.n_parameters > 1e9,
    }  # fmt: skip
    if getattr(config, "freeze", None) == "vision" and not sees:
        raise ValueError(f"freeze='vision': {model.path} has no vision tower; leave --freeze out")
    derived = {
        name: value for name, value in published.items() if getattr(config, name, "") is None
    }
    derived["template"] = choose_template(config.template, model.tokenizer, model.config.model_type)
    if dist.get_rank() == 0:
        settings = "  ".join(f"{name}={value}" for name, value in derived.items())
        print(
            f"from the model {model.path} ({model.n_parameters / 1e9:.3g}B parameters):  {settings}"
        )
    return replace(config, **derived)


class Problem(NamedTuple):
    """One row of a data set, ready to be sampled."""

    id: str
    text: str
    answer: str | list[str]  # any of a list
    prompt_ids: list[int]
    images: tuple[vision.Image, ...] = ()  # in the order of their placeholders in prompt_ids


def load_rows(
    source: str, columns: Sequence[str], split: str = "train", subset: str | None = None
) -> list[dict]:
    """Read a data set; ValueError where nothing is there, or no rows, or a column is missing or has empty values."""
    if (
        source.endswith(".jsonl") and Path(source).is_file()
    ):  # values of a column may differ in type: "2", ["2", "two"]
        try:
            with open(source, encoding="utf-8") as file:
                rows = [json.loads(line) for line in file if line.strip()]
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{source}: {error.doc[:60]!r} is not JSON ({error}); expected one object a line"
            ) from error
    else:
        rows = read_with_datasets(source, split, subset)
    if not rows:
        raise ValueError(f"{source} holds no rows; expected at least one problem")
    for column in columns:
        if column not in rows[0]:
            raise ValueError(
                f"{source} has no column {column!r}, only {sorted(rows[0])}; name it with a --…-column flag"
            )
        if empty := [i for i, row in enumerate(rows) if row.get(column) in (None, "", [])]:
            where = f"{len(empty)} of {len(rows)} rows, first in row {empty[0]}"
            raise ValueError(
                f"column {column!r} of {source} is empty in {where}; fill or drop them"
            )
    return rows


def read_with_datasets(source: str, split: str, subset: str | None = None) -> list[dict]:
    """Read a Parquet or JSON file, a folder or a hub id with the `datasets` library."""
    import datasets

    path = Path(source)
    try:
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            data = datasets.load_from_disk(source)
            data = data[split] if isinstance(data, datasets.DatasetDict) else data
        elif path.is_file():
            data = datasets.load_dataset(path.suffix[1:], data_files=source, split="train")
        else:
            data = datasets.load_dataset(source, subset, split=split)
    except Exception as error:  # `datasets` raises its readers' errors unwrapped
        reason = f"split {split!r}, {type(error).__name__}: {str(error).splitlines()[0]}"
        raise ValueError(
            f"no data at {source!r} ({reason}); expected a JSONL or Parquet file, a folder or a hub id"
        ) from error
    return data.with_format("arrow")[:].to_pylist()  # as stored: images stay encoded


def choose_template(template: str, tokenizer, model_type: str) -> str:
    """Return the template, with `auto` replaced by the model family's, or by `chat` or `none` for other families."""
    if template != "auto":
        return template
    known = [
        name
        for name in TEMPLATES
        if TEMPLATES[name].partition(">")[0] + ">" in tokenizer.get_vocab()
    ]
    family = next((name for name in known if model_type.startswith(name)), None)
    if family == "qwen" and model_type in vision.FAMILIES:
        return "qwen_tag"
    return family or ("chat" if tokenizer.chat_template else "none")


def make_prompts(
    texts: Sequence[str], tokenizer, source: Source, images: Sequence[tuple] | None = None
) -> list[list[int]]:
    """Put problems into the prompt template and tokenise them, with a placeholder for each vector of their images.

    ValueError if a prompt is longer than the limit, or its images and placeholders do not match: engines would take a
    placeholder for an image that is not there. `images` is None for a model that takes none. The template is a key of
    TEMPLATES, `chat` (the tokenizer's own), `bare` (the same without the instruction), or a file with `{problem}`.
    """
    template, limit, asked = source.template, source.max_prompt_tokens, texts
    if images is not None:
        asked = [
            vision.place(text, len(own), i)
            for i, (text, own) in enumerate(zip(texts, images, strict=True))
        ]
    if template in (
        "chat",
        "bare",
    ):  # the instruction goes to the user's turn: some know no system role
        suffix = f"\n{INSTRUCTION}" if template == "chat" else ""
        chats = [[{"role": "user", "content": text + suffix}] for text in asked]
        prompts = [
            tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            for chat in chats
        ]
    else:
        if template not in TEMPLATES and not Path(template).is_file():
            raise ValueError(
                f"template {template!r}: neither {', '.join(TEMPLATES)}, chat, auto nor a file"
            )
        pattern = TEMPLATES.get(template) or Path(template).read_text()
        if "{problem}" not in pattern:
            raise ValueError(
                f"template {template!r} has no {{problem}} in it; put it where the problem goes"
            )
        prompts = [pattern.replace("{problem}", text) for text in asked]
    ids = tokenizer(prompts, add_special_tokens=template == "none")["input_ids"]
    pad = tokenizer.get_vocab().get(vision.PAD)
    ids = [
        vision.expand(row, own, pad, i)
        for i, (row, own) in enumerate(zip(ids, images or [()] * len(ids), strict=True))
    ]
    if limit and (long := [i for i, row in enumerate(ids) if len(row) > limit]):
        example = f"as row {long[0]} with {len(ids[long[0]])}, {texts[long[0]][:60]!r}"
        pixels = ", lower --max-pixels" if images is not None else ""
        what = f"{len(long)} of {len(ids)} prompts are longer than {limit} tokens"
        raise ValueError(f"{what}, {example}; raise --max-prompt-tokens{pixels} or drop them")
    return ids


def final(answer) -> str:
    """Return an answer as text; of a solution in GSM8K's format, `... #### 18`, what stands behind the mark."""
    return str(answer).rpartition("####")[2].strip()


def load_images(
    rows: Sequence[dict], data: str, source: Source, processor
) -> list[tuple[vision.Image, ...]] | None:
    """Return the images of each row, or None if the model takes none; all ranks together. ValueError with a bad row."""
    folder = vision.media_folder(source.media_dir, data)
    images = vision.load_images(rows, source.images_column, processor, folder, source.max_images)
    return images if processor else None


def load_problems(
    data: str, source: Source, model: Model, subset: str | None = None
) -> list[Problem]:
    """Load problems with their answers, images and tokenised prompts; see load_rows and make_prompts for errors."""
    rows = load_rows(data, (source.problem_column, source.answer_column), source.split, subset)
    return make_problems(rows, data, source, model)


def make_problems(rows: Sequence[dict], data: str, source: Source, model: Model) -> list[Problem]:
    """Make problems of rows that come from `data`, where paths of images begin."""
    texts, answers = (
        [row[column] for row in rows] for column in (source.problem_column, source.answer_column)
    )
    answers = [
        [final(each) for each in answer] if isinstance(answer, list) else final(answer)
        for answer in answers
    ]
    ids = [str(row.get("id", i)) for i, row in enumerate(rows)]
    images = load_images(rows, data, source, model.processor)
    prompts = make_prompts(texts, model.tokenizer, source, images)
    return [
        Problem(*parts)
        for parts in zip(ids, texts, answers, prompts, images or [()] * len(rows), strict=True)
    ]


# ---- Engines
@dataclass(frozen=True)
class Sampling:
    """How to sample."""

    n: int = 1  # responses a prompt
    temperature: float = 1.0  # 0 is greedy
    max_tokens: int = 1024  # response tokens, EOS included
    top_p: float = 1.0


@dataclass
class Episode:
    """One sampled response."""

    prompt_ids: list[int]
    response_ids: list[int]  # with EOS if it came
    logp: list[float]  # the sampler's log-prob of each token, at the temperature
    finish_reason: Literal["stop", "length"]
    text: str  # the response without special tokens
    images: tuple[vision.Image, ...] = ()  # of the prompt


class Engine(Protocol):
    """Samples with the policy's weights: `generate` gives n consecutive episodes a prompt, child i with the prompt's seed + i;
    `load_weights` wakes it and takes all weights, by their names in the state dict; `sleep` frees the accelerator, weights
    included. `n_ranks` is how many ranks share it. `images` are those of each prompt; None: there are none."""

    n_ranks: int

    def generate(
        self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int], images=None
    ) -> list[Episode]: ...
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None: ...
    def sleep(self) -> None: ...


def make_engine(model: Model, config: Sampler, device: torch.device, dtype: torch.dtype) -> Engine:
    """Start the engine that the settings ask for, and say which; all ranks together."""
    kind, reason = config.engine, "as --engine says"
    if kind == "auto":
        installed = find_spec("vllm") is not None
        kind = "vllm" if installed and device.type == "cuda" else "torch"
        reason = (
            "there is no GPU"
            if device.type != "cuda"
            else "installed"
            if installed
            else "vLLM is not installed"
        )
    heads = model.config.get_text_config().num_attention_heads
    if heads % config.tensor_parallel:
        raise ValueError(
            f"tensor_parallel={config.tensor_parallel} does not divide the model's {heads} attention heads"
        )
    began, options = (
        time.perf_counter(),
        (device, dtype, config.trust_remote_code, config.max_sequences),
    )
    if kind == "torch":
        engine = TorchEngine(model.path, model.tokenizer, *options)
    else:
        length = config.max_prompt_tokens + config.max_tokens
        options = (
            *options,
            config.cache_share,
            config.tensor_parallel,
            model.processor,
            config.max_images,
        )
        engine = VllmEngine(model.path, model.tokenizer, length, *options)
    if dist.get_rank() == 0:
        print(
            f"engine: {kind} on {device} in {dtype}, {reason}; started in {time.perf_counter() - began:.1f} s"
        )
    return engine


def check_engine(config: Sampler, n_ranks: int) -> None:
    """Raise ValueError for engine settings that cannot work."""
    if config.engine == "vllm" and find_spec("vllm") is None:
        raise ValueError(
            "--engine vllm: vLLM is not installed; pip install -r requirements.txt, or take --engine torch"
        )
    if n_ranks % config.tensor_parallel or (
        config.tensor_parallel > 1 and config.engine == "torch"
    ):
        raise ValueError(
            f"tensor_parallel={config.tensor_parallel}: expected a divisor of {n_ranks} ranks, and vLLM"
        )
    if not 0 < config.cache_share < 1:
        raise ValueError(f"cache_share={config.cache_share} is outside (0, 1)")


def generate_on_all_ranks(
    engine: Engine,
    prompts,
    sampling: Sampling,
    seeds,
    expected: Sequence[float],
    images: Sequence[tuple] | None = None,
) -> list[Episode]:
    """Deal prompts to the ranks' engines, balanced by expected tokens (one a prompt); give every rank all episodes, in order."""
    images = [()] * len(prompts) if images is None else images
    shares: list[list[int]] = [[] for _ in range(dist.get_world_size() // engine.n_ranks)]
    load = [0.0] * len(shares)
    for i in sorted(range(len(prompts)), key=lambda i: -expected[i]):
        lightest = load.index(min(load))
        shares[lightest].append(i)
        load[lightest] += expected[i]
    mine = shares[dist.get_rank() // engine.n_ranks]
    gathered: list = [None] * dist.get_world_size()
    own = [[values[i] for i in mine] for values in (prompts, seeds, images)]
    dist.all_gather_object(gathered, engine.generate(own[0], sampling, *own[1:]))
    found = {}
    for share, episodes in zip(shares, gathered[:: engine.n_ranks], strict=True):
        found |= {
            i: episodes[place * sampling.n : (place + 1) * sampling.n]
            for place, i in enumerate(share)
        }
    # every rank has the images: they do not travel with the episodes
    return [replace(episode, images=images[i]) for i in range(len(prompts)) for episode in found[i]]


def grade_on_all_ranks(
    grader, problems: Sequence[Problem], episodes: Sequence[Episode]
) -> Callable[[], list]:
    """Have every rank grade a share in the background; return a function that waits for the verdicts on all, in order.

    All ranks must call this, and first call what it returns, together.
    """
    n, rank, n_ranks = len(episodes) // len(problems), dist.get_rank(), dist.get_world_size()
    mine = [
        episode
        for i in range(rank, len(problems), n_ranks)
        for episode in episodes[i * n : (i + 1) * n]
    ]
    own = grader.submit(problems[rank::n_ranks], mine)

    @cache
    def verdicts() -> list:
        graded: list = [None] * n_ranks
        dist.all_gather_object(graded, own.result())
        return [
            graded[i % n_ranks][i // n_ranks * n + k]
            for i in range(len(problems))
            for k in range(n)
        ]

    return verdicts


def end_tokens(path: str, tokenizer, trust_remote_code: bool) -> list[int]:
    """Return the tokens that end a response: the model's, the tokenizer's and those that end a turn of a chat."""
    try:
        ends = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # the model has none
        ends = (
            AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
            .get_text_config()
            .eos_token_id
        )
    vocabulary = tokenizer.get_vocab()
    ends = {
        *(ends if isinstance(ends, list) else [ends]),
        *(vocabulary[t] for t in TURN_ENDS if t in vocabulary),
    }
    return sorted((ends | {tokenizer.eos_token_id}) - {None})


class VllmEngine:
    """vLLM in this process: an engine for each rank, or for `n_ranks` neighbours, which must then make the same calls.

    Asleep it holds neither weights nor cache (sleep level 2) and must be given weights before it samples. On a CPU sleeping
    frees nothing. max_length bounds prompt + response; cache_share is the largest part of a GPU that the cache may take.
    max_images bounds the images of a prompt; the image processor is None for a model without one.
    """

    def __init__(
        self, path: str, tokenizer, max_length: int, device: torch.device | str = "cpu", dtype=torch.float32,
        trust_remote_code=False, max_sequences=256, cache_share=0.45, n_ranks=1, processor=None, max_images=4,
    ):  # fmt: skip
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = (
            "0"  # the engine's loop runs here, not in a process of its own
        )
        for name, value in {
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }.items():
            os.environ.setdefault(name, value)
        warnings.filterwarnings("ignore", module="vllm")
        import vllm

        if (
            on_cpu := torch.device(device).type == "cpu"
        ):  # oneDNN packs weights at the start and would never see new ones
            from vllm import _custom_ops

            assert hasattr(_custom_ops, "_supports_onednn"), (
                f"vLLM {vllm.__version__}: no switch for packed weights"
            )
            _custom_ops._supports_onednn = False
        text, sees = (
            AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code).get_text_config(),
            {},
        )
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        token_bytes = (
            2 * text.num_hidden_layers * text.num_key_value_heads * head * dtype.itemsize // n_ranks
        )
        cache = (
            max_sequences * (max_length + 128) * token_bytes
        )  # 128: a sequence ends within a block
        if not on_cpu:
            cache = min(
                cache, int(cache_share * torch.cuda.get_device_properties(device).total_memory)
            )
        if (
            processor is not None
        ):  # the trainer's limits, but for images that no prompt has room for: vLLM plans for the largest
            if find_spec("torchvision") is None:
                raise ValueError(
                    "--engine vllm needs torchvision for images: pip install it, or take --engine torch"
                )
            low, high = processor.size["shortest_edge"], processor.size["longest_edge"]
            room = max_length * (processor.patch_size * processor.merge_size) ** 2
            limits = {"min_pixels": low, "max_pixels": max(low, min(high, room))}
            sees = {
                "limit_mm_per_prompt": {"image": max_images, "video": 0},
                "mm_processor_kwargs": limits,
            }
        launched = (
            {"distributed_executor_backend": "external_launcher"} if "RANK" in os.environ else {}
        )
        self.llm = vllm.LLM(
            path, dtype=str(dtype).removeprefix("torch."), max_model_len=max_length, max_num_seqs=max_sequences,
            kv_cache_memory_bytes=cache, gpu_memory_utilization=0.1,  # the latter is only checked at the start
            enable_chunked_prefill=False, max_num_batched_tokens=max(8192, max_length),  # a CPU cannot seed parts of a prompt
            enforce_eager=on_cpu, enable_sleep_mode=not on_cpu, tensor_parallel_size=n_ranks, generation_config="vllm",
            logprobs_mode="processed_logprobs",  # at the temperature; raw ones are not divided by it
            trust_remote_code=trust_remote_code, disable_log_stats=True, use_tqdm_on_load=False, seed=0, **launched, **sees,
        )  # fmt: skip
        self.tokenizer, self.n_ranks, self.state = tokenizer, n_ranks, "awake"
        self.ends, self.SamplingParams = (
            end_tokens(path, tokenizer, trust_remote_code),
            vllm.SamplingParams,
        )

    def sleep(self) -> None:
        if self.state == "no cache":  # vLLM may ignore a sleep when only a part is awake
            self.llm.wake_up(tags=["kv_cache"])
        if self.state != "asleep":
            self.llm.sleep(level=2)
        self.state = "asleep"

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        if (
            self.state == "asleep"
        ):  # weights first: the cache's room is still the trainer's, which gathers them
            torch.cuda.empty_cache()
            self.llm.wake_up(tags=["weights"])
            self.state = "no cache"

        def load(model) -> None:
            if missing := sorted(
                dict(model.named_parameters()).keys() - model.load_weights(weights)
            ):
                raise ValueError(
                    f"{len(missing)} weights were not given, as {missing[:3]}; expected the whole state dict"
                )

        self.llm.apply_model(load)
        self.llm.reset_prefix_cache()  # it holds keys and values of the old weights
        self.llm.llm_engine.reset_encoder_cache()  # and this what the old weights saw in images

    def generate(
        self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int], images=None
    ) -> list[Episode]:
        if self.state == "asleep":
            raise RuntimeError("the engine sleeps without weights; call load_weights first")
        if self.state == "no cache":  # without it, vLLM would wait for ever
            torch.cuda.empty_cache()
            self.llm.wake_up(tags=["kv_cache"])
            self.state = "awake"
        shared = dict(
            n=sampling.n,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=0,
            logprobs=0,
        )
        shared |= dict(max_tokens=sampling.max_tokens, stop_token_ids=self.ends, detokenize=False)
        bar = (
            partial(tqdm, leave=False, delay=3) if dist.get_rank() == 0 else False
        )  # shows tokens a second
        found = self.llm.generate(
            [self.request(*parts) for parts in zip(prompts, images or [()] * len(prompts), strict=True)],
            [self.SamplingParams(seed=seed, **shared) for seed in seeds], use_tqdm=bar,
        )  # fmt: skip
        episodes = []
        for prompt, request in zip(prompts, found, strict=True):
            for child in request.outputs:
                ids = list(child.token_ids)
                logp = [
                    step[token].logprob for token, step in zip(ids, child.logprobs, strict=True)
                ]
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
                episodes.append(Episode(prompt, ids, logp, child.finish_reason, text))
        return episodes

    def request(self, prompt: list[int], images: Sequence[vision.Image]) -> dict:
        """Return what vLLM calls a prompt: tokens, with one placeholder an image, and the images."""
        if not images:
            return {"prompt_token_ids": prompt}
        ids = vision.collapse(prompt, self.tokenizer.convert_tokens_to_ids(vision.PAD))
        return {
            "prompt_token_ids": ids,
            "multi_modal_data": {"image": [image.open() for image in images]},
        }


class TorchEngine:
    """A Hugging Face model in a plain decoding loop on a KV cache. What it samples does not depend on the batch."""

    n_ranks = 1

    def __init__(
        self, path: str, tokenizer, device: torch.device | str = "cpu", dtype=torch.float32, trust_remote_code=False,
        max_sequences=256,
    ):  # fmt: skip
        self.model = vision.load_model(path, dtype, trust_remote_code).eval()
        self.tokenizer, self.device, self.max_sequences = (
            tokenizer,
            torch.device(device),
            max_sequences,
        )
        self.ends = torch.tensor(end_tokens(path, tokenizer, trust_remote_code), device=self.device)
        self.model.to(self.device)

    def sleep(self) -> None:
        self.model.to("cpu")

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        own, given = self.model.to(self.device).state_dict(), set()
        for name, tensor in weights:
            if name not in own:
                raise ValueError(
                    f"weight {name!r} is not one of the engine's model; expected Hugging Face parameter names"
                )
            own[name].copy_(tensor)
            given.add(name)
        if missing := sorted(own.keys() - given):
            raise ValueError(
                f"{len(missing)} weights were not given, as {missing[:3]}; expected the whole state dict"
            )

    def generate(
        self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int], images=None
    ) -> list[Episode]:
        images = images or [()] * len(prompts)
        order = sorted(
            range(len(prompts)), key=lambda i: len(prompts[i])
        )  # like lengths together: little padding
        size = max(1, self.max_sequences // sampling.n)
        episodes: dict[int, list[Episode]] = {}
        options = {"unit": "seq", "leave": False, "delay": 3, "disable": dist.get_rank() > 0}
        n_tokens, began = 0, time.perf_counter()
        with tqdm(total=len(prompts) * sampling.n, desc="roll out", **options) as bar:
            for rows in (order[i : i + size] for i in range(0, len(order), size)):
                own = [[values[i] for i in rows] for values in (prompts, seeds, images)]
                sampled = self.sample(own[0], sampling, *own[1:])
                for place, i in enumerate(rows):
                    episodes[i] = sampled[place * sampling.n : (place + 1) * sampling.n]
                bar.update(len(sampled))
                n_tokens += sum(len(episode.response_ids) for episode in sampled)
                bar.set_postfix_str(f"{n_tokens / (time.perf_counter() - began):.0f} tokens/s")
        return [episode for i in range(len(prompts)) for episode in episodes[i]]

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int], images
    ) -> list[Episode]:
        """Sample one batch: left-padded prompts, one prefill a prompt, rows leave the cache when they have finished."""
        n, limit = sampling.n, sampling.max_tokens
        width = max(len(p) for p in prompts)
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=self.device)
        mask = torch.tensor(
            [[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device
        )
        # one uniform number a token, from the row's own seed: the batch has no say in what a row samples
        generators = [
            torch.Generator().manual_seed((seed + i) % 2**63) for seed in seeds for i in range(n)
        ]
        uniform = torch.stack(
            [torch.rand(limit, generator=g, dtype=torch.float64) for g in generators]
        ).to(self.device)
        cache, position = DynamicCache(config=self.model.config), mask.cumsum(dim=1) - 1
        state, shown = (
            {
                "attention_mask": mask,
                "position_ids": position.clamp(min=0),
                "past_key_values": cache,
            },
            {},
        )
        if any(
            images
        ):  # an image's positions are its rows and columns: the text after it goes on from the larger of the two
            pixels, grids = vision.stack([image for own in images for image in own], self.device)
            shown = {"pixel_values": pixels, "image_grid_thw": grids}
            kinds = (ids == self.model.config.image_token_id).int()
            where = {"image_grid_thw": grids, "attention_mask": mask}
            state["position_ids"], shift = self.model.base_model.get_rope_index(ids, kinds, **where)
            position = position + shift
        logits = self.model(ids, **state, **shown, logits_to_keep=1).logits[:, -1]
        cache.batch_repeat_interleave(n)
        logits, mask, position = (
            x.repeat_interleave(n, dim=0) for x in (logits, mask, position[:, -1:])
        )

        tokens = torch.zeros(len(uniform), limit, dtype=torch.long, device=self.device)
        logp = torch.zeros(len(uniform), limit, device=self.device)
        stopped = torch.zeros(len(uniform), dtype=torch.bool, device=self.device)
        rows = torch.arange(len(uniform), device=self.device)  # the rows still in the cache
        for k in range(limit):
            token, logp[rows, k] = choose(logits.float(), uniform[rows, k], sampling)
            tokens[rows, k] = token
            stopped[rows] |= torch.isin(token, self.ends)
            running = (~stopped[rows]).nonzero().squeeze(1)
            if k + 1 == limit or not len(running):
                break
            if len(running) <= 0.75 * len(rows):
                cache.batch_select_indices(running)
                rows, token, mask, position = (x[running] for x in (rows, token, mask, position))
            mask, position = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1), position + 1
            state = {"attention_mask": mask, "position_ids": position, "past_key_values": cache}
            logits = self.model(token[:, None], **state).logits[:, -1]

        length = torch.where(
            stopped, torch.isin(tokens, self.ends).int().argmax(dim=1) + 1, limit
        ).tolist()
        responses = [row[:end] for row, end in zip(tokens.tolist(), length, strict=True)]
        logps = [row[:end] for row, end in zip(logp.tolist(), length, strict=True)]
        reasons = ["stop" if stop else "length" for stop in stopped.tolist()]
        texts = self.tokenizer.batch_decode(responses, skip_special_tokens=True)
        return [
            Episode(prompts[i // n], *parts)
            for i, parts in enumerate(zip(responses, logps, reasons, texts, strict=True))
        ]


def choose(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Choose a token for each row of logits (B, V) by inverting the CDF at uniform (B,); return tokens and log-probs (B,)."""
    if sampling.temperature == 0:
        token = logits.argmax(dim=-1)
        return token, logits.log_softmax(dim=-1).gather(1, token[:, None]).squeeze(1)
    logits = logits / sampling.temperature
    if sampling.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(
            dim=-1
        )  # mass of the likelier tokens
        logits = logits.masked_fill(
            (before >= sampling.top_p).gather(1, order.argsort(dim=-1)), -torch.inf
        )
    logp = logits.log_softmax(dim=-1)
    cdf = logp.double().exp().cumsum(dim=-1)
    token = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True).clamp(
        max=logits.shape[1] - 1
    )
    return token.squeeze(1), logp.gather(1, token).squeeze(1)
