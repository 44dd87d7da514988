"""Arguments checked and brought to the form kernels take, before any launch and without reading device memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .backends import NAMES
from .backends.rows import overlap, rows
from .objectives import OBJECTIVES

Column = Tensor | float

LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_COLUMN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MASK_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def several_targets(logits: Tensor, target_tokens: Tensor) -> bool:
    """Whether the targets are (..., K): as many dimensions as the logits."""
    return isinstance(logits, Tensor) and isinstance(target_tokens, Tensor) and 0 < target_tokens.dim() == logits.dim()


def logits_and_targets(logits: Tensor, target_tokens: Tensor, several: bool = False) -> Tensor:
    """Check both; the targets as (N,), or (N, K) for ``several``."""
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
    shape = target_tokens.shape[:-1] if several else target_tokens.shape
    if shape != logits.shape[:-1] or (several and target_tokens.shape[-1] == 0):
        raise ValueError(
            f"target_tokens must have the shape of logits without its last dimension, {tuple(logits.shape[:-1])}"
            f"{', and K > 0 targets per token after it' if several else ''}, got {tuple(target_tokens.shape)}"
        )
    _same_device("target_tokens", target_tokens, logits.device)
    if several:
        target_tokens = target_tokens.reshape(-1, target_tokens.shape[-1])
    elif target_tokens.dim() != 1:
        target_tokens = target_tokens.reshape(-1)
    return target_tokens if target_tokens.is_contiguous() else target_tokens.contiguous()


def column(name: str, value: Tensor | float, logits: Tensor) -> Column:
    """A per-token input as a float, or as a float32 tensor of shape (N,) whose stride may be 0."""
    if not isinstance(value, Tensor):
        return number(name, value, " or a tensor")
    allowed = _COLUMN_DTYPES + _MASK_DTYPES if name in _MASKS else _COLUMN_DTYPES
    if value.dtype not in allowed:
        raise TypeError(f"{name} must be a float tensor, got {value.dtype}")
    _same_device(name, value, logits.device)
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


def objective_inputs(name: str, given: Mapping[str, Any], logits: Tensor) -> list[Column]:
    """The inputs of objective ``name`` as columns, its bounds checked as far as the host knows them.

    Limits that are None are infinite; those at the end are left out.
    """
    objective = OBJECTIVES[name]
    limits = objective.limits
    while limits and given[limits[-1]] is None:
        limits = limits[:-1]
    columns = [column(key, given[key], logits) for key in objective.inputs + objective.bounds]
    columns += [math.inf if given[key] is None else column(key, given[key], logits) for key in limits]
    bounds = columns[len(objective.inputs) :]
    for key, value in zip(objective.bounds, bounds, strict=False):
        if isinstance(value, float) and value < 0:
            raise ValueError(f"{key} must be at least 0, got {value}")
    if len(objective.bounds) == 2 and objective.bounds[0] == "clip_low_threshold":
        clip(*bounds[:2])
    return columns


def clip(low: Column | None, high: Column | None) -> None:
    """As far as the host knows the bounds."""
    if isinstance(low, float | int) and isinstance(high, float | int) and low > high:
        raise ValueError(f"clip_low_threshold must not exceed clip_high_threshold, got {low} > {high}")


def denominator(value: Tensor | float | None, reduction: str, logits: Tensor) -> Column:
    """What the sum is divided by: 1 for a plain sum, and for a plain mean, whose kernels form it themselves."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    if value is None:
        return 1.0
    if reduction == "none":
        raise ValueError('denominator needs a reduction to divide: reduction is "none"')
    if not isinstance(value, Tensor):
        return number("denominator", value, " or a tensor")
    if value.dim() != 0:
        raise ValueError(f"denominator must be a number or a 0-d tensor, got shape {tuple(value.shape)}")
    _same_device("denominator", value, logits.device)
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
        at, k = int(bad.int().argmax()), target_tokens.numel() // target_tokens.shape[0]
        got = int(target_tokens.view(-1)[at])
        raise ValueError(
            f"target_tokens must be in [0, {vocab}) or ignore_index {ignore_index}, got {got} "
            f"at token {at // k} of {target_tokens.shape[0]}"
        )


def values_in_range(columns: Mapping[str, Column | None]) -> None:
    """The bounds that only the device knows, by name, for ``validate=True``. Synchronises."""
    for key, given in columns.items():
        if given is None or key not in _LEAST:
            continue
        least, reached = _LEAST[key]
        value = torch.as_tensor(given)
        if not (value >= least if reached else value > least).all():
            raise ValueError(f"{key} must be {_at_least(key)} at every token")
    low, high = columns.get("clip_low_threshold"), columns.get("clip_high_threshold")
    if low is not None and high is not None and not (torch.as_tensor(low) <= torch.as_tensor(high)).all():
        raise ValueError("clip_low_threshold must not exceed clip_high_threshold at any token")


# name: (bound, whether the bound itself is allowed)
_LEAST = {
    "temperature": (0.0, False),
    "denominator": (0.0, False),
    "softcap": (0.0, False),
    "logit_scale": (0.0, False),
    "tau_positive": (0.0, False),
    "tau_negative": (0.0, False),
    "clip_low_threshold": (0.0, True),
    "clip_high_threshold": (0.0, True),
    "beta": (0.0, True),
    "log_ratio_clamp": (0.0, True),
    "dual_clip": (1.0, True),
    "delta": (0.0, True),
    "label_smoothing": (0.0, True),
    "z_loss": (0.0, True),
}
_FINITE = ("temperature", "denominator", "softcap", "logit_scale", "z_loss")
_MASKS = ("weights", "importance_weights")


def _at_least(name: str) -> str:
    least, reached = _LEAST[name]
    return f"{'at least' if reached else 'greater than'} {least:g}{' and finite' if name in _FINITE else ''}"


def number(name: str, value: float, or_tensor: str = "") -> float:
    """A number as a float, within the bounds that its name has. or_tensor: " or a tensor" where one is taken, too."""
    if isinstance(value, Tensor):  # float() of it would wait for the device
        raise TypeError(f"{name} must be a number, got a tensor")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number{or_tensor}, got {type(value).__name__}") from None
    if number != number:  # not math.isnan: torch.compile traces this with a symbolic number
        raise ValueError(f"{name} must not be NaN")
    if name in _LEAST:
        least, reached = _LEAST[name]
        if number < least or (number == least and not reached) or (name in _FINITE and number == math.inf):
            raise ValueError(f"{name} must be {_at_least(name)}, got {number}")
        if name == "label_smoothing" and number > 1:
            raise ValueError(f"label_smoothing must be at most 1, got {number}")
    return number


def _same_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} must be on the device of logits, {device}, got {tensor.device}")
