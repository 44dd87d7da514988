"""What the demo found, as tables and as a picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from measure import Cost
from torch import Tensor

EPS = torch.finfo(torch.float32).eps
PARTED = 1e-4  # of the largest loss


@dataclass
class Policy:
    rewards: list[float]  # mean of each rollout
    before: float  # mean on the prompts kept apart
    after: float
    clip_fraction: float  # in the last update of a rollout
    completion: str  # the best of the last rollout


@dataclass
class Result:
    curves: dict[str, list[float]]  # the loss of every update: "fused", "reference", "float64"
    costs: dict[str, Cost]  # of a loss step: "fused", "plain", "reference"
    policy: Policy | None = None

    def distances(self, a: str, b: str) -> Tensor:
        x, y = (torch.tensor(self.curves[name], dtype=torch.float64) for name in (a, b))
        return (x - y).abs()

    @property
    def largest(self) -> float:
        return max(1.0, *(abs(loss) for loss in self.curves["float64"]))

    @property
    def judged(self) -> int:
        """The updates before eager float32 itself leaves the float64 curve: there is no one curve from there on."""
        parted = (self.distances("reference", "float64") > PARTED * self.largest).nonzero()
        return int(parted[0]) if len(parted) else len(self.curves["float64"])

    @property
    def allowed(self) -> float:
        """Ten times eager's own distance from float64: rounding takes every run another way, and about as far.

        The floor is 16 roundings of the largest loss, for runs too short to part.
        """
        eager = self.distances("reference", "float64")[: self.judged]
        return max(10 * eager.max().item() if len(eager) else 0.0, 16 * EPS * self.largest)

    @property
    def curves_agree(self) -> bool:
        within = bool((self.distances("fused", "float64")[: self.judged] <= self.allowed).all())  # NaN is not <=
        return self.judged > 0 and within

    @property
    def agrees(self) -> bool:
        """The curves as above; dlogits, on the same logits, within 3 times eager's error."""
        return self.curves_agree and self.costs["fused"].error <= 3 * self.costs["reference"].error + 16 * EPS


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    print(f"\n{title}\n")
    for row in (header, ["-" * width for width in widths], *rows):
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join(["", row[0].ljust(widths[0]), *cells[1:]]))


def print_tables(results: dict[str, Result], completions: int, tokens: int, head: str) -> None:
    header = ["loss", "updates", "first", "last", "fused-eager", "fused-float64", "eager-float64"]
    rows = []
    for name, r in results.items():
        losses = r.curves["fused"]
        row = [name, str(len(losses)), f"{losses[0]:.4f}", f"{losses[-1]:.4f}"]
        for pair in (("fused", "reference"), ("fused", "float64"), ("reference", "float64")):
            row.append(f"{r.distances(*pair).max().item():.1e}")
        rows.append([*row, str(r.judged), f"{r.allowed:.1e}", "agrees" if r.agrees else "DISAGREES"])
    print_table("Loss curves: the largest distance of two", [*header, "judged", "allowed", "verdict"], rows)
    exact = "the loss alone in float64, on float32 logits"
    if head == "linear":
        exact = "the loss and the head's products in float64, on float32 hidden states"
    print(f"  eager: the float32 reference; float64: {exact}")
    print("  allowed, for fused-float64: ten times eager-float64, since rounding takes every run another way")
    print("  judged: updates before eager itself leaves float64. PPO's gradient jumps where a ratio meets its bound:")
    print("  one token that rounding carries across parts the curves, whoever rounds")

    header = ["loss", *("fused", "plain", "reference") * 2, "fused", "reference"]
    rows = []
    for name, r in results.items():
        costs = [r.costs[k] for k in ("fused", "plain", "reference")]
        row = [name, *(f"{c.milliseconds:.1f} ms" for c in costs), *(f"{c.peak_bytes / 1e6:.1f} MB" for c in costs)]
        rows.append([*row, *(f"{r.costs[k].error:.1e}" for k in ("fused", "reference"))])
    if head == "linear":
        title = "Loss step with the head: median time, peak memory beyond its inputs, relative error of d(hidden)"
        what = "from hidden states to gradients of them and of the head"
        fused = "fused: logits in chunks"
    else:
        title = "Loss step: median time, peak memory beyond the logits, relative error of dlogits"
        what, fused = "from logits to dlogits", "fused: in place"
    print_table(title, header, rows)
    print(f"  {what}, {tokens} tokens; error: at most this for 99 % of the tokens; {fused}")
    print("  plain: as usually written in torch; reference: eager too, but written to be checked, not to be fast")

    header = ["loss", "before", "after", "clipped", "best completion of the last rollout"]
    rows = []
    for name, r in results.items():
        if r.policy is not None:
            p = r.policy
            rows.append([name, f"{p.before:.3f}", f"{p.after:.3f}", f"{p.clip_fraction:.0%}", repr(p.completion)])
    print_table(f"Mean reward, at most 1, of {completions} completions of prompts kept apart", header, rows)
    print("  clipped: share of tokens beyond PPO's clip in the last update of a rollout, whichever the loss")


def plot(results: dict[str, Result], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 6, figsize=(22, 7), layout="constrained")
    for (top, bottom), (name, r) in zip(axes.T, results.items(), strict=False):
        top.set_title(name)
        top.plot(r.curves["reference"], color="black", linewidth=3.0, alpha=0.35, label="eager reference")
        top.plot(r.curves["fused"], color="tab:orange", linewidth=1.0, label="fused")
        for curve, color in (("reference", "tab:gray"), ("fused", "tab:orange")):
            bottom.plot(r.distances(curve, "float64").tolist(), color=color, linewidth=1.0, label=curve)
        bottom.hlines(r.allowed, 0, r.judged, color="tab:red", linestyle="--", linewidth=1.0, label="allowed")
        bottom.set_yscale("log")
        bottom.set_xlabel("update")
    axes[0, 0].set_ylabel("loss")
    axes[1, 0].set_ylabel("distance from the float64 curve")
    axes[0, 0].legend()
    axes[1, 0].legend()

    rewards, times = axes[:, 5]
    for name, r in results.items():
        if r.policy is not None:
            rewards.plot(r.policy.rewards, label=name)
    rewards.set_title("mean reward")
    rewards.set_xlabel("rollout")
    rewards.legend()
    for shift, (kind, color) in enumerate((("fused", "tab:orange"), ("plain", "tab:blue"), ("reference", "tab:gray"))):
        places = [place + 0.27 * (shift - 1) for place in range(len(results))]
        bars = times.bar(places, [r.costs[kind].milliseconds for r in results.values()], 0.25, color=color, label=kind)
        times.bar_label(bars, fmt="%.3g", fontsize=7)
    times.set_title("loss step, milliseconds")
    times.set_xticks(range(len(results)), [name.replace("_", "\n") for name in results], fontsize=8)
    times.set_yscale("log")
    times.margins(y=0.25)  # room for the legend
    times.legend(ncols=3, loc="upper center", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


LIMITS = """\
What this does not show:
  - A useful model. It is tiny, sees some forty thousand tokens, and writes code that parses now and then.
  - That the reward is a good one. It asks whether Python can read a completion, not whether it makes sense.
  - Which policy loss is best. One seed, a few rollouts, no tuning, and the same learning rate for all.
  - Speed or memory elsewhere: float32 logits of this size on this machine, and the loss step without the
    model, so a whole update gains less. bench/ measures other sizes, dtypes and devices.
  - That two runs agree forever. Every update feeds rounding back; the picture shows how that grows here."""
