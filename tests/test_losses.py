"""Loss, logprobs and gradient against the float64 reference: every loss, dtype, mode, shape, layout and option."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    CLIPPED_LOSSES,
    DTYPES,
    LOSSES,
    MODES,
    POLICY_LOSSES,
    assert_rounded_once,
    check,
    make,
    per_token_bounds,
    run,
)
from torch import Tensor

from fused_losses.objectives import OBJECTIVES

ids = {"ids": lambda value: str(value).removeprefix("torch.")}


@pytest.mark.each_instruction_set
@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("objective", LOSSES)
def test_loss(backend, device, objective, mode, dtype):
    case = make(objective, (7,), 1000, dtype, device)
    check(case, backend, **MODES[mode])


@pytest.mark.parametrize("dtype", DTYPES[1:], **ids)
@pytest.mark.parametrize("mode", MODES)
def test_gradient_is_rounded_once(backend, device, mode, dtype):
    assert_rounded_once(make("cross_entropy", (7,), 1000, dtype, device), backend, **MODES[mode])


@pytest.mark.parametrize("dtype", DTYPES, **ids)
def test_logprobs(backend, device, dtype):
    check(make("logprobs", (2, 5), 1000, dtype, device), backend, upstream=torch.randn(2, 5))


@pytest.mark.each_instruction_set
@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("vocab", [1, 2, 3, 31, 128, 129, 4097])
def test_vocab(backend, device, vocab, dtype):
    case = make("ppo", (5,), vocab, dtype, device)
    check(case, backend)
    check(case, backend, inplace=True)
    check(case, backend, recompute=True)
    check(make("cross_entropy", (5,), vocab, dtype, device), backend)


@pytest.mark.parametrize("leading", [(), (1,), (5,), (2, 3), (2, 1), (2, 3, 2), (2, 1, 3), (2, 2, 1, 2)], **ids)
@pytest.mark.parametrize("objective", ["cross_entropy", "ppo"])
def test_leading_shape(backend, device, objective, leading):
    case = make(objective, leading, 31, device=device)
    for mode in MODES.values():
        check(case, backend, **mode)
    check(make("logprobs", leading, 31, device=device), backend)


LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    # name: the leading shape of the storage, its view
    "next token": ((2, 4), lambda t: t[:, :-1]),
    "odd offset": ((2, 4), lambda t: t[:, 1:, 1:]),
    "padded vocabulary": ((5,), lambda t: t[:, :29]),
    "every other row": ((6,), lambda t: t[::2]),
    "rows of both levels": ((4, 6), lambda t: t[::2, ::3]),
    "transposed tokens": ((4, 2), lambda t: t.transpose(0, 1)),
    "transposed vocabulary": ((2, 4), lambda t: t.transpose(1, 2)),
    "strided vocabulary": ((3,), lambda t: t[:, ::2]),
    "three strides": ((4, 4, 4), lambda t: t[::2, ::2, ::3]),
    "expanded rows": ((1,), lambda t: t.expand(4, -1)),
    "expanded batch": ((3,), lambda t: t.expand(2, -1, -1)),
    "overlapping rows": ((4,), lambda t: t.view(-1).as_strided((5, 31), (16, 1))),
    "one row of three": ((3, 3), lambda t: t[:, 1]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], **ids)
def test_layout(backend, device, layout, dtype):
    leading, view = LAYOUTS[layout]
    case = make("ppo", leading, 31, dtype, device, view=view)
    before = case.storage.clone()
    for mode in ("one pass", "recompute", "none"):
        check(case, backend, **MODES[mode])
    torch.testing.assert_close(case.storage, before, rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["next token", "odd offset", "padded vocabulary", "rows of both levels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], **ids)
def test_layout_in_place(backend, device, layout, dtype):
    """What lies between the rows stays: here, in the gradient of the storage, at 0."""
    leading, view = LAYOUTS[layout]
    case = make("cross_entropy", leading, 31, dtype, device, view=view)
    gradient = check(case, backend, inplace=True).gradient
    view(gradient).zero_()
    assert not gradient.any()


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)], **ids)
@pytest.mark.parametrize("objective", LOSSES)
def test_no_tokens(backend, device, objective, shape):
    case = make(objective, shape, 31, device=device)
    for mode in MODES.values():
        check(case, backend, **mode)
    check(make("logprobs", shape, 31, device=device), backend)


def test_many_tokens(backend, device):
    """More rows than a CUDA grid has blocks in y or z, and more than fit one block of the final reduction."""
    # The interpreter takes 10 ms a row: 70,000 would take ten minutes.
    n = 200 if backend == "triton" and device.type == "cpu" else 70_000
    case = make("ppo", (n,), 3, device=device)
    check(case, backend)
    check(case.having(weights=torch.rand(n, device=device)), backend, reduction="sum", recompute=True)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], **ids)
@pytest.mark.parametrize("layout", ["plain", "strided"])
def test_targets(backend, device, dtype, layout):
    case = make("ppo", (6,), 31, device=device)
    target = case.target_tokens.to(dtype)
    if layout == "strided":
        target = target.repeat_interleave(2)[::2]
    for mode in ("one pass", "none"):
        check(type(case)(case.objective, case.storage, target, case.keywords), backend, **MODES[mode])


@pytest.mark.parametrize("ignore_index", [0, 7, -1, 10**6, -(2**31)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], **ids)
def test_ignore_index(backend, device, ignore_index, dtype):
    case = make("cross_entropy", (6,), 31, device=device, ignore_index=ignore_index)
    case.target_tokens[4] = ignore_index
    case = type(case)(case.objective, case.storage, case.target_tokens.to(dtype), case.keywords)
    for mode in ("one pass", "none"):
        assert not check(case, backend, **MODES[mode]).gradient[4].any()


def tensors(*values: float) -> Callable[[torch.device], Tensor]:
    return lambda device: torch.tensor(values, device=device)


# For logits of shape (2, 3, V). A function of the device makes a tensor.
OPTIONS: dict[str, dict[str, Any]] = {
    "sum": {"reduction": "sum"},
    "mean": {"reduction": "mean"},
    "denominator of sum": {"reduction": "sum", "denominator": 17},
    "denominator of mean": {"reduction": "mean", "denominator": 0.3},
    "denominator as tensor": {"denominator": lambda device: torch.tensor(11, device=device)},
    "denominator as float64": {"denominator": lambda device: torch.tensor(2.5, device=device).double()},
    "weight for all": {"weights": 0.25},
    "weights": {"weights": lambda device: torch.tensor([[0.5, 2.0, 1.0], [0.0, 3.0, 0.1]], device=device)},
    "weights per row": {"weights": lambda device: torch.tensor([[2.0], [0.5]], device=device)},
    "weights per column": {"weights": tensors(1.0, 0.0, 0.5)},
    "weights 0-d": {"weights": lambda device: torch.tensor(1.5, device=device)},
    "mask": {"weights": lambda device: torch.tensor([[True, False, True]] * 2, device=device)},
    "integer mask": {"weights": lambda device: torch.tensor([[1], [0]], device=device)},
    "negative weights": {"weights": tensors(1.0, -2.0, 3.0)},
    "weights in bf16": {"weights": lambda device: torch.tensor([0.3, 1.7, 2.0], device=device).bfloat16()},
    "weights in float64": {"weights": lambda device: torch.tensor([0.3, 1.7, 2.0], device=device).double()},
    "strided weights": {"weights": lambda device: torch.rand(2, 6, device=device)[:, ::2]},
    "cold": {"temperature": 0.5},
    "hot": {"temperature": 3},
    "temperature per token": {"temperature": lambda device: torch.linspace(0.3, 2.0, 6, device=device).view(2, 3)},
    "temperature per row": {"temperature": lambda device: torch.tensor([[0.7], [1.3]], device=device)},
    "temperature 0-d": {"temperature": lambda device: torch.tensor(0.7, device=device)},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("objective", ["cross_entropy", "ppo"])
def test_option(backend, device, objective, option, mode):
    options = {k: v(device) if callable(v) else v for k, v in OPTIONS[option].items()}
    if mode == "none" and {"denominator", "reduction"} & set(options):
        pytest.skip("no reduction, no denominator")
    case = make(objective, (2, 3), 31, device=device, **options)
    check(case, backend, **MODES[mode])


@pytest.mark.parametrize("objective", LOSSES)
def test_bounds(backend, device, objective):
    """Clip thresholds and the like: as other numbers, per token, and one of each."""
    names = OBJECTIVES[objective].bounds
    case = make(objective, (2, 3), 31, device=device)
    tensors = per_token_bounds(case)
    choices = [
        {name: float(tensors[name].mean()) for name in names},
        tensors,
        {n: t[:, :1] for n, t in tensors.items()},
    ]
    choices += [{name: tensors[name]} for name in names[1:]]
    for bounds in choices:
        for mode in ("one pass", "none"):
            check(case.having(**bounds), backend, **MODES[mode])


@pytest.mark.parametrize("objective", CLIPPED_LOSSES)
@pytest.mark.parametrize("bounds", [(0.0, 4.0), (0, float("inf")), (1.1, 1.1), (0.0, 0.0)])
def test_wide_and_narrow_bounds(backend, device, objective, bounds):
    low, high = bounds
    case = make(objective, (6,), 31, device=device)
    check(case, backend, clip_low_threshold=low, clip_high_threshold=high)


@pytest.mark.parametrize("objective", POLICY_LOSSES)
def test_inputs_of_any_form(backend, device, objective):
    """Numbers, 0-d, broadcast, strided and of another float type: the same numbers as their float32 tensors."""
    case = make(objective, (2, 3), 31, device=device)
    full = torch.zeros(2, 3, device=device)
    old = torch.tensor([[-2.0], [-4.0]], device=device)
    for old_logprobs, advantages in [
        (-3.0, 2),
        (old, torch.tensor(-0.5, device=device)),
        (old.bfloat16(), torch.tensor([1.0, -1.0, 0.3], device=device).double()),
        (torch.linspace(-5, -1, 12, device=device).view(2, 6)[:, ::2], torch.randn(3, 2, device=device).half().t()),
    ]:
        inputs = {"old_logprobs": old_logprobs, "advantages": advantages}
        inputs = {name: inputs[name] for name in OBJECTIVES[objective].inputs}
        got = check(case.having(**inputs), backend)
        expected = check(case.having(**{k: (full.double() + v).float() for k, v in inputs.items()}), backend)
        torch.testing.assert_close((got.loss, got.gradient), (expected.loss, expected.gradient), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("objective", LOSSES)
def test_upstream(backend, device, objective, dtype):
    """Two phase: the truth. One pass: the gradient for 1 times the upstream gradient, rounded once more."""
    case = make(objective, (5,), 129, dtype, device)
    unit = run(case.public(backend), case).gradient
    for upstream in (3.7, -0.01, 0.0):
        check(case, backend, upstream=upstream, recompute=True)
        expected = (unit.float() * upstream).to(dtype)
        for mode in ("one pass", "in place"):
            gradient = run(case.public(backend), case, upstream=upstream, **MODES[mode]).gradient
            torch.testing.assert_close(gradient, expected, rtol=0, atol=0)


def test_upstream_per_token(backend, device):
    upstream = torch.tensor([[1.0, 0.0, -2.5], [1e-3, 100.0, 1.0]])
    for objective in LOSSES:
        check(make(objective, (2, 3), 129, device=device), backend, upstream=upstream, reduction="none")
