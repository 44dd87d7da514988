"""Data, a way to run any loss on it, and what counts as the right numbers: shared by the tests.

Everything is driven by ``fused_losses.objectives.OBJECTIVES``. A new loss is tested as it stands; it gets telling data
for an input of a new name if that is added to ``INPUTS``.

The truth is ``fused_losses.reference`` in float64. A result passes if its error is at most FACTOR times that of the
same formula in eager torch at the dtype of the logits, plus a few roundings of float32.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import fused_losses
from fused_losses import reference
from fused_losses.objectives import OBJECTIVES, log_ratio
from fused_losses.problem import Terms, Transform
from fused_losses.terms import Seen, kl, row_loss, times

LOSSES = tuple(name for name, objective in OBJECTIVES.items() if objective.is_loss)
POLICY_LOSSES = tuple(name for name in LOSSES if "advantages" in OBJECTIVES[name].inputs)
RATIO_LOSSES = tuple(name for name in POLICY_LOSSES if "old_logprobs" in OBJECTIVES[name].inputs)
CLIPPED_LOSSES = tuple(name for name in LOSSES if "clip_low_threshold" in OBJECTIVES[name].bounds)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODES: dict[str, dict[str, Any]] = {  # the ways to a gradient
    "one pass": {},
    "in place": {"inplace": True},
    "recompute": {"recompute": True},
    "none": {"reduction": "none"},
}

LOSS_FACTOR, GRADIENT_FACTOR = 2, 3
EPS = torch.finfo(torch.float32).eps


def _away_from_bounds(log_ratio: Tensor) -> Tensor:
    """Log ratios whose ratio is not within rounding of a clip bound, where the side that it falls on is an accident."""
    for bound in (0.8, 1.2, 0.0, 4.0):
        log_ratio = torch.where((log_ratio.exp() - bound).abs() < 1e-2, log_ratio + 0.05, log_ratio)
    return log_ratio


# name of an input -> values for tokens of logprob x; drawn from the seeded global generator
INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "old_logprobs": lambda x: (x - _away_from_bounds(0.4 * torch.randn(x.shape))).float(),
    "advantages": lambda x: torch.randn(x.shape),
    "clip_low_threshold": lambda x: 0.4 + 0.2 * torch.rand(x.shape),
    "clip_high_threshold": lambda x: 1.5 + torch.rand(x.shape),
    "beta": lambda x: torch.rand(x.shape),
    "divergence_low": lambda x: 0.1 * torch.rand(x.shape),
    "divergence_high": lambda x: 0.1 * torch.rand(x.shape),
}


def near(x: Tensor) -> Tensor:
    """Logprobs of a reference policy that is not far from one with logprobs x."""
    return (x + 0.7 * torch.randn(x.shape)).clamp(max=0.0).float()


@dataclass(frozen=True)
class Case:
    """One call of a loss. ``logits`` is ``view(storage)``, so that strides survive copies and changes of dtype."""

    objective: str
    storage: Tensor
    target_tokens: Tensor
    keywords: dict[str, Any] = field(default_factory=dict)
    view: Callable[[Tensor], Tensor] = lambda t: t

    @property
    def logits(self) -> Tensor:
        return self.view(self.storage)

    def having(self, **keywords: Any) -> Case:
        return replace(self, keywords=self.keywords | keywords)

    def public(self, backend: str) -> Callable[..., Any]:
        function = getattr(fused_losses, self.objective)
        return lambda *args, **kwargs: function(*args, backend=backend, **kwargs)

    @property
    def reduction(self) -> str:
        default = inspect.signature(getattr(fused_losses, self.objective)).parameters["reduction"].default
        return self.keywords.get("reduction", default)

    @property
    def reference(self) -> Callable[..., Any]:
        return getattr(reference, self.objective)


def make(
    objective: str,
    leading: tuple[int, ...] = (7,),
    vocab: int = 31,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    view: Callable[[Tensor], Tensor] = lambda t: t,
    seed: int = 0,
    ignored: bool = True,
    **keywords: Any,
) -> Case:
    """Random logits, ``leading + (vocab,)`` before ``view``, with -inf, a confident token and an ignored one."""
    torch.manual_seed(seed)
    storage = (torch.randn(*leading, vocab) * 3).to(dtype)
    logits = view(storage)
    target = torch.randint(logits.shape[-1], logits.shape[:-1])
    flat_target = target.view(-1)
    n = flat_target.numel()
    if vocab >= 31 and view(torch.empty_like(storage)).is_contiguous():
        rows = logits.view(-1, vocab)
        rows[0 : n // 2, 5] = -torch.inf
        flat_target[: n // 2][flat_target[: n // 2] == 5] = 6
        rows[1:2] *= 0.3  # p of the target about 0.999
        rows[1:2].scatter_(1, flat_target[1:2, None], 12.0)
    if ignored and n >= 3:
        flat_target[2] = keywords.get("ignore_index", -100)
    here = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in _transforms(keywords).items()}
    x = reference.logprobs(logits.double(), target, **here)
    keywords = {k: v(x) if callable(v) else v for k, v in keywords.items()}
    inputs = {name: INPUTS.get(name, INPUTS["beta"])(x) for name in OBJECTIVES[objective].inputs}
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in (inputs | keywords).items()}
    return Case(objective, storage.to(device), target.to(device), moved, view)


def per_token_bounds(case: Case) -> dict[str, Tensor]:
    x = torch.zeros(case.target_tokens.shape)
    names = OBJECTIVES[case.objective].bounds
    return {name: INPUTS.get(name, INPUTS["beta"])(x).to(case.storage.device) for name in names}


def _transforms(keywords: dict[str, Any]) -> dict[str, Any]:
    names = ("temperature", "softcap", "logit_scale", "ignore_index")
    return {k: keywords[k] for k in names if k in keywords}


@dataclass(frozen=True)
class Numbers:
    loss: Tensor
    gradient: Tensor  # of the storage
    logprobs: Tensor | None = None


def run(
    function: Callable[..., Any],
    case: Case,
    dtype: torch.dtype | None = None,
    upstream: Tensor | float = 1.0,
    **keywords: Any,
) -> Numbers:
    """Forward and backward. In place, the gradient comes through a copy: the storage is a leaf."""
    keywords = case.keywords | keywords
    storage = case.storage.to(dtype or case.storage.dtype, copy=True).requires_grad_()
    if dtype is not None:
        floating = {k: v for k, v in keywords.items() if isinstance(v, Tensor) and v.is_floating_point()}
        keywords = keywords | {k: v.to(dtype) for k, v in floating.items()}
    logits = case.view(storage.clone() if keywords.get("inplace") else storage)
    outputs = None
    if case.objective == "logprobs":
        loss = function(logits, case.target_tokens, **keywords)
    else:
        loss, outputs = function(logits, case.target_tokens, return_outputs=True, **keywords)
    loss.backward(torch.as_tensor(upstream, dtype=loss.dtype, device=loss.device).expand(loss.shape))
    assert storage.grad is not None
    return Numbers(loss.detach(), storage.grad, outputs and outputs.logprobs)


def check(case: Case, backend: str, upstream: Tensor | float = 1.0, **keywords: Any) -> Numbers:
    """Run ``case`` on ``backend`` and hold every number against the truth. Returns the numbers."""
    case = case.having(**keywords)
    return hold(case, run(case.public(backend), case, upstream=upstream), upstream)


def hold(case: Case, actual: Numbers, upstream: Tensor | float = 1.0) -> Numbers:
    """Hold every number of a run of ``case`` against the truth."""
    eager = run(case.reference, case, upstream=upstream)
    truth = run(case.reference, case, torch.float64, upstream=upstream)

    assert actual.loss.dtype == torch.float32 and actual.loss.shape == truth.loss.shape
    assert_loss(actual.loss, eager.loss, truth.loss, _loss_scale(case))
    logp = truth.loss if truth.logprobs is None else truth.logprobs
    if actual.logprobs is not None and eager.logprobs is not None:
        assert actual.logprobs.dtype == torch.float32 and actual.logprobs.shape == case.target_tokens.shape
        assert_loss(actual.logprobs, eager.logprobs, logp, 1 + logp.abs() + _cap(case))
    gradients = [case.view(numbers.gradient) for numbers in (actual, eager, truth)]
    assert_gradient(*gradients, case.target_tokens, logp, magnitude(case, gradients[-1]), _cap(case))
    return actual


def assert_loss(actual: Tensor, eager: Tensor, truth: Tensor, scale: Tensor | float) -> None:
    """``scale``: what one rounding of each logprob and of each token's loss amounts to, in units of EPS."""
    error, yardstick = _errors(actual, eager, truth)
    _assert_within(error, LOSS_FACTOR * yardstick + 4 * EPS * scale, actual, truth, "loss or logprob")


def assert_gradient(
    actual: Tensor, eager: Tensor, truth: Tensor, target_tokens: Tensor, logp: Tensor, size: Tensor, cap: float
) -> None:
    """Element by element, as a norm over a row hides all but its largest; the targets' elements on their own.

    size: what an element is a sum of, each part taken positive; cap: what a softcap's tanh is multiplied by.

    The allowance is GRADIENT_FACTOR times the larger of eager's error, at its worst in the row relative to the element,
    and one rounding to the dtype; plus a few roundings of float32.
    """
    dtype, vocab = actual.dtype, truth.shape[-1]
    assert dtype == eager.dtype
    actual, eager, truth, size = (t.reshape(-1, vocab) for t in (actual, eager, truth, size))
    error, yardstick = _errors(actual, eager, truth)
    targets = target_tokens.reshape(truth.shape[0], -1 if truth.shape[0] else 1).long()
    # those that are ignored or out of range have no element: theirs goes to a column of its own
    targets = targets.where((targets >= 0) & (targets < vocab), vocab)
    actual, eager, truth, size, error, yardstick = (
        torch.nn.functional.pad(t, (0, 1)) for t in (actual, eager, truth, size, error, yardstick)
    )
    logp = logp.reshape(targets.shape)
    worst = logp.abs().amax(-1, keepdim=True) if logp.numel() else logp

    relative = (yardstick / size).nan_to_num(0.0, 0.0, 0.0).scatter(1, targets, 0.0).amax(-1, keepdim=True)
    # p_j = exp(z_j - lse): a rounding of the exponent is a relative error of p_j
    exponent = (size / size.amax(-1, keepdim=True)).log().abs().nan_to_num(0.0, 0.0, 0.0) + worst + cap + 2
    roundings = 4 * EPS * exponent * size
    allowed = GRADIENT_FACTOR * torch.maximum(relative * size, half_ulp(size, dtype)) + roundings

    coefficient = (size.gather(1, targets) / -torch.expm1(logp)).nan_to_num(0.0, 0.0, 0.0)  # of 1 - p_t
    own = torch.maximum(yardstick, half_ulp(size, dtype)).gather(1, targets)
    allowed = allowed.scatter(1, targets, GRADIENT_FACTOR * own + 4 * EPS * coefficient * (2 + cap + logp.abs()))
    _assert_within(error, allowed, actual, truth, "gradient")


def half_ulp(size: Tensor, dtype: torch.dtype) -> Tensor:
    """The error of one rounding to ``dtype``; subnormal numbers may be flushed to zero, float16's excepted."""
    info = torch.finfo(dtype)
    rounding = torch.exp2(torch.floor(torch.log2(size.clamp(min=info.smallest_normal)))) * info.eps / 2
    return rounding.clamp(min=torch.finfo(torch.float32).smallest_normal)


def assert_rounded_once(case: Case, backend: str, **keywords: Any) -> None:
    """All but a few elements are the truth rounded to nearest; truncated, or rounded twice, half or a tenth are not."""
    actual = run(case.public(backend), case, **keywords).gradient
    truth = run(case.reference, case, torch.float64, **keywords).gradient
    off = (actual != truth.to(actual.dtype)).double().mean().item()
    assert off < 0.02, f"{off:.1%} of the elements are not the truth rounded to nearest"


def assert_sure_target(case: Case, backend: str) -> None:
    """Loss and gradient of targets that lead by 20, of which 1 minus a float32 p is 0."""
    targets = case.target_tokens.clamp(min=0)[:, None]
    sure = replace(case, storage=torch.zeros_like(case.storage).scatter(1, targets, 20.0))
    got = run(sure.public(backend), sure, reduction="none")
    others = (case.storage.shape[1] - 1) * math.exp(-20.0)
    active = case.target_tokens >= 0
    loss, gradient = got.loss[active], got.gradient.gather(1, targets)[active]
    torch.testing.assert_close(loss, torch.full_like(loss, others), rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, torch.full_like(gradient, -others / (1 + others)), rtol=1e-5, atol=0)


def _errors(actual: Tensor, eager: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """The errors of both, 0 where the truth is not finite: there ``actual`` has to be the same."""
    special = ~torch.isfinite(truth)
    torch.testing.assert_close(actual.double()[special], truth[special], rtol=0, atol=0, equal_nan=True)
    return tuple((t.double() - truth).abs().masked_fill(special, 0.0) for t in (actual, eager))


def _assert_within(error: Tensor, allowed: Tensor, actual: Tensor, truth: Tensor, what: str) -> None:
    bad = ~(error <= allowed)
    if bad.any():
        at = tuple(bad.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {bad.numel()} off; first at {at}: got {actual[at].item()!r}, "
            f"truth {truth[at].item()!r}, error {error[at].item():.3g}, allowed {allowed[at].item():.3g}"
        )


def inputs_of(case: Case) -> list[Tensor]:
    """The objective's columns in float64 and the tokens' shape, defaults included."""
    parameters = inspect.signature(getattr(fused_losses, case.objective)).parameters
    values = [case.keywords.get(name, parameters[name].default) for name in OBJECTIVES[case.objective].columns]
    like = torch.zeros(case.logits.shape[:-1], dtype=torch.float64, device=case.storage.device)
    return [like + (math.inf if v is None else v) for v in values]


def row_terms(case: Case) -> tuple[Seen, list[Tensor], Terms]:
    """What the tokens of a case see, in float64, and what :func:`terms.row_loss` makes a loss of."""
    given = case.keywords
    zero = torch.zeros(case.logits.shape[:-1], dtype=torch.float64, device=case.storage.device)
    transform = Transform(*(given.get(name, default) for name, default in Transform._field_defaults.items()))
    seen = reference.token_stats(case.logits.double(), case.target_tokens, transform, given.get("ignore_index", -100))
    if case.target_tokens.dim() > zero.dim():
        weights = given.get("weights")
        shares = torch.ones_like(seen.logp) if weights is None else weights + 0 * seen.logp.nan_to_num(0, 0, 0)
        shares = shares.where(case.target_tokens != given.get("ignore_index", -100), 0.0)
        seen = seen._replace(logp=(shares * seen.logp).where(shares != 0, 0.0).sum(-1), whole=shares.sum(-1))
    penalised = given.get("ref_logprobs") is not None
    limit = given.get("log_ratio_clamp")
    importance, ref_logprobs = given.get("importance_weights"), given.get("ref_logprobs")
    terms = Terms(
        importance_weights=zero + (1.0 if importance is None else importance),
        ref_logprobs=zero + (0.0 if ref_logprobs is None else ref_logprobs),
        kl_coef=zero + given.get("kl_coef", 0.0),
        entropy_coef=zero + given.get("entropy_coef", 0.0),
        log_ratio_clamp=zero + (math.inf if limit is None else limit),
        label_smoothing=given.get("label_smoothing", 0.0),
        z_loss=given.get("z_loss", 0.0),
        kl_type=given.get("kl_type", "k3") if penalised else None,
        kl_weighted_by_ratio=given.get("kl_weighted_by_ratio", False),
        entropy="entropy_coef" in given,
    )
    return seen, inputs_of(case), terms


def _loss_scale(case: Case) -> Tensor:
    """|w| times what one rounding of each number in a token's loss amounts to, over EPS; summed where the loss is."""
    seen, inputs, terms = row_terms(case)
    x = seen.logp.detach().requires_grad_()
    if case.objective == "logprobs":
        return (1 + x.abs()).detach()
    given, vocab = case.keywords, case.logits.shape[-1]
    spread = 1 + x.abs() + _cap(case)
    old = inputs[0].abs() if case.objective in RATIO_LOSSES else torch.zeros_like(x)
    losses = OBJECTIVES[case.objective].formula(x, *inputs)[0]
    (g,) = torch.autograd.grad(losses.sum(), x)
    scale = times(terms.importance_weights.abs(), losses.abs() + g.abs() * (spread + old))
    if terms.kl_type is not None:
        value, slope, _ = kl(x, terms.ref_logprobs, terms.kl_type)
        size = 1 + value.abs() + (1 + slope.abs()) * (spread + terms.ref_logprobs.abs())
        if terms.kl_weighted_by_ratio:
            size = size * torch.exp(x - inputs[0]) * (spread + old)
        scale = scale + times(terms.kl_coef.abs(), size)
    log_v = math.log(vocab) + 1
    scale = scale + times(terms.entropy_coef.abs(), 2 * (seen.entropy + log_v) + spread)
    total = torch.as_tensor(seen.whole).abs() + 0 * x
    if terms.label_smoothing:
        scale = scale + terms.label_smoothing * total * (2 * seen.spread.abs() + log_v + spread)
    scale = scale + terms.z_loss * total * 4 * (1 + seen.lse.abs()) ** 2
    if case.target_tokens.dim() > x.dim():
        logp = reference.logprobs(case.logits.double(), case.target_tokens, **_transforms(given))
        weights = torch.as_tensor(given.get("weights", 1.0), device=logp.device) + 0 * logp
        items = weights.where(case.target_tokens != given.get("ignore_index", -100), 0.0)
        scale = scale + (items.abs() * (1 + logp.abs())).where(items != 0, 0.0).sum(-1)
        weights = torch.ones_like(x)
        active, divisor = (items != 0).any(-1), items.sum()
    else:
        weights = given.get("weights")
        weights = torch.ones_like(x) if weights is None else weights + torch.zeros_like(x)
        active = (weights != 0) & (case.target_tokens != given.get("ignore_index", -100))
        divisor = weights.where(active, 0.0).sum()
    scale = (weights.abs() * scale).detach().where(active, 0.0)
    if case.reduction == "none":
        return scale
    denominator = given.get("denominator")
    if denominator is None:
        denominator = divisor if case.reduction == "mean" else 1.0
    return scale.sum() / abs(denominator) if active.any() else scale.sum()


def _cap(case: Case) -> float:
    """|z| that a rounding of a softcap's tanh is relative to."""
    temperature = torch.as_tensor(case.keywords.get("temperature", 1.0)).min()
    return (case.keywords.get("softcap") or 0.0) / float(temperature)


def magnitude(case: Case, truth: Tensor) -> Tensor:
    """What the elements of a gradient are sums of, each part taken positive: what their rounding is relative to."""
    seen, inputs, terms = row_terms(case)
    formula = OBJECTIVES[case.objective].formula
    _, g, h, zeta, s = (t[..., None] for t in row_loss(formula, seen, inputs, terms))
    # g is itself a sum, of the objective's and of the KL's
    parts = row_loss(formula, seen, inputs, terms._replace(kl_type=None)).g.abs()
    if terms.kl_type is not None:
        _, slope, both = kl(seen.logp, terms.ref_logprobs, terms.kl_type)
        penalty = 1 + slope.abs()
        if terms.kl_weighted_by_ratio:
            clamped, flows = log_ratio(seen.logp, inputs[0], terms.log_ratio_clamp)
            penalty = (1 + torch.where(flows, both, slope).abs()) * torch.exp(clamped)
        parts = parts + times(terms.kl_coef.abs(), penalty)
    parts = parts[..., None]
    z = transformed(case)
    p = torch.softmax(z, -1)
    mean = (p * z.masked_fill(p == 0, 0.0)).sum(-1, keepdim=True)
    share = torch.zeros_like(p)
    targets = case.target_tokens if case.target_tokens.dim() == z.dim() else case.target_tokens[..., None]
    weights = torch.ones_like(targets, dtype=p.dtype)
    if case.target_tokens.dim() == z.dim():
        weights = (torch.as_tensor(case.keywords.get("weights", 1.0), device=p.device) + 0 * weights).double()
    weights = weights.where(targets != case.keywords.get("ignore_index", -100), 0.0)
    inside = targets.clamp(0, z.shape[-1] - 1).long()
    share.scatter_add_(-1, inside, weights)
    total = weights.sum(-1, keepdim=True)
    size_of_share = torch.zeros_like(p).scatter_add_(-1, inside, weights.abs())
    drift = (z - mean).abs().nan_to_num(0.0, 0.0, 0.0)
    offset = s / z.shape[-1]
    size = (
        parts * (size_of_share + weights.abs().sum(-1, keepdim=True) * p)
        + p * (zeta.abs() + h.abs() * (drift + 2))
        + offset.abs()
    )
    signed = g * (share - total * p) + p * (zeta - h * (z.masked_fill(p == 0, 0.0) - mean)) + offset
    slope = slope_of(case).expand_as(p)
    size, signed = (t.nan_to_num(0.0, 0.0, 0.0) * slope for t in (size, signed))
    # the weights and the upstream gradient: one factor per row, told from its largest element
    at = signed.abs().argmax(-1, keepdim=True)
    factor = (truth.abs().gather(-1, at) / signed.abs().gather(-1, at)).nan_to_num(0.0, 0.0, 0.0)
    return torch.maximum(size * factor, truth.abs())


def transformed(case: Case) -> Tensor:
    """z in float64."""
    given = case.keywords
    z = case.logits.double() * given.get("logit_scale", 1.0)
    if given.get("softcap"):
        z = given["softcap"] * torch.tanh(z / given["softcap"])
    temperature = torch.as_tensor(given.get("temperature", 1.0), device=z.device)
    return z / (temperature.expand(z.shape[:-1])[..., None] if temperature.dim() else temperature)


def slope_of(case: Case) -> Tensor:
    """dz/dlogits over its factor per row"""
    cap = case.keywords.get("softcap")
    if not cap:
        return torch.ones((), dtype=torch.float64, device=case.storage.device)
    z = case.logits.double() * case.keywords.get("logit_scale", 1.0)
    return 1 - torch.tanh(z / cap) ** 2
