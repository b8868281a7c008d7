"""card.md: what a bundle is, for people."""

from __future__ import annotations

from mtdp.checkpoint import CheckpointInfo
from mtdp_runtime.bundle import Manifest

_REFERENCES = {
    "torch": "PyTorch fp32",
    "onnxruntime": "the ONNX file as it was brought, in ONNX Runtime fp32, one tile at a time",
}


def model_card(manifest: Manifest, checkpoint: CheckpointInfo | None = None) -> str:
    """Return the card as Markdown: what bundle.json states and, where a checkpoint is given, how it was trained."""
    lines = [
        f"# {manifest.name}",
        "",
        _what(manifest),
        "",
        *_input(manifest),
        "",
        *_heads(manifest),
        "## Origin",
        "",
        f"- Weights: {manifest.weights.origin}.",
        f"- Licence of the weights: {manifest.weights.licence}.",
        f"- sha256 of the weights: `{manifest.weights.sha256}`.",
        f"- Exported by mtdp {manifest.mtdp_version}.",
        "",
    ]
    if checkpoint is not None:
        lines += ["## Training", "", *_training(checkpoint), ""]
    lines += [
        "## What it is for",
        "",
        (
            "Vectors of tissue tiles, for a classifier, a search or a slide-level model that is trained and judged on "
            "data of your own. `mtdp-train probe --task DIR --init BUNDLE` says what they are worth on a labelled task."
        ),
        "",
        "## What it is not for",
        "",
        (
            "Research and engineering only. It was not validated for any clinical purpose; no diagnosis may rest on "
            f"it. At another scale than {manifest.mpp:g} µm a pixel, or another stain or scanner than in training, "
            "nothing is promised: judge it there first."
        ),
        "",
        "## Proof",
        "",
        (
            f"Features of the golden tiles against {_REFERENCES[manifest.reference]} (`mtdp-export --verify` repeats "
            "this on your machine):"
        ),
        "",
        "| variant | engine | tiles | cosine min | cosine mean | max abs error |",
        "|---|---|---|---|---|---|",
    ]
    for variant in manifest.variants:
        p = variant.parity
        lines.append(
            f"| {variant.precision} | {p.backend} | {p.tiles} | {p.cosine_min:.8f} | {p.cosine_mean:.8f} | "
            f"{p.max_abs_error:.1e} |"
        )
    return "\n".join(lines) + "\n"


def _what(manifest: Manifest) -> str:
    return (
        f"A frozen {manifest.arch}: `uint8[N, {manifest.tile_px}, {manifest.tile_px}, 3]` RGB tiles at "
        f"{manifest.mpp:g} µm a pixel in, `float32[N, {manifest.features_dim}]` features out. Normalisation and "
        "pooling are inside the graph."
    )


def _input(manifest: Manifest) -> list[str]:
    mean, std = (" ".join(f"{value:.6g}" for value in values) for values in (manifest.mean, manifest.std))
    files = ", ".join(f"{v.file.file} ({v.file.size_bytes / 1e6:.1f} MB)" for v in manifest.variants)
    return [
        "| | |",
        "|---|---|",
        f"| tile | {manifest.tile_px} x {manifest.tile_px} px, {manifest.tile_px * manifest.mpp:g} µm wide |",
        f"| scale | {manifest.mpp:g} µm a pixel |",
        f"| normalisation (in the graph) | RGB of 0..1, mean {mean}, std {std} |",
        f"| images of another size, in training and in a probe | {manifest.interpolation} |",
        f"| features | {manifest.features_dim} |",
        f"| files | {files} |",
        "",
        "```sh",
        "mtdp-extract SLIDE --model BUNDLE",
        "```",
    ]


def _heads(manifest: Manifest) -> list[str]:
    if not manifest.heads:
        return []
    rows = [f"| {head.name} | {', '.join(head.class_names)} |" for head in manifest.heads]
    return ["## Heads", "", "| task | classes, in the order of the output |", "|---|---|", *rows, ""]


def _training(info: CheckpointInfo) -> list[str]:
    # Without `init`: the origin above says it, and here it may be a path of the machine that trained.
    config = {key: value for key, value in info.training["config"].items() if key != "init"}
    settings = ", ".join(f"{key} {value}" for key, value in sorted(config.items()))
    lines = [
        f"{info.iteration} batches were done. Settings: {settings}.",
        "",
        "| task | images | classes |",
        "|---|---|---|",
    ]
    for name, task in info.training["tasks"].items():
        lines.append(f"| {name} | {task['images']} | {', '.join(task['classes'])} |")
    versions = ", ".join(f"{key} {value}" for key, value in sorted(info.training["versions"].items()))
    return [*lines, "", f"Versions: {versions}."]
