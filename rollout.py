"""Problems in, episodes out: data sets, prompt templates, model names, and the engine that samples.

Tokens are never rewritten: a response that ran out of room keeps its last token and says "length" (the official code
writes EOS over it, and it can then score as finished).
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."
TEMPLATES = {  # one a family, the same for the offline start, training and evaluation
    "qwen": f"<|im_start|>system\n{INSTRUCTION}<|im_end|>\n<|im_start|>user\n{{problem}}<|im_end|>\n<|im_start|>assistant\n",
    "llama": f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n{INSTRUCTION}\n<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n{problem}\n<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n",
    "none": "{problem}",
}
TURN_ENDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>")  # end a response, whatever the model's own EOS
ORGANISATIONS = {"Qwen": "Qwen", "Llama": "meta-llama", "gemma": "google", "Mistral": "mistralai"}


# ---- Models and problems
@dataclass(frozen=True)
class Source:
    """Settings that every script has: which model, which problems, how they become prompts."""

    model: str = "toy"  # A path, a hub id, a short name such as Qwen2.5-7B, or toy
    data: str | None = None  # JSONL or Parquet file, save_to_disk folder or hub id
    split: str = "train"  # Split of a hub data set
    problem_column: str = "problem"  # Column with the problem's text
    template: str = "auto"  # Prompt template: auto, qwen, llama, chat, none, or a file with {problem}
    max_prompt_tokens: int = 1024  # Longest prompt accepted
    trust_remote_code: bool = False  # Run code that comes with the model


def resolve_model(name: str, trust_remote_code: bool = False) -> str:
    """Turn a path, hub id or short name (`Qwen2.5-7B`) into what Hugging Face loads; ValueError if there is no such model."""
    path = name
    if not Path(name).is_dir() and "/" not in name:
        path = next((f"{org}/{name}" for prefix, org in ORGANISATIONS.items() if name.startswith(prefix)), name)
    try:
        AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        reason, kinds = str(error).splitlines()[0], "a folder, a hub id, a short name such as Qwen2.5-7B, or toy"
        raise ValueError(f"model {name!r}: {path!r} cannot be loaded ({reason}); expected {kinds}") from error
    return path


class Problem(NamedTuple):
    """One row of a data set, ready to be sampled."""

    id: str
    text: str
    answer: str | list[str]  # any of a list
    prompt_ids: list[int]


def load_rows(source: str, columns: Sequence[str], split: str = "train") -> list[dict]:
    """Read a data set; ValueError where nothing is there, or no rows, or a column is missing or has empty values."""
    if source.endswith(".jsonl") and Path(source).is_file():  # values of a column may differ in type: "2", ["2", "two"]
        try:
            with open(source, encoding="utf-8") as file:
                rows = [json.loads(line) for line in file if line.strip()]
        except json.JSONDecodeError as error:
            raise ValueError(f"{source}: {error.doc[:60]!r} is not JSON ({error}); expected one object a line") from error
    else:
        rows = read_with_datasets(source, split)
    if not rows:
        raise ValueError(f"{source} holds no rows; expected at least one problem")
    for column in columns:
        if column not in rows[0]:
            raise ValueError(f"{source} has no column {column!r}, only {sorted(rows[0])}; name it with a --…-column flag")
        if empty := [i for i, row in enumerate(rows) if row.get(column) in (None, "", [])]:
            where = f"{len(empty)} of {len(rows)} rows, first in row {empty[0]}"
            raise ValueError(f"column {column!r} of {source} is empty in {where}; fill or drop them")
    return rows


def read_with_datasets(source: str, split: str) -> list[dict]:
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
            data = datasets.load_dataset(source, split=split)
    except Exception as error:  # `datasets` raises its readers' errors unwrapped
        reason = f"split {split!r}, {type(error).__name__}: {str(error).splitlines()[0]}"
        raise ValueError(f"no data at {source!r} ({reason}); expected a JSONL or Parquet file, a folder or a hub id") from error
    return data.to_list()


def make_prompts(texts: Sequence[str], tokenizer, source: Source, model_type: str) -> list[list[int]]:
    """Put problems into the prompt template and tokenise them; ValueError if a prompt is longer than the limit.

    The template is `auto` (by model family), a key of TEMPLATES, `chat` (the tokenizer's own), or a file with `{problem}`.
    """
    template, limit = source.template, source.max_prompt_tokens
    if template == "auto":
        known = [name for name in TEMPLATES if TEMPLATES[name].partition(">")[0] + ">" in tokenizer.get_vocab()]
        family = next((name for name in known if model_type.startswith(name)), None)
        template = family or ("chat" if tokenizer.chat_template else "none")
    if template == "chat":
        chats = [[{"role": "user", "content": f"{text}\n{INSTRUCTION}"}] for text in texts]  # some know no system role
        prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    else:
        if template not in TEMPLATES and not Path(template).is_file():
            raise ValueError(f"template {template!r}: neither {', '.join(TEMPLATES)}, chat, auto nor a file")
        pattern = TEMPLATES.get(template) or Path(template).read_text()
        if "{problem}" not in pattern:
            raise ValueError(f"template {template!r} has no {{problem}} in it; put it where the problem goes")
        prompts = [pattern.replace("{problem}", text) for text in texts]
    ids = tokenizer(prompts, add_special_tokens=template == "none")["input_ids"]
    if long := [i for i, row in enumerate(ids) if len(row) > limit]:
        example = f"as row {long[0]} with {len(ids[long[0]])}, {texts[long[0]][:60]!r}"
        what = f"{len(long)} of {len(ids)} prompts are longer than {limit} tokens"
        raise ValueError(f"{what}, {example}; raise --max-prompt-tokens or drop them")
    return ids


def load_problems(data: str, source: Source, tokenizer, model_type: str = "") -> list[Problem]:
    """Load problems with their answers and tokenised prompts; see load_rows and make_prompts for errors."""
    rows = load_rows(data, (source.problem_column, source.answer_column), source.split)
    texts, answers = ([row[column] for row in rows] for column in (source.problem_column, source.answer_column))
    answers = [[str(each) for each in answer] if isinstance(answer, list) else str(answer) for answer in answers]
    ids = [str(row.get("id", i)) for i, row in enumerate(rows)]
    prompts = make_prompts(texts, tokenizer, source, model_type)
    return [Problem(*parts) for parts in zip(ids, texts, answers, prompts, strict=True)]


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


class Engine(Protocol):
    """Samples with the policy's weights: `generate` gives n consecutive episodes a prompt, child i with the prompt's seed + i;
    `load_weights` takes new weights by Hugging Face parameter name; `sleep` frees the accelerator, `wake` takes it again."""

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int]) -> list[Episode]: ...
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None: ...
    def sleep(self) -> None: ...
    def wake(self) -> None: ...


class TorchEngine:
    """A Hugging Face model in a plain decoding loop on a KV cache. What it samples does not depend on the batch."""

    def __init__(self, path: str, tokenizer, device: torch.device | str = "cpu", trust_remote_code=False, max_sequences=256):
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=trust_remote_code).eval()
        self.tokenizer, self.device, self.max_sequences = tokenizer, torch.device(device), max_sequences
        ends = self.model.generation_config.eos_token_id
        vocabulary = tokenizer.get_vocab()
        ends = {*(ends if isinstance(ends, list) else [ends]), *(vocabulary[t] for t in TURN_ENDS if t in vocabulary)}
        ends = (ends | {tokenizer.eos_token_id}) - {None}
        self.ends = torch.tensor(sorted(ends), device=self.device)
        self.wake()

    def sleep(self) -> None:
        self.model.to("cpu")

    def wake(self) -> None:
        self.model.to(self.device)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        own, given = self.model.state_dict(), set()
        for name, tensor in weights:
            if name not in own:
                raise ValueError(f"weight {name!r} is not one of the engine's model; expected Hugging Face parameter names")
            own[name].copy_(tensor)
            given.add(name)
        if missing := sorted(own.keys() - given):
            raise ValueError(f"{len(missing)} weights were not given, as {missing[:3]}; expected the whole state dict")

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int]) -> list[Episode]:
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # like lengths together: little padding
        size = max(1, self.max_sequences // sampling.n)
        episodes: dict[int, list[Episode]] = {}
        with tqdm(total=len(prompts) * sampling.n, desc="roll out", unit="seq", leave=False, delay=3) as bar:
            for rows in (order[i : i + size] for i in range(0, len(order), size)):
                sampled = self.sample([prompts[i] for i in rows], sampling, [seeds[i] for i in rows])
                for place, i in enumerate(rows):
                    episodes[i] = sampled[place * sampling.n : (place + 1) * sampling.n]
                bar.update(len(sampled))
        return [episode for i in range(len(prompts)) for episode in episodes[i]]

    @torch.no_grad()
    def sample(self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int]) -> list[Episode]:
        """Sample one batch: left-padded prompts, one prefill a prompt, rows leave the cache when they have finished."""
        n, limit = sampling.n, sampling.max_tokens
        width = max(len(p) for p in prompts)
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        # one uniform number a token, from the row's own seed: the batch has no say in what a row samples
        generators = [torch.Generator().manual_seed((seed + i) % 2**63) for seed in seeds for i in range(n)]
        uniform = torch.stack([torch.rand(limit, generator=g, dtype=torch.float64) for g in generators]).to(self.device)
        cache, position = DynamicCache(config=self.model.config), mask.cumsum(dim=1) - 1
        state = {"attention_mask": mask, "position_ids": position.clamp(min=0), "past_key_values": cache}
        logits = self.model(ids, **state, logits_to_keep=1).logits[:, -1]
        cache.batch_repeat_interleave(n)
        logits, mask, position = (x.repeat_interleave(n, dim=0) for x in (logits, mask, position[:, -1:]))

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

        length = torch.where(stopped, torch.isin(tokens, self.ends).int().argmax(dim=1) + 1, limit).tolist()
        responses = [row[:end] for row, end in zip(tokens.tolist(), length, strict=True)]
        logps = [row[:end] for row, end in zip(logp.tolist(), length, strict=True)]
        reasons = ["stop" if stop else "length" for stop in stopped.tolist()]
        texts = self.tokenizer.batch_decode(responses, skip_special_tokens=True)
        return [Episode(prompts[i // n], *parts) for i, parts in enumerate(zip(responses, logps, reasons, texts, strict=True))]


def choose(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Choose a token for each row of logits (B, V) by inverting the CDF at uniform (B,); return tokens and log-probs (B,)."""
    if sampling.temperature == 0:
        token = logits.argmax(dim=-1)
        return token, logits.log_softmax(dim=-1).gather(1, token[:, None]).squeeze(1)
    logits = logits / sampling.temperature
    if sampling.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)  # mass of the likelier tokens
        logits = logits.masked_fill((before >= sampling.top_p).gather(1, order.argsort(dim=-1)), -torch.inf)
    logp = logits.log_softmax(dim=-1)
    cdf = logp.double().exp().cumsum(dim=-1)
    token = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True).clamp(max=logits.shape[1] - 1)
    return token.squeeze(1), logp.gather(1, token).squeeze(1)
