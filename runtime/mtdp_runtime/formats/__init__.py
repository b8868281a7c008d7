"""Feature files as other tools read them, made from a finished HDF5 file.

The HDF5 file is the truth, and the only one that a run resumes; every other format is derived from it, whole, beside
its final name, and moved there at the end. So a format that is asked for later costs no inference.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from mtdp_runtime.errors import UsageError

H5: Final = "h5"
_COORDS: Final = ".coords"


@dataclass(frozen=True, slots=True)
class Format:
    """Where a format's file lies below the output folder, and what writes it."""

    place: str  # with {name}, the slide's name
    writer: str  # module:function of (h5 file, target)
    needs: str = ""  # a module that is not a dependency of the runtime
    install: str = ""
    takes_none: bool = True  # a file of no rows means something to its readers
    before: tuple[str, str] | None = None  # place and writer of a file that belongs to it and is written first

    def parts(self) -> list[tuple[str, str]]:
        """Place and writer of each of its files, in the order in which they are written."""
        return [*([self.before] if self.before else []), (self.place, self.writer)]


FORMATS: Final = {
    "pt": Format("pt_files/{name}.pt", "mtdp_runtime.formats.clam:write_pt", takes_none=False),
    "npy": Format(
        "npy/{name}.npy",
        "mtdp_runtime.formats.npy:write_npy",
        # First: who finds the features finds their places.
        before=("npy/{name}.coords.npy", "mtdp_runtime.formats.npy:write_coords"),
    ),
    "csv": Format("model-outputs-csv/{name}.csv", "mtdp_runtime.formats.wsinfer:write_csv"),
    "geojson": Format("model-outputs-geojson/{name}.geojson", "mtdp_runtime.formats.wsinfer:write_geojson"),
    "zarr": Format(
        "{name}.zarr",
        "mtdp_runtime.formats.spatial:write_zarr",
        needs="spatialdata",
        install="pip install 'mtdp[spatial]'",
    ),
    "h5ad": Format(
        "h5ad/{name}.h5ad",
        "mtdp_runtime.formats.annotated:write_h5ad",
        needs="anndata",
        install="pip install 'mtdp[spatial]'",
    ),
    "parquet": Format(
        "parquet/{name}.parquet",
        "mtdp_runtime.formats.table:write_parquet",
        needs="pyarrow",
        install="pip install 'mtdp[parquet]'",
    ),
}


def check_formats(names: Sequence[str]) -> tuple[str, ...]:
    """Return the formats to derive, before any work is done.

    Raises:
        UsageError: a name is unknown, or what it needs is not installed.
    """
    for name in names:
        if name != H5 and name not in FORMATS:
            raise UsageError(f"--format {name!r}: unknown", hint=f"One or more of {H5}, {', '.join(FORMATS)}.")
        if name != H5 and FORMATS[name].needs and importlib.util.find_spec(FORMATS[name].needs) is None:
            raise UsageError(f"--format {name} needs {FORMATS[name].needs}", hint=FORMATS[name].install)
    return tuple(dict.fromkeys(name for name in names if name != H5))


def check_slide_names(slides: Sequence[str], names: Sequence[str]) -> None:
    """Refuse slides whose files of a format would have the names of another slide's, before any work is done.

    Raises:
        UsageError: NumPy's format keeps the coordinates of a slide `x` in `x.coords.npy`.
    """
    clash = next((slide for slide in slides if slide.endswith(_COORDS)), "") if "npy" in names else ""
    if clash:
        raise UsageError(
            f"--format npy: {clash}.npy holds the coordinates of a slide called {clash.removesuffix(_COORDS)}",
            hint="Give the slide another name: a manifest with the columns slide,name.",
        )


def derived_path(out: Path, slide: str, name: str) -> Path:
    """Where the file of a format lies."""
    return out / FORMATS[name].place.format(name=slide)


def paths_of(out: Path, slide: str, name: str) -> list[Path]:
    """Where all files of a format lie, in the order in which they are written."""
    return [out / place.format(name=slide) for place, _ in FORMATS[name].parts()]


def derive(h5: Path, out: Path, names: Sequence[str]) -> list[Path]:
    """Write the files of some formats that are missing or not made from this HDF5 file; return those written.

    A bag of no tiles is not written: who trains on a folder of bags would meet it as an error far from its cause.

    Raises:
        UsageError: as `check_slide_names`.
        OutputUnwritable: the disk is full or the folder cannot be written; the HDF5 file is untouched.
    """
    from mtdp_runtime.store import derived  # the command's --help needs the names of the formats, and no HDF5

    check_slide_names([h5.stem], names)
    written = []
    for name in names:
        paths = paths_of(out, h5.stem, name)
        if not FORMATS[name].takes_none and is_empty(h5):
            derived.remove(h5, name, paths)  # an earlier version wrote one
            continue
        if derived.is_current(h5, name, paths):
            continue
        writers = [_writer(writer) for _, writer in FORMATS[name].parts()]
        derived.make(h5, name, [(path, partial(write, h5)) for path, write in zip(paths, writers, strict=True)])
        written.append(derived_path(out, h5.stem, name))
    return written


def is_empty(h5: Path) -> bool:
    """Say whether a feature file has no row of features.

    Raises:
        StoreError: it cannot be read.
    """
    from mtdp_runtime.store.reader import open_features

    with open_features(h5) as file:
        return not file.good.any()


def without_file(names: Sequence[str]) -> list[str]:
    """Return those formats of which an empty slide gets no file."""
    return [name for name in names if name in FORMATS and not FORMATS[name].takes_none]


def _writer(name: str) -> Callable[[Path, Path], None]:
    module, _, function = name.partition(":")
    found: Callable[[Path, Path], None] = getattr(importlib.import_module(module), function)
    return found
