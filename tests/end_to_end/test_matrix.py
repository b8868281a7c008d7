"""Slides x scales x outputs: whatever the slide and the scale, all files of a run say the same."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from mtdp_runtime import extract, open_slide
from mtdp_runtime.bundle import Head
from mtdp_runtime.demo import write_demo_slide
from support import TILE_PX, pyramid, stained, write_tiny_bundle

HEADS = (Head("blood", ("rbc", "wbc")), Head("lung", ("adeno", "normal", "squamous")))
CLASSES = ["prob_blood/rbc", "prob_blood/wbc", "prob_lung/adeno", "prob_lung/normal", "prob_lung/squamous"]
REAL = ("CMU-1-Small-Region.svs",)
MADE = ("jpeg pyramid", "lossless, one level", "demo")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny", HEADS)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("slides")
    write_demo_slide(folder / "demo.tiff", 1536, 1024)
    return {
        "jpeg pyramid": pyramid(stained(1536, 2048), folder / "jpeg.tiff", 0.25, levels=3, lossy=True),
        "lossless, one level": pyramid(stained(768, 1024), folder / "plain.tiff", 0.37),
        "demo": folder / "demo.tiff",
    }


@pytest.mark.parametrize("mpp", [0.5, 0.83, 2.0])
@pytest.mark.parametrize("name", [*MADE, *REAL])
def test_all_outputs_of_a_run_agree(
    bundle: Path, made: dict[str, Path], slides_dir: Path, tmp_path: Path, name: str, mpp: float
) -> None:
    slide = made[name] if name in made else slides_dir / name
    formats = ["pt", "npy", "csv", "geojson"]
    options = {"model": bundle, "backend": "onnxruntime", "mpp": mpp, "heads": True, "formats": formats}
    (outcome,) = extract(slide, tmp_path, **options)  # type: ignore[arg-type]
    assert outcome.status == "done", outcome.message
    with open_slide(slide) as opened:
        info = opened.info
    assert info.mpp is not None
    side0 = round(TILE_PX * mpp / info.mpp)
    with h5py.File(tmp_path / f"{slide.stem}.h5") as file:
        features, coords, status = file["features"][:], file["coords"][:], file["status"][:]
        heads = [file[f"probabilities_{head.name}"] for head in HEADS]
        for head, values in zip(HEADS, heads, strict=True):
            assert json.loads(values.attrs["class_names"]) == list(head.class_names)
            assert values.dtype == np.float32
        probabilities = np.concatenate([values[:] for values in heads], axis=1)
        assert file["coords"].attrs["patch_size_level0"] == side0
        assert file.attrs["scale"] == mpp / info.mpp
    assert len(features) == outcome.tiles > 0
    assert (status == 0).all()
    assert np.isfinite(features).all()
    assert ((coords >= 0) & (coords + side0 <= (info.width + 1, info.height + 1))).all()
    np.testing.assert_allclose(probabilities.sum(axis=1), len(HEADS), rtol=1e-5)

    bag = torch.load(tmp_path / f"pt_files/{slide.stem}.pt", weights_only=True)
    np.testing.assert_array_equal(bag.numpy(), features)
    np.testing.assert_array_equal(np.load(tmp_path / f"npy/{slide.stem}.npy"), features)
    np.testing.assert_array_equal(np.load(tmp_path / f"npy/{slide.stem}.coords.npy"), coords)

    with (tmp_path / f"model-outputs-csv/{slide.stem}.csv").open(newline="") as stream:
        columns, *lines = csv.reader(stream)
    assert columns == ["minx", "miny", "width", "height", *CLASSES]
    table = np.array(lines, np.float64)
    np.testing.assert_array_equal(table[:, :2], coords)
    np.testing.assert_array_equal(table[:, 2:4], side0)
    np.testing.assert_allclose(table[:, 4:], probabilities, rtol=1e-6)

    tiles = json.loads((tmp_path / f"model-outputs-geojson/{slide.stem}.geojson").read_text())["features"]
    corners = np.array([tile["geometry"]["coordinates"][0] for tile in tiles])
    np.testing.assert_array_equal(corners.min(axis=1), coords)
    np.testing.assert_array_equal(corners.max(axis=1), coords + side0)
    measured = [[tile["properties"]["measurements"][name] for name in CLASSES] for tile in tiles]
    np.testing.assert_allclose(measured, probabilities, rtol=1e-6)


def test_an_output_that_was_lost_or_comes_later_is_made_without_computing(
    bundle: Path, made: dict[str, Path], tmp_path: Path
) -> None:
    slide, options = made["demo"], {"model": bundle, "backend": "onnxruntime", "heads": True}
    extract(slide, tmp_path, formats=["pt"], **options)  # type: ignore[arg-type]
    bag, h5 = tmp_path / "pt_files/demo.pt", tmp_path / "demo.h5"
    before, written = bag.read_bytes(), h5.stat().st_mtime_ns
    bag.unlink()
    (outcome,) = extract(slide, tmp_path, formats=["pt", "csv"], **options)  # type: ignore[arg-type]
    assert outcome.status == "skipped"
    assert bag.read_bytes() == before
    assert (tmp_path / "model-outputs-csv/demo.csv").is_file()
    assert h5.stat().st_mtime_ns == written
