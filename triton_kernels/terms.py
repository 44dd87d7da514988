"""What a row has beside its objective: K targets, and the terms of its loss. The functions of fused_losses/terms.py.

A row's targets are a block of TARGETS >= K elements, K being `num_targets`. Without `shares` K is 1 and its share is 1.
"""

import triton
import triton.language as tl

from .objectives import log_ratio, nan_unless, scaled

CHUNK = tl.constexpr(16)  # targets to look for duplicates in at a time


@triton.jit
def row_targets(target_tokens, row, num_targets, TARGETS: tl.constexpr):
    k = tl.arange(0, TARGETS)
    return tl.load(target_tokens + row * num_targets + k, mask=k < num_targets, other=-1).to(tl.int64)  # -1 is nowhere


@triton.jit
def given_targets(target, num_targets, ignore_index, TARGETS: tl.constexpr):
    """Which of a row's targets are not ignored."""
    return (tl.arange(0, TARGETS) < num_targets) & (target != ignore_index)


@triton.jit
def is_any(flags):
    return tl.max(flags.to(tl.int32), 0) != 0


@triton.jit
def row_shares(shares, row, num_targets, TARGETS: tl.constexpr):
    """0 where a target does not count."""
    k = tl.arange(0, TARGETS)
    if shares is None:
        return tl.where(k < num_targets, 1.0, 0.0)
    else:
        return tl.load(shares + row * num_targets + k, mask=k < num_targets, other=0.0)


@triton.jit
def times(a, b):
    """0 times what is not finite is 0: a coefficient of 0 takes its term out."""
    return tl.where((a == 0) | (b == 0), 0.0, a * b)


@triton.jit
def kl(logp, ref_logprob, KL_TYPE: tl.constexpr):
    """(estimate of KL, its derivative by logp, their sum, in which k3's cancel); KL_TYPE is an index in KL_TYPES."""
    difference = logp - ref_logprob
    if KL_TYPE == 2:  # k3
        inverse = tl.exp(-difference)
        finite = tl.where(difference == float("-inf"), 0.0, difference)  # logp -inf: KL is inf, not inf - inf
        return inverse + finite - 1.0, 1.0 - inverse, difference
    else:
        if KL_TYPE == 0:  # k1
            value = difference
            slope = tl.zeros_like(difference) + 1.0
        elif KL_TYPE == 1:  # k2
            value = 0.5 * difference * difference
            slope = difference
        else:  # abs
            value = tl.abs(difference)
            slope = tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, difference))
        return value, slope, value + slope


@triton.jit
def row_loss(
    active,
    logp,  # x = sum_k share_k logp_k
    whole,  # U = sum_k share_k
    lse,
    entropy,
    spread,  # lse - mean_j z_j
    weight,
    denominator,
    inputs,
    terms,  # the values of the columns of Terms, in that order
    label_smoothing,
    z_loss,
    OBJECTIVE: tl.constexpr,
    ENTROPY: tl.constexpr,
    SMOOTHED: tl.constexpr,
    KL_TYPE: tl.constexpr,
    WEIGHTED_KL: tl.constexpr,
):
    """(weight * loss, its derivatives by logp, entropy, lse and mean z, each times weight / denominator)"""
    importance_weight, ref_logprob, kl_coef, entropy_coef, log_ratio_clamp = terms
    loss, g = OBJECTIVE(logp, *inputs)
    loss, g = times(importance_weight, loss), times(importance_weight, g)
    if KL_TYPE >= 0:
        penalty, slope, both = kl(logp, ref_logprob, KL_TYPE)
        if WEIGHTED_KL:
            log_r, flows = log_ratio(logp, inputs[0], log_ratio_clamp)
            ratio = tl.exp(log_r)
            penalty, slope = times(ratio, penalty), times(ratio, tl.where(flows, both, slope))
        loss += times(kl_coef, penalty)
        g += times(kl_coef, slope)
    smoothing = tl.zeros_like(logp)
    h = tl.zeros_like(logp)
    if ENTROPY:
        loss -= times(entropy_coef, entropy)
        h = -entropy_coef
    if SMOOTHED:
        smoothing = label_smoothing * whole
        loss = times(1.0 - label_smoothing, loss) + smoothing * spread
        g = (1.0 - label_smoothing) * g
    loss += times(z_loss, whole * lse * lse)
    zeta = smoothing + times(2.0 * z_loss, whole * lse)
    valid = logp == logp
    loss, g = nan_unless(valid, loss, g)
    h, zeta = nan_unless(valid, h, zeta)
    return (
        tl.where(active, weight * loss, 0.0),
        scaled(g, active, weight, denominator),
        scaled(h, active, weight, denominator),
        scaled(zeta, active, weight, denominator),
        scaled(tl.where(valid, -smoothing, float("nan")), active, weight, denominator),
    )


@triton.jit
def merged_shares(target, share, target_tokens, shares, row, num_targets, TARGETS: tl.constexpr):
    """For each target the shares of all that are equal to it: whichever is stored last, the element is the same."""
    if shares is None:
        return share
    else:
        merged = tl.zeros([TARGETS], tl.float32)
        for start in range(0, num_targets, CHUNK):
            other = start + tl.arange(0, CHUNK)
            exists = other < num_targets
            other_target = tl.load(target_tokens + row * num_targets + other, mask=exists, other=0).to(tl.int64)
            other_share = tl.load(shares + row * num_targets + other, mask=exists, other=0.0)
            same = target[:, None] == other_target[None, :]
            merged += tl.sum(tl.where(same, other_share[None, :], 0.0), 1)
        return merged


@triton.jit
def store_logprobs(logprobs, row, n, logp, entropy, num_targets, TARGETS: tl.constexpr):
    k = tl.arange(0, TARGETS)
    tl.store(logprobs + k * n + row, logp, mask=k < num_targets)
    tl.store(logprobs + num_targets * n + row, entropy)
