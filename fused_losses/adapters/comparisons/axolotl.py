"""axolotl's own losses, and a model after its plugins have been called, beside ours."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from axolotl.integrations.base import PluginManager
from axolotl.monkeypatch.loss.chunked import get_causal_lm_loss

from .. import axolotl as plugin
from .. import transformers as ours
from ..comparison import Comparison
from .transformers import Numbers, batch, model_of, nothing, of_loss

NAME = f"{plugin.__name__}.FusedLossesPlugin"


def loaded(cfg: dict[str, Any], model: Any) -> Any:
    """The model, after axolotl's manager has called the plugin as its loader does."""
    manager: Any = PluginManager()
    if NAME not in manager.plugins:
        manager.register(NAME, required=True)
    manager.pre_model_load(cfg)
    manager.post_model_build(cfg, model)
    manager.pre_lora_load(cfg, model)
    manager.post_lora_load(cfg, model)
    manager.post_model_load(cfg, model)
    return model


def of_model(name: str, put: Callable[[Any], Any]) -> Numbers:
    model = model_of(name)
    put(model)
    outputs = model(**batch(), num_items_in_batch=torch.tensor(40))
    outputs.loss.backward()
    return {"loss": outputs.loss, "gradients": torch.cat([p.grad.flatten() for p in model.parameters()])}


def chunked(count: torch.Tensor | None) -> Numbers:
    """Its chunks' loss is compiled there, which changes no number and takes a minute."""
    with torch.compiler.set_stance("force_eager"):
        return of_loss(get_causal_lm_loss(num_output_chunks=3), torch.float32, count, False)


def comparisons() -> Iterator[Comparison]:
    for case, count in (("num_items_in_batch", torch.tensor(50)), ("no num_items_in_batch", None)):
        yield Comparison(
            "axolotl.monkeypatch.loss.chunked",
            f"chunked_cross_entropy, {case}",
            functools.partial(chunked, count),
            functools.partial(of_loss, ours.causal_lm_loss, torch.float32, count, False),
        )
    for name in ("Llama", "Gemma2"):
        for what in ("head", "loss"):
            yield Comparison(
                f"plugins: [{NAME.removeprefix('fused_losses.')}]",
                f"{name}, fused_losses: {what}",
                functools.partial(of_model, name, nothing),
                functools.partial(of_model, name, functools.partial(loaded, {"fused_losses": what})),
            )
