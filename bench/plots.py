"""The plots of docs/plots: forward and backward beside a copy of the logits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from cells import ROW, in_order, label, number
from records import Device, Record, distinct, where
from tables import main_cases

BLUE, SKY, GREY, LIGHT = "#0072B2", "#56B4E9", "#7F7F7F", "#BFBFBF"  # tell apart with any colour vision


def plot(device: Device, path: Path) -> None:
    """A panel per case, loss and dtype: forward and backward as multiples of the copy."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = [
        r for r in where(device, group="fwd+bwd", status=("ok", "inexact")) if r["contender"] not in ("read", "mul_")
    ]
    if records and records[0]["device_type"] == "cuda":  # eager's bar, 14 copies long, would make all others look alike
        records = [r for r in records if r["contender"] != "eager"]
    cases = main_cases(records) or where(records, loss="cross_entropy")
    shown = distinct(cases, "case", "loss", "dtype")[:8]
    if not shown:
        return
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    bars = max(len(where(records, case=c, loss=lo, dtype=d)) for c, lo, d in shown)
    size = (5.4 * columns, rows * (0.8 + 0.3 * bars))
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis, (case, loss, dtype) in zip(axes.flat, shown, strict=False):
        panel = where(records, case=case, loss=loss, dtype=dtype)
        order = in_order(distinct(panel, *ROW))
        draw(axis, [where(panel, **dict(zip(ROW, row, strict=True)))[-1] for row in order])
        axis.set_title(f"{loss}, {case}, {dtype}", loc="left", fontsize=10)
    for axis in list(axes.flat)[len(shown) :]:
        axis.set_visible(False)
    newest = max(records, key=lambda r: r["date"])
    threads = f", {newest['threads']} threads" if newest["device_type"] == "cpu" else ""
    figure.suptitle(
        "Forward and backward, time / time of grad.copy_(logits)\n"
        f"{newest['device']}{threads}, torch {newest['torch']}, commit {newest['commit']}, {newest['date'][:10]}",
        fontsize=10,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)


def draw(axis: Any, bars: list[Record]) -> None:
    """Horizontal bars with p20 to p80 as whiskers and the value beside each."""
    ends = []
    for y, r in enumerate(bars):
        ratio, copy = r["ratio_to_copy"], r["median_ms"] / r["ratio_to_copy"]
        colour = LIGHT if r["mode"] == "floor" else GREY
        if r["contender"] == "fused":
            colour = BLUE if r["mode"] == "inplace" else SKY
        axis.barh(y, ratio, color=colour, height=0.72)
        axis.plot([r["p20_ms"] / copy, r["p80_ms"] / copy], [y, y], color="black", linewidth=1)
        ends.append(max(ratio, r["p80_ms"] / copy))
        text = f"{number(ratio)}x  {number(r['median_ms'])} ms"
        axis.annotate(text, (ends[-1], y), (4, 0), textcoords="offset points", va="center", fontsize=8)
    names = [label(*(r[field] for field in ROW)) for r in bars]
    axis.set_yticks(range(len(bars)), [re.sub(r"[*`]", "", name) for name in names], fontsize=8)
    axis.invert_yaxis()
    axis.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axis.set_xlim(0, max(ends) * 1.4)
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
