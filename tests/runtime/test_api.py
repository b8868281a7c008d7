"""What `import mtdp_runtime` offers, and what it costs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import mtdp_runtime
from mtdp_runtime.errors import UsageError


def test_each_name_is_there_and_sorted() -> None:
    assert list(mtdp_runtime.__all__) == sorted(mtdp_runtime.__all__)
    for name in mtdp_runtime.__all__:
        assert callable(getattr(mtdp_runtime, name)), name
        assert name in dir(mtdp_runtime)
    with pytest.raises(AttributeError, match="no attribute 'features'"):
        _ = mtdp_runtime.features


def test_the_import_loads_nothing_and_the_names_do_not_depend_on_what_was_imported_before() -> None:
    code = (
        "import sys, mtdp_runtime\n"
        "heavy = {'torch', 'onnxruntime', 'openvino', 'numpy', 'cv2', 'h5py', 'openslide'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "import mtdp_runtime.cohort.local, mtdp_runtime.commands.extract, mtdp_runtime.commands.bench\n"
        "from mtdp_runtime import extract, load_bundle, open_slide\n"
        "assert all(map(callable, (extract, load_bundle, open_slide)))\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_slide_is_read_at_a_scale(make_slide: Callable[..., Path]) -> None:
    with mtdp_runtime.open_slide(make_slide(), slide_mpp=0.25) as slide:
        assert slide.info.mpp == 0.25
        tile = np.zeros((64, 64, 3), np.uint8)
        slide.read_into(tile, 512, 256, 2.0)
        assert tile.min() > 0


def test_a_slide_that_fails_is_an_outcome_and_the_others_are_done(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "broken.svs").write_bytes(b"no slide")
    outcomes = mtdp_runtime.extract(
        [tmp_path / "broken.svs", make_slide()], tmp_path / "o", model=tiny_bundle, backend="onnxruntime"
    )
    assert [outcome.status for outcome in outcomes] == ["failed", "done"]
    assert "broken.svs" in outcomes[0].message
    assert outcomes[0].hint


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"formats": ["xlsx"]}, "unknown"),
        ({"heads": True}, "has none"),
        ({"on_bad_tile": "white"}, "unknown"),
        ({"mpp": 0.0}, "not a scale"),
        ({"stride_px": 0}, "must be at least 1"),
        ({"min_tissue": 1.5}, "must be from 0 to 1"),
    ],
)
def test_a_wrong_argument_is_said_before_work(
    tiny_bundle: Path,
    make_slide: Callable[..., Path],
    tmp_path: Path,
    arguments: dict[str, object],
    message: str,
) -> None:
    with pytest.raises(UsageError, match=message):
        mtdp_runtime.extract(make_slide(), tmp_path / "o", model=tiny_bundle, **arguments)  # type: ignore[arg-type]
    assert not list(tmp_path.glob("o/*.h5"))


def polygon(path: Path, right: int) -> Path:
    corners = [[0, 0], [right, 0], [right, 64], [0, 64], [0, 0]]
    path.write_text(json.dumps({"type": "Polygon", "coordinates": [corners]}))
    return path


def test_a_mask_is_taken_and_another_slides_is_refused_before_work(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    slide, out = make_slide(), tmp_path / "o"
    with pytest.raises(UsageError, match="outside of"):
        mtdp_runtime.extract(slide, out, model=tiny_bundle, mask=polygon(tmp_path / "m.geojson", 9000))
    (tmp_path / "slides.csv").write_text("slide,mask\nslide.tiff,m.geojson\n")
    with pytest.raises(UsageError, match="outside of"):
        mtdp_runtime.extract(tmp_path / "slides.csv", out, model=tiny_bundle)
    assert not out.exists()
    (outcome,) = mtdp_runtime.extract(slide, out, model=tiny_bundle, mask=polygon(tmp_path / "m.geojson", 128))
    assert outcome.tiles == 2


def test_progress_goes_on_from_where_an_earlier_run_stopped(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    """And a slide that was staged is named by its own path."""
    slide, out, told = make_slide(), tmp_path / "o", []

    def stops(path: Path, done: int, tiles: int) -> None:
        told.append((path, done, tiles))
        if done >= 64:
            raise KeyboardInterrupt

    arguments = {"model": tiny_bundle, "backend": "onnxruntime", "batch": 16, "stage": tmp_path / "stage"}
    with pytest.raises(KeyboardInterrupt):
        mtdp_runtime.extract(slide, out, on_progress=stops, **arguments)  # type: ignore[arg-type]
    assert told[0] == (slide, 0, 144)
    told.clear()
    mtdp_runtime.extract(
        slide, out, on_progress=lambda path, done, tiles: told.append((path, done, tiles)), **arguments
    )
    assert told[0][1] >= 64
    assert told[-1] == (slide, 144, 144)
    assert list((tmp_path / "stage").iterdir()) == []


def test_it_may_be_called_from_a_thread(tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        arguments = {"model": tiny_bundle, "stage": tmp_path / "stage"}
        (outcome,) = pool.submit(mtdp_runtime.extract, make_slide(), tmp_path / "o", **arguments).result()
    assert outcome.status == "done"


def test_a_column_that_is_not_read_is_a_warning(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    make_slide()
    (tmp_path / "slides.csv").write_text("slide,patient\nslide.tiff,7\n")
    with pytest.warns(UserWarning, match="columns that are not read: patient"):
        mtdp_runtime.extract(tmp_path / "slides.csv", tmp_path / "o", model=tiny_bundle)
