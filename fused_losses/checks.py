"""Arguments checked and brought to the form kernels take, before any launch and without reading device memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .backends import NAMES
from .backends.rows import overlap, rows
from .objectives import OBJECTIVES

Column = Tensor | float

LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_COLUMN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MASK_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_POSITIVE = ("temperature", "denominator")


def logits_and_targets(logits: Tensor, target_tokens: Tensor) -> Tensor:
    """Check both; the targets as (N,)."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits must be a tensor, got {type(logits).__name__}")
    if logits.dtype not in LOGITS_DTYPES:
        raise TypeError(
            f"logits must be float32, bfloat16 or float16, got {logits.dtype} (fused_losses.reference takes any float)"
        )
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must have shape (..., V) with V > 0, got {tuple(logits.shape)}")
    if not isinstance(target_tokens, Tensor):
        raise TypeError(f"target_tokens must be a tensor, got {type(target_tokens).__name__}")
    if target_tokens.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"target_tokens must be int64 or int32, got {target_tokens.dtype}")
    if target_tokens.shape != logits.shape[:-1]:
        raise ValueError(
            f"target_tokens must have the shape of logits without its last dimension, {tuple(logits.shape[:-1])}, "
            f"got {tuple(target_tokens.shape)}"
        )
    _same_device("target_tokens", target_tokens, logits)
    if target_tokens.dim() != 1:
        target_tokens = target_tokens.reshape(-1)
    return target_tokens if target_tokens.is_contiguous() else target_tokens.contiguous()


def column(name: str, value: Tensor | float, logits: Tensor) -> Column:
    """A per-token input as a float, or as a float32 tensor of shape (N,) whose stride may be 0."""
    if not isinstance(value, Tensor):
        return _number(name, value)
    allowed = _COLUMN_DTYPES + _MASK_DTYPES if name == "weights" else _COLUMN_DTYPES
    if value.dtype not in allowed:
        raise TypeError(f"{name} must be a float tensor, got {value.dtype}")
    _same_device(name, value, logits)
    shape = logits.shape[:-1]
    if value.dtype is not torch.float32 or value.requires_grad:
        value = value.detach().to(torch.float32)
    if value.shape != shape:
        try:
            value = value.expand(shape)
        except RuntimeError:
            raise ValueError(
                f"{name} must broadcast to the tokens' shape {tuple(shape)}, got {tuple(value.shape)}"
            ) from None
    return value if value.dim() == 1 else value.reshape(-1)


def objective_inputs(name: str, inputs: tuple[Tensor | float, ...], logits: Tensor) -> list[Column]:
    """The inputs of objective ``name`` as columns, its bounds checked as far as the host knows them."""
    objective = OBJECTIVES[name]
    columns = [column(key, value, logits) for key, value in zip(objective.columns, inputs, strict=True)]
    if objective.bounds:
        bounds = columns[len(objective.inputs) :]
        for key, bound in zip(objective.bounds, bounds, strict=True):
            if isinstance(bound, float) and not bound >= 0:
                raise ValueError(f"{key} must be at least 0, got {bound}")
        if len(bounds) == 2:
            low, high = bounds
            if isinstance(low, float) and isinstance(high, float) and low > high:
                raise ValueError(f"clip_low_threshold must not exceed clip_high_threshold, got {low} > {high}")
    return columns


def denominator(value: Tensor | float | None, reduction: str, logits: Tensor) -> Column:
    """What the sum is divided by: 1 for a plain sum, and for a plain mean, whose kernels form it themselves."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    if value is None:
        return 1.0
    if reduction == "none":
        raise ValueError('denominator needs a reduction to divide: reduction is "none"')
    if not isinstance(value, Tensor):
        return _number("denominator", value)
    if value.dim() != 0:
        raise ValueError(f"denominator must be a number or a 0-d tensor, got shape {tuple(value.shape)}")
    _same_device("denominator", value, logits)
    return value.detach().to(torch.float32)


def backend(name: str) -> str:
    if name != "auto" and name not in NAMES:
        raise ValueError(f"backend must be one of {('auto', *NAMES)}, got {name!r}")
    return name


def inplace(logits: Tensor, reduction: str, recompute: bool) -> None:
    if reduction == "none" or recompute:
        cause = 'reduction="none"' if reduction == "none" else "recompute=True"
        raise ValueError(f"inplace=True makes the gradient in forward, {cause} makes it in backward: choose one")
    base = None if torch.compiler.is_compiling() else logits._base
    if logits.is_leaf or (base is not None and base.is_leaf and base.requires_grad):
        raise ValueError(
            "inplace=True would overwrite logits, a leaf that requires grad: pass the output of an operation"
        )
    if rows(logits) is None or overlap(logits):
        raise ValueError(
            "inplace=True needs logits with a contiguous last dimension, at most two strides before it and no element "
            f"twice in memory; got shape {tuple(logits.shape)} with strides {logits.stride()}"
        )


def targets_in_range(target_tokens: Tensor, vocab: int, ignore_index: int) -> None:
    """Raise ValueError with the first target outside [0, V) that is not ``ignore_index``. Synchronises."""
    if target_tokens.numel() == 0:
        return
    low, high = (t.item() for t in torch.aminmax(target_tokens))
    if low >= 0 and high < vocab:
        return
    bad = ((target_tokens < 0) | (target_tokens >= vocab)) & (target_tokens != ignore_index)
    if bad.any():
        at = int(bad.int().argmax())
        raise ValueError(
            f"target_tokens must be in [0, {vocab}) or ignore_index {ignore_index}, got {int(target_tokens[at])} "
            f"at token {at} of {target_tokens.numel()}"
        )


def bounds_in_range(name: str, inputs: Sequence[Column], temperature: Column) -> None:
    """The bounds that only the device knows, for ``validate=True``. Synchronises."""
    if isinstance(temperature, Tensor) and not (temperature > 0).all():
        raise ValueError("temperature must be greater than 0 at every token")
    objective = OBJECTIVES[name]
    bounds = [torch.as_tensor(c) for c in inputs[len(objective.inputs) :]]
    for key, bound in zip(objective.bounds, bounds, strict=True):
        if not (bound >= 0).all():
            raise ValueError(f"{key} must be at least 0 at every token")
    if len(bounds) == 2 and not (bounds[0] <= bounds[1]).all():
        raise ValueError("clip_low_threshold must not exceed clip_high_threshold at any token")


def _number(name: str, value: float) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number or a tensor, got {type(value).__name__}") from None
    if number != number:  # not math.isnan: torch.compile traces this with a symbolic number
        raise ValueError(f"{name} must not be NaN")
    if name in _POSITIVE and not 0 < number < math.inf:
        raise ValueError(f"{name} must be greater than 0 and finite, got {number}")
    return number


def _same_device(name: str, tensor: Tensor, logits: Tensor) -> None:
    if tensor.device != logits.device:
        raise ValueError(f"{name} must be on the device of logits, {logits.device}, got {tensor.device}")
