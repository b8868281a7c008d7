"""Miniatures of public downloads: an object is one red pixel on grey, so that a patch shows what it holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from mtdp.tasks import SPLITS, Task, load_task

GREY, RED, BLUE = (120, 120, 120), (255, 0, 0), (0, 0, 255)


def plain(
    path: Path,
    width: int,
    height: int,
    red: Iterable[tuple[int, int]] = (),
    blue: Iterable[tuple[int, int]] = (),
) -> Path:
    """A grey image with single pixels (x, y) in red and blue."""
    pixels = np.full((height, width, 3), GREY, np.uint8)
    for colour, points in ((RED, red), (BLUE, blue)):
        for x, y in points:
            pixels[y, x] = colour
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def write(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    return path


def counts(task: Task) -> dict[str, int]:
    """Class -> images of all splits."""
    found = Counter(task.classes[sample.label] for split in SPLITS for sample in task.samples[split])
    return dict(found)


def groups(task: Task) -> set[str]:
    return {sample.group for sample in task.of(SPLITS)}


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def loaded(folder: Path) -> Task:
    """The task as training reads it: every class in every split, no group in two, every image decodable."""
    return load_task(folder)


def sizes(task: Task) -> set[tuple[int, int]]:
    return {_size(sample.path) for sample in task.of(SPLITS)}


def _size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def has(path: Path, colour: tuple[int, int, int]) -> bool:
    with Image.open(path) as image:
        return bool((np.asarray(image) == colour).all(axis=2).any())
