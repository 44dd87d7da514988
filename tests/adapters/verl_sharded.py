"""What ranks run of test_verl.py: the vocabulary-parallel pair of verl's Megatron engine beside ours."""

from __future__ import annotations

import sys
from collections.abc import Callable

import stubbed
import torch
import torch.distributed as dist
from ranks import Rank
from torch import Tensor

VOCAB, SHAPE = 94, (3, 5)


def pair(here: Rank, dtype: torch.dtype) -> None:
    if "verl" not in sys.modules:
        stubbed.bare("verl", "verl.utils", "verl.utils.megatron")  # theirs needs nothing of them
    from megatron.core import parallel_state
    from verl.utils.megatron import tensor_parallel as theirs

    from fused_losses.adapters import verl as ours

    torch.manual_seed(0)
    logits = (3 * torch.randn(*SHAPE, VOCAB)).to(dtype)
    labels = torch.randint(VOCAB, SHAPE)
    columns = slice(here.rank * VOCAB // here.world, (here.rank + 1) * VOCAB // here.world)
    wide = logits.double().requires_grad_()
    logp = wide.log_softmax(-1)
    truth = {
        "vocab_parallel_log_probs_from_logits": logp.gather(-1, labels[..., None])[..., 0],
        "vocab_parallel_entropy": -(logp.exp() * logp).sum(-1),
    }
    truth["vocab_parallel_entropy_with_chunking"] = truth["vocab_parallel_entropy"]
    parallel_state._TENSOR_MODEL_PARALLEL_GROUP = here.group
    torch.compiler.set_stance("force_eager")  # they compile a product, which takes longer than all this
    try:
        for name, exact in truth.items():
            upstream = torch.linspace(-1, 1, exact.numel()).view(SHAPE)
            (gradient,) = torch.autograd.grad(exact, wide, upstream.double(), retain_graph=True)
            targets = (labels,) if "log_probs" in name else ()
            values, local = _run(getattr(ours, name), logits[..., columns], upstream, *targets)
            assert values.dtype is torch.float32
            # float32 of what is here, a gradient rounded once to the dtype of the logits
            torch.testing.assert_close(values.double(), exact, rtol=1e-5, atol=2e-6)
            rounding = 2**-8 if dtype is torch.bfloat16 else 1e-5
            torch.testing.assert_close(local.double(), gradient[..., columns], rtol=rounding, atol=1e-6)
            if dtype is torch.float32:  # Megatron's and verl's own, over the same group
                their_values, theirs_local = _run(getattr(theirs, name), logits[..., columns], upstream, *targets)
                torch.testing.assert_close(values, their_values, rtol=1e-5, atol=2e-6)
                torch.testing.assert_close(local, theirs_local, rtol=1e-5, atol=2e-6)
    finally:
        parallel_state._TENSOR_MODEL_PARALLEL_GROUP = None
        torch.compiler.set_stance("default")
    dist.barrier(here.group)


def _run(function: Callable[..., Tensor], local: Tensor, upstream: Tensor, *labels: Tensor) -> tuple[Tensor, Tensor]:
    leaf = local.clone().requires_grad_()
    values = function(leaf * 1, *labels)  # theirs writes over what it is given
    values.backward(upstream)
    assert leaf.grad is not None
    return values.detach(), leaf.grad
