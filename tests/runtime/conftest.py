"""A real but tiny model, and real but tiny slides, made by code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from support import pyramid, stained, write_tiny_bundle

_MADE: dict[tuple[float | None, int, bool, int], bytes] = {}  # the same slides are asked for again and again


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with one strided convolution: uint8[N, 64, 64, 3] -> features float32[N, 12]."""
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture
def make_slide(tmp_path: Path) -> Callable[..., Path]:
    """Make a slide of 1024 x 768 px: `make_slide(name, mpp=0.5, levels=1, lossy=False, seed=0)`."""

    def make(
        name: str = "slide.tiff", mpp: float | None = 0.5, levels: int = 1, lossy: bool = False, seed: int = 0
    ) -> Path:
        key = (mpp, levels, lossy, seed)
        if key not in _MADE:
            pyramid(stained(768, 1024, seed), tmp_path / name, mpp, levels, lossy)
            _MADE[key] = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(_MADE[key])
        return tmp_path / name

    return make
