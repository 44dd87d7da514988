"""What ``statistics`` says of a row, and ``inplace=True`` of the functions whose gradient is made in backward.

The truth is ``reference.statistics`` in float64; of the exact tail it is written out here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import DTYPES, EPS, make
from torch import Tensor

import fused_losses
from fused_losses import Statistics, reference
from fused_losses.backends import named
from fused_losses.objectives import OBJECTIVES
from fused_losses.problem import Problem, Targets, Terms, Transform

ALL = Statistics._fields
NUMBERS = ALL[:-1]
TRANSFORMS: dict[str, dict[str, Any]] = {
    "": {},
    "softcap": {"softcap": 5.0},
    "all": {"softcap": 4.0, "logit_scale": 0.7, "temperature": 1.3},
}
LOWEST = torch.finfo(torch.float32).min
ids = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def assert_statistics(logits: Tensor, target: Tensor, backend: str, **keywords: Any) -> Statistics:
    """All numbers against float64, which they may miss by twice what eager torch does, and a few roundings."""
    got = fused_losses.statistics(logits, target, backend=backend, **keywords)
    in_double = {k: v.double() if isinstance(v, Tensor) else v for k, v in keywords.items()}
    eager = reference.statistics(logits, target, **keywords)
    truth = reference.statistics(logits.double(), target, **in_double)
    for name in NUMBERS:
        x, e, t = (getattr(one, name) for one in (got, eager, truth))
        assert x.dtype == torch.float32 and x.shape == target.shape
        special = ~torch.isfinite(t)
        torch.testing.assert_close(x[special].double(), t[special], rtol=0, atol=0, equal_nan=True)
        size = 1 + t[~special].abs() + (keywords.get("softcap") or 0.0)
        if name == "mean_logit":  # it is made of the largest logit and of the mean distance from that
            size = size + (
                logits[logits.isfinite()].abs().max() / torch.as_tensor(keywords.get("temperature", 1.0)).min()
            )
        error = (x.double() - t)[~special].abs()
        allowed = 2 * (e.double() - t)[~special].abs() + 8 * EPS * size
        assert (error <= allowed).all(), (name, error, allowed)
    assert got.top1.dtype == torch.bool and torch.equal(got.top1, truth.top1)
    return got


@pytest.mark.each_instruction_set
@pytest.mark.parametrize("vocab", [1, 2, 31, 513, 1001])
@pytest.mark.parametrize("transforms", TRANSFORMS.values(), ids=TRANSFORMS)
@ids
def test_values(backend, device, dtype, transforms, vocab):
    case = make("logprobs", (2, 5), vocab, dtype, device)
    target = case.target_tokens
    target[1, :2] = case.logits[1, :2].argmax(-1)
    got = assert_statistics(case.logits, target, backend, **transforms)
    assert vocab == 1 or (got.top1.any() and not got.top1.all())


def test_temperature_per_token_and_strides(backend, device):
    case = make("logprobs", (3, 6), 67, device=device, view=lambda t: t[:, :-1], ignored=False)
    temperature = torch.rand(3, 5, device=device) + 0.5
    assert_statistics(case.logits, case.target_tokens, backend, temperature=temperature)
    assert_statistics(
        case.logits.transpose(0, 1), case.target_tokens.T, backend
    )  # a copy: three strides are not walked
    assert_statistics(case.logits[:, :, ::3], case.target_tokens % 22, backend)
    assert_statistics(case.logits, case.target_tokens.int(), backend, ignore_index=5)


def test_outputs(backend, device):
    """Each as it is of all, None for the rest; logprobs alone is the function of that name."""
    case = make("logprobs", (4,), 64, device=device)
    given = case.logits, case.target_tokens
    every = fused_losses.statistics(*given, backend=backend)
    for k in (1, 2, 4):
        for names in itertools.combinations(ALL, k):
            got = fused_losses.statistics(*given, outputs=names[::-1], backend=backend)
            assert {name for name in ALL if getattr(got, name) is not None} == set(names)
            for name in names:
                torch.testing.assert_close(getattr(got, name), getattr(every, name), rtol=1e-6, atol=1e-6)
    alone = fused_losses.statistics(*given, outputs=["logprobs"], backend=backend).logprobs
    assert torch.equal(alone, fused_losses.logprobs(*given, backend=backend))
    both = fused_losses.statistics(*given, outputs=("entropy", "logprobs"), backend=backend)
    assert all(map(torch.equal, both[:2], fused_losses.logprobs(*given, return_entropy=True, backend=backend)))


def test_one_read(backend, device, monkeypatch):
    reads = []
    stats = type(named(backend)).stats

    def counted(*args: Any) -> Any:
        reads.append(args)
        return stats(*args)

    monkeypatch.setattr(type(named(backend)), "stats", counted)
    case = make("logprobs", (4,), 64, device=device)
    fused_losses.statistics(case.logits, case.target_tokens, backend=backend)
    assert len(reads) == 1


# ---- Ties ----


@pytest.mark.each_instruction_set
@pytest.mark.parametrize("vocab", [2, 33, 3000])
@ids
def test_of_equal_logits_the_first_is_the_largest(backend, device, dtype, vocab):
    places = sorted({0, 1, vocab // 3, vocab // 2, vocab - 1})
    pairs = [(a, b) for a in places for b in places]
    logits = torch.randn(len(pairs), vocab).to(dtype)
    for row, pair in zip(logits, pairs, strict=True):
        row[list(pair)] = row.max() + 1
    target = torch.tensor([a for a, _ in pairs])
    got = fused_losses.statistics(logits.to(device), target.to(device), backend=backend).top1
    assert got.tolist() == [a <= b for a, b in pairs]


def test_ties_of_all_and_of_none(backend, device):
    rows = {
        "all equal, the first": ([2.0] * 5, 0, True),
        "all equal, another": ([2.0] * 5, 1, False),
        "less by a rounding": ([1.0 - 2**-24, 1.0, 0.0, 0.0, 0.0], 0, False),
        "the lowest number over -inf": ([-math.inf, LOWEST, -math.inf, -math.inf, -math.inf], 1, True),
        "the lowest number again": ([LOWEST, LOWEST, -math.inf, -math.inf, -math.inf], 1, False),
        "the only one": ([-math.inf] * 4 + [0.0], 4, True),
        "-inf": ([-math.inf, 0.0, -math.inf, -math.inf, -math.inf], 0, False),
        "above masks": ([LOWEST, LOWEST, 3.0, LOWEST, LOWEST], 2, True),
        "0 and -0": ([0.0, -0.0, -1.0, -1.0, -1.0], 1, False),
        "below 0": ([-9.0, -1.0, -2.0, -1.0, -5.0], 3, False),
    }
    logits, target, expected = zip(*rows.values(), strict=True)
    given = torch.tensor(logits, device=device), torch.tensor(target, device=device)
    got = fused_losses.statistics(*given, outputs=("top1",), backend=backend).top1.tolist()
    assert dict(zip(rows, got, strict=True)) == dict(zip(rows, expected, strict=True))


def test_raw_logits_decide_where_capped_ones_are_equal(backend, device):
    logits = torch.tensor([[50.0, 60.0, 0.0], [60.0, 50.0, 0.0]], device=device)
    target = torch.zeros(2, dtype=torch.int64, device=device)
    got = fused_losses.statistics(logits, target, softcap=1.0, backend=backend)
    assert got.top1.tolist() == [False, True] and got.logprobs[0] == got.logprobs[1]


# ---- Rows that are special ----


def test_ignored_and_no_tokens(backend, device):
    logits = torch.full((3, 7), math.nan, device=device)
    logits[1] = torch.arange(7)
    target = torch.tensor([-100, 6, -100], device=device)
    got = fused_losses.statistics(logits, target, backend=backend)
    assert got.top1.tolist() == [False, True, False]
    for name in NUMBERS:
        number = getattr(got, name)
        assert not number[[0, 2]].any() and torch.isfinite(number).all()
    nothing = fused_losses.statistics(logits[:0], target[:0], backend=backend)
    assert all(one.shape == (0,) for one in nothing) and nothing.top1.dtype == torch.bool


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_rows_without_a_distribution(backend, device, softcap):
    """NaN, and False; and no other row."""
    bad = {"nan": [math.nan, 1.0, 2.0], "target nan": [0.0, 1.0, math.nan]}
    if softcap is None:  # which makes infinite logits finite
        bad |= {"-inf": [-math.inf] * 3, "inf": [math.inf, 1.0, 2.0], "target inf": [0.0, 1.0, math.inf]}
    logits = torch.tensor([*bad.values(), [0.0, 1.0, 2.0]], device=device)
    target = torch.full((len(logits),), 2, device=device)
    got = fused_losses.statistics(logits, target, softcap=softcap, backend=backend)
    for name in NUMBERS:
        assert torch.isnan(getattr(got, name)).tolist() == [True] * len(bad) + [False], name
    assert got.top1.tolist() == [False] * len(bad) + [True]
    got = fused_losses.statistics(logits[-2:], target[-2:], temperature=torch.tensor(-1.0), backend=backend)
    assert torch.isnan(got.mean_logit).all() and not got.top1.any()


def test_target_outside(backend, device):
    logits, target = torch.zeros(3, 5, device=device), torch.tensor([0, 5, -1], device=device)
    if device.type == "cpu":
        with pytest.raises(ValueError, match=r"target_tokens.*got 5"):
            fused_losses.statistics(logits, target, backend=backend)
        return
    got = fused_losses.statistics(logits, target, backend=backend)
    assert all(torch.isnan(getattr(got, name)).tolist() == [False, True, True] for name in NUMBERS)
    assert got.top1.tolist() == [True, False, False]


def test_infinite_logits(backend, device):
    logits = torch.tensor([[0.0, -math.inf, 1.0, -math.inf], [math.inf, 0.0, -math.inf, 1.0]], device=device)
    target = torch.tensor([2, 0], device=device)
    got = assert_statistics(logits[:1], target[:1], backend)
    assert got.mean_logit[0] == -math.inf and got.top1[0]
    assert_statistics(logits, target, backend, softcap=3.0)


@pytest.mark.parametrize("lowest", [-1e4, -1e9, -1e30, LOWEST])
def test_masked_rows(backend, device, lowest):
    """A mask is large, and its distance from what it masks may be more than float32 has; no NaN comes of it."""
    for temperature, kept in itertools.product((0.5, 1.0, 2.0), (1, 2)):
        logits = torch.full((2, 20), lowest, device=device)
        logits[:, :kept] = 3.0
        target = torch.tensor([0, 10], device=device)
        got = fused_losses.statistics(logits, target, temperature=temperature, backend=backend)
        assert got.top1.tolist() == [True, False]
        mean = (3.0 * kept + lowest * (20 - kept)) / 20 / temperature
        if abs(lowest) < 1e31:
            torch.testing.assert_close(got.mean_logit, torch.full_like(got.mean_logit, mean), rtol=1e-5, atol=0)
        assert (got.mean_logit <= 0.9 * max(mean, LOWEST)).all()
        torch.testing.assert_close(got.log_sum_squares, torch.full_like(got.mean_logit, -math.log(kept)))


def test_far_rows(backend, device):
    """A large common offset is in the mean, and in nothing else."""
    case = make("logprobs", (5,), 1000, device=device, ignored=False)
    logits = (case.logits * 64).round().clamp(-600, 600) / 64
    near = fused_losses.statistics(logits, case.target_tokens, backend=backend)
    far = fused_losses.statistics(logits + 8192, case.target_tokens, backend=backend)
    torch.testing.assert_close(far.log_sum_squares, near.log_sum_squares, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(far.mean_logit, near.mean_logit + 8192, rtol=3e-7, atol=0)


# ---- The exact tail ----


@pytest.mark.each_instruction_set
@ids
def test_sure_targets_keep_their_digits(backend, device, dtype):
    """log sum p^2 is about -2 (1 - p_t), which float32's p has at 0 from a gap of 17 on."""
    gaps = [0.0, 1.0, 4.0, 8.0, 10.0, 12.0, 16.0, 20.0, 30.0, 45.0, 60.0, 80.0]
    logits = (torch.randn(len(gaps), 300) * 0.5).to(dtype)
    target = torch.randint(300, (len(gaps),))
    at = torch.arange(len(gaps)), target
    logits[at] = -math.inf
    logits[at] = logits.amax(-1) + torch.tensor(gaps, dtype=dtype)
    d = logits.double() - logits[at].double()[:, None]  # z_j - z_t
    d[at] = -math.inf
    truth = torch.log1p(torch.exp(2 * d).sum(-1)) - 2 * torch.log1p(torch.exp(d).sum(-1))
    got = fused_losses.statistics(logits.to(device), target.to(device), backend=backend)
    error = ((got.log_sum_squares.cpu() - truth) / truth).abs()
    assert (error <= 4e-6 + 6e-7 * torch.tensor(gaps)).all(), error
    assert (got.log_sum_squares < 0).all() and got.top1[1:].all()


def test_squares_of_targets_far_behind(backend, device):
    """Where another class is sure, and where the target is half of the mass."""
    logits = torch.zeros(3, 100, device=device)
    logits[0, 3], logits[1, [3, 7]], logits[2, 3] = 40.0, 40.0, -40.0
    target = torch.tensor([7, 7, 3], device=device)
    got = fused_losses.statistics(logits, target, backend=backend).log_sum_squares.cpu()
    torch.testing.assert_close(got, torch.tensor([0.0, -math.log(2), -math.log(99)]), rtol=1e-6, atol=1e-6)


# ---- Gradients ----


@ids
@pytest.mark.parametrize("inplace", [False, True], ids=["", "in place"])
@pytest.mark.parametrize("which", ["both", "logprobs", "entropy"])
def test_gradients(backend, device, which, inplace, dtype):
    """Of one backward for both, of each alone; in place the same bits."""
    case = make("logprobs", (2, 5), 130, dtype, device)
    transforms = TRANSFORMS["all"]
    up = torch.randn(2, 2, 5, device=device)

    def gradient(function: Any, given: Tensor, **keywords: Any) -> Tensor:
        leaf = given.clone().requires_grad_()
        seen = function(leaf * 1, case.target_tokens, **transforms, **keywords)
        total = (up[0] * seen.logprobs).sum() * (which != "entropy") + (up[1] * seen.entropy).sum() * (
            which != "logprobs"
        )
        assert not any(getattr(seen, name).requires_grad for name in ALL[2:])
        total.backward()
        return leaf.grad

    got = gradient(fused_losses.statistics, case.storage, backend=backend, inplace=inplace)
    eager = gradient(reference.statistics, case.storage)
    truth = gradient(reference.statistics, case.storage.double())
    allowed = 3 * (eager - truth).abs().max() + 8 * EPS + torch.finfo(dtype).eps * truth.abs()
    assert got.dtype == dtype and ((got - truth).abs() <= allowed).all()
    assert not got[case.target_tokens == -100].any()
    if inplace:
        assert torch.equal(got, gradient(fused_losses.statistics, case.storage, backend=backend))


def test_nothing_flows_through_what_is_detached(backend, device):
    leaf = torch.randn(3, 8, device=device, requires_grad=True)
    target = torch.zeros(3, dtype=torch.int64, device=device)
    got = fused_losses.statistics(leaf, target, backend=backend)
    assert [one.requires_grad for one in got] == [True, True, False, False, False]
    (gradient,) = torch.autograd.grad((got.logprobs * got.log_sum_squares).sum(), leaf, retain_graph=True)
    (alone,) = torch.autograd.grad(got.logprobs, leaf, got.log_sum_squares)
    torch.testing.assert_close(gradient, alone)
    with torch.no_grad():
        assert not any(one.requires_grad for one in fused_losses.statistics(leaf, target, backend=backend))


# ---- In place ----


def calls(backend: str, inplace: bool = True) -> dict[str, Any]:
    """Of the functions whose gradient is made in backward: a number to differentiate."""
    options: dict[str, Any] = {"backend": backend, "inplace": inplace}
    return {
        "logprobs": lambda x, t, **k: fused_losses.logprobs(x, t, **options, **k).sum(),
        "softcap": lambda x, t, **k: fused_losses.logprobs(x, t, softcap=3.0, **options, **k).sum(),
        "entropy": lambda x, t, **k: sum(fused_losses.logprobs(x, t, return_entropy=True, **options, **k)).sum(),
        "statistics": lambda x, t, **k: sum(fused_losses.statistics(x, t, **options, **k)[:2]).sum(),
    }


each_call = pytest.mark.parametrize("name", ["logprobs", "softcap", "entropy", "statistics"])


@each_call
@ids
def test_inplace(backend, device, name, dtype):
    """Until backward the logits are as they were; then they are their gradient, as another version of themselves."""
    call = calls(backend)[name]
    leaf = torch.randn(2, 5, 67, device=device).to(dtype).requires_grad_()
    target = torch.tensor([1, 66, 3, -100], device=device).repeat(2, 1)
    logits = (leaf * 1)[:, :-1]
    before, version = logits.detach().clone(), logits._version
    total = call(logits, target)
    assert torch.equal(logits, before) and logits._version == version
    (gradient,) = torch.autograd.grad(total, logits)
    assert gradient.data_ptr() == logits.data_ptr() and torch.equal(gradient, logits)
    assert logits._version > version
    other = (leaf * 1)[:, :-1]
    (expected,) = torch.autograd.grad(calls(backend, False)[name](other, target), other)
    assert torch.equal(gradient, expected) and torch.equal(other, before)


@each_call
def test_inplace_backward_runs_once(backend, device, name):
    leaf = torch.randn(3, 8, device=device, requires_grad=True)
    total = calls(backend)[name](leaf * 1, torch.tensor([0, 1, 7], device=device))
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"second backward.*inplace=True"):
        total.backward()


@each_call
def test_inplace_finds_what_was_modified(backend, device, name):
    """The logits between forward and backward; and what another operation has saved of them."""
    leaf = torch.randn(3, 8, device=device, requires_grad=True)
    target = torch.tensor([0, 1, 7], device=device)
    logits = leaf * 1
    total = calls(backend)[name](logits, target)
    with torch.no_grad():
        logits.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()
    logits = torch.tanh(leaf)  # whose backward reads its output
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        calls(backend)[name](logits, target).backward()


@each_call
def test_inplace_beside_another_use_of_the_logits(backend, device, name):
    leaf = torch.randn(3, 8, device=device, requires_grad=True)
    target = torch.tensor([0, 1, 7], device=device)
    call = calls(backend)[name]
    logits = leaf * 1
    (call(logits, target) + 2 * logits.sum()).backward()
    got, leaf.grad = leaf.grad, None
    call(leaf * 1, target).backward()
    torch.testing.assert_close(got, leaf.grad + 2)


@each_call
def test_inplace_writes_nothing_without_a_gradient(backend, device, name):
    logits = torch.randn(3, 8, device=device)
    target = torch.tensor([0, 1, 7], device=device)
    for given in (logits, logits.clone().requires_grad_()):
        with torch.set_grad_enabled(given is logits):
            before, version = given.detach().clone(), given._version
            calls(backend)[name](given, target)
            assert torch.equal(given, before) and given._version == version
    leaf = logits.clone().requires_grad_()
    given = leaf * 1
    seen = fused_losses.statistics(given, target, inplace=True, backend=backend)
    ((seen.log_sum_squares + seen.mean_logit).sum() + leaf.sum()).backward()
    assert torch.equal(given, logits)


@pytest.mark.usefixtures("fresh_compiler")
@each_call
def test_inplace_refuses(backend, device, name):
    call = calls(backend)[name]
    target = torch.zeros(3, dtype=torch.int64, device=device)
    leaf = torch.randn(3, 8, device=device, requires_grad=True)
    with pytest.raises(ValueError, match="inplace=True would overwrite logits, a leaf"):
        call(leaf, target)
    with pytest.raises(ValueError, match="inplace=True would overwrite logits, a leaf"):
        call(leaf[:, 1:], target)
    for logits in ((leaf[:1] * 1).expand(3, 8), (leaf * 1)[:, ::2]):
        with pytest.raises(ValueError, match=r"inplace=True needs logits with a contiguous last dimension"):
            call(logits, target)
    traced = torch.compile(lambda x: call(x * 1, target), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="inplace=True of logprobs and statistics"):  # dynamo wraps it
        traced(leaf)


# ---- torch.compile, batches, arguments ----


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("outputs", [ALL, ("logprobs",), ("entropy", "top1"), ("mean_logit",)], ids=" ".join)
def test_compile(backend, device, outputs):
    case = make("logprobs", (2, 3), 31, device=device)

    def total(leaf: Tensor) -> tuple[Statistics, Tensor]:
        seen = fused_losses.statistics(leaf, case.target_tokens, outputs=outputs, softcap=9.0, backend=backend)
        return seen, sum(one.sum() for one in seen[:2] if one is not None) + leaf.sum()

    results = []
    for function in (total, torch.compile(total, fullgraph=True, backend="aot_eager")):
        leaf = case.storage.clone().requires_grad_()
        seen, loss = function(leaf)
        loss.backward()
        results.append((seen, leaf.grad))
    (seen, gradient), (compiled, compiled_gradient) = results
    torch.testing.assert_close(compiled_gradient, gradient)
    for one, other in zip(seen, compiled, strict=True):
        assert (one is None) == (other is None) and (one is None or torch.equal(one, other))


def test_meta(backend):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        got = fused_losses.statistics(torch.empty(2, 3, 50), torch.empty(2, 3, dtype=torch.int64), backend=backend)
    assert all(one.shape == (2, 3) for one in got) and got.top1.dtype == torch.bool


@pytest.mark.each_instruction_set
@pytest.mark.parametrize("softcap", [None, 5.0])
@ids
def test_the_same_token_in_any_batch(backend, device, dtype, softcap):
    logits, target = torch.randn(9, 1064, device=device).to(dtype), torch.randint(1064, (9,), device=device)
    together = fused_losses.statistics(logits, target, softcap=softcap, backend=backend)
    for at in ([4], [8, 0], [3, 4, 5]):
        alone = fused_losses.statistics(logits[at], target[at], softcap=softcap, backend=backend)
        assert all(torch.equal(one, every[at]) for one, every in zip(alone, together, strict=True))


@pytest.mark.parametrize(
    "outputs, message",
    [
        (("logprob",), "got 'logprob'"),
        (("top1", "entropy", "top1"), "'top1' twice"),
        ((), r"got \(\)"),
        ("logprobs", "got 'logprobs'"),
        (("logprobs", 3), "tuple or a list"),
        (None, "got None"),
        ({"logprobs"}, "tuple or a list"),
    ],
    ids=str,
)
def test_wrong_outputs(outputs, message):
    with pytest.raises(ValueError, match=f"outputs must.*{message}"):
        fused_losses.statistics(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), outputs=outputs)


def test_of_several_targets_there_are_none():
    """C++ says so, who would read a target that is not there."""
    backend = named("cpu")
    if backend.unusable(torch.device("cpu")):
        pytest.skip("the cpu backend is not usable here")
    targets = Targets(torch.zeros(2, 3, dtype=torch.int64), -100, torch.ones(2, 3))
    terms = Terms(entropy=True, statistics=True)
    problem = Problem(targets, Transform(), 1.0, OBJECTIVES["logprobs"], (), terms, 1.0, 5, False)
    with pytest.raises(ValueError, match="statistics are of one target per token"):
        backend.stats(torch.zeros(2, 5), problem)


def test_wrong_arguments():
    logits, target = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="target_tokens must have the shape"):
        fused_losses.statistics(logits, torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="temperature"):
        fused_losses.statistics(logits, target, temperature=0.0)
    with pytest.raises(ValueError, match="backend"):
        fused_losses.statistics(logits, target, backend="gpu")
