"""The losses in eager torch, with the signatures of the public functions: what everything else is compared against.

Independent of every kernel, any float dtype, float64 included. The loss has the dtype of the logits if that is float32
or float64, else float32. Keywords that choose how to compute (``inplace``, ``recompute``, ``backend``, ``validate``)
change nothing here; they are accepted so that one name can stand for the other.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from . import losses
from .losses import Outputs
from .objectives import OBJECTIVES, Objective

P = ParamSpec("P")
R = TypeVar("R")


def token_logprobs(
    logits: Tensor, target_tokens: Tensor, temperature: Tensor | float = 1.0, ignore_index: int = -100
) -> Tensor:
    """log_softmax(logits / temperature)[target]: 0 where ignored, NaN where the target is outside [0, V)."""
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    if isinstance(temperature, Tensor):
        temperature = temperature.to(logits.dtype).expand(logits.shape[:-1]).unsqueeze(-1)
    ignored = target_tokens == ignore_index
    outside = ((target_tokens < 0) | (target_tokens >= logits.shape[-1])) & ~ignored
    # An ignored row may hold NaN, and NaN * 0 in the backward of log_softmax is NaN: it must not get that far.
    z = logits.masked_fill(ignored.unsqueeze(-1), 0.0) / temperature
    target = target_tokens.masked_fill(ignored | outside, 0).long().unsqueeze(-1)
    logp = torch.log_softmax(z, -1).gather(-1, target).squeeze(-1).masked_fill(ignored, 0.0)
    return logp * torch.where(outside, torch.nan, 1.0).to(logp.dtype)


def _reduced(
    objective: Objective,
    logits: Tensor,
    target_tokens: Tensor,
    inputs: list[Tensor | float],
    weights: Tensor | float | None,
    reduction: str,
    denominator: Tensor | float | None,
    temperature: Tensor | float,
    ignore_index: int,
) -> Tensor:
    """The reduced loss."""
    dtype = torch.promote_types(logits.dtype, torch.float32)

    def constant(value: Tensor | float) -> Tensor:
        return torch.as_tensor(value, dtype=dtype, device=logits.device).detach().expand(target_tokens.shape)

    weight = constant(1.0 if weights is None else weights)
    active = (target_tokens != ignore_index) & (weight != 0)
    # Whatever an inactive token holds is replaced before the formula sees it: masked after it, 0 * NaN would be left in
    # the gradient.
    target_tokens = target_tokens.masked_fill(~active, ignore_index)
    weight, *constants = (constant(c).masked_fill(~active, 0.0) for c in (weight, *inputs))
    logp = token_logprobs(logits, target_tokens, temperature, ignore_index)
    loss = torch.where(active, weight * objective.formula(logp, *constants)[0], 0.0)
    if reduction == "none":
        return loss
    total = loss.sum()
    if denominator is None:
        denominator = weight.sum() if reduction == "mean" else 1.0
    divisor = torch.as_tensor(denominator, dtype=dtype, device=total.device)
    nothing = (total == 0) & (divisor == 0)  # no active token: 0 and connected to the graph, not 0 / 0
    return total / divisor.masked_fill(nothing, 1.0)


def _eager(public: Callable[P, R]) -> Callable[P, R]:
    """The eager counterpart of a public loss: its signature, the formula of its objective."""
    objective = OBJECTIVES[public.__name__]
    signature = inspect.signature(public)

    @wraps(public)
    def reference(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        loss = _reduced(
            objective,
            given["logits"],
            given["target_tokens"],
            [given[name] for name in objective.columns],
            given["weights"],
            given["reduction"],
            given["denominator"],
            given["temperature"],
            given["ignore_index"],
        )
        if not given["return_outputs"]:
            return loss
        with torch.no_grad():
            logp = token_logprobs(*(given[k] for k in ("logits", "target_tokens", "temperature", "ignore_index")))
        return loss, Outputs(logprobs=logp)

    return reference


cross_entropy = _eager(losses.cross_entropy)
importance_sampling = _eager(losses.importance_sampling)
ppo = _eager(losses.ppo)
cispo = _eager(losses.cispo)
dro = _eager(losses.dro)


@wraps(losses.logprobs)
def logprobs(
    logits: Tensor,
    target_tokens: Tensor,
    *,
    temperature: Tensor | float = 1.0,
    ignore_index: int = -100,
    backend: str = "auto",
) -> Tensor:
    return token_logprobs(logits, target_tokens, temperature, ignore_index)
