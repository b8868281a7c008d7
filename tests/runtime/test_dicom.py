"""DICOM slides: every frame in its place, in its colours, or an error; each level as coarse as it is."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import openslide
import pytest
import simplejpeg
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dicom_files import EXPLICIT, IMPLICIT, J2K, J2K_LOSSLESS, JPEG, RLE, Written, rle, tiles_of, write_dicom
from mtdp_runtime.errors import SlideError, SlideUnreadable, TileUnreadable
from mtdp_runtime.slide import Slide
from mtdp_runtime.slide.dicom_frames import plainly
from mtdp_runtime.slide.dicom_slide import DicomReader
from mtdp_runtime.slide.open import open_slide
from support import read_square, stained

Image = NDArray[np.uint8]
WIDTH, HEIGHT, TILE = 300, 200, (64, 48)  # 5 x 5 tiles, the last ones not whole
SAYS = Written((WIDTH, HEIGHT), TILE)


@pytest.fixture(scope="module")
def image(slides_dir: Path) -> Image:
    """Real tissue beside glass: what the colours of its pixels are is plain."""
    with openslide.OpenSlide(slides_dir / "CMU-1-Small-Region.svs") as slide:
        return np.array(slide.read_region((500, 760), 0, (WIDTH, HEIGHT)))[..., :3]


def frames_of(image: Image, encode: Callable[[Image], bytes], tile: tuple[int, int] = TILE) -> list[bytes]:
    return [encode(one) for one in tiles_of(image, tile)]


def whole(slide: Slide) -> Image:
    out = np.zeros((slide.info.height, slide.info.width, 3), np.uint8)
    slide.read_into(out, 0, 0, 1.0)
    return out


def ycbcr(rgb: Image) -> Image:
    """JPEG's YCbCr (ITU-T T.871), written plainly."""
    matrix = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
    return np.clip(np.rint(rgb @ matrix.T + (0, 128, 128)), 0, 255).astype(np.uint8)


def raw(tile: Image) -> bytes:
    return tile.tobytes()


def raw_planes(tile: Image) -> bytes:
    return np.moveaxis(tile, 2, 0).tobytes()


def j2k(colour_transform: bool) -> Callable[[Image], bytes]:
    return lambda tile: bytes(imagecodecs.jpeg2k_encode(tile, codecformat="j2k", mct=colour_transform, level=0))


def jpeg(sampling: str) -> Callable[[Image], bytes]:
    return lambda tile: bytes(simplejpeg.encode_jpeg(tile, 95, "RGB", sampling))


def jpeg_rgb(tile: Image) -> bytes:
    return bytes(imagecodecs.jpeg8_encode(tile, level=95, colorspace="RGB", outcolorspace="RGB"))


def without_markers(
    encode: Callable[[Image], bytes], names: bytes = b"", markers: bytes = b""
) -> Callable[[Image], bytes]:
    """As `encode`, with these markers instead of JFIF's and Adobe's; the components may get other names."""

    def bare(tile: Image) -> bytes:
        frame, at, kept = encode(tile), 2, b"\xff\xd8" + markers
        while frame[at + 1] != 0xDA:
            end = at + 2 + int.from_bytes(frame[at + 2 : at + 4], "big")
            segment = bytearray(frame[at:end])
            if segment[1] == 0xC0 and names:
                segment[10:19:3] = names
            kept += b"" if segment[1] in (0xE0, 0xEE) else bytes(segment)
            at = end
        scan = bytearray(frame[at:])
        if names:
            scan[5:11:2] = names
        return kept + bytes(scan)

    return bare


JFIF_MARKER = b"\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"
ADOBES_RGB = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"
JFIF_420, JFIF_444 = jpeg("420"), jpeg("444")
BARE_420, BARE_444 = without_markers(JFIF_420), without_markers(JFIF_444)
LOSSLESS: dict[str, tuple[Callable[[Image], bytes], Written]] = {
    "raw": (raw, SAYS),
    "raw, implicit": (raw, replace(SAYS, syntax=IMPLICIT)),
    "raw, in planes": (raw_planes, replace(SAYS, planar=1)),
    "RLE": (rle, replace(SAYS, syntax=RLE)),
    "JPEG 2000, transformed": (j2k(True), replace(SAYS, syntax=J2K_LOSSLESS, label="YBR_RCT")),
    "JPEG 2000, transformed, labelled RGB": (j2k(True), replace(SAYS, syntax=J2K_LOSSLESS)),
    "JPEG 2000, RGB": (j2k(False), replace(SAYS, syntax=J2K_LOSSLESS)),
}
IN_YCBCR: dict[str, tuple[Callable[[Image], bytes], Written]] = {
    "raw": (raw, replace(SAYS, label="YBR_FULL")),
    "RLE": (rle, replace(SAYS, syntax=RLE, label="YBR_FULL")),
    "JPEG 2000, YBR_ICT without the transform": (j2k(False), replace(SAYS, syntax=J2K, label="YBR_ICT")),
    "JPEG 2000, YBR_FULL": (j2k(False), replace(SAYS, syntax=J2K, label="YBR_FULL")),
    "JPEG 2000, YBR_FULL_422": (j2k(False), replace(SAYS, syntax=J2K, label="YBR_FULL_422")),
}
AS_JPEG: dict[str, tuple[Callable[[Image], bytes], str, str]] = {  # how, the label, what it is
    "JFIF, labelled as it is": (JFIF_420, "YBR_FULL_422", "YCBCR"),
    "JFIF, labelled YBR_FULL": (JFIF_444, "YBR_FULL", "YCBCR"),
    "JFIF, labelled RGB": (JFIF_420, "RGB", "YCBCR"),
    "JFIF, not subsampled, labelled RGB": (JFIF_444, "RGB", "YCBCR"),
    "Adobe's RGB, labelled as it is": (jpeg_rgb, "RGB", "RGB"),
    "Adobe's RGB, labelled YBR_FULL_422": (jpeg_rgb, "YBR_FULL_422", "RGB"),
    "without markers, subsampled, labelled RGB": (BARE_420, "RGB", "YCBCR"),
    "without markers, labelled YBR_FULL_422": (BARE_444, "YBR_FULL_422", "YCBCR"),
    "without markers, named R, G, B, labelled YBR_FULL": (without_markers(jpeg_rgb), "YBR_FULL", "RGB"),
    "without markers, named 1, 2, 3, labelled RGB": (without_markers(jpeg_rgb, b"\x01\x02\x03"), "RGB", "RGB"),
    "JFIF, named R, G, B, labelled RGB": (without_markers(jpeg_rgb, b"RGB", JFIF_MARKER), "RGB", "RGB"),
    "JFIF, named R, G, B, labelled YBR_FULL": (without_markers(jpeg_rgb, b"RGB", JFIF_MARKER), "YBR_FULL", "RGB"),
    "JFIF and Adobe's RGB, labelled RGB": (
        without_markers(jpeg_rgb, b"\x01\x02\x03", JFIF_MARKER + ADOBES_RGB),
        "RGB",
        "RGB",
    ),
}


@pytest.mark.parametrize("kind", sorted(LOSSLESS))
def test_lossless_frames_give_the_pixels_that_were_written(tmp_path: Path, image: Image, kind: str) -> None:
    encode, says = LOSSLESS[kind]
    with open_slide(write_dicom(tmp_path / "a.dcm", frames_of(image, encode), says)) as slide:
        assert (slide.info.mpp, slide.info.mpp_source) == (pytest.approx(0.25), "DICOM PixelSpacing")
        np.testing.assert_array_equal(whole(slide), image)
        outside = read_square(slide, WIDTH - 20, HEIGHT - 10, 64, 1.0)
        np.testing.assert_array_equal(outside[:10, :20], image[-10:, -20:])
        assert (outside[10:] == 255).all()
        assert (outside[:, 20:] == 255).all()


@pytest.mark.parametrize("kind", sorted(IN_YCBCR))
def test_frames_in_ycbcr_become_rgb(tmp_path: Path, image: Image, kind: str) -> None:
    encode, says = IN_YCBCR[kind]
    with open_slide(write_dicom(tmp_path / "a.dcm", frames_of(ycbcr(image), encode), says)) as slide:
        assert np.abs(whole(slide).astype(int) - image).max() <= 2  # rounded there and back


@pytest.mark.parametrize("kind", sorted(AS_JPEG))
def test_a_jpegs_own_word_on_its_colours_stands_above_the_label(tmp_path: Path, image: Image, kind: str) -> None:
    encode, label, truth = AS_JPEG[kind]
    says = replace(SAYS, syntax=JPEG, label=label)
    with open_slide(write_dicom(tmp_path / "a.dcm", frames_of(image, encode), says)) as slide:
        assert np.abs(whole(slide).astype(int) - image).mean() < 4, truth  # 30 and more in the other colours


@pytest.mark.parametrize(
    ("encode", "syntax", "label", "message"),
    [
        (lambda t: j2k(False)(ycbcr(t)), J2K, "RGB", "labelled RGB, and its pixels plainly are YCbCr"),
        (j2k(False), J2K, "YBR_ICT", "labelled YBR_ICT, and its pixels plainly are RGB"),
        (j2k(False), J2K, "YBR_RCT", "its colours are YBR_RCT, which JPEG 2000 frames without a word on it cannot be"),
        (lambda t: raw(ycbcr(t)), EXPLICIT, "RGB", "labelled RGB, and its pixels plainly are YCbCr"),
        (raw, EXPLICIT, "YBR_FULL", "labelled YBR_FULL, and its pixels plainly are RGB"),
        (BARE_444, JPEG, "RGB", "labelled RGB, and its pixels plainly are YCbCr"),
        (raw, EXPLICIT, "YBR_FULL_422", "its colours are YBR_FULL_422"),
        (raw, EXPLICIT, "PALETTE COLOR", "its colours are PALETTE COLOR"),
    ],
)
def test_a_label_that_the_pixels_contradict_is_refused(
    tmp_path: Path, image: Image, encode: Callable[[Image], bytes], syntax: str, label: str, message: str
) -> None:
    path = write_dicom(tmp_path / "a.dcm", frames_of(image, encode), replace(SAYS, syntax=syntax, label=label))
    with pytest.raises(SlideUnreadable, match=message):
        open_slide(path)


@pytest.mark.parametrize("blank", [1, 7, 17])
def test_a_label_is_compared_with_pixels_beyond_the_first_glass(tmp_path: Path, image: Image, blank: int) -> None:
    """Frames that are not compressed all have one size, which says nothing of their detail."""
    glass = np.full((TILE[1], TILE[0], 3), 243, np.uint8)
    tissue, *others = tiles_of(image, TILE)
    tiles = [glass] * blank + [tissue] + [glass] * (len(others) - blank)
    path = write_dicom(tmp_path / "a.dcm", [raw(ycbcr(one)) for one in tiles], SAYS)
    with pytest.raises(SlideUnreadable, match="labelled RGB, and its pixels plainly are YCbCr"):
        open_slide(path)


@given(x0=st.integers(0, 1900), y0=st.integers(0, 2700))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_what_colours_pixels_are_is_said_only_where_it_is_plain(slides_dir: Path, x0: int, y0: int) -> None:
    with openslide.OpenSlide(slides_dir / "CMU-1-Small-Region.svs") as slide:
        tissue = np.array(slide.read_region((x0, y0), 0, (240, 240)))[..., :3]
    assert plainly(tissue) in ("RGB", "")
    assert plainly(ycbcr(tissue)) in ("YCBCR", "")


@given(st.integers(0, 1000))
@settings(max_examples=20)
def test_of_drawn_noise_and_of_glass_nothing_is_said(seed: int) -> None:
    picture = stained(96, 96, seed)
    assert plainly(picture) in ("RGB", "")
    assert plainly(ycbcr(picture)) in ("YCBCR", "")
    noise = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)
    assert plainly(noise) == ""
    assert plainly(ycbcr(noise)) == ""
    assert plainly(np.full((64, 64, 3), 240, np.uint8)) == ""


def test_the_real_slides_equal_openslide_to_the_pixel(slides_dir: Path) -> None:
    for name in (
        "multi_frame_jpeg_camelyon_challenge_image.dcm",
        "multi_frame_jpeg2000_camelyon_challenge_image.dcm",
        "odd/sm_image.dcm",
        "odd/boxes_0.dcm",
    ):
        with open_slide(slides_dir / name) as slide, openslide.OpenSlide(slides_dir / name) as reference:
            assert isinstance(slide, DicomReader)
            region = np.asarray(reference.read_region((0, 0), 0, reference.dimensions))
            np.testing.assert_array_equal(whole(slide), region[..., :3])


class TestPlaces:
    """Each frame is where the file says."""

    @pytest.mark.parametrize("table", ["basic", "empty", "extended"])
    @pytest.mark.parametrize("syntax", [JPEG, J2K_LOSSLESS, RLE])
    def test_any_table_of_offsets(self, tmp_path: Path, image: Image, table: str, syntax: str) -> None:
        encode = {JPEG: JFIF_444, J2K_LOSSLESS: j2k(True), RLE: rle}[syntax]
        says = replace(SAYS, syntax=syntax, table=table)
        with open_slide(write_dicom(tmp_path / "a.dcm", frames_of(image, encode), says)) as slide:
            assert np.abs(whole(slide).astype(int) - image).mean() < 2

    @pytest.mark.parametrize("table", ["basic", "empty"])
    def test_frames_in_several_pieces(self, tmp_path: Path, image: Image, table: str) -> None:
        says = replace(SAYS, syntax=J2K_LOSSLESS, table=table, fragments=3)
        with open_slide(write_dicom(tmp_path / "a.dcm", frames_of(image, j2k(True)), says)) as slide:
            np.testing.assert_array_equal(whole(slide), image)

    def test_pieces_that_nothing_tells_apart_are_refused(self, tmp_path: Path, image: Image) -> None:
        says = replace(SAYS, syntax=RLE, table="empty", fragments=2)
        with pytest.raises(SlideUnreadable, match="50 pieces are to be 25 frames, and no table says which are whose"):
            open_slide(write_dicom(tmp_path / "a.dcm", frames_of(image, rle), says))

    @pytest.mark.parametrize("organization", ["TILED_SPARSE", None])
    @pytest.mark.parametrize("syntax", [EXPLICIT, J2K_LOSSLESS, IMPLICIT])
    def test_sparse_frames_in_any_order(
        self, tmp_path: Path, image: Image, organization: str | None, syntax: str
    ) -> None:
        frames = frames_of(image, j2k(True) if syntax == J2K_LOSSLESS else raw)
        places = [(column * TILE[0], row * TILE[1]) for row in range(5) for column in range(5)]
        order = np.random.default_rng(1).permutation(25)[:21]
        says = replace(SAYS, syntax=syntax, organization=organization, places=[places[i] for i in order])
        expected = np.full_like(image, 255)
        for i in order:
            x, y = places[i]
            expected[y : y + TILE[1], x : x + TILE[0]] = image[y : y + TILE[1], x : x + TILE[0]]
        with open_slide(write_dicom(tmp_path / "a.dcm", [frames[i] for i in order], says)) as slide:
            np.testing.assert_array_equal(whole(slide), expected)

    def test_a_picture_spread_over_files(self, tmp_path: Path, image: Image) -> None:
        frames = frames_of(image, raw)
        for name, part in (("b", slice(0, 9)), ("a", slice(9, 25))):
            says = replace(SAYS, part_of="1.2.3", part_from=part.start)
            write_dicom(tmp_path / f"{name}.dcm", frames[part], says)
        with open_slide(tmp_path / "a.dcm") as slide:
            np.testing.assert_array_equal(whole(slide), image)
        (tmp_path / "b.dcm").unlink()
        with pytest.raises(SlideUnreadable, match="16 frames, and 5 x 5 tiles were expected"):
            open_slide(tmp_path / "a.dcm")

    @pytest.mark.parametrize(
        ("says", "message"),
        [
            (replace(SAYS, places=[(0, 0)] * 25, organization="TILED_SPARSE"), "several frames at one place"),
            (replace(SAYS, places=[(i * 7, 0) for i in range(25)], organization="TILED_SPARSE"), "no place of a grid"),
            (replace(SAYS, places=[(i * 64, 0) for i in range(25)], organization="TILED_SPARSE"), "no place of a grid"),
            (replace(SAYS, places=[(0, 0)], organization="TILED_SPARSE"), "25 frames, and gives places of 1"),
            (replace(SAYS, organization="TILED_SPARSE"), "does not say where its frames lie"),
            (replace(SAYS, frames=24), "24 frames, and 5 x 5 tiles were expected"),
            (replace(SAYS, frames=26), "26 frames"),
            (replace(SAYS, paths=2), "2 optical paths"),
            (replace(SAYS, planes=3), "3 focal planes"),
            (replace(SAYS, samples=1, label="MONOCHROME2"), "1 x 8 bits .MONOCHROME2., not 8-bit RGB"),
            (replace(SAYS, bits=16), "3 x 16 bits .RGB., not 8-bit RGB"),
            (replace(SAYS, syntax="1.2.840.10008.1.2.4.80"), "transfer syntax 1.2.840.10008.1.2.4.80 is not read"),
            (replace(SAYS, kind="LABEL"), "no file of its series is a picture of the slide"),
        ],
    )
    def test_what_is_not_understood_is_refused_and_why(
        self, tmp_path: Path, image: Image, says: Written, message: str
    ) -> None:
        path = write_dicom(tmp_path / "a.dcm", frames_of(image, raw), says)
        with pytest.raises(SlideUnreadable, match=message):
            open_slide(path)


class TestSeries:
    """The files of a series: levels, labels, and what is neither."""

    def level(self, folder: Path, name: str, image: Image, says: Written) -> None:
        says = replace(says, size=(image.shape[1], image.shape[0]))
        write_dicom(folder / name, frames_of(image, raw, says.tile), says)

    def test_a_label_or_overview_that_is_not_read_does_not_matter(self, tmp_path: Path, image: Image) -> None:
        self.level(tmp_path, "slide.dcm", image, SAYS)
        small = replace(SAYS, size=(64, 48), syntax="1.2.840.10008.1.2.4.80", samples=1, label="MONOCHROME2")
        for kind in ("LABEL", "OVERVIEW", "THUMBNAIL"):
            write_dicom(tmp_path / f"{kind}.dcm", [b"no picture"], replace(small, kind=kind))
        broken = (tmp_path / "LABEL.dcm").read_bytes()
        (tmp_path / "LABEL2.dcm").write_bytes(broken[: broken.index(b"MONOCHROME2")])
        for name in ("slide.dcm", "LABEL.dcm", "."):
            with open_slide(tmp_path / name) as slide:
                np.testing.assert_array_equal(whole(slide), image)

    def test_a_picture_of_the_slide_with_a_broken_header_refuses_the_slide(self, tmp_path: Path) -> None:
        """It could be level 0: without it, the next level would pass for it."""
        self.level(tmp_path, "0.dcm", stained(384, 512), SAYS)
        self.level(tmp_path, "1.dcm", stained(192, 256), replace(SAYS, mpp=(0.5, 0.5)))
        content = (tmp_path / "0.dcm").read_bytes()
        (tmp_path / "0.dcm").write_bytes(content[: content.index(b"TILED_FULL")])
        with pytest.raises(SlideUnreadable, match=r"0\.dcm, a picture of the slide: its DICOM structure is damaged"):
            open_slide(tmp_path / "1.dcm")

    def test_a_level_that_is_not_read_is_left_out_and_level_0_is_refused(self, tmp_path: Path) -> None:
        picture = stained(384, 512)
        half, quarter = (cv2.resize(picture, None, fx=1 / f, fy=1 / f, interpolation=cv2.INTER_AREA) for f in (2, 4))
        self.level(tmp_path, "0.dcm", picture, SAYS)
        self.level(tmp_path, "1.dcm", half, replace(SAYS, syntax="1.2.840.10008.1.2.4.80", mpp=(0.5, 0.5)))
        self.level(tmp_path, "2.dcm", quarter, replace(SAYS, mpp=(1.0, 1.0)))
        with open_slide(tmp_path) as slide:
            assert [level.downsample for level in slide.info.levels] == [1, 4]
            assert "level of 256 x 192 px left out: transfer syntax" in slide.info.reader_reason
        self.level(tmp_path, "0.dcm", picture, replace(SAYS, paths=2))
        with pytest.raises(SlideUnreadable, match=r"0\.dcm: it has 2 optical paths"):
            open_slide(tmp_path)

    def test_a_copy_under_another_name_is_no_second_picture(self, tmp_path: Path, image: Image) -> None:
        self.level(tmp_path, "a.dcm", image, SAYS)
        shutil.copy(tmp_path / "a.dcm", tmp_path / "b.dcm")
        with open_slide(tmp_path) as slide:
            assert len(slide.info.levels) == 1
        self.level(tmp_path, "c.dcm", image, SAYS)
        with pytest.raises(SlideUnreadable, match="several pictures of one size"):
            open_slide(tmp_path)

    def test_levels_padded_to_whole_tiles_are_what_their_spacing_says(self, tmp_path: Path) -> None:
        """As Philips writes them: sizes say 1.87, 3.5 and 7."""
        tile = 128
        width, height = tile * 15, tile * 13
        cells = np.random.default_rng(1).integers(0, 255, (height // 48 + 2, width // 48 + 2, 3), np.uint8)
        picture = np.asarray(cv2.resize(cells, (width, height), interpolation=cv2.INTER_CUBIC), np.uint8)
        for number in range(4):
            factor = 2**number
            level = picture.reshape(height // factor, factor, width // factor, factor, 3).mean(axis=(1, 3))
            down, right = -level.shape[0] % tile, -level.shape[1] % tile
            padded = np.pad(np.rint(level), ((0, down), (0, right), (0, 0)), constant_values=255).astype(np.uint8)
            says = replace(SAYS, tile=(tile, tile), mpp=(0.25 * factor, 0.25 * factor))
            self.level(tmp_path, f"{number}.dcm", padded, says)
        with open_slide(tmp_path / "0.dcm") as slide:
            assert [level.downsample for level in slide.info.levels] == [1, 2, 4, 8]
            for factor in (2, 4, 8):
                side = 640 // factor
                x0, y0 = width - 640, height - 640
                cells = picture[y0 : y0 + 640, x0 : x0 + 640].reshape(side, factor, side, factor, 3)
                off = np.abs(read_square(slide, x0, y0, side, factor) - cells.mean(axis=(1, 3)))
                assert off.max() <= 1

    def test_pixels_that_are_not_square_have_no_scale_unless_the_user_says_it(
        self, tmp_path: Path, image: Image
    ) -> None:
        self.level(tmp_path, "a.dcm", image, replace(SAYS, mpp=(0.25, 0.5)))
        with open_slide(tmp_path) as slide:
            assert slide.info.mpp is None
            assert slide.info.mpp_source == "DICOM PixelSpacing say 0.25 x 0.5 µm/px: the pixels are not square"
        with open_slide(tmp_path, 0.3, "--slide-mpp") as slide:
            assert slide.info.mpp == 0.3
        self.level(tmp_path, "a.dcm", image, replace(SAYS, mpp=None))
        with open_slide(tmp_path) as slide:
            assert (slide.info.mpp, slide.info.mpp_source) == (None, "the slide does not say (no PixelSpacing)")


class TestDamage:
    """A damaged frame is an error; no pixels are made up for it, and no other frame is touched."""

    @pytest.mark.parametrize("syntax", [JPEG, J2K_LOSSLESS, RLE, EXPLICIT])
    def test_a_cut_frame_is_never_believed(self, tmp_path: Path, image: Image, syntax: str) -> None:
        encode = {JPEG: JFIF_420, J2K_LOSSLESS: j2k(True), RLE: rle, EXPLICIT: raw}[syntax]
        frames = frames_of(image, encode)
        for part in np.linspace(0.02, 0.98, 15 if syntax != EXPLICIT else 0):
            cut = list(frames)
            cut[7] = frames[7][: int(len(frames[7]) * part)]
            path = write_dicom(tmp_path / "a.dcm", cut, replace(SAYS, syntax=syntax))
            with open_slide(path) as slide:
                with pytest.raises(TileUnreadable, match="column 2, row 1 of level 0"):
                    read_square(slide, 2 * 64 + 5, 48 + 5, 8, 1.0)
                read_square(slide, 64, 48, 48, 1.0)

    @pytest.mark.parametrize("syntax", [JPEG, J2K_LOSSLESS, RLE])
    @pytest.mark.parametrize("tile", [(32, 24), (128, 96), (48, 60), (64, 49)])
    def test_a_frame_of_another_size_is_never_believed(
        self, tmp_path: Path, image: Image, syntax: str, tile: tuple[int, int]
    ) -> None:
        encode = {JPEG: JFIF_444, J2K_LOSSLESS: j2k(True), RLE: rle}[syntax]
        frames = frames_of(image, encode)
        frames[7] = frames_of(image, encode, tile)[0]
        path = write_dicom(tmp_path / "a.dcm", frames, replace(SAYS, syntax=syntax))
        with open_slide(path) as slide, pytest.raises(TileUnreadable, match="column 2, row 1 of level 0"):
            read_square(slide, 2 * 64 + 5, 48 + 5, 8, 1.0)

    @pytest.mark.parametrize("table", ["basic", "empty", "extended"])
    def test_a_file_that_is_cut_reads_as_far_as_it_goes(self, tmp_path: Path, image: Image, table: str) -> None:
        says = replace(SAYS, syntax=J2K_LOSSLESS, table=table)
        path = write_dicom(tmp_path / "a.dcm", frames_of(image, j2k(True)), says)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * 0.7)])
        with open_slide(path) as slide:
            np.testing.assert_array_equal(read_square(slide, 0, 0, 96, 1.0), image[:96, :96])
            with pytest.raises(TileUnreadable, match="the file ends"):
                read_square(slide, 280, 190, 8, 1.0)

    @pytest.mark.parametrize("syntax", [JPEG, J2K_LOSSLESS, RLE, EXPLICIT])
    def test_a_header_cut_anywhere_is_refused_in_words(self, tmp_path: Path, image: Image, syntax: str) -> None:
        encode = {JPEG: JFIF_420, J2K_LOSSLESS: j2k(True), RLE: rle, EXPLICIT: raw}[syntax]
        places = [(column * TILE[0], row * TILE[1]) for row in range(5) for column in range(5)]
        says = replace(SAYS, syntax=syntax, organization="TILED_SPARSE", places=places)
        content = write_dicom(tmp_path / "a.dcm", frames_of(image, encode), says).read_bytes()
        for length in np.linspace(1, len(content) - 1, 60).astype(int):
            (tmp_path / "a.dcm").write_bytes(content[:length])
            if length < len(content) - 20:  # the end marker, or padding
                with pytest.raises(SlideError, match=r"a\.dcm"):
                    whole(open_slide(tmp_path / "a.dcm"))

    @settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
    @given(data=st.data(), syntax=st.sampled_from([JPEG, J2K_LOSSLESS, RLE, EXPLICIT]))
    def test_bytes_changed_in_the_header_end_in_words_or_in_the_right_size(
        self, tmp_path: Path, image: Image, data: st.DataObject, syntax: str
    ) -> None:
        encode = {JPEG: JFIF_420, J2K_LOSSLESS: j2k(True), RLE: rle, EXPLICIT: raw}[syntax]
        kept = tmp_path / f"{syntax}.kept"
        if not kept.exists():
            write_dicom(kept, frames_of(image, encode), replace(SAYS, syntax=syntax))
        content = bytearray(kept.read_bytes())
        for at in data.draw(st.lists(st.integers(132, 1500), min_size=1, max_size=6)):
            content[at] = data.draw(st.integers(0, 255))
        folder = tmp_path / "w"
        folder.mkdir(exist_ok=True)
        (folder / "a.dcm").write_bytes(content)
        try:
            with open_slide(folder / "a.dcm") as slide:
                read_square(slide, 0, 0, 64, 1.0)
        except SlideError:
            pass
