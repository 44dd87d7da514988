"""What the two C++ backends share: tensors in, the integers of ``csrc/bindings.h`` out."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..terms import Terms, coefficients_shape, logprobs_shape, stats_shape
from .rows import rows

Column = Tensor | float

# What python -m fused_losses looks for: the first is a failure, the second a choice, or a compiler that was not found.
BROKEN = "does not load"
NOT_BUILT = "the extension is not built"

_DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # DType in csrc/row.h


def load(name: str, fix: str) -> tuple[ModuleType | None, str | None]:
    """The C++ module ``fused_losses.<name>``, or why there is none and what to do."""
    try:
        return importlib.import_module(f"fused_losses.{name}"), None
    except ModuleNotFoundError:
        return None, f"{NOT_BUILT}; {fix} and reinstall the package"
    except ImportError as error:
        return None, f"the extension is built but {BROKEN} ({error}); reinstall the package"


class Native:
    """The backend functions over one C++ module; see eager.py for what each computes."""

    def __init__(self, module: ModuleType):
        self.module = module
        self.objective_id = {name: i for i, name in enumerate(module.objectives)}

    def loss_and_grad(
        self,
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
        stream: int = 0,
    ) -> tuple[Tensor, Tensor]:
        n = target_tokens.shape[0]
        logprobs = torch.empty(logprobs_shape(n, terms), dtype=torch.float32, device=logits.device)
        row_losses = torch.empty(n + 1, dtype=torch.float32, device=logits.device)
        loss = torch.empty((), dtype=torch.float32, device=logits.device)
        self.module.loss_and_grad(
            _rows(logits),
            _rows(gradient),
            _DTYPE[logits.dtype],
            logits.shape[-1],
            _targets(target_tokens, ignore_index),
            self.objective_id[objective_name],
            [_column(c) for c in inputs],
            _column(weights),
            _column(temperature),
            _column(denominator),
            mean,
            all_logprobs,
            logprobs.data_ptr(),
            row_losses.data_ptr(),
            loss.data_ptr(),
            _terms(terms),
            stream,
        )
        return loss, logprobs

    def stats(
        self,
        logits: Tensor,
        target_tokens: Tensor,
        weights: Column,
        temperature: Column,
        ignore_index: int,
        all_logprobs: bool,
        terms: Terms | None,
        stream: int = 0,
    ) -> Tensor:
        shape = stats_shape(target_tokens.shape[0], terms)
        row_stats = torch.empty(shape, dtype=torch.float32, device=logits.device)
        self.module.stats(
            _rows(logits),
            _DTYPE[logits.dtype],
            logits.shape[-1],
            _targets(target_tokens, ignore_index),
            _column(weights),
            _column(temperature),
            all_logprobs,
            row_stats.data_ptr(),
            _terms(terms),
            stream,
        )
        return row_stats

    def objective(
        self,
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
        stream: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        n = target_tokens.shape[0]
        logprobs = torch.empty(logprobs_shape(n, terms), dtype=torch.float32, device=row_stats.device)
        coefficients = torch.empty(coefficients_shape(n, terms), dtype=torch.float32, device=row_stats.device)
        row_losses = torch.empty(n + 1, dtype=torch.float32, device=row_stats.device)
        loss = torch.empty((), dtype=torch.float32, device=row_stats.device) if reduce else None
        self.module.objective(
            row_stats.data_ptr(),
            n,
            _targets(target_tokens, ignore_index),
            self.objective_id[objective_name],
            [_column(c) for c in inputs],
            _column(weights),
            _column(temperature),
            _column(denominator),
            mean,
            logprobs.data_ptr(),
            row_losses.data_ptr(),
            coefficients.data_ptr(),
            0 if loss is None else loss.data_ptr(),
            _terms(terms),
            stream,
        )
        return row_losses.narrow(0, 0, n) if loss is None else loss, logprobs, coefficients

    def grad(
        self,
        logits: Tensor,
        target_tokens: Tensor,
        row_stats: Tensor,
        coefficients: Tensor,
        upstream: Column,
        temperature: Column,
        shares: Tensor | None,
        softcap: float,
        gradient: Tensor,
        stream: int = 0,
    ) -> None:
        plain = coefficients.dim() == 1
        self.module.grad(
            _rows(logits),
            _rows(gradient),
            _DTYPE[logits.dtype],
            logits.shape[-1],
            _targets(target_tokens, 0),  # ignore_index plays no part: an ignored token has coefficient 0
            _column(temperature),
            _column(coefficients) if plain else (coefficients.data_ptr(), 1, 0.0),
            _column(upstream),
            row_stats.data_ptr(),
            None if plain else _terms(Terms(softcap=softcap, shares=shares)),
            stream,
        )

    def scale(self, gradient: Tensor, upstream: Tensor, stream: int = 0) -> None:
        self.module.scale(_rows(gradient), _DTYPE[gradient.dtype], gradient.shape[-1], upstream.data_ptr(), stream)


def _rows(tensor: Tensor) -> tuple[int, int, int, int, int]:
    if tensor.dim() == 2:
        n = tensor.shape[0]
        return tensor.data_ptr(), n, n or 1, 0, tensor.stride(0)
    layout = rows(tensor)
    assert layout is not None  # ops.py has copied what can't be walked
    return (tensor.data_ptr(), *layout)


def _column(column: Column) -> tuple[int, int, float]:
    if isinstance(column, Tensor):
        return column.data_ptr(), column.stride(0) if column.dim() else 0, 0.0
    return 0, 0, column


def _targets(target_tokens: Tensor, ignore_index: int) -> tuple[int, bool, int, int]:
    targets = target_tokens.shape[1] if target_tokens.dim() == 2 else 1
    return target_tokens.data_ptr(), target_tokens.dtype == torch.int64, ignore_index, targets


def _terms(terms: Terms | None) -> tuple[Any, ...] | None:
    """TermsArg in csrc/bindings.h"""
    if terms is None:
        return None
    return (
        terms.softcap,
        terms.entropy,
        terms.label_smoothing,
        terms.z_loss,
        0 if terms.shares is None else terms.shares.data_ptr(),
        *(_column(c) for c in terms[:5]),
        terms.kl_type,
        terms.kl_weighted_by_ratio,
    )
