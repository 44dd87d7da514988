"""Stage 2: losses, logprobs and gradient coefficients from stats; sees N only."""

import triton.language as tl

from .objectives import token_loss
from .rows import block, inverse_temperature, kernel, logprob, number, per_token
from .softcap import squash, units
from .terms import row_loss


@kernel()
def objective(
    stats,  # (3, N), with terms (K + 4, N)
    target_tokens,  # (N,), with terms (N, K)
    logprobs,  # (N,), with terms (K + 1, N): then the entropy
    row_losses,  # (N,): weight * loss
    coefficients,  # (N,), with terms (4, N)
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
    ignore_index: tl.int64,
    num_targets: tl.int64,
    OBJECTIVE: tl.constexpr,
    TERMS: tl.constexpr,
    CAPPED: tl.constexpr,
    ENTROPY: tl.constexpr,
    SMOOTHED: tl.constexpr,
    KL_TYPE: tl.constexpr,
    WEIGHTED_KL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < n
    weight = block(weights, weights_stride, row, inside)
    inverse_t = inverse_temperature(block(temperature, temperature_stride, row, inside))
    unit, inverse_cap = units(inverse_t, softcap, CAPPED)
    maximum = squash(tl.load(stats + row, mask=inside), inverse_cap, CAPPED)
    total = tl.load(stats + n + row, mask=inside)
    values = per_token(inputs, inputs_vary, row, inside)

    if TERMS:
        x = tl.zeros([BLOCK], tl.float32)
        whole = tl.zeros([BLOCK], tl.float32)
        active = row < 0
        for k in range(0, num_targets):
            target = tl.load(target_tokens + row * num_targets + k, mask=inside, other=0).to(tl.int64)
            target_y = squash(tl.load(stats + (2 + k) * n + row, mask=inside), inverse_cap, CAPPED)
            given = target != ignore_index
            logp = tl.where(given, logprob(target_y, maximum, total, unit), 0.0)
            tl.store(logprobs + k * n + row, logp, mask=inside)
            if shares is None:
                share = tl.full([BLOCK], 1.0, tl.float32)
            else:
                share = tl.load(shares + row * num_targets + k, mask=inside, other=0.0)
            x += tl.where(share != 0, share * logp, 0.0)
            whole += share
            active = active | given
        log_total = tl.log(total)
        moment = tl.load(stats + (2 + num_targets) * n + row, mask=inside)
        mean = tl.load(stats + (3 + num_targets) * n + row, mask=inside)
        entropy = tl.zeros([BLOCK], tl.float32)
        if ENTROPY:
            entropy = log_total - moment / total
        tl.store(logprobs + num_targets * n + row, entropy, mask=inside)
        loss, g, h, zeta, s = row_loss(
            active & (weight != 0),
            x,
            whole,
            maximum * unit + log_total,
            entropy,
            log_total - mean,
            weight,
            number(denominator),
            values,
            per_token(terms, terms_vary, row, inside),
            label_smoothing,
            z_loss,
            OBJECTIVE,
            ENTROPY,
            SMOOTHED,
            KL_TYPE,
            WEIGHTED_KL,
        )
        tl.store(coefficients + row, g, mask=inside)
        tl.store(coefficients + n + row, h, mask=inside)
        tl.store(coefficients + 2 * n + row, zeta, mask=inside)
        tl.store(coefficients + 3 * n + row, s, mask=inside)
    else:
        target = tl.load(target_tokens + row, mask=inside, other=0).to(tl.int64)
        target_logit = tl.load(stats + 2 * n + row, mask=inside)
        logp = logprob(target_logit, maximum, total, inverse_t)
        active = (target != ignore_index) & (weight != 0)
        loss, coefficient = token_loss(active, logp, weight, number(denominator), values, OBJECTIVE)
        tl.store(logprobs + row, logp, mask=inside)
        tl.store(coefficients + row, coefficient, mask=inside)
    tl.store(row_losses + row, loss, mask=inside)
