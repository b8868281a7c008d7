"""Multi-task pre-training of convolutional networks for digital pathology (arXiv 2005.02561).

The training core: task pools, the multi-task network, its pre-training, and its checkpoints. Nothing is imported
here, so that `mtdp-train --help` stays fast: import the module that you need, as `mtdp.checkpoint`.
"""

from __future__ import annotations

__version__ = "0.1.0"

__all__ = ["__version__"]
