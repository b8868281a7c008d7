"""A mask that the user gives: where the tissue is, as a person or another tool has drawn it.

GeoJSON (RFC 7946) with polygons, as QuPath writes it, or a label image whose non-zero pixels are tissue. Coordinates of
polygons are level-0 pixels from the corner of what was scanned (`openslide.bounds-x`, `-y`): QuPath shows a slide so.
For most formats that corner is (0, 0).

What a QuPath annotation of the class `Ignore*` covers is not tissue, whatever else covers it: a fold or a pen mark
that was drawn within the tissue. A core of a tissue microarray that QuPath calls missing is none.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.errors import UsageError
from mtdp_runtime.slide import SlideInfo
from mtdp_runtime.tiling.label_image import read_labels

Ring = NDArray[np.float64]  # [points, 2]: x, y

_JSON: Final = frozenset({".geojson", ".json"})
_IGNORE: Final = "Ignore"  # QuPath's class of what is no result; an asterisk follows
_FEWEST: Final = 3  # points of what has an area
_FINE: Final = 8  # polygons are drawn this much finer than the mask, then averaged: areas, not centre points
_BAND_PX: Final = 64  # rows of the mask drawn at once
_SHIFT: Final = 4  # fractional bits of the corners
_OVERHANG: Final = 0.02  # of the longer side: a line drawn by hand may leave the slide by this much
_ASPECT_TOLERANCE: Final = 0.01


Polygon = tuple[Ring, ...]  # the outline, then its holes


@dataclass(frozen=True, slots=True, eq=False)
class GivenMask:
    """Polygons, what is `ignored` to be cut out; or labels, bool[H, W], over the whole slide or over its bounds."""

    path: Path
    digest: str  # sha256 of the file
    polygons: tuple[Polygon, ...]
    labels: NDArray[np.bool_] | None
    ignored: tuple[Polygon, ...] = ()


def load_mask(path: Path) -> GivenMask:
    """Read a mask.

    Raises:
        UsageError: there is no such file, or it holds no mask.
    """
    data = content_of(path, "mask")
    digest = hashlib.sha256(data).hexdigest()
    if path.suffix.lower() in _JSON:
        polygons, ignored = _polygons(path, data)
        return GivenMask(path, digest, polygons, None, ignored)
    return GivenMask(path, digest, (), read_labels(path))


def content_of(path: Path, what: str) -> bytes:
    """Return the bytes of a file that a user gave as a mask, or `what` else.

    Raises:
        UsageError: there is no such file.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for, a device read without end
            raise UsageError(f"{path}: the {what} is not a file", hint="Check the path.")
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: the {what} cannot be read: {error.strerror}", hint="Check the path.") from error


def check_fits(mask: GivenMask, info: SlideInfo) -> None:
    """Make sure that a mask can be this slide's.

    Raises:
        UsageError: its polygons lie outside the slide, or the image has another shape.
    """
    if mask.labels is not None:
        _extent(mask, info)
        return
    _, _, width, height = info.bounds
    points = np.concatenate([ring for polygon in mask.polygons + mask.ignored for ring in polygon])
    (left, top), (right, bottom) = points.min(axis=0), points.max(axis=0)
    most = _OVERHANG * max(width, height)
    if left < -most or top < -most or right > width + most or bottom > height + most:
        raise UsageError(
            f"{mask.path}: reaches from ({left:.0f}, {top:.0f}) to ({right:.0f}, {bottom:.0f}), outside of {info.path} "
            f"({width} x {height} px)",
            hint="Is it the mask of another slide, or of another level? Its coordinates must be level-0 pixels.",
        )


def coverage(mask: GivenMask, info: SlideInfo, scale: float, width: int, height: int) -> NDArray[np.float32]:
    """Return float32[height, width]: the part of each pixel's area that the mask covers.

    Args:
        mask: see `check_fits`.
        info: the slide.
        scale: level-0 pixels per pixel of the result; the first is at the corner of `info.bounds`.
        width: pixels.
        height: pixels.
    """
    if mask.labels is not None:
        return _of_labels(mask, info, scale, width, height)
    result = np.zeros((height, width), np.float32)
    polygons = mask.polygons + mask.ignored
    if not polygons:
        return result
    drawn = _corners(polygons, _FINE / scale)
    for top in range(0, height, _BAND_PX):
        rows = min(_BAND_PX, height - top)
        band = np.zeros((rows * _FINE, width * _FINE), np.uint8)
        # in their order: what is ignored comes last
        for number in _within(drawn, top * _FINE, (top + rows) * _FINE):
            _draw(band, drawn, number, number < len(mask.polygons), top * _FINE)
        result[top : top + rows] = _mean_of_cells(band)
    return result


def _mean_of_cells(band: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the mean of each 8 x 8 cell of zeros and ones, float32[H / 8, W / 8]."""
    columns = band.reshape(-1, _FINE, band.shape[1]).sum(axis=1, dtype=np.uint8)
    # Eight bytes, none over 8, are added up by one product: the highest byte of it is their sum.
    sums = (columns.view(np.uint64) * np.uint64(0x0101010101010101)) >> np.uint64(56)
    means: NDArray[np.float32] = sums.astype(np.float32) / np.float32(_FINE * _FINE)
    return means


@dataclass(frozen=True, slots=True, eq=False)
class _Corners:
    """Polygons as they are drawn: their rings in fractions of a pixel, and the box of each in pixels."""

    rings: list[list[NDArray[np.int32]]]  # of each polygon, [points, 2]
    tops: NDArray[np.float64]
    bottoms: NDArray[np.float64]
    boxes: list[list[int]]  # left, top, right, bottom, with a margin


def _corners(polygons: Sequence[Polygon], factor: float) -> _Corners:
    """Scale all points at once: a mask may have 100,000 small rings."""
    counts = np.array([sum(len(ring) for ring in polygon) for polygon in polygons])
    points = np.concatenate([ring for polygon in polygons for ring in polygon]) * factor - 0.5
    starts = np.cumsum(counts) - counts
    least, most = np.minimum.reduceat(points, starts), np.maximum.reduceat(points, starts)
    boxes = np.concatenate([np.floor(least) - 2, np.ceil(most) + 3], axis=1).astype(np.int64)
    fixed = np.rint(points * 2**_SHIFT).astype(np.int32)
    rings, at = list[list[NDArray[np.int32]]](), 0
    for polygon in polygons:
        rings.append([])
        for ring in polygon:
            rings[-1].append(fixed[at : at + len(ring)])
            at += len(ring)
    return _Corners(rings, least[:, 1], most[:, 1], boxes.tolist())


def _within(drawn: _Corners, top: int, bottom: int) -> list[int]:
    """Return the numbers of the polygons that may touch these rows, in their order."""
    numbers: list[int] = np.flatnonzero((drawn.bottoms >= top - 1) & (drawn.tops <= bottom + 1)).tolist()
    return numbers


def _draw(band: NDArray[np.uint8], drawn: _Corners, number: int, tissue: bool, top: int) -> None:
    """Fill a polygon; `top` is the band's first row. A ring within a ring is a hole: even-odd."""
    rings = drawn.rings[number]
    if len(rings) == 1:
        cv2.fillPoly(band, rings, int(tissue), shift=_SHIFT, offset=(0, -top << _SHIFT))
        return
    # Apart, so that its holes leave what is there: no more of it than its box.
    x0, y0, x1, y1 = drawn.boxes[number]
    left, right = max(0, x0), min(band.shape[1], x1)
    first, last = max(0, y0 - top), min(band.shape[0], y1 - top)
    if left >= right or first >= last:
        return
    piece = np.zeros((last - first, right - left), np.uint8)
    cv2.fillPoly(piece, rings, 1, shift=_SHIFT, offset=(-left << _SHIFT, -(top + first) << _SHIFT))
    view = band[first:last, left:right]
    if tissue:
        np.bitwise_or(view, piece, out=view)
    else:
        view[piece == 1] = 0


def _polygons(path: Path, data: bytes) -> tuple[tuple[Polygon, ...], tuple[Polygon, ...]]:
    """Return the polygons of tissue, and those to be ignored."""
    walked = classified_polygons(path, data, "mask")
    read = [(polygon, is_ignored(name)) for polygon, name in walked if polygon]
    found, ignored = (tuple(polygon for polygon, cut_out in read if cut_out == which) for which in (False, True))
    if not found:
        what = f"no polygon but the {len(ignored)} of class {_IGNORE}*" if ignored else "no polygon"
        if len(walked) > len(read):
            what += f" ({len(walked) - len(read)} of fewer than {_FEWEST} points)"
        raise UsageError(
            f"{path}: holds {what}", hint="A mask is made of areas; points and lines have none. Draw annotations."
        )
    return found, ignored


def classified_polygons(path: Path, data: bytes, what: str) -> list[tuple[Polygon, str]]:
    """Return each polygon of a GeoJSON file with QuPath's class of its annotation; empty texts and polygons are none.

    Raises:
        UsageError: it is no GeoJSON.
    """
    try:
        with _no_collection():
            return _with_rings(list(_walk(json.loads(data), "")))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UsageError(
            f"{path}: not a GeoJSON {what}: {' '.join(str(error).split())[:200]}",
            hint="In QuPath: File > Export objects as GeoJSON.",
        ) from error


def is_ignored(name: str) -> bool:
    """Tell whether QuPath's class is `Ignore*`, or derived from it."""
    return name.startswith(_IGNORE)


def _walk(node: Any, name: str) -> Iterator[tuple[Any, str]]:
    """Give the coordinates of each polygon in a GeoJSON object or a list of them (as older QuPath writes).

    With each comes the class of the annotation that it is of.
    """
    if isinstance(node, list):
        for one in node:
            yield from _walk(one, name)
        return
    kind = node["type"]
    if kind == "FeatureCollection":
        yield from _walk(node["features"], name)
    elif kind == "Feature":
        properties = node.get("properties")
        if _is_missing(node) or _is_missing(properties):
            return
        if node["geometry"] is not None:
            yield from _walk(node["geometry"], _class_of(properties))
        for holder in (node, properties):  # QuPath's hierarchy, where it was exported with its children
            if isinstance(holder, dict) and holder.get("childObjects"):
                yield from _walk(holder["childObjects"], "")
    elif kind == "GeometryCollection":
        yield from _walk(node["geometries"], name)
    elif kind == "Polygon":
        if node["coordinates"]:
            yield node["coordinates"], name
    elif kind == "MultiPolygon":
        yield from ((polygon, name) for polygon in node["coordinates"] if polygon)
    elif kind not in ("Point", "MultiPoint", "LineString", "MultiLineString"):
        raise ValueError(f"unknown type {kind!r}")


def _class_of(properties: Any) -> str:
    """Return QuPath's class; of a derived one (`Tumor: Positive`) what it is called, or what it is derived from."""
    kind = properties.get("classification") if isinstance(properties, dict) else None
    name = kind.get("name") or (kind.get("names") or [""])[0] if isinstance(kind, dict) else kind
    return name if isinstance(name, str) else ""


def _is_missing(said: Any) -> bool:
    """Tell whether QuPath says so of a core of a tissue microarray: nothing is there, whatever is drawn in it."""
    return isinstance(said, dict) and said.get("isMissing") is True


def _with_rings(walked: Sequence[tuple[Any, str]]) -> list[tuple[Polygon, str]]:
    """Return, in place of each polygon's coordinates, its outline and holes; nothing of one without an area."""
    arrays = iter(_arrays([ring for polygon, _ in walked for ring in polygon]))
    found = []
    for polygon, name in walked:
        rings = [next(arrays) for _ in polygon]
        has_area = bool(rings) and len(rings[0]) >= _FEWEST
        found.append((tuple(ring for ring in rings if len(ring) >= _FEWEST) if has_area else (), name))
    return found


def _arrays(rings: Sequence[Any]) -> list[Ring]:
    """Return each ring as an array: all at once where every point has two numbers, as nearly always."""
    pairs = list(chain.from_iterable(rings))
    if set(map(type, pairs)) == {list} and set(map(len, pairs)) == {2}:
        try:
            points = np.fromiter(chain.from_iterable(pairs), np.float64, 2 * len(pairs)).reshape(-1, 2)
        except OverflowError as error:  # an integer of more digits than a float holds
            raise ValueError("a coordinate that no slide has") from error
        ends = np.cumsum([len(ring) for ring in rings]).tolist()
        arrays = [points[end - len(ring) : end] for end, ring in zip(ends, rings, strict=True)]
    else:
        arrays = [_ring(ring) for ring in rings]
        points = np.concatenate([np.empty((0, 2)), *arrays])
    if points.size and (not np.isfinite(points).all() or np.abs(points).max() > 2**26):
        raise ValueError("a coordinate that no slide has")
    return arrays


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python from looking for garbage among millions of lists that are all in use: most of the time of a mask."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def _ring(points: Any) -> Ring:
    try:
        try:
            ring = np.asarray(points, np.float64)
        except ValueError:  # some have a third coordinate, and some have none
            ring = np.asarray([point[:2] for point in points], np.float64)
    except OverflowError as error:  # an integer of more digits than a float holds
        raise ValueError("a coordinate that no slide has") from error
    if len(points) == 0:
        return np.empty((0, 2))
    if ring.ndim != 2 or ring.shape[1] < 2:
        raise ValueError(f"a ring of shape {ring.shape}, not of points")
    return np.ascontiguousarray(ring[:, :2])


def _extent(mask: GivenMask, info: SlideInfo) -> tuple[int, int, int, int]:
    """Return x0, y0, width, height in level-0 pixels of what a label image shows: the bounds, or the whole slide."""
    assert mask.labels is not None
    height, width = mask.labels.shape
    for x0, y0, wide, high in (info.bounds, (0, 0, info.width, info.height)):
        rounding = 1 / width + 1 / height
        if abs(math.log((width / height) / (wide / high))) <= _ASPECT_TOLERANCE + rounding:
            return (x0, y0, wide, high)
    raise UsageError(
        f"{mask.path}: {width} x {height} px has another shape than {info.path} ({info.width} x {info.height} px)",
        hint="A label image must show the whole slide. Is it the mask of another one?",
    )


def _of_labels(mask: GivenMask, info: SlideInfo, scale: float, width: int, height: int) -> NDArray[np.float32]:
    assert mask.labels is not None
    x0, y0, wide, high = _extent(mask, info)
    size = (max(1, round(wide / scale)), max(1, round(high / scale)))
    labels = np.multiply(mask.labels, np.uint8(255), dtype=np.uint8)
    more = max(-(-size[0] // labels.shape[1]), -(-size[1] // labels.shape[0]))
    if more > 1:  # whole copies first, so that the averaging below is by area and never between labels
        labels = labels.repeat(more, axis=0).repeat(more, axis=1)
    whole = cv2.resize(labels, size, interpolation=cv2.INTER_AREA)
    left, top = round((info.bounds[0] - x0) / scale), round((info.bounds[1] - y0) / scale)
    result = np.zeros((height, width), np.float32)
    part = whole[top : top + height, left : left + width]
    result[: part.shape[0], : part.shape[1]] = part / np.float32(255)
    # The last pixels may lie beyond the image by rounding: they are as their neighbours.
    if 0 < height - part.shape[0] <= 1:
        result[-1] = result[-2] if height > 1 else result[-1]
    if 0 < width - part.shape[1] <= 1:
        result[:, -1] = result[:, -2] if width > 1 else result[:, -1]
    return result
