"""The C++ CPU backend: OpenMP over rows on torch's own threads, SIMD chosen at load time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .native import Native


class Cpu(Native):
    device_type = "cpu"
    looks_at_targets = True

    def launch(self, function: Callable[..., None], device: torch.device, *args: Any) -> None:
        function(*args, 0)


# After torch, whose OpenMP runtime it then shares.
BACKEND = Cpu("_cpu", "install a C++ compiler")
