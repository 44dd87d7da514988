"""K targets, entropy, KL, label smoothing, z-loss, softcap: against float64, and stage by stage against eager."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_cases import (
    DEVICE,
    IGNORE,
    TERMS,
    assert_only_inside,
    check_terms,
    guarded,
    one_shot,
    problem,
    small_tiles,  # noqa: F401  (a fixture)
    terms_case,
)

from fused_losses.backends import Backend
from fused_losses.backends.eager import BACKEND as EAGER
from fused_losses.backends.triton import BACKEND
from fused_losses.objectives import OBJECTIVES
from fused_losses.problem import Coefficients, Terms

CPU = torch.device("cpu")


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
@pytest.mark.parametrize("name", [name for name in TERMS if name != "nothing"])
def test_terms_equal_float64(
    name: str, shot: bool, vocab: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_shot(monkeypatch, shot)
    check_terms(terms_case(name, "ppo", vocab, dtype))


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_every_objective_with_terms(objective: str) -> None:
    case = terms_case("all of a policy", objective, 21, torch.float32)
    if not OBJECTIVES[objective].inputs:
        case.terms = case.terms._replace(kl_weighted_by_ratio=False)
    check_terms(case)


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
    check_terms(terms_case(name, "cross_entropy", vocab, dtype, num_targets), padding, in_place)


@pytest.mark.parametrize("num_targets", [1, 3])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_stats_as_eager(softcap: float | None, num_targets: int) -> None:
    """The layout that problem.py defines, infinite logits, and rows that are not read."""
    logits = torch.randn(7, 21)
    logits[1, ::2] = -torch.inf
    logits[2] = -torch.inf
    logits[3, 4] = torch.inf
    logits[6, :2] = logits[6, 3:] = -torch.inf
    targets = torch.tensor([[0, 20, 3], [1, IGNORE, 22], [2, 2, 2], [4, 5, -1], [IGNORE] * 3, [1, 2, 3], [2, 2, 2]])
    weights = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0])
    terms = Terms(entropy=True, label_smoothing=0.1)

    def run(module: Backend, device: torch.device) -> Tensor:
        given = problem(
            targets[:, :num_targets].contiguous(),
            21,
            weights=weights,
            temperature=0.7,
            softcap=softcap,
            shares=torch.ones(7, num_targets),
            terms=terms,
            device=device,
        )
        return module.stats(logits.to(device), given).table.cpu()

    got, expected = run(BACKEND, DEVICE), run(EAGER, CPU)
    bad = expected[1].isnan()
    if num_targets == 1:  # eager takes others of -inf for no mass under a softcap, too; the tail's tests look at both
        other = torch.tensor([0, 1, 3, 4, 5] if softcap else [0, 1, 3, 4, 5, 6])
        got, expected, bad = got[:, other], expected[:, other], bad[other]
    torch.testing.assert_close(got[:, ~bad], expected[:, ~bad], rtol=1e-5, atol=1e-5, equal_nan=True)
    assert got[1, bad].isnan().all()


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("vocab", [1, 21, 2600])
def test_statistics_as_eager(vocab: int, softcap: float | None) -> None:
    """Stages 1 and 2: masks, ties before and after the target, sure targets and rows that are not read."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(9, vocab, generator=generator)
    targets = torch.randint(vocab, (9, 1), generator=generator)
    targets[0], targets[5], targets[7] = IGNORE, vocab // 2, vocab - 1
    logits[1, vocab // 3] = -torch.inf if vocab > 1 else 0.0
    logits[2] = torch.nan
    logits[1].scatter_(0, targets[1], 10.0)
    logits[3].scatter_(0, targets[3], 30.0)
    logits[4].scatter_(0, targets[4], -30.0)
    logits[5, [vocab // 2, vocab - 1]] = 9.0
    logits[6] = 1.0
    logits[7, [max(vocab - 2, 0), vocab - 1]] = 9.0
    logits[8] = torch.finfo(torch.float32).min
    logits[8].scatter_(0, targets[8], 3.0)
    weights = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0])

    def run(module: Backend, device: torch.device) -> tuple[Tensor, Tensor]:
        given = problem(
            targets,
            vocab,
            weights=weights,
            temperature=torch.where(weights * (targets[:, 0] != IGNORE) > 0, 0.7, 0.0),  # bad where nothing is read
            softcap=softcap,
            shares=torch.ones(9, 1),
            terms=Terms(entropy=True, statistics=True),
            device=device,
        )
        stats = module.stats(logits.to(device), given)
        return stats.table.cpu(), module.objective(stats, given, False)[1].cpu()

    (stats, got), (expected_stats, expected) = run(BACKEND, DEVICE), run(EAGER, CPU)
    sound = torch.tensor([0, 1, 3, 4, 5, 6, 7])  # of the others the stats may be anything, or overflow
    torch.testing.assert_close(stats[:, sound], expected_stats[:, sound], rtol=1e-5, atol=1e-5)
    finite = [0, 1, 2, 4]
    torch.testing.assert_close(got[finite], expected[finite], rtol=1e-5, atol=1e-6, equal_nan=True)
    sure = torch.tensor([1, 3])  # where it is a small number
    torch.testing.assert_close(got[2, sure], expected[2, sure], rtol=1e-5, atol=0.0)
    mean, expected_mean = got[3], expected[3]
    torch.testing.assert_close(mean[:8], expected_mean[:8], rtol=1e-5, atol=1e-5, equal_nan=True)
    assert vocab == 1 or mean[8] < 0  # and not the distance of the target from its masks


def test_stages_as_eager() -> None:
    """What a loss never asks for, or float64 can't tell: single coefficients, an ignore_index inside the vocabulary,
    targets outside of it, infinite logits of targets."""
    generator = torch.Generator().manual_seed(0)
    n, vocab, ignore_index = 6, 41, 3
    logits = torch.randn(n, vocab, generator=generator)
    targets = torch.tensor([[0, 40, 3], [3, 3, 3], [2, 2, 5], [4, -1, 3], [7, 8, 9], [3, 1, vocab]])
    shares = torch.rand(n, 3, generator=generator).masked_fill(targets == ignore_index, 0.0)
    shares[5, 2] = 0.0
    logits[4, 8] = -torch.inf
    terms = Terms(entropy=True, entropy_coef=0.1, z_loss=0.01)

    def run(module: Backend, device: torch.device) -> list[Tensor]:
        x = logits.to(device)
        given = problem(
            targets,
            vocab,
            temperature=0.7,
            shares=shares,
            terms=terms,
            denominator=4.0,
            ignore_index=ignore_index,
            device=device,
        )
        gradient, buffer = guarded(torch.zeros_like(x))
        loss, logprobs = module.loss_and_grad(x, given, gradient)
        stats = module.stats(x, given)
        reduced, again, coefficients = module.objective(stats, given, True)
        found = [loss, logprobs, gradient.clone(), stats.table, reduced, again, coefficients.table]
        for i in range(4):
            table = torch.zeros(4, n, device=device)
            table[i] = torch.linspace(0, 1, n)
            module.grad(x, given.targets, given.transform, stats, Coefficients(table), 2.0, gradient)
            found.append(gradient.clone())
        assert_only_inside(gradient, buffer)
        return found

    for got, expected in zip(run(BACKEND, DEVICE), run(EAGER, CPU), strict=True):
        torch.testing.assert_close(got.cpu(), expected, rtol=2e-5, atol=1e-6, equal_nan=True)


def test_duplicates_share_an_element() -> None:
    """Any number of targets may be the same one; what the element gets is rounded once."""
    logits = torch.randn(1, 9).bfloat16().to(DEVICE)
    shares = torch.rand(1, 40)
    targets = torch.full((1, 40), 4)
    gradient, single = torch.empty_like(logits), torch.empty_like(logits)
    BACKEND.loss_and_grad(logits, problem(targets, 9, shares=shares), gradient)
    one = problem(targets[:, :1].contiguous(), 9, shares=shares.sum(1, keepdim=True))
    BACKEND.loss_and_grad(logits, one, single)
    torch.testing.assert_close(gradient, single, rtol=2**-7, atol=0)


def test_tanh() -> None:
    """Through stats: V = 1 has its squashed logit nowhere, V = 2 as the difference of two."""
    x = torch.cat((torch.linspace(-12, 12, 997), torch.logspace(-6, 0, 300)))
    logits = torch.stack((x, torch.zeros_like(x)), 1).to(DEVICE)
    given = problem((x > 0).long(), 2, "logprobs", softcap=1.0)  # the smaller of the two
    _, logprobs, _ = BACKEND.objective(BACKEND.stats(logits, given), given, False)
    torch.testing.assert_close(
        logprobs[0].cpu().double(), torch.nn.functional.logsigmoid(-torch.tanh(x.double()).abs()), rtol=3e-7, atol=0
    )


def test_slope_of_tanh() -> None:
    """1 / cosh^2, of which 1 - tanh^2 leaves nothing far out."""
    logits = torch.linspace(-12, 11, 67)[None].to(DEVICE)
    target, gradient, x = torch.tensor([33]), torch.empty_like(logits), logits.cpu().double()
    BACKEND.loss_and_grad(logits, problem(target, 67, softcap=1.0), gradient)
    want = torch.softmax(torch.tanh(x), -1) - torch.nn.functional.one_hot(target, 67)
    torch.testing.assert_close(gradient.cpu().double(), want / torch.cosh(x) ** 2, rtol=2e-5, atol=0)
