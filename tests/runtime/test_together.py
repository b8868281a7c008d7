"""Several models in one pass: each tile is read once, and each file is what the model alone would have written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import warm
from mtdp_runtime import extract, load_bundle
from mtdp_runtime.bundle import Bundle, write_manifest
from mtdp_runtime.errors import BackendError, UsageError
from mtdp_runtime.extraction.models import load_models
from mtdp_runtime.pipeline.fan_out import JoinedEngines, JoinedStores
from mtdp_runtime.store.layout import Layout
from mtdp_runtime.store.writer import FeatureStore
from support import slide_lines, write_tiny_bundle

SAME = {"backend": "onnxruntime", "batch": 8, "threads": 2}


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make a tiny bundle of a name: `named("a", tile_px=64)`."""

    def make(name: str, **changes: object) -> Path:
        folder = write_tiny_bundle(tmp_path_factory.mktemp("bundles") / "bundle")
        write_manifest(folder, replace(load_bundle(folder).manifest, name=name, **changes))  # type: ignore[arg-type]
        return folder

    return make


def test_two_models_read_each_tile_once_and_write_what_each_alone_writes(
    named: Callable[..., Path], make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    slide, a, b = make_slide(levels=2, lossy=True), named("a"), named("b")
    (outcome,) = extract(slide, tmp_path / "both", model=[a, b], **SAME)
    assert outcome.status == "done", outcome.message
    assert outcome.outputs == (tmp_path / "both/a/slide.h5", tmp_path / "both/b/slide.h5")
    assert outcome.times is not None
    assert outcome.times.read.items == outcome.tiles == 144
    for name, bundle in (("a", a), ("b", b)):
        extract(slide, tmp_path / name, model=bundle, **SAME)
        with h5py.File(tmp_path / "both" / name / "slide.h5") as one, h5py.File(tmp_path / name / "slide.h5") as other:
            assert one.attrs["model"] == name
            assert one.attrs["fingerprint"] == other.attrs["fingerprint"]
            for dataset in ("features", "coords", "status"):
                np.testing.assert_array_equal(one[dataset][:], other[dataset][:])
    (line,) = slide_lines(tmp_path / "both")
    assert line["outputs"] == [str(path) for path in outcome.outputs]


def test_a_model_that_is_added_later_leaves_the_files_of_the_others_alone(
    named: Callable[..., Path], make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    slide, a, b, c = make_slide(), named("a"), named("b"), named("c")
    extract(slide, tmp_path, model=[a, b], **SAME)
    before = (tmp_path / "a/slide.h5").stat().st_mtime_ns
    (outcome,) = extract(slide, tmp_path, model=[a, b, c], **SAME)
    assert (outcome.status, (tmp_path / "c/slide.h5").is_file()) == ("done", True)
    assert (tmp_path / "a/slide.h5").stat().st_mtime_ns == before
    (again,) = extract(slide, tmp_path, model=[a, b, c], **SAME)
    assert again.status == "skipped"


@pytest.mark.parametrize(
    ("names", "changes", "message"),
    [
        (("a", "b"), {"tile_px": 32}, "must see the same tiles: a 64 px at 0.5 µm/px; b 32 px at 0.5 µm/px"),
        (("a", "b"), {"mpp": 1.0}, "must see the same tiles"),
        (("a", "a"), {}, "two models are called 'a'"),
        (("a", "../b"), {}, "cannot be a folder's name"),
    ],
)
def test_models_that_cannot_share_a_reading_are_refused_before_work(
    named: Callable[..., Path],
    make_slide: Callable[..., Path],
    tmp_path: Path,
    names: tuple[str, str],
    changes: dict[str, object],
    message: str,
) -> None:
    with pytest.raises(UsageError, match=message):
        extract(make_slide(), tmp_path / "o", model=[named(names[0]), named(names[1], **changes)])
    assert not (tmp_path / "o").exists()


def _layout(rows: int) -> Layout:
    coords = np.arange(2 * rows, dtype=np.int64).reshape(rows, 2)
    return Layout(coords, np.ones(rows, np.float32), {"features": 3}, {}, {"model": "m"}, {}, "r")


@settings(max_examples=25)
@given(held=st.lists(st.integers(0, 12), min_size=2, max_size=3), batch=st.integers(1, 5))
def test_files_that_were_left_at_different_rows_end_equal(
    tmp_path_factory: pytest.TempPathFactory, held: list[int], batch: int
) -> None:
    folder, rows = tmp_path_factory.mktemp("joined"), 12
    values = np.random.default_rng(0).random((rows, 3), np.float32)
    good = np.zeros(rows, np.uint8)
    for number, count in enumerate(held):
        with FeatureStore(folder / f"{number}.h5", _layout(rows)) as store:
            if count:
                store.append({"features": values[:count]}, good[:count])
    stores = [FeatureStore(folder / f"{number}.h5", _layout(rows)) for number in range(len(held))]
    joined = JoinedStores(stores)
    assert joined.rows_done == min(held)
    while joined.rows_done < rows:
        part = slice(joined.rows_done, min(rows, joined.rows_done + batch))
        outputs: Mapping[str, NDArray[np.float32]] = {
            f"{number}/features": values[part] + number for number in range(len(held))
        }
        joined.append(outputs, good[part])
    for number, (store, count) in enumerate(zip(stores, held, strict=True)):
        store.finish({})
        store.close()
        expected = values + number
        expected[:count] = values[:count]
        with h5py.File(folder / f"{number}.h5") as file:
            np.testing.assert_array_equal(file["features"][:], expected)


def test_the_command_takes_several_models(
    named: Callable[..., Path], make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    code = "from mtdp_runtime.commands.extract import main; main()"
    options = ["--model", named("a"), "--model", named("b"), "--format", "pt", "--out", tmp_path / "o"]
    result = warm.run(code, make_slide(), *options)
    assert result.returncode == 0, result.stderr
    for name in "ab":
        assert f"model: {name} (" in result.stdout
        assert (tmp_path / "o" / name / "slide.h5").is_file()
        assert (tmp_path / "o" / name / "pt_files/slide.pt").is_file()
        report = tmp_path / "o" / name / "report/slide.html"
        assert 'href="../../report/index.html"' in report.read_text()
        assert (report.parent / "../../report/index.html").is_file()
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["a", "b", "report", "run.jsonl"]


class Sized:
    """An engine that has room for so many tiles, and says when it is closed."""

    depth = 2

    def __init__(self, batch: int, closed: list[int]) -> None:
        self.name, self.batch, self.closed = f"room for {batch}", batch, closed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.closed.append(self.batch)


def test_where_one_engine_has_less_room_all_take_its_batches(named: Callable[..., Path]) -> None:
    bundles, closed = [load_bundle(named("a")), load_bundle(named("b"))], []
    room = {"a": 64, "b": 16}

    def load(bundle: Bundle, batch: int | None) -> Any:
        return Sized(min(batch or 64, room[bundle.manifest.name]), closed)

    with load_models(bundles, load, None) as models:
        assert [model.backend.batch for model in models] == [16, 16]
        assert sorted(closed) == [16, 64], "those of the first try gave their memory back"
        JoinedEngines([model.backend for model in models])
    assert len(closed) == 4


def test_engines_without_a_common_batch_are_refused(named: Callable[..., Path]) -> None:
    bundles = [load_bundle(named("a")), load_bundle(named("b"))]
    fixed = {"a": 64, "b": 16}

    def load(bundle: Bundle, batch: int | None) -> Any:
        return Sized(fixed[bundle.manifest.name], [])

    refused = pytest.raises(BackendError, match=r"no common batch \(room for 64: 64, room for 16: 16\)")
    with refused, load_models(bundles, load, None):
        pass
