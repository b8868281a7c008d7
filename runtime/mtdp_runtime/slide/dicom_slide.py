"""The reader of DICOM slides: the files of a series whose pictures are levels of one pyramid, read frame by frame.

OpenSlide reads DICOM, too, but takes the label's word for the colours, believes damaged frames, and computes a level's
factor from its padded size; so it is not asked. What is not read here is refused, and why is said.
"""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path
from typing import Any, Final, cast

import imagecodecs
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from mtdp_runtime.errors import SlideUnreadable, TileUnreadable
from mtdp_runtime.slide import Level, SlideInfo
from mtdp_runtime.slide.dicom_file import Instance
from mtdp_runtime.slide.dicom_frames import JPEG, JPEG_2000, decode_frame, frame_of
from mtdp_runtime.slide.dicom_levels import DicomLevel, NotRead, as_image, level_of, pictures_of
from mtdp_runtime.slide.pyramid import judge, left_out
from mtdp_runtime.slide.scale import Scale, checked
from mtdp_runtime.slide.tile_cache import Key, TileCache
from mtdp_runtime.slide.tile_jpeg import REDUCTIONS
from mtdp_runtime.slide.tiled_tiff import TiledTiffReader

_CACHE_BYTES: Final = 256 << 20
_WHITE: Final = (255, 255, 255)
_EXPORT: Final = "Export it as 8-bit RGB, in JPEG, JPEG 2000, RLE or uncompressed."
_COPY_AGAIN: Final = "The file is damaged there: compare its checksum with the original and copy it again."


class DicomReader(TiledTiffReader):
    """A DICOM series as a slide. Tiles become a window as in a tiled TIFF; they are found and decoded differently."""

    def __init__(self, path: Path, series: str, slide_mpp: float | None, given_by: str) -> None:
        """Open the series that a file belongs to, from the file's folder.

        Raises:
            SlideUnreadable: it has no full-resolution picture that is read here.
        """
        self._files: list[int] = []
        try:
            self._open(path, series, slide_mpp, given_by)
        except (OSError, MemoryError) as error:
            self.close()
            raise SlideUnreadable(f"{path}: {error}", hint="Check the disk, and copy the file again.") from error
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path, series: str, slide_mpp: float | None, given_by: str) -> None:
        pictures, skipped = pictures_of(path, series)
        verdicts = judge([as_image(parts[0], pictures[0][0]) for parts in pictures])
        levels, factors, read, missing = [], [], [], left_out(verdicts)
        for number, (parts, verdict) in enumerate(zip(pictures, verdicts, strict=True)):
            if verdict.downsample is None:
                continue
            try:
                levels.append(level_of(parts, self._opened))
            except NotRead as reason:
                first = parts[0]
                if not number:
                    raise SlideUnreadable(f"{first.path}: {reason}", hint=_EXPORT) from reason
                missing += f"; level of {first.width} x {first.height} px left out: {reason}"
                continue
            factors.append(verdict.downsample)
            read += parts
        self._levels = cast("Any", tuple(levels))  # they have the fields that reading a window takes
        self._drawn_from_finer = False
        self._cache = TileCache(_CACHE_BYTES)
        self._own = threading.local()
        scale = (slide_mpp, given_by) if slide_mpp is not None else _scale(pictures[0][0])
        codecs = sorted({level.codec for level in levels})
        versions = {JPEG: f" (simplejpeg {simplejpeg.__version__})", JPEG_2000: f" ({imagecodecs.jpeg2k_version()})"}
        reducible = all(
            level.codec == JPEG and not level.tile_width % max(REDUCTIONS) and not level.tile_height % max(REDUCTIONS)
            for level in levels
        )
        self.info = SlideInfo(
            path=path,
            size_bytes=path.stat().st_size,
            vendor="dicom",
            levels=tuple(Level(one.width, one.height, by) for one, by in zip(levels, factors, strict=True)),
            mpp=scale[0],
            mpp_source=scale[1],
            bounds=(0, 0, levels[0].width, levels[0].height),
            background=_WHITE,
            quickhash=hashlib.sha256("\n".join(sorted(part.uid for part in read)).encode()).hexdigest(),
            reader="mtdp DICOM, " + " and ".join(codec + versions.get(codec, "") for codec in codecs),
            reader_reason="frames are decoded strictly, by the colours that they state" + missing + skipped,
            own_decoder=True,
            reductions=REDUCTIONS if reducible else (),
        )

    def close(self) -> None:
        files, self._files = self._files, []
        for file in files:
            os.close(file)

    def _opened(self, path: Path) -> tuple[int, int]:
        """Open a file of the slide: its number here, and its descriptor."""
        self._files.append(os.open(path, os.O_RDONLY))
        return len(self._files) - 1, self._files[-1]

    def _decode(self, key: Key, out: NDArray[np.uint8]) -> None:
        """Fill out, uint8[tile_height / reduction, tile_width / reduction, 3]."""
        level = cast("DicomLevel", self._levels[key[0]])
        reduction, number = key[1], key[2]
        try:
            size_bytes = level.sizes_bytes[number]
            if size_bytes < 0:
                raise ValueError("the file ends before it")
            data = os.pread(self._files[level.files[number]], size_bytes, level.offsets[number])
            if len(data) < size_bytes:
                raise ValueError("the file ends within it")
            frame = frame_of(data) if level.compressed else data
            decode_frame(level.codec, frame, level.colours, level.planar, reduction, out)
        except (OSError, OverflowError, MemoryError, ValueError) as error:
            row, column = divmod(number, level.across)
            raise TileUnreadable(
                f"{self.info.path}: cannot decode the tile in column {column}, row {row} of level {key[0]}: "
                f"{level.codec}: {error}",
                hint=_COPY_AGAIN,
            ) from error


def _scale(first: Instance) -> Scale:
    if first.spacing_mm is None:
        return None, "the slide does not say (no PixelSpacing)"
    return checked(first.spacing_mm[0] * 1000, first.spacing_mm[1] * 1000, "DICOM PixelSpacing")
