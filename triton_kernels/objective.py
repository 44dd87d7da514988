"""Stage 2: losses, logprobs and gradient coefficients from stats; sees N only."""

import triton
import triton.language as tl

from .objectives import token_loss
from .rows import at, inverse_temperature, kernel, logprob, number


@triton.jit
def block(column, stride, row, inside):
    """A column for a block of tokens, numbers included: the interpreter fails at scalar & block."""
    return tl.broadcast_to(at(column, stride, row, inside), row.shape)


@kernel()
def objective(
    stats,  # (3, N)
    target_tokens,
    logprobs,  # (N,)
    row_losses,  # (N,): weight * loss
    coefficients,  # (N,)
    in0,
    in1,
    in2,
    in3,
    weights,
    temperature,
    denominator,
    in0_stride: tl.int64,
    in1_stride: tl.int64,
    in2_stride: tl.int64,
    in3_stride: tl.int64,
    weights_stride: tl.int64,
    temperature_stride: tl.int64,
    n: tl.int64,
    ignore_index: tl.int64,
    OBJECTIVE: tl.constexpr,
    NUM_INPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < n
    target = tl.load(target_tokens + row, mask=inside, other=0).to(tl.int64)
    weight = block(weights, weights_stride, row, inside)
    inverse_t = inverse_temperature(block(temperature, temperature_stride, row, inside))
    maximum = tl.load(stats + row, mask=inside)
    total = tl.load(stats + n + row, mask=inside)
    target_logit = tl.load(stats + 2 * n + row, mask=inside)
    a = block(in0, in0_stride, row, inside)
    b = block(in1, in1_stride, row, inside)
    c = block(in2, in2_stride, row, inside)
    d = block(in3, in3_stride, row, inside)

    logp = logprob(target_logit, maximum, total, inverse_t)
    active = (target != ignore_index) & (weight != 0)
    loss, coefficient = token_loss(active, logp, weight, number(denominator), a, b, c, d, OBJECTIVE, NUM_INPUTS)
    tl.store(logprobs + row, logp, mask=inside)
    tl.store(row_losses + row, loss, mask=inside)
    tl.store(coefficients + row, coefficient, mask=inside)
