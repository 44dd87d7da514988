"""The Triton backend: CUDA tensors on any GPU that Triton supports, and CPU tensors in Triton's interpreter.

Triton and the kernels are imported on first use. Nothing that varies from call to call (N, strides, thresholds,
temperature, ignore_index) is specialised on, so that none of it recompiles a kernel: see `kernel` in rows.py.
"""

from __future__ import annotations

import importlib
import importlib.util
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from ..objectives import OBJECTIVES
from .rows import Rows, rows

Column = Tensor | float

_VECTOR = 8  # elements; VECTOR in triton_kernels/rows.py
_ONE_SHOT = 65536  # bytes of the largest row that one program holds in registers; twice that spills
_LANES_PER_WARP = 256  # two-sweep rows go by tiles of [depth, _LANES_PER_WARP * warps]
_LOADS = 8  # 128-bit loads that a thread has in flight in a tile
_TILE = 8192  # elements of a row per step of grad and scale
_TOKENS = 1024  # per program of objective
_SUM_BLOCK = 8192
_MAX_GRID = 2**30  # programs loop over what exceeds it; axis 0 takes 2^31 - 1
_L2_SHARE = 0.6  # of L2 for rows in flight between their two sweeps; the rest holds the stores


def unusable(device: torch.device) -> str | None:
    if device.type not in ("cuda", "cpu"):
        return "it takes CUDA tensors"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    if device.type == "cpu" and not _interpreted():
        return "CPU tensors run in Triton's interpreter only; set TRITON_INTERPRET=1 before triton is imported"
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
    """One pass: write dloss/dlogits into ``gradient`` (which may be ``logits``); return the loss and the logprobs."""
    kernels = _kernels()
    n, vocab = target_tokens.numel(), logits.shape[-1]
    logprobs = torch.empty(n, dtype=torch.float32, device=logits.device)
    row_losses = torch.empty(n, dtype=torch.float32, device=logits.device)
    with _on(logits.device):
        if mean:
            denominator = _normaliser(target_tokens, weights, ignore_index)
        if n > 0:
            layout = _layout(logits, gradient)
            plan = _plan(vocab, logits.dtype.itemsize, logits.device)
            values, strides = _columns(*_padded(inputs), weights, temperature)
            kernels.loss_and_grad[(min(n, plan.programs),)](
                logits,
                gradient,
                target_tokens,
                logprobs,
                row_losses,
                *values,
                denominator,
                *strides,
                n,
                vocab,
                *layout.strides,
                ignore_index,
                kernels.objectives[objective_name],
                len(inputs),
                all_logprobs,
                layout.ragged,
                layout.aligned,
                plan.one_shot,
                plan.depth,
                plan.lanes,
                **_options(plan.warps, maxnreg=plan.registers),
            )
        loss = _reduce(row_losses, denominator)
    return loss, logprobs


def stats(
    logits: Tensor,
    target_tokens: Tensor,
    weights: Column,
    temperature: Column,
    ignore_index: int,
    all_logprobs: bool,
) -> Tensor:
    """(3, N): maximum of the logits, sum_j exp((logits_j - maximum) / temperature), target's logit."""
    n, vocab = target_tokens.numel(), logits.shape[-1]
    out = torch.empty((3, n), dtype=torch.float32, device=logits.device)
    if n == 0:
        return out
    layout = _layout(logits, logits)
    values, strides = _columns(weights, temperature)
    warps = min(8, max(1, _power_of_2(vocab) // 1024))
    with _on(logits.device):
        _kernels().stats[(min(n, _MAX_GRID),)](
            logits,
            target_tokens,
            *values,
            out,
            *strides,
            n,
            vocab,
            *layout.strides[:3],
            ignore_index,
            all_logprobs,
            layout.ragged,
            _depth(logits.dtype.itemsize),
            _LANES_PER_WARP * warps,
            **_options(warps),
        )
    return out


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
    kernels = _kernels()
    n = target_tokens.numel()
    logprobs, row_losses, coefficients = (
        torch.empty(n, dtype=torch.float32, device=row_stats.device) for _ in range(3)
    )
    with _on(row_stats.device):
        if mean:
            denominator = _normaliser(target_tokens, weights, ignore_index)
        if n > 0:
            values, strides = _columns(*_padded(inputs), weights, temperature)
            kernels.objective[(-(-n // _TOKENS),)](
                row_stats,
                target_tokens,
                logprobs,
                row_losses,
                coefficients,
                *values,
                denominator,
                *strides,
                n,
                ignore_index,
                kernels.objectives[objective_name],
                len(inputs),
                _TOKENS,
                **_options(4),
            )
        loss = _reduce(row_losses, denominator) if reduce else row_losses
    return loss, logprobs, coefficients


def grad(
    logits: Tensor,
    target_tokens: Tensor,
    row_stats: Tensor,
    coefficients: Tensor,
    upstream: Column,
    temperature: Column,
    gradient: Tensor,
) -> None:
    """gradient_j = c / temperature * ([j == target] - p_j), c = coefficient * upstream; 0 where a coefficient is."""
    n, vocab = target_tokens.numel(), logits.shape[-1]
    if n == 0:
        return
    layout = _layout(logits, gradient)
    tile, tiles, warps = _tiles(vocab)
    values, strides = _columns(temperature, coefficients, upstream)
    with _on(logits.device):
        _kernels().grad[(min(n, _MAX_GRID), tiles)](
            logits,
            gradient,
            target_tokens,
            row_stats,
            *values,
            *strides,
            n,
            vocab,
            *layout.strides,
            layout.ragged,
            layout.aligned,
            tile,
            **_options(warps),
        )


def scale(gradient: Tensor, upstream: Tensor) -> None:
    """gradient *= upstream, one element on the device: the kernel reads it and leaves at once where it is 1."""
    if gradient.numel() == 0:
        return
    layout = _layout(gradient, gradient)
    vocab = gradient.shape[-1]
    tile, tiles, warps = _tiles(vocab)
    n = gradient.numel() // vocab
    programs = min(n, -(-8 * _machine(gradient.device).processors // tiles))  # few: most calls leave at once
    with _on(gradient.device):
        _kernels().scale[(programs, tiles)](
            gradient, upstream, n, vocab, *layout.strides[:3], layout.ragged, tile, **_options(warps)
        )


def _options(warps: int, **options: int | None) -> dict[str, int | bool | None]:
    # fusion: said, as Triton 3.9 warns that its default will change
    return {"num_warps": warps, "enable_fp_fusion": True, **options}


@cache
def _kernels(package: str = "fused_losses.triton_kernels") -> SimpleNamespace:
    def module(name: str) -> ModuleType:
        return importlib.import_module(f"{package}.{name}")

    return SimpleNamespace(
        loss_and_grad=module("loss_and_grad").loss_and_grad,
        stats=module("stats").stats,
        objective=module("objective").objective,
        grad=module("grad").grad,
        scale=module("grad").scale,
        normaliser=module("reduce").normaliser,
        reduce=module("reduce").reduce,
        objectives={name: getattr(module("objectives"), name) for name in OBJECTIVES},
    )


def _interpreted() -> bool:
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    return all(isinstance(function, InterpretedFunction) for function in (tl.max, _kernels().stats))


class _Machine(NamedTuple):
    processors: int
    l2: int  # bytes


@cache
def _machine(device: torch.device) -> _Machine:
    if device.type == "cpu":
        return _Machine(processors=2, l2=2**25)
    properties = torch.cuda.get_device_properties(device)
    return _Machine(properties.multi_processor_count, getattr(properties, "L2_cache_size", 0))


class _Plan(NamedTuple):
    """How the one-pass kernel takes a row, and how many programs share the rows."""

    one_shot: bool
    depth: int
    lanes: int
    warps: int
    programs: int
    registers: int | None  # per thread, at most


@lru_cache(maxsize=1024)
def _plan(vocab: int, itemsize: int, device: torch.device) -> _Plan:
    if vocab * itemsize <= _ONE_SHOT:
        block = max(2 * _VECTOR, _power_of_2(vocab))
        return _Plan(True, 1, block, min(16, max(1, block // 1024)), _MAX_GRID, None)
    # A row must still lie in L2 for its second sweep, so programs are few: two per processor where that fits, which
    # overlaps the reduction of one with the sweeps of the other, else one with twice the warps. 512 threads in either
    # case: 65536 registers leave 128 to each.
    processors, l2 = _machine(device)
    fits = 2 * processors * vocab * itemsize <= _L2_SHARE * l2
    warps = 8 if fits else 16
    return _Plan(False, _depth(itemsize), _LANES_PER_WARP * warps, warps, processors * (2 if fits else 1), 128)


def _depth(itemsize: int) -> int:
    return max(1, _LOADS * 16 // itemsize * 32 // _LANES_PER_WARP)


def _tiles(vocab: int) -> tuple[int, int, int]:
    """(columns per tile, tiles per row, warps) of the element-wise kernels."""
    tile = min(_TILE, max(2 * _VECTOR, _power_of_2(vocab)))
    return tile, -(-vocab // tile), max(1, tile // 1024)


class _Layout(NamedTuple):
    strides: tuple[int, int, int, int, int]  # inner, then outer and inner stride of logits and of the gradient
    ragged: bool  # rows are not whole vectors on 16-byte boundaries
    aligned: bool  # the gradient's rows lie on these boundaries where the logits' rows do


def _layout(logits: Tensor, gradient: Tensor) -> _Layout:
    n, inner, outer_stride, inner_stride = _rows(logits)
    grad_outer_stride, grad_inner_stride = outer_stride, inner_stride
    if gradient is not logits:
        of_gradient = _rows(gradient)
        grad_outer_stride, grad_inner_stride = of_gradient.outer_stride, of_gradient.inner_stride
        if inner < n and of_gradient.inner == n:  # one stride: walk it by the logits' two levels
            grad_outer_stride = inner * grad_inner_stride
    ragged = any(s % _VECTOR for s in (logits.shape[-1], outer_stride, inner_stride))
    shift = (grad_outer_stride - outer_stride, grad_inner_stride - inner_stride)
    aligned = not any(s % _VECTOR for s in shift)
    return _Layout((inner, outer_stride, inner_stride, grad_outer_stride, grad_inner_stride), ragged, aligned)


def _rows(tensor: Tensor) -> Rows:
    layout = rows(tensor)
    assert layout is not None  # ops.py has copied what can't be walked
    return layout


def _columns(*columns: Column) -> tuple[list[Column], list[int]]:
    """Values and strides, as the kernels take them."""
    strides = [c.stride(0) if isinstance(c, Tensor) and c.dim() else 0 for c in columns]
    return list(columns), strides


def _padded(inputs: tuple[Column, ...]) -> tuple[Column, ...]:
    return inputs + (0.0,) * (4 - len(inputs))


def _normaliser(target_tokens: Tensor, weights: Column, ignore_index: int) -> Tensor:
    out = torch.empty(1, dtype=torch.float32, device=target_tokens.device)
    (weights,), (stride,) = _columns(weights)
    _kernels().normaliser[(1,)](
        target_tokens, weights, out, stride, target_tokens.numel(), ignore_index, _SUM_BLOCK, **_options(16)
    )
    return out


def _reduce(row_losses: Tensor, denominator: Column) -> Tensor:
    out = torch.empty((), dtype=torch.float32, device=row_losses.device)
    _kernels().reduce[(1,)](row_losses, denominator, out, row_losses.numel(), _SUM_BLOCK, **_options(16))
    return out


def _on(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device: make that the tensor's. The context costs more than the question."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _power_of_2(x: int) -> int:
    return 1 << (x - 1).bit_length()
