"""Whether a slide is still the same: its size and times tell quickly that it is, a sample of its bytes that it is not.

Times change with a copy, a chmod or another mount: they only say when to look. The sample is 64 pieces of 16 KiB,
spread evenly over all files of the slide, or all of a slide that is smaller.
"""

from __future__ import annotations

import errno
import hashlib
from io import RawIOBase
from pathlib import Path
from typing import Final

from mtdp_runtime.errors import SlideError
from mtdp_runtime.slide import dicom, mirax, zarr_folder

_PIECES: Final = 64
_PIECE_BYTES: Final = 1 << 14
_BY_OTHER_NAMES: Final = frozenset({".vms", ".vmu"})  # name their other files inside


def parts_of(slide: Path) -> list[Path]:
    """Return all files and folders that a slide is made of; empty where that is not known.

    Raises:
        SlideError: a part that it must have is not there.
    """
    kind = slide.suffix.lower()
    if zarr_folder.is_zarr(slide):
        return [slide]
    if slide.is_dir():
        slide, kind = dicom.the_series(slide), dicom.SUFFIX
    if kind == dicom.SUFFIX or dicom.is_dicom(slide):
        series = dicom.series_of(slide)
        return dicom.series_in(slide.parent).get(series, [slide])
    if kind == mirax.SUFFIX:
        beside = mirax.with_its_folder(slide)
        return [beside, beside.with_suffix("")]
    return [] if kind in _BY_OTHER_NAMES else [slide]


def hint_of(slide: Path) -> str:
    """Return size and newest times of a slide's files; empty where they cannot be had."""
    try:
        facts = [file.stat() for file in _files_of(slide)]
    except (OSError, SlideError):
        return ""
    size = sum(one.st_size for one in facts)
    return f"{size} {max(one.st_mtime_ns for one in facts)} {max(one.st_ctime_ns for one in facts)}" if facts else ""


def sample_of(slide: Path) -> str:
    """Return 32 hex digits of a sample of a slide's bytes; empty where it cannot be read."""
    try:
        files = [(file, file.stat().st_size) for file in _files_of(slide)]
        total = sum(size for _, size in files)
        digest = hashlib.blake2b(str(total).encode(), digest_size=16)
        whole = total <= _PIECES * _PIECE_BYTES
        offsets = [0] if whole else [i * (total - _PIECE_BYTES) // (_PIECES - 1) for i in range(_PIECES)]
        length, start = total if whole else _PIECE_BYTES, 0
        for file, size in files:
            with file.open("rb", buffering=0) as stream:
                for offset in offsets:
                    first, last = max(offset, start), min(offset + length, start + size)
                    if first < last:
                        stream.seek(first - start)
                        digest.update(_read(stream, last - first))
            start += size
    except (OSError, SlideError):
        return ""
    return digest.hexdigest() if files else ""


def _read(stream: RawIOBase, length: int) -> bytes:
    parts = []
    while length:
        part = stream.read(length)
        if not part:
            raise OSError(errno.EIO, "the file is shorter than it was")
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def _files_of(slide: Path) -> list[Path]:
    found = [one for part in parts_of(slide) or [slide] for one in ([part] if part.is_file() else part.rglob("*"))]
    return sorted(one for one in found if one.is_file())


def size_of(slide: Path) -> int:
    """Return the bytes of a slide's files; 0 where they cannot be had."""
    try:
        return sum(file.stat().st_size for file in _files_of(slide))
    except (OSError, SlideError, ValueError):
        return 0
