"""The stages that see N only: objectives, terms at hazards, columns, reductions; and the scaling of a gradient."""

from __future__ import annotations

import inspect

import pytest
import torch
from triton_cases import (
    BOUNDS,
    CLAMP,
    DEVICE,
    IGNORE,
    TERMS,
    Case,
    assert_only_inside,
    check_one_pass,
    check_terms,
    check_two_phase,
    guarded,
    problem,
    row_stats,
    run_one_pass,
    small_tiles,  # noqa: F401  (a fixture)
)
from triton_objectives import NUM_INPUTS, WEIGHTED_SUM

from fused_losses.backends import triton as backend
from fused_losses.backends.eager import BACKEND as EAGER
from fused_losses.backends.triton import BACKEND
from fused_losses.objectives import OBJECTIVES, Objective
from fused_losses.problem import Stats, Terms
from fused_losses.terms import KL_TYPES

HAZARDS = (0.0, -0.5, -40.0, -100.0, -torch.inf)
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_every_objective_has_a_triton_function(name: str) -> None:
    """Of logp and the columns of the table, in this order, as far as names can tell."""
    function = getattr(backend._kernels().objectives, name)
    logp, *columns = inspect.signature(function.fn).parameters
    assert logp == "logp" and len(columns) == len(OBJECTIVES[name].columns)
    for short, column in zip(columns, OBJECTIVES[name].columns, strict=True):
        assert short in column, f"{name} takes {short} where the table has {column}"


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
    bounds = BOUNDS[objective] if given.bounds else ()
    asked = problem(
        torch.zeros(len(logp), dtype=torch.int64), 2, objective, ((old, adv)[: len(given.inputs)]) + bounds + limits
    )
    got, logprobs, coefficients = BACKEND.objective(row_stats(logp), asked, False)
    torch.testing.assert_close(logprobs.cpu(), logp, rtol=2e-7, atol=0)
    x = logprobs.cpu().requires_grad_()  # not logp: a log ratio of 0 would be a rounding error
    losses = given.formula(x, *(torch.as_tensor(c).cpu().expand(logp.shape) for c in asked.inputs))[0]
    (g,) = torch.autograd.grad(losses.sum(), x)
    torch.testing.assert_close(got.cpu(), losses.detach(), rtol=2e-5, atol=0, equal_nan=True)
    torch.testing.assert_close(
        coefficients.table[0].cpu(), g, rtol=2e-5, atol=1e-12, equal_nan=True
    )  # denormal ratio * 1e30


@pytest.mark.parametrize("low, high", [(1.2, 0.8), (-0.1, 1.2), (torch.nan, 1.2), (0.8, torch.nan)])
@pytest.mark.parametrize("objective", ["ppo", "cispo"])
def test_senseless_bounds_give_nan(objective: str, low: float, high: float) -> None:
    column = torch.zeros(1)
    given = problem(torch.zeros(1, dtype=torch.int64), 2, objective, (column, column, low, high))
    loss, _, coefficients = BACKEND.objective(row_stats(torch.tensor([-1.0])), given, False)
    assert loss.isnan().all() and coefficients.table.isnan().all()


@pytest.mark.parametrize("terms", [Terms(), Terms(entropy=True, entropy_coef=1.0)], ids=["plain", "terms"])
@pytest.mark.parametrize("ignored", [True, False])
def test_unread_token_has_logprob_zero(ignored: bool, terms: Terms) -> None:
    """Whatever its temperature is and its stats are."""
    target = torch.full((1,), IGNORE if ignored else 0)
    given = problem(target, 2, temperature=torch.tensor([torch.nan]), weights=float(ignored), terms=terms)
    stats = Stats(torch.full((3 if given.plain else 5, 1), torch.nan, device=DEVICE))
    losses, logprobs, coefficients = BACKEND.objective(stats, given, False)
    assert losses.item() == 0 and not logprobs.any() and not coefficients.table.any()


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_nan_row_is_nan_whatever_its_loss(name: str) -> None:
    """Advantage 0 makes the loss of any other row 0."""
    objective = OBJECTIVES[name]
    inputs = (-1.0, 0.0)[: len(objective.inputs)] + (BOUNDS[name] if objective.bounds else ())
    stats = Stats(torch.tensor([[0.0], [1.0], [torch.nan]], device=DEVICE))
    given = problem(torch.zeros(1, dtype=torch.int64), 2, name, inputs)
    losses, logprobs, coefficients = BACKEND.objective(stats, given, False)
    assert losses.isnan() and logprobs.isnan() and coefficients.table.isnan()


def test_clipped_token_survives_an_infinite_scale() -> None:
    given = problem(
        torch.zeros(1, dtype=torch.int64),
        2,
        "ppo",
        (torch.tensor([-2.0]), torch.tensor([2.0]), 0.8, 1.2),
        denominator=0.0,
    )  # ratio e
    _, _, coefficients = BACKEND.objective(row_stats(torch.tensor([-1.0])), given, False)
    assert coefficients.table.item() == 0


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kl_type", KL_TYPES)
def test_terms_at_hazards(kl_type: str, weighted: bool) -> None:
    """Extreme logprobs and coefficients of 0, inf and NaN, as the eager backend has them."""
    grid = torch.tensor((0.0, -18.0, *HAZARDS[2:]))  # where both backends have the logprob to the last bit
    coefficients = torch.tensor([0.0, 0.5, torch.inf, torch.nan])
    logp, ref, coefficient = (x.flatten() for x in torch.meshgrid(grid, grid[:-1], coefficients, indexing="ij"))
    n = len(logp)
    terms = Terms(coefficient, ref, coefficient, coefficient, CLAMP, 0.1, 0.01, kl_type, weighted, True)
    targets = torch.zeros(n, dtype=torch.int64)
    inputs = (torch.full((n,), -0.25), torch.ones(n), 0.8, 1.2)
    stats = row_stats(logp, False, -1.0, -2.0)
    results = [
        module.objective(
            Stats(stats.table.to(device)), problem(targets, 2, "ppo", inputs, terms=terms, device=device), False
        )
        for module, device in ((BACKEND, DEVICE), (EAGER, CPU))
    ]
    (losses, logprobs, by), expected = results
    for got, wanted in zip((losses, logprobs, by.table), (*expected[:2], expected[2].table), strict=True):
        torch.testing.assert_close(got.cpu(), wanted, rtol=2e-5, atol=0, equal_nan=True)


# Columns.


def test_columns_of_any_stride() -> None:
    case = Case("ppo", 21, torch.float32)
    _, _, expected = run_one_pass(case)
    wide = [torch.stack((c, torch.full_like(c, torch.nan)), 1)[:, 0] for c in case.inputs[:2]]
    case.inputs = (*wide, torch.tensor([0.8]).expand(12), torch.tensor([1.2]).expand(12))
    case.weights = case.weights.repeat_interleave(3)[::3]  # numbers, columns, and both at once
    _, _, gradient = run_one_pass(case)
    assert torch.equal(gradient.nan_to_num(), expected.nan_to_num())
    stats = Stats(torch.rand(3, 12, device=DEVICE))
    results = [
        BACKEND.objective(
            stats, problem(case.targets * 0, 21, "ppo", (*wide, low, high), weights=w, denominator=3.0), True
        )
        for low, high in ((0.8, 1.2), (case.inputs[2], 1.2), (0.8, case.inputs[3]))
        for w in (0.5, torch.full((12,), 0.5))
    ]
    for loss, logprobs, coefficients in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(logprobs, results[0][1])
        assert torch.equal(coefficients.table, results[0][2].table)


def test_unaligned_and_strided_columns() -> None:
    """What a launch takes in a tuple is whole and aligned; what is neither is copied."""
    wide = torch.randn(3, 13, device=DEVICE)
    targets = torch.zeros(14, dtype=torch.int64, device=DEVICE)
    for column in (wide[0, 1:], wide[1, :12:3], wide[2, :1].expand(5), wide[0, 0], wide[:, 0]):
        n = column.numel()
        given = problem(targets[1 : n + 1], 2, "importance_sampling", (column, 2.0), weights=column, temperature=column)
        packed = backend._packed(backend._values(given, 1.0))
        token = packed.token
        assert token.targets.data_ptr() % 16 == 0
        for value in (token.weights, token.temperature, token.inputs[0]):
            assert value.data_ptr() % 16 == 0 and torch.equal(value, column)
        varies = value.dim() > 0 and value.stride(0) == 1
        assert packed.vary == (0b1011 if varies else 0)


def test_several_inputs() -> None:
    """Which of the columns vary is one bit each."""
    old, advantages = torch.tensor(-1.0), torch.tensor([1.0, 2.0])
    high = torch.tensor([1.2, 0.9])
    given = problem(torch.zeros(2, dtype=torch.int64), 2, "ppo", (old, advantages, 0.8, high))
    losses, _, _ = BACKEND.objective(row_stats(torch.tensor([-1.0, -1.0])), given, False)
    torch.testing.assert_close(losses.cpu(), torch.tensor([-1.0, -1.8]))


def test_custom_objective() -> None:
    inputs = tuple(torch.randn(12) if i % 3 else 0.5 for i in range(NUM_INPUTS))
    case = Case(WEIGHTED_SUM, 21, torch.float32)
    case.inputs = inputs
    assert BACKEND.runs(WEIGHTED_SUM)
    check_two_phase(case)
    check_one_pass(case)
    with_terms = Case(WEIGHTED_SUM, 21, torch.float32, *TERMS["entropy"])
    with_terms.inputs = inputs
    check_terms(with_terms)


def test_objective_without_a_triton_function() -> None:
    """Not by its name, which triton_kernels may have for something else."""
    for name in ("no_advantage", "ppo"):
        objective = Objective(name, lambda logp: (logp, logp))
        assert not BACKEND.runs(objective)
        logits = torch.zeros(1, 3, device=DEVICE)
        with pytest.raises(RuntimeError, match=f"'{name}' has no Triton function"):
            BACKEND.loss_and_grad(logits, problem(torch.zeros(1, dtype=torch.int64), 3, objective), logits)


# Sums over tokens, and scale.


@pytest.mark.parametrize("n", [0, 1, 17])
def test_reduction(n: int) -> None:
    """The mean's own count with and without weights, any number of tokens, and 0 where none is active."""
    logits, targets = torch.zeros(n, 4, device=DEVICE), torch.arange(n) % 4
    targets[::3] = IGNORE
    weights = torch.linspace(1, 2, n)
    gradient, buffer = guarded(torch.zeros_like(logits))
    log4 = torch.tensor(4.0).log().item()
    loss, _ = BACKEND.loss_and_grad(logits, problem(targets, 4, weights=weights, mean=True), gradient)
    active = n - len(targets[::3])
    assert loss.item() == pytest.approx(log4 if active else 0.0)
    loss, _ = BACKEND.loss_and_grad(logits, problem(targets, 4, denominator=torch.tensor(8.0)), gradient)
    assert loss.item() == pytest.approx(active * log4 / 8)
    given = problem(targets, 4, mean=True)
    stats = BACKEND.stats(logits, given)
    loss, _, coefficients = BACKEND.objective(stats, given, True)
    assert loss.item() == pytest.approx(log4 if active else 0.0)
    assert coefficients.table.sum().item() == pytest.approx(-1.0 if active else 0.0)
    BACKEND.grad(logits, given.targets, given.transform, stats, coefficients, 1.0, gradient)
    assert_only_inside(gradient, buffer)


def test_sums_in_float64() -> None:
    losses = torch.cat((torch.tensor([1e8]), torch.full((200,), 0.25), torch.tensor([-1e8]))).to(DEVICE)
    assert backend._reduce(losses, 1.0).item() == 50.0
    weights = losses.abs()
    total = BACKEND.normaliser(problem(torch.zeros(202, dtype=torch.int32), 2, weights=weights))
    assert total.shape == () and total.item() == weights.double().sum().float().item()


def test_mean_over_several_targets() -> None:
    """A row counts once, where any of its targets is not ignored."""
    targets = torch.tensor([[IGNORE, 1], [IGNORE, IGNORE], [0, IGNORE]])
    given = problem(targets, 2, weights=torch.tensor([1.0, 2.0, 4.0]), shares=torch.ones(3, 2))
    assert BACKEND.normaliser(given).item() == 5.0


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
        BACKEND.scale(gradient, torch.tensor([value], device=DEVICE))
        expected = (values.float() * value).bfloat16()
        expected[2] = 0
        assert torch.equal(gradient, expected)
        assert_only_inside(gradient, buffer)
