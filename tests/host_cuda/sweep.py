"""python sweep.py LIBRARY CASES [FIRST]: the device code, compiled for the CPU, over the cases that draw.py has made.

Everything outside the rows is NaN: a read beyond a row turns a number into NaN, a write beyond it leaves a trace. Under
AddressSanitizer those bytes and the rows that must not be read are poisoned, too. Exits with 1 and the case at the
first difference. FIRST: only so many cases.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import mmap
import pickle
import sys
from pathlib import Path

import numpy as np
import structs
from structs import BFLOAT16, FLOAT16, FLOAT32, IGNORE, STORAGE, column, pointer, problem, targets, terms


class Wrong(Exception):
    pass


# ---- memory ----------------------------------------------------------------------------------------------------------

_process = ctypes.CDLL(None)
_sanitized = hasattr(_process, "__asan_poison_memory_region")


def poison(start: int, end: int, on: bool) -> None:
    if _sanitized and end > start:
        change = getattr(_process, "__asan_poison_memory_region" if on else "__asan_unpoison_memory_region")
        change(ctypes.c_void_p(start), ctypes.c_size_t(end - start))


def decode(bits: np.ndarray, dtype: int) -> np.ndarray:
    if dtype == BFLOAT16:
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return bits.view(np.float32 if dtype == FLOAT32 else np.float16).astype(np.float64)


def encode(values: np.ndarray, dtype: int) -> np.ndarray:
    """Rounded; of bfloat16 towards 0."""
    values = np.float32(values)
    if dtype == BFLOAT16:
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.view(np.uint32) if dtype == FLOAT32 else values.astype(np.float16).view(np.uint16)


class Matrix:
    """(N, V) in a buffer of its own that ends with the last row. layout: phase, inner, outer gap, inner gap."""

    def __init__(self, n, vocab, dtype=FLOAT32, layout=(0, 1 << 20, 0, 0), bits=None):
        phase, inner, outer_gap, inner_gap = layout
        inner_stride = vocab + inner_gap
        outer_stride = inner * inner_stride + outer_gap
        starts = [phase + r // inner * outer_stride + r % inner * inner_stride for r in range(n)]
        self.vocab, self.dtype, self.starts = vocab, dtype, starts
        item = np.dtype(STORAGE[dtype]).itemsize
        size = starts[-1] + vocab if n else phase
        self._raw = raw = np.full(size * item + 16, 0xFF, np.uint8)
        self.buffer = raw[-raw.ctypes.data % 16 :][: size * item].view(STORAGE[dtype])
        self.rows = [self.buffer[s : s + vocab] for s in starts]
        self.arg = structs.Rows(
            self.buffer.ctypes.data + phase * item, dtype, n, vocab, inner, outer_stride, inner_stride
        )
        self.arg.alive = raw
        if bits is not None:
            for row, values in zip(self.rows, bits, strict=True):
                row[:] = values

    @classmethod
    def of(cls, values, dtype=FLOAT32):
        return cls(*np.shape(values), dtype, bits=encode(np.float32(values), dtype))

    def matrix(self):
        return np.stack([decode(row, self.dtype) for row in self.rows])

    def gaps_intact(self):
        nan = np.iinfo(self.buffer.dtype).max
        buffer = self.buffer.copy()
        for start in self.starts:
            buffer[start : start + self.vocab] = nan
        return bool((buffer == nan).all())

    def guard(self, unread, on=True):
        """Poison what must not be read: the gaps, and the rows in `unread`."""
        end = self._raw.ctypes.data
        for row, skip in zip(self.rows, unread, strict=True):
            poison(end, row.ctypes.data, on)
            end = row.ctypes.data + row.nbytes
            if skip:
                poison(row.ctypes.data, end, on)
        poison(end, self._raw.ctypes.data + self._raw.size, on)


def nan(*shape):
    return np.full(shape, np.nan, np.float32)


# ---- the stages, each with its outputs -------------------------------------------------------------------------------


def divided_by(asked, loss):
    """A mean's normaliser waits where the loss will be: csrc/bindings.h."""
    if not asked.denominator.data:
        return asked
    loss[0] = ctypes.c_float.from_address(asked.denominator.data).value
    asked = structs.Problem.from_buffer_copy(asked)
    asked.denominator.data = pointer(loss)
    return asked


def one_pass(module, logits, grad, asked, chip=None, averages=False):
    """(loss, row_losses, logprobs). chip: by the engine on chip, in this shape.
    averages: the launch forms the mean's normaliser."""
    n, k = logits.n, asked.targets.num
    loss, row_losses, logprobs = nan(1), nan(n), nan(n) if asked.plain else nan(k + 1, n)
    asked = divided_by(asked, loss)
    if averages:
        loss[0] = np.nan
    launch = module.loss_and_grad if chip is None else functools.partial(module.on_chip, chip)
    launch(
        logits=logits, grad=grad, problem=asked, logprobs=structs.LogprobsTable(pointer(logprobs), n, k),
        row_losses=pointer(row_losses), loss=pointer(loss), averages=averages,
    )  # fmt: skip
    return loss, row_losses, logprobs


def stats(module, logits, asked):
    n, k = logits.n, asked.targets.num
    out = nan(3 if asked.plain else k + 6 if asked.terms.statistics else k + 4, n)
    module.stats(logits=logits, problem=asked, stats=structs.StatsTable(pointer(out), n, k))
    return out


def objective(module, table, asked, reduce=True, averages=False):
    """(loss, row_losses, logprobs, coefficients). averages: as above."""
    n, k = table.shape[1], asked.targets.num
    loss, row_losses = nan(1), nan(n)
    logprobs = nan(n) if asked.plain else nan(k + 4 if asked.terms.statistics else k + 1, n)
    asked = divided_by(asked, loss) if reduce else asked
    if averages:
        loss[0] = np.nan
    coefficients = nan(1 if asked.plain else 4, n)
    module.objective(
        n=n, problem=asked, stats=structs.StatsTable(pointer(table), n, k),
        logprobs=structs.LogprobsTable(pointer(logprobs), n, k), row_losses=pointer(row_losses),
        coefficients=structs.CoefficientsTable(pointer(coefficients), n), loss=pointer(loss) if reduce else None,
        averages=averages,
    )  # fmt: skip
    return loss, row_losses, logprobs, coefficients


def gradient(module, logits, grad, asked, table, coefficients, upstream=1.0):
    n = logits.n
    aim, upstream = structs.Targets.from_buffer_copy(asked.targets), structs.as_column(upstream)
    aim.ignore_index = 0  # callers of grad need not know it: the coefficient is 0
    table, coefficients = np.float32(table), np.float32(coefficients)
    module.grad(
        logits=logits, grad=grad, targets=aim, transform=asked.transform,
        stats=structs.StatsTable(pointer(table), n, aim.num),
        coefficients=structs.CoefficientsTable(pointer(coefficients), n), upstream=upstream,
        plain=len(coefficients) == 1,
    )  # fmt: skip


# ---- cases -----------------------------------------------------------------------------------------------------------


class Case:
    def __init__(self, module, drawn):
        self.module = module
        vars(self).update(drawn)
        self.ways = {"two sweeps": None, "on chip": structs.Chip(*self.chip)}
        if self.pair:
            self.ways["pair"] = structs.Chip(*self.pair, team=2)

    def problem(self, at=slice(None), denominator=None, statistics=False):
        """Of some of the rows. statistics: with them, too."""

        def some(given):
            values, stride = given
            if values.ndim == 0:
                return column(values)
            return column(np.repeat(values[:1], self.n)[at] if stride == 0 else values[at], stride)

        shares = None if self.shares is None else np.ascontiguousarray(self.shares[at])
        asked = {key: some(value) if isinstance(value, tuple) else value for key, value in self.terms.items()}
        if statistics:
            asked |= {"entropy": True, "statistics": True}
        return problem(
            targets(self.targets[at], shares), self.vocab, self.module.objectives.index(self.objective),
            inputs=tuple(some(c) for c in self.inputs), weights=some(self.weights),
            temperature=some(self.temperature), softcap=self.softcap, terms_asked=terms(**asked),
            denominator=some(self.denominator) if denominator is None else denominator,
            all_logprobs=self.all_logprobs, plain=self.plain and not statistics,
        )  # fmt: skip

    def matrices(self):
        logits = Matrix(self.n, self.vocab, self.dtype, self.layout, self.bits)
        return logits, logits if self.in_place else Matrix(self.n, self.vocab, self.dtype, self.grad_layout)

    def run(self, descending):
        """What the launches write."""
        module, n = self.module, self.n
        module.configure(*self.device, descending)
        out, asked = {}, self.problem()
        out["normaliser"] = normaliser = nan(1)
        module.normaliser(n=n, targets=asked.targets, weights=asked.weights, normaliser=pointer(normaliser))
        self.in_use = structs.Column(pointer(normaliser), 0, np.nan) if self.mean else None
        asked = self.problem(denominator=self.in_use)

        for way, chip in self.ways.items():
            logits, out[f"{way} loss_and_grad"] = self.matrices()
            logits.guard(~self.reads & (not self.in_place))
            averages = self.mean and (chip is None or n > 0)
            loss, row_losses, logprobs = one_pass(
                module, logits.arg, out[f"{way} loss_and_grad"].arg, asked, chip, averages
            )
            out |= {f"{way} loss": loss, f"{way} row_losses": row_losses, f"{way} logprobs": logprobs}
            logits.guard(~self.reads, on=False)

        logits, out["grad"] = self.matrices()
        logits.guard(~self.reads)
        out["stats"] = stats(module, logits.arg, asked)
        if "statistics stats" in self.want:
            observed = self.problem(denominator=self.in_use, statistics=True)
            out["statistics stats"] = table = stats(module, logits.arg, observed)
            out["statistics logprobs"] = objective(module, table, observed, averages=self.mean)[2]
        logits.guard(~self.reads, on=False)
        seen = objective(module, out["stats"], asked, averages=self.mean)
        out |= zip(("loss", "row_losses", "logprobs", "coefficients"), seen, strict=True)
        upstream, stride = self.upstream
        factors = upstream[:1] if stride == 0 else upstream
        idle = (out["coefficients"] == 0).all(0) | (factors == 0)
        logits.guard(idle & (not self.in_place))
        gradient(
            module, logits.arg, out["grad"].arg, asked, out["stats"], out["coefficients"], column(upstream, stride)
        )
        logits.guard(idle, on=False)

        out["scale"] = grad = Matrix(n, self.vocab, self.dtype, self.grad_layout, self.bits)
        scale = np.float32([1.0])
        module.scale(grad=grad.arg, scale=pointer(scale))
        if any((row != bits).any() for row, bits in zip(grad.rows, self.bits, strict=True)):
            raise Wrong("scale: changed the gradient, and the scale is 1")
        scale[:] = 2.5
        module.scale(grad=grad.arg, scale=pointer(scale))
        return out

    def check(self):
        out, descending = (self.run(d) for d in (False, True))
        for name, x in out.items():
            y = descending[name]
            x, y = (x.buffer, y.buffer) if isinstance(x, Matrix) else (x, y)
            if x.tobytes() != y.tobytes():
                raise Wrong(f"{name}: depends on the order of threads")
        for name, got in out.items():
            way = next((way for way in self.ways if name.startswith(way)), "")
            want = self.want[name.removeprefix(way).strip()]
            if not isinstance(got, Matrix):
                close(name, got, *want)
                continue
            if got.rows:
                close(name, got.matrix(), *want)
            if not got.gaps_intact():
                raise Wrong(f"{name}: wrote outside the rows")
            for row, active in zip(got.rows, self.active, strict=True):
                if name != "scale" and not active and row.any():
                    raise Wrong(f"{name}: an inactive row is not +0")
        read = np.flatnonzero(self.reads)
        if self.n > 1 and read.size:
            self.check_alone(out, int(read[self.seed % read.size]))

    def check_alone(self, out, r):
        """A row that is the only one of its batch, elsewhere in memory and at the same phase, gets the same bits."""
        at = slice(r, r + 1)
        asked = self.problem(at, self.in_use)
        one = lambda matrix: Matrix(  # noqa: E731
            1, self.vocab, self.dtype, (matrix.starts[r] % (16 // matrix.buffer.itemsize), 1, 0, 0), self.bits[at]
        )
        together = Matrix(self.n, self.vocab, self.dtype, self.layout)
        same = {}
        for way, chip in self.ways.items():
            of_all = out[f"{way} loss_and_grad"]
            logits = one(of_all if self.in_place else together)
            grad = logits if self.in_place else one(of_all)
            _, row_losses, logprobs = one_pass(self.module, logits.arg, grad.arg, asked, chip)
            same |= {
                f"{way} row_losses": (row_losses, out[f"{way} row_losses"][at]),
                f"{way} logprobs": (logprobs, out[f"{way} logprobs"][..., at]),
                f"{way} loss_and_grad": (grad.rows[0], of_all.rows[r]),
            }
        logits = one(together)
        same["stats"] = stats(self.module, logits.arg, asked), out["stats"][:, at]
        if "statistics stats" in out:
            observed = self.problem(at, self.in_use, statistics=True)
            same["statistics stats"] = stats(self.module, logits.arg, observed), out["statistics stats"][:, at]
        for name, (alone, together) in same.items():
            if alone.tobytes() != np.ascontiguousarray(together).tobytes():
                raise Wrong(f"{name}: row {r} of {self.n} is not what it is alone")


def close(name, got, want, rtol=0.0, atol=0.0):
    got, want = np.broadcast_arrays(np.asarray(got, np.float64), np.asarray(want, np.float64))
    with np.errstate(invalid="ignore"):
        fine = (np.abs(got - want) <= atol + rtol * np.abs(want)) | (got == want) | (np.isnan(got) & np.isnan(want))
        fine |= np.isinf(atol)
    if not fine.all():
        i = tuple(int(k) for k in np.argwhere(~fine)[0])
        raise Wrong(f"{name} {list(i)}: {got[i]!r}, not {want[i]!r}; {(~fine).sum()} of {fine.size} elements")


# ---- single cases, by hand: what the random ones would meet too rarely -----------------------------------------------


def softmax(x):
    e = np.exp(np.float64(x))
    return e / e.sum(-1, keepdims=True)


def asked_for(module, tokens, vocab, name="cross_entropy", **options):
    return problem(targets(np.reshape(tokens, (-1, 1))), vocab, module.objectives.index(name), **options)


def many_rows(module):
    """More rows than a grid has blocks in its smaller dimensions; 2 processors loop over them."""
    n, vocab = 66_001, 3
    module.configure(2, 1 << 20)
    logits, grad = Matrix.of(np.random.default_rng(0).normal(0, 1, (n, vocab))), Matrix(n, vocab)
    x = logits.matrix()
    table = np.float32([np.zeros(n), np.exp(x[:, 1:]).sum(1), x[:, 0]])
    gradient(module, logits.arg, grad.arg, asked_for(module, np.zeros(n, np.int64), vocab), table, np.ones((1, n)))
    close("grad", grad.matrix(), [1, 0, 0] - softmax(x), 1e-5, 1e-6)
    scale = np.float32([2.0])
    module.scale(grad=grad.arg, scale=pointer(scale))
    close("scale", grad.matrix(), 2 * ([1, 0, 0] - softmax(x)), 1e-5, 2e-6)


def far_rows(module, chip):
    """Rows more than 2^31 elements apart, in memory that is reserved and not filled."""
    vocab, stride, n = 17, 2**31 + 24, 2
    memory = mmap.mmap(-1, (stride + 64) * 2, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    elements = np.frombuffer(memory, np.uint16)
    bits = (np.float32(np.random.default_rng(0).normal(0, 1, (n, vocab))).view(np.uint32) >> 16).astype(np.uint16)
    for r in range(n):
        elements[r * stride : r * stride + vocab] = bits[r]
    module.configure(1, 1 << 20)
    rows = structs.Rows(elements.ctypes.data, BFLOAT16, n, vocab, 1, stride, 0)
    _, _, logprobs = one_pass(module, rows, rows, asked_for(module, np.zeros(n, np.int32), vocab), chip)
    p = softmax(decode(bits, BFLOAT16))
    close("logprobs", logprobs, np.log(p[:, 0]), 1e-5)
    for r in range(n):
        got = decode(elements[r * stride : r * stride + vocab], BFLOAT16)
        close("grad", got, p[r] - (np.arange(vocab) == 0), 2.0**-8, 1e-6)


def unreadable_rows(module, chip):
    """Masked rows lie in pages that can't be read: a read ends the process."""
    n, vocab = 4, mmap.PAGESIZE // 4
    module.configure(2, 1 << 20)
    memory = mmap.mmap(-1, n * mmap.PAGESIZE)
    x = np.frombuffer(memory, np.float32).reshape(n, vocab)
    x[:] = np.random.default_rng(0).normal(0, 1, x.shape)
    address = x.ctypes.data
    if _process.mprotect(ctypes.c_void_p(address + mmap.PAGESIZE), ctypes.c_size_t(2 * mmap.PAGESIZE), 0) != 0:
        raise OSError("mprotect")
    logits, grad = structs.Rows(address, FLOAT32, n, vocab, n, 0, vocab), Matrix(n, vocab)
    asked = asked_for(module, np.int64([5, IGNORE, 5, 5]), vocab, weights=column([1.0, 1.0, 0.0, 1.0], 1))
    _, row_losses, logprobs = one_pass(module, logits, grad.arg, asked, chip)
    table = stats(module, logits, asked)
    gradient(module, logits, grad.arg, asked, table, [[1.0, 0.0, 0.0, 1.0]])
    close("stats", table[:, 1:3], 0)
    if grad.rows[1].any() or grad.rows[2].any() or row_losses[1:3].any() or logprobs[1:3].any():
        raise Wrong("a masked row left a trace")


def extremes(module, chip):
    module.configure(1, 1 << 20)
    x, nan, inf = [0.0, 1.0, 2.0], float("nan"), float("inf")
    zero, bad, p = [0.0] * 3, [nan] * 3, softmax(x)

    def expect(what, loss, grad, logp, *, token=0, **options):
        rows = Matrix.of([x])
        got, _, logprobs = one_pass(
            module, rows.arg, rows.arg, asked_for(module, np.int64([token]), 3, **options), chip
        )
        close(what + " loss", got[0], loss, 1e-5)
        close(what + " grad", rows.matrix()[0], grad, 1e-5)
        close(what + " logprob", logprobs[0], logp, 1e-5)

    def ppo(*inputs):
        return {"name": "ppo", "inputs": (*inputs, inf, inf, inf)}

    logp = np.log(p[0])
    expect("all masked", 0, zero, 0, weights=0.0, denominator=0.0)
    expect("masked, bad temperature", 0, zero, 0, token=IGNORE, temperature=0.0)
    expect("bad temperature", nan, bad, nan, temperature=-1.0)
    expect("clipped, exp overflows", -1.2, zero, logp, **ppo(-inf, 1.0, 0.8, 1.2))
    expect("clipped, denominator 0", -inf, zero, logp, **ppo(-100, 1.0, 0.8, 1.2), denominator=0.0)
    expect("infinite temperature", np.log(3), zero, -np.log(3), temperature=inf)
    expect("plain", -logp, p - [1, 0, 0], logp)

    def two_phase(coefficient, upstream, token=0):
        rows, table = Matrix.of([x]), [[2.0], [np.exp(-1) + 1], [nan if token == 3 else 0.0]]
        asked = asked_for(module, np.int64([token]), 3)
        gradient(module, rows.arg, rows.arg, asked, table, [[coefficient]], upstream)
        return rows.matrix()[0]

    close("grad", two_phase(2.0, 3.0), 6 * ([1, 0, 0] - p), 1e-6)
    close("grad, nan upstream of an idle token", two_phase(0.0, nan), zero)
    close("grad, upstream 0", two_phase(inf, 0.0), zero)
    close("grad, ignored", two_phase(0.0, 1.0, IGNORE), zero)
    close("grad, target outside", two_phase(1.0, 1.0, 3), bad)

    rows, scale = Matrix.of([[0.0, 1.0, -2.0]]), np.float32([inf])
    module.scale(grad=rows.arg, scale=pointer(scale))
    close("scale by inf", rows.matrix()[0], [0, inf, -inf])

    # no reduction: the coefficients are per token
    _, row_losses, _, coefficients = objective(
        module, np.float32([[2.0], [1.0], [1.0]]), asked_for(module, np.int64([0]), 2, weights=3.0), reduce=False
    )
    close("no reduction", [row_losses[0], coefficients[0, 0]], [3 * np.log1p(np.e), -3], 1e-6)
    try:
        module.scale(grad=structs.Rows(0, FLOAT32, 1, 2**31, 1, 0, 0), scale=pointer(scale))
    except RuntimeError:
        return
    raise Wrong("a vocabulary of 2^31 was not refused")


def lone_class(module, chip):
    """V is 1: the others have no mass, and no temperature is too bad to be seen."""
    module.configure(1, 1 << 20)
    for plain in (True, False):
        for temperature, want in ((1.0, 0.0), (0.01, 0.0), (0.0, np.nan), (-1.0, np.nan)):
            for x in (5.0, -3e38, 3e38, np.inf, -np.inf, np.nan):
                rows = Matrix.of([[x]])
                asked = asked_for(
                    module, np.int64([0]), 1, temperature=temperature, plain=plain, terms_asked=terms(entropy=True)
                )
                want_here = want if np.isfinite(x) else np.nan
                loss, _, logprobs = one_pass(module, rows.arg, rows.arg, asked, chip)
                what = f"V = 1, x = {x}, T = {temperature}, plain = {plain}"
                close(what, [loss[0], *logprobs.ravel()[: 1 if plain else 2], rows.matrix()[0, 0]], want_here)


def sure_targets(module, chip):
    """The exact tail: loss and gradient of targets of which every digit of 1 - p counts."""
    vocab, rng = 100, np.random.default_rng(0)
    module.configure(1, 1 << 20)
    gaps = np.concatenate((np.arange(-2.0, 60.0, 2.0), [80.0, 85.0]))
    n = len(gaps)
    for temperature in (0.5, 1.0, 2.0):
        x = np.float32(rng.normal(0, 1, (n, vocab)))
        token = rng.integers(0, vocab, n)
        at = np.arange(n), token
        x[at] = -np.inf
        x[at] = np.float32(x.max(1) + gaps * temperature)
        z = np.float64(x) / temperature
        others = z.copy()
        others[at] = -np.inf
        behind = np.logaddexp.reduce(others, axis=1) - z[at]
        logp, rest = -np.logaddexp(0, behind), np.exp(-np.logaddexp(0, -behind))
        tolerance = 2e-6 + 3e-7 * np.abs(gaps)
        tiny = np.finfo(np.float32).tiny
        for plain in (True, False):
            for name, sign in (("cross_entropy", -1.0), ("logprobs", 1.0)):
                rows = Matrix.of(x)
                asked = asked_for(module, token, vocab, name, temperature=temperature, plain=plain)
                _, row_losses, logprobs = one_pass(module, rows.arg, rows.arg, asked, chip)
                table = stats(module, Matrix.of(x).arg, asked)
                _, two_phase, _, coefficients = objective(module, table, asked)
                again = Matrix.of(x)
                gradient(module, again.arg, again.arg, asked, table, coefficients)
                close("sure, logprob", logprobs if plain else logprobs[0], logp, tolerance, tiny)
                for what, losses, grad in (("one pass", row_losses, rows), ("two phase", two_phase, again)):
                    close(f"sure, {what}, loss", losses, sign * logp, tolerance, tiny)
                    close(f"sure, {what}, target", grad.matrix()[at], sign * rest / temperature, tolerance, tiny)


def far_rows_and_masks(module, chip):
    """Where a fold of scale and maximum has its limits: rows far from 0, a whole thread's share masked, bad scales."""
    module.configure(1, 1 << 20)
    vocab, rng = 700, np.random.default_rng(0)
    lowest = float(np.finfo(np.float32).min)
    near = rng.normal(0, 2, vocab)
    rows = {f"{offset:g} off": near + offset for offset in (3e4, 1.8e5, -1.8e5, 2e5, 3e6, -3e6)}
    rows |= {f"all {x:g}": np.full(vocab, x) for x in (1e6, -1e9, 1e30, -1e30, lowest, -lowest / 2)}
    for mask in (-1e4, -1e9, -1e30, lowest):
        for kept in (1, 5, vocab // 8, vocab - 1):
            rows[f"{mask:g} but for the last {kept}"] = np.where(np.arange(vocab) < vocab - kept, mask, near)
    rows["one highest"] = np.where(np.arange(vocab) == 3, -lowest / 2, near)
    rows["one lowest among -inf"] = np.where(np.arange(vocab) == vocab - 1, lowest, -np.inf)
    for temperature in (1e-4, 1.0, 1e20):
        for i, (what, x) in enumerate(rows.items()):
            if np.abs(x[np.isfinite(x)]).max() / temperature > 3e38:
                continue
            token = (0, vocab - 1, 3)[i % 3]
            matrix = Matrix.of([x])
            asked = asked_for(module, np.int64([token]), vocab, temperature=temperature)
            _, _, logprobs = one_pass(module, matrix.arg, matrix.arg, asked, chip)
            t = np.float64(np.float32(temperature))
            z = np.float64(np.float32(x)) / t
            d = z - z.max()
            gap = np.minimum(np.abs(d), 104)
            case = f"{what}, T = {temperature}, target {token}"
            logp = d[token] - np.log(np.exp(d).sum())
            close(f"{case}, logprob", logprobs[0], logp, 2e-6 + 3e-7 * gap[token], 1e-6)
            want = (softmax(d) - (np.arange(vocab) == token)) / t
            close(f"{case}, gradient", matrix.matrix()[0], want, 2e-6 + 3e-7 * gap, 3e-7 / t)


def softcaps(module, chip):
    """Chunks near 0, far from it on one side or both, and mixed; caps and temperatures at which each is a matter. In
    float32, whose levels are kept on chip, and in 16 bits; with entropies and with nothing but the mass."""
    softcapped(module, chip, FLOAT32, 1300, 1290, entropy=True)  # in the third chunk: the first two are whole
    if chip is None or chip.team == 2:  # levels are kept, and moments left out, by blocks of their own on chip
        return
    softcapped(module, chip, FLOAT32, 1300, 1290, entropy=False)
    softcapped(module, chip, BFLOAT16, 2600, 2580, entropy=True)
    softcapped(module, chip, FLOAT16, 2600, 2580, entropy=False)
    softcapped(module, chip, FLOAT32, 1300, 1290, entropy=False, smoothing=0.125)


def softcapped(module, chip, dtype, vocab, token, entropy, smoothing=0.0):
    module.configure(1, 1 << 20)
    rng = np.random.default_rng(0)
    normal, few = rng.normal(0, 1, vocab), np.arange(vocab) % 128 == 77
    shapes = {
        "near": normal * 0.1, "wide": normal, "high": normal * 0.05 + 0.7, "low": normal * 0.05 - 0.7,
        "few high": normal * 0.1 + 0.9 * few, "few low": normal * 0.1 - 0.9 * few,
        "rising": np.linspace(-0.5, 0.5, vocab), "all high": normal * 0.001 + 0.555, "far": normal * 4,
    }  # fmt: skip
    for cap, temperature in (
        (1e-4, 1.0),
        (1e-5, 1e-5),
        (0.3, 0.01),
        (30.0, 1.0),
        (30.0, 0.1),
        (30.0, 0.527),  # of all high ones, 2^124 of what is counted from the lowest: too much if added up
        (1e4, 100.0),
        (1e6, 1e5),
    ):
        if dtype == FLOAT16 and not 1e-2 < cap < 3e4:
            continue
        for what, shape in shapes.items():
            matrix = Matrix.of([shape * cap], dtype)
            x = matrix.matrix()[0]
            asked = asked_for(
                module, np.int64([token]), vocab, softcap=cap, temperature=temperature, plain=False,
                terms_asked=terms(entropy=entropy, entropy_coef=0.5 if entropy else 0.0, label_smoothing=smoothing),
            )  # fmt: skip
            loss, _, logprobs = one_pass(module, matrix.arg, matrix.arg, asked, chip)
            t, c = np.float64(np.float32(temperature)), np.float64(np.float32(cap))
            tanh = np.tanh(x / c)
            d = c * tanh / t - (c * tanh / t).max()
            p, log_p, is_target = softmax(d), d - np.log(np.exp(d).sum()), np.arange(vocab) == token
            error, case = 2e-6 + c / t * 8e-7, f"{what}, cap {cap}, T = {temperature}, {vocab} of type {dtype}"
            close(f"{case}, logprob", logprobs[0], log_p[token], error, error)
            h, coefficient = -(p * log_p).sum(), 0.5 if entropy else 0.0
            close(f"{case}, entropy", logprobs[1], h if entropy else 0, error, 3 * error)
            if smoothing:
                spread = -log_p.mean()
                close(f"{case}, loss", loss, spread * smoothing - log_p[token] * (1 - smoothing), error, 3 * error)
            by_z = p - is_target * (1 - smoothing) - smoothing / vocab + coefficient * p * (log_p + h)
            size = p + is_target + p * (1 + np.abs(log_p) + h)
            got, slope = matrix.matrix()[0] * t, 1 / np.cosh(x / c) ** 2  # of 1 - tanh^2 nothing is left far out
            stored = {FLOAT32: (0, 0), BFLOAT16: (2**-8, 1e-38), FLOAT16: (2**-11, 2**-24)}[dtype]
            close(f"{case}, gradient", got, slope * by_z, stored[0], slope * (4 * error * size + 1e-7) + stored[1] * t)


def rows_of_two_lengths(module, chip):
    """By its phase a row has 127 vectors or 128, which is where a warp's share ends, and one block has them all."""
    n, vocab = 6, 513
    module.configure(1, 1 << 20)
    for descending, cap, token in itertools.product((False, True), (0.0, 30.0), (0, vocab - 1)):
        module.set(descending=descending)
        logits = Matrix.of(np.random.default_rng(0).normal(0, 1, (n, vocab)))
        x = logits.matrix()
        z, slope = (cap * np.tanh(x / cap), 1 / np.cosh(x / cap) ** 2) if cap else (x, 1.0)
        asked = asked_for(module, np.full(n, token), vocab, softcap=cap, plain=cap == 0, terms_asked=terms())
        logits.guard([False] * n)
        one_pass(module, logits.arg, logits.arg, asked, chip)
        logits.guard([False] * n, on=False)
        close(f"grad, cap {cap}", logits.matrix(), slope * (softmax(z) - (np.arange(vocab) == token)), 1e-5, 1e-6)


def mean_of_many(module, chip):
    """Of more tokens than a block has threads, by blocks, and pairs of them, that change places from turn to turn."""
    n, vocab = 300, 9
    rng, token = np.random.default_rng(0), np.zeros(n, np.int64)
    token[rng.random(n) < 0.5] = IGNORE
    weights = np.float32(rng.uniform(0.5, 2, n))
    x = np.float32(rng.normal(0, 1, (n, vocab)))
    active, p = token != IGNORE, softmax(x)
    normaliser = np.float64(weights)[active].sum()
    scale = np.where(active, weights / normaliser, 0)
    want = -(scale * np.log(p[:, 0])).sum(), scale[:, None] * (p - (np.arange(vocab) == 0))
    for multiprocessors in (1, 7):
        module.configure(multiprocessors, 1 << 20)
        logits = Matrix.of(x)
        asked = asked_for(module, token, vocab, weights=column(weights, 1), denominator=column([0.0], 1))
        table = stats(module, logits.arg, asked)
        two_phase, _, _, coefficients = objective(module, table, asked, averages=True)
        loss, _, _ = one_pass(module, logits.arg, logits.arg, asked, chip, averages=True)
        close("mean of many, loss", [loss[0], two_phase[0]], want[0], 1e-5)
        close("mean of many, coefficients", coefficients[0], -scale, 1e-5)
        close("mean of many, gradient", logits.matrix(), want[1], 1e-5, 1e-9)


def whole_lines(module, chip):
    """A warp's stores are of four lines of 128 bytes each, wherever rows begin, but for those of a block's first warp,
    or on chip for the first of four."""
    # With 1024 vectors, wherever it begins, a row has no chunk that is not whole: the n-th store is that of all lanes.
    # The halves of a pair have one.
    vocab, n = 8 * 1024 + 7, 5
    if chip is not None and chip.team == 2:
        return
    module.configure(1, 1 << 20)
    rng = np.random.default_rng(0)
    bits = rng.integers(0x3F00, 0x4000, (n, vocab)).astype(np.uint16)  # bfloat16 from 0.5 to 2

    def rows(phase):
        return Matrix(n, vocab, BFLOAT16, (phase, 1 << 20, 0, 0), bits)

    def read(logits, grad):
        one_pass(module, logits.arg, grad.arg, asked_for(module, np.zeros(n, np.int64), vocab), chip)

    def masked(logits, grad):
        one_pass(module, logits.arg, grad.arg, asked_for(module, np.full(n, IGNORE), vocab), chip)

    def scaled(_, grad):
        module.scale(grad=grad.arg, scale=pointer(np.float32([2.0])))

    least = 2 * vocab * n / 128
    warps = 8 if chip is None else chip.threads // 32
    for run, of in ((read, warps if chip is None else 4), (masked, warps), (scaled, 8)):
        for phase in (0, 8, 24):  # of the gradient: with the logits' phase modulo 16 bytes, and any modulo 128
            logits, grad = rows(0), rows(phase)
            lines = module.lines_of(lambda run=run, logits=logits, grad=grad: run(logits, grad))
            if lines > (1.02 + 0.25 / of) * least:
                raise Wrong(f"{run.__name__}, {phase}: {lines} lines are stored to, and there are {least:.0f}")


def surest_target(module, chip):
    """1 - p just above float32's smallest normal number, where e^-gap is below it."""
    vocab, gap = 33013, 97.0
    x = np.zeros((1, vocab), np.float32)
    x[0, 5] = gap
    rest = (vocab - 1) * np.exp(-gap)
    rows = Matrix.of(x)
    loss, _, _ = one_pass(module, rows.arg, rows.arg, asked_for(module, np.int64([5]), vocab), chip)
    close("surest, loss and gradient", [loss[0], rows.matrix()[0, 5]], [rest, -rest], 2e-6 + 3e-7 * gap)


def with_terms(module, chip):
    module.configure(1, 1 << 20)
    nan, inf = float("nan"), float("inf")

    def one_token(x, token, softcap=0.0, temperature=1.0, **asked):
        rows = Matrix.of([x])
        loss, _, _ = one_pass(
            module, rows.arg, rows.arg,
            asked_for(
                module, np.int64([token]), len(x), softcap=softcap, temperature=temperature, terms_asked=terms(**asked),
                plain=False,
            ),
            chip,
        )  # fmt: skip
        return loss[0], rows.matrix()[0]

    loss, grad = one_token([1e38, 0.0, 0.0], 0, label_smoothing=0.5)
    close("huge logits, smoothed loss", loss, 1e38 / 3, 1e-6)
    close("huge logits, smoothed gradient", grad, [1 / 3, -1 / 6, -1 / 6], 1e-6)
    loss, grad = one_token([0.0, 1e38, 0.0], 0, label_smoothing=0.5)
    close("huge other, smoothed loss", loss, 1e38 / 2 + 1e38 / 3, 1e-6)
    close("huge other, smoothed gradient", grad, [-2 / 3, 5 / 6, -1 / 6], 1e-6)
    x = np.float32([1.5, -0.7, 0.3, -2.0]).astype(np.float64)
    z = 1000 * np.tanh(x / 1000)
    loss, _ = one_token(x, 1, 1000.0)
    close("cap far above the logits", loss, np.log(np.exp(z).sum()) - z[1], 1e-6)
    for mask in (-1e4, -1e30, np.finfo(np.float32).min):
        loss, grad = one_token([mask, 3.0, mask], 1, temperature=0.5, z_loss=0.5, entropy=True, entropy_coef=1.0)
        close("others masked, z-loss", loss, 0.5 * 6.0**2, 1e-6)
        close("others masked, z-loss, gradient", grad, [0, 2 * 6.0, 0], 1e-6)
    for mask in (-1e4, -1e6, -1e9):  # a mask's distance is a mask away from the rest, too
        loss, grad = one_token([mask, 3.0, mask], 1, label_smoothing=0.5)
        close("others masked, smoothed", loss, 0.5 * (3 - mask) * 2 / 3, 1e-6)
        close("others masked, smoothed, gradient", grad, [-1 / 6, 1 / 6 + 1 / 6, -1 / 6], 1e-6)

    def two_phase(coefficients, upstream, token=0):
        rows, table = (
            Matrix.of([[0.0, 1.0, 2.0]]),
            [[2.0], [1 + np.exp(-1)], [nan if token == 3 else 0.0], [0.0], [0.0]],
        )
        asked = asked_for(module, np.int64([token]), 3, plain=False)
        gradient(module, rows.arg, rows.arg, asked, table, np.reshape(coefficients, (4, 1)), upstream)
        return rows.matrix()[0]

    p = softmax([0.0, 1.0, 2.0])
    close("terms", two_phase([2, 0, 0, 1], 3.0), 6 * ([1, 0, 0] - p) + 3, 1e-6)
    close("terms, nan upstream of an idle token", two_phase([0, 0, 0, 0], nan), [0, 0, 0])
    close("terms, upstream 0", two_phase([inf, 1, nan, 1], 0.0), [0, 0, 0])
    close("terms, ignored", two_phase([0, 0, 0, 0], 1.0, IGNORE), [0, 0, 0])
    close("terms, target outside", two_phase([0, 0, 1, 0], 1.0, 3), [nan] * 3)
    rows, table = Matrix.of([[0.0, 1.0, 2.0]]), [[2.0], [1 / p[2]], [0.0], [nan], [0.0], [0.0]]
    several = targets(np.int64([[0, 3]]), np.float32([[1, 1]]))
    asked = problem(several, 3, module.objectives.index("cross_entropy"), plain=False)
    gradient(module, rows.arg, rows.arg, asked, table, np.reshape([0, 0, 1, 0], (4, 1)))
    close("terms, one of several targets outside", rows.matrix()[0], [nan] * 3)


def sure_squares(module):
    """log sum_j p_j^2 of a target and one other class, from half of the mass to all of it."""
    module.configure(1, 1 << 20)
    gaps = np.arange(0, 40, 0.25)
    asked = asked_for(
        module, np.zeros(len(gaps), np.int64), 2, "logprobs", plain=False,
        terms_asked=terms(entropy=True, statistics=True),
    )  # fmt: skip
    table = stats(module, Matrix.of(np.stack((gaps, 0 * gaps), 1)).arg, asked)
    got = objective(module, table, asked)[2][2]
    want = np.log1p(np.exp(-2 * gaps)) - 2 * np.log1p(np.exp(-gaps))
    close("sure, squares", got, want, 2e-6 + 3e-7 * gaps)


def ties(module):
    """Of several equal logits the first is the largest, wherever they lie among a block's threads."""
    module.configure(1, 1 << 20)
    lowest = float(np.finfo(np.float32).min)
    for vocab in (2, 70, 700, 3001):
        for value, others in ((5.0, 0.0), (5.0, 5.0), (5.0, 6.0), (lowest, -np.inf), (-np.inf, lowest), (0.0, lowest)):
            for token in {0, 1, vocab // 3, vocab - 1}:
                for rival in {0, 1, vocab // 3 - 1, vocab // 3 + 1, vocab - 1} - {token}:
                    x = np.full(vocab, others)
                    x[[token, rival]] = value
                    asked = asked_for(
                        module, np.int64([token]), vocab, "logprobs", plain=False,
                        terms_asked=terms(entropy=True, statistics=True),
                    )  # fmt: skip
                    table = stats(module, Matrix.of([x]).arg, asked)
                    want = value > -np.inf and np.argmax(np.float32(x)) == token
                    close(f"V = {vocab}, {value} at {token} and {rival}, {others} elsewhere", table[-1], float(want))


def main(library, cases, first=None):
    module = structs.Module(Path(library))
    drawn = pickle.loads(Path(cases).read_bytes())[: None if first is None else int(first)]
    quick = (
        extremes,
        lone_class,
        sure_targets,
        far_rows_and_masks,
        softcaps,
        rows_of_two_lengths,
        mean_of_many,
        whole_lines,
        surest_target,
        with_terms,
        far_rows,
        unreadable_rows,
    )
    chips = None, structs.Chip(32, 1, 0), structs.Chip(64, 2, 40), structs.Chip(32, 1, 8, team=2)
    by_hand = [(f"{f.__name__}, {chip}", lambda f=f, chip=chip: f(module, chip)) for f in quick for chip in chips]
    random = [(f"case {case['seed']}", Case(module, case).check) for case in drawn]
    once = [(f.__name__, lambda f=f: f(module)) for f in (sure_squares, ties)]
    # Random cases first: a bug is found sooner.
    for name, run in [*random, *once, *by_hand, ("many_rows", lambda: many_rows(module))]:
        try:
            run()
        except (Wrong, RuntimeError) as error:
            sys.exit(f"{name}: {error}")
    print(f"{len(drawn)} cases passed")


if __name__ == "__main__":
    main(*sys.argv[1:])
