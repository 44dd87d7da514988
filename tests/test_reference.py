"""What the other tests trust: the reference against formulas written out here and against torch's own cross entropy.

And the derivative that every backend holds by hand, against autograd of the eager formula.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from cases import EPS, LOSSES, RATIO_LOSSES, inputs_of, make, run
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db

import fused_losses
from fused_losses import backends, reference
from fused_losses.objectives import OBJECTIVES
from fused_losses.problem import Problem, Stats, Targets, Terms, Transform

INF, NAN = math.inf, math.nan


def by_hand_ppo(x: float, q: float, a: float, low: float, high: float) -> tuple[float, float]:
    r = math.exp(x - q)
    flows = not ((a > 0 and r > high) or (a < 0 and r < low))
    return -min(r * a, min(max(r, low), high) * a), -r * a if flows else 0.0


def by_hand_sapo(x: float, q: float, a: float, tau_positive: float, tau_negative: float) -> tuple[float, float]:
    r, tau = math.exp(x - q), tau_positive if a > 0 else tau_negative
    s = 1 / (1 + math.exp(-tau * (r - 1)))
    return -4 / tau * s * a, -4 * s * (1 - s) * r * a


def by_hand_cispo(x: float, q: float, a: float, low: float, high: float) -> tuple[float, float]:
    coefficient = min(max(math.exp(x - q), low), high) * a
    return -coefficient * x, -coefficient


# The loss and its derivative by x, written from the papers' definitions. (-min(...) of ppo is max(-..., -...).)
BY_HAND: dict[str, Callable[..., tuple[float, float]]] = {
    "cross_entropy": lambda x: (-x, -1.0),
    "importance_sampling": lambda x, q, a: (-math.exp(x - q) * a, -math.exp(x - q) * a),
    "ppo": by_hand_ppo,
    "cispo": by_hand_cispo,
    "dro": lambda x, q, a, beta: (-(x * a - beta / 2 * (x - q) ** 2), -a + beta * (x - q)),
    "sapo": by_hand_sapo,
}


@pytest.mark.parametrize("objective", BY_HAND)
def test_formula_by_hand(objective):
    """Loss, mean and gradient of the logits, one token at a time in Python floats."""
    case = make(objective, (40,), 5, ignored=False, reduction="sum")
    inputs = torch.stack(inputs_of(case)).T.tolist() if objective != "cross_entropy" else [[]] * 40
    total, gradients = 0.0, []
    for row, target, values in zip(case.storage.double().tolist(), case.target_tokens.tolist(), inputs, strict=True):
        p = [math.exp(z) / sum(map(math.exp, row)) for z in row]
        limits = len(OBJECTIVES[objective].limits)  # not in use: infinite
        loss, g = BY_HAND[objective](math.log(p[target]), *values[: len(values) - limits])
        total += loss
        gradients.append([g * ((j == target) - p[j]) for j in range(len(row))])
    got = run(case.reference, case, torch.float64)
    torch.testing.assert_close(got.loss.item(), total, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.gradient, torch.tensor(gradients).double(), rtol=1e-6, atol=1e-7)
    mean = run(case.reference, case, torch.float64, reduction="mean")
    torch.testing.assert_close(mean.loss.item(), total / 40, rtol=1e-12, atol=1e-12)


DEFAULTS = {
    "cross_entropy": {"reduction": "mean"},
    "importance_sampling": {"reduction": "mean"},
    "ppo": {"reduction": "mean", "clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
    "cispo": {"reduction": "sum", "clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
    "dro": {"reduction": "sum", "beta": 0.1},
    "sapo": {"reduction": "mean", "tau_positive": 1.0, "tau_negative": 1.05},
}


@pytest.mark.parametrize("objective", DEFAULTS)
def test_defaults(objective):
    case = make(objective, (6,), 5)
    explicit = case.having(**DEFAULTS[objective])
    assert run(case.public("auto"), case).loss == run(case.public("auto"), explicit).loss
    assert run(case.reference, case).loss == run(case.reference, explicit).loss


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("objective", LOSSES)
def test_reference_gradcheck(objective, reduction):
    # the gradient is by definition not that of the value: a factor is a constant in it
    if objective in ("cispo", "dft", "dppo_tv", "dppo_kl"):
        pytest.skip("has a stopped gradient: see test_formula_by_hand")
    case = make(objective, (4,), 5, torch.float64, weights=torch.tensor([1.0, 2.0, 0.5, 3.0]), temperature=0.7)
    logits = case.storage.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: case.reference(z, case.target_tokens, **case.keywords, reduction=reduction), (logits,)
    )


def _cross_entropy_samples() -> list:
    (info,) = (op for op in op_db if op.name == "nn.functional.cross_entropy")
    samples = info.sample_inputs("cpu", torch.float32, requires_grad=False)
    return [
        s
        for s in samples
        if s.input.dim() == 2
        and s.args[0].dtype == torch.int64
        and s.kwargs.get("weight") is None
        and not s.kwargs.get("label_smoothing")
    ]


def test_torch_cross_entropy(backend, device):
    """torch's own samples and its own answers, 2-D with class indices. All ignored: 0 here, NaN there."""
    samples = _cross_entropy_samples()
    assert len(samples) >= 3
    for sample, mode in itertools.product(samples, ({}, {"recompute": True})):
        target = sample.args[0]
        keywords = {k: v for k, v in sample.kwargs.items() if k in ("reduction", "ignore_index")}
        theirs, ours = (sample.input.clone().to(device).requires_grad_() for _ in range(2))
        expected = torch.nn.functional.cross_entropy(theirs, target.to(device), **keywords)
        loss = fused_losses.cross_entropy(ours, target.to(device), backend=backend, **keywords, **mode)
        torch.testing.assert_close(loss, expected.nan_to_num())
        loss.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad.nan_to_num())


HAZARDS = {  # objective, x, q, A, loss; measured to give NaN when written the obvious way; the gradient of each is 0
    "clipped, exp overflows": ("ppo", -1.0, -100.0, 1.0, -1.2),
    "advantage 0, q = -inf": ("ppo", -1.0, -INF, 0.0, 0.0),
    "advantage 0, q = -inf, no clip": ("importance_sampling", -1.0, -INF, 0.0, 0.0),
    "advantage 0, x = -inf": ("cispo", -INF, -1.0, 0.0, 0.0),
    "advantage 0, exp overflows": ("importance_sampling", -1.0, -1000.0, 0.0, 0.0),
    "ratio 0": ("importance_sampling", -INF, -1.0, 2.0, 0.0),
    "clipped at ratio 0": ("ppo", -INF, -1.0, -2.0, 1.6),
    "probability 0, any advantage": ("dppo_tv", -INF, -1.0, 2.0, 0.0),
    "out of the region, probability 0": ("dppo_kl", -INF, -1.0, -2.0, 0.0),
    "out of the region, exp overflows": ("dppo_tv", -1.0, -100.0, 1.0, 0.0),
    "out of the region, exp overflows, KL": ("dppo_kl", -1.0, -100.0, 1.0, 0.0),
    "advantage 0, q = -inf, KL": ("dppo_kl", -1.0, -INF, 0.0, 0.0),
}


@pytest.mark.parametrize("hazard", HAZARDS)
def test_hazard(backend, device, hazard):
    objective, x, old_logprobs, advantage, expected = HAZARDS[hazard]
    other = math.log(-math.expm1(x)) if x > -INF else 0.0
    for function in (getattr(reference, objective), getattr(fused_losses, objective)):
        for options in ({}, {"recompute": True}):
            logits = torch.tensor([[x, other]], device=device, requires_grad=True)
            target = torch.tensor([0], device=device)
            loss = function(logits, target, old_logprobs, advantage, backend=backend, **options)
            loss.backward()
            assert loss.item() == pytest.approx(expected)
            assert not logits.grad.any()


GRID: dict[str, tuple[float, ...]] = {
    "old_logprobs": (0.0, -1.0, -1.5, -2.25, -90.0, -200.0, -INF, INF, NAN),
    "advantages": (1.0, -1.0, 0.0, 2.5, -1e30, INF, NAN),
    "clip_low_threshold": (1.0, 0.0, 0.8, INF, NAN, -0.1),
    "clip_high_threshold": (1.0, 0.0, 1.2, INF, NAN, -0.1),
    "beta": (0.1, 0.0, INF, NAN, -1.0),
    "tau_positive": (1.0, 0.3, 0.0, NAN),
    "tau_negative": (1.05, -1.0),
    "log_ratio_clamp": (INF, 0.25, 0.0, NAN),
    "dual_clip": (INF, 3.0, NAN),
    "delta": (INF, 1.5, 0.5, -1.0),
    "divergence_low": (0.2, 0.0, INF, NAN, -0.1),
    "divergence_high": (0.1, 0.0, INF, NAN, -0.1),
    "ratio_cap": (INF, 1.5, 0.0, NAN),
}
LOGPROBS = (-1.0, -1.5, 0.0, -1e-6, -30.0, -1e5, -INF)


def grid(objective: str) -> tuple[Tensor, list[Tensor]]:
    """Every combination, or many of them; q = x with a bound of 1 has a ratio equal to a bound."""
    axes = [LOGPROBS, *(GRID.get(name, (0.5, 0.0, INF, NAN)) for name in OBJECTIVES[objective].columns)]
    most = 30_000
    if math.prod(map(len, axes)) <= most:
        points = torch.tensor(list(itertools.product(*axes)))
    else:
        generator = torch.Generator().manual_seed(0)
        picks = [torch.randint(len(axis), (most,), generator=generator) for axis in axes]
        points = torch.stack([torch.tensor(axis)[pick] for axis, pick in zip(axes, picks, strict=True)], 1)
    x, *inputs = points.T.contiguous()
    return x, inputs


def tokens_of_logprobs(backend, device, objective, x, inputs):
    """(loss, logprobs, g) of the middle stage, for rows whose target has logit x and whose others make up for the rest
    of a sum of 1: so that the logprob is x, or next to it."""
    n = x.numel()
    stats = torch.stack((torch.zeros(n), -torch.expm1(x), x)).to(device)
    columns = [i.to(device) if isinstance(i, Tensor) else i for i in inputs]
    columns += [math.inf] * (len(OBJECTIVES[objective].columns) - len(columns))
    problem = Problem(
        targets=Targets(torch.zeros(n, dtype=torch.int64, device=device), -100),
        transform=Transform(),
        weights=1.0,
        objective=OBJECTIVES[objective],
        inputs=tuple(columns),
        terms=Terms(),
        denominator=1.0,
        vocab=2,
        all_logprobs=False,
    )
    loss, logp, by = backends.resolve(backend, device).objective(Stats(stats), problem, False)
    return loss, logp, by.table[0]


@pytest.mark.parametrize("objective", LOSSES)
def test_derivative_by_hand(backend, device, objective):
    """The middle stage alone, fed with anything: see tokens_of_logprobs."""
    x, inputs = grid(objective)
    if backend == "triton" and device.type == "cpu":  # a millisecond a program
        pick = torch.randperm(x.numel(), generator=torch.Generator().manual_seed(0))[:2500]
        x, inputs = x[pick], [i[pick] for i in inputs]
    n = x.numel()
    loss, logp, g = tokens_of_logprobs(backend, device, objective, x, inputs)
    torch.testing.assert_close(logp.cpu(), x, rtol=2 * EPS, atol=2 * EPS)
    x = logp.cpu()

    leaf = x.clone().requires_grad_()
    expected = OBJECTIVES[objective].formula(leaf, *inputs)[0]
    (expected_g,) = torch.autograd.grad(expected.sum(), leaf)
    # what a rounding of the log ratio makes of g; exp amplifies it
    double = x.double().requires_grad_()
    exact = OBJECTIVES[objective].formula(double, *(i.double() for i in inputs))[0]
    (slope,) = torch.autograd.grad(exact.sum(), double, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), double) if slope.requires_grad else (torch.zeros(n).double(),)
    exponent = (x - inputs[0]).abs().nan_to_num(0.0, 0.0) if objective in RATIO_LOSSES else x.abs().nan_to_num(0, 0)
    amplified = (curvature.abs() * (1 + exponent)).nan_to_num(0.0, 0.0, 0.0)
    names = OBJECTIVES[objective].columns
    for got, want, what in ((loss.cpu(), expected.detach(), "loss"), (g.cpu(), expected_g, "g")):
        wrong = ~((got == want) | (got.isnan() & want.isnan()))
        allowed = 4 * EPS * ((2 + exponent) * want.abs() + amplified) + torch.finfo(torch.float32).smallest_normal
        wrong &= ~((got - want).abs() <= allowed)
        if wrong.any():
            at = int(wrong.nonzero()[0])
            values = {name: i[at].item() for name, i in zip(names, inputs, strict=True)}
            raise AssertionError(
                f"{what} at {int(wrong.sum())} of {n} points; first logp={x[at].item()}, {values}: "
                f"got {got[at].item()}, want {want[at].item()}"
            )


@pytest.mark.parametrize("objective", ["ppo", "cispo"])
def test_ratio_at_a_bound(backend, device, objective):
    """r equal to a bound is not clipped: the gradient flows."""
    x = torch.full((2,), -1.5)
    inputs = [x, torch.tensor([1.0, -1.0]), 1.0, 1.0]
    _, inputs[0], _ = tokens_of_logprobs(backend, device, objective, x, inputs)
    _, _, g = tokens_of_logprobs(backend, device, objective, x, inputs)
    assert g.tolist() == [-1.0, 1.0]
