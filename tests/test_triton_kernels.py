"""Kernel-level checks of triton_kernels: every path against float64, what is read and written, and seeded bugs.

Without a GPU the kernels run in Triton's interpreter (conftest.py sets TRITON_INTERPRET=1), whose cost is per block
operation: tiles are shrunk, so that small vocabularies reach the loops and tails of large ones.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from fused_losses.backends import eager
from fused_losses.backends import triton as backend
from fused_losses.objectives import OBJECTIVES, Objective
from fused_losses.terms import KL_TYPES, Seen, Terms, row_loss

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
REASON = backend.unusable(DEVICE)
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
interpreted = pytest.mark.skipif(DEVICE.type != "cpu", reason="watches the interpreter's memory accesses")

IGNORE = -100
BOUNDS = {"ppo": (0.8, 1.2), "cispo": (0.8, 1.2), "dro": (0.1,), "sapo": (1.0, 1.05)}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles of a real vocabulary's proportions: V = 100 has full tiles and a tail."""
    for name, value in {"_LANES_PER_WARP": 2, "_TILE": 32, "_TOKENS": 16, "_SUM_BLOCK": 16}.items():
        monkeypatch.setattr(backend, name, value)
    monkeypatch.setattr(backend, "_depth", lambda itemsize, per_element: 2)
    backend._plan.cache_clear()
    yield
    backend._plan.cache_clear()


def one_shot(monkeypatch: pytest.MonkeyPatch, wanted: bool) -> None:
    monkeypatch.setattr(backend, "_ONE_SHOT", 65536 if wanted else 0)
    backend._plan.cache_clear()


def guarded(values: Tensor, padding: int = 0) -> tuple[Tensor, Tensor]:
    """A copy of (N, V) in rows of V + padding, and the buffer around it, to see what is written outside."""
    n, vocab = values.shape
    buffer = torch.full((8 * (vocab + padding) + n * (vocab + padding),), 7.0, dtype=values.dtype, device=values.device)
    start = 4 * (vocab + padding) // 8 * 8
    view = buffer.as_strided((n, vocab), (vocab + padding, 1), start)
    view.copy_(values)
    return view, buffer


class Case:
    """Twelve rows: ordinary, masked, hopeless and clipped tokens."""

    def __init__(self, objective: str, vocab: int, dtype: torch.dtype, temperature: float = 0.7):
        n = 12
        generator = torch.Generator().manual_seed(vocab)
        self.objective, self.n, self.vocab = objective, n, vocab
        logits = torch.randn(n, vocab, generator=generator) * 2
        self.targets = torch.randint(0, vocab, (n,), generator=generator)
        self.weights = torch.rand(n, generator=generator) + 0.5
        self.temperature = torch.full((n,), temperature)
        self.targets[0], self.targets[1] = 0, vocab - 1
        logits[1, vocab - 1] += 6.0  # the maximum outside the body
        logits[2, self.targets[2]] = logits[2].logsumexp(0) + 5 * temperature  # p near 1
        logits[3] += 3000.0 if dtype != torch.float16 else 100.0
        logits[4] = torch.nan
        self.targets[4] = IGNORE
        logits[5] = torch.nan
        self.weights[5] = 0
        if vocab > 2:
            logits[6, torch.arange(vocab) != self.targets[6]] = -torch.inf
            logits[6, (self.targets[6] + 1) % vocab] = 1.0
        logits[7] = -torch.inf  # NaN
        logits[8, vocab // 2] = torch.nan
        self.targets[9] = vocab  # outside
        logits[10, vocab - 1] = torch.inf
        self.temperature[11] = -1.0
        self.hopeless = torch.tensor([7, 8, 9, 10, 11])
        self.logits = logits.to(dtype)
        logp = (
            self.logits.double().div(temperature).log_softmax(-1).gather(1, self.targets.clamp(0, vocab - 1)[:, None])
        )
        log_ratio = torch.tensor([0.0, 0.1, 0.1, -0.5, 0, 0, 0.5, 0, 0, 0, 0, 0])  # 3 and 6 are clipped
        old_logprobs = (logp[:, 0].float() - log_ratio).nan_to_num(-1.0)
        old_logprobs[4:6] = -200.0  # an infinite ratio in masked tokens
        advantages = torch.tensor([1.0, 1.0, -1.5, -1.0, -1.0, -1.0, 1.0]).repeat(2)[:n]
        self.inputs = (old_logprobs, advantages)[: len(OBJECTIVES[objective].inputs)] + BOUNDS.get(objective, ())

    def move(self, *values: object) -> list:
        return [
            tuple(self.move(*v)) if isinstance(v, tuple) else v.to(DEVICE) if isinstance(v, Tensor) else v
            for v in values
        ]

    def expected(self, mean: bool) -> tuple[Tensor, Tensor, Tensor]:
        """loss over all tokens but the hopeless ones, logprobs and gradient, in float64."""
        logits = self.logits.double().requires_grad_()
        read = torch.ones(self.n, dtype=torch.bool)
        read[[4, 5, *self.hopeless.tolist()]] = False
        index = self.targets.clamp(0, self.vocab - 1)[:, None]
        logp = (logits[read] / self.temperature[read, None]).log_softmax(-1).gather(1, index[read])[:, 0]
        objective = OBJECTIVES[self.objective]
        inputs = objective.padded(self.inputs)
        columns = [c[read].double() if isinstance(c, Tensor) else torch.tensor(c).double() for c in inputs]
        losses = objective.formula(logp, *columns)[0] * self.weights[read]
        total = self.weights[self.targets != IGNORE].sum() if mean else 1.0
        (gradient,) = torch.autograd.grad(losses.sum() / total, logits)
        logprobs = torch.zeros(self.n, dtype=torch.float64)
        logprobs[read] = logp.detach()
        logprobs[self.hopeless] = torch.nan
        gradient[self.hopeless] = torch.nan
        return losses.detach(), logprobs, gradient


def assert_gradient(gradient: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    bound = expected.nan_to_num().abs().amax(-1, keepdim=True) * 1e-5 + 5e-7  # 1 - p in float32
    error = (gradient.cpu().double() - expected).abs()
    assert torch.equal(gradient.cpu().isnan(), expected.isnan())
    assert (error.nan_to_num() <= expected.nan_to_num().abs() * tolerance + bound).all()


def run_one_pass(
    case: Case, mean: bool = True, padding: int = 0, in_place: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    logits, targets, inputs, weights, temperature = case.move(
        case.logits, case.targets, case.inputs, case.weights, case.temperature
    )
    logits, buffer = guarded(logits, padding)
    if in_place:
        gradient = logits
    else:
        gradient, buffer = guarded(torch.full_like(logits, 5.0).contiguous())
    loss, logprobs = backend.loss_and_grad(
        logits, targets, case.objective, inputs, weights, temperature, 1.0, mean, IGNORE, False, None, gradient
    )
    outside = buffer.numel() - gradient.numel()
    result = gradient.clone()
    gradient.fill_(7.0)
    assert (buffer == 7.0).all(), f"wrote into {outside} elements around the gradient"
    return loss, logprobs, result


def check_one_pass(case: Case, with_loss: bool = True, **options: object) -> None:
    mean = bool(options.get("mean", True))
    losses, logprobs, expected = case.expected(mean)
    loss, got_logprobs, gradient = run_one_pass(case, **options)
    torch.testing.assert_close(got_logprobs.cpu().double(), logprobs, rtol=1e-5, atol=2e-5, equal_nan=True)
    assert_gradient(gradient, expected, case.logits.dtype)
    assert not gradient[4:6].any() and not torch.signbit(gradient[4:6]).any()
    assert loss.isnan()  # of the hopeless rows
    if not with_loss:
        return
    case.targets[case.hopeless] = IGNORE  # without them it is a number
    total = case.weights[case.targets != IGNORE].sum() if mean else 1.0
    loss, _, gradient = run_one_pass(case, **options)
    torch.testing.assert_close(loss.cpu().double(), losses.sum() / total, rtol=1e-5, atol=1e-5)
    assert not gradient[case.hopeless].any()


def check_two_phase(case: Case, upstream: Tensor, padding: int = 0) -> None:
    _, logprobs, expected = case.expected(False)
    logits, targets, inputs, weights, temperature = case.move(
        case.logits, case.targets, case.inputs, case.weights, case.temperature
    )
    logits, _ = guarded(logits, padding)
    stats = backend.stats(logits, targets, weights, temperature, IGNORE, False, None)
    losses, got_logprobs, coefficients = backend.objective(
        stats, targets, case.objective, inputs, weights, temperature, 1.0, False, IGNORE, False, None
    )
    torch.testing.assert_close(got_logprobs.cpu().double(), logprobs, rtol=1e-5, atol=2e-5, equal_nan=True)
    assert not losses[4:6].any() and losses[case.hopeless].isnan().all()
    gradient, buffer = guarded(torch.full_like(logits, 5.0).contiguous())
    backend.grad(logits, targets, stats, coefficients, upstream.to(DEVICE), temperature, None, 0.0, gradient)
    inactive = coefficients.cpu() == 0
    result = gradient.clone()
    assert not result[inactive].any() and not torch.signbit(result[inactive]).any()
    assert_gradient(result, (expected * upstream[:, None]).masked_fill(inactive[:, None], 0.0), case.logits.dtype)
    gradient.fill_(7.0)
    assert (buffer == 7.0).all()


@pytest.mark.parametrize(
    ("shot", "vocab", "dtype"),
    [
        (True, 1, torch.bfloat16),
        (True, 8, torch.bfloat16),
        (True, 33, torch.float32),
        (True, 64, torch.float16),
        (False, 5, torch.float16),
        (False, 64, torch.float32),
        (False, 100, torch.float32),
        (False, 131, torch.bfloat16),
    ],
    ids=str,
)
def test_one_pass_equals_float64(shot: bool, vocab: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    one_shot(monkeypatch, shot)
    check_one_pass(Case("ppo", vocab, dtype))


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_every_objective_in_one_pass(objective: str) -> None:
    check_one_pass(Case(objective, 21, torch.float32), mean=False)


@pytest.mark.parametrize(
    ("shot", "vocab", "padding", "in_place"),
    [
        (True, 40, 8, False),
        (True, 33, 6, True),
        (False, 33, 7, False),
        (False, 33, 6, False),
        (False, 100, 4, True),
    ],
)
def test_row_strides(shot: bool, vocab: int, padding: int, in_place: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    one_shot(monkeypatch, shot)
    check_one_pass(Case("cross_entropy", vocab, torch.bfloat16), padding=padding, in_place=in_place)


def test_two_levels_of_strides() -> None:
    """logits[:, :-1] of (B, T, V), read where it lies; the gradient is contiguous."""
    case = Case("cross_entropy", 19, torch.float32)
    full = torch.randn(3, 5, 19)
    full[:, :-1] = case.logits.view(3, 4, 19)
    (full, targets, weights, temperature) = case.move(full, case.targets, case.weights, case.temperature)
    gradient = torch.empty(3, 4, 19, device=DEVICE)
    backend.loss_and_grad(
        full[:, :-1], targets, "cross_entropy", (), weights, temperature, 1.0, True, IGNORE, False, None, gradient
    )
    assert_gradient(gradient.view(12, 19), case.expected(True)[2], torch.float32)
    backend.loss_and_grad(
        full[:, :-1],
        targets,
        "cross_entropy",
        (),
        weights,
        temperature,
        1.0,
        True,
        IGNORE,
        False,
        None,
        full[:, :-1],
    )
    assert torch.equal(full[:, :-1].nan_to_num(), gradient.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("vocab", "padding"), [(1, 0), (64, 0), (131, 5)])
def test_two_phase_equals_float64(vocab: int, padding: int, dtype: torch.dtype) -> None:
    upstream = torch.linspace(-1.0, 2.0, 12)
    upstream[4:6] = torch.tensor([torch.inf, torch.nan])
    check_two_phase(Case("ppo", vocab, dtype), upstream, padding)


def test_real_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiles that ship, on a large odd vocabulary in bfloat16."""
    monkeypatch.undo()
    backend._plan.cache_clear()
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(2, 50257, generator=generator) * 4).bfloat16()
    targets = torch.tensor([50256, 40000])
    exact = logits.double().requires_grad_()
    torch.nn.functional.cross_entropy(exact, targets).backward()
    logits, targets = logits.to(DEVICE), targets.to(DEVICE)
    gradient = torch.empty_like(logits)
    backend.loss_and_grad(logits, targets, "cross_entropy", (), 1.0, 1.0, 1.0, True, IGNORE, False, None, gradient)
    assert_gradient(gradient, exact.grad, torch.bfloat16)
    stats = backend.stats(logits, targets, 1.0, 1.0, IGNORE, False, None)
    again = torch.empty_like(logits)
    coefficients = torch.full((2,), -0.5, device=DEVICE)
    backend.grad(logits, targets, stats, coefficients, 1.0, 1.0, None, 0.0, again)
    assert torch.equal(again, gradient)


HAZARDS = (0.0, -0.5, -40.0, -100.0, -torch.inf)


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_objectives_at_hazards(objective: str, limited: bool) -> None:
    """Extreme logprobs, ratios and advantages: the formula's values, and its derivative by autograd."""
    given = OBJECTIVES[objective]
    grid = torch.tensor(HAZARDS)
    advantages = torch.tensor([1.0, -1.0, 0.0, 1e30, torch.nan])
    logp, old, adv = (
        x.flatten()
        for x in torch.meshgrid(grid, torch.cat((grid, torch.tensor([torch.nan]))), advantages, indexing="ij")
    )
    limits = (30.0, 0.5, 1.1)[: len(given.limits)] if limited else ()
    inputs = ((old, adv)[: len(given.inputs)]) + BOUNDS.get(objective, ()) + limits
    x = logp.clone().requires_grad_()
    losses = given.formula(x, *(torch.as_tensor(c).expand(logp.shape) for c in given.padded(inputs)))[0]
    (g,) = torch.autograd.grad(losses.sum(), x)
    stats = torch.stack((torch.zeros_like(logp), torch.ones_like(logp), logp)).to(DEVICE)
    targets = torch.zeros(len(logp), dtype=torch.int64, device=DEVICE)
    columns = tuple(c.to(DEVICE) if isinstance(c, Tensor) else c for c in inputs)
    got, _, coefficients = backend.objective(
        stats, targets, objective, columns, 1.0, 1.0, 1.0, False, IGNORE, False, None
    )
    torch.testing.assert_close(got.cpu(), losses.detach(), rtol=2e-5, atol=0, equal_nan=True)
    torch.testing.assert_close(coefficients.cpu(), g, rtol=2e-5, atol=1e-12, equal_nan=True)  # denormal ratio * 1e30


@pytest.mark.parametrize("low, high", [(1.2, 0.8), (-0.1, 1.2), (torch.nan, 1.2), (0.8, torch.nan)])
@pytest.mark.parametrize("objective", ["ppo", "cispo"])
def test_senseless_bounds_give_nan(objective: str, low: float, high: float) -> None:
    stats = torch.tensor([[0.0], [1.0], [-1.0]], device=DEVICE)
    targets, column = torch.zeros(1, dtype=torch.int64, device=DEVICE), torch.zeros(1, device=DEVICE)
    loss, _, coefficients = backend.objective(
        stats, targets, objective, (column, column, low, high), 1.0, 1.0, 1.0, False, IGNORE, False, None
    )
    assert loss.isnan().all() and coefficients.isnan().all()


def test_unread_token_has_logprob_zero_at_any_temperature() -> None:
    stats = torch.tensor([[0.0], [1.0], [0.0]], device=DEVICE)
    targets, temperature = torch.full((1,), IGNORE, device=DEVICE), torch.full((1,), torch.nan, device=DEVICE)
    losses, logprobs, coefficients = backend.objective(
        stats, targets, "cross_entropy", (), 1.0, temperature, 1.0, False, IGNORE, False, None
    )
    assert losses.item() == logprobs.item() == coefficients.item() == 0


@pytest.mark.parametrize("n", [0, 1, 17])
def test_reduction(n: int) -> None:
    """The mean's own count with and without weights, any number of tokens, and 0 where none is active."""
    logits, targets = torch.zeros(n, 4, device=DEVICE), torch.arange(n, device=DEVICE) % 4
    targets[::3] = IGNORE
    weights = torch.linspace(1, 2, n, device=DEVICE)
    gradient = torch.empty_like(logits)
    loss, _ = backend.loss_and_grad(
        logits, targets, "cross_entropy", (), weights, 1.0, 1.0, True, IGNORE, False, None, gradient
    )
    active = n - len(targets[::3])
    assert loss.item() == pytest.approx(torch.tensor(4.0).log().item() if active else 0.0)
    loss, _ = backend.loss_and_grad(
        logits,
        targets,
        "cross_entropy",
        (),
        1.0,
        1.0,
        torch.tensor(8.0, device=DEVICE),
        False,
        IGNORE,
        False,
        None,
        gradient,
    )
    assert loss.item() == pytest.approx(active * torch.tensor(4.0).log().item() / 8)
    stats = backend.stats(logits, targets, weights, 1.0, IGNORE, False, None)
    loss, _, coefficients = backend.objective(
        stats, targets, "cross_entropy", (), 1.0, 1.0, 1.0, True, IGNORE, True, None
    )
    assert loss.item() == pytest.approx(torch.tensor(4.0).log().item() if active else 0.0)
    assert coefficients.sum().item() == pytest.approx(-1.0 if active else 0.0)
    backend.grad(logits, targets, stats, coefficients, 1.0, 1.0, None, 0.0, gradient)


def test_sums_in_float64() -> None:
    losses = torch.cat((torch.tensor([1e8]), torch.full((200,), 0.25), torch.tensor([-1e8]))).to(DEVICE)
    assert backend._reduce(losses, 1.0).item() == 50.0
    weights = losses.abs()
    total = backend._normaliser(torch.zeros(202, dtype=torch.int32, device=DEVICE), weights, IGNORE)
    assert total.item() == weights.double().sum().float().item()


def test_scale() -> None:
    """In place, by a device scalar; a zero stays zero, so that masked rows survive an infinite upstream gradient."""
    for vocab, padding, value in (
        (40, 0, 0.5),
        (33, 0, -2.0),
        (33, 3, 3.0),
        (100, 0, 1.0),
        (8, 0, torch.inf),
        (1, 0, 2.0),
    ):
        values = torch.randn(5, vocab, device=DEVICE).bfloat16()
        values[2] = 0
        gradient, buffer = guarded(values, padding)
        backend.scale(gradient, torch.tensor([value], device=DEVICE))
        expected = (values.float() * value).bfloat16()
        expected[2] = 0
        assert torch.equal(gradient, expected)
        gradient.fill_(7.0)
        assert (buffer == 7.0).all()


def test_columns_of_any_stride() -> None:
    case = Case("ppo", 21, torch.float32)
    _, _, expected = run_one_pass(case)
    wide = [torch.stack((c, torch.full_like(c, torch.nan)), 1)[:, 0] for c in case.inputs[:2]]
    case.inputs = (*wide, torch.tensor([0.8]).expand(12), torch.tensor([1.2]).expand(12))
    case.weights = case.weights.repeat_interleave(3)[::3]  # numbers, columns, and both at once
    _, _, gradient = run_one_pass(case)
    assert torch.equal(gradient.nan_to_num(), expected.nan_to_num())
    stats = torch.rand(3, 12, device=DEVICE)
    columns = case.move(*case.inputs, case.targets * 0)
    results = [
        backend.objective(stats, columns[4], "ppo", (*columns[:2], low, high), w, 1.0, 1.0, True, IGNORE, True, None)
        for low, high in ((0.8, 1.2), (columns[2], 1.2), (0.8, columns[3]))
        for w in (0.5, torch.full((12,), 0.5, device=DEVICE))
    ]
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("shot", [False, True])
def test_bitwise_repeatable(shot: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    one_shot(monkeypatch, shot)
    case = Case("ppo", 131, torch.float32)
    case.targets[case.hopeless] = IGNORE
    first, second = run_one_pass(case), run_one_pass(case)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_int32_targets_and_few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs loop over the rows that exceed the grid."""
    monkeypatch.setattr(backend, "_MAX_GRID", 5)
    backend._plan.cache_clear()
    case = Case("ppo", 33, torch.float32)
    case.targets = case.targets.int()
    upstream = torch.ones(12)
    wide = Case("ppo", 33, torch.float32)
    assert torch.equal(run_one_pass(case)[2].nan_to_num(), run_one_pass(wide)[2].nan_to_num())
    case.targets = case.targets.long()
    check_two_phase(case, upstream)


def test_all_logprobs_reads_tokens_of_weight_zero() -> None:
    logits = torch.randn(3, 9, device=DEVICE)
    targets = torch.tensor([1, 2, IGNORE], device=DEVICE)
    weights = torch.tensor([0.0, 1.0, 0.0], device=DEVICE)
    gradient = torch.empty_like(logits)
    expected = logits.log_softmax(-1)[torch.arange(2), targets[:2]]
    _, logprobs = backend.loss_and_grad(
        logits, targets, "cross_entropy", (), weights, 1.0, 1.0, True, IGNORE, True, None, gradient
    )
    torch.testing.assert_close(logprobs[:2], expected)
    assert logprobs[2] == 0 and not gradient[0].any() and not gradient[2].any() and gradient[1].any()
    stats = backend.stats(logits, targets, weights, 1.0, IGNORE, True, None)
    torch.testing.assert_close(stats[2, :2] - stats[0, :2] - stats[1, :2].log(), expected)


# Terms: K targets, entropy, KL, label smoothing, z-loss, softcap.

CLAMP = 1.5
TERMS: dict[str, Terms] = {
    "nothing": Terms(),
    "entropy": Terms(entropy=True, entropy_coef=0.3),
    "kl": Terms(kl_type=2, kl_coef=0.2, kl_weighted_by_ratio=True, log_ratio_clamp=CLAMP),
    "smoothed": Terms(label_smoothing=0.1, z_loss=0.01),
    "capped": Terms(softcap=4.0),
    "capped entropy": Terms(softcap=4.0, entropy=True, entropy_coef=0.3),
    "capped smoothed": Terms(label_smoothing=0.1, z_loss=0.01, softcap=4.0),
    "all of a policy": Terms(0.7, 0.0, 0.2, 0.3, CLAMP, 0.0, 0.01, 4.0, None, 0, True, True),
}


class TermsCase(Case):
    """The rows of `Case` with terms, and K targets each where the terms have shares."""

    def __init__(self, objective: str, vocab: int, dtype: torch.dtype, terms: Terms, num_targets: int = 0):
        super().__init__(objective, vocab, dtype)
        generator = torch.Generator().manual_seed(num_targets)
        logits = self.logits.float()
        if terms.softcap:  # an infinite logit is as good as another
            self.hopeless = torch.tensor([8, 9, 11])
        elif vocab > 2 and (terms.label_smoothing or num_targets > 1):  # -inf, or inf - inf
            logits[6] = torch.randn(vocab, generator=generator)
        self.logits = logits.to(dtype)
        logp = (logits / 0.7).log_softmax(-1).gather(1, self.targets.clamp(0, vocab - 1)[:, None])[:, 0]
        ref_logprobs = logp.nan_to_num(-1.0, posinf=-1.0, neginf=-1.0) + 0.3 * torch.randn(self.n, generator=generator)
        self.terms = terms._replace(ref_logprobs=ref_logprobs)
        if num_targets:
            first = self.targets
            self.targets = torch.randint(0, vocab, (self.n, num_targets), generator=generator)
            shares = torch.randn(self.n, num_targets, generator=generator)
            self.targets[:, 0] = first
            if num_targets > 1:
                self.targets[0, 1] = self.targets[0, 0]
                self.targets[1, -1] = IGNORE
                self.targets[2, 1], shares[2, 1] = vocab + 5, 0.0  # outside, but does not count
                shares[3, 0] = 0.0
                self.targets[3, 1] = self.targets[3, 0]
            self.targets[4] = IGNORE
            self.terms = self.terms._replace(shares=shares.masked_fill(self.targets == IGNORE, 0.0))

    def moved_terms(self) -> Terms:
        return self.terms._replace(
            ref_logprobs=self.terms.ref_logprobs.to(DEVICE),
            shares=None if self.terms.shares is None else self.terms.shares.to(DEVICE),
        )

    def expected_terms(self) -> tuple[Tensor, Tensor, Tensor]:
        """Loss per token, logprobs and entropy, gradient of the sum of losses, in float64 by autograd."""
        terms, targets = self.terms, self.targets.view(self.n, -1)
        read = torch.ones(self.n, dtype=torch.bool)
        read[[4, 5, *self.hopeless.tolist()]] = False
        logits = self.logits.double().requires_grad_()
        z = logits[read]
        if terms.softcap:
            z = terms.softcap * torch.tanh(z / terms.softcap)
        z = z / self.temperature[read, None].double()
        log_p, lse = z.log_softmax(-1), z.logsumexp(-1)
        targets = targets[read]
        outside = (targets < 0) | (targets >= self.vocab)
        logp = log_p.gather(1, targets.masked_fill(outside, 0)).masked_fill(targets == IGNORE, 0.0)
        entropy = -(log_p.exp() * log_p.clamp(min=-1000.0)).sum(-1)
        x, total = logp[:, 0], 1.0
        if terms.shares is not None:
            shares = terms.shares[read].double()
            x, total = (shares * logp).sum(1), shares.sum(1)
        columns = {
            name: torch.as_tensor(value, dtype=torch.float64).expand(self.n)[read]
            for name, value in zip(Terms._fields[:5], terms[:5], strict=True)
        }
        inputs = [
            torch.as_tensor(c, dtype=torch.float64).expand(self.n)[read]
            for c in OBJECTIVES[self.objective].padded(self.inputs)
        ]
        seen = Seen(x, lse, entropy, lse - z.mean(-1), total)
        value = row_loss(OBJECTIVES[self.objective].formula, seen, inputs, terms._replace(**columns)).value
        value = value * self.weights[read]
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        losses = torch.zeros(self.n, dtype=torch.float64)
        losses[self.hopeless] = torch.nan
        losses[read] = value.detach()
        logprobs = torch.zeros(terms.targets + 1, self.n, dtype=torch.float64)
        logprobs[:, self.hopeless] = torch.nan
        logprobs[:-1, read] = torch.where(outside & (targets != IGNORE), torch.nan, logp.detach()).T
        logprobs[-1, read] = entropy.detach()
        if not terms.entropy:
            logprobs[-1] = 0.0
        gradient[self.hopeless] = torch.nan
        return losses, logprobs, gradient


def assert_logprobs(got: Tensor, expected: Tensor, hopeless: Tensor) -> None:
    """In hopeless rows some target may be fine and an ignored one is 0 for all that."""
    some = torch.ones(expected.shape[1], dtype=torch.bool)
    some[hopeless] = False
    torch.testing.assert_close(got.cpu().double()[:, some], expected[:, some], rtol=1e-5, atol=2e-5, equal_nan=True)
    assert got.cpu()[0, hopeless].isnan().all()


def check_terms(case: TermsCase, padding: int = 0, in_place: bool = False) -> None:
    losses, logprobs, expected = case.expected_terms()
    logits, targets, inputs, weights, temperature = case.move(
        case.logits, case.targets, case.inputs, case.weights, case.temperature
    )
    terms = case.moved_terms()
    common = (targets, case.objective, inputs, weights, temperature, 1.0, False, IGNORE)
    rows, buffer = guarded(logits, padding)
    if in_place:
        gradient = rows
    else:
        gradient, buffer = guarded(torch.full_like(logits, 5.0))
    loss, got = backend.loss_and_grad(rows, *common, False, terms, gradient)
    assert_logprobs(got, logprobs, case.hopeless)
    assert_gradient(gradient, expected, case.logits.dtype)
    assert loss.isnan()  # of the hopeless rows
    assert not gradient[4:6].any() and not torch.signbit(gradient[4:6]).any()
    gradient.fill_(7.0)
    assert (buffer == 7.0).all()
    others = targets.clone()
    others[case.hopeless] = IGNORE  # without them the loss is a number
    rows, _ = guarded(logits, padding)
    loss, _ = backend.loss_and_grad(rows, others, *common[1:], False, terms, torch.empty_like(logits))
    scale = losses.nan_to_num().abs().max().item()
    torch.testing.assert_close(loss.cpu().double(), losses.nansum(), rtol=2e-5, atol=1e-5 * scale)

    rows, _ = guarded(logits, padding)
    stats = backend.stats(rows, targets, weights, temperature, IGNORE, False, terms)
    got_losses, got, coefficients = backend.objective(stats, *common, False, terms)
    assert_logprobs(got, logprobs, case.hopeless)
    torch.testing.assert_close(got_losses.cpu().double(), losses, rtol=2e-5, atol=1e-5 * scale, equal_nan=True)
    upstream = torch.linspace(-1.0, 2.0, 12)
    upstream[4:6] = torch.tensor([torch.inf, torch.nan])
    upstream[0] = 0.0
    gradient, buffer = guarded(torch.full_like(logits, 5.0))
    backend.grad(
        rows,
        targets,
        stats,
        coefficients,
        upstream.to(DEVICE),
        temperature,
        terms.shares,
        terms.softcap,
        gradient,
    )
    idle = (upstream == 0) | ~losses.new_tensor([r not in (4, 5) for r in range(12)]).bool()
    expected = (expected * upstream[:, None]).masked_fill(idle[:, None], 0.0)
    assert_gradient(gradient, expected, case.logits.dtype)
    assert not gradient[idle.to(DEVICE)].any()
    gradient.fill_(7.0)
    assert (buffer == 7.0).all()


@pytest.mark.parametrize(
    ("shot", "vocab", "dtype"),
    [
        (True, 1, torch.float32),
        (True, 33, torch.bfloat16),
        (True, 40, torch.float32),
        (False, 64, torch.float16),
        (False, 131, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", list(TERMS))
def test_terms_equal_float64(
    name: str, shot: bool, vocab: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_shot(monkeypatch, shot)
    check_terms(TermsCase("ppo", vocab, dtype, TERMS[name]))


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_every_objective_with_terms(objective: str) -> None:
    terms = TERMS["all of a policy"]
    if not OBJECTIVES[objective].inputs:
        terms = terms._replace(kl_weighted_by_ratio=False)
    check_terms(TermsCase(objective, 21, torch.float32, terms))


@pytest.mark.parametrize(
    ("num_targets", "shot", "vocab", "dtype", "padding", "in_place"),
    [
        (1, True, 33, torch.float32, 0, False),
        (2, True, 33, torch.bfloat16, 3, True),
        (5, False, 64, torch.float32, 0, False),
        (5, True, 40, torch.float32, 0, True),
        (5, False, 131, torch.bfloat16, 5, True),
        (70, True, 40, torch.float32, 0, False),
        (70, False, 131, torch.float32, 0, True),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["nothing", "smoothed", "capped smoothed", "entropy"])
def test_several_targets(
    name: str,
    num_targets: int,
    shot: bool,
    vocab: int,
    dtype: torch.dtype,
    padding: int,
    in_place: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one_shot(monkeypatch, shot)
    check_terms(TermsCase("cross_entropy", vocab, dtype, TERMS[name], num_targets), padding, in_place)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kl_type", range(len(KL_TYPES)))
def test_terms_at_hazards(kl_type: int, weighted: bool) -> None:
    """Extreme logprobs and coefficients of 0, inf and NaN, as the eager backend has them."""
    grid = torch.tensor(HAZARDS)
    coefficients = torch.tensor([0.0, 0.5, torch.inf, torch.nan])
    logp, ref, coefficient = (x.flatten() for x in torch.meshgrid(grid, grid[:-1], coefficients, indexing="ij"))
    n = len(logp)
    stats = torch.stack((torch.zeros(n), torch.ones(n), logp, -torch.ones(n), -torch.ones(n)))
    inputs = (torch.full((n,), -0.25), torch.ones(n), 0.8, 1.2)
    terms = Terms(coefficient, ref, coefficient, coefficient, CLAMP, 0.1, 0.01, 0.0, None, kl_type, weighted, True)
    targets = torch.zeros(n, dtype=torch.int64)
    expected = eager.objective(stats, targets, "ppo", inputs, 1.0, 1.0, 1.0, False, IGNORE, False, terms)
    moved = Terms(*(c.to(DEVICE) if isinstance(c, Tensor) else c for c in terms))
    inputs = tuple(c.to(DEVICE) if isinstance(c, Tensor) else c for c in inputs)
    got = backend.objective(
        stats.to(DEVICE), targets.to(DEVICE), "ppo", inputs, 1.0, 1.0, 1.0, False, IGNORE, False, moved
    )
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=2e-5, atol=0, equal_nan=True)


def test_stats_with_terms_as_eager() -> None:
    """The layout that eager.py defines, infinite logits, and rows that are not read."""
    logits = torch.randn(6, 21)
    logits[1, ::2] = -torch.inf
    logits[2] = -torch.inf
    logits[3, 4] = torch.inf
    targets = torch.tensor([[0, 20, 3], [1, IGNORE, 22], [2, 2, 2], [4, 5, -1], [IGNORE] * 3, [1, 2, 3]])
    weights = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    for softcap in (0.0, 2.0):
        terms = Terms(entropy=True, label_smoothing=0.1, softcap=softcap, shares=torch.ones(6, 3))
        expected = eager.stats(logits, targets, weights, 0.7, IGNORE, False, terms)
        moved = terms._replace(shares=terms.shares.to(DEVICE))
        got = backend.stats(logits.to(DEVICE), targets.to(DEVICE), weights.to(DEVICE), 0.7, IGNORE, False, moved).cpu()
        bad = expected[1].isnan()
        torch.testing.assert_close(got[:, ~bad], expected[:, ~bad], rtol=1e-5, atol=1e-5, equal_nan=True)
        assert got[1, bad].isnan().all()


def test_stages_with_terms_as_eager() -> None:
    """What a loss never asks for, or float64 can't tell: single coefficients, an ignore_index inside the vocabulary,
    targets outside of it, infinite logits of targets."""
    generator = torch.Generator().manual_seed(0)
    n, vocab, ignore_index = 6, 41, 3
    logits = torch.randn(n, vocab, generator=generator)
    targets = torch.tensor([[0, 40, 3], [3, 3, 3], [2, 2, 5], [4, -1, 3], [7, 8, 9], [3, 1, vocab]])
    shares = torch.rand(n, 3, generator=generator).masked_fill(targets == ignore_index, 0.0)
    shares[5, 2] = 0.0
    logits[4, 8] = -torch.inf
    terms = Terms(entropy=True, entropy_coef=0.1, z_loss=0.01, shares=shares)

    def run(module: ModuleType, device: torch.device) -> list[Tensor]:
        x, t, given = logits.to(device), targets.to(device), terms._replace(shares=shares.to(device))
        common = (t, "cross_entropy", (), 1.0, 0.7, 1.0, True, ignore_index)
        gradient = torch.empty_like(x)
        loss, logprobs = module.loss_and_grad(x, *common, False, given, gradient)
        stats = module.stats(x, t, 1.0, 0.7, ignore_index, False, given)
        stages = module.objective(stats, *common, False, given)
        found = [loss, logprobs, gradient, stats, *stages]
        for i in range(4):
            coefficients = torch.zeros(4, n, device=device)
            coefficients[i] = torch.linspace(0, 1, n)
            found.append(torch.empty_like(x))
            module.grad(x, t, stats, coefficients, 2.0, 0.7, given.shares, 0.0, found[-1])
        return found

    for got, expected in zip(run(backend, DEVICE), run(eager, torch.device("cpu")), strict=True):
        torch.testing.assert_close(got.cpu(), expected, rtol=2e-5, atol=1e-6, equal_nan=True)


def test_mean_over_several_targets() -> None:
    """A row counts once, where any of its targets is not ignored."""
    targets = torch.tensor([[IGNORE, 1], [IGNORE, IGNORE], [0, IGNORE]], device=DEVICE)
    weights = torch.tensor([1.0, 2.0, 4.0], device=DEVICE)
    assert backend._normaliser(targets, weights, IGNORE).item() == 5.0


def test_duplicates_share_an_element() -> None:
    """Any number of targets may be the same one; what the element gets is rounded once."""
    logits = torch.randn(1, 9).bfloat16()
    shares = torch.rand(1, 40)
    gradient = torch.empty_like(logits, device=DEVICE)
    targets = torch.full((1, 40), 4, device=DEVICE)
    terms = Terms(shares=shares.to(DEVICE))
    common = ("cross_entropy", (), 1.0, 1.0, 1.0, False, IGNORE, False)
    backend.loss_and_grad(logits.to(DEVICE), targets, *common, terms, gradient)
    single = torch.empty_like(gradient)
    one = Terms(shares=shares.sum(1, keepdim=True).to(DEVICE))
    backend.loss_and_grad(logits.to(DEVICE), targets[:, :1].contiguous(), *common, one, single)
    torch.testing.assert_close(gradient, single, rtol=2**-7, atol=0)


def test_tanh() -> None:
    """Through stats: V = 1 has its squashed logit nowhere, V = 2 as the difference of two."""
    x = torch.cat((torch.linspace(-12, 12, 997), torch.logspace(-6, 0, 300)))
    logits = torch.stack((x, torch.zeros_like(x)), 1).to(DEVICE)
    targets = torch.zeros(len(x), dtype=torch.int64, device=DEVICE)
    _, logprobs, _ = backend.objective(
        backend.stats(logits, targets, 1.0, 1.0, IGNORE, False, Terms(softcap=1.0)),
        targets,
        "logprobs",
        (),
        1.0,
        1.0,
        1.0,
        False,
        IGNORE,
        False,
        Terms(softcap=1.0),
    )
    torch.testing.assert_close(
        logprobs[0].cpu().double(), torch.nn.functional.logsigmoid(torch.tanh(x.double())), rtol=3e-7, atol=0
    )


def test_unaligned_and_strided_inputs() -> None:
    """A tuple of columns holds whole, aligned ones; what is neither is copied."""
    wide = torch.randn(3, 13, device=DEVICE)
    for column in (wide[0, 1:], wide[1, :12:3], wide[2, :1].expand(5), wide[0, 0], wide[:, 0]):
        (value,), vary = backend._tuple((column,))
        assert value.data_ptr() % 16 == 0 and torch.equal(value, column)
        assert vary == (value.dim() > 0 and value.stride(0) == 1)
    _, vary = backend._tuple((wide[0], 2.0, wide[0, :1].expand(13), wide[0]))
    assert vary == 0b1001


def test_several_inputs() -> None:
    """Which of the columns vary is one bit each."""
    stats = torch.tensor([[0.0, 0.0], [1.0, 1.0], [-1.0, -1.0]], device=DEVICE)
    targets = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    old, advantages = torch.tensor(-1.0, device=DEVICE), torch.tensor([1.0, 2.0], device=DEVICE)
    high = torch.tensor([1.2, 0.9], device=DEVICE)
    losses, _, _ = backend.objective(
        stats, targets, "ppo", (old, advantages, 0.8, high), 1.0, 1.0, 1.0, False, IGNORE, False, None
    )
    torch.testing.assert_close(losses.cpu(), torch.tensor([-1.0, -1.8]))


def test_custom_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton_objectives import NUM_INPUTS, WEIGHTED_SUM

    monkeypatch.setitem(OBJECTIVES, WEIGHTED_SUM.name, WEIGHTED_SUM)
    inputs = tuple(torch.randn(12) if i % 3 else 0.5 for i in range(NUM_INPUTS))
    case = Case(WEIGHTED_SUM.name, 21, torch.float32)
    case.inputs = inputs
    check_two_phase(case, torch.ones(12))
    check_one_pass(case)
    with_terms = TermsCase(WEIGHTED_SUM.name, 21, torch.float32, TERMS["entropy"])
    with_terms.inputs = inputs
    check_terms(with_terms)


def test_objective_without_a_triton_function(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = Objective(
        "no_advantage", lambda logp: (logp, logp)
    )  # a name that triton_kernels has for something else
    monkeypatch.setitem(OBJECTIVES, objective.name, objective)
    logits = torch.zeros(1, 3, device=DEVICE)
    targets = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    with pytest.raises(RuntimeError, match="'no_advantage' has no Triton function"):
        backend.loss_and_grad(logits, targets, objective.name, (), 1.0, 1.0, 1.0, False, IGNORE, False, None, logits)


class Accesses:
    """Byte addresses that the interpreted kernels touched."""

    def __init__(self) -> None:
        self.loads: set[int] = set()
        self.stores: set[int] = set()

    def of(self, addresses: set[int], tensor: Tensor) -> set[int]:
        start = tensor.data_ptr()
        return {(a - start) // tensor.element_size() for a in addresses if start <= a < start + tensor.nbytes}


@pytest.fixture
def accesses(monkeypatch: pytest.MonkeyPatch) -> Accesses:
    from triton.runtime.interpreter import InterpreterBuilder

    seen = Accesses()

    def watch(name: str, into: set[int]) -> None:
        original: Callable = getattr(InterpreterBuilder, name)

        def watched(self: object, pointers, *args):
            mask = args[0] if name == "create_masked_load" else args[1]
            into.update(pointers.data[mask.data].ravel().tolist())
            return original(self, pointers, *args)

        monkeypatch.setattr(InterpreterBuilder, name, watched)

    watch("create_masked_load", seen.loads)
    watch("create_masked_store", seen.stores)
    return seen


@interpreted
@pytest.mark.parametrize("shot", [False, True])
@pytest.mark.parametrize("vocab", [32, 51])
def test_reads_active_rows_only(shot: bool, vocab: int, accesses: Accesses, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inactive rows and rows with coefficient 0 are not read where that can be known; nothing lies out of bounds."""
    one_shot(monkeypatch, shot)
    logits = torch.randn(4, vocab)
    targets, weights = torch.tensor([1, IGNORE, 2, vocab + 9]), torch.tensor([1.0, 1.0, 0.0, 1.0])
    gradient = torch.empty_like(logits)
    arguments = (weights, 1.0, IGNORE, False)
    everything = set(range(4 * vocab))
    active = set(range(vocab)) | set(range(3 * vocab, 4 * vocab))

    backend.loss_and_grad(logits, targets, "cross_entropy", (), weights, 1.0, 1.0, True, IGNORE, False, None, gradient)
    assert accesses.of(accesses.loads, logits) == active
    assert accesses.of(accesses.stores, gradient) == everything
    accesses.loads.clear()
    stats = backend.stats(logits, targets, *arguments, None)
    assert accesses.of(accesses.loads, logits) == active
    accesses.loads.clear()
    accesses.stores.clear()
    coefficients = torch.tensor([0.0, 1.0, 0.0, torch.nan])
    backend.grad(logits, targets, stats, coefficients, 2.0, 1.0, None, 0.0, gradient)
    assert accesses.of(accesses.loads, logits) == active - set(range(vocab)) | set(range(vocab, 2 * vocab))
    assert accesses.of(accesses.stores, gradient) == everything
    accesses.loads.clear()
    accesses.stores.clear()
    one = torch.ones(1)
    backend.scale(gradient, one)
    known = accesses.of(accesses.loads, gradient) | accesses.of(accesses.stores, gradient)
    assert not known, "an upstream gradient of 1 costs no memory traffic"


@interpreted
@pytest.mark.parametrize("shot", [False, True])
@pytest.mark.parametrize("vocab", [32, 51])
def test_reads_active_rows_only_with_terms(
    shot: bool, vocab: int, accesses: Accesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_shot(monkeypatch, shot)
    logits = torch.randn(4, vocab)
    targets = torch.tensor([[1, IGNORE, 3], [IGNORE] * 3, [2, 3, 4], [vocab + 9, 2**40, -1]])
    shares = torch.ones(4, 3).masked_fill(targets == IGNORE, 0.0)
    weights, gradient = torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.empty_like(logits)
    terms = Terms(label_smoothing=0.1, softcap=3.0, entropy=True, shares=shares)
    active = set(range(vocab)) | set(range(3 * vocab, 4 * vocab))
    common = (weights, 1.0, 1.0, True, IGNORE, False)
    backend.loss_and_grad(logits, targets, "cross_entropy", (), *common, terms, gradient)
    assert accesses.of(accesses.loads, logits) == active
    assert accesses.of(accesses.stores, gradient) == set(range(4 * vocab))
    accesses.loads.clear()
    stats = backend.stats(logits, targets, weights, 1.0, IGNORE, False, terms)
    assert accesses.of(accesses.loads, logits) == active
    for row in range(4):  # any one of the four
        accesses.loads.clear()
        coefficients = torch.zeros(4, 4)
        coefficients[row, 2] = 1.0
        backend.grad(logits, targets, stats, coefficients, 2.0, 1.0, shares, 3.0, gradient)
        assert accesses.of(accesses.loads, logits) == set(range(2 * vocab, 3 * vocab))
        assert not gradient[[0, 1, 3]].any()


@interpreted
def test_no_access_out_of_bounds(accesses: Accesses) -> None:
    tensors = [torch.randn(5, 21), torch.tensor([0, 20, -1, 21, 2**40]), torch.rand(5)]
    logits, targets, weights = tensors
    gradient = torch.empty_like(logits)
    _, logprobs = backend.loss_and_grad(
        logits, targets, "cross_entropy", (), weights, 1.0, 1.0, False, IGNORE, False, None, gradient
    )
    assert logprobs[:2].isfinite().all() and logprobs[2:].isnan().all() and gradient[2:].isnan().all()
    inside = set()
    for tensor in (*tensors, gradient, logprobs):
        inside.update(range(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes))
    strangers = {a for a in accesses.loads | accesses.stores if a not in inside}
    assert len(strangers) <= 2 * 5 + 2  # row_losses and the loss, which the backend made itself


@interpreted
def test_offsets_beyond_int32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows 2^31 elements from the first one, in memory that is reserved but touched in three places only."""
    from triton.runtime.interpreter import GridExecutor

    monkeypatch.setattr(
        GridExecutor, "_restore_args_dev", lambda *args: None
    )  # it copies whole storages onto themselves
    try:
        buffer = torch.empty(2**31 + 64, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("the system doesn't reserve 4 GiB of virtual memory")
    logits = buffer.as_strided((3, 19), (2**30, 1))
    values = torch.randn(3, 19).half()
    logits.copy_(values)
    targets, weights = torch.tensor([3, 4, 5]), torch.ones(3)
    expected = values.double().log_softmax(-1)[torch.arange(3), targets]
    stats = backend.stats(logits, targets, weights, 1.0, IGNORE, False, None)
    torch.testing.assert_close(stats[2] - stats[0] - stats[1].log(), expected.float(), rtol=1e-5, atol=1e-5)
    gradient = torch.empty(3, 19, dtype=torch.float16)
    backend.grad(logits, targets, stats, torch.ones(3), 1.0, 1.0, None, 0.0, gradient)
    _, logprobs = backend.loss_and_grad(
        logits, targets, "logprobs", (), 1.0, 1.0, 1.0, False, IGNORE, False, None, logits
    )
    torch.testing.assert_close(logprobs, expected.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.contiguous(), gradient, rtol=1e-3, atol=1e-6)


# Seeded bugs. Each is one substitution in a copy of the kernels; the checks below must notice every one.

MUTANTS = [
    ("rows.py", "(VECTOR - offset % VECTOR) % VECTOR", "offset % VECTOR"),
    ("rows.py", "(vocab - head) // VECTOR", "vocab // VECTOR"),
    (
        "rows.py",
        "columns < tl.where(i < VECTOR, head, vocab)",
        "columns < tl.where(i < VECTOR, head, vocab + 1)",
    ),
    ("rows.py", "(row % inner) * inner_stride", "row * inner_stride"),
    ("rows.py", "tl.where(temperature > 0, tl.div_rn", "tl.where(temperature != 0, tl.div_rn"),
    ("rows.py", "(target >= 0) & (target < vocab)", "(target >= 0) & (target <= vocab)"),
    ("rows.py", "-3.4028234663852886e38", 'float("-inf")'),
    ("stats.py", "return total * shrink, moment", "return total, moment"),
    ("stats.py", "(moment + tl.maximum(delta, LOWEST) * total) * shrink", "moment * shrink"),
    ("stats.py", "tl.maximum(delta, LOWEST)", "delta"),
    ("stats.py", "spread += tl.maximum(delta, FLOOR) * count", "spread += 0.0 * delta"),
    ("stats.py", "tl.maximum(delta, FLOOR) * count", "delta * count"),
    ("stats.py", "e * tl.maximum(t, LOWEST)", "e * t"),
    ("stats.py", "tl.sum(tl.where(inside, t, 0.0), 0)", "tl.sum(t, 0)"),
    ("stats.py", "count = full // LANES + tl.sum(inside.to(tl.int32), 0)", "count = full // LANES"),
    ("stats.py", "tl.store(out + row, peak if CAPPED else maximum)", "tl.store(out + row, maximum)"),
    ("stats.py", "moment * LN2)", "moment)"),
    ("stats.py", "spread * LN2 / vocab", "spread / vocab"),
    ("softcap.py", "tl.where(u < 0, -far, far)", "far"),
    ("softcap.py", "2.100363933e-2", "2.1e-1"),
    ("softcap.py", "return inverse_t * softcap,", "return inverse_t,"),
    ("softcap.py", 'return tl.where(inside, y, float("-inf"))', "return y"),
    ("stats.py", "if full < length:", "if full > length:"),
    ("stats.py", "columns < length - full", "columns <= length - full"),
    ("stats.py", 'other=float("-inf")', "other=0.0"),
    ("stats.py", "(maximum - top) * scale", "(maximum - maximum) * scale"),
    ("stats.py", "read = read & (at(weights", "read = read | (at(weights"),
    ("grad.py", "inverse_t * ((total - e) / total)", "inverse_t"),
    ("grad.py", "whole * ((total - e) / total)", "whole * (1.0 - p.to(tl.bfloat16).to(tl.float32))"),
    ("grad.py", "by[2] - by[0] * whole + by[1] * mean", "by[2] - by[0] + by[1] * mean"),
    ("grad.py", "whole + by[1] * mean)", "whole)"),
    ("grad.py", "inverse_t * by[3] / vocab", "by[3] / vocab"),
    ("grad.py", "a + b * tl.maximum(t, LOWEST)", "a + b * t"),
    (
        "grad.py",
        "squash(load_ragged(logits, offset, head, body, vocab), inverse_cap, CAPPED)",
        "load_ragged(logits, offset, head, body, vocab)",
    ),
    ("grad.py", "(by[2] - by[1] * (tl.maximum(t, LOWEST) * LN2 - mean))", "(by[2] - by[1] * (t * LN2 - mean))"),
    ("grad.py", "return value * inverse_t", "return value"),
    ("grad.py", "tl.abs(by[2]) + tl.abs(by[3])", "0.0"),
    ("grad.py", "is_any(outside)", "is_any(outside & (counts == 0))"),
    ("terms.py", "tl.where((a == 0) | (b == 0), 0.0, a * b)", "a * b"),
    ("terms.py", 'tl.where(difference == float("-inf"), 0.0, difference)', "difference"),
    ("terms.py", "tl.where(flows, both, slope)", "both"),
    ("terms.py", "& (target != ignore_index)", "& (target >= 0)"),
    ("terms.py", "range(0, num_targets, CHUNK)", "range(0, CHUNK, CHUNK)"),
    ("terms.py", "h, zeta = nan_unless(valid, h, zeta)", "h, zeta = h, zeta"),
    ("terms.py", "g = (1.0 - label_smoothing) * g", "g = g"),
    ("grad.py", "(target >= head + start)", "(target > head + start)"),
    ("grad.py", "owner = tl.where(in_body, owner, start == 0)", "owner = owner & in_body"),
    ("grad.py", "inside = columns < length - start", "inside = columns <= length - start"),
    ("grad.py", "tl.where(x == 0, x, x * factor)", "x * factor"),
    ("loss_and_grad.py", "active = read & (weight != 0)", "active = read"),
    (
        "loss_and_grad.py",
        "body_pointer(grad, grad_offset, head, ALIGNED)",
        "body_pointer(grad, offset, head, ALIGNED)",
    ),
    ("loss_and_grad.py", "logp = tl.where(given, ", "logp = tl.where(given | True, "),
    ("loss_and_grad.py", "tl.where(share != 0, share * logp, 0.0)", "share * logp"),
    ("loss_and_grad.py", "entropy = log_total - mean", "entropy = log_total + mean"),
    ("loss_and_grad.py", "log_total - spread * LN2 / vocab", "log_total - spread / vocab"),
    ("loss_and_grad.py", "maximum * unit + log_total", "maximum * inverse_t + log_total"),
    ("loss_and_grad.py", "total += tl.sum(ragged, 0)", "total += 0.0"),
    ("loss_and_grad.py", "maximum = tl.maximum(maximum, tl.max(ragged, 0))", "maximum = maximum + 0.0"),
    ("loss_and_grad.py", "if coefficient == 0:", "if not read:"),
    ("objectives.py", "(advantages == 0) & (old_logprobs == old_logprobs)", "advantages == 0"),
    ("objectives.py", "tl.where(flows & (clipped == 0), value, 0.0)", "tl.where(flows, value, 0.0)"),
    ("objectives.py", "tl.where(flows & (clipped == 0), value, 0.0)", "tl.where(clipped == 0, value, 0.0)"),
    ("objectives.py", "tl.minimum(low, ceiling)", "low"),
    ("objectives.py", "(below | above) & (advantages == advantages)", "below | above"),
    ("objectives.py", "nan_unless(logp == logp, loss, g)", "nan_unless(weight == weight, loss, g)"),
    ("objectives.py", "active & (derivative != 0)", "active"),
    ("objectives.py", "tl.where(active, weight * loss, 0.0), scaled", "weight * loss, scaled"),
    ("reduce.py", "inside & given", "given"),
    ("reduce.py", "given = given | (target", "given = (target"),
    ("reduce.py", "tl.where(empty, 0.0, total / tl.where(empty, 1.0, divisor))", "total / divisor"),
    ("objective.py", "active = (target != ignore_index) & (weight != 0)", "active = target != ignore_index"),
    ("objective.py", "active & (weight != 0),", "active,"),
    ("objective.py", "active = active | given", "active = given"),
    ("objective.py", "x += tl.where(share != 0, share * logp, 0.0)", "x += share * logp"),
    ("objective.py", "logp = tl.where(given, logprob", "logp = tl.where(given | True, logprob"),
    ("objective.py", "entropy = log_total - moment / total", "entropy = log_total - moment"),
    ("objective.py", "maximum * unit + log_total", "maximum * inverse_t + log_total"),
    ("objective.py", "log_total - mean", "log_total"),
    ("rows.py", "stride = (vary.to(tl.int64) >> i) & 1", "stride = vary.to(tl.int64) & 1"),
    ("rows.py", "tl.where(distance == 0, 0.0, distance * unit)", "distance * unit"),
]


def use_mutant(directory: Path, file: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point the backend at a copy of the kernels with one substitution in it."""
    package = f"mutant_{abs(hash((file, old, new)))}"
    source = Path(importlib.import_module("fused_losses.triton_kernels.rows").__file__).parent
    (directory / package).mkdir()
    for path in source.glob("*.py"):
        text = path.read_text()
        if path.name == file:
            assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times in {file}"
            text = text.replace(old, new)
        (directory / package / path.name).write_text(text)
    monkeypatch.syspath_prepend(directory)
    kernels = backend._kernels(package)
    monkeypatch.setattr(backend, "_kernels", lambda: kernels)


def check_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short pass over what the tests above look at in breadth."""
    one_shot(monkeypatch, False)
    check_one_pass(Case("ppo", 51, torch.float32), False, padding=3)
    one_shot(monkeypatch, True)
    check_one_pass(Case("ppo", 51, torch.float32), False)
    check_one_pass(Case("cross_entropy", 5, torch.float32), False)
    check_one_pass(Case("cross_entropy", 24, torch.float32))
    upstream = torch.linspace(-1.0, 2.0, 12)
    upstream[4:6] = torch.tensor([torch.inf, torch.nan])
    check_two_phase(Case("ppo", 101, torch.float32), upstream)
    test_mean_over_several_targets()
    test_stats_with_terms_as_eager()
    test_stages_with_terms_as_eager()
    test_terms_at_hazards(2, True)
    test_several_inputs()
    check_terms(TermsCase("ppo", 51, torch.float32, TERMS["all of a policy"]), padding=3)
    check_terms(TermsCase("cross_entropy", 37, torch.float32, TERMS["smoothed"], 20))
    one_shot(monkeypatch, False)
    check_terms(TermsCase("ppo", 101, torch.float32, TERMS["entropy"]))
    check_terms(TermsCase("cross_entropy", 131, torch.float32, TERMS["capped smoothed"], 5))
    test_unread_token_has_logprob_zero_at_any_temperature()
    test_objectives_at_hazards("importance_sampling", False)
    test_objectives_at_hazards("ppo", True)
    test_reduction(3)
    test_reduction(1)

    case = Case("cross_entropy", 19, torch.float32)  # two levels of strides, with room for whoever gets them wrong
    room = torch.full((2, 4096), 7.0, device=DEVICE)
    logits, gradient = room[0].as_strided((3, 4, 19), (95, 19, 1), 0), room[1, :228].view(3, 4, 19)
    logits.copy_(case.logits.view(3, 4, 19))
    targets, weights, temperature = case.move(case.targets, case.weights, case.temperature)
    backend.loss_and_grad(
        logits, targets, "cross_entropy", (), weights, temperature, 1.0, True, IGNORE, False, None, gradient
    )
    assert_gradient(gradient.view(12, 19), case.expected(True)[2], torch.float32)
    gradient = torch.tensor([[0.0, 2.0]], device=DEVICE)
    backend.scale(gradient, torch.tensor([torch.inf], device=DEVICE))
    assert gradient.tolist() == [[0.0, torch.inf]]
    clipped = torch.tensor([[0.0], [1.0], [-1.0]], device=DEVICE)  # ratio e
    column = torch.tensor([-2.0], device=DEVICE)
    _, _, coefficient = backend.objective(
        clipped, targets[:1] * 0, "ppo", (column, -column, 0.8, 1.2), 1.0, 1.0, 0.0, False, IGNORE, False, None
    )
    assert coefficient.item() == 0


def test_the_checks_pass_on_the_kernels_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_mutant(tmp_path, "rows.py", "import triton\n", "import triton\n", monkeypatch)
    check_everything(monkeypatch)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("file", "old", "new"), MUTANTS, ids=range(len(MUTANTS)))
def test_seeded_bug_is_caught(file: str, old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_mutant(tmp_path, file, old, new, monkeypatch)
    with pytest.raises(Exception) as caught:  # wrong numbers, or no result at all
        check_everything(monkeypatch)
    assert not isinstance(caught.value, ImportError | SyntaxError)
