"""Stage 3: grad_j = coefficient / temperature * ([j == target] - p_j), and the pieces that the one-pass kernel shares.

p_j is never formed: e_j times one factor per row. The target's element is stored on its own, after the tile that
covers it, from float32: bf16(p) - 1 is 0 at p = 0.999.
"""

import triton
import triton.language as tl

from .rows import (
    LOG2E,
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
from .stats import load_ragged, load_tile


@triton.jit
def target_gradient(coefficient, inverse_t, target_logit, maximum, total, scale):
    e = tl.exp2((target_logit - maximum) * scale)
    return coefficient * inverse_t * ((total - e) / total)  # total - e is exact where p is near 1


@triton.jit
def store_target(grad, offset, target, vocab, value):
    tl.debug_barrier()  # other threads of this program stored -p_t there
    tl.store(grad + offset + target, value, mask=in_vocab(target, vocab))


@triton.jit
def store_ragged(grad, offset, head, body, vocab, values):
    columns, inside = ragged_columns(head, body, vocab)
    tl.store(grad + offset + columns, values, mask=inside)


@triton.jit
def write_body(logits, grad, length, maximum, scale, factor, DEPTH: tl.constexpr, LANES: tl.constexpr):
    """The second sweep over a row's body: it lies in L2, and is not needed again."""
    columns = tile_columns(DEPTH, LANES)
    full = length // (DEPTH * LANES) * (DEPTH * LANES)
    for start in range(0, full, DEPTH * LANES):
        x = load_tile(logits + start + columns, None, "evict_first")
        tl.store(grad + start + columns, tl.exp2((x - maximum) * scale) * factor, eviction_policy="evict_first")
    if full < length:
        inside = columns < length - full
        x = load_tile(logits + full + columns, inside, "evict_first")
        e = tl.exp2((x - maximum) * scale)
        tl.store(grad + full + columns, e * factor, mask=inside, eviction_policy="evict_first")


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
    target_tokens,
    stats,  # (3, N)
    temperature,
    coefficients,
    upstream,
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
    RAGGED: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
):
    start = tl.program_id(1) * TILE
    for row in range(tl.program_id(0).to(tl.int64), n, tl.num_programs(0)):
        offset = row_offset(row, inner, outer_stride, inner_stride)
        grad_offset = row_offset(row, inner, grad_outer_stride, grad_inner_stride)
        head, body = cut(offset, vocab, RAGGED)
        source = body_pointer(logits, offset, head, True) + start
        destination = body_pointer(grad, grad_offset, head, ALIGNED) + start
        columns = tl.arange(0, TILE)
        inside = columns < body - start

        coefficient = at(coefficients, coefficients_stride, row)
        if coefficient != 0:  # 0 * inf is NaN
            coefficient = coefficient * at(upstream, upstream_stride, row)
        if coefficient == 0:  # the row's logits are not read
            tl.store(destination + columns, tl.zeros([TILE], tl.float32), mask=inside)
            if RAGGED:  # noqa: SIM102  (decided when compiling, the other when running)
                if start == 0:
                    store_ragged(grad, grad_offset, head, body, vocab, tl.zeros([2 * VECTOR], tl.float32))
        else:
            target = tl.load(target_tokens + row).to(tl.int64)
            maximum = tl.load(stats + row)
            total = tl.load(stats + n + row)
            target_logit = tl.load(stats + 2 * n + row)
            inverse_t = inverse_temperature(at(temperature, temperature_stride, row))
            scale = LOG2E * inverse_t
            factor = -(coefficient * inverse_t / total)
            e = tl.exp2((load_tile(source + columns, inside, "evict_first") - maximum) * scale)
            tl.store(destination + columns, e * factor, mask=inside)
            owner = (target >= head + start) & (target < head + start + TILE)
            if RAGGED:
                if start == 0:
                    ragged = tl.exp2((load_ragged(logits, offset, head, body, vocab) - maximum) * scale)
                    store_ragged(grad, grad_offset, head, body, vocab, ragged * factor)
                in_body = (target >= head) & (target < head + body)
                owner = tl.where(in_body, owner, start == 0)
            if owner:
                value = target_gradient(coefficient, inverse_t, target_logit, maximum, total, scale)
                store_target(grad, grad_offset, target, vocab, value)


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
