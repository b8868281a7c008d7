"""The recipes run as printed, one after the other, where a user would stand."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from printed import give, steps_of

STEPS = steps_of("recipes.md")
MODULES = {"spatial": "spatialdata", "export": "onnx"}


@pytest.fixture(scope="module")
def folder(slides_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide, and a rectangle that somebody drew on it."""
    folder = tmp_path_factory.mktemp("user")
    shutil.copy(slides_dir / "CMU-1-Small-Region.svs", folder / "slide.svs")
    ring = [[200, 200], [1800, 200], [1800, 1800], [200, 1800], [200, 200]]
    drawn = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": {}}
    (folder / "annotations.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [drawn]}))
    classed = [drawn | {"properties": {"classification": {"name": "Tumor"}}}]
    (folder / "classes.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": classed}))
    return folder


def test_every_recipe_is_there() -> None:
    assert len(STEPS) == 14


@pytest.mark.parametrize("number", range(len(STEPS)))
def test_a_step_runs_as_printed(folder: Path, number: int) -> None:
    needs, language, code = STEPS[number]
    if needs in MODULES and importlib.util.find_spec(MODULES[needs]) is None:
        pytest.skip(f"needs the extra `{needs}`")
    give(language, code, folder)
