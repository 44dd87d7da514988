"""NeMo-RL's loss functions beside ours, for logprobs and for logits.

NeMo-RL is not on the package index (what is there under its name is empty). Where it is not installed, theirs are the
definitions below, written anew from what ``nemo_rl/algorithms/loss/loss_functions.py`` computes as of commit
006907a9570734f3e5d484c08ada84b0b89224c9, of its 0.6: naive, masks multiply. Where it is installed, they are its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import nemo_rl
from ..comparison import Comparison
from ..slots import installed

B, S, V = 4, 65, 4096
Numbers = Mapping[str, Tensor | float]


# ---- What NeMo-RL computes ----


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None, by: Tensor | None = None) -> Tensor:
    divisor = mask.sum(dim) if by is None else by
    return (values * mask).sum(dim) / (divisor + 1e-8)


def divergence(
    x: Tensor, reference: Tensor, kind: str, inner: float | None, outer: float | None, weight: Tensor | float = 1.0
) -> Tensor:
    log_ratio = reference - x
    if inner is not None:
        clamped = log_ratio.clamp(-inner, inner)
        if isinstance(weight, Tensor):
            weight = torch.where(clamped == log_ratio, weight, weight.detach())
        log_ratio = clamped
    values = {"k1": -log_ratio, "k2": log_ratio.square() / 2, "k3": log_ratio.exp() - 1 - log_ratio}[kind] * weight
    return values if outer is None else values.clamp(-outer, outer)


def clipped_pg(
    x: Tensor, data: Mapping[str, Tensor], seqs: Tensor, toks: Tensor, cfg: Mapping[str, Any]
) -> tuple[Tensor, dict[str, float]]:
    o = nemo_rl._Options(**cfg)
    token_mask, sample_mask = data["token_mask"][:, 1:], data["sample_mask"]
    mask = token_mask * sample_mask[:, None]
    advantages, generated = data["advantages"][:, 1:], data["generation_logprobs"][:, 1:]
    before = x.detach() if o.force_on_policy_ratio else data["prev_logprobs"][:, 1:]
    metrics: dict[str, Any] = {}

    def averaged(values: Tensor, over_tokens: Tensor = token_mask) -> Tensor:
        if o.token_level_loss:
            return masked_mean(values, over_tokens * sample_mask[:, None], by=toks)
        return masked_mean(masked_mean(values, over_tokens, -1), sample_mask, by=seqs)

    # the policy's ratio
    if o.force_on_policy_ratio:
        ratio = clamped = (x - x.detach()).exp()
    elif o.disable_ppo_ratio:
        ratio = clamped = x
    else:
        log_ratio = x - before
        if o.sequence_level_importance_ratios:
            log_ratio = masked_mean(log_ratio, token_mask, -1)[:, None].expand_as(x)
        ratio = log_ratio.exp()
        clamped = ratio.clamp(1 - o.ratio_clip_min, 1 + o.ratio_clip_max)
    losses = (
        -advantages * (clamped.detach() * x) if o.use_cispo else torch.max(-advantages * ratio, -advantages * clamped)
    )
    if o.ratio_clip_c is not None:
        losses = torch.where(advantages < 0, torch.min(losses, -advantages * o.ratio_clip_c), losses)

    # the sampler's
    mismatch = before - generated
    weights = (mismatch * mask).sum(-1).exp()[:, None] if o.sequence_level_importance_ratios else mismatch.exp()
    low, high = o.truncated_importance_sampling_ratio_min or 0.0, o.truncated_importance_sampling_ratio or 0.0
    kind = o.truncated_importance_sampling_type
    if kind in ("tis", "icepop"):
        outside = ((weights < low) | (weights > high)).float()
        metrics["is_oob_ratio"] = masked_mean(outside, mask, by=toks)
        weights = weights.clamp(low, high) if kind == "tis" else weights * (1 - outside)
    elif kind == "seq-mask-tis":
        mean = masked_mean(mismatch, token_mask, -1).exp()
        outside = ((mean < low) | (mean > high)).float()
        metrics["is_oob_ratio"] = masked_mean(outside, sample_mask, by=seqs)
        weights = weights * (1 - outside)[:, None]
    actor = averaged(losses * weights if o.use_importance_sampling_correction else losses)

    kl = torch.zeros(())
    penalty = 0.0 if o.use_kl_in_reward else o.reference_policy_kl_penalty
    if penalty:
        weight = (x - (generated if o.use_on_policy_kl_approximation else x.detach())).exp()
        clamps = o.kl_input_clamp_value, o.kl_output_clamp_value
        reference = data["reference_policy_logprobs"][:, 1:]
        kl = penalty * averaged(divergence(x, reference, o.reference_policy_kl_type, *clamps, weight))
    positive = torch.zeros(())
    if o.positive_example_nll_weight > 0:
        positive = masked_mean(-x, mask * (data["rewards"] > 0)[:, None])
    loss = actor + kl + o.positive_example_nll_weight * positive

    by_tokens = partial(masked_mean, mask=mask, by=toks)
    mixture = (before.exp() / 2 + generated.exp() / 2).log()
    kind_of_kl = o.reference_policy_kl_type
    metrics |= {
        "loss": loss,
        "kl_penalty": kl / penalty if penalty else kl,
        "probs_ratio": by_tokens(ratio),
        "probs_ratio_clamped": by_tokens(clamped),
        "token_mult_prob_error": by_tokens(mismatch.abs().exp()),
        "gen_kl_error": by_tokens(divergence(generated, before, kind_of_kl, None, None)),
        "policy_kl_error": by_tokens(divergence(before, generated, kind_of_kl, None, None)),
        "js_divergence_error": by_tokens(
            (divergence(mixture, before, "k3", None, None) + divergence(mixture, generated, "k3", None, None)) / 2
        ),
        "sampling_importance_ratio": masked_mean(weights[:, 0], sample_mask, by=seqs)
        if o.sequence_level_importance_ratios
        else by_tokens(weights),
        "approx_entropy": -by_tokens((x - generated).exp() * x),
        "num_valid_samples": sample_mask.sum(),
        "positive_nll_loss": positive,
    }
    for name, values in (("probs_ratio", ratio), ("probs_ratio_clamped", clamped)):
        chosen = values[mask.bool()]
        metrics[f"{name}_min"] = chosen.min() if chosen.numel() else float("inf")
        metrics[f"{name}_max"] = chosen.max() if chosen.numel() else float("-inf")
    return loss, {name: torch.as_tensor(value).item() for name, value in metrics.items()}


def nll(x: Tensor, data: Mapping[str, Tensor], seqs: Tensor, toks: Tensor) -> tuple[Tensor, dict[str, float]]:
    mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
    loss = masked_mean(-x, mask, by=toks)
    seen = {"loss": loss, "num_unmasked_tokens": mask.sum(), "num_valid_samples": data["sample_mask"].sum()}
    return loss, {name: value.item() for name, value in seen.items()}


# ---- Beside ours ----

_CORRECTED = {"use_importance_sampling_correction": True}
CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "dual clip, asymmetric": {"ratio_clip_c": 3.0, "ratio_clip_max": 0.28, "reference_policy_kl_penalty": 0.0},
    "REINFORCE, k2": {"disable_ppo_ratio": True, "reference_policy_kl_type": "k2", "reference_policy_kl_penalty": 0.1},
    "GSPO": {"sequence_level_importance_ratios": True, "token_level_loss": False, **_CORRECTED},
    "CISPO": {"use_cispo": True, "ratio_clip_max": 4.0},
    "sequence means, k1": {"token_level_loss": False, "reference_policy_kl_type": "k1"},
    "on policy": {"force_on_policy_ratio": True, **_CORRECTED},
    "on-policy KL, clamped": {
        "use_on_policy_kl_approximation": True,
        "kl_input_clamp_value": 0.4,
        "kl_output_clamp_value": 0.05,
        "reference_policy_kl_penalty": 1.0,
    },
    "tis": {**_CORRECTED, "truncated_importance_sampling_type": "tis", "truncated_importance_sampling_ratio": 1.1},
    "icepop": {
        **_CORRECTED,
        "truncated_importance_sampling_type": "icepop",
        "truncated_importance_sampling_ratio": 1.2,
        "truncated_importance_sampling_ratio_min": 0.8,
    },
    "seq-mask-tis": {
        **_CORRECTED,
        "truncated_importance_sampling_type": "seq-mask-tis",
        "truncated_importance_sampling_ratio": 1.02,
        "truncated_importance_sampling_ratio_min": 0.98,
    },
    "positive examples": {"positive_example_nll_weight": 0.1},
}
CLIPPED = "ClippedPGLossFn.__call__"


def comparisons() -> Iterator[Comparison]:
    for case, cfg in CASES.items():
        yield _of(CLIPPED, case, _their_clipped_pg(cfg), nemo_rl.ClippedPGLoss(cfg))
    yield _of(CLIPPED, "all masked", _their_clipped_pg({}), nemo_rl.ClippedPGLoss({}), share=0.0)
    yield _of(CLIPPED, "LOGIT", _their_clipped_pg({}), nemo_rl.ClippedPGLoss({}, on_logits=True))
    for dtype in (torch.float32, torch.bfloat16):
        case = f"LOGIT, in place, {str(dtype).removeprefix('torch.')}"
        yield _of(
            CLIPPED, case, _their_clipped_pg({}), nemo_rl.ClippedPGLoss({}, on_logits=True, inplace=True), dtype=dtype
        )
        ours = nemo_rl.NLLLoss(on_logits=True, inplace=True)
        yield _of("NLLLossFn.__call__", case, _their_nll(), ours, dtype=dtype)
    yield _of("NLLLossFn.__call__", "LOGPROB", _their_nll(), nemo_rl.NLLLoss())


def _their_clipped_pg(cfg: Mapping[str, Any]) -> Any:
    if installed("nemo-rl") is None:
        return partial(clipped_pg, cfg=cfg)
    from nemo_rl.algorithms.loss.loss_functions import ClippedPGLossConfig, ClippedPGLossFn

    return ClippedPGLossFn(ClippedPGLossConfig(**cfg))


def _their_nll() -> Any:
    if installed("nemo-rl") is None:
        return nll
    from nemo_rl.algorithms.loss.loss_functions import NLLLossFn

    return NLLLossFn()


def batch(share: float = 0.7, dtype: torch.dtype = torch.float32) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
    """The leaf that logits are made of, the data of a micro-batch, and the numbers of the whole batch."""
    torch.manual_seed(0)
    leaf = (2 * torch.randn(B, S, V)).to(dtype).requires_grad_()
    input_ids = torch.randint(V, (B, S))
    x = torch.nn.functional.pad(_logprobs(leaf.detach(), input_ids), (1, 0))
    data = {
        "input_ids": input_ids,
        "token_mask": (torch.rand(B, S) < share).float(),
        "sample_mask": torch.tensor([1.0, 1.0, 0.0, 1.0]),
        "advantages": torch.randn(B, S),
        "rewards": torch.tensor([1.0, 0.0, 1.0, -1.0]),
        "prev_logprobs": x + 0.3 * torch.randn(B, S),
        "reference_policy_logprobs": x + 0.3 * torch.randn(B, S),
    }
    data["generation_logprobs"] = data["prev_logprobs"] + 0.1 * torch.randn(B, S)
    return leaf, data, torch.tensor(7.0), torch.tensor(311.0)


def _logprobs(logits: Tensor, input_ids: Tensor) -> Tensor:
    return torch.log_softmax(logits.float()[:, :-1], -1).gather(-1, input_ids[:, 1:, None])[..., 0]


def _of(
    slot: str, case: str, theirs: Any, ours: Any, *, dtype: torch.dtype = torch.float32, share: float = 0.7
) -> Comparison:
    made = partial(batch, share, dtype)
    compared = Comparison(
        slot, case, partial(numbers, theirs, made, False), partial(numbers, ours, made, ours.on_logits)
    )
    if dtype is torch.bfloat16:
        return compared._replace(tolerance=2**-8, why="the gradient is rounded to bf16")
    if slot == CLIPPED:
        why = "js_divergence_error is a difference of nearly equal numbers, and the loss a sum that nearly cancels"
        return compared._replace(tolerance=5e-5, why=why)
    return compared


def numbers(function: Any, made: Any, on_logits: bool) -> Numbers:
    leaf, data, seqs, toks = made()
    logits = leaf * 1  # as a model makes them
    if on_logits:
        loss, metrics = function(logits=logits, data=data, global_valid_seqs=seqs, global_valid_toks=toks)
    else:
        loss, metrics = function(_logprobs(logits, data["input_ids"]), data, seqs, toks)
    loss.backward()
    return {**metrics, "loss": loss, "gradient": leaf.grad}
