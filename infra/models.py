"""Models before a weight is loaded: their names, settings and tokenizers.

A model is named by a path, a hub id or a short name such as Qwen2.5-7B.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from infra import vision
from infra.errors import in_short
from infra.ranges import PositiveInt

# Folders of that name are in every run, and say nothing of a model
OF_EVERY_RUN = re.compile(r"policy|exports|step-\d+")
StopTokens = Literal["turn-ends", "eos"]
ORGANISATIONS = {"Qwen": "Qwen", "Llama": "meta-llama", "gemma": "google", "Mistral": "mistralai"}


@dataclass(frozen=True)
class LoadingSettings:
    """How a model is loaded."""

    # Compute dtype of forward and backward; auto: bfloat16 on a GPU
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    trust_remote_code: bool = False  # Run code that comes with the model
    # Larger images are reduced to this size; None: the processor's
    max_pixels: PositiveInt | None = None


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
        n_parameters = count_parameters(config, remote_code)
    except Exception as error:  # transformers passes on whatever its readers raise
        raise ValueError(
            f"model {name!r}: {path!r} cannot be loaded ({in_short(error)}); expected a folder, a "
            f"hub id, a short name such as Qwen2.5-7B, or toy"
        ) from error
    processor = None
    if vision.takes_images(config):
        processor = vision.load_processor(path, loading.max_pixels, remote_code)
    return Model(path, config, n_parameters, tokenizer, processor, remote_code)


def count_parameters(config: PretrainedConfig, trust_remote_code: bool) -> int:
    """Return how many weights the text decoder of a configuration has, without an untied head."""
    with torch.device("meta"):
        body = AutoModel.from_config(config.get_text_config(), trust_remote_code=trust_remote_code)
    return sum(parameter.numel() for parameter in body.parameters())


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
