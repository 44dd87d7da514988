"""prime-rl's losses of a sequence and its chunked head beside ours.

prime-rl is not on the package index. Where it is not installed, theirs are the definitions below, written anew from
what its source of 0.8 (August 2026) computes in ``trainer/rl/loss.py`` and ``trainer/models/layers/lm_head.py``, and
the ppo of its documentation of custom losses. Where it is installed, they are its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .. import prime_rl
from ..comparison import Comparison
from ..slots import installed

T, H, V = 4096, 64, 8192
Loss = Callable[..., Any]


# ---- What prime-rl computes ----


def ipo(inputs: Any, config: Any) -> prime_rl.LossOutputs:
    """Tokens whose probability moved by more than eps have no policy gradient; the squared log ratio is over all."""
    log_ratio = inputs.trainer_logprobs - inputs.inference_logprobs
    moved = (inputs.trainer_logprobs.exp() - inputs.inference_logprobs.exp()).abs() > config.eps
    kept = inputs.loss_mask & ~moved
    losses = (
        config.kl_tau * inputs.loss_mask * log_ratio**2 - config.adv_tau * kept * inputs.advantages * log_ratio.exp()
    )
    mismatch = log_ratio.exp() - log_ratio - 1
    metrics = {
        "masked_mismatch_kl": mean_of(mismatch, inputs.loss_mask & moved),
        "unmasked_mismatch_kl": mean_of(mismatch, kept),
        "is_masked": mean_of(moved.float(), inputs.loss_mask),
    }
    return prime_rl.LossOutputs((losses * _weights(inputs)).sum(), metrics)


def clipped(inputs: Any, clip_eps: float = 0.2) -> prime_rl.LossOutputs:
    """The example of a custom loss."""
    ratio = torch.exp(inputs.trainer_logprobs - inputs.inference_logprobs)
    losses = -torch.min(ratio * inputs.advantages, ratio.clamp(1 - clip_eps, 1 + clip_eps) * inputs.advantages)
    return prime_rl.LossOutputs((losses * _weights(inputs))[inputs.loss_mask].sum(), {})


def head(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: Tensor, softcap: float | None = None
) -> dict[str, Tensor]:
    """Logits are of the products' dtype, and float32 from there on; Gemma's are capped, then divided."""
    logits = (hidden @ weight.t()).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logprobs = torch.log_softmax(logits / temperature[..., None], -1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return {"logprobs": logprobs.gather(-1, labels[..., None])[..., 0], "entropy": entropy}


def mean_of(values: Tensor, mask: Tensor) -> Tensor:
    return values[mask].sum() / mask.sum().clamp(min=1)


def _weights(inputs: Any) -> Tensor | float:
    return 1.0 if inputs.loss_weights is None else inputs.loss_weights


# ---- Beside ours ----


def comparisons() -> Iterator[Comparison]:
    theirs: Loss = ipo
    if installed("prime-rl") is not None:
        from prime_rl.trainer.rl.loss import ipo_loss_fn

        theirs = ipo_loss_fn
    config = SimpleNamespace(eps=0.1, adv_tau=1.0, kl_tau=1e-3)
    of_ipo = partial(theirs, loss_config=config) if theirs is not ipo else partial(ipo, config=config)
    custom = 'trainer.loss, type "custom"'
    for case, options in _CASES.items():
        yield _sequence("trainer.loss.type ipo", case, of_ipo, prime_rl.ipo, **options)
        yield _sequence(custom, f"ppo, {case}", clipped, prime_rl.ppo, metrics=False, **options)
    yield _head("float32", torch.float32)
    yield _head("bf16", torch.bfloat16)
    yield _head("float32", torch.float32, softcap=30.0)


_CASES: dict[str, dict[str, Any]] = {
    "": {},
    "loss_weights": {"weighted": True},
    "all masked": {"share": 0.0},
}


def _sequence(slot: str, case: str, theirs: Loss, ours: Loss, *, metrics: bool = True, **options: Any) -> Comparison:
    case = case.removesuffix(", ") or "defaults"
    return Comparison(
        slot, case, partial(_of_loss, theirs, metrics, **options), partial(_of_loss, ours, metrics, **options)
    )


def sequence(*, share: float = 0.7, weighted: bool = False, length: int = T) -> tuple[Any, Tensor]:
    """A record of one sequence, and the leaf that its logprobs are made of."""
    torch.manual_seed(0)
    leaf = (-2 * torch.rand(length)).requires_grad_()
    trainer_logprobs = leaf * 1
    return (
        SimpleNamespace(
            trainer_logprobs=trainer_logprobs,
            inference_logprobs=leaf.detach() + 0.3 * torch.randn(length),
            ref_logprobs=None,
            advantages=torch.randn(length),
            loss_mask=torch.rand(length) < share,
            loss_weights=torch.rand(length) if weighted else None,
        ),
        leaf,
    )


def _of_loss(function: Loss, metrics: bool, **options: Any) -> Mapping[str, Tensor | float]:
    inputs, leaf = sequence(**options)
    outputs = function(inputs)
    outputs.loss.backward()
    assert leaf.grad is not None
    return {"loss": outputs.loss, "gradient": leaf.grad, **(outputs.metrics if metrics else {})}


def _head(case: str, dtype: torch.dtype, softcap: float | None = None) -> Comparison:
    slot = "FusedOutputLinear.forward" if softcap is None else "GemmaFusedOutputLinear.forward"
    theirs = partial(head if installed("prime-rl") is None else _their_module, softcap=softcap)
    ours = partial(_our_module, softcap=softcap)
    compared = Comparison(slot, case, partial(_of_head, theirs, dtype), partial(_of_head, ours, dtype))
    if dtype is torch.bfloat16:
        return compared._replace(tolerance=2**-7, why="gradients are rounded to bf16 on the way, theirs per tile")
    return compared


def _of_head(function: Callable[..., Any], dtype: torch.dtype) -> Mapping[str, Tensor | float]:
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, H).to(dtype).requires_grad_() for n in (256, V))
    labels, temperature = torch.randint(V, (2, 128)), 0.5 + torch.rand(2, 128)
    seen = function(hidden.view(2, 128, H), weight, labels, temperature)
    (seen["logprobs"] * torch.linspace(-1, 1, 256).view(2, 128)).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    return {
        "logprobs": seen["logprobs"],
        "entropy": seen["entropy"],
        "d(hidden)": hidden.grad,
        "d(weight)": weight.grad,
    }


def _their_module(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: Tensor, softcap: float | None
) -> Mapping[str, Tensor]:
    from prime_rl.trainer.models.layers.lm_head import FusedOutputLinear
    from prime_rl.trainer.models.layers.lm_head_gemma import GemmaFusedOutputLinear

    if softcap is None:
        module = FusedOutputLinear(H, V, chunk_size=64)
    else:
        module = GemmaFusedOutputLinear(H, V, chunk_size=64, softcap=softcap)
    del module.weight
    module.weight = weight
    seen: Mapping[str, Tensor] = module(hidden, labels, temperature)
    return seen


def _our_module(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: Tensor, softcap: float | None
) -> Mapping[str, Tensor]:
    layer = SimpleNamespace(weight=weight, chunk_size=64, softcap=softcap)
    return prime_rl.fused_output_linear(layer, hidden, labels, temperature)
