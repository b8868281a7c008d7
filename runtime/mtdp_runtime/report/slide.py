"""The report of a slide: one HTML file without links to anything else.

It is drawn from the finished feature file and a thumbnail of the slide, so it can be made at any time after the run.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import cv2
import h5py
import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.report import places
from mtdp_runtime.report.page import END, document, figure, readable
from mtdp_runtime.report.thumbnails import write_thumbnail
from mtdp_runtime.store import derived
from mtdp_runtime.store.layout import TileStatus
from mtdp_runtime.store.reader import FeatureFile, open_features

_SIDE_PX: Final = 1100
_PCA_ROWS: Final = 20_000
_OUTLINE: Final = (0, 140, 70)
_TILE: Final = (40, 90, 200)
_BAD: Final = (220, 30, 30)
_STAGES: Final = ("read", "infer", "store")


KIND: Final = "report"  # among what is derived from a feature file


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """A slide, small: a pixel covers scale x scale level-0 pixels, the first at (x0, y0)."""

    image: NDArray[np.uint8]  # [H, W, 3] RGB
    scale: float
    x0: int
    y0: int


def report_is_current(path: Path, features: Path) -> bool:
    """Say whether the report was made from what the file holds now; of an earlier version's reports, by their time."""
    if derived.is_current(features, KIND, [path]):
        return True
    try:
        older = KIND not in derived.records(features) and path.stat().st_mtime_ns >= features.stat().st_mtime_ns
        return older and path.read_bytes().endswith(END.encode())
    except OSError:
        return False


def write_report(path: Path, features: Path, thumbnail: Thumbnail) -> None:
    """Write the report of a finished feature file.

    Raises:
        StoreError: the file cannot be read.
        OutputUnwritable: the folder cannot be written. The features are not touched.
    """
    picture = places.thumbnail(features.parent, features.stem)
    parts: list[tuple[Path, Callable[[Path], None]]] = [
        (path, lambda target: _write(target, features, thumbnail)),
        (picture, lambda target: write_thumbnail(target, thumbnail.image)),
    ]
    derived.make(features, KIND, parts)


def _write(target: Path, features: Path, thumbnail: Thumbnail) -> None:
    with open_features(features) as file:
        title = html.escape(str(file.attrs["slide"]))
        parts = [
            f"<nav><a href=index.html>All slides</a></nav><main><h1>{title}</h1><p>{html.escape(_summary(file))}</p>",
            figure(
                _with_grid(file, thumbnail),
                f"Tissue (green outline; {file.attrs['tissue_source']}) and the tiles that were computed "
                "(blue; red: bad).",
            ),
        ]
        if len(file):
            parts.append(
                figure(
                    _with_colours(file, thumbnail),
                    "Features as colours: the first three principal components as red, green and blue. "
                    "Tiles of one colour look alike to the model.",
                )
            )
        parts += [_timing(file), _bad_tiles(file), _facts(file.attrs), "</main>"]
        page = document(str(file.attrs["slide"]), parts)
    target.write_text(page, encoding="utf-8", errors="backslashreplace")


def _summary(file: FeatureFile) -> str:
    attrs = file.attrs
    text = (
        f"{len(file)} tiles of {file.tile_attrs['patch_size']} px at a scale of {attrs['scale']:.4f} from level "
        f"{attrs['level']}; {attrs['tissue_mm2']:.2f} mm² of tissue."
    )
    if not len(file):
        return f"{text} No tile has enough tissue."
    wall_s = file.fact("timing")["wall_s"]
    return f"{text} {wall_s:.1f} s, {attrs['tiles_per_s']:.1f} tiles/s, bottleneck: {attrs['bottleneck']}."


def _enlarged(thumbnail: Thumbnail) -> tuple[NDArray[np.uint8], float]:
    """Return uint8[H, W, 3] RGB at the report's size, and its pixels per level-0 pixel."""
    image = thumbnail.image
    zoom = min(4.0, _SIDE_PX / max(image.shape[:2]))
    method = cv2.INTER_AREA if zoom < 1 else cv2.INTER_LINEAR
    resized: NDArray[np.uint8] = cv2.resize(image, None, fx=zoom, fy=zoom, interpolation=method)
    return resized, zoom / thumbnail.scale


def _rectangles(file: FeatureFile, thumbnail: Thumbnail, zoom: float) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Return two corners of each tile, in pixels of the picture."""
    tile_side = file.tile_attrs["patch_size"] * file.attrs["scale"]
    near = file.coords - np.array([thumbnail.x0, thumbnail.y0], np.float64)
    corners = np.rint(np.concatenate([near * zoom, (near + tile_side) * zoom], axis=1)).astype(np.int64)
    return [((left, top), (right, bottom)) for left, top, right, bottom in corners.tolist()]


def _with_grid(file: FeatureFile, thumbnail: Thumbnail) -> NDArray[np.uint8]:
    image, zoom = _enlarged(thumbnail)
    for corners, good in zip(_rectangles(file, thumbnail, zoom), file.good, strict=True):
        cv2.rectangle(image, *corners, _TILE if good else _BAD, 1)
    if file.tissue is not None:
        mask = cv2.resize(file.tissue.mask.astype(np.uint8), image.shape[1::-1], interpolation=cv2.INTER_NEAREST)
        contours, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(image, contours, -1, _OUTLINE, 2)
    return image


def _with_colours(file: FeatureFile, thumbnail: Thumbnail) -> NDArray[np.uint8]:
    image, zoom = _enlarged(thumbnail)
    colours = _pca_colours(file.features, file.status)
    for corners, colour in zip(_rectangles(file, thumbnail, zoom), colours, strict=True):
        cv2.rectangle(image, *corners, [int(c) for c in colour], -1)
    return image


def _pca_colours(features: h5py.Dataset, status: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return uint8[N, 3]; bad tiles are grey."""
    colours = np.full((len(status), 3), 128, np.uint8)
    good = np.flatnonzero(status == TileStatus.GOOD)
    if len(good) < 4:
        return colours
    sample = np.zeros(len(status), np.bool_)
    sample[good[:: max(1, len(good) // _PCA_ROWS)]] = True
    rows = np.concatenate([features[i : i + 1024][sample[i : i + 1024]] for i in range(0, len(status), 1024)])
    mean = rows.mean(axis=0)
    _, vectors = np.linalg.eigh(np.cov(rows - mean, rowvar=False))
    axes = vectors[:, :-4:-1]
    axes = axes * np.where(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])] < 0, -1, 1)
    low, high = np.percentile((rows - mean) @ axes, [1, 99], axis=0)
    for start in range(0, len(status), 1024):
        block = np.nan_to_num(features[start : start + 1024])
        scaled = ((block - mean) @ axes - low) / np.maximum(high - low, 1e-12)
        colours[start : start + 1024] = np.rint(np.clip(scaled, 0, 1) * 255)
    colours[status != TileStatus.GOOD] = 128
    return colours


def _timing(file: FeatureFile) -> str:
    timing = file.fact("timing")
    if not len(file) or timing["wall_s"] <= 0:
        return ""
    # Files of earlier versions do not say how many threads read.
    threads = {"read": timing.get("read_threads", timing["readers"]), "infer": 1, "store": 1}
    rows = ""
    for stage in _STAGES:
        busy_s, starved_s, blocked_s = (timing[f"{stage}_{what}"] for what in ("busy_s", "starved_s", "blocked_s"))
        share = min(1.0, busy_s / threads[stage] / timing["wall_s"])
        rows += (
            f"<tr><td>{stage}<td class=number>{threads[stage]}<td class=number>{busy_s:.2f}"
            f"<td class=number>{starved_s:.2f}<td class=number>{blocked_s:.2f}"
            f'<td><span class=bar style="width:{200 * share:.0f}px"></span>'
        )
    return (
        "<h2>Time</h2><table><tr><th>stage<th>threads<th>busy s<th>waited for input s<th>blocked by the next stage s"
        f"<th>share of the run</tr>{rows}</table>"
        f"<p>The engine had nothing to do for {timing['device_idle']:.0%} of the run.</p>"
    )


def _bad_tiles(file: FeatureFile) -> str:
    bad = file.attrs["bad_tiles"]
    if not bad:
        return ""
    left_out = file.fact("made_of")["on_bad_tile"] == "drop"
    where = "They are left out of the file." if left_out else "Their features are NaN and their status is not 0."
    return (
        f"<h2 class=bad>{bad} tiles could not be read</h2>"
        f"<p>{where}</p>"
        f"<pre>{html.escape(str(file.attrs['bad_tile_reasons']))}</pre>"
    )


def _facts(attrs: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><th scope=row>{html.escape(key)}<td>{html.escape(readable(value))}"
        for key, value in sorted(attrs.items())
    )
    return f"<h2>Settings and facts</h2><table>{rows}</table>"
