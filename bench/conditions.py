"""Under which conditions a number was measured: part of every record. No host name and no path."""

from __future__ import annotations

import datetime
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

_ROOT = Path(__file__).resolve().parent.parent
# What a benchmark writes itself doesn't make the code that it measured another one.
_WRITTEN = ("bench/results", "docs/plots", "docs/measured.md", "docs/adapters", "README.md")
_NOT_CODE = tuple(f":(exclude){path}" for path in _WRITTEN)


def conditions(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    cuda = device.type == "cuda"
    cpu = _cpu_model()
    dirty = _git("status", "--porcelain", "--", ".", *_NOT_CODE)
    return {
        "device": torch.cuda.get_device_name(device) if cuda else cpu,
        "device_type": device.type,
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "driver": _driver() if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "torch": torch.__version__,
        "triton": _triton(),
        "python": platform.python_version(),
        "commit": commit or _git("rev-parse", "--short=10", "HEAD") or "unknown",
        "dirty": bool(dirty) if dirty is not None and not commit else None,  # whoever names the commit knows
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def file_name(conditions: dict[str, Any]) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", conditions["device"].lower()).strip("-")
    if conditions["device_type"] == "cpu":
        slug += f"-{conditions['threads']}-threads"
    return f"{conditions['date'][:10]}-{slug}-{conditions['commit']}.jsonl"


def _git(*arguments: str) -> str | None:
    """Output of git in this repository; None outside one."""
    try:
        done = subprocess.run(["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.machine()


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _triton() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__
