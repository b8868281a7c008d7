"""The reference reader: every format that OpenSlide opens."""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final, Self

import cv2
import numpy as np
import openslide
from numpy.typing import NDArray

from mtdp_runtime.errors import SlideError, SlideUnreadable, TileUnreadable
from mtdp_runtime.slide import Level, SlideInfo, Source
from mtdp_runtime.slide.lattice import lattices_of
from mtdp_runtime.slide.scale import scale_of
from mtdp_runtime.slide.source import source_at
from mtdp_runtime.slide.window import Window, read_averaged

_CACHE_BYTES: Final = 128 << 20  # decoded codec tiles, shared by all handles of a slide
_WHITE: Final = (255, 255, 255)


class OpenSlideReader:
    """A slide read through OpenSlide, with a handle for each thread that reads at the same moment.

    OpenSlide latches an error: a handle that failed once fails for ever. So a failed read is tried again on a new
    handle, and the failed one is closed.
    """

    def __init__(self, path: Path, slide_mpp: float | None, given_by: str) -> None:
        self._path = path
        self._cache = openslide.OpenSlideCache(_CACHE_BYTES)
        self._idle: queue.LifoQueue[openslide.OpenSlide] = queue.LifoQueue()
        self._all: set[openslide.OpenSlide] = set()
        self._lock = threading.Lock()
        handle = self._open()
        try:
            info = _info(path, handle, slide_mpp, given_by)
        except SlideError:
            self.close()
            raise
        self._lattices = lattices_of(info.levels, handle.level_dimensions, handle.level_downsamples)
        levels = zip(info.levels, self._lattices, strict=True)
        self.info = replace(info, levels=tuple(replace(level, whole=lattice.whole) for level, lattice in levels))
        self._idle.put(handle)

    def read_into(self, out: NDArray[np.uint8], x0: int, y0: int, scale: float, source: Source | None = None) -> None:
        chosen = source or source_at(self.info, x0, y0, scale, max(out.shape[:2]))
        # What another reader reduces or reads as it is, is averaged from whole pixels here, and if need be of level 0.
        level = chosen.level if chosen.rough or self.info.levels[chosen.level].whole else 0
        read_averaged(out, self.info, replace(chosen, level=level, reduction=1), x0, y0, scale, self._fill)

    def _fill(self, target: NDArray[np.uint8], window: Window) -> None:
        """Fill target, uint8[height, width, 3], with the window's pixels; beyond the level lies the background."""
        left, top = max(window.lx, 0), max(window.ly, 0)
        width, height = window.lx + window.width - left, window.ly + window.height - top
        if width < window.width or height < window.height:
            target[...] = self.info.background
            if width <= 0 or height <= 0:
                return
        lattice = self._lattices[window.source.level]
        (x0, skip_x), (y0, skip_y) = lattice.place(left), lattice.place(top)
        size = (width + skip_x, height + skip_y)
        try:
            try:
                pixels = self._read((x0, y0), lattice.index, size)
            except openslide.OpenSlideError:
                pixels = self._read((x0, y0), lattice.index, size)
        except openslide.OpenSlideError as error:
            raise TileUnreadable(
                f"{self._path}: cannot decode {size[0]} x {size[1]} px at ({x0}, {y0}), level {lattice.index}: {error}",
                hint="The file is damaged there: compare its checksum with the original and copy it again.",
            ) from error
        target[window.height - height :, window.width - width :] = pixels[skip_y:, skip_x:]

    def close(self) -> None:
        with self._lock:
            handles, self._all = self._all, set()
        for handle in handles:
            handle.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _open(self) -> openslide.OpenSlide:
        try:
            handle = openslide.OpenSlide(self._path)
        except openslide.OpenSlideUnsupportedFormatError as error:
            raise SlideUnreadable(
                f"{self._path}: not a slide that OpenSlide can read",
                hint="Check that the file is complete, of a whole-slide format, and (for a TIFF) tiled.",
            ) from error
        except openslide.OpenSlideError as error:
            detail = str(error).removeprefix(f"Reading {self._path}: ")
            raise SlideUnreadable(
                f"{self._path}: OpenSlide refuses it: {detail}",
                hint="Compare the file's checksum with the original; convert it to a tiled TIFF if it is intact.",
            ) from error
        handle.set_cache(self._cache)
        with self._lock:
            self._all.add(handle)
        return handle

    def _read(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> NDArray[np.uint8]:
        """Return uint8[H, W, 3]; OpenSlide's error closes the handle that it latched."""
        try:
            handle = self._idle.get_nowait()
        except queue.Empty:
            handle = self._open()
        try:
            rgba = np.asarray(handle.read_region(location, level, size))
        except openslide.OpenSlideError:
            with self._lock:
                self._all.discard(handle)
            handle.close()
            raise
        self._idle.put(handle)
        return _on_background(rgba, self.info.background)


def _on_background(rgba: NDArray[np.uint8], background: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Return uint8[H, W, 3]: RGBA as OpenSlide gives it (not premultiplied), composited on a colour."""
    rgb: NDArray[np.uint8] = cv2.cvtColor(rgba, cv2.COLOR_RGBA2RGB)
    alpha = rgba[..., 3]
    if cv2.minMaxLoc(alpha)[0] < 255:
        weight = alpha[..., None].astype(np.float32) / 255
        blended = rgb * weight + np.asarray(background, np.float32) * (1 - weight)
        rgb = np.rint(blended).astype(np.uint8)
    return rgb


def _info(path: Path, handle: openslide.OpenSlide, slide_mpp: float | None, given_by: str) -> SlideInfo:
    properties = handle.properties
    vendor = properties.get(openslide.PROPERTY_NAME_VENDOR, "unknown")
    if slide_mpp is None:
        mpp, mpp_source = scale_of(path, properties, vendor)
    else:
        mpp, mpp_source = slide_mpp, given_by
    levels = tuple(
        Level(width, height, float(downsample))
        for (width, height), downsample in zip(handle.level_dimensions, handle.level_downsamples, strict=True)
    )
    return SlideInfo(
        path=path,
        size_bytes=path.stat().st_size,
        vendor=vendor,
        levels=levels,
        mpp=mpp,
        mpp_source=mpp_source,
        bounds=_bounds(properties, levels[0]),
        background=_background(properties),
        quickhash=properties.get(openslide.PROPERTY_NAME_QUICKHASH1, ""),
        reader=f"openslide {openslide.__library_version__}",
        reader_reason="the reference reader",
    )


def _bounds(properties: Mapping[str, str], level0: Level) -> tuple[int, int, int, int]:
    names = (
        openslide.PROPERTY_NAME_BOUNDS_X,
        openslide.PROPERTY_NAME_BOUNDS_Y,
        openslide.PROPERTY_NAME_BOUNDS_WIDTH,
        openslide.PROPERTY_NAME_BOUNDS_HEIGHT,
    )
    try:
        x0, y0, width, height = (int(properties[name]) for name in names)
    except (KeyError, ValueError):
        return (0, 0, level0.width, level0.height)
    x1, y1 = min(x0 + width, level0.width), min(y0 + height, level0.height)
    x0, y0 = max(x0, 0), max(y0, 0)
    if x1 <= x0 or y1 <= y0:
        return (0, 0, level0.width, level0.height)
    return (x0, y0, x1 - x0, y1 - y0)


def _background(properties: Mapping[str, str]) -> tuple[int, int, int]:
    text = properties.get(openslide.PROPERTY_NAME_BACKGROUND_COLOR, "")
    try:
        red, green, blue = bytes.fromhex(text)
    except ValueError:
        return _WHITE
    return (red, green, blue)
