"""Area averaging as a graph: what a GPU would do before the engine, so that the host does no more than decode.

A decoded window becomes a tile by two matrix products, rows and then columns, with the weights of the law of resampling
(`mtdp_runtime.slide.resample`), which are inputs. One graph serves every scale and every phase:

    window uint8[batch, h, w, 3], rows float32[batch, 1, out, h], columns float32[batch, 1, w, out],
    factor float32[], nudge float32[]  ->  tiles uint8[batch, out, out, 3]

It computes what the host does, value by value: sums in float32, rounded once. Where the scale is whole and the cells
lie on pixels, the host adds whole numbers, multiplies by 1 / scale², and rounds halves to even, but up at scale 2
(OpenCV's INTER_AREA): the weights are ones then, `factor` is that number, and `nudge` lifts the halves. Elsewhere the
order of the sums differs, which shows only where the exact value is within 1e-4 of a half, as one grey level.

As a stage of the TensorRT backend, which is not written, since no speed was measured on a GPU:

- Where: an engine of its own from this file, built once per batch and window; on the inference's stream, before it.
  Its output buffer is the model's input buffer, so one event more orders it, and CUDA graphs hold both.
- What the pipeline hands over: buffers of uint8[batch, h, w, 3] that readers fill with whole pixels
  (`slide.window.read_averaged` with the last step left out), h and w from `slide.resample.span_of`. On level 0 every
  origin is whole, so one pair of weights serves a slide and is copied once; on a coarser level each tile has its own.
- When not: nothing is resampled (scale 1, a reduced source); a tile is read in pieces (more than 2048 px of source).
- What it costs: 0.4 GFLOP a tile of 224 px at scale 2, 1.4 at 4 (a ResNet-50 is 8), in fp32; copies grow by scale².
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
from mtdp_runtime.slide.resample import bands, is_whole


@dataclass(frozen=True, slots=True)
class Weights:
    """What the graph is given beside the windows, for windows of one scale and phase."""

    rows: NDArray[np.float32]  # [1, 1, out_px, height]
    columns: NDArray[np.float32]  # [1, 1, width, out_px]
    factor: NDArray[np.float32]  # []
    nudge: NDArray[np.float32]  # []


def weights(out_px: int, height: int, width: int, scale: float, phase_x: float = 0.0, phase_y: float = 0.0) -> Weights:
    """Return the weights by which a window of height x width pixels becomes a tile, as `resample_into` has them."""
    if is_whole(scale, out_px, out_px, height, width, phase_x, phase_y):
        whole = round(scale)
        down, across = _ones(out_px, height, whole), _ones(out_px, width, whole)
        factor, nudge = 1 / whole**2, 2.0**-10 if whole == 2 else 0.0
    else:
        down, across = _dense(out_px, height, scale, phase_y), _dense(out_px, width, scale, phase_x)
        factor, nudge = 1.0, 0.0
    return Weights(
        down[None, None], across.T[None, None].copy(), np.array(factor, np.float32), np.array(nudge, np.float32)
    )


def _ones(out_px: int, source_px: int, whole: int) -> NDArray[np.float32]:
    """Return float32[out_px, source_px]: each output adds `whole` pixels."""
    found = np.zeros((out_px, source_px), np.float32)
    for out in range(out_px):
        found[out, out * whole : (out + 1) * whole] = 1
    return found


def _dense(out_px: int, source_px: int, scale: float, phase: float) -> NDArray[np.float32]:
    """Return float32[out_px, source_px]: the weights of the law, with the zeros between its blocks."""
    blocks = bands(out_px, source_px, scale, phase)
    size, seen = blocks.weights.shape[1:]
    found = np.zeros((out_px, source_px), np.float32)
    for block, first in enumerate(blocks.first):
        outputs = found[block * size : (block + 1) * size, first : first + seen]
        outputs[...] = blocks.weights[block, : len(outputs)]
    return found


def averaging_graph() -> onnx.ModelProto:
    """Return the graph. Cast comes first and last: TensorRT knows uint8 as an input and an output alone."""
    kinds = TensorProto
    inputs = [
        helper.make_tensor_value_info("window", kinds.UINT8, ["batch", "height", "width", 3]),
        helper.make_tensor_value_info("rows", kinds.FLOAT, ["own", 1, "out", "height"]),
        helper.make_tensor_value_info("columns", kinds.FLOAT, ["own", 1, "width", "out"]),
        helper.make_tensor_value_info("factor", kinds.FLOAT, []),
        helper.make_tensor_value_info("nudge", kinds.FLOAT, []),
    ]
    nodes = [
        helper.make_node("Cast", ["window"], ["pixels"], to=kinds.FLOAT),
        helper.make_node("Transpose", ["pixels"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("MatMul", ["rows", "planes"], ["down"]),
        helper.make_node("MatMul", ["down", "columns"], ["sums"]),
        helper.make_node("Mul", ["sums", "factor"], ["scaled"]),
        helper.make_node("Add", ["scaled", "nudge"], ["lifted"]),
        helper.make_node("Round", ["lifted"], ["rounded"]),
        helper.make_node("Clip", ["rounded", "black", "white"], ["clipped"]),
        helper.make_node("Transpose", ["clipped"], ["back"], perm=[0, 2, 3, 1]),
        helper.make_node("Cast", ["back"], ["tiles"], to=kinds.UINT8),
    ]
    limits = [helper.make_tensor(name, kinds.FLOAT, [], [value]) for name, value in (("black", 0.0), ("white", 255.0))]
    outputs = [helper.make_tensor_value_info("tiles", kinds.UINT8, ["batch", "out", "out", 3])]
    graph = helper.make_graph(nodes, "area_averaging", inputs, outputs, limits)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model
