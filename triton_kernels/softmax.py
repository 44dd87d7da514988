"""The maths of one token, between what its row shows and what goes back: the functions of csrc/loss.h."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .rows import FLOOR, LN2, LOWEST
from .softcap import squash_with_slope


class Softmax(NamedTuple):
    """A row's softmax, its single target kept apart from the rest: nothing cancels however sure the row is. With M the
    largest z of the others, S = sum_{j != t} e^(z_j - M) and z_max = max(M, z_t):

        rest = S e^(M - z_max)    own = e^(z_t - z_max)    1 - p_t = rest / (rest + own)
        logp = z_t - z_max - log(rest + own)

    and where the target leads, own is 1 and log(rest + own) = log1p(rest). Of several targets none is kept apart."""

    lead: Any  # z_max - M
    half: Any  # e^(-lead / 2)
    behind: Any  # z_t - z_max
    rest: Any
    own: Any
    mean: Any  # sum_j p_j d_j over all elements, d_j = z_j - z_max
    inverse: Any  # 1 / total, total = sum_j e^d_j
    log_total: Any


class Target(NamedTuple):
    """A target, or a block of them, as its row sees it."""

    distance: Any  # z_t - z_max
    p: Any
    others: Any  # 1 - p
    logp: Any


class Coefficients(NamedTuple):
    """The derivatives of the loss by logp, H and lse, and that by every z_j alike, each times weight / denominator."""

    g: Any
    h: Any
    zeta: Any
    s: Any


class Dense(NamedTuple):
    """An element that is no target's gets e_j (a + b t_j) + c, times its slope (softcap.py). t_j is log2 of e_j."""

    a: Any
    b: Any
    c: Any


@triton.jit
def times(a, b):
    """0 times what is not finite is 0: a coefficient of 0 takes its term out."""
    return tl.where(a == 0, 0.0, tl.where(b == 0, 0.0, a * b))


@triton.jit
def distance_of(target_y, maximum, unit):
    """z_t - M. Finite where it overflows, as above others that are masked by the lowest number there is; a target of
    +inf is as bad as NaN."""
    distance = (target_y - maximum) * unit
    distance = tl.where(distance > -FLOOR, -FLOOR, distance)
    return tl.where(target_y < float("inf"), distance, float("nan"))


@triton.jit
def made_up_log(rest, total, log_total):
    """log1p(rest), total being the rounded 1 + rest: what that rounds away is made up for in proportion. W. Kahan's;
    libdevice has one, but the interpreter has no libdevice."""
    exact = total - 1.0
    return tl.where(exact == 0, rest, tl.where(exact < float("inf"), log_total * (rest / exact), rest))


@triton.jit
def softmax_of(distance, sum, moment):
    """distance: z_t - M. sum, moment: of the others, relative to M. NaN in either comes out as NaN."""
    lead = tl.maximum(distance, 0.0)
    behind = distance - lead
    half = tl.exp(-0.5 * lead)  # twice: only the product may underflow, and half * lead can't overflow
    rest = half * (half * sum)
    own = tl.exp(behind)
    moment = half * (half * moment - (half * lead) * sum) + times(own, behind)
    total = rest + own
    log_total = tl.log(total)
    made_up = made_up_log(rest, total, log_total)
    inverse = 1.0 / total
    return Softmax(lead, half, behind, rest, own, moment * inverse, inverse, tl.where(own == 1, made_up, log_total))


@triton.jit
def softmax_of_several(sum, moment):
    nothing = tl.zeros_like(sum)
    inverse = 1.0 / sum
    return Softmax(nothing, nothing + 1.0, nothing, sum, nothing, moment * inverse, inverse, tl.log(sum))


@triton.jit
def target_seen(softmax):
    inverse = softmax.inverse
    return Target(softmax.behind, softmax.own * inverse, softmax.rest * inverse, softmax.behind - softmax.log_total)


@triton.jit
def target_seen_of_several(softmax, distance):
    """distance: z_t - z_max"""
    e = tl.exp(distance)
    return Target(distance, e * softmax.inverse, (softmax.rest - e) * softmax.inverse, distance - softmax.log_total)


@triton.jit
def log_sum_squares(softmax, squares):
    """log sum_j p_j^2. squares: of the others, relative to M."""
    # what underflows is nothing beside rest, of which it is the square or less
    others = tl.exp(-2.0 * softmax.lead) * squares
    own = softmax.own * softmax.own
    total = others + own
    log_total = tl.log(total)
    made_up = made_up_log(others, total, log_total)
    return tl.where(softmax.own == 1, made_up, log_total) - 2.0 * softmax.log_total


@triton.jit
def target_gradient(by, share, whole, target, mean, ROW: tl.constexpr):
    """dloss/dz_t. share: of all targets that are equal to this one; whole: of all targets. mean: sum_j p_j d_j."""
    drawn = whole * target.others if ROW.single else share - whole * target.p  # a single target's share is the whole
    if ROW.plain:
        return by.g * drawn
    away = tl.maximum(target.distance, LOWEST) - mean  # where p is 0, distance may be -inf
    return by.g * drawn + target.p * (by.zeta - times(by.h, away)) + by.s


@triton.jit
def dense_factors(by, whole, softmax, slope, ROW: tl.constexpr):
    factor = slope * softmax.inverse
    if ROW.plain:
        return Dense(-factor * by.g, 0.0, 0.0)
    mean = times(by.h, softmax.mean)
    return Dense(factor * (by.zeta - by.g * whole + mean), -factor * by.h * LN2, slope * by.s)


@triton.jit
def dense_gradient(x, inverse_cap, top, scale, dense, ROW: tl.constexpr):
    """Of logits x. top: the largest y (softcap.py), which is z in units of `scale` / log2(e)."""
    y, slope = squash_with_slope(x, inverse_cap, ROW)
    t = (y - top) * scale
    value = tl.exp2(t)
    if ROW.plain:
        value *= dense.a
    else:
        # entropy and smoothing are one flag in stage 3, which has coefficients only
        if ROW.entropy:
            value *= dense.a + dense.b * tl.maximum(t, LOWEST)
        else:
            value *= dense.a
        if ROW.smoothed:
            value += dense.c
        if ROW.capped:
            value *= slope
    return value


@triton.jit
def only(g):
    """The coefficients of a plain row."""
    nothing = tl.zeros_like(g)
    return Coefficients(g, nothing, nothing, nothing)


@triton.jit
def any_of(by, ROW: tl.constexpr):
    """0 only if all coefficients are."""
    if ROW.plain:
        return by.g
    return tl.abs(by.g) + tl.abs(by.h) + tl.abs(by.zeta) + tl.abs(by.s)


@triton.jit
def softmax_of_row(distance, sum, moment, ROW: tl.constexpr):
    """(softmax, its target or targets). distance: z_t - M of each; sum, moment: as stage 1 has them, relative to M."""
    if ROW.single:
        softmax = softmax_of(distance, sum, moment)
        return softmax, target_seen(softmax)
    else:
        softmax = softmax_of_several(sum, moment)
        return softmax, target_seen_of_several(softmax, distance)
