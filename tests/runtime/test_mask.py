"""Masks that the user gives: what they cover, and which are refused before work starts."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from mtdp_runtime.errors import UsageError
from mtdp_runtime.settings import TissueSettings
from mtdp_runtime.slide.open import open_slide
from mtdp_runtime.tiling.given_mask import GivenMask, check_fits, coverage, load_mask
from mtdp_runtime.tiling.grid import Grid
from mtdp_runtime.tiling.tissue import find_tissue, tissue_fractions
from support import extract, info_of, one_error

SQUARE = [[[100, 100], [500, 100], [500, 500], [100, 500], [100, 100]]]
HOLED = [*SQUARE, [[200, 200], [400, 200], [400, 400], [200, 400], [200, 200]]]
INFO = info_of(1024, 768, 0.5)


def polygon(rings: Any) -> dict[str, Any]:
    return {"type": "Polygon", "coordinates": rings}


def feature(geometry: dict[str, Any], kind: Any = ("name", "Tumor")) -> dict[str, Any]:
    classification = {kind[0]: kind[1], "color": [200, 0, 0]} if kind else None
    return {
        "type": "Feature",
        "id": "5f1c",
        "geometry": geometry,
        "properties": {"objectType": "annotation", "classification": classification},
    }


def write(path: Path, what: Any) -> Path:
    path.write_text(json.dumps(what))
    return path


def area0(path: Path) -> float:
    """Level-0 pixels that the mask covers."""
    scale = 16.0
    return float(coverage(load_mask(path), INFO, scale, 64, 48).sum() * scale**2)


@pytest.mark.parametrize(
    ("what", "area"),
    [
        (polygon(SQUARE), 160_000),
        (polygon(HOLED), 120_000),
        (feature(polygon(HOLED)), 120_000),
        ({"type": "FeatureCollection", "features": [feature(polygon(SQUARE))]}, 160_000),
        ([feature(polygon(SQUARE)), feature(polygon(HOLED))], 160_000),  # a union: a hole in one is filled by the other
        ({"type": "MultiPolygon", "coordinates": [HOLED, [[[600, 0], [700, 0], [700, 100], [600, 100]]]]}, 130_000),
        (
            {"type": "GeometryCollection", "geometries": [{"type": "Point", "coordinates": [1, 1]}, polygon(SQUARE)]},
            160_000,
        ),
    ],
)
def test_geojson_covers_its_area(tmp_path: Path, what: Any, area: float) -> None:
    assert area0(write(tmp_path / "mask.geojson", what)) == pytest.approx(area, rel=0.03)


@pytest.mark.parametrize("third", [[0.0], ["x"], [None, 7]])
def test_what_follows_a_points_two_coordinates_changes_nothing(tmp_path: Path, third: list[Any]) -> None:
    plain = {"type": "MultiPolygon", "coordinates": [HOLED, [[[600, 0], [700, 0], [700, 100]]]]}
    longer = json.loads(json.dumps(plain))
    longer["coordinates"][1][0][1] += third
    assert area0(write(tmp_path / "longer.geojson", longer)) == area0(write(tmp_path / "plain.geojson", plain))


@given(
    points=st.lists(st.tuples(st.floats(0, 1024), st.floats(0, 768)), min_size=3, max_size=3), scale=st.floats(8, 40)
)
def test_a_triangle_covers_its_area(
    tmp_path_factory: pytest.TempPathFactory, points: list[tuple[float, float]], scale: float
) -> None:
    path = write(tmp_path_factory.getbasetemp() / "triangle.geojson", polygon([points]))
    (ax, ay), (bx, by), (cx, cy) = points
    area = abs((bx - ax) * (cy - ay) - (cx - ax) * (by - ay)) / 2
    outline = sum(np.hypot(q[0] - p[0], q[1] - p[1]) for p, q in zip(points, points[1:] + points[:1], strict=True))
    shape = (int(np.ceil(1024 / scale)), int(np.ceil(768 / scale)))
    covered = coverage(load_mask(path), INFO, scale, *shape).sum() * scale**2
    # cells are an eighth of a pixel; a line is at most about one cell too thick
    assert abs(covered - area) <= (outline + 4 * scale) * scale / 8


def test_a_tile_counts_by_area_and_not_by_its_centre(tmp_path: Path) -> None:
    """A strip through the centre of a tile, an eighth of its width."""
    strip = polygon([[[120, 0], [136, 0], [136, 128], [120, 128]]])
    mask = load_mask(write(tmp_path / "mask.geojson", strip))
    with_image = np.zeros((48, 64), np.float32)
    with_image[:] = coverage(mask, INFO, 16.0, 64, 48)
    grid = Grid(tile_px=64, scale=1.0, step0=64.0, columns=16, rows=12)
    from mtdp_runtime.tiling.tissue import TissueMask

    image = np.zeros((48, 64, 3), np.uint8)
    tissue = TissueMask(with_image >= 0.5, image, 16.0, 0, 0, 8.0, 0.0, 0, with_image)
    fractions = tissue_fractions(tissue, grid).reshape(12, 16)
    np.testing.assert_allclose(fractions[0, 1:3], 0.125, atol=0.04)
    assert fractions[0, 3:].max() == 0


def label_image(mode: str, labels: NDArray[np.uint8]) -> Image.Image:
    if mode == "RGBA":
        rgba = np.zeros((*labels.shape, 4), np.uint8)
        rgba[..., 2], rgba[..., 3] = labels, 255
        return Image.fromarray(rgba)
    image = Image.fromarray(labels)
    if mode == "P":
        image = image.convert("P")
        image.putpalette([255, 255, 255, 0, 0, 0] * 4)  # the colour of label 0 is white: the label counts
    if mode == "1":
        return image.point(lambda v: 255 * (v > 0)).convert("1")
    return image


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGBA"])
@pytest.mark.parametrize("size", [(64, 48), (256, 192), (33, 25), (1024, 768)])
def test_a_label_image_covers_its_area(tmp_path: Path, mode: str, size: tuple[int, int]) -> None:
    width, height = size
    labels = np.zeros((height, width), np.uint8)
    labels[height // 4 : height // 2, width // 4 : width // 2] = 3
    part = (height // 2 - height // 4) * (width // 2 - width // 4) / (width * height)
    label_image(mode, labels).save(tmp_path / "mask.png")
    assert area0(tmp_path / "mask.png") == pytest.approx(part * 1024 * 768, rel=0.06)


@pytest.mark.parametrize("kind", [("name", "Ignore*"), ("name", "Ignore*: Positive"), ("names", ["Ignore*", "x"])])
@pytest.mark.parametrize("first", [True, False])
def test_what_qupath_ignores_is_cut_out(tmp_path: Path, kind: Any, first: bool) -> None:
    """A fold of 200 x 200 px in the middle, and one with a hole, in whatever order they were drawn."""
    tissue, fold = feature(polygon(SQUARE)), feature(polygon([HOLED[1]]), kind)
    assert area0(write(tmp_path / "m.geojson", [fold, tissue] if first else [tissue, fold])) == pytest.approx(
        120_000, rel=0.02
    )
    ring = feature(polygon(HOLED), kind)
    assert area0(write(tmp_path / "m.geojson", [ring, tissue])) == pytest.approx(40_000, rel=0.05)


@pytest.mark.parametrize("kind", [None, ("name", None), ("name", "Region*"), ("name", "To ignore"), ("names", [])])
def test_every_other_class_is_tissue(tmp_path: Path, kind: Any) -> None:
    assert area0(write(tmp_path / "m.geojson", feature(polygon(SQUARE), kind))) == pytest.approx(160_000, rel=0.02)


@pytest.mark.parametrize("where", ["beside", "within"])
def test_what_qupath_nests_counts_as_if_it_lay_beside(tmp_path: Path, where: str) -> None:
    """QuPath's hierarchy: a fold within an annotation, and within the fold a region that stays ignored."""
    fold = feature(polygon([HOLED[1]]), ("name", "Ignore*"))
    region, tissue = feature(polygon([HOLED[1]])), feature(polygon(SQUARE), None)
    (fold if where == "beside" else fold["properties"])["childObjects"] = [region]
    (tissue if where == "beside" else tissue["properties"])["childObjects"] = [fold]
    assert area0(write(tmp_path / "m.geojson", [tissue])) == pytest.approx(120_000, rel=0.02)


def test_a_core_that_qupath_calls_missing_is_no_tissue(tmp_path: Path) -> None:
    cores = [feature(polygon(SQUARE)), feature(polygon([[[600, 0], [700, 0], [700, 100], [600, 100]]]))]
    for core, missing in zip(cores, (True, False), strict=True):
        core["properties"] |= {
            "objectType": "tma_core",
            "isMissing": missing,
            "childObjects": [feature(core["geometry"])],
        }
    assert area0(write(tmp_path / "m.geojson", cores)) == pytest.approx(10_000, rel=0.05)
    with pytest.raises(UsageError, match="holds no polygon"):
        load_mask(write(tmp_path / "m.geojson", cores[:1]))


@pytest.mark.parametrize("bad", [[], [[0, 0]], [[0, 0], [700, 700]]])
def test_a_ring_without_area_takes_nothing_from_the_others(tmp_path: Path, bad: Any) -> None:
    as_outline = [feature(polygon([bad])), feature(polygon(SQUARE))]
    assert area0(write(tmp_path / "m.geojson", as_outline)) == pytest.approx(160_000, rel=0.02)
    as_hole = feature(polygon([*HOLED, bad]))
    assert area0(write(tmp_path / "m.geojson", as_hole)) == pytest.approx(120_000, rel=0.03)
    with_hole = [feature(polygon([bad, *SQUARE])), feature(polygon([HOLED[1]]))]  # a hole in nothing is nothing
    assert area0(write(tmp_path / "m.geojson", with_hole)) == pytest.approx(40_000, rel=0.05)


def drawn_whole(mask: GivenMask, scale: float, width: int, height: int) -> NDArray[np.float32]:
    """The oracle: every polygon is drawn over a whole band of 64 rows, eight times as fine, one after the other."""
    bands = []
    for top in range(0, height, 64):
        band = np.zeros((min(64, height - top) * 8, width * 8), np.uint8)
        for value, polygons in ((1, mask.polygons), (0, mask.ignored)):
            for rings in polygons:
                piece = np.zeros_like(band)
                points = [np.rint((ring * 8 / scale - 0.5 - (0, top * 8)) * 16).astype(np.int32) for ring in rings]
                cv2.fillPoly(piece, points, 1, shift=4)
                band[piece == 1] = value
        bands.append(band)
    cells: NDArray[np.float32] = np.concatenate(bands).reshape(height, 8, width, 8).mean(axis=(1, 3), dtype=np.float32)
    return cells


corners = st.lists(st.tuples(st.integers(-300, 1300), st.integers(-300, 3300)), min_size=3, max_size=5)


@given(drawn=st.lists(st.tuples(st.lists(corners, min_size=1, max_size=3), st.booleans()), min_size=1, max_size=6))
def test_polygons_drawn_in_pieces_are_what_they_are_drawn_whole(
    drawn: list[tuple[list[list[tuple[int, int]]], bool]],
) -> None:
    """Three bands of rows; outlines that leave the slide on each side, with holes that leave the outline."""
    polygons = {
        which: tuple(
            tuple(np.array(ring, np.float64) for ring in rings) for rings, ignored in drawn if ignored == which
        )
        for which in (False, True)
    }
    mask = GivenMask(Path("m.geojson"), "", polygons[False], None, polygons[True])
    inside = [tuple(np.clip(ring, 0, None) for ring in rings) for rings in mask.polygons]
    for one in (mask, GivenMask(Path("m.geojson"), "", tuple(inside), None)):
        got = coverage(one, info_of(1024, 3000, 0.5), 16.0, 64, 188)
        np.testing.assert_array_equal(got, drawn_whole(one, 16.0, 64, 188))


def test_many_polygons_with_holes_cost_what_they_cover_and_not_what_the_slide_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """400 rings of 40 px on a slide of 40,000 px: what is drawn apart is their boxes and no whole bands."""
    made = 0
    zeros = np.zeros

    def counted(shape: Any, *arguments: Any) -> Any:
        nonlocal made
        made += int(np.prod(shape))
        return zeros(shape, *arguments)

    rings = [
        polygon([[[x + d, y + d], [x + 40 - d, y + d], [x + 40 - d, y + 40 - d], [x + d, y + 40 - d]] for d in (0, 10)])
        for x in range(0, 40_000, 2000)
        for y in range(0, 40_000, 2000)
    ]
    mask = load_mask(write(tmp_path / "m.geojson", {"type": "GeometryCollection", "geometries": rings}))
    monkeypatch.setattr(np, "zeros", counted)
    covered = coverage(mask, info_of(40_000, 40_000, 0.5), 16.0, 2500, 2500)
    assert covered.sum() * 16**2 == pytest.approx(400 * (1600 - 400), rel=0.2)
    bands = 2500 * 2500 * (64 + 1)
    assert made < bands + 400 * 100 * 100


def test_an_image_of_more_pixels_than_a_library_likes_is_read_within_its_memory(tmp_path: Path) -> None:
    """13,000 x 14,000 px RGBA, which Pillow alone holds in 728 MB: the labels add a byte a pixel, and strips."""
    path = tmp_path / "m.png"
    rgba = Image.new("RGBA", (13_000, 14_000))
    rgba.paste((1, 0, 0, 255), (0, 0, 6500, 7000))
    rgba.save(path, compress_level=1)
    del rgba
    code = (
        "import resource, sys; from pathlib import Path; from mtdp_runtime.tiling.given_mask import load_mask;"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "labels = load_mask(Path(sys.argv[1])).labels;"
        "print(int(labels.sum()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    marked, more_kib = map(int, done.stdout.split())
    assert marked == 6500 * 7000
    assert more_kib * 1024 < 13_000 * 14_000 * 7


def test_a_mask_with_levels_gives_its_finest(tmp_path: Path) -> None:
    """15,000 x 12,000 px: Pillow counts again when it looks for more pages."""
    labels = np.zeros((12_000, 15_000), np.uint8)
    labels[:6000, :7500] = 1
    options: dict[str, Any] = {"tile": (512, 512), "compression": "deflate", "compressionargs": {"level": 1}}
    with tifffile.TiffWriter(tmp_path / "m.tif") as tiff:
        for level in range(3):
            tiff.write(labels[:: 2**level, :: 2**level], subfiletype=level and 1, **options)
    read = load_mask(tmp_path / "m.tif").labels
    assert read is not None
    assert np.array_equal(read, labels.view(bool))


def test_an_image_too_large_for_memory_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    """Its header says so: of its pixels there are none."""
    Image.new("1", (8, 8)).save(tmp_path / "m.png")
    content = bytearray((tmp_path / "m.png").read_bytes())
    content[16:24] = struct.pack(">II", 40_000, 30_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    (tmp_path / "m.png").write_bytes(content)
    with pytest.raises(UsageError, match="40000 x 30000 px is too large a mask") as caught:
        load_mask(tmp_path / "m.png")
    assert "Scale it down" in (caught.value.hint or "")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.geojson")
    with pytest.raises(UsageError, match="the mask is not a file"):
        load_mask(tmp_path / "m.geojson")


def test_nothing_but_what_is_ignored_is_no_mask(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no polygon but the 1 of class Ignore\*"):
        load_mask(write(tmp_path / "m.geojson", feature(polygon(SQUARE), ("name", "Ignore*"))))


def test_polygons_start_where_the_scanned_area_starts(tmp_path: Path) -> None:
    """As in QuPath, which crops a slide to openslide.bounds-*."""
    info = info_of(4000, 4000, 0.5, bounds=(2000, 1000, 1024, 768))
    mask = load_mask(write(tmp_path / "mask.geojson", polygon(SQUARE)))
    check_fits(mask, info)
    covered = coverage(mask, info, 16.0, 64, 48)
    assert covered[15, 15] == 1
    assert covered[40, 40] == 0


def test_a_label_image_of_the_whole_slide_is_cut_to_the_scanned_area(tmp_path: Path) -> None:
    info = info_of(4000, 4000, 0.5, bounds=(2000, 1000, 1024, 768))
    labels = np.zeros((400, 400), np.uint8)
    labels[100:200, 200:250] = 1  # x from 2000 to 2500, y from 1000 to 2000
    Image.fromarray(labels).save(tmp_path / "mask.png")
    covered = coverage(load_mask(tmp_path / "mask.png"), info, 10.0, 103, 77)
    assert covered[:, :50].min() == 1
    assert covered[:, 51:].max() == 0


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.geojson", "{", "not a GeoJSON mask"),
        ("m.geojson", '{"type": "Sphere"}', "unknown type 'Sphere'"),
        ("m.geojson", '{"type": "Polygon", "coordinates": [[[0, 0], [1, 1]]]}', r"no polygon \(1 of fewer than 3"),
        ("m.geojson", '{"type": "Polygon", "coordinates": [[[1], [1], [2]]]}', "not a GeoJSON mask"),
        (
            "m.geojson",
            f'{{"type": "Polygon", "coordinates": [[[{"9" * 4000}, 0], [1, 1], [2, 2]]]}}',
            "a coordinate that",
        ),
        ("m.geojson", f'{{"type": "Polygon", "coordinates": [[[{"9" * 5000}, 0], [1, 1], [2, 2]]]}}', "not a GeoJSON"),
        ("m.geojson", '{"type": "Polygon", "coordinates": [[["a", 0], [1, 1], [2, 2]]]}', "not a GeoJSON mask"),
        ("m.geojson", '{"type": "Polygon", "coordinates": [[[NaN, 0], [1, 1], [2, 2]]]}', "a coordinate that no slide"),
        ("m.geojson", "[" * 100_000, "not a GeoJSON mask"),
        ("m.geojson", '{"type": "FeatureCollection", "features": []}', "holds no polygon"),
        ("m.geojson", '{"type": "LineString", "coordinates": [[0, 0], [1, 1]]}', "holds no polygon"),
        ("m.png", "no picture", "neither GeoJSON"),
        ("m.png", "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot identify"),  # Pillow would start gs
    ],
)
def test_what_is_no_mask_is_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=message) as caught:
        load_mask(tmp_path / name)
    assert caught.value.hint


def test_a_run_takes_a_mask_and_remembers_which(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    slide, out = make_slide(), tmp_path / "out"
    mask = write(tmp_path / "mask.geojson", feature(polygon([[[512, 0], [768, 0], [768, 128], [512, 128]]])))
    result = extract(slide, "--mask", mask, "--model", tiny_bundle, "--out", out)
    assert result.returncode == 0, result.stderr
    with h5py.File(out / "slide.h5") as file:
        assert file["coords"][:].tolist() == [[x, y] for y in (0, 64) for x in (512, 576, 640, 704)]
        np.testing.assert_allclose(file["tissue_fraction"][:], 1, atol=0.05)
        assert file.attrs["tissue_source"] == "given by mask.geojson"
        assert json.loads(file.attrs["made_of"])["mask"] == load_mask(mask).digest
    assert "given by mask.geojson" in (out / "report" / "slide.html").read_text()

    write(mask, polygon([[[512, 0], [576, 0], [576, 64], [512, 64]]]))
    result = extract(slide, "--mask", mask, "--model", tiny_bundle, "--out", out)
    assert "mask is" in result.stderr, "another mask is another result"
    assert result.returncode == 1


def test_a_manifest_gives_each_slide_its_mask(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    make_slide("a.tiff")
    make_slide("b.tiff")
    write(tmp_path / "a.geojson", polygon([[[512, 0], [576, 0], [576, 64], [512, 64]]]))
    (tmp_path / "slides.csv").write_text("Slide, MPP ,mask\na.tiff,,a.geojson\nb.tiff,,\n")
    result = extract(tmp_path / "slides.csv", "--model", tiny_bundle, "--out", tmp_path / "o", "--json")
    assert result.returncode == 0, result.stderr
    assert [json.loads(line)["tiles"] for line in result.stdout.splitlines()] == [1, 144]


class TestSaidBeforeWorkStarts:
    """Exit code 2 and not one output, where no slide can be done; else the others are."""

    def refused(self, tmp_path: Path, tiny_bundle: Path, *arguments: object) -> str:
        result = extract(*arguments, "--model", tiny_bundle, "--out", tmp_path / "o")
        assert result.returncode == 2
        assert not (tmp_path / "o").exists()
        return one_error(result)

    def test_a_mask_of_another_slide(self, tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path) -> None:
        make_slide("a.tiff")
        make_slide("b.tiff")
        write(tmp_path / "a.geojson", polygon(SQUARE))
        write(tmp_path / "b.geojson", polygon([[[9000, 100], [9500, 100], [9500, 500]]]))
        manifest = tmp_path / "slides.csv"
        manifest.write_text("slide,mask\na.tiff,b.geojson\nb.tiff,b.geojson\n")
        message = self.refused(tmp_path, tiny_bundle, manifest)
        assert "(9000, 100) to (9500, 500), outside of" in message

        manifest.write_text("slide,mask\na.tiff,a.geojson\nb.tiff,b.geojson\n")
        result = extract(manifest, "--model", tiny_bundle, "--out", tmp_path / "o", "--json")
        assert result.returncode == 1
        first = result.stderr.splitlines()[0]
        assert first.startswith("note: will fail, the others are done: ")
        assert [json.loads(line)["status"] for line in result.stdout.splitlines()] == ["done", "failed"]

    def test_an_image_of_another_shape(
        self, tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
    ) -> None:
        Image.new("L", (100, 100), 1).save(tmp_path / "m.png")
        message = self.refused(tmp_path, tiny_bundle, make_slide(), "--mask", tmp_path / "m.png")
        assert "another shape" in message

    def test_a_mask_that_is_not_there(self, tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path) -> None:
        message = self.refused(tmp_path, tiny_bundle, make_slide(), "--mask", tmp_path / "gone.geojson")
        assert "gone.geojson: the mask cannot be read: No such file" in message

    def test_one_mask_for_two_slides(self, tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path) -> None:
        mask = write(tmp_path / "m.geojson", polygon(SQUARE))
        slides = (make_slide("a.tiff"), make_slide("b.tiff"))
        assert "one mask for 2 slides" in self.refused(tmp_path, tiny_bundle, *slides, "--mask", mask)


def test_a_real_slide(slides_dir: Path, tmp_path: Path) -> None:
    mask = load_mask(write(tmp_path / "mask.geojson", polygon(HOLED)))
    with open_slide(slides_dir / "CMU-1-Small-Region.svs") as slide:
        tissue = find_tissue(slide, TissueSettings(), mask)
    assert tissue.area_mm2 == pytest.approx(120_000 * 0.499**2 / 1e6, rel=0.03)


def test_a_mask_that_marks_nothing_is_blamed_on_the_mask(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    Image.fromarray(np.zeros((96, 128), np.uint8)).save(tmp_path / "zeros.png")
    result = extract(
        make_slide(), "--model", tiny_bundle, "--mask", tmp_path / "zeros.png", "--out", tmp_path / "o", "--json"
    )
    outcome = json.loads(result.stdout)
    assert outcome["status"] == "no-tissue"
    assert outcome["message"].endswith("it was given by zeros.png, which marks nothing")
