"""When a gradient is made, how often it may be asked for, what memory it takes and who else gets one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import DTYPES, LOSSES, MODES, Case, make, run
from torch import Tensor

pytestmark = pytest.mark.each_instruction_set

ONE_PASS, TWO_PHASE = ("one pass", "in place"), ("recompute", "none")


def call(case: Case, backend: str, mode: str, logits: Tensor) -> Tensor:
    return case.public(backend)(logits, case.target_tokens, **case.keywords, **MODES[mode])


def leaf_and_logits(case: Case) -> tuple[Tensor, Tensor]:
    leaf = case.storage.clone().requires_grad_()
    return leaf, leaf.clone()


@pytest.mark.parametrize("retain_graph", [False, True])
@pytest.mark.parametrize("mode", ONE_PASS)
@pytest.mark.parametrize("objective", LOSSES)
def test_second_backward_raises(backend, device, objective, mode, retain_graph):
    _, logits = leaf_and_logits(make(objective, device=device))
    loss = call(make(objective, device=device), backend, mode, logits)
    (first,) = torch.autograd.grad(loss, logits, retain_graph=retain_graph)
    before = first.clone()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="recompute=True"):
            torch.autograd.grad(loss, logits, torch.tensor(2.0, device=device))
    assert torch.equal(first, before), "the refused backward changed the gradient that was handed out"


@pytest.mark.parametrize("mode", TWO_PHASE)
@pytest.mark.parametrize("objective", LOSSES)
def test_backward_again(backend, device, objective, mode):
    case = make(objective, device=device)
    leaf, logits = leaf_and_logits(case)
    loss = call(case, backend, mode, logits).sum()
    gradients = [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(3)]
    assert all(torch.equal(gradients[0], g) for g in gradients)
    (doubled,) = torch.autograd.grad(2 * loss, leaf)
    assert torch.equal(doubled, 2 * gradients[0])


@pytest.mark.parametrize("mode", TWO_PHASE)
def test_backward_again_after_all_is_freed(backend, device, mode):
    case = make("ppo", device=device)
    _, logits = leaf_and_logits(case)
    loss = call(case, backend, mode, logits).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("mode", MODES)
def test_double_backward_raises(backend, device, mode):
    case = make("ppo", device=device)
    leaf, logits = leaf_and_logits(case)
    loss = call(case, backend, mode, logits).sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, leaf, create_graph=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_upstream_of_other_dtype(backend, device, mode, dtype):
    """loss.to(dtype) sends back a gradient of that dtype; autograd casts it, and a hook may not."""
    case = make("ppo", device=device)
    results = []
    for cast in (lambda t: t.to(dtype), lambda t: t):
        leaf, logits = leaf_and_logits(case)
        (3 * cast(call(case, backend, mode, logits))).sum().backward()
        results.append(leaf.grad)
    assert torch.equal(*results)


UPSTREAM: dict[str, Callable[[Tensor], Tensor]] = {
    "stride 0": lambda losses: losses.sum(),
    "stride 0 of rows": lambda losses: (losses.sum(0) * torch.tensor([1.0, 2.0, 3.0], device=losses.device)).sum(),
    "transposed": lambda losses: (losses.t() * torch.arange(6.0, device=losses.device).view(3, 2)).sum(),
    "one element": lambda losses: losses[1, 2] * 5,
    "a row": lambda losses: losses[0].sum(),
}


@pytest.mark.parametrize("objective", ["logprobs", "ppo"])
@pytest.mark.parametrize("upstream", UPSTREAM)
def test_upstream_layout(backend, device, objective, upstream):
    case = make(objective, (2, 3), 31, device=device)
    if objective == "ppo":
        case = case.having(reduction="none")
    gradients = []
    for function in (case.public(backend), case.reference):
        leaf = case.storage.clone().requires_grad_()
        UPSTREAM[upstream](function(leaf, case.target_tokens, **case.keywords)).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=2e-5, atol=1e-6)


def test_partial_none_upstream(backend, device):
    """Only what was used sends a gradient back: not the loss, or only one of two."""
    case = make("ppo", device=device)
    leaf = case.storage.clone().requires_grad_()
    for mode in ("one pass", "recompute", "none"):
        loss, outputs = case.public(backend)(
            leaf, case.target_tokens, return_outputs=True, **case.keywords, **MODES[mode]
        )
        assert not outputs.logprobs.requires_grad
        assert loss.grad_fn is not None
        (none,) = torch.autograd.grad(leaf.sum() + 0 * outputs.logprobs.sum(), leaf)
        assert torch.equal(none, torch.ones_like(leaf))


@pytest.mark.parametrize("mode", ["one pass", "in place", "recompute", "none"])
def test_logits_used_twice(backend, device, mode):
    """Two losses over the same logits add up; one in place must be the last use."""
    case = make("ppo", device=device)
    other = make("cross_entropy", device=device)
    alone = [run(c.public(backend), c).gradient for c in (case, other)]
    if mode == "none":
        alone[0] = run(case.public(backend), case, reduction="none").gradient
    leaf, logits = leaf_and_logits(case)
    total = call(other, backend, "one pass", logits) + call(case, backend, mode, logits).sum()
    total.backward()
    torch.testing.assert_close(leaf.grad, alone[0] + alone[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_is_in_place(backend, device, dtype):
    case = make("ppo", (2, 3), 31, dtype, device)
    _, logits = leaf_and_logits(case)
    address, version = logits.data_ptr(), logits._version
    loss = call(case, backend, "in place", logits)
    assert logits._version > version
    expected = run(case.public(backend), case).gradient
    assert torch.equal(logits.detach(), expected)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.data_ptr() == address and torch.equal(gradient, expected)


IN_PLACE_REFUSED: dict[str, Callable[[Tensor], Tensor]] = {
    "leaf": lambda leaf: leaf,
    "view of a leaf": lambda leaf: leaf[1:],
    "leaf, reshaped": lambda leaf: leaf.view(1, 7, 31),
    "expanded": lambda leaf: (leaf[:1] * 1).expand(7, -1),
    "overlapping": lambda leaf: (leaf * 1).view(-1).as_strided((7, 31), (16, 1)),
    "strided vocabulary": lambda leaf: (leaf * 1).t().contiguous().t(),
}


@pytest.mark.parametrize("how", IN_PLACE_REFUSED)
def test_in_place_refused(backend, device, how):
    """What autograd would refuse to an in-place operation of its own, and what has no one place for each element."""
    case = make("cross_entropy", device=device)
    leaf = case.storage.clone().requires_grad_()
    logits = IN_PLACE_REFUSED[how](leaf)
    target = case.target_tokens.expand(1, -1) if logits.dim() == 3 else case.target_tokens[-logits.shape[0] :]
    with pytest.raises(ValueError, match="inplace"):
        case.public(backend)(logits, target, inplace=True)
    assert torch.equal(leaf.detach(), case.storage)


SAVED_BY: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    # how the logits come to be, what else uses them
    "a producer that saved its result": (lambda leaf: leaf.tanh(), lambda logits: logits.sum()),
    "another user": (lambda leaf: leaf * 1, lambda logits: logits.square().sum()),
}


@pytest.mark.parametrize("who", SAVED_BY)
def test_in_place_is_found_out(backend, device, who):
    """Whoever saved the logits raises in backward: the values are gone."""
    case = make("cross_entropy", device=device)
    produce, use = SAVED_BY[who]
    leaf = torch.randn(case.storage.shape, device=device, requires_grad=True)
    logits = produce(leaf)
    used = use(logits)
    loss = call(case, backend, "in place", logits)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + used).backward()


@pytest.mark.parametrize("mode", ["recompute", "none"])
def test_logits_changed_before_backward(backend, device, mode):
    """Two phase reads the logits again: changed in between they are refused."""
    case = make("cross_entropy", device=device)
    _, logits = leaf_and_logits(case)
    loss = call(case, backend, mode, logits).sum()
    logits.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_one_pass_lets_go_of_the_logits(backend, device):
    """Changed after forward, the gradient is still right: the graph does not hold the logits."""
    case = make("ppo", device=device)
    leaf, logits = leaf_and_logits(case)
    loss = call(case, backend, "one pass", logits)
    with torch.no_grad():
        logits.zero_()
    loss.backward()
    assert torch.equal(leaf.grad, run(case.public(backend), case).gradient)


NO_GRADIENT: dict[str, Callable[[], object]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "detached": torch.enable_grad,
}


@pytest.mark.parametrize("how", NO_GRADIENT)
@pytest.mark.parametrize("objective", LOSSES)
def test_no_gradient_wanted(backend, device, objective, how):
    """The same loss, no graph, nothing written: in place as well, leaf or not."""
    case = make(objective, device=device)
    leaf, logits = leaf_and_logits(case)
    expected = call(case, backend, "one pass", leaf).detach()
    for mode in MODES:
        for given in (leaf, logits):
            version = given._version
            with NO_GRADIENT[how]():
                loss = call(case, backend, mode, given.detach() if how == "detached" else given)
            assert not loss.requires_grad and loss.grad_fn is None
            assert torch.equal(given.detach(), case.storage) and given._version == version
            if mode != "none":
                torch.testing.assert_close(loss.clone(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("objective", LOSSES)
def test_only_logits_get_a_gradient(backend, device, objective, mode):
    case = make(objective, device=device, weights=torch.rand(7))
    tensors = {k: v.clone().requires_grad_() for k, v in case.keywords.items() if isinstance(v, Tensor)}
    temperature = torch.ones(7, device=device, requires_grad=True)
    leaf, logits = leaf_and_logits(case)
    before = {k: v.detach().clone() for k, v in tensors.items()}
    call(case.having(**tensors, temperature=temperature), backend, mode, logits).sum().backward()
    assert leaf.grad is not None
    assert temperature.grad is None and all(v.grad is None for v in tensors.values())
    assert all(torch.equal(before[k], v) for k, v in tensors.items()), "an input was written to"


@pytest.mark.parametrize("mode", ["one pass", "recompute", "none"])
def test_inputs_stay(backend, device, mode):
    case = make("cispo", (2, 3), 31, device=device)
    leaf = case.storage.clone().requires_grad_()
    target = case.target_tokens.clone()
    call(case, backend, mode, leaf).sum().backward()
    assert torch.equal(leaf.detach(), case.storage) and leaf._version == 0
    assert torch.equal(target, case.target_tokens)


def allocations(function: Callable[[], object], device: torch.device, size: int) -> int:
    """How many buffers of at least ``size`` bytes ``function`` allocates."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    events = profile.profiler.kineto_results.events()
    return sum(e.name() == "[memory]" and e.nbytes() >= size for e in events)


@pytest.mark.parametrize("mode, buffers", [("one pass", 1), ("in place", 0), ("recompute", 1), ("none", 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_memory(kernels, device, mode, buffers, dtype):
    """In place takes no [N, V] buffer, every other way exactly one: the gradient."""
    case = make("ppo", (8,), 2048, dtype, device)
    _, logits = leaf_and_logits(case)
    call(case, kernels, mode, logits.clone()).sum().backward()  # what is loaded or compiled once

    def forward_and_backward() -> None:
        torch.autograd.grad(call(case, kernels, mode, logits).sum(), logits)

    assert allocations(forward_and_backward, device, logits.nbytes) == buffers
