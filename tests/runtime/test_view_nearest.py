"""The rows most like one: the same as a plain search over all of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mtdp_runtime.view.nearest import Rows, basis_of

WITHIN = 1e-4  # of the cosine, as 16-bit integers keep it


def plain(rows: NDArray[np.float32], query: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = rows.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return wide @ query / np.linalg.norm(wide, axis=1) / np.linalg.norm(query.astype(np.float64))


def filled(rows: NDArray[np.float32], basis_rows: int = 200) -> Rows:
    basis = basis_of(rows[:basis_rows]) if basis_rows else None
    kept = Rows(len(rows), rows.shape[1], basis)
    for start in range(0, len(rows), 300):
        kept.add(rows[start : start + 300])
    return kept


def clustered(count: int, features_dim: int, seed: int) -> NDArray[np.float32]:
    """Rows as networks give them: few directions hold most of it, and many rows are alike."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(6, features_dim)) * np.arange(1, features_dim + 1) ** -0.7
    noise = rng.normal(size=(count, features_dim)) * 0.2 * np.arange(1, features_dim + 1) ** -0.7
    return (centres[rng.integers(0, 6, count)] + noise).astype(np.float32)


@settings(max_examples=25)
@example(seed=0, count=1500, features_dim=200, kind="noise", most=25, basis_rows=200)
@example(seed=0, count=1500, features_dim=200, kind="clustered", most=25, basis_rows=200)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.sampled_from([1, 2, 30, 700, 1500]),
    features_dim=st.sampled_from([3, 12, 200]),
    kind=st.sampled_from(["clustered", "noise", "copies"]),
    most=st.integers(1, 40),
    basis_rows=st.sampled_from([0, 200]),
)
def test_none_is_passed_over(seed: int, count: int, features_dim: int, kind: str, most: int, basis_rows: int) -> None:
    rng = np.random.default_rng(seed)
    rows = clustered(count, features_dim, seed)
    if kind == "noise":  # nothing can be ruled out by a part of it
        rows = rng.normal(size=(count, features_dim)).astype(np.float32)
    if kind == "copies":
        rows = rows[rng.integers(0, max(1, count // 50), count)]
    query = rows[rng.integers(count)] * np.float32(rng.uniform(0.1, 100))
    exact = plain(rows, query)
    found = filled(rows, basis_rows).nearest(query, most)
    assert len(found.rows) == len(set(found.rows.tolist())) == min(most, count)
    np.testing.assert_allclose(found.cosines, exact[found.rows], atol=WITHIN)
    np.testing.assert_allclose(found.cosines, np.sort(exact)[::-1][:most], atol=WITHIN)
    assert (np.diff(found.cosines) <= 0).all()


def test_rows_that_are_no_features_are_like_nothing() -> None:
    rows = clustered(600, 40, 1)
    rows[10], rows[20], rows[30, 3] = np.nan, 0, np.inf
    kept = filled(rows[[*range(10), *range(40, 600)]])
    assert len(kept) == 570
    kept = filled(rows)
    cosines = kept.cosines(rows[0])
    assert len(filled(rows, 0).nearest(rows[0], 600).rows) == 597
    assert np.flatnonzero(np.isnan(cosines)).tolist() == [10, 20, 30]
    found = kept.nearest(rows[0], 600)
    assert len(found.rows) == 597
    assert not {10, 20, 30} & set(found.rows.tolist())


def test_the_cosine_to_all_rows_is_exact() -> None:
    rows = clustered(1000, 200, 2)
    np.testing.assert_allclose(filled(rows).cosines(rows[5]), plain(rows, rows[5]), atol=WITHIN)


def test_most_rows_are_ruled_out_by_a_part_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = clustered(8000, 256, 3)
    kept = filled(rows, 1000)
    looked_at = []
    exact = Rows._exact
    monkeypatch.setattr(
        Rows, "_exact", lambda self, rows, unit, out: (looked_at.append(len(out)), exact(self, rows, unit, out))
    )
    kept.nearest(rows[7], 25)
    assert sum(looked_at) < 4000
