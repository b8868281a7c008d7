"""The recipes run as printed, one after the other, where a user would stand."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from mtdp_runtime import open_slide
from printed import give, steps_of
from support import pyramid, read_square, write_tiny_bundle

STEPS = steps_of("recipes.md")
MODULES = {"spatial": "spatialdata", "export": "onnx"}


@pytest.fixture(scope="module")
def folder(slides_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A piece of a slide, a rectangle that somebody drew on it, and a bundle that gives patch tokens."""
    folder = tmp_path_factory.mktemp("user")
    with open_slide(slides_dir / "CMU-1-Small-Region.svs") as slide:
        image = read_square(slide, 400, 400, 1344, 1.0)
    pyramid(image, folder / "slide.svs", mpp=0.5, lossy=True)
    ring = [[200, 200], [1200, 200], [1200, 1200], [200, 1200], [200, 200]]
    drawn = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": {}}
    (folder / "annotations.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [drawn]}))
    classed = [drawn | {"properties": {"classification": {"name": "Tumor"}}}]
    (folder / "classes.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": classed}))
    write_tiny_bundle(folder / "encoder", tokens=1.0)
    return folder


def test_every_recipe_is_there() -> None:
    assert len(STEPS) == 17


@pytest.mark.parametrize("number", range(len(STEPS)))
def test_a_step_runs_as_printed(folder: Path, number: int) -> None:
    needs, language, code = STEPS[number]
    if needs in MODULES and importlib.util.find_spec(MODULES[needs]) is None:
        pytest.skip(f"needs the extra `{needs}`")
    give(language, code, folder)
