"""Turns a trained network into a bundle that the runtime runs, with the numbers that prove it equal."""

from __future__ import annotations

import os

__version__ = "0.1.0"

# ONNX Runtime reports its use to its maker unless told before it is loaded; nothing here needs that.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
