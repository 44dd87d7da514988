"""Custom losses, as Tinker's client runs them on logprobs, beside ``compute`` on the logits.

Tinker has code for no other loss in its package: those of its names are its server's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Literal

import tinker as sdk
import torch
from tinker.lib.public_interfaces.custom_loss import LossHandle, encode_graph, run_loss_handle, trace_loss
from torch import Tensor

from .. import tinker
from ..comparison import Comparison

T, V, K = 512, 4096, 4
SLOT = "TrainingClient.forward_backward_custom"


def clipped(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    ratio = torch.exp(logprobs - old)
    clipped = torch.clamp(ratio, 0.8, 1.2)
    losses = -torch.minimum(ratio * advantages, clipped * advantages)
    loss = (losses * mask).sum() / mask.sum().clamp(min=1)
    return loss, {"custom/clipped:mean": ((ratio != clipped) * mask).sum() / mask.sum().clamp(min=1)}


def soft(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    log_ratio = logprobs[1:] - old[1:]
    gate = torch.nn.functional.logsigmoid(log_ratio * advantages[1:])
    tail = torch.where(log_ratio.abs() > 2, log_ratio**2, torch.zeros_like(log_ratio))
    loss = -((gate - 0.01 * tail) * mask[1:]).sum() / logprobs.shape[0]
    return loss, {"custom/log_ratio:sum": (log_ratio * mask[1:]).sum()}


def distilled(logprobs: Tensor, teacher: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Of the K tokens that a teacher finds likely: (T, K)."""
    loss = (torch.softmax(teacher, -1) * (torch.log_softmax(teacher, -1) - logprobs)).sum()
    return loss, {"custom/kl:sum": loss.detach()}


def comparisons() -> Iterator[Comparison]:
    for function in (clipped, soft):
        yield _of(function.__name__, function)
        yield _of(f"{function.__name__}, bf16", function, dtype=torch.bfloat16)
    yield _of("clipped, as sent to the server", clipped, as_data=True)
    yield _of("clipped, all masked", clipped, mask=0.0)
    yield _of("distilled, 4 targets per token", distilled, rank=2)


def _of(
    case: str,
    function: Any,
    *,
    rank: Literal[1, 2] = 1,
    dtype: torch.dtype = torch.float32,
    mask: float = 0.7,
    as_data: bool = False,
) -> Comparison:
    parameters = function.__code__.co_varnames[: function.__code__.co_argcount]
    handle = trace_loss(function, dict.fromkeys(parameters, rank), "session")
    made = partial(_made, rank, dtype, mask, handle.input_names)
    custom = encode_graph(handle) if as_data else handle
    compared = Comparison(SLOT, case, partial(_theirs, made, handle), partial(_ours, made, custom))
    if dtype is torch.bfloat16:
        return compared._replace(tolerance=2**-8, why="the gradient is rounded to bf16")
    return compared


def _made(rank: int, dtype: torch.dtype, mask: float, names: tuple[str, ...]) -> tuple[Tensor, sdk.Datum]:
    torch.manual_seed(0)
    shape = (T, K)[:rank]
    logits = (2 * torch.randn(T, V)).to(dtype).requires_grad_()
    target_tokens = torch.randint(V, shape)
    drawn = {
        "old": torch.randn(shape) - 9,
        "advantages": torch.randn(shape),
        "mask": (torch.rand(shape) < mask).float(),
        "teacher": torch.randn(shape),
    }
    inputs: Any = {"target_tokens": target_tokens, **{name: drawn[name] for name in names}}
    return logits, sdk.Datum(model_input=sdk.ModelInput.from_ints([1] * T), loss_fn_inputs=inputs)


def _theirs(made: Any, handle: LossHandle) -> Mapping[str, Tensor | float]:
    logits, datum = made()
    target_tokens = datum.loss_fn_inputs["target_tokens"].to_torch()
    index = target_tokens.view(T, -1)
    logprobs = torch.log_softmax(logits.float(), -1).gather(-1, index).view(target_tokens.shape)
    loss, metrics = run_loss_handle(handle, [datum], [logprobs])
    loss.backward()
    return {"loss": loss, "gradient": logits.grad, **metrics}


def _ours(made: Any, custom: Any) -> Mapping[str, Tensor | float]:
    logits, datum = made()
    loss, _, metrics = tinker.compute("custom", logits, datum.loss_fn_inputs, custom=custom)
    loss.backward()
    return {"loss": loss, "gradient": logits.grad, **{key: value for key, value in metrics.items() if "custom" in key}}
