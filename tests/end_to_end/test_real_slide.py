"""The whole way on a real slide, against a plain script: OpenSlide, PIL and torchvision, nothing of ours.

Stated tolerances, for DenseNet-121 with ImageNet weights in fp32 on CMU-1-Small-Region (0.499 µm/px):

- at the slide's own scale the pixels are the same: features within 1e-3 of torch's, cosine above 0.999999;
- at twice it, where PIL's box filter is the same mean but rounds twice, once an axis: cosine above 0.9995;
- at 0.5 µm/px, a scale of 1.002, where PIL's filter is wider than a pixel: cosine above 0.99.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import openslide
import pytest
import torch
import torchvision
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file

SLIDE = "CMU-1-Small-Region.svs"
TILE_PX = 224
IMAGENET = ("--mean", 0.485, 0.456, 0.406, "--std", 0.229, 0.224, 0.225)


def command(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    code = f"from {module} import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def bundle(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "densenet121"
    weights = data_dir / "weights" / "densenet121-imagenet.safetensors"
    result = command("mtdp_export.cli", "densenet121", "--weights", weights, *IMAGENET, "--out", out)
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture(scope="module")
def network(data_dir: Path) -> torch.nn.Module:
    model = torchvision.models.densenet121(weights=None)
    state = load_file(data_dir / "weights" / "densenet121-imagenet.safetensors")
    model.load_state_dict(state, strict=False)
    return torch.nn.Sequential(model.features, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()).eval()


def plain_features(network: torch.nn.Module, slide: Path, coords: NDArray[np.int64], mpp: float) -> NDArray[np.float32]:
    """What anybody would write."""
    scale = mpp / 0.499
    side0 = TILE_PX * scale
    transform = torchvision.transforms.Compose(
        [
            torchvision.transforms.ToTensor(),
            torchvision.transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    method = Image.Resampling.BOX if scale == int(scale) else Image.Resampling.BILINEAR
    tiles = []
    with openslide.OpenSlide(slide) as handle:
        for x0, y0 in coords.tolist():
            region = handle.read_region((x0, y0), 0, (int(np.ceil(side0)),) * 2).convert("RGB")
            tiles.append(transform(region.resize((TILE_PX, TILE_PX), method, box=(0, 0, side0, side0))))
    with torch.no_grad():
        return torch.cat([network(torch.stack(tiles[i : i + 8])) for i in range(0, len(tiles), 8)]).numpy()


@pytest.mark.parametrize(("mpp", "least_cosine"), [(0.499, 0.999999), (0.998, 0.9995), (0.5, 0.99)])
def test_features_equal_a_plain_scripts(
    bundle: Path,
    network: torch.nn.Module,
    slides_dir: Path,
    tmp_path: Path,
    mpp: float,
    least_cosine: float,
) -> None:
    slide = slides_dir / SLIDE
    result = command(
        "mtdp_runtime.commands.extract",
        slide,
        "--model",
        bundle,
        "--out",
        tmp_path,
        "--mpp",
        mpp,
        "--precision",
        "fp32",
        "--no-report",
    )
    assert result.returncode == 0, result.stderr
    with h5py.File(tmp_path / "CMU-1-Small-Region.h5") as file:
        features, coords = file["features"][:], file["coords"][:]
        assert file.attrs["mpp_source"] == "aperio metadata (openslide.mpp-x, -y)"
    assert len(features) == len(coords) > (50 if mpp < 0.6 else 10)
    picked = np.arange(0, len(coords), 4)
    expected = plain_features(network, slide, coords[picked], mpp)
    ours = features[picked]
    cosines = (ours * expected).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(expected, axis=1)
    assert cosines.min() > least_cosine
    if mpp == 0.499:
        np.testing.assert_allclose(ours, expected, atol=1e-3)
    # and a neighbour's features are further away than any tolerance: the comparison can fail
    other = (ours[1:] * expected[:-1]).sum(1) / np.linalg.norm(ours[1:], axis=1) / np.linalg.norm(expected[:-1], axis=1)
    assert np.median(other) < 0.99


def test_every_real_slide_ends_in_a_file_or_a_sentence(slides_dir: Path, bundle: Path, tmp_path: Path) -> None:
    result = command("mtdp_runtime.commands.extract", slides_dir, "--model", bundle, "--out", tmp_path, "--dry-run")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    failures = [line for line in result.stderr.splitlines() if line.startswith("failed: ")]
    hints = [line for line in result.stderr.splitlines() if line.startswith("  hint: ")]
    planned = [line for line in result.stdout.splitlines() if " tiles of 224 px; mpp " in line]
    slides = [p for p in slides_dir.rglob("*") if p.suffix in {".svs", ".tif", ".tiff", ".dcm"}]
    assert len(planned) + len(failures) == len(slides) == 16
    assert len(hints) == len(failures)
    assert any("tcga-cr-7395-01a-01-ts1.svs: no micrometres per pixel" in line for line in failures)


def test_a_jpeg_2000_slide_with_its_scale_given(slides_dir: Path, bundle: Path, tmp_path: Path) -> None:
    slide = slides_dir / "tcga-cr-7395-01a-01-ts1.svs"
    result = command("mtdp_runtime.commands.extract", slide, "--model", bundle, "--out", tmp_path, "--slide-mpp", 0.25)
    assert result.returncode == 0, result.stderr
    with h5py.File(tmp_path / "tcga-cr-7395-01a-01-ts1.h5") as file:
        assert file["features"].shape[0] > 30
        assert np.isfinite(file["features"][:]).all()
        assert (file.attrs["level"], file.attrs["mpp_source"]) == (1, "--slide-mpp")


def test_a_dicom_slide_at_a_scale_that_it_has(slides_dir: Path, bundle: Path, tmp_path: Path) -> None:
    slide = slides_dir / "multi_frame_jpeg_camelyon_challenge_image.dcm"
    result = command(
        "mtdp_runtime.commands.extract", slide, "--model", bundle, "--out", tmp_path, "--mpp", 30, "--min-tissue", 0.1
    )
    assert result.returncode == 0, result.stderr
    with h5py.File(tmp_path / "multi_frame_jpeg_camelyon_challenge_image.h5") as file:
        assert file["features"].shape[0] >= 4
