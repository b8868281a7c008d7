"""What a bundle's bf16 is judged by, measured after its export: torch's autocast on its golden tiles.

    python benchmarks/yardstick.py [BUNDLE] [--write]

For a torchvision network whose checkpoint is not at hand, exported with `--weights-storage fp16` as the packaged bundle
was: its graph holds each weight by its name (in others batch norm is folded). The weights come back from there; the
torch network must then repeat every golden output in fp32. Prints autocast beside OpenVINO's own bf16 and beside the
typed graph that an export would write. `--write` puts autocast into bundle.json, as an export does (docs/bundle.md);
nothing else in the bundle changes.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import onnx
import torch

from mtdp.backbones import build_backbone
from mtdp.multitask import MultiTaskNet
from mtdp.preprocess import Preprocessing
from mtdp_export.errors import ExportError
from mtdp_export.graph import Deployed, autocast_outputs, export_light, reference_outputs
from mtdp_export.model_store import array_of, load_light
from mtdp_export.parity import Row, compare, compare_outputs, judged, knn_agreement, require, table
from mtdp_export.pixels import as_it_is
from mtdp_export.precision import write_typed
from mtdp_export.rounding import in_fp32, run
from mtdp_runtime.backends import backend_class
from mtdp_runtime.bundle import Bundle, default_bundle_path, load_bundle, write_manifest
from mtdp_runtime.bundle.golden import FEATURES, golden_of
from mtdp_runtime.bundle.manifest import Autocast, Manifest
from mtdp_runtime.bundle.tolerance import cosines, least_cosine

_BATCH = 8  # an export's


def network_of(bundle: Bundle) -> Deployed:
    """Return the torch network that the fp32 graph was traced from.

    Raises:
        ExportError: the graph is not that of a network of torchvision's.
        ParityFailure: it does not repeat the bundle's golden outputs in fp32: it is another network.
    """
    manifest = bundle.manifest
    file = bundle.checked(bundle.variant("fp32").file)
    held = {}
    for tensor in onnx.load(str(file)).graph.initializer:
        name = tensor.name.removeprefix("network.").removesuffix(".fp16")
        held[name] = torch.from_numpy(array_of(tensor, file.parent).copy())
    network = MultiTaskNet(build_backbone(manifest.arch), {head.name: head.class_names for head in manifest.heads})
    state = network.state_dict()
    wanted = [name for name in state if not name.endswith("num_batches_tracked")]  # no graph holds those counts
    missing = [name for name in wanted if name not in held]
    if missing:
        raise ExportError(
            f"{file}: no initialiser {missing[0]}",
            "give a torchvision network's, with fp16 weights",
        )
    network.load_state_dict(state | {name: held[name].float() for name in wanted})
    preprocessing = Preprocessing(manifest.tile_px, manifest.mean, manifest.std, manifest.interpolation)
    model = Deployed(network, as_it_is(preprocessing)).eval()
    tiles, expected = golden_of(bundle)
    require(compare_outputs("torch", "fp32", reference_outputs(model, tiles), expected))
    return model


def with_autocast(bundle: Bundle, model: Deployed) -> Manifest:
    """Return the manifest with how near torch's autocast in bf16 comes to the golden features.

    Raises:
        ExportError: torch cannot, here.
    """
    tiles, expected = golden_of(bundle)
    outputs = autocast_outputs(model, tiles, "bf16")
    if outputs is None:
        raise ExportError("torch has no bf16 for this network on this CPU")
    similar = cosines(outputs[FEATURES], expected[FEATURES])
    agreement = knn_agreement(outputs[FEATURES], expected[FEATURES])
    measured = Autocast("bf16", float(similar.min()), float(similar.mean()), agreement)
    others = (one for one in bundle.manifest.autocast if one.precision != "bf16")
    return replace(bundle.manifest, autocast=(*others, measured))


def rows_of(bundle: Bundle, model: Deployed, manifest: Manifest) -> list[Row]:
    """Return what is judged by it: OpenVINO's own bf16 where this CPU has it, and the typed graph as computed."""
    tiles, expected = golden_of(bundle)
    rows: list[Row] = []
    engine = backend_class("openvino")
    if "bf16" in engine.probe().precisions:
        with engine.load(bundle, "bf16", _BATCH, torch.get_num_threads()) as backend:
            rows.append(judged(compare(backend, tiles, expected), manifest))
    with tempfile.TemporaryDirectory() as folder:
        base, file = Path(folder) / "base.onnx", Path(folder) / "typed.onnx"
        base.write_bytes(export_light(model, {}, base.parent).SerializeToString(deterministic=True))
        typed = write_typed(base, "bf16", file, tiles, expected, least_cosine(manifest, "bf16"))
        outputs = run(in_fp32(load_light(file)), tiles, folder=file.parent)
        shown = f"typed, {typed.fp32_kernels} of {typed.kernels} in fp32"
        rows.append(judged(compare_outputs(shown, "bf16", outputs, expected), manifest))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", type=Path, default=default_bundle_path())
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    bundle = load_bundle(options.bundle)
    model = network_of(bundle)
    manifest = with_autocast(bundle, model)
    print(table(rows_of(bundle, model, manifest), manifest.autocast))
    print(f"least cosine that bf16 may have: {least_cosine(manifest, 'bf16'):.6f}")
    if options.write:
        write_manifest(bundle.path, manifest)


if __name__ == "__main__":
    main()
