"""What sees N only: stage 2, losses, logprobs and coefficients from stats; and the two sums over tokens, one program in
float64 and fixed order each, so bitwise the same on every run.
"""

import triton.language as tl

from .plain_row import plain_loss
from .rows import (
    TEMPERATURE,
    WEIGHTS,
    at,
    input_values,
    inverse_temperature,
    kernel,
    number,
    term_values,
)
from .softcap import squash, units
from .softmax import (
    distance_of,
    log_sum_squares,
    softmax_of,
    softmax_of_several,
    target_seen,
    target_seen_of_several,
)
from .targets import any_given
from .terms import terms_loss
from .terms_row import row_seen


@kernel()
def objective(
    stats,  # (3, N), (K + 4, N) where the row is not plain, (K + 6, N) with statistics
    logprobs,  # (N,), (K + 1, N) where the row is not plain: then the entropy; (K + 4, N) with statistics
    row_losses,  # (N,): weight * loss
    coefficients,  # (1, N), (4, N) where the row is not plain
    token,
    vary: tl.int64,
    ignore_index: tl.int64,
    num_targets: tl.int64,
    n: tl.int64,
    vocab: tl.int32,
    OBJECTIVE: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < n
    weight = at(token.weights, vary, WEIGHTS, row, inside)
    given = any_given(token, row, inside, num_targets, ignore_index)
    active = given & (weight != 0)
    read = active
    if ROW.all_logprobs:
        read = given
    inputs = input_values(token, vary, row, inside)
    inverse_t = inverse_temperature(at(token.temperature, vary, TEMPERATURE, row, inside))
    unit, inverse_cap = units(inverse_t, token.softcap, ROW)
    maximum = squash(tl.load(stats + row, mask=inside), inverse_cap, ROW)
    sum = tl.load(stats + n + row, mask=inside)
    moment = tl.zeros([BLOCK], tl.float32)
    if not ROW.plain:
        moment = tl.load(stats + (2 + num_targets) * n + row, mask=inside)
    if ROW.single:
        target_y = squash(tl.load(stats + 2 * n + row, mask=inside), inverse_cap, ROW)
        softmax = softmax_of(distance_of(target_y, maximum, unit), sum, moment)
        logp = tl.where(read, target_seen(softmax).logp, 0.0)
        tl.store(logprobs + row, logp, mask=inside)
        top = tl.maximum(maximum, target_y)
        x = logp
        whole = tl.full([BLOCK], 1.0, tl.float32)
        if token.shares is not None:
            whole = tl.load(token.shares + row, mask=inside, other=0.0)
            x = tl.where(whole != 0, whole * logp, 0.0)
    else:
        softmax = softmax_of_several(sum, moment)
        top = maximum
        x = tl.zeros([BLOCK], tl.float32)
        whole = tl.zeros([BLOCK], tl.float32)
        for k in range(0, num_targets):
            target = tl.load(token.targets + row * num_targets + k, mask=inside, other=0).to(tl.int64)
            target_y = squash(tl.load(stats + (2 + k) * n + row, mask=inside), inverse_cap, ROW)
            seen = target_seen_of_several(softmax, distance_of(target_y, maximum, unit))
            logp = tl.where(read & (target != ignore_index), seen.logp, 0.0)
            tl.store(logprobs + k * n + row, logp, mask=inside)
            share = tl.load(token.shares + row * num_targets + k, mask=inside, other=0.0)
            x += tl.where(share != 0, share * logp, 0.0)
            whole += share
    denominator = number(token.denominator)
    if ROW.plain:
        loss, g = plain_loss(x, active, weight, denominator, inputs, OBJECTIVE)
        tl.store(coefficients + row, g, mask=inside)
    else:
        drift = tl.load(stats + (3 + num_targets) * n + row, mask=inside)
        seen = row_seen(softmax, x, whole, top * unit, drift, vocab, ROW)
        tl.store(logprobs + num_targets * n + row, tl.where(read, seen.entropy, 0.0), mask=inside)
        if ROW.statistics:
            failed = logp != logp
            squares = tl.load(stats + (4 + num_targets) * n + row, mask=inside)
            top1 = tl.load(stats + (5 + num_targets) * n + row, mask=inside)
            sum_squares = tl.where(failed, float("nan"), log_sum_squares(softmax, squares))
            mean_logit = tl.where(failed, float("nan"), maximum * unit + drift / vocab)
            tl.store(logprobs + (num_targets + 1) * n + row, tl.where(read, sum_squares, 0.0), mask=inside)
            tl.store(logprobs + (num_targets + 2) * n + row, tl.where(read, mean_logit, 0.0), mask=inside)
            tl.store(logprobs + (num_targets + 3) * n + row, tl.where(failed, 0.0, top1), mask=inside)
        terms = term_values(token, vary, row, inside)
        loss, by = terms_loss(seen, active, weight, denominator, inputs, terms, vocab, OBJECTIVE, ROW)
        tl.store(coefficients + row, by.g, mask=inside)
        tl.store(coefficients + n + row, by.h, mask=inside)
        tl.store(coefficients + 2 * n + row, by.zeta, mask=inside)
        tl.store(coefficients + 3 * n + row, by.s, mask=inside)
    tl.store(row_losses + row, loss, mask=inside)


@kernel()
def normaliser(
    normaliser,  # (1,)
    token,
    vary: tl.int64,
    ignore_index: tl.int64,
    num_targets: tl.int64,
    n: tl.int64,
    BLOCK: tl.constexpr,
):
    """The denominator of a mean: the sum of the weights of active tokens."""
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, n, BLOCK):
        row = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = row < n
        given = any_given(token, row, inside, num_targets, ignore_index)
        weight = at(token.weights, vary, WEIGHTS, row, inside)
        total += tl.where(inside & given, weight, 0.0).to(tl.float64)
    tl.store(normaliser, tl.sum(total, 0).to(tl.float32))


@kernel()
def reduce(
    row_losses,  # (N,)
    denominator,
    loss,  # (1,)
    n: tl.int64,
    BLOCK: tl.constexpr,
):
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, n, BLOCK):
        row = start + tl.arange(0, BLOCK).to(tl.int64)
        total += tl.load(row_losses + row, mask=row < n, other=0.0).to(tl.float64)
    total = tl.sum(total, 0)
    divisor = number(denominator).to(tl.float64)
    # no active token means 0 whatever the denominator; a denominator of 0 elsewhere shows as inf
    empty = (total == 0) & (divisor == 0)
    tl.store(loss, tl.where(empty, 0.0, total / tl.where(empty, 1.0, divisor)).to(tl.float32))
