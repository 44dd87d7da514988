"""prime-rl: losses of its records of a sequence, its head, and what is refused. Its package need not be here."""

from __future__ import annotations

import inspect
import sys
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_losses import on_logprobs
from fused_losses.adapters import prime_rl
from fused_losses.adapters.comparisons import prime_rl as theirs
from fused_losses.adapters.slots import installed
from fused_losses.linear_head import LinearHead
from fused_losses.linear_head import _rows_of as rows_of

LOSSES = ("importance_sampling", "ppo", "cispo", "dro", "sapo", "gspo", "gmpo", "dppo_tv", "dppo_kl", "vespo")
T = 40


def sequence(**options: Any) -> tuple[Any, Tensor]:
    return theirs.sequence(length=T, **options)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_the_librarys_summed_over_the_masked_tokens(name, weighted):
    inputs, leaf = sequence(weighted=weighted)
    inputs.ref_logprobs = inputs.inference_logprobs - 0.1
    outputs = getattr(prime_rl, name)(inputs, kl_coef=0.1, kl_type="k2")
    outputs.loss.backward()
    weights = inputs.loss_mask * (inputs.loss_weights if weighted else 1.0)
    other = leaf.detach().clone().requires_grad_()
    old, advantages = inputs.inference_logprobs, inputs.advantages
    expected = getattr(on_logprobs, name)(
        other, old, advantages, ref_logprobs=old - 0.1, kl_coef=0.1, kl_type="k2", weights=weights, reduction="sum"
    )
    expected.backward()
    torch.testing.assert_close(outputs.loss, expected)
    torch.testing.assert_close(leaf.grad, other.grad)
    assert outputs.metrics["tokens"] == inputs.loss_mask.sum()
    assert all(value.dim() == 0 and not value.requires_grad for value in outputs.metrics.values())


@pytest.mark.parametrize("options", [{}, {"clip_low_threshold": 0.7, "clip_high_threshold": 1.1, "dual_clip": 2.0}])
def test_ppo_is_the_formula(options):
    inputs, leaf = sequence(weighted=True)
    prime_rl.ppo(inputs, **options).loss.backward()
    exact = leaf.detach().double().requires_grad_()
    ratio = torch.exp(exact - inputs.inference_logprobs.double())
    low, high = options.get("clip_low_threshold", 0.8), options.get("clip_high_threshold", 1.2)
    advantages = inputs.advantages.double()
    objective = torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    if "dual_clip" in options:
        objective = torch.where(advantages < 0, torch.maximum(objective, 2.0 * advantages), objective)
    (-(objective * inputs.loss_weights)[inputs.loss_mask]).sum().backward()
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"eps": 0.02, "adv_tau": 0.5, "kl_tau": 0.3}])
@pytest.mark.parametrize("case", theirs._CASES.values(), ids=lambda case: str(case))
def test_ipo_is_prime_rls_default(case, options):
    config = SimpleNamespace(**{"eps": 0.1, "adv_tau": 1.0, "kl_tau": 1e-3, **options})
    numbers = []
    for loss in (lambda inputs: theirs.ipo(inputs, config), lambda inputs: prime_rl.ipo(inputs, **options)):
        inputs, leaf = sequence(**case)
        outputs = loss(inputs)
        outputs.loss.backward()
        numbers.append({"loss": outputs.loss, "gradient": leaf.grad, **outputs.metrics})
    assert numbers[0].keys() == numbers[1].keys()
    for key, value in numbers[0].items():
        torch.testing.assert_close(numbers[1][key], value)
    defaults = {key: p.default for key, p in inspect.signature(prime_rl.ipo).parameters.items() if key != "inputs"}
    assert defaults == {"eps": 0.1, "adv_tau": 1.0, "kl_tau": 1e-3}


def test_icepop():
    inputs, leaf = sequence(weighted=True)
    outputs = prime_rl.icepop(inputs, ratio_low=0.8, ratio_high=1.3, adv_tau=0.5)
    outputs.loss.backward()
    ratio = torch.exp(leaf.detach() - inputs.inference_logprobs)
    kept = (ratio >= 0.8) & (ratio <= 1.3) & inputs.loss_mask
    expected = -0.5 * kept * inputs.advantages * ratio * inputs.loss_weights
    torch.testing.assert_close(outputs.loss, expected.sum())
    torch.testing.assert_close(leaf.grad, expected)
    rejected = (~kept & inputs.loss_mask).sum() / inputs.loss_mask.sum()
    torch.testing.assert_close(outputs.metrics["is_masked"], rejected)


@pytest.mark.parametrize("name", [*LOSSES, "ipo", "icepop"])
def test_masked_tokens_are_exactly_zero_whatever_they_hold(name):
    options = {"ratio_low": 0.8, "ratio_high": 1.2} if name == "icepop" else {}
    for garbage in (torch.nan, torch.inf, -torch.inf):
        inputs, leaf = sequence(weighted=True)
        masked = ~inputs.loss_mask
        for tensor in (leaf.data, inputs.inference_logprobs, inputs.advantages, inputs.loss_weights):
            tensor[masked] = garbage
        inputs.trainer_logprobs = leaf * 1
        outputs = getattr(prime_rl, name)(inputs, **options)
        outputs.loss.backward()
        assert outputs.loss.isfinite() and (leaf.grad[masked] == 0).all() and leaf.grad.isfinite().all()
        assert all(value.isfinite() for value in outputs.metrics.values())
    inputs, leaf = sequence(share=0.0)
    outputs = getattr(prime_rl, name)(inputs, **options)
    outputs.loss.backward()
    assert outputs.loss == 0 and (leaf.grad == 0).all()


def test_a_batch_as_prime_rl_sums_it():
    """Packed sequences of different lengths, over the number of all tokens; bf16 logprobs."""
    torch.manual_seed(0)
    packed = (-2 * torch.rand(30)).bfloat16().requires_grad_()
    total, tokens = torch.zeros(()), 0
    for piece in packed.split([1, 9, 20]):
        inputs, _ = theirs.sequence(length=len(piece))
        inputs.trainer_logprobs = piece
        total, tokens = total + prime_rl.cispo(inputs).loss, tokens + int(inputs.loss_mask.sum())
    (total / tokens).backward()
    assert total.dtype is torch.float32 and packed.grad.isfinite().all() and (packed.grad != 0).any()


REFUSED = [
    ("entropy_coef", 0.1, "prime-rl's record has no entropy with a gradient"),
    ("denominator", 7.0, "prime-rl sums"),
    ("reduction", "mean", "prime-rl sums"),
    ("weights", 1.0, "prime-rl's record has it"),
    ("importance_weights", 1.0, "it is a tensor"),
    ("epsilon", 0.2, None),
]


@pytest.mark.parametrize("key, value, message", REFUSED, ids=[e[0] for e in REFUSED])
def test_keywords_that_are_refused(key, value, message):
    inputs, _ = sequence()
    with pytest.raises(ValueError) as raised:
        prime_rl.ppo(inputs, **{key: value})
    assert str(raised.value).startswith("trainer.loss.kwargs of ppo takes clip_low_threshold, clip_high_threshold, ")
    assert str(raised.value).partition(", got ")[2].startswith(key if message is None else f"{key}: {message}")
    with pytest.raises(ValueError, match="ref_logprobs"):
        prime_rl.ppo(inputs, kl_coef=0.1)


def test_every_loss_has_its_name_and_keywords():
    for name in LOSSES:
        loss = getattr(prime_rl, name)
        assert loss.__name__ == name and "log_ratio_clamp" in (loss.__doc__ or "")


# ---- The head ----


def layer(dtype: torch.dtype = torch.float32, hidden: int = 6, vocab: int = 50) -> Any:
    torch.manual_seed(0)
    module = torch.nn.Linear(hidden, vocab, bias=False, dtype=dtype)
    module.chunk_size = 3
    return module


@pytest.mark.parametrize("chunk_size, rows", [(1, 1), (3, 3), (2047, 2047), (2048, None), (8192, None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_chunk_has_as_many_tokens_as_a_tile(monkeypatch, dtype, chunk_size, rows):
    """Fewer, to take a tile's memory, would read the weight as many times more. None: LinearHead's own choice."""
    asked = []

    def head(*given, chunk_bytes):
        asked.append(chunk_bytes)
        return LinearHead(*given, chunk_bytes=chunk_bytes)

    monkeypatch.setattr(prime_rl, "LinearHead", head)
    module = layer(dtype)
    module.chunk_size = chunk_size
    prime_rl.fused_output_linear(
        module, torch.randn(1, 5, 6).to(dtype), torch.zeros(1, 5, dtype=torch.int64), torch.ones(1, 5)
    )
    (chunk_bytes,) = asked
    assert rows == (None if chunk_bytes is None else rows_of(chunk_bytes, 50, dtype, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_head_gives_logprobs_and_entropy(dtype, softcap):
    module = layer(dtype)
    if softcap is not None:
        module.softcap = softcap
    hidden = torch.randn(2, 7, 6).to(dtype).requires_grad_()
    labels, temperature = torch.randint(50, (2, 7)), 0.5 + torch.rand(2, 7)
    numbers = []
    for function in (
        partial(theirs.head, softcap=softcap),
        lambda h, w, *rest: prime_rl.fused_output_linear(module, h, *rest),
    ):
        seen = function(hidden, module.weight, labels, temperature)
        loss = (seen["logprobs"] * torch.linspace(-1, 1, 14).view(2, 7)).sum()
        numbers.append((seen["logprobs"], seen["entropy"], *torch.autograd.grad(loss, (hidden, module.weight))))
    for a, b in zip(*numbers, strict=True):
        tolerance = {} if a.dtype is torch.float32 else {"rtol": 2**-6, "atol": 2**-8}  # sums rounded to bf16
        torch.testing.assert_close(b, a, **tolerance)


def test_the_heads_entropy_has_a_gradient():
    module = layer()
    hidden, temperature = torch.randn(1, 3, 6, requires_grad=True), torch.ones(1, 3)
    grads = []
    for function in (theirs.head, lambda h, w, *rest: prime_rl.fused_output_linear(module, h, *rest)):
        entropy = function(hidden, module.weight, torch.zeros(1, 3, dtype=torch.int64), temperature)["entropy"]
        grads.append(torch.autograd.grad(entropy.sum(), hidden)[0])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-6)


def test_the_head_without_labels_and_what_it_refuses():
    module, hidden = layer(), torch.randn(1, 3, 6)
    torch.testing.assert_close(prime_rl.fused_output_linear(module, hidden)["logits"], module(hidden))
    module.softcap = 0.5
    torch.testing.assert_close(
        prime_rl.fused_output_linear(module, hidden)["logits"], 0.5 * torch.tanh(module(hidden) / 0.5)
    )
    del module.softcap
    labels, temperature = torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 3)
    with pytest.raises(ValueError, match=r"temperature of FusedOutputLinear\.forward must be given"):
        prime_rl.fused_output_linear(module, hidden, labels)
    with pytest.raises(ValueError, match=r"sampling_mask of FusedOutputLinear\.forward is not supported"):
        prime_rl.fused_output_linear(module, hidden, labels, temperature, sampling_mask=labels[..., None])
    plain = prime_rl.fused_output_linear(module, hidden, labels, temperature, sampling_mask=None)
    assert plain["logprobs"].shape == (1, 3)


# ---- install and remove ----


class Head(torch.nn.Linear):
    def forward(self, hidden_states, labels=None, temperature=None):
        return {"logprobs": None}


@pytest.fixture
def heads(monkeypatch) -> list[type]:
    """What of prime-rl's package the slots are in."""
    path = ""
    for part in ("prime_rl", "trainer", "models", "layers"):
        path = f"{path}.{part}".lstrip(".")
        monkeypatch.setitem(sys.modules, path, package(path))
    classes = []
    for module, name in (("lm_head", "FusedOutputLinear"), ("lm_head_gemma", "GemmaFusedOutputLinear")):
        classes.append(type(name, (Head,), {"forward": Head.forward}))
        made = package(f"{path}.{module}")
        setattr(made, name, classes[-1])
        monkeypatch.setitem(sys.modules, made.__name__, made)
    return classes


def package(path: str) -> ModuleType:
    module = ModuleType(path)
    module.__path__ = []
    return module


def test_install_and_remove(heads):
    prime_rl.install()
    try:
        for head in heads:
            module = head(6, 50, bias=False)
            module.chunk_size = 4
            seen = module(torch.randn(1, 3, 6), torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 3))
            assert seen["logprobs"].shape == (1, 3) and seen["entropy"].requires_grad
    finally:
        prime_rl.remove()
    assert all(head.__dict__["forward"] is Head.forward for head in heads)


def test_a_slot_that_moved_is_named(heads):
    del sys.modules["prime_rl.trainer.models.layers.lm_head_gemma"].GemmaFusedOutputLinear
    with pytest.raises(
        RuntimeError, match=r"prime-rl .*lm_head_gemma\.GemmaFusedOutputLinear\.forward is not the slot"
    ):
        prime_rl.install()
    assert heads[0].__dict__["forward"] is Head.forward


@pytest.mark.skipif(installed("prime-rl") is not None, reason="prime-rl is installed")
def test_without_prime_rl():
    with pytest.raises(ImportError, match="prime_rl"):
        prime_rl.install()
