"""What a run leaves behind, in formats that others read: a policy and its adapters."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from infra import lora, parallel
from infra.files import folder_written_whole
from infra.parallel import on_first

WEIGHTS_FILE = "weights.safetensors"  # of a dense reward


def export_policy(policy, dtype: torch.dtype, processors: Sequence, folder: Path) -> None:
    """Write a sharded policy in Hugging Face format, adapters merged; all ranks together.

    `processors` are the tokenizer and the image processor, None if the model takes no images.
    """
    module = policy.model
    weights = parallel.gather_weights(policy.whole_weights(dtype))

    def write() -> None:
        with torch.device("meta"):  # the same model, but not sharded, in the dtype of the weights
            whole = type(module)(module.config).to(dtype)
        whole.generation_config = module.generation_config
        stored = {name for name, _ in whole.named_parameters()}  # a tied weight has one name here
        stored.update(name for name, _ in whole.named_buffers())
        stored_weights = {name: weights[name] for name in weights if name in stored}
        with folder_written_whole(folder, overwrite=True) as temporary:
            whole.save_pretrained(temporary, state_dict=stored_weights)
            for processor in processors:
                if processor is not None:
                    processor.save_pretrained(temporary)

    on_first(write)


def export_adapter(policy, base: str, folder: Path) -> None:
    """Write the adapters of a sharded policy in peft's format; all ranks together.

    `base` is the path or hub id of the model that they were trained on.
    """
    weights = parallel.gather_weights(lora.adapter_weights(policy, prefix="model."))
    settings = replace(policy.model.peft_config[lora.ADAPTER], base_model_name_or_path=base)

    def write() -> None:
        with folder_written_whole(folder, overwrite=True) as temporary:
            settings.save_pretrained(temporary)
            save_file(weights, temporary / "adapter_model.safetensors")

    on_first(write)


def export_module(module: nn.Module, folder: Path) -> None:
    """Write the state of a module that may be sharded as safetensors; all ranks together."""
    weights = parallel.gather_weights(parallel.full_weights(module, torch.float32))
    on_first(lambda: write_weights(weights, folder))


def write_weights(weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Write tensors as safetensors into a folder, which is replaced."""
    whole = {name: tensor.contiguous() for name, tensor in weights.items()}
    with folder_written_whole(folder, overwrite=True) as temporary:
        temporary.mkdir()
        save_file(whole, temporary / WEIGHTS_FILE)
