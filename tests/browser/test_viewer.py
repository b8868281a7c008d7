"""The viewer in a real browser: what a pathologist does with it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import h5py
import numpy as np
import pytest

from chromium import Browser, Page
from mtdp_runtime.tiling.given_mask import load_mask
from mtdp_runtime.view.named import shown_of
from mtdp_runtime.view.session import Session, Shown
from support import damage_tile, pyramid, stained
from viewing import TOKEN, drawn, place_on_screen, ready, served

OVERLAY = (
    "(() => {{ const c = document.querySelector('canvas.overlay');"
    " return [...c.getContext('2d').getImageData({x}, {y}, 1, 1).data]; }})()"
)


@pytest.fixture
def page(browser: Browser, viewer: str) -> Iterator[Page]:
    with browser.page(viewer) as opened:
        ready(opened)
        yield opened
        assert opened.complaints == []


def layer(page: Page, name: str, what: str) -> Any:
    return page.run(f"mtdpView.layers.all.find((l) => l.id === {name!r}).{what}")


def overlay_at(page: Page, x0: float, y0: float) -> list[int]:
    """Red, green, blue and alpha of the layers over a level-0 pixel."""
    x, y = place_on_screen(page, x0, y0)
    box = page.run(
        "(() => { const b = document.getElementById('slide').getBoundingClientRect(); return [b.x, b.y]; })()"
    )
    return page.run(OVERLAY.format(x=round(x - box[0]), y=round(y - box[1])))


def test_it_opens_and_asks_nobody_else(page: Page, viewer: str) -> None:
    assert page.run("document.title") == "demo-slide - mtdp-view"
    assert {urlsplit(url).netloc for url in page.requests if not url.startswith("data:")} == {urlsplit(viewer).netloc}
    assert page.run("document.getElementById('scale-bar').textContent.trim()") == "200 µm"
    assert page.run("document.getElementById('notices').textContent") == ""


def test_no_serious_violation_of_accessibility(page: Page) -> None:
    assert page.serious_violations() == []
    page.press("?")
    page.wait("document.getElementById('help').open")
    assert page.serious_violations() == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_show_the_slide(browser: Browser, viewer: str, scheme: str) -> None:
    with browser.page(viewer, prefers_color_scheme=scheme) as page:
        ready(page)
        image = page.screenshot()
        assert page.complaints == []
    panel, stage = image[60:700, 1040:1270], image[60:700, 20:1000]
    assert (np.median(panel) > 200) == (scheme == "light")
    assert stage.reshape(-1, 3).std(axis=0).min() > 15, "the tissue is seen"


def test_layers_go_on_and_off_and_fade(page: Page) -> None:
    inside = (1900, 2300)
    for name in ("tissue", "grid"):
        if layer(page, name, "shown"):
            page.click_on(f"[data-layer={name}]")
    drawn(page)
    assert overlay_at(page, *inside)[3] == 0
    page.click_on("[data-layer='head:tumour']")
    drawn(page)
    assert overlay_at(page, *inside)[3] == pytest.approx(0.65 * 255, abs=2)
    page.run(
        "(() => { const s = document.querySelector('[aria-label=\"Opacity of tumour\"]'); s.value = 0.2;"
        " s.dispatchEvent(new Event('input', {bubbles: true})); })()"
    )
    drawn(page)
    assert overlay_at(page, *inside)[3] == pytest.approx(0.2 * 255, abs=2)
    page.click_on("[data-layer='head:tumour']")
    drawn(page)
    assert overlay_at(page, *inside)[3] == 0


def test_the_keyboard_moves_zooms_turns_and_shows_layers(page: Page) -> None:
    def view() -> dict[str, float]:
        return page.run("mtdpView.stage.view")

    start = view()
    page.press("+")
    assert view()["scale"] == pytest.approx(start["scale"] / 1.5)
    page.press("ArrowRight")
    assert view()["x"] > start["x"]
    page.press("r")
    assert view()["rotation"] == 90
    page.press("R")
    page.press("0")
    assert view() == pytest.approx(start, rel=1e-3)
    shown = layer(page, "grid", "shown")
    number = page.run("mtdpView.layers.all.findIndex((l) => l.id === 'grid') + 1")
    page.press(str(number))
    assert layer(page, "grid", "shown") != shown


def test_a_deep_link_opens_the_same_view(page: Page, browser: Browser) -> None:
    page.press("+")
    page.press("+")
    page.press("ArrowDown")
    page.press("r")
    page.click_on("[data-layer='head:tumour']")
    drawn(page)
    link = page.wait("location.hash.includes('rotation=90') && location.hash.includes('tumour') && location.href")
    sent = page.run("mtdpView.stage.view")
    with browser.page(link) as other:
        ready(other)
        assert other.run("mtdpView.stage.view") == pytest.approx(sent, rel=1e-3)
        assert layer(other, "head:tumour", "shown")
        assert other.complaints == []


def test_the_place_of_the_pointer_is_in_pixels_and_micrometres(page: Page) -> None:
    page.drag(tuple(place_on_screen(page, 2000, 1000)), tuple(place_on_screen(page, 2000, 1000)))  # type: ignore[arg-type]
    text = page.wait("document.getElementById('place').value")
    x0, y0 = (int(part.replace(",", "")) for part in text.split(" px")[0].split(", "))
    assert (x0, y0) == (pytest.approx(2000, abs=8), pytest.approx(1000, abs=8))
    assert text.endswith("µm")


def test_it_can_be_used_on_a_phone(browser: Browser, viewer: str) -> None:
    with browser.page(viewer, width=390, height=780) as page:
        ready(page)
        assert page.run("document.documentElement.scrollWidth") <= 390
        assert page.run("document.getElementById('slide').clientHeight") > 250
        assert page.complaints == []


def test_a_click_finds_what_looks_alike_and_goes_there(page: Page) -> None:
    page.click(*place_on_screen(page, 1900, 2300))
    page.wait("document.querySelectorAll('#similar button.tile').length > 10")
    chosen = page.run("mtdpView.layers.chosen")
    with h5py.File(page.run("document.querySelector('#facts dd:last-child').textContent"), locking=False) as file:
        rows, (x0, y0) = file["features"][:], file["coords"][chosen]
    assert x0 <= 1900 < x0 + 64
    assert y0 <= 2300 < y0 + 64
    like = rows @ rows[chosen] / np.linalg.norm(rows, axis=1) / np.linalg.norm(rows[chosen])
    listed = page.run("[...document.querySelectorAll('#similar button.tile')].map((b) => Number(b.dataset.row))")
    assert listed[0] == chosen
    np.testing.assert_allclose(like[listed[1:]], np.sort(like)[::-1][1 : len(listed)], atol=2e-4)
    page.wait("[...document.querySelectorAll('#similar img')].slice(0, 8).every((i) => i.complete && i.naturalWidth)")
    assert page.serious_violations() == []
    page.run("document.querySelectorAll('#similar button.tile')[3].click()")
    page.wait(f"mtdpView.layers.chosen === {listed[3]}")
    with h5py.File(page.run("document.querySelector('#facts dd:last-child').textContent"), locking=False) as file:
        there = file["coords"][listed[3]]
    x, y = (there + 32).tolist()
    page.wait(f"Math.abs(mtdpView.stage.view.x - {x}) < 2 && Math.abs(mtdpView.stage.view.y - {y}) < 2")
    page.press("Escape")
    assert page.run("document.getElementById('similar').hidden")


def test_similarity_is_a_layer(page: Page) -> None:
    page.click_on("[data-layer=similarity]")
    page.press("Enter")
    page.wait("mtdpView.layers.chosen >= 0")
    drawn(page)
    data = page.run(
        "(() => { const {data} = mtdpView.layers.all.find((l) => l.id === 'similarity');"
        " return [data.values[mtdpView.layers.chosen], data.high, data.low]; })()"
    )
    assert data[:2] == pytest.approx([1, 1], abs=1e-4)
    assert data[2] < 0.99


def test_tiles_are_selected_and_saved_for_other_tools(page: Page, tmp_path: Path) -> None:
    page.click(*place_on_screen(page, 1900, 2300), shift=True)
    assert page.run("document.getElementById('selected').textContent") == "1 tile"
    start, end = place_on_screen(page, 1664, 2304), place_on_screen(page, 1664 + 4 * 64, 2304 + 3 * 64)
    page.drag((start[0] + 2, start[1] + 2), (end[0] - 2, end[1] - 2), shift=True)
    page.wait("mtdpView.selection.rows.size === 13")
    lines = page.run("mtdpView.selection.csv()").splitlines()
    assert lines[0] == "slide,row,x,y,width,height"
    assert len(lines) == 14
    assert all(line.startswith("demo-slide,") and line.endswith(",64,64") for line in lines[1:])
    page.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    page.click_on("#save-geojson")
    end_s = time.monotonic() + 10
    while not (saved := list(tmp_path.glob("*.geojson"))):
        assert time.monotonic() < end_s
        time.sleep(0.02)
    assert saved[0].name == "demo-slide-tiles.geojson"
    mask = load_mask(saved[0])
    assert len(mask.polygons) == 13, "read as annotations that QuPath wrote"
    corners = sorted((polygon[0].min(axis=0).tolist(), polygon[0].max(axis=0).tolist()) for polygon in mask.polygons)
    for (x0, y0), (x1, y1) in corners:
        assert f",{int(x0)},{int(y0)},64,64" in "\n".join(lines)
        assert (x1 - x0, y1 - y0) == (64, 64)
    page.press("Escape")
    assert page.run("mtdpView.selection.rows.size") == 0


def test_ones_own_scores_and_annotations_with_palette_and_threshold(
    browser: Browser, demo: Path, tmp_path: Path
) -> None:
    with h5py.File(demo / "demo-slide.h5", locking=False) as file:
        coords = file["coords"][:]
    (tmp_path / "attention.csv").write_text(
        "x,y,attention\n" + "".join(f"{x},{y},{x / 6144}\n" for x, y in coords.tolist())
    )
    ring = [[1000, 1000], [2500, 1000], [2500, 2800], [1000, 2800], [1000, 1000]]
    drawn_by_hand = {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {"classification": {"name": "Tumor", "color": [200, 0, 0]}},
    }
    (tmp_path / "drawn.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [drawn_by_hand]}))
    files = ((tmp_path / "attention.csv",), (tmp_path / "drawn.geojson",))
    with served(Session(tuple(shown_of(demo)), TOKEN, *files)) as address, browser.page(address) as page:
        ready(page)
        assert overlay_at(page, 1000, 2000)[0] > 150, "the annotation's edge is red"
        for name in ("tissue", "annotations:0"):
            page.click_on(f"[data-layer='{name}']")
        page.click_on("[data-layer='scores:0']")
        drawn(page)
        few, many = overlay_at(page, 900, 2300), overlay_at(page, 5000, 2300)
        assert few[3] == many[3] == pytest.approx(0.65 * 255, abs=2)
        assert sum(many[:3]) > sum(few[:3]), "viridis is brighter for more"
        numbers = page.run("[...document.querySelectorAll('.legend div span')].map((s) => Number(s.textContent))")
        assert numbers == pytest.approx(
            [coords[:, 0].min() / 6144, np.ptp(coords[:, 0]) / 12288, coords[:, 0].max() / 6144], abs=0.01
        )
        page.run(
            "(() => { const s = document.querySelector('[aria-label^=\"Show attention.csv\"]'); s.value = 0.5;"
            " s.dispatchEvent(new Event('input', {bubbles: true})); })()"
        )
        drawn(page)
        assert overlay_at(page, 900, 2300)[3] == 0
        assert overlay_at(page, 5000, 2300) == pytest.approx(many, abs=2)
        assert page.complaints == []


FOUND = (  # every tile is found at its middle, and the box of one holds it
    "(async () => { const { layers } = mtdpView;"
    " const t = await layers.tilesOf(layers.all.find((l) => l.id === LAYER));"
    " const rows = [...Array(t.count).keys()].filter((r) => { const [x, y, s] = t.box(r);"
    " return t.find(x + s / 2, y + s / 2) === r && t.within([x + 1, y + 1, x + s - 1, y + s - 1]).includes(r); });"
    " return [t.regular, t.count, rows.length, t.find(-9, -9)]; })()"
)


def test_a_click_meets_the_tile_that_is_there(page: Page) -> None:
    regular, count, found, outside = page.run(FOUND.replace("LAYER", "'grid'"))
    assert regular
    assert found == count > 1000
    assert outside == -1


def test_tiles_on_no_lattice_are_drawn_one_by_one(browser: Browser, demo: Path, tmp_path: Path) -> None:
    places = np.random.default_rng(0).integers(50, 4000, (300, 2))
    apart = np.abs(places[:, None] - places[None]).max(axis=2) + np.eye(300) * 9999
    (x, y), lone = places[apart.min(axis=1).argmax()], apart.min(axis=1).max()
    (tmp_path / "s.csv").write_text(
        "x,y,value\n" + "".join(f"{x},{y},1\n" for x, y in [[0, 0], [100, 0], *places.tolist()])
    )
    session = Session((Shown("s", demo / "demo-slide.tiff"),), TOKEN, (tmp_path / "s.csv",))
    with served(session) as address, browser.page(address) as page:
        ready(page)
        page.click_on("[data-layer='scores:0']")
        drawn(page)
        regular, count, found, outside = page.run(FOUND.replace("LAYER", "'scores:0'"))
        side = layer(page, "scores:0", "lattice.side")
        assert not regular
        assert found == count == 302
        assert outside == -1
        assert lone > side
        assert overlay_at(page, x + side / 2, y + side / 2)[3] == pytest.approx(0.65 * 255, abs=2)
        assert overlay_at(page, 6000, 4500)[3] == 0
        assert page.complaints == []


def test_what_is_wrong_is_said_on_the_page(browser: Browser, tmp_path: Path) -> None:
    slide = pyramid(stained(1200, 1600), tmp_path / "s.tiff", 0.5, levels=2, lossy=True)
    damage_tile(slide, 0)
    session = Session((Shown("s", slide), Shown("gone", tmp_path / "gone.svs")), TOKEN)
    with served(session) as address, browser.page(address) as page:
        page.wait("document.body.dataset.state === 'open'")
        for _ in range(4):
            page.press("+")
        page.run("mtdpView.stage.show({x: 100, y: 100, scale: 0.5}, true)")
        page.wait("document.querySelectorAll('.notice').length > 1")
        assert str(slide) in page.run("document.getElementById('notices').textContent")
        assert page.run("mtdpView.stage.unread.length") > 0
        page.press("n")
        page.wait("document.body.dataset.state === 'no-slide'")
        text = page.run("document.getElementById('notices').textContent")
        assert "gone.svs: the slide is not there any more" in text
        assert "mtdp-view SLIDE" in text
