"""Opens whole-slide images, finds tissue, tiles it, and extracts features. Never imports torch.

    >>> from mtdp_runtime import extract, load_bundle, open_slide

Importing the package loads nothing else: each name is imported when it is first used.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from mtdp_runtime.version import __version__ as __version__

# ONNX Runtime reports its use to its maker unless told before it is loaded; nothing here needs that.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

if TYPE_CHECKING:
    from mtdp_runtime.api import extract
    from mtdp_runtime.bundle import Bundle, default_bundle_path, load_bundle
    from mtdp_runtime.errors import RuntimeFailure
    from mtdp_runtime.extraction.outcome import Outcome
    from mtdp_runtime.slide import Slide, SlideInfo
    from mtdp_runtime.slide.open import open_slide

__all__ = [
    "Bundle",
    "Outcome",
    "RuntimeFailure",
    "Slide",
    "SlideInfo",
    "default_bundle_path",
    "extract",
    "load_bundle",
    "open_slide",
]

_HOMES = {
    "Bundle": "bundle",
    "Outcome": "extraction.outcome",
    "RuntimeFailure": "errors",
    "Slide": "slide",
    "SlideInfo": "slide",
    "default_bundle_path": "bundle",
    "extract": "api",
    "load_bundle": "bundle",
    "open_slide": "slide.open",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
