"""Whether a finished file was made of the slide that is there now: slides are copied again, and repaired.

Files of earlier versions hold neither the slide's times nor a sample of it. They count as made of it, unless a tile
that could not be read then can be read now.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from mtdp_runtime.errors import StoreError, TileUnreadable
from mtdp_runtime.slide import Slide, SlideInfo
from mtdp_runtime.slide.identity import hint_of, sample_of
from mtdp_runtime.store.layout import TileStatus
from mtdp_runtime.store.reader import open_features
from mtdp_runtime.urls import SlideUrl

HINT: Final = "slide_times"  # attributes of the file
SAMPLE: Final = "slide_sample"
KEY: Final = "unread_key"  # `Target.key`
_TRIED: Final = 16  # bad tiles


def read_here(info: SlideInfo) -> Path:
    """Return where a slide's bytes can be compared: its own path, or the copy of what lies behind a URL."""
    return info.read_from or info.path if isinstance(info.path, SlideUrl) else info.path


def stands_unread(path: Path, key: str) -> bool:
    """Say whether a file is there that was made of what a key says; without one, that is never known."""
    if not (key and path.exists()):
        return False
    try:
        with open_features(path) as file:
            return file.attrs.get(KEY) == key
    except StoreError:  # which is said where the slide is there
        return False


def what_changed(path: Path, slide: Slide, tile_px: int, scale: float) -> str:
    """Return how the slide differs from the one that a finished file was made of; empty where nothing shows that.

    Reads nothing of a slide whose size and times are those of the file.

    Raises:
        StoreError: the file cannot be read.
    """
    with open_features(path) as file:
        hint, sample = str(file.attrs.get(HINT, "")), str(file.attrs.get(SAMPLE, ""))
        bad = np.flatnonzero(file.status == TileStatus.UNREADABLE)
        coords = file.coords[bad[:: max(1, len(bad) // _TRIED)][:_TRIED]]
    if hint and hint == hint_of(slide.info.path):
        return ""
    now = sample_of(read_here(slide.info)) if sample else ""
    if sample and now and now != sample:
        return "the slide has another content now"
    out = np.empty((tile_px, tile_px, 3), np.uint8)
    for x0, y0 in coords.tolist():
        try:
            slide.read_into(out, x0, y0, scale)
        except TileUnreadable:
            continue
        return "tiles of the slide that could not be read then can be read now"
    return ""
