"""What the user named, as a list of slides."""

from __future__ import annotations

import csv
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from mtdp_runtime.errors import DuplicateSlideNames, UsageError
from mtdp_runtime.slide import dicom
from mtdp_runtime.slide.scale import is_scale

# What OpenSlide 4 reads, by the extensions that its vendors use.
SLIDE_SUFFIXES: Final = frozenset(
    {".svs", ".tif", ".tiff", ".ndpi", ".vms", ".vmu", ".scn", ".mrxs", ".svslide", ".bif", ".dcm", ".czi"}
)


@dataclass(frozen=True, slots=True)
class SlideRequest:
    """A slide to process."""

    path: Path
    mpp: float | None = None  # of level 0, where the user gave it
    given_by: str = ""  # what gave it
    mask: Path | None = None  # of its tissue, where the user has one
    called: str = ""  # where its name is not its file's

    @property
    def name(self) -> str:
        """The name of its output: the file name without its extension; the folder's for one of a DICOM series."""
        return self.called or self.path.stem


def list_slides(named: Sequence[Path], slide_mpp: float | None = None, mask: Path | None = None) -> list[SlideRequest]:
    """Expand files, folders (searched in depth) and CSV manifests with the columns `slide[,mpp][,mask]`.

    Raises:
        UsageError: a manifest cannot be read, or nothing was found.
        DuplicateSlideNames: two slides would write one file.
    """
    if slide_mpp is not None and not is_scale(slide_mpp):
        raise UsageError(
            f"--slide-mpp {slide_mpp}: not a scale", hint="Micrometres per level-0 pixel, for example 0.25."
        )
    requests: list[SlideRequest] = []
    seen: set[tuple[Path, str]] = set()
    for path in named:
        if path.is_dir():
            found = _in_folder(path)
            if not found:
                raise UsageError(
                    f"{path}: no slides in this folder", hint=f"Looked for {' '.join(sorted(SLIDE_SUFFIXES))}."
                )
            requests += found
        elif path.suffix.lower() == ".csv":
            requests += _manifest(path)
        elif not _is_more_of_a_series(path, seen):
            requests.append(SlideRequest(path))
    if slide_mpp is not None:
        requests = [replace(r, mpp=slide_mpp, given_by="--slide-mpp") for r in requests]
    if mask is not None:
        if len(requests) != 1:
            raise UsageError(
                f"--mask {mask}: one mask for {len(requests)} slides",
                hint="A CSV manifest with the columns slide,mask gives each slide its own.",
            )
        requests = [replace(requests[0], mask=mask)]
    by_name: dict[str, Path] = {}
    for request in requests:
        first = by_name.setdefault(request.name, request.path)
        if first is not request.path:
            raise DuplicateSlideNames(
                f"two slides would write {request.name}.h5: {first} and {request.path}",
                hint="Run them into different --out folders, or rename one.",
            )
    return requests


def shard_of(request: SlideRequest, parts: int) -> int:
    """Return which of 1..parts a slide belongs to: by its name alone, whatever else is in the list."""
    digest = hashlib.sha256(request.name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") % parts + 1


def _in_folder(root: Path) -> list[SlideRequest]:
    """List the slides below a folder. The files of a DICOM series are one slide, however many they are."""
    files = sorted(p for p in root.rglob("*") if _looks_like_a_slide(p, root))
    found = [SlideRequest(p) for p in files if p.suffix.lower() != dicom.SUFFIX]
    for folder in sorted({p.parent for p in files if p.suffix.lower() == dicom.SUFFIX}):
        series = dicom.series_in(folder)
        for members in series.values():
            whole_folder = len(series) == 1 and len(members) > 1
            found.append(SlideRequest(members[0], called=folder.resolve().name if whole_folder else ""))
    return sorted(found, key=lambda request: request.path)


def _is_more_of_a_series(path: Path, seen: set[tuple[Path, str]]) -> bool:
    """Say whether a file (of CASE/*.dcm, say) belongs to the series of one that was named before it."""
    series = dicom.series_of(path) if path.suffix.lower() == dicom.SUFFIX else ""
    key = (path.parent, series)
    known = bool(series) and key in seen
    seen.add(key)
    return known


def _looks_like_a_slide(path: Path, root: Path) -> bool:
    if path.suffix.lower() not in SLIDE_SUFFIXES or any(part.startswith(".") for part in path.relative_to(root).parts):
        return False
    # A.mrxs keeps its data in the folder A beside it: nothing in there is a slide of its own.
    inside = [parent for parent in path.parents if parent.is_relative_to(root) and parent != root]
    return path.is_file() and not any(parent.with_name(f"{parent.name}.mrxs").exists() for parent in inside)


def _manifest(path: Path) -> list[SlideRequest]:
    """Read a manifest; relative paths start at its own folder."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, skipinitialspace=True)
            columns = [name.strip().lower() for name in reader.fieldnames or []]
            reader.fieldnames = columns
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(
            f"{path}: cannot be read as a CSV manifest: {error}", hint="Columns: slide[,mpp][,mask]"
        ) from error
    if "slide" not in columns:
        shown = ", ".join(columns) or "none"
        raise UsageError(
            f"{path}: no column named slide (columns: {shown})", hint="The first line must be: slide[,mpp][,mask]"
        )
    if not rows:
        raise UsageError(f"{path}: names no slide", hint="One line a slide, after the line of the columns.")
    requests = []
    for number, row in enumerate(rows, start=2):
        name, text = (row["slide"] or "").strip(), (row.get("mpp") or "").strip()
        if not name:
            raise UsageError(f"{path}: line {number}: no slide named", hint="Remove the line or name a file.")
        try:
            mpp = float(text) if text else None
        except ValueError:
            mpp = math.nan
        if mpp is not None and not is_scale(mpp):
            raise UsageError(f"{path}: line {number}: mpp {text!r} is not a scale", hint="For example 0.25.")
        mask = (row.get("mask") or "").strip()
        given_by = f"the manifest {path.name}" if mpp else ""
        requests.append(SlideRequest(path.parent / name, mpp, given_by, path.parent / mask if mask else None))
    return requests
