"""Stage 1: what a row shows of itself. Its maximum, the sum of e_j = exp(z_j - z_max), its targets' logits, and where
the loss's terms ask for them the `moment` sum_j e_j (z_j - z_max), for the entropy, and the `spread`
sum_j (z_j - z_max), for smoothed labels.

e_j is exp2(t_j), t_j = (y_j - y_max) * scale, scale = log2(e) * unit (softcap.py): subtract first, so that a large
common offset costs no digits. The gradient forms it in the same way; folded and unfolded exponentials must not meet.
The moment and the spread are sums of e_j t_j and of t_j in here, so in units of log2.
"""

import triton
import triton.language as tl

from .rows import (
    FLOOR,
    LN2,
    LOG2E,
    LOWEST,
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
from .softcap import squash_tile, units
from .terms import given_targets, is_any, row_targets


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
def rebase(total, moment, spread, count, delta, ENTROPY: tl.constexpr, SMOOTHED: tl.constexpr):
    """The sums over `count` elements, once their maximum has risen by -delta (in units of log2)."""
    shrink = tl.exp2(delta)
    if ENTROPY:
        moment = (moment + tl.maximum(delta, LOWEST) * total) * shrink
    if SMOOTHED:
        spread += tl.maximum(delta, FLOOR) * count  # finite: 0 where nothing was counted
    return total * shrink, moment, spread


@triton.jit
def accumulate(maximum, total, moment, spread, count, y, inside, scale, ENTROPY: tl.constexpr, SMOOTHED: tl.constexpr):
    """Running maximum and sums per lane, and the e of a tile: one rescale per tile, not per element. Maxima drop NaN;
    the sum keeps it. `count` elements per lane came before; `inside` is None for a full tile."""
    new = tl.maximum(maximum, tl.max(y, 0))
    total, moment, spread = rebase(total, moment, spread, count, (maximum - new) * scale, ENTROPY, SMOOTHED)
    t = (y - new) * scale
    e = tl.exp2(t)
    total += tl.sum(e, 0)
    if ENTROPY:
        moment += tl.sum(e * tl.maximum(t, LOWEST), 0)
    if SMOOTHED:
        if inside is None:
            spread += tl.sum(t, 0)
        else:
            spread += tl.sum(tl.where(inside, t, 0.0), 0)
    return new, total, moment, spread, e


@triton.jit
def sweep(
    body,
    length,
    scale,
    inverse_cap,
    DEPTH: tl.constexpr,
    LANES: tl.constexpr,
    EVICT: tl.constexpr,
    ENTROPY: tl.constexpr,
    SMOOTHED: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """(largest logit where y is not the logit, y_max, the sums) of a row's body. Full tiles go unmasked; no barrier
    until the end."""
    columns = tile_columns(DEPTH, LANES)
    peak = tl.full([LANES], FLOOR, tl.float32)
    maximum = tl.full([LANES], FLOOR, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    moment = tl.zeros([LANES], tl.float32)
    spread = tl.zeros([LANES], tl.float32)
    full = length // (DEPTH * LANES) * (DEPTH * LANES)
    for start in range(0, full, DEPTH * LANES):
        x = load_tile(body + start + columns, None, EVICT)
        if CAPPED:
            peak = tl.maximum(peak, tl.max(x, 0))
        y = squash_tile(x, None, inverse_cap, CAPPED)
        maximum, total, moment, spread, _ = accumulate(
            maximum, total, moment, spread, start // LANES, y, None, scale, ENTROPY, SMOOTHED
        )
    inside = columns < length - full
    if full < length:
        x = load_tile(body + full + columns, inside, EVICT)
        if CAPPED:
            peak = tl.maximum(peak, tl.max(x, 0))
        y = squash_tile(x, inside, inverse_cap, CAPPED)
        maximum, total, moment, spread, _ = accumulate(
            maximum, total, moment, spread, full // LANES, y, inside, scale, ENTROPY, SMOOTHED
        )
    count = 0
    if SMOOTHED:
        count = full // LANES + tl.sum(inside.to(tl.int32), 0)
    top = tl.max(maximum, 0)
    total, moment, spread = rebase(total, moment, spread, count, (maximum - top) * scale, ENTROPY, SMOOTHED)
    return tl.max(peak, 0), top, tl.sum(total, 0), tl.sum(moment, 0), tl.sum(spread, 0)


@kernel("logits")
def stats(
    logits,
    target_tokens,  # (N,), with terms (N, K)
    weights,
    temperature,
    softcap,
    out,  # (3, N), with terms (K + 4, N)
    weights_stride: tl.int64,
    temperature_stride: tl.int64,
    n: tl.int64,
    vocab: tl.int32,
    inner: tl.int64,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    ignore_index: tl.int64,
    num_targets: tl.int64,
    TARGETS: tl.constexpr,
    CAPPED: tl.constexpr,
    ENTROPY: tl.constexpr,
    SMOOTHED: tl.constexpr,
    ALL_LOGPROBS: tl.constexpr,
    RAGGED: tl.constexpr,
    DEPTH: tl.constexpr,
    LANES: tl.constexpr,
):
    for row in range(tl.program_id(0).to(tl.int64), n, tl.num_programs(0)):
        if TARGETS:
            target = row_targets(target_tokens, row, num_targets, TARGETS)
            read = is_any(given_targets(target, num_targets, ignore_index, TARGETS))
            target_logit = tl.zeros([TARGETS], tl.float32)
        else:
            target = tl.load(target_tokens + row).to(tl.int64)
            read = target != ignore_index
            target_logit = 0.0
        if not ALL_LOGPROBS:
            read = read & (at(weights, weights_stride, row) != 0)
        peak = 0.0
        maximum = 0.0
        total = 1.0
        moment = 0.0
        spread = 0.0
        if read:
            offset = row_offset(row, inner, outer_stride, inner_stride)
            inside = in_vocab(target, vocab)
            target_logit = tl.load(logits + offset + target, mask=inside, other=float("nan")).to(tl.float32)
            inverse_t = inverse_temperature(at(temperature, temperature_stride, row))
            unit, inverse_cap = units(inverse_t, softcap, CAPPED)
            scale = LOG2E * unit
            head, body = cut(offset, vocab, RAGGED)
            start = body_pointer(logits, offset, head, True)
            peak, maximum, total, moment, spread = sweep(
                start, body, scale, inverse_cap, DEPTH, LANES, "evict_first", ENTROPY, SMOOTHED, CAPPED
            )
            if RAGGED:
                columns, exists = ragged_columns(head, body, vocab)
                x = load_tile(logits + offset + columns, exists, "evict_first")
                if CAPPED:
                    peak = tl.maximum(peak, tl.max(x, 0))
                y = squash_tile(x, exists, inverse_cap, CAPPED)
                maximum, total, moment, spread, _ = accumulate(
                    maximum, total, moment, spread, body, y, exists, scale, ENTROPY, SMOOTHED
                )
        tl.store(out + row, peak if CAPPED else maximum)
        tl.store(out + n + row, total)
        if TARGETS:
            k = tl.arange(0, TARGETS)
            tl.store(out + (2 + k) * n + row, target_logit, mask=k < num_targets)
            tl.store(out + (2 + num_targets) * n + row, moment * LN2)
            tl.store(out + (3 + num_targets) * n + row, spread * LN2 / vocab)
        else:
            tl.store(out + 2 * n + row, target_logit)
