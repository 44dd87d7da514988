"""Losses on logprobs: those on logits, and their derivatives by the logprob and the entropy."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from cases import make
from test_terms import OPTIONS, drawn

import fused_losses
from fused_losses import keywords, on_logprobs, reference
from fused_losses.objectives import OBJECTIVES

NOT_HERE = {"logits", "target_tokens", "ignore_index", "inplace", "recompute", "upstream", "backend", "temperature"}
NOT_HERE |= {"softcap", "logit_scale", "label_smoothing", "z_loss"}
each = pytest.mark.parametrize("name", keywords.ON_LOGPROBS)


@each
def test_signature(name):
    """Keywords, their order and defaults are those of the loss on logits, less what is about logits."""
    here, there = (inspect.signature(getattr(module, name)).parameters for module in (on_logprobs, fused_losses))
    kept = [parameter for parameter in there if parameter not in NOT_HERE]
    assert [parameter for parameter in here if parameter not in ("logprobs", "entropy")] == kept
    assert next(iter(here)) == "logprobs" and all(here[k].default == there[k].default for k in kept)
    assert inspect.getdoc(getattr(on_logprobs, name)) == keywords.docstring(name, keywords.ON_LOGPROBS)


def test_every_loss_is_there():
    assert set(keywords.ON_LOGPROBS) == set(keywords.LOSSES) - {"logprobs", "statistics"}


def both(name, options, positional=(), dtype=torch.float64, shape=(3, 5), vocab=17):
    """(loss, d/dlogprobs, d/dentropy) by the reference on logits, and by on_logprobs of its logprobs."""
    torch.manual_seed(1)
    logits = (3 * torch.randn(*shape, vocab, dtype=dtype)).requires_grad_()
    targets = torch.randint(vocab, shape)
    logprobs, entropy = reference.logprobs(logits, targets, return_entropy=True)
    on_rows = getattr(reference, name)(logits, targets, *positional, **options)
    with_entropy = {"entropy": entropy} if positional else {}
    on_numbers = getattr(on_logprobs, name)(logprobs, *positional, **with_entropy, **options)
    return on_rows, on_numbers, logits


def inputs_of(name, shape=(3, 5)):
    torch.manual_seed(2)
    old, advantages = torch.randn(shape, dtype=torch.float64) - 3, torch.randn(shape[0], 1, dtype=torch.float64)
    if name in OBJECTIVES:
        given = {"old_logprobs": old, "advantages": advantages}
        return tuple(given[column] for column in OBJECTIVES[name].inputs)
    return ("ppo", old, advantages) if name == "policy_loss" else (old, advantages)


@each
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_same_loss_and_gradient(name, reduction):
    """The gradient of the logits through the logprobs is that of the loss on logits."""
    options = {"reduction": reduction, "weights": torch.rand(3, 5, dtype=torch.float64).round(decimals=1)}
    if inputs_of(name):
        options |= {"entropy_coef": 0.3, "kl_coef": 0.2, "ref_logprobs": torch.full((3, 5), -2.0)}
    on_rows, on_numbers, logits = both(name, options, inputs_of(name))
    torch.testing.assert_close(on_numbers, on_rows, rtol=1e-12, atol=1e-12)
    (truth,) = torch.autograd.grad(on_rows.sum(), logits, retain_graph=True)
    (found,) = torch.autograd.grad(on_numbers.sum(), logits)
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-12)


OF_POLICY = [(loss, name, option) for loss, name, option in OPTIONS if loss != "cross_entropy"]


@pytest.mark.parametrize("objective, name, option", OF_POLICY, ids=lambda v: v if isinstance(v, str) else "")
def test_options(objective, name, option):
    """What a policy loss may have beside its objective. A token whose target is ignored has weight 0 here."""
    case = make(objective, (7,), 33, torch.float32, **drawn(option))
    transform = {k: case.keywords[k] for k in ("temperature", "softcap", "logit_scale") if k in case.keywords}
    terms = {k: as_float64(v) for k, v in case.keywords.items() if k not in transform}
    logits = case.logits.double().requires_grad_()
    truth = getattr(reference, objective)(logits, case.target_tokens, **terms, **transform)
    logprobs, entropy = reference.logprobs(logits, case.target_tokens, return_entropy=True, **transform)
    terms["weights"] = (case.target_tokens != -100).double() * terms.get("weights", 1.0)
    loss = getattr(on_logprobs, objective)(logprobs, entropy=entropy, **terms)
    torch.testing.assert_close(loss, truth, rtol=1e-9, atol=1e-12)
    (wanted,) = torch.autograd.grad(truth.sum(), logits, retain_graph=True)
    (found,) = torch.autograd.grad(loss.sum(), logits)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def as_float64(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    """16 bits are brought to float32, in which the loss is; the gradient is in theirs."""
    logprobs = torch.tensor([-1.0, -2.0, -0.5], dtype=dtype, requires_grad=True)
    loss = on_logprobs.ppo(logprobs, logprobs.detach().float() - 0.05, torch.tensor([1.0, -1.0, 0.5]))
    loss.backward()
    assert loss.dtype is torch.float32 and logprobs.grad.dtype is dtype
    expected = -math.exp(0.05) * torch.tensor([1.0, -1.0, 0.5]) / 3
    torch.testing.assert_close(logprobs.grad, expected.to(dtype))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@each
def test_masked_tokens_are_nothing(name, bad):
    """Whatever they hold, loss and gradient are exactly 0, and the others' are as without them."""
    good = torch.tensor([[-1.0, -2.0, -0.5], [-0.3, -0.2, -1.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]])
    values = inputs_of(name, (2, 3))
    values = tuple(v.float() if isinstance(v, torch.Tensor) else v for v in values)

    def run(logprobs):
        x = logprobs.clone().requires_grad_()
        loss = getattr(on_logprobs, name)(x, *values, weights=mask)
        loss.backward()
        return loss.detach(), x.grad

    for clean, spoilt in zip(run(good), run(good.masked_fill(mask == 0, bad)), strict=True):
        torch.testing.assert_close(spoilt, clean, rtol=0, atol=0)
    assert (run(good.masked_fill(mask == 0, bad))[1][mask == 0] == 0).all()


@each
def test_no_active_token(name):
    logprobs = torch.full((2, 3), torch.nan, requires_grad=True)
    values = tuple(v.float() if isinstance(v, torch.Tensor) else v for v in inputs_of(name, (2, 3)))
    loss = getattr(on_logprobs, name)(logprobs, *values, weights=0.0)
    loss.backward()
    assert loss == 0 and (logprobs.grad == 0).all()


def test_metrics():
    """Those of the loss on logits, from the same numbers."""
    torch.manual_seed(0)
    logits, targets = torch.randn(4, 6, 19), torch.randint(19, (4, 6))
    old, advantages = torch.randn(4, 6) - 3, torch.randn(4, 1)
    options = {"weights": (torch.rand(4, 6) > 0.3).float(), "entropy_coef": 0.1, "return_outputs": True}
    _, there = fused_losses.ppo(logits, targets, old, advantages, **options)
    logprobs, entropy = fused_losses.logprobs(logits, targets, return_entropy=True)
    _, here = on_logprobs.ppo(logprobs, old, advantages, entropy=entropy, **options)
    assert here.metrics.keys() == there.metrics.keys()
    for name, value in there.metrics.items():
        torch.testing.assert_close(here.metrics[name], value, msg=name)
    assert not here.logprobs.requires_grad


@pytest.mark.parametrize("name", ["ppo", "gspo", "sapo", "policy_loss"])
def test_compiled(name):
    """In one graph, the same numbers."""
    logprobs = (torch.randn(3, 5) - 2).requires_grad_()
    values = tuple(v.float() if isinstance(v, torch.Tensor) else v for v in inputs_of(name))

    def loss(x):
        return getattr(on_logprobs, name)(x, *values, weights=torch.ones(3, 5), ref_logprobs=-2.0, kl_coef=0.1)

    wanted = loss(logprobs)
    found = torch.compile(loss, fullgraph=True)(logprobs)
    torch.testing.assert_close(found, wanted)
    gradients = [torch.autograd.grad(value, logprobs)[0] for value in (wanted, found)]
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"entropy_coef": 0.1}, "entropy_coef needs entropy"),
        (
            {"entropy_coef": 0.1, "entropy": torch.ones(2)},
            r"entropy must have the shape of logprobs, \(3,\), got \(2,\)",
        ),
        ({"entropy": [1.0]}, "entropy must be a tensor, got list"),
        ({"weights": torch.ones(4)}, r"weights must broadcast to the tokens' shape \(3,\), got \(4,\)"),
        ({"kl_coef": 0.1}, "kl_coef needs ref_logprobs"),
        ({"clip_low_threshold": -0.1}, "clip_low_threshold must be at least 0"),
        ({"clip_low_threshold": 2.0}, "clip_low_threshold must not exceed clip_high_threshold"),
        ({"denominator": 0.0}, "denominator must be greater than 0"),
        ({"reduction": "avg"}, "reduction must be"),
        ({"dual_clip": torch.tensor([1.0, 0.5, 2.0]), "validate": True}, "dual_clip must be at least 1 at every token"),
    ],
)
def test_errors(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        on_logprobs.ppo(torch.zeros(3), torch.zeros(3), 1.0, **options)


def test_errors_of_logprobs():
    with pytest.raises(TypeError, match="logprobs must be float32, float64, bfloat16 or float16"):
        on_logprobs.ppo(torch.zeros(3, dtype=torch.int64), 0.0, 1.0)
    with pytest.raises(TypeError, match="logprobs must be a tensor, got float"):
        on_logprobs.dro(1.0, 0.0, 1.0)
    with pytest.raises(TypeError, match="temperature"):
        on_logprobs.ppo(torch.zeros(3), 0.0, 1.0, temperature=2.0)


def test_bounds_of_ones_own_objective():
    own = fused_losses.Objective(
        "bounded", OBJECTIVES["dro"].formula, ("old", "advantage"), ("strength",), ("log_ratio_clamp",)
    )
    with pytest.raises(ValueError, match="strength must be at least 0, got -1"):
        on_logprobs.policy_loss(torch.zeros(3), own, 0.0, 1.0, -1.0)
    loss = on_logprobs.policy_loss(torch.full((3,), -1.0), own, 0.0, 1.0, 0.5)
    assert loss.item() == pytest.approx(0.5 / 2 + 1.0)
