"""Tests of the adapter of SkyRL with SkyRL in the process: run by test_skyrl.py, in a process whose other packages are
stubs."""

from __future__ import annotations

import gc
import math
import pickle
from types import SimpleNamespace

import pytest
import torch
from skyrl.backends.skyrl_train.utils import ppo_utils, torch_utils
from skyrl.backends.skyrl_train.utils.ppo_utils import PolicyLossRegistry, PolicyLossType
from skyrl.train.config import CISPOConfig, DPPOConfig

import fused_losses
from fused_losses.adapters import skyrl as adapter
from fused_losses.adapters.comparisons.skyrl import config, correction, numbers, tokens

B, T, V = 3, 8, 101
SLOTS = (adapter.LOGPROBS, adapter.ENTROPY, adapter.READ_OLD_LOGPROBS, adapter.READ_NO_OLD_LOGPROBS)


@pytest.fixture
def installed():
    adapter.install()
    yield
    adapter.remove()


@pytest.fixture
def reads(monkeypatch):
    """How often logits have been read, by which function."""
    count = {"logprobs": 0, "statistics": 0}
    for name in count:

        def counted(*args, name=name, **keywords):
            count[name] += 1
            return getattr(fused_losses, name)(*args, **keywords)

        monkeypatch.setattr(adapter, name, counted)
    return count


# ---- In place of SkyRL's, and back ----


def seen() -> dict[str, object]:
    names = PolicyLossRegistry.list_available()
    return {slot.name: getattr(torch_utils, slot.name, None) or getattr(ppo_utils, slot.name) for slot in SLOTS} | {
        name: PolicyLossRegistry.get(name) for name in names
    }


def test_installed_and_removed():
    before = seen()
    adapter.install()
    adapter.install()
    try:
        assert torch_utils.logprobs_from_logits is adapter.logprobs_from_logits
        assert torch_utils.chunked_entropy_from_logits is adapter.chunked_entropy_from_logits
        for name in adapter.Name:
            loss = adapter.POLICY_LOSSES[name.value.removeprefix("fused_")]
            assert PolicyLossRegistry.get(name.value) is loss
            assert pickle.loads(pickle.dumps(loss)) is loss  # as it goes to workers
        assert PolicyLossRegistry.get("regular") is before["regular"]
        with pytest.raises(RuntimeError, match=r"other options already: call remove\(\) first"):
            adapter.install(replace_losses=True)
    finally:
        adapter.remove()
    adapter.remove()
    assert seen() == before


def test_in_place_of_skyrls_losses():
    before = seen()
    adapter.install(inplace=False, replace_losses=True)
    for name, loss in adapter.POLICY_LOSSES.items():
        assert PolicyLossRegistry.get(PolicyLossType(name)) is loss
    ppo_utils.PolicyLossRegistry.repopulate_registry()  # as validate_cfg does: what is there stays
    assert PolicyLossRegistry.get("cross_entropy") is adapter.cross_entropy
    adapter.remove()
    assert seen() == before


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov", "cross_entropy"])
def test_a_loss_that_is_not_here_is_refused_by_skyrl(installed, name):
    with pytest.raises(ValueError, match=f"Unknown policy loss 'fused_{name}'"):
        PolicyLossRegistry.get(f"fused_{name}")


def test_names_say_which_logprobs_a_loss_reads(installed):
    """SkyRL refuses a loss of old logprobs where it trains asynchronously, and else leaves their forward out."""
    for name in adapter.Name:
        theirs = PolicyLossType(name.value.removeprefix("fused_"))
        for slot in ("LOSSES_WITH_OLD_LOGPROBS", "LOSSES_WITHOUT_OLD_LOGPROBS"):
            if theirs is not PolicyLossType.IMPORTANCE_SAMPLING:  # in neither of SkyRL's; it reads them
                assert (name.value in getattr(ppo_utils, slot)) == (theirs in getattr(ppo_utils, slot))
    assert "fused_importance_sampling" in ppo_utils.LOSSES_WITH_OLD_LOGPROBS
    assert all(isinstance(loss.value, str) for loss in ppo_utils.LOSSES_WITH_OLD_LOGPROBS)


def test_a_slot_that_has_moved(monkeypatch):
    monkeypatch.setattr(torch_utils, "chunked_entropy_from_logits", lambda logits, chunk_size: None)
    with pytest.raises(
        RuntimeError, match=r"skyrl 0\.4\.0: .*torch_utils\.chunked_entropy_from_logits is not the slot"
    ):
        adapter.install()
    assert torch_utils.logprobs_from_logits is not adapter.logprobs_from_logits
    assert "fused_regular" not in PolicyLossRegistry.list_available()


# ---- Logits ----


def drawn_logits(dtype=torch.float32):
    torch.manual_seed(0)
    return (3 * torch.randn(B, T, V)).to(dtype).requires_grad_(), torch.randint(V, (B, T))


@pytest.mark.parametrize("inplace", [True, False])
def test_logprobs_and_entropy_of_one_read(reads, inplace):
    leaf, labels = drawn_logits()
    logits = leaf * 1
    before = logits.detach().clone()
    logp = adapter.logprobs_from_logits(logits, labels, inplace_backward=inplace)
    entropy = adapter.chunked_entropy_from_logits(logits, requires_grad=True)
    assert reads == {"logprobs": 1, "statistics": 0}
    (gradient,) = torch.autograd.grad(logp.sum() + 0.3 * entropy.sum(), leaf)
    log_softmax = leaf.double().log_softmax(-1)
    theirs = log_softmax.gather(-1, labels[..., None]).sum() - 0.3 * (log_softmax.exp() * log_softmax).sum()
    torch.testing.assert_close(gradient, torch.autograd.grad(theirs, leaf)[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(logits.detach(), gradient if inplace else before)


def test_other_logits_are_read_again(reads):
    leaf, labels = drawn_logits()
    with torch.no_grad():
        adapter.logprobs_from_logits(leaf, labels)
        copy = adapter.chunked_entropy_from_logits(leaf.clone())
        assert reads == {"logprobs": 1, "statistics": 1}
        adapter.chunked_entropy_from_logits(leaf)  # asked after others
        assert reads == {"logprobs": 1, "statistics": 2}
        adapter.logprobs_from_logits(leaf, labels)
        leaf.mul_(2)
        changed = adapter.chunked_entropy_from_logits(leaf)
        assert reads == {"logprobs": 2, "statistics": 3}
    assert (changed < copy).all()


def test_nothing_of_the_logits_is_kept():
    leaf, labels = drawn_logits()
    with torch.no_grad():
        adapter.logprobs_from_logits(leaf * 1, labels)
        gc.collect()
        (read,) = adapter._last
        assert read.logits() is None
        adapter.chunked_entropy_from_logits(leaf)
    assert adapter._last == []


def test_entropy_compiled_as_the_model_wrapper_does(installed, reads):
    compiled = torch.compile(torch_utils.chunked_entropy_from_logits, dynamic=True, backend="aot_eager")
    leaf, labels = drawn_logits()
    logits = leaf * 1
    logp = torch_utils.logprobs_from_logits(logits, labels, inplace_backward=True)
    entropy = compiled(logits, requires_grad=True, attention_mask=torch.ones(B, T), chunk_size=4)
    assert reads == {"logprobs": 1, "statistics": 0}
    (logp.sum() + entropy.sum()).backward()
    assert leaf.grad.isfinite().all()


def test_attention_mask():
    leaf, labels = drawn_logits()
    mask = torch.zeros(B, T)
    mask[0, 3] = 1
    bad = leaf.detach().clone()
    bad[1] = math.nan
    adapter.logprobs_from_logits(bad, labels)
    entropy = adapter.chunked_entropy_from_logits(bad, attention_mask=mask)
    assert entropy.count_nonzero() == 1 and entropy[0, 3] > 0
    with pytest.raises(ValueError, match=r"attention_mask must have the shape of the tokens, \(3, 8\), got \(3, 7\)"):
        adapter.chunked_entropy_from_logits(leaf, attention_mask=mask[:, 1:])


def test_bfloat16_is_float32s():
    logits, labels = drawn_logits(torch.bfloat16)
    truth = logits.double().log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    torch.testing.assert_close(adapter.logprobs_from_logits(logits, labels).double(), truth, rtol=1e-6, atol=1e-6)
    theirs = torch_utils.logprobs_from_logits(logits, labels)
    assert (theirs.double() - truth).abs().max() > 1e-2  # rounded to bfloat16, several times


def test_step_of_a_model_through_skyrls_wrapper(reads):
    """A Llama as SkyRL's workers hold it: parameters after a step with an entropy bonus, by its functions and ours."""
    from skyrl.backends.skyrl_train.workers.model_wrapper import HFModelWrapper
    from transformers import LlamaConfig, LlamaForCausalLM

    made = LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, max_length=16
    )

    def step(policy_loss_type: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        wrapper = HFModelWrapper(LlamaForCausalLM(made))
        optimizer = torch.optim.SGD(wrapper.parameters(), lr=0.05)
        attention_mask = (torch.arange(T) >= torch.tensor([[0], [2], [1]])).long()
        log_probs, output = wrapper(
            torch.randint(V, (B, T)),
            5,
            attention_mask=attention_mask,
            temperature=0.7,
            return_output=True,
            compute_entropy=True,
            entropy_requires_grad=True,
        )
        loss, _ = PolicyLossRegistry.get(policy_loss_type)(
            log_probs,
            log_probs.detach() + 0.3 * torch.randn(B, 5),
            torch.randn(B, 5),
            config=config("regular"),
            loss_mask=(torch.arange(5) < torch.tensor([[5], [2], [0]])).float(),
            rollout_logprobs=None,
        )
        (loss - 0.01 * output["entropy"][:, -6:-1].mean()).backward()
        optimizer.step()
        return [parameter.detach() for parameter in wrapper.parameters()]

    theirs = step("regular")
    assert reads == {"logprobs": 0, "statistics": 0}
    adapter.install()
    try:
        ours = step("fused_regular")
    finally:
        adapter.remove()
    assert reads == {"logprobs": 1, "statistics": 0}
    for their_parameter, our_parameter in zip(theirs, ours, strict=True):
        torch.testing.assert_close(our_parameter, their_parameter, rtol=1e-5, atol=1e-6)


# ---- Policy losses ----


@pytest.mark.parametrize("name", adapter.POLICY_LOSSES)
def test_masked_tokens_may_hold_anything(name):
    clean = tokens() | {"config": config(name)}
    expected = numbers(adapter.POLICY_LOSSES[name], clean)
    for bad in (math.nan, math.inf, -math.inf):
        given = tokens() | {"config": config(name)}
        masked = given["loss_mask"] == 0
        for what in ("old_log_probs", "advantages", "log_probs", "rollout_logprobs"):
            given[what] = given[what].detach().clone().masked_fill(masked, bad).requires_grad_(what == "log_probs")
        found = numbers(adapter.POLICY_LOSSES[name], given)
        for what, value in expected.items():
            assert torch.equal(torch.as_tensor(found[what]), torch.as_tensor(value)), what
        assert (given["log_probs"].grad[masked] == 0).all()


@pytest.mark.parametrize("name", adapter.POLICY_LOSSES)
def test_a_batch_with_no_token(name):
    """Metrics are SkyRL's there, too: of all tokens, or NaN."""
    theirs = PolicyLossRegistry.get(name)
    given = {"config": config(name), "loss_mask": torch.zeros(6, 40)}
    found, expected = numbers(adapter.POLICY_LOSSES[name], tokens() | given), numbers(theirs, tokens() | given)
    assert found["loss"] == 0 and found["gradient"].count_nonzero() == 0
    for what, value in expected.items():
        torch.testing.assert_close(
            torch.as_tensor(found[what]), torch.as_tensor(value), rtol=1e-6, atol=0, equal_nan=True, msg=what
        )


@pytest.mark.parametrize("scale", [1 / 97, torch.linspace(0.1, 2.0, 40)], ids=["one", "uneven"])
@pytest.mark.parametrize("name", adapter.POLICY_LOSSES)
def test_scaled_masks(name, scale):
    """As SkyRL's collator hands to cross_entropy, and as the weights of a Tinker request: they count in gspo's mean."""
    theirs = PolicyLossRegistry.get(name)
    given = tokens() | {"config": config(name), "rollout_logprobs": tokens()["rollout_logprobs"]}
    given["loss_mask"] = given["loss_mask"] * scale
    found = numbers(adapter.POLICY_LOSSES[name], given)
    given["log_probs"] = tokens()["log_probs"]
    for what, value in numbers(theirs, given).items():
        torch.testing.assert_close(
            torch.as_tensor(found[what]).double(), torch.as_tensor(value).double(), rtol=1e-5, atol=1e-8, msg=what
        )


@pytest.mark.parametrize("name", adapter.POLICY_LOSSES)
def test_bfloat16_logprobs(name):
    """Beside SkyRL's loss of the same numbers in float64."""
    theirs = PolicyLossRegistry.get(name)

    def of(dtype):
        rounded = {
            what: value.detach().bfloat16().to(dtype) if value.is_floating_point() else value
            for what, value in tokens().items()
        }
        return rounded | {"log_probs": rounded["log_probs"].requires_grad_(), "config": config(name)}

    found, expected = numbers(adapter.POLICY_LOSSES[name], of(torch.bfloat16)), numbers(theirs, of(torch.float64))
    torch.testing.assert_close(found["loss"].double(), expected["loss"], rtol=1e-5, atol=1e-5)
    largest = expected["gradient"].abs().max().item()
    torch.testing.assert_close(found["gradient"].double(), expected["gradient"], rtol=2**-8, atol=1e-6 * largest)


def test_what_a_config_may_not_say():
    given = tokens() | {"rollout_logprobs": None}
    with pytest.raises(ValueError, match="rollout_is needs rollout_logprobs, got None"):
        adapter.rollout_is(**given, config=config("rollout_is"))
    anchored = CISPOConfig(cispo_anchor="rollout")
    with pytest.raises(ValueError, match="cispo_anchor='rollout' needs rollout_logprobs, got None"):
        adapter.cispo(**given, config=config("cispo", cispo=anchored))
    twice = correction(tis_ratio_type="token")
    with pytest.raises(ValueError, match=r"tis_ratio_type must be None with cispo_anchor='rollout'.*got 'token'"):
        adapter.cispo(**tokens(), config=config("cispo", cispo=anchored, off_policy_correction=twice))
    unknown = SimpleNamespace(dppo_type="top_k", delta_low=0.2, delta_high=0.2)
    with pytest.raises(ValueError, match="dppo_type must be 'binary_tv' or 'binary_kl', got 'top_k'"):
        adapter.dppo(**tokens(), config=config("dppo", dppo=unknown))
    with pytest.raises(ValueError, match="Unknown tis_ratio_type: tokens"):  # SkyRL's own
        adapter.regular(**tokens(), config=config("regular", off_policy_correction=correction(tis_ratio_type="tokens")))


def test_the_trust_region_of_dppo():
    """By hand: a token that moved by more than the bound the way its advantage pushes it, and others."""
    probability = torch.tensor([[0.5, 0.5, 0.1, 0.1, 0.25]])
    before = torch.tensor([[0.2, 0.2, 0.4, 0.4, 0.2]])
    advantages = torch.tensor([[1.0, -1.0, -1.0, 1.0, 1.0]])
    given = probability.log().requires_grad_(), before.log(), advantages, config("dppo", dppo=DPPOConfig("binary_tv"))
    loss, metrics = adapter.dppo(*given)
    loss.backward()
    ratio = probability / before
    kept = torch.tensor([[0.0, 1.0, 0.0, 1.0, 1.0]])
    torch.testing.assert_close(given[0].grad, -ratio * advantages * kept)
    assert metrics["clip_ratio"] == pytest.approx(0.4)
