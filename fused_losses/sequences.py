"""Sums over sequences and back: what a loss needs whose ratio or weight belongs to a sequence, not to a token.

Sequences come in one of two layouts. With ``cu_seqlens`` they lie one after the other: sequence b is
``tokens[cu_seqlens[b] : cu_seqlens[b + 1]]``, the tokens counted in row-major order whatever their shape. Without it
they are the last dimension of ``(..., T)``.

Every sum is accumulated in float64 in a fixed order, with no float atomics; what one sequence holds reaches no other
(a difference of running sums would spread one NaN over all); and nothing waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks


def segment_sum(values: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Sum over each sequence: ``out[b] = sum_{t in b} values[t]``, 0 for an empty sequence.

    Args:
        values: the tokens' values, any shape with ``cu_seqlens``, else (..., T). A float, integer or bool dtype.
        cu_seqlens: (B + 1,) int32 or int64 on the device of ``values``: 0, the end of each sequence, and so the number
            of tokens last. Default None: the last dimension is the sequence.

    Returns:
        (B,), or (...) without ``cu_seqlens``; in the dtype of ``values``, int64 for integers and bool. Differentiable
        any number of times; its backward is :func:`segment_expand`.

    Raises:
        TypeError, ValueError: ``cu_seqlens`` has the wrong type, dtype, shape or device; on CPU also if it does not
            start at 0, decreases, or does not end at the number of tokens. On CUDA and under torch.compile its values
            are not read: then wrong ones give wrong sums, but no access out of bounds.
    """
    check_sequences(cu_seqlens, values, "values")
    if cu_seqlens is None:
        return values.sum(-1, dtype=torch.float64 if values.is_floating_point() else torch.int64).to(_kind(values))
    return _Sum.apply(values.reshape(-1), cu_seqlens)


def segment_expand(per_sequence: Tensor, like: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Each sequence's value at each of its tokens: ``out[t] = per_sequence[b]`` for t in b.

    Args:
        per_sequence: (B,), or (...) without ``cu_seqlens``. Any dtype.
        like: a tensor of the tokens' shape: any with ``cu_seqlens``, else (..., T). Only its shape and device count.
        cu_seqlens: as for :func:`segment_sum`.

    Returns:
        The shape of ``like`` and the dtype of ``per_sequence``; without ``cu_seqlens`` a view. Differentiable any
        number of times; its backward is :func:`segment_sum`.

    Raises:
        TypeError, ValueError: as :func:`segment_sum`; or ``per_sequence`` is not one value per sequence.
    """
    check_sequences(cu_seqlens, like, "like")
    shape = like.shape[:-1] if cu_seqlens is None else torch.Size((cu_seqlens.shape[0] - 1,))
    if per_sequence.shape != shape:
        raise ValueError(
            f"per_sequence must hold one value per sequence, shape {tuple(shape)}, got {tuple(per_sequence.shape)}"
        )
    if per_sequence.device != like.device:
        raise ValueError(f"per_sequence must be on the device of like, {like.device}, got {per_sequence.device}")
    if cu_seqlens is None:
        return per_sequence.unsqueeze(-1).expand(like.shape)
    return _Expand.apply(per_sequence, cu_seqlens, like.numel()).view(like.shape)


def segment_mean(values: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """Mean over the active tokens of each sequence, 0 where it has none.

    ``out[b] = sum_{t in b, mask[t] != 0} values[t] / max(1, number of those t)``. Inactive tokens are left out, not
    multiplied by 0: they may hold NaN or inf, and their gradient is exactly 0.

    Args:
        values: float, any shape with ``cu_seqlens``, else (..., T).
        mask: broadcastable to ``values``; bool, integer or float, any value but 0 is active. Default None: all are.
        cu_seqlens: as for :func:`segment_sum`.

    Returns:
        (B,), or (...) without ``cu_seqlens``, in the dtype of ``values``. Differentiable any number of times.

    Raises:
        TypeError, ValueError: as :func:`segment_sum`; or ``values`` is not float, or ``mask`` is of another shape,
            type or device.
    """
    if not values.is_floating_point():
        raise TypeError(f"values must be a float tensor, got {values.dtype}")
    if mask is None:
        selected, count = values, segment_sum(torch.ones_like(values, dtype=torch.bool), cu_seqlens)
    else:
        active = active_tokens(mask, values)
        selected, count = torch.where(active, values, 0.0), segment_sum(active, cu_seqlens)
    # divided before it is rounded to the dtype of values, in which a long sequence's sum may overflow
    return (segment_sum(selected.double(), cu_seqlens) / count.clamp(min=1)).to(values.dtype)


def active_tokens(mask: Tensor, like: Tensor, name: str = "mask") -> Tensor:
    """``mask != 0`` in the shape of ``like``; checks the mask, the argument called ``name``."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(mask).__name__}")
    checks.strided(name, mask)
    if mask.device != like.device:
        raise ValueError(f"{name} must be on the device of the tokens, {like.device}, got {mask.device}")
    active = mask if mask.dtype is torch.bool else mask != 0
    if active.shape != like.shape:
        try:
            active = active.expand(like.shape)
        except RuntimeError:
            raise ValueError(
                f"{name} must broadcast to the tokens' shape {tuple(like.shape)}, got {tuple(mask.shape)}"
            ) from None
    return active


def check_sequences(cu_seqlens: Tensor | None, tokens: Tensor, name: str) -> None:
    """Raise where ``tokens``, the argument called ``name``, are not sequences: by ``cu_seqlens``, or without it by
    their last dimension."""
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, tokens, name)
    elif tokens.dim() == 0:
        raise ValueError(f"{name} must have shape (..., T) where cu_seqlens is None, got a 0-d tensor")


def check_cu_seqlens(cu_seqlens: Tensor, tokens: Tensor, name: str) -> None:
    """Raise where ``cu_seqlens`` does not cut ``tokens``, the argument called ``name``, into sequences.

    Its values are read on CPU only, where that waits for nothing.
    """
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens must be a tensor, got {type(cu_seqlens).__name__}")
    checks.strided("cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens must have shape (B + 1,), got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device != tokens.device:
        raise ValueError(f"cu_seqlens must be on the device of {name}, {tokens.device}, got {cu_seqlens.device}")
    count = tokens.numel()
    if cu_seqlens.shape[0] == 1 and count != 0:
        raise ValueError(f"cu_seqlens must end at the number of tokens of {name}, {count}, got no sequence")
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0:
        raise ValueError(f"cu_seqlens must start at 0, got {first}")
    if last != count:
        raise ValueError(f"cu_seqlens must end at the number of tokens of {name}, {count}, got {last}")
    falls = cu_seqlens[1:] < cu_seqlens[:-1]
    if falls.any():
        at = int(falls.int().argmax()) + 1
        before, after = cu_seqlens[at - 1 : at + 1].tolist()
        raise ValueError(f"cu_seqlens must not decrease, got {after} after {before} at {at}")


def _kind(values: Tensor) -> torch.dtype:
    return values.dtype if values.is_floating_point() else torch.int64


class _Sum(torch.autograd.Function):
    """(N,) values to (B,) sums. Each of the two is the other's derivative."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, cu_seqlens: Tensor) -> Tensor:
        ctx.save_for_backward(cu_seqlens)
        ctx.count = values.shape[0]
        if values.shape[0] == 0:  # segment_reduce on CUDA divides by it
            return values.new_zeros(cu_seqlens.shape[0] - 1, dtype=_kind(values))
        # one thread block per sequence and no check of its own, which would wait for the device: so bring unread
        # offsets into bounds and order here
        offsets = cu_seqlens.clamp(0, values.shape[0]).cummax(0).values
        total = torch.segment_reduce(values.double(), "sum", offsets=offsets, unsafe=True)
        # unless it changes nothing: of such a result torch 2.11's Dynamo loses the gradient
        return total if values.dtype is torch.float64 else total.to(_kind(values))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (cu_seqlens,) = ctx.saved_tensors
        return _Expand.apply(grad, cu_seqlens, ctx.count), None


class _Expand(torch.autograd.Function):
    """(B,) values to (N,) tokens. Indexing alone would do, were its backward not a scattered sum."""

    @staticmethod
    def forward(ctx: Any, per_sequence: Tensor, cu_seqlens: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(cu_seqlens)
        if count == 0:
            return per_sequence.new_zeros(0)
        token = torch.arange(count, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
        sequence = torch.searchsorted(cu_seqlens, token, right=True) - 1
        return per_sequence[sequence.clamp(0, per_sequence.shape[0] - 1)]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (cu_seqlens,) = ctx.saved_tensors
        return _Sum.apply(grad, cu_seqlens), None, None
