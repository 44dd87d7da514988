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
        _keep(ctx, logits, row, stats, coefficients)
        ctx.mark_non_differentiable(logprobs)
        ctx.set_materialize_grads(False)
        return loss, logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, None, None]:
        if upstream is None:
            return None, None, None
        n = ctx.saved_tensors[1].shape[0]
        return _gradient(ctx, ctx.saved_tensors[3], upstream.to(torch.float32).expand(n)), None, None


class LogprobsAndEntropy(torch.autograd.Function):
    """apply(logits, row arguments of the operator) -> (logprobs, entropy), two phase, either with a gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, row: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        _, outputs, coefficients, stats = ops.forward(logits, *row, False)
        _keep(ctx, logits, row, stats, coefficients)
        ctx.set_materialize_grads(False)
        logprobs, entropy = outputs.unbind()
        return logprobs.clone(), entropy.clone()  # not views of one tensor: either may be modified

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, None]:
        coefficients = ctx.saved_tensors[3]
        by_logprob, by_entropy = (torch.zeros_like(coefficients[0]) if u is None else u.float() for u in upstream)
        zero = torch.zeros_like(coefficients[0])
        given = torch.stack((by_logprob, by_entropy, zero, zero))
        # the coefficient by logprob is 1, NaN for a NaN row, and 0 for an ignored token, which keeps that
        given = torch.where(coefficients[0] == 0, 0.0, given * coefficients[0])
        return _gradient(ctx, given, torch.ones_like(zero)), None


def _keep(ctx: Any, logits: Tensor, row: tuple[Any, ...], stats: Tensor, coefficients: Tensor) -> None:
    target_tokens, _, columns, flags = row[:4]
    tensors, ctx.numbers = ops.split((columns[1], columns[-1] if flags else 0.0))  # temperature, shares
    ctx.save_for_backward(logits, target_tokens, stats, coefficients, *tensors)
    ctx.softcap = columns[-2] if flags else 0.0
    ctx.backend = row[-1]


def _gradient(ctx: Any, coefficients: Tensor, upstream: Tensor) -> Tensor:
    logits, target_tokens, stats, _, temperature, shares = ctx.saved_tensors
    columns = (ctx.numbers[0] if temperature is None else temperature,)
    return ops.grad(logits, target_tokens, stats, coefficients, upstream, columns, shares, ctx.softcap, ctx.backend)
