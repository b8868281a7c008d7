"""Annotations give each tile the class that covers most of it; training data is made without a script."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mtdp_runtime
from mtdp_runtime.cohort.given_files import GivenRefused, fit_given, read_given
from mtdp_runtime.cohort.requests import SlideRequest
from mtdp_runtime.errors import UsageError
from mtdp_runtime.store.reader import open_features
from mtdp_runtime.store.verify import verify_folder
from mtdp_runtime.tiling.given_classes import classes_of, load_classes
from support import damage_tile, info_of


def box(x: float, y: float, wide: float, high: float, name: str | None, *holes: list[list[float]]) -> dict[str, Any]:
    ring = [[x, y], [x + wide, y], [x + wide, y + high], [x, y + high], [x, y]]
    properties = {"objectType": "annotation"} | ({} if name is None else {"classification": {"name": name}})
    geometry = {"type": "Polygon", "coordinates": [ring, *holes]}
    return {"type": "Feature", "geometry": geometry, "properties": properties}


def drawn(path: Path, *features: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"type": "FeatureCollection", "features": list(features)}))
    return path


def classes_at(path: Path, *places: tuple[int, int], bounds: Any = None) -> list[str]:
    """The class of tiles of 100 level-0 pixels."""
    classes = load_classes(path)
    found = classes_of(classes, info_of(4000, 4000, 0.5, bounds), np.array(places, np.int64), 100.0)
    return [(*classes.names, "")[number] for number in found.tolist()]


class TestTheRule:
    def test_the_class_of_the_largest_area_wins_and_background_is_one(self, tmp_path: Path) -> None:
        path = drawn(tmp_path / "a.geojson", box(0, 0, 60, 100, "Tumor"), box(60, 0, 140, 100, "Stroma"))
        found = classes_at(path, (0, 0), (15, 0), (100, 0), (145, 0), (160, 0), (3000, 0))
        assert found == ["Tumor", "Stroma", "Stroma", "Stroma", "", ""]

    def test_of_equal_areas_the_first_in_the_file_wins_and_any_class_before_background(self, tmp_path: Path) -> None:
        halves = box(0, 0, 50, 100, "B"), box(50, 0, 50, 100, "A")
        assert classes_at(drawn(tmp_path / "a.geojson", *halves), (0, 0)) == ["B"]
        assert classes_at(drawn(tmp_path / "b.geojson", *halves[::-1]), (0, 0)) == ["A"]
        assert classes_at(drawn(tmp_path / "c.geojson", halves[0]), (0, 0), (3, 0)) == ["B", ""]

    def test_what_one_class_covers_twice_counts_once(self, tmp_path: Path) -> None:
        path = drawn(tmp_path / "a.geojson", *[box(0, 0, 100, 30, "A")] * 3, box(0, 30, 100, 40, "B"))
        assert classes_at(path, (0, 0)) == ["B"]

    def test_ignored_annotations_and_holes_are_cut_out(self, tmp_path: Path) -> None:
        hole = [[10, 0], [90, 0], [90, 100], [10, 100], [10, 0]]
        cut = drawn(tmp_path / "a.geojson", box(0, 0, 100, 100, "A"), box(0, 0, 100, 60, "Ignore*"))
        holed = drawn(tmp_path / "b.geojson", box(0, 0, 100, 100, "A", hole), box(10, 0, 40, 100, "B"))
        assert (classes_at(cut, (0, 0), (0, 50)), classes_at(holed, (0, 0))) == (["", ""], ["B"])

    def test_annotations_without_a_class_and_regions_say_nothing(self, tmp_path: Path) -> None:
        whole = box(0, 0, 500, 500, None), box(0, 0, 500, 500, "Region*")
        assert classes_at(drawn(tmp_path / "a.geojson", *whole, box(0, 0, 60, 100, "A")), (0, 0), (200, 0)) == ["A", ""]
        with pytest.raises(UsageError, match=r"no area with a class \(2 areas in all\)"):
            load_classes(drawn(tmp_path / "b.geojson", *whole))

    @pytest.mark.parametrize("name", ["\ud800", "a\nb", "\0"])
    def test_a_class_that_cannot_be_written_is_said(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(UsageError, match="a class that is no text"):
            load_classes(drawn(tmp_path / "a.geojson", box(0, 0, 60, 100, name)))

    def test_more_classes_than_anybody_draws_are_said(self, tmp_path: Path) -> None:
        path = drawn(tmp_path / "a.geojson", *(box(0, 0, 9, 9, f"cell {i}") for i in range(10_001)))
        with pytest.raises(UsageError, match="10001 classes"):
            load_classes(path)

    def test_many_small_polygons_are_not_compared_with_every_tile(self, tmp_path: Path) -> None:
        """As cells are exported: each tile is of the class of the cells in it, and it takes no hours."""
        cells = [box(100 * i + 5, 100 * j + 5, 90, 90, "AB"[(i + j) % 2]) for i in range(40) for j in range(40)]
        places = [(100 * i, 100 * j) for i in range(40) for j in range(40)]
        found = classes_at(drawn(tmp_path / "a.geojson", *cells), *places)
        assert found == ["AB"[(i + j) % 2] for i in range(40) for j in range(40)]

    def test_they_count_from_the_corner_of_what_was_scanned(self, tmp_path: Path) -> None:
        path = drawn(tmp_path / "a.geojson", box(0, 0, 100, 100, "A"))
        assert classes_at(path, (1000, 2000), (0, 0), bounds=(1000, 2000, 500, 500)) == ["A", ""]

    def test_what_lies_outside_the_slide_is_anothers(self, tmp_path: Path) -> None:
        request = SlideRequest(Path("s.tiff"), classes=drawn(tmp_path / "a.geojson", box(9000, 0, 10, 10, "A")))
        with pytest.raises(GivenRefused, match="outside of"):
            fit_given(read_given(request), info_of(4000, 4000, 0.5), 224, 0.5)

    @pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff", b'{"type": "Point", "coordinates": [1, 2]}'])
    def test_what_is_no_file_of_classes_is_said(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "a.geojson").write_bytes(content)
        with pytest.raises(GivenRefused, match=r"a\.geojson"):
            read_given(SlideRequest(Path("s.tiff"), classes=tmp_path / "a.geojson"))

    @given(
        boxes=st.lists(st.tuples(*[st.integers(-30, 130)] * 2, *[st.integers(1, 120)] * 2, st.sampled_from("ABC")),
                       min_size=1, max_size=5),
        far=st.sampled_from([0, 190_000]),
    )  # fmt: skip
    @settings(max_examples=80)
    def test_the_law(self, tmp_path_factory: pytest.TempPathFactory, boxes: list[Any], far: int) -> None:
        """Compared with areas that are counted pixel by pixel; where two are within 3 %, either may win."""
        path = drawn(
            tmp_path_factory.mktemp("law") / "a.geojson", *(box(x + far, y + far, *rest) for x, y, *rest in boxes)
        )
        names = list(dict.fromkeys(name for *_, name in boxes))
        pixels = np.zeros((len(names), 100, 100), np.bool_)
        for x, y, wide, high, name in boxes:
            pixels[names.index(name), max(0, y) : max(0, y + high), max(0, x) : max(0, x + wide)] = True
        areas = [*pixels.mean(axis=(1, 2)).tolist(), float((~pixels.any(axis=0)).mean())]
        number = int(classes_of(load_classes(path), info_of(400_000, 400_000, 0.5), np.array([[far, far]]), 100.0)[0])
        assert areas[number] >= max(areas) - 0.03  # -1 is the last: background


def test_a_run_stores_them_and_says_them(tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path) -> None:
    slide, out = make_slide(), tmp_path / "o"
    path = drawn(tmp_path / "a.geojson", box(512, 0, 256, 768, "Tumor"), box(768, 0, 256, 384, "Stroma"))

    def run(out: Path, **arguments: Any) -> Any:
        (outcome,) = mtdp_runtime.extract(
            slide, out, model=tiny_bundle, backend="onnxruntime", formats=["csv", "geojson"], **arguments
        )
        return outcome

    assert run(out, classes=path).status == "done"
    with open_features(out / "slide.h5") as file:
        wanted = [
            "Tumor" if 512 <= x < 768 else "Stroma" if x >= 768 and y < 384 else "" for x, y in file.coords.tolist()
        ]
        assert list(file.classes or ()) == wanted
        assert {"Tumor", "Stroma", ""} == set(wanted)
    with h5py.File(out / "slide.h5") as raw:
        assert (raw["class"].dtype, json.loads(raw["class"].attrs["class_names"])) == (np.int16, ["Tumor", "Stroma"])
    with (out / "model-outputs-csv" / "slide.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["class"] for row in rows] == wanted
    shapes = json.loads((out / "model-outputs-geojson" / "slide.geojson").read_text())["features"]
    tiles = [shape["properties"] for shape in shapes if shape["properties"]["objectType"] == "tile"]
    assert [tile.get("classification", {}).get("name", "") for tile in tiles] == wanted
    assert [verdict.status for verdict in verify_folder(out)] == ["ok"]

    assert run(out, classes=path).status == "skipped"
    assert "classes is" in run(out, classes=drawn(tmp_path / "b.geojson", box(0, 0, 9, 9, "A"))).message
    assert "classes is" in run(out).message


def test_tiles_that_are_dropped_take_their_class_with_them(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    slide = make_slide(lossy=True)
    damage_tile(slide, 11)
    path = drawn(tmp_path / "a.geojson", box(512, 0, 256, 768, "Tumor"))
    (outcome,) = mtdp_runtime.extract(
        slide, tmp_path / "o", model=tiny_bundle, classes=path, on_bad_tile="drop", backend="onnxruntime"
    )
    assert outcome.left_out > 0
    with open_features(tmp_path / "o" / "slide.h5") as file:
        assert list(file.classes or ()) == ["Tumor" if 512 <= x < 768 else "" for x in file.coords[:, 0].tolist()]
    assert [verdict.status for verdict in verify_folder(tmp_path / "o")] == ["ok"]
