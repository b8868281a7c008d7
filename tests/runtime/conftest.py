"""A real but tiny model, and real but tiny slides, made by code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from mtdp_runtime.bundle import file_ref, write_manifest
from support import FEATURES_DIM, TILE_PX, make_manifest, pyramid, stained


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with one strided convolution: uint8[N, 64, 64, 3] -> features float32[N, 12]."""
    folder = tmp_path_factory.mktemp("bundle") / "tiny"
    folder.mkdir()
    rng = np.random.default_rng(0)
    weight = rng.normal(0, 0.02, (FEATURES_DIM, 3, 8, 8)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["tiles"], ["float"], to=TensorProto.FLOAT),
            helper.make_node("Transpose", ["float"], ["nchw"], perm=[0, 3, 1, 2]),
            helper.make_node("Conv", ["nchw", "weight"], ["conv"], strides=[8, 8]),
            helper.make_node("Relu", ["conv"], ["relu"]),
            helper.make_node("GlobalAveragePool", ["relu"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["features"]),
        ],
        "tiny",
        [helper.make_tensor_value_info("tiles", TensorProto.UINT8, ["batch", TILE_PX, TILE_PX, 3])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", FEATURES_DIM])],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, folder / "model.fp32.onnx")
    tiles = rng.integers(0, 256, (4, TILE_PX, TILE_PX, 3), np.uint8)
    session = onnxruntime.InferenceSession(folder / "model.fp32.onnx", providers=["CPUExecutionProvider"])
    np.savez(folder / "golden.npz", tiles=tiles, features=session.run(None, {"tiles": tiles})[0])
    write_manifest(folder, make_manifest(file_ref(folder, "model.fp32.onnx"), file_ref(folder, "golden.npz")))
    return folder


@pytest.fixture
def make_slide(tmp_path: Path) -> Callable[..., Path]:
    """Make a slide of 1024 x 768 px: `make_slide(name, mpp=0.5, levels=1, lossy=False, seed=0)`."""

    def make(
        name: str = "slide.tiff", mpp: float | None = 0.5, levels: int = 1, lossy: bool = False, seed: int = 0
    ) -> Path:
        return pyramid(stained(768, 1024, seed), tmp_path / name, mpp, levels, lossy)

    return make
