"""The losses by Tinker's names: its input keys, config keys, defaults and sum reduction, as of its SDK 0.38.

The losses know nothing of Tinker's words, and the ``tinker`` package is not imported: its ``TensorData`` is known by
its ``to_torch``, a graph of ``create_custom_loss`` by its nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import fused_losses  # its losses are looked up when called: it imports this module

from ..composition import WithDerivative
from ..problem import BackendName
from ._custom_graph import CustomLoss, custom_loss
from ._names import called


class ComputeResult(NamedTuple):
    """What :func:`compute` returns."""

    loss: Tensor  # 0-d float32, differentiable
    logprobs: Tensor  # per target, float32, detached
    metrics: dict[str, Tensor]  # "loss:sum", the loss, and those of a custom loss; detached


@dataclass(frozen=True)
class _Loss:
    required: tuple[str, ...]  # keys of loss_fn_inputs
    optional: tuple[str, ...] = ()
    config: Mapping[str, float | None] = field(default_factory=dict)  # key -> default; None: that of the loss itself


_CUSTOM = "custom"
_POLICY = ("target_tokens", "logprobs", "advantages")
_CLIP = ("clip_low_threshold", "clip_high_threshold")

_LOSSES = {
    "cross_entropy": _Loss(("target_tokens", "weights")),
    "importance_sampling": _Loss(_POLICY, ("weights",)),
    "ppo": _Loss(_POLICY, ("weights", *_CLIP), dict(zip(_CLIP, (0.8, 1.2), strict=True))),
    "cispo": _Loss(_POLICY, ("weights", *_CLIP), dict(zip(_CLIP, (0.0, 4.0), strict=True))),
    "dro": _Loss(_POLICY, ("weights",), {"beta": None}),
    "gspo": _Loss(_POLICY, ("weights", *_CLIP, "sequence_ratio_mask"), dict.fromkeys(_CLIP)),
}


def loss_fn(name: str) -> Callable[..., Any]:
    """The loss of that name, with Tinker's reduction and defaults in place of its own.

    ``loss_fn("cispo")`` is :func:`fused_losses.cispo` with ``reduction="sum"``, ``clip_low_threshold=0.0`` and
    ``clip_high_threshold=4.0``. It is called as the loss is, and any keyword may be given again.

    Args:
        name: "cross_entropy", "importance_sampling", "ppo", "cispo", "dro" or "gspo".

    Returns:
        A function ``(logits, target_tokens, ...)``, see the loss itself.

    Raises:
        ValueError: no loss has that name, or it is a graph's: :func:`compute` takes it.
    """
    if name == _CUSTOM:
        raise ValueError("loss_fn 'custom' is whatever its graph says: compute(\"custom\", ..., custom=graph) takes it")
    defaults = {key: default for key, default in _named(name).config.items() if default is not None}
    return partial(getattr(fused_losses, name), reduction="sum", **defaults)


def compute(
    loss_fn: str,
    logits: Tensor,
    loss_fn_inputs: Mapping[str, Any],
    loss_fn_config: Mapping[str, Any] | None = None,
    *,
    custom: Any = None,
    backend: BackendName = "auto",
) -> ComputeResult:
    """The loss that Tinker's ``forward_backward`` would compute, from logits: the sum over tokens, not their mean.

    ``loss_fn_inputs`` may be that of a ``tinker.Datum`` as it stands; a Datum is one sequence, its logits are (N, V).
    docs/adapters/tinker.md has the keys and defaults of each loss. Losses:
    https://tinker-docs.thinkingmachines.ai/losses.

    Args:
        loss_fn: "cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo" or "custom".
        logits: (..., V) float32, bfloat16 or float16, as for the losses.
        loss_fn_inputs: by key, tensors of shape (...): always ``target_tokens``, already shifted by one, and for
            cross_entropy ``weights``, for the others ``logprobs``, those of the sampling policy, and ``advantages``.
            May be given: ``weights`` for any loss, per-token ``clip_low_threshold`` and ``clip_high_threshold`` where
            these are config keys, ``sequence_ratio_mask`` for gspo. cross_entropy also takes ``target_tokens`` and
            ``weights`` of shape (..., K). Tensors are passed to the loss as they are; arrays, lists and TensorData
            become int64 (``target_tokens``) or float32 (all others) on the device of the logits. For "custom", of one
            Datum: ``target_tokens`` (T,) or (T, K) and what the graph names; TensorData keeps its dtype.
        loss_fn_config: by key, numbers: ``clip_low_threshold`` and ``clip_high_threshold``, absolute bounds on the
            ratio, for ppo (default 0.8 and 1.2), cispo (0.0 and 4.0) and gspo (those of :func:`fused_losses.gspo`);
            ``beta`` for dro (that of :func:`fused_losses.dro`).
        custom: the loss that "custom" is: the ``LossHandle`` of ``create_custom_loss``, the ``CustomLossGraph`` that it
            sends or that as JSON, or a ``torch.fx.GraphModule``; a function ``(logprobs, *inputs) -> (loss, metrics)``.
            The loss is differentiated through the logprobs, the other inputs are constants.
        backend: "auto", "cuda", "triton", "cpu" or "eager", as for the losses.

    Returns:
        ``(loss, logprobs, metrics)``: the loss, 0-d and differentiable; the logprob of each target, detached; and
        ``{"loss:sum": loss}``, detached. All are tensors on the device of the logits; nothing waits for it.

    Raises:
        TypeError, ValueError: no loss has that name, or it is "stable_reinforce", whose formula is not published; a key
            is unknown, missing, or given both per token and in the config; ``custom`` has an operation that is not
            evaluated here; or what the loss itself raises.
        RuntimeError: the named backend can't run here.
    """
    config = {} if loss_fn_config is None else loss_fn_config
    if loss_fn == _CUSTOM:
        return _compute_custom(logits, loss_fn_inputs, config, custom, backend)
    loss = _named(loss_fn)
    if custom is not None:
        raise ValueError(f"custom is the graph of loss_fn 'custom', got one with {loss_fn!r}")
    _check_keys("loss_fn_inputs", loss_fn, loss_fn_inputs, loss.required + loss.optional)
    _check_keys("loss_fn_config", loss_fn, config, loss.config)
    for key in loss.required:
        if key not in loss_fn_inputs:
            raise ValueError(
                f"loss_fn_inputs of {loss_fn!r} needs {key}: it must have {_listed(loss.required)}, "
                f"got {_listed(loss_fn_inputs)}"
            )
    for key in config:
        if key in loss_fn_inputs:
            raise ValueError(f"{key} is in loss_fn_inputs, per token, and in loss_fn_config, for all: give it once")

    device = getattr(logits, "device", None)
    device = device if isinstance(device, torch.device) else None  # NumPy's is a string: the loss says what it takes
    inputs = {key: _tensor(key, value, device) for key, value in loss_fn_inputs.items()}
    if "logprobs" in inputs:
        inputs["old_logprobs"] = inputs.pop("logprobs")
    with called({"old_logprobs": "logprobs"}):
        value, outputs = _bound(loss_fn)(logits, **{**inputs, **config}, backend=backend, return_outputs=True)
    return ComputeResult(value, outputs.logprobs, {"loss:sum": value.detach()})


_bound = loss_fn  # under a name that compute's first parameter does not hide


def _named(name: str) -> _Loss:
    if name == "stable_reinforce":
        raise ValueError(
            "loss_fn 'stable_reinforce' can't be computed here: Tinker has not published its formula. "
            f"Others are {_listed(_LOSSES)}"
        )
    if not isinstance(name, str) or name not in _LOSSES:
        raise ValueError(f"loss_fn must be one of {_listed([*_LOSSES, _CUSTOM])}, got {name!r}")
    return _LOSSES[name]


# ---- A graph of the logprobs ----


def _compute_custom(
    logits: Tensor, loss_fn_inputs: Mapping[str, Any], config: Mapping[str, Any], custom: Any, backend: BackendName
) -> ComputeResult:
    if custom is None:
        raise ValueError(
            "loss_fn 'custom' needs custom=, the LossHandle of create_custom_loss or its graph; a loss_id names what "
            "Tinker's server has"
        )
    _check_keys("loss_fn_config", _CUSTOM, config, ())
    loss = custom_loss(custom)
    needed = ("target_tokens", *loss.inputs)
    _check_keys("loss_fn_inputs", _CUSTOM, loss_fn_inputs, loss_fn_inputs)
    if missing := [key for key in needed if key not in loss_fn_inputs]:
        raise ValueError(f"loss_fn_inputs of 'custom' needs {_listed(missing)}, which its graph reads")
    inputs = {key: _tensor(key, loss_fn_inputs[key], getattr(logits, "device", None), as_it_is=True) for key in needed}
    for key, rank in {**loss.ranks, "target_tokens": loss.ranks["logprobs"]}.items():
        if rank is not None and key in inputs and inputs[key].dim() != rank:
            raise ValueError(f"{key} in loss_fn_inputs must have rank {rank}, got shape {tuple(inputs[key].shape)}")
    target_tokens = inputs["target_tokens"]
    shape = tuple(getattr(logits, "shape", ()))
    if len(shape) != 2 or target_tokens.dim() not in (1, 2):
        raise ValueError(
            "a custom loss is of one Datum, logits (T, V) and target_tokens (T,) or (T, K); got "
            f"{shape or type(logits).__name__} and {tuple(target_tokens.shape)}"
        )
    of_inputs = partial(_evaluated, loss, [inputs[key] for key in loss.inputs])
    if target_tokens.dim() == 1:
        logprobs = fused_losses.logprobs(logits, target_tokens, backend=backend)
        value, metrics = of_inputs(logprobs)
    else:
        value, metrics, logprobs = _of_several_targets(logits, target_tokens, of_inputs, backend)
    return ComputeResult(value, logprobs.detach(), {"loss:sum": value.detach(), **metrics})


def _evaluated(loss: CustomLoss, inputs: list[Tensor], logprobs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return loss(logprobs, *(each.detach() for each in inputs))


def _of_several_targets(
    logits: Tensor,
    target_tokens: Tensor,
    function: Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]],
    backend: BackendName,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """As Tinker's client does it: cross_entropy is -sum of weights times logprobs, so with the negative slope of any
    loss of the logprobs for weights its gradient is that loss's."""
    with torch.no_grad():
        _, seen = fused_losses.cross_entropy(
            logits, target_tokens, reduction="sum", backend=backend, return_outputs=True
        )
    with torch.enable_grad():
        logprobs = seen.logprobs.detach().requires_grad_()
        value, metrics = function(logprobs)
        slope = torch.autograd.grad(value, logprobs)[0] if value.requires_grad else torch.zeros_like(logprobs)
    surrogate = fused_losses.cross_entropy(logits, target_tokens, weights=-slope, reduction="sum", backend=backend)
    loss: Any = WithDerivative.apply(surrogate, value.detach(), torch.ones_like(surrogate))  # type: ignore[no-untyped-call]
    return loss, metrics, logprobs


def _check_keys(argument: str, name: str, given: Mapping[str, Any], known: Collection[str]) -> None:
    if not isinstance(given, Mapping):
        hint = ": pass its loss_fn_inputs" if hasattr(given, "loss_fn_inputs") else ""
        raise TypeError(f"{argument} must be a mapping from keys to values, got {type(given).__name__}{hint}")
    unknown = [key for key in given if key not in known]
    if unknown:
        raise ValueError(f"{argument} of {name!r} takes {_listed(known)}, got {_listed(unknown)}")


def _listed(keys: Collection[str]) -> str:
    return ", ".join(map(str, keys)) or "no keys"


def _tensor(key: str, value: Any, device: torch.device | None, as_it_is: bool = False) -> Tensor:
    """A tensor as it is; an array, a list or TensorData as int64 or float32 on ``device``. as_it_is: TensorData of
    its dtype."""
    if isinstance(value, Tensor):
        return value
    integers = key == "target_tokens"
    if hasattr(value, "to_torch"):
        value = value.to_torch().numpy()
        integers |= as_it_is and value.dtype.kind in "iu"
    try:
        array = np.array(value)  # a copy, as a view of memory that is not writable makes torch warn
    except (TypeError, ValueError):  # a ragged list, for one
        array = np.array(None)
    if array.dtype.kind not in ("iu" if integers else "iufb") and array.size > 0:
        got = f"{array.dtype} values" if array.dtype.kind in "fb" else type(value).__name__
        raise TypeError(
            f"{key} in loss_fn_inputs must be a tensor, array, rectangular list or TensorData of "
            f"{'integers' if integers else 'numbers'}, got {got}"
        )
    if integers and array.size > 0 and array.max() > np.iinfo(np.int64).max:  # as uint64, which would wrap
        raise ValueError(f"{key} in loss_fn_inputs must be within the range of int64, got {array.max()}")
    tensor = torch.from_numpy(array.astype(np.int64 if integers else np.float32, order="C", copy=False))
    if device is not None and device.type == "cuda":  # from pinned memory, as else the copy would wait for the device
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
