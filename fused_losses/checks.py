"""Arguments checked and brought to the form kernels take, before any launch and without reading device memory."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .backends import NAMES
from .backends.eager import active_rows
from .backends.rows import overlap, rows
from .keywords import FINITE, LEAST, MASKS, MOST
from .origin import Origin
from .problem import BackendName, Column, How, Problem, Sequences, StatisticName

LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_COLUMN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MASK_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_TENSORS = (Tensor, torch.nn.Parameter)
_PLAIN = {*_TENSORS, float, type(None)}
_STRIDED = torch.strided
_INT32, _INT64 = torch.iinfo(torch.int32), torch.iinfo(torch.int64)
_in_dynamo = torch.compiler.is_dynamo_compiling
_LARGEST = torch.finfo(torch.float32).max
_SMALLEST = torch.finfo(torch.float32).smallest_normal  # below, GPUs may take a number for 0


def plain(name: str, tensor: Tensor, logits: Tensor | Origin | None = None) -> Tensor:
    """The tensor with its data where its pointer says, and its sign as its memory says.

    The kernels read memory: what negates when it is read (``.conj().imag``), holds nothing (``_efficientzerotensor``)
    or is laid out otherwise (sparse, mkldnn) is brought into plain form or refused by name. A subclass that wraps other
    tensors is for the dispatcher: see :func:`watched`. Beside plain logits it is unwrapped where a copy of it is plain
    (a collective that is waited for), else refused.

    logits: for an argument beside them.
    """
    if _in_dynamo():  # all goes through the dispatcher; below asks what can't be traced
        return tensor
    # a nested tensor may be of that layout, too
    ordinary = type(tensor) in _TENSORS and tensor.layout is _STRIDED and not tensor.is_nested
    if ordinary and not tensor.is_neg() and not tensor._is_zerotensor():
        return tensor
    return _resolved(name, tensor, logits)


def _resolved(name: str, tensor: Tensor, logits: Tensor | Origin | None) -> Tensor:
    if torch._C._len_torch_dispatch_stack() > 0:  # somebody traces: FakeTensorMode, make_fx, export
        return tensor
    strided(name, tensor)
    if _wraps(tensor):
        return _unwrapped(name, tensor, logits)
    if tensor._is_zerotensor():
        return tensor.clone()
    return tensor.resolve_neg()


def strided(name: str, tensor: Tensor) -> None:
    """Raise TypeError for a sparse, mkldnn or nested tensor, of which torch has few operations."""
    if tensor.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got a nested one: pass its values, or pad it")
    if tensor.layout is not _STRIDED:
        raise TypeError(f"{name} must be a dense tensor, got one of layout {tensor.layout}")


def _wraps(tensor: Tensor) -> bool:
    """Whether the tensor is one of a class whose operators are written in Python, over other tensors."""
    return type(tensor) not in _TENSORS and torch._C._dispatch_keys(tensor).has(torch._C.DispatchKey.Python)


def _is_dtensor(tensor: Tensor) -> bool:
    if type(tensor) in _TENSORS:
        return False
    distributed = sys.modules.get("torch.distributed.tensor")  # without which there is none
    return distributed is not None and isinstance(tensor, distributed.DTensor)


def _unwrapped(name: str, tensor: Tensor, logits: Tensor | Origin | None) -> Tensor:
    if _is_dtensor(tensor):
        raise TypeError(
            f"{name} must be a plain tensor, got a DTensor: pass the part that is here, {name}.to_local(), "
            f"or the whole, {name}.full_tensor()"
        )
    if logits is None or type(tensor) is type(logits):
        return tensor
    copy = tensor.clone()
    if _wraps(copy):
        raise TypeError(f"{name} must be a {type(logits).__name__} as logits are, got {type(tensor).__name__}")
    return copy


def watched(*tensors: Column | None) -> bool:
    """Whether a call on these tensors has to go through the dispatcher: somebody traces, or one of them is a subclass.

    Past the dispatcher a tensor's pointer is read, so that of a subclass that has no data must not get there.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    return not _PLAIN.issuperset(map(type, tensors))


def no_transform(name: str, tensor: Tensor) -> None:
    """Raise inside vmap, jvp and their like, where autograd would ask for rules that the losses don't have."""
    if _in_dynamo():
        return
    transform = torch._C._functorch.peek_interpreter_stack()
    functionalize = torch._C._functorch.TransformType.Functionalize
    # functionalize is part of tracing, where it is one with a dispatch mode; alone it would hand over wrappers
    if transform is not None and (transform.key() != functionalize or torch._C._len_torch_dispatch_stack() == 0):
        raise NotImplementedError(
            f"the fused losses have no rule for torch.func.{transform.key().name.lower()}: call them outside of "
            "torch.func transforms, with .backward() or torch.autograd.grad (fused_losses.reference can be transformed)"
        )
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
        raise NotImplementedError(
            f"{name} carry a forward-mode tangent, which the fused losses would drop: use reverse mode "
            "(fused_losses.reference has forward mode)"
        )


def several_targets(logits: Tensor | Origin, target_tokens: Tensor) -> bool:
    """Whether the targets are (..., K): as many dimensions as the logits."""
    first = logits.inputs[0] if isinstance(logits, Origin) else logits  # has a row per token, whatever it is
    given = isinstance(first, Tensor) and isinstance(target_tokens, Tensor)
    return given and 0 < target_tokens.dim() == first.dim()


def dense(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], beside: Tensor | None = None) -> Tensor:
    """What logits are read from, or made of, in plain form. beside: another such tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    no_transform(name, tensor)
    tensor = plain(name, tensor, beside)
    if tensor.is_nested:  # somebody traces, and nobody has looked
        strided(name, tensor)
    if tensor.dtype not in dtypes:
        raise TypeError(
            f"{name} must be float32, bfloat16 or float16, got {tensor.dtype} (fused_losses.reference takes any float)"
        )
    return tensor


def parameter(name: str, tensor: Tensor) -> Tensor:
    """What a head is made of. A subclass may hold numbers that its dtype does not tell of (quantised), or a part of
    them (sharded), and reads as if it did not."""
    if not isinstance(tensor, Tensor):
        hint = f"; pass its {name}, or LinearHead.of" if isinstance(tensor, torch.nn.Module) else ""
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}{hint}")
    if _is_dtensor(tensor):
        distributed: Any = tensor
        if all(placement.is_replicate() for placement in distributed.placements):
            return parameter(name, distributed.to_local())
        raise TypeError(
            f"{name} must be whole, got a DTensor with placements {distributed.placements}: of FSDP, call inside the "
            "forward of the module that gathers it; of tensor parallelism, pass to_local() and the group"
        )
    tensor = dense(name, tensor, LOGITS_DTYPES)
    if tensor.is_meta:
        raise TypeError(f"{name} must hold numbers, got a meta tensor")
    if _wraps(tensor) and not (torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0):
        raise TypeError(f"{name} must be a plain tensor, got a {type(tensor).__name__}, as of a quantised weight")
    return tensor


def logits_and_targets(
    logits: Tensor | Origin, target_tokens: Tensor, several: bool = False
) -> tuple[Tensor | Origin, Tensor]:
    """Check both: the logits in plain form, and the targets as (N,), or (N, K) for ``several``."""
    if isinstance(logits, Tensor) and _is_dtensor(logits):
        from .vocab_shard import of_dtensor  # which imports this

        logits = of_dtensor(logits)
    logits = logits.checked() if isinstance(logits, Origin) else dense("logits", logits, LOGITS_DTYPES)
    if len(logits.shape) == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must have shape (..., V) with V > 0, got {tuple(logits.shape)}")
    if not isinstance(target_tokens, Tensor):
        raise TypeError(f"target_tokens must be a tensor, got {type(target_tokens).__name__}")
    target_tokens = plain("target_tokens", target_tokens, logits)
    if target_tokens.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"target_tokens must be int64 or int32, got {target_tokens.dtype}")
    shape = target_tokens.shape[:-1] if several else target_tokens.shape
    if shape != logits.shape[:-1] or (several and target_tokens.shape[-1] == 0):
        raise ValueError(
            f"target_tokens must have the shape of logits without its last dimension, {tuple(logits.shape[:-1])}"
            f"{', and K > 0 targets per token after it' if several else ''}, got {tuple(target_tokens.shape)}"
        )
    _same_device("target_tokens", target_tokens, logits.device)
    if several:
        target_tokens = target_tokens.reshape(-1, target_tokens.shape[-1])
    elif target_tokens.dim() != 1:
        target_tokens = target_tokens.reshape(-1)
    return logits, target_tokens if target_tokens.is_contiguous() else target_tokens.contiguous()


def column(name: str, value: Tensor | float, logits: Tensor | Origin, beside: str = "logits") -> Column:
    """A per-token input as a float, or as a float32 tensor of shape (N,) whose stride may be 0.

    beside: what ``logits`` are called, which only lend their shape, without the last dimension, and device.
    """
    if not isinstance(value, Tensor):
        return number(name, value, " or a tensor")
    value = plain(name, value, logits)
    if value.dtype is not torch.float32 or value.requires_grad:
        if value.dtype not in (_COLUMN_DTYPES + _MASK_DTYPES if name in MASKS else _COLUMN_DTYPES):
            raise TypeError(f"{name} must be a float tensor, got {value.dtype}")
        value = value.detach().to(torch.float32)
    _same_device(name, value, logits.device, beside)
    shape = logits.shape[:-1]
    if value.shape != shape:
        try:
            value = value.expand(shape)
        except RuntimeError:
            raise ValueError(
                f"{name} must broadcast to the tokens' shape {tuple(shape)}, got {tuple(value.shape)}"
            ) from None
    return value if value.dim() == 1 else value.reshape(-1)


def columns(
    given: Mapping[str, Column | None], logits: Tensor | Origin, beside: str = "logits"
) -> Mapping[str, Column | None]:
    """Of a loss that is composed of torch operations, which bring them to its tokens by themselves."""
    brought = {
        name: column(name, value, logits, beside)  # type: ignore[arg-type]
        for name, value in given.items()
        if value is not None or name in _NEVER_NONE
    }
    clip(given.get("clip_low_threshold"), given.get("clip_high_threshold"))
    return brought


# None is the default of some columns; of these it is an error that names them.
_NEVER_NONE = ("old_logprobs", "advantages")


def clip(low: Column | None, high: Column | None) -> None:
    """As far as the host knows the bounds."""
    if isinstance(low, float | int) and isinstance(high, float | int) and low > high:
        raise ValueError(f"clip_low_threshold must not exceed clip_high_threshold, got {low} > {high}")


def denominator(value: Tensor | float | None, reduction: str, logits: Tensor | Origin) -> Column | None:
    """What the sum is divided by; None for a plain mean, whose normaliser a backend forms."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    if value is None:
        return None if reduction == "mean" else 1.0
    if reduction == "none":
        raise ValueError('denominator needs a reduction to divide: reduction is "none"')
    if not isinstance(value, Tensor):
        return number("denominator", value, " or a tensor")
    return _scalar("denominator", value, logits).to(torch.float32)


def upstream(value: Tensor | float, reduction: str, logits: Tensor | Origin) -> Column:
    """What a reduced loss's gradient will be multiplied by: a number, or 0-d float32."""
    if not isinstance(value, Tensor):
        number_ = number("upstream", value, " or a tensor")
        if reduction == "none" and number_ != 1.0:
            raise ValueError(f'upstream is of one reduced loss: reduction is "none", upstream {number_}')
        return number_
    if reduction == "none":
        raise ValueError('upstream is of one reduced loss: reduction is "none", upstream a tensor')
    value = _scalar("upstream", value, logits)
    return value.to(torch.float32, copy=True)  # a loss scale is changed where it is, before backward asks


def _scalar(name: str, value: Tensor, logits: Tensor | Origin) -> Tensor:
    """A 0-d tensor in plain form. An integer is one, as it is where a number is given: of tokens, or of processes."""
    value = plain(name, value, logits)
    if value.dim() != 0:
        raise ValueError(f"{name} must be a number or a 0-d tensor, got shape {tuple(value.shape)}")
    if value.is_complex():
        raise TypeError(f"{name} must be a number or a tensor of a real number, got {value.dtype}")
    _same_device(name, value, logits.device)
    return value.detach()


def of_sequence(ratio_level: str, sequences: Sequences) -> bool:
    """Whether the ratio is a sequence's; one that is a token's has no sequence to be made of."""
    one_of("ratio_level", ratio_level, ("token", "sequence"))
    one_of("ratio_gradient", sequences.ratio_gradient, ("token", "sequence"))
    if ratio_level == "sequence":
        return True
    if sequences.ratio_gradient != "token":
        raise ValueError(f'ratio_gradient="{sequences.ratio_gradient}" needs ratio_level="sequence", got "token"')
    for name in ("cu_seqlens", "sequence_ratio_mask"):
        if getattr(sequences, name) is not None:
            raise ValueError(f'{name} needs ratio_level="sequence", got "token"')
    return False


def bound(name: str, value: Column | None) -> None:
    """Of an objective, as far as the host knows it."""
    if isinstance(value, float | int) and value < 0:
        raise ValueError(f"{name} must be at least 0, got {value}")


def flags(how: How) -> None:
    flag("inplace", how.inplace)
    flag("recompute", how.recompute)
    flag("validate", how.validate)
    flag("return_outputs", how.return_outputs)


def flag(name: str, value: bool) -> bool:
    if value is True or value is False:
        return value
    if type(value).__name__ not in ("bool", "bool_"):  # NumPy's, of either version
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        listed = " or ".join(f'"{one}"' for one in known)
        raise ValueError(f"{name} must be {listed}, got {value!r}")


def outputs(names: Sequence[StatisticName]) -> Sequence[StatisticName]:
    """Those of ``statistics``: any of them, each once."""
    known = get_args(StatisticName)
    if not isinstance(names, tuple | list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"outputs must be a tuple or a list of some of {known}, got {names!r}")
    for at, name in enumerate(names):
        if name not in known:
            raise ValueError(f"outputs must be some of {known}, got {name!r}")
        if name in names[:at]:
            raise ValueError(f"outputs must name each once, got {name!r} twice")
    return names


def backend(name: BackendName) -> BackendName:
    if name != "auto" and name not in NAMES:
        raise ValueError(f"backend must be one of {('auto', *NAMES)}, got {name!r}")
    return name


def inplace(logits: Tensor | Origin, reduction: str, recompute: bool) -> None:
    if reduction == "none" or recompute:
        cause = 'reduction="none"' if reduction == "none" else "recompute=True"
        raise ValueError(f"inplace=True makes the gradient in forward, {cause} makes it in backward: choose one")
    overwritable(logits)


def overwritable(logits: Tensor | Origin) -> None:
    """Raise unless ``inplace=True`` can write a gradient over the logits."""
    if isinstance(logits, Origin):
        logits = logits.overwritten()
    if logits.is_leaf:
        raise ValueError(_OVERWRITES_LEAF)
    base = logits._base
    if base is not None and base.requires_grad:
        _refuse_leaf_base(logits)
    if rows(logits) is None or overlap(logits):
        raise ValueError(
            "inplace=True needs logits with a contiguous last dimension, at most two strides before it and no element "
            f"twice in memory; got shape {tuple(logits.shape)} with strides {logits.stride()}"
        )


_OVERWRITES_LEAF = "inplace=True would overwrite logits, a leaf that requires grad: pass the output of an operation"


# Dynamo asks is_leaf of a base by an operation in the graph, which fails where the graph is replayed on logits that are
# an input and so have no base. A call that it does not look into runs once on tensors that have one.
@torch.compiler.allow_in_graph
def _refuse_leaf_base(logits: Tensor) -> Tensor:
    base = logits._base
    if base is not None and base.is_leaf:
        raise ValueError(_OVERWRITES_LEAF)
    return logits.new_empty(0)  # what is called in a graph returns a tensor


def targets_in_range(target_tokens: Tensor, vocab: int, ignore_index: int) -> None:
    """Raise ValueError with the first target outside [0, V) that is not ``ignore_index``. Synchronises."""
    if target_tokens.numel() == 0:
        return
    low, high = torch.aminmax(target_tokens)
    if low.item() >= 0 and high.item() < vocab:
        return
    bad = ((target_tokens < 0) | (target_tokens >= vocab)) & (target_tokens != ignore_index)
    if bad.any():
        at, k = int(bad.int().argmax()), target_tokens.numel() // target_tokens.shape[0]
        got = int(target_tokens.view(-1)[at])
        raise ValueError(
            f"target_tokens must be in [0, {vocab}) or ignore_index {ignore_index}, got {got} "
            f"at token {at // k} of {target_tokens.shape[0]}"
        )


def values(problem: Problem, validate: bool, *, look_at_targets: bool) -> None:
    """What a problem's tensors must not hold."""
    if look_at_targets:
        targets_in_range(problem.targets.tokens, problem.vocab, problem.targets.ignore_index)
    if validate:
        inputs = zip(problem.objective.columns, problem.inputs, strict=True)
        values_in_range({"temperature": problem.transform.temperature, **dict(inputs)}, active_rows(problem))


def values_in_range(columns: Mapping[str, Column | None], active: Tensor | None = None) -> None:
    """The bounds that only the device knows, by name, for ``validate=True``. Synchronises.

    active: (N,), the tokens of which they matter.
    """
    for key, value in columns.items():
        if key not in LEAST or not isinstance(value, Tensor):  # a number has been looked at
            continue
        least, reached = LEAST[key]
        good = value >= least if reached else value > least
        if key in FINITE:
            good = good & (value != math.inf)
        if key in MOST:
            good = good & (value <= MOST[key])
        at = _first(~good, active)
        if at is not None:
            everywhere, there = (" at every token", f" at token {at}") if value.dim() else ("", "")
            got = value.reshape(-1)[at].item()
            raise ValueError(f"{key} must be {_at_least(key)}{everywhere}, got {got:g}{there}")
    low, high = columns.get("clip_low_threshold"), columns.get("clip_high_threshold")
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        in_order = True if low is None or high is None else low <= high
        at = _first(~in_order, active) if isinstance(in_order, Tensor) else None
        if at is not None:
            raise ValueError(f"clip_low_threshold must not exceed clip_high_threshold, which it does at token {at}")


def _first(bad: Tensor, active: Tensor | None) -> int | None:
    """The first that is True."""
    bad = bad if active is None else bad & active
    return int(bad.int().argmax()) if bad.any() else None


def _at_least(name: str) -> str:
    least, reached = LEAST[name]
    most = f" and at most {MOST[name]:g}" if name in MOST else ""
    return f"{'at least' if reached else 'greater than'} {least:g}{' and finite' if name in FINITE else most}"


def number(name: str, value: float, or_tensor: str = "") -> float:
    """A number as a float, within float32's range and the bounds that its name has. NumPy's scalars are numbers.

    or_tensor: " or a tensor" where one is taken, too.
    """
    number = value if type(value) is float else _as_float(name, value, or_tensor)
    if number != number:  # not math.isnan: torch.compile traces this with a symbolic number
        raise ValueError(f"{name} must not be NaN")
    if name in LEAST:
        least, reached = LEAST[name]
        if number < least or (number == least and not reached) or (name in FINITE and number == math.inf):
            raise ValueError(f"{name} must be {_at_least(name)}, got {number}")
    if name in MOST and number > MOST[name]:
        raise ValueError(f"{name} must be at most {MOST[name]:g}, got {number}")
    size = -number if number < 0 else number
    if size > _LARGEST and size != math.inf:
        raise ValueError(f"{name} must be within float32's range, got {number}, which float32 has as infinity")
    if size < _SMALLEST and size != 0:
        zero = "" if LEAST.get(name) == (0.0, False) else "0 or "
        raise ValueError(f"{name} must be {zero}at least float32's {_SMALLEST:.3g}, got {number}, which may become 0")
    return number


def _as_float(name: str, value: Any, or_tensor: str) -> float:
    if isinstance(value, Tensor):  # float() of it would wait for the device
        raise TypeError(f"{name} must be a number, got a tensor")
    try:
        if not isinstance(value, int | float) and hasattr(
            value, "__len__"
        ):  # a string or an array, which float() takes
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        hint = "; torch.from_numpy makes a tensor of it" if or_tensor and type(value).__name__ == "ndarray" else ""
        raise TypeError(f"{name} must be a number{or_tensor}, got {type(value).__name__}{hint}") from None
    except OverflowError:
        raise ValueError(f"{name} must be within float32's range, got an integer beyond it") from None


def index(name: str, value: int, dtype: torch.dtype = torch.int64) -> int:
    """An integer as an int within the range of ``dtype``, that of the targets it is compared with."""
    if isinstance(value, Tensor):  # index() of it would wait for the device
        raise TypeError(f"{name} must be an integer, got a tensor")
    try:
        if isinstance(value, bool):
            raise TypeError
        number = value if type(value) is int else operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}") from None
    limits = _INT32 if dtype is torch.int32 else _INT64
    if not limits.min <= number <= limits.max:
        raise ValueError(f"{name} must be within the range of target_tokens' {dtype}, got {_digits(number)}")
    return number


def _digits(number: int) -> str:
    """Python refuses to print more than a few thousand."""
    return str(number) if number.bit_length() < 1000 else f"an integer of {number.bit_length()} bits"


def _same_device(name: str, tensor: Tensor, device: torch.device, beside: str = "logits") -> None:
    if tensor.device != device:
        raise ValueError(f"{name} must be on the device of {beside}, {device}, got {tensor.device}")
