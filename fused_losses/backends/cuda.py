"""The CUDA C++ backend: sm_80 and up, on the tensor's device and the current stream."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from .native import Native, load

_cuda, _cause = load("_cuda", "install nvcc, CUDA 12.8 or newer,")


def unusable(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "it takes CUDA tensors"
    if _cuda is None:
        return _cause
    return _cuda.unusable(device.index if device.index is not None else torch.cuda.current_device()) or None


def _on_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Launch on the device of the first tensor, on torch's current stream there."""

    @wraps(function)
    def launch(first: torch.Tensor, *args: Any) -> Any:
        stream = torch.cuda.current_stream(first.device).cuda_stream
        if first.device.index == torch.cuda.current_device():  # asking is cheaper than switching
            return function(first, *args, stream=stream)
        with torch.cuda.device(first.device):
            return function(first, *args, stream=stream)

    return launch


if _cuda is not None:
    _native = Native(_cuda)
    loss_and_grad = _on_device(_native.loss_and_grad)
    stats = _on_device(_native.stats)
    objective = _on_device(_native.objective)
    grad = _on_device(_native.grad)
    scale = _on_device(_native.scale)
