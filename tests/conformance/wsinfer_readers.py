"""Lets WSInfer's own code read our CSV, and compares the GeoJSON that it makes of it with ours.

Not part of the test suite: WSInfer needs a zarr that is too old for the other readers. In an environment of its own:

    pip install wsinfer 'zarr<3'
    mtdp-extract slide.svs --heads --format csv --format geojson
    python tests/conformance/wsinfer_readers.py features
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import tempfile
from pathlib import Path

from wsinfer.write_geojson import make_geojson


def main() -> None:
    out = Path(sys.argv[1])
    tables = sorted((out / "model-outputs-csv").glob("*.csv"))
    assert tables, f"{out}: no model-outputs-csv"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model-outputs-geojson").mkdir()
        for table in tables:
            name = Path("model-outputs-geojson") / f"{table.stem}.geojson"
            make_geojson(table, Path(folder))
            theirs, ours = (json.loads((base / name).read_text())["features"] for base in (Path(folder), out))
            ours = [one for one in ours if one["properties"]["objectType"] == "tile"]  # the tissue follows them
            assert len(theirs) == len(ours)
            for a, b in zip(theirs, ours, strict=True):
                assert a["geometry"] == b["geometry"]
                assert a["properties"].keys() <= b["properties"].keys()
                measured, stored = a["properties"]["measurements"], b["properties"]["measurements"]
                assert measured.keys() == stored.keys()
                assert all(abs(measured[key] - stored[key]) < 1e-6 for key in stored)
            print(f"wsinfer {importlib.metadata.version('wsinfer')}: {table.name}: {len(ours)} tiles alike")


if __name__ == "__main__":
    main()
