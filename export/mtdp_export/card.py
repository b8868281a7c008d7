"""card.md: what a bundle is, for people."""

from __future__ import annotations

import json

from mtdp.checkpoint import CheckpointInfo
from mtdp_export.parity import NEIGHBOURS
from mtdp_export.tokens import GOLDEN_TILES
from mtdp_runtime.bundle.manifest import Manifest, Parity, Variant

# By the words of the catalogue, what the hub calls a licence (huggingface.co/docs/hub/repositories-licenses). Any other
# is `other`: terms that were added to a licence make it another one.
_HUB_LICENCES = {
    "Apache License 2.0": "apache-2.0",
    "MIT License": "mit",
    "CC BY-NC-ND 4.0: non-commercial, no derivatives, with attribution": "cc-by-nc-nd-4.0",
    "CC BY-NC-SA 4.0: non-commercial, share alike, with attribution": "cc-by-nc-sa-4.0",
}
_LICENCE_TEXT = " Its text: [LICENSE](LICENSE)."
_REFERENCES = {
    "torch": "PyTorch fp32",
    "onnxruntime": "the ONNX file as it was brought, in ONNX Runtime fp32, one tile at a time",
}


def model_card(manifest: Manifest, checkpoint: CheckpointInfo | None = None, licence_text: bool = False) -> str:
    """Return the card as Markdown: what bundle.json states and, where a checkpoint is given, how it was trained.

    `licence_text` says whether the text of the weights' licence lies in the bundle, as LICENSE.
    """
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
        f"- Licence of the weights: {manifest.weights.licence}.{_LICENCE_TEXT if licence_text else ''}",
        *([f"- The digest of their file says: {manifest.weights.published}."] if manifest.weights.published else []),
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
            f"it. At another scale than {manifest.mpp:g} µm per pixel, or another stain or scanner than in training, "
            "nothing is promised: judge it there first."
        ),
        "",
        *_proof(manifest),
        *_engines(manifest),
    ]
    return "\n".join(lines) + "\n"


def front_matter(manifest: Manifest, licence_text: bool = False) -> str:
    """Return what the Hugging Face hub reads of a card: YAML that stands before it, its texts written as JSON's are."""
    said = manifest.weights.licence
    words = said.partition(" (commercial use:")[0]
    known = _HUB_LICENCES.get(words, words.lower() if words.lower() in _HUB_LICENCES.values() else "other")
    lines = [f"license: {known}"]
    if known == "other":
        lines.append(f"license_name: {json.dumps(said, ensure_ascii=False)}")
        lines += ["license_link: LICENSE"] if licence_text else []
    lines += ["library_name: mtdp", "pipeline_tag: image-feature-extraction", "tags:"]
    lines += [f"- {tag}" for tag in ("pathology", "whole-slide-imaging", "feature-extraction", "onnx")]
    return "\n".join(["---", *lines, "---", "", ""])


def _proof(manifest: Manifest) -> list[str]:
    tiles = f"Features of the golden tiles ({manifest.golden_source or 'not stated where from'})"
    lines = [
        "## Proof",
        "",
        f"{tiles} against {_REFERENCES[manifest.reference]} (`mtdp-export --verify` repeats this on your machine):",
        "",
        f"| variant | engine | tiles | cosine min | cosine mean | max abs error | {NEIGHBOURS}-NN agreement |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant in manifest.variants:
        others = [p for p in variant.engines if p.backend != variant.parity.backend]
        for parity in (variant.parity, *others):
            lines += _proof_rows(variant.precision, parity)
    said = [line for variant in manifest.variants for line in _of_variant(variant)]
    return [*lines, *(["", *said] if said else [])]


def _proof_rows(precision: str, p: Parity) -> list[str]:
    agreement = "-" if p.knn_agreement is None else f"{p.knn_agreement:.1%}"
    figures = f"{p.cosine_min:.8f} | {p.cosine_mean:.8f} | {p.max_abs_error:.1e} | {agreement}"
    rows = [f"| {precision} | {p.backend} | {p.tiles} | {figures} |"]
    if p.tokens_cosine_min is not None:
        few = min(p.tiles, GOLDEN_TILES)
        rows.append(f"| {precision}, tokens | {p.backend} | {few} | {p.tokens_cosine_min:.8f} | - | - | - |")
    return rows


def _of_variant(variant: Variant) -> list[str]:
    lines = []
    if variant.fp32_kernels:
        lines.append(f"- {variant.precision}: kernels that compute in fp32 all the same: {variant.fp32_kernels}.")
    p = variant.parity
    if p.probe_score is not None and p.probe_score_fp32 is not None:
        lines.append(
            f"- {variant.precision}: a linear probe on a real task scores {p.probe_score:.4f}, with fp32 "
            f"{p.probe_score_fp32:.4f}."
        )
    return lines


def _engines(manifest: Manifest) -> list[str]:
    if not manifest.engines:
        return []
    lines = [
        "",
        "## Engines",
        "",
        (
            "Built ahead of time, and not run by the export: the table above says nothing of them. Each proves itself "
            "on the golden tiles where it is loaded. Engines are code: `--trust-engines` loads one, where its key fits "
            "the machine."
        ),
        "",
        "| file | library | variant | batches | compute capability | GPU |",
        "|---|---|---|---|---|---|",
    ]
    for engine in manifest.engines:
        key, capabilities = engine.key, ", ".join(engine.key.capabilities)
        lines.append(
            f"| {engine.file.file} ({engine.file.size_bytes / 1e6:.1f} MB) | {key.library} {key.version} | "
            f"{key.precision} | {key.batch[0]} to {key.batch[2]}, best {key.batch[1]} | {capabilities} | "
            f"{key.gpu or 'any of these'} |"
        )
    return lines


def _what(manifest: Manifest) -> str:
    return (
        f"A frozen {manifest.arch}: `uint8[N, {manifest.tile_px}, {manifest.tile_px}, 3]` RGB tiles at "
        f"{manifest.mpp:g} µm per pixel in, `float32[N, {manifest.features_dim}]` features out. Normalisation and "
        "pooling are inside the graph."
    )


def _input(manifest: Manifest) -> list[str]:
    mean, std = (" ".join(f"{value:.6g}" for value in values) for values in (manifest.mean, manifest.std))
    files = ", ".join(f"{v.file.file} ({v.file.size_bytes / 1e6:.1f} MB)" for v in manifest.variants)
    return [
        "| | |",
        "|---|---|",
        f"| tile | {manifest.tile_px} x {manifest.tile_px} px, {manifest.tile_px * manifest.mpp:g} µm wide |",
        f"| scale | {manifest.mpp:g} µm per pixel |",
        *_resized(manifest),
        f"| normalisation (in the graph) | RGB of 0..1, mean {mean}, std {std} |",
        f"| who says these numbers | {manifest.preprocessing_source or 'not stated'} |",
        f"| images of another size, in training and in a probe | {manifest.interpolation} |",
        *([f"| feature | {manifest.feature} |"] if manifest.feature else []),
        f"| features | {manifest.features_dim} |",
        *_tokens(manifest),
        f"| files | {files} |",
        "",
        "```sh",
        "mtdp-extract SLIDE --model BUNDLE",
        "```",
    ]


def _tokens(manifest: Manifest) -> list[str]:
    if manifest.tokens is None:
        return []
    rows, columns = manifest.tokens.grid
    return [f"| patch tokens (`mtdp-extract --tokens`) | {rows} x {columns} of {manifest.tokens.dim} |"]


def _resized(manifest: Manifest) -> list[str]:
    steps = []
    if manifest.resize_px is not None:
        steps.append(f"resized to {manifest.resize_px} px")
    if manifest.input_px is not None:
        steps.append(f"cut to its centre of {manifest.input_px} px")
    how = f" ({manifest.interpolation}, as Pillow and torchvision do it)" if manifest.resize_px is not None else ""
    return [f"| before that (in the graph) | {', '.join(steps)}{how} |"] if steps else []


def _heads(manifest: Manifest) -> list[str]:
    if not manifest.heads:
        return []
    rows = [f"| {head.name} | {', '.join(head.class_names)} |" for head in manifest.heads]
    return ["## Heads", "", "| task | classes, in the order of the output |", "|---|---|", *rows, ""]


def _training(info: CheckpointInfo) -> list[str]:
    # Without `init`: the origin above says it, and here it may be a path of the machine that trained.
    config = {key: value for key, value in info.training["config"].items() if key != "init"}
    settings = ", ".join(f"{key} {value}" for key, value in sorted(config.items()))
    unit = "epochs" if "epochs" in config else "batches"
    lines = [
        f"{info.iteration} {unit} were done. Settings: {settings}.",
        "",
        "| task | images | classes |",
        "|---|---|---|",
    ]
    for name, task in info.training["tasks"].items():
        lines.append(f"| {name} | {task['images']} | {', '.join(task['classes'])} |")
    versions = ", ".join(f"{key} {value}" for key, value in sorted(info.training["versions"].items()))
    return [*lines, "", f"Versions: {versions}."]
