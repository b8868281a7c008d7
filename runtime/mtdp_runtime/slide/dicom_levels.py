"""The pictures of a DICOM series, and each as a level: which bytes of which file are which tile, and their colours."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.errors import SlideUnreadable
from mtdp_runtime.slide.dicom import series_in
from mtdp_runtime.slide.dicom_file import UNDEFINED, Instance, NotDicom, read_instance
from mtdp_runtime.slide.dicom_frames import (
    CODECS,
    JPEG,
    JPEG_2000,
    RAW,
    Frames,
    decode_frame,
    frame_of,
    locate,
    own_colours,
    plainly,
)
from mtdp_runtime.slide.probe import UnknownKind
from mtdp_runtime.slide.pyramid import Candidate

VOLUME: Final = "VOLUME"  # the third word of ImageType (PS3.3, C.8.12.4.1.1): a picture of the slide
_MOST_TILE_PX: Final = 1 << 26
_MOST_TILES: Final = 1 << 24
_PROBES: Final = 16  # frames that may be damaged before the first whole one is found
_COLOURS: Final = {"RGB": "RGB", "YBR_FULL": "YCBCR", "YBR_FULL_422": "YCBCR", "YBR_ICT": "YCBCR"}
_RAW_COLOURS: Final = {"RGB": "RGB", "YBR_FULL": "YCBCR"}
_WORDS: Final = {"RGB": "RGB", "YCBCR": "YCbCr"}
_EIGHT_BITS: Final = ((8, 8, 0), (8, 0, 0))  # allocated, stored, signed


class NotRead(Exception):
    """Why a picture is not read."""


@dataclass(frozen=True, slots=True)
class DicomLevel:
    """A level as it lies in the files; the names are those of a tiled TIFF's level."""

    width: int
    height: int
    tile_width: int
    tile_height: int
    across: int
    offsets: tuple[int, ...]  # by tile, row by row
    sizes_bytes: tuple[int, ...]  # 0 where there is no frame, -1 where the file ends before it
    scanned: NDArray[np.bool_]  # [rows, across]
    files: tuple[int, ...]  # by tile: which of the reader's files
    codec: str
    compressed: bool
    colours: str  # what pixels are that do not say it themselves: "RGB", "YCBCR" or nothing
    planar: bool


def pictures_of(path: Path, series: str) -> tuple[list[list[Instance]], str]:
    """Return the pictures of a series that show the slide, the largest first, each as its parts; and what was left out.

    A label or an overview is no such picture, whatever it is made of.
    """
    found: dict[str, list[Instance]] = {}
    refused = []
    for member in series_in(path.parent).get(series, [path]):
        try:
            instance = read_instance(member)
        except (NotDicom, OSError) as reason:
            if isinstance(reason, NotDicom) and VOLUME not in reason.image_type[2:]:
                refused.append(f"{member.name}: {reason}")
                continue
            # It may be level 0: without it the slide would be a coarser one, and nobody would be told.
            raise SlideUnreadable(
                f"{path}: {member.name}, a picture of the slide: {reason}",
                hint="Compare the file's checksum with the original and copy it again.",
            ) from reason
        if VOLUME not in instance.image_type[2:]:
            continue
        parts = found.setdefault(instance.part_of, [])
        if instance.uid not in {part.uid for part in parts}:  # a copy under another name is no second picture
            parts.append(instance)
    if not found:
        why = "; ".join(refused) or "no file of its series is a picture of the slide (ImageType VOLUME)"
        raise SlideUnreadable(f"{path}: {why}", hint="Name a folder that holds all files of the slide.")
    pictures = [sorted(parts, key=lambda part: part.part_from) for parts in found.values()]
    pictures.sort(key=lambda parts: -parts[0].width * parts[0].height)
    sizes = [(parts[0].width, parts[0].height) for parts in pictures]
    if len(set(sizes)) < len(sizes):
        raise SlideUnreadable(
            f"{path}: its series has several pictures of one size: stains, focal planes, or slides of their own",
            hint="Keep the files of one of them in a folder, and name that.",
        )
    return pictures, "".join(f"; {one}" for one in refused)


def as_image(instance: Instance, first: Instance) -> Candidate:
    """Return an instance as a candidate for a level of the pyramid that `first` begins."""
    width, height = instance.width, instance.height
    if width < 1 or height < 1 or instance.tile_width < 1 or instance.tile_height < 1:
        raise SlideUnreadable(
            f"{instance.path}: {width} x {height} px in tiles of {instance.tile_width} x {instance.tile_height}",
            hint="It is no whole-slide image, or damaged.",
        )
    stated = None
    if instance.spacing_mm and first.spacing_mm and min(first.spacing_mm) > 0:
        stated = (instance.spacing_mm[0] / first.spacing_mm[0], instance.spacing_mm[1] / first.spacing_mm[1])
    return Candidate(width, height, stated, (instance.tile_width, instance.tile_height))


def level_of(parts: list[Instance], opened: Callable[[Path], tuple[int, int]]) -> DicomLevel:
    """Return a level from the file, or the files, that hold its frames."""
    first = parts[0]
    codec = _codec(first)
    across, down = -(-first.width // first.tile_width), -(-first.height // first.tile_height)
    if across * down > _MOST_TILES or first.tile_width * first.tile_height > _MOST_TILE_PX:
        raise NotRead(f"{across * down} tiles of {first.tile_width} x {first.tile_height} px")
    offsets, sizes, files = ([0] * (across * down) for _ in range(3))
    descriptors = {}
    for part in parts:
        _check_like(part, first)
        number, descriptor = opened(part.path)
        descriptors[number] = descriptor
        frames = _located(part, descriptor)
        for tile, at, size in zip(_tiles(part, across, down), frames.at, frames.sizes_bytes, strict=True):
            if sizes[tile]:
                raise NotRead("several frames at one place: stains or focal planes")
            offsets[tile], sizes[tile], files[tile] = at, size, number
    if not first.places and 0 in sizes:
        raise NotRead(f"{sum(part.frames for part in parts)} frames, and {across} x {down} tiles were expected")
    level = DicomLevel(
        width=first.width,
        height=first.height,
        tile_width=first.tile_width,
        tile_height=first.tile_height,
        across=across,
        offsets=tuple(offsets),
        sizes_bytes=tuple(sizes),
        scanned=(np.asarray(sizes) != 0).reshape(down, across),
        files=tuple(files),
        codec=codec,
        compressed=first.pixels_bytes == UNDEFINED,
        colours="",
        planar=first.planar == 1,
    )
    return replace(level, colours=_colours(level, first.photometric, descriptors))


def _codec(instance: Instance) -> str:
    """Return how a picture's frames are written."""
    codec = CODECS.get(instance.syntax)
    if codec is None:
        raise NotRead(f"transfer syntax {instance.syntax} is not read here")
    if instance.samples != 3 or instance.bits not in _EIGHT_BITS:
        raise NotRead(
            f"its pixels are {instance.samples} x {instance.bits[1]} bits ({instance.photometric}), not 8-bit RGB"
        )
    if instance.paths != 1 or instance.planes != 1:
        raise NotRead(f"it has {instance.paths} optical paths and {instance.planes} focal planes, and one is read")
    if (codec == RAW) == (instance.pixels_bytes == UNDEFINED):
        raise NotRead(f"its pixels do not lie as transfer syntax {instance.syntax} says")
    return codec


def _check_like(part: Instance, first: Instance) -> None:
    """Raise NotRead unless a part of a picture is like its first part."""
    names = ("syntax", "width", "height", "tile_width", "tile_height", "photometric", "samples", "bits", "planar")
    if any(getattr(part, name) != getattr(first, name) for name in names) or bool(part.places) != bool(first.places):
        raise NotRead("its parts are not alike")
    if not 1 <= part.frames <= _MOST_TILES or (part.places and len(part.places) != part.frames):
        raise NotRead(f"it says that it has {part.frames} frames, and gives places of {len(part.places)}")
    if not part.places and part.organization == "TILED_SPARSE":
        raise NotRead("it does not say where its frames lie")


def _located(part: Instance, descriptor: int) -> Frames:
    try:
        return locate(part, descriptor)
    except (ValueError, struct.error) as error:
        raise NotRead(str(error)) from error


def _tiles(part: Instance, across: int, down: int) -> list[int]:
    """Return which tile each frame of a file is."""
    if not part.places:
        if part.part_from + part.frames > across * down:
            raise NotRead(f"{part.part_from + part.frames} frames, and {across} x {down} tiles were expected")
        return list(range(part.part_from, part.part_from + part.frames))
    tiles = []
    for x, y in part.places:
        column, left = divmod(x, part.tile_width)
        row, above = divmod(y, part.tile_height)
        if left or above or not (0 <= column < across and 0 <= row < down):
            raise NotRead(f"a frame at ({x}, {y}), which is no place of a grid of tiles")
        tiles.append(row * across + column)
    return tiles


def _colours(level: DicomLevel, label: str, descriptors: dict[int, int]) -> str:
    """Return what the frames are that do not say it themselves, by the file's label; nothing where it cannot be.

    Frames are decoded until one is plain, beginning with those that have the most bytes, which have the most detail:
    what can never be read is said now, and the label is not believed where the pixels plainly contradict it.
    """
    by_label = (_COLOURS if level.codec in (JPEG, JPEG_2000) else _RAW_COLOURS).get(label, "")
    sizes = level.sizes_bytes
    there = [number for number, size in enumerate(sizes) if size > 0]
    there = [number for start in range(_PROBES) for number in there[start::_PROBES]]  # raw ones all have one size
    order = sorted(there, key=lambda number: -sizes[number])
    out = np.empty((level.tile_height, level.tile_width, 3), np.uint8)
    reasons, decoded = [], False
    for number in order[:_PROBES]:
        try:
            data = os.pread(descriptors[level.files[number]], sizes[number], level.offsets[number])
            frame = frame_of(data) if level.compressed else data
            said = own_colours(level.codec, frame)
            if not said and not by_label:
                raise NotRead(f"its colours are {label}, which {level.codec} frames without a word on it cannot be")
            decode_frame(level.codec, frame, "RGB", level.planar, 1, out)  # as they are, where they do not say
        except UnknownKind as error:
            raise NotRead(str(error)) from error
        except ValueError as error:
            reasons.append(str(error))
            continue
        seen = "" if said else plainly(out)
        if seen and seen != by_label:
            raise NotRead(f"its colours are labelled {label}, and its pixels plainly are {_WORDS[seen]}")
        if said or seen:
            return by_label
        decoded = True  # glass alone, say
    if reasons and not decoded:
        raise NotRead(f"none of {len(reasons)} frames that were tried decodes: {reasons[0]}")
    return by_label
