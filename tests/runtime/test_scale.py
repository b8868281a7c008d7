"""Where a slide's scale comes from, and which scales are refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtdp_runtime.cohort.requests import list_slides
from mtdp_runtime.commands.extract import _target
from mtdp_runtime.errors import SlideUnreadable, UsageError
from mtdp_runtime.slide.open import open_slide
from mtdp_runtime.slide.scale import MAX_ANISOTROPY, ome_scale, scale_of, scale_of_tags

SLIDE = Path("s.tiff")
TAGS = {"tiff.XResolution": "40000", "tiff.YResolution": "40000", "tiff.ResolutionUnit": "centimeter"}
VENDOR = {"openslide.mpp-x": "0.46", "openslide.mpp-y": "0.46"}
OME = (
    '<OME xmlns="x"><Image><Pixels DimensionOrder="XYCZT" PhysicalSizeX="{x}" PhysicalSizeY="{x}"{unit}/></Image></OME>'
)


def test_the_vendor_stands_above_the_tags() -> None:
    assert scale_of(SLIDE, VENDOR | TAGS, "aperio") == (0.46, "aperio metadata (openslide.mpp-x, -y)")
    assert scale_of(SLIDE, TAGS, "aperio") == (0.25, "TIFF resolution tags")


def test_ome_xml_is_metadata_too() -> None:
    description = {"tiff.ImageDescription": OME.format(x=0.5, unit="")}
    assert scale_of(SLIDE, TAGS | description, "generic-tiff") == (0.5, "OME-XML (PhysicalSizeX, -Y)")
    nm = OME.format(x=500, unit=' PhysicalSizeXUnit="nm" PhysicalSizeYUnit="nm"')
    assert ome_scale(SLIDE, nm) == (0.5, "OME-XML (PhysicalSizeX, -Y)")
    pixels = OME.format(x=1, unit=' PhysicalSizeXUnit="pixel" PhysicalSizeYUnit="pixel"')
    assert ome_scale(SLIDE, pixels) is None


def test_what_the_user_says_stands_above_all(slides_dir: Path, tmp_path: Path) -> None:
    slide = slides_dir / "CMU-1-Small-Region.svs"
    (tmp_path / "m.csv").write_text(f"slide,mpp\n{slide},0.3\n")
    for requests, mpp, source in (
        (list_slides([slide]), 0.499, "aperio metadata (openslide.mpp-x, -y)"),
        (list_slides([tmp_path / "m.csv"]), 0.3, "the manifest m.csv"),
        (list_slides([tmp_path / "m.csv"], slide_mpp=0.2), 0.2, "--slide-mpp"),
    ):
        with open_slide(requests[0].path, requests[0].mpp, requests[0].given_by) as opened:
            assert (opened.info.mpp, opened.info.mpp_source) == (mpp, source)


@pytest.mark.parametrize("dpi", [1, 72, 96, 150, 300, 600, 1200])
def test_a_printers_resolution_is_no_scale(dpi: int) -> None:
    mpp, why = scale_of_tags(SLIDE, str(dpi), str(dpi), "inch")
    assert mpp is None
    assert f"{dpi} dpi" in why


@pytest.mark.parametrize("name", ["boxes.tiff", "yb10kx5k.zstd.tiff"])
def test_real_slides_with_a_printers_resolution(slides_dir: Path, name: str) -> None:
    with open_slide(slides_dir / "odd" / name) as slide:
        assert slide.info.mpp is None
        assert "dpi" in slide.info.mpp_source


@given(mpp=st.floats(0.05, 5), stretch=st.floats(0.9, 1.1))
def test_pixels_are_square_to_a_hundredth(mpp: float, stretch: float) -> None:
    properties = {"openslide.mpp-x": str(mpp), "openslide.mpp-y": str(mpp * stretch)}
    if abs(1 / stretch - 1) <= MAX_ANISOTROPY * 0.999:
        found, _ = scale_of(SLIDE, properties, "hamamatsu")
        assert found == pytest.approx(mpp, rel=0.006)
    elif abs(1 / stretch - 1) >= MAX_ANISOTROPY * 1.001:
        with pytest.raises(SlideUnreadable, match="pixels are not square"):
            scale_of(SLIDE, properties, "hamamatsu")


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "1e-9", "40000", "half"])
def test_an_absurd_scale_of_the_slide_is_unknown_and_says_so(text: str) -> None:
    mpp, why = scale_of(SLIDE, {"openslide.mpp-x": text, "openslide.mpp-y": text}, "aperio")
    assert mpp is None
    assert why.endswith(("which cannot be", "which are no numbers"))


@pytest.mark.parametrize("mpp", [0, -1, float("nan"), float("inf"), 1e-9, 4e4])
def test_an_absurd_scale_of_the_user_is_refused(tmp_path: Path, mpp: float) -> None:
    with pytest.raises(UsageError, match="not a scale"):
        list_slides([SLIDE], mpp)
    with pytest.raises(UsageError, match="not a scale"):
        _target(mpp, None)
    if math.isnan(mpp):
        return  # in a table it is pandas' way to say nothing
    (tmp_path / "m.csv").write_text(f"slide,mpp\na.svs,{mpp}\n")
    with pytest.raises(UsageError, match="is not a scale"):
        list_slides([tmp_path / "m.csv"])


def test_magnification_is_another_word_for_mpp() -> None:
    assert _target(None, 20) == 0.5
    assert _target(None, 40) == 0.25
    with pytest.raises(UsageError, match="twice"):
        _target(0.5, 20)
    for wrong in (0, -20, float("nan")):
        with pytest.raises(UsageError, match="--magnification"):
            _target(None, wrong)
