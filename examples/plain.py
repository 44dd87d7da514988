"""What the library replaces: the same losses as they are usually written in PyTorch, at their usual speed.

`fused_losses.reference` is written to be checked, not to be fast, and would be too easy to beat. These compute in the
logits' dtype, so that with float64 logits they also say what the exact curve is.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE = -100


def masked_mean(loss: Tensor, targets: Tensor) -> Tensor:
    mask = targets != IGNORE
    return (loss * mask).sum() / mask.sum()


def token_logprobs(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    logits = logits.div_(temperature)  # in place: saves a copy of the logits
    return -F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def importance_sampling(
    logits: Tensor, targets: Tensor, old_logprobs: Tensor, advantages: Tensor, temperature: float
) -> Tensor:
    ratio = torch.exp(token_logprobs(logits, targets, temperature) - old_logprobs)
    return masked_mean(-ratio * advantages, targets)


def ppo(logits: Tensor, targets: Tensor, old_logprobs: Tensor, advantages: Tensor, temperature: float) -> Tensor:
    ratio = torch.exp(token_logprobs(logits, targets, temperature) - old_logprobs)
    return masked_mean(-torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages), targets)


def cispo(logits: Tensor, targets: Tensor, old_logprobs: Tensor, advantages: Tensor, temperature: float) -> Tensor:
    logprobs = token_logprobs(logits, targets, temperature)
    ratio = torch.exp(logprobs.detach() - old_logprobs)
    return masked_mean(-ratio.clamp(0.8, 1.2) * logprobs * advantages, targets)


def dro(logits: Tensor, targets: Tensor, old_logprobs: Tensor, advantages: Tensor, temperature: float) -> Tensor:
    logprobs = token_logprobs(logits, targets, temperature)
    return masked_mean(-(logprobs * advantages - 0.05 * (logprobs - old_logprobs) ** 2), targets)
