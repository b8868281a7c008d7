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
import tifffile
from numpy.typing import NDArray

from mtdp_runtime.errors import SlideError, SlideUnreadable, TileUnreadable
from mtdp_runtime.slide import Level, SlideInfo, Source
from mtdp_runtime.slide.lattice import lattices_of
from mtdp_runtime.slide.pyramid import Candidate, judge, left_out
from mtdp_runtime.slide.same_picture import other_pictures, shows_something_else
from mtdp_runtime.slide.scale import resolution_of, scale_of
from mtdp_runtime.slide.source import source_at
from mtdp_runtime.slide.window import Window, read_averaged

_CACHE_BYTES: Final = 128 << 20  # decoded codec tiles, shared by all handles of a slide
_WHITE: Final = (255, 255, 255)
REFERENCE: Final = "the reference reader"
_COMPUTED: Final = frozenset({"generic-tiff", "aperio", "dicom"})  # vendors whose downsamples follow from the sizes
_SIDES: Final = ("width", "height")


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
            # Where an image is no level, or its factor is not what OpenSlide says, OpenSlide must still be asked in its
            # own terms: level i of `info` is its level `_own_levels[i]`, of downsample `_own_downsamples[i]`.
            self.info, self._own_levels = _info(path, handle, slide_mpp, given_by)
            self._own_downsamples = tuple(float(handle.level_downsamples[i]) for i in self._own_levels)
        except SlideError:
            self.close()
            raise
        self._idle.put(handle)
        if self.info.vendor == "generic-tiff":  # anybody's: what is flagged as reduced may be a macro
            self._leave_out_other_pictures()
        self._lattices = lattices_of(self.info.levels, self._own_levels, self._own_downsamples)
        levels = zip(self.info.levels, self._lattices, strict=True)
        self.info = replace(self.info, levels=tuple(replace(level, whole=lattice.whole) for level, lattice in levels))

    def _leave_out_other_pictures(self) -> None:
        """Keep as levels what shows the same as level 0; where a window cannot be read, reading says so later."""

        def read(level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
            downsample = self._own_downsamples[level]
            return self._read((round(x * downsample), round(y * downsample)), self._own_levels[level], (width, height))

        try:
            others = other_pictures(self.info.levels, read)
        except (openslide.OpenSlideError, SlideError):
            return
        if others:
            why = shows_something_else(self.info.levels, others)
            kept = [i for i in range(len(self.info.levels)) if i not in others]
            levels = tuple(self.info.levels[i] for i in kept)
            self.info = replace(self.info, levels=levels, reader_reason=self.info.reader_reason + why)
            self._own_levels = tuple(self._own_levels[i] for i in kept)
            self._own_downsamples = tuple(self._own_downsamples[i] for i in kept)

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


def _info(
    path: Path, handle: openslide.OpenSlide, slide_mpp: float | None, given_by: str
) -> tuple[SlideInfo, tuple[int, ...]]:
    """Return the facts, and which of OpenSlide's levels are levels of one picture."""
    properties = handle.properties
    vendor = properties.get(openslide.PROPERTY_NAME_VENDOR, "unknown")
    levels, own_levels, missing = _levels(handle, vendor)
    if slide_mpp is None:
        size = (levels[0].width, levels[0].height)
        mpp, mpp_source = scale_of(_of_level_0(path, properties, vendor, size), vendor, size)
    else:
        mpp, mpp_source = slide_mpp, given_by
    info = SlideInfo(
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
        reader_reason=REFERENCE + missing,
    )
    return info, own_levels


def _of_level_0(path: Path, properties: Mapping[str, str], vendor: str, size: tuple[int, int]) -> Mapping[str, str]:
    """Return the properties with the resolution of level 0: of a plain TIFF, OpenSlide gives the first directory's."""
    if vendor != "generic-tiff":
        return properties
    try:
        with tifffile.TiffFile(path) as tiff:
            page = next(p for p in map(tifffile.TiffPage.aspage, tiff.pages) if (p.imagewidth, p.imagelength) == size)
            x, y, unit = resolution_of(page)
    except Exception:  # OpenSlide reads a structure that tifffile stumbles over: then its own words stand
        return properties
    return {**properties, "tiff.XResolution": x, "tiff.YResolution": y, "tiff.ResolutionUnit": unit}


def _levels(handle: openslide.OpenSlide, vendor: str) -> tuple[tuple[Level, ...], tuple[int, ...], str]:
    """Return the levels, which of OpenSlide's each one is, and what was left out and why."""
    own = [float(downsample) for downsample in handle.level_downsamples]
    images = []
    for number, ((width, height), downsample) in enumerate(zip(handle.level_dimensions, own, strict=True)):
        # Formats with a grid of their own state whole factors; of a TIFF, OpenSlide computes them from the sizes.
        stated = vendor not in _COMPUTED and number > 0 and downsample.is_integer()
        tile = tuple(int(handle.properties.get(f"openslide.level[{number}].tile-{side}", 0)) for side in _SIDES)
        images.append(
            Candidate(width, height, (downsample, downsample) if stated else None, tile if all(tile) else None)
        )
    verdicts = judge(images)
    kept = tuple(number for number, verdict in enumerate(verdicts) if verdict.downsample is not None)
    levels = tuple(Level(images[i].width, images[i].height, verdicts[i].downsample or 1.0) for i in kept)
    return levels, kept, left_out(verdicts)


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
