"""The losses as data: one eager formula per objective.

A loss sees the vocabulary only through ``logp``, the logprob of the target token under the policy being trained. Its
formula maps logp and the token's inputs to ``(loss, g)``, the per-token loss and its derivative by logp; the table
below adds what the inputs are. :mod:`fused_losses.reference` differentiates ``loss`` and never looks at ``g``, which
the eager backend uses; ``csrc/objectives.h`` and ``triton_kernels/objectives.py`` hold the same functions, and the
tests compare every ``g`` with autograd of ``loss``.

Formulas work in any float dtype. They mask inputs before ``exp``, not results after it: in the branch that
``torch.where`` did not take, autograd would still form 0 * inf.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Loss = tuple[Tensor, Tensor]  # (loss, g = dloss/dlogp)


def logprobs(logp: Tensor) -> Loss:
    return _checked(logp, torch.ones_like(logp), logp)


def cross_entropy(logp: Tensor) -> Loss:
    return _checked(-logp, -torch.ones_like(logp), logp)


def dft(logp: Tensor) -> Loss:
    g = -torch.exp(logp.detach())
    return _checked(linear(g, logp), g, logp)


def reinforce(logp: Tensor, advantages: Tensor) -> Loss:
    g = torch.where(advantages == 0, 0.0, -advantages).expand_as(logp)
    return _checked(linear(g, logp), g, logp)


def importance_sampling(logp: Tensor, old_logprobs: Tensor, advantages: Tensor, log_ratio_clamp: Tensor) -> Loss:
    idle = _no_advantage(old_logprobs, advantages)
    clamped, flows = log_ratio(logp, old_logprobs, log_ratio_clamp)
    ratio = torch.exp(clamped.masked_fill(idle, 0.0))
    loss = -torch.where(idle, 0.0, ratio * advantages)
    return _checked(loss, loss.where(flows, 0.0), logp, log_ratio_clamp >= 0)


def ppo(
    logp: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip_low_threshold: Tensor,
    clip_high_threshold: Tensor,
    log_ratio_clamp: Tensor,
    dual_clip: Tensor,
    delta: Tensor,
) -> Loss:
    """max(-min(r, delta) A, -clamp(r, low, high) A), at most -dual_clip A for A < 0: in effect one clamp per sign."""
    low, high = clip_low_threshold, clip_high_threshold
    idle = _no_advantage(old_logprobs, advantages)
    positive, negative = advantages > 0, advantages < 0
    ceiling = torch.where(positive, torch.minimum(high, delta), torch.minimum(torch.maximum(high, delta), dual_clip))
    clamped, flows = log_ratio(logp, old_logprobs, log_ratio_clamp)
    ratio = torch.exp(clamped.detach())
    below = negative & (ratio < low)
    clipped = below | ((positive | negative) & (ratio > ceiling))
    bound = torch.where(below, torch.minimum(low, ceiling), ceiling)
    ratio = torch.exp(clamped.masked_fill(clipped | idle, 0.0))
    loss = -torch.where(idle, 0.0, torch.where(clipped, bound, ratio) * advantages)
    valid = _valid_clip(low, high) & (log_ratio_clamp >= 0) & (dual_clip >= 0) & (delta >= 0)
    return _checked(loss, loss.where(flows & ~clipped, 0.0), logp, valid)


def cispo(
    logp: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip_low_threshold: Tensor,
    clip_high_threshold: Tensor,
    log_ratio_clamp: Tensor,
) -> Loss:
    low, high = clip_low_threshold, clip_high_threshold
    idle = _no_advantage(old_logprobs, advantages)
    clamped, _ = log_ratio(logp.detach(), old_logprobs, log_ratio_clamp)
    ratio = torch.exp(clamped)
    weight = torch.where(ratio < low, low, torch.where(ratio > high, high, ratio))
    g = -torch.where(idle, 0.0, weight * advantages)
    return _checked(linear(g, logp), g, logp, _valid_clip(low, high) & (log_ratio_clamp >= 0))


def dro(logp: Tensor, old_logprobs: Tensor, advantages: Tensor, beta: Tensor, log_ratio_clamp: Tensor) -> Loss:
    idle = advantages == 0
    clamped, flows = log_ratio(logp, old_logprobs, log_ratio_clamp)
    reward = torch.where(idle, 0.0, logp.masked_fill(idle, 0.0) * advantages)
    g = (beta * clamped).where(flows, 0.0) - advantages
    return _checked(0.5 * beta * clamped**2 - reward, g, logp, (beta >= 0) & (log_ratio_clamp >= 0))


def sapo(
    logp: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    tau_positive: Tensor,
    tau_negative: Tensor,
    log_ratio_clamp: Tensor,
) -> Loss:
    """-(4 / tau) sigmoid(tau (r - 1)) A; d/dlogp = -4 s (1 - s) r A, which goes to 0 where r overflows."""
    idle = _no_advantage(old_logprobs, advantages)
    tau = torch.where(advantages > 0, tau_positive, tau_negative)
    clamped, flows = log_ratio(logp, old_logprobs, log_ratio_clamp)
    saturated = idle | (tau * (torch.exp(clamped.detach()) - 1) > _SAPO_SATURATED)
    ratio = torch.exp(clamped.masked_fill(saturated, 0.0))
    u = tau * (ratio - 1)
    # Of s and 1 - s, whose derivative autograd can tell where the other rounds to 1. Not torch.sigmoid, which rounds
    # the last few tokens of a batch in another way; in float64, where the square in its derivative does not underflow.
    size = torch.where(u > 0, u, -u).double().clamp(max=700.0)
    smaller = (1 / (1 + torch.exp(size))).to(u.dtype)
    gate = torch.where(u > 0, 1 - smaller, smaller).masked_fill(saturated, 1.0)
    loss = -torch.where(idle, 0.0, 4 / tau * gate * advantages)
    slope = 4 * smaller * (1 - smaller) * ratio
    g = -torch.where(saturated, 0.0, slope * advantages).where(flows & ~idle, 0.0)
    return _checked(loss, g, logp, (tau_positive > 0) & (tau_negative > 0) & (log_ratio_clamp >= 0))


def dppo_tv(
    logp: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    divergence_low: Tensor,
    divergence_high: Tensor,
    log_ratio_clamp: Tensor,
    ratio_cap: Tensor,
) -> Loss:
    divergence = (torch.exp(logp.detach()) - torch.exp(old_logprobs)).abs()
    return _in_trust_region(
        divergence, logp, old_logprobs, advantages, divergence_low, divergence_high, log_ratio_clamp, ratio_cap
    )


def dppo_kl(
    logp: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    divergence_low: Tensor,
    divergence_high: Tensor,
    log_ratio_clamp: Tensor,
    ratio_cap: Tensor,
) -> Loss:
    divergence = binary_kl(old_logprobs, logp.detach())
    return _in_trust_region(
        divergence, logp, old_logprobs, advantages, divergence_low, divergence_high, log_ratio_clamp, ratio_cap
    )


def _in_trust_region(
    divergence: Tensor,
    logp: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    low: Tensor,
    high: Tensor,
    log_ratio_clamp: Tensor,
    ratio_cap: Tensor,
) -> Loss:
    """-sg(min(r, cap)) logp A; 0 where the advantage would drive the token on, out of the region."""
    x = logp.detach()
    up = (advantages > 0) & (x > old_logprobs) & (divergence > high)
    down = (advantages < 0) & (x < old_logprobs) & (divergence > low)
    idle = _no_advantage(old_logprobs, advantages) | up | down
    ratio = torch.exp(log_ratio(x, old_logprobs, log_ratio_clamp)[0])
    g = -torch.where(idle, 0.0, torch.where(ratio > ratio_cap, ratio_cap, ratio) * advantages)
    valid = (low >= 0) & (high >= 0) & (log_ratio_clamp >= 0) & (ratio_cap >= 0)
    return _checked(linear(g, logp), g, logp, valid)


def binary_kl(logp: Tensor, other_logp: Tensor) -> Tensor:
    """KL of "this token or any other" under two policies, as frameworks form it: finite where other_logp is 0."""
    p = torch.exp(logp)
    others, of_other = (torch.expm1(x).neg().clamp(min=0.0) for x in (logp, other_logp))  # 1 - p, with all its digits
    drift = torch.where(p == 0, 0.0, p * (logp - other_logp))
    return drift + others * torch.log((others + _KL_FLOOR) / (of_other + _KL_FLOOR))


_KL_FLOOR = 1e-8
_SAPO_SATURATED = 104.0  # from there on 1 - sigmoid(u) is 0 in float32, and times a ratio that overflows NaN


def linear(g: Tensor, logp: Tensor) -> Tensor:
    """g * logp, g a constant; 0 where that is: a ratio or a probability of 0 comes with logp -inf."""
    nothing = g == 0
    return torch.where(nothing, 0.0, g * logp.masked_fill(nothing, 0.0))


def constant(column: Tensor | float, like: Tensor) -> Tensor:
    """A number as a 0-d tensor of the dtype and device of ``like``; a tensor as it is.

    full, not as_tensor: a kernel fills it, where copying it from the host would wait for the device.
    """
    return column if isinstance(column, Tensor) else torch.full((), column, dtype=like.dtype, device=like.device)


def log_ratio(logp: Tensor, old_logprobs: Tensor, clamp: Tensor) -> tuple[Tensor, Tensor]:
    """(logp - old_logprobs clamped to [-clamp, clamp], whether a gradient flows through it). NaN stays NaN."""
    raw = logp - old_logprobs
    above, below = raw > clamp, raw < -clamp
    return torch.where(above, clamp, torch.where(below, -clamp, raw)), ~(above | below)


def _no_advantage(old_logprobs: Tensor, advantages: Tensor) -> Tensor:
    """Advantage 0 makes loss and gradient 0 whatever the ratio is, but must not hide a NaN."""
    return (advantages == 0) & ~torch.isnan(old_logprobs)


def _valid_clip(low: Tensor, high: Tensor) -> Tensor:
    return (low >= 0) & (low <= high)  # false for NaN, too


def _checked(loss: Tensor, g: Tensor, logp: Tensor, valid: Tensor | None = None) -> Loss:
    """NaN, in value and by autograd, for a NaN row whatever its loss, and where a per-token bound makes no sense."""
    ok = ~torch.isnan(logp) if valid is None else ~torch.isnan(logp) & valid
    # to: of two numbers, where() makes the default dtype
    poison = torch.where(ok, 0.0, logp) * torch.where(ok, 1.0, torch.nan).to(logp.dtype)
    return loss + poison, g.detach().masked_fill(~ok, torch.nan)


@dataclass(frozen=True)
class Objective:
    """The loss of a token with its derivative, as :func:`policy_loss` takes it: ``docs/custom_objectives.md``.

    ``name`` is for messages. ``formula(logp, *columns) -> (loss, g)``: torch operations on tensors of one float32 value
    per token; g is dloss/dlogp, without a graph. The columns are ``inputs``, ``bounds`` and ``limits`` by their names,
    numbers or tensors that broadcast to the tokens, in this order; limits may be left out, and are inf then.
    ``triton``: the same formula as a ``triton.jit`` function, for one pass on that backend.
    """

    name: str
    formula: Callable[..., Loss]
    inputs: tuple[str, ...] = ()  # per-token tensors or numbers
    bounds: tuple[str, ...] = ()  # further inputs, each >= 0; a clip's low bound is at most its high bound
    limits: tuple[str, ...] = ()  # optional upper bounds: infinite where left out
    is_loss: bool = True  # logprobs is an objective too, but not a loss
    triton: Any = None  # the same formula as a Triton function, for an objective that is not ours
    columns: tuple[str, ...] = field(init=False)  # inputs, bounds and limits

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", self.inputs + self.bounds + self.limits)


_POLICY = ("old_logprobs", "advantages")
_CLIP = ("clip_low_threshold", "clip_high_threshold")
_DIVERGENCE = ("divergence_low", "divergence_high")
_CLAMP = ("log_ratio_clamp",)

OBJECTIVES: dict[str, Objective] = {
    o.name: o
    for o in (
        Objective("logprobs", logprobs, is_loss=False),
        Objective("cross_entropy", cross_entropy),
        Objective("importance_sampling", importance_sampling, _POLICY, limits=_CLAMP),
        Objective("ppo", ppo, _POLICY, _CLIP, limits=(*_CLAMP, "dual_clip", "delta")),
        Objective("cispo", cispo, _POLICY, _CLIP, limits=_CLAMP),
        Objective("dro", dro, _POLICY, ("beta",), limits=_CLAMP),
        Objective("sapo", sapo, _POLICY, ("tau_positive", "tau_negative"), limits=_CLAMP),
        Objective("dft", dft),
        Objective("reinforce", reinforce, ("advantages",)),
        Objective("dppo_tv", dppo_tv, _POLICY, _DIVERGENCE, limits=(*_CLAMP, "ratio_cap")),
        Objective("dppo_kl", dppo_kl, _POLICY, _DIVERGENCE, limits=(*_CLAMP, "ratio_cap")),
    )
}
