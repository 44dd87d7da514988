"""The stages in plain torch, on any device: the definition that the other backends reproduce, and the last resort."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..objectives import OBJECTIVES, constant
from ..terms import Seen, Terms, row_loss

Column = Tensor | float

_FLOAT_MIN = torch.finfo(torch.float32).min
_LOWEST = -1000.0  # of z_j - z_max where it meets p_j, which is 0 there: 0 * -inf is NaN


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
    terms: Terms | None,
    gradient: Tensor,
) -> tuple[Tensor, Tensor]:
    """Write dloss/dlogits into ``gradient`` (which may be ``logits``); return the loss and the logprobs.

    logprobs: (N,). With terms (K + 1, N): of each target, then the entropy if the terms ask for it.
    """
    row_stats = stats(logits, target_tokens, weights, temperature, ignore_index, all_logprobs, terms)
    loss, logp, coefficients = objective(
        row_stats,
        target_tokens,
        objective_name,
        inputs,
        weights,
        temperature,
        denominator,
        mean,
        ignore_index,
        True,
        terms,
    )
    shares, softcap = (None, 0.0) if terms is None else (terms.shares, terms.softcap)
    grad(logits, target_tokens, row_stats, coefficients, 1.0, temperature, shares, softcap, gradient)
    return loss, logp


def stats(
    logits: Tensor,
    target_tokens: Tensor,
    weights: Column,
    temperature: Column,
    ignore_index: int,
    all_logprobs: bool,
    terms: Terms | None,
) -> Tensor:
    """(3, N): maximum of the logits, sum_j exp(z_j - z_max), target's logit, z being logits / temperature.

    With terms (K + 4, N): z is softcapped, there are K targets' logits, and then sum_j exp(z_j - z_max) (z_j - z_max)
    if the terms ask for the entropy, and mean_j z_j - z_max if they smooth labels; else these are 0.

    A target's logit is NaN for a target outside [0, V). Tokens that are not read (ignored, or of weight 0 unless
    ``all_logprobs``) have 0, 1 and 0 from there on, so that their logprob is 0.
    """
    x = logits.reshape(-1, logits.shape[-1]).float()
    targets = _matrix(target_tokens)
    outside = (targets < 0) | (targets >= x.shape[1])
    target = x.gather(1, targets.masked_fill(outside, 0).long()).masked_fill(outside, torch.nan)
    maximum = x.amax(-1).clamp(min=_FLOAT_MIN)
    softcap = 0.0 if terms is None else terms.softcap
    inverse_temperature = _inverse_temperature(temperature, maximum)
    distance = (_capped(x, softcap) - _capped(maximum, softcap)[:, None]) * inverse_temperature[:, None]
    e = torch.exp(distance)
    rows = [maximum, e.sum(-1), *target.unbind(1)]
    if terms is not None:
        # p log p is 0 at p = 0
        moment = (e * distance.clamp(min=_LOWEST)).sum(-1) if terms.entropy else torch.zeros_like(maximum)
        mean = distance.mean(-1) if terms.label_smoothing != 0 else torch.zeros_like(maximum)
        rows += [moment, mean]
    read = (targets != ignore_index).any(1)
    if not all_logprobs:
        read = read & _is_nonzero(weights, maximum)
    return torch.stack([row.where(read, 1.0 if i == 1 else 0.0) for i, row in enumerate(rows)])


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
    terms: Terms | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss (0-d, or weight * loss per token), the logprobs as in loss_and_grad, and the coefficients.

    coefficients: (N,), weight * dloss/dlogp / denominator. With terms (4, N): by logp, entropy, lse and mean of z.
    """
    softcap = 0.0 if terms is None else terms.softcap
    maximum, total = row_stats[0], row_stats[1]
    targets = _matrix(target_tokens).T  # (K, N)
    target = row_stats[2 : 2 + targets.shape[0]]
    distance = _capped(target, softcap) - _capped(maximum, softcap)
    inverse_temperature = _inverse_temperature(temperature, maximum)
    # A row that was not read (0, 1, 0) gives 0 where its temperature is bad, too; one that was shows it in its sum.
    logp = (distance * inverse_temperature).where(distance != 0, 0.0) - total.log()
    objective = OBJECTIVES[objective_name]
    values = [constant(c, maximum) for c in objective.padded(inputs)]
    active = (targets != ignore_index).any(0) & _is_nonzero(weights, maximum)
    weights, denominator = constant(weights, maximum), constant(denominator, maximum)
    if mean:
        denominator = weights.expand_as(maximum).where(active, 0.0).double().sum().float()

    if terms is None:
        out = logp = logp[0]
        losses, g = objective.formula(logp, *values)
        derivatives = g
    else:
        logp = logp.where((targets != ignore_index), 0.0)
        log_total = total.log()
        entropy = log_total - row_stats[-2] / total if terms.entropy else torch.zeros_like(total)
        out = torch.cat((logp, entropy[None]))
        lse = _capped(maximum, softcap) * inverse_temperature + log_total
        if terms.shares is None:
            seen = Seen(logp[0], lse, entropy, log_total - row_stats[-1], 1.0)
        else:
            shares = terms.shares.T
            x = (shares * logp).where(shares != 0, 0.0).sum(0)
            seen = Seen(x, lse, entropy, log_total - row_stats[-1], shares.sum(0))
        columns: dict[str, Any] = {
            name: constant(c, maximum) for name, c in zip(Terms._fields[:5], terms[:5], strict=True)
        }
        losses, *by = row_loss(objective.formula, seen, values, terms._replace(**columns))
        derivatives = torch.stack([d.expand_as(maximum) for d in by])
        derivatives = torch.where(torch.isnan(seen.logp), torch.nan, derivatives)
    losses = (weights * losses).where(active, 0.0)
    # a derivative of 0 (a clipped token) must survive an infinite weight / denominator
    coefficients = (derivatives * (weights / denominator)).where(active & (derivatives != 0), 0.0)
    if not reduce:
        return losses, out, coefficients
    total_loss = losses.double().sum()
    nothing = (total_loss == 0) & (denominator == 0)  # no active token: 0, not 0 / 0
    return (total_loss / denominator).masked_fill(nothing, 0.0).float(), out, coefficients


def grad(
    logits: Tensor,
    target_tokens: Tensor,
    row_stats: Tensor,
    coefficients: Tensor,
    upstream: Column,
    temperature: Column,
    shares: Tensor | None,
    softcap: float,
    gradient: Tensor,
) -> None:
    """Write dloss/dlogits into ``gradient``, which may be ``logits``.

    coefficients (N,): c / temperature ([j == target] - p_j), c = coefficient * upstream; 0 where either factor of c is.
    coefficients (4, N): the formula of terms.py, times dz/dlogits.
    """
    x = logits.reshape(-1, logits.shape[-1]).float()
    vocab = x.shape[1]
    maximum, total = row_stats[0], row_stats[1]
    targets = _matrix(target_tokens)
    outside = (targets < 0) | (targets >= vocab)
    targets = targets.masked_fill(outside, 0).long()
    c = coefficients * upstream
    c = c.where((coefficients != 0) & _is_nonzero(upstream, maximum), 0.0)
    slope = _inverse_temperature(temperature, maximum)[:, None]
    distance = (_capped(x, softcap) - _capped(maximum, softcap)[:, None]) * slope
    p = torch.exp(distance) / total[:, None]
    if coefficients.dim() == 1:
        c = (c[:, None] * slope).expand_as(x)
        rows = (-c * p).scatter(1, targets, c.gather(1, targets) * (1 - p.gather(1, targets)))
        rows = rows.masked_fill(outside, torch.nan).where(c != 0, 0.0)
    else:
        g, h, zeta, s = (row[:, None] for row in c)
        counts = torch.ones_like(g) if shares is None else shares
        dense = zeta - h * (distance.clamp(min=_LOWEST) - (row_stats[-2] / total)[:, None])
        share = torch.zeros_like(p).scatter_add(1, targets, counts)
        whole = counts.sum(1, keepdim=True)
        # share - U p, exact where p is near 1 and the target has all of U, too
        drawn = ((share - whole) + whole * (1 - p)).where((share != 0) & (p > 0.5), share - whole * p)
        rows = g * drawn + p * dense + s / vocab
        if softcap:
            slope = slope * (1 - torch.tanh(x / softcap) ** 2)
        rows = (rows * slope).masked_fill((outside & (counts != 0)).any(1, keepdim=True), torch.nan)
        rows = rows.where((c != 0).any(0)[:, None], 0.0)
    gradient.copy_(rows.view(gradient.shape))


def scale(gradient: Tensor, upstream: Tensor) -> None:
    zero = gradient == 0  # a masked token's gradient stays 0 for an infinite scale, too
    gradient.mul_(upstream).masked_fill_(zero, 0.0)


def _matrix(target_tokens: Tensor) -> Tensor:
    """(N, K)"""
    return target_tokens if target_tokens.dim() == 2 else target_tokens[:, None]


def _capped(x: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(x / softcap) if softcap else x


def _inverse_temperature(temperature: Column, like: Tensor) -> Tensor:
    t = constant(temperature, like)
    return torch.where(t > 0, 1 / t, torch.nan).expand_as(like)


def _is_nonzero(column: Column, like: Tensor) -> Tensor:
    return (constant(column, like) != 0).expand_as(like)
