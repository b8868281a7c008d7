"""What `import mtdp_runtime` offers, and what it costs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
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
        "import mtdp_runtime.cohort, mtdp_runtime.cli, mtdp_runtime.bench\n"
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
        ({"formats": ["parquet"]}, "unknown"),
        ({"heads": True}, "has none"),
        ({"on_bad_tile": "white"}, "unknown"),
        ({"mpp": 0.0}, "not a scale"),
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
