"""Axolotl: a plugin, named in the YAML, that puts the head or the loss of :mod:`.transformers` into the model.

    plugins:
      - fused_losses.adapters.axolotl.FusedLossesPlugin
    fused_losses: head                # or loss: the model makes its logits, and only their loss is ours
    fused_losses_chunk_bytes: 268435456

Made for axolotl 0.21.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from . import transformers
from ._names import called

if TYPE_CHECKING:
    FusedLossesPlugin: Any
    FusedLossesArgs: Any

# What else of axolotl makes the loss, by the name of its option, and how it comes to be in the way.
CONFLICTS = {
    "cut_cross_entropy": "it replaces the forward of the model's class",
    "liger_fused_linear_cross_entropy": "it replaces the forward of the model's class",
    "liger_cross_entropy": "it replaces the cross entropy of transformers",
    "chunked_cross_entropy": "it replaces transformers' ForCausalLMLoss",
    "flash_attn_cross_entropy": "it replaces the cross entropy of transformers",
    "use_dft": "its loss is of logits, with labels that the model does not get",
    "use_eaft": "its loss is of logits, with labels that the model does not get",
    "kd_trainer": "its loss is of logits and of a teacher's",
    "diffusion": "its loss is of logits that are not shifted",
    "rl": "the losses of its trainers are not the model's; fused_losses.adapters.trl has some of them",
    "reward_model": "the model has no language model's loss",
    "process_reward_model": "the model has no language model's loss",
}
_SHARDED = {
    "context_parallel_size": "it splits the tokens of logits that are not made",
    "sequence_parallel_degree": "it splits the tokens of logits that are not made",
    "tensor_parallel_size": "it shards the head",
}


def check(cfg: Mapping[str, Any]) -> None:
    """Raise ValueError where the configuration has something that the plugin can't be together with, by its name."""
    for name, why in CONFLICTS.items():
        if cfg.get(name):
            raise ValueError(f"{name} is not supported together with fused_losses: {why}")
    for name, why in _SHARDED.items():
        if (cfg.get(name) or 1) > 1:
            raise ValueError(f"{name} above 1 is not supported together with fused_losses: {why}")
    if cfg.get("adapter") == "multilora":
        raise ValueError("adapter: multilora is not supported together with fused_losses: its losses are per adapter")
    if (what := cfg.get("fused_losses")) not in (None, "head", "loss"):
        raise ValueError(f'fused_losses must be "head" or "loss", got {what!r}')
    if cfg.get("fused_losses_chunk_bytes") is not None and what == "loss":
        raise ValueError("fused_losses_chunk_bytes is of fused_losses: head, got fused_losses: loss")


def put(cfg: Mapping[str, Any], model: Any) -> None:
    """Put the head or the loss into a model, or into what PEFT has wrapped."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    # Trainer multiplies the loss by the number of processes, whose gradients are then averaged
    processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if cfg.get("fused_losses") == "loss":
        inner.loss_function = functools.partial(transformers.causal_lm_loss, upstream=processes)
        return
    with called({"chunk_bytes": "fused_losses_chunk_bytes"}):
        transformers.install(inner, upstream=processes, chunk_bytes=cfg.get("fused_losses_chunk_bytes"))


def __getattr__(name: str) -> Any:
    """Axolotl looks its plugin and the plugin's options up by name; their base classes are imported then."""
    made = {"FusedLossesPlugin": _plugin, "FusedLossesArgs": _arguments}.get(name)
    if made is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return made()


@functools.cache
def _plugin() -> Any:
    from axolotl.integrations.base import BasePlugin

    class FusedLossesPlugin(BasePlugin):  # type: ignore[misc]
        """Checks the configuration before the model is loaded, and changes the model once its adapters are in."""

        def get_input_args(self) -> str:
            return f"{__name__}.FusedLossesArgs"

        def pre_model_load(self, cfg: Any) -> None:
            check(cfg)

        def post_model_load(self, cfg: Any, model: Any) -> None:
            put(cfg, model)

    return FusedLossesPlugin


@functools.cache
def _arguments() -> Any:
    from pydantic import BaseModel, Field

    class FusedLossesArgs(BaseModel):
        """The options of the plugin, by which axolotl extends those of its YAML."""

        fused_losses: str = Field("head", pattern="^(head|loss)$", description="what is fused: the head, or the loss")
        fused_losses_chunk_bytes: int | None = Field(None, gt=0, description="memory of a chunk of logits, of a head")

    return FusedLossesArgs
