"""Two quantisers on the same network and the same tissue: NNCF, as mtdp-export uses it, and ONNX Runtime's own.

    python benchmarks/int8.py --calibration SLIDE.svs (--arch resnet50 densenet121 | --model BUNDLE) [--judge DIR]

Every other tile of the slide's tissue calibrates; those between them judge, or with `--judge` the images of a folder.
Each int8 graph runs on each CPU engine that takes it; its features are compared with those of fp32 on ONNX Runtime.
Times are medians of batches of 8, all ways in turns. `--arch` has random weights: it says what the graphs cost, and
little of what real features lose.
Each graph is made, and tried on each engine, in a process of its own first; one that crashes there is a row of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from mtdp_export.errors import ExportError
from mtdp_export.golden import calibration_tiles
from mtdp_export.int8 import CALIBRATION_TILES, kept_wide, write_int8
from mtdp_export.isolated import isolated
from mtdp_export.parity import compare
from mtdp_export.source import open_source
from mtdp_export.write import ExportSettings, write_bundle
from mtdp_runtime.backends import Backend, backend_class
from mtdp_runtime.backends.proof import run_backend
from mtdp_runtime.bundle import Bundle, file_ref, load_bundle, write_manifest
from mtdp_runtime.bundle.manifest import Parity, Variant
from mtdp_runtime.errors import RuntimeFailure

BATCH = 8
ENGINES = ("openvino", "onnxruntime")
_ORT = (CalibrationMethod.MinMax, CalibrationMethod.Percentile, CalibrationMethod.Entropy)
TYPES = {"per_channel": True, "activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
METHODS = {f"ort-{method.name.lower()}": method for method in _ORT}


@dataclass(slots=True)
class Row:
    """One graph on one engine."""

    graph: str
    engine: str
    parity: Parity | None = None
    batch_s: float | None = None
    failed: str = ""

    def __str__(self) -> str:
        start = f"{self.graph:<15} {self.engine:<12}"
        if self.parity is None or self.batch_s is None:
            return f"{start} {self.failed}"
        p, ms = self.parity, self.batch_s * 1e3
        return f"{start} {p.cosine_min:<11.6f} {p.cosine_mean:<11.6f} {p.knn_agreement or 0:<7.1%} {ms:.0f}"


class Tiles(CalibrationDataReader):
    """One tile a step, as NNCF gets them."""

    def __init__(self, tiles: NDArray[np.uint8]) -> None:
        self.rows = iter(tiles[:, None])

    def get_next(self) -> dict[str, Any] | None:
        return next(({"tiles": row} for row in self.rows), None)


def with_fp32_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Undo fp16 storage: weights that the graph casts when it is loaded become fp32, as quantisers expect them."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    casts = [node for node in model.graph.node if node.op_type == "Cast" and node.input[0] in stored]
    for node in casts:
        values = numpy_helper.to_array(stored[node.input[0]]).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, node.output[0]))
        model.graph.node.remove(node)
    for name in {node.input[0] for node in casts}:
        model.graph.initializer.remove(stored[name])
    return model


def quantise(method: str, base: Path, out: Path, tiles: NDArray[np.uint8]) -> None:
    """Write `base` in int8; the same nodes stay in fp32 whoever quantises."""
    if method == "nncf":
        write_int8(base, out, tiles)
        return
    prepared = out.with_suffix(".prepared")
    quant_pre_process(base, prepared, skip_symbolic_shape=True)  # as its manual asks: batch norms go into kernels
    model = onnx.load(prepared)
    for i, node in enumerate(model.graph.node):
        node.name = node.name or f"node_{i}"
    with contextlib.redirect_stdout(sys.stderr):  # its progress
        quantize_static(
            model, out, Tiles(tiles), nodes_to_exclude=kept_wide(model), calibrate_method=METHODS[method], **TYPES
        )
    quantised = onnx.load(out)
    for opset in [o for o in quantised.opset_import if o.domain not in {node.domain for node in quantised.graph.node}]:
        quantised.opset_import.remove(opset)  # ONNX Runtime's optimiser names every domain that it knows
    onnx.save(quantised, out)


def with_int8(bundle: Bundle, folder: Path, method: str, base: Path, tiles: NDArray[np.uint8]) -> Bundle:
    """Copy a bundle and put an int8 variant into it."""
    shutil.copytree(bundle.path, folder)
    quantise(method, base, folder / "model.int8.onnx", tiles)
    fp32 = bundle.variant("fp32")
    variants = (fp32, Variant("int8", file_ref(folder, "model.int8.onnx"), fp32.parity))
    write_manifest(folder, replace(bundle.manifest, variants=variants))
    return load_bundle(folder)


def survives(path: Path, engine: str, precision: str, threads: int, tiles: NDArray[np.uint8]) -> None:
    """Run one batch; a crash ends this process alone."""
    with backend_class(engine).load(load_bundle(path), precision, BATCH, threads) as backend:
        run_backend(backend, tiles[:BATCH])


def measure(bundle: Bundle, options: argparse.Namespace, scratch: Path) -> list[Row]:
    manifest = bundle.manifest
    tiles = calibration_tiles(options.calibration, manifest.tile_px, manifest.mpp, 2 * options.tiles)
    calibrating, judging = tiles[::2], tiles[1::2]
    if options.judge is not None:
        judging = calibration_tiles(options.judge, manifest.tile_px, manifest.mpp, options.tiles)
    print(f"{manifest.name}: {len(calibrating)} tiles calibrate, {len(judging)} judge", file=sys.stderr)
    base = scratch / "base.onnx"
    onnx.save(with_fp32_weights(onnx.load(bundle.checked(bundle.variant("fp32").file))), base)
    with backend_class("onnxruntime").load(bundle, "fp32", BATCH, options.threads) as reference:
        expected = run_backend(reference, judging)
    rows: list[Row] = []
    with ExitStack() as stack:
        loaded: list[tuple[Row, Backend]] = []

        def load(graph: str, engine: str, of: Bundle, precision: str) -> None:
            rows.append(row := Row(graph, engine))
            try:
                isolated("one batch", survives, of.path, engine, precision, options.threads, judging)
                backend = stack.enter_context(backend_class(engine).load(of, precision, BATCH, options.threads))
                row.parity = compare(backend, judging, expected).parity
            except (ExportError, RuntimeFailure) as error:
                row.failed = f"refused: {' '.join(str(error).split())[:200]}"
                return
            loaded.append((row, backend))

        for engine in ENGINES:
            load("fp32", engine, bundle, "fp32")
        load("bf16", "openvino", bundle, "bf16")
        for method in options.quantisers:
            start = time.perf_counter()
            try:
                isolated("quantising", with_int8, bundle, scratch / method, method, base, calibrating)
                quantised = load_bundle(scratch / method)
            except Exception as error:  # either quantiser raises whatever it meets
                rows.append(Row(method, "-", failed=f"not made: {' '.join(str(error).split())[:200]}"))
                continue
            print(f"{method}: quantised in {time.perf_counter() - start:.0f} s", file=sys.stderr)
            for engine in ENGINES:
                load(method, engine, quantised, "int8")
        batch = np.ascontiguousarray(np.resize(judging, (BATCH, *judging.shape[1:])))
        seconds: list[list[float]] = [[] for _ in loaded]
        for _ in range(options.rounds + 1):
            for (_, backend), times in zip(loaded, seconds, strict=True):
                start = time.perf_counter()
                backend.result(backend.submit(batch))
                times.append(time.perf_counter() - start)
        for (row, _), times in zip(loaded, seconds, strict=True):
            row.batch_s = statistics.median(times[1:])  # the first one warms up
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--arch", nargs="+")
    what.add_argument("--model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--judge", type=Path, help="a slide, or a folder of images")
    parser.add_argument("--quantisers", nargs="+", default=["nncf", *METHODS], choices=["nncf", *METHODS])
    parser.add_argument("--tiles", type=int, default=CALIBRATION_TILES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    for name in options.arch or [None]:
        with tempfile.TemporaryDirectory() as folder:
            if name is None:
                bundle = load_bundle(options.model)
            else:
                settings = ExportSettings(name=name, mpp=0.5, calibration=options.calibration)
                bundle, _ = write_bundle(open_source(name, "random", None, False), Path(folder) / "b", settings)
            rows = measure(bundle, options, Path(folder))
        if options.json:
            print(json.dumps({"model": bundle.manifest.name, "rows": [asdict(row) for row in rows]}))
            continue
        print(f"{'graph':<15} {'engine':<12} {'cosine min':<11} {'mean':<11} {'5-NN':<7} ms a batch of {BATCH}")
        print(*rows, sep="\n")


if __name__ == "__main__":
    main()
