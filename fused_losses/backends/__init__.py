"""Backends: modules with the same functions, working on tensors that are already checked.

A column is a per-token input: a Python float, or a float32 tensor of shape (N,) and any stride, 0 included. N is the
number of tokens. Each backend has

    unusable(device)   why it can't run there and what would fix it, or None
    loss_and_grad      one pass: all three stages, logits read once, gradient written once
    stats              stage 1: what the objective needs to know of the vocabulary
    objective          stage 2: losses, logprobs and gradient coefficients, N-sized
    grad               stage 3: the gradient from the stats and the coefficients
    scale              multiply a finished gradient by the upstream gradient, unless that is 1

``eager.py`` is the readable definition of each; ``csrc/row.h`` states the same for C++.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

import torch

NAMES = ("cuda", "triton", "cpu", "eager")


@cache
def resolve(name: str, device: torch.device) -> ModuleType:
    """The backend module that runs on ``device``. "auto" chooses; an explicit name raises where it can't run."""
    if name == "auto":
        name = choose(device)
    backend = importlib.import_module(f".{name}", __name__)
    reason = backend.unusable(device)
    if reason is not None:
        raise RuntimeError(f"backend={name!r} can't run on {device}: {reason}")
    return backend


def choose(device: torch.device) -> str:
    """What "auto" means: cuda, else triton, for CUDA tensors; cpu for CPU tensors; else eager."""
    for name in {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}.get(device.type, ()):
        if unusable(name, device) is None:
            return name
    return "eager"


def unusable(name: str, device: torch.device) -> str | None:
    return importlib.import_module(f".{name}", __name__).unusable(device)
