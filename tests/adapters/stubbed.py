"""``python tests/adapters/stubbed.py FRAMEWORK [TESTS.py]``: its table, or tests of it, where it is installed without
what it depends on.

Packages that the slots never call are stubs, and that for the whole process: so it is one of its own.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import Any

STUBS = {  # top-level packages, where they are not installed
    "verl": ("ray", "omegaconf", "tensordict", "hydra", "codetiming", "pylatexenc", "peft"),
    "skyrl": ("ray", "omegaconf", "loguru", "jaxtyping", "cloudpathlib", "skyrl_gym", "flash_attn", "peft"),
    "torchtitan": ("vllm",),
    "ms_swift": (
        *("modelscope", "peft", "json_repair", "requests", "urllib3", "bitsandbytes", "einops", "aiohttp", "dacite"),
        *("msgspec", "trl"),  # of trl what is not in its newest releases, which ms-swift does not take
    ),
    "axolotl": ("peft", "addict"),
    "openrlhf": ("ray", "deepspeed", "peft", "flash_attn", "ring_flash_attn", "pylatexenc"),
}
BARE = {  # packages whose own __init__ is not run, as it imports what the slots do not need
    "skyrl": ("skyrl.backends",),
}


class Made(type):
    """Of classes: what a stub is asked for may be a module, from which things are then taken."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()


class Anything(metaclass=Made):
    """Takes whatever it is made with, or in brackets; as a decorator it leaves what it decorates."""

    def __class_getitem__(cls, _: Any) -> type[Anything]:
        return cls

    def __init__(self, *_: Any, **__: Any):
        self.made = True

    def __bool__(self) -> bool:
        """Asked whether it is there, or initialised: no."""
        return False

    def __call__(self, *arguments: Any, **_: Any) -> Any:
        return arguments[0] if arguments and callable(arguments[0]) else Anything()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()

    def __getitem__(self, _: Any) -> Any:
        return Anything()

    def __fspath__(self) -> str:
        return "nowhere"


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


def stub(framework: str) -> None:
    """For the rest of the process."""
    sys.meta_path.append(Stubs(STUBS.get(framework, ())))
    bare(*BARE.get(framework, ()))


def bare(*packages: str) -> None:
    """Their modules can be imported, and they themselves are empty."""
    for name in packages:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        package = ModuleType(name)
        package.__path__ = list(spec.submodule_search_locations or ())
        sys.modules[name] = package


if __name__ == "__main__":
    framework, *tests = sys.argv[1:]
    stub(framework)
    if tests:
        import pytest

        sys.exit(pytest.main([*tests, "-p", "no:cacheprovider"]))
    from fused_losses.adapters.__main__ import main

    sys.argv = [__file__, framework]
    sys.exit(main())
