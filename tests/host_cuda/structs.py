"""csrc/problem.h for ctypes: the parameter structs, and what makes them of numpy arrays. Nothing here needs torch."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import Structure, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import NamedTuple

import numpy as np

MAX_INPUTS = 7
FLOAT32, BFLOAT16, FLOAT16 = range(3)
STORAGE = (np.uint32, np.uint16, np.uint16)
KLS = (None, "k1", "k2", "k3", "abs")  # from -1
IGNORE = -100


def fields(**of: type) -> list[tuple[str, type]]:
    return list(of.items())


class Rows(Structure):
    _fields_ = fields(
        data=c_void_p, dtype=c_int, n=c_int64, vocab=c_int64, inner=c_int64, outer_stride=c_int64, inner_stride=c_int64
    )


class Column(Structure):
    _fields_ = fields(data=c_void_p, stride=c_int64, value=c_float)


class Targets(Structure):
    _fields_ = fields(data=c_void_p, is_int64=c_bool, ignore_index=c_int64, num=c_int64, shares=c_void_p)


class Transform(Structure):
    _fields_ = fields(temperature=Column, softcap=c_float)


class Terms(Structure):
    _fields_ = fields(
        importance_weights=Column, ref_logprobs=Column, kl_coef=Column, entropy_coef=Column, log_ratio_clamp=Column,
        label_smoothing=c_float, z_loss=c_float, kl_type=c_int, kl_weighted_by_ratio=c_bool, entropy=c_bool,
        statistics=c_bool,
    )  # fmt: skip


class Problem(Structure):
    _fields_ = fields(
        targets=Targets, transform=Transform, weights=Column, objective=c_int, inputs=Column * MAX_INPUTS, terms=Terms,
        denominator=Column, vocab=c_int64, all_logprobs=c_bool, plain=c_bool,
    )  # fmt: skip


class StatsTable(Structure):
    _fields_ = fields(data=c_void_p, n=c_int64, num=c_int64)


class LogprobsTable(StatsTable):
    pass


class CoefficientsTable(Structure):
    _fields_ = fields(data=c_void_p, n=c_int64)


class LossAndGrad(Structure):
    _fields_ = fields(
        logits=Rows,
        grad=Rows,
        problem=Problem,
        logprobs=LogprobsTable,
        row_losses=c_void_p,
        loss=c_void_p,
        averages=c_bool,
    )  # fmt: skip


class Stats(Structure):
    _fields_ = fields(logits=Rows, problem=Problem, stats=StatsTable)


class Objective(Structure):
    _fields_ = fields(
        n=c_int64, problem=Problem, stats=StatsTable, logprobs=LogprobsTable, row_losses=c_void_p,
        coefficients=CoefficientsTable, loss=c_void_p, averages=c_bool,
    )  # fmt: skip


class Grad(Structure):
    _fields_ = fields(
        logits=Rows, grad=Rows, targets=Targets, transform=Transform, stats=StatsTable, coefficients=CoefficientsTable,
        upstream=Column, plain=c_bool,
    )  # fmt: skip


class Scale(Structure):
    _fields_ = fields(grad=Rows, scale=c_void_p)


class Normaliser(Structure):
    _fields_ = fields(n=c_int64, targets=Targets, weights=Column, normaliser=c_void_p)


class Module:
    """The device code: loss_and_grad, stats, objective, grad, scale and normaliser by their parameters' names."""

    def __init__(self, path: Path):
        self._library = ctypes.CDLL(str(path))
        self._library.objectives.restype = c_char_p
        self._library.lines_stored.restype = c_int64
        for returns_text in ("on_chip", "unusable", "launches"):
            getattr(self._library, returns_text).restype = c_char_p
        self.objectives = self._library.objectives().decode().split()
        for params in (LossAndGrad, Stats, Objective, Grad, Scale, Normaliser):
            name = "".join("_" * (i > 0 and c.isupper()) + c.lower() for i, c in enumerate(params.__name__))
            size = getattr(self._library, f"size_of_{name}")
            size.restype = c_size_t
            assert size() == ctypes.sizeof(params), f"{params.__name__} is not as in csrc/problem.h"
            setattr(self, name, self._launcher(name, params))

    def _launcher(self, name, params):
        function = getattr(self._library, name)
        function.restype = c_char_p

        def launch(stream=0, **given):
            missing = {field for field, _ in params._fields_} - given.keys()
            assert not missing, missing
            raise_if(function(ctypes.byref(params(**given)), c_size_t(stream)))

        return launch

    def on_chip(self, chip: Chip, **given) -> None:
        """loss_and_grad by that engine, in this shape."""
        raise_if(self._library.on_chip(ctypes.byref(LossAndGrad(**given)), *map(c_int, chip)))

    def configure(
        self,
        multiprocessors: int,
        l2_bytes: int,
        descending: bool = False,
        shared: tuple[int, int] = (90 << 10, 91 << 10),
        capability: tuple[int, int] = (9, 0),
    ) -> None:
        """A device of its own. shared: bytes that a block and a multiprocessor may have; too few for rows on chip."""
        self._library.add_device(multiprocessors, l2_bytes, *shared, *capability)
        self.set(descending=descending)

    def lines_of(self, run: Callable[[], object]) -> int:
        """How many lines of 128 bytes its stores of vectors go to, counted for each store of a warp."""
        self.set(counting=True)
        run()
        lines = self._library.lines_stored()
        self.set(counting=False)
        return lines

    # The runtime's stand-in

    def unusable(self, device: int) -> str:
        return self._library.unusable(c_int(device)).decode()

    def launches(self) -> list[Launch]:
        """Since they were last asked for."""
        lines = self._library.launches().decode().splitlines()
        return [Launch(*map(int, line.split())) for line in lines]

    def calls(self, name: str) -> int:
        return self._library.calls(name.encode())

    def set(self, **values: int | bool | tuple[int, ...]) -> None:
        """descending, runs, current, code, versions, counting"""
        for name, value in values.items():
            getattr(self._library, f"set_{name}")(*(value if isinstance(value, tuple) else (c_int(value),)))

    def fail(self, call: str, error: int) -> None:
        """Whenever it is called; 0: no more."""
        self._library.set_error(call.encode(), c_int(error))

    def current(self) -> int:
        return self._library.current()

    def last_error(self) -> int:
        return self._library.last_error()


class Chip(NamedTuple):
    """A shape of the engine on chip."""

    threads: int
    chunks: int
    announced: int  # vectors
    team: int = 1  # blocks of a row


class Launch(NamedTuple):
    device: int
    blocks: int
    threads: int
    shared_bytes: int
    stream: int
    team: int
    on_chip: int


def raise_if(what: bytes | None) -> None:
    if what is not None:
        raise RuntimeError(what.decode())


# ---- of numpy arrays; the structs keep alive what they point to ------------------------------------------------------


def pointer(array: np.ndarray | None) -> int | None:
    return None if array is None else array.ctypes.data


def column(values: object, stride: int | None = None) -> Column:
    """One value for all tokens, or an array with a stride between whose elements lies NaN; 0: of its first element."""
    values = np.float32(values)
    if values.ndim == 0:
        return Column(None, 0, values)
    spread = np.full(max(values.size * max(stride, 1), 1), np.nan, np.float32)
    spread[: values.size * max(stride, 1) : max(stride, 1)] = values
    out = Column(spread.ctypes.data, stride, np.nan)
    out.array = spread
    return out


def targets(tokens: np.ndarray, shares: np.ndarray | None = None, ignore_index: int = IGNORE) -> Targets:
    """tokens: (N, K)"""
    tokens = np.ascontiguousarray(tokens)
    out = Targets(pointer(tokens), tokens.dtype == np.int64, ignore_index, tokens.shape[1], pointer(shares))
    out.arrays = tokens, shares
    return out


def terms(
    *,
    importance_weights: Column | float = 1.0,
    ref_logprobs: Column | float = 0.0,
    kl_coef: Column | float = 0.0,
    entropy_coef: Column | float = 0.0,
    log_ratio_clamp: Column | float = np.inf,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    kl_type: str | None = None,
    kl_weighted_by_ratio: bool = False,
    entropy: bool = False,
    statistics: bool = False,
) -> Terms:
    columns = [as_column(c) for c in (importance_weights, ref_logprobs, kl_coef, entropy_coef, log_ratio_clamp)]
    flags = KLS.index(kl_type) - 1, kl_weighted_by_ratio, entropy, statistics
    out = Terms(*columns, label_smoothing, z_loss, *flags)
    out.columns = columns
    return out


def as_column(given: Column | float) -> Column:
    return given if isinstance(given, Column) else column(given)


def problem(
    targets: Targets,
    vocab: int,
    objective: int,
    *,
    inputs: tuple[Column | float, ...] = (),
    weights: Column | float = 1.0,
    temperature: Column | float = 1.0,
    softcap: float = 0.0,
    terms_asked: Terms | None = None,
    denominator: Column | float = 1.0,
    all_logprobs: bool = False,
    plain: bool = True,
) -> Problem:
    columns = [as_column(c) for c in (*inputs, temperature, weights, denominator)]
    *in_columns, temperature, weights, denominator = columns
    asked = terms() if terms_asked is None else terms_asked
    out = Problem(
        targets, Transform(temperature, softcap), weights, objective, (Column * MAX_INPUTS)(*in_columns), asked,
        denominator, vocab, all_logprobs, plain,
    )  # fmt: skip
    out.alive = columns, targets, asked
    return out
