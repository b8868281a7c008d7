"""A real but tiny model, and real but tiny slides, made by code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from support import pyramid, stained, write_tiny_bundle


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture
def make_slide(tmp_path: Path) -> Callable[[], Path]:
    return lambda: pyramid(stained(768, 1024), tmp_path / "slide.tiff", 0.5, 1)
