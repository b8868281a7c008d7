"""Which data, seeds and weights reach which step: recorded by fakes that are handed in, held against the paper."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file

from mtdp.backbones import build_backbone
from mtdp.checkpoint import CheckpointInfo, load_checkpoint, save_checkpoint
from mtdp.errors import TrainingDiverged
from mtdp.finetune import (
    ADAPTATION_EPOCH,
    FinetuneConfig,
    FinetuneResult,
    FinetuneSteps,
    _judged_on_test,
    finetune,
    finetune_best,
)
from mtdp.images import ImageCache, load_image
from mtdp.metrics import Truth, interval
from mtdp.multitask import MultiTaskNet
from mtdp.preprocess import Normalise, Preprocessing
from mtdp.pretrain import PretrainSteps, pretrain
from mtdp.pretrain_config import PretrainConfig
from mtdp.protocol.cells import Cell
from mtdp.protocol.config import Combination, ProtocolConfig
from mtdp.protocol.ranking import choose
from mtdp.protocol.rows import collect
from mtdp.protocol.run import Protocol, Steps, run_protocol, score_own_head, scores_on_val
from mtdp.run_state import write_json
from mtdp.sampling import ADAPTATION, TRAINING, batches, draw_epoch, epoch_batches
from mtdp.scores import head_scores
from mtdp.tasks import SPLITS, Sample, Task, load_task
from mtdp.transfer import (
    C_GRID,
    Classifier,
    Colours,
    Extractor,
    ProbeResult,
    cross_validate,
    extract_features,
    fit_svm,
    judge_features,
    load_extractor,
    probe_task,
    sureness,
    svm_outputs,
)
from mtdp.weights import WeightsOrigin, load_backbone_weights

Make = Callable[..., Path]


def in_memory(name: str, classes: int = 2, per_split: int = 28, groups: int = 7, **more: Any) -> Task:  # type: ignore[explicit-any]
    """A task without files; its groups are interleaved, so that rows that follow each other are of different groups."""
    samples = {
        split: tuple(
            Sample(Path(f"{name}/{split}/{i}.png"), (i // groups) % classes, f"{split}{i % groups}")
            for i in range(per_split)
        )
        for split in SPLITS
    }
    names = tuple(f"c{number}" for number in range(classes))
    return Task(name, Path(name), names, samples, "roc_auc" if classes == 2 else "accuracy", **more)


# --- the protocol: every cell -----------------------------------------------------------------------------------------

FIRST, SECOND = Combination(1e-2, 1.0, 0), Combination(1e-3, 1.0, 0)
GRID = ProtocolConfig(
    arch="resnet18",
    init="random",
    evaluate=("a", "c", "d"),
    lrs=(FIRST.lr, SECOND.lr),
    head_lr_multipliers=(1.0,),
    warmups=(0,),
    seeds=2,
    iterations=7,
    warmup_lr=2e-3,
    batch_size=4,
    image_px=32,
    precision="fp32",
    adaptation_batches=3,
    finetune=("a", "c"),
    finetune_lrs=(1e-3, 1e-4),
    finetune_epochs=5,
    scratch=True,
    joint=True,
    release=True,
)
# Task -> for each combination, its score on val with seed 0 and with seed 1. The first combination has the best single
# seed and the best mean score over the tasks; by the mean over seeds, and by ranks, it is best on `a` alone.
ON_VAL = {
    "a": {FIRST.name: (0.9, 0.9), SECOND.name: (0.1, 0.1)},
    "c": {FIRST.name: (0.9, 0.1), SECOND.name: (0.6, 0.6)},
    "d": {FIRST.name: (0.9, 0.2), SECOND.name: (0.6, 0.6)},
}
# By rank over the other two tasks: for c and d these are one of each, and of equals the first is taken.
CHOSEN = {"a": SECOND, "c": FIRST, "d": FIRST}
JOINT_ON_VAL = {"a": (0.2, 0.8), "c": (0.9, 0.3), "d": (0.2, 0.2)}  # first, second; of equals the first is taken
JOINT_CHOSEN = {"a": SECOND, "c": FIRST, "d": FIRST}
LEFT_OUT = {"a": "a-b", "c": "c", "d": "d"}


@dataclass
class Recorder:
    """Stands for all work of the cells, and writes down what it was asked for."""

    out: Path
    trained: dict[str, tuple[list[str], PretrainConfig]] = field(default_factory=dict)  # folder -> what
    tuned: list[tuple[str, FinetuneConfig, tuple[float, ...]]] = field(default_factory=list)
    diverges: str = "no folder"

    def steps(self) -> Steps:
        return Steps(self.pretrain, self.extractor, self.probe, self.finetune, self.own_head)

    def place(self, source: str) -> str:
        return str(Path(source).relative_to(self.out)) if source.startswith(str(self.out)) else source

    def pretrain(self, tasks: Sequence[Task], setting: PretrainConfig, folder: Path, resume: bool) -> Path:
        assert resume
        self.trained[self.place(str(folder))] = ([task.name for task in tasks], setting)
        if self.place(str(folder)) == self.diverges:
            raise TrainingDiverged("the loss is nan")
        return folder / "checkpoint.safetensors"

    def extractor(self, source: str, arch: str | None, seed: int, image_px: int | None) -> str:
        return f"{self.place(source)} of {arch}, seed {seed}, {image_px} px"

    def probe(
        self, extractor: str, task: Task, seed: int, precision: str, fit_on: tuple[str, ...], score_on: str
    ) -> ProbeResult:
        told = f"{extractor}: fit on {'+'.join(fit_on)}, scored on {score_on}, seed {seed}, {precision}"
        value = 0.5
        if score_on == "val":
            combination, of_seed = extractor.split(" of ")[0].split("/")[2:4]
            value = ON_VAL[task.name][combination][int(of_seed.removeprefix("seed-"))]
        return ProbeResult(task.name, told, task.metric, value, 1.0, {}, {}, True)

    def finetune(
        self, task: Task, setting: FinetuneConfig, folder: Path, rates: tuple[float, ...], resume: bool
    ) -> FinetuneResult:
        assert resume
        self.tuned.append((self.place(str(folder)), setting, rates))
        told = f"{self.place(setting.init)}, seed {setting.seed}"
        return FinetuneResult(
            task.name, told, task.metric, rates[0], 1, val=0.75, test=0.25, val_of_each_lr={}, outputs=()
        )

    def own_head(self, task: Task, source: str, split: str, precision: str) -> dict[str, Any]:  # type: ignore[explicit-any]
        first = FIRST.name in source
        score = JOINT_ON_VAL[task.name][0 if first else 1] if split == "val" else 0.5
        return {"score": score, "weights": f"{self.place(source)}: scored on {split}, {precision}"}


def network(subject: str, combination: Combination, seed: int) -> str:
    return f"pretrain/{subject}/{combination.name}/seed-{seed}"


def expected(cell: Cell) -> str:
    """What each cell must have used, as the paper says."""
    if cell.kind == "select":
        assert cell.combination is not None
        source = f"{network(LEFT_OUT[cell.subject], cell.combination, cell.seed)} of None"
        return f"{source}, seed {cell.seed}, 32 px: fit on train, scored on val, seed {cell.seed}, fp32"
    of_task = network(LEFT_OUT[cell.subject], CHOSEN[cell.subject], cell.seed)
    if cell.kind == "probe":
        source = {
            "mtl": f"{of_task} of None, seed {cell.seed}, 32 px",
            "start": "imagenet of resnet18, seed 0, 32 px",
            "random": f"random of resnet18, seed {cell.seed}, 32 px",
            "colour": "colour of None, seed 0, None px",
        }[cell.weights]
        return f"{source}: fit on train+val, scored on test, seed {cell.seed}, fp32"
    if cell.kind == "finetune":
        source = {
            "mtl": of_task,
            "start": "imagenet",
            "random": "random",
        }[cell.weights]
        return f"{source}, seed {cell.seed}"
    combination = cell.combination if cell.kind == "joint-select" else JOINT_CHOSEN[cell.subject]
    assert combination is not None
    split = "val" if cell.kind == "joint-select" else "test"
    return f"{network('joint', combination, cell.seed)}: scored on {split}, fp32"


@pytest.fixture
def recorded(tmp_path: Path) -> tuple[Protocol, Recorder]:
    tasks = (
        in_memory("a", leave_out_with=frozenset({"b"})),
        in_memory("b"),
        in_memory("c", 3),
        in_memory("d"),
        in_memory("e"),
    )
    for task in tasks:  # the settings hold the size of each file
        for sample in task.of(SPLITS):
            (tmp_path / sample.path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / sample.path).touch()
    placed = tuple(
        replace(
            task,
            samples={
                split: tuple(replace(sample, path=tmp_path / sample.path) for sample in samples)
                for split, samples in task.samples.items()
            },
        )
        for task in tasks
    )
    recorder = Recorder(tmp_path / "run")
    protocol = Protocol(placed, replace(GRID, init="imagenet"), tmp_path / "run", recorder.steps())
    run_protocol(protocol)
    return protocol, recorder


def test_every_cell_is_of_its_split_its_seed_its_combination_and_its_weights(
    recorded: tuple[Protocol, Recorder],
) -> None:
    protocol, _ = recorded
    cells = [cell for cell in protocol.cells() if cell.kind not in ("pretrain", "release")]
    kinds = {(cell.kind, cell.weights) for cell in cells}
    assert kinds == {
        ("select", "mtl"),
        *(("probe", weights) for weights in ("mtl", "start", "random", "colour")),
        *(("finetune", weights) for weights in ("mtl", "start", "random")),
        ("joint-select", "mtl"),
        ("joint-test", "mtl"),
    }
    for cell in cells:
        found = protocol.result(cell)
        assert found is not None
        assert found["weights"] == expected(cell), cell.name
        assert cell.kind != "finetune" or found["score"] == 0.25, "the score on test, not that on val"
    assert {cell.seed for cell in cells if (cell.kind, cell.weights) == ("finetune", "mtl")} == {0, 1}


def test_every_training_is_of_its_tasks_splits_seed_and_combination(recorded: tuple[Protocol, Recorder]) -> None:
    protocol, recorder = recorded
    left_out = {"a-b": {"a", "b"}, "c": {"c"}, "d": {"d"}, "joint": set()}
    wanted = {
        network(subject, combination, seed): (subject, combination, seed)
        for subject in left_out
        for combination in (FIRST, SECOND)
        for seed in (0, 1)
    }
    assert set(recorder.trained) == {*wanted, "release"}
    for folder, (subject, combination, seed) in wanted.items():
        names, setting = recorder.trained[folder]
        assert names == [name for name in "abcde" if name not in left_out[subject]], folder
        assert (setting.lr, setting.head_lr_multiplier, setting.warmup) == (combination.lr, 1.0, 0), folder
        assert (setting.seed, setting.init, setting.arch) == (seed, "imagenet", "resnet18"), folder
        assert (setting.iterations, setting.batch_size, setting.image_px) == (7, 4, 32), folder
        assert (setting.adaptation_batches, setting.precision, setting.warmup_lr) == (3, "fp32", 2e-3), folder
        for name in names:
            judged = subject == "joint" and name in ("a", "c", "d")
            assert setting.splits_of(name) == (("train",) if judged else ("train", "val")), (folder, name)
    names, setting = recorder.trained["release"]
    assert names == list("abcde")
    assert [setting.splits_of(name) for name in names] == [("train", "val", "test")] * 5
    assert (setting.lr, setting.seed) == (SECOND.lr, 0)  # ranks over all three tasks: 1.33 against 1.67
    found = protocol.result(protocol.cells()[-1])
    assert found is not None
    assert (found["checkpoint"], found["combination"]) == ("release/checkpoint.safetensors", SECOND.name)


def test_every_fine_tuning_is_of_its_rates_epochs_and_folder(recorded: tuple[Protocol, Recorder]) -> None:
    _, recorder = recorded
    folders = {folder for folder, _, _ in recorder.tuned}
    assert folders == {
        f"finetune/{task}/{weights}/seed-{seed}"
        for task in "ac"
        for weights in ("mtl", "start", "random")
        for seed in (0, 1)
    }
    for folder, setting, rates in recorder.tuned:
        assert rates == (1e-3, 1e-4), folder
        assert (setting.epochs, setting.batch_size, setting.image_px, setting.arch) == (5, 4, 32, "resnet18"), folder
        assert f"seed-{setting.seed}" == folder.split("/")[-1]


def test_a_training_that_diverged_is_judged_by_nobody_and_ranks_last(recorded: tuple[Protocol, Recorder]) -> None:
    """On c, the first seed of the second combination diverges: its mean is the worst, whatever the other seed is."""
    protocol, recorder = recorded
    recorder = Recorder(protocol.out.with_name("again"), diverges=network("c", SECOND, 0))
    protocol = replace(protocol, out=recorder.out, steps=recorder.steps())
    run_protocol(protocol)
    assert scores_on_val(protocol, "select")["c"] == {FIRST.name: pytest.approx(0.5), SECOND.name: float("-inf")}
    for cell in protocol.cells():
        found = protocol.result(cell)
        assert found is not None
        of_it = (cell.kind, cell.subject, cell.combination, cell.seed) == ("select", "c", SECOND, 0)
        assert (found.get("message") == "its pre-training diverged") == of_it, cell.name
        assert cell.kind in ("pretrain", "release") or (found["score"] is None) == of_it


def test_the_score_of_a_combination_is_the_mean_over_its_seeds(recorded: tuple[Protocol, Recorder]) -> None:
    protocol, _ = recorded
    means = scores_on_val(protocol, "select")
    for task, of_task in ON_VAL.items():
        assert means[task] == pytest.approx({name: sum(values) / 2 for name, values in of_task.items()})


def test_combinations_are_ranked_and_their_scores_not_averaged() -> None:
    scores = {"t": {"x": 0.9, "y": 0.1}, "u": {"x": 0.50, "y": 0.51}, "v": {"x": 0.50, "y": 0.51}}
    assert choose(scores) == "y"  # ranks 1, 2, 2 against 2, 1, 1; the mean scores say x


# --- the probe: every row ---------------------------------------------------------------------------------------------


@dataclass
class RecordingClassifier:
    """Its features are one number that names the row; the best C is the one that it is told."""

    best: float
    fits: list[tuple[tuple[int, ...], float, int]] = field(default_factory=list)
    scored: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)  # of which fit, on which rows

    def classifier(self) -> Classifier:
        return Classifier(self.fit, self.outputs)

    def fit(self, features: NDArray[np.float32], labels: NDArray[np.int64], c: float, seed: int) -> tuple[int, bool]:
        rows = tuple(int(value) for value in features[:, 0])
        assert labels.tolist() == features[:, 1].astype(int).tolist()
        self.fits.append((rows, c, seed))
        return len(self.fits) - 1, True

    def outputs(self, model: int, features: NDArray[np.float32], classes: int) -> NDArray[np.float64]:
        self.scored.append((model, tuple(int(value) for value in features[:, 0])))
        right = self.fits[model][1] == self.best
        labels = features[:, 1].astype(int)
        if classes == 2:
            return np.where(labels == 1, 1.0, -1.0) * (1.0 if right else -1.0)
        return (labels if right else (labels + 1) % classes).astype(np.float64)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize(("fit_on", "score_on"), [(("train", "val"), "test"), (("train",), "val")])
def test_c_is_chosen_and_the_fit_made_on_the_named_splits_alone(
    classes: int, fit_on: tuple[str, ...], score_on: str
) -> None:
    task = in_memory("t", classes)
    fit, held_out = task.of(fit_on), task.of((score_on,))
    samples = (*fit, *held_out)
    features = np.array([(row, sample.label) for row, sample in enumerate(samples)], np.float32)
    spy = RecordingClassifier(best=1e-4)
    result = judge_features(features, task, "numbers", 5, fit_on, score_on, spy.classifier())
    *of_folds, (rows, c, seed) = spy.fits
    assert (rows, c, seed) == (tuple(range(len(fit))), 1e-4, 5)
    assert spy.scored[-1] == (len(of_folds), tuple(range(len(fit), len(samples)))), "scored once, on what was held out"
    assert len(of_folds) == 5 * len(C_GRID) == 55
    for number, (fold, _, fold_seed) in enumerate(of_folds):
        model, held = spy.scored[number]
        assert (model, fold_seed) == (number, 5)
        assert sorted((*fold, *held)) == list(range(len(fit))), "every row that is fitted to, and no other"
        assert not {samples[row].group for row in fold} & {samples[row].group for row in held}, "a group is split"
    assert [fold_c for _, fold_c, _ in of_folds] == [c for c in C_GRID for _ in range(5)]
    assert (result.c, result.score, result.images) == (1e-4, 1.0, {"fit": len(fit), score_on: len(held_out)})
    assert result.cross_validation == {f"{c:g}": float(c == 1e-4) for c in C_GRID}
    assert len(result.outputs) == len(held_out)


def test_a_probe_computes_the_features_of_the_images_that_it_names(tmp_path: Path) -> None:
    """Each image has a grey of its own: it names the image in the features."""
    grey = 0
    wanted: dict[str, set[int]] = {}
    for split in SPLITS:
        for label in ("x", "y"):
            for number in range(4):
                grey += 5
                path = tmp_path / "task" / split / label / f"{split}{number}_{label}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (32, 32), (grey, grey, grey)).save(path)
                wanted.setdefault(split, set()).add(grey)
    rows: list[tuple[str, set[int]]] = []

    def fit(features: NDArray[np.float32], labels: NDArray[np.int64], c: float, seed: int) -> tuple[None, bool]:
        rows.append(("fit", {round(255 * float(value)) for value in features[:, 0]}))
        return None, True

    def outputs(model: None, features: NDArray[np.float32], classes: int) -> NDArray[np.float64]:
        rows.append(("score", {round(255 * float(value)) for value in features[:, 0]}))
        return np.zeros(len(features))

    probe_task(Colours(), load_task(tmp_path / "task"), classifier=Classifier(fit, outputs))
    assert rows[-2:] == [("fit", wanted["train"] | wanted["val"]), ("score", wanted["test"])]
    rows.clear()
    probe_task(
        Colours(), load_task(tmp_path / "task"), fit_on=("train",), score_on="val", classifier=Classifier(fit, outputs)
    )
    assert rows[-2:] == [("fit", wanted["train"]), ("score", wanted["val"])]
    assert not wanted["test"] & set().union(*(found for _, found in rows)), "a choice has seen the test split"


def test_a_probe_tells_how_sure_it_is_by_the_groups_of_test() -> None:
    """All images of three groups of seven are wrong."""
    task = in_memory("t", 3)
    test = task.of(("test",))
    labels = np.array([sample.label for sample in test])
    groups = tuple(sample.group for sample in test)
    outputs = tuple(float((s.label + (s.group < "test3")) % 3) for s in test)
    told = sureness(ProbeResult("t", "x", "accuracy", 4 / 7, 1.0, {}, {}, True, outputs), task)
    assert told["test_groups"] == 7
    assert told["interval"] == interval([outputs], Truth(labels, groups, "accuracy", 3))
    assert told["interval"][1] - told["interval"][0] > 0.6, "28 images, but 7 groups"
    right = np.array(outputs) == labels
    assert told["class_accuracies"] == {f"c{c}": pytest.approx(right[labels == c].mean()) for c in range(3)}
    assert told["balanced_accuracy"] == pytest.approx(np.mean(list(told["class_accuracies"].values())))


def test_the_svm_is_the_minimum_of_the_squared_hinge_loss() -> None:
    """Liblinear: |w|^2 / 2 (with the bias) + C * sum of max(0, 1 - y f)^2; at its minimum the gradient is zero."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 3)).astype(np.float32)
    y = (x[:, 0] + 0.7 * rng.normal(size=80) > 0).astype(np.int64)
    svm, converged = fit_svm(x, y, 0.05, 0)
    assert converged
    signs = 2.0 * y - 1
    margins = svm_outputs(svm, x, 2)
    slack = np.maximum(0, 1 - signs * margins)
    weights = np.append(svm.coef_[0], svm.intercept_[0])
    gradient = weights - 2 * 0.05 * (np.c_[x, np.ones(80)] * (signs * slack)[:, None]).sum(0)
    assert np.abs(gradient).max() < 1e-2 * np.abs(weights).max()
    assert len(np.unique(margins)) == 80, "margins, not classes: a ROC AUC needs their order"


def test_of_three_classes_the_outputs_are_classes_even_where_a_fold_has_two() -> None:
    x = np.array([[0.0], [0.1], [1.0], [1.1]], np.float32)
    svm, _ = fit_svm(x, np.array([0, 0, 2, 2]), 1.0, 0)
    assert set(svm_outputs(svm, x, 3)) <= {0.0, 2.0}


# --- fine-tuning: every epoch -----------------------------------------------------------------------------------------

TUNING = FinetuneConfig(
    arch="resnet18", init="random", epochs=4, batch_size=4, image_px=32, lr=1e-3, seed=7, precision="fp32"
)


@dataclass
class RecordingSteps:
    """Trains with the real batches, and gives scripted scores on whatever it is asked to score."""

    on_val: dict[float, tuple[float, ...]]  # learning rate -> score after each epoch
    rate: float = 0.0
    trained: list[tuple[tuple[Sample, ...], int, int, int]] = field(default_factory=list)
    scored: list[tuple[tuple[Sample, ...], torch.Tensor]] = field(default_factory=list)
    taken: int = 0
    precisions: list[str] = field(default_factory=list)

    def steps(self) -> FinetuneSteps:
        return FinetuneSteps(self.batches, self.scores)

    def batches(
        self, samples: Sequence[Sample], cache: ImageCache, *, seed: int, epoch: int, batch_size: int
    ) -> Iterator[Any]:
        self.trained.append((tuple(samples), seed, epoch, batch_size))
        for batch in epoch_batches(samples, cache, seed=seed, epoch=epoch, batch_size=batch_size):
            self.taken += 1
            yield batch

    def scores(
        self, net: MultiTaskNet, normalise: Any, head: str, samples: Sequence[Sample], cache: ImageCache, precision: str
    ) -> NDArray[np.float32]:
        self.scored.append((tuple(samples), net.heads[head].weight.detach().clone()))
        self.precisions.append(precision)
        rates = list(self.on_val)
        judged = len(self.scored) - 1
        epochs = len(self.on_val[rates[0]])
        wanted = self.on_val[rates[judged // epochs]][judged % epochs] if judged < epochs * len(rates) else 0.25
        right = round(wanted * len(samples))
        logits = np.zeros((len(samples), 3), np.float32)
        for row, sample in enumerate(samples):
            logits[row, sample.label if row < right else (sample.label + 1) % 3] = 1
        return logits


@pytest.fixture
def task(tmp_path: Path, make_task: Make) -> Task:
    return load_task(make_task(tmp_path / "colour", ("blue", "green", "red"), per_class=4))


def test_fine_tuning_learns_on_train_chooses_on_val_and_looks_at_test_once(task: Task, tmp_path: Path) -> None:
    spy = RecordingSteps({1e-3: (0.25, 0.5, 0.5, 0.25), 1e-4: (0.5, 0.75, 0.25, 0.75)})
    config = replace(TUNING, arch="timm:test_resnet")
    result = finetune_best(task, config, tmp_path / "run", (1e-3, 1e-4), quiet=True, steps=spy.steps())
    train, val, test = (task.samples[split] for split in SPLITS)
    assert [(samples, seed, epoch, size) for samples, seed, epoch, size in spy.trained] == [
        (train, 7, epoch, 4) for _ in range(2) for epoch in range(4)
    ]
    assert [samples for samples, _ in spy.scored] == [val] * 8 + [test]
    assert (result.lr, result.epoch, result.val, result.test) == (1e-4, 2, 0.75, 0.25)
    assert result.val_of_each_lr == {"0.001": 0.5, "0.0001": 0.75}
    kept = spy.scored[5][1]  # the second epoch of the second rate: the first of the two that were best
    assert spy.scored[-1][1].equal(kept), "another network was judged on test than the one that was chosen"
    assert load_checkpoint(tmp_path / "run")[0].heads["colour"].weight.equal(kept)
    assert not any(one[1].equal(other[1]) for one, other in pairwise(spy.scored[:8]))


def test_of_equal_rates_the_first_is_kept(task: Task, tmp_path: Path) -> None:
    spy = RecordingSteps({1e-4: (0.5, 0.25), 1e-3: (0.25, 0.5)})
    twice = replace(TUNING, arch="timm:test_resnet", epochs=2)
    assert finetune_best(task, twice, tmp_path / "run", (1e-4, 1e-3), quiet=True, steps=spy.steps()).lr == 1e-4


def test_the_seed_of_a_fine_tuning_decides_its_head_and_its_random_start(task: Task, tmp_path: Path) -> None:
    """A rate that moves nothing shows the start."""
    finetune(task, replace(TUNING, lr=1e-30, epochs=1), tmp_path / "run", quiet=True)
    net, _ = load_checkpoint(tmp_path / "run")
    backbone = build_backbone("resnet18")
    torch.manual_seed(7)
    wanted = MultiTaskNet(backbone, {task.name: task.classes})
    load_backbone_weights(backbone, "resnet18", "random", 7)
    assert net.heads["colour"].weight.equal(wanted.heads["colour"].weight)
    assert net.backbone.state_dict()["trunk.conv1.weight"].equal(backbone.state_dict()["trunk.conv1.weight"])


def test_fine_tuning_adapts_batch_norm_on_train_by_as_many_batches_as_asked(task: Task, tmp_path: Path) -> None:
    torch.save(build_backbone("resnet18").trunk.state_dict(), tmp_path / "start.pth")
    spy = RecordingSteps({1e-3: (0.5,)})
    config = replace(TUNING, init=str(tmp_path / "start.pth"), epochs=1, adaptation_batches=2)
    finetune(task, config, tmp_path / "run", quiet=True, steps=spy.steps())
    assert [(samples, seed, epoch) for samples, seed, epoch, _ in spy.trained] == [
        (task.samples["train"], 7, ADAPTATION_EPOCH),
        (task.samples["train"], 7, 0),
    ]
    assert spy.taken == 2 + 3  # 12 images in batches of 4


def test_fine_tuning_from_random_weights_adapts_nothing_and_is_judged_at_its_precision_and_seed(
    task: Task, tmp_path: Path
) -> None:
    spy = RecordingSteps({1e-3: (0.5,)})
    config = replace(TUNING, arch="timm:test_resnet", precision="bf16", epochs=1, adaptation_batches=2)
    finetune_best(task, config, tmp_path / "run", (1e-3,), quiet=True, steps=spy.steps())
    assert [epoch for _, _, epoch, _ in spy.trained] == [0]
    assert spy.precisions == ["bf16", "bf16"], "on val, and on test"
    torch.manual_seed(7)  # of what a backbone draws itself, such as dropout; this one draws nothing
    assert load_file(tmp_path / "run" / "lr-0.001" / "state.safetensors")["rng"].equal(torch.get_rng_state())


def test_a_head_is_scored_in_eval_mode_whatever_the_mode_of_the_network(task: Task) -> None:
    torch.manual_seed(0)
    net = MultiTaskNet(build_backbone("resnet18"), {"colour": task.classes})
    normalise = Normalise(Preprocessing(image_px=32))
    samples = task.of(("val",))[:5]
    cache = ImageCache(32, 0)
    alone = [head_scores(net.eval(), normalise, "colour", [sample], cache, "fp32")[0] for sample in samples]
    net.train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    together = head_scores(net, normalise, "colour", samples, cache, "fp32")
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)  # in train mode, others would decide
    assert all(value.equal(before[name]) for name, value in net.state_dict().items())


def test_features_are_taken_in_eval_mode(task: Task, tmp_path: Path, pool_file: Path) -> None:
    config = PretrainConfig(
        "resnet18", "random", 1, 0, lr=1e-3, head_lr_multiplier=1.0, batch_size=4, image_px=32, precision="fp32"
    )
    pretrain([task], config, tmp_path / "pre", quiet=True)
    samples = task.of(("val",))[:4]
    for source, arch in ((str(tmp_path / "pre"), None), ("random", "resnet18")):
        extractor = load_extractor(source, arch, image_px=32)
        assert isinstance(extractor, Extractor)
        assert not any(module.training for module in extractor.backbone.modules())
        together = extract_features(extractor, samples, "fp32")
        alone = [extract_features(extractor, [sample], "fp32")[0] for sample in samples]
        np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)


def test_a_network_sees_images_as_its_checkpoint_states_wherever_it_is_judged(tmp_path: Path, make_task: Make) -> None:
    """A side, a mean, a deviation and an interpolation that nothing has by default."""
    task = load_task(make_task(tmp_path / "colour", per_class=2))
    stated = Preprocessing(48, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "lanczos")
    net = MultiTaskNet(build_backbone("timm:test_resnet"), {"colour": task.classes}).eval()
    init = WeightsOrigin("random", "by chance", "none", None).to_json()
    info = CheckpointInfo("timm:test_resnet", net.class_names, stated, {"config": {}, "init": init, "tasks": {}}, 1)
    (tmp_path / "run" / "lr-0.001").mkdir(parents=True)
    save_checkpoint(tmp_path / "run" / "lr-0.001" / "checkpoint.safetensors", net, info)
    test, run = task.of(("test",)), str(tmp_path / "run" / "lr-0.001")
    images = [load_image(sample.path, 48, "lanczos") for sample in test]
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (stated.mean, stated.std))
    with torch.no_grad():
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255
        features = net.backbone((pixels - mean) / std)
        logits = net.heads["colour"](features)
    margins = (logits[:, 1] - logits[:, 0]).numpy()
    near: dict[str, float] = {"rtol": 1e-3, "atol": 1e-5}
    np.testing.assert_allclose(extract_features(load_extractor(run), test, "fp32"), features.numpy(), **near)
    np.testing.assert_allclose(score_own_head(task, run, "test", "fp32")["outputs"], margins, **near)
    config = replace(TUNING, arch="timm:test_resnet")
    tuned = _judged_on_test(task, config, tmp_path / "run", {1e-3: (0.5, 1)}, FinetuneSteps())
    np.testing.assert_allclose(tuned.outputs, margins, **near)


def test_random_features_are_those_of_their_seed() -> None:
    for seed in (0, 3):
        extractor = load_extractor("random", "resnet18", seed)
        assert isinstance(extractor, Extractor)
        torch.manual_seed(seed)
        wanted = build_backbone("resnet18").state_dict()["trunk.conv1.weight"]
        assert extractor.backbone.state_dict()["trunk.conv1.weight"].equal(wanted)


# --- pre-training: every batch ----------------------------------------------------------------------------------------


def test_pre_training_draws_from_the_named_splits_of_every_task(task: Task, tmp_path: Path, make_task: Make) -> None:
    other = load_task(make_task(tmp_path / "other", ("blue", "red"), per_class=4))
    torch.save(build_backbone("resnet18").trunk.state_dict(), tmp_path / "start.pth")
    calls: list[dict[str, Any]] = []  # type: ignore[explicit-any]
    taken = {ADAPTATION: 0, TRAINING: 0}

    def recording(data: Sequence[Sequence[Sample]], cache: ImageCache, **options: Any) -> Iterator[Any]:
        calls.append({"data": [tuple(samples) for samples in data], **options})
        for batch in batches(data, cache, **options):
            taken[options["stream"]] += 1
            yield batch

    config = PretrainConfig(
        arch="resnet18",
        init=str(tmp_path / "start.pth"),
        iterations=3,
        warmup=1,
        lr=1e-4,
        head_lr_multiplier=1.0,
        batch_size=5,
        image_px=32,
        seed=9,
        precision="fp32",
        train_only=("other",),
        adaptation_batches=4,
    )
    pretrain([task, other], config, tmp_path / "run", quiet=True, steps=PretrainSteps(recording))
    data = [task.of(("train", "val")), other.of(("train",))]
    same = {"data": data, "seed": 9, "batch_size": 5, "part": slice(None)}
    assert calls[0] == {**same, "stream": ADAPTATION, "iterations": range(4)}
    assert calls[1] == {**same, "stream": TRAINING, "iterations": range(3), "part": slice(0, None, 1)}
    assert taken == {ADAPTATION: 4, TRAINING: 3}
    told = load_checkpoint(tmp_path / "run")[1].training["tasks"]
    assert {name: facts["images"] for name, facts in told.items()} == {"colour": 24, "other": 8}
    del calls[:]
    longer = replace(config, iterations=4)
    pretrain([task, other], longer, tmp_path / "run", resume=True, quiet=True, steps=PretrainSteps(recording))
    assert [(call["stream"], call["iterations"]) for call in calls] == [(TRAINING, range(3, 4))], "adapted once"


# --- what is shown, averaged, and seen --------------------------------------------------------------------------------


def test_every_column_of_the_table_shows_its_own_cells(recorded: tuple[Protocol, Recorder]) -> None:
    """Each cell gets a score that names its kind, its weights, its task and its seed."""
    protocol, _ = recorded
    kinds = {"finetune": 0.1, "probe": 0.2, "joint-test": 0.3, "joint-select": 0.4, "select": 0.5}
    weights = {"random": 0.01, "start": 0.02, "mtl": 0.03, "colour": 0.04}
    tasks = {"a": 0.001, "c": 0.003, "d": 0.004}
    for cell in protocol.cells():
        if cell.kind not in ("pretrain", "release"):
            value = kinds[cell.kind] + weights[cell.weights] + tasks[cell.subject] + cell.seed / 10_000
            write_json(protocol.result_path(cell), {"score": value, "combination": None})
    for row in collect(protocol):
        for column, kind, of in (
            ("Scratch", "finetune", "random"),
            ("FE colour", "probe", "colour"),
            ("FE random", "probe", "random"),
            ("FE start", "probe", "start"),
            ("FE MTL", "probe", "mtl"),
            ("FT start", "finetune", "start"),
            ("FT MTL", "finetune", "mtl"),
            ("Joint", "joint-test", "mtl"),
        ):
            once = of in ("colour", "start") and kind == "probe"
            tuned = kind != "finetune" or row.task in ("a", "c")
            seeds = (0,) if once else (0, 1)
            wanted = [kinds[kind] + weights[of] + tasks[row.task] + seed / 10_000 for seed in seeds] if tuned else []
            assert row.scores[column] == pytest.approx(wanted), (row.task, column)
        assert row.train_images == 56
        assert (row.test_images, row.test_groups) == (28, 7)


def test_the_score_of_a_c_is_the_mean_over_the_folds() -> None:
    """One C is perfect in two folds of five, another right in four images of five everywhere."""
    labels = np.tile([0, 1, 2], 25).astype(np.int64)
    groups = [f"g{row // 15}" for row in range(75)]
    fold_of: list[int] = []

    def fit(features: NDArray[np.float32], labels: NDArray[np.int64], c: float, seed: int) -> tuple[float, bool]:
        return c, True

    def outputs(c: float, features: NDArray[np.float32], classes: int) -> NDArray[np.float64]:
        held = labels[features[:, 0].astype(int)]
        fold_of.append(int(features[0, 0]) // 15)
        wrong = (held + 1) % classes
        if c == 1e-2:
            return np.where(np.arange(len(held)) % 5 < 4, held, wrong).astype(np.float64)
        return (held if c == 1e-3 and fold_of[-1] < 2 else wrong).astype(np.float64)

    features = np.arange(75, dtype=np.float32)[:, None]
    scores = cross_validate(features, labels, groups, "accuracy", classifier=Classifier(fit, outputs))
    assert scores[1e-3] == pytest.approx(0.4)
    assert scores[1e-2] == pytest.approx(0.8)
    assert set(fold_of) == set(range(5))


def test_a_head_sees_the_central_square_and_training_the_square_that_was_drawn(tmp_path: Path, make_task: Make) -> None:
    task = load_task(make_task(tmp_path / "tall", ("blue", "red"), per_class=4, height=57))  # 40 x 57 pixels
    cache = ImageCache(32, 0)
    samples = task.of(("train",))
    choice = draw_epoch(5, 2, len(samples), 4)[1]
    batch = list(epoch_batches(samples, cache, seed=5, epoch=2, batch_size=4))[1]
    for row in range(4):
        sample = samples[choice.images[row]]
        image = load_image(sample.path, 32)
        top = int(choice.offsets[row] * (image.shape[0] - 32 + 1))
        view = image[top : top + 32]
        view = view[:, ::-1] if choice.flips[row, 0] else view
        view = view[::-1] if choice.flips[row, 1] else view
        np.testing.assert_array_equal(batch.images[row].numpy(), view)
        assert int(batch.labels[row]) == sample.label
    net = MultiTaskNet(build_backbone("resnet18"), {"tall": task.classes}).eval()
    found = head_scores(net, Normalise(Preprocessing(image_px=32)), "tall", samples[:3], cache, "fp32")
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for row, sample in enumerate(samples[:3]):
        image = load_image(sample.path, 32)
        top = (image.shape[0] - 32) // 2
        square = torch.from_numpy(image[top : top + 32].copy()).permute(2, 0, 1)[None] / 255
        with torch.no_grad():
            wanted = net((square - mean) / std)["tall"][0]
        np.testing.assert_allclose(found[row], wanted.numpy(), rtol=1e-3, atol=1e-4)
