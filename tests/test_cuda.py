"""What only a GPU can show: synchronisation, graph capture, streams, devices, 2^31 elements, real vocabularies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from cases import LOSSES, MODES, Case, check, make, per_token_bounds, run
from conftest import HAS_GPU, NEEDS_GPU
from torch import Tensor

import fused_losses
from fused_losses import backends

pytestmark = pytest.mark.skipif(not HAS_GPU, reason=NEEDS_GPU)

GPU = torch.device("cuda")


@pytest.fixture(params=["cuda", "triton", "eager"])
def on_gpu(request: pytest.FixtureRequest) -> str:
    """The backends that take CUDA tensors."""
    reason = backends.unusable(request.param, GPU)
    if reason is not None:
        pytest.skip(reason)
    return request.param


@contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def options(case: Case) -> dict[str, dict[str, object]]:
    n = case.target_tokens.shape
    return {
        "plain": {},
        "weights": {"weights": torch.rand(n, device=GPU), "reduction": "mean"},
        "mask": {"weights": torch.rand(n, device=GPU) > 0.3},
        "denominator": {"denominator": torch.tensor(7, device=GPU), "reduction": "sum"},
        "numbers": {"denominator": 7, "temperature": 0.7, "weights": 0.5},
        "temperature": {"temperature": 0.5 + torch.rand(n, device=GPU)},
        "bounds": per_token_bounds(case),
        "outputs": {"return_outputs": True},
    }


# One for each engine that a row may be walked by: two sweeps, on chip, and a pair of blocks.
ENGINES = [(1000, torch.bfloat16), (32000, torch.bfloat16), (131075, torch.float32)]


@pytest.mark.parametrize("vocab, dtype", ENGINES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("objective", LOSSES)
def test_no_synchronisation(on_gpu, objective, mode, vocab, dtype):
    """Forward, backward and the upstream gradient, whatever the option; wrong arguments as well."""
    if vocab > 1000 and objective not in ("cross_entropy", "ppo"):
        pytest.skip("the engines know no objective")
    case = make(objective, (2, 8), vocab, dtype, GPU)
    for keywords in options(case).values():
        if mode == "none" and {"denominator", "reduction"} & set(keywords):
            continue
        keywords = case.keywords | keywords | MODES[mode]

        def step(keywords=keywords) -> None:
            logits = case.storage.clone().requires_grad_()
            loss = case.public(on_gpu)(logits.clone(), case.target_tokens, **keywords)
            loss = loss[0] if isinstance(loss, tuple) else loss
            (2.0 * loss).sum().backward()
            with torch.no_grad():
                case.public(on_gpu)(logits, case.target_tokens, **keywords)

        step()  # what is compiled or loaded once may synchronise
        with no_synchronisation():
            step()
            with pytest.raises(ValueError):
                case.public(on_gpu)(case.storage, case.target_tokens[:1], **case.keywords)


def test_no_synchronisation_of_logprobs(on_gpu):
    logits = torch.randn(4, 1000, device=GPU, requires_grad=True)
    target = torch.randint(1000, (4,), device=GPU)
    fused_losses.logprobs(logits, target, backend=on_gpu).sum().backward()
    with no_synchronisation():
        fused_losses.logprobs(logits, target, backend=on_gpu).sum().backward()


def copy_into(case: Case, other: Case) -> None:
    case.storage.copy_(other.storage)
    case.target_tokens.copy_(other.target_tokens)
    for name, value in case.keywords.items():
        if isinstance(value, Tensor):
            value.copy_(other.keywords[name])


@pytest.mark.parametrize("vocab, dtype", ENGINES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("objective", LOSSES)
def test_graph_replay(on_gpu, objective, mode, vocab, dtype):
    """Captured once, forward and backward; replayed with other data it gives that data's numbers."""
    if vocab > 1000 and objective not in ("cross_entropy", "ppo"):
        pytest.skip("the engines know no objective")
    cases = [make(objective, (2, 8), vocab, dtype, GPU, seed=seed) for seed in range(3)]
    case = make(objective, (2, 8), vocab, dtype, GPU, seed=9)
    leaf = case.storage.requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        loss = case.public(on_gpu)(leaf * 1, case.target_tokens, **case.keywords, **MODES[mode])
        return loss, torch.autograd.grad(3 * loss.sum(), leaf)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, gradient = step()
    for other in cases:
        with torch.no_grad():
            copy_into(case, other)
        graph.replay()
        expected = run(other.public(on_gpu), other, upstream=3.0, **MODES[mode])
        assert torch.equal(loss.detach(), expected.loss) and torch.equal(gradient, expected.gradient)


VOCABULARIES = [32000, 50257, 128256, 151643, 262144]


def of_all_kinds(n: int, vocab: int, dtype: torch.dtype, device: torch.device, **terms: float) -> Case:
    """Tokens of ppo that are read, masked, without a gradient, and of rows too far out for a fold, in every order."""
    torch.manual_seed(n)
    storage = (3 * torch.randn(n, vocab, device=device)).to(dtype)
    storage[2::11] *= 10 if "softcap" in terms else 1e5  # beyond, float64 has no slope of tanh to compare with
    target = torch.randint(vocab, (n,), device=device)
    target[1::3] = -100
    softcap = {name: value for name, value in terms.items() if name == "softcap"}
    logprobs = fused_losses.reference.logprobs(storage, target, **softcap)
    advantages = torch.randn(n, device=device)
    advantages[::5] = 0.0
    keywords = {
        "old_logprobs": logprobs + 0.3 * torch.randn(n, device=device),
        "advantages": advantages,
        "reduction": "sum",
        **terms,
    }
    return Case("ppo", storage, target, keywords)


# with as many blocks of a multiprocessor, at most
MANY = [
    (9001, torch.bfloat16, 3),
    (32000, torch.bfloat16, 3),
    (151643, torch.bfloat16, 1),
    (262144, torch.bfloat16, 1),
    (33001, torch.float32, 1),
    (131075, torch.float32, 1),
]


@pytest.mark.parametrize("terms", [{}, {"entropy_coef": 0.1}, {"softcap": 30.0}], ids=["plain", "entropy", "softcap"])
@pytest.mark.parametrize("vocab, dtype, blocks", MANY, ids=str)
def test_many_turns(on_gpu, vocab, dtype, blocks, terms):
    """Every row of several that a block has in turn: near the truth, and the same bits again, and alone."""
    if on_gpu == "eager":
        pytest.skip("no blocks")
    if terms and vocab > 100_000:
        pytest.skip("long enough with one kind of row")
    n = 3 * blocks * torch.cuda.get_device_properties(GPU).multi_processor_count + 5
    case = of_all_kinds(n, vocab, dtype, GPU, **terms)
    for mode in ({}, {"inplace": True}):
        got, again = check(case, on_gpu, **mode), run(case.public(on_gpu), case, **mode)
        assert torch.equal(got.gradient, again.gradient) and torch.equal(got.logprobs, again.logprobs)
        for i in range(0, n, 37):
            columns = {k: v[i : i + 1] if isinstance(v, Tensor) else v for k, v in case.keywords.items()}
            # at the same place in memory, as its phase may decide how it is summed
            one = Case(
                case.objective, case.storage, case.target_tokens[i : i + 1], columns, lambda t, i=i: t[i : i + 1]
            )
            alone = run(one.public(on_gpu), one, **mode)
            assert torch.equal(alone.gradient[i], got.gradient[i]) and torch.equal(alone.logprobs[0], got.logprobs[i])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("objective", LOSSES)
def test_real_vocabulary(on_gpu, objective, vocab, dtype):
    case = make(objective, (2, 17), vocab, dtype, GPU)
    for mode in MODES.values():
        check(case, on_gpu, **mode)


@pytest.mark.parametrize("view", [lambda t: t[:, :-1], lambda t: t[:, :, 1:], lambda t: t[:, ::2]])
@pytest.mark.parametrize("vocab", VOCABULARIES[:2])
def test_real_vocabulary_strided(on_gpu, vocab, view):
    case = make("ppo", (2, 9), vocab, torch.bfloat16, GPU, view=view)
    for mode in MODES.values():
        check(case, on_gpu, **mode)


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_backends_agree(vocab):
    if any(backends.unusable(name, GPU) for name in ("cuda", "triton")):
        pytest.skip("needs both of cuda and triton")
    for dtype in (torch.bfloat16, torch.float32):
        case = make("ppo", (64,), vocab, dtype, GPU)
        a, b = (run(case.public(name), case) for name in ("cuda", "triton"))
        torch.testing.assert_close(a.loss, b.loss, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(a.logprobs, b.logprobs, rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(a.gradient, b.gradient, rtol=2**-7 if dtype == torch.bfloat16 else 2e-5, atol=1e-9)


@pytest.mark.parametrize("mode", ["in place", "recompute", "none"])
def test_more_than_2_31_elements(on_gpu, mode):
    """The last rows lie beyond what an int32 offset reaches; they are right, and the first ones not overwritten."""
    n, vocab = 17_000, 128_256
    needed = 3 * 2 * n * vocab if on_gpu != "eager" else 1 << 62
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip("not enough GPU memory" if on_gpu != "eager" else "eager's own buffers are several times as large")
    torch.manual_seed(0)
    leaf = torch.empty(n, vocab, dtype=torch.bfloat16, device=GPU)
    for chunk in leaf.split(1000):
        chunk.normal_()
    assert leaf.numel() > 2**31
    target = torch.randint(vocab, (n,), device=GPU)
    weights = torch.rand(n, device=GPU)
    rows = torch.tensor([0, 1, n // 2, 16_743, 16_744, n - 2, n - 1], device=GPU)  # 2^31 / V is 16743.7
    sample, wanted = leaf[rows].clone().requires_grad_(), target[rows]
    expected = fused_losses.reference.cross_entropy(sample, wanted, weights=weights[rows], reduction="none")
    expected.sum().backward()

    logits = leaf.requires_grad_().view_as(leaf) if mode != "in place" else leaf.requires_grad_().clone()
    keywords = {"reduction": "sum"} | MODES[mode]
    loss, outputs = fused_losses.cross_entropy(
        logits, target, weights=weights, backend=on_gpu, return_outputs=True, **keywords
    )
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    torch.testing.assert_close(gradient[rows], sample.grad, rtol=2**-7, atol=1e-9)
    torch.testing.assert_close(-outputs.logprobs[rows] * weights[rows], expected.detach(), rtol=1e-5, atol=1e-5)


def test_side_stream(on_gpu):
    """Work goes to the current stream: behind what was put there before, and nothing runs on another."""
    case = make("ppo", (64,), 32000, torch.bfloat16, GPU)
    expected = run(case.public(on_gpu), case)
    side = torch.cuda.Stream()
    storage = torch.zeros_like(case.storage)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        storage.copy_(case.storage)
        got = run(case.public(on_gpu), Case(case.objective, storage, case.target_tokens, case.keywords))
    side.synchronize()
    assert torch.equal(got.loss, expected.loss) and torch.equal(got.gradient, expected.gradient)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason=f"{NEEDS_GPU}: a second one")
def test_second_device(on_gpu):
    """The tensors' device, not the current one."""
    first, second = (make("ppo", (8,), 1000, torch.bfloat16, f"cuda:{i}") for i in range(2))
    for mode in MODES.values():
        a, b = (run(case.public(on_gpu), case, **mode) for case in (first, second))
        assert torch.equal(a.loss.cpu(), b.loss.cpu()) and torch.equal(a.gradient.cpu(), b.gradient.cpu())
    assert torch.cuda.current_device() == 0
    with pytest.raises(ValueError, match=r"target_tokens.*cuda"):
        fused_losses.cross_entropy(first.storage, second.target_tokens, backend=on_gpu)


@pytest.mark.parametrize("vocab", [1000, 32001, 131075])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", [200_000, -1, -101, 2**31 - 1, -(2**31), 2**62])
def test_target_out_of_range(on_gpu, bad, mode, vocab):
    """NaN in its own row, the others as they were; validate=True raises with the position."""
    case = make("ppo", (6,), vocab, torch.float32, GPU, ignored=False, reduction="none" if mode == "none" else "sum")
    rest = [0, 1, 2, 4, 5]
    expected = run(case.public(on_gpu), case, **MODES[mode])
    case.target_tokens[3] = bad
    got = run(case.public(on_gpu), case, **MODES[mode])
    assert got.gradient[3].isnan().all() and got.logprobs[3].isnan() and got.loss.isnan().any()
    assert torch.equal(got.gradient[rest], expected.gradient[rest])
    assert torch.equal(got.logprobs[rest], expected.logprobs[rest])
    with pytest.raises(ValueError, match=f"target_tokens.* got {bad} at token 3 of 6"):
        case.public(on_gpu)(case.storage, case.target_tokens, **case.keywords, validate=True)


MIXED: dict[str, Callable[[Case], dict[str, object]]] = {
    "target_tokens": lambda case: {"target_tokens": case.target_tokens.cpu()},
    "advantages": lambda case: {"advantages": case.keywords["advantages"].cpu()},
    "weights": lambda case: {"weights": torch.tensor(1.0)},
    "temperature": lambda case: {"temperature": torch.ones(6)},
    "denominator": lambda case: {"denominator": torch.tensor(3.0)},
}


@pytest.mark.parametrize("argument", MIXED)
def test_mixed_devices(on_gpu, argument):
    case = make("ppo", (6,), 31, device=GPU)
    given = {"target_tokens": case.target_tokens} | case.keywords | MIXED[argument](case)
    with pytest.raises(ValueError, match=rf"{argument}.*cuda.*cpu"):
        case.public(on_gpu)(case.logits, **given)


@pytest.mark.parametrize("mode, buffers", [("one pass", 1), ("in place", 0), ("recompute", 1), ("none", 1)])
def test_peak_memory(on_gpu, mode, buffers):
    if on_gpu == "eager":
        pytest.skip("plain torch has intermediates")
    case = make("ppo", (256,), 32000, torch.bfloat16, GPU)
    logits = case.storage.requires_grad_() * 1

    def step() -> None:
        given = logits.detach().requires_grad_() * 1
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = case.public(on_gpu)(given, case.target_tokens, **case.keywords, **MODES[mode])
        torch.autograd.grad(loss.sum(), given)
        step.used = torch.cuda.max_memory_allocated() - before

    step()
    step()
    assert buffers * logits.nbytes <= step.used < buffers * logits.nbytes + (1 << 20)
