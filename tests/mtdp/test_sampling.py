"""Which samples form a batch, and that nothing but the seed and the number decides it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from mtdp.errors import ImageUnreadable
from mtdp.images import ImageCache
from mtdp.sampling import ADAPTATION, TRAINING, batches, decode_threads, draw, draw_epoch
from mtdp.tasks import Sample, load_pool

Make = Callable[..., Path]  # writes files, returns where

SEEDS = st.integers(0, 2**32)


def test_tasks_are_drawn_uniformly_whatever_their_size() -> None:
    choice = draw(1, TRAINING, 0, (10, 1000, 100_000), 30_000)
    assert chisquare(np.bincount(choice.tasks, minlength=3)).pvalue > 1e-3


def test_images_are_drawn_uniformly_within_their_task() -> None:
    choice = draw(2, TRAINING, 0, (7, 50), 40_000)
    for task, size in ((0, 7), (1, 50)):
        counts = np.bincount(choice.images[choice.tasks == task], minlength=size)
        assert len(counts) == size
        assert chisquare(counts).pvalue > 1e-3


def test_flips_are_fair_and_independent() -> None:
    flips = draw(3, TRAINING, 0, (5,), 40_000).flips
    cells = np.bincount(flips[:, 0] * 2 + flips[:, 1], minlength=4)
    assert chisquare(cells).pvalue > 1e-3


@given(SEEDS, st.integers(0, 10**6), st.lists(st.integers(1, 500), min_size=1, max_size=9))
def test_a_batch_is_a_function_of_seed_and_number(seed: int, iteration: int, sizes: list[int]) -> None:
    one, two = (draw(seed, TRAINING, iteration, sizes, 16) for _ in range(2))
    for a, b in zip(
        (one.tasks, one.images, one.offsets, one.flips), (two.tasks, two.images, two.offsets, two.flips), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert (one.images < np.asarray(sizes)[one.tasks]).all()
    assert ((one.offsets >= 0) & (one.offsets < 1)).all()


@pytest.mark.parametrize("other", [(1, TRAINING, 5), (0, ADAPTATION, 5), (0, TRAINING, 6)])
def test_seed_stream_and_number_each_change_the_batch(other: tuple[int, int, int]) -> None:
    here = draw(0, TRAINING, 5, (1000,), 16)
    assert (draw(*other, (1000,), 16).images != here.images).any()


def test_batches_hold_their_draw_and_continue_where_asked(pool_file: Path) -> None:
    data = [task.of(["train"]) for task in load_pool(pool_file)]
    cache = ImageCache(32, 1 << 20)
    whole = list(batches(data, cache, seed=4, stream=TRAINING, iterations=range(9), batch_size=5))
    tail = list(batches(data, cache, seed=4, stream=TRAINING, iterations=range(6, 9), batch_size=5))
    assert len(whole) == 9
    for early, late in zip(whole[6:], tail, strict=True):
        assert early.images.equal(late.images)
        assert early.labels.equal(late.labels)
    choice = draw(4, TRAINING, 0, [len(samples) for samples in data], 5)
    assert whole[0].images.shape == (5, 32, 32, 3)
    wanted = [data[t][i].label for t, i in zip(choice.tasks, choice.images, strict=True)]
    assert whole[0].labels.tolist() == wanted
    assert whole[0].tasks.tolist() == choice.tasks.tolist()


def test_a_truncated_image_is_named_when_its_batch_is_due(tmp_path: Path, write_image: Make) -> None:
    path = write_image(tmp_path / "cut.png")
    path.write_bytes(path.read_bytes()[:900])
    stream = batches(
        [[Sample(path, 0, "g")]], ImageCache(32, 0), seed=0, stream=TRAINING, iterations=range(3), batch_size=2
    )
    with pytest.raises(ImageUnreadable, match=r"cut\.png"):
        list(stream)


@pytest.mark.parametrize(("cores", "threads"), [(1, 2), (2, 2), (12, 12), (64, 16)])
def test_images_are_decoded_on_the_cores_that_there_are(
    cores: int, threads: int, pool_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = [task.of(["train"]) for task in load_pool(pool_file)]

    def images() -> list[torch.Tensor]:
        stream = batches(data, ImageCache(32, 0), seed=4, stream=TRAINING, iterations=range(5), batch_size=5)
        return [batch.images for batch in stream]

    before = images()
    monkeypatch.setattr("mtdp.sampling.usable_cores", lambda: cores)
    assert decode_threads() == threads
    assert all(one.equal(other) for one, other in zip(before, images(), strict=True))


def test_within_a_batch_and_an_epoch_every_image_has_its_own_place_and_flips() -> None:
    epoch = draw_epoch(3, 0, 4000, 4000)[0]
    for choice in (draw(3, TRAINING, 0, (5,), 4000), epoch):
        cells = np.bincount(choice.flips[:, 0] * 2 + choice.flips[:, 1], minlength=4)
        assert chisquare(cells).pvalue > 1e-3
        assert chisquare(np.histogram(choice.offsets, 10, (0, 1))[0]).pvalue > 1e-3
