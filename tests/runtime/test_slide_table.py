"""Tables of slides as people write them: each means what its author meant, or is an error that says where."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtdp_runtime.cohort.requests import list_slides
from mtdp_runtime.cohort.slide_table import SlideRow, read_slide_table
from mtdp_runtime.errors import UsageError

TWO = [SlideRow(2, "a.tiff", "0.5", "", ""), SlideRow(3, "b.tiff", "", "", "")]


def rows_of(tmp_path: Path, content: str | bytes, notes: list[str] | None = None) -> list[SlideRow]:
    path = tmp_path / "slides.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_slide_table(path, (notes if notes is not None else []).append)


@pytest.mark.parametrize(
    "content",
    [
        "slide,mpp\na.tiff,0.5\nb.tiff,\n",
        "slide,mpp\na.tiff,0.5\nb.tiff,",
        "slide,mpp\r\na.tiff,0.5\r\nb.tiff,\r\n",
        "slide,mpp\ra.tiff,0.5\rb.tiff,\r",
        "\ufeffslide,mpp\na.tiff,0.5\nb.tiff,\n",
        'Slide, MPP \n "a.tiff" , 0.5\n b.tiff ,\n',
        "slide;mpp\na.tiff;0.5\nb.tiff;\n",
        "slide;mpp\na.tiff;0,5\nb.tiff;\n",
        "slide\tmpp\na.tiff\t0,5\nb.tiff\t\n",
        'slide,mpp\na.tiff,"0,5"\nb.tiff,NA\n',
        "slide,mpp\na.tiff,0.5\nb.tiff,nan\n",
        "slide,mpp,mask,name\na.tiff,0.5,NaN,null\nb.tiff\n",
        ",slide,mpp\n0,a.tiff,0.5\n1,b.tiff,\n",
        "slide,mpp\na.tiff\u00a0,0.5\n\u200bb.tiff,\n",
        "slide,mpp\na.tiff,0.5,,\nb.tiff,,\n",
    ],
)
def test_separators_decimal_commas_blanks_and_marks_mean_the_same_table(tmp_path: Path, content: str) -> None:
    assert rows_of(tmp_path, content) == TWO


def test_the_numbers_of_lines_are_those_of_the_file(tmp_path: Path) -> None:
    content = "sep=;\r\nslide;mpp\r\n\r\n;\r\na.tiff;0.5\r\n   \r\nb.tiff;\r\n"
    assert rows_of(tmp_path, content) == [SlideRow(5, "a.tiff", "0.5", "", ""), SlideRow(7, "b.tiff", "", "", "")]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"])
def test_names_with_umlauts_come_through_in_each_encoding(tmp_path: Path, encoding: str) -> None:
    notes: list[str] = []
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    (row,) = rows_of(tmp_path, f"{mark}slide\nPräparat 7 µm.svs\n".encode(encoding), notes)
    assert row.slide == "Präparat 7 µm.svs"
    assert bool(notes) == (encoding == "cp1252")  # which had to be assumed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        ("slide,mpp\n", "names no slide"),
        ("slide,mpp\n,,\n \n", "names no slide"),
        ("a.tiff\nb.tiff\n", "no column named slide"),
        ("slide_id\na\n", "a column named slide_id, which is not read: is it slide"),
        ("slide;slide_mpp\na.tiff;0.5\n", "a column named slide_mpp, which is not read: is it mpp"),
        ("slide,mpp,mpp\na.tiff,0.5,0.25\n", "2 columns named mpp"),
        ("slide,mpp\nc, d.tiff,0.5\n", "line 2: 3 fields where the first line names 2"),
        ('slide,mpp\na.tiff,"0.5\nb.tiff,0.5\n', "quotation mark opens"),
        ("slide,mpp\na.tiff,0.5\nNA,0.5\n", "line 3: no slide named"),
        ("slide\na.tiff\n".encode("utf-16-le"), "zero bytes"),
        (b"slide\n\x81\x8d.tiff\n", "neither UTF-8 nor Windows-1252"),
    ],
)
def test_what_leaves_a_doubt_is_an_error_that_says_where(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        rows_of(tmp_path, content)


def test_a_name_that_holds_the_separator_is_quoted(tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path, 'slide,mpp\n"c, d.tiff",0.5\n')
    assert row.slide == "c, d.tiff"


def test_columns_that_are_not_read_are_said(tmp_path: Path) -> None:
    notes: list[str] = []
    rows_of(tmp_path, "slide;patient;slide_id\na.tiff;7;x\n", notes)
    assert [note.partition(": ")[2] for note in notes] == ["columns that are not read: patient, slide_id"]


@pytest.mark.parametrize("mpp", ["0.5um", "-0.5", "1e9", "inf", "0,5,5", "1.000,5"])
def test_a_scale_that_is_none_names_its_line(tmp_path: Path, mpp: str) -> None:
    (tmp_path / "slides.csv").write_text(f"slide;mpp\na.tiff;0.5\nb.tiff;{mpp}\n")
    with pytest.raises(UsageError, match="line 3: mpp"):
        list_slides([tmp_path / "slides.csv"], must_exist=False)
