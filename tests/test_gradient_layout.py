"""A gradient's rows begin where the logits' do, modulo 16 bytes, on devices whose kernels want that."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES
from torch import Tensor

import fused_losses
from fused_losses import ops
from fused_losses.backends import rows
from fused_losses.backends.rows import as_matrix, empty_gradient
from fused_losses.objectives import OBJECTIVES
from fused_losses.problem import Problem, Targets, Terms, Transform

# name: of a (4, 6, 37) tensor
VIEWS = {
    "contiguous": lambda x: x,
    "all but the last token": lambda x: x[:, :-1],
    "all but the first token": lambda x: x[:, 1:],
    "all but the first sequence": lambda x: x[1:],
    "every other token": lambda x: x[:, ::2],
    "part of the vocabulary": lambda x: x[..., :33],
    "part of the vocabulary and of the tokens": lambda x: x[:, 2:, 1:34],
    "tokens before sequences": lambda x: x.transpose(0, 1),
    "one token": lambda x: x[:, 3],
    "one sequence": lambda x: x[2:3, :-1],
    "none": lambda x: x[:0],
    "one row for all": lambda x: x[:1, :1].expand(3, 5, 37),
}


@pytest.fixture
def cpu_too(monkeypatch):
    monkeypatch.setattr(rows, "IN_PHASE", {"cpu"})


def starts(x: Tensor) -> list[int]:
    return [row.data_ptr() for matrix in (as_matrix(x) if x.dim() == 3 else x[None]) for row in matrix]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_phases(cpu_too, view, dtype):
    logits = VIEWS[view](torch.zeros(4, 6, 37, dtype=dtype))
    gradient = empty_gradient(logits, False)
    assert gradient.shape == logits.shape and gradient.dtype == dtype
    assert all((x - y) % 16 == 0 for x, y in zip(starts(gradient), starts(logits), strict=True))
    assert not rows.overlap(gradient) and rows.rows(gradient) is not None
    least, own = logits.numel() * logits.element_size(), gradient.untyped_storage().nbytes()
    assert own <= least + 16 * (1 + logits.shape[:-1].numel())
    if view != "one row for all":
        assert own <= logits.untyped_storage().nbytes() + 16

    gradient = empty_gradient(logits, True)
    assert gradient.data_ptr() % 16 == 0 and gradient.storage_offset() == 0
    step = [(x - y) % 16 for x, y in zip(starts(gradient), starts(logits), strict=True)]
    assert len(set(step)) <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contiguous_where_that_is_in_phase(cpu_too, dtype):
    for logits in (torch.zeros(4, 6, 37, dtype=dtype), torch.zeros(4, 6, 64, dtype=dtype)[:, :-1]):
        gradient = empty_gradient(logits, False)
        assert gradient.is_contiguous() and gradient.storage_offset() == 0


def test_contiguous_on_other_devices():
    gradient = empty_gradient(torch.zeros(4, 6, 37)[:, 1:], False)
    assert gradient.is_contiguous() and gradient.storage_offset() == 0


def test_contiguous_where_logits_are_copied(cpu_too):
    gradient = empty_gradient(torch.zeros(4, 37, 6).transpose(1, 2), False)
    assert gradient.is_contiguous()


def loss_of(logits: Tensor, target: Tensor) -> Tensor:
    return fused_losses.cross_entropy(logits, target)


@pytest.mark.parametrize("view", ["all but the last token", "all but the first token", "tokens before sequences"])
def test_is_a_gradient_like_any_other(cpu_too, view):
    """Of a view and of a leaf with its strides; added up, seen by a hook, beside another loss of the same logits."""
    base = torch.randn(4, 6, 37)
    target = torch.randint(37, VIEWS[view](base).shape[:2])
    expected = base.clone().requires_grad_()
    torch.nn.functional.cross_entropy(VIEWS[view](expected).flatten(0, 1), target.flatten()).backward()

    x, seen = base.clone().requires_grad_(), []
    logits = VIEWS[view](x)
    logits.register_hook(seen.append)
    loss_of(logits, target).backward()
    assert torch.allclose(x.grad, expected.grad, atol=1e-6)
    assert torch.allclose(seen[0], VIEWS[view](expected.grad), atol=1e-6) and not seen[0].is_contiguous()
    (2 * loss_of(VIEWS[view](x), target)).backward()
    assert torch.allclose(x.grad, 3 * expected.grad, atol=1e-5)

    leaf = VIEWS[view](base.clone()).detach().requires_grad_()
    (loss_of(leaf, target) + loss_of(leaf, target)).backward()
    loss_of(leaf, target).backward()
    assert torch.allclose(leaf.grad, 3 * VIEWS[view](expected.grad), atol=1e-5)


@pytest.mark.parametrize("view", VIEWS)
def test_operators_say_which_strides(cpu_too, view):
    logits = VIEWS[view](torch.randn(4, 6, 37))
    n = logits.shape[:-1].numel()
    targets = Targets(torch.zeros(n, dtype=torch.int64), -100)
    problem = Problem(
        targets, Transform(1.0), 1.0, OBJECTIVES["cross_entropy"], (), Terms(), 1.0, logits.shape[-1], True
    )
    encoded = ops.encode(problem, "cpu", False)
    torch.library.opcheck(torch.ops.fused_losses.loss_and_grad, (logits, *encoded))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled(cpu_too, compiler, dynamic):
    torch._dynamo.reset()
    base, target = torch.randn(4, 6, 37), torch.randint(37, (4, 5))
    grads = []
    for function in (loss_of, torch.compile(loss_of, backend=compiler, dynamic=dynamic)):
        for view in (lambda x: x[:, :-1], lambda x: x[:, 1:]):
            x = base.clone().requires_grad_()
            (3 * function(view(x), target)).backward()
            grads.append(x.grad)
    assert torch.allclose(grads[0], grads[2], atol=1e-6) and torch.allclose(grads[1], grads[3], atol=1e-6)
