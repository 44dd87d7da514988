"""transformers: the loss of causal language models, and their head, which then makes no logits in training.

    model.loss_function = causal_lm_loss              # of the model's own logits, or
    Trainer(..., compute_loss_func=compute_loss_func)
    install(model)                                    # and remove(model): the head too, logits are never made

Made for transformers 5.24.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks, losses
from ..linear_head import LinearHead
from ._names import called

# options of torch's cross entropy, which transformers' ForCausalLMLoss takes among its **kwargs and does not look at
_OPTIONS = ("weight", "label_smoothing", "reduction", "size_average", "reduce")
_OF_LABELS = {"target_tokens": "shifted labels", "denominator": "num_items_in_batch"}
_OF_SHIFTED = {"target_tokens": "shift_labels", "denominator": "num_items_in_batch"}
_CPU_BYTES = 1 << 28  # a CPU's products are as fast in few rows, and its caches are small


# ---- The loss ----


def causal_lm_loss(
    logits: Tensor | PendingLogits,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | float | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    *,
    upstream: Tensor | float = 1.0,
    **kwargs: Any,
) -> Tensor:
    """transformers' ``ForCausalLMLoss``, for ``model.loss_function = causal_lm_loss``.

    Token t predicts ``labels`` at t + 1: cross entropy, summed over the tokens that have a label, over
    ``num_items_in_batch`` or, without it, over their number. The logits stay as they are, since the model's outputs
    have them.

    Args:
        logits: (..., T, V) float32, bfloat16 or float16; or what :func:`install` has in their place.
        labels: (..., T) integers in [0, V) or ``ignore_index``, not shifted; not looked at where ``shift_labels`` are.
        vocab_size: V.
        num_items_in_batch: number or tensor of one number, such as Trainer counts over a batch's micro-batches.
        shift_labels: the label of each token at its own place, as many as there are tokens.
        upstream: what the loss is going to be multiplied by before ``backward``, which costs nothing then. Trainer
            multiplies by its number of processes: ``functools.partial(causal_lm_loss, upstream=processes)``. It
            changes no number.
        kwargs: what else transformers hands to a loss, which has no use for it.

    Returns:
        The loss, 0-d float32. No label at all: 0, where transformers has NaN.

    Raises:
        TypeError: an option of torch's cross entropy, which transformers takes and ignores; an argument's type.
        ValueError: shapes that do not fit.
    """
    if refused := [name for name in _OPTIONS if kwargs.get(name) is not None]:
        raise TypeError(f"{refused[0]} is not taken by causal_lm_loss: transformers' ForCausalLMLoss would ignore it")
    if logits.shape[-1] != vocab_size:
        raise ValueError(f"vocab_size must be that of logits, {logits.shape[-1]}, got {vocab_size}")
    names = _OF_LABELS if shift_labels is None else _OF_SHIFTED
    if shift_labels is None:
        if labels is None:
            raise TypeError("labels must be a tensor where shift_labels are not given, got None")
        shift_labels = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    tokens = logits.shape[:-1]
    if shift_labels.numel() != tokens.numel():
        raise ValueError(f"labels must be as many as tokens, {tuple(tokens)}, got {tuple(shift_labels.shape)}")
    given: Tensor | LinearHead
    if isinstance(logits, PendingLogits):
        given, logit_scale, softcap = logits.head, logits.logit_scale, logits.softcap
    else:
        given, logit_scale, softcap = logits, 1.0, None
    with called(names):
        return losses.cross_entropy(
            given,
            shift_labels.reshape(tokens).to(logits.device),
            denominator=_denominator(num_items_in_batch, logits.device),
            logit_scale=logit_scale,
            softcap=softcap,
            ignore_index=ignore_index,
            upstream=upstream,
        )


def compute_loss_func(
    outputs: Any,
    labels: Tensor | None,
    num_items_in_batch: Tensor | float | None = None,
    *,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    upstream: Tensor | float = 1.0,
) -> Tensor:
    """:func:`causal_lm_loss` of a model's outputs, for ``Trainer(compute_loss_func=compute_loss_func)``.

    Trainer then calls the model without labels, so it makes logits whatever is installed.

    Args:
        outputs: of a causal language model, as a mapping with "logits" or as a tuple whose first they are.
        labels: (..., T), not shifted.
        ignore_index, shift_labels, upstream: as of :func:`causal_lm_loss`.

    Raises:
        ValueError: the outputs have the loss of a router, which would be left out: let the model have the labels, with
            ``model.loss_function = causal_lm_loss``.
    """
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else outputs[0]
    if not isinstance(logits, Tensor):
        raise ValueError("outputs must have logits; a model with the head installed makes none where it has labels")
    if isinstance(outputs, Mapping) and outputs.get("aux_loss") is not None:
        raise ValueError(
            "outputs.aux_loss, a router's loss, is not part of compute_loss_func: set model.loss_function instead"
        )
    return causal_lm_loss(
        logits,
        labels,
        logits.shape[-1],
        num_items_in_batch,
        ignore_index,
        shift_labels,
        upstream=upstream,
    )


def _denominator(count: Tensor | float | None, device: torch.device) -> Tensor | float | None:
    if not isinstance(count, Tensor):
        return count
    if count.numel() != 1:
        raise ValueError(f"num_items_in_batch must be one number, got a tensor of shape {tuple(count.shape)}")
    return count.reshape(()).to(device)


# ---- The head ----


def install(
    model: torch.nn.Module,
    *,
    evaluation: bool = False,
    upstream: Tensor | float = 1.0,
    chunk_bytes: int | None = None,
    weight_grad_dtype: torch.dtype = torch.float32,
    logits_dtype: torch.dtype | None = None,
    skip_masked: bool = False,
) -> None:
    """Let ``model`` compute its loss from its head, a chunk of tokens at a time; :func:`remove` undoes it.

    In training mode, called with labels, ``model(...)`` is its own forward but for the logits, which do not come to
    be: ``outputs.logits`` is None. In any other call nothing changes. Scales and caps of logits (``logits_scaling``,
    ``logit_scale``, ``final_logit_softcapping``) are done in float32, on chip. A second call changes the options.

    Args:
        model: a causal language model of transformers, not wrapped. What its forward does with logits is read from
            its source: they come from its output embeddings and go to ``self.loss_function`` and into the output,
            multiplied or divided by a number or under a tanh on the way, and nothing else happens to them.
        evaluation: also in evaluation mode, called with labels: for who only wants the loss of it, as a Trainer with
            ``prediction_loss_only=True``.
        upstream: see :func:`causal_lm_loss`.
        chunk_bytes: memory of a chunk of logits. None: 256 MiB on a CPU, elsewhere as of :class:`LinearHead`.
        weight_grad_dtype, logits_dtype, skip_masked: see :class:`LinearHead`.

    Raises:
        TypeError: the output embeddings are not a plain :class:`torch.nn.Linear` (LoRA, quantised), or are sharded.
        ValueError: they have hooks; the model has a forward or a loss function that is not its class's; or its forward
            does something else with logits. Messages name the class.
        RuntimeError: transformers' own loss has been replaced by somebody else's.
    """
    name = type(model).__name__
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a model of transformers, got {name}")
    if not callable(getattr(model, "get_output_embeddings", None)) or hasattr(model, "get_base_model"):
        unwrapped = "model.get_base_model()" if hasattr(model, "get_base_model") else "the model of transformers in it"
        raise TypeError(f"model must be a causal language model of transformers, got {name}: give {unwrapped}")
    own = type(model).forward
    there = _function(vars(model).get("forward", own))
    # accelerate leaves the innermost function of the class where it has taken its wrapping off
    if there not in _FORWARDS and there not in (own, inspect.unwrap(own)):
        raise ValueError(f"{name}: the forward of this model is somebody else's: install before it is wrapped")
    if not isinstance(evaluation, bool):
        raise TypeError(f"evaluation must be True or False, got {type(evaluation).__name__}")
    if not isinstance(upstream, Tensor):
        checks.number("upstream", upstream, " or a tensor")
    options = {
        "chunk_bytes": chunk_bytes,
        "weight_grad_dtype": weight_grad_dtype,
        "logits_dtype": logits_dtype,
        "skip_masked": skip_masked,
    }
    fused = Fused(_head_of(model), evaluation, upstream, options, _stock_loss())
    _check_use_of_logits(own, fused.head, name)
    fused.check(model)
    function = fused.around(own)
    _FORWARDS.add(function)
    model.forward = MethodType(function, model)


def remove(model: torch.nn.Module) -> None:
    """Give ``model`` its own forward back. Without an installation it changes nothing.

    Raises:
        RuntimeError: somebody has wrapped the forward since, as accelerate does for mixed precision;
            ``accelerator.unwrap_model(model, keep_fp32_wrapper=False)`` then takes off both.
    """
    layers = list(_layers(vars(model).get("forward")))
    if any(layer in _FORWARDS for layer in layers[:1]):
        del model.forward
    elif any(layer in _FORWARDS for layer in layers):
        raise RuntimeError(
            f"{type(model).__name__}.forward was wrapped after fused_losses had been installed there; of accelerate, "
            "accelerator.unwrap_model(model, keep_fp32_wrapper=False) takes off both"
        )


_FORWARDS: weakref.WeakSet[Any] = weakref.WeakSet()  # the functions that install() has made


def _function(forward: Any) -> Any:
    return getattr(forward, "__func__", forward)


def _layers(forward: Any) -> Iterator[Any]:
    """The function, and what it has been wrapped around by functools.wraps."""
    while forward is not None:
        yield _function(forward)
        forward = getattr(forward, "__wrapped__", None)


def _is_one(upstream: Tensor | float) -> bool:
    return not isinstance(upstream, Tensor) and upstream == 1.0


class Fused(NamedTuple):
    """What is installed in a model."""

    head: str  # the name of its head
    evaluation: bool
    upstream: Tensor | float
    options: Mapping[str, Any]  # of LinearHead
    stock: Any  # transformers' loss

    def check(self, model: Any) -> None:
        """Raise where the head or the loss function is one that can't be fused."""
        name = f"{type(model).__name__}.{self.head}"
        module = getattr(model, self.head)
        weight = getattr(module, "weight", None)
        if hasattr(weight, "ds_id"):
            raise TypeError(f"{name} can't be fused: it is sharded by DeepSpeed's ZeRO-3")
        try:
            beside = weight if isinstance(weight, Tensor) else torch.empty(0, 0)
            LinearHead.of(beside.new_zeros(1, beside.shape[-1]), module, **self.options).checked()
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name} can't be fused: {error}") from error
        self.loss_function(model)

    def loss_function(self, model: Any) -> Callable[..., Tensor]:
        """What takes the place of the model's, which must be transformers' or :func:`causal_lm_loss`."""
        own = model.loss_function
        bound = own if isinstance(own, functools.partial) else functools.partial(own)
        function, upstream = bound.func, bound.keywords.get("upstream", self.upstream)
        if upstream is not self.upstream and not _is_one(self.upstream):
            raise ValueError(
                f"{type(model).__name__}.loss_function has an upstream of its own, {upstream}: give it there or to "
                f"install, got {self.upstream} here"
            )
        if function is not causal_lm_loss and function is not self.stock:
            raise ValueError(
                f"{type(model).__name__}.loss_function must be transformers' ForCausalLMLoss or causal_lm_loss, which "
                f"are computed from the head, got {function!r}"
            )
        return functools.partial(causal_lm_loss, *bound.args, **{**bound.keywords, "upstream": upstream})

    def around(self, own: Callable[..., Any]) -> Callable[..., Any]:
        """The forward of a class, during which the model's head and loss function are ours."""
        place = list(inspect.signature(own).parameters).index("labels")

        @functools.wraps(own)  # Trainer looks at its signature
        def forward(model: Any, *args: Any, **kwargs: Any) -> Any:
            labels = args[place - 1] if len(args) >= place else kwargs.get("labels")
            if labels is None or not (model.training or self.evaluation):
                return own(model, *args, **kwargs)
            with _alone(model):
                head = PendingHead(getattr(model, self.head), type(model).__name__, self.options)
                with _instead(model, {self.head: head, "_loss_function": self.loss_function(model)}):
                    return _without_logits(own(model, *args, **kwargs))

        return forward


class PendingHead:
    """A head whose call gives :class:`PendingLogits`; all else is as in the module, and so is its call in another
    thread than the one that it was made in."""

    def __init__(self, module: torch.nn.Module, model: str, options: Mapping[str, Any]):
        self.module, self.model, self.options = module, model, options
        self.thread = _thread()

    def __call__(self, hidden: Tensor) -> PendingLogits | Tensor:
        if self.thread != _thread():
            return self.module(hidden)  # type: ignore[no-any-return]
        options = dict(self.options)
        if options["chunk_bytes"] is None and hidden.is_cpu:
            options["chunk_bytes"] = _CPU_BYTES
        return PendingLogits(LinearHead.of(hidden, self.module, **options), self.model)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


class PendingLogits:
    """``scale * l``, or ``softcap * tanh(scale * l)``, of the logits l that a head would make."""

    def __init__(self, head: LinearHead, model: str, scale: float = 1.0, softcap: float | None = None):
        self.head, self.model, self.scale, self.softcap = head, model, scale, softcap

    @property
    def shape(self) -> torch.Size:
        return self.head.shape

    @property
    def device(self) -> torch.device:
        return self.head.device

    @property
    def logit_scale(self) -> float:
        """As the losses take it: softcap tanh(logit_scale l / softcap)."""
        return self.scale if self.softcap is None else self.scale * self.softcap

    def __mul__(self, factor: float) -> PendingLogits:
        if not isinstance(factor, int | float):
            raise TypeError(f"{self.model}: logits are multiplied by a {type(factor).__name__}, of which no loss knows")
        if self.softcap is None:
            return PendingLogits(self.head, self.model, self.scale * factor)
        return PendingLogits(self.head, self.model, self.scale, self.softcap * factor)

    def __truediv__(self, divisor: float) -> PendingLogits:
        if not isinstance(divisor, int | float):
            raise TypeError(f"{self.model}: logits are divided by a {type(divisor).__name__}, of which no loss knows")
        return self * (1 / divisor)

    def tanh(self) -> PendingLogits:
        if self.softcap is not None:
            raise TypeError(f"{self.model}: logits are under two tanh, of which no loss knows")
        return PendingLogits(self.head, self.model, self.scale, 1.0)

    def float(self) -> PendingLogits:
        """The losses compute in float32 anyway."""
        return self

    def contiguous(self) -> PendingLogits:
        return self

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> PendingLogits:
        if function is torch.tanh and len(args) == 1 and not kwargs:
            return args[0].tanh()  # type: ignore[no-any-return]
        raise TypeError(f"{getattr(function, '__name__', function)} of logits that are not made: remove(model) first")

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{self.model}: {name} of logits, which fused_losses does not make: remove(model) first")


_LOCKS: weakref.WeakKeyDictionary[torch.nn.Module, threading.RLock] = weakref.WeakKeyDictionary()


def _alone(model: torch.nn.Module) -> AbstractContextManager[Any]:
    """While no other thread exchanges the model's attributes. In a graph none are exchanged, and it has no locks."""
    return nullcontext() if torch.compiler.is_dynamo_compiling() else _LOCKS.setdefault(model, threading.RLock())


def _thread() -> int:
    return 0 if torch.compiler.is_dynamo_compiling() else threading.get_ident()


@contextmanager
def _instead(model: torch.nn.Module, attributes: Mapping[str, Any]) -> Iterator[None]:
    """In the instance's dictionary, which is looked at before its modules and its class, and where state_dict and
    parameters are not."""
    before = {name: vars(model)[name] for name in attributes if name in vars(model)}
    vars(model).update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            del vars(model)[name]
        vars(model).update(before)


def _without_logits(output: Any) -> Any:
    if isinstance(output, tuple):
        return tuple(value for value in output if not isinstance(value, PendingLogits))
    return type(output)(**{name: value for name, value in output.items() if not isinstance(value, PendingLogits)})


def _stock_loss() -> Any:
    """The loss that :func:`causal_lm_loss` is the same as; RuntimeError where somebody has put another there."""
    from transformers.loss import loss_utils

    function = loss_utils.ForCausalLMLoss
    if (function.__module__, function.__qualname__) != (loss_utils.__name__, "ForCausalLMLoss"):
        raise RuntimeError(f"{loss_utils.__name__}.ForCausalLMLoss was replaced, by {function.__module__}'s")
    return function


def _head_of(model: Any) -> str:
    """The name of the output embeddings in the model."""
    embeddings = model.get_output_embeddings()
    names: list[str] = [name for name, module in model.named_children() if module is embeddings]
    if not names:
        raise ValueError(f"{type(model).__name__} has no output embeddings of its own, which a head could be")
    return names[0]


# ---- What a forward does with its logits ----


def _check_use_of_logits(forward: Callable[..., Any], head: str, name: str) -> None:
    """Raise ValueError unless all that happens to the logits is what :class:`PendingLogits` has."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(forward))))
    except (OSError, TypeError) as error:
        raise ValueError(f"{name}: the source of its forward is not there to be read") from error
    uses = _Uses(head)
    uses.visit(tree)
    if uses.unknown is not None:
        raise ValueError(f"{name}: its forward does with logits what a fused head can't: {ast.unparse(uses.unknown)}")
    if not uses.made:
        raise ValueError(f"{name}: its forward does not call self.{head}, so its logits come from elsewhere")
    if not uses.lost:
        raise ValueError(f"{name}: its forward computes no loss by self.loss_function")


class _Uses(ast.NodeVisitor):
    """Follows the logits of ``self.<head>(...)`` through a function, in the order of its lines."""

    def __init__(self, head: str):
        self.head = head
        self.names: set[str] = set()  # that logits have been given
        self.made = self.lost = False
        self.unknown: ast.AST | None = None

    def visit(self, node: ast.AST) -> None:
        if self.unknown is None:
            super().visit(node)

    def is_head(self, node: ast.AST) -> bool:
        return isinstance(node, ast.Call) and ast.unparse(node.func) == f"self.{self.head}"

    def is_logits(self, node: ast.AST) -> bool:
        match node:
            case ast.Call() if self.is_head(node):
                return True
            case ast.Name(id=name):
                return name in self.names
            case ast.Call(func=ast.Attribute(value=value, attr="float" | "contiguous" | "tanh"), args=[], keywords=[]):
                return self.is_logits(value)
            case ast.Call(func=function, args=[value], keywords=[]) if _is_tanh(function):
                return self.is_logits(value)
            case ast.BinOp(left=value, op=ast.Mult() | ast.Div(), right=right):
                return self.is_logits(value) and not self.is_logits(right)
        return False

    def visit_Assign(self, node: ast.Assign) -> None:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if self.is_logits(value):
                self.made |= any(self.is_head(part) for part in ast.walk(value))
                self.names.add(name)
            case _:
                self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        match node.func:
            case ast.Attribute(value=ast.Name(id="self"), attr="loss_function"):
                self.lost |= any(self.is_logits(value) for value in (*node.args, *(k.value for k in node.keywords)))
                known = True
            case ast.Name():  # of an output
                known = all(not self.is_logits(value) for value in node.args)
            case _:
                known = False
        for child in (*node.args, *node.keywords, node.func):
            value = child.value if isinstance(child, ast.keyword) else child
            if self.is_logits(value):
                if not known:
                    self.unknown = node
            else:
                self.visit(value)

    def visit_Tuple(self, node: ast.Tuple) -> None:
        for value in node.elts:
            if not self.is_logits(value):
                self.visit(value)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if not (self.is_logits(node.value) and node.attr in ("device", "shape")):
            self.generic_visit(node)

    def generic_visit(self, node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if self.is_logits(child):
                self.unknown = node
                return
            self.visit(child)


def _is_tanh(function: ast.AST) -> bool:
    return ast.unparse(function) in ("torch.tanh", "nn.functional.tanh", "F.tanh", "torch.nn.functional.tanh")
