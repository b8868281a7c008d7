"""A task as a folder: `TASK/{train,val,test}/CLASS/GROUP_name.ext`, every entry of it accounted for.

An entry is an image, or known not to be one, or it is refused: an image that nobody reads is a silent loss, and a
folder `Val` beside `train` a task without a val split. All that is refused is named at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from mtdp.errors import TaskError
from mtdp.manifest import MISNOMERS, SPLITS, Row, listed, plain_text

# What operating systems and archives leave behind; hidden names besides.
_JUNK: Final = frozenset({"Thumbs.db", "thumbs.db", "desktop.ini", "Desktop.ini", "__MACOSX", "@eaDir", "lost+found"})
# Files beside the splits that are notes or tables: nobody takes them for images of a class.
_NOTES: Final = frozenset(
    {".csv", ".htm", ".html", ".json", ".md", ".pdf", ".rst", ".toml", ".tsv", ".txt", ".yaml", ""}
)
_HINT: Final = "every image lies in {train,val,test}/CLASS/; rename or move the others elsewhere"


def group_of(file_name: str) -> str:
    """The group in a file's name: all before the first underscore, or the whole stem where there is none.

    >>> group_of("slide12_0007.png"), group_of("img3.png")
    ('slide12', 'img3')
    """
    return plain_text(Path(file_name).stem.split("_", 1)[0])


def is_junk(path: Path) -> bool:
    """Whether a name is known to hold no image: hidden, or left behind by an operating system or an archive."""
    return path.name.startswith(".") or path.name in _JUNK


def is_note(path: Path) -> bool:
    """Whether a file beside folders of images is notes or a table, by its suffix, and there at all."""
    return path.suffix.lower() in _NOTES and path.exists()


def folder_rows(path: Path) -> list[Row]:
    """The images of a task's folder, by split, class and name.

    Raises:
        TaskError: an empty class, or entries that would not be read.
    """
    problems = list(_strangers(path))
    rows: list[Row] = []
    for split in SPLITS:
        classes: dict[str, Path] = {}
        for entry in _entries(path / split):
            label = plain_text(entry.name)
            if not entry.is_dir():
                problems.append(f"{entry} {_not_read(entry, 'is in no class')}")
            elif classes.setdefault(label, entry) != entry:
                problems.append(f"{entry} and {classes[label]} are one class by name")
            else:
                files = list(_images(entry, problems))
                if not files:
                    problems.append(f"{entry} is an empty class")
                for file in files:
                    group = group_of(file.name)
                    if not group:
                        problems.append(f"{file} has no group before its first underscore")
                    rows.append((file, group, label, split))
    if problems:
        raise listed(path, problems, _HINT)
    if not rows:
        raise TaskError(f"{path} holds no images as {{train,val,test}}/CLASS/GROUP_name.ext")
    return rows


def _entries(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not is_junk(entry)) if folder.is_dir() else []


def _strangers(path: Path) -> Iterator[str]:
    """What is wrong beside the splits."""
    for entry in _entries(path):
        name = plain_text(entry.name)
        meant = MISNOMERS.get(name.casefold(), name.casefold())
        if entry.is_dir():
            if entry.name in SPLITS:
                continue
            if meant in SPLITS:
                yield f"{entry} would not be read: rename it to {meant}"
            else:
                yield f"{entry} would not be read"
        elif entry.name in SPLITS or not is_note(entry):
            yield f"{entry} {_not_read(entry, 'would not be read')}"


def _images(folder: Path, problems: list[str]) -> Iterator[Path]:
    for entry in _entries(folder):
        if entry.is_file():
            yield entry
        elif entry.is_dir():
            problems.append(f"{entry} is a folder inside a class: its images would not be read")
        else:
            problems.append(f"{entry} {_not_read(entry, 'is not a file')}")


def _not_read(entry: Path, why: str) -> str:
    return f"is a link to {entry.readlink()}, which is not there" if entry.is_symlink() and not entry.exists() else why
