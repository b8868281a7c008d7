"""Whether a protocol can be run to its end, and whether a folder's cells are of the same protocol."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from mtdp.choices import protocol_choices
from mtdp.errors import CheckpointError, TaskError, UsageError
from mtdp.parallel import refuse_torchrun
from mtdp.protocol.cells import JOINT, set_name
from mtdp.protocol.config import ProtocolConfig, evaluated_tasks, finetuned_tasks, left_out_sets
from mtdp.run_state import write_json
from mtdp.tasks import SPLITS, Task
from mtdp.transfer import folds_of
from mtdp.weights import STATE_NAME, find_weights_file, is_named_source, same_start, source_sha256

SETTINGS_NAME: Final = "protocol.json"
# What may change from one run to the next: it adds cells, and leaves those that are there true.
MAY_GROW: Final = ("finetune", "scratch", "joint", "release")
# These would change which combination is chosen, so they may change only where there is no choice.
MAY_GROW_WITHOUT_CHOICE: Final = ("seeds", "evaluate")


def check_runnable(tasks: tuple[Task, ...], config: ProtocolConfig) -> None:
    """Find before the first training what would end the run after the last.

    Raises:
        UsageError: a name, a source of weights or a set that cannot be, or nothing to choose a combination by.
        TaskError: an evaluated task whose groups cannot be cross-validated.
    """
    refuse_torchrun("the protocol")
    evaluated = evaluated_tasks(tasks, config)
    finetuned_tasks(evaluated, config)
    folders = [set_name(names) for names in left_out_sets(tasks, evaluated)] + [JOINT] * config.joint
    twice = [name for name, times in Counter(folders).items() if times > 1]
    if twice:
        raise UsageError(f"two trainings would be named {twice[0]!r}", "rename a task: sets are named by their tasks")
    if not is_named_source(config.init):
        find_weights_file(config.init)
    choice = len(config.combinations()) > 1
    if choice and len(evaluated) == 1:
        raise UsageError(
            f"{evaluated[0].name!r} is the only evaluated task, and others must choose among "
            f"{len(config.combinations())} combinations",
            "evaluate at least two tasks, or give a single --lr, --head-lr-multiplier and --warmup",
        )
    for task in evaluated:
        for splits in (("train",), ("train", "val")) if choice else (("train", "val"),):
            samples = task.of(splits)
            try:
                folds_of([sample.label for sample in samples], [sample.group for sample in samples], task.metric)
            except TaskError as error:
                raise TaskError(f"task {task.name!r}, {' and '.join(splits)}: {error.message}", error.hint) from error


def hold_to_settings(tasks: tuple[Task, ...], config: ProtocolConfig, out: Path, write: bool = True) -> None:
    """Refuse other settings than those of the results that are there: cells of two settings make no table.

    Args:
        write: also write them down, for the next run.
    """
    path = out / SETTINGS_NAME
    now: dict[str, Any] = {
        **_plain(config),
        "init_sha256": source_sha256(config.init),
        "tasks": {task.name: task.summary(SPLITS) for task in tasks},
        "pool": [[task.name, sorted(task.leave_out_with), _digest(task)] for task in tasks],
    }
    try:
        # Without results there is nothing to hold to: a mistyped option may be corrected.
        if path.is_file() and _has_results(out):
            _compare(_read(path), now, config, out)
        if write:
            out.mkdir(parents=True, exist_ok=True)
            write_json(path, {**now, "choices": protocol_choices(config)})
    except OSError as error:
        raise UsageError(f"{out} cannot be written: {error}", "give another --out") from error


def _compare(written: Mapping[str, Any], now: Mapping[str, Any], config: ProtocolConfig, out: Path) -> None:
    # A file from before a setting existed was made with what is its default now, and of a pool that it does not tell.
    before = {**_plain(ProtocolConfig()), "pool": now["pool"], **written}
    # Weights are compared by what they are: a path may be spelt in several ways, or hold others than then.
    same = same_start(before["init"], before.get("init_sha256"), config.init)
    before["init"] = config.init if same else None
    free = {*MAY_GROW, "init_sha256"}
    if not before["finetune"]:  # what decides fine-tuning decided nothing yet
        free |= {"finetune_lrs", "finetune_epochs"}
    if len(config.combinations()) == 1:
        free |= set(MAY_GROW_WITHOUT_CHOICE)
    if (out / "pretrain" / JOINT).exists():
        free.discard("evaluate")  # joint training leaves out the val splits of what is evaluated
    changed = sorted(name for name in now if name not in free and now[name] != before.get(name))
    if changed:
        raise UsageError(
            f"{out} holds a run of other settings: {', '.join(changed)}",
            "give the same options and pool, or another --out",
        )


def _has_results(out: Path) -> bool:
    """Whether a cell is done, or a training has been saved half-way."""
    return any(out.glob("cells/**/*.json")) or any(out.glob(f"*/**/{STATE_NAME}"))


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}", "give another --out") from error
    return found


def _digest(task: Task) -> str:
    """Of what the summary of a task does not tell: the split and the group of each image."""
    digest = hashlib.sha256()
    for split in SPLITS:
        for sample in task.samples[split]:
            digest.update(os.fsencode(f"{split}\t{sample.label}\t{sample.group}\t{sample.path.name}\n"))
    return digest.hexdigest()


def _plain(config: ProtocolConfig) -> dict[str, Any]:
    """As it reads back from JSON: tuples are lists."""
    data: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return data
