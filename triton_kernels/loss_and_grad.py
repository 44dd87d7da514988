"""One pass: stats, objective and gradient of a row by one program, which makes its loss and writes its gradient.

ONE_SHOT holds the row's exponentials in registers, for V <= LANES: one read, one write. A larger row is swept twice;
the second sweep finds it in L2 as long as the rows in flight fit there, which the launch sees to by its grid.
The gradient may lie over the logits: whatever is read of a row is read before the reduction that precedes its stores,
except for the second sweep, in which each thread reads its own elements before it stores them.
"""

import triton.language as tl

from .grad import store_ragged, store_target, target_gradient, write_body, write_zeros
from .objectives import token_loss
from .rows import (
    FLOOR,
    LOG2E,
    VECTOR,
    at,
    body_pointer,
    cut,
    in_vocab,
    inverse_temperature,
    kernel,
    logprob,
    number,
    row_offset,
)
from .stats import join, load_ragged, load_tile, max_and_sum


@kernel("logits", "grad")
def loss_and_grad(
    logits,
    grad,
    target_tokens,
    logprobs,  # (N,)
    row_losses,  # (N,)
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
    vocab: tl.int32,
    inner: tl.int64,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    grad_outer_stride: tl.int64,
    grad_inner_stride: tl.int64,
    ignore_index: tl.int64,
    OBJECTIVE: tl.constexpr,
    NUM_INPUTS: tl.constexpr,
    ALL_LOGPROBS: tl.constexpr,
    RAGGED: tl.constexpr,
    ALIGNED: tl.constexpr,
    ONE_SHOT: tl.constexpr,
    DEPTH: tl.constexpr,
    LANES: tl.constexpr,
):
    for row in range(tl.program_id(0).to(tl.int64), n, tl.num_programs(0)):
        target = tl.load(target_tokens + row).to(tl.int64)
        weight = at(weights, weights_stride, row)
        read = target != ignore_index
        active = read & (weight != 0)
        if not ALL_LOGPROBS:
            read = active
        offset = row_offset(row, inner, outer_stride, inner_stride)
        grad_offset = row_offset(row, inner, grad_outer_stride, grad_inner_stride)
        head, body = cut(offset, vocab, RAGGED)
        source = body_pointer(logits, offset, head, True)
        destination = body_pointer(grad, grad_offset, head, ALIGNED)

        logp = 0.0
        loss = 0.0
        coefficient = 0.0
        if read:
            # per-token numbers first: their latency hides behind the sweep
            inside = in_vocab(target, vocab)
            target_logit = tl.load(logits + offset + target, mask=inside, other=float("nan")).to(tl.float32)
            a = at(in0, in0_stride, row)
            b = at(in1, in1_stride, row)
            c = at(in2, in2_stride, row)
            d = at(in3, in3_stride, row)
            divisor = number(denominator)
            inverse_t = inverse_temperature(at(temperature, temperature_stride, row))
            scale = LOG2E * inverse_t
            if RAGGED:
                ragged = load_ragged(logits, offset, head, body, vocab)

            if ONE_SHOT:
                columns = tl.arange(0, LANES)
                x = load_tile(source + columns, columns < body, "evict_first")
                maximum = tl.maximum(tl.max(x, 0), FLOOR)
                if RAGGED:
                    maximum = tl.maximum(maximum, tl.max(ragged, 0))
                e = tl.exp2((x - maximum) * scale)
                total = tl.sum(e, 0)
                if RAGGED:
                    ragged = tl.exp2((ragged - maximum) * scale)
                    total += tl.sum(ragged, 0)
            else:
                maximum, total = max_and_sum(source, body, scale, DEPTH, LANES, "evict_last")
                if RAGGED:
                    maximum, total, ragged = join(maximum, total, ragged, scale)

            logp = logprob(target_logit, maximum, total, inverse_t)
            loss, coefficient = token_loss(active, logp, weight, divisor, a, b, c, d, OBJECTIVE, NUM_INPUTS)
            if coefficient != 0:
                factor = -(coefficient * inverse_t / total)
                if ONE_SHOT:
                    tl.store(destination + columns, e * factor, mask=columns < body, eviction_policy="evict_first")
                else:
                    write_body(source, destination, body, maximum, scale, factor, DEPTH // 2, LANES)
                if RAGGED:
                    store_ragged(grad, grad_offset, head, body, vocab, ragged * factor)
                value = target_gradient(coefficient, inverse_t, target_logit, maximum, total, scale)
                store_target(grad, grad_offset, target, vocab, value)

        if coefficient == 0:
            write_zeros(destination, body, DEPTH * LANES)
            if RAGGED:
                store_ragged(grad, grad_offset, head, body, vocab, tl.zeros([2 * VECTOR], tl.float32))
        tl.store(logprobs + row, logp)
        tl.store(row_losses + row, loss)
