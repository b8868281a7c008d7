"""One browser for all tests of pages, and a demo slide with its features that they look at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from chromium import Browser, chromium
from mtdp_runtime import extract
from mtdp_runtime.bundle.manifest import Head
from mtdp_runtime.commands.demo_slide import write_demo_slide
from mtdp_runtime.view.named import shown_of
from mtdp_runtime.view.session import Session
from support import write_tiny_bundle
from viewing import TOKEN, served


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A chromium; `with browser.page(url) as page:` opens a page, `page.complaints` and `page.requests` are its."""
    program = chromium()
    if program is None:
        pytest.skip("needs chromium (apt-get install chromium)")
    opened = Browser(program, tmp_path_factory.mktemp("chromium"))
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `mtdp-extract --demo --heads` leaves it, its features by a model of one convolution."""
    folder = tmp_path_factory.mktemp("demo")
    heads = (Head("tumour", ("normal", "tumour")),)
    bundle = write_tiny_bundle(folder / "tiny", heads)
    out = folder / "features"
    out.mkdir()
    write_demo_slide(out / "demo-slide.tiff")
    (outcome,) = extract(out / "demo-slide.tiff", out, model=bundle, heads=True, backend="onnxruntime", report=True)
    assert outcome.status == "done", outcome.message
    return out


@pytest.fixture(scope="session")
def viewer(demo: Path) -> Iterator[str]:
    """The address of a viewer of the demo's folder."""
    with served(Session(tuple(shown_of(demo)), TOKEN)) as address:
        yield address
