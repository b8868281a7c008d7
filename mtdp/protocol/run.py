"""Running the cells of a protocol, one after the other, in one process or in several that share a folder."""

import fcntl
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import torch

from mtdp.checkpoint import load_checkpoint
from mtdp.devices import best_device, choose_precision
from mtdp.errors import CheckpointError, TrainingDiverged, UsageError
from mtdp.finetune import FinetuneConfig, finetune_best
from mtdp.images import ImageCache
from mtdp.preprocess import Normalise
from mtdp.pretrain import pretrain
from mtdp.protocol.cells import JOINT, Cell, judgement_cells, selection_cells, set_name
from mtdp.protocol.config import Combination, ProtocolConfig, evaluated_tasks, finetuned_tasks, left_out_sets
from mtdp.protocol.ranking import choose
from mtdp.run_state import write_json
from mtdp.scores import head_scores, labels_of, score
from mtdp.tasks import Task
from mtdp.transfer import load_extractor, probe_task

WAIT_S = 5.0
# What may change from one run to the next: it adds cells, and leaves those that are there true.
MAY_GROW: Final = ("finetune", "scratch", "joint")
# These would change which combination is chosen, so they may change only where there is no choice.
MAY_GROW_WITHOUT_CHOICE: Final = ("seeds", "evaluate")


@dataclass(frozen=True, slots=True)
class Protocol:
    """A pool, what to compute of it, and the folder of the results."""

    tasks: tuple[Task, ...]
    config: ProtocolConfig
    out: Path

    @property
    def evaluated(self) -> tuple[Task, ...]:
        return evaluated_tasks(self.tasks, self.config)

    @property
    def finetuned(self) -> tuple[Task, ...]:
        return finetuned_tasks(self.evaluated, self.config)

    @property
    def sets(self) -> tuple[tuple[str, ...], ...]:
        return left_out_sets(self.tasks, self.evaluated)

    def cells(self) -> list[Cell]:
        """All cells, in the order in which they run."""
        return [
            *selection_cells(self.sets, self.evaluated, self.config),
            *judgement_cells(self.evaluated, self.finetuned, self.config),
        ]

    def result_path(self, cell: Cell) -> Path:
        return self.out / "cells" / f"{cell.name}.json"

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """What a cell found; None while it is missing."""
        try:
            found: dict[str, Any] = json.loads(self.result_path(cell).read_text("utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise CheckpointError(
                f"{self.result_path(cell)} is damaged: {error}", "delete it: the cell is computed again"
            ) from error
        return found


def run_protocol(protocol: Protocol, say: Callable[[str], None] = lambda text: None) -> None:
    """Computes every missing cell; returns when all are there.

    Several processes may run on one folder, for example one for each GPU: a cell is locked while it is computed, and a
    lock ends with its process.

    Raises:
        UsageError: the folder holds a run of other settings.
        MtdpError: what a training or an evaluation raises; the cells that were done stay.
    """
    _hold_to_config(protocol)
    for phase in (
        selection_cells(protocol.sets, protocol.evaluated, protocol.config),
        judgement_cells(protocol.evaluated, protocol.finetuned, protocol.config),
    ):
        _run_cells(protocol, phase, say)


def scores_on_val(protocol: Protocol, kind: str) -> dict[str, dict[str, float]]:
    """Task -> combination -> mean score on val over the seeds; a training that diverged ranks last."""
    table: dict[str, dict[str, float]] = {}
    of_kind: dict[tuple[str, str], list[float]] = {}
    for cell in selection_cells(protocol.sets, protocol.evaluated, protocol.config):
        if cell.kind == kind and cell.combination is not None:
            found = protocol.result(cell)
            assert found is not None
            value = float("-inf") if found["score"] is None else float(found["score"])
            of_kind.setdefault((cell.subject, cell.combination.name), []).append(value)
    for (task, combination), values in of_kind.items():
        table.setdefault(task, {})[combination] = fmean(values)
    return table


def chosen(protocol: Protocol, task: str, joint: bool = False) -> Combination:
    """The combination that judges a task: of the best average rank over the other tasks."""
    combinations = protocol.config.combinations()
    if len(combinations) == 1:
        return combinations[0]
    name = choose(scores_on_val(protocol, "joint-select" if joint else "select"), task)
    return next(combination for combination in combinations if combination.name == name)


def _run_cells(protocol: Protocol, cells: Sequence[Cell], say: Callable[[str], None]) -> None:
    missing = [cell for cell in cells if protocol.result(cell) is None]
    waited = False
    while missing:
        progress = False
        for cell in missing:
            if not _ready(protocol, cell):
                continue
            with _lock(protocol.out / "locks" / f"{cell.name.replace('/', ' ')}.lock") as mine:
                if not mine or protocol.result(cell) is not None:
                    continue
                left = sum(protocol.result(other) is None for other in missing)
                say(f"[{len(cells) - left + 1}/{len(cells)}] {cell.name}")
                start_s = time.monotonic()
                found = _compute(protocol, cell)
                write_json(protocol.result_path(cell), {**found, "seconds": round(time.monotonic() - start_s, 1)})
                progress = True
        missing = [cell for cell in missing if protocol.result(cell) is None]
        if missing and not progress:
            if not waited:
                say(f"waiting for {len(missing)} cells that another process computes")
            waited = True
            time.sleep(WAIT_S)


def _ready(protocol: Protocol, cell: Cell) -> bool:
    """Whether the network that a cell needs is trained; its own process may still be at it."""
    if cell.kind in ("select", "joint-select"):
        assert cell.combination is not None
        return protocol.result(_training_of(protocol, cell, cell.combination)) is not None
    return True


def _training_of(protocol: Protocol, cell: Cell, combination: Combination) -> Cell:
    if cell.kind in ("joint-select", "joint-test"):
        return Cell("pretrain", JOINT, "mtl", combination, cell.seed)
    left_out = next(names for names in protocol.sets if cell.subject in names)
    return Cell("pretrain", set_name(left_out), "mtl", combination, cell.seed)


def training_folder(protocol: Protocol, cell: Cell) -> Path:
    """The run folder of a pre-training cell."""
    assert cell.combination is not None
    return protocol.out / "pretrain" / cell.subject / cell.combination.name / f"seed-{cell.seed}"


def _compute(protocol: Protocol, cell: Cell) -> dict[str, Any]:
    if cell.kind == "pretrain":
        return _pretrain(protocol, cell)
    task = next(task for task in protocol.tasks if task.name == cell.subject)
    config = protocol.config
    source: str = "random" if cell.weights == "random" else config.init
    combination = cell.combination
    if cell.weights == "mtl":
        combination = combination or chosen(protocol, cell.subject, joint=cell.kind == "joint-test")
        training = _training_of(protocol, cell, combination)
        if (protocol.result(training) or {}).get("diverged"):
            return {"score": None, "combination": combination.name, "diverged": True}
        source = str(training_folder(protocol, training))
    facts = {"task": task.name, "combination": combination.name if combination else None}
    if cell.kind == "finetune":
        return {**facts, **_finetune(protocol, cell, task, source)}
    if cell.kind in ("joint-select", "joint-test"):
        return {**facts, **_score_own_head(protocol, task, source, "val" if cell.kind == "joint-select" else "test")}
    named = config.arch if cell.weights != "mtl" else None
    extractor = load_extractor(source, named, cell.seed, config.image_px)
    on_val = cell.kind == "select"
    result = probe_task(
        extractor,
        task,
        cell.seed,
        config.precision,
        fit_on=("train",) if on_val else ("train", "val"),
        score_on="val" if on_val else "test",
    )
    return {**asdict(result), **facts}


def _pretrain(protocol: Protocol, cell: Cell) -> dict[str, Any]:
    assert cell.combination is not None
    joint = cell.subject == JOINT
    left_out = () if joint else next(names for names in protocol.sets if set_name(names) == cell.subject)
    train_only = tuple(task.name for task in protocol.evaluated) if joint else ()
    tasks = [task for task in protocol.tasks if task.name not in left_out]
    folder = training_folder(protocol, cell)
    try:
        checkpoint = pretrain(
            tasks, protocol.config.pretraining(cell.combination, cell.seed, train_only), folder, resume=True
        )
    except TrainingDiverged as error:
        return {"diverged": True, "message": error.message}
    return {"checkpoint": str(checkpoint.relative_to(protocol.out)), "tasks": [task.name for task in tasks]}


def _finetune(protocol: Protocol, cell: Cell, task: Task, source: str) -> dict[str, Any]:
    config = protocol.config
    setting = FinetuneConfig(
        arch=config.arch,
        init=source,
        epochs=config.finetune_epochs,
        batch_size=config.batch_size,
        image_px=config.image_px,
        seed=cell.seed,
        precision=config.precision,
    )
    folder = protocol.out / "finetune" / cell.subject / cell.weights / f"seed-{cell.seed}"
    result = finetune_best(task, setting, folder, config.finetune_lrs, resume=True)
    return {**asdict(result), "score": result.test}


def _score_own_head(protocol: Protocol, task: Task, source: str, split: str) -> dict[str, Any]:
    net, info = load_checkpoint(source)
    device = best_device()
    net.to(device).to(memory_format=torch.channels_last)
    samples = task.of((split,))
    logits = head_scores(
        net,
        Normalise(info.preprocessing).to(device),
        task.name,
        samples,
        ImageCache(info.preprocessing.image_px, budget_bytes=0),
        choose_precision(protocol.config.precision, device),
    )
    return {"score": score(logits, labels_of(samples), task.metric), "metric": task.metric, "weights": source}


def _hold_to_config(protocol: Protocol) -> None:
    """Writes the settings at the first run, and refuses others later: cells of two settings make no table."""
    path = protocol.out / "protocol.json"
    now = json.loads(json.dumps(asdict(protocol.config)))
    now["tasks"] = {task.name: task.summary(("train", "val", "test")) for task in protocol.tasks}
    try:
        protocol.out.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            before = json.loads(path.read_text("utf-8"))
            choice = len(protocol.config.combinations()) > 1
            free = MAY_GROW if choice else (*MAY_GROW, *MAY_GROW_WITHOUT_CHOICE)
            changed = sorted(name for name in now if name not in free and now[name] != before.get(name))
            if changed:
                raise UsageError(
                    f"{protocol.out} holds a run of other settings: {', '.join(changed)}",
                    "give the same options and pool, or another --out",
                )
        write_json(path, now)
    except OSError as error:
        raise UsageError(f"{protocol.out} cannot be written: {error}", "give another --out") from error


@contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Whether this process now holds the lock; it ends with the process, however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
