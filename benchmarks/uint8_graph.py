"""What a uint8 NHWC input costs in OpenVINO, and which way of stating it costs least.

    python benchmarks/uint8_graph.py [--model BUNDLE] [--batch 16] [--threads 2] [--precision f32|bf16] [--repeats 5]

ways   packaged: the exported graph as it is (Cast, Transpose, Sub, Div inside)
       channels-last: the same, its input's layout stated to the pre-processor (u8, NHWC)
       fp32 NHWC: the same graph fed float32, so that the difference to "packaged" is the conversion
       fp32 NCHW: fed float32 in the network's own layout, as graphs are that leave all of it to the caller
The ways take turns; the figure is the median, images/s.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from mtdp_runtime.backends.telemetry import import_openvino
from mtdp_runtime.bundle import default_bundle_path, load_bundle

openvino = import_openvino()


def compiled(way: str, file: Path, batch: int, tile_px: int, threads: int, precision: str) -> Any:
    core = openvino.Core()
    model = core.read_model(file)
    model.reshape([batch, tile_px, tile_px, 3])
    if way != "packaged":
        steps = openvino.preprocess.PrePostProcessor(model)
        kind = openvino.Type.u8 if way == "channels-last" else openvino.Type.f32
        layout = "NCHW" if way == "fp32 NCHW" else "NHWC"
        steps.input().tensor().set_element_type(kind).set_layout(openvino.Layout(layout))
        steps.input().model().set_layout(openvino.Layout("NHWC"))
        model = steps.build()
    hints = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    return core.compile_model(model, "CPU", hints)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", choices=("f32", "bf16"), default="f32")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if options.precision == "bf16" and "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        parser.error("this CPU does not compute in bf16")
    bundle = load_bundle(options.model or default_bundle_path())
    file, tile_px = bundle.checked(bundle.variant("fp32").file), bundle.manifest.tile_px
    tiles = np.random.default_rng(0).integers(0, 256, (options.batch, tile_px, tile_px, 3), np.uint8)
    requests = {}
    for way in ("packaged", "channels-last", "fp32 NHWC", "fp32 NCHW"):
        model = compiled(way, file, options.batch, tile_px, options.threads, options.precision)
        request = model.create_infer_request()
        given = tiles.astype(np.float32) if way.startswith("fp32") else tiles
        given = np.ascontiguousarray(given.transpose(0, 3, 1, 2)) if way == "fp32 NCHW" else given
        request.set_input_tensor(openvino.Tensor(given))
        request.infer()
        requests[way] = request
    rates: dict[str, list[float]] = {way: [] for way in requests}
    for _ in range(options.repeats):
        for way, request in requests.items():
            start = time.perf_counter()
            request.infer()
            rates[way].append(options.batch / (time.perf_counter() - start))
    for way, values in rates.items():
        print(f"{way:<14} {statistics.median(values):7.1f} images/s")


if __name__ == "__main__":
    main()
