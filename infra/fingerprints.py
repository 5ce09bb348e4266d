"""Fingerprints: short texts by which data, or the weights of a model, are known again."""

import hashlib
import json
from collections.abc import Iterable, Sequence

import torch
from torch import nn

N_VALUES = 64  # of each tensor of weights, evenly spread


def of_texts(rows: Iterable[Sequence]) -> str:
    """Return a fingerprint of rows of texts, or of what JSON can hold, in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(list(row)).encode() + b"\n")
    return digest.hexdigest()


def of_problems(problems: Sequence) -> str:
    """Return a fingerprint of problems and their answers, in their order."""
    return of_texts((problem.text, problem.answer) for problem in problems)


def of_weights(module: nn.Module) -> str:
    """Return a fingerprint of a module that is not sharded: names, shapes and some values.

    The dtype that weights are loaded in does not matter, as long as it holds what is stored.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        flat = parameter.detach().reshape(-1)
        step = max(1, len(flat) // N_VALUES)
        values = flat[::step].to("cpu", torch.float32)
        digest.update(json.dumps([name, list(parameter.shape)]).encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()
