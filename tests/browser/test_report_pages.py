"""The pages of a run, of a slide and of a training, in a real browser: light, dark, on paper and on a phone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from chromium import Browser, Page
from mtdp.confusions import Confusion, Mistake, write_confusions
from mtdp.run_page import write_run_page as write_training_page
from mtdp_runtime.report.run import write_run_page
from mtdp_runtime.store import run_log

ROOT = Path(__file__).resolve().parent.parent.parent
HOSTILE = "<script>document.title='taken'</script>"
WIDTHS = {"light": 1280, "dark": 1280, "paper": 800, "phone": 390}
MEDIA = {"light": {}, "dark": {"prefers_color_scheme": "dark"}, "paper": {"kind": "print"}, "phone": {}}


@pytest.fixture(scope="module")
def run(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo's slide, a second one that is half as fast to look at, and two that failed."""
    out = tmp_path_factory.mktemp("pages") / "features"
    shutil.copytree(demo, out, ignore=shutil.ignore_patterns("*.tiff"))
    shutil.copy(out / "demo-slide.h5", out / "another.h5")
    for name, message in ((HOSTILE, "no micrometres per pixel"), ("bad.svs", "not a slide that OpenSlide can read")):
        line = {"slide": f"/slides/{name}", "name": name, "status": "failed"}
        run_log.append(out, line | {"message": message, "hint": f"Mend it. {HOSTILE}"})
    write_run_page(out)
    return out


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run with curves of a task, a confusion matrix and a mistake."""
    folder = tmp_path_factory.mktemp("training")
    shares = [{"iteration": 10 * i, "phase": "warm-up" if i < 3 else "training"} for i in range(1, 9)]
    lines = [line | {"loss": 9 / line["iteration"], "lr": 0.1, "tasks": {"t": {"loss": 1.0}}} for line in shares]  # type: ignore[operator]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    mistakes = (Mistake(str(ROOT / "docs/images/report.jpg"), 0, 1), Mistake("/gone.png", 1, 0))
    write_confusions(folder, [Confusion("fine-tuned", "t", ("a", HOSTILE), ((90, 10), (20, 80)), mistakes)])
    (folder / "table.md").write_text("# Table\n\n| Task | FE |\n|---|---|\n| t | 90.0 |\n")
    return write_training_page(folder)


@pytest.fixture(params=["run", "slide", "training"])
def page_file(request: pytest.FixtureRequest, run: Path, training: Path) -> Path:
    return {"run": run / "report/index.html", "slide": run / "report/demo-slide.html", "training": training}[
        request.param
    ]


@contextmanager
def shown(browser: Browser, path: Path, medium: str = "light") -> Iterator[Page]:
    with browser.page(path.as_uri(), WIDTHS[medium], 900) as page:
        if medium == "phone":
            page.size(WIDTHS[medium], 900, phone=True)
        page.media(**MEDIA[medium])  # type: ignore[arg-type]
        yield page


@pytest.mark.parametrize("medium", MEDIA)
def test_a_page_opens_without_complaint_or_request_and_everybody_can_read_it(
    browser: Browser, page_file: Path, medium: str
) -> None:
    with shown(browser, page_file, medium) as page:
        assert page.serious_violations() == []
        assert page.complaints == []
        assert [url for url in page.requests if not url.startswith("data:")] == [page_file.as_uri()]
        assert page.run("document.title") != "taken"
        assert page.run("document.documentElement.scrollWidth") <= WIDTHS[medium]
        image = page.screenshot()
    ground = float(image[1].mean())  # the upper edge, where nothing stands
    assert ground < 60 if medium == "dark" else ground > 230
    assert len(np.unique(image.astype(np.uint32) @ (1 << 16, 1 << 8, 1))) > 20, "not blank"


def names(page: Page) -> list[str]:
    """The slides that the table shows, from top to bottom."""
    found: list[str] = page.run(
        "[...document.querySelectorAll('#slides tbody tr')].filter((r) => !r.hidden).map((r) => r.cells[1].dataset.v)"
    )
    return found


class TestTable:
    @pytest.fixture
    def page(self, browser: Browser, run: Path) -> Iterator[Page]:
        with shown(browser, run / "report/index.html") as page:
            yield page
            assert page.complaints == []

    def test_failures_come_first_and_a_click_sorts_up_then_down(self, page: Page) -> None:
        assert names(page) == [HOSTILE, "bad.svs", "another", "demo-slide"]
        heads = "[...document.querySelectorAll('#slides th')]"
        for order in ("ascending", "descending"):
            page.run(f"{heads}.find((h) => h.textContent.startsWith('tiles/s')).querySelector('button').click()")
            assert page.run(f"{heads}.map((h) => h.ariaSort).filter(Boolean)") == [order]
            assert names(page)[2:] == [HOSTILE, "bad.svs"], "what has no number stands last"
        page.run(f"{heads}[0].querySelector('button').click()")
        assert names(page) == [HOSTILE, "another", "bad.svs", "demo-slide"]

    def test_words_a_status_and_a_look_filter_it(self, page: Page) -> None:
        def set_to(element: str, value: str, what: str = "value") -> list[str]:
            page.run(
                f"{{ const e = document.getElementById('{element}'); e.{what} = {value}; "
                "e.dispatchEvent(new Event('input')); true }"
            )
            return names(page)

        assert page.run("document.getElementById('count').textContent") == "all 4 shown"
        assert set_to("text", "'openslide CAN'") == ["bad.svs"]
        assert page.run("document.getElementById('count').textContent") == "1 of 4 shown"
        assert set_to("text", "''") == [HOSTILE, "bad.svs", "another", "demo-slide"]
        assert set_to("status", "'done'") == ["another", "demo-slide"]
        assert set_to("status", "''")
        assert set_to("look", "true", "checked") == [HOSTILE, "bad.svs"]

    def test_without_scripts_it_is_complete(self, browser: Browser, run: Path) -> None:
        with browser.page("about:blank") as page:
            page.call("Emulation.setScriptExecutionDisabled", value=True)
            page.go((run / "report/index.html").as_uri())
            page.call("Emulation.setScriptExecutionDisabled", value=False)
            assert names(page) == [HOSTILE, "bad.svs", "another", "demo-slide"]
            assert page.run("getComputedStyle(document.getElementById('tools')).display") == "none"

    def test_its_link_leads_to_the_slide_and_back(self, page: Page) -> None:
        for link, title in (("a[href='./demo-slide.html']", "demo-slide.tiff"), ("nav a", "Features of features")):
            page.go(page.run(f'document.querySelector("{link}").href'))
            assert page.run("document.title") == title
