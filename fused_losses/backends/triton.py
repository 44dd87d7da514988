"""The Triton backend: CUDA tensors on any GPU that Triton supports, and CPU tensors in Triton's interpreter.

Triton and the kernels are imported on first use. Nothing that varies from call to call (N, strides, thresholds,
temperature, ignore_index) is specialised on, so that none of it recompiles a kernel: see `kernel` in rows.py. How a row
is walked depends on V, dtype, device and what is asked, never on N: a row's numbers are the same in any batch.
"""

from __future__ import annotations

import importlib
import importlib.util
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..objectives import OBJECTIVES, Objective
from ..problem import (
    Coefficients,
    Column,
    Problem,
    Stats,
    Targets,
    Terms,
    Transform,
    coefficients_shape,
    empty,
    logprobs_shape,
    stats_shape,
)
from .rows import Rows, rows

_VECTOR_BYTES = 16
_ONE_SHOT = 65536  # bytes of the largest row that one program holds in registers; twice that spills
_LANES_PER_WARP = 256
_LOADS = 8  # 128-bit loads that a thread has in flight in a tile
_TILE = 8192  # elements of a row per step of grad and scale
_TOKENS = 1024  # per program of objective
_SUM_BLOCK = 8192
_SMALLEST_TILE = 16
_MAX_GRID = 2**30  # programs loop over what exceeds it; axis 0 takes 2^31 - 1
_L2_SHARE = 0.5  # of L2 for rows in flight between their two sweeps; the rest holds the stores


class Triton:
    looks_at_targets = False  # that would wait for the device

    def unusable(self, device: torch.device) -> str | None:
        if device.type not in ("cuda", "cpu"):
            return "it takes CUDA tensors"
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed; pip install triton"
        if device.type == "cpu" and not _interpreted():
            return "CPU tensors run in Triton's interpreter only; set TRITON_INTERPRET=1 before triton is imported"
        return None

    def runs(self, objective: Objective) -> bool:
        return objective.triton is not None or OBJECTIVES.get(objective.name) is objective

    def normaliser(self, problem: Problem) -> Tensor:
        """0-d: what a mean divides by."""
        tokens = problem.targets.tokens
        out = empty((), tokens.device)
        packed = _packed(_Values(problem.targets, weights=problem.weights))
        with _on(tokens.device):
            _kernels().normaliser[(1,)](
                out,
                packed.token,
                packed.vary,
                problem.targets.ignore_index,
                problem.targets.num,
                problem.n,
                _SUM_BLOCK,
                **_options(16),
            )
        return out

    def _denominator(self, problem: Problem) -> Column:
        return self.normaliser(problem) if problem.denominator is None else problem.denominator

    def loss_and_grad(self, logits: Tensor, problem: Problem, gradient: Tensor) -> tuple[Tensor, Tensor]:
        function = _function(problem.objective)
        n, vocab = problem.n, logits.shape[-1]
        num_targets, plain = problem.targets.num, problem.plain
        logprobs = empty(logprobs_shape(n, num_targets, plain), logits.device)
        row_losses = empty((n,), logits.device)
        denominator = self._denominator(problem)
        with _on(logits.device):
            if n > 0:
                layout = _layout(logits, gradient)
                packed = _packed(_values(problem, denominator))
                kind = _kind(problem)
                walk = _walk(vocab, logits.dtype.itemsize, logits.device, kind)
                _kernels().loss_and_grad[(min(n, walk.programs),)](
                    logits,
                    gradient,
                    logprobs,
                    row_losses,
                    packed.token,
                    packed.vary,
                    problem.targets.ignore_index,
                    num_targets,
                    n,
                    vocab,
                    *layout.strides,
                    function,
                    kind,
                    _plan(
                        vector=layout.vector,
                        ragged=layout.ragged,
                        aligned=layout.aligned,
                        depth=walk.depth,
                        lanes=walk.lanes,
                        one_shot=walk.one_shot,
                    ),
                    **_options(walk.warps, maxnreg=walk.registers),
                )
            loss = _reduce(row_losses, denominator)
        return loss, logprobs

    def stats(self, logits: Tensor, problem: Problem) -> Stats:
        n, vocab, num_targets = problem.n, logits.shape[-1], problem.targets.num
        statistics = problem.terms.statistics
        stats = Stats(empty(stats_shape(n, num_targets, problem.plain, statistics), logits.device), statistics)
        if n == 0:
            return stats
        layout = _layout(logits, logits)
        packed = _packed(_Values(problem.targets, weights=problem.weights, transform=problem.transform))
        kind = _kind(problem)
        warps = min(8, max(1, _power_of_2(vocab) // 1024))
        depth = _depth(logits.dtype.itemsize, kind)
        with _on(logits.device):
            _kernels().stats[(min(n, _MAX_GRID),)](
                logits,
                stats.table,
                packed.token,
                packed.vary,
                problem.targets.ignore_index,
                num_targets,
                n,
                vocab,
                *layout.strides[:3],
                _of_stats(kind),
                _plan(vector=layout.vector, ragged=layout.ragged, depth=depth, lanes=_lanes(warps)),
                **_options(warps),
            )
        return stats

    def objective(self, stats: Stats, problem: Problem, reduce: bool) -> tuple[Tensor, Tensor, Coefficients]:
        function = _function(problem.objective)
        n, num_targets, plain, device = problem.n, problem.targets.num, problem.plain, stats.table.device
        logprobs = empty(logprobs_shape(n, num_targets, plain, problem.terms.statistics), device)
        row_losses = empty((n,), device)
        coefficients = empty(coefficients_shape(n, plain), device)
        denominator = self._denominator(problem)
        with _on(device):
            if n > 0:
                packed = _packed(_values(problem, denominator))
                _kernels().objective[(-(-n // _TOKENS),)](
                    stats.table,
                    logprobs,
                    row_losses,
                    coefficients,
                    packed.token,
                    packed.vary,
                    problem.targets.ignore_index,
                    num_targets,
                    n,
                    problem.vocab,
                    function,
                    _kind(problem),
                    _TOKENS,
                    **_options(4),
                )
            loss = _reduce(row_losses, denominator) if reduce else row_losses
        return loss, logprobs, Coefficients(coefficients)

    def grad(
        self,
        logits: Tensor,
        targets: Targets,
        transform: Transform,
        stats: Stats,
        coefficients: Coefficients,
        upstream: Column,
        gradient: Tensor,
    ) -> None:
        n, vocab = targets.tokens.shape[0], logits.shape[-1]
        if n == 0:
            return
        layout = _layout(logits, gradient)
        tile, tiles, warps = _tiles(vocab)
        packed = _packed(_Values(targets, transform=transform, upstream=upstream))
        with _on(logits.device):
            _kernels().grad[(min(n, _MAX_GRID), tiles)](
                logits,
                gradient,
                stats.table,
                coefficients.table.contiguous(),
                packed.token,
                packed.vary,
                targets.num,
                n,
                vocab,
                *layout.strides,
                _kind_of_grad(targets, transform, coefficients),
                _plan(vector=layout.vector, ragged=layout.ragged, aligned=layout.aligned, lanes=tile),
                **_options(warps),
            )

    def scale(self, gradient: Tensor, upstream: Tensor) -> None:
        """The kernel reads upstream, and leaves at once where it is 1."""
        if gradient.numel() == 0:
            return
        layout = _layout(gradient, gradient)
        vocab = gradient.shape[-1]
        tile, tiles, warps = _tiles(vocab)
        n = gradient.numel() // vocab
        programs = min(n, -(-8 * _machine(gradient.device).processors // tiles))  # few: most calls leave at once
        with _on(gradient.device):
            _kernels().scale[(programs, tiles)](
                gradient,
                upstream,
                n,
                vocab,
                *layout.strides[:3],
                _plan(vector=layout.vector, ragged=layout.ragged, lanes=tile),
                **_options(warps),
            )


BACKEND = Triton()


def _options(warps: int, **options: int | None) -> dict[str, int | bool | None]:
    # fusion: said, as Triton 3.9 warns that its default will change
    return {"num_warps": warps, "enable_fp_fusion": True, **options}


@cache
def _kernels(package: str = "fused_losses.triton_kernels") -> SimpleNamespace:
    def module(name: str) -> ModuleType:
        return importlib.import_module(f"{package}.{name}")

    objectives = module("objectives")
    for objective in OBJECTIVES.values():
        inputs = tuple(getattr(objectives, objective.name).arg_names[1:])
        if inputs != objective.columns:
            raise ImportError(f"Triton's {objective.name} takes {inputs}, not {objective.columns}")
    return SimpleNamespace(
        loss_and_grad=module("loss_and_grad").loss_and_grad,
        stats=module("stats").stats,
        objective=module("tokens").objective,
        grad=module("grad").grad,
        scale=module("grad").scale,
        normaliser=module("tokens").normaliser,
        reduce=module("tokens").reduce,
        objectives=objectives,
        records=module("records"),
    )


def _function(objective: Objective) -> object:
    """The objective as a Triton function: ours have it under their name, others bring it along."""
    if objective.triton is not None:
        return objective.triton
    if not BACKEND.runs(objective):
        raise RuntimeError(
            f"objective {objective.name!r} has no Triton function, which the triton backend needs; give it one "
            '(Objective(..., triton=...)) or pass backend="eager"'
        )
    return getattr(_kernels().objectives, objective.name)


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


# ---- What kernels are compiled for: RowKind and Plan in triton_kernels/records.py ----


def _kind(problem: Problem) -> Any:
    if problem.plain:
        return _plain(problem.all_logprobs)
    terms = problem.terms
    return _row_kind(
        targets=_power_of_2(problem.targets.num),
        capped=problem.transform.softcap is not None,
        entropy=terms.entropy,
        smoothed=terms.label_smoothing != 0,
        statistics=terms.statistics,
        kl_type=terms.kl_type,
        kl_weighted_by_ratio=terms.kl_weighted_by_ratio,
        all_logprobs=problem.all_logprobs,
    )


def _kind_of_grad(targets: Targets, transform: Transform, coefficients: Coefficients) -> Any:
    """Coefficients are all that stage 3 knows of terms: any of them may be other than 0."""
    if coefficients.plain:
        return _plain(False)
    return _row_kind(
        targets=_power_of_2(targets.num), capped=transform.softcap is not None, entropy=True, smoothed=True
    )


def _of_stats(kind: Any) -> Any:
    """Stage 1 sees no KL."""
    if kind.kl_type is None:
        return kind
    return _row_kind(
        targets=kind.targets,
        capped=kind.capped,
        entropy=kind.entropy,
        smoothed=kind.smoothed,
        statistics=kind.statistics,
        all_logprobs=kind.all_logprobs,
    )


# Cached: a launch takes the hash of each, and finds it faster in an object that it knows.


@cache
def _plain(all_logprobs: bool) -> Any:
    return _kernels().records.RowKind(all_logprobs=all_logprobs)


@cache
def _row_kind(**fields: object) -> Any:
    return _kernels().records.RowKind(plain=False, **fields)


@cache
def _plan(**fields: object) -> Any:
    return _kernels().records.Plan(**fields)


class _Walk(NamedTuple):
    """How the one-pass kernel takes a row, and how many programs share the rows."""

    one_shot: bool
    depth: int
    lanes: int
    warps: int
    programs: int
    registers: int | None  # per thread, at most


@lru_cache(maxsize=1024)
def _walk(vocab: int, itemsize: int, device: torch.device, kind: Any) -> _Walk:
    if vocab * itemsize * _per_element(kind) <= _ONE_SHOT:
        block = max(_SMALLEST_TILE, _power_of_2(vocab))
        return _Walk(True, 1, block, min(16, max(1, block // 1024)), _MAX_GRID, None)
    # A row must still lie in L2 for its second sweep, so programs are few: two per processor where that fits, which
    # overlaps the reduction of one with the sweeps of the other, else one with twice the warps. 512 threads in either
    # case: 65536 registers leave 128 to each.
    processors, l2 = _machine(device)
    fits = 2 * processors * vocab * itemsize <= _L2_SHARE * l2
    warps = 8 if fits else 16
    programs = processors * (2 if fits else 1)
    return _Walk(False, _depth(itemsize, kind), _lanes(warps), warps, programs, 128)


def _per_element(kind: Any) -> int:
    """Registers that an element of a row takes, more or less."""
    return 1 if kind.plain else 4 if kind.capped else 2


def _lanes(warps: int) -> int:
    """Rows that no tile holds go by tiles of [depth, lanes]: whole vectors."""
    return _LANES_PER_WARP * warps


def _depth(itemsize: int, kind: Any) -> int:
    loads = _LOADS // 2 if kind.capped else _LOADS
    return loads * 16 // itemsize * 32 // _LANES_PER_WARP


def _tiles(vocab: int) -> tuple[int, int, int]:
    """(columns per tile, tiles per row, warps) of the element-wise kernels."""
    tile = min(_TILE, max(_SMALLEST_TILE, _power_of_2(vocab)))
    return tile, -(-vocab // tile), max(1, tile // 1024)


class _Layout(NamedTuple):
    strides: tuple[int, int, int, int, int]  # inner, then outer and inner stride of logits and of the gradient
    vector: int  # elements in 16 bytes
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
    vector = _VECTOR_BYTES // logits.dtype.itemsize
    ragged = any(s % vector for s in (logits.shape[-1], outer_stride, inner_stride))
    shift = (grad_outer_stride - outer_stride, grad_inner_stride - inner_stride)
    aligned = not any(s % vector for s in shift)
    return _Layout((inner, outer_stride, inner_stride, grad_outer_stride, grad_inner_stride), vector, ragged, aligned)


def _rows(tensor: Tensor) -> Rows:
    layout = rows(tensor)
    assert layout is not None  # what can't be walked has been copied
    return layout


# ---- What varies from call to call: Token in triton_kernels/records.py ----


class _Values(NamedTuple):
    """What a launch is given of its tokens; what it does not look at is left at one number for all launches."""

    targets: Targets
    transform: Transform = Transform()
    weights: Column = 1.0
    upstream: Column = 1.0
    denominator: Column = 1.0
    inputs: tuple[Column, ...] = ()
    terms: Terms | None = None  # None for a plain row


def _values(problem: Problem, denominator: Column) -> _Values:
    return _Values(
        targets=problem.targets,
        transform=problem.transform,
        weights=problem.weights,
        denominator=denominator,
        inputs=problem.inputs,
        terms=None if problem.plain else problem.terms,
    )


class _Packed(NamedTuple):
    token: Any
    vary: int  # a bit for each column that has a value per token: `at` in triton_kernels/rows.py


def _packed(given: _Values) -> _Packed:
    records = _kernels().records
    vary = bits = 0

    def packed(column: Column) -> Column:
        """The next column, whose bit is the next in `vary`."""
        nonlocal vary, bits
        column = _aligned(column) if isinstance(column, Tensor) else float(column)
        vary |= (isinstance(column, Tensor) and column.dim() > 0 and column.stride(0) > 0) << bits
        bits += 1
        return column

    tokens, shares, terms = given.targets.tokens, given.targets.shares, given.terms
    token = records.Token(
        # in the order of `vary`: rows.py
        weights=packed(given.weights),
        temperature=packed(given.transform.temperature),
        upstream=packed(given.upstream),
        inputs=tuple(packed(column) for column in given.inputs),
        terms=terms and records.TermColumns(*(packed(getattr(terms, name)) for name in records.TermColumns._fields)),
        targets=_aligned(tokens),
        shares=None if shares is None else _aligned(shares),
        softcap=given.transform.softcap or 0.0,
        denominator=given.denominator if isinstance(given.denominator, Tensor) else float(given.denominator),
    )
    return _Packed(token, vary)


def _aligned(tensor: Tensor) -> Tensor:
    """Copied unless it is contiguous or one value for all, and begins on a 16-byte boundary."""
    one_for_all = tensor.dim() == 0 or (tensor.dim() == 1 and tensor.stride(0) == 0)
    if (one_for_all or tensor.is_contiguous()) and tensor.data_ptr() % 16 == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _reduce(row_losses: Tensor, denominator: Column) -> Tensor:
    loss = empty((), row_losses.device)
    _kernels().reduce[(1,)](row_losses, denominator, loss, row_losses.numel(), _SUM_BLOCK, **_options(16))
    return loss


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device: make that the tensor's. The context costs more than the question."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _power_of_2(x: int) -> int:
    return 1 << (x - 1).bit_length()
