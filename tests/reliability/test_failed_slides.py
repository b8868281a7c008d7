"""The end of a night: what failed is grouped by cause, and listed in a manifest that can be mended and given back."""

from __future__ import annotations

import csv
import doctest
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import warm
from mtdp_runtime import extract as extract_call
from mtdp_runtime.cohort import failures
from mtdp_runtime.cohort.failures import by_cause, update_after, update_failed_csv
from mtdp_runtime.cohort.requests import SlideRequest, list_slides
from mtdp_runtime.commands.exit_codes import MEANINGS
from mtdp_runtime.store import causes
from mtdp_runtime.version import __version__
from support import extract, pyramid, slide_lines, stained

COLUMNS = ["slide", "mpp", "mask", "name", "coords", "classes", "message"]


def listed(out: Path) -> list[dict[str, str]]:
    """What Python's own reader of CSV finds."""
    with (out / "failed.csv").open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        rows = list(reader)
    assert reader.fieldnames == COLUMNS
    return rows


def failed(message: str, hint: str = "") -> dict[str, str]:
    return {"status": "failed", "message": message, "hint": hint}


def headers(out: Path) -> list[dict[str, object]]:
    return [line for line in map(json.loads, (out / "run.jsonl").read_text().splitlines()) if "slide" not in line]


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    """A manifest of seven slides: two good, two without a scale, two that are none, and one with a broken mask."""
    folder = tmp_path / "slides"
    folder.mkdir()
    for name, mpp in (("a.tiff", 0.5), ("b.tiff", 0.5), ("c.tiff", 0.5), ("d, e.tiff", None), ("f.tiff", None)):
        pyramid(stained(384, 512), folder / name, mpp, 2, lossy=True)
    for name in ("g.svs", "h.svs"):
        (folder / name).write_bytes(b"no slide")
    (folder / "c.geojson").write_text("{")
    (folder / "list.csv").write_text(
        'slide,mask,name\na.tiff,,\nb.tiff,,\nc.tiff,c.geojson,other\n"d, e.tiff",,\nf.tiff,,\ng.svs,,\nh.svs,,\n'
    )
    return folder / "list.csv"


def test_failures_are_grouped_listed_mended_and_given_back(cohort: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    folder, out = cohort.parent, tmp_path / "o"
    options = ("--out", out, "--model", tiny_bundle, "--no-report", "--backend", "onnxruntime", "--threads", 1)
    result = extract(cohort, *options)
    assert result.returncode == 1, result.stderr
    said = result.stdout.splitlines()
    assert said[-1] == f"exit code 1: {MEANINGS['1']}"
    assert said[-2].startswith(f"{out / 'failed.csv'}: ")
    summary = next(number for number, line in enumerate(said) if line.startswith("2 of 7 slides done, 5 failed; "))
    groups = said[summary + 1 : -2]
    assert [line.split(":")[0] for line in groups if not line.startswith("  ")] == ["2 failed", "2 failed", "1 failed"]
    assert [line.strip() for line in groups if line.startswith("  ") and "hint:" not in line] == [
        "d, e.tiff, f.tiff",
        "g.svs, h.svs",
        "c.tiff",
    ]
    assert sum("hint: " in line for line in groups) == 3
    assert not any(str(folder) in line for line in groups if "hint:" not in line)

    rows = listed(out)
    assert [row["slide"] for row in rows] == [
        str(folder / n) for n in ("c.tiff", "d, e.tiff", "f.tiff", "g.svs", "h.svs")
    ]
    assert [(row["mask"], row["name"]) for row in rows] == [(str(folder / "c.geojson"), "other"), *[("", "")] * 4]
    messages = {line["slide"]: line["message"] for line in slide_lines(out) if line["status"] == "failed"}
    assert [row["message"] for row in rows] == [messages[row["slide"]] for row in rows]

    # One slide gets its scale, in the list itself.
    text = (out / "failed.csv").read_text()
    (out / "failed.csv").write_text(text.replace(f'"{folder / "d, e.tiff"}",,', f'"{folder / "d, e.tiff"}",0.5,'))
    result = extract(out / "failed.csv", *options)
    assert "1 of 5 slides done, 4 failed" in result.stdout, result.stderr
    assert "not read" not in result.stderr
    assert (out / "d, e.h5").exists()
    assert [Path(row["slide"]).name for row in listed(out)] == ["c.tiff", "f.tiff", "g.svs", "h.svs"]
    assert [row["message"] for row in listed(out)] == [rows[number]["message"] for number in (0, 2, 3, 4)]

    # The rest: a mask is given up, a scale filled in, slides are copied again.
    for name in ("g.svs", "h.svs"):
        pyramid(stained(384, 512), folder / name, 0.5, 2, lossy=True)
    mended = [["slide", "mpp", "mask", "name"]]
    mended += [[row["slide"], "0.5", "", row["name"]] for row in listed(out)]
    with (out / "failed.csv").open("w", newline="") as stream:
        csv.writer(stream, delimiter=";").writerows(mended)
    result = extract(out / "failed.csv", *options)
    assert result.returncode == 0, result.stderr
    assert "exit code" not in result.stdout
    assert not (out / "failed.csv").exists()
    assert (out / "other.h5").exists()


def test_the_line_of_a_run_says_what_it_was(cohort: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    options = ("--out", out, "--model", tiny_bundle, "--no-report", "--backend", "onnxruntime", "--threads", "1")
    extract(cohort, *options)
    with pytest.warns(UserWarning, match="not a GeoJSON mask"):
        extract_call(cohort, out, model=tiny_bundle, backend="onnxruntime", threads=1)
    first, second = headers(out)
    assert first["arguments"] == ["mtdp-extract", *map(str, (cohort, *options))]
    assert second["arguments"] == "api"
    assert first["version"] == __version__
    (model,) = first["models"]  # type: ignore[misc]
    assert set(model) == {"name", "digest", "backend", "precision", "batch", "reason", "note"}
    assert (model["name"], model["precision"], len(model["digest"])) == ("tiny", "fp32", 64)
    assert model["backend"].startswith("onnxruntime")
    assert {line["run"] for line in slide_lines(out)} == {first["run"], second["run"]}
    assert len(listed(out)) == 5, "a call from Python lists its failures, too"


CRASHES_AT_B = """
import os, signal
import mtdp_runtime.pipeline.run as pipeline
read_tile = pipeline.read_tile
def crash(slide, *arguments):
    if slide.info.path.name.startswith("b"):
        os.kill(os.getpid(), signal.SIGSEGV)
    return read_tile(slide, *arguments)
pipeline.read_tile = crash
from mtdp_runtime.commands.extract import main; main()
"""


def test_what_ended_an_earlier_worker_is_grouped_and_listed_and_the_run_has_one_line(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    for name in ("a.svs", "c.svs"):
        (tmp_path / name).write_bytes(b"no slide")
    make_slide("b.tiff")
    options = ("--model", tiny_bundle, "--out", tmp_path / "o", "--no-report", "--backend", "onnxruntime")
    result = warm.run(CRASHES_AT_B, tmp_path, *options)
    said = result.stdout
    assert result.returncode == 1, result.stderr
    assert "\n  a.svs, c.svs\n" in said
    assert "1 failed: the process died (SIGSEGV) at this slide\n  b.tiff\n  hint: Twice." in said
    assert [Path(row["slide"]).name for row in listed(tmp_path / "o")] == ["a.svs", "b.tiff", "c.svs"]
    (run,) = headers(tmp_path / "o")
    assert {line["run"] for line in slide_lines(tmp_path / "o")} == {run["run"]}


class TestCauses:
    def groups(self, *lines: tuple[str, dict[str, str]], mask: str = "") -> list[tuple[str, tuple[str, ...]]]:
        requests = [SlideRequest(Path(path), mask=Path(mask) if mask else None) for path, _ in lines]
        found = by_cause(requests, {Path(path).stem: line for path, line in lines})
        return [(cause.text, cause.slides) for cause in found]

    def test_what_the_docstrings_show_is_so(self) -> None:
        result = doctest.testmod(causes)
        assert (result.failed, result.attempted > 0) == (0, True)

    def test_names_and_numbers_make_no_cause_of_their_own(self) -> None:
        assert self.groups(
            ("/x/a.svs", failed("/x/a.svs: tile 3 of 17 is damaged", "Copy it again: /x/a.svs")),
            ("/y/b7.svs", failed("/y/b7.svs: tile 12 of 99 is damaged", "Copy it again: /y/b7.svs")),
        ) == [("tile 3 of 17 is damaged", ("a.svs", "b7.svs"))]

    def test_another_hint_is_another_cause_and_the_most_slides_come_first(self) -> None:
        lines = [("a", "Do this."), ("b", "Do that."), ("c", "Do that.")]
        found = self.groups(*((f"/x/{name}.svs", failed(f"/x/{name}.svs: no", hint)) for name, hint in lines))
        assert [names for _, names in found] == [
            ("b.svs", "c.svs"),
            ("a.svs",),
        ]

    def test_a_short_name_is_taken_out_only_where_it_names_the_slide(self) -> None:
        line = failed("/x/a.svs: is not a slide; /o/a.h5 is")
        assert self.groups(("/x/a.svs", line)) == [("is not a slide; /o/<slide>.h5 is", ("a.svs",))]

    def test_the_name_of_a_mask_is_taken_out(self) -> None:
        assert self.groups(("/x/a.svs", failed("/m/q.png: is black")), mask="/m/q.png") == [
            ("<mask>: is black", ("a.svs",))
        ]

    def test_what_an_earlier_run_found_is_the_same_cause(self) -> None:
        again = failed("/x/b.svs: no (an earlier run found this; --retry-failed tries it again)")
        assert self.groups(("/x/a.svs", failed("/x/a.svs: no")), ("/x/b.svs", again)) == [("no", ("a.svs", "b.svs"))]

    def test_a_slide_that_did_not_fail_is_of_no_cause(self) -> None:
        assert self.groups(("/x/a.svs", {"status": "done"}), ("/x/b.svs", {"status": "claimed"})) == []


NAMES = st.binary(min_size=1, max_size=20).filter(lambda raw: not {0, ord("/")} & set(raw)).map(os.fsdecode)


@given(
    st.lists(
        st.builds(
            SlideRequest,
            NAMES.map(lambda name: Path("/none") / f"{name}.svs"),
            st.none() | st.floats(0.01, 100),
            st.just(""),
            st.none() | NAMES.map(lambda name: Path("/none") / f"{name}.png"),
            st.sampled_from(["", "", 'case "7", B', "x;y"]),
        ),
        min_size=1,
        max_size=5,
        unique_by=lambda request: request.name,
    ),
    st.text(max_size=20),
)
def test_what_is_listed_is_read_back_whatever_is_in_a_name(
    tmp_path_factory: pytest.TempPathFactory, requests: list[SlideRequest], message: str
) -> None:
    out = tmp_path_factory.mktemp("o")
    update_failed_csv(out, requests, {request.name: failed(message) for request in requests})
    notes: list[str] = []
    again = list_slides([out / "failed.csv"], say=notes.append, must_exist=False)
    assert [(r.path, r.mpp, r.mask, r.called) for r in again] == [(r.path, r.mpp, r.mask, r.called) for r in requests]
    assert notes == []


@pytest.mark.parametrize("name", ['a,"b".svs', "a\nb.svs", "a\rb.svs", "a\r\n,b.svs", os.fsdecode(b"caf\xe9.svs")])
def test_names_that_need_quotes(tmp_path: Path, name: str) -> None:
    update_failed_csv(tmp_path, [SlideRequest(Path("/x") / name)], {Path(name).stem: failed("no")})
    with (tmp_path / "failed.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as stream:
        assert list(csv.reader(stream)) == [COLUMNS, [f"/x/{name}", "", "", "", "", "", "no"]]
    assert list_slides([tmp_path / "failed.csv"], must_exist=False) == [SlideRequest(Path("/x") / name)]


class TestTheListOfAFolder:
    A, B, C = (SlideRequest(Path(f"/x/{name}.svs")) for name in "abc")

    def test_what_another_run_failed_at_stays_until_a_run_settles_it(self, tmp_path: Path) -> None:
        notes: list[str] = []
        update_after(tmp_path, [self.A, self.B], {"a": failed("one"), "b": failed("two")}, notes.append)
        update_after(tmp_path, [self.C], {"c": failed("three")}, notes.append)
        assert [(row["slide"], row["message"]) for row in listed(tmp_path)] == [
            ("/x/a.svs", "one"),
            ("/x/b.svs", "two"),
            ("/x/c.svs", "three"),
        ]
        assert len(notes) == 1
        assert "also lists 2 slides of other runs" in notes[0]
        update_after(tmp_path, [self.A, self.B], {"a": {"status": "done"}, "b": {"status": "claimed"}})
        assert [row["slide"] for row in listed(tmp_path)] == ["/x/b.svs", "/x/c.svs"]
        update_after(tmp_path, [self.B, self.C], {"b": {"status": "skipped"}, "c": {"status": "no-tissue"}})
        assert list(tmp_path.iterdir()) == []

    def test_a_list_that_cannot_be_read_is_said_and_not_removed_without_a_successor(self, tmp_path: Path) -> None:
        notes: list[str] = []
        (tmp_path / "failed.csv").write_text("my own notes\nof the night\n")
        update_after(tmp_path, [self.A], {"a": {"status": "done"}}, notes.append)
        assert (tmp_path / "failed.csv").read_text() == "my own notes\nof the night\n"
        update_after(tmp_path, [self.A], {"a": failed("one")}, notes.append)
        assert [row["slide"] for row in listed(tmp_path)] == ["/x/a.svs"]
        assert len(notes) == 2
        assert all("no column named slide" in note for note in notes)

    def test_a_list_whose_lines_were_all_deleted_goes(self, tmp_path: Path) -> None:
        notes: list[str] = []
        (tmp_path / "failed.csv").write_text(",".join(COLUMNS) + "\n")
        update_after(tmp_path, [self.A], {"a": {"status": "done"}}, notes.append)
        assert (list(tmp_path.iterdir()), notes) == ([], [])

    def test_what_is_no_file_under_this_name_ends_no_run_and_is_not_followed(self, tmp_path: Path) -> None:
        notes: list[str] = []
        path, elsewhere = tmp_path / failures.NAME, tmp_path / "elsewhere"
        path.mkdir()
        update_after(tmp_path, [self.A], {"a": failed("one")}, notes.append)
        assert "the failed slides cannot be listed there" in notes[0]
        path.rmdir()
        elsewhere.write_text("kept")
        path.symlink_to(elsewhere)
        update_after(tmp_path, [self.A], {"a": failed("one")})
        assert elsewhere.read_text() == "kept"
        assert [row["slide"] for row in listed(tmp_path)] == ["/x/a.svs"]
        path.unlink()
        os.mkfifo(path)
        update_after(tmp_path, [self.A], {"a": failed("one")})
        assert len(listed(tmp_path)) == 1
        assert sorted(left.name for left in tmp_path.iterdir()) == ["elsewhere", "failed.csv"]
