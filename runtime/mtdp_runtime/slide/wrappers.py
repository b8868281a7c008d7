"""Slides around a slide: one tells of each read, so that a run sees a decoder that hangs; one is read from a copy.

What the system says of a read (an error of the disk) is no tile's fault: it is tried again for some seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.errors import StorageFailed, TileUnreadable
from mtdp_runtime.faults import RETRY_AFTER_S, system_fault
from mtdp_runtime.slide import Slide, SlideInfo, Source


class _Around:
    """A slide that is another one, but for what a subclass does in its own way."""

    def __init__(self, slide: Slide) -> None:
        self._slide = slide
        self._info = slide.info

    @property
    def info(self) -> SlideInfo:
        return self._info

    def close(self) -> None:
        self._slide.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class WatchedSlide(_Around):
    """Another slide; `beat` is called after each read. `path` is its name where it is read from a copy."""

    def __init__(self, slide: Slide, beat: Callable[[], None], path: Path | None = None) -> None:
        super().__init__(slide)
        if path is not None:
            self._info = replace(slide.info, path=path, read_from=slide.info.read_from or slide.info.path)
        self._beat = beat

    def read_into(self, out: NDArray[np.uint8], x0: int, y0: int, scale: float, source: Source | None = None) -> None:
        """Read as the other does.

        Raises:
            StorageFailed: the system gives no bytes, for seconds.
        """
        for wait_s in (*RETRY_AFTER_S, None):
            try:
                self._slide.read_into(out, x0, y0, scale, source)
                break
            except TileUnreadable as error:
                fault = system_fault(error)
                if fault is None:
                    raise
                if wait_s is None or not fault.passing:
                    raise StorageFailed(
                        f"{error} ({fault.reason})", hint="The storage said so. The next run continues from here."
                    ) from error
            self._beat()
            time.sleep(wait_s)
        self._beat()


class StagedSlide(_Around):
    """A slide that is read from a copy: its errors name the slide, for the copy goes."""

    def __init__(self, slide: Slide, copy: Path, path: Path) -> None:
        super().__init__(slide)
        self._copy, self._path = str(copy), str(path)

    def read_into(self, out: NDArray[np.uint8], x0: int, y0: int, scale: float, source: Source | None = None) -> None:
        try:
            self._slide.read_into(out, x0, y0, scale, source)
        except TileUnreadable as error:
            raise TileUnreadable(str(error).replace(self._copy, self._path), error.hint) from error
