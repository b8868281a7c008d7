"""TensorRT on a GPU. Everything here needs one, with its driver and one of the two libraries."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mtdp_runtime.backends import backend_class
from mtdp_runtime.backends.proof import run_backend
from mtdp_runtime.bundle import Bundle, file_ref, load_bundle, write_manifest
from mtdp_runtime.bundle.golden import load_golden
from mtdp_runtime.bundle.tolerance import MIN_COSINE, cosines
from mtdp_runtime.errors import BackendError
from support import TILE_PX

pytestmark = pytest.mark.gpu
BATCH = 8


@pytest.fixture(params=["tensorrt", "tensorrt-rtx", "onnxruntime-cuda", "onnxruntime-tensorrt"])
def name(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A GPU rung that this machine has, with an empty cache."""
    probe = backend_class(request.param).probe()
    if not probe.usable:
        pytest.skip(f"needs a GPU with {request.param}: {probe.reason}")
    monkeypatch.setenv("MTDP_CACHE", str(tmp_path / "cache"))
    return str(request.param)


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    return load_bundle(tiny_bundle)


def random_tiles(count: int) -> NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, (count, TILE_PX, TILE_PX, 3), np.uint8)


def test_it_computes_what_the_reference_computes(name: str, bundle: Bundle) -> None:
    tiles = random_tiles(5 * BATCH + 3)
    with backend_class("onnxruntime").load(bundle, "fp32", BATCH, 2) as reference:
        expected = run_backend(reference, tiles)["features"]
    with backend_class(name).load(bundle, "fp32", BATCH, 2) as engine:
        got = run_backend(engine, tiles)["features"]
    assert cosines(got, expected).min() >= MIN_COSINE["fp32"]


def test_batches_in_flight_come_back_in_order_and_the_same_bytes_each_time(name: str, bundle: Bundle) -> None:
    batches = [random_tiles(40 * BATCH)[n * BATCH : (n + 1) * BATCH] for n in range(40)]
    with backend_class(name).load(bundle, "fp32", BATCH, 2) as engine:
        alone = [engine.result(engine.submit(batch))["features"] for batch in batches]
        tickets: list[int] = []
        together = []
        for batch in batches:
            if len(tickets) == engine.depth:
                together.append(engine.result(tickets.pop(0))["features"])
            tickets.append(engine.submit(batch))
        together += [engine.result(ticket)["features"] for ticket in tickets]
    np.testing.assert_array_equal(together, alone)


def test_the_second_start_takes_the_cached_engine_and_a_damaged_one_is_rebuilt(
    name: str, bundle: Bundle, tmp_path: Path
) -> None:
    if name.startswith("onnxruntime"):
        pytest.skip("keeps no engine of its own")
    load = backend_class(name).load
    with load(bundle, "fp32", BATCH, 2) as engine:
        assert "built now" in engine.note
    with load(bundle, "fp32", BATCH, 2) as engine:
        assert "built now" not in engine.note
    (file,) = (tmp_path / "cache" / "engines").glob("*.engine")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with load(bundle, "fp32", BATCH, 2) as engine:
        assert "it is damaged" in engine.note
        assert "built now" in engine.note


def test_closing_gives_the_memory_back(name: str, bundle: Bundle) -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    load = backend_class(name).load
    load(bundle, "fp32", BATCH, 2).close()  # what the library itself keeps is there from now on
    free_bytes = runtime.cudaMemGetInfo()[1]
    for _ in range(5):
        load(bundle, "fp32", 512, 2).close()
    assert free_bytes - runtime.cudaMemGetInfo()[1] < 16 << 20


def test_a_model_that_does_not_prove_itself_computes_nothing(name: str, bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(bundle.path, folder)
    tiles, outputs = load_golden(folder / "golden.npz")
    np.savez(folder / "golden.npz", tiles=tiles, features=outputs["features"][:, ::-1])
    write_manifest(folder, replace(bundle.manifest, golden=file_ref(folder, "golden.npz")))
    with pytest.raises(BackendError, match="does not compute this model"):
        backend_class(name).load(load_bundle(folder), "fp32", BATCH, 2)
