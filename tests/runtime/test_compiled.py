"""A compiled model that is kept computes what a new one does, bit for bit, and is relied on only where it is right."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mtdp_runtime.backends import openvino_cache
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


class TestReadingEarly:
    """While the rest of the program is imported: only what is kept, and nothing is heard of it but its speed."""

    def test_what_was_read_early_is_what_is_loaded(
        self, cache: Path, compiles: list[str], heads: Bundle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = outputs(heads)
        OpenVINO.read_early(heads.path, "fp32", 2, 1)
        openvino_cache._early[0].join()
        monkeypatch.setattr(openvino_cache, "_read", lambda *args: pytest.fail("read a second time"))
        assert same(first, outputs(heads))
        assert len(compiles) == 1

    @pytest.mark.parametrize("precision", ["auto", "fp32"])
    def test_it_is_the_one_that_the_same_question_loads(
        self, cache: Path, compiles: list[str], heads: Bundle, precision: str
    ) -> None:
        outputs(heads, precision=precision)
        OpenVINO.read_early(heads.path, precision, 2, 1)
        openvino_cache._early[0].join()
        assert len(openvino_cache._read_early) == 1
        before = len(compiles)
        outputs(heads, precision=precision)
        assert openvino_cache._read_early == {}
        assert len(compiles) == before

    def test_another_batch_or_number_of_threads_is_another_model(
        self, cache: Path, compiles: list[str], heads: Bundle
    ) -> None:
        outputs(heads, batch=2)
        OpenVINO.read_early(heads.path, "fp32", 2, 1)
        outputs(heads, batch=3)
        assert len(compiles) == 2
        assert openvino_cache._read_early == {}, "nothing that is not used is kept in memory"

    def test_nothing_is_compiled_early(self, cache: Path, compiles: list[str], heads: Bundle) -> None:
        OpenVINO.read_early(heads.path, "fp32", 2, 1)
        openvino_cache._early[0].join()
        assert compiles == []
        assert not cache.exists()
        outputs(heads)
        assert len(compiles) == 1

    def test_what_goes_wrong_early_is_said_where_the_model_is_loaded(
        self, cache: Path, heads: Bundle, tmp_path: Path, recwarn: pytest.WarningsRecorder
    ) -> None:
        OpenVINO.read_early(tmp_path / "no bundle", "fp32", 2, 1)
        OpenVINO.read_early(heads.path, "int8", 2, 1)
        outputs(heads)
        assert list(recwarn) == []
        for kept in cache.glob("*.blob"):
            kept.write_bytes(b"damaged")
        OpenVINO.read_early(heads.path, "fp32", 2, 1)
        outputs(heads)


def test_two_threads_import_openvino_whole() -> None:
    code = """
from concurrent.futures import ThreadPoolExecutor
from mtdp_runtime.backends.telemetry import import_openvino
with ThreadPoolExecutor(4) as pool:
    print([hasattr(found.result(), "Core") for found in [pool.submit(import_openvino) for _ in range(4)]])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[True, True, True, True]", done.stderr
