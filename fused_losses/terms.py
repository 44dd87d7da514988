"""What a token's loss may hold beside its objective, and what it then sends back to the vocabulary.

With z = softcap * tanh(logits / softcap) / temperature (z = logits / temperature without a softcap), p = softmax(z) and

    logp = z_t - lse    lse = logsumexp(z)    H = lse - sum_j p_j z_j    zbar = mean_j z_j

a token's loss is

    importance_weight * objective(logp) + kl_coef * KL(logp, ref_logprob) - entropy_coef * H

and for cross entropy, which is -logp, e being the label smoothing,

    (1 - e) * -logp + U * (e * (lse - zbar) + z_loss * lse^2)

times its weight. U is 1 and logp as above for one target; with K targets they are the sum of the targets' shares and
logp = sum_k share_k (z_tk - lse). What is sent back are the derivatives by logp, H, lse and zbar:

    dloss/dz_j = g (share_j - U p_j) + p_j (zeta - h (z_j - sum_i p_i z_i)) + s / V

share_j being that of the targets equal to j. ``csrc/loss.h`` and ``triton_kernels/terms.py`` hold the same functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from .objectives import Loss, constant, log_ratio
from .problem import Column, KlType, PolicyTerms, Terms

KL_TYPES: tuple[KlType, ...] = get_args(KlType)


class Asked(NamedTuple):
    """Which of the terms that a policy loss may have it asks for."""

    kl: bool
    entropy: bool


def asked(terms: PolicyTerms) -> Asked:
    if terms.kl_type not in KL_TYPES:
        raise ValueError(f"kl_type must be one of {KL_TYPES}, got {terms.kl_type!r}")
    kl = isinstance(terms.kl_coef, Tensor) or terms.kl_coef != 0.0
    if kl and terms.ref_logprobs is None:
        raise ValueError("kl_coef needs ref_logprobs, the logprobs under the reference policy; got None")
    return Asked(kl, isinstance(terms.entropy_coef, Tensor) or terms.entropy_coef != 0.0)


class Seen(NamedTuple):
    """What a token sees of its row."""

    logp: Tensor
    lse: Tensor
    entropy: Tensor
    spread: Tensor  # lse - zbar
    whole: Tensor | float  # U


class RowLoss(NamedTuple):
    """The loss and its derivatives by logp, H, lse and zbar."""

    value: Tensor
    g: Tensor
    h: Tensor
    zeta: Tensor
    s: Tensor


def row_loss(formula: Callable[..., Loss], seen: Seen, inputs: Sequence[Tensor], terms: Terms) -> RowLoss:
    """The columns of ``terms`` are tensors here. ``value`` can be differentiated; the other four are by hand."""
    logp = seen.logp
    value, g = formula(logp, *inputs)
    value, g = times(terms.importance_weights, value), times(terms.importance_weights, g)
    h, zeta, s = (torch.zeros_like(g) for _ in range(3))
    if terms.kl_type is not None:
        penalty, slope, both = kl(logp, terms.ref_logprobs, terms.kl_type)
        if terms.kl_weighted_by_ratio:
            clamped, flows = log_ratio(logp, inputs[0], constant(terms.log_ratio_clamp, logp))
            ratio = torch.exp(clamped)
            penalty, slope = times(ratio, penalty), times(ratio, torch.where(flows, both, slope))
        value, g = value + times(terms.kl_coef, penalty), g + times(terms.kl_coef, slope)
    if terms.entropy:
        value = value - times(terms.entropy_coef, seen.entropy)
        h = h - terms.entropy_coef
    if terms.label_smoothing != 0:
        e = terms.label_smoothing
        value, g = times(1 - e, value) + e * seen.whole * seen.spread, (1 - e) * g
        zeta, s = zeta + e * seen.whole, s - e * seen.whole
    if terms.z_loss != 0:
        value = value + terms.z_loss * seen.whole * seen.lse**2
        zeta = zeta + 2 * terms.z_loss * seen.whole * seen.lse
    value = value + torch.where(torch.isnan(logp), logp, 0.0)  # whatever took it out
    return RowLoss(value, g.detach(), h, zeta.detach(), s)


def kl(logp: Tensor, ref_logprobs: Tensor | float, kl_type: KlType) -> tuple[Tensor, Tensor, Tensor]:
    """(estimate of KL(policy || reference) for a token sampled from the policy, its derivative by logp, their sum).

    The derivative of ratio * estimate is ratio * sum; for k3 the two cancel in it, so it is formed by itself. k1 and k2
    are the log ratio and half its square; k3 is unbiased and never negative. J. Schulman, "Approximating KL
    Divergence", 2020, http://joschu.net/blog/kl-approx.html.
    """
    difference = logp - ref_logprobs
    if kl_type == "k3":
        inverse = torch.exp(-difference)
        finite = difference.masked_fill(difference == -torch.inf, 0.0)  # logp is -inf: KL is inf, not inf - inf
        return inverse + finite - 1, 1 - inverse, difference
    if kl_type == "k1":
        value, slope = difference, torch.ones_like(logp)
    elif kl_type == "k2":
        value, slope = difference**2 / 2, difference
    else:
        value, slope = difference.abs(), torch.where(torch.isnan(difference), difference, difference.sign())
    return value, slope, value + slope


def times(factor: Column, value: Tensor) -> Tensor:
    """factor * value, where 0 times what is not finite is 0: a coefficient of 0 takes its term out."""
    factor = constant(factor, value)
    nothing = ((factor == 0) & ~torch.isfinite(value)) | ((value == 0) & ~torch.isfinite(factor))
    return torch.where(nothing, 0.0, factor.masked_fill(nothing, 0.0) * value.masked_fill(nothing, 0.0))
