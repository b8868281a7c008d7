"""What all converters share in reading a download: folders and files that must be there, sizes, names of groups."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mtdp.errors import ImageUnreadable, TaskError, UsageError
from mtdp.images import FORMATS, check_jpeg
from mtdp.images import read_rgb as open_rgb

_SHOWN = 5


def expect_folder(path: Path, holds: str) -> Path:
    """The folder itself.

    Raises:
        UsageError: there is none; the message says what should be in it.
    """
    if not path.is_dir():
        raise UsageError(f"no folder {path}", f"it should hold {holds}")
    return path


def find(root: Path, patterns: Sequence[str], expected: str) -> list[Path]:
    """Files below root, sorted by path, that match one of the glob patterns; hidden ones are left out.

    Raises:
        TaskError: none does; the message says what was expected and what is there instead.
    """
    found = sorted({file for pattern in patterns for file in root.rglob(pattern) if not _hidden(file, root)})
    if not found:
        raise TaskError(f"{root} does not hold {expected}", f"it holds {contents(root)}; give the unpacked download")
    return found


def _hidden(path: Path, root: Path) -> bool:
    """Tell the `._name` twins that macOS leaves in archives."""
    return any(part.startswith((".", "__MACOSX")) for part in path.relative_to(root).parts)


def contents(folder: Path) -> str:
    """The first names in a folder, for a message."""
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(names[:_SHOWN]) + more) or "nothing"


def expect_file(path: Path, belongs_to: Path) -> Path:
    """The file itself.

    Raises:
        TaskError: it is missing; the message names it and the file that it belongs to.
    """
    if not path.is_file():
        raise TaskError(f"{path} is missing, which belongs to {belongs_to}", "is the download complete?")
    return path


def group_name(raw: str) -> str:
    """A group as the task layout can carry it: the first underscore of a file name ends the group.

    >>> group_name("sj-03-2810 a_b")
    'sj-03-2810-a-b'
    """
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", raw).strip("-.")


def match(pattern: re.Pattern[str], path: Path, example: str) -> re.Match[str]:
    """The file's name, parsed.

    Raises:
        TaskError: it does not look as expected.
    """
    found = pattern.search(path.name)
    if found is None:
        raise TaskError(f"{path}: a name like {example} was expected", "is it a file of this data set?")
    return found


def image_size(path: Path) -> tuple[int, int]:
    """(width, height), from the header.

    Raises:
        ImageUnreadable: not an image.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageUnreadable(f"{path} is not a readable image: {error}", "download it again") from error


def read_rgb(path: Path) -> Image.Image:
    """The whole image in RGB, through the gate of all images.

    Raises:
        ImageUnreadable: not an image, a truncated one, or one of more than 8 bits per channel.
    """
    image = open_rgb(path, "download it again")
    check_jpeg(path, "download it again")
    return image


def _decode(path: Path) -> Image.Image:
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.load()
            return image.copy()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageUnreadable(f"{path} cannot be decoded: {error}", "download it again") from error


def read_mask(path: Path, belongs_to: Path) -> NDArray[np.bool_]:
    """bool[H, W]: true where the mask is not black.

    Raises:
        TaskError: it is missing, or of another size than its image.
        ImageUnreadable: not an image.
    """
    image = _decode(expect_file(path, belongs_to))
    deep = image.mode.startswith(("I", "F"))
    mask = np.asarray(np.asarray(image) if deep else np.asarray(image.convert("RGB")).max(axis=2)) > 0
    width, height = image_size(belongs_to)
    if mask.shape != (height, width):
        raise TaskError(
            f"{path} is {mask.shape[1]} x {mask.shape[0]}, and its image {belongs_to} {width} x {height}",
            "download both again",
        )
    return mask


def read_points(path: Path, columns: tuple[int, int]) -> list[tuple[float, float]]:
    """(x, y) of each line of a CSV file without a header.

    Args:
        columns: of x and of y, from 0.

    Raises:
        TaskError: a line has no such numbers.
    """
    points = []
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        cells = line.replace(";", ",").split(",")
        try:
            points.append((float(cells[columns[0]]), float(cells[columns[1]])))
        except (ValueError, IndexError):
            raise TaskError(f"{path}: line {number}: two numbers were expected, got {line.strip()!r}") from None
    return points


def _lines(path: Path) -> Iterable[str]:
    try:
        return path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"{path} cannot be read: {error}") from error


def check_points(path: Path, points: Iterable[tuple[float, float]], width: int, height: int) -> None:
    """Raise TaskError where a point lies outside of the image: the columns would be mistaken, or the file."""
    for x, y in points:
        if not (0 <= x <= width and 0 <= y <= height):
            raise TaskError(
                f"{path}: the point x {x:g}, y {y:g} lies outside of its image of {width} x {height}",
                "is it the annotation of this image?",
            )
