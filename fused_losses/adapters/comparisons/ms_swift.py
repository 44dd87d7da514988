"""ms-swift's losses beside ours: its classes and functions, and its Seq2SeqTrainer's compute_loss of a small Llama."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from swift.loss import loss_map
from swift.rlhf_trainers import grpo_trainer
from swift.trainers import per_token_loss_func
from swift.trainers.seq2seq_trainer import Seq2SeqTrainer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from .. import ms_swift as ours
from ..comparison import Comparison

B, L, V = 2, 24, 999
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BF16 = 2**-8  # a logit's gradient may be rounded to the other of two neighbours
WHY = "gradients of bf16 logits are rounded to bf16, of numbers that differ by float32's rounding"


ARGUMENTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "num_items_in_batch": {"num_items_in_batch": torch.tensor(70)},
    "loss_scale": {"loss_scale": True},
}
TRAINED: dict[str, dict[str, Any]] = {
    "plain": {},
    "loss_scale": {"loss_scale": True},
    "DFT": {"enable_dft_loss": True},
    "DFT, loss_scale": {"enable_dft_loss": True, "loss_scale": True},
    "two processes": {"num_processes": 2, "num_items_in_batch": torch.tensor(90)},
}


def comparisons() -> Iterator[Comparison]:
    for dtype in DTYPES:
        tolerance = (BF16, WHY) if dtype == "bf16" else (1e-5, "")
        for case, options in ARGUMENTS.items():
            yield Comparison(
                "swift.loss.loss_map",
                f"{case}, {dtype}",
                partial(whole, loss_map["cross_entropy"], DTYPES[dtype], options),
                partial(whole, ours.CrossEntropyLoss, DTYPES[dtype], options),
                *tolerance,
            )
        for dft in (False, True):
            yield Comparison(
                "swift.trainers.per_token_loss_func",
                f"{'DFT' if dft else 'plain'}, {dtype}",
                partial(per_token, per_token_loss_func, DTYPES[dtype], dft),
                partial(per_token, ours.per_token_loss_func, DTYPES[dtype], dft),
                *tolerance,
            )
    for case, options in TRAINED.items():
        yield Comparison(
            "swift.trainers.Seq2SeqTrainer.compute_loss",
            case,
            partial(trained, None, **options),
            partial(trained, ours.NAME, **options),
        )
    yield Comparison(
        "swift.rlhf_trainers.grpo_trainer.selective_log_softmax",
        "fp32",
        partial(of_rows, grpo_trainer.selective_log_softmax, True),
        partial(of_rows, ours.selective_log_softmax, True),
    )
    yield Comparison(
        "swift.rlhf_trainers.grpo_trainer.entropy_from_logits",
        "fp32",
        partial(of_rows, grpo_trainer.entropy_from_logits, False),
        partial(of_rows, ours.entropy_from_logits, False),
    )


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels whose prompts are ignored, and a scale per token."""
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(B, L, V, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(V, (B, L), generator=generator)
    labels[0, :5], labels[1, :9] = -100, -100
    scale = torch.rand(B, L, generator=generator)
    scale[:, 12:14] = 0.0
    return logits, labels, scale


def whole(loss: Callable[..., Any], dtype: torch.dtype, options: dict[str, Any]) -> dict[str, Tensor]:
    logits, labels, scale = inputs(dtype)
    if options.get("loss_scale"):
        options = options | {"loss_scale": scale.roll(-1, -1).view(-1)}  # as the trainer gives it
    trainer = SimpleNamespace(template=SimpleNamespace(sequence_parallel_size=1, task_type="causal_lm"))
    value = loss(SimpleNamespace(), trainer)(SimpleNamespace(logits=logits), labels, **options)
    value.backward()
    assert logits.grad is not None
    return {"loss": value.detach(), "logits.grad": logits.grad}


def per_token(function: Callable[..., Tensor], dtype: torch.dtype, dft: bool) -> dict[str, Tensor]:
    logits, labels, scale = inputs(dtype)
    values = function(SimpleNamespace(logits=logits), labels, enable_dft_loss=dft)
    (values * scale.view(-1)).sum().backward()
    assert logits.grad is not None
    return {"loss": values.detach(), "logits.grad": logits.grad}


def of_rows(function: Callable[..., Tensor], targets: bool) -> dict[str, Tensor]:
    logits, labels, scale = inputs(torch.float32)
    values = function(logits, labels.clamp(min=0)) if targets else function(logits)
    (values * scale).sum().backward()
    assert logits.grad is not None
    return {"values": values.detach(), "logits.grad": logits.grad}


def trained(
    loss_type: str | None,
    *,
    enable_dft_loss: bool = False,
    loss_scale: bool = False,
    num_processes: int = 1,
    num_items_in_batch: Tensor | None = None,
) -> dict[str, Tensor]:
    """The real trainer's compute_loss. Of the trainer only what that reads is there."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=V, num_key_value_heads=2, **sizes))
    model.model_info = SimpleNamespace(is_moe_model=False)
    arguments = SimpleNamespace(
        loss_type=loss_type,
        enable_dft_loss=enable_dft_loss,
        enable_channel_loss=False,
        use_liger_kernel=False,
        eval_metric=None,
        label_smoothing_factor=0.0,
        average_tokens_across_devices=True,
        tuner_backend="peft",
        acc_strategy="token",
    )
    template = SimpleNamespace(
        sequence_parallel_size=1,
        task_type="causal_lm",
        padding_free=False,
        compute_sft_loss=lambda model, inputs, **_: model(**inputs),
    )
    trainer = Seq2SeqTrainer.__new__(Seq2SeqTrainer)
    trainer.__dict__.update(
        args=arguments,
        template=template,
        model=model,
        label_smoother=None,
        model_accepts_loss_kwargs=True,
        accelerator=SimpleNamespace(unwrap_model=lambda model: model, num_processes=num_processes),
        custom_metrics={},
    )
    trainer._compute_acc = lambda *_, **__: None
    installed = loss_type is not None
    if installed:
        ours.install()
    try:
        function = trainer.create_loss_and_eval_metric(arguments).get("compute_loss_func")
        _, labels, scale = inputs(torch.float32)
        batch = {"input_ids": labels.clamp(min=0), "labels": labels, "compute_loss_func": function}
        # without a scale, and without a function of its own, the trainer leaves the loss to the model
        batch |= {"loss_scale": scale if loss_scale else torch.ones(B, L)}
        loss = trainer.compute_loss(model, batch, num_items_in_batch=num_items_in_batch)
        loss.backward()
    finally:
        if installed:
            ours.remove()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "lm_head": gradients["lm_head.weight"], "norm": gradients["model.norm.weight"]}
