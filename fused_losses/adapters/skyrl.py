"""SkyRL 0.4: the logprobs and the entropy that its workers make of logits, from one read of them, and policy losses for
its registry.

    from fused_losses.adapters import skyrl

    skyrl.install()  # and skyrl.remove()

The losses are then there under ``trainer.algorithm.policy_loss_type=fused_regular`` and the other names of
:data:`POLICY_LOSSES`.
"""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks, logprobs, on_logprobs, statistics
from ..objectives import binary_kl
from ._names import called, in_words
from .slots import Slot, Slots
from .verl import overwritable

MADE_FOR = "0.4.0"

# ---- Logprobs and entropy of logits ----


class _Read(NamedTuple):
    """What the last call for logprobs has seen of its logits."""

    logits: weakref.ref[Tensor]
    version: int
    entropy: Tensor


_OF_LOGITS = {"target_tokens": "labels"}
_last: list[_Read] = []  # one, or none


@torch.compiler.disable  # type: ignore[untyped-decorator]
@in_words(_OF_LOGITS)
def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """Logprob of each label: ``log_softmax(logits)[label]``, in float32 for any dtype of the logits.

    SkyRL's workers then ask for the entropy of the same logits: it is of this read, and its gradient in the one that
    backward writes.

    Args:
        logits: (..., V) float32, bfloat16 or float16.
        labels: (...) int64 or int32; -100 has logprob 0, entropy 0 and no gradient.
        inplace_backward: backward may write the gradient over the logits, and does where these can be overwritten: not
            a leaf, no element twice in memory. It then runs once.
    """
    return _observed(logits, labels, inplace_backward and overwritable(logits))


@torch.compiler.disable  # type: ignore[untyped-decorator]
@in_words(_OF_LOGITS)
def logprobs_not_in_place(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """The same for ``install(inplace=False)``, whatever the framework allows."""
    return _observed(logits, labels, False)


def _observed(logits: Tensor, labels: Tensor, inplace: bool) -> Tensor:
    logp, entropy = logprobs(logits, labels, return_entropy=True, inplace=inplace)
    _last[:] = [_Read(weakref.ref(logits), logits._version, entropy)]
    return logp


@torch.compiler.disable  # type: ignore[untyped-decorator]
def chunked_entropy_from_logits(
    logits: Tensor, requires_grad: bool = False, attention_mask: Tensor | None = None, chunk_size: int = 1024
) -> Tensor:
    """Entropy of each row of (B, T, V) logits, (B, T) float32.

    Args:
        logits: those of the last :func:`logprobs_from_logits`, if they are still as they were, are not read again.
        requires_grad: whether it has a gradient.
        attention_mask: (B, T); where it is 0 the entropy is 0. None: nowhere.
        chunk_size: bounds what is kept of the rows' softmax; here nothing is.

    Raises:
        ValueError: attention_mask has another shape.
    """
    if attention_mask is not None and attention_mask.shape != logits.shape[:-1]:
        raise ValueError(
            f"attention_mask must have the shape of the tokens, {tuple(logits.shape[:-1])}, got "
            f"{tuple(attention_mask.shape)}"
        )
    read = _last.pop() if _last else None
    if read is not None and read.logits() is logits and read.version == logits._version:
        entropy = read.entropy
    else:
        with torch.set_grad_enabled(requires_grad and torch.is_grad_enabled()):
            no_target = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
            observed = statistics(logits, no_target, outputs=("entropy",)).entropy
        assert observed is not None
        entropy = observed
    if not requires_grad:
        entropy = entropy.detach()
    return entropy if attention_mask is None else entropy.masked_fill(attention_mask == 0, 0.0)


# ---- Policy losses ----

PolicyLoss = Callable[..., tuple[Tensor, dict[str, float]]]

_CLAMP = 20.0  # of log ratios, where SkyRL has one
_LARGEST_SEQUENCE_RATIO = 22026.4657948  # e^10
_OF_POLICY = {
    "logprobs": "log_probs",
    "old_logprobs": "old_log_probs",
    "weights": "loss_mask",
    "importance_weights": "rollout_logprobs",
    "clip_low_threshold": "1 - eps_clip_low",
    "clip_high_threshold": "1 + eps_clip_high",
    "dual_clip": "clip_ratio_c",
    "tau_positive": "sapo.tau_pos",
    "tau_negative": "sapo.tau_neg",
}
_OF_CISPO = {
    "clip_low_threshold": "1 - cispo.cispo_eps_clip_low",
    "clip_high_threshold": "1 + cispo.cispo_eps_clip_high",
}
_OF_ROLLOUT = {"old_logprobs": "rollout_logprobs"}


@in_words(_OF_POLICY)
def regular(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    config: Any,
    loss_mask: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """:func:`fused_losses.ppo`, as SkyRL's "regular".

    The arguments of all losses here, and what they return:

    Args:
        log_probs, old_log_probs, advantages: (B, T), as in :mod:`fused_losses.on_logprobs`.
        config: SkyRL's AlgorithmConfig.
        loss_mask: (B, T), each token's factor, or None: 1. Where it is 0 loss and gradient are 0, whatever the token
            holds.
        rollout_logprobs: (B, T), the sampler's, for ``config.off_policy_correction``; or None: no correction.

    Returns:
        The sum over tokens, as SkyRL has its reduction in the advantages, and SkyRL's metrics.
    """
    return _clipped(_Given(log_probs, old_log_probs, advantages, config, loss_mask, rollout_logprobs), None)


@in_words(_OF_POLICY)
def dual_clip(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    config: Any,
    loss_mask: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """:func:`fused_losses.ppo` with dual clip ``clip_ratio_c``, as SkyRL's "dual_clip"; arguments as in
    :func:`regular`.
    """
    given = _Given(log_probs, old_log_probs, advantages, config, loss_mask, rollout_logprobs)
    return _clipped(given, config.clip_ratio_c)


def _clipped(given: _Given, bound: float | None) -> tuple[Tensor, dict[str, float]]:
    low, high = given.bounds()
    corrected = given.corrected()
    loss = on_logprobs.ppo(
        given.log_probs,
        given.old_log_probs,
        given.advantages,
        clip_low_threshold=low,
        clip_high_threshold=high,
        dual_clip=bound,
        log_ratio_clamp=_CLAMP,
        **corrected.keywords,
    )
    ratio = given.ratio(given.old_log_probs)
    return loss, {"clip_ratio": given.mean(given.beyond(ratio)), **corrected.metrics}


@in_words(_OF_POLICY)
def gspo(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    config: Any,
    loss_mask: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """:func:`fused_losses.gspo` in its token form, as SkyRL's "gspo"; arguments as in :func:`regular`. A token's factor
    counts in the mean of its sequence's log ratio, too.
    """
    given = _Given(log_probs, old_log_probs, advantages, config, loss_mask, rollout_logprobs)
    low, high = given.bounds()
    corrected = given.corrected()
    log_ratio = given.sequence_log_ratio()
    # The mean over a sequence of differences that are this number is it, whatever the tokens' factors.
    old_logprobs = log_probs.detach().masked_fill(log_probs == -torch.inf, 0.0) - log_ratio
    loss = on_logprobs.gspo(
        log_probs,
        old_logprobs,
        advantages,
        clip_low_threshold=low,
        clip_high_threshold=high,
        dual_clip=_LARGEST_SEQUENCE_RATIO,  # SkyRL bounds the log ratio from above, which only shows where A < 0
        **corrected.keywords,
    )
    ratio = log_ratio.clamp(max=10.0).exp()
    return loss, {"clip_ratio": given.mean(given.beyond(ratio)), **corrected.metrics}


@in_words(_OF_POLICY)
def sapo(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    config: Any,
    loss_mask: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """:func:`fused_losses.sapo`, as SkyRL's "sapo"; arguments as in :func:`regular`."""
    given = _Given(log_probs, old_log_probs, advantages, config, loss_mask, rollout_logprobs)
    corrected = given.corrected()
    loss = on_logprobs.sapo(
        log_probs,
        old_log_probs,
        advantages,
        tau_positive=config.sapo.tau_pos,
        tau_negative=config.sapo.tau_neg,
        log_ratio_clamp=_CLAMP,
        **corrected.keywords,
    )
    return loss, {"clip_ratio": 0.0, **corrected.metrics}


@in_words(_OF_POLICY | _OF_CISPO)
def cispo(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    config: Any,
    loss_mask: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """:func:`fused_losses.cispo` against the policy that ``cispo_anchor`` says, as SkyRL's "cispo"; arguments as in
    :func:`regular`.
    """
    given = _Given(log_probs, old_log_probs, advantages, config, loss_mask, rollout_logprobs)
    anchor = old_log_probs
    if config.cispo.cispo_anchor == "rollout":
        tis = config.off_policy_correction.tis_ratio_type
        if tis is not None:
            raise ValueError(
                f"off_policy_correction.tis_ratio_type must be None with cispo_anchor='rollout', whose ratio is that "
                f"correction, got {tis!r}"
            )
        anchor = given.rollout("cispo with cispo_anchor='rollout'")
    low, high = max(1 - config.cispo.cispo_eps_clip_low, 0.0), 1 + config.cispo.cispo_eps_clip_high
    corrected = given.corrected()
    with given.names(anchor):
        loss = on_logprobs.cispo(
            log_probs,
            anchor,
            advantages,
            clip_low_threshold=low,
            clip_high_threshold=high,
            log_ratio_clamp=_CLAMP,
            **corrected.keywords,
        )
    ratio = given.ratio(anchor)
    active = given.active
    seen = active if active.any() else torch.ones_like(active)  # of no token, SkyRL gives the extremes of all
    metrics = {
        "clip_ratio": given.mean((ratio < low) | (ratio > high)),
        "cispo/ratio_mean": given.mean(ratio),
        "cispo/ratio_clamped_mean": given.mean(ratio.clamp(low, high)),
        "cispo/ratio_max": ratio[seen].amax().item(),
        "cispo/ratio_min": ratio[seen].amin().item(),
    }
    return loss, metrics | corrected.metrics


@in_words(_OF_POLICY | _OF_ROLLOUT)
def rollout_is(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    config: Any,
    loss_mask: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """``-sg(r) x A`` with r the ratio to the sampler, and no loss where it is not within the bounds, as SkyRL's
    "rollout_is": :func:`fused_losses.cispo` of the tokens within; arguments as in :func:`regular`.
    """
    given = _Given(log_probs, old_log_probs, advantages, config, loss_mask, rollout_logprobs)
    anchor = given.rollout("rollout_is")
    low, high = given.bounds()
    ratio = given.ratio(anchor)
    within = (ratio > 1 - config.eps_clip_low) & (ratio < high)
    corrected = given.corrected(within)
    loss = on_logprobs.cispo(
        log_probs,
        anchor,
        advantages,
        clip_low_threshold=low,
        clip_high_threshold=high,
        log_ratio_clamp=_CLAMP,
        **corrected.keywords,
    )
    return loss, {"clip_ratio": given.mean(~within), **corrected.metrics}


@in_words(_OF_POLICY)
def dppo(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    config: Any,
    loss_mask: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """``-r A``, with no loss at tokens whose probability has moved too far the way that A pushes it, as SkyRL's "dppo":
    :func:`fused_losses.importance_sampling` of the others; arguments as in :func:`regular`.
    """
    given = _Given(log_probs, old_log_probs, advantages, config, loss_mask, rollout_logprobs)
    anchor = old_log_probs if rollout_logprobs is None else rollout_logprobs
    trusted = _trusted(log_probs.detach(), anchor, advantages, config.dppo)
    corrected = given.corrected(trusted)
    with given.names(anchor):
        loss = on_logprobs.importance_sampling(
            log_probs, anchor, advantages, log_ratio_clamp=_CLAMP, **corrected.keywords
        )
    return loss, {"clip_ratio": given.mean(~trusted), **corrected.metrics}


def _trusted(logp: Tensor, anchor: Tensor, advantages: Tensor, config: Any) -> Tensor:
    """Whether the binary divergence, of the token against all others, is within the bound of A's sign."""
    moved = logp.exp() - anchor.exp()
    if config.dppo_type == "binary_tv":
        divergence = moved.abs()
    elif config.dppo_type == "binary_kl":
        divergence = binary_kl(anchor, logp)
    else:
        raise ValueError(f"config.dppo.dppo_type must be 'binary_tv' or 'binary_kl', got {config.dppo_type!r}")
    too_likely: Tensor = (advantages > 0) & (moved > 0) & (divergence > config.delta_high)
    too_unlikely: Tensor = (advantages < 0) & (moved < 0) & (divergence > config.delta_low)
    return ~(too_likely | too_unlikely)


@in_words(_OF_POLICY)
def cross_entropy(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    config: Any,
    loss_mask: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """:func:`fused_losses.cross_entropy`, summed, as SkyRL's "cross_entropy"; of log_probs and loss_mask alone."""
    loss = on_logprobs.cross_entropy(log_probs, weights=loss_mask, reduction="sum")
    return loss, {"clip_ratio": 0.0}


@in_words(_OF_POLICY)
def importance_sampling(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    config: Any,
    loss_mask: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """:func:`fused_losses.importance_sampling`, as SkyRL's "importance_sampling", which has no correction and no clamp;
    arguments as in :func:`regular`.
    """
    given = _Given(log_probs, old_log_probs, advantages, config, loss_mask, rollout_logprobs)
    loss = on_logprobs.importance_sampling(log_probs, old_log_probs, advantages, weights=loss_mask, reduction="sum")
    ratio = (log_probs.detach() - old_log_probs).exp()
    total = given.factor.sum()  # SkyRL's metric is NaN where no token counts
    return loss, {"importance_ratio": ((ratio * given.factor).where(given.active, 0.0).sum() / total).item()}


class _Corrected(NamedTuple):
    keywords: dict[str, Any]  # of a loss here
    metrics: dict[str, float]


class _Given(NamedTuple):
    """What SkyRL hands to a policy loss."""

    log_probs: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    config: Any
    loss_mask: Tensor | None
    rollout_logprobs: Tensor | None

    @property
    def factor(self) -> Tensor:
        return torch.ones_like(self.log_probs) if self.loss_mask is None else self.loss_mask

    @property
    def active(self) -> Tensor:
        return self.factor != 0

    def bounds(self) -> tuple[float, float]:
        """On the ratio. ``eps_clip_low`` may be above 1: that is no bound."""
        return max(1 - self.config.eps_clip_low, 0.0), 1 + self.config.eps_clip_high

    def rollout(self, what: str) -> Tensor:
        if self.rollout_logprobs is None:
            raise ValueError(f"{what} needs rollout_logprobs, got None")
        return self.rollout_logprobs

    def names(self, anchor: Tensor) -> AbstractContextManager[None]:
        """What the anchor is called, which may be either's logprobs."""
        return called(_OF_ROLLOUT) if anchor is self.rollout_logprobs else nullcontext()

    def ratio(self, anchor: Tensor) -> Tensor:
        return (self.log_probs.detach() - anchor).float().clamp(-_CLAMP, _CLAMP).exp()

    def beyond(self, ratio: Tensor) -> Tensor:
        low, high = self.bounds()
        return ((self.advantages > 0) & (ratio > high)) | ((self.advantages < 0) & (ratio < low))

    def sequence_log_ratio(self) -> Tensor:
        """(B, 1): the mean of the tokens' by their factors, of which SkyRL takes at least 1 in all."""
        log_probs = self.log_probs.detach()
        given = {"old_logprobs": self.old_log_probs, "weights": self.loss_mask}
        checks.columns(given, log_probs.unsqueeze(-1), "logprobs")  # what the loss would say of them comes too late
        log_probs = log_probs.to(torch.promote_types(log_probs.dtype, torch.float32))
        log_ratio = (log_probs - self.old_log_probs).where(self.active, 0.0)
        return (log_ratio * self.factor).sum(-1, keepdim=True) / self.factor.sum(-1, keepdim=True).clamp(min=1)

    def mean(self, values: Tensor) -> float:
        """SkyRL's masked mean; tokens that do not count may hold anything."""
        factor = self.factor
        total = (values.float() * factor).where(self.active, 0.0).sum()
        return (total / factor.sum().clamp(min=1.0)).item()

    def corrected(self, keep: Tensor | None = None) -> _Corrected:
        """The sum's weights, after SkyRL's own off-policy correction; keep: where there is an objective at all."""
        mask, ratio, metrics = self.loss_mask, None, {}
        if self.rollout_logprobs is not None:
            correction = importlib.import_module(_CORRECTION).compute_off_policy_correction
            ratio, metrics, mask = correction(
                self.old_log_probs, self.rollout_logprobs, mask, self.config.off_policy_correction
            )
        if keep is not None:
            ratio = keep.float() if ratio is None else ratio * keep
        return _Corrected({"importance_weights": ratio, "weights": mask, "reduction": "sum"}, metrics)


_CORRECTION = "skyrl.backends.skyrl_train.utils.off_policy_correction_utils"

POLICY_LOSSES: dict[str, PolicyLoss] = {  # by SkyRL's policy_loss_type
    "regular": regular,
    "dual_clip": dual_clip,
    "gspo": gspo,
    "sapo": sapo,
    "cispo": cispo,
    "rollout_is": rollout_is,
    "dppo": dppo,
    "importance_sampling": importance_sampling,
    "cross_entropy": cross_entropy,
}

# ---- In place of SkyRL's, and back ----

_FUNCTIONS, _LOSSES = "skyrl.backends.skyrl_train.utils.torch_utils", "skyrl.backends.skyrl_train.utils.ppo_utils"

LOGPROBS = Slot(_FUNCTIONS, "logprobs_from_logits", ("logits", "labels", "inplace_backward"))
ENTROPY = Slot(
    _FUNCTIONS,
    "chunked_entropy_from_logits",
    ("logits", "requires_grad", "attention_mask", "chunk_size"),
)
# By these its trainers refuse a loss, or leave out a forward, according to its name.
READ_OLD_LOGPROBS = Slot(_LOSSES, "LOSSES_WITH_OLD_LOGPROBS")
READ_NO_OLD_LOGPROBS = Slot(_LOSSES, "LOSSES_WITHOUT_OLD_LOGPROBS")
_REGISTRY = Slot(_LOSSES, "PolicyLossRegistry")


class Name(str, Enum):
    """Beside SkyRL's own, an Enum as theirs. None for cross_entropy, by whose name workers know what is supervised."""

    REGULAR = "fused_regular"
    DUAL_CLIP = "fused_dual_clip"
    GSPO = "fused_gspo"
    SAPO = "fused_sapo"
    CISPO = "fused_cispo"
    ROLLOUT_IS = "fused_rollout_is"
    DPPO = "fused_dppo"
    IMPORTANCE_SAMPLING = "fused_importance_sampling"


class _Installed(NamedTuple):
    options: tuple[bool, ...]
    slots: Slots
    losses_before: dict[str, PolicyLoss | None]  # by the registry's name


_installed: list[_Installed] = []  # one, or none


def install(*, inplace: bool = True, replace_losses: bool = False) -> None:
    """Put the functions of this module where SkyRL has its own, and the losses into its registry, all or nothing: in
    this process. A second call with the same options changes nothing.

    SkyRL hands losses under new names to its workers by itself, but neither these functions nor losses under its own
    names: a worker has to call this, too.

    Args:
        inplace: write the gradient over the logits where SkyRL allows it. False: never.
        replace_losses: put the losses under SkyRL's own names too, not only under ``fused_<policy_loss_type>``.

    Raises:
        ImportError: SkyRL is not installed.
        RuntimeError: a slot is not where it was, or takes other arguments; the message names it and the version. Or
            the options are not those of the call before: ``remove()`` first.
    """
    options = inplace, replace_losses
    if _installed:
        if _installed[0].options != options:
            raise RuntimeError("SkyRL's functions are replaced with other options already: call remove() first")
        return
    looked_up = Slots("skyrl", MADE_FOR, {})
    registry = looked_up.found(_REGISTRY)
    anchored = {Name.ROLLOUT_IS, Name.DPPO}
    slots = Slots(
        "skyrl",
        MADE_FOR,
        {
            LOGPROBS: logprobs_from_logits if inplace else logprobs_not_in_place,
            ENTROPY: chunked_entropy_from_logits,
            READ_OLD_LOGPROBS: looked_up.found(READ_OLD_LOGPROBS) | (set(Name) - anchored),
            READ_NO_OLD_LOGPROBS: looked_up.found(READ_NO_OLD_LOGPROBS) | anchored,
        },
    )
    slots.install()
    names = {name.value: POLICY_LOSSES[name.value.removeprefix("fused_")] for name in Name}
    if replace_losses:
        names |= POLICY_LOSSES
    available = registry.list_available()
    before = {name: registry.get(name) if name in available else None for name in names}
    _installed.append(_Installed(options, slots, before))
    _register(registry, names)


def remove() -> None:
    """Put back what was there before. Without an installation it changes nothing.

    Raises:
        RuntimeError: somebody else has replaced a function since; the message names it. Nothing is put back.
    """
    if not _installed:
        return
    before = _installed[0]
    before.slots.remove()
    _register(before.slots.found(_REGISTRY), before.losses_before)
    _installed.clear()


def _register(registry: Any, losses: Mapping[str, PolicyLoss | None]) -> None:
    """None: no loss of that name."""
    for name, loss in losses.items():
        if name in registry.list_available():
            registry.unregister(name)
        if loss is not None:
            registry.register(name, loss)
