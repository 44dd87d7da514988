"""SkyRL's logprobs, entropy and policy losses beside ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import skyrl as ours
from ..comparison import Comparison

B, T, V = 6, 40, 997
BF16 = "SkyRL's logprobs are rounded to bfloat16, ours are float32: beside float64 of the same logits"


def config(policy_loss_type: str, **changed: Any) -> Any:
    from skyrl.train.config import AlgorithmConfig

    fields = {"policy_loss_type": policy_loss_type, "eps_clip_high": 0.28, "loss_reduction": "sequence_mean"}
    return AlgorithmConfig(**fields | changed)


def correction(**changed: Any) -> Any:
    from skyrl.train.config import OffPolicyCorrectionConfig

    return OffPolicyCorrectionConfig(**changed)


def tokens() -> dict[str, Any]:
    """Padded responses of which one is empty."""
    torch.manual_seed(0)
    log_probs = -3 * torch.rand(B, T)
    old_log_probs = (log_probs + 0.5 * torch.randn(B, T)).clamp(max=-0.01)
    return {
        "log_probs": log_probs.requires_grad_(),
        "old_log_probs": old_log_probs,
        "advantages": torch.randn(B, T),
        "loss_mask": (torch.arange(T) < torch.tensor([[T], [7], [0], [1], [33], [20]])).float(),
        "rollout_logprobs": (old_log_probs + 0.1 * torch.randn(B, T)).clamp(max=-0.01),
    }


def numbers(loss_fn: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Tensor | float]:
    loss, metrics = loss_fn(**arguments)
    loss.backward()
    return {"loss": loss, "gradient": arguments["log_probs"].grad, **metrics}


def comparisons() -> Iterator[Comparison]:
    yield from of_logits()
    yield from of_losses()


# ---- Logits ----


def drawn_logits(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return (3 * torch.randn(B, T, V)).to(dtype).requires_grad_(), torch.randint(V, (B, T))


def as_a_worker(module: Any, entropy_requires_grad: bool) -> dict[str, Tensor | float]:
    """Logprobs, and then the entropy of the same logits."""
    leaf, labels = drawn_logits()
    mask = torch.arange(T) < torch.tensor([[T], [7], [0], [1], [33], [20]])
    logits = leaf * 1
    logprobs = module.logprobs_from_logits(logits, labels, inplace_backward=True)
    entropy = module.chunked_entropy_from_logits(
        logits, requires_grad=entropy_requires_grad, attention_mask=mask.float(), chunk_size=16
    )
    loss = (logprobs * torch.linspace(-1, 1, T)).sum()
    (loss - 0.3 * entropy.sum() if entropy_requires_grad else loss).backward()
    assert leaf.grad is not None
    return {"logprobs": logprobs, "entropy": entropy, "gradient": leaf.grad}


def of_logits() -> Iterator[Comparison]:
    from skyrl.backends.skyrl_train.utils import torch_utils as theirs

    for entropy_requires_grad in (False, True):
        yield Comparison(
            "logprobs_from_logits, chunked_entropy_from_logits",
            "with an entropy loss" if entropy_requires_grad else "without an entropy loss",
            lambda wanted=entropy_requires_grad: as_a_worker(theirs, wanted),  # type: ignore[misc]
            lambda wanted=entropy_requires_grad: as_a_worker(ours, wanted),  # type: ignore[misc]
        )

    def of(function: Callable[..., Tensor], logits: Tensor, labels: Tensor) -> dict[str, Tensor | float]:
        values = function(logits * 1, labels)
        (values * torch.linspace(-1, 1, T)).sum().backward()
        assert logits.grad is not None
        return {"values": values, "gradient": logits.grad}

    def wide() -> dict[str, Tensor | float]:
        logits, labels = drawn_logits(torch.bfloat16)
        return of(theirs.logprobs_from_logits, logits.detach().double().requires_grad_(), labels)

    yield Comparison(
        "logprobs_from_logits",
        "bfloat16, theirs of float64",
        wide,
        lambda: of(ours.logprobs_from_logits, *drawn_logits(torch.bfloat16)),
        2**-8,
        f"{BF16}; the gradient is bfloat16, rounded once",
    )


# ---- Policy losses ----


def of_losses() -> Iterator[Comparison]:
    from skyrl.backends.skyrl_train.utils.ppo_utils import PolicyLossRegistry

    for name, loss_fn in ours.POLICY_LOSSES.items():
        theirs = PolicyLossRegistry.get(name)
        for case, changed in loss_cases(name):
            yield Comparison(
                f"policy_loss_type={name}",
                case,
                lambda theirs=theirs, changed=changed: numbers(theirs, tokens() | changed),  # type: ignore[misc]
                lambda loss_fn=loss_fn, changed=changed: numbers(loss_fn, tokens() | changed),  # type: ignore[misc]
            )


def loss_cases(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    from skyrl.train.config import CISPOConfig, DPPOConfig

    yield "no correction", {"config": config(name)}
    corrections = {
        "token TIS": correction(tis_ratio_type="token", token_tis_ratio_clip_high=1.05),
        "sequence TIS": correction(tis_ratio_type="sequence", sequence_tis_ratio_clip_high=1.1),
        "geometric mask": correction(sequence_mask_metric="geometric"),
        "token, outlier masks": correction(
            token_mask_is_threshold_low=0.9, token_mask_is_threshold_high=1.1, outlier_token_is_threshold_high=1.27
        ),
    }
    if name not in ("cross_entropy", "importance_sampling"):
        for what, corrected in corrections.items():
            yield what, {"config": config(name, off_policy_correction=corrected)}
    if name == "cispo":
        yield "cispo_anchor=rollout", {"config": config(name, cispo=CISPOConfig(0.2, 0.28, "rollout"))}
    elif name == "dppo":
        for kind, bound in (("binary_tv", 0.02), ("binary_kl", 0.01)):
            yield kind, {"config": config(name, dppo=DPPOConfig(kind, bound, bound))}
        yield "no rollout_logprobs", {"config": config(name), "rollout_logprobs": None}
    if name not in ("cispo", "rollout_is"):  # SkyRL's extremes, and its correction, need a mask
        yield "no mask", {"config": config(name), "loss_mask": None, "rollout_logprobs": None}
