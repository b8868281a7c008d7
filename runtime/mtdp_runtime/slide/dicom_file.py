"""What a DICOM file of a slide says: as much of PS3.3 (A.32.8, whole slide microscopy), PS3.5 and PS3.10 as it takes.

Only the attributes that decide where a pixel lies and what its colour is are kept; all others are stepped over. The
attributes of each frame are read only where the frames' places stand there, for a slide has a hundred thousand of them.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

EXPLICIT: Final = "1.2.840.10008.1.2.1"
IMPLICIT: Final = "1.2.840.10008.1.2"
UNDEFINED: Final = 0xFFFFFFFF
ITEM: Final = 0xFFFEE000
_NOT_AS_IT_IS: Final = {
    "1.2.840.10008.1.2.1.99": "its header is deflated",
    "1.2.840.10008.1.2.2": "its numbers are big endian, which DICOM has retired",
}
_LONG: Final = frozenset({b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"})
_ITEM_END: Final = 0xFFFEE00D
_SEQUENCE_END: Final = 0xFFFEE0DD
_DEEPEST: Final = 20
_MOST_VALUE_BYTES: Final = 1 << 28  # of a table of offsets: 32 million frames

SYNTAX, IMAGE_TYPE, SOP_UID, SERIES_UID = 0x00020010, 0x00080008, 0x00080018, 0x0020000E
_CONCATENATION_SOURCE, _CONCATENATION_OFFSET = 0x00200242, 0x00209228
_ORGANIZATION: Final = 0x00209311
_SAMPLES, _PHOTOMETRIC, _PLANAR, _FRAMES, _ROWS, _COLUMNS = (0x00280002, 0x00280004, 0x00280006, 0x00280008,
                                                             0x00280010, 0x00280011)  # fmt: skip
_SPACING: Final = 0x00280030
_ALLOCATED, _STORED, _REPRESENTATION = 0x00280100, 0x00280101, 0x00280103
_MEASURES: Final = 0x00289110
_WIDTH, _HEIGHT = 0x00480006, 0x00480007
_PLACE, _COLUMN, _ROW = 0x0048021A, 0x0048021E, 0x0048021F
_PATHS, _PLANES = 0x00480302, 0x00480303
_SHARED, _PER_FRAME = 0x52009229, 0x52009230
_OFFSETS, _LENGTHS, _PIXELS = 0x7FE00001, 0x7FE00002, 0x7FE00010
_SEQUENCES: Final = frozenset({_MEASURES, _PLACE, _SHARED, _PER_FRAME})
_VALUES: Final = frozenset(
    {
        *(SYNTAX, IMAGE_TYPE, SOP_UID, SERIES_UID, _CONCATENATION_SOURCE, _CONCATENATION_OFFSET, _ORGANIZATION),
        *(_SAMPLES, _PHOTOMETRIC, _PLANAR, _FRAMES, _ROWS, _COLUMNS, _SPACING, _ALLOCATED, _STORED, _REPRESENTATION),
        *(_WIDTH, _HEIGHT, _COLUMN, _ROW, _PATHS, _PLANES, _OFFSETS, _LENGTHS),
    }
)

Dataset = dict[int, "bytes | list[Dataset]"]  # by tag; a sequence is a list of its items


class NotDicom(Exception):
    """Why a file is not an image that is read here, and what it says that it shows (ImageType), as far as was read."""

    def __init__(self, why: str, image_type: tuple[str, ...] = ()) -> None:
        super().__init__(why)
        self.image_type = image_type


@dataclass(frozen=True, slots=True)
class Instance:
    """One file's image."""

    path: Path
    syntax: str  # transfer syntax: how its pixels are written
    uid: str
    series: str
    image_type: tuple[str, ...]
    width: int  # of the whole picture, in pixels
    height: int
    tile_width: int
    tile_height: int
    frames: int  # tiles in this file
    organization: str  # TILED_FULL, TILED_SPARSE or nothing
    places: tuple[tuple[int, int], ...]  # x and y of each frame, from 0; () where their order says it
    spacing_mm: tuple[float, float] | None  # width and height of a pixel
    photometric: str
    samples: int
    bits: tuple[int, int, int]  # allocated, stored, 1 where signed
    planar: int
    paths: int  # optical paths: stains, channels
    planes: int  # focal planes
    part_of: str  # what it is a part of, where a picture is spread over files; else its own UID
    part_from: int  # the first frame of this part
    pixels_at: int  # where the value of Pixel Data begins
    pixels_bytes: int  # UNDEFINED where it is made of items
    offsets: tuple[int, ...]  # Extended Offset Table; () where there is none


def read_instance(path: Path) -> Instance:
    """Read what a file says, without its pixels.

    Raises:
        NotDicom: it is no DICOM image, or not one that is read here.
        OSError: it cannot be read.
    """
    data: Dataset = {}
    try:
        with path.open("rb") as stream:
            stream.seek(128)
            if stream.read(4) != b"DICM":
                raise NotDicom("no DICOM file")
            found = _read(stream, data, os.fstat(stream.fileno()).st_size)
            at = stream.tell()
        if found is None:
            raise NotDicom("it holds no pixels", _image_type(data))
        return _instance(path, data, at, found)
    except (struct.error, ValueError, IndexError) as error:
        raise NotDicom(f"its DICOM structure is damaged: {error}", _image_type(data)) from error


def _read(stream: BinaryIO, data: Dataset, end: int) -> int | None:
    """Read up to the pixels, and return their size; None where there are none."""
    implicit = False
    while stream.tell() < end:
        tag, kind, size = _header(stream, implicit)
        if tag == _PIXELS:
            return size
        if tag == _PER_FRAME and _text(data, _ORGANIZATION) == "TILED_FULL":
            _skip(stream, kind, size, implicit, 0)
        else:
            _take(stream, data, tag, kind, size, implicit, 0)
        if tag == SYNTAX:
            syntax = _text(data, SYNTAX)
            if syntax in _NOT_AS_IT_IS:
                raise NotDicom(f"{_NOT_AS_IT_IS[syntax]} (transfer syntax {syntax})")
            implicit = syntax == IMPLICIT
    return None


def _header(stream: BinaryIO, implicit: bool) -> tuple[int, bytes, int]:
    """Return the next element's tag, its kind of value (nothing where that is not written), and its size in bytes."""
    group, element = struct.unpack("<HH", stream.read(4))
    tag = group << 16 | element
    if group == 0xFFFE or (implicit and group != 2):
        return tag, b"", struct.unpack("<I", stream.read(4))[0]
    kind = stream.read(2)
    if kind in _LONG:
        return tag, kind, struct.unpack("<2xI", stream.read(6))[0]
    return tag, kind, struct.unpack("<H", stream.read(2))[0]


def _take(stream: BinaryIO, data: Dataset, tag: int, kind: bytes, size: int, implicit: bool, depth: int) -> None:
    if tag in _SEQUENCES:
        data[tag] = _items(stream, size, implicit or kind == b"UN", depth + 1)
    elif tag in _VALUES and size != UNDEFINED:
        if size > _MOST_VALUE_BYTES:
            raise ValueError(f"a value of {size} bytes")
        value = stream.read(size)
        if len(value) < size:
            raise ValueError("the file ends in its header")
        data[tag] = value
    else:
        _skip(stream, kind, size, implicit, depth)


def _items(stream: BinaryIO, size: int, implicit: bool, depth: int) -> list[Dataset]:
    if depth > _DEEPEST:
        raise ValueError("sequences within sequences without end")
    end = None if size == UNDEFINED else stream.tell() + size
    items: list[Dataset] = []
    while end is None or stream.tell() < end:
        tag, _, inner = _header(stream, implicit)
        if tag == _SEQUENCE_END:
            break
        if tag != ITEM:
            raise ValueError("no item where one was expected")
        item: Dataset = {}
        item_end = None if inner == UNDEFINED else stream.tell() + inner
        while item_end is None or stream.tell() < item_end:
            tag, kind, inner = _header(stream, implicit)
            if tag == _ITEM_END:
                break
            _take(stream, item, tag, kind, inner, implicit, depth)
        items.append(item)
    return items


def _skip(stream: BinaryIO, kind: bytes, size: int, implicit: bool, depth: int) -> None:
    """Step over a value; one of undefined length is a sequence or an item, which ends with a mark of its own."""
    if size != UNDEFINED:
        stream.seek(size, 1)
        return
    if depth > _DEEPEST:
        raise ValueError("sequences within sequences without end")
    implicit = implicit or kind == b"UN"  # PS3.5, 6.2.2
    while True:
        tag, inner_kind, inner = _header(stream, implicit)
        if tag in (_ITEM_END, _SEQUENCE_END):
            return
        _skip(stream, inner_kind, inner, implicit, depth + 1)


def _instance(path: Path, data: Dataset, pixels_at: int, pixels_bytes: int) -> Instance:
    shared = _first(data, _SHARED)
    measures = _first(shared, _MEASURES) or _first(_first(data, _PER_FRAME), _MEASURES)
    frames_each = data.get(_PER_FRAME)
    places = []
    if isinstance(frames_each, list) and _text(data, _ORGANIZATION) != "TILED_FULL":
        places = [_place(_first(frame, _PLACE)) for frame in frames_each]
    if any(place is None for place in places):
        places = []
    uid = _text(data, SOP_UID)
    return Instance(
        path=path,
        syntax=_text(data, SYNTAX),
        uid=uid,
        series=_text(data, SERIES_UID),
        image_type=_image_type(data),
        width=_number(data, _WIDTH, 0),
        height=_number(data, _HEIGHT, 0),
        tile_width=_number(data, _COLUMNS, 0),
        tile_height=_number(data, _ROWS, 0),
        frames=int(_text(data, _FRAMES) or "1"),
        organization=_text(data, _ORGANIZATION),
        places=tuple(place for place in places if place is not None),
        spacing_mm=_spacing(_text(measures, _SPACING)),
        photometric=_text(data, _PHOTOMETRIC),
        samples=_number(data, _SAMPLES, 1),
        bits=(_number(data, _ALLOCATED, 0), _number(data, _STORED, 0), _number(data, _REPRESENTATION, 0)),
        planar=_number(data, _PLANAR, 0),
        paths=_number(data, _PATHS, 1),
        planes=_number(data, _PLANES, 1),
        part_of=_text(data, _CONCATENATION_SOURCE) or uid,
        part_from=_number(data, _CONCATENATION_OFFSET, 0),
        pixels_at=pixels_at,
        pixels_bytes=pixels_bytes,
        offsets=_numbers(data.get(_OFFSETS)),
    )


def _image_type(data: Dataset) -> tuple[str, ...]:
    return tuple(part.strip() for part in _text(data, IMAGE_TYPE).split("\\"))


def _first(data: Dataset, tag: int) -> Dataset:
    items = data.get(tag)
    return items[0] if isinstance(items, list) and items else {}


def _text(data: Dataset, tag: int) -> str:
    value = data.get(tag, b"")
    return value.rstrip(b"\0 ").decode("ascii", "replace").strip() if isinstance(value, bytes) else ""


def _number(data: Dataset, tag: int, otherwise: int) -> int:
    """Return an unsigned integer of 2 or 4 bytes."""
    value = data.get(tag)
    return int.from_bytes(value, "little") if isinstance(value, bytes) and len(value) in (2, 4) else otherwise


def _numbers(value: object) -> tuple[int, ...]:
    """Return the integers of 8 bytes that a value is made of."""
    return struct.unpack(f"<{len(value) // 8}Q", value[: len(value) // 8 * 8]) if isinstance(value, bytes) else ()


def _place(item: Dataset) -> tuple[int, int] | None:
    """Return x and y from 0; DICOM counts from 1. They are signed, four bytes each."""
    column, row = item.get(_COLUMN), item.get(_ROW)
    if not (isinstance(column, bytes) and isinstance(row, bytes) and len(column) == len(row) == 4):
        return None
    return struct.unpack("<i", column)[0] - 1, struct.unpack("<i", row)[0] - 1


def _spacing(text: str) -> tuple[float, float] | None:
    """Return the width and height of a pixel; DICOM says the distance of rows first."""
    parts = text.split("\\")
    try:
        return (float(parts[1]), float(parts[0])) if len(parts) == 2 else None
    except ValueError:
        return None
