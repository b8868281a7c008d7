"""The steps of `gpu.py`, each for a process of its own: `python gpu_steps.py OUT STEP` adds lines to OUT/rows.jsonl."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TESTS = HERE.parent / "tests"
SMI_CARD = ("name", "driver_version", "memory.total", "power.limit", "mig.mode.current")
SMI_LOAD = ("utilization.gpu", "memory.used", "clocks.sm", "clocks.mem", "power.draw")
MEASURE_S = 1.0
MPP = 0.5


class Step:
    """What a step is told, and where its figures go."""

    def __init__(self, out: Path, name: str) -> None:
        self.name = name
        self.setup: dict[str, Any] = json.loads((out / "setup.json").read_text())
        self.out = out
        self.arch = name.partition(" ")[2]
        self.dry_run: bool = self.setup["dry_run"]

    def emit(self, what: str, **figures: Any) -> None:
        line = json.dumps({"step": self.name, "what": what, **figures})
        print(line, flush=True)
        with (self.out / "rows.jsonl").open("a") as stream:
            stream.write(f"{line}\n")

    def bundle(self, trust_engines: bool = False) -> Any:
        from mtdp_runtime.bundle import load_bundle

        return load_bundle(self.bundle_path, trust_engines)

    @property
    def bundle_path(self) -> Path:
        return Path(self.setup["bundles"]) / self.arch.replace(":", "_").replace("/", "_")

    @property
    def slide(self) -> Path:
        return self.out / "slide.tiff"


def machine(step: Step) -> None:
    """The card, its driver, and what is installed."""
    from importlib.metadata import PackageNotFoundError, version

    versions = []
    for name in ("torch", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu13", "cuda-bindings", "mtdp"):
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            versions.append(f"{name} missing")
    card = ", ".join(f"{name} {value}" for name, value in zip(SMI_CARD, _smi(*SMI_CARD), strict=False))
    cores = len(os.sched_getaffinity(0))
    step.emit("machine", text=f"{card or 'no nvidia-smi'}; {cores} cores; {platform.platform()}; {', '.join(versions)}")


def _smi(*fields: str) -> list[str]:
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [part.strip() for part in said.splitlines()[0].split(",")] if said.strip() else []


def doctor(step: Step) -> None:
    """What mtdp-doctor says of each engine, its self-test included."""
    from mtdp_runtime.commands.doctor import diagnose

    found = diagnose()
    for probe in found["backends"]:
        state = "usable" if probe["usable"] else "not usable"
        step.emit("finding", text=f"{probe['name']} {state}: {probe['reason']}{_after(probe['hint'])}")
    for name, test in found["self_test"].items():
        text = f"self-test of {name}: {test['tiles']} tiles in {test['precision']}{_after(test['note'])}"
        step.emit("finding", text=text)
    for problem in found["problems"]:
        step.emit("finding", text=f"PROBLEM: {problem}")


def _after(text: str) -> str:
    return f" ({text})" if text else ""


def tests(step: Step) -> None:
    """The tests that need a GPU; without one they are skipped."""
    files = [str(TESTS / "runtime" / name) for name in ("test_tensorrt_gpu.py", "test_backend_contract.py")]
    files.append(str(TESTS / "mtdp" / "test_fp16.py"))
    if step.dry_run:
        del files[1:]  # all are skipped
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-n0", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    for line in done.stdout.splitlines():
        if line.startswith(("FAILED", "ERROR")):
            step.emit("finding", text=line)
    last = next((line for line in reversed(done.stdout.splitlines()) if re.search(r"\d+ \w+", line)), "no answer")
    step.emit("finding", text=f"tests marked gpu: {last.strip('= ')}")


def copies(step: Step) -> None:
    """Page-locked memory to the GPU and back, in pieces of a batch of 64 tiles."""
    from mtdp_runtime.backends.gpus import call, load_cudart, select_gpu

    cudart = load_cudart()
    select_gpu(0)
    size, times = 64 * step.setup["tile_px"] ** 2 * 3, 4 if step.dry_run else 200
    host, device = call(cudart, cudart.cudaHostAlloc(size, 0)), call(cudart, cudart.cudaMalloc(size))
    stream = call(cudart, cudart.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking))
    kinds = cudart.cudaMemcpyKind
    ways = {"to the GPU": (device, host, kinds.cudaMemcpyHostToDevice)}
    ways["from the GPU"] = (host, device, kinds.cudaMemcpyDeviceToHost)
    for direction, (target, source, kind) in ways.items():
        call(cudart, cudart.cudaMemcpyAsync(target, source, size, kind, stream))
        call(cudart, cudart.cudaStreamSynchronize(stream))
        start = time.perf_counter()
        for _ in range(times):
            call(cudart, cudart.cudaMemcpyAsync(target, source, size, kind, stream))
        call(cudart, cudart.cudaStreamSynchronize(stream))
        rate = times * size / (time.perf_counter() - start) / 1e9
        step.emit("copies", direction=direction, megabytes=size / 1e6, gigabytes_per_s=rate)
    call(cudart, cudart.cudaStreamDestroy(stream))
    call(cudart, cudart.cudaFree(device))
    call(cudart, cudart.cudaFreeHost(host))


def slide(step: Step) -> None:
    """Write a slide that repeats the compressed tiles of a small one: nothing is encoded twice."""
    import tifffile

    from mtdp_runtime.commands.demo_slide import write_demo_slide

    base, times = step.out / "base.tiff", step.setup["slide_tiles"]
    write_demo_slide(base, step.setup["base_px"], step.setup["base_px"], most_levels=3)
    with tifffile.TiffFile(base) as small, tifffile.TiffWriter(step.slide, bigtiff=True) as tiff:
        for page in small.pages:
            side, across = page.imagewidth, page.imagewidth // page.tilewidth
            assert side == across * page.tilewidth, f"{side} px are no whole number of tiles"
            pieces = [_segment(base, *at) for at in zip(page.dataoffsets, page.databytecounts, strict=True)]
            order = (
                pieces[row % across * across + column % across]
                for row in range(across * times)
                for column in range(across * times)
            )
            tiff.write(
                order,
                shape=(side * times, side * times, 3),
                dtype="uint8",
                tile=(page.tilelength, page.tilewidth),
                photometric=page.photometric,
                subsampling=page.subsampling,
                compression=page.compression,
                resolution=(1e4 / MPP * side / step.setup["base_px"],) * 2,
                resolutionunit="CENTIMETER",
                subfiletype=page.subfiletype,
                metadata=None,
            )
    base.unlink()


def _segment(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as stream:
        stream.seek(offset)
        return stream.read(size)


@contextmanager
def _planned(step: Step, scale: float, tile_px: int) -> Iterator[tuple[Any, Any, Any]]:
    """Open the slide as if its tiles had this scale; yield it, its settings, and its plan."""
    from mtdp_runtime.settings import ExtractSettings
    from mtdp_runtime.slide.open import open_slide
    from mtdp_runtime.tiling.plan import make_plan

    settings = ExtractSettings(mpp=MPP, stride_px=tile_px)
    with open_slide(step.slide, MPP / scale, "gpu.py") as opened:
        yield opened, settings, make_plan(opened, tile_px, settings)


def decode(step: Step) -> None:
    """Reading and resampling tiles on the host, with nothing beside it."""
    from mtdp_runtime.commands.bench import read_rate

    for scale in step.setup["scales"]:
        with _planned(step, scale, step.setup["tile_px"]) as (opened, _, plan):
            for threads in step.setup["threads"]:
                part = replace(plan, kept=plan.kept[: threads * step.setup["read_tiles"]])
                rates = [read_rate(opened, part, threads) for _ in range(1 if step.dry_run else 2)]
                step.emit("decode", scale=scale, threads=threads, tiles=len(part.kept), tiles_per_s=max(rates))


def export(step: Step) -> None:
    """A bundle of random weights, proven on the CPU, unless one was brought."""
    if step.bundle_path.exists():
        return
    from mtdp_export.source import open_source
    from mtdp_export.write import ExportSettings, write_bundle

    source = open_source(step.arch, "random", step.setup["tile_px"] if step.dry_run else None, False)
    precisions = ("fp32", "fp16") if step.dry_run else ("fp32", "fp16", "bf16")
    step.bundle_path.parent.mkdir(parents=True, exist_ok=True)
    _, report = write_bundle(source, step.bundle_path, ExportSettings(step.arch, MPP, precisions=precisions))
    for refusal in report.refused:
        step.emit("finding", text=f"export of {step.arch}: {refusal}")


def engine(step: Step) -> None:
    """The model alone on one engine: proven on the golden tiles at load, then tiles/s at each batch."""
    _measure(step, step.name.split()[0], step.bundle(), step.name.split()[0])


def ahead(step: Step) -> None:
    """TensorRT-RTX with engines built ahead of time, without a GPU, and brought in the bundle."""
    from mtdp_export.engines import EngineSettings, build_engines
    from mtdp_runtime.backends import backend_class
    from mtdp_runtime.bundle import write_manifest

    probe = backend_class("tensorrt-rtx").probe()
    if not probe.usable:
        step.emit("finding", text=f"tensorrt-rtx built ahead: not measured: {probe.reason}")
        return
    bundle = step.bundle()
    smallest, best, largest = (min(step.setup["batches"]), step.setup["batches"][0], max(step.setup["batches"]))
    start = time.perf_counter()
    engines = build_engines(bundle.path, bundle.manifest, EngineSettings(("tensorrt-rtx",), (smallest, best, largest)))
    took = time.perf_counter() - start
    step.emit("finding", text=f"{step.arch}: {len(engines)} engines of tensorrt-rtx built ahead in {took:.1f} s")
    write_manifest(bundle.path, replace(bundle.manifest, engines=engines))
    _measure(step, "tensorrt-rtx", step.bundle(trust_engines=True), "tensorrt-rtx, built ahead")


def _measure(step: Step, name: str, bundle: Any, way: str) -> None:
    from mtdp_runtime.backends import backend_class
    from mtdp_runtime.backends.gpus import call, load_cudart
    from mtdp_runtime.backends.proof import replay
    from mtdp_runtime.backends.speed import engine_speed
    from mtdp_runtime.errors import BackendError

    rung = backend_class(name)
    probe = rung.probe()
    if not probe.usable:
        step.emit("finding", text=f"{way} with {step.arch}: not measured: {probe.reason}{_after(probe.hint)}")
        return
    cudart = load_cudart()
    held = [one for one in probe.precisions if bundle.holds(one)]
    wanted = [(held[0], batch) for batch in step.setup["batches"]]
    wanted[1:1] = [(precision, step.setup["batches"][0]) for precision in held[1:]]
    for precision, batch in wanted:
        start = time.perf_counter()
        try:
            loaded = rung.load(bundle, precision, batch, len(os.sched_getaffinity(0)))
        except BackendError as error:
            step.emit(
                "finding", text=f"{way} with {step.arch}, {precision}, batch {batch}: {error}{_after(error.hint)}"
            )
            continue
        load_s = time.perf_counter() - start
        with loaded:
            free, total = call(cudart, cudart.cudaMemGetInfo())
            speed = engine_speed(loaded, bundle.manifest.tile_px)
            step.emit(
                "infer",
                arch=step.arch,
                way=way,
                precision=precision,
                batch=loaded.batch,
                tiles_per_s=speed.tiles_per_s,
                load_s=round(load_s, 2),
                cosine=replay(loaded, bundle).cosine,
                gpu_mb=(total - free) / 1e6,
                note=loaded.note,
            )


def torch_ways(step: Step) -> None:
    """The same network in torch: from page-locked uint8 tiles to features on the host, as an engine does it."""
    import torch

    from mtdp.backbones import build_backbone, native_preprocessing
    from mtdp.preprocess import Normalise

    device = "cpu" if step.dry_run else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        step.emit("finding", text=f"torch {torch.__version__} finds no GPU: install a build of torch for this CUDA")
        return
    backbone = build_backbone(step.arch)
    pixels = native_preprocessing(backbone, step.setup["tile_px"] if step.dry_run else None)
    model = torch.nn.Sequential(Normalise(pixels), backbone).eval().to(device)
    compiled = torch.compile(model, **({"backend": "eager"} if step.dry_run else {}))
    first, *others = step.setup["batches"]
    kinds = {"fp32": None, "autocast fp16": torch.float16, "autocast bf16": torch.bfloat16}
    ways = [(model, "autocast fp16", first), (model, "autocast bf16", first), (model, "fp32", first)]
    ways += [(compiled, "autocast fp16", first)] + [(model, "autocast fp16", batch) for batch in others]
    for network, kind, batch in ways:
        shape = (batch, pixels.image_px, pixels.image_px, 3)
        tiles = torch.randint(0, 256, shape, dtype=torch.uint8, pin_memory=device == "cuda")
        start = time.perf_counter()
        with torch.inference_mode(), torch.autocast(device, kinds[kind], enabled=kinds[kind] is not None):
            _through(network, tiles, device, 2)
            load_s, done, start = time.perf_counter() - start, 0, time.perf_counter()
            while done == 0 or time.perf_counter() - start < (0.05 if step.dry_run else MEASURE_S):
                done += _through(network, tiles, device, 1 if step.dry_run else 8)
        rate = done / (time.perf_counter() - start)
        precision = f"{kind}{', compiled' if network is compiled else ''}"
        step.emit(
            "infer", arch=step.arch, way="torch", precision=precision, batch=batch, tiles_per_s=rate, load_s=load_s
        )


def _through(network: Any, tiles: Any, device: str, times: int) -> int:
    """Run so many batches, two waiting at most; return the tiles."""
    waiting: list[Any] = []
    for _ in range(times):
        waiting.append(network(tiles.to(device, non_blocking=True)).float())
        if len(waiting) == 2:
            waiting.pop(0).cpu()
    for features in waiting:
        features.cpu()
    return times * len(tiles)


def extract(step: Step) -> None:
    """Slide to features, at each scale, on the engine that `auto` takes."""
    from mtdp_runtime.backends import load
    from mtdp_runtime.extraction.extract import extract_slide
    from mtdp_runtime.extraction.models import Model, Target

    bundle, cores = step.bundle(), len(os.sched_getaffinity(0))
    loaded, reason = load("auto", bundle, "auto", step.setup["batches"][0], cores)
    step.emit("finding", text=f"end to end on {loaded.name}, {loaded.precision}: {reason}{_after(loaded.note)}")
    with loaded:
        for scale in step.setup["scales"]:
            path = step.out / "features.h5"
            path.unlink(missing_ok=True)
            target = [Target(path, Model(bundle, loaded))]
            with _planned(step, scale, bundle.manifest.tile_px) as (opened, settings, _), _load_of_gpu() as load_of:
                outcome, _ = extract_slide(opened, target, settings, readers=cores)
            times = outcome.times
            assert times is not None, outcome.message
            step.emit(
                "extract",
                scale=scale,
                engine=f"{loaded.name}, {loaded.precision}",
                tiles=times.tiles,
                tiles_per_s=times.tiles_per_s,
                waited=f"{times.device_idle:.0%}",
                bottleneck=times.bottleneck,
                readers=times.readers,
                **{f"{one.name}_s": round(one.busy_s, 2) for one in (times.read, times.infer, times.store)},
                **load_of(),
            )


@contextmanager
def _load_of_gpu() -> Iterator[Callable[[], dict[str, Any]]]:
    """Watch the GPU by nvidia-smi; what it did is known after the block."""
    query = ["nvidia-smi", f"--query-gpu={','.join(SMI_LOAD)}", "--format=csv,noheader,nounits", "-lms", "200"]
    found: dict[str, Any] = {}
    try:
        watching = subprocess.Popen(query, stdout=subprocess.PIPE, text=True)
    except OSError:
        yield lambda: found
        return
    try:
        yield lambda: found
    finally:
        watching.terminate()
        lines = [line.split(",") for line in watching.communicate()[0].splitlines()]
    samples = [
        [float(part) for part in line] for line in lines if len(line) == len(SMI_LOAD) and "[" not in "".join(line)
    ]
    if samples:
        used, memory, sm, _, power = (statistics.mean(column) for column in zip(*samples, strict=True))
        found |= {"gpu_used": f"{used:.0f}%", "gpu_mb": round(memory), "sm_mhz": round(sm), "watts": round(power)}


def peers(step: Step) -> None:
    """LazySlide's own loop on the same tiles, where its environment is."""
    python = Path(step.setup["envs"]) / "lazyslide" / "bin" / "python"
    if step.dry_run or not step.setup["envs"] or not python.exists():
        why = "in a dry run" if step.dry_run else "benchmarks/peers.py --install --envs DIR makes its environment"
        step.emit("finding", text=f"LazySlide: not measured: {why}")
        return
    command = [sys.executable, str(HERE / "peers.py"), "--envs", step.setup["envs"], "--peers", "lazyslide"]
    command += ["--device", "cuda", "--repeats", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    done.check_returncode()
    step.emit("peers", text=f"```\n{done.stdout.strip()}\n```")


STEPS: dict[str, Callable[[Step], None]] = {
    "machine": machine,
    "doctor": doctor,
    "tests": tests,
    "copies": copies,
    "slide": slide,
    "decode": decode,
    "export": export,
    "torch": torch_ways,
    "ahead": ahead,
    "extract": extract,
    "peers": peers,
} | dict.fromkeys(("tensorrt", "tensorrt-rtx", "onnxruntime-cuda", "onnxruntime-tensorrt"), engine)


def main() -> None:
    step = Step(Path(sys.argv[1]), sys.argv[2])
    os.environ["MTDP_CACHE"] = str(step.out / "cache")  # engines are built here, and not taken from an earlier day
    if step.dry_run:
        act_out(step.out)
    STEPS[step.name.split()[0]](step)


def act_out(out: Path) -> None:
    """Put a GPU in place that is acted out in host memory, and a small model where the packaged one would be slow."""
    sys.path.insert(0, str(TESTS))
    import fake_gpu

    fake_gpu.install_for_process(out)


if __name__ == "__main__":
    main()
