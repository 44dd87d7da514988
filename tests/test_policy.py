"""Losses of whole sequences, objectives of the user's own, and the metrics."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import formulas
import pytest
import torch
from cases import POLICY_LOSSES, make, run
from test_gradients import allocations
from torch import Tensor

import fused_losses
from fused_losses import Objective, reference
from fused_losses.objectives import OBJECTIVES

INF, NAN = math.inf, math.nan
B, T, VOCAB = 4, 6, 31
LENGTHS = (6, 3, 0, 4)


class Batch:
    """B sequences of different lengths, one of them empty, with finite numbers that float32 holds."""

    def __init__(self, device: torch.device, spread: float = 0.15):
        generator = torch.Generator().manual_seed(3)
        self.logits = (2 * torch.randn(B, T, VOCAB, generator=generator)).to(device)
        target = torch.randint(VOCAB, (B, T), generator=generator)
        x = torch.log_softmax(self.logits.double().cpu(), -1).gather(-1, target[..., None])[..., 0]
        self.old_logprobs = (x - spread * torch.randn(B, T, generator=generator)).float().to(device)
        self.advantages = torch.tensor([[1.5], [-0.7], [1.0], [-2.0]], device=device)
        self.mask = (torch.arange(T) < torch.tensor(LENGTHS)[:, None]).to(device)
        self.target_tokens = target.to(device).where(self.mask, -100)

    def packed(self) -> tuple[tuple[Tensor, ...], Tensor]:
        """(logits, targets, old logprobs, advantages) without padding, and cu_seqlens."""
        advantages = self.advantages.expand(B, T)
        flat = tuple(t[self.mask] for t in (self.logits, self.target_tokens, self.old_logprobs, advantages))
        return flat, torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], device=self.logits.device)


def sequence_loss(batch: Batch, logits: Tensor, name: str, gradient: str, **bounds: Any) -> Tensor:
    """Per token, from the definition: a loop over sequences in float64."""
    losses = torch.zeros(B, T, dtype=torch.float64, device=logits.device)
    log_p = torch.log_softmax(logits, -1)
    for b, length in enumerate(LENGTHS):
        if length == 0:
            continue
        x = log_p[b, :length].gather(-1, batch.target_tokens[b, :length, None])[:, 0]
        q, a = batch.old_logprobs[b, :length].double(), batch.advantages[b].double().expand(length)
        if name == "gmpo":
            low, high = (math.log(bounds[f"clip_{which}_threshold"]) for which in ("low", "high"))
            difference = x - q
            difference = difference.clamp(max=high) if a[0] > 0 else difference.clamp(min=low)
            losses[b, :length] = -a * difference.mean().exp()
            continue
        if name == "vespo":
            defaults = {"k_positive": 2.0, "lambda_positive": 3.0, "k_negative": 3.0, "lambda_negative": 2.0}
            k, rate = ((defaults | bounds)[f"{n}_{'negative' if a[0] < 0 else 'positive'}"] for n in ("k", "lambda"))
            w = (x - q).sum().exp().detach()
            losses[b, :length] = -(w**k) * torch.exp(rate * (1 - w)) * a * x
            continue
        m = (x - q).mean().expand(length)
        log_ratio = m if gradient == "sequence" else m.detach() + x - x.detach()
        kind = "ppo" if name == "gspo" else "sapo"
        losses[b, :length] = formulas.objective(kind, log_ratio, torch.zeros_like(x), a, **bounds)
    return losses


SEQUENCE: dict[str, tuple[str, dict[str, Any]]] = {
    "gspo": ("gspo", {"clip_low_threshold": 0.97, "clip_high_threshold": 1.02}),
    "gspo, wide": ("gspo", {"clip_low_threshold": 0.2, "clip_high_threshold": 4.0}),
    "gspo, dual clip and delta": (
        "gspo",
        {"clip_low_threshold": 0.9, "clip_high_threshold": 1.02, "dual_clip": 1.05, "delta": 1.5},
    ),
    "gspo, clamped": (
        "gspo",
        {"clip_low_threshold": 0.2, "clip_high_threshold": 4.0, "log_ratio_clamp": 0.01},
    ),
    "gmpo": ("gmpo", {"clip_low_threshold": 0.95, "clip_high_threshold": 1.1}),
    "sapo": ("sapo", {"tau_positive": 1.0, "tau_negative": 2.0}),
    "vespo": ("vespo", {}),
    "vespo, other weights": (
        "vespo",
        {"k_positive": 0.5, "lambda_positive": 0.1, "k_negative": 0.0, "lambda_negative": 4.0},
    ),
}
ONE_GRADIENT = ("gmpo", "vespo")


@pytest.mark.parametrize("gradient", ["token", "sequence"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("case", SEQUENCE)
def test_sequence_loss(backend, device, case, packed, gradient):
    name, bounds = SEQUENCE[case]
    if name in ONE_GRADIENT and gradient == "token":
        pytest.skip(f"{name} has one gradient")
    keywords: dict[str, Any] = dict(bounds)
    keywords |= {} if name in ONE_GRADIENT else {"ratio_gradient": gradient}
    keywords |= {"ratio_level": "sequence"} if name == "sapo" else {}
    batch = Batch(device)
    truth = batch.logits.double().requires_grad_()
    losses = sequence_loss(batch, truth, name, gradient, **bounds)
    weights = torch.rand(B, T, device=device).double()
    expected = (losses * weights.where(batch.mask, 0.0)).sum() / 3.0
    expected.backward()
    for function in (getattr(fused_losses, name), getattr(reference, name)):
        leaf = batch.logits.clone().requires_grad_()
        given = (leaf, batch.target_tokens, batch.old_logprobs, batch.advantages)
        options: dict[str, Any] = {"weights": weights.float(), "denominator": 3.0, "backend": backend, **keywords}
        if packed:
            (_, *flat), cu_seqlens = batch.packed()
            given = (leaf[batch.mask], *flat)
            options |= {"weights": weights.float()[batch.mask], "cu_seqlens": cu_seqlens}
        loss, outputs = function(*given, return_outputs=True, **options)
        loss.backward()
        # vespo's log ratio is a sum, not a mean, of T logprobs, and phi up to k + lambda w times as sensitive to it
        amplified = T * 3.0 if name == "vespo" else 1.0
        size = (losses.detach().abs() * weights.where(batch.mask, 0.0)).sum().item() / 3.0  # of what may cancel
        torch.testing.assert_close(loss.double(), expected.detach(), rtol=0, atol=2e-6 * amplified * size)
        torch.testing.assert_close(leaf.grad.double(), truth.grad, rtol=2e-5, atol=1e-6 * amplified)
        assert outputs.logprobs.shape == given[1].shape


@pytest.mark.parametrize("name", ["gspo", "gmpo", "sapo", "vespo"])
def test_sequence_loss_and_garbage_in_masked_tokens(backend, device, name):
    """Neither padding nor what it holds reaches the other tokens of its sequence."""
    batch = Batch(device)
    options: dict[str, Any] = {"entropy_coef": 0.1, "backend": backend}
    options |= {"ratio_level": "sequence"} if name == "sapo" else {}
    options |= {} if name in ONE_GRADIENT else {"ratio_gradient": "sequence"}
    for reduction in ("mean", "none"):
        results = []
        for garbage in (0.0, NAN, INF):
            leaf = batch.logits.masked_fill(~batch.mask[..., None], garbage).requires_grad_()
            old = batch.old_logprobs.masked_fill(~batch.mask, garbage)
            advantages = batch.advantages.expand(B, T).masked_fill(~batch.mask, garbage)
            weights = batch.mask.float() if garbage else None
            loss = getattr(fused_losses, name)(
                leaf, batch.target_tokens, old, advantages, weights=weights, reduction=reduction, **options
            )
            loss.sum().backward()
            results.append((loss.detach(), leaf.grad))
            assert not leaf.grad[~batch.mask].any()
        for got in results[1:]:
            torch.testing.assert_close(got, results[0], rtol=0, atol=0)


def test_a_bad_sequence_stays_alone(backend, device):
    batch = Batch(device)
    batch.logits[1, 0, 0] = NAN
    leaf = batch.logits.clone().requires_grad_()
    loss = fused_losses.gspo(
        leaf, batch.target_tokens, batch.old_logprobs, batch.advantages, reduction="none", backend=backend
    )
    loss.sum().backward()
    assert loss.isnan().any(1).tolist() == [False, True, False, False]
    assert torch.isfinite(leaf.grad[[0, 2, 3]]).all() and leaf.grad[1, 0].isnan().all()


@pytest.mark.parametrize("gradient", ["token", "sequence"])
def test_impossible_token_of_a_sequence(backend, device, gradient):
    """logp = -inf: the sequence's ratio is 0, and so are loss and gradient; as for ppo."""
    logits = torch.zeros(1, 3, 4, device=device)
    logits[0, 0, 3] = -INF
    logits.requires_grad_()
    target = torch.tensor([[3, 1, 2]], device=device)
    loss = fused_losses.gspo(logits, target, -1.0, 1.0, reduction="none", ratio_gradient=gradient, backend=backend)
    loss.sum().backward()
    assert not loss.any() and not logits.grad.isnan().any()


@pytest.mark.parametrize("loss", [fused_losses.vespo, reference.vespo], ids=["here", "reference"])
def test_hazards_of_vespo(backend, device, loss):
    """A sequence: a ratio that overflows, one of 0, advantage 0, a NaN, a bad exponent; each in its own row."""
    logits = torch.zeros(6, 2, 4, device=device)
    logits[1, 0, 3] = -INF
    logits.requires_grad_()
    target = torch.tensor([3, 1], device=device).expand(6, 2)
    old = torch.tensor([-2000.0, -1.0, -INF, -1.0, NAN, -1.0], device=device)[:, None].expand(6, 2)
    advantages = torch.tensor([1.0, -1.0, 0.0, NAN, 1.0, 1.0], device=device)[:, None]
    k = torch.tensor([2.0, 2.0, 2.0, 2.0, 2.0, -1.0], device=device)[:, None]
    losses = loss(logits, target, old, advantages, k_positive=k, reduction="none", backend=backend)
    losses.sum().backward()
    assert not losses[:3].any() and not logits.grad[:3].any()
    assert losses[3:].isnan().all() and logits.grad[3:].isnan().all()


def test_vespo_at_its_own_policy(backend, device):
    """phi(1) is 1: the loss is that of reinforce."""
    batch = Batch(device)
    old = reference.logprobs(batch.logits, batch.target_tokens)
    results = []
    for given in ((fused_losses.vespo, old), (fused_losses.reinforce,)):
        leaf = batch.logits.clone().requires_grad_()
        loss = given[0](leaf, batch.target_tokens, *given[1:], batch.advantages, backend=backend)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(*results)


def test_sequence_ratio_mask(backend, device):
    """The ratio of a sequence may be made of other tokens than those that are trained on."""
    batch = Batch(device)
    chosen = torch.zeros(B, T, device=device)
    chosen[:, 1] = 1.0
    given = (batch.logits, batch.target_tokens, batch.old_logprobs, batch.advantages)
    options: dict[str, Any] = {"reduction": "none", "clip_low_threshold": 0.0, "clip_high_threshold": 9.0}
    got = fused_losses.gspo(*given, sequence_ratio_mask=chosen, backend=backend, **options)
    x = reference.logprobs(batch.logits, batch.target_tokens)
    ratio = torch.exp((x - batch.old_logprobs)[:, 1:2]).where(batch.mask[:, 1:2], 1.0)
    torch.testing.assert_close(got, (-ratio * batch.advantages).where(batch.mask, 0.0), rtol=1e-5, atol=1e-6)
    without = fused_losses.gspo(*given, sequence_ratio_mask=chosen, weights=1 - chosen, backend=backend, **options)
    assert not without[:, 1].any()
    torch.testing.assert_close(without[:, 2:], got[:, 2:])


def test_sequence_loss_memory(kernels, device):
    """One V-sized buffer, the gradient."""
    logits = torch.randn(8, 2048, device=device, requires_grad=True)
    target, old = torch.randint(2048, (8,), device=device), torch.full((8,), -8.0, device=device)
    cu_seqlens = torch.tensor([0, 5, 8], device=device)

    def forward_and_backward() -> None:
        loss = fused_losses.gspo(logits, target, old, 1.0, cu_seqlens=cu_seqlens, entropy_coef=0.1, backend=kernels)
        torch.autograd.grad(loss, logits)

    forward_and_backward()
    assert allocations(forward_and_backward, device, logits.nbytes) == 1


# ---- policy_loss ----


@pytest.mark.parametrize("objective", POLICY_LOSSES)
def test_ours_by_name(backend, device, objective):
    """The built-in losses go through the same door."""
    case = make(objective, (2, 3), 31, device=device, entropy_coef=0.1)
    inputs = [case.keywords.pop(name) for name in OBJECTIVES[objective].inputs]
    for mode in ({}, {"reduction": "none"}, {"recompute": True}):
        keywords = {"reduction": "sum", **case.keywords, **mode}
        gradients, losses = [], []
        for function in (fused_losses.policy_loss, getattr(fused_losses, objective)):
            leaf = case.storage.clone().requires_grad_()
            named = (objective,) if function is fused_losses.policy_loss else ()
            loss = function(leaf, case.target_tokens, *named, *inputs, backend=backend, **keywords)
            loss.sum().backward()
            losses.append(loss.detach())
            gradients.append(leaf.grad)
        assert torch.equal(*losses) and torch.equal(*gradients)


def clipped(logp: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
    ratio = torch.exp(logp - old_logprobs)
    return -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)


TERMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weights": {"weights": torch.tensor([[1.0, 0.0, 2.0], [0.5, 1.0, 1.0]])},
    "sum": {"reduction": "sum", "denominator": 7.0},
    "none": {"reduction": "none"},
    "terms": {"entropy_coef": 0.1, "kl_coef": 0.2, "ref_logprobs": -2.0, "importance_weights": 0.5, "softcap": 9.0},
    "KL by ratio": {"kl_coef": 0.2, "ref_logprobs": -2.0, "kl_weighted_by_ratio": True, "log_ratio_clamp": 5.0},
}


@pytest.mark.parametrize("terms", TERMS)
def test_function_per_token(backend, device, terms):
    """A torch function gives what the built-in loss gives, with everything else a loss may hold."""
    case = make("ppo", (2, 3), 31, device=device)
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in TERMS[terms].items()}
    old, advantages = case.keywords["old_logprobs"], case.keywords["advantages"]
    results = []
    for function in (
        lambda leaf: fused_losses.policy_loss(
            leaf, case.target_tokens, clipped, old, advantages, backend=backend, **options
        ),
        lambda leaf: fused_losses.ppo(leaf, case.target_tokens, old, advantages, backend=backend, **options),
    ):
        leaf = case.storage.clone().requires_grad_()
        loss = function(leaf)
        loss.sum().backward()
        results.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


FAR = {"kl_coef": 1.0, "ref_logprobs": -2.5, "kl_weighted_by_ratio": True}
TWO_PHASE = {
    "gmpo": lambda *args, **kwargs: fused_losses.gmpo(*args, **kwargs),
    "gspo": lambda *args, **kwargs: fused_losses.gspo(*args, **kwargs),
    "sapo": lambda *args, **kwargs: fused_losses.sapo(*args, ratio_level="sequence", **kwargs),
    "function": lambda x, t, q, a, **kwargs: fused_losses.policy_loss(x, t, clipped, q, a, **kwargs),
}


@pytest.mark.parametrize("loss", TWO_PHASE)
def test_ratio_times_k3_does_not_cancel(backend, device, loss):
    """As in the losses of one pass: what k3 and its derivative are made of is 5e8 times as large as their sum here."""
    logits = torch.tensor([[[-22.0, 0.0, 0.0], [-21.0, 0.0, 0.0]]], device=device, requires_grad=True)
    target = torch.zeros(1, 2, dtype=torch.int64, device=device)
    old, zero = torch.full((1, 2), -20.0, device=device), torch.zeros(1, 2, device=device)
    (got,) = torch.autograd.grad(TWO_PHASE[loss](logits, target, old, zero, backend=backend, **FAR), logits)
    x = torch.log_softmax(logits.double(), -1)[..., 0]
    log_ratio = x - old if loss in ("gmpo", "function") else (x - old).mean(-1, keepdim=True).detach() + x - x.detach()
    d = x + 2.5
    penalty = torch.exp(log_ratio) * (torch.exp(-d) + d - 1)
    (expected,) = torch.autograd.grad(penalty.mean(), logits)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("ratio_gradient", ["token", "sequence"])
def test_penalty_of_a_hopeless_sequence(backend, device, ratio_gradient):
    """A token of logprob -inf, and a coefficient of 0 beside a ratio that overflows: no NaN in another sequence, none
    where the coefficient is 0."""
    logits = torch.randn(3, 2, 5, device=device)
    logits[0, 1, 0] = -torch.inf
    logits.requires_grad_()
    target = torch.zeros(3, 2, dtype=torch.int64, device=device)
    old = torch.tensor([[-1.6], [-200.0], [-1.6]], device=device)
    options = {"ratio_gradient": ratio_gradient, "kl_weighted_by_ratio": True, "ref_logprobs": -1.5, "kl_type": "k2"}
    coefficient = torch.tensor([[0.1], [0.0], [0.1]], device=device)
    loss = fused_losses.gspo(
        logits, target, old, 1.0, kl_coef=coefficient, reduction="none", backend=backend, **options
    )
    (gradient,) = torch.autograd.grad(loss[1:].sum(), logits)
    assert not loss.isnan().any() and torch.isfinite(loss[2]).all()
    assert torch.isfinite(gradient[1:]).all() and gradient[2].any()


def test_small_weight_and_half_precision(backend, device):
    """A number that float16 does not have is not 0."""
    case = make("ppo", (2, 3), 31, torch.float16, device)
    given = (case.storage, case.target_tokens, case.keywords["old_logprobs"], 1.0)
    one = fused_losses.gspo(*given, reduction="sum", backend=backend)
    small = fused_losses.gspo(*given, reduction="sum", weights=1e-8, backend=backend)
    torch.testing.assert_close(small * 1e8, one)


@pytest.mark.parametrize("terms", TERMS)
def test_reference_of_policy_loss(terms):
    """A function, an Objective and a name are the same in the reference, too, in float64 here."""
    case = make("ppo", (2, 3), 31)
    old, advantages = case.keywords["old_logprobs"], case.keywords["advantages"]
    results = []
    for objective in (clipped, "ppo", OBJECTIVES["ppo"], None):
        leaf = case.storage.double().requires_grad_()
        given = (leaf, case.target_tokens, *([] if objective is None else [objective]), old, advantages)
        bounds = (0.8, 1.2) if isinstance(objective, Objective) else ()
        function = reference.ppo if objective is None else reference.policy_loss
        loss, outputs = function(*given, *bounds, return_outputs=True, **TERMS[terms])
        loss.sum().backward()
        results.append((loss.detach(), leaf.grad, outputs.logprobs))
    for result in results[:-1]:
        torch.testing.assert_close(result, results[-1], rtol=1e-12, atol=1e-14)


def test_function_of_the_whole_batch(backend, device):
    """A 0-d loss, DPO's here, whose tokens depend on each other; KL and entropy are added to it."""
    logits = torch.randn(4, 5, 31, device=device)
    target = torch.randint(31, (4, 5), device=device)

    def preference(logp: Tensor, beta: float) -> Tensor:
        chosen, rejected = logp.sum(-1).view(2, 2).unbind()
        return -torch.nn.functional.logsigmoid(beta * (chosen - rejected)).mean()

    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    loss = fused_losses.policy_loss(ours, target, preference, 0.1, entropy_coef=0.2, backend=backend)
    log_p = torch.log_softmax(theirs, -1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    expected = preference(log_p.gather(-1, target[..., None])[..., 0], 0.1) - 0.2 * entropy.mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    for wrong in ({"reduction": "none"}, {"importance_weights": 0.5}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}.*0-d"):
            fused_losses.policy_loss(ours, target, preference, 0.1, backend=backend, **wrong)


def formula(logp: Tensor, scores: Tensor, power: Tensor) -> tuple[Tensor, Tensor]:
    return -scores * torch.exp(power * logp), -scores * power * torch.exp(power * logp)


def test_objective_of_the_user(backend, device):
    """One pass where the backend has a kernel for it, else two phase; the same numbers."""
    objective = Objective("power", formula, ("scores", "power"))
    logits, target = torch.randn(6, 31, device=device), torch.randint(31, (6,), device=device)
    target[2] = -100
    scores = torch.randn(6, device=device)
    for terms in ({}, {"entropy_coef": 0.1, "softcap": 9.0}):
        results = []
        for given in (objective, lambda logp, s, p: formula(logp, s, p)[0]):
            leaf = logits.clone().requires_grad_()
            loss = fused_losses.policy_loss(leaf, target, given, scores, 0.5, backend=backend, **terms)
            loss.backward()
            results.append((loss.detach(), leaf.grad))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "objective, inputs, error, message",
    [
        ("advantage", (), ValueError, "objective.*ppo.*advantage"),
        (3, (), TypeError, "objective.*int"),
        ("ppo", (-1.0,), ValueError, "ppo.*advantages"),
        ("ppo", (-1.0,) * 9, ValueError, "ppo.*9 inputs"),
        (lambda logp: logp[:1], (), ValueError, r"objective.*\(2, 3\).*\(1, 3\)"),
        (lambda logp: 3.0, (), ValueError, "objective.*float"),
        (Objective("power", formula, ("scores", "power")), (1.0,), ValueError, "power.*power"),
        (Objective("power", formula, ("scores", "weights")), (1.0, 1.0), ValueError, "weights"),
        (Objective("ppo", formula, ("scores",)), (1.0,), ValueError, "objective.*ppo"),
        (Objective("power", formula, ("scores", "power")), (torch.zeros(4), 1.0), ValueError, r"scores.*\(4,\)"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_policy_loss_error(objective, inputs, error, message):
    logits, target = torch.randn(2, 3, 5, requires_grad=True), torch.zeros(2, 3, dtype=torch.int64)
    for backend in ("eager", "auto"):
        with pytest.raises(error, match=f"(?s){message}"):
            fused_losses.policy_loss(logits, target, objective, *inputs, backend=backend)


ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "cu_seqlens.*6.*5"),
    ({"cu_seqlens": [0, 6]}, TypeError, "cu_seqlens.*list"),
    ({"ratio_gradient": "both"}, ValueError, "ratio_gradient.*both"),
    ({"sequence_ratio_mask": "all"}, TypeError, "sequence_ratio_mask.*str"),
    ({"sequence_ratio_mask": torch.ones(4)}, (ValueError, RuntimeError), "mask|size"),
    ({"clip_low_threshold": 1.3}, ValueError, "clip_low_threshold.*1.3"),
    ({"dual_clip": 0.5}, ValueError, "dual_clip.*0.5"),
    ({"old_logprobs": None}, TypeError, "old_logprobs.*NoneType"),
    ({"advantages": torch.zeros(4)}, ValueError, r"advantages.*\(4,\)"),
    ({"inplace": True}, ValueError, "inplace"),
    ({"kl_coef": 0.1}, ValueError, "kl_coef.*ref_logprobs"),
    ({"clip_low_threshold": torch.full((2, 3), -1.0), "validate": True}, ValueError, "clip_low_threshold"),
    ({"weights": "all"}, TypeError, "weights.*str"),
]


@pytest.mark.parametrize("wrong, error, message", ERRORS, ids=lambda v: v if isinstance(v, str) else "")
def test_sequence_loss_error(wrong, error, message):
    logits = torch.randn(2, 3, 5, requires_grad=True)
    given = {"old_logprobs": -1.0, "advantages": 1.0, "backend": "eager"} | wrong
    with pytest.raises(error, match=f"(?s){message}"):
        fused_losses.gspo(logits, torch.zeros(2, 3, dtype=torch.int64), **given)


# ---- Metrics ----


def test_metrics(backend, device):
    case = make("ppo", (3, 4), 31, device=device, entropy_coef=0.1)
    case.keywords["old_logprobs"] = case.keywords["old_logprobs"] * 1.1
    weights = torch.ones(3, 4, device=device)
    weights[0, 0] = 0.0
    case.keywords["old_logprobs"][0, 0] = NAN
    case = case.having(weights=weights)
    outputs = case.public(backend)(case.logits, case.target_tokens, return_outputs=True, **case.keywords)[1]
    metrics = outputs.metrics
    assert all(m.dim() == 0 and m.dtype == torch.float32 and not m.requires_grad for m in metrics.values())

    active = (case.target_tokens != -100) & (weights != 0)
    x, entropy = reference.logprobs(case.logits.double(), case.target_tokens, return_entropy=True)
    x, q, a = (t[active].double() for t in (x, case.keywords["old_logprobs"], case.keywords["advantages"]))
    r = torch.exp(x - q)
    expected = {
        "tokens": active.sum(),
        "logprob_mean": x.mean(),
        "entropy_mean": entropy[active].mean(),
        "ratio_mean": r.mean(),
        "ratio_min": r.min(),
        "ratio_max": r.max(),
        "clip_fraction_low": ((a < 0) & (r < 0.8)).double().mean(),
        "clip_fraction_high": ((a > 0) & (r > 1.2)).double().mean(),
        "approximate_kl_k1": (q - x).mean(),
        "approximate_kl_k3": (r - 1 - (x - q)).mean(),
        "logprob_difference_mean": (x - q).abs().mean(),
        "logprob_difference_max": (x - q).abs().max(),
        "effective_sample_size": r.sum() ** 2 / (len(r) * (r**2).sum()),
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name].double(), value.double(), rtol=2e-5, atol=1e-6, msg=name)
    assert 0 < metrics["clip_fraction_low"] + metrics["clip_fraction_high"] < 1


@pytest.mark.parametrize("shape", [(0,), (4,)])
def test_metrics_of_nothing(backend, device, shape):
    """No active token: zeros, no NaN."""
    case = make("ppo", shape, 31, device=device, weights=0.0)
    outputs = case.public(backend)(case.logits, case.target_tokens, return_outputs=True, **case.keywords)[1]
    assert not any(m.item() for m in outputs.metrics.values())


def test_metrics_of_an_overflowing_ratio(backend, device):
    case = make("ppo", (4,), 31, device=device, ignored=False)
    case.keywords["old_logprobs"][1] = -200.0
    outputs = case.public(backend)(case.logits, case.target_tokens, return_outputs=True, **case.keywords)[1]
    assert outputs.metrics["effective_sample_size"].item() == pytest.approx(0.25)
    assert outputs.metrics["ratio_max"] == INF


def test_metrics_of_a_sequence_loss(backend, device):
    """Ratios and clip fractions are those of the sequences, as the objective sees them."""
    batch = Batch(device)
    given = (batch.logits, batch.target_tokens, batch.old_logprobs, batch.advantages)
    bounds = {"clip_low_threshold": 0.97, "clip_high_threshold": 1.02}
    metrics = fused_losses.gspo(*given, return_outputs=True, backend=backend, **bounds)[1].metrics
    x = reference.logprobs(batch.logits, batch.target_tokens)
    rows = [math.exp((x - batch.old_logprobs)[b, :n].mean()) for b, n in enumerate(LENGTHS) if n]
    assert metrics["ratio_max"].item() == pytest.approx(max(rows), rel=1e-5)
    assert metrics["ratio_min"].item() == pytest.approx(min(rows), rel=1e-5)


def test_metrics_do_not_cost_until_asked_for(backend, device, monkeypatch):
    case = make("ppo", (4,), 31, device=device)
    called = []
    where = torch.where
    monkeypatch.setattr(torch, "exp", lambda *args, exp=torch.exp: called.append(1) or exp(*args))
    assert where is torch.where
    outputs = case.public(backend)(case.logits, case.target_tokens, return_outputs=True, **case.keywords)[1]
    before = len(called)
    assert outputs.metrics and len(called) > before


def test_metrics_compile(backend, device):
    torch._dynamo.reset()
    case = make("ppo", (4,), 31, device=device)

    def step(logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss, outputs = case.public(backend)(logits, case.target_tokens, return_outputs=True, **case.keywords)
        return loss, outputs.metrics

    got = torch.compile(step, fullgraph=True, backend="aot_eager")(case.logits)
    torch.testing.assert_close(got, step(case.logits))


COMPOSED: dict[str, Callable[..., Tensor]] = {
    "gspo": lambda *args, **kw: fused_losses.gspo(*args, entropy_coef=0.1, **kw),
    "gmpo": lambda *args, **kw: fused_losses.gmpo(*args, **kw),
    "vespo": lambda *args, **kw: fused_losses.vespo(*args, **kw),
    "sapo": lambda *args, **kw: fused_losses.sapo(*args, ratio_level="sequence", ratio_gradient="sequence", **kw),
    "function": lambda x, t, q, a, **kw: fused_losses.policy_loss(x, t, clipped, q, a.expand_as(q), **kw),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_composed_losses_compile(backend, device, name):
    torch._dynamo.reset()
    batch = Batch(device)

    def step(logits: Tensor) -> Tensor:
        return COMPOSED[name](2 * logits, batch.target_tokens, batch.old_logprobs, batch.advantages, backend=backend)

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = batch.logits.clone().requires_grad_()
        loss = function(leaf)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(*results)


def test_no_gradient_wanted(backend, device):
    batch = Batch(device)
    for name in COMPOSED:
        with torch.no_grad():
            loss = COMPOSED[name](
                batch.logits, batch.target_tokens, batch.old_logprobs, batch.advantages, backend=backend, inplace=True
            )
        assert torch.isfinite(loss) and not loss.requires_grad
    case = make("ppo", (4,), 31, device=device)
    assert torch.isfinite(run(case.public(backend), case).loss)
