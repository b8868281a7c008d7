"""Where a slide's scale comes from, and which scales are refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tifffile
from hypothesis import assume, given
from hypothesis import strategies as st

from mtdp_runtime.cohort.requests import list_slides
from mtdp_runtime.commands.options import target_mpp
from mtdp_runtime.errors import SlideScaleUnknown, UsageError
from mtdp_runtime.slide.open import open_slide
from mtdp_runtime.slide.scale import MAX_ANISOTROPY, imagej_scale, ome_scale, scale_of, scale_of_tags
from mtdp_runtime.tiling.grid import make_grid
from support import pyramid, stained

SLIDE = Path("s.tiff")
TAGS = {"tiff.XResolution": "40000", "tiff.YResolution": "40000", "tiff.ResolutionUnit": "centimeter"}
VENDOR = {"openslide.mpp-x": "0.46", "openslide.mpp-y": "0.46"}
OME = (
    '<OME xmlns="x"><Image><Pixels DimensionOrder="XYCZT" PhysicalSizeX="{x}" PhysicalSizeY="{x}"{unit}/></Image></OME>'
)


def test_the_vendor_stands_above_the_tags() -> None:
    assert scale_of(VENDOR | TAGS, "aperio") == (0.46, "aperio metadata (openslide.mpp-x, -y)")
    assert scale_of(TAGS, "aperio") == (0.25, "TIFF resolution tags")


def test_ome_xml_is_metadata_too() -> None:
    description = {"tiff.ImageDescription": OME.format(x=0.5, unit="")}
    assert scale_of(TAGS | description, "generic-tiff") == (0.5, "OME-XML (PhysicalSizeX, -Y)")
    nm = OME.format(x=500, unit=' PhysicalSizeXUnit="nm" PhysicalSizeYUnit="nm"')
    assert ome_scale(nm) == (0.5, "OME-XML (PhysicalSizeX, -Y)")
    pixels = OME.format(x=1, unit=' PhysicalSizeXUnit="pixel" PhysicalSizeYUnit="pixel"')
    assert ome_scale(pixels) is None


@pytest.mark.parametrize(
    ("unit", "size"),
    [
        ("µm", "0.25"),
        ("\u03bcm", "0.25"),
        ("&#181;m", "0.25"),
        ("&#xB5;m", "0.25"),
        ("&amp;#181;m", "0.25"),
        ("um", "0.25"),
        ("pm", "250000"),
        ("nm", "250"),
        ("Å", "2500"),
        ("mm", "2.5e-4"),
        ("cm", "2.5e-5"),
        ("m", "2.5e-7"),
        ("in", "9.8425196850e-6"),
        ("thou", "9.8425196850e-3"),
    ],
)
def test_a_length_is_understood_in_any_unit_and_writing(unit: str, size: str) -> None:
    xml = OME.format(x=size, unit=f' PhysicalSizeXUnit="{unit}" PhysicalSizeYUnit="{unit}"')
    mpp, source = ome_scale(xml) or (None, "")
    assert mpp == pytest.approx(0.25, rel=1e-6)
    assert source == "OME-XML (PhysicalSizeX, -Y)"


@pytest.mark.parametrize("unit", ["pixel", "reference frame", "Mm", "Pm", "ly", "furlong"])
def test_a_unit_that_is_no_small_length_says_nothing(unit: str) -> None:
    xml = OME.format(x="0.25", unit=f' PhysicalSizeXUnit="{unit}" PhysicalSizeYUnit="{unit}"')
    assert ome_scale(xml) is None


@pytest.mark.parametrize(
    ("unit", "per_unit"),
    [
        ("micron", 4),
        ("microns", 4),
        ("um", 4),
        ("µm", 4),
        ("\\u00B5m", 4),
        ("nm", 0.004),
        ("mm", 4000),
        ("cm", 40000),
        ("inch", 101600),
    ],
)
def test_imagej_says_its_unit_in_the_description(unit: str, per_unit: float) -> None:
    description = f"ImageJ=1.53t\nunit={unit}\nspacing=1.0\n"
    found = imagej_scale(description, str(per_unit), str(per_unit))
    assert found == (pytest.approx(0.25), "ImageJ description and TIFF resolution tags")
    properties = {"tiff.ImageDescription": description} | dict.fromkeys(
        ("tiff.XResolution", "tiff.YResolution"), str(per_unit)
    )
    assert scale_of(properties, "generic-tiff") == found


def test_imagej_without_a_unit_of_length_leaves_it_to_the_tags() -> None:
    for description in ("ImageJ=1.53t\nunit=pixel\n", "ImageJ=1.53t\n", "unit=micron\n"):
        assert imagej_scale(description, "4", "4") is None
    described = {"tiff.ImageDescription": "ImageJ=1.53t\nunit=micron\n"}  # 40000 pixels a micron: it is per centimetre
    assert scale_of(TAGS | described, "generic-tiff") == (0.25, "TIFF resolution tags")


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "half"])
def test_where_the_vendors_number_cannot_be_the_tags_are_asked(text: str) -> None:
    properties = TAGS | {"openslide.mpp-x": text, "openslide.mpp-y": text}
    assert scale_of(properties, "aperio") == (0.25, "TIFF resolution tags")


@pytest.mark.parametrize(
    ("name", "text"),
    [("MPP", "0.25 um"), ("mpp", "0.25"), ("MPP", "0.25;"), ("Mpp", "250 nm"), ("MPP", "0,25 µm")],
)
def test_aperios_number_is_read_where_openslide_does_not(name: str, text: str) -> None:
    assert scale_of({f"aperio.{name}": text}, "aperio") == (pytest.approx(0.25), "aperio metadata (MPP)")
    assert scale_of({f"aperio.{name}": f"{text} x"}, "aperio")[0] is None


@given(mpp=st.floats(0.011, 99))
def test_a_scale_that_no_scanner_has_is_not_believed_whoever_says_it(mpp: float) -> None:
    assume(min(abs(mpp / 0.05 - 1), abs(mpp / 20 - 1)) > 1e-9)  # the tags' quotient rounds there
    per_cm = str(1e4 / mpp)
    found = [
        scale_of({"openslide.mpp-x": str(mpp), "openslide.mpp-y": str(mpp)}, "aperio"),
        ome_scale(OME.format(x=mpp, unit="")) or (None, ""),
    ]
    if mpp < 9.9:
        found.append(scale_of_tags(per_cm, per_cm, "centimeter"))
    for value, why in found:
        if 0.05 <= mpp <= 20:
            assert value == pytest.approx(mpp)
        else:
            assert value is None
            assert "most likely an error of the file" in why


def test_a_suspicious_scale_ends_in_a_refusal_that_names_the_option(tmp_path: Path) -> None:
    path = pyramid(stained(256, 256), tmp_path / "tenfold.tif", 0.025)
    with (
        open_slide(path) as slide,
        pytest.raises(SlideScaleUnknown, match=r"0\.025 µm/px.*error of the file") as caught,
    ):
        make_grid(slide.info, 64, 0.5)
    assert "--slide-mpp" in caught.value.hint
    with open_slide(path, 0.25, "--slide-mpp") as slide:
        assert slide.info.mpp == 0.25


def test_pixels_that_are_not_square_are_the_users_to_overrule(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tif"
    metadata = {"axes": "YXS", "PhysicalSizeX": 0.25, "PhysicalSizeY": 0.5}
    tifffile.imwrite(path, stained(256, 256), ome=True, photometric="rgb", metadata=metadata)
    with (
        open_slide(path) as slide,
        pytest.raises(SlideScaleUnknown, match=r"0\.25 x 0\.5 µm/px: the pixels are not square"),
    ):
        make_grid(slide.info, 64, 0.5)
    with open_slide(path, 0.25, "--slide-mpp") as slide:
        assert (slide.info.mpp, slide.info.mpp_source) == (0.25, "--slide-mpp")


def test_the_scale_is_level_0s_and_not_the_first_directorys(tmp_path: Path) -> None:
    image = stained(512, 768)
    path = tmp_path / "small-first.tif"
    with tifffile.TiffWriter(path) as tiff:
        for pixels, per_cm in ((image[::4, ::4], 5000), (image, 20000)):
            tiff.write(
                pixels,
                tile=(128, 128),
                photometric="rgb",
                metadata=None,
                resolution=(per_cm, per_cm),
                resolutionunit="CENTIMETER",
                subfiletype=1,
            )
    with open_slide(path) as slide:
        assert (slide.info.width, slide.info.height) == (768, 512)
        assert (slide.info.mpp, slide.info.mpp_source) == (0.5, "TIFF resolution tags")


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


@pytest.mark.parametrize("dpi", [1, 72, 96, 150, 300, 600, 1200, 2400])
def test_a_printers_resolution_is_no_scale(dpi: int) -> None:
    mpp, why = scale_of_tags(str(dpi), str(dpi), "inch")
    assert mpp is None
    assert f"{dpi} dpi" in why


@pytest.mark.parametrize("name", ["boxes.tiff", "yb10kx5k.zstd.tiff"])
def test_real_slides_with_a_printers_resolution(slides_dir: Path, name: str) -> None:
    with open_slide(slides_dir / "odd" / name) as slide:
        assert slide.info.mpp is None
        assert "dpi" in slide.info.mpp_source


@given(mpp=st.floats(0.06, 5), stretch=st.floats(0.9, 1.1))
def test_pixels_are_square_to_a_hundredth(mpp: float, stretch: float) -> None:
    properties = {"openslide.mpp-x": str(mpp), "openslide.mpp-y": str(mpp * stretch)}
    if abs(1 / stretch - 1) <= MAX_ANISOTROPY * 0.999:
        found, _ = scale_of(properties, "hamamatsu")
        assert found == pytest.approx(mpp, rel=0.006)
    elif abs(1 / stretch - 1) >= MAX_ANISOTROPY * 1.001:
        found, why = scale_of(properties, "hamamatsu")
        assert found is None
        assert "the pixels are not square" in why


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "1e-9", "40000", "half"])
def test_an_absurd_scale_of_the_slide_is_unknown_and_says_so(text: str) -> None:
    mpp, why = scale_of({"openslide.mpp-x": text, "openslide.mpp-y": text}, "aperio")
    assert mpp is None
    assert why.endswith(("which cannot be", "which are no numbers"))


@pytest.mark.parametrize("mpp", [0, -1, float("nan"), float("inf"), 1e-9, 4e4])
def test_an_absurd_scale_of_the_user_is_refused(tmp_path: Path, mpp: float) -> None:
    with pytest.raises(UsageError, match="not a scale"):
        list_slides([SLIDE], mpp)
    with pytest.raises(UsageError, match="not a scale"):
        target_mpp([mpp], None)
    if math.isnan(mpp):
        return  # in a table it is pandas' way to say nothing
    (tmp_path / "m.csv").write_text(f"slide,mpp\na.svs,{mpp}\n")
    with pytest.raises(UsageError, match="is not a scale"):
        list_slides([tmp_path / "m.csv"])


def test_magnification_is_another_word_for_mpp() -> None:
    assert target_mpp(None, [20]) == (0.5,)
    assert target_mpp(None, [40]) == (0.25,)
    with pytest.raises(UsageError, match="twice"):
        target_mpp([0.5], [20])
    for wrong in (0, -20, float("nan")):
        with pytest.raises(UsageError, match="--magnification"):
            target_mpp(None, [wrong])


SIZED = (
    '<OME xmlns="x"><Image><Pixels DimensionOrder="XYCZT" Type="uint8" SizeX="{x}" SizeY="{y}" SizeC="3" SizeZ="1" '
    'SizeT="1" PhysicalSizeX="0.25" PhysicalSizeY="0.25"><Channel SamplesPerPixel="3"/></Pixels></Image></OME>'
)
APERIO = "Aperio Image Library v11\r\n{scan} [{place} {part}] (256x256){became} JPEG/RGB Q=70|AppMag = 40|MPP = 0.25"


@pytest.mark.parametrize("suffix", [".tif", ".ome.tif", ".svs"])
@pytest.mark.parametrize("factor", [0.5, 2, 3.1])
def test_a_description_of_the_picture_before_it_was_resized_gives_no_scale(
    tmp_path: Path, suffix: str, factor: float
) -> None:
    """Tools that resize hand it on; where the resolution tags were mended, they are right."""
    width, height = round(300 * factor), round(200 * factor)
    size = f"{width}x{height}"
    text = (
        APERIO.format(scan=size, place="0,0", part=size, became="")
        if suffix == ".svs"
        else SIZED.format(x=width, y=height)
    )
    how: dict[str, Any] = {"photometric": "rgb", "tile": (64, 64), "compression": "jpeg", "metadata": None}
    path = tmp_path / f"slide{suffix}"
    for per_cm, mpp in ((40_000, None), (40_000 / factor, 0.25 * factor)):
        tifffile.imwrite(
            path, stained(200, 300), description=text, resolution=(per_cm, per_cm), resolutionunit="CENTIMETER", **how
        )
        with open_slide(path) as slide:
            assert slide.info.mpp == (None if mpp is None else pytest.approx(mpp, rel=1e-3))
            assert mpp is not None or "it was resized" in slide.info.mpp_source


@pytest.mark.parametrize(
    ("scan", "place", "part", "became"),
    [
        ("300x200", "0,0", "300x200", ""),
        ("46920x33014", "0,100", "300x200", ""),
        ("46920x33014", "7000,100", "2000x2967", ""),  # and a part of that was cut out
        ("1200x800", "0,0", "1200x800", " -> 300x200"),
    ],
)
def test_a_part_of_a_slide_has_the_scale_of_the_slide(scan: str, place: str, part: str, became: str) -> None:
    text = APERIO.format(scan=scan, place=place, part=part, became=became)
    assert scale_of(VENDOR | {"tiff.ImageDescription": text}, "aperio", (300, 200))[0] == 0.46
    assert scale_of({"tiff.ImageDescription": SIZED.format(x=4000, y=800)}, "generic-tiff", (300, 200))[0] == 0.25


@pytest.mark.parametrize(("text", "mpp"), [("0.25 µm/px", 0.25), ("250nm/pixel", 0.25), ("0.2.5", None)])
def test_aperios_number_may_have_its_unit(text: str, mpp: float | None) -> None:
    assert scale_of({"aperio.MPP": text}, "aperio")[0] == (None if mpp is None else pytest.approx(mpp))
