"""Logits of any leading shape as N rows under two strides, so that slices are read where they lie."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Row r starts at (r // inner) * outer_stride + (r % inner) * inner_stride elements."""

    n: int
    inner: int
    outer_stride: int
    inner_stride: int


def rows(logits: Tensor) -> Rows | None:
    """The rows of a (..., V) tensor, or None where it has more than two strides or a strided last dimension."""
    shape, strides = logits.shape, logits.stride()
    if strides[-1] != 1 and shape[-1] > 1:
        return None
    if len(shape) == 2:
        return Rows(shape[0], shape[0] or 1, 0, strides[0])
    levels: list[tuple[int, int]] = []  # (size, stride), outermost first
    n = 1
    for size, stride in zip(shape[:-1], strides[:-1], strict=True):
        n *= size
        if size == 1:
            continue
        if levels and levels[-1][1] == stride * size:
            levels[-1] = (levels[-1][0] * size, stride)
        else:
            levels.append((size, stride))
    if n == 0:
        return Rows(0, 1, 0, 0)
    if len(levels) > 2:
        return None
    if len(levels) == 2:
        return Rows(n, levels[1][0], levels[0][1], levels[1][1])
    return Rows(n, n, 0, levels[0][1] if levels else 0)


def as_matrix(logits: Tensor) -> Tensor:
    """The same rows as a view of at most three dimensions, which is what C++ walks."""
    if logits.dim() <= 3:
        return logits
    layout = rows(logits)
    assert layout is not None  # what can't be walked has been copied
    n, inner, outer_stride, inner_stride = layout
    shape = (n // inner, inner, logits.shape[-1])
    return logits.as_strided(shape, (outer_stride, inner_stride, 1))


_PHASE = 16  # bytes: what the CUDA kernels read and write at a time
IN_PHASE = {"cuda"}  # device types whose kernels are slower where a gradient's rows begin elsewhere in 16 bytes


def empty_gradient(logits: Tensor, aligned: bool) -> Tensor:
    """Uninitialised: contiguous, unless its rows then began elsewhere in 16 bytes than the logits' do, as of a strided
    view with an odd V. Then they lie as close together as they fit; it takes a vector per step more, at most.

    aligned: from a 16-byte boundary on, wherever the logits begin, as a compiler takes for granted.
    """
    in_phase = logits.device.type in IN_PHASE and rows(logits) is not None  # what can't be walked is copied
    skip = logits.data_ptr() % _PHASE // logits.element_size() if in_phase and not aligned else 0
    if not in_phase or (skip == 0 and logits.is_contiguous()):
        return torch.empty_like(logits, memory_format=torch.contiguous_format)
    unit = _PHASE // logits.element_size()
    extent, strides = logits.shape[-1], [1] * logits.dim()
    for i in _by_stride(logits, range(logits.dim() - 1)):
        extent = extent + (logits.stride(i) - extent) % unit
        strides[i] = extent
        extent = extent * logits.shape[i]
    if skip == 0:
        return logits.new_empty_strided(logits.shape, strides)
    return logits.new_empty(skip + extent).as_strided(logits.shape, strides, skip)


def overlap(logits: Tensor) -> bool:
    """Whether two elements share memory (expanded or overlapping rows), so that writing in place is not defined."""
    extent = 1
    for i in _by_stride(logits, range(logits.dim())):
        if logits.stride(i) < extent:
            return True
        extent += logits.stride(i) * (logits.shape[i] - 1)
    return False


def _by_stride(logits: Tensor, dimensions: Iterable[int]) -> list[int]:
    """Those of several elements, the nearest first."""
    left = [i for i in dimensions if logits.shape[i] > 1]
    out = []
    while left:  # sorted by hand: torch.compile does not sort strides that are symbolic
        nearest = left[-1]
        for i in reversed(left):
            if logits.stride(i) < logits.stride(nearest):
                nearest = i
        left.remove(nearest)
        out.append(nearest)
    return out
