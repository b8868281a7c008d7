"""Golden tiles: the inputs on which a bundle proves what it computes, kept in it as golden.npz."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from mtdp_export.errors import ExportError, ExportUsageError
from mtdp_runtime.bundle.golden import TILES
from mtdp_runtime.errors import SlideScaleUnknown
from mtdp_runtime.settings import ExtractSettings
from mtdp_runtime.slide.open import open_slide
from mtdp_runtime.tiling.plan import make_plan

_SEED: Final = 5561
_STAINED: Final = 12
_FROM_IMAGES: Final = 32
_FROM_A_SLIDE: Final = 16
_QUICKHASH_DIGITS: Final = 16  # of 64: enough to find a slide by
_IMAGE_SUFFIXES: Final = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"})
_ZIP_EPOCH: Final = (1980, 1, 1, 0, 0, 0)


def synthetic_tiles(tile_px: int) -> NDArray[np.uint8]:
    """Return uint8[16, tile_px, tile_px, 3]: stained texture with nuclei; white, black, noise and an edge.

    The same tile_px gives the same bytes.
    """
    rng = np.random.default_rng(_SEED)
    tiles = [_stained(rng, tile_px) for _ in range(_STAINED)]
    edge = np.full((tile_px, tile_px, 3), 243, np.uint8)
    edge[:, tile_px // 2 :] = tiles[0][:, tile_px // 2 :]
    noise = rng.integers(0, 256, (tile_px, tile_px, 3), np.uint8)
    tiles += [np.full_like(edge, 255), np.zeros_like(edge), noise, edge]
    return np.stack(tiles)


def calibration_tiles(source: Path, tile_px: int, mpp: float, most: int | None = None) -> NDArray[np.uint8]:
    """Return uint8[N, tile_px, tile_px, 3] of a folder of images, or of a slide's tissue at the given scale.

    At most `most`, spread evenly; as many as golden tiles where None.

    Raises:
        ExportUsageError: there is nothing to take.
        SlideError: the slide cannot be read.
    """
    if source.is_dir():
        return _from_images(source, tile_px, most or _FROM_IMAGES)
    return _from_slide(source, tile_px, mpp, most or _FROM_A_SLIDE)


def describe_source(calibration: Path | None, count: int) -> str:
    """Say in bundle.json's words where `count` golden tiles come from.

    Without a file name: slides are often named after patients, and a bundle is passed on. Whoever has the slide finds
    it by its quickhash, OpenSlide's digest of the content; feature files hold it, too.
    """
    if calibration is None:
        return "synthetic"
    if calibration.is_dir():
        return f"{count} images"
    with open_slide(calibration) as slide:
        quickhash = slide.info.quickhash[:_QUICKHASH_DIGITS]
    return f"{count} tiles of a slide" + (f" with quickhash {quickhash}" if quickhash else "")


def _from_slide(path: Path, tile_px: int, mpp: float, most: int) -> NDArray[np.uint8]:
    settings = ExtractSettings(mpp=mpp, stride_px=tile_px, min_tissue=0.5)
    with open_slide(path) as slide:
        try:
            plan = make_plan(slide, tile_px, settings)
        except SlideScaleUnknown as error:  # its hint is an option of mtdp-extract
            raise ExportUsageError(f"--calibration: {error}", "give a slide that states its scale") from error
        if not len(plan.kept):
            raise ExportUsageError(f"--calibration {path}: no tile with tissue", "give another slide")
        picked = np.linspace(0, len(plan.kept) - 1, min(most, len(plan.kept))).astype(int)
        tiles = np.empty((len(picked), tile_px, tile_px, 3), np.uint8)
        for tile, (x0, y0) in zip(tiles, plan.coords[picked].tolist(), strict=True):
            slide.read_into(tile, x0, y0, plan.grid.scale, plan.source)
    return tiles


def _from_images(folder: Path, tile_px: int, most: int) -> NDArray[np.uint8]:
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in _IMAGE_SUFFIXES)
    if not files:
        raise ExportUsageError(
            f"--calibration {folder}: no images there",
            "give a folder of PNG or JPEG tiles, or a slide (of DICOM, one of its files)",
        )
    picked = [files[i] for i in np.linspace(0, len(files) - 1, min(most, len(files))).astype(int)]
    return np.stack([_centre(file, tile_px) for file in picked])


def save_golden(path: Path, tiles: NDArray[np.uint8], outputs: Mapping[str, NDArray[np.float32]]) -> None:
    """Write tiles and outputs as a compressed .npz whose bytes depend on them alone (no time of day in it)."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in ((TILES, tiles), *sorted(outputs.items())):
            buffer = BytesIO()
            np.lib.format.write_array(buffer, np.ascontiguousarray(array), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", _ZIP_EPOCH), buffer.getvalue(), zipfile.ZIP_DEFLATED)


def check_sees(features: NDArray[np.float32], tiles: NDArray[np.uint8]) -> None:
    """Refuse features that are the same for every tile: any graph would repeat them, and they would prove nothing.

    Raises:
        ExportError: float32[N, D] does not depend on tiles that differ.
    """
    if (tiles != tiles[:1]).any() and not (features != features[:1]).any():
        raise ExportError(
            f"the network's features are the same for all {len(tiles)} golden tiles, which differ",
            "Nothing was written. Its weights are not those of a trained network, or another output is the feature.",
        )


def _stained(rng: np.random.Generator, tile_px: int) -> NDArray[np.uint8]:
    """Return uint8[tile_px, tile_px, 3]: eosin of changing strength, haematoxylin dots, grain."""
    coarse = rng.uniform(-1, 1, (8, 8)).astype(np.float32)
    smooth = cv2.resize(coarse, (tile_px, tile_px), interpolation=cv2.INTER_CUBIC)[..., None]
    eosin = np.array(rng.uniform((200, 110, 150), (240, 190, 215)), np.float32)
    image = eosin + smooth * np.array((18, 34, 24), np.float32)
    image = np.ascontiguousarray(np.clip(image, 0, 255).astype(np.uint8))
    for _ in range(int(rng.integers(10, 90))):
        centre = [int(v) for v in rng.integers(0, tile_px, 2)]
        axes = [int(v) for v in rng.integers(max(2, tile_px // 50), max(4, tile_px // 18), 2)]
        colour = [int(v) for v in rng.uniform((70, 40, 110), (130, 90, 170))]
        cv2.ellipse(image, centre, axes, float(rng.uniform(0, 180)), 0, 360, colour, -1, cv2.LINE_AA)
    grain = rng.integers(-6, 7, image.shape)
    stained: NDArray[np.uint8] = np.clip(image.astype(np.int64) + grain, 0, 255).astype(np.uint8)
    return stained


def _centre(file: Path, tile_px: int) -> NDArray[np.uint8]:
    try:
        image = cv2.imread(str(file), cv2.IMREAD_COLOR_RGB)
    except cv2.error:  # larger than it reads: a slide among the tiles
        image = None
    if image is None:
        raise ExportUsageError(f"--calibration: {file}: cannot be decoded", "remove it from the folder")
    side = min(image.shape[:2])
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    square = image[top : top + side, left : left + side]
    method = cv2.INTER_AREA if side > tile_px else cv2.INTER_LINEAR
    tile: NDArray[np.uint8] = cv2.resize(square, (tile_px, tile_px), interpolation=method)
    return tile
