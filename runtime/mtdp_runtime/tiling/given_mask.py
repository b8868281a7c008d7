"""A mask that the user gives: where the tissue is, as a person or another tool has drawn it.

GeoJSON (RFC 7946) with polygons, as QuPath writes it, or a label image whose non-zero pixels are tissue. Coordinates of
polygons are level-0 pixels from the corner of what was scanned (`openslide.bounds-x`, `-y`): QuPath shows a slide so.
For most formats that corner is (0, 0).

What a QuPath annotation of the class `Ignore*` covers is not tissue, whatever else covers it: a fold or a pen mark
that was drawn within the tissue.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mtdp_runtime.errors import UsageError
from mtdp_runtime.slide import SlideInfo

Ring = NDArray[np.float64]  # [points, 2]: x, y

_JSON: Final = frozenset({".geojson", ".json"})
_IGNORE: Final = "Ignore"  # QuPath's class of what is no result; an asterisk follows
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
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: the mask cannot be read: {error.strerror}", hint="Check the path.") from error
    digest = hashlib.sha256(data).hexdigest()
    if path.suffix.lower() in _JSON:
        polygons, ignored = _polygons(path, data)
        return GivenMask(path, digest, polygons, None, ignored)
    return GivenMask(path, digest, (), _labels(path))


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
    factor = _FINE / scale
    drawn = [
        ([ring * factor - 0.5 for ring in polygon], value)
        for value, polygons in ((1, mask.polygons), (0, mask.ignored))
        for polygon in polygons
    ]
    for top in range(0, height, _BAND_PX):
        rows = min(_BAND_PX, height - top)
        band = np.zeros((rows * _FINE, width * _FINE), np.uint8)
        for polygon, value in drawn:
            highest, lowest = polygon[0][:, 1].min(), polygon[0][:, 1].max()
            if lowest < top * _FINE - 1 or highest > (top + rows) * _FINE + 1:
                continue
            piece = np.zeros_like(band) if len(polygon) > 1 else band
            shifted = [np.rint((ring - (0, top * _FINE)) * 2**_SHIFT).astype(np.int32) for ring in polygon]
            # even-odd: a ring within a ring is a hole
            cv2.fillPoly(piece, shifted, value if piece is band else 1, shift=_SHIFT)
            if piece is not band:
                band[piece == 1] = value
        cells = band.reshape(rows, _FINE, width, _FINE)
        result[top : top + rows] = cells.mean(axis=(1, 3), dtype=np.float32)
    return result


def _polygons(path: Path, data: bytes) -> tuple[tuple[Polygon, ...], tuple[Polygon, ...]]:
    """Return the polygons of tissue, and those to be ignored."""
    try:
        read = [(_rings(polygon), ignored) for polygon, ignored in _walk(json.loads(data), False)]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UsageError(
            f"{path}: not a GeoJSON mask: {' '.join(str(error).split())[:200]}",
            hint="In QuPath: File > Export objects as GeoJSON.",
        ) from error
    found, ignored = (tuple(polygon for polygon, is_ignored in read if is_ignored == which) for which in (False, True))
    if not found:
        what = f"no polygon but the {len(ignored)} of class {_IGNORE}*" if ignored else "no polygon"
        raise UsageError(
            f"{path}: holds {what}", hint="A mask is made of areas; points and lines have none. Draw annotations."
        )
    return found, ignored


def _walk(node: Any, ignored: bool) -> Iterator[tuple[Any, bool]]:
    """Give the coordinates of each polygon in a GeoJSON object or a list of them (as older QuPath writes).

    With each comes whether the annotation that it is of is to be ignored.
    """
    if isinstance(node, list):
        for one in node:
            yield from _walk(one, ignored)
        return
    kind = node["type"]
    if kind == "FeatureCollection":
        yield from _walk(node["features"], ignored)
    elif kind == "Feature":
        if node["geometry"] is not None:
            yield from _walk(node["geometry"], _is_ignored(node.get("properties")))
    elif kind == "GeometryCollection":
        yield from _walk(node["geometries"], ignored)
    elif kind == "Polygon":
        if node["coordinates"]:
            yield node["coordinates"], ignored
    elif kind == "MultiPolygon":
        yield from ((polygon, ignored) for polygon in node["coordinates"] if polygon)
    elif kind not in ("Point", "MultiPoint", "LineString", "MultiLineString"):
        raise ValueError(f"unknown type {kind!r}")


def _is_ignored(properties: Any) -> bool:
    """Tell whether QuPath's class is `Ignore*`, or derived from it."""
    kind = properties.get("classification") if isinstance(properties, dict) else None
    name = kind.get("name") or (kind.get("names") or [""])[0] if isinstance(kind, dict) else kind
    return isinstance(name, str) and name.startswith(_IGNORE)


def _rings(polygon: Any) -> Polygon:
    rings = []
    for points in polygon:
        ring = np.asarray([point[:2] for point in points], np.float64)
        if ring.ndim != 2 or ring.shape[1] != 2 or len(ring) < 3:
            raise ValueError(f"a ring of {len(points)} points")
        if not np.isfinite(ring).all() or np.abs(ring).max() > 2**26:
            raise ValueError("a coordinate that no slide has")
        rings.append(ring)
    return tuple(rings)


def _labels(path: Path) -> NDArray[np.bool_]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                pixels = np.asarray(image)  # a palette image gives its indices
                bands = image.getbands()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UsageError(
            f"{path}: neither GeoJSON (*.geojson) nor an image that can be read: {error}",
            hint="A mask is QuPath's GeoJSON, or a PNG whose non-zero pixels are tissue.",
        ) from error
    if pixels.ndim == 2:
        return np.asarray(pixels != 0)
    alpha = bands.index("A") if "A" in bands else None
    colours = [i for i in range(pixels.shape[2]) if i != alpha]
    labels: NDArray[np.bool_] = (pixels[..., colours] != 0).any(axis=2)
    return labels if alpha is None else labels & (pixels[..., alpha] != 0)


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
    labels = mask.labels.astype(np.uint8) * np.uint8(255)
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
