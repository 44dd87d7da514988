"""Before and after a change: two commits' records side by side, as Markdown.

    python bench/compare.py BEFORE AFTER

BEFORE and AFTER are commits as in the names of the files of bench/results. What one of them has no record of is left
out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from cells import FLOOR_OF, MODES, by_number, conditions_line, label, markdown, number
from records import KEY, RESULTS, Record, distinct, last, read, where

Pair = tuple[Record, Record]


def of_commit(folder: Path, commit: str) -> list[Record]:
    """The records of a commit in the order in which they were measured."""
    found = [r for path in folder.glob("*.jsonl") for r in read(path) if r["commit"].startswith(commit[:10])]
    return sorted(found, key=lambda r: r["date"])


def paired(sides: Iterable[list[Record]], key: Callable[[Record], Any]) -> list[Pair]:
    """The records that both have, in the order of those after."""
    before, after = sides
    old = {key(r): r for r in before}
    return [(old[key(r)], r) for r in after if key(r) in old]


def times(pairs: list[Pair]) -> str:
    """Medians, and what they are in units of the floor of their own run, which a slower day slows as well."""
    rows = []
    for old, new in pairs:
        floor = f"ratio_to_{FLOOR_OF.get(new['mode'], 'read')}"
        in_floors = f"{number(old[floor])}, {number(new[floor])}" if old.get(floor) and new.get(floor) else "-"
        milliseconds = [f"{number(r['median_ms'])} ms" for r in (old, new)]
        what = f"{new['case']} {new['dtype']}, {new['loss']}"
        name = label(new["contender"], new["backend"], new["mode"])
        rows.append([what, name, *milliseconds, f"{new['median_ms'] / old['median_ms']:.2f}", in_floors])
    return markdown(["case", "", "before", "after", "after / before", "in units of the floor"], rows)


def overhead(pairs: list[Pair]) -> str:
    def us(record: Record) -> list[str]:
        return [f"{record['median_ms'] * 1e3:.0f} us", f"{record['overhead_us']:.0f} us"]

    rows = [[f"{new['loss']}, N = 1 ({new['backend']})", *us(old), *us(new)] for old, new in pairs]
    return markdown(["", "call, before", "interface, before", "call, after", "interface, after"], rows)


def machine_code(pairs: list[Pair]) -> str:
    """Every loop over vectors: instructions per element."""
    loops = [(old, new, loop) for old, new in pairs for loop in new["instructions_per_element"]]
    names = {loop_name(new, loop): None for _, new, loop in loops}
    architectures = by_number(new["architecture"] for _, new in pairs)
    cells = {}
    for old, new, loop in loops:
        before, after = (r["instructions_per_element"].get(loop) for r in (old, new))
        text = f"{'-' if before is None else f'{before:.2f}'} → {after:.2f}"
        cells[loop_name(new, loop), new["architecture"]] = text
    rows = [[*name, *(cells.get((name, a), "-") for a in architectures)] for name in names]
    return markdown(["kernel", "row", "dtype", "loop", *(a for a in architectures)], rows)


def loop_name(record: Record, loop: str) -> tuple[str, str, str, str]:
    return (kernel(record), record["transform"] or "plain", record["dtype"], loop)


def kernel(record: Record) -> str:
    """Up to 1b7d36006b a kernel with terms had another name, and not only another transform."""
    return record["kernel"].removeprefix("terms_")


def suite(pairs: list[Pair]) -> str:
    rows = [
        [when, f"{r['seconds']:.0f} s", str(r["workers"]), ", ".join(f"{n} {what}" for what, n in r["counts"].items())]
        for pair in pairs
        for when, r in zip(("before", "after"), pair, strict=True)
    ]
    return markdown(["test suite", "wall", "workers", ""], rows)


def tables(before: str, after: str, results: Path = RESULTS) -> list[str]:
    """One after the other, each with the conditions of both sides under it."""
    texts = []
    old, new = (last(of_commit(results, commit)) for commit in (before, after))
    for device, threads in distinct(new, "device", "threads"):
        here = [where(records, device=device, threads=threads, status=("ok", "inexact")) for records in (old, new)]
        pairs = paired(here, key=lambda r: tuple(r[k] for k in KEY))
        fused = [p for p in pairs if p[1]["contender"].startswith("fused")]
        timed = [p for p in fused if p[1]["mode"] in MODES or p[1]["group"] in ("statistics", "head", "shard")]
        public = [p for p in pairs if p[1]["group"] == "overhead" and p[1].get("overhead_us")]
        for table, shown in ((times, timed), (overhead, public)):
            if shown:
                texts += [table(shown), *(conditions_line([pair[side] for pair in shown]) for side in (0, 1))]

    def loop(record: Record) -> tuple[str, ...]:
        return (record["architecture"], kernel(record), record["dtype"], record["transform"])

    for folder, table, key in (("machine_code", machine_code, loop), ("suite", suite, lambda r: r["workers"])):
        pairs = paired((of_commit(results / folder, commit) for commit in (before, after)), key)
        if pairs:
            texts.append(table(pairs))
    return texts


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before")
    parser.add_argument("after")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    texts = tables(options.before, options.after, options.results)
    if not texts:
        print(f"no measurement that both {options.before} and {options.after} have", file=sys.stderr)
        return 1
    print(f"Before: {options.before}. After: {options.after}.\n")
    print("\n\n".join(texts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
