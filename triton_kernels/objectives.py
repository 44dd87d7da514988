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
def linear(g, logp):
    """g * logp and g, a constant; 0 where that is: a ratio or a probability of 0 comes with logp -inf."""
    return tl.where(g == 0, 0.0, g * logp), g


@triton.jit
def dft(logp):
    return linear(-tl.exp(logp), logp)


@triton.jit
def reinforce(logp, advantages):
    return linear(-advantages, logp)


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
    value, g = linear(tl.where(no_advantage(old_logprobs, advantages), 0.0, -clipped * advantages), logp)
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
def in_trust_region(divergence, logp, old_logprobs, advantages, low, high, log_ratio_clamp, ratio_cap):
    """-sg(min(r, cap)) logp A; 0 where the advantage would drive the token on, out of the region."""
    ratio = tl.exp(log_ratio(logp, old_logprobs, log_ratio_clamp)[0])
    capped = tl.where(ratio > ratio_cap, ratio_cap, ratio)  # a NaN ratio stays NaN
    up = (advantages > 0) & (logp > old_logprobs) & (divergence > high)
    down = (advantages < 0) & (logp < old_logprobs) & (divergence > low)
    idle = no_advantage(old_logprobs, advantages) | up | down
    value, g = linear(tl.where(idle, 0.0, -capped * advantages), logp)
    return nan_unless((low >= 0) & (high >= 0) & (log_ratio_clamp >= 0) & (ratio_cap >= 0), value, g)


@triton.jit
def dppo_tv(logp, old_logprobs, advantages, divergence_low, divergence_high, log_ratio_clamp, ratio_cap):
    divergence = tl.abs(tl.exp(logp) - tl.exp(old_logprobs))
    return in_trust_region(
        divergence, logp, old_logprobs, advantages, divergence_low, divergence_high, log_ratio_clamp, ratio_cap
    )


@triton.jit
def dppo_kl(logp, old_logprobs, advantages, divergence_low, divergence_high, log_ratio_clamp, ratio_cap):
    """KL of "this token or any other" under two policies, as frameworks form it: finite where logp is 0."""
    p = tl.exp(old_logprobs)
    others = others_of(old_logprobs)
    drift = tl.where(p == 0, 0.0, p * (old_logprobs - logp))
    divergence = drift + others * tl.log((others + 1e-8) / (others_of(logp) + 1e-8))
    return in_trust_region(
        divergence, logp, old_logprobs, advantages, divergence_low, divergence_high, log_ratio_clamp, ratio_cap
    )


@triton.jit
def others_of(logp):
    """1 - exp(logp), at least 0, with all its digits: what exp rounds away is made up for in proportion. W. Kahan's, as
    for log1p in softmax.py."""
    p = tl.exp(logp)
    one_less = 1.0 - p
    near = (logp > -0.5) & (one_less > 0)  # where exp rounded to 1, the first term of the series is exact
    made_up = tl.where(near, one_less * (logp / tl.log(tl.where(near, p, 0.5))), one_less)
    return tl.maximum(tl.where(p == 1, -logp, made_up), 0.0)


@triton.jit
def scaled(derivative, active, factor):
    """A coefficient. A derivative of 0 (a clipped token) must survive an infinite weight / denominator."""
    return tl.where(active & (derivative != 0), derivative * factor, 0.0)
