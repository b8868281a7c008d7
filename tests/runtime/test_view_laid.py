"""What a viewer lays over a slide beside its features: scores, annotations, and what else looks like a tile."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from numpy.typing import NDArray
from starlette.testclient import TestClient

from mtdp_runtime import extract
from mtdp_runtime.errors import UsageError
from mtdp_runtime.view import similar
from mtdp_runtime.view.named import shown_of
from mtdp_runtime.view.scores import read_scores
from mtdp_runtime.view.server import make_app
from mtdp_runtime.view.session import Session, Shown
from support import pyramid, stained, write_tiny_bundle

TOKEN = "the-token"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two slides with the features of one model."""
    folder = tmp_path_factory.mktemp("out")
    bundle = write_tiny_bundle(folder / "tiny")
    slides = [pyramid(stained(448, 640, seed), folder / f"{name}.tiff", 0.5) for seed, name in enumerate("ab")]
    outcomes = extract(slides, folder / "features", model=bundle, backend="onnxruntime", threads=1)
    assert [outcome.status for outcome in outcomes] == ["done", "done"]
    return folder / "features"


@pytest.fixture
def own(out: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(out, tmp_path / "own"))


@pytest.fixture
def coords(out: Path) -> NDArray[np.int64]:
    with h5py.File(out / "a.h5") as file:
        return np.asarray(file["coords"][:])


def client(shown: list[Shown], *scores: Path, annotations: tuple[Path, ...] = ()) -> TestClient:
    return TestClient(make_app(Session(tuple(shown), TOKEN, scores, annotations)), base_url="http://127.0.0.1:1")


def ask(app: TestClient, path: str, number: int = 0) -> Any:
    answer = app.get(f"/{TOKEN}/api/slides/{number}{path}")
    assert answer.status_code == 200, answer.text
    return answer.json() if "json" in answer.headers["content-type"] else answer.content


def layer(app: TestClient, number: int = 0) -> dict[str, Any] | None:
    return next((one for one in ask(app, "", number)["layers"] if one["id"].startswith("scores")), None)


def values(app: TestClient, column: int = 0) -> NDArray[np.float32]:
    return np.frombuffer(ask(app, f"/values/scores:0/{column}"), np.float32)


def only_a(out: Path) -> list[Shown]:
    return [Shown("a", None, out / "a.h5")]


class TestScores:
    @pytest.mark.parametrize("kind", ["csv", "semicolons", "wsinfer", "parquet"])
    def test_a_table_belongs_to_tiles_by_their_places(
        self, out: Path, coords: NDArray[np.int64], tmp_path: Path, kind: str
    ) -> None:
        order = np.random.default_rng(0).permutation(len(coords))
        wanted = np.linspace(-1, 1, len(coords)).astype(np.float32)
        places, shuffled = coords[order].tolist(), wanted[order].tolist()
        path = tmp_path / "a.csv"
        if kind == "parquet":
            path = tmp_path / "a.parquet"
            columns = {"x": coords[order, 0], "y": coords[order, 1], "value": wanted[order]}
            pyarrow.parquet.write_table(pyarrow.table(columns), path)
        else:
            comma = ";" if kind == "semicolons" else ","
            head = ["minx", "miny", "width", "height", "value"] if kind == "wsinfer" else ["x", "y", "value"]
            sides = [64, 64] if kind == "wsinfer" else []
            rows = [[x, y, *sides, value] for (x, y), value in zip(places, shuffled, strict=True)]
            path.write_text("\n".join(comma.join(map(str, row)) for row in [head, *rows]))
        app = client(only_a(out), path)
        found = layer(app)
        assert found is not None
        assert (found["columns"], found["tiles"], found["note"]) == (["value"], "features", "")
        np.testing.assert_allclose(values(app), wanted, atol=1e-6)

    def test_a_table_of_some_tiles_leaves_the_others_without(
        self, out: Path, coords: NDArray[np.int64], tmp_path: Path
    ) -> None:
        (tmp_path / "a.csv").write_text(f"x,y,attention,entropy\n{coords[3, 0]},{coords[3, 1]},0.5,\n")
        app = client(only_a(out), tmp_path / "a.csv")
        found = layer(app)
        assert found is not None
        assert found["note"] == f"of 1 of {len(coords)} tiles"
        assert np.flatnonzero(~np.isnan(values(app))).tolist() == [3]
        assert np.isnan(values(app, 1)).all(), "an empty field is no number"

    def test_a_table_of_other_places_has_tiles_of_its_own(self, out: Path, tmp_path: Path) -> None:
        places = [(x, y) for y in range(10, 400, 100) for x in range(5, 600, 100)]
        (tmp_path / "a.csv").write_text("x,y,value\n" + "\n".join(f"{x},{y},{x}" for x, y in places))
        for shown in (only_a(out), [Shown("a", out.parent / "a.tiff")]):
            app = client(shown, tmp_path / "a.csv")
            found = layer(app)
            assert found is not None
            assert found["lattice"] == {"x0": 5, "y0": 10, "step": 100.0, "side": 100.0, "columns": 6, "rows": 4}
            own = np.frombuffer(ask(app, f"/tiles/{found['tiles']}"), np.int32).reshape(-1, 2)
            np.testing.assert_array_equal(own, places)
            np.testing.assert_array_equal(values(app), own[:, 0])

    def test_a_table_of_several_slides_goes_to_each(self, out: Path, coords: NDArray[np.int64], tmp_path: Path) -> None:
        x, y = coords[0]
        (tmp_path / "all.csv").write_text(f"slide,x,y,value\na,{x},{y},1\nb,{x},{y},2\nnone,{x},{y},3\n")
        app = client(shown_of(out), tmp_path / "all.csv")
        for number, value in enumerate([1, 2]):
            got = np.frombuffer(ask(app, "/values/scores:0/0", number), np.float32)
            assert np.nanmax(got) == value

    def test_a_file_of_one_slide_is_not_shown_on_another(self, out: Path, tmp_path: Path) -> None:
        (tmp_path / "b.csv").write_text("x,y,value\n0,0,1\n64,0,1\n")
        app = client(shown_of(out), tmp_path / "b.csv")
        assert layer(app, 0) is None
        assert layer(app, 1) is not None

    @pytest.mark.parametrize("shape", [(-1,), (1, -1), (-1, 1)])
    def test_a_number_for_each_row(
        self, out: Path, coords: NDArray[np.int64], tmp_path: Path, shape: tuple[int, ...]
    ) -> None:
        wanted = np.arange(len(coords), dtype=np.float32)
        with h5py.File(tmp_path / "a.h5", "w") as file:
            file["attention"] = wanted.reshape(shape)
            file["name"] = "text is no score"
        app = client(only_a(out), tmp_path / "a.h5")
        np.testing.assert_array_equal(values(app), wanted)

    def test_a_number_for_each_good_row(self, own: Path, tmp_path: Path) -> None:
        with h5py.File(own / "a.h5", "r+") as file:
            count = len(file["status"])
            file["status"][2] = 1
        with h5py.File(tmp_path / "a.h5", "w") as file:
            file["p"] = np.stack([np.arange(count - 1), np.ones(count - 1)], axis=1)
        app = client(only_a(own), tmp_path / "a.h5")
        found = layer(app)
        assert found is not None
        assert found["columns"] == ["p 0", "p 1"]
        assert found["note"] == "1 tiles that could not be read have none"
        got = values(app)
        assert np.isnan(got[2])
        np.testing.assert_array_equal(np.delete(got, 2), np.arange(count - 1))

    def test_clams_attention_brings_its_places(self, out: Path, coords: NDArray[np.int64], tmp_path: Path) -> None:
        with h5py.File(tmp_path / "a.h5", "w") as file:
            file["attention_scores"], file["coords"] = np.arange(3.0)[:, None], coords[[5, 1, 9]]
        got = values(client(only_a(out), tmp_path / "a.h5"))
        assert (got[5], got[1], got[9]) == (0, 1, 2)

    def test_scores_of_another_length_are_said_on_the_page(self, out: Path, tmp_path: Path) -> None:
        with h5py.File(tmp_path / "a.h5", "w") as file:
            file["attention"] = np.zeros(7)
        app = client(only_a(out), tmp_path / "a.h5")
        assert layer(app) is None
        (notice,) = ask(app, "")["notices"]
        assert "7 scores, and the features have" in notice["text"]
        assert "another grid" in notice["hint"]

    @pytest.mark.parametrize(
        ("name", "content", "said"),
        [
            ("a.csv", "x,value\n1,2\n", "has no column y"),
            ("a.csv", "x,y,name\n1,2,red\n", "no column of numbers"),
            ("a.csv", "x,y,value\n1,2\n", "line 2: 2 fields"),
            ("a.csv", "x,y,value\none,2,3\n", "x and y must be numbers"),
            ("a.csv", "", "has no column x"),
            ("a.csv", b"\xff\xfe\x00", "is not a table"),
            ("a.parquet", b"PAR1 no", "is not a Parquet file"),
            ("a.h5", b"no", "cannot be read"),
        ],
    )
    def test_what_is_no_scores_is_said(self, tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        with pytest.raises(UsageError, match=said) as caught:
            read_scores(tmp_path / name)
        assert caught.value.hint


class TestAnnotations:
    def test_they_are_shown_on_their_slide(self, out: Path, tmp_path: Path) -> None:
        drawn = {"type": "FeatureCollection", "features": []}
        (tmp_path / "b.geojson").write_text(json.dumps(drawn))
        app = client(shown_of(out), annotations=(tmp_path / "b.geojson",))
        ids = [[one["id"] for one in ask(app, "", number)["layers"]] for number in (0, 1)]
        assert ["annotations:0" in one for one in ids] == [False, True]
        assert ask(app, "/annotations/0", 1) == drawn
        assert app.get(f"/{TOKEN}/api/slides/0/annotations/0").status_code == 404

    @pytest.mark.parametrize("content", ["{", "[" * 100_000, '{"no": "type"}', "3"])
    def test_what_is_none_is_said(self, out: Path, tmp_path: Path, content: str) -> None:
        (tmp_path / "a.geojson").write_text(content)
        app = client(only_a(out), annotations=(tmp_path / "a.geojson",))
        answer = app.get(f"/{TOKEN}/api/slides/0/annotations/0")
        assert answer.status_code == 422
        assert "GeoJSON" in answer.json()["text"]


def cosines(out: Path, names: str, row: int) -> list[tuple[float, int, int]]:
    """All tiles of all slides, those most like a row of the first first."""
    with h5py.File(out / "a.h5") as file:
        query = file["features"][row]
    found = []
    for number, name in enumerate(names):
        with h5py.File(out / f"{name}.h5") as file:
            rows = file["features"][:]
        like = rows @ query / np.linalg.norm(rows, axis=1) / np.linalg.norm(query)
        found += [(float(one), number, at) for at, one in enumerate(like)]
    return sorted(found, reverse=True)


class TestSimilar:
    def test_those_of_the_slide(self, out: Path) -> None:
        told = ask(client(only_a(out)), "/similar/5")
        assert "run" not in told
        best = [one for one in cosines(out, "a", 5) if one[2] != 5][: similar.MOST]
        assert [one["cosine"] for one in told["slide"]] == pytest.approx([one[0] for one in best], abs=2e-4)
        assert 5 not in [one["row"] for one in told["slide"]]

    def test_those_of_the_run(self, out: Path) -> None:
        app, end = client(shown_of(out)), time.monotonic() + 20
        while not (told := ask(app, "/similar/5"))["run"].get("tiles"):
            assert time.monotonic() < end, told
            time.sleep(0.01)
        best = cosines(out, "ab", 5)[: similar.MOST + 1]
        assert [one["cosine"] for one in told["run"]["found"]] == pytest.approx([one[0] for one in best], abs=2e-4)
        assert told["run"]["found"][0] == {"slide": 0, "row": 5, "cosine": 1.0}
        assert {one["slide"] for one in told["run"]["found"]} == {0, 1}
        exact = {(number, row): cosine for cosine, number, row in cosines(out, "ab", 5)}
        for one in told["run"]["found"]:
            assert one["cosine"] == pytest.approx(exact[one["slide"], one["row"]], abs=2e-4), "of this very tile"

    def test_how_like_each_tile_is(self, out: Path) -> None:
        got = np.frombuffer(ask(client(only_a(out)), "/similarity/5"), np.float32)
        wanted = {at: one for one, _, at in cosines(out, "a", 5)}
        np.testing.assert_allclose(got, [wanted[at] for at in range(len(got))], atol=2e-4)

    def test_a_run_too_large_for_memory_is_said(self, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(similar, "_MOST_BYTES", 1000)
        app, end = client(shown_of(out)), time.monotonic() + 20
        while not (told := ask(app, "/similar/5"))["run"]["refusal"]:
            assert time.monotonic() < end, told
            time.sleep(0.01)
        assert "Open fewer slides" in told["run"]["refusal"]
        assert told["slide"], "those of the slide are there all the same"

    def test_a_slide_that_cannot_be_read_is_left_out_and_said(self, own: Path) -> None:
        (own / "b.h5").write_bytes(b"no HDF5")
        app, end = client(shown_of(own)), time.monotonic() + 20
        while not (told := ask(app, "/similar/5"))["run"].get("tiles"):
            assert time.monotonic() < end, told
            time.sleep(0.01)
        assert len(told["run"]["left_out"]) == 1
        assert "b: " in told["run"]["left_out"][0]

    @pytest.mark.parametrize("row", [2, 10_000])
    def test_nothing_is_like_a_tile_that_could_not_be_read(self, own: Path, row: int) -> None:
        with h5py.File(own / "a.h5", "r+") as file:
            file["status"][2] = 1
        answer = client(only_a(own)).get(f"/{TOKEN}/api/slides/0/similar/{row}")
        assert answer.status_code == 404
        assert str(row) in answer.json()["text"]
