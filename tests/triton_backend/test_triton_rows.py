"""Both ways of a row, one pass and two phase, against float64; where rows lie, and what is read and written of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from triton_cases import (
    DEVICE,
    IGNORE,
    Case,
    assert_gradient,
    check_one_pass,
    check_two_phase,
    interpreted,
    one_shot,
    problem,
    run_one_pass,
    small_tiles,  # noqa: F401  (a fixture)
    two_phase,
)

from fused_losses.backends import triton as backend
from fused_losses.backends.triton import BACKEND
from fused_losses.objectives import OBJECTIVES
from fused_losses.problem import Coefficients, Stats, Terms


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("vocab", "padding"), [(1, 0), (64, 0), (131, 5)])
def test_two_phase_equals_float64(vocab: int, padding: int, dtype: torch.dtype) -> None:
    check_two_phase(Case("ppo", vocab, dtype), padding)


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
    full = full.to(DEVICE)
    gradient = torch.empty(3, 4, 19, device=DEVICE)
    BACKEND.loss_and_grad(full[:, :-1], case.problem(), gradient)
    assert_gradient(gradient.view(12, 19), case.expected()[2], torch.float32)
    BACKEND.loss_and_grad(full[:, :-1], case.problem(), full[:, :-1])
    assert torch.equal(full[:, :-1].nan_to_num(), gradient.nan_to_num())


def test_real_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiles that ship, on a large odd vocabulary in bfloat16."""
    monkeypatch.undo()
    backend._walk.cache_clear()
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(2, 50257, generator=generator) * 4).bfloat16()
    targets = torch.tensor([50256, 40000])
    exact = logits.double().requires_grad_()
    torch.nn.functional.cross_entropy(exact, targets, reduction="sum").backward()
    logits = logits.to(DEVICE)
    given = problem(targets, 50257)
    gradient, again = torch.empty_like(logits), torch.empty_like(logits)
    BACKEND.loss_and_grad(logits, given, gradient)
    assert_gradient(gradient, exact.grad, torch.bfloat16)
    two_phase(logits, given, again)
    assert torch.equal(again, gradient)


def test_int32_targets_and_few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs loop over the rows that exceed the grid."""
    monkeypatch.setattr(backend, "_MAX_GRID", 5)
    backend._walk.cache_clear()
    case, wide = Case("ppo", 33, torch.float32), Case("ppo", 33, torch.float32)
    case.targets = case.targets.int()
    assert torch.equal(run_one_pass(case)[2].nan_to_num(), run_one_pass(wide)[2].nan_to_num())
    check_two_phase(wide)


@pytest.mark.parametrize("shot", [False, True])
def test_bitwise_repeatable(shot: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    one_shot(monkeypatch, shot)
    case = Case("ppo", 131, torch.float32)
    targets = case.without_hopeless()
    first, second = run_one_pass(case, targets=targets), run_one_pass(case, targets=targets)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("vocab", "every"), [(48, 1), (131, 8)])
@pytest.mark.parametrize("shot", [False, True])
def test_batch_invariant(shot: bool, vocab: int, every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token's logprob and gradient are bitwise the same wherever it is, whatever is beside it, one program a row or
    a few for all. Rows that do not begin on 16-byte boundaries: wherever they begin as far behind one."""
    one_shot(monkeypatch, shot)
    generator = torch.Generator().manual_seed(1)
    row, target = torch.randn(vocab, generator=generator) * 3, torch.tensor([vocab // 3])

    def run(n: int, place: int, few: bool) -> list[Tensor]:
        monkeypatch.setattr(backend, "_MAX_GRID", 2 if few else 2**30)
        backend._walk.cache_clear()
        logits, targets = torch.randn(n, vocab, generator=generator), torch.full((n,), IGNORE)
        logits[place], targets[place] = row, target
        targets[place + 1 :: 2] = 1
        logits = logits.to(DEVICE)
        given = problem(targets, vocab)
        gradients = torch.empty_like(logits), torch.empty_like(logits)
        _, logprobs = BACKEND.loss_and_grad(logits, given, gradients[0])
        losses, again, _ = two_phase(logits, given, gradients[1])
        return [t[place] for t in (*gradients, logprobs, losses, again)]

    alone = run(1, 0, False)
    for n, place, few in ((every + 2, every, False), (2 * every + 1, every, True)):
        assert all(torch.equal(a, b) for a, b in zip(run(n, place, few), alone, strict=True))


def test_all_logprobs_reads_tokens_of_weight_zero() -> None:
    logits = torch.randn(3, 9, device=DEVICE)
    targets = torch.tensor([1, 2, IGNORE])
    gradient = torch.empty_like(logits)
    expected = logits.log_softmax(-1)[torch.arange(2), targets[:2]]
    given = problem(targets, 9, weights=torch.tensor([0.0, 1.0, 0.0]), all_logprobs=True)
    _, logprobs = BACKEND.loss_and_grad(logits, given, gradient)
    _, again, _ = two_phase(logits, given, torch.empty_like(logits))
    for got in (logprobs, again):
        torch.testing.assert_close(got[:2], expected)
        assert got[2] == 0
    assert not gradient[0].any() and not gradient[2].any() and gradient[1].any()


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
    targets = torch.tensor([3, 4, 5])
    given = problem(targets, 19, "logprobs")
    expected = values.double().log_softmax(-1)[torch.arange(3), targets].float()
    gradient = torch.empty(3, 19, dtype=torch.float16)
    _, logprobs, _ = two_phase(logits, given, gradient)
    torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-5)
    _, logprobs = BACKEND.loss_and_grad(logits, given, logits)
    torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.contiguous(), gradient, rtol=1e-3, atol=1e-6)


# What is read and written.


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
    given = problem(torch.tensor([1, IGNORE, 2, vocab + 9]), vocab, weights=torch.tensor([1.0, 1.0, 0.0, 1.0]))
    gradient = torch.empty_like(logits)
    everything = set(range(4 * vocab))
    active = set(range(vocab)) | set(range(3 * vocab, 4 * vocab))

    BACKEND.loss_and_grad(logits, given, gradient)
    assert accesses.of(accesses.loads, logits) == active
    assert accesses.of(accesses.stores, gradient) == everything
    accesses.loads.clear()
    stats = BACKEND.stats(logits, given)
    assert accesses.of(accesses.loads, logits) == active
    assert not stats.table[:, 1:3].any()
    accesses.loads.clear()
    accesses.stores.clear()
    coefficients = Coefficients(torch.tensor([[0.0, 1.0, 0.0, torch.nan]]))
    BACKEND.grad(logits, given.targets, given.transform, stats, coefficients, 2.0, gradient)
    assert accesses.of(accesses.loads, logits) == active - set(range(vocab)) | set(range(vocab, 2 * vocab))
    assert accesses.of(accesses.stores, gradient) == everything
    accesses.loads.clear()
    accesses.stores.clear()
    BACKEND.scale(gradient, torch.ones(1))
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
    terms = Terms(label_smoothing=0.1, entropy=True)
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0])
    given = problem(targets, vocab, weights=weights, shares=shares, softcap=3.0, terms=terms)
    gradient = torch.empty_like(logits)
    active = set(range(vocab)) | set(range(3 * vocab, 4 * vocab))
    BACKEND.loss_and_grad(logits, given, gradient)
    assert accesses.of(accesses.loads, logits) == active
    assert accesses.of(accesses.stores, gradient) == set(range(4 * vocab))
    accesses.loads.clear()
    stats = BACKEND.stats(logits, given)
    assert accesses.of(accesses.loads, logits) == active
    stats = Stats(stats.table.index_fill(1, torch.tensor([2]), 1.0))
    for row in range(4):  # any one of the four
        accesses.loads.clear()
        coefficients = torch.zeros(4, 4)
        coefficients[row, 2] = 1.0
        BACKEND.grad(logits, given.targets, given.transform, stats, Coefficients(coefficients), 2.0, gradient)
        assert accesses.of(accesses.loads, logits) == set(range(2 * vocab, 3 * vocab))
        assert not gradient[[0, 1, 3]].any()


@interpreted
def test_no_access_out_of_bounds(accesses: Accesses) -> None:
    tensors = [torch.randn(5, 21), torch.tensor([0, 20, -1, 21, 2**40]), torch.rand(5)]
    logits, targets, weights = tensors
    gradient = torch.empty_like(logits)
    _, logprobs = BACKEND.loss_and_grad(logits, problem(targets, 21, weights=weights), gradient)
    assert logprobs[:2].isfinite().all() and logprobs[2:].isnan().all() and gradient[2:].isnan().all()
    inside = set()
    for tensor in (*tensors, gradient, logprobs):
        inside.update(range(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes))
    strangers = {a for a in accesses.loads | accesses.stores if a not in inside}
    assert len(strangers) <= 2 * 5 + 2  # row_losses and the loss, which the backend made itself
