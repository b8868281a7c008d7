"""A training run's saved state: all that makes a resumed run equal to an uninterrupted one; and signals that wait."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any, Final, Literal

import torch

from mtdp.checkpoint import COPY_AGAIN, fill_net, read_tensors_and_json, write_tensors
from mtdp.errors import CheckpointError, UsageError
from mtdp.multitask import MultiTaskNet
from mtdp.stated import misfit
from mtdp.weights import CHECKPOINT_SHAPE, ORIGIN_SHAPE, STATE_NAME


@dataclass(frozen=True, slots=True)
class RunState:
    """What a run goes on from: tensors, and a JSON document.

    The tensors are `network.*`, the optimiser's (`momentum.*`; AdamW's `exp_avg.*`, `exp_avg_sq.*`, `step.*`) and
    `rng`; in fp16 the document has the state of the `scaler`.
    """

    tensors: dict[str, torch.Tensor]
    data: dict[str, Any]


Kind = Literal["pre-training", "fine-tuning"]
LOCK_NAME: Final = ".lock"
_CONFIG: Final = {"init": str, "precision": str, "batch_size": int}
_SHAPES: Final[dict[Kind, dict[str, Any]]] = {  # of a state's document, see `mtdp.stated`
    "pre-training": {
        **CHECKPOINT_SHAPE,
        "head_order": [str],
        "training": {
            "config": {**_CONFIG, "iterations": int},
            "init": ORIGIN_SHAPE,
            "tasks": {str: {"images": int}},
        },
    },
    "fine-tuning": {
        "config": {**_CONFIG, "epochs": int},
        "tasks": {str: {"images": int}},
        "init": ORIGIN_SHAPE,
        "epoch": int,
        "best_score": float,
        "best_epoch": int,
    },
}
_KINDS: Final = {"momentum_buffer": "momentum"}  # names in a state file, of before there was another optimiser


@contextmanager
def locked_run(out: Path, leads: bool = True) -> Iterator[None]:
    """Make a run's folder, and keep other processes from writing to it; the lock ends with the process.

    Args:
        leads: whether this process writes the files; of several that train together, one does.

    Raises:
        UsageError: the folder cannot be made, or another process works in it.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / LOCK_NAME).open("w", encoding="utf-8") if leads else None
    except OSError as error:
        raise UsageError(f"{out} cannot be made: {error}", "give another --out") from error
    if file is None:
        yield
        return
    with file:
        if not takes_lock(file):
            raise UsageError(f"another process is working in {out}", "wait until it ends, or give another --out")
        yield


def takes_lock(file: IO[str]) -> bool:
    """Whether this process now holds a file's lock; it ends with the process, however that ends.

    Raises:
        UsageError: the disk has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # Lustre, and some shares, have them only where they are mounted so
        raise UsageError(
            f"{file.name} cannot be locked: {error.strerror}", "give an --out on a disk that has locks (flock)"
        ) from error
    return True


def open_run(out: Path, resume: bool, kind: Kind) -> RunState | None:
    """Read the state that a run's folder holds.

    Raises:
        UsageError: the folder holds a run that is not to be resumed, or one of another kind.
        CheckpointError: the state cannot be read.
    """
    path = out / STATE_NAME
    if not path.is_file():
        return None
    if not resume:
        raise UsageError(f"{out} holds a run already", "continue with --resume, or give another --out")
    saved = RunState(*read_tensors_and_json(path, {"kind?": str}))
    found = saved.data.get("kind", "pre-training")  # which does not state its kind
    if found != kind:
        raise UsageError(f"{out} holds a {found} run, not a {kind} run", "give another --out")
    wrong = misfit(saved.data, _SHAPES[kind])
    if wrong:
        raise CheckpointError(f"{path}: in its description, {wrong}", COPY_AGAIN)
    return saved


def write_state(
    out: Path,
    net: MultiTaskNet,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    data: Mapping[str, Any],
) -> None:
    """Write the network, the optimiser's, the scaler's and the generator's state, atomically."""
    tensors = {f"network.{name}": tensor for name, tensor in net.state_dict().items()}
    for name, parameter in net.named_parameters():
        for kind, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):  # of SGD the momentum; of AdamW two moments and the number of steps
                tensors[f"{_KINDS.get(kind, kind)}.{name}"] = value
    tensors["rng"] = torch.get_rng_state()
    scaling = {"scaler": scaler.state_dict()} if scaler.is_enabled() else {}
    write_tensors(out / STATE_NAME, tensors, {**data, **scaling})


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON document, atomically."""
    write_text(path, json.dumps(data, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text, atomically; what UTF-8 has no bytes for is escaped.

    Raises:
        UsageError: the system refuses it.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with writing_said(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(text, "utf-8", errors="backslashreplace")
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


@contextmanager
def writing_said(path: Path) -> Iterator[None]:
    """Turn what the system refuses while a file is written into a line that names the file.

    Raises:
        UsageError: the body raised an `OSError`.
    """
    try:
        yield
    except OSError as error:
        said = error.strerror or error
        raise UsageError(f"{path} cannot be written: {said}", "check free space and rights") from error


def restore_network(net: MultiTaskNet, saved: RunState, out: Path) -> None:
    """Give a network the weights of a saved run."""
    state = {name.removeprefix("network."): t for name, t in saved.tensors.items() if name.startswith("network.")}
    fill_net(net, state, out / STATE_NAME)


def restore_generator(saved: RunState, out: Path) -> None:
    """Give torch's generator the state of a saved run; the earliest runs saved none."""
    if "rng" not in saved.tensors:
        return
    state, now = saved.tensors["rng"], torch.get_rng_state()
    if (state.dtype, state.shape) != (now.dtype, now.shape):
        raise CheckpointError(f"{out / STATE_NAME}: rng is no state of torch's generator", COPY_AGAIN)
    try:
        torch.set_rng_state(state)
    except RuntimeError as error:
        raise CheckpointError(f"{out / STATE_NAME}: rng: {error}", COPY_AGAIN) from error


def restore_optimiser(net: MultiTaskNet, optimizer: torch.optim.Optimizer, saved: RunState, out: Path) -> None:
    """Give an optimiser the state of a saved run."""
    for name, parameter in net.named_parameters():
        for kind in (*_KINDS, "exp_avg", "exp_avg_sq", "step"):
            stored = f"{_KINDS.get(kind, kind)}.{name}"
            value = saved.tensors.get(stored)
            if value is not None and value.shape != (() if kind == "step" else parameter.shape):
                raise CheckpointError(f"{out / STATE_NAME}: {stored} has the shape {list(value.shape)}", COPY_AGAIN)
            if value is not None:  # laid out as the parameter; the number of steps stays on the CPU
                like = value.clone() if kind == "step" else torch.empty_like(parameter).copy_(value)
                optimizer.state[parameter][kind] = like


def restore_scaler(scaler: torch.amp.GradScaler, saved: RunState) -> None:
    """Give a gradient scaler the state of a saved run, where it scales."""
    if scaler.is_enabled():
        scaler.load_state_dict(saved.data["scaler"])


@contextmanager
def waiting_signals() -> Iterator[list[int]]:
    """Collect the first SIGINT or SIGTERM, so that an iteration can end; a second one has its usual effect."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = {kind: signal.getsignal(kind) for kind in kinds}

    def on_signal(number: int, _frame: FrameType | None) -> None:
        caught.append(number)
        signal.signal(number, before[signal.Signals(number)])

    try:
        for kind in kinds:
            signal.signal(kind, on_signal)
        yield caught
    finally:
        for kind in kinds:
            signal.signal(kind, before[kind])
