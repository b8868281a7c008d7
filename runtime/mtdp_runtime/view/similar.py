"""What else looks like a tile: of its slide, and of all slides of the run by the same model."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.errors import StoreError
from mtdp_runtime.store.reader import FeatureFile, open_features
from mtdp_runtime.view.nearest import Floats, Rows, basis_of, bytes_of
from mtdp_runtime.view.session import Session, Shown

MOST: Final = 24  # tiles that are like one
_MOST_BYTES: Final = 3_000_000_000
_KEPT: Final = 2  # slides whose rows are kept
_BLOCK: Final = 2048  # rows read at once
_SAMPLED: Final = 16  # files
_PIECE: Final = 64  # rows of each of eight places in them
_FEW: Final = 100_000  # rows: all of them are compared as fast


class NoSuchRow(LookupError):
    """The file has no such row, or it is of a tile that could not be read."""


@dataclass(frozen=True, slots=True)
class _Part:
    """Where the rows of a file are among all."""

    number: int  # of the slide in the session
    start: int
    count: int


@dataclass(slots=True)
class RunRows:
    """The rows of all files of one model; they are read in a thread of their own."""

    files: int
    read: int = 0  # files
    refusal: str = ""
    rows: Rows | None = None  # when all is read
    parts: list[_Part] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


class Similar:
    """The searches of one session."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._slides: OrderedDict[Path, tuple[float, Rows]] = OrderedDict()
        self._runs: dict[tuple[str, int], RunRows] = {}
        self._lock = threading.Lock()

    def of_slide(self, path: Path, row: int) -> tuple[Floats, Rows]:
        """Return a row, float32[D], and the rows of its file.

        Raises:
            NoSuchRow: the file has none of that number, or it is bad.
            StoreError: the file cannot be read.
        """
        with open_features(path) as file:
            if not 0 <= row < len(file) or not file.good[row]:
                raise NoSuchRow(f"row {row}: there is none, or its tile could not be read")
            query = file.features[row].astype(np.float32)
            with self._lock:
                return query, self._rows_of(file)

    def _rows_of(self, file: FeatureFile) -> Rows:
        changed = file.path.stat().st_mtime
        kept = self._slides.get(file.path)
        if kept is not None and kept[0] == changed:
            self._slides.move_to_end(file.path)
            return kept[1]
        rows = Rows(len(file), file.features.shape[1])
        _add(rows, file)
        self._slides[file.path] = (changed, rows)
        while len(self._slides) > _KEPT:
            self._slides.popitem(last=False)
        return rows

    def of_run(self, path: Path) -> RunRows:
        """Return the rows of all slides by the model of a file; at the first call they begin to be read."""
        with open_features(path) as file:
            key = _model(file)
        with self._lock:
            run = self._runs.get(key)
            if run is None:
                mine = [(number, shown) for number, shown in enumerate(self._session.shown) if shown.features]
                run = self._runs[key] = RunRows(len(mine))
                threading.Thread(target=_read_run, args=(run, key, mine), daemon=True).start()
        return run

    def answer(self, path: Path, row: int) -> dict[str, Any]:
        """Return the tiles most like that of a row: of its slide, and of the run so far as that can be said.

        Raises:
            NoSuchRow: the file has none of that number, or it is bad.
            StoreError: the file cannot be read.
        """
        query, rows = self.of_slide(path, row)
        found = rows.nearest(query, MOST + 1)
        told: dict[str, Any] = {"row": row, "slide": _listed(found.rows, found.cosines, without=row)[:MOST]}
        if len(self._session.shown) > 1:
            told["run"] = _of_run(self.of_run(path), query)
        return told


def _of_run(run: RunRows, query: Floats) -> dict[str, Any]:
    state = {"files": run.files, "read": run.read, "refusal": run.refusal, "left_out": run.left_out, "found": []}
    if run.rows is None:
        return state
    found = run.rows.nearest(query, MOST + 1)
    starts = np.array([part.start for part in run.parts])
    listed = []
    for place, cosine in zip(found.rows.tolist(), found.cosines.tolist(), strict=True):
        part = run.parts[int(np.searchsorted(starts, place, side="right")) - 1]
        listed.append({"slide": part.number, "row": place - part.start, "cosine": round(cosine, 4)})
    return state | {"tiles": len(run.rows), "found": listed}


def _listed(rows: NDArray[np.int64], cosines: Floats, without: int) -> list[dict[str, Any]]:
    pairs = zip(rows.tolist(), cosines.tolist(), strict=True)
    return [{"row": row, "cosine": round(cosine, 4)} for row, cosine in pairs if row != without]


def _read_run(run: RunRows, key: tuple[str, int], files: Sequence[tuple[int, Shown]]) -> None:
    """Read all files of a model into memory. What cannot be read is left out, and said."""
    counted: list[tuple[int, Shown, int]] = []
    for number, shown in files:
        assert shown.features is not None
        try:
            with open_features(shown.features) as file:
                if _model(file) == key and len(file):
                    counted.append((number, shown, len(file)))
        except (StoreError, OSError, KeyError) as error:
            run.left_out.append(f"{shown.name}: {error}")
    total = sum(count for _, _, count in counted)
    if bytes_of(total, key[1]) > _MOST_BYTES:
        run.refusal = (
            f"The run has {total:,} tiles of {key[1]:,} numbers: {bytes_of(total, key[1]) / 1e9:.1f} GB, and at most "
            f"{_MOST_BYTES / 1e9:.0f} GB are taken. Open fewer slides to compare them."
        )
        return
    try:
        some = [shown.features for _, shown, _ in counted[:: -(-len(counted) // _SAMPLED)] if shown.features]
        rows = Rows(total, key[1], basis_of(np.concatenate([_sample(path) for path in some])) if total > _FEW else None)
        for number, shown, count in counted:
            assert shown.features is not None
            start = len(rows)
            with open_features(shown.features) as file:
                if len(file) != count:
                    raise StoreError(f"{shown.features}: changed while it was read")
                _add(rows, file)
            run.parts.append(_Part(number, start, count))
            run.read += 1
        run.rows = rows
    except (StoreError, OSError, MemoryError, ValueError) as error:
        run.refusal = f"The slides of the run cannot be compared: {error}"


def _add(rows: Rows, file: FeatureFile) -> None:
    for start in range(0, len(file), _BLOCK):
        block = file.features[start : start + _BLOCK].astype(np.float32)
        block[~file.good[start : start + _BLOCK]] = np.nan
        rows.add(block)


def _sample(path: Path) -> Floats:
    """Return some good rows, from all over a file."""
    with open_features(path) as file:
        starts = np.linspace(0, max(0, len(file) - _PIECE), 8).astype(int).tolist()
        return np.concatenate(
            [file.features[start : start + _PIECE][file.good[start : start + _PIECE]] for start in starts]
        ).astype(np.float32)


def _model(file: FeatureFile) -> tuple[str, int]:
    return str(file.attrs.get("bundle_digest", file.attrs.get("model", ""))), int(file.features.shape[1])
