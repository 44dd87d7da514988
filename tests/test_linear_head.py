"""The head of a model in place of logits: right numbers whatever is chunked, frozen or masked, and no more work and
memory than that takes. What a group shards is tested elsewhere.

The truth is the reference on ``hidden @ weight.T + bias`` in float64; the yardstick the same at the inputs' dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import (
    EPS,
    GRADIENT_FACTOR,
    INPUTS,
    LOSS_FACTOR,
    LOSSES,
    RATIO_LOSSES,
    Case,
    _loss_scale,
    half_ulp,
    magnitude,
)
from conftest import require
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fused_losses
from fused_losses import LinearHead, reference
from fused_losses.backends import unusable
from fused_losses.linear_head import _rows_of
from fused_losses.objectives import OBJECTIVES

H, VOCAB = 8, 31
TOKENS = (2, 3)
N = math.prod(TOKENS)
NAMES = ("hidden", "weight", "bias")
MODES: dict[str, dict[str, Any]] = {"one pass": {}, "recompute": {"recompute": True}, "none": {"reduction": "none"}}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CLOSE = {"rtol": 2e-5, "atol": 2e-6}  # of float32 to float64, for numbers of about 1
HOSTS = pytest.mark.parametrize("host", ["eager", "cpu"])  # where what is tested is torch's, and not a kernel's


def spare(backend: str, device: torch.device, needed: bool) -> None:
    if backend == "triton" and device.type == "cpu" and not needed:
        pytest.skip("products and kernels are those of other cases; interpreted, they take their time")


def chunk_bytes(rows: int, vocab: int = VOCAB, size: int = 4) -> int:
    """Room for that many tokens."""
    return rows * (vocab * size + 128)


@dataclass(frozen=True)
class Given:
    """A call of a loss; its logits come of ``inputs`` (hidden, weight, bias or None)."""

    name: str
    inputs: tuple[Tensor | None, ...]
    args: tuple[Any, ...]  # the targets, and what else goes by position
    keywords: dict[str, Any]

    @property
    def target_tokens(self) -> Tensor:
        return self.args[0]

    def having(self, **keywords: Any) -> Given:
        return replace(self, keywords=self.keywords | keywords)

    def to(self, dtype: torch.dtype) -> Given:
        """In that precision throughout."""

        def cast(value: Any) -> Any:
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        keywords = {name: cast(value) for name, value in self.keywords.items()}
        return Given(self.name, tuple(map(cast, self.inputs)), tuple(map(cast, self.args)), keywords)


@dataclass(frozen=True)
class Got:
    loss: Tensor
    gradients: dict[str, Tensor | None]
    logits_gradient: Tensor | None = None


def plain_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.nn.functional.linear(hidden, weight, bias)


def head(**options: Any) -> Callable[..., LinearHead]:
    return lambda *inputs: LinearHead(*inputs, **options)


def leaves_of(given: Given, wanted: str | tuple[str, ...] = NAMES) -> list[Tensor | None]:
    """Copies of the inputs, those that are ``wanted`` with a gradient."""
    return [
        None if tensor is None else tensor.detach().clone().requires_grad_(name in wanted)
        for name, tensor in zip(NAMES, given.inputs, strict=True)
    ]


def loss_of(given: Given, logits: Tensor | LinearHead, backend: str | None, **keywords: Any) -> Tensor:
    """Of a pair, whatever each gets back differs. backend None: the reference."""
    function = getattr(reference if backend is None else fused_losses, given.name)
    loss = function(logits, *given.args, **given.keywords | {"backend": backend or "auto"} | keywords)
    return loss if isinstance(loss, Tensor) else loss[0] - 0.5 * loss[1]


def run(
    given: Given,
    backend: str | None,
    make: Callable[..., Tensor | LinearHead] = plain_logits,
    wanted: str | tuple[str, ...] = NAMES,
    upstream: Tensor | float = 1.0,
    **keywords: Any,
) -> Got:
    leaves = leaves_of(given, wanted)
    logits = make(*leaves)
    if isinstance(logits, Tensor):
        logits.retain_grad()
    loss = loss_of(given, logits, backend, **keywords)
    loss.backward(torch.as_tensor(upstream, dtype=loss.dtype, device=loss.device).expand(loss.shape))
    gradients = {name: leaf.grad for name, leaf in zip(NAMES, leaves, strict=True) if leaf is not None}
    return Got(loss.detach(), gradients, logits.grad if isinstance(logits, Tensor) else None)


def squared(logp: Tensor, old: Tensor) -> Tensor:
    return (logp - old).square() - 0.1 * logp


def per_token(scale: float, offset: float = 0.0) -> Callable[[], Tensor]:
    return lambda: offset + scale * torch.rand(TOKENS)


WEIGHTS = [[1.0, 0.5, 2.0], [0.0, 3.0, 1.0]]
TRANSFORM = {"softcap": 6.0, "logit_scale": 0.9, "temperature": per_token(1.0, 0.5)}
TERMS = {
    "entropy_coef": per_token(0.6, -0.2),
    "kl_coef": per_token(1.0),
    "ref_logprobs": per_token(-4.0),
    "importance_weights": per_token(1.0, 0.2),
    "log_ratio_clamp": per_token(1.0, 0.3),
}
CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in LOSSES},
    **{f"{name}, terms": (name, TERMS) for name in RATIO_LOSSES},
    "reinforce, terms": ("reinforce", {name: term for name, term in TERMS.items() if name != "log_ratio_clamp"}),
    "cross_entropy, weights": ("cross_entropy", {"weights": lambda: torch.tensor(WEIGHTS)}),
    "cross_entropy, label smoothing": ("cross_entropy", {"label_smoothing": 0.1}),
    "cross_entropy, z-loss": ("cross_entropy", {"z_loss": 0.01, "reduction": "sum"}),
    "cross_entropy, softcap": ("cross_entropy", {"softcap": 5.0}),
    "cross_entropy, temperature": ("cross_entropy", {"temperature": per_token(1.0, 0.5)}),
    "cross_entropy, all": ("cross_entropy", {"label_smoothing": 0.1, "z_loss": 0.01, **TRANSFORM}),
    "cross_entropy, K targets": ("cross_entropy", {"weights": lambda: torch.rand(*TOKENS, 3)}),
    "cross_entropy, K targets, all": (
        "cross_entropy",
        {"weights": lambda: torch.rand(*TOKENS, 3), "label_smoothing": 0.1, "z_loss": 0.01, "softcap": 6.0},
    ),
    "ppo, all": ("ppo", {**TERMS, **TRANSFORM, "kl_weighted_by_ratio": True, "weights": lambda: torch.tensor(WEIGHTS)}),
    "ppo, denominator": ("ppo", {"denominator": 17.0}),
}
COMPOSED: dict[str, tuple[str, dict[str, Any]]] = {
    "logprobs": ("logprobs", {}),
    "logprobs, transforms": ("logprobs", TRANSFORM),
    "logprobs and entropy": ("logprobs", {"return_entropy": True}),
    "gspo": ("gspo", {"ratio_gradient": "token"}),
    "gspo of sequences": ("gspo", {"ratio_gradient": "sequence", "entropy_coef": 0.1}),
    "gspo, packed": ("gspo", {"ratio_gradient": "sequence", "cu_seqlens": lambda: torch.tensor([0, 2, 2, N])}),
    "gmpo": ("gmpo", {}),
    "vespo": ("vespo", {"entropy_coef": 0.1}),
    "sapo of sequences": ("sapo", {"ratio_level": "sequence", "ratio_gradient": "sequence"}),
    "policy_loss of a function": ("policy_loss", {"objective": squared}),
    "policy_loss by name": ("policy_loss", {"objective": "dro"}),
}


@cache
def given_of(call: str, device: torch.device, bias: bool = True) -> Given:
    """In float32: random numbers and an ignored token; weights hold a 0."""
    name, options = (CALLS | COMPOSED)[call]
    torch.manual_seed(0)
    hidden, weight = torch.randn(*TOKENS, H), torch.randn(VOCAB, H)
    offset = 0.3 * torch.randn(VOCAB) if bias else None
    several = (3,) if "K targets" in call else ()
    target = torch.randint(VOCAB, (*TOKENS, *several))
    target.view(-1, *several)[2] = -100
    keywords = {key: value() if callable(value) and value is not squared else value for key, value in options.items()}
    x = reference.logprobs(plain_logits(hidden, weight, offset), target)
    args: list[Any] = [target]
    if name == "policy_loss":
        args += [keywords.pop("objective"), INPUTS["old_logprobs"](x), INPUTS["advantages"](x)]
        args = args[:3] if args[1] is squared else args
    elif name in OBJECTIVES:
        args += [INPUTS[column](x) for column in OBJECTIVES[name].inputs]
    else:
        args += [INPUTS["old_logprobs"](x), INPUTS["advantages"](x)]
    inputs = (hidden, weight, offset)

    def here(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    return Given(name, tuple(map(here, inputs)), tuple(map(here, args)), {k: here(v) for k, v in keywords.items()})


@dataclass(frozen=True)
class Truth:
    given: Given
    eager: Got
    truth: Got
    losses_error: Tensor  # of each token, in eager; NaN where a loss has none of its own


@cache
def truth_of(call: str, device: torch.device, dtype: torch.dtype, bias: bool, mode: str, upstream: float) -> Truth:
    given = given_of(call, device, bias)
    inputs = tuple(None if tensor is None else tensor.to(dtype) for tensor in given.inputs)
    given = replace(given, inputs=inputs).having(**MODES[mode])
    eager, truth = (run(g, None, upstream=upstream) for g in (given, given.to(torch.float64)))
    each = (given.having(reduction="none"), given.to(torch.float64).having(reduction="none"))
    if given.name == "logprobs" or "denominator" in given.keywords:
        return Truth(given, eager, truth, (eager.loss - truth.loss).abs())
    losses = [run(g, None).loss.double() for g in each]
    return Truth(given, eager, truth, (losses[0] - losses[1]).abs())


def assert_right(got: Got, expected: Truth, wanted: str | tuple[str, ...] = NAMES) -> None:
    """By the suite's measure: at most twice (loss) or three times (gradient) the error of eager torch, and a few
    roundings of float32, here also of the products that the logits are.

    Eager's error of a gradient is that of its worst element in a row, relative to what the element is a sum of.
    """
    given, eager, truth = expected.given, expected.eager, expected.truth
    hidden, weight, bias = (None if t is None else t.double() for t in given.inputs)
    assert hidden is not None and weight is not None
    logits = plain_logits(hidden, weight, bias)
    made_of = (hidden.abs() @ weight.abs().t()).amax().item()  # roundings of this are errors of the exponents
    scale, size = torch.ones(()), truth.logits_gradient.abs()
    if given.name in LOSSES:
        names = list(OBJECTIVES[given.name].inputs)
        columns = dict(zip(names, given.args[1:], strict=False))
        case = Case(given.name, logits, given.target_tokens, {**columns, **given.keywords})
        scale, size = _loss_scale(case), magnitude(case, truth.logits_gradient)
    assert got.loss.dtype == torch.float32 and got.loss.shape == truth.loss.shape
    error = (got.loss.double() - truth.loss).abs()
    yardstick = (eager.loss.double() - truth.loss).abs()
    if got.loss.dim() == 0:  # one whose tokens' errors happen to cancel is none
        yardstick = torch.maximum(yardstick, expected.losses_error.mean())
    allowed = LOSS_FACTOR * yardstick + 4 * EPS * (1 + made_of) * (scale + truth.loss.abs())
    assert (error <= allowed).all(), (error, allowed)

    rows = size.reshape(-1, VOCAB)
    sizes = {
        "hidden": (rows @ weight.abs()).view(hidden.shape),
        "weight": rows.t() @ hidden.abs().reshape(-1, H),
        "bias": rows.sum(0),
    }
    for name, tensor in zip(NAMES, given.inputs, strict=True):
        if tensor is None:
            continue
        actual = got.gradients[name]
        if name not in wanted:
            assert actual is None, name
            continue
        exact, measured = truth.gradients[name], eager.gradients[name]
        assert actual.dtype == tensor.dtype and actual.shape == tensor.shape
        error, yardstick = ((g.double() - exact).abs() for g in (actual, measured))
        relative = (yardstick / sizes[name]).nan_to_num(0.0, 0.0, 0.0).amax(-1, keepdim=True)
        allowed = GRADIENT_FACTOR * torch.maximum(relative * sizes[name], half_ulp(sizes[name], actual.dtype))
        allowed = allowed + 4 * EPS * (1 + made_of) * sizes[name]
        bad = ~(error <= allowed)
        assert not bad.any(), (name, bad.nonzero().tolist(), error[bad], allowed[bad])


def check(
    call: str,
    backend: str,
    device: torch.device,
    mode: str = "one pass",
    dtype: torch.dtype = torch.float32,
    wanted: str | tuple[str, ...] = NAMES,
    bias: bool = True,
    upstream: float = 1.0,
    **options: Any,
) -> Got:
    expected = truth_of(call, device, dtype, bias, mode, upstream)
    got = run(expected.given, backend, head(**options), wanted, upstream)
    assert_right(got, expected, wanted)
    return got


# ---- Right numbers ----


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("call", CALLS)
def test_loss(backend, device, call, mode):
    """Every loss, in chunks of 2 tokens."""
    spare(backend, device, mode != "none")
    if mode == "none" and ("denominator" in call or "z-loss" in call):
        pytest.skip("reduced by definition")
    check(call, backend, device, mode, chunk_bytes=chunk_bytes(2))


@pytest.mark.parametrize("call", COMPOSED)
def test_composed_loss(backend, device, call):
    """Of sequences, of a function, and the logprobs alone."""
    expected = truth_of(call, device, torch.float32, True, "one pass", 1.0)  # in two phases: what is its default
    for wanted in (NAMES, ("hidden",)):
        got = run(expected.given, backend, head(chunk_bytes=chunk_bytes(2)), wanted)
        assert_right(got, expected, wanted)


FROZEN: dict[str, tuple[tuple[str, ...], bool]] = {
    # what gets a gradient, and whether there is a bias
    "nothing": (NAMES, True),
    "nothing, no bias": (NAMES, False),
    "weight": (("hidden", "bias"), True),
    "weight and bias": (("hidden",), True),
    "weight, no bias": (("hidden",), False),
    "hidden": (("weight", "bias"), True),
    "hidden and bias": (("weight",), True),
    "hidden, no bias": (("weight",), False),
    "all but the bias": (("bias",), True),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("call", ["cross_entropy, weights", "ppo, all"])
def test_frozen(backend, device, call, frozen, mode):
    spare(backend, device, frozen in ("nothing", "weight and bias") and call == "ppo, all")
    wanted, bias = FROZEN[frozen]
    for skip_masked in (False, True):
        check(
            call, backend, device, mode, wanted=wanted, bias=bias, skip_masked=skip_masked, chunk_bytes=chunk_bytes(4)
        )


@pytest.mark.parametrize("rows", range(1, N + 2))
@pytest.mark.parametrize("mode", MODES)
def test_chunk_boundary(backend, device, mode, rows):
    """Wherever tokens are cut, those that are ignored among them."""
    spare(backend, device, rows in (1, 4))
    for call in ("cross_entropy, weights", "ppo, terms")[device.type == "cpu" and backend == "triton" :]:
        for skip_masked in (False, True):
            check(call, backend, device, mode, chunk_bytes=chunk_bytes(rows), skip_masked=skip_masked)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("call", ["cross_entropy", "cross_entropy, all", "ppo, terms", "cispo"])
def test_half_precision(backend, device, call, mode, dtype):
    spare(backend, device, call == "cross_entropy, all" and mode != "none")
    for rows in (2, N):
        check(call, backend, device, mode, DTYPES[dtype], chunk_bytes=chunk_bytes(rows, size=2))


@pytest.mark.parametrize("upstream", [2.0, -0.3, 1e3])
@pytest.mark.parametrize("mode", MODES)
def test_upstream(backend, device, mode, upstream):
    spare(backend, device, upstream == 1e3)
    for wanted in (NAMES, ("hidden",)):
        check("ppo, all", backend, device, mode, wanted=wanted, upstream=upstream, chunk_bytes=chunk_bytes(2))


def test_upstream_of_each_token(backend, device):
    """reduction="none", in two phases and where the gradient is made in forward."""
    given = given_of("ppo", device).having(reduction="none")
    upstream = torch.linspace(-2, 3, N, device=device).view(TOKENS)
    expected = run(given.to(torch.float64), None, upstream=upstream.double())
    for wanted in (NAMES, ("hidden",), ("weight", "bias")):
        got = run(given, backend, head(chunk_bytes=chunk_bytes(2)), wanted, upstream)
        for name in wanted:
            torch.testing.assert_close(got.gradients[name].double(), expected.gradients[name], **CLOSE)


def test_outputs(backend, device):
    """What a loss returns beside it is that of the logits, tokens of weight 0 included."""
    given = given_of("ppo, all", device)
    hidden, weight, bias = leaves_of(given)
    for options in ({}, {"skip_masked": True}):
        seen = [
            function(logits, *given.args, **given.keywords, return_outputs=True)[1]
            for function, logits in (
                (reference.ppo, plain_logits(hidden, weight, bias)),
                (
                    lambda *args, **kwargs: fused_losses.ppo(*args, backend=backend, **kwargs),
                    LinearHead(hidden, weight, bias, chunk_bytes=chunk_bytes(2), **options),
                ),
            )
        ]
        assert seen[1].logprobs.shape == TOKENS
        torch.testing.assert_close(seen[1].logprobs, seen[0].logprobs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(seen[1].entropy, seen[0].entropy, rtol=1e-5, atol=1e-5)
        assert seen[1].metrics.keys() == seen[0].metrics.keys()
        for name, value in seen[0].metrics.items():
            torch.testing.assert_close(seen[1].metrics[name], value, rtol=1e-5, atol=1e-5)


def test_padded_vocabulary(backend, device):
    """A bias of -inf takes a class out; its gradient is 0, and so is that of its row of weight."""
    given = given_of("cross_entropy", device)
    bias = given.inputs[2].clone()
    bias[-1] = -torch.inf
    given = replace(given, inputs=(*given.inputs[:2], bias), args=(given.target_tokens.clamp(max=VOCAB - 2),))
    expected = run(given.to(torch.float64), None)
    for mode in MODES:
        got = run(given.having(**MODES[mode]), backend, head(chunk_bytes=chunk_bytes(2)))
        assert not got.gradients["bias"][-1].any() and not got.gradients["weight"][-1].any()
        if mode != "none":
            torch.testing.assert_close(got.gradients["weight"].double(), expected.gradients["weight"], **CLOSE)


SHAPES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    # a layout of a tensor: how it is stored, and the view that is handed over
    "transposed": (lambda t: t.transpose(0, -1), lambda t: t.transpose(0, -1)),
    "every other": (lambda t: t.repeat_interleave(2, -1), lambda t: t[..., ::2]),
    "a part": (lambda t: torch.nn.functional.pad(t, (1, 2)), lambda t: t[..., 1:-2]),
    "the tokens transposed": (lambda t: t.transpose(0, 1), lambda t: t.transpose(0, 1)),
}


@pytest.mark.parametrize("mode", ["one pass", "recompute"])
@pytest.mark.parametrize("layout", SHAPES)
@pytest.mark.parametrize("which", ["hidden", "weight"])
def test_layout(backend, device, which, layout, mode):
    """The strides of what the products are made of change no number, and the gradient arrives where it belongs."""
    spare(backend, device, layout == "transposed" and mode == "one pass")
    store, view = SHAPES[layout]
    given = given_of("cross_entropy", device).having(**MODES[mode])
    expected = run(given, backend, head(chunk_bytes=chunk_bytes(2)))
    hidden, weight, bias = leaves_of(given)
    stored = store((hidden if which == "hidden" else weight).detach()).contiguous().requires_grad_()
    inputs = (view(stored), weight, bias) if which == "hidden" else (hidden, view(stored), bias)
    loss_of(given, LinearHead(*inputs, chunk_bytes=chunk_bytes(2)), backend).backward()
    torch.testing.assert_close(view(stored.grad), expected.gradients[which])


def test_expanded_hidden(backend, device):
    """The same hidden for all tokens gets the sum of what each would."""
    given = given_of("cross_entropy", device)
    one = given.inputs[0][0, 0]
    truth = replace(given, inputs=(one.expand(*TOKENS, H), *given.inputs[1:])).to(torch.float64)
    expected = run(truth, None).gradients["hidden"].sum((0, 1))
    for mode in MODES:
        leaf = one.clone().requires_grad_()
        loss = loss_of(
            given.having(**MODES[mode]),
            LinearHead(leaf.expand(*TOKENS, H), *given.inputs[1:], chunk_bytes=chunk_bytes(2)),
            backend,
        )
        divisor = (given.target_tokens != -100).sum() if mode == "none" else 1
        (loss.sum() / divisor).backward()
        torch.testing.assert_close(leaf.grad.double(), expected, **CLOSE)


@pytest.mark.parametrize("tokens", [(), (6,), (1, 2, 3), (6, 1)])
def test_shape_of_hidden(backend, device, tokens):
    torch.manual_seed(0)
    hidden, weight = torch.randn(*tokens, H, device=device), torch.randn(VOCAB, H, device=device)
    target = torch.randint(VOCAB, tokens, device=device)
    given = Given("cross_entropy", (hidden, weight, None), (target,), {"reduction": "none"})
    expected = run(given.to(torch.float64), None)
    got = run(given, backend, head(chunk_bytes=chunk_bytes(4)))
    torch.testing.assert_close(got.loss.double(), expected.loss, **CLOSE)
    for name in ("hidden", "weight"):
        torch.testing.assert_close(got.gradients[name].double(), expected.gradients[name], **CLOSE)


@pytest.mark.parametrize("mode", MODES)
def test_fp32_head(backend, device, mode):
    """bfloat16 products whose logits are not rounded: off only by how the gradient of the logits is, for its
    products. The loss is that of float32 logits."""
    given = given_of("cross_entropy", device).having(**MODES[mode])
    given = replace(given, inputs=tuple(t.bfloat16() for t in given.inputs))
    truth = run(given.to(torch.float64), None)
    rounded = run(given, backend, head())
    for options in ({"chunk_bytes": chunk_bytes(2, size=6)}, {}):
        got = run(given, backend, head(logits_dtype=torch.float32, **options))
        torch.testing.assert_close(got.loss.double(), truth.loss, **CLOSE)
        assert (rounded.loss - truth.loss).abs().max() > 1e-3, "no difference to see"
        for name, size in zip(NAMES, sizes_of(given, truth), strict=True):
            assert got.gradients[name].dtype == torch.bfloat16
            error = (got.gradients[name].double() - truth.gradients[name]).abs()
            # rounded: the gradient of the logits, the product, on a CPU that of each chunk, and their sum
            assert (error <= 3 * 2**-8 * size + 1e-6).all(), name


def sizes_of(given: Given, truth: Got) -> tuple[Tensor, Tensor, Tensor]:
    """Of each element of the gradients, the sum of what it is made of, each part taken positive."""
    hidden, weight, _ = given.to(torch.float64).inputs
    rows = truth.logits_gradient.abs().reshape(-1, VOCAB)
    return (rows @ weight.abs()).view(hidden.shape), rows.t() @ hidden.abs().reshape(-1, H), rows.sum(0)


@pytest.mark.parametrize("sums", [torch.float32, torch.bfloat16])
def test_weight_gradient_is_summed_in_float32(backend, device, sums):
    """300 chunks of one token, each of which adds a half: in bfloat16 a sum of 128 takes no more of them."""
    n = 20 if backend == "triton" and device.type == "cpu" else 300
    if n < 300 and sums is torch.bfloat16:
        pytest.skip("interpreted, there are too few to see a difference")
    hidden = torch.ones(n, H, dtype=torch.bfloat16, device=device)
    weight = torch.zeros(2, H, dtype=torch.bfloat16, device=device, requires_grad=True)
    target = torch.zeros(n, dtype=torch.int64, device=device)
    logits = LinearHead(hidden, weight, chunk_bytes=chunk_bytes(1, 2, 2), weight_grad_dtype=sums)
    fused_losses.cross_entropy(logits, target, reduction="sum", backend=backend).backward()
    right = (weight.grad[0].float() + n / 2).abs().max() <= n / 2 * 2**-8
    assert right == (sums is torch.float32)


@HOSTS
def test_loss_is_summed_in_float64(host):
    """1000 chunks of one token, and no more than a rounding of the sum."""
    require(host)
    torch.manual_seed(0)
    hidden, weight, target = torch.randn(1000, H), torch.randn(3, H), torch.randint(3, (1000,))
    truth = reference.cross_entropy(hidden.double() @ weight.double().t(), target, reduction="sum")
    for grad in (False, True):
        logits = LinearHead(hidden, weight.requires_grad_(grad), chunk_bytes=chunk_bytes(1, 3))
        loss = fused_losses.cross_entropy(logits, target, reduction="sum", backend=host)
        torch.testing.assert_close(loss.double(), truth, rtol=EPS, atol=0)


# ---- Inactive tokens ----

INACTIVE = {
    "ignored": lambda given: given,
    "of weight 0": lambda given: replace(given, args=(given.target_tokens.clamp(min=0), *given.args[1:])).having(
        weights=(given.target_tokens != -100).float()
    ),
}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("inactive", INACTIVE)
@pytest.mark.parametrize("mode", MODES)
def test_hidden_of_inactive_tokens(backend, device, mode, inactive, bad):
    """Whatever it holds, it has gradient 0 and reaches no other gradient, that of weight among them: 0 * NaN."""
    spare(backend, device, bad == math.inf)
    given = INACTIVE[inactive](given_of("ppo", device)).having(**MODES[mode])
    at = given_of("ppo", device).target_tokens == -100
    broken = given.inputs[0].masked_fill(at[..., None], bad)
    for options in ({}, {"skip_masked": True}):
        expected = run(given, backend, head(chunk_bytes=chunk_bytes(2), **options))
        got = run(
            replace(given, inputs=(broken, *given.inputs[1:])), backend, head(chunk_bytes=chunk_bytes(2), **options)
        )
        assert not got.gradients["hidden"][at].any()
        for name in NAMES:
            torch.testing.assert_close(got.gradients[name], expected.gradients[name], rtol=0, atol=0)
        torch.testing.assert_close(got.loss, expected.loss, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["one pass", "recompute"])
@pytest.mark.parametrize("skip_masked", [False, True])
def test_hidden_of_a_token_read_for_its_logprob(backend, device, mode, skip_masked):
    """Of weight 0, under return_outputs: its logprob is NaN, and nothing else is."""
    given = INACTIVE["of weight 0"](given_of("ppo", device))
    at = given.keywords["weights"] == 0
    leaves = leaves_of(given)
    logits = LinearHead(
        leaves[0].masked_fill(at[..., None], math.nan),
        *leaves[1:],
        chunk_bytes=chunk_bytes(2),
        skip_masked=skip_masked,
    )
    loss, outputs = fused_losses.ppo(
        logits, *given.args, **given.keywords, **MODES[mode], return_outputs=True, backend=backend
    )
    loss.backward()
    assert torch.equal(outputs.logprobs.isnan(), at)
    for leaf in leaves:
        assert leaf.grad.isfinite().all()


def test_token_that_the_caller_masks(backend, device):
    """By an upstream gradient of 0, whatever the token's hidden holds."""
    given = given_of("ppo", device).having(reduction="none")
    hidden = given.inputs[0].clone()
    hidden[0, 1] = math.nan
    upstream = torch.ones(TOKENS, device=device)
    upstream[0, 1] = 0.0
    for wanted in (NAMES, ("hidden",)):
        got = run(
            replace(given, inputs=(hidden, *given.inputs[1:])),
            backend,
            head(chunk_bytes=chunk_bytes(2)),
            wanted,
            upstream,
        )
        expected = run(given, backend, head(chunk_bytes=chunk_bytes(2)), wanted, upstream)
        for name in wanted:
            torch.testing.assert_close(got.gradients[name], expected.gradients[name], rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["one pass", "recompute"])
@pytest.mark.parametrize("skip_masked", [False, True])
@pytest.mark.parametrize("n", [0, 5])
def test_no_active_token(backend, device, n, skip_masked, mode):
    """None at all, or all ignored: the loss is 0 with a gradient of 0, connected to the graph."""
    target = torch.full((n,), -100, device=device)
    hidden = torch.full((n, H), math.nan, device=device, requires_grad=True)
    weight, bias = (torch.randn(*shape, device=device, requires_grad=True) for shape in ((VOCAB, H), (VOCAB,)))
    logits = LinearHead(hidden, weight, bias, chunk_bytes=chunk_bytes(2), skip_masked=skip_masked)
    loss = fused_losses.cross_entropy(logits, target, backend=backend, **MODES[mode])
    loss.backward()
    assert loss.item() == 0
    for leaf in (hidden, weight, bias):
        assert leaf.grad.shape == leaf.shape and not leaf.grad.any()
    each = fused_losses.logprobs(logits, target, backend=backend)
    assert each.shape == (n,) and not each.any()


@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize("skip_masked", [False, True])
@HOSTS
def test_target_out_of_range(host, skip_masked, validate):
    """Raises before any product, and counts among all tokens, not among a chunk's."""
    require(host)
    given = given_of("cross_entropy", torch.device("cpu"))
    target = given.target_tokens.clone()
    target.view(-1)[4] = VOCAB
    leaves = leaves_of(given)
    logits = LinearHead(*leaves, chunk_bytes=chunk_bytes(2), skip_masked=skip_masked)

    def called(**keywords: Any) -> None:
        for function in (
            fused_losses.cross_entropy,
            lambda *args, **kwargs: fused_losses.logprobs(*args, backend=host),
        ):
            with pytest.raises(ValueError, match=rf"target_tokens .* got {VOCAB} at token 4 of {N}"):
                function(logits, target, backend=host, validate=validate, **keywords)

    assert products(called) == products(lambda: called(recompute=True)) == []


def test_validate_looks_at_values(backend, device):
    given = given_of("cross_entropy", device)
    temperature = torch.ones(TOKENS, device=device)
    temperature[1, 2] = -1.0
    logits = LinearHead(*given.inputs, chunk_bytes=chunk_bytes(2))
    with pytest.raises(ValueError, match="temperature"):
        fused_losses.cross_entropy(logits, given.target_tokens, temperature=temperature, validate=True, backend=backend)


# ---- When a gradient is made, and how often ----


@pytest.mark.parametrize("mode", MODES)
def test_second_backward(backend, device, mode):
    """One pass: an error that names recompute. Else allowed, and the same."""
    given = given_of("ppo", device).having(**MODES[mode])
    leaves = leaves_of(given)
    loss = loss_of(given, LinearHead(*leaves, chunk_bytes=chunk_bytes(2)), backend).sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    before = [gradient.clone() for gradient in first]
    if mode == "one pass":
        with pytest.raises(RuntimeError, match="recompute=True"):
            torch.autograd.grad(loss, leaves)
    else:
        assert all(map(torch.equal, torch.autograd.grad(loss, leaves), before))
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss, leaves)
    assert all(map(torch.equal, first, before))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("mode", MODES)
@HOSTS
def test_double_backward_raises(host, mode, frozen):
    require(host)
    given = given_of("ppo", torch.device("cpu")).having(**MODES[mode])
    leaves = leaves_of(given, ("hidden",) if frozen else NAMES)
    loss = loss_of(given, LinearHead(*leaves), host).sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, leaves[:1], create_graph=True)


@pytest.mark.parametrize("which", NAMES)
@pytest.mark.parametrize("mode", MODES)
@HOSTS
def test_changed_before_backward(host, mode, which):
    """In two phases the logits are made again of what was given: changed in between, it is refused. In one pass, and
    where a frozen head's gradient is made in forward, nothing of it is kept."""
    require(host)
    given = given_of("ppo", torch.device("cpu")).having(**MODES[mode])
    for wanted in (NAMES, ("hidden",)):
        leaves = leaves_of(given, wanted)
        loss = loss_of(given, LinearHead(*leaves), host).sum()
        leaves[NAMES.index(which)].detach().zero_()
        if mode == "one pass" or (mode == "none" and wanted == ("hidden",)):
            loss.backward()
            assert torch.equal(leaves[0].grad, run(given, host, head(), wanted).gradients["hidden"])
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


@pytest.mark.parametrize("scale", [0.0, 2.0**14, math.inf])
@pytest.mark.parametrize("mode", MODES)
def test_scaled_loss(backend, device, mode, scale):
    """As by a gradient scaler: a power of two comes out as it went in, 0 makes 0, and under inf what is 0 stays."""
    spare(backend, device, scale == math.inf)
    given = given_of("ppo", device).having(**MODES[mode])
    ignored = given.target_tokens == -100
    for wanted in (NAMES, ("hidden",)):
        plain = run(given, backend, head(chunk_bytes=chunk_bytes(2)), wanted)
        got = run(given, backend, head(chunk_bytes=chunk_bytes(2)), wanted, scale)
        for name in wanted:
            if scale == math.inf:
                assert not got.gradients[name][torch.isfinite(plain.gradients[name])].isfinite().all()
            else:
                assert torch.equal(got.gradients[name], scale * plain.gradients[name])
        assert not got.gradients["hidden"][ignored].any()


def test_gradient_scaler(backend, device):
    """A step of float16 with torch's scaler, whose scale is in the upstream gradient."""
    given = given_of("cross_entropy", device)
    given = replace(given, inputs=tuple(t.half() for t in given.inputs))
    truth = run(given.to(torch.float64), None)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
    leaves = leaves_of(given)
    scaler.scale(loss_of(given, LinearHead(*leaves, chunk_bytes=chunk_bytes(2, size=2)), backend)).backward()
    for leaf, name, size in zip(leaves, NAMES, sizes_of(given, truth), strict=True):
        error = (leaf.grad.double() / 2**10 - truth.gradients[name]).abs()
        assert (error <= 4 * half_ulp(size, torch.float16) + 2e-3 * size).all(), name


@pytest.mark.parametrize("mode", MODES)
def test_same_bits_every_time(backend, device, mode):
    given = given_of("ppo, terms", device).having(**MODES[mode])
    first, second = (run(given, backend, head(chunk_bytes=chunk_bytes(2))) for _ in range(2))
    assert torch.equal(first.loss, second.loss)
    for name in NAMES:
        assert torch.equal(first.gradients[name], second.gradients[name])


@pytest.mark.parametrize("mode", MODES)
def test_no_gradient_wanted(backend, device, mode):
    given = given_of("ppo", device).having(**MODES[mode])
    expected = run(given, backend, head(chunk_bytes=chunk_bytes(2))).loss
    for context, wanted in ((torch.no_grad, NAMES), (torch.inference_mode, NAMES), (torch.enable_grad, ())):
        with context():
            leaves = leaves_of(given, wanted)
            loss = loss_of(given, LinearHead(*leaves, chunk_bytes=chunk_bytes(2)), backend)
        assert not loss.requires_grad and all(leaf.grad is None for leaf in leaves)
        torch.testing.assert_close(loss.clone(), expected, rtol=1e-6, atol=1e-6)


# ---- Work and memory ----


def products(function: Callable[[], object]) -> list[tuple[int, int, int]]:
    """The matrix products that ``function`` makes: rows, columns, and what is summed over."""
    with torch.profiler.profile(record_shapes=True) as profile:
        function()
    seen = []
    for event in profile.events():
        if event.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            left, right = event.input_shapes[:2] if event.name == "aten::mm" else event.input_shapes[1:3]
            seen.append((left[0], right[1], left[1]))
    return seen


COUNTS = {
    # what gets a gradient -> products of a chunk, by way
    NAMES: {"one pass": 3, "recompute": 4, "none": 4},
    ("hidden", "weight"): {"one pass": 3, "recompute": 4, "none": 4},
    ("hidden", "bias"): {"one pass": 2, "recompute": 3, "none": 3},
    ("hidden",): {"one pass": 2, "recompute": 3, "none": 2},
    ("weight",): {"one pass": 2, "recompute": 3, "none": 3},
    ("bias",): {"one pass": 1, "recompute": 2, "none": 2},
    (): {"one pass": 1, "recompute": 1, "none": 1},
}


@pytest.mark.parametrize("skip_masked", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wanted", COUNTS, ids="+".join)
def test_work(wanted, mode, skip_masked):
    """Only the products that remain; with ``skip_masked`` only the rows that remain. The same on every backend."""
    host = "eager" if unusable("cpu", torch.device("cpu")) else "cpu"
    given = given_of("cross_entropy", torch.device("cpu")).having(**MODES[mode])
    leaves = leaves_of(given, wanted)

    def step() -> None:
        logits = LinearHead(*leaves, chunk_bytes=chunk_bytes(3), skip_masked=skip_masked)
        loss = loss_of(given, logits, host).sum()
        if wanted:
            loss.backward()

    made = products(step)
    assert len(made) == 2 * COUNTS[wanted][mode]  # 6 or 5 tokens, in chunks of 3
    volume = sum(rows * columns * depth for rows, columns, depth in made)
    assert volume == COUNTS[wanted][mode] * (N - skip_masked) * VOCAB * H


@HOSTS
def test_work_of_logprobs(host):
    """In two phases, but for a frozen head: there all is done in forward, and backward multiplies rows."""
    require(host)
    given = given_of("logprobs", torch.device("cpu"))
    for wanted, before, after in ((NAMES, 1, 3), (("hidden",), 2, 0), (("weight",), 1, 2)):
        logits = LinearHead(*leaves_of(given, wanted))
        losses: list[Tensor] = []
        forward = products(lambda logits=logits, losses=losses: losses.append(loss_of(given, logits, host)))
        backward = products(lambda losses=losses: losses[0].sum().backward())
        assert (len(forward), len(backward)) == (before, after)


def allocated(function: Callable[[], object]) -> tuple[int, int, list[int]]:
    """(the most that was in use at a time, what is left, each allocation), in bytes beyond what was there."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    sizes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for size in sizes:
        now += size
        most = max(most, now)
    return most, now, [size for size in sizes if size > 0]


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wanted", [NAMES, ("hidden",), ("weight",), ()], ids="+".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_memory(kernels, device, dtype, wanted, mode, one_thread):
    """A chunk of logits, a gradient for each input that wants one, and dW's sum where that has another dtype: never N V
    elements, nor a second dW. What is left are the gradients."""
    if kernels == "triton" and device.type == "cpu":
        pytest.skip("interpreted, it takes memory of its own")
    n, vocab, rows = 96, 4096, 4
    hidden, weight, bias = (torch.randn(*shape, dtype=dtype, device=device) for shape in ((n, H), (vocab, H), (vocab,)))
    given = Given("ppo", (hidden, weight, bias), (torch.randint(vocab, (n,), device=device), -8.0, 1.0), MODES[mode])
    leaves = leaves_of(given, wanted)
    size = dtype.itemsize
    budget = chunk_bytes(rows, vocab, size)

    def step() -> None:
        loss = loss_of(given, LinearHead(*leaves, chunk_bytes=budget), kernels).sum()
        if wanted:
            loss.backward()

    step()  # what is loaded once
    for leaf in leaves:
        leaf.grad = None
    most, left, each = allocated(step)
    gradients = sum(leaf.nbytes for leaf, name in zip(leaves, NAMES, strict=True) if name in wanted)
    sums = weight.numel() * 4 if dtype is not torch.float32 and "weight" in wanted else 0
    # a CPU's products have one dtype, and of 16 bits they take scratch, more with more threads
    on_cpu = dtype is not torch.float32 and device.type == "cpu"
    tile = (weight.nbytes if sums else 0) + weight.numel() * 4 + 4096 if on_cpu else 0
    of_tokens = n * H * size + n * 4 * 32  # hidden once more, and numbers per token
    assert most <= budget + gradients + sums + tile + 2 * vocab * 4 + of_tokens + 20000, (most, sorted(each)[-5:])
    assert max(each) < n * vocab * size / 4
    of_weight = [bytes for bytes in each if bytes >= vocab * H * size]
    if dtype is torch.float32:
        assert len(of_weight) == ("weight" in wanted), sorted(each)[-5:]
    assert left <= gradients + 20000


def test_chunk_rows():
    """1 GiB, or 2048 tokens where these take more; a budget is kept to, and is at least a token."""
    bf16, float32 = torch.bfloat16, torch.float32
    assert _rows_of(None, 128_000, bf16, bf16) == 2**30 // (128_000 * 2 + 128)
    assert _rows_of(None, 1_000_000, bf16, bf16) == 2048
    assert _rows_of(2**28, 1_000_000, bf16, bf16) == 2**28 // (2_000_000 + 128)
    assert _rows_of(None, 128_000, bf16, float32) == 2048  # the gradient in the products' dtype counts
    assert _rows_of(2**30, 128_000, bf16, float32) == 2**30 // (128_000 * 6 + 128)
    assert _rows_of(1, 128_000, float32, float32) == 1


# ---- Beside the rest of torch ----


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("mode", MODES)
@HOSTS
def test_compiled(host, mode, frozen):
    """In one graph, the LinearHead made in it."""
    require(host)
    torch._dynamo.reset()  # each test is the same code, traced anew
    given = given_of("ppo, terms", torch.device("cpu")).having(**MODES[mode])
    wanted = ("hidden",) if frozen else NAMES

    def step(*inputs: Tensor) -> Tensor:
        return loss_of(given, LinearHead(*inputs, chunk_bytes=chunk_bytes(2)), host).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (step, compiled):
        leaves = leaves_of(given, wanted)
        function(*leaves).backward()
        results.append([leaf.grad for leaf in leaves if leaf.requires_grad])
    torch.testing.assert_close(*results)


@HOSTS
def test_compiled_statistics(host):
    require(host)
    torch._dynamo.reset()
    given = given_of("logprobs", torch.device("cpu"))

    def step(*inputs: Tensor) -> Tensor:
        head = LinearHead(*inputs, chunk_bytes=chunk_bytes(2))
        seen = fused_losses.statistics(head, given.target_tokens, backend=host)
        return (seen.logprobs + 0.1 * seen.entropy).sum() + seen.log_sum_squares.sum()

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = leaves_of(given)
        function(*leaves).backward()
        results.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*results)


@HOSTS
def test_compiled_under_autocast(host):
    require(host)
    torch._dynamo.reset()
    given = given_of("cross_entropy", torch.device("cpu"))

    def step(*inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss_of(given, LinearHead(inputs[0].tanh(), *inputs[1:], logits_dtype=torch.float32), host)

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = leaves_of(given)
        function(*leaves).backward()
        results.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("products_dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16], ids=["hidden float32", "hidden bfloat16"])
@pytest.mark.parametrize("mode", MODES)
def test_autocast(backend, device, mode, hidden_dtype, products_dtype):
    """Products in autocast's dtype, as torch's linear has them, backward in it or not; gradients in the inputs'."""
    spare(backend, device, hidden_dtype is torch.float32 and products_dtype is torch.bfloat16)
    given = given_of("cross_entropy", device).having(**MODES[mode])
    given = replace(given, inputs=(given.inputs[0].to(hidden_dtype), *given.inputs[1:]))
    truth = run(given.to(torch.float64), None)
    sizes = sizes_of(given, truth)

    def off(make: Callable[..., Tensor | LinearHead], name: str | None, both: bool = True) -> list[Tensor]:
        leaves = leaves_of(given)
        with torch.autocast(device.type, dtype=products_dtype):
            loss = loss_of(given, make(*leaves), name).sum()
            if both:
                loss.backward()
        if not both:
            loss.backward()
        assert [leaf.grad.dtype for leaf in leaves] == [hidden_dtype, torch.float32, torch.float32]
        return [(leaf.grad.double() - truth.gradients[of]).abs() for leaf, of in zip(leaves, NAMES, strict=True)]

    eager = off(plain_logits, None)
    for both in (False, True):
        for rows in (2, N):
            errors = off(head(chunk_bytes=chunk_bytes(rows, size=2)), backend, both)
            for error, yardstick, size in zip(errors, eager, sizes, strict=True):
                relative = (yardstick / size).nan_to_num(0.0).amax(-1, keepdim=True).clamp(min=2**-8)
                assert (error <= GRADIENT_FACTOR * relative * size).all()


@pytest.mark.parametrize("mode", MODES)
def test_fp32_head_under_autocast(backend, device, mode):
    """Products of bfloat16 numbers, and nothing else in bfloat16: autocast has no say over what is made in between."""
    given = given_of("cross_entropy", device).having(**MODES[mode])
    rounded = replace(given, inputs=tuple(t.bfloat16() for t in given.inputs))
    truth = run(rounded.to(torch.float64), None)
    for rows in (2, N):
        leaves = leaves_of(given)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            logits = LinearHead(*leaves, logits_dtype=torch.float32, chunk_bytes=chunk_bytes(rows, size=6))
            loss = loss_of(given, logits, backend)
            loss.sum().backward()
        torch.testing.assert_close(loss.double(), truth.loss, **CLOSE)
        for leaf, name, size in zip(leaves, NAMES, sizes_of(rounded, truth), strict=True):
            assert leaf.grad.dtype == torch.float32
            assert ((leaf.grad.double() - truth.gradients[name]).abs() <= 2 * 2**-8 * size + 1e-6).all(), name


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_activation_checkpointing(backend, device, mode, reentrant):
    """Forward once more in backward, the head in it: the same gradients."""
    spare(backend, device, mode == "one pass")
    given = given_of("ppo", device).having(**MODES[mode])
    results = []
    for kept in (True, False):
        leaves = leaves_of(given)

        def step(hidden: Tensor, leaves: list[Tensor] = leaves) -> Tensor:
            return loss_of(given, LinearHead(hidden.tanh(), *leaves[1:], chunk_bytes=chunk_bytes(2)), backend)

        loss = step(leaves[0]) if kept else checkpoint(step, leaves[0], use_reentrant=reentrant)
        loss.sum().backward()
        results.append([leaf.grad for leaf in leaves])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
def test_accumulation_in_a_buffer(backend, device, mode, dtype):
    """dW of three micro-batches is added to the buffer in float32; there is no other dW."""
    spare(backend, device, mode == "one pass")
    given = given_of("cross_entropy", device).having(**MODES[mode])
    given = replace(given, inputs=tuple(t.to(dtype) for t in given.inputs))
    wide = run(given.to(torch.float64), None)
    buffer = torch.ones(VOCAB, H, device=device)
    leaves = leaves_of(given)
    for step in range(1, 4):
        logits = LinearHead(*leaves, chunk_bytes=chunk_bytes(2), weight_grad=buffer)
        loss = loss_of(given, logits, backend)
        assert not logits.weight_grad.sub(1).any() or step > 1, "something was added in forward"
        loss.sum().backward()
        size = sizes_of(given, wide)[1]
        error = ((buffer - 1).double() - step * wide.gradients["weight"]).abs()
        rounding = 1e-6 if dtype is torch.float32 else 2**-7
        assert (error <= step * (rounding * (1 + size) + 1e-6)).all()
    assert leaves[1].grad is None
    assert leaves[0].grad is not None and leaves[2].grad is not None


class Watching(TorchDispatchMode):
    """As what counts operations is, or selective activation checkpointing."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", MODES)
@HOSTS
def test_watched(host, mode):
    """Somebody who watches operators changes nothing, and a buffer is not forgotten on the way through them."""
    require(host)
    given = given_of("ppo, terms", torch.device("cpu")).having(**MODES[mode])
    for options in ({}, {"weight_grad": torch.zeros(VOCAB, H)}):
        for wanted in (NAMES,) if options else (NAMES, ("hidden",)):
            expected = run(given, host, head(chunk_bytes=chunk_bytes(2)), wanted)
            with Watching():
                got = run(given, host, head(chunk_bytes=chunk_bytes(2), **options), wanted)
            if options:
                assert got.gradients["weight"] is None
                got.gradients["weight"] = options["weight_grad"]
            torch.testing.assert_close((got.loss, got.gradients), (expected.loss, expected.gradients))


def test_accumulation_by_autograd(backend, device):
    given = given_of("cross_entropy", device)
    once = run(given, backend, head(chunk_bytes=chunk_bytes(2)))
    leaves = leaves_of(given)
    for _ in range(3):
        loss_of(given, LinearHead(*leaves, chunk_bytes=chunk_bytes(2)), backend).backward()
    for leaf, name in zip(leaves, NAMES, strict=True):
        torch.testing.assert_close(leaf.grad, 3 * once.gradients[name])


@pytest.mark.parametrize("mode", MODES)
def test_tied_embedding(backend, device, mode):
    """The weight is that of the embedding, too: its gradient is the sum of both."""
    given = given_of("cross_entropy", device).having(**MODES[mode])
    tokens = torch.arange(N, device=device).view(TOKENS)
    gradients = []
    for dtype, name in ((torch.float64, None), (torch.float32, backend)):
        embedding = torch.nn.Embedding(VOCAB, H, device=device, dtype=dtype)
        embedding.weight.data.copy_(given.inputs[1])
        hidden = embedding(tokens).sin()
        make = plain_logits if name is None else head(chunk_bytes=chunk_bytes(2))
        loss_of(given, make(hidden, embedding.weight), name).sum().backward()
        gradients.append(embedding.weight.grad.double())
    torch.testing.assert_close(*gradients, **CLOSE)


def test_hidden_and_weight_are_one(backend, device):
    """As one tensor twice: the sum of both gradients."""
    given = given_of("cross_entropy", device)
    target = torch.arange(VOCAB, device=device).flip(0)
    gradients = []
    for dtype in (torch.float64, torch.float32):
        leaf = given.inputs[1].to(dtype, copy=True).requires_grad_()
        if dtype is torch.float64:
            reference.cross_entropy(leaf @ leaf.t(), target).backward()
        else:
            fused_losses.cross_entropy(
                LinearHead(leaf, leaf, chunk_bytes=chunk_bytes(7)), target, backend=backend
            ).backward()
        gradients.append(leaf.grad.double())
    torch.testing.assert_close(*gradients, **CLOSE)


@pytest.fixture(scope="module")
def mesh() -> Iterator[Any]:
    distributed_tensor = pytest.importorskip("torch.distributed.tensor")
    if not dist.is_gloo_available():
        pytest.skip("no gloo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield distributed_tensor.init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("mode", MODES)
@HOSTS
def test_replicated_parameters(mesh, host, mode):
    """DTensors that every rank has whole, as data-parallel training makes them: gradients are such DTensors."""
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    require(host)
    given = given_of("ppo", torch.device("cpu")).having(**MODES[mode])
    expected = run(given, host, head(chunk_bytes=chunk_bytes(2)))
    hidden, *parameters = leaves_of(given)
    parameters = [
        torch.nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Replicate()])) for parameter in parameters
    ]
    loss_of(given, LinearHead(hidden, *parameters, chunk_bytes=chunk_bytes(2)), host).sum().backward()
    assert torch.equal(hidden.grad, expected.gradients["hidden"])
    for parameter, name in zip(parameters, NAMES[1:], strict=True):
        assert isinstance(parameter.grad, DTensor)
        assert torch.equal(parameter.grad.to_local(), expected.gradients[name])


def test_sharded_parameters_are_refused(mesh):
    """By placement, as FSDP and tensor parallelism leave them, with what to do instead."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    given = given_of("cross_entropy", torch.device("cpu"))
    hidden, weight, bias = given.inputs
    sharded = distribute_tensor(weight, mesh, [Shard(0)])
    with pytest.raises(TypeError, match=r"weight must be whole, got a DTensor .*Shard.*FSDP.*to_local"):
        fused_losses.cross_entropy(LinearHead(hidden, sharded), *given.args)
    with pytest.raises(TypeError, match="bias must be whole"):
        fused_losses.cross_entropy(LinearHead(hidden, weight, distribute_tensor(bias, mesh, [Shard(0)])), *given.args)
    whole = distribute_tensor(hidden, mesh, [Replicate()])
    with pytest.raises(TypeError, match="hidden must be a plain tensor, got a DTensor"):
        fused_losses.cross_entropy(LinearHead(whole, weight), *given.args)


# ---- Refused ----


class Wrapped(torch.nn.Linear):
    """As a LoRA layer's class is."""

    base_layer: torch.nn.Module | None = None


def with_hook(kind: str) -> torch.nn.Linear:
    module = torch.nn.Linear(H, VOCAB)
    getattr(module, kind)(lambda *_: None)
    return module


def with_forward() -> torch.nn.Linear:
    module = torch.nn.Linear(H, VOCAB)
    module.forward = lambda x: x
    return module


MODULES: dict[str, tuple[Callable[[], torch.nn.Module], str]] = {
    "LoRA": (lambda: Wrapped(H, VOCAB), "module must be a torch.nn.Linear.*Wrapped, wrapped: merge it"),
    "a sequence": (lambda: torch.nn.Sequential(torch.nn.Linear(H, VOCAB)), "module must be a .*Sequential"),
    "parametrised": (
        lambda: torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(H, VOCAB)),
        "module must be a torch.nn.Linear.*Parametrized",
    ),
    "quantised": (lambda: torch.ao.nn.quantized.Linear(H, VOCAB), "module must be a torch.nn.Linear"),
    "a hook": (lambda: with_hook("register_forward_hook"), "module has hooks"),
    "a hook before": (lambda: with_hook("register_forward_pre_hook"), "module has hooks"),
    "a hook of backward": (lambda: with_hook("register_full_backward_hook"), "module has hooks"),
    "a forward": (with_forward, "module has .* a forward of its own"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("module", MODULES)
def test_module_is_refused(module):
    make, message = MODULES[module]
    with pytest.raises((TypeError, ValueError), match=message):
        LinearHead.of(torch.randn(N, H), make())


@pytest.mark.parametrize("bias", [False, True])
def test_of_a_module(backend, device, bias):
    module = torch.nn.Linear(H, VOCAB, bias=bias, device=device)
    hidden, target = torch.randn(N, H, device=device), torch.arange(N, device=device)
    logits = LinearHead.of(hidden, module, chunk_bytes=chunk_bytes(2))
    assert logits.weight is module.weight and logits.bias is module.bias and logits.chunk_bytes == chunk_bytes(2)
    got = fused_losses.cross_entropy(logits, target, backend=backend)
    torch.testing.assert_close(got, torch.nn.functional.cross_entropy(module(hidden), target))


class Quantised(Tensor):
    """A tensor of numbers that are made when they are asked for, as torchao's are."""

    @staticmethod
    def __new__(cls) -> Quantised:
        return Tensor._make_wrapper_subclass(cls, (VOCAB, H), dtype=torch.float32)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError("read")


REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], type[Exception], str]] = {
    "no tensor as hidden": (lambda: {"hidden": None}, TypeError, "hidden must be a tensor"),
    "no tensor as weight": (lambda: {"weight": [1.0]}, TypeError, "weight must be a tensor"),
    "a module as weight": (lambda: {"weight": torch.nn.Linear(H, VOCAB)}, TypeError, r"weight .*LinearHead\.of"),
    "no tensor as bias": (lambda: {"bias": True}, TypeError, "bias must be a tensor"),
    "hidden of another H": (lambda: {"hidden": torch.randn(*TOKENS, H + 1)}, ValueError, "hidden .* H = 8"),
    "hidden of no dimension": (lambda: {"hidden": torch.tensor(1.0)}, ValueError, "hidden must have shape"),
    "weight of 1 dimension": (lambda: {"weight": torch.randn(H)}, ValueError, r"weight must have shape \(V, H\)"),
    "weight of 0 dimensions": (lambda: {"weight": torch.tensor(1.0)}, ValueError, r"weight must have shape \(V, H\)"),
    "weight of no class": (lambda: {"weight": torch.randn(0, H)}, ValueError, r"weight must have shape \(V, H\)"),
    "bias of another V": (lambda: {"bias": torch.randn(VOCAB + 1)}, ValueError, "bias must have shape"),
    "bias of 2 dimensions": (lambda: {"bias": torch.randn(1, VOCAB)}, ValueError, "bias must have shape"),
    "float64": (
        lambda: {"hidden": torch.randn(*TOKENS, H).double(), "weight": torch.randn(VOCAB, H).double()},
        TypeError,
        "weight must be float32, bfloat16 or float16",
    ),
    "hidden of float64": (lambda: {"hidden": torch.randn(*TOKENS, H).double()}, TypeError, "hidden must be float32"),
    "weight of another dtype": (
        lambda: {"weight": torch.randn(VOCAB, H).bfloat16()},
        TypeError,
        "weight must have the dtype of hidden",
    ),
    "bias of another dtype": (
        lambda: {"bias": torch.randn(VOCAB).half()},
        TypeError,
        "bias must have the dtype of weight",
    ),
    "integers": (lambda: {"weight": torch.zeros(VOCAB, H, dtype=torch.int8)}, TypeError, "weight must be float32"),
    "meta": (lambda: {"weight": torch.randn(VOCAB, H, device="meta")}, TypeError, "weight .*meta"),
    "a meta hidden": (lambda: {"hidden": torch.randn(*TOKENS, H, device="meta")}, ValueError, "device of hidden"),
    "sparse": (lambda: {"weight": torch.randn(VOCAB, H).to_sparse()}, TypeError, "weight must be a dense tensor"),
    "nested": (
        lambda: {"hidden": torch.nested.nested_tensor([torch.randn(2, H), torch.randn(1, H)], layout=torch.jagged)},
        TypeError,
        "hidden must be a dense tensor",
    ),
    "quantised": (lambda: {"weight": Quantised()}, TypeError, "weight must be a plain tensor, got a Quantised"),
    "chunk_bytes 0": (lambda: {"chunk_bytes": 0}, ValueError, "chunk_bytes must be greater than 0"),
    "chunk_bytes below 0": (lambda: {"chunk_bytes": -1}, ValueError, "chunk_bytes must be greater than 0"),
    "chunk_bytes of a fraction": (lambda: {"chunk_bytes": 1e6}, TypeError, "chunk_bytes must be an integer"),
    "chunk_bytes as a flag": (lambda: {"chunk_bytes": True}, TypeError, "chunk_bytes must be an integer"),
    "logits of 16 bits": (lambda: {"logits_dtype": torch.bfloat16}, TypeError, "logits_dtype must be"),
    "logits of 64 bits": (lambda: {"logits_dtype": torch.float64}, TypeError, "logits_dtype must be"),
    "skip_masked as a mask": (
        lambda: {"skip_masked": torch.ones(2)},
        TypeError,
        "skip_masked must be True or False, got Tensor",
    ),
    "sums of another dtype": (lambda: {"weight_grad_dtype": torch.bfloat16}, TypeError, "weight_grad_dtype must be"),
    "a buffer of another shape": (
        lambda: {"weight_grad": torch.zeros(H, VOCAB)},
        ValueError,
        "weight_grad must have weight's shape",
    ),
    "a buffer of another dtype": (
        lambda: {"weight_grad": torch.zeros(VOCAB, H).half()},
        TypeError,
        "weight_grad must be float32",
    ),
    "a buffer that wants a gradient": (
        lambda: {"weight_grad": torch.zeros(VOCAB, H, requires_grad=True)},
        ValueError,
        "weight_grad .*not require grad",
    ),
    "a buffer for a frozen weight": (
        lambda: {"weight": torch.randn(VOCAB, H), "weight_grad": torch.zeros(VOCAB, H)},
        ValueError,
        "weight_grad is for the gradient of weight",
    ),
    "a part of no group": (lambda: {"vocab_start": 5}, ValueError, "vocab_start"),
    "a partial gradient of no group": (lambda: {"hidden_grad": "partial"}, ValueError, 'hidden_grad="partial" is of'),
    "hidden_grad": (lambda: {"hidden_grad": "sum"}, ValueError, "hidden_grad must be"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what):
    """By every kind of loss, before anything is computed, and with the argument's name first."""
    given = given_of("cross_entropy", torch.device("cpu"))
    changed, error, message = REFUSED[what]
    inputs = dict(zip(NAMES, leaves_of(given), strict=True)) | changed()
    logits = LinearHead(**inputs)
    for function in (
        fused_losses.cross_entropy,
        fused_losses.logprobs,
        lambda *args: fused_losses.ppo(*args, -1.0, 1.0),
        lambda *args: fused_losses.gspo(*args, -1.0, 1.0),
    ):
        with pytest.raises(error, match=message):
            function(logits, given.target_tokens)


@pytest.mark.parametrize("needs", [True, False])
def test_inplace_is_refused(needs):
    """There are no logits to overwrite, whether or not somebody wants a gradient."""
    given = given_of("ppo", torch.device("cpu"))
    logits = LinearHead(*leaves_of(given, NAMES if needs else ()))
    for function in (fused_losses.ppo, fused_losses.gspo):
        with pytest.raises(ValueError, match="inplace=True"):
            function(logits, *given.args, inplace=True)
