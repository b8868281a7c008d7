"""Tasks and pools: which images there are, of which class, from which patient or slide, in which split.

A task is a folder `TASK/{train,val,test}/CLASS/GROUP_name.ext`, where GROUP (the part of the file name before the first
underscore) names the images that must stay in the same split: those of a patient, slide or source image; or a CSV or
Parquet manifest with the columns path, label, group, split. A pool is a TOML file that lists tasks. Everything is
checked here, before any training.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mtdp.errors import PoolError, TaskError, UsageError, system_said
from mtdp.integrity import image_digests
from mtdp.manifest import MANIFEST_COLUMNS, SPLITS, Row, listed, manifest_rows, unfit_name
from mtdp.multitask import is_head_name
from mtdp.task_folder import folder_rows, group_of

__all__ = ["MANIFEST_COLUMNS", "METRICS", "SPLITS", "Sample", "Task", "group_of", "load_pool", "load_task"]

METRICS: Final = ("accuracy", "roc_auc")


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
            digest.update(os.fsencode(f"{sample.label}\t{sample.path.name}\t{sample.path.stat().st_size}\n"))
        return {
            "images": len(samples),
            "classes": list(self.classes),
            "metric": self.metric,
            "ships": self.ships,
            "files_sha256": digest.hexdigest(),
        }


def load_pool(path: Path) -> tuple[Task, ...]:
    """Read and check every task of a pool file.

    The file has one `[[task]]` for each task: `name`, `path` (relative to the file), and optionally `metric` (auto),
    `leave_out_with` (names) and `ships` (false).

    Raises:
        UsageError: no such file.
        PoolError: the file is not as it should be; the message names it.
        TaskError: one of its tasks is not.
    """
    if not path.is_file():
        raise UsageError(f"no pool file {path}", "give a TOML file with one [[task]] (name, path) for each task")
    try:
        entries = tomllib.loads(path.read_text("utf-8")).get("task", [])
    except (ValueError, RecursionError) as error:  # an integer of 5,000 digits, or brackets without end
        raise PoolError(f"{path} is not a TOML file: {error}") from error
    except OSError as error:
        raise PoolError(f"{path} cannot be read: {error.strerror}") from error
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise PoolError(f"{path} lists no task", "add a [[task]] with name and path")
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
                raise PoolError(f"{path}: task {number} has no {key}", f'add {key} = "..." to it')
        unknown = sorted(set(entry) - {"name", "path", "metric", "leave_out_with", "ships"})
        if unknown:
            raise PoolError(f"{path}: task {entry['name']!r} has an unknown key {unknown[0]!r}", "is it misspelt?")
        if entry["name"] in seen:
            raise PoolError(
                f"{path}: two tasks are named {entry['name']!r}", "names must differ: heads are kept by name"
            )
        seen.add(entry["name"])
        together = entry.get("leave_out_with", [])
        if not isinstance(together, list) or not all(isinstance(other, str) for other in together):
            raise PoolError(f"{path}: task {entry['name']!r}: leave_out_with must be a list of names")
        if not isinstance(entry.get("ships", False), bool):
            raise PoolError(f"{path}: task {entry['name']!r}: ships must be true or false")
    for entry in entries:
        strangers = sorted(set(entry.get("leave_out_with", ())) - seen)
        if strangers:
            raise PoolError(
                f"{path}: task {entry['name']!r}: leave_out_with names {strangers[0]!r}, which is not in the pool"
            )


@system_said("check its rights, and those of its folder")
def load_task(
    path: Path,
    name: str | None = None,
    metric: str = "auto",
    leave_out_with: Iterable[str] = (),
    ships: bool = False,
) -> Task:
    """Read and check one task, a folder or a manifest.

    Args:
        name: of the task; the folder's or manifest's own by default.
        metric: `accuracy`, `roc_auc` (two classes), or `auto`, as the paper: ROC AUC for two classes, else accuracy.

    Raises:
        UsageError: no such folder or file.
        TaskError: entries that would not be read, an empty class, a class missing in a split, a group or an image in
            two splits.
        ImageUnreadable: images that are missing, no images, or truncated; all of them are named.
    """
    if name is None:
        name = path.stem if path.is_file() else path.resolve().name
    if not is_head_name(name):
        raise TaskError(f"{path}: {name!r} cannot be the name of a task", "use letters, digits, '_' and '-' only")
    if path.is_dir():
        rows = folder_rows(path)
    elif path.is_file():
        rows = manifest_rows(path)
    else:
        raise UsageError(f"no task at {path}", "give a folder with train/, val/ and test/, or a manifest")
    classes = tuple(sorted({label for _, _, label, _ in rows}))
    if len(classes) < 2:
        raise TaskError(
            f"{path}: {len(classes)} class{'es' * (len(classes) != 1)} in it, at least 2 are needed",
            "one folder for each class below train/, val/ and test/",
        )
    _check_names(path, classes, {group for _, group, _, _ in rows})
    numbers = {label: number for number, label in enumerate(classes)}
    samples = {
        split: tuple(Sample(file, numbers[label], group) for file, group, label, s in rows if s == split)
        for split in SPLITS
    }
    _check_splits(path, classes, samples)
    _check_groups(path, samples)
    digests, _ = image_digests(path, [file for file, _, _, _ in rows])
    _check_twins(path, rows, digests)
    return Task(name, path, classes, samples, _metric(path, metric, len(classes)), frozenset(leave_out_with), ships)


def _check_names(path: Path, classes: Sequence[str], groups: Iterable[str]) -> None:
    """Refuse names that no table could show, and classes that only the case of letters tells apart."""
    problems = [f"class {name!r} {why}" for name in classes if (why := unfit_name(name))]
    problems += [f"group {name!r} {why}" for name in sorted(groups) if (why := unfit_name(name))]
    first: dict[str, str] = {}
    for name in classes:
        if first.setdefault(name.casefold(), name) != name:
            problems.append(f"classes {first[name.casefold()]!r} and {name!r} differ in case alone")
    if problems:
        raise listed(path, problems, "rename them")


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


def _check_groups(path: Path, samples: Mapping[str, Sequence[Sample]]) -> None:
    home: dict[str, tuple[str, Path]] = {}
    torn: dict[str, str] = {}
    for split in SPLITS:
        for sample in samples[split]:
            first_split, first_path = home.setdefault(sample.group, (split, sample.path))
            if first_split != split:
                torn.setdefault(
                    sample.group, f"group {sample.group!r} is in two splits: {first_path} and {sample.path}"
                )
    if torn:
        raise listed(
            path,
            list(torn.values()),
            "a patient, slide or source image belongs to one split (the name up to the first underscore)",
        )
    by_case: dict[str, str] = {}
    for group, (split, _) in home.items():
        other = by_case.setdefault(group.casefold(), group)
        if home[other][0] != split:
            what = f"group {other!r} is in {home[other][0]} and {group!r} in {split}: are they one patient?"
            print(f"{path}: {what}", file=sys.stderr, flush=True)


def _check_twins(path: Path, rows: Sequence[Row], digests: Sequence[int]) -> None:
    """Refuse equal images in two splits or two classes; tell of those in two groups of one split.

    Blank images (digest 0) are equal by nature: glass looks like glass.
    """
    equal: dict[int, list[Row]] = defaultdict(list)
    for row, digest in zip(rows, digests, strict=True):
        if digest:
            equal[digest].append(row)
    problems, odd = [], 0
    for twins in equal.values():
        first = twins[0]
        for other in twins[1:]:
            if other[3] != first[3]:
                problems.append(f"{first[0]} ({first[3]}) and {other[0]} ({other[3]}) are the same image in two splits")
            elif other[2] != first[2]:
                problems.append(
                    f"{first[0]} ({first[2]}) and {other[0]} ({other[2]}) are the same image in two classes"
                )
            elif other[1] != first[1]:
                odd += 1
                example = f"for example {first[0]} and {other[0]}"
    if problems:
        raise listed(path, problems, "an image belongs to one split and one class: remove one of them")
    if odd:
        print(f"{path}: images that equal one of another group: {odd}, {example}", file=sys.stderr, flush=True)


def _metric(path: Path, metric: str, classes: int) -> str:
    if metric == "auto":
        return "roc_auc" if classes == 2 else "accuracy"
    if metric not in METRICS or (metric == "roc_auc" and classes != 2):
        raise TaskError(
            f"{path}: metric {metric!r} with {classes} classes", "use auto, accuracy, or roc_auc for two classes"
        )
    return metric
