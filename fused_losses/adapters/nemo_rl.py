"""NeMo-RL: its loss functions, for logprobs (``LossInputType.LOGPROB``) and for logits (``LOGIT``).

    from fused_losses.adapters.nemo_rl import ClippedPGLoss, NLLLoss

    loss_fn = ClippedPGLoss(config.loss_fn)                  # where ClippedPGLossFn was: on logprobs
    loss_fn = ClippedPGLoss(config.loss_fn, on_logits=True)  # and here the kernels read the logits

Made for NeMo-RL 0.6. Nothing of it is imported until one of its enums is asked for: ``loss_type``, ``input_type`` and
``metric_normalizations``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import fused_losses

from .. import on_logprobs
from ..vocab_shard import VocabShard
from ._names import in_words

_IGNORED = -100
_EPSILON = 1e-8  # that NeMo-RL adds to every number it divides by
_NAMES = {
    "target_tokens": "input_ids",
    "local_logits": "logits",
    "logprobs": "next_token_logprobs",
    "old_logprobs": "prev_logprobs",
    "importance_weights": "generation_logprobs",
    "weights": "token_mask",
    "denominator": "global_valid_toks or global_valid_seqs",
    "clip_low_threshold": "1 - ratio_clip_min",
    "clip_high_threshold": "1 + ratio_clip_max",
    "dual_clip": "ratio_clip_c",
}
Group = Callable[[], dist.ProcessGroup]


class _LossFunction:
    """What both have: where logprobs come from."""

    def __init__(
        self, use_fused_linear_logprobs: bool, on_logits: bool, inplace: bool, vocab_parallel_group: Group | None
    ):
        if on_logits and use_fused_linear_logprobs:
            raise ValueError("on_logits: with use_fused_linear_logprobs the model returns logprobs, and no logits")
        if not on_logits and (inplace or vocab_parallel_group is not None):
            raise ValueError("inplace and vocab_parallel_group are of logits: give on_logits=True, too")
        self.use_fused_linear_logprobs = use_fused_linear_logprobs  # read by NeMo-RL
        self.on_logits = on_logits
        self.inplace = inplace
        self.vocab_parallel_group = vocab_parallel_group

    @property
    def input_type(self) -> Any:
        from nemo_rl.algorithms.loss.interfaces import LossInputType

        return LossInputType.LOGIT if self.on_logits else LossInputType.LOGPROB

    def _given(self, next_token_logprobs: Tensor | None, logits: Tensor | None) -> Tensor:
        given, wanted = (logits, "logits") if self.on_logits else (next_token_logprobs, "next_token_logprobs")
        other = next_token_logprobs if self.on_logits else logits
        if given is None or other is not None:
            raise ValueError(f"{type(self).__name__} with on_logits={self.on_logits} must be called with {wanted}")
        return given

    def _source(self, logits: Tensor, input_ids: Tensor) -> Any:
        if logits.shape[:-1] != input_ids.shape:
            raise ValueError(
                f"logits must be of the tokens of input_ids, {tuple(input_ids.shape)}, got {tuple(logits.shape[:-1])}: "
                "context parallelism needs on_logits=False"
            )
        if self.vocab_parallel_group is None:
            return logits
        group, columns = self.vocab_parallel_group(), logits.shape[-1]
        return VocabShard(logits, group, group.rank() * columns, group.size() * columns)

    def _targets(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """(B, S): of each position the next token, where the mask is not 0. So no logits are cut off and copied."""
        following = input_ids[:, 1:].masked_fill(mask == 0, _IGNORED)
        return torch.nn.functional.pad(following, (0, 1), value=_IGNORED)


class ClippedPGLoss(_LossFunction):
    """``ClippedPGLossFn``: PPO, GRPO, REINFORCE, GSPO and CISPO with a KL term, the same numbers, the same metrics.

    A masked token is exactly 0, whatever it holds: NeMo-RL multiplies by the mask, and gets NaN of a masked infinity.
    Its metrics are brought to the host at once, not one by one.

    Args:
        cfg: ``ClippedPGLossConfig``, or a mapping of its fields.
        use_fused_linear_logprobs: as of ``ClippedPGLossFn``.
        on_logits: take the logits of the model, (B, S, V), and read them with this library's kernels: logprobs with no
            float32 copy, and masked tokens unread. Top-k and top-p filtering, packed sequences and context parallelism
            need False: NeMo-RL does them in what it makes logprobs with.
        inplace: with on_logits, backward writes the gradient over the logits.
        vocab_parallel_group: with on_logits, a function that returns the group over which the logits' vocabulary is
            sharded, as Megatron's is: ``parallel_state.get_tensor_model_parallel_group``. None: they are whole, or a
            DTensor.

    Raises:
        ValueError: an option that is not known, or options that exclude each other.
    """

    def __init__(
        self,
        cfg: Any,
        use_fused_linear_logprobs: bool = False,
        *,
        on_logits: bool = False,
        inplace: bool = False,
        vocab_parallel_group: Group | None = None,
    ):
        super().__init__(use_fused_linear_logprobs, on_logits, inplace, vocab_parallel_group)
        self.options = o = _options(cfg)
        # read by NeMo-RL, which with it computes unfiltered logprobs, too
        self.reference_policy_kl_penalty = 0 if o.use_kl_in_reward else o.reference_policy_kl_penalty

    @property
    def loss_type(self) -> Any:
        from nemo_rl.algorithms.loss.interfaces import LossType

        return LossType.TOKEN_LEVEL if self.options.token_level_loss else LossType.SEQUENCE_LEVEL

    @property
    def metric_normalizations(self) -> dict[str, Any]:
        """By which number each metric was divided."""
        from nemo_rl.algorithms.loss.interfaces import MetricNormalizer

        o = self.options
        of_loss = "TOKENS" if o.token_level_loss else "SEQUENCES"
        by = dict.fromkeys(_TOKEN_METRICS, "TOKENS") | dict.fromkeys(_OWN_METRICS, "NONE")
        by |= {"loss": of_loss, "kl_penalty": of_loss}
        by["sampling_importance_ratio"] = "SEQUENCES" if o.sequence_level_importance_ratios else "TOKENS"
        if o.truncated_importance_sampling_type is not None:
            masked = o.truncated_importance_sampling_type == "seq-mask-tis"
            by["is_oob_ratio"] = "SEQUENCES" if masked else "TOKENS"
        return {name: MetricNormalizer[normalizer] for name, normalizer in by.items()}

    @in_words(_NAMES)
    def __call__(
        self,
        next_token_logprobs: Tensor | None = None,
        data: Mapping[str, Any] | None = None,
        global_valid_seqs: Tensor | None = None,
        global_valid_toks: Tensor | None = None,
        *,
        logits: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss and its metrics.

        Args:
            next_token_logprobs: (B, S - 1); or logits (B, S, V) with on_logits.
            data: of the micro-batch, each (B, S): ``token_mask``, ``advantages``, ``generation_logprobs``,
                ``prev_logprobs`` and ``reference_policy_logprobs`` where they are used, ``input_ids`` for logits;
                ``sample_mask`` (B,). What top-k and top-p filtering adds is read, too.
            global_valid_seqs, global_valid_toks: 0-d, of the whole batch.
        """
        given = self._given(next_token_logprobs, logits)
        if data is None or global_valid_seqs is None or global_valid_toks is None:
            raise ValueError("ClippedPGLoss needs data, global_valid_seqs and global_valid_toks")
        if self.on_logits:
            mask = data["token_mask"][:, 1:] * data["sample_mask"].unsqueeze(-1)
            targets = self._targets(data["input_ids"], mask)
            source = self._source(given, data["input_ids"])
            given = fused_losses.logprobs(source, targets, ignore_index=_IGNORED, inplace=self.inplace)[:, :-1]
        batch = _Batch.of(given, data, global_valid_seqs, global_valid_toks, self.options)
        actor, seen = _actor_loss(batch, self.options)
        kl = _kl_loss(batch, data, self.reference_policy_kl_penalty, self.options)
        positive = _positive_loss(batch, data, self.options)
        loss = actor + kl + self.options.positive_example_nll_weight * positive
        metrics = {"loss": loss, "kl_penalty": kl / (self.reference_policy_kl_penalty or 1), **seen}
        metrics |= _mismatch(batch, self.options) | {"positive_nll_loss": positive}
        names, values = list(metrics), torch.stack([value.detach().double() for value in metrics.values()])
        return loss, dict(zip(names, values.tolist(), strict=True))


class NLLLoss(_LossFunction):
    """``NLLLossFn``: the negative log likelihood over the tokens of the whole batch. With on_logits in one pass.

    Arguments and errors are those of :class:`ClippedPGLoss`.
    """

    def __init__(
        self,
        use_fused_linear_logprobs: bool = False,
        *,
        on_logits: bool = False,
        inplace: bool = False,
        vocab_parallel_group: Group | None = None,
    ):
        super().__init__(use_fused_linear_logprobs, on_logits, inplace, vocab_parallel_group)

    @property
    def loss_type(self) -> Any:
        from nemo_rl.algorithms.loss.interfaces import LossType

        return LossType.TOKEN_LEVEL

    @property
    def metric_normalizations(self) -> dict[str, Any]:
        from nemo_rl.algorithms.loss.interfaces import MetricNormalizer

        by = {"loss": "TOKENS", "num_unmasked_tokens": "NONE", "num_valid_samples": "NONE"}
        return {name: MetricNormalizer[normalizer] for name, normalizer in by.items()}

    @in_words(_NAMES)
    def __call__(
        self,
        next_token_logprobs: Tensor | None = None,
        data: Mapping[str, Any] | None = None,
        global_valid_seqs: Tensor | None = None,
        global_valid_toks: Tensor | None = None,
        dpo_loss: bool = False,
        dpo_average_log_probs: bool = False,
        *,
        logits: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """See :meth:`ClippedPGLoss.__call__`; ``data`` needs ``token_mask`` and ``sample_mask``. dpo_loss is refused:
        DPO has a loss of its own, which this is not."""
        if dpo_loss or dpo_average_log_probs:
            raise ValueError("dpo_loss and dpo_average_log_probs are not supported by this NLLLoss")
        given = self._given(next_token_logprobs, logits)
        if data is None or global_valid_toks is None:
            raise ValueError("NLLLoss needs data and global_valid_toks")
        mask = data["token_mask"][:, 1:] * data["sample_mask"].unsqueeze(-1)
        denominator = global_valid_toks + _EPSILON
        if self.on_logits:
            weights = torch.nn.functional.pad(mask.float(), (0, 1))
            loss = fused_losses.cross_entropy(
                self._source(given, data["input_ids"]),
                self._targets(data["input_ids"], mask),
                weights=weights,
                reduction="sum",
                denominator=denominator,
                ignore_index=_IGNORED,
                inplace=self.inplace,
            )
        else:
            loss = on_logprobs.cross_entropy(given, weights=mask.float(), reduction="sum", denominator=denominator)
        seen = torch.stack([loss.detach().double(), mask.sum().double(), data["sample_mask"].sum().double()]).tolist()
        return loss, dict(zip(("loss", "num_unmasked_tokens", "num_valid_samples"), seen, strict=True))


# ---- Options ----


class _Options(NamedTuple):
    """ClippedPGLossConfig, with its defaults."""

    disable_ppo_ratio: bool = False
    token_level_loss: bool = True
    sequence_level_importance_ratios: bool = False
    ratio_clip_min: float = 0.2
    ratio_clip_max: float = 0.2
    ratio_clip_c: float | None = None
    reference_policy_kl_penalty: float = 0.01
    reference_policy_kl_type: str = "k3"
    kl_input_clamp_value: float | None = 20.0
    kl_output_clamp_value: float | None = 10.0
    use_kl_in_reward: bool = False
    use_importance_sampling_correction: bool = False
    truncated_importance_sampling_type: str | None = None
    truncated_importance_sampling_ratio: float | None = None
    truncated_importance_sampling_ratio_min: float | None = None
    use_on_policy_kl_approximation: bool = False
    force_on_policy_ratio: bool = False
    use_cispo: bool = False
    positive_example_nll_weight: float = 0.0


_TRUNCATIONS = (None, "tis", "icepop", "seq-mask-tis")
_KL_TYPES = ("k1", "k2", "k3")


def _options(cfg: Any) -> _Options:
    given = dict(cfg)  # a mapping, or a pydantic model, whose fields and extra ones these are
    if unknown := [key for key in given if key not in _Options._fields]:
        raise ValueError(f"cfg takes {', '.join(_Options._fields)}, got {', '.join(unknown)}")
    o = _Options(**given)
    low, high = o.truncated_importance_sampling_ratio_min, o.truncated_importance_sampling_ratio
    kind = o.truncated_importance_sampling_type
    wrong = {
        "sequence_level_importance_ratios needs token_level_loss=False": o.sequence_level_importance_ratios
        and o.token_level_loss,
        "use_cispo excludes disable_ppo_ratio, force_on_policy_ratio, sequence_level_importance_ratios and "
        "ratio_clip_c, and needs token_level_loss": o.use_cispo
        and (
            o.disable_ppo_ratio
            or o.force_on_policy_ratio
            or o.sequence_level_importance_ratios
            or o.ratio_clip_c is not None
            or not o.token_level_loss
        ),
        "ratio_clip_c must be greater than 1": o.ratio_clip_c is not None and not o.ratio_clip_c > 1,
        # NeMo-RL then compares a logprob with the bound of a ratio
        "disable_ppo_ratio excludes ratio_clip_c": o.disable_ppo_ratio and o.ratio_clip_c is not None,
        f"reference_policy_kl_type must be one of {_KL_TYPES}": o.reference_policy_kl_type not in _KL_TYPES,
        f"truncated_importance_sampling_type must be one of {_TRUNCATIONS}": kind not in _TRUNCATIONS,
        "truncated_importance_sampling_type needs use_importance_sampling_correction and a "
        "truncated_importance_sampling_ratio greater than 0": kind is not None
        and not (o.use_importance_sampling_correction and high is not None and high > 0),
        "truncated_importance_sampling_ratio needs truncated_importance_sampling_type": kind is None
        and high is not None,
        "truncated_importance_sampling_ratio_min must be at most truncated_importance_sampling_ratio": low is not None
        and high is not None
        and low > high,
        "icepop and seq-mask-tis need truncated_importance_sampling_ratio_min": kind in ("icepop", "seq-mask-tis")
        and low is None,
        "seq-mask-tis excludes sequence_level_importance_ratios": kind == "seq-mask-tis"
        and o.sequence_level_importance_ratios,
    }
    for what, is_so in wrong.items():
        if is_so:
            raise ValueError(f"cfg: {what}; got {given}")
    return o


# ---- The loss ----


class _Batch(NamedTuple):
    """A micro-batch in the frame of next tokens, (B, S - 1) each; masks are bool."""

    logprobs: Tensor
    old: Tensor  # NeMo-RL's prev_logprobs: of the policy before the step
    sampled: Tensor  # its generation_logprobs
    advantages: Tensor
    tokens: Tensor  # token_mask
    mask: Tensor  # and of samples that count
    actor_tokens: Tensor  # less those that top-k or top-p filtering left without a logprob
    actor: Tensor
    samples: Tensor  # (B,)
    valid_tokens: Tensor  # of the whole batch
    valid_samples: Tensor
    token_level: bool

    @staticmethod
    def of(
        logprobs: Tensor, data: Mapping[str, Any], valid_samples: Tensor, valid_tokens: Tensor, o: _Options
    ) -> _Batch:
        tokens, samples = data["token_mask"][:, 1:] != 0, data["sample_mask"] != 0
        keep = data.get("curr_logprobs_keep_mask")
        actor_tokens = tokens if keep is None else tokens & (keep != 0)
        return _Batch(
            logprobs,
            logprobs.detach() if o.force_on_policy_ratio else data["prev_logprobs"][:, 1:],
            data["generation_logprobs"][:, 1:],
            data["advantages"][:, 1:],
            tokens,
            tokens & samples[:, None],
            actor_tokens,
            actor_tokens & samples[:, None],
            samples,
            valid_tokens + _EPSILON,
            valid_samples + _EPSILON,
            o.token_level_loss,
        )

    def old_mask(self, o: _Options) -> Tensor:
        """Of what reads ``old``, which is ``logprobs`` where the ratio is forced to 1."""
        return self.actor if o.force_on_policy_ratio else self.mask

    def per_token(self, values: Tensor, mask: Tensor) -> Tensor:
        """Their sum over the mask, over the tokens of the whole batch."""
        return torch.where(mask, values, 0.0).sum() / self.valid_tokens

    def per_sample(self, values: Tensor) -> Tensor:
        return torch.where(self.samples, values, 0.0).sum() / self.valid_samples

    def reduction(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and denominator: a mean over the batch's tokens, or over its sequences of their means."""
        if self.token_level:
            return (tokens & self.samples[:, None]).float(), self.valid_tokens
        share = self.samples.float() / (tokens.sum(-1) + _EPSILON)
        return tokens * share[:, None], self.valid_samples


def _actor_loss(batch: _Batch, o: _Options) -> tuple[Tensor, dict[str, Tensor]]:
    """And the metrics of its ratio and of its weights."""
    weights, denominator = batch.reduction(batch.actor_tokens)
    correction, seen = _correction(batch, o)
    common: dict[str, Any] = {"weights": weights, "reduction": "sum", "denominator": denominator}
    if o.use_importance_sampling_correction:
        common["importance_weights"] = correction
    bounds: dict[str, Any] = {"clip_low_threshold": 1 - o.ratio_clip_min, "clip_high_threshold": 1 + o.ratio_clip_max}
    policy = (batch.logprobs, batch.old, batch.advantages)
    losses: Any = on_logprobs
    if o.force_on_policy_ratio:  # a ratio of 1 is within any bounds
        loss = losses.importance_sampling(*policy, **common)
    elif o.disable_ppo_ratio:
        loss = losses.reinforce(batch.logprobs, batch.advantages, **common)
    elif o.sequence_level_importance_ratios:
        loss = losses.gspo(*policy, dual_clip=o.ratio_clip_c, ratio_gradient="sequence", **bounds, **common)
    elif o.use_cispo:
        loss = losses.cispo(*policy, **bounds, **common)
    else:
        loss = losses.ppo(*policy, dual_clip=o.ratio_clip_c, **bounds, **common)
    return loss, _of_ratio(batch, o) | seen


def _ratio(batch: _Batch, o: _Options) -> tuple[Tensor, Tensor]:
    """And the clamped one; where there is none, NeMo-RL reports the logprobs."""
    x = batch.logprobs.detach()
    if o.force_on_policy_ratio:
        return torch.ones_like(x), torch.ones_like(x)
    if o.disable_ppo_ratio:
        return x, x
    log_ratio = torch.where(batch.actor_tokens, x - batch.old, 0.0)
    if o.sequence_level_importance_ratios:
        mean = log_ratio.sum(-1, keepdim=True) / (batch.actor_tokens.sum(-1, keepdim=True) + _EPSILON)
        log_ratio = mean.expand_as(x)
    ratio = log_ratio.exp()
    return ratio, ratio.clamp(1 - o.ratio_clip_min, 1 + o.ratio_clip_max)


def _of_ratio(batch: _Batch, o: _Options) -> dict[str, Tensor]:
    found = {}
    for name, ratio in zip(("probs_ratio", "probs_ratio_clamped"), _ratio(batch, o), strict=True):
        # inf and -inf of no token, as NeMo-RL has them
        found[name] = batch.per_token(ratio, batch.actor)
        found[f"{name}_min"] = _extreme(torch.where(batch.actor, ratio, math.inf), torch.amin)
        found[f"{name}_max"] = _extreme(torch.where(batch.actor, ratio, -math.inf), torch.amax)
    return found


def _extreme(values: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
    if values.numel() == 0:
        return values.new_full((), math.inf if of is torch.amin else -math.inf)
    return of(values)


def _correction(batch: _Batch, o: _Options) -> tuple[Tensor, dict[str, Tensor]]:
    """Weights for sampler mismatch, (B, S - 1) or (B, 1), and their metrics. What is not finite is 0, as in NeMo-RL."""
    mask = batch.old_mask(o)
    log_ratio = batch.old - batch.sampled
    if o.sequence_level_importance_ratios:
        log_ratio = torch.where(mask, log_ratio, 0.0).sum(-1, keepdim=True)
    weights = torch.nan_to_num(log_ratio.exp(), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = o.truncated_importance_sampling_ratio_min or 0.0, o.truncated_importance_sampling_ratio or math.inf
    seen: dict[str, Tensor] = {}
    if o.truncated_importance_sampling_type in ("tis", "icepop"):
        outside = (weights > high) | (weights < low)
        seen["is_oob_ratio"] = batch.per_token(outside.float().expand_as(mask), mask)
        clipped = o.truncated_importance_sampling_type == "tis"
        weights = weights.clamp(low, high) if clipped else torch.where(outside, 0.0, weights)
    elif o.truncated_importance_sampling_type == "seq-mask-tis":
        tokens = batch.actor_tokens if o.force_on_policy_ratio else batch.tokens
        finite = torch.nan_to_num(log_ratio, nan=0.0, posinf=0.0, neginf=0.0)
        geometric = (torch.where(tokens, finite, 0.0).sum(-1) / (tokens.sum(-1) + _EPSILON)).exp()
        kept = (geometric >= low) & (geometric <= high)
        seen["is_oob_ratio"] = batch.per_sample((~kept).float())
        weights = weights * kept[:, None]
    if o.sequence_level_importance_ratios:
        seen["sampling_importance_ratio"] = batch.per_sample(weights[:, 0])
    else:
        seen["sampling_importance_ratio"] = batch.per_token(weights, mask)
    return weights, seen


def _kl(x: Tensor, reference: Tensor, o: _Options, weight: Tensor | None = None) -> Tensor:
    """NeMo-RL's estimate per token; with a weight clamped as the loss's is, without one not at all."""
    log_ratio = reference - x
    if weight is not None and o.kl_input_clamp_value is not None:
        within = log_ratio.clamp(-o.kl_input_clamp_value, o.kl_input_clamp_value)
        weight = torch.where(log_ratio == within, weight, weight.detach())
        log_ratio = within
    value = {"k1": -log_ratio, "k2": log_ratio**2 / 2, "k3": log_ratio.exp() - 1 - log_ratio}[
        o.reference_policy_kl_type
    ]
    if weight is None:
        return value
    value = weight * value
    clamp = o.kl_output_clamp_value
    return value if clamp is None else value.clamp(-clamp, clamp)


def _kl_loss(batch: _Batch, data: Mapping[str, Any], penalty: float, o: _Options) -> Tensor:
    """Of the unfiltered logprobs; its gradient goes through the probability of the sample, too."""
    if penalty == 0:
        return batch.logprobs.new_zeros(())
    # what a masked token holds must not get into a gradient, not even times 0
    x = torch.where(batch.mask, data.get("curr_logprobs_unfiltered", batch.logprobs), 0.0)
    reference = torch.where(batch.mask, data["reference_policy_logprobs"][:, 1:], 0.0)
    sampled = torch.where(batch.mask, batch.sampled, 0.0) if o.use_on_policy_kl_approximation else x.detach()
    weight = torch.nan_to_num((x - sampled).exp(), nan=0.0, posinf=0.0, neginf=0.0)
    weights, denominator = batch.reduction(batch.tokens)
    return penalty * (weights * torch.where(batch.mask, _kl(x, reference, o, weight), 0.0)).sum() / denominator


def _positive_loss(batch: _Batch, data: Mapping[str, Any], o: _Options) -> Tensor:
    """The negative log likelihood of samples with a positive reward, over their own tokens."""
    if o.positive_example_nll_weight <= 0 or "rewards" not in data:
        return batch.logprobs.new_zeros(())
    correct = (batch.actor & (data["rewards"] > 0)[:, None]).float()
    denominator = correct.sum() + _EPSILON
    return on_logprobs.cross_entropy(batch.logprobs, weights=correct, reduction="sum", denominator=denominator)


_TOKEN_METRICS = (
    *("probs_ratio", "probs_ratio_clamped", "token_mult_prob_error", "gen_kl_error", "policy_kl_error"),
    *("js_divergence_error", "approx_entropy"),
)
_OWN_METRICS = (
    *("num_valid_samples", "positive_nll_loss", "probs_ratio_min", "probs_ratio_max"),
    *("probs_ratio_clamped_min", "probs_ratio_clamped_max"),
)


@torch.no_grad()
def _mismatch(batch: _Batch, o: _Options) -> dict[str, Tensor]:
    """Metrics of how far the sampler's probabilities are from the policy's before the step."""
    old, sampled, mask = batch.old, batch.sampled, batch.old_mask(o)
    mixture = torch.log(0.5 * old.exp() + 0.5 * sampled.exp())
    divergence = sum(0.5 * ((y - mixture).exp() - (y - mixture) - 1) for y in (old, sampled))
    x = batch.logprobs
    return {
        "token_mult_prob_error": batch.per_token((sampled - old).abs().exp(), mask),
        "gen_kl_error": batch.per_token(_kl(sampled, old, o), mask),
        "policy_kl_error": batch.per_token(_kl(old, sampled, o), mask),
        "js_divergence_error": batch.per_token(torch.as_tensor(divergence), mask),
        "approx_entropy": -batch.per_token((x - sampled).exp() * x, batch.actor),
        "num_valid_samples": batch.samples.sum(),
    }
