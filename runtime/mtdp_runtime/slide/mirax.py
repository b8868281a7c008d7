"""A MIRAX slide is a small file `NAME.mrxs` and a folder `NAME` beside it, which holds the pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from mtdp_runtime.errors import SlideUnreadable

SUFFIX: Final = ".mrxs"
_INDEX: Final = "Slidedat.ini"
_MOST_LINKS: Final = 32


def with_its_folder(path: Path) -> Path:
    """Return the file that the folder lies beside: a link is followed where its own place has no folder.

    Any other file is returned as it is.

    Raises:
        SlideUnreadable: there is no such folder, or it is not a slide's.
    """
    if path.suffix.lower() != SUFFIX:
        return path
    tried: list[Path] = []
    at = path
    for _ in range(_MOST_LINKS):
        tried.append(at.with_suffix(""))
        if (tried[-1] / _INDEX).is_file():
            return at
        if not at.is_symlink():
            break
        at = at.parent / at.readlink()
    there = [folder for folder in tried if folder.is_dir()]
    what = f"the folder {there[0]} has no {_INDEX}" if there else f"there is no folder {tried[-1]}"
    raise SlideUnreadable(
        f"{path}: a .mrxs is only the name of a slide, whose pixels lie in a folder of that name, and {what}",
        hint="Copy or link the whole folder, too, into the same place and with the same name.",
    )
