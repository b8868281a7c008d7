"""Where a DICOM file's frames lie (PS3.5, A.4), and one frame decoded; damage is an error.

What a frame says of its own colours stands above the file's label, for converters copy the label: a JPEG's JFIF or
Adobe marker, its component names and its subsampling; JPEG 2000's flag for a colour transform, which the decoder then
undoes. Only where a frame says nothing does the label decide, and it is refused where the pixels plainly contradict it.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.slide import tile_jpeg, tile_jpeg2000
from mtdp_runtime.slide.dicom_file import EXPLICIT, IMPLICIT, UNDEFINED, Instance

RAW, RLE, JPEG, JPEG_2000 = "raw", "RLE", "JPEG", "JPEG 2000"
CODECS: Final = {
    EXPLICIT: RAW,
    IMPLICIT: RAW,
    "1.2.840.10008.1.2.5": RLE,
    "1.2.840.10008.1.2.4.50": JPEG,
    "1.2.840.10008.1.2.4.51": JPEG,
    "1.2.840.10008.1.2.4.90": JPEG_2000,
    "1.2.840.10008.1.2.4.91": JPEG_2000,
}
_ITEM_HEADER: Final = struct.Struct("<II")
_ITEM_AS_READ: Final = 0xE000FFFE  # the tag (FFFE,E000) read as one number of four bytes
_END_AS_READ: Final = 0xE0DDFFFE
_STARTS: Final = (b"\xff\xd8\xff", b"\xff\x4f\xff\x51")  # of a JPEG, of a JPEG 2000 codestream


@dataclass(frozen=True, slots=True)
class Frames:
    """Where the frames of a file lie, with the headers of their items; a size of -1 where the file does not have it."""

    at: tuple[int, ...]
    sizes_bytes: tuple[int, ...]


def locate(instance: Instance, file: int) -> Frames:
    """Find the frames of an open file.

    Raises:
        ValueError: nothing says which bytes are which frame's.
    """
    count = instance.frames
    if instance.pixels_bytes != UNDEFINED:
        size = instance.tile_width * instance.tile_height * 3
        if instance.pixels_bytes < count * size:
            raise ValueError(
                f"{count} frames need {count * size} bytes, and it says that there are {instance.pixels_bytes}"
            )
        return Frames(tuple(instance.pixels_at + i * size for i in range(count)), (size,) * count)
    end = os.fstat(file).st_size
    tag, table_bytes = _item(file, instance.pixels_at)
    if tag != _ITEM_AS_READ or table_bytes > end:
        raise ValueError("its compressed pixels do not begin with a table of offsets")
    table = os.pread(file, table_bytes, instance.pixels_at + 8)
    first = instance.pixels_at + 8 + table_bytes
    offsets = instance.offsets or struct.unpack(f"<{len(table) // 4}I", table[: len(table) // 4 * 4])
    rising = all(later - earlier >= 8 for earlier, later in pairwise(offsets))
    if len(offsets) == count and offsets[0] == 0 and rising:  # 32 bits begin anew behind 4 GiB
        at = [first + offset for offset in offsets]
        return _spans(at, _last_end(file, at[-1], end), end)
    return _by_items(instance, file, first, end)


def _spans(at: list[int], last_end: int, end: int) -> Frames:
    ends = [*at[1:], last_end]
    return Frames(tuple(at), tuple(b - a if b <= end else -1 for a, b in zip(at, ends, strict=True)))


def _last_end(file: int, at: int, end: int) -> int:
    """Return where the last frame's items end; beyond the file where it is cut."""
    while at + 8 <= end:
        tag, size = _item(file, at)
        if tag != _ITEM_AS_READ:
            return at if tag == _END_AS_READ else end + 1
        at += 8 + size
    return end + 1


def _by_items(instance: Instance, file: int, at: int, end: int) -> Frames:
    """Find the frames by going from item to item: one each, or else each from a picture's first bytes to the next's."""
    items: list[int] = []
    whole = False
    while at + 8 <= end:
        tag, size = _item(file, at)
        whole = tag == _END_AS_READ
        if tag != _ITEM_AS_READ:
            break
        items.append(at)
        at += 8 + size
    stop = at if whole else min(at, end + 1)
    if len(items) != instance.frames or not whole:
        starts = [at for at in items if os.pread(file, 4, at + 8).startswith(_STARTS)]
        if instance.frames == 1 and items:
            starts = items[:1]
        if len(starts) > instance.frames or (whole and len(starts) != instance.frames) or starts[:1] != items[:1]:
            raise ValueError(
                f"{len(items)} pieces are to be {instance.frames} frames, and no table says which are whose"
            )
        items = starts
    missing = instance.frames - len(items)
    found = _spans(items, stop, end) if items else Frames((), ())
    return Frames(found.at + (end,) * missing, found.sizes_bytes + (-1,) * missing)


def _item(file: int, at: int) -> tuple[int, int]:
    header = os.pread(file, 8, at)
    return _ITEM_HEADER.unpack(header) if len(header) == 8 else (0, 0)


def frame_of(data: bytes) -> bytes:
    """Return a compressed frame without the headers of its items.

    Raises:
        ValueError: they do not follow each other to the end.
    """
    parts, at = [], 0
    while at < len(data):
        if at + 8 > len(data):
            raise ValueError("a damaged item")
        tag, size = _ITEM_HEADER.unpack_from(data, at)
        if tag != _ITEM_AS_READ or at + 8 + size > len(data):
            raise ValueError("a damaged item")
        parts.append(data[at + 8 : at + 8 + size])
        at += 8 + size
    frame = parts[0] if len(parts) == 1 else b"".join(parts)
    if not frame:
        raise ValueError("an empty frame")
    return frame


def own_colours(codec: str, frame: bytes) -> str:
    """Return "RGB" or "YCBCR" as a frame says itself that its decoded pixels are; nothing where it does not say.

    Raises:
        UnknownKind: it is not of three components of 8 bits, or of another kind that is not read.
        ValueError: it is no such frame.
    """
    if codec == JPEG:
        head = tile_jpeg.read_head(frame)
        tile_jpeg.check_kind(head, 3)
        return tile_jpeg.own_colours(head)
    if codec == JPEG_2000:
        header = tile_jpeg2000.read_header(frame)
        tile_jpeg2000.check_kind(header, 3)
        return "RGB" if header.transformed else ""
    return ""


def decode_frame(codec: str, frame: bytes, colours: str, planar: bool, reduction: int, out: NDArray[np.uint8]) -> None:
    """Decode a frame.

    Args:
        codec: RAW, RLE, JPEG or JPEG_2000.
        frame: its bytes.
        colours: what the pixels are where the frame does not say, "RGB" or "YCBCR".
        planar: raw pixels lie in three planes.
        reduction: 1, or for JPEG one of `tile_jpeg.REDUCTIONS`.
        out: uint8[height / reduction, width / reduction, 3], filled with RGB; undefined after an error.

    Raises:
        ValueError: damaged, or of another size or kind.
    """
    if codec == JPEG:
        tile_jpeg.decode_tile(frame, None, colours, reduction, out)
        return
    colours = own_colours(codec, frame) or colours
    if not colours:
        raise ValueError("nothing says what its colours are")
    if codec == JPEG_2000:
        tile_jpeg2000.decode_tile(frame, colours == "YCBCR", out)
    else:
        pixels = _unpacked(frame, out.shape[0], out.shape[1]) if codec == RLE else _plain(frame, out.shape, planar)
        out[...] = _rgb(pixels) if colours == "YCBCR" else pixels


def _plain(frame: bytes, shape: tuple[int, ...], planar: bool) -> NDArray[np.uint8]:
    if len(frame) != shape[0] * shape[1] * 3:
        raise ValueError(f"{len(frame)} bytes for {shape[1]} x {shape[0]} px")
    pixels = np.frombuffer(frame, np.uint8)
    return np.moveaxis(pixels.reshape(3, *shape[:2]), 0, 2) if planar else pixels.reshape(shape)


def _unpacked(frame: bytes, height: int, width: int) -> NDArray[np.uint8]:
    """Return uint8[height, width, 3] of a frame in DICOM's RLE (PS3.5, annex G): three planes of PackBits."""
    count, *offsets = struct.unpack("<16I", frame[:64]) if len(frame) >= 64 else (0,)
    if count != 3 or not 64 <= offsets[0] < offsets[1] < offsets[2] < len(frame):
        raise ValueError(f"RLE in {count} segments, three were expected")
    planes = []
    for start, end in zip(offsets[:3], (*offsets[1:3], len(frame)), strict=True):
        try:
            plane = imagecodecs.packbits_decode(frame[start:end])
        except Exception as error:  # the codec has errors of its own
            raise ValueError(f"RLE: {error}") from error
        # A segment is filled up to an even length: with a zero, which would be one more pixel.
        if not height * width <= len(plane) <= height * width + 1:
            raise ValueError(f"RLE gives {len(plane)} px of {height * width}")
        planes.append(np.frombuffer(plane, np.uint8, height * width).reshape(height, width))
    return np.dstack(planes)


def _rgb(ycbcr: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Convert by ITU-T T.871, which is DICOM's YBR_FULL, too (PS3.3, C.7.6.3.1.2)."""
    y, cb, cr = (ycbcr[..., i].astype(np.float32) for i in range(3))
    red, blue = y + 1.402 * (cr - 128), y + 1.772 * (cb - 128)
    green = y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128)
    return np.asarray(np.clip(np.rint(np.stack([red, green, blue], axis=2)), 0, 255), np.uint8)


def plainly(pixels: NDArray[np.uint8]) -> str:
    """Say what uint8[H, W, 3] plainly is, "RGB" or "YCBCR", by its detail; nothing where it is not plain.

    Red and green show the same detail with like strength. Blue and red difference lie near 128 and show little of it.
    """
    values = pixels.astype(np.float32)
    detail = np.concatenate([np.diff(values, axis=axis).reshape(-1, 3) for axis in (0, 1)])
    strength = (detail**2).mean(axis=0)
    if strength[0] < 4 and strength[1] < 4:
        return ""
    near_grey = np.abs(values.reshape(-1, 3)[:, 1:].mean(axis=0) - 128).max() < 40
    if near_grey and max(strength[1], strength[2]) < 0.3 * strength[0]:
        return "YCBCR"
    together = float((detail[:, 0] * detail[:, 1]).mean() / np.sqrt(strength[0] * strength[1] + 1e-6))
    return "RGB" if together > 0.7 and strength[1] > 0.4 * strength[0] else ""
