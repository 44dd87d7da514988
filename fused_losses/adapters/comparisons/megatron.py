"""Cross entropies of Megatron-core beside ours, and a tiny GPTModel with its output layer's logits and without.

On a CPU and one rank: where Megatron asks for the current CUDA device, it is told of the CPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.fusions import fused_cross_entropy
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from .. import megatron
from ..comparison import Comparison

S, B, V, H = 64, 2, 4096, 32
FUSED, UNFUSED = "fused_vocab_parallel_cross_entropy", "vocab_parallel_cross_entropy"
ROUNDED = "theirs rounds every gradient to bf16"
Loss = Callable[[Tensor, Tensor, Any], Tensor]


def comparisons() -> Iterator[Comparison]:
    with on_cpu():
        yield from _on_logits()
        yield from _of_models()


@contextmanager
def on_cpu(**sizes: int) -> Iterator[None]:
    """Megatron's groups, its buffers and its random numbers on CPUs: of one rank, where torch has no group yet.

    sizes: of ``initialize_model_parallel``.
    """
    made = not dist.is_initialized()
    if made:
        dist.init_process_group(
            "gloo",
            store=dist.HashStore(),  # type: ignore[attr-defined]
            rank=0,
            world_size=1,
        )
    parallel_state.initialize_model_parallel(**sizes)
    try:
        with simulated_device():
            yield
    finally:
        parallel_state.destroy_model_parallel()
        if made:
            dist.destroy_process_group()


@contextmanager
def simulated_device() -> Iterator[None]:
    with ExitStack() as stack:
        tracker = SimpleNamespace(fork=lambda *_: nullcontext())
        for patch in (
            mock.patch.object(torch.cuda, "current_device", lambda: torch.device("cpu")),
            mock.patch.object(tensor_parallel, "get_cuda_rng_tracker", lambda: tracker),
            mock.patch.object(logging.getLogger("megatron.core.models.gpt.gpt_model"), "disabled", True),
            torch.compiler.set_stance("force_eager"),  # what is compared is their operations, not torch's compiler
        ):
            stack.enter_context(patch)
        yield


# ---- Functions ----


def _on_logits() -> Iterator[Comparison]:
    theirs: Loss = fused_cross_entropy.fused_vocab_parallel_cross_entropy
    ours: Loss = megatron.fused_vocab_parallel_cross_entropy
    yield _function(FUSED, "bf16", theirs, ours, torch.bfloat16)
    for case, mask in (("fp32", 0.7), ("fp32, all masked", 0.0)):
        compared = _function(FUSED, case, theirs, ours, mask=mask)
        yield compared._replace(tolerance=2**-8, why=ROUNDED)
    yield _function(
        FUSED,
        "bf16, in place",
        theirs,
        partial(megatron.fused_vocab_parallel_cross_entropy, inplace=True),
        torch.bfloat16,
    )
    theirs, ours = tensor_parallel.vocab_parallel_cross_entropy, megatron.vocab_parallel_cross_entropy
    yield _function(UNFUSED, "bf16", _unfused(theirs), _unfused(ours), torch.bfloat16)
    yield _function(UNFUSED, "fp32", _unfused(theirs), _unfused(ours))
    yield _function(UNFUSED, "fp32, all masked", _unfused(theirs), _unfused(ours), mask=0.0)
    yield _function(UNFUSED, "fp32, label_smoothing 0.1", _unfused(theirs, 0.1), _unfused(ours, 0.1))


def _unfused(function: Any, label_smoothing: float = 0.0) -> Loss:
    return lambda logits, target, group: function(logits, target, label_smoothing, group)


def _function(
    slot: str, case: str, theirs: Loss, ours: Loss, dtype: torch.dtype = torch.float32, mask: float = 0.7
) -> Comparison:
    compared = Comparison(slot, case, partial(_numbers, theirs, dtype, mask), partial(_numbers, ours, dtype, mask))
    if dtype is torch.bfloat16:
        return compared._replace(tolerance=2**-8, why="both round gradients to bf16, from other float32 sums")
    return compared


def _numbers(function: Loss, dtype: torch.dtype, mask: float) -> Mapping[str, Tensor | float]:
    torch.manual_seed(0)
    made = torch.randn(S, B, V).to(dtype).requires_grad_()
    logits = made * 3  # as a layer makes them: not a leaf, and their own to write over
    target = torch.randint(V, (S, B))
    loss_mask = (torch.rand(S, B) < mask).float()
    losses = function(logits, target, dist.group.WORLD)
    loss = (losses * loss_mask).sum() / loss_mask.sum().clamp(min=1)
    loss.backward()
    assert made.grad is not None
    return {"loss": loss, "per token": losses, "gradient": made.grad}


# ---- A model ----


def model(hidden: int = H, vocab: int = V, length: int = S, **options: Any) -> GPTModel:
    """One layer, of float32."""
    torch.manual_seed(0)
    shared = options.pop("share_embeddings_and_output_weights", False)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=hidden,
        num_attention_heads=2,
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        **options,
    )
    return GPTModel(config, get_gpt_layer_local_spec(), vocab, length, share_embeddings_and_output_weights=shared)


def batch(rows: int = B, length: int = S, vocab: int = V) -> dict[str, Tensor]:
    """What GPTModel.forward takes."""
    torch.manual_seed(1)
    return {
        "input_ids": torch.randint(vocab, (rows, length)),
        "position_ids": torch.arange(length).expand(rows, length),
        "attention_mask": torch.ones(1, 1, length, length, dtype=torch.bool).triu(1),
        "labels": torch.randint(vocab, (rows, length)),
        "loss_mask": (torch.rand(rows, length) < 0.7).float(),
    }


def step(made: GPTModel, **options: Any) -> dict[str, Tensor | float]:
    """Loss and gradients of a step, as Megatron's pretraining makes it from what the model returns."""
    given = batch()
    losses = made(**given, **options)
    loss = (losses * given["loss_mask"]).sum() / given["loss_mask"].sum()
    loss.backward()
    gradients = [parameter.grad.flatten() for parameter in made.parameters() if parameter.grad is not None]
    return {"loss": loss, "per token": losses, "gradients": torch.cat(gradients)}


@contextmanager
def _installed() -> Iterator[None]:
    megatron.install()
    try:
        yield
    finally:
        megatron.remove()


def _of_models() -> Iterator[Comparison]:
    slot = "GPTModel.forward, output_processor"
    mup = {"use_mup": True, "mup_base_hidden_size": H // 2}
    shared = {"share_embeddings_and_output_weights": True}
    yield _model("LanguageModule.compute_language_model_loss", "fp32", within=_installed)
    yield _model(slot, "fp32", output_processor=megatron.output_processor)
    yield _model(slot, "fp32, shared embedding", shared, output_processor=megatron.output_processor)
    yield _model(slot, "fp32, MuP", mup, output_processor=megatron.output_processor)
    chunks = {"chunk_bytes": 16 * V * 4}
    yield _model(
        slot, "in chunks of 16", {}, output_processor=megatron.output_processor, output_processor_context=chunks
    )


def _model(
    slot: str,
    case: str,
    options: Mapping[str, Any] | None = None,
    *,
    within: Callable[[], AbstractContextManager[None]] = nullcontext,
    **keywords: Any,
) -> Comparison:
    def ours() -> Mapping[str, Tensor | float]:
        with within():
            return step(model(**options or {}), **keywords)

    return Comparison(slot, case, lambda: step(model(**options or {})), ours)
