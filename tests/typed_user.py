"""A caller's code, for type checkers: what must pass, and what must be reported, in their strictest settings.

``make lint`` runs mypy and pyright over it. They fail where a right line is reported; and where a wrong one is not, as
an ignore that nothing needs is an error to them. ``test_typing.py`` runs what is right.
"""

from __future__ import annotations

from torch import Tensor
from typing_extensions import assert_type

import fused_losses
from fused_losses import LinearHead, Outputs, on_logprobs


def of_logprobs(logits: Tensor, targets: Tensor, old_logprobs: Tensor, advantages: Tensor, known_later: bool) -> None:
    logprobs, entropy = fused_losses.logprobs(logits, targets, return_entropy=True)
    loss = on_logprobs.ppo(logprobs, old_logprobs, advantages, entropy=entropy, entropy_coef=0.1, weights=advantages)
    loss.backward()
    assert_type(loss, Tensor)
    loss, outputs = on_logprobs.gspo(logprobs.detach(), old_logprobs, 1.0, return_outputs=True)
    assert_type(outputs.metrics["ratio_mean"], Tensor)
    either = on_logprobs.policy_loss(logprobs.detach(), "dro", old_logprobs, 1.0, return_outputs=known_later)
    assert_type(either, Tensor | tuple[Tensor, Outputs])


def of_the_logits(logits: Tensor, targets: Tensor, weights: Tensor, temperature: Tensor, known_later: bool) -> None:
    """A loss is a tensor; with its outputs a pair; either of them where only the running program knows."""
    loss = fused_losses.cross_entropy(logits, targets, label_smoothing=0.1, z_loss=1e-4, weights=weights)
    loss.backward()
    assert_type(loss, Tensor)
    loss.item()
    loss, outputs = fused_losses.cross_entropy(logits, targets, reduction="sum", upstream=2.0, return_outputs=True)
    assert_type(loss, Tensor)
    assert_type(outputs, Outputs)
    assert_type(outputs.logprobs, Tensor)
    assert_type(outputs.entropy, Tensor | None)
    assert_type(outputs.metrics["tokens"], Tensor)
    either = fused_losses.cross_entropy(logits, targets, return_outputs=known_later)
    assert_type(either, Tensor | tuple[Tensor, Outputs])

    logprobs = fused_losses.logprobs(logits, targets, temperature=temperature, softcap=30.0)
    logprobs.sum().backward()
    assert_type(logprobs, Tensor)
    logprobs, entropy = fused_losses.logprobs(logits, targets, return_entropy=True)
    assert_type(logprobs, Tensor)
    assert_type(entropy, Tensor)
    one_or_two = fused_losses.logprobs(logits, targets, return_entropy=known_later)
    assert_type(one_or_two, Tensor | tuple[Tensor, Tensor])
    seen = fused_losses.statistics(logits, targets, outputs=["logprobs", "top1"], softcap=30.0)
    assert_type(seen, fused_losses.Statistics)
    assert_type(seen.top1, Tensor | None)


def of_a_head(hidden: Tensor, targets: Tensor, old_logprobs: Tensor, advantages: Tensor, known_later: bool) -> None:
    """In place of logits everywhere."""
    head = LinearHead(hidden, hidden.new_ones(9, hidden.shape[-1]), chunk_bytes=1 << 20, skip_masked=known_later)
    loss = fused_losses.ppo(head, targets, old_logprobs, advantages)
    loss.backward()
    assert_type(loss, Tensor)
    loss, outputs = fused_losses.cross_entropy(head, targets, return_outputs=True)
    assert_type(outputs, Outputs)
    logprobs, entropy = fused_losses.logprobs(head, targets, return_entropy=True)
    assert_type(logprobs, Tensor)
    assert_type(entropy, Tensor)


def of_a_token(logits: Tensor, targets: Tensor, old_logprobs: Tensor, advantages: Tensor, known_later: bool) -> None:
    loss = fused_losses.importance_sampling(logits, targets, old_logprobs, advantages, importance_weights=advantages)
    loss.backward()
    assert_type(loss, Tensor)
    loss, outputs = fused_losses.importance_sampling(logits, targets, old_logprobs, advantages, return_outputs=True)
    assert_type(outputs.metrics["ratio_mean"], Tensor)
    either = fused_losses.importance_sampling(logits, targets, old_logprobs, 1.0, return_outputs=known_later)
    assert_type(either, Tensor | tuple[Tensor, Outputs])

    loss = fused_losses.reinforce(logits, targets, advantages, importance_weights=old_logprobs)
    assert_type(loss, Tensor)
    loss, outputs = fused_losses.dft(logits, targets, denominator=9.0, return_outputs=True)
    assert_type(outputs, Outputs)
    loss = fused_losses.dppo_kl(logits, targets, old_logprobs, 1.0, divergence_low=advantages, ratio_cap=3.0)
    either = fused_losses.dppo_tv(logits, targets, old_logprobs, advantages, return_outputs=known_later)
    assert_type(either, Tensor | tuple[Tensor, Outputs])
    loss = fused_losses.ppo(logits, targets, old_logprobs, 1.0, clip_low_threshold=0.8, dual_clip=advantages.abs() + 1)
    loss.backward()
    loss = fused_losses.ppo(
        logits,
        targets,
        -1.0,
        advantages,
        ref_logprobs=old_logprobs,
        kl_coef=0.1,
        kl_type="k1",
        kl_weighted_by_ratio=True,
    )
    assert_type(loss, Tensor)
    loss, outputs = fused_losses.ppo(logits, targets, old_logprobs, advantages, entropy_coef=0.1, return_outputs=True)
    assert_type(outputs.metrics["clip_fraction_low"], Tensor)
    either = fused_losses.ppo(logits, targets, old_logprobs, advantages, return_outputs=known_later)
    assert_type(either, Tensor | tuple[Tensor, Outputs])

    loss = fused_losses.cispo(
        logits, targets, old_logprobs, advantages, log_ratio_clamp=20, denominator=loss.detach() + 9
    )
    loss.backward()
    assert_type(loss, Tensor)
    loss, outputs = fused_losses.cispo(logits, targets, old_logprobs, advantages, return_outputs=True)
    assert_type(outputs, Outputs)
    either = fused_losses.cispo(logits, targets, old_logprobs, advantages, return_outputs=known_later)
    assert_type(either, Tensor | tuple[Tensor, Outputs])

    loss = fused_losses.dro(logits, targets, old_logprobs, advantages, beta=0.5, reduction="mean", recompute=True)
    loss.backward()
    assert_type(loss, Tensor)
    loss, outputs = fused_losses.dro(logits, targets, old_logprobs, advantages, return_outputs=True)
    assert_type(outputs, Outputs)
    either = fused_losses.dro(logits, targets, old_logprobs, advantages, return_outputs=known_later)
    assert_type(either, Tensor | tuple[Tensor, Outputs])


def of_a_sequence(logits: Tensor, targets: Tensor, old_logprobs: Tensor, advantages: Tensor, known_later: bool) -> None:
    loss = fused_losses.sapo(logits, targets, old_logprobs, advantages, tau_negative=2.0, ratio_level="sequence")
    loss.backward()
    assert_type(loss, Tensor)
    loss, outputs = fused_losses.sapo(logits, targets, old_logprobs, advantages, return_outputs=True)
    assert_type(outputs, Outputs)
    either = fused_losses.sapo(logits, targets, old_logprobs, advantages, return_outputs=known_later)
    assert_type(either, Tensor | tuple[Tensor, Outputs])

    loss = fused_losses.gspo(logits, targets, old_logprobs, advantages, ratio_gradient="sequence", reduction="none")
    loss.sum().backward()
    assert_type(loss, Tensor)
    loss, outputs = fused_losses.gspo(logits, targets, old_logprobs, advantages, return_outputs=True)
    assert_type(outputs, Outputs)
    either = fused_losses.gspo(logits, targets, old_logprobs, advantages, return_outputs=known_later)
    assert_type(either, Tensor | tuple[Tensor, Outputs])

    loss = fused_losses.vespo(logits, targets, old_logprobs, advantages, k_positive=1.0, lambda_negative=advantages)
    assert_type(loss, Tensor)
    loss = fused_losses.gmpo(logits, targets, old_logprobs, advantages, sequence_ratio_mask=advantages != 0)
    loss.backward()
    assert_type(loss, Tensor)
    loss, outputs = fused_losses.gmpo(logits, targets, old_logprobs, advantages, return_outputs=True)
    assert_type(outputs, Outputs)
    either = fused_losses.gmpo(logits, targets, old_logprobs, advantages, return_outputs=known_later)
    assert_type(either, Tensor | tuple[Tensor, Outputs])


def of_his_own(logits: Tensor, targets: Tensor, old_logprobs: Tensor, advantages: Tensor, known_later: bool) -> None:
    def objective(logp: Tensor, old: Tensor) -> Tensor:
        return (logp - old) ** 2

    loss = fused_losses.policy_loss(logits, targets, objective, old_logprobs, validate=True)
    loss.backward()
    assert_type(loss, Tensor)
    loss, outputs = fused_losses.policy_loss(logits, targets, "dro", old_logprobs, advantages, 0.2, return_outputs=True)
    assert_type(outputs, Outputs)
    either = fused_losses.policy_loss(logits, targets, objective, old_logprobs, return_outputs=known_later)
    assert_type(either, Tensor | tuple[Tensor, Outputs])


def wrong(logits: Tensor, targets: Tensor, q: Tensor, A: Tensor) -> None:
    LinearHead(logits, chunk_bytes=3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    LinearHead(logits, q, chunk_size=3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    fused_losses.cross_entropy(logits)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    fused_losses.cross_entropy(logits, targets, 0.1)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    fused_losses.cross_entropy(logits, targets, label_smooting=0.1)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    fused_losses.cross_entropy(logits, targets, softcap=q)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    fused_losses.cross_entropy(logits, targets, reduction="avg")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    fused_losses.cross_entropy(logits, targets, backend="gpu")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    fused_losses.cross_entropy(logits, targets, return_outputs=True).backward()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    fused_losses.cross_entropy(logits, targets, upstream="2")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    on_logprobs.ppo(logits, q, A, temperature=0.9)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    fused_losses.reinforce(logits, targets, A, log_ratio_clamp=1.0)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    fused_losses.dft(logits, targets, label_smoothing=0.1)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    fused_losses.logprobs(logits, targets, weights=q)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    fused_losses.logprobs(logits, targets, return_entropy=True).sum()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    fused_losses.statistics(logits, targets, outputs=("argmax",))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    fused_losses.importance_sampling(logits, targets, q)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    fused_losses.importance_sampling(logits, targets, q, None)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    fused_losses.ppo(logits, targets, q, A, kl_type="k4")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    fused_losses.ppo(logits, targets, q, A, clip_low=0.8)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    fused_losses.cispo(logits, targets, q, A, clip_high_threshold="1.2")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    fused_losses.dro(logits, targets, q, A, beta=None)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    fused_losses.sapo(logits, targets, q, A, ratio_level="batch")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    fused_losses.gspo(logits, targets, q, A, ratio_gradient="mean")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    fused_losses.gmpo(logits, targets, q, A, ratio_gradient="token")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    fused_losses.policy_loss(logits, targets, 3, q, A)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    fused_losses.policy_loss(logits, targets, "ppo", q, A, clip_low_threshold=0.8)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
