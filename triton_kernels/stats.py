"""Stage 1: what a row shows of itself, and its targets' logits."""

import triton
import triton.language as tl

from .rows import (
    LN2,
    LOG2E,
    TEMPERATURE,
    WEIGHTS,
    at,
    body_pointer,
    cut,
    hole_of,
    in_vocab,
    inverse_temperature,
    kernel,
    row_offset,
    side_columns,
)
from .softcap import squash, units
from .sums import load_tile, sweep, with_side, with_target
from .targets import given_targets, is_any, row_targets, store_per_target

PREFIX = tl.constexpr(1024)  # logits to look through for ties at a time


@triton.jit
def is_first_of_largest(row, target, target_logit, rival):
    """1 or 0. rival: the largest of the other logits. Ties are rare: only then is it looked which of them is first."""
    before = tl.full([PREFIX], float("-inf"), tl.float32)
    end = tl.where(target_logit == rival, target, 0).to(tl.int32)
    for start in range(0, end, PREFIX):
        columns = start + tl.arange(0, PREFIX)
        x = tl.load(row + columns, mask=columns < end, other=float("-inf")).to(tl.float32)
        before = tl.maximum(before, x)
    first = (target_logit == rival) & (tl.max(before, 0) < target_logit)
    return ((target_logit > rival) | first).to(tl.float32)


@kernel("logits")
def stats(
    logits,
    stats,  # (3, N), (K + 4, N) where the row is not plain, (K + 6, N) with statistics
    token,
    vary: tl.int64,
    ignore_index: tl.int64,
    num_targets: tl.int64,
    n: tl.int64,
    vocab: tl.int32,
    inner: tl.int64,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    ROW: tl.constexpr,
    PLAN: tl.constexpr,
):
    SIDE: tl.constexpr = PLAN.ragged or ROW.single
    for row in range(tl.program_id(0).to(tl.int64), n, tl.num_programs(0)):
        target = row_targets(token, row, num_targets, ROW)
        read = is_any(given_targets(target, num_targets, ignore_index, ROW), ROW)
        if not ROW.all_logprobs:
            read = read & (at(token.weights, vary, WEIGHTS, row) != 0)
        maximum = 0.0
        sum = 0.0
        moment = 0.0
        drift = 0.0
        squares = 0.0
        top1 = 0.0
        target_logit = tl.zeros_like(target).to(tl.float32)
        if read:
            offset = row_offset(row, inner, outer_stride, inner_stride)
            inside = in_vocab(target, vocab)
            target_logit = tl.load(logits + offset + target, mask=inside, other=float("nan")).to(tl.float32)
            inverse_t = inverse_temperature(at(token.temperature, vary, TEMPERATURE, row))
            unit, inverse_cap = units(inverse_t, token.softcap, ROW)
            scale = LOG2E * unit
            head, body = cut(offset, vocab, PLAN)
            hole = hole_of(target, head, body, ROW, PLAN)
            start = body_pointer(logits, offset, head, True, PLAN)
            sums = sweep(start, body, hole, scale, inverse_cap, "evict_first", ROW, PLAN)
            if SIDE:
                columns, counts = side_columns(head, body, hole, vocab, ROW, PLAN)
                if ROW.single:
                    counts = counts & (columns != target)
                x = load_tile(logits + offset + columns, counts, "evict_first")
                sums = with_side(sums, x, counts, body, hole, scale, inverse_cap, ROW, PLAN)
            if ROW.statistics:
                rival = sums.peak if ROW.capped else sums.maximum
                top1 = is_first_of_largest(logits + offset, target, target_logit, rival)
                squares = sums.squares
            others = sums.drift
            sums = with_target(sums, target_logit, squash(target_logit, inverse_cap, ROW), scale, ROW)
            maximum = sums.peak if ROW.capped else sums.maximum
            sum = sums.sum
            moment = sums.moment * LN2
            drift = tl.where(inside, sums.drift, others) * LN2 if ROW.single else sums.drift * LN2
        tl.store(stats + row, maximum)
        tl.store(stats + n + row, sum)
        store_per_target(stats + 2 * n, row, n, target_logit, num_targets, ROW)
        if not ROW.plain:
            tl.store(stats + (2 + num_targets) * n + row, moment)
            tl.store(stats + (3 + num_targets) * n + row, drift)
        if ROW.statistics:
            tl.store(stats + (4 + num_targets) * n + row, squares)
            tl.store(stats + (5 + num_targets) * n + row, top1)
