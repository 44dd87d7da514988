"""The CUDA C++ backend: sm_80 and up, on the tensor's device and the current stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .native import Native


class Cuda(Native):
    device_type = "cuda"
    looks_at_targets = False  # that would wait for the device

    def unusable(self, device: torch.device) -> str | None:
        cause = super().unusable(device)
        if cause is not None or self.module is None:
            return cause
        index = device.index if device.index is not None else torch.cuda.current_device()
        return self.module.unusable(index) or None

    # Traced, as by compiled autograd, the stream would be Dynamo's, without a pointer. Not recursive: 0.1 us, not 0.3.
    @torch.compiler.disable(recursive=False)
    def launch(self, function: Callable[..., None], device: torch.device, *args: Any) -> None:
        stream = torch.cuda.current_stream(device).cuda_stream
        if device.index == torch.cuda.current_device():  # asking is cheaper than switching
            return function(*args, stream)
        with torch.cuda.device(device):
            return function(*args, stream)


BACKEND = Cuda("_cuda", "install nvcc, CUDA 12.8 or newer,")
