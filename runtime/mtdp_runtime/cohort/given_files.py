"""What a user gives with a slide: its mask, its tiles and their classes. What is wrong with them fails it alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from mtdp_runtime.cohort.requests import SlideRequest
from mtdp_runtime.cohort.tile_file import read_tiles
from mtdp_runtime.errors import RuntimeFailure, UsageError
from mtdp_runtime.slide import SlideInfo
from mtdp_runtime.tiling.given import Given
from mtdp_runtime.tiling.given_classes import check_classes_fit, load_classes
from mtdp_runtime.tiling.given_mask import check_fits, load_mask
from mtdp_runtime.tiling.given_tiles import list_tiles

T = TypeVar("T")


class GivenRefused(RuntimeFailure):
    """What is given with a slide cannot be read, or is another slide's: that fails its slide, and no other."""


def given_of(request: SlideRequest, info: SlideInfo, tile_px: int, mpp: float) -> Given:
    """Read what is given with a slide: its mask, its tiles and their classes.

    Args:
        request: the slide.
        info: its facts.
        tile_px: side of a tile.
        mpp: scale of the tiles, µm per pixel.

    Raises:
        GivenRefused: it cannot be read, or is another slide's.
        SlideError: the slide has no scale for such tiles.
    """
    given = read_given(request)
    fit_given(given, info, tile_px, mpp)
    return given


def read_given(request: SlideRequest) -> Given:
    """Read what is given with a slide, whatever is in the files.

    Raises:
        GivenRefused: it cannot be read as what it should be.
    """
    return Given(
        None if request.mask is None else _read(load_mask, request.mask, "mask"),
        None if request.coords is None else _read(read_tiles, request.coords, "list of tiles"),
        None if request.classes is None else _read(load_classes, request.classes, "file of classes"),
    )


def _read(load: Callable[[Path], T], path: Path, what: str) -> T:
    try:
        return load(path)
    except UsageError as error:
        raise GivenRefused(str(error), error.hint) from error
    except Exception as error:  # numbers, depths and sizes that nobody thought of
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise GivenRefused(
            f"{path}: cannot be read as a {what}: {said[:200]}", hint=f"Make the {what} again."
        ) from error


def fit_given(given: Given, info: SlideInfo, tile_px: int, mpp: float) -> None:
    """Make sure that what is given can be this slide's.

    Raises:
        GivenRefused: it cannot.
        SlideError: the slide has no scale for such tiles.
    """
    try:
        if given.mask is not None:
            check_fits(given.mask, info)
        if given.tiles is not None:
            list_tiles(given.tiles, info, tile_px, mpp)
        if given.classes is not None:
            check_classes_fit(given.classes, info)
    except UsageError as error:
        raise GivenRefused(str(error), error.hint) from error
