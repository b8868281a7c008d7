"""Which samples form a batch: for each, a task uniformly, then an image of it uniformly (paper: batch sampling).

Small tasks so weigh as much as large ones, and tasks are mixed within a batch. A batch depends on the seed and its
number alone, so a resumed run needs no saved state of a sampler, and batches may be prepared in any order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from mtdp.augment import training_view
from mtdp.devices import usable_cores
from mtdp.images import ImageCache
from mtdp.tasks import Sample

_T = TypeVar("_T")

# Independent streams of random numbers for one seed: more adaptation batches do not change the training batches.
TRAINING: Final = 0
ADAPTATION: Final = 1
EPOCHS: Final = 2


@dataclass(frozen=True, slots=True)
class Draw:
    """The random choices of one batch of B samples."""

    tasks: NDArray[np.int64]  # (B,), 0 <= task < T
    images: NDArray[np.int64]  # (B,), 0 <= image < n_task
    offsets: NDArray[np.float64]  # (B,), place of the crop
    flips: NDArray[np.bool_]  # (B, 2), horizontal and vertical

    def of(self, rows: slice) -> Draw:
        return Draw(self.tasks[rows], self.images[rows], self.offsets[rows], self.flips[rows])


@dataclass(frozen=True, slots=True)
class Batch:
    """Images uint8[B, P, P, 3], and for each the number of its task and of its class, int64[B]."""

    images: torch.Tensor
    tasks: torch.Tensor
    labels: torch.Tensor


def draw(seed: int, stream: int, iteration: int, sizes: Sequence[int], batch_size: int) -> Draw:
    """The random choices of one batch, a function of its arguments alone.

    Args:
        sizes: number of images of each task, all above 0.
    """
    rng = np.random.default_rng([seed, stream, iteration])
    tasks = rng.integers(len(sizes), size=batch_size)
    images = rng.integers(np.asarray(sizes, dtype=np.int64)[tasks])
    return Draw(tasks, images, rng.random(batch_size), rng.random((batch_size, 2)) < 0.5)


def draw_epoch(seed: int, epoch: int, size: int, batch_size: int) -> list[Draw]:
    """The random choices of one epoch of one task: every image once, in random order, the last batch smaller.

    A last batch of a single image is left out: batch norm has no variance of one.
    """
    rng = np.random.default_rng([seed, EPOCHS, epoch])
    order = rng.permutation(size)
    offsets, flips = rng.random(size), rng.random((size, 2)) < 0.5
    whole = Draw(np.zeros(size, np.int64), order, offsets, flips)
    parts = [whole.of(slice(start, start + batch_size)) for start in range(0, size, batch_size)]
    return [part for part in parts if len(part.images) > 1]


def load_batch(tasks: Sequence[Sequence[Sample]], choice: Draw, cache: ImageCache) -> Batch:
    """Decode, crop and flip the images of one draw."""
    side = cache.image_px
    batch_size = len(choice.tasks)
    images = np.empty((batch_size, side, side, 3), dtype=np.uint8)
    labels = np.empty(batch_size, dtype=np.int64)
    for row in range(batch_size):
        sample = tasks[choice.tasks[row]][choice.images[row]]
        flip_h, flip_v = bool(choice.flips[row, 0]), bool(choice.flips[row, 1])
        images[row] = training_view(cache.get(sample.path), float(choice.offsets[row]), flip_h, flip_v)
        labels[row] = sample.label
    return Batch(torch.from_numpy(images), torch.from_numpy(choice.tasks), torch.from_numpy(labels))


def batches(
    tasks: Sequence[Sequence[Sample]],
    cache: ImageCache,
    *,
    seed: int,
    stream: int,
    iterations: range,
    batch_size: int,
    part: slice = slice(None),
) -> Iterator[Batch]:
    """The batches of some iterations, in order, prepared ahead in threads (decoding releases the GIL).

    Args:
        part: the rows of each batch that are wanted, for a process that shares the batch with others.
    """
    sizes = [len(samples) for samples in tasks]

    def make(iteration: int) -> Batch:
        return load_batch(tasks, draw(seed, stream, iteration, sizes, batch_size).of(part), cache)

    return _ahead(make, iterations)


def epoch_batches(
    samples: Sequence[Sample], cache: ImageCache, *, seed: int, epoch: int, batch_size: int
) -> Iterator[Batch]:
    """The batches of one epoch over one task, prepared ahead in threads."""
    draws = draw_epoch(seed, epoch, len(samples), batch_size)
    return _ahead(lambda number: load_batch([samples], draws[number], cache), range(len(draws)))


def in_order(
    samples: Sequence[Sample],
    cache: ImageCache,
    view: Callable[[NDArray[np.uint8]], NDArray[np.uint8]],
    batch_size: int,
) -> Iterator[torch.Tensor]:
    """A view of every sample once, in order: uint8[B, P, P, 3], the last batch smaller."""

    def make(start: int) -> torch.Tensor:
        part = samples[start : start + batch_size]
        return torch.from_numpy(np.stack([view(cache.get(sample.path)) for sample in part]))

    return _ahead(make, range(0, len(samples), batch_size))


def decode_threads() -> int:
    """Two at least, so that one decodes while the other waits for the disk; more than 16 no network here consumes."""
    return max(2, min(16, usable_cores()))


def _ahead(make: Callable[[int], _T], numbers: range) -> Iterator[_T]:
    threads = decode_threads()
    ahead = 2 * threads
    waiting: deque[Future[_T]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        try:
            for number in numbers:
                waiting.append(pool.submit(make, number))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
