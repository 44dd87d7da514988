"""What is summed over a row: its maximum M, the `sum` sum_j e_j of e_j = exp(z_j - M), and where the loss's terms ask
for them the `moment` sum_j e_j d_j, for the entropy, the `drift` sum_j d_j, for smoothed labels, and the `squares`
sum_j e_j^2, for statistics, as the drift is; d_j = z_j - M.

A single target is left out of all of these but the drift (softmax.py says why). The body is swept without the vector
that holds it; the rest of this vector is summed with the elements that lie outside of the body (`side_columns`).

e_j is exp2(t_j), t_j = (y_j - y_M) * scale, scale = log2(e) * unit (softcap.py): subtract first, so that a large
common offset costs no digits. The gradient forms it in the same way; folded and unfolded exponentials must not meet.
The moment and the drift are sums of e_j t_j and of t_j in here, so in units of log2.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .rows import FLOOR, LOWEST, tile_columns, tile_mask
from .softcap import squash_tile


class Sums(NamedTuple):
    peak: Any  # the largest logit, where y is not the logit
    maximum: Any  # y_M
    sum: Any
    moment: Any
    drift: Any
    squares: Any


@triton.jit
def load_tile(pointers, mask, EVICT: tl.constexpr):
    if mask is None:
        return tl.load(pointers, eviction_policy=EVICT).to(tl.float32)
    else:
        return tl.load(pointers, mask=mask, other=float("-inf"), eviction_policy=EVICT).to(tl.float32)


@triton.jit
def rebase(sum, moment, drift, squares, count, delta, ROW: tl.constexpr):
    """The sums over `count` elements, once their maximum has risen by -delta (in units of log2)."""
    shrink = tl.exp2(delta)
    if ROW.entropy:
        moment = (moment + tl.maximum(delta, LOWEST) * sum) * shrink
    if ROW.drifts:
        drift += tl.maximum(delta, FLOOR) * count  # finite: 0 where nothing was counted
    if ROW.statistics:
        squares = squares * (shrink * shrink)
    return sum * shrink, moment, drift, squares


@triton.jit
def relative_to(maximum, y, inside, scale, ROW: tl.constexpr):
    """(e, sum, moment, drift, squares) of a tile, per lane. `inside` is None for a full tile."""
    t = (y - maximum) * scale
    e = tl.exp2(t)
    moment = 0.0
    if ROW.entropy:
        moment = tl.sum(e * tl.maximum(t, LOWEST), 0)
    drift = 0.0
    if ROW.drifts:
        drift = tl.sum(t, 0) if inside is None else tl.sum(tl.where(inside, t, 0.0), 0)
    squares = 0.0
    if ROW.statistics:
        squares = tl.sum(e * e, 0)
    return e, tl.sum(e, 0), moment, drift, squares


@triton.jit
def accumulate(peak, maximum, sum, moment, drift, squares, count, x, inside, scale, inverse_cap, ROW: tl.constexpr):
    """Running maximum and sums per lane, a tile of logits x further: one rescale per tile, not per element. Maxima drop
    NaN; the sum keeps it. `count` elements per lane came before."""
    if ROW.capped:
        peak = tl.maximum(peak, tl.max(x, 0))
    y = squash_tile(x, inside, inverse_cap, ROW)
    new = tl.maximum(maximum, tl.max(y, 0))
    sum, moment, drift, squares = rebase(sum, moment, drift, squares, count, (maximum - new) * scale, ROW)
    _e, more, more_moment, more_drift, more_squares = relative_to(new, y, inside, scale, ROW)
    sum += more
    if ROW.entropy:
        moment += more_moment
    if ROW.drifts:
        drift += more_drift
    if ROW.statistics:
        squares += more_squares
    return peak, new, sum, moment, drift, squares


@triton.jit
def in_full_tiles(full, hole, ROW: tl.constexpr, PLAN: tl.constexpr):
    """How many elements of each lane the full tiles have, without the hole. Counted anew wherever it is needed: a
    register per lane, kept over a sweep, would spill."""
    LANES: tl.constexpr = PLAN.lanes
    VECTOR: tl.constexpr = PLAN.vector
    count = tl.zeros([LANES], tl.int32) + full * PLAN.depth
    if ROW.single:
        with_hole = tl.arange(0, LANES) // VECTOR == hole % LANES // VECTOR
        count -= (with_hole & (hole < full * PLAN.depth * LANES)).to(tl.int32)
    return count


@triton.jit
def sweep(body, length, hole, scale, inverse_cap, EVICT: tl.constexpr, ROW: tl.constexpr, PLAN: tl.constexpr):
    """The sums over a row's body, the hole left out. Full tiles go unmasked, so that with the hole waits for the end,
    where the tile that is not full is masked, too. No barrier until then."""
    LANES: tl.constexpr = PLAN.lanes
    TILE: tl.constexpr = PLAN.depth * PLAN.lanes
    columns = tile_columns(PLAN)
    peak = tl.full([LANES], FLOOR, tl.float32)
    maximum = tl.full([LANES], FLOOR, tl.float32)
    sum = tl.zeros([LANES], tl.float32)
    moment = tl.zeros([LANES], tl.float32)
    drift = tl.zeros([LANES], tl.float32)
    squares = tl.zeros([LANES], tl.float32)
    full = length // TILE
    with_hole = hole // TILE
    waits = with_hole < full
    unmasked = full - waits.to(tl.int32)
    for i in range(0, unmasked):
        start = i * TILE
        if ROW.single:
            start += tl.where(i >= with_hole, TILE, 0)
        x = load_tile(body + start + columns, None, EVICT)
        peak, maximum, sum, moment, drift, squares = accumulate(
            peak, maximum, sum, moment, drift, squares, i * PLAN.depth, x, None, scale, inverse_cap, ROW
        )
    masked = waits.to(tl.int32) + (full * TILE < length).to(tl.int32)
    for i in range(0, masked):
        first = waits & (i == 0)
        start = tl.where(first, with_hole, full) * TILE
        inside = tile_mask(columns, start, length, hole, ROW, PLAN)
        count = 0
        if ROW.drifts:
            count = tl.where(first, unmasked * PLAN.depth, in_full_tiles(full, hole, ROW, PLAN))
        x = load_tile(body + start + columns, inside, EVICT)
        peak, maximum, sum, moment, drift, squares = accumulate(
            peak, maximum, sum, moment, drift, squares, count, x, inside, scale, inverse_cap, ROW
        )
    count = 0
    if ROW.drifts:
        rest = tile_mask(columns, full * TILE, length, hole, ROW, PLAN)
        count = in_full_tiles(full, hole, ROW, PLAN) + tl.sum(rest.to(tl.int32), 0)
    top = tl.max(maximum, 0)
    sum, moment, drift, squares = rebase(sum, moment, drift, squares, count, (maximum - top) * scale, ROW)
    return Sums(tl.max(peak, 0), top, tl.sum(sum, 0), tl.sum(moment, 0), tl.sum(drift, 0), tl.sum(squares, 0))


@triton.jit
def at_once(y, inside, side_y, side_inside, scale, ROW: tl.constexpr, SIDE: tl.constexpr):
    """(the sums, e of the body) of a row that a tile holds, with what lies beside its body, where there is any."""
    maximum = tl.maximum(tl.max(y, 0), FLOOR)
    if SIDE:
        maximum = tl.maximum(maximum, tl.max(side_y, 0))
    e, sum, moment, drift, _squares = relative_to(maximum, y, inside, scale, ROW)  # one pass, which has no statistics
    if SIDE:
        _e, more, more_moment, more_drift, _squares = relative_to(maximum, side_y, side_inside, scale, ROW)
        sum += more
        moment += more_moment
        drift += more_drift
    return Sums(maximum, maximum, sum, moment, drift, 0.0), e


@triton.jit
def with_side(sums, x, inside, body, hole, scale, inverse_cap, ROW: tl.constexpr, PLAN: tl.constexpr):
    """The sums of a body and of the logits x beside it."""
    count = body - tl.where(hole < body, PLAN.vector, 0)
    peak, maximum, sum, moment, drift, squares = accumulate(
        sums.peak,
        sums.maximum,
        sums.sum,
        sums.moment,
        sums.drift,
        sums.squares,
        count,
        x,
        inside,
        scale,
        inverse_cap,
        ROW,
    )
    return Sums(peak, maximum, sum, moment, drift, squares)


@triton.jit
def with_target(sums, target_logit, target_y, scale, ROW: tl.constexpr):
    """The sums of a row once all of it was summed but its single target."""
    if ROW.single:
        alone = sums.sum == 0  # V = 1, or all others -inf: (finite - -FLT_MAX) / T would overflow
        maximum = tl.where(alone, target_y, sums.maximum)
        peak = tl.where(alone, target_logit, sums.peak)
        drift = sums.drift
        if ROW.drifts:
            own = (target_y - maximum) * scale
            if ROW.statistics:  # finite over others that are masked by the lowest number there is
                own = tl.minimum(own, -FLOOR)
            drift += own
        return Sums(peak, maximum, sums.sum, sums.moment, drift, sums.squares)
    else:
        return sums
