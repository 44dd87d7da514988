"""Random cases for sweep.py with their truth, as plain numpy arrays: made where torch is, run where it is not.

The truth is float64, formed without cancellation: 1 - p of the target is made of the others' mass, and z is measured
from the row's maximum. The middle stage is the package's own formula in float64, which other tests hold against
published ones; the softmax and the gradient are written out here.
"""

from __future__ import annotations

import pickle
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from structs import BFLOAT16, FLOAT16, FLOAT32, IGNORE, KLS

from fused_losses.objectives import OBJECTIVES
from fused_losses.problem import Terms
from fused_losses.terms import Seen, row_loss

FLOOR = float(np.finfo(np.float32).min)
SUBNORMAL = 1.5e-45  # next to 0 float32 has no more digits
SMALLEST = (1e-35, 1e-35, 2.0**-24)
ROUNDING = (0.0, 2.0**-8, 2.0**-10)  # generous: an ulp, not half of one
SMALL = [1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 23, 24, 31, 32, 33, 47, 63, 64, 65, 127, 255, 256, 257, 1000, 1023]
LARGE = [1025, 2050, 3001, 4096, 4099, 9000]  # blocks of several warps
LARGEST = 33013  # a block of 1024 threads
HAZARDS = ["nan", "inf", "-inf", "all -inf", "half -inf", "bad target", "outside", "shifted", "sure", "behind", "mask"]

# A seed keeps what it stands for, whatever objectives come after these: seeded bugs are caught by the first 60.
SETTLED, SETTLED_SEEDS = 7, 120

DRAWN = {
    "old_logprobs": lambda rng, n: rng.normal(-5, 2, n),
    "advantages": lambda rng, n: rng.normal(0, 1, n) * (rng.random(n) < 0.8),
    "clip_low_threshold": lambda rng, n: 0.8,
    "clip_high_threshold": lambda rng, n: 1.2,
    "beta": lambda rng, n: 0.1,
    "tau_positive": lambda rng, n: 1.0,
    "tau_negative": lambda rng, n: rng.uniform(0.5, 2.0, n),
    "log_ratio_clamp": lambda rng, n: rng.uniform(0.5, 5.0, n),
    "dual_clip": lambda rng, n: rng.uniform(1.0, 3.0, n),
    "delta": lambda rng, n: rng.uniform(0.5, 4.0, n),
    "divergence_low": lambda rng, n: 0.2,
    "divergence_high": lambda rng, n: rng.uniform(0.01, 0.3, n),
    "ratio_cap": lambda rng, n: rng.uniform(0.5, 4.0, n),
}


def objectives(seed: int) -> list[str]:
    names = list(OBJECTIVES)
    return names[:SETTLED] if seed <= SETTLED_SEEDS else names[SETTLED:]


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


class Draw:
    """What a seed gives. Columns are (values, stride), the stride None for one value."""

    def __init__(self, seed: int):
        rng = self.rng = np.random.default_rng(seed)
        self.dtype = seed % 3
        self.vocab = int(rng.choice(SMALL if rng.random() < 0.75 else LARGE)) if seed % 60 else LARGEST
        n = self.n = int(rng.integers(0, 13)) if self.vocab < 2000 else 3
        self.mean, self.all_logprobs, self.in_place = (bool(b) for b in rng.random(3) < [0.5, 0.4, 0.4])
        two_level = rng.random() < 0.4
        self.layout = self._layout(two_level)
        self.grad_layout = self.layout if self.in_place or rng.random() < 0.3 else self._layout(two_level)
        self.device = int(rng.choice([1, 2, 5])), int(rng.choice([1 << 12, 1 << 20, 1 << 30]))  # processors, L2
        if self.vocab in LARGE and rng.random() < 0.5:
            self.device = 1, 1 << 12  # one block of several warps takes all rows in turn
        self.plain = bool(rng.random() < 0.4)
        k = 1 if self.plain or rng.random() < 0.6 else int(rng.choice([1, 2, 5, 40, 70]))  # a small block: 32 threads
        self.objective = "cross_entropy" if k > 1 else str(rng.choice(objectives(seed)))
        self.temperature = self._column(rng.uniform(0.5, 2.0, n))
        self.weights = self._column(rng.uniform(0.25, 2.0, n) * (rng.random(n) < 0.8))
        self.denominator = np.float32(rng.uniform(0.5, 4.0)), None
        self.upstream = self._column(rng.uniform(0.5, 4.0, n) * (rng.random(n) < 0.9))
        columns = OBJECTIVES[self.objective].columns
        given = len(columns) - int(rng.integers(len(OBJECTIVES[self.objective].limits) + 1))  # the others are inf
        drawn = [DRAWN[name](rng, n) if i < given else np.inf for i, name in enumerate(columns)]
        self.inputs = [self._column(x) for x in drawn]
        self.targets = rng.integers(0, self.vocab, (n, k)).astype(rng.choice([np.int32, np.int64]))
        again = rng.random((n, k)) < 0.3
        self.targets[again] = np.broadcast_to(self.targets[:, :1], (n, k))[again]
        self.softcap = 0.0 if self.plain else float(rng.choice([0.0, 0.0, 5.0, 30.0, 300.0]))
        self.shares = None
        if k > 1 or (not self.plain and rng.random() < 0.2):
            self.shares = np.float32(rng.normal(0.5, 1, (n, k)) * (rng.random((n, k)) < 0.8))
        self.terms = {} if self.plain else self._terms(k)
        self._rows()
        threads = [32] if self.vocab < 1000 else [32, 64] if self.vocab < LARGEST else [64, 256]
        self.chip = tuple(int(rng.choice(x)) for x in (threads, [1, 2, 3, 5], [0, 3, 1000]))
        self.pair = k == 1 and tuple(int(rng.choice(x)) for x in (threads, [1, 2, 3], [0, 3, 1000]))

    def _layout(self, two_level: bool) -> tuple[int, ...]:
        """Phase, rows per outer step, gaps between outer and inner steps; all in elements."""
        inner = self.rng.integers(1, 4) if two_level else 1 << 20
        return tuple(int(x) for x in (self.rng.integers(0, 9), inner, *self.rng.integers(0, 10, 2)))

    def _column(self, values: Any) -> tuple[np.ndarray, int | None]:
        values = np.float32(values)
        return values, int(self.rng.integers(0, 4)) if values.ndim else None

    def all(self, column: tuple[np.ndarray, int | None]) -> np.ndarray:
        values, stride = column
        return np.broadcast_to(values[:1] if stride == 0 else values, self.n).astype(np.float64)

    def _terms(self, k: int) -> dict[str, Any]:
        rng, n, column = self.rng, self.n, self._column
        policy = "old_logprobs" in OBJECTIVES[self.objective].inputs and k == 1
        return {
            "importance_weights": column(rng.uniform(0, 2, n)),
            "ref_logprobs": column(rng.normal(-5, 2, n)),
            "kl_coef": column(rng.normal(0, 1, n)),
            "entropy_coef": column(rng.normal(0, 1, n)),
            "log_ratio_clamp": column(rng.uniform(0.5, 5.0, n)),
            "label_smoothing": float(np.float32(rng.choice([0.0, 0.1]))),
            "z_loss": float(np.float32(rng.choice([0.0, 1e-3]))),
            "kl_type": KLS[int(rng.integers(len(KLS)))],
            "kl_weighted_by_ratio": bool(rng.random() < 0.5) and policy,
            "entropy": bool(rng.random() < 0.5),
        }

    def _rows(self) -> None:
        rng, n, k = self.rng, self.n, self.targets.shape[1]
        logits = rng.normal(0, 3, (n, self.vocab))
        for r in range(n):
            if rng.random() < 0.7:
                self._add_hazard(logits[r], r, str(rng.choice(HAZARDS)))
            if rng.random() < 0.2:
                self.targets[r] = IGNORE
        if k > 1:
            self.targets[rng.random((n, k)) < 0.1] = IGNORE
        if self.shares is not None:
            self.shares[self.targets == IGNORE] = 0
        weights = self.all(self.weights)
        seen = (self.targets != IGNORE).any(1)
        self.reads = seen & (self.all_logprobs | (weights != 0))
        self.active = seen & (weights != 0)
        if self.softcap > 100 and self.reads.any():  # a row of cheap levels whose exponents are beyond float32's
            logits[self.reads.argmax()] += self.softcap / 2 * (1 if self.vocab % 2 == 0 else -1)
        logits[~self.reads] = np.nan
        with np.errstate(over="ignore"):
            self.bits = encode(logits, self.dtype)
        self.logits = decode(self.bits, self.dtype)

    def _add_hazard(self, row: np.ndarray, r: int, kind: str) -> None:
        rng, vocab, target = self.rng, self.vocab, self.targets[r, 0]
        t = self.all(self.temperature)[r]
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
        elif kind == "bad target":  # which is no part of the sums
            row[target] = rng.choice([np.nan, np.inf, -np.inf])
        elif kind == "outside":
            k = rng.integers(self.targets.shape[1])
            self.targets[r, k] = rng.choice([vocab, -1, vocab + 1, 2**31 - 1])
            if self.targets.dtype == np.int64 and rng.random() < 0.5:
                self.targets[r, k] = 2**32  # 0 if cut to 32 bits
        elif kind == "shifted":
            row += 3e4
        elif kind in ("sure", "behind"):
            gap = rng.uniform(0, 60) * t
            row[target] = row.max() + gap if kind == "sure" else row.min() - gap
        elif kind == "mask":  # of all but the target, by what is large and finite
            lowest = FLOOR if self.dtype == FLOAT32 else -3.38e38 if self.dtype == BFLOAT16 else -65504.0
            values = [-1e4] if self.terms.get("label_smoothing") else [-1e4, -6e4, max(-1e30, lowest), lowest]
            keep = row[target]
            row[:] = rng.choice(values)
            row[target] = keep


# ---- the truth -------------------------------------------------------------------------------------------------------


def truth(draw: Draw) -> dict[str, tuple[Any, Any, Any]]:
    """name: (value, relative tolerance, absolute tolerance)"""
    with np.errstate(all="ignore"):
        return _truth(draw) | (_of_statistics(draw) if draw.targets.shape[1] == 1 else {})


def _truth(draw: Draw) -> dict[str, tuple[Any, Any, Any]]:
    n, vocab, cap, k = draw.n, draw.vocab, draw.softcap, draw.targets.shape[1]
    t, weights, upstream = draw.all(draw.temperature), draw.all(draw.weights), draw.all(draw.upstream)
    normaliser = weights[draw.active].sum()
    denominator = normaliser if draw.mean else float(draw.denominator[0])
    entropy_asked, smoothed = draw.terms.get("entropy", False), draw.terms.get("label_smoothing", 0.0) != 0

    def small(x: np.ndarray) -> np.ndarray:
        """What an error is relative to: of a single, sure target to the number itself."""
        return np.minimum(1, np.abs(x)) if k == 1 else np.ones_like(x)

    def capped(x: Any) -> Any:
        return cap * np.tanh(x / cap) if cap else x

    stats, atol, rtol = np.zeros((k + 4, n)), np.zeros((k + 4, n)), np.zeros((k + 4, n))
    logp, log_p, p = np.zeros((k, n)), np.zeros((n, vocab)), np.zeros((n, vocab))
    entropy, lse, spread, error = np.zeros(n), np.zeros(n), np.zeros(n), np.zeros(n)
    drawn, drawn_size = np.zeros((n, vocab)), np.zeros((n, vocab))
    whole, x, x_error, outside, leads = (np.zeros(n, kind) for kind in (float, float, float, bool, bool))
    for r in np.flatnonzero(draw.reads):
        targets, row = draw.targets[r], draw.logits[r]
        shares = np.ones(1) if draw.shares is None else draw.shares[r].astype(np.float64)
        inside = (targets >= 0) & (targets < vocab)
        at = np.where(inside, targets, 0)
        logit = np.where(inside, row[at], np.nan)
        others = np.ones(vocab, bool)
        if k == 1 and inside[0]:
            others[at[0]] = False
        top = max(np.fmax.reduce(row[others], initial=FLOOR), FLOOR)
        no_others = k == 1 and (not others.any() or (cap == 0 and (row[others] == -np.inf).all()))
        if no_others:
            top = logit[0]
        d = (capped(row) - capped(top)) / t[r]
        of_targets = (capped(logit) - capped(top)) / t[r]
        e = np.zeros(1) if no_others else np.exp(d[others])
        total = e.sum()
        moment = (e * np.maximum(d[others], -1000)).sum() if entropy_asked and not no_others else 0.0
        stats[:, r] = top, total, *logit, moment, d.sum() if smoothed else 0.0
        error[r] = 2e-6 + (cap / t[r] * 8e-7 if cap else 0.0)
        rtol[[1, k + 2, k + 3], r] = 5e-6 + error[r]
        atol[0, r] = np.inf if np.isnan(total) else 0.0
        atol[k + 2 :, r] = error[r] * total, error[r] * vocab
        if k == 1:
            gap = of_targets[0]
            error[r] += 3e-7 * min(abs(gap), 100) if np.isfinite(gap) else 0.0
            bad = not inside[0] or (cap == 0 and logit[0] == np.inf)
            lead = np.nan if bad else max(gap, 0.0)
            leads[r] = gap > 0
            rest = np.log(total) - lead  # of z_max on
            behind = gap - lead
            log_total = np.logaddexp(rest, behind)
            logp[0, r] = -np.logaddexp(0.0, rest - behind)
            log_p[r] = d - lead - log_total
            one_less = np.exp(-np.logaddexp(0.0, behind - rest))
            if inside[0]:
                log_p[r, at[0]] = logp[0, r]
        else:
            lead, log_total = 0.0, np.log(total)
            logp[:, r] = of_targets - log_total
            log_p[r] = d - log_total
        p[r] = np.exp(log_p[r])
        entropy[r] = -np.where(p[r] == 0, 0, p[r] * log_p[r]).sum() if entropy_asked else 0.0
        largest = logit[0] if lead > 0 else top
        lse[r] = capped(largest) / t[r] + log_total
        spread[r] = log_total + lead - d.sum() / vocab if smoothed else 0.0
        whole[r] = shares.sum()
        counts = shares != 0
        outside[r] = (~inside & counts).any()
        x[r] = (shares[counts] * logp[counts, r]).sum()
        share = np.zeros(vocab)
        np.add.at(share, at[inside], shares[inside])
        drawn[r] = share - whole[r] * p[r]
        drawn_size[r] = np.abs(share) + np.abs(whole[r]) * p[r]
        if k == 1 and inside[0]:
            drawn[r, at[0]] = whole[r] * one_less
            drawn_size[r, at[0]] = np.abs(drawn[r, at[0]])
        x_error[r] = (np.abs(shares) * (error[r] + 3e-7 * np.abs(logp[:, r])) * small(logp[:, r])).sum()
        if np.isnan(x_error[r]) or np.isinf(x_error[r]):
            x_error[r] = 0.0

    away = log_p + entropy[:, None]  # z_j - sum_i p_i z_i
    middle = _Middle(draw, whole)
    value, by = middle(x, lse, entropy, spread)
    value_error, by_error = middle.errors(x, lse, entropy, spread, x_error, error)
    by[:, np.isnan(x) & draw.active] = np.nan
    scale = weights / denominator
    losses = np.where(draw.active, weights * value, 0)
    losses_error = np.where(draw.active, weights * value_error, 0)
    coefficients = np.where(draw.active & (by != 0), by * scale, 0)
    coefficients_error = np.nan_to_num(np.where(draw.active, by_error * scale, 0), posinf=np.inf)

    logprobs = np.where(draw.reads & (draw.targets.T != IGNORE), logp, 0)
    logprobs_error = (small(logprobs) * (error + 3e-7 * np.abs(logprobs)) + SUBNORMAL) * draw.reads
    entropy_error = 3 * error * np.where(leads, np.minimum(1, entropy), 1) + SUBNORMAL
    if draw.plain:
        stats, rtol, atol, coefficients = stats[:3], rtol[:3], atol[:3], coefficients[:1]
        coefficients_error, logprobs, logprobs_error = coefficients_error[:1], logprobs[0], logprobs_error[0]
    else:
        logprobs, logprobs_error = np.vstack((logprobs, entropy)), np.vstack((logprobs_error, entropy_error))
    total = losses.sum()
    loss = 0.0 if total == 0 and denominator == 0 else total / denominator
    loss_error = (losses_error.sum() + 1e-6 * np.abs(finite(losses)).sum()) / max(denominator, 1e-3)

    def gradient(factor: np.ndarray) -> tuple[np.ndarray, float, np.ndarray]:
        c, off = (np.zeros((4, n, 1)) for _ in range(2))
        c[: len(coefficients), :, 0] = np.where((coefficients == 0) | (factor == 0), 0, coefficients * factor)
        off[: len(coefficients), :, 0] = coefficients_error * factor
        (g, h, zeta, s), (dg, dh, dzeta, ds) = c, off
        slope = (1 / np.cosh(draw.logits / cap) ** 2 if cap else 1.0) / t[:, None]  # 1 - tanh^2 is 0 far out
        drift = np.where(p == 0, 0, p * (zeta - h * away))
        rows = slope * (g * drawn + drift + s)
        rows[outside] = np.nan
        each = error[:, None] + 4e-7 * np.minimum(np.abs(np.where(p == 0, 0, log_p)), 100)
        near = np.where(p == 0, 0, np.abs(away))
        around = np.abs(g) * drawn_size + p * (np.abs(zeta) + np.abs(h) * (1 + near)) + np.abs(s)
        moved = dg * drawn_size + p * (dzeta + dh * (1 + near)) + ds
        allowed = slope * (3 * each * around + moved)
        idle, infinite = (
            (c == 0).all(0),
            np.isinf(c + off).any(0),
        )  # then inf * 0 is NaN where a p is 0, or is it not yet?
        allowed = np.where(infinite, np.inf, np.where(idle, 0, np.nan_to_num(allowed, posinf=np.inf)))
        rows = np.where(idle, 0, np.where(infinite, 0, rows))
        if draw.dtype == FLOAT16:
            rows = np.where(np.abs(rows) >= 65520, np.copysign(np.inf, rows), rows)
        return rows, 1e-6 + ROUNDING[draw.dtype], allowed + SMALLEST[draw.dtype]

    scaled = decode(encode(draw.logits * 2.5, draw.dtype), draw.dtype)  # float16 overflows
    return {
        "stats": (stats, rtol, atol),
        "logprobs": (logprobs, 1e-7, logprobs_error),
        "row_losses": (losses, 1e-7, losses_error),
        "coefficients": (coefficients, 1e-7, coefficients_error + SMALLEST[FLOAT32]),
        "loss": (np.array([loss]), 1e-7, np.nan_to_num(loss_error, posinf=np.inf)),
        "normaliser": (np.array([normaliser]), 1e-6, 0.0),
        "loss_and_grad": gradient(np.ones(n)),
        "grad": gradient(upstream),
        "scale": (scaled, 1e-7 + ROUNDING[draw.dtype], SMALLEST[draw.dtype]),
    }


def _of_statistics(draw: Draw) -> dict[str, tuple[Any, Any, Any]]:
    """The stats and logprobs of the same rows where statistics are asked for, too."""
    n, vocab, cap, t = draw.n, draw.vocab, draw.softcap, draw.all(draw.temperature)
    asked = copy(draw)
    asked.plain, asked.terms, asked.objective, asked.inputs = False, {"entropy": True}, "logprobs", []
    asked.terms = {"entropy_coef": (np.float32(0.0), None), "kl_coef": (np.float32(0.0), None)} | asked.terms
    seen = _truth(asked)
    (stats, rtol, atol), (logprobs, _, error) = seen["stats"], seen["logprobs"]
    stats, rtol, atol = (np.vstack((table, np.zeros((2, n)))) for table in (stats, rtol, atol))
    logprobs, error = (np.vstack((table, np.zeros((3, n)))) for table in (logprobs, error))

    def capped(x: Any) -> Any:
        return cap * np.tanh(x / cap) if cap else x

    for r in np.flatnonzero(draw.reads):
        target, row, (top, total) = draw.targets[r, 0], draw.logits[r], stats[:2, r]
        inside = 0 <= target < vocab
        logit = row[target] if inside else np.nan
        others = np.arange(vocab) != target
        z, z_top = capped(row) / t[r], capped(top) / t[r]
        d = z - z_top
        of_others = d[others] if total > 0 or np.isnan(total) else np.zeros(0)
        squares, drift = np.exp(2 * of_others).sum(), d.sum()
        first = inside and logit > -np.inf and not (row[others] > logit).any() and not (row[:target] == logit).any()
        off = np.nan_to_num(error[0, r]) + 2e-6 + (cap / t[r] * 8e-7 if cap else 0.0)
        size = np.abs(np.where(np.isfinite(d), d, 0)).sum()
        stats[[4, 5, 6], r] = drift, squares, first
        rtol[5, r] = 2 * rtol[1, r]
        # a mask's distance may overflow in float32, as finite as it is
        atol[4, r] = np.inf if size > 1e37 or np.isnan(drift) else 5e-6 * size + off * vocab
        atol[6, r] = np.inf if np.isnan(total + logit) else 0.0
        logp, lead = logprobs[0, r], max((capped(logit) - capped(top)) / t[r], 0.0)
        if np.isnan(logp):
            logprobs[2:, r] = np.nan, np.nan, 0.0
            continue
        log_p = of_others - lead - np.logaddexp(np.log(total) - lead, (capped(logit) - capped(top)) / t[r] - lead)
        ours = np.exp(2 * log_p).sum()
        log_squares = 2 * logp + np.log1p(ours * np.exp(-2 * logp)) if lead > 0 else np.log(ours + np.exp(2 * logp))
        logprobs[2:, r] = log_squares, z.mean(), first
        error[2, r] = 4 * off * min(1, abs(logp)) + SUBNORMAL
        mask = size > 1e37 or abs(z_top) > 1e37
        error[3, r] = np.inf if mask else (5e-6 * size + off * vocab) / vocab + 3e-7 * abs(z_top)
    return {"statistics stats": (stats, rtol, atol), "statistics logprobs": (logprobs, 1e-7, error)}


def finite(x: np.ndarray) -> np.ndarray:
    """0 for what is infinite or NaN: there nothing rounds."""
    return np.where(np.isfinite(x), x, 0.0)


class _Middle:
    """The loss of each token, and its derivatives by logp, H, lse and each z alike."""

    def __init__(self, draw: Draw, whole: np.ndarray):
        self.draw, self.whole = draw, whole
        self.formula = OBJECTIVES[draw.objective].formula
        self.inputs = [torch.tensor(draw.all(c)) for c in draw.inputs]
        columns = {k: torch.tensor(draw.all(c)) for k, c in draw.terms.items() if isinstance(c, tuple)}
        self.terms = Terms(**{**draw.terms, **columns})
        self.importance = columns.get("importance_weights", torch.ones(draw.n, dtype=torch.float64))

    def __call__(self, *seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x, lse, entropy, spread = (torch.tensor(s) for s in seen)
        terms = self.terms._replace(importance_weights=self.importance)
        value, *by, s = row_loss(
            self.formula, Seen(x, lse, entropy, spread, torch.tensor(self.whole)), self.inputs, terms
        )
        by = [b.expand_as(x) for b in (*by, s / self.draw.vocab)]
        return value.numpy(), torch.stack(by).numpy()

    def errors(
        self, x: np.ndarray, lse: np.ndarray, entropy: np.ndarray, spread: np.ndarray, x_error: np.ndarray,
        error: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        """How far float32 may be off: by how much what is seen moves them, and by their own rounding."""
        at = [x, lse, entropy, spread]
        value, by = self(*at)
        off = (x_error, error + 2e-7 * np.abs(lse), 3 * error, (error + 1e-6) * (1 + spread))
        moved, moved_by = np.zeros_like(value), np.zeros_like(by)
        for i, much in enumerate(off):
            sides = [self(*(a + side * much if i == j else a for j, a in enumerate(at))) for side in (-1, 1)]
            moved += np.nanmax([np.nan_to_num(np.abs(v - value)) for v, _ in sides], 0)
            moved_by += np.nanmax([np.nan_to_num(np.abs(b - by)) for _, b in sides], 0)
        size = self._size(*at, value, by)
        size = np.where(size > 1e36, np.inf, size)  # it may overflow in float32, here or there
        return moved + 4e-7 * size, moved_by + 4e-7 * np.where(by == 0, 0, size + np.abs(by))

    def _size(
        self, x: np.ndarray, lse: np.ndarray, entropy: np.ndarray, spread: np.ndarray, value: np.ndarray, by: np.ndarray
    ) -> np.ndarray:
        """Of what is added up to a loss and to its derivative by logp, exponents as many times as they round."""
        terms, x = self.terms, finite(x)
        value, g = finite(value), finite(by[0])
        size = (np.abs(value) + np.abs(g)) * 8 * (1 + np.abs(x))
        if self.draw.plain:
            return size
        if terms.kl_type is not None:
            d = x - terms.ref_logprobs.numpy()
            parts = 1 + d * d + (np.exp(-d) * (1 + np.abs(d)) if terms.kl_type == "k3" else 0.0)
            ratio = 1.0
            if terms.kl_weighted_by_ratio:
                clamp = terms.log_ratio_clamp.numpy()
                ratio = np.exp(np.clip(x - self.inputs[0].numpy(), -clamp, clamp)) * (4 + np.abs(x))
            size = size + np.abs(terms.kl_coef.numpy()) * ratio * 4 * parts
        objective, g = (finite(v.numpy()) for v in self.formula(torch.tensor(x), *self.inputs))
        size = size + self.importance.numpy() * (np.abs(objective) + np.abs(g)) * 8 * (1 + np.abs(x))
        if terms.entropy:
            size = size + np.abs(terms.entropy_coef.numpy()) * (1 + entropy)
        size = size + terms.label_smoothing * np.abs(self.whole * spread) * 4
        return np.nan_to_num(size + terms.z_loss * np.abs(self.whole) * finite(lse) ** 2 * 4, posinf=np.inf)


def case(seed: int) -> dict[str, Any]:
    draw = Draw(seed)
    out = {key: value for key, value in vars(draw).items() if key not in ("rng", "logits")}
    return {"seed": seed, "want": truth(draw)} | out


def write(path: Path, count: int) -> Path:
    path.write_bytes(pickle.dumps([case(seed) for seed in range(1, count + 1)]))
    return path
