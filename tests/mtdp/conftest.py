"""A tiny pool: two tasks of real image files, made by code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

COLOURS = {"blue": (60, 60, 190), "green": (60, 190, 60), "red": (190, 60, 60)}
Make = Callable[..., Path]


def _write_image(
    path: Path, width: int = 40, height: int = 40, colour: tuple[int, int, int] = (9, 9, 9), seed: int = 0
) -> Path:
    """Noise around a colour: a class that a network can learn."""
    noise = np.random.default_rng(seed).normal(colour, 30, (height, width, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(noise, 0, 255).astype(np.uint8)).save(path)
    return path


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Networks of a few pixels gain nothing from threads; on a busy machine, threads that wait for each other double
    the time. The variable is for the processes that tests start."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def write_image() -> Make:
    """write(path, width, height, colour, seed): an image file with its folders."""
    return _write_image


@pytest.fixture(scope="session")
def make_task() -> Make:
    """make(folder, classes=..., per_class=...): a task folder with train, val and test; groups never cross splits."""

    def make(folder: Path, classes: tuple[str, ...] = ("blue", "red"), per_class: int = 4, height: int = 40) -> Path:
        for number, split in enumerate(("train", "val", "test")):
            for label in classes:
                for index in range(per_class):
                    name = f"{split}{index // 2}_{label}{index}.png"
                    seed = number * 1000 + index
                    _write_image(folder / split / label / name, 40, height, COLOURS[label], seed)
        return folder

    return make


@pytest.fixture
def pool_file(tmp_path: Path, make_task: Make) -> Path:
    """Two tasks: `two` (blue, red; not square) and `three` (blue, green, red)."""
    make_task(tmp_path / "pool" / "two", ("blue", "red"), height=56)
    make_task(tmp_path / "pool" / "three", ("blue", "green", "red"))
    path = tmp_path / "pool" / "pool.toml"
    path.write_text(
        '[[task]]\nname = "two"\npath = "two"\nships = true\n[[task]]\nname = "three"\npath = "three"\n', "utf-8"
    )
    return path
