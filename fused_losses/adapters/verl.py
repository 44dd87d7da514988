"""verl 0.9: the logprobs and the entropy that its engines make of logits, its fused head, the pair of its Megatron
engine over a sharded vocabulary, and policy losses for its registry.

    from fused_losses.adapters import verl

    verl.install()  # and verl.remove()

or, with no line of code, ``VERL_USE_EXTERNAL_MODULES=fused_losses.adapters.plugins.verl``. The losses are then there
under ``actor.policy_loss.loss_mode=fused_vanilla`` and the other names of :data:`POLICY_LOSSES`.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import LinearHead, VocabShard, aggregation, checks, logprobs, on_logprobs, statistics
from ..objectives import binary_kl
from ._names import in_words
from .slots import Slot, Slots, installed

MADE_FOR = "0.9.1"

# ---- Logprobs and entropy of logits ----

_OF_LOGITS = {"target_tokens": "labels"}


@in_words(_OF_LOGITS)
def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """Logprob of each label: ``log_softmax(logits)[label]``, in float32 for any dtype of the logits.

    Args:
        logits: (..., V) float32, bfloat16 or float16.
        labels: (...) int64 or int32; -100 has logprob 0 and no gradient.
        inplace_backward: backward may write the gradient over the logits, and does where these can be overwritten: not
            a leaf, no element twice in memory, not under torch.compile. It then runs once.
    """
    return logprobs(logits, labels, inplace=inplace_backward and overwritable(logits))


def logprobs_not_in_place(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """The same for ``install(inplace=False)``, whatever the framework allows."""
    return logprobs_from_logits(logits, labels, inplace_backward=False)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropy of each row of (..., V) logits, (...) float32, differentiable."""
    return _entropy(logits, logits.shape[:-1])


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """The same. ``chunk_size`` bounds what is kept of the rows' softmax; here nothing is."""
    return entropy_from_logits(logits)


@in_words({"hidden": "hidden_states", "weight": "vocab_weights", "target_tokens": "input_ids"})
def fused_linear_for_ppo(
    self: Any, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Logprobs of ``input_ids`` and entropy, both (...) float32, of logits ``hidden_states @ vocab_weights.T`` that are
    made a chunk of tokens at a time, once in forward and once in backward.

    Args:
        self: the ``FusedLinearForPPO``, of either backend.
        hidden_states: (..., H).
        vocab_weights: (V, H).
        input_ids: (...).
        temperature: the logits are divided by it, in float32.

    Raises:
        ValueError: the module's chunk_size is not its default: here the memory of a chunk decides.
    """
    if self.chunk_size != _CHUNK_SIZE:
        raise ValueError(
            f"FusedLinearForPPO: chunk_size must be the default {_CHUNK_SIZE}, as LinearHead chooses how many tokens a "
            f"chunk has, got {self.chunk_size}"
        )
    head = LinearHead(hidden_states, vocab_weights)
    return logprobs(head, input_ids, return_entropy=True, temperature=temperature)


_CHUNK_SIZE = 512


# ---- The vocabulary over the ranks of tensor parallelism ----

_OF_SHARD = {"local_logits": "logits", "target_tokens": "labels"}
_OF_SHARD_ALONE = {"local_logits": "vocab_parallel_logits", "logits": "vocab_parallel_logits"}


@in_words(_OF_SHARD)
def vocab_parallel_log_probs_from_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Logprob of each label, (...) float32, where each rank of Megatron's tensor-parallel group has (..., V / ranks) of
    the logits. The logits stay as they are.
    """
    return logprobs(_vocab_shard(logits), labels)


@in_words(_OF_SHARD_ALONE)
def vocab_parallel_entropy(vocab_parallel_logits: Tensor) -> Tensor:
    """Entropy of each row of logits that are sharded in the same way, (...) float32, differentiable."""
    return _entropy(_vocab_shard(vocab_parallel_logits), vocab_parallel_logits.shape[:-1])


def vocab_parallel_entropy_with_chunking(vocab_parallel_logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """The same. ``chunk_size`` bounds what is kept of the rows' softmax; here nothing is."""
    return vocab_parallel_entropy(vocab_parallel_logits)


def _vocab_shard(local_logits: Tensor) -> VocabShard:
    """Megatron pads the vocabulary so that all parts are of one width, and lets the padding take part."""
    group = importlib.import_module("megatron.core.parallel_state").get_tensor_model_parallel_group()
    width = local_logits.shape[-1]
    return VocabShard(local_logits, group, dist.get_rank(group) * width, dist.get_world_size(group) * width)


def _entropy(logits: Tensor | VocabShard, shape: torch.Size) -> Tensor:
    no_target = torch.zeros(shape, dtype=torch.int64, device=logits.device)  # any class: its logprob is not asked for
    entropy = statistics(logits, no_target, outputs=("entropy",)).entropy
    assert entropy is not None
    return entropy


def overwritable(logits: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    try:
        checks.overwritable(logits)
    except ValueError:
        return False
    return True


# ---- Policy losses ----

PolicyLoss = Callable[..., tuple[Tensor, dict[str, Any]]]

_CLAMP = 20.0  # of log ratios, where verl has one
_LARGEST_SEQUENCE_RATIO = math.exp(10.0)
_LOW, _HIGH = "clip_ratio_low (or clip_ratio)", "clip_ratio_high (or clip_ratio)"
_OF_POLICY = dict(
    logprobs="log_prob",
    old_logprobs="old_log_prob",
    importance_weights="rollout_is_weights",
    **dict.fromkeys(("weights", "mask", "sequence_ratio_mask"), "response_mask"),
    clip_low_threshold=f"1 - {_LOW}",
    clip_high_threshold=f"1 + {_HIGH}",
    **dict.fromkeys(("dual_clip", "ratio_cap"), "clip_ratio_c"),
    divergence_low=_LOW,
    divergence_high=_HIGH,
    tau_positive="tau_pos",
    tau_negative="tau_neg",
    beta="policy_loss.dro_beta",
)
_OF_GEO_MEAN = {"clip_low_threshold": f"exp(-{_LOW})", "clip_high_threshold": f"exp({_HIGH})"}


@in_words(_OF_POLICY)
def vanilla(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """:func:`fused_losses.ppo` with dual clip ``clip_ratio_c``, as verl's "vanilla".

    The arguments of all losses here, and what they return:

    Args:
        old_log_prob, log_prob, advantages: (B, T), as in :mod:`fused_losses.on_logprobs`.
        response_mask: (B, T), not 0 at tokens that count. The others have loss and gradient 0, whatever they hold.
        loss_agg_mode: as in :func:`fused_losses.aggregation.verl`, with ``config.global_batch_info``.
        config: verl's ActorConfig.
        rollout_is_weights: (B, T), a constant factor of each token's loss, or None.

    Returns:
        The loss and verl's metrics: numbers, read from the device at once.
    """
    given = _given(old_log_prob, log_prob, advantages, response_mask, config, rollout_is_weights)
    low, high = given.bounds()
    dual_clip = config.get("clip_ratio_c", 3.0)
    loss = on_logprobs.ppo(
        log_prob,
        old_log_prob,
        advantages,
        clip_low_threshold=low,
        clip_high_threshold=high,
        dual_clip=dual_clip,
        log_ratio_clamp=_CLAMP,
        importance_weights=rollout_is_weights,
        **given.reduction(loss_agg_mode),
    )
    log_ratio = given.log_ratio().clamp(-_CLAMP, _CLAMP)
    ratio = log_ratio.exp()
    beyond_dual_clip = (advantages < 0) & (ratio > dual_clip)
    return loss, given.metrics(given.clipped(ratio), log_ratio, beyond_dual_clip)


@in_words(_OF_POLICY)
def gspo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """:func:`fused_losses.gspo` in its token form, as verl's "gspo"; arguments as in :func:`vanilla`."""
    given = _given(old_log_prob, log_prob, advantages, response_mask, config, rollout_is_weights)
    low, high = given.bounds()
    loss = on_logprobs.gspo(
        log_prob,
        old_log_prob,
        advantages,
        sequence_ratio_mask=response_mask,
        clip_low_threshold=low,
        clip_high_threshold=high,
        dual_clip=_LARGEST_SEQUENCE_RATIO,  # verl bounds the log ratio from above, which only shows where A < 0
        importance_weights=rollout_is_weights,
        **given.reduction(loss_agg_mode),
    )
    log_ratio = given.log_ratio()
    tokens = given.active.sum(-1, keepdim=True).clamp(min=1)
    ratio = (log_ratio.sum(-1, keepdim=True) / tokens).clamp(max=10.0).exp()
    return loss, given.metrics(given.clipped(ratio), log_ratio)


@in_words(_OF_POLICY)
def sapo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """:func:`fused_losses.sapo` with ``tau_pos`` and ``tau_neg``, as verl's "sapo"; arguments as in :func:`vanilla`.

    As there, the reduction is "seq-mean-token-mean" whatever ``loss_agg_mode`` is, which verl's entropy and KL follow.
    """
    given = _given(old_log_prob, log_prob, advantages, response_mask, config, rollout_is_weights)
    loss = on_logprobs.sapo(
        log_prob,
        old_log_prob,
        advantages,
        tau_positive=config.tau_pos,
        tau_negative=config.tau_neg,
        log_ratio_clamp=_CLAMP,
        importance_weights=rollout_is_weights,
        **given.reduction("seq-mean-token-mean"),
    )
    return loss, given.metrics(None, given.log_ratio().clamp(-_CLAMP, _CLAMP))


@in_words(_OF_POLICY)
def cispo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """:func:`fused_losses.cispo`, as verl's "cispo"; arguments as in :func:`vanilla`."""
    given = _given(old_log_prob, log_prob, advantages, response_mask, config, rollout_is_weights)
    low, high = given.bounds()
    loss = on_logprobs.cispo(
        log_prob,
        old_log_prob,
        advantages,
        clip_low_threshold=low,
        clip_high_threshold=high,
        log_ratio_clamp=_CLAMP,
        importance_weights=rollout_is_weights,
        **given.reduction(loss_agg_mode),
    )
    log_ratio = given.log_ratio().clamp(-_CLAMP, _CLAMP)
    ratio = log_ratio.exp()
    return loss, given.metrics((ratio < low) | (ratio > high), log_ratio)


@in_words(_OF_POLICY)
def dro(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """:func:`fused_losses.dro` with ``policy_loss.dro_beta``, as verl's "dro"; arguments as in :func:`vanilla`."""
    given = _given(old_log_prob, log_prob, advantages, response_mask, config, rollout_is_weights)
    beta = config.policy_loss.dro_beta
    if beta is None or beta <= 0:
        raise ValueError(f"config.policy_loss.dro_beta must be a number greater than 0, got {beta}")
    loss = on_logprobs.dro(
        log_prob,
        old_log_prob,
        advantages,
        beta=beta,
        importance_weights=rollout_is_weights,
        **given.reduction(loss_agg_mode),
    )
    return loss, given.kl_metric()


@in_words(_OF_POLICY | _OF_GEO_MEAN)
def geo_mean(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """:func:`fused_losses.gmpo` with bounds on the log ratio, as verl's "geo_mean"; arguments as in :func:`vanilla`.

    As there, the reduction is the mean over all sequences whatever ``loss_agg_mode`` is, and a sequence is multiplied
    by the geometric mean of its ``rollout_is_weights``. Its tokens' advantages are one number: their mean is taken.
    """
    given = _given(old_log_prob, log_prob, advantages, response_mask, config, rollout_is_weights)
    low, high = given.clip_ratios()
    of_sequences = aggregation.trl(given.active, "grpo")  # that mean, by TRL's name
    geometric_mean = None
    if rollout_is_weights is not None:
        geometric_mean = given.sequence_mean((rollout_is_weights + 1e-10).log()).exp()
    loss = on_logprobs.gmpo(
        log_prob,
        old_log_prob,
        given.sequence_mean(advantages),
        clip_low_threshold=math.exp(-low),
        clip_high_threshold=math.exp(high),
        importance_weights=geometric_mean,
        **of_sequences._asdict(),
    )
    log_ratio = given.log_ratio()
    outside = (log_ratio < -low) | (log_ratio > high)
    return loss, given.metrics(outside & (advantages > 0), log_ratio, outside & (advantages < 0))


@in_words(_OF_POLICY)
def gpg(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """:func:`fused_losses.reinforce`, as verl's "gpg", which has no metrics; arguments as in :func:`vanilla`."""
    given = _given(old_log_prob, log_prob, advantages, response_mask, config, rollout_is_weights)
    loss = on_logprobs.reinforce(
        log_prob, advantages, importance_weights=rollout_is_weights, **given.reduction(loss_agg_mode)
    )
    return loss, {}


@in_words(_OF_POLICY)
def dppo_tv(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """:func:`fused_losses.dppo_tv`, as verl's "dppo_tv": the clip ratios bound the divergence, ``clip_ratio_c`` the
    ratio; arguments as in :func:`vanilla`.
    """
    given = _given(old_log_prob, log_prob, advantages, response_mask, config, rollout_is_weights)
    divergence = (log_prob.detach().exp() - old_log_prob.exp()).abs()
    return _dppo(on_logprobs.dppo_tv, given, divergence, loss_agg_mode)


@in_words(_OF_POLICY)
def dppo_kl(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """:func:`fused_losses.dppo_kl`, as verl's "dppo_kl"; configured as :func:`dppo_tv`."""
    given = _given(old_log_prob, log_prob, advantages, response_mask, config, rollout_is_weights)
    return _dppo(on_logprobs.dppo_kl, given, binary_kl(old_log_prob, log_prob.detach()), loss_agg_mode)


def _dppo(
    function: Callable[..., Tensor], given: _Given, divergence: Tensor, loss_agg_mode: str
) -> tuple[Tensor, dict[str, Any]]:
    low, high = given.clip_ratios()
    ratio_cap = given.config.get("clip_ratio_c", 20.0)
    loss = function(
        given.log_prob,
        given.old_log_prob,
        given.advantages,
        divergence_low=low,
        divergence_high=high,
        ratio_cap=ratio_cap,
        log_ratio_clamp=_CLAMP,
        importance_weights=given.rollout_is_weights,
        **given.reduction(loss_agg_mode),
    )
    log_ratio = given.log_ratio().clamp(-_CLAMP, _CLAMP)
    too_likely = (given.advantages > 0) & (log_ratio > 0) & (divergence > high)
    too_unlikely = (given.advantages <= 0) & (log_ratio < 0) & (divergence > low)  # verl counts tokens of A = 0 here
    dropped = too_likely | too_unlikely
    return loss, given.metrics(dropped, log_ratio, (log_ratio.exp() > ratio_cap) & ~dropped)


@in_words(_OF_POLICY)
def importance_sampling(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """:func:`fused_losses.importance_sampling`, which verl has no loss_mode for; arguments as in :func:`vanilla`."""
    given = _given(old_log_prob, log_prob, advantages, response_mask, config, rollout_is_weights)
    loss = on_logprobs.importance_sampling(
        log_prob,
        old_log_prob,
        advantages,
        log_ratio_clamp=_CLAMP,
        importance_weights=rollout_is_weights,
        **given.reduction(loss_agg_mode),
    )
    return loss, given.kl_metric()


class _Given(NamedTuple):
    """What verl hands to a policy loss."""

    old_log_prob: Tensor
    log_prob: Tensor
    advantages: Tensor
    response_mask: Tensor
    config: Any
    rollout_is_weights: Tensor | None

    @property
    def active(self) -> Tensor:
        return self.response_mask != 0

    def reduction(self, loss_agg_mode: str) -> dict[str, Any]:
        return aggregation.verl(self.active, loss_agg_mode, **self.config.global_batch_info)._asdict()

    def clip_ratios(self) -> tuple[float, float]:
        config = self.config
        low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
        high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
        return low, high

    def bounds(self) -> tuple[float, float]:
        """On the ratio. The low clip ratio may be above 1: that is no bound."""
        low, high = self.clip_ratios()
        return max(1 - low, 0.0), 1 + high

    def log_ratio(self) -> Tensor:
        """0 at tokens that do not count."""
        return (self.log_prob.detach() - self.old_log_prob).where(self.active, 0.0)

    def clipped(self, ratio: Tensor) -> Tensor:
        low, high = self.bounds()
        return ((self.advantages > 0) & (ratio > high)) | ((self.advantages < 0) & (ratio < low))

    def sequence_mean(self, values: Tensor) -> Tensor:
        """(B, 1), 0 of a sequence with no token that counts."""
        tokens = self.active.sum(-1, keepdim=True).clamp(min=1)
        return values.where(self.active, 0.0).sum(-1, keepdim=True) / tokens

    def metrics(self, clipped: Tensor | None, log_ratio: Tensor, lower: Tensor | None = None) -> dict[str, Any]:
        nothing = torch.zeros_like(log_ratio)
        return self._means(
            {
                "actor/pg_clipfrac": nothing if clipped is None else clipped,
                "actor/ppo_kl": -log_ratio,
                "actor/pg_clipfrac_lower": nothing if lower is None else lower,
            }
        )

    def kl_metric(self) -> dict[str, Any]:
        return self._means({"actor/ppo_kl": -self.log_ratio()})

    def _means(self, values: dict[str, Tensor]) -> dict[str, Any]:
        """Over the tokens that count, 0 where none does; one wait for the device."""
        stacked = torch.stack([value.float().expand(self.active.shape) for value in values.values()])
        tokens = self.active.sum().clamp(min=1)
        means = stacked.masked_fill(~self.active, 0.0).flatten(1).sum(1) / tokens
        return dict(zip(values, means.tolist(), strict=True))


def _given(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    config: Any,
    rollout_is_weights: Tensor | None,
) -> _Given:
    if config is None:
        raise ValueError("config must be verl's ActorConfig, got None")
    return _Given(old_log_prob, log_prob, advantages, response_mask, config, rollout_is_weights)


POLICY_LOSSES: dict[str, PolicyLoss] = {  # by verl's loss_mode
    "vanilla": vanilla,
    "gspo": gspo,
    "sapo": sapo,
    "cispo": cispo,
    "dro": dro,
    "geo_mean": geo_mean,
    "gpg": gpg,
    "dppo_tv": dppo_tv,
    "dppo_kl": dppo_kl,
    "importance_sampling": importance_sampling,
}


# ---- In place of verl's, and back ----

_FUNCTIONS, _SHARDED = "verl.utils.torch_functional", "verl.utils.megatron.tensor_parallel"

LOGPROBS = Slot(_FUNCTIONS, "logprobs_from_logits", ("logits", "labels", "inplace_backward"))
ENTROPY = Slot(_FUNCTIONS, "entropy_from_logits", ("logits",))
CHUNKED_ENTROPY = Slot(_FUNCTIONS, "entropy_from_logits_with_chunking", ("logits", "chunk_size"))
FUSED_HEAD = Slot(
    "verl.utils.experimental.torch_functional",
    "FusedLinearForPPO.forward",
    ("self", "hidden_states", "vocab_weights", "input_ids", "temperature"),
)
SHARDED_LOGPROBS = Slot(_SHARDED, "vocab_parallel_log_probs_from_logits", ("logits", "labels"))
SHARDED_ENTROPY = Slot(_SHARDED, "vocab_parallel_entropy", ("vocab_parallel_logits",))
CHUNKED_SHARDED_ENTROPY = Slot(
    _SHARDED, "vocab_parallel_entropy_with_chunking", ("vocab_parallel_logits", "chunk_size")
)


class _Installed(NamedTuple):
    options: tuple[bool, ...]
    slots: Slots
    losses_before: dict[str, PolicyLoss | None]  # by the registry's name


_installed: list[_Installed] = []  # one, or none


def install(*, inplace: bool = True, replace_losses: bool = False, megatron: bool | None = None) -> None:
    """Put the functions of this module where verl has its own, and the losses into its registry, all or nothing. A
    second call with the same options changes nothing.

    Args:
        inplace: write the gradient over the logits where verl allows it. False: never, as where something else of the
            loss reads them in its backward, which then raises.
        replace_losses: put the losses under verl's own loss modes too, not only under ``fused_<loss_mode>``.
        megatron: the functions of the Megatron engine, too. None: where megatron-core is installed.

    Raises:
        ImportError: verl is not installed.
        RuntimeError: a slot is not where it was, or takes other arguments; the message names it and the version. Or
            the options are not those of the call before: ``remove()`` first.
    """
    sharded = installed("megatron-core") is not None if megatron is None else megatron
    options = inplace, replace_losses, sharded
    if _installed:
        if _installed[0].options != options:
            raise RuntimeError("verl's functions are replaced with other options already: call remove() first")
        return
    slots = Slots("verl", MADE_FOR, replacements(inplace=inplace, megatron=sharded))
    registry = _registry()
    slots.install()
    names = {f"fused_{mode}": loss for mode, loss in POLICY_LOSSES.items()}
    if replace_losses:
        names |= {mode: loss for mode, loss in POLICY_LOSSES.items() if mode in registry}
    _installed.append(_Installed(options, slots, {name: registry.get(name) for name in names}))
    registry.update(names)


def remove() -> None:
    """Put back what was there before. Without an installation it changes nothing.

    Raises:
        RuntimeError: somebody else has replaced a function since; the message names it. Nothing is put back.
    """
    if not _installed:
        return
    before = _installed[0]
    before.slots.remove()
    registry = _registry()
    for name, loss in before.losses_before.items():
        if loss is None:
            del registry[name]
        else:
            registry[name] = loss
    _installed.clear()


def replacements(*, inplace: bool = True, megatron: bool = True) -> dict[Slot, Any]:
    """What goes where."""
    here: dict[Slot, Any] = {
        LOGPROBS: logprobs_from_logits if inplace else logprobs_not_in_place,
        ENTROPY: entropy_from_logits,
        CHUNKED_ENTROPY: entropy_from_logits_with_chunking,
        FUSED_HEAD: fused_linear_for_ppo,
    }
    sharded: dict[Slot, Any] = {
        SHARDED_LOGPROBS: vocab_parallel_log_probs_from_logits,
        SHARDED_ENTROPY: vocab_parallel_entropy,
        CHUNKED_SHARDED_ENTROPY: vocab_parallel_entropy_with_chunking,
    }
    return here | sharded if megatron else here


def _registry() -> dict[str, PolicyLoss]:
    found = Slots("verl", MADE_FOR, {}).found(_REGISTRY)
    if not isinstance(found, dict):
        raise RuntimeError(
            f"verl {installed('verl')}: {_REGISTRY.module}.{_REGISTRY.name} must be a dict, got {found!r}"
        )
    return found


_REGISTRY = Slot("verl.trainer.ppo.core_algos", "POLICY_LOSS_REGISTRY")
