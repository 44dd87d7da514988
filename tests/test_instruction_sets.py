"""The CPU kernels of every instruction set that runs here, on what the other suites run with the machine's best."""

import math
from importlib import import_module

import pytest
import torch
from cases import DTYPES, MODES, assert_rounded_once, check, make
from conftest import instruction_sets, require, using

import fused_losses

ids = {"ids": lambda value: str(value).removeprefix("torch.")}
TERMS = {"entropy_coef": 0.2, "kl_coef": 0.1, "ref_logprobs": -3.0, "kl_type": "k1"}
CPU = torch.device("cpu")


@pytest.fixture(params=["avx512", "avx2", "baseline"], autouse=True)
def instruction_set(request):
    require("cpu")
    if request.param not in instruction_sets():
        pytest.skip(f"{request.param} does not run here")
    with using(request.param):
        yield request.param


def test_in_use(instruction_set):
    cpu = import_module("fused_losses._cpu")
    assert cpu.instruction_set_in_use() == instruction_set
    with pytest.raises(ValueError, match="sse9"):
        cpu.use_instruction_set("sse9")
    assert cpu.instruction_set_in_use() == instruction_set


@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_terms(mode, dtype, softcap):
    check(make("ppo", (5,), 1000, dtype, CPU, softcap=softcap, **TERMS), "cpu", **MODES[mode])
    check(make("cross_entropy", (5,), 1000, dtype, CPU, softcap=softcap, label_smoothing=0.1), "cpu", **MODES[mode])


@pytest.mark.parametrize("dtype", DTYPES[1:], **ids)
def test_rounded_once(dtype):
    assert_rounded_once(make("cross_entropy", (7,), 1000, dtype, CPU), "cpu")


@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.001])
def test_softcap_at_a_low_temperature(temperature):
    """Sum and gradient mean the same distances to the largest logit, to the last bit."""
    torch.manual_seed(0)
    logits = (8 * torch.randn(9, 256)).requires_grad_()
    target = logits.argmin(-1)
    options = {"softcap": 50.0, "temperature": temperature, "reduction": "sum", "backend": "cpu"}
    (gradient,) = torch.autograd.grad(fused_losses.cross_entropy(logits, target, **options), logits)
    slope = 1 - torch.tanh(logits.detach().double() / 50) ** 2
    total = (gradient.double() / slope * temperature).scatter(1, target[:, None], 0.0).sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("mode", ["one pass", "in place", "recompute"])
@pytest.mark.parametrize("terms", [{}, TERMS, {"softcap": 5.0}], ids=["plain", "terms", "softcap"])
@pytest.mark.parametrize("value", [-math.inf, math.inf, math.nan, 3e38], ids=str)
def test_special_values(dtype, mode, terms, value):
    """-inf and a huge logit as anywhere; a row of +inf or NaN is NaN, no other is. A softcap makes inf finite."""
    case = make("ppo", (4,), 700, dtype, CPU, **terms)
    case.storage[1, 3::7] = min(value, torch.finfo(dtype).max) if value == 3e38 else value
    if value == -math.inf:
        case.storage[1, case.target_tokens[1]] = 0.5
        if "softcap" not in terms:
            check(case, "cpu", **MODES[mode])
            return
    leaf = case.storage.clone().requires_grad_()
    logits = leaf.clone() if mode == "in place" else leaf
    reduction = "sum" if mode == "in place" else "none"
    options = {**MODES[mode], **case.keywords, "reduction": reduction, "return_outputs": True}
    loss, outputs = case.public("cpu")(logits, case.target_tokens, **options)
    loss.sum().backward()
    fine = torch.isfinite(leaf.grad).all(-1)
    assert fine[[0, 2, 3]].all() and outputs.logprobs.isfinite()[[0, 2, 3]].all()
    if math.isnan(value) or (value == math.inf and "softcap" not in terms):
        assert leaf.grad[1].isnan().any() and outputs.logprobs[1].isnan()
    else:
        assert fine[1] and outputs.logprobs[1].isfinite()
