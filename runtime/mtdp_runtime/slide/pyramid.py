"""Which images of a file are levels of one pyramid, and by which factor each is coarser than level 0.

A level's size is rounded, so its factor must not be computed from the size: on a slide 1023 px wide, halved five times,
31 px would say 33 and put a tile 436 px from its place. So the factor is the number that explains both sides. Writers
round down, up or to the nearest, at once or at each halving; all of that leaves a side less than one pixel from its
exact length. Philips pads each level to whole tiles instead (https://github.com/ImagingDataCommons/libdicom/issues/79).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

# How far a factor that the file states (a ratio of two spacings, written with few digits) may be from a whole number.
_STATED_TOLERANCE: Final = 0.005


@dataclass(frozen=True, slots=True)
class Candidate:
    """An image that may be a level."""

    width: int
    height: int
    stated: tuple[float, float] | None = None  # what the file says of its factor (x, y): spacings, not sizes
    tile: tuple[int, ...] | None = None  # width and height of its tiles, in pixels


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an image is: a level where `downsample` is a number, else none, and why."""

    downsample: float | None
    why: str = ""


def judge(images: list[Candidate]) -> list[Verdict]:
    """Return a verdict on each image; the first is level 0, the others come in any order.

    >>> [v.downsample for v in judge([Candidate(1023, 30001), Candidate(31, 937), Candidate(300, 300)])]
    [1.0, 32.0, None]
    """
    first = images[0]
    verdicts = [Verdict(1.0)] + [Verdict(None)] * (len(images) - 1)
    order = sorted(range(1, len(images)), key=lambda i: -images[i].width * images[i].height)
    finer = 1.0  # the coarsest whole factor so far
    taken = {(first.width, first.height)}
    for i in order:
        size = (images[i].width, images[i].height)
        verdict = _verdict(first, images[i], finer)
        if size in taken and verdict.downsample is not None and images[i].stated is None:
            # Both are padded to the same tiles, or one is another plane: of neither does the size tell the factor.
            verdict = Verdict(None, f"{size[0]} x {size[1]} px is as large as another level")
        verdicts[i] = verdict
        if verdict.downsample is not None:
            taken.add(size)
        if verdict.downsample is not None and verdict.downsample.is_integer():
            finer = verdict.downsample
    return verdicts


def left_out(verdicts: list[Verdict]) -> str:
    """Say which images are no levels, to be added to a reader's reason; nothing where all are."""
    out = [verdict.why for verdict in verdicts if verdict.downsample is None]
    return f"; no level of this picture: {'; '.join(out)}" if out else ""


def _verdict(first: Candidate, image: Candidate, finer: float) -> Verdict:
    by_size = (first.width / image.width, first.height / image.height)
    size = f"{image.width} x {image.height} px"
    says = f"{size} is 1/{by_size[0]:.4g} of the width and 1/{by_size[1]:.4g} of the height"
    stated = _worth_a_look(image.stated, by_size)
    if stated is not None:
        factor = _whole(stated)
        if factor is not None and _padded(first, image, factor):
            return Verdict(factor)
        return Verdict(None, f"{says}, and the file says 1/{stated[0]:.4g} and 1/{stated[1]:.4g}")
    least, most = _within_a_pixel(first, image)
    wholes = range(math.floor(least) + 1, math.ceil(min(most, first.width + first.height + 1)))
    whole = float(min(wholes, key=lambda n: _unlikely(n, finer, by_size))) if len(wholes) else None
    if whole is not None and (whole / finer).is_integer():
        return Verdict(whole)
    # A side of 70 tiles and one of 5: 1/14 if it is exact, but where the level before is 1/8, more likely padded 1/16.
    power = 2.0 ** round(math.log2(math.sqrt(by_size[0] * by_size[1])))
    if power > 1 and _whole_tiles(image) and _padded(first, image, power, whole_tiles_only=True):
        return Verdict(power)
    if whole is not None:
        return Verdict(whole)
    if least < most and most > 1:
        longer = by_size[0] if first.width >= first.height else by_size[1]
        factor = min(max(longer, least), most)
        return Verdict(factor) if factor >= 1 else Verdict(None, f"{size} is larger than level 0")
    return Verdict(None, f"{says}: another picture")


def _worth_a_look(stated: tuple[float, float] | None, by_size: tuple[float, float]) -> tuple[float, float] | None:
    """Return what the file states, unless it is computed from the sizes, or level 0's spacing copied to each level."""
    if stated is None or not all(math.isfinite(s) and s > 0 for s in stated):
        return None
    from_sizes = all(abs(s / r - 1) < 1e-3 for s, r in zip(stated, by_size, strict=True))
    copied = all(abs(s - 1) < _STATED_TOLERANCE for s in stated) and max(by_size) > 1.2
    return None if from_sizes or copied else stated


def _whole(stated: tuple[float, float]) -> float | None:
    """Return one factor for both directions, a whole number where one is meant; None where they differ."""
    if abs(stated[0] / stated[1] - 1) > 2 * _STATED_TOLERANCE:
        return None
    factor = math.sqrt(stated[0] * stated[1])
    whole = float(round(factor))
    return whole if whole and abs(factor / whole - 1) <= _STATED_TOLERANCE else factor


def _within_a_pixel(first: Candidate, image: Candidate) -> tuple[float, float]:
    """Return the open interval of factors that put both sides less than a pixel from their exact length."""
    sides = ((first.width, image.width), (first.height, image.height))
    least = max(whole / (side + 1) for whole, side in sides)
    most = min(whole / (side - 1) if side > 1 else math.inf for whole, side in sides)
    return least, most


def _padded(first: Candidate, image: Candidate, factor: float, whole_tiles_only: bool = False) -> bool:
    """Tell whether a factor explains the sizes, where level 0, this image or both may be padded to whole tiles."""
    tile = image.tile or (1, 1)
    padding = first.tile or (1, 1)
    for whole, side, of_tile, of_first in zip(
        (first.width, first.height), (image.width, image.height), tile, padding, strict=True
    ):
        exact = whole / factor
        upper = -(-math.ceil(exact) // of_tile) * of_tile
        lower = upper if whole_tiles_only else math.floor((whole - of_first + 1) / factor)
        if not lower <= side <= max(upper, math.ceil(exact)):
            return False
    return True


def _whole_tiles(image: Candidate) -> bool:
    return image.tile is not None and not image.width % image.tile[0] and not image.height % image.tile[1]


def _unlikely(n: int, finer: float, by_size: tuple[float, float]) -> tuple[bool, bool, float]:
    """Rank whole factors that all explain a small level: a power of two times the level before it is likeliest."""
    steps = n / finer
    power = steps >= 1 and math.log2(steps).is_integer()
    return not power, not steps.is_integer(), abs(math.log(n / math.sqrt(by_size[0] * by_size[1])))
