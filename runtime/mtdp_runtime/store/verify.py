"""Whether finished files still hold what was computed: they open, are complete, and their checksums are right."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import h5py

from mtdp_runtime.errors import RuntimeFailure, UsageError
from mtdp_runtime.store import checksums, derived
from mtdp_runtime.store.layout import COORDS, FEATURES, STATUS, TISSUE_FRACTION, TileStatus

_BROKEN: Final = (OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found of a feature file and of what is derived from it."""

    path: Path
    status: Literal["ok", "no-checksums", "wrong"]  # no-checksums: complete, but made before they were kept
    tiles: int = 0
    derived: tuple[str, ...] = ()  # what was derived and compared
    problems: tuple[str, ...] = ()


def verify_folder(out: Path) -> Iterator[Verdict]:
    """Verify every finished file below a folder, and what is derived from each; nothing is written.

    Raises:
        UsageError: the folder cannot be read, or holds no finished file.
    """
    if not out.is_dir():
        raise UsageError(f"{out}: no such folder", hint="Name the folder that was given as --out.")
    files = sorted(_finished_files(out))
    if not files:
        raise UsageError(f"{out}: no finished feature file", hint="Name the folder that was given as --out.")
    for path in files:
        yield verify_file(path)


def verify_file(path: Path) -> Verdict:
    """Verify a finished file, and what is derived from it."""
    if not path.exists():
        return Verdict(path, "wrong", problems=("it is gone, and files that were derived from it are there",))
    try:
        with h5py.File(path, "r", locking=False) as file:
            tiles, sums = len(file[COORDS]), checksums.kept(file)
            found = list(_problems(file, sums))
    except _BROKEN as error:
        return Verdict(path, "wrong", problems=(f"it cannot be read: {' '.join(str(error).split())}",))
    try:
        found += derived.problems(path)
    except RuntimeFailure as error:
        found.append(str(error))
    status: Literal["ok", "no-checksums", "wrong"] = "wrong" if found else "ok" if sums else "no-checksums"
    return Verdict(path, status, tiles, tuple(sorted(derived.records(path))), tuple(found))


def _problems(file: h5py.File, sums: dict[str, str]) -> Iterator[str]:
    rows = {name: len(file[name]) for name in file if name in (FEATURES, COORDS, STATUS, TISSUE_FRACTION)}
    if len(rows) != 4 or len(set(rows.values())) != 1:
        yield "it is incomplete: features, coords, status and tissue_fraction have not the same rows"
        return
    if (file[STATUS][:] == TileStatus.NOT_COMPUTED).any():
        yield "it is incomplete: rows were never computed"
    if not sums:
        return
    wrong = [name for name in file if sums.get(name) != checksums.digest_of_dataset(file[name])]
    wrong += sorted({*sums} - {*file, checksums.ATTRIBUTES})
    if wrong:
        yield f"not what was computed: {', '.join(wrong)}"
    if sums.get(checksums.ATTRIBUTES) != checksums.digest_of_attributes(file):
        yield "attributes were changed"


def _finished_files(out: Path) -> set[Path]:
    """Return the feature files, and those that should be there since something was derived from them."""
    found: set[Path] = set()
    for folder, below, names in os.walk(out):
        here = Path(folder)
        below[:] = [name for name in below if not name.startswith(".") and not name.endswith(".zarr")]
        found |= {here / name for name in names if name.endswith(".h5") and not name.startswith(".")}
        found |= {here / f"{record.stem}.h5" for record in (here / derived.FOLDER).glob("*.json")}
    return found
