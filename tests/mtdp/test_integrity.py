"""All images are decoded before training, once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from mtdp.errors import ImageUnreadable
from mtdp.integrity import check_images, image_digests

Make = Callable[..., Path]  # writes files, returns where


@pytest.fixture
def images(tmp_path: Path, write_image: Make, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """200 images, more than a job takes, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = write_image(tmp_path / "images" / "0.png", 8, 8)
    for number in range(1, 200):
        (first.parent / f"{number}.png").write_bytes(first.read_bytes())
    return [first.parent / f"{number}.png" for number in range(200)]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def test_sound_images_are_decoded_once(tmp_path: Path, images: list[Path]) -> None:
    assert [check_images(tmp_path, images) for _ in range(3)] == [200, 0, 0]


def test_only_what_changed_is_decoded_again(tmp_path: Path, images: list[Path], write_image: Make) -> None:
    check_images(tmp_path, images)
    write_image(images[3], 9, 9)
    more = write_image(images[0].parent / "more.png", 8, 8)
    assert check_images(tmp_path, [*images, more]) == 2


def test_a_file_of_the_same_size_and_date_is_not_taken_for_the_old_one(tmp_path: Path, images: list[Path]) -> None:
    check_images(tmp_path, images)
    before = images[7].stat()
    images[7].write_bytes(bytes(before.st_size))
    os.utime(images[7], ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ImageUnreadable, match=r"7\.png is not a readable image"):
        check_images(tmp_path, images)


def test_all_bad_images_are_named_at_once_and_the_sound_ones_remembered(tmp_path: Path, images: list[Path]) -> None:
    whole = images[0].read_bytes()
    for number in (180, 70, 130):
        cut(images[number])
    for _ in range(2):
        with pytest.raises(ImageUnreadable, match="3 images cannot be used") as caught:
            check_images(tmp_path, images)
        lines = caught.value.message.splitlines()[1:]
        assert [line.split("/")[-1].split(".png cannot be decoded")[0] for line in lines] == ["70", "130", "180"]
    for number in (180, 70, 130):
        images[number].write_bytes(whole)
    assert check_images(tmp_path, images) == 3


def test_equal_pixels_have_equal_digests_whatever_their_file(tmp_path: Path, write_image: Make) -> None:
    first, other = write_image(tmp_path / "a.png", seed=1), write_image(tmp_path / "b.png", seed=2)
    with Image.open(first) as image:
        image.save(tmp_path / "a.bmp")
        image.crop((0, 0, 40, 20)).resize((20, 40)).save(tmp_path / "other-shape.png")
    blank = tmp_path / "blank.png"
    Image.new("RGB", (40, 40), (243, 242, 244)).save(blank)
    names = [first, tmp_path / "a.bmp", other, tmp_path / "other-shape.png", blank]
    for _ in range(2):  # the second time from the cache
        digests, _ = image_digests(tmp_path, names)
        assert digests[0] == digests[1] != 0
        assert len(set(digests)) == 4
        assert digests[-1] == 0, "glass is equal to glass"


def test_a_missing_file_is_named(tmp_path: Path, images: list[Path]) -> None:
    with pytest.raises(ImageUnreadable, match=r"gone\.png is not a readable image: No such file"):
        check_images(tmp_path, [*images, images[0].parent / "gone.png"])


def test_a_long_check_is_announced_once(
    tmp_path: Path, images: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mtdp.integrity._WORTH_A_WORD", 200)
    for _ in range(2):
        check_images(tmp_path, images)
    assert capsys.readouterr().err == f"decoding the 200 images of {tmp_path} once, to find damaged ones\n"


@pytest.mark.parametrize("damage", ["torn", "unwritable"])
def test_a_useless_cache_costs_time_only(tmp_path: Path, images: list[Path], damage: str) -> None:
    check_images(tmp_path, images)
    (cache,) = (path for path in (tmp_path / "cache").rglob("*") if path.is_file())
    if damage == "torn":
        cache.write_bytes(cache.read_bytes()[: 16 * 50 + 3])
        assert [check_images(tmp_path, images) for _ in range(2)] == [150, 0]
    else:  # a folder in its place can neither be read nor replaced
        cache.unlink()
        (cache / "x").mkdir(parents=True)
        assert [check_images(tmp_path, images) for _ in range(2)] == [200, 200]
        assert list(cache.parent.iterdir()) == [cache]
