"""The Triton backend: CUDA tensors on any GPU that Triton supports, and CPU tensors in Triton's interpreter.

Triton and the kernels are imported on first use. Nothing that varies from call to call (N, strides, thresholds,
temperature, ignore_index) is specialised on, so that none of it recompiles a kernel: see `kernel` in rows.py.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from .. import objectives
from ..objectives import OBJECTIVES
from ..terms import NO_KL, Terms, coefficients_shape, logprobs_shape, stats_shape
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
    terms: Terms | None,
    gradient: Tensor,
) -> tuple[Tensor, Tensor]:
    """One pass; see eager.py for what each function computes."""
    kernels = _kernels()
    n, vocab = target_tokens.shape[0], logits.shape[-1]
    function = _function(objective_name)
    logprobs = torch.empty(logprobs_shape(n, terms), dtype=torch.float32, device=logits.device)
    row_losses = torch.empty(n, dtype=torch.float32, device=logits.device)
    with _on(logits.device):
        if mean:
            denominator = _normaliser(target_tokens, weights, ignore_index)
        if n > 0:
            layout = _layout(logits, gradient)
            given = _terms(terms)
            plan = _plan(vocab, logits.dtype.itemsize, logits.device, given.per_element)
            values, vary = _tuple(OBJECTIVES[objective_name].padded(inputs))
            columns, strides = _columns(weights, temperature)
            kernels.loss_and_grad[(min(n, plan.programs),)](
                logits,
                gradient,
                target_tokens,
                logprobs,
                row_losses,
                values,
                given.columns,
                given.shares,
                given.label_smoothing,
                given.z_loss,
                given.softcap,
                *columns,
                denominator,
                vary,
                given.vary,
                *strides,
                n,
                vocab,
                *layout.strides,
                ignore_index,
                given.num_targets,
                function,
                given.block,
                given.capped,
                given.entropy,
                given.smoothed,
                given.kl_type,
                given.kl_weighted_by_ratio,
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
    terms: Terms | None,
) -> Tensor:
    n, vocab = target_tokens.shape[0], logits.shape[-1]
    given = _terms(terms)
    out = torch.empty(stats_shape(n, terms), dtype=torch.float32, device=logits.device)
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
            given.softcap,
            out,
            *strides,
            n,
            vocab,
            *layout.strides[:3],
            ignore_index,
            given.num_targets,
            given.block,
            given.capped,
            given.entropy,
            given.smoothed,
            all_logprobs,
            layout.ragged,
            _depth(logits.dtype.itemsize, given.per_element),
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
    terms: Terms | None,
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = _kernels()
    n = target_tokens.shape[0]
    function = _function(objective_name)
    logprobs = torch.empty(logprobs_shape(n, terms), dtype=torch.float32, device=row_stats.device)
    row_losses = torch.empty(n, dtype=torch.float32, device=row_stats.device)
    coefficients = torch.empty(coefficients_shape(n, terms), dtype=torch.float32, device=row_stats.device)
    with _on(row_stats.device):
        if mean:
            denominator = _normaliser(target_tokens, weights, ignore_index)
        if n > 0:
            values, vary = _tuple(OBJECTIVES[objective_name].padded(inputs))
            given = _terms(terms)
            columns, strides = _columns(weights, temperature)
            kernels.objective[(-(-n // _TOKENS),)](
                row_stats,
                target_tokens,
                logprobs,
                row_losses,
                coefficients,
                values,
                given.columns,
                given.shares,
                given.label_smoothing,
                given.z_loss,
                given.softcap,
                *columns,
                denominator,
                vary,
                given.vary,
                *strides,
                n,
                ignore_index,
                given.num_targets,
                function,
                terms is not None,
                given.capped,
                given.entropy,
                given.smoothed,
                given.kl_type,
                given.kl_weighted_by_ratio,
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
    shares: Tensor | None,
    softcap: float,
    gradient: Tensor,
) -> None:
    n, vocab = target_tokens.shape[0], logits.shape[-1]
    if n == 0:
        return
    if coefficients.dim() == 1:
        given = _terms(None)
    else:
        given = _terms(Terms(softcap=softcap, shares=shares))
        coefficients = coefficients.contiguous()[0]  # the kernel finds the others from there
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
            given.shares,
            given.softcap,
            *strides,
            n,
            vocab,
            *layout.strides,
            given.num_targets,
            given.block,
            given.capped,
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
        objectives=module("objectives"),
    )


def _function(objective_name: str) -> object:
    """The objective as a Triton function: ours have it under their name, others bring it along."""
    objective = OBJECTIVES[objective_name]
    if objective.formula.__module__ == objectives.__name__:
        return getattr(_kernels().objectives, objective_name)
    if objective.triton is None:
        raise RuntimeError(
            f"objective {objective_name!r} has no Triton function, which the triton backend needs; give it one "
            '(Objective(..., triton=...)) or pass backend="eager"'
        )
    return objective.triton


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
def _plan(vocab: int, itemsize: int, device: torch.device, per_element: int) -> _Plan:
    if vocab * itemsize * per_element <= _ONE_SHOT:
        block = max(2 * _VECTOR, _power_of_2(vocab))
        return _Plan(True, 1, block, min(16, max(1, block // 1024)), _MAX_GRID, None)
    # A row must still lie in L2 for its second sweep, so programs are few: two per processor where that fits, which
    # overlaps the reduction of one with the sweeps of the other, else one with twice the warps. 512 threads in either
    # case: 65536 registers leave 128 to each.
    processors, l2 = _machine(device)
    fits = 2 * processors * vocab * itemsize <= _L2_SHARE * l2
    warps = 8 if fits else 16
    return _Plan(
        False, _depth(itemsize, per_element), _LANES_PER_WARP * warps, warps, processors * (2 if fits else 1), 128
    )


def _depth(itemsize: int, per_element: int) -> int:
    loads = _LOADS // 2 if per_element == 4 else _LOADS
    return loads * 16 // itemsize * 32 // _LANES_PER_WARP


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


def _tuple(columns: Sequence[Column]) -> tuple[tuple[Column, ...], int]:
    """Columns as the kernels take any number of them: `per_token` in triton_kernels/rows.py."""
    values = tuple(_aligned(c) if isinstance(c, Tensor) else float(c) for c in columns)
    return values, sum(isinstance(v, Tensor) and v.dim() and v.stride(0) and 1 << i for i, v in enumerate(values))


def _aligned(column: Tensor) -> Tensor:
    """The column, copied unless it is contiguous or one value for all, and on a 16-byte boundary."""
    stride = column.stride(0) if column.dim() else 0
    if stride > 1 or column.data_ptr() % 16:
        return column.clone(memory_format=torch.contiguous_format)
    return column


class _Terms(NamedTuple):
    """Terms, or their absence, as the kernels take them."""

    columns: tuple[Column, ...] = ()
    vary: int = 0
    shares: Tensor | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0
    num_targets: int = 1
    block: int = 0  # of targets; 0 for no terms
    capped: bool = False
    entropy: bool = False
    smoothed: bool = False
    kl_type: int = NO_KL
    kl_weighted_by_ratio: bool = False
    per_element: int = 1  # registers that an element of a row takes, more or less


_PLAIN = _Terms()


def _terms(terms: Terms | None) -> _Terms:
    if terms is None:
        return _PLAIN
    columns, vary = _tuple(terms[:5])
    return _Terms(
        columns,
        vary,
        terms.shares,
        terms.label_smoothing,
        terms.z_loss,
        terms.softcap,
        terms.targets,
        _power_of_2(terms.targets),
        terms.softcap != 0,
        terms.entropy,
        terms.label_smoothing != 0,
        terms.kl_type,
        terms.kl_weighted_by_ratio,
        4 if terms.softcap else 2,
    )


def _normaliser(target_tokens: Tensor, weights: Column, ignore_index: int) -> Tensor:
    out = torch.empty(1, dtype=torch.float32, device=target_tokens.device)
    (weights,), (stride,) = _columns(weights)
    n = target_tokens.shape[0]
    num_targets = target_tokens.shape[1] if target_tokens.dim() == 2 else 1
    _kernels().normaliser[(1,)](
        target_tokens, weights, out, stride, n, num_targets, ignore_index, _SUM_BLOCK, **_options(16)
    )
    return out


def _reduce(row_losses: Tensor, denominator: Column) -> Tensor:
    out = torch.empty((), dtype=torch.float32, device=row_losses.device)
    _kernels().reduce[(1,)](row_losses, denominator, out, row_losses.numel(), _SUM_BLOCK, **_options(16))
    return out


def _on(device: torch.device) -> AbstractContextManager[None]:
    """Triton launches on the current device: make that the tensor's. The context costs more than the question."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _power_of_2(x: int) -> int:
    return 1 << (x - 1).bit_length()
