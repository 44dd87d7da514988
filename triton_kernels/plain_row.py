"""A row with one target, no softcap and no terms: all that goes back to it is g, the derivative by logp."""

import triton
import triton.language as tl

from .objectives import nan_unless, scaled
from .records import Evaluated
from .softmax import only, softmax_of, target_seen


@triton.jit
def plain_loss(logp, active, weight, denominator, inputs, OBJECTIVE: tl.constexpr):
    """(weight * loss, weight * g / denominator). Both exactly 0 for an inactive token: selected, never multiplied, so
    that NaN and inf in it stay there."""
    loss, g = OBJECTIVE(logp, *inputs)
    loss, g = nan_unless(logp == logp, loss, g)
    return tl.where(active, weight * loss, 0.0), scaled(g, active, tl.div_rn(weight, denominator))


@triton.jit
def evaluate_plain(distance, sums, active, weight, denominator, inputs, OBJECTIVE: tl.constexpr):
    """distance: z_t - M"""
    softmax = softmax_of(distance, sums.sum, 0.0)
    target = target_seen(softmax)
    loss, g = plain_loss(target.logp, active, weight, denominator, inputs, OBJECTIVE)
    return Evaluated(loss, only(g), target.logp, 0.0, 1.0, softmax, target)
