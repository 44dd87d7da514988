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
from .sequences import active_tokens, check_cu_seqlens, segment_expand, segment_mean, segment_sum

LEVELS = ("token", "sequence", "sequence_mean")


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
        where one of an active token (or of its sequence) is NaN.

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
        where one of an active token (or of its sequence) is NaN.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the message names it.
    """
    low, high = checks.number("low", low), checks.number("high", high)
    if not low >= 0:
        raise ValueError(f"low must be at least 0, got {low}")
    if low > high:
        raise ValueError(f"low must not exceed high, got {low} > {high}")
    ratio, active = _ratio(logprobs, sampler_logprobs, level, mask, cu_seqlens)
    dropped = (ratio < low) | (ratio > high) | ~active  # false for NaN, which must not pass for a token left out
    return ratio.masked_fill(dropped, 0.0)


def _ratio(
    logprobs: Tensor, sampler_logprobs: Tensor, level: str, mask: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The float32 ratio per token, and which tokens are active."""
    if level not in LEVELS:
        raise ValueError(f"level must be one of {LEVELS}, got {level!r}")
    for name, value in (("logprobs", logprobs), ("sampler_logprobs", sampler_logprobs)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
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
    log_ratio = torch.where(active, logprobs.double() - sampler_logprobs.double(), 0.0)
    if level != "token":
        if cu_seqlens is None and logprobs.dim() == 0:
            raise ValueError(f"logprobs must have shape (..., T) for level {level!r}, got a 0-d tensor")
        if level == "sequence":
            per_sequence = segment_sum(log_ratio, cu_seqlens)
        else:
            per_sequence = segment_mean(log_ratio, active, cu_seqlens)
        log_ratio = segment_expand(per_sequence, logprobs, cu_seqlens)
    return log_ratio.exp().float(), active
