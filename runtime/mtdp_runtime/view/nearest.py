"""Which rows are most like one: by cosine, over all rows, none passed over.

Rows are kept normalised, as 16-bit integers with a factor each: half the memory of float32, and the cosine stays within
1e-4 of that of float32. Of very many, most are ruled out by a part of them: with an
orthonormal basis B of few columns, of unit vectors x and q

    x . q  <=  Bx . Bq + |x - BBx| |q - BBq|    (Cauchy-Schwarz)

so whatever cannot reach the k-th best by this bound is not looked at again. The basis decides the speed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.machine import usable_cores

Floats = NDArray[np.float32]

_BASIS: Final = 64  # columns
_BLOCK_ROWS: Final = 256  # as float32 they stay in a core's own cache
_STEPS: Final = 32767  # of a 16-bit integer
_FIRST: Final = 512  # rows that look best by the basis: they tell how good the k-th is
_SLACK: Final = 2e-4  # of the bound, for the rounding to 16 bits


def bytes_of(rows: int, features_dim: int) -> int:
    """Return the memory that so many rows take.

    >>> bytes_of(1_000_000, 1024) / 1e9
    2.312
    """
    return rows * (2 * features_dim + 4 * min(_BASIS, features_dim) + 8)


def basis_of(sample: Floats) -> Floats:
    """Return float32[D, P], orthonormal columns that hold most of rows like float32[n, D].

    By subspace iteration (Halko, Martinsson, Tropp, arXiv 0909.4061, algorithm 4.4).
    """
    unit = _unit(sample)[0]
    start = np.random.default_rng(0).standard_normal((sample.shape[1], min(_BASIS, sample.shape[1])))
    basis, _ = np.linalg.qr(start)
    for _ in range(3):
        basis, _ = np.linalg.qr((unit.T @ (unit @ basis.astype(np.float32))).astype(np.float64))
    return np.ascontiguousarray(basis, np.float32)


@dataclass(frozen=True, slots=True)
class Found:
    """The rows most like one, the best first."""

    rows: NDArray[np.int64]
    cosines: Floats


class Rows:
    """Rows to be searched: room for `count` of them, float32[D], filled in order by `add`; few need no basis."""

    def __init__(self, count: int, features_dim: int, basis: Floats | None = None) -> None:
        self._basis = np.zeros((features_dim, 0), np.float32) if basis is None else basis
        self._whole = np.empty((count, features_dim), np.int16)
        self._factor = np.empty(count, np.float32)
        self._part = np.empty((count, self._basis.shape[1]), np.float32)
        self._rest = np.empty(count, np.float32)  # length of what the part leaves out
        self._used = 0

    def __len__(self) -> int:
        return self._used

    def add(self, rows: Floats) -> None:
        """Add float32[n, D]; a row that is not finite, or zero, is like nothing."""
        unit, good = _unit(rows)
        place = slice(self._used, self._used + len(rows))
        largest = np.maximum(np.abs(unit).max(axis=1), 1e-30)
        self._whole[place] = np.rint(unit * (_STEPS / largest)[:, None])
        self._factor[place] = np.where(good, largest / _STEPS, np.nan)
        part = self._part[place] = unit @ self._basis
        self._rest[place] = np.sqrt(np.maximum(0, 1 - np.square(part).sum(axis=1))) * good
        self._used += len(rows)

    def cosines(self, query: Floats) -> Floats:
        """Return float32[n], the cosine of each row to float32[D]; NaN where there is none."""
        unit = _unit(query[None])[0][0]
        out = np.empty(self._used, np.float32)
        _in_threads(self._used, lambda place: self._exact(place, unit, out[place]))
        return out

    def nearest(self, query: Floats, most: int) -> Found:
        """Return the rows of the largest cosines to float32[D], at most so many."""
        if not self._basis.size:
            cosines = self.cosines(query)
            best = _best(np.nan_to_num(cosines, nan=-np.inf), most)
            best = best[~np.isnan(cosines[best])]
            return Found(best, cosines[best])
        unit = _unit(query[None])[0][0]
        part = unit @ self._basis
        rest = float(np.sqrt(max(0.0, 1 - float(part @ part))))
        bound = np.empty(self._used, np.float32)

        def rule(place: slice) -> None:
            np.dot(self._part[place], part, out=bound[place])
            bound[place] += self._rest[place] * np.float32(rest)

        _in_threads(self._used, rule, block=1 << 14)
        first = _best(bound, max(_FIRST, 4 * most))
        known = self._of(first, unit)
        enough = np.sort(known[~np.isnan(known)])[-most:]
        least = enough[0] - _SLACK if len(enough) == most else -np.inf
        maybe = np.flatnonzero(bound >= least)
        cosines = self._of(maybe, unit) if len(maybe) < self._used // 4 else self.cosines(query)[maybe]
        best = _best(np.nan_to_num(cosines, nan=-np.inf), most)
        best = best[~np.isnan(cosines[best])]
        return Found(maybe[best], cosines[best])

    def _of(self, rows: NDArray[np.int64], unit: Floats) -> Floats:
        out = np.empty(len(rows), np.float32)
        _in_threads(len(rows), lambda place: self._exact(rows[place], unit, out[place]))
        return out

    def _exact(self, rows: slice | NDArray[np.int64], unit: Floats, out: Floats) -> None:
        np.dot(self._whole[rows].astype(np.float32), unit, out=out)
        out *= self._factor[rows]


def _unit(rows: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    """Return float32[n, D] of length 1, and which rows have a direction; the others are zeros."""
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1)
    good = np.isfinite(lengths) & (lengths > 0)
    unit = np.divide(rows, lengths[:, None], out=np.zeros(rows.shape), where=good[:, None])
    return unit.astype(np.float32), good


def _best(values: Floats, most: int) -> NDArray[np.int64]:
    """Return where the largest values are, the largest first; of equal ones the first."""
    if len(values) > most:
        some = np.argpartition(values, -most)[-most:]
        some = np.flatnonzero(values >= values[some].min()) if most < 256 else some
    else:
        some = np.arange(len(values))
    return some[np.lexsort((some, -values[some]))][:most].astype(np.int64)


def _blocks(count: int, block: int) -> Iterator[slice]:
    for start in range(0, count, block):
        yield slice(start, min(start + block, count))


def _in_threads(count: int, work: Callable[[slice], None], block: int = _BLOCK_ROWS) -> None:
    """Do the work for each block of rows, on the cores that there are."""
    cores = usable_cores()
    if count <= block or cores == 1:
        for place in _blocks(count, block):
            work(place)
        return

    def share(places: list[slice]) -> None:
        for place in places:
            work(place)

    places = list(_blocks(count, block))
    each = -(-len(places) // cores)
    with ThreadPoolExecutor(cores) as pool:
        list(pool.map(share, [places[i : i + each] for i in range(0, len(places), each)]))
