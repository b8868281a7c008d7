"""Normalisation: the one path from uint8 to the network."""

from __future__ import annotations

import pytest
import torch

from mtdp.errors import UsageError
from mtdp.preprocess import IMAGENET_MEAN, IMAGENET_STD, Normalise, Preprocessing


def test_it_is_x_over_255_minus_mean_over_std_for_every_value() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    got = Normalise(Preprocessing(image_px=32))(images)
    values = torch.arange(256, dtype=torch.float64).view(16, 16) / 255
    for channel in range(3):
        wanted = (values - IMAGENET_MEAN[channel]) / IMAGENET_STD[channel]
        torch.testing.assert_close(got[0, channel].double(), wanted, atol=1e-6, rtol=0)


def test_channels_move_first_and_bytes_stay_in_place() -> None:
    images = torch.randint(0, 256, (2, 32, 40, 3), dtype=torch.uint8)
    out = Normalise(Preprocessing(image_px=32))(images)
    assert out.shape == (2, 3, 32, 40)
    assert out.dtype == torch.float32
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_it_adds_nothing_to_a_state_dict() -> None:
    assert not Normalise(Preprocessing()).state_dict()


def test_json_there_and_back() -> None:
    here = Preprocessing(image_px=96, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    assert Preprocessing.from_json(here.to_json()) == here


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(UsageError, match="image_px 8"):
        Preprocessing(image_px=8)
    with pytest.raises(UsageError, match="std"):
        Preprocessing(std=(0.0, 1.0, 1.0))
