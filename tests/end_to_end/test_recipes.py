"""The recipes run as printed, one after the other, where a user would stand."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
TEXT = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
STEPS = re.findall(r"<!-- run(?:: (\w+))? -->\n```(sh|python)\n(.*?)```", TEXT, re.DOTALL)
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
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", "-euc", code] if language == "sh" else [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
