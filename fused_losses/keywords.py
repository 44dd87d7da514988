"""Every keyword of the losses once, and every loss as a choice of them: signatures, defaults, bounds, docstrings.

``losses.py`` and ``on_logprobs.py`` are written from this by ``tools/write_losses.py``, :mod:`fused_losses.reference`
binds its arguments with :func:`signature`, and the checks take their bounds from the tables at the end. It imports
nothing of the package.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Mapping
from typing import NamedTuple

REQUIRED = inspect.Parameter.empty
JOINT = "the entry before speaks of this one, too"


class Keyword(NamedTuple):
    """An argument of a loss. What has no default is given by position, what has one by keyword only."""

    name: str
    type: str  # as source text, with Python's own quotes: '
    default: object
    words: str  # of the docstring; {name} is the default of that keyword; the second of a pair has JOINT
    group: str = ""  # the record of problem.py that it travels in, "inputs" of the objective, or "": by itself
    least: float | None = None
    reached: bool = True  # whether it may be ``least`` itself
    most: float | None = None
    finite: bool = False
    mask: bool = False  # a tensor of bool or integers will do
    neutral: float | None = None  # what stands for it at a token that is not active, if it is a column of tokens
    rest: bool = False  # all positional arguments that are left


_TABLE = (
    # ---- By position ----
    Keyword(
        "logits",
        "Tensor | LinearHead | VocabShard",
        REQUIRED,
        """(..., V) float32, bfloat16 or float16; the last dimension is the vocabulary. Any strides; where the last one
        is not 1, or more than two others are needed, the logits are copied. Or a :class:`LinearHead`, which makes them
        a chunk at a time, or a :class:`VocabShard` of them.""",
    ),
    Keyword("target_tokens", "Tensor", REQUIRED, "(...) int64 or int32, in [0, V) or ``ignore_index``."),
    Keyword(
        "old_logprobs",
        "Tensor | float",
        REQUIRED,
        "logprobs of the targets under the policy that sampled them, a number or broadcastable to (...).",
        group="inputs",
        neutral=0.0,
    ),
    Keyword(
        "advantages",
        "Tensor | float",
        REQUIRED,
        "a number or broadcastable to (...). Advantage 0 makes a token's objective and its gradient 0.",
        group="inputs",
        neutral=0.0,
    ),
    Keyword(
        "objective",
        "str | Objective | Callable[..., Tensor]",
        REQUIRED,
        """what maps the (...) float32 logprobs of the targets, and ``inputs``, to the loss:

        * a function ``f(logp, *inputs)`` of torch operations, which returns the loss of each token, (...), or one 0-d
        loss of the whole batch, which weights, reduction and denominator then leave as it is. Two phase. ``inputs`` are
        handed over as they are. At tokens that are ignored or have weight 0, logp is 0 and nothing flows back.

        * an :class:`Objective`, whose formula also returns the derivative and which may have the same formula as a
        Triton function: one pass on the backends "triton", which "auto" then takes for CUDA tensors, and "eager", two
        phase on the others. ``inputs`` are its columns, in order: numbers, or tensors broadcastable to (...).

        * the name of one of ours: {names}. ``inputs`` are its columns in the order of the loss's own arguments; bounds
        that are left out have the loss's defaults.""",
    ),
    Keyword("inputs", "Any", REQUIRED, JOINT, rest=True),
    # ---- Of cross entropy ----
    Keyword(
        "label_smoothing",
        "float",
        0.0,
        """number e in [0, 1]: the target's probability is 1 - e, and e / V is added for all.
        Default {label_smoothing}.""",
        least=0.0,
        most=1.0,
    ),
    Keyword(
        "z_loss",
        "float",
        0.0,
        """number >= 0; ``z_loss * lse^2`` is added to each token's loss, lse being the logsumexp of z.
        Default {z_loss}.""",
        least=0.0,
        finite=True,
    ),
    # ---- Of one objective or another ----
    Keyword(
        "clip_low_threshold",
        "Tensor | float",
        0.8,
        """absolute bounds on the ratio, 0 <= low <= high; numbers or per-token tensors. Default {clip_low_threshold}
        and {clip_high_threshold}.""",
        group="inputs",
        least=0.0,
        neutral=1.0,
    ),
    Keyword("clip_high_threshold", "Tensor | float", 1.2, JOINT, group="inputs", least=0.0, neutral=1.0),
    Keyword(
        "dual_clip",
        "Tensor | float | None",
        None,
        """at A < 0 the loss is at most ``-dual_clip * A``; a number or a per-token tensor, at least 1. Ye et al.,
        "Mastering Complex Control in MOBA Games with Deep Reinforcement Learning", 2019,
        https://arxiv.org/abs/1912.09729. Default {dual_clip}: no such bound.""",
        group="inputs",
        least=1.0,
        neutral=1.0,
    ),
    Keyword(
        "delta",
        "Tensor | float | None",
        None,
        """the unclipped r is replaced by min(r, delta), for either sign of A; a number or a per-token tensor, at least
        0. Prime Intellect, "INTELLECT-2", 2025, https://arxiv.org/abs/2505.07291. Default {delta}.""",
        group="inputs",
        least=0.0,
        neutral=1.0,
    ),
    Keyword(
        "beta",
        "Tensor | float",
        0.1,
        """strength of the pull towards ``old_logprobs``, at least 0; a number or a per-token tensor.
        Default {beta}.""",
        group="inputs",
        least=0.0,
        neutral=1.0,
    ),
    Keyword(
        "tau_positive",
        "Tensor | float",
        1.0,
        """steepness of the gate, greater than 0; numbers or per-token tensors. Default {tau_positive} and
        {tau_negative}.""",
        group="inputs",
        least=0.0,
        reached=False,
        neutral=1.0,
    ),
    Keyword("tau_negative", "Tensor | float", 1.05, JOINT, group="inputs", least=0.0, reached=False, neutral=1.0),
    Keyword(
        "divergence_low",
        "Tensor | float",
        0.2,
        """how far the token's probability may have moved, at least 0: down, for A < 0, and up, for A > 0. Numbers or
        per-token tensors. Default {divergence_low} and {divergence_high}.""",
        group="inputs",
        least=0.0,
        neutral=1.0,
    ),
    Keyword("divergence_high", "Tensor | float", 0.2, JOINT, group="inputs", least=0.0, neutral=1.0),
    Keyword(
        "ratio_cap",
        "Tensor | float | None",
        None,
        """the weight is at most this; a number or a per-token tensor, at least 0. Default {ratio_cap}: no such
        bound.""",
        group="inputs",
        least=0.0,
        neutral=1.0,
    ),
    Keyword(
        "k_positive",
        "Tensor | float",
        2.0,
        """exponents of w and of e^(1 - w) for A >= 0; numbers or per-token tensors, k at least 0, lambda greater than
        0. Default {k_positive} and {lambda_positive}.""",
        group="inputs",
        least=0.0,
        neutral=1.0,
    ),
    Keyword("lambda_positive", "Tensor | float", 3.0, JOINT, group="inputs", least=0.0, reached=False, neutral=1.0),
    Keyword(
        "k_negative",
        "Tensor | float",
        3.0,
        "the same for A < 0. Default {k_negative} and {lambda_negative}.",
        group="inputs",
        least=0.0,
        neutral=1.0,
    ),
    Keyword("lambda_negative", "Tensor | float", 2.0, JOINT, group="inputs", least=0.0, reached=False, neutral=1.0),
    # ---- Of losses of a sequence's ratio ----
    Keyword(
        "ratio_level",
        "Literal['token', 'sequence']",
        "token",
        """"token", one pass; or "sequence", two phase, r being the ratio of :func:`gspo`, also where it weights the
        KL. Default {ratio_level}.""",
    ),
    Keyword(
        "cu_seqlens",
        "Tensor | None",
        None,
        """(B + 1,) int32 or int64, 0 and the end of each sequence, the tokens of all shapes counted in row-major order.
        Default {cu_seqlens}: the last dimension of the tokens is the sequence.""",
        group="Sequences",
    ),
    Keyword(
        "sequence_ratio_mask",
        "Tensor | None",
        None,
        """broadcastable to (...); the tokens, any value but 0, that a sequence's ratio is made of. Default
        {sequence_ratio_mask}: those of a weight other than 0 whose target is not ``ignore_index``.""",
        group="Sequences",
    ),
    Keyword(
        "ratio_gradient",
        "RatioGradient",
        "token",
        '"token" or "sequence". Default {ratio_gradient}.',
        group="Sequences",
    ),
    # ---- Of every policy loss ----
    Keyword(
        "log_ratio_clamp",
        "Tensor | float | None",
        None,
        """``logp - old_logprobs`` is clamped to [-log_ratio_clamp, log_ratio_clamp] wherever it is used, with no
        gradient beyond; a number or a per-token tensor, at least 0. Default {log_ratio_clamp}: no clamp.""",
        group="PolicyTerms",
        least=0.0,
        neutral=1.0,
    ),
    Keyword(
        "importance_weights",
        "Tensor | float | None",
        None,
        """per-token factor of the objective, not of KL and entropy, for samples whose true sampler is not the policy of
        ``old_logprobs``; see :func:`truncated_importance_weights`. Default {importance_weights}: 1.""",
        group="PolicyTerms",
        mask=True,
        neutral=0.0,
    ),
    Keyword(
        "entropy_coef",
        "Tensor | float",
        0.0,
        """number or per-token tensor; ``-entropy_coef * H`` is added to the loss, H being the entropy of the token's
        distribution, with its gradient. Default {entropy_coef}.""",
        group="PolicyTerms",
        neutral=0.0,
    ),
    Keyword(
        "ref_logprobs",
        "Tensor | float | None",
        None,
        "logprobs of the targets under a reference policy, a number or broadcastable to (...).",
        group="PolicyTerms",
        neutral=0.0,
    ),
    Keyword(
        "kl_coef",
        "Tensor | float",
        0.0,
        """number or per-token tensor; ``kl_coef * KL(logp, ref_logprobs)`` is added to the loss.
        Default {kl_coef}.""",
        group="PolicyTerms",
        neutral=0.0,
    ),
    Keyword(
        "kl_type",
        "KlType",
        "k3",
        """with f = ref_logprobs, "k1" logp - f, "k2" (logp - f)^2 / 2, "k3" e^(f - logp) - (f - logp) - 1, or "abs"
        |logp - f|. Default {kl_type}. Not clamped.""",
        group="PolicyTerms",
    ),
    Keyword(
        "kl_weighted_by_ratio",
        "bool",
        False,
        """multiply KL by the loss's ratio, with a gradient through both. The ratio is exp(logp - old_logprobs) if the
        loss does not name another.""",
        group="PolicyTerms",
    ),
    # ---- Of every loss ----
    Keyword(
        "weights",
        "Tensor | float | None",
        None,
        """per-token factor of the loss, a number or broadcastable to (...); 0 masks the token. A masked token's loss
        and gradient are exactly 0, whatever its row holds. Default {weights}: 1.""",
        group="Reduction",
        mask=True,
        neutral=0.0,
    ),
    Keyword(
        "reduction",
        "ReductionName",
        "mean",
        """"sum"; "mean", the weighted mean sum(w loss) / sum(w) over tokens whose target is not ``ignore_index``, 0 if
        there are none; or "none", w * loss per token.""",
        group="Reduction",
    ),
    Keyword(
        "denominator",
        "Tensor | float | None",
        None,
        """number or 0-d tensor; the sum is divided by it instead of by the mean's own count, for gradient accumulation
        and data parallelism. Default {denominator}.""",
        group="Reduction",
        least=0.0,
        reached=False,
        finite=True,
    ),
    Keyword(
        "temperature",
        "Tensor | float",
        1.0,
        "number > 0 or per-token tensor; the logits are divided by it. Default {temperature}.",
        group="Transform",
        least=0.0,
        reached=False,
        finite=True,
    ),
    Keyword(
        "softcap",
        "float | None",
        None,
        """number > 0; the logits, times ``logit_scale``, become ``softcap * tanh(logits / softcap)`` before the
        temperature. Default {softcap}: no cap.""",
        group="Transform",
        least=0.0,
        reached=False,
        finite=True,
    ),
    Keyword(
        "logit_scale",
        "float",
        1.0,
        "number > 0; the logits are multiplied by it, before everything else. Default {logit_scale}.",
        group="Transform",
        least=0.0,
        reached=False,
        finite=True,
    ),
    Keyword("ignore_index", "int", -100, "target of tokens to leave out. Default {ignore_index}.", group="Reduction"),
    Keyword(
        "inplace",
        "bool",
        False,
        "write the gradient over ``logits``, which must not be a leaf, instead of into a new buffer.",
        group="How",
    ),
    Keyword(
        "recompute",
        "bool",
        False,
        """keep the logits and make the gradient in backward, which may then run more than once. One more read.""",
        group="How",
    ),
    Keyword(
        "upstream",
        "Tensor | float",
        1.0,
        """number in [2^-64, 2^64] or 0-d tensor: the upstream gradient that backward is expected to bring, where that
        is not 1: the loss is going to be multiplied by a loss scale or a number of processes. The one pass then makes
        the gradient for it, rounded to the dtype of ``logits`` once, and backward, which multiplies by what comes over
        what was expected, touches no memory where the two agree. The loss is the same. Default {upstream}.""",
        group="How",
        least=2.0**-64,  # the loss is formed times it, in float32
        most=2.0**64,
    ),
    Keyword(
        "backend",
        "BackendName",
        "auto",
        """"auto", "cuda", "triton", "cpu" or "eager". auto takes cuda, else triton, for CUDA tensors; cpu, else eager,
        for CPU tensors. A named backend never falls back.""",
        group="How",
    ),
    Keyword(
        "validate",
        "bool",
        False,
        """check the values of targets, per-token bounds and temperatures too; synchronises with the device. On CPU,
        targets are always checked. Unchecked, a bad value makes its own token NaN and no other.""",
        group="How",
    ),
    Keyword(
        "return_outputs",
        "bool",
        False,
        """return ``(loss, outputs)``; ``outputs.logprobs`` is the (...) float32 logprob of each target, detached, 0
        where the target is ``ignore_index``; ``outputs.entropy`` likewise where ``entropy_coef`` is in use;
        ``outputs.metrics`` are computed when asked for, see :class:`Outputs`.""",
        group="How",
    ),
    # ---- Of losses on logprobs ----
    Keyword(
        "logprobs",
        "Tensor",
        REQUIRED,
        """(...) float32, float64, bfloat16 or float16: the logprob of each token under the policy being trained. With
        16 bits they are brought to float32.""",
    ),
    Keyword(
        "entropy",
        "Tensor | None",
        None,
        """(...) float: the entropy of each token's distribution under the same policy, for ``entropy_coef``.
        Default {entropy}.""",
    ),
    # ---- Of logprobs ----
    Keyword(
        "return_entropy",
        "bool",
        False,
        """return ``(logprobs, entropy)``; entropy is -sum_j p_j log p_j with p = softmax(z), of the same read and with
        a gradient, too.""",
    ),
    # ---- Of statistics ----
    Keyword(
        "outputs",
        "Sequence[StatisticName]",
        ("logprobs", "entropy", "log_sum_squares", "mean_logit", "top1"),
        """a tuple or a list of what is asked for, each once. Default: all five.

        * "logprobs": log p_t, the logprob of the target t

        * "entropy": -sum_j p_j log p_j

        * "log_sum_squares": log sum_j p_j^2

        * "mean_logit": mean_j z_j, -inf where a logit is

        * "top1": whether the target is the most likely class; of several with the same logit, the first is.""",
    ),
)
KEYWORDS = {keyword.name: keyword for keyword in _TABLE}


def _of_groups(*groups: str) -> tuple[str, ...]:
    return tuple(keyword.name for keyword in _TABLE if keyword.group in groups)


_ROWS = ("logits", "target_tokens")
_POLICY = (*_ROWS, "old_logprobs", "advantages")
_CLIP = ("clip_low_threshold", "clip_high_threshold")
_GAMMA = ("k_positive", "lambda_positive", "k_negative", "lambda_negative")
_DIVERGENCE = ("divergence_low", "divergence_high")
_SEQUENCES = ("cu_seqlens", "sequence_ratio_mask")
_TRANSFORM = _of_groups("Transform")
_COMMON = _of_groups("Reduction", "Transform", "How")
_TERMS = (*_of_groups("PolicyTerms"), *_COMMON)
_OF_A_RATIO = ("log_ratio_clamp", "kl_weighted_by_ratio")

_RETURNS = """The loss in float32, 0-d or (...) for "none"; with ``return_outputs`` the pair ``(loss, outputs)``. Its
    gradient reaches ``logits`` only: all other inputs are constants."""
_WRONG = "an argument has the wrong type, dtype, shape, device or value; the message names it."
_RAISES = {
    "TypeError, ValueError": _WRONG,
    "RuntimeError": "the named backend can't run here; or a second backward without ``recompute=True``.",
}


# Of the functions that are no losses.
_IN_BACKWARD = """in backward, write the gradient over ``logits``, which must not be a leaf, instead of into a new
    buffer; backward then runs once. Not under torch.compile."""
_RAISES_OF_ROWS = {
    "TypeError, ValueError": _WRONG,
    "RuntimeError": "the named backend can't run here; or a second backward with ``inplace=True``.",
}


class Loss(NamedTuple):
    """A public function. ``logprobs`` and ``statistics`` are among them, too, though no losses."""

    name: str
    head: str  # of the docstring: what it is, its formula, its source
    keywords: tuple[str, ...]  # in the order of the signature
    defaults: Mapping[str, object] = {}  # where they are not the keyword's
    words: Mapping[str, str] = {}  # instead of the keyword's
    more: Mapping[str, str] = {}  # after the keyword's
    call: str = "policy"  # the function of call.py that it calls; one that serves several gets the loss's name
    flag: str = "return_outputs"  # the keyword with which it returns a pair; "": it returns no tensor, but ``second``
    second: str = "Outputs"  # the type of that pair's second
    returns: str = _RETURNS
    raises: Mapping[str, str] = _RAISES


_FUNCTIONS = (
    Loss(
        "cross_entropy",
        """Cross entropy: ``-logp``, with ``logp = log_softmax(z)[target]`` and z the transformed logits.

        The same numbers as :func:`torch.nn.functional.cross_entropy` with class indices, in float32 for any dtype of
        the logits; ``weights`` are per token here, not per class, and the mean over no token is 0, not NaN.

        With several targets per token, ``-sum_k weights[..., k] * logp[..., k]``: distillation from a teacher's top K,
        and the backward of any loss of the logprobs. A reduction sees each of the K as an item with its weight.""",
        (*_ROWS, "label_smoothing", "z_loss", *_COMMON),
        more={
            "target_tokens": """Or (..., K), K targets per token, any of them twice or ignored; then ``weights`` are
            broadcastable to (..., K), may have any sign, and 0 makes a target padding; ``outputs.logprobs`` has that
            shape, too, and "none" gives the sums over K."""
        },
        call="cross_entropy",
    ),
    Loss(
        "dft",
        """Dynamic fine-tuning: cross entropy weighted by the target's own probability, ``-sg(p) logp`` with
        p = exp(logp).

        sg stops the gradient, which is that of ``-p``: what the policy finds unlikely moves it little. Wu et al., "On
        the Generalization of SFT: A Reinforcement Learning Perspective with Reward Rectification", 2025,
        https://arxiv.org/abs/2508.05629.""",
        (*_ROWS, *_COMMON),
        call="of_logprob",
    ),
    Loss(
        "reinforce",
        """Policy gradient: ``-logp A``.

        For samples of the policy itself; for those of another, ``importance_weights`` are the correction. Williams,
        "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning", 1992,
        https://doi.org/10.1007/BF00992696. With a group's advantages it is GPG's loss, Chu et al., "GPG: A Simple and
        Strong Reinforcement Learning Baseline for Model Reasoning", 2025, https://arxiv.org/abs/2504.02546.""",
        (*_ROWS, "advantages", *(name for name in _TERMS if name not in _OF_A_RATIO)),
        words={
            "importance_weights": """per-token factor of the objective, not of KL and entropy, for samples of another
            policy; see :func:`truncated_importance_weights`. Default {importance_weights}: 1."""
        },
    ),
    Loss(
        "importance_sampling",
        """Importance-sampled policy gradient: ``-r A``, with ``r = exp(logp - old_logprobs)``.

        The policy gradient for samples of another policy, corrected by the ratio of the two. Degris, White and Sutton,
        "Off-Policy Actor-Critic", 2012, https://arxiv.org/abs/1205.4839.""",
        (*_POLICY, *_TERMS),
    ),
    Loss(
        "ppo",
        """Clipped policy gradient: ``-min(r A, clamp(r, low, high) A)``, with ``r = exp(logp - old_logprobs)``.

        A clipped token (A > 0 and r > high, or A < 0 and r < low) has gradient exactly 0; at r equal to a bound the
        gradient flows. Schulman et al., "Proximal Policy Optimization Algorithms", 2017,
        https://arxiv.org/abs/1707.06347.""",
        (*_POLICY, *_CLIP, "dual_clip", "delta", *_TERMS),
    ),
    Loss(
        "cispo",
        """Clipped importance weights: ``-sg(clamp(r, low, high)) logp A``, with ``r = exp(logp - old_logprobs)``.

        sg stops the gradient: the clipped ratio is a weight, and every token keeps a gradient. MiniMax, "MiniMax-M1:
        Scaling Test-Time Compute Efficiently with Lightning Attention", 2025, https://arxiv.org/abs/2506.13585.""",
        (*_POLICY, *_CLIP, *_TERMS),
        defaults={"reduction": "sum"},
    ),
    Loss(
        "dro",
        """Direct reward optimisation: ``-(logp A - beta / 2 (logp - old_logprobs)^2)``.

        The quadratic term acts on tokens of advantage 0, too: mask padding with ``weights`` or ``ignore_index``.
        Richemond et al., "Offline Regularised Reinforcement Learning for Large Language Models Alignment", 2024,
        https://arxiv.org/abs/2405.19107.""",
        (*_POLICY, "beta", *_TERMS),
        defaults={"reduction": "sum"},
        words={"advantages": "a number or broadcastable to (...)."},
    ),
    Loss(
        "sapo",
        """Soft gate instead of a clip: ``-(4 / tau) sigmoid(tau (r - 1)) A``, with ``r = exp(logp - old_logprobs)``.

        tau is tau_positive for A > 0, else tau_negative. At r = 1 the gradient is that of the plain policy gradient.
        Gao et al., "Soft Adaptive Policy Optimization", 2025, https://arxiv.org/abs/2511.20347.""",
        (*_POLICY, "tau_positive", "tau_negative", "ratio_level", *_SEQUENCES, "ratio_gradient", *_TERMS),
        words={"ratio_gradient": '"token" or "sequence", as for :func:`gspo`. Default {ratio_gradient}.'},
        more={"sequence_ratio_mask": 'For "sequence" only.'},
        call="sapo",
    ),
    Loss(
        "dppo_tv",
        """Divergence PPO, total variation: ``-sg(min(r, ratio_cap)) M logp A``, with ``r = exp(logp - old_logprobs)``.

        M is 0 for A > 0 where the token is more probable than it was, p > q, and D exceeds ``divergence_high``; for
        A < 0 where p < q and D exceeds ``divergence_low``; else 1. ``D = |p - q|``, p = exp(logp),
        q = exp(old_logprobs): an improbable token's ratio may be any in this trust region. sg stops the gradient.
        Qi et al., "Rethinking the Trust Region in LLM Reinforcement Learning", 2026,
        https://arxiv.org/abs/2602.04879.""",
        (*_POLICY, *_DIVERGENCE, "ratio_cap", *_TERMS),
    ),
    Loss(
        "dppo_kl",
        """Divergence PPO, KL divergence: ``-sg(min(r, ratio_cap)) M logp A``, with ``r = exp(logp - old_logprobs)``.

        As :func:`dppo_tv`, with ``D = q log(q / p) + (1 - q) log((1 - q + e) / (1 - p + e))`` and e = 1e-8: the KL
        divergence of "this token or any other", finite where p is 1. Qi et al., "Rethinking the Trust Region in LLM
        Reinforcement Learning", 2026, https://arxiv.org/abs/2602.04879.""",
        (*_POLICY, *_DIVERGENCE, "ratio_cap", *_TERMS),
    ),
    Loss(
        "gspo",
        """PPO's objective of the sequence's ratio: the geometric mean of its tokens' ratios.

        With x = logp, q = old_logprobs, sg = stop-gradient and m = mean over the sequence of x - q, the ratio of a
        token is ``exp(sg(m) + x - sg(x))`` for ``ratio_gradient="token"``, as in the paper's GSPO-token, verl, SkyRL
        and Tinker; and ``exp(m)``, with a gradient through the mean, for "sequence", as in TRL, Liger and NeMo-RL. The
        values are the same. Zheng et al., "Group Sequence Policy Optimization", 2025,
        https://arxiv.org/abs/2507.18071, whose bounds are as close to 1 as 0.9997 and 1.0004.
        ``kl_weighted_by_ratio`` weights by this ratio, too, as TRL does.""",
        (*_POLICY, *_SEQUENCES, *_CLIP, "dual_clip", "delta", "ratio_gradient", *_TERMS),
        words={
            "clip_low_threshold": """as for :func:`ppo`, on this ratio. Default {clip_low_threshold},
            {clip_high_threshold}, {dual_clip} and {delta}.""",
            "dual_clip": JOINT,
            "delta": JOINT,
        },
        call="sequence_policy",
    ),
    Loss(
        "gmpo",
        """Geometric mean of clipped ratios: ``-A exp(mean_t c_t)`` at every token of the sequence.

        c_t is x - q, clipped token by token where that lowers ``A c_t``: at most log(high) for A > 0, at least log(low)
        for A < 0. The gradient flows through the mean. Weights m / n_b and the number of sequences as the denominator,
        n_b being a sequence's tokens, give the paper's mean over sequences. Zhao et al., "Geometric-Mean Policy
        Optimization", 2025, https://arxiv.org/abs/2507.20673.""",
        (*_POLICY, *_SEQUENCES, *_CLIP, *_TERMS),
        defaults={"clip_low_threshold": 0.6703200460356393, "clip_high_threshold": 1.4918246976412703},
        words={
            "clip_low_threshold": """absolute bounds on a token's ratio, 0 <= low <= high; numbers or per-token tensors.
            Default e^-0.4 and e^0.4."""
        },
        more={"advantages": "The same for all tokens of a sequence."},
        call="sequence_policy",
    ),
    Loss(
        "vespo",
        """Soft weights of whole sequences: ``-sg(phi(w)) logp A``, with ``phi(w) = w^k e^(lambda (1 - w))``.

        w is the ratio of the whole sequence, the product of its tokens' ``exp(logp - old_logprobs)``, and phi(1) = 1;
        far from 1 phi goes to 0, where no ratio overflows. Shen et al., "VESPO: Variational Sequence-Level Soft Policy
        Optimization for Stable Off-Policy LLM Training", 2026, https://arxiv.org/abs/2602.10693.
        ``log_ratio_clamp`` bounds each token's log ratio, and ``kl_weighted_by_ratio`` weights by a token's ratio.""",
        (*_POLICY, *_SEQUENCES, *_GAMMA, *_TERMS),
        more={"advantages": "The same for all tokens of a sequence."},
        call="sequence_policy",
    ),
    Loss(
        "policy_loss",
        "A loss with an objective of your own, or any of ours, through the one door.",
        (*_ROWS, "objective", "inputs", *_TERMS),
        more={
            "kl_weighted_by_ratio": """A function has old_logprobs as the first of its inputs where
            ``kl_weighted_by_ratio`` asks for them."""
        },
        call="policy_loss",
    ),
    Loss(
        "logprobs",
        """Logprob of each target, ``log_softmax(z)[target]`` with z the transformed logits, from one read of the
        logits.""",
        (*_ROWS, "return_entropy", *_TRANSFORM, "ignore_index", "inplace", "backend"),
        words={
            "ignore_index": """target of tokens to leave out: logprob 0, entropy 0, gradient 0.
            Default {ignore_index}.""",
            "inplace": _IN_BACKWARD,
            "backend": '"auto", "cuda", "triton", "cpu" or "eager", as for the losses.',
        },
        call="logprobs",
        flag="return_entropy",
        second="Tensor",
        returns="""(...) float32, differentiable. Backward reads the logits again and takes any upstream gradient, more
        than once if asked, unless ``inplace=True``.""",
        raises=_RAISES_OF_ROWS,
    ),
    Loss(
        "statistics",
        """What a row says of its target and of itself, from one read of the logits: with z the transformed logits and
        p = softmax(z) the logprob of the target, the entropy, ``log sum_j p_j^2``, ``mean_j z_j`` and whether the
        target is the most likely class.

        ``sum_j p_j^2`` is what the squared norm of the logits' gradient is made of,
        ``|grad logp|^2 = 1 - 2 p_t + sum_j p_j^2`` (at temperature 1): for the optimal token baseline, Li et al., "The
        Optimal Token Baseline", 2026, https://arxiv.org/abs/2602.07078, and for the weights of WPO, Zhou et al., "WPO:
        Enhancing RLHF with Weighted Preference Optimization", 2024, https://arxiv.org/abs/2406.11827.""",
        (*_ROWS, "outputs", *_TRANSFORM, "ignore_index", "inplace", "backend"),
        words={
            "ignore_index": """target of tokens to leave out, of which all numbers are 0, and top1 False.
            Default {ignore_index}.""",
            "inplace": _IN_BACKWARD,
            "backend": '"auto", "cuda", "triton", "cpu" or "eager", as for the losses.',
        },
        call="statistics",
        flag="",
        second="Statistics",
        returns="""A :class:`Statistics` with a (...) tensor for each of ``outputs``, bool for top1, else float32, and
        None for the rest. logprobs and entropy are differentiable, by one backward together, as those of
        :func:`logprobs` are; the others are detached. Where the logprob is NaN all are, and top1 is False.""",
        raises=_RAISES_OF_ROWS,
    ),
)
LOSSES = {loss.name: loss for loss in _FUNCTIONS}

# ---- The same on logprobs ----

_OF_LOGITS = (*_ROWS, "label_smoothing", "z_loss", *_TRANSFORM, "ignore_index", "inplace", "recompute", "upstream")
_HEADS_ON_LOGPROBS = {
    "cross_entropy": "Cross entropy: ``-logp``, the negative log likelihood of tokens whose logprobs are known.",
}
_WORDS_ON_LOGPROBS = {
    "objective": """what maps ``logprobs`` and ``inputs`` to the loss:

        * a function ``f(logp, *inputs)`` of torch operations, which returns the loss of each token, (...), or one 0-d
        loss of the whole batch, which weights, reduction and denominator then leave as it is. ``inputs`` are handed
        over as they are. At tokens of weight 0, logp is 0 and nothing flows back.

        * an :class:`Objective`. ``inputs`` are its columns, in order: numbers, or tensors broadcastable to (...).

        * the name of one of ours: {names}. ``inputs`` are its columns in the order of the loss's own arguments; bounds
        that are left out have the loss's defaults.""",
    "ratio_level": """"token"; or "sequence", r being the ratio of :func:`gspo`, also where it weights the KL.
        Default {ratio_level}.""",
    "sequence_ratio_mask": """broadcastable to (...); the tokens, any value but 0, that a sequence's ratio is made of.
        Default {sequence_ratio_mask}: those of a weight other than 0.""",
    "entropy_coef": """number or per-token tensor; ``-entropy_coef * entropy`` is added to the loss.
        Default {entropy_coef}.""",
    "weights": """per-token factor of the loss, a number or broadcastable to (...); 0 masks the token. A masked token's
        loss and gradient are exactly 0, whatever its logprob is. Default {weights}: 1.""",
    "reduction": """"sum"; "mean", the weighted mean sum(w loss) / sum(w), 0 where all weights are; or "none", w * loss
        per token.""",
    "validate": """check the values of per-token bounds, too; synchronises with the device. Unchecked, a bad value makes
        its own token NaN and no other.""",
    "return_outputs": """return ``(loss, outputs)``: ``outputs.logprobs`` and ``outputs.entropy`` are those given,
        detached, and ``outputs.metrics`` are computed when asked for, see :class:`Outputs`.""",
}


def _on_logprobs(loss: Loss) -> Loss:
    keywords: list[str] = ["logprobs"]
    for name in loss.keywords:
        if name == "entropy_coef":
            keywords.append("entropy")
        if name not in (*_OF_LOGITS, "backend"):
            keywords.append(name)
    more = {name: words for name, words in loss.more.items() if name not in _OF_LOGITS}
    return loss._replace(
        head=_HEADS_ON_LOGPROBS.get(loss.name, loss.head),
        keywords=tuple(keywords),
        words={**loss.words, **_WORDS_ON_LOGPROBS},
        more=more,
        returns="""The loss in float32, or float64 where ``logprobs`` are, 0-d or (...) for "none"; with
        ``return_outputs`` the pair ``(loss, outputs)``. Its gradient reaches ``logprobs`` and ``entropy``: all other
        inputs are constants.""",
        raises={"TypeError, ValueError": _WRONG},
    )


ON_LOGPROBS = {loss.name: _on_logprobs(loss) for loss in _FUNCTIONS if loss.flag == "return_outputs"}


# ---- Signatures ----


def defaults(loss: str, table: Mapping[str, Loss] = LOSSES) -> dict[str, object]:
    """Of all keywords of the loss that have one."""
    given = {name: KEYWORDS[name].default for name in table[loss].keywords} | dict(table[loss].defaults)
    return {name: default for name, default in given.items() if default is not REQUIRED}


def signature(loss: str, table: Mapping[str, Loss] = LOSSES) -> inspect.Signature:
    """That of the public function, its annotations as text."""
    position, rest, keyword_only = (
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.VAR_POSITIONAL,
        inspect.Parameter.KEYWORD_ONLY,
    )
    given = defaults(loss, table)
    parameters = [
        inspect.Parameter(
            name,
            rest if KEYWORDS[name].rest else keyword_only if name in given else position,
            default=given.get(name, REQUIRED),
            annotation=KEYWORDS[name].type,
        )
        for name in table[loss].keywords
    ]
    function = table[loss]
    returned = f"Tensor | tuple[Tensor, {function.second}]" if function.flag else function.second
    return inspect.Signature(parameters, return_annotation=returned)


# ---- Docstrings ----

_WIDTH = 116  # of the text in a function's docstring, whose lines begin at 4


def docstring(loss: str, table: Mapping[str, Loss] = LOSSES) -> str:
    """That of the public function, as :func:`inspect.getdoc` gives it."""
    function, shown = table[loss], {name: _shown(default) for name, default in defaults(loss, table).items()}
    names = [f'"{other.name}"' for other in _FUNCTIONS if other.call in ("policy", "sapo")]
    shown["names"] = f"{', '.join(names[:-1])} or {names[-1]}"
    entries: list[tuple[str, str]] = []
    for name in function.keywords:
        words = function.words.get(name, KEYWORDS[name].words)
        if words != JOINT:
            entries.append((name, f"{words} {function.more.get(name, '')}".format_map(shown)))
        elif not KEYWORDS[name].rest:
            entries[-1] = (f"{entries[-1][0]}, {name}", entries[-1][1])
    sections = {
        "Args": "\n".join(_entry(*entry) for entry in entries),
        "Returns": _filled(function.returns, 4),
        "Raises": "\n".join(_entry(*entry) for entry in function.raises.items()),
    }
    return "\n\n".join([_filled(function.head), *(f"{title}:\n{text}" for title, text in sections.items())])


def _shown(default: object) -> str:
    if isinstance(default, str):
        return f'"{default}"'
    return f"{default:g}" if isinstance(default, float) else str(default)


def _entry(name: str, words: str) -> str:
    return _filled(f"{name}: {words}", 4, 8)


def _filled(text: str, first: int = 0, others: int | None = None) -> str:
    """The paragraphs of ``text`` in lines, indented by ``others`` but for the first; those that begin with * a list."""
    others = first if others is None else others
    lines, before = "", ""
    for paragraph in (" ".join(words.split()) for words in text.split("\n\n")):
        item = paragraph.startswith("* ")
        lines += ("\n" if item and before.startswith("* ") else "\n\n") if before else ""
        lines += textwrap.fill(
            paragraph,
            _WIDTH,
            initial_indent=" " * (others if before else first),
            subsequent_indent=" " * (others + 2 * item),
            break_long_words=False,
            break_on_hyphens=False,
        )
        before = paragraph
    return lines


# ---- What checks and the composition of losses go by ----

LEAST = {k.name: (k.least, k.reached) for k in _TABLE if k.least is not None}  # (bound, whether it may be reached)
MOST = {k.name: k.most for k in _TABLE if k.most is not None}
FINITE = tuple(k.name for k in _TABLE if k.finite)
MASKS = tuple(k.name for k in _TABLE if k.mask)
NEUTRAL = {k.name: k.neutral for k in _TABLE if k.neutral is not None}
