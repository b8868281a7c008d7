"""What lies over a slide beside its features: the scores and annotations that the user named."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.errors import RuntimeFailure, UsageError
from mtdp_runtime.store.reader import open_features
from mtdp_runtime.view.layers import Lattice, Layer, lattice_over, side_of, spacing_of
from mtdp_runtime.view.scores import Scores, on_rows, read_scores
from mtdp_runtime.view.session import Session, Shown

_MOST_BYTES: Final = 200_000_000  # of a GeoJSON that a browser can still draw


@dataclass(frozen=True, slots=True)
class LaidScores:
    """A layer of scores, where its tiles are, and their values."""

    layer: Layer
    values: NDArray[np.float32]  # [N, C]
    coords: NDArray[np.int64] | None = None  # None: those of the features
    lattice: Lattice | None = None


@dataclass(slots=True)
class Laid:
    """The files of scores of a session, each read once."""

    session: Session
    _read: dict[Path, Scores] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def scores_of(self, shown: Shown) -> tuple[list[LaidScores], list[RuntimeFailure]]:
        """Return the layers of scores of a slide, and what is wrong with those that cannot be shown."""
        found: list[LaidScores] = []
        failures: list[RuntimeFailure] = []
        for number, path in enumerate(self.session.scores):
            try:
                scores = self._scores(path)
                if not scores.slides and path not in self.session.belonging((path,), shown):
                    continue
                mine = scores.of_slide(shown.name)
                if scores.slides and not len(mine.values):
                    continue
                found.append(_laid(f"scores:{number}", path, mine, shown))
            except RuntimeFailure as failure:
                failures.append(failure)
        return found, failures

    def _scores(self, path: Path) -> Scores:
        with self._lock:
            if path not in self._read:
                self._read[path] = read_scores(path)
            return self._read[path]


def _laid(identity: str, path: Path, scores: Scores, shown: Shown) -> LaidScores:
    layer = Layer(identity, path.name, "values", scores.columns)
    fitted = None
    if shown.features is not None:
        with open_features(shown.features) as file:
            fitted = on_rows(path, scores, file.coords, file.good)
    elif scores.places is None:
        raise UsageError(
            f"{path}: says nothing of where its scores are, and there are no features of {shown.name}",
            hint="Name the features: mtdp-view --features OUT. Or give a table with x,y,value.",
        )
    if fitted is not None:
        return LaidScores(replace(layer, note=fitted[1]), fitted[0])
    assert scores.places is not None
    side = scores.side or side_of(scores.places)
    step = max(spacing_of(scores.places), side / 8)
    note = f"{len(scores.places):,} places of their own, drawn {side:g} px wide"
    return LaidScores(
        replace(layer, tiles=identity, note=note), scores.values, scores.places, lattice_over(scores.places, step, side)
    )


def read_annotations(path: Path) -> bytes:
    """Return a GeoJSON document, as the file has it.

    Raises:
        UsageError: it cannot be read, or is none.
    """
    hint = "In QuPath: File > Export objects as GeoJSON."
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise UsageError(f"{path}: more than {_MOST_BYTES // 10**6} MB", hint="Export fewer objects.")
        data = path.read_bytes()
        document = json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: is not GeoJSON: {' '.join(str(error).split())[:200]}", hint=hint) from error
    if not isinstance(document, list) and not (isinstance(document, dict) and "type" in document):
        raise UsageError(f"{path}: is JSON, and not GeoJSON", hint=hint)
    return data
