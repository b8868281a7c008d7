"""An OME-TIFF whose colours lie in planes is RGB where it is said, or seen; three stains are not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from mtdp_runtime.errors import SlideUnreadable
from mtdp_runtime.slide.open import open_slide
from support import read_square, stained

NAMESPACE = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
RED, GREEN, BLUE = -16776961, 16711935, 65535  # OME-XML: RGBA in a signed integer


def half(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    cells = image.reshape(image.shape[0] // 2, 2, image.shape[1] // 2, 2, 3)
    return np.rint(cells.mean(axis=(1, 3))).astype(np.uint8)


def xml(width: int, height: int, channels: list[str], size_c: int = 3, samples: int = 1, more: str = "") -> str:
    told = "".join(
        f'<Channel ID="Channel:0:{i}" SamplesPerPixel="{samples}" {said}/>' for i, said in enumerate(channels)
    )
    planes = "".join(f'<TiffData IFD="{i}" FirstC="{i}" PlaneCount="1"/>' for i in range(len(channels)))
    return (
        f'<?xml version="1.0" encoding="UTF-8"?><OME xmlns="{NAMESPACE}"><Image ID="Image:0"><Pixels ID="Pixels:0" '
        f'DimensionOrder="XYCZT" Type="uint8" SizeX="{width}" SizeY="{height}" SizeZ="1" SizeC="{size_c}" SizeT="1" '
        f'PhysicalSizeX="0.25" PhysicalSizeY="0.25" {more}>{told}{planes}</Pixels></Image></OME>'
    )


def toilet_roll(path: Path, image: NDArray[np.uint8], channels: list[str], levels: int = 0, tiled: bool = True) -> Path:
    """One directory for each channel, as raw2ometiff and libvips write it; smaller ones in SubIFDs."""
    layout = {"tile": (128, 128)} if tiled else {"rowsperstrip": 50}
    with tifffile.TiffWriter(path) as tiff:
        for c in range(image.shape[2]):
            description = xml(image.shape[1], image.shape[0], channels, image.shape[2]).encode() if c == 0 else None
            plane, how = np.ascontiguousarray(image[..., c]), {"photometric": "minisblack", "metadata": None}
            tiff.write(plane, subifds=levels, description=description, compression="zlib", **layout, **how)
            smaller = image
            for _ in range(levels):
                smaller = half(smaller)
                tiff.write(smaller[..., c].copy(), subfiletype=1, compression="zlib", **layout, **how)
    return path


@pytest.fixture(scope="module")
def image() -> NDArray[np.uint8]:
    return stained(400, 600)


SAID = {
    "nothing": ["", "", ""],
    "names": ['Name="Red"', 'Name="Green"', 'Name="Blue"'],
    "letters": ['Name="R"', 'Name="G"', 'Name="B"'],
    "numbers": ['Name="Channel 0"', 'Name="Channel 1"', 'Name="Channel 2"'],
    "colours": [f'Color="{RED}"', f'Color="{GREEN}"', f'Color="{BLUE}"'],
}


@pytest.mark.parametrize("suffix", [".ome.tif", ".ome.btf", ".tf8", ".qptiff", ".svs"])
@pytest.mark.parametrize("said", list(SAID))
def test_a_directory_for_each_of_red_green_and_blue(
    tmp_path: Path, image: NDArray[np.uint8], said: str, suffix: str
) -> None:
    path = toilet_roll(tmp_path / f"image{suffix}", image, SAID[said], levels=2, tiled=suffix != ".tf8")
    with open_slide(path) as slide:
        assert [(level.width, level.height) for level in slide.info.levels] == [(600, 400), (300, 200), (150, 100)]
        assert slide.info.mpp == 0.25
        np.testing.assert_array_equal(read_square(slide, 333, 251, 64, 1.0), image[251:315, 333:397])
        np.testing.assert_array_equal(read_square(slide, 200, 100, 64, 2.0), half(image)[50:114, 100:164])


@pytest.mark.parametrize("tiled", [True, False])
@pytest.mark.parametrize("compression", [None, "jpeg", "jpeg2000", "lzw"])
def test_a_directory_whose_planes_lie_apart(
    tmp_path: Path, image: NDArray[np.uint8], tiled: bool, compression: str | None
) -> None:
    path, layout = tmp_path / "image.ome.tif", {"tile": (128, 128)} if tiled else {"rowsperstrip": 50}
    with tifffile.TiffWriter(path) as tiff:
        description = xml(600, 400, [""], samples=3).encode()
        how = {"photometric": "rgb", "planarconfig": "separate", "metadata": None, "compression": compression}
        tiff.write(np.moveaxis(image, -1, 0).copy(), subifds=1, description=description, **layout, **how)
        tiff.write(np.moveaxis(half(image), -1, 0).copy(), subfiletype=1, **layout, **how)
    near = 12 if compression == "jpeg" else 0
    with open_slide(path) as slide:
        off = read_square(slide, 333, 251, 64, 1.0).astype(int) - image[251:315, 333:397]
        assert np.abs(off).max() <= near * 6
        assert np.abs(off).mean() <= near
        off = read_square(slide, 200, 100, 64, 2.0).astype(int) - half(image)[50:114, 100:164]
        assert np.abs(off).mean() <= near


@pytest.mark.parametrize("suffix", [".ome.tif", ".ome.btf", ".tf8", ".qptiff", ".svs"])
@pytest.mark.parametrize(
    ("channels", "message"),
    [
        (['Name="DAPI"', 'Name="FITC"', 'Name="Cy3"'], r"3 channels \(DAPI, FITC, Cy3\), not RGB"),
        (['EmissionWavelength="461"', "", ""], r"3 channels \(EmissionWavelength 461\), not RGB"),
        (['Fluor="Hoechst"', "", ""], "Fluor Hoechst"),
        (['ContrastMethod="Fluorescence"', "", ""], "Fluorescence"),
        (['Name="Green"', 'Name="Red"', 'Name="Blue"'], "Green, Red, Blue"),
        ([f'Color="{BLUE}"', f'Color="{GREEN}"', f'Color="{RED}"'], "shown in the colours 0000ff, 00ff00, ff0000"),
        (["", "", "", ""], "an image of 4 planes"),
        (["", ""], "an image of 2 planes"),
    ],
)
def test_channels_of_something_else_are_refused_under_every_name(
    tmp_path: Path, image: NDArray[np.uint8], channels: list[str], message: str, suffix: str
) -> None:
    pixels = np.dstack([image, image])[..., : len(channels)]
    with pytest.raises(SlideUnreadable, match=message):
        open_slide(toilet_roll(tmp_path / f"image{suffix}", pixels, channels))


def test_three_dark_channels_without_names_are_fluorescence(tmp_path: Path, image: NDArray[np.uint8]) -> None:
    dark = (255 - image) // 2
    with pytest.raises(SlideUnreadable, match="3 channels without names, dark as of fluorescence"):
        open_slide(toilet_roll(tmp_path / "a.ome.tif", dark, SAID["nothing"]))
    with open_slide(toilet_roll(tmp_path / "b.ome.tif", dark, SAID["names"])) as slide:
        np.testing.assert_array_equal(read_square(slide, 0, 0, 64, 1.0), dark[:64, :64])


def test_planes_of_depth_or_time_are_no_colours(tmp_path: Path, image: NDArray[np.uint8]) -> None:
    for axes in ("ZYX", "TYX"):
        path = tmp_path / f"{axes}.ome.tif"
        stack = np.moveaxis(image, -1, 0).copy()
        tifffile.imwrite(path, stack, photometric="minisblack", ome=True, metadata={"axes": axes})
        with pytest.raises(SlideUnreadable, match="an image of 3 planes"):
            open_slide(path)


@pytest.mark.parametrize("order", [(2, 1, 0), (1, 2, 0)])
def test_planes_may_lie_in_any_order_that_is_said(
    tmp_path: Path, image: NDArray[np.uint8], order: tuple[int, ...]
) -> None:
    told = xml(600, 400, SAID["names"])
    for ifd, channel in enumerate(order):
        told = told.replace(f'IFD="{ifd}" FirstC="{ifd}"', f'IFD="{ifd}" FirstC="{channel}"')
    path = tmp_path / "image.ome.tif"
    with tifffile.TiffWriter(path) as tiff:
        how = {"photometric": "minisblack", "metadata": None, "tile": (128, 128), "compression": "zlib"}
        for ifd, channel in enumerate(order):
            description = told.encode() if ifd == 0 else None
            tiff.write(image[..., channel].copy(), description=description, **how)
    with open_slide(path) as slide:
        np.testing.assert_array_equal(read_square(slide, 333, 251, 64, 1.0), image[251:315, 333:397])
