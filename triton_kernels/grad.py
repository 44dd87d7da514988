"""Stage 3: the gradient by the logits, and the multiplication of a finished one.

With the coefficients g, h, zeta, s by logp, entropy, lse and every z_j alike, and a share for each of K targets,
U = sum_k share_k,

    grad_j = (g (share_j - U p_j) + p_j (zeta - h (z_j - sum_i p_i z_i)) + s) dz_j / dlogit_j

which without terms is g / temperature * ([j == target] - p_j). p_j is never formed: e_j times what is one number per
row. Targets' elements are stored on their own, after the tile that covers them, from float32: bf16(p) - 1 is 0 at
p = 0.999.
"""

import triton
import triton.language as tl

from .rows import (
    LOG2E,
    TEMPERATURE,
    UPSTREAM,
    at,
    body_pointer,
    cut,
    in_vocab,
    inverse_temperature,
    kernel,
    ragged_columns,
    row_offset,
)
from .softcap import common_slope, squash, squash_with_slope, units
from .softmax import (
    Coefficients,
    any_of,
    dense_factors,
    dense_gradient,
    distance_of,
    only,
    softmax_of_row,
    target_gradient,
    times,
)
from .sums import load_tile
from .targets import is_any, merged_shares, over_targets, row_shares, row_targets, target_logits


@kernel("logits", "grad")
def grad(
    logits,
    grad,
    stats,  # (3, N), (K + 4, N) where the row is not plain
    coefficients,  # (1, N), (4, N) where the row is not plain
    token,
    vary: tl.int64,
    num_targets: tl.int64,
    n: tl.int64,
    vocab: tl.int32,
    inner: tl.int64,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    grad_outer_stride: tl.int64,
    grad_inner_stride: tl.int64,
    ROW: tl.constexpr,
    PLAN: tl.constexpr,
):
    TILE: tl.constexpr = PLAN.lanes
    start = tl.program_id(1) * TILE
    for row in range(tl.program_id(0).to(tl.int64), n, tl.num_programs(0)):
        offset = row_offset(row, inner, outer_stride, inner_stride)
        grad_offset = row_offset(row, inner, grad_outer_stride, grad_inner_stride)
        head, body = cut(offset, vocab, PLAN)
        source = body_pointer(logits, offset, head, True, PLAN) + start
        destination = body_pointer(grad, grad_offset, head, PLAN.aligned, PLAN) + start
        columns = tl.arange(0, TILE)
        inside = columns < body - start

        factor = at(token.upstream, vary, UPSTREAM, row)
        g = times(tl.load(coefficients + row), factor)
        if ROW.plain:
            by = only(g)
        else:
            h = times(tl.load(coefficients + n + row), factor)
            zeta = times(tl.load(coefficients + 2 * n + row), factor)
            by = Coefficients(g, h, zeta, times(tl.load(coefficients + 3 * n + row), factor))
        if any_of(by, ROW) == 0:  # the row's logits are not read
            tl.store(destination + columns, tl.zeros([TILE], tl.float32), mask=inside)
            if PLAN.ragged:  # noqa: SIM102  (decided when compiling, the other when running)
                if start == 0:
                    side, exists = ragged_columns(head, body, vocab, PLAN)
                    tl.store(grad + grad_offset + side, 0.0, mask=exists)
        else:
            inverse_t = inverse_temperature(at(token.temperature, vary, TEMPERATURE, row))
            unit, inverse_cap = units(inverse_t, token.softcap, ROW)
            slope = common_slope(inverse_t, ROW)
            scale = LOG2E * unit
            maximum = squash(tl.load(stats + row), inverse_cap, ROW)
            target = row_targets(token, row, num_targets, ROW)
            target_x = target_logits(stats, row, n, num_targets, ROW)
            target_y, target_slope = squash_with_slope(target_x, inverse_cap, ROW)
            moment = 0.0
            if not ROW.plain:
                moment = tl.load(stats + (2 + num_targets) * n + row)
            softmax, seen = softmax_of_row(distance_of(target_y, maximum, unit), tl.load(stats + n + row), moment, ROW)
            top = tl.maximum(maximum, target_y) if ROW.single else maximum
            share = row_shares(token, row, num_targets, ROW)
            whole = over_targets(share, ROW)
            valid = in_vocab(target, vocab)
            if not ROW.plain:
                nowhere = (share != 0) & (target_y != target_y)
                whole = tl.where(is_any(nowhere, ROW), float("nan"), whole)  # and so is the row
            dense = dense_factors(by, whole, softmax, slope, ROW)
            x = load_tile(source + columns, inside, "evict_first")
            tl.store(destination + columns, dense_gradient(x, inverse_cap, top, scale, dense, ROW), mask=inside)
            owner = (target >= head + start) & (target < head + start + TILE)
            if PLAN.ragged:
                if start == 0:
                    side, exists = ragged_columns(head, body, vocab, PLAN)
                    side_x = load_tile(logits + offset + side, exists, "evict_first")
                    side_value = dense_gradient(side_x, inverse_cap, top, scale, dense, ROW)
                    tl.store(grad + grad_offset + side, side_value, mask=exists)
                in_body = (target >= head) & (target < head + body)
                owner = tl.where(in_body, owner, start == 0) != 0  # where of flags is no flag in the interpreter
            stored = owner & valid
            if is_any(stored, ROW):
                merged = merged_shares(token, row, target, share, num_targets, ROW)
                value = target_gradient(by, merged, whole, seen, softmax.mean, ROW) * (slope * target_slope)
                tl.debug_barrier()  # other threads of this program stored what it is without a target there
                tl.store(grad + grad_offset + target, value, mask=stored)


@triton.jit
def scale_tile(pointers, inside, factor):
    x = tl.load(pointers, mask=inside).to(tl.float32)
    tl.store(pointers, tl.where(x == 0, x, x * factor), mask=inside)  # masked rows stay 0: 0 * inf is NaN


@kernel("grad")
def scale(
    grad,
    upstream,  # (1,)
    n: tl.int64,
    vocab: tl.int32,
    inner: tl.int64,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    PLAN: tl.constexpr,
):
    """grad *= upstream, touching memory only if it is not 1. The scalar is read here: the host never waits for it."""
    factor = tl.load(upstream)
    TILE: tl.constexpr = PLAN.lanes
    if factor != 1:
        start = tl.program_id(1) * TILE
        for row in range(tl.program_id(0).to(tl.int64), n, tl.num_programs(0)):
            offset = row_offset(row, inner, outer_stride, inner_stride)
            head, body = cut(offset, vocab, PLAN)
            pointers = body_pointer(grad, offset, head, True, PLAN) + start + tl.arange(0, TILE)
            inside = tl.arange(0, TILE) < body - start
            scale_tile(pointers, inside, factor)
            if PLAN.ragged:  # noqa: SIM102
                if start == 0:
                    columns, exists = ragged_columns(head, body, vocab, PLAN)
                    scale_tile(grad + offset + columns, exists, factor)
