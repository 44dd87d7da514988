"""The losses in eager torch, with the signatures of the public functions: what everything else is compared against.

Independent of every kernel, any float dtype, float64 included. The loss has the dtype of the logits if that is float32
or float64, else float32. Keywords that choose how to compute (``inplace``, ``recompute``, ``backend``, ``validate``)
change nothing here; they are accepted so that one name can stand for the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import composition, keywords
from .composition import PerToken
from .objectives import OBJECTIVES, Objective
from .origin import Origin
from .outputs import Call, Outputs, Statistics
from .problem import Column, PolicyTerms, Reduction, Sequences, Terms, Transform
from .terms import Seen, asked, row_loss


def token_stats(logits: Tensor, target_tokens: Tensor, transform: Transform, ignore_index: int) -> Seen:
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
    z = _transformed(logits.masked_fill(nothing.unsqueeze(-1), 0.0), transform)
    log_p = torch.log_softmax(z, -1)
    logp = log_p.gather(-1, targets.masked_fill(ignored | outside, 0).long()).masked_fill(ignored, 0.0)
    logp = logp * torch.where(outside, torch.nan, 1.0).to(logp.dtype)
    entropy = -(torch.exp(log_p) * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)
    lse = torch.logsumexp(z, -1)
    entropy, lse, spread = (t.masked_fill(nothing, 0.0) for t in (entropy, lse, -log_p.mean(-1)))
    return Seen(logp if several else logp.squeeze(-1), lse, entropy, spread, 1.0)


def _transformed(logits: Tensor, transform: Transform) -> Tensor:
    z = logits * transform.logit_scale
    if transform.softcap is not None:
        z = transform.softcap * torch.tanh(z / transform.softcap)
    temperature = transform.temperature
    if isinstance(temperature, Tensor):
        temperature = temperature.to(logits.dtype).expand(logits.shape[:-1]).unsqueeze(-1)
    return z / temperature


def row_statistics(logits: Tensor, target_tokens: Tensor, transform: Transform, ignore_index: int) -> Statistics:
    """All of them."""
    seen = token_stats(logits, target_tokens, transform, ignore_index)
    failed, ignored = torch.isnan(seen.logp), target_tokens == ignore_index
    with torch.no_grad():
        z = _transformed(logits.to(seen.logp.dtype), transform)
        log_sum_squares = torch.logsumexp(2 * torch.log_softmax(z, -1), -1)
        own = logits.gather(-1, target_tokens.masked_fill(ignored | failed, 0).long().unsqueeze(-1))
        before = torch.arange(logits.shape[-1], device=logits.device) < target_tokens.unsqueeze(-1)
        ahead = (logits > own) | ((logits == own) & before)
        top1 = ~ahead.any(-1) & (own.squeeze(-1) > -torch.inf) & ~failed & ~ignored
        log_sum_squares, mean = (
            t.masked_fill(failed, torch.nan).masked_fill(ignored, 0.0) for t in (log_sum_squares, z.mean(-1))
        )
    entropy = seen.entropy * torch.where(failed, torch.nan, 1.0)
    return Statistics(seen.logp, entropy, log_sum_squares, mean, top1)


class _Asked(NamedTuple):
    """The arguments of a call, those that say how to compute left out."""

    logits: Tensor
    target_tokens: Tensor
    columns: dict[str, Any]  # the objective's
    sequences: Sequences
    terms: PolicyTerms
    smoothing: Terms  # cross entropy's
    transform: Transform
    reduction: Reduction
    return_outputs: bool
    ratio_level: str
    objective: Any  # of policy_loss
    inputs: tuple[Any, ...]
    return_entropy: bool  # of logprobs
    outputs: tuple[str, ...]  # of statistics


def _asked(loss: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Asked:
    bound = keywords.signature(loss).bind(*args, **kwargs)
    bound.apply_defaults()
    said = bound.arguments

    def record(kind: Any) -> Any:
        return kind(**{name: said[name] for name in kind._fields if name in said})

    logits = said["logits"]
    return _Asked(
        logits.logits() if isinstance(logits, Origin) else logits,
        said["target_tokens"],
        {name: value for name, value in said.items() if keywords.KEYWORDS[name].group == "inputs"},
        record(Sequences),
        record(PolicyTerms),
        Terms(label_smoothing=said.get("label_smoothing", 0.0), z_loss=said.get("z_loss", 0.0)),
        record(Transform),
        record(Reduction),
        said.get("return_outputs", False),
        said.get("ratio_level", "token"),
        said.get("objective"),
        said.get("inputs", ()),
        said.get("return_entropy", False),
        said.get("outputs", ()),
    )


def _token_losses(objective: Objective, given: _Asked) -> tuple[Tensor, Tensor]:
    """(weight * loss per token, the items' weights)"""
    logits, target_tokens, reduction, transform = given.logits, given.target_tokens, given.reduction, given.transform
    dtype = torch.promote_types(logits.dtype, torch.float32)

    def constant(value: Column | None, default: float = 0.0) -> Tensor:
        value = default if value is None else value
        return torch.as_tensor(value, dtype=dtype, device=logits.device).detach().expand(target_tokens.shape)

    weight = constant(reduction.weights, 1.0)
    active = (target_tokens != reduction.ignore_index) & (weight != 0)
    # Whatever an inactive token holds is replaced before the formula sees it: masked after it, 0 * NaN would be left in
    # the gradient.
    if isinstance(transform.temperature, Tensor) and target_tokens.dim() < logits.dim():
        transform = transform._replace(temperature=constant(transform.temperature).masked_fill(~active, 1.0))
    weight = weight.masked_fill(~active, 0.0)
    shown = target_tokens.masked_fill(~active, reduction.ignore_index)
    seen = token_stats(logits, shown, transform, reduction.ignore_index)
    if target_tokens.dim() == logits.dim():
        some = active.any(-1)
        logp = (weight * seen.logp).where(active, 0.0).sum(-1)
        seen = seen._replace(logp=logp, whole=weight.sum(-1))
        return row_loss(objective.formula, seen, (), given.smoothing).value.where(some, 0.0), weight

    def column(value: Column | None, default: float = 0.0) -> Tensor:
        return constant(value, default).masked_fill(~active, 0.0)

    def limit(value: Column | None) -> Tensor:
        return constant(value, math.inf).masked_fill(~active, math.inf)

    columns = {"log_ratio_clamp": given.terms.log_ratio_clamp, **given.columns}
    inputs = [column(columns[name]) for name in objective.inputs + objective.bounds]
    inputs += [limit(columns[name]) for name in objective.limits]
    terms = given.smoothing
    if objective.inputs:
        wanted = asked(given.terms)
        terms = Terms(
            importance_weights=column(given.terms.importance_weights, 1.0),
            ref_logprobs=column(given.terms.ref_logprobs),
            kl_coef=column(given.terms.kl_coef),
            entropy_coef=column(given.terms.entropy_coef),
            log_ratio_clamp=limit(given.terms.log_ratio_clamp),
            kl_type=given.terms.kl_type if wanted.kl else None,
            kl_weighted_by_ratio=given.terms.kl_weighted_by_ratio,
            entropy=wanted.entropy,
        )
    value = row_loss(objective.formula, seen, inputs, terms).value
    return torch.where(active, weight * value, 0.0), weight


def _of_objective(objective: Objective, given: _Asked) -> Any:
    losses, weights = _token_losses(objective, given)
    loss = composition.reduced(losses, weights, given.reduction)
    if not given.return_outputs:
        return loss
    with torch.no_grad():
        seen = token_stats(given.logits, given.target_tokens, given.transform, given.reduction.ignore_index)
    entropy = seen.entropy if objective.inputs and asked(given.terms).entropy else None
    call = Call(given.target_tokens != given.reduction.ignore_index, given.reduction.weights, given.columns)
    return loss, Outputs(seen.logp, entropy, call)


def _composed(objective: PerToken, given: _Asked, columns: dict[str, Any], sequence_ratio: bool = False) -> Any:
    ignore_index = given.reduction.ignore_index

    def read(tokens: Tensor | None, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
        shown = given.target_tokens if tokens is None else given.target_tokens.masked_fill(~tokens, ignore_index)
        seen = token_stats(given.logits, shown, given.transform, ignore_index)
        return seen.logp, seen.entropy if with_entropy else None

    return composition.composed(
        read,
        objective,
        given.target_tokens != ignore_index,
        {"log_ratio_clamp": given.terms.log_ratio_clamp, **columns},
        given.sequences,
        given.terms,
        given.reduction,
        sequence_ratio=sequence_ratio,
        return_outputs=given.return_outputs,
        derivatives_by_hand=False,
    )


def _loss(compute: Callable[[_Asked], Any], name: str) -> Callable[..., Any]:
    """A function with the signature of the public one of that name."""

    def reference(*args: Any, **kwargs: Any) -> Any:
        return compute(_asked(name, args, kwargs))

    reference.__name__ = reference.__qualname__ = name
    reference.__doc__ = f"The eager counterpart of :func:`fused_losses.{name}`, same arguments, any float dtype."
    reference.__signature__ = keywords.signature(name)  # type: ignore[attr-defined]
    return reference


def _per_token(name: str) -> Callable[..., Any]:
    return _loss(lambda given: _of_objective(OBJECTIVES[name], given), name)


def _of_sequences(name: str, given: _Asked) -> Any:
    loss = composition.OF_SEQUENCES[name]
    return _composed(loss.objective, given, given.columns, loss.has_ratio)


def _sapo(given: _Asked) -> Any:
    if given.ratio_level == "token":
        return _of_objective(OBJECTIVES["sapo"], given)
    return _of_sequences("sapo", given)


def _policy_loss(given: _Asked) -> Any:
    named = composition.named(given.objective, given.inputs, given.terms)
    if named.objective is None:
        return _composed(composition.of_function(given.objective, given.inputs), given, named.columns)
    return _of_objective(named.objective, given._replace(columns=named.columns, terms=named.terms))


cross_entropy = _per_token("cross_entropy")
dft = _per_token("dft")
reinforce = _per_token("reinforce")
importance_sampling = _per_token("importance_sampling")
ppo = _per_token("ppo")
cispo = _per_token("cispo")
dro = _per_token("dro")
dppo_tv = _per_token("dppo_tv")
dppo_kl = _per_token("dppo_kl")
sapo = _loss(_sapo, "sapo")
gspo = _loss(lambda given: _of_sequences("gspo", given), "gspo")
gmpo = _loss(lambda given: _of_sequences("gmpo", given), "gmpo")
vespo = _loss(lambda given: _of_sequences("vespo", given), "vespo")
policy_loss = _loss(_policy_loss, "policy_loss")


def _logprobs(given: _Asked) -> Any:
    seen = token_stats(given.logits, given.target_tokens, given.transform, given.reduction.ignore_index)
    return (seen.logp, seen.entropy) if given.return_entropy else seen.logp


def _statistics(given: _Asked) -> Any:
    seen = row_statistics(given.logits, given.target_tokens, given.transform, given.reduction.ignore_index)
    return Statistics(*(one if name in given.outputs else None for name, one in seen._asdict().items()))


logprobs = _loss(_logprobs, "logprobs")
statistics = _loss(_statistics, "statistics")
