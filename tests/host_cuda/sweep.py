"""python sweep.py FOLDER CASES: the device code, compiled for the CPU, over shapes, dtypes, alignments and hazards.

FOLDER holds the module that build.py makes. Truth is numpy in float64. Everything outside the rows is NaN: a read
beyond a row turns a number into NaN, a write beyond it leaves a trace. Under AddressSanitizer those bytes and the rows
that must not be read are poisoned, too. Exits with 1 and the case at the first difference.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

import numpy as np

FLOAT32, BFLOAT16, FLOAT16 = range(3)
STORAGE = (np.uint32, np.uint16, np.uint16)
ROUNDING = (0.0, 2.0**-8, 2.0**-10)  # generous: an ulp, not half of one
SMALLEST = (1e-35, 1e-35, 2.0**-24)
IGNORE = -100
FLOOR = float(np.finfo(np.float32).min)

# The inputs, and those that a call may leave out from the end.
OBJECTIVES = {
    "logprobs": ((), ()),
    "cross_entropy": ((), ()),
    "importance_sampling": (("old", "advantage"), ("clamp",)),
    "ppo": (("old", "advantage", "low", "high"), ("clamp", "dual_clip", "delta")),
    "cispo": (("old", "advantage", "low", "high"), ("clamp",)),
    "dro": (("old", "advantage", "beta"), ("clamp",)),
    "sapo": (("old", "advantage", "tau_positive", "tau_negative"), ("clamp",)),
}
KLS = ("k1", "k2", "k3", "abs")
LOWEST = -1000.0


class Wrong(Exception):
    pass


# ---- memory ----------------------------------------------------------------------------------------------------------

_process = ctypes.CDLL(None)
_sanitized = hasattr(_process, "__asan_poison_memory_region")


def poison(start: int, end: int, on: bool) -> None:
    if _sanitized and end > start:
        change = getattr(_process, "__asan_poison_memory_region" if on else "__asan_unpoison_memory_region")
        change(ctypes.c_void_p(start), ctypes.c_size_t(end - start))


def encode(x: np.ndarray, dtype: int) -> np.ndarray:
    x = np.ascontiguousarray(x, np.float32)
    if dtype == FLOAT32:
        return x.view(np.uint32)
    if dtype == FLOAT16:
        return x.astype(np.float16).view(np.uint16)
    bits = x.view(np.uint32).astype(np.uint64)
    return np.where(np.isnan(x), 0x7FFF, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def decode(bits: np.ndarray, dtype: int) -> np.ndarray:
    if dtype == BFLOAT16:
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return bits.view(np.float32 if dtype == FLOAT32 else np.float16).astype(np.float64)


class Rows:
    """(N, V) in a buffer of its own that ends with the last row. layout: phase, inner, outer gap, inner gap."""

    def __init__(self, n, vocab, dtype, layout, matrix=None):
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
        self.arg = (self.buffer.ctypes.data + phase * item, n, inner, outer_stride, inner_stride)
        if matrix is not None:
            for row, values in zip(self.rows, matrix, strict=True):
                row[:] = encode(values, dtype)

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


class Column:
    """A per-token float: one value for all (stride None), or an array with a stride; NaN lies between its elements."""

    def __init__(self, values, stride=None):
        self.values = np.float32(values)
        if stride is None:
            self.arg = (0, 0, float(self.values))
            return
        if stride == 0:
            self.values = np.resize(self.values, 1)
        self._array = np.full(self.values.size * max(stride, 1), np.nan, np.float32)
        self._array[:: max(stride, 1)] = self.values
        self.arg = (self._array.ctypes.data, stride, float("nan"))

    def all(self, n):
        return np.broadcast_to(self.values, n).astype(np.float64)


# ---- cases -----------------------------------------------------------------------------------------------------------

SMALL = [1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 23, 24, 31, 32, 33, 47, 63, 64, 65, 127, 255, 256, 257, 1000, 1023]
LARGE = [1025, 2050, 3001, 4096, 4099, 9000]  # blocks of several warps
LARGEST = 33013  # a block of 1024 threads
HAZARDS = ["nan", "inf", "-inf", "all -inf", "half -inf", "outside", "shifted", "peaked"]


class Case:
    """Everything drawn from the seed."""

    def __init__(self, seed):
        rng = self.rng = np.random.default_rng(seed)
        self.dtype = seed % 3
        self.vocab = int(rng.choice(SMALL if rng.random() < 0.75 else LARGE)) if seed % 60 else LARGEST
        n = self.n = int(rng.integers(0, 13)) if self.vocab < 2000 else 3
        self.mean, self.all_logprobs, self.in_place = (bool(b) for b in rng.random(3) < [0.5, 0.4, 0.4])
        two_level = rng.random() < 0.4
        self.layout = self._layout(two_level)
        self.grad_layout = self.layout if self.in_place or rng.random() < 0.3 else self._layout(two_level)
        self.device = int(rng.choice([1, 2, 5])), int(rng.choice([1 << 12, 1 << 20, 1 << 30]))  # processors, L2
        self.objective = str(rng.choice(list(OBJECTIVES)))
        self.terms = Terms(self) if rng.random() < 0.6 else None
        if self.terms and self.terms.k > 1:
            self.objective = "cross_entropy"
        needed, optional = OBJECTIVES[self.objective]
        inputs = {
            "old": self._column(rng.normal(-5, 2, n)),
            "advantage": self._column(rng.normal(0, 1, n) * (rng.random(n) < 0.8)),
            "low": Column(0.8),
            "high": Column(1.2),
            "beta": Column(0.1),
            "tau_positive": Column(1.0),
            "tau_negative": self._column(rng.uniform(0.5, 2.0, n)),
            "clamp": self._column(rng.uniform(0.5, 5.0, n)),
            "dual_clip": self._column(rng.uniform(1.0, 3.0, n)),
            "delta": self._column(rng.uniform(0.5, 4.0, n)),
        }
        self.inputs = {name: inputs[name] for name in needed + optional[: rng.integers(len(optional) + 1)]}
        self.temperature = self._column(rng.uniform(0.5, 2.0, n))
        self.weights = self._column(rng.uniform(0.25, 2.0, n) * (rng.random(n) < 0.8))
        self.denominator = Column(rng.uniform(0.5, 4.0))
        self.upstream = self._column(rng.uniform(0.5, 4.0, n) * (rng.random(n) < 0.9))
        k = self.terms.k if self.terms else 1
        self.targets = rng.integers(0, self.vocab, (n, k)).astype(rng.choice([np.int32, np.int64]))
        again = rng.random((n, k)) < 0.3
        self.targets[again] = np.broadcast_to(self.targets[:, :1], (n, k))[again]
        logits = rng.normal(0, 3, (n, self.vocab))
        for r in range(n):
            if rng.random() < 0.6:
                self._add_hazard(logits[r], r, rng.choice(HAZARDS))
            if rng.random() < 0.2:
                self.targets[r] = IGNORE
        if k > 1:
            self.targets[rng.random((n, k)) < 0.1] = IGNORE
        if self.terms:
            self.terms.shares[self.targets == IGNORE] = 0
        weights = self.weights.all(n)
        seen = (self.targets != IGNORE).any(1)
        self.reads = seen & (self.all_logprobs | (weights != 0))
        self.active = seen & (weights != 0)
        logits[~self.reads] = np.nan
        self.logits = decode(encode(logits, self.dtype), self.dtype)

    def _layout(self, two_level):
        inner = self.rng.integers(1, 4) if two_level else 1 << 20
        return tuple(int(x) for x in (self.rng.integers(0, 9), inner, *self.rng.integers(0, 10, 2)))

    def _column(self, values):
        return Column(values, int(self.rng.integers(0, 4)))

    def _add_hazard(self, row, r, kind):
        rng, vocab = self.rng, self.vocab
        if kind == "nan":
            row[rng.integers(vocab)] = np.nan
        elif kind == "inf":
            row[rng.integers(vocab)] = np.inf
        elif kind == "-inf":
            row[rng.random(vocab) < 0.5] = -np.inf
        elif kind == "all -inf":
            row[:] = -np.inf
        elif kind == "half -inf":  # all that some threads see
            row[: vocab - 1 - vocab // 8] = -np.inf
        elif kind == "outside":
            k = rng.integers(self.targets.shape[1])
            self.targets[r, k] = rng.choice([vocab, -1, vocab + 1, 2**31 - 1])
            if self.targets.dtype == np.int64 and rng.random() < 0.5:
                self.targets[r, k] = 2**32  # 0 if cut to 32 bits
        elif kind == "shifted":
            row += 3e4
        elif kind == "peaked":
            row[self.targets[r, 0]] = 14.0


class Terms:
    """What a case's loss has beside its objective; the order of `arg` is that of csrc/bindings.h."""

    def __init__(self, case):
        rng, n, column = case.rng, case.n, case._column
        self.softcap = float(rng.choice([0.0, 0.0, 5.0, 30.0]))
        self.entropy = bool(rng.random() < 0.5)
        self.smoothing = float(np.float32(rng.choice([0.0, 0.1])))
        self.z_loss = float(np.float32(rng.choice([0.0, 1e-3])))
        self.k = int(rng.choice([1, 2, 5, 40, 70])) if rng.random() < 0.4 else 1  # a small block has 32 threads
        self.shares = np.ones((n, self.k), np.float32)
        self.shared = self.k > 1 or bool(rng.random() < 0.2)
        if self.shared:
            self.shares[:] = rng.normal(0.5, 1, (n, self.k)) * (rng.random((n, self.k)) < 0.8)
        self.importance, self.ref = column(rng.uniform(0, 2, n)), column(rng.normal(-5, 2, n))
        self.kl_coef, self.entropy_coef = column(rng.normal(0, 1, n)), column(rng.normal(0, 1, n))
        self.clamp = column(rng.uniform(0.5, 5.0, n))
        self.kl = int(rng.integers(-1, len(KLS)))
        self.weighted = bool(rng.random() < 0.5) and "old" in OBJECTIVES[case.objective][0] and self.k == 1

    @property
    def arg_of_grad(self):
        """The softcap and the shares are all that it needs."""
        zero = Column(0.0).arg
        return (self.softcap, False, 0.0, 0.0, self.arg[4], zero, zero, zero, zero, zero, -1, False)

    @property
    def arg(self):
        columns = (self.importance, self.ref, self.kl_coef, self.entropy_coef, self.clamp)
        shares = self.shares.ctypes.data if self.shared else 0
        return (
            self.softcap, self.entropy, self.smoothing, self.z_loss, shares, *(c.arg for c in columns), self.kl,
            self.weighted,
        )  # fmt: skip


def objective(name, x, given):
    """loss and dloss/dx in float64, from the published formulas."""
    if name == "logprobs":
        return x, 1.0
    if name == "cross_entropy":
        return -x, -1.0
    advantage, clamp = given["advantage"], given.get("clamp", np.inf)
    log_ratio = min(max(x - given["old"], -clamp), clamp)
    flows = abs(x - given["old"]) <= clamp
    if name == "dro":
        beta = given["beta"]
        reward = x * advantage if advantage else 0.0
        return beta / 2 * log_ratio**2 - reward, (beta * log_ratio if flows else 0.0) - advantage
    if advantage == 0:
        return 0.0, 0.0
    ratio = np.exp(log_ratio)
    if name == "importance_sampling":
        return -ratio * advantage, -ratio * advantage if flows else 0.0
    if name == "sapo":
        tau = given["tau_positive" if advantage > 0 else "tau_negative"]
        gate, rest = (1 / (1 + np.exp(side * tau * (ratio - 1))) for side in (-1, 1))
        slope = gate * rest * ratio if flows and np.isfinite(ratio) else 0.0
        return -4 / tau * gate * advantage, -4 * slope * advantage
    clipped = min(max(ratio, given["low"]), given["high"])
    if name == "cispo":
        return -clipped * advantage * x, -clipped * advantage
    loss = max(-min(ratio, given.get("delta", np.inf)) * advantage, -clipped * advantage)
    if advantage < 0:
        loss = min(loss, -given.get("dual_clip", np.inf) * advantage)
    unclipped = -ratio * advantage
    return loss, unclipped if loss == unclipped and flows else 0.0


def times(a, b):
    return 0.0 if a == 0 or b == 0 else a * b


def kl(kind, x, ref):
    """The estimate, its derivative by x, the sum of both, and the size of what the estimate is made of."""
    d = x - ref
    if kind == "k1":
        return d, 1.0, d + 1, 1 + abs(d)
    if kind == "k2":
        return d * d / 2, d, d * d / 2 + d, 1 + d * d
    if kind == "abs":
        return abs(d), np.sign(d), abs(d) + np.sign(d), 1 + abs(d)
    inverse = float(np.float32(np.exp(-d)))  # float32 overflows at d = -88
    return inverse + (0.0 if d == -np.inf else d) - 1, 1 - inverse, d, 1 + inverse + abs(d)


def terms_loss(case, r, x, total, lse, entropy, spread):
    """The loss, its derivatives by x, H, lse and zbar, and the size of what the loss and the first are formed of."""
    t, given = case.terms, {name: c.all(case.n)[r] for name, c in case.inputs.items()}
    value, g = objective(case.objective, x, given)
    importance = t.importance.all(case.n)[r]
    value, g = times(importance, value), times(importance, g)
    size = abs(value) + abs(g) * (1 + abs(x))
    h = zeta = s = 0.0
    if t.kl >= 0:
        penalty, slope, by_ratio, parts = kl(KLS[t.kl], x, t.ref.all(case.n)[r])
        if t.weighted:
            log_ratio, clamp = x - given["old"], t.clamp.all(case.n)[r]
            ratio = np.exp(min(max(log_ratio, -clamp), clamp))
            slope = times(ratio, by_ratio if abs(log_ratio) <= clamp else slope)
            penalty, parts = times(ratio, penalty), times(ratio, parts)
        coefficient = t.kl_coef.all(case.n)[r]
        value, g = value + times(coefficient, penalty), g + times(coefficient, slope)
        size += 2 * abs(coefficient) * parts
    if t.entropy:
        coefficient = t.entropy_coef.all(case.n)[r]
        value, h = value - times(coefficient, entropy), -coefficient
        size += abs(coefficient) * (1 + abs(entropy))
    if t.smoothing:
        e = t.smoothing
        value, g, zeta, s = (1 - e) * value + e * total * spread, (1 - e) * g, e * total, -e * total
        size += abs(e * total * spread)
    if t.z_loss:
        value, zeta = value + t.z_loss * total * lse**2, zeta + 2 * t.z_loss * total * lse
        size += abs(t.z_loss * total) * lse**2
    return value, (g, h, zeta, s), size


def reference(case):
    return terms_reference(case) if case.terms else plain_reference(case)


def plain_reference(case):
    n, x = case.n, case.logits
    t, weights, upstream = case.temperature.all(n), case.weights.all(n), case.upstream.all(n)
    inputs = {name: c.all(n) for name, c in case.inputs.items()}
    denominator = weights[case.active].sum() if case.mean else float(case.denominator.values)
    logp, losses, coefficients = np.zeros(n), np.zeros(n), np.zeros(n)
    stats = np.array([np.zeros(n), np.ones(n), np.zeros(n)])
    unit = np.zeros_like(x)  # gradient of logp
    for r in np.flatnonzero(case.reads):
        target = case.targets[r, 0]
        inside = 0 <= target < case.vocab
        top = max(np.fmax.reduce(x[r]), FLOOR)
        e = np.exp((x[r] - top) / t[r])
        stats[:, r] = top, e.sum(), x[r, target] if inside else np.nan
        logp[r] = (stats[2, r] - top) / t[r] - np.log(stats[1, r])
        if case.active[r]:
            given = {name: values[r] for name, values in inputs.items()}
            loss, g = (np.nan, np.nan) if np.isnan(logp[r]) else objective(case.objective, logp[r], given)
            losses[r] = weights[r] * loss
            coefficients[r] = 0 if g == 0 else g * weights[r] / denominator
        unit[r] = -e / stats[1, r] / t[r]
        if inside:
            unit[r, target] += 1 / t[r]
    slope = np.nan_to_num(np.abs(coefficients) / t)[:, None]
    grads = {
        "loss_and_grad": gradient(coefficients, unit),
        "grad": gradient(np.where((coefficients == 0) | (upstream == 0), 0, coefficients * upstream), unit),
    }
    return finish(case, stats, logp, losses, denominator, coefficients) | {
        "loss size": 1 + np.abs(losses),
        "coefficients size": 0.0,
        "logp error": 4e-6,
        "grads": {
            name: (g, 5e-5, 4e-7 * slope * f)
            for (name, g), f in zip(grads.items(), (1, abs(upstream)[:, None]), strict=True)
        },
    }


def finish(case, stats, logp, losses, denominator, coefficients):
    total = losses.sum()
    return {
        "stats": stats,
        "logprobs": logp,
        "row_losses": np.append(losses, denominator),
        "loss": np.array([0.0 if total == 0 and denominator == 0 else total / denominator]),
        "coefficients": coefficients,
    }


def gradient(c, unit):
    return np.where((c == 0)[:, None], 0, c[:, None] * unit)


def terms_reference(case):
    n, x, terms, k, vocab = case.n, case.logits, case.terms, case.terms.k, case.vocab
    t, weights, upstream = case.temperature.all(n), case.weights.all(n), case.upstream.all(n)
    denominator = weights[case.active].sum() if case.mean else float(case.denominator.values)
    cap = terms.softcap

    def capped(x):
        return cap * np.tanh(x / cap) if cap else x

    stats, logprobs, losses, coefficients = np.zeros((k + 4, n)), np.zeros((k + 1, n)), np.zeros(n), np.zeros((4, n))
    stats[1] = 1
    size = np.zeros(n)
    p, d, share = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x)
    total, outside, mean_distance = np.zeros(n), np.zeros(n, bool), np.zeros(n)
    for r in np.flatnonzero(case.reads):
        targets, shares = case.targets[r], terms.shares[r].astype(np.float64)
        inside = (targets >= 0) & (targets < vocab)
        target = np.where(inside, x[r, np.where(inside, targets, 0)], np.nan)
        top = max(np.fmax.reduce(x[r]), FLOOR)
        d[r] = (capped(x[r]) - capped(top)) / t[r]
        e = np.exp(d[r])
        moment = (e * np.maximum(d[r], LOWEST)).sum() if terms.entropy else 0.0
        stats[:, r] = top, e.sum(), *target, moment, d[r].mean() if terms.smoothing else 0.0
        lse = np.log(stats[1, r])
        logp = (capped(target) - capped(top)) / t[r] - lse
        entropy = lse - moment / stats[1, r] if terms.entropy else 0.0
        logprobs[:, r] = *np.where(targets == IGNORE, 0, logp), entropy
        seen, total[r] = (shares[shares != 0] * logp[shares != 0]).sum(), shares.sum()
        outside[r] = (~inside & (shares != 0)).any()
        np.add.at(share[r], targets[inside], shares[inside])
        p[r], mean_distance[r] = e / stats[1, r], moment / stats[1, r]
        if case.active[r]:
            at = (seen, total[r], capped(top) / t[r] + lse, entropy, lse - stats[-1, r])
            loss, by, size[r] = (np.nan, [np.nan] * 4, 0) if np.isnan(seen) else terms_loss(case, r, *at)
            losses[r], size[r] = (
                np.float32(weights[r] * loss),
                np.nan_to_num(size[r] * weights[r] + abs(loss), posinf=np.inf),
            )
            coefficients[:, r] = [np.float32(0 if c == 0 else c * weights[r] / denominator) for c in by]

    def grad(c):
        g, h, zeta, s = c[:, :, None]
        whole, away = total[:, None], np.maximum(d, LOWEST) - mean_distance[:, None]
        slope = (1 - np.tanh(x / cap) ** 2 if cap else 1.0) / t[:, None]
        rows = slope * (g * (share - whole * p) + p * (zeta - h * away) + s / vocab)
        rows[outside] = np.nan
        around = np.abs(g) * (np.abs(share) + np.abs(whole) * p) + p * (np.abs(zeta) + np.abs(h) * (1 + np.abs(away)))
        around = (around + np.abs(s) / vocab) * ((slope * t[:, None] + 0.01) if cap else 1.0) / t[:, None]
        idle = (c == 0).all(0)[:, None]
        infinite = np.isinf(c).any(0)[:, None]  # then inf * 0 is NaN where a p is 0, or is it not yet?
        around = np.where(infinite, np.inf, np.nan_to_num(around))
        return np.where(idle, 0, np.where(infinite, 0, rows)), 5e-6, np.where(idle, 0, 3 * error * around)

    error = 6e-6 + (cap / t.min() * 4e-7 if cap and n else 0.0)  # of z
    c = np.where((coefficients == 0) | (upstream == 0), 0, coefficients * upstream)
    return finish(case, stats, logprobs, losses, denominator, coefficients) | {
        "loss size": size,
        "coefficients size": size / denominator,
        "logp error": error,
        "grads": {"loss_and_grad": grad(coefficients), "grad": grad(c)},
    }


# ---- running and checking --------------------------------------------------------------------------------------------


def run(module, case):
    """What the five functions write."""
    n, vocab, dtype = case.n, case.vocab, case.dtype
    k, terms = case.targets.shape[1], case.terms.arg if case.terms else None
    targets = (case.targets.ctypes.data, case.targets.dtype == np.int64, IGNORE, k)
    index, inputs = module.objectives.index(case.objective), [c.arg for c in case.inputs.values()]
    weights, temperature, denominator = case.weights.arg, case.temperature.arg, case.denominator.arg
    out = {k: np.full(n + 1, np.nan, np.float32) for k in ("one pass row_losses", "row_losses")}
    shapes = {"logprobs": (n,), "coefficients": (n,), "stats": (3, n)}
    if terms:
        shapes = {"logprobs": (k + 1, n), "coefficients": (4, n), "stats": (k + 4, n)}
    shapes |= {"one pass logprobs": shapes["logprobs"], "one pass loss": (1,), "loss": (1,)}
    out |= {name: np.full(shape, np.nan, np.float32) for name, shape in shapes.items()}
    p = {k: v.ctypes.data for k, v in out.items()}

    def logits_and_grad():
        logits = Rows(n, vocab, dtype, case.layout, case.logits)
        return logits, logits if case.in_place else Rows(n, vocab, dtype, case.grad_layout)

    logits, grad = logits_and_grad()
    logits.guard(~case.reads & (not case.in_place))
    module.loss_and_grad(
        logits.arg, grad.arg, dtype, vocab, targets, index, inputs, weights, temperature, denominator, case.mean,
        case.all_logprobs, p["one pass logprobs"], p["one pass row_losses"], p["one pass loss"], terms, 0,
    )  # fmt: skip
    logits.guard(~case.reads, on=False)
    out["loss_and_grad"] = grad

    logits, grad = logits_and_grad()
    logits.guard(~case.reads)
    module.stats(logits.arg, dtype, vocab, targets, weights, temperature, case.all_logprobs, p["stats"], terms, 0)
    logits.guard(~case.reads, on=False)
    module.objective(
        p["stats"], n, targets, index, inputs, weights, temperature, denominator, case.mean, p["logprobs"],
        p["row_losses"], p["coefficients"], p["loss"], terms, 0,
    )  # fmt: skip
    idle = (np.atleast_2d(out["coefficients"]) == 0).all(0) | (case.upstream.all(n) == 0)
    logits.guard(idle & (not case.in_place))
    coefficients = (p["coefficients"], 1, 0.0)
    targets = (*targets[:2], 0, k)  # callers of grad need not know the ignore_index: the coefficient is 0
    module.grad(
        logits.arg, grad.arg, dtype, vocab, targets, temperature, coefficients, case.upstream.arg, p["stats"],
        case.terms and case.terms.arg_of_grad, 0,
    )  # fmt: skip
    logits.guard(idle, on=False)
    out["grad"] = grad

    grad = Rows(n, vocab, dtype, case.grad_layout, case.logits)
    module.scale(grad.arg, dtype, vocab, np.float32([1.0]).ctypes.data, 0)
    if any((row != encode(x, dtype)).any() for row, x in zip(grad.rows, case.logits, strict=True)):
        raise Wrong("scale: changed the gradient, and the scale is 1")
    scale = np.float32([2.5])
    module.scale(grad.arg, dtype, vocab, scale.ctypes.data, 0)
    out["scale"] = grad
    return out


def close(name, got, want, rtol, atol=0.0):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    with np.errstate(invalid="ignore"):
        fine = (np.abs(got - want) <= atol + rtol * np.abs(want)) | (got == want) | (np.isnan(got) & np.isnan(want))
        fine |= np.isinf(atol)
    if not fine.all():
        i = tuple(int(k) for k in np.argwhere(~fine)[0])
        raise Wrong(f"{name} {list(i)}: {got[i]!r}, not {want[i]!r}; {(~fine).sum()} of {fine.size} elements")


def check_rows(name, rows, want, rtol, atol, dtype):
    if dtype == FLOAT16:
        want = np.where(np.abs(want) >= 65520, np.copysign(np.inf, want), want)
    if rows.rows:
        close(name, rows.matrix(), want, rtol + ROUNDING[dtype], atol + SMALLEST[dtype])
    if not rows.gaps_intact():
        raise Wrong(f"{name}: wrote outside the rows")


def check(module, seed):
    case = Case(seed)
    ascending, descending = (module.configure(*case.device, d) or run(module, case) for d in (False, True))
    for name, x in ascending.items():
        y = descending[name]
        x, y = (x.buffer, y.buffer) if isinstance(x, Rows) else (x, y)
        if x.tobytes() != y.tobytes():
            raise Wrong(f"{name}: depends on the order of threads")
    out, n, dtype = ascending, case.n, case.dtype
    with np.errstate(all="ignore"):
        want = reference(case)
    known = ~np.isnan(want["stats"][1])  # the maximum of a NaN row may be anything
    error = want["logp error"]
    close("stats max", out["stats"][0, known], want["stats"][0, known], 0)
    close("stats sum", out["stats"][1], want["stats"][1], 6e-6 + error)
    k = case.targets.shape[1]
    close("stats target", out["stats"][2 : k + 2], want["stats"][2 : k + 2], 0)
    close("stats moment and mean", out["stats"][k + 2 :], want["stats"][k + 2 :], 2e-6 + error, 2e-6 + error)
    close(
        "coefficients",
        out["coefficients"],
        want["coefficients"],
        5e-5,
        SMALLEST[FLOAT32] + 5 * error * want["coefficients size"],
    )
    terms = np.abs(want["loss size"]).sum() / max(want["row_losses"][-1], 1e-3)
    for path in ("", "one pass "):
        close(path + "logprobs", out[path + "logprobs"], want["logprobs"], 1e-6, error * case.reads)
        allowed = 2 * error * want["loss size"] * case.active
        close(path + "row_losses", out[path + "row_losses"][:-1], want["row_losses"][:-1], 5e-5, allowed)
        close(path + "denominator", out[path + "row_losses"][-1:], want["row_losses"][-1:], 1e-6)
        close(path + "loss", out[path + "loss"], want["loss"], 0, np.nan_to_num(5e-5 * (terms + n), posinf=0.0))
    for path, (rows, rtol, atol) in want["grads"].items():
        for row, active in zip(out[path].rows, case.active, strict=True):
            if not active and row.any():
                raise Wrong(f"{path}: an inactive row is not +0")
        check_rows(path, out[path], rows, rtol, atol, dtype)
    with np.errstate(all="ignore"):
        scaled = decode(encode(case.logits * 2.5, dtype), dtype)  # float16 overflows
    check_rows("scale", out["scale"], scaled, 1e-7, 0, dtype)


# ---- single cases ----------------------------------------------------------------------------------------------------


def many_rows(module):
    """More rows than a grid has blocks in its smaller dimensions; 2 processors loop over them."""
    n, vocab = 66_001, 3
    module.configure(2, 1 << 20, False)
    x = np.random.default_rng(0).normal(0, 1, (n, vocab))
    logits, grad = (Rows(n, vocab, FLOAT32, (0, 1 << 20, 0, 0), m) for m in (x, None))
    x, targets = logits.matrix(), np.zeros(n, np.int64)
    p = np.exp(x) / np.exp(x).sum(1, keepdims=True)
    stats = np.float32([np.zeros(n), np.exp(x).sum(1), x[:, 0]])
    module.grad(
        logits.arg, grad.arg, FLOAT32, vocab, (targets.ctypes.data, True, IGNORE, 1), Column(1.0).arg, Column(1.0).arg,
        Column(1.0).arg, stats.ctypes.data, None, 0,
    )  # fmt: skip
    check_rows("grad", grad, [1, 0, 0] - p, 1e-5, 1e-6, FLOAT32)
    scale = np.float32([2.0])
    module.scale(grad.arg, FLOAT32, vocab, scale.ctypes.data, 0)
    check_rows("scale", grad, 2 * ([1, 0, 0] - p), 1e-5, 2e-6, FLOAT32)


def far_rows(module):
    """Rows more than 2^31 elements apart, in memory that is reserved and not filled."""
    vocab, stride, n = 17, 2**31 + 24, 2
    memory = mmap.mmap(-1, (stride + 64) * 2, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    elements = np.frombuffer(memory, np.uint16)
    x = decode(encode(np.random.default_rng(0).normal(0, 1, (n, vocab)), BFLOAT16), BFLOAT16)
    for r in range(n):
        elements[r * stride : r * stride + vocab] = encode(x[r], BFLOAT16)
    module.configure(1, 1 << 20, False)
    out, targets = np.zeros((3, 4), np.float32), np.zeros(n, np.int32)
    rows = (elements.ctypes.data, n, 1, stride, 0)
    logprobs, row_losses, loss = (o.ctypes.data for o in out)
    module.loss_and_grad(
        rows, rows, BFLOAT16, vocab, (targets.ctypes.data, False, IGNORE, 1), 1, [], Column(1.0).arg, Column(1.0).arg,
        Column(1.0).arg, False, False, logprobs, row_losses, loss, None, 0,
    )  # fmt: skip
    p = np.exp(x) / np.exp(x).sum(1, keepdims=True)
    close("logprobs", out[0, :n], np.log(p[:, 0]), 1e-5)
    for r in range(n):
        got = decode(elements[r * stride : r * stride + vocab], BFLOAT16)
        close("grad", got, p[r] - (np.arange(vocab) == 0), 2.0**-8, 1e-6)


def unreadable_rows(module):
    """Masked rows lie in pages that can't be read: a read ends the process."""
    n, vocab = 4, mmap.PAGESIZE // 4
    module.configure(2, 1 << 20, False)
    memory = mmap.mmap(-1, n * mmap.PAGESIZE)
    x = np.frombuffer(memory, np.float32).reshape(n, vocab)
    x[:] = np.random.default_rng(0).normal(0, 1, x.shape)
    address = x.ctypes.data
    if _process.mprotect(ctypes.c_void_p(address + mmap.PAGESIZE), ctypes.c_size_t(2 * mmap.PAGESIZE), 0) != 0:
        raise OSError("mprotect")
    logits, grad = (address, n, n, 0, vocab), Rows(n, vocab, FLOAT32, (0, n, 0, 0))
    targets, weights = np.int64([5, IGNORE, 5, 5]), Column([1.0, 1.0, 0.0, 1.0], 1)
    t = (targets.ctypes.data, True, IGNORE, 1)
    one, out, stats = Column(1.0).arg, np.full((3, n + 1), np.nan, np.float32), np.full((3, n), np.nan, np.float32)
    module.loss_and_grad(
        logits,
        grad.arg,
        FLOAT32,
        vocab,
        t,
        1,
        [],
        weights.arg,
        one,
        one,
        True,
        False,
        *(o.ctypes.data for o in out),
        None,
        0,
    )
    module.stats(logits, FLOAT32, vocab, t, weights.arg, one, False, stats.ctypes.data, None, 0)
    module.grad(
        logits,
        grad.arg,
        FLOAT32,
        vocab,
        t,
        one,
        Column([1.0, 0.0, 0.0, 1.0], 1).arg,
        one,
        stats.ctypes.data,
        None,
        0,
    )
    close("stats", stats[:, 1:3], [[0, 0], [1, 1], [0, 0]], 0)
    if grad.rows[1].any() or grad.rows[2].any() or not (out[0, 1:3] == 0).all() or out[1, n] != 2:
        raise Wrong("a masked row left a trace")


def extremes(module):
    """One token, by hand: what the random cases would meet too rarely."""
    module.configure(1, 1 << 20, False)
    x, nan, inf = [[0.0, 1.0, 2.0]], float("nan"), float("inf")

    def one_token(name="cross_entropy", inputs=(), weight=1.0, temperature=1.0, mean=False, target=0, denominator=1.0):
        rows, targets = Rows(1, 3, FLOAT32, (0, 1, 0, 0), x), np.int64([target])
        out = np.full((3, 2), 7.0, np.float32)
        module.loss_and_grad(
            rows.arg, rows.arg, FLOAT32, 3, (targets.ctypes.data, True, IGNORE, 1), module.objectives.index(name),
            [Column(i).arg for i in inputs], Column(weight).arg, Column(temperature).arg, Column(denominator).arg, mean,
            False, *(o.ctypes.data for o in out), None, 0,
        )  # fmt: skip
        return out[2, 0], rows.matrix()[0], out[0, 0]

    def expect(what, got, loss, grad, logp):
        close(what + " loss", got[0], loss, 1e-5)
        close(what + " grad", got[1], grad, 1e-5)
        close(what + " logprob", got[2], logp, 1e-5)

    zero, bad, p = [0.0] * 3, [nan] * 3, np.exp(x[0]) / np.exp(x[0]).sum()
    expect("all masked", one_token(weight=0.0, mean=True), 0, zero, 0)
    expect("masked, bad temperature", one_token(target=IGNORE, temperature=0.0), 0, zero, 0)
    expect("bad temperature", one_token(temperature=-1.0), nan, bad, nan)
    expect("clipped, exp overflows", one_token("ppo", (-inf, 1.0, 0.8, 1.2)), -1.2, zero, np.log(p[0]))
    expect("clipped, denominator 0", one_token("ppo", (-100, 1.0, 0.8, 1.2), denominator=0.0), -inf, zero, np.log(p[0]))
    expect("infinite temperature", one_token(temperature=inf), np.log(3), zero, -np.log(3))
    expect("plain", one_token(), -np.log(p[0]), p - [1, 0, 0], np.log(p[0]))

    def two_phase(coefficient, upstream, target=0):
        rows, targets = Rows(1, 3, FLOAT32, (0, 1, 0, 0), x), np.int64([target])
        stats = np.float32([[2.0], [np.exp(np.array(x) - 2).sum()], [0.0]])
        module.grad(
            rows.arg, rows.arg, FLOAT32, 3, (targets.ctypes.data, True, 0, 1), Column(1.0).arg, Column(coefficient).arg,
            Column(upstream).arg, stats.ctypes.data, None, 0,
        )  # fmt: skip
        return rows.matrix()[0]

    close("grad", two_phase(2.0, 3.0), 6 * ([1, 0, 0] - p), 1e-6)
    close("grad, nan upstream of an idle token", two_phase(0.0, nan), zero, 0)
    close("grad, upstream 0", two_phase(inf, 0.0), zero, 0)
    close("grad, ignored", two_phase(0.0, 1.0, IGNORE), zero, 0)
    close("grad, target outside", two_phase(1.0, 1.0, 3), bad, 0)

    rows, scale = Rows(1, 3, FLOAT32, (0, 1, 0, 0), [[0.0, 1.0, -2.0]]), np.float32([inf])
    module.scale(rows.arg, FLOAT32, 3, scale.ctypes.data, 0)
    close("scale by inf", rows.matrix()[0], [0, inf, -inf], 0)

    for n in (0, 1):  # no reduction: the coefficients are per token, the denominator is 1
        stats, out, targets = np.float32([[2.0], [2.0], [1.0]]), np.full((3, 2), 7.0, np.float32), np.int64([0])
        module.objective(
            stats.ctypes.data, n, (targets.ctypes.data, True, IGNORE, 1), 1, [], Column(3.0).arg, Column(1.0).arg,
            Column(5.0).arg, True, *(o.ctypes.data for o in out), 0, None, 0,
        )  # fmt: skip
        close("no reduction, denominator", out[1, n], 1, 0)
        close("no reduction", out[1:, 0][:, None] * n, np.array([[3 * (1 + np.log(2))], [-3]]) * n, 1e-6)

    terms_extremes(module)
    far = np.int64([0])
    try:
        module.scale((far.ctypes.data, 1, 1, 0, 0), FLOAT32, 2**31, scale.ctypes.data, 0)
    except RuntimeError:
        return
    raise Wrong("a vocabulary of 2^31 was not refused")


def terms_extremes(module):
    zero, one, nan, inf = Column(0.0).arg, Column(1.0).arg, float("nan"), float("inf")

    def terms(softcap=0.0, smoothing=0.0):
        return softcap, False, smoothing, 0.0, 0, one, zero, zero, zero, Column(inf).arg, -1, False

    def one_token(x, target, *given):
        rows, targets = Rows(1, len(x), FLOAT32, (0, 1, 0, 0), [x]), np.int64([target])
        out, loss = np.full((2, 2), 7.0, np.float32), np.zeros(1, np.float32)
        module.loss_and_grad(
            rows.arg, rows.arg, FLOAT32, len(x), (targets.ctypes.data, True, IGNORE, 1), 1, [], one, one, one, False,
            False, *(o.ctypes.data for o in (*out, loss)), terms(*given), 0,
        )  # fmt: skip
        return loss[0], rows.matrix()[0]

    loss, grad = one_token([1e38, 0.0, 0.0], 0, 0.0, 0.5)
    close("huge logits, smoothed loss", loss, 1e38 / 3, 1e-6)
    close("huge logits, smoothed gradient", grad, [1 / 3, -1 / 6, -1 / 6], 1e-6)
    x = np.float32([1.5, -0.7, 0.3, -2.0]).astype(np.float64)
    z = 1000 * np.tanh(x / 1000)
    loss, _ = one_token(x, 1, 1000.0)
    close("cap far above the logits", loss, np.log(np.exp(z).sum()) - z[1], 1e-6)

    def two_phase(coefficients, upstream, target=0):
        rows, targets = Rows(1, 3, FLOAT32, (0, 1, 0, 0), [[0.0, 1.0, 2.0]]), np.int64([target])
        stats = np.float32([[2.0], [1 + np.exp(-1) + np.exp(-2)], [nan if target == 3 else 0.0], [0.0], [0.0]])
        coefficients = np.float32(coefficients)
        module.grad(
            rows.arg, rows.arg, FLOAT32, 3, (targets.ctypes.data, True, 0, 1), one, (coefficients.ctypes.data, 1, nan),
            Column(upstream).arg, stats.ctypes.data, terms(), 0,
        )  # fmt: skip
        return rows.matrix()[0]

    p = np.exp([0.0, 1.0, 2.0]) / np.exp([0.0, 1.0, 2.0]).sum()
    close("terms", two_phase([2, 0, 0, 3], 3.0), 6 * ([1, 0, 0] - p) + 3, 1e-6)
    close("terms, nan upstream of an idle token", two_phase([0, 0, 0, 0], nan), [0, 0, 0], 0)
    close("terms, upstream 0", two_phase([inf, 1, nan, 1], 0.0), [0, 0, 0], 0)
    close("terms, ignored", two_phase([0, 0, 0, 0], 1.0, IGNORE), [0, 0, 0], 0)
    close("terms, target outside", two_phase([0, 0, 1, 0], 1.0, 3), [nan] * 3, 0)


def main(folder, cases):
    sys.path.insert(0, folder)
    import _host_cuda

    random = [(f"case {seed}", check, (seed,)) for seed in range(1, cases + 1)]
    quick, slow = ([(f.__name__, f, ()) for f in fs] for fs in ((extremes, far_rows, unreadable_rows), (many_rows,)))
    for name, f, args in quick + random + slow:
        try:
            f(_host_cuda, *args)
        except (Wrong, RuntimeError) as error:
            sys.exit(f"{name}: {error}")
    print(f"{cases} cases passed")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
