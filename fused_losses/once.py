"""Backwards whose result has no derivative of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For a backward that works on numbers and leaves no graph: keeping one is an error.

    torch's ``once_differentiable`` raises only where the upstream gradient has a graph. Where it has none the result
    would pass for a constant, and a sum of a fused loss and another would have a second derivative that lacks a part.
    """

    @wraps(backward)
    def chosen(ctx: Any, *upstream: Tensor | None) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # as autograd has it for create_graph=True
            raise RuntimeError(
                "a fused loss has no second derivative, which create_graph=True asks for: fused_losses.reference has"
            )
        return backward(ctx, *upstream)

    return chosen
