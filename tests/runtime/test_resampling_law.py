"""One law of resampling for every reader: a tile is the exact area average of the source that the reader names.

The oracle is written plainly: cumulative sums in float64, read at fractional places, differ by the sum over a cell.
"""

from __future__ import annotations

import doctest
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

import mtdp_runtime.slide.source
import mtdp_runtime.slide.window
from mtdp_runtime.slide import Slide, Source
from mtdp_runtime.slide.image import ImageReader
from mtdp_runtime.slide.open import open_slide
from mtdp_runtime.slide.openslide import OpenSlideReader
from mtdp_runtime.slide.source import LEAST_LEFT, factor_of, overview_source, source_at
from mtdp_runtime.slide.tiled_tiff import TiledTiffReader
from mtdp_runtime.slide.window import Window

SCALES = [1.0, 1.002, 1.25, 1.979, 2.0, 2.035, 2.5, 3.0, 4.0, 4.008, 6.0, 8.0, 16.3, 33.0]
SIDE_PX = 26  # of a tile: 858 level-0 pixels at 33
TRUE, ODD = (1040, 880), (1043, 885)  # width, height: multiples of 16, and of nothing
APERIO = "Aperio Image Library v11\n{0}x{1} [0,0 {0}x{1}] (64x64) J2K|MPP = 0.25"
OME = (
    '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0">'
    '<Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" SizeX="{0}" SizeY="{1}" SizeZ="1" SizeC="3" SizeT="1" '
    'PhysicalSizeX="0.25" PhysicalSizeY="0.25"><Channel ID="Channel:0:0" SamplesPerPixel="3"/>'
    '<TiffData IFD="0" PlaneCount="1"/></Pixels></Image></OME>'
)


@cache
def tissue(width: int, height: int) -> NDArray[np.uint8]:
    """uint8[height, width, 3]: as sharp as a scan, which is a little softer than its pixels."""
    rng = np.random.default_rng(7)
    noise = rng.normal(0, 1, (2, height, width)).astype(np.float32)
    fine, coarse = (cv2.GaussianBlur(layer, (0, 0), sigma) for layer, sigma in zip(noise, (1.0, 5), strict=True))
    stains = (
        np.array((20, 25, 16)) * (fine / fine.std())[..., None]
        + np.array((9, 25, 20)) * (coarse / coarse.std())[..., None]
    )
    image = np.array((190, 120, 165), np.float32) + stains
    return np.clip(image, 0, 255).astype(np.uint8)


@cache
def levels_of(width: int, height: int) -> tuple[NDArray[np.uint8], ...]:
    """The levels of a true pyramid: means over 4 x 4 pixels and 16 x 16, of level 0; what is left over is cut off."""
    image = tissue(width, height)
    found = [image]
    for factor in (4, 16):
        rows, columns = height // factor, width // factor
        cells = image[: rows * factor, : columns * factor].reshape(rows, factor, columns, factor, 3)
        found.append(np.rint(cells.mean(axis=(1, 3))).astype(np.uint8))
    return tuple(found)


def average(image: NDArray[np.uint8], x: float, y: float, side: int, scale: float) -> NDArray[np.float64]:
    """float64[side, side, 3]: the mean over each cell of scale x scale pixels; white lies outside."""
    across, down = x + np.arange(side + 1) * scale, y + np.arange(side + 1) * scale
    left, top = int(max(across[0], 0)), int(max(down[0], 0))
    part = image[top : int(down[-1]) + 2, left : int(across[-1]) + 2].astype(np.float64) - 255
    sums = np.zeros((part.shape[0] + 1, part.shape[1] + 1, 3))
    sums[1:, 1:] = part.cumsum(axis=0).cumsum(axis=1)
    inside = between(between(sums, down - top).swapaxes(0, 1), across - left).swapaxes(0, 1)
    return 255 + np.diff(np.diff(inside, axis=0), axis=1) / scale**2


def between(rows: NDArray[np.float64], places: NDArray[np.float64]) -> NDArray[np.float64]:
    """The rows at fractional places, linearly: exact for sums over pixels, which are constant inside."""
    clipped = np.clip(places, 0, len(rows) - 1)
    low = np.minimum(clipped.astype(int), len(rows) - 2)
    part = (clipped - low)[:, None, None]
    return rows[low] * (1 - part) + rows[low + 1] * part


def sharpness(tile: NDArray[np.uint8] | NDArray[np.float64]) -> float:
    return float(cv2.Laplacian(tile.astype(np.float64).mean(axis=2), cv2.CV_64F).var())


@dataclass(frozen=True)
class Written:
    """A slide on disk, opened; and what is in it, as decoders of other libraries give it."""

    slide: Slide
    path: Path
    size: tuple[int, int]
    lossy: bool

    def pixels(self, source: Source) -> NDArray[np.uint8]:
        """uint8[H, W, 3]: the whole pixels of a source, and its last ones again where it ends before level 0 does."""
        image = levels_of(*self.size)[source.level]
        if self.lossy:
            image = decoded(self.path, source.level, source.reduction)
        factor = factor_of(self.slide.info, source)
        covered = [math.ceil(side / factor - 1e-6) for side in self.size[::-1]]
        missing = [max(0, need - has) for need, has in zip(covered, image.shape[:2], strict=True)]
        return np.pad(image, [(0, missing[0]), (0, missing[1]), (0, 0)], mode="edge")


@cache
def decoded(path: Path, level: int, reduction: int) -> NDArray[np.uint8]:
    """A level of JPEG tiles, each at 1/reduction, by Pillow."""
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[level].aspage()
        if reduction == 1:
            return np.asarray(page.asarray())
        side, across = page.tilewidth // reduction, -(-page.imagewidth // page.tilewidth)
        image = np.zeros((len(page.dataoffsets) // across * side, across * side, 3), np.uint8)
        for number, (offset, size) in enumerate(zip(page.dataoffsets, page.databytecounts, strict=True)):
            tiff.filehandle.seek(offset)
            with Image.open(io.BytesIO(tiff.filehandle.read(size))) as tile:
                tile.draft("RGB", (side, side))
                y, x = number // across * side, number % across * side
                image[y : y + side, x : x + side] = np.asarray(tile)
        return image[: page.imagelength // reduction, : page.imagewidth // reduction]


def write(path: Path, size: tuple[int, int], kind: str) -> Path:
    levels = levels_of(*size)
    if kind == "plain":
        Image.fromarray(levels[0]).save(path.with_suffix(".png"))
        return path.with_suffix(".png")
    if kind == "JPEG 2000":
        path = path.with_suffix(".svs")
    options: dict[str, object] = {"tile": (64, 64), "photometric": "rgb", "metadata": None}
    options |= {
        "JPEG 4:4:4": {"compression": "jpeg", "compressionargs": {"level": 95}, "subsampling": (1, 1)},
        "JPEG 4:2:0": {"compression": "jpeg", "compressionargs": {"level": 95}, "subsampling": (2, 2)},
        "JPEG 4:2:2": {"compression": "jpeg", "compressionargs": {"level": 95}, "subsampling": (2, 1)},
        "JPEG 2000": {"compression": 33005},
        "OpenSlide": {"compression": "zlib"},
        "OME-TIFF": {"compression": "zlib", "subifds": 2},
    }[kind]
    texts = {"JPEG 2000": APERIO, "OME-TIFF": OME}
    with tifffile.TiffWriter(path) as tiff:
        for number, level in enumerate(levels):
            if number and kind == "OME-TIFF":
                options.pop("subifds", None)
            text = texts[kind].format(*size) if kind in texts and not number else None
            if kind == "JPEG 2000":
                data = iter([imagecodecs.jpeg2k_encode(tile, codecformat="j2k") for tile in tiles_of(level)])
                tiff.write(data, shape=level.shape, dtype="uint8", description=text, **options)
            else:
                tiff.write(level, subfiletype=min(number, 1), description=text, **options)
    return path


def tiles_of(level: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    padded = np.pad(level, [(0, -level.shape[0] % 64), (0, -level.shape[1] % 64), (0, 0)], mode="edge")
    for y in range(0, padded.shape[0], 64):
        for x in range(0, padded.shape[1], 64):
            yield np.ascontiguousarray(padded[y : y + 64, x : x + 64])


READERS = {
    "JPEG 4:4:4": TiledTiffReader,
    "JPEG 4:2:0": TiledTiffReader,
    "JPEG 4:2:2": TiledTiffReader,
    "JPEG 2000": TiledTiffReader,
    "OpenSlide": OpenSlideReader,
    "OME-TIFF": ImageReader,
    "plain": ImageReader,
}


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, tuple[int, int]], Written]]:
    folder, found = tmp_path_factory.mktemp("law"), {}

    def get(kind: str, size: tuple[int, int]) -> Written:
        if (kind, size) not in found:
            path = write(folder / f"{kind.replace(':', '').replace(' ', '-')}-{size[0]}.tiff", size, kind)
            slide = open_slide(path, 0.25)
            assert isinstance(slide, READERS[kind]), slide.info.reader_reason
            found[kind, size] = Written(slide, path, size, lossy="4:" in kind)
        return found[kind, size]

    yield get
    for written in found.values():
        written.slide.close()


def read(slide: Slide, x: int, y: int, scale: float, side: int = SIDE_PX) -> NDArray[np.uint8]:
    out = np.zeros((side, side, 3), np.uint8)
    slide.read_into(out, x, y, scale)
    return out


def places(width: int, height: int, scale: float) -> list[tuple[int, int]]:
    """Aligned and not, and so that the tile ends with the slide's last pixels."""
    most = max(1, round(scale))
    last_x, last_y = int(width - SIDE_PX * scale), int(height - SIDE_PX * scale)
    return [(0, 0), (10 * most, 3 * most), (37, 91), (last_x, last_y), (last_x - last_x % most, last_y - last_y % most)]


@pytest.mark.parametrize("size", [TRUE, ODD], ids=str)
@pytest.mark.parametrize("kind", list(READERS))
def test_a_tile_is_the_exact_average_of_the_source_that_the_reader_names(
    opened: Callable[[str, tuple[int, int]], Written], kind: str, size: tuple[int, int]
) -> None:
    written = opened(kind, size)
    info = written.slide.info
    for scale in SCALES:
        for x, y in places(*size, scale):
            source = source_at(info, x, y, scale, SIDE_PX)
            factor = factor_of(info, source)
            exact = average(written.pixels(source), x / factor, y / factor, SIDE_PX, scale / factor)
            tile, at = read(written.slide, x, y, scale), f"{kind} {scale} ({x}, {y}) {source}"
            assert np.abs(tile - exact).max() < 0.52, at
            assert sharpness(tile) == pytest.approx(sharpness(exact), rel=0.03), at
            if not written.lossy and factor == round(factor):  # as it is in a true pyramid
                assert np.abs(tile - average(tissue(*size), x, y, SIDE_PX, scale)).mean() <= 1.0, at


@pytest.mark.parametrize("kind", list(READERS))
def test_a_coarser_source_is_taken_only_where_it_does_not_blur(
    opened: Callable[[str, tuple[int, int]], Written], kind: str
) -> None:
    info = opened(kind, TRUE).slide.info
    for scale in SCALES:
        for x, y in places(*TRUE, scale):
            source = source_at(info, x, y, scale, SIDE_PX)
            factor = factor_of(info, source)
            if factor > 1 and scale / factor < LEAST_LEFT:
                assert (scale, x % factor, y % factor) == (factor, 0, 0), (kind, x, y)


def test_what_the_law_chooses(opened: Callable[[str, tuple[int, int]], Written]) -> None:
    def chosen(kind: str, scale: float, x: int = 0) -> Source:
        return source_at(opened(kind, TRUE).slide.info, x, 0, scale, 224)

    for jpeg in ("JPEG 4:4:4", "JPEG 4:2:0", "JPEG 4:2:2"):
        assert opened(jpeg, TRUE).slide.info.reductions == (2, 4, 8), "for overviews alone"
        assert [chosen(jpeg, s) for s in (1.0, 2.0, 2.004, 3.0, 4.0, 8.0, 33.0)] == [
            Source(0), Source(0), Source(0), Source(0), Source(1), Source(0), Source(1),
        ]  # fmt: skip
        assert chosen(jpeg, 4.0, 2) == Source(0)
    assert [chosen("JPEG 2000", s) for s in (2.0, 4.0, 4.002, 8.0, 16.0, 31.9, 32.1)] == [
        Source(0), Source(1), Source(0), Source(0), Source(2), Source(0), Source(1),
    ]  # fmt: skip
    assert overview_source(opened("JPEG 2000", TRUE).slide.info, 5.0) == Source(1, rough=True)
    assert overview_source(opened("JPEG 4:2:2", TRUE).slide.info, 9.0) == Source(1, 2, rough=True)


@pytest.mark.parametrize("kind", list(READERS))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    scale=st.sampled_from([0.9, 1.25, 1.5, 2.0, 2.5, 4.0, 4.25, 8.0, 8.5, 16.5]),
    x=st.integers(0, 250),
    y=st.integers(0, 200),
    across=st.integers(0, 2),
    down=st.integers(0, 2),
)
def test_moving_a_window_by_whole_output_pixels_moves_its_tile(
    opened: Callable[[str, tuple[int, int]], Written], kind: str, scale: float, x: int, y: int, across: int, down: int
) -> None:
    """By as many as make whole pixels of level 0, for the API takes no others."""
    slide, side = opened(kind, ODD).slide, 32
    step = next(n for n in range(1, 11) if (n * scale).is_integer())
    across, down = across * step, down * step
    source = source_at(slide.info, x, y, scale, side)
    first, second = np.zeros((side, side, 3), np.uint8), np.zeros((side, side, 3), np.uint8)
    slide.read_into(first, x, y, scale, source)
    slide.read_into(second, x + round(across * scale), y + round(down * scale), scale, source)
    same = first[down:, across:].astype(int) - second[: side - down, : side - across]
    assert np.abs(same).max() <= 1
    assert (same != 0).mean() < 0.002, "values between two grey levels may be rounded either way, and nothing else"


@pytest.mark.parametrize("piece_px", [64, 100])
@pytest.mark.parametrize("kind", ["JPEG 4:4:4", "OpenSlide", "OME-TIFF"])
def test_a_large_window_is_read_in_pieces_that_do_not_show(
    opened: Callable[[str, tuple[int, int]], Written], monkeypatch: pytest.MonkeyPatch, kind: str, piece_px: int
) -> None:
    slide, largest = opened(kind, ODD).slide, []
    for scale in (0.95, 1.002, 2.0, 2.5, 16.3):
        out_px = int(880 / scale)
        whole = read(slide, 0, 0, scale, out_px)
        with monkeypatch.context() as patch:
            patch.setattr(mtdp_runtime.slide.window, "PIECE_PX", piece_px)
            fill = type(slide)._fill  # type: ignore[attr-defined]

            def noting(self: Slide, target: NDArray[np.uint8], window: object, fill=fill) -> None:  # type: ignore[no-untyped-def]
                largest.append(max(target.shape[:2]))
                fill(self, target, window)

            patch.setattr(type(slide), "_fill", noting)
            pieces = read(slide, 0, 0, scale, out_px)
        assert np.abs(whole.astype(int) - pieces).max() <= 1, scale
        assert (whole != pieces).mean() < 0.002, scale
    assert max(largest) <= piece_px


SIZES = [
    (2000, 1500, 2),
    (2001, 1501, 2),
    (2003, 1502, 4),
    (1999, 2049, 3),
    (4001, 130, 2),
    (160, 4100, 8),
    (700, 501, 16),
]
ODD_LEVELS = [("TIFF", *size) for size in SIZES] + [("DICOM", *size) for size in SIZES[1:4]]


@pytest.fixture(scope="module", params=ODD_LEVELS, ids=str)
def odd_pyramid(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[OpenSlideReader, NDArray[np.uint8]]]:
    """A level of noise, in which a blend of neighbours cannot hide, below a level 0 that is its mean."""
    kind, width, height, factor = request.param
    level = np.random.default_rng(1).integers(0, 256, (height // factor, width // factor, 3), np.uint8)
    images = (np.full((height, width, 3), 128, np.uint8), level)
    folder = tmp_path_factory.mktemp("odd")
    if kind == "TIFF":
        path = folder / "odd.tiff"
        with tifffile.TiffWriter(path) as tiff:
            for number, image in enumerate(images):
                options = {"compression": "zlib", "metadata": None, "subfiletype": min(number, 1)}
                tiff.write(image, tile=(128, 128), photometric="rgb", **options)
    else:
        for number, image in enumerate(images):
            path = write_dicom(folder / f"{number}.dcm", image)
    with OpenSlideReader(path, 0.25, "test") as slide:
        yield slide, level


def write_dicom(path: Path, image: NDArray[np.uint8]) -> Path:
    """Write an uncompressed level of a series: as little as OpenSlide asks for."""
    pydicom = pytest.importorskip("pydicom")
    meta, data, measures, shared = (pydicom.Dataset() for _ in range(4))
    meta = pydicom.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID = data.SOPClassUID = "1.2.840.10008.5.1.4.1.1.77.1.6"
    meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = pydicom.uid.generate_uid()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    tiles = list(tiles_of(image))
    data.file_meta, data.Modality, data.SeriesInstanceUID, data.ImageType = (
        meta,
        "SM",
        "1.2.3",
        ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"],
    )
    data.Rows = data.Columns = 64
    data.TotalPixelMatrixRows, data.TotalPixelMatrixColumns, data.NumberOfFrames = *image.shape[:2], len(tiles)
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PlanarConfiguration = 3, "RGB", 0
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 8, 8, 7, 0
    data.NumberOfOpticalPaths = data.TotalPixelMatrixFocalPlanes = 1
    data.DimensionOrganizationType = "TILED_FULL"
    measures.PixelSpacing = ["0.00025", "0.00025"]
    shared.PixelMeasuresSequence = [measures]
    data.SharedFunctionalGroupsSequence = [shared]
    data.PixelData = b"".join(tile.tobytes() for tile in tiles)
    data["PixelData"].VR = "OB"
    data.save_as(path, enforce_file_format=True, implicit_vr=False, little_endian=True)
    return path


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_openslide_blends_no_pixel_of_any_level(
    odd_pyramid: tuple[OpenSlideReader, NDArray[np.uint8]], data: st.DataObject
) -> None:
    """Whatever the downsample, the place and the size, and also where a plain question would make OpenSlide blend."""
    slide, level = odd_pyramid
    assert slide.info.levels[1].whole
    height, width = level.shape[:2]
    x, y = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    w, h = data.draw(st.integers(1, min(width - x, 300))), data.draw(st.integers(1, min(height - y, 300)))
    out = np.zeros((h, w, 3), np.uint8)
    slide._fill(out, Window(Source(1), x, y, w, h, 0, 0, 1.0))
    np.testing.assert_array_equal(out, level[y : y + h, x : x + w])


def test_a_huge_window_is_read_in_small_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thumbnail of a slide without a pyramid: 430 MB of pixels, of which only some tiles were scanned."""
    path, side, tile = tmp_path / "huge.ome.tif", 12_000, 512
    across, code = -(-side // tile), imagecodecs.zlib_encode(np.full((tile, tile, 3), 100, np.uint8).tobytes(), level=1)
    tiles = (code if number % 97 == 0 else b"" for number in range(across * across))
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        options = {"photometric": "rgb", "compression": "zlib", "metadata": None, "description": OME.format(side, side)}
        tiff.write(tiles, shape=(side, side, 3), dtype="uint8", tile=(tile, tile), **options)
    largest, fill = [], ImageReader._fill

    def noting(self: ImageReader, target: NDArray[np.uint8], window: Window) -> None:
        largest.append(target.nbytes)
        fill(self, target, window)

    monkeypatch.setattr(ImageReader, "_fill", noting)
    with open_slide(path, 0.25) as slide:
        out = read(slide, 0, 0, side / 40, 40)
    assert max(largest) <= 3 * mtdp_runtime.slide.window.PIECE_PX**2
    assert 230 < out.mean() < 255


def test_a_level_that_openslide_would_blend_is_for_overviews_only(tmp_path: Path) -> None:
    """Of 9001 columns halved, the middle ones lie a quarter of a pixel from any place that OpenSlide knows."""
    path = tmp_path / "wide.tiff"
    rng = np.random.default_rng(0)
    with tifffile.TiffWriter(path) as tiff:
        for number, size in enumerate(((64, 9001, 3), (32, 4500, 3))):
            image = rng.integers(0, 256, size, np.uint8)
            tiff.write(
                image, tile=(64, 64), photometric="rgb", compression="zlib", metadata=None, subfiletype=min(number, 1)
            )
    with OpenSlideReader(path, 0.25, "test") as slide:
        assert [level.whole for level in slide.info.levels] == [True, False]
        assert source_at(slide.info, 0, 0, 32.0, 2) == Source(0)
        assert overview_source(slide.info, 8.0) == Source(1, rough=True)
        asked, own = np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8, 3), np.uint8)
        slide.read_into(asked, 4400, 0, 2.0, Source(1))  # as a reader may that sees the file itself
        slide.read_into(own, 4400, 0, 2.0, Source(0))
        np.testing.assert_array_equal(asked, own)


def test_pieces_tile_a_window() -> None:
    for out_px, scale in ((1, 1.0), (224, 2.035), (1000, 60.0), (5000, 1.0), (3, 5000.0)):
        parts = list(mtdp_runtime.slide.window._parts(out_px, scale))
        assert parts[0][0] == 0
        assert parts[-1][1] == out_px
        assert all(first[1] == second[0] for first, second in pairwise(parts))
        assert all((end - start) * scale <= 2048 or end - start == 1 for start, end in parts)


def test_doctests() -> None:
    for module in (mtdp_runtime.slide.source, mtdp_runtime.slide.window):
        assert doctest.testmod(module).failed == 0
