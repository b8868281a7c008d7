"""Tasks and pools: which images there are, of which class, from which patient or slide, in which split.

A task is a folder `TASK/{train,val,test}/CLASS/GROUP_name.ext`, where GROUP (the part of the file name before the first
underscore) is what must not be torn between splits: patient, slide or source image; or a CSV or Parquet manifest with
the columns path, label, group, split. A pool is a TOML file that lists tasks. Everything is checked here, before any
training.
"""

from __future__ import annotations

import csv
import hashlib
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mtdp.errors import TaskError, UsageError
from mtdp.integrity import check_images
from mtdp.multitask import is_head_name

SPLITS: Final = ("train", "val", "test")
METRICS: Final = ("accuracy", "roc_auc")
MANIFEST_COLUMNS: Final = ("path", "label", "group", "split")


@dataclass(frozen=True, slots=True)
class Sample:
    """One labelled image: `label` indexes the task's classes, `group` names its patient, slide or source image."""

    path: Path
    label: int
    group: str


@dataclass(frozen=True, slots=True)
class Task:
    """A classification task; `classes` are sorted by name, `samples` of a split by class and file name."""

    name: str
    path: Path
    classes: tuple[str, ...]
    samples: Mapping[str, tuple[Sample, ...]]  # split -> samples
    metric: str
    leave_out_with: frozenset[str] = frozenset()
    ships: bool = False  # whether weights trained on it may be given away

    def of(self, splits: Iterable[str]) -> tuple[Sample, ...]:
        """The samples of some splits, in the order of `SPLITS`."""
        wanted = set(splits)
        return tuple(sample for split in SPLITS if split in wanted for sample in self.samples[split])

    def summary(self, splits: Sequence[str]) -> dict[str, Any]:
        """What a checkpoint says of the data; the digest is of labels, file names and sizes."""
        digest = hashlib.sha256()
        samples = self.of(splits)
        for sample in samples:
            digest.update(f"{sample.label}\t{sample.path.name}\t{sample.path.stat().st_size}\n".encode())
        return {
            "images": len(samples),
            "classes": list(self.classes),
            "metric": self.metric,
            "ships": self.ships,
            "files_sha256": digest.hexdigest(),
        }


def load_pool(path: Path) -> tuple[Task, ...]:
    """Reads and checks every task of a pool file.

    The file has one `[[task]]` for each task: `name`, `path` (relative to the file), and optionally `metric` (auto),
    `leave_out_with` (names) and `ships` (false).

    Raises:
        UsageError: no such file.
        TaskError: the file or one of its tasks is not as it should be; the message names the file.
    """
    if not path.is_file():
        raise UsageError(f"no pool file {path}", "give a TOML file with one [[task]] (name, path) for each task")
    try:
        entries = tomllib.loads(path.read_text("utf-8")).get("task", [])
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TaskError(f"{path} is not a TOML file: {error}") from error
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise TaskError(f"{path} lists no task", "add a [[task]] with name and path")
    _check_entries(path, entries)
    return tuple(
        load_task(
            path.parent / entry["path"],
            name=entry["name"],
            metric=entry.get("metric", "auto"),
            leave_out_with=entry.get("leave_out_with", ()),
            ships=entry.get("ships", False),
        )
        for entry in entries
    )


def _check_entries(path: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    seen: set[str] = set()
    for number, entry in enumerate(entries, 1):
        for key in ("name", "path"):
            if not isinstance(entry.get(key), str):
                raise TaskError(f"{path}: task {number} has no {key}", f'add {key} = "..." to it')
        unknown = sorted(set(entry) - {"name", "path", "metric", "leave_out_with", "ships"})
        if unknown:
            raise TaskError(f"{path}: task {entry['name']!r} has an unknown key {unknown[0]!r}", "is it misspelt?")
        if entry["name"] in seen:
            raise TaskError(
                f"{path}: two tasks are named {entry['name']!r}", "names must differ: heads are kept by name"
            )
        seen.add(entry["name"])
        together = entry.get("leave_out_with", [])
        if not isinstance(together, list) or not all(isinstance(other, str) for other in together):
            raise TaskError(f"{path}: task {entry['name']!r}: leave_out_with must be a list of names")
        if not isinstance(entry.get("ships", False), bool):
            raise TaskError(f"{path}: task {entry['name']!r}: ships must be true or false")
    for entry in entries:
        strangers = sorted(set(entry.get("leave_out_with", ())) - seen)
        if strangers:
            raise TaskError(
                f"{path}: task {entry['name']!r}: leave_out_with names {strangers[0]!r}, which is not in the pool"
            )


def load_task(
    path: Path,
    name: str | None = None,
    metric: str = "auto",
    leave_out_with: Iterable[str] = (),
    ships: bool = False,
) -> Task:
    """Reads and checks one task, a folder or a manifest.

    Args:
        name: of the task; the folder's or manifest's own by default.
        metric: `accuracy`, `roc_auc` (two classes), or `auto`, as the paper: ROC AUC for two classes, else accuracy.

    Raises:
        UsageError: no such folder or file.
        TaskError: an empty class, a class missing in a split, a group in two splits.
        ImageUnreadable: an image is missing, no image, or truncated.
    """
    if name is None:
        name = path.stem if path.is_file() else path.resolve().name
    if not is_head_name(name):
        raise TaskError(f"{path}: {name!r} cannot be the name of a task", "use letters, digits, '_' and '-' only")
    if path.is_dir():
        rows = _folder_rows(path)
    elif path.is_file():
        rows = _manifest_rows(path)
    else:
        raise UsageError(f"no task at {path}", "give a folder with train/, val/ and test/, or a manifest")
    classes = tuple(sorted({label for _, _, label, _ in rows}))
    if len(classes) < 2:
        raise TaskError(
            f"{path}: {len(classes)} class{'es' * (len(classes) != 1)} in it, at least 2 are needed",
            "one folder a class below train/, val/ and test/",
        )
    numbers = {label: number for number, label in enumerate(classes)}
    samples = {
        split: tuple(Sample(file, numbers[label], group) for file, group, label, s in rows if s == split)
        for split in SPLITS
    }
    _check_splits(path, classes, samples)
    _check_groups(samples)
    check_images(path, [file for file, _, _, _ in rows])
    return Task(name, path, classes, samples, _metric(path, metric, len(classes)), frozenset(leave_out_with), ships)


# One image as (file, group, label, split).
_Row = tuple[Path, str, str, str]


def group_of(file_name: str) -> str:
    """The group in a file's name: all before the first underscore, or the whole stem where there is none.

    >>> group_of("slide12_0007.png"), group_of("img3.png")
    ('slide12', 'img3')
    """
    return Path(file_name).stem.split("_", 1)[0]


# What people call a split; left unsaid, a task with `valid/` would be a task without a val split.
_MISNOMERS: Final = {"training": "train", "valid": "val", "validation": "val", "dev": "val", "testing": "test"}


def _folder_rows(path: Path) -> list[_Row]:
    rows: list[_Row] = []
    for misnomer, split in _MISNOMERS.items():
        if (path / misnomer).is_dir():
            raise TaskError(f"{path / misnomer} would not be read", f"rename it to {split}, or move it elsewhere")
    for split in SPLITS:
        for folder in sorted(p for p in (path / split).glob("*") if p.is_dir() and not p.name.startswith(".")):
            files = sorted(
                f for f in folder.iterdir() if f.is_file() and not f.name.startswith(".") and f.name != "Thumbs.db"
            )
            if not files:
                raise TaskError(f"{folder} is an empty class", "put images there, or remove the class from every split")
            rows += [(file, group_of(file.name), folder.name, split) for file in files]
    if not rows:
        raise TaskError(f"{path} holds no images as {{train,val,test}}/CLASS/GROUP_name.ext")
    return rows


def _manifest_rows(path: Path) -> list[_Row]:
    table = _read_parquet(path) if path.suffix == ".parquet" else _read_csv(path)
    rows: list[_Row] = []
    lines: dict[str, int] = {}
    for number, row in enumerate(table, 2):  # line 1 is the header
        missing = [column for column in MANIFEST_COLUMNS if not row.get(column)]
        if missing:
            raise TaskError(
                f"{path}: line {number} has no {missing[0]}", f"every line needs {', '.join(MANIFEST_COLUMNS)}"
            )
        if row["split"] not in SPLITS:
            raise TaskError(f"{path}: line {number}: split {row['split']!r}", "it must be train, val or test")
        if lines.setdefault(row["path"], number) != number:
            raise TaskError(
                f"{path}: line {number} lists {row['path']} again, after line {lines[row['path']]}",
                "an image has one label and one split",
            )
        rows.append((path.parent / row["path"], row["group"], row["label"], row["split"]))
    if not rows:
        raise TaskError(f"{path} lists no image")
    return sorted(rows, key=lambda row: (row[2], row[0]))


def _read_csv(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if not set(MANIFEST_COLUMNS) <= set(reader.fieldnames or ()):
                raise TaskError(f"{path} lacks one of the columns {', '.join(MANIFEST_COLUMNS)}")
            return list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise TaskError(f"{path} is not a CSV file: {error}") from error


def _read_parquet(path: Path) -> list[dict[str, str]]:
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
    return [{column: str(value) for column, value in row.items() if value is not None} for row in rows]


def _check_splits(path: Path, classes: Sequence[str], samples: Mapping[str, Sequence[Sample]]) -> None:
    if not samples["train"]:
        raise TaskError(f"{path} has no train split")
    for split in SPLITS:  # a task may lack val or test as a whole (so does one of the paper's), but no class of them
        present = {sample.label for sample in samples[split]}
        absent = [name for number, name in enumerate(classes) if number not in present]
        if present and absent:
            raise TaskError(
                f"{path}: class {absent[0]!r} is missing in the {split} split", "every split needs every class"
            )


def _check_groups(samples: Mapping[str, Sequence[Sample]]) -> None:
    home: dict[str, tuple[str, Path]] = {}
    for split in SPLITS:
        for sample in samples[split]:
            first_split, first_path = home.setdefault(sample.group, (split, sample.path))
            if first_split != split:
                raise TaskError(
                    f"group {sample.group!r} is in two splits: {first_path} and {sample.path}",
                    "a patient, slide or source image belongs to one split (the name up to the first underscore)",
                )


def _metric(path: Path, metric: str, classes: int) -> str:
    if metric == "auto":
        return "roc_auc" if classes == 2 else "accuracy"
    if metric not in METRICS or (metric == "roc_auc" and classes != 2):
        raise TaskError(
            f"{path}: metric {metric!r} with {classes} classes", "use auto, accuracy, or roc_auc for two classes"
        )
    return metric
