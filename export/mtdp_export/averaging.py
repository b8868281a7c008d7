"""Area averaging as a graph: what a GPU would do before the engine, so that the host does no more than decode.

A decoded window becomes a tile by two matrix products, rows and then columns, with the weights of the law of averaging
(`mtdp_runtime.slide.cells`), which are inputs. One graph serves every scale and every phase:

    window uint8[batch, h, w, 3], rows float32[own, 1, out, h], row_factors float32[own, 1, out, 1],
    columns float32[own, 1, w, out], column_factors float32[own, 1, 1, out]  ->  tiles uint8[batch, out, out, 3]

where `own` is 1 or the batch. It gives the very bits of the host: weights are whole numbers, sums of them stay below
2**24, so float32 adds them without rounding in any order; what is summed over rows has 15 bits, so its high and its low
bytes are summed apart. That asks for true float32, without TF32. The law suits a kernel with integers as well.

TensorRT-RTX builds it; it has run on a CPU alone. As a stage of the TensorRT backend, which is not written, since no
speed was measured on a GPU:

- Where: an engine of its own from this file, built once per batch and window; on the inference's stream, before it.
  Its output buffer is the model's input buffer, so one event more orders it, and CUDA graphs hold both.
- What the pipeline hands over: buffers of uint8[batch, h, w, 3] that readers fill with whole pixels
  (`slide.window.read_averaged` with the last step left out), h and w from `slide.resample.span_of`. On level 0 every
  origin is whole, so one pair of weights serves a slide and is copied once; on a coarser level each tile has its own.
- When not: nothing is resampled (scale 1, a reduced source); a tile is read in pieces (more than 2048 px of source).
- What it costs: 0.5 GFLOP a tile of 224 px at scale 2, 1.6 at 4 (a ResNet-50 is 8), in fp32; copies grow by scale².
- What it saves: of the host's time at a fractional scale what decoding does not take: 0.4 of the bare decoder's rate is
  reached at 1.979 (benchmarks/RESULTS.md). It would be asked for by name, and stand in the fingerprint of the features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from mtdp_export.graph import OPSET
from mtdp_runtime.slide.cells import Cells, cells


@dataclass(frozen=True, slots=True)
class Weights:
    """What the graph is given beside the windows, for windows of one scale and phase."""

    rows: NDArray[np.float32]  # [1, 1, out_px, height]
    row_factors: NDArray[np.float32]  # [1, 1, out_px, 1]
    columns: NDArray[np.float32]  # [1, 1, width, out_px]
    column_factors: NDArray[np.float32]  # [1, 1, 1, out_px]


def weights(out_px: int, height: int, width: int, scale: float, phase_x: float = 0.0, phase_y: float = 0.0) -> Weights:
    """Return the weights by which a window of height x width pixels becomes a tile, as `resample_into` has them."""
    down, across = cells(out_px, height, scale, phase_y), cells(out_px, width, scale, phase_x)
    return Weights(
        _dense(down, height)[None, None],
        down.down_factors()[None, None, :, None],
        _dense(across, width).T[None, None].copy(),
        across.across_factors()[None, None, None, :],
    )


def _dense(of: Cells, source_px: int) -> NDArray[np.float32]:
    """Return float32[out_px, source_px]: the weights, with the zeros between them."""
    out_px, taps = of.weights.shape
    found = np.zeros((out_px, max(source_px, of.source_px)), np.float32)
    at = of.first[:, None].astype(np.int64) + np.arange(taps)
    np.put_along_axis(found, at, of.weights.astype(np.float32), axis=1)
    return found[:, :source_px]


def averaging_graph() -> onnx.ModelProto:
    """Return the graph. Cast comes first and last: TensorRT knows uint8 as an input and an output alone."""
    kinds = TensorProto
    inputs = [
        helper.make_tensor_value_info("window", kinds.UINT8, ["batch", "height", "width", 3]),
        helper.make_tensor_value_info("rows", kinds.FLOAT, ["own", 1, "out", "height"]),
        helper.make_tensor_value_info("row_factors", kinds.FLOAT, ["own", 1, "out", 1]),
        helper.make_tensor_value_info("columns", kinds.FLOAT, ["own", 1, "width", "out"]),
        helper.make_tensor_value_info("column_factors", kinds.FLOAT, ["own", 1, 1, "out"]),
    ]
    nodes = [
        helper.make_node("Cast", ["window"], ["pixels"], to=kinds.FLOAT),
        helper.make_node("Transpose", ["pixels"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("MatMul", ["rows", "planes"], ["row_sums"]),
        helper.make_node("Mul", ["row_sums", "row_factors"], ["scaled"]),
        helper.make_node("Round", ["scaled"], ["down"]),
        # down = 256 * high + low. All is exact but the Add, which rounds once, as a cast of the whole sum does.
        helper.make_node("Mul", ["down", "per_byte"], ["bytes"]),
        helper.make_node("Floor", ["bytes"], ["high"]),
        helper.make_node("Mul", ["high", "byte"], ["of_high"]),
        helper.make_node("Sub", ["down", "of_high"], ["low"]),
        helper.make_node("MatMul", ["high", "columns"], ["high_sums"]),
        helper.make_node("MatMul", ["low", "columns"], ["low_sums"]),
        helper.make_node("Mul", ["high_sums", "byte"], ["high_part"]),
        helper.make_node("Add", ["high_part", "low_sums"], ["sums"]),
        helper.make_node("Mul", ["sums", "column_factors"], ["grey"]),
        helper.make_node("Round", ["grey"], ["rounded"]),
        helper.make_node("Transpose", ["rounded"], ["back"], perm=[0, 2, 3, 1]),
        helper.make_node("Cast", ["back"], ["tiles"], to=kinds.UINT8),
    ]
    constants = [
        helper.make_tensor(name, kinds.FLOAT, [], [value]) for name, value in (("byte", 256.0), ("per_byte", 1 / 256))
    ]
    outputs = [helper.make_tensor_value_info("tiles", kinds.UINT8, ["batch", "out", "out", 3])]
    graph = helper.make_graph(nodes, "area_averaging", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model
