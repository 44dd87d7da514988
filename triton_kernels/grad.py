"""Stage 3: the gradient by the logits, and the pieces that the one-pass kernel shares.

Without terms grad_j = coefficient / temperature * ([j == target] - p_j). With the coefficients g, h, zeta, s by logp,
entropy, lse and mean z, and a share for each of K targets, U = sum_k share_k,

    grad_j = (g (share_j - U p_j) + p_j (zeta - h (z_j - sum_i p_i z_i)) + s / V) dz_j / dlogit_j

p_j is never formed: e_j times what is one number per row. Targets' elements are stored on their own, after the tile
that covers them, from float32: bf16(p) - 1 is 0 at p = 0.999.
"""

import triton
import triton.language as tl

from .rows import (
    LN2,
    LOG2E,
    LOWEST,
    VECTOR,
    at,
    body_pointer,
    cut,
    in_vocab,
    inverse_temperature,
    kernel,
    ragged_columns,
    row_offset,
    tile_columns,
)
from .softcap import squash, units
from .stats import load_ragged, load_tile
from .terms import is_any, merged_shares, row_shares, row_targets, times


@triton.jit
def target_gradient(coefficient, inverse_t, target_logit, maximum, total, scale):
    e = tl.exp2((target_logit - maximum) * scale)
    return coefficient * inverse_t * ((total - e) / total)  # total - e is exact where p is near 1


@triton.jit
def store_targets(grad, offset, target, mask, value):
    tl.debug_barrier()  # other threads of this program stored what it is without a target there
    tl.store(grad + offset + target, value, mask=mask)


@triton.jit
def any_of(by):
    """0 only if all four coefficients are."""
    return tl.abs(by[0]) + tl.abs(by[1]) + tl.abs(by[2]) + tl.abs(by[3])


@triton.jit
def dense_factors(by, whole, mean, total, inverse_t, vocab):
    """(a, b, c): an element that is no target gets e_j (a + b t_j) + c, but for the softcap. `by` is (g, h, zeta, s),
    `mean` is sum_i p_i z_i - z_max."""
    factor = inverse_t / total
    return factor * (by[2] - by[0] * whole + by[1] * mean), -factor * by[1] * LN2, inverse_t * by[3] / vocab


@triton.jit
def dense_gradient(y, maximum, scale, a, b, c, ENTROPY: tl.constexpr, SMOOTHED: tl.constexpr, CAPPED: tl.constexpr):
    """Without terms e_j a, a being -coefficient / temperature / total."""
    t = (y - maximum) * scale
    value = tl.exp2(t)
    if ENTROPY:
        value *= a + b * tl.maximum(t, LOWEST)
    else:
        value *= a
    if SMOOTHED:
        value += c
    if CAPPED:
        value *= 1.0 - y * y
    return value


@triton.jit
def targets_gradient(by, y, share, whole, mean, maximum, total, scale, inverse_t, vocab, CAPPED: tl.constexpr):
    """The elements of targets; `share` is that of all targets equal to each."""
    t = (y - maximum) * scale
    e = tl.exp2(t)
    p = e / total
    rest = (share - whole) + whole * ((total - e) / total)  # exact where p is near 1 and the target has the whole
    value = by[0] * tl.where(p < 0.5, share - whole * p, rest)
    value += p * (by[2] - by[1] * (tl.maximum(t, LOWEST) * LN2 - mean)) + by[3] / vocab
    if CAPPED:
        value *= 1.0 - y * y
    return value * inverse_t


@triton.jit
def store_ragged(grad, offset, head, body, vocab, values):
    columns, inside = ragged_columns(head, body, vocab)
    tl.store(grad + offset + columns, values, mask=inside)


@triton.jit
def write_body(
    logits,
    grad,
    length,
    maximum,
    scale,
    inverse_cap,
    a,
    b,
    c,
    DEPTH: tl.constexpr,
    LANES: tl.constexpr,
    ENTROPY: tl.constexpr,
    SMOOTHED: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """The second sweep over a row's body: it lies in L2, and is not needed again."""
    columns = tile_columns(DEPTH, LANES)
    full = length // (DEPTH * LANES) * (DEPTH * LANES)
    for start in range(0, full, DEPTH * LANES):
        y = squash(load_tile(logits + start + columns, None, "evict_first"), inverse_cap, CAPPED)
        value = dense_gradient(y, maximum, scale, a, b, c, ENTROPY, SMOOTHED, CAPPED)
        tl.store(grad + start + columns, value, eviction_policy="evict_first")
    if full < length:
        inside = columns < length - full
        y = squash(load_tile(logits + full + columns, inside, "evict_first"), inverse_cap, CAPPED)
        value = dense_gradient(y, maximum, scale, a, b, c, ENTROPY, SMOOTHED, CAPPED)
        tl.store(grad + full + columns, value, mask=inside, eviction_policy="evict_first")


@triton.jit
def write_zeros(grad, length, TILE: tl.constexpr):
    columns = tl.arange(0, TILE)
    for start in range(0, length, TILE):
        inside = columns < length - start
        tl.store(grad + start + columns, tl.zeros([TILE], tl.float32), mask=inside, eviction_policy="evict_first")


@kernel("logits", "grad")
def grad(
    logits,
    grad,
    target_tokens,  # (N,), with terms (N, K)
    stats,  # (3, N), with terms (K + 4, N)
    temperature,
    coefficients,  # (N,), with terms (4, N)
    upstream,
    shares,  # (N, K) or None
    softcap,
    temperature_stride: tl.int64,
    coefficients_stride: tl.int64,
    upstream_stride: tl.int64,
    n: tl.int64,
    vocab: tl.int32,
    inner: tl.int64,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    grad_outer_stride: tl.int64,
    grad_inner_stride: tl.int64,
    num_targets: tl.int64,
    TARGETS: tl.constexpr,
    CAPPED: tl.constexpr,
    RAGGED: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
):
    TERMS: tl.constexpr = TARGETS > 0
    start = tl.program_id(1) * TILE
    for row in range(tl.program_id(0).to(tl.int64), n, tl.num_programs(0)):
        offset = row_offset(row, inner, outer_stride, inner_stride)
        grad_offset = row_offset(row, inner, grad_outer_stride, grad_inner_stride)
        head, body = cut(offset, vocab, RAGGED)
        source = body_pointer(logits, offset, head, True) + start
        destination = body_pointer(grad, grad_offset, head, ALIGNED) + start
        columns = tl.arange(0, TILE)
        inside = columns < body - start

        factor = at(upstream, upstream_stride, row)
        coefficient = times(at(coefficients, coefficients_stride, row), factor)
        if TERMS:
            h = times(tl.load(coefficients + n + row), factor)
            zeta = times(tl.load(coefficients + 2 * n + row), factor)
            by = (coefficient, h, zeta, times(tl.load(coefficients + 3 * n + row), factor))
            coefficient = any_of(by)
        if coefficient == 0:  # the row's logits are not read
            tl.store(destination + columns, tl.zeros([TILE], tl.float32), mask=inside)
            if RAGGED:  # noqa: SIM102  (decided when compiling, the other when running)
                if start == 0:
                    store_ragged(grad, grad_offset, head, body, vocab, tl.zeros([2 * VECTOR], tl.float32))
        else:
            inverse_t = inverse_temperature(at(temperature, temperature_stride, row))
            unit, inverse_cap = units(inverse_t, softcap, CAPPED)
            scale = LOG2E * unit
            maximum = squash(tl.load(stats + row), inverse_cap, CAPPED)
            total = tl.load(stats + n + row)
            if TERMS:
                k = tl.arange(0, TARGETS)
                target = row_targets(target_tokens, row, num_targets, TARGETS)
                target_y = squash(tl.load(stats + (2 + k) * n + row, mask=k < num_targets), inverse_cap, CAPPED)
                share = row_shares(shares, row, num_targets, TARGETS)
                whole = tl.sum(share, 0)
                mean = tl.load(stats + (2 + num_targets) * n + row) / total
                counts = share != 0
                outside = counts & (in_vocab(target, vocab) == 0)
                whole = tl.where(is_any(outside), float("nan"), whole)  # and so is the row
                a, b, c = dense_factors(by, whole, mean, total, inverse_t, vocab)
            else:
                target = tl.load(target_tokens + row).to(tl.int64)
                target_logit = tl.load(stats + 2 * n + row)
                a = -(coefficient * inverse_t / total)
                b = 0.0
                c = 0.0
            y = squash(load_tile(source + columns, inside, "evict_first"), inverse_cap, CAPPED)
            y = dense_gradient(y, maximum, scale, a, b, c, TERMS, TERMS, CAPPED)
            tl.store(destination + columns, y, mask=inside)
            owner = (target >= head + start) & (target < head + start + TILE)
            if RAGGED:
                if start == 0:
                    ragged = squash(load_ragged(logits, offset, head, body, vocab), inverse_cap, CAPPED)
                    ragged = dense_gradient(ragged, maximum, scale, a, b, c, TERMS, TERMS, CAPPED)
                    store_ragged(grad, grad_offset, head, body, vocab, ragged)
                in_body = (target >= head) & (target < head + body)
                owner = tl.where(in_body, owner, start == 0) != 0  # where of flags is no flag in the interpreter
            if TERMS:
                share = merged_shares(target, share, target_tokens, shares, row, num_targets, TARGETS)
                value = targets_gradient(
                    by, target_y, share, whole, mean, maximum, total, scale, inverse_t, vocab, CAPPED
                )
                store_targets(grad, grad_offset, target, owner & counts & in_vocab(target, vocab), value)
            elif owner:
                value = target_gradient(coefficient, inverse_t, target_logit, maximum, total, scale)
                store_targets(grad, grad_offset, target, in_vocab(target, vocab), value)


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
    RAGGED: tl.constexpr,
    TILE: tl.constexpr,
):
    """grad *= upstream, touching memory only if it is not 1. The scalar is read here: the host never waits for it."""
    factor = tl.load(upstream)
    if factor != 1:
        start = tl.program_id(1) * TILE
        for row in range(tl.program_id(0).to(tl.int64), n, tl.num_programs(0)):
            offset = row_offset(row, inner, outer_stride, inner_stride)
            head, body = cut(offset, vocab, RAGGED)
            pointers = body_pointer(grad, offset, head, True) + start + tl.arange(0, TILE)
            inside = tl.arange(0, TILE) < body - start
            scale_tile(pointers, inside, factor)
            if RAGGED:  # noqa: SIM102
                if start == 0:
                    columns, exists = ragged_columns(head, body, vocab)
                    scale_tile(grad + offset + columns, exists, factor)
