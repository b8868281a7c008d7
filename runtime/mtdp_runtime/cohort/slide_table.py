"""A CSV that lists slides, as people write them: by hand, with pandas, with a spreadsheet of any country.

Encodings and separators are told apart by what leaves no doubt (a byte order mark; which separator makes a column
`slide`); what stays doubtful is an error that names the line.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mtdp_runtime.errors import UsageError

COLUMNS: Final = ("slide", "mpp", "mask", "name", "coords", "classes")
FAILED_COLUMNS: Final = (*COLUMNS, "message")  # of the table of failed slides that a run writes
SHOWN_COLUMNS: Final = "slide[,mpp][,mask][,name][,coords][,classes]"
_SEPARATORS: Final = ",;\t"
# How that table begins as it was written, and not saved by another program: there the bytes of each name are kept, and
# a name may hold line ends.
_OUR_FIRST_LINE: Final = ",".join(FAILED_COLUMNS) + "\n"
_MARKS: Final = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
# What stands for "nothing here": pandas' own spellings (read_csv, na_values), in small letters.
_NOTHING: Final = frozenset(
    {"", "#n/a", "#n/a n/a", "#na", "-1.#ind", "-1.#qnan", "-nan", "1.#ind", "1.#qnan", "<na>", "n/a", "na", "nan"}
    | {"none", "null", "-"}
)
_INVISIBLE: Final = "\ufeff\u200b\u200c\u200d\u2060"  # they come with text copied from web pages
_DECIMAL_COMMA: Final = re.compile(r"[+-]?\d*,\d+")
# What people call these columns elsewhere. Ignoring one would mean a wrong scale, or no mask, without a word.
_NEAR_MISSES: Final = {
    **dict.fromkeys(("path", "paths", "slides", "slide_path", "file", "filename", "file_name", "image"), "slide"),
    **dict.fromkeys(("slide_mpp", "slide-mpp", "mpp_x", "mpp_y", "mpps", "mpp0", "level0_mpp"), "mpp"),
    **dict.fromkeys(("um_per_px", "microns_per_pixel", "micrometers_per_pixel", "micrometres_per_pixel"), "mpp"),
    **dict.fromkeys(("masks", "mask_path", "mask_file", "geojson", "annotation", "annotations"), "mask"),
    **dict.fromkeys(("names", "output", "output_name", "out_name"), "name"),
    **dict.fromkeys(("coord", "coordinates", "coords_file", "coords_path", "tiles", "patches", "tile_list"), "coords"),
    **dict.fromkeys(("class", "class_file", "classes_file", "labels"), "classes"),
}
# Other tools' names for the slide itself, harmless beside a column `slide`.
_OTHERS_SLIDE: Final = frozenset({"wsi", "slide_id", "slide_file", "slide_name", "image_id"})


@dataclass(frozen=True, slots=True)
class SlideRow:
    """One slide of the table; a text is empty where the table says nothing."""

    line: int  # of the file, the first is 1
    slide: str
    mpp: str  # with a decimal point
    mask: str
    name: str
    message: str = ""  # of a run in which it failed
    coords: str = ""
    classes: str = ""


def read_slide_table(path: Path, say: Callable[[str], None]) -> list[SlideRow]:
    """Read a table with the columns `SHOWN_COLUMNS`, separated by commas, semicolons or tabs.

    `say` takes what a user should know: columns that are not read, an encoding that had to be assumed.

    Raises:
        UsageError: it cannot be read, names no slide, or leaves a doubt.
    """
    lines = _lines(path, text_of(path, say))
    if not lines:
        raise UsageError(f"{path}: is empty", hint=f"The first line must be: {SHOWN_COLUMNS}")
    (_, names), rows = lines[0], lines[1:]
    columns = [_clean(name).lower() for name in names]
    _look_at_columns(path, columns, say)
    if not rows:
        raise UsageError(f"{path}: names no slide", hint="One line per slide, after the line of the columns.")
    ours = ",".join(names) + "\n" == _OUR_FIRST_LINE
    return [_row(path, columns, line, fields, ours) for line, fields in rows]


def text_of(path: Path, say: Callable[[str], None]) -> str:
    """Return the text of a table; `say` hears of an encoding that had to be assumed.

    Raises:
        UsageError: it cannot be read, or is no text.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be read: {error.strerror}", hint="Check the path and its permissions."
        ) from error
    if content.startswith(_OUR_FIRST_LINE.encode()):
        return content.decode("utf-8", errors="surrogateescape")
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "")
    if encoding:
        try:
            return content.decode(encoding)
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{path}: it begins as {encoding}, and is not: {error}", hint="Save it as UTF-8."
            ) from error
    if content.count(b"\0") > len(content) // 4:
        raise UsageError(f"{path}: is not UTF-8 text: it is full of zero bytes", hint="Save it as CSV in UTF-8.")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        pass
    try:
        text = content.decode("cp1252")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is neither UTF-8 nor Windows-1252 text", hint="Save it as UTF-8.") from error
    say(f"{path}: is not UTF-8; it was read as Windows-1252. If names look wrong, save it as UTF-8.")
    return text


def _lines(path: Path, text: str) -> list[tuple[int, list[str]]]:
    """Return the lines that hold something, with their numbers, split at the separator that makes a column `slide`."""
    skip = 0
    separators, newline = _SEPARATORS, None
    if text.startswith(_OUR_FIRST_LINE):
        separators, newline = _OUR_FIRST_LINE[5], ""
    first, _, rest = text.partition("\n")
    if first.strip().lower().startswith("sep=") and len(first.strip()) == 5:  # a spreadsheet's own hint
        separators, skip, text = first.strip()[4], 1, rest
    found: list[list[tuple[int, list[str]]]] = []
    for separator in separators:
        reader = csv.reader(io.StringIO(text, newline=newline), delimiter=separator, skipinitialspace=True)
        try:
            lines = [(reader.line_num + skip, fields) for fields in reader if any(_clean(field) for field in fields)]
        except csv.Error as error:
            raise UsageError(
                f"{path}: line {reader.line_num + skip}: not CSV: {error}", hint="Save it as CSV in UTF-8."
            ) from error
        if lines and "slide" in [_clean(name).lower() for name in lines[0][1]]:
            return lines
        found.append(lines)
    widest = max(found, key=lambda lines: len(lines[0][1]) if lines else 0)
    if not widest:
        return widest
    columns = [_clean(name).lower() for name in widest[0][1]]
    _refuse_near_misses(path, columns, _OTHERS_SLIDE)
    raise UsageError(
        f"{path}: no column named slide (columns: {', '.join(columns)})",
        hint=f"The first line must be: {SHOWN_COLUMNS}",
    )


def _look_at_columns(path: Path, columns: Sequence[str], say: Callable[[str], None]) -> None:
    """Refuse a column that stands twice or means one of ours by another name; say which others are not read."""
    for column in COLUMNS:
        if columns.count(column) > 1:
            raise UsageError(f"{path}: {columns.count(column)} columns named {column}", hint="Keep one of them.")
    _refuse_near_misses(path, columns)
    ignored = [column for column in columns if column and column not in FAILED_COLUMNS]
    if ignored:
        say(f"{path}: columns that are not read: {', '.join(ignored)}")


def _refuse_near_misses(path: Path, columns: Sequence[str], slides: Collection[str] = ()) -> None:
    for column in columns:
        meant = "slide" if column in slides else _NEAR_MISSES.get(column)
        if meant is not None:
            raise UsageError(
                f"{path}: a column named {column}, which is not read: is it {meant}?",
                hint=f"Rename it to {meant}, or remove it. Columns: {SHOWN_COLUMNS}",
            )


def _row(path: Path, columns: Sequence[str], line: int, fields: Sequence[str], ours: bool) -> SlideRow:
    if any("\n" in field for field in fields) and not (ours and len(fields) == len(columns)):
        raise UsageError(
            f"{path}: before line {line} a quotation mark opens that is not closed on its line",
            hint='A quotation mark in a name is written "like ""this""".',
        )
    beyond = [field for field in fields[len(columns) :] if _clean(field)]
    if beyond:
        raise UsageError(
            f"{path}: line {line}: {len(fields)} fields where the first line names {len(columns)}",
            hint='A name that holds the separator is written in quotation marks: "case 7, block B.svs".',
        )
    row = dict(zip(columns, map(_clean, fields), strict=False))
    said = {column: "" if row.get(column, "").lower() in _NOTHING else row[column] for column in COLUMNS}
    if not said["slide"]:
        raise UsageError(f"{path}: line {line}: no slide named", hint="Remove the line or name a file.")
    if _DECIMAL_COMMA.fullmatch(said["mpp"]):
        said["mpp"] = said["mpp"].replace(",", ".")
    message = row.get("message", "")
    return SlideRow(
        line, said["slide"], said["mpp"], said["mask"], said["name"], message, said["coords"], said["classes"]
    )


def _clean(field: str) -> str:
    return field.strip().strip(_INVISIBLE).strip()
