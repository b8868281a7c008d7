"""The libraries of the engines, imported as the runtime does it: OpenVINO without its reports."""

from __future__ import annotations

import contextlib

from mtdp_runtime.backends.telemetry import import_openvino

with contextlib.suppress(ImportError):
    import_openvino()
with contextlib.suppress(ImportError):
    import onnxruntime as onnxruntime
