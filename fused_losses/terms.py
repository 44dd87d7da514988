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

share_j being that of the targets equal to j. ``csrc/row.h`` and ``triton_kernels/terms.py`` hold the same functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .objectives import Loss, constant, log_ratio

Column = Tensor | float

KL_TYPES = ("k1", "k2", "k3", "abs")
NO_KL = -1


class Terms(NamedTuple):
    """What a call uses beyond its plain loss. A plain loss has None instead, and kernels of its own."""

    importance_weights: Column = 1.0  # of the objective only
    ref_logprobs: Column = 0.0
    kl_coef: Column = 0.0
    entropy_coef: Column = 0.0
    log_ratio_clamp: Column = math.inf  # of the ratio that weights the KL
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0  # of the raw logits; 0: none
    shares: Tensor | None = None  # (N, K) float32, 0 where a target does not count; target_tokens is (N, K), too
    kl_type: int = NO_KL  # index in KL_TYPES
    kl_weighted_by_ratio: bool = False
    entropy: bool = False  # H is asked for: as an output, or because it has a coefficient

    @property
    def targets(self) -> int:
        """K"""
        return 1 if self.shares is None else self.shares.shape[1]


def stats_shape(n: int, terms: Terms | None) -> tuple[int, int]:
    """What stage 1 gives: 3 numbers per token, with terms K + 4."""
    return 3 if terms is None else terms.targets + 4, n


def logprobs_shape(n: int, terms: Terms | None) -> tuple[int, ...]:
    """A logprob per token; with terms one per target, then the entropy."""
    return (n,) if terms is None else (terms.targets + 1, n)


def coefficients_shape(n: int, terms: Terms | None) -> tuple[int, ...]:
    """The derivative by logp per token; with terms those by H, lse and zbar, too."""
    return (n,) if terms is None else (4, n)


def pack(terms: Terms | None) -> tuple[tuple[Column | None, ...], list[int]]:
    """Terms as columns and flags, which cross the dispatcher; nothing at all for None."""
    if terms is None:
        return (), []
    *columns, kl_type, weighted, entropy = terms
    return tuple(columns), [kl_type, int(weighted), int(entropy)]


def unpack(columns: Sequence[Column], flags: Sequence[int]) -> tuple[list[Column], Terms | None]:
    """(the columns before those of the terms, the terms)"""
    if not flags:
        return list(columns), None
    first = len(columns) - len(Terms._fields) + len(flags)
    kl_type, weighted, entropy = flags
    *numbers, shares = columns[first:]
    given: Any = (*numbers, shares if isinstance(shares, Tensor) else None, kl_type, bool(weighted), bool(entropy))
    return list(columns[:first]), Terms(*given)


class Seen(NamedTuple):
    """What a token sees of its row. Each is per token; ``spread`` is lse - zbar, ``total`` is U."""

    logp: Tensor
    lse: Tensor
    entropy: Tensor
    spread: Tensor
    total: Tensor | float


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
    if terms.kl_type != NO_KL:
        penalty, slope, both = kl(logp, terms.ref_logprobs, KL_TYPES[terms.kl_type])
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
        value, g = times(1 - e, value) + e * seen.total * seen.spread, (1 - e) * g
        zeta, s = zeta + e * seen.total, s - e * seen.total
    if terms.z_loss != 0:
        value = value + terms.z_loss * seen.total * seen.lse**2
        zeta = zeta + 2 * terms.z_loss * seen.total * seen.lse
    return RowLoss(value, g.detach(), h, zeta.detach(), s)


def kl(logp: Tensor, ref_logprobs: Tensor | float, kl_type: str) -> tuple[Tensor, Tensor, Tensor]:
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
