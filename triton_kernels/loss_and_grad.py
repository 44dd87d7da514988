"""One pass: stats, objective and gradient of a row by one program, which makes its loss and writes its gradient.

A plan that is `one_shot` holds the row in registers: one read, one write. A larger row is swept twice; the second sweep
finds it in L2 as long as the rows in flight fit there, which the launch sees to by its grid.
The gradient may lie over the logits: whatever is read of a row is read before the reduction that precedes its stores,
except for the second sweep, in which each thread reads its own elements before it stores them.
"""

import triton
import triton.language as tl

from .plain_row import evaluate_plain
from .rows import (
    LOG2E,
    TEMPERATURE,
    WEIGHTS,
    at,
    body_pointer,
    cut,
    hole_of,
    in_vocab,
    input_values,
    inverse_temperature,
    kernel,
    number,
    ragged_columns,
    row_offset,
    side_columns,
    term_values,
    tile_mask,
)
from .softcap import common_slope, squash_tile, squash_with_slope, units
from .softmax import any_of, dense_factors, dense_gradient, distance_of, target_gradient
from .sums import at_once, load_tile, sweep, with_side, with_target
from .targets import (
    given_targets,
    is_any,
    merged_shares,
    row_shares,
    row_targets,
    store_per_target,
)
from .terms_row import evaluate_terms


@triton.jit
def write_body(logits, grad, length, top, scale, inverse_cap, dense, ROW: tl.constexpr, PLAN: tl.constexpr):
    """The second sweep over a row's body: it lies in L2, and is not needed again."""
    DEPTH: tl.constexpr = PLAN.depth // 2
    LANES: tl.constexpr = PLAN.lanes
    columns = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    full = length // (DEPTH * LANES) * (DEPTH * LANES)
    for start in range(0, full, DEPTH * LANES):
        x = load_tile(logits + start + columns, None, "evict_first")
        value = dense_gradient(x, inverse_cap, top, scale, dense, ROW)
        tl.store(grad + start + columns, value, eviction_policy="evict_first")
    if full < length:
        inside = columns < length - full
        x = load_tile(logits + full + columns, inside, "evict_first")
        value = dense_gradient(x, inverse_cap, top, scale, dense, ROW)
        tl.store(grad + full + columns, value, mask=inside, eviction_policy="evict_first")


@triton.jit
def write_zeros(grad, length, TILE: tl.constexpr):
    columns = tl.arange(0, TILE)
    for start in range(0, length, TILE):
        inside = columns < length - start
        tl.store(grad + start + columns, tl.zeros([TILE], tl.float32), mask=inside, eviction_policy="evict_first")


@kernel("logits", "grad")
def loss_and_grad(
    logits,
    grad,
    logprobs,  # (N,), (K + 1, N) where the row is not plain: then the entropy
    row_losses,  # (N,)
    token,
    vary: tl.int64,
    ignore_index: tl.int64,
    num_targets: tl.int64,
    n: tl.int64,
    vocab: tl.int32,
    inner: tl.int64,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    grad_outer_stride: tl.int64,
    grad_inner_stride: tl.int64,
    OBJECTIVE: tl.constexpr,
    ROW: tl.constexpr,
    PLAN: tl.constexpr,
):
    TILE: tl.constexpr = PLAN.depth * PLAN.lanes
    SIDE: tl.constexpr = PLAN.ragged or ROW.single
    for row in range(tl.program_id(0).to(tl.int64), n, tl.num_programs(0)):
        weight = at(token.weights, vary, WEIGHTS, row)
        target = row_targets(token, row, num_targets, ROW)
        given = given_targets(target, num_targets, ignore_index, ROW)
        read = is_any(given, ROW)
        active = read & (weight != 0)
        if not ROW.all_logprobs:
            read = active
        offset = row_offset(row, inner, outer_stride, inner_stride)
        grad_offset = row_offset(row, inner, grad_outer_stride, grad_inner_stride)
        head, body = cut(offset, vocab, PLAN)
        source = body_pointer(logits, offset, head, True, PLAN)
        destination = body_pointer(grad, grad_offset, head, PLAN.aligned, PLAN)

        loss = 0.0
        coefficients = 0.0
        entropy = 0.0
        logp = tl.zeros_like(target).to(tl.float32)
        if read:
            # per-token numbers first: their latency hides behind the sweep
            inside = in_vocab(target, vocab)
            target_logit = tl.load(logits + offset + target, mask=inside, other=float("nan")).to(tl.float32)
            inputs = input_values(token, vary, row)
            denominator = number(token.denominator)
            inverse_t = inverse_temperature(at(token.temperature, vary, TEMPERATURE, row))
            unit, inverse_cap = units(inverse_t, token.softcap, ROW)
            slope = common_slope(inverse_t, ROW)
            scale = LOG2E * unit
            target_y, target_slope = squash_with_slope(target_logit, inverse_cap, ROW)
            if not ROW.plain:
                terms = term_values(token, vary, row)
                share = row_shares(token, row, num_targets, ROW)
            hole = hole_of(target, head, body, ROW, PLAN)
            if SIDE:
                side, exists = side_columns(head, body, hole, vocab, ROW, PLAN)
                counts = exists & (side != target) if ROW.single else exists
                x = load_tile(logits + offset + side, counts, "evict_first")

            if PLAN.one_shot:
                columns = tl.arange(0, TILE)
                swept = tile_mask(columns, 0, body, hole, ROW, PLAN)
                body_x = load_tile(source + columns, swept, "evict_first")
                y = squash_tile(body_x, swept, inverse_cap, ROW)
                side_y = squash_tile(x, counts, inverse_cap, ROW) if SIDE else y
                sums, e = at_once(y, swept, side_y, counts if SIDE else swept, scale, ROW, SIDE)
            else:
                sums = sweep(source, body, hole, scale, inverse_cap, "evict_last", ROW, PLAN)
                if SIDE:
                    sums = with_side(sums, x, counts, body, hole, scale, inverse_cap, ROW, PLAN)
            sums = with_target(sums, target_logit, target_y, scale, ROW)

            distance = distance_of(target_y, sums.maximum, unit)
            top = tl.maximum(sums.maximum, target_y) if ROW.single else sums.maximum
            if ROW.plain:
                found = evaluate_plain(distance, sums, active, weight, denominator, inputs, OBJECTIVE)
            else:
                found = evaluate_terms(
                    distance,
                    given,
                    share,
                    sums,
                    top * unit,
                    active,
                    weight,
                    denominator,
                    inputs,
                    terms,
                    vocab,
                    OBJECTIVE,
                    ROW,
                )
            loss, logp, entropy = found.loss, found.logp, found.entropy
            coefficients = any_of(found.by, ROW)
            if coefficients != 0:
                softmax = found.softmax
                dense = dense_factors(found.by, found.whole, softmax, slope, ROW)
                if PLAN.one_shot:
                    if ROW.plain:
                        value = e * (softmax.half * (softmax.half * dense.a))
                    else:
                        value = dense_gradient(body_x, inverse_cap, top, scale, dense, ROW)
                    tl.store(destination + columns, value, mask=columns < body, eviction_policy="evict_first")
                else:
                    write_body(source, destination, body, top, scale, inverse_cap, dense, ROW, PLAN)
                merged = 1.0 if ROW.plain else merged_shares(token, row, target, share, num_targets, ROW)
                own = target_gradient(found.by, merged, found.whole, found.target, softmax.mean, ROW)
                own *= slope * target_slope
                if SIDE:
                    value = dense_gradient(x, inverse_cap, top, scale, dense, ROW)
                    if ROW.single:
                        value = tl.where(side == target, own, value)
                        tl.debug_barrier()  # other threads of this program have stored into the hole
                    tl.store(grad + grad_offset + side, value, mask=exists)
                if not ROW.single:
                    tl.debug_barrier()
                    tl.store(grad + grad_offset + target, own, mask=inside)

        if coefficients == 0:
            write_zeros(destination, body, TILE)
            if PLAN.ragged:
                columns, exists = ragged_columns(head, body, vocab, PLAN)
                tl.store(grad + grad_offset + columns, 0.0, mask=exists)
        store_per_target(logprobs, row, n, logp, num_targets, ROW)
        if not ROW.plain:
            tl.store(logprobs + num_targets * n + row, entropy)
        tl.store(row_losses + row, loss)
