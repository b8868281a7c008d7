"""Classes that somebody drew: QuPath's annotations give each tile the class that covers most of it.

The part of a tile that no class covers counts as background, which is a class of its own without a name: where it is
larger than the area of any class the tile has none. Of equal areas the class wins that comes first in the file, and any
class before background. What overlaps counts for each class; what one class covers twice counts once.

Annotations of the class `Ignore*` are cut out of all others. Those without a class, and `Region*`, say nothing. Areas
are counted on 128 x 128 points of a tile.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.errors import UsageError
from mtdp_runtime.slide import SlideInfo
from mtdp_runtime.tiling.given_mask import GivenMask, Polygon, check_fits, classified_polygons, content_of, is_ignored

RULE: Final = "largest area, on 128 points a side"  # another rule gives another name
BACKGROUND: Final = -1
_POINTS: Final = 128
_MOST_CLASSES: Final = 10_000  # a number for each cell is no class
_NO_CLASS: Final = ("", "Region*")


@dataclass(frozen=True, slots=True, eq=False)
class GivenClasses:
    """Polygons of classes, each with its number among the names; those to be cut out have none."""

    path: Path
    digest: str  # sha256 of the file
    names: tuple[str, ...]  # in the order in which the file has them
    polygons: tuple[tuple[Polygon, int], ...]
    ignored: tuple[Polygon, ...] = ()


def load_classes(path: Path) -> GivenClasses:
    """Read the classes of a GeoJSON file.

    Raises:
        UsageError: there is no such file, or nothing in it has a class.
    """
    data = content_of(path, "file of classes")
    drawn = [(polygon, name.strip()) for polygon, name in classified_polygons(path, data, "file") if polygon]
    ignored = tuple(polygon for polygon, name in drawn if is_ignored(name))
    known = [(polygon, name) for polygon, name in drawn if not is_ignored(name) and name not in _NO_CLASS]
    if not known:
        raise UsageError(
            f"{path}: no area with a class ({len(drawn)} areas in all)",
            hint="In QuPath: give the annotations a class (Set class), and export them as GeoJSON.",
        )
    names = tuple(dict.fromkeys(name for _, name in known))
    unwritable = next((name for name in names if not _is_text(name)), None)
    if unwritable is not None or len(names) > _MOST_CLASSES:
        what = f"a class that is no text: {unwritable!a}" if unwritable is not None else f"{len(names)} classes"
        raise UsageError(f"{path}: {what}", hint="Rename the classes in QuPath, and export the annotations again.")
    numbered = tuple((polygon, names.index(name)) for polygon, name in known)
    return GivenClasses(path, hashlib.sha256(data).hexdigest(), names, numbered, ignored)


def _is_text(name: str) -> bool:
    """Say whether a name can be written: JSON may hold halves of characters."""
    return name.isprintable()


def check_classes_fit(classes: GivenClasses, info: SlideInfo) -> None:
    """Make sure that classes can be this slide's.

    Raises:
        UsageError: they lie outside the slide.
    """
    polygons = tuple(polygon for polygon, _ in classes.polygons)
    check_fits(GivenMask(classes.path, classes.digest, polygons, None, classes.ignored), info)


def classes_of(classes: GivenClasses, info: SlideInfo, origins: NDArray[np.int64], tile0: float) -> NDArray[np.int16]:
    """Return int16[N]: the number of the class of each tile, BACKGROUND where it has none.

    Args:
        classes: see `check_classes_fit`.
        info: the slide; the polygons count from the corner of its bounds.
        origins: int64[N, 2], level-0 x, y of each tile's top left.
        tile0: its side in level-0 pixels.
    """
    found = np.full(len(origins), BACKGROUND, np.int16)
    drawn = [*classes.polygons, *((polygon, len(classes.names)) for polygon in classes.ignored)]
    boxes = np.array([[rings[0].min(axis=0), rings[0].max(axis=0)] for rings, _ in drawn])
    places = origins - np.array(info.bounds[:2])
    for row, near in _near(boxes, places, tile0).items():
        found[row] = _class_of([drawn[one] for one in near], places[row], tile0, len(classes.names))
    return found


def _near(boxes: NDArray[np.float64], places: NDArray[np.int64], tile0: float) -> dict[int, list[int]]:
    """Return, by tile, the polygons whose box meets it, in their order.

    A million cells and ten thousand tiles are not compared each with each: tiles are found by the square that their
    corner lies in, and a polygon asks the squares below its box, or all tiles where these are fewer.
    """
    corners: dict[tuple[int, int], list[int]] = {}
    for row, (column, line) in enumerate(np.floor(places / tile0).astype(np.int64).tolist()):
        corners.setdefault((column, line), []).append(row)
    first, last = np.floor(boxes[:, 0] / tile0).astype(np.int64) - 1, np.floor(boxes[:, 1] / tile0).astype(np.int64)
    near: dict[int, list[int]] = {}
    for number, ((left, top), (right, bottom)) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
        if (right - left + 1) * (bottom - top + 1) > len(places):
            meets = (boxes[number, 0] <= places + tile0).all(axis=1) & (boxes[number, 1] >= places).all(axis=1)
            rows = np.flatnonzero(meets).tolist()
        else:
            squares = ((column, line) for column in range(left, right + 1) for line in range(top, bottom + 1))
            rows = [row for square in squares for row in corners.get(square, ())]
        for row in rows:
            near.setdefault(row, []).append(number)
    return near


def _class_of(drawn: list[tuple[Polygon, int]], place: NDArray[np.int64], tile0: float, names: int) -> int:
    """Return the class of a tile at a place; what has the number `names` is cut out."""
    covered = {number: np.zeros((_POINTS, _POINTS), np.bool_) for _, number in drawn}
    for rings, number in drawn:
        _add_points(covered[number], [(ring - place) * (_POINTS / tile0) - 0.5 for ring in rings])
    cut = covered.pop(names, None)
    if cut is not None:
        for points in covered.values():
            points &= ~cut
    if not covered:
        return BACKGROUND
    areas = {number: int(points.sum()) for number, points in sorted(covered.items())}
    best = max(areas, key=lambda number: areas[number])  # of equal ones the first
    background = _POINTS**2 - int(np.logical_or.reduce(list(covered.values())).sum())
    return best if areas[best] and areas[best] >= background else BACKGROUND


def _add_points(covered: NDArray[np.bool_], rings: list[NDArray[np.float64]]) -> None:
    """Set the points of covered, bool[_POINTS, _POINTS], that lie in a polygon, whose holes are even-odd.

    Point (row, column) is at y = row, x = column. No point of a line between two polygons is in both or in neither, so
    halves are equal: a library's fill, which draws the line itself, would make the first of them larger.
    """
    low, high = rings[0].min(axis=0), rings[0].max(axis=0)
    left, top = np.clip(np.ceil(low), 0, _POINTS).astype(int).tolist()
    right, bottom = np.clip(np.floor(high) + 1, 0, _POINTS).astype(int).tolist()
    if left >= right or top >= bottom:
        return
    # By how many edges, at or left of a column: of the polygon's own box, since cells are small and many.
    crossed = np.zeros((bottom - top, right - left + 1), np.int32)
    for ring in rings:
        (x, y), (x_next, y_next) = ring.T, np.roll(ring, -1, axis=0).T
        first, end = (
            np.clip(np.ceil(edge(y, y_next)), top, bottom).astype(np.int64) for edge in (np.minimum, np.maximum)
        )
        rows_of = end - first  # rows that each edge crosses
        edge = np.repeat(np.arange(len(ring)), rows_of)
        row = first[edge] + np.arange(len(edge)) - np.repeat(np.cumsum(rows_of) - rows_of, rows_of)
        at = x[edge] + (row - y[edge]) * (x_next[edge] - x[edge]) / (y_next[edge] - y[edge])
        np.add.at(crossed, (row - top, np.clip(np.ceil(at), left, right).astype(np.int64) - left), 1)
    covered[top:bottom, left:right] |= np.cumsum(crossed, axis=1)[:, :-1] % 2 == 1
