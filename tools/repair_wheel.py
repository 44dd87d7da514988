"""Makes a Linux wheel that others can install of one that was built here: auditwheel finds the oldest glibc it runs on.

    python tools/repair_wheel.py WHEEL FOLDER

The wheel goes into FOLDER under its manylinux name. No copy of libgomp goes into it: the package imports torch before
its module, and torch brings a libgomp.so.1 whose threads the kernels share. Two OpenMP runtimes in a process would be
two pools of threads for the same cores. Refused: a wheel with the CUDA module, whose size and CUDA version most users
have no use for; one without the CPU module, which is what is left where no C++ compiler was found.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

SHARED_WITH_TORCH = "libgomp.so.1"


def refusal(wheel: Path) -> str | None:
    """Why the wheel is not for others, or None."""
    modules = {Path(name).name.split(".")[0] for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")}
    if "_cuda" in modules:
        return "it has the CUDA module: build it where no nvcc is found (CUDA_HOME, PATH, the nvidia-cuda-nvcc package)"
    if "_cpu" not in modules:
        return "it has no CPU module: build it where a C++ compiler is found (CXX, PATH)"
    return None


def bundled(wheel: Path) -> list[str]:
    """The libraries that auditwheel copied into it."""
    return [name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("fused_losses.libs/")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    if reason := refusal(options.wheel):
        sys.exit(f"{options.wheel.name}: {reason}")
    with tempfile.TemporaryDirectory() as folder:
        command = ["auditwheel", "repair", "--exclude", SHARED_WITH_TORCH, "--wheel-dir", folder, str(options.wheel)]
        if subprocess.run(command).returncode:
            return 1
        (repaired,) = Path(folder).glob("*.whl")
        if libraries := bundled(repaired):
            sys.exit(f"{options.wheel.name}: auditwheel copied {', '.join(libraries)} into it")
        options.folder.mkdir(parents=True, exist_ok=True)
        shutil.move(repaired, options.folder / repaired.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
