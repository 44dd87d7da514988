"""What a token's loss has beside its objective: the functions of fused_losses/terms.py."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .objectives import log_ratio, nan_unless, scaled
from .softmax import Coefficients, times


class Seen(NamedTuple):
    """What a token sees of its row."""

    logp: Any  # x = sum_k share_k logp_k
    whole: Any  # U = sum_k share_k
    lse: Any
    entropy: Any
    spread: Any  # lse - zbar


@triton.jit
def kl(logp, ref_logprob, ROW: tl.constexpr):
    """(estimate of KL, its derivative by logp, their sum, in which k3's cancel)"""
    difference = logp - ref_logprob
    if ROW.kl_type == "k3":
        inverse = tl.exp(-difference)
        finite = tl.where(difference == float("-inf"), 0.0, difference)  # logp -inf: KL is inf, not inf - inf
        return inverse + finite - 1.0, 1.0 - inverse, difference
    else:
        if ROW.kl_type == "k1":
            value = difference
            slope = tl.zeros_like(difference) + 1.0
        elif ROW.kl_type == "k2":
            value = 0.5 * difference * difference
            slope = difference
        else:
            tl.static_assert(ROW.kl_type == "abs")
            value = tl.abs(difference)
            slope = tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, difference))
        return value, slope, value + slope


@triton.jit
def terms_loss(seen, active, weight, denominator, inputs, terms, vocab, OBJECTIVE: tl.constexpr, ROW: tl.constexpr):
    """(weight * loss, the coefficients). vocab: the number of classes."""
    logp = seen.logp
    loss, g = OBJECTIVE(logp, *inputs)
    loss, g = times(terms.importance_weights, loss), times(terms.importance_weights, g)
    if ROW.kl_type is not None:
        penalty, slope, both = kl(logp, terms.ref_logprobs, ROW)
        if ROW.kl_weighted_by_ratio:
            # old_logprobs is the first input of every objective that has a ratio
            log_r, flows = log_ratio(logp, inputs[0], terms.log_ratio_clamp)
            ratio = tl.exp(log_r)
            penalty, slope = times(ratio, penalty), times(ratio, tl.where(flows, both, slope))
        loss += times(terms.kl_coef, penalty)
        g += times(terms.kl_coef, slope)
    smoothing = tl.zeros_like(logp)
    h = tl.zeros_like(logp)
    if ROW.entropy:
        loss -= times(terms.entropy_coef, seen.entropy)
        h = -terms.entropy_coef
    if ROW.smoothed:
        smoothing = terms.label_smoothing * seen.whole
        loss = times(1.0 - terms.label_smoothing, loss) + smoothing * seen.spread
        g = (1.0 - terms.label_smoothing) * g
    loss += times(terms.z_loss, seen.whole * seen.lse * seen.lse)
    zeta = smoothing + times(2.0 * terms.z_loss, seen.whole * seen.lse)
    s = -smoothing / vocab
    valid = logp == logp
    loss, g = nan_unless(valid, loss, g)
    h, zeta = nan_unless(valid, h, zeta)
    s = tl.where(valid, s, float("nan"))
    factor = tl.div_rn(weight, denominator)
    by = Coefficients(
        scaled(g, active, factor), scaled(h, active, factor), scaled(zeta, active, factor), scaled(s, active, factor)
    )
    return tl.where(active, weight * loss, 0.0), by
