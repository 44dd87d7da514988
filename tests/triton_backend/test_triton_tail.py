"""The exact tail: loss, logprob and the target's gradient of sure and of hopeless tokens, to float32's last digits;
and what a target's logit may hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_cases import (
    DEVICE,
    assert_only_inside,
    guarded,
    one_shot,
    problem,
    small_tiles,  # noqa: F401  (a fixture)
    two_phase,
)

from fused_losses.backends import triton as backend
from fused_losses.backends.triton import BACKEND
from fused_losses.problem import Stats, Terms

GAPS = (0.0, 1.0, 5.0, 12.0, 20.0, 40.0, 60.0, -3.0, -30.0)
SMALLEST = torch.finfo(torch.float32).tiny


def both_ways(logits: Tensor, given: object) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(losses of the stages, logprobs, gradient) in one pass and in two phases."""
    logits = logits.to(DEVICE)
    gradient, buffer = guarded(torch.zeros_like(logits))
    found = [(*BACKEND.loss_and_grad(logits, given, gradient), gradient.clone())]
    losses, logprobs, _ = two_phase(logits, given, gradient)
    found.append((losses, logprobs, gradient.clone()))
    assert_only_inside(gradient, buffer)
    return [(a.cpu().double(), b.cpu().double(), c.cpu().double()) for a, b, c in found]


def check_tail(
    vocab: int,
    gaps: tuple[float, ...] = GAPS,
    temperatures: tuple[float, ...] = (0.5, 1.0, 2.0, 0.7),
    terms: Terms | None = None,
) -> None:
    """Targets ahead of the others by `gap`, all over the row."""
    generator = torch.Generator().manual_seed(vocab)
    gap, n = torch.tensor(gaps), len(gaps)
    temperature = torch.tensor(temperatures).repeat(n)[:n]
    logits = torch.randn(n, vocab, generator=generator) * 2 + 100.0
    targets = (torch.arange(n) * 37 + vocab - 1) % vocab
    index = targets[:, None]
    best = logits.scatter(1, index, -torch.inf).amax(1)
    logits.scatter_(1, index, (best + gap)[:, None])

    z = logits.double() / temperature[:, None]
    others = z.scatter(1, index, -torch.inf).logsumexp(1) - z.gather(1, index)[:, 0]  # log(S / e_t)
    logp = -torch.nn.functional.softplus(others, threshold=1e9)
    away = torch.sigmoid(others)  # 1 - p
    tolerance = 2e-6 + 3e-7 * gap.abs().double() / temperature
    given = problem(targets, vocab, temperature=temperature, terms=Terms() if terms is None else terms)
    log_p = (z - z.logsumexp(1, keepdim=True)).scatter(1, index, logp[:, None])
    p = log_p.exp()
    for losses, logprobs, gradient in both_ways(logits, given):
        entropy = None if terms is None else logprobs[1]
        logprobs = logprobs if terms is None else logprobs[0]
        assert ((logprobs - logp).abs() <= tolerance * logp.abs() + SMALLEST).all()
        if losses.dim():
            assert ((losses + logp).abs() <= tolerance * logp.abs() + SMALLEST).all()
        else:
            assert abs(losses + logp.sum()) <= tolerance.max() * logp.sum().abs()
        got, wanted = gradient.gather(1, index)[:, 0], -away / temperature
        assert ((got - wanted).abs() <= tolerance * wanted.abs() + SMALLEST).all()
        dense = (p / temperature[:, None]).scatter(1, index, 0.0)
        bound = (1e-5 + tolerance)[:, None] * dense + SMALLEST
        assert ((gradient.scatter(1, index, 0.0) - dense).abs() <= bound).all()
        if entropy is not None:
            exact = (p * -log_p).sum(1)
            assert ((entropy - exact).abs() <= 1e-5 * exact + SMALLEST).all()


@pytest.mark.parametrize("shot", [True, False])
@pytest.mark.parametrize("vocab", [5, 64, 131])
def test_sure_tokens(vocab: int, shot: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    one_shot(monkeypatch, shot)
    check_tail(vocab)


@pytest.mark.parametrize("shot", [True, False])
def test_sure_tokens_with_terms(shot: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    one_shot(monkeypatch, shot)
    check_tail(100, terms=Terms(entropy=True))


@pytest.mark.parametrize("vocab", [30_000, 151_936, 151_643])
def test_sure_tokens_of_real_vocabularies(vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    backend._walk.cache_clear()
    check_tail(vocab, (12.0, 60.0), (0.5,))


def test_what_each_of_the_others_adds_may_underflow() -> None:
    """Their sum does not."""
    distance, sum = torch.tensor([90.0, 95.0, 98.0]), torch.full((3,), 1e5)
    stats = Stats(torch.stack((torch.zeros(3), sum, distance)).to(DEVICE))
    given = problem(torch.zeros(3, dtype=torch.int64), 151_936)
    losses, _, _ = BACKEND.objective(stats, given, False)
    exact = torch.log1p(sum.double() * torch.exp(-distance.double()))
    torch.testing.assert_close(losses.cpu().double(), exact, rtol=3e-5, atol=0)


def test_target_outside_ends_no_other_row() -> None:
    """Nor does it write past the last one."""
    for vocab in (24, 21):
        logits = torch.randn(2, vocab)
        for _, logprobs, gradient in both_ways(logits, problem(torch.tensor([1, vocab]), vocab)):
            assert logprobs.isnan().tolist() == [False, True]
            assert gradient[0].isfinite().all() and gradient[1].isnan().all()


LOWEST = torch.finfo(torch.float32).min


@pytest.mark.parametrize(
    ("shot", "vocab", "softcap"),
    [
        (True, 40, None),
        (False, 40, 3.0),
        (True, 37, 3.0),
        (False, 37, None),
        (True, 1, None),
        (True, 1, 3.0),
        (False, 1, None),
        (False, 1, 3.0),
    ],
)
def test_what_a_target_may_hold(vocab: int, shot: bool, softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN and +inf make the row NaN, as anywhere in it; -inf is legal; so are others without any mass."""
    one_shot(monkeypatch, shot)
    rows = [
        (torch.nan, 0.0),
        (torch.inf, 0.0),
        (-torch.inf, 0.0),
        (0.5, -torch.inf),
        (0.5, LOWEST),
        (LOWEST, 0.5),
        (-torch.inf, -torch.inf),
        (-torch.inf, LOWEST),
        (LOWEST, LOWEST),
        (3e38, -3e38),
        (0.0, torch.nan),
        (0.0, torch.inf),
    ]
    n = len(rows)
    logits = torch.tensor([other for _, other in rows])[:, None].repeat(1, vocab)
    targets = (torch.arange(n) * 11 + vocab - 1) % vocab
    logits[torch.arange(n), targets] = torch.tensor([target for target, _ in rows])
    exact = logits.double()
    if softcap is not None:
        exact = softcap * torch.tanh(exact / softcap)
    exact = (exact / 0.5).log_softmax(1)
    logp = exact[torch.arange(n), targets]
    expected = exact.exp()
    expected[torch.arange(n), targets] -= 1
    expected /= 0.5
    if softcap is not None:
        expected = torch.where(logits.isinf(), 0.0, expected * (1 - torch.tanh(logits.double() / softcap) ** 2))
        expected[logits.isnan().any(1)] = torch.nan
    entropy = -(exact.exp() * exact.clamp(min=-1e9)).sum(1)
    for terms in (Terms(), Terms(entropy=True)):
        given = problem(targets, vocab, temperature=0.5, softcap=softcap, terms=terms)
        for _, logprobs, gradient in both_ways(logits, given):
            seen = logprobs if given.plain else logprobs[0]
            torch.testing.assert_close(seen.float(), logp.float(), rtol=1e-6, atol=1e-6, equal_nan=True)
            torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
            if terms.entropy:
                torch.testing.assert_close(logprobs[1], entropy, rtol=1e-5, atol=1e-6, equal_nan=True)
