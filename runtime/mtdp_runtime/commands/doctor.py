"""mtdp-doctor: what this machine can run, and a self-test of the whole way."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import typer

from mtdp_runtime.commands import exit_codes, options
from mtdp_runtime.commands.app import GroupedCommand, Quiet, Verbose, Version, new_app
from mtdp_runtime.commands.console import detail, result, result_json, run_app, say, trouble
from mtdp_runtime.errors import UsageError
from mtdp_runtime.machine import usable_cores

_PACKAGES: Final = (
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "cuda-bindings",
)

app = new_app()


@app.command(cls=GroupedCommand, epilog=exit_codes.HELP)
def doctor(
    slides: options.Slides = None,
    *,
    preflight: options.Preflight = False,
    out: options.Out = Path("features"),
    model: options.Models = None,
    tokens: options.Tokens = False,
    as_json: options.OneJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    version: Version = False,
) -> None:
    """Show what this machine can run, and try it: extract the features of a small synthetic slide.

    --preflight looks at what a run of mtdp-extract would meet, before it is queued.
    """
    if preflight and not slides:
        raise UsageError("--preflight: no slide was named", hint="mtdp-doctor --preflight SLIDE --out FOLDER")
    if slides and not preflight:
        raise UsageError("slides are looked at by --preflight alone", hint="mtdp-doctor --preflight SLIDE --out FOLDER")
    if tokens and not preflight:
        raise UsageError("--tokens is an option of --preflight", hint="mtdp-doctor --preflight SLIDE --tokens")
    if slides:
        from mtdp_runtime.commands.preflight import preflight as look

        raise typer.Exit(look(slides, out, model or [], as_json, tokens=tokens))
    findings = diagnose()
    if as_json:
        result_json(findings, indent=1)
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
    from mtdp_runtime.slide.compiled import described

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
        "averaging": described(),
        "packages": installed,
        "backends": [asdict(probe) for probe in probes],
        "packaged_model": bundle,
        "self_test": test,
        "problems": problems,
    }


def _self_test(problems: list[str]) -> dict[str, Any]:
    """Extract a small synthetic slide on every usable backend; one that fails is a problem, and the others go on."""
    import tempfile

    from mtdp_runtime.backends import backend_class, probe_all
    from mtdp_runtime.bundle import default_bundle_path, load_bundle
    from mtdp_runtime.commands.demo_slide import write_demo_slide
    from mtdp_runtime.errors import BackendError, UsageError
    from mtdp_runtime.extraction.extract import extract_slide
    from mtdp_runtime.extraction.models import Model, Target
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
                    target = Target(Path(folder) / f"{name}.h5", Model(bundle, engine))
                    outcome, _ = extract_slide(slide, [target], settings, readers=cores)
            except (BackendError, UsageError) as error:
                problems.append(f"self-test of {name}: {error}")
                continue
            rate = outcome.times.tiles_per_s if outcome.times else 0.0
            results[name] = {
                "precision": engine.precision,
                "tiles": outcome.tiles,
                "tiles_per_s": round(rate, 1),
                "note": engine.note,
            }
    return results


def _version(metadata: Any, name: str) -> str:
    try:
        return str(metadata.version(name))
    except metadata.PackageNotFoundError:
        return ""


def _print(findings: dict[str, Any]) -> None:
    say(f"machine         {findings['machine']}")
    say(f"openslide       {findings['openslide']}")
    say(f"averaging       {findings['averaging']}")
    say(f"packaged model  {findings['packaged_model'] or 'missing'}")
    say("engines, best first; --backend auto takes the first that can run")
    for probe in findings["backends"]:
        say(f"  {probe['name']:<20} {'yes' if probe['usable'] else 'no '}  {probe['reason']}")
        if not probe["usable"]:
            say(f"  {'':<20}      -> {probe['hint']}")
        elif probe["precisions"]:
            detail(f"  {'':<20}      precisions, best first: {', '.join(probe['precisions'])}")
    for name, test in findings["self_test"].items():
        result(f"self-test       {name} {test['precision']}: {test['tiles']} tiles, {test['tiles_per_s']} tiles/s")
        if test["note"]:
            say(f"                {test['note']}")
    for problem in findings["problems"]:
        trouble("problem: ", problem)


def main() -> None:
    """Entry point of `mtdp-doctor`."""
    run_app(app, "mtdp-doctor")
