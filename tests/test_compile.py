"""The operators' own contract with torch.library, and the losses under torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import LOSSES, MODES, OBJECTIVES, Case, make, per_token_bounds, run
from torch import Tensor

from fused_losses import ops
from fused_losses.head import Head
from fused_losses.problem import Problem, Targets, Terms, Transform

LOGITS, TARGET = torch.randn(3, 9), torch.tensor([1, -100, 8])


def _problem(objective: str, device: torch.device, tensors: bool) -> Problem:
    def column(value: float, shape: tuple[int, ...] = (3,)) -> Tensor | float:
        return torch.full(shape, value, device=device) if tensors else value

    return Problem(
        targets=Targets(TARGET.to(device), -100),
        transform=Transform(column(1.5)),
        weights=column(0.5),
        objective=OBJECTIVES[objective],
        inputs=tuple(column(0.9) for _ in OBJECTIVES[objective].columns),
        terms=Terms(),
        denominator=column(2.0, ()),
        vocab=LOGITS.shape[1],
        all_logprobs=True,
    )


def _op_arguments(name: str, device: torch.device, backend: str, tensors: bool) -> tuple[Any, ...]:
    problem = _problem("ppo", device, tensors)
    logits, encoded = LOGITS.to(device), ops.encode(problem, backend, False)
    if name == "forward":
        return (logits, *encoded, True)
    if name in ("loss_and_grad", "loss_and_grad_inplace"):
        return (logits.clone(), *encoded)
    if name == "scale":
        return (logits.clone(), torch.tensor(3.0, device=device), backend)
    head = _head_arguments(device, frozen=name == "head_losses_and_grad")
    if name in ("head_loss_and_grad", "head_losses_and_grad"):
        return (*head, *encoded)
    if name == "head_forward":
        return (*head, *encoded, True)
    assert name in ("grad", "head_grad")
    _, _, coefficients, stats = torch.ops.fused_losses.forward(logits, *encoded, True)
    temperature = problem.transform.temperature if tensors else None
    upstream = torch.ones(3, device=device)
    rest = encoded.target_tokens, None, temperature, [1.5, 0.0], stats, coefficients, upstream, backend
    return *((logits,) if name == "grad" else head), *rest


def _head_arguments(device: torch.device, frozen: bool) -> tuple[Any, ...]:
    """Whose logits are LOGITS, in chunks of two tokens."""
    head = Head(
        backend="auto",
        validate=False,
        rows=2,
        products=torch.float32,
        logits_dtype=torch.float32,
        sum_dtype=torch.float32,
        weight_grad=None,
        skip_masked=False,
        partial=False,
        layout=None,
        needs=(True, not frozen, False),
    )
    weight, bias = LOGITS.T.contiguous().to(device), torch.zeros(LOGITS.shape[1], device=device)
    return torch.eye(3, device=device), weight, bias, ops.encode_head(head)


@pytest.mark.parametrize("given", ["plain", "terms", "several targets"])
def test_codec(given):
    """A problem comes back as it went, field by field."""
    problem = _problem("ppo", LOGITS.device, True)
    if given == "terms":
        columns = {name: torch.rand(3) for name in Terms._fields[:5]}
        problem = problem._replace(
            transform=Transform(0.5, 30.0),
            terms=Terms(**columns, kl_type="abs", kl_weighted_by_ratio=True, entropy=True, statistics=True),
        )
    if given == "several targets":
        targets = Targets(TARGET[:, None].expand(3, 2).contiguous(), 7, torch.rand(3, 2))
        terms = Terms(label_smoothing=0.25, z_loss=0.5, entropy=True)
        problem = problem._replace(targets=targets, terms=terms, denominator=None, all_logprobs=False)
    back = ops.decode(ops.encode(problem, "cpu", True))
    assert _flat(back) == _flat(problem)


def _flat(record: Any) -> Any:
    """A record of records, its tensors as lists."""
    if isinstance(record, tuple):
        names = getattr(record, "_fields", range(len(record)))
        return {name: _flat(value) for name, value in zip(names, record, strict=True)}
    return record.tolist() if isinstance(record, Tensor) else record


OPERATORS = sorted(
    schema.name.partition("::")[2]
    for schema in torch._C._jit_get_all_schemas()
    if schema.name.startswith("fused_losses::")
)


def test_every_operator_is_here():
    of_logits = {"forward", "grad", "loss_and_grad", "loss_and_grad_inplace", "scale"}
    of_a_head = {"head_forward", "head_grad", "head_loss_and_grad", "head_losses_and_grad"}
    assert set(OPERATORS) >= of_logits | of_a_head


@pytest.mark.parametrize("tensors", [False, True], ids=["numbers", "tensors"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_opcheck(backend, device, operator, tensors):
    torch.library.opcheck(
        getattr(torch.ops.fused_losses, operator).default, _op_arguments(operator, device, backend, tensors)
    )


def test_opcheck_no_reduction(backend, device):
    encoded = ops.encode(_problem("cispo", device, True), backend, False)
    arguments = (LOGITS.to(device), *encoded, False)
    torch.library.opcheck(torch.ops.fused_losses.forward.default, arguments)


def test_opcheck_statistics(backend, device):
    problem = _problem("logprobs", device, True)._replace(terms=Terms(entropy=True, statistics=True))
    arguments = (LOGITS.to(device), *ops.encode(problem, backend, False), False)
    torch.library.opcheck(torch.ops.fused_losses.forward.default, arguments)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def in_a_graph(case: Case, backend: str, **keywords: Any) -> Callable[..., Any]:
    """The loss in the middle of a graph: after an operation whose result it gets, before another."""
    function = case.public(backend)

    def step(logits: Tensor, target_tokens: Tensor, **inputs: Any) -> Any:
        loss, outputs = function(2 * logits, target_tokens, **inputs, **keywords)
        return 3 * loss, outputs

    return step


def compiled(case: Case, backend: str, compiler: str = "aot_eager", **keywords: Any) -> Callable[..., Any]:
    return torch.compile(in_a_graph(case, backend, **keywords), fullgraph=True, backend=compiler)


def compare(case: Case, backend: str, compiler: str, **keywords: Any) -> None:
    got = run(compiled(case, backend, compiler, **keywords), case)
    expected = run(in_a_graph(case, backend, **keywords), case)
    torch.testing.assert_close(got.loss, expected.loss)
    torch.testing.assert_close(got.gradient, expected.gradient)
    torch.testing.assert_close(got.logprobs, expected.logprobs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("objective", LOSSES)
def test_compile(backend, device, objective, mode):
    compare(make(objective, (2, 3), 31, device=device), backend, "aot_eager", **MODES[mode])


@pytest.mark.parametrize("mode", ["one pass", "in place", "none"])
def test_inductor(backend, device, mode):
    if backend == "triton" and device.type == "cpu" and mode != "one pass":
        pytest.skip("the operators are opaque: once is enough where kernels are interpreted")
    compare(make("ppo", (2, 3), 31, device=device), backend, "inductor", **MODES[mode])


def test_compile_logprobs(backend, device):
    case = make("logprobs", (2, 3), 31, device=device)
    function = case.public(backend)
    got = run(torch.compile(function, fullgraph=True, backend="aot_eager"), case)
    expected = run(function, case)
    torch.testing.assert_close((got.loss, got.gradient), (expected.loss, expected.gradient))


@pytest.mark.parametrize("option", ["weights", "temperature", "denominator", "bounds", "bf16", "strided", "int32"])
def test_compile_option(backend, device, option):
    case = make("ppo", (2, 4), 31, torch.bfloat16 if option == "bf16" else torch.float32, device)
    keywords: dict[str, Any] = {
        "weights": {"weights": torch.tensor([True, False, True, True], device=device)},
        "temperature": {"temperature": torch.full((2, 1), 0.7, device=device)},
        "denominator": {"denominator": torch.tensor(5, device=device)},
        "bounds": per_token_bounds(case),
    }.get(option, {})
    if option == "strided":
        case = make("ppo", (2, 4), 31, device=device, view=lambda t: t[:, :-1])
    if option == "int32":
        case = Case("ppo", case.storage, case.target_tokens.int(), case.keywords)
    for mode in ("one pass", "recompute"):
        compare(case.having(**keywords), backend, "aot_eager", **MODES[mode])


def test_changing_numbers(backend, device):
    """Thresholds, temperature and denominator as Python numbers, another at each call: never a stale one."""
    case = make("ppo", (6,), 31, device=device)
    function = compiled(case, backend)
    expected = in_a_graph(case, backend)
    for step in range(4):
        numbers = {
            "clip_low_threshold": 0.9 - 0.05 * step,
            "clip_high_threshold": 1.1 + 0.1 * step,
            "temperature": 1.0 + 0.1 * step,
            "denominator": 3.0 + step,
        }
        got, want = run(function, case, **numbers), run(expected, case, **numbers)
        torch.testing.assert_close((got.loss, got.gradient), (want.loss, want.gradient))


def test_changing_length(backend, device):
    function = None
    for n in (5, 7, 12):
        case = make("ppo", (n,), 31, device=device)
        function = function or compiled(case, backend)
        got, want = run(function, case), run(in_a_graph(case, backend), case)
        torch.testing.assert_close((got.loss, got.gradient), (want.loss, want.gradient))


@pytest.mark.parametrize("upstream", [1.0, 2.0])
@pytest.mark.parametrize("mode", MODES)
def test_second_backward_under_compile(backend, device, mode, upstream):
    """Raises, or is right. Never silently something else."""
    case = make("ppo", (4,), 31, device=device)
    leaf = case.storage.clone().requires_grad_()
    loss, _ = compiled(case, backend, **MODES[mode])(leaf, case.target_tokens, **case.keywords, return_outputs=True)
    loss = loss.sum() * upstream
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    first = first.clone()
    try:
        (second,) = torch.autograd.grad(loss, leaf)
    except RuntimeError:
        assert mode in ("one pass", "in place")
    else:
        torch.testing.assert_close(second, first)


def test_in_place_of_used_logits_under_compile(backend, device):
    """Another user of the logits, before the loss and in the same graph: an error, or as if it had come first."""
    case = make("ppo", (4,), 31, device=device)

    def step(logits: Tensor, function: Callable[..., Tensor], **keywords: Any) -> Tensor:
        logits = 2 * logits
        return logits.square().sum() + function(logits, case.target_tokens, **case.keywords, **keywords)

    leaf = case.storage.clone().requires_grad_()
    (expected,) = torch.autograd.grad(step(leaf, case.reference), leaf)
    function = torch.compile(step, fullgraph=True, backend="aot_eager")
    try:
        (got,) = torch.autograd.grad(function(leaf, case.public(backend), inplace=True), leaf)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        torch.testing.assert_close(got, expected)


def test_compiled_errors_stay(backend, device):
    """The checks run when the graph is traced: a wrong argument does not get into it."""
    case = make("ppo", (4,), 31, device=device)
    function = compiled(case, backend, clip_low_threshold=2.0)
    with pytest.raises(Exception, match="clip_low_threshold"):
        function(case.logits, case.target_tokens, **case.keywords, return_outputs=True)
