"""A framework's functions, replaced by one call and put back by another."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple


class Slot(NamedTuple):
    """What an adapter replaces, by where the framework looks it up."""

    module: str
    name: str  # dotted where it is in a class: "PolicyLoss.forward"
    parameters: tuple[str, ...] | None = None  # by which the framework calls it, in order; None: not looked at


class Slots:
    """The slots of one framework, each with what goes into it."""

    def __init__(self, distribution: str, made_for: str, replacements: Mapping[Slot, Any]):
        """distribution: the name of the package as installed. made_for: its version that the slots were read from."""
        self.distribution, self.made_for = distribution, made_for
        self.replacements = replacements
        self.originals: dict[Slot, Any] = {}  # of what is installed now

    def install(self) -> None:
        """Put each replacement into its slot, all or none, and into the framework's modules that have imported it by
        name; those that import it later get what the slot holds. A second call changes nothing.

        Raises:
            ImportError: the framework is not installed.
            RuntimeError: a slot is not where it was, or takes other arguments; the message names it and the version.
        """
        if self.originals:
            return
        found = {slot: self.found(slot) for slot in self.replacements}
        for slot, replacement in self.replacements.items():
            _put(slot, found[slot], replacement)
        self.originals = found

    def remove(self) -> None:
        """Put back what was there before, also in modules that were imported since. Without an installation it
        changes nothing.

        Raises:
            RuntimeError: somebody else has replaced a slot since; the message names it. Nothing is put back.
        """
        for slot in self.originals:
            if _value(slot) is not self.replacements[slot]:
                raise RuntimeError(
                    f"{slot.module}.{slot.name} was replaced after fused_losses had been installed there"
                )
        for slot, original in self.originals.items():
            _put(slot, self.replacements[slot], original)
        self.originals = {}

    def check(self) -> None:
        """Raise, as :meth:`install` does, where a slot is not what the adapter was made for."""
        for slot in self.replacements:
            self.found(slot)

    def found(self, slot: Slot) -> Any:
        """What is in the slot."""
        try:
            value = _value(slot)
        except ImportError as error:
            if isinstance(error, ModuleNotFoundError) and error.name == slot.module.partition(".")[0]:
                raise
            raise self._moved(slot, f"its module does not import: {error}") from error
        except AttributeError as error:
            raise self._moved(slot, "it is not there") from error
        if slot.parameters is not None:
            parameters = tuple(inspect.signature(value).parameters)
            if parameters != slot.parameters:
                raise self._moved(slot, f"it takes {parameters}, not {slot.parameters}")
        return value

    def _moved(self, slot: Slot, why: str) -> RuntimeError:
        return RuntimeError(
            f"{self.distribution} {installed(self.distribution)}: {slot.module}.{slot.name} is not the slot that this "
            f"adapter was made for, with {self.distribution} {self.made_for}: {why}"
        )


def installed(distribution: str) -> str | None:
    """The version, or None."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _holder(slot: Slot) -> tuple[Any, str]:
    *classes, name = slot.name.split(".")
    holder: Any = importlib.import_module(slot.module)
    for part in classes:
        holder = getattr(holder, part)
    return holder, name


def _put(slot: Slot, before: Any, value: Any) -> None:
    setattr(*_holder(slot), value)
    if "." in slot.name or before is None:  # None is the value of many names
        return
    package = slot.module.partition(".")[0]
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] == package:
            names = getattr(module, "__dict__", {})
            for name in [name for name, held in names.items() if held is before]:
                setattr(module, name, value)


def _value(slot: Slot) -> Any:
    holder, name = _holder(slot)
    # as it is stored: a function of a class, not bound, and a static method still one
    return inspect.getattr_static(holder, name) if inspect.isclass(holder) else getattr(holder, name)
