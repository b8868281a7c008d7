"""The report of a slide: one HTML file that asks for nothing else.

It is drawn from the finished feature file and a thumbnail of the slide, so it can be made at any time after the run.
The tiles that it shows are read from the slide again; where that is gone, the report says so.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from mtdp_runtime.report import places
from mtdp_runtime.report.colours import Colours, folder_colours
from mtdp_runtime.report.maps import probability_maps
from mtdp_runtime.report.overview import Thumbnail, overview, scale_bar, with_colours, with_grid
from mtdp_runtime.report.page import END, document, figure
from mtdp_runtime.report.slide_sections import bad_tiles, facts, head, tiles_seen, timing, tissue_histogram
from mtdp_runtime.report.thumbnails import write_thumbnail
from mtdp_runtime.slide import Slide
from mtdp_runtime.store import derived, run_log
from mtdp_runtime.store.reader import FeatureFile, open_features

KIND: Final = "report"  # among what is derived from a feature file


def report_is_current(path: Path, features: Path) -> bool:
    """Say whether the report was made from what the file holds now; of an earlier version's reports, by their time."""
    if derived.is_current(features, KIND, [path]):
        return True
    try:
        older = KIND not in derived.records(features) and path.stat().st_mtime_ns >= features.stat().st_mtime_ns
        return older and path.read_bytes().endswith(END.encode())
    except OSError:
        return False


def write_report(path: Path, features: Path, thumbnail: Thumbnail, slide: Slide | None = None) -> None:
    """Write the report of a finished feature file, and the slide's small picture beside it.

    Args:
        path: of the report.
        features: the file.
        thumbnail: of its slide.
        slide: from which the tiles that it shows are read; None where it is gone.

    Raises:
        StoreError: the file cannot be read.
        OutputUnwritable: the folder cannot be written. The features are not touched.
    """
    picture = places.thumbnail(features.parent, features.stem)
    parts: list[tuple[Path, Callable[[Path], None]]] = [
        (picture, lambda target: write_thumbnail(target, thumbnail.image)),
        # Last: a page that is there, and in no record, counts as one of an earlier version that had nothing beside it.
        (path, lambda target: _write(target, features, thumbnail, slide)),
    ]
    derived.make(features, KIND, parts)


def _write(target: Path, features: Path, thumbnail: Thumbnail, slide: Slide | None) -> None:
    with open_features(features) as file:
        parts = [
            f'<nav><a href="{_run_page_from(features.parent)}">All slides</a></nav><main>',
            head(file),
            bad_tiles(file),
            _pictures(file, thumbnail, folder_colours(features.parent, file) if len(file) else None),
            tiles_seen(file, slide),
            probability_maps(file),
            tissue_histogram(file),
            timing(file),
            facts(file.attrs),
            "</main>",
        ]
        page = document(str(file.attrs["slide"]), parts)
    target.write_text(page, encoding="utf-8", errors="backslashreplace")


def _run_page_from(folder: Path) -> str:
    """Return the address of the run's page: each scale and model of several has a folder of its own below the run's."""
    run = next((one for one in (folder, *folder.parents[:2]) if (one / run_log.NAME).exists()), folder)
    up = len(folder.relative_to(run).parts)
    return f"{'../' * (up + 1)}report/index.html" if up else "index.html"


def _pictures(file: FeatureFile, thumbnail: Thumbnail, colours: Colours | None) -> str:
    seen = overview(file, thumbnail)
    bar = scale_bar(seen.image.shape[1], seen.zoom, float(file.attrs["mpp_level0"]))
    figures = figure(
        with_grid(file, seen),
        f"Tissue (green outline; {file.attrs['tissue_source']}) and the tiles that were computed (blue; red: bad).",
        "The slide, the outline of its tissue, and its tiles",
        bar,
    )
    if colours is not None:
        whose = (
            f"They are the same for every slide of this folder and model; {colours.slide} defined them."
            if colours.shared
            else "This slide has too few tiles to define colours for others: they are its own."
        )
        figures += figure(
            with_colours(seen, colours.of_file(file)),
            "Features as colours: the first three principal components as red, green and blue. Tiles of one colour "
            f"look alike to the model. {whose}",
            "The slide with each tile in the colour of its features",
            bar,
        )
    return f"<div class=pair>{figures}</div>"
