"""All of these run on Triton: skipped where it does not, on tiles that the interpreter can bear."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fused_losses.backends import triton as backend


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from triton_cases import DEVICE, small_tiles

    reason = backend.BACKEND.unusable(DEVICE)
    if reason is not None:
        pytest.skip(reason)
    small_tiles(monkeypatch)
    backend._walk.cache_clear()
    yield
    backend._walk.cache_clear()
