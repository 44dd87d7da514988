"""Problems for the Triton kernels, their truth in float64, and checks of a backend's stages against it.

Without a GPU the kernels run in Triton's interpreter (conftest.py sets TRITON_INTERPRET=1), whose cost is per block
operation: tiles are shrunk (`small_tiles`, which every file of tests imports), so that small vocabularies reach the
loops and tails of large ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from fused_losses.backends import triton as backend
from fused_losses.backends.triton import BACKEND
from fused_losses.objectives import OBJECTIVES, Objective
from fused_losses.problem import Coefficients, Column, Problem, Stats, Targets, Terms, Transform
from fused_losses.terms import Seen, row_loss

pytest.importorskip("triton")  # here, and so in all that imports this

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
interpreted = pytest.mark.skipif(DEVICE.type != "cpu", reason="watches the interpreter's memory accesses")

CPU = torch.device("cpu")  # of the truth
IGNORE = -100
CLIP, REGION = (0.8, 1.2), (0.02, 0.02)
BOUNDS = {"ppo": CLIP, "cispo": CLIP, "dro": (0.1,), "sapo": (1.0, 1.05), "dppo_tv": REGION, "dppo_kl": REGION}
PLAIN = Terms()
CLAMP = 1.5


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles of a real vocabulary's proportions: V = 100 has full tiles and a tail."""
    reason = BACKEND.unusable(DEVICE)
    if reason is not None:
        pytest.skip(reason)
    for name, value in {"_TILE": 32, "_TOKENS": 16, "_SUM_BLOCK": 16}.items():
        monkeypatch.setattr(backend, name, value)
    monkeypatch.setattr(backend, "_lanes", lambda warps: 16)
    monkeypatch.setattr(backend, "_depth", lambda itemsize, kind: 2)
    backend._walk.cache_clear()
    yield
    backend._walk.cache_clear()


def one_shot(monkeypatch: pytest.MonkeyPatch, wanted: bool) -> None:
    monkeypatch.setattr(backend, "_ONE_SHOT", 65536 if wanted else 0)
    backend._walk.cache_clear()


def problem(
    targets: Tensor,
    vocab: int,
    objective: str | Objective = "cross_entropy",
    inputs: Sequence[Column] = (),
    *,
    weights: Column = 1.0,
    temperature: Column = 1.0,
    softcap: float | None = None,
    shares: Tensor | None = None,
    terms: Terms = PLAIN,
    denominator: Column = 1.0,
    ignore_index: int = IGNORE,
    all_logprobs: bool = False,
    mean: bool = False,
    device: torch.device = DEVICE,
) -> Problem:
    """On the device. Limits that `inputs` leave out are infinite; `mean` takes the backend's own denominator."""

    def there(column: Column) -> Column:
        return column.to(device) if isinstance(column, Tensor) else column

    if isinstance(objective, str):
        objective = OBJECTIVES[objective]
    columns = [there(c) for c in inputs]
    made = Problem(
        Targets(targets.to(device), ignore_index, None if shares is None else shares.to(device)),
        Transform(there(temperature), softcap),
        there(weights),
        objective,
        (*columns, *[math.inf] * (len(objective.columns) - len(columns))),
        Terms(*(there(value) for value in terms)),
        there(denominator),
        vocab,
        all_logprobs,
    )
    return made._replace(denominator=BACKEND.normaliser(made)) if mean else made


def row_stats(logp: Tensor, plain: bool = True, moment: float = 0.0, drift: float = 0.0) -> Stats:
    """Stats of rows of one target whose logprob is `logp`: it leads, or the others' best logit is 0."""
    exact = logp.double()
    leads = exact > -0.5
    sum = torch.where(leads, torch.expm1(-exact), 1.0)  # z_t = 0: p = 1 / (1 + sum)
    target = torch.where(leads, 0.0, exact - torch.log1p(-exact.exp()))  # sum = 1: p = e^z_t / (e^z_t + 1)
    rows = [torch.zeros_like(logp), sum.float(), target.float()]
    if not plain:
        rows += [torch.full_like(logp, moment), torch.full_like(logp, drift)]
    return Stats(torch.stack(rows).to(DEVICE))


def two_phase(
    logits: Tensor, given: Problem, gradient: Tensor, upstream: Column = 1.0
) -> tuple[Tensor, Tensor, Coefficients]:
    """(losses per token, logprobs, coefficients), the gradient written."""
    stats = BACKEND.stats(logits, given)
    losses, logprobs, coefficients = BACKEND.objective(stats, given, False)
    BACKEND.grad(logits, given.targets, given.transform, stats, coefficients, upstream, gradient)
    return losses, logprobs, coefficients


def guarded(values: Tensor, padding: int = 0) -> tuple[Tensor, Tensor]:
    """A copy of (N, V) in rows of V + padding, and the buffer around it, to see what is written outside."""
    n, vocab = values.shape
    buffer = torch.full((8 * (vocab + padding) + n * (vocab + padding),), 7.0, dtype=values.dtype, device=values.device)
    start = 4 * (vocab + padding) // 8 * 8
    view = buffer.as_strided((n, vocab), (vocab + padding, 1), start)
    view.copy_(values)
    return view, buffer


def assert_only_inside(view: Tensor, buffer: Tensor) -> None:
    view.fill_(7.0)
    assert (buffer == 7.0).all(), "wrote around the gradient"


class Case:
    """Twelve rows: ordinary, masked, hopeless and clipped tokens; with terms, and K targets each where they have
    shares."""

    MASKED = (4, 5)

    def __init__(
        self,
        objective: str | Objective,
        vocab: int,
        dtype: torch.dtype,
        terms: Terms = PLAIN,
        softcap: float | None = None,
        num_targets: int = 0,
        temperature: float = 0.7,
    ):
        n = 12
        generator = torch.Generator().manual_seed(vocab)
        self.objective = OBJECTIVES[objective] if isinstance(objective, str) else objective
        self.n, self.vocab, self.dtype, self.softcap = n, vocab, dtype, softcap
        logits = torch.randn(n, vocab, generator=generator) * 2
        self.targets = torch.randint(0, vocab, (n,), generator=generator)
        self.weights: Column = torch.rand(n, generator=generator) + 0.5
        self.temperature = torch.full((n,), temperature)
        self.targets[0], self.targets[1] = 0, vocab - 1
        logits[1, vocab - 1] += 6.0  # the maximum outside the body
        logits[2, self.targets[2]] = logits[2].logsumexp(0) + 5 * temperature  # p near 1
        logits[3] += 3000.0 if dtype != torch.float16 else 100.0
        logits[4] = torch.nan
        self.targets[4] = IGNORE
        logits[5] = torch.nan
        self.weights[5] = 0
        if vocab > 2:
            logits[6, torch.arange(vocab) != self.targets[6]] = -torch.inf
            logits[6, (self.targets[6] + 1) % vocab] = 1.0
        logits[7] = -torch.inf  # NaN
        logits[8, vocab // 2] = torch.nan
        self.targets[9] = vocab  # outside
        logits[10, vocab - 1] = torch.inf
        self.temperature[11] = -1.0
        self.hopeless = torch.tensor([7, 8, 9, 10, 11])
        if softcap is not None:  # an infinite logit is as good as another
            self.hopeless = torch.tensor([8, 9, 11])
        elif vocab > 2 and (terms.label_smoothing or num_targets > 1):  # -inf, or inf - inf
            logits[6] = torch.randn(vocab, generator=generator)
        self.logits = logits.to(dtype)
        scaled = self.logits.double() / temperature
        logp = scaled.log_softmax(-1).gather(1, self.targets.clamp(0, vocab - 1)[:, None])[:, 0].float()
        log_ratio = torch.tensor([0.0, 0.1, 0.1, -0.5, 0, 0, 0.5, 0, 0, 0, 0, 0])  # 3 and 6 are clipped
        old_logprobs = (logp - log_ratio).nan_to_num(-1.0)
        old_logprobs[4:6] = -200.0  # an infinite ratio in masked tokens
        advantages = torch.tensor([1.0, 1.0, -1.5, -1.0, -1.0, -1.0, 1.0]).repeat(2)[:n]
        named = {"old_logprobs": old_logprobs, "advantages": advantages}
        self.inputs: tuple[Column, ...] = tuple(named[name] for name in self.objective.inputs if name in named)
        if self.objective.bounds:
            self.inputs += BOUNDS[self.objective.name]
        ref_logprobs = logp.nan_to_num(-1.0, posinf=-1.0, neginf=-1.0) + 0.3 * torch.randn(n, generator=generator)
        self.terms = terms if terms.plain else terms._replace(ref_logprobs=ref_logprobs)
        self.shares: Tensor | None = None
        if num_targets:
            first = self.targets
            self.targets = torch.randint(0, vocab, (n, num_targets), generator=generator)
            shares = torch.randn(n, num_targets, generator=generator)
            self.targets[:, 0] = first
            if num_targets > 1:
                self.targets[0, 1] = self.targets[0, 0]
                self.targets[1, -1] = IGNORE
                self.targets[2, 1], shares[2, 1] = vocab + 5, 0.0  # outside, but does not count
                shares[3, 0] = 0.0
                self.targets[3, 1] = self.targets[3, 0]
            self.targets[4] = IGNORE
            self.shares = shares.masked_fill(self.targets == IGNORE, 0.0)

    def problem(self, mean: bool = False, targets: Tensor | None = None) -> Problem:
        return problem(
            self.targets if targets is None else targets,
            self.vocab,
            self.objective,
            self.inputs,
            weights=self.weights,
            temperature=self.temperature,
            softcap=self.softcap,
            shares=self.shares,
            terms=self.terms,
            mean=mean,
        )

    def without_hopeless(self) -> Tensor:
        targets = self.targets.clone()
        targets[self.hopeless] = IGNORE
        return targets

    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        """weight * loss per token, logprobs (and entropy), and the gradient of the sum of losses, in float64 by
        autograd."""
        terms, objective = self.terms, self.objective
        targets = self.targets.view(self.n, -1)
        num_targets = targets.shape[1]
        read = torch.ones(self.n, dtype=torch.bool)
        read[[*self.MASKED, *self.hopeless.tolist()]] = False
        logits = self.logits.double().requires_grad_()
        z = logits[read]
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        z = z / self.temperature[read, None].double()
        log_p, lse = z.log_softmax(-1), z.logsumexp(-1)
        targets = targets[read]
        outside = (targets < 0) | (targets >= self.vocab)
        logp = log_p.gather(1, targets.masked_fill(outside, 0)).masked_fill(targets == IGNORE, 0.0)
        entropy = -(log_p.exp() * log_p.clamp(min=-1000.0)).sum(-1)
        x, whole = logp[:, 0], 1.0
        if self.shares is not None:
            shares = self.shares[read].double()
            x, whole = (shares * logp).sum(1), shares.sum(1)

        def column(value: Column) -> Tensor:
            return torch.as_tensor(value, dtype=torch.float64).expand(self.n)[read]

        inputs = [column(c) for c in problem(self.targets, self.vocab, objective, self.inputs, device=CPU).inputs]
        names = ("importance_weights", "ref_logprobs", "kl_coef", "entropy_coef", "log_ratio_clamp")
        columns = {name: column(getattr(terms, name)) for name in names}
        seen = Seen(x, lse, entropy, lse - z.mean(-1), whole)
        value = row_loss(objective.formula, seen, inputs, terms._replace(**columns)).value
        value = value * column(self.weights)
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        losses = torch.zeros(self.n, dtype=torch.float64)
        losses[self.hopeless] = torch.nan
        losses[read] = value.detach()
        logprobs = torch.zeros(num_targets + 1, self.n, dtype=torch.float64)
        logprobs[:, self.hopeless] = torch.nan
        logprobs[:-1, read] = torch.where(outside & (targets != IGNORE), torch.nan, logp.detach()).T
        logprobs[-1, read] = entropy.detach()
        if not terms.entropy:
            logprobs[-1] = 0.0
        gradient[self.hopeless] = torch.nan
        return losses, logprobs[0] if self.problem().plain else logprobs, gradient


def assert_gradient(gradient: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    bound = expected.nan_to_num().abs().amax(-1, keepdim=True) * 1e-5 + 5e-7  # 1 - p in float32
    error = (gradient.cpu().double() - expected).abs()
    assert torch.equal(gradient.cpu().isnan(), expected.isnan())
    assert (error.nan_to_num() <= expected.nan_to_num().abs() * tolerance + bound).all()


def assert_logprobs(case: Case, got: Tensor, expected: Tensor) -> None:
    """In a hopeless row of several targets some may be fine, and an ignored one is 0 for all that."""
    some = torch.ones(case.n, dtype=torch.bool)
    if expected.dim() == 2:
        some[case.hopeless] = False
        assert got.cpu()[0, case.hopeless].isnan().all()
    torch.testing.assert_close(got.cpu().double()[..., some], expected[..., some], rtol=1e-5, atol=2e-5, equal_nan=True)


def assert_losses(case: Case, got: Tensor, expected: Tensor, scale: Tensor) -> None:
    rtol = 1e-5 if case.problem().plain else 2e-5
    atol = 1e-5 * max(1.0, scale.nan_to_num().abs().max().item())
    torch.testing.assert_close(got.cpu().double(), expected, rtol=rtol, atol=atol, equal_nan=True)


def run_one_pass(
    case: Case, mean: bool = True, padding: int = 0, in_place: bool = False, targets: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    logits, buffer = guarded(case.logits.to(DEVICE), padding)
    if in_place:
        gradient = logits
    else:
        gradient, buffer = guarded(torch.full_like(logits, 5.0).contiguous())
    loss, logprobs = BACKEND.loss_and_grad(logits, case.problem(mean, targets), gradient)
    result = gradient.clone()
    assert_only_inside(gradient, buffer)
    return loss, logprobs, result


def check_one_pass(case: Case, with_loss: bool = True, mean: bool = True, **layout: object) -> None:
    losses, logprobs, expected = case.expected()
    total = case.problem(mean).denominator if mean else 1.0
    loss, got_logprobs, gradient = run_one_pass(case, mean, **layout)
    assert_logprobs(case, got_logprobs, logprobs)
    assert_gradient(gradient, expected / float(total), case.dtype)
    assert not gradient[4:6].any() and not torch.signbit(gradient[4:6]).any()
    assert loss.isnan()  # of the hopeless rows
    if not with_loss:
        return
    targets = case.without_hopeless()  # without them it is a number
    total = case.problem(mean, targets).denominator if mean else 1.0
    loss, _, gradient = run_one_pass(case, mean, targets=targets, **layout)
    assert_losses(case, loss, losses.nansum() / float(total), losses)
    assert not gradient[case.hopeless].any()


def upstream_of_masked() -> Tensor:
    """Any upstream gradient; that of masked tokens must not show."""
    upstream = torch.linspace(-1.0, 2.0, 12)
    upstream[4:6] = torch.tensor([torch.inf, torch.nan])
    upstream[0] = 0.0
    return upstream


def check_two_phase(case: Case, padding: int = 0) -> None:
    losses, logprobs, expected = case.expected()
    upstream = upstream_of_masked()
    logits, _ = guarded(case.logits.to(DEVICE), padding)
    gradient, buffer = guarded(torch.full_like(logits, 5.0).contiguous())
    got_losses, got_logprobs, coefficients = two_phase(logits, case.problem(), gradient, upstream.to(DEVICE))
    assert_logprobs(case, got_logprobs, logprobs)
    assert_losses(case, got_losses, losses, losses)
    assert not got_losses[4:6].any() and got_losses[case.hopeless].isnan().all()
    idle = (coefficients.table.cpu() == 0).all(0) | (upstream == 0)
    assert idle[[0, *case.MASKED]].all()
    result = gradient.clone()
    assert not result[idle.to(DEVICE)].any() and not torch.signbit(result[idle.to(DEVICE)]).any()
    assert_gradient(result, (expected * upstream[:, None]).masked_fill(idle[:, None], 0.0), case.dtype)
    assert_only_inside(gradient, buffer)


# What a row may have beside its objective: (terms, softcap).
TERMS: dict[str, tuple[Terms, float | None]] = {
    "nothing": (Terms(), None),
    "entropy": (Terms(entropy=True, entropy_coef=0.3), None),
    "kl": (Terms(kl_type="k3", kl_coef=0.2, kl_weighted_by_ratio=True, log_ratio_clamp=CLAMP), None),
    "smoothed": (Terms(label_smoothing=0.1, z_loss=0.01), None),
    "capped": (Terms(), 4.0),
    "capped entropy": (Terms(entropy=True, entropy_coef=0.3), 4.0),
    "capped smoothed": (Terms(label_smoothing=0.1, z_loss=0.01), 4.0),
    "all of a policy": (
        Terms(
            importance_weights=0.7,
            kl_coef=0.2,
            entropy_coef=0.3,
            log_ratio_clamp=CLAMP,
            z_loss=0.01,
            kl_type="k1",
            kl_weighted_by_ratio=True,
            entropy=True,
        ),
        4.0,
    ),
}


def terms_case(name: str, objective: str | Objective, vocab: int, dtype: torch.dtype, num_targets: int = 0) -> Case:
    return Case(objective, vocab, dtype, *TERMS[name], num_targets=num_targets)


def check_terms(case: Case, padding: int = 0, in_place: bool = False) -> None:
    check_one_pass(case, mean=False, padding=padding, in_place=in_place)
    check_two_phase(case, padding)
