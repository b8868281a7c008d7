"""What the user named, as what is shown: slides with the features that are theirs, and features with their slides."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from mtdp_runtime.view.session import Shown


def features_in(folder: Path) -> list[Path]:
    """Return the feature files below a folder, sorted; nothing hidden, and nothing of a Zarr store."""
    found: list[Path] = []
    for here, below, names in os.walk(folder):
        below[:] = [name for name in below if not name.startswith(".") and not name.endswith(".zarr")]
        found += [Path(here) / name for name in names if name.endswith(".h5") and not name.startswith(".")]
    return sorted(found)


def shown_of(path: Path) -> list[Shown]:
    """Return what a feature file shows, or those of a folder: each under the name of its sub-folder, too, if any."""
    if path.suffix == ".h5" and path.is_file():
        return [Shown(path.stem, None, features=path)]
    return [Shown(one.relative_to(path).with_suffix("").as_posix(), None, features=one) for one in features_in(path)]


def with_features(shown: Shown, features: Path | None) -> Shown:
    """Add the features of a slide: a file, or the file of its name in a folder, if it is there."""
    if features is None:
        return shown
    path = features if features.is_file() else features / f"{shown.name}.h5"
    return replace(shown, features=path if path.is_file() else None)
