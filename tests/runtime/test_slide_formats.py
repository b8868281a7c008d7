"""Slides as they lie on disks: images that OpenSlide refuses, series of files, folders."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from mtdp_runtime.cohort.requests import list_slides
from mtdp_runtime.errors import SlideUnreadable, TileUnreadable
from mtdp_runtime.slide import dicom
from mtdp_runtime.slide.open import open_slide
from support import pyramid, read_square, stained


def half(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    cells = image.reshape(image.shape[0] // 2, 2, image.shape[1] // 2, 2, 3)
    return np.rint(cells.mean(axis=(1, 3))).astype(np.uint8)


@pytest.fixture(scope="module")
def image() -> NDArray[np.uint8]:
    return stained(600, 900)


@pytest.fixture(
    params=["png", "rgba.png", "jpg", "strips.tif", "one-strip.tif", "tiles.ome.tif", "pyramid.ome.tif", "rgba.ome.tif"]
)
def written(request: pytest.FixtureRequest, image: NDArray[np.uint8], tmp_path: Path) -> Path:
    kind = str(request.param)
    path = tmp_path / f"image.{kind}"
    ome: dict[str, Any] = {
        "photometric": "rgb",
        "metadata": {"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5},
    }
    if kind == "png":
        Image.fromarray(image).save(path)
    elif kind == "rgba.png":
        Image.fromarray(np.dstack([image, np.full(image.shape[:2], 255, np.uint8)])).save(path)
    elif kind == "jpg":
        Image.fromarray(image).save(path, quality=95)
    elif kind == "strips.tif":
        tifffile.imwrite(path, image, rowsperstrip=7, compression="lzw", predictor=True, photometric="rgb")
    elif kind == "one-strip.tif":
        tifffile.imwrite(path, image, photometric="rgb", resolution=(20000, 20000), resolutionunit="CENTIMETER")
    elif kind == "tiles.ome.tif":
        tifffile.imwrite(path, image, tile=(128, 64), compression="zlib", **ome)
    elif kind == "rgba.ome.tif":
        rgba = np.dstack([image, np.full(image.shape[:2], 255, np.uint8)])
        tifffile.imwrite(path, rgba, tile=(128, 64), extrasamples=["unassalpha"], **ome)
    else:
        with tifffile.TiffWriter(path) as tiff:
            tiff.write(image, tile=(128, 128), subifds=2, **ome)
            tiff.write(half(image), tile=(128, 128), subfiletype=1, photometric="rgb")
            tiff.write(half(half(image)), tile=(128, 128), subfiletype=1, photometric="rgb")
    return path


def test_every_image_reads_as_its_pixels(written: Path, image: NDArray[np.uint8]) -> None:
    expected = np.asarray(Image.open(written)) if written.suffix == ".jpg" else image
    with open_slide(written) as slide:
        assert (slide.info.width, slide.info.height) == (900, 600)
        assert slide.info.reader.startswith(("tifffile", "Pillow"))
        assert slide.info.quickhash
        for x0, y0 in ((0, 0), (333, 251), (836, 536)):
            np.testing.assert_array_equal(read_square(slide, x0, y0, 64, 1.0), expected[y0 : y0 + 64, x0 : x0 + 64])
        outside = read_square(slide, 880, 590, 64, 1.0)
        np.testing.assert_array_equal(outside[:10, :20], expected[590:, 880:])
        assert (outside[10:] == 255).all()
        assert (outside[:, 20:] == 255).all()
        mean = expected[:256, 256:512].reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
        assert np.abs(read_square(slide, 256, 0, 64, 4.0) - mean).max() <= 1.6


def test_its_scale_and_levels(written: Path) -> None:
    with open_slide(written) as slide:
        if ".ome." in written.name:
            assert (slide.info.mpp, slide.info.mpp_source) == (0.5, "OME-XML (PhysicalSizeX, -Y)")
        elif "one-strip" in written.name:
            assert (slide.info.mpp, slide.info.mpp_source) == (0.5, "TIFF resolution tags")
        else:
            assert slide.info.mpp is None
        expected = [1, 2, 4] if "pyramid" in written.name else [1]
        assert [level.downsample for level in slide.info.levels] == expected


def test_what_is_transparent_is_white(tmp_path: Path) -> None:
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[:, 32:] = (100, 50, 0, 128)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    with open_slide(tmp_path / "a.png") as slide:
        pixels = read_square(slide, 0, 0, 64, 1.0)
    assert (pixels[:, :32] == 255).all()
    assert (pixels[:, 32:] == (177, 152, 127)).all()  # half of it, half of white


@pytest.mark.parametrize(
    ("pixels", "options", "message"),
    [
        (np.zeros((64, 64), np.uint8), {"photometric": "minisblack"}, "1 x uint8, not 8-bit RGB"),
        (np.zeros((64, 64, 3), np.uint16), {"photometric": "rgb"}, "3 x uint16, not 8-bit RGB"),
        (np.zeros((3, 64, 64), np.uint8), {"metadata": {"axes": "CYX"}, "tile": (64, 64)}, "not.* RGB"),
    ],
)
def test_other_pixels_are_refused(tmp_path: Path, pixels: NDArray[Any], options: dict[str, Any], message: str) -> None:
    path = tmp_path / "image.ome.tif"
    tifffile.imwrite(path, pixels, ome=True, **options)
    with pytest.raises(SlideUnreadable, match=message):
        open_slide(path)


@pytest.mark.parametrize("ome", [True, False])
@pytest.mark.parametrize("tiled", [True, False])
@pytest.mark.parametrize("kind", ["unassalpha", "assocalpha", "unspecified", "opaque data"])
def test_a_fourth_channel_is_what_the_tiff_says(tmp_path: Path, kind: str, tiled: bool, ome: bool) -> None:
    """Transparency, plain or multiplied in, or data of somebody's own, which must never hide the picture."""
    path, pixels = tmp_path / "image.tif", np.zeros((128, 128, 4), np.uint8)
    pixels[:, 64:] = (50, 25, 0, 128)
    pixels[:, :32] = (100, 50, 0, 255)
    says = kind if kind.endswith("alpha") else "unspecified"
    if kind == "opaque data":
        pixels[..., 3] = 255
    options: dict[str, Any] = {"tile": (64, 64)} if tiled else {}
    metadata = {"axes": "YXS"} if ome else None
    tifffile.imwrite(path, pixels, photometric="rgb", extrasamples=[says], ome=ome, metadata=metadata, **options)
    if says == "unspecified":
        with pytest.raises(SlideUnreadable, match="does not say what its fourth channel is"):
            open_slide(path)
        return
    half = (153, 140, 127) if kind == "unassalpha" else (177, 152, 127)
    with open_slide(path) as slide:
        assert slide.info.reader.startswith("openslide" if tiled and not ome else "tifffile")
        seen = read_square(slide, 0, 0, 128, 1.0).astype(int)
    assert (seen[:, :32] == (100, 50, 0)).all()
    assert (seen[:, 32:64] == 255).all()
    assert np.abs(seen[:, 64:] - half).max() <= 1


def test_an_ome_tiff_whose_pixels_lie_in_another_file_is_refused(tmp_path: Path) -> None:
    """Two images, a file each, and both files describe both: the second's first image is not its own."""
    image = (
        '<Image ID="Image:{0}"><Pixels ID="Pixels:{0}" DimensionOrder="XYCZT" Type="uint8" SizeX="256" SizeY="256" '
        'SizeC="3" SizeZ="1" SizeT="1"><Channel ID="Channel:{0}:0" SamplesPerPixel="3"/><TiffData IFD="0" '
        'PlaneCount="1"><UUID FileName="{0}.ome.tif">urn:uuid:0000000{0}-0000-0000-0000-000000000000</UUID></TiffData>'
        "</Pixels></Image>"
    )
    root = (
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" '
        'UUID="urn:uuid:0000000{0}-0000-0000-0000-000000000000">'
    )
    pixels = [stained(256, 256, seed) for seed in range(2)]
    for number in range(2):
        xml = f"{root.format(number)}{image.format(0)}{image.format(1)}</OME>"
        path = tmp_path / f"{number}.ome.tif"
        options: dict[str, Any] = {"tile": (64 << number, 128), "photometric": "rgb", "metadata": None}
        tifffile.imwrite(path, pixels[number], description=xml, **options)
    with open_slide(tmp_path / "0.ome.tif") as slide:
        np.testing.assert_array_equal(read_square(slide, 0, 0, 256, 1.0), pixels[0])
    with pytest.raises(
        SlideUnreadable, match=r"1\.ome\.tif: its pixels lie in another file: name that one, 0\.ome\.tif"
    ):
        open_slide(tmp_path / "1.ome.tif")
    (tmp_path / "0.ome.tif").unlink()  # without it, the image that is there is the only one
    with open_slide(tmp_path / "1.ome.tif") as slide:
        np.testing.assert_array_equal(read_square(slide, 0, 0, 256, 1.0), pixels[1])


@pytest.mark.parametrize("named", ["../0.ome.tif", "/etc/hostname", "a&#47;b.ome.tif", "pipe"])
def test_an_ome_tiff_that_names_what_is_no_file_beside_it_opens_nothing(tmp_path: Path, named: str) -> None:
    """tifffile would open whatever the XML names; of a pipe it would wait for a writer for ever."""
    os.mkfifo(tmp_path / "pipe")
    xml = (
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" '
        'UUID="urn:uuid:00000000-0000-0000-0000-000000000000">'
        '<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" SizeX="256" SizeY="256" '
        'SizeC="3" SizeZ="1" SizeT="1"><Channel ID="Channel:0:0" SamplesPerPixel="3"/><TiffData IFD="0" PlaneCount="1">'
        f'<UUID FileName="{named}">urn:uuid:11111111-0000-0000-0000-000000000000</UUID></TiffData>'
        "</Pixels></Image></OME>"
    )
    path = tmp_path / "sub" / "1.ome.tif" if named.startswith("..") else tmp_path / "1.ome.tif"
    path.parent.mkdir(exist_ok=True)
    tifffile.imwrite(path, stained(256, 256), description=xml, tile=(64, 64), photometric="rgb", metadata=None)
    with pytest.raises(SlideUnreadable, match="its OME-XML names"):
        open_slide(path)


def test_a_damaged_strip_is_a_bad_tile_and_no_other_is(tmp_path: Path, image: NDArray[np.uint8]) -> None:
    path = tmp_path / "image.tif"
    tifffile.imwrite(path, image, rowsperstrip=100, compression="zlib", photometric="rgb")
    with tifffile.TiffFile(path) as tiff:
        offset, size = tiff.pages[0].dataoffsets[3], tiff.pages[0].databytecounts[3]
    content = bytearray(path.read_bytes())
    content[offset : offset + size] = bytes(size)
    path.write_bytes(content)
    with open_slide(path) as slide:
        np.testing.assert_array_equal(read_square(slide, 0, 0, 200, 1.0), image[:200, :200])
        with pytest.raises(TileUnreadable, match="cannot decode segment 3 of level 0"):
            read_square(slide, 0, 250, 64, 1.0)


def test_a_real_untiled_tiff(slides_dir: Path) -> None:
    path = slides_dir / "odd" / "kidney-48-5.tif"
    with pytest.raises(openslide.OpenSlideError):
        openslide.OpenSlide(path)
    with open_slide(path, 0.5, "--slide-mpp") as slide:
        np.testing.assert_array_equal(read_square(slide, 700, 400, 224, 1.0), tifffile.imread(path)[400:624, 700:924])


class TestDicom:
    """A series of files is one slide."""

    def folder(self, slides_dir: Path, tmp_path: Path) -> Path:
        """Two files of one series."""
        folder = tmp_path / "case-7"
        folder.mkdir()
        for name in ("a.dcm", "b.dcm"):
            shutil.copyfile(slides_dir / "multi_frame_jpeg_camelyon_challenge_image.dcm", folder / name)
        return folder

    def test_a_folder_of_one_series_is_one_slide(self, slides_dir: Path, tmp_path: Path) -> None:
        folder = self.folder(slides_dir, tmp_path)
        (request,) = list_slides([tmp_path])
        assert request.name == "case-7"
        assert list_slides([folder])[0].name == "case-7"
        assert [r.name for r in list_slides([folder / "a.dcm", folder / "b.dcm"])] == ["a"]

    def test_the_folder_opens(self, slides_dir: Path, tmp_path: Path) -> None:
        shutil.copyfile(slides_dir / "multi_frame_jpeg_camelyon_challenge_image.dcm", tmp_path / "a.dcm")
        with open_slide(tmp_path) as slide:
            assert (slide.info.width, slide.info.height) == (1152, 700)
            assert slide.info.vendor == "dicom"

    @pytest.mark.parametrize("name", ["IM0001", "1.2.826.0.1.3680043.2.1143"])
    def test_files_without_a_suffix_are_known_by_their_content(
        self, slides_dir: Path, tmp_path: Path, name: str
    ) -> None:
        """As archives write them, with a directory of their own and other things beside them."""
        shutil.copyfile(slides_dir / "multi_frame_jpeg_camelyon_challenge_image.dcm", tmp_path / name)
        (tmp_path / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
        (tmp_path / "README").write_text("of the archive")
        (tmp_path / "deeper").mkdir()
        assert list(dicom.series_in(tmp_path).values()) == [[tmp_path / name]]
        with open_slide(tmp_path) as slide:
            assert (slide.info.width, slide.info.height) == (1152, 700)

    def test_files_of_several_series_are_several_slides(self, slides_dir: Path) -> None:
        names = {r.name for r in list_slides([slides_dir]) if r.path.suffix == ".dcm" and r.path.parent == slides_dir}
        assert names == {"multi_frame_jpeg_camelyon_challenge_image", "multi_frame_jpeg2000_camelyon_challenge_image"}
        with pytest.raises(SlideUnreadable, match="2 DICOM series"):
            open_slide(slides_dir)

    @pytest.mark.parametrize("name", ["sm_image.dcm", "boxes_0.dcm", "test_wsi2.dcm"])
    def test_the_series_is_openslides(self, slides_dir: Path, name: str) -> None:
        path = slides_dir / "odd" / name
        uid = dicom.series_of(path)
        assert uid.encode() in path.read_bytes()
        if name != "test_wsi2.dcm":
            with openslide.OpenSlide(path) as slide:
                assert slide.properties["dicom.SeriesInstanceUID"] == uid

    def test_no_dicom_has_no_series(self, tmp_path: Path) -> None:
        for number, content in enumerate((b"", bytes(128) + b"DICM", bytes(128) + b"DICM" + bytes(range(256)) * 4)):
            path = tmp_path / f"{number}.dcm"
            path.write_bytes(content)
            assert dicom.series_of(path) == ""


def test_a_companion_folder_holds_no_slides(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b.mrxs").touch()
    pyramid(stained(256, 256), tmp_path / "a" / "b" / "Data0000.tif", 0.5)
    pyramid(stained(256, 256), tmp_path / "a" / "c.tif", 0.5)
    assert [r.path.name for r in list_slides([tmp_path])] == ["b.mrxs", "c.tif"]
