"""The report of a slide: one HTML file without links to anything else."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import cv2
import h5py
import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.errors import OutputUnwritable
from mtdp_runtime.extraction.outcome import Outcome
from mtdp_runtime.report.page import STYLE, figure, readable
from mtdp_runtime.store.layout import TileStatus
from mtdp_runtime.tiling.plan import Plan

_SIDE_PX: Final = 1100
_PCA_ROWS: Final = 20_000
_OUTLINE: Final = (0, 140, 70)
_TILE: Final = (40, 90, 200)
_BAD: Final = (220, 30, 30)


def write_report(path: Path, features: Path, plan: Plan, outcome: Outcome) -> None:
    """Write the report of a finished feature file.

    Raises:
        OutputUnwritable: the folder cannot be written. The features are not touched.
    """
    with h5py.File(features, "r", locking=False) as file:
        attrs = dict(file.attrs)
        status = file["status"][:]
        coords = file["coords"][:]
        colours = _pca_colours(file["features"], status)
    title = html.escape(plan.info.path.name)
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>",
        f"<h1>{title}</h1><p>{html.escape(_summary(plan, outcome))}</p>",
        figure(
            _with_grid(plan, coords, status),
            f"Tissue (green outline; {plan.tissue.source}) and the tiles that were computed (blue; red: bad).",
        ),
    ]
    if len(coords):
        parts.append(
            figure(
                _with_colours(plan, coords, colours),
                "Features as colours: the first three principal components as red, green and blue. "
                "Tiles of one colour look alike to the model.",
            )
        )
    parts += [_timing(outcome), _bad_tiles(attrs, outcome), _facts(attrs), "</html>\n"]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.partial")
        scratch.write_text("\n".join(parts), encoding="utf-8", errors="backslashreplace")
        scratch.replace(path)
    except OSError as error:
        raise OutputUnwritable(
            f"{path}: cannot be written: {error.strerror}", hint="Free space, or use --no-report."
        ) from error


def _summary(plan: Plan, outcome: Outcome) -> str:
    text = (
        f"{outcome.tiles} tiles of {plan.grid.tile_px} px at a scale of {plan.grid.scale:.4f} from level {plan.level}"
    )
    text += f"; {plan.tissue.area_mm2:.2f} mm² of tissue."
    if outcome.times is not None and outcome.tiles:
        times = outcome.times
        text += f" {outcome.seconds:.1f} s, {times.tiles_per_s:.1f} tiles/s, bottleneck: {times.bottleneck}."
    return f"{text} {outcome.message}"


def _thumbnail(plan: Plan) -> tuple[NDArray[np.uint8], float]:
    """Return uint8[H, W, 3] RGB, and thumbnail pixels a level-0 pixel."""
    image = plan.tissue.image
    zoom = min(4.0, _SIDE_PX / max(image.shape[:2]))
    method = cv2.INTER_AREA if zoom < 1 else cv2.INTER_LINEAR
    resized: NDArray[np.uint8] = cv2.resize(image, None, fx=zoom, fy=zoom, interpolation=method)
    return resized, zoom / plan.tissue.scale


def _rectangle(plan: Plan, origin: NDArray[np.int64], zoom: float) -> tuple[tuple[int, int], tuple[int, int]]:
    x, y = float(origin[0]) - plan.tissue.x0, float(origin[1]) - plan.tissue.y0
    tile0 = plan.grid.tile0
    return (round(x * zoom), round(y * zoom)), (round((x + tile0) * zoom), round((y + tile0) * zoom))


def _with_grid(plan: Plan, coords: NDArray[np.int64], status: NDArray[np.uint8]) -> NDArray[np.uint8]:
    image, zoom = _thumbnail(plan)
    mask = cv2.resize(plan.tissue.mask.astype(np.uint8), image.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    for origin, state in zip(coords, status, strict=True):
        cv2.rectangle(image, *_rectangle(plan, origin, zoom), _TILE if state == TileStatus.GOOD else _BAD, 1)
    contours, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(image, contours, -1, _OUTLINE, 2)
    return image


def _with_colours(plan: Plan, coords: NDArray[np.int64], colours: NDArray[np.uint8]) -> NDArray[np.uint8]:
    image, zoom = _thumbnail(plan)
    for origin, colour in zip(coords, colours, strict=True):
        cv2.rectangle(image, *_rectangle(plan, origin, zoom), [int(c) for c in colour], -1)
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


def _timing(outcome: Outcome) -> str:
    times = outcome.times
    if times is None or not outcome.tiles:
        return ""
    rows = "".join(
        f"<tr><td>{stage.name}<td class=number>{stage.threads}<td class=number>{stage.busy_s:.2f}"
        f"<td class=number>{stage.starved_s:.2f}<td class=number>{stage.blocked_s:.2f}"
        f'<td><span class=bar style="width:{200 * min(1.0, stage.busy_s / stage.threads / times.wall_s):.0f}px"></span>'
        for stage in (times.read, times.infer, times.store)
    )
    return (
        "<h2>Time</h2><table><tr><th>stage<th>threads<th>busy s<th>waited for input s<th>waited for room s"
        f"<th>share of the run</tr>{rows}</table>"
        f"<p>The engine had nothing to do for {times.device_idle:.0%} of the run.</p>"
    )


def _bad_tiles(attrs: Mapping[str, Any], outcome: Outcome) -> str:
    if not outcome.bad_tiles:
        return ""
    where = (
        "They are left out of the file." if outcome.left_out else "Their features are NaN and their status is not 0."
    )
    return (
        f"<h2 class=bad>{outcome.bad_tiles} tiles could not be read</h2>"
        f"<p>{where}</p>"
        f"<pre>{html.escape(str(attrs['bad_tile_reasons']))}</pre>"
    )


def _facts(attrs: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><th scope=row>{html.escape(key)}<td>{html.escape(readable(value))}"
        for key, value in sorted(attrs.items())
    )
    return f"<h2>Settings and facts</h2><table>{rows}</table>"
