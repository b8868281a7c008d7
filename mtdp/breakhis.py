"""BreakHis, the paper's test of its published networks: five folds of patients, accuracy within each patient.

The folds are those of the data set's authors: `dsfold1.txt` to `dsfold5.txt` (from their mkfold.tar.gz) beside the
images, with lines such as `SOB_B_A-14-22549AB-40-001.png|40|1|train`. For each magnification and fold, the recognition
rate of a patient is the part of its images that is recognised, and the score the mean over the patients of the test
part (Spanhol et al. 2016). The paper states the mean and the deviation over the folds. Fine-tuning needs a val split: a
tenth of the patients of the train part.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mtdp.converters.source import contents, find
from mtdp.errors import TaskError, UsageError
from mtdp.finetune import FinetuneConfig, finetune_best
from mtdp.metrics import predicted
from mtdp.protocol.ranking import mean_and_std
from mtdp.tasks import Sample, Task
from mtdp.transfer import Source, extract_features, judge_features

MAGNIFICATIONS: Final = (40, 100, 200, 400)
FOLDS: Final = 5
CLASSES: Final = ("benign", "malignant")
VAL_SHARE: Final = 0.1
_NAME: Final = re.compile(r"^SOB_(?P<kind>[BM])_[A-Z]+-(?P<patient>\d+-[0-9A-Z]+)-(?P<scale>40|100|200|400)-\d+\.png$")


@dataclass(frozen=True, slots=True)
class PatientScores:
    """What a network is worth on one magnification: the accuracy within each test patient, of each fold."""

    magnification: int
    folds: tuple[Mapping[str, float], ...]  # patient -> accuracy

    @property
    def of_folds(self) -> tuple[float, ...]:
        """The mean over the patients, of each fold."""
        return tuple(fmean(fold.values()) for fold in self.folds)


def name_facts(path: Path) -> tuple[str, str, int]:
    """(class, patient, magnification) of an image, from its name.

    Raises:
        TaskError: it is not named as the data set names its images.

    >>> name_facts(Path("SOB_B_A-14-22549AB-40-001.png"))
    ('benign', '14-22549AB', 40)
    """
    found = _NAME.match(path.name)
    if found is None:
        raise TaskError(f"{path}: a name like SOB_B_A-14-22549AB-40-001.png was expected", "is it of BreakHis?")
    return CLASSES[found["kind"] == "M"], found["patient"], int(found["scale"])


def load_folds(root: Path) -> dict[int, list[Task]]:
    """Magnification -> the task of each fold, with train and test by patient.

    Raises:
        UsageError: a fold's file is missing.
        TaskError: an image or a fold is not as expected: a file is missing, or a patient is in both parts.
    """
    images = {path.name: path for path in find(root, ["SOB_*.png"], "SOB_B_A-14-22549AB-40-001.png and so on")}
    tasks: dict[int, list[Task]] = {scale: [] for scale in MAGNIFICATIONS}
    for number in range(1, FOLDS + 1):
        lists = sorted(root.rglob(f"dsfold{number}.txt"))
        if not lists:
            raise UsageError(
                f"{root} has no dsfold{number}.txt: without the original folds, scores cannot be compared",
                f"unpack the data set's mkfold.tar.gz there; the folder holds {contents(root)}",
            )
        parts = _parts(lists[0], images)
        for scale in MAGNIFICATIONS:
            samples = {part: tuple(s for s, s_scale in parts[part] if s_scale == scale) for part in ("train", "test")}
            _check(lists[0], scale, samples)
            tasks[scale].append(
                Task(f"breakhis_{scale}x_fold{number}", root, CLASSES, {**samples, "val": ()}, "accuracy")
            )
    return tasks


def _parts(path: Path, images: Mapping[str, Path]) -> dict[str, list[tuple[Sample, int]]]:
    parts: dict[str, list[tuple[Sample, int]]] = {"train": [], "test": []}
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) != 4 or cells[3] not in parts:
            raise TaskError(f"{path}: line {number}: NAME|40|1|train was expected, got {line.strip()!r}")
        if cells[0] not in images:
            raise TaskError(f"{path}: line {number}: {cells[0]} is missing", "is the download complete?")
        label, patient, _ = name_facts(images[cells[0]])
        # The magnification of the list, not of the name: a fold's list repeats an image for each part that it is in.
        parts[cells[3]].append((Sample(images[cells[0]], CLASSES.index(label), patient), int(cells[1])))
    return parts


def _check(path: Path, scale: int, samples: Mapping[str, Sequence[Sample]]) -> None:
    for part, found in samples.items():
        if {sample.label for sample in found} != {0, 1}:
            raise TaskError(f"{path}: {scale}x has not both classes in {part}", "is the download complete?")
    torn = {s.group for s in samples["train"]} & {s.group for s in samples["test"]}
    if torn:
        raise TaskError(f"{path}: {scale}x: patient {min(torn)} is in train and in test")


def with_val(task: Task, seed: int) -> Task:
    """The task with a tenth of each class's train patients, at least one, as val."""
    rng = np.random.default_rng(seed)
    held: set[str] = set()
    for label in range(len(CLASSES)):
        patients = sorted({s.group for s in task.samples["train"] if s.label == label} - held)
        held |= set(rng.choice(patients, max(1, math.floor(len(patients) * VAL_SHARE + 0.5)), replace=False).tolist())
    train = tuple(s for s in task.samples["train"] if s.group not in held)
    val = tuple(s for s in task.samples["train"] if s.group in held)
    return replace(task, samples={**task.samples, "train": train, "val": val})


def patient_accuracies(outputs: Sequence[float], samples: Sequence[Sample]) -> dict[str, float]:
    """Patient -> the part of its images that is recognised."""
    right = predicted(np.asarray(outputs, np.float64), len(CLASSES)) == np.array([s.label for s in samples])
    patients = np.array([s.group for s in samples])
    return {str(patient): float(right[patients == patient].mean()) for patient in np.unique(patients)}


def probe_folds(
    source: Source,
    root: Path,
    precision: str = "auto",
    seed: int = 0,
    extract: Callable[[Source, Sequence[Sample]], NDArray[np.float32]] | None = None,
) -> Iterator[PatientScores]:
    """Features and a linear SVM fitted on each fold's train part, one magnification after the other."""
    compute = extract or (lambda source, samples: extract_features(source, samples, precision))
    for scale, folds in load_folds(root).items():
        samples = {s.path: s for task in folds for s in task.of(("train", "test"))}
        features = dict(zip(samples, compute(source, list(samples.values())), strict=True))
        found = []
        for task in folds:
            ordered = task.of(("train", "test"))
            table = np.stack([features[s.path] for s in ordered])
            result = judge_features(table, task, "", seed, ("train",), "test")
            found.append(patient_accuracies(result.outputs, task.of(("test",))))
        yield PatientScores(scale, tuple(found))


def finetune_folds(
    config: FinetuneConfig, root: Path, out: Path, rates: Sequence[float], *, resume: bool = False, quiet: bool = False
) -> Iterator[PatientScores]:
    """Fine-tuning on each fold; rate and epoch are chosen on a tenth of the train part's patients."""
    for scale, folds in load_folds(root).items():
        found = []
        for task in folds:
            whole = with_val(task, config.seed)
            result = finetune_best(whole, config, out / task.name, rates, resume=resume, quiet=quiet)
            found.append(patient_accuracies(result.outputs, whole.of(("test",))))
        yield PatientScores(scale, tuple(found))


def table(scores: Sequence[PatientScores], title: str) -> str:
    """Markdown: accuracy within patients, mean ± sample standard deviation over the folds, in percent."""
    cells = []
    for one in scores:
        mean, std = mean_and_std(one.of_folds)
        cells.append(f"{100 * mean:.2f} ± {100 * std:.2f}")
    patients = [f"{min(map(len, one.folds))}-{max(map(len, one.folds))}" for one in scores]
    return "\n".join(
        [
            f"| | {' | '.join(f'{one.magnification}x' for one in scores)} |",
            "|---" * (len(scores) + 1) + "|",
            f"| {title} | {' | '.join(cells)} |",
            f"| test patients in a fold | {' | '.join(patients)} |",
        ]
    )
