"""The C++ CPU backend: OpenMP over rows on torch's own threads, SIMD chosen at load time."""

from __future__ import annotations

import torch

from .native import Native, load

# After torch, whose OpenMP runtime it then shares.
_cpu, _cause = load("_cpu", "install a C++ compiler")


def unusable(device: torch.device) -> str | None:
    if device.type != "cpu":
        return "it takes CPU tensors"
    if _cpu is None:
        return _cause
    return None


if _cpu is not None:
    _native = Native(_cpu)
    loss_and_grad = _native.loss_and_grad
    stats = _native.stats
    objective = _native.objective
    grad = _native.grad
    scale = _native.scale
