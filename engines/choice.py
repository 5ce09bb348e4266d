"""Which engine samples: what --engine says, or what the machine has."""

import time
from importlib.util import find_spec
from pathlib import Path

import torch

from engines.torch_engine import TorchEngine
from engines.vllm_engine import FEW_SEQUENCES, VllmEngine
from infra.files import import_file
from infra.models import Model
from infra.parallel import is_first
from rollout import Capacity, Engine, EngineSettings


def check_engine(settings: EngineSettings, n_ranks: int) -> None:
    """Raise ValueError for engine settings that cannot work."""
    is_known = settings.engine in ("auto", "vllm", "torch")
    if not is_known and not (is_file(settings.engine) and Path(settings.engine).is_file()):
        raise ValueError(f"--engine {settings.engine}: expected auto, vllm, torch or a Python file")
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


def is_file(engine: str) -> bool:
    """Return whether --engine names a file with an engine."""
    return engine.endswith(".py")


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
        sizes = (settings.max_sequences or FEW_SEQUENCES, device, dtype)
        engine = TorchEngine(model, *sizes, settings.stop_tokens)
    elif kind == "vllm":
        engine = VllmEngine(model, settings, capacity, device, dtype, can_sleep)
    else:
        make = getattr(import_file(kind), "make_engine", None)
        if make is None:
            raise ValueError(f"--engine {kind} defines no function make_engine, see docs/turns.md")
        engine = make(model, settings, capacity, device=device, dtype=dtype, can_sleep=can_sleep)
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
