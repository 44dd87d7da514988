"""What a caller may give in place of logits: where these come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .problem import How
    from .stages import Source


class Origin(ABC):
    """Logits that are not at hand as one tensor. Losses ask it for what they would ask a tensor for."""

    shape: torch.Size  # (..., V) of the logits, V being the number of classes
    device: torch.device
    inputs: tuple[Tensor, ...]  # what the logits are made of, and what gets a gradient

    @abstractmethod
    def checked(self) -> Origin:
        """With every tensor in the form that kernels take; raises where that can't be."""

    @abstractmethod
    def source(self, how: How) -> Source: ...

    @abstractmethod
    def overwritten(self) -> Tensor:
        """What ``inplace=True`` writes the gradient over; ValueError where that is nothing of the caller's."""

    @abstractmethod
    def traced(self) -> bool:
        """Whether torch.compile has it in a graph; else it runs between two of them."""

    @abstractmethod
    def logits(self) -> Tensor:
        """The logits as one tensor after all, differentiable, for the reference; TypeError where no rank has them."""
