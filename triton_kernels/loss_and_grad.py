"""One pass: stats, objective and gradient of a row by one program, which makes its loss and writes its gradient.

ONE_SHOT holds the row's exponentials in registers, for V <= LANES: one read, one write. A larger row is swept twice;
the second sweep finds it in L2 as long as the rows in flight fit there, which the launch sees to by its grid.
The gradient may lie over the logits: whatever is read of a row is read before the reduction that precedes its stores,
except for the second sweep, in which each thread reads its own elements before it stores them.
"""

import triton.language as tl

from .grad import (
    any_of,
    dense_factors,
    dense_gradient,
    store_ragged,
    store_targets,
    target_gradient,
    targets_gradient,
    write_body,
    write_zeros,
)
from .objectives import token_loss
from .rows import (
    FLOOR,
    LN2,
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
    per_token,
    ragged_columns,
    row_offset,
)
from .softcap import squash, squash_tile, units
from .stats import accumulate, load_ragged, load_tile, sweep
from .terms import given_targets, is_any, merged_shares, row_loss, row_shares, row_targets, store_logprobs


@kernel("logits", "grad")
def loss_and_grad(
    logits,
    grad,
    target_tokens,  # (N,), with terms (N, K)
    logprobs,  # (N,), with terms (K + 1, N): then the entropy
    row_losses,  # (N,)
    inputs,
    terms,  # columns: what `row_loss` takes, or nothing
    shares,  # (N, K) or None
    label_smoothing,
    z_loss,
    softcap,
    weights,
    temperature,
    denominator,
    inputs_vary: tl.int64,
    terms_vary: tl.int64,
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
    num_targets: tl.int64,
    OBJECTIVE: tl.constexpr,
    TARGETS: tl.constexpr,
    CAPPED: tl.constexpr,
    ENTROPY: tl.constexpr,
    SMOOTHED: tl.constexpr,
    KL_TYPE: tl.constexpr,
    WEIGHTED_KL: tl.constexpr,
    ALL_LOGPROBS: tl.constexpr,
    RAGGED: tl.constexpr,
    ALIGNED: tl.constexpr,
    ONE_SHOT: tl.constexpr,
    DEPTH: tl.constexpr,
    LANES: tl.constexpr,
):
    TERMS: tl.constexpr = TARGETS > 0
    for row in range(tl.program_id(0).to(tl.int64), n, tl.num_programs(0)):
        weight = at(weights, weights_stride, row)
        if TERMS:
            target = row_targets(target_tokens, row, num_targets, TARGETS)
            given = given_targets(target, num_targets, ignore_index, TARGETS)
            read = is_any(given)
            logp = tl.zeros([TARGETS], tl.float32)
            entropy = 0.0
        else:
            target = tl.load(target_tokens + row).to(tl.int64)
            read = target != ignore_index
            logp = 0.0
        active = read & (weight != 0)
        if not ALL_LOGPROBS:
            read = active
        offset = row_offset(row, inner, outer_stride, inner_stride)
        grad_offset = row_offset(row, inner, grad_outer_stride, grad_inner_stride)
        head, body = cut(offset, vocab, RAGGED)
        source = body_pointer(logits, offset, head, True)
        destination = body_pointer(grad, grad_offset, head, ALIGNED)

        loss = 0.0
        coefficient = 0.0
        if read:
            # per-token numbers first: their latency hides behind the sweep
            inside = in_vocab(target, vocab)
            target_logit = tl.load(logits + offset + target, mask=inside, other=float("nan")).to(tl.float32)
            values = per_token(inputs, inputs_vary, row)
            divisor = number(denominator)
            inverse_t = inverse_temperature(at(temperature, temperature_stride, row))
            unit, inverse_cap = units(inverse_t, softcap, CAPPED)
            scale = LOG2E * unit
            if TERMS:
                term_values = per_token(terms, terms_vary, row)
                share = row_shares(shares, row, num_targets, TARGETS)
            if RAGGED:
                ragged = load_ragged(logits, offset, head, body, vocab)

            if ONE_SHOT and not TERMS:
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
                if ONE_SHOT:
                    columns = tl.arange(0, LANES)
                    in_body = columns < body
                    y = squash_tile(load_tile(source + columns, in_body, "evict_first"), in_body, inverse_cap, CAPPED)
                    maximum, total, moment, spread, _e = accumulate(
                        number(FLOOR), 0.0, 0.0, 0.0, 0, y, in_body, scale, ENTROPY, SMOOTHED
                    )
                else:
                    _peak, maximum, total, moment, spread = sweep(
                        source, body, scale, inverse_cap, DEPTH, LANES, "evict_last", ENTROPY, SMOOTHED, CAPPED
                    )
                if RAGGED:
                    _columns, exists = ragged_columns(head, body, vocab)
                    ragged = squash_tile(ragged, exists, inverse_cap, CAPPED)
                    maximum, total, moment, spread, ragged_e = accumulate(
                        maximum, total, moment, spread, body, ragged, exists, scale, ENTROPY, SMOOTHED
                    )
                    if not TERMS:
                        ragged = ragged_e

            if TERMS:
                target_y = squash(target_logit, inverse_cap, CAPPED)
                logp = tl.where(given, logprob(target_y, maximum, total, unit), 0.0)
                x = tl.sum(tl.where(share != 0, share * logp, 0.0), 0)
                whole = tl.sum(share, 0)
                log_total = tl.log(total)
                mean = moment * LN2 / total  # of z - z_max under p
                if ENTROPY:
                    entropy = log_total - mean
                loss, g, h, zeta, s = row_loss(
                    active,
                    x,
                    whole,
                    maximum * unit + log_total,
                    entropy,
                    log_total - spread * LN2 / vocab,
                    weight,
                    divisor,
                    values,
                    term_values,
                    label_smoothing,
                    z_loss,
                    OBJECTIVE,
                    ENTROPY,
                    SMOOTHED,
                    KL_TYPE,
                    WEIGHTED_KL,
                )
                by = (g, h, zeta, s)
                coefficient = any_of(by)
                if coefficient != 0:
                    a, b, c = dense_factors(by, whole, mean, total, inverse_t, vocab)
                    if ONE_SHOT:
                        value = dense_gradient(y, maximum, scale, a, b, c, ENTROPY, SMOOTHED, CAPPED)
                        tl.store(destination + columns, value, mask=in_body, eviction_policy="evict_first")
                    else:
                        write_body(
                            source,
                            destination,
                            body,
                            maximum,
                            scale,
                            inverse_cap,
                            a,
                            b,
                            c,
                            DEPTH // 2,
                            LANES,
                            ENTROPY,
                            SMOOTHED,
                            CAPPED,
                        )
                    if RAGGED:
                        value = dense_gradient(ragged, maximum, scale, a, b, c, ENTROPY, SMOOTHED, CAPPED)
                        store_ragged(grad, grad_offset, head, body, vocab, value)
                    merged = merged_shares(target, share, target_tokens, shares, row, num_targets, TARGETS)
                    value = targets_gradient(
                        by, target_y, merged, whole, mean, maximum, total, scale, inverse_t, vocab, CAPPED
                    )
                    store_targets(grad, grad_offset, target, inside & (share != 0), value)
            else:
                logp = logprob(target_logit, maximum, total, inverse_t)
                loss, coefficient = token_loss(active, logp, weight, divisor, values, OBJECTIVE)
                if coefficient != 0:
                    factor = -(coefficient * inverse_t / total)
                    if ONE_SHOT:
                        tl.store(destination + columns, e * factor, mask=columns < body, eviction_policy="evict_first")
                    else:
                        write_body(
                            source,
                            destination,
                            body,
                            maximum,
                            scale,
                            1.0,
                            factor,
                            0.0,
                            0.0,
                            DEPTH // 2,
                            LANES,
                            False,
                            False,
                            False,
                        )
                    if RAGGED:
                        store_ragged(grad, grad_offset, head, body, vocab, ragged * factor)
                    value = target_gradient(coefficient, inverse_t, target_logit, maximum, total, scale)
                    store_targets(grad, grad_offset, target, inside, value)

        if coefficient == 0:
            write_zeros(destination, body, DEPTH * LANES)
            if RAGGED:
                store_ragged(grad, grad_offset, head, body, vocab, tl.zeros([2 * VECTOR], tl.float32))
        if TERMS:
            store_logprobs(logprobs, row, n, logp, entropy, num_targets, TARGETS)
        else:
            tl.store(logprobs + row, logp)
        tl.store(row_losses + row, loss)
