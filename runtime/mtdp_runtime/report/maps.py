"""The probabilities of a slide's tiles as maps, with a legend: one colour scale, from 0 to 1, on every slide."""

from __future__ import annotations

import html
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.report.page import data_url, plural
from mtdp_runtime.store.reader import FeatureFile, StoredHead

_MOST_CLASSES: Final = 12
_STOPS: Final = 9


def probability_maps(file: FeatureFile) -> str:
    """Return a section with a map for each class of each head; nothing where no probabilities are stored."""
    if not file.heads or not file.good.any():
        return ""
    return f"<h2>Probabilities</h2>{_legend()}{''.join(_head(file, head) for head in file.heads)}"


def palette() -> NDArray[np.uint8]:
    """Return uint8[256, 3] RGB: viridis, which is perceptually uniform and told apart without red and green."""
    ramp = cv2.applyColorMap(np.arange(256, dtype=np.uint8)[:, None], cv2.COLORMAP_VIRIDIS)
    return np.ascontiguousarray(ramp[:, 0, ::-1])


def tile_map(file: FeatureFile, values: NDArray[np.floating]) -> bytes:
    """Return a PNG with a pixel for each place of the grid, of values float[N] in 0..1; clear where no good tile is."""
    grid = file.fact("grid")
    place = np.rint((file.coords - [grid["x0"], grid["y0"]]) / grid["step0"]).astype(np.int64)
    first, last = place.min(axis=0), place.max(axis=0)
    image = np.zeros((*(last - first + 1)[::-1], 4), np.uint8)
    good = file.good & np.isfinite(values)
    columns, rows = (place - first)[good].T
    image[rows, columns, :3] = palette()[np.rint(np.clip(values[good], 0, 1) * 255).astype(np.int64)]
    image[rows, columns, 3] = 255
    _, data = cv2.imencode(".png", image[..., [2, 1, 0, 3]])
    return data.tobytes()


def _legend() -> str:
    colours = palette()[np.linspace(0, 255, _STOPS).astype(np.int64)]
    stops = ",".join("#{:02x}{:02x}{:02x}".format(*colour) for colour in colours.tolist())
    return (
        f'<div class=legend role=img aria-label="Colours from dark violet, 0, over green, 0.5, to yellow, 1">'
        f'<div style="background:linear-gradient(90deg,{stops})"></div>'
        "<span>0</span><span>0.25</span><span>0.5</span><span>0.75</span><span>1</span></div>"
    )


def _head(file: FeatureFile, head: StoredHead) -> str:
    values = np.asarray(head.probabilities[:], np.float64)
    good = values[file.good]
    means, best = good.mean(axis=0), np.bincount(good.argmax(axis=1), minlength=values.shape[1]) / len(good)
    order = np.argsort(-means, kind="stable").tolist()
    note = ""
    if len(order) == 2:
        order, note = [1], f" One map tells both: the rest is {head.class_names[0]}."
    elif len(order) > _MOST_CLASSES:
        note = f" The {_MOST_CLASSES} of {plural(len(order), 'class', 'classes')} with the highest mean."
        order = order[:_MOST_CLASSES]
    figures = "".join(
        f'<figure><img class=map alt="Map of the probability of {html.escape(head.class_names[k])}" '
        f'src="{data_url(tile_map(file, values[:, k]), "png")}">'
        f"<figcaption><b>{html.escape(head.class_names[k])}</b>: mean {means[k]:.2f}, the most probable in "
        f"{best[k]:.0%} of tiles</figcaption></figure>"
        for k in order
    )
    return (
        f"<h3>{html.escape(head.task)}</h3><p class=soft>{html.escape(note.strip())}</p><div class=maps>{figures}</div>"
    )
