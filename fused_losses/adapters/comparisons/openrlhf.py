"""OpenRLHF's functions, its PolicyLoss and its Actor beside ours."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from openrlhf.models.actor import Actor
from openrlhf.models.loss import PolicyLoss, aggregate_loss
from openrlhf.models.utils import compute_entropy, log_probs_from_logits
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from .. import openrlhf as ours
from ..comparison import Comparison

B, T, V = 4, 12, 997
BF16 = 2**-7
WHY = "theirs are logprobs of bf16, made from a log_softmax of bf16"
MASK, CLIP = {"is_correction_mode": "mask"}, {"is_correction_mode": "clip"}
RATIO, KL, TV = ({"is_correction_threshold": bounds} for bounds in ([0.8, 1.3], [0.0, 3e-3], [0.0, 0.023]))

POLICIES: dict[str, dict[str, Any]] = {
    "ppo": {},
    "ppo, clip higher": {"clip_eps_high": 0.3},
    "ppo, dual clip": {"dual_clip": 1.5},
    "ppo, sequence means": {"token_level_loss": False},
    "gspo": {"policy_loss_type": "gspo"},
    "gspo, dual clip": {"policy_loss_type": "gspo", "dual_clip": 1.1, "clip_eps_high": 0.01},
    "gspo, correction": {"policy_loss_type": "gspo", "is_correction_level": "token"},
    "ppo, token ratio, mask": {"is_correction_level": "token", **MASK, **RATIO},
    "ppo, token ratio, clip": {"is_correction_level": "token", **CLIP, **RATIO},
    "ppo, sequence ratio": {"is_correction_level": "seq", "is_correction_threshold": [0.98, 1.3]},
    "ppo, token binary_kl": {"is_correction_level": "token", "is_correction_gating": "binary_kl", **KL},
    "ppo, token tv": {"is_correction_level": "token", "is_correction_gating": "tv", **TV},
    "ppo, sequence binary_kl": {"is_correction_level": "seq", "is_correction_gating": "binary_kl", **KL},
    "ppo, sequence tv": {"is_correction_level": "seq", "is_correction_gating": "tv", **TV},
}


def comparisons() -> Iterator[Comparison]:
    for temperature in (1.0, 0.7):
        yield Comparison(
            "openrlhf.models.utils.log_probs_from_logits",
            f"fp32, temperature {temperature}",
            partial(logprobs, log_probs_from_logits, torch.float32, temperature),
            partial(logprobs, ours.log_probs_from_logits, torch.float32, temperature),
        )
    yield Comparison(
        "openrlhf.models.utils.log_probs_from_logits",
        "bf16",
        partial(logprobs, log_probs_from_logits, torch.bfloat16, 1.0),
        partial(logprobs, ours.log_probs_from_logits, torch.bfloat16, 1.0),
        BF16,
        WHY,
    )
    yield Comparison(
        "openrlhf.models.utils.compute_entropy",
        "fp32",
        partial(entropy, compute_entropy),
        partial(entropy, ours.compute_entropy),
    )
    for case, options in POLICIES.items():
        for of_batch in (False, True):
            yield Comparison(
                "openrlhf.models.loss.PolicyLoss",
                f"{case}{', batch' if of_batch else ''}",
                partial(policy, PolicyLoss.forward, options, of_batch),
                partial(policy, ours.policy_loss, options, of_batch),
            )
    for coefficient in (None, 0.01):
        yield Comparison(
            "openrlhf.models.Actor",
            "a step" if coefficient is None else "a step with entropy",
            partial(actor_step, coefficient, False),
            partial(actor_step, coefficient, True),
        )


@contextmanager
def cpu() -> Iterator[None]:
    """OpenRLHF's code as it runs without flash-attn, whose kernels are for GPUs, and without torch.compile."""
    with patch.dict(sys.modules, {"flash_attn.ops": None}), torch.compiler.set_stance("force_eager"):
        yield


def logprobs(function: Callable[..., Tensor], dtype: torch.dtype, temperature: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    leaf = (3 * torch.randn(B, T, V, generator=generator)).to(dtype).requires_grad_()
    labels, scale = torch.randint(V, (B, T), generator=generator), torch.randn(B, T, generator=generator)
    with cpu():
        values = function(leaf * 1.0, labels, temperature)
    (values * scale.to(values.dtype)).sum().backward()
    assert leaf.grad is not None
    return {"logprobs": values.detach(), "logits.grad": leaf.grad}


def entropy(function: Callable[..., Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    leaf = (3 * torch.randn(B, T, V, generator=generator)).requires_grad_()
    with cpu():
        values = function(leaf * 1.0)
    (values * torch.randn(B, T, generator=generator)).sum().backward()
    assert leaf.grad is not None
    return {"entropy": values.detach(), "logits.grad": leaf.grad}


def policy(forward: Callable[..., Any], options: dict[str, Any], of_batch: bool) -> dict[str, Tensor]:
    """One of the sequences has no token. of_batch: normalised by a batch of two ranks."""
    generator = torch.Generator().manual_seed(0)
    old = -2.0 + 0.7 * torch.randn(B, T, generator=generator)
    leaf = (old + 0.3 * torch.randn(B, T, generator=generator)).requires_grad_()
    rollout = old + 0.2 * torch.randn(B, T, generator=generator)
    advantages = torch.randn(B, T, generator=generator)
    mask = torch.arange(T) < torch.tensor([[12], [7], [0], [1]])
    batch = {"dp_size": 2, "batch_num_tokens": 50.0, "global_batch_size": 7.0} if of_batch else {}
    loss, *metrics = forward(PolicyLoss(**options), leaf, old, advantages, mask, rollout, **batch)
    loss.backward()
    assert leaf.grad is not None
    names = ("clip_ratio", "ppo_kl", "vllm_kl", "is_filter_ratio")
    seen = {name: value for name, value in zip(names, metrics, strict=True) if value is not None}
    return {"loss": loss.detach(), "log_probs.grad": leaf.grad, **seen}


def actor_step(coefficient: float | None, installed: bool) -> dict[str, Tensor]:
    """What ``ActorPPOTrainer.training_step`` does with an Actor, a PolicyLoss and an entropy coefficient."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=V, num_attention_heads=2, num_key_value_heads=2, **sizes))
    sequences = torch.randint(V, (B, T + 3))
    action_mask = torch.arange(T) < torch.tensor([[12], [7], [2], [1]])
    old, advantages = -6.9 + 0.3 * torch.randn(B, T), torch.randn(B, T)
    if installed:
        ours.install(inplace=coefficient is None)
    try:
        actor = Actor(model, temperature=0.8)
        actor.packing_samples = False
        with cpu():
            log_probs, output = actor(
                sequences,
                action_mask,
                attention_mask=torch.ones_like(sequences),
                return_output=True,
                return_entropy=coefficient is not None,
            )
        loss, clip_ratio, ppo_kl, *_ = PolicyLoss()(log_probs, old * action_mask, advantages, action_mask)
        if coefficient is not None:
            loss = loss - coefficient * aggregate_loss(output.entropy[:, -T:], action_mask)
        loss.backward()
    finally:
        if installed:
            ours.remove()
    gradient = model.lm_head.weight.grad
    assert gradient is not None
    return {"loss": loss.detach(), "clip_ratio": clip_ratio, "ppo_kl": ppo_kl, "lm_head": gradient}
