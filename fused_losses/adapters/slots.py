"""A framework's functions, replaced by one call and put back by another."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple


class Slot(NamedTuple):
    """What an adapter replaces, by where the framework looks it up."""

    module: str
    name: str  # dotted where it is in a class: "PolicyLoss.forward"
    parameters: tuple[str, ...] | None = None  # by which the framework calls it, in order; None: not looked at
    importers: tuple[str, ...] = ()  # modules that have the name too, once imported: they import it from this one


class Slots:
    """The slots of one framework, each with what goes into it."""

    def __init__(self, distribution: str, made_for: str, replacements: Mapping[Slot, Any]):
        """distribution: the name of the package as installed. made_for: its version that the slots were read from."""
        self.distribution, self.made_for = distribution, made_for
        self.replacements = replacements
        self.originals: dict[Slot, Any] = {}  # of what is installed now

    def install(self) -> None:
        """Put each replacement into its slot, all or none. A second call changes nothing.

        Raises:
            ImportError: the framework is not installed.
            RuntimeError: a slot is not where it was, or takes other arguments; the message names it and the version.
        """
        if self.originals:
            return
        found = {slot: self.found(slot) for slot in self.replacements}
        for slot, replacement in self.replacements.items():
            setattr(*_holder(slot), replacement)
            for importer in _having(slot, found[slot]):
                setattr(importer, slot.name, replacement)
        self.originals = found

    def remove(self) -> None:
        """Put back what was there before. Without an installation it changes nothing.

        Raises:
            RuntimeError: somebody else has replaced a slot since; the message names it. Nothing is put back.
        """
        for slot in self.originals:
            if _value(slot) is not self.replacements[slot]:
                raise RuntimeError(
                    f"{slot.module}.{slot.name} was replaced after fused_losses had been installed there"
                )
        for slot, original in self.originals.items():
            setattr(*_holder(slot), original)
            for importer in _having(slot, self.replacements[slot]):  # imported since, some of them
                setattr(importer, slot.name, original)
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


def rebind(package: str, old: Any, new: Any) -> None:
    """Bind to ``new`` every name that is bound to ``old`` in the loaded modules of ``package``: those of a slot's value
    that was imported by name."""
    for name, module in list(sys.modules.items()):
        if name == package or name.startswith(f"{package}."):
            for key in [key for key, value in vars(module).items() if value is old]:
                setattr(module, key, new)


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


def _having(slot: Slot, value: Any) -> Iterator[Any]:
    """The slot's importers that have been imported and hold the value. Those still to come get what the slot holds."""
    for name in slot.importers:
        module = sys.modules.get(name)
        if module is not None and getattr(module, slot.name, None) is value:
            yield module


def _value(slot: Slot) -> Any:
    holder, name = _holder(slot)
    # as it is stored: a function of a class, not bound, and a static method still one
    return inspect.getattr_static(holder, name) if inspect.isclass(holder) else getattr(holder, name)
