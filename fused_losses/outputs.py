"""What ``return_outputs=True`` adds to a loss, and what ``statistics`` returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .objectives import constant
from .problem import Column


class Call(NamedTuple):
    """The arguments of a call that its metrics are made of."""

    present: Tensor  # bool: the tokens whose target is not ignored
    weights: Column | None
    columns: Mapping[str, Column | None]  # the objective's, by name
    log_ratio: Tensor | None = None  # where it is not that of the token: of its sequence


class Statistics(NamedTuple):
    """What :func:`statistics` was asked for, of the targets' shape; None for the rest."""

    logprobs: Tensor | None  # float32, differentiable
    entropy: Tensor | None  # float32, differentiable
    log_sum_squares: Tensor | None  # float32, detached
    mean_logit: Tensor | None  # float32, detached
    top1: Tensor | None  # bool


class Outputs(NamedTuple):
    """What ``return_outputs=True`` adds to the loss. Detached from the graph."""

    logprobs: Tensor  # float32, of the targets' shape
    entropy: Tensor | None = None  # likewise, where an entropy_coef is in use
    call: Call | None = None  # what metrics are made of

    @property
    def metrics(self) -> dict[str, Tensor]:
        """What one logs of such a loss: 0-d float32 tensors, made now, without waiting for the device.

        Over active tokens, those of a weight other than 0 whose target is not ``ignore_index``; 0 where there are none.
        With x = logprobs, q = old_logprobs and r = exp(x - q), or the sequence's ratio where the loss is of that:

        * ``tokens``: how many; ``logprob_mean``: mean x; ``entropy_mean``, where the entropy is known
        * ``ratio_mean``, ``ratio_min``, ``ratio_max``: of r
        * ``clip_fraction_low``: A < 0 and r < low; ``clip_fraction_high``: A > 0 and r > high; of the losses that clip
        * ``approximate_kl_k1``: mean q - x; ``approximate_kl_k3``: mean r - 1 - (x - q): estimates of KL(old || policy)
        * ``logprob_difference_mean``, ``logprob_difference_max``: of |x - q|
        * ``effective_sample_size``: (sum r)^2 / (tokens * sum r^2), in (0, 1]
        """
        with torch.no_grad():
            return self._metrics()

    def _metrics(self) -> dict[str, Tensor]:
        assert self.call is not None
        active, weights, columns, of_sequence = self.call
        if weights is not None:
            active = active & (weights != 0)
        tokens = active.sum().float()

        def mean(values: Tensor) -> Tensor:
            return values.where(active, 0.0).sum() / tokens.clamp(min=1)

        metrics = {"tokens": tokens, "logprob_mean": mean(self.logprobs)}
        if self.entropy is not None:
            metrics["entropy_mean"] = mean(self.entropy)
        old_logprobs, advantages = columns.get("old_logprobs"), columns.get("advantages")
        low, high = columns.get("clip_low_threshold"), columns.get("clip_high_threshold")
        if old_logprobs is None:
            return metrics
        log_ratio = (self.logprobs - constant(old_logprobs, self.logprobs)).where(active, 0.0)
        distance = log_ratio.abs()
        token_ratio = torch.exp(log_ratio)
        seen = log_ratio if of_sequence is None else of_sequence.where(active, 0.0)
        ratio = torch.exp(seen)
        metrics |= {
            "ratio_mean": mean(ratio),
            "ratio_min": self._extreme(ratio, active, torch.inf),
            "ratio_max": self._extreme(ratio, active, -torch.inf),
            "approximate_kl_k1": mean(-log_ratio),
            "approximate_kl_k3": mean(token_ratio - 1 - log_ratio),
            "logprob_difference_mean": mean(distance),
            "logprob_difference_max": self._extreme(distance, active, -torch.inf),
        }
        largest = self._extreme(seen, active, -torch.inf)
        share = torch.exp(seen - largest).where(active, 0.0)  # of the largest: no ratio overflows
        metrics["effective_sample_size"] = share.sum() ** 2 / ((share**2).sum() * tokens).clamp(min=1e-30)
        if low is not None and high is not None and advantages is not None:
            advantages = constant(advantages, self.logprobs)
            metrics["clip_fraction_low"] = mean(((advantages < 0) & (ratio < low)).float())
            metrics["clip_fraction_high"] = mean(((advantages > 0) & (ratio > high)).float())
        return metrics

    @staticmethod
    def _extreme(values: Tensor, active: Tensor, neutral: float) -> Tensor:
        if values.numel() == 0:
            return torch.zeros((), dtype=values.dtype, device=values.device)
        chosen = values.masked_fill(~active, neutral)
        extreme = chosen.amin() if neutral > 0 else chosen.amax()
        return extreme.where(active.any(), 0.0)
