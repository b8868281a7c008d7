"""The viewer's server: what it serves, to whom, and what it says of what it cannot serve."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from mtdp_runtime import extract, open_slide
from mtdp_runtime.bundle.manifest import Head
from mtdp_runtime.view.deep_zoom import OVERLAP_PX, TILE_PX, PictureCache, Pyramid, read_picture
from mtdp_runtime.view.named import shown_of
from mtdp_runtime.view.server import make_app
from mtdp_runtime.view.session import Session, Shelf, Shown
from support import damage_tile, pyramid, stained, write_tiny_bundle

TOKEN = "the-token"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide of 1024 x 768 px in three levels, and its features, with a head."""
    folder = tmp_path_factory.mktemp("out")
    bundle = write_tiny_bundle(folder / "tiny", (Head("lung", ("aca", "n", "scc")),))
    (folder / "features").mkdir()
    slide = pyramid(stained(768, 1024), folder / "features" / "s.tiff", 0.5, levels=3)
    (outcome,) = extract(slide, slide.parent, model=bundle, heads=True, backend="onnxruntime", threads=1)
    assert outcome.status == "done"
    return slide.parent


@pytest.fixture
def own(out: Path, tmp_path: Path) -> Path:
    """A copy of the folder that a test may damage."""
    own = Path(shutil.copytree(out, tmp_path / "own"))
    with h5py.File(own / "s.h5", "r+") as file:
        file.attrs["slide_path"] = str(own / "s.tiff")
    return own


def client(*shown: Shown, host: str = "127.0.0.1", **files: tuple[Path, ...]) -> TestClient:
    return TestClient(make_app(Session(shown, TOKEN, **files)), base_url=f"http://{host}:4711")


def of_folder(folder: Path) -> TestClient:
    return client(*shown_of(folder))


class TestWhoIsServed:
    def test_nothing_without_the_token(self, out: Path) -> None:
        app = of_folder(out)
        for path in (
            "/",
            "/wrong/",
            f"/{TOKEN[:-1]}/",
            f"/{TOKEN}x/api/session",
            "/api/session",
            "//",
            "/static/style.css",
        ):
            answer = app.get(path)
            assert answer.status_code == 403, path
            assert "s.tiff" not in answer.text
        assert app.get(f"/{TOKEN}/").status_code == 200

    @pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
    def test_this_machine_by_its_names(self, out: Path, host: str) -> None:
        assert client(*shown_of(out), host=host).get(f"/{TOKEN}/api/session").status_code == 200

    @pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "0.0.0.0", "localhost.evil.example"])
    def test_no_other_name_that_points_here(self, out: Path, host: str) -> None:
        assert client(*shown_of(out), host=host).get(f"/{TOKEN}/api/session").status_code == 400

    def test_nobody_may_change_anything(self, out: Path) -> None:
        for method in ("post", "put", "delete", "patch"):
            assert getattr(of_folder(out), method)(f"/{TOKEN}/api/session").status_code == 405

    def test_every_answer_forbids_the_browser_to_look_elsewhere(self, out: Path) -> None:
        for path in ("", "api/session", "static/style.css", "nothing"):
            headers = of_folder(out).get(f"/{TOKEN}/{path}").headers
            assert "default-src 'none'" in headers["content-security-policy"]
            assert "http" not in headers["content-security-policy"]
            assert headers["referrer-policy"] == "no-referrer"
            assert "access-control-allow-origin" not in headers


class TestWhatIsServed:
    @pytest.mark.parametrize(
        "path",
        [
            "static/../server.py",
            "static/%2e%2e/server.py",
            "static/..%2fserver.py",
            "static/%2e%2e%2f%2e%2e%2f%2e%2e%2fetc/passwd",
            "static//etc/passwd",
            "static/js",
            "../../etc/passwd",
            "slides/0_files/../../../etc/passwd",
            "api/slides/-1",
            "api/slides/1",
            "api/slides/0x0",
            "api/slides/99999999999999999999",
            "slides/0_tiles/144.jpeg",
            "slides/0_tiles/-1.jpeg",
            "api/slides/0/values/head:lung/3",
            "api/slides/0/values/head:none/0",
            "api/slides/0/values/..%2f..%2fetc/0",
        ],
    )
    def test_nothing_beside_it(self, out: Path, path: str) -> None:
        answer = of_folder(out).get(f"http://127.0.0.1:4711/{TOKEN}/{path}")
        assert answer.status_code in (403, 404), answer.text
        assert "root:" not in answer.text
        assert "Starlette" not in answer.text

    @pytest.mark.parametrize("at", ["11/0_0", "7/0_0", "10/3_0", "10/0_2", "10/2_99999999999", "99999/0_0"])
    def test_no_picture_outside_of_the_slide(self, out: Path, at: str) -> None:
        answer = of_folder(out).get(f"/{TOKEN}/slides/0_files/{at}.jpeg")
        assert answer.status_code == 404
        assert answer.json()["text"]

    def test_the_page_and_its_parts(self, out: Path) -> None:
        app = of_folder(out)
        assert "static/js/app.js" in app.get(f"/{TOKEN}/").text
        for name in ("style.css", "js/app.js", "vendor/openseadragon/openseadragon.min.js"):
            assert app.get(f"/{TOKEN}/static/{name}").status_code == 200

    def test_a_slide_is_described(self, out: Path) -> None:
        told = of_folder(out).get(f"/{TOKEN}/api/slides/0").json()
        assert told["notices"] == []
        assert (told["slide"]["width"], told["slide"]["height"], told["slide"]["mpp"]) == (1024, 768, 0.5)
        assert told["slide"]["path"] == str(out / "s.tiff")
        assert told["features"]["tiles"] == 144
        assert told["features"]["lattice"] == {"x0": 0, "y0": 0, "step": 64.0, "side": 64.0, "columns": 16, "rows": 12}
        assert [layer["id"] for layer in told["layers"]][:2] == ["tissue", "grid"]
        lung = next(layer for layer in told["layers"] if layer["id"] == "head:lung")
        assert (lung["columns"], lung["low"], lung["high"]) == (["aca", "n", "scc"], 0, 1)

    def test_numbers_are_those_of_the_file(self, out: Path) -> None:
        app = of_folder(out)
        with h5py.File(out / "s.h5") as file:
            coords, chances = file["coords"][:], file["probabilities_lung"][:]
        got = app.get(f"/{TOKEN}/api/slides/0/tiles/features").content
        np.testing.assert_array_equal(np.frombuffer(got, np.int32).reshape(-1, 2), coords)
        for column in range(3):
            got = app.get(f"/{TOKEN}/api/slides/0/values/head:lung/{column}").content
            np.testing.assert_array_equal(np.frombuffer(got, np.float32), chances[:, column])

    def test_a_bad_tile_has_no_value(self, own: Path) -> None:
        with h5py.File(own / "s.h5", "r+") as file:
            file["status"][7] = 1
        app = of_folder(own)
        values = np.frombuffer(app.get(f"/{TOKEN}/api/slides/0/values/head:lung/0").content, np.float32)
        assert np.flatnonzero(np.isnan(values)).tolist() == [7]
        assert np.flatnonzero(np.frombuffer(app.get(f"/{TOKEN}/api/slides/0/status").content, np.uint8)).tolist() == [7]

    def test_tissue_is_outlined_in_level_0_pixels(self, out: Path) -> None:
        pieces = of_folder(out).get(f"/{TOKEN}/api/slides/0/tissue").json()
        points = np.concatenate([np.array(ring) for piece in pieces for ring in piece])
        assert points.min(axis=0) == pytest.approx([256, 0], abs=33)  # the left quarter is glass
        assert points.max(axis=0) == pytest.approx([1024, 768], abs=33)

    def test_the_tile_of_a_row_is_what_the_model_saw(self, out: Path) -> None:
        data = of_folder(out).get(f"/{TOKEN}/slides/0_tiles/20.jpeg").content
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
        with h5py.File(out / "s.h5") as file, open_slide(out / "s.tiff") as slide:
            x0, y0 = file["coords"][20].tolist()
            exact = np.zeros((64, 64, 3), np.uint8)
            slide.read_into(exact, x0, y0, 1.0)
        seen, known = (cv2.blur(one, (8, 8)).astype(int) for one in (image, exact))
        assert np.abs(seen - known).mean() < 2  # JPEG of noise


class TestPictures:
    def test_they_are_kept_by_the_browser_while_the_slide_is_the_same(self, own: Path) -> None:
        app, path = of_folder(own), f"/{TOKEN}/slides/0_files/10/0_0.jpeg"
        first = app.get(path)
        assert first.headers["content-type"] == "image/jpeg"
        again = app.get(path, headers={"if-none-match": first.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        pyramid(stained(768, 1024, seed=5), own / "s.tiff", 0.5, levels=3)
        other = of_folder(own).get(path, headers={"if-none-match": first.headers["etag"]})
        assert other.status_code == 200
        assert other.content != first.content

    @pytest.mark.parametrize("level", [8, 9, 10])
    def test_side_by_side_they_are_the_slide_at_that_scale(self, out: Path, level: int) -> None:
        with open_slide(out / "s.tiff") as slide:
            shape = Pyramid(slide.info.width, slide.info.height)
            width, height = shape.size(level)
            whole = np.zeros((height, width, 3), np.uint8)
            columns, rows = shape.tiles(level)
            for column in range(columns):
                for row in range(rows):
                    left, top, right, bottom = shape.box(level, column, row)
                    part = read_picture(slide, level, column, row)
                    seen = whole[top:bottom, left:right]
                    known = seen.any(axis=2)
                    np.testing.assert_array_equal(part[known], seen[known], "what two share is equal")
                    whole[top:bottom, left:right] = part
            plain = np.zeros_like(whole)
            slide.read_into(plain, 0, 0, float(shape.scale(level)))
        np.testing.assert_array_equal(whole, plain)

    @given(st.integers(1, 400_000), st.integers(1, 400_000))
    def test_every_level_is_covered_once(self, width: int, height: int) -> None:
        shape = Pyramid(width, height)
        assert shape.size(shape.last_level) == (width, height)
        assert max(shape.size(shape.first_level)) <= 256
        for level in range(shape.first_level, shape.last_level + 1):
            columns, rows = shape.tiles(level)
            right, bottom = shape.size(level)
            assert shape.box(level, columns - 1, rows - 1)[2:] == (right, bottom)
            assert (columns - 1) * TILE_PX < right <= columns * TILE_PX
            if columns > 1:
                assert shape.box(level, 0, 0)[2] - shape.box(level, 1, 0)[0] == 2 * OVERLAP_PX - max(
                    0, TILE_PX + OVERLAP_PX - right
                )

    def test_memory_of_kept_pictures_is_bounded(self) -> None:
        cache, made = PictureCache(1000), []

        def make(number: int) -> bytes:
            made.append(number)
            return bytes(300)

        for number in (0, 1, 2, 0, 3, 0, 1):
            cache.get((number,), lambda number=number: make(number))  # type: ignore[misc]
        assert made == [0, 1, 2, 3, 1], "0 was used and stayed, 1 was the oldest"


class TestWhatIsNotAsItShouldBe:
    def test_a_slide_without_features_is_shown(self, out: Path) -> None:
        told = client(Shown("s", out / "s.tiff")).get(f"/{TOKEN}/api/slides/0").json()
        assert told["slide"]["there"]
        assert told["layers"] == []
        assert "No features" in told["notices"][0]["text"]

    def test_a_slide_that_is_gone_is_said_and_its_features_are_shown(self, own: Path) -> None:
        (own / "s.tiff").unlink()
        with h5py.File(own / "s.h5", "r+") as file:
            file.attrs["slide_path"] = "/elsewhere/s.tiff"
        app = of_folder(own)
        told = app.get(f"/{TOKEN}/api/slides/0").json()
        assert told["notices"][0]["text"] == "/elsewhere/s.tiff: the slide is not there any more"
        assert f"--features {own}" in told["notices"][0]["hint"]
        assert not told["slide"]["there"]
        assert (told["slide"]["width"], told["slide"]["height"]) == (1024, 768)
        assert [layer["id"] for layer in told["layers"]][:2] == ["tissue", "grid"]
        assert app.get(f"/{TOKEN}/slides/0_files/10/0_0.jpeg").status_code == 410

    def test_a_slide_that_vanishes_while_it_is_looked_at(self, own: Path) -> None:
        app = of_folder(own)
        assert app.get(f"/{TOKEN}/slides/0_files/10/0_0.jpeg").status_code == 200
        (own / "s.tiff").unlink()
        answer = app.get(f"/{TOKEN}/slides/0_files/10/1_0.jpeg")
        assert answer.status_code == 410
        assert "not there any more" in answer.json()["text"]

    def test_a_moved_folder_finds_the_slide_beside_it(self, own: Path) -> None:
        with h5py.File(own / "s.h5", "r+") as file:
            file.attrs["slide_path"] = "/elsewhere/s.tiff"
        assert of_folder(own).get(f"/{TOKEN}/api/slides/0").json()["slide"]["path"] == str(own / "s.tiff")

    def test_features_of_another_slide(self, own: Path) -> None:
        with h5py.File(own / "s.h5", "r+") as file:
            file.attrs["quickhash"] = "0" * 64
        told = of_folder(own).get(f"/{TOKEN}/api/slides/0").json()
        assert "features of another slide: its quickhash is 000000000000..." in told["notices"][0]["text"]
        assert told["layers"] == []
        assert told["slide"]["there"]

    def test_features_of_a_slide_of_another_size(self, own: Path) -> None:
        pyramid(stained(600, 800), own / "other.tiff", 0.5)
        told = client(Shown("s", own / "other.tiff", own / "s.h5")).get(f"/{TOKEN}/api/slides/0").json()
        assert "another slide" in told["notices"][0]["text"]
        assert told["layers"] == []

    def test_a_file_of_an_earlier_version(self, own: Path) -> None:
        with h5py.File(own / "s.h5", "r+") as file:
            del file["tissue_mask"], file.attrs["grid"]
        app = of_folder(own)
        told = app.get(f"/{TOKEN}/api/slides/0").json()
        assert "an older file" in told["notices"][0]["text"]
        assert "no tissue mask and no grid" in told["notices"][0]["text"]
        assert told["layers"][0]["id"] == "grid"
        assert (told["features"]["lattice"]["x0"], told["features"]["lattice"]["step"]) == (256, 64)

    def test_a_damaged_feature_file(self, own: Path) -> None:
        (own / "s.h5").write_bytes(b"no HDF5")
        told = client(Shown("s", own / "s.tiff", own / "s.h5")).get(f"/{TOKEN}/api/slides/0").json()
        assert "s.h5: cannot be read as a feature file" in told["notices"][0]["text"]
        assert told["slide"]["there"]

    def test_a_slide_that_cannot_be_opened(self, own: Path) -> None:
        (own / "s.tiff").write_bytes(b"no slide")
        told = client(Shown("s", own / "s.tiff")).get(f"/{TOKEN}/api/slides/0").json()
        assert told["slide"] is None
        assert "s.tiff" in told["notices"][0]["text"]

    def test_a_tile_that_cannot_be_decoded(self, tmp_path: Path) -> None:
        slide = pyramid(stained(768, 1024), tmp_path / "s.tiff", 0.5, levels=3, lossy=True)
        damage_tile(slide, 0)
        app = client(Shown("s", slide))
        answer = app.get(f"/{TOKEN}/slides/0_files/10/0_0.jpeg")
        assert answer.status_code == 422
        assert str(slide) in answer.json()["text"]
        assert app.get(f"/{TOKEN}/slides/0_files/9/0_0.jpeg").status_code == 200


class TestShelf:
    def test_no_more_slides_are_open_than_it_holds(self, make_slide: Callable[..., Path]) -> None:
        slides = [Shown(str(n), make_slide(f"{n}.tiff")) for n in range(4)]
        shelf = Shelf(most=2)
        held = shelf.lent(slides[0])
        first = held.__enter__()
        for shown in slides[1:]:
            with shelf.lent(shown) as slide:
                assert slide.info.path == shown.slide
        assert [shown.name for shown in shelf._slides] == ["0", "3"], "the first is in use, however old"
        pixels = np.zeros((8, 8, 3), np.uint8)
        first.read_into(pixels, 0, 0, 1.0)
        held.__exit__(None, None, None)
        shelf.close()
        assert not shelf._slides
