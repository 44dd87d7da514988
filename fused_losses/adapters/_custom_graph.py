"""Tinker's ``custom`` losses: a graph of torch operations on the logprobs of one Datum, as plain data or as traced.

A graph that comes as data is rebuilt here as one of torch.fx, node by node, and an operation enters it by name only if
it is one of :func:`operations`: functions that torch dispatches tensors through, Python's operators, and ``math``.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.fx
from torch import Tensor
from torch.overrides import get_overridable_functions

_OPERATORS = (
    *("abs", "add", "and_", "eq", "floordiv", "ge", "getitem", "gt", "inv", "invert", "le", "lt", "matmul", "mod"),
    *("mul", "ne", "neg", "not_", "or_", "pos", "pow", "sub", "truediv", "xor"),
)
_ATTRIBUTES = frozenset({"H", "T", "device", "dtype", "itemsize", "layout", "mH", "mT", "ndim", "shape"})
_RANDOM = re.compile(
    r".*(dropout|bernoulli|rand).*|multinomial|normal|poisson|binomial|rrelu|gumbel_softmax|fractional_max_pool.*"
    r"|multi_head_attention_forward|scaled_dot_product_attention"
)
_LEAVES_TORCH = re.compile(r"item|numpy|tolist|backward|retain_grad|data_ptr|register_.*|.*storage.*")
_METRIC = re.compile(r"custom/[a-z0-9_./-]{1,64}:(sum|mean)")
_FIRST = "logprobs"
_ENCODED = "ref, tuple, dict, slice, ellipsis, float, dtype, device, layout, memory_format"


class CustomLoss(NamedTuple):
    """A graph that can be evaluated."""

    graph: torch.fx.Graph
    ranks: Mapping[str, int | None]  # by the name of an input, logprobs first; None where it is not declared

    @property
    def inputs(self) -> tuple[str, ...]:
        """The keys of ``loss_fn_inputs`` that it reads, in order."""
        return tuple(self.ranks)[1:]

    def __call__(self, logprobs: Tensor, *inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, 0-d, and its metrics, detached.

        Raises:
            ValueError: what it returns is not a 0-d loss and 0-d metrics.
        """
        returned = torch.fx.Interpreter(torch.nn.Module(), graph=self.graph).run(logprobs, *inputs)
        loss, metrics = returned if isinstance(returned, (tuple, list)) and len(returned) == 2 else (returned, None)
        if not isinstance(loss, Tensor) or loss.dim() != 0 or not isinstance(metrics, Mapping):
            raise ValueError(f"custom must return (loss, metrics), a 0-d tensor and a dict; got {_kind(returned)}")
        for key, value in metrics.items():
            if not _METRIC.fullmatch(str(key)):
                raise ValueError(f"custom: metric {key!r} must be named custom/<name>:sum or custom/<name>:mean")
            if not isinstance(value, Tensor) or value.dim() != 0:
                raise ValueError(f"custom: metric {key!r} must be a 0-d tensor, got {_kind(value)}")
        return loss, {key: value.detach() for key, value in metrics.items()}


def custom_loss(custom: Any) -> CustomLoss:
    """Of a ``LossHandle``, a ``CustomLossGraph``, its JSON as a mapping, or what torch.fx traced.

    Raises:
        TypeError: it is none of these.
        ValueError: the graph is not one of format 1, or has an operation that is not evaluated here, named by the
            message.
    """
    ranks: dict[str, int | None] = {}
    if hasattr(custom, "inputs") and hasattr(custom, "graph"):  # a LossHandle
        ranks = {each.name: each.rank for each in custom.inputs}
    traced = getattr(custom, "graph", custom)
    traced = getattr(traced, "graph", traced)  # of a GraphModule
    graph = traced if isinstance(traced, torch.fx.Graph) else _rebuilt(custom)
    _check(graph)
    names = [str(node.target) for node in graph.nodes if node.op == "placeholder"]
    if names[:1] != [_FIRST]:
        raise ValueError(f"custom: the graph's first input must be {_FIRST}, got {names or 'none'}")
    return CustomLoss(graph, {name: ranks.get(name) for name in names})


# ---- Which operations ----


@lru_cache(maxsize=1)
def operations() -> tuple[frozenset[Any], frozenset[str]]:
    """Functions, and names of methods of a tensor, that a graph may call. None that draws random numbers, which the
    server would draw otherwise; none that writes in place, as an input may be the caller's own tensor; none that leaves
    torch."""
    overridable = get_overridable_functions()

    def taken(name: str) -> bool:
        private_or_in_place = name.startswith("_") or name.endswith("_")
        return not (private_or_in_place or _RANDOM.fullmatch(name) or _LEAVES_TORCH.fullmatch(name))

    named = [f for of, found in overridable.items() if of is not Tensor for f in found if hasattr(f, "__name__")]
    functions = {f for f in named if taken(f.__name__)}
    functions |= {getattr(operator, name) for name in _OPERATORS}
    functions |= {f for name, f in vars(math).items() if callable(f) and not name.startswith("_")}
    methods = {f.__name__ for f in overridable[Tensor] if hasattr(f, "__name__") and taken(f.__name__)}
    return frozenset(functions), frozenset(methods)


def _check(graph: torch.fx.Graph) -> None:
    functions, methods = operations()
    for node in graph.nodes:
        if node.op == "call_function":
            if node.target is getattr:
                if not (len(node.args) == 2 and node.args[1] in _ATTRIBUTES):
                    raise _refused(node, f"attribute {node.args[1:]} of a tensor")
            elif node.target not in functions:
                raise _refused(node, _name_of(node.target))
        elif node.op == "call_method":
            if node.target not in methods:
                raise _refused(node, f"method {node.target} of a tensor")
        elif node.op not in ("placeholder", "output"):
            raise _refused(node, f"{node.op} of {node.target}")


def _refused(node: torch.fx.Node, what: str) -> ValueError:
    return ValueError(
        f"custom: node {node.name} is {what}, which is not evaluated here. Functions and methods of tensors are, "
        "Python's operators and math; but not what draws random numbers, writes in place or leaves torch"
    )


def _name_of(function: Any) -> str:
    return f"{getattr(function, '__module__', None) or 'torch'}.{getattr(function, '__name__', function)}"


# ---- A graph that is data ----


def _rebuilt(custom: Any) -> torch.fx.Graph:
    format_, nodes = _field(custom, "format"), _field(custom, "nodes")
    if nodes is None:
        raise TypeError(
            "custom must be a LossHandle, a CustomLossGraph or its JSON, or a torch.fx.GraphModule, "
            f"got {_kind(custom)}"
        )
    if format_ not in (None, 1):
        raise ValueError(f"custom: a graph's format must be 1, got {format_!r}")
    graph = torch.fx.Graph()
    known: dict[str, torch.fx.Node] = {}
    for node in nodes:
        op, name, target = (_field(node, key) for key in ("op", "name", "target"))
        args = [_decoded(arg, known) for arg in _field(node, "args") or []]
        kwargs = {key: _decoded(arg, known) for key, arg in (_field(node, "kwargs") or {}).items()}
        if op == "output":
            graph.output(args[0])
            continue
        if op == "call_function":
            target = _function(name, target)
        known[name] = graph.create_node(op, target, tuple(args), kwargs, name)
    return graph


def _field(record: Any, key: str) -> Any:
    return record.get(key) if isinstance(record, Mapping) else getattr(record, key, None)


def _function(name: str, target: str) -> Callable[..., Any]:
    """By its qualified name. What it is allowed to be is checked of the whole graph."""
    if target in ("getattr", "builtins.getattr"):
        return getattr
    root, *path = str(target).split(".")
    found: Any = {"torch": torch, "operator": operator, "_operator": operator, "math": math}.get(root)
    for part in path:
        found = getattr(found, part, None)
    if not path or not callable(found):
        raise ValueError(f"custom: node {name} calls {target}, which torch {torch.__version__} does not have")
    return found  # type: ignore[no-any-return]


def _decoded(arg: Any, known: Mapping[str, torch.fx.Node]) -> Any:
    if isinstance(arg, list):
        return [_decoded(each, known) for each in arg]
    if not isinstance(arg, Mapping):
        return arg
    kind: str
    value: Any
    kind, value = next(iter(arg.items())) if len(arg) == 1 else ("", None)
    if kind == "ref" and value in known:
        return known[value]
    if kind == "tuple":
        return tuple(_decoded(each, known) for each in value)
    if kind == "dict":
        return {key: _decoded(each, known) for key, each in value.items()}
    if kind == "slice":
        return slice(*(_decoded(each, known) for each in value))
    if kind == "ellipsis":
        return ...
    if kind == "float":
        return float(value)
    if kind == "device":
        return torch.device(value)
    if kind in ("dtype", "layout", "memory_format"):
        constant = getattr(torch, str(value), None)
        if isinstance(constant, (torch.dtype, torch.layout, torch.memory_format)):
            return constant
    raise ValueError(f"custom: an argument must be a number, text, a list or one of {_ENCODED}, got {dict(arg)}")


def _kind(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
