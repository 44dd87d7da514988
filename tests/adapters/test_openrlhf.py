"""OpenRLHF's functions and its PolicyLoss: what masked tokens hold, what is refused, the way in and out."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import elsewhere
import pytest
import torch

from fused_losses.adapters import openrlhf as ours

B, T, V = 3, 7, 101
OPTIONS = {  # PolicyLoss's own attributes, as its __init__ leaves them
    "clip_eps_low": 0.2,
    "clip_eps_high": 0.2,
    "dual_clip": None,
    "token_level_loss": True,
    "policy_loss_type": "ppo",
    "is_correction_level": "off",
    "is_correction_mode": "mask",
    "is_correction_gating": "ratio",
    "is_correction_threshold": (0.5, 5.0),
}
GSPO = {"policy_loss_type": "gspo", "token_level_loss": False}
KINDS = {
    "ppo": {},
    "sequence means": {"token_level_loss": False},
    "gspo": GSPO,
    "token ratio": {"is_correction_level": "token"},
    "sequence ratio": {"is_correction_level": "seq"},
    "clip": {"is_correction_level": "token", "is_correction_mode": "clip"},
    "tv": {"is_correction_level": "seq", "is_correction_gating": "tv", "is_correction_threshold": (0.0, 0.2)},
    "gspo, corrected": {**GSPO, "is_correction_level": "token"},
}
kinds = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)


def forward(options, *tensors, **batch):
    return ours.policy_loss(SimpleNamespace(**(OPTIONS | options)), *tensors, **batch)


def given() -> list[torch.Tensor]:
    """logprobs, those before, advantages, a mask with a sequence of nothing, and the sampler's logprobs."""
    torch.manual_seed(0)
    old = -2 + torch.randn(B, T)
    mask = torch.arange(T) < torch.tensor([[7], [3], [0]])
    return [old + 0.3 * torch.randn(B, T), old, torch.randn(B, T), mask, old + 0.2 * torch.randn(B, T)]


# ---- PolicyLoss ----


def test_refused():
    logprobs, old, advantages, mask, _ = given()
    with pytest.raises(ValueError, match='policy_loss_type must be "ppo" or "gspo", got \'reinforce\''):
        forward({"policy_loss_type": "reinforce"}, logprobs, old, advantages, mask)
    for policy in ("ppo", "gspo"):
        with pytest.raises(ValueError, match="is_correction_level 'seq' needs rollout_log_probs, got None"):
            forward({"is_correction_level": "seq", "policy_loss_type": policy}, logprobs, old, advantages, mask)


@kinds
def test_masked_tokens_may_hold_anything(options):
    tensors = given()
    mask = tensors[3]
    found = []
    for junk in (0.0, torch.nan, torch.inf, -torch.inf):
        filled = [x if x is mask else x.masked_fill(~mask, junk) for x in tensors]
        filled[0].requires_grad_()
        loss, *metrics = forward(options, *filled, dp_size=2, batch_num_tokens=31.0, global_batch_size=5.0)
        loss.backward()
        assert filled[0].grad[~mask].abs().sum() == 0.0
        found.append([loss.detach(), filled[0].grad, *(m for m in metrics if m is not None)])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert a.isfinite().all() and torch.equal(a, b)


@kinds
def test_all_tokens_masked(options):
    """0, where OpenRLHF has 0 / 0; but for the share of sequences that are out of bounds, which is 1 there, too."""
    logprobs, old, advantages, mask, rollout = given()
    logprobs.requires_grad_()
    loss, *metrics, filtered = forward(options, logprobs, old, advantages, torch.zeros_like(mask), rollout)
    loss.backward()
    assert loss.item() == 0.0 and logprobs.grad.abs().sum() == 0.0
    assert all(m.item() == 0.0 for m in metrics if m is not None)
    of_sequence = options.get("is_correction_level") == "seq"
    assert filtered is None or filtered.item() == float(of_sequence)


@kinds
def test_forms_of_the_mask(options):
    logprobs, old, advantages, mask, rollout = given()
    for form in (mask.float(), mask.long()):
        for a, b in zip(
            forward(options, logprobs, old, advantages, mask, rollout),
            forward(options, logprobs, old, advantages, form, rollout),
            strict=True,
        ):
            assert a is b is None or torch.equal(a, b)
    for a, b in zip(
        forward(options, logprobs, old, advantages, torch.ones_like(mask), rollout),
        forward(options, logprobs, old, advantages, None, rollout),
        strict=True,
    ):
        assert a is b is None or torch.equal(a, b)


def test_a_log_ratio_beyond_its_clamp():
    """The ratio is e^20, with no gradient, however far the two are apart."""
    logprobs = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    loss, *_ = forward({}, logprobs, torch.tensor([[-90.0, -1.0]]), torch.tensor([[-1.0, 0.0]]))
    loss.backward()
    assert loss.item() == pytest.approx(torch.tensor(20.0).exp().item() / 2)
    assert logprobs.grad.abs().sum() == 0.0


# ---- Logprobs and entropies ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(B, T, V), (1, 1, 3), (5, 1000)], ids=str)
def test_rows(dtype, shape):
    """The logits stay as they are at any temperature; the results have 32 bits."""
    torch.manual_seed(0)
    leaf = torch.randn(shape).to(dtype).requires_grad_()
    labels = torch.randint(shape[-1], shape[:-1])
    before = leaf.detach().clone()
    logprobs, entropy = ours.log_probs_from_logits(leaf, labels, 0.7), ours.compute_entropy(leaf)
    assert torch.equal(leaf.detach(), before)
    exact = (leaf.double() / 0.7).log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    torch.testing.assert_close(logprobs, exact.float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=leaf.float()).entropy())
    (gradient,) = torch.autograd.grad(logprobs.sum(), leaf)
    (reference,) = torch.autograd.grad(exact.sum(), leaf)
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]  # of the gradient's dtype
    torch.testing.assert_close(gradient.double(), reference.double(), rtol=rounding, atol=1e-6)


def test_64_bits_are_refused():
    with pytest.raises(TypeError, match=r"logits must be .*float64"):
        ours.log_probs_from_logits(torch.randn(2, 5, dtype=torch.float64), torch.zeros(2, dtype=torch.int64))


def test_in_place():
    leaf, labels = torch.randn(B, T, V, requires_grad=True), torch.randint(V, (B, T))
    logits = leaf * 1.0
    ours.log_probs_from_logits(logits, labels, inplace=True).sum().backward()
    assert torch.equal(logits.detach(), leaf.grad)
    with torch.no_grad():  # as for old logprobs
        values = ours.log_probs_from_logits(leaf * 1.0, labels, inplace=True)
    torch.testing.assert_close(values, ours.log_probs_from_logits(leaf, labels).detach())


def test_in_place_beside_an_entropy_raises():
    """It is not a wrong number."""
    leaf, labels = torch.randn(B, T, V, requires_grad=True), torch.randint(V, (B, T))
    logits = leaf * 1.0
    entropy = ours.compute_entropy(logits)
    logprobs = ours.log_probs_from_logits(logits, labels, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (logprobs - 0.01 * entropy).sum().backward()


# ---- Into OpenRLHF and out of it ----


def test_it_imports_without_openrlhf():
    code = "import sys; sys.modules['openrlhf'] = None; from fused_losses.adapters import openrlhf; openrlhf.install()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "openrlhf" in done.stderr.splitlines()[-1], done.stderr


def installs_and_removes() -> None:
    from openrlhf.models import PolicyLoss, actor, utils

    def now() -> list[object]:
        functions = ("log_probs_from_logits", "compute_entropy")
        return [*(getattr(m, name) for m in (actor, utils) for name in functions), PolicyLoss.forward]

    before = now()
    ours.remove()  # of nothing
    for inplace in (False, True):
        for _ in range(2):
            ours.install(inplace=inplace)
        installed = now()
        assert installed[0].keywords == installed[2].keywords == {"inplace": inplace}
        assert [installed[1], *installed[3:]] == [ours.compute_entropy] * 2 + [ours.policy_loss]
        with pytest.raises(RuntimeError, match=rf"installed with inplace={inplace}: remove\(\) that first"):
            ours.install(inplace=not inplace)
        ours.remove()
        assert now() == before
    ours.install()
    with pytest.raises(ValueError, match="is_correction_gating must be ratio/binary_kl/tv"):  # its own check
        PolicyLoss(is_correction_gating="kl")
    actor.compute_entropy = before[1]
    with pytest.raises(RuntimeError, match=r"openrlhf.models.actor.compute_entropy was replaced after"):
        ours.remove()
    actor.compute_entropy = ours.compute_entropy
    ours.remove()


def fails_by_name() -> None:
    from openrlhf.models import PolicyLoss

    def moved(self, log_probs, old_log_probs, advantages, action_mask=None):
        raise AssertionError

    original, PolicyLoss.forward = PolicyLoss.forward, moved
    message = r"openrlhf 0\.11\.2: openrlhf.models.loss.PolicyLoss.forward is not the slot"
    with pytest.raises(RuntimeError, match=message):
        ours.install()
    PolicyLoss.forward = original


def gates_are_within_and_without() -> None:
    """In what is compared some are kept and some are not."""
    from fused_losses.adapters.comparisons.openrlhf import POLICIES, policy

    for name, options in POLICIES.items():
        found = policy(ours.policy_loss, options, False)
        assert 0 < found["clip_ratio"] < 1, name
        if "is_correction_level" in options and options.get("policy_loss_type") != "gspo":
            # one of four sequences has no token, and counts as out
            assert (0.25 if options["is_correction_level"] == "seq" else 0.0) < found["is_filter_ratio"] < 1, name


def test_into_openrlhf_and_out_of_it():
    elsewhere.run("openrlhf", installs_and_removes, fails_by_name, gates_are_within_and_without)
