"""The tiny model of the runtime's tests, and slides that take a tenth of a second."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from crew import OPTIONS, content, write_cohort
from shim import build_shim
from support import extract, pyramid, stained, write_tiny_bundle

_MADE: dict[tuple[int, int, int], bytes] = {}  # the same slides are asked for again and again


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with one strided convolution: uint8[N, 64, 64, 3] -> features float32[N, 12]."""
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture
def make_slide(tmp_path: Path) -> Callable[..., Path]:
    """Make a slide of 512 x 384 px, JPEG: `make_slide(name, seed=0)`."""

    def make(name: str = "slide.tiff", seed: int = 0, height: int = 384, width: int = 512) -> Path:
        key = (height, width, seed)
        if key not in _MADE:
            pyramid(stained(height, width, seed), tmp_path / name, 0.5, 2, lossy=True)
            _MADE[key] = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(_MADE[key])
        return tmp_path / name

    return make


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """faults.c, built."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc builds the faults, and is not installed")
    return build_shim(tmp_path_factory.mktemp("shim"))


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slides that several workers share."""
    return write_cohort(tmp_path_factory.mktemp("cohort") / "slides", big=3, small=4)


@pytest.fixture(scope="module")
def whole(slides: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What one worker makes of them."""
    out = tmp_path_factory.mktemp("whole") / "o"
    result = extract(slides, "--model", tiny_bundle, "--out", out, *OPTIONS)
    assert result.returncode == 0, result.stderr
    return content(out)
