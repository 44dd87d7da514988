"""The losses as data: one eager formula per objective.

A loss sees the vocabulary only through ``logp``, the logprob of the target token under the policy being trained. Its
formula maps logp and the token's inputs to the per-token loss; the table below adds what the inputs are. The eager
backend and :mod:`fused_losses.reference` run these formulas under autograd; ``csrc/objectives.h`` and
``triton_kernels/objectives.py`` hold the same functions with their derivative written by hand, and the tests compare.

Formulas work in any float dtype and with numbers or tensors as inputs. They mask inputs before ``exp``, not results
after it: in the branch that ``torch.where`` did not take, autograd would still form 0 * inf.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def logprobs(logp: Tensor) -> Tensor:
    return logp


def cross_entropy(logp: Tensor) -> Tensor:
    return -logp


def importance_sampling(logp: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
    idle = _no_advantage(old_logprobs, advantages)
    ratio = torch.exp((logp - old_logprobs).masked_fill(idle, 0.0))
    return -torch.where(idle, 0.0, ratio * advantages)


def ppo(logp: Tensor, old_logprobs: Tensor, advantages: Tensor, low: Tensor, high: Tensor) -> Tensor:
    idle = _no_advantage(old_logprobs, advantages)
    log_ratio = logp - old_logprobs
    ratio = torch.exp(log_ratio.detach())
    clipped = ((advantages > 0) & (ratio > high)) | ((advantages < 0) & (ratio < low))
    ratio = torch.exp(log_ratio.masked_fill(clipped | idle, 0.0))
    bound = torch.where(advantages > 0, high, low)
    objective = torch.where(clipped, bound, ratio) * advantages
    return -torch.where(idle, 0.0, objective) * _valid_clip(low, high, logp)


def cispo(logp: Tensor, old_logprobs: Tensor, advantages: Tensor, low: Tensor, high: Tensor) -> Tensor:
    idle = _no_advantage(old_logprobs, advantages)
    ratio = torch.exp(logp.detach() - old_logprobs)
    coefficient = torch.where(ratio < low, low, torch.where(ratio > high, high, ratio)) * advantages
    idle = idle | (coefficient == 0)  # 0 * -inf
    return -torch.where(idle, 0.0, coefficient * logp.masked_fill(idle, 0.0)) * _valid_clip(low, high, logp)


def dro(logp: Tensor, old_logprobs: Tensor, advantages: Tensor, beta: Tensor) -> Tensor:
    idle = advantages == 0
    reward = torch.where(idle, 0.0, logp.masked_fill(idle, 0.0) * advantages)
    penalty = 0.5 * beta * (logp - old_logprobs) ** 2
    return (penalty - reward) * _nan_unless(beta >= 0, logp)


def _no_advantage(old_logprobs: Tensor, advantages: Tensor) -> Tensor:
    """Advantage 0 makes loss and gradient 0 whatever the ratio is, but must not hide a NaN."""
    return (advantages == 0) & ~torch.isnan(old_logprobs)


def _valid_clip(low: Tensor, high: Tensor, logp: Tensor) -> Tensor:
    return _nan_unless((low >= 0) & (low <= high), logp)


def _nan_unless(valid: Tensor, like: Tensor) -> Tensor:
    """A factor: 1, or NaN where a per-token bound makes no sense. Multiplied, so that the gradient is NaN as well."""
    return torch.where(valid, 1.0, torch.nan).to(like.dtype)


@dataclass(frozen=True)
class Objective:
    """One row of the table: the formula and the names of its inputs, in the order in which kernels take them."""

    name: str
    formula: Callable[..., Tensor]
    inputs: tuple[str, ...] = ()  # per-token tensors or numbers
    bounds: tuple[str, ...] = ()  # further inputs, each >= 0; a clip's low bound is at most its high bound
    is_loss: bool = True  # logprobs is an objective too, but not a loss


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
