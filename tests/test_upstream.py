"""``upstream``: the one pass makes its gradient for an upstream gradient that is expected."""

from __future__ import annotations

import math

import pytest
import torch
from cases import DTYPES, LOSSES, check, make

import fused_losses
from fused_losses import LinearHead
from fused_losses.logits import Logits

losses = pytest.mark.parametrize("objective", LOSSES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("expected", [4096.0, 0.3, "tensor"])
@losses
def test_agrees(backend, device, objective, expected, dtype):
    """With what comes: right to one rounding of the gradient, in its own buffer and in place."""
    case = make(objective, (7,), 130, dtype, device)
    if expected == "tensor":
        expected = torch.tensor(2.0**14, device=device)
    for keywords in ({}, {"inplace": True}, {"denominator": 3.0}, {"reduction": "sum"}):
        check(case.having(upstream=expected, **keywords), backend, upstream=float(expected))


@pytest.mark.parametrize("comes", [0.0, 1.0, 7.0, -2.0])
def test_disagrees(backend, device, comes):
    """Backward multiplies by what comes over what was expected."""
    check(make("ppo", (7,), 130, torch.float32, device).having(upstream=2.0), backend, upstream=comes)


@losses
def test_loss_is_the_same(backend, device, objective):
    case = make(objective, (9,), 257, torch.float32, device)
    plain = case.public(backend)(case.logits, case.target_tokens, **case.keywords)
    for upstream in (2.0**-10, 2.0**16, torch.tensor(0.37, device=device)):
        logits = case.logits.clone().requires_grad_()
        loss = case.public(backend)(logits, case.target_tokens, upstream=upstream, **case.keywords)
        torch.testing.assert_close(loss.detach(), plain, rtol=5e-7, atol=0)


def test_scaled_half_precision_keeps_what_is_small(backend, device):
    """float16 has nothing below 6e-8: a scale that comes in backward only is too late."""
    torch.manual_seed(0)
    logits = torch.randn(512, 1024, device=device).half()
    targets = torch.randint(1024, (512,), device=device)
    scale = 2.0**14
    truth = logits.double().requires_grad_()
    (fused_losses.reference.cross_entropy(truth, targets) * scale).backward()
    kept = {}
    for upstream in (1.0, scale):
        x = logits.clone().requires_grad_()
        (fused_losses.cross_entropy(x, targets, backend=backend, upstream=upstream) * scale).backward()
        kept[upstream] = ((x.grad - truth.grad).abs() <= 2e-3 * truth.grad.abs()).float().mean().item()
    assert kept[scale] == 1.0 and kept[1.0] < 0.5


class Spy:
    """What each gradient is multiplied by."""

    def __init__(self, monkeypatch):
        self.seen = []
        scale = Logits.scale

        def seen(source, gradients, upstream):
            self.seen.append(upstream.item())
            scale(source, gradients, upstream)

        monkeypatch.setattr(Logits, "scale", seen)


@pytest.mark.parametrize("expected", [3.0, 1e-3, 65536.0, 1 / 7])
def test_nothing_is_multiplied_where_they_agree(monkeypatch, expected):
    """By exactly 1, for which kernels touch no memory, whatever float32 makes of the number."""
    spy = Spy(monkeypatch)
    for upstream in (expected, torch.tensor(expected)):
        logits = torch.randn(4, 33).requires_grad_()
        (fused_losses.cross_entropy(logits, torch.zeros(4).long(), upstream=upstream) * expected).backward()
    assert spy.seen == [1.0, 1.0]


@pytest.mark.parametrize("frozen", ["", "weight", "hidden"])
def test_head(frozen):
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(20, 8), torch.randn(77, 8), torch.randn(77)
    targets = torch.randint(77, (20,))
    gradients = []
    for upstream in (1.0, 5.0, torch.tensor(5.0)):
        inputs = [t.clone().requires_grad_(name != frozen) for name, t in (("hidden", hidden), ("weight", weight))]
        inputs.append(bias.clone().requires_grad_())
        head = LinearHead(*inputs, chunk_bytes=7 * 77 * 4)
        (5.0 * fused_losses.cross_entropy(head, targets, upstream=upstream)).backward()
        gradients.append([t.grad for t in inputs if t.requires_grad])
    for other in gradients[1:]:
        for found, wanted in zip(other, gradients[0], strict=True):
            torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("upstream", [4.0, "tensor"])
def test_compiled(upstream):
    upstream = torch.tensor(4.0) if upstream == "tensor" else upstream
    targets = torch.randint(50, (6,))

    def step(x):
        return fused_losses.cross_entropy(x * 1.0, targets, upstream=upstream) * 4.0

    inputs = [torch.arange(300.0).view(6, 50).sin().requires_grad_() for _ in range(2)]
    for x, function in zip(inputs, (step, torch.compile(step, fullgraph=True)), strict=True):
        function(x).backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)


def test_two_phases_take_what_comes():
    logits, targets = torch.randn(2, 3, 11), torch.randint(11, (2, 3))
    found = []
    for upstream in (1.0, 8.0):
        x = logits.clone().requires_grad_()
        loss = fused_losses.gspo(x, targets, -2.0, 1.0, upstream=upstream)
        loss = loss + fused_losses.cross_entropy(x, targets, recompute=True, upstream=upstream)
        (8.0 * loss).backward()
        found.append(x.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize("real", [0.0, 1e-3, 0.5])
@pytest.mark.parametrize("remedy", ["recompute", "upstream"])
def test_what_float16_overflows_without_the_upstream_gradient(backend, device, real, remedy):
    if remedy == "upstream" and real == 0.0:
        pytest.skip("an upstream gradient of 0 is not one to expect")
    logits, targets = torch.zeros(1, 3, device=device, dtype=torch.float16), torch.tensor([1], device=device)
    leaf, wanted = (logits.clone().requires_grad_() for _ in range(2))
    options = {"recompute": True} if remedy == "recompute" else {"upstream": real}
    loss = fused_losses.cross_entropy(leaf, targets, weights=1e5, reduction="sum", backend=backend, **options)
    (real * loss).backward()
    (real * 1e5 * torch.nn.functional.cross_entropy(wanted.float(), targets)).backward()
    torch.testing.assert_close(leaf.grad, wanted.grad)
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("name", ["upstream", "denominator"])
def test_an_integer_is_a_number_in_a_tensor_too(name):
    """A number of processes, or of tokens."""
    logits, targets = torch.randn(3, 7), torch.randint(7, (3,))
    found = []
    for number in (2, torch.tensor(2), torch.tensor(2, dtype=torch.int32), torch.tensor(2.0)):
        x = logits.clone().requires_grad_()
        loss = fused_losses.cross_entropy(x, targets, **{name: number})
        (2 * loss).backward()
        found.append((loss.detach(), x.grad))
    assert all(torch.equal(loss, found[0][0]) and torch.equal(grad, found[0][1]) for loss, grad in found)


@pytest.mark.parametrize("loss", ["cross_entropy", "gspo"])
@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"upstream": 0.0}, ValueError, "upstream must be at least 5.42101e-20 and at most 1.84467e\\+19, got 0"),
        ({"upstream": -1.0}, ValueError, "upstream must be at least 5.42101e-20"),
        ({"upstream": math.inf}, ValueError, "upstream must be at most 1.84467e\\+19, got inf"),
        ({"upstream": math.nan}, ValueError, "upstream must not be NaN"),
        ({"upstream": "2"}, TypeError, "upstream must be a number or a tensor, got str"),
        ({"upstream": torch.ones(1)}, ValueError, r"upstream must be a number or a 0-d tensor, got shape \(1,\)"),
        ({"upstream": torch.tensor(1j)}, TypeError, "upstream must be .* a real number, got torch.complex64"),
        ({"denominator": torch.tensor(1j)}, TypeError, "denominator must be .* a real number, got torch.complex64"),
        ({"upstream": 2.0, "reduction": "none"}, ValueError, 'upstream is of one reduced loss: reduction is "none"'),
        ({"upstream": torch.tensor(1.0), "reduction": "none"}, ValueError, "upstream is of one reduced loss"),
        (
            {"upstream": torch.tensor(0.0)},
            ValueError,
            "upstream must be at least 5.42101e-20 and at most 1.84467e\\+19, got [-0-9.e+]+$",
        ),
        ({"upstream": torch.tensor(math.inf)}, ValueError, "upstream must be at least"),
        ({"upstream": torch.tensor(math.nan)}, ValueError, "upstream must be at least"),
    ],
)
def test_errors(loss, options, error, message):
    logits, targets = torch.randn(2, 3, 11, requires_grad=True), torch.zeros(2, 3).long()
    inputs = () if loss == "cross_entropy" else (-2.0, 1.0)
    with pytest.raises(error, match=message):
        getattr(fused_losses, loss)(logits, targets, *inputs, **options)


def test_a_scale_that_is_changed_before_backward():
    """As GradScaler.update does, in place: what was expected is what it was then."""
    logits, scale = torch.randn(3, 9, requires_grad=True), torch.tensor(4.0)
    loss = fused_losses.cross_entropy(logits, torch.zeros(3).long(), upstream=scale)
    scale.fill_(8.0)
    (gradient,) = torch.autograd.grad(loss * scale, logits)
    (wanted,) = torch.autograd.grad(fused_losses.cross_entropy(logits, torch.zeros(3).long()) * 8.0, logits)
    torch.testing.assert_close(gradient, wanted)
