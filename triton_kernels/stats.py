"""Stage 1: per row the maximum of the logits, sum_j exp((logits_j - max) / temperature) and the target's logit.

An exponential is exp2((logit - max) * scale), scale = log2(e) / temperature: subtract first, so that a large common
offset costs no digits. The gradient forms it in the same way; folded and unfolded exponentials must not meet.
"""

import triton
import triton.language as tl

from .rows import (
    FLOOR,
    LOG2E,
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


@triton.jit
def load_tile(pointers, mask, EVICT: tl.constexpr):
    if mask is None:
        return tl.load(pointers, eviction_policy=EVICT).to(tl.float32)
    else:
        return tl.load(pointers, mask=mask, other=float("-inf"), eviction_policy=EVICT).to(tl.float32)


@triton.jit
def load_ragged(logits, offset, head, body, vocab):
    columns, inside = ragged_columns(head, body, vocab)
    return load_tile(logits + offset + columns, inside, "evict_first")


@triton.jit
def accumulate(maximum, total, x, scale):
    """Running maximum and sum per lane: one rescale per tile, not per element. Maxima drop NaN; the sum keeps it."""
    new = tl.maximum(maximum, tl.max(x, 0))
    total = total * tl.exp2((maximum - new) * scale) + tl.sum(tl.exp2((x - new[None, :]) * scale), 0)
    return new, total


@triton.jit
def max_and_sum(body, length, scale, DEPTH: tl.constexpr, LANES: tl.constexpr, EVICT: tl.constexpr):
    """One sweep over a row's body. Full tiles go unmasked; no barrier until the end."""
    columns = tile_columns(DEPTH, LANES)
    maximum = tl.full([LANES], FLOOR, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    full = length // (DEPTH * LANES) * (DEPTH * LANES)
    for start in range(0, full, DEPTH * LANES):
        x = load_tile(body + start + columns, None, EVICT)
        maximum, total = accumulate(maximum, total, x, scale)
    if full < length:
        x = load_tile(body + full + columns, columns < length - full, EVICT)
        maximum, total = accumulate(maximum, total, x, scale)
    top = tl.max(maximum, 0)
    return top, tl.sum(total * tl.exp2((maximum - top) * scale), 0)


@triton.jit
def join(maximum, total, ragged, scale):
    """(maximum, total, exponentials of the ragged elements) with the ragged elements joined in."""
    new = tl.maximum(maximum, tl.max(ragged, 0))
    e = tl.exp2((ragged - new) * scale)
    return new, total * tl.exp2((maximum - new) * scale) + tl.sum(e, 0), e


@kernel("logits")
def stats(
    logits,
    target_tokens,
    weights,
    temperature,
    out,  # (3, N)
    weights_stride: tl.int64,
    temperature_stride: tl.int64,
    n: tl.int64,
    vocab: tl.int32,
    inner: tl.int64,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    ignore_index: tl.int64,
    ALL_LOGPROBS: tl.constexpr,
    RAGGED: tl.constexpr,
    DEPTH: tl.constexpr,
    LANES: tl.constexpr,
):
    for row in range(tl.program_id(0).to(tl.int64), n, tl.num_programs(0)):
        target = tl.load(target_tokens + row).to(tl.int64)
        read = target != ignore_index
        if not ALL_LOGPROBS:
            read = read & (at(weights, weights_stride, row) != 0)
        maximum = 0.0
        total = 1.0
        target_logit = 0.0
        if read:
            offset = row_offset(row, inner, outer_stride, inner_stride)
            inside = in_vocab(target, vocab)
            target_logit = tl.load(logits + offset + target, mask=inside, other=float("nan")).to(tl.float32)
            scale = LOG2E * inverse_temperature(at(temperature, temperature_stride, row))
            head, body = cut(offset, vocab, RAGGED)
            start = body_pointer(logits, offset, head, True)
            maximum, total = max_and_sum(start, body, scale, DEPTH, LANES, "evict_first")
            if RAGGED:
                ragged = load_ragged(logits, offset, head, body, vocab)
                maximum, total, _ = join(maximum, total, ragged, scale)
        tl.store(out + row, maximum)
        tl.store(out + n + row, total)
        tl.store(out + 2 * n + row, target_logit)
