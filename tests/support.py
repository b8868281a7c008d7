"""Small real things for the tests: a manifest, a stained image, a tiled TIFF."""

from __future__ import annotations

import importlib.util
import io
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

import warm
from mtdp_runtime.bundle import file_ref, write_manifest
from mtdp_runtime.bundle.manifest import FileRef, Head, Manifest, Parity, Tokens, Variant, Weights
from mtdp_runtime.slide import Level, Slide, SlideInfo

TILE_PX = 64
FEATURES_DIM = 12
BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
Run = Callable[..., tuple[int, str, str]]  # a command in this process: exit code, stdout, stderr


def script(name: str) -> ModuleType:
    """A script of benchmarks/ as a module; they find each other as when one is run."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # its dataclasses look there for their own
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


def make_manifest(file: FileRef, golden: FileRef, heads: tuple[Head, ...] = ()) -> Manifest:
    return Manifest(
        name="tiny",
        arch="resnet18",
        mtdp_version="0",
        tile_px=TILE_PX,
        mpp=0.5,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        features_dim=FEATURES_DIM,
        heads=heads,
        weights=Weights("0" * 64, "random numbers", "none"),
        variants=(Variant("fp32", file, Parity("onnxruntime", 1, 1.0, 1.0, 0.0)),),
        golden=golden,
    )


def write_tiny_bundle(folder: Path, heads: tuple[Head, ...] = (), tokens: float = 0.0) -> Path:
    """Write a bundle with one strided convolution: uint8[N, 64, 64, 3] -> features float32[N, 12].

    Each head is a linear layer of random weights and a softmax. With `tokens`, the values of the map times that number
    are tokens float32[N, 64, 12] of 8 x 8 patches; of the golden tiles, two have theirs in golden.npz.
    """
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    folder.mkdir()
    rng = np.random.default_rng(0)
    weight = rng.normal(0, 0.02, (FEATURES_DIM, 3, 8, 8)).astype(np.float32)
    head_nodes, head_outputs, head_weights = [], [], []
    for head in heads:
        size = len(head.class_names)
        head_weights.append(
            numpy_helper.from_array(rng.normal(0, 1, (FEATURES_DIM, size)).astype(np.float32), head.name)
        )
        head_nodes.append(helper.make_node("MatMul", ["features", head.name], [f"{head.name}_logits"]))
        head_nodes.append(helper.make_node("Softmax", [f"{head.name}_logits"], [head.output], axis=1))
        head_outputs.append(helper.make_tensor_value_info(head.output, TensorProto.FLOAT, ["batch", size]))
    if tokens:
        head_weights.append(numpy_helper.from_array(np.array([0, FEATURES_DIM, 64], np.int64), "flat"))
        head_weights.append(numpy_helper.from_array(np.array(tokens, np.float32), "times"))
        head_nodes.append(helper.make_node("Reshape", ["relu", "flat"], ["columns"]))
        head_nodes.append(helper.make_node("Transpose", ["columns"], ["patches"], perm=[0, 2, 1]))
        head_nodes.append(helper.make_node("Mul", ["patches", "times"], ["tokens"]))
        head_outputs.append(helper.make_tensor_value_info("tokens", TensorProto.FLOAT, ["batch", 64, FEATURES_DIM]))
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["tiles"], ["float"], to=TensorProto.FLOAT),
            helper.make_node("Transpose", ["float"], ["nchw"], perm=[0, 3, 1, 2]),
            helper.make_node("Conv", ["nchw", "weight"], ["conv"], strides=[8, 8]),
            helper.make_node("Relu", ["conv"], ["relu"]),
            helper.make_node("GlobalAveragePool", ["relu"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["features"]),
            *head_nodes,
        ],
        "tiny",
        [helper.make_tensor_value_info("tiles", TensorProto.UINT8, ["batch", TILE_PX, TILE_PX, 3])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", FEATURES_DIM]), *head_outputs],
        [numpy_helper.from_array(weight, "weight"), *head_weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, folder / "model.fp32.onnx")
    tiles = rng.integers(0, 256, (4, TILE_PX, TILE_PX, 3), np.uint8)
    session = onnxruntime.InferenceSession(folder / "model.fp32.onnx", providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    outputs = dict(zip(names, session.run(names, {"tiles": tiles}), strict=True))
    if tokens:
        outputs["tokens"] = outputs["tokens"][:2]
    np.savez(folder / "golden.npz", tiles=tiles, **outputs)
    manifest = make_manifest(file_ref(folder, "model.fp32.onnx"), file_ref(folder, "golden.npz"), heads)
    write_manifest(folder, replace(manifest, tokens=Tokens(64, FEATURES_DIM, (8, 8)) if tokens else None))
    return folder


def pyramid(image: NDArray[np.uint8], path: Path, mpp: float | None, levels: int = 1, lossy: bool = False) -> Path:
    """Write uint8[H, W, 3] as a tiled TIFF; each further level is half the size (2 x 2 means)."""
    compression = {"compression": "jpeg", "compressionargs": {"level": 90}} if lossy else {"compression": "zlib"}
    with tifffile.TiffWriter(path) as tiff:
        for level in range(levels):
            scale = {} if mpp is None else {"resolution": (1e4 / mpp / 2**level,) * 2, "resolutionunit": "CENTIMETER"}
            tiff.write(
                image,
                tile=(128, 128),
                photometric="rgb",
                metadata=None,
                subfiletype=min(level, 1),
                **compression,
                **scale,
            )
            image = halved(image)
    return path


def halved(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the means of 2 x 2 pixels, rounded; an odd last row or column is left out."""
    height, width = image.shape[0] // 2 * 2, image.shape[1] // 2 * 2
    rows = image[:height:2, :width].astype(np.uint16) + image[1:height:2, :width]
    return np.rint((rows[:, ::2] + rows[:, 1::2]) / np.float32(4)).astype(np.uint8)


def stained(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """uint8[height, width, 3]: pink noise, glass on the left quarter."""
    return _stained(height, width, seed).copy()


@lru_cache(maxsize=16)
def _stained(height: int, width: int, seed: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    image = np.clip(rng.normal((200, 120, 170), 25, (height, width, 3)), 0, 255).astype(np.uint8)
    image[:, : width // 4] = 243
    return image


def info_of(
    width: int, height: int, mpp: float | None, bounds: tuple[int, int, int, int] | None = None, source: str = "test"
) -> SlideInfo:
    """The facts of a slide that does not exist."""
    return SlideInfo(
        path=Path("slide.tiff"),
        size_bytes=1,
        vendor="test",
        levels=(Level(width, height, 1.0),),
        mpp=mpp,
        mpp_source=source,
        bounds=bounds or (0, 0, width, height),
        background=(255, 255, 255),
        quickhash="",
        reader="test",
        reader_reason="",
    )


def read_square(slide: Slide, x0: int, y0: int, side: int, scale: float) -> NDArray[np.uint8]:
    """uint8[side, side, 3] of a slide."""
    out = np.zeros((side, side, 3), np.uint8)
    slide.read_into(out, x0, y0, scale)
    return out


def damage_tile(path: Path, number: int) -> None:
    """Overwrite one compressed tile of the first page of a TIFF with zeros."""
    with tifffile.TiffFile(path) as tiff:
        offset, size = tiff.pages[0].dataoffsets[number], tiff.pages[0].databytecounts[number]
    content = bytearray(path.read_bytes())
    content[offset : offset + size] = bytes(size)
    path.write_bytes(content)


def extract(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, as a user does."""
    return warm.run("from mtdp_runtime.commands.extract import main; main()", *arguments)


def in_this_process(main: Callable[[], None], *arguments: object) -> tuple[int, str, str]:
    """Run a command in this process, which has imported everything already: its exit code, stdout, stderr.

    For what a command does. How one starts, or ends, is tested on a process of its own.
    """
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    argv, out, err = sys.argv, io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            sys.argv = ["command", *map(str, arguments)]
            main()
    except SystemExit as ended:
        return int(ended.code or 0), out.getvalue(), err.getvalue()
    finally:
        sys.argv = argv
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    raise AssertionError("a command ends by sys.exit")


def slide_lines(out: Path) -> list[dict[str, Any]]:
    """The lines of run.jsonl that are of slides, without those that say what a run is."""
    lines = [json.loads(text) for text in (out / "run.jsonl").read_text().splitlines()]
    return [line for line in lines if "slide" in line]


def one_error(result: subprocess.CompletedProcess[str]) -> str:
    """The error's line, after making sure that it is one line with a hint and no traceback."""
    lines = result.stderr.strip().splitlines()
    assert "Traceback" not in result.stderr
    assert len(lines) == 2, result.stderr
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("hint: ")
    return lines[0]
