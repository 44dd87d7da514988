"""Tests of the adapter of verl with verl in the process: run by test_verl.py, in a process whose other packages are
stubs."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from verl.trainer.ppo import core_algos
from verl.utils import torch_functional
from verl.utils.experimental.torch_functional import FusedLinearForPPO

from fused_losses.adapters import slots
from fused_losses.adapters import verl as adapter
from fused_losses.adapters.comparisons.verl import config, numbers, tokens

B, T, V = 4, 9, 211
IMPORTER = "verl.workers.rollout.naive.naive_rollout"
MODES = [mode for mode in adapter.POLICY_LOSSES if mode in core_algos.POLICY_LOSS_REGISTRY]


@pytest.fixture
def installed():
    adapter.install(megatron=False)
    yield
    adapter.remove()


# ---- In place of verl's, and back ----


def test_installed_and_removed():
    naive_rollout = importlib.import_module(IMPORTER)
    names = ("logprobs_from_logits", "entropy_from_logits", "entropy_from_logits_with_chunking")
    before = {name: getattr(torch_functional, name) for name in names}
    forward, registry = FusedLinearForPPO.forward, dict(core_algos.POLICY_LOSS_REGISTRY)
    adapter.install(megatron=False)
    adapter.install(megatron=False)
    try:
        assert {name: getattr(torch_functional, name) for name in names} == {n: getattr(adapter, n) for n in names}
        assert naive_rollout.logprobs_from_logits is adapter.logprobs_from_logits  # imported by name, before
        assert FusedLinearForPPO.forward is adapter.fused_linear_for_ppo
        for mode, loss in adapter.POLICY_LOSSES.items():
            assert core_algos.get_policy_loss_fn(f"fused_{mode}") is loss
        assert core_algos.POLICY_LOSS_REGISTRY["vanilla"] is registry["vanilla"]
        with pytest.raises(RuntimeError, match=r"other options already: call remove\(\) first"):
            adapter.install(megatron=False, inplace=False)
        del sys.modules[IMPORTER]
        imported_since = importlib.import_module(IMPORTER)
        assert imported_since.logprobs_from_logits is adapter.logprobs_from_logits
    finally:
        adapter.remove()
    adapter.remove()
    assert {name: getattr(torch_functional, name) for name in names} == before
    assert sys.modules[IMPORTER].logprobs_from_logits is before[names[0]]
    assert FusedLinearForPPO.forward is forward
    assert registry == core_algos.POLICY_LOSS_REGISTRY


def test_in_place_of_verls_losses():
    before = dict(core_algos.POLICY_LOSS_REGISTRY)
    adapter.install(megatron=False, replace_losses=True)
    assert core_algos.get_policy_loss_fn("gspo") is adapter.gspo
    assert core_algos.get_policy_loss_fn("clip_cov") is before["clip_cov"]
    assert "importance_sampling" not in core_algos.POLICY_LOSS_REGISTRY  # no name of verl's
    adapter.remove()
    assert before == core_algos.POLICY_LOSS_REGISTRY


@pytest.mark.parametrize("mode", ["clip_cov", "kl_cov", "bypass_mode"])
def test_a_loss_that_is_not_here_is_refused_by_verl(installed, mode):
    with pytest.raises(ValueError, match=f"Unsupported loss mode: fused_{mode}"):
        core_algos.get_policy_loss_fn(f"fused_{mode}")


def test_a_slot_that_has_moved(monkeypatch):
    monkeypatch.setattr(torch_functional, "logprobs_from_logits", lambda logits, labels: None)
    with pytest.raises(RuntimeError, match=r"verl 0\.9\.1: verl\.utils\.torch_functional\.logprobs_from_logits is not"):
        adapter.install(megatron=False)
    monkeypatch.undo()
    monkeypatch.setattr(core_algos, "POLICY_LOSS_REGISTRY", [])
    with pytest.raises(RuntimeError, match="POLICY_LOSS_REGISTRY must be a dict"):
        adapter.install(megatron=False)
    assert torch_functional.logprobs_from_logits is not adapter.logprobs_from_logits  # nothing, or all


def test_every_slot_is_there():
    slots.Slots("verl", adapter.MADE_FOR, adapter.replacements()).check()


# ---- Logits ----


def drawn_logits(dtype=torch.float32):
    torch.manual_seed(0)
    return (3 * torch.randn(B * T, V)).to(dtype).requires_grad_(), torch.randint(V, (B * T,))


def test_gradient_over_the_logits():
    leaf, labels = drawn_logits()
    for inplace in (True, False):
        logits = leaf * 1
        before = logits.detach().clone()
        logp = adapter.logprobs_from_logits(logits, labels, inplace_backward=inplace)
        torch.testing.assert_close(logits, before, rtol=0, atol=0)  # forward leaves them
        (gradient,) = torch.autograd.grad(logp.sum(), leaf)
        assert torch.equal(logits.detach(), gradient if inplace else before)
    logp = adapter.logprobs_from_logits(leaf, labels)  # a leaf is not written over
    logp.sum().backward()
    assert torch.equal(leaf.detach(), before)
    torch.testing.assert_close(leaf.grad, gradient, rtol=0, atol=0)


def test_never_in_place_if_so_installed():
    adapter.install(megatron=False, inplace=False)
    leaf, labels = drawn_logits()
    logits = leaf * 1
    torch_functional.logprobs_from_logits(logits, labels, inplace_backward=True).sum().backward()
    assert torch.equal(logits, leaf)
    adapter.remove()


def test_logits_that_the_loss_reads_elsewhere():
    """As verl's chunked top-k distillation does with float32 ones: an error, and no wrong gradient."""
    leaf, labels = drawn_logits()
    logits = leaf * 1
    other = logits.logsumexp(-1)
    logp = adapter.logprobs_from_logits(logits, labels)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (logp + other).sum().backward()


def test_bfloat16_is_float32s():
    logits, labels = drawn_logits(torch.bfloat16)
    truth = logits.double().log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    torch.testing.assert_close(adapter.logprobs_from_logits(logits, labels).double(), truth, rtol=1e-6, atol=1e-6)
    theirs = torch_functional.logprobs_from_logits(logits, labels)
    assert (theirs.double() - truth).abs().max() > 1e-2  # rounded to bfloat16, several times


@pytest.mark.parametrize("shape", [(0,), (1,), (2, 3), (2, 1, 5)])
def test_shapes(shape):
    logits, labels = torch.randn(*shape, 7), torch.randint(7, shape)
    logp = logits.log_softmax(-1)
    torch.testing.assert_close(
        adapter.logprobs_from_logits(logits, labels), logp.gather(-1, labels[..., None])[..., 0], rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(adapter.entropy_from_logits(logits), -(logp.exp() * logp).sum(-1), rtol=1e-5, atol=1e-6)


def test_entropy_compiled_as_engines_do(installed):
    logits, _ = drawn_logits()
    compiled = torch.compile(torch_functional.entropy_from_logits, dynamic=True, backend="aot_eager")
    for rows in (5, 9):
        leaf = logits.detach()[:rows].clone().requires_grad_()
        entropy = compiled(leaf)
        plain = adapter.entropy_from_logits(leaf)
        torch.testing.assert_close(entropy, plain, rtol=0, atol=0)
        gradients = [torch.autograd.grad(values.sum(), leaf)[0] for values in (entropy, plain)]
        torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize("calculate_entropy", [True, False])
def test_outputs_of_the_fsdp_engine(calculate_entropy):
    """The engine's own method, of packed sequences at two temperatures: logprobs, entropy and gradient."""
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    lengths = (5, 9, 2)
    input_ids = torch.nested.nested_tensor([torch.randint(V, (n,)) for n in lengths], layout=torch.jagged)

    def outputs() -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        leaf = torch.randn(1, sum(lengths), V, requires_grad=True)
        engine = SimpleNamespace(
            engine_config=SimpleNamespace(entropy_checkpointing=False, entropy_from_logits_with_chunking=False),
            compute_entropy_from_logits=torch_functional.entropy_from_logits,
            _gather_and_unpad_packed=lambda values, pad_size: values,
        )
        arguments = {
            "input_ids_rmpad_rolled": input_ids.values().roll(-1),
            "temperature_rmpad": torch.linspace(0.5, 1.5, sum(lengths)),
            "pad_size": 0,
        }
        batch = {"input_ids": input_ids, "calculate_entropy": calculate_entropy}
        made = FSDPEngineWithLMHead.prepare_model_outputs(
            engine, SimpleNamespace(logits=leaf * 1), arguments, batch, logits_processor_func=None
        )
        values = {name: value.values() for name, value in made.items()}
        sum((value * torch.linspace(-1, 1, sum(lengths))).sum() for value in values.values()).backward()
        return values | {"gradient": leaf.grad}

    theirs = outputs()
    adapter.install(megatron=False)
    try:
        ours = outputs()
    finally:
        adapter.remove()
    assert ours.keys() == theirs.keys() and ("entropy" in ours) == calculate_entropy
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=2e-6)


# ---- The fused head ----


def test_chunk_size_is_refused(installed):
    head = FusedLinearForPPO(chunk_size=128)
    with pytest.raises(ValueError, match=r"chunk_size must be the default 512.*got 128"):
        head.forward(torch.randn(3, 8), torch.randn(V, 8), torch.randint(V, (3,)))


def test_step_of_a_model_through_verls_forward():
    """A Llama whose forward is verl's for use_fused_kernels: parameters after a step of PPO, with its head and ours."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from verl.models.transformers.dense_common import forward_with_torch_backend

    made = LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, max_length=16
    )

    def step(loss_mode: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = LlamaForCausalLM(made)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        input_ids = torch.randint(V, (B, T))
        output = forward_with_torch_backend(model, input_ids=input_ids, temperature=0.7, return_dict=True)
        loss, _ = core_algos.get_policy_loss_fn(loss_mode)(
            output.log_probs.detach() + 0.3 * torch.randn(B, T),
            output.log_probs,
            torch.randn(B, T),
            torch.arange(T) < torch.tensor([[T], [3], [0], [1]]),
            "seq-mean-token-mean",
            config(),
        )
        (loss - 0.01 * output.entropy.mean()).backward()
        optimizer.step()
        return [parameter.detach() for parameter in model.parameters()]

    theirs = step("vanilla")
    adapter.install(megatron=False)
    try:
        ours = step("fused_vanilla")
    finally:
        adapter.remove()
    for their_parameter, our_parameter in zip(theirs, ours, strict=True):
        torch.testing.assert_close(our_parameter, their_parameter, rtol=1e-5, atol=1e-6)


# ---- Policy losses ----


@pytest.mark.parametrize("mode", adapter.POLICY_LOSSES)
def test_masked_tokens_may_hold_anything(mode):
    clean = tokens(sequence_advantages=True)
    expected = numbers(adapter.POLICY_LOSSES[mode], clean, config=config())
    for bad in (math.nan, math.inf, -math.inf):
        given = tokens(sequence_advantages=True)
        for name in ("old_log_prob", "advantages", "log_prob"):
            filled = given[name].detach().clone().masked_fill(~given["response_mask"], bad)
            given[name] = filled.requires_grad_(name == "log_prob")
        found = numbers(adapter.POLICY_LOSSES[mode], given, config=config())
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=0)
        assert (given["log_prob"].grad[~given["response_mask"]] == 0).all()


@pytest.mark.parametrize("mode", adapter.POLICY_LOSSES)
def test_a_batch_with_no_token(mode):
    given = tokens() | {"response_mask": torch.zeros(6, 40, dtype=torch.bool)}
    found = numbers(adapter.POLICY_LOSSES[mode], given, config=config())
    assert not any(torch.as_tensor(value).count_nonzero() for value in found.values())


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_logprobs(mode):
    """Of engines that round them: beside verl's loss of the same numbers in float64."""
    rounded = {
        name: value.detach().bfloat16() if value.is_floating_point() else value
        for name, value in tokens(sequence_advantages=mode == "geo_mean").items()
    }

    def of(dtype):
        return {name: v.to(dtype) if v.is_floating_point() else v for name, v in rounded.items()}

    ours = numbers(adapter.POLICY_LOSSES[mode], _leaf(of(torch.bfloat16)), config=config())
    theirs = numbers(core_algos.POLICY_LOSS_REGISTRY[mode], _leaf(of(torch.float64)), config=config())
    torch.testing.assert_close(ours["loss"].double(), theirs["loss"], rtol=1e-5, atol=1e-6)
    largest = theirs["gradient"].abs().max()
    torch.testing.assert_close(ours["gradient"].double(), theirs["gradient"], rtol=2**-8, atol=1e-6 * largest.item())


def _leaf(given):
    return given | {"log_prob": given["log_prob"].clone().requires_grad_()}


@pytest.mark.parametrize("mode", MODES)
def test_through_verls_ppo_loss(mode, monkeypatch):
    """What an engine calls: the loss with its entropy bonus and KL term, and the metrics."""
    from verl.workers.utils import losses

    class Data(dict):
        def select(self, *names: str) -> Data:
            return Data({name: self[name] for name in names})

        def to_padded_tensor(self) -> Data:
            return self

    monkeypatch.setattr(losses, "no_padding_2_padding", lambda values, data: values)

    def step(loss_mode: str) -> dict[str, torch.Tensor]:
        given = tokens(sequence_advantages=mode == "geo_mean")
        log_prob = given["log_prob"]
        entropy = (-log_prob * 1.5).detach().requires_grad_()
        data = Data(
            dp_size=2,
            batch_num_tokens=200,
            global_batch_size=12,
            response_mask=given["response_mask"],
            old_log_probs=given["old_log_prob"],
            advantages=given["advantages"],
            ref_log_prob=given["old_log_prob"] - 0.1,
        )
        policy_loss = SimpleNamespace(get=lambda name, default: loss_mode, dro_beta=0.1)
        made = config(policy_loss=policy_loss, use_kl_loss=True, entropy_coeff=0.01)
        loss, metrics = losses.ppo_loss(made, {"log_probs": log_prob, "entropy": entropy}, data)
        loss.backward()
        values = {name: value.values if hasattr(value, "values") else value for name, value in metrics.items()}
        return {"loss": loss, "gradient": log_prob.grad, "entropy": entropy.grad} | {
            name: torch.as_tensor(value) for name, value in values.items()
        }

    theirs = step(mode)
    adapter.install(megatron=False)
    ours = step(f"fused_{mode}")
    adapter.remove()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")


def test_what_a_config_may_not_say():
    with pytest.raises(ValueError, match="config must be verl's ActorConfig, got None"):
        adapter.vanilla(**tokens())
    with pytest.raises(ValueError, match=r"policy_loss\.dro_beta must be a number greater than 0, got None"):
        adapter.dro(**tokens(), config=config(policy_loss=SimpleNamespace(dro_beta=None)))
    with pytest.raises(ValueError, match=r"loss_agg_mode must be one of .*got 'mean'"):
        adapter.vanilla(**tokens(), loss_agg_mode="mean", config=config())
    with pytest.raises(ValueError, match="batch_num_tokens is needed with dp_size > 1"):
        adapter.vanilla(**tokens(), config=config(global_batch_info={"dp_size": 2, "batch_num_tokens": None}))
    with pytest.raises(TypeError, match="cp_size"):  # more of a global batch than is known here
        adapter.vanilla(**tokens(), config=config(global_batch_info={"cp_size": 2}))
    with pytest.raises(ValueError, match=r"^clip_ratio_c must be at least 1, got 0.5"):
        adapter.vanilla(**tokens(), config=config(clip_ratio_c=0.5))
