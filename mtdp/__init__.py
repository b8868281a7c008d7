"""Multi-task pre-training of convolutional networks for digital pathology (arXiv 2005.02561).

The training core: task pools, the multi-task network, its pre-training, and its checkpoints. Nothing is imported
here, so that `mtdp-train --help` stays fast: import the module that you need, as `mtdp.checkpoint`.
"""

from __future__ import annotations

import os

__version__ = "0.1.0"

# ONNX Runtime reports its use to its maker unless told before it is loaded; nothing here needs that.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

__all__ = ["__version__"]
