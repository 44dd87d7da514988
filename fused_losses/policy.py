"""Policy losses whose objective is made of torch operations on the logprobs: of whole sequences, or the user's own.

Two phase: the logprobs, and the entropy if it is needed, come from one read of the logits; the objective works on N
numbers; its gradient by them goes back in one read and one write. What a token's loss holds beside the objective, and
the reduction, are those of the other losses.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import checks, losses
from .backends import resolve, unusable
from .losses import asked_terms, loss_of
from .objectives import OBJECTIVES, Objective, constant, log_ratio
from .outputs import Call, Outputs
from .sequences import segment_expand, segment_mean
from .terms import kl, times

_OURS = tuple(OBJECTIVES)

# (logp, arguments by name, whether each token is active) -> loss per token, or 0-d
TorchObjective = Callable[[Tensor, Mapping[str, Any], Tensor], Tensor]
Source = Callable[..., Any]  # fused_losses.logprobs or that of the reference


def _dispatched(objective: Objective | None, given: dict[str, Any]) -> Tensor | tuple[Tensor, Outputs]:
    if objective is None:
        return composed(given, of_user)
    name, logits, backend = objective.name, given["logits"], checks.backend(given["backend"])
    checks.logits_and_targets(logits, given["target_tokens"])
    if backend == "auto" and objective.triton is not None and logits.is_cuda:
        given["backend"] = backend = "triton" if unusable("triton", logits.device) is None else "auto"
    if name in _OURS or _one_pass(objective, backend, logits.device):
        return loss_of(name, given)
    checks.objective_inputs(name, given, logits)
    return composed(given | {"objective": objective}, _of_formula)


def named(given: dict[str, Any]) -> tuple[Objective | None, dict[str, Any]]:
    """(the objective, None for a function; the arguments of policy_loss with its columns by name)"""
    objective, inputs, weighted = given["objective"], given["inputs"], given["kl_weighted_by_ratio"]
    defaults: dict[str, Any] = {}
    if isinstance(objective, str):
        names = tuple(name for name in _OURS if OBJECTIVES[name].columns)
        if objective not in names:
            raise ValueError(f"objective must be a function, an Objective or one of {names}, got {objective!r}")
        objective = OBJECTIVES[objective]
        defaults = _defaults(objective.name)
    elif isinstance(objective, Objective):
        if objective.name in _OURS and OBJECTIVES[objective.name] != objective:
            raise ValueError(f"objective: {objective.name!r} is one of ours; choose another name")
        taken = sorted((set(given) - {"log_ratio_clamp"}).intersection(objective.columns))
        if taken:
            raise ValueError(f"objective: its inputs can't be called {taken}, which are arguments of policy_loss")
        OBJECTIVES[objective.name] = objective  # the operators know it by its name
    elif callable(objective):
        return None, given | {"old_logprobs": inputs[0] if inputs and weighted else None}
    else:
        raise TypeError(f"objective must be a function, an Objective or a name, got {type(objective).__name__}")

    name, names = objective.name, objective.columns
    if len(inputs) > len(names):
        raise ValueError(f"{name} takes the inputs {names}, got {len(inputs)} inputs")
    columns = dict.fromkeys(objective.limits) | defaults | dict(zip(names, inputs, strict=False))
    missing = [key for key in names if key not in columns]
    if missing:
        raise ValueError(f"{name} takes the inputs {names}, got none for {missing}")
    if weighted and names[:1] != ("old_logprobs",):
        raise ValueError(f"kl_weighted_by_ratio needs old_logprobs as the first input, {name} has {names}")
    if given["log_ratio_clamp"] is not None:
        columns["log_ratio_clamp"] = given["log_ratio_clamp"]
    return objective, given | columns


def _one_pass(objective: Objective, backend: str, device: torch.device) -> bool:
    """Whether the backend has kernels for an objective that is not ours."""
    name = resolve(backend, device).__name__.rpartition(".")[2]
    return name == "eager" or (name == "triton" and objective.triton is not None)


def _defaults(name: str) -> dict[str, Any]:
    """Those of the public loss of that name."""
    parameters = inspect.signature(globals()[name] if name in globals() else getattr(losses, name)).parameters
    return {
        key: parameters[key].default
        for key in OBJECTIVES[name].columns
        if parameters[key].default is not inspect.Parameter.empty
    }


# ---- The objectives ----


def _check_ratio_gradient(ratio_gradient: str) -> None:
    if ratio_gradient not in ("token", "sequence"):
        raise ValueError(f'ratio_gradient must be "token" or "sequence", got {ratio_gradient!r}')


def gspo_objective(logp: Tensor, given: Mapping[str, Any], active: Tensor) -> Tensor:
    columns = _columns("ppo", given, logp)[1:]
    return OBJECTIVES["ppo"].formula(_sequence_log_ratio(logp, given, active), torch.zeros_like(logp), *columns)[0]


def sequence_sapo_objective(logp: Tensor, given: Mapping[str, Any], active: Tensor) -> Tensor:
    columns = _columns("sapo", given, logp)[1:]
    return OBJECTIVES["sapo"].formula(_sequence_log_ratio(logp, given, active), torch.zeros_like(logp), *columns)[0]


def _sequence_log_ratio(logp: Tensor, given: Mapping[str, Any], active: Tensor) -> Tensor:
    """log of the ratio of a token's sequence, with the gradient that ``ratio_gradient`` asks for.

    Not clamped: ``log_ratio_clamp`` clamps what the objective gets, the sequence's log ratio.
    """
    through_mean = given["ratio_gradient"] == "sequence"
    difference = (logp if through_mean else logp.detach()) - _column("old_logprobs", given, logp)
    mean = segment_mean(difference, _ratio_mask(given, active), given["cu_seqlens"])
    mean = segment_expand(mean, logp, given["cu_seqlens"])
    if through_mean:
        return mean
    here = logp.masked_fill(logp == -torch.inf, 0.0)  # inf - inf
    return mean + (here - here.detach())


def gmpo_objective(logp: Tensor, given: Mapping[str, Any], active: Tensor) -> Tensor:
    old_logprobs, advantages, low, high, clamp = _columns("cispo", given, logp)
    clamped, _ = log_ratio(logp, old_logprobs, clamp)
    too_high = (advantages > 0) & (clamped > high.log())
    too_low = (advantages < 0) & (clamped < low.log())
    clamped = torch.where(too_high, high.log(), torch.where(too_low, low.log(), clamped))
    mean = segment_mean(clamped, _ratio_mask(given, active), given["cu_seqlens"])
    # advantage 0: whatever the ratio is
    ratio = torch.exp(segment_expand(mean, logp, given["cu_seqlens"]).masked_fill(advantages == 0, 0.0))
    return torch.where((low >= 0) & (low <= high) & (clamp >= 0), -advantages * ratio, torch.nan)


def _ratio_mask(given: Mapping[str, Any], active: Tensor) -> Tensor:
    mask = given["sequence_ratio_mask"]
    if mask is None:
        return active
    if not isinstance(mask, Tensor):
        raise TypeError(f"sequence_ratio_mask must be a tensor, got {type(mask).__name__}")
    return (mask != 0) & (given["target_tokens"] != given["ignore_index"])


def of_user(logp: Tensor, given: Mapping[str, Any], active: Tensor) -> Tensor:
    loss = given["objective"](logp, *given["inputs"])
    if not isinstance(loss, Tensor) or loss.shape not in (logp.shape, ()):
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"objective must return a tensor of shape {tuple(logp.shape)} or (), got {got}")
    return loss


def _of_formula(logp: Tensor, given: Mapping[str, Any], active: Tensor) -> Tensor:
    objective: Objective = given["objective"]
    return objective.formula(logp, *_columns(objective.name, given, logp))[0]


# ---- The composition ----


def composed(given: dict[str, Any], objective: TorchObjective, source: Source = losses.logprobs) -> Any:
    """The loss, from logprobs and entropy that ``source`` makes of the logits.

    given: the arguments of the public function, by name.
    """
    logits, target_tokens, ignore_index = given["logits"], given["target_tokens"], given["ignore_index"]
    reduction, weights, return_outputs = given["reduction"], given["weights"], given["return_outputs"]
    kernels = source is losses.logprobs
    if kernels:
        checks.logits_and_targets(logits, target_tokens)
        checks.backend(given["backend"])
        if given["inplace"] and logits.requires_grad and torch.is_grad_enabled():
            raise ValueError("inplace=True makes the gradient in forward; a loss in two phases makes it in backward")
        if given["validate"]:
            checks.targets_in_range(target_tokens.reshape(-1), logits.shape[-1], ignore_index)
            checks.values_in_range({name: given.get(name) for name in ("temperature", *_FILL)})
    checks.denominator(given["denominator"], reduction, logits)
    if kernels:
        _check_columns(given, logits)
    penalised, entropy_asked = asked_terms(given)
    if penalised and given["kl_weighted_by_ratio"] and given["old_logprobs"] is None:
        raise ValueError("kl_weighted_by_ratio needs old_logprobs, the first input of the objective; got no input")

    active = target_tokens != ignore_index
    if weights is not None:
        active = active & (weights != 0)
    read = active
    if given.get("sequence_ratio_mask") is not None:
        read = active | _ratio_mask(given, active)
    seen_tokens = target_tokens if return_outputs else target_tokens.masked_fill(~read, ignore_index)
    transforms = {name: given[name] for name in ("temperature", "softcap", "logit_scale", "ignore_index", "backend")}
    logp, entropy = (
        source(logits, seen_tokens, return_entropy=True, **transforms)
        if entropy_asked
        else (source(logits, seen_tokens, **transforms), None)
    )

    # What an inactive token holds must not reach the others of its sequence: 0 * NaN is left in a mean's gradient.
    columns = {
        name: _column(name, given, logp).masked_fill(~(read if name == "old_logprobs" else active), fill)
        for name, fill in _FILL.items()
        if given.get(name) is not None
    }
    value = objective(torch.where(read, logp, 0.0), {**given, **columns}, active)
    whole_batch = value.dim() == 0 and logp.dim() > 0
    if whole_batch and reduction == "none":
        raise ValueError('reduction="none" needs an objective per token, got one that returns a 0-d loss')
    if whole_batch and given["importance_weights"] is not None:
        raise ValueError("importance_weights need an objective per token, got one that returns a 0-d loss")
    zero = torch.zeros_like(logp)
    entropies = zero if entropy is None else torch.where(active, entropy, 0.0)
    x = torch.where(active, logp, 0.0)
    per_token = zero if whole_batch else times(columns.get("importance_weights", 1.0), value)
    if entropy_asked:
        per_token = per_token - times(columns["entropy_coef"], entropies)
    if penalised:
        per_token = per_token + _penalty(x, torch.where(read, logp, 0.0), given | columns, active, kernels)
    weight = columns.get("weights", torch.ones_like(logp)).masked_fill(~active, 0.0)
    losses_ = torch.where(active, weight * per_token, 0.0)
    loss = reduced(losses_, weight, reduction, given["denominator"])
    if whole_batch:
        loss = loss + value
    if not return_outputs:
        return loss
    call = Call.of(given)
    if "ratio_gradient" in given:  # the ratio that the objective saw
        call = call._replace(
            log_ratio=_sequence_log_ratio(torch.where(read, logp.detach(), 0.0), given | columns, active)
        )
    return loss, Outputs(logp.detach(), None if entropy is None else entropy.detach(), call)


class WithDerivative(torch.autograd.Function):
    """apply(x, value, derivative) -> value, whose derivative by x is given and not that of how it was made."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, derivative: Tensor) -> Tensor:
        ctx.save_for_backward(derivative)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (derivative,) = ctx.saved_tensors
        return torch.where(upstream == 0, 0.0, upstream * derivative), None, None


def _penalty(x: Tensor, seen: Tensor, given: Mapping[str, Any], active: Tensor, exact: bool) -> Tensor:
    """kl_coef * KL per token, times the ratio if asked for. seen: with the tokens that only a sequence's ratio sees.

    exact: with derivatives formed by hand, as the kernels have them; else with those of autograd, for the reference.
    """
    coefficient = given["kl_coef"]
    value, slope, both = kl(x, given["ref_logprobs"], given["kl_type"])
    of_sequence, through_mean = "ratio_gradient" in given, given.get("ratio_gradient") == "sequence"
    log_r = flows = None
    if given["kl_weighted_by_ratio"]:
        log_r = _sequence_log_ratio(seen, given, active) if of_sequence else x - given["old_logprobs"]
        clamp = constant(math.inf if given["log_ratio_clamp"] is None else given["log_ratio_clamp"], x)
        clamped, flows = log_ratio(log_r, torch.zeros_like(x), clamp)
        # where the coefficient is 0 the term is out, and an infinite ratio's derivative with it
        ratio = torch.exp(clamped.masked_fill(coefficient == 0, 0.0))
        value = times(ratio, value)
        slope = times(ratio, slope if through_mean else torch.where(flows, both, slope))
    value = times(coefficient, value)
    if not exact:
        return value
    value, slope = value.detach(), times(coefficient, slope).detach()
    penalty = WithDerivative.apply(x, value, slope)
    if log_r is not None and flows is not None and through_mean:
        penalty = penalty + WithDerivative.apply(log_r, torch.zeros_like(value), value.where(flows, 0.0))
    return penalty


def reduced(losses_: Tensor, weights: Tensor, reduction: str, denominator: Tensor | float | None) -> Tensor:
    """``weights`` are 0 for inactive tokens; the losses are multiplied by them."""
    if reduction == "none":
        return losses_
    total = losses_.sum()
    if denominator is None:
        denominator = weights.sum() if reduction == "mean" else 1.0
    divisor = constant(denominator, total).detach().to(total.dtype)
    nothing = (total == 0) & (divisor == 0)  # no active token: 0 and connected to the graph, not 0 / 0
    return total / divisor.masked_fill(nothing, 1.0)


# per-token arguments, and what takes their place at a token that is not active
_FILL = {
    "weights": 0.0,
    "importance_weights": 0.0,
    "ref_logprobs": 0.0,
    "kl_coef": 0.0,
    "entropy_coef": 0.0,
    "old_logprobs": 0.0,
    "advantages": 0.0,
    "log_ratio_clamp": 1.0,
    "clip_low_threshold": 1.0,
    "clip_high_threshold": 1.0,
    "dual_clip": 1.0,
    "delta": 1.0,
    "tau_positive": 1.0,
    "tau_negative": 1.0,
    "beta": 1.0,
}


def _check_columns(given: Mapping[str, Any], logits: Tensor) -> None:
    for name in _FILL:
        value = given.get(name)
        # None is the default of some; of old_logprobs and advantages it is an error that names them
        if value is not None or (name in ("old_logprobs", "advantages") and name in given and "inputs" not in given):
            checks.column(name, value, logits)  # type: ignore[arg-type]
    checks.clip(given.get("clip_low_threshold"), given.get("clip_high_threshold"))


def _column(name: str, given: Mapping[str, Any], logp: Tensor) -> Tensor:
    value = given.get(name)
    if value is None:  # a limit
        value = math.inf
    return constant(value, logp).detach().to(logp.dtype).expand(logp.shape)


def _columns(name: str, given: Mapping[str, Any], logp: Tensor) -> list[Tensor]:
    """The inputs, bounds and limits of an objective; limits that are None are infinite."""
    return [_column(key, given, logp) for key in OBJECTIVES[name].columns]
