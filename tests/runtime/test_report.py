"""The report of a slide is made from its finished file and a thumbnail, in the run or at any time after it."""

from __future__ import annotations

import doctest
import html
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest

from mtdp_runtime import extract, open_slide
from mtdp_runtime import report as report_room
from mtdp_runtime.bundle.manifest import Head
from mtdp_runtime.errors import OutputUnwritable
from mtdp_runtime.report.colours import Colours, folder_colours
from mtdp_runtime.report.contact_sheet import contact_sheet, representative_rows
from mtdp_runtime.report.maps import palette, tile_map
from mtdp_runtime.report.overview import Overview, Thumbnail, overview, scale_bar, with_grid
from mtdp_runtime.report.slide import write_report
from mtdp_runtime.store.reader import open_features
from support import damage_tile, pyramid, stained, write_tiny_bundle


def thumbnail_of(slide_path: Path, features: Path) -> Thumbnail:
    """Read the slide anew, at the scale of the mask that the file holds."""
    with open_features(features) as file, open_slide(slide_path) as slide:
        assert file.tissue is not None
        scale, (x0, y0, width, height) = file.tissue.scale, slide.info.bounds
        image = np.zeros((math.ceil(height / scale), math.ceil(width / scale), 3), np.uint8)
        slide.read_into(image, x0, y0, scale)
    return Thumbnail(image, scale, x0, y0)


def text_of(report: Path) -> str:
    """The words of a report, without tags and pictures."""
    return re.sub(r"<[^>]*>", " ", re.sub(r"<style>.*?</style>", "", report.read_text(), flags=re.DOTALL))


def run(slide: Path, out: Path, model: Path, **options: object) -> Path:
    (outcome,) = extract(slide, out, model=model, backend="onnxruntime", report=True, threads=2, **options)  # type: ignore[arg-type]
    assert outcome.status in ("done", "no-tissue"), outcome.message
    return out / f"{slide.stem}.h5"


def test_a_report_made_later_is_that_of_the_run(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    slide = make_slide(levels=2)
    features = run(slide, tmp_path / "o", tiny_bundle)
    with open_slide(slide) as opened:
        write_report(tmp_path / "o/later.html", features, thumbnail_of(slide, features), opened)
    assert (tmp_path / "o/later.html").read_bytes() == (tmp_path / "o/report/slide.html").read_bytes()
    text = text_of(tmp_path / "o/later.html")
    with h5py.File(features) as file:
        assert f"{len(file['coords'])} tiles of 64 px at a scale of 1.0000 from level 0" in text
        assert f"{file.attrs['tiles_per_s']:.1f} tiles/s, bottleneck: {file.attrs['bottleneck']}." in text
    assert re.search(r"read\s+2\s+\d+\.\d\d", text), "the stage and its threads"


def test_a_file_of_an_earlier_version_does_not_say_how_many_threads_read(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    slide = make_slide()
    features = run(slide, tmp_path / "o", tiny_bundle)
    with h5py.File(features, "r+") as file:
        timing = json.loads(file.attrs["timing"])
        del timing["read_threads"]
        file.attrs["timing"] = json.dumps(timing | {"readers": 7})
    write_report(tmp_path / "o/r.html", features, thumbnail_of(slide, features))
    assert re.search(r"read\s+7\s+\d+\.\d\d", text_of(tmp_path / "o/r.html"))


@pytest.mark.parametrize(
    ("on_bad_tile", "said"),
    [("nan", "Their features are NaN and their status is not 0."), ("drop", "They are left out of the file.")],
)
def test_it_says_what_became_of_tiles_that_could_not_be_read(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path, on_bad_tile: str, said: str
) -> None:
    slide = make_slide()
    damage_tile(slide, 20)
    features = run(slide, tmp_path / "o", tiny_bundle, on_bad_tile=on_bad_tile)
    with h5py.File(features) as file:
        bad = int(file.attrs["bad_tiles"])
    text = text_of(tmp_path / "o/report/slide.html")
    assert bad > 0
    assert f"{bad} tiles could not be read" in text
    assert said in text


def test_a_slide_of_glass_has_a_report_too(tiny_bundle: Path, tmp_path: Path) -> None:
    slide = pyramid(np.full((600, 800, 3), 243, np.uint8), tmp_path / "glass.tiff", 0.5)
    run(slide, tmp_path / "o", tiny_bundle)
    text = text_of(tmp_path / "o/report/glass.html")
    assert "0 tiles of 64 px" in text
    assert "No tile has enough tissue." in text


def test_what_cannot_be_read_or_written_is_said(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    slide = make_slide()
    features = run(slide, tmp_path / "o", tiny_bundle)
    thumbnail = thumbnail_of(slide, features)
    with pytest.raises(OutputUnwritable, match=r"r\.html: cannot be written"):
        write_report(features / "r.html", features, thumbnail)
    features.write_bytes(b"no HDF5")
    with pytest.raises(OutputUnwritable, match="cannot be read"):
        write_report(tmp_path / "o/r.html", features, thumbnail)
    assert not (tmp_path / "o/r.html").exists()


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two slides of one run of a model with two heads; out/a.h5, out/b.h5, and the slides beside out."""
    folder = tmp_path_factory.mktemp("several")
    heads = (Head("kind", ("<i>", "b", "c")), Head("yes_no", ("no", "yes")))
    model = write_tiny_bundle(folder / "model", heads)
    left, right = stained(512, 768), stained(512, 768, seed=1)
    left[:, 512:] = left[:, 512:] // 2  # two kinds of tissue
    slides = [pyramid(left, folder / "a.tiff", 0.5), pyramid(right, folder / "b.tiff", 0.5)]
    extract(slides, folder / "out", model=model, backend="onnxruntime", report=True, threads=1, heads=True)
    return folder


class TestColours:
    def test_they_are_the_same_for_all_slides_of_a_folder_and_the_page_says_whose(self, several: Path) -> None:
        (kept,) = (several / "out/report").glob("colours.*.npz")
        for name in "ab":
            assert "; a.tiff defined them." in text_of(several / f"out/report/{name}.html")
            with open_features(several / f"out/{name}.h5") as file:
                colours = folder_colours(several / "out", file)
                assert colours is not None
                assert colours.slide == "a.tiff"
        before = kept.read_bytes()
        with open_features(several / "out/b.h5") as file:
            assert folder_colours(several / "out", file)
        assert kept.read_bytes() == before

    def test_without_a_file_the_next_slide_defines_them_the_same_each_time(self, several: Path, tmp_path: Path) -> None:
        shutil.copy(several / "out/b.h5", tmp_path / "b.h5")
        found = []
        for _ in range(2):
            with open_features(tmp_path / "b.h5") as file:
                colours = folder_colours(tmp_path, file)
                assert colours is not None
                found.append(colours.of_file(file))
            (kept,) = (tmp_path / "report").iterdir()
            kept.unlink()
        assert colours.slide == "b.tiff"
        np.testing.assert_array_equal(*found)

    @pytest.mark.parametrize("damage", ["cut", "empty", "of another model", "of another width", "not finite"])
    def test_what_is_kept_and_does_not_fit_is_not_used(self, several: Path, tmp_path: Path, damage: str) -> None:
        shutil.copy(several / "out/b.h5", tmp_path / "b.h5")
        shutil.copytree(several / "out/report", tmp_path / "report")
        (kept,) = (tmp_path / "report").glob("colours.*.npz")
        facts = dict(np.load(kept))
        changes = {
            "of another model": {"digest": np.array("0" * 64)},
            "of another width": {"mean": np.zeros(7)},
            "not finite": {"low": np.array([0, np.nan, 0])},
        }
        if damage in changes:
            np.savez(kept, **(facts | changes[damage]))
        else:
            kept.write_bytes(kept.read_bytes()[: 200 if damage == "cut" else 0])
        with open_features(tmp_path / "b.h5") as file:
            colours = folder_colours(tmp_path, file)
        assert colours is not None
        assert colours.slide == "b.tiff", "it was defined anew"
        assert np.load(kept)["slide"] == "b.tiff"

    def test_of_two_that_define_them_at_once_the_first_ones_stay(
        self, several: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import mtdp_runtime.report.colours as module

        for name in "ab":
            shutil.copy(several / f"out/{name}.h5", tmp_path)
        fit = module._fitted

        def overtaken(file: object, digest: str) -> Colours | None:
            monkeypatch.setattr(module, "_fitted", fit)
            with open_features(tmp_path / "a.h5") as first:
                folder_colours(tmp_path, first)
            return fit(file, digest)  # type: ignore[arg-type]

        monkeypatch.setattr(module, "_fitted", overtaken)
        with open_features(tmp_path / "b.h5") as file:
            colours = folder_colours(tmp_path, file)
        assert colours is not None
        assert colours.slide == "a.tiff"
        assert [path.suffix for path in (tmp_path / "report").iterdir()] == [".npz"], "nothing is left lying"

    def test_bad_tiles_are_grey_and_few_tiles_decide_for_nobody(self, several: Path, tmp_path: Path) -> None:
        shutil.copy(several / "out/b.h5", tmp_path / "b.h5")
        with h5py.File(tmp_path / "b.h5", "r+") as file:
            file["status"][10:] = 1
            file["features"][10:] = np.nan
        with open_features(tmp_path / "b.h5") as read:
            colours = folder_colours(tmp_path, read)
            assert colours is not None
            assert not colours.shared
            drawn = colours.of_file(read)
        assert (drawn[10:] == 128).all()
        assert not (drawn[:10] == 128).all()
        assert not (tmp_path / "report").exists()


class TestWhatTheModelSaw:
    def test_each_group_of_alike_tiles_is_shown_once(self, several: Path, tmp_path: Path) -> None:
        shutil.copy(several / "out/a.h5", tmp_path / "a.h5")
        with h5py.File(tmp_path / "a.h5", "r+") as file:
            count = len(file["coords"])
            kinds = np.arange(count) % 3  # three groups, each a point and a little noise
            noise = np.random.default_rng(0).normal(0, 1e-3, (count, 12))
            file["features"][:] = np.eye(12)[kinds] * [[1], [5], [9]][0] + noise * 0
        with open_features(tmp_path / "a.h5") as read:
            samples = representative_rows(read)
        assert sorted(int(kinds[one.row]) for one in samples) == [0, 1, 2]
        assert sum(one.part for one in samples) == pytest.approx(1)
        assert [one.part for one in samples] == sorted((one.part for one in samples), reverse=True)

    def test_the_tiles_are_those_that_the_model_got(self, several: Path) -> None:
        with open_features(several / "out/a.h5") as file, open_slide(several / "a.tiff") as slide:
            sheet = contact_sheet(file, slide)
            assert 8 <= len(sheet.tiles) <= 48
            assert sheet.unread == 0
            for one, image in sheet.tiles:
                x0, y0 = file.coords[one.row].tolist()
                expected = cv2.imread(str(several / "a.tiff"))[y0 : y0 + 64, x0 : x0 + 64, ::-1]
                np.testing.assert_array_equal(image, expected)
            dark = [image.mean() < 100 for _, image in sheet.tiles]
        assert any(dark), "both kinds of tissue are shown"
        assert not all(dark)

    def test_a_slide_that_is_gone_or_damaged_is_said(self, several: Path, tmp_path: Path) -> None:
        features = several / "out/a.h5"
        thumbnail = thumbnail_of(several / "a.tiff", features)
        shutil.copy(features, tmp_path / "a.h5")
        write_report(tmp_path / "r.html", tmp_path / "a.h5", thumbnail)
        assert "The slide was not at hand when this page was made" in text_of(tmp_path / "r.html")
        slide = tmp_path / "a.tiff"
        shutil.copy(several / "a.tiff", slide)
        for number in range(24):
            damage_tile(slide, number)
        with open_slide(slide) as opened:
            write_report(tmp_path / "r.html", tmp_path / "a.h5", thumbnail, opened)
        assert re.search(r"\d+ tiles could not be read now, and are left out", text_of(tmp_path / "r.html"))


class TestPictures:
    def grid(self, side_px: int, bad: int, file: object) -> np.ndarray:  # type: ignore[type-arg]
        size = 400
        places = np.array([(x, y) for y in range(0, size, side_px) for x in range(0, size, side_px)])
        corners = np.concatenate([places, places + side_px], axis=1)

        class Facts:
            good = np.arange(len(corners)) != bad
            tissue = None

        return with_grid(Facts(), Overview(np.full((size, size, 3), 200, np.uint8), 1.0, corners))  # type: ignore[arg-type]

    @pytest.mark.parametrize("side_px", [2, 4, 8, 20, 50])
    def test_the_slide_stays_readable_under_any_number_of_tiles(self, side_px: int) -> None:
        """Most of the picture keeps its brightness, within a tint; a single bad tile is seen."""
        image = self.grid(side_px, bad=len(range(0, 400, side_px)) + 1, file=None).astype(int)
        changed = np.abs(image - 200).max(axis=2)
        assert np.median(changed) < 60
        red = (image[..., 0] > 200) & (image[..., 1] < 60)
        assert red.sum() >= 12

    def test_a_length_of_the_scale_bar_is_that_length(self, several: Path) -> None:
        text = (several / "out/report/a.html").read_text()
        part, label = re.findall(r'class=length style="width:([\d.]+)%">(\d+) µm<', text)[0]
        assert float(part) / 100 * 768 * 0.5 == pytest.approx(int(label), rel=0.01)
        with open_features(several / "out/a.h5") as file:
            seen = overview(file, thumbnail_of(several / "a.tiff", several / "out/a.h5"))
        bar = scale_bar(seen.image.shape[1], seen.zoom, 0.5)
        assert bar is not None
        assert 0.05 < bar.part <= 0.2

    @pytest.mark.parametrize("module", ["overview", "page", "places"])
    def test_what_the_docstrings_show_is_so(self, module: str) -> None:
        __import__(f"mtdp_runtime.report.{module}")
        result = doctest.testmod(getattr(report_room, module))
        assert (result.failed, result.attempted > 0) == (0, True)


class TestProbabilities:
    def test_a_map_has_a_pixel_for_each_tile_and_nothing_elsewhere(self, several: Path) -> None:
        with open_features(several / "out/a.h5") as file:
            values = np.linspace(0, 1, len(file))
            image = cv2.imdecode(np.frombuffer(tile_map(file, values), np.uint8), cv2.IMREAD_UNCHANGED)
            first = file.coords.min(axis=0)
            places = (file.coords - first) // 64
        assert image[..., 3].astype(bool).sum() == len(values)
        for (column, row), value in zip(places.tolist(), values, strict=True):
            assert image[row, column, 2::-1].tolist() == palette()[round(value * 255)].tolist()

    def test_the_palette_grows_evenly_lighter(self) -> None:
        lab = cv2.cvtColor(palette()[None].astype(np.float32) / 255, cv2.COLOR_RGB2LAB)[0]
        steps = np.diff(lab[:, 0])
        assert (steps > -0.1).all()
        assert lab[-1, 0] - lab[0, 0] > 70

    def test_every_class_has_its_map_and_of_two_one_is_enough(self, several: Path) -> None:
        page = (several / "out/report/a.html").read_text()
        assert re.findall(r'alt="Map of the probability of ([^"]*)"', page).count("yes") == 1
        assert sorted(re.findall(r'alt="Map of the probability of ([^"]*)"', page)) == ["&lt;i&gt;", "b", "c", "yes"]
        assert "<i>" not in page
        with h5py.File(several / "out/a.h5") as file:
            mean = file["probabilities_yes_no"][:, 1].mean()
        assert f"yes : mean {mean:.2f}" in html.unescape(text_of(several / "out/report/a.html"))

    def test_without_heads_there_is_no_such_section(
        self, tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
    ) -> None:
        run(make_slide(), tmp_path / "o", tiny_bundle)
        text = text_of(tmp_path / "o/report/slide.html")
        assert "Probabilities" not in text
        with h5py.File(tmp_path / "o/slide.h5") as file:
            median = np.median(file["tissue_fraction"][:])
        assert f"Half of the tiles are at least {median:.0%} tissue" in text
