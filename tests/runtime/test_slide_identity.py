"""A slide that was copied again after damage is another one; a slide that was only touched is not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from mtdp_runtime.backends.onnxruntime import OnnxRuntime
from mtdp_runtime.bundle import load_bundle
from mtdp_runtime.errors import FingerprintMismatch
from mtdp_runtime.extraction import unchanged
from mtdp_runtime.extraction.extract import extract_slide
from mtdp_runtime.extraction.models import Model, Target
from mtdp_runtime.extraction.outcome import Outcome
from mtdp_runtime.settings import ExtractSettings
from mtdp_runtime.slide.identity import hint_of, sample_of
from mtdp_runtime.slide.open import open_slide
from support import damage_tile, pyramid, stained

Run = Callable[..., Outcome]


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    """Two levels: the hash that OpenSlide gives is of the smaller one, and says nothing of the tiles."""
    return pyramid(stained(384, 512), tmp_path / "slide.tiff", 0.5, 2, lossy=True)


@pytest.fixture
def run(tiny_bundle: Path, tmp_path: Path) -> Run:
    """Extract `tmp_path/slide.tiff` to `tmp_path/slide.h5`."""

    def once(overwrite: bool = False) -> Outcome:
        bundle = load_bundle(tiny_bundle)
        settings = ExtractSettings(mpp=0.5, stride_px=64, min_tissue=0)
        with OnnxRuntime.load(bundle, "fp32", 4, 1) as engine, open_slide(tmp_path / "slide.tiff") as slide:
            target = Target(tmp_path / "slide.h5", Model(bundle, engine))
            return extract_slide(slide, [target], settings, readers=1, overwrite=overwrite)[0]

    return once


def bad_rows(path: Path) -> int:
    with h5py.File(path) as file:
        return int((file["status"][:] != 0).sum())


def damaged_and_repaired(slide: Path, run: Run, tmp_path: Path) -> None:
    """A slide whose tile is damaged is extracted; then the intact slide takes its place, as the hint says."""
    whole = shutil.copyfile(slide, tmp_path / "whole.tiff")
    damage_tile(slide, 5)
    assert run().bad_tiles > 0
    shutil.copyfile(whole, slide)


def test_rows_of_a_damaged_slide_are_not_kept_when_it_is_repaired(slide: Path, run: Run, tmp_path: Path) -> None:
    damaged_and_repaired(slide, run, tmp_path)
    with pytest.raises(FingerprintMismatch, match="the slide has another content now") as caught:
        run()
    assert "--overwrite" in caught.value.hint
    assert bad_rows(tmp_path / "slide.h5") > 0, "nothing is replaced unasked"
    assert run(overwrite=True).status == "done"
    assert bad_rows(tmp_path / "slide.h5") == 0
    assert run().message == "already done"


@pytest.mark.parametrize("older", [False, True])
def test_bad_tiles_that_can_be_read_now_tell_where_the_sample_does_not(
    slide: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, older: bool
) -> None:
    """A sample of a large slide may miss one tile; a file of an earlier version has none."""
    monkeypatch.setattr(unchanged, "sample_of", lambda path: "")
    damaged_and_repaired(slide, run, tmp_path)
    if older:
        with h5py.File(tmp_path / "slide.h5", "r+") as file:
            del file.attrs[unchanged.HINT], file.attrs[unchanged.SAMPLE]
    with pytest.raises(FingerprintMismatch, match="could not be read then can be read now"):
        run()


def test_a_file_of_an_earlier_version_still_counts_as_done(slide: Path, run: Run, tmp_path: Path) -> None:
    damage_tile(slide, 5)
    run()
    with h5py.File(tmp_path / "slide.h5", "r+") as file:
        del file.attrs[unchanged.HINT], file.attrs[unchanged.SAMPLE], file.attrs["checksums"]
    assert run().message == "already done", "its bad tiles are as bad as then"


def test_a_slide_that_was_touched_or_moved_back_is_the_same(slide: Path, run: Run, tmp_path: Path) -> None:
    run()
    os.utime(slide, ns=(1, 1))
    assert run().message == "already done"
    slide.rename(tmp_path / "elsewhere.tiff")
    shutil.copyfile(tmp_path / "elsewhere.tiff", slide)
    assert run().message == "already done"


def test_another_slide_with_the_same_size_and_time_is_noticed(slide: Path, run: Run, tmp_path: Path) -> None:
    """As `rsync -t` copies it: it sets the time that the source had."""
    before = slide.stat()
    run()
    damage_tile(slide, 6)
    os.utime(slide, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert slide.stat().st_size == before.st_size
    with pytest.raises(FingerprintMismatch, match="another content"):
        run()


def test_nothing_of_an_unchanged_slide_is_read_again(
    slide: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run()

    def never(path: Path) -> str:
        raise AssertionError("a sample was taken")

    monkeypatch.setattr(unchanged, "sample_of", never)
    assert run().message == "already done"


def test_a_sample_is_spread_over_all_files_of_a_slide(tmp_path: Path) -> None:
    slide, data = tmp_path / "a.mrxs", tmp_path / "a"
    data.mkdir()
    slide.write_bytes(b"index")
    (data / "Slidedat.ini").write_bytes(b"[GENERAL]")
    rng = np.random.default_rng(0)
    for number in range(3):
        (data / f"Data{number}.dat").write_bytes(rng.bytes(3_000_000))
    first, hint = sample_of(slide), hint_of(slide)
    assert len(first) == 32
    for number in range(3):
        path = data / f"Data{number}.dat"
        content = path.read_bytes()
        path.write_bytes(content[:1_000_000] + bytes(1_000_000) + content[2_000_000:])
        assert sample_of(slide) != first
        assert hint_of(slide) != hint
        path.write_bytes(content)
        assert sample_of(slide) == first
    (data / "Data2.dat").unlink()
    assert sample_of(slide) != first
    assert (sample_of(tmp_path / "none.svs"), hint_of(tmp_path / "none.svs")) == ("", "")


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1])
def test_a_small_slide_is_its_own_sample(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.svs"
    content = bytearray(np.random.default_rng(0).bytes(size))
    path.write_bytes(content)
    first = sample_of(path)
    for place in {0, size // 2, size - 1} if 0 < size <= 1 << 20 else ():
        content[place] ^= 1
        path.write_bytes(content)
        assert sample_of(path) != first
        content[place] ^= 1
