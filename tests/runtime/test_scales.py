"""Several scales in one run: the slide is opened and its tissue found once, and each file is its scale's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import pytest

import mtdp_runtime.tiling.plan
from mtdp_runtime import extract, load_bundle
from mtdp_runtime.bundle import write_manifest
from mtdp_runtime.cohort.job import scales_of
from mtdp_runtime.errors import UsageError
from mtdp_runtime.store.verify import verify_folder
from support import extract as command
from support import one_error, slide_lines, write_tiny_bundle

ENGINE = ("--backend", "onnxruntime")
SAME = {"backend": "onnxruntime", "batch": 8, "threads": 2}


def content(path: Path) -> dict[str, str]:
    """What a file holds, but for when and where it was made."""
    with h5py.File(path) as file:
        sums = json.loads(file.attrs["checksums"])["blake2b-128"]
        del sums["attributes"]
        return {**sums, "fingerprint": file.attrs["fingerprint"], "mpp": str(file.attrs["mpp"])}


def stopped_at(scale: int) -> Callable[[Path, int, int], None]:
    """Stop a run after a batch of one of its scales, counted from 0."""
    begun = 0

    def on_progress(slide: Path, done: int, tiles: int) -> None:
        nonlocal begun
        begun += done == 0
        if begun == scale + 1 and done > 0:
            raise KeyboardInterrupt

    return on_progress


def test_each_scale_gets_the_file_that_it_alone_would_have(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slide, searched, find = make_slide(levels=2, lossy=True), [], mtdp_runtime.tiling.plan.find_tissue
    monkeypatch.setattr(
        mtdp_runtime.tiling.plan, "find_tissue", lambda *arguments: searched.append(1) or find(*arguments)
    )
    both = tmp_path / "both"
    (outcome,) = extract(slide, both, model=tiny_bundle, mpp=[1.0, 0.5], pool="mean", formats=["npy"], **SAME)
    assert (outcome.status, len(searched)) == ("done", 1), outcome.message
    assert outcome.outputs == (both / "mpp1/slide.h5", both / "mpp0.5/slide.h5")
    assert outcome.times is not None
    assert outcome.tiles == outcome.times.tiles == outcome.times.read.items == 36 + 144
    for mpp in (0.5, 1.0):
        (alone,) = extract(slide, tmp_path / f"{mpp}", model=tiny_bundle, mpp=[mpp], pool="mean", **SAME)
        assert alone.output == tmp_path / f"{mpp}/slide.h5", "one scale needs no folder of its own"
        assert content(alone.output) == content(both / f"mpp{mpp:g}/slide.h5")
        assert (both / f"mpp{mpp:g}/npy/slide.npy").is_file()
    (line,) = slide_lines(both)
    assert line["outputs"] == [str(path) for path in outcome.outputs]
    assert [verdict.status for verdict in verify_folder(both)] == ["ok", "ok"]


@pytest.mark.parametrize("scale", [0, 1])
def test_a_run_that_is_stopped_at_any_scale_goes_on_to_the_same_files(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path, scale: int
) -> None:
    slide, mpp = make_slide(), [0.5, 1.0]
    with pytest.raises(KeyboardInterrupt):
        extract(slide, tmp_path / "o", model=tiny_bundle, mpp=mpp, on_progress=stopped_at(scale), **SAME)
    assert (tmp_path / "o/mpp0.5/slide.h5").is_file() == (scale == 1)
    assert not (tmp_path / "o/mpp1/slide.h5").exists()
    (outcome,) = extract(slide, tmp_path / "o", model=tiny_bundle, mpp=mpp, **SAME)
    assert (outcome.status, outcome.tiles_before > 0) == ("done", True)
    extract(slide, tmp_path / "whole", model=tiny_bundle, mpp=mpp, **SAME)
    for name in ("mpp0.5", "mpp1"):
        assert content(tmp_path / "o" / name / "slide.h5") == content(tmp_path / "whole" / name / "slide.h5")


def test_a_scale_that_is_added_leaves_the_others_alone(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    slide = make_slide()
    extract(slide, tmp_path, model=tiny_bundle, mpp=[0.5, 1.0], report=True, **SAME)
    before = [(tmp_path / name / "slide.h5").stat().st_mtime_ns for name in ("mpp0.5", "mpp1")]
    page = (tmp_path / "mpp1/report/slide.html").stat().st_mtime_ns
    (outcome,) = extract(slide, tmp_path, model=tiny_bundle, mpp=[0.5, 1.0, 2.0], report=True, **SAME)
    assert (outcome.status, outcome.tiles) == ("done", 9)
    assert [(tmp_path / name / "slide.h5").stat().st_mtime_ns for name in ("mpp0.5", "mpp1")] == before
    assert (tmp_path / "mpp1/report/slide.html").stat().st_mtime_ns == page
    (again,) = extract(slide, tmp_path, model=tiny_bundle, mpp=[2.0, 0.5], report=True, **SAME)
    assert (again.status, again.message) == ("skipped", "already done")


def test_models_lie_below_scales(make_slide: Callable[..., Path], tmp_path: Path) -> None:
    """As TRIDENT has them: a folder of a scale, and in it one for each encoder, whose files have the slides' names."""
    models = [write_tiny_bundle(tmp_path / name) for name in ("a", "b")]
    for folder in models:
        write_manifest(folder, replace(load_bundle(folder).manifest, name=folder.name, mpp=0.25))
    slide, out = make_slide(), tmp_path / "o"
    result = command(slide, "--out", out, "--model", models[0], "--model", models[1], "--mpp", 0.5, "--mpp", 2)
    assert result.returncode == 0, result.stderr
    for place in ("mpp0.5/a", "mpp0.5/b", "mpp2/a", "mpp2/b"):
        assert (out / place / "slide.h5").is_file()
        report = out / place / "report/slide.html"
        assert 'href="../../../report/index.html"' in report.read_text()
    page = (out / "report/index.html").read_text()
    assert [text in page for text in ("a 0.5 µm/px", "b 0.5 µm/px", "a 2 µm/px", "b 2 µm/px")] == [True] * 4
    assert page.count('href="./../mpp2/') == 2
    assert sorted(path.name for path in out.iterdir()) == ["mpp0.5", "mpp2", "report", "run.jsonl"]


def test_a_scale_that_the_slide_does_not_have_fails_it_after_the_others_are_done(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    slide = make_slide()
    for attempt in range(2):
        (outcome,) = extract(slide, tmp_path, model=tiny_bundle, mpp=[0.25, 0.5], formats=["npy"], **SAME)
        assert outcome.status == "failed"
        assert "coarser than the 0.25 µm/px asked for" in outcome.message
        assert ("an earlier run found this" in outcome.message) == (attempt == 1)
        assert (tmp_path / "mpp0.5/npy/slide.npy").is_file()
        assert not (tmp_path / "mpp0.25/slide.h5").exists()
    (other,) = extract(slide, tmp_path, model=tiny_bundle, mpp=[0.5, 1.0], **SAME)
    assert other.status == "done"


def test_a_scale_without_a_tile_is_said_where_others_have_some(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    (outcome,) = extract(make_slide(), tmp_path, model=tiny_bundle, mpp=[1.0, 50.0], **SAME)
    assert (outcome.status, outcome.tiles) == ("done", 36)
    assert outcome.warning.startswith("50 µm/px: the slide (1024 x 768 px) is smaller than one tile")


def test_a_dry_run_says_what_each_scale_costs(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    options = [make_slide(), "--model", tiny_bundle, "--mpp", 0.5, "--mpp", 1, "--dry-run", "--out", tmp_path / "o"]
    result = command(*options, "--backend", "onnxruntime", "--json")
    assert result.returncode == 0, result.stderr
    line = json.loads(result.stdout)
    assert (line["tiles"], [(one["mpp"], one["tiles"]) for one in line["scales"]]) == (180, [(0.5, 144), (1.0, 36)])
    assert line["bytes"] == sum(one["bytes"] for one in line["scales"]) > 0
    assert line["estimated_s"] > 0
    assert not (tmp_path / "o").exists()
    extract(options[0], tmp_path / "o", model=tiny_bundle, mpp=[1.0, 2.0], backend="onnxruntime")
    shown = command(*options, "--backend", "onnxruntime")
    assert ["-> 0.5, level 0" in shown.stdout, "-> 1, " in shown.stdout] == [True, False], "what is done costs nothing"


def test_a_dry_run_says_what_a_run_does_of_a_slide_that_lacks_a_scale(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    slides = [make_slide(f"{name}.tiff") for name in "ab"]
    options = [*slides, "--model", tiny_bundle, "--mpp", 0.25, "--mpp", 1, "--out", tmp_path / "o", *ENGINE]
    dry = [json.loads(line) for line in command(*options, "--dry-run", "--json").stdout.splitlines()]
    result = command(*options, "--json", "--no-report")
    run = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["status"] for line in dry] == [line["status"] for line in run] == ["failed"] * 2
    assert [line["message"] for line in dry] == [line["message"] for line in run]
    assert [(one["mpp"], one["tiles"]) for one in dry[0]["scales"]] == [(1.0, 36)]
    assert (tmp_path / "o/mpp1/a.h5").is_file()
    (tmp_path / "o/mpp1/b.h5").unlink()
    shown = command(*options, "--dry-run")
    assert shown.returncode == 1
    assert "-> 1, level 0" in shown.stdout
    assert shown.stderr.count("failed: ") == 2
    assert "2 slides: 0 to do with 36 tiles, " in shown.stdout


def test_a_run_file_may_name_several(tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path) -> None:
    make_slide()
    (tmp_path / "run.toml").write_text(
        f'slides = ["slide.tiff"]\nout = "o"\nmodel = ["{tiny_bundle}"]\nmagnification = [20, 10]\nno-report = true\n'
    )
    result = command("--config", tmp_path / "run.toml", "--shard", "1/1")
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["mpp0.5", "mpp1", "run.jsonl"]
    said = json.loads((tmp_path / "o/run.jsonl").read_text().splitlines()[0])["options"]
    assert said["magnification"] == [20.0, 10.0]


def test_scales_that_cannot_be_meant_are_refused(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    assert (scales_of(None), scales_of(1), scales_of([0.5, 0.25])) == ((), (1,), (0.5, 0.25))
    for wrong, message in (([0.5, 1, 0.5], "the same scale twice"), ([0.5, 0], "not a scale")):
        with pytest.raises(UsageError, match=message):
            extract(make_slide(), tmp_path / "o", model=tiny_bundle, mpp=wrong)
    (tmp_path / "tiles.csv").write_text("x,y\n0,0\n")
    with pytest.raises(UsageError, match=r"several --mpp and --coords .*tiles\.csv"):
        extract(make_slide(), tmp_path / "o", model=tiny_bundle, mpp=[0.5, 1], coords=tmp_path / "tiles.csv")
    assert "the same twice" in one_error(command(make_slide(), "--mpp", 0.5, "--magnification", 10))
    assert not (tmp_path / "o").exists()
