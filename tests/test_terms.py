"""What a loss may hold beside its objective: transforms, label smoothing, z-loss, K targets, entropy, KL, clips.

The reference against the definitions of formulas.py, in float64; every backend against the reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import formulas
import pytest
import torch
from cases import DTYPES, EPS, MODES, POLICY_LOSSES, RATIO_LOSSES, Case, check, make, near, run
from conftest import device_of, require
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_gradients import allocations, call, leaf_and_logits
from torch import Tensor

import fused_losses
from fused_losses import reference
from fused_losses.terms import KL_TYPES

ids = {"ids": lambda value: str(value).removeprefix("torch.")}
INF, NAN = math.inf, math.nan


# For tokens of shape (7,). A function draws from the seeded global generator.
TRANSFORMS: dict[str, dict[str, Any]] = {
    "softcap": {"softcap": 5.0},
    "softcap above all logits": {"softcap": 100.0},
    "logit_scale": {"logit_scale": 0.3},
    "all transforms": {"softcap": 4.0, "logit_scale": 1.7, "temperature": 0.8},
    "transforms, temperature per token": {
        "softcap": 6.0,
        "logit_scale": 0.9,
        "temperature": lambda: 0.5 + torch.rand(7),
    },
}
OF_POLICY: dict[str, dict[str, Any]] = {
    "entropy": {"entropy_coef": 0.3},
    "negative entropy coefficient": {"entropy_coef": -0.2},
    "entropy per token": {"entropy_coef": lambda: torch.rand(7) - 0.3},
    **{f"KL {kind}": {"kl_coef": 0.4, "ref_logprobs": near, "kl_type": kind} for kind in KL_TYPES},
    **{
        f"KL {kind} by ratio": {
            "kl_coef": 0.4,
            "ref_logprobs": near,
            "kl_type": kind,
            "kl_weighted_by_ratio": True,
        }
        for kind in KL_TYPES
    },
    "KL per token": {"kl_coef": lambda: torch.rand(7), "ref_logprobs": near},
    "importance weights": {"importance_weights": lambda: torch.tensor([1.0, 0.0, 2.0, 0.5, 3.0, 0.0, 1.0])},
    "importance weight for all": {"importance_weights": 0.7},
    "log ratio clamp": {"log_ratio_clamp": 0.3},
    "log ratio clamp per token": {"log_ratio_clamp": lambda: torch.full((7,), 0.3)},
}
OF_PPO: dict[str, dict[str, Any]] = {
    "dual clip": {"dual_clip": 1.3},
    "dual clip per token": {"dual_clip": lambda: torch.full((7,), 1.3)},
    "delta": {"delta": 1.1},
    "delta below the clip": {"delta": 0.9},
    "dual clip and delta": {"dual_clip": 1.3, "delta": 2.5},
}
OF_CROSS_ENTROPY: dict[str, dict[str, Any]] = {
    "label smoothing": {"label_smoothing": 0.1},
    "labels all smooth": {"label_smoothing": 1.0},
    "z-loss": {"z_loss": 0.01},
    "z-loss and label smoothing": {"z_loss": 0.1, "label_smoothing": 0.2},
}
OPTIONS = [
    *((loss, name, option) for loss in ("cross_entropy", "ppo") for name, option in TRANSFORMS.items()),
    *((loss, name, option) for loss in ("ppo", "dro") for name, option in OF_POLICY.items()),
    *(("ppo", name, option) for name, option in OF_PPO.items()),
    *(("cross_entropy", name, option) for name, option in OF_CROSS_ENTROPY.items()),
    *(
        (loss, "all at once", {"softcap": 6.0, **OF_POLICY["entropy"], **OF_POLICY["KL k3 by ratio"]})
        for loss in RATIO_LOSSES
    ),
    ("reinforce", "all at once", {"softcap": 6.0, **OF_POLICY["entropy"], **OF_POLICY["KL k3"]}),
]


def drawn(option: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(1)
    return {k: v() if callable(v) and v is not near else v for k, v in option.items()}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("objective, name, option", OPTIONS, ids=lambda v: v if isinstance(v, str) else "")
def test_option(backend, device, objective, name, option, mode):
    check(make(objective, (7,), 130, device=device, **drawn(option)), backend, **MODES[mode])


@pytest.mark.parametrize("dtype", DTYPES[1:], **ids)
@pytest.mark.parametrize("mode", ["one pass", "in place", "recompute"])
@pytest.mark.parametrize("objective, name, option", OPTIONS, ids=lambda v: v if isinstance(v, str) else "")
def test_half_precision(backend, device, objective, name, option, mode, dtype):
    if backend == "triton" and device.type == "cpu" and mode != "one pass":
        pytest.skip("kernels are the same for any dtype; interpreted, they take their time")
    check(make(objective, (7,), 130, dtype, device, **drawn(option)), backend, **MODES[mode])


@pytest.mark.parametrize("vocab", [1, 2, 31, 128, 1000, 4097])
def test_vocab(backend, device, vocab):
    terms = {"entropy_coef": 0.2, "kl_coef": 0.1, "ref_logprobs": -3.0}
    for dtype in (torch.float32, torch.bfloat16):
        for transform in ({}, {"softcap": 8.0}):
            check(make("ppo", (5,), vocab, dtype, device, **terms, **transform), backend)
            check(
                make("cross_entropy", (5,), vocab, dtype, device, label_smoothing=0.1, z_loss=0.1, **transform), backend
            )


LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "next token": ((2, 4), lambda t: t[:, :-1]),
    "odd offset": ((2, 4), lambda t: t[:, 1:, 1:]),
    "transposed tokens": ((4, 2), lambda t: t.transpose(0, 1)),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(backend, device, layout, mode):
    leading, view = LAYOUTS[layout]
    if mode == "in place" and layout == "transposed tokens":
        pytest.skip("two strides, which the other layouts have, too")
    check(make("ppo", leading, 31, device=device, view=view, entropy_coef=0.3, softcap=7.0), backend, **MODES[mode])
    check(make("cross_entropy", leading, 31, device=device, view=view, label_smoothing=0.1), backend, **MODES[mode])


def test_no_tokens(backend, device):
    for mode in MODES.values():
        check(make("ppo", (0,), 31, device=device, entropy_coef=0.3), backend, **mode)
        check(with_targets(make("cross_entropy", (0, 2), 31, device=device), 3), backend, **mode)


# ---- K targets ----


def with_targets(case: Case, k: int, **keywords: Any) -> Case:
    """K targets with weights of any sign; some twice, some ignored, some padding; all of one token."""
    torch.manual_seed(2)
    shape = (*case.logits.shape[:-1], k)
    targets = torch.randint(case.logits.shape[-1], shape)
    weights = torch.randn(shape)
    if k > 1:
        targets[..., 1] = targets[..., 0]
        weights[..., -1] = 0.0
        targets[..., -1] = -100
    if targets.shape[0] > 2:
        targets[1] = targets[1, ..., :1]
        weights[2, ..., ::2] = 0.0
    device = case.storage.device
    impossible = case.logits.cpu().gather(-1, targets.clamp(min=0)) == -INF
    targets[impossible] = targets[impossible].fill_(0)
    return replace(case, target_tokens=targets.to(device), keywords={"weights": weights.to(device), **keywords})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("k", [1, 2, 5, 64, 70])
def test_several_targets(backend, device, k, mode):
    case = with_targets(make("cross_entropy", (7,), 130, device=device), k, **MODES[mode])
    if mode != "none":  # random weights may nearly cancel: a mean of such is ill conditioned
        case = case.having(reduction="sum")
    check(case, backend)
    check(case.having(label_smoothing=0.1, z_loss=0.01, softcap=9.0, temperature=0.7), backend)
    positive = {"weights": case.keywords["weights"].abs()}
    for reduction in () if mode == "none" else ("mean", "sum"):
        check(case.having(**positive, reduction=reduction), backend)


@pytest.mark.parametrize("dtype", DTYPES[1:], **ids)
def test_several_targets_in_half_precision(backend, device, dtype):
    case = with_targets(make("cross_entropy", (2, 3), 130, dtype, device), 6, reduction="sum")
    for mode in MODES.values():
        check(case.having(**mode), backend)


def test_one_target_of_several_is_one_target(backend, device):
    case = make("cross_entropy", (7,), 31, device=device, weights=torch.rand(7), label_smoothing=0.1, z_loss=0.1)
    several = replace(case, target_tokens=case.target_tokens[:, None]).having(weights=case.keywords["weights"][:, None])
    for mode in MODES.values():
        one, of_k = run(case.public(backend), case, **mode), run(several.public(backend), several, **mode)
        torch.testing.assert_close(of_k.loss, one.loss)
        torch.testing.assert_close(of_k.gradient, one.gradient)
        torch.testing.assert_close(of_k.logprobs[:, 0], one.logprobs)


def test_distillation_is_soft_cross_entropy(backend, device):
    """All V targets with a teacher's probabilities: torch's cross entropy with probabilities, and KL's gradient."""
    vocab = 31
    case = make("cross_entropy", (5,), vocab, device=device, ignored=False)
    case.storage.nan_to_num_(neginf=-4.0)
    teacher = torch.softmax(torch.randn(5, vocab, device=device), -1)
    targets = torch.arange(vocab, device=device).expand(5, -1)
    case = replace(case, target_tokens=targets, keywords={"weights": teacher, "reduction": "sum"})
    got = run(case.public(backend), case)
    leaf = case.storage.clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(leaf, teacher, reduction="sum")
    expected.backward()
    torch.testing.assert_close(got.loss, expected.detach())
    torch.testing.assert_close(got.gradient, leaf.grad, rtol=1e-5, atol=1e-6)


def test_universal_backward(backend, device):
    """With weights -dL/dlogp the gradient is that of L, whatever L is."""
    logits = torch.randn(6, 31, device=device, requires_grad=True)
    targets = torch.randint(31, (6, 4), device=device)
    logp = torch.log_softmax(logits, -1).gather(-1, targets)
    loss = (torch.sigmoid(logp[:, 0] - logp[:, 1]) * logp[:, 2:].exp().sum(-1)).square().sum()
    (weights,) = torch.autograd.grad(-loss, logp, retain_graph=True)
    (expected,) = torch.autograd.grad(loss, logits)
    surrogate = fused_losses.cross_entropy(logits, targets, weights=weights, reduction="sum", backend=backend)
    (got,) = torch.autograd.grad(surrogate, logits)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


# ---- Entropy ----


@pytest.mark.parametrize("transforms", [{}, {"softcap": 5.0, "logit_scale": 0.7, "temperature": 1.3}], ids=["", "all"])
@pytest.mark.parametrize("dtype", DTYPES, **ids)
def test_logprobs_and_entropy(backend, device, dtype, transforms):
    """Both from one read, both with a gradient, and each alone."""
    case = make("logprobs", (2, 5), 1000, dtype, device, **transforms)
    up = torch.randn(2, 2, 5, device=device)

    def both(function: Callable[..., Any], given: Tensor, which: str = "both") -> tuple[Tensor, Tensor, Tensor]:
        leaf = given.clone().requires_grad_()
        keywords = {} if function is reference.logprobs else {"backend": backend}
        logp, entropy = function(leaf, case.target_tokens, return_entropy=True, **transforms, **keywords)
        total = (up[0] * logp).sum() * (which != "entropy") + (up[1] * entropy).sum() * (which != "logprobs")
        total.backward()
        return logp.detach(), entropy.detach(), leaf.grad

    for which in ("both", "entropy", "logprobs"):
        got = both(fused_losses.logprobs, case.storage, which)
        eager = both(reference.logprobs, case.storage, which)
        truth = both(reference.logprobs, case.storage.double(), which)
        assert got[0].dtype == got[1].dtype == torch.float32 and got[0].shape == got[1].shape == (2, 5)
        for g, e, t in zip(got, eager, truth, strict=True):
            allowed = 3 * (e - t).abs().max() + 8 * EPS * (1 + t.abs().max()) + torch.finfo(g.dtype).eps * t.abs() / 2
            assert ((g - t).abs() <= allowed).all()
    ignored = case.target_tokens == -100
    assert ignored.any() and not got[0][ignored].any() and not got[1][ignored].any() and not got[2][ignored].any()


def test_entropy_can_be_differentiated_again_and_again(backend, device):
    logits = torch.randn(4, 31, device=device, requires_grad=True)
    target = torch.tensor([1, -100, 3, 4], device=device)
    logp, entropy = fused_losses.logprobs(logits, target, return_entropy=True, backend=backend)
    first, second = (torch.autograd.grad(entropy.sum(), logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (both,) = torch.autograd.grad((logp - 2 * entropy).sum(), logits, retain_graph=True)
    (alone,) = torch.autograd.grad(logp.sum(), logits)
    torch.testing.assert_close(both, alone - 2 * first)


@pytest.mark.parametrize("objective", POLICY_LOSSES)
def test_entropy_output(backend, device, objective):
    case = make(objective, (2, 3), 31, device=device, entropy_coef=0.1)
    outputs = case.public(backend)(case.logits, case.target_tokens, return_outputs=True, **case.keywords)[1]
    _, expected = reference.logprobs(case.logits, case.target_tokens, return_entropy=True)
    torch.testing.assert_close(outputs.entropy, expected)
    plain = case.public(backend)(
        case.logits, case.target_tokens, return_outputs=True, **case.keywords | {"entropy_coef": 0.0}
    )[1]
    assert plain.entropy is None


@pytest.mark.parametrize("mode, buffers", [("one pass", 1), ("in place", 0), ("recompute", 1), ("none", 1)])
@pytest.mark.parametrize("dtype", DTYPES, **ids)
def test_memory(kernels, device, mode, buffers, dtype):
    """Terms take no [N, V] buffer more than the plain loss."""
    case = make("ppo", (8,), 2048, dtype, device, entropy_coef=0.1, kl_coef=0.1, ref_logprobs=-2.0, softcap=30.0)
    _, logits = leaf_and_logits(case)
    call(case, kernels, mode, logits.clone()).sum().backward()

    def forward_and_backward() -> None:
        torch.autograd.grad(call(case, kernels, mode, logits).sum(), logits)

    assert allocations(forward_and_backward, device, logits.nbytes) == buffers


# ---- Any combination ----


@st.composite
def combinations(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Case:
    """Any loss with any of its options, of which each may be a number or per token."""
    seed = draw(st.integers(0, 10_000))
    n, vocab = draw(st.integers(1, 5)), draw(st.sampled_from([2, 5, 33, 130]))
    objective = draw(st.sampled_from(["cross_entropy", *POLICY_LOSSES]))

    def maybe(**options: Callable[[], Any]) -> dict[str, Any]:
        chosen = {k: v() for k, v in options.items() if draw(st.booleans())}
        return {k: torch.full((n,), float(v)) if v and draw(st.booleans()) else v for k, v in chosen.items()}

    def number(low: float, high: float) -> Callable[[], float]:
        return lambda: draw(st.floats(low, high, width=32, allow_subnormal=False))

    keywords = maybe(temperature=number(0.5, 2.0))
    keywords |= {k: draw(v) for k, v in (("softcap", st.floats(3, 30)), ("logit_scale", st.floats(0.25, 2))) if
                 draw(st.booleans())}  # fmt: skip
    if objective == "cross_entropy":
        if draw(st.booleans()):
            keywords["label_smoothing"] = draw(st.floats(0, 1, width=32, allow_subnormal=False))
        if draw(st.booleans()):
            keywords["z_loss"] = draw(st.floats(0, 0.5, width=32, allow_subnormal=False))
    else:
        keywords |= maybe(
            entropy_coef=number(-0.5, 0.5),
            importance_weights=number(0.0, 3.0),
            **({"log_ratio_clamp": lambda: 0.3} if objective in RATIO_LOSSES else {}),
        )
        if draw(st.booleans()):
            keywords |= {"ref_logprobs": near, "kl_coef": draw(st.floats(0.01, 1))}
            keywords["kl_type"] = draw(st.sampled_from(KL_TYPES))
            if objective in RATIO_LOSSES:
                keywords["kl_weighted_by_ratio"] = draw(st.booleans())
        if objective.startswith("dppo"):
            keywords |= maybe(ratio_cap=number(0.5, 2.0), divergence_low=number(0.0, 0.125))
        if objective == "ppo":
            keywords |= maybe(dual_clip=lambda: 1.3, delta=lambda: draw(st.sampled_from([0.9, 1.1, 2.5])))
    keywords["reduction"] = draw(st.sampled_from(["sum", "mean", "none"]))
    case = make(
        objective, (n,), vocab, draw(st.sampled_from(dtypes)), seed=seed, ignored=draw(st.booleans()), **keywords
    )
    if objective == "cross_entropy" and draw(st.booleans()):
        temperature = {"temperature": 0.8} if "temperature" in keywords else {}
        case = with_targets(case, draw(st.sampled_from([1, 2, 3, 9])), **keywords | temperature)
        if case.keywords["reduction"] == "mean":
            case = case.having(weights=case.keywords["weights"].abs())
    elif draw(st.booleans()):
        weights = torch.rand(n) + 0.1
        weights[0] = draw(st.sampled_from([0.0, 1.0]))
        case = case.having(weights=weights)
    if case.keywords["reduction"] != "none":
        case = case.having(**MODES[draw(st.sampled_from(["one pass", "in place", "recompute"]))])
    return case


def hypotheses(examples: int) -> settings:
    quiet = list(HealthCheck)
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=quiet)


@pytest.mark.parametrize("name, examples", [("eager", 150), ("cpu", 400), ("triton", 40), ("cuda", 400)])
def test_any_combination(name, examples):
    require(name)
    device = device_of(name)

    @hypotheses(examples)
    @given(combinations())
    def check_it(case: Case) -> None:
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in case.keywords.items()}
        check(
            replace(case, storage=case.storage.to(device), target_tokens=case.target_tokens.to(device), keywords=moved),
            name,
        )

    check_it()


def test_reference_is_the_definition():
    """Values and gradients of random combinations in float64."""

    @hypotheses(400)
    @given(combinations((torch.float32,)))
    def check_it(case: Case) -> None:
        storage = case.storage.double().nan_to_num(neginf=-9.0)  # the definitions are for finite numbers
        keywords = {k: v.double() if isinstance(v, Tensor) else v for k, v in case.keywords.items()}
        for name in ("inplace", "recompute"):
            keywords.pop(name, None)
        leaf = storage.clone().requires_grad_()
        got = case.reference(leaf, case.target_tokens, **keywords)
        got.sum().backward()

        reduction = keywords.pop("reduction")
        weights = keywords.pop("weights", None)
        active = case.target_tokens != -100
        weights = active.double() if weights is None else weights * active
        targets = case.target_tokens.where(active, 0)
        other = storage.clone().requires_grad_()
        if case.objective == "cross_entropy":
            losses = weights * formulas.cross_entropy(other, targets, **keywords)
        else:
            if "old_logprobs" not in keywords:
                keywords["old_logprobs"] = 0.0
            losses = weights * formulas.policy(case.objective, other, targets, **keywords)
        expected = {
            "none": losses.sum(-1) if losses.dim() > 1 else losses,
            "sum": losses.sum(),
            "mean": losses.sum() / weights.sum() if weights.any() else 0 * losses.sum(),
        }[reduction]
        expected.sum().backward()
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-8, atol=1e-10)

    check_it()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_label_smoothing_is_that_of_torch(backend, device, reduction):
    logits = torch.randn(6, 31, device=device)
    target = torch.tensor([3, -100, 0, 30, -100, 7], device=device)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    for smoothing in (0.0, 0.1, 1.0):
        got = fused_losses.cross_entropy(ours, target, label_smoothing=smoothing, reduction=reduction, backend=backend)
        expected = torch.nn.functional.cross_entropy(theirs, target, label_smoothing=smoothing, reduction=reduction)
        torch.testing.assert_close(got, expected)
        (mine,), (their,) = torch.autograd.grad(got.sum(), ours), torch.autograd.grad(expected.sum(), theirs)
        torch.testing.assert_close(mine, their, rtol=1e-5, atol=1e-7)


# ---- Hazards ----

HAZARDOUS: dict[str, tuple[str, dict[str, Any]]] = {
    "entropy": ("ppo", {"entropy_coef": 0.1}),
    "KL": ("ppo", {"kl_coef": 0.1, "ref_logprobs": -2.0}),
    "KL by ratio": ("dro", {"kl_coef": 0.1, "ref_logprobs": -2.0, "kl_weighted_by_ratio": True}),
    "importance weights": ("cispo", {"importance_weights": 0.5}),
    "softcap": ("sapo", {"softcap": 5.0, "entropy_coef": 0.1}),
    "smoothing and z-loss": ("cross_entropy", {"label_smoothing": 0.1, "z_loss": 0.1}),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("hazard", HAZARDOUS)
def test_masked_token(backend, device, hazard, mode):
    """Masked by weight or target, a token is exactly 0 whatever it holds, and changes nothing elsewhere."""
    objective, options = HAZARDOUS[hazard]
    case = make(objective, (5,), 31, device=device, ignored=False, **options, **MODES[mode])
    case = case.having(weights=torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0], device=device))
    case.target_tokens[3] = -100
    expected = run(case.public(backend), case)
    for garbage in (NAN, INF, -INF):
        poisoned = {k: v for k, v in case.keywords.items() if isinstance(v, Tensor) and k != "weights"}
        poisoned |= {k: torch.full((5,), v, device=device) for k, v in options.items() if isinstance(v, float) and
                     k not in ("softcap", "label_smoothing", "z_loss")}  # fmt: skip
        for k, v in poisoned.items():
            poisoned[k] = v.index_fill(0, torch.tensor([1, 3], device=device), garbage)
        spoilt = replace(case, storage=case.storage.index_fill(0, torch.tensor([1, 3], device=device), garbage))
        got = run(case.public(backend), spoilt.having(**poisoned))
        assert torch.equal(got.loss, expected.loss) and torch.equal(got.gradient, expected.gradient)
        assert not got.gradient[[1, 3]].any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("hazard", HAZARDOUS)
def test_bad_row(backend, device, hazard, mode):
    """A row with a NaN, and one that is all -inf, is NaN and no other is; under a softcap -inf is a number."""
    objective, options = HAZARDOUS[hazard]
    case = make(objective, (4,), 129, device=device, ignored=False, **options, **MODES[mode])
    for fill in (NAN, -INF):
        spoilt = replace(case, storage=case.storage.clone())
        spoilt.storage[2] = fill
        got = run(case.public(backend), spoilt, reduction=case.keywords.get("reduction", "sum"))
        capped = "softcap" in options and fill == -INF
        assert got.gradient.isnan().all(-1).tolist() == [False, False, not capped, False]
        assert torch.isfinite(got.gradient[[0, 1, 3]]).all()
        assert got.loss.isnan().any().item() == (not capped)


@pytest.mark.parametrize("mode", MODES)
def test_minus_infinity(backend, device, mode):
    """-inf logits have no share in the entropy; smoothed labels make the loss inf, as torch does, not the gradient."""
    for dtype in (torch.float32, torch.bfloat16):
        for vocab in (31, 1500):
            case = make("ppo", (5,), vocab, dtype, device, ignored=False, entropy_coef=0.2, **MODES[mode])
            keep = case.storage.gather(1, case.target_tokens[:, None])
            case.storage[0, : vocab - 4] = -INF
            case.storage[1, 0] = case.storage[1, -1] = -INF
            case.storage[2] = -INF  # but for the target
            case.storage[3, 4:] = -INF
            case.storage.scatter_(1, case.target_tokens[:, None], keep)
            got = check(case, backend)
            assert torch.isfinite(got.gradient).all() and not got.gradient[2].any()
            check(case.having(softcap=6.0), backend)
    smooth = make("cross_entropy", (5,), 31, device=device, ignored=False, label_smoothing=0.1, **MODES[mode])
    got, expected = run(smooth.public(backend), smooth), run(smooth.reference, smooth)
    torch.testing.assert_close(got.loss, expected.loss)
    assert torch.isinf(got.loss).any()
    assert torch.isfinite(got.gradient).all()


@pytest.mark.parametrize("kind", KL_TYPES)
def test_unlikely_token(backend, device, kind):
    """logp = -inf under the policy, under the reference, and a ratio that overflows: no NaN unless asked for."""
    logits = torch.tensor([[-INF, 0.0], [0.0, 1.0], [0.0, 1.0]], device=device, requires_grad=True)
    target = torch.tensor([0, 0, 0], device=device)
    ref = torch.tensor([-1.0, -INF, -1.0], device=device)
    old = torch.tensor([-1.0, -1.0, -200.0], device=device)
    keywords = {"kl_type": kind, "ref_logprobs": ref, "reduction": "none", "backend": backend}
    loss = fused_losses.ppo(logits, target, old, 1.0, kl_coef=0.1, **keywords)
    assert not loss.isnan().any()
    assert torch.isfinite(loss[2]) and not torch.isfinite(loss[1])
    nothing = fused_losses.ppo(logits, target, old, 1.0, kl_coef=torch.zeros(3, device=device), **keywords)
    torch.testing.assert_close(nothing, fused_losses.ppo(logits, target, old, 1.0, reduction="none", backend=backend))
    (gradient,) = torch.autograd.grad(nothing.sum(), logits)
    assert torch.isfinite(gradient).all()
    by_ratio = fused_losses.ppo(logits, target, old, 1.0, kl_coef=0.1, kl_weighted_by_ratio=True, **keywords)
    assert by_ratio[0] == 0.0 or kind == "k1"


@pytest.mark.parametrize("mode", ["one pass", "recompute"])
def test_softcap_at_a_low_temperature(backend, device, mode):
    """The probabilities of the gradient are those of the sum: they add up to 1, whatever a cap is rounded to."""
    torch.manual_seed(0)
    logits = (8 * torch.randn(9, 256, device=device)).requires_grad_()
    target = logits.argmin(-1)
    options = {"softcap": 50.0, "temperature": 0.01, "reduction": "sum", "backend": backend}
    loss = fused_losses.cross_entropy(logits, target, recompute=mode == "recompute", **options)
    (gradient,) = torch.autograd.grad(loss, logits)
    slope = 1 - torch.tanh(logits.detach().double() / 50) ** 2
    total = (gradient.double() / slope * 0.01).scatter(1, target[:, None], 0.0).sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0.0, atol=2e-6)


def test_ratio_times_k3_does_not_cancel(backend, device):
    """d(r k3) = r (x - f): what k3 and its derivative are made of is 5e8 times as large here."""
    logits = torch.tensor([[-22.0, 0.0, 0.0]], device=device, requires_grad=True)
    target = torch.zeros(1, dtype=torch.int64, device=device)
    options = {"kl_coef": 1.0, "ref_logprobs": -2.5, "kl_weighted_by_ratio": True}
    (got,) = torch.autograd.grad(fused_losses.ppo(logits, target, -20.0, 0.0, backend=backend, **options), logits)
    (expected,) = torch.autograd.grad(reference.ppo(logits.double(), target, -20.0, 0.0, **options), logits)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0.0)


def test_all_smooth_labels_ignore_the_target(backend, device):
    """The target's own logprob, -inf here, has weight 0: an infinite loss by the spread, and no NaN."""
    logits = torch.tensor([[-INF, 0.0, 1.0]], device=device, requires_grad=True)
    target = torch.zeros(1, dtype=torch.int64, device=device)
    loss = fused_losses.cross_entropy(logits, target, label_smoothing=1.0, backend=backend)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss == INF
    torch.testing.assert_close(gradient, torch.softmax(logits.detach(), -1) - 1 / 3)


def test_common_offset(backend, device):
    """Entropy and smoothing lose nothing to a large common offset."""
    for objective, options in (("ppo", {"entropy_coef": 0.5}), ("cross_entropy", {"label_smoothing": 0.3})):
        case = make(objective, (6,), 129, device=device, **options)
        case.storage.copy_(torch.randint(-40, 40, (6, 129)) / 4)
        expected = run(case.public(backend), case)
        for mode in ("one pass", "in place", "recompute"):
            for offset in (2.0**10, -(2.0**14), 2.0**20):
                shifted = replace(case, storage=case.storage + offset)
                got = run(case.public(backend), shifted, **MODES[mode])
                torch.testing.assert_close(got.loss, expected.loss, rtol=2e-6, atol=1e-6)
                torch.testing.assert_close(got.gradient, expected.gradient, rtol=5e-6, atol=1e-8)


def test_gradient_sums_to_zero(backend, device):
    """... as the loss does not change with a common offset, unless it looks at lse."""
    for objective, options in (("ppo", {"entropy_coef": 0.5}), ("cross_entropy", {"label_smoothing": 0.3})):
        case = make(objective, (8,), 1000, device=device, **options)
        gradient = run(case.public(backend), case).gradient.double()
        assert (gradient.sum(-1).abs() <= 1e-5 * gradient.abs().sum(-1)).all()


@pytest.mark.parametrize("option", ["entropy", "softcap", "K targets"])
def test_repeats_bitwise(kernels, device, option):
    case = make("cross_entropy", (9,), 1000, torch.bfloat16, device)
    if option == "entropy":
        case = make("ppo", (9,), 1000, torch.bfloat16, device, entropy_coef=0.1)
    case = with_targets(case, 9) if option == "K targets" else case.having(softcap=5.0) if option == "softcap" else case
    first = run(case.public(kernels), case)
    for _ in range(3):
        again = run(case.public(kernels), case)
        assert torch.equal(first.loss, again.loss) and torch.equal(first.gradient, again.gradient)


@pytest.mark.parametrize("mode", ["one pass", "in place", "none"])
def test_compile(backend, device, mode):
    if backend == "triton" and device.type == "cpu" and mode != "one pass":
        pytest.skip("the operators are opaque: once is enough where kernels are interpreted")
    torch._dynamo.reset()
    cases = [
        make("ppo", (4,), 31, device=device, entropy_coef=0.1, kl_coef=0.1, ref_logprobs=-2.0, softcap=5.0),
        make("cross_entropy", (4,), 31, device=device, label_smoothing=0.1, z_loss=0.1, logit_scale=0.5),
        with_targets(make("cross_entropy", (4,), 31, device=device), 3, reduction="sum"),
    ]
    for case in cases:
        case = case.having(**MODES[mode])
        function = torch.compile(case.public(backend), fullgraph=True, backend="aot_eager")
        got, expected = run(function, case), run(case.public(backend), case)
        torch.testing.assert_close((got.loss, got.gradient), (expected.loss, expected.gradient))
