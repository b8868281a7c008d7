"""Slides x scales x outputs: whatever the slide and the scale, all files of a run say the same."""

from __future__ import annotations

import csv
import json
import warnings
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import openslide
import pytest
import tifffile
import torch

from mtdp_runtime import extract, open_slide
from mtdp_runtime.bundle.manifest import Head
from mtdp_runtime.commands.demo_slide import write_demo_slide
from mtdp_runtime.errors import UsageError
from mtdp_runtime.slide.source import grid_source
from support import TILE_PX, pyramid, read_square, stained, write_tiny_bundle

HEADS = (Head("blood", ("rbc", "wbc")), Head("lung", ("adeno", "normal", "squamous")))
CLASSES = ["prob_blood/rbc", "prob_blood/wbc", "prob_lung/adeno", "prob_lung/normal", "prob_lung/squamous"]
# A scale is given where the file says none (the JPEG 2000 slide) or a thumbnail's (DICOM).
REAL = {
    "CMU-1-Small-Region.svs": None,
    "tcga-cr-7395-01a-01-ts1.svs": 0.25,
    "multi_frame_jpeg_camelyon_challenge_image.dcm": 0.5,
}
MADE = ("jpeg pyramid", "lossless, one level", "demo", "ome-tiff")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny", HEADS)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("slides")
    write_demo_slide(folder / "demo.tiff", 1536, 1024)
    metadata = {"axes": "YXS", "PhysicalSizeX": 0.4, "PhysicalSizeY": 0.4}
    ome: dict[str, Any] = {"tile": (128, 128), "photometric": "rgb", "compression": "zlib", "metadata": metadata}
    tifffile.imwrite(folder / "image.ome.tif", stained(900, 1300), **ome)
    return {
        "jpeg pyramid": pyramid(stained(1536, 2048), folder / "jpeg.tiff", 0.25, levels=3, lossy=True),
        "lossless, one level": pyramid(stained(768, 1024), folder / "plain.tiff", 0.37),
        "demo": folder / "demo.tiff",
        "ome-tiff": folder / "image.ome.tif",
    }


@pytest.mark.parametrize("mpp", [0.5, 0.83, 2.0])
@pytest.mark.parametrize("name", [*MADE, *REAL])
def test_all_outputs_of_a_run_agree(
    bundle: Path, made: dict[str, Path], slides_dir: Path, tmp_path: Path, name: str, mpp: float
) -> None:
    slide, slide_mpp = made[name] if name in made else slides_dir / name, REAL.get(name)
    formats = ["pt", "npy", "csv", "geojson", "zarr"]
    options = {"model": bundle, "backend": "onnxruntime", "mpp": mpp, "heads": True, "formats": formats}
    options |= {"slide_mpp": slide_mpp}
    (outcome,) = extract(slide, tmp_path, **options)  # type: ignore[arg-type]
    assert outcome.status == "done", outcome.message
    with open_slide(slide, slide_mpp) as opened:
        info = opened.info
        assert info.mpp is not None
        level = grid_source(info, mpp / info.mpp, TILE_PX).level
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
        at_the_levels_scale = bool(np.isclose(mpp / info.mpp, info.levels[level].downsample, rtol=1e-5))
        patch_level = file["coords"].attrs.get("patch_level")
        assert patch_level == (level if at_the_levels_scale else None)
    if patch_level is not None:  # CLAM reads patch_size pixels of that level: they must be the tile
        place, size = tuple(coords[-1].tolist()), (TILE_PX, TILE_PX)
        with openslide.OpenSlide(slide) as clams, open_slide(slide, slide_mpp) as ours:
            patch = np.asarray(clams.read_region(place, int(patch_level), size).convert("RGB"))
            tile = read_square(ours, *place, TILE_PX, mpp / info.mpp)
            if clams.level_downsamples[int(patch_level)].is_integer():
                np.testing.assert_array_equal(tile, patch)
            else:  # OpenSlide blends neighbours then, as we do not
                assert np.abs(tile.astype(int) - patch).mean() < 3
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

    shapes = json.loads((tmp_path / f"model-outputs-geojson/{slide.stem}.geojson").read_text())["features"]
    tiles = [shape for shape in shapes if shape["properties"]["objectType"] == "tile"]  # the others are the tissue
    corners = np.array([tile["geometry"]["coordinates"][0] for tile in tiles])
    np.testing.assert_array_equal(corners.min(axis=1), coords)
    np.testing.assert_array_equal(corners.max(axis=1), coords + side0)
    measured = [[tile["properties"]["measurements"][name] for name in CLASSES] for tile in tiles]
    np.testing.assert_allclose(measured, probabilities, rtol=1e-6)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library about itself
        import spatialdata

        data = spatialdata.read_zarr(tmp_path / f"{slide.stem}.zarr")
    assert list(data.tables) == ["tiny_tiles"]
    np.testing.assert_array_equal(np.asarray(data.tables["tiny_tiles"].X), features)
    bounds = data.shapes["tiles"].geometry.bounds.to_numpy()
    np.testing.assert_array_equal(bounds, np.concatenate([coords, coords + side0], axis=1))
    assert (data.shapes["tiles"].tissue_id.to_numpy() >= 0).all()
    assert data.attrs["slide_properties"]["mpp"] == info.mpp


def test_halves_are_the_features_rounded_and_another_file(bundle: Path, made: dict[str, Path], tmp_path: Path) -> None:
    options: dict[str, Any] = {"model": bundle, "backend": "onnxruntime", "precision": "fp32", "report": True}
    extract(made["demo"], tmp_path / "whole", **options)
    (outcome,) = extract(made["demo"], tmp_path / "half", **options, features_dtype="float16", check=10)
    assert outcome.status == "done", outcome.message
    assert outcome.agreement is not None
    assert outcome.agreement.min_cosine > 0.999999
    with h5py.File(tmp_path / "whole/demo.h5") as whole, h5py.File(tmp_path / "half/demo.h5") as half:
        np.testing.assert_array_equal(half["features"][:], whole["features"][:].astype(np.float16))
        assert half["features"].dtype == np.float16
    (outcome,) = extract(made["demo"], tmp_path / "half", **options, features_dtype="float16")
    assert outcome.status == "skipped"
    (outcome,) = extract(made["demo"], tmp_path / "half", **options)
    assert outcome.status == "failed"
    assert "features_dtype is float16 there" in outcome.message
    with pytest.raises(UsageError, match="float8"):
        extract(made["demo"], tmp_path / "half", **options, features_dtype="float8")


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
