"""The records of bench/results: lines of JSON, a file per run. What was measured again counts as measured last."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"

Record = dict[str, Any]
Device = list[Record]  # the records of one device, all from one file

# What makes two records the same measurement: the later one counts.
KEY = ("case", "loss", "group", "dtype", "contender", "backend", "mode")


def read(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def last(records: Iterable[Record]) -> list[Record]:
    """Of each measurement the last."""
    return list({tuple(r[k] for k in KEY): r for r in records}.values())


def load(files: Iterable[Path]) -> dict[str, list[Device]]:
    """{"cpu": [records of a device, ...], "cuda": ...}: per device, number of threads, case and dtype the newest
    file."""
    newest: dict[tuple[str, str, int], dict[tuple[str, str], tuple[str, Device]]] = {}
    for path in files:
        records = last(read(path))
        if not records:
            continue
        date = max(r["date"] for r in records)
        cases = newest.setdefault((records[0]["device_type"], records[0]["device"], records[0]["threads"]), {})
        for case, dtype in distinct(records, "case", "dtype"):
            if (case, dtype) not in cases or cases[case, dtype][0] < date:
                cases[case, dtype] = (date, where(records, case=case, dtype=dtype))
    devices: dict[str, list[Device]] = {"cpu": [], "cuda": []}
    for (device_type, *_), cases in sorted(newest.items()):
        devices[device_type].append([record for _, records in cases.values() for record in records])
    return devices


def where(records: Iterable[Record], **wanted: Any) -> list[Record]:
    """The records whose fields are as wanted; a tuple means any of these."""

    def fits(record: Record) -> bool:
        return all(record[k] in v if isinstance(v, tuple) else record[k] == v for k, v in wanted.items())

    return [record for record in records if fits(record)]


def distinct(records: Iterable[Record], *fields: str) -> list[tuple[Any, ...]]:
    """The different values of some fields, in the order of the records."""
    return list(dict.fromkeys(tuple(r[f] for f in fields) for r in records))
