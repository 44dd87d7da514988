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
from .ops import Column


class OnePass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target_tokens: Tensor,
        objective: str,
        mean: bool,
        ignore_index: int,
        all_logprobs: bool,
        validate: bool,
        backend: str,
        inplace: bool,
        *columns: Column,
    ) -> tuple[Tensor, Tensor]:
        args = (target_tokens, objective, *ops.split(columns), mean, ignore_index, all_logprobs, validate, backend)
        if inplace:
            gradient = logits.detach()
            loss, logprobs = ops.loss_and_grad_inplace(gradient, *args)
            # operators of a raw library leave the version as it was: whoever saved these logits must find out
            torch.autograd.graph.increment_version(gradient)
        else:
            loss, logprobs, gradient = ops.loss_and_grad(logits, *args)
        # An attribute, not save_for_backward: it has to be gone after the first backward, retain_graph or not, as
        # scaling it a second time would be silently wrong.
        ctx.gradient = gradient
        ctx.backend = backend
        ctx.mark_non_differentiable(logprobs)
        ctx.set_materialize_grads(False)
        return loss, logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError(
                "a second backward through a one-pass fused loss: the first one consumed its gradient. "
                "Pass recompute=True to the loss to run backward more than once."
            )
        if upstream is None:
            return (None,) * len(ctx.needs_input_grad)
        ops.scale(gradient, upstream.to(torch.float32), ctx.backend)
        return gradient, *(None,) * (len(ctx.needs_input_grad) - 1)


class TwoPhase(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target_tokens: Tensor,
        objective: str,
        mean: bool,
        ignore_index: int,
        all_logprobs: bool,
        validate: bool,
        backend: str,
        reduce: bool,
        *columns: Column,
    ) -> tuple[Tensor, Tensor]:
        tensors, values = ops.split(columns)
        loss, logprobs, coefficients, stats = ops.forward(
            logits,
            target_tokens,
            objective,
            tensors,
            values,
            mean,
            ignore_index,
            all_logprobs,
            validate,
            backend,
            reduce,
        )
        ctx.save_for_backward(logits, target_tokens, stats, coefficients, tensors[1])
        ctx.temperature_value = values[1]
        ctx.backend = backend
        ctx.mark_non_differentiable(logprobs)
        ctx.set_materialize_grads(False)
        return loss, logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * len(ctx.needs_input_grad)
        logits, target_tokens, stats, coefficients, temperature = ctx.saved_tensors
        upstream = upstream.to(torch.float32).expand(target_tokens.shape)
        gradient = ops.grad(
            logits, target_tokens, stats, coefficients, upstream, temperature, ctx.temperature_value, ctx.backend
        )
        return gradient, *(None,) * (len(ctx.needs_input_grad) - 1)
