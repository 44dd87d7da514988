"""Which build this is: how it came onto this machine, and from what its compiled modules were made."""

from __future__ import annotations

import json
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from .backends import cpu, cuda

PACKAGE = Path(__file__).resolve().parent
WHEEL = "wheel"  # for others' machines; what pip makes of sources, for this one alone, is a build from source


def installation() -> str:
    """One line: a wheel and its tag, a build from source, an editable install, or none at all."""
    described = (_describe(distribution) for distribution in distributions(name="fused-losses"))
    return next(filter(None, described), f"not installed: {PACKAGE.parent} is on the path")


def _describe(distribution: Distribution) -> str:
    """How these files were installed, or "" where the distribution is of other files."""
    wheel = distribution.read_text("WHEEL")
    if wheel is None:  # what a build leaves beside its sources
        return ""
    if Path(str(distribution.locate_file(PACKAGE.name))).resolve() != PACKAGE:
        return f"editable, {PACKAGE.parent}" if _source(distribution) == PACKAGE.parent else ""
    tags = [line.removeprefix("Tag:").strip() for line in wheel.splitlines() if line.startswith("Tag:")]
    return f"{WHEEL if any('manylinux' in tag for tag in tags) else 'built from source'}, {', '.join(tags)}"


def _source(distribution: Distribution) -> Path | None:
    """The folder that an editable install points to."""
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    if not origin.get("dir_info", {}).get("editable"):
        return None
    return Path(url2pathname(urlsplit(origin["url"]).path)).resolve()


def modules() -> dict[str, dict[str, Any] | None]:
    """Of the cpu and cuda backends: commit, compiler and flags, and what they were compiled for; None: not there.

    A module from before there was a ``build`` in it, in a checkout that has moved on, says the rest alone.
    """
    described: dict[str, dict[str, Any] | None] = {"cpu": None, "cuda": None}
    if module := cpu.BACKEND.module:
        sets = {"instruction_sets": module.instruction_sets(), "in_use": module.instruction_set_in_use()}
        described["cpu"] = {**getattr(module, "build", {}), **sets}
    if module := cuda.BACKEND.module:
        described["cuda"] = {**getattr(module, "build", {}), "architectures": module.architectures.split(";")}
    return described
