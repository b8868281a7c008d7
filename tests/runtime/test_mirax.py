"""A .mrxs is nothing without its folder: where that is missing it is said, and a link is followed to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtdp_runtime.cohort.staging import Staging
from mtdp_runtime.errors import SlideUnreadable
from mtdp_runtime.slide.mirax import with_its_folder
from mtdp_runtime.slide.open import open_slide


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A slide in an archive; what stands in the files does not matter here."""
    folder = tmp_path / "archive" / "S-17"
    folder.mkdir(parents=True)
    (folder / "Slidedat.ini").write_text("[GENERAL]\n")
    (folder / "Data0000.dat").write_bytes(bytes(10))
    slide = folder.with_suffix(".mrxs")
    slide.write_bytes(b"\xff\xd8")
    return slide


def test_the_file_and_its_folder_lie_together(stored: Path) -> None:
    assert with_its_folder(stored) == stored
    assert with_its_folder(stored.with_suffix(".svs")) == stored.with_suffix(".svs")


def test_without_its_folder_it_is_refused_in_words(tmp_path: Path, stored: Path) -> None:
    lonely = tmp_path / "alone.mrxs"
    lonely.write_bytes(stored.read_bytes())
    with pytest.raises(SlideUnreadable, match=f"there is no folder {tmp_path}/alone") as caught:
        open_slide(lonely)
    assert "Copy or link the whole folder" in caught.value.hint
    (tmp_path / "alone").mkdir()
    with pytest.raises(SlideUnreadable, match=r"alone has no Slidedat\.ini"):
        open_slide(lonely)


def test_a_link_is_followed_to_the_folder(tmp_path: Path, stored: Path) -> None:
    first, second = tmp_path / "first.mrxs", tmp_path / "second.mrxs"
    first.symlink_to(stored.relative_to(tmp_path))
    second.symlink_to(first)
    assert with_its_folder(first) == with_its_folder(second) == stored
    with pytest.raises(SlideUnreadable, match=r"S-17\.mrxs: OpenSlide refuses it"):  # so the folder was found
        open_slide(second)
    (tmp_path / "first").symlink_to(stored.with_suffix(""))
    assert with_its_folder(second) == first  # the nearest that has its folder
    first.unlink()
    first.symlink_to(first)
    with pytest.raises(SlideUnreadable):
        with_its_folder(first.with_name("nothing.mrxs"))


def test_a_copy_on_a_local_disk_is_of_what_the_link_means(tmp_path: Path, stored: Path) -> None:
    link = tmp_path / "link.mrxs"
    link.symlink_to(stored)
    with Staging(tmp_path / "stage", lambda _: None) as stage:
        stage.begin(link)
        local = stage.wait(link, lambda: None)
        there = sorted(str(p.relative_to(local.parent)) for p in local.parent.rglob("*") if p.is_file())
    assert local.name == "S-17.mrxs"
    assert there == ["S-17.mrxs", "S-17/Data0000.dat", "S-17/Slidedat.ini"]
