"""mtdp-extract as a person and a script meet it: outputs, one-line errors, exit codes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

import mtdp_runtime
import warm
from mtdp_runtime.backends import BACKENDS, backend_class
from mtdp_runtime.cohort.requests import list_slides
from mtdp_runtime.commands import bench
from mtdp_runtime.errors import UsageError
from support import damage_tile, extract, one_error, pyramid, slide_lines, stained


def test_help_needs_no_heavy_library() -> None:
    code = (
        "import sys, contextlib\n"
        "from mtdp_runtime.commands.extract import main\n"
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
        "from mtdp_runtime.commands.extract import main\n"
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
    (recorded,) = slide_lines(out)
    assert recorded == line | {name: recorded[name] for name in ("time", "host", "pid", "run", "attempt_s")}
    report = (out / "report" / "slide.html").read_text()
    assert "data:image/jpeg;base64," in report
    assert "http" not in report
    assert "<th scope=row>grid<td>tile_px 64, scale 1, " in report  # what the file keeps as JSON, readable
    assert sorted(p.name for p in out.iterdir()) == [".derived", "report", "run.jsonl", "slide.h5"]


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
    lines = slide_lines(tmp_path / "o")
    assert [(Path(line["slide"]).name, line["status"]) for line in lines] == [
        ("a.tiff", "done"),
        ("b.svs", "failed"),
        ("c.tiff", "failed"),
        ("d.tiff", "failed"),
        ("e.tiff", "done"),
    ]
    assert "--slide-mpp" in lines[3]["hint"]
    assert sorted(p.name for p in (tmp_path / "o").glob("*.h5")) == ["a.h5", "e.h5"]
    assert [p.name for p in (tmp_path / "o").glob(".*")] == [".derived"]


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
    assert [p.name for p in (tmp_path / "o").glob(".*")] == [".derived"]


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


def test_a_dry_run_of_the_demo_plans_its_slide_and_leaves_nothing(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    options = ("--demo", "--dry-run", "--model", tiny_bundle, "--out", tmp_path / "o", "--backend", "onnxruntime")
    result = extract(*options)
    assert result.returncode == 0, result.stderr
    said, speed, planned, estimate = result.stdout.splitlines()
    assert speed.startswith("speed: ")
    assert said == "demo: a synthetic slide for this dry run alone; it is removed at its end"
    assert planned.startswith("demo-slide.tiff: ")
    assert " tiles of 64 px; mpp 0.5 (TIFF resolution tags) -> 0.5, level 0" in planned
    assert re.fullmatch(r"  about [0-9.]+ (kB|MB), (under 1|[0-9]+) s", estimate)
    line = json.loads(extract(*options, "--json").stdout)
    assert (line["status"], line["output"]) == ("planned", None)
    assert list(scratch.glob("mtdp-*")) == []  # libraries keep things of their own there
    assert not (tmp_path / "o").exists()


class TestWrongUsage:
    """Said in one line before anything is written."""

    def test_nothing_named(self) -> None:
        result = extract()
        assert (result.returncode, one_error(result)) == (2, "error: no slide was named")

    def test_an_unknown_option(self) -> None:
        result = extract("--bacth", 4)
        assert result.returncode == 2
        assert one_error(result).startswith("error: no such option: --bacth")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--backend", "cuda"], "'--backend': 'cuda' is not one of 'auto', 'tensorrt'"),
            (["--precision", "fp8"], "'--precision': 'fp8' is not one of 'auto', 'fp32'"),
            (["--on-bad-tile", "white"], "'--on-bad-tile': 'white' is not one of 'nan', 'drop', 'fail'"),
            (["--slide-mpp", "-1"], "--slide-mpp -1.0: not a scale"),
            (["--mpp", "0"], "--mpp 0.0: not a scale"),
            (["--stride-px", "0"], "--stride-px 0: must be at least 1"),
            (["--min-tissue", "2"], "--min-tissue 2.0: must be from 0 to 1"),
            (["--magnification", "0"], "--magnification 0.0: must be from 0.1 to"),
            (["--batch", "-1"], "--batch '-1': must be a whole number from 1 on, or auto"),
            (["--shard", "5/4"], "--shard '5/4': must be slurm, or I/N"),
            (["--format", "xlsx"], "'--format': 'xlsx' is not one of 'h5', 'pt'"),
        ],
    )
    def test_a_wrong_value(
        self, tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path, options: list[str], message: str
    ) -> None:
        result = extract(make_slide(), "--model", tiny_bundle, "--out", tmp_path / "o", *options)
        assert result.returncode == 2
        assert message in one_error(result)
        assert not list((tmp_path / "o").glob("*"))

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
        assert result.returncode == 2
        assert "model.fp32.onnx: sha256" in one_error(result)

    def test_no_model(self, make_slide: Callable[..., Path], tmp_path: Path) -> None:
        result = extract(make_slide(), "--model", tmp_path / "none", "--out", tmp_path / "o")
        assert result.returncode == 2
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


class TestManifest:
    """What the columns mean, and what is not one of them."""

    def test_a_column_by_another_name_is_refused_and_a_strange_one_is_named(
        self, tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
    ) -> None:
        make_slide("a.tiff", mpp=None)
        manifest = tmp_path / "slides.csv"
        for column, meant in (("slide_mpp", "mpp"), ("masks", "mask"), ("path", "slide")):
            manifest.write_text(f"slide,{column}\na.tiff,0.5\n")
            result = extract(manifest, "--model", tiny_bundle, "--out", tmp_path / "o")
            assert result.returncode == 2
            assert f"a column named {column}, which is not read: is it {meant}?" in one_error(result)
        manifest.write_text("slide,mpp,patient,label\na.tiff,0.5,7,1\n")
        result = extract(manifest, "--model", tiny_bundle, "--out", tmp_path / "o", "--dry-run")
        assert result.returncode == 0
        assert result.stderr == f"note: {manifest}: columns that are not read: patient, label\n"

    def test_a_name_is_the_outputs(self, make_slide: Callable[..., Path], tmp_path: Path) -> None:
        make_slide("a.tiff")
        (tmp_path / "more").mkdir()
        shutil.copy(tmp_path / "a.tiff", tmp_path / "more")
        manifest = tmp_path / "slides.csv"
        manifest.write_text("slide,name\na.tiff,first\nmore/a.tiff,\n")
        assert [request.name for request in list_slides([manifest])] == ["first", "a"]
        manifest.write_text("slide,name\na.tiff,../first\n")
        with pytest.raises(UsageError, match="cannot be a file's name"):
            list_slides([manifest])

    def test_a_folder_keeps_the_whole_of_its_name(self, tmp_path: Path) -> None:
        for name in ("1.2.840.7", "1.2.840.8"):
            (tmp_path / name).mkdir()
        (tmp_path / "slides.csv").write_text("slide\n1.2.840.7\n1.2.840.8\n")
        assert [request.name for request in list_slides([tmp_path / "slides.csv"])] == ["1.2.840.7", "1.2.840.8"]

    def test_what_is_named_twice_is_done_once_unless_it_is_named_differently(
        self, make_slide: Callable[..., Path], tmp_path: Path
    ) -> None:
        slide = make_slide("a.tiff")
        assert [request.path for request in list_slides([slide, tmp_path, slide])] == [slide]
        (tmp_path / "slides.csv").write_text("slide,mpp\na.tiff,0.5\na.tiff,0.25\n")
        with pytest.raises(UsageError, match=r"a\.tiff: named twice, with another mpp"):
            list_slides([tmp_path / "slides.csv"])

    def test_slides_that_are_not_there_are_counted_before_work_and_end_nothing(
        self, tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
    ) -> None:
        options = (tmp_path / "b.svs", make_slide("a.tiff"), tmp_path / "c.svs")
        result = extract(*options, "--model", tiny_bundle, "--out", tmp_path / "o")
        assert result.returncode == 1
        note = f"note: 2 of 3 slides do not exist, the first: {tmp_path / 'b.svs'}; the others are done"
        assert result.stderr.splitlines()[0] == note
        assert sorted(path.name for path in (tmp_path / "o").glob("*.h5")) == ["a.h5"]

    def test_where_no_slide_is_there_nothing_begins(self, tiny_bundle: Path, tmp_path: Path) -> None:
        result = extract(tmp_path / "b.svs", tmp_path / "c.svs", "--model", tiny_bundle, "--out", tmp_path / "o")
        assert result.returncode == 2
        assert f"2 of 2 slides do not exist, the first: {tmp_path / 'b.svs'}" in one_error(result)
        assert not (tmp_path / "o").exists()

    def test_dicom_without_a_suffix_is_found_in_a_folder(self, slides_dir: Path, tmp_path: Path) -> None:
        source = slides_dir / "multi_frame_jpeg_camelyon_challenge_image.dcm"
        for name in ("1.2.840.7", "IMAGE1"):
            (tmp_path / name).mkdir()
            shutil.copyfile(source, tmp_path / name / name)
        (tmp_path / "notes").write_text("no slide")
        assert [request.name for request in list_slides([tmp_path])] == ["1.2.840.7", "IMAGE1"]


def test_overwrite_leaves_alone_what_is_right_and_replaces_the_rest(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    out, options = tmp_path / "o", ("--model", tiny_bundle, "--out", tmp_path / "o", "--no-report", "--overwrite")
    slides = [make_slide(f"{name}.tiff", seed=seed) for seed, name in enumerate("abc")]
    assert extract(*slides, *options).returncode == 0
    with h5py.File(out / "b.h5", "r+") as file:
        file["status"][0] = 255  # not computed
    extract(slides[2], *options, "--stride-px", 32)
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.h5")}
    assert extract(*slides, *options).returncode == 0
    assert [path.name for path, written in before.items() if path.stat().st_mtime_ns == written] == ["a.h5"]


def test_a_rate_of_zero_takes_every_tile(tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path) -> None:
    """Of a slide without any tissue, too: that is what was asked."""
    blank = pyramid(np.full((768, 1024, 3), 243, np.uint8), tmp_path / "blank.tiff", 0.5)
    options = ("--model", tiny_bundle, "--out", tmp_path / "o", "--json")
    for slide in (make_slide(), blank):
        line = json.loads(extract(slide, *options, "--min-tissue", 0).stdout)
        assert (line["status"], line["tiles"]) == ("done", 16 * 12)
    assert json.loads(extract(blank, *options, "--overwrite").stdout)["status"] == "no-tissue"


def test_tiles_that_are_left_out_are_no_rows_and_said_so(tiny_bundle: Path, tmp_path: Path) -> None:
    slide, out = pyramid(stained(768, 1024), tmp_path / "a.tiff", 0.5, levels=2, lossy=True), tmp_path / "o"
    damage_tile(slide, 3)
    result = extract(slide, "--model", tiny_bundle, "--out", out, "--on-bad-tile", "drop")
    assert "a.tiff: 140 tiles, 4 bad ones left out in " in result.stdout
    (line,) = slide_lines(out)
    assert (line["tiles"], line["bad_tiles"], line["left_out"]) == (140, 4, 4)
    with h5py.File(out / "a.h5") as file:
        assert len(file["features"]) == 140
    report = (out / "report" / "a.html").read_text()
    assert "They are left out of the file." in report
    assert "NaN and their status" not in report


def test_a_run_says_its_sum_and_which_reader_read(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    make_slide("a.tiff", lossy=True)
    make_slide("b.tiff")
    pyramid(np.full((768, 1024, 3), 243, np.uint8), tmp_path / "c.tiff", 0.5)
    (tmp_path / "d.svs").write_bytes(b"no slide")
    options = (tmp_path, "--model", tiny_bundle, "--out", tmp_path / "o")
    planned = extract(*options, "--dry-run")
    total = planned.stdout.splitlines()[-1]
    assert total.startswith("4 slides: 3 to do with 288 tiles, ")
    assert total.endswith("; 1 failed")
    said = extract(*options).stdout
    assert "3 of 4 slides done, 1 failed; 288 tiles in " in said
    assert " tiles/s, 1 without tissue; see " in said
    assert said.count("  read by openslide ") == 1, "the fast reader read a.tiff, and b.tiff is not JPEG"
    lines = slide_lines(tmp_path / "o")
    assert [line.get("reader", "").split(" ")[0] for line in lines] == ["mtdp", "openslide", "openslide", ""]
    assert "the fast reader does not read this" in lines[1]["reader_reason"]


class TestFailuresThatAreNotTheSlides:
    """They are not remembered: the user may mend them outside of the slide."""

    def test_a_file_of_other_settings_that_was_deleted(
        self, tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
    ) -> None:
        options = (make_slide(), "--model", tiny_bundle, "--out", tmp_path / "o")
        extract(*options)
        assert extract(*options, "--stride-px", 32).returncode == 1
        (tmp_path / "o" / "slide.h5").unlink()
        result = extract(*options, "--stride-px", 32)
        assert result.returncode == 0, result.stderr

    def test_a_format_that_fails_after_the_features_are_there(
        self, tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
    ) -> None:
        code = (
            "import mtdp_runtime.cohort.attempt as attempt\n"
            "def fails(*arguments): raise ValueError('this format cannot hold it')\n"
            "attempt.derive = fails\n"
            "from mtdp_runtime.commands.extract import main; main()"
        )
        options = [make_slide(), "--model", tiny_bundle, "--out", tmp_path / "o"]
        broken = warm.run(code, *options, "--format", "npy")
        assert broken.returncode == 1
        assert "this format cannot hold it" in broken.stderr
        result = extract(*options)
        assert (result.returncode, "already done" in result.stdout) == (0, True), result.stderr

    def test_a_slides_own_failure_is_remembered_by_any_path(self, tiny_bundle: Path, tmp_path: Path) -> None:
        (tmp_path / "bad.svs").write_bytes(b"no slide")
        options = ("--model", tiny_bundle, "--out", tmp_path / "o")
        assert "an earlier run" not in extract(tmp_path / "bad.svs", *options).stderr
        relative = os.path.relpath(tmp_path / "bad.svs")
        assert "an earlier run found this" in extract(relative, *options).stderr
        again = mtdp_runtime.extract(relative, tmp_path / "o", model=tiny_bundle, retry_failed=True)
        assert "an earlier run" not in again[0].message


def test_the_bench_needs_a_tile(tiny_bundle: Path, slides_dir: Path) -> None:
    code = "from mtdp_runtime.commands.bench import main; main()"
    result = warm.run(code, "extract", slides_dir / "odd" / "small.svs", "--model", tiny_bundle)
    assert result.returncode == 2
    assert "nothing to measure" in one_error(result)


def test_the_ceiling_is_of_shared_cores_or_of_the_slower_stage() -> None:
    assert bench._ceiling(300.0, 100.0, on_cores=True) == 75.0
    assert bench._ceiling(300.0, 100.0, on_cores=False) == 100.0
    assert [name for name in BACKENDS if backend_class(name).on_cores] == ["openvino", "onnxruntime"]
