"""Builds two extension modules that know nothing of torch's headers or ABI.

``fused_losses._cpu`` is built wherever there is a C++ compiler, ``fused_losses._cuda`` wherever there is nvcc. A
missing tool is a notice; a compiler error is a failed install that shows the compiler's own message.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
COMMIT = ROOT / "commit.txt"  # a source distribution has it, which has no repository
CUDA_ARCHITECTURES = ("80", "90a", "100")  # machine code; the newest as PTX, too, for what comes after it
NVCC_FLAGS = ["-std=c++17", "-O3", "-cudart", "static", "-Xcompiler=-fPIC,-fvisibility=hidden", "--threads", "2"]
# Vectors of 512 bits never cross a call, so their calling convention (psabi) does not matter; the other is a warning of
# GCC about its own intrinsics.
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wno-psabi", "-Wno-maybe-uninitialized"]
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]  # Apple's clang has none


def find_compiler() -> list[str] | None:
    """CXX as it is, launcher and flags included ("ccache g++"); else what built Python, else a usual name."""
    if words := shlex.split(os.environ.get("CXX", "")):
        if not shutil.which(words[0]):
            raise SystemExit(f"fused_losses: CXX={os.environ['CXX']!r}: there is no program {words[0]!r}")
        return words
    usual = [*(sysconfig.get_config_var("CXX") or "").split()[:1], "c++", "g++", "clang++"]
    return next(([name] for name in usual if shutil.which(name)), None)


def find_nvcc() -> Path | None:
    """CUDA_HOME, then PATH, then the nvidia-cuda-nvcc package of the environment that is installed into."""
    candidates = []
    if home := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        candidates.append(Path(home, "bin", "nvcc"))
    if found := shutil.which("nvcc"):
        candidates.append(Path(found))
    for entry in [*sys.path, sysconfig.get_paths()["purelib"]]:  # under build isolation the latter is not on the path
        candidates += [Path(p) for p in sorted(glob(str(Path(entry, "nvidia", "cu*", "bin", "nvcc"))), reverse=True)]
    return next((c for c in candidates if c.is_file()), None)


def commit() -> str:
    """Which sources these are: a hash, with -dirty where files differ from it; "" where nothing tells."""
    if COMMIT.is_file():
        return COMMIT.read_text().strip()
    if git("rev-parse", "--show-toplevel") != str(ROOT):  # another project's, in which this folder lies
        return ""
    return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def git(*words: str) -> str:
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def notice(message: str) -> None:
    print(f"fused_losses: {message}", file=sys.stderr, flush=True)


class Build(build_ext):
    """Compiles by itself: nvcc is no compiler that setuptools knows, and objects beside each other shorten the wait."""

    def build_extension(self, extension: Extension) -> None:
        commands, link, output = extension.plan(Path(self.build_temp), Path(self.get_ext_fullpath(extension.name)))
        output.parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(self.parallel or os.cpu_count() or 1) as pool:
            for done in pool.map(start, commands):
                check(done)
        check(start(link))


class Sdist(sdist):
    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        Path(base_dir, COMMIT.name).write_text(f"{commit()}\n")


def start(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


def check(done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode != 0:
        raise SystemExit(f"fused_losses: this command failed:\n{' '.join(done.args)}\n{done.stdout}")
    if done.stdout.strip():
        notice(done.stdout.strip())


class Native(Extension):
    """An extension that plans its own commands: (compile commands, link command, output)."""

    def __init__(self, name: str, units: list[tuple[str, list[str]]], compiler: list[str], nvcc: Path | None = None):
        """units: (source, its own flags); a source may be compiled more than once."""
        super().__init__(name, sorted({source for source, _ in units}))
        self.units, self.compiler, self.nvcc = units, compiler, nvcc

    def plan(self, temporary: Path, output: Path) -> tuple[list[list[str]], list[str], Path]:
        temporary = temporary.absolute() / self.name
        temporary.mkdir(parents=True, exist_ok=True)
        include = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
        commands, objects = [], []
        for number, (source, flags) in enumerate(self.units):
            objects.append(str(temporary / f"{number}.o"))
            head = [str(self.nvcc), *NVCC_FLAGS] if source.endswith(".cu") else [*self.compiler, *CXX_FLAGS, *include]
            commands.append([*head, *flags, "-c", source, "-o", objects[-1]])
        if self.nvcc:
            link = [str(self.nvcc), "-shared", "-cudart", "static", *self.nvcc_libraries(), *objects, "-o", str(output)]
        else:
            link = [*self.compiler, "-shared", *OPENMP, *objects, "-o", str(output)]
            if sys.platform == "darwin":
                link += ["-undefined", "dynamic_lookup"]
        return commands, link, output

    def nvcc_libraries(self) -> list[str]:
        """The packaged toolkit keeps libcudart_static.a in lib, where its nvcc does not look."""
        assert self.nvcc is not None
        library = self.nvcc.resolve().parent.parent / "lib"
        return [f"-L{library}"] if (library / "libcudart_static.a").is_file() else []


def about(compiler: list[str], flags: list[str]) -> list[str]:
    """Definitions for csrc/build.h. The compiler's own name may be a path, of which a wheel says nothing."""
    strings = {"FL_COMMIT": commit(), "FL_FLAGS": " ".join([*compiler[1:], *CXX_FLAGS, *flags])}
    return [f"-D{name}={json.dumps(text)}" for name, text in strings.items()]


def cpu_units(compiler: list[str]) -> list[tuple[str, list[str]]]:
    """What sees the vocabulary is compiled for each instruction set; the machine's is picked at run time."""
    vocab = {"vocab_baseline": []}
    if platform.machine().lower() in ("x86_64", "amd64"):
        vocab["vocab_avx2"] = ["-mavx2", "-mfma"]
        vocab["vocab_avx512"] = [*vocab["vocab_avx2"], "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
    return [
        ("csrc/bindings_cpu.cpp", about(compiler, OPENMP)),
        ("csrc/cpu/instruction_sets.cpp", []),
        ("csrc/cpu/launch.cpp", OPENMP),
        *(("csrc/cpu/vocab.cpp", [f"-DFL_VOCAB={table}", *flags]) for table, flags in vocab.items()),
    ]


def cuda_units(compiler: list[str], nvcc: Path) -> list[tuple[str, list[str]]]:
    architectures = known_architectures(nvcc)
    define = f'-DFL_CUDA_ARCHITECTURES="{";".join(architectures)}"'
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    newest = architectures[-1].rstrip("a")  # PTX with the a runs on that architecture alone
    flags.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cuda/*.cu"))
    bindings = ("csrc/bindings_cuda.cpp", [define, *about(compiler, [])])
    return [*((source, [define, *flags]) for source in sources), bindings]


def known_architectures(nvcc: Path) -> list[str]:
    """An older nvcc stops at an architecture that it does not know. What is left out gets PTX, as what comes after."""
    done = subprocess.run([str(nvcc), "--list-gpu-code"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    codes = done.stdout.split()
    known = [a for a in CUDA_ARCHITECTURES if f"sm_{a.rstrip('a')}" in codes]
    if done.returncode != 0 or not known:
        raise SystemExit(
            f"fused_losses: {nvcc} compiles for none of sm_{', sm_'.join(CUDA_ARCHITECTURES)}, or does not run: "
            f"update it, or hide it from CUDA_HOME and PATH\n{done.stdout}"
        )
    if left_out := [a for a in CUDA_ARCHITECTURES if a not in known]:
        notice(f"{nvcc} does not know sm_{', sm_'.join(left_out)}: such a GPU compiles the kernels at their first use")
    return known


def extensions() -> list[Native]:
    compiler, nvcc = find_compiler(), find_nvcc()
    if compiler is None:
        notice("no C++ compiler found: installing without the cpu and cuda backends (Triton and eager remain)")
        return []
    modules = [Native("fused_losses._cpu", cpu_units(compiler), compiler)]
    if nvcc is None:
        notice("no nvcc found (CUDA_HOME, PATH, the nvidia-cuda-nvcc package): installing without the cuda backend")
    else:
        modules.append(Native("fused_losses._cuda", cuda_units(compiler, nvcc), compiler, nvcc))
    return modules


setup(ext_modules=extensions(), cmdclass={"build_ext": Build, "sdist": Sdist})
