"""The page of a run shows every slide of a folder, made from what is on the disk, whoever put it there."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import threading
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from mtdp_runtime import extract as extract_call
from mtdp_runtime.errors import OutputUnwritable, UsageError
from mtdp_runtime.report import places
from mtdp_runtime.report.rows import DONE, EMPTY, FAILED, UNFINISHED, Row, read_folder
from mtdp_runtime.report.run import write_run_page
from mtdp_runtime.report.slowness import slow_slides
from mtdp_runtime.report.thumbnails import write_thumbnail
from mtdp_runtime.store import run_log
from support import damage_tile, extract, pyramid, stained

MB = 1_000_000
HOSTILE = "<script>alert(1)</script>&\"'"


class Table(HTMLParser):
    """The rows of the table of slides: the words of each cell, the links and attributes of each row."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[dict[str, Any]] = []
        self._inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = self._inside or (tag, dict(attrs).get("id")) == ("table", "slides")
        if self._inside and tag == "tr":
            self.rows.append({"cells": [], "links": [], **dict(attrs)})
        elif self._inside and tag in ("td", "th"):
            self.rows[-1]["cells"].append("")
        elif self._inside and tag == "a":
            self.rows[-1]["links"].append(dict(attrs)["href"])

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag != "table"

    def handle_data(self, data: str) -> None:
        if self._inside and self.rows and self.rows[-1]["cells"]:
            self.rows[-1]["cells"][-1] += data.strip()


def table_of(out: Path) -> list[dict[str, Any]]:
    return Table((out / "report/index.html").read_text()).rows[1:]


def words_of(page: Path) -> str:
    text = re.sub(r"<(style|script)>.*?</\1>", " ", page.read_text(), flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", " ", text).split())


@pytest.fixture(scope="module")
def cohort(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over two good slides, one of them called index and with a bad tile, one of glass, and two that fail."""
    folder = tmp_path_factory.mktemp("cohort")
    slides, out = folder / "slides", folder / "out"
    slides.mkdir()
    pyramid(stained(512, 640), slides / "b.tiff", 0.5, lossy=True)
    damage_tile(pyramid(stained(512, 640), slides / "index.tiff", 0.5, lossy=True), 8)
    pyramid(np.full((300, 400, 3), 243, np.uint8), slides / "glass.tiff", 0.5)
    pyramid(stained(300, 400), slides / "no-scale.tiff", None)
    (slides / f"{HOSTILE.replace('/', '')}.svs").write_bytes(b"no slide")
    result = extract(slides, "--out", out, "--model", tiny_bundle, "--backend", "onnxruntime", "--check", 2)
    assert result.returncode == 1, result.stderr
    return out


def test_a_run_ends_with_a_page_of_all_its_slides_and_failures_come_first(cohort: Path) -> None:
    rows = table_of(cohort)
    assert [row["cells"][2] for row in rows] == [FAILED, FAILED, DONE, DONE, EMPTY]
    assert ["data-look" in row for row in rows] == [True, True, True, False, False]
    names = [row["cells"][1] for row in rows]
    assert names[0].startswith(HOSTILE.replace("/", ""))
    assert (names[2], names[3]) == ("index", "b")
    with h5py.File(cohort / "b.h5") as file:
        tiles, area, rate = len(file["coords"]), file.attrs["tissue_mm2"], file.attrs["tiles_per_s"]
        facts = [file.attrs["backend"], file.attrs["precision"], file.attrs["reader"]]
    _, _, _, *cells = rows[3]["cells"]
    assert cells[:3] == [str(tiles), f"{area:.2f}", f"{rate:,.1f}"]
    assert cells[3:5] == [f"{facts[0]} {facts[1]}", facts[2]]
    assert re.fullmatch(r"(0\.\d{6}|1\.000000)of 2 tiles", cells[5])
    assert (cells[6], rows[2]["cells"][9]) == ("0", "4")


def test_why_slides_failed_is_said_with_the_hint_and_the_links_lead_to_reports(cohort: Path) -> None:
    words = words_of(cohort / "report/index.html")
    assert "Why 2 slides failed" in words
    assert "1 slide: no micrometres per pixel: the slide does not say Give the scale of level 0: --slide-mpp" in words
    links = [row["links"] for row in table_of(cohort)]
    assert links == [[], [], ["./index-.html"], ["./b.html"], ["./glass.html"]]
    assert "4 tiles could not be read" in words_of(cohort / "report/index-.html")
    assert "mtdp-extract" in words, "the command"


def test_names_and_messages_cannot_become_markup(cohort: Path) -> None:
    page = (cohort / "report/index.html").read_text()
    assert "<script>alert" not in page
    assert page.count("<script>") == 1
    assert re.search(r"script-src 'sha256-[\w+/]+=*'", page), "no other script would run"
    assert "default-src 'none'" in page


def test_the_page_is_that_of_the_folder_whoever_made_the_files(
    cohort: Path, tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    """Without run.jsonl, without reports, with a damaged file and one that is begun; and a later run's slide."""
    out = tmp_path / "o"
    out.mkdir()
    shutil.copy(cohort / "b.h5", out / "b.h5")
    (out / "broken.h5").write_bytes(b"no HDF5")
    with h5py.File(out / "foreign.h5", "w") as file:
        file["x"] = 1
    (out / ".begun.h5.partial").write_bytes(b"")
    assert write_run_page(out) == out / "report/index.html"
    rows = table_of(out)
    assert [row["cells"][2] for row in rows] == [FAILED, FAILED, UNFINISHED, DONE]
    for row, said in zip(
        rows, ("brokeno/broken.h5: cannot", "foreigno/foreign.h5: cannot", "begunbegun,", "b"), strict=True
    ):
        assert row["cells"][1].replace(f"{tmp_path}/", "").startswith(said)
    assert rows[3]["links"] == [], "it has no report"
    assert "it has no features and no coords" in rows[1]["cells"][1]
    (outcome,) = extract_call(make_slide("later.tiff"), out, model=tiny_bundle, backend="onnxruntime", report=True)
    assert outcome.status == "done"
    assert [row["cells"][1] for row in table_of(out)][-2:] == ["b", "later"]


def test_the_last_word_on_a_slide_counts_and_what_says_nothing_of_it_does_not(tmp_path: Path) -> None:
    lines = [
        {"slide": "/a/mended.svs", "status": "failed", "message": "/a/mended.svs: no", "hint": "Mend it."},
        {"slide": "/a/bad.svs", "name": "other", "status": "failed", "message": "/a/bad.svs: no", "hint": "Mend it."},
        {"slide": "/a/gone.svs", "status": "done", "output": "o/gone.h5"},
        {"slide": "/a/bad.svs", "name": "other", "status": "claimed"},
        {"slide": "/a/list.txt", "status": "passed-over", "message": "no slide"},
    ]
    for line in lines:
        run_log.append(tmp_path, line)
    with (tmp_path / run_log.NAME).open("a") as stream:
        stream.write('[1]\n{"slide": "/torn')
    found = {row.name: row for row in read_folder(tmp_path).rows}
    assert {name: row.status for name, row in found.items()} == {"mended": FAILED, "other": FAILED, "gone": FAILED}
    assert "its feature file is not here" in found["gone"].message
    run_log.append(tmp_path, {"slide": "/a/mended.svs", "status": "no-tissue", "output": "o/mended.h5"})
    assert "not here" in {row.name: row for row in read_folder(tmp_path).rows}["mended"].message
    assert "list.txt" in words_of(write_run_page(tmp_path))


def test_a_row_for_each_model_of_a_shared_reading(tiny_bundle: Path, cohort: Path, tmp_path: Path) -> None:
    for model in ("one", "two"):
        (tmp_path / model).mkdir()
        shutil.copy(cohort / "b.h5", tmp_path / model / "b.h5")
    (tmp_path / "another-run").mkdir()
    shutil.copy(cohort / "b.h5", tmp_path / "another-run" / "b.h5")
    (tmp_path / "another-run" / run_log.NAME).write_text("")
    write_run_page(tmp_path)
    assert [row["cells"][1] for row in table_of(tmp_path)] == ["btiny", "btiny"]
    assert "1 slides" in words_of(tmp_path / "report/index.html")


def test_a_thousand_slides_are_a_page_below_5_mb(cohort: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (512, 640, 3), np.uint8)
    for number in range(1000):
        name = f"TCGA-A1-A0SB-01Z-00-DX{number:04}.B34C267B-CAAA-4AB6-AD5C-276C26F997A1"
        os.link(cohort / "b.h5", tmp_path / f"{name}.h5")
        picture = places.thumbnail(tmp_path, name)
        if number == 0:
            picture.parent.mkdir(parents=True)
            write_thumbnail(picture, noise)
            first = picture
        else:
            os.link(first, picture)
    page = write_run_page(tmp_path)
    assert page.stat().st_size < 5 * MB
    text = page.read_text()
    assert (text.count("data:image/jpeg"), text.count("<tr data-s=")) == (1000, 1000)


def test_who_comes_later_sees_what_those_before_had_finished(cohort: Path, tmp_path: Path) -> None:
    """A process reads the folder only when no other makes the page: none can overwrite a page that knew more."""
    (tmp_path / "report").mkdir()
    shutil.copy(cohort / "b.h5", tmp_path / "a.h5")
    with (tmp_path / "report/.index.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread = threading.Thread(target=write_run_page, args=(tmp_path,))
        thread.start()
        shutil.copy(cohort / "b.h5", tmp_path / "b.h5")
        assert not (tmp_path / "report/index.html").exists()
    thread.join()
    assert [row["cells"][1] for row in table_of(tmp_path)] == ["a", "b"]


def test_a_page_that_cannot_be_written_is_said_and_fails_no_run(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "o/report/index.html").mkdir(parents=True)
    with pytest.raises(OutputUnwritable, match=r"index\.html: cannot be written"):
        write_run_page(tmp_path / "o")
    with pytest.raises(UsageError, match="no such folder"):
        write_run_page(tmp_path / "nothing")
    options = ("--model", tiny_bundle, "--out", tmp_path / "o", "--backend", "onnxruntime")
    result = extract(make_slide(), *options)
    assert result.returncode == 0, result.stderr
    assert "index.html: cannot be written: Is a directory; run.jsonl has what it would show" in result.stderr
    assert sorted(path.name for path in (tmp_path / "o/report").iterdir() if "partial" in path.name) == []


def test_without_reports_there_is_no_page(tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path) -> None:
    extract_call(make_slide(), tmp_path / "o", model=tiny_bundle, backend="onnxruntime")
    assert not (tmp_path / "o/report").exists()


class TestSlowness:
    def row(self, name: str, rate: float, tiles: int = 1000, **facts: Any) -> Row:
        common = {"seconds": tiles / rate, "digest": "d", "engine": "e", "precision": "fp32"}
        return Row(name, Path(), name, DONE, tiles=tiles, tiles_per_s=rate, **common | facts)

    def test_a_slide_is_slow_among_those_of_its_engine(self) -> None:
        fast = [self.row(f"f{i}", 100.0) for i in range(5)]
        slow = self.row(
            "slow", 20.0, bottleneck="read", device_idle=0.8, reader="openslide 4", reader_reason="JPEG 2000"
        )
        elsewhere = [self.row(f"g{i}", 10.0, engine="cpu") for i in range(3)]
        (found,) = slow_slides([*fast, slow, *elsewhere])
        assert (found.row.name, found.usual) == ("slow", 100.0)
        assert found.reasons == (
            "reading was the slowest stage, and the engine waited 80% of the time",
            "read by openslide 4: JPEG 2000",
        )

    def test_the_most_lost_time_comes_first_and_a_moment_is_not_worth_a_word(self) -> None:
        rows = [self.row(f"f{i}", 100.0) for i in range(9)]
        rows += [self.row("moment", 10.0, tiles=10), self.row("some", 40.0), self.row("most", 50.0, tiles=9000)]
        assert [one.row.name for one in slow_slides(rows)] == ["most", "some"]

    def test_no_slide_is_slow_where_all_are_alike(self) -> None:
        assert slow_slides([self.row("a", 1.0), self.row("b", 1.5)]) == []
