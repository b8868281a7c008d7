"""One's own numbers for the tiles of a slide: attention, predictions, distances.

A table (CSV, TSV or Parquet) has the columns x, y, level-0 pixels of a tile's top left (`minx`, `miny` of WSInfer's
tables do, too), and any columns of numbers. With a column `slide` it is of several slides. An HDF5 file has datasets of
a number, or a few, for each row of the feature file; or for each good row, since bags for CLAM leave the bad ones out.
Where it has `coords`, int[N, 2], these are x and y.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.errors import UsageError

_X: Final = ("x", "minx", "x0")
_Y: Final = ("y", "miny", "y0")
_SLIDE: Final = ("slide", "slide_id")
_NO_VALUE: Final = frozenset({"width", "height", "w", "h", "row", "index", ""})
_MOST_COLUMNS: Final = 64
_HINT: Final = "A table needs the columns x,y,value; an HDF5 file a dataset of one number for each row of the features."


@dataclass(frozen=True, slots=True)
class Scores:
    """Some numbers for each of some tiles."""

    columns: tuple[str, ...]
    values: NDArray[np.float32]  # [N, C]; NaN where there is none
    places: NDArray[np.int64] | None = None  # [N, 2], level-0 x, y; None: as the rows of the feature file
    slides: tuple[str, ...] = ()  # [N], where a table is of several
    side: float = 0.0  # of a tile in level-0 pixels, where a table has a column `width`

    def of_slide(self, name: str) -> Scores:
        """Return those of one slide."""
        if not self.slides:
            return self
        mine = np.array([slide in (name, name.rsplit("/", 1)[-1]) for slide in self.slides], np.bool_)
        assert self.places is not None
        return replace(self, values=self.values[mine], places=self.places[mine], slides=())


def read_scores(path: Path) -> Scores:
    """Read a file of scores.

    Raises:
        UsageError: it cannot be read, or holds none.
    """
    try:
        if path.suffix.lower() in (".h5", ".hdf5", ".hdf"):
            return _of_hdf5(path)
        if path.suffix.lower() in (".parquet", ".pq"):
            return _of_table(path, *_parquet(path))
        return _of_table(path, *_text(path))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}", hint=_HINT) from error


def on_rows(
    path: Path, scores: Scores, coords: NDArray[np.int64], good: NDArray[np.bool_]
) -> tuple[NDArray[np.float32], str] | None:
    """Return scores as float32[rows, C] of a feature file, and a note; None where they are of other places.

    Raises:
        UsageError: they are of another number of rows.
    """
    count = len(coords)
    if scores.places is None:
        if len(scores.values) == count:
            return scores.values, ""
        if len(scores.values) == int(good.sum()):
            values = np.full((count, len(scores.columns)), np.nan, np.float32)
            values[good] = scores.values
            return values, f"{count - len(scores.values)} tiles that could not be read have none"
        raise UsageError(
            f"{path}: {len(scores.values)} scores, and the features have {count} rows ({int(good.sum())} of them good)",
            hint="Are they of another slide, or of another grid? A table with x,y,value says where each belongs.",
        )
    at = {place: row for row, place in enumerate(map(tuple, coords.tolist()))}
    rows = np.array([at.get(place, -1) for place in map(tuple, scores.places.tolist())], np.int64)
    if not len(rows) or (rows < 0).any():
        return None
    values = np.full((count, len(scores.columns)), np.nan, np.float32)
    values[rows] = scores.values
    return values, f"of {len(rows)} of {count} tiles" if len(rows) < count else ""


def _of_hdf5(path: Path) -> Scores:
    with h5py.File(path, "r", locking=False) as file:
        found: dict[str, NDArray[Any]] = {}
        file.visititems(lambda name, node: found.update({name: node}) if isinstance(node, h5py.Dataset) else None)
        places = next((found[name][:] for name in found if name.rsplit("/", 1)[-1] == "coords"), None)
        kept = {}
        for name, dataset in found.items():
            if dataset.dtype.kind not in "iufb" or name.rsplit("/", 1)[-1] in ("coords", "features"):
                continue
            shape = [side for side in dataset.shape if side != 1]  # attention is often [1, N] or [N, 1]
            if 1 <= len(shape) <= 2 and (len(shape) == 1 or shape[1] <= _MOST_COLUMNS):
                kept[name] = np.asarray(dataset[()], np.float32).reshape(shape[0], -1)
    lengths = {len(values) for values in kept.values()}
    if not kept or len(lengths) != 1:
        what = f"datasets of different lengths: {', '.join(sorted(kept))}" if kept else "no dataset of numbers"
        raise UsageError(f"{path}: holds {what}", hint=_HINT)
    columns = [
        name if values.shape[1] == 1 else f"{name} {column}"
        for name, values in kept.items()
        for column in range(values.shape[1])
    ]
    if places is not None and places.shape != (lengths.copy().pop(), 2):
        raise UsageError(f"{path}: coords and scores differ in length", hint=_HINT)
    return Scores(
        tuple(columns),
        np.concatenate(list(kept.values()), axis=1),
        None if places is None else places.astype(np.int64),
    )


def _parquet(path: Path) -> tuple[list[str], list[list[Any]]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UsageError(f"{path}: Parquet needs pyarrow", hint="pip install 'mtdp[parquet]'") from error
    try:
        table = parquet.read_table(path)
    except ArrowException as error:
        raise UsageError(f"{path}: is not a Parquet file: {error}", hint=_HINT) from error
    return table.column_names, [column.to_pylist() for column in table.columns]


def _text(path: Path) -> tuple[list[str], list[list[Any]]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            first = stream.readline()
            separator = max(",;\t", key=first.count)
            stream.seek(0)
            rows = [row for row in csv.reader(stream, delimiter=separator) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path}: is not a table: {error}", hint=_HINT) from error
    names = rows[0] if rows else []
    uneven = next((number for number, row in enumerate(rows) if len(row) != len(names)), None)
    if uneven is not None:
        raise UsageError(
            f"{path}: line {uneven + 1}: {len(rows[uneven])} fields, and the first line has {len(names)}", hint=_HINT
        )
    return names, [list(column) for column in zip(*rows[1:], strict=True)] or [[] for _ in names]


def _of_table(path: Path, names: list[str], columns: list[list[Any]]) -> Scores:
    called = [name.strip().lower() for name in names]

    def find(wanted: tuple[str, ...]) -> int | None:
        return next((called.index(name) for name in wanted if name in called), None)

    x, y, slide = find(_X), find(_Y), find(_SLIDE)
    if x is None or y is None:
        raise UsageError(f"{path}: has no column {'x' if x is None else 'y'}, only {', '.join(names)}", hint=_HINT)
    values = {
        names[number].strip(): floats
        for number in range(len(names))
        if number not in (x, y, slide) and called[number] not in _NO_VALUE
        if (floats := _floats(columns[number])) is not None
    }
    if not values:
        raise UsageError(f"{path}: has no column of numbers beside x and y", hint=_HINT)
    places = [_floats(columns[x]), _floats(columns[y])]
    if any(place is None or not np.isfinite(place).all() for place in places):
        raise UsageError(f"{path}: x and y must be numbers in every row", hint=_HINT)
    widths = _floats(columns[called.index("width")]) if "width" in called else None
    return Scores(
        tuple(values),
        np.stack(list(values.values()), axis=1).astype(np.float32),
        np.rint(np.stack(places, axis=1)).astype(np.int64),  # type: ignore[arg-type]
        tuple(str(one).strip() for one in columns[slide]) if slide is not None else (),
        float(np.nanmedian(widths)) if widths is not None and len(widths) and np.nanmedian(widths) > 0 else 0.0,
    )


def _floats(column: list[Any]) -> NDArray[np.float64] | None:
    """Return numbers, NaN where a field is empty; None where one is none."""
    try:
        return np.array([np.nan if field in ("", None) else float(field) for field in column], np.float64)
    except (TypeError, ValueError):
        return None
