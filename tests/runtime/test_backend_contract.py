"""Every engine keeps the contract of a backend, the one on a CUDA that is acted out included."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from contracts import BackendContract
from fake_cuda import FakeCudart, FakeTrt
from mtdp_runtime.backends import Backend, backend_class
from mtdp_runtime.backends.gpus import Gpu
from mtdp_runtime.backends.tensorrt.backend import TensorRT, TensorRTRTX
from mtdp_runtime.backends.tensorrt.cuda import CudaDevice
from mtdp_runtime.backends.tensorrt.engine_source import SerializedEngine
from mtdp_runtime.backends.tensorrt.slots import Slots
from mtdp_runtime.bundle import load_bundle


class OfTheTinyBundle(BackendContract):
    """A convolution of 8 x 8 px side by side, a Relu, and the mean over the tile."""

    rung: ClassVar[str]

    @pytest.fixture(autouse=True)
    def _bundle(self, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MTDP_CACHE", str(tmp_path / "cache"))
        self.bundle = load_bundle(tiny_bundle)

    def load(self) -> Backend:
        probe = backend_class(self.rung).probe()
        if not probe.usable:
            pytest.skip(f"needs {self.rung}: {probe.reason}")
        return backend_class(self.rung).load(self.bundle, "fp32", self.batch, 2)

    def expected(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        graph = onnx.load(self.bundle.path / "model.fp32.onnx").graph
        weight = numpy_helper.to_array(graph.initializer[0]).astype(np.float64)  # [12, 3, 8, 8]
        cells = tiles.astype(np.float64).reshape(len(tiles), 8, 8, 8, 8, 3)  # tile, row, y, column, x, colour
        filtered = np.einsum("trycxk,fkyx->tfrc", cells, weight)
        return np.asarray(np.maximum(filtered, 0).mean(axis=(2, 3)), np.float32)


class TestOnnxRuntime(OfTheTinyBundle):
    rung = "onnxruntime"


class TestOpenVINO(OfTheTinyBundle):
    rung = "openvino"


@pytest.mark.gpu
class TestOnnxRuntimeCuda(OfTheTinyBundle):
    rung = "onnxruntime-cuda"


@pytest.mark.gpu
class TestOnnxRuntimeTensorRT(OfTheTinyBundle):
    rung = "onnxruntime-tensorrt"


@pytest.mark.gpu
class TestTensorRT(OfTheTinyBundle):
    rung = "tensorrt"


@pytest.mark.gpu
class TestTensorRTRTX(OfTheTinyBundle):
    rung = "tensorrt-rtx"


class TestFakeCuda(BackendContract):
    """One GPU of host memory, which works as late as CUDA allows."""

    gpus = 1
    backend: ClassVar[type[TensorRT]] = TensorRT

    def load(self) -> Backend:
        return self.backend(Slots([self._device() for _ in range(self.gpus)]), "of the test", "fp32", self.batch)

    def _device(self) -> CudaDevice:
        cudart = FakeCudart()
        return CudaDevice(
            self.backend.library,
            Gpu(0, "GPU of the test", "8.9"),
            SerializedEngine(b"good engine", "the test"),
            batch=self.batch,
            tile_px=self.tile_px,
            kernels=None,
            cudart=cudart,
            trt=FakeTrt(cudart),
        )

    def expected(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        return np.stack([tiles[:, 0, 0, 0], tiles.reshape(len(tiles), -1).sum(axis=1)], axis=1).astype(np.float32)


class TestThreeFakeGpus(TestFakeCuda):
    gpus = 3
    backend = TensorRTRTX
