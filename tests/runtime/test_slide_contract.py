"""Every reader keeps the contract of a slide."""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import numpy as np
import openslide
from numpy.typing import NDArray
from PIL import Image

from contracts import HEIGHT, WIDTH, SlideContract
from mtdp_runtime.slide import Slide
from mtdp_runtime.slide.image import ImageReader
from mtdp_runtime.slide.open import open_slide
from mtdp_runtime.slide.openslide import OpenSlideReader
from mtdp_runtime.slide.tiled_tiff import TiledTiffReader
from mtdp_runtime.slide.wrappers import StagedSlide, WatchedSlide
from support import damage_tile, pyramid, stained


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


class TestWatched(OfATiff):
    def open(self, path: Path) -> Slide:
        return WatchedSlide(OpenSlideReader(path, None, ""), lambda: None)


class TestStaged(OfATiff):
    """Read from a copy, and told of the slide."""

    def open(self, path: Path) -> Slide:
        copy = path.with_name(f"copy-of-{path.name}")
        shutil.copy(path, copy)
        return WatchedSlide(StagedSlide(OpenSlideReader(copy, None, ""), copy, path), lambda: None, path)
