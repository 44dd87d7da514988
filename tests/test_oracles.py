"""The losses as other frameworks compute them: first the definitions in oracles.py against the frameworks' published
code, where that is installed, then the calls of this library that reproduce them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import oracles
import pytest
import torch
from torch import Tensor

import fused_losses
from fused_losses import aggregation
from fused_losses.importance_weights import (
    gated_importance_weights,
    masked_importance_weights,
    off_policy_sequence_mask,
    truncated_importance_weights,
)

LENGTHS, TOKENS, VOCAB = (6, 3, 1, 0, 5), 6, 17  # one sequence has no token
B = len(LENGTHS)
N = sum(LENGTHS)
BOUNDS = (0.8, 1.2, 0.9, 1.5, 2.0, 3.0, 4.0)  # of any ratio below: none is near enough for rounding to cross it


@dataclass(frozen=True)
class Batch:
    logits: Tensor  # (B, T, V) float64 that float32 holds exactly; so are the others
    target_tokens: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    sampler_logprobs: Tensor
    advantages: Tensor  # (B, 1)
    mask: Tensor

    def logprobs(self, logits: Tensor) -> Tensor:
        return logits.log_softmax(-1).gather(-1, self.target_tokens[..., None])[..., 0]


def make(spread: float = 0.5) -> Batch:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).float().double()

    logits = 2 * normal(B, TOKENS, VOCAB)
    targets = torch.randint(VOCAB, (B, TOKENS), generator=generator)
    x = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    log_ratio = spread * normal(B, TOKENS)
    for bound in BOUNDS:
        log_ratio = torch.where((log_ratio.exp() - bound).abs() < 1e-3, log_ratio + 0.01, log_ratio)
    return Batch(
        logits,
        targets,
        (x - log_ratio).float().double(),
        (x - 0.3 * normal(B, TOKENS)).float().double(),
        (x - log_ratio - 0.7 * normal(B, TOKENS)).float().double(),
        torch.tensor([[1.5], [-0.7], [0.4], [2.0], [-1.1]], dtype=torch.float64).float().double(),
        (torch.arange(TOKENS) < torch.tensor(LENGTHS)[:, None]).double(),
    )


BATCH, FAR = make(), make(2.0)  # FAR: many clipped, and dual clips
BATCHES = {"near": BATCH, "far": FAR}


def truth(batch: Batch, oracle: Callable[..., Tensor], **keywords: Any) -> tuple[Tensor, Tensor]:
    """An oracle's loss and its gradient on the logits, in float64."""
    logits = batch.logits.clone().requires_grad_()
    loss = oracle(batch.logprobs(logits), batch.old_logprobs, batch.advantages, batch.mask, **keywords)
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


# The definitions against the published code ---------------------------------------------------------------------------

REDUCTIONS = (  # of verl
    ("token-mean", {}),
    ("token-mean", {"dp_size": 4, "batch_num_tokens": 50}),
    ("token-sum", {"dp_size": 4}),
    ("seq-mean-token-sum", {}),
    ("seq-mean-token-sum", {"dp_size": 4, "global_batch_size": 9}),
    ("seq-mean-token-sum-norm", {}),
    ("seq-mean-token-sum-norm", {"dp_size": 4, "global_batch_size": 9, "loss_scale_factor": 100}),
    ("seq-mean-token-mean", {}),
    ("seq-mean-token-mean", {"dp_size": 4, "global_batch_size": 9}),
)
TRL_CASES: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo", "max_completion_length": 11},
    "dapo": {"loss_type": "dapo", "num_items_in_batch": 40, "num_processes": 2},
    "dapo accumulated": {
        "loss_type": "dapo",
        "num_items_in_batch": 40,
        "gradient_accumulation_steps": 4,
        "steps_per_generation": 8,
    },
    "cispo": {"loss_type": "cispo", "num_items_in_batch": 40, "epsilon_high": 2.0},
    "sapo": {"loss_type": "sapo", "gradient_accumulation_steps": 4},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "vespo": {"loss_type": "vespo", "num_items_in_batch": 40},
    "vespo, other weights": {
        "loss_type": "vespo",
        "num_items_in_batch": 40,
        "vespo_k_pos": 0.5,
        "vespo_lambda_pos": 1.5,
        "vespo_k_neg": 1.0,
        "vespo_lambda_neg": 0.3,
    },
    "vespo, KL weighted": {"loss_type": "vespo", "num_items_in_batch": 40, "beta": 0.3},
    "off-policy mask": {"loss_type": "grpo", "off_policy_mask_threshold": 0.02, "beta": 0.3},
    "asymmetric clip and delta": {"loss_type": "grpo", "epsilon": 0.1, "epsilon_high": 0.5, "delta": 2.0},
    "KL": {"loss_type": "bnpo", "beta": 0.3, "use_bias_correction_kl": False},
    "KL weighted by the ratio": {"loss_type": "bnpo", "beta": 0.3},
    "gspo, KL": {
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
        "beta": 0.3,
        "use_bias_correction_kl": False,
    },
    "gspo, KL weighted": {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.3},
}


def trl_keywords(batch: Batch, name: str) -> dict[str, Any]:
    keywords = TRL_CASES[name]
    if "beta" in keywords:
        keywords = keywords | {"ref_logprobs": batch.ref_logprobs}
    if "off_policy_mask_threshold" in keywords:
        keywords = keywords | {"sampling_logprobs": batch.sampler_logprobs}
    return keywords


@pytest.fixture
def verl() -> Any:
    return oracles.published_verl() or pytest.skip("verl is not installed")


@pytest.fixture
def trl() -> Callable[..., Tensor]:
    return oracles.published_trl() or pytest.skip("trl is not installed")


def assert_same(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-9)  # verl adds 1e-8 to counts


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("name", TRL_CASES)
def test_definition_of_trl(name, batch, trl):
    keywords = trl_keywords(batch, name)
    assert_same(truth(batch, oracles.trl, **keywords), truth(batch, trl, **keywords))
    entropy = {"entropies": batch.logits.abs().sum(-1), "entropy_coef": 0.1}
    weight = {"importance_sampling_ratio": batch.sampler_logprobs.exp()}
    assert_same(
        truth(batch, oracles.trl, **keywords | entropy | weight), truth(batch, trl, **keywords | entropy | weight)
    )


@pytest.mark.parametrize(("mode", "keywords"), REDUCTIONS)
def test_definition_of_verl_reductions(mode, keywords, verl):
    published = verl.core.agg_loss(BATCH.ref_logprobs, BATCH.mask, mode, **keywords)
    torch.testing.assert_close(oracles.verl_reduce(BATCH.ref_logprobs, BATCH.mask, mode, **keywords), published)


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("name", ("vanilla", "gspo", "cispo", "sapo", "dro", "geo_mean", "gpg", "dppo_tv", "dppo_kl"))
def test_definition_of_verl_losses(name, batch, verl):
    definitions = {"vanilla": oracles.verl_ppo, "geo_mean": oracles.verl_gmpo}
    definition = definitions.get(name) or getattr(oracles, f"verl_{name.removesuffix('_tv').removesuffix('_kl')}")
    bounds = {"clip_ratio_low": 0.1, "clip_ratio_high": 0.5} if name not in ("sapo", "dro", "gpg") else {}
    extra = {"dro_beta": 0.1} if name == "dro" else {}
    if name.startswith("dppo"):
        bounds, extra = {"clip_ratio_low": 0.001, "clip_ratio_high": 0.002}, {"divergence": name[-2:]}
    for mode in ("token-mean", "seq-mean-token-mean"):
        for weights in (None, batch.sampler_logprobs.exp()):

            def published(x, q, a, m, mode=mode, weights=weights):
                config = verl.config(**bounds)
                return verl.core.get_policy_loss_fn(name)(q, x, a.expand_as(m), m, mode, config, weights)[0]

            keywords = (
                bounds | extra | {"loss_agg_mode": mode} | ({} if weights is None else {"rollout_is_weights": weights})
            )
            assert_same(truth(batch, definition, **keywords), truth(batch, published))


@pytest.mark.parametrize("weighted", (False, True))
def test_definition_of_verl_reinforce(weighted, verl):
    """That of "bypass_mode", which is not in the registry by itself."""
    weights = BATCH.sampler_logprobs.exp() if weighted else None

    def published(x, q, a, m):
        arguments = (q, x, a.expand_as(m), m, "seq-mean-token-sum", verl.config(), weights)
        return verl.core.compute_policy_loss_reinforce(*arguments)[0]

    keywords = {"loss_agg_mode": "seq-mean-token-sum"} | ({"rollout_is_weights": weights} if weighted else {})
    assert_same(truth(BATCH, oracles.verl_gpg, **keywords), truth(BATCH, published))


@pytest.mark.parametrize("kind", ("k1", "kl", "abs", "k2", "mse", "k3", "low_var_kl", "k1+", "k3+"))
def test_definition_of_verl_kl(kind, verl):
    def through(kl):
        return lambda x, q, a, m: (kl(x, BATCH.ref_logprobs, kind) * m).sum()

    assert_same(truth(BATCH, through(oracles.verl_kl)), truth(BATCH, through(verl.core.kl_penalty)))


@pytest.mark.parametrize("level", ("token", "sequence"))
@pytest.mark.parametrize("low", (None, 0.5))
def test_definition_of_verl_importance_weights(level, low, verl):
    definition = oracles.verl_importance_weights(
        BATCH.old_logprobs, BATCH.sampler_logprobs, BATCH.mask, level=level, high=2.0, low=low
    )
    published, _ = verl.rollout.compute_rollout_correction_weights(
        BATCH.old_logprobs - BATCH.sampler_logprobs, BATCH.mask, level, 2.0 if low is None else f"{low}_2.0"
    )
    torch.testing.assert_close(definition, published)


DPPO = {"tv": {"dppo_type": "binary_tv", "delta_low": 0.001, "delta_high": 0.002},
        "kl": {"dppo_type": "binary_kl", "delta_low": 0.001, "delta_high": 0.002}}  # fmt: skip


@pytest.mark.parametrize("kind", DPPO)
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_definition_of_skyrl_dppo(batch, kind):
    skyrl = oracles.published_skyrl() or pytest.skip("skyrl is not installed")
    config = SimpleNamespace(dppo=SimpleNamespace(**DPPO[kind]), off_policy_correction=None)

    def published(x, q, a, m):
        return skyrl.dppo_policy_loss(x, q, a.expand_as(m), config, m)[0]

    assert_same(truth(batch, oracles.skyrl_dppo, **DPPO[kind]), truth(batch, published))


GATES = {
    "ratio": ("ratio", "token", (0.5, 2.0)),
    "ratio of the sequence": ("ratio", "seq", (0.9, 1.1)),
    "binary KL": ("binary_kl", "token", (0.0, 0.01)),
    "binary KL of the sequence": ("binary_kl", "seq", (0.0, 0.01)),
    "TV": ("tv", "token", (0.0, 0.02)),
    "TV of the sequence": ("tv", "seq", (0.0, 0.03)),
}


def gate_keywords(name: str) -> dict[str, Any]:
    return dict(zip(("gating", "level", "threshold"), GATES[name], strict=True))


@pytest.mark.parametrize("name", GATES)
def test_definition_of_openrlhf(name):
    published = oracles.published_openrlhf() or pytest.skip("openrlhf is not installed")
    keywords = gate_keywords(name) | {"sampler_logprobs": BATCH.sampler_logprobs}
    assert_same(truth(BATCH, oracles.openrlhf, **keywords), truth(BATCH, published, **keywords))


LABELS = BATCH.target_tokens.masked_fill(BATCH.mask == 0, -100)
EAFT = ((1.0, 20), (2.0, 4), (0.5, 3))  # alpha and k; of a vocabulary of 17


def of_logits(loss: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    logits = BATCH.logits.to(dtype).requires_grad_()
    value = loss(logits)
    return value.detach(), torch.autograd.grad(value, logits)[0]


def unshifted(logits: Tensor) -> tuple[Any, Tensor]:
    """As a trainer has them: the labels of a token are at the next position, the first is that of none."""
    labels = torch.cat((torch.full((B, 1), -100), LABELS), 1)
    return SimpleNamespace(logits=torch.nn.functional.pad(logits, (0, 0, 0, 1))), labels


def test_definition_of_dft():
    """Theirs is in float32."""
    axolotl, swift = oracles.published_axolotl(), oracles.published_swift()
    if axolotl is None or swift is None:
        pytest.skip("axolotl or swift is not installed")
    wanted = of_logits(lambda logits: oracles.dft(logits, LABELS))
    got = of_logits(lambda logits: axolotl.dft_loss(*unshifted(logits)))
    torch.testing.assert_close(got, wanted, check_dtype=False, rtol=1e-5, atol=1e-7)
    got = of_logits(lambda logits: swift.per_token_loss_func(*unshifted(logits), enable_dft_loss=True).sum() / N)
    torch.testing.assert_close(got, wanted, check_dtype=False, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("alpha", "k"), EAFT)
def test_definition_of_eaft(alpha, k):
    """The weights in float32, with 1e-10 added to probabilities."""
    axolotl = oracles.published_axolotl() or pytest.skip("axolotl is not installed")
    wanted = of_logits(lambda logits: oracles.eaft(logits, LABELS, alpha, k))
    got = of_logits(lambda logits: axolotl.eaft_loss(*unshifted(logits), alpha=alpha, k=k))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)


# This library against the definitions ---------------------------------------------------------------------------------


def ours(batch: Batch, name: str, a: aggregation.Aggregation | None = None, **keywords: Any) -> tuple[Tensor, Tensor]:
    """The loss and its gradient on float32 logits. A loss or keyword that does not exist yet skips the test."""
    function = getattr(fused_losses, name, None)
    if function is None or not keywords.keys() <= inspect.signature(function).parameters.keys():
        pytest.skip(f"fused_losses.{name} with {sorted(keywords)} does not exist yet")
    if a is not None:
        keywords |= {"weights": a.weights, "denominator": a.denominator}
    logits = batch.logits.float().requires_grad_()
    inputs = [batch.old_logprobs.float()] if "old_logprobs" in inspect.signature(function).parameters else []
    loss = function(logits, batch.target_tokens, *inputs, batch.advantages.float(), **keywords)
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def assert_reproduced(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    loss, gradient = (t.double() for t in got)
    assert gradient[BATCH.mask == 0].count_nonzero() == 0
    torch.testing.assert_close(loss, wanted[0], rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(gradient, wanted[1], rtol=2e-5, atol=2e-6 * float(wanted[1].abs().max()))


def clip(low: float, high: float) -> dict[str, float]:
    return {"clip_low_threshold": low, "clip_high_threshold": high}


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("name", TRL_CASES)
def test_trl(name, batch):
    keywords = trl_keywords(batch, name)
    counts = ("max_completion_length", "num_items_in_batch", "num_processes", "gradient_accumulation_steps")
    given = {k: v for k, v in keywords.items() if k in (*counts, "steps_per_generation")}
    a = aggregation.trl(batch.mask, keywords["loss_type"], **given)
    low, high = keywords.get("epsilon", 0.2), keywords.get("epsilon_high", 0.2)
    extra: dict[str, Any] = clip(1 - low, 1 + high)
    loss = "ppo"
    if keywords["loss_type"] == "cispo":
        loss, extra = "cispo", clip(0.0, high)
    elif keywords["loss_type"] == "sapo":
        loss, extra = "sapo", {"tau_positive": 1.0, "tau_negative": 1.05}
    elif keywords["loss_type"] == "vespo":
        names = {"k_pos": "k_positive", "lambda_pos": "lambda_positive"}
        names |= {"k_neg": "k_negative", "lambda_neg": "lambda_negative"}
        extra = {ours: keywords[f"vespo_{theirs}"] for theirs, ours in names.items() if f"vespo_{theirs}" in keywords}
        loss = "vespo"
        extra |= {"log_ratio_clamp": 20.0, "sequence_ratio_mask": batch.mask}
    elif keywords.get("importance_sampling_level") == "sequence":
        loss = "gspo"
        extra |= {"sequence_ratio_mask": batch.mask, "ratio_gradient": "sequence"}
    if "delta" in keywords:
        extra["delta"] = keywords["delta"]
    if "off_policy_mask_threshold" in keywords:
        threshold = keywords["off_policy_mask_threshold"]
        x = batch.logprobs(batch.logits)
        kept = off_policy_sequence_mask(
            x, batch.sampler_logprobs, batch.advantages, threshold=threshold, mask=batch.mask
        )
        if batch is BATCH:  # of the two sequences of a negative advantage
            assert kept[1].any() and not kept[4].any()
        extra["importance_weights"] = kept
    if "beta" in keywords:
        weighted = keywords.get("use_bias_correction_kl", True)
        kl = {"ref_logprobs": batch.ref_logprobs.float(), "kl_coef": keywords["beta"], "kl_weighted_by_ratio": weighted}
        extra |= kl
    assert_reproduced(ours(batch, loss, a, **extra), truth(batch, oracles.trl, **keywords))


def test_trl_importance_sampling_ratio():
    """On the objective, and not on the KL."""
    keywords = {"loss_type": "grpo", "beta": 0.3, "use_bias_correction_kl": False, "ref_logprobs": BATCH.ref_logprobs}
    ratio = (BATCH.old_logprobs - BATCH.sampler_logprobs).exp()
    wanted = truth(BATCH, oracles.trl, importance_sampling_ratio=ratio.clamp(max=2.0), **keywords)
    weights = truncated_importance_weights(BATCH.old_logprobs, BATCH.sampler_logprobs, cap=2.0, mask=BATCH.mask)
    extra = {"ref_logprobs": BATCH.ref_logprobs.float(), "kl_coef": 0.3, "importance_weights": weights}
    assert_reproduced(ours(BATCH, "ppo", aggregation.trl(BATCH.mask, "grpo"), **extra), wanted)


def test_trl_entropy_bonus():
    """A mean over all tokens beside a policy loss that is a mean over sequences: a coefficient per token."""
    logits = BATCH.logits.clone().requires_grad_()
    entropies = -(logits.log_softmax(-1) * logits.softmax(-1)).sum(-1)
    x = BATCH.logprobs(logits)
    loss = oracles.trl(
        x, BATCH.old_logprobs, BATCH.advantages, BATCH.mask, loss_type="grpo", entropies=entropies, entropy_coef=0.1
    )
    wanted = loss.detach(), torch.autograd.grad(loss, logits)[0]
    a = aggregation.trl(BATCH.mask, "grpo")
    coefficient = torch.where(BATCH.mask != 0, 0.1 * a.denominator / (a.weights * BATCH.mask.sum()), 0.0).float()
    assert_reproduced(ours(BATCH, "ppo", a, entropy_coef=coefficient), wanted)


@pytest.mark.parametrize(("mode", "keywords"), REDUCTIONS)
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_verl_ppo(mode, keywords, batch):
    wanted = truth(batch, oracles.verl_ppo, loss_agg_mode=mode, clip_ratio_low=0.1, clip_ratio_high=0.5, **keywords)
    a = aggregation.verl(batch.mask, mode, **keywords)
    assert_reproduced(ours(batch, "ppo", a, dual_clip=3.0, log_ratio_clamp=20.0, **clip(0.9, 1.5)), wanted)


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_verl_gspo(batch):
    a = aggregation.verl(batch.mask, "seq-mean-token-mean")
    got = ours(batch, "gspo", a, sequence_ratio_mask=batch.mask, **clip(0.8, 1.2))
    assert_reproduced(got, truth(batch, oracles.verl_gspo))


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_verl_cispo(batch):
    got = ours(batch, "cispo", aggregation.verl(batch.mask, "token-mean"), log_ratio_clamp=20.0, **clip(0.8, 1.2))
    assert_reproduced(got, truth(batch, oracles.verl_cispo))


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_verl_sapo(batch):
    got = ours(batch, "sapo", aggregation.verl(batch.mask, "seq-mean-token-mean"), log_ratio_clamp=20.0)
    assert_reproduced(got, truth(batch, oracles.verl_sapo))


def test_verl_dro():
    got = ours(BATCH, "dro", aggregation.verl(BATCH.mask, "token-mean"), beta=0.1)
    assert_reproduced(got, truth(BATCH, oracles.verl_dro, dro_beta=0.1))


@pytest.mark.parametrize("kind", DPPO)
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_verl_dppo(batch, kind):
    """Also with the cap that verl's own configuration has, 3."""
    bounds = {"clip_ratio_low": 0.001, "clip_ratio_high": 0.002, "clip_ratio_c": 3.0}
    wanted = truth(batch, oracles.verl_dppo, divergence=kind, **bounds)
    a = aggregation.verl(batch.mask, "token-mean")
    region = {"divergence_low": 0.001, "divergence_high": 0.002, "log_ratio_clamp": 20.0}
    assert_reproduced(ours(batch, f"dppo_{kind}", a, ratio_cap=3.0, **region), wanted)
    x = batch.logprobs(batch.logits)
    kept = oracles.in_trust_region(x, batch.old_logprobs, batch.advantages, kind, 0.001, 0.002)
    assert 2 <= kept[batch.mask != 0].sum() <= N - 2
    wanted = truth(batch, oracles.skyrl_dppo, **DPPO[kind])
    _, gradient = ours(batch, f"dppo_{kind}", weights=batch.mask.float(), reduction="sum", **region)
    assert_reproduced((wanted[0], gradient), wanted)  # the value is verl's


@pytest.mark.parametrize("weighted", (False, True))
@pytest.mark.parametrize(("mode", "keywords"), REDUCTIONS)
def test_verl_gpg_and_reinforce(mode, keywords, weighted):
    a = aggregation.verl(BATCH.mask, mode, **keywords)
    extra: dict[str, Any] = {}
    if weighted:
        keywords = keywords | {"rollout_is_weights": BATCH.sampler_logprobs.exp()}
        extra = {"importance_weights": BATCH.sampler_logprobs.exp().float()}
    wanted = truth(BATCH, oracles.verl_gpg, loss_agg_mode=mode, **keywords)
    assert_reproduced(ours(BATCH, "reinforce", a, **extra), wanted)


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_vespo_with_a_correction(batch):
    """TRL's vLLM correction is part of the sequence's ratio: as if the sampler had been another."""
    ratio = torch.where(batch.mask != 0, (batch.old_logprobs - batch.sampler_logprobs).exp().clamp(max=2.0), 1.0)
    keywords = {"loss_type": "vespo", "num_items_in_batch": 40}
    wanted = truth(batch, oracles.trl, importance_sampling_ratio=ratio, **keywords)
    a = aggregation.trl(batch.mask, "vespo", num_items_in_batch=40)
    moved = replace(batch, old_logprobs=batch.old_logprobs - ratio.log())
    assert_reproduced(ours(moved, "vespo", a), wanted)


@pytest.mark.parametrize("name", GATES)
def test_openrlhf(name):
    gate, level, (low, high) = GATES[name]
    x, q, mask = BATCH.old_logprobs, BATCH.sampler_logprobs, BATCH.mask
    level = "sequence_mean" if level == "seq" else "token"
    weights = gated_importance_weights(x, q, gate=gate, low=low, high=high, level=level, mask=mask)
    assert 2 <= weights.count_nonzero() <= N - 2
    if name == "ratio":
        assert torch.equal(weights, masked_importance_weights(x, q, low=low, high=high, mask=mask))
    wanted = truth(BATCH, oracles.openrlhf, sampler_logprobs=q, **gate_keywords(name))
    a = aggregation.verl(mask, "token-mean")
    assert_reproduced(ours(BATCH, "ppo", a, log_ratio_clamp=20.0, importance_weights=weights), wanted)


def fine_tuned(loss: Callable[[Tensor], Tensor], oracle: Callable[[Tensor], Tensor]) -> None:
    assert_reproduced(of_logits(loss, torch.float32), of_logits(oracle))


def test_dft():
    fine_tuned(lambda logits: fused_losses.dft(logits, LABELS), lambda logits: oracles.dft(logits, LABELS))


@pytest.mark.parametrize(("alpha", "k"), EAFT)
def test_eaft(alpha, k):
    def loss(logits):
        weights = fused_losses.entropy_weights(logits, alpha=alpha, top_k=k)
        return fused_losses.cross_entropy(logits, LABELS, weights=weights, denominator=N)

    fine_tuned(loss, lambda logits: oracles.eaft(logits, LABELS, alpha, k))


@pytest.mark.parametrize("kind", ("k1", "k2", "k3", "abs"))
def test_verl_kl(kind):
    """verl adds the KL loss to the policy loss, aggregated alike."""

    def oracle(x, q, a, m):
        kl = oracles.verl_kl(x, BATCH.ref_logprobs, kind)
        return oracles.verl_ppo(x, q, a, m) + 0.3 * oracles.verl_reduce(kl, m, "token-mean")

    extra = {"ref_logprobs": BATCH.ref_logprobs.float(), "kl_coef": 0.3, "kl_type": kind, "dual_clip": 3.0}
    got = ours(BATCH, "ppo", aggregation.verl(BATCH.mask, "token-mean"), **extra)
    assert_reproduced(got, truth(BATCH, oracle))


@pytest.mark.parametrize("level", ("token", "sequence"))
@pytest.mark.parametrize("low", (None, 0.5))
def test_verl_importance_weights(level, low):
    x, q, mask = BATCH.old_logprobs, BATCH.sampler_logprobs, BATCH.mask
    if low is None:
        weights = truncated_importance_weights(x, q, cap=2.0, level=level, mask=mask)
    else:
        weights = masked_importance_weights(x, q, low=low, high=2.0, level=level, mask=mask)
    wanted = oracles.verl_importance_weights(x, q, mask, level=level, high=2.0, low=low)
    torch.testing.assert_close(weights, wanted.float())
    a = aggregation.verl(mask, "token-mean")
    got = ours(BATCH, "ppo", a, dual_clip=3.0, importance_weights=weights)
    assert_reproduced(got, truth(BATCH, oracles.verl_ppo, rollout_is_weights=wanted))


@pytest.mark.parametrize("loss_reduction", aggregation.SKYRL_LOSS_REDUCTIONS)
@pytest.mark.parametrize("dual_clip", (None, 3.0))
def test_skyrl(loss_reduction, dual_clip):
    a = aggregation.skyrl(FAR.mask, loss_reduction, max_seq_len=9)
    extra = {} if dual_clip is None else {"dual_clip": dual_clip}
    wanted = truth(FAR, oracles.skyrl_ppo, loss_reduction=loss_reduction, max_seq_len=9, clip_ratio_c=dual_clip)
    assert_reproduced(ours(FAR, "ppo", a, log_ratio_clamp=20.0, **extra), wanted)


@pytest.mark.parametrize("loss_fn", ("importance_sampling", "ppo", "cispo", "dro", "gspo"))
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_tinker(loss_fn, batch):
    bounds = {"ppo": clip(0.8, 1.2), "gspo": clip(0.8, 1.2), "cispo": clip(0.0, 4.0)}.get(loss_fn, {})
    extra = bounds | ({"sequence_ratio_mask": batch.mask} if loss_fn == "gspo" else {})
    if not hasattr(fused_losses, loss_fn):
        pytest.skip(f"fused_losses.{loss_fn} does not exist yet")
    got = ours(batch, loss_fn, weights=batch.mask.float(), reduction="sum", **extra)
    assert_reproduced(got, truth(batch, oracles.tinker, loss_fn=loss_fn))
