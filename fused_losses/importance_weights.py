"""Weights that correct for a sampler whose probabilities are not the trainer's.

Inference engines round otherwise than the trainer, so tokens come from a policy slightly off the one they are scored
under. The correction is the ratio of the two, bounded, as a constant on each token's objective:
``ppo(..., importance_weights=truncated_importance_weights(old_logprobs, sampler_logprobs, cap=2.0))``.

Sequences are given as in :mod:`fused_losses.sequences`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .objectives import binary_kl
from .sequences import active_tokens, check_cu_seqlens, segment_expand, segment_mean, segment_sum

LEVELS = ("token", "sequence", "sequence_mean")
GATES = ("ratio", "binary_kl", "tv")
GATE_LEVELS = ("token", "sequence_mean")


@torch.no_grad()
def truncated_importance_weights(
    logprobs: Tensor,
    sampler_logprobs: Tensor,
    *,
    cap: float,
    level: str = "token",
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Truncated importance sampling (TIS): ``min(ratio, cap)``, with ``ratio = exp(logprobs - sampler_logprobs)``.

    Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", 2025,
    https://fengyao.notion.site/off-policy-rl. It is verl's ``rollout_is_threshold`` (a number, 2.0 there), TRL's
    ``token_truncate`` and ``sequence_truncate`` (``vllm_importance_sampling_clip_max``, 3.0) and SkyRL's
    ``tis_ratio_type``. verl and SkyRL also keep the log ratio within 20: with a cap below e^20 that changes no weight
    by more than e^-20.

    Args:
        logprobs: of the sampled tokens under the trainer's policy, normally the ``old_logprobs`` of the loss. Float;
            (..., T), or any shape with ``cu_seqlens`` or for level "token".
        sampler_logprobs: of the same tokens as the sampler gave them; float, broadcastable to ``logprobs``.
        cap: number > 0, the largest weight. inf truncates nothing.
        level: "token"; "sequence", the product of the ratios of a sequence, ``exp(sum of logprobs -
            sampler_logprobs)`` over its active tokens, at each of them; or "sequence_mean", their geometric mean.
        mask: broadcastable to ``logprobs``, 0 where a token is not part of the sequence. Default None: all are.
        cu_seqlens: (B + 1,) int32 or int64, where sequences lie one after the other. Default None: the last dimension.

    Returns:
        float32 in the shape of ``logprobs``, a constant. Exactly 0 where ``mask`` is, whatever the logprobs are; NaN
        where one of an active token (or of its sequence) is NaN, or both are -inf.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the message names it.
    """
    cap = checks.number("cap", cap)
    if not cap > 0:
        raise ValueError(f"cap must be greater than 0, got {cap}")
    ratio, active = _ratio(logprobs, sampler_logprobs, level, mask, cu_seqlens)
    return torch.where(active, ratio.clamp(max=cap), 0.0)


@torch.no_grad()
def masked_importance_weights(
    logprobs: Tensor,
    sampler_logprobs: Tensor,
    *,
    low: float,
    high: float,
    level: str = "token",
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Masked importance sampling (IcePop, MIS): the ratio where ``low <= ratio <= high``, else 0.

    ``ratio = exp(logprobs - sampler_logprobs)``. Ling team, "Every Step Evolves: Scaling Reinforcement Learning for
    Trillion-Scale Thinking Model", 2025, https://arxiv.org/abs/2510.18855, with low 0.5 and high 5. It is verl's
    ``rollout_is_threshold`` "low_high" and TRL's ``token_mask`` and ``sequence_mask`` (``clip_min`` None, low 0 here,
    and ``clip_max`` 3.0).

    Args:
        logprobs: of the sampled tokens under the trainer's policy, normally the ``old_logprobs`` of the loss. Float;
            (..., T), or any shape with ``cu_seqlens`` or for level "token".
        sampler_logprobs: of the same tokens as the sampler gave them; float, broadcastable to ``logprobs``.
        low, high: numbers, 0 <= low <= high; a ratio equal to one of them is kept. 0 and inf bound nothing.
        level: "token"; "sequence", the product of the ratios of a sequence, ``exp(sum of logprobs -
            sampler_logprobs)`` over its active tokens, at each of them; or "sequence_mean", their geometric mean.
        mask: broadcastable to ``logprobs``, 0 where a token is not part of the sequence. Default None: all are.
        cu_seqlens: (B + 1,) int32 or int64, where sequences lie one after the other. Default None: the last dimension.

    Returns:
        float32 in the shape of ``logprobs``, a constant. Exactly 0 where ``mask`` is, whatever the logprobs are; NaN
        where one of an active token (or of its sequence) is NaN, or both are -inf.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the message names it.
    """
    low, high = _bounds(low, high)
    ratio, active = _ratio(logprobs, sampler_logprobs, level, mask, cu_seqlens)
    dropped = (ratio < low) | (ratio > high) | ~active  # false for NaN, which must not pass for a token left out
    return ratio.masked_fill(dropped, 0.0)


@torch.no_grad()
def gated_importance_weights(
    logprobs: Tensor,
    sampler_logprobs: Tensor,
    *,
    gate: str,
    high: float,
    low: float = 0.0,
    level: str = "token",
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """A trust region: each token's own ratio where what ``gate`` measures is in [low, high], else 0.

    With x = logprobs, q = sampler_logprobs, ``ratio = exp(x - q)`` and "this token or any other" as the distribution:

    * "ratio": the ratio. On tokens this is :func:`masked_importance_weights`, that is IcePop
    * "binary_kl": ``e^q (q - x) + (1 - e^q) log((1 - e^q) / (1 - e^x))``, KL(sampler, trainer), with 1e-8 added above
      and below in the fraction
    * "tv": ``|e^x - e^q|``, the total variation

    It is OpenRLHF's ``is_correction_gating`` with ``is_correction_mode`` "mask", whose binary KL first brings
    probabilities into [1e-6, 1 - 1e-6]. Divergences of tokens are those of Qi et al., "Rethinking the Trust Region in
    LLM Reinforcement Learning", 2026, https://arxiv.org/abs/2602.04879, whose own losses are :func:`dppo_tv` and
    :func:`dppo_kl`.

    Args:
        logprobs: of the sampled tokens under the trainer's policy, normally the ``old_logprobs`` of the loss. Float;
            (..., T), or any shape with ``cu_seqlens`` or for level "token".
        sampler_logprobs: of the same tokens as the sampler gave them; float, broadcastable to ``logprobs``.
        gate: "ratio", "binary_kl" or "tv".
        high, low: numbers, 0 <= low <= high; what is equal to one of them is kept. Default of low: 0.
        level: "token", each by itself; or "sequence_mean", by the mean over the sequence's active tokens, which for the
            ratio is the geometric one: a sequence is kept or dropped as a whole. Default "token".
        mask: broadcastable to ``logprobs``, 0 where a token is not part of the sequence. Default None: all are.
        cu_seqlens: (B + 1,) int32 or int64, where sequences lie one after the other. Default None: the last dimension.

    Returns:
        float32 in the shape of ``logprobs``, a constant. Exactly 0 where ``mask`` is, whatever the logprobs are; NaN
        where one of an active token (or of its sequence) is NaN, or both are -inf.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the message names it.
    """
    checks.one_of("gate", gate, GATES)
    low, high = _bounds(low, high)
    x, q, active = _tokens(logprobs, sampler_logprobs, level, GATE_LEVELS, mask, cu_seqlens)
    log_ratio = x - q
    measured = log_ratio if gate == "ratio" else binary_kl(q, x) if gate == "binary_kl" else (x.exp() - q.exp()).abs()
    if level == "sequence_mean":
        measured = segment_expand(segment_mean(measured, active, cu_seqlens), logprobs, cu_seqlens)
    if gate == "ratio":
        measured = measured.exp()
    dropped = (measured < low) | (measured > high) | ~active  # false for NaN
    weights = log_ratio.exp().masked_fill(measured.isnan(), torch.nan)
    return weights.masked_fill(dropped, 0.0).float()


@torch.no_grad()
def off_policy_sequence_mask(
    logprobs: Tensor,
    sampler_logprobs: Tensor,
    advantages: Tensor | float,
    *,
    threshold: float,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Off-policy sequence masking: 0 where A < 0 and the sequence's mean of ``sampler_logprobs - logprobs`` is above
    ``threshold``, else 1.

    What the policy has moved away from is not pushed further; sequences of a positive advantage stay. DeepSeek-AI,
    "DeepSeek-V3.2: Pushing the Frontier of Open Large Language Models", 2025, https://arxiv.org/abs/2512.02556. It is
    TRL's ``off_policy_mask_threshold``; as ``importance_weights`` of a loss it leaves KL and entropy as they are, as
    there.

    Args:
        logprobs: of the sampled tokens under the policy being trained, as it is now. Float; (..., T), or any shape with
            ``cu_seqlens``.
        sampler_logprobs: of the same tokens under the policy that sampled them; float, broadcastable to ``logprobs``.
        advantages: number, or float and broadcastable to ``logprobs``.
        threshold: number, the largest mean that is kept, an estimate of KL(sampler, policy) per token.
        mask: broadcastable to ``logprobs``, 0 where a token is not part of the sequence. Default None: all are.
        cu_seqlens: (B + 1,) int32 or int64, where sequences lie one after the other. Default None: the last dimension.

    Returns:
        float32 in the shape of ``logprobs``, a constant: 1, or 0, as where ``mask`` is, whatever the logprobs are; NaN
        where the advantage is, and where it is negative and a logprob of an active token of the sequence is NaN. TRL
        takes a NaN of the sampler for no difference: replace it by ``logprobs`` for that.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the message names it.
    """
    threshold = checks.number("threshold", threshold)
    x, q, active = _tokens(logprobs, sampler_logprobs, "sequence_mean", GATE_LEVELS, mask, cu_seqlens)
    column = checks.column("advantages", advantages, logprobs.unsqueeze(-1), "logprobs")
    column = column.view(logprobs.shape) if isinstance(column, Tensor) else torch.full_like(x, column)
    drift = segment_expand(segment_mean(q - x, active, cu_seqlens), logprobs, cu_seqlens)
    keep = torch.where(column < 0, drift <= threshold, True).float()
    unknown = column.isnan() | ((column < 0) & drift.isnan())
    return torch.where(active, keep.masked_fill(unknown, torch.nan), 0.0)


def _bounds(low: float, high: float) -> tuple[float, float]:
    low, high = checks.number("low", low), checks.number("high", high)
    if not low >= 0:
        raise ValueError(f"low must be at least 0, got {low}")
    if low > high:
        raise ValueError(f"low must not exceed high, got {low} > {high}")
    return low, high


def _ratio(
    logprobs: Tensor, sampler_logprobs: Tensor, level: str, mask: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The float32 ratio per token, and which tokens are active."""
    x, q, active = _tokens(logprobs, sampler_logprobs, level, LEVELS, mask, cu_seqlens)
    log_ratio = x - q
    if level != "token":
        if level == "sequence":
            per_sequence = segment_sum(log_ratio, cu_seqlens)
        else:
            per_sequence = segment_mean(log_ratio, active, cu_seqlens)
        log_ratio = segment_expand(per_sequence, logprobs, cu_seqlens)
    return log_ratio.exp().float(), active


def _tokens(
    logprobs: Tensor,
    sampler_logprobs: Tensor,
    level: str,
    levels: tuple[str, ...],
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Both logprobs in float64 and one shape, 0 where a token is not active, and which are."""
    if level not in levels:
        raise ValueError(f"level must be one of {levels}, got {level!r}")
    for name, value in (("logprobs", logprobs), ("sampler_logprobs", sampler_logprobs)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        checks.strided(name, value)
        if not value.is_floating_point():
            raise TypeError(f"{name} must be a float tensor, got {value.dtype}")
    if sampler_logprobs.device != logprobs.device:
        raise ValueError(
            f"sampler_logprobs must be on the device of logprobs, {logprobs.device}, got {sampler_logprobs.device}"
        )
    try:
        sampler_logprobs = sampler_logprobs.expand(logprobs.shape)
    except RuntimeError:
        raise ValueError(
            f"sampler_logprobs must broadcast to the shape of logprobs, {tuple(logprobs.shape)}, "
            f"got {tuple(sampler_logprobs.shape)}"
        ) from None
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, logprobs, "logprobs")
    active = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else active_tokens(mask, logprobs)
    if level != "token" and cu_seqlens is None and logprobs.dim() == 0:
        raise ValueError(f"logprobs must have shape (..., T) for level {level!r}, got a 0-d tensor")
    x, q = (torch.where(active, values.double(), 0.0) for values in (logprobs, sampler_logprobs))
    return x, q, active
