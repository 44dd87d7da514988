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

import torch
from torch import Tensor

Loss = tuple[Tensor, Tensor]  # (loss, g = dloss/dlogp)


def logprobs(logp: Tensor) -> Loss:
    return _checked(logp, torch.ones_like(logp), logp)


def cross_entropy(logp: Tensor) -> Loss:
    return _checked(-logp, -torch.ones_like(logp), logp)


def importance_sampling(logp: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Loss:
    idle = _no_advantage(old_logprobs, advantages)
    ratio = torch.exp((logp - old_logprobs).masked_fill(idle, 0.0))
    loss = -torch.where(idle, 0.0, ratio * advantages)
    return _checked(loss, loss, logp)


def ppo(logp: Tensor, old_logprobs: Tensor, advantages: Tensor, low: Tensor, high: Tensor) -> Loss:
    idle = _no_advantage(old_logprobs, advantages)
    log_ratio = logp - old_logprobs
    ratio = torch.exp(log_ratio.detach())
    clipped = ((advantages > 0) & (ratio > high)) | ((advantages < 0) & (ratio < low))
    bound = torch.where(advantages > 0, high, low)
    ratio = torch.exp(log_ratio.masked_fill(clipped | idle, 0.0))
    loss = -torch.where(idle, 0.0, torch.where(clipped, bound, ratio) * advantages)
    return _checked(loss, loss.masked_fill(clipped, 0.0), logp, _valid_clip(low, high))


def cispo(logp: Tensor, old_logprobs: Tensor, advantages: Tensor, low: Tensor, high: Tensor) -> Loss:
    idle = _no_advantage(old_logprobs, advantages)
    ratio = torch.exp(logp.detach() - old_logprobs)
    clamped = torch.where(ratio < low, low, torch.where(ratio > high, high, ratio))
    g = -torch.where(idle, 0.0, clamped * advantages)
    idle = g == 0  # ratio 0 comes with logp -inf
    return _checked(torch.where(idle, 0.0, g * logp.masked_fill(idle, 0.0)), g, logp, _valid_clip(low, high))


def dro(logp: Tensor, old_logprobs: Tensor, advantages: Tensor, beta: Tensor) -> Loss:
    idle = advantages == 0
    log_ratio = logp - old_logprobs
    reward = torch.where(idle, 0.0, logp.masked_fill(idle, 0.0) * advantages)
    return _checked(0.5 * beta * log_ratio**2 - reward, beta * log_ratio - advantages, logp, beta >= 0)


def _no_advantage(old_logprobs: Tensor, advantages: Tensor) -> Tensor:
    """Advantage 0 makes loss and gradient 0 whatever the ratio is, but must not hide a NaN."""
    return (advantages == 0) & ~torch.isnan(old_logprobs)


def _valid_clip(low: Tensor, high: Tensor) -> Tensor:
    return (low >= 0) & (low <= high)  # false for NaN, too


def _checked(loss: Tensor, g: Tensor, logp: Tensor, valid: Tensor | None = None) -> Loss:
    """NaN, in value and by autograd, for a NaN row whatever its loss, and where a per-token bound makes no sense."""
    ok = ~torch.isnan(logp) if valid is None else ~torch.isnan(logp) & valid
    poison = torch.where(ok, 0.0, logp) * torch.where(ok, 1.0, torch.nan)
    return loss + poison, g.detach().masked_fill(~ok, torch.nan)


@dataclass(frozen=True)
class Objective:
    """One row of the table: the formula and the names of its inputs, in the order in which kernels take them."""

    name: str
    formula: Callable[..., Loss]
    inputs: tuple[str, ...] = ()  # per-token tensors or numbers
    bounds: tuple[str, ...] = ()  # further inputs, each >= 0; a clip's low bound is at most its high bound
    is_loss: bool = True  # logprobs is an objective too, but not a loss
    columns: tuple[str, ...] = field(init=False)  # inputs and bounds

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", self.inputs + self.bounds)


_POLICY = ("old_logprobs", "advantages")
_CLIP = ("clip_low_threshold", "clip_high_threshold")

OBJECTIVES: dict[str, Objective] = {
    o.name: o
    for o in (
        Objective("logprobs", logprobs, is_loss=False),
        Objective("cross_entropy", cross_entropy),
        Objective("importance_sampling", importance_sampling, _POLICY),
        Objective("ppo", ppo, _POLICY, _CLIP),
        Objective("cispo", cispo, _POLICY, _CLIP),
        Objective("dro", dro, _POLICY, ("beta",)),
    )
}
