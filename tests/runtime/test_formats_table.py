"""docs/formats.md is true: a file for each row is made, and the answer is the row's."""

from __future__ import annotations

import importlib.util
import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import simplejpeg
import tifffile
from numpy.typing import NDArray
from PIL import Image

from mtdp_runtime.errors import RuntimeFailure, SlideUnreadable
from mtdp_runtime.slide import Slide
from mtdp_runtime.slide.open import open_slide
from support import stained

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "formats.md").read_text()
SIDE = 128
RGB: NDArray[np.uint8] = stained(SIDE, SIDE)
GREY = RGB[..., 1].copy()
PLANES = np.moveaxis(RGB, -1, 0).copy()
APERIO = f"Aperio Image Library v11\n{SIDE}x{SIDE} [0,0 {SIDE}x{SIDE}] ({SIDE}x{SIDE}) |AppMag = 40|MPP = 0.25"
CODES = {
    "none": None, "LZW": "lzw", "Deflate": "zlib", "Zstandard": "zstd", "PackBits": "packbits", "JPEG": "jpeg",
    "WebP": "webp", "JPEG XL": "jpegxl", "LZMA": "lzma", "LERC": "lerc", "JPEG 2000, 34712": 34712,
    "JPEG 2000, 33003": 33003, "JPEG 2000, 33005": 33005,
}  # fmt: skip
CONTAINERS: dict[str, dict[str, Any]] = {
    "Aperio SVS": {"tile": (SIDE, SIDE), "description": APERIO, "metadata": None},
    "tiles": {"tile": (SIDE, SIDE), "metadata": None},
    "strips": {"rowsperstrip": SIDE // 2, "metadata": None},
    "OME": {"tile": (SIDE, SIDE), "ome": True, "metadata": {"axes": "YXS"}},
}
PIXELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "RGB": (RGB, {"photometric": "rgb"}),
    "RGB and alpha": (np.dstack([RGB, 255 + 0 * GREY]), {"photometric": "rgb", "extrasamples": ["unassalpha"]}),
    "RGB and a fourth channel": (np.dstack([RGB, GREY]), {"photometric": "rgb", "extrasamples": ["unspecified"]}),
    "RGB and two more channels": (np.dstack([RGB, RGB[..., :2]]), {"photometric": "rgb", "extrasamples": [0, 0]}),
    "planes for red, green and blue": (PLANES, {"photometric": "rgb", "planarconfig": "separate"}),
    "YCbCr": (RGB, {"photometric": "ycbcr", "subsampling": (1, 1)}),
    "palette": (GREY, {"photometric": "palette", "colormap": np.tile(np.arange(256, dtype=np.uint16) * 257, (3, 1))}),
    "one channel of grey, bright": (GREY, {"photometric": "minisblack"}),
    "one channel of grey": (GREY, {"photometric": "minisblack"}),
    "one channel of grey, dark": (GREY // 4, {"photometric": "minisblack"}),
    "a page for each channel": (PLANES, {"photometric": "minisblack"}),
    "signed": (RGB.astype(np.int8), {"photometric": "rgb"}),
    "16 bits": (RGB * np.uint16(257), {"photometric": "rgb"}),
    "12 bits in 16": (RGB * np.uint16(16), {"photometric": "rgb"}),
    "float": (RGB / np.float32(255), {"photometric": "rgb"}),
    "one bit": (GREY > 128, {"photometric": "minisblack"}),
    "four inks": (np.dstack([255 - RGB, 0 * GREY]), {"photometric": "separated"}),
    "CIE L*a*b*": (RGB, {"photometric": "cielab"}),
    "RGB, turned (Orientation 2 to 8)": (RGB, {"photometric": "rgb", "extratags": [(274, 3, 1, 6, True)]}),
}
CHANNELS = {
    "a page for each of red, green and blue": (RGB, ["Red", "Green", "Blue"]),
    "a page for each of three channels, no names, bright": (RGB, None),
    "a page for each of three channels, no names, dark": (RGB // 4, None),
    "a page for each of three stains": (RGB, ["DAPI", "FITC", "Cy5"]),
    "a page for each of four channels": (np.dstack([RGB, GREY]), None),
}


def write_code(path: Path, container: str, code: bytes, photometric: str, compression: int, **how: Any) -> None:
    """Write a tile as it is, under a compression and with colours that the TIFF says."""
    tifffile.imwrite(
        path, iter([code]), shape=(SIDE, SIDE, 3), dtype=np.uint8, photometric="ycbcr", subsampling=(1, 1),
        compression="jpeg", **CONTAINERS[container], **how,
    )  # fmt: skip
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tags = tiff.pages[0].tags
        tags["Compression"].overwrite(compression)
        tags["PhotometricInterpretation"].overwrite({"rgb": 2, "ycbcr": 6, "separated": 5}[photometric])


def jpeg_2000(**how: Any) -> bytes:
    return bytes(imagecodecs.jpeg2k_encode(RGB, codecformat="j2k", level=60, **how))


def subsampled(path: Path) -> None:
    code = bytearray(jpeg_2000(mct=False))
    at = code.index(b"\xff\x51")
    code[at + 43 : at + 49] = b"\x07\x02\x01\x07\x02\x01"
    write_code(path, "Aperio SVS", bytes(code), "rgb", 33003)


def sub_ifds(path: Path) -> None:
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(RGB, tile=(64, 64), subifds=1, photometric="rgb", compression="zlib", metadata=None)
        tiff.write(RGB[::2, ::2].copy(), tile=(64, 64), subfiletype=1, photometric="rgb", metadata=None)


def units(path: Path) -> None:
    """YCbCr of which four pixels share a colour difference: 6 bytes for each 2 x 2."""
    code = imagecodecs.lzw_encode(bytes(SIDE * SIDE * 3 // 2))
    write_code(path, "tiles", code, "ycbcr", 5)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tiff.pages[0].tags["YCbCrSubSampling"].overwrite((2, 2))


def inks() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(RGB).convert("CMYK").save(stream, "JPEG")
    return stream.getvalue()


def zarr_of(version: str, pixels: NDArray[Any], *names: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        zarr = pytest.importorskip("zarr")
        group = zarr.open_group(str(path), mode="w", zarr_format=2 if version == "0.4" else 3)
        data = np.moveaxis(pixels, -1, 0)
        group.create_array("0", shape=data.shape, dtype=data.dtype, chunks=(1, 64, 64))[...] = data
        axes = [{"name": name, "type": "channel" if name == "c" else "space"} for name in "cyx"]
        told: dict[str, Any] = {"multiscales": [{"version": version, "axes": axes, "datasets": [{"path": "0"}]}]}
        if names:
            told["omero"] = {"channels": [{"label": name} for name in names]}
        group.attrs.update(told if version == "0.4" else {"ome": {"version": version, **told}})

    return make


def picture(pixels: Any, kind: str, **how: Any) -> Callable[[Path], None]:
    return lambda path: Image.fromarray(pixels).save(path, kind, **how)


def exif() -> Image.Exif:
    told = Image.Exif()
    told[0x0112] = 6
    return told


def deep_jpeg(path: Path) -> None:
    code = imagecodecs.jpeg8_encode(RGB * np.uint16(16), level=90, bitspersample=12)
    write_code(path, "tiles", code, "ycbcr", 7)


GREY_JPEG = simplejpeg.encode_jpeg(GREY[..., None].copy(), 90, "GRAY")
YCBCR_JPEG = simplejpeg.encode_jpeg(RGB, 90, "RGB", "444")
BARE_JPEG = imagecodecs.jpeg8_encode(RGB, level=90, colorspace="RGB", outcolorspace="RGB")
DEEP = RGB * np.uint16(257)
OF_THEIR_OWN: dict[tuple[str, str, str], Callable[[Path], None]] = {
    ("Aperio SVS", "JPEG", "RGB"): lambda path: write_code(path, "Aperio SVS", BARE_JPEG, "rgb", 7),
    ("Aperio SVS", "JPEG 2000, 33003", "YCbCr"): lambda path: write_code(
        path, "Aperio SVS", jpeg_2000(mct=False), "rgb", 33003
    ),
    ("Aperio SVS", "JPEG 2000, 33005", "RGB"): lambda path: write_code(path, "Aperio SVS", jpeg_2000(), "rgb", 33005),
    ("Aperio SVS", "JPEG 2000, 33003", "YCbCr, subsampled"): subsampled,
    ("tiles", "JPEG", "RGB"): lambda path: write_code(path, "tiles", BARE_JPEG, "rgb", 7),
    ("tiles", "JPEG", "RGB by the TIFF, YCbCr by the JPEG"): lambda path: write_code(
        path, "tiles", YCBCR_JPEG, "rgb", 7
    ),
    ("tiles", "JPEG", "12 bits"): deep_jpeg,
    ("tiles", "JPEG", "grey in a TIFF of RGB"): lambda path: write_code(path, "tiles", GREY_JPEG, "rgb", 7),
    ("tiles", "JPEG", "four inks"): lambda path: write_code(path, "tiles", inks(), "rgb", 7),
    ("tiles", "old-style JPEG", "RGB"): lambda path: write_code(path, "tiles", YCBCR_JPEG, "rgb", 6),
    ("tiles", "JPEG 2000, 33003", "YCbCr"): lambda path: write_code(
        path, "tiles", jpeg_2000(mct=False), "ycbcr", 33003
    ),
    ("tiles", "Deflate", "RGB, levels in SubIFDs"): sub_ifds,
    ("tiles", "LZW", "YCbCr, subsampled"): units,
    ("OME-Zarr 0.4", "Zstandard", "RGB"): zarr_of("0.4", RGB),
    ("OME-Zarr 0.5", "Zstandard", "RGB"): zarr_of("0.5", RGB),
    ("OME-Zarr 0.4", "Zstandard", "three stains"): zarr_of("0.4", RGB, "DAPI", "FITC", "Cy5"),
    ("OME-Zarr 0.4", "Zstandard", "16 bits"): zarr_of("0.4", DEEP),
    ("PNG", "Deflate", "RGB"): picture(RGB, "PNG"),
    ("PNG", "Deflate", "RGB and alpha"): picture(PIXELS["RGB and alpha"][0], "PNG"),
    ("PNG", "Deflate", "one channel of grey, bright"): picture(GREY, "PNG"),
    ("PNG", "Deflate", "palette"): lambda path: Image.fromarray(RGB).quantize(32).save(path, "PNG"),
    ("PNG", "Deflate", "16 bits"): picture(DEEP[..., 0].copy(), "PNG"),
    ("JPEG", "JPEG", "YCbCr"): picture(RGB, "JPEG"),
    ("JPEG", "JPEG", "RGB, turned (Orientation 2 to 8)"): picture(RGB, "JPEG", exif=exif()),
    ("JPEG", "JPEG", "four inks"): lambda path: Path(path).write_bytes(inks()) and None,
}


def make(path: Path, container: str, compression: str, pixels: str) -> None:
    own = OF_THEIR_OWN.get((container, compression, pixels))
    if own is not None:
        own(path)
    elif pixels in CHANNELS:
        image, names = CHANNELS[pixels]
        metadata = {"axes": "CYX", **({"Channel": {"Name": names}} if names else {})}
        how = {**CONTAINERS[container], "metadata": metadata, "compression": CODES[compression]}
        tifffile.imwrite(path, np.moveaxis(image, -1, 0).copy(), photometric="minisblack", **how)
    else:
        data, how = PIXELS[pixels]
        how = {**how, "compression": CODES[compression]}
        if container == "OME" and data.shape[:2] != (SIDE, SIDE):
            how["metadata"] = {"axes": "SYX"}
        elif container == "OME" and data.ndim == 2:
            how["metadata"] = {"axes": "YX"}
        tifffile.imwrite(path, data, **{**CONTAINERS[container], **how})


def answer_of(slide: Slide) -> str:
    names = {"mtdp tiled": "fast", "tifffile": "image", "openslide": "openslide", "Pillow": "picture", "zarr": "zarr"}
    return next(answer for start, answer in names.items() if slide.info.reader.startswith(start))


def rows(heading: str, columns: int) -> list[tuple[str, ...]]:
    """Return the rows of the document's first table below a heading."""
    text = DOCUMENT.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    found = [
        tuple(cell.strip() for cell in line.strip("|").split("|")) for line in text.splitlines() if line[:1] == "|"
    ]
    assert all(len(row) == columns for row in found)
    return found[2:]


@pytest.mark.parametrize(("container", "compression", "pixels", "answer"), rows("TIFF and pictures", 4))
def test_a_file_of_each_kind_gets_the_answer_of_its_row(
    tmp_path: Path, container: str, compression: str, pixels: str, answer: str
) -> None:
    for suffix in (".tif", ".svs", ".btf"):
        path = tmp_path / f"image{suffix}"
        make(path, container, compression, pixels)
        if answer == "refused":
            with pytest.raises(SlideUnreadable) as caught:
                open_slide(path, 0.5)
            assert caught.value.hint
            assert not re.search(r"damaged|not defined|has no attribute", str(caught.value))
            continue
        with open_slide(path, 0.5) as slide:
            assert answer_of(slide) == answer
            out = np.zeros((SIDE, SIDE, 3), np.uint8)
            slide.read_into(out, 0, 0, 1.0)
            if "YCbCr" not in pixels and "subsampled" not in pixels:  # else the codes are not those of the picture
                expected = (
                    GREY[..., None].repeat(3, 2)
                    if "grey" in pixels or (container, pixels) == ("tiles", "palette")
                    else RGB
                )
                # The bound tells right colours from wrong ones; how exact each codec is, other tests say.
                assert np.abs(out.astype(int) - expected).mean() < (30 if container == "PNG" else 12)


def find(name: str, slides_dir: Path) -> Path | None:
    for folder in (slides_dir, slides_dir / "odd"):
        if (folder / name).is_file():
            return folder / name
    for package, inside in (("skimage", "data"), ("datashader", "tests/data")):
        spec = importlib.util.find_spec(package)
        for place in (spec.submodule_search_locations or ()) if spec else ():
            if (Path(place) / inside / name).is_file():
                return Path(place) / inside / name
    return None


@pytest.mark.parametrize(("name", "origin", "answer"), rows("Real files", 3))
def test_real_files_get_the_answer_of_their_row(slides_dir: Path, name: str, origin: str, answer: str) -> None:
    path = find(name, slides_dir)
    if path is None:
        pytest.skip(f"{name} ({origin}) is not here")
    if answer == "refused":
        with pytest.raises(SlideUnreadable):
            open_slide(path, 0.5)
        return
    with open_slide(path, 0.5) as slide:
        assert answer_of(slide) == answer


@pytest.mark.skipif("MTDP_PICTURES" not in os.environ, reason="MTDP_PICTURES names a folder of pictures to open")
def test_any_picture_is_read_or_refused() -> None:
    seen = 0
    for path in sorted(Path(os.environ["MTDP_PICTURES"]).rglob("*")):
        if path.suffix.lower() not in (".tif", ".tiff", ".png", ".jpg", ".jpeg", ".svs"):
            continue
        seen += 1
        try:
            with open_slide(path, 0.5) as slide:
                slide.read_into(np.zeros((64, 64, 3), np.uint8), 0, 0, 1.0)
        except RuntimeFailure:
            continue
    assert seen
