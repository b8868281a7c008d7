"""What the user named, as a list of slides."""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from mtdp_runtime.cohort import remote, tile_file
from mtdp_runtime.cohort.folder_search import PassedOver, search
from mtdp_runtime.cohort.servers import look_for_library
from mtdp_runtime.cohort.slide_table import read_slide_table
from mtdp_runtime.errors import DuplicateSlideNames, UsageError
from mtdp_runtime.slide import dicom, zarr_folder
from mtdp_runtime.slide.open import open_slide
from mtdp_runtime.slide.scale import is_scale
from mtdp_runtime.slide.wrappers import StagedSlide, WatchedSlide
from mtdp_runtime.urls import SlideUrl, is_url, path_or_url, refuse_url

# What OpenSlide 4 reads, by the extensions that its vendors use; and the images that are read without it.
_VENDORS: Final = (".svs", ".ndpi", ".vms", ".vmu", ".scn", ".mrxs", ".svslide", ".bif", ".dcm", ".czi", ".avs")
_PICTURES: Final = (".png", ".jpg", ".jpeg")
SLIDE_SUFFIXES: Final = frozenset(
    {*_VENDORS, *_PICTURES, ".tif", ".tiff", ".btf", ".tf2", ".tf8", ".qptiff", zarr_folder.SUFFIX}
)


@dataclass(frozen=True, slots=True)
class SlideRequest:
    """A slide to process."""

    path: Path
    mpp: float | None = None  # of level 0, where the user gave it
    given_by: str = ""  # what gave it
    mask: Path | None = None  # of its tissue, where the user has one
    called: str = ""  # where its name is not its file's
    coords: Path | None = None  # of its tiles, where the user gives them
    classes: Path | None = None  # of its annotations, which give each tile a class

    @property
    def name(self) -> str:
        """The name of its output: the file name without its extension; the folder's for one of a DICOM series."""
        return self.called or self.path.stem


def list_slides(
    named: Sequence[Path],
    slide_mpp: float | None = None,
    mask: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
    must_exist: bool = True,
    passed_over: list[PassedOver] | None = None,
    coords: Path | None = None,
    classes: Path | None = None,
) -> list[SlideRequest]:
    """Expand files, folders (searched in depth) and CSV manifests with the columns of `SHOWN_COLUMNS`.

    `coords` lists the tiles of the one slide, and `classes` has its annotations; or each is a folder with a file for
    each slide.

    `say` takes what the user should know before the work: columns that are ignored, slides that are not there, what
    was passed over in folders; `passed_over` takes each of these.

    Raises:
        UsageError: a manifest cannot be read, nothing was found, or, where they must exist, no slide does.
        DuplicateSlideNames: two slides would write one file.
    """
    if slide_mpp is not None and not is_scale(slide_mpp):
        raise UsageError(
            f"--slide-mpp {slide_mpp}: not a scale", hint="Micrometres per level-0 pixel, for example 0.25."
        )
    for option, beside in (("--mask", mask), ("--coords", coords), ("--classes", classes)):
        refuse_url(beside, option)
    requests: list[SlideRequest] = []
    passed: list[PassedOver] = [] if passed_over is None else passed_over
    seen: set[tuple[Path, str]] = set()
    for path in map(path_or_url, named):
        if isinstance(path, SlideUrl):
            requests += _behind(path)
        elif _is_folder(path):
            found = _in_folder(path, passed)
            if not found:
                over = f"; passed over: {_counted(passed)}" if passed else ""
                raise UsageError(
                    f"{path}: no slides in this folder{over}", hint=f"Looked for {' '.join(sorted(SLIDE_SUFFIXES))}."
                )
            requests += found
        elif path.suffix.lower() == ".csv":
            requests += _listed(path, say)
        elif not _is_more_of_a_series(path, seen):
            requests.append(SlideRequest(path))
    if passed:
        say(f"{len(passed)} passed over in folders: {_counted(passed)}; the first: {passed[0].path}")
    if slide_mpp is not None:
        requests = [replace(r, mpp=slide_mpp, given_by="--slide-mpp") for r in requests]
    requests = _each_once(requests)
    if mask is not None:
        if len(requests) != 1:
            raise UsageError(
                f"--mask {mask}: one mask for {len(requests)} slides",
                hint="A CSV manifest with the columns slide,mask gives each slide its own.",
            )
        requests = [replace(requests[0], mask=mask)]
    if coords is not None:
        requests = [
            replace(request, coords=path)
            for request, path in _files_for(requests, "--coords", coords, tile_file.ENDINGS)
        ]
    if classes is not None:
        requests = [
            replace(request, classes=path)
            for request, path in _files_for(requests, "--classes", classes, (".geojson",))
        ]
    if must_exist:
        _look_for_missing(requests, say)
    return requests


def _behind(url: SlideUrl) -> list[SlideRequest]:
    """Return the slide behind a URL, or those below a folder of a bucket.

    Raises:
        UsageError: what fetches it is not installed, or the folder cannot be listed or holds no slides.
    """
    look_for_library(url)
    if url.suffix.lower() == ".csv":
        raise UsageError(f"{url}: a manifest is read from a local file", hint="Fetch it; it may list URLs.")
    if not url.is_folder:
        return [SlideRequest(url)]
    found = [one for one in remote.list_folder(url) if one.suffix.lower() in SLIDE_SUFFIXES]
    slides = {one.with_suffix("") for one in found if one.suffix.lower() not in _PICTURES}
    found = [one for one in found if one.suffix.lower() not in _PICTURES or one.with_suffix("") not in slides]
    if not found:
        raise UsageError(f"{url}/: no slides in this folder", hint=f"Looked for {' '.join(sorted(SLIDE_SUFFIXES))}.")
    return [SlideRequest(one) for one in found]


def _files_for(
    requests: Sequence[SlideRequest], option: str, given: Path, endings: Sequence[str]
) -> list[tuple[SlideRequest, Path]]:
    """Return each slide with its file: the one that is given, or that of a folder which has the slide's name.

    Where the folder has none, or more than one, the folder itself stands for it: that fails the slide at its turn.
    """
    if _is_folder(given):
        found = [(request, [given / f"{request.name}{ending}" for ending in endings]) for request in requests]
        there = [(request, [path for path in paths if path.is_file()]) for request, paths in found]
        return [(request, paths[0] if len(paths) == 1 else given) for request, paths in there]
    if len(requests) != 1:
        raise UsageError(
            f"{option} {given}: one file for {len(requests)} slides",
            hint=f"A folder with a file for each slide, or a CSV manifest with the columns slide,{option[2:]}.",
        )
    return [(requests[0], given)]


def _given_with(request: SlideRequest) -> tuple[object, ...]:
    return request.mpp, request.mask, request.coords, request.classes


def _each_once(requests: Sequence[SlideRequest]) -> list[SlideRequest]:
    """Leave out what is named a second time.

    Raises:
        DuplicateSlideNames: two slides, or one with two scales, masks or lists of tiles, would write one file.
    """
    by_name: dict[str, SlideRequest] = {}
    for request in requests:
        first = by_name.setdefault(request.name, request)
        if first is request:
            continue
        if _real(first.path) != _real(request.path) and str(first.path) == str(request.path):
            raise DuplicateSlideNames(
                f"{request.path}: named twice, with another query or number of slashes",
                hint="Leave one out; if they are two slides, give each a name: a manifest with the columns slide,name.",
            )
        if _real(first.path) != _real(request.path):
            raise DuplicateSlideNames(
                f"two slides would write {request.name}.h5: {first.path} and {request.path}",
                hint="Run them into different --out folders, rename one, or give them names: a manifest with the "
                "columns slide,name.",
            )
        if _given_with(first) != _given_with(request):
            raise DuplicateSlideNames(
                f"{request.path}: named twice, with another mpp, mask, coords or classes",
                hint="Leave one out, or give each a name of its own: a manifest with the column name.",
            )
    return list(by_name.values())


def _is_folder(path: Path) -> bool:
    try:
        return "\0" not in str(path) and path.is_dir() and not zarr_folder.is_zarr(path)
    except OSError:  # it may not be looked at, or its server is away: that is said at its turn
        return False


def _is_plain_file(path: Path) -> bool:
    """Say whether a look into it ends: a pipe would be waited for, a device read without end."""
    try:
        return "\0" not in str(path) and path.is_file()
    except OSError:
        return False


def _is_missing(path: Path) -> bool:
    if "\0" in str(path) or isinstance(path, SlideUrl):  # said by `why_refused`; at its turn
        return False
    try:
        return not path.exists()
    except OSError:  # it may not be looked at, or its server is away: that is said at its turn
        return False


def _real(path: Path) -> str:
    if isinstance(path, SlideUrl):
        return path.given
    return os.path.realpath(path) if "\0" not in str(path) else str(path)


def _look_for_missing(requests: Sequence[SlideRequest], say: Callable[[str], None]) -> None:
    """Say how many slides are not there. They fail, each for itself: a night's work does not wait for a wrong path."""
    missing = [request.path for request in requests if _is_missing(request.path)]
    if not missing:
        return
    what = f"{len(missing)} of {len(requests)} slides do not exist, the first: {missing[0]}"
    if len(missing) == len(requests):
        raise UsageError(
            what if len(requests) > 1 else f"{missing[0]}: does not exist",
            hint="Check the paths; those in a manifest start at its own folder.",
        )
    say(f"{what}; the others are done")


def shard_of(request: SlideRequest, parts: int) -> int:
    """Return which of 1..parts a slide belongs to: by its name alone, whatever else is in the list."""
    digest = hashlib.sha256(request.name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") % parts + 1


def _counted(passed: Sequence[PassedOver]) -> str:
    """Return how many were passed over for each reason."""
    reasons = Counter(one.why for one in passed)
    return ", ".join(f"{why} ({count})" for why, count in reasons.most_common())


def _in_folder(root: Path, passed: list[PassedOver]) -> list[SlideRequest]:
    """List the slides below a folder. The files of a DICOM series are one slide, however many they are.

    Raises:
        UsageError: the folder cannot be read.
    """
    try:
        met = search(root, lambda name: Path(name).suffix.lower() in SLIDE_SUFFIXES)
    except OSError as error:
        raise UsageError(f"{root}: cannot be searched: {error.strerror}", hint="Check its permissions.") from error
    passed += met.passed_over
    files = sorted(p for p in met.paths if _looks_like_a_slide(p, root))
    slides = {p.with_suffix("") for p in files if p.suffix.lower() not in _PICTURES}
    files = [p for p in files if p.suffix.lower() not in _PICTURES or p.with_suffix("") not in slides]  # thumbnails
    of_series = {p for p in files if dicom.is_dicom(p)}
    found = [SlideRequest(p) for p in files if p not in of_series]
    for folder in sorted({p.parent for p in of_series}):
        series = dicom.series_in(folder)
        for members in series.values():
            whole_folder = len(series) == 1 and len(members) > 1
            own_name = "" if members[0].suffix.lower() == dicom.SUFFIX else members[0].name  # a UID has no extension
            found.append(SlideRequest(members[0], called=folder.resolve().name if whole_folder else own_name))
    return sorted(found, key=lambda request: request.path)


def _is_more_of_a_series(path: Path, seen: set[tuple[Path, str]]) -> bool:
    """Say whether a file (of CASE/*.dcm, say) belongs to the series of one that was named before it."""
    series = dicom.series_of(path) if _is_plain_file(path) and dicom.is_dicom(path) else ""
    key = (path.parent, series)
    known = bool(series) and key in seen
    seen.add(key)
    return known


def _looks_like_a_slide(path: Path, root: Path) -> bool:
    parts = path.relative_to(root).parts
    if any(part.startswith(".") for part in parts) or any(p.lower().endswith(zarr_folder.SUFFIX) for p in parts[:-1]):
        return False
    if path.suffix.lower() == zarr_folder.SUFFIX:
        return path.is_dir() and zarr_folder.is_image(path)
    if path.suffix.lower() in _PICTURES and any(path.parent.glob("*.vm[su]")):  # the parts of a Hamamatsu VMS
        return False
    if path.suffix.lower() not in SLIDE_SUFFIXES and not dicom.is_dicom(path):
        return False
    # A.mrxs keeps its data in the folder A beside it: nothing in there is a slide of its own.
    inside = [parent for parent in path.parents if parent.is_relative_to(root) and parent != root]
    return path.is_file() and not any(parent.with_name(f"{parent.name}.mrxs").exists() for parent in inside)


def _listed(path: Path, say: Callable[[str], None]) -> list[SlideRequest]:
    """Read a manifest; relative paths start at its own folder."""
    requests = []
    for row in read_slide_table(path, say):
        try:
            mpp = float(row.mpp) if row.mpp else None
        except ValueError:
            mpp = math.nan
        if mpp is not None and not is_scale(mpp):
            raise UsageError(f"{path}: line {row.line}: mpp {row.mpp!r} is not a scale", hint="For example 0.25.")
        slide = path_or_url(row.slide) if is_url(row.slide) else path.parent / row.slide
        if isinstance(slide, SlideUrl):
            look_for_library(slide)
            if slide.is_folder:
                raise UsageError(f"{path}: line {row.line}: {slide}/: a folder", hint="Name its slides, one a line.")
        for beside in (row.mask, row.coords, row.classes):
            refuse_url(beside, f"{path}: line {row.line}:")
        called = row.name
        if called and (called != Path(called).name or called.startswith(".") or "\\" in called):
            raise UsageError(
                f"{path}: line {row.line}: name {called!r} cannot be a file's name",
                hint="A plain name, without folders.",
            )
        if not called and "\0" not in row.slide and slide.is_dir() and not zarr_folder.is_zarr(slide):
            called = slide.resolve().name  # a DICOM folder: its name has no extension to lose
        given_by = f"the manifest {path.name}" if mpp else ""
        request = SlideRequest(slide, mpp, given_by, path.parent / row.mask if row.mask else None, called)
        coords, classes = (path.parent / named if named else None for named in (row.coords, row.classes))
        requests.append(replace(request, coords=coords, classes=classes))
    return requests


def open_requested(request: SlideRequest, local: Path, beat: Callable[[], None]) -> WatchedSlide:
    """Open a slide, where it is or as its copy."""
    slide = open_slide(local, request.mpp, request.given_by)
    return WatchedSlide(StagedSlide(slide, local, request.path) if local != request.path else slide, beat, request.path)
