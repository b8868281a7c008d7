"""Where the pages of a folder of features lie, and what they are made with."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

FOLDER: Final = "report"
_RUN_PAGE: Final = "index.html"
_THUMBNAILS: Final = "thumbnails"
# A slide may be called "index": its report makes room for the run's page, and those called "index-" for it.
_INDEX: Final = re.compile(r"index-*", re.IGNORECASE)


_OF_A_SCALE: Final = re.compile(r"mpp\d+(\.\d+)?")  # as `extraction.models` names the folders of several scales


def is_of_a_scale(folder: Path) -> bool:
    """Say whether a folder holds the files of one of several scales, by its name."""
    return _OF_A_SCALE.fullmatch(folder.name) is not None


def run_page(out: Path) -> Path:
    """Return the page of all slides of a folder."""
    return out / FOLDER / _RUN_PAGE


def slide_report(folder: Path, name: str) -> Path:
    """Return the report of a slide, by the name of its feature file without extension.

    >>> slide_report(Path("o"), "a.b").as_posix(), slide_report(Path("o"), "Index").as_posix()
    ('o/report/a.b.html', 'o/report/Index-.html')
    """
    return folder / FOLDER / f"{name}{'-' if _INDEX.fullmatch(name) else ''}.html"


def thumbnail(folder: Path, name: str) -> Path:
    """Return the small picture of a slide, a JPEG."""
    return folder / FOLDER / _THUMBNAILS / f"{name}.jpg"
