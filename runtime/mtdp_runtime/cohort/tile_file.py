"""Lists of tiles as people have them: CSV, Parquet, or the HDF5 file of TRIDENT, CLAM, WSInfer or mtdp.

A file is told by its content. The places are level-0 pixels of each tile's top left, whole numbers, in two columns of a
name that says so (`x,y`, `coord_x,coord_y`, `minx,miny`, ...) or in the dataset `coords`. Rows stay as they are.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.cohort.slide_table import text_of
from mtdp_runtime.errors import UsageError
from mtdp_runtime.tiling.given_tiles import GivenTiles, Stated
from mtdp_runtime.tiling.grid import MOST_TILES

# Files of a folder that are a slide's: the last is what TRIDENT calls them.
ENDINGS: Final = (".csv", ".parquet", ".h5", "_patches.h5")
_PAIRS: Final = (
    ("x", "y"),
    ("x0", "y0"),
    ("coord_x", "coord_y"),
    ("coords_x", "coords_y"),
    ("x_coord", "y_coord"),
    ("minx", "miny"),
    ("min_x", "min_y"),
    ("xmin", "ymin"),
    ("x_min", "y_min"),
    ("left", "top"),
    ("tile_x", "tile_y"),
)
_SLIDES: Final = frozenset({"slide", "slide_id", "slide_name", "wsi", "wsi_id", "wsi_name"})
_SIDES: Final = ("width", "height")  # of a tile, in level-0 pixels, as WSInfer writes them
_WHOLE: Final = re.compile(r"[+-]?[0-9]{1,18}")
_NUMBER: Final = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,4})?")
_MOST: Final = 1 << 40  # level-0 pixels: no slide has as many on a side
_LEVEL0: Final = "Places must be whole numbers of level-0 pixels: x, y of each tile's top left."
Column = NDArray[Any]


def read_tiles(path: Path) -> GivenTiles:
    """Read a list of tiles.

    Raises:
        UsageError: there is no such file, or it holds no such list.
    """
    if path.is_dir():
        raise UsageError(
            f"{path}: not one file of this slide's tiles in this folder",
            hint=f"It must hold one of <name>{', <name>'.join(ENDINGS)}, with the name of the slide's output.",
        )
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for, a device read without end
            raise UsageError(f"{path}: the list of tiles is not a file", hint="Check the path.")
        with path.open("rb") as stream:
            begins = stream.read(8)
    except OSError as error:
        raise UsageError(
            f"{path}: the list of tiles cannot be read: {error.strerror}", hint="Check the path."
        ) from error
    if begins == b"\x89HDF\r\n\x1a\n":
        return _from_hdf5(path)
    places, stated = _from_table(path, *(_parquet if begins.startswith(b"PAR1") else _csv)(path))
    return GivenTiles(path, places, stated)


def _from_table(
    path: Path, names: Sequence[str], column: Callable[[str], Column], first_line: int
) -> tuple[NDArray[np.int64], Stated]:
    """Read the places of a table.

    Args:
        path: of its file.
        names: of its columns.
        column: gives the values of one.
        first_line: what its first row is called in messages.
    """
    plain = {_plain(name): name for name in names}
    counted = Counter(map(_plain, names))
    twice = next((name for pair in _PAIRS for name in pair if counted[name] > 1), None)
    if twice:
        raise UsageError(f"{path}: two columns named {twice!r}", hint="Keep one of them.")
    found = [pair for pair in _PAIRS if set(pair) <= set(plain)]
    if len(found) != 1:
        what = " and ".join(",".join(pair) for pair in found) or "no columns x,y"
        more = "two pairs of columns could be the places: " if found else ""
        raise UsageError(
            f"{path}: {more}{what} (columns: {', '.join(names) or 'none'})",
            hint=f"{_LEVEL0} Name the columns {' or '.join(','.join(pair) for pair in _PAIRS[:3])}.",
        )
    for name in sorted(_SLIDES & set(plain)):
        slides = {str(value) for value in column(plain[name])}
        if len(slides) > 1:
            raise UsageError(
                f"{path}: lists tiles of {len(slides)} slides (column {plain[name]})",
                hint="Make a file for each slide, and give their folder, or a manifest with the columns slide,coords.",
            )
    places = _placed([_whole(path, name, column(plain[name]), first_line) for name in found[0]], path)
    sides = [_whole(path, name, column(plain[name]), first_line) for name in _SIDES if name in plain]
    if not len(places) or not sides:
        return places, Stated()
    all_of_them = np.unique(np.concatenate(sides))
    if len(all_of_them) > 1:
        raise UsageError(
            f"{path}: its tiles have sides of {all_of_them[0]} to {all_of_them[-1]} px",
            hint="A model sees square tiles of one size.",
        )
    return places, Stated(side0=float(all_of_them[0]))


def _plain(name: str) -> str:
    return re.sub(r"[\s-]+", "_", name.strip().lower())


def _csv(path: Path) -> tuple[list[str], Callable[[str], Column], int]:
    text = text_of(path, lambda note: None)  # what is no ASCII is in columns that are not read
    lines = [line for line in io.StringIO(text, newline=None) if line.strip("\ufeff \t\n,;")]
    if lines and lines[0].strip().lower() in ("sep=,", "sep=;", "sep="):  # a spreadsheet's own hint
        del lines[0]
    separator = max(",;\t", key=lines[0].count) if lines else ","
    reader = csv.reader(lines, delimiter=separator, skipinitialspace=True)
    try:
        names = next(reader, [])
        rows = list(reader)
    except csv.Error as error:
        raise UsageError(
            f"{path}: line {reader.line_num}: not CSV: {error}", hint="Save it as CSV in UTF-8."
        ) from error
    names = [name.strip("\ufeff \t") for name in names]
    for number, fields in enumerate(rows):
        if len(fields) != len(names):
            raise UsageError(
                f"{path}: row {number + 1} has {len(fields)} fields, and there are {len(names)} columns",
                hint="Save it as CSV again.",
            )
    at = {name: index for index, name in enumerate(names)}
    return names, lambda name: np.array([fields[at[name]] for fields in rows], object), 1


def _parquet(path: Path) -> tuple[list[str], Callable[[str], Column], int]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UsageError(f"{path}: Parquet needs pyarrow", hint="pip install 'mtdp[parquet]'") from error
    file = parquet.ParquetFile(path)
    names = [str(name) for name in file.schema_arrow.names]
    return names, lambda name: np.asarray(file.read([name]).column(0).to_numpy(zero_copy_only=False)), 1


def _from_hdf5(path: Path) -> GivenTiles:
    try:
        with h5py.File(path, "r", locking=False) as file:
            dataset = file.get("coords")
            if not isinstance(dataset, h5py.Dataset) or isinstance(file.get("coords", getlink=True), h5py.ExternalLink):
                raise UsageError(
                    f"{path}: has no dataset coords (it has: {', '.join(file) or 'nothing'})", hint=_LEVEL0
                )
            if dataset.ndim != 2 or dataset.shape[1] != 2 or dataset.external or dataset.is_virtual:
                raise UsageError(f"{path}: coords has the shape {dataset.shape}, not [N, 2]", hint=_LEVEL0)
            if _text(file.attrs.get("unit")) == "um":
                raise UsageError(f"{path}: its coords are micrometres (STAMP's)", hint=_LEVEL0)
            _check_count(path, len(dataset))
            rows = dataset[:]
            stated = _stated(dataset.attrs)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read as HDF5: {error}", hint="Make it again.") from error
    columns = [_whole(path, name, rows[:, index], 1) for index, name in enumerate(("x", "y"))]
    return GivenTiles(path, _placed(columns, path), stated)


def _stated(attrs: Mapping[str, Any]) -> Stated:
    """Return what TRIDENT (`patch_size_level0`), CLAM (`patch_size`, `patch_level`) or WSInfer say of their tiles."""
    whole = [_number(attrs, f"level0_{side}") for side in _SIDES]
    level = _number(attrs, "patch_level")
    if None in whole and level == 0 and np.size(attrs.get("level_dim", ())) == 2:
        whole = [float(side) for side in np.ravel(attrs["level_dim"])]
    wide, high = whole
    factor, custom = _number(attrs, "downsample"), _number(attrs, "custom_downsample")
    patch_px = _number(attrs, "patch_size")
    return Stated(
        side0=_number(attrs, "patch_size_level0"),
        side_px=None if patch_px is None else patch_px * (custom or 1),
        level=None if level is None else int(level),
        downsample=factor,
        slide_px=None if wide is None or high is None else (int(wide), int(high)),
        overlap_px=int(_number(attrs, "overlap") or 0),
    )


def _number(attrs: Mapping[str, Any], name: str) -> float | None:
    """Return an attribute that is a number, or the first of several; None where it says nothing."""
    values = np.ravel(attrs.get(name, ()))
    if not values.size or values.dtype.kind not in "iuf" or not np.isfinite(float(values[0])):
        return None
    return float(values[0])


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _check_count(path: Path, count: int) -> None:
    if count > MOST_TILES:
        raise UsageError(f"{path}: {count:,} tiles: more than {MOST_TILES:,}", hint="Is it the list of one slide?")


def _placed(columns: Sequence[NDArray[np.int64]], path: Path) -> NDArray[np.int64]:
    _check_count(path, len(columns[0]))
    return np.ascontiguousarray(np.stack(columns, axis=1))


def _whole(path: Path, name: str, values: Column, first: int) -> NDArray[np.int64]:
    """Return int64[N] of numbers that are whole, or of texts that say such.

    Raises:
        UsageError: one is none, or no slide is as large; with its row, the first of which is called `first`.
    """
    given = values
    if values.dtype.kind in "OUS":
        values = np.array([_parsed(value) for value in values.tolist()], np.float64)
    if values.dtype.kind not in "iuf":
        raise UsageError(f"{path}: {name} is of the type {values.dtype}", hint=_LEVEL0)
    with np.errstate(invalid="ignore"):
        wrong = ~(np.abs(values.astype(np.float64)) < _MOST) | (values != np.rint(values.astype(np.float64)))
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise UsageError(
            f"{path}: row {row + first}: {name} is {_shown(given[row])}: not a whole number of pixels"
            + (f", and {int(wrong.sum()) - 1} more" if wrong.sum() > 1 else ""),
            hint=_LEVEL0,
        )
    return values.astype(np.int64)


def _shown(value: Any) -> str:
    return repr(value[:24]) if isinstance(value, str | bytes) else str(value)


def _parsed(value: Any) -> float:
    """Return the number that a field is; NaN where it is none."""
    if isinstance(value, str):
        text = value.strip()
        return float(text) if _WHOLE.fullmatch(text) or _NUMBER.fullmatch(text) else np.nan
    return float(value) if isinstance(value, int | float | Decimal) and not isinstance(value, bool) else np.nan
