"""A model in small, and what it says of a few tokens: how a family has to be run is seen there.

Decoders differ in what passes between tokens: attention, full or within a window, with a sink or a
softcap; recurrent states; convolutions. A list of names would be out of date with the next family.
"""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

# Kinds of layers in which nothing but attention passes between tokens, by Hugging Face's names
ATTENTION = {"full_attention", "sliding_attention"}
# What rounding in float32 may change of hidden states, as a part of the largest
TOLERANCE = 1e-4
WORDS = 4096  # words of a model in small, if it has more
WINDOW = 3  # tokens that a sliding window of a model in small holds; rows are longer
# Prompts and responses, as places in a vocabulary: of different lengths, and two with one prompt
ROWS = (
    ((1, 2, 3), (4, 5)),
    ((6,), (7, 8, 9, 10, 11)),
    ((1, 2, 3), (12, 13, 14, 15)),
)


class OwnScores(NamedTuple):
    """What a model's own forward gives for rows one by one, those of all rows behind each other."""

    states: Tensor  # (n, D) the last hidden states of all tokens
    logp: Tensor  # (M,) log-probs of the responses' tokens


def model_name(model: nn.Module) -> str:
    """Return the folder or hub id that a model comes from, or its class."""
    return model.config.name_or_path or type(model).__name__


def example_rows(model: nn.Module) -> list[tuple[list[int], list[int]]]:
    """Return prompts and responses of a few tokens, spread over the model's vocabulary."""
    n_words = model.get_input_embeddings().weight.shape[0]

    def words(places: Sequence[int]) -> list[int]:
        return [place * n_words // 17 for place in places]  # not the last, which mean images

    return [(words(prompt), words(response)) for prompt, response in ROWS]


def in_small(model: nn.Module, device: torch.device) -> nn.Module:
    """Return a copy of a model in float32: few words, the first layers, short windows.

    There is a layer of every kind. Where the copy can share memory with the model, it does.
    """
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    of_words = {id(table.weight) for table in tables}
    weights = {}
    decoder, layers = model.get_decoder(), model.get_decoder().layers
    decoder.layers = layers[: n_until_all_kinds(model)]
    try:
        for weight in model.parameters():
            values = weight.detach()[:WORDS] if id(weight) in of_words else weight.detach()
            values = values.to(device, torch.float32)
            weights[id(weight)] = nn.Parameter(values, requires_grad=False)
        small = copy.deepcopy(model, weights)
    finally:
        decoder.layers = layers
    small.get_input_embeddings().padding_idx = None  # it may be among the words that are left out
    shorten_windows(small.get_decoder())
    return small.to(device).float().eval()  # buffers, too


def n_until_all_kinds(model: nn.Module) -> int:
    """Return how many layers there are up to the first of the last kind."""
    layers = model.get_decoder().layers
    types = getattr(model.config.get_text_config(), "layer_types", None) or [None] * len(layers)
    kinds = []
    for kind, layer in zip(types, layers, strict=False):
        shapes = tuple((name, weight.shape) for name, weight in layer.named_parameters())
        kinds.append((kind, shapes))
    return 1 + max(kinds.index(kind) for kind in set(kinds))


def shorten_windows(decoder: nn.Module) -> None:
    """Make sliding windows so short that they matter to a few tokens."""
    for part in (decoder.config, *decoder.modules()):
        window = getattr(part, "sliding_window", None)
        if isinstance(window, int) and window > WINDOW:
            part.sliding_window = WINDOW


@torch.no_grad()
def own_scores(model: nn.Module, device: torch.device) -> OwnScores:
    """Run each of the example rows by itself through a model's own forward."""
    logp = []
    kept = []  # what the head gets
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _module, inputs: kept.append(inputs[0]))
    for prompt, response in example_rows(model):
        ids = torch.tensor([prompt + response], device=device)
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        words = ids[0, len(prompt) :, None]
        logp.append(logits.log_softmax(dim=-1).gather(1, words).squeeze(1))
    hook.remove()
    states = [state[0] for state in kept]
    return OwnScores(torch.cat(states), torch.cat(logp))


def change_of_states(states: Tensor, expected: Tensor) -> float:
    """Return the largest difference of hidden states, as a part of the largest of them."""
    largest = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    return ((states - expected).abs().max() / largest).item()


# ---- Attention
def set_attention(decoder: nn.Module, attention: str) -> None:
    """Give a decoder an attention by Hugging Face's name for it, if it has another."""
    if attention != decoder.config._attn_implementation:
        decoder.set_attn_implementation(attention)


def can_pack(model: nn.Module) -> bool:
    """Return whether attention can be exchanged, and all layers are of attention alone.

    The configuration tells it; a configuration that says nothing of layers rules nothing out.
    """
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    return can_change(model.get_decoder()) and set(kinds) <= ATTENTION


def can_change(decoder: nn.Module) -> bool:
    """Return whether a decoder can get another attention; code of its own may not allow it."""
    return decoder._can_set_attn_implementation()


def faithful_attention(model: nn.Module, device: torch.device) -> str:
    """Return the name of the attention that a model has, or `eager` where the two differ.

    Fused kernels leave out what they do not know, without a word: Gemma 2's softcap, for example.
    """
    decoder = model.get_decoder()
    own = decoder.config._attn_implementation
    if own == "eager" or not can_change(decoder) or not hasattr(decoder, "layers"):
        return own
    small = in_small(model, device)
    states = own_scores(small, device).states
    set_attention(small.get_decoder(), "eager")
    expected = own_scores(small, device).states
    return own if change_of_states(states, expected) <= TOLERANCE else "eager"
