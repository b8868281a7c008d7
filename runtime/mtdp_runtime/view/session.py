"""What a viewer shows, and nothing else: slides, their feature files, scores and annotations, each by its path."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from mtdp_runtime.errors import SlideGone, SlideUnreadable
from mtdp_runtime.slide import Slide
from mtdp_runtime.slide.open import open_slide
from mtdp_runtime.store.reader import FeatureFile, open_features

_MOST_OPEN: Final = 4  # slides at once: a reader keeps tens of MB of decoded tiles


@dataclass(frozen=True, slots=True)
class Shown:
    """A slide, features of one, or both."""

    name: str
    slide: Path | None  # None: the one that the features name
    features: Path | None = None
    mpp: float | None = None  # of level 0, where the user gave it
    given_by: str = ""


@dataclass(frozen=True, slots=True)
class Session:
    """What one viewer shows."""

    shown: tuple[Shown, ...]
    token: str  # stands in every address
    scores: tuple[Path, ...] = ()
    annotations: tuple[Path, ...] = ()

    def belonging(self, files: tuple[Path, ...], shown: Shown) -> list[Path]:
        """Return those of some files that are a slide's: named as it is, or all of them where there is one slide."""
        begins = f"{shown.name.rsplit('/', 1)[-1]}."
        return [path for path in files if len(self.shown) == 1 or path.name.startswith(begins)]


@dataclass(slots=True)
class _Open:
    slide: Slide
    users: int = 0


@dataclass(slots=True)
class Shelf:
    """Open slides: the few that were used last, none closed while somebody reads it."""

    most: int = _MOST_OPEN
    _slides: OrderedDict[Shown, _Open] = field(default_factory=OrderedDict)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    @contextmanager
    def lent(self, shown: Shown) -> Iterator[Slide]:
        """Give an open slide for a while.

        Raises:
            SlideError: it is not there any more, or cannot be opened.
            StoreError: the features that name it cannot be read.
        """
        with self._lock:
            one = self._slides.get(shown)
            if one is None:
                one = self._slides[shown] = _Open(_open(shown))
            elif not one.slide.info.path.exists():
                raise _gone(one.slide.info.path, shown)
            self._slides.move_to_end(shown)
            one.users += 1
        try:
            yield one.slide
        finally:
            with self._lock:
                one.users -= 1
                self._close_beyond()

    def close(self) -> None:
        """Close all that nobody reads."""
        with self._lock:
            self.most = 0
            self._close_beyond()

    def _close_beyond(self) -> None:
        idle = [shown for shown, one in self._slides.items() if not one.users]
        for shown in idle[: max(0, len(self._slides) - self.most)]:
            self._slides.pop(shown).slide.close()


def _open(shown: Shown) -> Slide:
    if shown.slide is not None:
        if not shown.slide.exists():
            raise _gone(shown.slide, shown)
        return open_slide(shown.slide, shown.mpp, shown.given_by)
    assert shown.features is not None
    with open_features(shown.features) as file:
        path = slide_of(file)
        mpp, mpp_source = file.attrs.get("mpp_level0"), str(file.attrs.get("mpp_source", ""))
    if path is None:
        raise SlideUnreadable(
            f"{shown.features}: does not say where its slide is, and none of its name lies beside it",
            hint=f"Name the slide: mtdp-view SLIDE --features {shown.features.parent}",
        )
    if not path.exists():
        raise _gone(path, shown)
    return open_slide(path, mpp, mpp_source)


def slide_of(file: FeatureFile) -> Path | None:
    """Return where the slide of a feature file is, or was: as the file says, or one of its name near the file."""
    said, name = str(file.attrs.get("slide_path", "")), str(file.attrs.get("slide", ""))
    near = [folder / name for folder in (file.path.parent, file.path.parent.parent) if name]
    places = [Path(said)] * bool(said) + near
    there = [place for place in places if place.exists()]
    return next(iter(there or places[: bool(said)]), None)


def _gone(path: Path, shown: Shown) -> SlideGone:
    again = f"mtdp-view SLIDE --features {shown.features.parent}" if shown.features else "mtdp-view SLIDE"
    return SlideGone(
        f"{path}: the slide is not there any more",
        hint=f"Bring it back, or say where it is now: {again}",
    )
