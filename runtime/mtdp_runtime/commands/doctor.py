"""mtdp-doctor: what this machine can run, and a self-test of the whole way."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any, Final

import typer

from mtdp_runtime.commands.console import printable, run_app
from mtdp_runtime.machine import usable_cores

_PACKAGES: Final = (
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "cuda-bindings",
)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False) -> None:
    """Show what this machine can run, and try it: extract the features of a small synthetic slide."""
    findings = diagnose()
    if as_json:
        print(json.dumps(findings, indent=1))
    else:
        _print(findings)
    if findings["problems"]:
        raise typer.Exit(1)


def conflicts(installed: Mapping[str, str]) -> list[str]:
    """Return what is wrong with the packages; `installed` has their versions, empty where one is missing."""
    if installed.get("onnxruntime") and installed.get("onnxruntime-gpu"):
        both = "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files"
        return [f"{both}: pip uninstall both, then install the one you want"]
    return []


def diagnose() -> dict[str, Any]:
    """Probe the machine and run the self-test."""
    from importlib import metadata

    import openslide

    from mtdp_runtime.backends import probe_all
    from mtdp_runtime.bundle import default_bundle_path, load_bundle
    from mtdp_runtime.errors import RuntimeFailure

    installed = {name: _version(metadata, name) for name in _PACKAGES}
    problems = conflicts(installed)
    probes = probe_all()
    if not any(probe.usable for probe in probes):
        problems.append("no inference engine is usable: pip install 'mtdp[cpu]'")
    bundle = ""
    try:
        loaded = load_bundle(default_bundle_path())
        bundle = f"{loaded.manifest.name} ({loaded.manifest.arch}), digest {loaded.digest[:16]}"
    except RuntimeFailure as error:
        problems.append(f"packaged model: {error}")
    test: dict[str, Any] = {}
    if not problems:
        try:
            test = _self_test(problems)
        except RuntimeFailure as error:
            problems.append(f"self-test: {error}")
    return {
        "machine": f"{platform.platform()}, Python {platform.python_version()}, {usable_cores()} cores",
        "openslide": openslide.__library_version__,
        "packages": installed,
        "backends": [asdict(probe) for probe in probes],
        "packaged_model": bundle,
        "self_test": test,
        "problems": problems,
    }


def _self_test(problems: list[str]) -> dict[str, Any]:
    """Extract a small synthetic slide on every usable backend; one that fails is a problem, and the others go on."""
    import tempfile
    from pathlib import Path

    from mtdp_runtime.backends import backend_class, probe_all
    from mtdp_runtime.bundle import default_bundle_path, load_bundle
    from mtdp_runtime.commands.demo_slide import write_demo_slide
    from mtdp_runtime.errors import BackendError, UsageError
    from mtdp_runtime.extraction.extract import extract_slide
    from mtdp_runtime.settings import ExtractSettings
    from mtdp_runtime.slide.open import open_slide

    bundle = load_bundle(default_bundle_path())
    settings = ExtractSettings(mpp=bundle.manifest.mpp, stride_px=bundle.manifest.tile_px)
    cores = usable_cores()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="mtdp-doctor-") as folder:
        slide_path = Path(folder) / "demo.tiff"
        write_demo_slide(slide_path, 2048, 1536)
        for name in (probe.name for probe in probe_all() if probe.usable):
            try:
                with backend_class(name).load(bundle, "auto", 8, cores) as engine, open_slide(slide_path) as slide:
                    outcome, _ = extract_slide(slide, Path(folder) / f"{name}.h5", bundle, engine, settings, cores)
            except (BackendError, UsageError) as error:
                problems.append(f"self-test of {name}: {error}")
                continue
            rate = outcome.times.tiles_per_s if outcome.times else 0.0
            results[name] = {"precision": engine.precision, "tiles": outcome.tiles, "tiles_per_s": round(rate, 1)}
    return results


def _version(metadata: Any, name: str) -> str:
    try:
        return str(metadata.version(name))
    except metadata.PackageNotFoundError:
        return ""


def _print(findings: dict[str, Any]) -> None:
    print(f"machine         {findings['machine']}")
    print(f"openslide       {findings['openslide']}")
    print(f"packaged model  {printable(findings['packaged_model'] or 'missing')}")
    print("engines, best first; --backend auto takes the first that can run")
    for probe in findings["backends"]:
        print(f"  {probe['name']:<20} {'yes' if probe['usable'] else 'no '}  {probe['reason']}")
        if not probe["usable"]:
            print(f"  {'':<20}      -> {probe['hint']}")
    for name, result in findings["self_test"].items():
        print(f"self-test       {name} {result['precision']}: {result['tiles']} tiles, {result['tiles_per_s']} tiles/s")
    for problem in findings["problems"]:
        print(f"problem: {printable(problem)}", file=sys.stderr)


def main() -> None:
    """Entry point of `mtdp-doctor`."""
    run_app(app)
