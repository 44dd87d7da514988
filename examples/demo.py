"""Train a small language model with every loss, fused and eager side by side, and compare.

Phase 1 trains on the sources of Python's standard library with cross_entropy. Phase 2 goes on from there with
reinforcement learning, once per policy loss; the reward is what Python's own parser makes of the completions.

    python examples/demo.py            # about three minutes on two CPU cores; uses a GPU if there is one
    python examples/demo.py --quick    # a smoke test
    python examples/demo.py --head linear    # the fused losses are given the model's head, and make no logits
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

# Read when torch loads: threads that wait by spinning slow a machine down that has other work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import plain
import torch
from corpus import Corpus, Prompt, load_corpus
from measure import Cost, LossFn, measure
from model import Decoder, ModelConfig
from report import LIMITS, Policy, Result, plot, print_tables
from reward import reward
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import fused_losses
from fused_losses import LinearHead, reference

POLICY_LOSSES = ("importance_sampling", "ppo", "cispo", "dro")
IGNORE = -100
CHUNK_BYTES = 1 << 24  # 128 tokens' logits; a LinearHead's own choice of 1 GiB would take this example's all at once


@dataclass(frozen=True)
class Settings:
    seed: int = 0
    backend: str = "auto"
    head: str = "logits"  # what the fused losses are given: these, or "linear", the head that would make them
    files: int = 300  # of the standard library
    repeats: int = 5  # of a timed loss step
    # phase 1
    train_steps: int = 100
    rows: int = 3
    length: int = 128
    train_rate: float = 3e-3
    # phase 2
    rollouts: int = 16  # per policy loss
    prompts: int = 6  # per rollout
    group: int = 8  # completions per prompt
    minibatches: int = 4  # updates per rollout, all but the first of them off-policy
    prompt_length: int = 24
    completion_length: int = 16
    policy_rate: float = 1e-3
    temperature: float = 0.7
    judged_prompts: int = 16  # kept apart, to judge the model before and after

    @property
    def inplace(self) -> bool:
        """Whether there are logits for the gradient to overwrite; a LinearHead has none."""
        return self.head == "logits"


QUICK = Settings(
    files=60, repeats=2, train_steps=3, rows=2, length=64, rollouts=2, prompts=1, minibatches=2, judged_prompts=1
)


class Learner:
    """A model and its optimizer."""

    def __init__(self, model: Decoder, learning_rate: float) -> None:
        self.model = copy.deepcopy(model)
        embedding = self.model.tokens.weight
        others = [p for p in self.model.parameters() if p is not embedding]
        # A token's row of the embedding sees few gradients in a short run: it takes longer steps.
        groups = [{"params": [embedding], "lr": 3 * learning_rate}, {"params": others, "lr": learning_rate}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def schedule(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = factor * group.setdefault("peak", group["lr"])

    def update(self, loss: Tensor) -> float:
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


class Trio:
    """Three independent learners on the same batches: one trains with the fused loss, one with its eager reference, one
    with a loss in float64.

    Every update feeds rounding back into the weights, so no two curves are the same. The third learner tells whose
    rounding it is: eager float32 is itself some way off, and a fused loss may not be much further.
    """

    def __init__(self, model: Decoder, learning_rate: float) -> None:
        self.fused, self.reference, self.float64 = (Learner(model, learning_rate) for _ in range(3))
        self.curves: dict[str, list[float]] = {"fused": [], "reference": [], "float64": []}

    def update(self, fused_loss: Tensor, reference_loss: Tensor, float64_loss: Tensor) -> None:
        self.curves["fused"].append(self.fused.update(fused_loss))
        self.curves["reference"].append(self.reference.update(reference_loss))
        self.curves["float64"].append(self.float64.update(float64_loss))


def logits_or_head(model: Decoder, tokens: Tensor, settings: Settings, keep: int | None = None) -> Tensor | LinearHead:
    """What a fused loss takes: a model's logits or, in their place, the head that would make them."""
    if settings.head == "linear":
        hidden = model.hidden(tokens, keep)
        return LinearHead(hidden, model.tokens.weight, model.head_bias, chunk_bytes=CHUNK_BYTES)
    return model(tokens, keep)


def exact_logits(model: Decoder, tokens: Tensor, settings: Settings, keep: int | None = None) -> Tensor:
    """In float64 from where the fused loss begins: from the logits, or with the products that make them."""
    if settings.head == "linear":
        inputs = (model.hidden(tokens, keep), model.tokens.weight, model.head_bias)
        return F.linear(*(tensor.double() for tensor in inputs))
    return model(tokens, keep).double()


def measure_step(
    loss_fns: dict[str, LossFn],
    exact: LossFn,
    model: Decoder,
    tokens: Tensor,
    settings: Settings,
    keep: int | None = None,
) -> dict[str, Cost]:
    """What each loss of logits costs; with a linear head, from hidden states on."""
    if settings.head == "logits":
        return measure(loss_fns, lambda z: exact(z.double()), (model(tokens, keep),), settings.repeats)
    heads = dict.fromkeys(loss_fns, F.linear) | {"fused": partial(LinearHead, chunk_bytes=CHUNK_BYTES)}
    return measure(
        {name: lambda *x, name=name: loss_fns[name](heads[name](*x)) for name in loss_fns},
        lambda *x: exact(F.linear(*(tensor.double() for tensor in x))),
        (model.hidden(tokens, keep), model.tokens.weight, model.head_bias),
        settings.repeats,
    )


def supervised(model: Decoder, corpus: Corpus, settings: Settings, progress: tqdm) -> tuple[Decoder, Result]:
    progress.set_description("cross_entropy")
    trio = Trio(model, settings.train_rate)
    generator = torch.Generator().manual_seed(settings.seed)
    for step in range(settings.train_steps):
        for learner in (trio.fused, trio.reference, trio.float64):
            learner.schedule(min(1.0, (step + 1) / 10, 2 * (1 - step / settings.train_steps)))
        starts = torch.randint(len(corpus.train) - settings.length, (settings.rows, 1), generator=generator)
        batch = corpus.train[starts + torch.arange(settings.length + 1)].to(model.device)
        tokens, targets = batch[:, :-1], batch[:, 1:]

        # The whole of it: nothing else needs the logits, so the gradient may overwrite them.
        logits = logits_or_head(trio.fused.model, tokens, settings)
        loss = fused_losses.cross_entropy(logits, targets, inplace=settings.inplace, backend=settings.backend)

        trio.update(
            loss,
            reference.cross_entropy(trio.reference.model(tokens), targets),
            plain.cross_entropy(exact_logits(trio.float64.model, tokens, settings), targets),
        )
        progress.update()

    costs = measure_step(
        {
            "fused": lambda z: fused_losses.cross_entropy(
                z, targets, inplace=settings.inplace, backend=settings.backend
            ),
            "plain": lambda z: plain.cross_entropy(z, targets),
            "reference": lambda z: reference.cross_entropy(z, targets),
        },
        lambda z: plain.cross_entropy(z, targets),
        trio.fused.model,
        tokens,
        settings,
    )
    progress.update()
    return trio.fused.model, Result(trio.curves, costs)


@dataclass
class Rollout:
    tokens: Tensor  # prompt and completion
    targets: Tensor  # the completion, IGNORE after its end
    old_logprobs: Tensor
    advantages: Tensor
    mean_reward: float
    best: str  # completion

    def minibatch(self, rows: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """The model's input, and the loss's inputs besides the logits."""
        rows = rows.to(self.tokens.device)
        return self.tokens[rows, :-1], (self.targets[rows], self.old_logprobs[rows], self.advantages[rows])


@torch.no_grad()
def roll_out(
    model: Decoder, corpus: Corpus, prompts: list[Prompt], settings: Settings, generator: torch.Generator
) -> Rollout:
    """Sample a group of completions for each prompt, have Python judge them, compare each with its group."""
    repeated = [prompt for prompt in prompts for _ in range(settings.group)]
    tokens = torch.tensor([prompt.tokens for prompt in repeated], device=model.device)
    for _ in range(settings.completion_length):
        logits = model(tokens, logits_to_keep=1)[:, 0]
        cumulative = torch.softmax(logits / settings.temperature, dim=-1).cumsum(-1)
        uniform = torch.rand(len(tokens), 1, generator=generator).to(model.device)  # the same on every device
        sampled = torch.searchsorted(cumulative, uniform * cumulative[:, -1:])
        tokens = torch.cat([tokens, sampled.clamp_max(cumulative.shape[-1] - 1)], dim=1)

    targets = tokens[:, settings.prompt_length :].clone()
    end = (targets == corpus.end_token).int()
    targets[end.cumsum(1) > end] = IGNORE  # what follows the end is not part of the completion

    logits = logits_or_head(model, tokens[:, :-1], settings, settings.completion_length)
    old_logprobs = fused_losses.logprobs(logits, targets, temperature=settings.temperature, backend=settings.backend)

    completions = [corpus.tokenizer.decode([t for t in row if t != IGNORE]) for row in targets.tolist()]
    rewards = torch.tensor([reward(p.code, c) for p, c in zip(repeated, completions, strict=True)])
    grouped = rewards.view(-1, settings.group)
    advantages = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)
    advantages = advantages.view(-1, 1).to(model.device).expand_as(old_logprobs)
    best = int(rewards.argmax())
    return Rollout(tokens, targets, old_logprobs, advantages, rewards.mean().item(), completions[best])


def clip_fraction(logprobs: Tensor, targets: Tensor, old_logprobs: Tensor, advantages: Tensor) -> float:
    """The share of tokens that PPO gives no gradient."""
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ((advantages > 0) & (ratio > 1.2)) | ((advantages < 0) & (ratio < 0.8))
    return clipped[targets != IGNORE].float().mean().item()


def reinforcement(name: str, model: Decoder, corpus: Corpus, settings: Settings, progress: tqdm) -> Result:
    progress.set_description(name)
    trio = Trio(model, settings.policy_rate)
    generator = torch.Generator().manual_seed(settings.seed)
    fused_loss, reference_loss, plain_loss = (getattr(module, name) for module in (fused_losses, reference, plain))
    keep, temperature = settings.completion_length, settings.temperature
    judged, pool = corpus.prompts[: settings.judged_prompts], corpus.prompts[settings.judged_prompts :]

    def judge() -> float:
        same = torch.Generator().manual_seed(settings.seed)
        return roll_out(trio.fused.model, corpus, judged, settings, same).mean_reward

    rewards, clipped = [], []
    before = judge()
    for _ in range(settings.rollouts):
        prompts = [pool[i] for i in torch.randperm(len(pool), generator=generator)[: settings.prompts]]
        # The fused learner samples for all three: left to themselves, the first rounding that changes a token
        # would make them different runs.
        rollout = roll_out(trio.fused.model, corpus, prompts, settings, generator)
        rewards.append(rollout.mean_reward)
        for rows in torch.randperm(len(rollout.tokens), generator=generator).chunk(settings.minibatches):
            tokens, inputs = rollout.minibatch(rows)

            targets, old_logprobs, advantages = inputs
            loss, outputs = fused_loss(
                logits_or_head(trio.fused.model, tokens, settings, keep),
                targets,
                old_logprobs,
                advantages,
                temperature=temperature,
                reduction="mean",
                inplace=settings.inplace,
                return_outputs=True,
                backend=settings.backend,
            )

            eager = reference_loss(
                trio.reference.model(tokens, keep), *inputs, temperature=temperature, reduction="mean"
            )
            exact_input = exact_logits(trio.float64.model, tokens, settings, keep)
            exact = plain_loss(exact_input, *inputs, temperature=temperature)
            trio.update(loss, eager, exact)
            progress.update()
        clipped.append(clip_fraction(outputs.logprobs, *inputs))

    tokens, inputs = rollout.minibatch(torch.arange(settings.rows * settings.length // keep))  # tokens as in phase 1
    options = {"temperature": temperature, "reduction": "mean"}
    costs = measure_step(
        {
            "fused": lambda z: fused_loss(z, *inputs, **options, inplace=settings.inplace, backend=settings.backend),
            "plain": lambda z: plain_loss(z, *inputs, temperature=temperature),
            "reference": lambda z: reference_loss(z, *inputs, **options),
        },
        lambda z: plain_loss(z, *inputs, temperature=temperature),
        trio.fused.model,
        tokens,
        settings,
        keep,
    )
    progress.update()
    policy = Policy(rewards, before, judge(), sum(clipped) / len(clipped), rollout.best)
    return Result(trio.curves, costs, policy)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    parser.add_argument(
        "--backend", default="auto", help="of the fused losses: auto (default), cuda, triton, cpu, eager"
    )
    parser.add_argument(
        "--head",
        default="logits",
        choices=("logits", "linear"),
        help="what the fused losses are given: the model's logits (default), or its head, which then makes none",
    )
    parser.add_argument("--quick", action="store_true", help="a few steps on a few files")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the steps and rollouts (default 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output", help="folder for the picture")
    arguments = parser.parse_args()

    started = time.perf_counter()
    settings = QUICK if arguments.quick else Settings()
    settings = replace(
        settings,
        seed=arguments.seed,
        backend=arguments.backend,
        head=arguments.head,
        train_steps=max(1, round(arguments.scale * settings.train_steps)),
        rollouts=max(1, round(arguments.scale * settings.rollouts)),
    )
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(settings.seed)
    config = ModelConfig()

    losses = 1 + len(POLICY_LOSSES)
    updates = settings.train_steps + len(POLICY_LOSSES) * settings.rollouts * settings.minibatches
    with tqdm(total=updates + losses, desc="corpus", dynamic_ncols=True) as progress:  # one more to measure each
        corpus = load_corpus(config.vocab_size, settings.prompt_length, settings.files)
        if len(corpus.prompts) < settings.judged_prompts + settings.prompts:
            raise RuntimeError(f"too few prompts in the standard library's held-out files: {len(corpus.prompts)}")
        model = Decoder(config)
        model.start_from_frequencies(corpus.train)
        trained, result = supervised(model.to(device), corpus, settings, progress)
        results = {"cross_entropy": result}
        for name in POLICY_LOSSES:
            results[name] = reinforcement(name, trained, corpus, settings, progress)

    entries = corpus.tokenizer.get_vocab_size()
    parameters = sum(p.numel() for p in model.parameters())
    print(f"\nCorpus: {corpus.files} files of the standard library, {len(corpus.train):,} tokens to train on")
    print(f"Vocabulary: {config.vocab_size:,}, of which the tokenizer uses {entries:,}")
    print(f"Model: {parameters / 1e6:.1f} million parameters, {device}, {torch.get_num_threads()} CPU threads")
    print_tables(
        results,
        completions=settings.judged_prompts * settings.group,
        tokens=settings.rows * settings.length,
        head=settings.head,
    )
    path = arguments.output / "curves.png"
    plot(results, path)
    print(f"\nCurves: {path}")
    print(f"Total time: {time.perf_counter() - started:.0f} s\n\n{LIMITS}")
    failed = [name for name, r in results.items() if not r.agrees]
    if failed:
        print(f"\nFAILED: {', '.join(failed)} differ from eager by more than rounding explains", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
