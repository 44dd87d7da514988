"""A framework of four files, whose functions are replaced and put back."""

from __future__ import annotations

import importlib
import sys

import pytest

from fused_losses.adapters.slots import Slot, Slots

FILES = {
    "__init__": "",
    "losses": "def loss(logits, labels): ...\n\n\nclass Loss:\n    def forward(self, x): ...",
    "trainer": "from framework.losses import loss\nfrom framework.losses import loss as by_another_name",
    "late": "from framework.losses import loss",
    "broken": "import a_package_that_is_nowhere",
}
LOSS = Slot("framework.losses", "loss", ("logits", "labels"))
FORWARD = Slot("framework.losses", "Loss.forward", ("self", "x"))


def ours(logits, labels):
    return "ours"


def forward(self, x):
    return "ours"


@pytest.fixture
def framework(tmp_path, monkeypatch):
    package = tmp_path / "framework"
    package.mkdir()
    for name, text in FILES.items():
        (package / f"{name}.py").write_text(text + "\n")
    (tmp_path / "frameworks_user.py").write_text("from framework.losses import loss\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield importlib.import_module
    for name in [name for name in sys.modules if name.startswith("framework")]:
        del sys.modules[name]


@pytest.fixture
def slots():
    return Slots("a-framework", "1.0", {LOSS: ours, FORWARD: forward})


def test_everywhere_and_back(framework, slots):
    """In the module that defines it, in those that imported it by name, before and after; nowhere else."""
    losses, trainer, user = (framework(m) for m in ("framework.losses", "framework.trainer", "frameworks_user"))
    theirs, method = losses.loss, losses.Loss.forward
    slots.install()
    slots.install()
    late = framework("framework.late")
    assert (
        losses.loss is trainer.loss is trainer.by_another_name is late.loss is ours
        and losses.Loss().forward(0) == "ours"
    )
    assert user.loss is theirs  # another package's business
    slots.remove()
    slots.remove()
    assert (
        losses.loss is trainer.loss is trainer.by_another_name is late.loss is theirs and losses.Loss.forward is method
    )


def test_a_name_that_means_something_else_stays(framework, slots):
    trainer = framework("framework.trainer")
    trainer.loss = own = object()
    slots.install()
    assert trainer.loss is own
    slots.remove()
    assert trainer.loss is own


@pytest.mark.parametrize(
    "slot, why",
    [
        (Slot("framework.losses", "gone"), "it is not there"),
        (Slot("framework.losses", "Loss.gone"), "it is not there"),
        (Slot("framework.gone", "loss"), "its module does not import: No module named 'framework.gone'"),
        (Slot("framework.broken", "loss"), "its module does not import"),
        (Slot("framework.losses", "loss", ("logits", "targets")), r"it takes \('logits', 'labels'\), not"),
    ],
)
def test_moved(framework, slot, why):
    """By the slot's name and the framework's version; and then nothing is replaced."""
    losses = framework("framework.losses")
    theirs = losses.loss
    slots = Slots("a-framework", "1.0", {LOSS: ours, slot: ours})
    with pytest.raises(
        RuntimeError, match=f"a-framework None: {slot.module}.{slot.name} is not the slot .* 1.0: {why}"
    ):
        slots.install()
    assert losses.loss is theirs
    with pytest.raises(RuntimeError, match=why):
        slots.check()


def test_framework_that_is_not_installed():
    with pytest.raises(ModuleNotFoundError, match="nowhere_at_all"):
        Slots("nowhere", "1.0", {Slot("nowhere_at_all.losses", "loss"): ours}).install()


def test_replaced_by_somebody_else(framework, slots):
    losses = framework("framework.losses")
    slots.install()
    losses.loss = somebody = object()
    with pytest.raises(RuntimeError, match=r"framework\.losses\.loss was replaced after fused_losses"):
        slots.remove()
    assert losses.loss is somebody and losses.Loss.forward is forward
    losses.loss = ours
    slots.remove()
    assert losses.Loss.forward is not forward
