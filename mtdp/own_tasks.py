"""Tasks and pools of one's own: a grouped split of plain `CLASS/*.jpg`, and the pool file of a folder of tasks."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from mtdp.catalogue import catalogue, more_tasks
from mtdp.converters.source import group_name
from mtdp.converters.splits import split_groups
from mtdp.errors import TaskError, UsageError, system_said
from mtdp.integrity import image_digests
from mtdp.manifest import MANIFEST_COLUMNS, SPLITS, listed, plain_text, read_csv
from mtdp.task_folder import group_of, is_junk, is_note
from mtdp.tasks import Task, load_task

RECORD: Final = "split.json"


@dataclass(frozen=True, slots=True)
class SplitSummary:
    """What a split made: split -> class -> images, and split -> groups."""

    images: Mapping[str, Mapping[str, int]]
    groups: Mapping[str, int]

    def lines(self) -> list[str]:
        return [
            f"{split}: {sum(classes.values())} images of {self.groups[split]} groups "
            f"({', '.join(f'{label} {count}' for label, count in classes.items())})"
            for split, classes in self.images.items()
        ]


@system_said("check rights, and room on the disk")
def split_classes(
    source: Path,
    out: Path,
    shares: Sequence[int] = (60, 20, 20),
    groups: Path | None = None,
    each_image: bool = False,
    seed: int = 0,
) -> SplitSummary:
    """Make a task folder of `source/CLASS/*.jpg`, whole groups in one split and every class in each.

    Args:
        shares: of train, val and test, in any unit; 0: not made.
        groups: CSV with the columns image, group (paths below `source`); without it, the group is the part of a file's
            name before the first underscore.
        each_image: each image is a group of its own: right only where no two are of one patient.

    Raises:
        UsageError: no such folder, or `out` is there already.
        TaskError: what load_task refuses, an image without a group, or a class with too few groups.
    """
    if not source.is_dir():
        raise UsageError(f"no folder {source}", "it should hold a folder of images for each class")
    if out.exists():
        raise UsageError(f"{out} is there already", "give another --out, or remove it first")
    if source.resolve() in out.resolve().parents:
        raise UsageError(f"{out} would be one of the classes", "give an --out that is not in the folder of the classes")
    if len(shares) != 3 or min(shares) < 0 or shares[0] == 0:
        raise UsageError(f"shares {shares}", "three numbers for train, val and test, train above 0")
    images = _class_images(source)
    named = _named_groups(groups, source) if groups else None
    of_image = {path: _group(path, source, named, each_image) for path in images}
    lost = [str(path) for path, group in of_image.items() if not group]
    if lost:
        raise listed(
            source, [f"{path} has no group" for path in lost], "every image needs a line in the list of groups"
        )
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for path, label in images.items():
        counts[of_image[path]][label] += 1
    homes = split_groups(counts, dict(zip(SPLITS, shares, strict=True)), seed, f"{source}")
    partial = out.with_name(f"{out.name}.partial")
    if partial.exists():
        raise UsageError(f"{partial} is in the way", "remove it, or give another --out")
    try:
        task = _copied(partial, images, of_image, homes, out.name)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    made = [split for split, share in zip(SPLITS, shares, strict=True) if share]
    return SplitSummary(
        {
            split: {
                label: sum(sample.label == number for sample in task.samples[split])
                for number, label in enumerate(task.classes)
            }
            for split in made
        },
        {split: len({sample.group for sample in task.samples[split]}) for split in made},
    )


def _class_images(source: Path) -> dict[Path, str]:
    images: dict[Path, str] = {}
    problems = []
    for folder in sorted(entry for entry in source.iterdir() if not is_junk(entry)):
        if not folder.is_dir():
            problems += [f"{folder} is in no class"] * (not is_note(folder))
            continue
        found = sorted(entry for entry in folder.iterdir() if not is_junk(entry))
        problems += [f"{entry} is not a file" for entry in found if not entry.is_file()]
        problems += [f"{folder} is an empty class"] * (not found)
        images |= {entry: plain_text(folder.name) for entry in found if entry.is_file()}
    if problems:
        raise listed(source, problems, "every image lies in CLASS/")
    if not images:
        raise TaskError(f"{source} holds no images as CLASS/name.jpg", "one folder for each class")
    return images


def _group(path: Path, source: Path, named: Mapping[str, str] | None, each_image: bool) -> str:
    inside = path.relative_to(source).as_posix()
    if named is not None:
        return named.get(inside, "")
    return inside if each_image else group_of(path.name)


def _named_groups(path: Path, source: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    torn = []
    for number, row in read_csv(path, ("image", "group")):
        image, group = PurePosixPath((row.get("image") or "").strip()).as_posix(), plain_text(row.get("group") or "")
        if found.setdefault(image, group) != group:
            torn.append(f"line {number} puts {image} into group {group!r}, one before it into {found[image]!r}")
    if torn:
        raise listed(path, torn, f"an image is in one group; images are named as below {source}")
    return found


def _copied(
    partial: Path, images: Mapping[Path, str], of_image: Mapping[Path, str], homes: Mapping[str, str], name: str
) -> Task:
    """Copy the images as `split/CLASS/GROUP_name`, and read them as training will."""
    raw_of: dict[str, str] = {}
    taken: dict[Path, Path] = {}
    for path, label in images.items():
        group = of_image[path]
        plain = group_name(group)
        if raw_of.setdefault(plain, group) != group:
            raise TaskError(f"the groups {raw_of[plain]!r} and {group!r} cannot be told apart in file names")
        rest = path.name.removeprefix(f"{group}_")
        target = partial / homes[group] / label / f"{plain}_{rest}"
        if target in taken:
            raise TaskError(f"{taken[target]} and {path} would both become {target.name}", "rename one of them")
        taken[target] = path
    for target, path in taken.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    (partial / RECORD).write_text(json.dumps({"groups": dict(sorted(homes.items()))}, indent=1) + "\n", "utf-8")
    head = "".join(letter if letter.isascii() and letter.isalnum() else "_" for letter in name) or "task"
    return load_task(partial, name=head)


@system_said("check rights, and room on the disk")
def write_pool(folder: Path, out: Path | None = None) -> tuple[Path, list[Task]]:
    """Write the pool file of the tasks in a folder: those below it that load, each checked as before training.

    Tasks that share an image are left out together, and so are those that the catalogue relates. `ships` is false:
    whether weights may be given away is not for a program to say.

    Returns:
        The file and its tasks.

    Raises:
        UsageError: no such folder, no task in it, or the file is there already.
        TaskError, ImageUnreadable: a task is not as it should be.
    """
    if not folder.is_dir():
        raise UsageError(f"no folder {folder}", "give a folder that holds tasks")
    path = out or folder / "pool.toml"
    if path.exists():
        raise UsageError(f"{path} is there already", "remove it first, or give another --out")
    places = [entry for entry in sorted(folder.iterdir()) if not is_junk(entry) and _is_task(entry)]
    if not places:
        raise UsageError(f"{folder} holds no task", "a task is a folder with train/, or a table with its columns")
    tasks = [load_task(place) for place in places]
    twice = [name for name, count in Counter(task.name for task in tasks).items() if count > 1]
    if twice:
        raise TaskError(f"{folder}: two tasks would be named {twice[0]!r}", "rename one of them")
    related = _related(tasks)
    lines = []
    for task in tasks:
        relative = os.path.relpath(task.path, path.parent)
        lines += ["[[task]]", f"name = {json.dumps(task.name)}", f"path = {json.dumps(relative, ensure_ascii=False)}"]
        if related[task.name]:
            lines.append(f"leave_out_with = {json.dumps(sorted(related[task.name]))}")
        lines += ["ships = false", ""]
    path.write_text("\n".join(lines), "utf-8")
    return path, tasks


def _is_task(entry: Path) -> bool:
    if entry.is_dir():
        return any((entry / split).is_dir() for split in SPLITS)
    if entry.suffix.lower() in (".csv", ".parquet"):
        try:
            head = entry.read_bytes()[:4096]
            return entry.suffix.lower() == ".parquet" or all(column.encode() in head for column in MANIFEST_COLUMNS)
        except OSError:
            return False
    return False


def _related(tasks: Sequence[Task]) -> dict[str, set[str]]:
    names = {task.name for task in tasks}
    related: dict[str, set[str]] = {name: set() for name in names}
    for known in (*catalogue(), *more_tasks()):
        for other in names & set(known.leave_out_with):
            if known.name in names:
                related[known.name].add(other)
                related[other].add(known.name)
    holders: dict[int, set[str]] = defaultdict(set)
    for task in tasks:
        digests, _ = image_digests(task.path, [sample.path for sample in task.of(SPLITS)])
        for digest in digests:
            if digest:
                holders[digest].add(task.name)
    for sharing in holders.values():
        for name in sharing:
            related[name] |= sharing - {name}
    return related
