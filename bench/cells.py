"""What stands in a table or beside a bar: names, numbers, and the line that says how they were measured."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from records import Record, distinct, where

NO_VALUE = "-"
INEXACT = "†"
YARDSTICK = " (cross entropy instead)"  # F.cross_entropy beside another loss

ROW = ("contender", "backend", "mode", "same_loss")  # what a line of a table or a bar of a plot stands for
MODES = {
    "inplace": "in place",
    "separate": "own gradient",
    "reused": "own gradient, reused",
    "forward": "forward only",
    "two_phase": "two phase",
}
FLOORS = {"mul_": "`logits.mul_(s)`", "copy": "`grad.copy_(logits)`", "clone": "`logits.clone()`", "read": "read"}
# The floor that moves the same bytes through the same kind of memory. CUDA has no fresh pages to fault in: copy there.
FLOOR_OF = {"inplace": "mul", "separate": "clone", "reused": "copy", "forward": "read", "two_phase": "clone"}


def who(contender: str, backend: str | None, same_loss: bool = True) -> str:
    return f"**fused_losses** ({backend})" if contender == "fused" else contender + ("" if same_loss else YARDSTICK)


def label(contender: str, backend: str | None, mode: str, same_loss: bool = True) -> str:
    if mode == "floor":
        return f"floor: {FLOORS[contender]}"
    name = who(contender, backend, same_loss or mode == "inplace")  # no yardstick works in place
    return f"{name}, {MODES.get(mode, mode)}" if contender == "fused" or mode == "inplace" else name


def in_order(rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """This library first, by mode; floors last; the others between, in the order of the records."""

    def key(row: tuple[Any, ...]) -> tuple[bool, int]:
        contender, _, mode, _ = row
        return mode == "floor", list(MODES).index(mode) if contender == "fused" else len(MODES)

    return sorted(rows, key=key)


def by_number(architectures: Iterable[str]) -> list[str]:
    """sm_80 before sm_100"""
    return sorted(set(architectures), key=lambda a: int(re.sub(r"\D", "", a)))


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2 if value >= 0.9995 else 3}f}"


def cell(found: list[Record], render: Callable[[Record], str | None], even_if_wrong: bool = False) -> str:
    if not found:
        return NO_VALUE
    record = found[-1]
    if record["status"] not in ("ok", "inexact") and not (even_if_wrong and record["status"] == "wrong"):
        return record["status"]  # a time of something wrong is no time
    text = render(record)
    if text is None:
        return NO_VALUE
    return f"{text} {INEXACT}" if record["status"] == "inexact" and not even_if_wrong else text


def time_and_speedup(record: Record) -> str:
    text = f"{number(record['median_ms'])} ms"
    if record.get("speedup") and record["contender"] != "eager":
        text += f", {number(record['speedup'])}x"
    return text


def time_and_floor(record: Record) -> str:
    ratio = record.get("ratio_to_read" if record["mode"] == "forward" else "ratio_to_copy")
    return f"{number(record['median_ms'])} ms" + (f" ({ratio:.2f})" if ratio else "")


def floor_ratio(record: Record) -> str | None:
    ratio = record.get(f"ratio_to_{FLOOR_OF[record['mode']]}")
    return None if ratio is None else f"{number(ratio)}"


def megabytes(record: Record) -> str:
    return f"{number(record['peak_bytes'] / 1e6)} MB"


def mebibytes(field: str) -> Callable[[Record], str]:
    return lambda record: f"{record[field] / 2**20:.0f} MiB"


def milliseconds(field: str) -> Callable[[Record], str]:
    return lambda record: f"{number(record[field])} ms"


def error(field: str) -> Callable[[Record], str | None]:
    return lambda record: None if record.get(field) is None else f"{record[field]:.1e}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    ruler = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ruler, *rows))


def conditions_line(records: list[Record]) -> str:
    """The line under a table that says what its numbers are numbers of."""
    newest = max(records, key=lambda r: r["date"])
    parts = [newest["device"]]
    if newest["device_type"] == "cpu":
        parts.append(f"{newest['threads']} threads")
        if newest.get("touched_gb"):
            parts.append(f"{newest['touched_gb']:g} GB of memory touched before")
    else:
        parts.append(f"driver {newest['driver']}, CUDA {newest['cuda']}")
    parts.append(f"torch {newest['torch']}, triton {newest['triton']}, Python {newest['python']}")
    if newest.get("framework_version"):
        parts.append(f"{newest['framework']} {newest['framework_version']}")
    changed = " with uncommitted changes" if newest["dirty"] else ""
    commits = ", ".join(c for (c,) in distinct(sorted(records, key=lambda r: r["date"], reverse=True), "commit"))
    parts.append(f"commit {commits}{changed}, {newest['date'][:10]}")
    counts = [n for (n,) in distinct(records, "repeats")]
    repeats = " or ".join(map(str, counts)) if len(counts) <= 2 else f"{min(counts)} to {max(counts)}"
    parts.append(f"medians of {repeats} interleaved repeats")
    if where(records, status="inexact"):
        parts.append(f"{INEXACT} the gradient at some target is off by more than 5 %")
    if newest["device_type"] == "cuda" and newest.get("absent"):
        parts.append(f"not installed: {', '.join(newest['absent'])}")
    return f"<sub>{'; '.join(parts)}.</sub>"
