"""Where the tiles of a layer are, and the palettes that their numbers are shown in."""

from __future__ import annotations

import doctest

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtdp_runtime.view import deep_zoom, layers, nearest
from mtdp_runtime.view.layers import lattice_over, palettes, spacing_of


@pytest.mark.parametrize("module", [deep_zoom, layers, nearest])
def test_examples_of_docstrings_hold(module: object) -> None:
    assert doctest.testmod(module, extraglobs={"np": np}).failed == 0  # type: ignore[arg-type]


@given(
    step=st.floats(20, 3000),
    columns=st.integers(2, 60),
    rows=st.integers(2, 60),
    left=st.integers(0, 10_000),
    seed=st.integers(0, 999),
)
def test_each_tile_of_a_table_has_a_cell_of_its_own(step: float, columns: int, rows: int, left: int, seed: int) -> None:
    """Places are rounded multiples of a step that nobody states; some tiles are missing, none of the first ones."""
    xs, ys = (left + np.rint(np.arange(count) * step).astype(np.int64) for count in (columns, rows))
    coords = np.stack([np.tile(xs, rows), np.repeat(ys, columns)], axis=1)
    kept = np.random.default_rng(seed).random(len(coords)) < 0.8
    kept[[0, 1, columns]] = True
    coords = coords[kept]
    spacing = spacing_of(coords)
    assert spacing == pytest.approx(step, abs=0.6)
    lattice = lattice_over(coords, spacing, spacing)
    cells = np.rint((coords - (lattice.x0, lattice.y0)) / lattice.step).astype(int)
    assert (cells >= 0).all()
    assert (cells < (lattice.columns, lattice.rows)).all()
    assert len({tuple(cell) for cell in cells.tolist()}) == len(coords)


def test_a_lattice_never_has_more_cells_than_a_browser_holds() -> None:
    coords = np.array([[0, 0], [3, 0], [400_000, 400_000]])
    lattice = lattice_over(coords, spacing_of(coords), 3.0)
    assert lattice.columns * lattice.rows <= 16_000_000


@pytest.mark.parametrize("name", ["viridis", "cividis", "inferno", "magma"])
def test_in_a_palette_lightness_tells_the_value_evenly(name: str) -> None:
    table = np.array(palettes()[name], np.float32)
    assert table.shape == (256, 3)
    lightness = cv2.cvtColor(table[None] / 255, cv2.COLOR_RGB2LAB)[0, :, 0]
    assert (np.diff(lightness) > -0.2).all(), "brighter for more, for whoever sees no colours, too"
    ideal = np.linspace(lightness[0], lightness[-1], 256)
    assert np.abs(lightness - ideal).max() < 6
