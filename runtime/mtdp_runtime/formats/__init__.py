"""Feature files as other tools read them, made from a finished HDF5 file.

The HDF5 file is the truth, and the only one that a run resumes; every other format is derived from it, whole, beside
its final name, and moved there at the end. So a format that is asked for later costs no inference.
"""

from __future__ import annotations

import glob
import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mtdp_runtime.errors import OutputUnwritable, UsageError

H5: Final = "h5"


@dataclass(frozen=True, slots=True)
class Format:
    """Where a format's file lies below the output folder, and what writes it."""

    place: str  # with {name}, the slide's name
    writer: str  # module:function of (h5 file, target)
    needs: str = ""  # a module that is not a dependency of the runtime
    install: str = ""


FORMATS: Final = {
    "pt": Format("pt_files/{name}.pt", "mtdp_runtime.formats.clam:write_pt"),
    "npy": Format("npy/{name}.npy", "mtdp_runtime.formats.npy:write_npy"),
    "csv": Format("model-outputs-csv/{name}.csv", "mtdp_runtime.formats.wsinfer:write_csv"),
    "geojson": Format("model-outputs-geojson/{name}.geojson", "mtdp_runtime.formats.wsinfer:write_geojson"),
    "zarr": Format(
        "{name}.zarr",
        "mtdp_runtime.formats.spatial:write_zarr",
        needs="spatialdata",
        install="pip install 'mtdp[spatial]'",
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


def derived_path(out: Path, slide: str, name: str) -> Path:
    """Where the file of a format lies."""
    return out / FORMATS[name].place.format(name=slide)


def derive(h5: Path, out: Path, names: Sequence[str]) -> list[Path]:
    """Write the files of some formats that are missing or older than the HDF5 file; return those written.

    Raises:
        OutputUnwritable: the disk is full or the folder cannot be written; the HDF5 file is untouched.
    """
    written = []
    for name in names:
        path = derived_path(out, h5.stem, name)
        if path.exists() and path.stat().st_mtime_ns >= h5.stat().st_mtime_ns:
            continue
        module, _, function = FORMATS[name].writer.partition(":")
        write: Callable[[Path, Path], None] = getattr(importlib.import_module(module), function)
        # The suffix stays last: some writers look at it.
        partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_dead(path)
            write(h5, partial)
            if path.is_dir():
                shutil.rmtree(path)
            partial.replace(path)
            os.utime(path)
        except OSError as error:
            raise OutputUnwritable(
                f"{path}: cannot be written: {error.strerror or error}",
                hint=f"{h5} is complete: free space, and run the same command again.",
            ) from error
        finally:
            _remove(partial)
        written.append(path)
    return written


def _remove_dead(path: Path) -> None:
    """Remove what processes that were killed left of a file: no process of another machine has the slide's claim."""
    start, end = f".{path.stem}.", f".partial{path.suffix}"
    for partial in path.parent.glob(f"{glob.escape(start)}*{glob.escape(end)}"):
        owner = partial.name.removeprefix(start).removesuffix(end)
        if owner.isascii() and owner.isdigit() and not _lives(int(owner)):
            _remove(partial)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except PermissionError:  # somebody else's
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def _remove(partial: Path) -> None:
    if partial.is_dir():
        shutil.rmtree(partial, ignore_errors=True)
    else:
        partial.unlink(missing_ok=True)
