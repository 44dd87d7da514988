"""``python tests/adapters/stubbed.py FRAMEWORK``: its table, where it is installed without what it depends on.

Packages that the slots never call are stubs, and that for the whole process: so it is one of its own.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import Any

STUBS = {  # top-level packages, where they are not installed
    "verl": ("ray", "omegaconf", "tensordict", "hydra", "codetiming", "pylatexenc"),
    "skyrl": ("ray", "omegaconf", "loguru", "jaxtyping"),
    "torchtitan": ("spmd_types",),
    "axolotl": ("peft", "addict"),
    "openrlhf": ("ray", "deepspeed", "loralib", "flash_attn", "ring_flash_attn", "optree"),
}


class Anything:
    """Takes whatever it is made with; as a decorator it leaves what it decorates."""

    def __init__(self, *_: Any, **__: Any):
        self.made = True

    def __call__(self, *arguments: Any, **_: Any) -> Any:
        return arguments[0] if arguments and callable(arguments[0]) else Anything()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()


class Stub(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (Anything,), {"__module__": self.__name__})
        setattr(self, name, made)
        return made


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Last of all finders: what is installed is taken."""

    def __init__(self, packages: tuple[str, ...]):
        self.packages = packages

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] in self.packages:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        stub = Stub(spec.name)
        stub.__path__ = []  # a package, whatever is imported from below it
        return stub

    def exec_module(self, module: ModuleType) -> None:
        """It is empty."""


if __name__ == "__main__":
    (framework,) = sys.argv[1:]
    sys.meta_path.append(Stubs(STUBS.get(framework, ())))
    from fused_losses.adapters.__main__ import main

    sys.exit(main())
