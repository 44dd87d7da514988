"""The two ways of joining the stages under autograd.

One pass: forward makes the gradient for an upstream gradient of 1, and backward scales it. Two phase: forward keeps the
logits and three numbers per token, backward makes the gradient for whatever comes from upstream.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import ops


class OnePass(torch.autograd.Function):
    """apply(logits, row arguments of the operator, inplace) -> (loss, logprobs)"""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, row: tuple[Any, ...], inplace: bool) -> tuple[Tensor, Tensor]:
        if inplace:
            gradient = logits.detach()
            loss, logprobs = ops.loss_and_grad_inplace(gradient, *row)
            # operators of a raw library leave the version as it was: whoever saved these logits must find out
            torch.autograd.graph.increment_version(gradient)
        else:
            loss, logprobs, gradient = ops.loss_and_grad(logits, *row)
        # An attribute, not save_for_backward: it has to be gone after the first backward, retain_graph or not, as
        # scaling it a second time would be silently wrong.
        ctx.gradient = gradient
        ctx.backend = row[-1]
        ctx.mark_non_differentiable(logprobs)
        ctx.set_materialize_grads(False)
        return loss, logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, None, None]:
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError(
                "a second backward through a one-pass fused loss: the first one consumed its gradient. "
                "Pass recompute=True to the loss to run backward more than once."
            )
        if upstream is None:
            return None, None, None
        ops.scale(gradient, upstream if upstream.dtype is torch.float32 else upstream.float(), ctx.backend)
        return gradient, None, None


class TwoPhase(torch.autograd.Function):
    """apply(logits, row arguments of the operator, reduce) -> (loss, logprobs)"""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, row: tuple[Any, ...], reduce: bool) -> tuple[Tensor, Tensor]:
        loss, logprobs, coefficients, stats = ops.forward(logits, *row, reduce)
        target_tokens, _, tensors, values = row[:4]
        ctx.save_for_backward(logits, target_tokens, stats, coefficients, tensors[1])
        ctx.temperature_value = values[1]
        ctx.backend = row[-1]
        ctx.mark_non_differentiable(logprobs)
        ctx.set_materialize_grads(False)
        return loss, logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, None, None]:
        if upstream is None:
            return None, None, None
        logits, target_tokens, stats, coefficients, temperature = ctx.saved_tensors
        upstream = upstream.to(torch.float32).expand(target_tokens.shape)
        gradient = ops.grad(
            logits, target_tokens, stats, coefficients, upstream, temperature, ctx.temperature_value, ctx.backend
        )
        return gradient, None, None
