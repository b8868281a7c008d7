"""What the pages of a report share: their frame and style, figures, and facts as a person reads them."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.report.overview import ScaleBar
from mtdp_runtime.report.thumbnails import encoded

END: Final = "</html>\n"
NOTHING: Final = "\N{EN DASH}"
# Nothing is loaded from anywhere; what a name or a message might smuggle in does not run.
_POLICY: Final = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_HERE: Final = Path(__file__).parent


@cache
def asset(name: str) -> str:
    """Return a file of this package as text."""
    return (_HERE / name).read_text(encoding="utf-8")


def document(title: str, parts: Sequence[str], script: str = "") -> str:
    """Return a whole page of parts that are HTML already. It asks for nothing, and runs no script but this one.

    Args:
        title: plain text.
        parts: what stands in it.
        script: the text of its script.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    scripts = f"script-src 'sha256-{digest}'" if script else "script-src 'none'"
    policy = f"{_POLICY}; {scripts}"
    head = (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        f'<meta HTTP-EQUIV=Content-Security-Policy content="{policy}">'
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{asset('style.css')}</style></head><body>"
    )
    tail = f"<script>{script}</script>" if script else ""
    return "\n".join([head, *parts, f"{tail}</body>{END}"])


def figure(image: NDArray[np.uint8], caption: str, alt: str, scale: ScaleBar | None = None) -> str:
    """Return an image, uint8[H, W, 3] RGB, and what it shows, inside the page; with a bar that shows a length."""
    tag = f'<img alt="{html.escape(alt)}" src="{data_url(encoded(image, 85))}">'
    shown = f'<div class=length style="width:{scale.part:.2%}">{scale.label}</div>' if scale else ""
    return (
        f'<figure><div style="max-width:{image.shape[1]}px">{tag}{shown}</div>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def data_url(data: bytes, kind: str = "jpeg") -> str:
    """Return an image as an address that holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def link_to(name: str) -> str:
    """Return the address of a file beside the page, for an attribute in double quotes."""
    return f"./{quote(os.fsencode(name))}"


def number(value: float | None, digits: int = 0) -> str:
    """Return a number with its thousands apart.

    >>> number(12345), number(0.5, 2), number(None) == NOTHING
    ('12,345', '0.50', True)
    """
    return NOTHING if value is None else f"{value:,.{digits}f}"


def plural(count: int, one: str, more: str = "") -> str:
    """Return a count and its noun.

    >>> plural(1, "slide"), plural(2000, "slide"), plural(2, "copy", "copies")
    ('1 slide', '2,000 slides', '2 copies')
    """
    return f"{count:,} {one if count == 1 else more or f'{one}s'}"


def bar(parts: Sequence[tuple[str, float]], label: str) -> str:
    """Return a bar, 1 wide, of parts that follow one another.

    Args:
        parts: the class of each, and its width.
        label: what it shows, for those who cannot see it.
    """
    at, rects = 0.0, ""
    for kind, width in parts:
        width = max(0.0, min(width, 1 - at))
        rects += f'<rect class={kind} x="{at * 1000:.1f}" width="{width * 1000:.1f}" height=10 />'
        at += width
    return (
        f'<svg class=bar viewBox="0 0 1000 10" preserveAspectRatio=none role=img aria-label="{html.escape(label)}">'
        f"{rects}</svg>"
    )


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
