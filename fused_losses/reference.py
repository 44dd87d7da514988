"""The losses in eager torch, with the signatures of the public functions: what everything else is compared against.

Independent of every kernel, any float dtype, float64 included. The loss has the dtype of the logits if that is float32
or float64, else float32. Keywords that choose how to compute (``inplace``, ``recompute``, ``backend``, ``validate``)
change nothing here; they are accepted so that one name can stand for the other.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from . import losses, policy
from .objectives import OBJECTIVES, Objective
from .outputs import Call, Outputs
from .policy import reduced
from .terms import KL_TYPES, NO_KL, Seen, Terms, row_loss

P = ParamSpec("P")
R = TypeVar("R")


def token_stats(
    logits: Tensor,
    target_tokens: Tensor,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
) -> Seen:
    """What a token sees of its row: see terms.py. With (..., K) targets logp is (..., K), else everything is (...).

    An ignored token has logp, entropy, lse and spread 0; NaN where a target is outside [0, V).
    """
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    several = target_tokens.dim() == logits.dim()
    targets = target_tokens if several else target_tokens.unsqueeze(-1)
    ignored = targets == ignore_index
    outside = ((targets < 0) | (targets >= logits.shape[-1])) & ~ignored
    nothing = ignored.all(-1)
    # An ignored row may hold NaN, and NaN * 0 in the backward of log_softmax is NaN: it must not get that far.
    z = logits.masked_fill(nothing.unsqueeze(-1), 0.0) * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(logits.dtype).expand(logits.shape[:-1]).unsqueeze(-1)
    z = z / temperature
    log_p = torch.log_softmax(z, -1)
    logp = log_p.gather(-1, targets.masked_fill(ignored | outside, 0).long()).masked_fill(ignored, 0.0)
    logp = logp * torch.where(outside, torch.nan, 1.0).to(logp.dtype)
    entropy = -(torch.exp(log_p) * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)
    lse = torch.logsumexp(z, -1)
    entropy, lse, spread = (t.masked_fill(nothing, 0.0) for t in (entropy, lse, -log_p.mean(-1)))
    return Seen(logp if several else logp.squeeze(-1), lse, entropy, spread, 1.0)


def _transforms(given: dict[str, Any]) -> dict[str, Any]:
    return {name: given[name] for name in ("temperature", "softcap", "logit_scale", "ignore_index")}


def _losses(objective: Objective, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(weight * loss per token, the items' weights)"""
    logits, target_tokens, ignore_index = given["logits"], given["target_tokens"], given["ignore_index"]
    dtype = torch.promote_types(logits.dtype, torch.float32)

    def constant(value: Tensor | float | None, default: float = 0.0) -> Tensor:
        value = default if value is None else value
        return torch.as_tensor(value, dtype=dtype, device=logits.device).detach().expand(target_tokens.shape)

    weight = constant(given["weights"], 1.0)
    active = (target_tokens != ignore_index) & (weight != 0)
    # Whatever an inactive token holds is replaced before the formula sees it: masked after it, 0 * NaN would be left in
    # the gradient.
    transforms = _transforms(given)
    if isinstance(transforms["temperature"], Tensor) and target_tokens.dim() < logits.dim():
        transforms["temperature"] = constant(transforms["temperature"]).masked_fill(~active, 1.0)
    weight = weight.masked_fill(~active, 0.0)
    seen = token_stats(logits, target_tokens.masked_fill(~active, ignore_index), **transforms)
    if target_tokens.dim() == logits.dim():
        shares, some = weight, active.any(-1)
        logp = (shares * seen.logp).where(active, 0.0).sum(-1)
        seen = seen._replace(logp=logp, total=shares.sum(-1))
        terms = Terms(label_smoothing=given["label_smoothing"], z_loss=given["z_loss"])
        return row_loss(objective.formula, seen, (), terms).value.where(some, 0.0), weight

    def column(value: Tensor | float | None, default: float = 0.0) -> Tensor:
        return constant(value, default).masked_fill(~active, 0.0)

    def limit(name: str) -> Tensor:
        return constant(given[name], math.inf).masked_fill(~active, math.inf)

    inputs = [column(given[name]) for name in objective.inputs + objective.bounds]
    inputs += [limit(name) for name in objective.limits]
    if objective.name == "cross_entropy":
        terms = Terms(label_smoothing=given["label_smoothing"], z_loss=given["z_loss"])
    else:
        penalised, entropy = losses.asked_terms(given)
        terms = Terms(
            column(given["importance_weights"], 1.0),
            column(given["ref_logprobs"]),
            column(given["kl_coef"]),
            column(given["entropy_coef"]),
            limit("log_ratio_clamp"),
            kl_type=KL_TYPES.index(given["kl_type"]) if penalised else NO_KL,
            kl_weighted_by_ratio=given["kl_weighted_by_ratio"],
            entropy=entropy,
        )
    value = row_loss(objective.formula, seen, inputs, terms).value
    return torch.where(active, weight * value, 0.0), weight


def _reduced(objective: Objective, given: dict[str, Any]) -> Any:
    """What the public function returns."""
    per_token, weights = _losses(objective, given)
    loss = reduced(per_token, weights, given["reduction"], given["denominator"])
    if not given["return_outputs"]:
        return loss
    with torch.no_grad():
        seen = token_stats(given["logits"], given["target_tokens"], **_transforms(given))
    entropy = seen.entropy if "entropy_coef" in given and losses.asked_terms(given)[1] else None
    return loss, Outputs(seen.logp, entropy, Call.of(given))


def _arguments(public: Callable[P, R], args: Any, kwargs: Any) -> dict[str, Any]:
    bound = inspect.signature(public).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def _eager(public: Callable[P, R]) -> Callable[P, R]:
    """The eager counterpart of a public loss: its signature, the formula of its objective."""

    @wraps(public)
    def reference(*args: Any, **kwargs: Any) -> Any:
        return _reduced(OBJECTIVES[public.__name__], _arguments(public, args, kwargs))

    return reference


cross_entropy = _eager(losses.cross_entropy)
importance_sampling = _eager(losses.importance_sampling)
ppo = _eager(losses.ppo)
cispo = _eager(losses.cispo)
dro = _eager(losses.dro)
_token_sapo = _eager(policy.sapo)


def _composed(public: Callable[P, R], objective: policy.TorchObjective) -> Callable[P, R]:
    """The same for a loss that is composed of torch operations on the logprobs: with the logprobs below."""

    @wraps(public)
    def reference(*args: Any, **kwargs: Any) -> Any:
        return policy.composed(_arguments(public, args, kwargs), objective, logprobs)

    return reference


gspo = _composed(policy.gspo, policy.gspo_objective)
gmpo = _composed(policy.gmpo, policy.gmpo_objective)
_sequence_sapo = _composed(policy.sapo, policy.sequence_sapo_objective)


@wraps(policy.sapo)
def sapo(*args: Any, ratio_level: str = "token", **kwargs: Any) -> Any:
    return (_token_sapo if ratio_level == "token" else _sequence_sapo)(*args, **kwargs)


@wraps(policy.policy_loss)
def policy_loss(*args: Any, **kwargs: Any) -> Any:
    objective, given = policy.named(_arguments(policy.policy_loss, args, kwargs))
    return policy.composed(given, policy.of_user, logprobs) if objective is None else _reduced(objective, given)


@wraps(losses.logprobs)
def logprobs(
    logits: Tensor,
    target_tokens: Tensor,
    *,
    return_entropy: bool = False,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    seen = token_stats(logits, target_tokens, temperature, softcap, logit_scale, ignore_index)
    return (seen.logp, seen.entropy) if return_entropy else seen.logp
