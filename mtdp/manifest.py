"""A task as a table: CSV or Parquet with the columns path, label, group, split.

All text is stripped and brought to one form of Unicode (NFC) here, once: `A` and `A ` are one class, and the group
`p1 ` cannot hide from the check that no group is in two splits. All lines that cannot be used are named at once.
"""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from mtdp.errors import LIST_ITEM, TaskError, UsageError

SPLITS: Final = ("train", "val", "test")
MANIFEST_COLUMNS: Final = ("path", "label", "group", "split")
_LONGEST_NAME: Final = 255  # bytes of a name in a path, on Linux
SEPARATORS: Final = (",", ";", "\t", "|")
# What people call a split; left unsaid, a task with `valid/` would be a task without a val split.
MISNOMERS: Final = {"training": "train", "valid": "val", "validation": "val", "dev": "val", "testing": "test"}

# White space, and what is as invisible: zero-width spaces and marks of byte order, which come along in copied text.
_AROUND: Final = re.compile("^[\\s\u200b\u2060\ufeff]+|[\\s\u200b\u2060\ufeff]+$")

# One image as (file, group, label, split).
Row = tuple[Path, str, str, str]


def plain_text(text: str) -> str:
    r"""Return text as it is compared: NFC, without white space around it.

    >>> plain_text(" e\u0301 ") == "\u00e9"
    True
    """
    return _AROUND.sub("", unicodedata.normalize("NFC", text))


def unfit_name(text: str) -> str:
    """Say why text cannot be the name of a class or a group: no table could show it. Empty where it can."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        return "is not in UTF-8"
    return "holds a line break or another control character" if any(map(_is_control, text)) else ""


def _is_control(letter: str) -> bool:
    return unicodedata.category(letter) == "Cc"


def listed(path: Path, problems: Sequence[str], what: str) -> TaskError:
    """One error that names all problems of a task: on its own line if there is one, else a list."""
    if len(problems) == 1:
        return TaskError(f"{path}: {problems[0]}", what)
    told = "".join(f"{LIST_ITEM}{problem}" for problem in problems)
    return TaskError(f"{path}: {len(problems)} problems:{told}", what)


def manifest_rows(path: Path) -> list[Row]:
    """The images of a manifest, sorted by class and path.

    Raises:
        UsageError: a Parquet file, and pyarrow is not installed.
        TaskError: not such a table, or lines that cannot be used.
    """
    table = _read_parquet(path) if path.suffix.lower() in (".parquet", ".pq") else read_csv(path, MANIFEST_COLUMNS)
    rows: list[Row] = []
    problems: list[str] = []
    lines: dict[Path, int] = {}
    for number, raw in table:
        row = {column: plain_text(raw.get(column) or "") for column in MANIFEST_COLUMNS}
        problem = _problem(row)
        if not problem:
            file = _existing(path.parent, _AROUND.sub("", raw["path"] or ""))
            first = lines.setdefault(file.resolve(), number)
            if first != number:
                problem = f"lists {row['path']} again, after line {first}"
        if problem:
            problems.append(
                f"line {number} {problem}" if not problem.startswith("split") else f"line {number}: {problem}"
            )
        else:
            rows.append((file, row["group"], row["label"], row["split"]))
    if problems:
        raise listed(
            path,
            problems,
            f"every line needs {', '.join(MANIFEST_COLUMNS)}; split is train, val or test; each image has one line",
        )
    if not rows:
        raise TaskError(f"{path} lists no image")
    return sorted(rows, key=lambda row: (row[2], row[0]))


def _problem(row: dict[str, str]) -> str:
    missing = [column for column in MANIFEST_COLUMNS if not row[column]]
    if missing:
        return f"has no {missing[0]}"
    if row["split"] not in SPLITS:
        return f"split {row['split']!r}"
    if "\0" in row["path"] or max(len(part.encode()) for part in row["path"].split("/")) > _LONGEST_NAME:
        return f"has a path that no file can have: {row['path'][:60]!r}"
    return ""


def _existing(folder: Path, name: str) -> Path:
    """The file that is meant: a file system may hold its name in another form of Unicode than the table."""
    for form in ("NFC", "NFD"):
        if not (folder / name).exists() and (folder / unicodedata.normalize(form, name)).exists():
            return folder / unicodedata.normalize(form, name)
    return folder / name


def read_csv(path: Path, wanted: Sequence[str]) -> list[tuple[int, dict[str, str | None]]]:
    """(line, cells by column) of each line of a table with a header, whatever separates its cells.

    Raises:
        TaskError: no such table; one of the wanted columns is missing or there twice, or a line has too many cells.
    """
    text = _decoded(path)
    for separator in SEPARATORS:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
        try:
            columns = [_column(name) for name in next(reader, [])]
        except csv.Error:  # with this separator
            continue
        if set(wanted) <= set(columns):
            break
    else:
        raise TaskError(
            f"{path} lacks one of the columns {', '.join(wanted)}",
            "name them in the first line, separated by a comma, a semicolon, a tab or |",
        )
    twice = [column for column in wanted if columns.count(column) > 1]
    if twice:
        raise TaskError(f"{path} has the column {twice[0]} twice", "remove one of them")
    found: list[tuple[int, dict[str, str | None]]] = []
    long = []
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) > len(columns):
                long.append(f"line {reader.line_num} has {len(cells)} cells, the header {len(columns)}")
            found.append((reader.line_num, dict(zip(columns, cells, strict=False))))
    except csv.Error as error:
        raise TaskError(f"{path} is not a CSV file: line {reader.line_num}: {error}") from error
    if long:
        raise listed(path, long, "put a cell that holds the separator in quotes")
    return found


def _column(name: str) -> str:
    return plain_text(name).casefold()


def _decoded(path: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 that says so itself (as Excel writes it)."""
    content = path.read_bytes()
    utf_16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        return content.decode("utf-16" if utf_16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise TaskError(
            f"{path} is not a CSV file in UTF-8: {error}", "save it as UTF-8 (in Excel: CSV UTF-8)"
        ) from error


def _read_parquet(path: Path) -> Iterable[tuple[int, dict[str, str | None]]]:
    """(row, counted from 1; cells by column) of each row."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UsageError(
            f"{path} needs pyarrow, which is not installed", "pip install pyarrow, or give a CSV"
        ) from None
    try:
        rows = parquet.read_table(path, columns=list(MANIFEST_COLUMNS)).to_pylist()
    except (ArrowException, OSError, KeyError) as error:
        raise TaskError(
            f"{path} is not a Parquet file with the columns {', '.join(MANIFEST_COLUMNS)}: {error}"
        ) from error
    return [
        (number, {column: _cell_text(value) for column, value in row.items()}) for number, row in enumerate(rows, 1)
    ]


def _cell_text(value: object) -> str | None:
    """The text of a cell of any type: some programs write text as bytes, and nothing as not-a-number."""
    if value is None or value != value:
        return None
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
