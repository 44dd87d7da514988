"""verl's logprobs, entropy, fused head and policy losses beside ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import verl as ours
from ..comparison import Comparison

B, T, V, H = 6, 40, 997, 32
GLOBAL = {"dp_size": 2, "batch_num_tokens": 300, "global_batch_size": 12, "loss_scale_factor": 64}
BF16 = "verl's logprobs are rounded to bfloat16, ours are float32: beside float64 of the same logits"


def config(**changed: Any) -> Any:
    from verl.workers.config import ActorConfig, PolicyLossConfig

    fields: dict[str, Any] = {"clip_ratio_high": 0.28, "policy_loss": PolicyLossConfig(dro_beta=0.1)} | changed
    return ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **fields)


def tokens(spread: float = 0.5, sequence_advantages: bool = False) -> dict[str, Any]:
    """Padded responses of which one is empty."""
    torch.manual_seed(0)
    log_prob = -3 * torch.rand(B, T)
    return {
        "old_log_prob": (log_prob + spread * torch.randn(B, T)).clamp(max=-0.01),
        "log_prob": log_prob.requires_grad_(),
        "advantages": torch.randn(B, 1).expand(B, T) if sequence_advantages else torch.randn(B, T),
        "response_mask": torch.arange(T) < torch.tensor([[T], [7], [0], [1], [33], [20]]),
    }


def numbers(loss_fn: Callable[..., Any], arguments: dict[str, Any], **keywords: Any) -> dict[str, Tensor | float]:
    loss, metrics = loss_fn(**arguments, **keywords)
    loss.backward()
    return {"loss": loss, "gradient": arguments["log_prob"].grad, **metrics}


def comparisons() -> Iterator[Comparison]:
    yield from of_logits()
    yield from of_heads()
    yield from of_losses()


# ---- Logits ----


def logits_and_labels(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return (3 * torch.randn(B * T, V)).to(dtype).requires_grad_(), torch.randint(V, (B * T,))


def differentiated(function: Callable[..., Tensor], logits: Tensor, *labels: Tensor) -> dict[str, Tensor | float]:
    values = function(logits * 1, *labels)  # not of a leaf, as an engine's
    torch.manual_seed(1)
    (values * torch.randn(values.shape)).sum().backward()
    assert logits.grad is not None
    return {"values": values, "gradient": logits.grad}


def of_logits() -> Iterator[Comparison]:
    from verl.utils import torch_functional as theirs

    yield Comparison(
        "logprobs_from_logits",
        "float32",
        lambda: differentiated(theirs.logprobs_from_logits, *logits_and_labels()),
        lambda: differentiated(ours.logprobs_from_logits, *logits_and_labels()),
    )
    for name in ("entropy_from_logits", "entropy_from_logits_with_chunking"):
        yield Comparison(
            name,
            "float32",
            lambda name=name: differentiated(getattr(theirs, name), logits_and_labels()[0]),  # type: ignore[misc]
            lambda name=name: differentiated(getattr(ours, name), logits_and_labels()[0]),  # type: ignore[misc]
        )

    def wide() -> dict[str, Tensor | float]:
        logits, labels = logits_and_labels(torch.bfloat16)
        return differentiated(theirs.logprobs_from_logits, logits.detach().double().requires_grad_(), labels)

    yield Comparison(
        "logprobs_from_logits",
        "bfloat16, theirs of float64",
        wide,
        lambda: differentiated(ours.logprobs_from_logits, *logits_and_labels(torch.bfloat16)),
        2**-8,
        f"{BF16}; the gradient is bfloat16, rounded once",
    )


def of_heads() -> Iterator[Comparison]:
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    def head(forward: Callable[..., Any], shape: tuple[int, ...]) -> dict[str, Tensor | float]:
        torch.manual_seed(0)
        hidden = torch.randn(*shape, H, requires_grad=True)
        weight = torch.randn(V, H, requires_grad=True)
        labels = torch.randint(V, shape)
        log_probs, entropy = forward(FusedLinearForPPO(), hidden, weight, labels, 0.7)
        (log_probs * torch.randn(shape)).sum().backward(retain_graph=True)
        entropy.mean().backward()
        assert hidden.grad is not None and weight.grad is not None
        return {"logprobs": log_probs, "entropy": entropy, "dhidden": hidden.grad, "dweight": weight.grad}

    theirs = FusedLinearForPPO.forward  # as it is now: it may be replaced while these run
    for shape in ((B * T,), (B, T)):
        yield Comparison(
            "FusedLinearForPPO.forward",
            f"{len(shape) + 1} dimensions",
            lambda shape=shape: head(theirs, shape),  # type: ignore[misc]
            lambda shape=shape: head(ours.fused_linear_for_ppo, shape),  # type: ignore[misc]
        )


# ---- Policy losses ----


def of_losses() -> Iterator[Comparison]:
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

    for mode in ours.POLICY_LOSSES:
        if mode not in POLICY_LOSS_REGISTRY:
            continue  # verl has none to compare with
        theirs = POLICY_LOSS_REGISTRY[mode]
        for case, keywords in loss_cases(mode):
            yield Comparison(
                f"policy_loss.loss_mode={mode}",
                case,
                lambda theirs=theirs, keywords=keywords, mode=mode: numbers(theirs, given(mode), **keywords),  # type: ignore[misc]
                lambda keywords=keywords, mode=mode: numbers(ours.POLICY_LOSSES[mode], given(mode), **keywords),  # type: ignore[misc]
            )


def given(mode: str) -> dict[str, Any]:
    """geo_mean is of a sequence's one advantage."""
    return tokens(sequence_advantages=mode == "geo_mean")


def loss_cases(mode: str) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "token-mean", {"loss_agg_mode": "token-mean", "config": config()}
    if mode in ("vanilla", "gspo"):
        for agg in ("token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"):
            yield f"{agg}, dp 2", {"loss_agg_mode": agg, "config": config(global_batch_info=GLOBAL)}
    torch.manual_seed(2)
    weights = 2 * torch.rand(B, T)
    yield "rollout_is_weights", {"loss_agg_mode": "token-mean", "config": config(), "rollout_is_weights": weights}
    if mode.startswith("dppo"):
        narrow = config(clip_ratio_low=0.02, clip_ratio_high=0.01, clip_ratio_c=1.3)
        yield "narrow bounds", {"loss_agg_mode": "token-mean", "config": narrow}
    one_clip_ratio = config(clip_ratio_low=None, clip_ratio_high=None, clip_ratio=1.5)
    yield "clip_ratio above 1", {"loss_agg_mode": "token-mean", "config": one_clip_ratio}
