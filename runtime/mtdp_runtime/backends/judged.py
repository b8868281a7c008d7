"""When `auto` may take int8, whose features are further from the network's than those of any other precision."""

from __future__ import annotations

from typing import Final

from mtdp_runtime.bundle.manifest import Manifest

# As at the export (mtdp_export.int8), which writes no other; a bundle may come from elsewhere.
_LARGEST_PROBE_LOSS: Final = 0.005


def judged_int8(manifest: Manifest) -> str:
    """Say by what the int8 variant was judged; empty where `auto` may not take it.

    Who exported it asked for it by name, and gave a labelled task: a linear probe on its features scored, on that task,
    at most half a point less than on those of fp32. A cosine alone does not say that int8 is good enough.
    """
    for variant in manifest.variants:
        scored, plain = variant.parity.probe_score, variant.parity.probe_score_fp32
        if variant.precision == "int8" and scored is not None and plain is not None:
            fine = plain - scored <= _LARGEST_PROBE_LOSS
            return f"a probe scores {scored:.3f} on it, {plain:.3f} in fp32" if fine else ""
    return ""
