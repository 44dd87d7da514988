"""What other frameworks compute, as plain functions of logprobs: the numbers that this library has to reproduce.

Each function is written here from the framework's definition. It takes ``(logprobs, old_logprobs, advantages, mask)``,
all (B, T), advantages (B, T) or (B, 1), and returns the scalar that the framework calls backward on. Formulas are naive
on purpose, masks multiply as they do there: use them on finite numbers, in float64.

``published_verl``, ``published_trl`` and others load the frameworks' own code where their packages are installed, so
that test_oracles.py can hold the definitions against it. None needs a framework's dependencies, only its files:

    pip install --no-deps --ignore-requires-python -r tests/oracles.txt

imports of what the loss functions never call are stubs while they load, or the functions are taken out of their file.
"""

from __future__ import annotations

import ast
import importlib.util
import math
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

TRL_VERSION, VERL_VERSION = "1.16.0", "0.9.1"  # what the definitions below were read from


def row_mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum(-1) / mask.sum(-1).clamp(min=1)


def clipped(ratio: Tensor, advantages: Tensor, low: float, high: float, delta: float | None = None) -> Tensor:
    """PPO's loss per token; ``delta`` bounds the ratio of the branch that is not clipped."""
    free = ratio if delta is None else ratio.clamp(max=delta)
    return -torch.minimum(free * advantages, ratio.clamp(low, high) * advantages)


def soft_gate(ratio: Tensor, advantages: Tensor, tau_positive: float, tau_negative: float) -> Tensor:
    """SAPO's loss per token."""
    tau = torch.where(advantages > 0, tau_positive, tau_negative)
    return -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantages


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    gap = ref_logprobs - logprobs
    return gap.exp() - gap - 1


# TRL: GRPOTrainer._compute_loss ---------------------------------------------------------------------------------------


def trl(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    loss_type: str = "dapo",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    importance_sampling_level: str = "token",
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    beta: float = 0.0,
    ref_logprobs: Tensor | None = None,
    use_bias_correction_kl: bool = True,
    importance_sampling_ratio: Tensor | None = None,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
    off_policy_mask_threshold: float | None = None,
    sampling_logprobs: Tensor | None = None,
    entropies: Tensor | None = None,
    entropy_coef: float = 0.0,
    max_completion_length: int | None = None,
    num_items_in_batch: float | None = None,
    num_processes: int = 1,
    gradient_accumulation_steps: int = 1,
    steps_per_generation: int = 1,
) -> Tensor:
    mask = mask.to(logprobs.dtype)
    high = epsilon if epsilon_high is None else epsilon_high
    log_ratio = logprobs - old_logprobs
    if importance_sampling_level == "sequence":
        log_ratio = row_mean(log_ratio, mask)[:, None]  # the gradient goes through the mean
    ratio = log_ratio.exp()

    if loss_type == "cispo":
        losses = -ratio.clamp(max=high).detach() * advantages * logprobs  # epsilon_high is the bound itself, no 1 +
    elif loss_type == "sapo":
        losses = soft_gate(ratio, advantages, sapo_temperature_pos, sapo_temperature_neg)
    elif loss_type == "vespo":
        # the ratio of the whole sequence, and a soft weight of it
        log_w = ((logprobs - old_logprobs).clamp(-20, 20) * mask).sum(-1, keepdim=True)
        if importance_sampling_ratio is not None:
            log_w = log_w + importance_sampling_ratio.log().clamp(math.log(1e-8), 20).sum(-1, keepdim=True)
        log_w = log_w.clamp(math.log(1e-8), 20)
        k = torch.where(advantages >= 0, vespo_k_pos, vespo_k_neg)
        rate = torch.where(advantages >= 0, vespo_lambda_pos, vespo_lambda_neg)
        losses = -(rate + k * log_w - rate * log_w.exp()).exp().detach() * advantages * logprobs
    else:
        losses = clipped(ratio, advantages, 1 - epsilon, 1 + high, delta)
    if off_policy_mask_threshold is not None:
        assert sampling_logprobs is not None
        drift = row_mean(sampling_logprobs - logprobs.detach(), mask)[:, None]
        losses = losses * ((advantages >= 0) | (drift <= off_policy_mask_threshold))
    if importance_sampling_ratio is not None and loss_type != "vespo":
        losses = losses * importance_sampling_ratio
    if beta:
        assert ref_logprobs is not None
        losses = losses + beta * k3(logprobs, ref_logprobs) * (ratio if use_bias_correction_kl else 1.0)

    total = (losses * mask).sum()
    if loss_type in ("grpo", "sapo"):
        loss = row_mean(losses, mask).mean() / gradient_accumulation_steps
    elif loss_type == "luspo":
        loss = total / len(mask) / gradient_accumulation_steps
    elif loss_type == "bnpo":
        loss = total / mask.sum().clamp(min=1) / gradient_accumulation_steps
    elif loss_type == "dr_grpo":
        assert max_completion_length is not None
        loss = total / (len(mask) * max_completion_length) / gradient_accumulation_steps
    else:
        assert loss_type in ("dapo", "cispo", "vespo") and num_items_in_batch is not None
        items_here = max(num_items_in_batch, 1) / num_processes * gradient_accumulation_steps / steps_per_generation
        loss = total / items_here
    if entropy_coef:
        assert entropies is not None
        bonus = (entropies * mask).sum() / mask.sum().clamp(min=1)  # of all tokens, whatever the loss type
        loss = loss - entropy_coef * bonus / gradient_accumulation_steps
    return loss


# verl: core_algos.compute_policy_loss_* and agg_loss ------------------------------------------------------------------


def verl_reduce(
    losses: Tensor,
    mask: Tensor,
    loss_agg_mode: str,
    *,
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
    loss_scale_factor: float | None = None,
) -> Tensor:
    mask = mask.to(losses.dtype)
    rows, lengths = (losses * mask).sum(-1), mask.sum(-1)
    sequences = (lengths > 0).sum() if global_batch_size is None else global_batch_size  # empty ones do not count
    if loss_agg_mode == "token-mean":
        return rows.sum() / (lengths.sum() if batch_num_tokens is None else batch_num_tokens) * dp_size
    if loss_agg_mode == "token-sum":
        return rows.sum() * dp_size
    if loss_agg_mode == "seq-mean-token-sum":
        return rows.sum() / sequences * dp_size
    if loss_agg_mode == "seq-mean-token-sum-norm":
        return rows.sum() / sequences * dp_size / (loss_scale_factor or mask.shape[-1])
    assert loss_agg_mode == "seq-mean-token-mean"
    return (rows / lengths.clamp(min=1)).sum() / sequences * dp_size


def verl_ppo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    loss_agg_mode: str = "token-mean",
    clip_ratio_low: float = 0.2,
    clip_ratio_high: float = 0.2,
    clip_ratio_c: float = 3.0,
    rollout_is_weights: Tensor | float = 1.0,
    **reduction: Any,
) -> Tensor:
    """loss_mode "vanilla". The dual clip is always on."""
    ratio = (logprobs - old_logprobs).clamp(-20, 20).exp()
    losses = clipped(ratio, advantages, 1 - clip_ratio_low, 1 + clip_ratio_high)
    losses = torch.where(advantages < 0, losses.minimum(-clip_ratio_c * advantages), losses)
    return verl_reduce(losses * rollout_is_weights, mask, loss_agg_mode, **reduction)


def verl_gspo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    loss_agg_mode: str = "seq-mean-token-mean",
    clip_ratio_low: float = 0.2,
    clip_ratio_high: float = 0.2,
    rollout_is_weights: Tensor | float = 1.0,
    **reduction: Any,
) -> Tensor:
    """The value is the sequence's ratio, the gradient each token's own."""
    sequence = row_mean(logprobs - old_logprobs, mask.to(logprobs.dtype)).detach()[:, None]
    ratio = (sequence + logprobs - logprobs.detach()).clamp(max=10).exp()
    losses = clipped(ratio, advantages, 1 - clip_ratio_low, 1 + clip_ratio_high)
    return verl_reduce(losses * rollout_is_weights, mask, loss_agg_mode, **reduction)


def verl_cispo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    loss_agg_mode: str = "token-mean",
    clip_ratio_low: float = 0.2,
    clip_ratio_high: float = 0.2,
    rollout_is_weights: Tensor | float = 1.0,
    **reduction: Any,
) -> Tensor:
    ratio = (logprobs - old_logprobs).clamp(-20, 20).exp().detach()
    losses = -ratio.clamp(1 - clip_ratio_low, 1 + clip_ratio_high) * advantages * logprobs
    return verl_reduce(losses * rollout_is_weights, mask, loss_agg_mode, **reduction)


def verl_sapo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
    rollout_is_weights: Tensor | float = 1.0,
    loss_agg_mode: str = "",
    **reduction: Any,
) -> Tensor:
    """Its reduction is seq-mean-token-mean whatever loss_agg_mode says."""
    ratio = (logprobs - old_logprobs).clamp(-20, 20).exp()
    losses = soft_gate(ratio, advantages, tau_pos, tau_neg)
    return verl_reduce(losses * rollout_is_weights, mask, "seq-mean-token-mean", **reduction)


def verl_dro(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    dro_beta: float,
    loss_agg_mode: str = "token-mean",
    rollout_is_weights: Tensor | float = 1.0,
    **reduction: Any,
) -> Tensor:
    losses = 0.5 * dro_beta * (logprobs - old_logprobs) ** 2 - logprobs * advantages
    return verl_reduce(losses * rollout_is_weights, mask, loss_agg_mode, **reduction)


def verl_dppo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    divergence: str,
    loss_agg_mode: str = "token-mean",
    clip_ratio_low: float = 0.2,
    clip_ratio_high: float = 0.2,
    clip_ratio_c: float = 20.0,
    rollout_is_weights: Tensor | float = 1.0,
    **reduction: Any,
) -> Tensor:
    """loss_mode "dppo_tv" or "dppo_kl": the clip ratios are bounds on the divergence."""
    ratio = (logprobs - old_logprobs).clamp(-20, 20).exp().clamp(max=clip_ratio_c)
    kept = in_trust_region(logprobs, old_logprobs, advantages, divergence, clip_ratio_low, clip_ratio_high)
    losses = -(ratio * kept).detach() * advantages * logprobs
    return verl_reduce(losses * rollout_is_weights, mask, loss_agg_mode, **reduction)


def in_trust_region(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, divergence: str, low: float, high: float
) -> Tensor:
    p, old = logprobs.exp(), old_logprobs.exp()
    distance = (p - old).abs() if divergence == "tv" else openrlhf_binary_kl(old, p, 1e-8)
    return torch.where(advantages > 0, (distance <= high) | (p <= old), (distance <= low) | (p >= old))


def openrlhf_binary_kl(p: Tensor, q: Tensor, added: float = 0.0) -> Tensor:
    return p * (p / q).log() + (1 - p) * ((1 - p + added) / (1 - q + added)).log()


def verl_gpg(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    loss_agg_mode: str = "token-mean",
    rollout_is_weights: Tensor | float = 1.0,
    **reduction: Any,
) -> Tensor:
    """loss_mode "gpg", and the "reinforce" of "bypass_mode"."""
    return verl_reduce(-logprobs * advantages * rollout_is_weights, mask, loss_agg_mode, **reduction)


def verl_gmpo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_ratio_low: float = 0.2,
    clip_ratio_high: float = 0.2,
    rollout_is_weights: Tensor | None = None,
    loss_agg_mode: str = "",
) -> Tensor:
    """loss_mode "geo_mean": a sequence's ratio is the geometric mean of its tokens' clipped ratios; plain batch mean.

    The bounds are on the log ratio, not 1 +- epsilon; a token is clipped on its advantage's side only.
    """
    mask = mask.to(logprobs.dtype)
    log_ratio = logprobs - old_logprobs
    bounded = log_ratio.clamp(-clip_ratio_low, clip_ratio_high)
    side = advantages.sign().expand_as(log_ratio)
    kept = torch.where(side > 0, log_ratio.minimum(bounded), torch.where(side < 0, log_ratio.maximum(bounded), 0.0))
    losses = -row_mean(advantages.expand_as(mask), mask) * row_mean(kept, mask).exp()
    if rollout_is_weights is not None:
        losses = losses * row_mean((rollout_is_weights + 1e-10).log(), mask).exp()
    return losses.mean()


def verl_kl(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
    """kl_penalty per token. A "+" gives the value of the kind and the gradient of k2."""
    if kind.endswith("+") and kind[:-1] not in ("k2", "mse"):
        square = (logprobs - ref_logprobs) ** 2 / 2
        return verl_kl(logprobs, ref_logprobs, kind[:-1]).detach() + square - square.detach()
    difference = logprobs - ref_logprobs
    if kind.rstrip("+") in ("k2", "mse"):
        return difference**2 / 2
    if kind in ("k3", "low_var_kl"):
        gap = (-difference).clamp(-20, 20)
        return (gap.exp() - gap - 1).clamp(-10, 10)
    return difference.abs() if kind == "abs" else difference


def verl_importance_weights(
    logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, *, level: str, high: float, low: float | None = None
) -> Tensor:
    """rollout_is_threshold high: truncated there; "low_high": 0 outside."""
    mask = mask.to(logprobs.dtype)
    log_ratio = logprobs - sampler_logprobs
    if level == "sequence":
        log_ratio = (log_ratio * mask).sum(-1, keepdim=True).expand_as(mask)
    weights = log_ratio.clamp(-20, 20).exp() * mask
    return weights.clamp(max=high) if low is None else torch.where((weights >= low) & (weights <= high), weights, 0.0)


# SkyRL: apply_loss_reduction_to_advantages_minibatch, then a sum over mask --------------------------------------------


def skyrl_advantages(advantages: Tensor, mask: Tensor, loss_reduction: str, max_seq_len: int | None = None) -> Tensor:
    mask = mask.to(advantages.dtype)
    if loss_reduction == "token_mean":
        return advantages / mask.sum().clamp(min=1)
    if loss_reduction == "sequence_mean":
        return advantages / (len(mask) * mask.sum(-1, keepdim=True).clamp(min=1))
    assert loss_reduction == "seq_mean_token_sum_norm" and max_seq_len is not None
    return advantages / (len(mask) * max_seq_len)


def skyrl_ppo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    loss_reduction: str = "token_mean",
    max_seq_len: int | None = None,
    eps_clip_low: float = 0.2,
    eps_clip_high: float = 0.2,
    clip_ratio_c: float | None = None,
) -> Tensor:
    """policy_loss_type "regular", or "dual_clip" with ``clip_ratio_c``."""
    advantages = skyrl_advantages(advantages, mask, loss_reduction, max_seq_len)
    ratio = (logprobs - old_logprobs).clamp(-20, 20).exp()
    losses = clipped(ratio, advantages, 1 - eps_clip_low, 1 + eps_clip_high)
    if clip_ratio_c is not None:
        losses = torch.where(advantages < 0, losses.minimum(-clip_ratio_c * advantages), losses)
    return (losses * mask).sum()


def skyrl_dppo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    dppo_type: str,
    delta_low: float,
    delta_high: float,
) -> Tensor:
    """The ratio itself, and not times the logprob: the value is another than verl's, the gradient is the same."""
    ratio = (logprobs - old_logprobs).clamp(-20, 20).exp()
    kept = in_trust_region(logprobs, old_logprobs, advantages, dppo_type[-2:], delta_low, delta_high).detach()
    return (-ratio * advantages * kept * mask).sum()


# OpenRLHF: PolicyLoss with is_correction_mode "mask", a token mean ----------------------------------------------------


def openrlhf(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    sampler_logprobs: Tensor,
    gating: str,
    level: str,
    threshold: tuple[float, float],
) -> Tensor:
    losses = clipped((logprobs - old_logprobs).clamp(-20, 20).exp(), advantages, 0.8, 1.2)
    log_ratio = old_logprobs - sampler_logprobs
    p, q = (x.exp().clamp(1e-6, 1 - 1e-6) for x in (sampler_logprobs, old_logprobs))
    measured = {"ratio": log_ratio, "binary_kl": openrlhf_binary_kl(p, q), "tv": (p - q).abs()}[gating]
    if level == "seq":
        measured = ((measured * mask).sum(-1) / mask.sum(-1))[:, None]  # of an empty sequence NaN
    measured = measured.exp() if gating == "ratio" else measured
    kept = (measured >= threshold[0]) & (measured <= threshold[1])
    return (torch.where(kept, log_ratio.exp(), 0.0) * losses * mask).sum() / mask.sum()


# Fine-tuning: of the logits of the tokens and the tokens that they are to predict, already shifted --------------------


def dft(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over the tokens that count."""
    kept = labels != -100
    x = logits.log_softmax(-1)[kept].gather(-1, labels[kept][:, None])
    return (-x.exp().detach() * x).sum() / kept.sum()


def eaft(logits: Tensor, labels: Tensor, alpha: float, k: int) -> Tensor:
    kept = labels != -100
    x = logits.log_softmax(-1)[kept].gather(-1, labels[kept][:, None])[:, 0]
    p = logits[kept].sort(-1, descending=True).values[:, :k].softmax(-1).detach()
    return (-x * (-(p * p.log()).sum(-1)) ** alpha).mean()


# Tinker: sums over tokens; the bounds are the ratio's own -------------------------------------------------------------


def tinker(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    loss_fn: str,
    clip_low_threshold: float | None = None,
    clip_high_threshold: float | None = None,
    beta: float = 0.1,
) -> Tensor:
    low = clip_low_threshold if clip_low_threshold is not None else 0.0 if loss_fn == "cispo" else 0.8
    high = clip_high_threshold if clip_high_threshold is not None else 4.0 if loss_fn == "cispo" else 1.2
    ratio = (logprobs - old_logprobs).exp()
    if loss_fn == "gspo":
        sequence = row_mean(logprobs.detach() - old_logprobs, mask.to(logprobs.dtype))[:, None]
        losses = clipped((sequence + logprobs - logprobs.detach()).exp(), advantages, low, high)
    else:
        losses = {
            "importance_sampling": lambda: -ratio * advantages,
            "ppo": lambda: clipped(ratio, advantages, low, high),
            "cispo": lambda: -ratio.clamp(low, high).detach() * logprobs * advantages,
            "dro": lambda: 0.5 * beta * (logprobs - old_logprobs) ** 2 - logprobs * advantages,
        }[loss_fn]()
    return (losses * mask).sum()


# The published code ---------------------------------------------------------------------------------------------------


def _installed(package: str) -> Path | None:
    """The folder of a package, found without importing it."""
    spec = importlib.util.find_spec(package)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def _module(name: str, **attributes: Any) -> ModuleType:
    module = ModuleType(name)
    module.__path__ = []  # a package, so that names below it may be imported
    vars(module).update(attributes)
    return module


def _load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _taken(package: str, path: str, *names: str, within: str | None = None, **known: Any) -> SimpleNamespace | None:
    """Functions and classes of those names out of a file, or methods of the class ``within``, without its imports and
    their decorators; None where the package is not installed. known: what else they name."""
    root = _installed(package)
    if root is None:
        return None
    body = ast.parse((root / path).read_text()).body
    if within is not None:
        (body,) = (node.body for node in body if isinstance(node, ast.ClassDef) and node.name == within)
    found = [n for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name in names]
    assert len(found) == len(names), f"{path} of {package} has not all of {names}"
    for node in found:
        node.decorator_list = []
    namespace: dict[str, Any] = {"torch": torch, "math": math} | known
    exec(compile(ast.Module(found, []), str(root / path), "exec"), namespace)  # annotations are not looked at, as here
    return SimpleNamespace(**{name: namespace[name] for name in names})


class _Config(SimpleNamespace):
    """Stands for verl's ActorConfig, whose module imports all of verl."""

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)


@cache
def published_verl() -> SimpleNamespace | None:
    """verl's core_algos, rollout_corr_helper and a ``config(**keywords)``, or None where verl is not installed."""
    root = _installed("verl")
    if root is None:
        return None
    unused = mock.MagicMock
    stubs = {
        "omegaconf": _module("omegaconf", DictConfig=_Config),
        "tensordict": _module("tensordict", TensorDict=unused),
        "transformers": _module("transformers", PreTrainedTokenizer=unused),
        "flash_attn": None,  # not to be found: torch_functional then does without
        "torch_npu": None,
        "verl": _module("verl"),
        "verl.protocol": _module("verl.protocol", DataProto=unused),
        "verl.utils": _module("verl.utils", as_torch_index=unused(), group_mean_std=unused()),
        "verl.utils.device": _module("verl.utils.device", get_device_name=unused(), get_torch_device=unused()),
        "verl.utils.import_utils": _module("verl.utils.import_utils", deprecated=lambda _: lambda function: function),
        "verl.trainer": _module("verl.trainer"),
        "verl.trainer.config": _module("verl.trainer.config", AlgoConfig=type("AlgoConfig", (), {})),
        "verl.trainer.config.algorithm": _module("verl.trainer.config.algorithm", RolloutCorrectionConfig=unused),
        "verl.workers": _module("verl.workers"),
        "verl.workers.config": _module("verl.workers.config", ActorConfig=_Config),
        "verl.workers.config.actor": _module("verl.workers.config.actor", PolicyLossConfig=unused),
    }
    with mock.patch.dict(sys.modules, stubs):  # nothing of this stays behind
        functional = _load("verl.utils.torch_functional", root / "utils" / "torch_functional.py")
        sys.modules["verl.utils"].torch_functional = functional  # type: ignore[attr-defined]
        core = _load("verl.trainer.ppo.core_algos", root / "trainer" / "ppo" / "core_algos.py")
        rollout = _load("verl.trainer.ppo.rollout_corr_helper", root / "trainer" / "ppo" / "rollout_corr_helper.py")

    def config(**keywords: Any) -> _Config:
        values = {"clip_ratio": 0.2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "tau_pos": 1.0, "tau_neg": 1.05}
        return _Config(**values | {"policy_loss": SimpleNamespace(dro_beta=0.1), "global_batch_info": {}} | keywords)

    return SimpleNamespace(core=core, rollout=rollout, config=config)


@cache
def published_trl() -> Callable[..., Tensor] | None:
    """TRL's ``_compute_loss`` with the signature of :func:`trl`, or None where TRL is not installed.

    The method is taken out of its file: importing that needs transformers, accelerate and datasets.
    """
    names = ("_compute_loss", "get_gamma_weights", "get_off_policy_mask")
    extremes = {"nanmin": torch.min, "nanmax": torch.max}
    methods = _taken("trl", "trainer/grpo_trainer.py", *names, within="GRPOTrainer", **extremes)
    if methods is None:
        return None

    def loss(
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        *,
        loss_type: str = "dapo",
        epsilon: float = 0.2,
        epsilon_high: float | None = None,
        delta: float | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        beta: float = 0.0,
        ref_logprobs: Tensor | None = None,
        use_bias_correction_kl: bool = True,
        importance_sampling_ratio: Tensor | None = None,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
        off_policy_mask_threshold: float | None = None,
        sampling_logprobs: Tensor | None = None,
        entropies: Tensor | None = None,
        entropy_coef: float = 0.0,
        max_completion_length: int | None = None,
        num_items_in_batch: float | None = None,
        num_processes: int = 1,
        gradient_accumulation_steps: int = 1,
        steps_per_generation: int = 1,
    ) -> Tensor:
        entropies = torch.zeros_like(logprobs) if entropies is None else entropies
        args = SimpleNamespace(
            delta=delta,
            sapo_temperature_pos=sapo_temperature_pos,
            sapo_temperature_neg=sapo_temperature_neg,
            use_bias_correction_kl=use_bias_correction_kl,
            vespo_k_pos=vespo_k_pos,
            vespo_lambda_pos=vespo_lambda_pos,
            vespo_k_neg=vespo_k_neg,
            vespo_lambda_neg=vespo_lambda_neg,
            steps_per_generation=steps_per_generation,
        )
        trainer = SimpleNamespace(
            args=args,
            loss_type=loss_type,
            epsilon_low=epsilon,
            epsilon_high=epsilon if epsilon_high is None else epsilon_high,
            importance_sampling_level=importance_sampling_level,
            beta=beta,
            max_completion_length=max_completion_length,
            current_gradient_accumulation_steps=gradient_accumulation_steps,
            use_vllm=importance_sampling_ratio is not None,
            vllm_importance_sampling_correction=True,
            _entropy_bonus_enabled=bool(entropy_coef),
            entropy_coef=entropy_coef,
            use_adaptive_entropy=False,
            top_entropy_quantile=1.0,
            off_policy_mask_threshold=off_policy_mask_threshold,
            get_gamma_weights=torch.no_grad()(methods.get_gamma_weights),
            get_off_policy_mask=methods.get_off_policy_mask,
            aux_loss_enabled=False,
            model=SimpleNamespace(training=True),
            accelerator=SimpleNamespace(
                num_processes=num_processes,
                sync_gradients=False,
                gather=lambda tensor: tensor.reshape(-1),
                reduce=lambda tensor, reduction: tensor,
            ),
            _metrics=defaultdict(lambda: defaultdict(list)),
            _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, entropies, None),
        )
        ids = torch.zeros(mask.shape, dtype=torch.int64)
        inputs = {
            "prompt_ids": ids[:, :1],
            "prompt_mask": ids[:, :1],
            "completion_ids": ids,
            "completion_mask": mask.to(logprobs.dtype),
            "advantages": advantages,
            "old_per_token_logps": old_logprobs,
            "ref_per_token_logps": ref_logprobs,
            "importance_sampling_ratio": importance_sampling_ratio,
            "num_items_in_batch": torch.tensor(float(num_items_in_batch or 0)),
        }
        if sampling_logprobs is not None:
            inputs["sampling_per_token_logps"] = sampling_logprobs
        return methods._compute_loss(trainer, None, inputs)

    return loss


@cache
def published_skyrl() -> SimpleNamespace | None:
    """SkyRL's ``dppo_policy_loss``, ``cross_entropy_loss`` and ``importance_sampling_loss``."""
    names = ("masked_mean", "safe_exp_delta")
    helpers = _taken("skyrl", "backends/skyrl_train/utils/torch_utils.py", *names)
    if helpers is None:
        return None
    names = ("dppo_policy_loss", "cross_entropy_loss", "importance_sampling_loss", "reduce_loss")
    known = vars(helpers) | {"apply_off_policy_correction": lambda loss, old, rollout, mask, config: (loss, mask, {})}
    return _taken("skyrl", "backends/skyrl_train/utils/ppo_utils.py", *names, **known)


@cache
def published_openrlhf() -> Callable[..., Tensor] | None:
    """OpenRLHF's PolicyLoss with the signature of :func:`openrlhf`."""
    helpers = _taken("openrlhf", "models/utils.py", "masked_mean")
    if helpers is None:
        return None
    classes = _taken("openrlhf", "models/loss.py", "aggregate_loss", "PolicyLoss", nn=torch.nn, **vars(helpers))
    assert classes is not None

    def loss(
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        *,
        sampler_logprobs: Tensor,
        gating: str,
        level: str,
        threshold: tuple[float, float],
    ) -> Tensor:
        options = {"is_correction_gating": gating, "is_correction_level": level}
        policy_loss = classes.PolicyLoss(is_correction_threshold=threshold, **options)
        return policy_loss(logprobs, old_logprobs, advantages, mask, sampler_logprobs)[0]

    return loss


@cache
def published_axolotl() -> SimpleNamespace | None:
    """Axolotl's ``dft_loss`` and ``eaft_loss``."""
    functional = {"F": torch.nn.functional}
    dft, eaft = (_taken("axolotl", f"monkeypatch/loss/{name}.py", f"{name}_loss", **functional) for name in
                 ("dft", "eaft"))  # fmt: skip
    return None if dft is None or eaft is None else SimpleNamespace(**vars(dft), **vars(eaft))


@cache
def published_swift() -> SimpleNamespace | None:
    """ms-swift's ``per_token_loss_func``."""
    return _taken("swift", "trainers/utils.py", "per_token_loss_func", F=torch.nn.functional)
