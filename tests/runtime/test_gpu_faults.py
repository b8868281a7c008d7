"""What goes wrong on GPUs, acted out: no driver, an old one, no memory, late faults; and the way where all works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import fake_gpu
from fake_cuda import FakeCudart, FakeTrt, Status
from mtdp_runtime.backends import backend_class, load
from mtdp_runtime.backends.gpus import TOO_OLD, Gpu, call, gpus
from mtdp_runtime.backends.proof import run_backend
from mtdp_runtime.backends.tensorrt.cuda import CudaDevice
from mtdp_runtime.backends.tensorrt.engine_source import SerializedEngine
from mtdp_runtime.backends.tensorrt.slots import Slots
from mtdp_runtime.bundle import Bundle, load_bundle
from mtdp_runtime.bundle.engine_key import Wanted, misfit
from mtdp_runtime.errors import BackendError, BackendUnavailable, DeviceOutOfMemory
from support import TILE_PX

GPU = Gpu(0, fake_gpu.CARD, "8.9")
BATCH = 4


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.setenv("MTDP_CACHE", str(tmp_path / "cache"))
    return load_bundle(tiny_bundle)


@pytest.fixture
def cudart(monkeypatch: pytest.MonkeyPatch) -> FakeCudart:
    return fake_gpu.install(monkeypatch)


def tiles(count: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, TILE_PX, TILE_PX, 3), np.uint8)


def device(cudart: FakeCudart, trt: FakeTrt | None = None, kernels: Path | None = None) -> CudaDevice:
    plan = SerializedEngine(b"good engine", "the test")
    return CudaDevice(
        "tensorrt-rtx", GPU, plan, batch=BATCH, tile_px=3, kernels=kernels, cudart=cudart, trt=trt or FakeTrt(cudart)
    )


class TestTheWholeWay:
    @pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx", "onnxruntime-cuda", "onnxruntime-tensorrt"])
    @pytest.mark.parametrize("count", [1, 3])
    def test_features_are_those_of_the_reference(
        self, name: str, count: int, bundle: Bundle, cudart: FakeCudart
    ) -> None:
        cudart.devices = count
        some = tiles(3 * BATCH + 1)
        with backend_class("onnxruntime").load(bundle, "fp32", BATCH, 1) as reference:
            expected = run_backend(reference, some)["features"]
        with backend_class(name).load(bundle, "auto", BATCH, 1) as engine:
            np.testing.assert_allclose(run_backend(engine, some)["features"], expected, rtol=1e-5)
            assert engine.depth == 2 * (count if name.startswith("tensorrt") else 1)
        assert (cudart.memory, cudart.held, cudart.last_error) == ({}, set(), Status.cudaSuccess)

    def test_auto_takes_the_gpu_and_the_second_start_its_engine(self, bundle: Bundle, cudart: FakeCudart) -> None:
        for built in (True, False):
            engine, reason = load("auto", bundle, "auto", BATCH, 1)
            with engine:
                assert engine.name.startswith("tensorrt 0.0.fake")
                assert fake_gpu.CARD in reason
                assert ("built now" in engine.note) == built

    def test_the_callers_tiles_are_its_own_again_after_submit(self, bundle: Bundle, cudart: FakeCudart) -> None:
        """The acted GPU copies as late as CUDA allows: what is read then must be ours alone."""
        some = tiles(BATCH)
        with backend_class("tensorrt").load(bundle, "fp32", BATCH, 1) as engine:
            expected = engine.result(engine.submit(some))["features"]
            mine = some.copy()
            ticket = engine.submit(mine)
            mine[:] = 0
            np.testing.assert_array_equal(engine.result(ticket)["features"], expected)


class TestNoGpu:
    @pytest.mark.parametrize(
        ("status", "driver", "message", "hint"),
        [
            (Status.cudaErrorInsufficientDriver, 0, "no NVIDIA GPU or driver", "Install NVIDIA's driver"),
            (
                Status.cudaErrorInsufficientDriver,
                12040,
                "NVIDIA's driver is too old: it serves CUDA 12.4, this is built for CUDA 13.0",
                "Update NVIDIA's driver (580 and later serve CUDA 13",
            ),
            (Status.cudaErrorNoDevice, 13000, "no NVIDIA GPU or driver (cudaErrorNoDevice)", "CUDA_VISIBLE_DEVICES"),
            (Status.cudaSuccess, 13000, "no NVIDIA GPU or driver (CUDA counts none)", "MIG is on and has no instance"),
        ],
    )
    def test_says_what_is_wrong_and_what_to_do(
        self,
        status: Status,
        driver: int,
        message: str,
        hint: str,
        cudart: FakeCudart,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(cudart, "cudaGetDeviceCount", lambda: (status, 0))
        monkeypatch.setattr(cudart, "cudaDriverGetVersion", lambda: (Status.cudaSuccess, driver))
        with pytest.raises(BackendUnavailable) as caught:
            gpus()
        assert str(caught.value).startswith(message)
        assert hint in caught.value.hint
        probe = backend_class("tensorrt").probe()
        assert not probe.usable
        assert message in probe.reason
        assert hint in probe.hint

    def test_a_gpu_before_turing_is_refused_with_what_runs_on_it(
        self, cudart: FakeCudart, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        volta = [Gpu(0, "Tesla V100", "7.0")]
        monkeypatch.setattr("mtdp_runtime.backends.tensorrt.backend.gpus", lambda: volta)
        probe = backend_class("tensorrt-rtx").probe()
        assert (probe.usable, probe.reason) == (False, "Tesla V100 has compute capability 7.0, 7.5 is needed")
        assert probe.hint == TOO_OLD

    def test_an_instance_of_a_gpu_is_another_type_of_gpu(self) -> None:
        """An engine tuned on the whole of it would be a bad one, and may not fit into its memory."""
        whole = Wanted("tensorrt", "11.0", "a" * 64, "fp16", 64, 16, "NVIDIA H200", "9.0")
        part = Wanted("tensorrt", "11.0", "a" * 64, "fp16", 64, 16, "NVIDIA H200 MIG 1g.18gb", "9.0")
        assert misfit(whole.own_key(), part) == "built for NVIDIA H200, this is NVIDIA H200 MIG 1g.18gb"


class TestFaults:
    def test_a_want_of_memory_is_not_found_again_by_the_next_kernel(self) -> None:
        cudart = FakeCudart(room_bytes=10)
        with pytest.raises(DeviceOutOfMemory):
            call(cudart, cudart.cudaMalloc(11))
        assert cudart.last_error == Status.cudaSuccess

    def test_a_fault_of_a_kernel_ends_the_run_and_nothing_of_it_is_kept(self, tmp_path: Path) -> None:
        cudart = FakeCudart()
        kept = tmp_path / "x.jit"
        slots = Slots([device(cudart, kernels=kept)])
        ticket = slots.submit(np.zeros((BATCH, 3, 3, 3), np.uint8))
        cudart.faulted = True
        with pytest.raises(BackendError, match="CUDA: cudaErrorIllegalAddress") as caught:
            slots.result(ticket)
        assert "a new process" in caught.value.hint
        with pytest.raises(BackendError):
            slots.submit(np.zeros((BATCH, 3, 3, 3), np.uint8))
        slots.close()
        assert (cudart.memory, cudart.held) == ({}, set())
        assert not kept.exists(), "kernels of a GPU in a broken state were kept"

    def test_memory_that_the_machine_cannot_lock_is_no_fault_of_the_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cudart = FakeCudart()
        none = (Status.cudaErrorMemoryAllocation, None)
        monkeypatch.setattr(cudart, "cudaHostAlloc", lambda size, flags: none, raising=False)
        with pytest.raises(DeviceOutOfMemory, match="the machine has too little memory to lock"):
            device(cudart)
        assert (cudart.memory, cudart.held) == ({}, set())

    def test_a_batch_that_is_refused_in_a_capture_leaves_no_graph_and_no_stream_in_capture(self) -> None:
        cudart = FakeCudart()
        trt = FakeTrt(cudart)
        opened = device(cudart, trt)
        context = opened._context
        assert context is not None
        context.execute_async_v3 = lambda stream: False
        with pytest.raises(BackendError, match="a batch was refused"):
            opened._capture(opened._slots[0])
        assert cudart.capturing is None
        opened.close()
        assert (cudart.memory, cudart.held) == ({}, set())


class Session:
    """ONNX Runtime with room for batches of `room`."""

    def __init__(self, session: Any, room: int, message: str) -> None:
        self.get_outputs = session.get_outputs
        self.session, self.room, self.message = session, room, message

    def run(self, names: Any, given: dict[str, NDArray[np.uint8]]) -> Any:
        if len(given["tiles"]) > self.room:
            raise RuntimeError(self.message)
        return self.session.run(names, given)


class TestOnnxRuntime:
    MEMORY = "Non-zero status code: CUDA failure 2: out of memory\n ; GPU=0"

    def install(self, monkeypatch: pytest.MonkeyPatch, room: int, message: str = MEMORY) -> None:
        fake_gpu.install(monkeypatch)
        from mtdp_runtime.backends import onnxruntime as rung

        opened = rung.strict_session
        monkeypatch.setattr(rung, "strict_session", lambda file, given: Session(opened(file, given), room, message))

    def test_without_room_the_batch_is_halved_and_that_is_said(
        self, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.install(monkeypatch, room=10)
        with backend_class("onnxruntime-cuda").load(bundle, "fp32", 32, 1) as engine:
            assert (engine.batch, engine.note) == (8, "batch 8, not 32: the GPU has no memory for more")

    def test_no_room_at_all_is_one_line(self, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
        self.install(monkeypatch, room=0)
        with pytest.raises(DeviceOutOfMemory, match="out of memory") as caught:
            backend_class("onnxruntime-cuda").load(bundle, "fp32", 32, 1)
        assert "\n" not in str(caught.value)

    def test_a_gpu_that_its_build_does_not_know_is_named_as_that(
        self, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.install(monkeypatch, 0, "CUDA error 209: no kernel image is available for execution on the device")
        with pytest.raises(BackendError, match="no kernel image") as caught:
            backend_class("onnxruntime-cuda").load(bundle, "fp32", 4, 1)
        assert caught.value.hint == TOO_OLD

    def test_its_algorithms_are_not_chosen_by_the_clock(self) -> None:
        from mtdp_runtime.backends.onnxruntime import OnnxRuntimeCuda, OnnxRuntimeTensorRT

        for rung in (OnnxRuntimeCuda, OnnxRuntimeTensorRT):
            options = dict(rung.providers)["CUDAExecutionProvider"]
            assert (options["cudnn_conv_algo_search"], options["use_tf32"]) == ("HEURISTIC", "0")
