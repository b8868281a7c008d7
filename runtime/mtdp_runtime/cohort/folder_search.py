"""What lies below a folder: each real folder once, links followed; and what a search passes over, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from mtdp_runtime.slide import zarr_folder

# Slides, and what slides come in, that are not read here.
UNREAD_SUFFIXES: Final = frozenset(
    {
        *(".vsi", ".isyntax", ".i2syntax", ".zvi", ".lif", ".lof", ".nd2", ".jp2", ".j2k", ".jpx", ".kfb", ".kfbf"),
        *(".sdpc", ".dyqx", ".tmap", ".mds", ".mdsx", ".rts", ".eslide", ".oib", ".oif", ".lsm", ".ims", ".jxr"),
        *(".zip", ".tar", ".tgz", ".7z", ".rar", ".gz", ".bz2", ".xz", ".zst"),
    }
)


@dataclass(frozen=True, slots=True)
class PassedOver:
    """A file or folder that was met and not searched or read."""

    path: Path
    why: str


@dataclass(slots=True)
class Found:
    """What a search met."""

    paths: list[Path] = field(default_factory=list)  # files, and folders that are one image
    passed_over: list[PassedOver] = field(default_factory=list)


def search(root: Path, is_slide_name: Callable[[str], bool]) -> Found:
    """Return what lies below a folder, hidden names left out.

    A folder that several links lead to is searched once: under its own name where it has one below the root. Links
    that lead back up lead nowhere new.

    Args:
        root: the folder.
        is_slide_name: says of a file's name whether it would be a slide's.

    Raises:
        OSError: the folder itself cannot be read.
    """
    found, seen = Found(), {_identity(root)}
    todo, links = [root], list[Path]()
    first = True
    while todo or links:
        folder = todo.pop() if todo else links.pop(0)
        if folder.is_symlink() and folder != root:
            identity = _identity(folder)
            if identity in seen:
                continue
            seen.add(identity)
        try:
            names = sorted(one.name for one in folder.iterdir())
        except OSError as error:
            if first:
                raise
            found.passed_over.append(PassedOver(folder, f"cannot be searched: {error.strerror}"))
            continue
        first = False
        for name in names:
            if not name.startswith("."):
                _meet(folder / name, found, todo, links, seen, is_slide_name)
    found.paths.sort()
    found.passed_over.sort(key=lambda one: one.path)
    return found


def _meet(
    path: Path,
    found: Found,
    todo: list[Path],
    links: list[Path],
    seen: set[tuple[int, int]],
    is_slide_name: Callable[[str], bool],
) -> None:
    try:
        facts = path.stat()
    except OSError as error:
        if is_slide_name(path.name) or not path.suffix:
            why = "a link that leads nowhere" if path.is_symlink() else f"cannot be looked at: {error.strerror}"
            found.passed_over.append(PassedOver(path, why))
        return
    kind = path.suffix.lower()
    if not path.is_dir():
        if kind in UNREAD_SUFFIXES:
            found.passed_over.append(PassedOver(path, f"{kind} is not read"))
        else:
            found.paths.append(path)
    elif kind == zarr_folder.SUFFIX:
        found.paths.append(path)
    elif path.is_symlink():
        links.append(path)
    elif (facts.st_dev, facts.st_ino) not in seen:
        seen.add((facts.st_dev, facts.st_ino))
        todo.append(path)


def _identity(folder: Path) -> tuple[int, int]:
    facts = folder.stat()
    return facts.st_dev, facts.st_ino
