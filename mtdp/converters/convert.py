"""The common part of every conversion: split by group, cut, write beside the goal, rename at the end."""

from __future__ import annotations

import importlib
import json
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, cast

from PIL import Image

from mtdp.catalogue import CatalogueTask, known_task
from mtdp.converters.plan import Patch, Plan, Planner
from mtdp.converters.source import expect_folder, group_name
from mtdp.converters.splits import split_groups
from mtdp.errors import TaskError, UsageError

CONVERTERS: Final = {
    "mitos2014": "mtdp.converters.mitosis:mitos2014",
    "warwick_crc": "mtdp.converters.warwick:warwick_crc",
    "janowczyk1": "mtdp.converters.masks:janowczyk1",
    "janowczyk2": "mtdp.converters.masks:janowczyk2",
    "janowczyk5": "mtdp.converters.mitosis:janowczyk5",
    "janowczyk6": "mtdp.converters.folders:janowczyk6",
    "janowczyk7": "mtdp.converters.folders:janowczyk7",
    "lbpstroma": "mtdp.converters.folders:lbpstroma",
    "tupac_mitosis": "mtdp.converters.mitosis:tupac_mitosis",
    "iciar18_micro": "mtdp.converters.folders:iciar18_micro",
    "camelyon16": "mtdp.converters.camelyon16:camelyon16",
    "umcm_colorectal": "mtdp.converters.folders:umcm_colorectal",
    "ulg_bonemarrow": "mtdp.converters.folders:ulg_bonemarrow",
}
# Of public data sets that the paper did not train on.
MORE_CONVERTERS: Final = {
    "pcam": "mtdp.converters.more:pcam",
    "nct_crc_100k": "mtdp.converters.more:nct_crc_100k",
    "mhist": "mtdp.converters.more:mhist",
    "bracs": "mtdp.converters.more:bracs",
    "breakhis": "mtdp.converters.more:breakhis",
    "breakhis_binary": "mtdp.converters.more:breakhis_binary",
    "unitopatho": "mtdp.converters.more:unitopatho",
}

RECORD: Final = "conversion.json"
_CHUNK: Final = 64  # at most so many source files a job: Janowczyk 6 has 277,524
_WORKERS: Final = 4  # a source image of TUPAC16 takes 100 MB decoded


@dataclass(frozen=True, slots=True)
class Summary:
    """What a conversion made; `conversion.json` in the task folder."""

    task: str
    seed: int
    source: str
    group: str
    groups: Mapping[str, int]  # split -> groups
    images: Mapping[str, Mapping[str, int]]  # split -> class -> images
    paper_images: Mapping[str, int]  # split -> images in the paper, or as published
    notes: Sequence[str]

    def lines(self) -> list[str]:
        """For people: one line for each split, then the notes."""
        lines = []
        for split, classes in self.images.items():
            counts = ", ".join(f"{label} {count}" for label, count in classes.items())
            total = sum(classes.values())
            paper = self.paper_images[split]
            whose = "published" if self.task in MORE_CONVERTERS else "paper"
            lines.append(f"{split}: {total} images of {self.groups[split]} {self.group}s ({counts}); {whose}: {paper}")
        return [*lines, *self.notes]


def convert(
    name: str, source: Path, out: Path, seed: int = 0, report: Callable[[int, int], None] = lambda done, total: None
) -> Summary:
    """Make the task folder `out` from the unpacked download in `source`.

    The same download and seed give the same files. All is written to `OUT.partial` first and renamed at the end: an
    interrupted conversion leaves no `out`, and the next one starts anew.

    Args:
        name: of a public task of the catalogue.
        seed: of the split, and of the windows around objects.
        report: is told how many of the images are written, after each source file.

    Raises:
        UsageError: no such task, a private one, no such folder, or `out` is there already.
        TaskError: the download is not as expected; the message names the path.
        ImageUnreadable: one of its images is damaged.
    """
    task = known_task(name)
    if not task.public:
        raise UsageError(
            f"{name} ({task.title}) was never published: its images belong to the authors' collaborators",
            "`mtdp-train tasks` lists the public ones",
        )
    expect_folder(source, f"the unpacked download of {task.title}" + (f" from {task.source}" if task.source else ""))
    partial = _claim(out)
    plan = _planner(name)(source, seed)
    _check_classes(task, source, plan.patches)
    homes = _homes(plan.patches, _targets(task), seed, source)
    targets = _target_paths(plan.patches, homes)
    summary = _summary(task, source, seed, plan, homes)
    _write(partial, plan, targets, summary, report)
    partial.rename(out)
    return summary


def _planner(name: str) -> Planner:
    module, function = {**CONVERTERS, **MORE_CONVERTERS}[name].split(":")
    return cast(Planner, getattr(importlib.import_module(module), function))


def _claim(out: Path) -> Path:
    """The path to write to; a partial conversion that lies there is dropped."""
    if out.exists():
        raise UsageError(f"{out} is there already", "give another --out, or remove it first")
    partial = out.with_name(f"{out.name}.partial")
    if partial.exists():
        if any(partial.iterdir()) and not (partial / RECORD).is_file():  # never remove what somebody else put there
            raise UsageError(f"{partial} is in the way", "remove it, or give another --out")
        shutil.rmtree(partial)
    return partial


def _check_classes(task: CatalogueTask, source: Path, patches: Sequence[Patch]) -> None:
    found = {patch.label for patch in patches}
    missing = [label for label in task.class_names if label not in found]
    if missing:
        raise TaskError(
            f"{source} gives no image of class {missing[0]!r} of {task.name}", "is the download complete and unpacked?"
        )
    if len(found) != task.classes:
        raise TaskError(
            f"{source} has {len(found)} classes ({', '.join(sorted(found))}), {task.name} has {task.classes}",
            "one folder for each class",
        )


def _targets(task: CatalogueTask) -> dict[str, int]:
    return {"train": task.train, "val": task.val, "test": task.test}


def _homes(patches: Sequence[Patch], targets: Mapping[str, int], seed: int, source: Path) -> dict[str, str]:
    """The split of each group: that of the data set's authors where they gave one, else drawn among the others."""
    given: dict[str, str] = {}
    for patch in patches:
        if patch.split is not None and given.setdefault(patch.group, patch.split) != patch.split:
            raise TaskError(
                f"{source}: group {patch.group!r} is in {given[patch.group]} and in {patch.split}",
                "is it the official split of this data set?",
            )
    groups = _by_group(patches)
    free = {group: counts for group, counts in groups.items() if group not in given}
    open_splits = {split: share for split, share in targets.items() if split not in set(given.values())}
    if not free:
        return given
    return {**given, **split_groups(free, open_splits, seed, f"{source}")}


def _by_group(patches: Iterable[Patch]) -> dict[str, Counter[str]]:
    groups: dict[str, Counter[str]] = defaultdict(Counter)
    for patch in patches:
        groups[patch.group][patch.label] += 1
    return dict(groups)


def _target_paths(patches: Sequence[Patch], homes: Mapping[str, str]) -> list[str]:
    """`split/CLASS/GROUP_name.png` for each patch, no two alike."""
    raw_of: dict[str, str] = {}
    for raw in homes:
        other = raw_of.setdefault(group_name(raw), raw)
        if other != raw:
            raise TaskError(
                f"the groups {other!r} and {raw!r} cannot be told apart in file names", "rename one of them"
            )
    taken: dict[str, Path] = {}
    for patch in patches:
        path = f"{homes[patch.group]}/{patch.label}/{group_name(patch.group)}_{patch.name}.png"
        if path in taken:
            raise TaskError(
                f"{taken[path]} and {patch.source} would both become {path}", "does the folder hold the data twice?"
            )
        taken[path] = patch.source
    return list(taken)


def _summary(task: CatalogueTask, source: Path, seed: int, plan: Plan, homes: Mapping[str, str]) -> Summary:
    made = [split for split, count in _targets(task).items() if count]
    counts = Counter((homes[patch.group], patch.label) for patch in plan.patches)
    labels = sorted({patch.label for patch in plan.patches})
    return Summary(
        task=task.name,
        seed=seed,
        source=source.resolve().name,
        group=task.group,
        groups={split: sum(home == split for home in homes.values()) for split in made},
        images={split: {label: counts[split, label] for label in labels} for split in made},
        paper_images={split: _targets(task)[split] for split in made},
        notes=plan.notes,
    )


def _write(
    partial: Path, plan: Plan, paths: Sequence[str], summary: Summary, report: Callable[[int, int], None]
) -> None:
    by_source: dict[Path, list[tuple[Patch, str]]] = defaultdict(list)
    for patch, path in zip(plan.patches, paths, strict=True):
        by_source[patch.source].append((patch, path))

    def cut(sources: Sequence[Path]) -> int:
        for source in sources:
            jobs = by_source[source]
            images = plan.crops(source, [patch for patch, _ in jobs])
            for (patch, path), image in zip(jobs, images, strict=True):
                _save(image, patch, partial / path)
        return sum(len(by_source[source]) for source in sources)

    order = list(by_source)
    chunk = max(1, min(_CHUNK, len(order) // _CHUNK))

    try:
        partial.mkdir(parents=True)
        (partial / RECORD).write_text(json.dumps(asdict(summary), indent=1) + "\n", "utf-8")
        for folder in sorted({os.path.dirname(path) for path in paths}):  # noqa: PTH120
            (partial / folder).mkdir(parents=True)
        done = 0
        with ThreadPoolExecutor(min(_WORKERS, os.cpu_count() or 1)) as threads:
            for written in threads.map(cut, [order[start : start + chunk] for start in range(0, len(order), chunk)]):
                done += written
                report(done, len(paths))
    except OSError as error:
        raise TaskError(f"{partial} cannot be written: {error}", "is there room on the disk?") from error


def _save(image: Image.Image, patch: Patch, path: Path) -> None:
    if patch.corner is None and patch.source.suffix == ".png":
        shutil.copyfile(patch.source, path)  # it has just been decoded, so it is sound
        return
    if patch.out_px and image.width != patch.out_px:
        image = image.resize((patch.out_px, patch.out_px), Image.Resampling.BOX)
    image.save(path, compress_level=1)
