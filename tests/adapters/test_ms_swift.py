"""ms-swift's loss: what it refuses, what masked tokens hold, and its way into ms-swift and out of it."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import elsewhere
import pytest
import torch

from fused_losses.adapters import ms_swift as ours

B, L, V = 2, 9, 101


def trainer(**template) -> SimpleNamespace:
    return SimpleNamespace(
        template=SimpleNamespace(**{"sequence_parallel_size": 1, "task_type": "causal_lm"} | template)
    )


def loss(**options) -> ours.CrossEntropyLoss:
    return ours.CrossEntropyLoss(SimpleNamespace(**options), trainer())


def given(dtype: torch.dtype = torch.float32) -> tuple[SimpleNamespace, torch.Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(V, (B, L))
    labels[:, :3] = -100
    return SimpleNamespace(logits=torch.randn(B, L, V).to(dtype).requires_grad_()), labels


def expected(outputs: SimpleNamespace, labels: torch.Tensor) -> torch.Tensor:
    """Per token, of the successors."""
    logprobs = outputs.logits.double().log_softmax(-1)[:, :-1]
    successors = labels[:, 1:]
    picked = logprobs.gather(-1, successors.clamp(min=0)[..., None])[..., 0]
    return torch.nn.functional.pad(-picked * (successors != -100), (0, 1))


# ---- Refused ----


class BaseMegatronTrainer:
    template = trainer().template


@pytest.mark.parametrize(
    "options, of, message",
    [
        ({"label_smoothing_factor": 0.1}, trainer(), "label_smoothing_factor has no effect"),
        ({}, trainer(sequence_parallel_size=2), "needs sequence_parallel_size 1, got 2"),
        ({}, trainer(task_type="seq_cls"), "needs task_type \"causal_lm\", got 'seq_cls'"),
        ({}, BaseMegatronTrainer(), "not for Megatron's trainers, got BaseMegatronTrainer"),
    ],
)
def test_refused_options(options, of, message):
    with pytest.raises(ValueError, match=message):
        ours.CrossEntropyLoss(SimpleNamespace(**options), of)


def test_refused_arguments():
    outputs, labels = given()
    with pytest.raises(TypeError, match="fused_cross_entropy takes no channel, cu_seqlens"):
        loss()(outputs, labels, trainer=None, cu_seqlens=None, channel=None)
    with pytest.raises(TypeError, match="per_token_loss_func takes no return_labels"):
        ours.per_token_loss_func(outputs, labels, return_labels=True)
    with pytest.raises(ValueError, match=r"needs outputs.logits, got NoneType"):
        loss()(SimpleNamespace(logits=None), labels)


def test_it_imports_without_ms_swift():
    code = "import sys; sys.modules['swift'] = None; from fused_losses.adapters import ms_swift; ms_swift.install()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "swift" in done.stderr.splitlines()[-1], done.stderr


# ---- Numbers ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dft", [False, True])
def test_the_loss_of_successors(dtype, dft):
    outputs, labels = given(dtype)
    of_token = expected(outputs, labels)
    if dft:
        of_token = of_token * (-of_token).exp().detach()
    own = loss(enable_dft_loss=dft)(outputs, labels)
    reference = of_token.sum() / (labels[:, 1:] != -100).sum()
    torch.testing.assert_close(own, reference.float(), rtol=1e-6, atol=0)
    per_token = ours.per_token_loss_func(outputs, labels, enable_dft_loss=dft)
    torch.testing.assert_close(per_token, of_token.view(-1).float(), rtol=1e-5, atol=1e-7)
    (gradient,) = torch.autograd.grad(own, outputs.logits)
    (exact,) = torch.autograd.grad(reference, outputs.logits)
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]  # of the gradient's dtype
    torch.testing.assert_close(gradient.double(), exact.double(), rtol=rounding, atol=1e-7)


def test_forms_of_the_scale():
    """Flat, as the trainer gives it; of the labels' shape; a number."""
    outputs, labels = given()
    scale = torch.rand(B, L)
    flat = loss()(outputs, labels, loss_scale=scale.view(-1))
    reference = (expected(outputs, labels) * scale).sum() / (labels[:, 1:] != -100).sum()
    torch.testing.assert_close(flat, reference.float(), rtol=1e-6, atol=0)
    assert torch.equal(flat, loss()(outputs, labels, loss_scale=scale))
    torch.testing.assert_close(loss()(outputs, labels, loss_scale=0.5), 0.5 * loss()(outputs, labels))


@pytest.mark.parametrize("dft", [False, True])
def test_all_tokens_masked(dft):
    """0, where ms-swift has 0 / 0; by labels, and by a scale of 0 with whatever in the rows."""
    outputs, labels = given()
    for of_loss in (
        loss(enable_dft_loss=dft)(outputs, torch.full_like(labels, -100)),
        ours.per_token_loss_func(outputs, torch.full_like(labels, -100), dft).sum(),
    ):
        (gradient,) = torch.autograd.grad(of_loss, outputs.logits)
        assert of_loss.item() == 0.0 and gradient.abs().sum() == 0.0
    outputs.logits.data.fill_(torch.nan)
    masked = loss(enable_dft_loss=dft)(outputs, labels, loss_scale=torch.zeros(B, L))
    (gradient,) = torch.autograd.grad(masked, outputs.logits)
    assert masked.item() == 0.0 and gradient.abs().sum() == 0.0


def test_what_the_trainer_does_with_it_afterwards():
    """It multiplies the loss in place, and reads the logits."""
    outputs, labels = given()
    logits = outputs.logits.detach().clone()
    own = loss()(outputs, labels, num_items_in_batch=7)
    own *= 2
    own.backward()
    (exact,) = torch.autograd.grad(2 * expected(outputs, labels).sum() / 7, outputs.logits)
    torch.testing.assert_close(outputs.logits.grad, exact.float(), rtol=1e-5, atol=1e-7)
    assert torch.equal(outputs.logits.detach(), logits)


def test_logprobs_that_are_written_to():
    """As ms-swift's DPO does with those of masked tokens."""
    outputs, labels = given()
    values = ours.selective_log_softmax(outputs.logits, labels.clamp(min=0))
    values[labels == -100] = 0
    values.sum().backward()
    assert outputs.logits.grad[labels == -100].abs().sum() == 0.0
    assert outputs.logits.grad[labels != -100].abs().sum() > 0.0


def test_entropy_of_rows_that_miss_a_class():
    logits = torch.randn(3, V)
    logits[:, 0] = -torch.inf
    entropy = ours.entropy_from_logits(logits)
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=logits[:, 1:]).entropy())


# ---- Into ms-swift and out of it ----


def installs_and_removes() -> None:
    import swift.trainers
    from swift.loss import loss_map
    from swift.rlhf_trainers import grpo_trainer, rlhf_mixin
    from swift.trainers import seq2seq_trainer, utils

    def now() -> list[object]:
        return [
            swift.trainers.per_token_loss_func,
            seq2seq_trainer.per_token_loss_func,
            utils.per_token_loss_func,
            grpo_trainer.selective_log_softmax,
            rlhf_mixin.selective_log_softmax,
            grpo_trainer.entropy_from_logits,
        ]

    before, names = now(), dict(loss_map)
    ours.remove()  # of nothing
    for _ in range(2):
        ours.install()
    assert now() == [ours.per_token_loss_func] * 3 + before[3:]
    assert loss_map == names | {ours.NAME: ours.CrossEntropyLoss}
    ours.install(rlhf=True)
    assert now()[3:] == [ours.selective_log_softmax] * 2 + [ours.entropy_from_logits]
    ours.remove()
    assert now() == before and loss_map == names


def fails_by_name() -> None:
    from swift.loss import loss_map
    from swift.trainers import utils

    def moved(outputs, labels):
        raise AssertionError

    original = utils.per_token_loss_func
    utils.per_token_loss_func = moved
    with pytest.raises(
        RuntimeError, match=r"ms-swift 4\.6\.0: swift.trainers.utils.per_token_loss_func is not the slot"
    ):
        ours.install()
    utils.per_token_loss_func = original
    assert ours.NAME not in loss_map
    loss_map[ours.NAME] = object
    with pytest.raises(RuntimeError, match="has another 'fused_cross_entropy'"):
        ours.install()


def test_into_ms_swift_and_out_of_it():
    elsewhere.run("ms_swift", installs_and_removes, fails_by_name)
