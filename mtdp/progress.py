"""What a training run tells: metrics as JSON Lines for programs, progress for people."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mtdp.errors import UsageError
from mtdp.multitask import TaskShare

METRICS_NAME: Final = "metrics.jsonl"


class TrainingLog:
    """Collects batches; every `every` iterations writes one line of metrics, and shows progress on stderr.

    Args:
        run: the run's folder, for metrics.jsonl and tensorboard/; None: nothing is written or shown. Lines after
            iteration `start` (of a run that was killed) are dropped first.
        start: iterations done before this run.
        total: iterations of the whole run.
    """

    def __init__(
        self,
        run: Path | None,
        start: int,
        total: int,
        every: int = 10,
        quiet: bool = False,
        tensorboard: bool = False,
        unit: str = "iteration",
    ) -> None:
        self._start, self._total, self._every, self._quiet, self._unit = start, total, every, quiet, unit
        self._file: IO[str] | None = None
        self._events: Any = None
        if run is None:
            self._quiet = True
        else:
            _drop_lines_after(run / METRICS_NAME, start, unit)
            self._file = (run / METRICS_NAME).open("a", encoding="utf-8")
            if tensorboard:
                self._events = _event_writer(run / "tensorboard", start)
        self._begun_s = self._window_begun_s = time.monotonic()
        self._images = 0
        self._shares: dict[str, list[TaskShare]] = {}
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console) if console.is_terminal and not self._quiet else None
        self._bar_task = self._bar.add_task("training", total=total, completed=start) if self._bar else None

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        if self._file:
            self._file.close()
        if self._events:
            self._events.close()

    def say(self, text: str) -> None:
        """A plain line on stderr."""
        if self._quiet:
            return
        if self._bar:
            self._bar.console.print(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def batch(self, iteration: int, phase: str, shares: Mapping[str, TaskShare], lr: float) -> None:
        """Count the batch that made `iteration` iterations complete, at a learning rate."""
        self.count(shares)
        if iteration % self._every == 0 or iteration == self._total:
            self.flush(iteration, phase, {"lr": lr})

    def count(self, shares: Mapping[str, TaskShare]) -> None:
        """Count a batch."""
        for name, share in shares.items():
            self._shares.setdefault(name, []).append(share)
            self._images += share.samples

    def flush(self, iteration: int, phase: str, more: Mapping[str, Any] | None = None) -> None:
        """Write what was collected since the last line, if anything was, and `more`."""
        if not self._images:
            return
        now_s = time.monotonic()
        images_per_s = self._images / max(now_s - self._window_begun_s, 1e-9)
        loss = sum(share.loss_sum for shares in self._shares.values() for share in shares) / self._images
        tasks = {name: _mean_share(shares) for name, shares in sorted(self._shares.items())}
        line = {
            self._unit: iteration,
            "phase": phase,
            "loss": round(loss, 5),
            "images_per_s": round(images_per_s, 2),
            "elapsed_s": round(now_s - self._begun_s, 1),
            "tasks": tasks,
            **(more or {}),
        }
        self.record(line)
        self._show(iteration, phase, loss, images_per_s, now_s)
        self._images, self._shares, self._window_begun_s = 0, {}, now_s

    def record(self, line: Mapping[str, Any]) -> None:
        """Write one line of metrics; the nested ones become names with slashes in TensorBoard."""
        if self._file:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        if self._events:
            for name, value in _flat(line):
                self._events.add_scalar(name, value, line[self._unit])

    def _show(self, iteration: int, phase: str, loss: float, images_per_s: float, now_s: float) -> None:
        if self._bar and self._bar_task is not None:
            text = f"{phase}  loss {loss:.3f}  {images_per_s:.1f} images/s"
            self._bar.update(self._bar_task, completed=iteration, description=text)
            return
        left_s = (now_s - self._begun_s) / max(iteration - self._start, 1) * (self._total - iteration)
        eta = time.strftime("%H:%M:%S", time.gmtime(left_s)) if left_s < 86400 else f"{left_s / 86400:.1f} days"
        self.say(f"{phase} {iteration}/{self._total}  loss {loss:.4f}  {images_per_s:.1f} images/s  {eta} left")


def _mean_share(shares: list[TaskShare]) -> dict[str, float | int]:
    samples = sum(share.samples for share in shares)
    return {
        "samples": samples,
        "loss": round(sum(share.loss_sum for share in shares) / samples, 5),
        "accuracy": round(sum(share.correct for share in shares) / samples, 4),
    }


def _flat(line: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in line.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield prefix + name, value


def _event_writer(folder: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError("TensorBoard is not installed", "pip install tensorboard, or drop --tensorboard") from None
    return SummaryWriter(str(folder), purge_step=start + 1)


def _drop_lines_after(path: Path, number: int, unit: str) -> None:
    if not path.is_file():
        return
    kept = []
    for line in path.read_text("utf-8").splitlines(keepends=True):
        try:
            if int(json.loads(line)[unit]) <= number:
                kept.append(line)
        except (ValueError, KeyError):  # the torn last line of a killed run
            continue
    path.write_text("".join(kept), "utf-8")
