"""A compiled model that is kept computes what a new one does, bit for bit, and is relied on only where it is right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mtdp_runtime.backends.openvino import OpenVINO
from mtdp_runtime.backends.openvino_cache import _MOST_KEPT
from mtdp_runtime.backends.proof import run_backend
from mtdp_runtime.backends.telemetry import import_openvino
from mtdp_runtime.bundle import Bundle, default_bundle_path, load_bundle
from mtdp_runtime.bundle.manifest import Head
from mtdp_runtime.files import save_with_digest
from support import write_tiny_bundle

CORE = import_openvino().Core


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MTDP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "compiled"


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that were compiled, by file name."""
    seen: list[str] = []

    class Core(CORE):  # type: ignore[misc, valid-type]
        def read_model(self, file: Path) -> object:
            seen.append(file.name)
            return super().read_model(file)

    monkeypatch.setattr(import_openvino(), "Core", Core)
    return seen


@pytest.fixture
def heads(tmp_path: Path) -> Bundle:
    return load_bundle(write_tiny_bundle(tmp_path / "heads", (Head("lung", ("aca", "n", "scc")),)))


def outputs(
    bundle: Bundle, batch: int = 2, threads: int = 1, precision: str = "fp32"
) -> dict[str, NDArray[np.float32]]:
    side = bundle.manifest.tile_px
    tiles = np.random.default_rng(0).integers(0, 256, (3, side, side, 3), np.uint8)
    with OpenVINO.load(bundle, precision, batch, threads) as engine:
        return run_backend(engine, tiles)


def same(a: dict[str, NDArray[np.float32]], b: dict[str, NDArray[np.float32]]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_a_model_is_compiled_once(heads: Bundle, cache: Path, compiles: list[str]) -> None:
    first = outputs(heads)
    assert {"features", "probabilities_lung"} <= first.keys()
    assert same(first, outputs(heads))
    assert compiles == ["model.fp32.onnx"]
    assert [file.suffix for file in cache.iterdir()] == [".blob"]


def test_the_packaged_model_is_the_same_bit_for_bit(cache: Path, compiles: list[str]) -> None:
    bundle = load_bundle(default_bundle_path())
    assert same(outputs(bundle, threads=2), outputs(bundle, threads=2))
    assert len(compiles) == 1


@pytest.mark.parametrize("other", [{"batch": 3}, {"threads": 2}])
def test_another_batch_or_number_of_threads_is_another_model(
    tiny_bundle: Path, cache: Path, compiles: list[str], other: dict[str, int]
) -> None:
    bundle = load_bundle(tiny_bundle)
    outputs(bundle)
    outputs(bundle, **other)
    assert len(compiles) == len(list(cache.iterdir())) == 2


def test_another_cpu_is_another_model(
    tiny_bundle: Path, cache: Path, compiles: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = load_bundle(tiny_bundle)
    outputs(bundle)
    monkeypatch.setattr("mtdp_runtime.backends.openvino.cpuinfo", lambda: "flags\t\t: fpu sse2\n")
    outputs(bundle)
    assert len(compiles) == 2


def test_a_kept_model_that_is_damaged_is_compiled_again(tiny_bundle: Path, cache: Path, compiles: list[str]) -> None:
    bundle = load_bundle(tiny_bundle)
    right = outputs(bundle)
    (kept,) = cache.iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-1] + b"?")  # its digest is wrong
    assert same(outputs(bundle), right)
    save_with_digest(kept, whole[65:-100])  # OpenVINO's own check is what is left
    assert same(outputs(bundle), right)
    assert same(outputs(bundle), right)
    assert len(compiles) == 3, "mended"


def test_nothing_is_relied_on_where_others_may_write(tiny_bundle: Path, cache: Path, compiles: list[str]) -> None:
    bundle = load_bundle(tiny_bundle)
    outputs(bundle)
    cache.chmod(0o777)
    outputs(bundle)
    assert len(compiles) == 2


def test_without_a_place_to_keep_it_the_model_runs(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MTDP_CACHE", str(tmp_path / "file"))
    assert "features" in outputs(load_bundle(tiny_bundle))


def test_the_oldest_make_room(tiny_bundle: Path, cache: Path) -> None:
    bundle = load_bundle(tiny_bundle)
    for batch in range(1, _MOST_KEPT + 4):
        outputs(bundle, batch)
    assert len(list(cache.iterdir())) == _MOST_KEPT
