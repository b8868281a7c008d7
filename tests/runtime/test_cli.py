"""mtdp-extract as a person and a script meet it: outputs, one-line errors, exit codes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from support import damage_tile, extract, one_error, pyramid, stained


def test_help_needs_no_heavy_library() -> None:
    code = (
        "import sys, contextlib\n"
        "from mtdp_runtime.cli import main\n"
        "sys.argv = ['mtdp-extract', '--help']\n"
        "with contextlib.suppress(SystemExit): main()\n"
        "heavy = {'torch', 'onnxruntime', 'openvino', 'numpy', 'cv2', 'h5py', 'openslide'} & set(sys.modules)\n"
        "print('heavy:', sorted(heavy))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.rstrip().endswith("heavy: []")
    assert "--min-tissue" in result.stdout


def test_the_runtime_never_imports_torch(tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from mtdp_runtime.cli import main\n"
        f"sys.argv = ['x', {str(make_slide())!r}, '--model', {str(tiny_bundle)!r}, '--out', {str(tmp_path / 'o')!r}]\n"
        "try: main()\n"
        "finally: print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.rstrip().endswith("False")


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_a_slide_to_features(tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path, backend: str) -> None:
    out = tmp_path / "out"
    result = extract(
        make_slide(levels=2, lossy=True), "--model", tiny_bundle, "--out", out, "--backend", backend, "--json"
    )
    assert result.returncode == 0, result.stderr
    line = json.loads(result.stdout)
    assert line["status"] == "done"
    assert line["tiles"] == 144  # 16 x 12 tiles of 64 px, the left quarter is glass
    with h5py.File(out / "slide.h5") as file:
        assert file["features"].shape == (144, 12)
        assert file["features"].dtype == np.float32
        assert file["coords"].dtype == np.int64
        assert (file["coords"][:] % 64 == 0).all()
        assert file["coords"][0].tolist() == [256, 0]
        assert (file["status"][:] == 0).all()
        attrs = dict(file["coords"].attrs)
        assert (attrs["patch_size"], attrs["patch_size_level0"], attrs["overlap"]) == (64, 64, 0)
        assert (attrs["level0_magnification"], attrs["target_magnification"]) == pytest.approx((20, 20), rel=1e-6)
        assert (attrs["level0_width"], attrs["level0_height"], attrs["name"]) == (1024, 768, "slide")
        assert file.attrs["precision"] in ("fp32", "bf16")
        assert file.attrs["backend"].startswith(backend)
        assert file.attrs["mpp_source"] == "TIFF resolution tags"
        assert len(file.attrs["bundle_digest"]) == 64
    assert json.loads((out / "run.jsonl").read_text()) == line
    report = (out / "report" / "slide.html").read_text()
    assert "data:image/jpeg;base64," in report
    assert "http" not in report
    assert sorted(p.name for p in out.iterdir()) == ["report", "run.jsonl", "slide.h5"]


def test_both_backends_agree(tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path) -> None:
    slide = make_slide()
    for backend in ("openvino", "onnxruntime"):
        extract(slide, "--model", tiny_bundle, "--out", tmp_path / backend, "--backend", backend, "--precision", "fp32")
    with h5py.File(tmp_path / "openvino" / "slide.h5") as a, h5py.File(tmp_path / "onnxruntime" / "slide.h5") as b:
        np.testing.assert_allclose(a["features"][:], b["features"][:], rtol=1e-4, atol=1e-5)


def test_a_second_run_leaves_the_file_alone(tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path) -> None:
    slide = make_slide()
    extract(slide, "--model", tiny_bundle, "--out", tmp_path / "o")
    written = (tmp_path / "o" / "slide.h5").stat().st_mtime_ns
    result = extract(slide, "--model", tiny_bundle, "--out", tmp_path / "o")
    assert (result.returncode, "already done" in result.stdout) == (0, True)
    assert (tmp_path / "o" / "slide.h5").stat().st_mtime_ns == written


def test_other_settings_are_refused_and_overwritten_on_demand(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    slide = make_slide()
    extract(slide, "--model", tiny_bundle, "--out", tmp_path / "o")
    result = extract(slide, "--model", tiny_bundle, "--out", tmp_path / "o", "--stride-px", 32)
    assert result.returncode == 1
    assert "is not what would be made now: stride_px is 64 there, 32 now" in result.stderr
    assert "--overwrite" in result.stderr
    result = extract(slide, "--model", tiny_bundle, "--out", tmp_path / "o", "--stride-px", 32, "--overwrite")
    assert result.returncode == 0
    with h5py.File(tmp_path / "o" / "slide.h5") as file:
        assert file["coords"].attrs["overlap"] == 32


def test_one_bad_slide_does_not_stop_the_others(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    make_slide("a.tiff")
    (tmp_path / "b.svs").write_bytes(b"not a slide at all")
    truncated = make_slide("c.tiff")
    truncated.write_bytes(truncated.read_bytes()[:100])
    make_slide("d.tiff", mpp=None)
    make_slide("e.tiff")
    result = extract(tmp_path, "--model", tiny_bundle, "--out", tmp_path / "o")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "2 of 5 slides done, 3 failed" in result.stdout
    lines = [json.loads(line) for line in (tmp_path / "o" / "run.jsonl").read_text().splitlines()]
    assert [(Path(line["slide"]).name, line["status"]) for line in lines] == [
        ("a.tiff", "done"),
        ("b.svs", "failed"),
        ("c.tiff", "failed"),
        ("d.tiff", "failed"),
        ("e.tiff", "done"),
    ]
    assert "--slide-mpp" in lines[3]["hint"]
    assert sorted(p.name for p in (tmp_path / "o").glob("*.h5")) == ["a.h5", "e.h5"]
    assert not list((tmp_path / "o").glob(".*"))


def test_damaged_tiles_are_nan_and_a_slide_of_nothing_else_fails(tiny_bundle: Path, tmp_path: Path) -> None:
    image = stained(768, 1024)
    some = pyramid(image, tmp_path / "some.tiff", 0.5, levels=2, lossy=True)
    every = pyramid(image, tmp_path / "every.tiff", 0.5, levels=2, lossy=True)
    damage_tile(some, 3)
    for number in range(48):
        damage_tile(every, number)
    result = extract(some, every, "--model", tiny_bundle, "--out", tmp_path / "o", "--json")
    assert result.returncode == 1
    first, second = (json.loads(line) for line in result.stdout.splitlines())
    assert (first["status"], first["bad_tiles"]) == ("done", 4)  # a compressed tile of 128 px holds four of 64
    with h5py.File(tmp_path / "o" / "some.h5") as file:
        assert np.isnan(file["features"][:]).any(axis=1).sum() == (file["status"][:] == 1).sum() == 4
        assert "cannot decode" in file.attrs["bad_tile_reasons"]
    assert second["status"] == "failed"
    assert "none of its 144 tiles has features; the first: " in second["message"]
    assert not list((tmp_path / "o").glob("*every*"))
    assert not list((tmp_path / "o").glob(".*"))


def test_a_manifest_gives_each_slide_its_scale(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    make_slide("a.tiff", mpp=None)
    make_slide("b.tiff")
    manifest = tmp_path / "slides.csv"
    manifest.write_text("slide,mpp\na.tiff,0.25\nb.tiff,\n")
    result = extract(manifest, "--model", tiny_bundle, "--out", tmp_path / "o")
    assert result.returncode == 0, result.stderr
    with h5py.File(tmp_path / "o" / "a.h5") as a, h5py.File(tmp_path / "o" / "b.h5") as b:
        assert (a.attrs["mpp_level0"], a.attrs["mpp_source"]) == (0.25, "the manifest slides.csv")
        assert a.attrs["scale"] == 2.0
        assert b.attrs["mpp_level0"] == pytest.approx(0.5)


def test_a_slide_without_tissue_is_done_and_empty(tiny_bundle: Path, slides_dir: Path, tmp_path: Path) -> None:
    result = extract(slides_dir / "odd" / "small.svs", "--model", tiny_bundle, "--out", tmp_path, "--json")
    assert result.returncode == 0
    line = json.loads(result.stdout)
    assert (line["status"], line["tiles"]) == ("no-tissue", 0)
    assert "smaller than one tile" in line["message"]
    with h5py.File(tmp_path / "small.h5") as file:
        assert file["features"].shape == (0, 12)


def test_a_dry_run_counts_and_writes_nothing(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    result = extract(make_slide(), "--model", tiny_bundle, "--out", tmp_path / "o", "--dry-run")
    assert result.returncode == 0
    assert "slide.tiff: 144 tiles of 64 px; mpp 0.5 (TIFF resolution tags) -> 0.5, level 0" in result.stdout
    assert not (tmp_path / "o").exists()


class TestWrongUsage:
    """Said in one line before anything is written."""

    def test_nothing_named(self) -> None:
        result = extract()
        assert (result.returncode, one_error(result)) == (2, "error: no slide was named")

    def test_an_unknown_option(self) -> None:
        result = extract("--bacth", 4)
        assert result.returncode == 2
        assert "No such option: --bacth" in result.stderr

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--backend", "cuda"], "unknown backend 'cuda'"),
            (["--precision", "fp8"], "--precision fp8"),
            (["--on-bad-tile", "white"], "--on-bad-tile 'white'"),
            (["--slide-mpp", "-1"], "--slide-mpp -1.0: not a scale"),
            (["--mpp", "0"], "--mpp 0.0: not a scale"),
        ],
    )
    def test_a_wrong_value(
        self, tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path, options: list[str], message: str
    ) -> None:
        result = extract(make_slide(), "--model", tiny_bundle, "--out", tmp_path / "o", *options)
        assert result.returncode == 2
        assert message in one_error(result)
        assert not list((tmp_path / "o").glob("*.h5"))

    def test_two_slides_of_one_name(self, tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path) -> None:
        first = make_slide()
        (tmp_path / "more").mkdir()
        shutil.copy(first, tmp_path / "more" / "slide.tiff")
        result = extract(tmp_path, "--model", tiny_bundle, "--out", tmp_path / "o")
        assert result.returncode == 2
        assert "two slides would write slide.h5" in one_error(result)

    def test_an_output_that_cannot_be_written(
        self, tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
    ) -> None:
        (tmp_path / "file").touch()
        result = extract(make_slide(), "--model", tiny_bundle, "--out", tmp_path / "file" / "o")
        assert result.returncode == 2
        assert "cannot be written" in one_error(result)

    def test_a_model_that_was_changed(self, tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path) -> None:
        shutil.copytree(tiny_bundle, tmp_path / "bundle")
        model = tmp_path / "bundle" / "model.fp32.onnx"
        model.write_bytes(model.read_bytes()[:-1] + b"\x00")
        result = extract(make_slide(), "--model", tmp_path / "bundle", "--out", tmp_path / "o")
        assert result.returncode == 1
        assert "model.fp32.onnx: sha256" in one_error(result)

    def test_no_model(self, make_slide: Callable[..., Path], tmp_path: Path) -> None:
        result = extract(make_slide(), "--model", tmp_path / "none", "--out", tmp_path / "o")
        assert result.returncode == 1
        assert "not a model bundle" in one_error(result)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("name,mpp\na.svs,0.5\n", "no column named slide"),
            ("slide,mpp\n,0.5\n", "line 2: no slide named"),
            ("slide,mpp\na.svs,twenty\n", "line 2: mpp 'twenty' is not a scale"),
        ],
    )
    def test_a_wrong_manifest(self, tiny_bundle: Path, tmp_path: Path, text: str, message: str) -> None:
        (tmp_path / "slides.csv").write_text(text)
        result = extract(tmp_path / "slides.csv", "--model", tiny_bundle, "--out", tmp_path / "o")
        assert result.returncode == 2
        assert message in one_error(result)
