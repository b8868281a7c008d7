"""A few tiles of a slide that stand for all: one of each group of tiles that look alike to the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.errors import SlideError
from mtdp_runtime.slide import Slide
from mtdp_runtime.store.reader import FeatureFile

MOST: Final = 48
_LEAST: Final = 8
_TILES_A_GROUP: Final = 24  # at least on average, so that reading them again costs little
_ROWS: Final = 4096  # that are grouped
_ROUNDS: Final = 10
_SIDE_PX: Final = 128


@dataclass(frozen=True, slots=True)
class Sample:
    """A tile that stands for a group."""

    row: int
    part: float  # of the tiles that its group has, about


@dataclass(frozen=True, slots=True)
class Sheet:
    """The pictures of the samples, uint8[H, W, 3] RGB, as far as they can be read; the largest group first."""

    tiles: tuple[tuple[Sample, NDArray[np.uint8]], ...]
    unread: int


def representative_rows(file: FeatureFile) -> list[Sample]:
    """Group the good tiles of a slide by their features (k-means from far points on), the largest group first.

    The same file gives the same tiles.
    """
    good = np.flatnonzero(file.good)
    good = good[:: max(1, -(-len(good) // _ROWS))]
    if not len(good):
        return []
    wanted = np.zeros(len(file), np.bool_)
    wanted[good] = True
    blocks = (slice(start, start + _ROWS) for start in range(0, len(file), _ROWS))
    rows = np.concatenate([file.features[block][wanted[block]].astype(np.float32) for block in blocks])
    rows -= rows.mean(axis=0)
    groups = min(len(rows), max(_LEAST, min(MOST, len(file) // _TILES_A_GROUP)))
    centres = _k_means(rows, groups)
    nearest = _distances(rows, centres).argmin(axis=1)
    samples = []
    for number in range(len(centres)):
        members = np.flatnonzero(nearest == number)
        if len(members):
            middle = members[_distances(rows[members], centres[number : number + 1])[:, 0].argmin()]
            samples.append(Sample(int(good[middle]), len(members) / len(rows)))
    return sorted(samples, key=lambda one: (-one.part, one.row))


def _distances(rows: NDArray[np.float32], centres: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return float32[N, K]: squared Euclidean distances, up to a number that is the same along a row."""
    distances: NDArray[np.float32] = (centres**2).sum(axis=1)[None] - 2 * rows @ centres.T
    return distances


def _k_means(rows: NDArray[np.float32], groups: int) -> NDArray[np.float32]:
    """Return float32[K, D], K at most `groups`: means of groups of rows, begun at rows that are far from each other."""
    lengths = (rows**2).sum(axis=1)
    first = int(lengths.argmin())
    chosen, far = [first], np.full(len(rows), np.inf, np.float32)
    while len(chosen) < groups:
        far = np.minimum(far, lengths + _distances(rows, rows[chosen[-1:]])[:, 0])
        farthest = int(far.argmax())
        if far[farthest] <= 1e-6 * max(float(lengths.max()), 1e-12):
            break  # only tiles that look the same are left
        chosen.append(farthest)
    centres = rows[chosen]
    for _ in range(_ROUNDS):
        nearest = _distances(rows, centres).argmin(axis=1)
        moved = np.stack(
            [rows[nearest == k].mean(axis=0) if (nearest == k).any() else centre for k, centre in enumerate(centres)]
        )
        if np.array_equal(moved, centres):
            break
        centres = moved
    return centres


def contact_sheet(file: FeatureFile, slide: Slide) -> Sheet:
    """Read the representative tiles of a slide, as the model saw them."""
    tile_px, scale = int(file.tile_attrs["patch_size"]), float(file.attrs["scale"])
    samples = representative_rows(file)
    pictures: dict[int, NDArray[np.uint8]] = {}
    tile = np.zeros((tile_px, tile_px, 3), np.uint8)
    for row in sorted(one.row for one in samples):  # neighbours share what is decoded
        x0, y0 = file.coords[row].tolist()
        try:
            slide.read_into(tile, x0, y0, scale)
        except (SlideError, OSError):
            continue
        side_px = min(_SIDE_PX, tile_px)
        pictures[row] = cv2.resize(tile, (side_px, side_px), interpolation=cv2.INTER_AREA)
    return Sheet(
        tuple((one, pictures[one.row]) for one in samples if one.row in pictures), len(samples) - len(pictures)
    )
