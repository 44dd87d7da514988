"""The CPU kernels of every instruction set that runs here: the machine's best is what all other tests see."""

import math
from importlib import import_module

import pytest
import torch
from cases import DTYPES, MODES, assert_rounded_once, check, make
from conftest import require

ids = {"ids": lambda value: str(value).removeprefix("torch.")}
TERMS = {"entropy_coef": 0.2, "kl_coef": 0.1, "ref_logprobs": -3.0, "kl_type": "k1"}
CPU = torch.device("cpu")


@pytest.fixture(params=["avx512", "avx2", "baseline"], autouse=True)
def instruction_set(request):
    require("cpu")
    cpu = import_module("fused_losses._cpu")
    usable = cpu.instruction_sets()
    if request.param not in usable:
        pytest.skip(f"{request.param} does not run here")
    cpu.use_instruction_set(request.param)
    yield
    cpu.use_instruction_set(usable[0])


@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("vocab", [1, 7, 64, 513, 1000])
def test_loss(mode, dtype, vocab):
    check(make("ppo", (5,), vocab, dtype, CPU), "cpu", **MODES[mode])


@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_terms(mode, dtype, softcap):
    check(make("ppo", (5,), 1000, dtype, CPU, softcap=softcap, **TERMS), "cpu", **MODES[mode])
    check(make("cross_entropy", (5,), 1000, dtype, CPU, softcap=softcap, label_smoothing=0.1), "cpu", **MODES[mode])


@pytest.mark.parametrize("dtype", DTYPES[1:], **ids)
def test_rounded_once(dtype):
    assert_rounded_once(make("cross_entropy", (7,), 1000, dtype, CPU), "cpu")


@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("terms", [{}, TERMS], ids=["plain", "terms"])
@pytest.mark.parametrize("value", [-math.inf, math.inf, math.nan, 3e38], ids=str)
def test_special_values(dtype, terms, value):
    """-inf and a huge logit as anywhere; a row of +inf or NaN is NaN, and no other."""
    case = make("ppo", (4,), 700, dtype, CPU, **terms)
    case.storage[1, 3::7] = min(value, torch.finfo(dtype).max) if value == 3e38 else value
    if value == -math.inf:
        case.storage[1, case.target_tokens[1]] = 0.5
        check(case, "cpu")
        return
    logits = case.storage.clone().requires_grad_()
    loss = case.public("cpu")(logits, case.target_tokens, reduction="none", **case.keywords)
    loss.sum().backward()
    finite = torch.isfinite(logits.grad).all(-1)
    assert finite[[0, 2, 3]].all() and loss[[0, 2, 3]].isfinite().all()
    assert (logits.grad[1].isfinite().all() and loss[1].isfinite()) if value == 3e38 else logits.grad[1].isnan().any()
