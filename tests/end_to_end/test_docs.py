"""The examples of docs/api.md run as printed, one after the other, where a user would stand."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mtdp_runtime import load_bundle
from mtdp_runtime.bundle import write_manifest
from mtdp_runtime.commands.demo_slide import write_demo_slide
from support import write_tiny_bundle

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLES = re.findall(
    r"(?:<!-- needs: ([\w ]+) -->\n)?```python\n(.*?)```", (ROOT / "docs/api.md").read_text(encoding="utf-8"), re.DOTALL
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide of a few tiles and two bundles."""
    folder = tmp_path_factory.mktemp("user")
    write_demo_slide(folder / "slide.tiff", 1280, 960)
    for name in ("bundle-a", "bundle-b"):
        write_manifest(folder / name, replace(load_bundle(write_tiny_bundle(folder / name)).manifest, name=name))
    return folder


def test_every_kind_of_example_is_there() -> None:
    text = "\n".join(code for _, code in EXAMPLES)
    assert len(EXAMPLES) == 6
    assert all(word in text for word in ("sklearn", "torch.load", "spatialdata", "open_slide", "bundle-b"))


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_runs_as_printed(folder: Path, number: int) -> None:
    needs, code = EXAMPLES[number]
    if needs == "spatialdata" and importlib.util.find_spec("spatialdata") is None:
        pytest.skip("needs spatialdata (the extra `spatial`)")
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code] if not needs else [sys.executable, "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
