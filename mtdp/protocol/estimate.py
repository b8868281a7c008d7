"""What a protocol run will cost, before it is started."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

from mtdp.backbones import build_backbone
from mtdp.devices import autocast, best_device, choose_precision, gradient_scaler, keep_freed_memory, take_step
from mtdp.preprocess import Normalise, Preprocessing
from mtdp.progress import METRICS_NAME
from mtdp.protocol.cells import cost
from mtdp.protocol.config import ProtocolConfig
from mtdp.protocol.run import Protocol
from mtdp.protocol.settings import check_runnable, hold_to_settings


def images_per_s(config: ProtocolConfig, out: Path) -> tuple[float, str]:
    """Training speed, and where the figure is from: the runs that are there, or three steps made now."""
    seen = [
        line["images_per_s"]
        for path in out.glob(f"pretrain/*/*/*/{METRICS_NAME}")
        for line in _whole_lines(path)
        if line.get("phase") == "training"
    ]
    if seen:
        return float(median(seen)), "median of the trainings so far"
    return _timed(config), "three steps, timed now"


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text("utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:  # the torn last line of a run that goes on, or was killed
            continue


def _timed(config: ProtocolConfig) -> float:
    device = best_device()
    keep_freed_memory()
    normalise = Normalise(Preprocessing(image_px=config.image_px)).to(device)
    backbone = build_backbone(config.arch).to(device).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(backbone.parameters(), lr=1e-6, momentum=0.9)
    images = torch.randint(0, 256, (config.batch_size, config.image_px, config.image_px, 3), dtype=torch.uint8)
    precision = choose_precision(config.precision, device)
    scaler = gradient_scaler(precision, device)
    times_s = []
    for _ in range(3):
        start_s = time.perf_counter()
        with autocast(precision, device):
            features = backbone(normalise(images.to(device)))
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(features.float().square().mean()).backward()
        take_step(scaler, optimizer)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times_s.append(time.perf_counter() - start_s)
    return config.batch_size / min(times_s)


def say_plan(protocol: Protocol, say: Callable[[str], None]) -> None:
    """List every cell, whether it is done, and about how long it takes.

    Raises:
        UsageError, TaskError: what would end the run itself.
    """
    check_runnable(protocol.tasks, protocol.config)
    hold_to_settings(protocol.tasks, protocol.config, protocol.out, write=False)
    cells = protocol.cells()
    missing = {cell for cell in cells if protocol.result(cell) is None}
    rate, origin = images_per_s(protocol.config, protocol.out) if missing else (1.0, "")
    total_s = 0.0
    for cell in cells:
        if cell not in missing:
            say(f"done     {'':>11}  {cell.name}")
            continue
        seconds = cost(cell, protocol.tasks, protocol.config) / rate
        say(f"missing  {hours_minutes(seconds):>11}  {cell.name}")
        total_s += seconds
    if not missing:
        say(f"all {len(cells)} cells are done")
        return
    say(
        f"{len(missing)} of {len(cells)} cells are missing: about {hours_minutes(total_s)} in one process, "
        f"at {rate:.1f} images/s ({origin}); the SVMs' time is not counted"
    )


def hours_minutes(seconds: float) -> str:
    """A duration for people.

    >>> hours_minutes(59), hours_minutes(3660), hours_minutes(90_000)
    ('1 min', '1 h 01 min', '25 h 00 min')
    """
    minutes = max(1, round(seconds / 60))
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
