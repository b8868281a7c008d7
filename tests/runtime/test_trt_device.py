"""One GPU with an engine, on a CUDA that is acted out in host memory (fake_cuda): order, graphs, memory, refusals.

What this shows is the order of the calls and who owns what, not that a GPU does the same: test_tensorrt_gpu.py does.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fake_cuda import FakeCudart, FakeTrt
from mtdp_runtime.backends.gpus import Gpu
from mtdp_runtime.backends.tensorrt.cuda import CudaDevice
from mtdp_runtime.backends.tensorrt.engine_source import Plan
from mtdp_runtime.backends.tensorrt.slots import Slots, with_room
from mtdp_runtime.errors import BackendError, DeviceOutOfMemory, EngineRejected
from mtdp_runtime.files import read_with_digest, save_with_digest

BATCH, TILE_PX = 4, 3
GPU = Gpu(0, "RTX of the test", "8.9")
GOOD = Plan(b"good engine", "the test")


def device(
    cudart: FakeCudart,
    plan: Plan = GOOD,
    batch: int = BATCH,
    library: str = "tensorrt-rtx",
    kernels: Path | None = None,
) -> CudaDevice:
    return CudaDevice(library, GPU, plan, batch, TILE_PX, kernels, cudart, FakeTrt(cudart))


@pytest.mark.parametrize("library", ["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize("capture_fails", [False, True])
@given(devices=st.integers(1, 3), sizes=st.lists(st.integers(1, BATCH), max_size=12), data=st.data())
def test_numbers_are_right_however_late_the_gpu_works(
    library: str, capture_fails: bool, devices: int, sizes: list[int], data: st.DataObject
) -> None:
    cudarts = [FakeCudart(capture_fails=capture_fails) for _ in range(devices)]
    opened = [device(cudart, library=library) for cudart in cudarts]
    slots = Slots(opened)
    rng = np.random.default_rng(len(sizes))
    in_flight = []

    def take() -> None:
        ticket, tiles = in_flight.pop(0)
        features = slots.result(ticket)["features"]
        np.testing.assert_array_equal(features[:, 0], tiles[:, 0, 0, 0])
        np.testing.assert_array_equal(features[:, 1], tiles.reshape(len(tiles), -1).sum(axis=1))

    for rows in sizes:
        while in_flight and (len(in_flight) == slots.depth or data.draw(st.booleans())):
            take()
        tiles = rng.integers(0, 256, (rows, TILE_PX, TILE_PX, 3), np.uint8)
        in_flight.append((slots.submit(tiles), tiles))
    while in_flight:
        take()
    assert sum(cudart.launches for cudart in cudarts) == (0 if capture_fails else len(sizes))
    assert all(("no CUDA graphs" in "".join(one.notes)) == capture_fails for one in opened)
    slots.close()
    assert [(len(cudart.memory), len(cudart.held)) for cudart in cudarts] == [(0, 0)] * devices


def test_closing_waits_for_what_is_in_flight_and_gives_everything_back() -> None:
    cudart = FakeCudart()
    slots = Slots([device(cudart)])
    slots.submit(np.ones((BATCH, TILE_PX, TILE_PX, 3), np.uint8))
    assert cudart.memory
    slots.close()
    assert (cudart.memory, cudart.held) == ({}, set())
    slots.close()  # again is harmless


@given(st.integers(0, 6000))
def test_without_room_nothing_is_kept(room_bytes: int) -> None:
    """Wherever the memory ends: activations, input, outputs, of the first slot or of the second."""
    cudart = FakeCudart(room_bytes)
    try:
        device(cudart).close()
    except DeviceOutOfMemory:
        assert room_bytes < 4000 + 4 * BATCH * TILE_PX * TILE_PX * 3 + 4 * BATCH * 2 * 4
    assert (cudart.memory, cudart.held) == ({}, set())


def test_the_batch_is_halved_until_it_fits() -> None:
    cudart = FakeCudart(room_bytes=10_000)
    opened, batch, note = with_room(lambda size: device(cudart, batch=size), 32)
    assert (batch, note) == (8, "batch 8, not 32: the GPU has no memory for more")
    opened.close()
    assert not cudart.memory


def test_an_engine_that_the_library_refuses_is_rejected_in_its_words() -> None:
    cudart = FakeCudart()
    with pytest.raises(EngineRejected, match="it cannot be deserialised: magic tag does not match"):
        device(cudart, Plan(b"bad", "the test"))
    with pytest.raises(EngineRejected, match="it takes no batch of 128 tiles"):
        device(cudart, batch=128)
    assert not cudart.memory


def test_a_runtime_that_cannot_start_cuda_is_an_error_of_ours() -> None:
    cudart = FakeCudart()
    trt = FakeTrt(cudart)
    trt.Runtime = FakeTrt.Runtime_without_cuda  # type: ignore[method-assign]
    with pytest.raises(BackendError, match="tensorrt-rtx cannot start its runtime: CUDA initialization failure"):
        CudaDevice("tensorrt-rtx", GPU, GOOD, BATCH, TILE_PX, None, cudart, trt)
    assert not cudart.memory


def test_kernels_that_the_library_does_not_give_are_not_kept(tmp_path: Path) -> None:
    cudart = FakeCudart()
    trt = FakeTrt(cudart)
    trt.kernels_of_this_gpu = None
    CudaDevice("tensorrt-rtx", GPU, GOOD, BATCH, TILE_PX, tmp_path / "x.jit", cudart, trt).close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "damaged", "note"),
    [(b"kernels", False, ""), (b"kernels", True, "it is damaged"), (b"others", False, "of another GPU or driver")],
)
def test_compiled_kernels_are_kept_and_taken_or_made_anew(
    tmp_path: Path, content: bytes, damaged: bool, note: str
) -> None:
    file = tmp_path / "x.jit"
    save_with_digest(file, content)
    if damaged:
        file.write_bytes(file.read_bytes()[:-1])
    opened = device(FakeCudart(), kernels=file)
    assert bool(opened.notes) == bool(note)
    assert note in "".join(opened.notes)
    opened.close()
    assert read_with_digest(file) == (b"kernels", "")
