"""Tiles of one's own: each row of the list is computed, in its order, and nothing else; what cannot be is said."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mtdp_runtime
from mtdp_runtime import open_slide
from mtdp_runtime.cohort.given_files import GivenRefused, fit_given, read_given
from mtdp_runtime.cohort.requests import SlideRequest, list_slides
from mtdp_runtime.cohort.tile_file import read_tiles
from mtdp_runtime.errors import UsageError
from mtdp_runtime.slide import Level
from mtdp_runtime.slide.source import tiles_source
from mtdp_runtime.tiling.given_tiles import GivenTiles, TileList
from mtdp_runtime.tiling.grid import Grid
from mtdp_runtime.tiling.tissue import TissueMask, tissue_fractions, tissue_fractions_at
from support import TILE_PX, extract, info_of, one_error, pyramid, stained

HDF5 = b"\x89HDF\r\n\x1a\n"
PLACES = [(512, 64), (300, 301), (0, 0), (960, 704), (257, 13)]  # no grid has them; the first slide has 1024 x 768 px


run = partial(mtdp_runtime.extract, backend="onnxruntime")


def csv_of(path: Path, rows: list[tuple[Any, Any]] = PLACES, columns: str = "x,y") -> Path:
    path.write_text("\n".join([columns, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


def h5_of(path: Path, rows: Any = PLACES, root: dict[str, Any] | None = None, **attrs: Any) -> Path:
    with h5py.File(path, "w") as file:
        file.create_dataset("coords", data=np.asarray(rows)).attrs.update(attrs)
        file.attrs.update(root or {})
    return path


def parquet_of(path: Path, **columns: Any) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path)
    return path


def stored(path: Path) -> dict[str, Any]:
    with h5py.File(path) as file:
        return {name: file[name][:] for name in ("features", "coords", "status", "tissue_fraction")} | {
            "made_of": json.loads(file.attrs["made_of"]),
            "grid": json.loads(file.attrs["grid"]),
            "resampling": str(file.attrs["resampling"]),
        }


class TestTheFile:
    def xy(self, path: Path) -> list[tuple[int, int]]:
        return [(x, y) for x, y in read_tiles(path).places.tolist()]

    def test_every_kind_of_file_says_the_same_places_and_has_one_digest(self, tmp_path: Path) -> None:
        xs, ys = zip(*PLACES, strict=True)
        files = [
            csv_of(tmp_path / "a.csv"),
            csv_of(tmp_path / "b.csv", columns="coord_x,coord_y"),
            csv_of(tmp_path / "c.csv", [(y, x) for x, y in PLACES], columns="Y, X "),
            csv_of(tmp_path / "d.csv", [(f"{x}.0", f"{y}e0") for x, y in PLACES], columns="minx,miny"),
            h5_of(tmp_path / "e.h5"),
            h5_of(tmp_path / "f.any", np.array(PLACES, np.uint32)),
            h5_of(tmp_path / "g.h5", np.array(PLACES, np.float32)),
            parquet_of(tmp_path / "h.parquet", x=xs, y=ys, score=[0.5] * 5),
            parquet_of(tmp_path / "i.pq", coord_x=np.array(xs, np.float64), coord_y=np.array(ys, np.int32)),
        ]
        semicolons = tmp_path / "j.txt"
        semicolons.write_bytes("\ufeffx;y;note\n".encode() + "".join(f"{x};{y};µ\n" for x, y in PLACES).encode())
        for path in [*files, semicolons]:
            assert self.xy(path) == PLACES, path
        assert len({read_tiles(path).digest for path in [*files, semicolons]}) == 1
        assert read_tiles(csv_of(tmp_path / "k.csv", PLACES[::-1])).digest != read_tiles(files[0]).digest

    @pytest.mark.parametrize(
        "content", ["\n\nx,y\n1,2\n", "sep=;\nx;y\n1;2\n", "x,y\r1,2\r", "x,y\r\n1,2\r\n,\r\n \n", ",x,y\n0,1,2\n"]
    )
    def test_tables_as_programs_leave_them(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "a.csv").write_bytes(content.encode())
        assert self.xy(tmp_path / "a.csv") == [(1, 2)]

    def test_whole_decimals_are_whole_and_a_column_that_stands_twice_is_said(self, tmp_path: Path) -> None:
        decimals = parquet_of(tmp_path / "a.parquet", x=[Decimal("1.0")], y=[2])
        assert self.xy(decimals) == [(1, 2)]
        twice = parquet_of(tmp_path / "b.parquet", x=[1], X=[2], y=[3])
        with pytest.raises(UsageError, match="two columns named 'x'"):
            read_tiles(twice)

    def test_a_list_of_no_tiles_is_a_list(self, tmp_path: Path) -> None:
        assert self.xy(csv_of(tmp_path / "a.csv", [])) == []
        assert self.xy(h5_of(tmp_path / "a.h5", np.zeros((0, 2), np.int64))) == []

    @pytest.mark.parametrize(
        ("columns", "rows", "message"),
        [
            ("x,y", [(1, 2), (3, "nan")], "row 2: y is 'nan': not a whole number"),
            ("x,y", [(1, 2), ("", 4)], "row 2: x is '': not a whole number"),
            ("x,y", [(1.5, 2), (3.5, 4)], "row 1: x is '1.5': not a whole number of pixels, and 1 more"),
            ("x,y", [(1, "inf")], "row 1: y is 'inf'"),
            ("x,y", [("1_000", 2)], "row 1: x is '1_000'"),
            ("x,y", [("\u0661", 2)], "row 1: x is"),
            ("x,y", [("0x10", 2)], "row 1: x is '0x10'"),
            ("x,y", [("9" * 400, 2)], "row 1: x is '9"),
            ("x,y", [("1e400", 2)], "row 1: x is '1e400'"),
            ("x,y", [(2**53, 2)], "row 1: x is '9007199254740992'"),
            ("x,y", [(1, 2, 3)], "row 1 has 3 fields, and there are 2 columns"),
            ("x,z", [(1, 2)], r"no columns x,y \(columns: x, z\)"),
            ("x,y,minx,miny", [(1, 2, 3, 4)], "two pairs of columns could be the places: x,y and minx,miny"),
            ("x,x,y", [(1, 2, 3)], "two columns named 'x'"),
            ("x,y,X", [(1, 2, 3)], "two columns named 'x'"),
            ("slide,x,y", [("a", 2, 3), ("b", 2, 3)], r"lists tiles of 2 slides \(column slide\)"),
            ("minx,miny,width,height", [(1, 2, 64, 64), (1, 2, 64, 32)], "sides of 32 to 64 px"),
        ],
    )
    def test_what_is_no_list_is_an_error_that_says_where(
        self, tmp_path: Path, columns: str, rows: list[Any], message: str
    ) -> None:
        with pytest.raises(UsageError, match=message):
            read_tiles(csv_of(tmp_path / "a.csv", rows, columns))

    @pytest.mark.parametrize(
        ("rows", "root", "message"),
        [
            ([[1, 2, 3]], {}, r"coords has the shape \(1, 3\)"),
            ([1, 2], {}, r"coords has the shape \(2,\)"),
            ([[0.5, 2.0]], {}, "row 1: x is 0.5"),
            ([[np.nan, 2.0]], {}, "row 1: x is nan"),
            ([[1.0, 2.0]], {"unit": "um"}, "micrometres"),
            ([[b"1", b"x"]], {}, "not a whole number"),
            ([[True, False]], {}, "is of the type bool"),
        ],
    )
    def test_of_hdf5_too(self, tmp_path: Path, rows: Any, root: dict[str, Any], message: str) -> None:
        with pytest.raises(UsageError, match=message):
            read_tiles(h5_of(tmp_path / "a.h5", rows, root))

    def test_coords_that_lie_in_another_file_are_not_fetched(self, tmp_path: Path) -> None:
        h5_of(tmp_path / "real.h5")
        with h5py.File(tmp_path / "link.h5", "w") as file:
            file["coords"] = h5py.ExternalLink("real.h5", "coords")
        with pytest.raises(UsageError, match="has no dataset coords"):
            read_tiles(tmp_path / "link.h5")

    @pytest.mark.parametrize("column", [[1, None], [True, False], ["1", "x"], [[1], [2]]])
    def test_of_parquet_too(self, tmp_path: Path, column: list[Any]) -> None:
        path = parquet_of(tmp_path / "a.parquet", x=column, y=[1, 2])
        with pytest.raises(GivenRefused, match=r"not a whole number|is of the type"):
            read_given(SlideRequest(Path("slide.tiff"), coords=path))

    @pytest.mark.parametrize("content", [b"", HDF5, b"PAR1", HDF5 + b"x" * 99, b"\0" * 99])
    def test_of_a_damaged_file_too(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "a.h5").write_bytes(content)
        with pytest.raises(GivenRefused, match=r"a\.h5"):
            read_given(SlideRequest(Path("slide.tiff"), coords=tmp_path / "a.h5"))


class TestTheSlide:
    """What a list says of its tiles must be true of the slide and the model: 224 px at 0.5 µm/px on 0.25 µm/px."""

    def fits(self, path: Path, mpp0: float = 0.25) -> None:
        fit_given(read_given(SlideRequest(Path("slide.tiff"), coords=path)), info_of(9000, 8000, mpp0), 224, 0.5)

    @pytest.mark.parametrize(
        "attrs",
        [
            {},
            {"patch_size": 224, "patch_size_level0": 448, "level0_width": 9000, "level0_height": 8000},
            {"patch_size": 256, "patch_size_level0": 448, "target_magnification": 20, "name": "None"},
            {"patch_size": 448, "patch_level": 0},
            {"patch_size": 448, "patch_level": 0, "downsample": [1.0, 1.0], "level_dim": (9000, 8000)},
            {"patch_size": 112, "patch_level": 2, "downsample": [4.0, 4.0]},
            {"patch_size": 224, "patch_level": 0, "custom_downsample": 2},
        ],
    )
    def test_what_agrees_is_taken(self, tmp_path: Path, attrs: dict[str, Any]) -> None:
        self.fits(h5_of(tmp_path / "a.h5", **attrs))

    def test_tridents_rounding_of_a_scale_is_taken_and_a_wrong_one_is_not(self, tmp_path: Path) -> None:
        path = h5_of(tmp_path / "a.h5", patch_size_level0=448)
        self.fits(path, 0.2527)
        with pytest.raises(GivenRefused, match=r"its tiles have 448 level-0 px; the model's have 493\.392") as refused:
            self.fits(path, 0.227)
        assert "mtdp-extract --mpp 0.454" in refused.value.hint

    @pytest.mark.parametrize(
        ("attrs", "message"),
        [
            ({"patch_size_level0": 512}, "its tiles have 512 level-0 px; the model's have 448"),
            ({"patch_size": 224, "patch_level": 0}, "its tiles have 224 level-0 px"),
            ({"patch_size": 448, "patch_level": 1, "downsample": [4.0, 4.0]}, "its tiles have 1792"),
            ({"patch_size": 224, "patch_level": 1}, "its tiles are of level 1; slide.tiff has 1 levels"),
            ({"level0_width": 9001, "level0_height": 8000}, "made for a slide of 9001 x 8000 px"),
        ],
    )
    def test_what_does_not_agree_is_refused(self, tmp_path: Path, attrs: dict[str, Any], message: str) -> None:
        with pytest.raises(GivenRefused, match=message):
            self.fits(h5_of(tmp_path / "a.h5", **attrs))

    def test_wsinfers_columns_say_the_size_of_a_tile(self, tmp_path: Path) -> None:
        self.fits(csv_of(tmp_path / "a.csv", [(1, 2, 448, 448)], "minx,miny,width,height"))
        with pytest.raises(GivenRefused, match="its tiles have 350"):
            self.fits(csv_of(tmp_path / "a.csv", [(1, 2, 350, 350)], "minx,miny,width,height"))

    @pytest.mark.parametrize("place", [(9000, 0), (0, 8000), (-448, 0), (0, -448), (2**39, 5)])
    def test_a_tile_that_lies_outside_is_of_another_slide(self, tmp_path: Path, place: tuple[int, int]) -> None:
        with pytest.raises(GivenRefused, match=r"1 of 2 tiles lie outside of slide.tiff \(9000 x 8000 px\): tile 2 at"):
            self.fits(csv_of(tmp_path / "a.csv", [(0, 0), place]))

    @pytest.mark.parametrize("place", [(8999, 0), (0, 7999), (-447, 0), (0, -447)])
    def test_a_tile_that_reaches_over_the_edge_is_taken(self, tmp_path: Path, place: tuple[int, int]) -> None:
        self.fits(csv_of(tmp_path / "a.csv", [(0, 0), place]))


places = st.lists(st.tuples(st.integers(-90, 400), st.integers(-90, 300)), min_size=1, max_size=12)


@given(mask=st.integers(0, 2**20), at=places, scale=st.sampled_from([1.0, 3.7, 16.0]), side=st.floats(1.0, 90.0))
@settings(max_examples=60)
def test_the_tissue_of_a_tile_is_the_area_of_it_that_the_mask_covers(
    mask: int, at: list[tuple[int, int]], scale: float, side: float
) -> None:
    pixels = np.random.default_rng(mask).random((14, 17)) < 0.5
    tissue = TissueMask(pixels, np.zeros((14, 17, 3), np.uint8), scale, 5, 3, 1.0, 0.0, 0)

    def oracle(x: float, y: float) -> float:
        area = 0.0
        for row, column in np.argwhere(pixels).tolist():
            left, top = 5 + column * scale, 3 + row * scale
            wide = min(left + scale, x + side) - max(left, x)
            high = min(top + scale, y + side) - max(top, y)
            area += max(0.0, wide) * max(0.0, high)
        return area / side**2

    found = tissue_fractions_at(tissue, np.array(at, np.int64), side)
    np.testing.assert_allclose(found, [oracle(x, y) for x, y in at], atol=1e-5)


def test_a_grid_and_the_list_of_its_tiles_cover_the_same_tissue() -> None:
    pixels = np.random.default_rng(0).random((40, 50)) < 0.5
    tissue = TissueMask(pixels, np.zeros((40, 50, 3), np.uint8), 7.3, 11, 2, 1.0, 0.0, 0)
    grid = Grid(tile_px=16, scale=1.3, step0=19.7, columns=15, rows=13, x0=11, y0=2)
    listed = tissue_fractions_at(tissue, grid.origins(), grid.tile0)
    np.testing.assert_allclose(listed, tissue_fractions(tissue, grid), atol=1e-6)


class TestTheLawOfResampling:
    def test_a_coarser_level_is_a_source_only_where_all_tiles_lie_on_its_pixels(self) -> None:
        info = info_of(4000, 4000, 0.25)
        info = type(info)(**{name: getattr(info, name) for name in info.__slots__} | {  # two levels
            "levels": (Level(4000, 4000, 1.0), Level(2000, 2000, 2.0))
        })  # fmt: skip

        def level(rows: list[tuple[int, int]]) -> int:
            tiles = TileList(GivenTiles(Path("a.csv"), np.array(rows, np.int64).reshape(-1, 2)), 224, 2.0)
            return tiles_source(info, tiles.scale, tiles.tile_px, tiles.aligned).level

        assert [level([(2, 4), (-8, 0)]), level([(2, 4), (3, 0)]), level([(2, 5)]), level([])] == [1, 0, 0, 1]

    def test_tiles_at_any_place_are_exact_averages_of_level_0(self, tiny_bundle: Path, tmp_path: Path) -> None:
        """The features of the list are those of the model on tiles averaged by hand; one odd place decides for all."""
        import onnxruntime

        image = stained(768, 1024, 3)
        slide = pyramid(image, tmp_path / "slide.tiff", 0.25, levels=2)
        session = onnxruntime.InferenceSession(tiny_bundle / "model.fp32.onnx", providers=["CPUExecutionProvider"])
        for name, rows, source in (
            ("odd", [(301, 200), (400, 100)], "level 0"),
            ("even", [(300, 200)], "level 1"),
        ):
            out = tmp_path / name
            run(slide, out, model=tiny_bundle, coords=csv_of(tmp_path / f"{name}.csv", rows))
            found = stored(out / "slide.h5")
            assert found["resampling"].startswith(source)
            tiles = [image[y : y + 128, x : x + 128].reshape(64, 2, 64, 2, 3).mean(axis=(1, 3)) for x, y in rows]
            (wanted,) = session.run(["features"], {"tiles": np.rint(np.array(tiles)).astype(np.uint8)})
            np.testing.assert_allclose(found["features"], wanted, atol=2e-3)


class TestTheRun:
    def test_rows_are_those_of_the_list_whatever_is_tissue(
        self, tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
    ) -> None:
        slide, out = make_slide(), tmp_path / "o"
        rows = [*PLACES, (0, 0), (-20, 740)]  # one again, and one over the edge
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            (outcome,) = run(
                slide, out, model=tiny_bundle, coords=csv_of(tmp_path / "a.csv", rows), check=7, report=True,
                formats=["csv", "geojson", "npy"],
            )  # fmt: skip
        assert (outcome.status, outcome.tiles, outcome.bad_tiles) == ("done", 7, 0)
        assert "1 of 7 tiles reach over the slide's edge" in outcome.warning
        assert "1 of 7 tiles stand there already" in outcome.warning
        assert outcome.agreement is not None
        assert outcome.agreement.min_cosine > 0.999999
        found = stored(out / "slide.h5")
        assert found["coords"].tolist() == [list(row) for row in rows]
        np.testing.assert_array_equal(found["features"][2], found["features"][5])
        assert found["tissue_fraction"][2] == 0 < found["tissue_fraction"][0], "the left quarter is glass"
        assert found["made_of"]["coords"] == found["grid"]["digest"]
        assert not {"stride_px", "min_tissue"} & set(found["made_of"])
        shapes = json.loads((out / "model-outputs-geojson" / "slide.geojson").read_text())["features"]
        ids = [shape["id"] for shape in shapes if shape["properties"]["objectType"] == "tile"]
        assert len(set(ids)) == len(ids) == 7

    def test_a_grid_and_the_list_of_its_tiles_give_the_same_bytes(
        self, tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
    ) -> None:
        """So a feature file of ours is a list of tiles: another model sees what the first one saw."""
        slide = make_slide(mpp=0.37, levels=3)
        run(slide, tmp_path / "grid", model=tiny_bundle)
        first = tmp_path / "grid" / "slide.h5"
        run(slide, tmp_path / "list", model=tiny_bundle, coords=first)
        laid, listed = stored(first), stored(tmp_path / "list" / "slide.h5")
        assert laid["resampling"] == listed["resampling"]
        for name in ("features", "coords", "status"):
            np.testing.assert_array_equal(laid[name], listed[name])
        np.testing.assert_allclose(laid["tissue_fraction"], listed["tissue_fraction"], atol=1e-6)

    def test_the_list_is_in_the_fingerprint(
        self, tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
    ) -> None:
        slide, out = make_slide(), tmp_path / "o"

        def status(path: Path) -> tuple[str, str]:
            (outcome,) = run(slide, out, model=tiny_bundle, coords=path)
            return outcome.status, outcome.message

        assert status(csv_of(tmp_path / "a.csv"))[0] == "done"
        assert status(h5_of(tmp_path / "same.h5"))[0] == "skipped"
        again, message = status(csv_of(tmp_path / "a.csv", PLACES[::-1]))
        assert again == "failed"
        assert "coords is" in message

    def test_a_list_of_no_tiles_gives_an_empty_file(
        self, tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
    ) -> None:
        path = csv_of(tmp_path / "a.csv", [])
        (outcome,) = run(make_slide(), tmp_path / "o", model=tiny_bundle, coords=path)
        assert (outcome.status, outcome.tiles) == ("no-tissue", 0)
        assert outcome.message == f"{path} lists no tile"

    def test_each_slide_of_a_cohort_has_its_own_list_in_a_folder_or_a_manifest(
        self, tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
    ) -> None:
        slides = [make_slide("a.tiff"), make_slide("b.tiff"), make_slide("c.tiff")]
        lists = tmp_path / "lists"
        lists.mkdir()
        csv_of(lists / "a.csv", PLACES[:1])
        h5_of(lists / "b_patches.h5", PLACES[:2])
        with pytest.warns(UserWarning, match="will fail, the others are done: .*not one file of this slide's tiles"):
            outcomes = run(slides, tmp_path / "o", model=tiny_bundle, coords=lists)
        assert [(one.status, one.tiles) for one in outcomes] == [("done", 1), ("done", 2), ("failed", 0)]
        table = tmp_path / "slides.csv"
        table.write_text("slide,coords\na.tiff,lists/a.csv\nb.tiff,lists/b_patches.h5\nc.tiff,\n")
        outcomes = run(table, tmp_path / "o", model=tiny_bundle)
        assert [(one.status, one.tiles) for one in outcomes] == [("skipped", 0), ("skipped", 0), ("done", 144)]

    def test_failed_slides_keep_their_list_in_failed_csv(
        self, tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
    ) -> None:
        make_slide("a.tiff")
        make_slide("b.tiff")
        csv_of(tmp_path / "wrong.csv", [(99_999, 0)])
        (tmp_path / "slides.csv").write_text("slide,coords\na.tiff,wrong.csv\nb.tiff,\n")
        with pytest.warns(UserWarning, match="lie outside"):
            run(tmp_path / "slides.csv", tmp_path / "o", model=tiny_bundle)
        (request,) = list_slides([tmp_path / "o" / "failed.csv"])
        assert request.coords == tmp_path / "wrong.csv"

    def test_one_list_for_two_slides_is_wrong_usage(self, make_slide: Callable[..., Path], tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="one file for 2 slides"):
            list_slides([make_slide("a.tiff"), make_slide("b.tiff")], coords=csv_of(tmp_path / "a.csv"))

    @pytest.mark.parametrize("option", [("--stride-px", 64), ("--min-tissue", 0.25)])
    def test_what_a_list_leaves_nothing_to_decide_is_not_taken_with_it(
        self, tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path, option: tuple[str, object]
    ) -> None:
        result = extract(make_slide(), "--model", tiny_bundle, "--coords", csv_of(tmp_path / "a.csv"), *option)
        assert result.returncode == 2
        assert option[0] in one_error(result)

    def test_the_dry_run_counts_the_list(
        self, tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
    ) -> None:
        rows = [*PLACES, (-1, 0)]
        result = extract(
            make_slide(), "--model", tiny_bundle, "--coords", csv_of(tmp_path / "a.csv", rows), "--dry-run"
        )
        assert result.returncode == 0, result.stderr
        assert f"6 tiles of {TILE_PX} px" in result.stdout
        assert "1 of 6 tiles reach over the slide's edge" in result.stderr


def test_a_real_slide_at_places_of_ones_own(slides_dir: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    rows = np.random.default_rng(7).integers(0, 2000, (16, 2)).tolist()
    path = csv_of(tmp_path / "a.csv", [tuple(row) for row in rows])
    slide = slides_dir / "CMU-1-Small-Region.svs"
    (outcome,) = run(slide, tmp_path / "o", model=tiny_bundle, coords=path, check=16)
    assert outcome.status == "done"
    assert outcome.agreement is not None
    assert outcome.agreement.min_cosine > 0.999999
    with open_slide(slide) as opened:
        assert outcome.own_decoder == opened.info.own_decoder
