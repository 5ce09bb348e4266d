"""Low-rank adapters (LoRA, arXiv 2106.09685): few weights learn, beside a model that stays as it is.

    y = W x + scale * B A x      W (out, in) is frozen, A (rank, in) and B (out, rank) learn
    scale = alpha / rank         add_adapters
    W' = W + scale * B A         merged_weights: what engines and exports get, a plain model
    y = W x                      Base: the model before it learnt, the reference of a KL

B starts at zero, so that a policy starts as the model itself. Every linear layer of the decoder has
an adapter; embeddings, norms, head and vision tower have none and do not learn.

The adapters are those of peft, which is an optional dependency: pip install peft.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from infra import parallel
from infra.batching import keyed_seed

ADAPTER = "default"  # peft's name of a layer's only adapter
BASE = ".base_layer."  # what peft puts into the names of a layer's own weights


def check_installed() -> None:
    """Raise ValueError if peft is missing."""
    if find_spec("peft") is None:
        raise ValueError(
            "lora_rank needs peft, which is not installed; run `pip install peft`, "
            "or leave --lora-rank out to train all weights"
        )


def add_adapters(model: nn.Module, layers: nn.ModuleList, rank: int, seed: int) -> None:
    """Put an adapter into each linear layer among a model's decoder layers; freeze all else.

    Its output is scaled by alpha/rank, where alpha is twice the rank. It has to be done before the model is compiled and sharded.

    Args:
        model: a Hugging Face model.
        layers: its decoder layers.
        rank: rows of A and columns of B.
        seed: of the matrices A, the same on all ranks.
    """
    import peft

    in_decoder = {id(module) for module in layers.modules()}
    targets = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and id(module) in in_decoder:
            targets.append(name)
    settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
    with parallel.fork_rng():
        torch.manual_seed(keyed_seed("adapters", seed))
        peft.inject_adapter_in_model(settings, model, ADAPTER)


def adapted_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers that have an adapter, by name."""
    return {name: layer for name, layer in module.named_modules() if hasattr(layer, "lora_A")}


def is_adapter(name: str) -> bool:
    """Return whether a weight of this name belongs to an adapter."""
    return ".lora_A." in name or ".lora_B." in name


# ---- Weights for others
def merged_weights(
    module: nn.Module, dtype: torch.dtype, prefix: str
) -> Iterator[tuple[str, Tensor]]:
    """Yield what parallel.full_weights() does, with the adapters merged into the weights.

    The names are those of the model without adapters. One whole weight exists at a time, and all
    ranks must take all of them together.

    The sum is made in float32 and then converted. What the dtype cannot resolve is lost: a sampler
    in bfloat16 differs a little from the policy, which adds the two outputs instead.
    """
    layers = adapted_layers(module)
    state = module.state_dict()
    for name, tensor in state.items():
        if is_adapter(name):
            continue
        layer_name, _, kind = name.partition(BASE)
        if layer_name in layers and kind == "weight":
            a = whole(state[f"{layer_name}.lora_A.{ADAPTER}.weight"])  # (rank, in)
            b = whole(state[f"{layer_name}.lora_B.{ADAPTER}.weight"])  # (out, rank)
            scale = layers[layer_name].scaling[ADAPTER]
            tensor = torch.addmm(whole(tensor), b, a, alpha=scale)  # (out, in)
        target = dtype if tensor.is_floating_point() else tensor.dtype
        plain_name = name.removeprefix(prefix).replace(BASE, ".")
        yield plain_name, parallel.gather(tensor.to(device=parallel.DEVICE, dtype=target))


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor that may be sharded, in float32; all ranks together."""
    return parallel.gather(tensor.to(parallel.DEVICE)).float()


def adapter_weights(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the adapters alone, by peft's names in a file, whole and in float32."""
    for name, tensor in module.state_dict().items():
        if is_adapter(name):
            file_name = name.removeprefix(prefix).replace(f".{ADAPTER}.", ".")
            yield f"base_model.model.{file_name}", whole(tensor)


# ---- The model before it learnt
class WithoutAdapters:
    """A policy without its adapters: what a second copy of the model would be, without its memory."""

    def __init__(self, policy: nn.Module):
        self.policy = policy

    def __call__(self, *arguments):
        """Do the policy's forward."""
        with switched_off(self.policy):
            return self.policy(*arguments)

    def parameters(self) -> Iterator[Tensor]:
        """Yield the policy's parameters, among which are the base's."""
        return self.policy.parameters()


@contextmanager
def switched_off(module: nn.Module) -> Iterator[None]:
    """Set the scale of all adapters to 0 for a while.

    peft's own switch would also make them frozen weights, and FSDP would never learn that they are
    not.
    """
    layers = adapted_layers(module).values()
    for layer in layers:
        layer.set_scale(ADAPTER, 0.0)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_scale(ADAPTER, 1.0)
