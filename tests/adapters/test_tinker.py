"""Custom losses of Tinker: graphs of torch operations on the logprobs, as traced, as data, and what is refused."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_losses
from fused_losses.adapters import tinker as adapter

T, V = 11, 37
Returned = tuple[Tensor, dict[str, Tensor]]


def clipped(logprobs: Tensor, old: Tensor, advantages: Tensor) -> Returned:
    ratio = torch.exp(logprobs - old)
    loss = -torch.minimum(ratio * advantages, ratio.clamp(0.8, max=1.2) * advantages).sum()
    return loss, {"custom/ratio:mean": ratio.mean(), "custom/loss:sum": loss}


def of_everything(logprobs: Tensor, old: Tensor, advantages: Tensor) -> Returned:
    """Slices, attributes, keywords, operators on either side, math of a size, infinities, functions of modules."""
    gap = logprobs[1:] - old[..., 1:]
    size = math.sqrt(logprobs.shape[0])
    bounded = torch.where((gap > -0.5) & (gap < float("inf")), gap, torch.zeros_like(gap))
    soft = torch.nn.functional.softplus(-gap).to(torch.float32) + torch.special.expm1(bounded)
    shares = torch.softmax(torch.stack([gap, bounded], dim=-1), dim=-1)[:, 0]
    value = (soft * advantages[1:] * shares).sum() / size - 2 ** bounded.abs()[None].mT.mean() + (1 - gap).logsumexp(0)
    return value, {"custom/a.b-c/d:sum": bounded.detach().sum(), "custom/x:mean": shares.mean()}


def linear(logprobs: Tensor, weights: Tensor) -> Returned:
    loss = -(logprobs * weights).sum()
    return loss, {"custom/nll:sum": loss}


def graph_of(function: Callable[..., Any]) -> torch.fx.GraphModule:
    return torch.fx.symbolic_trace(function)


def drawn(shape: tuple[int, ...] = (T,), dtype: torch.dtype = torch.float32) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    logits = torch.randn(T, V).to(dtype).requires_grad_()
    inputs = {"target_tokens": torch.randint(V, shape), "old": torch.randn(shape) - 4, "advantages": torch.randn(shape)}
    return logits, inputs | {"weights": (torch.rand(shape) < 0.6).float()}


def in_float64(function: Callable[..., Returned], logits: Tensor, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    exact = logits.detach().double().requires_grad_()
    targets = inputs["target_tokens"]
    logprobs = torch.log_softmax(exact, -1).gather(-1, targets.view(T, -1)).view(targets.shape)
    names = function.__code__.co_varnames[1 : function.__code__.co_argcount]
    loss, metrics = function(logprobs, *(inputs[name].double() for name in names))
    loss.backward()
    return loss.detach(), exact.grad, logprobs.detach(), *(value.detach() for value in metrics.values())


def held(function: Callable[..., Returned], custom: Any, shape: tuple[int, ...] = (T,), **keywords: Any) -> None:
    logits, inputs = drawn(shape)
    result = fused_losses.compute("custom", logits, inputs, custom=custom, **keywords)
    result.loss.backward()
    loss, gradient, logprobs, *metrics = in_float64(function, logits, inputs)
    assert result.loss.shape == () and result.loss.dtype is torch.float32
    assert not result.logprobs.requires_grad and next(iter(result.metrics)) == "loss:sum"
    actual = [result.loss, logits.grad, result.logprobs, *list(result.metrics.values())[1:]]
    for ours, theirs in zip(actual, [loss, gradient, logprobs, *metrics], strict=True):
        assert not ours.requires_grad or ours is result.loss
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("function", [clipped, of_everything])
@pytest.mark.parametrize("on", ["auto", "eager"])
def test_traced(function, on):
    held(function, graph_of(function), backend=on)


@pytest.mark.parametrize("function", [clipped, linear])
def test_several_targets_per_token(function):
    held(function, graph_of(function), (T, 3))


@pytest.mark.parametrize("function", [clipped, of_everything])
def test_as_the_client_has_it_and_as_it_is_sent(function):
    """A LossHandle, the graph of create_custom_loss, and that as JSON."""
    pytest.importorskip("tinker")
    from tinker.lib.public_interfaces.custom_loss import encode_graph, trace_loss

    handle = trace_loss(function, {"logprobs": 1, "old": 1, "advantages": 1}, "session")
    graph = encode_graph(handle)
    for custom in (handle, graph, json.loads(graph.model_dump_json())):
        held(function, custom)


def test_constants_of_a_graph_that_is_data():
    """What the documentation of CustomLossNode lists, and nothing else."""
    data = graph_as_data(
        call("function", "zero", "torch.zeros_like", {"ref": "logprobs"}, kwargs={"dtype": {"dtype": "float32"}}),
        call("function", "far", "torch.where", {"ref": "mask"}, {"ref": "logprobs"}, {"float": "inf"}),
        call("function", "near", "torch.minimum", {"ref": "far"}, {"ref": "logprobs"}),
        call(
            "function",
            "cut",
            "operator.getitem",
            {"ref": "near"},
            {"tuple": [{"ellipsis": True}, {"slice": [2, 9, 2]}]},
        ),
        call("method", "here", "to", {"ref": "cut"}, kwargs={"device": {"device": "cpu"}}),
        call(
            "method",
            "dense",
            "contiguous",
            {"ref": "here"},
            kwargs={"memory_format": {"memory_format": "contiguous_format"}},
        ),
        call("function", "joined", "torch.cat", [{"ref": "dense"}, {"ref": "zero"}]),
        call("method", "loss", "sum", {"ref": "joined"}),
        inputs=("logprobs", "mask"),
    )
    logits, inputs = drawn()
    inputs["mask"] = torch.ones(T, dtype=torch.bool)
    result = adapter.compute("custom", logits, inputs, custom=data)
    torch.testing.assert_close(result.loss, result.logprobs[2:9:2].sum())
    result.loss.backward()
    assert (logits.grad[[2, 4, 6, 8]] != 0).any(-1).all() and (logits.grad[[0, 1, 3, 5, 7, 9, 10]] == 0).all()


def test_masked_tokens():
    """A token that the loss takes with weight 0 has gradient 0, a target of -100 none at all, and bf16 is taken."""
    logits, inputs = drawn(dtype=torch.bfloat16)
    inputs["weights"][:] = 0.0
    result = adapter.compute("custom", logits, inputs, custom=graph_of(linear))
    result.loss.backward()
    assert result.loss == 0 and (logits.grad == 0).all() and logits.grad.dtype is torch.bfloat16
    logits, inputs = drawn()
    logits.data[3] = torch.nan
    inputs["target_tokens"][3] = -100
    result = adapter.compute("custom", logits, inputs, custom=graph_of(linear))
    result.loss.backward()
    assert result.loss.isfinite() and (logits.grad[3] == 0).all() and logits.grad.isfinite().all()


def test_without_a_gradient_and_without_logprobs():
    logits, inputs = drawn((T, 3))
    for targets in (inputs["target_tokens"], inputs["target_tokens"][:, 0]):
        shaped = {key: value if targets.dim() == 2 else value[:, 0] for key, value in inputs.items()}
        with torch.no_grad():
            result = adapter.compute("custom", logits, shaped, custom=graph_of(linear))
        assert not result.loss.requires_grad
    constant = graph_of(lambda logprobs, weights: (weights.sum(), {}))
    assert adapter.compute("custom", logits, inputs, custom=constant).loss == inputs["weights"].sum()


def test_inputs_are_constants():
    logits, inputs = drawn()
    weights = inputs["weights"].requires_grad_()
    adapter.compute("custom", logits, inputs, custom=graph_of(linear)).loss.backward()
    assert weights.grad is None and logits.grad is not None


def test_integers_stay_integers():
    """In lists and TensorData, as Tinker's client hands them on; of named losses they become floats."""
    tinker = pytest.importorskip("tinker")
    picked = graph_of(lambda logprobs, chosen: (logprobs[chosen].sum(), {}))
    logits, inputs = drawn()
    chosen = tinker.TensorData.from_torch(torch.tensor([1, 4]))
    result = adapter.compute("custom", logits, inputs | {"chosen": chosen}, custom=picked)
    torch.testing.assert_close(result.loss, result.logprobs[[1, 4]].sum())


def test_a_head_in_place_of_logits():
    torch.manual_seed(0)
    hidden, weight = torch.randn(T, 8, requires_grad=True), torch.randn(V, 8, requires_grad=True)
    for shape in ((T,), (T, 3)):
        _, inputs = drawn(shape)
        grads = []
        for logits in (fused_losses.LinearHead(hidden, weight), hidden @ weight.t()):
            loss = adapter.compute("custom", logits, inputs, custom=graph_of(clipped)).loss
            grads.append(torch.autograd.grad(loss, (hidden, weight)))
        for ours, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# ---- What is refused ----


def call(kind: str, name: str, target: str, *args: Any, kwargs: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"op": f"call_{kind}", "name": name, "target": target, "args": list(args), "kwargs": kwargs or {}}


def graph_as_data(*nodes: dict[str, Any], inputs: tuple[str, ...] = ("logprobs",), loss: Any = None) -> dict[str, Any]:
    placeholders = [{"op": "placeholder", "name": name, "target": name} for name in inputs]
    returned = {"tuple": [{"ref": nodes[-1]["name"]} if loss is None else loss, {"dict": {}}]}
    output = {"op": "output", "name": "output", "target": "output", "args": [returned]}
    return {"format": 1, "nodes": [*placeholders, *nodes, output]}


ONE = {"ref": "logprobs"}
REFUSED = [
    ("a file", call("function", "n", "torch.load", "x"), "n is torch.*load"),
    ("a hub", call("function", "n", "torch.hub.load", "x", "y"), "n is .*load"),
    ("a module", call("function", "n", "torch.nn.Linear", 2, 3), "n is .*Linear"),
    ("another package", call("function", "n", "os.system", "true"), "n calls os.system"),
    ("no function", call("function", "n", "torch.no_such_function", ONE), "n calls torch.no_such_function"),
    ("a package as a function", call("function", "n", "torch", ONE), "n calls torch,"),
    ("builtins", call("function", "n", "builtins.eval", "1"), "n calls builtins.eval"),
    ("private", call("function", "n", "torch._C._get_tracing_state"), "n is "),
    ("an attribute", call("function", "n", "getattr", ONE, "__class__"), "n is attribute .*__class__"),
    ("random", call("function", "n", "torch.rand_like", ONE), "n is .*rand_like.*random"),
    ("dropout", call("function", "n", "torch.nn.functional.dropout", ONE), "n is .*dropout"),
    ("random method", call("method", "n", "bernoulli", ONE), "n is method bernoulli"),
    ("in place", call("method", "n", "mul_", ONE, 2), "n is method mul_ .*in place"),
    ("leaves torch", call("method", "n", "item", ONE), "n is method item .*leaves torch"),
    ("backward", call("method", "n", "backward", ONE), "n is method backward"),
    ("no method", call("method", "n", "no_such_method", ONE), "n is method no_such_method"),
    ("dunder", call("method", "n", "__reduce_ex__", ONE, 2), "n is method __reduce_ex__"),
    ("a tensor of its own", {"op": "get_attr", "name": "n", "target": "weight"}, "n is get_attr of weight"),
    ("a module of its own", call("module", "n", "layer", ONE), "n is call_module of layer"),
    ("an unknown constant", call("method", "n", "to", ONE, {"dtype": "load"}), "one of ref, tuple.*'dtype': 'load'"),
    ("an unknown kind", call("method", "n", "add", ONE, {"complex": 1}), "one of ref.*'complex': 1"),
    ("a later node", call("method", "n", "add", ONE, {"ref": "later"}), "one of ref.*'ref': 'later'"),
]


@pytest.mark.parametrize("node, message", [e[1:] for e in REFUSED], ids=[e[0] for e in REFUSED])
def test_operations_that_are_not_evaluated(node, message):
    logits, inputs = drawn()
    with pytest.raises(ValueError, match=f"(?s)custom.*{message}"):
        adapter.compute("custom", logits, inputs, custom=graph_as_data(node))


ERRORS: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("no graph", {"custom": None}, ValueError, "needs custom=.*loss_id"),
    (
        "a loss_id",
        {"loss_fn_config": {"loss_id": "x"}},
        ValueError,
        "loss_fn_config of 'custom' takes no keys, got loss_id",
    ),
    ("a graph of another loss", {"loss_fn": "ppo"}, ValueError, "custom is the graph of loss_fn 'custom', got.*'ppo'"),
    ("a function", {"custom": clipped}, TypeError, "custom must be a LossHandle.*got function"),
    ("another format", {"custom": {"format": 2, "nodes": []}}, ValueError, "format must be 1, got 2"),
    ("no inputs", {"custom": {"format": 1, "nodes": []}}, ValueError, "first input must be logprobs, got none"),
    (
        "other inputs",
        {"custom": graph_of(lambda old, logprobs: (old, {}))},
        ValueError,
        "first input must be logprobs, got.*old",
    ),
    ("a missing input", {"custom": graph_of(lambda logprobs, teacher: (logprobs, {}))}, ValueError, "needs teacher"),
    ("no targets", {"target_tokens": ...}, ValueError, "needs target_tokens"),
    ("a batch", {"logits": torch.zeros(2, T, V)}, ValueError, "of one Datum.*\\(2, 11, 37\\)"),
    (
        "a loss per token",
        {"custom": graph_of(lambda logprobs: (logprobs, {}))},
        ValueError,
        "must return .loss, metrics",
    ),
    ("no metrics", {"custom": graph_of(lambda logprobs: logprobs.sum())}, ValueError, "must return .loss, metrics"),
    (
        "a metric's name",
        {"custom": graph_of(lambda logprobs: (logprobs.sum(), {"kl": logprobs.sum()}))},
        ValueError,
        "'kl'",
    ),
    (
        "a metric's shape",
        {"custom": graph_of(lambda logprobs: (logprobs.sum(), {"custom/x:sum": logprobs}))},
        ValueError,
        "'custom/x:sum' must be a 0-d tensor, got shape \\(11,\\)",
    ),
    ("a list of inputs", {"loss_fn_inputs": [1]}, TypeError, "loss_fn_inputs must be a mapping"),
]


@pytest.mark.parametrize("wrong, error, message", [e[1:] for e in ERRORS], ids=[e[0] for e in ERRORS])
def test_error(wrong, error, message):
    logits, inputs = drawn()
    call = {"loss_fn": "custom", "logits": logits, "loss_fn_inputs": inputs, "custom": graph_of(linear)}
    call |= {key: value for key, value in wrong.items() if value is not ...}
    for key in [key for key, value in wrong.items() if value is ...]:
        del inputs[key]
    with pytest.raises(error, match=f"(?s){message}"):
        adapter.compute(**call)


def test_a_rank_other_than_declared():
    pytest.importorskip("tinker")
    from tinker.lib.public_interfaces.custom_loss import trace_loss

    handle = trace_loss(linear, {"logprobs": 1, "weights": 1}, "session")
    logits, inputs = drawn((T, 3))
    with pytest.raises(ValueError, match=r"rank 1, got shape \(11, 3\)"):
        adapter.compute("custom", logits, inputs, custom=handle)
    with pytest.raises(ValueError, match=r"weights in loss_fn_inputs must have rank 1, got shape \(\)"):
        adapter.compute("custom", logits, drawn()[1] | {"weights": torch.tensor(1.0)}, custom=handle)


@pytest.mark.parametrize("function", [adapter.loss_fn, lambda name: adapter.compute(name, torch.zeros(1, 2), {})])
def test_stable_reinforce_is_refused_with_the_reason(function):
    with pytest.raises(ValueError, match="'stable_reinforce' can't be computed here: Tinker has not published"):
        function("stable_reinforce")


def test_loss_fn_of_a_graph():
    with pytest.raises(ValueError, match=r"'custom'.*compute\(\"custom\", ..., custom=graph\)"):
        adapter.loss_fn("custom")


# ---- The names of the SDK, and the old ones ----


def test_every_loss_of_the_sdk_is_computed_or_refused_by_name():
    tinker = pytest.importorskip("tinker")
    from typing import get_args

    assert set(get_args(tinker.types.LossFnType)) == {*adapter._LOSSES, "custom", "stable_reinforce"}


def test_the_package_is_not_imported_and_the_old_names_are_the_same_objects():
    code = (
        "import sys, fused_losses\n"
        "from fused_losses.adapters.tinker import ComputeResult, compute, loss_fn\n"
        "assert 'tinker' not in sys.modules\n"
        "same = (ComputeResult, compute, loss_fn)\n"
        "assert same == (fused_losses.ComputeResult, fused_losses.compute, fused_losses.loss_fn)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
