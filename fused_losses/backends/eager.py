"""The stages in plain torch, on any device: the definition that the other backends reproduce, and the last resort."""

from __future__ import annotations

import torch
from torch import Tensor

from ..objectives import OBJECTIVES

Column = Tensor | float

_FLOAT_MIN = torch.finfo(torch.float32).min


def unusable(device: torch.device) -> str | None:
    return None


def loss_and_grad(
    logits: Tensor,
    target_tokens: Tensor,
    objective_name: str,
    inputs: tuple[Column, ...],
    weights: Column,
    temperature: Column,
    denominator: Column,
    mean: bool,
    ignore_index: int,
    all_logprobs: bool,
    gradient: Tensor,
) -> tuple[Tensor, Tensor]:
    """Write dloss/dlogits into ``gradient`` (which may be ``logits``); return the loss and the (N,) logprobs."""
    row_stats = stats(logits, target_tokens, weights, temperature, ignore_index, all_logprobs)
    loss, logp, coefficients = objective(
        row_stats, target_tokens, objective_name, inputs, weights, temperature, denominator, mean, ignore_index, True
    )
    grad(logits, target_tokens, row_stats, coefficients, 1.0, temperature, gradient)
    return loss, logp


def stats(
    logits: Tensor,
    target_tokens: Tensor,
    weights: Column,
    temperature: Column,
    ignore_index: int,
    all_logprobs: bool,
) -> Tensor:
    """(3, N): maximum of the logits, sum_j exp((logits_j - maximum) / temperature), target's logit.

    The target's logit is NaN for a target outside [0, V). Tokens that are not read (ignored, or of weight 0 unless
    ``all_logprobs``) have 0, 1, 0, so that their logprob is 0.
    """
    z = logits.reshape(-1, logits.shape[-1]).float()
    maximum = z.amax(-1).clamp(min=_FLOAT_MIN)
    total = torch.exp((z - maximum[:, None]) * _inverse_temperature(temperature, maximum)[:, None]).sum(-1)
    outside = (target_tokens < 0) | (target_tokens >= z.shape[1])
    target = z.gather(1, target_tokens.masked_fill(outside, 0).long()[:, None])[:, 0].masked_fill(outside, torch.nan)
    read = target_tokens != ignore_index
    if not all_logprobs:
        read = read & _is_nonzero(weights, maximum)
    return torch.stack((maximum.where(read, 0.0), total.where(read, 1.0), target.where(read, 0.0)))


def objective(
    row_stats: Tensor,
    target_tokens: Tensor,
    objective_name: str,
    inputs: tuple[Column, ...],
    weights: Column,
    temperature: Column,
    denominator: Column,
    mean: bool,
    ignore_index: int,
    reduce: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss (0-d, or weight * loss per token), the logprobs, and weight * dloss/dlogp / denominator per token."""
    maximum, total, target = row_stats
    distance = target - maximum
    scaled = distance * _inverse_temperature(temperature, maximum)
    # A row that was not read (0, 1, 0) gives 0 where its temperature is bad, too; one that was shows it in its sum.
    logp = scaled.where(distance != 0, 0.0) - total.log()

    losses, g = OBJECTIVES[objective_name].formula(logp, *(_tensor(c, logp) for c in inputs))
    active = (target_tokens != ignore_index) & _is_nonzero(weights, logp)
    weights, denominator = _tensor(weights, logp), _tensor(denominator, logp)
    if mean:
        denominator = weights.expand_as(logp).where(active, 0.0).double().sum().float()
    losses = (weights * losses).where(active, 0.0)
    coefficients = (g * (weights / denominator)).where(active & (g != 0), 0.0)
    if not reduce:
        return losses, logp, coefficients
    total_loss = losses.double().sum()
    nothing = (total_loss == 0) & (denominator == 0)  # no active token: 0, not 0 / 0
    return (total_loss / denominator).masked_fill(nothing, 0.0).float(), logp, coefficients


def grad(
    logits: Tensor,
    target_tokens: Tensor,
    row_stats: Tensor,
    coefficients: Tensor,
    upstream: Column,
    temperature: Column,
    gradient: Tensor,
) -> None:
    """gradient_j = c / temperature ([j == target] - p_j), c = coefficient * upstream; 0 where either factor of c is."""
    z = logits.reshape(-1, logits.shape[-1]).float()
    maximum, total, _ = row_stats
    inverse_temperature = _inverse_temperature(temperature, maximum)
    c = coefficients * upstream
    c = (c.where((coefficients != 0) & _is_nonzero(upstream, c), 0.0) * inverse_temperature)[:, None]
    p = torch.exp((z - maximum[:, None]) * inverse_temperature[:, None]) / total[:, None]
    outside = (target_tokens < 0) | (target_tokens >= z.shape[1])
    target = target_tokens.masked_fill(outside, 0).long()[:, None]
    true_class = (c * (1 - p.gather(1, target))).masked_fill(outside[:, None], torch.nan)
    rows = (-c * p).scatter(1, target, true_class).where(c != 0, 0.0)
    gradient.copy_(rows.view(gradient.shape))


def scale(gradient: Tensor, upstream: Tensor) -> None:
    zero = gradient == 0  # a masked token's gradient stays 0 for an infinite scale, too
    gradient.mul_(upstream).masked_fill_(zero, 0.0)


def _inverse_temperature(temperature: Column, like: Tensor) -> Tensor:
    t = _tensor(temperature, like)
    return torch.where(t > 0, 1 / t, torch.nan).expand_as(like)


def _is_nonzero(column: Column, like: Tensor) -> Tensor:
    return (_tensor(column, like) != 0).expand_as(like)


def _tensor(column: Column, like: Tensor) -> Tensor:
    # full, not tensor: a kernel fills it, where copying it from the host would wait for the device
    return column if isinstance(column, Tensor) else torch.full((), column, dtype=like.dtype, device=like.device)
