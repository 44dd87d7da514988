"""The per-token losses: the only kernel code that knows which loss is running.

An objective maps logp, the logprob of the target token under the policy being trained, and the token's inputs to
(loss, g = dloss/dlogp). It works on one token or on a block of them, so it selects and never branches. logp is in
[-inf, 0]: a NaN row is NaN whatever its loss (`token_loss`). The functions of csrc/objectives.h, value for value.

To add a loss: write its function here under its name in OBJECTIVES of fused_losses/objectives.py, inputs in that order.
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
def logprobs(logp):
    return logp, 1.0


@triton.jit
def cross_entropy(logp):
    return -logp, -1.0


@triton.jit
def importance_sampling(logp, old_logprobs, advantages):
    value = -tl.exp(logp - old_logprobs) * advantages
    value = tl.where(no_advantage(old_logprobs, advantages), 0.0, value)
    return value, value


@triton.jit
def ppo(logp, old_logprobs, advantages, low, high):
    ratio = tl.exp(logp - old_logprobs)
    above = (advantages > 0) & (ratio > high)
    below = (advantages < 0) & (ratio < low)
    value = -tl.where(above, high, tl.where(below, low, ratio)) * advantages
    value = tl.where(no_advantage(old_logprobs, advantages), 0.0, value)
    return nan_unless(valid_clip(low, high), value, tl.where(above | below, 0.0, value))


@triton.jit
def cispo(logp, old_logprobs, advantages, low, high):
    ratio = tl.exp(logp - old_logprobs)
    clipped = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))  # a NaN ratio stays NaN
    g = tl.where(no_advantage(old_logprobs, advantages), 0.0, -clipped * advantages)
    value = tl.where(g == 0, 0.0, g * logp)  # ratio 0 comes with logp -inf
    return nan_unless(valid_clip(low, high), value, g)


@triton.jit
def dro(logp, old_logprobs, advantages, beta):
    log_ratio = logp - old_logprobs
    reward = tl.where(advantages == 0, 0.0, logp * advantages)
    value = 0.5 * beta * log_ratio * log_ratio - reward
    return nan_unless(beta >= 0, value, beta * log_ratio - advantages)


@triton.jit
def token_loss(
    active, logp, weight, denominator, in0, in1, in2, in3, OBJECTIVE: tl.constexpr, NUM_INPUTS: tl.constexpr
):
    """(weight * loss, coefficient = weight * g / denominator). Both exactly 0 for an inactive token: selected, never
    multiplied, so that NaN and inf in it stay there."""
    if NUM_INPUTS == 0:
        loss, g = OBJECTIVE(logp)
    elif NUM_INPUTS == 2:
        loss, g = OBJECTIVE(logp, in0, in1)
    elif NUM_INPUTS == 3:
        loss, g = OBJECTIVE(logp, in0, in1, in2)
    else:
        loss, g = OBJECTIVE(logp, in0, in1, in2, in3)
    loss, g = nan_unless(logp == logp, loss, g)
    # g == 0 (a clipped token) must survive an infinite weight / denominator
    coefficient = tl.where(active & (g != 0), g * tl.div_rn(weight, denominator), 0.0)
    return tl.where(active, weight * loss, 0.0), coefficient
