"""What the pages of a report share: their style, figures, and facts as a person reads them."""

from __future__ import annotations

import base64
import html
import json
from contextlib import suppress
from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray

STYLE: Final = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; } h2 { font-size: 1.05rem; margin-top: 2rem; }
figure { margin: 1rem 0; } img { max-width: 100%; border: 1px solid #8884; } figcaption { opacity: .75; }
table { border-collapse: collapse; } td, th { padding: .15rem .9rem .15rem 0; text-align: left; vertical-align: top;
 overflow-wrap: anywhere; } th { white-space: nowrap; font-weight: 600; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.bar { display: inline-block; height: .8rem; background: #2a7; vertical-align: middle; }
.bad { color: #c22; }
"""


def figure(image: NDArray[np.uint8], caption: str) -> str:
    _, encoded = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])
    data = base64.b64encode(encoded.tobytes()).decode()
    image_tag = f'<img alt="" src="data:image/jpeg;base64,{data}">'
    return f"<figure>{image_tag}<figcaption>{html.escape(caption)}</figcaption></figure>"


def readable(value: Any) -> str:
    """Return a fact as a person reads it: what the file keeps as JSON (grid, timing, ...) as names and values."""
    if isinstance(value, str) and value.startswith(("{", "[")):
        with suppress(ValueError):
            value = json.loads(value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {readable(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(readable, value)) or "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
