"""Compile the device code of csrc/cuda for the CPU with g++: for sweep.py through ctypes, for tests as a module."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
CXX = os.environ.get("CXX", "g++")
# Vectors are read through uint4, as CUDA allows; the bindings want hidden symbols.
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fno-strict-aliasing", "-fvisibility=hidden", "-Wno-unknown-pragmas"]
WATCH = ["-g", "-DFL_RACES"]
SANITIZE = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
LIBRARY = "_host_cuda.so"


def run(*command: object, **kwargs) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **kwargs)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def compile_object(folder: Path, source: str, *flags: object) -> Path:
    out = folder / f"{source}.o"
    run(CXX, *FLAGS, "-O0", *flags, "-c", HERE / source, "-o", out)
    return out


def entry(folder: Path) -> Path:
    """What does not depend on the device code."""
    return compile_object(folder, "entry.cpp")


def bindings(folder: Path) -> Path:
    import pybind11

    return compile_object(folder, "module.cpp", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}")


def races(folder: Path) -> Path:
    """The detector of races, to be linked with device code that is watched."""
    return compile_object(folder, "races.cpp", "-O2", *WATCH)


def build(
    folder: Path,
    *objects: Path,
    sanitize: bool = False,
    watch: bool = False,
    edit: tuple[str, str, str] | None = None,
) -> Path:
    """The library. watch: for races(). edit: (file in csrc, text that occurs once in it, its replacement)."""
    source = folder / "csrc"
    shutil.copytree(CSRC, source, ignore=shutil.ignore_patterns("cpu", "bindings*"))
    if edit:
        (source / edit[0]).write_text(edited(*edit))
    # most bugs are found sooner than code is optimised
    flags = [*FLAGS, *(SANITIZE if sanitize else ["-O0"] if edit else [])]
    device = folder / "device.o"
    watched = [*WATCH, "-fsanitize=thread"] if watch else []  # of which the linker is not told: races.cpp has it all
    run(CXX, *flags, *watched, f"-I{HERE}", f"-I{source}", "-c", HERE / "device.cpp", "-o", device)
    run(CXX, *flags, "-shared", *objects, device, "-o", folder / LIBRARY)
    return folder / LIBRARY


def located(message: str, library: Path) -> str:
    """What races.cpp says, with the lines of code that it means."""
    for offset in re.findall(r"at (\d+) (?:reads|writes|read|wrote)", message):
        message += run("addr2line", "-Cfie", library, hex(int(offset)))
    return message


def edited(file: str, old: str, new: str) -> str:
    text = (CSRC / file).read_text()
    assert text.count(old) == 1, f"{file} holds this {text.count(old)} times: {old}"
    return text.replace(old, new)


def sweep(
    library: Path, cases: Path, *, sanitize: bool = False, first: int | None = None
) -> subprocess.CompletedProcess:
    """Runs sweep.py in a process of its own: a bug in device code may end it. first: so many of the cases."""
    environment = dict(os.environ)
    if sanitize:
        # Python itself is not instrumented: the runtime must come first, with the library whose `throw` it wraps, and
        # Python's leaks are not ours.
        libraries = (run(CXX, f"-print-file-name={name}").strip() for name in ("libasan.so", "libstdc++.so"))
        environment["LD_PRELOAD"] = " ".join(libraries)
        environment["ASAN_OPTIONS"] = "detect_leaks=0:detect_stack_use_after_return=0"
    command = [sys.executable, HERE / "sweep.py", library, cases, *([] if first is None else [str(first)])]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
