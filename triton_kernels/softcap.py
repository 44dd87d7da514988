"""The softcap: z = softcap * tanh(logit / softcap) / temperature.

Kernels work on y = tanh(logit / softcap), of which z is the multiple `unit`; without a softcap y is the logit itself.
"""

import triton
import triton.language as tl
from triton.language import core

from .rows import LOG2E


@triton.jit
def tanh(u):
    """(tanh, to about 2 ulp, and a quarter of its slope 1 / cosh^2, of which 1 - tanh^2 leaves nothing far out).
    libdevice has the former, but the interpreter has no libdevice."""
    w = u * u
    series = -6.104945671e-3 * w + 2.100363933e-2
    series = series * w - 5.385249853e-2
    series = series * w + 1.333278269e-1
    series = series * w - 3.333332837e-1
    size = tl.abs(u)
    r = 1.0 / (tl.exp2(size * (2.0 * LOG2E)) + 1.0)
    sign = u.to(tl.int32, bitcast=True) & -0x80000000
    far = ((1.0 - 2.0 * r).to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return tl.where(size < 0.625, u + u * w * series, far), r - r * r


@triton.jit
def units(inverse_t, softcap, ROW: tl.constexpr):
    """(unit, 1 / softcap)"""
    if ROW.capped:
        softcap = core.to_tensor(softcap)
        return inverse_t * softcap, tl.div_rn(1.0, softcap)
    else:
        return inverse_t, 1.0


@triton.jit
def squash(x, inverse_cap, ROW: tl.constexpr):
    return squash_with_slope(x, inverse_cap, ROW)[0]


@triton.jit
def squash_with_slope(x, inverse_cap, ROW: tl.constexpr):
    """(y, its slope, of a tanh a quarter: `common_slope` has the rest)"""
    if ROW.capped:
        return tanh(x * inverse_cap)
    else:
        return x, 1.0


@triton.jit
def common_slope(inverse_t, ROW: tl.constexpr):
    """What dz/dlogit is beside the slope of `squash_with_slope`: one number for a row."""
    return inverse_t * 4.0 if ROW.capped else inverse_t


@triton.jit
def squash_tile(x, inside, inverse_cap, ROW: tl.constexpr):
    """What lies outside the row stays -inf, which a softcap would make finite."""
    if ROW.capped:
        y = squash(x, inverse_cap, ROW)
        if inside is None:
            return y
        else:
            return tl.where(inside, y, float("-inf"))
    else:
        return x
