"""Running the cells of a protocol, one after the other, in one process or in several that share a folder."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import torch

from mtdp.checkpoint import load_checkpoint
from mtdp.devices import best_device, choose_precision
from mtdp.errors import CheckpointError, Interrupted, TrainingDiverged
from mtdp.finetune import FinetuneResult, finetune_best
from mtdp.images import ImageCache
from mtdp.preprocess import Normalise
from mtdp.pretrain import pretrain
from mtdp.pretrain_config import PretrainConfig, resolve
from mtdp.protocol.cells import JOINT, Cell, judgement_cells, phases, selection_cells, set_name
from mtdp.protocol.config import Combination, ProtocolConfig, evaluated_tasks, finetuned_tasks, left_out_sets
from mtdp.protocol.ranking import choose
from mtdp.protocol.settings import check_runnable, hold_to_settings
from mtdp.run_state import RunState, takes_lock, write_json
from mtdp.scores import head_scores, labels_of, outputs_of, score
from mtdp.tasks import SPLITS, Task
from mtdp.transfer import ProbeResult, load_extractor, probe_task
from mtdp.weights import CHECKPOINT_NAME, STATE_NAME

WAIT_S = 5.0
AGAIN: Final = "give the same command again: it goes on from there"


def score_own_head(task: Task, source: str, split: str, precision: str) -> dict[str, Any]:
    """How the head that a joint training gave a task does on one of the task's splits."""
    net, info = load_checkpoint(source)
    device = best_device()
    net.to(device).to(memory_format=torch.channels_last)
    samples = task.of((split,))
    logits = head_scores(
        net,
        Normalise(info.preprocessing).to(device),
        task.name,
        samples,
        ImageCache(info.preprocessing.image_px, 0, info.preprocessing.interpolation),
        choose_precision(precision, device),
    )
    return {
        "score": score(logits, labels_of(samples), task.metric),
        "metric": task.metric,
        "weights": source,
        "outputs": outputs_of(logits).tolist(),
    }


@dataclass(frozen=True, slots=True)
class Steps:
    """The work of the cells: an argument, so that which data, seeds and weights reach which step can be recorded."""

    pretrain: Callable[..., Path] = field(default_factory=lambda: pretrain)
    extractor: Callable[..., Any] = field(default_factory=lambda: load_extractor)
    probe: Callable[..., ProbeResult] = field(default_factory=lambda: probe_task)
    finetune: Callable[..., FinetuneResult] = field(default_factory=lambda: finetune_best)
    own_head: Callable[..., dict[str, Any]] = field(default_factory=lambda: score_own_head)


def quiet_steps(quiet: bool) -> Steps:
    """The work itself, with or without its progress on stderr."""
    if not quiet:
        return Steps()
    return Steps(pretrain=partial(pretrain, quiet=True), finetune=partial(finetune_best, quiet=True))


@dataclass(frozen=True, slots=True)
class Protocol:
    """A pool, what to compute of it, and the folder of the results."""

    tasks: tuple[Task, ...]
    config: ProtocolConfig
    out: Path
    steps: Steps = field(default_factory=Steps)

    @property
    def evaluated(self) -> tuple[Task, ...]:
        return evaluated_tasks(self.tasks, self.config)

    @property
    def finetuned(self) -> tuple[Task, ...]:
        return finetuned_tasks(self.evaluated, self.config)

    @property
    def sets(self) -> tuple[tuple[str, ...], ...]:
        return left_out_sets(self.tasks, self.evaluated)

    def phases(self) -> list[list[Cell]]:
        """All cells, in the order in which they run."""
        return phases(
            selection_cells(self.sets, self.evaluated, self.config),
            judgement_cells(self.evaluated, self.finetuned, self.config),
            self.config,
        )

    def cells(self) -> list[Cell]:
        """All cells, in the order in which they run."""
        return [cell for phase in self.phases() for cell in phase]

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
    """Compute every missing cell; return when all are there.

    Several processes may run on one folder, for example one for each GPU: a cell is locked while it is computed, and a
    lock ends with its process.

    Raises:
        UsageError: the folder holds a run of other settings, or this one could not be run to its end.
        MtdpError: what a training or an evaluation raises; the cells that were done stay.
    """
    check_runnable(protocol.tasks, protocol.config)
    hold_to_settings(protocol.tasks, protocol.config, protocol.out)
    for phase in protocol.phases():
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
    """The combination that judges a task: of the best average rank over the other tasks.

    Of joint training, the one that does best on the task's own val, which was not trained on (paper: baselines); of
    equals the first.
    """
    combinations = protocol.config.combinations()
    if len(combinations) == 1:
        return combinations[0]
    if joint:
        on_val = scores_on_val(protocol, "joint-select")[task]
        name = max(on_val, key=lambda combination: on_val[combination])
    else:
        name = choose(scores_on_val(protocol, "select"), task)
    return next(combination for combination in combinations if combination.name == name)


def chosen_overall(protocol: Protocol) -> Combination:
    """The combination of the best average rank over all evaluated tasks: that of the network to give away."""
    combinations = protocol.config.combinations()
    if len(combinations) == 1:
        return combinations[0]
    name = choose(scores_on_val(protocol, "select"))
    return next(combination for combination in combinations if combination.name == name)


def _run_cells(protocol: Protocol, cells: Sequence[Cell], say: Callable[[str], None]) -> None:
    missing = [cell for cell in cells if protocol.result(cell) is None]
    waited = False
    while missing:
        progress = False
        for cell in missing:
            needed = training_needed(protocol, cell)
            if needed is not None and protocol.result(needed) is None:
                continue  # its own process may still be at it

            def begins(name: str = cell.name, missing: Sequence[Cell] = tuple(missing)) -> None:
                left = sum(protocol.result(other) is None for other in missing)
                say(f"[{len(cells) - left + 1}/{len(cells)}] {name}")

            progress |= compute_cell(protocol, cell, begins)
        missing = [cell for cell in missing if protocol.result(cell) is None]
        if missing and not progress:
            if not waited:
                say(f"waiting for {len(missing)} cells that another process computes")
            waited = True
            time.sleep(WAIT_S)


def compute_cell(protocol: Protocol, cell: Cell, begins: Callable[[], None] = lambda: None) -> bool:
    """Compute a cell and write its result, unless that is there; `begins` is called before the work.

    Returns:
        Whether the result is there; else another process computes it.
    """
    with _lock(protocol.out / "locks" / f"{cell.name.replace('/', ' ')}.lock") as mine:
        if mine and protocol.result(cell) is None:
            begins()
            start_s = time.monotonic()
            found = _computed(protocol, cell)
            write_json(protocol.result_path(cell), {**found, "seconds": round(time.monotonic() - start_s, 1)})
        return mine


def training_needed(protocol: Protocol, cell: Cell) -> Cell | None:
    """The cell of the same phase that must be done before this one: the training of its network."""
    if cell.kind in ("pretrain", "release") or cell.weights != "mtl":
        return None
    combinations = protocol.config.combinations()
    if cell.combination is None and len(combinations) > 1:
        return None  # judged after the choice, for which all are trained
    return _training_of(protocol, cell, cell.combination or combinations[0])


def _training_of(protocol: Protocol, cell: Cell, combination: Combination) -> Cell:
    if cell.kind in ("joint-select", "joint-test"):
        return Cell("pretrain", JOINT, "mtl", combination, cell.seed)
    left_out = next(names for names in protocol.sets if cell.subject in names)
    return Cell("pretrain", set_name(left_out), "mtl", combination, cell.seed)


def training_folder(protocol: Protocol, cell: Cell) -> Path:
    """The run folder of a pre-training cell."""
    assert cell.combination is not None
    return protocol.out / "pretrain" / cell.subject / cell.combination.name / f"seed-{cell.seed}"


def _computed(protocol: Protocol, cell: Cell) -> dict[str, Any]:
    """What a cell finds. That its network diverged is a result, too: computed again, it would diverge again."""
    try:
        return _compute(protocol, cell)
    except TrainingDiverged as error:
        if cell.kind in ("pretrain", "release"):
            return {"diverged": True, "message": error.message}
        combination = cell.combination
        if combination is None and cell.weights == "mtl":
            combination = chosen(protocol, cell.subject, joint=cell.kind == "joint-test")
        return _without_score(combination, error.message)
    except Interrupted as error:
        raise Interrupted(error.signum, error.message, AGAIN) from error
    except KeyboardInterrupt:
        raise Interrupted(signal.SIGINT, f"stopped in {cell.name}", AGAIN) from None


def _without_score(combination: Combination | None, message: str) -> dict[str, Any]:
    name = combination.name if combination else None
    return {"score": None, "combination": name, "diverged": True, "message": message}


def _compute(protocol: Protocol, cell: Cell) -> dict[str, Any]:
    if cell.kind == "pretrain":
        return _pretrain(protocol, cell)
    if cell.kind == "release":
        return _release(protocol)
    task = next(task for task in protocol.tasks if task.name == cell.subject)
    config, steps = protocol.config, protocol.steps
    source: str = config.init if cell.weights == "start" else cell.weights
    combination = cell.combination
    if cell.weights == "mtl":
        combination = combination or chosen(protocol, cell.subject, joint=cell.kind == "joint-test")
        training = _training_of(protocol, cell, combination)
        if (protocol.result(training) or {}).get("diverged"):
            return _without_score(combination, "its pre-training diverged")
        source = str(training_folder(protocol, training))
    facts = {"task": task.name, "combination": combination.name if combination else None}
    if cell.kind == "finetune":
        return {**facts, **_finetune(protocol, cell, task, source)}
    if cell.kind in ("joint-select", "joint-test"):
        split = "val" if cell.kind == "joint-select" else "test"
        return {**facts, **steps.own_head(task, source, split, config.precision)}
    named = config.arch if cell.weights in ("start", "random") else None
    extractor = steps.extractor(source, named, cell.seed, None if cell.weights == "colour" else config.image_px)
    on_val = cell.kind == "select"
    result = steps.probe(
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
    setting = protocol.config.pretraining(cell.combination, cell.seed, train_only)
    return _trained_network(protocol, tasks, setting, training_folder(protocol, cell))


def _release(protocol: Protocol) -> dict[str, Any]:
    """Paper: the published networks were trained once more, on all images of all tasks."""
    combination = chosen_overall(protocol)
    setting = protocol.config.pretraining(combination, 0, splits=SPLITS)
    found = _trained_network(protocol, protocol.tasks, setting, protocol.out / "release")
    return {**found, "combination": combination.name}


def _trained_network(
    protocol: Protocol, tasks: Sequence[Task], setting: PretrainConfig, folder: Path
) -> dict[str, Any]:
    checkpoint = folder / CHECKPOINT_NAME
    if not _trained(folder, setting):
        checkpoint = protocol.steps.pretrain(tasks, setting, folder, resume=True)
        (folder / STATE_NAME).unlink(missing_ok=True)  # twice the network's size, for each of hundreds of cells
    return {"checkpoint": str(checkpoint.relative_to(protocol.out)), "tasks": [task.name for task in tasks]}


def _trained(folder: Path, setting: PretrainConfig) -> bool:
    """Whether the training itself is done, though its cell has no result."""
    if (folder / STATE_NAME).is_file() or not (folder / CHECKPOINT_NAME).is_file():
        return False
    _, info = load_checkpoint(folder)
    resolve(setting, RunState({}, info.to_json()), best_device())  # refuses one of another setting
    return info.iteration == setting.iterations


def _finetune(protocol: Protocol, cell: Cell, task: Task, source: str) -> dict[str, Any]:
    config = protocol.config
    setting = config.finetuning(source, cell.seed, config.finetune_lrs[0])
    folder = protocol.out / "finetune" / cell.subject / cell.weights / f"seed-{cell.seed}"
    result = protocol.steps.finetune(task, setting, folder, config.finetune_lrs, resume=True)
    return {**asdict(result), "score": result.test}


@contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Whether this process now holds the lock; it ends with the process, however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        yield takes_lock(file)


def to_stderr(text: str) -> None:
    """Print a line to stderr at once."""
    print(text, file=sys.stderr, flush=True)
