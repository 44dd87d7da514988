"""The per-token losses: the only kernel code that knows which loss is running.

An objective maps logp, the logprob of the target token under the policy being trained, and the token's inputs to
(loss, g = dloss/dlogp). It works on one token or on a block of them, so it selects and never branches. logp is in
[-inf, 0]: a NaN row is NaN whatever its loss (plain_row.py, terms.py). The functions of csrc/objectives.h, value for
value.

To add a loss: write its function here under its name in OBJECTIVES of fused_losses/objectives.py, inputs in that order;
limits that a call leaves out are +inf.
"""

import triton
import triton.language as tl


@triton.jit
def no_advantage(old_logprobs, advantages):
    """Advantage 0 makes loss and gradient 0 whatever the ratio is (0 * inf is NaN), but must not hide a NaN."""
    return (advantages == 0) & (old_logprobs == old_logprobs)


@triton.jit
def nan_unless(valid, loss, g):
    nan = float("nan")
    return tl.where(valid, loss, nan), tl.where(valid, g, nan)


@triton.jit
def valid_clip(low, high):
    return (low >= 0) & (low <= high)  # false for NaN, too


@triton.jit
def log_ratio(logp, old_logprobs, clamp):
    """(logp - old_logprobs within [-clamp, clamp], whether a gradient flows through it). NaN stays NaN."""
    raw = logp - old_logprobs
    above = raw > clamp
    below = raw < -clamp
    return tl.where(above, clamp, tl.where(below, -clamp, raw)), (above | below) == 0


@triton.jit
def logprobs(logp):
    return logp, 1.0


@triton.jit
def cross_entropy(logp):
    return -logp, -1.0


@triton.jit
def importance_sampling(logp, old_logprobs, advantages, log_ratio_clamp):
    log_r, flows = log_ratio(logp, old_logprobs, log_ratio_clamp)
    value = -tl.exp(log_r) * advantages
    value = tl.where(no_advantage(old_logprobs, advantages), 0.0, value)
    return nan_unless(log_ratio_clamp >= 0, value, tl.where(flows, value, 0.0))


@triton.jit
def ppo(logp, old_logprobs, advantages, clip_low_threshold, clip_high_threshold, log_ratio_clamp, dual_clip, delta):
    """max(-min(r, delta) A, -clamp(r, low, high) A), at most -dual_clip A for A < 0: in effect one clamp per sign."""
    low, high = clip_low_threshold, clip_high_threshold
    log_r, flows = log_ratio(logp, old_logprobs, log_ratio_clamp)
    ratio = tl.exp(log_r)
    negative = advantages < 0
    ceiling = tl.where(negative, tl.minimum(tl.maximum(high, delta), dual_clip), tl.minimum(high, delta))
    below = negative & (ratio < low)
    above = ratio > ceiling
    value = -tl.where(below, tl.minimum(low, ceiling), tl.where(above, ceiling, ratio)) * advantages
    value = tl.where(no_advantage(old_logprobs, advantages), 0.0, value)
    valid = valid_clip(low, high) & (log_ratio_clamp >= 0) & (dual_clip >= 0) & (delta >= 0)
    clipped = (below | above) & (advantages == advantages)
    return nan_unless(valid, value, tl.where(flows & (clipped == 0), value, 0.0))


@triton.jit
def cispo(logp, old_logprobs, advantages, clip_low_threshold, clip_high_threshold, log_ratio_clamp):
    low, high = clip_low_threshold, clip_high_threshold
    ratio = tl.exp(log_ratio(logp, old_logprobs, log_ratio_clamp)[0])
    clipped = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))  # a NaN ratio stays NaN
    g = tl.where(no_advantage(old_logprobs, advantages), 0.0, -clipped * advantages)
    value = tl.where(g == 0, 0.0, g * logp)  # ratio 0 comes with logp -inf
    return nan_unless(valid_clip(low, high) & (log_ratio_clamp >= 0), value, g)


@triton.jit
def dro(logp, old_logprobs, advantages, beta, log_ratio_clamp):
    log_r, flows = log_ratio(logp, old_logprobs, log_ratio_clamp)
    reward = tl.where(advantages == 0, 0.0, logp * advantages)
    value = 0.5 * beta * log_r * log_r - reward
    return nan_unless((beta >= 0) & (log_ratio_clamp >= 0), value, tl.where(flows, beta * log_r, 0.0) - advantages)


@triton.jit
def sapo(logp, old_logprobs, advantages, tau_positive, tau_negative, log_ratio_clamp):
    """-(4 / tau) sigmoid(u) A, u = tau (r - 1). From u = 104 on 1 - sigmoid(u) is 0 in float32, and times a ratio that
    overflows NaN."""
    tau = tl.where(advantages > 0, tau_positive, tau_negative)
    log_r, flows = log_ratio(logp, old_logprobs, log_ratio_clamp)
    ratio = tl.exp(log_r)
    u = tau * (ratio - 1.0)
    saturated = u > 104.0
    e = tl.exp(-tl.abs(u))
    larger = 1.0 / (1.0 + e)  # of sigmoid(u) and 1 - sigmoid(u)
    gate = tl.where(saturated, 1.0, tl.where(u > 0, larger, e * larger))
    value = -4.0 / tau * gate * advantages
    g = tl.where(flows & (saturated == 0), -4.0 * larger * (e * larger) * ratio * advantages, 0.0)
    idle = no_advantage(old_logprobs, advantages)
    valid = (tau_positive > 0) & (tau_negative > 0) & (log_ratio_clamp >= 0)
    return nan_unless(valid, tl.where(idle, 0.0, value), tl.where(idle, 0.0, g))


@triton.jit
def scaled(derivative, active, factor):
    """A coefficient. A derivative of 0 (a clipped token) must survive an infinite weight / denominator."""
    return tl.where(active & (derivative != 0), derivative * factor, 0.0)
