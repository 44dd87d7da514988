"""The losses with everything they may hold, written out from their definitions: naive, for finite numbers in float64.

Nothing here is taken from the package: the reference is held against these, and everything else against the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor


def transformed(
    logits: Tensor, logit_scale: float = 1.0, softcap: float | None = None, temperature: Tensor | float = 1.0
) -> Tensor:
    z = logits * logit_scale
    if softcap is not None:
        z = torch.tanh(z / softcap) * softcap
    if isinstance(temperature, Tensor):
        temperature = temperature.expand(z.shape[:-1])[..., None]
    return z / temperature


def objective(
    name: str,
    x: Tensor,
    q: Tensor,
    a: Tensor,
    *,
    clip_low_threshold: Tensor | float = 0.8,
    clip_high_threshold: Tensor | float = 1.2,
    beta: Tensor | float = 0.1,
    tau_positive: Tensor | float = 1.0,
    tau_negative: Tensor | float = 1.05,
    dual_clip: Tensor | float | None = None,
    delta: Tensor | float | None = None,
    divergence_low: Tensor | float = 0.2,
    divergence_high: Tensor | float = 0.2,
    ratio_cap: Tensor | float | None = None,
    log_ratio_clamp: Tensor | float | None = None,
) -> Tensor:
    if name == "reinforce":
        return -a * x
    low, high = clip_low_threshold, clip_high_threshold
    difference = log_ratio(x, q, log_ratio_clamp)
    r = torch.exp(difference)
    if name == "importance_sampling":
        return -r * a
    if name == "ppo":
        free = r if delta is None else torch.minimum(r, bound(delta, r))
        loss = torch.maximum(-free * a, -torch.clamp(r, bound(low, r), bound(high, r)) * a)
        return loss if dual_clip is None else torch.where(a < 0, torch.minimum(loss, -dual_clip * a), loss)
    if name == "cispo":
        return -torch.clamp(r, bound(low, r), bound(high, r)).detach() * x * a
    if name == "dro":
        return -(x * a - beta / 2 * difference**2)
    if name in ("dppo_tv", "dppo_kl"):
        p, before = torch.exp(x), torch.exp(bound(q, x))
        far = (p - before).abs()
        if name == "dppo_kl":
            # a logprob above 0 is none: what is drawn may be, and leaves the others nothing
            others, others_before = ((1 - share).clamp(min=0) for share in (p, before))
            far = before * (q - x) + others_before * torch.log((others_before + 1e-8) / (others + 1e-8))
        beyond = ((a > 0) & (p > before) & (far > divergence_high)) | ((a < 0) & (p < before) & (far > divergence_low))
        weight = r if ratio_cap is None else torch.minimum(r, bound(ratio_cap, r))
        return -torch.where(beyond, 0.0, weight).detach() * x * a
    assert name == "sapo"
    tau = torch.where(a > 0, bound(tau_positive, r), bound(tau_negative, r))
    return -torch.sigmoid(tau * (r - 1)) * 4 / tau * a


def bound(value: Tensor | float, like: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=like.dtype, device=like.device)


def log_ratio(x: Tensor, q: Tensor, clamp: Tensor | float | None) -> Tensor:
    if clamp is None:
        return x - q
    clamp = bound(clamp, x)
    return torch.clamp(x - q, -clamp, clamp)


def kl(x: Tensor, f: Tensor, kind: str) -> Tensor:
    d = f - x
    return {"k1": -d, "k2": d * d / 2, "k3": torch.exp(d) - d - 1, "abs": d.abs()}[kind]


def policy(
    name: str,
    logits: Tensor,
    target_tokens: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: Tensor | float = 1.0,
    importance_weights: Tensor | float | None = None,
    ref_logprobs: Tensor | float | None = None,
    kl_coef: Tensor | float = 0.0,
    kl_type: str = "k3",
    kl_weighted_by_ratio: bool = False,
    entropy_coef: Tensor | float = 0.0,
    **bounds: Tensor | float | None,
) -> Tensor:
    """Per token, without weights."""
    log_p = torch.log_softmax(transformed(logits, logit_scale, softcap, temperature), -1)
    x = log_p.gather(-1, target_tokens[..., None])[..., 0]
    loss = objective(name, x, old_logprobs, advantages, **bounds)
    if importance_weights is not None:
        loss = importance_weights * loss
    if ref_logprobs is not None:
        penalty = kl(x, bound(ref_logprobs, x), kl_type)
        if kl_weighted_by_ratio:
            penalty = torch.exp(log_ratio(x, old_logprobs, bounds.get("log_ratio_clamp"))) * penalty
        loss = loss + kl_coef * penalty
    return loss + entropy_coef * (log_p.exp() * log_p).sum(-1)


def cross_entropy(
    logits: Tensor,
    target_tokens: Tensor,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: Tensor | float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Per target: (...), or (..., K) of (..., K) targets."""
    z = transformed(logits, logit_scale, softcap, temperature)
    log_p = torch.log_softmax(z, -1)
    several = target_tokens.dim() == logits.dim()
    x = log_p.gather(-1, target_tokens if several else target_tokens[..., None])
    smooth, lse = -log_p.mean(-1, keepdim=True), torch.logsumexp(z, -1, keepdim=True)
    loss = (1 - label_smoothing) * -x + label_smoothing * smooth + z_loss * lse**2
    return loss if several else loss[..., 0]
