"""The catalogue for people: a table for a terminal, JSON, and docs/encoders.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mtdp_export.catalogue import Recipe

_HOW = {"timm": "timm", "transformers": "transformers", "mtdp": "this project's core", "onnx": "its authors' own code"}
_HEAD = """# Encoders

<!-- Made from export/mtdp_export/encoders.toml by `python -m mtdp_export.encoder_docs`; do not edit. -->

What labs run, and the line that makes a bundle of each. `mtdp-export --list-encoders` prints the table.

## What to do

1. Find the encoder in the table. Its section says where its weights lie, which file it is, and under which licence.
   Nothing is downloaded: get the file there, after accepting the terms. **"unsure" means that the sources contradict
   each other, or are silent: read them yourself.** The licence is that of the weights, and holds for the bundle as
   well.
2. Run the line of its section, with the path of your file after `--weights`, and add a slide of yours:

   ```sh
   mtdp-export uni --weights pytorch_model.bin --calibration slide.svs --out uni
   mtdp-extract slide.svs --model uni
   ```

   The export prints the licence, whether the file is "the published weights" (by its digest) or "other weights", and
   a table that compares each engine here with PyTorch in fp32, on tiles of your slide. `mtdp-export --verify uni`
   repeats it on another machine.
3. Precision. For a CPU leave `--precision` out: fp32 is written, and `mtdp-extract` uses bf16 by itself where the CPU
   is fast in it and the model proves itself in it. For a GPU: `--precision fp32 --precision fp16`. For encoders of a
   billion parameters (H-optimus, GigaPath, Midnight): `--precision fp16` alone, half the size. int8 is for CPUs
   without fast bf16; it needs `--calibration` and a labelled task ([bundle.md](bundle.md) says what it must keep).

An entry holds what a file of weights does not say: the architecture with its arguments, mean and std, how images are
resized, which of the network's values is the feature, and the scale. Where sources disagree, the choice is stated.
Weights in the wrappings of training programs (`{teacher: ...}`, `module.`, chunks of blocks, ...) load as well; of
several networks in one file a teacher is taken before its student, and an average before what it is of; what was
taken is stated. A file that holds the published weights of another entry is refused.

**What was proven.** Each entry that is built here is tested with random weights in the published layout, at a reduced
depth and width: the exported graph repeats, from the pixels of real tiles on, a network that was written with timm or
transformers and torchvision's transforms (cosine at least 0.999999), the number of its parameters at full size is the
published one, and no node of the graph is computed from constants. **Published weights were not available here**:
most are gated. So no entry was compared with features that its authors computed; what an export prints is the proof
that the bundle computes what PyTorch does with the file that it was given.

**Encoders with code of their own** (the last column of `--list-encoders`: CONCH, MUSK, Hibou, ...): their authors'
code is not run here. Load the model with it, make an ONNX file, and bring that by the line of its section, with
`--licence`. `model` gives one vector for each image; the section says which of its values:

```python
import torch

images = torch.zeros(2, 3, 448, 448)  # the section's size of the input
sizes = ({0: torch.export.Dim("batch")},)
torch.onnx.export(model.eval(), (images,), "FILE.onnx", dynamo=True, opset_version=20, dynamic_shapes=sizes)
```

**Tiles of another size.** `--tile-px 256` reads tiles of 256 px, and the graph resizes them to the encoder's own input
as its card's transform does: features that somebody computed from such tiles through such a transform are repeated. A
tile of the size of the input is taken as it is. `--resize 256` gives the network 256 px, where it takes them.
"""

_BELOW = (
    "To make a bundle: mtdp-export NAME --weights FILE --out B",
    "Commercial: whether the weights' licence allows it; unsure: the sources contradict each other, read it yourself.",
    "Built by its authors' own code: bring it as an ONNX file. docs/encoders.md has each line, and what was proven.",
)


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
            r.licence.commercial,
            "yes" if r.gated else "no",
            _HOW[r.library],
        )
        for r in recipes
    ]
    widths = [max(len(row[column]) for row in rows) + 2 for column in range(len(rows[0]))]
    lines = ["".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "", *_BELOW])


def as_markdown(recipes: Sequence[Recipe]) -> str:
    """Return docs/encoders.md."""
    lines = [
        _HEAD,
        "| name | encoder | features | input | µm/px | feature | commercial use | gated |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in recipes:
        mpp = ", ".join(f"{value:g}" for value in r.mpp)
        commercial, gated = r.licence.commercial, "yes" if r.gated else "no"
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
