"""Every reader keeps the contract of a slide."""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import numpy as np
import openslide
import pydicom.encaps
import pytest
from numpy.typing import NDArray
from PIL import Image

from contracts import HEIGHT, WIDTH, SlideContract
from dicom_files import RLE, Written, rle, tiles_of, write_dicom
from mtdp_runtime.slide import Slide
from mtdp_runtime.slide.dicom_slide import DicomReader
from mtdp_runtime.slide.image import ImageReader
from mtdp_runtime.slide.open import open_slide
from mtdp_runtime.slide.openslide import OpenSlideReader
from mtdp_runtime.slide.tiled_tiff import TiledTiffReader
from mtdp_runtime.slide.wrappers import StagedSlide, WatchedSlide
from support import damage_tile, pyramid, stained
from zarr_files import half, write_zarr


class OfATiff(SlideContract):
    """A tiled TIFF of three levels."""

    lossy = False

    @classmethod
    def write(cls, folder: Path) -> Path:
        image = stained(HEIGHT, WIDTH)
        if cls.lossy:  # JPEG keeps what is smooth
            image = np.asarray(cv2.GaussianBlur(image, (0, 0), 4))
        return pyramid(image, folder / "slide.tiff", 0.5, 3, cls.lossy)

    @classmethod
    def read_plainly(cls, path: Path) -> NDArray[np.uint8]:
        with openslide.OpenSlide(path) as plain:
            return np.asarray(plain.read_region((0, 0), 0, (WIDTH, HEIGHT)).convert("RGB"))

    def damaged(self, path: Path, folder: Path) -> Path | None:
        damaged = folder / "damaged.tiff"
        shutil.copy(path, damaged)
        damage_tile(damaged, 0)
        return damaged


class TestOpenSlide(OfATiff):
    def open(self, path: Path) -> Slide:
        return OpenSlideReader(path, None, "")


class TestTiledTiff(OfATiff):
    lossy = True
    own_decoder = True
    mean_error = 3.0  # the levels of this slide are JPEG, too

    def open(self, path: Path) -> Slide:
        opened = open_slide(path)
        assert isinstance(opened, TiledTiffReader)
        return opened


class TestImage(SlideContract):
    @classmethod
    def write(cls, folder: Path) -> Path:
        path = folder / "image.png"
        Image.fromarray(stained(HEIGHT, WIDTH)).save(path)
        return path

    @classmethod
    def read_plainly(cls, path: Path) -> NDArray[np.uint8]:
        return np.asarray(Image.open(path))

    def open(self, path: Path) -> Slide:
        return ImageReader(path, 0.5, "the test", "a test wants it")


class TestDicom(SlideContract):
    """A series of three files, a level each, whose frames are run-length encoded: without loss, and damage is seen."""

    own_decoder = True

    @classmethod
    def write(cls, folder: Path) -> Path:
        finest = stained(HEIGHT, WIDTH)
        for level, image in enumerate((finest, half(finest), half(half(finest)))):
            mpp = 0.5 * 2**level
            says = Written((image.shape[1], image.shape[0]), syntax=RLE, mpp=(mpp, mpp))
            write_dicom(folder / f"{level}.dcm", [rle(tile) for tile in tiles_of(image, says.tile)], says)
        return folder / "0.dcm"

    @classmethod
    def read_plainly(cls, path: Path) -> NDArray[np.uint8]:
        side = 64
        frames = pydicom.dcmread(path).pixel_array
        across, down = -(-WIDTH // side), -(-HEIGHT // side)
        rows = frames.reshape(down, across, side, side, 3).transpose(0, 2, 1, 3, 4)
        return np.asarray(rows.reshape(down * side, across * side, 3)[:HEIGHT, :WIDTH])

    def open(self, path: Path) -> Slide:
        opened = open_slide(path)
        assert isinstance(opened, DicomReader)
        return opened

    def damaged(self, path: Path, folder: Path) -> Path | None:
        for file in path.parent.iterdir():
            shutil.copy(file, folder)
        damaged = folder / path.name
        content = damaged.read_bytes()
        first = next(pydicom.encaps.generate_frames(pydicom.dcmread(path).PixelData, number_of_frames=150))
        damaged.write_bytes(content.replace(first, b"\xff" * len(first), 1))
        return damaged


class TestOmeZarr(SlideContract):
    """A folder of chunks: a lost one is damage."""

    @classmethod
    def write(cls, folder: Path) -> Path:
        pytest.importorskip("zarr")
        return write_zarr(folder / "slide.ome.zarr", stained(HEIGHT, WIDTH), mpp=0.5)

    @classmethod
    def read_plainly(cls, path: Path) -> NDArray[np.uint8]:
        import zarr

        return np.moveaxis(np.asarray(zarr.open_array(str(path / "0"), mode="r"))[0, :, 0], 0, 2)

    def size_bytes(self, path: Path) -> int:
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())

    def open(self, path: Path) -> Slide:
        opened = open_slide(path)
        assert isinstance(opened, ImageReader)
        return opened

    def damaged(self, path: Path, folder: Path) -> Path | None:
        damaged = folder / path.name
        shutil.copytree(path, damaged)
        chunks = sorted(file for file in (damaged / "0").rglob("*") if file.is_file() and file.name[0] != ".")
        chunks[0].unlink()  # the top left, in red
        return damaged


class TestWatched(OfATiff):
    def open(self, path: Path) -> Slide:
        return WatchedSlide(OpenSlideReader(path, None, ""), lambda: None)


class TestStaged(OfATiff):
    """Read from a copy, and told of the slide."""

    def open(self, path: Path) -> Slide:
        copy = path.with_name(f"copy-of-{path.name}")
        shutil.copy(path, copy)
        return WatchedSlide(StagedSlide(OpenSlideReader(copy, None, ""), copy, path), lambda: None, path)
