"""What a run says of itself: the check against the reference, and the estimate before it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import pytest

from mtdp_runtime.backends.onnxruntime import OnnxRuntime
from mtdp_runtime.backends.speed import engine_speed
from mtdp_runtime.bundle import load_bundle, write_manifest
from mtdp_runtime.bundle.manifest import Autocast, Head
from mtdp_runtime.cohort.estimate import output_bytes
from mtdp_runtime.extraction.check import Check, check_rows
from mtdp_runtime.settings import ExtractSettings
from mtdp_runtime.slide.open import open_slide
from mtdp_runtime.slide.wrappers import WatchedSlide
from support import TILE_PX, extract, slide_lines, write_tiny_bundle


def test_a_check_is_printed_stored_and_would_fail(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    slide, out = make_slide(lossy=True), tmp_path / "o"
    result = extract(slide, "--model", tiny_bundle, "--out", out, "--precision", "fp32", "--check", 20, "--json")
    assert result.returncode == 0, result.stderr
    line = json.loads(result.stdout)["check"]
    assert line["tiles"] == 20
    assert line["min_cosine"] > 0.999999
    assert line["reference"].startswith("openslide ")
    assert "fp32" in line["reference"]
    features = out / "slide.h5"
    with h5py.File(features, "r+") as file:
        assert json.loads(file.attrs["check"]) == line
        rows = file["features"][:]
        file["features"][:] = np.roll(rows, 1, axis=1)
    with OnnxRuntime.load(load_bundle(tiny_bundle), "fp32", 16, 1) as engine, open_slide(slide) as opened:
        found = check_rows(features, opened.info, 1.0, TILE_PX, Check(20, engine))
    assert found is not None
    assert found.min_cosine < 0.99, "features of another model are found out"


def test_a_check_reads_what_the_run_read(tiny_bundle: Path, slides_dir: Path, tmp_path: Path) -> None:
    """A file of a DICOM folder, which is none itself; the local copy of a slide on slow storage."""
    case, slow = tmp_path / "case-7", tmp_path / "slow"
    case.mkdir()
    shutil.copyfile(slides_dir / "multi_frame_jpeg_camelyon_challenge_image.dcm", case / "a.dcm")
    result = extract(
        case / "a.dcm", "--slide-mpp", 0.5, "--model", tiny_bundle, "--out", tmp_path, "--precision", "fp32"
    )
    assert result.returncode == 0, result.stderr
    with OnnxRuntime.load(load_bundle(tiny_bundle), "fp32", 16, 1) as engine:
        for path in (case, slow):
            with WatchedSlide(open_slide(case, 0.5), lambda: None, path) as slide:
                assert slide.info.path == path
                found = check_rows(tmp_path / "a.h5", slide.info, 1.0, TILE_PX, Check(5, engine))
            assert found is not None
            assert found.min_cosine > 0.999999


def test_no_tile_no_check(tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path) -> None:
    arguments = ("--model", tiny_bundle, "--out", tmp_path / "o", "--mpp", 20, "--check", 3, "--json")
    line = json.loads(extract(make_slide(), *arguments).stdout)
    assert line["status"] == "no-tissue"
    assert "check" not in line


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_dry_run_says_tiles_bytes_seconds_and_where_from(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path, dtype: Literal["float32", "float16"]
) -> None:
    options = ("--model", tiny_bundle, "--out", tmp_path / "o", "--features-dtype", dtype)
    result = extract(make_slide(), *options, "--dry-run", "--json")
    assert result.returncode == 0, result.stderr
    line = json.loads(result.stdout)
    assert line["tiles"] == 144
    assert line["estimated_s"] > 0
    assert "measured now" in line["estimate_from"]
    assert "over 12 tiles of this slide" in line["estimate_from"]
    assert not (tmp_path / "o").exists()
    extract(make_slide(), *options)
    with h5py.File(tmp_path / "o" / "slide.h5") as file:
        assert file["features"].dtype == dtype
        names = ("features", "coords", "status", "tissue_fraction")
        stored = sum(file[name].size * file[name].dtype.itemsize for name in names)
    settings = ExtractSettings(0.5, TILE_PX, features_dtype=dtype)
    assert line["bytes"] == output_bytes(144, load_bundle(tiny_bundle).manifest, settings) == stored


def test_a_dry_run_counts_heads_and_every_model(make_slide: Callable[..., Path], tmp_path: Path) -> None:
    heads = (Head("blood", ("rbc", "wbc")), Head("lung", ("a", "b", "c")))
    models = [write_tiny_bundle(tmp_path / name, heads) for name in ("a", "b")]
    write_manifest(models[1], replace(load_bundle(models[1]).manifest, name="other"))
    slide = make_slide()

    def planned(*options: object) -> dict[str, Any]:
        result = extract(slide, *options, "--out", tmp_path / "o", "--dry-run", "--json")
        assert result.returncode == 0, result.stderr
        line: dict[str, Any] = json.loads(result.stdout)
        return line

    one, headed = planned("--model", models[0]), planned("--model", models[0], "--heads")
    assert headed["bytes"] - one["bytes"] == 144 * 4 * (2 + 3)
    both = planned("--model", models[0], "--model", models[1])
    assert both["bytes"] == 2 * one["bytes"]
    assert both["estimate_from"].count("tiles/s of") == 2


def test_the_speed_is_of_this_engine(tiny_bundle: Path) -> None:
    with OnnxRuntime.load(load_bundle(tiny_bundle), "fp32", 4, 1) as engine:
        speed = engine_speed(engine, TILE_PX)
    assert speed.tiles >= 4
    assert speed.tiles_per_s > 0
    assert speed.engine == f"{engine.name}, fp32"


def test_a_finished_file_is_checked_too_and_what_is_too_far_off_is_a_warning(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    slide, out = make_slide(lossy=True), tmp_path / "o"
    options = (slide, "--model", tiny_bundle, "--out", out, "--precision", "fp32", "--backend", "onnxruntime")
    assert "checked" not in extract(*options).stdout
    result = extract(*options, "--check", 10)
    assert "already done" in result.stdout
    assert "  checked 10 tiles with openslide " in result.stdout
    assert result.stderr == ""
    with h5py.File(out / "slide.h5", "r+") as file:
        file["features"][:] = np.roll(file["features"][:], 1, axis=1)
    result = extract(*options, "--check", 10)
    assert result.returncode == 0
    assert result.stderr.startswith(f"warning: {slide}: the check of tiny found a cosine of 0.")
    assert result.stderr.endswith("fp32 has at least 0.999999\n")
    lines = slide_lines(out)
    assert ["check" in line for line in lines] == [False, True, True]
    assert ["warning" in line for line in lines] == [False, False, True]


def test_the_check_asks_no_more_than_the_bundle_does(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    """Where autocast was measured to be far from fp32, its bundle's features may be as far (docs/bundle.md)."""
    model, out = tmp_path / "model", tmp_path / "o"
    shutil.copytree(tiny_bundle, model)
    manifest = load_bundle(model).manifest
    write_manifest(model, replace(manifest, autocast=(Autocast("fp32", 0.9997, 0.9998, 1.0),)))
    options = (make_slide(lossy=True), "--model", model, "--out", out, "--precision", "fp32")
    assert extract(*options).returncode == 0
    with h5py.File(out / "slide.h5", "r+") as file:
        file["features"][:] = np.roll(file["features"][:], 1, axis=1)
    assert extract(*options, "--check", 10).stderr.endswith("fp32 has at least 0.999625\n")


def test_where_a_decoder_could_reduce_the_features_are_the_reference(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    slide, out = make_slide(lossy=True), tmp_path / "o"
    result = extract(slide, "--model", tiny_bundle, "--out", out, "--mpp", 2.0, "--precision", "fp32", "--check", 10)
    assert (result.returncode, result.stderr) == (0, "")
    with h5py.File(out / "slide.h5") as file:
        assert file.attrs["resampling"] == "level 0, exact area average, 2"
        assert json.loads(file.attrs["check"])["min_cosine"] >= 0.999999


def test_several_models_are_checked_each_by_its_own_reference(make_slide: Callable[..., Path], tmp_path: Path) -> None:
    models = [write_tiny_bundle(tmp_path / name) for name in ("a", "b")]
    write_manifest(models[1], replace(load_bundle(models[1]).manifest, name="other"))
    options = ("--model", models[0], "--model", models[1], "--precision", "fp32", "--check", 5)
    result = extract(make_slide(), *options, "--out", tmp_path / "o")
    assert result.returncode == 0, result.stderr
    for name in ("tiny", "other"):
        with h5py.File(tmp_path / "o" / name / "slide.h5") as file:
            assert json.loads(file.attrs["check"])["tiles"] == 5


def test_the_check_opens_a_folder_of_dicom_files(tiny_bundle: Path, slides_dir: Path, tmp_path: Path) -> None:
    case = tmp_path / "1.2.7"
    case.mkdir()
    shutil.copy(slides_dir / "multi_frame_jpeg_camelyon_challenge_image.dcm", case / "a.dcm")
    (tmp_path / "slides.csv").write_text("slide,mpp\n1.2.7,0.5\n")
    options = ("--model", tiny_bundle, "--out", tmp_path / "o", "--min-tissue", 0, "--check", 2)
    result = extract(tmp_path / "slides.csv", *options)
    assert result.returncode == 0, result.stderr
    assert "  checked 2 tiles" in result.stdout
    assert (tmp_path / "o" / "1.2.7.h5").exists()
