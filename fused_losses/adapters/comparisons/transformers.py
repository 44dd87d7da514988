"""transformers' loss, models and Trainer beside ours."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss

from .. import transformers as ours
from ..comparison import Comparison

VOCAB = 1009
BF16 = "logits of 16 bits, which are rounded, scaled, capped and rounded again there; here each is rounded once"
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "output_router_logits": True,
}
MODELS: dict[str, dict[str, Any]] = {  # some of each form of forward, with what their configurations are given
    "Llama": {"tie_word_embeddings": True},
    "Mistral": {},
    "Qwen2": {},
    "Qwen3": {},
    "Gemma": {},
    "Gemma2": {"final_logit_softcapping": 3.0},
    "Gemma3": {"final_logit_softcapping": 3.0},
    "Granite": {"logits_scaling": 3.0},
    "Cohere": {"logit_scale": 0.25},
    "Cohere2": {"logit_scale": 0.25},
    "Phi": {},  # a head with a bias
    "Mixtral": EXPERTS,
    "Qwen3Moe": EXPERTS,
    "GraniteMoe": {**EXPERTS, "logits_scaling": 3.0},
}

Numbers = dict[str, Tensor | float]


def model_of(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A tiny model of random weights, always the same, with options of its configuration."""
    configuration = getattr(transformers, f"{name}{'TextConfig' if name in ('Gemma3', 'Gemma4') else 'Config'}")
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(configuration(**{**_SIZES, **MODELS.get(name, {}), **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)  # or logits are so small that a cap does nothing
    return model.to(dtype).train()


def batch() -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(1, VOCAB, (2, 24))
    return {"input_ids": ids, "labels": ids.where(torch.rand(ids.shape) < 0.7, -100)}


def of_loss(
    function: Callable[..., Tensor], dtype: torch.dtype, num_items_in_batch: Tensor | None, shifted: bool
) -> Numbers:
    torch.manual_seed(0)
    logits = (3 * torch.randn(2, 24, VOCAB)).to(dtype).requires_grad_()
    labels = batch()["labels"]
    given: dict[str, Any] = {"labels": None, "shift_labels": labels} if shifted else {"labels": labels}
    loss = function(logits=logits, vocab_size=VOCAB, num_items_in_batch=num_items_in_batch, **given)
    loss.backward()
    assert logits.grad is not None
    return {"loss": loss, "gradient": logits.grad}


def of_model(name: str, dtype: torch.dtype, put: Callable[[Any], None]) -> Numbers:
    model = model_of(name, dtype)
    put(model)
    outputs = model(**batch(), num_items_in_batch=torch.tensor(40))
    outputs.loss.backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return {"loss": outputs.loss, "gradients": gradients}


def of_trainer(put: Callable[[Any], None], **options: Any) -> Numbers:
    """The losses of the steps, and what the last left of the parameters."""
    model = model_of("Llama")
    put(model)
    torch.manual_seed(2)
    rows = torch.randint(1, VOCAB, (16, 24))
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=4,
            learning_rate=1e-3,
            logging_steps=1,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            log_level="error",
        )
        dataset: Any = [{"input_ids": row, "labels": row} for row in rows]
        trainer = transformers.Trainer(model, arguments, train_dataset=dataset, **options)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    losses = torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    return {"losses": losses, "parameters": torch.cat([p.detach().flatten() for p in model.parameters()])}


def nothing(model: Any) -> None:
    """As it is."""


def with_loss(model: Any) -> None:
    model.loss_function = ours.causal_lm_loss


def comparisons() -> Iterator[Comparison]:
    transformers.logging.set_verbosity_error()
    for case, dtype, count, shifted in (
        ("mean, fp32", torch.float32, None, False),
        ("num_items_in_batch, fp32", torch.float32, torch.tensor(50), False),
        ("shift_labels, bf16", torch.bfloat16, None, True),
    ):
        of = functools.partial(of_loss, dtype=dtype, num_items_in_batch=count, shifted=shifted)
        bf16 = dtype is torch.bfloat16
        yield Comparison(
            "transformers.loss.loss_utils.ForCausalLMLoss",
            case,
            functools.partial(of, ForCausalLMLoss),
            functools.partial(of, ours.causal_lm_loss),
            2**-8 if bf16 else 1e-5,
            "the gradient is rounded to 16 bits" if bf16 else "",
        )
    for name in MODELS:
        for dtype in (torch.float32, torch.bfloat16) if name in ("Llama", "Gemma2", "Granite") else (torch.float32,):
            bf16 = dtype is torch.bfloat16
            yield Comparison(
                f"{name}ForCausalLM.forward",
                f"install(model), {'bf16' if bf16 else 'fp32'}",
                functools.partial(of_model, name, dtype, nothing),
                functools.partial(of_model, name, dtype, ours.install),
                2**-5 if bf16 else 1e-5,
                BF16 if bf16 else "",
            )
    for case, put, options in (
        ("model.loss_function", with_loss, {}),
        ("compute_loss_func", nothing, {"compute_loss_func": ours.compute_loss_func}),
        ("install(model)", ours.install, {}),
    ):
        yield Comparison(
            "transformers.Trainer, accumulation 2",
            case,
            functools.partial(of_trainer, nothing),
            functools.partial(of_trainer, put, **options),
        )
