"""OME-Zarr: a folder of chunks, multiscales 0.4 (Zarr 2) or 0.5 (Zarr 3), of which 8-bit RGB is taken.

The zarr library reads it; it is an extra (`pip install 'mtdp[zarr]'`). A chunk that is not there stands for the fill
value, and is what an incomplete copy lacks, too. So it is believed only where another level shows the fill value, as
well; elsewhere it is an error. Specification: https://ngff.openmicroscopy.org
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.errors import SlideUnreadable
from mtdp_runtime.slide.channels import NO_NAMES, Channel, check_bright, named_rgb
from mtdp_runtime.slide.probe import UnknownKind, probe
from mtdp_runtime.slide.scale import Scale, checked, um_of
from mtdp_runtime.slide.tiff_pieces import Pieces, samples_of
from mtdp_runtime.slide.zarr_folder import METADATA, attributes_of

_MOST_CHUNK_PX: Final = 1 << 28
_LEAST_PX: Final = 4  # sides of the place in a coarser level that vouches for a chunk
_SAME: Final = 8  # grey levels that a coder may change the fill value by


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
    told = attributes_of(place)
    if "multiscales" not in told and "bioformats2raw.layout" in told:
        group, place = group["0"], folder / "0"
        told = attributes_of(place)
    if not told.get("multiscales"):
        raise UnknownKind("a Zarr without multiscales: not an OME-Zarr image")
    scales = told["multiscales"][0]
    axes = scales.get("axes")
    if not axes or not all(isinstance(axis, Mapping) for axis in axes):
        raise UnknownKind("an OME-Zarr older than 0.4, which does not describe its axes: convert it anew")
    names = [str(axis["name"]) for axis in axes]
    # The finest is to be the first by the specification, and not all writers know.
    datasets = sorted(scales["datasets"], key=lambda one: -math.prod(group[one["path"]].shape))
    scales = {**scales, "datasets": datasets}
    arrays = [group[dataset["path"]] for dataset in datasets]
    for array in arrays:
        _check(array, names)
    omero = told.get("omero", {})
    named = named_rgb(tuple(_channel(channel) for channel in omero.get("channels", ())))
    as_stored = tuple(_as_stored(array, names) for array in arrays)
    levels = tuple(_checked(array, names, folder, number, as_stored) for number, array in enumerate(arrays))
    if not named:
        check_bright(samples_of(levels[-1]), NO_NAMES)
    paths = [place / str(dataset["path"]) for dataset in datasets]
    files = [path / name for path in (folder, place, *paths) for name in (*METADATA, ".zarray")]
    files += [path for path in paths[-1].rglob("*") if not path.name.startswith(".")]
    found = tuple(sorted({path for path in files if path.is_file()}))
    return levels, _scale(scales, axes), "ome-zarr", f"zarr {zarr.__version__}", found


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


def _as_stored(array: Any, names: list[str]) -> Pieces:
    """Return a level whose chunks that are not there are the fill value."""
    sizes, chunks = (dict(zip(names, values, strict=True)) for values in (array.shape, array.chunks))
    width, height, wide, high = sizes["x"], sizes["y"], min(chunks["x"], sizes["x"]), min(chunks["y"], sizes["y"])
    if wide * high > _MOST_CHUNK_PX:
        raise UnknownKind(f"one chunk of it has {wide} x {high} px: convert it with smaller ones")
    order = [names.index(name) for name in ("y", "x", "c")]
    others = [i for i in range(len(names)) if i not in order]

    def decode(number: int) -> NDArray[np.uint8]:
        row, column = divmod(number, -(-width // wide))
        part = {"y": slice(row * high, (row + 1) * high), "x": slice(column * wide, (column + 1) * wide)}
        pixels = np.asarray(array[tuple(part.get(name, slice(None)) for name in names)], np.uint8)
        high_here, wide_here = pixels.shape[order[0]], pixels.shape[order[1]]
        return np.ascontiguousarray(pixels.transpose(*others, *order).reshape(high_here, wide_here, 3))

    return Pieces(width, height, wide, high, decode, (chunks["x"], chunks["y"]))


def _checked(array: Any, names: list[str], place: Path, number: int, as_stored: tuple[Pieces, ...]) -> Pieces:
    """Return a level of which a chunk that is not there is an error, unless another level shows that it is empty."""
    level = as_stored[number]
    # A finer level vouches for the coarsest only: elsewhere it would take decoding many chunks.
    others = as_stored[:number:-1] or as_stored[max(number - 1, 0) : number]
    stored = dict(zip(names, array.shards or array.chunks, strict=True))

    def decode(piece: int) -> NDArray[np.uint8]:
        row, column = divmod(piece, level.across)
        corner = {"y": row * level.piece_height, "x": column * level.piece_width}
        if not _all_there(array, names, stored, corner, place):
            _check_empty(piece, level, others, int(array.fill_value or 0))
        return level.decode(piece)

    probe((1,) * (level.across * -(-level.height // level.piece_height)), decode)
    return replace(level, decode=decode)


def _all_there(array: Any, names: list[str], stored: Mapping[str, int], corner: Mapping[str, int], place: Path) -> bool:
    """Say whether the files that hold a chunk exist, for each of its colours."""
    for channel in range(-(-3 // stored["c"])):
        at = tuple(channel if name == "c" else corner.get(name, 0) // stored[name] for name in names)
        if not (place / array.path / array.metadata.encode_chunk_key(at)).is_file():
            return False
    return True


def _check_empty(number: int, level: Pieces, others: tuple[Pieces, ...], fill: int) -> None:
    """Raise ValueError unless the first other level that shows enough of a chunk's place shows the fill value there."""
    row, column = divmod(number, level.across)
    for other in others:
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
    raise ValueError("the chunk is not there, and no other level shows that it is empty")


def _window(level: Pieces, top: int, bottom: int, left: int, right: int) -> NDArray[np.uint8]:
    rows = []
    for row in range(top // level.piece_height, -(-bottom // level.piece_height)):
        columns = range(left // level.piece_width, -(-right // level.piece_width))
        rows.append(np.concatenate([level.decode(row * level.across + column) for column in columns], axis=1))
    y, x = top // level.piece_height * level.piece_height, left // level.piece_width * level.piece_width
    return np.concatenate(rows)[top - y : bottom - y, left - x : right - x]


def _scale(scales: Mapping[str, Any], axes: list[Mapping[str, Any]]) -> Scale:
    factors = np.ones(len(axes))
    for told in (scales["datasets"][0], scales):
        for transformation in told.get("coordinateTransformations", ()):
            if transformation.get("type") == "scale":
                factors = factors * np.asarray(transformation["scale"], float)
    sides = {}
    for axis, factor in zip(axes, factors, strict=True):
        um = um_of(str(axis.get("unit", "")))
        if axis["name"] in ("x", "y") and um is not None:
            sides[str(axis["name"])] = float(factor) * um
    if len(sides) != 2:
        return None, "the OME-Zarr does not say the unit of its axes"
    return checked(sides["x"], sides["y"], "OME-Zarr (coordinateTransformations)")
