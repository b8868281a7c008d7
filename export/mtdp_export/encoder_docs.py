"""The catalogue for people: a table for a terminal, JSON, and docs/encoders.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mtdp_export.catalogue import Recipe

_HOW = {"timm": "timm", "transformers": "transformers", "mtdp": "this project's core", "onnx": "its authors' own code"}
_HEAD = """# Encoders

<!-- Made from export/mtdp_export/encoders.toml by `python -m mtdp_export.encoder_docs`; do not edit. -->

What labs run, and the line that makes a bundle of each. `mtdp-export --list-encoders` prints the same.

An entry holds what a file of weights does not say: the architecture with its arguments, mean and std, how images are
resized, which of the network's values is the feature, and the scale. Where sources disagree, the choice is stated. The
digest of the file is compared with the published one, and the bundle says whether it holds "the published weights" or
"other weights". Weights are not downloaded: get them where they are published, after accepting their terms.

**What was proven.** Each entry that is built here is tested with random weights in the published layout, at a reduced
depth and width: the exported graph repeats, from the pixels of real tiles on, a network that was written with timm or
transformers and torchvision's transforms (cosine at least 0.999999), the number of its parameters at full size is the
published one, and no node of the graph is computed from constants. Published weights are not part of the tests: most
are gated. What an export prints is the proof of the weights that it was given.

**Tiles of another size.** `--tile-px 256` reads tiles of 256 px, and the graph resizes them to the encoder's own input
as its card's transform does: features that somebody computed from such tiles through such a transform are repeated. A
tile of the size of the input is taken as it is. `--resize 256` gives the network 256 px, where it takes them.
"""


def as_json(recipes: Sequence[Recipe]) -> list[dict[str, Any]]:
    """Return one object for each encoder."""
    return [asdict(recipe) | {"line": recipe.line} for recipe in recipes]


def as_lines(recipes: Sequence[Recipe]) -> str:
    """Return a table for a terminal."""
    rows = [("name", "features", "input", "µm/px", "feature", "commercial", "gated", "built by")]
    rows += [
        (
            r.key,
            str(r.features_dim),
            f"{r.preprocessing.image_px} px",
            " ".join(f"{mpp:g}" for mpp in r.mpp),
            r.feature,
            "yes" if r.licence.commercial else "no",
            "yes" if r.gated else "no",
            _HOW[r.library],
        )
        for r in recipes
    ]
    widths = [max(len(row[column]) for row in rows) + 2 for column in range(len(rows[0]))]
    return "\n".join(
        "".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def as_markdown(recipes: Sequence[Recipe]) -> str:
    """Return docs/encoders.md."""
    lines = [
        _HEAD,
        "| name | encoder | features | input | µm/px | feature | commercial use | gated |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in recipes:
        mpp = ", ".join(f"{value:g}" for value in r.mpp)
        commercial, gated = ("yes" if flag else "no" for flag in (r.licence.commercial, r.gated))
        lines.append(
            f"| [`{r.key}`](#{_anchor(r.title)}) | {r.title} | {r.features_dim} | {r.preprocessing.image_px} px | "
            f"{mpp} | {r.feature} | {commercial} | {gated} |"
        )
    for r in recipes:
        lines += ["", f"## {r.title}", "", "```sh", r.line, "```", "", *_facts(r)]
    return "\n".join(lines) + "\n"


def _facts(r: Recipe) -> list[str]:
    mean, std = (" ".join(f"{v:g}" for v in values) for values in (r.preprocessing.mean, r.preprocessing.std))
    arguments = ", ".join(f"{name}={value}" for name, value in r.arguments.items())
    where = f"{r.weights.repository}, {r.weights.file}" + (
        f", revision `{r.weights.revision}`" if r.weights.revision else ""
    )
    facts = []
    if r.library == "onnx":
        facts.append(f"- It needs its authors' own code, which is not run here. To make the ONNX file: {r.onnx}.")
    else:
        facts.append(f"- Built by {_HOW[r.library]}: `{r.arch}`{f' with {arguments}' if arguments else ''}.")
    steps = f"tiles of {r.tile_px} px"
    if r.resize_px != r.tile_px:
        steps += f", resized to {r.resize_px}"
    if r.preprocessing.image_px != r.resize_px:
        steps += f", the centre of {r.preprocessing.image_px}"
    facts += [
        f"- Pixels: {steps}; mean {mean}, std {std}; other sizes by {r.preprocessing.interpolation}.",
        f"- Feature: {r.feature}, {r.features_dim} values.",
        f"- Weights: {where}" + (f", sha256 `{r.weights.sha256}`." if r.weights.sha256 else "; no digest is known."),
        f"- Licence of the weights: {r.licence}." + (" Gated: its terms are accepted there." if r.gated else ""),
        f"- {r.paper}.",
    ]
    return [*facts, *([f"- Where sources disagree: {r.choice}"] if r.choice else [])]


def _anchor(title: str) -> str:
    kept = "".join(c for c in title.lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")


if __name__ == "__main__":
    from pathlib import Path

    from mtdp_export.catalogue import catalogue

    target = Path(__file__).resolve().parents[2] / "docs" / "encoders.md"
    target.write_text(as_markdown(list(catalogue().values())), encoding="utf-8")
