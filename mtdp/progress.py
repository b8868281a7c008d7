"""What a training run tells: metrics as JSON Lines for programs, progress for people."""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mtdp.multitask import TaskShare


class TrainingLog:
    """Collects batches; every `every` iterations writes one line of metrics, and shows progress on stderr.

    Args:
        path: the JSON Lines file. Lines after iteration `start` (of a run that was killed) are dropped first.
        start: iterations done before this run.
        total: iterations of the whole run.
    """

    def __init__(self, path: Path, start: int, total: int, every: int = 10, quiet: bool = False) -> None:
        self._path, self._start, self._total, self._every, self._quiet = path, start, total, every, quiet
        _drop_lines_after(path, start)
        self._file = path.open("a", encoding="utf-8")
        self._begun_s = self._window_begun_s = time.monotonic()
        self._images = 0
        self._shares: dict[str, list[TaskShare]] = {}
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console) if console.is_terminal and not quiet else None
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
        self._file.close()

    def say(self, text: str) -> None:
        """A plain line on stderr."""
        if self._quiet:
            return
        if self._bar:
            self._bar.console.print(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def batch(self, iteration: int, phase: str, shares: Mapping[str, TaskShare]) -> None:
        """Counts the batch that made `iteration` iterations complete."""
        for name, share in shares.items():
            self._shares.setdefault(name, []).append(share)
            self._images += share.samples
        if iteration % self._every == 0 or iteration == self._total:
            self.flush(iteration, phase)

    def flush(self, iteration: int, phase: str) -> None:
        """Writes what was collected since the last line, if anything was."""
        if not self._images:
            return
        now_s = time.monotonic()
        images_per_s = self._images / max(now_s - self._window_begun_s, 1e-9)
        loss = sum(share.loss_sum for shares in self._shares.values() for share in shares) / self._images
        tasks = {name: _mean_share(shares) for name, shares in sorted(self._shares.items())}
        line = {
            "iteration": iteration,
            "phase": phase,
            "loss": round(loss, 5),
            "images_per_s": round(images_per_s, 2),
            "elapsed_s": round(now_s - self._begun_s, 1),
            "tasks": tasks,
        }
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self._show(iteration, phase, loss, images_per_s, now_s)
        self._images, self._shares, self._window_begun_s = 0, {}, now_s

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


def _drop_lines_after(path: Path, iteration: int) -> None:
    if not path.is_file():
        return
    kept = []
    for line in path.read_text("utf-8").splitlines(keepends=True):
        try:
            if int(json.loads(line)["iteration"]) <= iteration:
                kept.append(line)
        except (ValueError, KeyError):  # the torn last line of a killed run
            continue
    path.write_text("".join(kept), "utf-8")
