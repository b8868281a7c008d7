"""What a converter hands over: which patches there are, of which class and group, before any is cut."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mtdp.converters.source import read_rgb
from mtdp.converters.windows import Corner


@dataclass(frozen=True, slots=True)
class Patch:
    """A square window of an image, or the whole image."""

    source: Path
    group: str  # patient, slide or image as the data set names it
    label: str
    corner: Corner | None = None  # top left, in pixels of the source; None: the whole image
    side_px: int = 0  # of the window in the source
    out_px: int = 0  # as written, by area averaging; 0: as cut
    split: str | None = None  # that the data set's authors gave it; None: to be drawn
    index: int = -1  # of an image in a file of many

    @property
    def name(self) -> str:
        """What tells it from the group's other patches."""
        if self.index >= 0:
            return f"{self.index:06}"
        place = "" if self.corner is None else f"-x{self.corner[0]}-y{self.corner[1]}"
        return f"{self.source.stem}{place}"


# All patches of one source file, in, and their images, out, in that order.
Crops = Callable[[Path, Sequence[Patch]], Iterator[Image.Image]]


def image_crops(source: Path, patches: Sequence[Patch]) -> Iterator[Image.Image]:
    """Patches of an image that Pillow reads.

    Raises:
        ImageUnreadable: it cannot be decoded.
    """
    image = read_rgb(source)
    for patch in patches:
        if patch.corner is None:
            yield image
        else:
            x, y = patch.corner
            yield image.crop((x, y, x + patch.side_px, y + patch.side_px))


@dataclass(frozen=True, slots=True)
class Plan:
    """All patches of a task, and what the user should know of how they were found."""

    patches: Sequence[Patch]
    notes: Sequence[str] = ()
    crops: Crops = image_crops


Planner = Callable[[Path, int], Plan]  # (source folder, seed) -> plan


def rng_of(seed: int, source: Path, root: Path) -> random.Random:
    """Random numbers of one file: they do not depend on the other files, nor on where the download lies."""
    return random.Random(f"{seed} {source.relative_to(root).as_posix()}")
