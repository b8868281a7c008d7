"""Features of an exported bundle, so that what is deployed is judged by the same probe as what was trained.

The runtime owns the bundle format; of it this module knows the few keys that it needs, and it runs the fp32 variant
with ONNX Runtime. All that happens to the pixels is inside the graph: uint8[N, P, P, 3] -> features float32[N, D].
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mtdp.augment import evaluation_view
from mtdp.entry import ENGINE_THREAD
from mtdp.errors import UsageError, WeightsError
from mtdp.images import ImageCache
from mtdp.preprocess import INTERPOLATIONS, LARGEST_PX
from mtdp.sampling import in_order
from mtdp.tasks import Sample

MANIFEST_NAME: Final = "bundle.json"
SCHEMA_VERSION: Final = 1
LIMIT_S: Final = 600.0  # for a batch: a hostile model may compute for ever
LARGEST_DIM: Final = 1 << 20  # of the features of an image: 4 MB
_HINT: Final = "copy the bundle again, or export it again"


@dataclass(frozen=True, slots=True)
class BundleModel:
    """The fp32 model of a bundle, its digest checked."""

    file: Path
    image_px: int
    features_dim: int
    interpolation: str
    description: str


def is_bundle(source: str) -> bool:
    """Whether a path names a bundle: a folder with a bundle.json."""
    return (Path(source) / MANIFEST_NAME).is_file()


def open_bundle(folder: Path) -> BundleModel:
    """Read what a probe needs of a bundle.

    Raises:
        WeightsError: bundle.json is of another schema or damaged, there is no fp32 variant, or its file is not what
            was exported.
    """
    path = folder / MANIFEST_NAME
    try:
        content = path.read_bytes()
        document: dict[str, Any] = json.loads(content)
        version = document["schema_version"]
        if version != SCHEMA_VERSION:
            raise WeightsError(
                f"{path}: schema version {version!r}, this program reads {SCHEMA_VERSION}", "update mtdp"
            )
        stated = document["mtdp"]
        files = {variant["precision"]: variant["file"] for variant in stated["variants"]}
        apart = next((v.get("data") for v in stated["variants"] if v["precision"] == "fp32"), None)
        interpolation = str(stated.get("interpolation", "bilinear"))
        name, image_px, features_dim = str(stated["name"]), int(stated["tile_px"]), int(stated["features_dim"])
        wanted = None if "fp32" not in files else (str(files["fp32"]["file"]), str(files["fp32"]["sha256"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path} is not a bundle's description: {error!r}", _HINT) from error
    if wanted is None:
        raise WeightsError(
            f"{folder} has no fp32 variant, by which a bundle is judged", "export it with --precision fp32"
        )
    for key, value, most in (("tile_px", image_px, LARGEST_PX), ("features_dim", features_dim, LARGEST_DIM)):
        if not 1 <= value <= most:
            raise WeightsError(f"{path}: {key} is {value}, it must be 1 to {most}", _HINT)
    if interpolation not in INTERPOLATIONS:
        raise WeightsError(f"{path}: interpolation {interpolation!r} is unknown", "update mtdp")
    file = folder / Path(wanted[0]).name
    if not file.is_file():
        raise WeightsError(f"{file}: missing from the bundle", _HINT)
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != wanted[1]:
        raise WeightsError(f"{file}: sha256 {digest}, bundle.json says {wanted[1]}", _HINT)
    if apart is not None:  # weights beyond 2 GB, in a file of their own
        data = file.with_name(f"{file.name}.data")
        with data.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != apart.get("sha256"):
            raise WeightsError(f"{data}: sha256 {digest}, bundle.json says {apart.get('sha256')}", _HINT)
    description = f"bundle {name}, fp32, digest {hashlib.sha256(content).hexdigest()[:16]}"
    return BundleModel(file, image_px, features_dim, interpolation, description)


def features_of_bundle(
    model: BundleModel, samples: Sequence[Sample], precision: str = "auto", batch_size: int = 32
) -> NDArray[np.float32]:
    """Features of the central square of each image: float32[N, D].

    Raises:
        UsageError: a precision other than fp32 was asked for.
        WeightsError: ONNX Runtime is not installed, refuses the model, or computes longer than `LIMIT_S`.
    """
    if precision not in ("auto", "fp32"):
        raise UsageError(f"--precision {precision}: a bundle is judged in fp32", "leave --precision out")
    try:
        import onnxruntime
    except ImportError as error:
        raise WeightsError(f"a bundle needs ONNX Runtime: {error}", "pip install 'mtdp[cpu]'") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(model.file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors share no base class of their own
        raise WeightsError(f"ONNX Runtime refuses {model.file}: {error}", _HINT) from error
    cache = ImageCache(model.image_px, 0, model.interpolation)
    features = np.empty((len(samples), model.features_dim), np.float32)
    row = 0
    for images in in_order(samples, cache, evaluation_view, batch_size):
        found = _within(LIMIT_S, model.file, session, images.numpy())
        if found.shape != (len(images), model.features_dim):
            wanted = f"{len(images)} x {model.features_dim}"
            raise WeightsError(f"{model.file} gives features of {found.shape}, bundle.json says {wanted}", _HINT)
        features[row : row + len(images)] = found
        row += len(images)
    return features


def _within(limit_s: float, file: Path, session: Any, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Features of a batch. In a thread of its own, so that this one hears a signal while the engine computes."""
    done: Future[NDArray[np.float32]] = Future()

    def compute() -> None:
        try:
            done.set_result(session.run(["features"], {"tiles": tiles})[0])
        except Exception as error:  # its errors share no base class of their own
            done.set_exception(error)

    threading.Thread(target=compute, name=ENGINE_THREAD, daemon=True).start()
    try:
        return done.result(limit_s)
    except TimeoutError:
        raise WeightsError(
            f"{file}: one batch took more than {limit_s:g} s", "take bundles from people you trust"
        ) from None
    except Exception as error:
        raise WeightsError(f"ONNX Runtime cannot run {file}: {error}", _HINT) from error
