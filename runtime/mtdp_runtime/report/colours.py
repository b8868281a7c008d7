"""Features as colours, the same for all slides of a folder: one principal component analysis a model, kept there.

The first slide with enough tiles that gets a report defines the axes and their range; every other slide of the folder
and the model, of later runs and other processes, too, is drawn by them. So a colour means the same on each slide of the
folder. To choose anew, remove `report/colours.*.npz` and the reports.
"""

from __future__ import annotations

import os
import secrets
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.report import places
from mtdp_runtime.store.reader import FeatureFile

BAD: Final = 128  # grey, of tiles without features
_FIT_ROWS: Final = 20_000
_LEAST_ROWS: Final = 64  # of a slide that decides for the others
_BLOCK_ROWS: Final = 1024
_CHANNELS: Final = 3


@dataclass(frozen=True, slots=True)
class Colours:
    """How features become colours: three axes, and the range of each."""

    mean: NDArray[np.float64]  # [D]
    axes: NDArray[np.float64]  # [D, 3]
    low: NDArray[np.float64]  # [3]
    high: NDArray[np.float64]  # [3]
    digest: str  # of the model's bundle
    slide: str  # that defined them
    shared: bool = True  # by the slides of the folder; else this slide's alone

    def of_rows(self, rows: NDArray[np.floating]) -> NDArray[np.uint8]:
        """Return uint8[N, 3] RGB of features float[N, D]."""
        scaled = ((rows - self.mean) @ self.axes - self.low) / np.maximum(self.high - self.low, 1e-12)
        return np.rint(np.clip(scaled, 0, 1) * 255).astype(np.uint8)

    def of_file(self, file: FeatureFile) -> NDArray[np.uint8]:
        """Return uint8[N, 3] RGB of all tiles of a slide; bad ones are grey."""
        colours = np.full((len(file), _CHANNELS), BAD, np.uint8)
        for start, block in _blocks(file):
            colours[start : start + len(block)] = self.of_rows(np.nan_to_num(block))
        colours[~file.good] = BAD
        return colours


def shown_colours(folder: Path, file: FeatureFile) -> Colours | None:
    """Return the colours of a folder and a file's model, or the file's own where none are kept; nothing is written."""
    digest = str(file.attrs.get("bundle_digest", ""))
    return _read(_place(folder, digest), digest, file.features.shape[1]) or _fitted(file, digest)


def folder_colours(folder: Path, file: FeatureFile) -> Colours | None:
    """Return the colours of a folder and a file's model; the file defines them where none has. None without tiles.

    Raises:
        OSError: they cannot be kept.
    """
    digest = str(file.attrs.get("bundle_digest", ""))
    path = _place(folder, digest)
    kept = _read(path, digest, file.features.shape[1])
    if kept is not None:
        return kept
    path.unlink(missing_ok=True)  # damaged, or of another model; what others keep from now on is theirs
    own = _fitted(file, digest)
    if own is None or not own.shared:
        return own
    _keep(path, own)
    return _read(path, digest, file.features.shape[1]) or own


def _place(folder: Path, digest: str) -> Path:
    return folder / places.FOLDER / f"colours.{digest[:16] or 'unknown'}.npz"


def _fitted(file: FeatureFile, digest: str) -> Colours | None:
    good = np.flatnonzero(file.good)
    if len(good) <= _CHANNELS:
        return None
    chosen = np.zeros(len(file), np.bool_)
    chosen[good[:: max(1, len(good) // _FIT_ROWS)]] = True
    rows = np.concatenate([block[chosen[start : start + len(block)]] for start, block in _blocks(file)])
    mean = rows.mean(axis=0)
    _, vectors = np.linalg.eigh(np.atleast_2d(np.cov(rows - mean, rowvar=False)))
    axes = np.zeros((rows.shape[1], _CHANNELS))
    found = vectors[:, : -_CHANNELS - 1 : -1]
    axes[:, : found.shape[1]] = found * np.where(
        found[np.abs(found).argmax(axis=0), np.arange(found.shape[1])] < 0, -1, 1
    )
    low, high = np.percentile((rows - mean) @ axes, [1, 99], axis=0)
    return Colours(mean, axes, low, high, digest, str(file.attrs.get("slide", "")), len(good) >= _LEAST_ROWS)


def _blocks(file: FeatureFile) -> Iterator[tuple[int, NDArray[np.float64]]]:
    for start in range(0, len(file), _BLOCK_ROWS):
        yield start, file.features[start : start + _BLOCK_ROWS].astype(np.float64)


def _keep(path: Path, colours: Colours) -> None:
    """Write a file that other processes see whole; of several that do so at once, the first one's stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    own = path.with_name(f".{path.stem}.{secrets.token_hex(3)}.partial.npz")
    try:
        np.savez(
            own,
            mean=colours.mean,
            axes=colours.axes,
            low=colours.low,
            high=colours.high,
            digest=np.array(colours.digest),
            slide=np.array(colours.slide),
        )
        try:
            os.link(own, path)  # which does not replace
        except FileExistsError:
            return
        except OSError:  # a file system without links
            own.replace(path)
    finally:
        with suppress(OSError):
            own.unlink(missing_ok=True)


def _read(path: Path, digest: str, features_dim: int) -> Colours | None:
    """Return the colours that are kept; None where there are none, they are damaged, or of another model."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as kept:
            mean, axes, low, high = (np.asarray(kept[name], np.float64) for name in ("mean", "axes", "low", "high"))
            found = Colours(mean, axes, low, high, str(kept["digest"]), str(kept["slide"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    shapes = [one.shape for one in (found.mean, found.axes, found.low, found.high)]
    fits = shapes == [(features_dim,), (features_dim, _CHANNELS), (_CHANNELS,), (_CHANNELS,)]
    finite = all(np.isfinite(one).all() for one in (found.mean, found.axes, found.low, found.high))
    return found if fits and finite and found.digest == digest else None
