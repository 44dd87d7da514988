"""The two sums over N. One program, float64, fixed order: bitwise the same on every run."""

import triton.language as tl

from .rows import at, kernel, number


@kernel()
def normaliser(
    target_tokens,  # (N, K)
    weights,
    out,  # (1,)
    weights_stride: tl.int64,
    n: tl.int64,
    num_targets: tl.int64,
    ignore_index: tl.int64,
    BLOCK: tl.constexpr,
):
    """The denominator of a mean: the sum of the weights of active tokens."""
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, n, BLOCK):
        row = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = row < n
        given = row < 0
        for k in range(0, num_targets):
            target = tl.load(target_tokens + row * num_targets + k, mask=inside, other=0).to(tl.int64)
            given = given | (target != ignore_index)
        weight = at(weights, weights_stride, row, inside)
        total += tl.where(inside & given, weight, 0.0).to(tl.float64)
    tl.store(out, tl.sum(total, 0).to(tl.float32))


@kernel()
def reduce(
    row_losses,  # (N,)
    denominator,
    out,  # (1,)
    n: tl.int64,
    BLOCK: tl.constexpr,
):
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, n, BLOCK):
        row = start + tl.arange(0, BLOCK).to(tl.int64)
        total += tl.load(row_losses + row, mask=row < n, other=0.0).to(tl.float64)
    total = tl.sum(total, 0)
    divisor = number(denominator).to(tl.float64)
    # no active token means 0 whatever the denominator; a denominator of 0 elsewhere shows as inf
    empty = (total == 0) & (divisor == 0)
    tl.store(out, tl.where(empty, 0.0, total / tl.where(empty, 1.0, divisor)).to(tl.float32))
