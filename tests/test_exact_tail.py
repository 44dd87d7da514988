"""Confident tokens: loss, logprob and gradient keep their digits however far the target leads.

Truth is float64 in which nothing cancels either: with d_j = z_t - z_j and S = sum_{j != t} exp(-d_j),

    logp = -log1p(S)    1 - p_t = S / (1 + S)    z_t - E = D, z_j - E = D - d_j    H = log1p(S) + D
    D = sum_{j != t} exp(-d_j) d_j / (1 + S)

A number may err by 2e-6 plus 3e-7 times the distance, d_j for element j, which is what rounding an exponent of that
size to float32 leaves; relative to itself, and where it is a sum of parts that may cancel, as a loss with terms is,
relative to these. A probability below float32's smallest normal number may be 0 in its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from cases import MODES
from conftest import instruction_sets, require, using
from torch import Tensor

import fused_losses

GAPS = (0.0, 1.0, 4.0, 8.0, 12.0, 16.0, 20.0, 30.0, 45.0, 60.0)
TEMPERATURES = (0.5, 0.7, 1.0, 2.0)
SMALLEST = torch.finfo(torch.float32).smallest_normal
EPS = torch.finfo(torch.float32).eps
ADVANTAGE = 1.5


class Row(NamedTuple):
    """What a token sees, in float64: (N, 1), per element (N, V)."""

    distance: Tensor  # d_j, 0 at the target
    e: Tensor  # exp(-d_j), 0 at the target
    own: Tensor  # 1 at the target, else 0
    rest: Tensor  # S
    lead: Tensor  # D
    lse: Tensor
    spread: Tensor  # lse - zbar

    @property
    def logp(self) -> Tensor:
        return -torch.log1p(self.rest)

    @property
    def entropy(self) -> Tensor:
        return torch.log1p(self.rest) + self.lead


class Part(NamedTuple):
    """A summand of the loss, and its derivatives by logp, H, lse and zbar.

    size: what the value's rounding is relative to, where that is more than itself."""

    value: Tensor
    g: Tensor | float = 0.0
    h: float = 0.0
    zeta: Tensor | float = 0.0
    s: float = 0.0
    size: Tensor | None = None


def given_logprob(row: Row, lower: float) -> Tensor:
    """A logprob of another policy in float32, so much below the policy's own."""
    return (row.logp - lower).float().double()


def policy(row: Row) -> Part:
    ratio = torch.exp(row.logp - given_logprob(row, -0.05))
    # an error of the exponent is one of the ratio
    return Part(-ratio * ADVANTAGE, -ratio * ADVANTAGE, size=ratio * ADVANTAGE * (1 + row.logp.abs()))


def k3(row: Row, coefficient: float = 0.5) -> Part:
    difference = row.logp - given_logprob(row, 1.0)
    inverse = torch.exp(-difference)
    size = inverse * (1 + row.logp.abs()) + difference.abs() + 1
    return Part(coefficient * (inverse + difference - 1), coefficient * (1 - inverse), size=coefficient * size)


class Loss(NamedTuple):
    function: Callable[..., Any]
    parts: Callable[[Row], list[Part]]
    keywords: Mapping[str, Any] = MappingProxyType({})
    lower: tuple[tuple[str, float], ...] = ()  # arguments that are logprobs of another policy


PPO = (("old_logprobs", -0.05),)
LOSSES = {
    "cross_entropy": Loss(fused_losses.cross_entropy, lambda r: [Part(-r.logp, -1.0)]),
    "ppo": Loss(fused_losses.ppo, lambda r: [policy(r)], {"advantages": ADVANTAGE}, PPO),
    "entropy": Loss(
        fused_losses.ppo,
        lambda r: [policy(r), Part(-0.3 * r.entropy, h=-0.3)],
        {"advantages": ADVANTAGE, "entropy_coef": 0.3},
        PPO,
    ),
    "kl": Loss(
        fused_losses.ppo,
        lambda r: [policy(r), k3(r)],
        {"advantages": ADVANTAGE, "kl_coef": 0.5},
        (*PPO, ("ref_logprobs", 1.0)),
    ),
    "label smoothing": Loss(
        fused_losses.cross_entropy,
        lambda r: [Part(-0.9 * r.logp, -0.9), Part(0.1 * r.spread, zeta=0.1, s=-0.1)],
        {"label_smoothing": 0.1},
    ),
    "z-loss": Loss(
        fused_losses.cross_entropy,
        lambda r: [Part(-r.logp, -1.0), Part(1e-3 * r.lse**2, zeta=2e-3 * r.lse)],
        {"z_loss": 1e-3},
    ),
    "softcap": Loss(fused_losses.cross_entropy, lambda r: [Part(-r.logp, -1.0)], {"softcap": 50.0}),
    "logit scale": Loss(fused_losses.cross_entropy, lambda r: [Part(-r.logp, -1.0)], {"logit_scale": 0.7}),
}


class Case:
    """A row per gap and temperature: the others within 1 of each other, the target ``gap`` above the highest."""

    def __init__(self, vocab: int, dtype: torch.dtype, gaps: tuple[float, ...], temperatures: tuple[float, ...]):
        generator = torch.Generator().manual_seed(vocab)
        gap = torch.tensor(gaps).repeat(len(temperatures))
        self.temperature = torch.tensor(temperatures).repeat_interleave(len(gaps))
        logits = -torch.rand(len(gap), vocab, generator=generator)
        logits[:, -1] = 0.0
        self.target_tokens = torch.randint(vocab - 1, (len(gap),), generator=generator)
        self.target_tokens[0] = 0
        self.logits = logits.scatter(1, self.target_tokens[:, None], gap[:, None]).to(dtype)

    def row(self, softcap: float | None = None, logit_scale: float = 1.0, **_: Any) -> Row:
        z, at = self.logits.double() * logit_scale, self.target_tokens[:, None]
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        z = z / self.temperature.double()[:, None]
        distance = z.gather(1, at) - z
        e = torch.exp(-distance).scatter(1, at, 0.0)
        rest = e.sum(1, keepdim=True)
        lse = z.gather(1, at) + torch.log1p(rest)
        return Row(
            distance,
            e,
            torch.zeros_like(z).scatter(1, at, 1.0),
            rest,
            (e * distance).sum(1, keepdim=True) / (1 + rest),
            lse,
            torch.log1p(rest) + distance.mean(1, keepdim=True),
        )


class Bounded(NamedTuple):
    truth: Tensor
    allowed: Tensor


class Truth(NamedTuple):
    losses: Bounded
    logprobs: Bounded
    entropy: Bounded
    gradient: Bounded


def truth_of(case: Case, loss: Loss) -> Truth:
    row, parts = case.row(**loss.keywords), loss.parts(case.row(**loss.keywords))
    slope = loss.keywords.get("logit_scale", 1.0) / case.temperature.double()[:, None]
    cap = loss.keywords.get("softcap")
    # a tanh's rounding is relative to the cap, as a distance's to the distance
    beside = 0.0 if cap is None else cap / case.temperature.double()[:, None]
    mean_distance = (row.e * row.distance).sum(1, keepdim=True) / row.rest
    relative = 2e-6 + 3e-7 * (mean_distance + beside)  # of S, and what is made of it
    by_element = 2e-6 + 3e-7 * (torch.where(row.own == 1, mean_distance, row.distance) + beside)

    p, rest = (row.e + row.own) / (1 + row.rest), row.rest / (1 + row.rest)
    from_mean = torch.where(row.own == 1, row.lead, row.lead - row.distance)  # z_j - E
    gradient, size, factor = torch.zeros_like(p), torch.zeros_like(p), torch.zeros_like(p)  # factor: of p
    value, value_size = torch.zeros_like(row.rest), torch.zeros_like(row.rest)
    for part in parts:
        value = value + part.value
        value_size = value_size + (part.value.abs() if part.size is None else part.size)
        drawn = torch.where(row.own == 1, rest, -p)  # [j == t] - p_j
        g = torch.as_tensor(part.g)
        error = g.abs() if part.size is None else torch.maximum(g.abs(), part.size)
        gradient = gradient + g * drawn + p * (part.zeta - part.h * from_mean) + part.s / p.shape[1]
        dense = abs(part.zeta) + abs(part.h) * (row.lead + row.distance)
        size = size + error * drawn.abs() + p * dense + abs(part.s) / p.shape[1]
        factor = factor + error + dense
    if cap is not None:
        y = torch.tanh(case.logits.double() * loss.keywords.get("logit_scale", 1.0) / cap)
        slope = slope * (1 - y**2)
        by_element = by_element + 4 * EPS * y**2 / (1 - y**2)

    def bounded(t: Tensor, of: Tensor) -> Bounded:
        return Bounded(t[:, 0], (relative * of + SMALLEST * (1 + abs(of)))[:, 0])

    return Truth(
        bounded(value, value_size),
        bounded(row.logp, row.logp.abs()),
        bounded(row.entropy, row.entropy),
        Bounded(gradient * slope, by_element * size * slope + SMALLEST * (1 + factor * slope)),
    )


def assert_bounded(actual: Tensor, wanted: Bounded, what: str) -> None:
    """Equal, or off by what is allowed; in a dtype of less digits, the rounding of a number that is."""
    actual = actual.cpu()
    low, high = (wanted.truth - wanted.allowed), (wanted.truth + wanted.allowed)
    low, high = (t.to(actual.dtype).double() for t in (low, high))
    good = (actual.double() >= low) & (actual.double() <= high)
    if not good.all():
        at = tuple((~good).nonzero()[0].tolist())
        got, truth = actual[at].item(), wanted.truth[at].item()
        raise AssertionError(
            f"{what}: {int((~good).sum())} of {good.numel()} off, first at {at}: got {got!r}, truth {truth!r}, "
            f"off by {abs(got - truth) / max(abs(truth), 1e-300):.2g} of it, allowed "
            f"{wanted.allowed[at].item() / max(abs(truth), 1e-300):.2g}"
        )


def check(
    name: str,
    backend: str,
    device: torch.device,
    mode: str,
    vocab: int,
    dtype: torch.dtype = torch.float32,
    gaps: tuple[float, ...] = GAPS,
    temperatures: tuple[float, ...] = TEMPERATURES,
) -> None:
    if backend == "triton" and device.type == "cpu":  # the interpreter takes its time for each row
        temperatures = temperatures[:2]
    loss, case = LOSSES[name], Case(vocab, dtype, gaps, temperatures)
    truth, row = truth_of(case, loss), case.row(**loss.keywords)
    others = {key: given_logprob(row, lower)[:, 0].float().to(device) for key, lower in loss.lower}
    leaf = case.logits.to(device, copy=True).requires_grad_()
    options = {"reduction": "sum", **MODES[mode], "backend": backend, "return_outputs": True}
    temperature: Tensor | float = case.temperature.to(device)
    if len(temperatures) == 1:
        temperature = temperatures[0]
    actual, outputs = loss.function(
        leaf * 1 if mode == "in place" else leaf,
        case.target_tokens.to(device),
        **loss.keywords,
        **others,
        temperature=temperature,
        **options,
    )
    actual.sum().backward()
    assert_bounded(outputs.logprobs, truth.logprobs, "logprob")
    if "entropy_coef" in loss.keywords:
        assert_bounded(outputs.entropy, truth.entropy, "entropy")
    if mode == "none":
        assert_bounded(actual.detach(), truth.losses, "loss")
    else:
        total, parts = truth.losses.truth.sum(), truth.losses.truth.abs().sum()
        assert_bounded(actual.detach(), Bounded(total, truth.losses.allowed.sum() + EPS * parts), "loss")
    assert_bounded(leaf.grad, truth.gradient, "gradient")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("vocab", [100, 101, 1000])
@pytest.mark.parametrize("name", ["cross_entropy", "ppo"])
def test_plain(backend, device, name, vocab, mode):
    check(name, backend, device, mode, vocab)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("cross_entropy", "ppo")])
def test_with_terms(backend, device, name, mode):
    check(name, backend, device, mode, 501 if mode == "one pass" else 256)


@pytest.mark.parametrize("name", ["cross_entropy", "entropy", "softcap"])
def test_rows_that_are_swept_twice(backend, device, name):
    check(name, backend, device, "one pass", 20_011, gaps=(0.0, 12.0, 20.0, 60.0), temperatures=(1.0,))


@pytest.mark.parametrize("mode", ["one pass", "recompute"])
def test_the_largest_vocabulary(backend, device, mode):
    check("cross_entropy", backend, device, mode, 151_936, gaps=(0.0, 16.0, 45.0), temperatures=(0.7,))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_rounded_once(backend, device, mode, dtype):
    """The gradient's float32 number, rounded; so is each element's truth, but beside the middle of two numbers."""
    check("cross_entropy", backend, device, mode, 500, dtype, temperatures=(1.0, 0.5))
    if mode == "one pass":
        check("entropy", backend, device, mode, 256, dtype, temperatures=(0.7,))


@pytest.mark.parametrize("name", LOSSES)
def test_every_instruction_set(name):
    require("cpu")
    for instruction_set in instruction_sets():
        with using(instruction_set):
            for mode in ("one pass", "none"):
                check(name, "cpu", torch.device("cpu"), mode, 200)


@pytest.mark.parametrize("gap", [0.0, 3.0, 12.0, 40.0])
def test_the_truth_itself(gap):
    """float64's, against more digits than it has."""
    mpmath = pytest.importorskip("mpmath")
    case = Case(100, torch.float32, (gap,), (0.7,))
    row = case.row()
    with mpmath.workdps(60):
        t = mpmath.mpf(float(case.temperature[0]))
        z = [mpmath.mpf(x) / t for x in case.logits[0].tolist()]
        total = sum(mpmath.exp(x) for x in z)
        at = int(case.target_tokens[0])
        p = [mpmath.exp(x) / total for x in z]
        logp = mpmath.log(p[at])
        entropy = -sum(x * mpmath.log(x) for x in p)
        pairs = [(row.logp, logp), (row.rest / (1 + row.rest), 1 - p[at]), (row.entropy, entropy)]
        for ours, exact in pairs:
            assert abs(ours.item() / exact - 1) < 1e-13
    assert math.isclose(row.lse.item(), float(mpmath.log(total)), rel_tol=1e-14)
