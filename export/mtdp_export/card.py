"""card.md: what a bundle is, for people."""

from __future__ import annotations

from mtdp_export.source import Source
from mtdp_runtime.bundle import Manifest


def model_card(manifest: Manifest, source: Source) -> str:
    """Return the card as Markdown."""
    lines = [
        f"# {manifest.name}",
        "",
        _what(manifest),
        "",
        f"- Weights: {manifest.weights.origin}.",
        f"- Licence of the weights: {manifest.weights.licence}.",
        f"- sha256 of the weights: `{manifest.weights.sha256}`.",
        f"- Exported by mtdp {manifest.mtdp_version}.",
        "",
    ]
    if source.checkpoint is not None:
        lines += ["## Training", "", *_training(source), ""]
    lines += [
        "## What it is not for",
        "",
        "Research and engineering only. It was not validated for any clinical purpose; no diagnosis may rest on it.",
        "",
        "## Proof",
        "",
        "Features of the golden tiles against PyTorch fp32 (`mtdp-export --verify` repeats this on your machine):",
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


def _training(source: Source) -> list[str]:
    info = source.checkpoint
    assert info is not None
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
