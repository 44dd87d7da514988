"""The head of a model in place of logits: these are made a chunk of tokens at a time, and never exist as a whole.

This is what a caller says; head.py does it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from . import checks
from .head import LINE, Head
from .origin import Origin
from .vocab_shard import layout_of, part_of, telling

if TYPE_CHECKING:
    from .problem import How
    from .stages import Source

_DEFAULT_BYTES, _DEFAULT_ROWS = 1 << 30, 2048


class LinearHead(Origin):
    """Logits ``hidden @ weight.T + bias``, as :class:`torch.nn.Linear` makes them, that are not kept.

    Args:
        hidden: (..., H) float32, bfloat16 or float16.
        weight: (V, H) of the dtype of ``hidden``; under autocast of any of these, and the products are in autocast's.
        bias: (V,) of the dtype of ``weight``, or None.
        chunk_bytes: how much memory a chunk of logits may take, at least a token's. None: 1 GiB, or 2048 tokens where
            these take more.
        weight_grad_dtype: what dW is added up in over the chunks, float32 or the dtype of ``weight``.
        logits_dtype: None, the dtype of the products; or float32, to which bfloat16 or float16 products are then not
            rounded: an "fp32 head".
        weight_grad: a (V, H) tensor that dW is added to in backward, instead of becoming ``weight.grad``, for
            accumulation over micro-batches without a [V, H] tensor for each. Two phase.
        skip_masked: leave out the tokens that a loss does not read, before the first product. Waits for the device, to
            know how many there are.
        group: the process group that weight and bias are sharded over, by class; all of its ranks have the same
            ``hidden``. None: they are whole.
        vocab_start, vocab_size: as in :class:`VocabShard`, where they are sharded.
        hidden_grad: "all_reduce": the gradient of ``hidden`` is summed over the group, chunk by chunk; "partial": it is
            left as this rank's part of that sum, for layers before the head that add it up themselves, as those of
            tensor parallelism and, by their reduce-scatter, of sequence parallelism do.

    ``inplace=True`` has nothing to overwrite here and is refused: one pass is in place on each chunk anyway. What a
    token gets depends on the products, and these, as torch makes them, on how many tokens a chunk has.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        chunk_bytes: int | None = None,
        weight_grad_dtype: torch.dtype = torch.float32,
        logits_dtype: torch.dtype | None = None,
        weight_grad: Tensor | None = None,
        skip_masked: bool = False,
        group: dist.ProcessGroup | None = None,
        vocab_start: int = 0,
        vocab_size: int | None = None,
        hidden_grad: str = "all_reduce",
    ):
        self.hidden = hidden
        self.weight = weight
        self.bias = bias
        self.chunk_bytes = chunk_bytes
        self.weight_grad_dtype = weight_grad_dtype
        self.logits_dtype = logits_dtype
        self.weight_grad = weight_grad
        self.skip_masked = skip_masked
        self.group = group
        self.vocab_start = vocab_start
        self.vocab_size = vocab_size
        self.hidden_grad = hidden_grad

    @staticmethod
    def of(hidden: Tensor, module: torch.nn.Module, **options: object) -> LinearHead:
        """The head that ``module`` is: a plain :class:`torch.nn.Linear`. One that is wrapped (LoRA), quantised, or
        changes what goes through it by hooks would be bypassed, and is refused."""
        if type(module) is not torch.nn.Linear:
            got = f"{type(module).__name__}{', wrapped: merge it first' if hasattr(module, 'base_layer') else ''}"
            raise TypeError(f"module must be a torch.nn.Linear, whose weight is all that it is, got {got}")
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        if any(hooks) or "forward" in vars(module):
            raise ValueError("module has hooks, or a forward of its own, which a LinearHead of its weight would bypass")
        if torch.nn.utils.parametrize.is_parametrized(module):
            raise ValueError("module is parametrised: its weight is not all that it is")
        return LinearHead(hidden, module.weight, module.bias, **options)  # type: ignore[arg-type]

    # ---- As logits ----

    @property
    def classes(self) -> int:
        return self.weight.shape[0] if self.vocab_size is None else self.vocab_size

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return torch.Size((*self.hidden.shape[:-1], self.classes))

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.hidden.device

    @property
    def inputs(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        return (self.hidden, self.weight) if self.bias is None else (self.hidden, self.weight, self.bias)

    def overwritten(self) -> Tensor:
        raise ValueError("inplace=True: a LinearHead has no logits to overwrite, and is in place on each chunk anyway")

    def traced(self) -> bool:
        return self.vocab_size is None and self.weight_grad is None

    def logits(self) -> Tensor:
        if self.vocab_size is not None:
            raise TypeError("logits must be whole for fused_losses.reference, got a LinearHead that is sharded")
        return torch.nn.functional.linear(self.hidden, self.weight, self.bias)

    def checked(self) -> LinearHead:
        if self.vocab_size is None:
            return self._checked()
        with telling(self.group, self.vocab_start, self.vocab_size):
            return self._checked()

    def _checked(self) -> LinearHead:
        weight = checks.parameter("weight", self.weight)
        hidden = checks.dense("hidden", self.hidden, checks.LOGITS_DTYPES, weight)
        bias = None if self.bias is None else checks.parameter("bias", self.bias)
        self._check_shapes(hidden, weight, bias)
        self._check_dtypes(hidden, weight, bias)
        buffer = None if self.weight_grad is None else checks.parameter("weight_grad", self.weight_grad)
        self._check_options(weight, buffer)
        start, size = self.vocab_start, self.vocab_size
        if size is not None:
            start, size = part_of(start, weight.shape[0], size)
        return LinearHead(
            hidden,
            weight,
            bias,
            chunk_bytes=self.chunk_bytes,
            weight_grad_dtype=self.weight_grad_dtype,
            logits_dtype=self.logits_dtype,
            weight_grad=buffer,
            skip_masked=self.skip_masked,
            group=self.group,
            vocab_start=start,
            vocab_size=size,
            hidden_grad=self.hidden_grad,
        )

    def _check_shapes(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        if weight.dim() != 2 or 0 in weight.shape:
            raise ValueError(f"weight must have shape (V, H), got {tuple(weight.shape)}")
        if hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"hidden must have shape (..., H) with the H = {weight.shape[1]} of weight, got {tuple(hidden.shape)}"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(
                f"bias must have shape ({weight.shape[0]},), that of weight's rows, got {tuple(bias.shape)}"
            )
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None and tensor.device != hidden.device:
                raise ValueError(f"{name} must be on the device of hidden, {hidden.device}, got {tensor.device}")

    def _check_dtypes(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        if torch.is_autocast_enabled(hidden.device.type):
            return
        if weight.dtype != hidden.dtype:
            raise TypeError(f"weight must have the dtype of hidden, {hidden.dtype}, got {weight.dtype}")
        if bias is not None and bias.dtype != weight.dtype:
            raise TypeError(f"bias must have the dtype of weight, {weight.dtype}, got {bias.dtype}")

    def _check_options(self, weight: Tensor, buffer: Tensor | None) -> None:
        if self.chunk_bytes is not None and checks.index("chunk_bytes", self.chunk_bytes) <= 0:
            raise ValueError(f"chunk_bytes must be greater than 0, got {self.chunk_bytes}")
        if self.weight_grad_dtype not in (torch.float32, weight.dtype):
            raise TypeError(
                f"weight_grad_dtype must be float32 or weight's {weight.dtype}, got {self.weight_grad_dtype}"
            )
        if self.logits_dtype not in (None, torch.float32):
            raise TypeError(f"logits_dtype must be None or float32, got {self.logits_dtype}")
        if not isinstance(self.skip_masked, bool):
            raise TypeError(f"skip_masked must be True or False, got {type(self.skip_masked).__name__}")
        checks.one_of("hidden_grad", self.hidden_grad, ("all_reduce", "partial"))
        if buffer is not None:
            if buffer.dtype not in (torch.float32, weight.dtype):
                raise TypeError(f"weight_grad must be float32 or weight's {weight.dtype}, got {buffer.dtype}")
            if buffer.shape != weight.shape or buffer.device != weight.device or buffer.requires_grad:
                raise ValueError(
                    f"weight_grad must have weight's shape {tuple(weight.shape)}, be on {weight.device} and not "
                    f"require grad, got {tuple(buffer.shape)} on {buffer.device}"
                )
            if not weight.requires_grad:
                raise ValueError("weight_grad is for the gradient of weight, which does not require one")
        if self.group is None and self.vocab_size is None:
            if self.vocab_start != 0:
                raise ValueError(f"vocab_start is of a weight that is sharded over a group, got {self.vocab_start}")
            if self.hidden_grad == "partial":
                raise ValueError('hidden_grad="partial" is of a weight that is sharded over a group: give vocab_size')
        elif self.vocab_size is None:
            raise ValueError("vocab_size must be given with group: weight has a part of the classes")

    def source(self, how: How) -> Source:
        layout = None
        if self.vocab_size is not None:
            layout = layout_of(self.group, self.vocab_start, self.weight.shape[0], self.vocab_size)
        products = self.hidden.dtype
        if torch.is_autocast_enabled(self.device.type):
            products = torch.get_autocast_dtype(self.device.type)
        widest = self.weight.shape[0] if layout is None else layout.widest
        logits_dtype = self.logits_dtype or products
        return Head(
            backend=how.backend,
            validate=how.validate,
            rows=_rows_of(self.chunk_bytes, widest, products, logits_dtype),
            products=products,
            logits_dtype=logits_dtype,
            sum_dtype=self.weight_grad_dtype,
            weight_grad=self.weight_grad,
            skip_masked=self.skip_masked,
            partial=self.hidden_grad == "partial",
            layout=layout,
            needs=tuple(torch.is_grad_enabled() and tensor.requires_grad for tensor in self.inputs),
        )


def _rows_of(chunk_bytes: int | None, vocab: int, products: torch.dtype, logits_dtype: torch.dtype) -> int:
    """How many tokens' logits are a chunk. What the products need in another dtype counts."""
    size = logits_dtype.itemsize + (products.itemsize if products is not logits_dtype else 0)
    row = vocab * size + LINE
    if chunk_bytes is None:
        return max(_DEFAULT_BYTES // row, _DEFAULT_ROWS)
    return max(chunk_bytes // row, 1)
