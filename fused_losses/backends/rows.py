"""Logits of any leading shape as N rows under two strides, so that slices are read where they lie."""

from __future__ import annotations

from typing import NamedTuple

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


def overlap(logits: Tensor) -> bool:
    """Whether two elements share memory (expanded or overlapping rows), so that writing in place is not defined."""
    # sorted by hand: torch.compile does not sort strides that are symbolic
    left = [(stride, size) for stride, size in zip(logits.stride(), logits.shape, strict=True) if size > 1]
    extent = 1
    while left:
        nearest = 0
        for i in range(1, len(left)):
            if left[i][0] < left[nearest][0]:
                nearest = i
        stride, size = left.pop(nearest)
        if stride < extent:
            return True
        extent += stride * (size - 1)
    return False
