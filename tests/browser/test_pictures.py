"""The README's pictures, by the packaged model where MTDP_README_PICTURES=docs/images makes them anew."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from chromium import Browser
from mtdp_runtime import extract
from mtdp_runtime.commands.demo_slide import write_demo_slide
from mtdp_runtime.view.named import shown_of
from mtdp_runtime.view.session import Session
from viewing import TOKEN, place_on_screen, ready, served

FOLDER = os.environ.get("MTDP_README_PICTURES")


@pytest.fixture(scope="module")
def pictured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not FOLDER:
        return Path(request.getfixturevalue("demo"))
    out = tmp_path_factory.mktemp("pictured")
    write_demo_slide(out / "demo-slide.tiff")
    extract(out / "demo-slide.tiff", out, report=True)
    return out


def picture(name: str, tmp_path: Path) -> Path:
    return Path(FOLDER or tmp_path) / name


def test_the_viewer_with_features_as_colours_and_what_looks_alike(
    browser: Browser, pictured: Path, tmp_path: Path
) -> None:
    with served(Session(tuple(shown_of(pictured)), TOKEN)) as address, browser.page(address) as page:
        ready(page)
        page.click_on("[data-layer=colours]")
        page.click(*place_on_screen(page, 1900, 2300))
        page.wait("document.querySelectorAll('#similar button.tile').length > 10")
        page.press("0")
        page.wait(
            "[...document.querySelectorAll('#similar img')].slice(0, 12).every((i) => i.complete && i.naturalWidth)"
        )
        ready(page)
        for name in ("File", "In"):  # no folder of whoever makes the picture
            page.run(
                "(() => { const dt = [...document.querySelectorAll('#facts dt')]"
                f".find((d) => d.textContent === '{name}');"
                " dt.nextSibling.textContent = dt.nextSibling.textContent.split('/').pop(); })()"
            )
        image = page.screenshot(picture("viewer.jpg", tmp_path), quality=82)
    assert picture("viewer.jpg", tmp_path).stat().st_size < 300_000
    assert image.std() > 20


def test_the_report_of_a_slide(browser: Browser, pictured: Path, tmp_path: Path) -> None:
    report = pictured / "report" / "demo-slide.html"
    with browser.page(report.as_uri(), width=1180, height=1000) as page:
        page.run(  # no speed of whatever machine made the picture
            "for (const p of document.querySelectorAll('p')) if (p.textContent.includes('tiles/s'))"
            " p.textContent = p.textContent.split(' of tissue.')[0] + ' of tissue.'"
        )
        image = page.screenshot(picture("report.jpg", tmp_path), quality=82)
        assert page.complaints == []
        assert [url for url in page.requests if not url.startswith("data:")] == [report.as_uri()]
    assert picture("report.jpg", tmp_path).stat().st_size < 300_000
    assert image.std() > 20
