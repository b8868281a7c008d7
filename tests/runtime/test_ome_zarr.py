"""An OME-Zarr is the picture that was written, or is refused; a chunk that was lost is no black tile."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from mtdp_runtime.cohort.requests import list_slides
from mtdp_runtime.errors import SlideUnreadable, TileUnreadable
from mtdp_runtime.slide.identity import parts_of
from mtdp_runtime.slide.open import open_slide
from support import read_square, stained
from zarr_files import half
from zarr_files import write_zarr as write

zarr = pytest.importorskip("zarr")


@pytest.fixture(scope="module")
def image() -> NDArray[np.uint8]:
    return stained(400, 600)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("axes", ["tczyx", "cyx", "yxc"])
def test_it_reads_as_its_pixels(tmp_path: Path, image: NDArray[np.uint8], version: str, axes: str) -> None:
    path = write(tmp_path / "a.ome.zarr", image, version, axes)
    with open_slide(path) as slide:
        info = slide.info
        assert (info.vendor, info.mpp, info.mpp_source) == ("ome-zarr", 0.25, "OME-Zarr (coordinateTransformations)")
        assert [(level.width, level.height) for level in info.levels] == [(600, 400), (300, 200), (150, 100)]
        assert info.reader.startswith("zarr ")
        assert info.size_bytes == sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        for x0, y0 in ((0, 0), (333, 251), (536, 336)):
            np.testing.assert_array_equal(read_square(slide, x0, y0, 64, 1.0), image[y0 : y0 + 64, x0 : x0 + 64])
        np.testing.assert_array_equal(read_square(slide, 200, 100, 64, 2.0), half(image)[50:114, 100:164])
        outside = read_square(slide, 580, 390, 64, 1.0)
        np.testing.assert_array_equal(outside[:10, :20], image[390:, 580:])
        assert (outside[10:] == 255).all()


def test_a_level_in_one_chunk_is_not_padded_to_it(tmp_path: Path, image: NDArray[np.uint8]) -> None:
    """2.9 is the factor: not 4, which would be one of a level that is padded to the whole of its only chunk."""
    path = write(tmp_path / "a.ome.zarr", image, axes="yxc", levels=2)
    small = cv2.resize(image, (round(600 / 2.9), round(400 / 2.9)), interpolation=cv2.INTER_AREA)
    group = zarr.open_group(str(path), mode="a")
    array = group.create_array("1", shape=small.shape, dtype="uint8", chunks=(512, 512, 3), overwrite=True)
    array[...] = small
    with open_slide(path) as slide:
        assert [level.downsample for level in slide.info.levels] == pytest.approx([1, 2.9], rel=0.005)


def test_shards_and_the_layout_of_bioformats2raw(tmp_path: Path, image: NDArray[np.uint8]) -> None:
    root = tmp_path / "b.zarr"
    group = zarr.open_group(str(root), mode="w", zarr_format=3)
    group.attrs.update({"ome": {"version": "0.5", "bioformats2raw.layout": 3}})
    write(root / "0", image, "0.5", "cyx", shards=(1, 256, 256))
    with open_slide(root) as slide:
        np.testing.assert_array_equal(read_square(slide, 100, 200, 150, 1.0), image[200:350, 100:250])
        assert slide.info.mpp == 0.25


def test_a_lost_chunk_is_an_error_and_an_empty_one_is_the_fill_value(tmp_path: Path, image: NDArray[np.uint8]) -> None:
    """Black beyond the scanned area is not written; the coarsest level shows that it is black."""
    image = image.copy()
    image[:, 400:] = 0
    path = write(tmp_path / "a.zarr", image)
    assert not (path / "0" / "0.0.0.1.4").exists()
    assert not (path / "0" / "0" / "0" / "0" / "1" / "4").exists()
    with open_slide(path) as slide:
        assert (read_square(slide, 500, 100, 64, 1.0) == 0).all()
    lost = next(
        p
        for p in (path / "0").rglob("*")
        if p.is_file() and p.relative_to(path / "0").as_posix().replace("/", ".") == "0.1.0.1.1"
    )
    lost.unlink()
    with open_slide(path) as slide:
        np.testing.assert_array_equal(read_square(slide, 0, 0, 100, 1.0), image[:100, :100])
        with pytest.raises(TileUnreadable, match="the chunk is not there"):
            read_square(slide, 130, 130, 64, 1.0)


@pytest.mark.parametrize("cut", [0.0, 0.5, 0.99])
def test_a_chunk_that_breaks_off_is_an_error(tmp_path: Path, image: NDArray[np.uint8], cut: float) -> None:
    path = write(tmp_path / "a.zarr", image, "0.5", "cyx")
    chunk = path / "0" / "c" / "2" / "1" / "1"
    chunk.write_bytes(chunk.read_bytes()[: int(cut * chunk.stat().st_size)])
    with open_slide(path) as slide:
        read_square(slide, 0, 0, 100, 1.0)
        with pytest.raises(TileUnreadable, match="cannot decode"):
            read_square(slide, 130, 130, 64, 1.0)


def channels(*labels: str, colours: tuple[str, ...] = ("FF0000", "00FF00", "0000FF")) -> dict[str, Any]:
    return {"channels": [{"label": label, "color": colour} for label, colour in zip(labels, colours, strict=False)]}


@pytest.mark.parametrize(
    "omero",
    [channels("Red", "Green", "Blue"), channels("Channel 0", "Channel 1", "Channel 2"), channels("", "", ""), {}],
)
def test_three_channels_that_are_red_green_and_blue_are_taken(
    tmp_path: Path, image: NDArray[np.uint8], omero: dict[str, Any]
) -> None:
    with open_slide(write(tmp_path / "a.zarr", image, omero=omero)) as slide:
        np.testing.assert_array_equal(read_square(slide, 0, 0, 64, 1.0), image[:64, :64])


@pytest.mark.parametrize(
    ("omero", "message"),
    [
        (channels("DAPI", "FITC", "Cy3"), r"3 channels \(DAPI, FITC, Cy3\), not RGB"),
        (channels("", "", "", colours=("0000FF", "00FF00", "FF0000")), "3 channels shown in the colours"),
    ],
)
def test_three_channels_of_something_else_are_refused(
    tmp_path: Path, image: NDArray[np.uint8], omero: dict[str, Any], message: str
) -> None:
    with pytest.raises(SlideUnreadable, match=message):
        open_slide(write(tmp_path / "a.zarr", image, omero=omero))


def test_other_pixels_are_refused_as_what_they_are(tmp_path: Path, image: NDArray[np.uint8]) -> None:
    for name, pixels, message in (
        ("a", image.astype(np.uint16), "3 x uint16, not 8-bit RGB"),
        ("b", image[..., :1], "1 x uint8, not 8-bit RGB"),
        ("c", image // 8, "dark as of fluorescence"),
    ):
        with pytest.raises(SlideUnreadable, match=message):
            open_slide(write(tmp_path / f"{name}.zarr", pixels, levels=1))
    for name, told, message in (
        ("d", {}, "without multiscales"),
        ("e", {"multiscales": [{"version": "0.1", "datasets": [{"path": "0"}]}]}, "older than 0.4"),
    ):
        zarr.open_group(str(tmp_path / f"{name}.zarr"), mode="w", zarr_format=2).attrs.update(told)
        with pytest.raises(SlideUnreadable, match=message):
            open_slide(tmp_path / f"{name}.zarr")


def test_without_the_library_it_says_what_to_install(
    tmp_path: Path, image: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.zarr", image, levels=1)
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(SlideUnreadable, match="zarr library is not installed") as caught:
        open_slide(path)
    assert caught.value.hint == "pip install 'mtdp[zarr]'"


def test_without_a_unit_the_scale_is_unknown(tmp_path: Path, image: NDArray[np.uint8]) -> None:
    with open_slide(write(tmp_path / "a.zarr", image, unit="pixel")) as slide:
        assert slide.info.mpp is None
        assert "unit" in slide.info.mpp_source


@pytest.mark.parametrize("unit", ["um", "µm", "micrometre"])
def test_a_micrometre_may_be_spelt_as_people_do(tmp_path: Path, image: NDArray[np.uint8], unit: str) -> None:
    with open_slide(write(tmp_path / "a.zarr", image, unit=unit)) as slide:
        assert slide.info.mpp == 0.25


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_the_finest_level_is_level_0_in_whatever_order_they_are_named(
    tmp_path: Path, image: NDArray[np.uint8], version: str
) -> None:
    path = write(tmp_path / "a.zarr", image, version)
    group = zarr.open_group(str(path), mode="a")
    told = dict(group.attrs)
    for scales in (told.get("ome") or told)["multiscales"]:
        scales["datasets"] = scales["datasets"][::-1]
    group.attrs.update(told)
    with open_slide(path) as slide:
        assert [level.downsample for level in slide.info.levels] == [1, 2, 4]
        assert slide.info.mpp == 0.25


def test_a_folder_search_finds_it_once_and_nothing_in_it(tmp_path: Path, image: NDArray[np.uint8]) -> None:
    """And takes no other Zarr for a slide, such as an output of ours."""
    write(tmp_path / "case" / "a.ome.zarr", image)
    write(tmp_path / "case" / "a.ome.zarr" / "labels" / "0", image)
    zarr.open_group(str(tmp_path / "features.zarr"), mode="w").attrs.update({"spatialdata_attrs": {}})
    (found,) = list_slides([tmp_path])
    assert (found.path, found.name) == (tmp_path / "case" / "a.ome.zarr", "a.ome")
    assert list_slides([found.path]) == [found]
    assert parts_of(found.path) == [found.path]


def test_what_it_says_of_its_identity_follows_its_content(tmp_path: Path, image: NDArray[np.uint8]) -> None:
    first = write(tmp_path / "a.zarr", image)
    shutil.copytree(first, tmp_path / "b.zarr")
    third = write(tmp_path / "c.zarr", 255 - image, omero=channels("R", "G", "B"))
    hashes = []
    for path in (first, tmp_path / "b.zarr", third):
        with open_slide(path) as slide:
            hashes.append(slide.info.quickhash)
    assert hashes[0] == hashes[1] != hashes[2]
    assert json.loads((first / ".zattrs").read_text())["multiscales"]
