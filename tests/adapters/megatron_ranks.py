"""What ranks run of test_megatron.py: tensor parallelism of Megatron-core on CPUs."""

from __future__ import annotations

from typing import Any

import torch
from ranks import Rank
from torch import Tensor

import fused_losses
from fused_losses import reference
from fused_losses.adapters import megatron

S, B, V, H = 6, 2, 40, 8


def drawn(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    target = torch.randint(V, (S, B))
    target[2, 1] = -1
    return (3 * torch.randn(S, B, V)).to(dtype), target, torch.rand(S, B)


def functions(here: Rank, dtype: torch.dtype) -> None:
    """Theirs and ours on this rank's columns, and both against the whole."""
    from megatron.core.fusions import fused_cross_entropy
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    logits, target, upstream = drawn(dtype)
    columns = V // here.world
    part = slice(here.rank * columns, (here.rank + 1) * columns)
    used = target >= 0
    upstream = upstream * used

    def run(function: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
        local = logits[..., part].clone().requires_grad_()
        losses = function(local * 1, target, tp_group=here.group, **keywords)
        losses.backward(upstream)
        assert losses.shape == (S, B) and losses.dtype is torch.float32 and local.grad.dtype is dtype
        return losses.detach() * used, local.grad

    fused = fused_cross_entropy.fused_vocab_parallel_cross_entropy
    rounded = {"rtol": 2**-7, "atol": 1e-4}  # theirs rounds the gradient to bf16
    with torch.compiler.set_stance("force_eager"):
        for theirs, ours in (
            (fused, megatron.fused_vocab_parallel_cross_entropy),
            (vocab_parallel_cross_entropy, megatron.vocab_parallel_cross_entropy),
        ):
            loss, gradient = run(theirs)
            for keywords in ({}, {"inplace": True}):
                our_loss, our_gradient = run(ours, **keywords)
                torch.testing.assert_close(our_loss, loss, rtol=1e-5, atol=1e-5)
                exact = theirs is not fused and dtype is torch.float32
                torch.testing.assert_close(our_gradient, gradient, **({} if exact else rounded))
                assert (our_gradient[2, 1] == 0).all()
    # label smoothing: of the whole vocabulary, as theirs has it on one rank
    whole = logits.double().requires_grad_()
    truth = reference.cross_entropy(
        whole, target.masked_fill(~used, -100), label_smoothing=0.1 * V / (V - 1), reduction="none"
    )
    truth.backward(upstream.double())
    loss, gradient = run(megatron.vocab_parallel_cross_entropy, label_smoothing=0.1)
    torch.testing.assert_close(loss.double(), truth.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), whole.grad[..., part], **(rounded if dtype is torch.bfloat16 else {}))


def models(here: Rank) -> list[str]:
    """GPTModel with the vocabulary over two ranks, twice: theirs and ours, to the same loss and gradients."""
    from fused_losses.adapters.comparisons.megatron import batch, model, on_cpu, step

    compared = []
    with on_cpu(tensor_model_parallel_size=2):
        for name, options in (
            ("tensor parallel", {}),
            ("shared embedding", {"share_embeddings_and_output_weights": True}),
            ("MuP", {"use_mup": True, "mup_base_hidden_size": 16}),
        ):
            options = {"tensor_model_parallel_size": 2, **options}
            theirs = step(model(**options))
            chunks = {"chunk_bytes": 50_000}
            ways = {"logits": {}, "head": {"output_processor": megatron.output_processor}}
            ways["chunks"] = ways["head"] | {"output_processor_context": chunks}
            for way, keywords in ways.items():
                if way == "logits":
                    megatron.install()
                try:
                    ours = step(model(**options), **keywords)
                finally:
                    megatron.remove()
                _assert_same(ours, theirs, f"{name}, {way}")
                compared.append(f"{name}, {way}")
        made = model(tensor_model_parallel_size=2)
        try:
            made(**batch(), output_processor=megatron.output_processor, runtime_gather_output=True)
        except ValueError as error:
            assert "runtime_gather_output" in str(error)
            compared.append("refused")
        # a loss of the caller's, in one pass, is the same on all ranks and that of the whole
        given = batch()

        def mean(head: Any, labels: Tensor, loss_mask: Tensor) -> Tensor:
            return fused_losses.cross_entropy(head, labels, weights=loss_mask)

        losses = model(tensor_model_parallel_size=2)(**given)
        expected = (losses * given["loss_mask"]).sum() / given["loss_mask"].sum()
        context = {"loss": mean}
        found = made(**given, output_processor=megatron.output_processor, output_processor_context=context)
        torch.testing.assert_close(found, expected)
    return compared


def layers(here: Rank) -> None:
    """The output layer itself, its hidden states whole or cut along the sequence, with and without a bias."""
    from fused_losses.adapters.comparisons.megatron import on_cpu

    with on_cpu(tensor_model_parallel_size=2):
        for sequence_parallel in (False, True):
            for options in ({"bias": False}, {"bias": True}, {"bias": True, "skip_bias_add": True}):
                _layer(sequence_parallel, options)
            _layer(sequence_parallel, {"bias": False}, frozen=True)
            _layer(sequence_parallel, {"bias": False, "disable_grad_reduce": True})


def _layer(sequence_parallel: bool, options: dict[str, Any], frozen: bool = False) -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import ColumnParallelLinear, vocab_parallel_cross_entropy
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=H,
        num_attention_heads=2,
        tensor_model_parallel_size=2,
        sequence_parallel=sequence_parallel,
        use_cpu_initialization=True,
    )
    torch.manual_seed(0)
    group = parallel_state.get_tensor_model_parallel_group()
    layer = ColumnParallelLinear(H, V, config=config, init_method=torch.nn.init.normal_, tp_group=group, **options)
    if layer.bias is not None:
        layer.bias.data.normal_()
    layer.weight.requires_grad_(not frozen)
    hidden, labels, upstream = torch.randn(S, B, H), torch.randint(V, (B, S)), torch.rand(B, S)
    if sequence_parallel:
        hidden = hidden.chunk(2)[group.rank()]

    def numbers(losses_of: Any) -> dict[str, Tensor]:
        layer.zero_grad()
        given = hidden.clone().requires_grad_()
        losses = losses_of(given)
        losses.backward(upstream)
        parameters = {
            name: parameter.grad for name, parameter in layer.named_parameters() if parameter.grad is not None
        }
        return {"losses": losses, "hidden": given.grad, **parameters}

    def theirs(given: Tensor) -> Tensor:
        logits, _ = layer(given)
        return vocab_parallel_cross_entropy(logits, labels.t().contiguous(), tp_group=group).t()

    def ours(given: Tensor) -> Tensor:
        return megatron.output_processor(
            hidden_states=given,
            output_layer=layer,
            output_weight=None,
            labels=labels,
            context={"chunk_bytes": 500},
            config=config,
        )

    _assert_same(numbers(ours), numbers(theirs), f"{sequence_parallel} {options} {frozen}")


def _assert_same(ours: dict[str, Any], theirs: dict[str, Any], what: str) -> None:
    assert ours.keys() == theirs.keys(), what
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-6, msg=f"{what}: {key}")
