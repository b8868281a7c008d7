"""OME-Zarr: a folder of chunks, multiscales 0.4 (Zarr 2) or 0.5 (Zarr 3), of which 8-bit RGB is taken.

The zarr library reads it; it is an extra (`pip install 'mtdp[zarr]'`). A chunk that is not there stands for the fill
value, and is what an incomplete copy lacks, too. So it is believed only where a coarser level shows the fill value, as
well; elsewhere it is an error. Specification: https://ngff.openmicroscopy.org
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.errors import SlideUnreadable
from mtdp_runtime.slide.channels import Channel, check_bright, named_rgb
from mtdp_runtime.slide.probe import UnknownKind, probe
from mtdp_runtime.slide.scale import Scale, checked
from mtdp_runtime.slide.tiff_pieces import Pieces, samples_of

SUFFIX: Final = ".zarr"
_METADATA: Final = (".zattrs", ".zgroup", "zarr.json")
_UM: Final = {
    "micrometer": 1.0,
    "nanometer": 1e-3,
    "millimeter": 1e3,
    "centimeter": 1e4,
    "meter": 1e6,
    "inch": 25_400.0,
}
_MOST_CHUNK_PX: Final = 1 << 28
_LEAST_PX: Final = 4  # sides of the place in a coarser level that vouches for a chunk
_SAME: Final = 8  # grey levels that a coder may change the fill value by


def is_zarr(folder: Path) -> bool:
    """Say whether a folder is a Zarr group."""
    return any((folder / name).is_file() for name in _METADATA)


def levels_of_zarr(folder: Path) -> tuple[tuple[Pieces, ...], Scale, str, str, tuple[Path, ...]]:
    """Return the levels, the finest first, the scale, the vendor, the reader, and the files that identify the image.

    Raises:
        UnknownKind: no multiscales 0.4 or 0.5, or not 8-bit RGB.
        SlideUnreadable: zarr is not installed, or its pixels are not square.
        Exception: zarr's; a damaged structure finds many ways.
    """
    try:
        import zarr
    except ImportError as error:
        raise SlideUnreadable(
            f"{folder}: an OME-Zarr, and the zarr library is not installed", hint="pip install 'mtdp[zarr]'"
        ) from error
    group: Any = zarr.open_group(str(folder), mode="r")
    place = folder
    told = _told(group)
    if "multiscales" not in told and "bioformats2raw.layout" in told:
        group, place = group["0"], folder / "0"
        told = _told(group)
    if not told.get("multiscales"):
        raise UnknownKind("a Zarr without multiscales: not an OME-Zarr image")
    scales = told["multiscales"][0]
    axes = scales.get("axes")
    if not axes or not all(isinstance(axis, Mapping) for axis in axes):
        raise UnknownKind("an OME-Zarr older than 0.4, which does not describe its axes: convert it anew")
    names = [str(axis["name"]) for axis in axes]
    arrays = [group[dataset["path"]] for dataset in scales["datasets"]]
    for array in arrays:
        _check(array, names)
    omero = told.get("omero", {})
    named = named_rgb(tuple(_channel(channel) for channel in omero.get("channels", ())))
    levels: list[Pieces] = []
    for array in reversed(arrays):  # the coarser first: they vouch for chunks that are not there
        levels.insert(0, _pieces(array, names, place, tuple(levels)))
    if not named:
        check_bright(samples_of(levels[-1]))
    paths = [place / str(dataset["path"]) for dataset in scales["datasets"]]
    files = [path / name for path in (folder, place, *paths) for name in (*_METADATA, ".zarray")]
    files += [path for path in paths[-1].rglob("*") if not path.name.startswith(".")]
    found = tuple(sorted({path for path in files if path.is_file()}))
    return tuple(levels), _scale(folder, scales, axes), "ome-zarr", f"zarr {zarr.__version__}", found


def size_of(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(os.path.getsize(os.path.join(root, name)) for root, _, names in os.walk(folder) for name in names)  # noqa: PTH118, PTH202 - a hundred thousand chunks


def _told(group: Any) -> Mapping[str, Any]:
    """Return what a group says as OME-Zarr: from 0.5 on under a name of its own."""
    attributes = dict(group.attrs)
    return {**attributes, **attributes["ome"]} if isinstance(attributes.get("ome"), Mapping) else attributes


def _check(array: Any, names: list[str]) -> None:
    sizes = dict(zip(names, array.shape, strict=True))
    if not {"y", "x"} <= sizes.keys():
        raise UnknownKind(f"an OME-Zarr of the axes {', '.join(names)}, not a picture")
    if sizes.get("c", 1) != 3 or array.dtype != np.uint8:
        raise UnknownKind(f"its pixels are {sizes.get('c', 1)} x {array.dtype}, not 8-bit RGB")
    more = {name: size for name, size in sizes.items() if name not in "cyx" and size != 1}
    if more:
        raise UnknownKind(
            f"an image of several planes ({', '.join(f'{n} {s}' for n, s in more.items())}), not a picture"
        )


def _channel(told: Mapping[str, Any]) -> Channel:
    return Channel(str(told.get("label") or ""), str(told.get("color") or ""))


def _pieces(array: Any, names: list[str], place: Path, coarser: tuple[Pieces, ...]) -> Pieces:
    sizes, chunks = (dict(zip(names, values, strict=True)) for values in (array.shape, array.chunks))
    stored = dict(zip(names, array.shards or array.chunks, strict=True))
    width, height, wide, high = sizes["x"], sizes["y"], min(chunks["x"], sizes["x"]), min(chunks["y"], sizes["y"])
    if wide * high > _MOST_CHUNK_PX:
        raise UnknownKind(f"one chunk of it has {wide} x {high} px: convert it with smaller ones")
    across = -(-width // wide)
    order = [names.index(name) for name in ("y", "x", "c")]
    others = tuple(i for i in range(len(names)) if i not in order)

    def decode(number: int) -> NDArray[np.uint8]:
        row, column = divmod(number, across)
        y, x = row * high, column * wide
        part = {"y": slice(y, min(y + high, height)), "x": slice(x, min(x + wide, width))}
        if not _all_there(array, names, stored, part, place):
            _check_empty(number, Pieces(width, height, wide, high, decode), coarser, int(array.fill_value or 0))
        pixels = np.asarray(array[tuple(part.get(name, slice(None)) for name in names)], np.uint8)
        return np.ascontiguousarray(pixels.transpose(*others, *order).reshape(pixels.shape[order[0]], -1, 3))

    probe((1,) * (across * -(-height // high)), decode)
    return Pieces(width, height, wide, high, decode)


def _all_there(array: Any, names: list[str], stored: Mapping[str, int], part: Mapping[str, slice], place: Path) -> bool:
    """Say whether the files of a part of an array exist, for each of its colours."""
    channels = -(-3 // stored["c"])
    for channel in range(channels):
        at = tuple(channel if n == "c" else part[n].start // stored[n] if n in part else 0 for n in names)
        if not (place / array.basename / array.metadata.encode_chunk_key(at)).is_file():
            return False
    return True


def _check_empty(number: int, level: Pieces, coarser: tuple[Pieces, ...], fill: int) -> None:
    """Raise ValueError unless a coarser level shows the fill value where the chunk of a level should be."""
    row, column = divmod(number, level.across)
    for other in reversed(coarser):  # the coarsest that shows enough of it
        sides = []
        for at, piece, size, size_there in (
            (row, level.piece_height, level.height, other.height),
            (column, level.piece_width, level.width, other.width),
        ):
            start, end = at * piece * size_there / size, min((at + 1) * piece, size) * size_there / size
            sides.append((int(np.ceil(start)) + 1, int(end) - 1))  # pixels at its edge are its neighbours', too
        (top, bottom), (left, right) = sides
        if bottom - top >= _LEAST_PX and right - left >= _LEAST_PX:
            seen = _window(other, top, bottom, left, right)
            if np.abs(seen.astype(np.int16) - fill).max() <= _SAME:
                return
            break
    raise ValueError("the chunk is not there, and no coarser level shows that it is empty")


def _window(level: Pieces, top: int, bottom: int, left: int, right: int) -> NDArray[np.uint8]:
    rows = []
    for row in range(top // level.piece_height, -(-bottom // level.piece_height)):
        columns = range(left // level.piece_width, -(-right // level.piece_width))
        rows.append(np.concatenate([level.decode(row * level.across + column) for column in columns], axis=1))
    y, x = top // level.piece_height * level.piece_height, left // level.piece_width * level.piece_width
    return np.concatenate(rows)[top - y : bottom - y, left - x : right - x]


def _scale(folder: Path, scales: Mapping[str, Any], axes: list[Mapping[str, Any]]) -> Scale:
    factors = np.ones(len(axes))
    for told in (scales["datasets"][0], scales):
        for transformation in told.get("coordinateTransformations", ()):
            if transformation.get("type") == "scale":
                factors = factors * np.asarray(transformation["scale"], float)
    sides = {}
    for axis, factor in zip(axes, factors, strict=True):
        um = _UM.get(str(axis.get("unit", "")))
        if axis["name"] in ("x", "y") and um is not None:
            sides[str(axis["name"])] = float(factor) * um
    if len(sides) != 2:
        return None, "the OME-Zarr does not say the unit of its axes"
    return checked(folder, sides["x"], sides["y"], "OME-Zarr (coordinateTransformations)")
